package gcs

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"cloud.google.com/go/storage"
	"google.golang.org/grpc/codes"
)

const (
	// requestTimeout is how long a request may go without an answer before it is
	// sent again. Every change is conditional, so the second of two that both
	// arrive is refused.
	requestTimeout = 5 * time.Second
	// retryLimit is how long a request that hangs, or is answered with 429 or 503,
	// is sent again before the call fails. So is a stream that breaks.
	retryLimit = 5 * time.Minute
)

// maxRefused is how often in a row a refused precondition is taken for somebody
// else's doing.
const maxRefused = 10

// A bucket makes every request of the package, and retries it.
type bucket struct {
	handle    *storage.BucketHandle // without retries
	prefix    string                // of all object names: empty, or with a slash at the end
	chunkSize int
	log       *slog.Logger
	rand      func(n time.Duration) time.Duration // a random time below n
	noClear   *sync.Once                          // says that the server does not clear metadata
	insists   bool                                // see insistent
}

// defaultChunkSize is the client's own default: a round trip each time that many
// bytes of a large zip are sent.
const defaultChunkSize = 16 << 20

func newBucket(handle *storage.BucketHandle) *bucket {
	return &bucket{
		handle:    handle.Retryer(storage.WithPolicy(storage.RetryNever)),
		chunkSize: defaultChunkSize,
		rand:      rand.N[time.Duration],
		noClear:   new(sync.Once),
	}
}

// insistent returns a bucket that makes a request again after every failure but a
// refused precondition and an absent object, until the context ends. Giving up needs
// that: what fails it blocks the version for others.
func (b *bucket) insistent() *bucket {
	c := *b
	c.insists = true
	return &c
}

// check returns an error of KindBadRequest if the version cannot be in the bucket.
func (b *bucket) check(v ModuleVersion) error {
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

func (b *bucket) name(v ModuleVersion, ext string) string { return b.prefix + v.object(ext) }

// object returns the handle of an object. The client makes its requests once.
func (b *bucket) object(v ModuleVersion, ext string) *storage.ObjectHandle {
	return b.handle.Object(b.name(v, ext))
}

// streamed returns the handle of an object that is sent or read in several requests.
// The client retries them after an error for which retry is true.
func (b *bucket) streamed(v ModuleVersion, ext string, retry func(error) bool) *storage.ObjectHandle {
	return b.object(v, ext).Retryer(storage.WithPolicy(storage.RetryIdempotent),
		storage.WithErrorFunc(retry), storage.WithMaxRetryDuration(retryLimit))
}

// do makes a request, and makes it again when it is not answered in time or fails
// for a reason that may pass, until the context ends or retryLimit has passed.
func (b *bucket) do(ctx context.Context, timeout time.Duration, request func(context.Context) error) error {
	start := time.Now()
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, 10*time.Second) {
		// A server in the same process need not look at the context.
		if err := ctx.Err(); err != nil {
			return err
		}
		tryCtx, cancel := context.WithTimeout(ctx, timeout)
		err := request(tryCtx)
		// Over gRPC the server knows the deadline too, and can be the first to
		// say that it passed.
		hung := err != nil && (tryCtx.Err() != nil || hasCode(err, 0, codes.DeadlineExceeded))
		cancel()
		again := hung || isTransient(err) || b.insists && !isPreconditionFailed(err) && !isAbsentObject(err)
		if err == nil || ctx.Err() != nil || !again {
			return err
		}
		if waited := time.Since(start); waited >= retryLimit {
			return fmt.Errorf("no answer, or none but to try again, in %v: %w", waited.Round(time.Second), err)
		}
		if hung {
			timeout *= 2
		}
		if sleepErr := sleep(ctx, b.rand(pause)); sleepErr != nil {
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
	cond := ifNotReplaced(seen)
	if seen != nil {
		cond.MetagenerationMatch = seen.Metageneration
	}
	return cond
}

// ifNotReplaced is the precondition that the object is still the one seen,
// whatever its metadata is by now, or still absent.
func ifNotReplaced(seen *storage.ObjectAttrs) storage.Conditions {
	if seen == nil {
		return storage.Conditions{DoesNotExist: true}
	}
	return storage.Conditions{GenerationMatch: seen.Generation}
}
