package gcs

import (
	"io"
	"log"
	"net/http"
	"net/http/httptest"
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
	for name := range outageCalls(nil) {
		t.Run(name, func(t *testing.T) {
			for at, hit := int64(1), true; hit; at++ {
				f := newFakeGCS(t)
				prepareOutage(f, name)
				var requests atomic.Int64
				s := overHTTP2(t, f, func() bool { return requests.Add(1) == at })
				require.NoError(t, outageCalls(s)[name](t.Context()), "request %d", at)
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
func overHTTP2(t *testing.T, f *fakeGCS, resets func() bool) *Storage {
	bucket := f.Handler()
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor != 2 {
			t.Errorf("a request over %s", r.Proto)
		}
		if resets() {
			bucket.ServeHTTP(httptest.NewRecorder(), r)
			panic(http.ErrAbortHandler)
		}
		bucket.ServeHTTP(w, r)
	}))
	server.EnableHTTP2 = true
	server.Config.ErrorLog = log.New(io.Discard, "", 0) // of connections that the test's end cuts
	server.StartTLS()
	t.Cleanup(server.Close)
	m := f.Register("a")
	m.Connect(m.Over(server.Client().Transport), option.WithEndpoint(server.URL+"/storage/v1/"))
	s := NewStorage(m.Bucket, WithChunkSize(faultChunk))
	s.bucket.rand = func(time.Duration) time.Duration { return 0 } // no pause before a request is made again
	return s
}
