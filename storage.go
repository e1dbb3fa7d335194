package gcs

import (
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"time"

	"cloud.google.com/go/storage"
)

// DefaultStaleThreshold is how long a marker is believed after its last renewal.
const DefaultStaleThreshold = 2 * time.Minute

const (
	// defaultChunkSize is the client's own default: a round trip each time that
	// many bytes of a large zip are sent.
	defaultChunkSize = 16 << 20
	maxChunkSize     = 128 << 20
)

// Storage keeps the versions of Go modules in a Cloud Storage bucket.
//
// It is safe for concurrent use, by any number of goroutines, processes and
// machines at once. The zero value is not usable; see [NewStorage].
//
// All names are as the go command writes them in go.mod files, not escaped:
// github.com/Masterminds/semver, not github.com/!masterminds/semver.
//
// # Errors
//
// Every error is an [*Error], or wraps one (see [WithErrors]). [Kind] tells what to
// do about it, and its Err is the cause. The kinds are the same in every call:
//
//   - KindBadRequest: a module, version or prefix that no object name can be made
//     of, before any request.
//   - KindNotFound: what the call is about does not exist. A bucket that does not
//     exist is KindNotFound in every call. A read cannot tell it from a missing
//     object; [Storage.Check] can.
//   - KindGatewayTimeout: the context's deadline passed. A cancelled context is
//     KindUnexpected. errors.Is reaches the context's error in both cases.
//   - KindRateLimit: GCS limited the rate for longer than the retries lasted.
//   - KindUnexpected: anything else. If GCS refused access, the message names the
//     permission, and a role that holds it.
//
// # Requests
//
// A request is retried for up to 5 minutes, or until its context ends, if the client
// would retry it, or if the connection closed without an answer. That is safe
// because every change is conditional. A request without an answer is sent again
// after 5 seconds, an upload after 10 seconds and more.
//
// # Permissions
//
// The caller needs storage.objects.create, .delete (to replace leftovers), .get,
// .list and .update (to clear the marker) on the bucket. roles/storage.objectUser
// holds all of them. To read, .get and .list are enough.
type Storage struct {
	bucket    *bucket
	log       *slog.Logger
	wrap      func(*Error) error
	threshold atomic.Int64 // stale threshold, a time.Duration
	now       func() time.Time
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

// WithLogger sends to l what an operator may want to know; docs/operations.md lists
// the lines. Without it, and with a nil l, a Storage is silent.
func WithLogger(l *slog.Logger) Option {
	return func(s *Storage) {
		if l != nil {
			s.log = l
		}
	}
}

// WithChunkSize sets how many bytes of a zip larger than 1 MiB are sent with one
// request. That is the memory which its upload holds. GCS takes multiples of 256
// KiB, and bytes is rounded up to one. The default, also if bytes is not positive, is
// 16 MiB; more than 128 MiB are taken as 128 MiB. A zip that is larger than bytes is
// sent in chunks also if it is not larger than 1 MiB.
func WithChunkSize(bytes int) Option {
	return func(s *Storage) {
		if bytes > 0 {
			s.bucket.chunkSize = min(bytes, maxChunkSize)
		}
	}
}

// WithPrefix puts all objects below a prefix, such as "athens/". The slash at its
// end may be left out. An empty prefix is none. If no object name can begin with
// the prefix, or if it holds the element "@v", every call is KindBadRequest.
//
// Storages with different prefixes in one bucket do not see each other's versions,
// unless one prefix is a folder of the other: "a/b/" is the module path b below "a/".
func WithPrefix(prefix string) Option {
	return func(s *Storage) {
		if prefix != "" && !strings.HasSuffix(prefix, "/") {
			prefix += "/"
		}
		s.bucket.prefix = prefix
	}
}

// WithErrors passes every error of the package through wrap on its way to the
// caller. A call that succeeds does not call wrap. What wrap returns must wrap the
// *Error, so that [Kind] and [SingleFlight] know it.
func WithErrors(wrap func(*Error) error) Option {
	if wrap == nil {
		panic("gcs: WithErrors: wrap is nil")
	}
	return func(s *Storage) { s.wrap = wrap }
}

// NewStorage returns a Storage on the bucket, which must exist; [Storage.Check] asks
// whether it does. NewStorage makes no request. The bucket's client, over HTTP or
// gRPC, remains the caller's to close. NewStorage panics if bucket or an option is
// nil.
//
// The back-off that was set with [storage.BucketHandle.Retryer] is used for chunks
// of large zips. All other requests are retried by this package.
func NewStorage(bucketHandle *storage.BucketHandle, opts ...Option) *Storage {
	if bucketHandle == nil {
		panic("gcs: NewStorage: the bucket is nil")
	}
	s := &Storage{
		bucket: &bucket{
			handle:    bucketHandle.Retryer(storage.WithPolicy(storage.RetryNever)),
			retrying:  bucketHandle.Retryer(storage.WithErrorFunc(isTransient)),
			chunkSize: defaultChunkSize,
			rand:      rand.N[time.Duration],
		},
		log:       slog.New(slog.DiscardHandler),
		wrap:      func(e *Error) error { return e },
		now:       time.Now,
		telemetry: newTelemetry(),
	}
	s.SetStaleThreshold(DefaultStaleThreshold)
	for _, opt := range opts {
		if opt == nil {
			panic("gcs: NewStorage: an option is nil")
		}
		opt(s)
	}
	s.bucket.log = s.log
	return s
}

// SetStaleThreshold sets how long after its last renewal a marker is believed: when
// a saver has crashed, the next one proceeds after that time. A claim of a single
// flight is believed for a quarter of it. A d that is not positive sets
// [DefaultStaleThreshold].
//
// A saver renews its marker four times in the threshold, but not more than once a
// second, so a threshold under four seconds makes live savers look dead. That, or
// machines that disagree about the threshold, wastes uploads and harms nothing.
//
// It is safe for concurrent use; calls that have begun may use either value.
func (s *Storage) SetStaleThreshold(d time.Duration) {
	if d <= 0 {
		d = DefaultStaleThreshold
	}
	s.threshold.Store(int64(d))
}

func (s *Storage) staleThreshold() time.Duration { return time.Duration(s.threshold.Load()) }

// state judges a snapshot by this machine's clock.
func (s *Storage) state(seen snapshot) State { return seen.state(s.now(), s.staleThreshold()) }

// newLease returns a lease that holds nothing yet.
func (s *Storage) newLease(v version, ext string, body []byte, threshold time.Duration) lease {
	return lease{b: s.bucket, v: v, ext: ext, id: newSaveID(), body: body, now: s.now, threshold: threshold}
}
