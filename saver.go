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
// It returns nil when this call stored all three, and an error of
// KindAlreadyExists when the version is complete and nothing that this call wrote
// remains. Either way, all three can be read at once. While another save of the
// version is under way, on whatever machine, Save waits for it. It takes the
// version over when that save fails, or stops renewing its marker and so is
// presumed dead. Of any number of calls that do not fail, one returns nil.
//
// zipMD5 is checked if it is 16 bytes long, and ignored otherwise. A zip that
// does not match it is KindBadRequest, as is a nil zip.
//
// After any other error the version is not complete, except if only the answer to
// the last request was lost. The next Save can proceed at once, and replaces what
// this one left behind; if this one could not reach the bucket for 15 s to give its
// marker up, the next has to wait for the stale threshold, as after a crash.
//
// A zip over 1 MiB (or over the chunk size, if that is less) whose reader is not an
// [io.Seeker] can be sent only once. Its save fails if it has to be sent again:
// because the upload could not be started or broke off for good, or because another
// save took the version over and failed too.
//
// Save makes 5 requests for a new version, 3 of them one after another, and 2 at
// once for a complete version (or 3, if it became complete at that moment). It
// holds a zip of up to 1 MiB in memory, and one chunk of a larger one. It returns
// only after zip's Read has returned, and leaves no goroutine behind.
func (s *Storage) Save(ctx context.Context, module, vers string, mod []byte, zip io.Reader, zipMD5, info []byte) error {
	v, err := newVersion(module, vers)
	ctx, o := s.begin(ctx, "Save", v)
	if err == nil && zip == nil {
		err = badRequest("zip", errors.New("is nil"))
	}
	if err == nil {
		err = ctx.Err()
	}
	if err == nil {
		z := newSource(zip, zipMD5, min(maxWhole, s.chunkSize))
		o.outcome, err = s.save(ctx, v, mod, z, info)
	}
	err = o.end(err)
	s.telemetry.saves.Add(ctx, 1, metric.WithAttributes(attribute.String("outcome", o.outcome)))
	return err
}

// save makes attempts until one of them is not fenced.
func (s *Storage) save(ctx context.Context, v version, mod []byte, z *source, info []byte) (outcome string, err error) {
	for fenced := false; ; fenced = true {
		outcome, err = s.saveOnce(ctx, v, mod, z, info, fenced)
		if !errors.Is(err, errFenced) {
			return outcome, err
		}
		s.log.WarnContext(ctx, "fenced during a save", "module", v.module, "version", v.version)
	}
}

// saveOnce holds the version, stores .info and .zip, and commits.
func (s *Storage) saveOnce(ctx context.Context, v version, mod []byte, z *source, info []byte, fenced bool) (outcome string, err error) {
	h, err := s.hold(ctx, v, mod, z, fenced)
	if err == nil {
		err = h.complete(ctx, z, info)
	}
	if err == nil {
		s.sweep(ctx, v, h.seen)
	}
	switch {
	case errors.Is(err, errFinished):
		return outcomeFinished, err
	case errors.Is(err, errExists):
		return outcomeExisted, err
	case err != nil:
		return outcomeFailed, err
	case h.before != absent:
		s.log.InfoContext(ctx, "healed a version", "module", v.module, "version", v.version, "found", h.before.String())
		return outcomeTookOver, nil
	default:
		return outcomeStored, nil
	}
}

// A holding is a save that holds its version: the live .mod is its own, and
// carries its marker.
type holding struct {
	lease
	seen   snapshot // the last listing; its .info and .zip are what this save replaces
	before state    // what the version was before this save
}

// maxRefused is how often in a row a save takes a refused condition for
// somebody else's doing.
const maxRefused = 10

// errSpent is why a fenced save can end without a verdict.
var errSpent = errors.New("the version was taken over or deleted meanwhile, and the zip cannot be read again")

// hold writes the .mod with this save's marker, unless another save is at work
// on the version, for which it waits. It returns errExists when the version is
// complete. fenced says that this call has held the version before.
func (s *Storage) hold(ctx context.Context, v version, mod []byte, z *source, fenced bool) (*holding, error) {
	h := &holding{lease: lease{s: s, v: v, ext: extMod, id: newSaveID()}}
	if held, err := h.create(ctx, mod, z); held || err != nil {
		return h, err
	}
	start, refused := time.Now(), 0
	var last *storage.ObjectAttrs // the .mod as it was last seen to change,
	var changed time.Time         // when,
	var sightings int             // and how often it has been seen so
	for {
		if sightings++; sightings == 1 || !sameObject(last, h.seen.mod) {
			last, changed, sightings = h.seen.mod, time.Now(), 1
		}
		if h.adopt(h.seen.mod) { // written by a request whose answer was lost
			return h, nil
		}
		h.tries = 0 // none of which was applied
		h.before = h.seen.state(s.now(), s.staleThreshold())
		if h.before == abandoned && fenced && !isGivenUp(last) && time.Since(changed) < s.staleThreshold() {
			// Whoever fenced this save was alive, though by this machine's clock
			// or threshold he is not. Two that took over from each other at once
			// would never end.
			h.before = inProgress
		}
		var err error
		switch {
		case h.before == complete:
			return nil, errExists

		case h.before == inProgress:
			refused = 0
			if err := s.waitForAnother(ctx, start); err != nil {
				return nil, err
			}

		case h.before == unfinished:
			if err = s.finish(ctx, v, h.seen); err == nil {
				return nil, errFinished
			}

		case !z.ready():
			return nil, errSpent

		case h.seen.mod != nil && sightings == 1:
			// What a listing does not show may have come while it was made,
			// and the version be complete. If so, the .mod has changed.

		default: // absent, partial, abandoned
			if err = h.take(ctx, mod, h.seen.mod); err == nil {
				return h, h.lookAtLeftovers(ctx)
			}
		}
		if err != nil {
			if refused++; !isRefused(err) && !isAbsent(err) || refused > maxRefused {
				return nil, h.giveUpAfter(ctx, err, false)
			}
		}
		if h.seen, err = s.look(ctx, v); err != nil {
			return nil, h.giveUpAfter(ctx, err, false)
		}
	}
}

// waitForAnother pauses until it is worth looking again, for one who has waited
// for another's save since start.
func (s *Storage) waitForAnother(ctx context.Context, start time.Time) error {
	now := time.Now()
	defer func() { s.telemetry.waited.Add(ctx, time.Since(now).Seconds()) }()
	return sleep(ctx, s.pollPause(now.Sub(start)))
}

// complete does what is left to do when the version is held.
func (h *holding) complete(ctx context.Context, z *source, info []byte) error {
	if err := h.store(ctx, z, info); err != nil {
		return h.giveUpAfter(ctx, err, false)
	}
	if err := h.commit(ctx); err != nil {
		return h.giveUpAfter(ctx, err, true)
	}
	return nil
}

// create creates the .mod, if there is none, and lists the version at the same
// time: most versions are new, and of most others the listing says that they are
// complete. It reports whether the version is held now.
func (h *holding) create(ctx context.Context, mod []byte, z *source) (held bool, err error) {
	if !z.ready() {
		h.seen, err = h.s.look(ctx, h.v)
		return false, err
	}
	var group errgroup.Group
	group.Go(func() error { return h.take(ctx, mod, nil) })
	h.seen, err = h.s.look(ctx, h.v)
	createErr := group.Wait()
	switch {
	case createErr == nil && err == nil:
		if !h.seen.empty() && !h.holds(h.seen.mod) {
			err = h.lookAtLeftovers(ctx)
		}
		if h.seen.info != nil || h.seen.zip != nil {
			h.before = partial
		}
		return true, err
	case isRefused(createErr) && err == nil:
		// The listing may have come before what the create met, which can be
		// what an earlier try of it has created.
		if h.seen.mod == nil || h.tries > 1 {
			h.seen, err = h.s.look(ctx, h.v)
		}
	case createErr != nil && !isRefused(createErr):
		err = createErr
	}
	if err != nil {
		return false, h.giveUpAfter(ctx, err, false)
	}
	return false, nil
}

// lookAtLeftovers takes the snapshot whose .info and .zip are replaced. It is
// good for that only if the .mod in it is this save's: what is there was then
// written by earlier holders, not by one who has taken over since.
func (h *holding) lookAtLeftovers(ctx context.Context) error {
	seen, err := h.s.look(ctx, h.v)
	if err != nil {
		return h.giveUpAfter(ctx, err, false)
	}
	h.seen = seen
	if !h.holds(seen.mod) {
		return errFenced
	}
	return nil
}

// store uploads .info and .zip while it keeps the marker fresh.
func (h *holding) store(ctx context.Context, z *source, info []byte) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := h.keep(ctx, cancel)
	group, groupCtx := errgroup.WithContext(ctx)
	group.Go(func() error { return h.place(groupCtx, extZip, h.seen.zip, z) })
	group.Go(func() error { return h.place(groupCtx, extInfo, h.seen.info, bytesSource(info)) })
	err := group.Wait()
	stop() // a renewal still on its way would be refused, but make the commit ask why
	if errors.Is(context.Cause(ctx), errFenced) {
		return errFenced
	}
	return err
}

// place uploads one object, over old or whatever it finds in its stead. That can
// be an object of a save that was thought dead, or of a request of this save
// whose answer was lost.
func (h *holding) place(ctx context.Context, ext string, old *storage.ObjectAttrs, z *source) error {
	if err := z.load(); err != nil {
		return err
	}
	metadata := map[string]string{keySaveID: h.id, keyGeneration: formatGeneration(h.gen)}
	for refused := 0; ; refused++ {
		err := h.s.send(ctx, h.v, ext, onlyOver(old), metadata, z)
		if err == nil || ctx.Err() != nil || z.err != nil {
			return err
		}
		if !isRefused(err) && !isTransient(err) && !errors.Is(err, errHung) {
			return err
		}
		seen, lookErr := h.s.look(ctx, h.v)
		if lookErr != nil {
			return lookErr
		}
		if !h.holds(seen.mod) {
			return errFenced
		}
		now := *seen.slot(ext)
		if now != nil && now.Metadata[keySaveID] == h.id && now.Size == z.size {
			return nil
		}
		if !z.ready() || refused == maxRefused || isRefused(err) && sameObject(old, now) {
			return err
		}
		old = now
	}
}

// giveUpAfter gives the version up and returns err. A version that turns out to be
// complete, with all that this save stored, has not failed.
func (h *holding) giveUpAfter(ctx context.Context, err error, stored bool) error {
	if errors.Is(err, errFenced) {
		return err
	}
	giveUpErr := h.giveUp(ctx, stored)
	if stored && errors.Is(giveUpErr, errReleased) {
		return nil
	}
	if giveUpErr != nil && !errors.Is(giveUpErr, errReleased) {
		h.s.log.WarnContext(ctx, "could not give a marker up: the next save has to wait until it is stale",
			"module", h.v.module, "version", h.v.version, "error", giveUpErr)
	}
	return err
}

// pollPause is how long a save that has waited so long for another waits until
// it looks again. Most saves take a fraction of a second; of a long one, nobody
// wants to be told late, and a request a second for all who wait would be many.
func (s *Storage) pollPause(waited time.Duration) time.Duration {
	pause := max(waited, 100*time.Millisecond)
	if waited > 1500*time.Millisecond {
		pause = min(max(waited/10, 1600*time.Millisecond), 2*time.Second)
	}
	return pause - s.rand(pause/20)
}
