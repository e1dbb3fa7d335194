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

	"cloud.google.com/go/storage"
	"github.com/stretchr/testify/require"
	"google.golang.org/api/option"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// What a call may cost at most.
func TestBudgetRequests(t *testing.T) {
	for _, test := range []struct {
		call                    string
		stored, requests, trips int
	}{
		{"Save", 0, 4, 3},
		{"Save", 1, 2, 2},
		{"Exists", 1, 1, 1},
		{"Info", 1, 1, 1},
		{"GoMod", 1, 1, 1},
		{"Zip", 1, 1, 1},
		{"List", 333, 1, 1},
		{"List", 1000, 4, 4},
		{"Catalog", 1000, 4, 4},
		{"Delete", 1, 4, 3},
	} {
		t.Run(fmt.Sprintf("%s beside %d", test.call, test.stored), func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fakeGCS) { // and no object twice within a second
				storeVersions(f, test.stored)
				call := everyCall(f.storage("a"))[test.call]
				var err error
				cost := measure(f, func() { err = call(t.Context()) })
				if test.call == "Save" && test.stored > 0 {
					requireKind(t, err, KindAlreadyExists)
				} else {
					require.NoError(t, err)
				}
				require.LessOrEqual(t, int(cost.requests), test.requests, "requests: %v", f.Log())
				require.LessOrEqual(t, int(cost.trips), test.trips, "one after another: %v", f.Log())
			})
		})
	}
}

// What a save over leftovers may cost, also of a zip that can be sent only once.
func TestBudgetLeftovers(t *testing.T) {
	for bits := 1; bits < 7; bits++ { // not all three
		exts := subsetOf(bits)
		forNamed(t, inBubble, map[string]int{fmt.Sprint(exts): 100, fmt.Sprint(exts, " once"): 2 << 20}, func(t *testing.T, f *fakeGCS, size int) {
			leave(f, nil, exts...)
			a := contentOf("a", size)
			cost := measure(f, func() {
				require.NoError(t, a.saveFrom(t.Context(), f.storage("a"), plain(bytes.NewReader(a.zip))))
			})
			requireStored(t, f, a)
			requests, trips := 10, 6
			if slices.Contains(exts, extMod) {
				requests = 7
				if size > maxBuffered && !slices.Contains(exts, extZip) { // it looks
					requests, trips = 8, 7
				}
			}
			require.LessOrEqual(t, int(cost.requests), requests, "requests: %v", f.Log())
			require.LessOrEqual(t, int(cost.trips), trips, "one after another: %v", f.Log())
		})
	}
}

// A zip whose head is at fault costs nothing.
func TestBudgetNothing(t *testing.T) {
	forNamed(t, inBubble, map[string]io.Reader{
		"fails":          iotest.ErrReader(io.ErrUnexpectedEOF),
		"blocks":         readFunc(func([]byte) (int, error) { time.Sleep(time.Hour); return 1, nil }),
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
		t.Run(state, func(t *testing.T) {
			withStorage(t, func(t *testing.T, f *fakeGCS, s *Storage) {
				storeIn(f, state, 1000)
				for call, requests := range want {
					f.ResetLog()
					require.NoError(t, everyCall(s)[call](t.Context()))
					require.Len(t, f.Log(), requests, call)
				}
			})
		})
	}
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
		list := func(b backend, module string) traffic {
			return measure(f, func() {
				list, err := b.List(t.Context(), module)
				require.NoError(t, err)
				require.Len(t, list, n)
			})
		}
		bucket := f.Machine("a").Bucket
		ours, defaults := list(NewStorage(bucket), testModule), list(baseline{bucket}, testModule)
		require.Less(t, ours.received, defaults.received/4)
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
			client, err := storage.NewClient(t.Context(), option.WithHTTPClient(&http.Client{Transport: drain{}}), option.WithoutAuthentication())
			require.NoError(t, err)
			defer client.Close()
			s := NewStorage(client.Bucket(fakegcs.Bucket), test.opts...)
			mod, info := []byte("module a"), []byte("{}")
			h := md5.New()
			io.Copy(h, newPattern(test.size))
			save := func() {
				require.NoError(t, s.Save(t.Context(), testModule, testVersion, mod, newPattern(test.size), h.Sum(nil), info))
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
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			return nil, err
		}
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
	return &http.Response{
		StatusCode:    code,
		Header:        header,
		ContentLength: int64(len(body)),
		Body:          io.NopCloser(strings.NewReader(body)),
		Request:       r,
	}, nil
}
