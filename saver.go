package gcs

import (
	"context"
	"errors"
	"io"
	"time"

	"cloud.google.com/go/storage"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"golang.org/x/sync/errgroup"
)

// Save stores a version: the go.mod file, the zip, and the info file.
//
// It returns nil when this call stored all three, and an error of KindAlreadyExists
// when the version is complete and nothing that this call wrote remains. Either
// way, all three can be read at once. While another save of the version is under
// way, on whatever machine, Save waits for it. It takes the version over when that
// save fails, or stops renewing its marker. Of any number of calls that do not
// fail, one returns nil. There is one exception. Another call finishes this save, and
// the version is deleted before this call has its answer. Then this call stores the
// version again, or returns KindAlreadyExists if another save did.
//
// zipMD5 is checked if it is 16 bytes long, and ignored otherwise. A zip that does
// not match it is KindBadRequest, and so is a nil zip. Save does not close zip.
//
// After any other error the next Save can proceed at once. It replaces what this one
// left behind; but if only the last step failed, it does that step, and returns
// KindAlreadyExists. If this call could not reach the bucket for 15 s to give its
// marker up, the next has to wait for the stale threshold, as after a crash.
//
// A zip over 1 MiB (or over the chunk size, if that is less) whose reader is not an
// [io.Seeker] can be sent once. Its save fails if it has to be sent again: because
// the upload could not be started or broke off for good, or because another save
// took the version over and failed too.
//
// The zip is read in the caller's goroutine. Between two reads Save looks at its
// context; a Read that blocks cannot be interrupted. A hundred reads in a row that
// return nothing are io.ErrNoProgress. If Read panics, the marker is given up, and
// the panic goes on.
//
// Save makes 5 requests for a new version, 3 of them one after another, and 2 at
// once for a complete version (or 3, if it became complete at that moment). A zip
// that is sent in chunks costs one request for each. A save that takes longer costs
// one renewal in a quarter of the stale threshold. Save holds a zip of up to 1 MiB
// in memory, and one chunk of a larger one. It leaves no goroutine behind. It is safe
// for concurrent use.
func (s *Storage) Save(ctx context.Context, module, version string, mod []byte, zip io.Reader, zipMD5, info []byte) (err error) {
	v := ModuleVersion{module, version}
	ctx, c := s.begin(ctx, "Save", v)
	defer func() {
		err = c.end(err)
		s.telemetry.saves.Add(ctx, 1, metric.WithAttributes(attribute.String("outcome", c.outcome)))
	}()
	err = s.bucket.check(v)
	if err == nil && zip == nil {
		err = badRequest("zip", errors.New("is nil"))
	}
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return err
	}
	g := &saving{s: s, v: v, mod: mod, info: info, waiter: waiter{s: s, v: v}}
	g.zip = newSource(zip, zipMD5, min(maxWhole, s.bucket.chunkSize))
	defer g.waiter.end(ctx)
	err = errPanicked // unless run returns
	c.outcome, err = g.run(ctx)
	return err
}

var (
	errExists   error = kindError{KindAlreadyExists, errors.New("the version is stored already")}
	errFinished error = kindError{KindAlreadyExists, errors.New("the version was stored, but for the last step")}
	// errCannotReread is why a fenced save can end without having stored anything.
	errCannotReread = errors.New("the version was taken over or deleted meanwhile, and the zip cannot be read again")
	// errPanicked stands for the error of a step that has not returned.
	errPanicked = errors.New("the zip's reader panicked")
)

// A saving is one call of Save.
type saving struct {
	s         *Storage
	v         ModuleVersion
	mod, info []byte
	zip       *source
	waiter    waiter

	lease   lease                // on the .mod
	seen    snapshot             // the last listing; its .info and .zip are replaced
	found   State                // what the version was when this save wrote the .mod
	fenced  bool                 // this call has held the version before
	last    *storage.ObjectAttrs // the .mod as it was last seen to change
	changed time.Time            // when
}

// run makes attempts until one of them is not fenced.
func (g *saving) run(ctx context.Context) (outcome string, err error) {
	for {
		g.lease = g.s.newLease(g.v, extMod, g.mod, g.s.staleThreshold())
		err = g.attempt(ctx)
		if !errors.Is(err, errFenced) {
			break
		}
		g.fenced = true
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
		case state == InProgress || g.mustWait():
			refused = 0
			err = g.waiter.pause(ctx, "save", g.seen.mod, g.s.staleThreshold())
		case !g.zip.ready():
			return errCannotReread
		default: // Absent, Partial, Abandoned
			held, err = g.takeOver(ctx, state)
			if isRefused(err) && refused < maxRefused {
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
	if g.fenced { // the .mod is another's, or was
		g.seen, err = g.s.bucket.look(ctx, g.v)
		return false, err
	}
	var group errgroup.Group
	group.Go(func() error { return g.lease.acquire(ctx, nil) })
	g.seen, err = g.s.bucket.look(ctx, g.v)
	createErr := group.Wait()
	switch {
	case createErr != nil && !isRefused(createErr):
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

// takeOver writes the .mod anew, over what was listed. A listing can miss what
// comes while it is made, and the version be complete. So two in a row have to show
// the same. What they showed is older than this save's .mod, so .info and .zip
// are leftovers.
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

// mustWait reports whether to believe a marker that looks stale. Two saves that
// each think the other dead would take over from each other for ever. So a save
// that was fenced waits until the .mod has not changed for the threshold.
func (g *saving) mustWait() bool {
	if !sameObject(g.last, g.seen.mod) {
		g.last, g.changed = g.seen.mod, time.Now()
	}
	m, _ := readMarker(g.seen.mod)
	return g.fenced && !m.isGivenUp() && time.Since(g.changed) < g.s.staleThreshold()
}

// store uploads .info and .zip while it keeps the marker fresh.
func (g *saving) store(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := g.lease.startRenewing(ctx, cancel, func() { g.s.telemetry.renewalsFailed.Add(ctx, 1) })
	var group errgroup.Group
	returned := false
	defer func() {
		if !returned {
			cancel(errPanicked)
		}
		group.Wait()
		stop() // a renewal in flight would be refused, but make the commit ask why
		cancel(nil)
	}()
	upload := func(ext string, old *storage.ObjectAttrs, z *source) error {
		err := g.lease.upload(ctx, ext, old, z)
		if err != nil {
			cancel(err)
		}
		return err
	}
	group.Go(func() error { return upload(extInfo, g.seen.info, bytesSource(g.info)) })
	zipErr := upload(extZip, g.seen.zip, g.zip)
	returned = true
	if group.Wait() != nil || zipErr != nil {
		return context.Cause(ctx) // the first failure
	}
	return nil
}

// release gives the version up after a failure, and returns the error of the save.
// If the marker is cleared, somebody found all three objects of this save and has
// finished it: the save has not failed.
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
