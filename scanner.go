package gcs

import (
	"cmp"
	"context"
	"iter"
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
	Claimed time.Time `json:"claimed,omitzero"`  // when the claim of a single flight was renewed; 1970 if nobody holds it
}

// Scan yields every version of which the bucket holds any object, of one module, or
// of the whole bucket if module is empty. A lone claim counts: its version is
// Absent, with the time of the claim. The order is that of the names of the .zip
// objects. After an error, which is yielded with a zero VersionStatus, the scan ends.
//
// Scan changes nothing. It makes one request for a page of up to 999 objects. It
// lists the page once more if one listing does not prove the state of all versions on
// it: where one is partial or abandoned, or its .info or .zip names another .mod than
// the one beside it, as in a bucket that was copied. A version that changes between
// the two listings costs another request. Scan holds one page and its second listing.
// It is not a snapshot of the bucket: each version is listed as it is when its page
// is. It is safe for concurrent use.
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
		for found, err := range s.scan(ctx, prefix, "", maxPage, (*listing).isUnproved) {
			if err != nil {
				yield(VersionStatus{}, c.end(err))
				return
			}
			if found.empty() && found.claim == nil {
				continue // deleted since its page was listed
			}
			if !yield(s.statusOf(found), nil) {
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
func (s *Storage) statusOf(found *listing) VersionStatus {
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
	if seen.claim != nil {
		status.Claimed = givenUp // without a marker, nobody holds it
		if m, marked := readMarker(seen.claim); marked {
			status.Claimed = m.time(s.now(), s.claimThreshold())
		}
	}
	return status
}

// A listing is a version that a scan has met.
type listing struct {
	ModuleVersion
	snapshot
	state State
	zip   string // the name of its .zip object, which need not be there
}

// isUnproved reports whether one listing does not prove the state.
func (l *listing) isUnproved() bool { return l.state == Partial || l.state == Abandoned }

// scan lists the objects whose names begin with prefix and come after the name
// after, the first time up to size of them, and yields their versions in the order
// of the names of their .zip objects. It lists what is in doubt on a page once more.
func (s *Storage) scan(ctx context.Context, prefix, after string, size int, inDoubt func(*listing) bool) iter.Seq2[*listing, error] {
	return func(yield func(*listing, error) bool) {
		open := map[ModuleVersion]snapshot{} // may have more objects on the next page
		q := &storage.Query{Prefix: prefix, StartOffset: after + " "}
		last := ""
		for token, more := "", true; more; size = maxPage {
			page, next, err := s.bucket.page(ctx, q, token, size)
			token, more = next, next != ""
			// One request lists again what the last page has left open, and this much of the page.
			fits := min(len(page), maxLook-countObjects(open))
			if s.bucket.group(page, open); !more {
				last = afterAll
			} else if fits > 0 {
				last = page[fits-1].Name
			}
			listed := s.take(open, last)
			if err == nil {
				err = s.confirm(ctx, prefix, listed, inDoubt)
			}
			if err != nil {
				yield(&listing{}, err)
				return
			}
			for _, found := range listed {
				if found.zip > after && !yield(found, nil) {
					return
				}
			}
		}
	}
}

func countObjects(versions map[ModuleVersion]snapshot) (n int) {
	for _, seen := range versions {
		for _, ext := range []string{extInfo, extClaim, extMod, extZip} {
			if *seen.slot(ext) != nil {
				n++
			}
		}
	}
	return n
}

// afterAll comes after the name of every object, which is UTF-8.
const afterAll = "\xff"

// take removes from open, and returns in order, the versions that have no object
// after the name last. The objects of two versions interleave where one's name goes
// on where the other's has its ending, such as v1 and v1.j.
func (s *Storage) take(open map[ModuleVersion]snapshot, last string) (listed []*listing) {
	for v, seen := range open {
		if zip := s.bucket.name(v, extZip); zip <= last {
			listed = append(listed, &listing{v, seen, s.classify(seen), zip})
			delete(open, v)
		}
	}
	slices.SortFunc(listed, func(a, b *listing) int { return cmp.Compare(a.zip, b.zip) })
	return listed
}

// maxLooks is how often a version that is in doubt is listed once more. One that was
// never the same twice in a row is then what the last listing shows.
const maxLooks = 10

// confirm lists the versions in doubt, from the first to the last, until two listings
// in a row show the same of a version, or one leaves no doubt.
func (s *Storage) confirm(ctx context.Context, prefix string, listed []*listing, inDoubt func(*listing) bool) error {
	listed = slices.DeleteFunc(slices.Clone(listed), func(found *listing) bool { return !inDoubt(found) })
	for looks := 0; len(listed) > 0 && looks < maxLooks; looks++ {
		first := slices.MinFunc(listed, func(a, b *listing) int { return cmp.Compare(a.object(extInfo), b.object(extInfo)) })
		seen, err := s.bucket.lookBetween(ctx, prefix, first.ModuleVersion, listed[len(listed)-1].ModuleVersion)
		if err != nil {
			return err
		}
		listed = slices.DeleteFunc(listed, func(found *listing) bool {
			before := found.snapshot
			found.snapshot = seen[found.ModuleVersion]
			found.state = s.classify(found.snapshot)
			same := found.equals(before)
			if same && found.state == Partial && found.hasAll() {
				found.state = Complete // it was copied from another bucket
			}
			return same || !inDoubt(found)
		})
	}
	return nil
}

// completed scans for the complete versions. It finishes an unfinished one if the
// caller may.
func (s *Storage) completed(ctx context.Context, prefix, after string, size int) iter.Seq2[ModuleVersion, error] {
	// What was complete all the while shows all three objects, but of a version that
	// has some before the name after.
	inDoubt := func(found *listing) bool {
		cut := found.info == nil && s.bucket.name(found.ModuleVersion, extInfo) < after
		return found.isUnproved() && (cut || found.state == Partial && found.hasAll())
	}
	return func(yield func(ModuleVersion, error) bool) {
		for found, err := range s.scan(ctx, prefix, after, size, inDoubt) {
			complete := found.state == Complete
			if err == nil && found.state == Unfinished {
				ctx := context.WithValue(ctx, versionKey{}, found.ModuleVersion) // the call is about no version
				_, complete, err = s.isComplete(ctx, found.ModuleVersion, &found.snapshot)
			}
			if (complete || err != nil) && !yield(found.ModuleVersion, err) {
				return
			}
		}
	}
}
