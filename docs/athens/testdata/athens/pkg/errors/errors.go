// Package errors stands in for Athens' package of the same name.
package errors

import (
	"errors"
	"log/slog"
	"math"
	"net/http"
	"slices"
)

// Kinds of errors.
const (
	KindNotFound       = http.StatusNotFound
	KindBadRequest     = http.StatusBadRequest
	KindUnexpected     = http.StatusInternalServerError
	KindAlreadyExists  = http.StatusConflict
	KindRateLimit      = http.StatusTooManyRequests
	KindGatewayTimeout = http.StatusGatewayTimeout
)

type (
	Op string // an operation
	M  string // a module
	V  string // a version
)

// Error is what E returns. It is an error as a value, not as a pointer.
type Error struct {
	Kind     int
	Op       Op
	Module   M
	Version  V
	Err      error
	Severity slog.Level
}

const unset = slog.Level(math.MinInt32)

func (e Error) Error() string { return e.Err.Error() }

func (e Error) Unwrap() error { return e.Err }

// E makes an Error of its arguments, which it tells apart by their types.
func E(op Op, args ...any) error {
	e := Error{Op: op, Severity: unset}
	for _, arg := range args {
		switch arg := arg.(type) {
		case error:
			e.Err = arg
		case string:
			e.Err = errors.New(arg)
		case int:
			e.Kind = arg
		case M:
			e.Module = arg
		case V:
			e.Version = arg
		case slog.Level:
			e.Severity = arg
		}
	}
	if e.Err == nil {
		e.Err = errors.New(http.StatusText(Kind(e)))
	}
	return e
}

// Kind returns the first kind on the way down.
func Kind(err error) int {
	var e Error
	for errors.As(err, &e) {
		if e.Kind != 0 {
			return e.Kind
		}
		err = e.Err
	}
	return KindUnexpected
}

// Is reports whether the error is of that kind.
func Is(err error, kind int) bool { return err != nil && Kind(err) == kind }

// IsNotFoundErr reports whether the kind is KindNotFound.
func IsNotFoundErr(err error) bool { return Kind(err) == KindNotFound }

// Severity returns the first severity on the way down, and otherwise LevelError.
func Severity(err error) slog.Level {
	var e Error
	for errors.As(err, &e) {
		if e.Severity != unset {
			return e.Severity
		}
		err = e.Err
	}
	return slog.LevelError
}

// Expect returns LevelInfo for an error of one of the kinds, LevelError otherwise.
func Expect(err error, kinds ...int) slog.Level {
	if slices.Contains(kinds, Kind(err)) {
		return slog.LevelInfo
	}
	return slog.LevelError
}

// Ops returns the operations on the way down.
func Ops(e Error) []Op {
	ops := []Op{e.Op}
	for {
		inner, ok := e.Err.(Error)
		if !ok {
			return ops
		}
		ops, e = append(ops, inner.Op), inner
	}
}
