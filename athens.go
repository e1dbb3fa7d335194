package gcs

import "context"

// A Backend is a [Storage] with the named types of an Athens build:
//
//	gcs.Backend[storage.SizeReadCloser, paths.AllPathParams]{Storage: s}
//
// with Athens' packages storage and paths is a storage.Backend, a storage.Checker
// and a storage.Cataloger there. Z is Athens' storage.SizeReadCloser, an interface
// type, and P its paths.AllPathParams. [WithErrors] makes its errors those of Athens.
// A Backend is safe for concurrent use, and makes the requests of its Storage.
type Backend[Z SizeReadCloser, P ~struct {
	Module  string `json:"module"`
	Version string `json:"version"`
}] struct {
	*Storage
}

// Zip is [Storage.Zip].
func (b Backend[Z, P]) Zip(ctx context.Context, module, version string) (zip Z, err error) {
	r, err := b.Storage.Zip(ctx, module, version)
	if err != nil {
		return zip, err
	}
	return r.(Z), nil
}

// Catalog is [Storage.Catalog].
func (b Backend[Z, P]) Catalog(ctx context.Context, token string, pageSize int) ([]P, string, error) {
	page, next, err := b.Storage.Catalog(ctx, token, pageSize)
	if err != nil {
		return nil, "", err
	}
	params := make([]P, len(page))
	for i, mv := range page {
		params[i] = P(mv)
	}
	return params, next, nil
}
