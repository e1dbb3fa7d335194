package gcs

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"cloud.google.com/go/storage"
	"google.golang.org/api/iterator"
	"google.golang.org/grpc/codes"
)

// DefaultStaleThreshold is how long a marker is believed after its last renewal.
const DefaultStaleThreshold = 2 * time.Minute

const (
	// defaultChunkSize is the client's own default, 16 MiB: a round trip each
	// time that many bytes of a large zip are sent.
	defaultChunkSize = 16 << 20
	// maxWhole is the largest zip that is held in memory as a whole, which
	// spares it the chunk and allows it to be sent twice.
	maxWhole = 1 << 20
	// maxPage is the most objects that GCS lists in one request.
	maxPage = 1000
	// requestTimeout is how long a request may go without an answer before it
	// is sent again. It can be: every change is conditional, so that the
	// second of two that both arrive is refused.
	requestTimeout = 5 * time.Second
	// retryLimit is how long a request that hangs, or is answered with 429 or 503,
	// is sent again before the call fails.
	retryLimit = 5 * time.Minute
)

// Storage keeps the versions of Go modules in a Cloud Storage bucket.
//
// It is safe for concurrent use, by any number of goroutines, processes and
// machines at once. The zero value is not usable; see [NewStorage] and [Open].
//
// All names are as the go command writes them in go.mod files, not escaped:
// github.com/Masterminds/semver, not github.com/!masterminds/semver.
//
// # Errors
//
// Every error is an [*Error]: [Kind] tells what to do about it, and its Err is
// the cause. A module or version that no object name can be made of is
// KindBadRequest, before any request; an ended context is reachable with
// errors.Is, with KindGatewayTimeout if its deadline passed and KindUnexpected
// if it was cancelled; a rate limit that outlived the retries is KindRateLimit;
// a refused permission is KindUnexpected, and its message names the permission
// and a role that holds it.
//
// # Permissions
//
// On the bucket: storage.objects.create, .delete (to replace leftovers), .get,
// .list and .update (to clear the marker), all of which roles/storage.objectUser
// holds. Reading alone needs .get and .list, and [NewStorage]; [Open] asks for all five.
type Storage struct {
	bucket    *storage.BucketHandle
	client    *storage.Client // made by Open, nil otherwise
	chunkSize int
	log       *slog.Logger
	threshold atomic.Int64     // stale threshold, a time.Duration
	now       func() time.Time // what markers are written and judged by
	rand      func(n time.Duration) time.Duration
	telemetry telemetry
	noClaims  atomic.Bool // the bucket does not permit claims; see SingleFlight
}

// An Option changes what [NewStorage] returns.
type Option func(*Storage)

// WithStaleThreshold sets how long after its last renewal a marker is believed,
// as [Storage.SetStaleThreshold] does. The default is [DefaultStaleThreshold].
func WithStaleThreshold(d time.Duration) Option {
	return func(s *Storage) { s.SetStaleThreshold(d) }
}

// WithLogger is [Storage.SetLogger] as an option.
func WithLogger(l *slog.Logger) Option {
	return func(s *Storage) { s.SetLogger(l) }
}

// WithChunkSize sets how many bytes of a zip larger than 1 MiB are sent with
// one request, which is the memory that its upload holds; GCS wants multiples of
// 256 KiB, and it is rounded up to one. The default, also for bytes that are not
// positive, is 16 MiB. A zip larger than bytes, but not than 1 MiB, is sent in
// chunks too.
func WithChunkSize(bytes int) Option {
	return func(s *Storage) {
		if bytes > 0 {
			s.chunkSize = bytes
		}
	}
}

// NewStorage returns a Storage on the bucket, which must exist. It makes no
// request. The bucket's client, over HTTP or gRPC, remains the caller's to close.
//
// Requests are retried when the client would, and in a few cases more, in which it
// cannot know that here every change is conditional on what it replaces: for some
// minutes, or until their context ends. Back-off and limits that were set with
// [storage.BucketHandle.Retryer] stay, for requests other than small uploads; an
// error function does not.
func NewStorage(bucket *storage.BucketHandle, opts ...Option) *Storage {
	s := &Storage{
		bucket:    bucket.Retryer(storage.WithErrorFunc(isTransient)),
		chunkSize: defaultChunkSize,
		log:       slog.New(slog.DiscardHandler),
		now:       time.Now,
		rand:      rand.N[time.Duration],
		telemetry: newTelemetry(),
	}
	s.SetStaleThreshold(DefaultStaleThreshold)
	for _, opt := range opts {
		opt(s)
	}
	return s
}

// SetStaleThreshold sets how long after its last renewal a marker is believed:
// when a saver has crashed, the next one proceeds after that time. A saver
// renews its marker four times in the threshold, and GCS takes one update of an
// object's metadata a second, so a threshold under four seconds makes live savers
// look dead. That, or machines that disagree about it, wastes uploads and harms
// nothing. A d that is not positive sets [DefaultStaleThreshold].
//
// It is safe for concurrent use; calls that have begun may use either value.
func (s *Storage) SetStaleThreshold(d time.Duration) {
	if d <= 0 {
		d = DefaultStaleThreshold
	}
	s.threshold.Store(int64(d))
}

// SetLogger sends what an operator may want to know to l: at level info, when a
// version that a crash or a failed upload had left behind is healed or finished; at
// level warn, when a marker or a claim could not be given up, when a save was
// fenced, and when the bucket does not permit claims. A nil l is silent, as is a
// Storage without a logger. SetLogger must not be called while other calls are
// under way.
func (s *Storage) SetLogger(l *slog.Logger) {
	if l == nil {
		l = slog.New(slog.DiscardHandler)
	}
	s.log = l
}

func (s *Storage) staleThreshold() time.Duration { return time.Duration(s.threshold.Load()) }

// Close closes the client if [Open] made it, and does nothing otherwise. It must
// not be called while other calls are under way.
func (s *Storage) Close() error {
	if s.client == nil {
		return nil
	}
	return s.client.Close()
}

func (s *Storage) object(v version, ext string) *storage.ObjectHandle {
	return s.bucket.Object(v.object(ext))
}

// attempt makes a request, and makes it again whenever it was not answered
// within the timeout, which grows, until the context ends or retryLimit has passed.
func attempt(ctx context.Context, timeout time.Duration, request func(context.Context) error) error {
	for start := time.Now(); ; timeout *= 2 {
		tryCtx, cancel := context.WithTimeout(ctx, timeout)
		err := request(tryCtx)
		// Over gRPC the server knows the deadline too, and can be the first to
		// say that it passed.
		hung := !ended(ctx) && (tryCtx.Err() != nil || hasCode(err, 0, codes.DeadlineExceeded))
		cancel()
		if err == nil || !hung {
			return err
		}
		if waited := time.Since(start); waited >= retryLimit {
			return fmt.Errorf("no answer, or none but to try again, in %v: %w", waited.Round(time.Second), err)
		}
	}
}

// ended reports whether ctx has ended. A deadline that has come has ended it, even
// when the timer of ctx is still to fire.
func ended(ctx context.Context) bool {
	deadline, ok := ctx.Deadline()
	return ctx.Err() != nil || ok && !time.Now().Before(deadline)
}

// update replaces or, if it is empty, clears an object's metadata, if cond
// holds, and stores the new metageneration.
func (s *Storage) update(ctx context.Context, v version, ext string, cond storage.Conditions, metadata map[string]string, metagen *int64) error {
	return attempt(ctx, requestTimeout, func(ctx context.Context) error {
		attrs, err := s.object(v, ext).If(cond).Update(ctx, storage.ObjectAttrsToUpdate{Metadata: metadata})
		if err != nil {
			return needs(err, "storage.objects.update")
		}
		*metagen = attrs.Metageneration
		return nil
	})
}

func (s *Storage) attrs(ctx context.Context, v version, ext string) (attrs *storage.ObjectAttrs, err error) {
	err = attempt(ctx, requestTimeout, func(ctx context.Context) error {
		attrs, err = s.object(v, ext).Attrs(ctx)
		return needs(err, "storage.objects.get")
	})
	return attrs, err
}

// look takes a snapshot of the version, with one request unless GCS answers in parts.
func (s *Storage) look(ctx context.Context, v version) (snapshot, error) {
	seen, pages, err := s.listVersion(ctx, v)
	for err == nil && pages > 1 {
		// One page shows one moment, several do not: GCS may send less than
		// it is asked for. But nobody came or went, saved or deleted while the
		// .mod stayed as it was.
		var before, after *storage.ObjectAttrs
		if before, err = s.mod(ctx, v); err == nil {
			if seen, pages, err = s.listVersion(ctx, v); err == nil && pages > 1 {
				after, err = s.mod(ctx, v)
			}
		}
		if err == nil && pages > 1 && sameObject(before, after) {
			seen.mod = after
			break
		}
	}
	return seen, err
}

// mod returns the attributes of the version's .mod, or nil if there is none.
func (s *Storage) mod(ctx context.Context, v version) (*storage.ObjectAttrs, error) {
	attrs, err := s.attrs(ctx, v, extMod)
	if isAbsent(err) {
		return nil, nil
	}
	return attrs, err
}

// listVersion lists the version's objects, and tells how many pages that took.
func (s *Storage) listVersion(ctx context.Context, v version) (seen snapshot, pages int, err error) {
	// The names sort .info, .lock, .mod, .zip. The offsets keep out v1.0.0.info
	// when the version is v1; a server that ignores them only makes this slower.
	q := listQuery(v.object(""))
	q.StartOffset, q.EndOffset = v.object(extInfo), v.object(extZip)+"\x00"
	for token := ""; ; {
		page, next, err := s.page(ctx, q, token, maxPage)
		if err != nil {
			return snapshot{}, 0, err
		}
		pages++
		for _, attrs := range page {
			if w, ext, ok := parseObject(attrs.Name); ok && w == v {
				*seen.slot(ext) = attrs
			}
		}
		if token = next; token == "" {
			return seen, pages, nil
		}
	}
}

// listQuery asks for the objects below a prefix with the attributes that decide
// a version's state, and not for access lists, which are most of what a list
// sends by default.
func listQuery(prefix string) *storage.Query {
	q := &storage.Query{Prefix: prefix, Projection: storage.ProjectionNoACL}
	q.SetAttrSelection([]string{"Name", "Size", "Generation", "Metageneration", "Metadata", "Created", "Updated"})
	return q
}

// page makes one request for the part of a listing that begins at that token, and
// returns the token of the next part. A part may be smaller than size.
func (s *Storage) page(ctx context.Context, q *storage.Query, token string, size int) (page []*storage.ObjectAttrs, next string, err error) {
	err = attempt(ctx, requestTimeout, func(ctx context.Context) error {
		page, next = nil, ""
		it := s.bucket.Objects(ctx, q)
		info := it.PageInfo()
		info.MaxSize, info.Token = size, token
		for {
			attrs, err := it.Next()
			if err == iterator.Done {
				return nil
			}
			if err != nil {
				return needs(err, "storage.objects.list")
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
