package gcs

import (
	"bytes"
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

// A cut is where a call is cut off: at one of its requests, which are told apart
// by what they do and to what. Without a request it is not.
type cut struct {
	at   string
	kind fakegcs.Fault
}

// A machine that crashes says nothing more. A caller that gives up leaves the
// library the time to clean up behind itself.
var cutKinds = map[fakegcs.Fault]string{
	fakegcs.CrashBefore: "crash before",
	fakegcs.CrashAfter:  "crash after",
	fakegcs.Hung:        "give up before",
	fakegcs.HungApplied: "give up after",
}

func (c cut) String() string { return cutKinds[c.kind] + " " + c.at }

var crashes = []fakegcs.Fault{fakegcs.CrashBefore, fakegcs.CrashAfter}

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

// A crashScene is what is found in the bucket, and the calls made of it, one
// after another, each by a machine of its own and each cut off.
type crashScene struct {
	name  string
	found func(f *fakeGCS)
	calls []string
	// slow are the requests that come second when two are made at once: those
	// that do this, or to this object.
	slow []string
	over bool // a save over what is left of another,
	twin bool // which another scene differs from only in the kind of the marker
}

// play runs the scene and checks what comes after it. It returns the names of
// the last call's requests.
func (sc crashScene) play(t *testing.T, cuts ...cut) (names []string) {
	t.Helper()
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		defer func() {
			if t.Failed() {
				t.Log(sc.name, cuts)
			}
		}()
		sc.found(f)
		stored := map[string]content{"old": contentOf("old", 50)}
		began := time.Now()
		for i, c := range cuts {
			who := string(rune('a' + i))
			stored[who] = contentOf(who, 100+i)
			before := f.Log()
			sc.cutOff(t, f, sc.calls[i], who, stored[who], c)
			names = cutAt(f.Log()[len(before):], who)
			if i+1 < len(cuts) && c.crashes() {
				time.Sleep(crashThreshold) // who comes next need not wait for the marker
			}
			began = time.Now()
		}
		f.onRequest(nil)
		last := cuts[len(cuts)-1]

		// A version without its .mod does not exist, whatever else a delete left.
		s := f.storage("s", WithStaleThreshold(crashThreshold))
		if f.Get(objectName(extMod)) == nil {
			requireExists(t, s, testVersion, false)
		}
		stored["s"] = contentOf("s", 200)
		err := stored["s"].save(t.Context(), s)
		limit := time.Second
		if last.crashes() {
			limit = crashThreshold + 2*time.Second // the last poll
		}
		require.Less(t, time.Since(began), limit)
		winner := whoseVersion(t, f, stored)
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
		require.Equal(t, winner, whoseVersion(t, f, stored))
	})
	return names
}

// cutOff makes a call and returns when it is cut off, or has come to its end.
func (sc crashScene) cutOff(t *testing.T, f *fakeGCS, call, who string, c content, at cut) {
	ctx, cancel := context.WithCancel(t.Context())
	crashed, returned := make(chan struct{}), make(chan error, 1)
	m := f.Machine(who)
	then := cancel
	if at.crashes() {
		then = func() { close(crashed) }
	}
	fired := faultAt(f, who, at.at, at.kind, sc.slow, func() { time.AfterFunc(20*time.Millisecond, then) })
	s := NewStorage(m.Bucket, WithStaleThreshold(crashThreshold))
	do := everyCall(s)[call]
	if call == "Save" {
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

// whoseVersion returns whose three objects a complete version has.
func whoseVersion(t *testing.T, f *fakeGCS, stored map[string]content) string {
	t.Helper()
	info, mod, zip := f.Get(objectName(extInfo)), f.Get(objectName(extMod)), f.Get(objectName(extZip))
	require.True(t, info != nil && mod != nil && zip != nil, "the version has only %v", f.Names())
	require.Empty(t, mod.Metadata)
	for _, who := range slices.Sorted(maps.Keys(stored)) {
		if c := stored[who]; bytes.Equal(mod.Data, c.mod) {
			require.Equal(t, c.info, info.Data)
			require.True(t, bytes.Equal(c.zip, zip.Data), "the zip is %.40q", zip.Data)
			return who
		}
	}
	require.Fail(t, "nobody's go.mod", "%q", mod.Data)
	return ""
}

// crashScenes are the beginnings of all scenes. What is left of older saves is
// every subset of the objects, with every kind of marker that a save need not
// wait for; those that it waits for become stale, and are then no different.
func crashScenes() []crashScene {
	stale := marked(time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC), "old")
	scenes := []crashScene{
		{name: "exists finishes", found: leftBehind(stale, "old", extInfo, extMod, extZip), calls: []string{"Exists"}},
		{name: "delete", found: leftBehind(nil, "old", extInfo, extMod, extZip), calls: []string{"Delete"}},
		{name: "delete of an abandoned save", found: leftBehind(stale, "old", extInfo, extMod), calls: []string{"Delete"}},
		{name: "delete of leftovers", found: leftBehind(nil, "old", extInfo, extZip), calls: []string{"Delete"}},
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
				over:  true,
				twin:  marker == "stale" || marker == "marked by old ones",
			})
		}
	}
	for i := range scenes {
		if scenes[i].slow == nil {
			scenes[i].slow = []string{"insert", ".zip"}
		}
		if scenes[i].calls == nil {
			scenes[i].calls = []string{"Save"}
		}
	}
	return scenes
}

// A machine is cut off at each request of each call. The next save succeeds, at
// once or when the marker is stale, and the version is one save's.
func TestCrashOnce(t *testing.T) {
	for _, sc := range crashScenes() {
		t.Run(sc.name, func(t *testing.T) {
			t.Parallel()
			kinds := slices.Sorted(maps.Keys(cutKinds))
			for i, at := range sc.play(t, cut{}) {
				for j, kind := range kinds {
					if !testing.Short() || j == i%len(kinds) {
						sc.play(t, cut{at, kind})
					}
				}
			}
		})
	}
}

// The next machine is cut off too, at each of its requests.
func TestCrashTwice(t *testing.T) {
	if testing.Short() {
		t.Skip("each of the two crashes is played by TestCrashOnce")
	}
	for _, sc := range crashScenes() {
		for _, next := range []string{"Save", "Delete", "Exists"} {
			if sc.over && next != "Save" || sc.twin {
				continue // the first crash leaves nothing that other scenes do not
			}
			sc := sc
			sc.calls = append(slices.Clip(sc.calls), next)
			t.Run(sc.name+" then "+next, func(t *testing.T) {
				t.Parallel()
				for _, at := range sc.play(t, cut{}) {
					for _, kind := range crashes {
						for _, at2 := range sc.play(t, cut{at, kind}, cut{}) {
							for _, kind2 := range crashes {
								sc.play(t, cut{at, kind}, cut{at2, kind2})
							}
						}
					}
				}
			})
		}
	}
}
