package gcs

import (
	"cmp"
	"context"
	"errors"
	"sync"
	"time"

	"golang.org/x/mod/semver"
	"golang.org/x/sync/singleflight"
)

// A Stasher fetches a version of a module and saves it, and returns the version
// that it saved: a query, such as the name of a branch, is resolved. It is Athens'
// stash.Stasher.
type Stasher interface {
	Stash(ctx context.Context, module, version string) (string, error)
}

// maxWait bounds how long a flight waits for others.
const maxWait = 15 * time.Minute

// SingleFlight returns a Stasher that calls next once where many want the same
// version at the same time: in this process, and on all machines that share the
// bucket. It panics if next is nil. The Stasher is safe for concurrent use.
//
// A call of Stash starts a flight, or joins the one under way, whatever has become
// of its context. A caller whose context ends stops waiting, and the flight goes on:
// the version is stored all the same. A flight has the values of its first caller's
// context, but not its end. It waits up to 15 minutes for others; after that it is
// KindGatewayTimeout. next has to bound itself, and is called concurrently for
// different versions. A panic in next ends the program.
//
// A query, such as a branch, is fetched at once, and not checked. A version is claimed
// first, by an object beside its own, <module>/@v/<version>.lock, which is renewed as
// the marker of a save is, and deleted after next has returned. Then the flight looks
// into the bucket. It does not fetch a version that is complete, and waits for one that
// is being saved, or fetched by another machine. A name that no version can have is
// KindBadRequest, and a bucket that cannot be read fails the call.
//
// A claim goes stale after a quarter of the stale threshold (see
// [Storage.SetStaleThreshold]). When its holder dies, one of those who wait claims the
// version. When its holder fails, all who wait fetch for themselves at once. If claims
// may not be created, the log says so, and this Storage fetches for itself for 10
// minutes; then it tries again. If a claim may not be deleted, it makes no more.
//
// If next's error is, or wraps, an [*Error] of KindAlreadyExists, somebody else has
// saved the version, and the answer is the version in that error. Any other error is
// passed on as it is. In the span, one that is [fs.ErrNotExist] is no failure.
//
// A flight fails with next's error, and the log says so if nobody waits any more.
//
// A flight makes 3 requests if the version is complete: it claims, lists and deletes its
// claim. Otherwise it makes 2 before next, 1 after it, and 1 for each renewal in between.
func (s *Storage) SingleFlight(next Stasher) Stasher {
	if next == nil {
		panic("gcs: SingleFlight: next is nil")
	}
	return &singleFlight{s: s, next: next, callers: map[string]int{}}
}

// singleFlight is the Stasher that SingleFlight returns.
type singleFlight struct {
	s       *Storage
	next    Stasher
	flights singleflight.Group

	mu      sync.Mutex
	callers map[string]int // how many wait, by the flight; guarded by mu
}

func (sf *singleFlight) Stash(ctx context.Context, module, version string) (string, error) {
	v := ModuleVersion{module, version}
	ctx, c := sf.s.begin(ctx, "Stash", v)
	flightCtx := context.WithoutCancel(ctx)
	key := module + "\x00" + version
	sf.count(key, 1)
	defer sf.count(key, -1)
	done := sf.flights.DoChan(key, func() (any, error) {
		saved, err := sf.run(flightCtx, v)
		if err != nil && sf.count(key, 0) == 0 {
			sf.s.log.WarnContext(flightCtx, "a fetch failed that nobody waits for", "module", module, "version", version, "error", err)
		}
		return saved, err
	})
	select {
	case result := <-done:
		c.close(result.Err)
		saved, _ := result.Val.(string)
		return saved, result.Err
	case <-ctx.Done():
		return "", c.end(ctx.Err())
	}
}

// count adds to the number of a flight's callers, and returns it.
func (sf *singleFlight) count(key string, change int) int {
	sf.mu.Lock()
	defer sf.mu.Unlock()
	sf.callers[key] += change
	n := sf.callers[key]
	if n == 0 {
		delete(sf.callers, key)
	}
	return n
}

// run calls next for a version that is neither complete nor another's to fetch.
func (sf *singleFlight) run(ctx context.Context, v ModuleVersion) (string, error) {
	s := sf.s
	if !isVersion(v.Version) {
		return sf.fetch(ctx, v) // another machine cannot know what it resolves to
	}
	f := &flight{s: s, v: v, waiter: waiter{s: s, v: v}}
	waitCtx, cancel := context.WithTimeout(ctx, maxWait)
	held, complete, err := f.await(waitCtx)
	err = s.wrapError(waitCtx, "Stash", v, err) // before waitCtx is cancelled
	f.waiter.end(ctx)
	cancel()
	switch {
	case err != nil:
		return "", err
	case complete:
		return v.Version, nil
	case held:
		// Losing the claim is no reason to stop: the work is half done, and Save
		// sorts out who stores the version.
		stop := f.lease.startRenewing(ctx, func(error) {}, func() { s.telemetry.renewalsFailed.Add(ctx, 1) })
		defer func() {
			stop()
			f.deleteClaim(ctx)
		}()
	}
	return sf.fetch(ctx, v)
}

// errGoexit is the error of a next that did not return.
var errGoexit = errors.New("the Stasher ended its goroutine with runtime.Goexit")

// fetch calls next, and takes for success that somebody else has succeeded.
func (sf *singleFlight) fetch(ctx context.Context, v ModuleVersion) (string, error) {
	var saved string
	err := errGoexit
	done := make(chan struct{})
	go func() {
		defer close(done)
		saved, err = sf.next.Stash(ctx, v.Module, v.Version)
	}()
	<-done
	if err == errGoexit {
		err = sf.s.wrapError(ctx, "Stash", v, err)
	}
	var e *Error
	if errors.As(err, &e) && e.Kind == KindAlreadyExists {
		return cmp.Or(e.Version, saved, v.Version), nil
	}
	return saved, err
}

// isVersion reports whether the go command would ask for this version and no
// other by that name: v1.2.3, or v1.2.3-pre, or v2.0.0+incompatible, but not v1.
func isVersion(vers string) bool {
	return semver.IsValid(vers) && semver.Canonical(vers)+semver.Build(vers) == vers
}
