package gcs

import (
	"crypto/md5"
	"encoding/base64"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// An observation is one call of one version, as its caller saw it.
type observation struct {
	who     string
	call    string // Save, Exists, List, Delete, or the method that read an object
	version string
	save    string // which Save it was, or whose object was read
	how     string
	outcome outcome
	err     error
	// The order of all beginnings and ends. A call whose end nobody saw, or
	// whose requests may be applied after it, ends at the end of time.
	start, end int
	from, till time.Duration
}

type outcome int

const (
	running  outcome = iota
	stored           // Save returned nil
	existed          // Save returned KindAlreadyExists
	yes              // Exists and List
	no               //
	deleted          // Delete returned nil
	notFound         // Delete, or a read
	got              // a read
	failed           // anything: the context ended, the reader failed
	crashed          // its machine did
)

var outcomeNames = [...]string{"still running", "nil", "KindAlreadyExists", "true", "false", "nil", "KindNotFound", "the object", "error", "crashed"}

const endOfTime = 1 << 30

func (o *observation) String() string {
	s := fmt.Sprintf("%10v %10v  %-4s %s %s", o.from.Round(time.Millisecond), o.till.Round(time.Millisecond), o.who, o.call, o.version)
	switch {
	case o.outcome == got:
		s += fmt.Sprintf(" → of %s", o.save)
	case o.call == "Save":
		s += fmt.Sprintf(" %s (%s) → %v", o.save, o.how, outcomeNames[o.outcome])
	default:
		s += fmt.Sprintf(" → %v", outcomeNames[o.outcome])
	}
	if o.err != nil {
		s += fmt.Sprintf(" (%v)", o.err)
	}
	return s
}

// says reports whether the version was complete at some moment of the call.
func (o *observation) says() bool {
	return o.outcome == stored || o.outcome == existed || o.outcome == yes
}

// deletes reports whether the call may have ended a version's life.
func (o *observation) deletes() bool {
	return o.call == "Delete" && o.outcome != notFound
}

// A history is what callers saw of one version.
type history []*observation

// deletedBetween reports whether a delete may have been carried out between two
// moments: one that overlaps them, for it can be ordered before or after either.
func (h history) deletedBetween(a, b int) bool {
	return slices.ContainsFunc(h, func(o *observation) bool { return o.deletes() && o.start < b && o.end > a })
}

// check holds the history against the invariants, and returns what breaks them.
func (h history) check() (broken []string) {
	report := func(what string, os ...*observation) {
		for _, o := range os {
			what += "\n\t" + o.String()
		}
		broken = append(broken, what)
	}
	for _, claim := range h {
		if !claim.says() {
			continue
		}
		var whose *observation // by a read, or by the claim itself
		if claim.outcome == stored {
			whose = claim
		}
		for _, later := range h {
			if later.start < claim.end || h.deletedBetween(claim.start, later.end) {
				continue
			}
			switch later.outcome {
			case no:
				report("a complete version is said not to exist:", claim, later)
			case notFound:
				report("an object of a complete version is not found:", claim, later)
			case stored:
				report("a complete version is stored again:", claim, later)
			case got:
				if whose != nil && whose.save != later.save {
					report("a version is of two saves:", claim, whose, later)
				}
				whose = later
			}
		}
	}
	for i, a := range h {
		for _, b := range h[i+1:] {
			if a.outcome == stored && b.outcome == stored && !h.deletedBetween(min(a.start, b.start), max(a.end, b.end)) {
				report("two saves of one life returned nil:", a, b)
			}
		}
	}
	return broken
}

// A life is a version that is complete: whose it is, and the generations of its objects.
type life struct {
	of             string
	info, mod, zip int64
}

// A witness looks at versions in a bucket, and tells what breaks the invariants.
type witness struct {
	whose map[string]string // by MD5
	lives map[ModuleVersion]life
}

func newWitness() *witness { return &witness{map[string]string{}, map[ModuleVersion]life{}} }

// knows tells the witness whose a content is.
func (w *witness) knows(who string, c content) {
	for _, ext := range allExts {
		w.whose[md5Of(c.file(ext))] = who
	}
}

// look returns the life that a version has now, or none.
func (w *witness) look(objects map[string]*fakegcs.Object, v ModuleVersion) (now life, broken []string) {
	info, mod, zip := objects[v.object(extInfo)], objects[v.object(extMod)], objects[v.object(extZip)]
	report := func(format string, args ...any) {
		broken = append(broken, v.Version+": "+fmt.Sprintf(format, args...))
	}
	was := w.lives[v]
	switch {
	case mod == nil || mod.Metadata[keyInProgress] != "" || mod.Metadata[keyInProgressOld] != "":
	case info != nil && zip != nil:
		now = life{w.whose[mod.MD5], info.Generation, mod.Generation, zip.Generation}
		if w.whose[info.MD5] != now.of || w.whose[zip.MD5] != now.of {
			report("it is complete with the .info of %s, the .mod of %s and the .zip of %s", w.whose[info.MD5], now.of, w.whose[zip.MD5])
		}
	case w.whose[mod.MD5] != "old":
		report("the .mod has no marker, and another object is missing")
	}
	if was.of != "" && mod != nil && mod.Generation == was.mod && now != was {
		report("an object of a complete version was changed: %v, %v", was, now)
	}
	w.lives[v] = now
	return now, broken
}

// requireComplete returns whose the version is that most tests save.
func (w *witness) requireComplete(t *testing.T, f *fakeGCS) string {
	t.Helper()
	now, broken := w.look(f.Objects(), testVersionName)
	require.Empty(t, broken)
	require.NotEmpty(t, now.of, "the version has only %v", f.Names())
	require.Empty(t, f.Get(objectName(extMod)).Metadata)
	return now.of
}

// md5Of returns a checksum as GCS writes it.
func md5Of(data []byte) string {
	sum := md5.Sum(data)
	return base64.StdEncoding.EncodeToString(sum[:])
}

// A history that breaks an invariant is told from one that merely looks odd.
func TestHistory(t *testing.T) {
	save := func(start, end, n int, out outcome) *observation {
		return &observation{call: "Save", save: fmt.Sprint(n), start: start, end: end, outcome: out}
	}
	call := func(start, end int, name string, out outcome) *observation {
		return &observation{call: name, start: start, end: end, outcome: out}
	}
	read := func(start, end, whose int) *observation {
		return &observation{call: extZip, save: fmt.Sprint(whose), start: start, end: end, outcome: got}
	}
	for _, test := range []struct {
		name   string
		h      history
		broken string
	}{
		{"a save and a loser", history{save(1, 4, 1, stored), save(2, 5, 2, existed), read(6, 7, 1)}, ""},
		{"two winners", history{save(1, 3, 1, stored), save(2, 4, 2, stored)}, "two saves of one life"},
		{"two winners in turn", history{save(1, 2, 1, stored), save(3, 4, 2, stored)}, "stored again"},
		{"a delete in between", history{save(1, 2, 1, stored), call(3, 4, "Delete", deleted), save(5, 6, 2, stored), read(7, 8, 2)}, ""},
		{"a delete that overlaps", history{save(1, 4, 1, stored), call(2, 6, "Delete", deleted), save(5, 8, 2, stored), read(9, 10, 2)}, ""},
		{"a delete that is too late", history{save(1, 4, 1, stored), save(5, 8, 2, stored), call(9, 10, "Delete", deleted)}, "stored again"},
		{"a delete that had nothing to delete", history{save(1, 2, 1, stored), call(3, 4, "Delete", notFound)}, "not found"},
		{"a delete that crashed", history{save(1, 2, 1, stored), call(3, endOfTime, "Delete", crashed), call(5, 6, "Exists", no)}, ""},
		{"told too early", history{save(1, 8, 1, stored), save(2, 3, 2, existed), call(4, 5, extZip, notFound)}, "not found"},
		{"there, and gone", history{call(1, 2, "Exists", yes), call(3, 4, "Exists", no)}, "said not to exist"},
		{"there, and gone, at once", history{call(1, 3, "Exists", yes), call(2, 4, "Exists", no)}, ""},
		{"not there yet", history{call(1, 2, "Exists", no), call(3, 4, "Exists", yes)}, ""},
		{"of another save", history{save(1, 2, 1, stored), read(3, 4, 2)}, "of two saves"},
		{"of two others", history{save(1, 2, 1, existed), read(3, 4, 2), read(5, 6, 3)}, "of two saves"},
		{"of two lives", history{save(1, 2, 1, existed), read(3, 4, 2), call(5, 6, "Delete", deleted), read(7, 8, 3)}, ""},
		{"bytes of two, of no version", history{read(3, 4, 2), read(5, 6, 3)}, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			broken := strings.Join(test.h.check(), "\n")
			require.Contains(t, broken, test.broken)
			require.Equal(t, test.broken == "", broken == "")
		})
	}
}
