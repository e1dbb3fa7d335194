package gcs

import (
	"cmp"
	"context"
	"errors"
	"time"

	"cloud.google.com/go/storage"
	"golang.org/x/mod/semver"
	"golang.org/x/sync/singleflight"
)

// A Stasher fetches a version of a module and saves it, and returns the version
// that it saved: a query, such as the name of a branch, is resolved. It is Athens'
// stash.Stasher.
type Stasher interface {
	Stash(ctx context.Context, module, version string) (string, error)
}

const (
	// claimFraction is what part of the stale threshold a claim is believed.
	claimFraction = 4
	// maxWait bounds how long a flight waits for others.
	maxWait = 15 * time.Minute
)

// SingleFlight returns a Stasher that calls next once where many want the same
// version at the same time: in this process, and on all machines that share the
// bucket. It panics if next is nil. The Stasher is safe for concurrent use.
//
// A call of Stash starts a flight, or joins the one under way, whatever has become
// of its context. A caller whose context ends stops waiting, and the flight goes on:
// the version is stored all the same. A flight has the values of its first caller's
// context, but not its end. It waits up to 15 minutes for others. next has to bound
// itself.
//
// For a version, in contrast to a query, a flight first looks into the bucket. A
// version that is complete is not fetched again; one that is being saved, or fetched
// by another machine, is waited for. Before next is called, the version is claimed,
// by an object beside its own, <module>/@v/<version>.lock, which is renewed as the
// marker of a save is, and deleted afterwards. A claim goes stale after a quarter
// of the stale threshold (see [Storage.SetStaleThreshold]). When its holder dies, one
// of those who wait claims the version. When its holder fails, all who wait fetch
// for themselves at once. If claims are not permitted, the log says so once, and
// each machine fetches for itself.
//
// If next's error is, or wraps, an [*Error] of KindAlreadyExists, somebody else has
// saved the version, and the answer is the version in that error. Any other error is
// passed on as it is.
//
// A call costs one request if the version is complete, and one more if a stale claim
// has to be removed. Otherwise it makes 3 before next, and 1 after it.
func (s *Storage) SingleFlight(next Stasher) Stasher {
	if next == nil {
		panic("gcs: SingleFlight: next is nil")
	}
	return &singleFlight{s: s, next: next}
}

// singleFlight is the Stasher that SingleFlight returns.
type singleFlight struct {
	s       *Storage
	next    Stasher
	flights singleflight.Group
}

func (sf *singleFlight) Stash(ctx context.Context, module, vers string) (string, error) {
	v := version{module, vers}
	ctx, c := sf.s.begin(ctx, "Stash", v)
	flightCtx := context.WithoutCancel(ctx)
	done := sf.flights.DoChan(module+"\x00"+vers, func() (any, error) {
		return sf.fly(flightCtx, v)
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

// fly calls next for a version that is neither complete nor another's to fetch.
func (sf *singleFlight) fly(ctx context.Context, v version) (string, error) {
	s := sf.s
	if !isVersion(v.version) {
		return sf.fetch(ctx, v) // another machine cannot know what it resolves to
	}
	f := &flight{s: s, v: v, waiter: waiter{s: s, v: v}}
	waitCtx, cancel := context.WithTimeout(ctx, maxWait)
	held, complete, err := f.claim(waitCtx)
	err = s.wrapError(waitCtx, "Stash", v, err) // before waitCtx is cancelled
	f.waiter.end(ctx)
	cancel()
	switch {
	case err != nil:
		return "", err
	case complete:
		return v.version, nil
	case held:
		// Losing the claim is no reason to stop: the work is half done, and Save
		// sorts out who stores the version.
		stop := f.lease.keepRenewed(ctx, func(error) {}, func() { s.telemetry.renewalsFailed.Add(ctx, 1) })
		defer func() {
			stop()
			f.unclaim(ctx)
		}()
	}
	return sf.fetch(ctx, v)
}

// fetch calls next, and takes for success that somebody else has succeeded.
func (sf *singleFlight) fetch(ctx context.Context, v version) (string, error) {
	saved, err := sf.next.Stash(ctx, v.module, v.version)
	var e *Error
	if errors.As(err, &e) && e.Kind == KindAlreadyExists {
		return cmp.Or(e.Version, saved, v.version), nil
	}
	return saved, err
}

// isVersion reports whether the go command would ask for this version and no
// other by that name: v1.2.3, or v1.2.3-pre, or v2.0.0+incompatible, but not v1.
func isVersion(vers string) bool {
	return semver.IsValid(vers) && semver.Canonical(vers)+semver.Build(vers) == vers
}

// A flight is one machine's way to fetch a version, or to wait for who does.
type flight struct {
	s       *Storage
	v       version
	waiter  waiter
	lease   lease                // on the claim
	awaited *storage.ObjectAttrs // the claim that was last seen to be another's
}

// claim waits until the version is complete, or this flight's to fetch: with a
// claim that it holds, or without one.
func (f *flight) claim(ctx context.Context) (held, complete bool, err error) {
	if err := f.s.bucket.check(f.v); err != nil {
		return false, false, err
	}
	f.lease = f.s.newLease(f.v, extLock, nil, f.claimThreshold())
	for refused := 0; ; {
		seen, err := f.s.bucket.look(ctx, f.v)
		if err == nil {
			complete, err = f.s.isComplete(ctx, f.v, seen)
		}
		if err != nil || complete {
			f.land(ctx, seen, complete)
			return false, complete, err
		}
		held := f.lease.recover(seen.lock)
		switch {
		case f.s.state(seen) == InProgress:
			// Its saver renews its marker. To wait with a claim would mean to renew
			// that too.
			if held {
				f.unclaim(ctx)
				f.lease = f.s.newLease(f.v, extLock, nil, f.claimThreshold())
			}
			err = f.waiter.pause(ctx, "save", seen.mod, f.s.staleThreshold())
		case held:
			return true, false, nil
		case f.s.noClaims.Load() || f.holderFailed(seen.lock):
			return false, false, nil
		case isFresh(seen.lock, f.s.now(), f.claimThreshold()):
			f.awaited = seen.lock
			err = f.waiter.pause(ctx, "fetch", seen.lock, f.claimThreshold())
		default:
			// When it is acquired, look again: the version may have been stored since.
			err = f.acquire(ctx, seen.lock)
			if isRefused(err) && refused < maxRefused {
				refused, err = refused+1, nil
			}
		}
		if err != nil {
			f.land(ctx, snapshot{}, false)
			return false, false, err
		}
	}
}

func (f *flight) claimThreshold() time.Duration { return f.s.staleThreshold() / claimFraction }

// holderFailed reports whether the claim that this flight waited for is gone, or
// another's, without having gone stale.
func (f *flight) holderFailed(now *storage.ObjectAttrs) bool {
	return f.awaited != nil && (now == nil || now.Generation != f.awaited.Generation) &&
		isFresh(f.awaited, f.s.now(), f.claimThreshold())
}

// acquire claims the version, over a claim that is stale. If claims are not
// permitted, it makes this Storage do without them.
func (f *flight) acquire(ctx context.Context, stale *storage.ObjectAttrs) error {
	err := f.lease.acquire(ctx, stale)
	switch {
	case isForbidden(err):
		f.forbidden(ctx, err)
		return nil
	case err == nil:
		f.awaited = nil
		f.s.tookOver(ctx, f.v, "fetch", stale)
	}
	return err
}

// land leaves no claim behind: neither this flight's, nor a stale one that it met.
// A claim that may still arrive beside a complete version delays nobody.
func (f *flight) land(ctx context.Context, seen snapshot, complete bool) {
	if f.lease.recover(seen.lock) || !complete && f.lease.sent > 0 {
		f.unclaim(ctx)
		return
	}
	if err := f.s.removeStaleClaim(ctx, f.v, seen); err != nil {
		f.s.log.DebugContext(ctx, "could not delete a stale claim", "module", f.v.module, "version", f.v.version, "error", err)
	}
}

// unclaim deletes this flight's claim, so that others need not wait. It outlives
// ctx, by a bounded time.
func (f *flight) unclaim(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTimeout)
	defer cancel()
	held, err := f.lease.find(ctx, newSaveID())
	if held && err == nil {
		err = f.s.bucket.remove(ctx, f.v, extLock, ifNotReplaced(&storage.ObjectAttrs{Generation: f.lease.gen}))
	}
	switch {
	case err == nil || isRefused(err):
	case isForbidden(err):
		f.forbidden(ctx, errors.Join(err, f.lease.release(ctx, false)))
	default:
		f.s.log.WarnContext(ctx, "could not delete a claim: others have to wait until it is stale",
			"module", f.v.module, "version", f.v.version, "error", err)
	}
}

// forbidden makes the Storage do without claims from now on.
func (f *flight) forbidden(ctx context.Context, err error) {
	if !f.s.noClaims.Swap(true) {
		f.s.log.WarnContext(ctx, "the bucket does not permit claims: every machine fetches for itself",
			"module", f.v.module, "version", f.v.version, "error", err)
	}
}

// removeStaleClaim deletes a claim that was listed, if it is stale.
func (s *Storage) removeStaleClaim(ctx context.Context, v version, seen snapshot) error {
	if seen.lock == nil || isFresh(seen.lock, s.now(), s.staleThreshold()/claimFraction) {
		return nil
	}
	err := s.bucket.remove(ctx, v, extLock, ifUnchanged(seen.lock))
	if isRefused(err) {
		return nil // renewed, or taken over
	}
	return err
}
