package gcs

import (
	"cmp"
	"context"
	"errors"

	"golang.org/x/sync/errgroup"
)

var errNothing error = kindError{KindNotFound, errors.New("none of the version's objects exists")}

// Delete removes the version, or what there is of it. If nothing is there, the error is
// KindNotFound.
//
// The .mod goes first: from then on the version does not exist, and a save that was
// under way is fenced (see [Storage.Save]). What is left if Delete is cut short, or
// fails, is replaced by the next Save and removed by the next Delete. A claim of a single
// flight is not removed.
//
// It makes up to 4 requests, 3 of them one after another. It is safe for concurrent
// use.
func (s *Storage) Delete(ctx context.Context, module, version string) error {
	v := ModuleVersion{module, version}
	ctx, c := s.begin(ctx, "Delete", v)
	err := s.bucket.check(v)
	if err == nil {
		err = s.bucket.change(ctx, v, nil, func(seen snapshot) error {
			if seen.empty() {
				return errNothing
			}
			return s.bucket.removeVersion(ctx, v, seen)
		})
	}
	return c.end(err)
}

// removeVersion deletes the objects that were listed, the .mod first. If the .mod has
// changed, it deletes nothing, and returns errChanged or a refused precondition.
func (b *bucket) removeVersion(ctx context.Context, v ModuleVersion, seen snapshot) error {
	if seen.mod == nil {
		// The .mod may have come while the version was listed, and the rest be of
		// the same save.
		if mod, err := b.attrs(ctx, v, extMod); mod != nil || err != nil {
			return cmp.Or(err, errChanged)
		}
	} else if err := b.remove(ctx, v, extMod, ifUnchanged(seen.mod)); err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	for _, ext := range []string{extInfo, extZip} {
		if o := *seen.slot(ext); o != nil {
			group.Go(func() error {
				err := b.remove(ctx, v, ext, ifNotReplaced(o))
				if isPreconditionFailed(err) {
					return nil // replaced: another save's
				}
				return err
			})
		}
	}
	return group.Wait()
}
