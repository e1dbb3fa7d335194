package gcs

import (
	"testing"
	"time"

	"cloud.google.com/go/storage"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// A Fake is what the tests outside the package may do with a fakeGCS.
type Fake struct{ fake *fakeGCS }

// NewFake returns an empty bucket with a round trip of 20 ms.
func NewFake(t testing.TB) Fake {
	f := newFakeGCS(t)
	f.SetLatency(20 * time.Millisecond)
	return Fake{f}
}

// Bucket returns the bucket as a machine of that name sees it.
func (f Fake) Bucket(machine string) *storage.BucketHandle { return f.fake.Machine(machine).Bucket }

// Deny takes permissions away.
func (f Fake) Deny(permissions ...string) { f.fake.Deny(permissions...) }

// Limit answers every request with 429 from now on.
func (f Fake) Limit() {
	f.fake.onRequest(func(*fakegcs.Request) fakegcs.Fault { return fakegcs.TooMany })
}
