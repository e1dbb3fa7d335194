package gcs

import (
	"bytes"
	"cmp"
	"context"
	"crypto/md5"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"cloud.google.com/go/storage"
	"github.com/googleapis/gax-go/v2"
	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs/internal/fakegcs"
	"github.com/athensgcs/gcs/internal/history"
)

const (
	stormModule = "example.com/storm"
	stormChunk  = 256 << 10
	stormSeeds  = 300
)

// Machines whose clocks and thresholds disagree save, delete and read a few
// versions at once, while requests and machines fail in every way. What they
// see, and what is in the bucket, is held against the invariants.
//
// GCS_STORM_SEEDS=5000 plays so many seeds, GCS_STORM_SEEDS=17-17 those from 17
// to 17. A seed decides all that happens but the pauses of the client in an upload in
// chunks, before it tries again: a seed that failed fails again.
func TestStorm(t *testing.T) {
	t.Parallel()
	from, to := uint64(1), uint64(stormSeeds)
	if testing.Short() {
		to /= 10
	}
	if v := os.Getenv("GCS_STORM_SEEDS"); v != "" {
		if !strings.Contains(v, "-") {
			v = "1-" + v
		}
		_, err := fmt.Sscanf(v, "%d-%d", &from, &to)
		require.NoError(t, err)
	}
	for seed := from; seed <= to; seed++ {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { newStorm(t, seed).run() })
		})
	}
}

// A seed played twice makes the same requests at the same time, and all of them end in the
// same way, until an upload in chunks pauses. Save ids are random, so they are numbered.
func TestStormReplays(t *testing.T) {
	if testing.Short() {
		t.Skip("what TestStorm plays, twice")
	}
	play := func(t *testing.T, seed uint64) (log []string) {
		synctest.Test(t, func(t *testing.T) {
			w := newStorm(t, seed)
			w.run()
			entries := w.f.Log()
			slices.SortFunc(entries, func(a, b fakegcs.Request) int {
				return cmp.Or(a.Start.Compare(b.Start), cmp.Compare(a.Machine, b.Machine), cmp.Compare(a.Op, b.Op), cmp.Compare(a.Object, b.Object), a.End.Compare(b.End))
			})
			failed := func(r fakegcs.Request) bool {
				return slices.Contains([]string{"start", "chunk", "query"}, r.Op) && (r.Fault != fakegcs.NoFault || r.Status == 0 || r.Status >= 400)
			}
			if i := slices.IndexFunc(entries, failed); i >= 0 {
				end := entries[i].End
				entries = slices.DeleteFunc(entries, func(r fakegcs.Request) bool { return r.End.After(end) })
			}
			ids := map[string]int{}
			for _, r := range entries {
				if id := r.Metadata[keySaveID]; id != "" {
					if ids[id] == 0 {
						ids[id] = len(ids) + 1
					}
					r.Metadata[keySaveID] = fmt.Sprint(ids[id])
				}
				r.N, r.MachineN = 0, 0 // in the same instant, anyone may be first
				log = append(log, fmt.Sprintf("%v to %v: %v %v, %d bytes for %d", r.Start.Sub(w.began), r.End.Sub(w.began), r, r.Metadata, r.Received, r.Sent))
			}
		})
		return log
	}
	for seed := range uint64(stormSeeds / 10) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			first, second := play(t, seed), play(t, seed)
			for i := range min(len(first), len(second)) {
				if first[i] != second[i] {
					t.Fatalf("one run:\n%s\n\nanother run:\n%s", strings.Join(first[max(0, i-8):min(len(first), i+4)], "\n"), strings.Join(second[max(0, i-8):min(len(second), i+4)], "\n"))
				}
			}
			require.Len(t, second, len(first))
		})
	}
}

type storm struct {
	t         *testing.T
	f         *fakeGCS
	seed      uint64
	rng       *rand.Rand // of the test's own goroutine
	began     time.Time
	calm      context.Context // ends when faults do
	rough     context.CancelFunc
	badness   float64 // how likely a request is to fail
	slowness  time.Duration
	threshold []time.Duration
	versions  []string

	mu       sync.Mutex
	order    int // of beginnings and ends
	history  map[string]history.History
	unlanded []*history.Observation // of which requests may still be on their way
	saves    int
	witness  *witness
	broken   []string
	group    sync.WaitGroup
	machines map[string]*stormMachine
	failures map[string]int // in a row, of requests that are alike
}

func newStorm(t *testing.T, seed uint64) *storm {
	rng := rand.New(rand.NewPCG(seed, 1))
	w := &storm{
		t: t, f: newFakeGCS(t), seed: seed, rng: rng, began: time.Now(),
		badness:   []float64{0, 0.02, 0.1, 0.25}[rng.IntN(4)],
		slowness:  []time.Duration{0, 50 * time.Millisecond, time.Second}[rng.IntN(3)],
		threshold: [][]time.Duration{{20 * time.Second}, {4 * time.Second, 30 * time.Second}, {time.Second, 10 * time.Second, time.Minute}}[rng.IntN(3)],
		history:   map[string]history.History{},
		witness:   newWitness(),
		machines:  map[string]*stormMachine{},
		failures:  map[string]int{},
	}
	for i := range 1 + rng.IntN(2) {
		w.versions = append(w.versions, fmt.Sprintf("v1.0.%d", i))
	}
	w.calm, w.rough = context.WithCancel(context.Background())
	return w
}

func (w *storm) run() {
	defer func() {
		for _, v := range w.f.Violations() {
			w.broken = append(w.broken, "a request breaks the protocol: "+v)
		}
		w.f.tolerate() // it is told here
		if len(w.broken) > 0 {
			w.print()
		}
	}()
	w.f.EnforceRates(w.rng.IntN(2) == 0)
	w.f.ShareRates(w.rng.IntN(2) == 0)
	w.f.SetPages([][]int{nil, {0, 1}, {2}, {3, 0, 0}}[w.rng.IntN(4)]...)
	if w.rng.IntN(2) == 0 {
		w.f.SmearListings(func(r *fakegcs.Request, name string, states int) int {
			return w.chance(r.Machine, r.Start, name).IntN(states)
		})
	}
	w.f.OnRequest(w.weather)
	w.f.OnAnswer(func(ctx context.Context, r *fakegcs.Request) {
		if r.Applied {
			w.inspect()
		}
		w.mu.Lock()
		if r.Status == http.StatusTooManyRequests || r.Status == http.StatusServiceUnavailable || r.Op == "chunk" && !r.Applied {
			w.failures[alike(r)]++
		} else {
			delete(w.failures, alike(r))
		}
		w.mu.Unlock()
		w.awake(ctx, r)
	})
	w.leaveBehind()
	machines := 2 + w.rng.IntN(9)
	if w.rng.IntN(2) == 0 {
		machines = 2 + w.rng.IntN(2)
	}
	for i := range machines {
		w.launch(fmt.Sprintf("m%d", i), rand.New(rand.NewPCG(w.seed, uint64(2+i))))
	}
	landings := rand.New(rand.NewPCG(w.seed, 1))
	w.group.Go(func() {
		for w.calm.Err() == nil {
			time.Sleep(time.Duration(landings.Int64N(int64(10 * time.Second))))
			w.land()
		}
	})

	time.Sleep(time.Duration(20+w.rng.IntN(40)) * time.Second)
	w.rough()
	w.group.Wait()
	w.land()
	w.clearUp()
}

// leaveBehind puts what an earlier time may have left.
func (w *storm) leaveBehind() {
	if w.rng.IntN(2) == 0 {
		return
	}
	c := contentOf("old", 50)
	w.witness.knows("old", c)
	for _, ext := range allExts {
		if w.rng.IntN(4) > 0 {
			mark := []map[string]string{nil, marked(time.Now(), "old"), marked(givenUp, "old"), marked(givenUp, "older"), {keyInProgressOld: "true"}}[w.rng.IntN(5)]
			w.f.putAs(c, ModuleVersion{stormModule, w.versions[0]}, time.Now().Add(-time.Minute), mark, map[string]string{keySaveID: "old"}, ext)
		}
	}
	w.inspect()
}

// A stormMachine is one that crashes, sooner or later, or survives.
type stormMachine struct {
	*storm
	*fakegcs.Machine
	s      *Storage
	steady bool // its zips can be read, and at once
	ctx    context.Context
	cancel context.CancelFunc
	asleep time.Time // until then
}

// newMachine returns a machine that keeps its own time and has its own ideas.
func (w *storm) newMachine(name string, skew time.Duration, opts ...Option) *stormMachine {
	m := &stormMachine{storm: w, Machine: w.f.Machine(name)}
	m.Bucket = m.Bucket.Retryer(storage.WithBackoff(gax.Backoff{Initial: 1, Max: 1}))
	m.s = NewStorage(m.Bucket, append(opts, WithChunkSize(stormChunk))...)
	m.s.now = func() time.Time { return time.Now().Add(skew) }
	m.s.bucket.rand = func(n time.Duration) time.Duration { return time.Duration(w.chance(name).Int64N(int64(n))) }
	m.ctx, m.cancel = context.WithCancel(context.Background())
	w.mu.Lock()
	defer w.mu.Unlock()
	w.machines[name] = m
	return m
}

// launch starts a machine, on which one or two callers do one thing after another.
func (w *storm) launch(name string, rng *rand.Rand) {
	threshold := w.threshold[rng.IntN(len(w.threshold))]
	skew := []time.Duration{0, time.Duration(rng.Int64N(int64(time.Minute))), time.Hour, -time.Hour}[rng.IntN(4)]
	m := w.newMachine(name, skew, WithStaleThreshold(threshold))
	for i := range 1 + rng.IntN(2) {
		rng := rand.New(rand.NewPCG(rng.Uint64(), uint64(i)))
		w.group.Go(func() {
			for n := 1 + rng.IntN(4); n > 0 && w.calm.Err() == nil && m.ctx.Err() == nil; n-- {
				time.Sleep(time.Duration(rng.Int64N(int64(time.Duration(1+rng.IntN(10)) * time.Second))))
				m.act(rng)
			}
		})
	}
}

// act makes a call.
func (m *stormMachine) act(rng *rand.Rand) {
	patience := 10 * time.Minute // a zip that hangs, hangs until its context ends
	if rng.IntN(8) == 0 {
		patience = time.Duration(rng.Int64N(int64(20 * time.Second)))
	}
	ctx, cancel := context.WithTimeout(m.ctx, patience)
	defer cancel()
	vers := m.versions[rng.IntN(len(m.versions))]
	switch n := rng.IntN(20); {
	case n < 11:
		m.save(ctx, vers, rng)
	case n < 14:
		m.exists(ctx, vers)
	case n < 15:
		m.list(ctx)
	case n < 18:
		m.read(ctx, []string{"Info", "GoMod", "Zip"}[rng.IntN(3)], vers)
	default:
		m.mustNotFail(ctx, m.observe("Delete", vers, func(o *history.Observation) error {
			o.Outcome = history.Deleted
			return m.s.Delete(ctx, stormModule, vers)
		}))
	}
}

func (m *stormMachine) exists(ctx context.Context, vers string) *history.Observation {
	o := m.observe("Exists", vers, func(o *history.Observation) error {
		ok, err := m.s.Exists(ctx, stormModule, vers)
		o.Outcome = map[bool]history.Outcome{true: history.Yes, false: history.No}[ok]
		return err
	})
	m.mustNotFail(ctx, o)
	return o
}

// observe makes a call and writes down what came of it. The call itself says
// what it means that there is no error.
func (m *stormMachine) observe(call, vers string, do func(o *history.Observation) error) *history.Observation {
	o := m.begin(&history.Observation{Who: m.Name, Call: call, Version: vers})
	seen := &history.Observation{}
	m.end(o, seen, do(seen))
	return o
}

// mustNotFail tells of a call that failed although it need not have.
func (m *stormMachine) mustNotFail(ctx context.Context, o *history.Observation) {
	fenced := o.Call == "Save" && errors.Is(o.Err, errFenced) && m.modChanges(o, "delete", "insert") > 0
	// A saver renews each second, and after a 429 a change waits as long.
	outrun := isPreconditionFailed(o.Err) && m.modChanges(o, "patch") >= maxRefused
	if o.Outcome == history.Failed && ctx.Err() == nil && !fenced && !outrun {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.report("a call fails without a reason:\n\t" + o.String())
	}
}

// modChanges counts the requests of those kinds that have changed the .mod during a call,
// but for its own inserts.
func (m *stormMachine) modChanges(o *history.Observation, ops ...string) (n int) {
	for _, r := range m.f.Log() {
		if r.Applied && slices.Contains(ops, r.Op) && (r.Op != "insert" || r.Machine != o.Who) &&
			strings.HasSuffix(r.Object, ModuleVersion{stormModule, o.Version}.object(extMod)) &&
			(r.End.IsZero() || !r.End.Before(m.began.Add(o.From))) && r.Start.Before(m.began.Add(o.Till)) {
			n++
		}
	}
	return n
}

func (w *storm) begin(o *history.Observation) *history.Observation {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.order++
	o.Start, o.End, o.From = w.order, history.EndOfTime, time.Since(w.began)
	w.history[o.Version] = append(w.history[o.Version], o)
	return o
}

func (m *stormMachine) end(o, seen *history.Observation, err error) {
	dead := m.Crashed()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.order++
	o.End, o.Till, o.Err = m.order, time.Since(m.began), err
	o.Outcome = seen.Outcome
	switch {
	case dead:
		o.Outcome = history.Crashed
	case Is(err, KindAlreadyExists) && o.Call == "Save":
		o.Outcome = history.Existed
	case Is(err, KindNotFound):
		o.Outcome = history.NotFound
	case err != nil:
		o.Outcome = history.Failed
	case o.Outcome == history.Got:
		o.Save = seen.Save
	}
	if o.Outcome == history.Crashed || o.Outcome == history.Failed {
		o.End = history.EndOfTime
		m.unlanded = append(m.unlanded, o)
	}
	m.report(m.history[o.Version].Check()...)
}

// land lets the requests arrive that are still on their way. After that, calls
// that are over have no more effect.
func (w *storm) land() {
	w.f.Land()
	w.inspect()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.order++
	for _, o := range w.unlanded {
		o.End = w.order
	}
	w.unlanded = nil
}

// report notes what is broken, once.
func (w *storm) report(broken ...string) {
	for _, b := range broken {
		if !slices.Contains(w.broken, b) {
			w.broken = append(w.broken, b)
		}
	}
}

var errStormReader = errors.New("the zip's reader failed")

func (m *stormMachine) save(ctx context.Context, vers string, rng *rand.Rand) *history.Observation {
	who, c := m.newContent(rng)
	o := &history.Observation{Who: m.Name, Call: "Save", Version: vers, Save: who, How: fmt.Sprintf("%d bytes", len(c.zip))}
	var zip io.Reader = bytes.NewReader(c.zip)
	lasts, breaks := true, false // whether it can be read twice, and not even once
	if rng.IntN(2) == 0 {
		zip, lasts = plain(zip), len(c.zip) <= stormChunk
		o.How += ", unseekable"
	}
	switch n := rng.IntN(10); {
	case m.steady:
	case n == 0:
		pause := time.Duration(rng.Int64N(int64(2 * m.s.staleThreshold())))
		zip, lasts = io.MultiReader(sleepReader(pause), zip), len(c.zip) <= stormChunk
		o.How += ", slow"
	case n == 1:
		half := bytes.NewReader(c.zip[:rng.IntN(len(c.zip)+1)])
		pause := time.Duration(rng.Int64N(int64(time.Second))) // not in the instant in which another request begins
		zip, breaks, lasts = io.MultiReader(half, sleepReader(pause), iotest.ErrReader(errStormReader)), true, half.Len() <= stormChunk
		o.How += ", broken"
	}
	m.begin(o)
	sum := md5.Sum(c.zip)
	err := m.s.Save(ctx, stormModule, vers, c.mod, zip, sum[:], c.info)
	m.end(o, &history.Observation{Outcome: history.Stored}, err)
	// Who was taken over, and cannot send the zip again, may have to give up.
	if lasts && !(breaks && errors.Is(err, errStormReader)) {
		m.mustNotFail(ctx, o)
	}
	return o
}

// newContent makes what a save stores.
func (w *storm) newContent(rng *rand.Rand) (who string, c content) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.saves++
	size := 20 + rng.IntN(2000) // shorter ones tell nobody whose they are
	if rng.IntN(12) == 0 {
		size = stormChunk + rng.IntN(2*stormChunk)
	}
	who = fmt.Sprint("save ", w.saves)
	c = contentOf(who, size)
	w.witness.knows(who, c)
	return who, c
}

func (m *stormMachine) list(ctx context.Context) {
	var os []*history.Observation
	for _, vers := range m.versions {
		os = append(os, m.begin(&history.Observation{Who: m.Name, Call: "List", Version: vers}))
	}
	list, err := m.s.List(ctx, stormModule)
	for _, o := range os {
		m.end(o, &history.Observation{Outcome: map[bool]history.Outcome{true: history.Yes, false: history.No}[slices.Contains(list, o.Version)]}, err)
	}
}

func (m *stormMachine) read(ctx context.Context, op, vers string) *history.Observation {
	o := m.observe(op, vers, func(o *history.Observation) error {
		data, err := readers[op](ctx, m.s, stormModule, vers)
		if err != nil {
			return err
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		o.Outcome, o.Save = history.Got, m.witness.whose[md5Of([]byte(data))]
		if o.Save == "" {
			m.report(fmt.Sprintf("%s: %s of %s is what nobody wrote: %.40q", m.Name, op, vers, data))
		}
		return nil
	})
	m.mustNotFail(ctx, o)
	return o
}

// chance returns numbers that depend on the seed, the time and what they are for.
// It does not matter what else happens in the same instant.
func (w *storm) chance(what ...any) *rand.Rand {
	hash := fnv.New64()
	fmt.Fprint(hash, append(what, time.Since(w.began))...)
	return rand.New(rand.NewPCG(w.seed, hash.Sum64()))
}

// backoff returns how long the network makes a request wait at the most: longer,
// the more requests like it have failed in a row. It takes the place of the
// client's own random pauses.
func (w *storm) backoff(r *fakegcs.Request) time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return time.Millisecond << min(w.failures[alike(r)], 10)
}

func alike(r *fakegcs.Request) string { return fmt.Sprint(r.Machine, r.Op, r.Object) }

// awake returns when the machine of a request does not sleep, each request at a
// time of its own.
func (w *storm) awake(ctx context.Context, r *fakegcs.Request) {
	for {
		w.mu.Lock()
		rest := time.Until(w.machines[r.Machine].asleep)
		w.mu.Unlock()
		if rest <= 0 || sleep(ctx, rest+time.Duration(w.chance(r.Machine, r.Op, r.Object, r.Start).Int64N(int64(time.Millisecond)))) != nil {
			return
		}
	}
}

// weather decides what happens to a request: a delay, a fault, a machine that
// sleeps or crashes.
func (w *storm) weather(ctx context.Context, r *fakegcs.Request) fakegcs.Fault {
	rng := w.chance(r.Machine, r.Op, r.Object)
	if sleep(ctx, time.Duration(rng.Int64N(int64(w.slowness+w.backoff(r))))) != nil {
		return fakegcs.NoFault
	}
	if w.calm.Err() != nil {
		w.awake(ctx, r)
		return fakegcs.NoFault
	}
	w.mu.Lock()
	m := w.machines[r.Machine]
	if bad := w.badness / 4; rng.Float64() < bad || r.Op == "chunk" && rng.Float64() < bad {
		m.asleep = time.Now().Add(time.Duration(rng.Int64N(int64(2 * w.threshold[rng.IntN(len(w.threshold))]))))
	}
	w.mu.Unlock()
	w.awake(ctx, r)
	badness, faults := w.badness, []fakegcs.Fault{fakegcs.ConnectionRefused, fakegcs.LostReset, fakegcs.LostEOF, fakegcs.LostBody, fakegcs.Unavailable, fakegcs.TooMany, fakegcs.Hung, fakegcs.HungApplied, fakegcs.Stray}
	switch {
	case r.Op == "chunk":
		faults = append(faults, fakegcs.HalfChunk, fakegcs.SessionGone, fakegcs.SessionNotFound)
	case r.Op == "get" && strings.HasSuffix(r.Object, "."+extZip) && badness > 0 && rng.IntN(2) == 0:
		// A stream breaks, and hangs when it is to go on.
		badness, faults = 1, []fakegcs.Fault{fakegcs.LostBody, fakegcs.Hung}
	}
	if rng.Float64() >= badness {
		return fakegcs.NoFault
	}
	if rng.IntN(8) == 0 {
		time.AfterFunc(time.Second, m.cancel) // nobody hears the calls' ends, but they have to end
		return []fakegcs.Fault{fakegcs.CrashBefore, fakegcs.CrashAfter}[rng.IntN(2)]
	}
	return faults[rng.IntN(len(faults))]
}

// inspect holds what is in the bucket against the invariants.
func (w *storm) inspect() {
	w.mu.Lock()
	defer w.mu.Unlock()
	objects := w.f.Objects()
	for _, vers := range w.versions {
		_, broken := w.witness.look(objects, ModuleVersion{stormModule, vers})
		w.report(broken...)
	}
}

// clearUp sees that all versions can still be saved, and read.
func (w *storm) clearUp() {
	const threshold = 20 * time.Second
	m := w.newMachine("last", 0, WithStaleThreshold(threshold))
	m.steady = true
	for _, vers := range w.versions {
		began := time.Now()
		o := m.save(m.ctx, vers, rand.New(rand.NewPCG(w.seed, 0)))
		// A clock that is ahead by less than the threshold makes for a marker
		// that is fresh for longer, and this save's own reader may pause for two.
		// The rest is for pauses after a 429.
		if took := time.Since(began); took > 4*threshold+15*time.Second {
			w.report(fmt.Sprintf("when all is calm, a save takes %v:\n\t%v", took, o))
		}
		files := []*history.Observation{m.exists(m.ctx, vers), m.read(m.ctx, "Info", vers), m.read(m.ctx, "GoMod", vers), m.read(m.ctx, "Zip", vers)}
		if !o.Says() || files[0].Outcome != history.Yes || slices.ContainsFunc(files[1:], func(o *history.Observation) bool { return o.Outcome != history.Got }) {
			w.report(fmt.Sprintf("when all is calm, a version cannot be had:\n\t%v\n\t%v", o, files))
		}
		w.report(w.history[vers].Check()...)
	}
	if requests, bodies := w.f.InFlight(); requests != 0 || bodies != 0 {
		w.report(fmt.Sprintf("%d requests and %d answers are left behind", requests, bodies))
	}
}

// print tells all that happened.
func (w *storm) print() {
	var b strings.Builder
	fmt.Fprintf(&b, "seed %d: %d machines, faults %v, delays %v, thresholds %v\n", w.seed, len(w.machines), w.badness, w.slowness, w.threshold)
	var all history.History
	for _, vers := range w.versions {
		all = append(all, w.history[vers]...)
	}
	slices.SortFunc(all, func(a, b *history.Observation) int { return a.Start - b.Start })
	for _, o := range all {
		fmt.Fprintln(&b, o)
	}
	for _, r := range w.f.Log() {
		fmt.Fprintf(&b, "%10v %v %v\n", r.Start.Sub(w.began).Round(time.Millisecond), r, r.Metadata)
	}
	w.t.Errorf("%s\n\nTo see it again: GCS_STORM_SEEDS=%d-%d go test -run TestStorm$\n\n%s", strings.Join(w.broken, "\n"), w.seed, w.seed, b.String())
}
