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
	err := s.bucket.check(v)
	var seen snapshot
	if err == nil {
		seen, err = s.bucket.look(ctx, v)
	}
	if err != nil {
		return false, c.end(err)
	}
	ok, err := s.isComplete(ctx, v, seen)
	return ok, c.end(err)
}

// isComplete reports whether a version that was listed is complete, and completes
// it if it is unfinished and the caller may.
func (s *Storage) isComplete(ctx context.Context, v ModuleVersion, seen snapshot) (bool, error) {
	_, state, _, err := s.resolve(ctx, v, seen)
	if isForbidden(err) && state == Unfinished {
		return false, nil
	}
	return state == Complete, err
}

// resolve is judge, except that it finishes an unfinished version, which it reports.
func (s *Storage) resolve(ctx context.Context, v ModuleVersion, seen snapshot) (_ snapshot, _ State, finished bool, _ error) {
	for {
		var state State
		var err error
		seen, state, err = s.judge(ctx, v, seen)
		if state != Unfinished || err != nil {
			return seen, state, false, err
		}
		// All three objects are of one save and nobody replaces them, so it matters
		// neither whether that save is dead nor who else finishes it.
		_, err = s.bucket.clear(ctx, v, extMod, ifUnchanged(seen.mod))
		if err == nil {
			s.log.InfoContext(ctx, "finished another's save", "module", v.Module, "version", v.Version)
			return seen, Complete, true, nil
		}
		if !isPreconditionFailed(err) && !isAbsent(err) {
			return seen, state, false, err
		}
		again, lookErr := s.bucket.look(ctx, v)
		if lookErr != nil {
			return seen, state, false, lookErr
		}
		if again.equals(seen) {
			return seen, state, false, err // refused for another reason than its condition
		}
		seen = again
	}
}

// judge returns the state of a version that was listed, and the listing that shows
// it. A version whose objects name another .mod was copied from another bucket, or
// listed while it was replaced. In the second case a second listing differs.
func (s *Storage) judge(ctx context.Context, v ModuleVersion, seen snapshot) (snapshot, State, error) {
	for {
		state := s.state(seen)
		if state != Partial || !seen.whole() {
			return seen, state, nil
		}
		again, err := s.bucket.look(ctx, v)
		if err != nil {
			return seen, state, err
		}
		if again.equals(seen) {
			return seen, Complete, nil
		}
		seen = again
	}
}
