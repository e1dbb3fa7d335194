package main

import (
	"archive/zip"
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"cloud.google.com/go/storage"
	"github.com/fsouza/fake-gcs-server/fakestorage"
	"github.com/stretchr/testify/require"
	"google.golang.org/api/option"

	"github.com/athensgcs/gcs"
)

// A bucket is one of the emulator, in process.
type bucket struct {
	t      *testing.T
	next   http.RoundTripper
	client *storage.Client
	*storage.BucketHandle

	checksums http.RoundTripper // of the database; may be nil

	mu       sync.Mutex
	requests []string            // method and path
	hook     func(*http.Request) // called before each
}

func newBucket(t *testing.T) *bucket {
	server, err := fakestorage.NewServerWithOptions(fakestorage.Options{NoListener: true})
	require.NoError(t, err)
	server.CreateBucketWithOpts(fakestorage.CreateBucketOpts{Name: "modules"})
	b := &bucket{t: t, next: server.HTTPClient().Transport}
	b.client, err = b.connect(t.Context(), false)
	require.NoError(t, err)
	t.Cleanup(func() { b.client.Close() })
	b.BucketHandle = b.client.Bucket("modules")
	return b
}

func (b *bucket) connect(ctx context.Context, _ bool) (*storage.Client, error) {
	return storage.NewClient(ctx, option.WithHTTPClient(&http.Client{Transport: b}), option.WithoutAuthentication())
}

func (b *bucket) RoundTrip(req *http.Request) (*http.Response, error) {
	b.mu.Lock()
	b.requests = append(b.requests, req.Method+" "+req.URL.Path)
	hook := b.hook
	b.mu.Unlock()
	if hook != nil {
		hook(req)
	}
	return b.next.RoundTrip(req)
}

// run runs the program on the bucket.
func (b *bucket) run(args ...string) (status int, stdout, stderr string) {
	b.t.Helper()
	var out, errs bytes.Buffer
	p := &program{stdout: &out, stderr: &errs, connect: b.connect, transport: b.checksums}
	status = p.run(b.t.Context(), slices.Concat(args[:1], []string{"-bucket", "modules"}, args[1:]))
	return status, out.String(), errs.String()
}

func (b *bucket) put(name, data string, metadata map[string]string) {
	b.t.Helper()
	w := b.Object(name).NewWriter(b.t.Context())
	w.ChunkSize, w.Metadata = 0, metadata
	_, err := io.WriteString(w, data)
	require.NoError(b.t, err)
	require.NoError(b.t, w.Close())
}

// marker is the metadata of a save that was alive so long ago.
func marker(ago time.Duration, id string) map[string]string {
	return map[string]string{"in-progress": time.Now().Add(-ago).UTC().Format(time.RFC3339Nano), "save-id": id}
}

// A release is a version of a module as a proxy serves it.
type release struct{ module, version, info, mod, zip string }

func newRelease(module, version string) release {
	mod := "module " + module + "\n"
	return release{module, version, fmt.Sprintf(`{"Version":%q}`, version), mod, newZip(module, version, map[string]string{
		"go.mod": mod,
		"doc.go": "package doc\n",
	})}
}

func newZip(module, version string, files map[string]string) string {
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		w, _ := z.Create(module + "@" + version + "/" + name)
		_, _ = io.WriteString(w, files[name])
	}
	z.Close()
	return b.String()
}

func (r release) object(ext string) string { return r.module + "/@v/" + r.version + "." + ext }

// save stores the release as a server does.
func (b *bucket) save(r release) {
	b.t.Helper()
	err := gcs.NewStorage(b.BucketHandle).Save(b.t.Context(), r.module, r.version, []byte(r.mod), strings.NewReader(r.zip), nil, []byte(r.info))
	require.NoError(b.t, err)
}

// putAll stores the objects of the release without a save, the .mod with that
// metadata.
func (b *bucket) putAll(r release, metadata map[string]string) {
	b.t.Helper()
	var id map[string]string
	if metadata != nil {
		id = map[string]string{"save-id": metadata["save-id"]}
	}
	b.put(r.object("info"), r.info, id)
	b.put(r.object("mod"), r.mod, metadata)
	b.put(r.object("zip"), r.zip, id)
}

// names returns the names of the objects.
func (b *bucket) names() []string {
	b.t.Helper()
	var names []string
	for it := b.Objects(b.t.Context(), nil); ; {
		attrs, err := it.Next()
		if err != nil {
			return names
		}
		names = append(names, attrs.Name)
	}
}

// fillStates stores a version in every state.
func (b *bucket) fillStates() {
	b.t.Helper()
	r := func(name string) release { return newRelease("example.com/"+name, "v1.0.0") }
	b.putAll(r("complete"), nil)
	b.putAll(newRelease("example.com/complete", "v1.1.0"), nil)
	b.put(r("partial").object("info"), r("partial").info, nil)
	b.put(r("partial").object("mod"), r("partial").mod, nil)
	b.put(r("abandoned").object("mod"), r("abandoned").mod, marker(0, "A"))
	b.put(r("failed").object("mod"), r("failed").mod, map[string]string{"in-progress": "1970-01-01T00:00:00Z", "save-id": "F"})
	b.putAll(r("mixed"), marker(0, "M"))
	b.put(r("mixed").object("zip"), r("mixed").zip, map[string]string{"save-id": "other"})
	b.putAll(r("unfinished"), marker(0, "U"))
	b.put(r("staleclaim").object("lock"), "", marker(0, "S"))
	b.put("example.com/unrelated.txt", "no module", nil)
	time.Sleep(3 * time.Hour)
	b.put(r("inprogress").object("mod"), r("inprogress").mod, marker(10*time.Second, "I"))
	b.put(r("claimed").object("lock"), "", marker(10*time.Second, "C"))
}
