package gcs

import (
	"bytes"
	"context"
	"crypto/md5"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

func TestSaveNew(t *testing.T) {
	sizes := []int{0, 1, 100, minBuffer, maxBuffered, maxBuffered + 1, 3 << 20}
	forEach(t, inBubble, sizes, func(t *testing.T, f *fakeGCS, size int) {
		a := contentOf("a", size)
		require.NoError(t, a.saveFrom(t.Context(), f.storage("a"), plain(bytes.NewReader(a.zip))))
		requireStored(t, f, a)
		look := map[bool]int{true: 1}[size > maxBuffered] // at the name of a zip that can be sent only once
		require.Len(t, f.Log(), 4+look)
		require.Equal(t, 3+look, fakegcs.SerialTrips(f.Log()))
		require.NotEmpty(t, f.Get(objectName(extZip)).Metadata[keySaveID])
		require.Equal(t, "application/zip", f.Get(objectName(extZip)).ContentType)
	})
}

func TestSaveBesideAnother(t *testing.T) {
	// The version becomes complete when the create is on its way.
	run(t, "complete at that moment", inBubble, func(t *testing.T, f *fakeGCS) {
		a, b := contentOf("a", 100), contentOf("b", 100)
		f.atFirst(on("b", "insert", ""), func() { require.NoError(t, a.save(t.Context(), f.storage("a"))) })
		requireKind(t, b.save(t.Context(), f.storage("b")), KindAlreadyExists)
		require.Len(t, requestsOf(f, "b"), 2)
		requireStored(t, f, a)
	})

	run(t, "finishes another", inBubble, func(t *testing.T, f *fakeGCS) {
		a, b := contentOf("a", 100), contentOf("b", 100)
		m := f.Machine("a")
		f.fault(fakegcs.CrashBefore, on("a", "patch", ""))
		go a.save(t.Context(), NewStorage(m.Bucket)) // until the test's context ends
		time.Sleep(50 * time.Millisecond)
		start := time.Now()
		requireKind(t, b.save(t.Context(), f.storage("b")), KindAlreadyExists)
		require.InDelta(t, DefaultStaleThreshold.Seconds(), time.Since(start).Seconds(), 3)
		requireStored(t, f, a)
	})

	// A saver that fails lets those who wait know; they need not wait until its
	// marker is stale.
	run(t, "takes over from failed", inCrowd, func(t *testing.T, f *fakeGCS) {
		a, b := contentOf("a", 100), contentOf("b", 100)
		wait := alongside(func() {
			requireKind(t, a.saveHalf(t.Context(), f.storage("a"), sleepReader(10*time.Second), iotest.ErrReader(io.ErrUnexpectedEOF)), KindUnexpected)
		})
		time.Sleep(50 * time.Millisecond)
		require.Less(t, timeOf(func() { require.NoError(t, b.save(t.Context(), f.storage("b"))) }), 13*time.Second)
		wait()
		requireStored(t, f, b)
	})

	// Two machines whose clocks are an hour apart take the version over from each other,
	// with ten calls each. None waits longer than the threshold after a change, and all end.
	run(t, "mutually stale", inCrowd, func(t *testing.T, f *fakeGCS) {
		const threshold = 8 * time.Second
		f.before(on("", "chunk", ""), func() { time.Sleep(3 * time.Second) })
		start := time.Now()
		requireOneWinner(t, f, 20, func(i int) (content, error) {
			c, s := contentOf(fmt.Sprint(i), 700<<10), f.storage(fmt.Sprint(i), WithChunkSize(256<<10), WithStaleThreshold(threshold))
			s.now = func() time.Time { return time.Now().Add(time.Duration(i%2) * time.Hour) }
			time.Sleep(time.Duration(i/2) * time.Second)
			err := c.save(t.Context(), s)
			var changed time.Time
			for _, r := range f.Log() {
				if r.Applied && on("", "", extMod)(&r) && r.End.After(changed) {
					changed = r.End
				}
			}
			require.Less(t, time.Since(changed), threshold+lastPoll)
			return c, err
		})
		require.Less(t, time.Since(start), 2*time.Minute)
	})

	// After a takeover another takes over and stores its objects. They are not leftovers.
	run(t, "leftovers of a successor", inCrowd, func(t *testing.T, f *fakeGCS) {
		leave(f, marked(givenUp, "other"), extMod)
		a, b := contentOf("a", 100), contentOf("b", 200)
		var tookOver atomic.Bool
		committed := make(chan error, 1)
		f.before(on("b", "patch", ""), func() { time.Sleep(5 * time.Second) }) // so that a has done what it may do by then
		f.before(but(on("a", "", ""), on("", "", extMod)), func() {
			if tookOver.CompareAndSwap(true, false) {
				go func() { committed <- b.save(context.WithoutCancel(t.Context()), ahead(f, "b")) }()
				time.Sleep(2 * time.Second)
			}
		})
		f.after(applied(on("a", "insert", extMod)), func() { tookOver.Store(true) })
		requireKind(t, a.save(t.Context(), f.storage("a")), KindAlreadyExists)
		require.NoError(t, <-committed)
		requireStored(t, f, b)
	})

	// A zip that can be sent only once looks at its name first, and then at the .mod. What
	// is there by then may be a successor's.
	for look := range 2 {
		run(t, fmt.Sprintf("once meets successor %d", look), inCrowd, func(t *testing.T, f *fakeGCS) {
			f.PutAt(objectName(extZip), nil, nil, time.Now().Add(-time.Hour))
			a, b, looks := contentOf("a", 100), contentOf("b", 200), 0
			f.before(on("a", "attrs", ""), func() {
				if looks++; looks == look+1 {
					require.NoError(t, b.save(t.Context(), ahead(f, "b")))
				}
			})
			requireKind(t, a.saveFrom(t.Context(), f.storage("a", WithChunkSize(1)), plain(bytes.NewReader(a.zip))), KindAlreadyExists)
			requireStored(t, f, b)
		})
	}
}

// Whatever is left of a version, a save replaces it or waits for it.
func TestSaveOverLeftovers(t *testing.T) {
	old := contentOf("old", 100)
	markers := map[string]func() map[string]string{
		"no marker":     func() map[string]string { return nil },
		"fresh":         func() map[string]string { return marked(time.Now(), "other") },
		"stale":         func() map[string]string { return marked(time.Now().Add(-3*time.Minute), "other") },
		"given up":      func() map[string]string { return marked(givenUp, "other") },
		"garbage":       func() map[string]string { return map[string]string{keyInProgress: "soon", keySaveID: "other"} },
		"2099":          func() map[string]string { return marked(time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC), "other") },
		"of old Athens": func() map[string]string { return map[string]string{keyInProgressOld: "true"} },
	}
	waits := map[string]bool{"fresh": true, "garbage": true, "2099": true, "of old Athens": true}
	for subset := range 8 {
		for name, marker := range markers {
			if subset&2 == 0 && name != "no marker" {
				continue
			}
			run(t, fmt.Sprintf("%03b %s", subset, name), inBubble, func(t *testing.T, f *fakeGCS) {
				f.putAs(old, testVersionName, time.Now(), marker(), nil, subsetOf(subset)...)
				time.Sleep(2 * time.Second) // or the fake counts a second write within one
				a := contentOf("a", 100)
				start := time.Now()
				err := a.save(t.Context(), f.storage("a"))
				if took := time.Since(start); waits[name] {
					require.Greater(t, took, DefaultStaleThreshold-3*time.Second)
					require.Less(t, took, DefaultStaleThreshold+3*time.Second)
				} else {
					require.Less(t, took, time.Second)
				}
				// Of old Athens' saves it is not known whose objects are whose.
				if subset == 7 && (name == "no marker" || name == "of old Athens") {
					requireKind(t, err, KindAlreadyExists)
					requireStored(t, f, old)
					return
				}
				require.NoError(t, err)
				requireStored(t, f, a)
			})
		}
	}
}

// A loser is told that the version exists when all of it does, and soon then. It
// asks less than once a second.
func TestSaveWaits(t *testing.T) {
	times := []time.Duration{100 * time.Millisecond, time.Second, 20 * time.Second, 30 * time.Second, time.Minute, 3 * time.Minute, 10 * time.Minute, time.Hour}
	forEach(t, inBubble, times, func(t *testing.T, f *fakeGCS, takes time.Duration) {
		a, b := contentOf("a", 100), contentOf("b", 100)
		var done time.Time
		wait := alongside(func() {
			require.NoError(t, a.saveSlowly(t.Context(), f.storage("a"), takes))
			done = time.Now()
		})
		time.Sleep(50 * time.Millisecond)
		start := time.Now()
		requireKind(t, b.save(t.Context(), f.storage("b")), KindAlreadyExists)
		wait()
		requireStored(t, f, a)
		waited, late := done.Sub(start), time.Since(done)
		require.LessOrEqual(t, late, 2*time.Second+40*time.Millisecond)
		if takes >= 20*time.Second {
			require.LessOrEqual(t, late, waited/10+40*time.Millisecond)
			require.Less(t, len(requestsOf(f, "b")), int(waited.Seconds()))
		}
		if takes == 30*time.Second {
			require.LessOrEqual(t, f.count(on("b", "list", "")), 24)
		}
	})
}

func requestsOf(f *fakeGCS, machine string) []fakegcs.Request {
	return slices.DeleteFunc(f.Log(), func(r fakegcs.Request) bool { return r.Machine != machine })
}

// sleepReader is empty, and takes its time to say so.
type sleepReader time.Duration

func (d sleepReader) Read([]byte) (int, error) {
	time.Sleep(time.Duration(d))
	return 0, io.EOF
}

// Of savers that start together, one stores the version, and all can read it.
func TestSaveContention(t *testing.T) {
	forEach(t, inBubble, []int{2, 3, 10}, func(t *testing.T, f *fakeGCS, n int) {
		requireOneWinner(t, f, n, func(i int) (content, error) {
			c, s := contentOf(fmt.Sprint(i), 100*i), f.storage(fmt.Sprint(i))
			err := c.save(t.Context(), s)
			requireExists(t, s, testVersion, true)
			return c, err
		})
	})
}

// requireOneWinner makes n saves at the same time. One stores the version, and the others
// say that it exists.
func requireOneWinner(t *testing.T, f *fakeGCS, n int, save func(i int) (content, error)) {
	t.Helper()
	winners := make(chan content, n)
	together(n, func(i int) {
		if c, err := save(i); err == nil {
			winners <- c
		} else {
			requireKind(t, err, KindAlreadyExists)
		}
	})
	require.Len(t, winners, 1)
	requireStored(t, f, <-winners)
}

// A reader that fails, wherever: its error is reachable, nothing of the zip is
// stored, and the next save need not wait. That the error is another save's, or an
// answer to another's request, means nothing.
func TestSaveReaderFails(t *testing.T) {
	broken := errors.New("broken")
	for _, size := range []int{0, 1, 1000, maxBuffered, maxBuffered + 1, 17 << 20} {
		for _, err := range []error{broken, io.ErrUnexpectedEOF, context.DeadlineExceeded, errExists, errFenced, errCommitted} {
			run(t, fmt.Sprintf("%v after %d", err, size), inBubble, func(t *testing.T, f *fakeGCS) {
				a, b := contentOf("a", size), contentOf("b", 100)
				s := f.storage("a")
				got := a.saveFrom(t.Context(), s, io.MultiReader(plain(bytes.NewReader(a.zip)), iotest.ErrReader(err)))
				requireKind(t, got, KindUnexpected)
				require.ErrorIs(t, got, err)
				require.Nil(t, f.Get(objectName(extZip)))
				if size <= maxBuffered {
					require.Empty(t, f.Log())
				} else {
					require.True(t, givesUp(&fakegcs.Request{Metadata: f.Get(objectName(extMod)).Metadata}))
				}
				time.Sleep(time.Second)
				require.Less(t, timeOf(func() { require.NoError(t, b.save(t.Context(), s)) }), time.Second)
				requireStored(t, f, b)
			})
		}
	}
}

func TestSaveEnds(t *testing.T) {
	// An .info that is refused ends the save, although its zip would trickle on.
	run(t, "info refused", inBubble, func(t *testing.T, f *fakeGCS) {
		f.atFirst(on("", "", extInfo), func() { f.Deny("storage.objects.create") })
		start := time.Now()
		err := contentOf("a", 0).saveFrom(t.Context(), f.storage("a", WithChunkSize(1)), io.LimitReader(trickle(time.Second), 1000))
		require.ErrorContains(t, err, "storage.objects.create")
		require.Less(t, time.Since(start), 5*time.Second)
	})

	run(t, "deadline", inBubble, func(t *testing.T, f *fakeGCS) {
		f.Put(objectName(extMod), nil, marked(time.Now(), "other"))
		err := contentOf("a", 1).save(within(t, 10*time.Second), f.storage("a"))
		requireKind(t, err, KindGatewayTimeout)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Zero(t, f.count(on("a", "attrs", "")), "it has nothing to give up")
	})

	// An object that is another each time is not replaced for ever.
	run(t, "refused again and again", inCrowd, func(t *testing.T, f *fakeGCS) {
		f.before(first(1000, on("", "insert", extInfo)), func() { f.Put(objectName(extInfo), nil, map[string]string{keySaveID: "other"}) })
		requireKind(t, contentOf("a", 100).save(t.Context(), f.storage("a")), KindUnexpected)
		require.Less(t, len(f.Log()), 60)
	})
}

func TestSaveMD5(t *testing.T) {
	for _, size := range []int{100, 2 << 20} {
		a := contentOf("a", size)
		right := md5.Sum(a.zip)
		for name, sum := range map[string][]byte{"right": right[:], "wrong": make([]byte, md5.Size), "nil": nil, "19 bytes": make([]byte, 19)} {
			run(t, fmt.Sprintf("%s of %d", name, size), inBubble, func(t *testing.T, f *fakeGCS) {
				s := f.storage("a")
				err := s.Save(t.Context(), testModule, testVersion, a.mod, bytes.NewReader(a.zip), sum, a.info)
				if name == "wrong" {
					requireKind(t, err, KindBadRequest)
					require.Nil(t, f.Get(objectName(extZip)))
					time.Sleep(time.Second)
					err = a.save(t.Context(), s)
				}
				require.NoError(t, err)
				requireStored(t, f, a)
			})
		}
	}
}

// Why a caller's context ended can be the error of another save.
func TestSaveEndsWithCause(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second, func() { cancel(errExists) })
		err := contentOf("a", 100).saveSlowly(ctx, f.storage("a"), time.Minute)
		requireKind(t, err, KindUnexpected)
		require.ErrorIs(t, err, context.Canceled)
		require.NoError(t, contentOf("b", 100).save(within(t, time.Second), f.storage("b")))
	})
}

// The context ends at each request, before or after it was applied: the error
// says so, and the next save need not wait.
func TestSaveContextEnds(t *testing.T) {
	for _, scene := range []string{"new", "taking over", "waiting"} {
		for n := range 12 {
			for _, fault := range []fakegcs.Fault{fakegcs.Hung, fakegcs.HungApplied} {
				run(t, fmt.Sprintf("%s %d %v", scene, n, fault), inBubble, func(t *testing.T, f *fakeGCS) {
					if scene != "new" {
						leave(f, marked(map[string]time.Time{"taking over": givenUp, "waiting": time.Now()}[scene], "other"), extMod)
					}
					a, b := contentOf("a", 100), contentOf("b", 100)
					ctx, cancel := context.WithCancel(within(t, time.Minute))
					defer cancel()
					var ended time.Time
					f.fault(fault, nth("a", n))
					f.before(nth("a", n), func() { time.AfterFunc(time.Second, func() { ended = time.Now(); cancel() }) })
					err := a.save(ctx, f.storage("a"))
					if ctx.Err() == nil {
						require.NoError(t, err) // there is no request n
						return
					}
					require.Less(t, time.Since(ended), time.Second)
					if err != nil { // or the last answer was the only one to be lost
						requireKind(t, err, KindUnexpected)
						require.ErrorIs(t, err, context.Canceled)
					}
					if scene == "waiting" {
						return
					}
					time.Sleep(time.Second)
					var next error
					require.Less(t, timeOf(func() { next = b.save(t.Context(), f.storage("b")) }), time.Second)
					if err == nil || next != nil {
						requireKind(t, next, KindAlreadyExists)
						requireStored(t, f, a)
					} else {
						requireStored(t, f, b)
					}
				})
			}
		}
	}
}

// A dead save's objects land when the new holder has already looked for leftovers, and then
// it finds them in its way. In the same moment, a zip that cannot be read again is lost. The
// version is given up, so that the next save need not wait.
func TestSaveLateObject(t *testing.T) {
	for _, c := range []struct {
		ext, op string // "" is any request
		size    int
	}{{extInfo, "", 100}, {extInfo, "", 2 << 20}, {extZip, "", 100}, {extZip, "", 2 << 20}, {extZip, "start", 2 << 20}} {
		run(t, fmt.Sprintf("%s %d %s", c.ext, c.size, c.op), inBubble, func(t *testing.T, f *fakeGCS) {
			a, s := contentOf("a", c.size), f.storage("a", WithChunkSize(faultChunk))
			f.atFirst(on("", c.op, c.ext), func() {
				f.Put(objectName(c.ext), []byte("late"), map[string]string{keySaveID: "other"})
				time.Sleep(time.Second) // past the limit on writes of one name
			})
			zip := io.Reader(bytes.NewReader(a.zip))
			if c.op == "start" { // the name of a zip that can be sent only once has been looked at
				requireKind(t, a.saveFrom(t.Context(), s, plain(bytes.NewReader(a.zip))), KindUnexpected)
				time.Sleep(time.Second)
				zip = plain(zip)
			}
			require.NoError(t, a.saveFrom(t.Context(), s, zip))
			requireStored(t, f, a)
		})
	}
}

// A refusal that is none of the preconditions' doing ends the save.
func TestSaveRefusedForOtherReasons(t *testing.T) {
	for at, most := range map[string]int{"insert mod": 40, "patch mod": 40, "insert info": 10, "insert mod after one hung": 100} {
		run(t, at, inBubble, func(t *testing.T, f *fakeGCS) {
			op, ext := strings.Fields(at)[0], strings.Fields(at)[1]
			if ext == extInfo {
				leave(f, nil, extInfo)
				time.Sleep(time.Second)
			}
			f.fault(fakegcs.PreconditionFailed, on("", op, ext))
			if strings.HasSuffix(at, "hung") {
				f.fault(fakegcs.Hung, first(1, on("", op, ext)))
			}
			err := contentOf("a", 100).save(t.Context(), f.storage("a"))
			requireKind(t, err, KindUnexpected)
			require.True(t, isPreconditionFailed(err))
			require.Less(t, len(f.Log()), most)
		})
	}
}

// A delete in the middle of a save: the save says so.
func TestSaveDeleted(t *testing.T) {
	forEach(t, inCrowd, []int{1, 2, 3}, func(t *testing.T, f *fakeGCS, n int) {
		a := contentOf("a", 100)
		f.atFirst(nth("a", n), func() {
			time.Sleep(time.Second)
			require.NoError(t, f.storage("b").Delete(t.Context(), testModule, testVersion))
		})
		requireFenced(t, a.save(t.Context(), f.storage("a")))
		require.NoError(t, a.save(t.Context(), f.storage("a")))
		requireStored(t, f, a)
	})
}

// Calls that wait for the same save do not all ask at the same moments.
func TestPollsAreJittered(t *testing.T) {
	s := NewStorage(newFakeGCS(t).Machine("m").Bucket)
	for _, waited := range []time.Duration{0, time.Second, time.Minute} {
		pauses := map[time.Duration]bool{}
		for range 100 {
			pauses[s.pollPause(waited)] = true
		}
		require.Greater(t, len(pauses), 50)
	}
}
