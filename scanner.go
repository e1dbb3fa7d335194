package gcs

import (
	"cmp"
	"context"
	"iter"
	"maps"
	"slices"
	"time"

	"cloud.google.com/go/storage"
)

// A VersionStatus is what a scan found of a version.
type VersionStatus struct {
	ModuleVersion
	State   State     `json:"state"`
	Missing []string  `json:"missing,omitempty"` // of "info", "mod" and "zip"
	Renewed time.Time `json:"renewed,omitzero"`  // the time of the marker, by its writer's clock; 1970 if the writer gave up
	Updated time.Time `json:"updated,omitzero"`  // the newest update of an object, by the clock of GCS
	Size    int64     `json:"size"`              // of the three objects, in bytes
	Claimed time.Time `json:"claimed,omitzero"`  // the time of the claim of a single flight
}

// Scan yields every version of which the bucket holds any object, of one module, or
// of the whole bucket if module is empty. A lone claim counts: its version is
// Absent, with the time of the claim. The order is that of the names of the .zip
// objects. After an error, which is yielded with a zero VersionStatus, the scan ends.
//
// Scan changes nothing. It makes one request for a page of up to 999 objects, and
// one more for each version that is neither complete nor in progress on its page, or
// whose .info or .zip names another .mod than the one beside it, as in a bucket that
// was copied. It holds one page. It is not a snapshot of the bucket: each version is
// listed as it is when its page is. It is safe for concurrent use.
//
// A module that no object name can be made of is KindBadRequest.
func (s *Storage) Scan(ctx context.Context, module string) iter.Seq2[VersionStatus, error] {
	return func(yield func(VersionStatus, error) bool) {
		ctx, c := s.begin(ctx, "Scan", ModuleVersion{Module: module})
		prefix, err := s.bucket.prefix, s.bucket.checkPrefix()
		if module != "" {
			prefix, err = s.modulePrefix(module)
		}
		if err != nil {
			yield(VersionStatus{}, c.end(err))
			return
		}
		for found, err := range s.scan(ctx, prefix, "", maxPage) {
			if err != nil {
				yield(VersionStatus{}, c.end(err))
				return
			}
			if found.empty() && found.claim == nil {
				continue // deleted since its page was listed
			}
			if !yield(statusOf(found), nil) {
				break
			}
		}
		c.end(nil)
	}
}

// modulePrefix returns what the names of a module's objects begin with.
func (s *Storage) modulePrefix(module string) (string, error) {
	return s.bucket.prefix + module + "/@v/", s.bucket.checkModule(module)
}

// statusOf describes a version that was listed.
func statusOf(found listing) VersionStatus {
	seen := found.snapshot
	status := VersionStatus{ModuleVersion: found.ModuleVersion, State: found.state}
	for _, ext := range []string{extInfo, extMod, extZip} {
		o := *seen.slot(ext)
		if o == nil {
			status.Missing = append(status.Missing, ext)
			continue
		}
		status.Size += o.Size
		if o.Updated.After(status.Updated) {
			status.Updated = o.Updated
		}
	}
	if m, marked := readMarker(seen.mod); marked {
		status.Renewed = m.renewed
	}
	if m, marked := readMarker(seen.claim); marked {
		status.Claimed = m.renewed
	}
	return status
}

// A listing is a version that a scan has met.
type listing struct {
	ModuleVersion
	snapshot
	state State
}

// scan lists the objects whose names begin with prefix and come after the name
// after, the first time up to size of them, and yields their versions in the order
// of the names of their .zip objects.
func (s *Storage) scan(ctx context.Context, prefix, after string, size int) iter.Seq2[listing, error] {
	return func(yield func(listing, error) bool) {
		// The objects of two versions interleave where one's name goes on where the
		// other's has its ending, such as v1 and v1.j. A page can end between the
		// objects of a version.
		open := map[ModuleVersion]*snapshot{}
		for attrs, err := range s.bucket.list(ctx, &storage.Query{Prefix: prefix, StartOffset: after}, size) {
			if err != nil {
				yield(listing{}, err)
				return
			}
			v, ext, ok := s.bucket.parse(attrs)
			if !ok || s.bucket.name(v, extZip) <= after {
				continue
			}
			if !s.yieldUntil(ctx, open, attrs.Name, yield) {
				return
			}
			if open[v] == nil {
				open[v] = new(snapshot)
			}
			*open[v].slot(ext) = attrs
		}
		s.yieldUntil(ctx, open, "", yield)
	}
}

// yieldUntil yields the open versions that have no objects from the name next on, or
// all of them if next is empty. It reports whether the scan goes on.
func (s *Storage) yieldUntil(ctx context.Context, open map[ModuleVersion]*snapshot, next string, yield func(listing, error) bool) bool {
	for _, v := range slices.SortedFunc(maps.Keys(open), compareVersions) {
		if next != "" && s.bucket.name(v, extZip) >= next {
			continue
		}
		found, err := s.found(ctx, v, *open[v])
		delete(open, v)
		if !yield(found, err) || err != nil {
			return false
		}
	}
	return true
}

// completed scans for the complete versions. It finishes an unfinished one if the
// caller may.
func (s *Storage) completed(ctx context.Context, prefix, after string, size int) iter.Seq2[ModuleVersion, error] {
	return func(yield func(ModuleVersion, error) bool) {
		for found, err := range s.scan(ctx, prefix, after, size) {
			complete := found.state == Complete
			if err == nil && found.state == Unfinished {
				complete, err = s.isComplete(ctx, found.ModuleVersion, found.snapshot)
			}
			if (complete || err != nil) && !yield(found.ModuleVersion, err) {
				return
			}
		}
	}
}

func compareVersions(a, b ModuleVersion) int { return cmp.Compare(a.object(extZip), b.object(extZip)) }

// found judges a version by the objects that the pages showed. What is neither
// complete nor in progress there is listed once more.
func (s *Storage) found(ctx context.Context, v ModuleVersion, seen snapshot) (listing, error) {
	seen, state, err := s.judge(ctx, v, seen)
	if err == nil && state != Complete && state != InProgress {
		if seen, err = s.bucket.look(ctx, v); err == nil {
			seen, state, err = s.judge(ctx, v, seen)
		}
	}
	return listing{v, seen, state}, err
}
