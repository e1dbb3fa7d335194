package gcs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"cloud.google.com/go/storage"
	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// An object that refused an upload, and is gone when the save looks, has changed:
// the upload is made again.
func TestSaveBesideDelete(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		a, deleting, refused, deleted := contentOf("a", 100), make(chan struct{}), make(chan struct{}), make(chan struct{})
		var wait func()
		f.before(on("a", "insert", extMod), func() {
			time.Sleep(time.Second) // the listing has shown nothing
			storeVersion(f, testModule, testVersion)
			wait = alongside(func() { require.NoError(t, f.storage("d").Delete(t.Context(), testModule, testVersion)) })
			<-deleting
		})
		f.before(on("d", "delete", extZip), func() { close(deleting); <-refused })
		f.before(on("a", "attrs", extZip), func() { <-deleted })
		f.after(func(r *fakegcs.Request) bool { return on("a", "", extZip)(r) && r.Status == 412 }, func() { close(refused) })
		f.after(on("d", "delete", extZip), func() { close(deleted) })
		require.NoError(t, a.save(t.Context(), f.storage("a")))
		wait()
		requireStored(t, f, a)
		<-refused // or the schedule was another
	})
}

// What its sender has given up, after which the caller was told that nothing is stored,
// arrives late. It completes nothing, and holds up nobody.
func TestLateRequestOfFailedSave(t *testing.T) {
	create, never := but(on("", "insert", extMod), givesUp), first(0, givesUp)
	type testCase struct {
		ext           string
		strays, lands matcher
	}
	forNamed(t, inBubble, map[string]testCase{
		"create before the give-up looks":  {extMod, create, on("", "attrs", "")},
		"create before the give-up writes": {extMod, create, givesUp},
		"create after the save":            {extMod, create, never},
		"info after the save":              {extInfo, on("", "", extInfo), never},
		"zip after the save":               {extZip, on("", "", extZip), never},
	}, func(t *testing.T, f *fakeGCS, c testCase) {
		f.fault(fakegcs.Stray, c.strays)
		f.before(c.lands, func() { f.Land() })
		requireKind(t, contentOf("a", 100).save(within(t, 2*time.Second), f.storage("a")), KindGatewayTimeout)
		f.onRequest(nil)
		f.Land()
		require.NotNil(t, f.Get(objectName(c.ext)))
		time.Sleep(time.Second) // past the limit on writes of one name
		requireSavableAtOnce(t, f)
	})
}

func TestLateCreate(t *testing.T) {
	// A create can still arrive when the save has gone on to take over, and the takeover be
	// refused because it has arrived.
	run(t, "before a takeover", inCrowd, func(t *testing.T, f *fakeGCS) {
		leave(f, nil, allExts...)
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
		f.after(on("", "insert", ""), func() {
			if creates.Load() == 2 {
				removeVersion(f, testVersionName)
			}
		})
		require.ErrorIs(t, contentOf("a", 100).save(ctx, f.storage("a")), context.Canceled)
		require.EqualValues(t, 3, creates.Load())
		f.onRequest(nil)
		requireSavableAtOnce(t, f)
	})

	// It was applied and not answered, and its second try was refused. The save ends before
	// it has looked, and gives up what it has written.
	run(t, "that was applied", inCrowd, func(t *testing.T, f *fakeGCS) {
		f.fault(fakegcs.Hung, on("", "list", ""))
		f.fault(fakegcs.LostReset, nth("a", 0))
		requireKind(t, contentOf("a", 100).save(within(t, 2*time.Second), f.storage("a")), KindGatewayTimeout)
		requireSavableAtOnce(t, f)
	})

	// So does a claim whose holder could not reach the bucket.
	run(t, "of a failed claim", inFleet, func(t *testing.T, f *fakeGCS) {
		f.fault(fakegcs.StrayReset, but(on("", "insert", extClaim), givesUp))
		next := answering(testVersion, nil)
		_, err := f.storage("a").SingleFlight(next).Stash(t.Context(), testModule, testVersion)
		requireKind(t, err, KindUnexpected)
		f.onRequest(nil)
		f.LandOne(len(f.Strays()) - 1) // the others are stale
		require.Less(t, timeOf(func() { requireStash(t, f.storage("b").SingleFlight(next), testVersion, testVersion) }), time.Second)
	})

	// During a save whose .mod somebody has deleted, it is given up with the save.
	run(t, "during a save", inCrowd, func(t *testing.T, f *fakeGCS) {
		f.tolerate()
		f.fault(fakegcs.StrayReset, first(1, on("", "", extMod)))
		ctx := within(t, 10*time.Second)
		time.AfterFunc(5*time.Second, func() { f.Remove(objectName(extMod)); f.Land() })
		require.Error(t, contentOf("a", 100).saveSlowly(ctx, f.storage("a"), time.Minute))
		b := contentOf("b", 100)
		require.Less(t, timeOf(func() { require.NoError(t, b.save(t.Context(), f.storage("b"))) }), time.Second)
		requireStored(t, f, b)
	})

	// When it is recovered, it finds what it found when it was sent: nothing.
	run(t, "heals nothing", inCrowd, func(t *testing.T, f *fakeGCS) {
		var l syncedLog
		f.Put(objectName(extMod), nil, marked(time.Now(), "x"))
		f.fault(fakegcs.StrayReset, first(1, on("", "insert", extMod)))
		time.AfterFunc(5*time.Second, func() { f.Remove(objectName(extMod)); f.Land() }) // a delete
		require.NoError(t, contentOf("a", 100).save(t.Context(), f.storage("a", l.option())))
		require.NotContains(t, l.String(), "in progress")
		require.NotContains(t, l.String(), "healed")
	})
}

// Giving up costs one request, is over in time, and says nothing if another has the
// version.
func TestGiveUp(t *testing.T) {
	for name, happens := range map[string]func(f *fakeGCS){
		"costs":  func(f *fakeGCS) {},
		"hangs":  func(f *fakeGCS) { f.fault(fakegcs.Hung, on("", "patch", "")) },
		"fenced": func(f *fakeGCS) { f.Remove(objectName(extMod)) },
		"refused": func(f *fakeGCS) {
			f.Deny("storage.objects.update")
			time.AfterFunc(700*time.Millisecond, func() { f.Allow("storage.objects.update") })
		},
	} {
		run(t, name, inCrowd, func(t *testing.T, f *fakeGCS) {
			time.AfterFunc(500*time.Millisecond, func() { happens(f) })
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

	// A save fails, and finds when it gives up that another has finished it: all of it
	// is stored, so it has not failed.
	run(t, "finished", inCrowd, func(t *testing.T, f *fakeGCS) {
		a, ctx := contentOf("a", 100), within(t, 2*time.Second)
		f.fault(fakegcs.HungApplied, on("a", "", extZip))
		time.AfterFunc(time.Second, func() { requireExists(t, ahead(f, "e"), testVersion, true) })
		require.NoError(t, a.save(ctx, f.storage("a")))
		require.Error(t, ctx.Err())
		requireStored(t, f, a)
	})

	// A marker that is cleared says nothing of a zip that could not be read.
	run(t, "cleared without zip", inCrowd, func(t *testing.T, f *fakeGCS) {
		broken := errors.New("broken")
		time.AfterFunc(500*time.Millisecond, func() { f.SetMetadata(objectName(extMod), nil) })
		err := contentOf("a", 100).saveHalf(t.Context(), f.storage("a"), sleepReader(time.Second), iotest.ErrReader(broken))
		requireKind(t, err, KindUnexpected)
		require.ErrorIs(t, err, broken)
		requireSavableAtOnce(t, f)
	})

	// If only the commit failed, the next save makes it up.
	run(t, "after the commit", inCrowd, func(t *testing.T, f *fakeGCS) {
		a, b := contentOf("a", 100), contentOf("b", 100)
		f.fault(fakegcs.Hung, but(on("", "patch", ""), givesUp))
		requireKind(t, a.save(within(t, 2*time.Second), f.storage("a")), KindGatewayTimeout)
		f.onRequest(nil)
		require.Less(t, timeOf(func() { requireKind(t, b.save(t.Context(), f.storage("b")), KindAlreadyExists) }), time.Second)
		requireStored(t, f, a)
	})

	// A commit that finds the marker cleared is done: nothing is given up.
	run(t, "not after the commit", inCrowd, func(t *testing.T, f *fakeGCS) {
		f.before(on("", "patch", ""), func() { f.SetMetadata(objectName(extMod), nil) })
		a := contentOf("a", 100)
		require.NoError(t, a.save(t.Context(), f.storage("a")))
		require.Len(t, f.Log(), 5, "4, and the .mod is read")
		requireStored(t, f, a)
	})

	// A create that is forbidden leaves nothing that could arrive later.
	run(t, "forbidden", inCrowd, func(t *testing.T, f *fakeGCS) {
		f.Deny("storage.objects.create")
		var l syncedLog
		require.ErrorContains(t, contentOf("a", 100).save(t.Context(), f.storage("a", l.option())), "storage.objects.create")
		require.Empty(t, l.lines(slog.LevelWarn))
		require.Empty(t, f.Names())
		require.Equal(t, []string{"insert", "list", "list", "insert"}, logged(f))
		storeVersion(f, testModule, testVersion) // complete for whoever may not create it, too
		requireKind(t, contentOf("a", 100).save(t.Context(), f.storage("a")), KindAlreadyExists)
	})
}

// A save sleeps while another takes its version over, and works on it for long. Whatever
// the clocks say, the first waits as long as the .mod of the second is there, is not given
// up, and has changed within the threshold.
func TestFencedWaits(t *testing.T) {
	t.Parallel()
	type successor struct {
		rest io.Reader // of its zip
		end  func(ctx context.Context, f *fakeGCS, b *fakegcs.Machine)
		late time.Duration // what the first waits for at least
	}
	const takes, patience = 10 * time.Minute, DefaultStaleThreshold
	b := contentOf("b", 100)
	for _, skew := range some(0, -time.Hour, time.Hour) {
		for name, c := range map[string]successor{
			"completes": {rest: bytes.NewReader(b.zip[2:])},
			"fails":     {rest: iotest.ErrReader(io.ErrUnexpectedEOF)},
			"crashes": {rest: bytes.NewReader(nil), end: func(_ context.Context, _ *fakeGCS, b *fakegcs.Machine) { b.Crash() },
				late: patience - patience/renewals},
			"deleted": {rest: bytes.NewReader(nil), end: func(ctx context.Context, f *fakeGCS, _ *fakegcs.Machine) {
				_ = f.storage("d").Delete(ctx, testModule, testVersion)
			}},
		} {
			run(t, name+"/"+skew.String(), inCrowd, func(t *testing.T, f *fakeGCS) {
				first, second := f.Machine("a"), f.Machine("b")
				s := NewStorage(first.Bucket)
				s.now = func() time.Time { return time.Now().Add(skew) }
				var since time.Time
				f.atFirst(on("a", "", extZip), first.Pause)
				f.after(applied(on("b", "insert", extMod)), func() {
					first.Resume()
					since = time.Now().Add(takes)
					if c.end != nil {
						time.AfterFunc(takes-time.Second, func() { c.end(t.Context(), f, second) })
					}
				})
				time.AfterFunc(time.Second, func() {
					_ = b.saveHalf(within(t, time.Hour), NewStorage(second.Bucket), sleepReader(takes), c.rest)
				})
				err := contentOf("a", 100).save(t.Context(), s)
				require.Greater(t, time.Since(since), c.late-2*time.Second)
				require.Less(t, time.Since(since), c.late+patience/renewals+lastPoll)
				if name == "completes" {
					requireKind(t, err, KindAlreadyExists)
					require.Zero(t, f.count(func(r *fakegcs.Request) bool { return r.Machine == "a" && givesUp(r) }))
					requireStored(t, f, b)
					return
				}
				requireFenced(t, err)
			})
		}
	}
}

func TestRenewals(t *testing.T) {
	// A zip that takes longer than the stale threshold is not taken over, because
	// its marker is renewed; after it, the commit waits until it may.
	run(t, "of a slow zip", inBubble, func(t *testing.T, f *fakeGCS) {
		f.EnforceRates(true)
		a := contentOf("a", 100)
		// The last renewal is under way when the zip is done.
		require.NoError(t, a.saveSlowly(t.Context(), f.storage("a"), 10*time.Minute))
		requireStored(t, f, a)
		require.InDelta(t, 10*60/30+1, renewed(t, f, extMod), 1) // the commit is one more
	})

	// A saver far away, one of whose renewals had no answer, keeps its marker fresh.
	for _, trip := range []time.Duration{3 * time.Second, 4 * time.Second} {
		run(t, "over a slow line "+trip.String(), inCrowd, func(t *testing.T, f *fakeGCS) {
			f.SetLatency(trip)
			f.fault(fakegcs.HungApplied, first(1, on("", "patch", "")))
			defer alongside(func() {
				require.NoError(t, contentOf("a", 100).saveSlowly(t.Context(), f.storage("a"), 10*time.Minute))
			})()
			time.Sleep(20 * time.Second)
			requireKind(t, contentOf("b", 100).save(t.Context(), f.storage("b")), KindAlreadyExists)
		})
	}

	// A renewal that takes longer than the time to the next is not followed at once by it.
	run(t, "are not too fast", inBubble, func(t *testing.T, f *fakeGCS) {
		f.atFirst(on("", "patch", ""), func() { time.Sleep(1900 * time.Millisecond) })
		require.NoError(t, contentOf("a", 100).saveSlowly(t.Context(), f.storage("a", WithStaleThreshold(4*time.Second)), 10*time.Second))
	})

	// Nor does the first follow the create at once.
	run(t, "of a short threshold", inSharedRate, func(t *testing.T, f *fakeGCS) {
		s := f.storage("a", WithStaleThreshold(2*time.Second))
		require.NoError(t, contentOf("a", 100).saveSlowly(t.Context(), s, 3500*time.Millisecond))
		require.Zero(t, f.count(func(r *fakegcs.Request) bool { return r.Status == 429 }))
	})

	// A claim two of whose renewals have no answer stays fresh.
	run(t, "that hang", inFleet, func(t *testing.T, f *fakeGCS) {
		f.fault(fakegcs.Hung, first(4, on("0", "patch", extClaim)))
		o := &origin{takes: time.Minute}
		errs, _ := stashAll(t, newFleet(f, o, 2), time.Second)
		requireNoErrors(t, errs)
		require.Equal(t, 1, o.total())
	})

	// A renewal that finds the marker cleared does not stop the save: somebody has
	// finished it.
	run(t, "of a finished version", inCrowd, func(t *testing.T, f *fakeGCS) {
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

	// A save that is deleted while its zip trickles in ends at the next renewal.
	run(t, "of a fenced save", inCrowd, func(t *testing.T, f *fakeGCS) {
		time.AfterFunc(10*time.Minute, func() { f.Remove(objectName(extMod)) })
		start := time.Now()
		zip := io.LimitReader(trickle(time.Second), 1200)
		requireFenced(t, contentOf("a", 0).saveFrom(t.Context(), f.storage("a", WithChunkSize(1)), zip))
		require.InDelta(t, 10*60, time.Since(start).Seconds(), DefaultStaleThreshold.Seconds()/renewals+1)
	})

	// A renewal that failed may have been applied, and just now. The commit keeps its
	// distance.
	run(t, "and the commit after", inBubble, func(t *testing.T, f *fakeGCS) {
		f.fault(fakegcs.HungApplied, renews)
		f.before(renews, func() { time.Sleep(requestTimeout - 200*time.Millisecond) })
		f.fault(fakegcs.Hung, first(1, renews))
		a := contentOf("a", 100)
		require.NoError(t, a.saveSlowly(t.Context(), f.storage("a"), DefaultStaleThreshold/renewals+4*time.Second))
		require.Equal(t, 2, f.count(renews)) // tries of one renewal
		requireStored(t, f, a)
	})
}

// renews reports whether a request renews a marker.
func renews(r *fakegcs.Request) bool { return r.Op == "patch" && r.Metadata[keyInProgress] != "" }

// inSharedRate is inFleet for a bucket in which creates, updates and deletes of an
// object share a rate of one a second.
func inSharedRate(t *testing.T, test func(t *testing.T, f *fakeGCS)) {
	t.Helper()
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		f.EnforceRates(true)
		f.ShareRates(true)
		test(t, f)
	})
}

// saveBroken saves from a reader that fails when a chunk is sent.
func (c content) saveBroken(ctx context.Context, s *Storage) error {
	return c.saveFrom(ctx, s, io.MultiReader(bytes.NewReader(make([]byte, 2<<20)), iotest.ErrReader(io.ErrClosedPipe)))
}

// A rate that all changes of an object share costs a call a second, and a request or two.
func TestSharedRateCosts(t *testing.T) {
	a := contentOf("a", 100)
	callsOf := func(f *fakeGCS, s *Storage) map[string]func(context.Context) error {
		calls := outageCalls(s)
		return map[string]func(context.Context) error{
			"new":    calls["Save"],
			"large":  func(ctx context.Context) error { return contentOf("a", 2<<20).save(ctx, s) },
			"flight": calls["Stash new"],
			"renewed": func(ctx context.Context) error {
				s.SetStaleThreshold(4 * time.Second)
				return a.saveSlowly(ctx, s, 10*time.Second)
			},
			"taken over": func(ctx context.Context) error {
				leave(f, marked(givenUp, "old"), extMod, extZip)
				return a.save(ctx, s)
			},
			"given up": func(ctx context.Context) error { return a.saveBroken(ctx, s) },
			"failed flight": func(ctx context.Context) error {
				_, err := s.SingleFlight(answering("", errGone)).Stash(ctx, testModule, testVersion)
				return err
			},
		}
	}
	fails := map[string]error{"given up": io.ErrClosedPipe, "failed flight": errGone}
	for name := range callsOf(nil, nil) {
		t.Run(name, func(t *testing.T) {
			cost := func(in arena) (took time.Duration, requests int) {
				in(t, func(t *testing.T, f *fakeGCS) {
					s, start := f.storage("a"), time.Now()
					require.ErrorIs(t, callsOf(f, s)[name](t.Context()), fails[name])
					took, requests = time.Since(start), len(f.Log())
				})
				return took, requests
			}
			usually, requests := cost(inFleet)
			took, n := cost(inSharedRate)
			require.LessOrEqual(t, took, usually+1500*time.Millisecond)
			require.LessOrEqual(t, n, requests+2)
		})
	}
}

// With a shared rate, too, one of those who race stores the version, and who comes after
// a save that failed does not wait for its marker.
func TestSharedRateRaces(t *testing.T) {
	inSharedRate(t, func(t *testing.T, f *fakeGCS) {
		require.ErrorIs(t, contentOf("broken", 100).saveBroken(t.Context(), f.storage("broken")), io.ErrClosedPipe)
		start := time.Now()
		requireOneWinner(t, f, 5, func(i int) (content, error) {
			c := contentOf(fmt.Sprint(i), 100)
			return c, c.save(t.Context(), f.storage(fmt.Sprint(i)))
		})
		require.Less(t, time.Since(start), 5*time.Second)
		require.NoError(t, f.storage("a").Delete(t.Context(), testModule, testVersion))
		require.Empty(t, f.Names())
	})
	forNamed(t, inSharedRate, map[string]int{"whose first fetch fails": 1, "whose fetches fail": 100}, func(t *testing.T, f *fakeGCS, failing int) {
		o := &origin{takes: 100 * time.Millisecond, fail: func(n int) bool { return n <= failing }}
		errs, took := stashAll(t, newFleet(f, o, 4), 10*time.Millisecond)
		require.Less(t, took, 5*time.Second)
		require.ErrorIs(t, errs[0], errGone)
		for _, err := range errs[1:] {
			if failing == 1 {
				require.NoError(t, err)
			} else {
				require.ErrorIs(t, err, errGone)
			}
		}
	})
}

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
				put := func(ext string, meta map[string]string) (*storage.ObjectAttrs, error) {
					return b.put(t.Context(), v, ext, ifUnchanged(nil), func() map[string]string { return meta }, old.file(ext))
				}
				putBeside := func(ext string) error {
					_, err := put(ext, map[string]string{keySaveID: "old", keyGeneration: formatGeneration(mod.Generation)})
					return err
				}
				requests := []func() error{
					func() (err error) { mod, err = put(extMod, marked(time.Now(), "old")); return err },
					func() error { return putBeside(extInfo) },
					func() error { return putBeside(extZip) },
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
