package gcs

import (
	"bytes"
	"cmp"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// A faultScene is what is found in the bucket, and a call whose every request
// meets every fault.
type faultScene struct {
	name  string
	found func(f *fakeGCS)
	size  int // of the zip
	zip   func(io.ReadSeeker) io.Reader
	call  string // "" is Save
	slow  string // which of two requests that go out together comes second
}

const (
	faultChunk = 256 << 10
	// faultLimit is how much later a call may end because of a fault: a request
	// that hangs is sent again in time.
	faultLimit = 2*requestTimeout + 5*time.Second
)

func faultScenes() []faultScene {
	leave := func(mark map[string]string, exts ...string) func(*fakeGCS) {
		return leftBehind(mark, "old", exts...)
	}
	seekable := func(r io.ReadSeeker) io.Reader { return r }
	unseekable := func(r io.ReadSeeker) io.Reader { return plain(r) }
	// A renewal is due at a quarter of the threshold.
	slowly := func(r io.ReadSeeker) io.Reader {
		return io.MultiReader(sleepReader(DefaultStaleThreshold/renewals+time.Second), r)
	}
	stale := marked(time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC), "old")
	scenes := []faultScene{
		{name: "new", found: leave(nil)},
		{name: "new, created before it is listed", found: leave(nil), slow: "list"},
		{name: "new and slow", found: leave(nil), zip: slowly},
		{name: "in chunks, seekable", found: leave(nil), size: 3*faultChunk - 1, zip: seekable},
		{name: "in chunks, unseekable", found: leave(nil), size: 3*faultChunk - 1, zip: unseekable},
		{name: "in chunks, slow", found: leave(nil), size: 3*faultChunk - 1, zip: slowly},
		{name: "in chunks over another", found: leave(stale, extMod, extZip), size: 3*faultChunk - 1, zip: unseekable},
		{name: "complete", found: leave(nil, extMod, extInfo, extZip)},
		{name: "unfinished", found: leave(stale, extMod, extInfo, extZip)},
		{name: "given up", found: leave(marked(givenUp, "old"), extMod, extInfo)},
		{name: "partial", found: leave(nil, extMod, extZip)},
		{name: "without .mod", found: leave(nil, extInfo, extZip)},
		{name: "soon stale", found: func(f *fakeGCS) {
			f.Put(objectName(extMod), nil, marked(time.Now().Add(time.Second-DefaultStaleThreshold), "old"))
			time.Sleep(100 * time.Millisecond)
		}},
		{name: "Exists finishes", found: leave(stale, extMod, extInfo, extZip), call: "Exists"},
		{name: "Delete", found: leave(nil, extMod, extInfo, extZip), call: "Delete"},
	}
	for i := range scenes {
		sc := &scenes[i]
		sc.slow, sc.size = cmp.Or(sc.slow, "insert"), cmp.Or(sc.size, 100)
		if sc.zip == nil {
			sc.zip = unseekable
		}
	}
	return scenes
}

// An ending is all that a call with a fault must have in common with one without.
type ending struct {
	kind   int
	winner string // whose version is stored
}

// play makes the call, with a fault at one of its requests (see cutAt).
func (sc faultScene) play(t *testing.T, at string, fault fakegcs.Fault) (end ending, took time.Duration, names []string) {
	t.Helper()
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		defer func() {
			if t.Failed() {
				t.Logf("%s, %v at %s", sc.name, fault, at)
			}
		}()
		w, a := newWitness(), contentOf("a", sc.size)
		w.knows("old", contentOf("old", 50))
		w.knows("a", a)
		sc.found(f)
		fired := faultAt(f, "a", at, fault, []string{sc.slow, ".zip"}, func() {})
		s := f.storage("a", WithChunkSize(faultChunk))
		began := time.Now()
		var err error
		switch sc.call {
		case "":
			err = a.saveFrom(t.Context(), s, sc.zip(bytes.NewReader(a.zip)))
		case "Exists":
			requireExists(t, s, testVersion, true)
		default:
			err = everyCall(s)[sc.call](t.Context())
		}
		took, names, end.kind = time.Since(began), cutAt(f.Log(), "a"), Kind(err)
		require.Equal(t, at != "", *fired, "the request is never made")
		f.onRequest(nil)
		if len(f.Names()) != 0 && end.kind != KindUnexpected {
			end.winner = w.requireComplete(t, f)
		}
		if fault == fakegcs.Stray {
			f.Land() // late, and to no effect
			if end.winner != "" {
				require.Equal(t, end.winner, w.requireComplete(t, f))
			}
		}
		began = time.Now()
		err = contentOf("b", 10).save(t.Context(), f.storage("b"))
		if end.winner != "" {
			requireKind(t, err, KindAlreadyExists)
		} else {
			require.NoError(t, err)
		}
		require.Less(t, time.Since(began), time.Second)
		requireNothingInFlight(t, f)
	})
	return end, took, names
}

// One fault, of each kind and at each request, changes nothing but how long a
// call takes.
func TestOneFault(t *testing.T) {
	t.Parallel()
	for _, sc := range faultScenes() {
		t.Run(sc.name, func(t *testing.T) {
			t.Parallel()
			_, seeks := sc.zip(bytes.NewReader(nil)).(io.Seeker) // whether the zip can be read again
			want, usually, names := sc.play(t, "", fakegcs.NoFault)
			for i, at := range names {
				faults := []fakegcs.Fault{fakegcs.ConnectionRefused, fakegcs.LostReset, fakegcs.LostEOF, fakegcs.LostBody, fakegcs.Unavailable, fakegcs.TooMany, fakegcs.Hung, fakegcs.HungApplied, fakegcs.Stray}
				if strings.HasPrefix(at, "chunk") {
					faults = append(faults, fakegcs.HalfChunk, fakegcs.SessionGone, fakegcs.SessionNotFound)
				}
				for j, fault := range faults {
					if testing.Short() && j != i%len(faults) {
						continue
					}
					end, took, _ := sc.play(t, at, fault)
					limit := usually + faultLimit
					if strings.HasPrefix(at, "start") || strings.HasPrefix(at, "chunk") {
						limit += 3 * uploadTimeout(faultChunk)
					}
					hangs := fault == fakegcs.Hung || fault == fakegcs.HungApplied || fault == fakegcs.Stray
					if (hangs && strings.HasPrefix(at, "start") || fault >= fakegcs.HalfChunk) && !seeks {
						// The only faults that cost a save, and the doc of Save says so:
						// what was read for the chunk is in the client's hands.
						if end.winner != "" || took > limit {
							t.Errorf("%v at %s: ended as %v after %v", fault, at, end, took)
						}
						continue
					}
					if end != want || took > limit {
						t.Errorf("%v at %s: ended as %v after %v, and without it as %v after %v", fault, at, end, took, want, usually)
					}
				}
			}
		})
	}
}
