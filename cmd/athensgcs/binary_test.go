package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"cloud.google.com/go/storage"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// TestMain is the program itself if a test says so.
func TestMain(m *testing.M) {
	if os.Getenv("ATHENSGCS_TEST_MAIN") != "" {
		main()
	}
	os.Exit(m.Run())
}

// process returns a command that runs the program.
func process(t *testing.T, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), "ATHENSGCS_TEST_MAIN=1")
	return cmd
}

// TestBinary runs the program as a process.
func TestBinary(t *testing.T) {
	clearGoEnv(t)
	t.Run("commands", testCommands)
	t.Run("signal", testSignal)
	t.Run("second interrupt", testSecondInterrupt)
}

// TestBesideProxy runs the program as a process, on the bucket of a proxy.
func TestBesideProxy(t *testing.T) {
	if testing.Short() {
		t.Skip("it builds the proxy, into which the race detector does not see")
	}
	clearGoEnv(t)
	proxy := filepath.Join(t.TempDir(), "goproxy.exe")
	commandOutput(t, "", "go", "build", "-ldflags=-s -w", "-o", proxy, "../../example/goproxy")
	t.Run("repair", func(t *testing.T) { testProxy(t, proxy) })
	t.Run("load", func(t *testing.T) { testLoad(t, proxy) })
}

// listen serves the bucket to programs that are started after this.
func (b *bucket) listen(t *testing.T) {
	server := httptest.NewServer(b.Handler())
	t.Cleanup(server.Close)
	t.Setenv("STORAGE_EMULATOR_HOST", server.Listener.Addr().String())
}

// output runs the program and returns its exit status and all its output.
func output(t *testing.T, args ...string) (int, string) {
	t.Helper()
	out, err := process(t, args...).CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode(), string(out)
	}
	require.NoError(t, err)
	return 0, string(out)
}

func testCommands(t *testing.T) {
	b := newBucket(t)
	b.listen(t)
	r := newRelease("example.com/hello", "v1.0.0")
	b.put(r, nil, "info", "mod")
	code, out := output(t, "check", "-bucket", fakegcs.Bucket)
	assert.Equal(t, statusFound, code, out)
	assert.Contains(t, out, "example.com/hello@v1.0.0: partial, no .zip, written now; ")
	code, out = output(t, "repair", "-bucket", fakegcs.Bucket)
	assert.Equal(t, statusOK, code, out)
	assert.Empty(t, b.Names())
	b.put(r, nil, "info", "mod", "zip")
	code, out = output(t, "verify", "-bucket", fakegcs.Bucket)
	assert.Equal(t, statusOK, code, out)
	assert.Equal(t, "1 version, 424 B: 0 wrong\n", out)
	code, out = output(t, "check", "-bucket", "nowhere")
	assert.Equal(t, statusFailed, code)
	assertLine(t, out, "there is no bucket nowhere")
}

// testSignal interrupts the program in the middle of a zip.
func testSignal(t *testing.T) {
	b := newBucket(t)
	b.listen(t)
	for _, version := range []string{"v1.0.0", "v1.1.0"} {
		b.put(newRelease("example.com/hello", version), nil, "info", "mod", "zip")
	}
	cmd := process(t, "verify", "-bucket", fakegcs.Bucket, "-j", "1")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	started := make(chan struct{})
	b.OnRequest(func(_ context.Context, r *fakegcs.Request) fakegcs.Fault {
		<-started
		if r.Op == "get" && r.Object == "example.com/hello/@v/v1.1.0.zip" {
			assert.NoError(t, cmd.Process.Signal(os.Interrupt))
			return fakegcs.Hung
		}
		return fakegcs.NoFault
	})
	require.NoError(t, cmd.Start())
	close(started)
	var exit *exec.ExitError
	require.ErrorAs(t, cmd.Wait(), &exit)
	assert.Equal(t, statusFailed, exit.ExitCode())
	assert.Equal(t, "until it stopped: 1 version, 424 B: 0 wrong\n", stdout.String())
	assertLine(t, stderr.String(), "athensgcs verify: interrupted; run it again to see the rest")
	assertNoFiles(t)
}

// testProxy has a proxy serve a module, spoils its bucket, and expects the proxy to
// serve it again after a repair.
func testProxy(t *testing.T, proxy string) {
	upstream := t.TempDir()
	for name, value := range map[string]string{
		"GOENV": "off", "GOPROXY": "file://" + filepath.ToSlash(upstream), "GOSUMDB": "off", "GOWORK": "off", "GOFLAGS": "-mod=mod",
	} {
		t.Setenv(name, value)
	}
	r := newRelease("example.com/hello", "v1.0.0")
	dir := filepath.Join(upstream, "example.com", "hello", "@v")
	require.NoError(t, os.MkdirAll(dir, 0o777))
	for name, data := range map[string]string{"list": "v1.0.0\n", "v1.0.0.info": r.info, "v1.0.0.mod": r.mod, "v1.0.0.zip": r.zip} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(data), 0o666))
	}
	get, emulator, _ := startProxy(t, proxy)
	t.Setenv("STORAGE_EMULATOR_HOST", emulator)
	client, err := storage.NewClient(t.Context())
	require.NoError(t, err)
	defer client.Close()

	assert.Equal(t, r.zip, get("/example.com/hello/@v/v1.0.0.zip"))
	code, out := output(t, "check", "-bucket", fakegcs.Bucket)
	assert.Equal(t, statusOK, code, out)

	require.NoError(t, client.Bucket(fakegcs.Bucket).Object(r.object("info")).Delete(t.Context()))
	code, out = output(t, "check", "-bucket", fakegcs.Bucket)
	assert.Equal(t, statusFound, code, out)
	assert.Contains(t, out, "example.com/hello@v1.0.0: partial, no .info")
	code, out = output(t, "repair", "-bucket", fakegcs.Bucket)
	assert.Equal(t, statusOK, code, out)
	assert.Contains(t, out, "removed")

	assert.Equal(t, r.zip, get("/example.com/hello/@v/v1.0.0.zip"))
	code, out = output(t, "verify", "-bucket", fakegcs.Bucket)
	assert.Equal(t, statusOK, code, out)
	assert.Regexp(t, `^1 version, \d+ B: 0 wrong\n$`, out)
}

// testLoad loads modules from the module cache of this very test, and expects a proxy
// without an upstream to serve them to the go command.
func testLoad(t *testing.T, proxy string) {
	cache := commandOutput(t, "", "go", "env", "GOMODCACHE")
	source, client := t.TempDir(), t.TempDir()
	gomod := "module example.com/client\n"
	for _, path := range []string{"github.com/dustin/go-humanize", "golang.org/x/sync"} {
		version := commandOutput(t, "", "go", "list", "-m", "-f", "{{.Version}}", path)
		gomod += "require " + path + " " + version + "\n"
		files := filepath.Join("cache", "download", filepath.FromSlash(path), "@v")
		require.NoError(t, os.CopyFS(filepath.Join(source, files), os.DirFS(filepath.Join(cache, files))))
	}
	write(t, gomod, client, "go.mod")
	write(t, `package main

import (
	"github.com/dustin/go-humanize"
	"golang.org/x/sync/errgroup"
)

func main() {
	var g errgroup.Group
	g.Go(func() error { print(humanize.Comma(1000)); return nil })
	g.Wait()
}
`, client, "main.go")
	for name, value := range map[string]string{
		"GOENV": "off", "GOPROXY": "off", "GONOSUMDB": "*", "GOWORK": "off", "GOFLAGS": "-mod=mod -modcacherw",
	} {
		t.Setenv(name, value)
	}
	_, emulator, url := startProxy(t, proxy)
	t.Setenv("STORAGE_EMULATOR_HOST", emulator)
	for _, want := range []string{" stored", " already there"} {
		code, out := output(t, "load", "-bucket", fakegcs.Bucket, source)
		assert.Equal(t, statusOK, code, out)
		assert.Contains(t, out, want)
	}
	t.Setenv("GOPROXY", url)
	t.Setenv("GOMODCACHE", t.TempDir())
	assert.Contains(t, commandOutput(t, client, "go", "run", "."), "1,000")
}

// commandOutput runs a program that does not fail in a folder, and returns its output.
func commandOutput(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
	return strings.TrimSpace(string(out))
}

// startProxy starts a proxy with an emulated bucket, and returns what reads a path from
// it, the STORAGE_EMULATOR_HOST of the bucket, and the GOPROXY.
func startProxy(t *testing.T, binary string) (get func(path string) string, emulator, url string) {
	t.Helper()
	out, stdout, err := os.Pipe()
	require.NoError(t, err)
	proxy := exec.Command(binary, "-emulator", "127.0.0.1:0", "-addr", "127.0.0.1:0")
	proxy.Stdout, proxy.Stderr = stdout, stdout
	require.NoError(t, proxy.Start())
	stdout.Close()
	t.Cleanup(func() {
		_ = proxy.Process.Signal(os.Interrupt)
		_ = proxy.Wait()
	})
	lines := bufio.NewReader(out)
	_, err = fmt.Fscanf(lines, "bucket modules is at STORAGE_EMULATOR_HOST=%s\nbucket modules; use it with GOPROXY=%s", &emulator, &url)
	require.NoError(t, err)
	go func() { _, _ = lines.WriteTo(io.Discard) }()
	get = func(path string) string {
		t.Helper()
		resp, err := http.Get(url + path)
		require.NoError(t, err)
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		require.Equal(t, http.StatusOK, resp.StatusCode, string(body))
		return string(body)
	}
	return get, emulator, url
}

// TestGRPC expects -grpc to talk gRPC; the tests of the library say that it works.
func TestGRPC(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	var mu sync.Mutex
	var methods []string
	server := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		method, _ := grpc.MethodFromServerStream(stream)
		mu.Lock()
		defer mu.Unlock()
		methods = append(methods, method)
		return status.Error(codes.PermissionDenied, "no")
	}))
	go func() { _ = server.Serve(l) }()
	defer server.Stop()
	t.Setenv("STORAGE_EMULATOR_HOST_GRPC", l.Addr().String())
	var stdout, stderr bytes.Buffer
	assert.Equal(t, statusFailed, run(t.Context(), []string{"verify", "-bucket", "b", "-grpc"}, &stdout, &stderr))
	assertLine(t, stderr.String(), "PermissionDenied")
	assert.Equal(t, []string{"/google.storage.v2.Storage/ListObjects"}, slices.Compact(methods))
}
