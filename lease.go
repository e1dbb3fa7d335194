package gcs

import (
	"context"
	"errors"
	"time"

	"cloud.google.com/go/storage"
)

const (
	// renewals is how often a holder renews its marker within the stale threshold,
	// so that a few may fail before anybody takes over.
	renewals = 4
	// updateInterval is the least time between two metadata updates of one object.
	// https://cloud.google.com/storage/quotas#objects
	updateInterval = time.Second
	// releaseTimeout bounds a release, which outlives the caller's context.
	releaseTimeout = 15 * time.Second
)

var (
	// errFenced means that the object is no longer the lease's own. Nothing that
	// this holder sends can change it.
	errFenced = errors.New("fenced: somebody else has taken the version over or deleted it")
	// errCleared means that the marker is gone from the lease's own object: the
	// version is committed.
	errCleared = errors.New("the marker is already cleared")
)

// A lease is the right to finish what a marked object stands for. Whoever wrote
// the live generation of the object holds it. Every change of the object is
// conditional on that generation and on the last known metageneration, so a holder
// that lost its lease can change nothing, whether it knows or not.
//
// Between startRenewing and the return of stop, only the goroutine of the renewals
// changes a lease. Others may upload beside it.
type lease struct {
	b         *bucket
	v         ModuleVersion
	ext       string // of the marked object
	id        string
	body      []byte // of the marked object
	now       func() time.Time
	threshold time.Duration

	over    *storage.ObjectAttrs // what acquire was to replace
	sent    int                  // requests to write the object; 0 when none can still arrive
	gen     int64                // of the object that is held, 0 for none
	metagen int64                // the last known
	renewed time.Time            // when the last renewal ended, by the monotonic clock
	found   *storage.ObjectAttrs // what is there in its stead
}

// acquire writes the object with this holder's marker, if it is still the one
// seen, or still absent.
func (l *lease) acquire(ctx context.Context, seen *storage.ObjectAttrs) error {
	l.over, l.gen = seen, 0
	attrs, err := l.b.put(ctx, l.v, l.ext, ifUnchanged(seen), func() map[string]string {
		l.sent++
		return marked(l.now(), l.id)
	}, l.body)
	switch {
	case err == nil:
		l.gen, l.metagen = attrs.Generation, attrs.Metageneration
	case (isPreconditionFailed(err) || isForbidden(err)) && l.sent == 1:
		l.sent = 0 // nothing is on its way
	}
	return err
}

// recover makes the lease hold the object if a request of this holder wrote it,
// which it reports.
func (l *lease) recover(attrs *storage.ObjectAttrs) bool {
	if attrs == nil || attrs.Metadata[keySaveID] != l.id {
		return false
	}
	l.gen, l.metagen = attrs.Generation, attrs.Metageneration
	return true
}

// holds reports whether the object is the one that the lease is for.
func (l *lease) holds(attrs *storage.ObjectAttrs) bool {
	return attrs != nil && attrs.Generation == l.gen
}

// isHeld reads the object and returns errFenced unless it is still the lease's own.
func (l *lease) isHeld(ctx context.Context) error {
	attrs, err := l.b.attrs(ctx, l.v, l.ext)
	if err == nil && !l.holds(attrs) {
		err = errFenced
	}
	return err
}

// change makes a request that changes the object's metadata. It returns errFenced
// if the lease is lost and errCleared if the marker is gone, whoever cleared it.
func (l *lease) change(ctx context.Context, request func(storage.Conditions) (*storage.ObjectAttrs, error)) error {
	for {
		attrs, err := request(storage.Conditions{GenerationMatch: l.gen, MetagenerationMatch: l.metagen})
		if err == nil {
			l.metagen = attrs.Metageneration
		}
		if !isPreconditionFailed(err) && !isAbsent(err) {
			return err
		}
		// Another has changed the object, or an earlier request of this holder
		// was applied although its answer was lost.
		attrs, readErr := l.b.attrs(ctx, l.v, l.ext)
		_, marked := readMarker(attrs)
		switch {
		case readErr != nil:
			return readErr
		case !l.holds(attrs):
			l.found = attrs
			return errFenced
		case !marked:
			return errCleared
		case attrs.Metageneration == l.metagen:
			return err // the condition holds: it was refused for another reason
		}
		l.metagen = attrs.Metageneration
	}
}

// mark replaces the marker.
func (l *lease) mark(ctx context.Context, t time.Time, id string) error {
	return l.change(ctx, func(cond storage.Conditions) (*storage.ObjectAttrs, error) {
		return l.b.update(ctx, l.v, l.ext, cond, marked(t, id))
	})
}

// commit clears the marker. It returns errCleared if that is done already: by a request
// whose answer was lost, or by one who found the version unfinished.
func (l *lease) commit(ctx context.Context) error {
	// GCS refuses a second metadata update within the second.
	if err := sleep(ctx, updateInterval-time.Since(l.renewed)); err != nil {
		return err
	}
	return l.change(ctx, func(cond storage.Conditions) (*storage.ObjectAttrs, error) {
		return l.b.clear(ctx, l.v, l.ext, cond)
	})
}

// startRenewing renews the marker until stop is called, which waits for a renewal
// in flight. It calls lost with errFenced or errCleared when there is nothing to renew
// any more, and failed after a renewal that failed for another reason.
func (l *lease) startRenewing(ctx context.Context, lost context.CancelCauseFunc, failed func()) (stop func()) {
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		interval := max(l.threshold/renewals, updateInterval)
		due := time.NewTimer(interval)
		defer due.Stop()
		for {
			select {
			case <-due.C:
			case <-quit:
			case <-ctx.Done():
			}
			select {
			case <-quit: // comes first
				return
			default:
			}
			if ctx.Err() != nil {
				return
			}
			began := time.Now()
			switch err := l.renew(ctx); {
			case errors.Is(err, errFenced), errors.Is(err, errCleared):
				lost(err)
				return
			case err != nil && ctx.Err() == nil:
				failed()
			}
			due.Reset(max(interval-time.Since(began), updateInterval))
		}
	}()
	return func() {
		close(quit)
		<-done
	}
}

// renew leaves time for a second try, or to read back why the first was refused.
func (l *lease) renew(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*requestTimeout)
	defer cancel()
	err := l.mark(ctx, l.now(), l.id)
	l.renewed = time.Now()
	return err
}

// release gives the lease up, so that the next holder can proceed at once. It
// outlives ctx, by a bounded time. It returns errCleared if the version turns out
// to be committed.
//
// keepID says that everything but the commit was done: the next save commits.
// Otherwise the marker gets a new id, so that a request of this holder that is
// still on its way cannot complete what its caller was told has failed.
func (l *lease) release(ctx context.Context, keepID bool) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTimeout)
	defer cancel()
	id := newSaveID()
	if keepID {
		id = l.id
	}
	if held, err := l.fenceLateAcquire(ctx, id); !held || err != nil {
		return err
	}
	for {
		if err := l.mark(ctx, givenUp, id); !errors.Is(err, errFenced) {
			return err
		}
		// Somebody may have removed the object, and a create of this lease have
		// arrived after that.
		if !l.recover(l.found) {
			return nil
		}
	}
}

// fenceLateAcquire brings a lease up to date whose acquire was not answered, and
// reports whether it holds the object. If what acquire was to replace is still there,
// its request can still arrive. So fenceLateAcquire replaces it, with an object that
// is given up and that nobody holds: then that request is refused.
func (l *lease) fenceLateAcquire(ctx context.Context, id string) (held bool, err error) {
	for l.gen == 0 && l.sent > 0 {
		attrs, err := l.b.attrs(ctx, l.v, l.ext)
		if err != nil || l.recover(attrs) {
			return err == nil, err
		}
		if !sameObject(attrs, l.over) {
			return false, nil
		}
		_, err = l.b.put(ctx, l.v, l.ext, ifUnchanged(attrs), func() map[string]string { return marked(givenUp, id) }, l.body)
		if !isPreconditionFailed(err) {
			return false, err
		}
	}
	return l.gen != 0, nil
}
