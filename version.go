package gcs

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"cloud.google.com/go/storage"
)

// The three objects of a version, by the endings of their names, and the claim
// of whoever is fetching it.
const (
	extInfo = "info"
	extMod  = "mod"
	extZip  = "zip"
	extLock = "lock"
)

// maxObjectName is the longest name an object can have, in bytes of UTF-8.
// https://cloud.google.com/storage/docs/objects#naming
const maxObjectName = 1024

// A version names one version of one module.
type version struct {
	module, version string
}

// newVersion returns the version of that name, or an error of KindBadRequest
// when GCS or Athens could hold no such version.
func newVersion(module, vers string) (version, error) {
	v := version{module, vers}
	if err := checkModule(module); err != nil {
		return v, badRequest("module", err)
	}
	if err := checkName(vers); err != nil {
		return v, badRequest("version", err)
	}
	if strings.Contains(vers, "/") {
		return v, badRequest("version", errors.New("holds a slash"))
	}
	if vers == "." || vers == ".." {
		return v, badRequest("version", fmt.Errorf("is %q", vers))
	}
	if n := len(v.object(extInfo)); n > maxObjectName {
		return v, badRequest("version", fmt.Errorf("makes an object name of %d bytes, over the %d that GCS takes", n, maxObjectName))
	}
	return v, nil
}

// checkModule refuses what no module path can be, and no more: Athens stores
// names that the go command would not accept.
func checkModule(module string) error {
	if err := checkName(module); err != nil {
		return err
	}
	for elem := range strings.SplitSeq(module, "/") {
		switch elem {
		case "":
			return errors.New("has an empty element (a leading, trailing or double slash)")
		case ".", "..", "@v":
			return fmt.Errorf("has the element %q", elem)
		}
	}
	if strings.HasPrefix(module+"/", ".well-known/acme-challenge/") {
		return errors.New("is under .well-known/acme-challenge/, which GCS keeps for itself")
	}
	if n := len(module); n > maxObjectName {
		return fmt.Errorf("has %d bytes, over the %d that GCS takes for an object name", n, maxObjectName)
	}
	return nil
}

func checkName(name string) error {
	switch {
	case name == "":
		return errors.New("is empty")
	case !utf8.ValidString(name):
		return errors.New("is not valid UTF-8")
	case strings.ContainsFunc(name, unicode.IsControl):
		return errors.New("holds a control character")
	}
	return nil
}

// object is the name of one of the version's objects.
func (v version) object(ext string) string {
	return v.module + "/@v/" + v.version + "." + ext
}

// parseObject is the inverse of version.object. It reports false for any other
// object that may be in the bucket.
func parseObject(name string) (v version, ext string, ok bool) {
	module, rest, ok := strings.Cut(name, "/@v/")
	if !ok {
		return version{}, "", false
	}
	dot := strings.LastIndexByte(rest, '.')
	if dot < 0 {
		return version{}, "", false
	}
	switch ext = rest[dot+1:]; ext {
	case extInfo, extMod, extZip, extLock:
	default:
		return version{}, "", false
	}
	v, err := newVersion(module, rest[:dot])
	return v, ext, err == nil
}

// A snapshot is what one listing showed of a version; an absent object is nil.
type snapshot struct {
	info, mod, zip *storage.ObjectAttrs
	lock           *storage.ObjectAttrs // no part of the version
}

func (s *snapshot) slot(ext string) **storage.ObjectAttrs {
	switch ext {
	case extInfo:
		return &s.info
	case extMod:
		return &s.mod
	case extLock:
		return &s.lock
	default:
		return &s.zip
	}
}

func (s snapshot) empty() bool { return s.info == nil && s.mod == nil && s.zip == nil }

// sameObject reports whether nothing has changed between two views of an object.
func sameObject(a, b *storage.ObjectAttrs) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.Generation == b.Generation && a.Metageneration == b.Metageneration
}

// A state is what a snapshot means.
type state int

const (
	absent     state = iota // none of the three objects
	partial                 // no marker, an object missing: a poisoned cache, or a delete cut short
	inProgress              // a fresh marker
	abandoned               // a stale marker, an object missing or of another save
	unfinished              // a stale marker, all three objects, of one save: only the commit is missing
	complete                // no marker, all three objects
)

func (s state) String() string {
	return [...]string{"absent", "partial", "in progress", "abandoned", "unfinished", "complete"}[s]
}

// state judges the snapshot at the time now of the local clock. The clock tells
// only in progress from abandoned and from unfinished, and what is done about
// either of these is conditional on the generations in the snapshot.
func (s snapshot) state(now time.Time, threshold time.Duration) state {
	if s.empty() {
		return absent
	}
	whole := s.info != nil && s.mod != nil && s.zip != nil
	m, marked := readMarker(s.mod)
	switch {
	case !marked && whole:
		return complete
	case !marked:
		return partial
	case m.fresh(now, threshold):
		return inProgress
	case whole && s.oneSave():
		return unfinished
	default:
		return abandoned
	}
}

// oneSave reports whether one save wrote all three objects, .info and .zip while
// this very .mod was live. A .mod without a save id was written by Athens itself,
// which had no way to tell.
func (s snapshot) oneSave() bool {
	id := s.mod.Metadata[keySaveID]
	if id == "" {
		return true
	}
	for _, o := range []*storage.ObjectAttrs{s.info, s.zip} {
		if o.Metadata[keySaveID] != id {
			return false
		}
		if gen, ok := o.Metadata[keyGeneration]; ok && gen != formatGeneration(s.mod.Generation) {
			return false // the .mod was created twice, the second time after a delete
		}
	}
	return true
}

func formatGeneration(gen int64) string { return strconv.FormatInt(gen, 10) }
