package gcs

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// Whatever there is of a version is removed, its .mod before the rest.
func TestDeleteSubsets(t *testing.T) {
	for subset := range 8 {
		for _, mark := range []map[string]string{nil, marked(time.Unix(0, 0), "a"), marked(time.Now(), "a")} {
			t.Run(fmt.Sprintf("%03b, %v", subset, mark), func(t *testing.T) {
				withStorage(t, func(t *testing.T, f *fakeGCS, s *Storage) {
					neighbours := []ModuleVersion{{"m", "v1.0.0-rc.1"}, {"m", "v1.0.0.1"}, {"m", "v1.0"}, {"m", "v1.0.0.info"}, {"m/v2", "v1.0.0"}, {"m-other", "v1.0.0"}}
					for _, v := range neighbours {
						storeVersion(f, v.Module, v.Version)
					}
					kept := f.Names()
					objects := 0
					for bit, ext := range []string{extInfo, extMod, extZip} {
						if subset&(1<<bit) != 0 {
							storeFiles(f, "m", "v1.0.0", ext)
							objects++
						}
					}
					if mark != nil && subset&2 != 0 {
						f.SetMetadata("m/@v/v1.0.0.mod", mark)
					}
					f.SetLatency(100 * time.Millisecond)
					err := s.Delete(t.Context(), "m", "v1.0.0")
					if objects == 0 {
						requireError(t, err, KindNotFound, "gcs.Delete", "m", "v1.0.0")
					} else {
						require.NoError(t, err)
					}
					require.Equal(t, kept, f.Names())

					log := f.Log()
					requests := 1 + objects
					if objects > 0 && subset&2 == 0 {
						requests++ // to be sure that there is no .mod
					}
					require.Len(t, log, requests)
					require.LessOrEqual(t, fakegcs.SerialTrips(log), 3)
					for _, r := range log {
						if r.Op == "delete" && r.Object == "m/@v/v1.0.0.mod" {
							continue
						}
						for _, mod := range log {
							if mod.Op == "delete" && mod.Object == "m/@v/v1.0.0.mod" && r.Op == "delete" {
								require.False(t, r.Start.Before(mod.End), "%v before the end of %v", r, mod)
							}
						}
					}
					requireError(t, s.Delete(t.Context(), "m", "v1.0.0"), KindNotFound, "gcs.Delete", "m", "v1.0.0")
				})
			})
		}
	}
}

// Every request of a delete can fail once, applied or not.
func TestDeleteFaults(t *testing.T) {
	for n := range 4 {
		for fault := fakegcs.Refused; fault <= fakegcs.HungApplied; fault++ {
			t.Run(fmt.Sprintf("request %d %v", n, fault), func(t *testing.T) {
				withStorage(t, func(t *testing.T, f *fakeGCS, s *Storage) {
					storeVersion(f, "m", "v1.0.0")
					f.fault(fault, func(r *fakegcs.Request) bool { return r.N == n })
					require.NoError(t, s.Delete(t.Context(), "m", "v1.0.0"))
					require.Empty(t, f.Names())
				})
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
				t.Run(fmt.Sprintf("request %d %v, then %s", n, fault, next), func(t *testing.T) {
					withStorage(t, func(t *testing.T, f *fakeGCS, s *Storage) {
						require.NoError(t, saveVersion(t.Context(), s, "m", "v1.0.0"))
						doomed := f.Machine("doomed")
						f.fault(fault, func(r *fakegcs.Request) bool { return r.Machine == "doomed" && r.MachineN == n })
						ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
						defer cancel()
						err := newStorage(doomed.Bucket).Delete(ctx, "m", "v1.0.0")
						requireError(t, err, KindGatewayTimeout, "gcs.Delete", "m", "v1.0.0")

						// The second request deletes the .mod.
						begun := n > 1 || n == 1 && fault == fakegcs.CrashAfter
						ok, err := s.Exists(t.Context(), "m", "v1.0.0")
						require.NoError(t, err)
						require.Equal(t, !begun, ok)

						left := len(f.Names())
						err = calls[next](t, s, "m", "v1.0.0")
						switch {
						case next == "Save" && !begun:
							requireError(t, err, KindAlreadyExists, "gcs.Save", "m", "v1.0.0")
						case next == "Delete" && left == 0:
							requireError(t, err, KindNotFound, "gcs.Delete", "m", "v1.0.0")
						default:
							require.NoError(t, err)
						}
						ok, err = s.Exists(t.Context(), "m", "v1.0.0")
						require.NoError(t, err)
						require.Equal(t, next == "Save", ok)
						if next == "Delete" {
							require.Empty(t, f.Names())
						}
					})
				})
			}
		}
	}
}

// Of two deletes at once at least one succeeds, and nothing is left, however
// their requests fall.
func TestDeleteTwice(t *testing.T) {
	for offset := range 14 {
		t.Run(fmt.Sprint(offset), func(t *testing.T) {
			withStorage(t, func(t *testing.T, f *fakeGCS, s *Storage) {
				storeVersion(f, "m", "v1.0.0")
				f.SetLatency(100 * time.Millisecond)
				var wg sync.WaitGroup
				errs := make([]error, 2)
				wg.Go(func() { errs[0] = s.Delete(t.Context(), "m", "v1.0.0") })
				wg.Go(func() {
					time.Sleep(time.Duration(offset) * 25 * time.Millisecond)
					errs[1] = f.storage("second").Delete(t.Context(), "m", "v1.0.0")
				})
				wg.Wait()
				require.Contains(t, errs, nil)
				for _, err := range errs {
					require.True(t, err == nil || Is(err, KindNotFound), "%v", err)
				}
				require.Empty(t, f.Names())
			})
		})
	}
}

// A delete that comes at any moment of a save leaves a version that is either
// whole or does not exist, and can be saved.
func TestDeleteDuringSave(t *testing.T) {
	for offset := range 26 {
		for _, leftovers := range []bool{false, true} {
			t.Run(fmt.Sprint(offset, leftovers), func(t *testing.T) {
				withStorage(t, func(t *testing.T, f *fakeGCS, s *Storage) {
					if leftovers {
						storeFiles(f, "m", "v1.0.0", extInfo, extZip)
					}
					f.SetLatency(100 * time.Millisecond)
					var wg sync.WaitGroup
					var saveErr, deleteErr error
					var saved, deleted time.Time
					wg.Go(func() {
						saveErr = saveVersion(t.Context(), s, "m", "v1.0.0")
						saved = time.Now()
					})
					started := time.Now().Add(time.Duration(offset) * 25 * time.Millisecond)
					wg.Go(func() {
						time.Sleep(time.Until(started))
						deleteErr = f.storage("deleter").Delete(t.Context(), "m", "v1.0.0")
						deleted = time.Now()
					})
					wg.Wait()

					require.NoError(t, saveErr, "a save whose version is deleted starts over")
					require.True(t, deleteErr == nil || Is(deleteErr, KindNotFound), "%v", deleteErr)
					f.SetLatency(0)
					ok, err := s.Exists(t.Context(), "m", "v1.0.0")
					require.NoError(t, err)
					switch {
					case deleted.Before(saved):
						require.True(t, ok, "the save ended after the delete")
					case started.After(saved) || started.Equal(saved):
						require.False(t, ok, "the delete began after the save")
					}
					if !ok {
						require.Nil(t, f.Get("m/@v/v1.0.0.mod"))
						require.NoError(t, saveVersion(t.Context(), s, "m", "v1.0.0"))
					}
					for op, read := range readers {
						content, err := read(t.Context(), s, "m", "v1.0.0")
						require.NoError(t, err)
						require.Equal(t, extOf[op]+" of v1.0.0", content)
					}
				})
			})
		}
	}
}

// Between the listing and the request that deletes the .mod, another save takes
// the version over: that one is deleted instead.
func TestDeleteTakenOver(t *testing.T) {
	withStorage(t, func(t *testing.T, f *fakeGCS, s *Storage) {
		storeVersion(f, "m", "v1.0.0")
		deletes := 0
		f.onRequest(func(r *fakegcs.Request) fakegcs.Fault {
			if r.Op == "delete" {
				if deletes++; deletes == 1 {
					f.Put("m/@v/v1.0.0.mod", []byte("other"), marked(time.Now(), "b"))
				}
			}
			return fakegcs.NoFault
		})
		require.NoError(t, s.Delete(t.Context(), "m", "v1.0.0"))
		require.Empty(t, f.Names())
	})
}

// Once the .mod is gone, a new save may begin. What it stores is not deleted.
func TestDeleteSparesSuccessor(t *testing.T) {
	withStorage(t, func(t *testing.T, f *fakeGCS, s *Storage) {
		storeVersion(f, "m", "v1.0.0")
		saver := f.storage("saver")
		var once sync.Once
		saved := false
		f.onRequest(func(r *fakegcs.Request) fakegcs.Fault {
			if r.Machine == "m" && r.Op == "delete" && r.Object != "m/@v/v1.0.0.mod" {
				once.Do(func() { saved = saveVersion(t.Context(), saver, "m", "v1.0.0") == nil })
			}
			return fakegcs.NoFault
		})
		require.NoError(t, s.Delete(t.Context(), "m", "v1.0.0"))
		require.True(t, saved)
		ok, err := s.Exists(t.Context(), "m", "v1.0.0")
		require.NoError(t, err)
		require.True(t, ok)
	})
}

// The claim of a fetch is no part of the version. A fresh one is its holder's, and
// a stale one is left to the next flight, and to Repair.
func TestDeleteBesideClaim(t *testing.T) {
	for _, files := range [][]string{nil, {extZip}, {extInfo, extMod, extZip}} {
		for _, fresh := range []bool{false, true} {
			t.Run(fmt.Sprint(files, fresh), func(t *testing.T) {
				withStorage(t, func(t *testing.T, f *fakeGCS, s *Storage) {
					claim := marked(time.Now().Add(ago), "a")
					if fresh {
						claim = marked(time.Now(), "a")
					}
					f.Put("m/@v/v1.0.0.lock", nil, claim)
					storeFiles(f, "m", "v1.0.0", files...)
					err := s.Delete(t.Context(), "m", "v1.0.0")
					if files == nil {
						requireError(t, err, KindNotFound, "gcs.Delete", "m", "v1.0.0")
					} else {
						require.NoError(t, err)
					}
					require.Equal(t, []string{"m/@v/v1.0.0.lock"}, f.Names())
				})
			})
		}
	}
}

func TestDeletePermissions(t *testing.T) {
	withStorage(t, func(t *testing.T, f *fakeGCS, s *Storage) {
		storeVersion(f, "m", "v1.0.0")
		names := f.Names()
		f.Deny("storage.objects.delete")
		err := s.Delete(t.Context(), "m", "v1.0.0")
		requireError(t, err, KindUnexpected, "gcs.Delete", "m", "v1.0.0")
		require.ErrorContains(t, err, "storage.objects.delete")
		require.ErrorContains(t, err, "roles/storage.objectUser")
		require.Equal(t, names, f.Names())
		f.Allow("storage.objects.delete")

		f.Retain(true)
		err = s.Delete(t.Context(), "m", "v1.0.0")
		requireError(t, err, KindUnexpected, "gcs.Delete", "m", "v1.0.0")
		require.ErrorContains(t, err, "retention policy")
		require.NotContains(t, err.Error(), "roles/", "no role helps")
		require.Equal(t, names, f.Names())
	})
}

func TestDeleteContext(t *testing.T) {
	withStorage(t, func(t *testing.T, f *fakeGCS, s *Storage) {
		storeVersion(f, "m", "v1.0.0")
		ctx, cancel := context.WithCancel(t.Context())
		f.onAnswer(func(r *fakegcs.Request) {
			if r.Op == "list" {
				cancel()
			}
		})
		err := s.Delete(ctx, "m", "v1.0.0")
		requireError(t, err, KindUnexpected, "gcs.Delete", "m", "v1.0.0")
		require.ErrorIs(t, err, context.Canceled)
		require.Len(t, f.Names(), 3)
		require.False(t, slices.Contains(logged(f)[1:], "list"))
	})
}
