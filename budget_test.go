package gcs

import (
	"bytes"
	"crypto/md5"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"cloud.google.com/go/storage"
	"github.com/stretchr/testify/require"
	"google.golang.org/api/option"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// What a call may cost at most.
func TestBudgetRequests(t *testing.T) {
	c := contentOf("a", 100)
	for _, test := range []struct {
		name            string
		stored          int
		requests, trips int
		do              func(t *testing.T, s *Storage)
	}{
		{"Save new", 0, 5, 3, func(t *testing.T, s *Storage) { require.NoError(t, c.save(t.Context(), s)) }},
		{"Save complete", 1, 3, 2, func(t *testing.T, s *Storage) { requireKind(t, c.save(t.Context(), s), KindAlreadyExists) }},
		{"Exists", 1, 1, 1, func(t *testing.T, s *Storage) {
			ok, err := s.Exists(t.Context(), testModule, testVersion)
			require.NoError(t, err)
			require.True(t, ok)
		}},
		{"Info", 1, 1, 1, func(t *testing.T, s *Storage) {
			_, err := s.Info(t.Context(), testModule, testVersion)
			require.NoError(t, err)
		}},
		{"GoMod", 1, 1, 1, func(t *testing.T, s *Storage) {
			_, err := s.GoMod(t.Context(), testModule, testVersion)
			require.NoError(t, err)
		}},
		{"Zip", 1, 1, 1, func(t *testing.T, s *Storage) {
			_, err := readZip(t.Context(), s, testVersion)
			require.NoError(t, err)
		}},
		{"List of 333", 333, 1, 1, listOf(333)},
		{"List of 1,000", 1000, 4, 4, listOf(1000)},
		{"Catalog of 1,000", 1000, 4, 4, func(t *testing.T, s *Storage) {
			page, next, err := s.Catalog(t.Context(), "", 0)
			require.NoError(t, err)
			require.Len(t, page, 1000)
			require.Empty(t, next)
		}},
		{"Delete", 1, 4, 3, func(t *testing.T, s *Storage) { require.NoError(t, s.Delete(t.Context(), testModule, testVersion)) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fakeGCS) { // and no object twice within a second
				storeVersions(f, test.stored)
				s := f.storage("a")
				cost := measure(f, func() { test.do(t, s) })
				require.LessOrEqual(t, int(cost.requests), test.requests, "requests: %v", f.Log())
				require.LessOrEqual(t, int(cost.trips), test.trips, "one after another: %v", f.Log())
			})
		})
	}
}

func listOf(n int) func(t *testing.T, s *Storage) {
	return func(t *testing.T, s *Storage) {
		list, err := s.List(t.Context(), testModule)
		require.NoError(t, err)
		require.Len(t, list, n)
	}
}

// A listing receives a quarter of what one with the client's defaults does.
func TestBudgetListBytes(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fakeGCS) {
		const n = 1000
		storeVersions(f, n)
		bucket := f.Machine("a").Bucket
		ours := measure(f, func() { listOf(n)(t, newStorage(bucket)) })
		defaults := measure(f, func() {
			list, err := baseline{bucket}.List(t.Context(), testPrefix+testModule)
			require.NoError(t, err)
			require.Len(t, list, n)
		})
		require.Less(t, ours.received, defaults.received/4)
	})
}

// A save that waits for another asks less than once a second, and is not late.
func TestBudgetWaiting(t *testing.T) {
	for _, takes := range []time.Duration{20 * time.Second, 3 * time.Minute, time.Hour} {
		t.Run(takes.String(), func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fakeGCS) {
				c := contentOf("a", 100)
				done := make(chan time.Time, 1)
				go func() {
					zip := io.MultiReader(sleepReader(takes), bytes.NewReader(c.zip))
					if err := c.saveFrom(t.Context(), f.storage("a"), zip); err != nil {
						t.Error(err)
					}
					done <- time.Now()
				}()
				synctest.Wait()
				time.Sleep(time.Second)
				start := time.Now()
				requireKind(t, c.save(t.Context(), f.storage("b")), KindAlreadyExists)
				late, waited := time.Since(<-done), time.Since(start)
				require.Less(t, late, min(waited/10, 2*time.Second)+40*time.Millisecond) // and a round trip to see it
				requests := 0
				for _, r := range f.Log() {
					if r.Machine == "b" {
						requests++
					}
				}
				require.Less(t, requests, int(waited.Seconds()))
			})
		})
	}
}

// What a save allocates, the HTTP client's share included. An upload's buffer
// alone is 16 MiB by the client's defaults, for each of the three objects.
func TestBudgetMemory(t *testing.T) {
	if raceDetector {
		t.Skip("the race detector allocates too")
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
			s := newStorage(client.Bucket(fakegcs.Bucket), test.opts...)
			mod, info := []byte("module a"), []byte("{}")
			h := md5.New()
			io.Copy(h, newPattern(test.size))
			save := func() {
				require.NoError(t, s.Save(t.Context(), testModule, testVersion, mod, newPattern(test.size), h.Sum(nil), info))
			}
			save() // what is made once
			const runs = 3
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			for range runs {
				save()
			}
			runtime.ReadMemStats(&after)
			require.Less(t, (after.TotalAlloc-before.TotalAlloc)/runs, test.budget)
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
	switch {
	case r.Method == http.MethodGet: // a listing
		body = "{}"
	case r.Method == http.MethodPost && strings.Contains(r.URL.RawQuery, "uploadType=resumable"):
		header.Set("Location", fmt.Sprintf("https://%s/upload?upload_id=1", r.URL.Host))
	case strings.HasSuffix(r.Header.Get("Content-Range"), "/*"):
		header.Set("X-Http-Status-Code-Override", "308")
	}
	return &http.Response{
		StatusCode:    http.StatusOK,
		Header:        header,
		ContentLength: int64(len(body)),
		Body:          io.NopCloser(strings.NewReader(body)),
		Request:       r,
	}, nil
}
