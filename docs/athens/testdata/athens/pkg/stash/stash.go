// Package stash stands in for Athens' package of the same name.
package stash

import (
	"context"
	"time"

	"github.com/gomods/athens/pkg/errors"
	"github.com/gomods/athens/pkg/module"
	"github.com/gomods/athens/pkg/observ"
	"github.com/gomods/athens/pkg/storage"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sync/singleflight"
)

// A Stasher fetches a version and saves it.
type Stasher interface {
	Stash(ctx context.Context, mod, ver string) (string, error)
}

// A Wrapper puts a Stasher around another.
type Wrapper func(Stasher) Stasher

// New returns the plain Stasher in its wrappers, of which the last is outermost.
// Athens' has an index in addition.
func New(f module.Fetcher, s storage.Backend, timeout time.Duration, wrappers ...Wrapper) Stasher {
	var st Stasher = &stasher{f: f, s: s, timeout: timeout}
	for _, wrap := range wrappers {
		st = wrap(st)
	}
	return st
}

type stasher struct {
	f       module.Fetcher
	s       storage.Backend
	timeout time.Duration
	calls   singleflight.Group
}

func (st *stasher) Stash(ctx context.Context, mod, ver string) (string, error) {
	const op errors.Op = "stasher.Stash"
	_, span := observ.StartSpan(ctx, string(op))
	defer span.End()
	saved, err, _ := st.calls.Do(mod+"###"+ver, func() (any, error) {
		// Of the caller's context only the span is kept.
		ctx, cancel := context.WithTimeout(trace.ContextWithSpan(context.Background(), span), st.timeout)
		defer cancel()
		v, err := st.f.Fetch(ctx, mod, ver)
		if err != nil {
			return "", errors.E(op, err)
		}
		defer v.Zip.Close()
		if v.Semver != ver {
			exists, err := storage.WithChecker(st.s).Exists(ctx, mod, v.Semver)
			if err != nil {
				return "", errors.E(op, err)
			}
			if exists {
				return v.Semver, nil
			}
		}
		if err := st.s.Save(ctx, mod, v.Semver, v.Mod, v.Zip, v.ZipMD5, v.Info); err != nil {
			return "", errors.E(op, err)
		}
		return v.Semver, nil
	})
	return saved.(string), err
}
