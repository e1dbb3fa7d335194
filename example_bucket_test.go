package gcs

import (
	"testing"

	"cloud.google.com/go/storage"
)

// NewExampleBucket is an empty bucket for the examples, which have no testing.T.
func NewExampleBucket() *storage.BucketHandle {
	return newFakeGCS(new(testing.T)).Machine("example").Bucket
}
