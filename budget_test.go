package gcs

import (
	"bytes"
	"crypto/md5"
	"fmt"
	"io"
	"math"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/stretchr/testify/require"
)

// What a call may cost at most.
func TestBudgetRequests(t *testing.T) {
	for _, test := range []struct {
		call                    string
		stored, requests, trips int
	}{
		{"Save", 1, 2, 2}, // of a new version: TestSaveNew
		{"Exists", 1, 1, 1},
		{"Info", 1, 1, 1},
		{"GoMod", 1, 1, 1},
		{"Zip", 1, 1, 1},
		{"List", 333, 1, 1},
		{"List", 1000, 4, 4},
		{"Catalog", 1000, 4, 4},
		{"Delete", 1, 4, 3},
	} {
		run(t, fmt.Sprintf("%s beside %d", test.call, test.stored), inBubble, func(t *testing.T, f *fakeGCS) {
			storeVersions(f, test.stored)
			call := everyCall(f.storage("a"))[test.call]
			var err error
			requireCost(t, f, test.requests, test.trips, func() { err = call(t.Context()) })
			if test.call == "Save" {
				requireKind(t, err, KindAlreadyExists)
			} else {
				require.NoError(t, err)
			}
		})
	}
}

// requireCost checks what a call costs at most.
func requireCost(t *testing.T, f *fakeGCS, requests, trips int, call func()) {
	t.Helper()
	cost := measure(f, call)
	require.LessOrEqual(t, int(cost.requests), requests, "requests: %v", f.Log())
	require.LessOrEqual(t, int(cost.trips), trips, "one after another: %v", f.Log())
}

// What a save over leftovers may cost, also of a zip that can be sent only once.
func TestBudgetLeftovers(t *testing.T) {
	for bits := 1; bits < 7; bits++ { // not all three
		exts := subsetOf(bits)
		forNamed(t, inBubble, map[string]int{fmt.Sprint(exts): 100, fmt.Sprint(exts, " once"): 2 << 20}, func(t *testing.T, f *fakeGCS, size int) {
			leave(f, nil, exts...)
			a := contentOf("a", size)
			requests, trips := 10, 6
			if slices.Contains(exts, extMod) {
				requests = 7
				if size > maxBuffered && !slices.Contains(exts, extZip) { // it looks
					requests, trips = 8, 7
				}
			}
			requireCost(t, f, requests, trips, func() {
				require.NoError(t, a.saveFrom(t.Context(), f.storage("a"), plain(bytes.NewReader(a.zip))))
			})
			requireStored(t, f, a)
		})
	}
}

// A zip whose head is at fault costs nothing.
func TestBudgetNothing(t *testing.T) {
	forNamed(t, inBubble, map[string]io.Reader{
		"fails":          iotest.ErrReader(io.ErrUnexpectedEOF),
		"blocks":         trickle(time.Hour),
		"does not match": strings.NewReader("another"),
		"large, fails":   io.MultiReader(newPattern(maxBuffered), iotest.ErrReader(io.ErrUnexpectedEOF)),
	}, func(t *testing.T, f *fakeGCS, zip io.Reader) {
		require.Error(t, contentOf("a", 100).saveFrom(within(t, time.Minute), f.storage("a"), zip))
		require.Empty(t, f.Log())
	})
}

// What List, Catalog and Scan of 1,000 versions cost, whatever their state.
func TestBudgetListing(t *testing.T) {
	for state, want := range map[string]map[string]int{
		"whole":         {"List": 4, "Catalog": 4, "Scan": 4},
		"copied":        {"List": 8, "Catalog": 8, "Scan": 8},
		"partial":       {"List": 3, "Catalog": 3, "Scan": 6},
		"abandoned":     {"List": 4, "Catalog": 4, "Scan": 8},
		"tenth partial": {"List": 3, "Catalog": 3, "Scan": 6},
	} {
		run(t, state, withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
			storeIn(f, state, 1000)
			for call, requests := range want {
				f.ResetLog()
				require.NoError(t, everyCall(s)[call](t.Context()))
				require.Len(t, f.Log(), requests, call)
			}
		})
	}
}

// A version that two pages share makes no range larger than one request can list: here
// two of three objects, a page, and a version at its end.
func TestBudgetSplitVersion(t *testing.T) {
	withStorage(t, func(t *testing.T, f *fakeGCS, s *Storage) {
		shapes := map[int][]string{0: allExts[:1], 334*2 - 2: {extMod, extZip}}
		for i := range 334 * 2 {
			exts := shapes[i]
			if exts == nil {
				exts = allExts
			}
			f.put(ModuleVersion{testModule, fmt.Sprintf("v1.%03d.0", i)}, nil, map[string]string{keyGeneration: "1"}, exts...)
		}
		require.Len(t, f.Names(), 2*maxPage+3)
		require.NoError(t, everyCall(s)["Scan"](t.Context()))
		require.Len(t, f.Log(), 6)
	})
}

// A page of a catalog is one request, and one for each unfinished version.
func TestBudgetCatalogPage(t *testing.T) {
	withStorage(t, func(t *testing.T, f *fakeGCS, s *Storage) {
		storeIn(f, "whole", 9)
		require.Len(t, pagesOf(t, s, 3, func() {}), 3)
		require.Len(t, f.Log(), 3)
		unfinishedVersion(f, ModuleVersion{testModule, "v2.0.0"})
		unfinishedVersion(f, ModuleVersion{testModule, "v3.0.0"})
		f.ResetLog()
		require.Len(t, catalogOf(t, s, 0), 11)
		require.Equal(t, []string{"list", "patch", "patch"}, logged(f))
	})
}

// A listing receives a quarter of what one with the client's defaults does.
func TestBudgetListBytes(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fakeGCS) {
		const n = 1000
		storeVersions(f, n)
		received := func(b backend) float64 {
			return measure(f, func() {
				list, err := b.List(t.Context(), testModule)
				require.NoError(t, err)
				require.Len(t, list, n)
			}).received
		}
		bucket := f.Machine("a").Bucket
		require.Less(t, received(NewStorage(bucket)), received(baseline{bucket})/4)
	})
}

// What a save allocates, the HTTP client's share included. An upload's buffer
// alone is 16 MiB by the client's defaults, for each of the three objects.
func TestBudgetMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("the race detector, which runs with -short, allocates too")
	}
	const kib, mib = 1 << 10, 1 << 20
	for _, test := range []struct {
		name   string
		size   int64
		opts   []Option
		budget uint64
	}{
		{"small", 100 * kib, nil, 1.5 * mib},
		{"just under 1 MiB", mib - 1, nil, 2 * mib},
		{"large", 50_000_000, nil, defaultChunkSize + 2*mib},
		{"large in small chunks", 50_000_000, []Option{WithChunkSize(2 * mib)}, 2*mib + 2*mib},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := newFakeGCS(t).Register("m")
			m.Connect(drain{})
			s := NewStorage(m.Bucket, test.opts...)
			h := md5.New()
			io.Copy(h, newPattern(test.size))
			save := func() {
				require.NoError(t, s.Save(t.Context(), testModule, testVersion, []byte("module a"), newPattern(test.size), h.Sum(nil), []byte("{}")))
			}
			save()                          // what is made once
			least := uint64(math.MaxUint64) // a collection that empties the pools only adds
			for range 3 {
				var before, after runtime.MemStats
				runtime.ReadMemStats(&before)
				save()
				runtime.ReadMemStats(&after)
				least = min(least, after.TotalAlloc-before.TotalAlloc)
			}
			t.Logf("%d of %d bytes", least, test.budget)
			require.Less(t, least, test.budget)
		})
	}
}

// drain is the server of a bucket that is always empty. It has no socket, and
// allocates next to nothing.
type drain struct{}

func (drain) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Body != nil {
		io.Copy(io.Discard, r.Body)
		r.Body.Close()
	}
	header := http.Header{"Content-Type": {"application/json; charset=UTF-8"}}
	body := `{"generation":"1","metageneration":"1"}`
	code := http.StatusOK
	switch {
	case r.Method == http.MethodGet:
		code = http.StatusNotFound
	case r.Method == http.MethodPost && strings.Contains(r.URL.RawQuery, "uploadType=resumable"):
		header.Set("Location", fmt.Sprintf("https://%s/upload?upload_id=1", r.URL.Host))
	case strings.HasSuffix(r.Header.Get("Content-Range"), "/*"):
		header.Set("X-Http-Status-Code-Override", "308")
	}
	return &http.Response{StatusCode: code, Header: header, Body: io.NopCloser(strings.NewReader(body)), Request: r}, nil
}
