// Package module stands in for Athens' package of the same name.
package module

import (
	"context"

	"github.com/gomods/athens/pkg/storage"
)

// A Fetcher gets a version from version control.
type Fetcher interface {
	Fetch(ctx context.Context, mod, ver string) (*storage.Version, error)
}
