// Package fakegcs is a Google Cloud Storage bucket in memory, for tests.
//
// The bucket keeps what GCS documents: conditions on every request, generations
// and metagenerations, clearing of metadata, resumable uploads, checksums,
// partial responses, permissions, rate limits. It loses requests and answers on
// demand, and reports requests that break the rules of a save: a change without
// a condition, a write over an object of a complete version.
//
// Where the documentation leaves a choice, the bucket takes the less convenient
// one. Idempotency tokens are ignored: a create that is repeated after its answer
// was lost is refused. The conditions of a resumable upload are checked when it is
// finalized, not when it starts.
//
// A Server does not listen, starts no goroutine, and waits on nothing but timers,
// contexts and its hooks. It works in a testing/synctest bubble.
package fakegcs

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"

	"cloud.google.com/go/storage"
	"google.golang.org/api/option"
)

// Bucket is the only bucket of a Server.
const Bucket = "modules"

// Server holds one bucket. Its methods may be called at any time, by hooks too.
type Server struct {
	closed chan struct{}

	mu         sync.Mutex
	objects    map[string]*Object
	sorted     []string // the names of objects
	sessions   map[string]*session
	generation int64 // the last one given
	entries    []*Request
	unlogged   bool
	strays     []*call
	bodies     int // answers whose body is not closed yet
	machines   map[string]*Machine

	requestHook func(context.Context, *Request) Fault
	answerHook  func(context.Context, *Request)
	latency     time.Duration

	denied            map[string]bool
	permissionsStatus int
	retained          bool
	pageSizes         []int
	pickState         func(r *Request, name string, states int) int
	changes           []change // since pickState was set

	rates       bool
	ratesShared bool
	changed     map[string]time.Time // last change of a kind and a name, or of a name
	broken      []string
	rateBroken  []string
}

// Object is one state of one object. A change of the object makes a new Object;
// nobody may change one.
type Object struct {
	Name                       string
	Data                       []byte
	MD5, CRC32C                string // in base64
	Metadata                   map[string]string
	Generation, Metageneration int64
	Created, Updated           time.Time
	ContentType                string

	headers map[string]string // contentEncoding, cacheControl, …
}

// change is what an object was before a change of it, nil for absent.
type change struct {
	name   string
	before *Object
}

// Machine is one user of the bucket.
type Machine struct {
	Name   string
	Client *storage.Client
	Bucket *storage.BucketHandle

	fake *Server
	// guarded by fake.mu
	requests int
	crashed  bool
	paused   chan struct{} // closed by Resume; nil when running
}

// Request is one HTTP request.
type Request struct {
	N        int    // in the log
	MachineN int    // of this machine
	Machine  string // its name
	// Op is insert (upload in one request), start (of a resumable session),
	// chunk, query (of the session's state), patch, delete, get (media),
	// attrs, list, permissions, bucket, or unknown.
	Op             string
	Object         string            // or the prefix of a list
	After          string            // the object after which the page of a list begins, if it is not the first
	Cond           map[string]string // ifGenerationMatch and its like; a chunk has its session's
	Metadata       map[string]string // user metadata sent
	Start, End     time.Time         // End is zero while in flight
	Status         int               // answered; 0 for none
	Applied        bool              // it changed an object
	Sent, Received int64             // bytes of the bodies
	Fault          Fault
	Body           []byte // of the answer; only OnAnswer sees it
}

func (r Request) String() string {
	s := fmt.Sprintf("#%d %s %s %q", r.N, r.Machine, r.Op, r.Object)
	for _, k := range slices.Sorted(maps.Keys(r.Cond)) {
		s += fmt.Sprintf(" %s=%s", k, r.Cond[k])
	}
	s += fmt.Sprintf(" → %d", r.Status)
	if r.Applied {
		s += " applied"
	}
	if r.Fault != NoFault {
		s += " " + r.Fault.String()
	}
	return s
}

// Fault is what goes wrong with a request: whether it is applied, and what its
// sender sees.
type Fault int

const (
	NoFault            Fault = iota
	ConnectionRefused        // not applied; connection refused
	LostReset                // applied; connection reset by peer
	LostEOF                  // applied; io.EOF, the connection closed with no answer
	LostBody                 // applied; the answer's body breaks off midway with io.ErrUnexpectedEOF
	Unavailable              // not applied; 503
	TooMany                  // not applied; 429
	Hung                     // not applied; no answer until the context ends
	HungApplied              // applied; no answer until the context ends
	CrashBefore              // not applied; the machine crashes
	CrashAfter               // applied; the machine crashes
	PreconditionFailed       // not applied; 412, as of a condition
	Stray                    // no answer until the context ends; applied by Land
	StrayReset               // connection reset by peer; applied by Land
	// Of a resumable upload:
	HalfChunk       // half of the chunk is persisted; 308 with a Range that says so
	SessionGone     // not applied; 410, and so is every other request of the session
	SessionNotFound // not applied; 404, and so is every other request of the session
)

func (k Fault) String() string {
	return [...]string{"NoFault", "ConnectionRefused", "LostReset", "LostEOF", "LostBody", "Unavailable", "TooMany", "Hung", "HungApplied", "CrashBefore", "CrashAfter", "PreconditionFailed", "Stray", "StrayReset", "HalfChunk", "SessionGone", "SessionNotFound"}[k]
}

// New returns an empty bucket.
func New() *Server {
	return &Server{
		closed:   make(chan struct{}),
		objects:  map[string]*Object{},
		sessions: map[string]*session{},
		machines: map[string]*Machine{},
		denied:   map[string]bool{},
		changed:  map[string]time.Time{},
	}
}

// Close closes all clients. Requests that wait for something fail, and no
// further one is applied.
func (f *Server) Close() {
	close(f.closed)
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, m := range f.machines {
		if m.Client != nil {
			m.Client.Close()
		}
	}
}

// Machine returns a machine with a client. The name is for the log.
func (f *Server) Machine(name string, opts ...option.ClientOption) *Machine {
	m := f.Register(name)
	m.Connect(m, opts...)
	return m
}

// Register returns a machine without a client.
func (f *Server) Register(name string) *Machine {
	m := &Machine{Name: name, fake: f}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.machines[name] = m
	return m
}

// Connect gives the machine a client whose requests go through transport. It is
// the machine itself or leads there.
func (m *Machine) Connect(transport http.RoundTripper, opts ...option.ClientOption) {
	client, err := storage.NewClient(context.Background(), append([]option.ClientOption{
		option.WithHTTPClient(&http.Client{Transport: transport}),
		option.WithoutAuthentication(),
	}, opts...)...)
	if err != nil {
		panic(err) // the options contradict each other
	}
	m.Client, m.Bucket = client, client.Bucket(Bucket)
}

// Crash ends the machine. No request of it is applied any more, none in flight is
// answered. They block until their contexts end.
func (m *Machine) Crash() {
	m.fake.mu.Lock()
	defer m.fake.mu.Unlock()
	m.crashed = true
}

// Pause holds the machine's requests before they are applied, and the answers of
// those that were, until Resume.
func (m *Machine) Pause() {
	m.fake.mu.Lock()
	defer m.fake.mu.Unlock()
	if m.paused == nil {
		m.paused = make(chan struct{})
	}
}

// Resume ends a Pause.
func (m *Machine) Resume() {
	m.fake.mu.Lock()
	defer m.fake.mu.Unlock()
	if m.paused != nil {
		close(m.paused)
		m.paused = nil
	}
}

// Crashed reports whether the machine has crashed.
func (m *Machine) Crashed() bool {
	m.fake.mu.Lock()
	defer m.fake.mu.Unlock()
	return m.crashed
}

// OnRequest sets a hook that is called before each request is applied, and
// decides its fault. The request waits for the hook. ctx is the context of the
// request: if it has ended when the hook returns, the request is not applied,
// strays apart. Hooks run concurrently, each with a copy of the log entry.
func (f *Server) OnRequest(hook func(ctx context.Context, r *Request) Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.requestHook = hook
}

// OnAnswer sets a hook that is called after each request was carried out, before
// its answer is delivered or lost. The answer waits for the hook. The copy of the
// Log entry has the status and the body of the answer.
func (f *Server) OnAnswer(hook func(ctx context.Context, r *Request)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answerHook = hook
}

// Strays returns the requests that went astray and did not land, in the order in
// which they were lost.
func (f *Server) Strays() []Request {
	f.mu.Lock()
	defer f.mu.Unlock()
	strays := make([]Request, len(f.strays))
	for i, c := range f.strays {
		strays[i] = *c.Request
	}
	return strays
}

// LandOne applies the i-th of Strays, whatever has become of its sender.
func (f *Server) LandOne(i int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.land(i)
}

// Land applies all Strays in their order.
func (f *Server) Land() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for len(f.strays) > 0 {
		f.land(0)
	}
}

func (f *Server) land(i int) {
	c := f.strays[i]
	f.strays = slices.Delete(f.strays, i, i+1)
	c.Applied = f.apply(c).applied
}

// SetLatency sets the time of one round trip, half of which passes before a
// request is applied.
func (f *Server) SetLatency(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.latency = d
}

// Log returns the requests so far, in the order of their arrival.
func (f *Server) Log() []Request {
	f.mu.Lock()
	defer f.mu.Unlock()
	log := make([]Request, len(f.entries))
	for i, e := range f.entries {
		log[i] = *e
	}
	return log
}

// ResetLog empties the log. Numbering starts again from 0.
func (f *Server) ResetLog() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.entries = nil
	for _, m := range f.machines {
		m.requests = 0
	}
}

// DiscardLog ends the log: requests from now on are not in it. A Server that runs for
// long does not grow by its requests then.
func (f *Server) DiscardLog() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.unlogged = true
}

// InFlight counts the requests of the log that have no end yet, and the answers
// whose body nobody closed: both are 0 when nothing was left behind.
func (f *Server) InFlight() (requests, bodies int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, e := range f.entries {
		if e.End.IsZero() {
			requests++
		}
	}
	return requests, f.bodies
}

// EnforceRates makes a second data write to one name, or a second metadata
// update of one object, within one second fail with 429.
func (f *Server) EnforceRates(on bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rates = on
}

// ShareRates makes the creates, the updates and the deletes of one object share a
// rate of one a second, as the text of GCS' 429 suggests, where each kind but the
// deletes has a rate of its own otherwise.
func (f *Server) ShareRates(on bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ratesShared = on
}

// SetPages limits the pages of each listing: the first has at most sizes[0] objects,
// and so on, and after the last of the sizes it begins anew. A page of size 0 is empty
// and has a token. One of the sizes has to be positive. Without sizes, there is no
// limit but that of GCS.
func (f *Server) SetPages(sizes ...int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pageSizes = sizes
}

// SmearListings makes a page of a listing show each object as it was at a moment of
// its own, between the arrival of the request and its application. pick chooses which
// of the states that a name had in that time, the last of which it has at the end. It
// must not call the Server. Without pick, a page shows all objects at one moment.
func (f *Server) SmearListings(pick func(r *Request, name string, states int) int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pickState, f.changes = pick, nil
}

// Deny takes permissions away from everybody.
func (f *Server) Deny(permissions ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range permissions {
		f.denied[p] = true
	}
}

// Allow gives back what Deny took.
func (f *Server) Allow(permissions ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range permissions {
		delete(f.denied, p)
	}
}

// AnswerPermissions makes every question for permissions fail with a status,
// like a server that does not know the request; 0 answers it again.
func (f *Server) AnswerPermissions(status int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.permissionsStatus = status
}

// Retain puts the bucket under a retention policy that no object has outlived.
func (f *Server) Retain(on bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.retained = on
}

// Violations returns the requests that broke the save protocol: changes without
// a condition, data writes over an object of a complete version, requests that
// the Server does not know.
func (f *Server) Violations() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.broken)
}

// RateViolations returns the changes that came within a second of one of the
// same kind to the same name, and were applied.
func (f *Server) RateViolations() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.rateBroken)
}

// Put stores an object, unconditionally and past the log.
func (f *Server) Put(name string, data []byte, metadata map[string]string) (generation int64) {
	return f.PutAt(name, data, metadata, time.Now())
}

// PutAt is Put for an object created, and last updated, at a given time.
func (f *Server) PutAt(name string, data []byte, metadata map[string]string, created time.Time) (generation int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.store(name, slices.Clone(data), "application/octet-stream", maps.Clone(metadata), nil, created).Generation
}

// SetMetadata replaces the metadata of an object, unconditionally and past the log.
func (f *Server) SetMetadata(name string, metadata map[string]string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	o := new(*f.objects[name])
	o.Metadata = maps.Clone(metadata)
	f.change(o)
}

// Get returns an object as it is now, nil if there is none.
func (f *Server) Get(name string) *Object {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.objects[name]
}

// Objects returns all objects, as they are at one moment.
func (f *Server) Objects() map[string]*Object {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.objects)
}

// Remove deletes an object, if there is one.
func (f *Server) Remove(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.erase(name)
}

// Names returns the names of all objects, in order.
func (f *Server) Names() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.sorted)
}

// SerialTrips returns the number of round trips that came one after another:
// the length of the longest chain of requests of which each was sent when the
// one before had been answered. It needs a latency: requests that take no time
// all look as if they came in turn.
func SerialTrips(log []Request) int {
	longest := 0
	chain := make([]int, len(log))
	for i, r := range log {
		chain[i] = 1
		for j, before := range log[:i] {
			if !before.End.IsZero() && !r.Start.Before(before.End) {
				chain[i] = max(chain[i], chain[j]+1)
			}
		}
		longest = max(longest, chain[i])
	}
	return longest
}
