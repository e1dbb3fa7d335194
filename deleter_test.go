package gcs

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// Whatever there is of a version is removed, its .mod before the rest. The claim of a fetch is
// no part of the version. A fresh one is its holder's, and a stale one is left to the next
// flight, and to Repair.
func TestDeleteSubsets(t *testing.T) {
	for subset := range 16 {
		for _, mark := range []map[string]string{nil, marked(time.Unix(0, 0), "a"), marked(bubbleStart, "a")} {
			exts, hasMod, hasClaim := subsetOf(subset&7), subset&2 != 0, subset&8 != 0
			if mark != nil && !hasMod && !hasClaim {
				continue
			}
			run(t, fmt.Sprintf("%04b, %v", subset, mark), withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
				storeVersion(f, testModule, "v1.0.0-rc.1", "v1.0.0.1", "v1.0", "v1.0.0.info")
				storeVersion(f, testModule+"/v2", testVersion)
				storeVersion(f, testModule+"-other", testVersion)
				if hasClaim {
					f.Put(objectName(extClaim), nil, mark)
				}
				kept := f.Names()
				f.put(testVersionName, mark, nil, exts...)
				f.SetLatency(100 * time.Millisecond)
				err := s.Delete(t.Context(), testModule, testVersion)
				if len(exts) == 0 {
					requireError(t, err, KindNotFound, "gcs.Delete", testModule, testVersion)
				} else {
					require.NoError(t, err)
				}
				require.Equal(t, kept, f.Names())

				log, requests := f.Log(), 1+len(exts)
				if len(exts) > 0 && !hasMod {
					requests++ // to be sure that there is no .mod
				}
				require.Len(t, log, requests)
				require.LessOrEqual(t, fakegcs.SerialTrips(log), 3)
				deletes := slices.DeleteFunc(log, func(r fakegcs.Request) bool { return r.Op != "delete" })
				if hasMod {
					require.Equal(t, objectName(extMod), deletes[0].Object)
					for _, r := range deletes[1:] {
						require.False(t, r.Start.Before(deletes[0].End), "%v before the end of %v", r, deletes[0])
					}
				}
				requireError(t, s.Delete(t.Context(), testModule, testVersion), KindNotFound, "gcs.Delete", testModule, testVersion)
			})
		}
	}
}

// A delete is cut short by a crash, and one that goes on as if nothing had
// happened follows.
func TestDeleteCrashes(t *testing.T) {
	for n := range 4 {
		for _, fault := range []fakegcs.Fault{fakegcs.CrashBefore, fakegcs.CrashAfter} {
			for _, next := range []string{"Save", "Delete"} {
				run(t, fmt.Sprintf("request %d %v, then %s", n, fault, next), withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
					require.NoError(t, saveVersion(t.Context(), s, testModule, testVersion))
					doomed := f.Machine("doomed")
					f.fault(fault, nth("doomed", n))
					err := NewStorage(doomed.Bucket).Delete(within(t, time.Minute), testModule, testVersion)
					requireError(t, err, KindGatewayTimeout, "gcs.Delete", testModule, testVersion)

					// The second request deletes the .mod.
					begun := n > 1 || n == 1 && fault == fakegcs.CrashAfter
					requireExists(t, s, testVersion, !begun)

					left := len(f.Names())
					err = everyCall(s)[next](t.Context())
					switch {
					case next == "Save" && !begun:
						requireError(t, err, KindAlreadyExists, "gcs.Save", testModule, testVersion)
					case next == "Delete" && left == 0:
						requireError(t, err, KindNotFound, "gcs.Delete", testModule, testVersion)
					default:
						require.NoError(t, err)
					}
					requireExists(t, s, testVersion, next == "Save")
					if next == "Delete" {
						require.Empty(t, f.Names())
					}
				})
			}
		}
	}
}

// Of two deletes at once at least one succeeds, and nothing is left, however
// their requests fall.
func TestDeleteTwice(t *testing.T) {
	for offset := range 14 {
		run(t, fmt.Sprint(offset), withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
			storeVersion(f, testModule, testVersion)
			f.SetLatency(100 * time.Millisecond)
			errs := make([]error, 2)
			wait := alongside(func() { errs[0] = s.Delete(t.Context(), testModule, testVersion) })
			time.Sleep(time.Duration(offset) * 25 * time.Millisecond)
			errs[1] = f.storage("second").Delete(t.Context(), testModule, testVersion)
			wait()
			require.Contains(t, errs, nil)
			for _, err := range errs {
				require.True(t, err == nil || Is(err, KindNotFound), "%v", err)
			}
			require.Empty(t, f.Names())
		})
	}
}

// A delete that comes at any moment of a save leaves a version that is either
// whole or does not exist, and can be saved.
func TestDeleteDuringSave(t *testing.T) {
	for offset := range 26 {
		for _, leftovers := range []bool{false, true} {
			run(t, fmt.Sprint(offset, leftovers), withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
				if leftovers {
					storeFiles(f, testModule, testVersion, extInfo, extZip)
				}
				f.SetLatency(100 * time.Millisecond)
				var saveErr error
				var saved time.Time
				wait := alongside(func() {
					saveErr = saveVersion(t.Context(), s, testModule, testVersion)
					saved = time.Now()
				})
				time.Sleep(time.Duration(offset) * 25 * time.Millisecond)
				started := time.Now()
				deleteErr := f.storage("deleter").Delete(t.Context(), testModule, testVersion)
				deleted := time.Now()
				wait()

				if saveErr != nil { // it is deleted while it is saved
					require.ErrorIs(t, saveErr, errFenced)
				}
				require.True(t, deleteErr == nil || Is(deleteErr, KindNotFound), "%v", deleteErr)
				f.SetLatency(0)
				ok, err := s.Exists(t.Context(), testModule, testVersion)
				require.NoError(t, err)
				switch {
				case saveErr != nil:
					require.False(t, ok)
				case deleted.Before(saved):
					require.True(t, ok, "the save ended after the delete")
				case !started.Before(saved):
					require.False(t, ok, "the delete began after the save")
				}
				if !ok {
					require.Nil(t, f.Get(objectName(extMod)))
					require.NoError(t, saveVersion(t.Context(), s, testModule, testVersion))
				}
				for op, read := range readers {
					returns(t, asStored(op, testVersion))(read(t.Context(), s, testModule, testVersion))
				}
			})
		}
	}
}

func TestDeleteRaces(t *testing.T) {
	// Between the listing and the request that deletes the .mod, another save takes
	// the version over: that one is deleted instead.
	run(t, "taken over", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		storeVersion(f, testModule, testVersion)
		f.atFirst(on("", "delete", ""), func() { f.Put(objectName(extMod), []byte("other"), marked(time.Now(), "b")) })
		require.NoError(t, s.Delete(t.Context(), testModule, testVersion))
		require.Empty(t, f.Names())
	})

	// Once the .mod is gone, a new save may begin. What it stores is not deleted.
	run(t, "spares its successor", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		storeVersion(f, testModule, testVersion)
		saved := errNothing
		besideMod := but(on("m", "delete", ""), on("", "", extMod))
		f.atFirst(besideMod, func() { saved = saveVersion(t.Context(), f.storage("saver"), testModule, testVersion) })
		require.NoError(t, s.Delete(t.Context(), testModule, testVersion))
		require.NoError(t, saved)
		requireExists(t, s, testVersion, true)
	})

	// A save ends while a delete is between its listing and its first removal. The delete
	// removes all of it.
	run(t, "of a committed save", inCrowd, func(t *testing.T, f *fakeGCS) {
		listed, saved := make(chan struct{}), make(chan struct{})
		f.before(but(on("a", "insert", ""), on("", "", extMod)), func() { <-listed })
		f.before(on("d", "delete", extMod), func() { <-saved })
		f.after(first(1, on("d", "list", "")), func() { close(listed) })
		wait := alongside(func() {
			require.NoError(t, contentOf("a", 100).save(t.Context(), f.storage("a")))
			close(saved)
		})
		time.Sleep(time.Second)
		require.NoError(t, f.storage("d").Delete(t.Context(), testModule, testVersion))
		wait()
		require.Empty(t, f.Names())
	})
}

func TestDeleteFails(t *testing.T) {
	run(t, "permissions", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		storeVersion(f, testModule, testVersion)
		names := f.Names()
		f.Deny("storage.objects.delete")
		err := s.Delete(t.Context(), testModule, testVersion)
		requireError(t, err, KindUnexpected, "gcs.Delete", testModule, testVersion)
		require.ErrorContains(t, err, "storage.objects.delete")
		require.ErrorContains(t, err, "roles/storage.objectUser")
		require.Equal(t, names, f.Names())
		f.Allow("storage.objects.delete")

		f.Retain(true)
		err = s.Delete(t.Context(), testModule, testVersion)
		requireError(t, err, KindUnexpected, "gcs.Delete", testModule, testVersion)
		require.ErrorContains(t, err, "retention policy")
		require.NotContains(t, err.Error(), "roles/", "no role helps")
		require.Equal(t, names, f.Names())
	})

	run(t, "context", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		storeVersion(f, testModule, testVersion)
		ctx, cancel := context.WithCancel(t.Context())
		f.after(on("", "list", ""), cancel)
		err := s.Delete(ctx, testModule, testVersion)
		requireError(t, err, KindUnexpected, "gcs.Delete", testModule, testVersion)
		require.ErrorIs(t, err, context.Canceled)
		require.Len(t, f.Names(), 3)
		require.NotContains(t, logged(f)[1:], "list")
	})
}

// Delete and Repair give up, too, when the .mod is another each time.
func TestDeleteRefusedAgainAndAgain(t *testing.T) {
	forEach(t, inCrowd, []string{"Delete", "Repair"}, func(t *testing.T, f *fakeGCS, call string) {
		f.Put(objectName(extMod), nil, marked(givenUp, "other"))
		f.before(first(1000, on("", "delete", "")), func() { f.Put(objectName(extMod), nil, marked(givenUp, "other")) })
		err := everyCall(f.storage("a"))[call](t.Context())
		require.True(t, isPreconditionFailed(err), "%v", err)
		require.Less(t, len(f.Log()), 100)
	})
}
