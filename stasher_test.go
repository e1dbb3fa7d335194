package gcs

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

const (
	pseudoVersion = "v0.0.0-20260102150405-0123456789ab"
	// claimStale is after how long without renewal a claim is stale, by default.
	claimStale = DefaultStaleThreshold / claimFraction
	// lastPoll is how late the end of what a flight waits for can be seen.
	lastPoll = 3 * time.Second
)

// errGone is the error of a fetch of what exists nowhere.
var errGone = fmt.Errorf("git: repository %w", fs.ErrNotExist)

// stashFunc is a Stasher made of a function.
type stashFunc func(ctx context.Context, module, version string) (string, error)

func (f stashFunc) Stash(ctx context.Context, module, version string) (string, error) {
	return f(ctx, module, version)
}

// answering is a Stasher with one answer.
func answering(vers string, err error) Stasher {
	return stashFunc(func(context.Context, string, string) (string, error) { return vers, err })
}

// origin is the version control system that a fleet fetches from. A master there is
// pseudoVersion.
type origin struct {
	takes time.Duration       // for one fetch
	fail  func(call int) bool // whether the n-th fetch ends with errGone; nil for none

	mu    sync.Mutex
	calls map[string]int // by version asked for
	begun int            // fetches
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
		o.begun++
		n := o.begun
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
		if o.fail != nil && o.fail(n) {
			return "", errGone
		}
		if vers == "master" {
			vers = pseudoVersion
		}
		if err := stashSave(ctx, s, module, vers); err != nil {
			return "", athensLike{"stasher.Stash", KindUnexpected, err}
		}
		return vers, nil
	})
}

// total returns how many fetches have begun.
func (o *origin) total() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.begun
}

func stashSave(ctx context.Context, s *Storage, module, vers string) error {
	return contentOf(vers, 100).saveAs(ctx, s, ModuleVersion{module, vers})
}

// athensLike is an error of Athens, which says its kind, and wraps its cause.
type athensLike struct {
	Op   string
	Kind int
	Err  error
}

func (e athensLike) Error() string { return e.Op }
func (e athensLike) Unwrap() error { return e.Err }

// replica is one machine of a fleet.
type replica struct {
	*fakegcs.Machine
	s *Storage
	Stasher
}

func newReplica(f *fakeGCS, o *origin, name string, opts ...Option) replica {
	m := f.Machine(name)
	s := NewStorage(m.Bucket, opts...)
	return replica{m, s, s.SingleFlight(o.stasher(s))}
}

func newFleet(f *fakeGCS, o *origin, n int, opts ...Option) []replica {
	fleet := make([]replica, n)
	for i := range fleet {
		fleet[i] = newReplica(f, o, fmt.Sprint(i), opts...)
	}
	return fleet
}

// stashAll makes all replicas stash the version, one after another by that time,
// and returns their errors and how long it took.
func stashAll(t *testing.T, fleet []replica, spread time.Duration) (errs []error, took time.Duration) {
	start := time.Now()
	errs = make([]error, len(fleet))
	var group sync.WaitGroup
	for i, r := range fleet {
		group.Go(func() {
			time.Sleep(time.Duration(i) * spread)
			saved, err := r.Stash(t.Context(), testModule, testVersion)
			if err == nil {
				require.Equal(t, testVersion, saved)
			}
			errs[i] = err
		})
	}
	group.Wait()
	return errs, time.Since(start)
}

// requireStash stashes a version and checks what is saved.
func requireStash(t *testing.T, stasher Stasher, vers, want string) {
	t.Helper()
	saved, err := stasher.Stash(t.Context(), testModule, vers)
	require.NoError(t, err)
	require.Equal(t, want, saved)
}

func requireNoErrors(t *testing.T, errs []error) {
	t.Helper()
	require.NoError(t, errors.Join(errs...))
}

type contextKey struct{}

func TestSingleFlightShares(t *testing.T) {
	forEach(t, inFleet, []string{testVersion, "master"}, func(t *testing.T, f *fakeGCS, vers string) {
		calls := 0
		stasher := f.storage("a").SingleFlight(stashFunc(func(ctx context.Context, module, v string) (string, error) {
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
}

// Neither another version, nor another module, nor a call after the last is the
// same call.
func TestSingleFlightSharesNoMore(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		var mu sync.Mutex
		calls := map[string]int{}
		stasher := f.storage("a").SingleFlight(stashFunc(func(ctx context.Context, module, v string) (string, error) {
			mu.Lock()
			defer mu.Unlock()
			calls[module+"@"+v]++
			return v, nil
		}))
		for range 2 {
			var group sync.WaitGroup
			for _, v := range []ModuleVersion{{"a", "v1.0.0"}, {"a", "v1.0.1"}, {"b", "v1.0.0"}, {"a", "master"}, {"b", "master"}} {
				group.Go(func() {
					saved, err := stasher.Stash(t.Context(), v.Module, v.Version)
					require.NoError(t, err)
					require.Equal(t, v.Version, saved)
				})
			}
			group.Wait()
		}
		require.Equal(t, map[string]int{"a@v1.0.0": 2, "a@v1.0.1": 2, "b@v1.0.0": 2, "a@master": 2, "b@master": 2}, calls)
	})
}

// A caller, the first or another, that has had enough leaves at once, and alone.
func TestSingleFlightCallerLeaves(t *testing.T) {
	for vers, want := range map[string]string{testVersion: testVersion, "master": pseudoVersion} {
		for leaver := range 3 {
			run(t, fmt.Sprint(vers, leaver), inFleet, func(t *testing.T, f *fakeGCS) {
				o := &origin{takes: 5 * time.Second}
				a := newReplica(f, o, "a")
				start := time.Now()
				var group sync.WaitGroup
				for i := range 3 {
					group.Go(func() {
						ctx := t.Context()
						if i == leaver {
							ctx = within(t, 2*time.Second)
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
		}
	}
}

// A flight outlives its callers. Whenever a caller's context ends, the version is
// fetched and stored all the same, with the values of that context.
func TestSingleFlightOutlivesCallers(t *testing.T) {
	const takes = 5 * time.Second
	on := func(op, ext string) func(*fakegcs.Request) bool {
		return func(r *fakegcs.Request) bool { return r.Op == op && strings.HasSuffix(r.Object, ext) }
	}
	for name, when := range map[string]struct {
		after time.Duration
		at    func(*fakegcs.Request) bool
	}{
		"before the call":       {-1, nil},
		"at the call":           {0, nil},
		"just after the call":   {time.Nanosecond, nil},
		"at the first list":     {time.Hour, on("list", "")},
		"at the claim":          {time.Hour, on("insert", extClaim)},
		"during the fetch":      {takes / 2, nil},
		"at the save":           {time.Hour, on("insert", extMod)},
		"at the commit":         {time.Hour, on("patch", extMod)},
		"at the claim's delete": {time.Hour, on("delete", extClaim)},
	} {
		for vers, want := range map[string]string{testVersion: testVersion, "master": pseudoVersion} {
			if vers == "master" && (name == "at the first list" || name == "at the claim" || name == "at the claim's delete") {
				continue // it makes no such request
			}
			run(t, name+" of "+vers, inFleet, func(t *testing.T, f *fakeGCS) {
				o := &origin{takes: takes}
				s := f.storage("a")
				next := o.stasher(s)
				stasher := s.SingleFlight(stashFunc(func(ctx context.Context, module, v string) (string, error) {
					require.Equal(t, "value", ctx.Value(contextKey{}))
					_, limited := ctx.Deadline()
					require.False(t, limited)
					return next.Stash(ctx, module, v)
				}))
				ctx, cancel := context.WithTimeout(context.WithValue(t.Context(), contextKey{}, "value"), time.Hour)
				defer cancel()
				f.onRequest(func(r *fakegcs.Request) fakegcs.Fault {
					if when.at != nil && when.at(r) {
						cancel()
					}
					return fakegcs.NoFault
				})
				switch {
				case when.after < 0:
					cancel()
				case when.after == 0:
					go cancel()
				default:
					time.AfterFunc(when.after, cancel)
				}
				start := time.Now()
				var group sync.WaitGroup
				for range 3 { // who come at the same time leave at the same time
					group.Go(func() {
						_, err := stasher.Stash(ctx, testModule, vers)
						require.ErrorIs(t, err, context.Canceled)
						requireError(t, err, KindUnexpected, "gcs.Stash", testModule, vers)
					})
				}
				group.Wait()
				require.Less(t, time.Since(start), takes+time.Second)
				if when.after >= 0 && when.after < time.Hour {
					require.Equal(t, when.after, time.Since(start))
				}
				time.Sleep(2 * takes)
				require.Equal(t, 1, o.total())
				requireComplete(t, f, testModule, want)
			})
		}
	}
}

// Who comes while the flight of those who left is under way joins it.
func TestSingleFlightJoinsAbandoned(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		o := &origin{takes: 5 * time.Second}
		a := newReplica(f, o, "a")
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		for range 2 {
			_, err := a.Stash(ctx, testModule, testVersion)
			require.ErrorIs(t, err, context.Canceled)
			time.Sleep(time.Second)
		}
		requireStash(t, a, testVersion, testVersion)
		require.Equal(t, 1, o.total())
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

// What is complete, or but for the last step, is not fetched again. What is left of
// a version, if no save is at work on it, is fetched and healed.
func TestSingleFlightFinds(t *testing.T) {
	saved := map[string]string{keySaveID: "dead"}
	type objects map[string]map[string]string
	type testCase struct {
		found           objects
		calls, requests int
	}
	forNamed(t, inFleet, map[string]testCase{
		"complete":   {objects{extInfo: saved, extZip: saved, extMod: nil}, 0, 3},
		"unfinished": {objects{extInfo: saved, extZip: saved, extMod: marked(givenUp, "dead")}, 0, 4},
		"old Athens": {objects{extInfo: nil, extZip: nil, extMod: {keyInProgressOld: "true"}}, 0, 4},
		"partial":    {objects{extMod: nil, extInfo: nil}, 1, 0},
		"given up":   {objects{extMod: marked(givenUp, "dead")}, 1, 0},
		"abandoned":  {objects{extMod: marked(givenUp, "dead"), extZip: nil, extInfo: nil}, 1, 0},
	}, func(t *testing.T, f *fakeGCS, test testCase) {
		for ext, metadata := range test.found {
			f.Put(objectName(ext), []byte("old"), metadata)
		}
		time.Sleep(DefaultStaleThreshold)
		o := &origin{}
		a := newReplica(f, o, "a")
		requireStash(t, a, testVersion, testVersion)
		require.Equal(t, test.calls, o.total())
		if test.calls == 0 {
			require.Len(t, f.Log(), test.requests)
			requireExists(t, a.s, testVersion, true)
			return
		}
		requireComplete(t, f, testModule, testVersion)
	})
}

// A machine that saves without a claim, as Athens' pull of a query does, is
// waited for all the same: until it is done, or fails, or is dead.
func TestSingleFlightWaitsForSave(t *testing.T) {
	type testCase struct {
		zip          io.Reader
		crash        bool
		calls        int
		after, until time.Duration
	}
	forNamed(t, inFleet, map[string]testCase{
		"done":  {bytes.NewReader(contentOf(testVersion, 100).zip[2:]), false, 0, 20 * time.Second, 23 * time.Second},
		"fails": {iotest.ErrReader(io.ErrUnexpectedEOF), false, 1, 20 * time.Second, 23 * time.Second},
		"dies":  {bytes.NewReader(nil), true, 1, DefaultStaleThreshold, DefaultStaleThreshold + 4*time.Second},
	}, func(t *testing.T, f *fakeGCS, test testCase) {
		var group sync.WaitGroup
		saver := f.Machine("saver")
		ctx, cancel := context.WithCancel(t.Context())
		group.Go(func() {
			contentOf(testVersion, 100).saveHalf(ctx, NewStorage(saver.Bucket), sleepReader(20*time.Second), test.zip)
		})
		time.Sleep(time.Second)
		if test.crash {
			saver.Crash()
		}
		start := time.Now()
		o := &origin{}
		requireStash(t, newReplica(f, o, "a"), testVersion, testVersion)
		require.Equal(t, test.calls, o.total())
		require.Greater(t, time.Since(start), test.after-2*time.Second)
		require.Less(t, time.Since(start), test.until)
		requireComplete(t, f, testModule, testVersion)
		cancel()
		group.Wait()
		time.Sleep(time.Minute)
	})
}

// A save that begins just before the claim is made is waited for without the
// claim, which would have to be renewed.
func TestSingleFlightSaveComesBetween(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		var group sync.WaitGroup
		claims := func(r *fakegcs.Request) bool { return r.Op == "insert" && r.Object == objectName(extClaim) }
		f.atFirst(claims, func() {
			group.Go(func() {
				require.NoError(t, contentOf(testVersion, 100).saveSlowly(t.Context(), f.storage("saver"), 20*time.Second))
			})
			time.Sleep(time.Second)
		})
		o := &origin{}
		group.Go(func() { requireStash(t, newReplica(f, o, "a"), testVersion, testVersion) })
		time.Sleep(5 * time.Second)
		require.Empty(t, locks(f))
		group.Wait()
		require.Zero(t, o.total()) // the save has stored it
	})
}

// An answer that another has saved the version is success, and says which.
func TestSingleFlightAlreadyExists(t *testing.T) {
	own := &Error{Op: "gcs.Save", Kind: KindAlreadyExists, Module: testModule, Version: pseudoVersion, Err: errExists}
	nameless := &Error{Op: "gcs.Save", Kind: KindAlreadyExists, Module: testModule, Err: errExists}
	for _, test := range []struct {
		name     string
		err      error
		beside   string
		resolved string // "" for the version that was asked for
	}{
		{"own", own, "", pseudoVersion},
		{"own, beside another version", own, "beside", pseudoVersion},
		{"wrapped", fmt.Errorf("stash: %w", fmt.Errorf("save: %w", own)), "", pseudoVersion},
		{"joined", errors.Join(io.EOF, own), "", pseudoVersion},
		{"two wrapped", fmt.Errorf("%w: %w", io.EOF, own), "", pseudoVersion},
		{"of Athens", athensLike{"a", KindAlreadyExists, own}, "", pseudoVersion},
		{"of Athens, a pointer", &athensLike{"a", KindAlreadyExists, own}, "", pseudoVersion},
		{"of Athens, another kind outside", athensLike{"a", KindUnexpected, athensLike{"b", KindUnexpected, own}}, "", pseudoVersion},
		{"of another module", &Error{Kind: KindAlreadyExists, Module: "other", Version: pseudoVersion}, "", pseudoVersion},
		{"of no version", nameless, "", ""},
		{"of no version, beside one", nameless, pseudoVersion, pseudoVersion},
	} {
		for _, vers := range []string{"master", testVersion} {
			run(t, test.name+" of "+vers, inFleet, func(t *testing.T, f *fakeGCS) {
				stasher := f.storage("a").SingleFlight(answering(test.beside, test.err))
				requireStash(t, stasher, vers, cmp.Or(test.resolved, vers))
			})
		}
	}
}

// The whole way: two replicas are asked for a branch, and fetch it both.
func TestSingleFlightResolves(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		o := &origin{takes: time.Second}
		var group sync.WaitGroup
		for _, r := range newFleet(f, o, 5) {
			for range 3 {
				group.Go(func() { requireStash(t, r, "master", pseudoVersion) })
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
		"plain":              errors.New("git: not found"),
		"own":                &Error{Kind: KindNotFound, Err: io.EOF},
		"wrapped":            fmt.Errorf("fetch: %w", &Error{Kind: KindRateLimit}),
		"of Athens":          &athensLike{"a", KindNotFound, io.EOF},
		"of Athens, no ours": &athensLike{"a", KindAlreadyExists, io.EOF},
		"of Athens, alone":   &athensLike{"a", KindAlreadyExists, nil},
		"a failed repair":    &Error{Kind: KindUnexpected, Module: testModule, Err: &Error{Kind: KindAlreadyExists, Module: testModule}},
		"cancelled":          context.Canceled,
		"says so by words":   errors.New("409 already exists"),
		"exists":             fs.ErrExist,
	} {
		for _, vers := range []string{"master", testVersion} {
			run(t, name+" of "+vers, inFleet, func(t *testing.T, f *fakeGCS) {
				saved, err := f.storage("a").SingleFlight(answering("beside", want)).Stash(t.Context(), testModule, vers)
				require.True(t, err == want, "%v", err)
				require.Equal(t, "beside", saved)
			})
		}
	}
}

// If next ends its goroutine, its callers are told so. The claim is given back, and who
// comes next flies anew.
func TestSingleFlightNextExits(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		var calls atomic.Int64
		stasher := f.storage("a").SingleFlight(stashFunc(func(context.Context, string, string) (string, error) {
			calls.Add(1)
			runtime.Goexit()
			return "", nil
		}))
		for i, vers := range []string{"master", testVersion, testVersion} {
			_, err := stasher.Stash(t.Context(), testModule, vers)
			require.ErrorIs(t, err, errGoexit)
			requireError(t, err, KindUnexpected, "gcs.Stash", testModule, vers)
			require.EqualValues(t, i+1, calls.Load())
			require.Empty(t, locks(f))
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
		run(t, query, inFleet, func(t *testing.T, f *fakeGCS) {
			calls := 0
			stasher := f.storage("a").SingleFlight(stashFunc(func(context.Context, string, string) (string, error) {
				calls++
				time.Sleep(time.Second)
				return testVersion, nil
			}))
			var group sync.WaitGroup
			for range 10 {
				group.Go(func() { requireStash(t, stasher, query, testVersion) })
			}
			group.Wait()
			require.Equal(t, 1, calls)
			if isOne {
				require.Empty(t, f.Log())
			} else {
				require.NotEmpty(t, f.Log())
			}
		})
	}
}

// A fleet of replicas that miss the same versions at the same moment fetches
// each of them once.
func TestSingleFlightFleet(t *testing.T) {
	for _, versions := range []int{1, 4} {
		for _, n := range []int{1, 2, 8, 32} {
			run(t, fmt.Sprintf("%d of %d", n, versions), inFleet, func(t *testing.T, f *fakeGCS) {
				o := &origin{takes: 3 * time.Second}
				start := time.Now()
				var group sync.WaitGroup
				for _, r := range newFleet(f, o, n) {
					for v := range 2 * versions { // two callers of each
						group.Go(func() {
							vers := fmt.Sprintf("v1.0.%d", v%versions)
							requireStash(t, r, vers, vers)
							requireComplete(t, f, testModule, vers)
						})
					}
				}
				group.Wait()
				require.Less(t, time.Since(start), o.takes+lastPoll)
				saves := slices.DeleteFunc(f.Log(), func(r fakegcs.Request) bool {
					return path.Ext(r.Object) != ".zip" || !r.Applied
				})
				require.Len(t, saves, versions)
				require.Len(t, o.calls, versions)
				require.Equal(t, versions, o.total())
			})
		}
	}
}

// Replicas on slow lines, or that come one after another, or with wrong clocks
// of moderate error, do not fetch twice either.
func TestSingleFlightFleetLate(t *testing.T) {
	for _, latency := range []time.Duration{time.Millisecond, 300 * time.Millisecond} {
		for _, spread := range []time.Duration{10 * time.Millisecond, time.Second} {
			run(t, fmt.Sprint(latency, spread), inFleet, func(t *testing.T, f *fakeGCS) {
				f.SetLatency(latency)
				o := &origin{takes: 3 * time.Second}
				fleet := newFleet(f, o, 8)
				for i, r := range fleet {
					skew := time.Duration(i-4) * 3 * time.Second
					r.s.now = func() time.Time { return time.Now().Add(skew) }
				}
				errs, _ := stashAll(t, fleet, spread)
				requireNoErrors(t, errs)
				require.Equal(t, 1, o.total())
			})
		}
	}
}

// When the holder of the claim fails, its caller is told why. All others fetch at
// once: they do not queue for what may exist nowhere.
func TestSingleFlightHolderFails(t *testing.T) {
	for name, fail := range map[string]func(call int) bool{
		"once":             func(call int) bool { return call == 1 },
		"as all others do": func(int) bool { return true },
	} {
		for _, n := range []int{2, 8, 32} {
			for _, latency := range []time.Duration{20 * time.Millisecond, 500 * time.Millisecond} {
				run(t, fmt.Sprint(name, n, latency), inFleet, func(t *testing.T, f *fakeGCS) {
					f.SetLatency(latency)
					o := &origin{takes: 20 * time.Second, fail: fail}
					errs, took := stashAll(t, newFleet(f, o, n), 0)
					failed := 0
					for _, err := range errs {
						if err != nil {
							require.True(t, err == errGone, "%v", err)
							failed++
						}
					}
					require.Equal(t, n, o.total())
					require.Equal(t, n-1, o.most)
					require.Less(t, took, 2*o.takes+lastPoll+10*latency)
					if name == "once" {
						require.Equal(t, 1, failed)
						requireComplete(t, f, testModule, testVersion)
					} else {
						require.Equal(t, n, failed)
						require.Empty(t, f.Names())
					}
				})
			}
		}
	}
}

// The same when it has saved for longer than a claim lives without renewals, and then
// fails: whether they waited for its claim first, or came during its save.
func TestSingleFlightSlowSaveFails(t *testing.T) {
	forEach(t, inFleet, []time.Duration{500 * time.Millisecond, 5 * time.Second}, func(t *testing.T, f *fakeGCS, late time.Duration) {
		start := time.Now()
		var mu sync.Mutex
		var begun []time.Duration
		var group sync.WaitGroup
		stash := func(machine string, next func(ctx context.Context, s *Storage) error) {
			s := f.storage(machine)
			group.Go(func() {
				_, err := s.SingleFlight(stashFunc(func(ctx context.Context, _, vers string) (string, error) {
					return vers, next(ctx, s)
				})).Stash(t.Context(), testModule, testVersion)
				require.Error(t, err)
			})
		}
		stash("a", func(ctx context.Context, s *Storage) error {
			time.Sleep(time.Second)
			return contentOf("a", 100).saveHalf(ctx, s, sleepReader(time.Minute), iotest.ErrReader(io.ErrUnexpectedEOF))
		})
		time.Sleep(late)
		for _, machine := range []string{"b", "c", "d"} {
			stash(machine, func(context.Context, *Storage) error {
				mu.Lock()
				begun = append(begun, time.Since(start))
				mu.Unlock()
				time.Sleep(20 * time.Second)
				return errGone
			})
		}
		group.Wait()
		require.Len(t, begun, 3)
		require.Less(t, slices.Max(begun), time.Minute+time.Second+lastPoll)
	})
}

// Every caller gets the answer of a fetch, and no refusal of a claim, however many
// others were quicker.
func TestSingleFlightAllFailQuickly(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		f.SetLatency(500 * time.Millisecond) // so that many are refused at once
		o := &origin{fail: func(int) bool { return true }}
		errs, _ := stashAll(t, newFleet(f, o, 24), 0)
		for _, err := range errs {
			require.True(t, err == errGone, "%v", err)
		}
		require.Equal(t, 24, o.total())
	})
}

// A holder that dies in the middle of its fetch delays the others by a quarter of
// the threshold. One of them claims the version then; when that one fails, the
// others fetch at once.
func TestSingleFlightHolderCrashes(t *testing.T) {
	for _, n := range []int{2, 8, 32} {
		for _, successorFails := range []bool{false, true} {
			run(t, fmt.Sprint(n, successorFails), inCrowd, func(t *testing.T, f *fakeGCS) {
				fail := func(call int) bool { return successorFails && call == 2 }
				o := &origin{takes: 5 * time.Second, fail: fail}
				fleet := newFleet(f, o, n)
				ctx, cancel := context.WithCancel(t.Context())
				var group sync.WaitGroup
				group.Go(func() { fleet[0].Stash(ctx, testModule, testVersion) })
				time.Sleep(time.Second)
				fleet[0].Crash()
				errs, took := stashAll(t, fleet[1:], 0)
				require.Greater(t, took, claimStale-2*time.Second)
				if !successorFails {
					requireNoErrors(t, errs)
					require.Equal(t, 2, o.total()) // of the dead one and of one more
					require.Less(t, took, claimStale+o.takes+lastPoll)
				} else {
					require.ErrorIs(t, errors.Join(errs...), errGone)
					require.Equal(t, n, o.total())
					require.Less(t, took, claimStale+2*(o.takes+lastPoll))
				}
				if n > 2 || !successorFails {
					requireComplete(t, f, testModule, testVersion)
				}
				require.Empty(t, locks(f))
				cancel()
				group.Wait()
			})
		}
	}
}

// A fetch that takes longer than the threshold keeps its claim.
func TestSingleFlightSlowHolder(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		f.EnforceRates(true)
		o := &origin{takes: 10 * time.Minute}
		errs, _ := stashAll(t, newFleet(f, o, 2), 0)
		requireNoErrors(t, errs)
		require.Equal(t, 1, o.total())
		require.InDelta(t, o.takes/(claimStale/renewals), renewed(t, f, extClaim), 1)
	})
}

// renewed returns how often an object's marker was changed, and checks that it was
// not too often for GCS.
func renewed(t *testing.T, f *fakeGCS, ext string) (n int) {
	for _, r := range f.Log() {
		require.NotEqual(t, 429, r.Status)
		if r.Op == "patch" && r.Object == objectName(ext) && r.Applied {
			n++
		}
	}
	return n
}

// However short the threshold is, a claim is not renewed more than once a second.
func TestSingleFlightRenewsOnceASecond(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		f.EnforceRates(true)
		o := &origin{takes: 10 * time.Second}
		requireStash(t, newReplica(f, o, "a", WithStaleThreshold(8*time.Second)), testVersion, testVersion)
		require.InDelta(t, 10, renewed(t, f, extClaim), 1)
	})
}

// A flight waits for 15 minutes, and no longer. It leaves the holder alone.
func TestSingleFlightWaitIsBounded(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		o := &origin{takes: 20 * time.Minute}
		fleet := newFleet(f, o, 2)
		var group sync.WaitGroup
		group.Go(func() { requireStash(t, fleet[0], testVersion, testVersion) })
		time.Sleep(time.Second)
		start := time.Now()
		_, err := fleet[1].Stash(t.Context(), testModule, testVersion)
		requireError(t, err, KindGatewayTimeout, "gcs.Stash", testModule, testVersion)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Equal(t, 15*time.Minute, time.Since(start))
		require.Len(t, locks(f), 1)
		group.Wait()
		require.Equal(t, 1, o.total())
		requireComplete(t, f, testModule, testVersion)
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
				requireStash(t, r, testVersion, testVersion)
			})
		}
		time.Sleep(2 * time.Second)
		fleet[0].Pause()
		time.Sleep(4 * time.Minute)
		holder := f.Get(objectName(extClaim))
		fleet[0].Resume()
		time.Sleep(75 * time.Second) // the first is done
		requireComplete(t, f, testModule, testVersion)
		now := f.Get(objectName(extClaim))
		require.NotNil(t, now)
		require.Equal(t, holder.Generation, now.Generation)
		group.Wait()
		require.Equal(t, 2, o.total())
	})
}

// A claim that nobody renews any more is taken over, at once if it is stale, and
// one that cannot be read, or is from the future, when GCS says it is.
func TestSingleFlightStaleClaim(t *testing.T) {
	type testCase struct {
		metadata func() map[string]string // by the clock of the bubble
		waits    bool
	}
	forNamed(t, inFleet, map[string]testCase{
		"stale":     {func() map[string]string { return marked(time.Now().Add(-claimStale), "dead") }, false},
		"given up":  {func() map[string]string { return marked(givenUp, "dead") }, false},
		"no marker": {func() map[string]string { return nil }, false},
		"garbage":   {func() map[string]string { return map[string]string{keyInProgress: "soon"} }, true},
		"2099":      {func() map[string]string { return marked(time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC), "dead") }, true},
	}, func(t *testing.T, f *fakeGCS, test testCase) {
		f.Put(objectName(extClaim), nil, test.metadata())
		time.Sleep(2 * time.Second)
		o := &origin{}
		start := time.Now()
		requireStash(t, newReplica(f, o, "a"), testVersion, testVersion)
		require.Equal(t, 1, o.total())
		if test.waits {
			require.InDelta(t, claimStale.Seconds(), time.Since(start).Seconds(), 5)
		} else {
			require.Less(t, time.Since(start), time.Second)
		}
		requireComplete(t, f, testModule, testVersion)
	})
}

// A claim is no part of a version, to whomever. Scan shows it.
func TestClaimIsInvisible(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		s := f.storage("a")
		fresh := func(v ModuleVersion) { f.Put(v.object(extClaim), nil, marked(time.Now(), "other")) }
		fresh(ModuleVersion{testModule, "v0.9.0"}) // a version that is being fetched
		require.NoError(t, stashSave(t.Context(), s, testModule, testVersion))
		fresh(ModuleVersion{testModule, testVersion})
		fresh(ModuleVersion{"another.org/mod", "v1.0.0"})

		seen := scanned(t, s, "another.org/mod")
		require.Len(t, seen, 1)
		require.WithinDuration(t, time.Now(), seen[0].Claimed, time.Second)
		require.Equal(t, VersionStatus{ModuleVersion: ModuleVersion{"another.org/mod", "v1.0.0"}, State: Absent,
			Missing: []string{extInfo, extMod, extZip}, Claimed: seen[0].Claimed}, seen[0])

		requireList(t, s, testModule, testVersion)
		requireList(t, s, "another.org/mod")
		require.Equal(t, []ModuleVersion{{testModule, testVersion}}, catalogOf(t, s, 0))
		requireExists(t, s, testVersion, true)
		requireExists(t, s, "v0.9.0", false)
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

// The next flight that finds the version complete removes a stale claim, and so
// does Repair. Nothing else does. A fresh one stays.
func TestStaleClaimIsRemoved(t *testing.T) {
	for name, does := range map[string]bool{"Stash": true, "Repair": true, "Save": false, "Exists": false, "Info": false, "List": false} {
		for _, age := range []time.Duration{0, claimStale - time.Second, claimStale} {
			for _, denied := range []bool{false, true} {
				run(t, fmt.Sprintf("%s after %v denied %v", name, age, denied), inCrowd, func(t *testing.T, f *fakeGCS) {
					log := &syncedLog{}
					s := f.storage("a", log.option())
					require.NoError(t, stashSave(t.Context(), s, testModule, testVersion))
					f.Put(objectName(extClaim), nil, marked(time.Now(), "other"))
					time.Sleep(age)
					if denied {
						f.Deny("storage.objects.delete")
					}
					removes := does && age == claimStale
					err := everyCall(s)[name](t.Context())
					switch {
					case name == "Save":
						requireKind(t, err, KindAlreadyExists)
					case name == "Repair" && removes && denied:
						require.ErrorContains(t, err, "storage.objects.delete")
					default:
						require.NoError(t, err)
					}
					require.Equal(t, !removes || denied, f.Get(objectName(extClaim)) != nil)
					require.Empty(t, log.String())
					requireComplete(t, f, testModule, testVersion)
				})
			}
		}
	}
}

// Repair removes a stale claim of a version of which nothing else is there, and
// leaves a fresh one alone.
func TestRepairRemovesLoneClaim(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		f.Put(objectName(extClaim), nil, marked(time.Now(), "other"))
		for _, left := range []int{1, 0} {
			state, err := f.storage("a").Repair(t.Context(), testModule, testVersion)
			require.NoError(t, err)
			require.Equal(t, Absent, state)
			require.Len(t, locks(f), left)
			time.Sleep(claimStale)
		}
	})
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
				group.Go(func() { requireStash(t, r, testVersion, testVersion) })
			}
		}
		group.Wait()
		require.LessOrEqual(t, o.total(), len(fleet))
		require.Less(t, time.Since(start), 2*o.takes)
		for i, r := range fleet { // each has to find out for itself
			vers := fmt.Sprintf("v1.1.%d", i)
			start := time.Now()
			requireStash(t, r, vers, vers)
			require.Equal(t, 1, o.calls[vers])
			require.Less(t, time.Since(start), 2*o.takes)
			lines := logs[i].lines(slog.LevelWarn)
			require.Len(t, lines, 1)
			require.Contains(t, lines[0], "storage.objects.delete")
			f.ResetLog()
			requireStash(t, r, "v2.0.0", "v2.0.0")
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
		o := &origin{takes: time.Second, fail: func(call int) bool { return call == 1 }}
		f.Deny("storage.objects.delete")
		_, err := newReplica(f, o, "a").Stash(t.Context(), testModule, testVersion)
		require.True(t, err == errGone)
		require.Len(t, locks(f), 1)
		f.Allow("storage.objects.delete") // to others
		start := time.Now()
		requireStash(t, newReplica(f, o, "b"), testVersion, testVersion)
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
					requireStash(t, stasher, vers, vers)
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

// Whatever befalls one request of one replica, also if its caller leaves, the
// version is fetched once and no claim remains.
func TestSingleFlightFaults(t *testing.T) {
	const threshold = 80 * time.Second
	for _, fault := range []fakegcs.Fault{fakegcs.ConnectionRefused, fakegcs.LostEOF, fakegcs.LostBody, fakegcs.Unavailable, fakegcs.Hung, fakegcs.HungApplied} {
		for _, leaves := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v leaves %v", fault, leaves), func(t *testing.T) {
				for n, met := 0, true; met; n++ {
					met = false
					inFleet(t, func(t *testing.T, f *fakeGCS) {
						o := &origin{takes: threshold/claimFraction/renewals + time.Second} // with one renewal
						ctx, cancel := context.WithCancel(t.Context())
						defer cancel()
						f.onRequest(func(r *fakegcs.Request) fakegcs.Fault {
							if r.Machine != "0" || r.MachineN != n {
								return fakegcs.NoFault
							}
							met = true
							if leaves {
								time.AfterFunc(time.Second, cancel)
							}
							return fault
						})
						start := time.Now()
						fleet := newFleet(f, o, 2, WithStaleThreshold(threshold))
						var group sync.WaitGroup
						group.Go(func() {
							saved, err := fleet[0].Stash(ctx, testModule, testVersion)
							if err == nil {
								require.Equal(t, testVersion, saved, "at request %d", n)
							} else {
								require.True(t, leaves, "%v at request %d", err, n)
								require.ErrorIs(t, err, context.Canceled, "at request %d", n)
							}
						})
						time.Sleep(time.Millisecond)
						saved, err := fleet[1].Stash(t.Context(), testModule, testVersion)
						require.NoError(t, err, "at request %d", n)
						require.Equal(t, testVersion, saved)
						group.Wait()
						require.Less(t, time.Since(start), o.takes+20*time.Second, "at request %d", n)
						requireComplete(t, f, testModule, testVersion)
						time.Sleep(releaseTimeout) // a flight without callers ends
						require.Equal(t, 1, o.total(), "at request %d", n)
					})
					require.True(t, met || n > 7)
				}
			})
		}
	}
}

// A crash before or after each request: the others proceed when the claim, or the
// marker of the save that was under way, is stale. A claim that is left beside a
// version that is stored is removed by the next flight, or by Repair.
func TestSingleFlightCrashes(t *testing.T) {
	const threshold = 20 * time.Second
	for _, fault := range []fakegcs.Fault{fakegcs.CrashBefore, fakegcs.CrashAfter} {
		for _, repair := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v repair %v", fault, repair), func(t *testing.T) {
				stayed := 0
				for n, met := 0, true; met; n++ {
					met = false
					inCrowd(t, func(t *testing.T, f *fakeGCS) {
						o := &origin{takes: threshold/claimFraction/renewals + time.Second}
						f.fault(fault, func(r *fakegcs.Request) bool {
							if r.Machine != "0" || r.MachineN != n {
								return false
							}
							met = true
							return true
						})
						fleet := newFleet(f, o, 2, WithStaleThreshold(threshold))
						ctx, cancel := context.WithCancel(t.Context())
						var group sync.WaitGroup
						group.Go(func() { fleet[0].Stash(ctx, testModule, testVersion) })
						time.Sleep(time.Second)
						start := time.Now()
						stash := func() {
							saved, err := fleet[1].Stash(t.Context(), testModule, testVersion)
							require.NoError(t, err, "at request %d", n)
							require.Equal(t, testVersion, saved)
						}
						stash()
						require.LessOrEqual(t, o.total(), 2)
						limit := o.takes
						if met { // by now, or later
							limit += threshold + o.takes
						}
						require.Less(t, time.Since(start), limit+5*time.Second, "at request %d", n)
						requireComplete(t, f, testModule, testVersion)
						stayed += len(locks(f))
						time.Sleep(threshold / claimFraction)
						if repair {
							state, err := fleet[1].s.Repair(t.Context(), testModule, testVersion)
							require.NoError(t, err)
							require.Equal(t, Complete, state)
						} else {
							stash()
						}
						require.Empty(t, locks(f), "at request %d", n)
						cancel()
						group.Wait()
						time.Sleep(time.Minute)
					})
				}
				require.Positive(t, stayed)
			})
		}
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
		requireStash(t, newReplica(f, o, "a", log.option()), testVersion, testVersion)
		require.Less(t, time.Since(start), releaseTimeout+time.Second)
		require.Len(t, log.lines(slog.LevelWarn), 3, "two of its request")
		require.Contains(t, log.String(), "could not delete a claim")
		require.Contains(t, log.String(), "module="+testModule+" version="+testVersion)
		f.onRequest(nil)
		requireStash(t, newReplica(f, o, "b"), testVersion, testVersion)
		require.Equal(t, 1, o.total())
		require.Len(t, locks(f), 1)
	})
}

// What a stash costs, in requests beside those of the Save that next makes.
func TestSingleFlightCost(t *testing.T) {
	type testCase struct {
		vers                  string
		stored, claimed       bool
		before, after, serial int
	}
	forNamed(t, inFleet, map[string]testCase{
		"new version":                           {testVersion, false, false, 2, 1, 3 + 3},
		"complete version":                      {testVersion, true, false, 3, 0, 3},
		"complete version beside a stale claim": {testVersion, true, true, 3, 0, 3},
		"query":                                 {"master", false, false, 0, 0, 3},
	}, func(t *testing.T, f *fakeGCS, test testCase) {
		o := &origin{}
		s := f.storage("a")
		if test.stored {
			require.NoError(t, stashSave(t.Context(), s, testModule, testVersion))
		}
		if test.claimed {
			f.Put(objectName(extClaim), nil, marked(givenUp, "dead"))
		}
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
		require.Equal(t, test.before, before)
		require.Equal(t, test.after, len(log)-after)
		require.Equal(t, test.serial, fakegcs.SerialTrips(log))
	})
}

// A claim that is renewed while somebody removes it as stale stays.
func TestStaleClaimIsRenewed(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		f.Put(objectName(extClaim), nil, marked(time.Now().Add(-claimStale), "other"))
		f.onRequest(func(r *fakegcs.Request) fakegcs.Fault {
			if r.Op == "delete" {
				f.SetMetadata(objectName(extClaim), marked(time.Now(), "other"))
			}
			return fakegcs.NoFault
		})
		_, err := f.storage("a").Repair(t.Context(), testModule, testVersion)
		require.NoError(t, err)
		require.Len(t, locks(f), 1)
	})
}

// A claim is deleted after its last renewal was answered, and nothing is said of one
// that is another's by then.
func TestClaimIsDeletedLast(t *testing.T) {
	for _, lost := range []bool{false, true} {
		inCrowd(t, func(t *testing.T, f *fakeGCS) {
			renewals, inFlight := 0, 0
			f.onRequest(func(r *fakegcs.Request) fakegcs.Fault {
				switch r.Op + path.Ext(r.Object) {
				case "patch.lock":
					renewals++
					inFlight++
					time.Sleep(2 * time.Second)
					inFlight--
				case "delete.lock":
					require.Zero(t, inFlight)
					if lost {
						f.Put(objectName(extClaim), nil, marked(time.Now(), "other"))
					}
				}
				return fakegcs.NoFault
			})
			var log syncedLog
			o := &origin{takes: claimStale/4 + time.Second}
			requireStash(t, newReplica(f, o, "a", log.option()), testVersion, testVersion)
			require.Equal(t, 1, renewals)
			require.Empty(t, log.String())
		})
	}
}

// A claim that may still arrive beside a complete version is not fenced by another.
func TestClaimBesideComplete(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		claims := 0
		f.onRequest(func(r *fakegcs.Request) fakegcs.Fault {
			if r.Op != "insert" || path.Ext(r.Object) != ".lock" {
				return fakegcs.NoFault
			}
			switch claims++; claims {
			case 1:
				return fakegcs.StrayReset
			case 2:
				storeVersion(f, testModule, testVersion)
				return fakegcs.PreconditionFailed
			}
			return fakegcs.NoFault
		})
		requireStash(t, newReplica(f, &origin{}, "a"), testVersion, testVersion)
		require.Empty(t, locks(f))
	})
}

// A claim that was replaced before it went stale has failed, as one that is gone has.
func TestSingleFlightHolderReplaced(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		f.Put(objectName(extClaim), nil, marked(time.Now(), "x"))
		time.AfterFunc(3*time.Second, func() { f.Put(objectName(extClaim), nil, marked(time.Now(), "y")) })
		start := time.Now()
		requireStash(t, newReplica(f, &origin{}, "a"), testVersion, testVersion)
		require.Less(t, time.Since(start), 6*time.Second)
	})
}
