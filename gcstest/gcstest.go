// Package gcstest has a Google Cloud Storage bucket in memory, for the tests of
// programs that import the library.
package gcstest

import (
	"testing"

	"cloud.google.com/go/storage"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// NewBucket returns an empty bucket, which is gone when the test ends. It keeps
// conditions, generations and metadata as Cloud Storage does. It opens no socket and
// starts no goroutine, so it also works in a bubble of testing/synctest.
func NewBucket(t testing.TB) *storage.BucketHandle {
	server := fakegcs.New()
	server.DiscardLog()
	t.Cleanup(server.Close)
	return server.Machine("test").Bucket
}
