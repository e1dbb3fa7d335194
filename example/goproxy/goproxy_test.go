package main

import (
	"archive/zip"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"cloud.google.com/go/storage"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/mod/module"

	"github.com/athensgcs/gcs"
)

func TestDemo(t *testing.T) {
	newUpstream(t)
	var out bytes.Buffer
	err := run(t.Context(), []string{"example.com/hello@v1.0.0", "example.com/Upper@latest"}, &out)
	require.NoError(t, err, out.String())
	for _, name := range []string{
		"example.com/hello/@v/v1.0.0.info", "example.com/hello/@v/v1.0.0.mod", "example.com/hello/@v/v1.0.0.zip",
		"example.com/Upper/@v/v0.1.0.info", "example.com/Upper/@v/v0.1.0.mod", "example.com/Upper/@v/v0.1.0.zip",
	} {
		assert.Contains(t, out.String(), " "+name+"\n")
	}
	assert.NotContains(t, out.String(), "hello/@v/v1.1.0")
	assert.Contains(t, out.String(), "Both downloads have the same checksums.")

	err = run(t.Context(), []string{"example.com/hello@v1.9.0"}, io.Discard)
	assert.ErrorContains(t, err, "example.com/hello@v1.9.0")
	assert.ErrorContains(t, err, "404 Not Found")
}

// TestBucket has the bucket somewhere else, as -bucket does.
func TestBucket(t *testing.T) {
	newUpstream(t)
	e, err := newEmulator("elsewhere")
	require.NoError(t, err)
	server := httptest.NewServer(&httputil.ReverseProxy{
		Transport: e,
		Rewrite:   func(r *httputil.ProxyRequest) { r.Out.URL.Scheme = "http" },
	})
	defer server.Close()
	t.Setenv("STORAGE_EMULATOR_HOST", strings.TrimPrefix(server.URL, "http://"))
	args := []string{"-bucket", "elsewhere", "example.com/hello@v1.0.0"}
	for _, saves := range []bool{true, false} { // the second time it is there
		var out bytes.Buffer
		require.NoError(t, run(t.Context(), args, &out), out.String())
		assert.Equal(t, saves, strings.Contains(out.String(), " put "), out.String())
	}
}

func TestServe(t *testing.T) {
	upstream := newUpstream(t)
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	out, w := io.Pipe()
	done := make(chan error, 1)
	go func() { done <- run(ctx, []string{"-addr", "127.0.0.1:0"}, w) }()
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	go func() { _, _ = io.Copy(io.Discard, out) }() // the log
	_, rest, _ := strings.Cut(line, "GOPROXY=")
	proxy, _, _ := strings.Cut(rest, " ")

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
	_, err = goRun("get", "example.com/hello/greet@latest")
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

	resp, err := http.Get(proxy + "/example.com/hello/@v/list")
	require.NoError(t, err)
	defer resp.Body.Close()
	list, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	assert.Equal(t, "v1.0.0\nv1.1.0\n", string(list))

	interrupt()
	require.NoError(t, <-done)
	_, err = http.Get(proxy)
	assert.Error(t, err, "still listening")
}

func TestMissesShareOneDownload(t *testing.T) {
	newUpstream(t)
	client, err := newClient(t.Context(), "")
	require.NoError(t, err)
	defer client.Close()
	var mu sync.Mutex
	puts := 0
	server := httptest.NewServer(record(
		&proxy{store: gcs.NewStorage(client.Bucket(emulated)), ctx: t.Context()},
		func(e entry) {
			mu.Lock()
			defer mu.Unlock()
			puts += int(e.cost.requests[put].Load())
		}))
	var wg sync.WaitGroup
	for _, ext := range []string{"info", "mod", "zip", "info", "mod", "zip"} {
		wg.Go(func() {
			resp, err := http.Get(server.URL + "/example.com/!upper/@v/v0.1.0." + ext)
			if assert.NoError(t, err) {
				assert.Equal(t, http.StatusOK, resp.StatusCode)
				resp.Body.Close()
			}
		})
	}
	wg.Wait()
	server.Close()
	assert.Equal(t, 3, puts)
}

func TestOwnAddressAsUpstream(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	t.Setenv("GOPROXY", "http://localhost:"+port+",direct")
	assert.ErrorContains(t, checkUpstream(t.Context(), l), "this proxy itself")
	t.Setenv("GOPROXY", "http://localhost:1,direct")
	assert.NoError(t, checkUpstream(t.Context(), l))
}

// TestEmulator pins what the emulator adds to the fake behind it.
func TestEmulator(t *testing.T) {
	ctx := t.Context()
	client, err := newClient(ctx, "")
	require.NoError(t, err)
	defer client.Close()
	o := client.Bucket(emulated).Object("a/b@v1.0.0+x.mod")
	create := func(cond storage.Conditions, chunk int) (*storage.ObjectAttrs, error) {
		w := o.If(cond).NewWriter(ctx)
		w.ChunkSize = chunk
		w.Metadata = map[string]string{"k": "v", "l": "w"}
		_, _ = w.Write(make([]byte, 600<<10))
		err := w.Close()
		return w.Attrs(), err
	}
	for _, chunk := range []int{0, 256 << 10} { // in one request, and in several
		attrs, err := create(storage.Conditions{DoesNotExist: true}, chunk)
		require.NoError(t, err)
		assert.EqualValues(t, 1, attrs.Metageneration)
		_, err = create(storage.Conditions{DoesNotExist: true}, chunk)
		assert.ErrorContains(t, err, "412")

		seen := storage.Conditions{GenerationMatch: attrs.Generation, MetagenerationMatch: 1}
		updated, err := o.If(seen).Update(ctx, storage.ObjectAttrsToUpdate{Metadata: map[string]string{"k": "x"}})
		require.NoError(t, err)
		assert.Equal(t, attrs.Generation, updated.Generation)
		assert.EqualValues(t, 2, updated.Metageneration)
		assert.Equal(t, map[string]string{"k": "x", "l": "w"}, updated.Metadata)

		_, err = o.If(seen).Update(ctx, storage.ObjectAttrsToUpdate{Metadata: map[string]string{}})
		assert.ErrorContains(t, err, "412")
		assert.ErrorContains(t, o.If(seen).Delete(ctx), "412")
		_, err = create(seen, chunk)
		assert.ErrorContains(t, err, "412")

		seen.MetagenerationMatch = 2
		updated, err = o.If(seen).Update(ctx, storage.ObjectAttrsToUpdate{Metadata: map[string]string{}})
		require.NoError(t, err)
		assert.Empty(t, updated.Metadata)
		seen.MetagenerationMatch = 3
		anew, err := create(seen, chunk)
		require.NoError(t, err)
		assert.Greater(t, anew.Generation, attrs.Generation)
		listed, err := client.Bucket(emulated).Objects(ctx, nil).Next()
		require.NoError(t, err)
		assert.Equal(t, [2]int64{anew.Generation, 1}, [2]int64{listed.Generation, listed.Metageneration})

		require.NoError(t, o.If(storage.Conditions{GenerationMatch: anew.Generation}).Delete(ctx))
		err = o.If(storage.Conditions{GenerationMatch: anew.Generation}).Delete(ctx)
		assert.True(t, errors.Is(err, storage.ErrObjectNotExist), "%v", err)
	}
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
