package gcs

import "context"

// Repair makes a version right, and returns the state that it leaves: Absent,
// InProgress or Complete.
//
//   - A version that is complete or in progress is left alone.
//   - An unfinished one is finished: it is Complete.
//   - What is left of a partial or abandoned one is removed, so that the next request
//     fetches it anew: it is Absent.
//   - A stale claim of a single flight is removed, whatever the state.
//
// Every change is conditional on what Repair has seen. If somebody else changes the
// version at the same time, Repair looks again. A version of which nothing is there
// is Absent, and no error.
//
// It makes 1 request for a version that needs nothing (2 if its objects were copied
// from another bucket, see [Storage.Exists]), 2 to finish one, and up to 5 to remove
// one; one more removes a claim. It is safe for concurrent use.
func (s *Storage) Repair(ctx context.Context, module, version string) (State, error) {
	v := ModuleVersion{module, version}
	ctx, c := s.begin(ctx, "Repair", v)
	err := s.bucket.check(v)
	state := Absent
	if err == nil {
		err = s.bucket.change(ctx, v, nil, func(seen snapshot) (err error) {
			state, err = s.repair(ctx, v, seen)
			return err
		})
	}
	return state, c.end(err)
}

// repair makes a version right that was listed, unless it has changed since.
func (s *Storage) repair(ctx context.Context, v ModuleVersion, listed snapshot) (State, error) {
	seen, state, _, err := s.settle(ctx, v, &listed)
	if err == nil && (state == Partial || state == Abandoned) {
		// A listing can miss what comes while it is made.
		if err = s.bucket.confirm(ctx, v, seen); err == nil {
			err = s.bucket.removeVersion(ctx, v, seen)
		}
		if err == nil {
			s.log.InfoContext(ctx, "removed what was left of a version", "module", v.Module, "version", v.Version, "found", state.String())
			state = Absent
		}
	}
	if err != nil {
		return state, err
	}
	return state, s.removeStaleClaim(ctx, v, seen)
}

// removeStaleClaim deletes a claim that was listed, if it is stale.
func (s *Storage) removeStaleClaim(ctx context.Context, v ModuleVersion, seen snapshot) error {
	if seen.claim == nil || isFresh(seen.claim, s.now(), s.claimThreshold()) {
		return nil
	}
	err := s.bucket.remove(ctx, v, extClaim, ifUnchanged(seen.claim))
	if isPreconditionFailed(err) {
		return nil // renewed, or taken over
	}
	return err
}
