package gcstest_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	"cloud.google.com/go/storage"
	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs"
	"github.com/athensgcs/gcs/gcstest"
)

var (
	t   = &fakeT{} // the t of a test
	ctx = context.Background()
)

type fakeT struct {
	testing.TB
	cleanup func()
}

func (t *fakeT) Cleanup(f func()) { t.cleanup = f }

func ExampleNewBucket() {
	s := gcs.NewStorage(gcstest.NewBucket(t))
	for range 2 {
		err := s.Save(ctx, "example.com/mod", "v1.0.0", []byte("module example.com/mod\n"),
			strings.NewReader("a zip"), nil, []byte(`{"Version":"v1.0.0"}`))
		fmt.Println(err)
	}
	fmt.Println(s.List(ctx, "example.com/mod"))
	// Output:
	// <nil>
	// gcs.Save: example.com/mod@v1.0.0: the version is stored already
	// [v1.0.0] <nil>
}

func TestNewBucket(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		one, two := gcstest.NewBucket(t), gcstest.NewBucket(t)
		require.NoError(t, gcs.NewStorage(one).Check(t.Context()))
		require.NoError(t, one.Object("o").NewWriter(t.Context()).Close())
		_, err := one.Object("o").Attrs(t.Context())
		require.NoError(t, err)
		_, err = two.Object("o").Attrs(t.Context())
		require.ErrorIs(t, err, storage.ErrObjectNotExist)
	})
	ends := fakeT{}
	gcstest.NewBucket(&ends)
	require.NotNil(t, ends.cleanup)
	ends.cleanup()
}
