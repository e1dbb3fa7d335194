package gcs

import "context"

// Exists reports whether the version is complete: all three objects are there,
// from one save or from before this package came to the bucket, and nobody is
// writing them. It is false while a save is under way, and after one that was cut
// off, unless only its last step is missing.
//
// Exists makes one request. It makes a second one when it finds a version of which
// only the last step of its save is missing, to do that step. If the caller lacks
// the permission for it (storage.objects.update), the version does not exist yet. It
// makes a second one, too, in a bucket whose objects were copied from another, since
// they name generations that they had there. It is safe for concurrent use.
func (s *Storage) Exists(ctx context.Context, module, version string) (bool, error) {
	v := ModuleVersion{module, version}
	ctx, c := s.begin(ctx, "Exists", v)
	complete, err := false, s.bucket.check(v)
	if err == nil {
		_, complete, err = s.isComplete(ctx, v, nil)
	}
	return complete, c.end(err)
}

// isComplete reports whether a version is complete, and completes it if it is
// unfinished and the caller may. See settle for listed.
func (s *Storage) isComplete(ctx context.Context, v ModuleVersion, listed *snapshot) (seen snapshot, complete bool, err error) {
	seen, state, _, err := s.settle(ctx, v, listed)
	if isForbidden(err) && state == Unfinished {
		return seen, false, nil
	}
	return seen, state == Complete, err
}

// settle returns the state of a version, and the listing that shows it. It finishes an
// unfinished version, which it reports. listed is a listing that was made already, or
// nil.
func (s *Storage) settle(ctx context.Context, v ModuleVersion, listed *snapshot) (seen snapshot, state State, finished bool, err error) {
	err = s.bucket.change(ctx, v, listed, func(now snapshot) (err error) {
		seen = now
		if state, err = s.inspect(ctx, v, seen); state != Unfinished || err != nil {
			return err
		}
		// All three objects are of one save and nobody replaces them, so it matters
		// neither whether that save is dead nor who else finishes it.
		if _, err = s.bucket.clear(ctx, v, extMod, ifUnchanged(seen.mod)); err == nil {
			s.log.InfoContext(ctx, "finished another's save", "module", v.Module, "version", v.Version)
			state, finished = Complete, true
		}
		return err
	})
	return seen, state, finished, err
}

// inspect returns the state of a version that was listed. A version whose objects name
// another .mod was copied from another bucket, or listed while it was replaced. In the
// second case a second listing differs.
func (s *Storage) inspect(ctx context.Context, v ModuleVersion, seen snapshot) (State, error) {
	state := s.classify(seen)
	if state != Partial || !seen.hasAll() {
		return state, nil
	}
	if err := s.bucket.confirm(ctx, v, seen); err != nil {
		return state, err
	}
	return Complete, nil
}
