package gcs

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"cloud.google.com/go/storage"
)

// required are the permissions that a Storage needs on its bucket.
var required = []string{
	"storage.objects.create",
	"storage.objects.delete",
	"storage.objects.get",
	"storage.objects.list",
	"storage.objects.update",
}

// Check returns nil if the bucket exists, and permits the caller all that a Storage
// needs. Otherwise the error names the missing permissions and the role that holds
// them, or is KindNotFound if there is no such bucket, or KindBadRequest if the
// prefix of [WithPrefix] is none.
//
// Check asks which permissions the caller has, which itself needs none
// (https://cloud.google.com/storage/docs/json_api/v1/buckets/testIamPermissions). If
// the server does not implement that, Check tries a list instead. So it makes one
// request, or two. It is safe for concurrent use.
func (s *Storage) Check(ctx context.Context) error {
	ctx, c := s.begin(ctx, "Check", version{})
	return c.end(s.bucket.checkPermissions(ctx))
}

func (b *bucket) checkPermissions(ctx context.Context) error {
	if err := b.checkPrefix(); err != nil {
		return err
	}
	var have []string
	err := b.do(ctx, requestTimeout, func(ctx context.Context) (err error) {
		have, err = b.handle.IAM().TestPermissions(ctx, required)
		return err
	})
	if err != nil {
		if _, _, err = b.page(ctx, &storage.Query{}, "", 1); err != nil {
			return fmt.Errorf("bucket %s: %w", b.handle.BucketName(), err)
		}
		return nil
	}
	missing := slices.DeleteFunc(slices.Clone(required), func(p string) bool { return slices.Contains(have, p) })
	if len(missing) > 0 {
		return fmt.Errorf("bucket %s: the caller lacks %s, which roles/storage.objectUser holds",
			b.handle.BucketName(), strings.Join(missing, ", "))
	}
	return nil
}
