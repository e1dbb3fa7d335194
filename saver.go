package gcs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"cloud.google.com/go/storage"
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
// renewing its marker. Of any number of concurrent calls at most one returns nil, and
// exactly one if none of them fails.
//
// A save is fenced when another one takes the version over, or the version is deleted,
// while it is under way. A fenced save waits for its successor: it returns
// KindAlreadyExists if that one completes the version. If the successor fails, or does not
// change the .mod for the stale threshold, or if the version was deleted, the error is
// KindUnexpected and says so.
//
// zipMD5 is checked if it is 16 bytes long, and ignored otherwise. A zip that does not
// match it is KindBadRequest, and so is a nil zip. Save reads a zip of up to 1 MiB, and
// the first MiB of a larger one, before it writes anything. Save does not close zip.
//
// After any other error the next Save can proceed at once. It replaces what this one left
// behind; but if only the last step failed, it does that step, and returns
// KindAlreadyExists. If this call could not reach the bucket for 15 s to give its marker
// up, the next has to wait for the stale threshold, as after a crash.
//
// A zip over 1 MiB (or over the chunk size, if that is less) whose reader is not an
// [io.Seeker] can be sent once. Its save fails if it has to be sent again: the upload did
// not start or broke off.
//
// The zip is read in the caller's goroutine. Save looks at its context between two reads;
// a Read that blocks cannot be interrupted. A reader that returns nothing a hundred times
// in a row fails with io.ErrNoProgress. When Read panics, Save gives its marker up first.
//
// Save makes 4 requests for a new version, 3 of them one after another, and 2 for a
// complete version. A zip over 1 MiB costs one request more, if it can be sent only once,
// and one for each chunk, if there are several. A long save costs one renewal in a
// quarter of the stale threshold. Save holds a zip of up to 1 MiB in memory, and one chunk
// of a larger one. It leaves no goroutine behind. It is safe for concurrent use.
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
	err = errPanicked // unless run returns
	g := &saving{s: s, v: v, info: info, waiter: waiter{s: s, v: v}}
	g.zip = newSource(zip, zipMD5, min(maxBuffered, s.bucket.chunkSize))
	g.lease = s.newLease(v, extMod, mod, s.staleThreshold())
	defer g.waiter.end(ctx)
	c.outcome, err = g.run(ctx)
	return err
}

// A saving is one call of Save.
type saving struct {
	s      *Storage
	v      ModuleVersion
	info   []byte
	zip    *source
	waiter waiter

	lease    lease // on the .mod
	tookOver State // what the version was when this save wrote the .mod
	stored   bool  // .info and .zip are this save's own
	// leftovers are the .info and .zip to replace. While these are uploaded, the
	// goroutine of each changes its own.
	leftovers snapshot
}

// run reads the head of the zip before anything is written.
func (g *saving) run(ctx context.Context) (outcome string, err error) {
	if err = g.zip.load(ctx); err == nil {
		err = g.write(ctx)
	}
	switch {
	case errors.Is(err, errFinished):
		return outcomeFinished, err
	case errors.Is(err, errExists):
		return outcomeExisted, err
	case err != nil:
		return outcomeFailed, err
	case g.tookOver == Absent && g.leftovers.empty():
		return outcomeStored, nil
	}
	g.s.log.InfoContext(ctx, "healed a version", "module", g.v.Module, "version", g.v.Version,
		"found", max(g.tookOver, Partial).String())
	return outcomeHealed, nil
}

// write makes the steps of the save. If one of them fails, or panics, it gives the
// version up.
func (g *saving) write(ctx context.Context) (result error) {
	result = errPanicked
	defer func() { result = g.release(ctx, result) }()
	if err := g.acquire(ctx); err != nil {
		return err
	}
	err := g.store(ctx)
	if err == nil {
		g.stored = true
		err = g.lease.commit(ctx)
	}
	if errors.Is(err, errFenced) {
		g.s.log.WarnContext(ctx, "fenced during a save", "module", g.v.Module, "version", g.v.Version)
		return g.awaitSuccessor(ctx)
	}
	return err
}

// acquire makes the live .mod this save's own, unless another save is at work, for
// which it waits. It fails as look does when the version is complete.
func (g *saving) acquire(ctx context.Context) error {
	if err := g.lease.acquire(ctx, nil); !isPreconditionFailed(err) && !isForbidden(err) {
		return err // nil for most versions, which are new
	}
	for refused := 0; ; {
		seen, state, err := g.look(ctx)
		switch {
		case err != nil:
			return err
		case g.lease.adopt(seen.mod): // a request whose answer was lost wrote it
			return nil
		case state == InProgress:
			refused = 0
			if err = g.waiter.pause(ctx, "save", seen.mod, g.s.staleThreshold()); err != nil {
				return err
			}
		default: // Absent, Partial, Abandoned
			if err = g.takeOver(ctx, seen, state); !isPreconditionFailed(err) || refused == maxRefused {
				return err
			}
			refused++
		}
	}
}

// look lists the version. It returns errFinished if it has done the last step of another
// save, and errExists if the version was complete already.
func (g *saving) look(ctx context.Context) (seen snapshot, state State, err error) {
	seen, state, finished, err := g.s.settle(ctx, g.v, nil)
	switch {
	case err != nil:
	case finished:
		err = errFinished
	case state == Complete:
		err = errExists
	}
	return seen, state, err
}

// takeOver writes the .mod anew, over what two listings in a row have shown: one can
// miss what comes while it is made, and the version be complete. What they showed is
// older than this save's .mod, so .info and .zip are leftovers.
func (g *saving) takeOver(ctx context.Context, seen snapshot, state State) error {
	if err := g.s.bucket.confirm(ctx, g.v, seen); err != nil {
		return err
	}
	g.tookOver, g.leftovers = state, seen // the answer to acquire may be lost
	err := g.lease.acquire(ctx, seen.mod)
	if err == nil {
		g.s.tellTakeover(ctx, g.v, "save", seen.mod)
	}
	return err
}

// store uploads .info and .zip while it keeps the marker fresh.
func (g *saving) store(caller context.Context) (err error) {
	ctx, cancel := context.WithCancelCause(caller)
	stop := g.lease.startRenewing(ctx, cancel, func() { g.s.telemetry.renewalsFailed.Add(ctx, 1) })
	group, uploadCtx := errgroup.WithContext(ctx)
	group.Go(func() error { return g.lease.upload(uploadCtx, extInfo, &g.leftovers.info, bytesSource(g.info)) })
	err = errPanicked
	defer func() {
		if err != nil {
			cancel(err)
		}
		if infoErr := group.Wait(); err != nil || infoErr != nil {
			// Why the caller's context ended may be the error of another save.
			err = cmp.Or(caller.Err(), context.Cause(uploadCtx)) // the first failure
		}
		stop() // a renewal in flight would be refused, but make the commit ask why
		cancel(nil)
	}()
	return g.lease.upload(uploadCtx, extZip, &g.leftovers.zip, g.zip)
}

// awaitSuccessor waits for the save that fenced this one, as long as its .mod is there,
// is not given up, and changes. This save never takes over again: two calls that each
// think the other dead would do so for ever.
func (g *saving) awaitSuccessor(ctx context.Context) error {
	for last, changed := (*storage.ObjectAttrs)(nil), time.Now(); ; {
		seen, state, err := g.look(ctx)
		if !sameObject(last, seen.mod) {
			last, changed = seen.mod, time.Now()
		}
		m, marked := readMarker(seen.mod)
		switch {
		case err != nil:
			return err
		case seen.mod == nil || marked && m.isGivenUp() || time.Since(changed) >= g.s.staleThreshold():
			return fmt.Errorf("%w; it is %v now", errFenced, state)
		}
		if err := g.waiter.pause(ctx, "save", seen.mod, g.s.staleThreshold()); err != nil {
			return err
		}
	}
}

// release gives the version up after a failure, unless it is complete. It returns the
// save's error, or that of the zip alone, if any, if somebody has found all three objects
// of this save, and cleared the marker.
func (g *saving) release(ctx context.Context, err error) error {
	if err == nil || errors.Is(err, errExists) || errors.Is(err, errFinished) {
		return err
	}
	releaseErr := err
	if !errors.Is(err, errCommitted) {
		releaseErr = g.lease.release(ctx, g.stored)
	}
	if errors.Is(releaseErr, errCommitted) {
		return g.zip.err
	}
	if releaseErr != nil {
		g.s.log.WarnContext(ctx, "could not give a marker up: the next save has to wait until it is stale",
			"module", g.v.Module, "version", g.v.Version, "error", releaseErr)
	}
	return err
}
