package gcs

import (
	"context"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/api/option"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// fakeGCS is the bucket of a test.
type fakeGCS struct {
	*fakegcs.Server
	tolerant bool
	hook     func(*fakegcs.Request) fakegcs.Fault
	answered []func(*fakegcs.Request)
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

// A matcher picks requests.
type matcher = func(*fakegcs.Request) bool

// on picks the requests of a machine, of a kind, for an object of the version that most
// tests save. "" is any.
func on(machine, op, ext string) matcher {
	return func(r *fakegcs.Request) bool {
		return (machine == "" || r.Machine == machine) && (op == "" || r.Op == op) && (ext == "" || r.Object == objectName(ext))
	}
}

// nth picks the n-th request of a machine, from 0.
func nth(machine string, n int) matcher {
	return func(r *fakegcs.Request) bool { return r.Machine == machine && r.MachineN == n }
}

// first picks the first n of some requests.
func first(n int, which matcher) matcher {
	var met atomic.Int64
	return func(r *fakegcs.Request) bool { return which(r) && met.Add(1) <= int64(n) }
}

// onRequest is OnRequest for a hook that does not care for the context; nil is none.
func (f *fakeGCS) onRequest(hook func(*fakegcs.Request) fakegcs.Fault) {
	if f.hook = hook; hook == nil {
		f.OnRequest(nil)
		return
	}
	f.OnRequest(func(_ context.Context, r *fakegcs.Request) fakegcs.Fault { return hook(r) })
}

// fault gives a fault to some requests. What other hook there is stays, for the others.
func (f *fakeGCS) fault(fault fakegcs.Fault, to matcher) {
	hook := f.hook
	f.onRequest(func(r *fakegcs.Request) fakegcs.Fault {
		switch {
		case to(r):
			return fault
		case hook != nil:
			return hook(r)
		}
		return fakegcs.NoFault
	})
}

// before calls do before each of some requests is served. What other hook there is
// stays.
func (f *fakeGCS) before(which matcher, do func()) {
	f.fault(fakegcs.NoFault, func(r *fakegcs.Request) bool {
		if which(r) {
			do()
		}
		return false
	})
}

// count returns how many requests of the log match.
func (f *fakeGCS) count(which matcher) (n int) {
	for _, r := range f.Log() {
		if which(&r) {
			n++
		}
	}
	return n
}

// atFirst calls do before the first of some requests is served.
func (f *fakeGCS) atFirst(which matcher, do func()) { f.before(first(1, which), do) }

// onAnswer is OnAnswer for a hook that does not care for the context. What other hook
// there is comes first.
func (f *fakeGCS) onAnswer(hook func(*fakegcs.Request)) {
	f.answered = append(f.answered, hook)
	f.OnAnswer(func(_ context.Context, r *fakegcs.Request) {
		for _, hook := range f.answered {
			hook(r)
		}
	})
}

// after calls do when one of some requests is answered.
func (f *fakeGCS) after(which matcher, do func()) {
	f.onAnswer(func(r *fakegcs.Request) {
		if which(r) {
			do()
		}
	})
}

// applied picks those of some requests that are applied. It is for after.
func applied(which matcher) matcher {
	return func(r *fakegcs.Request) bool { return which(r) && r.Applied }
}

// but picks those of some requests that are not among others.
func but(which, others matcher) matcher {
	return func(r *fakegcs.Request) bool { return which(r) && !others(r) }
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
