package gcs

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// An object that refused an upload, and is gone when the save looks, has changed:
// the upload is made again.
func TestSaveBesideDelete(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		a := contentOf("a", 100)
		deleting, refused, deleted := make(chan struct{}), make(chan struct{}), make(chan struct{})
		var group sync.WaitGroup
		f.onRequest(func(r *fakegcs.Request) fakegcs.Fault {
			switch {
			case r.Machine == "a" && r.Op == "insert" && r.Object == objectName(extMod):
				time.Sleep(time.Second) // the listing has shown nothing
				storeVersion(f, testModule, testVersion)
				group.Go(func() { require.NoError(t, f.storage("d").Delete(t.Context(), testModule, testVersion)) })
				<-deleting
			case r.Machine == "d" && r.Op == "delete" && r.Object == objectName(extZip):
				close(deleting)
				<-refused
			case r.Machine == "a" && r.Op == "attrs" && r.Object == objectName(extZip):
				<-deleted
			}
			return fakegcs.NoFault
		})
		f.onAnswer(func(r *fakegcs.Request) {
			switch {
			case r.Machine == "a" && r.Object == objectName(extZip) && r.Status == 412:
				close(refused)
			case r.Machine == "d" && r.Op == "delete" && r.Object == objectName(extZip):
				close(deleted)
			}
		})
		require.NoError(t, a.save(t.Context(), f.storage("a")))
		group.Wait()
		requireStored(t, f, a)
		<-refused // or the schedule was another
	})
}

// A create that its sender has given up arrives late. It holds up nobody.
func TestLateCreateOfCancelledSave(t *testing.T) {
	forNamed(t, inCrowd, map[string]matcher{
		"before the give-up looks":  on("", "attrs", ""),
		"before the give-up writes": givesUp,
		"after the save":            func(*fakegcs.Request) bool { return false },
	}, func(t *testing.T, f *fakeGCS, lands matcher) {
		creates := on("", "insert", extMod)
		f.fault(fakegcs.Stray, func(r *fakegcs.Request) bool { return creates(r) && !givesUp(r) })
		f.before(lands, func() { f.Land() })
		requireKind(t, contentOf("a", 100).save(within(t, 2*time.Second), f.storage("a")), KindGatewayTimeout)
		f.Land()
		requireSavableAtOnce(t, f)
	})
}

// A create can still arrive when the save has gone on to take over, and the takeover be
// refused because it has arrived.
func TestLateCreateBeforeTakeover(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		leave(f, nil, extInfo, extMod, extZip)
		ctx, cancel := context.WithCancel(t.Context())
		var creates atomic.Int32
		f.onRequest(func(r *fakegcs.Request) fakegcs.Fault {
			switch {
			case r.Op == "insert" && creates.Add(1) == 1:
				return fakegcs.StrayReset
			case r.Op == "insert" && creates.Load() == 3:
				f.Land()
			case r.Op == "list" && creates.Load() == 3:
				cancel()
			}
			return fakegcs.NoFault
		})
		f.onAnswer(func(r *fakegcs.Request) {
			if r.Op == "insert" && creates.Load() == 2 {
				for _, ext := range []string{extMod, extInfo, extZip} {
					f.Remove(objectName(ext))
				}
			}
		})
		require.ErrorIs(t, contentOf("a", 100).save(ctx, f.storage("a")), context.Canceled)
		require.EqualValues(t, 3, creates.Load())
		f.onRequest(nil)
		requireSavableAtOnce(t, f)
	})
}

// So does a claim whose holder could not reach the bucket.
func TestLateCreateOfFailedClaim(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		claims := on("", "insert", extClaim)
		f.fault(fakegcs.StrayReset, func(r *fakegcs.Request) bool { return claims(r) && !givesUp(r) })
		next := answering(testVersion, nil)
		_, err := f.storage("a").SingleFlight(next).Stash(t.Context(), testModule, testVersion)
		requireKind(t, err, KindUnexpected)
		f.onRequest(nil)
		f.LandOne(len(f.Strays()) - 1) // the others are stale
		require.Less(t, timeOf(func() { requireStash(t, f.storage("b").SingleFlight(next), testVersion, testVersion) }), time.Second)
	})
}

// A renewal that failed may have been applied, and just now. The commit keeps its
// distance.
func TestCommitAfterFailedRenewal(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fakeGCS) {
		failed := 0
		f.onRequest(func(r *fakegcs.Request) fakegcs.Fault {
			if r.Op == "patch" && r.Metadata[keyInProgress] != "" {
				if failed++; failed == 1 {
					return fakegcs.Hung
				}
				time.Sleep(requestTimeout - 200*time.Millisecond)
				return fakegcs.HungApplied
			}
			return fakegcs.NoFault
		})
		a := contentOf("a", 100)
		require.NoError(t, a.saveSlowly(t.Context(), f.storage("a"), DefaultStaleThreshold/renewals+4*time.Second))
		require.Equal(t, 2, failed) // tries of one renewal
		requireStored(t, f, a)
	})
}

// A save fails, and finds when it gives up that another has finished it: all of it
// is stored, so it has not failed.
func TestGiveUpOfFinished(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		a := contentOf("a", 100)
		f.fault(fakegcs.HungApplied, on("a", "", extZip))
		ctx := within(t, 2*time.Second)
		time.AfterFunc(time.Second, func() { requireExists(t, ahead(f, "e"), testVersion, true) })
		require.NoError(t, a.save(ctx, f.storage("a")))
		require.Error(t, ctx.Err())
		requireStored(t, f, a)
	})
}

// A marker that is cleared says nothing of a zip that could not be read.
func TestGiveUpOfClearedWithoutZip(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		broken := errors.New("broken")
		time.AfterFunc(500*time.Millisecond, func() { f.SetMetadata(objectName(extMod), nil) })
		err := contentOf("a", 100).saveHalf(t.Context(), f.storage("a"), sleepReader(time.Second), iotest.ErrReader(broken))
		requireKind(t, err, KindUnexpected)
		require.ErrorIs(t, err, broken)
		requireSavableAtOnce(t, f)
	})
}

// If only the commit failed, the next save makes it up.
func TestNextSaveCommits(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		a, b := contentOf("a", 100), contentOf("b", 100)
		f.fault(fakegcs.Hung, func(r *fakegcs.Request) bool { return r.Op == "patch" && !givesUp(r) })
		requireKind(t, a.save(within(t, 2*time.Second), f.storage("a")), KindGatewayTimeout)
		f.onRequest(nil)
		require.Less(t, timeOf(func() { requireKind(t, b.save(t.Context(), f.storage("b")), KindAlreadyExists) }), time.Second)
		requireStored(t, f, a)
	})
}

// fence lets b take the version over from a, whose clock is an hour ahead, so that
// b's marker looks stale to a. It calls save for b, and returns when a's
// save returned, and what.
func fence(t *testing.T, f *fakeGCS, a content, save func(b *fakegcs.Machine)) (at time.Time, err error) {
	t.Helper()
	machine, b := f.Machine("a"), f.Machine("b")
	s := NewStorage(machine.Bucket)
	s.now = func() time.Time { return time.Now().Add(time.Hour) }
	var sleep sync.Once
	f.onRequest(func(r *fakegcs.Request) fakegcs.Fault {
		if r.Machine == "a" && r.Object == objectName(extZip) {
			sleep.Do(machine.Pause)
		}
		return fakegcs.NoFault
	})
	f.onAnswer(func(r *fakegcs.Request) {
		if r.Machine == "b" && r.Object == objectName(extMod) && r.Op == "insert" && r.Applied {
			machine.Resume()
		}
	})
	wait := alongside(func() {
		err = a.save(t.Context(), s)
		at = time.Now()
	})
	time.Sleep(time.Second)
	save(b)
	wait()
	return at, err
}

// A save that was fenced believes a marker that looks stale while it changes: the
// other renews it.
func TestFencedIsPatient(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		a, b := contentOf("a", 100), contentOf("b", 100)
		_, err := fence(t, f, a, func(m *fakegcs.Machine) {
			require.NoError(t, b.saveSlowly(t.Context(), NewStorage(m.Bucket), 10*time.Minute))
		})
		requireKind(t, err, KindAlreadyExists)
		requireStored(t, f, b)
	})
}

// Its patience ends a threshold after the last change.
func TestFencedByCrashed(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		a := contentOf("a", 100)
		var crashed time.Time
		at, err := fence(t, f, a, func(m *fakegcs.Machine) {
			crashed = time.Now().Add(10 * time.Minute) // b has held the version for 8 minutes then
			time.AfterFunc(10*time.Minute, m.Crash)
			require.Error(t, contentOf("b", 100).saveHalf(within(t, 20*time.Minute), NewStorage(m.Bucket), sleepReader(15*time.Minute)))
		})
		requireFenced(t, err)
		require.Greater(t, at.Sub(crashed), DefaultStaleThreshold-DefaultStaleThreshold/renewals-time.Second)
		require.Less(t, at.Sub(crashed), DefaultStaleThreshold+3*time.Second)
	})
}

// The same if the marker of the crashed save looks fresh at first: it does not wait
// for a second threshold after that.
func TestFencedWaitsOnce(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		f.tolerate()
		a := contentOf("a", 100)
		var crashed time.Time
		time.AfterFunc(10*time.Second, func() {
			crashed = time.Now()
			f.Put(objectName(extMod), nil, marked(crashed, "b"))
		})
		requireFenced(t, a.saveSlowly(t.Context(), f.storage("a"), 20*time.Second))
		// It sees the marker 20 s after the crash at the latest, when it has read its zip.
		require.Less(t, time.Since(crashed), DefaultStaleThreshold+25*time.Second)
	})
}

// A saver far away, one of whose renewals had no answer, keeps its marker fresh.
func TestRenewalsOverSlowLine(t *testing.T) {
	for _, trip := range []time.Duration{3 * time.Second, 4 * time.Second} {
		t.Run(trip.String(), func(t *testing.T) {
			bubble(t, trip, func(t *testing.T, f *fakeGCS) {
				f.fault(fakegcs.HungApplied, first(1, on("", "patch", "")))
				var group sync.WaitGroup
				defer group.Wait()
				group.Go(func() {
					require.NoError(t, contentOf("a", 100).saveSlowly(t.Context(), f.storage("a"), 10*time.Minute))
				})
				time.Sleep(20 * time.Second)
				requireKind(t, contentOf("b", 100).save(t.Context(), f.storage("b")), KindAlreadyExists)
			})
		})
	}
}

// A renewal that takes longer than the time to the next is not followed at once by it.
func TestRenewalsAreNotTooFast(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fakeGCS) {
		f.atFirst(on("", "patch", ""), func() { time.Sleep(1900 * time.Millisecond) })
		require.NoError(t, contentOf("a", 100).saveSlowly(t.Context(), f.storage("a", WithStaleThreshold(4*time.Second)), 10*time.Second))
	})
}

// It has none with a marker that was given up.
func TestFencedByFailed(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		a := contentOf("a", 100)
		var failed time.Time
		at, err := fence(t, f, a, func(m *fakegcs.Machine) {
			require.ErrorIs(t, contentOf("b", 100).saveHalf(t.Context(), NewStorage(m.Bucket), sleepReader(time.Minute), iotest.ErrReader(io.ErrUnexpectedEOF)), io.ErrUnexpectedEOF)
			failed = time.Now()
		})
		requireFenced(t, err)
		require.Less(t, at.Sub(failed), 3*time.Second)
	})
}

// A create that is forbidden leaves nothing that could arrive later.
func TestSaveForbidden(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		f.Deny("storage.objects.create")
		var l syncedLog
		err := contentOf("a", 100).save(t.Context(), f.storage("a", l.option()))
		require.Error(t, err)
		require.Empty(t, l.lines(slog.LevelWarn))
		require.Empty(t, f.Names())
		require.Len(t, f.Log(), 1)
	})
}

// A create that arrives late, during a save whose .mod somebody has deleted, is given
// up with the save.
func TestLateCreateDuringSave(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		f.tolerate()
		f.fault(fakegcs.StrayReset, first(1, on("", "", extMod)))
		ctx := within(t, 10*time.Second)
		time.AfterFunc(5*time.Second, func() {
			f.Remove(objectName(extMod))
			f.Land()
		})
		require.Error(t, contentOf("a", 100).saveSlowly(ctx, f.storage("a"), time.Minute))
		start := time.Now()
		b := contentOf("b", 100)
		require.NoError(t, b.save(t.Context(), f.storage("b")))
		require.Less(t, time.Since(start), time.Second)
		requireStored(t, f, b)
	})
}

// A late create that is recovered finds what it found when it was sent: nothing.
func TestRecoveredCreateHealsNothing(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		var l syncedLog
		f.Put(objectName(extMod), nil, marked(time.Now(), "x"))
		f.fault(fakegcs.StrayReset, first(1, on("", "insert", extMod)))
		time.AfterFunc(5*time.Second, func() {
			f.Remove(objectName(extMod)) // a delete
			f.Land()
		})
		require.NoError(t, contentOf("a", 100).save(t.Context(), f.storage("a", l.option())))
		require.NotContains(t, l.String(), "in progress")
		require.NotContains(t, l.String(), "healed")
	})
}

// A renewal that finds the marker cleared does not stop the save: somebody has
// finished it.
func TestRenewalOfFinished(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		a, w := contentOf("a", 100), watch(t)
		f.after(on("a", "insert", extZip), func() {
			time.Sleep(time.Second) // until the .info is there
			requireExists(t, ahead(f, "e"), testVersion, true)
			time.Sleep(4 * time.Second)
		})
		require.NoError(t, a.save(t.Context(), f.storage("a", WithStaleThreshold(8*time.Second))))
		requireStored(t, f, a)
		require.Zero(t, w.renewalsFailed())
	})
}

// A save that is deleted while its zip trickles in ends at the next renewal.
func TestRenewalOfFenced(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		a := contentOf("a", 1200)
		rest := bytes.NewReader(a.zip)
		time.AfterFunc(10*time.Minute, func() { f.Remove(objectName(extMod)) })
		start := time.Now()
		requireFenced(t, a.saveFrom(t.Context(), f.storage("a", WithChunkSize(1)), readFunc(func(p []byte) (int, error) {
			time.Sleep(time.Second)
			return rest.Read(p[:1])
		})))
		require.InDelta(t, 10*60, time.Since(start).Seconds(), DefaultStaleThreshold.Seconds()/renewals+1)
	})
}

// Giving up costs one request, is over in time, and says nothing if another has the
// version.
func TestGiveUp(t *testing.T) {
	for name, hook := range map[string]func(f *fakeGCS){
		"costs": func(f *fakeGCS) {},
		"hangs": func(f *fakeGCS) {
			f.fault(fakegcs.Hung, on("", "patch", ""))
		},
		"fenced": func(f *fakeGCS) { f.Remove(objectName(extMod)) },
	} {
		run(t, name, inCrowd, func(t *testing.T, f *fakeGCS) {
			time.AfterFunc(500*time.Millisecond, func() { hook(f) })
			var log syncedLog
			start := time.Now()
			err := contentOf("a", 100).saveHalf(t.Context(), f.storage("a", log.option()), sleepReader(time.Second), iotest.ErrReader(io.ErrUnexpectedEOF))
			require.ErrorIs(t, err, io.ErrUnexpectedEOF)
			require.Less(t, time.Since(start), releaseTimeout+2*time.Second)
			if name == "costs" {
				require.Len(t, f.Log(), 4, "create, look, .info, give up")
			}
			if name != "hangs" {
				require.Empty(t, log.String())
			}
		})
	}
}

// A commit that finds the marker cleared is done: nothing is given up.
func TestCommitOfFinished(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		f.before(on("", "patch", ""), func() { f.SetMetadata(objectName(extMod), nil) })
		a := contentOf("a", 100)
		require.NoError(t, a.save(t.Context(), f.storage("a")))
		require.Len(t, f.Log(), 5, "4, and the .mod is read")
		requireStored(t, f, a)
	})
}
