package gcs

import (
	"bytes"
	"context"
	"crypto/md5"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"reflect"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/api/option"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// TestMain collects garbage less often, which spares the suite a fifth of its time.
// Benchmarks report the heap in use, and run as users would. One test more than there are
// processors runs at once, since some wait for servers.
func TestMain(m *testing.M) {
	flag.Set("test.parallel", fmt.Sprint(runtime.GOMAXPROCS(0)+1))
	flag.Parse()
	if flag.Lookup("test.bench").Value.String() == "" {
		debug.SetGCPercent(400)
	}
	m.Run()
}

// storage returns a Storage on a machine of its own.
func (f *fakeGCS) storage(machine string, opts ...Option) *Storage {
	return NewStorage(f.Machine(machine).Bucket, opts...)
}

// What most tests save.
const (
	testModule  = "example.com/mod"
	testVersion = "v1.0.0"
)

// content is what one save stores; every byte of it tells whose it is.
type content struct{ mod, zip, info []byte }

func contentOf(who string, zipSize int) content {
	zip := bytes.Repeat([]byte("zip of "+who+"\n"), zipSize/8+1)
	return content{[]byte("module " + who), zip[:zipSize], []byte(`{"Version":"` + who + `"}`)}
}

// file returns what the object with that ending holds.
func (c content) file(ext string) []byte {
	return map[string][]byte{extMod: c.mod, extInfo: c.info, extZip: c.zip}[ext]
}

func (c content) save(ctx context.Context, s *Storage) error {
	return c.saveAs(ctx, s, testVersionName)
}

// saveSlowly saves from a reader that takes that time, after the .mod is written.
func (c content) saveSlowly(ctx context.Context, s *Storage, takes time.Duration) error {
	s.bucket.chunkSize = 1
	return c.saveFrom(ctx, s, &slowZip{bytes.NewReader(c.zip), takes})
}

// A slowZip takes its time after two bytes, once.
type slowZip struct {
	*bytes.Reader
	takes time.Duration
}

func (z *slowZip) Read(p []byte) (int, error) {
	if z.Size()-int64(z.Len()) < 2 {
		return z.Reader.Read(p[:min(len(p), 2)])
	}
	time.Sleep(z.takes)
	z.takes = 0
	return z.Reader.Read(p)
}

// saveHalf saves two bytes of the zip and then what the readers have. It makes s read
// one byte ahead, and send the rest in chunks as it is read.
func (c content) saveHalf(ctx context.Context, s *Storage, rest ...io.Reader) error {
	s.bucket.chunkSize = 1
	return c.saveFrom(ctx, s, io.MultiReader(append([]io.Reader{bytes.NewReader(c.zip[:2])}, rest...)...))
}

// saveAs saves as another version than most tests do.
func (c content) saveAs(ctx context.Context, s *Storage, v ModuleVersion) error {
	sum := md5.Sum(c.zip)
	return s.Save(ctx, v.Module, v.Version, c.mod, bytes.NewReader(c.zip), sum[:], c.info)
}

func (c content) saveFrom(ctx context.Context, s *Storage, zip io.Reader) error {
	sum := md5.Sum(c.zip)
	return s.Save(ctx, testModule, testVersion, c.mod, zip, sum[:], c.info)
}

// plain hides all methods of a reader but Read.
func plain(r io.Reader) io.Reader { return struct{ io.Reader }{r} }

func objectName(ext string) string { return testVersionName.object(ext) }

// bubble runs a test on an empty bucket, in virtual time.
func bubble(t *testing.T, roundTrip time.Duration, test func(t *testing.T, f *fakeGCS)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		t.Cleanup(func() { time.Sleep(2 * retryLimit) }) // calls that go on give up
		f := newFakeGCS(t)
		f.SetLatency(roundTrip)
		test(t, f)
	})
}

// withStorage runs a test whose requests take no time, with a Storage.
func withStorage(t *testing.T, test func(t *testing.T, f *fakeGCS, s *Storage)) {
	t.Helper()
	bubble(t, 0, func(t *testing.T, f *fakeGCS) { test(t, f, f.storage("m")) })
}

// inCrowd runs a test with a round trip of 20 ms.
func inCrowd(t *testing.T, test func(t *testing.T, f *fakeGCS)) {
	t.Helper()
	bubble(t, 20*time.Millisecond, test)
}

// inBubble is inCrowd for a test in which no object is changed twice within a
// second.
func inBubble(t *testing.T, test func(t *testing.T, f *fakeGCS)) {
	t.Helper()
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		test(t, f)
		require.Empty(t, f.RateViolations())
	})
}

// inFleet is inCrowd for a test at whose end no lock and no request is left.
func inFleet(t *testing.T, test func(t *testing.T, f *fakeGCS)) {
	t.Helper()
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		test(t, f)
		synctest.Wait()
		require.Empty(t, locks(f))
		requireNothingInFlight(t, f)
	})
}

// run runs a test as a subtest, in withStorage or one of its like.
func run[F any](t *testing.T, name string, in func(*testing.T, F), test F) {
	t.Run(name, func(t *testing.T) { in(t, test) })
}

// arena runs a test on an empty bucket, as inCrowd does.
type arena func(t *testing.T, test func(t *testing.T, f *fakeGCS))

// forNamed runs a test for each case.
func forNamed[C any](t *testing.T, in arena, cases map[string]C, test func(t *testing.T, f *fakeGCS, c C)) {
	for name, c := range cases {
		run(t, name, in, func(t *testing.T, f *fakeGCS) { test(t, f, c) })
	}
}

// forEach is forNamed for cases that name themselves.
func forEach[C any](t *testing.T, in arena, cases []C, test func(t *testing.T, f *fakeGCS, c C)) {
	for _, c := range cases {
		forNamed(t, in, map[string]C{fmt.Sprint(c): c}, test)
	}
}

// timeOf returns how long do takes.
func timeOf(do func()) time.Duration {
	start := time.Now()
	do()
	return time.Since(start)
}

// alongside calls do in a goroutine of its own, and returns what waits for its end.
func alongside(do func()) (wait func()) {
	var group sync.WaitGroup
	group.Go(do)
	return group.Wait
}

// within returns a context of the test that ends after that time.
func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// together runs n goroutines, and returns when all have ended.
func together(n int, do func(i int)) {
	var group sync.WaitGroup
	for i := range n {
		group.Go(func() { do(i) })
	}
	group.Wait()
}

// A contextEnd is a context that ends, and what a call says of it.
type contextEnd struct {
	context.Context
	kind  int
	cause error
}

// contextEnds returns a context that is cancelled after that time, and one whose deadline is
// then.
func contextEnds(parent context.Context, after time.Duration) []contextEnd {
	cancelled, cancel := context.WithCancel(parent)
	late, stop := context.WithTimeout(parent, after)
	context.AfterFunc(late, func() { cancel(); stop() })
	if after == 0 {
		cancel()
	}
	return []contextEnd{{cancelled, KindUnexpected, context.Canceled}, {late, KindGatewayTimeout, context.DeadlineExceeded}}
}

// returns checks the result of a call that must not fail.
func returns[T any](t *testing.T, want T) func(got T, err error) {
	return func(got T, err error) {
		t.Helper()
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
}

func requireNothingInFlight(t *testing.T, f *fakeGCS) {
	t.Helper()
	requests, bodies := f.InFlight()
	require.Zero(t, requests)
	require.Zero(t, bodies)
}

// A wire is the way of a machine's requests. What meets returns, if it is an answer or an
// error, is what a request meets. Otherwise the request goes on, as meets has edited it.
type wire struct {
	http.RoundTripper
	meets func(*http.Request) (*http.Response, error)
}

func (w wire) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	resp, err := w.meets(r)
	if resp == nil && err == nil {
		return w.RoundTripper.RoundTrip(r)
	}
	if r.Body != nil {
		r.Body.Close()
	}
	if resp != nil {
		resp.Request = r
	}
	return resp, err
}

// on returns a Storage whose requests go over a wire.
func (f *fakeGCS) on(meets func(*http.Request) (*http.Response, error), opts ...Option) *Storage {
	m := f.Register("wire")
	m.Connect(wire{m, meets})
	return NewStorage(m.Bucket, opts...)
}

// behind is a Storage whose requests pass through edit, which may answer itself.
func behind(f *fakeGCS, edit func(*http.Request) *http.Response, opts ...Option) *Storage {
	return f.on(func(r *http.Request) (*http.Response, error) { return edit(r), nil }, opts...)
}

// edited returns a Storage the n-th of whose answers, from 1, passes through edit.
func (f *fakeGCS) edited(edit func(n int, resp *http.Response)) *Storage {
	m, n := f.Register("edited"), 0
	m.Connect(wire{nil, func(r *http.Request) (*http.Response, error) {
		resp, err := m.RoundTrip(r)
		if n++; err == nil && edit != nil {
			edit(n, resp)
		}
		return resp, err
	}})
	return NewStorage(m.Bucket)
}

// become puts another body in the place of an answer's.
func become(resp *http.Response, body io.Reader) {
	resp.Body = struct {
		io.Reader
		io.Closer
	}{body, resp.Body}
}

// answer is a refusal, as GCS words it.
func answer(code int, message string) *http.Response {
	return &http.Response{
		StatusCode: code,
		Body:       io.NopCloser(strings.NewReader(fmt.Sprintf(`{"error":{"code":%d,"message":%q}}`, code, message))),
	}
}

// missing returns a Storage whose first listing lacks an object, for it has another name there.
func missing(f *fakeGCS, ext string) *Storage {
	name, listed := []byte(objectName(ext)), false
	return f.edited(func(_ int, resp *http.Response) {
		if !listed && resp.Request.Method == http.MethodGet && strings.HasSuffix(resp.Request.URL.Path, "/o") {
			listed = true
			body, _ := io.ReadAll(resp.Body)
			become(resp, bytes.NewReader(bytes.ReplaceAll(body, name, bytes.ToUpper(name))))
		}
	})
}

// allExts are the endings of a version's objects.
var allExts = []string{extInfo, extMod, extZip}

// subsetOf returns the endings that the bits are for, of allExts and the claim.
func subsetOf(bits int) (exts []string) {
	for bit, ext := range append(allExts[:3:3], extClaim) {
		if bits&(1<<bit) != 0 {
			exts = append(exts, ext)
		}
	}
	return exts
}

// ownMod is the generation that an object names if that of the .mod beside it is meant.
const ownMod = "own"

// putAs makes objects of a version, created then: a .mod with that marker, others with that
// metadata.
func (f *fakeGCS) putAs(c content, v ModuleVersion, at time.Time, mark, others map[string]string, exts ...string) {
	others = maps.Clone(others)
	if slices.Contains(exts, extMod) {
		mod := f.PutAt(v.object(extMod), c.mod, mark, at)
		if others[keyGeneration] == ownMod {
			others[keyGeneration] = formatGeneration(mod)
		}
	}
	for _, ext := range exts {
		if ext != extMod {
			f.PutAt(v.object(ext), c.file(ext), others, at)
		}
	}
}

// put is putAs for what saveVersion saves, now.
func (f *fakeGCS) put(v ModuleVersion, mark, others map[string]string, exts ...string) {
	f.putAs(contentOf(v.Version, 100), v, time.Now(), mark, others, exts...)
}

// storeFiles puts objects of a version into the bucket as Athens left them.
func storeFiles(f *fakeGCS, module, vers string, exts ...string) {
	f.put(ModuleVersion{module, vers}, nil, nil, exts...)
}

// storeVersion puts complete versions into the bucket.
func storeVersion(f *fakeGCS, module string, versions ...string) {
	for _, vers := range versions {
		storeFiles(f, module, vers, allExts...)
	}
}

func unfinishedVersion(f *fakeGCS, v ModuleVersion) {
	f.put(v, marked(time.Now().Add(ago), "a"), map[string]string{keySaveID: "a"}, allExts...)
}

// saveVersion saves a version whose files tell which it is.
func saveVersion(ctx context.Context, s *Storage, module, vers string) error {
	return contentOf(vers, 100).saveAs(ctx, s, ModuleVersion{module, vers})
}

// leave makes leftovers of a version, each as a save of that id would, and lets a
// second pass, before which GCS would take no other.
func leave(f *fakeGCS, mark map[string]string, exts ...string) {
	f.put(testVersionName, mark, map[string]string{keySaveID: mark[keySaveID]}, exts...)
	time.Sleep(time.Second)
}

func leaveUnfinished(f *fakeGCS) { leave(f, marked(givenUp, "other"), allExts...) }

// leftBehind puts what a save of that id left there, long ago: a .mod with that marker,
// and other objects with the id. Without an id they have the marker too.
func leftBehind(mark map[string]string, id string, exts ...string) func(*fakeGCS) {
	return func(f *fakeGCS) {
		c, others := contentOf("old", 50), mark
		if id != "" {
			others = map[string]string{keySaveID: id}
			c.info, c.zip = contentOf(id, 50).info, contentOf(id, 50).zip
		}
		f.putAs(c, testVersionName, time.Now().Add(1000*ago), mark, others, exts...)
	}
}

// logged returns the operations of the log, in the order of their arrival.
func logged(f *fakeGCS) []string {
	ops := []string{}
	for _, r := range f.Log() {
		ops = append(ops, r.Op)
	}
	return ops
}

// requireError checks that err is the package's own, of that kind and about
// that version.
func requireError(t *testing.T, err error, kind int, op, module, vers string) {
	t.Helper()
	var e *Error
	require.ErrorAs(t, err, &e)
	require.Equal(t, Error{op, kind, module, vers, e.Err}, *e)
	require.Error(t, e.Err)
}

// requireFenced checks that a save says that another took its version over, or deleted
// it.
func requireFenced(t *testing.T, err error) {
	t.Helper()
	requireKind(t, err, KindUnexpected)
	require.ErrorIs(t, err, errFenced)
}

func requireKind(t *testing.T, err error, kind int) {
	t.Helper()
	var e *Error
	require.ErrorAs(t, err, &e)
	requireError(t, err, kind, e.Op, testModule, testVersion)
}

// requireStored checks that the version is complete and of that content only.
func requireStored(t *testing.T, f *fakeGCS, c content) {
	t.Helper()
	requireVersion(t, f, testVersionName, c)
}

// requireComplete is requireStored for a version that an origin stored.
func requireComplete(t *testing.T, f *fakeGCS, module, vers string) {
	t.Helper()
	requireVersion(t, f, ModuleVersion{module, vers}, contentOf(vers, 100))
}

func requireVersion(t *testing.T, f *fakeGCS, v ModuleVersion, c content) {
	t.Helper()
	for _, ext := range allExts {
		o, want := f.Get(v.object(ext)), c.file(ext)
		require.NotNil(t, o, v.object(ext))
		require.True(t, bytes.Equal(want, o.Data), "%s is %.40q, not %.40q", o.Name, o.Data, want)
	}
	require.Empty(t, f.Get(v.object(extMod)).Metadata)
}

func requireExists(t *testing.T, s *Storage, vers string, want bool) {
	t.Helper()
	returns(t, want)(s.Exists(t.Context(), testModule, vers))
}

func locks(f *fakeGCS) []string {
	return slices.DeleteFunc(f.Names(), func(name string) bool { return !strings.HasSuffix(name, ".lock") })
}

// syncedLog is a log that several machines write to.
type syncedLog struct {
	mu sync.Mutex
	strings.Builder
}

func (l *syncedLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.Builder.Write(p)
}

func (l *syncedLog) option() Option { return WithLogger(slog.New(slog.NewTextHandler(l, nil))) }

// lines returns the lines at that level.
func (l *syncedLog) lines(level slog.Level) (lines []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.String()) {
		if strings.Contains(line, "level="+level.String()+" ") {
			lines = append(lines, line)
		}
	}
	return lines
}

// requireList checks that List returns these versions in this order.
func requireList(t *testing.T, s *Storage, module string, want ...string) {
	t.Helper()
	returns(t, append([]string{}, want...))(s.List(t.Context(), module)) // not nil
}

// inVirtualTime runs f on an empty bucket with a round trip of 20 ms, in a
// bubble, which only a test can have.
func inVirtualTime(b *testing.B, run func(t *testing.T, f *fakeGCS) traffic) traffic {
	b.Helper()
	var counted traffic
	all := func(pat, str string) (bool, error) { return true, nil }
	ok := testing.RunTests(all, []testing.InternalTest{{Name: b.Name(), F: func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFakeGCS(t)
			f.tolerate() // the baseline
			f.SetLatency(20 * time.Millisecond)
			counted = run(t, f)
		})
	}}})
	if !ok {
		b.FailNow()
	}
	return counted
}

// everyCall calls everything that can fail, of which each wants the version to
// exist or not.
func everyCall(s *Storage) map[string]func(ctx context.Context) error {
	return callsOn(s, testVersionName)
}

// errOf returns the error of a call, which comes with nothing else.
func errOf[T any](got T, err error) error {
	if err != nil && !reflect.ValueOf(&got).Elem().IsZero() {
		panic(fmt.Sprintf("%v in spite of an error: %v", got, err))
	}
	return err
}

// callsOn is everyCall for that version.
func callsOn(s *Storage, v ModuleVersion) map[string]func(ctx context.Context) error {
	read := func(op string) func(ctx context.Context) error {
		return func(ctx context.Context) error { _, err := readers[op](ctx, s, v.Module, v.Version); return err }
	}
	scan := func(module string) func(ctx context.Context) error {
		return func(ctx context.Context) (err error) {
			for _, err = range s.Scan(ctx, module) {
			}
			return err
		}
	}
	next := answering(v.Version, nil)
	return map[string]func(ctx context.Context) error{
		"Save":     func(ctx context.Context) error { return contentOf("a", 100).saveAs(ctx, s, v) },
		"Exists":   func(ctx context.Context) error { return errOf(s.Exists(ctx, v.Module, v.Version)) },
		"Info":     read("Info"),
		"GoMod":    read("GoMod"),
		"Zip":      read("Zip"),
		"List":     func(ctx context.Context) error { return errOf(s.List(ctx, v.Module)) },
		"Delete":   func(ctx context.Context) error { return s.Delete(ctx, v.Module, v.Version) },
		"Catalog":  func(ctx context.Context) error { _, _, err := s.Catalog(ctx, "", 0); return err },
		"Scan":     scan(v.Module),
		"Scan all": scan(""),
		"Repair":   func(ctx context.Context) error { _, err := s.Repair(ctx, v.Module, v.Version); return err },
		"Check":    s.Check,
		"Stash":    func(ctx context.Context) error { return errOf(s.SingleFlight(next).Stash(ctx, v.Module, v.Version)) },
	}
}

// forEveryCall runs a test for each call, of a Storage on a bucket of its own.
func forEveryCall(t *testing.T, make func(f *fakeGCS) *Storage, test func(t *testing.T, f *fakeGCS, name string, call func(context.Context) error)) {
	for name := range everyCall(nil) {
		run(t, name, inCrowd, func(t *testing.T, f *fakeGCS) {
			test(t, f, name, everyCall(make(f))[name])
		})
	}
}

// some returns the cases, and with -short the first alone.
func some[C any](cases ...C) []C {
	if testing.Short() {
		return cases[:1]
	}
	return cases
}

// readFunc is a reader made of a function.
type readFunc func([]byte) (int, error)

func (read readFunc) Read(p []byte) (int, error) { return read(p) }

// ahead returns a Storage whose clock is an hour ahead.
func ahead(f *fakeGCS, machine string) *Storage {
	s := f.storage(machine)
	s.now = func() time.Time { return time.Now().Add(time.Hour) }
	return s
}

// requireSavableAtOnce is requireSavable by a save that does not wait.
func requireSavableAtOnce(t *testing.T, f *fakeGCS) {
	t.Helper()
	f.onRequest(nil)
	require.Less(t, timeOf(func() { requireSavable(t, f) }), time.Second)
}

// givesUp reports whether a request writes the marker of a save that has failed.
func givesUp(r *fakegcs.Request) bool {
	return r.Metadata[keyInProgress] == givenUp.Format(time.RFC3339Nano)
}

// fakeGCS is the bucket of a test.
type fakeGCS struct {
	*fakegcs.Server
	tolerant bool
	hook     func(*fakegcs.Request) fakegcs.Fault
	answered []func(*fakegcs.Request)
}

// newFakeGCS returns an empty bucket. The test fails when it ends with
// violations, unless it called tolerate. A test that fails prints its requests.
func newFakeGCS(t testing.TB) *fakeGCS {
	f, start := &fakeGCS{Server: fakegcs.New()}, time.Now()
	t.Cleanup(func() {
		f.Close()
		if !f.tolerant {
			for _, v := range f.Violations() {
				t.Errorf("the save protocol was violated: %s", v)
			}
		}
		if log := f.Log(); t.Failed() {
			for _, r := range log[:min(len(log), 200)] {
				t.Log(r.Start.Sub(start), r)
			}
		}
	})
	return f
}

// tolerate lets the test end with violations.
func (f *fakeGCS) tolerate() { f.tolerant = true }

// A matcher picks requests.
type matcher = func(*fakegcs.Request) bool

// on picks the requests of a machine, of a kind, for an object of the version that most
// tests save. "" is any.
func on(machine, op, ext string) matcher {
	return func(r *fakegcs.Request) bool {
		return (machine == "" || r.Machine == machine) && (op == "" || r.Op == op) && (ext == "" || r.Object == objectName(ext))
	}
}

// nth picks the n-th request of a machine, from 0.
func nth(machine string, n int) matcher {
	return func(r *fakegcs.Request) bool { return r.Machine == machine && r.MachineN == n }
}

// first picks the first n of some requests.
func first(n int, which matcher) matcher {
	var met atomic.Int64
	return func(r *fakegcs.Request) bool { return which(r) && met.Add(1) <= int64(n) }
}

// onRequest is OnRequest for a hook that does not care for the context; nil is none.
func (f *fakeGCS) onRequest(hook func(*fakegcs.Request) fakegcs.Fault) {
	if f.hook = hook; hook == nil {
		f.OnRequest(nil)
		return
	}
	f.OnRequest(func(_ context.Context, r *fakegcs.Request) fakegcs.Fault { return hook(r) })
}

// fault gives a fault to some requests. What other hook there is stays, for the others.
func (f *fakeGCS) fault(fault fakegcs.Fault, to matcher) {
	hook := f.hook
	f.onRequest(func(r *fakegcs.Request) fakegcs.Fault {
		switch {
		case to(r):
			return fault
		case hook != nil:
			return hook(r)
		}
		return fakegcs.NoFault
	})
}

// before calls do before each of some requests is served. What other hook there is
// stays.
func (f *fakeGCS) before(which matcher, do func()) {
	f.fault(fakegcs.NoFault, func(r *fakegcs.Request) bool {
		if which(r) {
			do()
		}
		return false
	})
}

// count returns how many requests of the log match.
func (f *fakeGCS) count(which matcher) (n int) {
	for _, r := range f.Log() {
		if which(&r) {
			n++
		}
	}
	return n
}

// atFirst calls do before the first of some requests is served.
func (f *fakeGCS) atFirst(which matcher, do func()) { f.before(first(1, which), do) }

// onAnswer is OnAnswer for a hook that does not care for the context. What other hook
// there is comes first.
func (f *fakeGCS) onAnswer(hook func(*fakegcs.Request)) {
	f.answered = append(f.answered, hook)
	f.OnAnswer(func(_ context.Context, r *fakegcs.Request) {
		for _, hook := range f.answered {
			hook(r)
		}
	})
}

// after calls do when one of some requests is answered.
func (f *fakeGCS) after(which matcher, do func()) {
	f.onAnswer(func(r *fakegcs.Request) {
		if which(r) {
			do()
		}
	})
}

// applied picks those of some requests that are applied. It is for after.
func applied(which matcher) matcher {
	return func(r *fakegcs.Request) bool { return which(r) && r.Applied }
}

// but picks those of some requests that are not among others.
func but(which, others matcher) matcher {
	return func(r *fakegcs.Request) bool { return which(r) && !others(r) }
}

// listen serves the bucket on a loopback port, for tests with real sockets and
// real time. It returns the address, without a path.
func (f *fakeGCS) listen(t testing.TB) string {
	server := httptest.NewServer(f.Handler())
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	return server.URL
}

// over is Machine for a bucket behind listen.
func (f *fakeGCS) over(t testing.TB, endpoint, name string, wire *http.Transport, opts ...option.ClientOption) *fakegcs.Machine {
	m := f.Register(name)
	t.Cleanup(wire.CloseIdleConnections)
	m.Connect(m.Over(wire), append(opts, option.WithEndpoint(endpoint+"/storage/v1/"))...)
	return m
}
