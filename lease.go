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
	errFenced = errors.New("fenced: another save took the version over, or it was deleted")
	// errCommitted means that the marker is gone from the lease's own object: the
	// version is committed.
	errCommitted = errors.New("the marker is already cleared")
)

// A lease is the right to finish what a marked object stands for. Whoever wrote
// the live generation of the object owns it. Every change of the object is
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

	replaces   *storage.ObjectAttrs // what acquire was to replace
	unanswered int                  // requests to write the object; 0 when none can still arrive
	gen        int64                // of the object that is owned, 0 for none
	metagen    int64                // the last known
	renewed    time.Time            // when the last renewal ended, by the monotonic clock
	successor  *storage.ObjectAttrs // the object that was found instead of this lease's own
}

// acquire writes the object with this holder's marker, if it is still the one
// seen, or still absent. Of all who try, one succeeds: the condition names the
// generation and the metageneration, and a renewal changes the second.
func (l *lease) acquire(ctx context.Context, seen *storage.ObjectAttrs) error {
	l.replaces, l.gen = seen, 0
	attrs, err := l.b.put(ctx, l.v, l.ext, ifUnchanged(seen), func() map[string]string {
		l.unanswered++
		return marked(l.now(), l.id)
	}, l.body)
	switch {
	case err == nil:
		l.gen, l.metagen = attrs.Generation, attrs.Metageneration
	case retryReason(err) == "" && l.unanswered == 1:
		l.unanswered = 0 // nothing is on its way
	}
	return err
}

// adopt makes the lease own the object if a request of this holder wrote it,
// which it reports.
func (l *lease) adopt(attrs *storage.ObjectAttrs) bool {
	if attrs == nil || attrs.Metadata[keySaveID] != l.id {
		return false
	}
	l.gen, l.metagen = attrs.Generation, attrs.Metageneration
	return true
}

// owns reports whether the object is the one that the lease is for.
func (l *lease) owns(attrs *storage.ObjectAttrs) bool {
	return attrs != nil && attrs.Generation == l.gen
}

// change makes a request that changes the object's metadata. It returns errFenced
// if the lease is lost and errCommitted if the marker is gone, whoever cleared it.
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
		case !l.owns(attrs):
			l.successor = attrs
			return errFenced
		case !marked:
			return errCommitted
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

// commit clears the marker. The condition names the generation of this holder's own
// object, so it succeeds only while nobody has taken over or deleted since. It returns
// errCommitted if the marker is gone already: by a request whose answer was lost, or by
// one who found the version unfinished.
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
// in flight. It calls lost with errFenced or errCommitted when there is nothing to renew
// any more, and failed after a renewal that failed for another reason.
func (l *lease) startRenewing(ctx context.Context, lost context.CancelCauseFunc, failed func()) (stop func()) {
	pauses, endPauses := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		interval := max(l.threshold/renewals, updateInterval)
		for pause := interval; sleep(pauses, pause) == nil; {
			began := time.Now()
			switch err := l.renew(ctx); {
			case errors.Is(err, errFenced), errors.Is(err, errCommitted):
				lost(err)
				return
			case err != nil && ctx.Err() == nil:
				failed()
			}
			pause = max(interval-time.Since(began), updateInterval)
		}
	}()
	return func() {
		endPauses()
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

// insistent returns a copy of the lease whose requests are made again after every
// failure, until their context ends.
func (l lease) insistent() *lease {
	l.b = l.b.insistent()
	return &l
}

// release gives the lease up, so that the next holder can proceed at once. It
// outlives ctx, by a bounded time. It returns errCommitted if the version turns out
// to be committed.
//
// keepID says that everything but the commit was done: the next save commits.
// Otherwise the marker gets a new id, so that a request of this holder that is
// still on its way cannot complete what its caller was told has failed.
func (l *lease) release(ctx context.Context, keepID bool) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTimeout)
	defer cancel()
	l = l.insistent()
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
		if !l.adopt(l.successor) {
			return nil
		}
	}
}

// fenceLateAcquire brings a lease up to date whose acquire was not answered, and
// reports whether it owns the object. If what acquire was to replace is still there,
// its request can still arrive. So fenceLateAcquire replaces it, with an object that
// is given up and that nobody owns: then that request is refused.
func (l *lease) fenceLateAcquire(ctx context.Context, id string) (held bool, err error) {
	for refused := 0; l.gen == 0 && l.unanswered > 0; refused++ {
		attrs, err := l.b.attrs(ctx, l.v, l.ext)
		if err != nil || l.adopt(attrs) {
			return err == nil, err
		}
		if !sameObject(attrs, l.replaces) {
			return false, nil
		}
		_, err = l.b.put(ctx, l.v, l.ext, ifUnchanged(attrs), func() map[string]string { return marked(givenUp, id) }, l.body)
		if !isPreconditionFailed(err) || refused == maxRefused {
			return false, err
		}
	}
	return l.gen != 0, nil
}
