package gcs

import (
	"context"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"google.golang.org/api/option"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// fakeGCS is the bucket of a test.
type fakeGCS struct {
	*fakegcs.Server
	tolerant bool
}

// newFakeGCS returns an empty bucket. The test fails when it ends with
// violations, unless it called tolerate. A test that fails prints its requests.
func newFakeGCS(t testing.TB) *fakeGCS {
	f, start := &fakeGCS{Server: fakegcs.New()}, time.Now()
	t.Cleanup(func() {
		f.Close()
		if !f.tolerant {
			for _, v := range f.Violations() {
				t.Errorf("the save protocol was violated: %s", v)
			}
		}
		if log := f.Log(); t.Failed() {
			for _, r := range log[:min(len(log), 200)] {
				t.Log(r.Start.Sub(start), r)
			}
		}
	})
	return f
}

// tolerate lets the test end with violations.
func (f *fakeGCS) tolerate() { f.tolerant = true }

// onRequest is OnRequest for a hook that does not care for the context; nil ends
// the hooks.
func (f *fakeGCS) onRequest(hook func(*fakegcs.Request) fakegcs.Fault) {
	if hook == nil {
		f.OnRequest(nil)
		return
	}
	f.OnRequest(func(_ context.Context, r *fakegcs.Request) fakegcs.Fault { return hook(r) })
}

// fault gives a fault to some requests.
func (f *fakeGCS) fault(fault fakegcs.Fault, to func(*fakegcs.Request) bool) {
	f.onRequest(func(r *fakegcs.Request) fakegcs.Fault {
		if to(r) {
			return fault
		}
		return fakegcs.NoFault
	})
}

// onAnswer is OnAnswer for a hook that does not care for the context.
func (f *fakeGCS) onAnswer(hook func(*fakegcs.Request)) {
	f.OnAnswer(func(_ context.Context, r *fakegcs.Request) { hook(r) })
}

// listen serves the bucket on a loopback port, for tests with real sockets and
// real time. It returns the address, without a path.
func (f *fakeGCS) listen(t testing.TB) string {
	server := httptest.NewServer(f.Handler())
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	return server.URL
}

// over is Machine for a bucket behind listen.
func (f *fakeGCS) over(t testing.TB, endpoint, name string, wire *http.Transport, opts ...option.ClientOption) *fakegcs.Machine {
	m := f.Register(name)
	t.Cleanup(wire.CloseIdleConnections)
	m.Connect(m.Over(wire), append(opts, option.WithEndpoint(endpoint+"/storage/v1/"))...)
	return m
}
