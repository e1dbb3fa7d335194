package gcs

import (
	"context"
	"errors"
	"io"
	"strings"

	"cloud.google.com/go/storage"
	"google.golang.org/api/iterator"
)

const (
	// maxPage is how many objects a page of a listing has at most: 333 versions.
	maxPage = 999
	// maxLook is how many objects GCS sends at most.
	// https://cloud.google.com/storage/docs/json_api/v1/objects/list
	maxLook = 1000
)

// attrs returns the attributes of an object, or nil if there is none.
func (b *bucket) attrs(ctx context.Context, v ModuleVersion, ext string) (attrs *storage.ObjectAttrs, err error) {
	err = b.do(ctx, "attributes of ."+ext, requestTimeout, func(ctx context.Context) error {
		attrs, err = b.object(v, ext).Attrs(ctx)
		return err
	})
	if isAbsentObject(err) {
		return nil, nil
	}
	return attrs, err
}

// update replaces an object's metadata, or clears it if metadata is empty, and
// returns what the object is then.
func (b *bucket) update(ctx context.Context, v ModuleVersion, ext string, cond storage.Conditions, metadata map[string]string) (attrs *storage.ObjectAttrs, err error) {
	err = b.do(ctx, "update of ."+ext, requestTimeout, func(ctx context.Context) error {
		attrs, err = b.object(v, ext).If(cond).Update(ctx, storage.ObjectAttrsToUpdate{Metadata: metadata})
		return err
	})
	return attrs, err
}

var errNotCleared = errors.New("the server does not clear metadata")

// clear removes the marker from an object. A server that answers with the marker
// still there is asked again, to set it to an empty value.
func (b *bucket) clear(ctx context.Context, v ModuleVersion, ext string, cond storage.Conditions) (*storage.ObjectAttrs, error) {
	attrs, err := b.update(ctx, v, ext, cond, map[string]string{})
	if _, marked := readMarker(attrs); err != nil || !marked {
		return attrs, err
	}
	b.noClear.Do(func() {
		b.log.DebugContext(ctx, "the server does not clear metadata: markers are set to an empty value")
	})
	cond.MetagenerationMatch = attrs.Metageneration
	attrs, err = b.update(ctx, v, ext, cond, cleared())
	if _, marked := readMarker(attrs); err == nil && marked {
		err = errNotCleared
	}
	return attrs, err
}

// remove deletes an object. It is no error if there is none.
func (b *bucket) remove(ctx context.Context, v ModuleVersion, ext string, cond storage.Conditions) error {
	err := b.do(ctx, "delete of ."+ext, requestTimeout, func(ctx context.Context) error {
		return b.object(v, ext).If(cond).Delete(ctx)
	})
	if isAbsentObject(err) {
		return nil
	}
	return err
}

// look lists the version, with one request unless GCS answers in parts.
func (b *bucket) look(ctx context.Context, v ModuleVersion) (snapshot, error) {
	seen, err := b.lookBetween(ctx, b.name(v, ""), v, v)
	return seen[v], err
}

// lookBetween lists the versions from first to last whose names begin with prefix.
func (b *bucket) lookBetween(ctx context.Context, prefix string, first, last ModuleVersion) (map[ModuleVersion]snapshot, error) {
	// The names sort .info, .lock, .mod, .zip. The offsets keep out v1.0.0.info
	// when the version is v1; a server that ignores them only makes this slower. The
	// end is exclusive, so it is a name after .zip.
	q := &storage.Query{Prefix: prefix, StartOffset: b.name(first, extInfo), EndOffset: b.name(last, extZip) + "!"}
	seen := map[ModuleVersion]snapshot{}
	for token, more := "", true; more; {
		page, next, err := b.page(ctx, q, token, maxLook)
		if err != nil {
			return nil, err
		}
		token, more = next, next != ""
		b.group(page, seen)
	}
	return seen, nil
}

// confirm lists the version again, and returns errChanged unless it is as it was seen.
func (b *bucket) confirm(ctx context.Context, v ModuleVersion, seen snapshot) error {
	again, err := b.look(ctx, v)
	if err == nil && !again.equals(seen) {
		err = errChanged
	}
	return err
}

// change lists the version, unless that was done already, and makes a change that is
// conditional on what was seen. When somebody else was faster, it does so again.
func (b *bucket) change(ctx context.Context, v ModuleVersion, seen *snapshot, request func(snapshot) error) error {
	for refused := 0; ; refused++ {
		if seen == nil {
			now, err := b.look(ctx, v)
			if err != nil {
				return err
			}
			seen = &now
		}
		err := request(*seen)
		if !isPreconditionFailed(err) && !isAbsent(err) || refused == maxRefused {
			return err
		}
		seen = nil
	}
}

// group adds objects to what was seen of their versions.
func (b *bucket) group(page []*storage.ObjectAttrs, seen map[ModuleVersion]snapshot) {
	for _, attrs := range page {
		if name, ok := strings.CutPrefix(attrs.Name, b.prefix); ok {
			if v, ext, ok := parseObject(name); ok {
				found := seen[v]
				*found.slot(ext) = attrs
				seen[v] = found
			}
		}
	}
}

// page makes one request for the part of a listing that begins at that token, and
// returns the token of the next part. A part may be smaller than size. It asks for
// the attributes that decide a version's state, and not for access lists, which are
// most of what a list sends by default.
func (b *bucket) page(ctx context.Context, q *storage.Query, token string, size int) (page []*storage.ObjectAttrs, next string, err error) {
	q.Projection = storage.ProjectionNoACL
	q.SetAttrSelection([]string{"Name", "Size", "Generation", "Metageneration", "Metadata", "Created", "Updated"})
	err = b.do(ctx, "list", requestTimeout, func(ctx context.Context) error {
		page, next = nil, ""
		it := b.handle.Objects(ctx, q)
		info := it.PageInfo()
		info.MaxSize, info.Token = size, token
		for {
			attrs, err := it.Next()
			if err == iterator.Done {
				return nil
			}
			if err != nil {
				return err
			}
			page = append(page, attrs)
			if info.Remaining() == 0 { // Next would ask for another page
				next = info.Token
				return nil
			}
		}
	})
	return page, next, err
}

// read returns the bytes of an object.
func (b *bucket) read(ctx context.Context, v ModuleVersion, ext string) (data []byte, err error) {
	err = b.do(ctx, "read of ."+ext, requestTimeout, func(ctx context.Context) error {
		r, err := b.object(v, ext).NewReader(ctx)
		if err == nil {
			data, err = io.ReadAll(r)
			r.Close()
		}
		return err
	})
	return data, err
}
