package gcs

import (
	"context"
	"iter"
	"maps"

	"cloud.google.com/go/storage"
)

// List returns the complete versions of the module, in the order of their
// objects' names. It is an empty slice, and not nil, when there are none. Other
// modules whose paths begin with this one's, such as its own major versions, are
// not in it.
//
// It makes one request for every 1,000 objects, and one more for each unfinished
// version (see [Storage.Exists]), or for one that is being saved over while it is
// listed.
func (s *Storage) List(ctx context.Context, module string) ([]string, error) {
	ctx, o := s.begin(ctx, "List", version{module: module})
	if err := checkModule(module); err != nil {
		return nil, o.end(badRequest("module", err))
	}
	list := []string{}
	for found, err := range s.scan(ctx, module+"/@v/", "", maxPage) {
		if err == nil {
			var ok bool
			if ok, err = s.settle(ctx, found.version, found.snapshot); ok {
				list = append(list, found.version.version)
			}
		}
		if err != nil {
			return nil, o.end(err)
		}
	}
	return list, o.end(nil)
}

// A listing is a version whose three objects a scan has met.
type listing struct {
	version
	snapshot
	// rest is where a scan has to start that finds all versions after this one.
	rest string
}

// scan lists the objects below a prefix, from the name start on, and yields the
// versions that have all three, in the order of the names of their .zip objects,
// which are the last of each. It holds one page of the listing, of which the first
// has size objects.
func (s *Storage) scan(ctx context.Context, prefix, start string, size int) iter.Seq2[listing, error] {
	return func(yield func(listing, error) bool) {
		q := listQuery(prefix)
		q.StartOffset = start
		// The objects of two versions interleave where one's name goes on
		// where the other's has its ending, such as v1 and v1.j.
		open := map[version]*snapshot{}
		for token := ""; ; {
			page, next, err := s.page(ctx, q, token, size)
			size = maxPage
			if err != nil {
				yield(listing{}, err)
				return
			}
			earlier := maps.Clone(open)
			for _, attrs := range page {
				v, ext, ok := parseObject(attrs.Name)
				if !ok || attrs.Name < start {
					continue
				}
				seen := open[v]
				if seen == nil {
					seen = new(snapshot)
					open[v] = seen
				}
				*seen.slot(ext) = attrs
				rest := forget(open, attrs.Name)
				if ext != extZip || seen.info == nil || seen.mod == nil {
					continue
				}
				if earlier[v] != nil && torn(*seen) {
					if *seen, err = s.look(ctx, v); err != nil {
						yield(listing{}, err)
						return
					}
				}
				if !yield(listing{v, *seen, rest}, nil) {
					return
				}
			}
			if token = next; token == "" {
				return
			}
		}
	}
}

// torn reports whether a .zip that was listed on a later page than its .mod may
// be newer than what the .mod says. A save that has committed updated the .mod last.
func torn(seen snapshot) bool {
	return seen.zip.Metadata[keySaveID] != "" && seen.zip.Created.After(seen.mod.Updated)
}

// forget drops the versions whose .zip does not come after that name, and
// returns the first name of what is left, or else the name itself.
func forget(open map[version]*snapshot, name string) string {
	first := name
	for v, seen := range open {
		if v.object(extZip) <= name {
			delete(open, v)
			continue
		}
		for _, attrs := range []*storage.ObjectAttrs{seen.info, seen.mod} {
			if attrs != nil {
				first = min(first, attrs.Name)
			}
		}
	}
	return first
}
