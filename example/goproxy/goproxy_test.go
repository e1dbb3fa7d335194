package main

import (
	"archive/zip"
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"cloud.google.com/go/storage"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/mod/module"
	"golang.org/x/mod/sumdb"
	"golang.org/x/mod/sumdb/dirhash"
	"golang.org/x/mod/sumdb/note"

	"github.com/athensgcs/gcs"
	"github.com/athensgcs/gcs/internal/fakegcs"
)

// TestMain is the program itself if a test says so.
func TestMain(m *testing.M) {
	if os.Getenv("GOPROXY_TEST_MAIN") != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestDemo(t *testing.T) {
	newUpstream(t)
	var out bytes.Buffer
	err := run(t.Context(), []string{"example.com/hello@v1.0.0", "example.com/Upper@latest"}, &out)
	require.NoError(t, err, out.String())
	steps := strings.Split(out.String(), "\n\n")
	require.Len(t, steps, 13, out.String())
	hello, upper := "  example.com/hello@v1.0.0", "  example.com/Upper@v0.1.0"
	states := func(step string) string { // one space for any number, and no sizes
		return regexp.MustCompile(` +([0-9.]+ k?B +)?`).ReplaceAllString(step, " ")
	}
	assert.Contains(t, steps[1], " put ")
	assert.Contains(t, steps[3], hello)
	assert.Contains(t, steps[3], upper)
	assert.Equal(t, " state size missing version\n complete example.com/hello@v1.0.0\n complete example.com/Upper@v0.1.0", states(steps[3]))
	assert.NotContains(t, steps[5], " put ")
	assert.Equal(t, "Both downloads have the same checksums.", steps[6])
	assert.Equal(t, " state size missing version\n partial info, zip example.com/hello@v1.0.0", states(steps[8]))
	assert.Contains(t, steps[10], " put ")
	assert.Equal(t, " state size missing version\n complete example.com/hello@v1.0.0", states(steps[11]))
	assert.Equal(t, "It has the same checksums as before.\n", steps[12])
	assert.NotContains(t, out.String(), "level=")

	err = run(t.Context(), []string{"example.com/hello@v1.9.0"}, io.Discard)
	assert.ErrorContains(t, err, "example.com/hello@v1.9.0")
	assert.ErrorContains(t, err, "404 Not Found")
}

// TestDemoFails has every step of the demo come out otherwise than it says.
func TestDemoFails(t *testing.T) {
	upstream := newUpstream(t)
	fake, bucket := newBucket(t)
	store := gcs.NewStorage(bucket)
	d := demo{out: io.Discard, store: store}
	require.NoError(t, d.downloadTwice(t.Context(), []string{"example.com/hello@v1.0.0"}))
	assert.EqualError(t, d.printStates(t.Context(), d.downloaded, gcs.Partial),
		"example.com/hello@v1.0.0 is complete, not partial")
	other := d.downloaded[0]
	other.Sum = "h1:other"
	assert.EqualError(t, d.passAgain(t.Context(), newProxy(store), []download{other}),
		"example.com/hello@v1.0.0: other checksums than before")
	fake.OnAnswer(func(_ context.Context, r *fakegcs.Request) {
		if r.Op == "list" && r.Object == "example.com/hello/@v/" { // the second step
			fake.Remove("example.com/hello/@v/v1.0.0.zip")
		}
	})
	assert.ErrorContains(t, d.downloadTwice(t.Context(), []string{"example.com/hello@v1.0.0"}), "404 Not Found", "was upstream asked?")
	fake.OnAnswer(nil)
	require.NoError(t, d.passAgain(t.Context(), newProxy(store), d.downloaded))
	require.NoError(t, os.RemoveAll(upstream))
	assert.ErrorContains(t, d.heal(t.Context(), bucket), "404 Not Found")
	assert.Error(t, d.heal(t.Context(), bucket), "nothing left to delete")
	assert.Empty(t, fake.Log(), "grows as long as the program runs")
}

// TestEmulator has two programs use the bucket of a third.
func TestEmulator(t *testing.T) {
	newUpstream(t)
	lines, _ := start(t, "-addr", "127.0.0.1:0", "-emulator", "127.0.0.1:0")
	var bucket, host string
	_, err := fmt.Sscanf(<-lines, "bucket %s is at STORAGE_EMULATOR_HOST=%s", &bucket, &host)
	require.NoError(t, err)
	t.Setenv("STORAGE_EMULATOR_HOST", host)

	// What is saved from outside, the proxy has, and the other way round.
	client, err := storage.NewClient(t.Context())
	require.NoError(t, err)
	defer client.Close()
	store := gcs.NewStorage(client.Bucket(bucket))
	require.NoError(t, store.Save(t.Context(), "example.com/saved", "v1.0.0", []byte("module example.com/saved\n"),
		strings.NewReader("zip"), nil, []byte(`{"Version": "v1.0.0"}`)))
	proxy := proxyURL(t, <-lines)
	assert.Equal(t, "zip", httpGet(t, proxy+"/example.com/saved/@v/v1.0.0.zip", http.StatusOK))
	httpGet(t, proxy+"/example.com/hello/@v/v1.1.0.info", http.StatusOK)
	exists, err := store.Exists(t.Context(), "example.com/hello", "v1.1.0")
	require.NoError(t, err)
	assert.True(t, exists)

	// A bucket that is not our own is not broken on purpose.
	for _, saves := range []bool{true, false} { // the second time it is there
		var out bytes.Buffer
		require.NoError(t, run(t.Context(), []string{"-bucket", bucket, "example.com/hello@v1.0.0"}, &out), out.String())
		assert.Equal(t, saves, strings.Contains(out.String(), " put "), out.String())
		assert.NotContains(t, out.String(), "partial")
	}
	err = run(t.Context(), []string{"-bucket", "none", "example.com/hello@v1.0.0"}, io.Discard)
	assert.True(t, gcs.Is(err, gcs.KindNotFound), "%v", err)
}

func TestArguments(t *testing.T) {
	for _, test := range []struct {
		args           string
		status         int
		stdout, stderr string
	}{
		{"-h", 0, "MODULE@VERSION", ""},
		{"-h", 0, "-emulator address", ""},
		{"-x", 2, "", "goproxy: flag provided but not defined: -x\n"},
		{"-bucket b -emulator localhost:0", 2, "", "goproxy: -emulator serves the bucket in memory, not that of -bucket\n"},
		{"example.com/hello", 2, "", "goproxy: example.com/hello: no version; the newest is example.com/hello@latest\n"},
		{"example.com/hello@", 2, "", "goproxy: example.com/hello: no version; the newest is example.com/hello@latest\n"},
		{"-- -json@v1.0.0", 2, "", "goproxy: malformed module path \"-json\": leading dash\n"},
		{"-addr nowhere", 1, "", "goproxy: listen tcp: address nowhere: missing port in address\n"},
	} {
		cmd := exec.Command(os.Args[0], strings.Fields(test.args)...)
		cmd.Env = append(os.Environ(), "GOPROXY_TEST_MAIN=1")
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		_ = cmd.Run() // the status tells
		assert.Equal(t, test.status, cmd.ProcessState.ExitCode(), test.args)
		assert.Contains(t, stdout.String(), test.stdout, test.args)
		assert.Equal(t, test.stderr, stderr.String(), test.args)
	}
}

// TestBadRequests asks for what the go command must not be bothered with.
func TestBadRequests(t *testing.T) {
	newUpstream(t)
	_, bucket := newBucket(t)
	store := gcs.NewStorage(bucket)
	t.Setenv("PATH", "") // no go command
	p := newProxy(store)
	p.ctx, p.report = t.Context(), func(entry) {}
	server := httptest.NewServer(p)
	defer server.Close()
	for _, path := range []string{
		"", "/", "/example.com/hello", "/example.com/hello/@v/", "/example.com/hello/@v/v1.0.0", "/example.com/Upper/@latest",
		"/-flag/@latest", "/example.com/-flag/@v/-flag.mod", "/example.com/hello/@v/-flag.info", "/example.com/hello/@v/--.info",
		"/example.com/hello/@v/none.info", "/example.com/hello/@v/patch.info", "/example.com/hello/@v/upgrade.info",
		"/example.com/hello/@v/.info", "/example.com/hello/@v/...info", "/example.com/hello/@v/a%0ab.info", "/example.com/hello/@v/%3Cv1.info",
		"/example.com/h...o/@latest", "/example.com/h...o/@v/list", "/example.com/h...o/@v/v1.0.0.info",
		"/sumdb/", "/sumdb/example.test/supported",
	} {
		httpGet(t, server.URL+path, http.StatusNotFound)
	}
	resp, err := http.Post(server.URL+"/example.com/hello/@v/v1.0.0.info", "", nil)
	require.NoError(t, err)
	resp.Body.Close()
	assert.Equal(t, http.StatusMethodNotAllowed, resp.StatusCode)
	httpGet(t, server.URL+"/example.com/hello/@latest", http.StatusInternalServerError) // that was for the go command
}

// TestLog asks for lines of the log that a reader can trust.
func TestLog(t *testing.T) {
	newUpstream(t)
	t.Setenv("GOPROXY", "http://127.0.0.1:1") // nobody there
	lines, _ := start(t, "-addr", "127.0.0.1:0")
	proxy := proxyURL(t, <-lines)
	for path, status := range map[string]int{
		"/x%0Atime=now%20level=INFO%20msg=forged": http.StatusNotFound,
		"/example.com/hello/@latest":              http.StatusInternalServerError,
	} {
		httpGet(t, proxy+path, status)
		line := <-lines
		assert.Regexp(t, fmt.Sprintf(`^time=\d{4}-\d\d-\d\dT\d\d:\d\d:\S+ level=\w+ msg=request status=%d path=\S+ `, status), line)
		if status == http.StatusInternalServerError {
			assert.Contains(t, line, "level=ERROR")
			assert.Regexp(t, `error=".*127\.0\.0\.1:1`, line)
		}
	}
}

// TestChecksumDatabase has the go command reach nothing but this proxy, and
// check what it gets from it.
func TestChecksumDatabase(t *testing.T) {
	dir := newUpstream(t)
	skey, vkey, err := note.GenerateKey(rand.Reader, "sum.example.test")
	require.NoError(t, err)
	database := sumdb.NewServer(sumdb.NewTestServer(skey, func(path, version string) ([]byte, error) {
		assert.Equal(t, "example.com/hello@v1.0.0", path+"@"+version)
		file := filepath.Join(dir, path, "@v", version)
		zipSum, err := dirhash.HashZip(file+".zip", dirhash.Hash1)
		if err != nil {
			return nil, err
		}
		modSum, err := dirhash.Hash1([]string{"go.mod"}, func(string) (io.ReadCloser, error) { return os.Open(file + ".mod") })
		return fmt.Appendf(nil, "%s %s %s\n%[1]s %[2]s/go.mod %[4]s\n", path, version, zipSum, modSum), err
	}))
	mux := http.NewServeMux()
	mux.Handle("/", http.FileServer(http.Dir(dir)))
	mux.Handle("/sumdb/sum.example.test/", http.StripPrefix("/sumdb/sum.example.test", database))
	mux.HandleFunc("/sumdb/sum.example.test/supported", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("/sumdb/broken.example.test/", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) })
	mux.HandleFunc("/sumdb/short.example.test/", func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Content-Length", "9") })
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		assert.NotContains(t, r.URL.Path, "..")
		mux.ServeHTTP(w, r)
	}))
	defer upstream.Close()
	without := httptest.NewServer(http.FileServer(http.Dir(t.TempDir())))
	defer without.Close()
	t.Setenv("GOPROXY", without.URL+"/,"+upstream.URL)
	t.Setenv("GOSUMDB", vkey)
	t.Setenv("GOPATH", t.TempDir()) // where the go command remembers what the database said
	lines, _ := start(t, "-addr", "127.0.0.1:0")
	proxy := proxyURL(t, <-lines)

	download := func() error {
		cache := t.TempDir()
		_, err := modDownload(t.Context(), cache, append(goEnv(cache), "GOPROXY="+proxy, "GOPATH="+cache), "example.com/hello@v1.0.0")
		return err
	}
	require.NoError(t, download())
	httpGet(t, proxy+"/sumdb/other.example.test/supported", http.StatusNotFound)
	httpGet(t, proxy+"/sumdb/broken.example.test/supported", http.StatusInternalServerError)
	httpGet(t, proxy+"/sumdb/../secret", http.StatusNotFound)
	httpGet(t, proxy+"/sumdb/..%2fsecret", http.StatusNotFound)
	_, err = http.Get(proxy + "/sumdb/short.example.test/supported")
	assert.ErrorIs(t, err, io.EOF, "an answer cut short looks whole")

	_, vkey, err = note.GenerateKey(rand.Reader, "sum.example.test")
	require.NoError(t, err)
	t.Setenv("GOSUMDB", vkey)
	assert.ErrorContains(t, download(), "verifying", "was the database asked?")
}

func TestServe(t *testing.T) {
	upstream := newUpstream(t)
	lines, interrupt := start(t, "-addr", "127.0.0.1:0")
	proxy := proxyURL(t, <-lines)

	dir := t.TempDir()
	goRun := func(args ...string) (string, error) {
		cache := t.TempDir() // empty, so that everything is asked for
		out, err := goCommand(t.Context(), dir, append(goEnv(cache),
			"GOPROXY="+proxy, "GOFLAGS=-modcacherw -mod=mod"), args...)
		return strings.TrimSpace(string(out)), err
	}
	for query, want := range map[string]string{
		"example.com/hello@latest":  "example.com/hello v1.1.0",
		"example.com/hello@v1.0":    "example.com/hello v1.0.0",
		"example.com/hello@<v1.1.0": "example.com/hello v1.0.0",
		"example.com/hello@feature": "example.com/hello v1.0.0",
		"example.com/Upper@latest":  "example.com/Upper v0.1.0",
		"example.com/untagged@main": "example.com/untagged " + untagged,
		"example.com/new@latest":    "example.com/new " + untagged, // no version has a tag
	} {
		got, err := goRun("list", "-m", query)
		require.NoError(t, err, query)
		assert.Equal(t, want, got)
	}
	for _, query := range []string{"example.com/hello@v1.9.0", "example.com/hello@nobranch", "example.com/nothing@latest"} {
		_, err := goRun("list", "-m", query)
		assert.ErrorContains(t, err, "404 Not Found", query)
	}

	// The go command finds the module of a package by asking for every prefix
	// of its path.
	write(t, filepath.Join(dir, "go.mod"), "module example.com/main\n")
	write(t, filepath.Join(dir, "main.go"), `package main

import "example.com/hello/greet"

func main() { print(greet.Text) }
`)
	_, err := goRun("get", "example.com/hello/greet@latest")
	require.NoError(t, err)
	_, err = goRun("build", "-o", filepath.Join(dir, "main.exe"), ".")
	require.NoError(t, err)

	// Without the upstream there is what the bucket has.
	_, err = goRun("mod", "download", "example.com/untagged@"+untagged)
	require.NoError(t, err)
	require.NoError(t, os.RemoveAll(upstream))
	for query, want := range map[string]string{
		"example.com/hello@latest":    "example.com/hello v1.1.0",
		"example.com/untagged@latest": "example.com/untagged " + untagged,
	} {
		got, err := goRun("list", "-m", query)
		require.NoError(t, err, query)
		assert.Equal(t, want, got)
	}
	_, err = goRun("build", "-o", filepath.Join(dir, "main.exe"), ".")
	require.NoError(t, err)

	assert.Equal(t, "v1.0.0\nv1.1.0\n", httpGet(t, proxy+"/example.com/hello/@v/list", http.StatusOK))

	require.NoError(t, interrupt())
	_, err = http.Get(proxy)
	assert.Error(t, err, "still listening")
}

// Requests to two proxies on one bucket share a download, and so a save.
func TestMissesShareOneDownload(t *testing.T) {
	newUpstream(t)
	fake, bucket := newBucket(t)
	var saves atomic.Int64
	fake.OnRequest(func(_ context.Context, r *fakegcs.Request) fakegcs.Fault {
		if r.Op == "insert" && strings.HasSuffix(r.Object, ".mod") {
			saves.Add(1)
		}
		return fakegcs.NoFault
	})
	var servers []*httptest.Server
	for range 2 {
		p := newProxy(gcs.NewStorage(bucket))
		p.ctx, p.report = t.Context(), func(entry) {}
		servers = append(servers, httptest.NewServer(p))
	}
	var wg sync.WaitGroup
	for i, ext := range []string{"info", "mod", "zip", "info", "mod", "zip"} {
		wg.Go(func() {
			httpGet(t, servers[i%2].URL+"/example.com/!upper/@v/v0.1.0."+ext, http.StatusOK)
		})
	}
	wg.Wait()
	for _, server := range servers {
		server.Close()
	}
	assert.EqualValues(t, 1, saves.Load())
}

func TestUpstreamProxies(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	t.Setenv("GOPROXY", "http://localhost:"+port+",direct")
	_, err = upstreamProxies(t.Context(), l)
	assert.ErrorContains(t, err, "this proxy itself")
	t.Setenv("GOPROXY", "file:///modules,http://localhost:1/|https://example.test/go,direct,http://localhost:2")
	urls, err := upstreamProxies(t.Context(), l)
	require.NoError(t, err)
	assert.Equal(t, []string{"http://localhost:1", "https://example.test/go"}, urls)
}

// start runs the program until stop is called or the test ends. The channel has
// the lines that it prints.
func start(t *testing.T, args ...string) (lines <-chan string, stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		defer w.Close()
		done <- run(ctx, args, w)
	}()
	printed := make(chan string, 1000)
	go func() {
		defer close(printed)
		for scanner := bufio.NewScanner(r); scanner.Scan(); {
			printed <- scanner.Text()
		}
	}()
	stop = sync.OnceValue(func() error {
		cancel()
		return <-done
	})
	t.Cleanup(func() { assert.NoError(t, stop()) })
	return printed, stop
}

func proxyURL(t *testing.T, line string) string {
	t.Helper()
	_, rest, ok := strings.Cut(line, "GOPROXY=")
	require.True(t, ok, line)
	url, _, _ := strings.Cut(rest, " ")
	return url
}

// httpGet returns the body of the answer, which must have the status.
func httpGet(t *testing.T, url string, status int) string {
	t.Helper()
	resp, err := http.Get(url)
	if !assert.NoError(t, err) {
		return ""
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	assert.NoError(t, err)
	assert.Equal(t, status, resp.StatusCode, "%s: %s", url, body)
	return string(body)
}

// newBucket returns an empty bucket.
func newBucket(t *testing.T) (*fakegcs.Server, *storage.BucketHandle) {
	t.Helper()
	fake := newEmulator()
	t.Cleanup(fake.Close)
	client, err := newClient(t.Context(), fake)
	require.NoError(t, err)
	t.Cleanup(func() { client.Close() })
	return fake, client.Bucket(fakegcs.Bucket)
}

const untagged = "v0.0.0-20240102030405-0123456789ab"

// newUpstream makes modules in a directory, and has the go command take them
// from there and from nowhere else.
func newUpstream(t *testing.T) (dir string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "upstream")
	addVersion(t, dir, "example.com/hello", "v1.0.0")
	addVersion(t, dir, "example.com/hello", "v1.1.0")
	addVersion(t, dir, "example.com/Upper", "v0.1.0")
	addVersion(t, dir, "example.com/untagged", untagged)
	addVersion(t, dir, "example.com/new", untagged)
	write(t, filepath.Join(dir, "example.com/new/@latest"), fmt.Sprintf(`{"Version": %q}`, untagged))
	write(t, filepath.Join(dir, "example.com/hello/@v/feature.info"), `{"Version": "v1.0.0"}`)
	write(t, filepath.Join(dir, "example.com/untagged/@v/main.info"), fmt.Sprintf(`{"Version": %q}`, untagged))
	path := filepath.ToSlash(dir)
	if !strings.HasPrefix(path, "/") {
		path = "/" + path // a drive letter
	}
	for name, value := range map[string]string{
		"GOENV": "off", "GOPROXY": "file://" + path, "GOSUMDB": "off", "GOWORK": "off",
		"GOPRIVATE": "", "GONOPROXY": "", "GONOSUMDB": "", "GOFLAGS": "-mod=mod",
		"STORAGE_EMULATOR_HOST": "",
	} {
		t.Setenv(name, value)
	}
	return dir
}

func addVersion(t *testing.T, upstream, path, version string) {
	t.Helper()
	gomod := "module " + path + "\n"
	var archive bytes.Buffer
	z := zip.NewWriter(&archive)
	for name, text := range map[string]string{
		"go.mod":         gomod,
		"greet/greet.go": "package greet\n\nconst Text = \"hello from " + version + "\"\n",
	} {
		w, err := z.Create(path + "@" + version + "/" + name)
		require.NoError(t, err)
		_, err = io.WriteString(w, text)
		require.NoError(t, err)
	}
	require.NoError(t, z.Close())

	escaped, err := module.EscapePath(path)
	require.NoError(t, err)
	dir := filepath.Join(upstream, filepath.FromSlash(escaped), "@v")
	write(t, filepath.Join(dir, version+".info"), fmt.Sprintf(`{"Version": %q, "Time": "2024-01-02T03:04:05Z"}`, version))
	write(t, filepath.Join(dir, version+".mod"), gomod)
	write(t, filepath.Join(dir, version+".zip"), archive.String())
	list, err := os.ReadFile(filepath.Join(dir, "list"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		require.NoError(t, err)
	}
	if !module.IsPseudoVersion(version) {
		list = append(list, version+"\n"...)
	}
	write(t, filepath.Join(dir, "list"), string(list))
}

func write(t *testing.T, name, text string) {
	t.Helper()
	require.NoError(t, os.MkdirAll(filepath.Dir(name), 0o777))
	require.NoError(t, os.WriteFile(name, []byte(text), 0o666))
}

// A proxy without git does not say that modules do not exist.
func TestBrokenProxy(t *testing.T) {
	assert.Equal(t, http.StatusInternalServerError, statusOf(upstreamError(`exec: "git": executable file not found in $PATH`)))
	assert.Equal(t, http.StatusNotFound, statusOf(upstreamError("unknown revision v1.0.0")))
}
