package gcs

import (
	"cmp"
	"context"
	"errors"
	"sync"
	"time"

	"cloud.google.com/go/storage"
	"golang.org/x/mod/semver"
)

// A Stasher fetches a version of a module and saves it, and returns the version
// that it saved: a query, such as the name of a branch, is resolved. It is Athens'
// stash.Stasher.
type Stasher interface {
	Stash(ctx context.Context, module, version string) (string, error)
}

// SingleFlight returns a Stasher that calls next once where many want the same
// version at the same time: in this process, and on all machines that share the
// bucket.
//
// Callers of one process share one call, with the values of the first one's
// context. A caller whose context ends stops waiting, and the others do not; the
// call is cancelled when the last of them has gone, and may return after that.
//
// For a version, in contrast to a query, it first looks into the bucket. A
// version that is complete is not fetched again; one that is being saved, or
// fetched by another machine, is waited for. Before next is called, the version is
// claimed, by an object beside its own, <module>/@v/<version>.lock, which is
// renewed and goes stale as the marker of a save does (see
// [Storage.SetStaleThreshold]), and is deleted afterwards. If the holder fails or
// dies, one of those who wait is next; a caller that has waited for the stale
// threshold, while two holders or more failed, waits no more. If claims
// are not permitted, because the caller may not delete objects, the log says so
// once, and each machine fetches for itself.
//
// If next's error says KindAlreadyExists, in an error of this package or of
// Athens, however wrapped, somebody else has saved the version, and the answer is
// the version in that error. Any other error is passed on as it is.
//
// A call costs one request if the version is complete. Otherwise it makes 3 before
// next, and 1 after it.
func (s *Storage) SingleFlight(next Stasher) Stasher {
	return &singleFlight{s: s, next: next, flights: map[version]*flight{}}
}

// singleFlight is the Stasher that SingleFlight returns.
type singleFlight struct {
	s    *Storage
	next Stasher

	mu      sync.Mutex
	flights map[version]*flight
}

// A flight is a call that callers of one process share.
type flight struct {
	callers int // guarded by singleFlight.mu
	cancel  context.CancelFunc
	done    chan struct{} // closed when the result is there
	version string
	err     error
}

func (sf *singleFlight) Stash(ctx context.Context, module, vers string) (string, error) {
	v := version{module, vers}
	ctx, o := sf.s.begin(ctx, "Stash", v)
	if err := ctx.Err(); err != nil {
		return "", o.end(err)
	}
	f := sf.join(ctx, v)
	select {
	case <-f.done:
		o.close(f.err)
		return f.version, f.err
	case <-ctx.Done():
		sf.leave(v, f)
		return "", o.end(ctx.Err())
	}
}

// join returns the flight for the version, and starts one if there is none.
func (sf *singleFlight) join(ctx context.Context, v version) *flight {
	sf.mu.Lock()
	defer sf.mu.Unlock()
	if f := sf.flights[v]; f != nil {
		f.callers++
		return f
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	f := &flight{callers: 1, cancel: cancel, done: make(chan struct{})}
	sf.flights[v] = f
	go func() {
		defer cancel()
		defer func() {
			sf.mu.Lock()
			if sf.flights[v] == f {
				delete(sf.flights, v)
			}
			sf.mu.Unlock()
			close(f.done)
		}()
		f.err = fail(ctx, "Stash", v, errGone) // unless it returns
		f.version, f.err = sf.s.stash(ctx, sf.next, v)
	}()
	return f
}

// errGone is why there is no result of a next that ended its goroutine.
var errGone = errors.New("the stasher did not return")

// leave cancels the flight when nobody waits for it any more. Who comes then
// starts another.
func (sf *singleFlight) leave(v version, f *flight) {
	sf.mu.Lock()
	defer sf.mu.Unlock()
	if f.callers--; f.callers == 0 {
		f.cancel()
		if sf.flights[v] == f {
			delete(sf.flights, v)
		}
	}
}

// stash calls next for a version that is neither complete nor another's to fetch.
func (s *Storage) stash(ctx context.Context, next Stasher, v version) (string, error) {
	if !isVersion(v.version) {
		// Another machine cannot know what it resolves to.
		return fetch(ctx, next, v)
	}
	claim, done, err := s.claim(ctx, v)
	if err != nil {
		return "", fail(ctx, "Stash", v, err)
	}
	if done {
		return v.version, nil
	}
	if claim == nil {
		return fetch(ctx, next, v)
	}
	// Losing the claim is no reason to stop: the work is half done, and Save
	// sorts out who stores the version.
	stop := claim.keep(ctx, func(error) {})
	defer func() {
		stop()
		s.unclaim(ctx, claim)
	}()
	return fetch(ctx, next, v)
}

// fetch calls next, and takes for success that somebody else has succeeded.
func fetch(ctx context.Context, next Stasher, v version) (string, error) {
	saved, err := next.Stash(ctx, v.module, v.version)
	if resolved, ok := alreadyExists(err, v.module); ok {
		if resolved == "" {
			resolved = cmp.Or(saved, v.version)
		}
		return resolved, nil
	}
	return saved, err
}

// isVersion reports whether the go command would ask for this version and no
// other by that name: v1.2.3, or v1.2.3-pre, or v2.0.0+incompatible, but not v1.
func isVersion(vers string) bool {
	return semver.IsValid(vers) && semver.Canonical(vers)+semver.Build(vers) == vers
}

// claim waits until the version is complete, which it reports, or this machine's
// to fetch. The lease it returns is nil if claims are not permitted.
func (s *Storage) claim(ctx context.Context, v version) (claim *lease, done bool, err error) {
	if _, err := newVersion(v.module, v.version); err != nil {
		return nil, false, err
	}
	l := &lease{s: s, v: v, ext: extLock, id: newSaveID()}
	var holder int64 // the generation of the claim that this call waits for,
	holders := 0     // and how many there have been with it
	for start, refused := time.Now(), 0; ; {
		seen, err := s.look(ctx, v)
		if err == nil {
			done, err = s.settle(ctx, v, seen)
		}
		held := l.adopt(seen.lock)
		switch {
		case err != nil || done:
			if held || err != nil {
				s.unclaim(ctx, l)
			} else {
				s.sweep(ctx, v, seen)
			}
			return nil, done, err
		case seen.state(s.now(), s.staleThreshold()) == inProgress:
			// Its saver renews its marker. Waiting with the claim in hand would
			// mean to renew that too.
			refused = 0
			if held {
				s.unclaim(ctx, l)
				l = &lease{s: s, v: v, ext: extLock, id: newSaveID()}
			}
		case held:
			return l, false, nil
		case s.noClaims.Load():
			return nil, false, nil
		case isFresh(seen.lock, s.now(), s.staleThreshold()):
			refused = 0
			if seen.lock.Generation != holder {
				holder = seen.lock.Generation
				holders++
			}
			if holders > 2 && time.Since(start) > s.staleThreshold() {
				return nil, false, nil
			}
		default:
			err := l.take(ctx, nil, seen.lock)
			switch {
			case isForbidden(err):
				s.forbidden(ctx, v, err)
				return nil, false, nil
			case err != nil && (!isRefused(err) || refused == maxRefused):
				s.unclaim(ctx, l)
				return nil, false, err
			case err != nil:
				refused++
			}
			continue // look again: the version may have been stored in between
		}
		if err := s.waitForAnother(ctx, start); err != nil {
			return nil, false, err
		}
	}
}

// unclaim deletes the claim, if it is this holder's, so that others need not
// wait. It outlives the caller's context, by a bounded time.
func (s *Storage) unclaim(ctx context.Context, l *lease) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTimeout)
	defer cancel()
	found, err := l.find(ctx)
	if !found && err == nil {
		return
	}
	if err == nil {
		err = s.remove(ctx, l.v, l.ext, &storage.ObjectAttrs{Generation: l.gen})
	}
	switch {
	case err == nil || isRefused(err):
	case isForbidden(err):
		s.forbidden(ctx, l.v, errors.Join(err, l.giveUp(ctx, false)))
	default:
		s.log.WarnContext(ctx, "could not delete a claim: others have to wait until it is stale",
			"module", l.v.module, "version", l.v.version, "error", err)
	}
}

// forbidden makes this Storage do without claims from now on.
func (s *Storage) forbidden(ctx context.Context, v version, err error) {
	if !s.noClaims.Swap(true) {
		s.log.WarnContext(ctx, "the bucket does not permit claims: every machine fetches for itself",
			"module", v.module, "version", v.version, "error", err)
	}
}

// sweep deletes a stale claim that it meets in a snapshot. Whether it can does not
// matter to the caller.
func (s *Storage) sweep(ctx context.Context, v version, seen snapshot) {
	if seen.lock == nil || isFresh(seen.lock, s.now(), s.staleThreshold()) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	if err := s.remove(ctx, v, extLock, seen.lock); err != nil && !isRefused(err) {
		s.log.DebugContext(ctx, "could not delete a stale claim", "module", v.module, "version", v.version, "error", err)
	}
}
