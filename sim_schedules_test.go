package gcs

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs/internal/explore"
	"github.com/athensgcs/gcs/internal/fakegcs"
)

// Schedules of the real code, explored.
//
// Every request of every actor stops before it is applied, and in split scenes again
// before its answer is delivered. When all goroutines are blocked, a choice is made: it
// releases a request, with or without a fault, or crashes a machine, cancels a call, lets
// time pass.
//
// Two paths lead to the same state if the bucket is the same and every actor was told
// the same: an actor is a function of what it was told, so what follows is the same.
// Save ids and generations differ from path to path. They are renamed in the order of
// their appearance. Two things are assumed of an actor: the order in which requests
// that are under way together are answered matters only if the actor does something in
// between; an actor that repeats its reads decides by the last answers.

// scheduleThreshold is the stale threshold of all actors. Requests time out and are
// sent again for 5 minutes, which is longer than the time to the next renewal.
const scheduleThreshold = 16 * time.Minute

// A scene is what is found in the bucket, who does what, and what may go wrong.
type scene struct {
	name   string
	quick  string // the faults with which it takes some seconds at most
	found  func(f *fakeGCS)
	roles  []role
	faults map[string]int // how often each may happen
	bound  int            // the most preemptions, 0 for any number
	split  bool           // the delivery of an answer is a choice of its own
	page   int            // the most objects in an answer to a list, 0 for all
	zip    int            // the size of a zip
}

// A role is a call of an actor.
type role struct {
	name, op string
	skew     time.Duration // of the actor's clock
}

// requestFaults are the faults of one request. The others are: crash and cancel, of an
// actor; stale, the threshold passes on all clocks; renew, time passes until a
// renewal is due.
var requestFaults = map[string]fakegcs.Fault{"lost": fakegcs.LostReset, "stray": fakegcs.StrayReset, "unmet": fakegcs.PreconditionFailed}

// An actor plays a role on a machine of its own.
type actor struct {
	role
	m       *fakegcs.Machine
	s       *Storage
	ctx     context.Context
	cancel  context.CancelFunc
	content content

	// guarded by rehearsal.mu
	counts                   map[string]int // of requests, by what they do
	ids                      int            // of saves
	told, fresh              []line         // fresh since the last choice
	result                   string         // of its calls
	done, crashed, cancelled bool
	failed                   bool            // Save returned an error before its version was stored
	saw                      map[string]bool // whose version was complete during the call
	always                   bool            // the version was complete during all of the call
}

// A line is an answer that an actor was told.
type line struct {
	request, said string
	sent, told    int  // after how many choices
	read          bool // the request changes nothing
	at            int  // how often anything had changed
	again         bool // it said the same before
}

func (l line) String() string { return l.request + " → " + l.said }

// An event is a request that waits for a choice.
type event struct {
	*fakegcs.Request
	key, what string // what it does; key is with its number
	actor     *actor
	sent      int                // after how many choices
	release   chan fakegcs.Fault // gets another when the answer is delivered, if that is a choice
	fault     fakegcs.Fault
	astray    bool   // it is on its way when its call is cancelled
	said      string // in answer, empty when there is none yet
}

func (e *event) changes() bool {
	return e.Op == "insert" || e.Op == "patch" || e.Op == "delete" || e.Op == "chunk"
}

// A rehearsal is one path through a scene. Only hooks and calls need the lock: choices
// are made when they are blocked.
type rehearsal struct {
	*scene
	f       *fakegcs.Server
	group   sync.WaitGroup // of calls
	over    chan struct{}  // closed at the end
	arrived chan struct{}  // gets a token when a request arrives or a call ends

	mu                       sync.Mutex
	free                     bool // requests do not stop any more
	actors                   []*actor
	events                   map[int]*event // by their numbers in the log
	pending, strays          []*event
	arrivals, chosen         int               // requests, choices
	changes, jumps, fetching int               // changes of the bucket and the clocks
	left                     map[string]int    // faults
	jumped                   atomic.Int64      // of all clocks, a time.Duration
	names                    map[string]string // of save ids and generations
	objects                  map[string]*fakegcs.Object
	witness                  *witness
	life                     life
	late                     bool // a .mod arrived after its call had ended and what was there was removed: its marker is fresh
	lives, broken, story     []string
}

func (r *rehearsal) report(format string, args ...any) {
	r.broken = append(r.broken, fmt.Sprintf(format, args...))
}

func (r *rehearsal) wake() {
	select {
	case r.arrived <- struct{}{}:
	default:
	}
}

// onRequest stops a request until it is chosen.
func (r *rehearsal) onRequest(ctx context.Context, q *fakegcs.Request) fakegcs.Fault {
	r.mu.Lock()
	a := r.actors[slices.IndexFunc(r.actors, func(a *actor) bool { return a.m.Name == q.Machine })]
	if id := q.Metadata[keySaveID]; id != "" && r.names[id] == "" {
		a.ids++
		r.names[id] = fmt.Sprint(a.name, a.ids)
	}
	if a.done && a.op != "Stash" { // a flight outlives its callers
		r.report("%s makes a request after its call: %v", a.name, q)
	}
	e := &event{Request: q, actor: a, sent: r.chosen, release: make(chan fakegcs.Fault, 1)}
	e.what = strings.TrimSpace(a.name + " " + q.Op + " " + q.Object[strings.LastIndexByte(q.Object, '.')+1:])
	if q.After != "" {
		e.what += " after " + q.After[strings.LastIndexByte(q.After, '.')+1:]
	}
	r.events[q.N] = e
	if r.free {
		r.mu.Unlock()
		return fakegcs.NoFault
	}
	a.counts[e.what]++
	e.key = strings.TrimSuffix(fmt.Sprint(e.what, " ", a.counts[e.what]), " 1")
	if !a.crashed {
		r.pending = append(r.pending, e)
		r.arrivals++
		r.wake()
	}
	r.mu.Unlock()
	select {
	case fault := <-e.release:
		return fault
	case <-r.over:
		return fakegcs.PreconditionFailed
	case <-ctx.Done():
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.drop(e)
	if errors.Is(ctx.Err(), context.DeadlineExceeded) { // it is sent again, so this leaves no trace
		a.counts[e.what]--
		r.arrivals--
		return fakegcs.Hung
	}
	r.tell(e, "abandoned")
	if !e.astray && (a.cancelled || r.left["stray"] == 0 || !e.changes() || a.crashed) {
		return fakegcs.Hung
	}
	if !e.astray {
		r.left["stray"]--
	}
	r.strays = append(r.strays, e)
	return fakegcs.Stray
}

func (r *rehearsal) drop(e *event) {
	r.pending = slices.DeleteFunc(r.pending, func(o *event) bool { return o == e })
}

// onAnswer takes down what a request has done, and stops the answer in split scenes.
func (r *rehearsal) onAnswer(ctx context.Context, q *fakegcs.Request) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.events[q.N]
	r.inspect(e)
	if r.free || e.key == "" {
		return
	}
	if e.said = r.answerAs(q); e.fault == fakegcs.LostReset {
		e.said = "lost"
	}
	if r.split && e.fault == fakegcs.NoFault {
		r.mu.Unlock()
		select {
		case <-e.release:
		case <-r.over:
		case <-ctx.Done():
		}
		r.mu.Lock()
		if ctx.Err() != nil {
			e.said = "abandoned"
		}
	}
	r.drop(e)
	r.tell(e, e.said)
}

// tell tells an actor an answer.
func (r *rehearsal) tell(e *event, said string) {
	l := line{request: r.requestAs(e), said: said, sent: e.sent, told: r.chosen, read: e.Op == "list" || e.Op == "attrs", at: r.changes}
	r.story = append(r.story, "    "+l.String())
	e.actor.fresh = append(e.actor.fresh, l)
}

// learn adds what an actor was told to what it knows. The order of answers that did
// not wait for each other does not matter.
func (a *actor) learn() {
	slices.SortFunc(a.fresh, func(l, m line) int {
		return cmp.Or(strings.Compare(l.String(), m.String()), cmp.Compare(l.sent, m.sent))
	})
	for _, l := range a.fresh {
		told := append(a.told, l)
		for i := len(told) - 1; i > 0 && told[i].sent < told[i-1].told && told[i].String() < told[i-1].String(); i-- {
			told[i-1], told[i] = told[i], told[i-1]
		}
		for n := 1; n <= 8 && 2*n <= len(told); n++ {
			before, now := told[len(told)-2*n:len(told)-n], told[len(told)-n:]
			if slices.EqualFunc(before, now, func(a, b line) bool { return a.read && a.request == b.request }) {
				now[n-1].again = slices.EqualFunc(before, now, func(a, b line) bool { return a.said == b.said && a.at == b.at })
				told = slices.Delete(told, len(told)-2*n, len(told)-n)
				break
			}
		}
		a.told = told
	}
	a.fresh = nil
}

// idles reports whether the request is a poll, and would see again what its actor has
// seen twice.
func (r *rehearsal) idles(e *event) bool {
	last := len(e.actor.told) - 1
	return !e.changes() && e.said == "" && last >= 0 && e.actor.told[last].again && e.actor.told[last].at == r.changes
}

func (r *rehearsal) requestAs(e *event) string {
	s := e.what
	for _, k := range slices.Sorted(maps.Keys(e.Cond)) {
		v := e.Cond[k]
		if k == "ifGenerationMatch" {
			v = r.names[v]
		}
		s += " " + strings.TrimSuffix(strings.TrimPrefix(k, "if"), "Match") + "=" + v
	}
	return s + r.metadataAs(e.Metadata)
}

func (r *rehearsal) answerAs(q *fakegcs.Request) string {
	s := fmt.Sprint(q.Status)
	for _, name := range slices.Sorted(maps.Keys(r.objects)) {
		if q.Status < 300 && (name == q.Object || q.Op == "list" && bytes.Contains(q.Body, []byte(`"`+name+`"`))) {
			s += r.objectAs(r.objects[name])
		}
	}
	if bytes.Contains(q.Body, []byte("nextPageToken")) {
		s += " …"
	}
	return s
}

func (r *rehearsal) objectAs(o *fakegcs.Object) string {
	return fmt.Sprintf(" %s/%d%s", r.names[fmt.Sprint(o.Generation)], o.Metageneration, r.metadataAs(o.Metadata))
}

// metadataAs tells of a marker's age how many renewals are overdue.
func (r *rehearsal) metadataAs(m map[string]string) (s string) {
	for _, k := range slices.Sorted(maps.Keys(m)) {
		v := m[k]
		if name, ok := r.names[v]; ok {
			v = name
		}
		if t, err := time.Parse(time.RFC3339Nano, v); err == nil {
			v = "given up"
			if t.After(givenUp) {
				v = fmt.Sprintf("%.0f", float64(time.Since(t)+time.Duration(r.jumped.Load()))/float64(scheduleThreshold/renewals))
			}
		}
		s += " " + k + ":" + v
	}
	return s
}

// inspect holds the bucket against the invariants, after a request.
func (r *rehearsal) inspect(e *event) {
	before, was := r.objects, r.life
	r.objects = r.f.Objects()
	if !maps.Equal(before, r.objects) {
		r.changes++
	}
	for _, name := range slices.Sorted(maps.Keys(r.objects)) {
		o := r.objects[name]
		gen, label := fmt.Sprint(o.Generation), r.names[o.Metadata[keySaveID]]+name[strings.LastIndexByte(name, '.'):]
		for n := 1; r.names[gen] == ""; n++ {
			if l := fmt.Sprint(label, "#", n); r.names[l] == "" {
				r.names[gen], r.names[l] = l, l
			}
		}
	}
	now, broken := r.witness.look(r.objects, testVersionName)
	r.life, r.broken = now, append(r.broken, append(broken, r.f.Violations()...)...)
	if was.of != "" && now != was && e.actor.op != "Delete" {
		r.report("the complete version of %s was changed: %s", was.of, e.key)
	}
	if mod := before[objectName(extMod)]; mod != nil && r.whose(extMod) == "" && e.actor.op == "Repair" {
		t, err := time.Parse(time.RFC3339Nano, mod.Metadata[keyInProgress])
		if err == nil && e.actor.s.now().Sub(t).Abs() < scheduleThreshold {
			r.report("%s removed a version in progress", e.actor.name)
		}
	}
	if now.of != "" && now != was {
		r.lives = append(r.lives, now.of)
	}
	for _, a := range r.actors {
		a.see(now)
		if a.failed && now.of == a.name {
			r.report("the version of %s is complete, and its Save has failed", now.of)
		}
	}
}

// see notes what is complete during the actor's call.
func (a *actor) see(now life) {
	a.always = a.always && now.of != ""
	if now.of != "" {
		a.saw[now.of] = true
	}
}

// whose returns who made an object, "" if it is not there.
func (r *rehearsal) whose(ext string) string {
	if o := r.objects[objectName(ext)]; o != nil {
		return r.witness.whose[o.MD5]
	}
	return ""
}

// start makes the calls of an actor, one after another.
func (r *rehearsal) start(a *actor, roles ...role) {
	r.group.Go(func() {
		defer r.wake()
		for _, do := range roles {
			r.play(a, do)
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		a.done = true
	})
}

// play makes the call of a role, and holds its result against the invariants.
func (r *rehearsal) play(a *actor, do role) {
	r.mu.Lock()
	a.saw, a.always = map[string]bool{}, true
	a.see(r.life)
	r.mu.Unlock()
	returned, err := calls[do.op](r, a)
	result := fmt.Sprint(returned)
	r.mu.Lock()
	defer r.mu.Unlock()
	if a.crashed {
		return
	}
	switch {
	case Is(err, KindAlreadyExists):
		result = "exists"
	case Is(err, KindNotFound):
		result = "not found"
	case err != nil:
		result = "an error"
		others := func(ext string) bool { return r.whose(ext) != a.name }
		a.failed = do.op == "Save" && slices.ContainsFunc(allExts, others) // a flight outlives its callers
		// The .mod is the save's own where its late create came after a Repair had removed another.
		late := r.left["stray"] < r.faults["stray"] && r.plays("Repair")
		fenced := errors.Is(err, errFenced) && (others(extMod) || late)
		if r.left["unmet"] == r.faults["unmet"] && !a.cancelled && !fenced {
			r.report("%s fails without a reason: %v", do.op, err)
		}
	}
	said := fmt.Sprintf("%s: %s returns %s", a.name, do.op, result)
	complete := result == "exists" || result == "true" || result == "complete" || result == "nil" && do.op == "Save"
	switch {
	case do.op == "Save" && result == "nil" && !a.saw[a.name]:
		r.report("%s, and its version was never complete", said)
	case complete && len(a.saw) == 0:
		r.report("%s, and no version was complete during the call", said)
	case complete && r.life.of == "" && !r.plays("Delete"):
		r.report("%s, and no version is complete", said)
	case a.always && (result == "false" || result == "not found" || result == "absent"):
		r.report("%s, and a version was complete all the time", said)
	}
	a.result += do.op + " " + result + ". "
	r.story = append(r.story, "    "+said)
}

// plays reports whether somebody in the scene makes that call.
func (r *rehearsal) plays(op string) bool {
	return slices.ContainsFunc(r.roles, func(do role) bool { return do.op == op })
}

// Choices returns all that can happen next, when every actor waits for it.
func (r *rehearsal) Choices() (choices []explore.Choice) {
	r.settle()
	add := func(fault, what, thread string, do func()) {
		if fault != "" && r.left[fault] == 0 {
			return
		}
		name := strings.TrimSpace(fault + " " + what)
		choices = append(choices, explore.Choice{Name: name, Thread: thread, Do: func() {
			r.story = append(r.story, name)
			r.chosen++
			if fault != "" {
				r.left[fault]--
			}
			do()
		}})
	}
	slices.SortFunc(r.pending, func(a, b *event) int { return strings.Compare(a.key, b.key) })
	polling := len(r.pending) > 0
	for _, e := range r.pending {
		if r.idles(e) {
			continue
		}
		polling = false
		release := func(fault fakegcs.Fault) func() { return func() { r.release(e, fault) } }
		if e.said != "" {
			add("", "answer "+e.key, e.actor.name, release(fakegcs.NoFault))
			continue
		}
		add("", e.key, e.actor.name, release(fakegcs.NoFault))
		for _, fault := range slices.Sorted(maps.Keys(requestFaults)) {
			if e.changes() {
				add(fault, e.key, e.actor.name, release(requestFaults[fault]))
			}
		}
	}
	for _, e := range r.strays {
		add("", "land "+e.key, "", func() { r.land(e) })
	}
	live := 0
	for _, a := range r.actors {
		if a.done || a.crashed {
			continue
		}
		live++
		add("crash", a.name, "", func() {
			a.crashed = true
			a.m.Crash()
			r.pending = slices.DeleteFunc(r.pending, func(e *event) bool { return e.actor == a })
		})
		if a.cancelled {
			continue
		}
		add("cancel", a.name, "", func() { a.cancelled = true; a.cancel() })
		for _, e := range r.pending {
			if e.actor == a && e.changes() && e.said == "" && r.left["stray"] > 0 {
				add("cancel", a.name+", stray "+e.key, "", func() {
					r.left["stray"]--
					a.cancelled, e.astray = true, true
					a.cancel()
				})
			}
		}
	}
	switch {
	case live == 0 && len(r.strays) > 0:
		add("", "end", "", func() { r.strays = nil })
	case live > 0 && polling:
		add("", "time passes", "", r.timePasses)
	case live > 0:
		add("stale", "", "", r.jump)
		add("renew", "", "", func() {
			before := r.arrivals
			r.sleepUntil(scheduleThreshold/renewals+time.Second, func() bool { return r.arrivals > before })
		})
	}
	return choices
}

// release lets a request go on, or its answer.
func (r *rehearsal) release(e *event, fault fakegcs.Fault) {
	if e.fault = fault; fault == fakegcs.StrayReset {
		r.strays = append(r.strays, e)
		r.drop(e)
		r.tell(e, "lost")
	}
	e.release <- fault
}

// land applies a request that went astray.
func (r *rehearsal) land(e *event) {
	r.strays = slices.DeleteFunc(r.strays, func(o *event) bool { return o == e })
	r.f.LandOne(slices.IndexFunc(r.f.Strays(), func(q fakegcs.Request) bool { return q.N == e.N }))
	before := r.objects[objectName(extMod)]
	r.inspect(e)
	r.late = r.late || (r.plays("Delete") || r.plays("Repair")) && e.actor.done && before == nil && r.objects[objectName(extMod)] != nil
}

// jump lets the stale threshold pass on all clocks. No request times out.
func (r *rehearsal) jump() {
	r.jumped.Add(int64(scheduleThreshold + scheduleThreshold/renewals))
	r.jumps++
	r.changes++
}

// timePasses is what happens when all actors poll: first to their clocks, and when
// that was not enough to their timers.
func (r *rehearsal) timePasses() {
	if r.jumps <= r.faults["stale"] {
		r.jump()
		return
	}
	r.jumps++
	for start := time.Now(); time.Since(start) <= scheduleThreshold; r.settle() {
		for _, e := range slices.Clone(r.pending) {
			if !r.idles(e) {
				return
			}
			r.release(e, fakegcs.NoFault)
			r.wait()
		}
	}
}

// settle lets time pass until every actor waits for a choice, or is done.
func (r *rehearsal) settle() {
	asleep := func(a *actor) bool {
		return !a.done && !a.crashed && !slices.ContainsFunc(r.pending, func(e *event) bool { return e.actor == a })
	}
	if !r.sleepUntil(scheduleThreshold/2, func() bool { return !slices.ContainsFunc(r.actors, asleep) }) {
		r.report("%s is stuck", r.actors[slices.IndexFunc(r.actors, asleep)].name)
	}
	for _, a := range r.actors {
		a.learn()
	}
}

// sleepUntil reports whether the condition was met in that time.
func (r *rehearsal) sleepUntil(limit time.Duration, met func() bool) bool {
	for end := time.After(limit); ; {
		r.wait()
		if met() {
			return true
		}
		r.mu.Unlock()
		select {
		case <-r.arrived:
			r.mu.Lock()
		case <-end:
			r.mu.Lock()
			return false
		}
	}
}

// wait returns when every actor is blocked. The explorer holds mu but while it waits.
// The clock moves a little with each choice. So two requests that are alike, of one
// actor, time out in the order in which they were sent, and a replay meets the same.
func (r *rehearsal) wait() {
	r.mu.Unlock()
	time.Sleep(time.Microsecond)
	synctest.Wait()
	r.mu.Lock()
}

func (r *rehearsal) State() string {
	lines := []string{fmt.Sprint(r.left, r.jumps, r.life.of, r.lives, r.late)}
	for _, name := range slices.Sorted(maps.Keys(r.objects)) {
		lines = append(lines, r.objectAs(r.objects[name]))
	}
	for _, a := range r.actors {
		lines = append(lines, fmt.Sprint(a.name, a.result, a.done, a.crashed, a.cancelled, a.failed))
		if !a.done && !a.crashed {
			lines = append(lines, fmt.Sprint(a.saw, a.always, a.told))
		}
	}
	pending := len(lines)
	for _, e := range r.pending {
		lines = append(lines, r.requestAs(e)+e.said)
	}
	slices.Sort(lines[pending:])
	for _, e := range r.strays {
		lines = append(lines, "stray "+r.requestAs(e))
	}
	return strings.Join(lines, "\n")
}

// rehearse sets a scene up.
func (sc *scene) rehearse() *rehearsal {
	r := &rehearsal{
		scene: sc, f: fakegcs.New(), over: make(chan struct{}), arrived: make(chan struct{}, 1), left: maps.Clone(sc.faults),
		events: map[int]*event{}, names: map[string]string{"0": "none", "old": "old", "other": "other"}, witness: newWitness(),
	}
	r.witness.knows("old", contentOf("old", 50))
	r.witness.knows("other", contentOf("other", 50))
	if sc.found != nil {
		sc.found(&fakeGCS{Server: r.f})
	}
	if sc.page > 0 {
		r.f.SetPages(sc.page)
	}
	r.inspect(nil)
	r.lives, r.broken = nil, nil
	for _, do := range sc.roles {
		r.add(do)
	}
	r.f.OnRequest(r.onRequest)
	r.f.OnAnswer(r.onAnswer)
	return r
}

func (r *rehearsal) add(do role) *actor {
	a := &actor{role: do, m: r.f.Machine(do.name), content: contentOf(do.name, max(r.zip, 20)), counts: map[string]int{}, saw: map[string]bool{}}
	r.witness.knows(do.name, a.content)
	a.ctx, a.cancel = context.WithCancel(context.Background())
	a.s = NewStorage(a.m.Bucket, WithStaleThreshold(scheduleThreshold), WithChunkSize(256<<10))
	a.s.now = func() time.Time { return time.Now().Add(do.skew + time.Duration(r.jumped.Load())) }
	a.s.bucket.rand = func(n time.Duration) time.Duration { return n / 2 } // a replay meets the same
	r.actors = append(r.actors, a)
	return a
}

// End checks, when all actors are done, that what they left does no harm.
func (r *rehearsal) End() {
	crashed := false
	for _, a := range r.actors {
		crashed = crashed || a.crashed
		owner := r.life.of == a.name || slices.Contains(r.lives, a.name) && !r.plays("Delete")
		if owner && a.op == "Save" && !a.crashed && !a.cancelled && r.left["unmet"] == r.faults["unmet"] && a.result != "Save nil. " {
			r.report("the version of %s was complete, and its call says: %s", a.name, a.result)
		}
	}
	if requests, bodies := r.f.InFlight(); !crashed && len(r.f.Strays()) == 0 && requests+bodies > 0 {
		r.report("%d requests and %d bodies are left", requests, bodies)
	}
	if crashed || r.late {
		r.jump()
	}
	r.free = true
	last := r.add(role{"last", "Save", 0})
	r.start(last, last.role, role{"last", "Exists", 0})
	if !r.sleepUntil(10*time.Second, func() bool { return last.done }) {
		r.report("a save that follows has not ended in 10 s")
		return
	}
	if last.result != "Save nil. Exists true. " && last.result != "Save exists. Exists true. " {
		r.report("then: %s", last.result)
	}
	for len(r.f.Strays()) > 0 {
		r.land(r.events[r.f.Strays()[0].N])
	}
}

func (r *rehearsal) Err() error {
	if len(r.broken) == 0 {
		return nil
	}
	return errors.New(strings.Join(append(r.broken, r.story...), "\n"))
}

// end ends all that is under way. Every request is refused.
func (r *rehearsal) end() {
	r.f.OnRequest(func(context.Context, *fakegcs.Request) fakegcs.Fault { return fakegcs.PreconditionFailed })
	r.f.OnAnswer(nil)
	close(r.over)
	for _, a := range r.actors {
		a.cancel()
	}
	r.group.Wait()
	time.Sleep(time.Hour) // a flight outlives its callers
	r.f.Close()
}

// search returns the search of a scene, within its bound of preemptions, and the story of
// the last run.
func (sc *scene) search(t *testing.T) (s *explore.Search, story func() []string) {
	var r *rehearsal
	return explore.New(func(follow func(explore.Program)) {
		synctest.Test(t, func(t *testing.T) {
			r = sc.rehearse()
			defer r.end()
			r.mu.Lock()
			defer r.mu.Unlock()
			for _, a := range r.actors {
				r.start(a, a.role)
			}
			follow(r)
		})
	}, sc.bound), func() []string { return r.story }
}

// explore visits the schedules of a scene, in so many runs and that time at most, and
// reports whether that was enough.
func (sc *scene) explore(t *testing.T, runs int, limit time.Duration) bool {
	s, _ := sc.search(t)
	s.Explore(runs, limit)
	t.Log(sc.name+":", s)
	if s.Err != nil {
		t.Errorf("%v\nTo replay it:\n  GCS_SCHEDULE='%s' go test -v -run '%s$' .", s.Err, strings.Join(s.Path, "; "), t.Name())
	}
	require.NoError(t, s.Diverged)
	return s.Exhausted() || s.Err != nil
}

// replay follows a path through a scene, and then the first choice of each state.
func (sc *scene) replay(t *testing.T, path []string) {
	s, story := sc.search(t)
	s.Replay(path)
	t.Log(strings.Join(story(), "\n"))
	require.NoError(t, s.Diverged)
	require.NoError(t, s.Err)
}

// calls are what a role can do.
var calls = map[string]func(r *rehearsal, a *actor) (result any, err error){
	"Save":   func(_ *rehearsal, a *actor) (any, error) { return "nil", a.content.save(a.ctx, a.s) },
	"Exists": func(_ *rehearsal, a *actor) (any, error) { return a.s.Exists(a.ctx, testModule, testVersion) },
	"Delete": func(_ *rehearsal, a *actor) (any, error) { return "nil", a.s.Delete(a.ctx, testModule, testVersion) },
	"Repair": func(_ *rehearsal, a *actor) (any, error) { return a.s.Repair(a.ctx, testModule, testVersion) },
	"List": func(_ *rehearsal, a *actor) (any, error) {
		versions, err := a.s.List(a.ctx, testModule)
		return len(versions) == 1, err
	},
	// Stash fetches in a single flight. No two fetch at the same time, if no time passes.
	"Stash": func(r *rehearsal, a *actor) (any, error) {
		_, err := a.s.SingleFlight(stashFunc(func(ctx context.Context, _, vers string) (string, error) {
			count := func(n int) {
				r.mu.Lock()
				defer r.mu.Unlock()
				if r.fetching += n; r.fetching > 1 && r.jumps == 0 && r.faults["renew"] == 0 && !slices.ContainsFunc(r.roles, func(do role) bool { return do.skew != 0 }) {
					r.report("two fetch at the same time")
				}
			}
			count(1)
			defer count(-1)
			return vers, a.content.save(ctx, a.s)
		})).Stash(a.ctx, testModule, testVersion)
		return "true", err
	},
}

const wrong = 100 * time.Hour // of a clock

func scenes() []scene {
	a, b, c, d := role{"a", "Save", 0}, role{"b", "Save", 0}, role{"c", "Save", 0}, role{"d", "Delete", 0}
	ahead, behind, e := role{"b", "Save", wrong}, role{"a", "Save", -wrong}, role{"e", "Exists", wrong}
	l, r, s := role{"l", "List", 0}, role{"r", "Repair", 0}, role{"s", "Repair", 0}
	flight, other := role{"a", "Stash", 0}, role{"b", "Stash", 0}
	stale := marked(time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC), "old")
	complete := leftBehind(nil, "old", extInfo, extMod, extZip)
	unfinished := leftBehind(stale, "old", extInfo, extMod, extZip)
	abandoned := leftBehind(stale, "old", extInfo, extMod)
	mixed := leftBehind(stale, "other", extInfo, extMod, extZip)
	partial := leftBehind(nil, "", extInfo, extMod)
	headless := leftBehind(nil, "old", extInfo, extZip)
	return []scene{
		{name: "a saver", quick: " lost stray unmet crash cancel cancel+stray stale renew", roles: []role{a}},
		{name: "a saver, split", split: true, roles: []role{a}},
		{name: "two savers", quick: " lost crash cancel", roles: []role{a, b}},
		{name: "two savers, split", quick: "-", split: true, roles: []role{a, b}},
		{name: "three savers", quick: "-", bound: 3, roles: []role{a, b, c}},
		{name: "two savers, one's clock ahead", roles: []role{a, ahead}},
		{name: "two savers who take each other for stale", quick: "-", roles: []role{behind, ahead}},
		{name: "two savers, a complete version", roles: []role{a, b}, found: complete},
		{name: "two savers, an unfinished version", roles: []role{a, b}, found: unfinished},
		{name: "two savers, an abandoned version", roles: []role{a, b}, found: abandoned},
		{name: "two savers, a version without .mod", roles: []role{a, b}, found: headless},
		{name: "two savers in pages of one", quick: "-", page: 1, roles: []role{a, ahead}},
		{name: "two savers in pages of one, a lone .zip", page: 1, roles: []role{a, ahead}, found: leftBehind(nil, "old", extZip)},
		{name: "two savers in pages of one, a claim", page: 1, roles: []role{a, ahead}, found: leftBehind(stale, "", extClaim)},
		{name: "two savers in pages of one, a partial version", page: 1, roles: []role{a, b}, found: partial},
		{name: "saver and deleter", roles: []role{a, d}},
		{name: "saver and deleter, a complete version", roles: []role{a, d}, found: complete},
		{name: "saver and deleter, a version without .mod", roles: []role{a, d}, found: headless},
		{name: "saver and two deleters", quick: "-", bound: 3, roles: []role{a, d, {"e", "Delete", 0}}},
		{name: "two savers and deleter", quick: "-", bound: 3, roles: []role{a, b, d}},
		{name: "two savers, one's clock ahead, and deleter", quick: "-", bound: 3, roles: []role{a, ahead, d}},
		{name: "saver and finisher", quick: " lost stray unmet crash cancel stale renew", roles: []role{a, e}},
		{name: "saver and finisher, split", split: true, roles: []role{a, e}},
		{name: "saver in chunks and finisher", quick: "-", zip: 256<<10 + 1, roles: []role{a, e}},
		{name: "saver, finisher and deleter", quick: "-", bound: 3, roles: []role{a, e, d}},
		{name: "saver and Exists, an abandoned version", roles: []role{a, e}, found: abandoned},
		{name: "saver, Exists and deleter, an unfinished version", quick: "-", bound: 3, roles: []role{a, e, d}, found: unfinished},
		{name: "saver and List in pages of one", page: 1, roles: []role{a, l}},
		{name: "saver and List in pages of one, a partial version", page: 1, roles: []role{a, l}, found: partial},
		{name: "saver and List in pages of one, an unfinished version", page: 1, roles: []role{a, l}, found: unfinished},
		{name: "saver and Repair", roles: []role{a, {"r", "Repair", wrong}}},
		{name: "saver and Repair, a partial version", roles: []role{a, r}, found: partial},
		{name: "saver and Repair, objects of two saves", roles: []role{a, r}, found: mixed},
		{name: "saver and Repair, an unfinished version", roles: []role{a, r}, found: unfinished},
		{name: "saver and two Repairs, an abandoned version", quick: "-", bound: 3, roles: []role{a, r, s}, found: abandoned},
		{name: "deleter and Repair, an abandoned version", roles: []role{d, r}, found: abandoned},
		{name: "deleter and Repair, an unfinished version", roles: []role{d, r}, found: unfinished},
		{name: "two flights", roles: []role{flight, other}},
		{name: "two flights, one's clock ahead", quick: "-", roles: []role{flight, {"b", "Stash", wrong}}},
	}
}

func TestSchedules(t *testing.T) {
	t.Parallel()
	path, replay := os.LookupEnv("GCS_SCHEDULE")
	all := replay || os.Getenv("GCS_SCHEDULES") == "all"
	limit, _ := time.ParseDuration(os.Getenv("GCS_SCHEDULES_LIMIT"))
	runs := 250 // a larger scene is cut off, and says so
	switch {
	case all:
		runs = 0
	case testing.Short():
		runs = 10
	}
	for _, sc := range scenes() {
		for _, fault := range []string{"", "lost", "stray", "unmet", "crash", "cancel", "cancel+stray", "stale", "renew"} {
			if !all && !slices.Contains(strings.Split(sc.quick, " "), fault) {
				continue
			}
			sc := sc
			sc.faults = map[string]int{}
			if fault != "" {
				sc.name += ", " + fault
				for f := range strings.SplitSeq(fault, "+") {
					sc.faults[f] = 1
				}
			}
			t.Run(sc.name, func(t *testing.T) {
				t.Parallel()
				if replay {
					sc.bound = 0
					sc.replay(t, strings.Split(path, "; "))
					return
				}
				exhausted := sc.explore(t, runs, limit)
				for sc.bound = 1; all && !exhausted && sc.bound < 10 && !t.Failed(); sc.bound++ {
					if !sc.explore(t, runs, limit) {
						return
					}
				}
			})
		}
	}
}
