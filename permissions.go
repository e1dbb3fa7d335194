package gcs

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"cloud.google.com/go/storage"
	"google.golang.org/grpc/codes"
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
// needs. If permissions are missing, the error is KindUnexpected, and names them and
// the role that holds them. A bucket that does not exist is KindNotFound. A prefix
// that no object name can have is KindBadRequest; see [WithPrefix].
//
// Check asks which permissions the caller has, which itself needs none
// (https://cloud.google.com/storage/docs/json_api/v1/buckets/testIamPermissions). If
// the server does not know the question, Check lists one object instead, and returns
// nil if it can. So it makes one request, or two. It is safe for concurrent use.
func (s *Storage) Check(ctx context.Context) error {
	ctx, c := s.begin(ctx, "Check", ModuleVersion{})
	return c.end(s.bucket.checkPermissions(ctx))
}

func (b *bucket) checkPermissions(ctx context.Context) error {
	if err := b.checkPrefix(); err != nil {
		return err
	}
	var have []string
	err := b.do(ctx, "permissions", requestTimeout, func(ctx context.Context) (err error) {
		have, err = b.handle.IAM().TestPermissions(ctx, required)
		return err
	})
	if err != nil {
		if hasCode(err, http.StatusNotFound, codes.NotFound) || hasCode(err, http.StatusNotImplemented, codes.Unimplemented) {
			_, _, err = b.page(ctx, &storage.Query{}, "", 1)
		}
		if err != nil {
			err = fmt.Errorf("bucket %s: %w", b.handle.BucketName(), err)
		}
		return err
	}
	missing := slices.DeleteFunc(slices.Clone(required), func(p string) bool { return slices.Contains(have, p) })
	if len(missing) > 0 {
		return fmt.Errorf("bucket %s: the caller lacks %s, which roles/storage.objectUser holds",
			b.handle.BucketName(), strings.Join(missing, ", "))
	}
	return nil
}
