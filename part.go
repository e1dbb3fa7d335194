package gcs

import (
	"context"
	"errors"
	"time"

	"cloud.google.com/go/storage"
)

// errCutShort means that an object of this save is there which is not whole.
var errCutShort = errors.New("the server keeps an upload that was cut short")

// upload stores .info or .zip beside the .mod that the lease is for. It replaces old,
// and then whatever is there in its stead: an object of a save that was presumed
// dead, or of a request of this save whose answer was lost.
func (l *lease) upload(ctx context.Context, ext string, old *storage.ObjectAttrs, z *source) error {
	if err := z.load(ctx); err != nil {
		return err
	}
	start := time.Now()
	for round := 0; ; round++ {
		err := l.send(ctx, ext, ifNotReplaced(old), z)
		if !isPreconditionFailed(err) && !errors.Is(err, errBrokenOff) {
			return err
		}
		// The .mod is read last: if it is still this save's own, the object is not
		// a successor's.
		seen, readErr := l.b.attrs(ctx, l.v, ext)
		if readErr == nil {
			readErr = l.isHeld(ctx)
		}
		switch {
		case readErr != nil:
			return readErr
		case seen != nil && seen.Metadata[keySaveID] == l.id && seen.Size == z.size:
			return nil
		case seen != nil && seen.Metadata[keySaveID] == l.id:
			return errCutShort // and not replaced: somebody may have finished the version
		case isPreconditionFailed(err) && seen != nil && sameObject(old, seen):
			return err // refused for another reason than its condition
		case round == maxRefused || !isPreconditionFailed(err) && time.Since(start) >= retryLimit || z.ready() != nil:
			return err
		}
		old = seen
	}
}

// send makes the request, or the requests, of an upload.
func (l *lease) send(ctx context.Context, ext string, cond storage.Conditions, z *source) error {
	metadata := map[string]string{keySaveID: l.id, keyGeneration: formatGeneration(l.gen)}
	if !z.whole {
		return l.b.stream(ctx, l.v, cond, metadata, z)
	}
	_, err := l.b.put(ctx, l.v, ext, cond, func() map[string]string { return metadata }, z.head)
	return err
}
