// Package docs holds the documents, and tests of what they say.
package docs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs"
	"github.com/athensgcs/gcs/internal/fakegcs"
)

const mod, ver = "example.com/mod", "v1.0.0"

func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	require.NoError(t, err)
	return strings.ReplaceAll(string(text), "\r\n", "\n")
}

type stasher func(ctx context.Context, mod, ver string) (string, error)

func (s stasher) Stash(ctx context.Context, mod, ver string) (string, error) { return s(ctx, mod, ver) }

func save(ctx context.Context, s *gcs.Storage, size int) error {
	zip := io.LimitReader(strings.NewReader(strings.Repeat("z", size)), int64(size)) // cannot seek
	err := s.Save(ctx, mod, ver, []byte("mod"), zip, nil, []byte("info"))
	if gcs.Is(err, gcs.KindAlreadyExists) {
		return nil
	}
	return err
}

// TestCosts expects operations.md to show what each call costs, and the README what a new
// version does.
func TestCosts(t *testing.T) {
	guide, costs := read(t, "operations.md"), map[string]int{}
	one := func(ctx context.Context, s *gcs.Storage) error { return save(ctx, s, 100) }
	large := func(ctx context.Context, s *gcs.Storage) error { return save(ctx, s, 1<<20+1) }
	chunks := func(ctx context.Context, s *gcs.Storage) error { return save(ctx, s, 4<<20+1) }
	exists := func(ctx context.Context, s *gcs.Storage) error { _, err := s.Exists(ctx, mod, ver); return err }
	stash := func(ctx context.Context, s *gcs.Storage) error {
		_, err := s.SingleFlight(stasher(func(ctx context.Context, _, ver string) (string, error) {
			return ver, one(ctx, s)
		})).Stash(ctx, mod, ver)
		return err
	}
	repair := func(ctx context.Context, s *gcs.Storage) error { _, err := s.Repair(ctx, mod, ver); return err }
	info := func(ctx context.Context, s *gcs.Storage) error { _, err := s.Info(ctx, mod, ver); return err }
	list := func(ctx context.Context, s *gcs.Storage) error { _, err := s.List(ctx, mod); return err }
	catalog := func(ctx context.Context, s *gcs.Storage) error { _, _, err := s.Catalog(ctx, "", 1000); return err }
	remove := func(ctx context.Context, s *gcs.Storage) error { return s.Delete(ctx, mod, ver) }
	stale := map[string]string{"in-progress": "1970-01-01T00:00:00Z", "save-id": "a"}
	for _, test := range []struct {
		call     string
		left     string // the objects in the bucket, the .mod without a marker unless stale is set
		marker   map[string]string
		versions int
		do       func(ctx context.Context, s *gcs.Storage) error
	}{
		{"`Save` of a new version", "", nil, 1, one},
		{"`Save` of a new version, its zip over 1 MiB, in one chunk, and read once", "", nil, 1, large},
		{"`Save` of a new version, its zip in three chunks, and read once", "", nil, 1, chunks},
		{"`Save` of a complete version", "info mod zip", nil, 1, one},
		{"`Save` of an unfinished version", "info mod zip", stale, 1, one},
		{"`Save` over an abandoned version", "mod", stale, 1, one},
		{"`Save` over a lone `.mod`", "mod", nil, 1, one},
		{"`Save` over `.info` and `.zip` without a `.mod`", "info zip", nil, 1, one},
		{"`Exists` of a complete version", "info mod zip", nil, 1, exists},
		{"`Exists` of an unfinished version", "info mod zip", stale, 1, exists},
		{"`Info`, `GoMod`, `Zip`", "info mod zip", nil, 1, info},
		{"`List` of 1,000 versions", "info mod zip", nil, 1000, list},
		{"`Catalog` of 1,000 versions", "info mod zip", nil, 1000, catalog},
		{"`Delete` of a complete version", "info mod zip", nil, 1, remove},
		{"`Stash` of a new version, with its `Save`", "", nil, 1, stash},
		{"`Stash` of a complete version", "info mod zip", nil, 1, stash},
		{"`Stash` of an unfinished version", "info mod zip", stale, 1, stash},
		{"`Repair` of a complete version", "info mod zip", nil, 1, repair},
		{"`Repair` of an unfinished version", "info mod zip", stale, 1, repair},
		{"`Repair` of a lone `.mod`", "mod", nil, 1, repair},
		{"`Repair` of `.mod` and `.info`", "info mod", nil, 1, repair},
		{"`Check`", "", nil, 1, func(ctx context.Context, s *gcs.Storage) error { return s.Check(ctx) }},
	} {
		t.Run(test.call, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				bucket := fakegcs.New()
				defer bucket.Close()
				bucket.SetLatency(20 * time.Millisecond)
				for i := range test.versions {
					for _, ext := range strings.Fields(test.left) {
						metadata := map[string]string{"save-id": "a"}
						if ext == "mod" {
							metadata = test.marker
						}
						bucket.Put(fmt.Sprintf("%s/@v/v1.0.%d.%s", mod, i, ext), nil, metadata)
					}
				}
				assert.NoError(t, test.do(t.Context(), gcs.NewStorage(bucket.Machine("m").Bucket, gcs.WithChunkSize(2<<20))))
				synctest.Wait()
				log := bucket.Log()
				costs[test.call] = len(log)
				row := fmt.Sprintf("| %s | %d | %d |", test.call, len(log), fakegcs.SerialTrips(log))
				assert.True(t, strings.Contains(guide, row+"\n"), "there is no row %s", row)
			})
		})
	}
	assert.Contains(t, read(t, "../README.md"), fmt.Sprintf("costs %d requests, or %d with the single flight",
		costs["`Save` of a new version"], costs["`Stash` of a new version, with its `Save`"]))
}

// TestSlowLines expects operations.md to show for how long a chunk of a zip may be under
// way, and what a line has to carry.
func TestSlowLines(t *testing.T) {
	seconds := func(chunk int) (s int) {
		synctest.Test(t, func(t *testing.T) {
			bucket := fakegcs.New()
			defer bucket.Close()
			var hung atomic.Bool
			bucket.OnRequest(func(_ context.Context, r *fakegcs.Request) fakegcs.Fault {
				if r.Op == "chunk" && !hung.Swap(true) {
					return fakegcs.Hung
				}
				return fakegcs.NoFault
			})
			assert.NoError(t, save(t.Context(), gcs.NewStorage(bucket.Machine("m").Bucket, gcs.WithChunkSize(chunk)), 16<<20+1))
			var starts []time.Time
			for _, r := range bucket.Log() {
				if r.Op == "chunk" || r.Op == "query" {
					starts = append(starts, r.Start)
				}
			}
			s = int(starts[1].Sub(starts[0]).Seconds())
		})
		return s
	}
	large, small := seconds(16<<20), seconds(256<<10)
	least := func(kib, seconds int) int { return (kib + seconds - 1) / seconds }
	assert.Contains(t, strings.ReplaceAll(read(t, "operations.md"), "\n", " "), fmt.Sprintf(
		"A chunk of 16 MiB has %d s, one of 256 KiB %d s. So a line below %d KiB per second needs smaller chunks, and below %d KiB none",
		large, small, least(16<<10, large), least(256, small)))
}

// TestMemory expects the documents to show what TestBudgetMemory holds a save below.
func TestMemory(t *testing.T) {
	budget := read(t, "../budget_test.go")
	assert.Contains(t, budget, `{"just under 1 MiB", mib - 1, nil, 2 * mib}`)
	assert.Contains(t, budget, "nil, defaultChunkSize + 2*mib}")
	for _, name := range []string{"operations.md", "athens.md"} {
		assert.Contains(t, strings.ReplaceAll(read(t, name), "\n", " "), "allocates under 2 MiB, or under 18 MiB for a zip over 1 MiB", name)
	}
}

// TestSignatures expects the signatures of the README to be those of the source.
func TestSignatures(t *testing.T) {
	one := func(text string) string {
		return strings.ReplaceAll(strings.ReplaceAll(text, "\n\t", " "), "(err error)", "error")
	}
	source := one(read(t, "../saver.go")) + one(read(t, "../checker.go"))
	signatures := regexp.MustCompile(`(?m)^func .*`).FindAllString(one(read(t, "../README.md")), -1)
	require.Len(t, signatures, 2)
	for _, signature := range signatures {
		assert.True(t, strings.Contains(source, signature+" {"), signature)
	}
}

// TestMessages expects operations.md to have each line of the log, and each metric, of
// the library, and no other.
func TestMessages(t *testing.T) {
	files, err := filepath.Glob("../*.go")
	require.NoError(t, err)
	var source string
	for _, name := range files {
		if !strings.HasSuffix(name, "_test.go") {
			source += read(t, name)
		}
	}
	guide := read(t, "operations.md")
	both := func(inSource, inGuide string) {
		t.Helper()
		find := func(text, re string) (found []string) {
			for _, m := range regexp.MustCompile(re).FindAllStringSubmatch(text, -1) {
				found = append(found, m[1])
			}
			slices.Sort(found)
			return slices.Compact(found)
		}
		assert.Equal(t, find(source, inSource), find(guide, inGuide))
	}
	source = strings.NewReplacer( // of the messages that are put together
		`"waiting for another "+what`, `"waiting for another fetch", InfoContext(ctx, "waiting for another save"`,
		`"took over from a "+what+"`, `"took over from a fetch that stopped renewing its marker", WarnContext(ctx, "took over from a save`,
	).Replace(source)
	both(`(?:Info|Warn|Debug)Context\([\w.]+, "([^"]+)"`, "(?m)^\\| (?:info|warn|debug) \\| `([^`]+)`")
	both(`"(gcs\.[a-z.]+)"`, "(?m)^\\| `(gcs\\.[\\w.]+)` \\|")
	both(`"(storage\.objects\.\w+)"`, "(?m)^\\| `(storage\\.objects\\.\\w+)` \\|")
}

// TestNames expects CONTRIBUTING.md to name files, functions and faults that are there.
func TestNames(t *testing.T) {
	words := map[string]bool{}
	for _, pattern := range []string{"../*.go", "../internal/*/*.go", "../gcstest/*.go", "../cmd/*/*.go"} {
		files, err := filepath.Glob(pattern)
		require.NoError(t, err)
		for _, name := range files {
			words[filepath.Base(name)] = true
			for _, word := range regexp.MustCompile(`\w+`).FindAllString(read(t, name), -1) {
				words[word] = true
			}
		}
	}
	_, guide, _ := strings.Cut(read(t, "../CONTRIBUTING.md"), "| file | holds |")
	for _, m := range regexp.MustCompile("`(?:[cfs]\\.|fakegcs\\.)?(\\w+(?:\\.go)?)[^`\\s]*(?: [^`]*)?`").FindAllStringSubmatch(guide, -1) {
		assert.True(t, words[m[1]], "there is no %s", m[0])
	}
}

// TestLinks follows the links of the documents to files and to headings.
func TestLinks(t *testing.T) {
	anchors := func(text string) (found []string) {
		for _, m := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(text, -1) {
			found = append(found, strings.ReplaceAll(regexp.MustCompile(`[^\w -]`).ReplaceAllString(strings.ToLower(m[1]), ""), " ", "-"))
		}
		return found
	}
	names, err := filepath.Glob("../*.md")
	require.NoError(t, err)
	here, err := filepath.Glob("*.md")
	require.NoError(t, err)
	for _, name := range append(names, here...) {
		for _, m := range regexp.MustCompile(`\]\(([^)#:]*)(?:#([^)]*))?\)`).FindAllStringSubmatch(read(t, name), -1) {
			target := name
			if m[1] != "" {
				target = filepath.Join(filepath.Dir(name), m[1])
			}
			if _, err := os.Stat(target); errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s: nothing is at %s", name, target)
			} else if m[2] != "" {
				assert.Contains(t, anchors(read(t, target)), m[2], "%s: %s", name, m[0])
			}
		}
	}
}
