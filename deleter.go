package gcs

import (
	"context"
	"errors"

	"cloud.google.com/go/storage"
	"golang.org/x/sync/errgroup"
)

var errNothing error = verdict{KindNotFound, errors.New("none of the version's objects exists")}

// Delete removes the version, or what there is of it. It is KindNotFound when
// there is nothing.
//
// The .mod goes first: from then on the version does not exist, and a save that
// was under way cannot complete it (it starts over if it can; see
// [Storage.Save]). What is left if Delete is cut short, or fails, is replaced by
// the next Save and removed by the next Delete.
//
// It makes up to 4 requests, 3 of them one after another, and one more beside them
// when it meets a stale claim (see [Storage.SingleFlight]), which it removes too.
func (s *Storage) Delete(ctx context.Context, module, vers string) error {
	v, err := newVersion(module, vers)
	ctx, o := s.begin(ctx, "Delete", v)
	if err == nil {
		err = s.delete(ctx, v)
	}
	return o.end(err)
}

func (s *Storage) delete(ctx context.Context, v version) error {
	for refused := 0; ; refused++ {
		seen, err := s.look(ctx, v)
		if err != nil {
			return err
		}
		if seen.empty() {
			s.sweep(ctx, v, seen)
			if refused > 0 {
				return nil // somebody else's delete came between
			}
			return errNothing
		}
		if seen.mod == nil {
			// A listing that shows no .mod may have been made while one came,
			// and the rest be that one's.
			if mod, err := s.mod(ctx, v); err != nil {
				return err
			} else if mod != nil {
				continue
			}
		}
		err = s.remove(ctx, v, extMod, seen.mod)
		if isRefused(err) && refused < maxRefused {
			continue // a save has taken the version over, and may store more than was seen
		}
		if err != nil {
			return err
		}
		group, ctx := errgroup.WithContext(ctx)
		group.Go(func() error {
			s.sweep(ctx, v, seen)
			return nil
		})
		for _, ext := range []string{extInfo, extZip} {
			group.Go(func() error {
				err := s.remove(ctx, v, ext, *seen.slot(ext))
				if isRefused(err) {
					return nil // by now that of a save that began after this delete
				}
				return err
			})
		}
		return group.Wait()
	}
}

// remove deletes an object if it is still the one that was seen.
func (s *Storage) remove(ctx context.Context, v version, ext string, seen *storage.ObjectAttrs) error {
	if seen == nil {
		return nil
	}
	err := attempt(ctx, requestTimeout, func(ctx context.Context) error {
		return needs(s.object(v, ext).If(onlyOver(seen)).Delete(ctx), "storage.objects.delete")
	})
	if isAbsent(err) {
		return nil
	}
	return err
}
