package main

import (
	"archive/zip"
	"bytes"
	"compress/flate"
	"context"
	"fmt"
	"hash/crc32"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// bomb returns a module zip of so many files that are 64 MB of zeros each. It is as
// small as one of them, compressed, times their number.
func bomb(module, version string, files int) string {
	zeros := make([]byte, 64<<20)
	var packed, b bytes.Buffer
	w, _ := flate.NewWriter(&packed, flate.BestSpeed)
	_, _ = w.Write(zeros)
	w.Close()
	z := zip.NewWriter(&b)
	for i := range files {
		f, _ := z.CreateRaw(&zip.FileHeader{
			Name: fmt.Sprintf("%s@%s/%d.go", module, version, i), Method: zip.Deflate, CRC32: crc32.ChecksumIEEE(zeros),
			CompressedSize64: uint64(packed.Len()), UncompressedSize64: uint64(len(zeros)),
		})
		_, _ = f.Write(packed.Bytes())
	}
	z.Close()
	return b.String()
}

// TestBomb interrupts verify while it hashes a zip that the go command takes, and
// expects one that it refuses not to be hashed.
func TestBomb(t *testing.T) {
	clearGoEnv(t)
	b := newBucket(t)
	r := newRelease("example.com/bomb", "v1.0.0")
	r.zip = bomb(r.module, r.version, 128) // 8 GB
	b.put(r, nil, "info", "mod", "zip")
	start := time.Now()
	status, stdout, _ := b.run("verify")
	assert.Equal(t, statusFound, status)
	assert.Contains(t, stdout, ".zip is not the module's: total uncompressed size of module contents too large")
	assert.Less(t, time.Since(start), 2*time.Second)

	r.zip = bomb(r.module, r.version, 7) // 448 MB
	b.put(r, nil, "zip")
	ctx, interrupt := context.WithCancel(t.Context())
	var interrupted time.Time
	time.AfterFunc(200*time.Millisecond, func() { interrupted = time.Now(); interrupt() })
	var stderr bytes.Buffer
	assert.Equal(t, statusFailed, b.start(ctx, io.Discard, &stderr, "verify"))
	assert.Less(t, time.Since(interrupted), time.Second)
	stacks := make([]byte, 1<<20)
	assert.NotContains(t, string(stacks[:runtime.Stack(stacks, true)]), "checkZipFile", "it hashes still")
	assertLine(t, stderr.String(), "interrupted")
	assertNoFiles(t)
}

// testSecondInterrupt interrupts the program twice while it hashes a zip.
func testSecondInterrupt(t *testing.T) {
	b := newBucket(t)
	b.listen(t)
	r := newRelease("example.com/bomb", "v1.0.0")
	r.zip = bomb(r.module, r.version, 7)
	b.put(r, nil, "info", "mod", "zip")
	cmd := process(t, "verify", "-bucket", fakegcs.Bucket)
	require.NoError(t, cmd.Start())
	require.Eventually(t, func() bool {
		files, _ := filepath.Glob(filepath.Join(os.TempDir(), "athensgcs-*", "*.zip"))
		return len(files) == 1
	}, 20*time.Second, time.Millisecond)
	for range 2 {
		assert.NoError(t, cmd.Process.Signal(os.Interrupt))
	}
	assert.Error(t, cmd.Wait())
	assert.Equal(t, statusFailed, cmd.ProcessState.ExitCode())
	assertNoFiles(t)
}

// TestTempDirRemoved expects no file to be made after a second interrupt.
func TestTempDirRemoved(t *testing.T) {
	clearGoEnv(t)
	var d tempDir
	f, err := d.create("*.zip")
	require.NoError(t, err)
	defer f.Close()
	d.remove()
	_, err = d.create("*.zip")
	assert.Error(t, err)
	assertNoFiles(t)
}

// TestTerminal has names and answers that would change what a terminal shows.
func TestTerminal(t *testing.T) {
	clearGoEnv(t)
	const evil = "\r\x1b[2K\x1b]0;owned\x07\u202eog.ko\u2066\n\u0085\u2028"
	b := newBucket(t)
	db := b.putKnown("example.com/fine")
	inZip := newRelease("example.com/inzip", "v1.0.0")
	inZip.zip = newZip(inZip.module, inZip.version, map[string]string{"go.mod": inZip.mod, evil: "", evil + evil: ""})
	inZip.info = `{"Version":"v1.0.0","Time":"` + "\u202e" + `"}`
	b.put(inZip, nil, "info", "mod", "zip")
	b.put(newRelease("example.com/\u202e", "v1.0.0"), map[string]string{evil: evil}, "info", "mod", "zip")
	b.put(newRelease("example.com/partial", "v1.0.0-\u2066"), nil, "mod")
	b.checksums = roundTripper(func(req *http.Request) (*http.Response, error) {
		if strings.HasPrefix(req.URL.Path, "/lookup/") {
			return &http.Response{StatusCode: 404, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(evil))}, nil
		}
		return db.RoundTrip(req)
	})
	for _, args := range []string{"verify -sumdb KEY", "verify -odd-names", "check", "repair -dry-run", "show example.com/\u202e@v1.0.0", "check -module \u202e", "show \u202e"} {
		_, stdout, stderr := b.run(strings.Fields(strings.ReplaceAll(args, "KEY", db.key))...)
		assert.Regexp(t, `\\u20[26]`, stdout+stderr, args)
		for _, r := range strings.ReplaceAll(stdout+stderr, "\n", "") {
			assert.True(t, unicode.IsPrint(r), "%s: %q in %q", args, r, stdout+stderr)
		}
		for line := range strings.Lines(stdout) {
			assert.Regexp(t, `^(example\.com/|\d+ versions?, |    \.)`, line, args)
		}
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// TestReadsNotFound has a server answer 404 to reads of what it lists, as
// fake-gcs-server does without -public-host.
func TestReadsNotFound(t *testing.T) {
	clearGoEnv(t)
	for _, emulator := range []string{"", "http://127.0.0.1:4443", "127.0.0.1:4443"} {
		t.Setenv("STORAGE_EMULATOR_HOST", emulator)
		b := newBucket(t)
		b.put(newRelease("example.com/fine", "v1.0.0"), nil, "info", "mod", "zip")
		real := b.transport
		b.transport = roundTripper(func(r *http.Request) (*http.Response, error) {
			if r.Method == http.MethodGet && !strings.Contains(r.URL.Path, "/b/") {
				return &http.Response{StatusCode: 404, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(""))}, nil
			}
			return real.RoundTrip(r)
		})
		status, stdout, stderr := b.run("verify")
		assert.Equal(t, statusFailed, status)
		assert.Contains(t, stdout, "could not be verified: the bucket lists its files, and answers that they are not there")
		assert.Contains(t, stdout, "; 1 failed\n")
		assert.Equal(t, emulator != "", strings.Contains(stdout, "-public-host 127.0.0.1:4443:"), stdout)
		assertLine(t, stderr, "1 version could not be verified")
	}
}

// TestNothing has nothing to look at. What says that all is well has looked.
func TestNothing(t *testing.T) {
	clearGoEnv(t)
	for args, want := range map[string]string{
		"verify -module example.com/tpyo":        "there is nothing of the module example.com/tpyo in the bucket modules",
		"check -prefix tpyo":                     "there is nothing below the prefix tpyo in the bucket modules",
		"repair -prefix a/ -module b":            "there is nothing of the module b below the prefix a/ in the bucket modules",
		"repair -dry-run -module b":              "there is nothing of the module b",
		"check -since 1h -module b":              "there is nothing of the module b",
		"verify -module example.com/partial":     "not one version was verified",
		"verify -module example.com/odd":         "not one version was verified",
		"check -module example.com/odd":          "",
		"verify -module example.com/empty -j 3":  "there is nothing of the module example.com/empty",
		"verify -module example.com/fine -json":  "",
		"repair -module example.com/fine -j 100": "",
	} {
		b := newBucket(t)
		b.put(newRelease("example.com/fine", "v1.0.0"), nil, "info", "mod", "zip")
		b.put(newRelease("example.com/partial", "v1.0.0"), nil, "info", "mod")
		b.put(newRelease("example.com/odd", "v1"), nil, "info", "mod", "zip")
		status, _, stderr := b.run(strings.Fields(args)...)
		if want == "" {
			assert.Equal(t, statusOK, status, args+stderr)
			continue
		}
		assert.Equal(t, statusFailed, status, args)
		assertLine(t, stderr, want)
	}
	for _, command := range []string{"check", "repair", "verify"} {
		status, stdout, stderr := newBucket(t).run(command)
		assert.Equal(t, statusOK, status, stderr)
		assert.True(t, strings.HasPrefix(stdout, "0 versions, 0 B"), stdout)
	}
}

// TestStrict has checksums that a reference does not know.
func TestStrict(t *testing.T) {
	clearGoEnv(t)
	for args, want := range map[string]int{
		"-sumdb KEY": statusOK, "-sumdb KEY -strict": statusFound, "-sums testdata/go.sum -strict": statusFound,
		"-sumdb KEY -strict -module example.com/fine": statusOK, "-strict": statusFailed,
	} {
		b := newBucket(t)
		db := b.putKnown("example.com/fine")
		b.put(newRelease("example.com/private", "v1.0.0"), nil, "info", "mod", "zip")
		status, stdout, _ := b.run(append([]string{"verify"}, strings.Fields(strings.ReplaceAll(args, "KEY", db.key))...)...)
		assert.Equal(t, want, status, "%s: %s", args, stdout)
	}
}

// TestOneLine expects one line of what is wrong with a version, or of each of its
// files that is.
func TestOneLine(t *testing.T) {
	clearGoEnv(t)
	for _, tt := range []struct {
		spoil func(*release)
		want  []string
	}{
		{func(r *release) { r.info = `{"Version":"v1.0.0","Time":"2024-02-03T04:05:06Z"}` }, nil},
		{func(r *release) { r.info = `{"Version":"v1.0.0","Time":"yesterday"}` }, []string{`.info names the time "yesterday", which is none`}},
		{func(r *release) { r.info = `{"Version":"v1.0.0","Time":17}` }, []string{`.info names the time 17, which is none`}},
		{func(r *release) { r.info = `{"Version":"v1.0.0","Time":null}` }, []string{`.info names the time null, which is none`}},
		{func(r *release) { r.info = `{"Version":"v1.1.0","Time":""}` }, []string{`.info names the version "v1.1.0"`, `.info names the time "", which is none`}},
		{func(r *release) {
			*r = release{r.module, r.version, r.info, r.mod, newRelease("example.com/other", "v1.0.0").zip}
		},
			[]string{`.zip is not the module's: example.com/other@v1.0.0/doc.go: path does not have prefix "example.com/a@v1.0.0/" (and 1 more)`}},
		{func(r *release) { r.zip = "<html>" }, []string{`.zip is not the module's: zip: not a valid zip file`}},
		{func(r *release) { r.zip = strings.Replace(r.zip, "module example", "module expmale", 1) }, []string{`.zip cannot be read: zip: checksum error`}},
		{func(r *release) { r.mod += "\n" }, []string{`.mod differs from the go.mod in the zip: h1:1F6I6NMpJ8A6mMKSqN1VJiVEq8GWEvKbHqOcXFAPyWU= here, h1:0 there`}},
	} {
		b := newBucket(t)
		r := newRelease("example.com/a", "v1.0.0")
		sums := filepath.Join(t.TempDir(), "go.sum")
		require.NoError(t, os.WriteFile(sums, []byte(r.sums(t)), 0o666))
		if r.zip = stored(r); tt.spoil != nil {
			tt.spoil(&r)
		}
		b.put(r, nil, "info", "mod", "zip")
		status, stdout, stderr := b.run("verify")
		var want string
		for _, line := range tt.want {
			want += "example.com/a@v1.0.0: " + line + "\n"
		}
		lines := strings.SplitAfter(stdout, "\n")
		if !strings.Contains(want, "h1:") {
			assert.Equal(t, want, strings.Join(lines[:len(lines)-2], ""))
		}
		assert.Equal(t, min(len(tt.want), 1), status, stderr)
		// A zip that cannot be read is not compared.
		_, stdout, _ = b.run("verify", "-sums", sums)
		assert.Equal(t, !strings.Contains(want, ".zip"), strings.Contains(stdout, "; 1 compared with"), stdout)
		assert.Contains(t, stdout, ", 0 unknown to it")
	}
}

// stored returns the zip of a release, not compressed.
func stored(r release) string {
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	for name, text := range map[string]string{"go.mod": r.mod, "doc.go": "package doc\n"} {
		w, _ := z.CreateHeader(&zip.FileHeader{Name: r.module + "@" + r.version + "/" + name})
		_, _ = io.WriteString(w, text)
	}
	z.Close()
	return b.String()
}

// TestAgree expects repair to end as a check right after it does, and repair -dry-run
// as a check before it.
func TestAgree(t *testing.T) {
	r := newRelease("example.com/a", "v1.0.0")
	whole := []string{"info", "mod", "zip"}
	for name, tt := range map[string]struct {
		fill          func(b *bucket)
		before, after int
	}{
		"complete":                       {func(b *bucket) { b.put(r, nil, whole...) }, 0, 0},
		"partial":                        {func(b *bucket) { b.put(r, nil, "zip") }, 1, 0},
		"in progress":                    {func(b *bucket) { b.put(r, marked("a", 0), "mod") }, 1, 1},
		"fresh claim":                    {func(b *bucket) { b.put(r, marked("a", 0), "lock") }, 1, 1},
		"stale claim":                    {func(b *bucket) { b.put(r, marked("a", time.Minute), "lock") }, 1, 0},
		"claim that was given up":        {func(b *bucket) { b.put(r, marked("a", 56*365*24*time.Hour), "lock") }, 1, 0},
		"claim of a clock ahead":         {func(b *bucket) { b.put(r, marked("a", -time.Minute), "lock") }, 1, 1},
		"claim without a marker":         {func(b *bucket) { b.put(r, nil, "lock") }, 1, 0},
		"fresh claim beside partial":     {func(b *bucket) { b.put(r, nil, "mod"); b.put(r, marked("a", 0), "lock") }, 1, 1},
		"fresh claim beside complete":    {func(b *bucket) { b.put(r, nil, whole...); b.put(r, marked("a", 0), "lock") }, 0, 0},
		"stale claim beside complete":    {func(b *bucket) { b.put(r, nil, whole...); b.put(r, marked("a", time.Minute), "lock") }, 1, 0},
		"stale claim beside in progress": {func(b *bucket) { b.put(r, marked("b", 0), "mod"); b.put(r, marked("a", time.Minute), "lock") }, 1, 1},
		"odd names": {func(b *bucket) {
			for _, name := range oddObjects {
				b.Put(name, nil, nil)
			}
		}, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBucket(t)
				tt.fill(b)
				names := b.Names()
				for _, args := range []string{"check", "repair -dry-run"} {
					status, stdout, _ := b.run(strings.Fields(args)...)
					assert.Equal(t, tt.before, status, "%s: %s", args, stdout)
					assert.Equal(t, names, b.Names())
				}
				for _, args := range []string{"repair", "check"} {
					status, stdout, _ := b.run(args)
					assert.Equal(t, tt.after, status, "%s: %s", args, stdout)
				}
				if tt.before == 0 {
					assert.Equal(t, names, b.Names())
				}
			})
		})
	}
}

// TestSince expects only what has changed lately to be looked at.
func TestSince(t *testing.T) {
	clearGoEnv(t)
	synctest.Test(t, func(t *testing.T) {
		b := newBucket(t)
		old := newRelease("example.com/old", "v1.0.0")
		old.zip = "<html>"
		b.put(old, nil, "info", "mod", "zip")
		b.put(newRelease("example.com/old", "v1.1.0"), nil, "mod")
		time.Sleep(25 * time.Hour)
		for args, want := range map[string]string{
			"verify -since 24h":                         "0 versions, 0 B: 0 wrong; 2 older\n",
			"verify -since 24h -module example.com/old": "0 versions, 0 B: 0 wrong; 2 older\n",
			"check -since 24h":                          "0 versions, 0 B; 2 older\n",
			"check -since 24h -json":                    `{"summary":{"versions":0,"bytes":0,"states":{},"older":2}}` + "\n",
		} {
			b.ResetLog()
			status, stdout, stderr := b.run(strings.Fields(args)...)
			assert.Equal(t, statusOK, status, stderr)
			assert.Equal(t, want, stdout)
			for _, r := range b.Log() {
				assert.NotEqual(t, "get", r.Op, args)
			}
		}
		b.put(newRelease("example.com/new", "v1.0.0"), nil, "info", "mod", "zip")
		b.put(newRelease("example.com/old", "v1.1.0"), marked("c", 0), "lock")
		_, stdout, _ := b.run("verify", "-since", "24h")
		assert.Equal(t, "1 version, 412 B: 0 wrong; 1 not complete, skipped; 1 older\n", stdout)
		status, stdout, _ := b.run("check", "-since", "24h")
		assert.Equal(t, statusFound, status)
		assert.Contains(t, stdout, "example.com/old@v1.1.0: partial")
		b.terminal = true
		_, _, stderr := b.run("verify", "-since", "24h")
		assert.NotContains(t, stderr, "3 versions")
	})
}
