package gcs

import (
	"bytes"
	"fmt"
	"io"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/stretchr/testify/require"
)

// inSharedRate is inFleet for a bucket in which creates, updates and deletes of an
// object share a rate of one a second.
func inSharedRate(t *testing.T, test func(t *testing.T, f *fakeGCS)) {
	t.Helper()
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		f.EnforceRates(true)
		f.ShareRates(true)
		test(t, f)
	})
}

// saveBroken saves from a reader that fails when a chunk is sent.
func (c content) saveBroken(t *testing.T, s *Storage) {
	t.Helper()
	err := c.saveFrom(t.Context(), s, io.MultiReader(bytes.NewReader(make([]byte, 2<<20)), iotest.ErrReader(io.ErrClosedPipe)))
	require.ErrorIs(t, err, io.ErrClosedPipe)
}

// A rate that all changes of an object share costs a call a second, and a request or two.
func TestSharedRateCosts(t *testing.T) {
	a := contentOf("a", 100)
	for name, call := range map[string]func(t *testing.T, f *fakeGCS, s *Storage){
		"new": func(t *testing.T, _ *fakeGCS, s *Storage) { require.NoError(t, a.save(t.Context(), s)) },
		"large": func(t *testing.T, _ *fakeGCS, s *Storage) {
			require.NoError(t, contentOf("a", 2<<20).save(t.Context(), s))
		},
		"renewed": func(t *testing.T, _ *fakeGCS, s *Storage) {
			s.SetStaleThreshold(4 * time.Second)
			require.NoError(t, a.saveSlowly(t.Context(), s, 10*time.Second))
		},
		"taken over": func(t *testing.T, f *fakeGCS, s *Storage) {
			leave(f, marked(givenUp, "old"), extMod, extZip)
			require.NoError(t, a.save(t.Context(), s))
		},
		"given up": func(t *testing.T, f *fakeGCS, s *Storage) { a.saveBroken(t, s) },
		"flight": func(t *testing.T, f *fakeGCS, _ *Storage) {
			_, err := newReplica(f, &origin{}, "a").Stash(t.Context(), testModule, testVersion)
			require.NoError(t, err)
		},
		"failed flight": func(t *testing.T, f *fakeGCS, _ *Storage) {
			_, err := newReplica(f, &origin{fail: func(int) bool { return true }}, "a").Stash(t.Context(), testModule, testVersion)
			require.ErrorIs(t, err, errGone)
		},
	} {
		t.Run(name, func(t *testing.T) {
			cost := func(in arena) (took time.Duration, requests int) {
				in(t, func(t *testing.T, f *fakeGCS) {
					s, start := f.storage("a"), time.Now()
					call(t, f, s)
					took, requests = time.Since(start), len(f.Log())
				})
				return took, requests
			}
			usually, requests := cost(inFleet)
			took, n := cost(inSharedRate)
			require.LessOrEqual(t, took, usually+1500*time.Millisecond)
			require.LessOrEqual(t, n, requests+2)
		})
	}
}

// With a shared rate, too, one of those who race stores the version, and who comes after
// a save that failed does not wait for its marker.
func TestSharedRateRaces(t *testing.T) {
	inSharedRate(t, func(t *testing.T, f *fakeGCS) {
		contentOf("broken", 100).saveBroken(t, f.storage("broken"))
		start, errs := time.Now(), make([]error, 5)
		var group sync.WaitGroup
		for i := range errs {
			group.Go(func() { errs[i] = contentOf(fmt.Sprint(i), 100).save(t.Context(), f.storage(fmt.Sprint(i))) })
		}
		group.Wait()
		require.Less(t, time.Since(start), 5*time.Second)
		stored := 0
		for i, err := range errs {
			if err != nil {
				requireKind(t, err, KindAlreadyExists)
				continue
			}
			stored++
			requireStored(t, f, contentOf(fmt.Sprint(i), 100))
		}
		require.Equal(t, 1, stored)
		require.NoError(t, f.storage("a").Delete(t.Context(), testModule, testVersion))
		require.Empty(t, f.Names())
	})
	forNamed(t, inSharedRate, map[string]int{"whose first fetch fails": 1, "whose fetches fail": 100}, func(t *testing.T, f *fakeGCS, failing int) {
		o := &origin{takes: 100 * time.Millisecond, fail: func(n int) bool { return n <= failing }}
		errs, took := stashAll(t, newFleet(f, o, 4), 10*time.Millisecond)
		require.Less(t, took, 5*time.Second)
		require.ErrorIs(t, errs[0], errGone)
		for _, err := range errs[1:] {
			if failing == 1 {
				require.NoError(t, err)
			} else {
				require.ErrorIs(t, err, errGone)
			}
		}
	})
}
