package gcs

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// A cut is a call, and where it is cut off: at one of its requests, which are told apart
// by what they do and to what. Without a request it is not.
type cut struct {
	call, at string
	kind     fakegcs.Fault
}

// A machine that crashes says nothing more. A caller that gives up leaves the
// library the time to clean up behind itself.
var cutKinds = []fakegcs.Fault{fakegcs.CrashBefore, fakegcs.CrashAfter, fakegcs.Hung, fakegcs.HungApplied}

var crashes = cutKinds[:2]

func (c cut) crashes() bool { return slices.Contains(crashes, c.kind) }

// cutAt names a machine's requests, in an order that does not depend on which of
// two that go out together is first.
func cutAt(log []fakegcs.Request, machine string) (names []string) {
	seen := map[string]int{}
	for _, r := range log {
		if r.Machine != machine {
			continue
		}
		name := r.Op + " " + strings.TrimPrefix(r.Object, testModule+"/@v/"+testVersion)
		names = append(names, fmt.Sprintf("%s %d", name, seen[name]))
		seen[name]++
	}
	slices.Sort(names)
	return names
}

// faultAt gives a machine's request of that name a fault, once, and calls do then. Of
// two requests that are made at once, those that do what slow says, or to such an
// object, come second.
func faultAt(f *fakeGCS, machine, at string, fault fakegcs.Fault, slow []string, do func()) (fired *bool) {
	var mu sync.Mutex
	fired, seen := new(bool), map[string]int{}
	f.onRequest(func(r *fakegcs.Request) fakegcs.Fault {
		if r.Machine != machine {
			return fakegcs.NoFault
		}
		name := strings.TrimSuffix(cutAt([]fakegcs.Request{*r}, machine)[0], "0")
		for _, what := range strings.Fields(name) {
			if slices.Contains(slow, what) {
				time.Sleep(time.Millisecond)
			}
		}
		mu.Lock()
		defer mu.Unlock()
		n := seen[name]
		seen[name]++
		if *fired || fmt.Sprint(name, n) != at {
			return fakegcs.NoFault
		}
		*fired = true
		do()
		return fault
	})
	return fired
}

// crashThreshold is shorter than the default, which takes many polls to wait for.
const crashThreshold = 10 * time.Second

// A crashScene is what is found in the bucket, and a call that is cut off there.
type crashScene struct {
	name  string
	found func(f *fakeGCS)
	call  string
	// slow are the requests that come second when two are made at once: those
	// that do this, or to this object.
	slow []string
}

// play makes calls one after another, each on a machine of its own and each cut off, and
// checks what comes after them. It returns the names of the last call's requests, and what
// that one left.
func (sc crashScene) play(t *testing.T, cuts ...cut) (names []string, left string) {
	t.Helper()
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		defer func() {
			if t.Failed() {
				t.Log(sc.name, cuts)
			}
		}()
		sc.found(f)
		w := newWitness()
		w.knows("old", contentOf("old", 50))
		w.knows("older", contentOf("older", 50))
		began := time.Now()
		for i, c := range cuts {
			if i > 0 && cuts[i-1].crashes() {
				time.Sleep(crashThreshold) // who comes next need not wait for the marker
			}
			who, before := string(rune('a'+i)), f.Log()
			content := contentOf(who, 100+i)
			w.knows(who, content)
			sc.cutOff(t, f, who, content, c)
			names = cutAt(f.Log()[len(before):], who)
			began = time.Now()
		}
		left = sc.leaves(f, w)
		f.onRequest(nil)

		// A version without its .mod does not exist, whatever else a delete left.
		s := f.storage("s", WithStaleThreshold(crashThreshold))
		if f.Get(objectName(extMod)) == nil {
			requireExists(t, s, testVersion, false)
		}
		w.knows("s", contentOf("s", 200))
		err := contentOf("s", 200).save(t.Context(), s)
		limit := time.Second
		if cuts[len(cuts)-1].crashes() {
			limit = crashThreshold + 2*time.Second // the last poll
		}
		require.Less(t, time.Since(began), limit)
		winner := w.requireComplete(t, f)
		if err == nil {
			require.Equal(t, "s", winner)
		} else {
			requireKind(t, err, KindAlreadyExists)
			require.NotEqual(t, "s", winner)
		}
		began = time.Now()
		s = f.storage("t", WithStaleThreshold(crashThreshold))
		requireKind(t, contentOf("t", 300).save(t.Context(), s), KindAlreadyExists)
		require.Less(t, time.Since(began), time.Second)
		requireExists(t, s, testVersion, true)
		require.Equal(t, winner, w.requireComplete(t, f))
	})
	return names, left
}

// leaves describes all that decides what comes of a crash, when no marker is fresh any more.
func (sc crashScene) leaves(f *fakeGCS, w *witness) string {
	objects, ids, s := f.Objects(), map[string]int{}, fmt.Sprint(sc.slow)
	for _, name := range f.Names() {
		s += fmt.Sprint("\n", name, w.whose[objects[name].MD5])
		for _, k := range slices.Sorted(maps.Keys(objects[name].Metadata)) {
			v := objects[name].Metadata[k]
			switch k {
			case keySaveID:
				if ids[v] == 0 {
					ids[v] = len(ids) + 1
				}
				v = fmt.Sprint(ids[v])
			case keyGeneration:
				mod := objects[objectName(extMod)]
				v = fmt.Sprint(mod != nil && v == formatGeneration(mod.Generation))
			case keyInProgress:
				v = fmt.Sprint(v == givenUp.Format(time.RFC3339Nano))
			}
			s += " " + k + "=" + v
		}
	}
	return s
}

// cutOff makes a call and returns when it is cut off, or has come to its end.
func (sc crashScene) cutOff(t *testing.T, f *fakeGCS, who string, c content, at cut) {
	ctx, cancel := context.WithCancel(t.Context())
	crashed, returned := make(chan struct{}), make(chan error, 1)
	m := f.Machine(who)
	then := cancel
	if at.crashes() {
		then = func() { close(crashed) }
	}
	fired := faultAt(f, who, at.at, at.kind, sc.slow, func() { time.AfterFunc(20*time.Millisecond, then) })
	s := NewStorage(m.Bucket, WithStaleThreshold(crashThreshold))
	do := everyCall(s)[at.call]
	if at.call == "Save" {
		do = func(ctx context.Context) error { return c.save(ctx, s) }
	}
	go func() { returned <- do(ctx) }()
	select {
	case <-crashed: // the call goes on until the test ends, but is not heard
	case err := <-returned:
		cancel()
		require.Equal(t, at.at != "", *fired, "the request is never made")
		if at.at == "" && err != nil && !Is(err, KindNotFound) {
			requireKind(t, err, KindAlreadyExists)
		}
	}
}

// crashScenes are the beginnings of all scenes. What is left of older saves is
// every subset of the objects, with every kind of marker that a save need not
// wait for; those that it waits for become stale, and are then no different.
func crashScenes() []crashScene {
	stale := marked(time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC), "old")
	scenes := []crashScene{
		{name: "exists finishes", found: leftBehind(stale, "old", extInfo, extMod, extZip), call: "Exists"},
		{name: "delete", found: leftBehind(nil, "old", extInfo, extMod, extZip), call: "Delete"},
		{name: "delete of an abandoned save", found: leftBehind(stale, "old", extInfo, extMod), call: "Delete"},
		{name: "delete of leftovers", found: leftBehind(nil, "old", extInfo, extZip), call: "Delete"},
		{name: "over objects of two saves", found: leftBehind(stale, "older", extInfo, extMod, extZip)},
	}
	for _, op := range []string{"insert", "list"} {
		for _, ext := range []string{extInfo, extZip} {
			scenes = append(scenes, crashScene{name: "new, with a slow " + op + " and a slow " + ext, found: leftBehind(nil, ""), slow: []string{op, "." + ext}})
		}
	}
	markers := map[string]map[string]string{
		"without marker":     nil,
		"stale":              stale,
		"given up":           marked(givenUp, "old"),
		"marked by old ones": {keyInProgressOld: "true"},
	}
	for _, exts := range []string{"info", "zip", "info zip", "mod", "info mod", "mod zip", "info mod zip"} {
		for _, marker := range slices.Sorted(maps.Keys(markers)) {
			if !strings.Contains(exts, extMod) && marker != "without marker" {
				continue
			}
			scenes = append(scenes, crashScene{
				name:  "over " + exts + " " + marker,
				found: leftBehind(markers[marker], "old", strings.Fields(exts)...),
			})
		}
	}
	for i := range scenes {
		if scenes[i].slow == nil {
			scenes[i].slow = []string{"insert", ".zip"}
		}
		scenes[i].call = cmp.Or(scenes[i].call, "Save")
	}
	return scenes
}

// A machine is cut off at each request of each call. The next save succeeds, at once or
// when the marker is stale, and the version is one save's. If what a crash leaves is new,
// the next machine crashes too, at each of its requests.
func TestCrash(t *testing.T) {
	t.Parallel()
	var known sync.Map // what crashes leave
	for _, sc := range crashScenes() {
		t.Run(sc.name, func(t *testing.T) {
			t.Parallel()
			names, _ := sc.play(t, cut{call: sc.call})
			for i, at := range names {
				for j, kind := range cutKinds {
					if testing.Short() && j != i%len(cutKinds) {
						continue
					}
					first := cut{sc.call, at, kind}
					_, left := sc.play(t, first)
					if !first.crashes() || testing.Short() {
						continue
					}
					if _, loaded := known.LoadOrStore(left, true); loaded {
						continue
					}
					for _, next := range []string{"Save", "Delete", "Exists"} {
						names, _ := sc.play(t, first, cut{call: next})
						for _, at := range names {
							for _, kind := range crashes {
								sc.play(t, first, cut{next, at, kind})
							}
						}
					}
				}
			}
		})
	}
}
