package gcs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"cloud.google.com/go/storage"
	"github.com/fsouza/fake-gcs-server/fakestorage"
	"google.golang.org/api/option"
)

// fakeBucket is the only bucket of a fakeGCS.
const fakeBucket = "modules"

// fakeGCS is a GCS bucket in process: fake-gcs-server, which holds the bytes,
// and a layer in front of it that adds what GCS documents and the emulator
// lacks (metagenerations, conditions on every request, clearing of metadata,
// partial responses, permissions, rate limits), that loses requests and answers
// on demand, and that polices the save protocol.
//
// Nothing of it listens, starts a goroutine that outlives a request, or waits
// on anything but timers and contexts, so it works in a synctest bubble, where
// time costs nothing.
//
// Where the documentation leaves a choice, the fake takes the less convenient
// one: idempotency tokens are ignored, so a create that is repeated after its
// answer was lost is refused, and conditions of a resumable upload are looked at
// only when it is finalized.
type fakeGCS struct {
	t      testing.TB
	server *fakestorage.Server

	mu         sync.Mutex
	closed     chan struct{}
	objects    map[string]*fakeStored
	shelves    map[string]bool // the emulator's buckets
	sessions   map[string]*fakeSession
	generation int64 // the last one given
	entries    []*request
	strays     []*fakeCall
	bodies     int // answers whose body was not closed yet
	machines   map[string]*machine

	requestHook func(*request) faultKind
	answerHook  func(*request)
	latency     time.Duration

	denied            map[string]bool
	permissionsStatus int
	retained          bool

	rates      bool
	written    map[string]time.Time // last data write of a name
	updated    map[string]time.Time // last metadata update of a name
	tolerant   bool
	broken     []string
	rateBroken []string
}

// fakeObject is one object as GCS would describe it.
type fakeObject struct {
	Name                       string
	Data                       []byte
	Metadata                   map[string]string
	Generation, Metageneration int64
	Created, Updated           time.Time
	ContentType                string
}

// fakeStored is what the layer knows of an object; its bytes are in the emulator.
type fakeStored struct {
	fakeObject
	size        int64
	md5, crc32c string
	headers     map[string]string // contentEncoding, cacheControl, …
}

// machine is one client of the bucket.
type machine struct {
	name   string
	client *storage.Client
	bucket *storage.BucketHandle

	fake     *fakeGCS
	requests int           // guarded by fake.mu, like the rest
	crashed  bool          //
	paused   chan struct{} // closed by resume; nil when running
}

// request is one HTTP request as seen by the layer.
type request struct {
	N        int    // in the fake's log
	MachineN int    // of this machine
	Machine  string // its name
	// Op is insert (upload in one request), start (of a resumable session),
	// chunk, query (of the session's state), patch, delete, get (media),
	// attrs, list, permissions, bucket, or unknown.
	Op             string
	Object         string            // or the prefix of a list
	Cond           map[string]string // ifGenerationMatch and its like; a chunk has its session's
	Metadata       map[string]string // user metadata sent
	Start, End     time.Time         // End is zero while in flight
	Status         int               // answered; 0 for none
	Applied        bool              // it changed an object
	Sent, Received int64             // bytes of the bodies
	Fault          faultKind
}

func (r request) String() string {
	s := fmt.Sprintf("#%d %s %s %q", r.N, r.Machine, r.Op, r.Object)
	for _, k := range slices.Sorted(maps.Keys(r.Cond)) {
		s += fmt.Sprintf(" %s=%s", k, r.Cond[k])
	}
	s += fmt.Sprintf(" → %d", r.Status)
	if r.Applied {
		s += " applied"
	}
	if r.Fault != noFault {
		s += " " + r.Fault.String()
	}
	return s
}

// faultKind is what goes wrong with a request: whether it is applied, and what
// its sender sees.
type faultKind int

const (
	noFault     faultKind = iota
	refused               // not applied; connection refused
	lostReset             // applied; connection reset by peer
	lostEOF               // applied; io.EOF, the connection closed with no answer
	lostBody              // applied; the answer's body breaks off midway with io.ErrUnexpectedEOF
	unavailable           // not applied; 503
	tooMany               // not applied; 429
	hung                  // not applied; no answer until the context ends
	hungApplied           // applied; no answer until the context ends
	crashBefore           // not applied; the machine crashes
	crashAfter            // applied; the machine crashes
	unmet                 // not applied; 412, as of a condition
	stray                 // no answer until the context ends; applied when the test calls land
)

var faultNames = [...]string{"noFault", "refused", "lostReset", "lostEOF", "lostBody", "unavailable", "tooMany", "hung", "hungApplied", "crashBefore", "crashAfter", "unmet", "stray"}

func (k faultKind) String() string { return faultNames[k] }

// emulators holds emulators whose buckets are empty again. Building the routes
// of one takes longer than most tests.
var emulators struct {
	sync.Mutex
	idle []*fakestorage.Server
}

func idleEmulator() (*fakestorage.Server, error) {
	emulators.Lock()
	defer emulators.Unlock()
	if n := len(emulators.idle); n > 0 {
		server := emulators.idle[n-1]
		emulators.idle = emulators.idle[:n-1]
		return server, nil
	}
	return fakestorage.NewServerWithOptions(fakestorage.Options{NoListener: true})
}

// newFakeGCS returns an empty bucket. The test fails when it ends with any
// violations, unless it called tolerate.
func newFakeGCS(t testing.TB) *fakeGCS {
	t.Helper()
	server, err := idleEmulator()
	if err != nil {
		t.Fatal(err)
	}
	server.CreateBucketWithOpts(fakestorage.CreateBucketOpts{Name: fakeBucket})
	f := &fakeGCS{
		t:        t,
		server:   server,
		closed:   make(chan struct{}),
		objects:  map[string]*fakeStored{},
		shelves:  map[string]bool{},
		sessions: map[string]*fakeSession{},
		machines: map[string]*machine{},
		denied:   map[string]bool{},
		written:  map[string]time.Time{},
		updated:  map[string]time.Time{},
	}
	t.Cleanup(func() {
		close(f.closed)
		f.mu.Lock()
		defer f.mu.Unlock()
		f.emulate(http.MethodPost, "/_internal/delete_all", nil, nil)
		emulators.Lock()
		emulators.idle = append(emulators.idle, server)
		emulators.Unlock()
		if !f.tolerant {
			for _, v := range f.broken {
				t.Errorf("the save protocol was violated: %s", v)
			}
		}
	})
	return f
}

// machine returns a client of its own, with a name for the log.
func (f *fakeGCS) machine(name string, opts ...option.ClientOption) *machine {
	m := f.register(name)
	m.connect(f.t, append([]option.ClientOption{
		option.WithHTTPClient(&http.Client{Transport: m}),
		option.WithoutAuthentication(),
	}, opts...))
	return m
}

func (f *fakeGCS) register(name string) *machine {
	m := &machine{name: name, fake: f}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.machines[name] = m
	return m
}

func (m *machine) connect(t testing.TB, opts []option.ClientOption) {
	client, err := storage.NewClient(context.Background(), opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	m.client, m.bucket = client, client.Bucket(fakeBucket)
}

// crash ends the machine: none of its requests is applied any more, and none
// that is in flight is answered. They block until their contexts end.
func (m *machine) crash() {
	m.fake.mu.Lock()
	defer m.fake.mu.Unlock()
	m.crashed = true
}

// pause holds the machine's requests before they are applied, and the answers
// of those that were, until resume.
func (m *machine) pause() {
	m.fake.mu.Lock()
	defer m.fake.mu.Unlock()
	if m.paused == nil {
		m.paused = make(chan struct{})
	}
}

func (m *machine) resume() {
	m.fake.mu.Lock()
	defer m.fake.mu.Unlock()
	if m.paused != nil {
		close(m.paused)
		m.paused = nil
	}
}

// onRequest sets a hook that is called before each request is applied, and
// decides its fault. It may sleep, which delays the request. Hooks run
// concurrently, with a copy of the log entry.
func (f *fakeGCS) onRequest(hook func(r *request) faultKind) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.requestHook = hook
}

// onAnswer sets a hook that is called after each request was carried out,
// before its answer is delivered or lost.
func (f *fakeGCS) onAnswer(hook func(r *request)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answerHook = hook
}

// land applies the requests that went astray, in the order in which they were
// sent, whatever has become of their senders: a request that is on its way
// cannot be called back.
func (f *fakeGCS) land() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.strays {
		c.Applied = f.apply(c).applied
	}
	f.strays = nil
}

// setLatency sets the time of one round trip, half of which passes before a
// request is applied.
func (f *fakeGCS) setLatency(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.latency = d
}

// log returns the requests so far, in the order of their arrival.
func (f *fakeGCS) log() []request {
	f.mu.Lock()
	defer f.mu.Unlock()
	log := make([]request, len(f.entries))
	for i, e := range f.entries {
		log[i] = *e
	}
	return log
}

// resetLog empties the log. Numbering starts again from 0.
func (f *fakeGCS) resetLog() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.entries = nil
	for _, m := range f.machines {
		m.requests = 0
	}
}

// inFlight counts the requests of the log that have no end yet, and the answers
// whose body nobody closed: both are 0 when nothing was left behind.
func (f *fakeGCS) inFlight() (requests, bodies int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, e := range f.entries {
		if e.End.IsZero() {
			requests++
		}
	}
	return requests, f.bodies
}

// enforceRates makes a second data write to one name, or a second metadata
// update of one object, within one second fail with 429.
func (f *fakeGCS) enforceRates(on bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rates = on
}

// deny takes permissions away from everybody.
func (f *fakeGCS) deny(permissions ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range permissions {
		f.denied[p] = true
	}
}

// allow gives back what deny took.
func (f *fakeGCS) allow(permissions ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range permissions {
		delete(f.denied, p)
	}
}

// answerPermissions makes every question for permissions fail with a status,
// like a server that does not know the request; 0 answers it again.
func (f *fakeGCS) answerPermissions(status int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.permissionsStatus = status
}

// retain puts the bucket under a retention policy that no object has outlived.
func (f *fakeGCS) retain(on bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.retained = on
}

// tolerate lets the test end with violations.
func (f *fakeGCS) tolerate() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tolerant = true
}

// violations returns the requests that broke the save protocol: changes without
// a condition, data writes over an object of a complete version, requests that
// the fake does not know.
func (f *fakeGCS) violations() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.broken)
}

// rateViolations returns the changes that came within a second of one of the
// same kind to the same name, and were applied.
func (f *fakeGCS) rateViolations() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.rateBroken)
}

// put stores an object, unconditionally and past the log.
func (f *fakeGCS) put(name string, data []byte, metadata map[string]string) (generation int64) {
	return f.putObject(name, data, metadata, time.Now())
}

// putAt is put for an object created, and last updated, at a given time.
func (f *fakeGCS) putAt(name string, data []byte, metadata map[string]string, created time.Time) {
	f.putObject(name, data, metadata, created)
}

func (f *fakeGCS) putObject(name string, data []byte, metadata map[string]string, created time.Time) int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	o := f.store(name, data, "application/octet-stream", maps.Clone(metadata), nil, created)
	return o.Generation
}

// get returns an object as it is now, nil if there is none.
func (f *fakeGCS) get(name string) *fakeObject {
	f.mu.Lock()
	defer f.mu.Unlock()
	o := f.objects[name]
	if o == nil {
		return nil
	}
	held, err := f.server.GetObject(f.shelf(name), name)
	if err != nil {
		panic(fmt.Sprintf("the emulator lost %s: %v", name, err))
	}
	c := o.fakeObject
	c.Metadata = maps.Clone(o.Metadata)
	c.Data = held.Content
	return &c
}

// remove deletes an object, if there is one.
func (f *fakeGCS) remove(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.objects[name] != nil {
		f.erase(name)
	}
}

// names returns the names of all objects, in order.
func (f *fakeGCS) names() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Sorted(maps.Keys(f.objects))
}

// serialTrips returns the number of round trips that came one after another:
// the length of the longest chain of requests of which each was sent when the
// one before had been answered. It needs a latency: requests that take no time
// all look as if they came in turn.
func serialTrips(log []request) int {
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

// fakeCall is a request on its way through the layer.
type fakeCall struct {
	*request // guarded by fake.mu
	machine  *machine

	base     string // scheme and host it was sent to
	method   string
	bucket   string
	query    url.Values
	header   http.Header
	xml      bool
	session  string
	resource fakeResource
	media    []byte
	bad      string // why it cannot be understood
}

// fakeResource is the part of an object's JSON that clients send.
type fakeResource struct {
	Name        string          `json:"name"`
	ContentType string          `json:"contentType"`
	Metadata    json.RawMessage `json:"metadata"`
	MD5         string          `json:"md5Hash"`
	CRC32C      string          `json:"crc32c"`
	headers     map[string]string
}

// fakeSession is a resumable upload.
type fakeSession struct {
	name     string
	cond     map[string]string
	query    url.Values
	resource fakeResource
	data     []byte
	finished *fakeAnswer // the answer to its finalization
}

// fakeAnswer is what the layer has decided to say.
type fakeAnswer struct {
	status  int
	header  http.Header
	body    []byte
	applied bool
}

var errFakeClosed = errors.New("fake GCS: the test is over")

// RoundTrip sends a request to the bucket.
func (m *machine) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := m.fake.serve(m, r)
	if err != nil {
		return nil, err
	}
	resp.Request = r
	return resp, nil
}

func (f *fakeGCS) serve(m *machine, r *http.Request) (*http.Response, error) {
	c := f.arrive(m, r)
	resp, err := f.carry(r, c)
	f.mu.Lock()
	defer f.mu.Unlock()
	c.End = time.Now()
	c.Status, c.Received = 0, 0
	if err != nil {
		return nil, err
	}
	c.Status = resp.StatusCode
	f.bodies++
	body := &countedBody{Reader: resp.Body, fake: f}
	resp.Body = body
	c.Received = resp.ContentLength
	if r.Method == http.MethodHead {
		c.Received = 0
	} else if c.Fault == lostBody {
		c.Received /= 2
	}
	return resp, nil
}

type countedBody struct {
	io.Reader
	fake *fakeGCS
	once sync.Once
}

func (b *countedBody) Close() error {
	b.once.Do(func() {
		b.fake.mu.Lock()
		defer b.fake.mu.Unlock()
		b.fake.bodies--
	})
	return nil
}

// carry takes a request from its sender to the bucket and the answer back.
func (f *fakeGCS) carry(r *http.Request, c *fakeCall) (*http.Response, error) {
	ctx := r.Context()
	body, err := readRequest(r)
	f.mu.Lock()
	c.Sent = int64(len(body))
	hook, latency := f.requestHook, f.latency
	if err == nil {
		c.read(body)
	}
	copied := *c.request
	f.mu.Unlock()
	if err != nil {
		return nil, err // the sender broke off: nothing happened
	}
	if err := f.sleep(ctx, latency/2); err != nil {
		return nil, err
	}

	fault := noFault
	if hook != nil {
		fault = hook(&copied)
	}
	f.mu.Lock()
	c.Fault = fault
	f.mu.Unlock()
	switch fault {
	case refused:
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	case hung:
		return nil, f.hang(ctx)
	case stray:
		f.mu.Lock()
		f.strays = append(f.strays, c)
		f.mu.Unlock()
		return nil, f.hang(ctx)
	case crashBefore:
		c.machine.crash()
	}

	a, err := f.applyWhenRunning(ctx, c)
	if err != nil {
		return nil, err
	}

	f.mu.Lock()
	c.Status, c.Applied, c.Received = a.status, a.applied, int64(len(a.body))
	copied = *c.request
	answered := f.answerHook
	f.mu.Unlock()
	if answered != nil {
		answered(&copied)
	}

	switch fault {
	case lostReset:
		err = &net.OpError{Op: "read", Net: "tcp", Err: os.NewSyscallError("read", syscall.ECONNRESET)}
	case lostEOF:
		err = io.EOF
	case hungApplied:
		return nil, f.hang(ctx)
	case crashAfter:
		c.machine.crash()
	}
	if err := f.sleep(ctx, latency/2); err != nil {
		return nil, err
	}
	if err := f.awaitRunning(ctx, c.machine); err != nil {
		return nil, err
	}
	if err != nil {
		return nil, err
	}
	return a.response(r, fault == lostBody), nil
}

// applyWhenRunning applies a request unless its machine is paused or crashed.
func (f *fakeGCS) applyWhenRunning(ctx context.Context, c *fakeCall) (*fakeAnswer, error) {
	for {
		if err := f.awaitRunning(ctx, c.machine); err != nil {
			return nil, err
		}
		f.mu.Lock()
		if c.machine.crashed || c.machine.paused != nil {
			f.mu.Unlock()
			continue
		}
		if err := ctx.Err(); err != nil {
			f.mu.Unlock()
			return nil, err
		}
		var a *fakeAnswer
		switch c.Fault {
		case unavailable:
			a = jsonFailure(http.StatusServiceUnavailable, "backendError", "We encountered an internal error. Please try again.")
		case tooMany:
			a = tooManyRequests(c.Object)
		case unmet:
			a = jsonFailure(http.StatusPreconditionFailed, "conditionNotMet", conditionNotMet)
		default:
			a = f.apply(c)
		}
		f.mu.Unlock()
		return a, nil
	}
}

// awaitRunning returns when the machine is neither paused nor crashed.
func (f *fakeGCS) awaitRunning(ctx context.Context, m *machine) error {
	for {
		f.mu.Lock()
		crashed, paused := m.crashed, m.paused
		f.mu.Unlock()
		switch {
		case crashed:
			return f.hang(ctx)
		case paused == nil:
			return nil
		}
		select {
		case <-paused:
		case <-ctx.Done():
			return ctx.Err()
		case <-f.closed:
			return errFakeClosed
		}
	}
}

func (f *fakeGCS) hang(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-f.closed:
		return errFakeClosed
	}
}

func (f *fakeGCS) sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-f.closed:
		return errFakeClosed
	}
}

// machineHeader names the machine of a request that comes over a socket.
const machineHeader = "X-Fake-Machine"

// listenFake serves the bucket on a loopback port, for tests with real sockets
// and real time. The endpoint is an origin, without the path of the API; it is
// what STORAGE_EMULATOR_HOST may be set to.
func listenFake(t testing.TB, f *fakeGCS) (endpoint string) {
	stranger := f.register("")
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		m := f.machines[r.Header.Get(machineHeader)]
		f.mu.Unlock()
		if m == nil {
			m = stranger
		}
		resp, err := f.serve(m, r)
		if err != nil {
			// A refused connection cannot be staged once there is one; a reset
			// is as retryable.
			reset := errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.ECONNREFUSED)
			if conn, _, hijackErr := http.NewResponseController(w).Hijack(); hijackErr == nil {
				if tcp, ok := conn.(*net.TCPConn); ok && reset {
					tcp.SetLinger(0)
				}
				conn.Close()
			}
			return
		}
		defer resp.Body.Close()
		maps.Copy(w.Header(), resp.Header)
		w.WriteHeader(resp.StatusCode)
		if _, err := io.Copy(w, resp.Body); err != nil {
			http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}
	}))
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	return server.URL
}

// listenClient is machine for a bucket behind listenFake.
func (f *fakeGCS) listenClient(t testing.TB, endpoint, name string, opts ...option.ClientOption) *machine {
	m := f.register(name)
	wire := &http.Transport{}
	t.Cleanup(wire.CloseIdleConnections)
	m.connect(t, append([]option.ClientOption{
		option.WithEndpoint(endpoint + "/storage/v1/"),
		option.WithHTTPClient(&http.Client{Transport: namedTransport{name, wire}}),
		option.WithoutAuthentication(),
	}, opts...))
	return m
}

type namedTransport struct {
	name string
	wire *http.Transport
}

func (n namedTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set(machineHeader, n.name)
	return n.wire.RoundTrip(r)
}
