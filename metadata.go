package gcs

import (
	"context"
	"crypto/rand"
	"errors"
	"time"

	"cloud.google.com/go/storage"
)

const (
	// keyInProgress marks an object whose writer is not done: the .mod of a save
	// under way, or the claim of a fetch. Its value is the time, in RFC 3339 and
	// UTC, at which the writer last renewed it.
	keyInProgress = "in-progress"
	// keyInProgressOld is the marker of older Athens versions, with the value "true".
	keyInProgressOld = "in_progress"
	// keySaveID holds the random id of the save that wrote an object.
	keySaveID = "save-id"
	// keyGeneration holds, on .info and .zip, the generation of the .mod that
	// their save held. A request to create a .mod that was sent twice can arrive
	// twice, with a delete in between, and then the save id is not enough.
	keyGeneration = "mod-generation"
)

// givenUp is the time in the marker of a save that failed and said so. Nobody
// waits for it, however wrong the clocks are.
var givenUp = time.Unix(0, 0).UTC()

const (
	// renewals is how often a holder renews its marker within the stale
	// threshold, so that a few may fail before anybody takes over.
	renewals = 4
	// releaseTimeout bounds giving up, which outlives the caller's context.
	releaseTimeout = 15 * time.Second
	// updateInterval is the least time between two metadata updates of one object.
	// https://cloud.google.com/storage/quotas#objects
	updateInterval = time.Second
)

// newSaveID returns an id that no other save has.
func newSaveID() string { return rand.Text() }

// marked is the metadata of an object whose writer, the save of that id, is not
// done and was alive at the time t.
func marked(t time.Time, id string) map[string]string {
	return map[string]string{keyInProgress: t.UTC().Format(time.RFC3339Nano), keySaveID: id}
}

// A marker says that an object's writer was not done, and when that was so.
type marker struct {
	renewed time.Time
	updated time.Time // by the clock of GCS
}

// readMarker returns the marker on an object, and false if there is none.
func readMarker(attrs *storage.ObjectAttrs) (marker, bool) {
	if attrs == nil {
		return marker{}, false
	}
	if value, ok := attrs.Metadata[keyInProgress]; ok {
		t, err := time.Parse(time.RFC3339Nano, value)
		if err != nil {
			t = attrs.Updated
		}
		return marker{t, attrs.Updated}, true
	}
	if _, ok := attrs.Metadata[keyInProgressOld]; ok {
		return marker{attrs.Created, attrs.Created}, true
	}
	return marker{}, false
}

// fresh reports whether the writer may still be at work. A marker from the
// future is a writer with a fast clock, and judged by the clock of GCS.
func (m marker) fresh(now time.Time, threshold time.Duration) bool {
	t := m.renewed
	if t.Sub(now) >= threshold {
		t = m.updated
	}
	return t.Sub(now).Abs() < threshold
}

// isGivenUp reports whether the object's writer said that it failed.
func isGivenUp(attrs *storage.ObjectAttrs) bool {
	m, ok := readMarker(attrs)
	return ok && !m.renewed.After(givenUp)
}

// isFresh reports whether there is a fresh marker on the object.
func isFresh(attrs *storage.ObjectAttrs, now time.Time, threshold time.Duration) bool {
	m, ok := readMarker(attrs)
	return ok && m.fresh(now, threshold)
}

var (
	// errFenced means that the object is no longer the lease's own: it was
	// taken over or deleted, and nothing that this holder sends can change it.
	errFenced = errors.New("fenced: somebody else has taken the version over or deleted it")
	// errReleased means that the marker is gone from the lease's own object.
	errReleased = errors.New("the marker is already cleared")
)

// A lease is the right to finish what a marked object stands for. It is held
// by whoever wrote the object's live generation. Every change of it is
// conditional on that generation and on the last known metageneration, so a
// holder that lost it, whether it knows or not, can change nothing.
//
// A lease is used by one goroutine at a time; between keep and the return of
// the function that keep returns, that is the one keep started.
type lease struct {
	s       *Storage
	v       version
	ext     string // of the marked object
	id      string
	tries   int   // requests to write the object that were sent,
	gen     int64 // and what came of them, 0 while that is not known
	metagen int64
	renewed time.Time // when the last renewal was answered, by the monotonic clock
}

// take writes the object with this holder's marker, if it is still old.
func (l *lease) take(ctx context.Context, body []byte, old *storage.ObjectAttrs) error {
	cond := onlyOver(old)
	if old != nil {
		cond.MetagenerationMatch = old.Metageneration // or its holder has renewed the marker
	}
	metadata := func() map[string]string {
		l.tries++
		return marked(l.s.now(), l.id)
	}
	attrs, err := l.s.put(ctx, l.v, l.ext, cond, metadata, [][]byte{body})
	if err == nil {
		l.gen, l.metagen = attrs.Generation, attrs.Metageneration
	}
	return err
}

// set replaces the object's metadata; an empty map clears it, and the marker
// with it. It returns errFenced when the lease is lost and errReleased when the
// marker is gone, whoever cleared it.
func (l *lease) set(ctx context.Context, metadata map[string]string) error {
	for {
		cond := storage.Conditions{GenerationMatch: l.gen, MetagenerationMatch: l.metagen}
		err := l.s.update(ctx, l.v, l.ext, cond, metadata, &l.metagen)
		if !isRefused(err) && !isAbsent(err) {
			return err
		}
		// Refused: by another's change, or by an earlier request of this
		// holder that was applied although its answer was lost.
		attrs, readErr := l.s.attrs(ctx, l.v, l.ext)
		switch {
		case isAbsent(readErr):
			return errFenced
		case readErr != nil:
			return readErr
		case !l.holds(attrs):
			return errFenced
		}
		if _, held := readMarker(attrs); !held {
			return errReleased
		}
		if attrs.Metageneration == l.metagen {
			return err // the condition holds: it was refused for another reason
		}
		l.metagen = attrs.Metageneration
	}
}

// holds reports whether the object is the one that the lease is for.
func (l *lease) holds(attrs *storage.ObjectAttrs) bool {
	return attrs != nil && attrs.Generation == l.gen
}

// adopt makes the lease hold the object if a request of this holder wrote it,
// which it reports.
func (l *lease) adopt(attrs *storage.ObjectAttrs) bool {
	if attrs == nil || attrs.Metadata[keySaveID] != l.id {
		return false
	}
	l.gen, l.metagen = attrs.Generation, attrs.Metageneration
	return true
}

// keep renews the marker until the returned function is called, which waits
// for a renewal in flight. It calls lost when the lease is.
func (l *lease) keep(ctx context.Context, lost context.CancelCauseFunc) (stop func()) {
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(max(l.s.staleThreshold()/renewals, time.Millisecond))
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
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
			switch err := l.renew(ctx); {
			case errors.Is(err, errFenced):
				lost(errFenced)
				return
			case errors.Is(err, errReleased):
				return // found unfinished, and finished: all that was to be stored is
			case err != nil && ctx.Err() == nil:
				l.s.telemetry.renewalsFailed.Add(ctx, 1)
			}
		}
	}()
	return func() {
		close(quit)
		<-done
	}
}

func (l *lease) renew(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	err := l.set(ctx, marked(l.s.now(), l.id))
	l.renewed = time.Now()
	return err
}

// commit clears the marker, which is what makes a version complete.
func (l *lease) commit(ctx context.Context) error {
	if !l.renewed.IsZero() {
		// GCS refuses a second metadata update within the second.
		if err := sleep(ctx, updateInterval-time.Since(l.renewed)); err != nil {
			return err
		}
	}
	err := l.set(ctx, map[string]string{})
	if errors.Is(err, errReleased) {
		return nil // by a request whose answer was lost, or by one who found it unfinished
	}
	return err
}

// giveUp lets the next save proceed at once. stored says that everything but
// the commit was done, and leaves it to whoever comes next. giveUp returns
// errReleased when the version turns out to be complete.
func (l *lease) giveUp(ctx context.Context, stored bool) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTimeout)
	defer cancel()
	if found, err := l.find(ctx); !found || err != nil {
		return err
	}
	id := l.id
	if !stored {
		// A request of this save that is still on its way must not complete
		// what its caller was told has failed.
		id = newSaveID()
	}
	if err := l.set(ctx, marked(givenUp, id)); !errors.Is(err, errFenced) {
		return err
	}
	return nil
}

// find brings a lease up to date whose object may have been written by a request
// that was not answered. It reports whether there is anything to release.
func (l *lease) find(ctx context.Context) (bool, error) {
	if l.gen != 0 || l.tries == 0 {
		return l.gen != 0, nil
	}
	attrs, err := l.s.attrs(ctx, l.v, l.ext)
	if isAbsent(err) {
		return false, nil
	}
	return err == nil && l.adopt(attrs), err
}

// sleep waits for d or until the context ends.
func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
