package gcs

import (
	"bytes"
	"context"
	"crypto/md5"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"cloud.google.com/go/storage"
	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

const pseudoVersion = "v0.0.0-20260102150405-0123456789ab"

// stashFunc is a Stasher made of a function.
type stashFunc func(ctx context.Context, module, version string) (string, error)

func (f stashFunc) Stash(ctx context.Context, module, version string) (string, error) {
	return f(ctx, module, version)
}

// origin is the version control system that a fleet fetches from.
type origin struct {
	takes   time.Duration // for one fetch
	resolve map[string]string
	fail    func(call int) error // of the n-th fetch, nil for none

	mu    sync.Mutex
	calls map[string]int // by version asked for
	now   int            // fetches under way,
	most  int            // and the most there ever were
}

// stasher fetches for a Storage, as Athens' own does, and stores what it fetched.
func (o *origin) stasher(s *Storage) Stasher {
	return stashFunc(func(ctx context.Context, module, vers string) (string, error) {
		o.mu.Lock()
		if o.calls == nil {
			o.calls = map[string]int{}
		}
		o.calls[vers]++
		n := o.total()
		o.now++
		o.most = max(o.most, o.now)
		o.mu.Unlock()
		defer func() {
			o.mu.Lock()
			o.now--
			o.mu.Unlock()
		}()
		if err := sleep(ctx, o.takes); err != nil {
			return "", err
		}
		if o.fail != nil {
			if err := o.fail(n); err != nil {
				return "", err
			}
		}
		if resolved, ok := o.resolve[vers]; ok {
			vers = resolved
		}
		if err := stashSave(ctx, s, module, vers); err != nil {
			return "", athensLike{Op: "stasher.Stash", Err: err}
		}
		return vers, nil
	})
}

// so returns how many fetches there were so far.
func (o *origin) so() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.total()
}

// total is called with mu held, or when all fetches are done.
func (o *origin) total() int {
	n := 0
	for _, calls := range o.calls {
		n += calls
	}
	return n
}

func stashSave(ctx context.Context, s *Storage, module, vers string) error {
	c := contentOf(vers, 100)
	sum := md5.Sum(c.zip)
	return s.Save(ctx, module, vers, c.mod, bytes.NewReader(c.zip), sum[:], c.info)
}

// athensLike is an error of Athens, of a version that had no Unwrap.
type athensLike struct {
	Kind     int
	Op       string
	Module   athensName
	Version  athensName
	Err      error
	Severity int
}

type athensName string

func (e athensLike) Error() string { return e.Op }

// athensError is one of today's.
type athensError struct{ athensLike }

func (e athensError) Unwrap() error { return e.Err }

// replica is one machine of a fleet.
type replica struct {
	*fakegcs.Machine
	s *Storage
	Stasher
}

func newReplica(f *fakeGCS, o *origin, name string, opts ...Option) replica {
	m := f.Machine(name)
	s := newStorage(m.Bucket, opts...)
	return replica{m, s, s.SingleFlight(o.stasher(s))}
}

func newFleet(f *fakeGCS, o *origin, n int, opts ...Option) []replica {
	fleet := make([]replica, n)
	for i := range fleet {
		fleet[i] = newReplica(f, o, fmt.Sprint(i), opts...)
	}
	return fleet
}

type contextKey struct{}

func TestSingleFlightShares(t *testing.T) {
	for _, vers := range []string{testVersion, "master"} {
		t.Run(vers, func(t *testing.T) {
			inFleet(t, func(t *testing.T, f *fakeGCS) {
				calls := 0
				s := f.storage("a")
				stasher := s.SingleFlight(stashFunc(func(ctx context.Context, module, v string) (string, error) {
					calls++
					require.Equal(t, testModule, module)
					require.Equal(t, vers, v)
					require.Equal(t, 0, ctx.Value(contextKey{})) // of the first who came
					time.Sleep(5 * time.Second)
					return pseudoVersion, nil
				}))
				var group sync.WaitGroup
				for i := range 20 {
					group.Go(func() {
						time.Sleep(time.Duration(i) * 100 * time.Millisecond)
						saved, err := stasher.Stash(context.WithValue(t.Context(), contextKey{}, i), testModule, vers)
						require.NoError(t, err)
						require.Equal(t, pseudoVersion, saved)
					})
				}
				group.Wait()
				require.Equal(t, 1, calls)
			})
		})
	}
}

// Neither another version, nor another module, nor a call after the last is the
// same call.
func TestSingleFlightSharesNoMore(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		var mu sync.Mutex
		calls := map[string]int{}
		s := f.storage("a")
		stasher := s.SingleFlight(stashFunc(func(ctx context.Context, module, v string) (string, error) {
			mu.Lock()
			defer mu.Unlock()
			calls[module+"@"+v]++
			return v, nil
		}))
		for range 2 {
			var group sync.WaitGroup
			for _, v := range []version{{"a", "v1.0.0"}, {"a", "v1.0.1"}, {"b", "v1.0.0"}, {"a", "master"}, {"b", "master"}} {
				group.Go(func() {
					saved, err := stasher.Stash(t.Context(), v.module, v.version)
					require.NoError(t, err)
					require.Equal(t, v.version, saved)
				})
			}
			group.Wait()
		}
		require.Equal(t, map[string]int{"a@v1.0.0": 2, "a@v1.0.1": 2, "b@v1.0.0": 2, "a@master": 2, "b@master": 2}, calls)
	})
}

// A caller, the first or another, that has had enough leaves at once, and alone.
func TestSingleFlightCallerLeaves(t *testing.T) {
	for _, vers := range []string{testVersion, "master"} {
		for leaver := range 3 {
			t.Run(fmt.Sprint(vers, leaver), func(t *testing.T) {
				inFleet(t, func(t *testing.T, f *fakeGCS) {
					o := &origin{takes: 5 * time.Second, resolve: map[string]string{"master": pseudoVersion}}
					a := newReplica(f, o, "a")
					want := vers
					if vers == "master" {
						want = pseudoVersion
					}
					start := time.Now()
					var group sync.WaitGroup
					for i := range 3 {
						group.Go(func() {
							ctx := t.Context()
							if i == leaver {
								var cancel context.CancelFunc
								ctx, cancel = context.WithTimeout(ctx, 2*time.Second)
								defer cancel()
							}
							time.Sleep(time.Duration(i) * time.Millisecond)
							saved, err := a.Stash(ctx, testModule, vers)
							if i == leaver {
								require.Equal(t, 2*time.Second, time.Since(start))
								require.ErrorIs(t, err, context.DeadlineExceeded)
								require.Equal(t, KindGatewayTimeout, Kind(err))
								require.Empty(t, saved)
								return
							}
							require.NoError(t, err)
							require.Equal(t, want, saved)
						})
					}
					group.Wait()
					require.Equal(t, 1, o.total())
					requireComplete(t, f, testModule, want)
				})
			})
		}
	}
}

// When the last caller has left, next is told, the claim is given back though
// nobody waits for that, and who comes then starts anew.
func TestSingleFlightLastLeaves(t *testing.T) {
	for _, vers := range []string{testVersion, "master"} {
		t.Run(vers, func(t *testing.T) {
			inFleet(t, func(t *testing.T, f *fakeGCS) {
				var told time.Duration
				calls := 0
				start := time.Now()
				stasher := f.storage("a").SingleFlight(stashFunc(func(ctx context.Context, module, v string) (string, error) {
					if calls++; calls == 2 {
						return v, nil
					}
					<-ctx.Done()
					told = time.Since(start)
					require.ErrorIs(t, ctx.Err(), context.Canceled)
					time.Sleep(3 * time.Second) // it takes its time to end
					return "", ctx.Err()
				}))
				var group sync.WaitGroup
				for i := 1; i <= 3; i++ {
					group.Go(func() {
						ctx, cancel := context.WithCancel(t.Context())
						time.AfterFunc(time.Duration(i)*time.Second, cancel)
						_, err := stasher.Stash(ctx, testModule, vers)
						require.ErrorIs(t, err, context.Canceled)
						require.Equal(t, KindUnexpected, Kind(err))
						require.Equal(t, time.Duration(i)*time.Second, time.Since(start))
					})
				}
				group.Wait()
				synctest.Wait()
				require.Equal(t, 3*time.Second, told)
				saved, err := stasher.Stash(t.Context(), testModule, vers)
				require.NoError(t, err)
				require.Equal(t, vers, saved)
				require.Equal(t, 2, calls)
				require.Less(t, time.Since(start), 10*time.Second)
				time.Sleep(5 * time.Second)
			})
		})
	}
}

// A caller whose context has ended is not worth a request.
func TestSingleFlightEndedContext(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		o := &origin{}
		a := newReplica(f, o, "a")
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		for _, vers := range []string{testVersion, "master"} {
			_, err := a.Stash(ctx, testModule, vers)
			require.ErrorIs(t, err, context.Canceled)
			var e *Error
			require.ErrorAs(t, err, &e)
			require.Equal(t, Error{Op: "gcs.Stash", Kind: KindUnexpected, Module: testModule, Version: vers, Err: e.Err}, *e)
		}
		synctest.Wait()
		require.Zero(t, o.total())
		require.Empty(t, f.Log())
	})
}

// What is no version of a module cannot be looked for in the bucket.
func TestSingleFlightBadRequest(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		o := &origin{}
		_, err := newReplica(f, o, "a").Stash(t.Context(), "a//b", testVersion)
		require.Equal(t, KindBadRequest, Kind(err))
		require.Zero(t, o.total())
		require.Empty(t, f.Log())
	})
}

func TestSingleFlightComplete(t *testing.T) {
	for name, mark := range map[string]map[string]string{
		"complete":   nil,
		"unfinished": marked(givenUp, "dead"),
		"old Athens": {keyInProgressOld: "true"},
	} {
		t.Run(name, func(t *testing.T) {
			inFleet(t, func(t *testing.T, f *fakeGCS) {
				for _, ext := range []string{extInfo, extZip} {
					f.Put(objectName(ext), nil, map[string]string{keySaveID: "dead"})
				}
				f.Put(objectName(extMod), nil, mark)
				time.Sleep(DefaultStaleThreshold)
				o := &origin{}
				a := newReplica(f, o, "a")
				saved, err := a.Stash(t.Context(), testModule, testVersion)
				require.NoError(t, err)
				require.Equal(t, testVersion, saved)
				require.Zero(t, o.total())
				if mark == nil {
					require.Len(t, f.Log(), 1)
				} else {
					require.Len(t, f.Log(), 2)
				}
				ok, err := a.s.Exists(t.Context(), testModule, testVersion)
				require.NoError(t, err)
				require.True(t, ok)
			})
		})
	}
}

// What is left of a version, if no save is at work on it, is fetched and healed.
func TestSingleFlightHeals(t *testing.T) {
	for name, objects := range map[string]map[string]map[string]string{
		"partial":   {extMod: nil, extInfo: nil},
		"given up":  {extMod: marked(givenUp, "dead")},
		"abandoned": {extMod: marked(givenUp, "dead"), extZip: nil, extInfo: nil},
	} {
		t.Run(name, func(t *testing.T) {
			inFleet(t, func(t *testing.T, f *fakeGCS) {
				for ext, metadata := range objects {
					f.Put(objectName(ext), []byte("old"), metadata)
				}
				time.Sleep(2 * time.Second)
				o := &origin{}
				saved, err := newReplica(f, o, "a").Stash(t.Context(), testModule, testVersion)
				require.NoError(t, err)
				require.Equal(t, testVersion, saved)
				require.Equal(t, 1, o.total())
				requireComplete(t, f, testModule, testVersion)
			})
		})
	}
}

// A machine that saves without a claim, as Athens' pull of a query does, is
// waited for all the same: until it is done, or fails, or is dead.
func TestSingleFlightWaitsForSave(t *testing.T) {
	for _, test := range []struct {
		name         string
		zip          io.Reader
		crash        bool
		calls        int
		after, until time.Duration
	}{
		{"done", bytes.NewReader(contentOf(testVersion, 100).zip), false, 0, 20 * time.Second, 23 * time.Second},
		{"fails", iotest.ErrReader(io.ErrUnexpectedEOF), false, 1, 20 * time.Second, 23 * time.Second},
		{"dies", bytes.NewReader(nil), true, 1, DefaultStaleThreshold, DefaultStaleThreshold + 4*time.Second},
	} {
		t.Run(test.name, func(t *testing.T) {
			inFleet(t, func(t *testing.T, f *fakeGCS) {
				var group sync.WaitGroup
				saver := f.Machine("saver")
				ctx, cancel := context.WithCancel(t.Context())
				group.Go(func() {
					zip := io.MultiReader(sleepReader(20*time.Second), test.zip)
					c := contentOf(testVersion, 100)
					newStorage(saver.Bucket).Save(ctx, testModule, testVersion, c.mod, zip, nil, c.info)
				})
				time.Sleep(time.Second)
				if test.crash {
					saver.Crash()
				}
				start := time.Now()
				o := &origin{}
				saved, err := newReplica(f, o, "a").Stash(t.Context(), testModule, testVersion)
				require.NoError(t, err)
				require.Equal(t, testVersion, saved)
				require.Equal(t, test.calls, o.total())
				require.Greater(t, time.Since(start), test.after-2*time.Second)
				require.Less(t, time.Since(start), test.until)
				requireComplete(t, f, testModule, testVersion)
				cancel()
				group.Wait()
				time.Sleep(time.Minute)
			})
		})
	}
}

// A save that begins just before the claim is made is waited for without the
// claim, which would have to be renewed.
func TestSingleFlightSaveComesBetween(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		var group sync.WaitGroup
		var begun atomic.Bool
		f.onRequest(func(r *fakegcs.Request) fakegcs.Fault {
			if r.Op == "insert" && r.Object == objectName(extLock) && begun.CompareAndSwap(false, true) {
				group.Go(func() {
					c := contentOf(testVersion, 100)
					zip := io.MultiReader(sleepReader(20*time.Second), bytes.NewReader(c.zip))
					require.NoError(t, c.saveFrom(t.Context(), f.storage("saver"), zip))
				})
				time.Sleep(time.Second)
			}
			return fakegcs.NoFault
		})
		o := &origin{}
		group.Go(func() {
			saved, err := newReplica(f, o, "a").Stash(t.Context(), testModule, testVersion)
			require.NoError(t, err)
			require.Equal(t, testVersion, saved)
		})
		time.Sleep(5 * time.Second)
		require.True(t, begun.Load())
		require.Empty(t, locks(f))
		group.Wait()
		require.Zero(t, o.total())
	})
}

// An answer that another has saved the version is success, and says which.
func TestSingleFlightAlreadyExists(t *testing.T) {
	own := &Error{Op: "gcs.Save", Kind: KindAlreadyExists, Module: testModule, Version: pseudoVersion, Err: errExists}
	athens := athensError{athensLike{Op: "gcs.Save", Kind: KindAlreadyExists, Module: testModule, Version: pseudoVersion, Err: own}}
	old := athensLike{Op: "gcs.Save", Kind: KindAlreadyExists, Version: pseudoVersion, Err: errors.New("exists")}
	for _, test := range []struct {
		name     string
		err      error
		resolved string // "" for the version that was asked for
	}{
		{"own", own, pseudoVersion},
		{"wrapped", fmt.Errorf("stash: %w", fmt.Errorf("save: %w", own)), pseudoVersion},
		{"joined", errors.Join(io.EOF, own), pseudoVersion},
		{"joined first", errors.Join(own, io.EOF), pseudoVersion},
		{"two wrapped", fmt.Errorf("%w: %w", io.EOF, own), pseudoVersion},
		{"of Athens", athens, pseudoVersion},
		{"of Athens, a pointer", &athens, pseudoVersion},
		{"of Athens, wrapped by it", athensError{athensLike{Op: "a", Err: athensError{athensLike{Op: "b", Version: "master", Err: athens}}}}, pseudoVersion},
		{"of Athens, asked for master", athensError{athensLike{Op: "a", Kind: KindAlreadyExists, Version: "master", Err: athens}}, pseudoVersion},
		{"of Athens, kind of the wrapper", athensError{athensLike{Op: "a", Kind: KindAlreadyExists, Version: pseudoVersion, Err: athensError{athensLike{Op: "b", Err: io.EOF}}}}, pseudoVersion},
		{"of Athens, another kind outside", athensError{athensLike{Op: "a", Kind: KindUnexpected, Err: own}}, pseudoVersion},
		{"of old Athens", old, pseudoVersion},
		{"of old Athens, wrapped by it", athensLike{Op: "a", Err: athensLike{Op: "b", Version: "master", Err: old}}, pseudoVersion},
		{"of old Athens, a pointer", &athensLike{Op: "a", Err: &old}, pseudoVersion},
		{"of old Athens, around ours", athensLike{Op: "a", Version: "master", Err: own}, pseudoVersion},
		{"of all", fmt.Errorf("x: %w", athensLike{Op: "a", Err: errors.Join(io.EOF, athensError{athensLike{Op: "b", Err: own}})}), pseudoVersion},
		{"of the wrapper alone", athensLike{Op: "a", Version: pseudoVersion, Err: athensLike{Op: "b", Kind: KindAlreadyExists, Err: io.EOF}}, pseudoVersion},
		{"of no version", athensError{athensLike{Op: "a", Kind: KindAlreadyExists, Err: io.EOF}}, ""},
	} {
		for _, vers := range []string{"master", testVersion} {
			t.Run(test.name+" of "+vers, func(t *testing.T) {
				inFleet(t, func(t *testing.T, f *fakeGCS) {
					stasher := f.storage("a").SingleFlight(stashFunc(func(context.Context, string, string) (string, error) {
						return "", test.err
					}))
					saved, err := stasher.Stash(t.Context(), testModule, vers)
					require.NoError(t, err)
					want := test.resolved
					if want == "" {
						want = vers
					}
					require.Equal(t, want, saved)
				})
			})
		}
	}
}

// The whole way: two replicas are asked for a branch, and fetch it both.
func TestSingleFlightResolves(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		o := &origin{takes: time.Second, resolve: map[string]string{"master": pseudoVersion}}
		var group sync.WaitGroup
		for _, r := range newFleet(f, o, 5) {
			for range 3 {
				group.Go(func() {
					saved, err := r.Stash(t.Context(), testModule, "master")
					require.NoError(t, err)
					require.Equal(t, pseudoVersion, saved)
				})
			}
		}
		group.Wait()
		require.Equal(t, 5, o.total())
		requireComplete(t, f, testModule, pseudoVersion)
	})
}

// Any other error is passed on as it is, with what came beside it.
func TestSingleFlightErrors(t *testing.T) {
	for name, want := range map[string]error{
		"plain":               errors.New("git: not found"),
		"own":                 &Error{Kind: KindNotFound, Err: io.EOF},
		"wrapped":             fmt.Errorf("fetch: %w", &Error{Kind: KindRateLimit}),
		"of Athens":           athensError{athensLike{Op: "a", Kind: KindNotFound, Err: io.EOF}},
		"of old Athens":       athensLike{Op: "a", Kind: KindBadRequest, Err: athensLike{Op: "b", Kind: KindUnexpected}},
		"of another module":   fmt.Errorf("a: %w", &Error{Kind: KindAlreadyExists, Module: "other", Version: testVersion}),
		"of Athens' other":    athensError{athensLike{Op: "a", Kind: KindAlreadyExists, Module: "other", Version: testVersion, Err: io.EOF}},
		"of a version":        athensError{athensLike{Op: "a", Kind: KindNotFound, Version: "v1", Err: athensLike{Version: "v1"}}},
		"of Athens, no cause": athensError{athensLike{Op: "a", Kind: KindNotFound}},
		"cancelled":           context.Canceled,
		"says so by words":    errors.New("409 already exists"),
		"a kind of another":   kindError{Kind: "409"},
		"embeds nil":          nilError{},
		"embeds nil, wrapped": athensLike{Op: "a", Err: nilError{}},
		"an answer of GCS":    storage.ErrObjectNotExist,
	} {
		for _, vers := range []string{"master", testVersion} {
			t.Run(name+" of "+vers, func(t *testing.T) {
				inFleet(t, func(t *testing.T, f *fakeGCS) {
					stasher := f.storage("a").SingleFlight(stashFunc(func(context.Context, string, string) (string, error) {
						return "beside", want
					}))
					saved, err := stasher.Stash(t.Context(), testModule, vers)
					require.True(t, err == want, "%v", err)
					require.Equal(t, "beside", saved)
				})
			})
		}
	}
}

type kindError struct{ Kind string }

func (e kindError) Error() string { return e.Kind }

type nilError struct{ *athensLike }

func (nilError) Error() string { return "failed" }

// A version beside an error that names none is the resolved one.
func TestSingleFlightAlreadyExistsBeside(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		stasher := f.storage("a").SingleFlight(stashFunc(func(context.Context, string, string) (string, error) {
			return pseudoVersion, athensLike{Op: "a", Kind: KindAlreadyExists, Err: io.EOF}
		}))
		saved, err := stasher.Stash(t.Context(), testModule, "master")
		require.NoError(t, err)
		require.Equal(t, pseudoVersion, saved)
	})
}

// A next that never returns, because it ended its goroutine, holds up nobody,
// now or later.
func TestSingleFlightNextExits(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		stasher := f.storage("a").SingleFlight(stashFunc(func(context.Context, string, string) (string, error) {
			runtime.Goexit()
			return "", nil
		}))
		for _, vers := range []string{"master", testVersion, testVersion} {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			_, err := stasher.Stash(ctx, testModule, vers)
			require.Error(t, err)
			require.NoError(t, ctx.Err())
			require.Equal(t, KindUnexpected, Kind(err))
		}
	})
}

// Another machine cannot know what a query resolves to: the bucket is not asked.
func TestSingleFlightQueries(t *testing.T) {
	for query, isOne := range map[string]bool{
		"latest": true, "upgrade": true, "master": true, "v1": true, "v1.2": true, "feature/x": true, "0123456789ab": true,
		"1.2.3": true, "v1.2.3.4": true, "v01.2.3": true, "": true, ">=v1.2.3": true,
		"v1.2.3": false, "v1.2.3-rc.1": false, "v2.0.0+incompatible": false, "v1.2.3-pre+meta": false, pseudoVersion: false,
	} {
		t.Run(query, func(t *testing.T) {
			inFleet(t, func(t *testing.T, f *fakeGCS) {
				calls := 0
				stasher := f.storage("a").SingleFlight(stashFunc(func(context.Context, string, string) (string, error) {
					calls++
					time.Sleep(time.Second)
					return testVersion, nil
				}))
				var group sync.WaitGroup
				for range 10 {
					group.Go(func() {
						saved, err := stasher.Stash(t.Context(), testModule, query)
						require.NoError(t, err)
						require.Equal(t, testVersion, saved)
					})
				}
				group.Wait()
				require.Equal(t, 1, calls)
				if isOne {
					require.Empty(t, f.Log())
				} else {
					require.NotEmpty(t, f.Log())
				}
			})
		})
	}
}

// A fleet of replicas that miss the same versions at the same moment fetches
// each of them once.
func TestSingleFlightFleet(t *testing.T) {
	table := "versions  replicas  callers  fetches  saves  requests  a caller, a second\n"
	for _, versions := range []int{1, 4} {
		for _, n := range []int{1, 2, 8, 32} {
			t.Run(fmt.Sprintf("%d of %d", n, versions), func(t *testing.T) {
				inFleet(t, func(t *testing.T, f *fakeGCS) {
					o := &origin{takes: 3 * time.Second}
					start, callers := time.Now(), 0
					var group sync.WaitGroup
					for _, r := range newFleet(f, o, n) {
						for v := range versions {
							for range 2 {
								callers++
								group.Go(func() {
									vers := fmt.Sprintf("v1.0.%d", v)
									saved, err := r.Stash(t.Context(), testModule, vers)
									require.NoError(t, err)
									require.Equal(t, vers, saved)
									requireComplete(t, f, testModule, vers)
								})
							}
						}
					}
					group.Wait()
					took := time.Since(start)
					require.Less(t, took, 6*time.Second)
					for v := range versions {
						require.Equal(t, 1, o.calls[fmt.Sprintf("v1.0.%d", v)])
					}
					saves := 0
					for _, r := range f.Log() {
						if strings.HasSuffix(r.Object, ".zip") && r.Applied {
							saves++
						}
					}
					require.Equal(t, versions, saves)
					table += fmt.Sprintf("%8d %9d %8d %8d %6d %9d %19.2f\n", versions, n, callers, o.total(), saves,
						len(f.Log()), float64(len(f.Log()))/float64(n*versions)/took.Seconds())
				})
			})
		}
	}
	t.Log("\n" + table)
}

// Replicas on slow lines, or that come one after another, or with wrong clocks
// of moderate error, do not fetch twice either.
func TestSingleFlightFleetLate(t *testing.T) {
	for _, latency := range []time.Duration{time.Millisecond, 300 * time.Millisecond} {
		for _, spread := range []time.Duration{10 * time.Millisecond, time.Second} {
			t.Run(fmt.Sprint(latency, spread), func(t *testing.T) {
				inFleet(t, func(t *testing.T, f *fakeGCS) {
					f.SetLatency(latency)
					o := &origin{takes: 3 * time.Second}
					var group sync.WaitGroup
					for i, r := range newFleet(f, o, 8) {
						skew := time.Duration(i-4) * 10 * time.Second
						r.s.now = func() time.Time { return time.Now().Add(skew) }
						group.Go(func() {
							time.Sleep(time.Duration(i) * spread)
							_, err := r.Stash(t.Context(), testModule, testVersion)
							require.NoError(t, err)
						})
					}
					group.Wait()
					require.Equal(t, 1, o.total())
				})
			})
		}
	}
}

// When the holder fails, its caller is told why, and one of the others is next,
// as soon as it looks again.
func TestSingleFlightHolderFails(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		gone := errors.New("git: connection reset")
		o := &origin{takes: 5 * time.Second, fail: func(call int) error {
			if call == 1 {
				return gone
			}
			return nil
		}}
		start, failed := time.Now(), 0
		var mu sync.Mutex
		var group sync.WaitGroup
		for _, r := range newFleet(f, o, 8) {
			group.Go(func() {
				_, err := r.Stash(t.Context(), testModule, testVersion)
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					require.True(t, err == gone)
					failed++
				}
			})
		}
		group.Wait()
		require.Equal(t, 1, failed)
		require.Equal(t, 2, o.total())
		require.Less(t, time.Since(start), 15*time.Second)
		requireComplete(t, f, testModule, testVersion)
	})
}

// Whatever fails, every caller gets the answer of a fetch, and no refusal of a
// claim, however many others were quicker.
func TestSingleFlightAllFail(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		f.SetLatency(500 * time.Millisecond) // so that many are refused at once
		gone := errors.New("git: repository not found")
		o := &origin{fail: func(int) error { return gone }}
		var group sync.WaitGroup
		for _, r := range newFleet(f, o, 24) {
			group.Go(func() {
				_, err := r.Stash(t.Context(), testModule, testVersion)
				require.True(t, err == gone, "%v", err)
			})
		}
		group.Wait()
		require.Equal(t, 24, o.total())
	})
}

// A caller that has waited the threshold while holders fail one after another
// waits no more. The others it leaves alone.
func TestSingleFlightHoldersFail(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		const threshold = 30 * time.Second
		gone := errors.New("git: timeout")
		o := &origin{takes: 20 * time.Second, fail: func(int) error { return gone }}
		start := time.Now()
		var group sync.WaitGroup
		for _, r := range newFleet(f, o, 8, WithStaleThreshold(threshold)) {
			group.Go(func() {
				_, err := r.Stash(t.Context(), testModule, testVersion)
				require.True(t, err == gone, "%v", err)
				require.Less(t, time.Since(start), threshold+2*o.takes)
			})
		}
		time.Sleep(threshold - 5*time.Second)
		require.Equal(t, 2, o.so())
		group.Wait()
		require.Equal(t, 8, o.so())
	})
}

// Until then, there is one holder at a time, however many have failed.
func TestSingleFlightHoldersFailQuickly(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		gone := errors.New("git: not found")
		o := &origin{takes: 5 * time.Second, fail: func(int) error { return gone }}
		var group sync.WaitGroup
		for _, r := range newFleet(f, o, 6) {
			group.Go(func() {
				_, err := r.Stash(t.Context(), testModule, testVersion)
				require.True(t, err == gone, "%v", err)
			})
		}
		group.Wait()
		require.Equal(t, 6, o.total())
		require.Equal(t, 1, o.most)
	})
}

// One holder that fails late is no reason for all others to fetch at once: the
// next one may be at work for longer than what is left of the threshold.
func TestSingleFlightHolderFailsLate(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		gone := errors.New("git: timeout")
		o := &origin{takes: DefaultStaleThreshold - 10*time.Second, fail: func(call int) error {
			if call == 1 {
				return gone
			}
			return nil
		}}
		var group sync.WaitGroup
		for _, r := range newFleet(f, o, 4) {
			group.Go(func() {
				if _, err := r.Stash(t.Context(), testModule, testVersion); err != nil {
					require.True(t, err == gone, "%v", err)
				}
			})
		}
		group.Wait()
		require.Equal(t, 2, o.total())
	})
}

// A holder that dies in the middle of its fetch delays the others by the
// threshold, and by the time until they look again.
func TestSingleFlightHolderCrashes(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		o := &origin{takes: 5 * time.Second}
		fleet := newFleet(f, o, 8)
		ctx, cancel := context.WithCancel(t.Context())
		var group sync.WaitGroup
		group.Go(func() {
			_, err := fleet[0].Stash(ctx, testModule, testVersion)
			require.Error(t, err)
		})
		time.Sleep(time.Second)
		fleet[0].Crash()
		start := time.Now()
		var others sync.WaitGroup
		for _, r := range fleet[1:] {
			others.Go(func() {
				saved, err := r.Stash(t.Context(), testModule, testVersion)
				require.NoError(t, err)
				require.Equal(t, testVersion, saved)
			})
		}
		others.Wait()
		t.Logf("8 replicas, of which the holder crashed: %d fetches, done after %v", o.total(), time.Since(start))
		require.Greater(t, time.Since(start), DefaultStaleThreshold-2*time.Second)
		require.Less(t, time.Since(start), DefaultStaleThreshold+2*o.takes)
		requireComplete(t, f, testModule, testVersion)
		require.Empty(t, locks(f))
		require.Equal(t, 2, o.total()) // of the dead one and of one more
		cancel()
		group.Wait()
	})
}

// A fetch that takes longer than the threshold keeps its claim.
func TestSingleFlightSlowHolder(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		f.EnforceRates(true)
		o := &origin{takes: 10 * time.Minute}
		var group sync.WaitGroup
		for _, r := range newFleet(f, o, 2) {
			group.Go(func() {
				_, err := r.Stash(t.Context(), testModule, testVersion)
				require.NoError(t, err)
			})
		}
		group.Wait()
		require.Equal(t, 1, o.total())
		renewed := 0
		for _, r := range f.Log() {
			require.NotEqual(t, 429, r.Status)
			if r.Op == "patch" && r.Object == objectName(extLock) && r.Applied {
				renewed++
			}
		}
		require.InDelta(t, 20, renewed, 1)
	})
}

// A holder that was thought dead goes on, and does no harm to its successor.
func TestSingleFlightSleeperWakes(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		o := &origin{takes: 5 * time.Minute}
		fleet := newFleet(f, o, 2)
		var group sync.WaitGroup
		for i, r := range fleet {
			group.Go(func() {
				time.Sleep(time.Duration(i) * time.Second)
				saved, err := r.Stash(t.Context(), testModule, testVersion)
				require.NoError(t, err)
				require.Equal(t, testVersion, saved)
			})
		}
		time.Sleep(2 * time.Second)
		fleet[0].Pause()
		time.Sleep(4 * time.Minute)
		holder := f.Get(objectName(extLock))
		fleet[0].Resume()
		time.Sleep(90 * time.Second) // the first is done
		requireComplete(t, f, testModule, testVersion)
		now := f.Get(objectName(extLock))
		require.NotNil(t, now)
		require.Equal(t, holder.Generation, now.Generation)
		group.Wait()
		require.Equal(t, 2, o.total())
	})
}

// A lock that nobody renews any more is taken over, at once if it is stale, and
// one that cannot be read, or is from the future, when GCS says it is.
func TestSingleFlightStaleLock(t *testing.T) {
	for name, test := range map[string]struct {
		metadata map[string]string
		waits    bool
	}{
		"stale":     {marked(time.Now().Add(-time.Hour), "dead"), false},
		"given up":  {marked(givenUp, "dead"), false},
		"no marker": {nil, false},
		"garbage":   {map[string]string{keyInProgress: "soon"}, true},
		"2099":      {marked(time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC), "dead"), true},
	} {
		t.Run(name, func(t *testing.T) {
			inFleet(t, func(t *testing.T, f *fakeGCS) {
				if name == "stale" { // by the clock of the bubble
					test.metadata = marked(time.Now().Add(-time.Hour), "dead")
				}
				f.Put(objectName(extLock), nil, test.metadata)
				time.Sleep(2 * time.Second)
				o := &origin{}
				start := time.Now()
				_, err := newReplica(f, o, "a").Stash(t.Context(), testModule, testVersion)
				require.NoError(t, err)
				require.Equal(t, 1, o.total())
				if test.waits {
					require.InDelta(t, DefaultStaleThreshold.Seconds(), time.Since(start).Seconds(), 5)
				} else {
					require.Less(t, time.Since(start), time.Second)
				}
				requireComplete(t, f, testModule, testVersion)
			})
		})
	}
}

// A lock is no part of a version, to whomever.
func TestLockIsInvisible(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		s := f.storage("a")
		fresh := func(v version) { f.Put(v.object(extLock), nil, marked(time.Now(), "other")) }
		fresh(version{testModule, "v0.9.0"}) // a version that is being fetched
		require.NoError(t, stashSave(t.Context(), s, testModule, testVersion))
		fresh(version{testModule, testVersion})
		fresh(version{"another.org/mod", "v1.0.0"})

		list, err := s.List(t.Context(), testModule)
		require.NoError(t, err)
		require.Equal(t, []string{testVersion}, list)
		list, err = s.List(t.Context(), "another.org/mod")
		require.NoError(t, err)
		require.Empty(t, list)
		page, next, err := s.Catalog(t.Context(), "", 0)
		require.NoError(t, err)
		require.Equal(t, []ModuleVersion{{testModule, testVersion}}, page)
		require.Empty(t, next)
		for vers, want := range map[string]bool{testVersion: true, "v0.9.0": false} {
			ok, err := s.Exists(t.Context(), testModule, vers)
			require.NoError(t, err)
			require.Equal(t, want, ok)
		}
		require.True(t, Is(s.Delete(t.Context(), testModule, "v0.9.0"), KindNotFound))
		require.True(t, Is(stashSave(t.Context(), s, testModule, testVersion), KindAlreadyExists))
		require.NoError(t, s.Delete(t.Context(), testModule, testVersion))
		require.True(t, Is(s.Delete(t.Context(), testModule, testVersion), KindNotFound))
		start := time.Now()
		require.NoError(t, stashSave(t.Context(), s, testModule, testVersion))
		require.Less(t, time.Since(start), time.Second)
		require.Len(t, locks(f), 3) // fresh ones are not touched
	})
}

// Who meets a stale lock sweeps it, and leaves a fresh one alone.
func TestLockIsSwept(t *testing.T) {
	for _, test := range []struct {
		name     string
		complete bool // before the call
		call     func(ctx context.Context, s *Storage) error
		kind     int
	}{
		{"save", false, func(ctx context.Context, s *Storage) error { return stashSave(ctx, s, testModule, testVersion) }, 0},
		{"delete", true, func(ctx context.Context, s *Storage) error { return s.Delete(ctx, testModule, testVersion) }, 0},
		{"delete of nothing", false, func(ctx context.Context, s *Storage) error { return s.Delete(ctx, testModule, testVersion) }, KindNotFound},
		{"single flight", true, func(ctx context.Context, s *Storage) error {
			_, err := s.SingleFlight(nil).Stash(ctx, testModule, testVersion)
			return err
		}, 0},
	} {
		for _, fresh := range []bool{false, true} {
			for _, denied := range []bool{false, true} {
				if denied && test.name == "delete" {
					continue // which fails then
				}
				t.Run(fmt.Sprintf("%s fresh %v denied %v", test.name, fresh, denied), func(t *testing.T) {
					inCrowd(t, func(t *testing.T, f *fakeGCS) {
						log := &syncedLog{}
						s := f.storage("a", log.option())
						if test.complete {
							require.NoError(t, stashSave(t.Context(), s, testModule, testVersion))
						}
						f.Put(objectName(extLock), nil, marked(time.Now(), "other"))
						if !fresh {
							time.Sleep(DefaultStaleThreshold)
						}
						if denied {
							f.Deny("storage.objects.delete")
						}
						err := test.call(t.Context(), s)
						if test.kind == 0 {
							require.NoError(t, err)
						} else {
							require.Equal(t, test.kind, Kind(err))
						}
						require.Equal(t, fresh || denied, f.Get(objectName(extLock)) != nil)
						require.Empty(t, log.String())
					})
				})
			}
		}
	}
}

// Where objects may not be deleted, each machine fetches for itself, says so
// once, and delays nobody.
func TestSingleFlightNoDelete(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		f.Deny("storage.objects.delete")
		o := &origin{takes: 5 * time.Second}
		logs := make([]*syncedLog, 4)
		fleet := make([]replica, len(logs))
		for i := range fleet {
			logs[i] = &syncedLog{}
			fleet[i] = newReplica(f, o, fmt.Sprint(i), logs[i].option())
		}
		start := time.Now()
		var group sync.WaitGroup
		for _, r := range fleet {
			for range 3 {
				group.Go(func() {
					_, err := r.Stash(t.Context(), testModule, testVersion)
					require.NoError(t, err)
				})
			}
		}
		group.Wait()
		require.LessOrEqual(t, o.total(), len(fleet))
		require.Less(t, time.Since(start), 2*o.takes)
		for i, r := range fleet { // each has to find out for itself
			vers := fmt.Sprintf("v1.1.%d", i)
			start := time.Now()
			_, err := r.Stash(t.Context(), testModule, vers)
			require.NoError(t, err)
			require.Equal(t, 1, o.calls[vers])
			require.Less(t, time.Since(start), 2*o.takes)
			lines := logs[i].lines(slog.LevelWarn)
			require.Len(t, lines, 1)
			require.Contains(t, lines[0], "storage.objects.delete")
			f.ResetLog()
			_, err = r.Stash(t.Context(), testModule, "v1.2"+vers[4:])
			require.NoError(t, err)
			for _, r := range f.Log() { // and then tries no more
				require.NotContains(t, r.Object, ".lock")
			}
			require.Len(t, logs[i].lines(slog.LevelWarn), 1)
		}
	})
}

// The lock that one without the permission leaves behind is in nobody's way.
func TestSingleFlightNoDeleteGivesUp(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		o := &origin{takes: time.Second, fail: func(call int) error {
			if call == 1 {
				return io.EOF
			}
			return nil
		}}
		f.Deny("storage.objects.delete")
		_, err := newReplica(f, o, "a").Stash(t.Context(), testModule, testVersion)
		require.True(t, err == io.EOF)
		require.Len(t, locks(f), 1)
		f.Allow("storage.objects.delete") // to others
		start := time.Now()
		_, err = newReplica(f, o, "b").Stash(t.Context(), testModule, testVersion)
		require.NoError(t, err)
		require.Less(t, time.Since(start), 2*time.Second)
		require.Empty(t, locks(f))
	})
}

// In a bucket that lets nobody create an object, next decides.
func TestSingleFlightNoCreate(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		log := &syncedLog{}
		f.Deny("storage.objects.create")
		s := f.storage("a", log.option())
		var calls atomic.Int32
		stasher := s.SingleFlight(stashFunc(func(_ context.Context, _, vers string) (string, error) {
			calls.Add(1)
			return vers, nil
		}))
		for range 2 {
			var group sync.WaitGroup
			for i := range 3 { // which find it out at the same time
				group.Go(func() {
					vers := fmt.Sprintf("v1.0.%d", i)
					saved, err := stasher.Stash(t.Context(), testModule, vers)
					require.NoError(t, err)
					require.Equal(t, vers, saved)
				})
			}
			group.Wait()
		}
		require.EqualValues(t, 6, calls.Load())
		require.Len(t, log.lines(slog.LevelWarn), 1)
		require.Contains(t, log.String(), "storage.objects.create")
	})
}

// A retention policy keeps locks as it keeps everything. Versions are fetched
// and stored all the same, and nobody is delayed.
func TestSingleFlightRetention(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		f.Retain(true)
		o := &origin{takes: time.Second}
		start := time.Now()
		for _, r := range newFleet(f, o, 3) {
			for i := range 3 {
				_, err := r.Stash(t.Context(), testModule, fmt.Sprintf("v1.0.%d", i))
				require.NoError(t, err)
			}
		}
		require.Less(t, time.Since(start), 10*time.Second)
		require.Equal(t, 3, o.total())
	})
}

// A bucket that cannot be listed tells nothing of the version, and the error is
// not next's.
func TestSingleFlightNoList(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		f.Deny("storage.objects.list")
		o := &origin{}
		_, err := newReplica(f, o, "a").Stash(t.Context(), testModule, testVersion)
		requireKind(t, err, KindUnexpected)
		require.ErrorContains(t, err, "storage.objects.list")
		require.Zero(t, o.total())
	})
}

// Whatever befalls one request of one replica, the version is fetched once and
// no lock remains.
func TestSingleFlightFaults(t *testing.T) {
	const threshold = 20 * time.Second
	for _, fault := range []fakegcs.Fault{fakegcs.Refused, fakegcs.LostEOF, fakegcs.LostBody, fakegcs.Unavailable, fakegcs.Hung, fakegcs.HungApplied} {
		t.Run(fault.String(), func(t *testing.T) {
			for n := 0; ; n++ {
				met := false
				inFleet(t, func(t *testing.T, f *fakeGCS) {
					o := &origin{takes: threshold/renewals + time.Second} // with one renewal
					f.onRequest(func(r *fakegcs.Request) fakegcs.Fault {
						if r.Machine == "0" && r.MachineN == n {
							met = true
							return fault
						}
						return fakegcs.NoFault
					})
					start := time.Now()
					var group sync.WaitGroup
					for i, r := range newFleet(f, o, 2, WithStaleThreshold(threshold)) {
						group.Go(func() {
							time.Sleep(time.Duration(i) * time.Millisecond)
							saved, err := r.Stash(t.Context(), testModule, testVersion)
							require.NoError(t, err, "at request %d", n)
							require.Equal(t, testVersion, saved)
						})
					}
					group.Wait()
					require.Equal(t, 1, o.total(), "at request %d", n)
					require.Less(t, time.Since(start), o.takes+20*time.Second, "at request %d", n)
					requireComplete(t, f, testModule, testVersion)
					require.Empty(t, locks(f), "at request %d", n)
				})
				if !met {
					require.Greater(t, n, 8)
					return
				}
			}
		})
	}
}

// A crash after each request: the others proceed when the lock, or the marker
// of the save that was under way, is stale.
func TestSingleFlightCrashes(t *testing.T) {
	for _, fault := range []fakegcs.Fault{fakegcs.CrashBefore, fakegcs.CrashAfter} {
		t.Run(fault.String(), func(t *testing.T) {
			for n := 0; ; n++ {
				met := false
				inCrowd(t, func(t *testing.T, f *fakeGCS) {
					const threshold = 20 * time.Second
					o := &origin{takes: threshold/renewals + time.Second}
					f.onRequest(func(r *fakegcs.Request) fakegcs.Fault {
						if r.Machine == "0" && r.MachineN == n {
							met = true
							return fault
						}
						return fakegcs.NoFault
					})
					fleet := newFleet(f, o, 2, WithStaleThreshold(threshold))
					ctx, cancel := context.WithCancel(t.Context())
					var group sync.WaitGroup
					group.Go(func() { fleet[0].Stash(ctx, testModule, testVersion) })
					time.Sleep(time.Second)
					start := time.Now()
					saved, err := fleet[1].Stash(t.Context(), testModule, testVersion)
					require.NoError(t, err, "at request %d", n)
					require.Equal(t, testVersion, saved)
					require.LessOrEqual(t, o.total(), 2)
					require.Less(t, time.Since(start), threshold+2*o.takes+5*time.Second, "at request %d", n)
					requireComplete(t, f, testModule, testVersion)
					cancel()
					group.Wait()
					time.Sleep(time.Minute)
				})
				if !met {
					return
				}
			}
		})
	}
}

// The caller leaves at each request: the claim that may have been made is given
// back, and the next caller need not wait for it.
func TestSingleFlightLeavesAtEachRequest(t *testing.T) {
	for _, fault := range []fakegcs.Fault{fakegcs.Hung, fakegcs.HungApplied} {
		t.Run(fault.String(), func(t *testing.T) {
			for n := 0; ; n++ {
				met := false
				inFleet(t, func(t *testing.T, f *fakeGCS) {
					o := &origin{takes: 5 * time.Second}
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					f.onRequest(func(r *fakegcs.Request) fakegcs.Fault {
						if r.Machine == "0" && r.MachineN == n {
							met = true
							time.AfterFunc(time.Second, cancel)
							return fault
						}
						return fakegcs.NoFault
					})
					fleet := newFleet(f, o, 2)
					_, err := fleet[0].Stash(ctx, testModule, testVersion)
					if err != nil {
						require.ErrorIs(t, err, context.Canceled)
					}
					f.onRequest(nil)
					start := time.Now()
					_, err = fleet[1].Stash(t.Context(), testModule, testVersion)
					require.NoError(t, err)
					require.Less(t, time.Since(start), 10*time.Second, "at request %d", n)
					requireComplete(t, f, testModule, testVersion)
					time.Sleep(releaseTimeout)
				})
				if !met {
					return
				}
			}
		})
	}
}

// A claim that cannot be given back delays the others by the threshold, and the
// log says so; the caller has its answer.
func TestSingleFlightClaimStays(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		log := &syncedLog{}
		o := &origin{}
		f.fault(fakegcs.Unavailable, func(r *fakegcs.Request) bool { return r.Op == "delete" })
		start := time.Now()
		_, err := newReplica(f, o, "a", log.option()).Stash(t.Context(), testModule, testVersion)
		require.NoError(t, err)
		require.Less(t, time.Since(start), releaseTimeout+time.Second)
		require.Len(t, log.lines(slog.LevelWarn), 1)
		require.Contains(t, log.String(), "could not delete a claim")
		require.Contains(t, log.String(), "module="+testModule+" version="+testVersion)
		f.onRequest(nil)
		_, err = newReplica(f, o, "b").Stash(t.Context(), testModule, testVersion)
		require.NoError(t, err)
		require.Equal(t, 1, o.total())
	})
}

// What a stash costs, in requests beside those of the Save that next makes.
func TestSingleFlightCost(t *testing.T) {
	for _, test := range []struct {
		name                  string
		vers                  string
		prepare               func(f *fakeGCS, s *Storage)
		before, after, serial int
	}{
		{"new version", testVersion, func(*fakeGCS, *Storage) {}, 3, 1, 4 + 3},
		{"complete version", testVersion, func(f *fakeGCS, s *Storage) {
			stashSave(context.Background(), s, testModule, testVersion)
		}, 1, 0, 1},
		{"query", "master", func(*fakeGCS, *Storage) {}, 0, 0, 3},
	} {
		t.Run(test.name, func(t *testing.T) {
			inFleet(t, func(t *testing.T, f *fakeGCS) {
				o := &origin{resolve: map[string]string{"master": pseudoVersion}}
				s := f.storage("a")
				test.prepare(f, s)
				var before, after int
				next := o.stasher(s)
				stasher := s.SingleFlight(stashFunc(func(ctx context.Context, module, vers string) (string, error) {
					before = len(f.Log())
					saved, err := next.Stash(ctx, module, vers)
					after = len(f.Log())
					return saved, err
				}))
				f.ResetLog()
				_, err := stasher.Stash(t.Context(), testModule, test.vers)
				require.NoError(t, err)
				log := f.Log()
				if o.total() == 0 {
					before, after = len(log), len(log)
				}
				t.Logf("%s: %d requests before next, %d of its Save, %d after it; %d one after another",
					test.name, before, after-before, len(log)-after, fakegcs.SerialTrips(log))
				require.Equal(t, test.before, before)
				require.Equal(t, test.after, len(log)-after)
				require.Equal(t, test.serial, fakegcs.SerialTrips(log))
			})
		})
	}
}
