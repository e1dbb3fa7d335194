package gcs

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"cloud.google.com/go/storage"
	"google.golang.org/api/option"
)

// permissions are what a Storage needs to have on its bucket.
var permissions = []string{
	"storage.objects.create",
	"storage.objects.delete",
	"storage.objects.get",
	"storage.objects.list",
	"storage.objects.update",
}

// Open returns a Storage on the bucket of that name, with a client over HTTP made
// with these options: application default credentials if there are none, or
// option.WithAuthCredentialsFile, option.WithEndpoint, option.WithHTTPClient, ….
// [Storage.Close] closes it.
//
// Open asks which permissions the caller has on the bucket, which itself needs
// none. If one that a Storage needs is missing, the error names it, and the role
// that holds it; if the bucket does not exist, it is KindNotFound. An emulator
// that cannot answer the question is taken if it can list the bucket. So Open makes
// one request, or two.
func Open(ctx context.Context, bucket string, opts ...option.ClientOption) (*Storage, error) {
	client, err := storage.NewClient(ctx, opts...)
	if err != nil {
		return nil, fail(ctx, "Open", version{}, err)
	}
	s := NewStorage(client.Bucket(bucket))
	s.client = client
	ctx, o := s.begin(ctx, "Open", version{})
	if err := o.end(s.permitted(ctx, bucket)); err != nil {
		client.Close()
		return nil, err
	}
	return s, nil
}

// permitted returns an error unless the bucket exists and permits all that is needed.
func (s *Storage) permitted(ctx context.Context, bucket string) error {
	var have []string
	err := attempt(ctx, requestTimeout, func(ctx context.Context) (err error) {
		have, err = s.bucket.IAM().TestPermissions(ctx, permissions)
		return err
	})
	if err != nil {
		if ctx.Err() != nil {
			return err
		}
		// Emulators answer 404 or 501 to what they do not know, and GCS 404
		// for a bucket that does not exist. A list tells them apart.
		_, _, listErr := s.page(ctx, listQuery(""), "", 1)
		if errors.Is(listErr, storage.ErrBucketNotExist) {
			return verdict{KindNotFound, fmt.Errorf("bucket %s: %w", bucket, listErr)}
		}
		if listErr != nil {
			return fmt.Errorf("bucket %s: %w", bucket, err)
		}
		return nil
	}
	missing := slices.DeleteFunc(slices.Clone(permissions), func(p string) bool { return slices.Contains(have, p) })
	if len(missing) > 0 {
		return fmt.Errorf("bucket %s: the caller lacks %s, which roles/storage.objectUser holds", bucket, strings.Join(missing, ", "))
	}
	return nil
}
