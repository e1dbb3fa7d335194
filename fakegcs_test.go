package gcs

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"google.golang.org/api/option"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// fakeGCS is the bucket of a test. It names all objects without testPrefix.
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

func (f *fakeGCS) Put(name string, data []byte, metadata map[string]string) (generation int64) {
	return f.Server.Put(testPrefix+name, data, metadata)
}

func (f *fakeGCS) PutAt(name string, data []byte, metadata map[string]string, created time.Time) (generation int64) {
	return f.Server.PutAt(testPrefix+name, data, metadata, created)
}

func (f *fakeGCS) SetMetadata(name string, metadata map[string]string) {
	f.Server.SetMetadata(testPrefix+name, metadata)
}

func (f *fakeGCS) Get(name string) *fakegcs.Object { return f.Server.Get(testPrefix + name) }

func (f *fakeGCS) Objects() map[string]*fakegcs.Object {
	objects := map[string]*fakegcs.Object{}
	for name, o := range f.Server.Objects() {
		objects[strings.TrimPrefix(name, testPrefix)] = o
	}
	return objects
}

func (f *fakeGCS) Remove(name string) { f.Server.Remove(testPrefix + name) }

func (f *fakeGCS) Names() []string {
	names := f.Server.Names()
	for i := range names {
		names[i] = strings.TrimPrefix(names[i], testPrefix)
	}
	return names
}

func (f *fakeGCS) Log() []fakegcs.Request {
	log := f.Server.Log()
	for i := range log {
		log[i].Object = strings.TrimPrefix(log[i].Object, testPrefix)
	}
	return log
}

// onRequest is OnRequest for a hook that does not care for the context; nil ends
// the hooks.
func (f *fakeGCS) onRequest(hook func(*fakegcs.Request) fakegcs.Fault) {
	if hook == nil {
		f.OnRequest(nil)
		return
	}
	f.OnRequest(func(_ context.Context, r *fakegcs.Request) fakegcs.Fault {
		r.Object = strings.TrimPrefix(r.Object, testPrefix)
		return hook(r)
	})
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
	f.OnAnswer(func(_ context.Context, r *fakegcs.Request) {
		r.Object = strings.TrimPrefix(r.Object, testPrefix)
		hook(r)
	})
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
