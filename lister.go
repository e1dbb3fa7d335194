package gcs

import "context"

// List returns the complete versions of the module, in the order of the names of
// their .zip objects. It is an empty slice, and not nil, when there are none. Other
// modules whose paths begin with this one's, such as its own major versions, are
// not in it.
//
// It makes one request for a page of up to 999 objects, one more for a page with a
// version whose .info or .zip names another .mod than the one beside it, as in a bucket
// that was copied, and one more for each unfinished version, which it finishes as
// [Storage.Exists] does. It is safe for concurrent use.
func (s *Storage) List(ctx context.Context, module string) ([]string, error) {
	ctx, c := s.begin(ctx, "List", ModuleVersion{Module: module})
	prefix, err := s.modulePrefix(module)
	if err != nil {
		return nil, c.end(err)
	}
	list := []string{}
	for v, err := range s.completed(ctx, prefix, "", maxPage) {
		if err != nil {
			return nil, c.end(err)
		}
		list = append(list, v.Version)
	}
	return list, c.end(nil)
}
