// Package storage stands in for Athens' package of the same name.
package storage

import (
	"context"
	"io"

	"github.com/gomods/athens/pkg/errors"
	"github.com/gomods/athens/pkg/paths"
)

type (
	// Backend is what every storage of Athens is.
	Backend interface {
		Lister
		Getter
		Saver
		Deleter
	}
	Lister interface {
		List(ctx context.Context, module string) ([]string, error)
	}
	Getter interface {
		Info(ctx context.Context, module, vsn string) ([]byte, error)
		GoMod(ctx context.Context, module, vsn string) ([]byte, error)
		Zip(ctx context.Context, module, vsn string) (SizeReadCloser, error)
	}
	Saver interface {
		Save(ctx context.Context, module, version string, mod []byte, zip io.Reader, zipMD5, info []byte) error
	}
	Deleter interface {
		Delete(ctx context.Context, module, vsn string) error
	}

	// Checker and Cataloger are what a storage may be in addition.
	Checker interface {
		Exists(ctx context.Context, module, version string) (bool, error)
	}
	Cataloger interface {
		Catalog(ctx context.Context, token string, pageSize int) ([]paths.AllPathParams, string, error)
	}

	SizeReadCloser interface {
		io.ReadCloser
		Size() int64
	}
)

// Version is a version that was fetched.
type Version struct {
	Mod    []byte
	Zip    io.ReadCloser
	ZipMD5 []byte
	Info   []byte
	Semver string
}

// WithChecker returns the backend's own Checker, or one that reads the .info.
func WithChecker(b Backend) Checker {
	if c, ok := b.(Checker); ok {
		return c
	}
	return infoChecker{b}
}

type infoChecker struct{ b Backend }

func (c infoChecker) Exists(ctx context.Context, module, version string) (bool, error) {
	_, err := c.b.Info(ctx, module, version)
	if errors.IsNotFoundErr(err) {
		return false, nil
	}
	return err == nil, err
}
