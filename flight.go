package gcs

import (
	"context"
	"errors"
	"time"

	"cloud.google.com/go/storage"
)

// claimsRetry is how long a Storage does without claims that it may not create.
const claimsRetry = 10 * time.Minute

// A flight is one machine's way to fetch a version, or to wait for who does.
type flight struct {
	s       *Storage
	v       ModuleVersion
	waiter  waiter
	lease   lease                // on the claim
	awaited *storage.ObjectAttrs // the claim that was last seen to be another's
}

// await waits until the version is complete, or this flight's to fetch: with a
// claim that it holds, or without one.
func (f *flight) await(ctx context.Context) (held, complete bool, err error) {
	if err := f.s.bucket.check(f.v); err != nil {
		return false, false, err
	}
	f.lease = f.s.newLease(f.v, extClaim, nil, f.s.claimThreshold())
	// Whoever asks has just missed the version in the bucket. The look comes after the
	// claim: whoever held the claim before may have stored the version.
	err = f.acquire(ctx, nil)
	for refused := 0; ; {
		if isPreconditionFailed(err) && refused < maxRefused {
			refused, err = refused+1, nil
		}
		var seen snapshot
		if err == nil {
			seen, complete, err = f.s.isComplete(ctx, f.v, nil)
		}
		if err != nil || complete {
			f.cleanUp(ctx, seen, complete)
			return false, complete, err
		}
		held := f.lease.adopt(seen.claim)
		switch {
		case f.s.classify(seen) == InProgress:
			// Its saver renews its marker. To wait with a claim would mean to renew
			// that too.
			if held {
				f.deleteClaim(ctx)
			} else if seen.claim != nil { // its saver's, as a rule
				f.awaited = seen.claim
			}
			err = f.waiter.pause(ctx, "save", seen.mod, f.s.staleThreshold())
		case held:
			return true, false, nil
		case f.s.noClaims.Load() || f.holderFailed(seen.claim):
			return false, false, nil
		case isFresh(seen.claim, f.s.now(), f.s.claimThreshold()):
			f.awaited = seen.claim
			err = f.waiter.pause(ctx, "fetch", seen.claim, f.s.claimThreshold())
		default:
			err = f.acquire(ctx, seen.claim)
		}
	}
}

// holderFailed reports whether the claim that this flight waited for is gone, or
// another's, without having gone stale.
func (f *flight) holderFailed(now *storage.ObjectAttrs) bool {
	return f.awaited != nil && (now == nil || now.Generation != f.awaited.Generation) &&
		isFresh(f.awaited, f.s.now(), f.s.claimThreshold())
}

// acquire claims the version, over a claim that is stale. If claims are not
// permitted, it makes this Storage do without them for a while.
func (f *flight) acquire(ctx context.Context, stale *storage.ObjectAttrs) error {
	if f.s.noClaims.Load() {
		return nil
	}
	err := f.lease.acquire(ctx, stale)
	switch {
	case isForbidden(err):
		if f.forbid(ctx, err) {
			time.AfterFunc(claimsRetry, func() { f.s.noClaims.Store(false) })
		}
		return nil
	case err == nil:
		f.s.tellTakeover(ctx, f.v, "fetch", stale)
	}
	return err
}

// cleanUp leaves no claim behind: neither this flight's, nor a stale one that it met.
// A claim that may still arrive beside a complete version delays nobody.
func (f *flight) cleanUp(ctx context.Context, seen snapshot, complete bool) {
	if f.lease.adopt(seen.claim) || !complete && f.lease.unanswered > 0 {
		f.deleteClaim(ctx)
		return
	}
	if err := f.s.removeStaleClaim(ctx, f.v, seen); err != nil {
		f.s.log.DebugContext(ctx, "could not delete a stale claim", "module", f.v.Module, "version", f.v.Version, "error", err)
	}
}

// deleteClaim deletes this flight's claim, so that others need not wait. It outlives
// ctx, by a bounded time.
func (f *flight) deleteClaim(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTimeout)
	defer cancel()
	l := f.lease.insistent()
	held, err := l.fenceLateAcquire(ctx, newSaveID())
	if held && err == nil {
		cond := storage.Conditions{GenerationMatch: l.gen}
		if err = f.s.bucket.remove(ctx, f.v, extClaim, cond); err != nil && !isForbidden(err) {
			err = l.b.remove(ctx, f.v, extClaim, cond)
		}
	}
	switch {
	case err == nil || isPreconditionFailed(err):
	case isForbidden(err): // for good: each claim would stay
		f.forbid(ctx, errors.Join(err, l.release(ctx, false)))
	default:
		f.s.log.WarnContext(ctx, "could not delete a claim: others have to wait until it is stale",
			"module", f.v.Module, "version", f.v.Version, "error", err)
	}
}

// forbid makes the Storage do without claims from now on. It reports whether the
// Storage has used them so far.
func (f *flight) forbid(ctx context.Context, err error) bool {
	used := !f.s.noClaims.Swap(true)
	if used {
		f.s.log.WarnContext(ctx, "the bucket does not permit claims: every machine fetches for itself",
			"module", f.v.Module, "version", f.v.Version, "error", err)
	}
	return used
}
