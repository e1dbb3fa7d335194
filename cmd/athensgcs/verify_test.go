package main

import (
	"bytes"
	"context"
	cryptorand "crypto/rand"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/mod/sumdb"
	"golang.org/x/mod/sumdb/note"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// fillModules stores versions that are right, wrong in each way, and not complete,
// and returns the lines of go.sum files that are right.
func (b *bucket) fillModules() (sums map[string]string) {
	b.t.Helper()
	sums = map[string]string{}
	add := func(name string, change func(*release)) {
		b.t.Helper()
		r := newRelease("example.com/"+name, "v1.0.0")
		sums[r.module+"@"+r.version] = r.sums(b.t)
		if change != nil {
			change(&r)
		}
		b.put(r, nil, "info", "mod", "zip")
	}
	other := newRelease("example.com/other", "v1.0.0")
	add("fine", nil)
	add("Upper", nil)
	add("nogomod", func(r *release) {
		r.zip = newZip(r.module, r.version, map[string]string{"doc.go": "package doc\n"})
		sums[r.module+"@"+r.version] = r.sums(b.t)
	})
	add("othernogomod", func(r *release) {
		r.zip = newZip(r.module, r.version, map[string]string{"doc.go": "package doc\n"})
		r.mod += "\nrequire example.com/evil v1.0.0\n"
		sums[r.module+"@"+r.version] = r.sums(b.t)
	})
	add("poisoned", func(r *release) {
		r.zip = newZip(r.module, r.version, map[string]string{"go.mod": r.mod, "doc.go": "package evil\n"})
	})
	add("othermod", func(r *release) { r.mod += "\ngo 1.26\n" })
	add("otherinfo", func(r *release) { r.info = `{"Version":"v1.0.1"}` })
	add("badinfo", func(r *release) { r.info = "<html>" })
	add("badzip", func(r *release) { r.zip = "<html>" })
	add("otherzip", func(r *release) { r.zip = other.zip })
	future := "example.com/poisoned v1.0.0 h2:abc=\n" // of an algorithm to come
	sums["example.com/poisoned@v1.0.0"] = future + sums["example.com/poisoned@v1.0.0"] + future
	b.put(newRelease("example.com/partial", "v1.0.0"), nil, "mod")
	b.put(newRelease("nodots", "v1.0.0"), nil, "info", "mod", "zip") // no module has such a path
	return sums
}

// sums returns the release's lines in a go.sum file.
func (r release) sums(t testing.TB) string {
	file := filepath.Join(t.TempDir(), "module.zip")
	require.NoError(t, os.WriteFile(file, []byte(r.zip), 0o666))
	var res result
	res.Module, res.Version = r.module, r.version
	require.NoError(t, res.checkZip(t.Context(), file))
	mod, err := hashMod([]byte(r.mod))
	require.NoError(t, err)
	return r.module + " " + r.version + " " + res.Zip + "\n" +
		r.module + " " + r.version + "/go.mod " + mod + "\n"
}

// A sumServer is sum.example.com, a checksum database in process, and
// proxy.example.com, which serves it too.
type sumServer struct {
	sums        map[string]string
	signer, key string

	mu       sync.Mutex
	db       http.Handler
	requests []string
	// answer returns the status to answer with instead, or 0.
	answer func(*http.Request) int
}

func newSumServer(t testing.TB, sums map[string]string) *sumServer {
	signer, key, err := note.GenerateKey(cryptorand.Reader, "sum.example.com")
	require.NoError(t, err)
	s := &sumServer{sums: sums, signer: signer, key: key, answer: func(*http.Request) int { return 0 }}
	s.restart()
	return s
}

// putKnown stores versions v1.0.0 that are right, and has the program ask a checksum
// database that knows them.
func (b *bucket) putKnown(modules ...string) *sumServer {
	b.t.Helper()
	sums := map[string]string{}
	for _, module := range modules {
		r := newRelease(module, "v1.0.0")
		b.put(r, nil, "info", "mod", "zip")
		sums[module+"@v1.0.0"] = r.sums(b.t)
	}
	db := newSumServer(b.t, sums)
	b.checksums = db
	return db
}

// restart begins a new tree.
func (s *sumServer) restart() {
	s.db = sumdb.NewServer(sumdb.NewTestServer(s.signer, func(path, version string) ([]byte, error) {
		if lines, ok := s.sums[path+"@"+version]; ok {
			return []byte(lines), nil
		}
		return nil, fs.ErrNotExist
	}))
}

func (s *sumServer) RoundTrip(req *http.Request) (*http.Response, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests = append(s.requests, req.URL.Host+req.URL.Path)
	w := httptest.NewRecorder()
	const proxied = "/sumdb/sum.example.com"
	switch status := s.answer(req); {
	case status != 0:
		w.WriteHeader(status)
	case req.URL.Host == "sum.example.com":
		s.db.ServeHTTP(w, req)
	case req.URL.Host == "proxy.example.com" && req.URL.Path == proxied+"/supported":
	case req.URL.Host == "proxy.example.com":
		http.StripPrefix(proxied, s.db).ServeHTTP(w, req)
	default:
		http.NotFound(w, req)
	}
	return w.Result(), nil
}

// TestVerify runs verify on a bucket with good versions and bad ones.
func TestVerify(t *testing.T) {
	clearGoEnv(t)
	for _, tt := range []struct {
		golden string
		args   []string
	}{
		{"verify.txt", nil},
		{"verify.json", []string{"-json"}},
		{"verify-sumdb.txt", []string{"-sumdb", "KEY"}},
		{"verify-sumdb.json", []string{"-sumdb", "KEY", "-json"}},
		{"verify-sums.txt", []string{"-sums", "testdata/go.sum"}},
		{"verify-both.txt", []string{"-sums", "testdata/go.sum", "-sumdb", "KEY", "-module", "example.com/poisoned"}},
	} {
		t.Run(tt.golden, func(t *testing.T) {
			b := newBucket(t)
			sums := b.fillModules()
			_, onlyMod, _ := strings.Cut(sums["example.com/othermod@v1.0.0"], "\n")
			golden(t, "go.sum", sums["example.com/fine@v1.0.0"]+sums["example.com/poisoned@v1.0.0"]+onlyMod)
			delete(sums, "example.com/nogomod@v1.0.0")
			db := newSumServer(t, sums)
			b.checksums = db
			before := b.Names()
			for i := range tt.args {
				tt.args[i] = strings.ReplaceAll(tt.args[i], "KEY", db.key)
			}
			status, stdout, stderr := b.run(append([]string{"verify", "-j", "1"}, tt.args...)...)
			golden(t, tt.golden, stdout)
			assert.Empty(t, stderr)
			assert.Equal(t, statusFound, status)
			assert.Equal(t, before, b.Names())
			assertNoFiles(t)
		})
	}
}

// clearGoEnv gives the go command's variables their defaults, and the program
// a directory for temporary files of its own.
func clearGoEnv(t *testing.T) {
	t.Helper()
	for _, name := range []string{"GOPROXY", "GONOSUMDB", "GOPRIVATE"} {
		t.Setenv(name, "")
	}
	t.Setenv("GOENV", "off")
	t.Setenv("TMPDIR", t.TempDir())
}

// TestGoEnv expects variables to be read as the go command reads them.
func TestGoEnv(t *testing.T) {
	clearGoEnv(t)
	dir := t.TempDir()
	t.Setenv("XDG_CONFIG_HOME", dir)
	file := filepath.Join(dir, "go", "env")
	require.NoError(t, os.MkdirAll(filepath.Dir(file), 0o755))
	require.NoError(t, os.WriteFile(file, []byte("GOPROXY=off\nGOPRIVATE=corp.example.com\n"), 0o644))
	assert.Empty(t, goEnv("GOPRIVATE"), "GOENV=off")
	if runtime.GOOS == "linux" {
		t.Setenv("GOENV", "")
		assert.Equal(t, "corp.example.com", goEnv("GOPRIVATE"))
	}
	t.Setenv("GOENV", file)
	assert.Equal(t, "corp.example.com", goEnv("GOPRIVATE"))
	assert.Empty(t, goEnv("GONOSUMDB"))
	t.Setenv("GOPRIVATE", "example.org")
	assert.Equal(t, "example.org", goEnv("GOPRIVATE"))
	t.Setenv("GOENV", filepath.Join(dir, "nothing"))
	assert.Empty(t, goEnv("GOPROXY"))
}

func assertNoFiles(t *testing.T) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(os.TempDir(), "athensgcs-*"))
	require.NoError(t, err)
	assert.Empty(t, files)
}

// TestVerifyFine expects status 0 of a bucket in which all is well.
func TestVerifyFine(t *testing.T) {
	clearGoEnv(t)
	b := newBucket(t)
	db := b.putKnown("example.com/Fine")
	status, stdout, stderr := b.run("verify", "-sumdb", db.key)
	assert.Equal(t, "1 version, 418 B: 0 wrong; 1 compared with sum.example.com, 0 unknown to it\n", stdout)
	assert.Empty(t, stderr)
	assert.Equal(t, statusOK, status)
	for _, request := range db.requests {
		assert.True(t, strings.HasPrefix(request, "sum.example.com/"), request)
	}
}

// TestSumdbRoute expects the database to be asked where GOPROXY says.
func TestSumdbRoute(t *testing.T) {
	for _, tt := range []struct{ goproxy, url, want string }{
		{"", "", "sum.example.com/"},
		{"direct", "", "sum.example.com/"},
		{"off", "", "sum.example.com/"},
		{"file:///tmp,https://proxy.example.com", "", "proxy.example.com/sumdb/sum.example.com/"},
		{"https://other.example.com|https://proxy.example.com/", "", "proxy.example.com/sumdb/sum.example.com/"},
		{"https://other.example.com,direct", "", "sum.example.com/"},
		{"https://proxy.example.com", " https://sum.example.com/", "sum.example.com/"},
	} {
		clearGoEnv(t)
		t.Setenv("GOPROXY", tt.goproxy)
		b := newBucket(t)
		db := b.putKnown("example.com/fine")
		status, stdout, stderr := b.run("verify", "-sumdb", db.key+tt.url)
		assert.Equal(t, statusOK, status, stdout+stderr)
		assert.Contains(t, db.requests, tt.want+"latest")
		assert.Contains(t, db.requests, tt.want+"lookup/example.com/fine@v1.0.0")
	}
}

// TestGONOSUMDB expects the database not to be told of excluded modules.
func TestGONOSUMDB(t *testing.T) {
	for _, tt := range []struct {
		gonosumdb, goprivate string
		excluded             bool
	}{
		{"example.com/pri*", "", true},
		{"", "example.com", true},
		{"example.org", "example.com", false},
	} {
		clearGoEnv(t)
		t.Setenv("GONOSUMDB", tt.gonosumdb)
		t.Setenv("GOPRIVATE", tt.goprivate)
		b := newBucket(t)
		b.put(newRelease("example.com/private", "v1.0.0"), nil, "info", "mod", "zip")
		db := newSumServer(t, nil)
		b.checksums = db
		status, stdout, _ := b.run("verify", "-sumdb", db.key)
		assert.Equal(t, statusOK, status)
		assert.Equal(t, tt.excluded, strings.Contains(stdout, "1 excluded by GONOSUMDB"), stdout)
		assert.Equal(t, tt.excluded, !strings.Contains(strings.Join(db.requests, "\n"), "private"))
		assert.Equal(t, tt.excluded, !strings.Contains(stdout, "not known to sum.example.com: 404"), stdout)
	}
}

// TestSumdbFails has the database fail, for a while or for good.
func TestSumdbFails(t *testing.T) {
	clearGoEnv(t)
	for _, tt := range []struct {
		path   string // of the requests that fail
		status int    // what they are answered
		times  int
		want   int
		line   string
	}{
		{"/lookup/", http.StatusServiceUnavailable, lookupTries - 1, statusOK, ""},
		{"/tile/", http.StatusTooManyRequests, lookupTries - 1, statusOK, ""},
		{"/latest", http.StatusBadGateway, lookupTries, statusFailed, "sum.example.com does not answer: 502"},
		{"/lookup/", http.StatusInternalServerError, 2 * lookupTries, statusFailed, "2 versions could not be verified"},
		{"/tile/", http.StatusNotFound, 1, statusFailed, "1 version could not be verified"},
		{"/lookup/", http.StatusForbidden, 1, statusFailed, "1 version could not be verified"},
		{"/lookup/", http.StatusGone, 1, statusOK, ""},
	} {
		synctest.Test(t, func(t *testing.T) {
			b := newBucket(t)
			db := b.putKnown("example.com/a", "example.com/b")
			db.answer = func(req *http.Request) int {
				if strings.HasPrefix(req.URL.Path, tt.path) && tt.times > 0 {
					tt.times--
					return tt.status
				}
				return 0
			}
			status, stdout, stderr := b.run("verify", "-j", "1", "-sumdb", db.key)
			assert.Equal(t, tt.want, status, "%v: %s%s", tt, stdout, stderr)
			if tt.line != "" {
				assertLine(t, stderr, tt.line)
			}
			assert.Zero(t, tt.times)
		})
	}
}

// TestSumdbForks has the database sign two trees that contradict each other.
func TestSumdbForks(t *testing.T) {
	clearGoEnv(t)
	b := newBucket(t)
	db := b.putKnown("example.com/a", "example.com/b", "example.com/c")
	db.answer = func(req *http.Request) int {
		if strings.HasPrefix(req.URL.Path, "/lookup/example.com/b") {
			db.restart()
		}
		return 0
	}
	status, _, stderr := b.run("verify", "-j", "1", "-sumdb", db.key)
	assert.Equal(t, statusFailed, status)
	assertLine(t, stderr, "the checksum database misbehaves: SECURITY ERROR")
}

// TestManyLookups expects the latest tree to outlive the client that has read it.
func TestManyLookups(t *testing.T) {
	clearGoEnv(t)
	r := newRelease("example.com/a", "v1.0.0")
	db := newSumServer(t, map[string]string{
		"example.com/a@v1.0.0": r.sums(t),
		"example.com/b@v1.0.0": newRelease("example.com/b", "v1.0.0").sums(t),
	})
	d, err := newDatabase(t.Context(), db.key, db)
	require.NoError(t, err)
	for range clientLookups + 1 {
		_, err := d.lookup("example.com/a", "v1.0.0")
		require.NoError(t, err)
	}
	lookups := 0
	for _, request := range db.requests {
		if strings.Contains(request, "/lookup/") {
			lookups++
		}
	}
	assert.Equal(t, 2, lookups)
	assert.NotEmpty(t, d.latest)
	db.restart()
	_, err = d.lookup("example.com/b", "v1.0.0")
	assert.ErrorIs(t, err, errMisbehaves)
}

// TestLookupAgain expects a lookup that has failed to be possible later.
func TestLookupAgain(t *testing.T) {
	clearGoEnv(t)
	r := newRelease("example.com/a", "v1.0.0")
	db := newSumServer(t, map[string]string{"example.com/a@v1.0.0": r.sums(t)})
	d, err := newDatabase(t.Context(), db.key, db)
	require.NoError(t, err)
	db.answer = func(*http.Request) int { return http.StatusForbidden }
	_, err = d.lookup(r.module, r.version)
	require.ErrorContains(t, err, "403")
	db.answer = func(*http.Request) int { return 0 }
	sums, err := d.lookup(r.module, r.version)
	require.NoError(t, err)
	assert.NotEmpty(t, sums.zip)
	assert.NotEmpty(t, sums.mod)
}

// TestInterruptedZip interrupts the download of a zip of which a half has come.
func TestInterruptedZip(t *testing.T) {
	clearGoEnv(t)
	synctest.Test(t, func(t *testing.T) {
		b := newBucket(t)
		b.put(newRelease("example.com/a", "v1.0.0"), nil, "info", "mod", "zip")
		ctx, interrupt := context.WithCancel(t.Context())
		halves := 0
		b.OnRequest(func(_ context.Context, r *fakegcs.Request) fakegcs.Fault {
			if r.Op == "get" && strings.HasSuffix(r.Object, ".zip") {
				if halves++; halves == 1 {
					return fakegcs.LostBody
				}
				files, _ := filepath.Glob(filepath.Join(os.TempDir(), "athensgcs-*"))
				assert.Len(t, files, 1)
				interrupt()
				return fakegcs.Hung
			}
			return fakegcs.NoFault
		})
		var stdout, stderr bytes.Buffer
		assert.Equal(t, statusFailed, b.start(ctx, &stdout, &stderr, "verify"))
		assertLine(t, stderr.String(), "interrupted")
		assert.Equal(t, 2, halves)
		assertNoFiles(t)
	})
}

func TestWrongReferences(t *testing.T) {
	clearGoEnv(t)
	bad := filepath.Join(t.TempDir(), "go.sum")
	require.NoError(t, os.WriteFile(bad, []byte("example.com/a v1.0.0 h1:abc=\nexample.com/a\n"), 0o666))
	for _, tt := range []struct{ flag, value, want string }{
		{"-sums", filepath.Join(t.TempDir(), "missing"), "-sums: open "},
		{"-sums", bad, "-sums: line 2 of "},
		{"-sumdb", "sum.example.com", `-sumdb: "sum.example.com" is neither sum.golang.org nor NAME+KEY`},
	} {
		status, stdout, stderr := newBucket(t).run("verify", tt.flag, tt.value)
		assert.Equal(t, statusFailed, status)
		assert.Empty(t, stdout)
		assertLine(t, stderr, tt.want)
	}
}

// TestSumGolangOrg expects the key to be built in.
func TestSumGolangOrg(t *testing.T) {
	clearGoEnv(t)
	db := newSumServer(t, nil)
	d, err := newDatabase(t.Context(), "sum.golang.org https://sum.example.com", db)
	require.NoError(t, err)
	assert.Equal(t, "sum.golang.org", d.name())
}

// TestVerifyGone deletes a version before each of the reads of it.
func TestVerifyGone(t *testing.T) {
	clearGoEnv(t)
	for _, ext := range []string{"info", "mod", "zip"} {
		b := newBucket(t)
		gone := newRelease("example.com/gone", "v1.0.0")
		b.put(gone, nil, "info", "mod", "zip")
		b.put(newRelease("example.com/stays", "v1.0.0"), nil, "info", "mod", "zip")
		b.OnRequest(func(_ context.Context, r *fakegcs.Request) fakegcs.Fault {
			if r.Op == "get" && r.Object == gone.object(ext) {
				for _, ext := range []string{"info", "mod", "zip"} {
					b.Remove(gone.object(ext))
				}
			}
			return fakegcs.NoFault
		})
		status, stdout, stderr := b.run("verify")
		assert.Equal(t, "1 version, 424 B: 0 wrong; 1 gone meanwhile\n", stdout)
		assert.Empty(t, stderr)
		assert.Equal(t, statusOK, status)
		assertNoFiles(t)
	}
}

// TestAtOnce expects no more than -j versions to be read or repaired at the same time,
// that many, and lines in the order of the versions.
func TestAtOnce(t *testing.T) {
	clearGoEnv(t)
	for args, want := range map[string]int32{"verify -j 1": 1, "verify -j 3": 3, "repair": 8, "repair -j 2": 2} {
		synctest.Test(t, func(t *testing.T) {
			b := newBucket(t)
			for i := range 20 {
				r := newRelease(fmt.Sprintf("example.com/%02d", i), "v1.0.0")
				b.put(r, nil, "zip")
				if strings.HasPrefix(args, "verify") {
					b.put(r, nil, "info", "mod")
				}
			}
			var working, most atomic.Int32
			b.OnRequest(func(_ context.Context, r *fakegcs.Request) fakegcs.Fault {
				if (r.Op == "get" || r.Op == "delete") && strings.HasSuffix(r.Object, ".zip") {
					most.Store(max(most.Load(), working.Add(1)))
					time.Sleep(time.Duration(rand.IntN(1000)) * time.Millisecond)
					working.Add(-1)
				}
				return fakegcs.NoFault
			})
			status, stdout, _ := b.run(append(strings.Fields(args), "-json")...)
			assert.Equal(t, statusOK, status)
			assert.Equal(t, want, most.Load(), args)
			lines := strings.Split(stdout, "\n")[:20]
			assert.True(t, slices.IsSorted(lines), stdout)
		})
	}
}
