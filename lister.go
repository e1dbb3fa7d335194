package gcs

import "context"

// List returns the complete versions of the module, in the order of the names of
// their .zip objects. It is an empty slice, and not nil, when there are none. Other
// modules whose paths begin with this one's, such as its own major versions, are
// not in it.
//
// It makes the requests of [Storage.Scan], and one more for each unfinished version,
// which it finishes as [Storage.Exists] does. It is safe for concurrent use.
func (s *Storage) List(ctx context.Context, module string) ([]string, error) {
	ctx, c := s.begin(ctx, "List", version{module: module})
	prefix := s.bucket.prefix + module + "/@v/"
	if err := s.bucket.checkModule(module); err != nil {
		return nil, c.end(err)
	}
	list := []string{}
	for found, err := range s.scan(ctx, prefix, "", maxPage) {
		var ok bool
		if err == nil {
			ok, err = s.isListed(ctx, found)
		}
		if err != nil {
			return nil, c.end(err)
		}
		if ok {
			list = append(list, found.version.version)
		}
	}
	return list, c.end(nil)
}

// isListed reports whether a version that a scan has met is complete, and completes
// it if it is unfinished and the caller may.
func (s *Storage) isListed(ctx context.Context, found listing) (bool, error) {
	if found.state == Unfinished {
		return s.isComplete(ctx, found.version, found.snapshot)
	}
	return found.state == Complete, nil
}
