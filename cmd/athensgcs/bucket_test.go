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
	"testing"
	"time"

	"cloud.google.com/go/storage"
	"github.com/stretchr/testify/assert"
	"google.golang.org/api/option"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// A bucket is one in memory, which the program runs on.
type bucket struct {
	*fakegcs.Server
	t         testing.TB
	transport http.RoundTripper
	checksums http.RoundTripper // of a checksum database; may be nil
	terminal  bool
}

func newBucket(t testing.TB) *bucket {
	f := fakegcs.New()
	t.Cleanup(func() {
		_, bodies := f.InFlight()
		assert.Zero(t, bodies, "an answer was not closed")
		assert.Empty(t, f.Violations())
		f.Close()
	})
	return &bucket{Server: f, t: t, transport: f.Register("athensgcs")}
}

// run runs the program on the bucket.
func (b *bucket) run(args ...string) (status int, stdout, stderr string) {
	b.t.Helper()
	var out, errs bytes.Buffer
	status = b.start(b.t.Context(), &out, &errs, args...)
	return status, out.String(), errs.String()
}

func (b *bucket) start(ctx context.Context, stdout, stderr io.Writer, args ...string) (status int) {
	p := &program{stdout: stdout, stderr: stderr, connect: b.connect, terminal: b.terminal, transport: b.checksums}
	return p.run(ctx, slices.Concat(args[:1], []string{"-bucket", fakegcs.Bucket}, args[1:]))
}

func (b *bucket) connect(ctx context.Context, _ bool) (*storage.Client, error) {
	return storage.NewClient(ctx, option.WithHTTPClient(&http.Client{Transport: b.transport}), option.WithoutAuthentication())
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

// newZip returns a module zip.
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

// put stores these objects of the release, with that metadata.
func (b *bucket) put(r release, metadata map[string]string, exts ...string) {
	for _, ext := range exts {
		data := map[string]string{"info": r.info, "mod": r.mod, "zip": r.zip}[ext]
		b.Put(r.object(ext), []byte(data), metadata)
	}
}

// marked is the metadata of the save of that id that was alive so long ago.
func marked(id string, ago time.Duration) map[string]string {
	return map[string]string{"in-progress": time.Now().Add(-ago).UTC().Format(time.RFC3339Nano), "save-id": id}
}

// oddObjects are below /@v/, and not of versions that a server saves.
var oddObjects = []string{
	"example.com/odd/@v/latest.info", "example.com/odd/@v/list.lock", "example.com/odd/@v/notes.zip", "example.com/odd/@v/v1.mod",
	"github.com/!burnt!sushi/toml/@v/v1.0.0.info", "github.com/!burnt!sushi/toml/@v/v1.0.0.mod", "github.com/!burnt!sushi/toml/@v/v1.0.0.zip",
}

// fillStates stores a version in every state.
func (b *bucket) fillStates() {
	r := func(name string) release { return newRelease("example.com/"+name, "v1.0.0") }
	b.put(r("complete"), nil, "info", "mod", "zip")
	b.put(newRelease("example.com/complete", "v1.1.0"), nil, "info", "mod", "zip")
	b.put(r("partial"), nil, "info", "mod")
	b.put(r("abandoned"), marked("A", 0), "mod")
	b.put(r("failed"), map[string]string{"in-progress": "1970-01-01T00:00:00Z", "save-id": "F"}, "mod")
	b.put(r("mixed"), marked("M", 0), "info", "mod")
	b.put(r("mixed"), map[string]string{"save-id": "other"}, "zip")
	b.put(r("unfinished"), marked("U", 0), "info", "mod", "zip")
	b.put(r("staleclaim"), marked("S", 0), "lock")
	b.put(r("futureclaim"), marked("S", -24*time.Hour), "lock")
	b.put(r("leftclaim"), nil, "info", "mod", "zip")
	b.put(r("leftclaim"), marked("L", 0), "lock")
	b.Put("example.com/unrelated.txt", []byte("no module"), nil)
	for _, odd := range oddObjects {
		b.Put(odd, []byte("odd"), nil)
	}
	time.Sleep(3 * time.Hour)
	b.put(r("inprogress"), marked("I", 10*time.Second), "mod")
	b.put(r("claimed"), marked("C", 10*time.Second), "lock")
}
