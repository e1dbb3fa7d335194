// Package log stands in for Athens' package of the same name.
package log

import (
	"context"
	stderrors "errors"
	"log/slog"

	"github.com/gomods/athens/pkg/errors"
)

// Logger is the log of Athens.
type Logger struct{ *slog.Logger }

// SystemErr logs an error with its fields, at the level of its severity.
func (l Logger) SystemErr(err error) {
	var e errors.Error
	if !stderrors.As(err, &e) {
		l.Error(err.Error())
		return
	}
	l.Log(context.Background(), errors.Severity(err), err.Error(), "operation", e.Op, "kind", errors.Kind(err),
		"module", e.Module, "version", e.Version, "ops", errors.Ops(e))
}
