package gcs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"time"

	"cloud.google.com/go/storage"
	"google.golang.org/api/iterator"
	"google.golang.org/grpc/codes"
)

const (
	// requestTimeout is how long a request may go without an answer before it is
	// sent again. Every change is conditional, so the second of two that both
	// arrive is refused.
	requestTimeout = 5 * time.Second
	// retryLimit is how long a request that hangs, or is answered with 429 or 503,
	// is sent again before the call fails.
	retryLimit = 5 * time.Minute
	// maxPage is how many objects a page of a listing has at most: 333 versions. GCS
	// would send 1,000. https://cloud.google.com/storage/docs/json_api/v1/objects/list
	maxPage = 999
)

// A bucket makes every request of the package, and retries it.
type bucket struct {
	handle    *storage.BucketHandle // each request is made once
	retrying  *storage.BucketHandle // the client retries: chunks, and streams that break
	prefix    string                // of all object names: empty, or with a slash at the end
	chunkSize int
	log       *slog.Logger
	rand      func(n time.Duration) time.Duration // a random time below n
	noClear   sync.Once                           // says that the server does not clear metadata
}

// check returns an error of KindBadRequest if the version cannot be in the bucket.
func (b *bucket) check(v version) error {
	if err := b.checkPrefix(); err != nil {
		return err
	}
	if err := v.check(); err != nil {
		return err
	}
	if err := checkName(b.name(v, extInfo)); err != nil {
		return badRequest("version", err)
	}
	return nil
}

// checkModule is check for a module without a version.
func (b *bucket) checkModule(module string) error {
	if err := b.checkPrefix(); err != nil {
		return err
	}
	err := checkPath(module)
	if err == nil {
		err = checkName(b.prefix + module)
	}
	if err != nil {
		return badRequest("module", err)
	}
	return nil
}

func (b *bucket) checkPrefix() error {
	if b.prefix == "" {
		return nil
	}
	if err := checkPath(strings.TrimSuffix(b.prefix, "/")); err != nil {
		return badRequest("prefix", err)
	}
	return nil
}

func (b *bucket) name(v version, ext string) string { return b.prefix + v.object(ext) }

// do makes a request, and makes it again when it is not answered in time or fails
// for a reason that may pass, until the context ends or retryLimit has passed.
func (b *bucket) do(ctx context.Context, timeout time.Duration, request func(context.Context) error) error {
	start := time.Now()
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, 10*time.Second) {
		tryCtx, cancel := context.WithTimeout(ctx, timeout)
		err := request(tryCtx)
		// Over gRPC the server knows the deadline too, and can be the first to
		// say that it passed.
		hung := err != nil && (tryCtx.Err() != nil || hasCode(err, 0, codes.DeadlineExceeded))
		cancel()
		if err == nil || hasEnded(ctx) || !hung && !isTransient(err) {
			return err
		}
		if waited := time.Since(start); waited >= retryLimit {
			return fmt.Errorf("no answer, or none but to try again, in %v: %w", waited.Round(time.Second), err)
		}
		if hung {
			timeout *= 2
		} else if sleepErr := sleep(ctx, b.rand(pause)); sleepErr != nil {
			return fmt.Errorf("%w: %w", sleepErr, err)
		}
	}
}

// sleep waits for d or until the context ends.
func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// ifUnchanged is the precondition that the object is still the one seen, with the
// same metadata, or still absent.
func ifUnchanged(seen *storage.ObjectAttrs) storage.Conditions {
	if seen == nil {
		return storage.Conditions{DoesNotExist: true}
	}
	return storage.Conditions{GenerationMatch: seen.Generation, MetagenerationMatch: seen.Metageneration}
}

// ifNotReplaced is the precondition that the object is still the one seen,
// whatever its metadata is by now, or still absent.
func ifNotReplaced(seen *storage.ObjectAttrs) storage.Conditions {
	if seen == nil {
		return storage.Conditions{DoesNotExist: true}
	}
	return storage.Conditions{GenerationMatch: seen.Generation}
}

// attrs returns the attributes of an object, or nil if there is none.
func (b *bucket) attrs(ctx context.Context, v version, ext string) (attrs *storage.ObjectAttrs, err error) {
	err = b.do(ctx, requestTimeout, func(ctx context.Context) error {
		attrs, err = b.handle.Object(b.name(v, ext)).Attrs(ctx)
		return withPermission(err, "storage.objects.get")
	})
	if isAbsent(err) {
		return nil, nil
	}
	return attrs, err
}

// update replaces an object's metadata, or clears it if metadata is empty, and
// returns what the object is then.
func (b *bucket) update(ctx context.Context, v version, ext string, cond storage.Conditions, metadata map[string]string) (attrs *storage.ObjectAttrs, err error) {
	err = b.do(ctx, requestTimeout, func(ctx context.Context) error {
		attrs, err = b.handle.Object(b.name(v, ext)).If(cond).Update(ctx, storage.ObjectAttrsToUpdate{Metadata: metadata})
		return withPermission(err, "storage.objects.update")
	})
	return attrs, err
}

var errNotCleared = errors.New("the server does not clear metadata")

// clear removes the marker from an object. A server that answers with the marker
// still there is asked again, to set it to an empty value.
func (b *bucket) clear(ctx context.Context, v version, ext string, cond storage.Conditions) (*storage.ObjectAttrs, error) {
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
func (b *bucket) remove(ctx context.Context, v version, ext string, cond storage.Conditions) error {
	err := b.do(ctx, requestTimeout, func(ctx context.Context) error {
		return withPermission(b.handle.Object(b.name(v, ext)).If(cond).Delete(ctx), "storage.objects.delete")
	})
	if isAbsent(err) {
		return nil
	}
	return err
}

// look lists the version, with one request unless GCS answers in parts.
func (b *bucket) look(ctx context.Context, v version) (seen snapshot, err error) {
	// The names sort .info, .lock, .mod, .zip. The offsets keep out v1.0.0.info
	// when the version is v1; a server that ignores them only makes this slower.
	q := &storage.Query{Prefix: b.name(v, ""), StartOffset: b.name(v, extInfo), EndOffset: b.name(v, extZip) + "\x00"}
	for token := ""; ; {
		page, next, err := b.page(ctx, q, token, maxPage)
		if err != nil {
			return snapshot{}, err
		}
		for _, attrs := range page {
			if w, ext, ok := b.parse(attrs); ok && w == v {
				*seen.slot(ext) = attrs
			}
		}
		if token = next; token == "" {
			return seen, nil
		}
	}
}

// parse tells which object of which version attrs describes.
func (b *bucket) parse(attrs *storage.ObjectAttrs) (v version, ext string, ok bool) {
	name, ok := strings.CutPrefix(attrs.Name, b.prefix)
	if !ok {
		return version{}, "", false
	}
	return parseObject(name)
}

// page makes one request for the part of a listing that begins at that token, and
// returns the token of the next part. A part may be smaller than size. It asks for
// the attributes that decide a version's state, and not for access lists, which are
// most of what a list sends by default.
func (b *bucket) page(ctx context.Context, q *storage.Query, token string, size int) (page []*storage.ObjectAttrs, next string, err error) {
	q.Projection = storage.ProjectionNoACL
	q.SetAttrSelection([]string{"Name", "Size", "Generation", "Metageneration", "Metadata", "Created", "Updated"})
	err = b.do(ctx, requestTimeout, func(ctx context.Context) error {
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
				return withPermission(err, "storage.objects.list")
			}
			page = append(page, attrs)
			if info.Remaining() == 0 {
				next = info.Token
				return nil
			}
		}
	})
	return page, next, err
}

// read returns the bytes of an object.
func (b *bucket) read(ctx context.Context, v version, ext string) (data []byte, err error) {
	err = b.do(ctx, requestTimeout, func(ctx context.Context) error {
		r, err := b.handle.Object(b.name(v, ext)).NewReader(ctx)
		if err == nil {
			data, err = io.ReadAll(r)
			r.Close()
		}
		return withPermission(err, "storage.objects.get")
	})
	return data, err
}

// open returns a stream of an object, which ends with ctx, or when cancel is called.
func (b *bucket) open(ctx context.Context, v version, ext string) (r *storage.Reader, cancel context.CancelFunc, err error) {
	err = b.do(ctx, requestTimeout, func(tryCtx context.Context) error {
		var streamCtx context.Context
		streamCtx, cancel = context.WithCancel(ctx)
		stop := context.AfterFunc(tryCtx, cancel)
		r, err = b.retrying.Object(b.name(v, ext)).NewReader(streamCtx)
		if err == nil && !stop() { // answered, but too late
			r.Close()
			err = tryCtx.Err()
		}
		if err != nil {
			cancel()
		}
		return withPermission(err, "storage.objects.get")
	})
	return r, cancel, err
}
