package gcs

import (
	"fmt"
	"maps"
	"math"
	"net/http"
	"testing"
	"time"

	"cloud.google.com/go/storage"
	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

const ago = -time.Hour // long past any threshold

// A markerCase is one thing that the metadata of a .mod may say.
type markerCase struct {
	name     string
	metadata map[string]string
	updated  time.Duration // of the object, from now
	marked   bool
	fresh    bool
}

// markerCases are what they may say, for a marker that goes stale after that threshold.
func markerCases(now time.Time, threshold time.Duration) []markerCase {
	at := func(d time.Duration) map[string]string { return marked(now.Add(d), "") }
	value := func(s string) map[string]string { return map[string]string{keyInProgress: s} }
	old := map[string]string{keyInProgressOld: "true"}
	return []markerCase{
		{"none", nil, 0, false, false},
		{"none old", nil, ago, false, false},
		{"something else", map[string]string{"owner": "me"}, 0, false, false},
		{"now", at(0), 0, true, true},
		{"now, updated long ago", at(0), ago, true, true},
		{"almost stale", at(-threshold + time.Millisecond), ago, true, true},
		{"just stale", at(-threshold), ago, true, false},
		{"stale, updated now", at(-threshold), 0, true, false},
		{"almost the threshold ahead", at(threshold - 1), ago, true, true},
		{"the threshold ahead, updated a second ago", at(threshold), -time.Second, true, false}, // neither from the future nor fresh
		{"just more ahead, updated a second ago", at(threshold + 1), -time.Second, true, true},  // by the clock of GCS
		{"an hour ahead, updated now", at(time.Hour), 0, true, true},
		{"an hour ahead, updated long ago", at(time.Hour), ago, true, false},
		{"an hour ahead, as is the server", at(time.Hour), -ago, true, false},
		{"2099, updated now", value("2099-01-01T00:00:00Z"), 0, true, true},
		{"2099, updated long ago", value("2099-01-01T00:00:00Z"), ago, true, false},
		{"empty, updated now", value(""), 0, false, false},
		{"empty, updated long ago", value(""), ago, false, false},
		{"true, updated now", value("true"), 0, true, true},
		{"true, updated long ago", value("true"), ago, true, false},
		{"tomorrow, updated now", value("tomorrow"), 0, true, true},
		{"tomorrow, updated long ago", value("tomorrow"), ago, true, false},
		{"older Athens, now", old, 0, true, true},
		{"older Athens, long ago", old, ago, true, false},
		{"given up", marked(givenUp, ""), 0, true, false},
		{"given up long ago", marked(givenUp, ""), ago, true, false},
	}
}

// areOfOne reports whether one save wrote .info, .mod and .zip of these ids, or the .mod does not
// tell.
func areOfOne(ids [3]string) bool { return ids[1] == "" || ids[0] == ids[1] && ids[2] == ids[1] }

// meaning is what a version is of which those objects are there: .info, .mod and .zip,
// from the lowest bit. Its .mod, if it is there, has a marker or not, which is fresh or
// not. One says that one save wrote all three, or that the .mod does not tell.
func meaning(subset byte, marked, fresh, one bool) State {
	switch whole := subset == 7; {
	case subset == 0:
		return Absent
	case whole && !marked:
		return Complete
	case subset&2 == 0 || !marked:
		return Partial
	case fresh:
		return InProgress
	case whole && one:
		return Unfinished
	}
	return Abandoned
}

// snapshotOf is a version of which those objects are there, with the ids of their saves.
func snapshotOf(subset byte, updated time.Time, ids [3]string) (seen snapshot) {
	for i, id := range ids {
		if subset&(1<<i) != 0 {
			attrs := &storage.ObjectAttrs{Created: updated, Updated: updated, Metadata: map[string]string{}}
			if id != "" {
				attrs.Metadata[keySaveID] = id
			}
			*seen.slot(allExts[i]) = attrs
		}
	}
	return seen
}

// Every state that a version can be in.
func TestStates(t *testing.T) {
	now := time.Now()
	for n := range 27 {
		some := []string{"", "a", "b"}
		ids := [3]string{some[n%3], some[n/3%3], some[n/9]} // of .info, .mod and .zip
		for _, m := range markerCases(now, DefaultStaleThreshold) {
			for subset := range byte(8) {
				seen := snapshotOf(subset, now.Add(m.updated), ids)
				if delete(m.metadata, keySaveID); seen.mod != nil {
					maps.Copy(seen.mod.Metadata, m.metadata)
				}
				want := meaning(subset, m.marked, m.fresh, areOfOne(ids))
				require.Equal(t, want, seen.classify(now, DefaultStaleThreshold), "%q, %s, subset %03b", ids, m.name, subset)
			}
		}
	}
}

// requireTold checks what the calls tell of a version that is alone in the bucket.
var requireTold = map[string]func(t *testing.T, s *Storage, exists bool){
	"Exists": func(t *testing.T, s *Storage, exists bool) { requireExists(t, s, testVersion, exists) },
	"List": func(t *testing.T, s *Storage, exists bool) {
		requireList(t, s, testModule, map[bool][]string{true: {testVersion}}[exists]...)
	},
	"Catalog": func(t *testing.T, s *Storage, exists bool) {
		require.Equal(t, map[bool][]ModuleVersion{true: {testVersionName}}[exists], catalogOf(t, s, 0))
	},
}

// What calls tell of each state, what it costs, and what it changes.
func TestCallsOnStates(t *testing.T) {
	mod, claim := objectName(extMod), objectName(extClaim)
	for _, op := range []string{"Exists", "List", "Catalog", "Repair"} {
		for _, c := range stateCases {
			run(t, op+" "+c.name, withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
				c.put(f, testVersionName)
				want := f.Objects()
				call := func() {
					if op == "Repair" {
						returns(t, c.repaired)(s.Repair(t.Context(), testModule, testVersion))
					} else {
						requireTold[op](t, s, c.repaired == Complete)
					}
				}
				call()
				requests := []string{"list"}
				switch {
				case c.state == Unfinished:
					requests = []string{"list", "patch"}
					require.Empty(t, f.Get(mod).Metadata)
					require.Equal(t, want[mod].Generation, f.Get(mod).Generation)
					want[mod] = f.Get(mod)
				case c.name == "copied":
					requests = []string{"list", "list"}
				}
				if op == "Repair" {
					require.Len(t, f.Log(), c.requests)
					deadClaim := time.Since(c.status(testVersionName).Claimed) >= DefaultStaleThreshold/claimFraction
					maps.DeleteFunc(want, func(name string, _ *fakegcs.Object) bool {
						return name == claim && deadClaim || name != claim && c.repaired == Absent
					})
				} else {
					require.Equal(t, requests, logged(f))
				}
				require.Equal(t, want, f.Objects())
				call()
				require.Equal(t, want, f.Objects())
			})
		}
	}
}

func TestOldMarker(t *testing.T) {
	// The time of an older Athens version's marker is that of its object's creation,
	// whatever was updated since.
	run(t, "is as old as its object", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		storeVersion(f, testModule, testVersion)
		f.PutAt(objectName(extMod), nil, map[string]string{keyInProgressOld: "true"}, time.Now().Add(ago))
		f.SetMetadata(objectName(extMod), map[string]string{keyInProgressOld: "true"})
		requireExists(t, s, testVersion, true)
	})

	// A .mod of an older Athens says nothing of its save, but .info and .zip beside it do
	// if they name another .mod.
	run(t, "beside objects of another", inCrowd, func(t *testing.T, f *fakeGCS) {
		require.NoError(t, contentOf("a", 100).save(t.Context(), f.storage("a")))
		f.Remove(objectName(extMod)) // a delete that was cut short; then an older Athens began a save there and died
		f.Put(objectName(extMod), []byte("of older Athens"), map[string]string{keyInProgressOld: "true"})
		time.Sleep(time.Hour)
		requireExists(t, f.storage("b"), testVersion, false)
	})
}

func TestExists(t *testing.T) {
	// To a caller who may not finish it, an unfinished version does not exist.
	run(t, "without update permission", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		unfinishedVersion(f, testVersionName)
		before := f.Get(objectName(extMod))
		f.Deny("storage.objects.update")
		requireExists(t, s, testVersion, false)
		requireList(t, s, testModule)
		require.Empty(t, catalogOf(t, s, 0))
		require.Equal(t, before, f.Get(objectName(extMod)))

		f.Allow("storage.objects.update")
		requireExists(t, s, testVersion, true)
	})

	// A renewal can come between, and after it the holder can die.
	run(t, "after a race", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		unfinishedVersion(f, testVersionName)
		f.atFirst(on("", "patch", ""), func() { f.SetMetadata(objectName(extMod), marked(time.Now().Add(ago/2), "a")) })
		requireExists(t, s, testVersion, true)
		require.Equal(t, []string{"list", "patch", "list", "patch"}, logged(f))
	})

	// A refusal that has nothing to do with the conditions is not asked for again and again,
	// and a caller whose rate is limited may do later what it may not do now.
	for message, want := range map[string]struct{ code, kind int }{
		"Public access prevention is enforced.": {http.StatusPreconditionFailed, KindUnexpected},
		"rateLimitExceeded":                     {http.StatusForbidden, KindRateLimit},
	} {
		run(t, "refused, "+message, withStorage, func(t *testing.T, f *fakeGCS, _ *Storage) {
			unfinishedVersion(f, testVersionName)
			s := behind(f, func(r *http.Request) *http.Response {
				return map[string]*http.Response{http.MethodPatch: answer(want.code, message)}[r.Method]
			})
			_, err := s.Exists(t.Context(), testModule, testVersion)
			requireError(t, err, want.kind, "gcs.Exists", testModule, testVersion)
			require.ErrorContains(t, err, message)
			_, err = s.List(within(t, time.Hour), testModule)
			require.Equal(t, want.kind, Kind(err))
		})
	}

	// The objects of other versions may lie between those of one, by the thousand.
	run(t, "among many others", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		for i := range 1200 {
			storeFiles(f, testModule, fmt.Sprintf("v1.n%04d", i), extInfo)
		}
		storeFiles(f, testModule, "v1", extInfo, extMod)
		requireExists(t, s, "v1", false)
		storeFiles(f, testModule, "v1", extZip)
		requireExists(t, s, "v1", true)

		// A list of several pages is no snapshot: here the version is partial
		// while the first is read, which ends before the .zip, and another save
		// has begun when the second is.
		f.Remove(testModule + "/@v/v1.zip")
		f.ResetLog()
		f.atFirst(func(r *fakegcs.Request) bool { return r.N == 1 }, func() { takeOver(f, "v1") })
		requireExists(t, s, "v1", false)
		require.NotNil(t, f.Get(testModule+"/@v/v1.zip"))
		// And again, since the .zip names another .mod.
		require.Equal(t, []string{"list", "list", "list", "list", "list", "list"}, logged(f))
	})

	// Nor is a list of few objects, when the server sends less than it is asked for.
	run(t, "across short pages", withStorage, func(t *testing.T, f *fakeGCS, _ *Storage) {
		s := behind(f, pageBy("2"))
		storeFiles(f, testModule, testVersion, extInfo, extMod)
		// The version is partial while it is read first, then a save begins that
		// never ends.
		f.atFirst(func(r *fakegcs.Request) bool { return r.N == 1 }, func() { takeOver(f, testVersion) })
		storeFiles(f, testModule, testVersion+".x", extInfo)
		requireExists(t, s, testVersion, false)
	})
}

// Something happens to an unfinished version between its listing and the
// request that finishes it.
func TestExistsRaces(t *testing.T) {
	mod := objectName(extMod)
	for _, tc := range []struct {
		name   string
		change func(f *fakeGCS)
		want   bool
	}{
		{"the holder renews", func(f *fakeGCS) { f.SetMetadata(mod, marked(time.Now(), "a")) }, false},
		{"the holder gives up", func(f *fakeGCS) { f.SetMetadata(mod, marked(givenUp, "b")) }, false},
		{"somebody finishes", func(f *fakeGCS) { f.SetMetadata(mod, nil) }, true},
		{"taken over", func(f *fakeGCS) { f.Put(mod, []byte("other"), marked(time.Now(), "b")) }, false},
		{"saved anew", func(f *fakeGCS) { storeVersion(f, testModule, testVersion) }, true},
		{"the .mod is deleted", func(f *fakeGCS) { f.Remove(mod) }, false},
		{"deleted", func(f *fakeGCS) { removeVersion(f, testVersionName) }, false},
	} {
		run(t, tc.name, withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
			unfinishedVersion(f, testVersionName)
			var after *fakegcs.Object
			f.atFirst(on("", "patch", ""), func() {
				tc.change(f)
				after = f.Get(mod)
			})
			requireExists(t, s, testVersion, tc.want)
			require.Equal(t, after, f.Get(mod), "what the other one did must stay")
			require.Equal(t, []string{"list", "patch", "list"}, logged(f))
		})
	}
}

// takeOver replaces the .mod of a version that lacks its .zip, and stores a .zip.
func takeOver(f *fakeGCS, vers string) {
	f.put(ModuleVersion{testModule, vers}, marked(time.Now(), "b"), map[string]string{keySaveID: "b", keyGeneration: ownMod}, extMod, extZip)
}

func FuzzState(f *testing.F) {
	now := time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC)
	for subset := range uint8(8) {
		for _, m := range markerCases(now, DefaultStaleThreshold) {
			value, marked := m.metadata[keyInProgress]
			f.Add(subset, marked, value, int64(m.updated), int64(DefaultStaleThreshold), "a", "a", "a")
		}
	}
	f.Add(uint8(7), true, "", int64(ago), int64(DefaultStaleThreshold), "a", "", "b")
	f.Add(uint8(7), true, "", int64(ago), int64(DefaultStaleThreshold), "a", "a", "b")
	f.Add(uint8(2), true, "9999-12-31T23:59:59.999999999Z", int64(0), int64(1), "", "", "")
	f.Add(uint8(2), true, "0000-01-01T00:00:00+23:59", int64(ago), int64(1)<<62, "", "", "")
	f.Fuzz(func(t *testing.T, subset uint8, isMarked bool, value string, updated, threshold int64, info, mod, zip string) {
		if threshold <= 0 {
			t.Skip("SetStaleThreshold lets none of these in")
		}
		byGCS := now.Add(time.Duration(updated))
		seen := snapshotOf(subset&7, byGCS, [3]string{info, mod, zip})
		if isMarked && seen.mod != nil {
			seen.mod.Metadata[keyInProgress], seen.mod.Created = value, now.Add(2*ago)
		}
		renewed, err := time.Parse(time.RFC3339Nano, value)
		if err != nil {
			renewed = byGCS
		}
		gaveUp := !renewed.After(givenUp)
		if renewed.Sub(now) > time.Duration(threshold) {
			renewed = byGCS
		}
		fresh := !gaveUp && renewed.Sub(now).Abs() < time.Duration(threshold)
		want := meaning(subset&7, isMarked && value != "", fresh, areOfOne([3]string{info, mod, zip}))
		if got := seen.classify(now, time.Duration(threshold)); got != want {
			t.Errorf("%v, not %v", got, want)
		}
	})
}

// A marker that was given up holds up nobody, whatever the threshold and the clock.
func TestGivenUpIsNeverFresh(t *testing.T) {
	forNamed(t, inCrowd, map[string]func(*Storage){
		"endless threshold": func(s *Storage) { s.SetStaleThreshold(math.MaxInt64) },
		"clock of 1970":     func(s *Storage) { s.now = func() time.Time { return givenUp.Add(time.Minute) } },
	}, func(t *testing.T, f *fakeGCS, set func(*Storage)) {
		leave(f, marked(givenUp, "old"), extMod)
		a, s := contentOf("a", 100), f.storage("a")
		set(s)
		require.NoError(t, a.save(within(t, time.Second), s))
		requireStored(t, f, a)
	})
}
