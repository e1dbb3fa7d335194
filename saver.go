package gcs

import (
	"context"
	"errors"
	"io"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"golang.org/x/sync/errgroup"
)

// Save stores a version: the go.mod file, the zip, and the info file.
//
// It returns nil when this call stored all three, and an error of KindAlreadyExists when
// the version is complete and nothing that this call wrote remains. Either way, all three
// can be read at once. While another save of the version is under way, on whatever
// machine, Save waits for it. It takes the version over when that save fails, or stops
// renewing its marker. Of any number of calls that do not fail, one returns nil. There is
// one exception: another call finishes this save, and the version is deleted before this
// call has its answer. Then this call stores the version again, or returns
// KindAlreadyExists if another save did.
//
// zipMD5 is checked if it is 16 bytes long, and ignored otherwise. A zip that does not
// match it is KindBadRequest, and so is a nil zip. Save does not close zip.
//
// After any other error the next Save can proceed at once. It replaces what this one left
// behind; but if only the last step failed, it does that step, and returns
// KindAlreadyExists. If this call could not reach the bucket for 15 s to give its marker
// up, the next has to wait for the stale threshold, as after a crash.
//
// A zip over 1 MiB (or over the chunk size, if that is less) whose reader is not an
// [io.Seeker] can be sent once. Its save fails if it has to be sent again: the upload did
// not start or broke off, or another save took the version over and failed too.
//
// The zip is read in the caller's goroutine. Save looks at its context between two reads;
// a Read that blocks cannot be interrupted. A hundred reads in a row that return nothing
// are io.ErrNoProgress. A panic in Read goes on after the marker is given up.
//
// Save makes 5 requests for a new version, 3 of them one after another, and 2 at once for
// a complete version (or 3, if it became complete at that moment). A zip in chunks costs
// one request for each, and a long save one renewal in a quarter of the stale threshold.
// Save holds a zip of up to 1 MiB in memory, and one chunk of a larger one. It leaves no
// goroutine behind. It is safe for concurrent use.
func (s *Storage) Save(ctx context.Context, module, version string, mod []byte, zip io.Reader, zipMD5, info []byte) (err error) {
	v := ModuleVersion{module, version}
	ctx, c := s.begin(ctx, "Save", v)
	defer func() {
		err = c.end(err)
		s.telemetry.saves.Add(ctx, 1, metric.WithAttributes(attribute.String("outcome", c.outcome)))
	}()
	if err = s.bucket.check(v); err != nil {
		return err
	}
	if zip == nil {
		return badRequest("zip", errors.New("is nil"))
	}
	g := &saving{s: s, v: v, mod: mod, info: info, waiter: waiter{s: s, v: v}}
	g.zip = newSource(zip, zipMD5, min(maxWhole, s.bucket.chunkSize))
	defer g.waiter.end(ctx)
	err = errPanicked // unless run returns
	c.outcome, err = g.run(ctx)
	return err
}

// A saving is one call of Save.
type saving struct {
	s         *Storage
	v         ModuleVersion
	mod, info []byte
	zip       *source
	waiter    waiter

	lease lease    // on the .mod
	seen  snapshot // the last listing; its .info and .zip are replaced
	found State    // what the version was when this save wrote the .mod
}

// run makes attempts until one of them is not fenced.
func (g *saving) run(ctx context.Context) (outcome string, err error) {
	for {
		g.lease = g.s.newLease(g.v, extMod, g.mod, g.s.staleThreshold())
		err = g.attempt(ctx)
		if !errors.Is(err, errFenced) {
			break
		}
		g.waiter.fenced = true
		g.s.log.WarnContext(ctx, "fenced during a save", "module", g.v.Module, "version", g.v.Version)
	}
	switch {
	case errors.Is(err, errFinished):
		return outcomeFinished, err
	case errors.Is(err, errExists):
		return outcomeExisted, err
	case err != nil:
		return outcomeFailed, err
	case g.found != Absent:
		g.s.log.InfoContext(ctx, "healed a version", "module", g.v.Module, "version", g.v.Version, "found", g.found.String())
		return outcomeHealed, nil
	default:
		return outcomeStored, nil
	}
}

// attempt holds the version, stores .info and .zip, and commits. If one of these
// fails, or panics, it gives the version up.
func (g *saving) attempt(ctx context.Context) (err error) {
	err = errPanicked
	stored := false
	defer func() { err = g.release(ctx, stored, err) }()
	if err := g.hold(ctx); err != nil {
		return err
	}
	if err := g.store(ctx); err != nil {
		return err
	}
	stored = true
	return g.lease.commit(ctx)
}

// hold makes the live .mod this save's own, unless another save is at work, for
// which it waits. It returns errExists when the version is complete.
func (g *saving) hold(ctx context.Context) error {
	held, err := g.create(ctx)
	for refused := 0; !held && err == nil; {
		if g.lease.recover(g.seen.mod) { // a request whose answer was lost wrote it
			return g.confirm(ctx)
		}
		var state State
		var finished bool
		if g.seen, state, finished, err = g.s.resolve(ctx, g.v, g.seen); err != nil {
			return err
		}
		switch {
		case finished:
			return errFinished
		case state == Complete:
			return errExists
		case g.waiter.mustWait(g.seen.mod, state):
			refused = 0
			err = g.waiter.pause(ctx, "save", g.seen.mod, g.s.staleThreshold())
		default: // Absent, Partial, Abandoned
			if err = g.zip.ready(); err == nil {
				held, err = g.takeOver(ctx, state)
			}
			if isPreconditionFailed(err) && refused < maxRefused {
				refused, err = refused+1, nil
			}
		}
		if !held && err == nil {
			g.seen, err = g.s.bucket.look(ctx, g.v)
		}
	}
	return err
}

// create creates the .mod, if there is none, and lists the version at the same
// time: most versions are new, and of most others the listing says that they are
// complete. It reports whether the version is held now.
func (g *saving) create(ctx context.Context) (held bool, err error) {
	if g.waiter.fenced { // the .mod is another's, or was
		g.seen, err = g.s.bucket.look(ctx, g.v)
		return false, err
	}
	var group errgroup.Group
	group.Go(func() error { return g.lease.acquire(ctx, nil) })
	g.seen, err = g.s.bucket.look(ctx, g.v)
	createErr := group.Wait()
	switch {
	case createErr != nil && !isPreconditionFailed(createErr):
		return false, createErr
	case err != nil:
		return false, err
	case createErr == nil:
		return true, g.confirm(ctx)
	case g.seen.mod == nil || g.lease.sent > 0:
		// The listing may be older than what the create met, which may be what an
		// earlier try of it has created.
		g.seen, err = g.s.bucket.look(ctx, g.v)
	}
	return false, err
}

// confirm makes sure that .info and .zip of a listing that ended after the .mod was
// written are leftovers. If the .mod is still this save's own after the listing,
// nobody has taken over before, so they are not a successor's.
func (g *saving) confirm(ctx context.Context) error {
	if g.seen.info == nil && g.seen.zip == nil {
		return nil
	}
	if g.found == Absent {
		g.found = Partial
	}
	return g.lease.isHeld(ctx)
}

// takeOver writes the .mod anew, over what two listings in a row have shown: one can
// miss what comes while it is made, and the version be complete. What they showed is
// older than this save's .mod, so .info and .zip are leftovers.
func (g *saving) takeOver(ctx context.Context, found State) (held bool, err error) {
	again, err := g.s.bucket.look(ctx, g.v)
	if err != nil || !again.equals(g.seen) {
		return false, err
	}
	g.found = found
	if err = g.lease.acquire(ctx, g.seen.mod); err != nil {
		return false, err
	}
	g.s.tookOver(ctx, g.v, "save", g.seen.mod)
	return true, nil
}

// store uploads .info and .zip while it keeps the marker fresh.
func (g *saving) store(ctx context.Context) (err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := g.lease.startRenewing(ctx, cancel, func() { g.s.telemetry.renewalsFailed.Add(ctx, 1) })
	group, uploadCtx := errgroup.WithContext(ctx)
	group.Go(func() error { return g.lease.upload(uploadCtx, extInfo, g.seen.info, bytesSource(g.info)) })
	err = errPanicked
	defer func() {
		if err != nil {
			cancel(err)
		}
		if infoErr := group.Wait(); err != nil || infoErr != nil {
			err = context.Cause(uploadCtx) // the first failure
		}
		stop() // a renewal in flight would be refused, but make the commit ask why
		cancel(nil)
	}()
	return g.lease.upload(uploadCtx, extZip, g.seen.zip, g.zip)
}

// release gives the version up after a failure. It returns the save's error, or nil if
// somebody has found all three objects of this save, and cleared the marker.
func (g *saving) release(ctx context.Context, stored bool, err error) error {
	var releaseErr error
	if err != nil && !errors.Is(err, errCleared) {
		releaseErr = g.lease.release(ctx, stored)
	}
	switch {
	case errors.Is(err, errCleared), errors.Is(releaseErr, errCleared):
		if g.zip.err == nil {
			return nil
		}
	case releaseErr != nil:
		g.s.log.WarnContext(ctx, "could not give a marker up: the next save has to wait until it is stale",
			"module", g.v.Module, "version", g.v.Version, "error", releaseErr)
	}
	return err
}
