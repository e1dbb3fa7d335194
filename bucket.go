package gcs

import (
	"errors"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"cloud.google.com/go/storage"
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
	telemetry *telemetry
	noClear   *sync.Once // says that the server does not clear metadata
	insists   bool       // see insistent
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
	if b.handle.BucketName() == "" {
		return errors.New("the bucket has no name")
	}
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
