package gcs

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

var testVersionName = ModuleVersion{testModule, testVersion}

// A listing can miss an object that was stored while it was made.
func TestRepairNeedsTwoListings(t *testing.T) {
	forEach(t, inCrowd, allExts, func(t *testing.T, f *fakeGCS, ext string) {
		storeVersion(f, testModule, testVersion)
		before := f.Objects()
		returns(t, Complete)(missing(f, ext).Repair(t.Context(), testModule, testVersion))
		require.Equal(t, before, f.Objects())
	})
}

// Whatever Repair finds, and at whichever of its requests a save comes between, it
// removes nothing of that save.
func TestRepairBesideSave(t *testing.T) {
	for _, c := range stateCases {
		if c.state == InProgress {
			continue
		}
		for n := range c.requests {
			// Repair goes on after the save, or in the middle of it.
			for _, takes := range []time.Duration{0, 10 * time.Second} {
				run(t, fmt.Sprintf("%s, request %d, takes %v", c.name, n, takes), inCrowd, func(t *testing.T, f *fakeGCS) {
					c.put(f, testVersionName)
					before := f.Objects()
					a := contentOf("a", 100)
					var saveErr error
					var wait func()
					f.atFirst(nth("r", n), func() {
						wait = alongside(func() { saveErr = a.saveSlowly(t.Context(), f.storage("a"), takes) })
						time.Sleep(time.Second)
					})
					_, err := f.storage("r").Repair(t.Context(), testModule, testVersion)
					require.NoError(t, err)
					wait()
					if c.repaired != Complete {
						require.NoError(t, saveErr)
						requireStored(t, f, a)
						return
					}
					requireKind(t, saveErr, KindAlreadyExists)
					for _, ext := range allExts {
						require.Equal(t, before[objectName(ext)].Generation, f.Get(objectName(ext)).Generation)
					}
				})
			}
		}
	}
}

// Nor does it, at whichever request of a save it comes between.
func TestRepairDuringSave(t *testing.T) {
	for _, c := range stateCases {
		if c.repaired == Complete || c.state == InProgress {
			continue
		}
		for n := range 7 {
			for _, answered := range []bool{false, true} {
				run(t, fmt.Sprintf("%s, request %d, answered %v", c.name, n, answered), inCrowd, func(t *testing.T, f *fakeGCS) {
					c.put(f, testVersionName)
					a := contentOf("a", 100)
					at := map[bool]func(matcher, func()){false: f.before, true: f.after}[answered]
					at(nth("a", n), func() {
						_, err := f.storage("r").Repair(t.Context(), testModule, testVersion)
						require.NoError(t, err)
					})
					require.NoError(t, a.save(t.Context(), f.storage("a")))
					requireStored(t, f, a)
				})
			}
		}
	}
}

// A save that looks dead to Repair, whose clock is ahead, commits just before its
// .mod is removed. It is then of the same generation, and stays.
func TestRepairOfLivingSave(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		a, refused := contentOf("a", 100), false
		wait := alongside(func() { require.NoError(t, a.saveSlowly(t.Context(), f.storage("a"), 3*time.Second)) })
		f.atFirst(on("r", "delete", ""), func() { wait(); refused = true })
		time.Sleep(time.Second)
		returns(t, Complete)(ahead(f, "r").Repair(t.Context(), testModule, testVersion))
		require.True(t, refused)
		requireStored(t, f, a)
	})
}

// Without a permission, Repair names it, and changes nothing.
func TestRepairForbidden(t *testing.T) {
	forEach(t, inCrowd, []struct{ denied, found string }{
		{"delete", ".info and .zip"}, {"delete", ".mod"}, {"delete", "abandoned without .zip"}, {"delete", "complete and claimed"},
		{"delete", "claimed by a dead one"}, {"update", "unfinished"}, {"list", "complete"}, {"list", ".mod"}, {"get", ".info"},
	}, func(t *testing.T, f *fakeGCS, test struct{ denied, found string }) {
		c := stateCases[slices.IndexFunc(stateCases, func(c stateCase) bool { return c.name == test.found })]
		c.put(f, testVersionName)
		before := f.Objects()
		f.Deny("storage.objects." + test.denied)
		state, err := f.storage("r").Repair(t.Context(), testModule, testVersion)
		requireKind(t, err, KindUnexpected)
		require.ErrorContains(t, err, "the caller needs storage.objects."+test.denied)
		require.Equal(t, before, f.Objects())
		if test.denied != "list" {
			require.Equal(t, c.state, state)
		}
	})
}
