package gcs

import (
	"context"

	"cloud.google.com/go/storage"
)

// Exists reports whether the version is complete: all three objects are there,
// from one save or from before this package came to the bucket, and nobody is
// writing them. It is false while a save is under way, and when one was cut off,
// unless all that is missing is its last step.
//
// It makes one request, or two when it finds a version of which only the last
// step of its save is missing, which it then does. If the caller lacks the
// permission for that (storage.objects.update) the version does not exist yet.
func (s *Storage) Exists(ctx context.Context, module, vers string) (bool, error) {
	v, err := newVersion(module, vers)
	ctx, o := s.begin(ctx, "Exists", v)
	var ok bool
	if err == nil {
		ok, err = s.exists(ctx, v)
	}
	return ok, o.end(err)
}

func (s *Storage) exists(ctx context.Context, v version) (bool, error) {
	seen, err := s.look(ctx, v)
	if err != nil {
		return false, err
	}
	return s.settle(ctx, v, seen)
}

// settle reports whether the version of which seen is a snapshot is complete,
// and completes it if it is unfinished.
func (s *Storage) settle(ctx context.Context, v version, seen snapshot) (bool, error) {
	for {
		switch seen.state(s.now(), s.staleThreshold()) {
		case complete:
			return true, nil
		case unfinished:
		default:
			return false, nil
		}
		err := s.finish(ctx, v, seen)
		switch {
		case err == nil:
			return true, nil
		case isForbidden(err):
			return false, nil
		case !isRefused(err) && !isAbsent(err):
			return false, err
		}
		// Somebody was there before: finished it as well, came back, or deleted it.
		now, readErr := s.look(ctx, v)
		if readErr != nil {
			return false, readErr
		}
		if sameObject(seen.mod, now.mod) {
			return false, err // refused for another reason than its condition
		}
		seen = now
	}
}

// finish does the last step of the save that left the unfinished version behind.
// All three objects are that save's and whole, and nobody replaces them, so it
// matters neither whether the save is dead nor who else finishes it.
func (s *Storage) finish(ctx context.Context, v version, seen snapshot) error {
	metagen := seen.mod.Metageneration
	cond := storage.Conditions{GenerationMatch: seen.mod.Generation, MetagenerationMatch: metagen}
	if err := s.update(ctx, v, extMod, cond, map[string]string{}, &metagen); err != nil {
		return err
	}
	s.log.InfoContext(ctx, "finished an abandoned save", "module", v.module, "version", v.version)
	return nil
}
