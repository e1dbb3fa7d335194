package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/mod/module"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// write writes a file of a source.
func write(t testing.TB, data string, name ...string) {
	t.Helper()
	file := filepath.Join(name...)
	require.NoError(t, os.MkdirAll(filepath.Dir(file), 0o777))
	require.NoError(t, os.WriteFile(file, []byte(data), 0o666))
}

// write writes these files of the release as a module cache has them.
func (r release) write(t testing.TB, root string, exts ...string) {
	t.Helper()
	path, err := module.EscapePath(r.module)
	require.NoError(t, err)
	for _, ext := range exts {
		data := map[string]string{"info": r.info, "mod": r.mod, "zip": r.zip}[ext]
		if ext == "ziphash" {
			data = strings.Fields(r.sums(t))[2] // after module and version
		}
		write(t, data, root, path, "@v", r.version+"."+ext)
	}
}

// fillCache writes a module cache with versions that are right, and wrong in each way.
func fillCache(t testing.TB, root string) {
	t.Helper()
	add := func(name string, exts string, change func(*release)) {
		t.Helper()
		r := newRelease("example.com/"+name, "v1.0.0")
		if change != nil {
			change(&r)
		}
		r.write(t, root, strings.Fields(exts)...)
	}
	add("Fine", "info mod zip ziphash", nil)
	add("there", "info mod zip", nil)
	add("bare", "zip", func(r *release) { *r = newRelease(r.module, "v0.0.0-20260102030405-0123456789ab") })
	add("nogomod", "zip", func(r *release) {
		r.zip = newZip(r.module, r.version, map[string]string{"doc.go": "package doc\n"})
	})
	add("modonly", "info mod", nil)
	add("othermod", "mod zip", func(r *release) { r.mod += "\ngo 1.26\n" })
	add("otherinfo", "info zip", func(r *release) { r.info = `{"Version":"v1.0.1"}` })
	add("hugeinfo", "info zip", func(r *release) { r.info = strings.Repeat(" ", 17<<20) })
	add("badzip", "zip", func(r *release) { r.zip = "<html>" })
	add("badcontent", "zip", func(r *release) {
		name, rest, _ := strings.Cut(r.zip, "doc.go")
		r.zip = name + "doc.go\xff" + rest[1:]
	})
	add("otherzip", "mod zip", func(r *release) { r.zip = newRelease("example.com/other", "v1.0.0").zip })
	add("short", "zip", func(r *release) { r.version = "v1" })
	add(strings.Repeat("long/", 203)+"x", "zip", nil)
	add("poisoned", "zip ziphash", nil)
	poisoned := filepath.Join(root, "example.com", "poisoned", "@v", "v1.0.0.zip")
	require.NoError(t, os.WriteFile(poisoned, []byte(newZip("example.com/poisoned", "v1.0.0", map[string]string{"evil.go": "package evil\n"})), 0o666))
	write(t, "not h1", root, "example.com", "bare", "@v", "v0.0.0-20260102030405-0123456789ab.ziphash")
	write(t, "", root, "example.com", "!fine", "@v", "list")
	write(t, "", root, "example.com", "!fine", "@v", "v1.0.0.lock")
	write(t, "", root, "example.com", "!fine", "@v", "master.info")
	write(t, "", root, "example.com", "!fine", "@v", "\x1b[2K.zip")
	write(t, "", root, "example.com", "Fine", "@v", "v1.0.0.zip")
	write(t, "", root, "sumdb", "sum.golang.org", "lookup", "example.com", "!fine@v1.0.0")
	for link, to := range map[string]string{"device.zip": os.DevNull, "gone.zip": "nowhere", "folder": "."} {
		link = strings.Replace(filepath.Join(root, "example.com", link), ".zip", "/@v/v1.0.0.zip", 1)
		require.NoError(t, os.MkdirAll(filepath.Dir(link), 0o777))
		require.NoError(t, os.Symlink(to, link))
	}
}

// load runs load, and returns its output with SOURCE in place of root.
func (b *bucket) load(root string, args ...string) (status int, output string) {
	status, stdout, stderr := b.run(append(append([]string{"load"}, args...), root)...)
	return status, strings.ReplaceAll(stdout+stderr, root, "SOURCE")
}

// TestLoad loads a module cache with all kinds of versions.
func TestLoad(t *testing.T) {
	root := t.TempDir()
	fillCache(t, filepath.Join(root, "cache", "download"))
	for _, name := range []string{"load.txt", "load.json", "load-dry-run.txt"} {
		b := newBucket(t)
		there := newRelease("example.com/there", "v1.0.0")
		there.mod += "\n" // what is there stays
		b.put(there, nil, "info", "mod", "zip")
		if name == "load-dry-run.txt" {
			b.Deny("storage.objects.create")
		}
		status, output := b.load(root, fmt.Sprintf("-json=%t", name == "load.json"), fmt.Sprintf("-dry-run=%t", name == "load-dry-run.txt"))
		golden(t, name, output)
		assert.Equal(t, statusFailed, status)
		assertNoFiles(t)
		if name == "load-dry-run.txt" {
			assert.Len(t, b.Names(), 3)
			continue
		}
		assert.Len(t, b.Names(), 12)
		for object, want := range map[string]string{
			"Fine/@v/v1.0.0.info":                             `{"Version":"v1.0.0"}`,
			"bare/@v/v0.0.0-20260102030405-0123456789ab.info": `{"Version":"v0.0.0-20260102030405-0123456789ab","Time":"2026-01-02T03:04:05Z"}`,
			"bare/@v/v0.0.0-20260102030405-0123456789ab.mod":  "module example.com/bare\n",
			"nogomod/@v/v1.0.0.info":                          `{"Version":"v1.0.0"}`,
			"nogomod/@v/v1.0.0.mod":                           "module example.com/nogomod\n",
			"there/@v/v1.0.0.mod":                             there.mod,
		} {
			assert.Equal(t, want, string(b.Get("example.com/"+object).Data), object)
		}
		status, output = b.load(root)
		assert.Equal(t, statusFailed, status)
		assert.Contains(t, output, "; 4 already there; ")
	}
}

// TestLoadAthens loads the root of Athens' disk storage.
func TestLoadAthens(t *testing.T) {
	root, b := t.TempDir(), newBucket(t)
	for _, r := range []release{
		newRelease("example.com/Upper", "v1.0.0"), newRelease("example.com/Upper", "v2.0.0+incompatible"),
		newRelease("example.com/Upper/v2", "v2.0.0"), newRelease("example.com/Upper/v2", "v2"),
	} {
		write(t, r.zip, root, r.module, r.version, "source.zip")
		write(t, r.mod, root, r.module, r.version, "go.mod")
		write(t, r.info, root, r.module, r.version, r.version+".info")
	}
	write(t, "", root, "example.com", "modonly", "v1.0.0", "go.mod")
	write(t, "", root, "example.com", "other", "go.mod")
	status, output := b.load(root)
	assert.Equal(t, statusFound, status)
	assert.Equal(t, "SOURCE/example.com/Upper/v2/v2/source.zip: refused: no version of a module: the version is not canonical, which is v2.0.0\n"+
		"4 versions, 1.2 kB: 3 stored; 1 refused; 1 without a zip\n", output)
	assert.Len(t, b.Names(), 9)
}

// TestLoadBucket loads versions in every state below one prefix below another.
func TestLoadBucket(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBucket(t)
		b.fillStates()
		b.put(newRelease("nodots", "v1.0.0"), nil, "info", "mod", "zip")
		for _, name := range b.Names() {
			b.Put("old/"+name, b.Get(name).Data, b.Get(name).Metadata)
		}
		before := len(b.Names())
		status, output := b.load("gs://"+fakegcs.Bucket+"/old", "-prefix", "new", "-dry-run")
		assert.Len(t, b.Names(), before)
		golden(t, "load-bucket.txt", output)
		assert.Equal(t, statusFound, status)
		status, output = b.load("gs://"+fakegcs.Bucket+"/old", "-prefix", "new")
		assert.Equal(t, statusFound, status)
		assert.Contains(t, output, ": 4 stored; ")
		assert.Len(t, b.Names(), before+12)
		assert.Equal(t, b.Get("old/example.com/unfinished/@v/v1.0.0.zip").Data, b.Get("new/example.com/unfinished/@v/v1.0.0.zip").Data)
		assertNoFiles(t)

		// In a dry run too, a version of which only the last step is missing is there.
		status, output = b.load("gs://"+fakegcs.Bucket+"/new", "-dry-run")
		assert.Equal(t, statusOK, status)
		assert.Equal(t, "4 versions, 1.8 kB: 0 would be stored; 4 already there\n", output)
		mod := "example.com/unfinished/@v/v1.0.0.mod"
		assert.NotEmpty(t, b.Get(mod).Metadata)
		_, again := b.load("gs://" + fakegcs.Bucket + "/new")
		assert.Equal(t, "4 versions, 1.8 kB: 0 stored; 4 already there\n", again)
		assert.Empty(t, b.Get(mod).Metadata, "the version was not finished")
	})
}

func TestLoadFails(t *testing.T) {
	full, empty := t.TempDir(), t.TempDir()
	write(t, "", empty, "go.mod")
	r, other := newRelease("example.com/a", "v1.0.0"), newRelease("example.com/b", "v1.0.0")
	r.write(t, full, "zip")
	other.write(t, full, "zip")
	for _, tt := range []struct {
		source, args, want string
		prepare            func(*bucket)
	}{
		{empty, "", "athensgcs load: SOURCE has no modules", nil},
		{filepath.Join(empty, "nowhere"), "", "athensgcs load: open SOURCE: no such file", nil},
		{"gs://" + fakegcs.Bucket, "", "athensgcs load: SOURCE has no modules", nil},
		{"gs://nowhere", "", "athensgcs load: there is no bucket nowhere\n", nil},
		{full, "", "storage.objects.update", func(b *bucket) { b.Deny("storage.objects.update") }},
		{full, "-dry-run", "storage.objects.list", func(b *bucket) { b.Deny("storage.objects.list") }},
		{full, "", "retention", func(b *bucket) { // of one version; the other is stored
			b.put(r, nil, "mod")
			b.Retain(true)
		}},
	} {
		b := newBucket(t)
		if tt.prepare != nil {
			tt.prepare(b)
		}
		status, output := b.load(tt.source, strings.Fields(tt.args)...)
		assert.Equal(t, statusFailed, status)
		assert.Contains(t, output, tt.want)
		if tt.want == "retention" {
			assert.Contains(t, output, "athensgcs load: 1 version could not be loaded; see above")
			assert.NotNil(t, b.Get(other.object("zip")))
		}
	}
}

// TestLoadInterrupt interrupts a load at each of its requests, and expects it to go on
// when it is started again, without a request for what is there but a list of a module.
func TestLoadInterrupt(t *testing.T) {
	root := t.TempDir()
	for i := range 10 {
		newRelease("example.com/a", fmt.Sprintf("v1.%d.0", i)).write(t, root, "zip")
	}
	newRelease("example.com/b", "v1.0.0").write(t, root, "zip")
	newRelease("example.com/c", "v1.0.0").write(t, root, "mod")
	synctest.Test(t, func(t *testing.T) {
		for n := 0; ; n += 3 {
			b := newBucket(t)
			ctx, interrupt := context.WithCancel(t.Context())
			b.OnRequest(func(_ context.Context, r *fakegcs.Request) fakegcs.Fault {
				if r.N == n {
					interrupt()
					return fakegcs.Hung
				}
				return fakegcs.NoFault
			})
			var stdout, stderr bytes.Buffer
			status := b.start(ctx, &stdout, &stderr, "load", root)
			if ctx.Err() == nil {
				assert.Equal(t, "11 versions, 3.9 kB: 11 stored; 1 without a zip\n", stdout.String())
				assert.Greater(t, n, 11*4)
				interrupt()
				b.OnRequest(nil)
				before := len(b.Log())
				status, output := b.load(root)
				assert.Equal(t, statusOK, status)
				assert.Equal(t, "11 versions, 3.9 kB: 0 stored; 11 already there; 1 without a zip\n", output)
				assert.Len(t, b.Log(), before+3, "permissions, and a list for each module")
				return
			}
			assert.Equal(t, statusFailed, status)
			assertLine(t, stderr.String(), "load: interrupted")
			assert.NotContains(t, stdout.String(), "failed")
			status, output := b.load(root)
			assert.Equal(t, statusOK, status, output)
			assert.Len(t, b.Names(), 33)
		}
	})
}

// TestLoadChanged changes a zip while it is sent.
func TestLoadChanged(t *testing.T) {
	root := t.TempDir()
	r := large("example.com/large", "v1.0.0", 3<<20)
	r.write(t, root, "zip")
	b := newBucket(t)
	b.OnRequest(func(_ context.Context, req *fakegcs.Request) fakegcs.Fault {
		if req.Object == r.object("mod") {
			write(t, strings.Replace(r.zip, r.zip[2<<20:3<<20], strings.Repeat("evil", 1<<18), 1), root, r.module, "@v", r.version+".zip")
		}
		return fakegcs.NoFault
	})
	status, output := b.load(root)
	assert.Equal(t, statusFound, status)
	assert.Contains(t, output, "refused: ")
	assert.Nil(t, b.Get(r.object("zip")))
}

// TestLoadProgress expects the bytes and the time left on a terminal.
func TestLoadProgress(t *testing.T) {
	root := t.TempDir()
	for i := range 20 {
		newRelease("example.com/a", fmt.Sprintf("v1.%d.0", i)).write(t, root, "zip")
	}
	synctest.Test(t, func(t *testing.T) {
		b := newBucket(t)
		b.SetLatency(300 * time.Millisecond)
		b.terminal = true
		status, output := b.load(root, "-j", "4")
		assert.Equal(t, statusOK, status)
		assert.Regexp(t, `\r\d+ versions  60% \|█{12} {8}\| \([\d.]+/[\d.]+ kB, [\d.]+ k?B/s\) \[\ds:\ds\]`, output)
	})
}
