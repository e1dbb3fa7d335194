package gcs

import (
	"context"
	"errors"
	"fmt"
	"time"

	"cloud.google.com/go/storage"
)

// errTruncated means that an object of this save was stored truncated.
var errTruncated = errors.New("the server keeps an upload that was cut short")

// upload stores .info or .zip beside the .mod that the lease is for. It replaces *old,
// and then whatever is found instead: an object of a save that was presumed dead, or of
// a request of this save whose answer was lost. It leaves in *old what it replaced.
//
// A successor's object is never replaced: the condition names one that is older than the
// lease's own .mod. *old was listed before that .mod was written, and see older.
func (l *lease) upload(ctx context.Context, ext string, old **storage.ObjectAttrs, z *source) (err error) {
	if !z.canRewind() && *old == nil { // what is sent only once must not be refused
		if *old, err = l.older(ctx, ext); err != nil {
			return err
		}
	}
	for round, start := 0, time.Now(); ; round++ {
		err := l.send(ctx, ext, ifNotReplaced(*old), z)
		if z.err != nil || !isPreconditionFailed(err) && !errors.Is(err, errBrokenOff) {
			return err
		}
		seen, readErr := l.older(ctx, ext)
		switch {
		case readErr != nil:
			return readErr
		case seen != nil && seen.Metadata[keySaveID] == l.id && seen.Size == z.size:
			return nil
		case seen != nil && seen.Metadata[keySaveID] == l.id:
			return errTruncated // and not replaced: somebody may have finished the version
		case isPreconditionFailed(err) && seen != nil && sameObject(*old, seen):
			return err // refused for another reason than its condition
		case round == maxRefused || !isPreconditionFailed(err) && time.Since(start) >= retryLimit:
			return err
		}
		if rewindErr := z.rewind(); rewindErr != nil {
			return fmt.Errorf("%w: %w", rewindErr, err)
		}
		*old = seen
	}
}

// older reads .info or .zip. The .mod is read last: if it is still the lease's own, the
// object is older, and not a successor's.
func (l *lease) older(ctx context.Context, ext string) (*storage.ObjectAttrs, error) {
	seen, err := l.b.attrs(ctx, l.v, ext)
	if err != nil || seen == nil {
		return nil, err
	}
	mod, err := l.b.attrs(ctx, l.v, l.ext)
	if err == nil && !l.owns(mod) {
		err = errFenced
	}
	return seen, err
}

// send makes the request, or the requests, of an upload.
func (l *lease) send(ctx context.Context, ext string, cond storage.Conditions, z *source) error {
	metadata := map[string]string{keySaveID: l.id, keyGeneration: formatGeneration(l.gen)}
	if !z.buffered {
		return l.b.stream(ctx, l.v, cond, metadata, z)
	}
	_, err := l.b.put(ctx, l.v, ext, cond, func() map[string]string { return metadata }, z.head)
	return err
}
