package gcs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync"
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
	takes  time.Duration                     // for one fetch
	fail   func(call int) bool               // whether the n-th fetch ends with errGone; nil for none
	answer func(vers string) (string, error) // instead of storing what was fetched, if not nil

	mu    sync.Mutex
	calls map[ModuleVersion]int // by what was asked for
	now   int                   // fetches under way,
	most  int                   // and the most there ever were
}

// stasher fetches for a Storage, as Athens' own does, and stores what it fetched.
func (o *origin) stasher(s *Storage) Stasher {
	return stashFunc(func(ctx context.Context, module, vers string) (string, error) {
		n := o.count(ModuleVersion{module, vers}, 1, 1)
		defer o.count(ModuleVersion{module, vers}, 0, -1)
		if err := sleep(ctx, o.takes); err != nil {
			return "", err
		}
		if o.answer != nil {
			return o.answer(vers)
		}
		if o.fail != nil && o.fail(n) {
			return "", errGone
		}
		if err := saveVersion(ctx, s, module, resolved(vers)); err != nil {
			return "", athensLike{"stasher.Stash", KindUnexpected, err}
		}
		return resolved(vers), nil
	})
}

// count counts fetches that begin, and those under way. It returns how many have begun.
func (o *origin) count(v ModuleVersion, begun, now int) (n int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.calls == nil {
		o.calls = map[ModuleVersion]int{}
	}
	o.calls[v] += begun
	o.now += now
	o.most = max(o.most, o.now)
	for _, calls := range o.calls {
		n += calls
	}
	return n
}

// total returns how many fetches have begun.
func (o *origin) total() int { return o.count(ModuleVersion{}, 0, 0) }

// resolved is the version that a version or a branch is at the origin.
func resolved(vers string) string {
	if vers == "master" {
		return pseudoVersion
	}
	return vers
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
	together(len(fleet), func(i int) {
		time.Sleep(time.Duration(i) * spread)
		saved, err := fleet[i].Stash(t.Context(), testModule, testVersion)
		if err == nil {
			require.Equal(t, testVersion, saved)
		}
		errs[i] = err
	})
	return errs, time.Since(start)
}

// requireStash stashes a version and checks what is saved.
func requireStash(t *testing.T, stasher Stasher, vers, want string) {
	t.Helper()
	returns(t, want)(stasher.Stash(t.Context(), testModule, vers))
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
			require.Equal(t, ModuleVersion{testModule, vers}, ModuleVersion{module, v})
			require.Equal(t, 0, ctx.Value(contextKey{})) // of the first who came
			time.Sleep(5 * time.Second)
			return pseudoVersion, nil
		}))
		together(20, func(i int) {
			time.Sleep(time.Duration(i) * 100 * time.Millisecond)
			returns(t, pseudoVersion)(stasher.Stash(context.WithValue(t.Context(), contextKey{}, i), testModule, vers))
		})
		require.Equal(t, 1, calls)
	})
}

// Neither another version, nor another module, nor a call after the last is the
// same call.
func TestSingleFlightSharesNoMore(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		o := &origin{answer: func(vers string) (string, error) { return vers, nil }}
		a := newReplica(f, o, "a")
		versions := []ModuleVersion{{"a", "v1.0.0"}, {"a", "v1.0.1"}, {"b", "v1.0.0"}, {"a", "master"}, {"b", "master"}}
		want := map[ModuleVersion]int{}
		for n := range 2 {
			together(len(versions), func(i int) {
				returns(t, versions[i].Version)(a.Stash(t.Context(), versions[i].Module, versions[i].Version))
			})
			for _, v := range versions {
				want[v] = n + 1
			}
		}
		require.Equal(t, want, o.calls)
	})
}

// A caller, the first or another, that has had enough leaves at once, and alone.
func TestSingleFlightCallerLeaves(t *testing.T) {
	for _, vers := range []string{testVersion, "master"} {
		for leaver := range 3 {
			run(t, fmt.Sprint(vers, leaver), inFleet, func(t *testing.T, f *fakeGCS) {
				o := &origin{takes: 5 * time.Second}
				a := newReplica(f, o, "a")
				start := time.Now()
				together(3, func(i int) {
					time.Sleep(time.Duration(i) * time.Millisecond)
					if i != leaver {
						requireStash(t, a, vers, resolved(vers))
						return
					}
					saved, err := a.Stash(within(t, 2*time.Second-time.Since(start)), testModule, vers)
					require.Equal(t, 2*time.Second, time.Since(start))
					require.ErrorIs(t, err, context.DeadlineExceeded)
					require.Equal(t, KindGatewayTimeout, Kind(err))
					require.Empty(t, saved)
				})
				require.Equal(t, 1, o.total())
				requireComplete(t, f, testModule, resolved(vers))
			})
		}
	}
}

// A flight outlives its callers. Whenever a caller's context ends, the version is
// fetched and stored all the same, with the values of that context.
func TestSingleFlightOutlivesCallers(t *testing.T) {
	const takes = 5 * time.Second
	at := func(op, ext string) matcher {
		return func(r *fakegcs.Request) bool { return r.Op == op && strings.HasSuffix(r.Object, ext) }
	}
	never := at("no request", "")
	type testCase struct {
		after time.Duration
		at    matcher
		query bool // whether a stash of a query makes that request
	}
	for name, when := range map[string]testCase{
		"before the call":       {-1, never, true},
		"at the call":           {0, never, true},
		"just after the call":   {time.Nanosecond, never, true},
		"at the first list":     {time.Hour, at("list", ""), false},
		"at the claim":          {time.Hour, at("insert", extClaim), false},
		"during the fetch":      {takes / 2, never, true},
		"at the save":           {time.Hour, at("insert", extMod), true},
		"at the commit":         {time.Hour, at("patch", extMod), true},
		"at the claim's delete": {time.Hour, at("delete", extClaim), false},
	} {
		for _, vers := range []string{testVersion, "master"} {
			if vers == "master" && !when.query {
				continue
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
				f.before(when.at, cancel)
				if when.after < 0 {
					cancel()
				} else if when.after == 0 {
					go cancel()
				}
				time.AfterFunc(when.after, cancel)
				start := time.Now()
				together(3, func(int) { // who come at the same time leave at the same time
					_, err := stasher.Stash(ctx, testModule, vers)
					require.ErrorIs(t, err, context.Canceled)
					requireError(t, err, KindUnexpected, "gcs.Stash", testModule, vers)
				})
				require.Less(t, time.Since(start), takes+time.Second)
				if when.after >= 0 && when.after < time.Hour {
					require.Equal(t, when.after, time.Since(start))
				}
				time.Sleep(2 * takes)
				require.Equal(t, 1, o.total())
				requireComplete(t, f, testModule, resolved(vers))
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

// What cannot be claimed, or looked for, is not fetched, and the error is not next's.
func TestSingleFlightFails(t *testing.T) {
	type testCase struct {
		module   string
		before   func(f *fakeGCS)
		kind     int
		says     string
		requests int // at most
	}
	forNamed(t, inFleet, map[string]testCase{
		"no module": {"a//b", func(*fakeGCS) {}, KindBadRequest, "", 0},
		"no list":   {testModule, func(f *fakeGCS) { f.Deny("storage.objects.list") }, KindUnexpected, "storage.objects.list", 40},
		// for another reason than the condition
		"refused": {testModule, func(f *fakeGCS) { f.fault(fakegcs.PreconditionFailed, on("", "insert", extClaim)) }, KindUnexpected, "", 39},
	}, func(t *testing.T, f *fakeGCS, test testCase) {
		test.before(f)
		o := &origin{}
		_, err := newReplica(f, o, "a").Stash(t.Context(), test.module, testVersion)
		requireError(t, err, test.kind, "gcs.Stash", test.module, testVersion)
		require.ErrorContains(t, err, test.says)
		require.Zero(t, o.total())
		require.LessOrEqual(t, len(f.Log()), test.requests)
	})
}

// What a flight finds, how often it fetches then, and how long it takes.
func TestSingleFlightFinds(t *testing.T) {
	type testCase struct {
		found             func(t *testing.T, f *fakeGCS)
		fetches, requests int // 0 requests are any number
		after, until      time.Duration
	}
	claim, saved := on("", "insert", extClaim), map[string]string{keySaveID: "dead"}
	objects := func(mark, others map[string]string, exts ...string) func(*testing.T, *fakeGCS) {
		return func(t *testing.T, f *fakeGCS) {
			f.put(testVersionName, mark, others, exts...)
			time.Sleep(DefaultStaleThreshold)
		}
	}
	claimed := func(f *fakeGCS, marker map[string]string) {
		f.Put(objectName(extClaim), nil, marker)
		time.Sleep(2 * time.Second)
	}
	// A machine that saves without a claim, as Athens' pull of a query does, and a second later.
	saving := func(t *testing.T, f *fakeGCS, rest io.Reader) *fakegcs.Machine {
		saver := f.Machine("saver")
		go contentOf(testVersion, 100).saveHalf(within(t, 30*time.Second), NewStorage(saver.Bucket), sleepReader(20*time.Second), rest)
		time.Sleep(time.Second)
		return saver
	}
	rest := contentOf(testVersion, 100).zip[2:]
	forNamed(t, inFleet, map[string]testCase{
		// What is complete, or but for the last step, is not fetched again.
		"complete":   {objects(nil, saved, allExts...), 0, 3, 0, time.Second},
		"unfinished": {objects(marked(givenUp, "dead"), saved, allExts...), 0, 4, 0, time.Second},
		"old Athens": {objects(map[string]string{keyInProgressOld: "true"}, nil, allExts...), 0, 4, 0, time.Second},
		// What is left of a version, if no save is at work on it, is fetched and healed.
		"partial":   {objects(nil, nil, extMod, extInfo), 1, 0, 0, time.Second},
		"given up":  {objects(marked(givenUp, "dead"), nil, extMod), 1, 0, 0, time.Second},
		"abandoned": {objects(marked(givenUp, "dead"), nil, allExts...), 1, 0, 0, time.Second},
		// A save is waited for, until it is done, or fails, or is dead.
		"save":         {func(t *testing.T, f *fakeGCS) { saving(t, f, bytes.NewReader(rest)) }, 0, 0, 18 * time.Second, 23 * time.Second},
		"failing save": {func(t *testing.T, f *fakeGCS) { saving(t, f, iotest.ErrReader(io.ErrUnexpectedEOF)) }, 1, 0, 18 * time.Second, 23 * time.Second},
		"dying save": {func(t *testing.T, f *fakeGCS) { saving(t, f, bytes.NewReader(nil)).Crash() }, 1, 0,
			DefaultStaleThreshold - 2*time.Second, DefaultStaleThreshold + 4*time.Second},
		// One that begins just before the claim is made is waited for without the claim,
		// which would have to be renewed.
		"save before its claim": {func(t *testing.T, f *fakeGCS) {
			f.atFirst(claim, func() { saving(t, f, bytes.NewReader(rest)) })
			time.AfterFunc(5*time.Second, func() { require.Empty(t, locks(f)) })
		}, 0, 0, 19 * time.Second, 24 * time.Second},
		// A claim that nobody renews any more is taken over, at once if it is stale, and
		// one that cannot be read, or is from the future, when GCS says it is.
		"stale claim":             {func(_ *testing.T, f *fakeGCS) { claimed(f, marked(time.Now().Add(-claimStale), "dead")) }, 1, 0, 0, time.Second},
		"claim that was given up": {func(_ *testing.T, f *fakeGCS) { claimed(f, marked(givenUp, "dead")) }, 1, 0, 0, time.Second},
		"claim without a marker":  {func(_ *testing.T, f *fakeGCS) { claimed(f, nil) }, 1, 0, 0, time.Second},
		"claim that says garbage": {func(_ *testing.T, f *fakeGCS) { claimed(f, map[string]string{keyInProgress: "soon"}) }, 1, 0,
			claimStale - 5*time.Second, claimStale + 5*time.Second},
		"claim of 2099": {func(_ *testing.T, f *fakeGCS) {
			claimed(f, marked(time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC), "dead"))
		}, 1, 0,
			claimStale - 5*time.Second, claimStale + 5*time.Second},
		// A version that is stored while a stale claim is taken over is not fetched.
		"stored during the takeover": {func(t *testing.T, f *fakeGCS) {
			claimed(f, marked(time.Now().Add(-claimStale), "dead"))
			f.atFirst(but(claim, first(1, claim)), func() { storeVersion(f, testModule, testVersion) }) // the first is refused
		}, 0, 0, 0, time.Second},
		// A claim that may still arrive beside a complete version is not fenced by another.
		"stored before a late claim": {func(t *testing.T, f *fakeGCS) {
			f.fault(fakegcs.PreconditionFailed, first(1, claim)) // the second of all
			f.atFirst(claim, func() { storeVersion(f, testModule, testVersion) })
			f.fault(fakegcs.StrayReset, first(1, claim))
		}, 0, 0, 0, time.Minute},
	}, func(t *testing.T, f *fakeGCS, test testCase) {
		test.found(t, f)
		o := &origin{}
		a := newReplica(f, o, "a")
		f.ResetLog()
		took := timeOf(func() { requireStash(t, a, testVersion, testVersion) })
		require.Equal(t, test.fetches, o.total())
		require.GreaterOrEqual(t, took, test.after)
		require.Less(t, took, test.until)
		if test.requests > 0 {
			require.Len(t, f.Log(), test.requests)
		}
		if f.count(on("", "", extZip)) > 0 { // it was saved
			requireComplete(t, f, testModule, testVersion)
		}
		requireExists(t, a.s, testVersion, true)
	})
}

// An answer that another has saved the version is success, and says which. Any other
// error is passed on as it is, with what came beside it.
func TestSingleFlightAnswers(t *testing.T) {
	own := &Error{Op: "gcs.Save", Kind: KindAlreadyExists, Module: testModule, Version: pseudoVersion, Err: errExists}
	nameless := &Error{Op: "gcs.Save", Kind: KindAlreadyExists, Module: testModule, Err: errExists}
	const asked, failed = "what was asked for", "no version"
	type testCase struct {
		err          error
		beside, want string
	}
	for name, test := range map[string]testCase{
		"own": {own, "", pseudoVersion}, "own, beside another version": {own, "beside", pseudoVersion},
		"wrapped":                         {fmt.Errorf("stash: %w", fmt.Errorf("save: %w", own)), "", pseudoVersion},
		"joined":                          {errors.Join(io.EOF, own), "", pseudoVersion},
		"two wrapped":                     {fmt.Errorf("%w: %w", io.EOF, own), "", pseudoVersion},
		"of Athens":                       {athensLike{"a", KindAlreadyExists, own}, "", pseudoVersion},
		"of Athens, a pointer":            {&athensLike{"a", KindAlreadyExists, own}, "", pseudoVersion},
		"of Athens, another kind outside": {athensLike{"a", KindUnexpected, athensLike{"b", KindUnexpected, own}}, "", pseudoVersion},
		"of another module":               {&Error{Kind: KindAlreadyExists, Module: "other", Version: pseudoVersion}, "", pseudoVersion},
		"of no version":                   {nameless, "", asked}, "of no version, beside one": {nameless, pseudoVersion, pseudoVersion},
		"failed, plain":              {errors.New("git: not found"), "beside", failed},
		"failed, own":                {&Error{Kind: KindNotFound, Err: io.EOF}, "beside", failed},
		"failed, wrapped":            {fmt.Errorf("fetch: %w", &Error{Kind: KindRateLimit}), "beside", failed},
		"failed, of Athens":          {&athensLike{"a", KindNotFound, io.EOF}, "beside", failed},
		"failed, of Athens, no ours": {&athensLike{"a", KindAlreadyExists, io.EOF}, "beside", failed},
		"failed, of Athens, alone":   {&athensLike{"a", KindAlreadyExists, nil}, "beside", failed},
		"failed repair":              {&Error{Kind: KindUnexpected, Module: testModule, Err: nameless}, "beside", failed},
		"failed, cancelled":          {context.Canceled, "beside", failed},
		"failed, says so by words":   {errors.New("409 already exists"), "beside", failed},
		"failed, exists":             {fs.ErrExist, "beside", failed},
	} {
		for _, vers := range []string{"master", testVersion} {
			run(t, name+" of "+vers, inFleet, func(t *testing.T, f *fakeGCS) {
				saved, err := f.storage("a").SingleFlight(answering(test.beside, test.err)).Stash(t.Context(), testModule, vers)
				switch test.want {
				case failed:
					require.True(t, err == test.err, "%v", err)
					require.Equal(t, test.beside, saved)
				case asked:
					returns(t, vers)(saved, err)
				default:
					returns(t, test.want)(saved, err)
				}
			})
		}
	}
}

// The whole way: two replicas are asked for a branch, and fetch it both.
func TestSingleFlightResolves(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		o := &origin{takes: time.Second}
		fleet := newFleet(f, o, 5)
		together(15, func(i int) { requireStash(t, fleet[i%5], "master", pseudoVersion) })
		require.Equal(t, 5, o.total())
		requireComplete(t, f, testModule, pseudoVersion)
	})
}

// If next ends its goroutine, its callers are told so. The claim is given back, and who
// comes next flies anew.
func TestSingleFlightNextExits(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		o := &origin{answer: func(string) (string, error) { runtime.Goexit(); return "", nil }}
		a := newReplica(f, o, "a")
		for i, vers := range []string{"master", testVersion, testVersion} {
			_, err := a.Stash(t.Context(), testModule, vers)
			require.ErrorIs(t, err, errGoexit)
			requireError(t, err, KindUnexpected, "gcs.Stash", testModule, vers)
			require.Equal(t, i+1, o.total())
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
			o := &origin{takes: time.Second, answer: func(string) (string, error) { return testVersion, nil }}
			a := newReplica(f, o, "a")
			together(10, func(int) { requireStash(t, a, query, testVersion) })
			require.Equal(t, 1, o.total())
			require.Equal(t, isOne, len(f.Log()) == 0)
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
				fleet := newFleet(f, o, n)
				together(n*2*versions, func(i int) { // two callers of each version on each replica
					vers := fmt.Sprintf("v1.0.%d", i%versions)
					requireStash(t, fleet[i/(2*versions)], vers, vers)
					requireComplete(t, f, testModule, vers)
				})
				require.Less(t, time.Since(start), o.takes+lastPoll)
				require.Equal(t, versions, f.count(func(r *fakegcs.Request) bool { return path.Ext(r.Object) == ".zip" && r.Applied }))
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
// once: they do not queue for what may exist nowhere. Each gets the answer of its own
// fetch, and no refusal of a claim, however many others were quicker.
func TestSingleFlightHolderFails(t *testing.T) {
	type testCase struct {
		once           bool
		n              int
		latency, takes time.Duration
	}
	cases := []testCase{{false, 24, 500 * time.Millisecond, 0}} // so that many are refused at once
	for _, n := range []int{2, 8, 32} {
		for _, latency := range []time.Duration{20 * time.Millisecond, 500 * time.Millisecond} {
			cases = append(cases, testCase{true, n, latency, 20 * time.Second}, testCase{false, n, latency, 20 * time.Second})
		}
	}
	forEach(t, inFleet, cases, func(t *testing.T, f *fakeGCS, test testCase) {
		f.SetLatency(test.latency)
		o := &origin{takes: test.takes, fail: func(call int) bool { return call == 1 || !test.once }}
		errs, took := stashAll(t, newFleet(f, o, test.n), 0)
		failed := requireGone(t, errs)
		require.Equal(t, test.n, o.total())
		require.Less(t, took, 2*o.takes+lastPoll+10*test.latency)
		if o.takes > 0 {
			require.Equal(t, test.n-1, o.most)
		}
		if test.once {
			require.Equal(t, 1, failed)
			requireComplete(t, f, testModule, testVersion)
		} else {
			require.Equal(t, test.n, failed)
			require.Empty(t, f.Names())
		}
	})
}

// requireGone checks that errors are errGone, and returns how many there are.
func requireGone(t *testing.T, errs []error) (n int) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			require.True(t, err == errGone, "%v", err)
			n++
		}
	}
	return n
}

// The same when it has saved for longer than a claim lives without renewals, and then
// fails: whether they waited for its claim first, or came during its save.
func TestSingleFlightSlowSaveFails(t *testing.T) {
	forEach(t, inFleet, []time.Duration{500 * time.Millisecond, 5 * time.Second}, func(t *testing.T, f *fakeGCS, late time.Duration) {
		start := time.Now()
		begun := make([]time.Duration, 4)
		together(4, func(i int) {
			s := f.storage(fmt.Sprint(i))
			if i > 0 {
				time.Sleep(late)
			}
			_, err := s.SingleFlight(stashFunc(func(ctx context.Context, _, vers string) (string, error) {
				begun[i] = time.Since(start)
				if i > 0 {
					time.Sleep(20 * time.Second)
					return vers, errGone
				}
				time.Sleep(time.Second)
				return vers, contentOf("a", 100).saveHalf(ctx, s, sleepReader(time.Minute), iotest.ErrReader(io.ErrUnexpectedEOF))
			})).Stash(t.Context(), testModule, testVersion)
			require.Error(t, err)
		})
		require.NotContains(t, begun[1:], time.Duration(0))
		require.Less(t, slices.Max(begun), time.Minute+time.Second+lastPoll)
	})
}

// A holder that dies in the middle of its fetch delays the others by a quarter of
// the threshold. One of them claims the version then; when that one fails, the
// others fetch at once.
func TestSingleFlightHolderCrashes(t *testing.T) {
	for _, n := range []int{2, 8, 32} {
		for _, successorFails := range []bool{false, true} {
			run(t, fmt.Sprint(n, successorFails), inCrowd, func(t *testing.T, f *fakeGCS) {
				o := &origin{takes: 5 * time.Second, fail: func(call int) bool { return successorFails && call == 2 }}
				fleet := newFleet(f, o, n)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				go fleet[0].Stash(ctx, testModule, testVersion)
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
			})
		}
	}
}

// A fetch that takes longer than the threshold keeps its claim. However short the
// threshold is, the claim is not renewed more than once a second.
func TestSingleFlightRenews(t *testing.T) {
	type testCase struct {
		takes, threshold time.Duration
		times            int
	}
	forNamed(t, inFleet, map[string]testCase{
		"beyond the threshold":  {10 * time.Minute, DefaultStaleThreshold, int(10 * time.Minute / (claimStale / renewals))},
		"not twice in a second": {10 * time.Second, 8 * time.Second, 10},
	}, func(t *testing.T, f *fakeGCS, test testCase) {
		f.EnforceRates(true)
		o := &origin{takes: test.takes}
		errs, _ := stashAll(t, newFleet(f, o, 2, WithStaleThreshold(test.threshold)), 0)
		requireNoErrors(t, errs)
		require.Equal(t, 1, o.total())
		require.InDelta(t, test.times, renewed(t, f, extClaim), 1)
	})
}

// renewed returns how often an object's marker was changed, and checks that it was
// not too often for GCS.
func renewed(t *testing.T, f *fakeGCS, ext string) (n int) {
	require.Zero(t, f.count(func(r *fakegcs.Request) bool { return r.Status == 429 }))
	return f.count(func(r *fakegcs.Request) bool { return on("", "patch", ext)(r) && r.Applied })
}

// A flight waits for 15 minutes, and no longer. It leaves the holder alone.
func TestSingleFlightWaitIsBounded(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		o := &origin{takes: 20 * time.Minute}
		fleet := newFleet(f, o, 2)
		together(2, func(i int) {
			if i == 0 {
				requireStash(t, fleet[0], testVersion, testVersion)
				return
			}
			time.Sleep(time.Second)
			start := time.Now()
			_, err := fleet[1].Stash(t.Context(), testModule, testVersion)
			requireError(t, err, KindGatewayTimeout, "gcs.Stash", testModule, testVersion)
			require.ErrorIs(t, err, context.DeadlineExceeded)
			require.Equal(t, 15*time.Minute, time.Since(start))
			require.Len(t, locks(f), 1)
		})
		require.Equal(t, 1, o.total())
		requireComplete(t, f, testModule, testVersion)
	})
}

// A holder that was thought dead goes on, and does no harm to its successor.
func TestSingleFlightSleeperWakes(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		o := &origin{takes: 5 * time.Minute}
		fleet := newFleet(f, o, 2)
		together(3, func(i int) {
			time.Sleep(time.Duration(i) * time.Second)
			if i < 2 {
				requireStash(t, fleet[i], testVersion, testVersion)
				return
			}
			fleet[0].Pause()
			time.Sleep(4 * time.Minute)
			holder := f.Get(objectName(extClaim))
			fleet[0].Resume()
			time.Sleep(75 * time.Second) // the first is done
			requireComplete(t, f, testModule, testVersion)
			now := f.Get(objectName(extClaim))
			require.NotNil(t, now)
			require.Equal(t, holder.Generation, now.Generation)
		})
		require.Equal(t, 2, o.total())
	})
}

// A claim is no part of a version that is saved or deleted. TestScanStates and TestCallsOnStates
// show what others see of claims.
func TestClaimIsInvisible(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		s := f.storage("a")
		f.Put(objectName(extClaim), nil, marked(time.Now(), "other")) // fresh
		for range 2 {
			require.True(t, Is(s.Delete(t.Context(), testModule, testVersion), KindNotFound))
			require.Less(t, timeOf(func() { require.NoError(t, saveVersion(t.Context(), s, testModule, testVersion)) }), time.Second)
			require.True(t, Is(saveVersion(t.Context(), s, testModule, testVersion), KindAlreadyExists))
			require.NoError(t, s.Delete(t.Context(), testModule, testVersion))
		}
		require.Len(t, locks(f), 1)
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
					require.NoError(t, saveVersion(t.Context(), s, testModule, testVersion))
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
		together(12, func(i int) { requireStash(t, fleet[i%4], testVersion, testVersion) })
		require.LessOrEqual(t, o.total(), len(fleet))
		require.Less(t, time.Since(start), 2*o.takes)
		for i, r := range fleet { // each has to find out for itself
			vers := fmt.Sprintf("v1.1.%d", i)
			start := time.Now()
			requireStash(t, r, vers, vers)
			require.Equal(t, 1, o.calls[ModuleVersion{testModule, vers}])
			require.Less(t, time.Since(start), 2*o.takes)
			require.Len(t, logs[i].lines(slog.LevelWarn), 1)
			require.Contains(t, logs[i].String(), "storage.objects.delete")
			f.ResetLog()
			requireStash(t, r, "v2.0.0", "v2.0.0")
			require.Zero(t, f.count(func(r *fakegcs.Request) bool { return strings.Contains(r.Object, ".lock") })) // it tries no more
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
		o := &origin{answer: func(vers string) (string, error) { return vers, nil }}
		a := newReplica(f, o, "a", log.option())
		for range 2 {
			together(3, func(i int) { // who find it out at the same time
				vers := fmt.Sprintf("v1.0.%d", i)
				requireStash(t, a, vers, vers)
			})
		}
		require.Equal(t, 6, o.total())
		require.Len(t, log.lines(slog.LevelWarn), 1)
		require.Contains(t, log.String(), "storage.objects.create")
		f.Allow("storage.objects.create")
		time.Sleep(claimsRetry)
		f.ResetLog()
		requireStash(t, a, testVersion, testVersion)
		require.Equal(t, 1, f.count(on("a", "insert", extClaim)))
	})
}

// A fetch that fails is told if nobody waits for it any more.
func TestSingleFlightFailsUnheard(t *testing.T) {
	forNamed(t, inFleet, map[string]time.Duration{"leaves": time.Second, "stays": time.Hour}, func(t *testing.T, f *fakeGCS, stays time.Duration) {
		var log syncedLog
		o := &origin{takes: time.Minute, fail: func(int) bool { return true }}
		_, err := newReplica(f, o, "a", log.option()).Stash(within(t, stays), testModule, testVersion)
		require.Error(t, err)
		time.Sleep(2 * time.Minute)
		require.Equal(t, stays < o.takes, strings.Contains(fmt.Sprint(log.lines(slog.LevelWarn)), "nobody waits"))
	})
}

// Whatever is answered to the delete of a claim, it is made again.
func TestSingleFlightInsists(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		refused := 0
		s := behind(f, func(r *http.Request) *http.Response {
			if r.Method == http.MethodDelete && refused < 5 {
				refused++
				return answer(http.StatusBadRequest, "not now")
			}
			return nil
		})
		requireStash(t, s.SingleFlight(answering(testVersion, nil)), testVersion, testVersion)
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
			for _, vers := range []string{"v1.0.0", "v1.0.1", "v1.0.2"} {
				requireStash(t, r, vers, vers)
			}
		}
		require.Less(t, time.Since(start), 10*time.Second)
		require.Equal(t, 3, o.total())
	})
}

// forEachRequest runs a test for each request of machine 0, which meets that fault, and
// returns how many there are.
func forEachRequest(t *testing.T, in arena, fault fakegcs.Fault, test func(t *testing.T, f *fakeGCS, n int, met *bool)) (n int) {
	for met := true; met; n++ {
		met = false
		in(t, func(t *testing.T, f *fakeGCS) {
			f.fault(fault, nth("0", n))
			f.before(nth("0", n), func() { met = true })
			test(t, f, n, &met)
		})
	}
	return n - 1
}

// Whatever befalls one request of one replica, also if its caller leaves, the
// version is fetched once and no claim remains.
func TestSingleFlightFaults(t *testing.T) {
	const threshold = 80 * time.Second
	for _, fault := range []fakegcs.Fault{fakegcs.ConnectionRefused, fakegcs.LostEOF, fakegcs.LostBody, fakegcs.Unavailable, fakegcs.Hung, fakegcs.HungApplied} {
		for _, leaves := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v leaves %v", fault, leaves), func(t *testing.T) {
				requests := forEachRequest(t, inFleet, fault, func(t *testing.T, f *fakeGCS, n int, _ *bool) {
					o := &origin{takes: threshold/claimFraction/renewals + time.Second} // with one renewal
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					if leaves {
						f.before(nth("0", n), func() { time.AfterFunc(time.Second, cancel) })
					}
					start := time.Now()
					fleet := newFleet(f, o, 2, WithStaleThreshold(threshold))
					together(2, func(i int) {
						time.Sleep(time.Duration(i) * time.Millisecond)
						saved, err := fleet[i].Stash([]context.Context{ctx, t.Context()}[i], testModule, testVersion)
						if err != nil && leaves && i == 0 {
							require.ErrorIs(t, err, context.Canceled, "at request %d", n)
							return
						}
						require.NoError(t, err, "at request %d", n)
						require.Equal(t, testVersion, saved, "at request %d", n)
					})
					require.Less(t, time.Since(start), o.takes+20*time.Second, "at request %d", n)
					requireComplete(t, f, testModule, testVersion)
					time.Sleep(releaseTimeout) // a flight without callers ends
					require.Equal(t, 1, o.total(), "at request %d", n)
				})
				require.Greater(t, requests, 7)
			})
		}
	}
}

// A crash before or after each request: the others proceed when the claim, or the
// marker of the save that was under way, is stale. A claim that is left beside a
// version that is stored is removed by the next flight, or by Repair.
func TestSingleFlightCrashes(t *testing.T) {
	t.Parallel()
	const threshold = 20 * time.Second
	for _, fault := range crashes {
		for _, repair := range some(true, false) {
			t.Run(fmt.Sprintf("%v repair %v", fault, repair), func(t *testing.T) {
				stayed := 0
				forEachRequest(t, inCrowd, fault, func(t *testing.T, f *fakeGCS, n int, met *bool) {
					o := &origin{takes: threshold/claimFraction/renewals + time.Second}
					fleet := newFleet(f, o, 2, WithStaleThreshold(threshold))
					ctx, cancel := context.WithCancel(t.Context())
					go fleet[0].Stash(ctx, testModule, testVersion)
					time.Sleep(time.Second)
					took := timeOf(func() { requireStash(t, fleet[1], testVersion, testVersion) })
					require.LessOrEqual(t, o.total(), 2)
					limit := o.takes
					if *met { // by now, or later
						limit += threshold + o.takes
					}
					require.Less(t, took, limit+5*time.Second, "at request %d", n)
					requireComplete(t, f, testModule, testVersion)
					stayed += len(locks(f))
					time.Sleep(threshold / claimFraction)
					if repair {
						returns(t, Complete)(fleet[1].s.Repair(t.Context(), testModule, testVersion))
					} else {
						requireStash(t, fleet[1], testVersion, testVersion)
					}
					require.Empty(t, locks(f), "at request %d", n)
					cancel()
					time.Sleep(time.Minute)
				})
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
		f.fault(fakegcs.Unavailable, on("", "delete", ""))
		start := time.Now()
		requireStash(t, newReplica(f, o, "a", log.option()), testVersion, testVersion)
		require.Less(t, time.Since(start), releaseTimeout+time.Second)
		require.Len(t, log.lines(slog.LevelWarn), 3, "two of its request")
		require.Contains(t, log.String(), `msg="could not delete a claim: others have to wait until it is stale" module=`+testModule+" version="+testVersion)
		f.onRequest(nil)
		requireStash(t, newReplica(f, o, "b"), testVersion, testVersion)
		require.Equal(t, 1, o.total())
		require.Len(t, locks(f), 1)
	})
}

// What a stash costs: beside the four requests and three trips of the Save that next makes,
// three requests one after another.
func TestSingleFlightCost(t *testing.T) {
	cheap, whole := []string{"insert", "list", "delete"}, files{extInfo: nil, extMod: nil, extZip: nil}
	type testCase struct {
		found files
		ops   []string
		trips int
	}
	forNamed(t, inFleet, map[string]testCase{
		"new version":                           {nil, []string{"insert", "list", "insert", "insert", "insert", "patch", "delete"}, 6},
		"complete version":                      {whole, cheap, 3},
		"complete version beside a stale claim": {with(whole, extClaim, marked(givenUp, "dead")), cheap, 3},
	}, func(t *testing.T, f *fakeGCS, test testCase) {
		stateCase{files: test.found}.put(f, testVersionName)
		requireStash(t, newReplica(f, &origin{}, "a"), testVersion, testVersion)
		require.Equal(t, test.ops, logged(f))
		require.Equal(t, test.trips, fakegcs.SerialTrips(f.Log()))
	})
}

// A claim that is renewed while somebody removes it as stale stays.
func TestStaleClaimIsRenewed(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		f.Put(objectName(extClaim), nil, marked(time.Now().Add(-claimStale), "other"))
		f.before(on("", "delete", ""), func() { f.SetMetadata(objectName(extClaim), marked(time.Now(), "other")) })
		_, err := f.storage("a").Repair(t.Context(), testModule, testVersion)
		require.NoError(t, err)
		require.Len(t, locks(f), 1)
	})
}

// A claim is deleted after its last renewal was answered, and nothing is said of one
// that is another's by then.
func TestClaimIsDeletedLast(t *testing.T) {
	forEach(t, inCrowd, []bool{false, true}, func(t *testing.T, f *fakeGCS, lost bool) {
		renewals, inFlight := 0, 0
		f.before(on("", "patch", extClaim), func() {
			renewals++
			inFlight++
			time.Sleep(2 * time.Second)
			inFlight--
		})
		f.before(on("", "delete", extClaim), func() {
			require.Zero(t, inFlight)
			if lost {
				f.Put(objectName(extClaim), nil, marked(time.Now(), "other"))
			}
		})
		var log syncedLog
		o := &origin{takes: claimStale/4 + time.Second}
		requireStash(t, newReplica(f, o, "a", log.option()), testVersion, testVersion)
		require.Equal(t, 1, renewals)
		require.Empty(t, log.String())
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
