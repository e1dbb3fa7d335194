package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

var update = flag.Bool("update", false, "write the golden files")

// golden compares the output with a file in testdata.
func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		require.NoError(t, os.WriteFile(file, []byte(got), 0o666))
	}
	want, err := os.ReadFile(file)
	require.NoError(t, err)
	assert.Equal(t, string(want), got, file)
}

// TestStates runs check and repair on a bucket in which every state occurs.
func TestStates(t *testing.T) {
	for _, tt := range []struct {
		golden  string
		args    string
		status  int
		changes bool
	}{
		{"check.txt", "check", statusFound, false},
		{"check.json", "check -json", statusFound, false},
		{"check-module.txt", "check -module example.com/complete", statusOK, false},
		{"check-stale.txt", "check -stale 5s -module example.com/inprogress", statusFound, false},
		{"dry-run.txt", "repair -dry-run", statusFound, false},
		{"dry-run-module.txt", "repair -dry-run -module example.com/partial", statusFound, false},
		{"dry-run.json", "repair -dry-run -json", statusFound, false},
		{"repair.txt", "repair", statusFound, true},
		{"repair.json", "repair -json", statusFound, true},
		{"repair-module.txt", "repair -module example.com/partial", statusOK, true},
		{"check-odd.txt", "check -odd-names -module example.com/odd", statusFound, false},
		{"repair-odd.txt", "repair -odd-names", statusFound, true},
	} {
		t.Run(tt.golden, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBucket(t)
				b.fillStates()
				before := b.Names()
				status, stdout, stderr := b.run(strings.Fields(tt.args)...)
				golden(t, tt.golden, stdout)
				assert.Empty(t, stderr)
				assert.Equal(t, tt.status, status)
				assert.Equal(t, tt.changes, len(before) != len(b.Names()))
			})
		})
	}
}

// TestRepairTwice expects the second repair to find only what a server is at.
func TestRepairTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBucket(t)
		b.fillStates()
		b.run("repair")
		status, stdout, stderr := b.run("repair")
		golden(t, "repair-twice.txt", stdout)
		assert.Empty(t, stderr)
		assert.Equal(t, statusFound, status)
	})
}

func TestHelp(t *testing.T) {
	for args, want := range map[string]string{"help": "Exit status:", "-h": "Exit status:", "--help": "Exit status:", "repair -help": "-dry-run", "verify -h": "-sumdb"} {
		var stdout, stderr bytes.Buffer
		assert.Equal(t, statusOK, run(t.Context(), strings.Fields(args), &stdout, &stderr), args)
		assert.Contains(t, stdout.String(), want, args)
		assert.Empty(t, stderr.String(), args)
	}
	for _, c := range commands {
		var stdout bytes.Buffer
		assert.Equal(t, statusOK, run(t.Context(), []string{c.name, "-h"}, &stdout, io.Discard))
		for _, want := range []string{"Usage: athensgcs " + c.name, "Exit status", "With -json, ", "Examples:\n    athensgcs " + c.name + " -bucket "} {
			assert.Contains(t, stdout.String(), want)
		}
	}
}

func TestWrongUsage(t *testing.T) {
	for args, want := range map[string]string{
		"":                            "run athensgcs help",
		"prune":                       `no command "prune"`,
		"check":                       "add -bucket NAME; run athensgcs check -h",
		"check -bucket":               "needs an argument: -bucket; run athensgcs check -h",
		"check -bucket b -purge":      "not defined: -purge; run athensgcs check -h",
		"check -bucket b -dry-run":    "not defined: -dry-run",
		"check -bucket b c":           `"c" is no flag`,
		"check -bucket b -stale 120":  `"120" for flag -stale: it takes a number and a unit, as in 120s`,
		"verify -bucket b -since 0s":  "-since is 0s, and must be more than 0",
		"check -bucket b -since -24h": "-since is -24h0m0s, and must be more than 0",
		"check -bucket b -since 24":   "it takes a number and a unit",
		"repair -bucket b -since 24h": "not defined: -since",
		"repair -bucket b -j 0":       "-j is 0",
		"verify -bucket b -strict":    "-strict needs -sums or -sumdb",
		"show -bucket b":              "MODULE@VERSION is missing",
		"repair -bucket b -stale 0s":  "-stale is 0s",
		"verify -bucket b -j 0":       "-j is 0",
	} {
		var stdout, stderr bytes.Buffer
		assert.Equal(t, statusFailed, run(t.Context(), strings.Fields(args), &stdout, &stderr), args)
		assertLine(t, stderr.String(), want)
		assert.Empty(t, stdout.String(), args)
	}
}

// assertLine expects one line that contains want.
func assertLine(t *testing.T, got, want string) {
	t.Helper()
	assert.Contains(t, got, want)
	assert.True(t, strings.HasPrefix(got, "athensgcs"), got)
	assert.Equal(t, 1, strings.Count(got, "\n"), got)
}

func TestNoBucket(t *testing.T) {
	for _, args := range []string{"check", "repair", "repair -dry-run", "verify"} {
		b := newBucket(t)
		status, stdout, stderr := b.run(strings.Fields(args + " -bucket nowhere")...)
		assert.Equal(t, statusFailed, status, args)
		assert.Empty(t, stdout, args)
		assertLine(t, stderr, "there is no bucket nowhere; look for its name with gcloud storage ls")
	}
}

// TestPermissions takes a permission away that a command needs, and one that it
// does not need.
func TestPermissions(t *testing.T) {
	for _, tt := range []struct{ args, permission, want string }{
		{"check", "storage.objects.update", "storage.objects.update"},
		{"check", "storage.objects.list", "storage.objects.list"},
		{"repair", "storage.objects.delete", "storage.objects.delete"},
		{"repair -dry-run", "storage.objects.delete", ""},
		{"repair -dry-run", "storage.objects.list", "storage.objects.list"},
		{"verify", "storage.objects.list", "storage.objects.list"},
		{"verify", "storage.objects.get", "1 version could not be verified; see above"},
		{"verify", "storage.objects.update", ""},
		{"verify", "storage.objects.delete", ""},
	} {
		b := newBucket(t)
		b.put(newRelease("example.com/fine", "v1.0.0"), nil, "info", "mod", "zip")
		b.Deny(tt.permission)
		status, stdout, stderr := b.run(strings.Fields(tt.args)...)
		if tt.want == "" {
			assert.Equal(t, statusOK, status, tt)
			assert.Empty(t, stderr)
			continue
		}
		assert.Equal(t, statusFailed, status, tt)
		assertLine(t, stderr, tt.want)
		says := stderr // what to do
		if tt.permission == "storage.objects.get" {
			says = stdout // on the line of the version
		} else {
			assert.Empty(t, stdout)
		}
		assert.Contains(t, says, "roles/storage.objectUser", tt)
	}
}

// TestRepairFails expects what can be repaired to be repaired when other versions
// cannot be, here for a retention policy.
func TestRepairFails(t *testing.T) {
	for _, name := range []string{"repair-fails.txt", "repair-fails.json"} {
		synctest.Test(t, func(t *testing.T) {
			b := newBucket(t)
			b.fillStates()
			b.Retain(true)
			status, stdout, stderr := b.run("repair", "-json="+strconv.FormatBool(name == "repair-fails.json"))
			golden(t, name, stdout)
			assertLine(t, stderr, "7 versions could not be repaired; see above")
			assert.Equal(t, statusFailed, status)
			assert.Empty(t, b.Get("example.com/unfinished/@v/v1.0.0.mod").Metadata)
		})
	}
}

// TestRepairMany repairs many versions at the same time, and counts the requests.
func TestRepairMany(t *testing.T) {
	b := newBucket(t)
	const versions = 2_000
	for i := range versions {
		b.put(release{module: fmt.Sprintf("example.com/%05d", i), version: "v1.0.0"}, nil, "mod")
	}
	const stuck = "example.com/00017/@v/v1.0.0.mod"
	real := b.transport
	b.transport = roundTripper(func(r *http.Request) (*http.Response, error) {
		if r.Method == http.MethodDelete && strings.Contains(r.URL.Path, "00017") {
			return &http.Response{StatusCode: 403, Header: http.Header{}, Body: io.NopCloser(strings.NewReader("held"))}, nil
		}
		return real.RoundTrip(r)
	})
	status, stdout, stderr := b.run("repair")
	assert.Equal(t, statusFailed, status)
	assertLine(t, stderr, "1 version could not be repaired; see above")
	assert.Regexp(t, `\nexample.com/00017@v1.0.0: partial, no .info and .zip, written [^:]+: failed: gcs.Repair: `, stdout)
	assert.True(t, strings.HasSuffix(stdout, "\n2,000 versions, 0 B: 2,000 partial; 1,999 removed, 1 failed\n"))
	assert.True(t, slices.IsSorted(strings.Split(stdout, "\n")[:versions]))
	assert.Equal(t, []string{stuck}, b.Names())
	const perVersion = 3 // two listings, a delete
	assert.InDelta(t, perVersion*versions, len(b.Log()), 50)
}

// TestInterrupt interrupts each command at each of its requests.
func TestInterrupt(t *testing.T) {
	clearGoEnv(t)
	for _, command := range []string{"check", "repair", "verify"} {
		synctest.Test(t, func(t *testing.T) {
			for n := 0; ; n++ {
				b := newBucket(t)
				b.fillStates()
				ctx, interrupt := context.WithCancel(t.Context())
				b.OnRequest(func(_ context.Context, r *fakegcs.Request) fakegcs.Fault {
					if r.N == n {
						interrupt()
						return fakegcs.Hung
					}
					return fakegcs.NoFault
				})
				var stdout, stderr bytes.Buffer
				status := b.start(ctx, &stdout, &stderr, command)
				assertNoFiles(t)
				if ctx.Err() == nil {
					assert.Greater(t, n, 1)
					assert.NotContains(t, stdout.String(), "until it stopped")
					interrupt()
					return
				}
				assert.Equal(t, statusFailed, status)
				assertLine(t, stderr.String(), command+": interrupted")
				if stdout.Len() > 0 {
					lines := strings.Split(strings.TrimSpace(stdout.String()), "\n")
					assert.True(t, strings.HasPrefix(lines[len(lines)-1], "until it stopped: "), stdout.String())
				}
			}
		})
	}
}

// manyReleases returns n versions of one module.
func manyReleases(n int) (all []release) {
	for i := range n {
		all = append(all, newRelease("example.com/many", fmt.Sprintf("v1.%d.0", i)))
	}
	return all
}

// TestStops has a list fail after the first page, and expects what was found.
func TestStops(t *testing.T) {
	releases := manyReleases(400)
	for _, command := range []string{"check", "repair", "verify"} {
		b := newBucket(t)
		for _, r := range releases {
			b.put(r, nil, "info", "mod", "zip")
		}
		lists := 0
		b.OnRequest(func(_ context.Context, r *fakegcs.Request) fakegcs.Fault {
			if r.Op == "list" {
				if lists++; lists == 2 {
					b.Deny("storage.objects.list")
				}
			}
			return fakegcs.NoFault
		})
		status, stdout, stderr := b.run(command, "-json")
		assert.Equal(t, statusFailed, status)
		assertLine(t, stderr, "storage.objects.list")
		lines := strings.Split(strings.TrimSpace(stdout), "\n")
		var last struct {
			Summary struct{ Versions int }
			Stopped bool
		}
		require.NoError(t, json.Unmarshal([]byte(lines[len(lines)-1]), &last))
		assert.True(t, last.Stopped)
		assert.InDelta(t, 333, last.Summary.Versions, 10, command)
	}
}

// TestProgress expects the progress on a terminal, beside complete lines of output.
func TestProgress(t *testing.T) {
	clearGoEnv(t)
	releases := manyReleases(1000)
	scanned := `\r/ 33[34] versions, \d+ kB \(\d+ versions/s\) \[0s\]`
	for command, want := range map[string][]string{
		"check":  {scanned},
		"repair": {scanned},
		"verify": {scanned, `\r\d+ versions  50% \|█{10} {10}\| \(\d+/\d+ kB, [\d.]+ k?B/s\) \[\dm?\d*s:\dm?\d*s\]`},
	} {
		synctest.Test(t, func(t *testing.T) {
			b := newBucket(t)
			for _, r := range releases {
				b.put(r, nil, "info", "mod", "zip")
			}
			b.SetLatency(300 * time.Millisecond)
			b.terminal = true
			status, stdout, stderr := b.run(command, "-json")
			assert.Equal(t, statusOK, status)
			for _, text := range want {
				assert.True(t, regexp.MustCompile(text).MatchString(stderr), "%s: no %s in %.3000q", command, text, stderr)
			}
			assert.True(t, strings.HasSuffix(stderr, "\033[2K\r"), "the line is not cleared in the end: %q", stderr)
			for line := range strings.Lines(stdout) {
				assert.True(t, json.Valid([]byte(line)), line)
			}
		})
	}
}

type fullDisk struct{}

func (fullDisk) Write([]byte) (int, error) { return 0, syscall.ENOSPC }

func TestFullDisk(t *testing.T) {
	for _, args := range []string{"check", "check -json", "repair", "verify", "verify -json"} {
		b := newBucket(t)
		b.put(newRelease("example.com/fine", "v1.0.0"), nil, "info", "mod", "zip")
		var stderr bytes.Buffer
		assert.Equal(t, statusFailed, b.start(t.Context(), fullDisk{}, &stderr, strings.Fields(args)...))
		assertLine(t, stderr.String(), "no space left")
	}
}

// TestPrefix has the objects of two proxies in one bucket.
func TestPrefix(t *testing.T) {
	clearGoEnv(t)
	b := newBucket(t)
	r := newRelease("example.com/fine", "v1.0.0")
	for ext, data := range map[string]string{"info": r.info, "mod": r.mod, "zip": r.zip} {
		b.Put("athens/"+r.object(ext), []byte(data), nil)
	}
	b.Put("other/"+r.object("mod"), []byte(r.mod), nil)
	for _, command := range []string{"check", "repair", "verify"} {
		status, stdout, stderr := b.run(command, "-prefix", "athens/")
		assert.Equal(t, statusOK, status)
		assert.True(t, strings.HasPrefix(stdout, "1 version, "), stdout)
		assert.Empty(t, stderr)
	}
}

// TestLargeBucket expects one request a page, and the memory of one page.
func TestLargeBucket(t *testing.T) {
	if testing.Short() {
		t.Skip("it measures memory, of which the race detector takes more")
	}
	b := newBucket(t)
	const versions = 10_000
	for i := range versions {
		r := release{module: fmt.Sprintf("example.com/%05d", i), version: "v1.0.0"}
		b.put(r, nil, "info", "mod", "zip")
	}
	m := &memory{}
	status := b.start(t.Context(), m, io.Discard, "check", "-json")
	assert.Equal(t, statusOK, status)
	assert.Equal(t, versions+1, m.lines)
	assert.Len(t, b.Log(), 1+(3*versions+998)/999) // permissions, pages
	assert.Less(t, slices.Max(m.heap), m.heap[0]+1<<20, "%d", m.heap)
}

// A memory looks at the heap at the same place of every page.
type memory struct {
	lines int
	heap  []uint64
}

func (m *memory) Write(line []byte) (int, error) {
	if m.lines++; m.lines%333 == 0 {
		runtime.GC()
		var stats runtime.MemStats
		runtime.ReadMemStats(&stats)
		m.heap = append(m.heap, stats.HeapAlloc)
	}
	return len(line), nil
}

func TestNoCredentials(t *testing.T) {
	t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", filepath.Join(t.TempDir(), "missing.json"))
	var stdout, stderr bytes.Buffer
	assert.Equal(t, statusFailed, run(t.Context(), []string{"check", "-bucket", "b"}, &stdout, &stderr))
	assertLine(t, stderr.String(), "for credentials run gcloud auth application-default login")
}
