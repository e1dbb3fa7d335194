package gcs

import (
	"crypto/md5"
	"encoding/base64"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

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
