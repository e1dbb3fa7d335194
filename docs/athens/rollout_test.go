package athens

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"cloud.google.com/go/storage"
	"github.com/stretchr/testify/require"
	"google.golang.org/api/googleapi"

	"github.com/athensgcs/gcs"
	"github.com/athensgcs/gcs/internal/fakegcs"
)

const (
	mod    = "example.com/mod"
	ver    = "v1.0.0"
	object = mod + "/@v/" + ver + "."
)

// saver is one of the two backends.
type saver func(ctx context.Context, m *fakegcs.Machine) error

// library saves with this library.
func library(ctx context.Context, m *fakegcs.Machine) error {
	return saveWith(ctx, gcs.NewStorage(m.Bucket), m.Name)
}

// saveWith saves files that say who saved them.
func saveWith(ctx context.Context, s *gcs.Storage, who string) error {
	return s.Save(ctx, mod, ver, []byte(who), strings.NewReader(who), nil, []byte(who))
}

// upstream sends the requests of Athens' own backend since v0.16.1.
func upstream(ctx context.Context, m *fakegcs.Machine) error {
	for _, ext := range []string{"mod", "zip", "info"} {
		o := m.Bucket.Object(object + ext)
		if ext == "zip" {
			if _, err := o.Attrs(ctx); err == nil {
				continue
			} else if !errors.Is(err, storage.ErrObjectNotExist) {
				return err
			}
		}
		w := o.If(storage.Conditions{DoesNotExist: true}).NewWriter(ctx)
		w.ChunkSize = 256 << 10 // a smaller buffer; the file is smaller still
		if _, err := io.WriteString(w, m.Name); err != nil {
			return err
		}
		var refused *googleapi.Error
		if err := w.Close(); err != nil && !(errors.As(err, &refused) && refused.Code == http.StatusPreconditionFailed) {
			return err
		}
	}
	return nil
}

// files returns whose save each of the three files is of, and "" if it is not there.
func filesOf(bucket *fakegcs.Server) (files [3]string) {
	for i, ext := range []string{"mod", "zip", "info"} {
		if o := bucket.Get(object + ext); o != nil {
			files[i] = string(o.Data)
		}
	}
	return files
}

func mixed(files [3]string) bool { return files[0] != files[1] || files[0] != files[2] }

// gate holds the requests of the two savers until they are let through.
type gate struct {
	mu      sync.Mutex
	waiting []held
}

type held struct {
	fakegcs.Request
	pass chan struct{}
}

func (g *gate) hold(_ context.Context, r *fakegcs.Request) fakegcs.Fault {
	// Upstream changes no object that is there, so it is the same to the library when
	// it reads one that it was refused.
	if r.Machine == "reader" || r.Machine == "library" && r.Op == "attrs" {
		return fakegcs.NoFault
	}
	h := held{*r, make(chan struct{})}
	g.mu.Lock()
	g.waiting = append(g.waiting, h)
	g.mu.Unlock()
	<-h.pass
	return fakegcs.NoFault
}

// pass lets one of the requests through, and returns how many there were.
func (g *gate) pass(choose func(n int) int) (n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if n = len(g.waiting); n > 0 {
		slices.SortFunc(g.waiting, func(a, b held) int {
			return cmp.Or(cmp.Compare(a.Machine, b.Machine), cmp.Compare(a.Op, b.Op), cmp.Compare(a.Object, b.Object))
		})
		i := choose(n)
		close(g.waiting[i].pass)
		g.waiting = slices.Delete(g.waiting, i, i+1)
	}
	return n
}

// view is what clients of one backend can see from a moment on.
type view struct {
	since          bool
	files          [3]string
	mixed, changed bool
}

func (v *view) look(files [3]string) {
	if !v.since {
		v.since, v.files = true, files
	}
	v.mixed = v.mixed || mixed(files)
	v.changed = v.changed || files != v.files
}

func (v view) String() string {
	switch {
	case !v.since:
		return "never"
	case v.mixed:
		return "mixed, then changed"
	case v.changed:
		return "changed"
	default:
		return "one save's files"
	}
}

type order struct{ firstMod, library, exists, libraryClient, upstreamClient, remains string }

func runOrder(t *testing.T, choose func(n int) int) (o order) {
	synctest.Test(t, func(t *testing.T) {
		bucket := fakegcs.New()
		defer time.Sleep(time.Minute) // calls that go on give up
		defer bucket.Close()
		g := &gate{}
		bucket.OnRequest(g.hold)
		reader := gcs.NewStorage(bucket.Machine("reader").Bucket)
		errs := map[string]*error{}
		var wg sync.WaitGroup
		var mu sync.Mutex
		for name, save := range map[string]saver{"library": library, "upstream": upstream} {
			m := bucket.Machine(name)
			wg.Go(func() {
				err := save(t.Context(), m)
				mu.Lock()
				defer mu.Unlock()
				errs[name] = &err
			})
		}
		var exists, libraryClient, upstreamClient view
		var err error
		for {
			synctest.Wait()
			files := filesOf(bucket)
			if o.firstMod == "" {
				o.firstMod = files[0]
			}
			mu.Lock()
			lib, up := errs["library"], errs["upstream"]
			mu.Unlock()
			if !exists.since && !slices.Contains(files[:], "") {
				exists.since, err = reader.Exists(t.Context(), mod, ver)
				require.NoError(t, err)
				exists.files = files
			}
			if exists.since {
				exists.look(files)
			}
			if lib != nil {
				libraryClient.look(files)
			}
			if up != nil {
				upstreamClient.look(files)
			}
			if lib != nil && up != nil {
				break
			}
			if g.pass(choose) == 0 {
				time.Sleep(10 * time.Millisecond)
			}
		}
		wg.Wait()
		require.NoError(t, *errs["upstream"])
		o.library = "stored"
		if err := *errs["library"]; err != nil {
			require.True(t, gcs.Is(err, gcs.KindAlreadyExists), "%v", err)
			o.library = "already exists"
		}
		files := filesOf(bucket)
		require.False(t, mixed(files), "%v", files)
		o.exists, o.libraryClient, o.upstreamClient, o.remains = exists.String(), libraryClient.String(), upstreamClient.String(), files[0]
	})
	return o
}

// TestOrders goes through every order in which the requests of one save of each
// backend can arrive. What it finds is a table of the guide.
func TestOrders(t *testing.T) {
	found := map[order]int{}
	total := 0
	var path []int // the choices of one order
	for {
		var widths []int
		found[runOrder(t, func(width int) int {
			if len(widths) == len(path) {
				path = append(path, 0)
			}
			widths = append(widths, width)
			return path[len(widths)-1]
		})]++
		total++
		// The next order differs in the last choice that had another alternative.
		for len(path) > 0 && path[len(path)-1]+1 == widths[len(path)-1] {
			path = path[:len(path)-1]
		}
		if len(path) == 0 {
			break
		}
		path[len(path)-1]++
	}
	rows := []string{}
	for o, n := range found {
		row := fmt.Sprintf("| %s | %s | %s | %s | %s | %s |\n", o.firstMod, o.library, o.upstreamClient, o.libraryClient, o.exists, o.remains)
		t.Logf("%d of %d orders: %s", n, total, row)
		rows = append(rows, row)
	}
	slices.Sort(rows)
	requireInGuide(t, "orders", `| first to create the `+"`.mod`"+` | library's `+"`Save`"+` | after upstream's `+"`Save`"+` | after the library's `+"`Save`"+` | once `+"`Exists`"+` is true | at the end |
| --- | --- | --- | --- | --- | --- |
`+strings.Join(rows, ""))
}

// leave returns a bucket in which a save died after n requests, and what it left.
func leave(t *testing.T, name string, save saver, n int, last bool) (bucket *fakegcs.Server, left string) {
	bucket = fakegcs.New()
	g := &gate{}
	bucket.OnRequest(g.hold)
	m := bucket.Machine(name)
	ctx, cancel := context.WithCancel(t.Context())
	go save(ctx, m)
	for range n {
		synctest.Wait()
		g.pass(func(width int) int {
			if last {
				return width - 1
			}
			return 0
		})
	}
	synctest.Wait()
	m.Crash()
	cancel()
	bucket.OnRequest(nil)
	for g.pass(func(int) int { return 0 }) > 0 {
		synctest.Wait()
	}
	exts := []string{}
	for _, ext := range []string{"mod", "zip", "info"} {
		if o := bucket.Get(object + ext); o != nil {
			name := "`." + ext + "`"
			if ext == "mod" && len(o.Metadata) > 0 {
				name += " with a marker"
			}
			exts = append(exts, name)
		}
	}
	return bucket, strings.Join(exts, ", ")
}

// then saves with a backend and returns what a client of it sees, and after how long.
func then(t *testing.T, bucket *fakegcs.Server, name string, save saver) string {
	start := time.Now()
	err := save(t.Context(), bucket.Machine(name))
	if err != nil {
		require.True(t, gcs.Is(err, gcs.KindAlreadyExists), "%v", err)
	}
	files := filesOf(bucket)
	require.NotContains(t, files[:], "")
	seen := "one save's files"
	if mixed(files) {
		seen = "mixed"
	}
	switch waited := time.Since(start); {
	case waited >= time.Minute:
		return fmt.Sprintf("%s, after the stale threshold", seen)
	case waited >= time.Second:
		return fmt.Sprintf("%s, after %v", seen, waited.Round(time.Second))
	}
	return seen + ", at once"
}

// TestDeaths lets each backend die after each of its requests, and the other save
// the version next. What it finds is a table of the guide.
func TestDeaths(t *testing.T) {
	rows := []string{}
	for _, dead := range []struct {
		name string
		save saver
	}{{"library", library}, {"upstream", upstream}} {
		seen := map[string]bool{}
		for n := range 12 {
			for _, last := range []bool{false, true} {
				synctest.Test(t, func(t *testing.T) {
					again := func() (*fakegcs.Server, string) { return leave(t, dead.name, dead.save, n, last) }
					bucket, left := again()
					defer time.Sleep(time.Minute)
					defer bucket.Close()
					if left == "" || seen[left] {
						return
					}
					seen[left] = true
					row := fmt.Sprintf("| %s | %s | %s |", dead.name, left, then(t, bucket, "library 2", library))
					bucket, _ = again()
					defer bucket.Close()
					row += " " + then(t, bucket, "upstream 2", upstream) + " |"
					row += " " + then(t, bucket, "library 2", library) + " |\n"
					rows = append(rows, row)
				})
			}
		}
	}
	requireInGuide(t, "deaths", `| died | left | the library saves next | upstream saves next | and the library after it |
| --- | --- | --- | --- | --- |
`+strings.Join(rows, ""))
}

var update = flag.Bool("update", false, "write the tables of the guide")

// requireInGuide compares a table of the guide.
func requireInGuide(t *testing.T, name, table string) {
	t.Helper()
	guide := text(t, "../athens.md")
	before, rest, ok := strings.Cut(guide, "<!-- "+name+" -->\n")
	require.True(t, ok, "the guide has no table of %s", name)
	have, after, ok := strings.Cut(rest, "<!-- end -->")
	require.True(t, ok)
	if *update {
		require.NoError(t, os.WriteFile("../athens.md", []byte(before+"<!-- "+name+" -->\n"+table+"<!-- end -->"+after), 0o644))
		return
	}
	require.Equal(t, table, have, "go test ./docs/athens -update writes it")
}
