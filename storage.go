package gcs

import (
	"log/slog"
	"strings"
	"sync/atomic"
	"time"

	"cloud.google.com/go/storage"
)

// DefaultStaleThreshold is how long a marker is believed after its last renewal.
const DefaultStaleThreshold = 2 * time.Minute

const (
	maxChunkSize = 128 << 20
	// claimFraction is what part of the stale threshold a claim is believed.
	claimFraction = 4
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
// do about it, and its Err is the cause. The kinds are the same in every call, and
// [Storage.Save] has one more, KindAlreadyExists:
//
//   - KindBadRequest: a module, version or prefix that no object name can be made
//     of, before any request. Other arguments are said where they are refused.
//   - KindNotFound: what the call is about does not exist. A bucket that does not
//     exist is KindNotFound in every call. A read cannot tell it from a missing
//     object; [Storage.Check] can.
//   - KindGatewayTimeout: the context's deadline passed. A cancelled context is
//     KindUnexpected. errors.Is reaches the context's error in both cases.
//   - KindRateLimit: GCS limited the rate for longer than the retries lasted.
//   - KindUnexpected: anything else. If GCS says that the caller lacks a permission, the
//     message names it, and a role that holds it.
//
// # Requests
//
// A request is made again for up to 5 minutes, the last try included, or until its
// context ends. That is safe because every change is conditional. An answer of GCS
// decides by its code: 408, 409, 429, 5xx but 501, and a 403 that limits the rate are
// tried again. Without an answer, only what never passes is final: a certificate that
// does not verify, an unknown scheme, a credential that its issuer refuses. A request
// without an answer is sent again after 5 seconds, an upload after 10 seconds and more,
// and each time the wait is twice as long. A zip stream that breaks, or stalls, goes on
// where it was. The client retries the chunks of a zip. A chunk of 16 MiB has to be sent
// in 74 seconds, the smallest, of 256 KiB, in 11 ([WithChunkSize]). An upload breaks off
// when a chunk is not sent in two tries: after 2 minutes and 38 seconds, or 32 seconds. It
// is made again if the zip can be read again. So a line has to carry 222 KiB a second, or
// 24 with the smallest chunks.
//
// # Permissions
//
// The caller needs storage.objects.create, .delete (to replace leftovers), .get,
// .list and .update (to renew and clear the marker) on the bucket. roles/storage.objectUser
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
// the prefix, or if one of its elements is empty, ".", ".." or "@v", every call is
// KindBadRequest.
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
// *Error, so that [Kind] and [Storage.SingleFlight] know it. Concurrent calls call
// wrap concurrently. WithErrors panics if wrap is nil.
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
// Settings of the client's retries change nothing. The client may switch its retries off
// in the handle that was passed: do not use it for anything else.
func NewStorage(bucket *storage.BucketHandle, opts ...Option) *Storage {
	if bucket == nil {
		panic("gcs: NewStorage: the bucket is nil")
	}
	s := &Storage{
		bucket:    newBucket(bucket),
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
	s.bucket.log, s.bucket.telemetry = s.log, &s.telemetry
	return s
}

// SetStaleThreshold sets how long after its last renewal a marker is believed: when
// a saver has crashed, the next one proceeds after that time. A claim of a single
// flight is believed for a quarter of it. A d that is not positive sets
// [DefaultStaleThreshold].
//
// A saver renews its marker four times in the threshold, but not more than once a
// second. A renewal that gets no answer is sent again after 5 seconds, once. So under a
// threshold of 30 seconds, a live holder of a claim may look dead. That, or machines
// that disagree about the threshold, wastes uploads and harms nothing.
//
// It is safe for concurrent use; calls that have begun may use either value.
func (s *Storage) SetStaleThreshold(d time.Duration) {
	if d <= 0 {
		d = DefaultStaleThreshold
	}
	s.threshold.Store(int64(d))
}

func (s *Storage) staleThreshold() time.Duration { return time.Duration(s.threshold.Load()) }

// claimThreshold is how long after its last renewal a claim is believed: whoever
// fetches has stored nothing yet, so a wrong guess costs less than a save's.
func (s *Storage) claimThreshold() time.Duration { return s.staleThreshold() / claimFraction }

// classify judges a snapshot by this machine's clock.
func (s *Storage) classify(seen snapshot) State { return seen.classify(s.now(), s.staleThreshold()) }

// newLease returns a lease that holds nothing yet.
func (s *Storage) newLease(v ModuleVersion, ext string, body []byte, threshold time.Duration) lease {
	return lease{b: s.bucket, v: v, ext: ext, id: newSaveID(), body: body, now: s.now, threshold: threshold}
}
