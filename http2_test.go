package gcs

import (
	"bytes"
	"context"
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/api/option"
)

// GCS speaks HTTP/2. If the server resets the stream of a request that it has
// applied, the request is made again, and the outcome is the same. So it is for each
// request of each call.
func TestHTTP2Reset(t *testing.T) {
	large := "Save of a large zip"
	callsOf := func(s *Storage) map[string]func(context.Context) error {
		calls := maps.Clone(everyCall(s))
		delete(calls, "Stash") // it saves nothing, and claims as Save does
		c := contentOf("a", 600<<10)
		calls[large] = func(ctx context.Context) error { return c.saveFrom(ctx, s, plain(bytes.NewReader(c.zip))) }
		return calls
	}
	for name := range callsOf(nil) {
		t.Run(name, func(t *testing.T) {
			for at, hit := int64(1), true; hit; at++ {
				f := newFakeGCS(t)
				if !strings.HasPrefix(name, "Save") {
					storeVersion(f, testModule, testVersion)
				}
				var requests atomic.Int64
				s := overHTTP2(t, f, func() bool { return requests.Add(1) == at }, WithChunkSize(256<<10))
				require.NoError(t, callsOf(s)[name](t.Context()), "request %d", at)
				hit = requests.Load() >= at
				if name == "Save" {
					requireStored(t, f, contentOf("a", 100))
				}
			}
		})
	}
}

// overHTTP2 returns a Storage that reaches the bucket over HTTP/2. The server resets
// the stream of a request, once it has applied it, if resets says so.
func overHTTP2(t *testing.T, f *fakeGCS, resets func() bool, opts ...Option) *Storage {
	bucket := f.Handler()
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		require.Equal(t, 2, r.ProtoMajor)
		answer := httptest.NewRecorder()
		bucket.ServeHTTP(answer, r)
		if resets() {
			panic(http.ErrAbortHandler)
		}
		maps.Copy(w.Header(), answer.Header())
		if session := answer.Header().Get("Location"); session != "" {
			w.Header().Set("Location", strings.Replace(session, "http:", "https:", 1))
		}
		w.WriteHeader(answer.Code)
		w.Write(answer.Body.Bytes())
	}))
	server.EnableHTTP2 = true
	server.Config.ErrorLog = log.New(io.Discard, "", 0) // of connections that the test's end cuts
	server.StartTLS()
	t.Cleanup(server.Close)
	m := f.Register("a")
	m.Connect(m.Over(server.Client().Transport), option.WithEndpoint(server.URL+"/storage/v1/"))
	s := newStorage(m.Bucket, opts...)
	s.bucket.rand = func(time.Duration) time.Duration { return 0 } // no pause before a request is made again
	return s
}
