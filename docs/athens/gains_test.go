package athens

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs"
	"github.com/athensgcs/gcs/internal/fakegcs"
)

// TestSaveCosts counts the requests of a save of a new version. The guide's table of
// what is gained and lost has the figures.
func TestSaveCosts(t *testing.T) {
	for name, save := range map[string]saver{"upstream": upstream, "library": library} {
		synctest.Test(t, func(t *testing.T) {
			bucket := fakegcs.New()
			defer bucket.Close()
			bucket.SetLatency(20 * time.Millisecond)
			require.NoError(t, save(t.Context(), bucket.Machine(name)))
			requests := bucket.Log()
			require.Contains(t, text(t, "../athens.md"),
				fmt.Sprintf("%d requests, %d one after another", len(requests), fakegcs.SerialTrips(requests)), name)
		})
	}
}

type stasher func(ctx context.Context, mod, ver string) (string, error)

func (s stasher) Stash(ctx context.Context, mod, ver string) (string, error) { return s(ctx, mod, ver) }

// TestKilledReplica measures how long a version is held up by a replica that was
// killed while it fetched or saved it: a quarter of the stale threshold, and the
// whole, as the guide says, and the next look of the replica that waits.
func TestKilledReplica(t *testing.T) {
	for _, threshold := range []time.Duration{gcs.DefaultStaleThreshold, 30 * time.Second} {
		for _, test := range []struct {
			while string
			op    string // of the dead replica's last request
			limit time.Duration
		}{
			{"fetching", "", threshold / 4},
			{"saving", "insert", threshold},
		} {
			t.Run(fmt.Sprintf("%s %v", test.while, threshold), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					bucket := fakegcs.New()
					defer time.Sleep(time.Hour) // a flight outlives its callers
					defer bucket.Close()
					replica := func(m *fakegcs.Machine, fetch func()) gcs.Stasher {
						s := gcs.NewStorage(m.Bucket, gcs.WithStaleThreshold(threshold))
						return s.SingleFlight(stasher(func(ctx context.Context, mod, ver string) (string, error) {
							fetch()
							return ver, saveWith(ctx, s, m.Name)
						}))
					}
					dead, other := bucket.Machine("dead"), bucket.Machine("other")
					if test.op != "" {
						bucket.OnRequest(func(_ context.Context, r *fakegcs.Request) fakegcs.Fault {
							if r.Machine == "dead" && r.Op == test.op && r.Object == object+"zip" {
								return fakegcs.CrashBefore
							}
							return fakegcs.NoFault
						})
					}
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					go replica(dead, func() {
						if test.op == "" {
							dead.Crash()
						}
					}).Stash(ctx, mod, ver)
					synctest.Wait()
					require.True(t, dead.Crashed())
					start := time.Now()
					_, err := replica(other, func() {}).Stash(t.Context(), mod, ver)
					require.NoError(t, err)
					require.False(t, mixed(filesOf(bucket)))
					waited := time.Since(start)
					t.Log(waited)
					require.GreaterOrEqual(t, waited, test.limit)
					require.LessOrEqual(t, waited, test.limit+4*time.Second)
				})
			})
		}
	}
}
