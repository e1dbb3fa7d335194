package gcs

import (
	"context"
	"errors"
)

// Catalog returns up to pageSize complete versions of the whole bucket, or 1,000
// when pageSize is not positive, and the token to ask for the next page with. The
// token is empty on the last page, and to ask for the first. A token is the name of
// a .zip object, below the prefix; another one is KindBadRequest.
//
// A version that is complete all the while is on one page, and on no other,
// whatever is saved and deleted between two calls. The order is that of the names
// of the .zip objects.
//
// It makes the requests of [Storage.List]. The first asks for the objects of pageSize+1
// versions, and never for more than 999. It is safe for concurrent use.
func (s *Storage) Catalog(ctx context.Context, token string, pageSize int) ([]ModuleVersion, string, error) {
	ctx, c := s.begin(ctx, "Catalog", ModuleVersion{})
	page, next, err := s.catalog(ctx, token, pageSize)
	return page, next, c.end(err)
}

func (s *Storage) catalog(ctx context.Context, token string, pageSize int) ([]ModuleVersion, string, error) {
	if err := s.bucket.checkPrefix(); err != nil {
		return nil, "", err
	}
	after := ""
	if token != "" {
		v, ext, ok := parseObject(token)
		if !ok || ext != extZip || s.bucket.check(v) != nil {
			return nil, "", badRequest("token", errors.New("is not one that Catalog made"))
		}
		after = s.bucket.name(v, extZip)
	}
	if pageSize <= 0 {
		pageSize = 1000
	}
	// One version more tells that it is not the last page.
	objects := min(3*min(pageSize, maxPage)+3, maxPage)
	page := []ModuleVersion{}
	for v, err := range s.completed(ctx, s.bucket.prefix, after, objects) {
		if err != nil {
			return nil, "", err
		}
		if len(page) == pageSize {
			return page, page[len(page)-1].object(extZip), nil
		}
		page = append(page, v)
	}
	return page, "", nil
}
