package gcs

import (
	"bytes"
	"crypto/md5"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// A load is what many callers want of a few machines at once.
type load struct {
	machines, callers, versions int
	wanted                      int // by how many each version is
	broken                      int // every so manieth call has a zip that cannot be read
}

var errLoad = errors.New("the zip cannot be read")

// run has each version saved by as many callers as want it, one after another
// in each caller but in an order of its own. It returns how many saves of each
// version failed, as they had to.
func (l load) run(t *testing.T, f *fakeGCS, machine func(name string) *fakegcs.Machine) (failed map[string]int) {
	var stores []*Storage
	for i := range l.machines {
		stores = append(stores, NewStorage(machine(fmt.Sprint(i)).Bucket))
	}
	var mu sync.Mutex
	failed, winners := map[string]int{}, map[string]int{}
	contents := map[string]content{}
	wants := make([][]int, l.callers)
	for i := range l.versions * l.wanted {
		wants[i%l.callers] = append(wants[i%l.callers], i)
	}
	together(l.callers, func(caller int) {
		s, want := stores[caller%len(stores)], wants[caller]
		rng := rand.New(rand.NewPCG(1, uint64(caller)))
		rng.Shuffle(len(want), func(i, j int) { want[i], want[j] = want[j], want[i] })
		for _, i := range want {
			vers := fmt.Sprintf("v1.%d.0", i%l.versions)
			c := contentOf(fmt.Sprintf("%s by %d", vers, i), 100+i)
			zip := plain(bytes.NewReader(c.zip))
			if i%l.broken == 0 {
				zip = iotest.ErrReader(errLoad)
			}
			sum := md5.Sum(c.zip)
			err := s.Save(t.Context(), testModule, vers, c.mod, zip, sum[:], c.info)
			if err == nil || Is(err, KindAlreadyExists) {
				requireExists(t, s, vers, true)
			}
			mu.Lock()
			switch {
			case err == nil:
				winners[vers]++
				contents[vers] = c
			case i%l.broken == 0 && errors.Is(err, errLoad):
				failed[vers]++
			case !Is(err, KindAlreadyExists):
				t.Errorf("%s: %v", vers, err)
			}
			mu.Unlock()
		}
	})
	require.Len(t, winners, l.versions)
	for vers, n := range winners {
		require.Equal(t, 1, n, vers)
		requireVersion(t, f, ModuleVersion{testModule, vers}, contents[vers])
	}
	list, err := stores[0].List(t.Context(), testModule)
	require.NoError(t, err)
	require.Len(t, list, l.versions)
	return failed
}

// requireUploads checks that no zip was sent twice but for a reason.
func requireUploads(t *testing.T, f *fakeGCS, failed map[string]int) {
	t.Helper()
	uploads := map[string]int{}
	for _, r := range f.Log() {
		if v, ext, ok := parseObject(r.Object); ok && ext == extZip && (r.Op == "insert" || r.Op == "start") {
			uploads[v.Version]++
		}
	}
	for vers, n := range uploads {
		require.LessOrEqual(t, n, 1+failed[vers], "uploads of the zip of %s", vers)
	}
}

// A hundred callers on eight machines save two hundred versions. The bubble
// proves that no goroutine is left behind.
func TestLoad(t *testing.T) {
	bubble(t, 0, func(t *testing.T, f *fakeGCS) {
		f.before(on("", "", ""), func() { time.Sleep(rand.N(60 * time.Millisecond)) })
		l := load{machines: 8, callers: 100, versions: 200, wanted: 5, broken: 7}
		failed := l.run(t, f, func(name string) *fakegcs.Machine { return f.Machine(name) })
		require.NotEmpty(t, failed)
		requireUploads(t, f, failed)
		requireNothingInFlight(t, f)
	})
}

// The same over sockets, of which none stays open.
func TestLoadOverSockets(t *testing.T) {
	f := newFakeGCS(t)
	l := load{machines: 4, callers: 24, versions: 20, wanted: 4, broken: 1000}
	var open atomic.Int64
	server := httptest.NewUnstartedServer(f.Handler())
	server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		open.Add(map[http.ConnState]int64{http.StateNew: 1, http.StateClosed: -1}[state])
	}
	server.Start()
	t.Cleanup(server.Close)
	var wires []*http.Transport
	requireUploads(t, f, l.run(t, f, func(name string) *fakegcs.Machine {
		wires = append(wires, new(http.Transport))
		return f.over(t, server.URL, name, wires[len(wires)-1])
	}))
	// What is still open is idle, or it would not be closed.
	require.Positive(t, open.Load())
	for _, wire := range wires {
		wire.CloseIdleConnections()
	}
	require.Eventually(t, func() bool {
		requests, bodies := f.InFlight()
		return open.Load()+int64(requests+bodies) == 0
	}, 10*time.Second, time.Millisecond)
}
