package gcs

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"cloud.google.com/go/storage"
)

// The endings of the names of a version's three objects, and of the claim of
// whoever is fetching it.
const (
	extInfo  = "info"
	extMod   = "mod"
	extZip   = "zip"
	extClaim = "lock"
)

// A ModuleVersion names a version of a module.
type ModuleVersion struct {
	Module  string `json:"module"`
	Version string `json:"version"`
}

// maxObjectName is the longest name an object can have, in bytes of UTF-8.
// https://cloud.google.com/storage/docs/objects#naming
const maxObjectName = 1024

// object returns the name of one of the version's objects, below the prefix.
func (v ModuleVersion) object(ext string) string {
	return v.Module + "/@v/" + v.Version + "." + ext
}

// check returns an error of KindBadRequest if no module can have such a version.
func (v ModuleVersion) check() error {
	if err := checkPath(v.Module); err != nil {
		return badRequest("module", err)
	}
	err := checkName(v.Version)
	switch {
	case err != nil:
	case strings.Contains(v.Version, "/"):
		err = errors.New("holds a slash")
	case v.Version == "." || v.Version == "..":
		err = fmt.Errorf("is %q", v.Version)
	default:
		return nil
	}
	return badRequest("version", err)
}

// checkPath refuses what no module path can be, and no more: Athens stores names
// that the go command would not accept.
func checkPath(path string) error {
	if err := checkName(path); err != nil {
		return err
	}
	for elem := range strings.SplitSeq(path, "/") {
		switch elem {
		case "":
			return errors.New("has an empty element (a leading, trailing or double slash)")
		case ".", "..", "@v":
			return fmt.Errorf("has the element %q", elem)
		}
	}
	return nil
}

// checkName refuses what no object name can be.
func checkName(name string) error {
	switch {
	case name == "":
		return errors.New("is empty")
	case !utf8.ValidString(name):
		return errors.New("is not valid UTF-8")
	case strings.ContainsFunc(name, unicode.IsControl):
		return errors.New("holds a control character")
	case strings.HasPrefix(name+"/", ".well-known/acme-challenge/"):
		return errors.New("is under .well-known/acme-challenge/, which GCS keeps for itself")
	case len(name) > maxObjectName:
		return fmt.Errorf("makes an object name of %d bytes, over the %d that GCS takes", len(name), maxObjectName)
	}
	return nil
}

// parseObject is the inverse of version.object. It reports false for any other
// object that may be in the bucket.
func parseObject(name string) (v ModuleVersion, ext string, ok bool) {
	module, rest, _ := strings.Cut(name, "/@v/")
	dot := strings.LastIndexByte(rest, '.')
	if dot < 0 {
		return ModuleVersion{}, "", false
	}
	v, ext = ModuleVersion{module, rest[:dot]}, rest[dot+1:]
	switch ext {
	case extInfo, extMod, extZip, extClaim:
		return v, ext, v.check() == nil
	}
	return ModuleVersion{}, "", false
}

// A snapshot holds the objects of a version as a listing showed them. An absent
// object is nil. Each object was so at some moment of the listing, but not all of
// them at the same moment.
type snapshot struct {
	info, mod, zip *storage.ObjectAttrs
	claim          *storage.ObjectAttrs // no part of the version
}

func (s *snapshot) slot(ext string) **storage.ObjectAttrs {
	switch ext {
	case extInfo:
		return &s.info
	case extMod:
		return &s.mod
	case extClaim:
		return &s.claim
	default:
		return &s.zip
	}
}

func (s snapshot) empty() bool { return s.info == nil && s.mod == nil && s.zip == nil }

func (s snapshot) hasAll() bool { return s.info != nil && s.mod != nil && s.zip != nil }

// equals reports whether two listings in a row showed the same version. If they
// did, all of it was there at the moment between them.
func (s snapshot) equals(o snapshot) bool {
	return sameObject(s.info, o.info) && sameObject(s.mod, o.mod) && sameObject(s.zip, o.zip)
}

// sameObject reports whether nothing has changed between two views of an object.
func sameObject(a, b *storage.ObjectAttrs) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.Generation == b.Generation && a.Metageneration == b.Metageneration
}

// A State is what the objects of a version mean. The package comment has the
// table of who moves a version from one state to another.
type State int

const (
	Absent     State = iota // none of the three objects
	Partial                 // no marker, an object is missing: a poisoned cache, or a delete cut short
	InProgress              // a fresh marker: a save is at work
	Abandoned               // a stale marker, an object is missing or of another save
	Unfinished              // a stale marker, all three objects of one save: only the commit is missing
	Complete                // no marker, all three objects
)

var stateWords = []string{"absent", "partial", "in progress", "abandoned", "unfinished", "complete"}

// String returns the state's word in lower case.
func (s State) String() string {
	if s < 0 || int(s) >= len(stateWords) {
		return fmt.Sprintf("State(%d)", int(s))
	}
	return stateWords[s]
}

// MarshalText returns the state's word in lower case.
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText sets the state from its word.
func (s *State) UnmarshalText(word []byte) error {
	i := slices.Index(stateWords, string(word))
	if i < 0 {
		return fmt.Errorf("no state of a version is called %q", word)
	}
	*s = State(i)
	return nil
}

// classify judges the snapshot at the time now of the local clock. The clock tells
// only InProgress from Abandoned and Unfinished, and whatever is done about these
// is conditional on the generations in the snapshot.
//
// Complete is certain from one listing. If .info or .zip names another .mod than
// the one listed, the listing may have met a save half-way: it is Partial, and
// Complete only if a second listing shows the same (see inspect).
func (s snapshot) classify(now time.Time, threshold time.Duration) State {
	if s.empty() {
		return Absent
	}
	m, marked := readMarker(s.mod)
	switch {
	case !marked && s.hasAll() && s.named():
		return Complete
	case !marked:
		return Partial
	case m.isFresh(now, threshold):
		return InProgress
	case s.hasAll() && s.oneSave():
		return Unfinished
	default:
		return Abandoned
	}
}

// named reports whether .info and .zip name this .mod as the one that their save
// held, or name none.
func (s snapshot) named() bool {
	for _, o := range []*storage.ObjectAttrs{s.info, s.zip} {
		if gen, ok := o.Metadata[keyGeneration]; ok && gen != formatGeneration(s.mod.Generation) {
			return false
		}
	}
	return true
}

// oneSave reports whether one save wrote all three objects, .info and .zip while
// this very .mod was live. A .mod without a save id was written by an older
// Athens, which did not say.
func (s snapshot) oneSave() bool {
	id := s.mod.Metadata[keySaveID]
	return s.named() && (id == "" || s.info.Metadata[keySaveID] == id && s.zip.Metadata[keySaveID] == id)
}

func formatGeneration(gen int64) string { return strconv.FormatInt(gen, 10) }
