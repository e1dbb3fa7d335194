package fakegcs

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"mime"
	"mime/multipart"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
)

// call is a request on its way through the layer.
type call struct {
	*Request // guarded by fake.mu
	machine  *Machine

	base     string // scheme and host it was sent to
	method   string
	bucket   string
	query    url.Values
	header   http.Header
	xml      bool
	session  string
	resource resource
	media    []byte
	bad      string // why it cannot be understood
	changes  int    // of the Server when it arrived
}

// resource is the part of an object's JSON that clients send.
type resource struct {
	Name        string          `json:"name"`
	ContentType string          `json:"contentType"`
	Metadata    json.RawMessage `json:"metadata"`
	MD5         string          `json:"md5Hash"`
	CRC32C      string          `json:"crc32c"`
	headers     map[string]string
}

// session is a resumable upload.
type session struct {
	name     string
	cond     map[string]string
	query    url.Values
	resource resource
	data     []byte
	finished *answer // the answer to its finalization
	ended    *answer // the answer to everything, of a session that is lost
}

// answer is what the layer has decided to say.
type answer struct {
	status  int
	header  http.Header
	body    []byte
	applied bool
}

var (
	errClosed = errors.New("fakegcs: the server is closed")
	errReset  = &net.OpError{Op: "read", Net: "tcp", Err: os.NewSyscallError("read", syscall.ECONNRESET)}
)

// RoundTrip sends a request to the bucket.
func (m *Machine) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := m.fake.serve(m, r)
	if err != nil {
		return nil, err
	}
	resp.Request = r
	return resp, nil
}

func (f *Server) serve(m *Machine, r *http.Request) (*http.Response, error) {
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
	} else if c.Fault == LostBody {
		c.Received /= 2
	}
	return resp, nil
}

type countedBody struct {
	io.Reader
	fake *Server
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
func (f *Server) carry(r *http.Request, c *call) (*http.Response, error) {
	ctx := r.Context()
	body, err := readRequest(r)
	f.mu.Lock()
	c.Sent = int64(len(body))
	hook, latency := f.requestHook, f.latency
	if err == nil {
		c.read(body)
	}
	copied := *c.Request
	f.mu.Unlock()
	if err != nil {
		return nil, err // the sender broke off: nothing happened
	}
	if err := f.sleep(ctx, latency/2); err != nil {
		return nil, err
	}

	fault := NoFault
	if hook != nil {
		fault = hook(ctx, &copied)
	}
	f.mu.Lock()
	c.Fault = fault
	f.mu.Unlock()
	switch fault {
	case ConnectionRefused:
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	case Hung:
		return nil, f.hang(ctx)
	case Stray, StrayReset:
		f.mu.Lock()
		f.strays = append(f.strays, c)
		f.mu.Unlock()
		if fault == StrayReset {
			return nil, errReset
		}
		return nil, f.hang(ctx)
	case CrashBefore:
		c.machine.Crash()
	}

	a, err := f.applyWhenRunning(ctx, c)
	if err != nil {
		return nil, err
	}

	f.mu.Lock()
	c.Status, c.Applied, c.Received = a.status, a.applied, int64(len(a.body))
	copied = *c.Request
	copied.Body = a.body
	answered := f.answerHook
	f.mu.Unlock()
	if answered != nil {
		answered(ctx, &copied)
	}

	switch fault {
	case LostReset:
		err = errReset
	case LostEOF:
		err = io.EOF
	case HungApplied:
		return nil, f.hang(ctx)
	case CrashAfter:
		c.machine.Crash()
	}
	if err := f.sleep(ctx, latency/2); err != nil {
		return nil, err
	}
	if err := f.awaitRunning(ctx, c.machine); err != nil {
		return nil, err
	}
	if err := cmp.Or(ctx.Err(), err); err != nil {
		return nil, err
	}
	return a.response(r, fault == LostBody), nil
}

// applyWhenRunning applies a request unless its machine is paused or crashed.
func (f *Server) applyWhenRunning(ctx context.Context, c *call) (*answer, error) {
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
		var a *answer
		switch c.Fault {
		case Unavailable:
			a = jsonFailure(http.StatusServiceUnavailable, "backendError", "We encountered an internal error. Please try again.")
		case TooMany:
			a = tooManyRequests(c.Object)
		case PreconditionFailed:
			a = jsonFailure(http.StatusPreconditionFailed, "conditionNotMet", conditionNotMet)
		default:
			a = f.apply(c)
		}
		f.mu.Unlock()
		return a, nil
	}
}

// awaitRunning returns when the machine is neither paused nor crashed.
func (f *Server) awaitRunning(ctx context.Context, m *Machine) error {
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
			return errClosed
		}
	}
}

func (f *Server) hang(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-f.closed:
		return errClosed
	}
}

func (f *Server) sleep(ctx context.Context, d time.Duration) error {
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
		return errClosed
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
func (f *Server) arrive(m *Machine, r *http.Request) *call {
	c := &call{
		Request: &Request{Machine: m.Name, Op: "unknown", Start: time.Now()},
		machine: m,
		method:  r.Method,
		query:   r.URL.Query(),
		header:  r.Header.Clone(),
		base:    r.URL.Scheme + "://" + r.URL.Host,
	}
	if r.URL.Host == "" { // as a server sees it
		c.base = "http://" + r.Host
		if r.TLS != nil {
			c.base = "https://" + r.Host
		}
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
			after, _ := base64.URLEncoding.DecodeString(c.query.Get("pageToken"))
			c.After, _ = splitToken(after)
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
	c.N, c.MachineN, c.changes = len(f.entries), m.requests, len(f.changes)
	m.requests++
	if !f.unlogged {
		f.entries = append(f.entries, c.Request)
	}
	return c
}

// read takes in the body of a request.
func (c *call) read(body []byte) {
	switch c.Op {
	case "insert":
		c.readMultipart(body)
	case "chunk":
		c.media = body
	case "start", "patch":
		c.readResource(body)
	}
}

func (c *call) readResource(body []byte) {
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
func (r resource) metadata() (metadata map[string]*string, err error) {
	if r.Metadata != nil {
		err = json.Unmarshal(r.Metadata, &metadata)
	}
	return metadata, err
}

func (c *call) readMultipart(body []byte) {
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

// machineHeader names the machine of a request that comes over a socket.
const machineHeader = "X-Fake-Machine"

// Handler serves the bucket over sockets. The address of the server, without a
// path, is what STORAGE_EMULATOR_HOST may be set to. Close ends all requests.
func (f *Server) Handler() http.Handler {
	stranger := f.Register("")
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		m := cmp.Or(f.machines[r.Header.Get(machineHeader)], stranger)
		f.mu.Unlock()
		resp, err := f.serve(m, r)
		if err != nil {
			// There is a connection, so it cannot be refused. A reset is as
			// retryable.
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
	})
}

// Over returns a transport that sends the machine's requests through wire to a
// server of Handler.
func (m *Machine) Over(wire http.RoundTripper) http.RoundTripper {
	return named{m.Name, wire}
}

type named struct {
	name string
	wire http.RoundTripper
}

func (n named) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set(machineHeader, n.name)
	return n.wire.RoundTrip(r)
}
