package gcs

import (
	"context"
	"crypto/rand"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"cloud.google.com/go/storage"
	"github.com/fsouza/fake-gcs-server/fakestorage"
	"github.com/stretchr/testify/require"
	"google.golang.org/api/option"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// A column is a server of the table.
type column struct {
	name string
	// start starts the server, or skips the test and says why.
	start func(t *testing.T) server
	// virtual gives each row a server of its own, in virtual time.
	virtual bool
	// threshold is a stale threshold that a row can wait for.
	threshold time.Duration
	// lacks holds what the server does not do, and why. If it is nil, the suite
	// finds out.
	lacks map[ability]string
}

// A server is one that was started.
type server struct {
	client *storage.Client
	bucket string // "" gives each row one, since a list may cost as much as the bucket holds
	// count counts the requests so far. It is nil where nobody counts them.
	count func() int
}

// An ability is something that GCS does and an emulator may not.
type ability string

const (
	refusesWrites    ability = "refuses a write over an object whose metadata has changed"
	refusesUpdates   ability = "refuses an update of an object that has changed"
	refusesDeletes   ability = "refuses a delete of an object that has changed"
	countsUpdates    ability = "changes the metageneration with an update"
	keepsGenerations ability = "leaves the generation with an update"
	clearsMetadata   ability = "removes metadata"
	testsPermissions ability = "tells the caller's permissions"
)

var stockLacks = map[ability]string{
	refusesWrites:    "fake-gcs-server ignores ifMetagenerationMatch",
	refusesUpdates:   "fake-gcs-server ignores all conditions of an update",
	refusesDeletes:   "fake-gcs-server ignores all conditions of a delete",
	countsUpdates:    "fake-gcs-server lists and reads every metageneration as 1, and answers an update without one",
	clearsMetadata:   `fake-gcs-server takes "metadata": null for "leave it"`,
	testsPermissions: "fake-gcs-server does not know testIamPermissions",
}

var programLacks = with(stockLacks, keepsGenerations, "fake-gcs-server gives an object in a file a new generation with each update")

// with returns a map with one entry more.
func with[M ~map[K]V, K comparable, V any](m M, key K, value V) M {
	m = maps.Clone(m)
	m[key] = value
	return m
}

const short = 400 * time.Millisecond

var columns = []column{
	{"fakegcs", inMemory(func(m *fakegcs.Machine) { m.Connect(m) }), true, short, map[ability]string{}},
	{"fakegcs over gRPC", inMemory(func(m *fakegcs.Machine) { m.ConnectGRPC() }), true, short, map[ability]string{}},
	{"fakegcs, listening", listening, false, short, map[ability]string{}},
	{"fake-gcs-server", stockInProcess, false, short, stockLacks},
	{"fake-gcs-server, listening", stockListening, false, short, stockLacks},
	{"fake-gcs-server, program", stockProgram, false, short, programLacks},
	{"named", named, false, 4 * time.Second, nil},
	{"named, over gRPC", namedGRPC, false, 4 * time.Second, nil},
}

// inMemory is the emulator of this repository, in process.
func inMemory(connect func(m *fakegcs.Machine)) func(t *testing.T) server {
	return func(t *testing.T) server {
		f := fakegcs.New()
		t.Cleanup(f.Close)
		m := f.Register("m")
		connect(m)
		return server{m.Client, fakegcs.Bucket, func() int { return len(f.Log()) }}
	}
}

func listening(t *testing.T) server {
	f := newFakeGCS(t)
	f.tolerate() // the suite makes unconditional requests of its own
	m := f.over(t, f.listen(t), "m", new(http.Transport))
	return server{m.Client, fakegcs.Bucket, func() int { return len(f.Log()) }}
}

// connect returns a server behind a transport, and counts its requests.
func connect(t *testing.T, next http.RoundTripper, opts ...option.ClientOption) server {
	t.Helper()
	var n atomic.Int64
	counting := wire{next, func(*http.Request) (*http.Response, error) { n.Add(1); return nil, nil }}
	client, err := storage.NewClient(context.Background(), append(opts,
		option.WithHTTPClient(&http.Client{Transport: counting}), option.WithoutAuthentication())...)
	require.NoError(t, err)
	t.Cleanup(func() { client.Close() })
	return server{client, "", func() int { return int(n.Load()) }}
}

func startStock(t *testing.T, opts fakestorage.Options) *fakestorage.Server {
	t.Helper()
	if testing.Short() {
		t.Skip("fake-gcs-server updates metadata while it answers with it, which fails with -race")
	}
	s, err := fakestorage.NewServerWithOptions(opts)
	require.NoError(t, err)
	t.Cleanup(s.Stop)
	return s
}

func stockInProcess(t *testing.T) server {
	s := startStock(t, fakestorage.Options{NoListener: true})
	return connect(t, s.HTTPClient().Transport, option.WithEndpoint("https://storage.googleapis.com/storage/v1/"))
}

// stockListening reads through the JSON API. For the XML API the server must know
// its own address, which it does not choose before it listens.
func stockListening(t *testing.T) server {
	s := startStock(t, fakestorage.Options{Scheme: "http"})
	wire := new(http.Transport)
	t.Cleanup(wire.CloseIdleConnections)
	return connect(t, wire, option.WithEndpoint(s.URL()+"/storage/v1/"), storage.WithJSONReads())
}

// stockProgram stores objects in files, as it does unless it is told otherwise.
func stockProgram(t *testing.T) server {
	if testing.Short() {
		t.Skip("a race detector sees nothing of another process")
	}
	program := filepath.Join(t.TempDir(), "fake-gcs-server")
	if out, err := exec.Command("go", "build", "-ldflags=-s -w", "-o", program, "github.com/fsouza/fake-gcs-server").CombinedOutput(); err != nil {
		t.Skipf("fake-gcs-server cannot be built here: %v: %s", err, out)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	host, port, err := net.SplitHostPort(listener.Addr().String())
	require.NoError(t, err)
	require.NoError(t, listener.Close())

	root, err := os.MkdirTemp("/dev/shm", "") // in memory: the program waits for a disk with each object
	if err != nil {
		root = t.TempDir()
	}
	var log syncedLog
	cmd := exec.Command(program, "-filesystem-root", root,
		"-scheme", "http", "-host", host, "-port", port, "-public-host", host+":"+port)
	cmd.Stdout, cmd.Stderr = &log, &log
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		os.RemoveAll(root)
		if t.Failed() {
			t.Log(log.String())
		}
	})
	wire := new(http.Transport)
	t.Cleanup(wire.CloseIdleConnections)
	s := connect(t, wire, option.WithEndpoint("http://"+host+":"+port+"/storage/v1/"))
	require.Eventually(t, func() bool {
		conn, err := net.Dial("tcp", host+":"+port)
		return err == nil && conn.Close() == nil
	}, 30*time.Second, 10*time.Millisecond, "the program does not listen: %s", &log)
	return s
}

// named is the server that the environment names: an emulator, or Cloud Storage.
func named(t *testing.T) server {
	if os.Getenv("GCS_TEST_BUCKET") == "" && os.Getenv("STORAGE_EMULATOR_HOST") == "" {
		t.Skip("neither GCS_TEST_BUCKET nor STORAGE_EMULATOR_HOST is set")
	}
	client, err := storage.NewClient(context.Background())
	require.NoError(t, err)
	return inNamedBucket(t, client)
}

func namedGRPC(t *testing.T) server {
	emulated := os.Getenv("STORAGE_EMULATOR_HOST") != ""
	if os.Getenv("STORAGE_EMULATOR_HOST_GRPC") == "" && (emulated || os.Getenv("GCS_TEST_BUCKET") == "") {
		t.Skip("neither GCS_TEST_BUCKET nor STORAGE_EMULATOR_HOST_GRPC is set")
	}
	client, err := storage.NewGRPCClient(context.Background(), storage.WithDisabledClientMetrics())
	require.NoError(t, err)
	return inNamedBucket(t, client)
}

// inNamedBucket is a server's bucket of that name, or one of the suite's.
func inNamedBucket(t *testing.T, client *storage.Client) server {
	t.Cleanup(func() { client.Close() })
	name := os.Getenv("GCS_TEST_BUCKET")
	if name == "" {
		name = makeBucket(t, client)
		t.Cleanup(func() { client.Bucket(name).Delete(context.Background()) })
	}
	return server{client, name, nil}
}

func makeBucket(t *testing.T, client *storage.Client) string {
	t.Helper()
	name := "gcs-test-" + strings.ToLower(rand.Text())
	require.NoError(t, client.Bucket(name).Create(t.Context(), "project", nil))
	return name
}
