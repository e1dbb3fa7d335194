package gcs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"cloud.google.com/go/storage"
	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// These are the moments that a storm meets seldom.

// The commit waits for the renewal that is on its way, and does not run into it.
func TestCommitAwaitsRenewal(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fakeGCS) {
		f.before(renews, func() { time.Sleep(3 * time.Second) })
		a := contentOf("a", 100)
		require.NoError(t, a.saveSlowly(t.Context(), f.storage("a"), DefaultStaleThreshold/renewals+time.Second))
		requireStored(t, f, a)
		var patches []fakegcs.Request
		for _, r := range f.Log() {
			require.Equal(t, 200, r.Status, "%v", r)
			if r.Op == "patch" {
				patches = append(patches, r)
			}
		}
		require.Len(t, patches, 2)
		require.False(t, patches[1].Start.Before(patches[0].End), "the commit overtakes the renewal")
	})
}

// A sleeper wakes in the middle of its zip, long after another has taken the version over
// and stored it, or when the other has stored its zip, and has not committed. It leaves that
// zip alone.
func TestSleeperWakes(t *testing.T) {
	type testCase struct {
		op   string // at which it falls asleep
		size int
		zip  func(io.Reader) io.Reader
	}
	seekable := func(r io.Reader) io.Reader { return r }
	cases := map[string]testCase{
		"in memory":  {"insert", 100, plain},
		"seekable":   {"start", 700 << 10, seekable},
		"unseekable": {"start", 700 << 10, plain},
		"in a chunk": {"chunk", 700 << 10, plain},
	}
	play := func(t *testing.T, f *fakeGCS, c testCase, during bool) {
		a, b := contentOf("a", c.size), contentOf("b", 100)
		sleeper, stored := f.Machine("a"), make(chan struct{})
		f.atFirst(on("a", c.op, extZip), sleeper.Pause)
		if during {
			f.before(on("a", "patch", ""), func() { time.Sleep(2 * requestTimeout) }) // or it would know sooner
			f.before(on("b", "", extInfo), func() { <-stored; time.Sleep(5 * time.Second) })
			f.after(first(1, applied(on("b", "", extZip))), func() { close(stored); sleeper.Resume() })
		} else {
			time.AfterFunc(retryLimit-time.Minute, sleeper.Resume)
		}
		wait := alongside(func() {
			s := NewStorage(sleeper.Bucket, WithChunkSize(faultChunk))
			requireKind(t, a.saveFrom(t.Context(), s, c.zip(bytes.NewReader(a.zip))), KindAlreadyExists)
		})
		time.Sleep(time.Second)
		require.NoError(t, b.save(t.Context(), f.storage("b")))
		requireStored(t, f, b)
		wait()
		requireStored(t, f, b)
	}
	t.Run("after a takeover", func(t *testing.T) {
		forNamed(t, inBubble, cases, func(t *testing.T, f *fakeGCS, c testCase) { play(t, f, c, false) })
	})
	t.Run("during a takeover", func(t *testing.T) {
		forNamed(t, inCrowd, cases, func(t *testing.T, f *fakeGCS, c testCase) { play(t, f, c, true) })
	})
}

// A save that seems dead to one with another clock commits just before it is
// taken over. The .mod is then of the same generation as before.
func TestTakeoverOfCommitted(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		a, b := contentOf("a", 100), contentOf("b", 100)
		takeover := make(chan struct{})
		f.before(on("a", "", extInfo), func() { <-takeover })
		takesOver := func(r *fakegcs.Request) bool { return on("b", "", extMod)(r) && r.Cond["ifGenerationMatch"] != "0" }
		f.before(takesOver, func() { time.Sleep(time.Second) })
		f.atFirst(takesOver, func() { close(takeover) })
		wait := alongside(func() { require.NoError(t, a.save(t.Context(), f.storage("a"))) })
		time.Sleep(time.Second)
		requireKind(t, b.save(t.Context(), ahead(f, "b")), KindAlreadyExists)
		wait()
		requireStored(t, f, a)
	})
}

// The last object of a save arrives when its caller has given up, and was told
// that nothing is stored. It completes nothing.
func TestLateObjectOfFailedSave(t *testing.T) {
	forEach(t, inBubble, []string{extInfo, extZip}, func(t *testing.T, f *fakeGCS, ext string) {
		f.fault(fakegcs.Stray, on("", "", ext))
		requireKind(t, contentOf("a", 100).save(within(t, 2*time.Second), f.storage("a")), KindGatewayTimeout)
		f.onRequest(nil)
		f.Land()
		require.NotNil(t, f.Get(objectName(ext)))
		time.Sleep(time.Second) // past the limit on writes of one name
		requireSavable(t, f)
	})
}

// requireSavable checks that the version does not exist, and can be saved.
func requireSavable(t *testing.T, f *fakeGCS) {
	t.Helper()
	s, b := f.storage("b"), contentOf("b", 100)
	requireExists(t, s, testVersion, false)
	require.NoError(t, b.save(t.Context(), s))
	requireStored(t, f, b)
}

// A create that was thought lost arrives after a delete that was cut short. It
// does not bring back to life what the delete had not reached.
func TestLateCreateAfterDelete(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fakeGCS) {
		a := contentOf("a", 100)
		f.fault(fakegcs.Stray, first(1, on("", "insert", extMod)))
		f.fault(fakegcs.CrashAfter, on("", "delete", ""))
		require.NoError(t, a.save(t.Context(), f.storage("a")))
		requireStored(t, f, a)
		require.Error(t, f.storage("d").Delete(within(t, time.Minute), testModule, testVersion))
		f.onRequest(nil)
		f.Land()
		require.NotNil(t, f.Get(objectName(extMod)))
		time.Sleep(DefaultStaleThreshold)
		requireSavable(t, f)
	})
}

// The listing that goes out beside the create shows a version that is deleted
// before the create arrives, whose answer is lost. What is stored is this save's
// own beginning, and not what the listing shows.
func TestListingBesideLostCreate(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fakeGCS) {
		old, a := contentOf("old", 100), contentOf("a", 100)
		f.putAs(old, testVersionName, time.Now().Add(ago), nil, nil, allExts...)
		f.fault(fakegcs.LostReset, first(1, on("a", "insert", extMod)))
		f.atFirst(on("a", "insert", extMod), func() {
			time.Sleep(time.Second) // the listing is answered
			require.NoError(t, f.storage("d").Delete(t.Context(), testModule, testVersion))
		})
		require.NoError(t, a.save(t.Context(), f.storage("a")))
		requireStored(t, f, a)
	})
}

// An object that comes while a listing is made may not be on it, although the
// .mod already says that it is there. A version is not taken over for that.
func TestTakeoverNeedsTwoListings(t *testing.T) {
	forEach(t, inBubble, []string{extInfo, extZip}, func(t *testing.T, f *fakeGCS, ext string) {
		a, b := contentOf("a", 100), contentOf("b", 100)
		require.NoError(t, a.save(t.Context(), f.storage("a")))
		requireKind(t, b.save(t.Context(), missing(f, ext)), KindAlreadyExists)
		requireStored(t, f, a)
	})
}

// Nor are the objects deleted that are there beside a .mod that is not on the
// listing, but for the .mod.
func TestDeleteNeedsTheMod(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fakeGCS) {
		require.NoError(t, contentOf("a", 100).save(t.Context(), f.storage("a")))
		require.NoError(t, missing(f, extMod).Delete(t.Context(), testModule, testVersion))
		require.Empty(t, f.Names())
	})
}

// A save that is fenced at its commit says so at once, if nobody else is at work. A .mod
// without a marker is that of somebody at work, such as Athens' own backend.
func TestFencedAtCommit(t *testing.T) {
	forNamed(t, inCrowd, map[string]func(*fakeGCS){
		"deleted":  func(*fakeGCS) {},
		"given up": func(f *fakeGCS) { f.Put(objectName(extMod), nil, marked(givenUp, "other")) },
		"unmarked": func(f *fakeGCS) {
			f.Remove(objectName(extZip))
			storeFiles(f, testModule, testVersion, extMod)
			time.AfterFunc(time.Minute, func() { storeFiles(f, testModule, testVersion, extInfo, extZip) })
		},
	}, func(t *testing.T, f *fakeGCS, fence func(*fakeGCS)) {
		a := contentOf("a", 100)
		f.atFirst(on("a", "patch", ""), func() { f.Remove(objectName(extMod)); fence(f) })
		err := a.save(t.Context(), f.storage("a"))
		if strings.HasSuffix(t.Name(), "unmarked") {
			requireKind(t, err, KindAlreadyExists)
			return
		}
		requireFenced(t, err)
		requireExists(t, f.storage("b"), testVersion, false)
	})
}

// A large zip that is refused, and cannot be read again, tells why.
func TestCannotSeek(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		f.Put(objectName(extZip), nil, nil)
		cause := errors.New("stale file handle")
		a := contentOf("a", 2<<20)
		err := a.saveFrom(t.Context(), f.storage("a", WithChunkSize(256<<10)), &rewound{bytes.NewReader(a.zip), func() error { return cause }})
		requireKind(t, err, KindUnexpected)
		require.ErrorIs(t, err, errCannotReread)
		require.ErrorIs(t, err, cause)
	})
}

// A save that comes second again and again, to saves that fail, does not give up.
func TestTakeoverLosesManyRaces(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		f.Put(objectName(extMod), nil, marked(givenUp, "other"))
		races := 0
		takesOver := func(r *fakegcs.Request) bool { return r.Op == "insert" && r.Cond["ifGenerationMatch"] != "0" }
		f.before(first(2*maxRefused, takesOver), func() {
			races++
			f.Put(objectName(extMod), nil, marked(time.Now(), "another"))
			time.AfterFunc(10*time.Second, func() { f.Put(objectName(extMod), nil, marked(givenUp, "another")) })
		})
		a := contentOf("a", 100)
		require.NoError(t, a.save(t.Context(), f.storage("a")))
		require.Equal(t, 2*maxRefused, races)
		requireStored(t, f, a)
	})
}

// During a rollout, replicas of the version before share the bucket. Their save makes these
// requests, with the same objects and conditions. It stops after some of them, goes on
// before a change of a save of today, and ends where it is refused.
func TestBesideSaveOfBefore(t *testing.T) {
	v, old, today := ModuleVersion{testModule, testVersion}, contentOf("old", 100), contentOf("today", 200)
	for stops := range 5 {
		for wakes := range 7 {
			run(t, fmt.Sprint(stops, wakes), inCrowd, func(t *testing.T, f *fakeGCS) {
				b := f.storage("old").bucket
				var mod *storage.ObjectAttrs
				put := func(ext string, body []byte) error {
					meta := map[string]string{keySaveID: "old", keyGeneration: formatGeneration(mod.Generation)}
					_, err := b.put(t.Context(), v, ext, ifUnchanged(nil), func() map[string]string { return meta }, body)
					return err
				}
				requests := []func() error{
					func() (err error) {
						mod, err = b.put(t.Context(), v, extMod, ifUnchanged(nil), func() map[string]string { return marked(time.Now(), "old") }, old.mod)
						return err
					},
					func() error { return put(extInfo, old.info) },
					func() error { return put(extZip, old.zip) },
					func() error { _, err := b.clear(t.Context(), v, extMod, ifUnchanged(mod)); return err },
				}
				goOn := func(n int) {
					for len(requests) > 4-n && requests[0]() == nil {
						requests = requests[1:]
					}
				}
				goOn(stops)
				var changes atomic.Int64
				f.before(but(on("today", "", ""), on("", "list", "")), func() {
					if changes.Add(1) == int64(wakes+1) {
						goOn(4)
					}
				})
				if err := today.save(t.Context(), f.storage("today")); err == nil {
					require.NotEmpty(t, requests)
					requireStored(t, f, today)
				} else {
					requireKind(t, err, KindAlreadyExists)
					requireStored(t, f, old)
				}
				goOn(4)
				requireExists(t, f.storage("e"), testVersion, true)
				require.Empty(t, f.Violations())
			})
		}
	}
}
