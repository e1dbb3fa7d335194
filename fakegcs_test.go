package gcs

import (
	"bytes"
	"context"
	"crypto/md5"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"mime"
	"mime/multipart"
	"net"
	"net/http"
	"net/http/httptest"
	"net/textproto"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
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

// readRequest reads a request's body to its end, or to that of its context, and
// closes it in either case, as a RoundTripper must: the client's own goroutines
// wait for that.
func readRequest(r *http.Request) ([]byte, error) {
	if r.Body == nil {
		return nil, r.Context().Err()
	}
	defer r.Body.Close()
	stop := context.AfterFunc(r.Context(), func() { r.Body.Close() })
	defer stop()
	body, err := io.ReadAll(r.Body)
	if ctxErr := r.Context().Err(); ctxErr != nil {
		return body, ctxErr
	}
	return body, err
}

// arrive logs a request and finds out what it asks for, as far as its URL tells.
func (f *fakeGCS) arrive(m *machine, r *http.Request) *fakeCall {
	c := &fakeCall{
		request: &request{Machine: m.name, Op: "unknown", Start: time.Now()},
		machine: m,
		method:  r.Method,
		query:   r.URL.Query(),
		header:  r.Header.Clone(),
		base:    r.URL.Scheme + "://" + r.URL.Host,
	}
	if r.URL.Host == "" { // as a server sees it
		c.base = "http://" + r.Host
	}
	path := r.URL.Path
	if rest, ok := strings.CutPrefix(path, "/upload/storage/v1/b/"); ok && (r.Method == http.MethodPost || r.Method == http.MethodPut) {
		c.bucket, _ = strings.CutSuffix(rest, "/o")
		c.Object = c.query.Get("name")
		switch {
		case c.query.Get("upload_id") != "":
			c.session = c.query.Get("upload_id")
			c.Op = "chunk"
			if r.Header.Get("Content-Range") == "bytes */*" {
				c.Op = "query"
			}
		case c.query.Get("uploadType") == "resumable":
			c.Op = "start"
		case c.query.Get("uploadType") == "multipart":
			c.Op = "insert"
		}
	} else if rest, ok := strings.CutPrefix(path, "/storage/v1/b/"); ok {
		var found bool
		c.bucket, rest, _ = strings.Cut(rest, "/")
		c.Object, found = strings.CutPrefix(rest, "o/")
		switch {
		case found && r.Method == http.MethodPatch:
			c.Op = "patch"
		case found && r.Method == http.MethodDelete:
			c.Op = "delete"
		case r.Method != http.MethodGet && r.Method != http.MethodHead:
		case found && c.query.Get("alt") == "media":
			c.Op = "get"
		case found:
			c.Op = "attrs"
		case rest == "o":
			c.Op, c.Object = "list", c.query.Get("prefix")
		case rest == "iam/testPermissions":
			c.Op, c.Object = "permissions", ""
		case rest == "":
			c.Op, c.Object = "bucket", ""
		}
	} else if r.Method == http.MethodGet || r.Method == http.MethodHead {
		c.bucket, c.Object, _ = strings.Cut(strings.TrimPrefix(path, "/"), "/")
		c.Op, c.xml = "get", true
	}
	c.Cond = map[string]string{}
	for _, k := range []string{"ifGenerationMatch", "ifGenerationNotMatch", "ifMetagenerationMatch", "ifMetagenerationNotMatch"} {
		if c.query.Has(k) {
			c.Cond[k] = c.query.Get(k)
		}
	}
	if c.xml {
		for k, header := range map[string]string{
			"ifGenerationMatch":     "X-Goog-If-Generation-Match",
			"ifMetagenerationMatch": "X-Goog-If-Metageneration-Match",
		} {
			if v := r.Header.Get(header); v != "" {
				c.Cond[k] = v
			}
		}
	}

	f.mu.Lock()
	defer f.mu.Unlock()
	if s := f.sessions[c.session]; s != nil {
		c.Object, c.Cond = s.name, maps.Clone(s.cond)
	}
	c.N, c.MachineN = len(f.entries), m.requests
	m.requests++
	f.entries = append(f.entries, c.request)
	return c
}

// read takes in the body of a request.
func (c *fakeCall) read(body []byte) {
	switch c.Op {
	case "insert":
		c.readMultipart(body)
	case "chunk":
		c.media = body
	case "start", "patch":
		c.readResource(body)
	}
}

func (c *fakeCall) readResource(body []byte) {
	if err := json.Unmarshal(body, &c.resource); err != nil {
		c.bad = "Parse Error: " + err.Error()
		return
	}
	var all map[string]any
	json.Unmarshal(body, &all)
	c.resource.headers = map[string]string{}
	for _, k := range []string{"cacheControl", "contentDisposition", "contentEncoding", "contentLanguage"} {
		if v, ok := all[k]; ok {
			c.resource.headers[k], _ = v.(string)
		}
	}
	metadata, err := c.resource.metadata()
	if err != nil {
		c.bad = "Parse Error: " + err.Error()
		return
	}
	if metadata != nil {
		c.Metadata = map[string]string{}
		for k, v := range metadata {
			if v != nil {
				c.Metadata[k] = *v
			}
		}
	}
	if c.Object == "" {
		c.Object = c.resource.Name
	}
}

// metadata returns the user metadata sent; nil when none was, or null.
func (r fakeResource) metadata() (metadata map[string]*string, err error) {
	if r.Metadata != nil {
		err = json.Unmarshal(r.Metadata, &metadata)
	}
	return metadata, err
}

func (c *fakeCall) readMultipart(body []byte) {
	_, params, err := mime.ParseMediaType(c.header.Get("Content-Type"))
	if err != nil {
		c.bad = err.Error()
		return
	}
	parts := multipart.NewReader(bytes.NewReader(body), params["boundary"])
	for i := range 2 {
		part, err := parts.NextPart()
		if err != nil {
			c.bad = "Malformed multipart body: " + err.Error()
			return
		}
		content, err := io.ReadAll(part)
		if err != nil {
			c.bad = "Malformed multipart body: " + err.Error()
			return
		}
		if i == 0 {
			c.readResource(content)
			continue
		}
		c.media = content
		if c.resource.ContentType == "" {
			c.resource.ContentType = part.Header.Get("Content-Type")
		}
	}
	if _, err := parts.NextPart(); err != io.EOF {
		c.bad = "Malformed multipart body: no end"
	}
}

// apply checks a request and carries it out, in one step under the lock.
func (f *fakeGCS) apply(c *fakeCall) *fakeAnswer {
	select {
	case <-f.closed:
		return jsonFailure(http.StatusBadRequest, "invalid", errFakeClosed.Error())
	default:
	}
	if c.Op == "unknown" {
		f.violate(c, "not known to the fake: %s %s", c.method, c.query.Encode())
		return jsonFailure(http.StatusBadRequest, "invalid", "not known to the fake")
	}
	if c.bad != "" {
		return jsonFailure(http.StatusBadRequest, "parseError", c.bad)
	}
	if c.bucket != fakeBucket {
		if c.xml {
			return xmlFailure(http.StatusNotFound, "NoSuchBucket", "The specified bucket does not exist.", "")
		}
		return jsonFailure(http.StatusNotFound, "notFound", "The specified bucket does not exist.")
	}
	switch c.Op {
	case "insert":
		return f.write(c, c.query, c.resource, c.media)
	case "start":
		return f.startSession(c)
	case "chunk", "query":
		return f.continueSession(c)
	case "patch":
		return f.patch(c)
	case "delete":
		return f.delete(c)
	case "get", "attrs":
		return f.read(c)
	case "list":
		return f.list(c)
	case "permissions":
		return f.testPermissions(c)
	default:
		if a := f.forbid("storage.buckets.get", "bucket"); a != nil {
			return a
		}
		return f.emulate(http.MethodGet, "/storage/v1/b/"+fakeBucket, nil, nil)
	}
}

func (f *fakeGCS) violate(c *fakeCall, format string, args ...any) {
	f.broken = append(f.broken, fmt.Sprintf("%s: ", c.request)+fmt.Sprintf(format, args...))
}

// write is an upload that has arrived in full.
func (f *fakeGCS) write(c *fakeCall, query url.Values, r fakeResource, data []byte) *fakeAnswer {
	if c.Cond["ifGenerationMatch"] == "" {
		f.violate(c, "a write without ifGenerationMatch")
	}
	if a := f.forbid("storage.objects.create", "object"); a != nil {
		return a
	}
	if len(c.Object) == 0 || len(c.Object) > 1024 || strings.ContainsAny(c.Object, "\r\n") || c.Object == "." || c.Object == ".." {
		return jsonFailure(http.StatusBadRequest, "invalid", "Invalid object name.")
	}
	old := f.objects[c.Object]
	if a := checkConditions(c.Cond, old, false); a != nil {
		return a
	}
	if old != nil {
		if a := f.forbid("storage.objects.delete", "object"); a != nil {
			return a
		}
		if f.retained {
			return f.retentionNotMet(c.Object)
		}
	}
	if a := checkSums(data, r, c.header.Values("X-Goog-Hash")); a != nil {
		return a
	}
	if a := f.rate(c, f.written, "data write"); a != nil {
		return a
	}
	if f.complete(c.Object) {
		f.violate(c, "a write over an object of a complete version")
	}
	metadata := map[string]string{}
	sent, _ := r.metadata()
	for k, v := range sent {
		if v != nil {
			metadata[k] = *v
		}
	}
	o := f.store(c.Object, data, r.ContentType, metadata, r.headers, time.Now())
	return f.describe(c, o, query, "noAcl", true)
}

// rate keeps to one change of a kind and a name a second.
func (f *fakeGCS) rate(c *fakeCall, last map[string]time.Time, kind string) *fakeAnswer {
	before, ok := last[c.Object]
	if since := time.Since(before); ok && since < time.Second {
		if f.rates {
			return tooManyRequests(c.Object)
		}
		f.rateBroken = append(f.rateBroken, fmt.Sprintf("%s: a %s %v after another", c.request, kind, since))
	}
	last[c.Object] = time.Now()
	return nil
}

// complete tells whether name is one of the three objects of a complete version.
func (f *fakeGCS) complete(name string) bool {
	dot := strings.LastIndexByte(name, '.')
	if dot < 0 || !strings.Contains(name, "/@v/") || !slices.Contains([]string{".info", ".mod", ".zip"}, name[dot:]) {
		return false
	}
	version := name[:dot]
	mod := f.objects[version+".mod"]
	if mod == nil || f.objects[version+".info"] == nil || f.objects[version+".zip"] == nil {
		return false
	}
	_, current := mod.Metadata["in-progress"]
	_, old := mod.Metadata["in_progress"]
	return !current && !old
}

// store puts an object into the emulator and gives it its generation. GCS makes
// generations from the clock; this one stands still at times, so they count up
// from it.
func (f *fakeGCS) store(name string, data []byte, contentType string, metadata, headers map[string]string, created time.Time) *fakeStored {
	var body bytes.Buffer
	w := multipart.NewWriter(&body)
	head, _ := w.CreatePart(textproto.MIMEHeader{"Content-Type": {"application/json"}})
	json.NewEncoder(head).Encode(map[string]any{"name": name, "contentType": contentType})
	media, _ := w.CreatePart(textproto.MIMEHeader{"Content-Type": {contentType}})
	media.Write(data)
	w.Close()
	a := f.emulate(http.MethodPost, "/upload/storage/v1/b/"+f.shelf(name)+"/o?uploadType=multipart&name="+url.QueryEscape(name),
		http.Header{"Content-Type": {"multipart/related; boundary=" + w.Boundary()}}, body.Bytes())
	var said struct {
		MD5    string `json:"md5Hash"`
		CRC32C string `json:"crc32c"`
		Size   int64  `json:"size,string"`
	}
	if err := json.Unmarshal(a.body, &said); a.status != http.StatusOK || err != nil {
		panic(fmt.Sprintf("the emulator did not store %s: %d %s", name, a.status, a.body))
	}
	f.generation = max(f.generation+1, time.Now().UnixMicro())
	created = created.UTC().Truncate(time.Millisecond)
	o := &fakeStored{
		fakeObject: fakeObject{
			Name:           name,
			Metadata:       metadata,
			Generation:     f.generation,
			Metageneration: 1,
			Created:        created,
			Updated:        created,
			ContentType:    contentType,
		},
		size:    said.Size,
		md5:     said.MD5,
		crc32c:  said.CRC32C,
		headers: maps.Clone(headers),
	}
	f.objects[name] = o
	return o
}

func (f *fakeGCS) erase(name string) {
	if a := f.emulate(http.MethodDelete, "/storage/v1/b/"+f.shelf(name)+"/o/"+url.PathEscape(name), nil, nil); a.status != http.StatusOK {
		panic(fmt.Sprintf("the emulator did not delete %s: %d %s", name, a.status, a.body))
	}
	delete(f.objects, name)
}

// shelf names the emulator's bucket that an object is in. The emulator looks
// through all objects of a bucket at every request, three times over at a write,
// so a bucket of some thousand needs to be spread.
func (f *fakeGCS) shelf(name string) string {
	shelf := fmt.Sprintf("%s-%d", fakeBucket, crc32.ChecksumIEEE([]byte(name))%512)
	if !f.shelves[shelf] {
		f.shelves[shelf] = true
		f.server.CreateBucketWithOpts(fakestorage.CreateBucketOpts{Name: shelf})
	}
	return shelf
}

// emulate passes a request on to the emulator.
func (f *fakeGCS) emulate(method, path string, header http.Header, body []byte) *fakeAnswer {
	r, err := http.NewRequest(method, "https://storage.googleapis.com"+path, bytes.NewReader(body))
	if err != nil {
		panic(err)
	}
	if header != nil {
		r.Header = header
	}
	resp, err := f.server.HTTPClient().Transport.RoundTrip(r)
	if err != nil {
		panic(err)
	}
	defer resp.Body.Close()
	a := &fakeAnswer{status: resp.StatusCode, header: resp.Header}
	a.body, _ = io.ReadAll(resp.Body)
	return a
}

func (f *fakeGCS) startSession(c *fakeCall) *fakeAnswer {
	if a := f.forbid("storage.objects.create", "object"); a != nil {
		return a
	}
	id := fmt.Sprintf("session-%d", len(f.sessions)+1)
	if c.resource.ContentType == "" {
		c.resource.ContentType = c.header.Get("X-Upload-Content-Type")
	}
	f.sessions[id] = &fakeSession{
		name:     c.Object,
		cond:     maps.Clone(c.Cond),
		query:    c.query,
		resource: c.resource,
	}
	query := url.Values{"uploadType": {"resumable"}, "name": {c.Object}, "upload_id": {id}}
	return &fakeAnswer{status: http.StatusOK, header: http.Header{
		"Location":             {c.base + "/upload/storage/v1/b/" + fakeBucket + "/o?" + query.Encode()},
		"X-Guploader-Uploadid": {id},
	}}
}

// continueSession takes one chunk of a resumable upload. Bytes that came before
// are skipped, so a chunk may be sent again; so may the last one, after the
// upload was finalized.
func (f *fakeGCS) continueSession(c *fakeCall) *fakeAnswer {
	s := f.sessions[c.session]
	if s == nil {
		return jsonFailure(http.StatusNotFound, "notFound", "No such upload session.")
	}
	if s.finished != nil {
		again := *s.finished
		again.applied = false
		return &again
	}
	start, total, err := parseContentRange(c.header.Get("Content-Range"), len(c.media))
	if err != nil {
		return jsonFailure(http.StatusBadRequest, "invalid", err.Error())
	}
	if start >= 0 {
		if start > int64(len(s.data)) {
			return jsonFailure(http.StatusBadRequest, "invalid", "Invalid request. There is a gap before the chunk.")
		}
		if skip := int64(len(s.data)) - start; skip < int64(len(c.media)) {
			s.data = append(s.data, c.media[skip:]...)
		}
	}
	if total != int64(len(s.data)) {
		a := &fakeAnswer{status: http.StatusPermanentRedirect, header: http.Header{}}
		if len(s.data) > 0 {
			a.header.Set("Range", fmt.Sprintf("bytes=0-%d", len(s.data)-1))
		}
		if c.header.Get("X-GUploader-No-308") != "" {
			a.status = http.StatusOK
			a.header.Set("X-Http-Status-Code-Override", "308")
		}
		return a
	}
	a := f.write(c, s.query, s.resource, s.data)
	if a.applied {
		s.finished = a
		s.data = nil
	}
	return a
}

// parseContentRange returns the offset of a chunk, -1 for one without bytes,
// and the size of the whole, -1 if it is not known yet.
func parseContentRange(header string, size int) (start, total int64, err error) {
	malformed := fmt.Errorf("invalid Content-Range %q for a body of %d bytes", header, size)
	span, whole, ok := strings.Cut(strings.TrimPrefix(header, "bytes "), "/")
	if !ok || !strings.HasPrefix(header, "bytes ") {
		return 0, 0, malformed
	}
	total = -1
	if whole != "*" {
		if total, err = strconv.ParseInt(whole, 10, 64); err != nil {
			return 0, 0, malformed
		}
	}
	if span == "*" {
		if size != 0 {
			return 0, 0, malformed
		}
		return -1, total, nil
	}
	first, last, _ := strings.Cut(span, "-")
	start, err = strconv.ParseInt(first, 10, 64)
	if err != nil {
		return 0, 0, malformed
	}
	end, err := strconv.ParseInt(last, 10, 64)
	if err != nil || end-start+1 != int64(size) || total >= 0 && end >= total {
		return 0, 0, malformed
	}
	return start, total, nil
}

func (f *fakeGCS) patch(c *fakeCall) *fakeAnswer {
	if c.Cond["ifGenerationMatch"] == "" && c.Cond["ifMetagenerationMatch"] == "" {
		f.violate(c, "a metadata update without ifGenerationMatch or ifMetagenerationMatch")
	}
	if a := f.forbid("storage.objects.update", "object"); a != nil {
		return a
	}
	o, a := f.find(c, false)
	if a != nil {
		return a
	}
	if a := f.rate(c, f.updated, "metadata update"); a != nil {
		return a
	}
	sent, _ := c.resource.metadata()
	if c.resource.Metadata != nil && sent == nil { // null
		o.Metadata = map[string]string{}
	}
	o.Metadata = maps.Clone(o.Metadata)
	for k, v := range sent {
		if v == nil {
			delete(o.Metadata, k)
			continue
		}
		if o.Metadata == nil {
			o.Metadata = map[string]string{}
		}
		o.Metadata[k] = *v
	}
	if c.resource.ContentType != "" {
		o.ContentType = c.resource.ContentType
	}
	for k, v := range c.resource.headers {
		if o.headers == nil {
			o.headers = map[string]string{}
		}
		o.headers[k] = v
	}
	o.Metageneration++
	o.Updated = time.Now().UTC().Truncate(time.Millisecond)
	return f.describe(c, o, c.query, "full", true)
}

func (f *fakeGCS) delete(c *fakeCall) *fakeAnswer {
	if c.Cond["ifGenerationMatch"] == "" {
		f.violate(c, "a delete without ifGenerationMatch")
	}
	if a := f.forbid("storage.objects.delete", "object"); a != nil {
		return a
	}
	if _, a := f.find(c, false); a != nil {
		return a
	}
	if f.retained {
		return f.retentionNotMet(c.Object)
	}
	f.erase(c.Object)
	return &fakeAnswer{status: http.StatusNoContent, applied: true}
}

// find returns the object that a request is about, or why it cannot be had.
func (f *fakeGCS) find(c *fakeCall, reading bool) (*fakeStored, *fakeAnswer) {
	o := f.objects[c.Object]
	wanted := c.query.Get("generation")
	if o == nil || wanted != "" && wanted != strconv.FormatInt(o.Generation, 10) {
		if c.xml {
			return nil, xmlFailure(http.StatusNotFound, "NoSuchKey", "The specified key does not exist.", "")
		}
		return nil, jsonFailure(http.StatusNotFound, "notFound", "No such object: "+fakeBucket+"/"+c.Object)
	}
	a := checkConditions(c.Cond, o, reading)
	if a != nil && a.status == http.StatusPreconditionFailed && c.xml {
		a = xmlFailure(a.status, "PreconditionFailed", conditionNotMet, "")
	}
	return o, a
}

// read answers with an object's bytes or attributes.
func (f *fakeGCS) read(c *fakeCall) *fakeAnswer {
	if a := f.forbid("storage.objects.get", "object"); a != nil {
		if c.xml {
			a = xmlFailure(a.status, "AccessDenied", "Access denied.", missingPermission("storage.objects.get", "object"))
		}
		return a
	}
	o, a := f.find(c, true)
	if a != nil {
		return a
	}
	if c.Op == "attrs" {
		return f.describe(c, o, c.query, "noAcl", false)
	}
	header := http.Header{}
	if v := c.header.Get("Range"); v != "" {
		header.Set("Range", v)
	}
	a = f.emulate(c.method, "/download/storage/v1/b/"+f.shelf(c.Object)+"/o/"+url.PathEscape(c.Object)+"?alt=media", header, nil)
	if a.status >= 300 {
		return a
	}
	// The layer knows better than the emulator.
	for k := range a.header {
		if strings.HasPrefix(k, "X-Goog-Meta-") {
			a.header.Del(k)
		}
	}
	if c.xml {
		for k, v := range o.Metadata {
			a.header.Set("X-Goog-Meta-"+k, v)
		}
	}
	a.header.Set("X-Goog-Generation", strconv.FormatInt(o.Generation, 10))
	a.header.Set("X-Goog-Metageneration", strconv.FormatInt(o.Metageneration, 10))
	a.header.Set("Last-Modified", o.Updated.Format(http.TimeFormat))
	a.header.Set("Content-Type", o.ContentType)
	for k, header := range map[string]string{
		"cacheControl":       "Cache-Control",
		"contentDisposition": "Content-Disposition",
		"contentEncoding":    "Content-Encoding",
		"contentLanguage":    "Content-Language",
	} {
		if v := o.headers[k]; v != "" {
			a.header.Set(header, v)
		}
	}
	return a
}

// list answers with one page. Its token is the last name of the page, so that
// objects which come and go between pages shift nothing.
func (f *fakeGCS) list(c *fakeCall) *fakeAnswer {
	if a := f.forbid("storage.objects.list", "bucket"); a != nil {
		return a
	}
	for _, k := range []string{"delimiter", "matchGlob", "filter"} {
		if c.query.Get(k) != "" {
			f.violate(c, "the fake does not know how to list with %s", k)
		}
	}
	for _, k := range []string{"versions", "softDeleted"} {
		if c.query.Get(k) == "true" {
			f.violate(c, "the fake does not know how to list with %s", k)
		}
	}
	limit := 1000
	if v := c.query.Get("maxResults"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil || n < 1 {
			return jsonFailure(http.StatusBadRequest, "invalid", "Invalid unsigned integer value: '"+v+"'.")
		}
		limit = min(n, limit)
	}
	after := ""
	if token := c.query.Get("pageToken"); token != "" {
		b, err := base64.URLEncoding.DecodeString(token)
		if err != nil {
			return jsonFailure(http.StatusBadRequest, "invalid", "Invalid Value")
		}
		after = string(b)
	}
	var names []string
	for name := range f.objects {
		if strings.HasPrefix(name, c.query.Get("prefix")) && name > after && name >= c.query.Get("startOffset") &&
			(c.query.Get("endOffset") == "" || name < c.query.Get("endOffset")) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	page := map[string]any{"kind": "storage#objects"}
	if len(names) > limit {
		names = names[:limit]
		page["nextPageToken"] = base64.URLEncoding.EncodeToString([]byte(names[limit-1]))
	}
	var items []any
	for _, name := range names {
		items = append(items, f.objects[name].json(c.base, c.query.Get("projection") == "full"))
	}
	if items != nil {
		page["items"] = items
	}
	return jsonAnswer(page, c.query.Get("fields"))
}

func (f *fakeGCS) testPermissions(c *fakeCall) *fakeAnswer {
	if f.permissionsStatus != 0 {
		return &fakeAnswer{status: f.permissionsStatus, header: http.Header{"Content-Type": {"text/plain; charset=utf-8"}}, body: []byte("not supported\n")}
	}
	said := map[string]any{"kind": "storage#testIamPermissionsResponse"}
	var granted []string
	for _, p := range c.query["permissions"] {
		if !f.denied[p] {
			granted = append(granted, p)
		}
	}
	if granted != nil {
		said["permissions"] = granted
	}
	return jsonAnswer(said, "")
}

func (f *fakeGCS) forbid(permission, kind string) *fakeAnswer {
	if !f.denied[permission] {
		return nil
	}
	return jsonFailure(http.StatusForbidden, "forbidden", missingPermission(permission, kind))
}

func missingPermission(permission, kind string) string {
	return fmt.Sprintf("caller does not have %s access to the Google Cloud Storage %s. Permission '%s' denied on resource (or it may not exist).", permission, kind, permission)
}

func (f *fakeGCS) retentionNotMet(name string) *fakeAnswer {
	return jsonFailure(http.StatusForbidden, "retentionPolicyNotMet",
		fmt.Sprintf("Object '%s/%s' is subject to bucket's retention policy or object retention and cannot be deleted or overwritten until %s",
			fakeBucket, name, time.Now().AddDate(1, 0, 0).UTC().Format(time.RFC3339)))
}

const conditionNotMet = "At least one of the pre-conditions you specified did not hold."

// checkConditions compares a request's conditions with an object, nil for none.
func checkConditions(cond map[string]string, o *fakeStored, reading bool) *fakeAnswer {
	var generation, metageneration int64
	if o != nil {
		generation, metageneration = o.Generation, o.Metageneration
	}
	for _, k := range []string{"ifGenerationMatch", "ifMetagenerationMatch", "ifGenerationNotMatch", "ifMetagenerationNotMatch"} {
		v, ok := cond[k]
		if !ok {
			continue
		}
		want, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			return jsonFailure(http.StatusBadRequest, "invalid", fmt.Sprintf("Invalid value %q for %s.", v, k))
		}
		have := generation
		if strings.HasPrefix(k, "ifMeta") {
			have = metageneration
		}
		not := strings.HasSuffix(k, "NotMatch")
		switch {
		case (have == want) != not:
		case not && reading:
			return &fakeAnswer{status: http.StatusNotModified}
		default:
			return jsonFailure(http.StatusPreconditionFailed, "conditionNotMet", conditionNotMet)
		}
	}
	return nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// checkSums compares data with the checksums that came with it.
func checkSums(data []byte, r fakeResource, headers []string) *fakeAnswer {
	digest := md5.Sum(data)
	haveMD5 := base64.StdEncoding.EncodeToString(digest[:])
	haveCRC := base64.StdEncoding.EncodeToString(binary.BigEndian.AppendUint32(nil, crc32.Checksum(data, castagnoli)))
	wantMD5, wantCRC := []string{r.MD5}, []string{r.CRC32C}
	for _, h := range strings.Split(strings.Join(headers, ","), ",") {
		kind, v, _ := strings.Cut(strings.TrimSpace(h), "=")
		switch kind {
		case "md5":
			wantMD5 = append(wantMD5, v)
		case "crc32c":
			wantCRC = append(wantCRC, v)
		}
	}
	for _, want := range wantMD5 {
		if want != "" && want != haveMD5 {
			return jsonFailure(http.StatusBadRequest, "invalid", fmt.Sprintf("Provided MD5 hash %q doesn't match calculated MD5 hash %q.", want, haveMD5))
		}
	}
	for _, want := range wantCRC {
		if want != "" && want != haveCRC {
			return jsonFailure(http.StatusBadRequest, "invalid", fmt.Sprintf("Provided CRC32C %q doesn't match calculated CRC32C %q.", want, haveCRC))
		}
	}
	return nil
}

// describe answers with an object's attributes.
func (f *fakeGCS) describe(c *fakeCall, o *fakeStored, query url.Values, projection string, applied bool) *fakeAnswer {
	if p := query.Get("projection"); p != "" {
		projection = p
	}
	a := jsonAnswer(o.json(c.base, projection == "full"), query.Get("fields"))
	a.applied = applied
	return a
}

// json is an object as the JSON API describes it.
func (o *fakeStored) json(base string, full bool) map[string]any {
	const milliseconds = "2006-01-02T15:04:05.000Z"
	generation := strconv.FormatInt(o.Generation, 10)
	metageneration := strconv.FormatInt(o.Metageneration, 10)
	etag := base64.StdEncoding.EncodeToString([]byte(generation + "/" + metageneration))
	path := "/storage/v1/b/" + fakeBucket + "/o/" + url.PathEscape(o.Name)
	m := map[string]any{
		"kind":                    "storage#object",
		"id":                      fakeBucket + "/" + o.Name + "/" + generation,
		"selfLink":                base + path,
		"mediaLink":               base + "/download" + path + "?generation=" + generation + "&alt=media",
		"name":                    o.Name,
		"bucket":                  fakeBucket,
		"generation":              generation,
		"metageneration":          metageneration,
		"contentType":             o.ContentType,
		"storageClass":            "STANDARD",
		"size":                    strconv.FormatInt(o.size, 10),
		"md5Hash":                 o.md5,
		"crc32c":                  o.crc32c,
		"etag":                    etag,
		"timeCreated":             o.Created.Format(milliseconds),
		"updated":                 o.Updated.Format(milliseconds),
		"timeStorageClassUpdated": o.Created.Format(milliseconds),
		"timeFinalized":           o.Created.Format(milliseconds),
	}
	for k, v := range o.headers {
		if v != "" {
			m[k] = v
		}
	}
	if len(o.Metadata) > 0 {
		m["metadata"] = maps.Clone(o.Metadata)
	}
	if !full {
		return m
	}
	rule := func(entity, role string) map[string]any {
		return map[string]any{
			"kind":       "storage#objectAccessControl",
			"object":     o.Name,
			"generation": generation,
			"id":         fakeBucket + "/" + o.Name + "/" + generation + "/" + entity,
			"selfLink":   base + path + "/acl/" + entity,
			"bucket":     fakeBucket,
			"entity":     entity,
			"role":       role,
			"etag":       etag,
		}
	}
	acl := []any{}
	for _, team := range []string{"owners", "editors", "viewers"} {
		role := "OWNER"
		if team == "viewers" {
			role = "READER"
		}
		r := rule("project-"+team+"-123456789012", role)
		r["projectTeam"] = map[string]any{"projectNumber": "123456789012", "team": team}
		acl = append(acl, r)
	}
	const owner = "user-athens@example-project.iam.gserviceaccount.com"
	r := rule(owner, "OWNER")
	r["email"] = strings.TrimPrefix(owner, "user-")
	m["acl"] = append(acl, r)
	m["owner"] = map[string]any{"entity": owner}
	return m
}

// jsonAnswer answers with those fields of v that a partial response selects.
func jsonAnswer(v map[string]any, fields string) *fakeAnswer {
	var selected any = v
	if fields != "" {
		selector, rest := parseFields(fields)
		if rest != "" {
			return jsonFailure(http.StatusBadRequest, "invalidParameter", "Invalid field selection "+fields)
		}
		selected = selector.of(v)
	}
	body, err := json.Marshal(selected)
	if err != nil {
		panic(err)
	}
	return &fakeAnswer{status: http.StatusOK, header: http.Header{"Content-Type": {"application/json; charset=UTF-8"}}, body: body}
}

// fieldSelector is a parsed fields parameter, such as
// nextPageToken,items(name,metadata/key). An empty one selects everything.
type fieldSelector map[string]fieldSelector

func parseFields(s string) (sel fieldSelector, rest string) {
	sel = fieldSelector{}
	for {
		last := sel
		for more := true; more; {
			end := strings.IndexAny(s, ",()/")
			if end < 0 {
				end = len(s)
			}
			inner := fieldSelector{}
			last[s[:end]] = inner
			last = inner
			s, more = strings.CutPrefix(s[end:], "/")
		}
		if after, ok := strings.CutPrefix(s, "("); ok {
			inner, after := parseFields(after)
			if s, ok = strings.CutPrefix(after, ")"); !ok {
				return sel, "unbalanced"
			}
			maps.Copy(last, inner)
		}
		if !strings.HasPrefix(s, ",") {
			return sel, s
		}
		s = s[1:]
	}
}

func (sel fieldSelector) of(v any) any {
	if len(sel) == 0 {
		return v
	}
	switch v := v.(type) {
	case []any:
		picked := make([]any, len(v))
		for i := range v {
			picked[i] = sel.of(v[i])
		}
		return picked
	case map[string]any:
		picked := map[string]any{}
		for k, inner := range v {
			if s, ok := sel[k]; ok {
				picked[k] = s.of(inner)
			} else if s, ok := sel["*"]; ok {
				picked[k] = s.of(inner)
			}
		}
		return picked
	case map[string]string:
		picked := map[string]string{}
		for k, s := range v {
			if _, ok := sel[k]; ok {
				picked[k] = s
			}
		}
		return picked
	}
	return v
}

func tooManyRequests(name string) *fakeAnswer {
	return jsonFailure(http.StatusTooManyRequests, "rateLimitExceeded",
		"The object "+fakeBucket+"/"+name+" exceeded the rate limit for object mutation operations (create, update, and delete). Please reduce your request rate. See https://cloud.google.com/storage/docs/gcs429.")
}

// jsonFailure is an error of the JSON API.
func jsonFailure(status int, reason, message string) *fakeAnswer {
	detail := map[string]any{"domain": "global", "reason": reason, "message": message}
	switch status {
	case http.StatusPreconditionFailed:
		detail["locationType"], detail["location"] = "header", "If-Match"
	case http.StatusTooManyRequests:
		detail["domain"] = "usageLimits"
	}
	a := jsonAnswer(map[string]any{"error": map[string]any{"code": status, "message": message, "errors": []any{detail}}}, "")
	a.status = status
	return a
}

// xmlFailure is an error of the XML API, by which the client reads objects.
func xmlFailure(status int, code, message, details string) *fakeAnswer {
	body := fmt.Sprintf("<?xml version='1.0' encoding='UTF-8'?><Error><Code>%s</Code><Message>%s</Message>", code, message)
	if details != "" {
		body += "<Details>" + details + "</Details>"
	}
	return &fakeAnswer{
		status: status,
		header: http.Header{"Content-Type": {"application/xml; charset=UTF-8"}},
		body:   []byte(body + "</Error>"),
	}
}

func (a *fakeAnswer) response(r *http.Request, breakOff bool) *http.Response {
	resp := &http.Response{
		Status:        fmt.Sprintf("%d %s", a.status, http.StatusText(a.status)),
		StatusCode:    a.status,
		Proto:         "HTTP/1.1",
		ProtoMajor:    1,
		ProtoMinor:    1,
		Header:        a.header.Clone(),
		ContentLength: int64(len(a.body)),
		Body:          io.NopCloser(bytes.NewReader(a.body)),
	}
	if resp.Header == nil {
		resp.Header = http.Header{}
	}
	if r.Method == http.MethodHead {
		resp.ContentLength, _ = strconv.ParseInt(a.header.Get("Content-Length"), 10, 64)
		resp.Body = http.NoBody
		return resp
	}
	resp.Header.Set("Content-Length", strconv.Itoa(len(a.body)))
	if breakOff && len(a.body) > 0 {
		resp.Body = io.NopCloser(io.MultiReader(bytes.NewReader(a.body[:len(a.body)/2]), brokenReader{}))
	}
	return resp
}

type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

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
