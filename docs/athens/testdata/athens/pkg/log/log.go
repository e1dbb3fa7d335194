// Package log stands in for Athens' package of the same name.
package log

import (
	stderrors "errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"

	"github.com/gomods/athens/pkg/errors"
)

// Entry is what lines are written with.
type Entry interface {
	Debugf(format string, args ...any)
	Infof(format string, args ...any)
	Warnf(format string, args ...any)
	Errorf(format string, args ...any)
	WithFields(fields map[string]any) Entry
	SystemErr(err error)
}

// Logger is the log of Athens.
type Logger struct{ entry }

type entry struct{ l *slog.Logger }

// New returns a Logger to standard output.
func New(cloudProvider string, level slog.Level, format string) *Logger {
	return NewWithOutput(os.Stdout, cloudProvider, level, format)
}

// NewWithOutput returns a Logger whose lines are Cloud Logging's, JSON or plain.
func NewWithOutput(w io.Writer, cloudProvider string, level slog.Level, format string) *Logger {
	opts := &slog.HandlerOptions{Level: level}
	if cloudProvider == "GCP" {
		format = "json"
		opts.ReplaceAttr = func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.LevelKey {
				a.Key = "severity"
			}
			return a
		}
	}
	if format == "json" {
		return &Logger{entry{slog.New(slog.NewJSONHandler(w, opts))}}
	}
	return &Logger{entry{slog.New(slog.NewTextHandler(w, opts))}}
}

// ParseLevel knows the names of another logger too.
func ParseLevel(s string) (slog.Level, error) {
	switch strings.ToLower(s) {
	case "trace", "debug":
		return slog.LevelDebug, nil
	case "info":
		return slog.LevelInfo, nil
	case "warn", "warning":
		return slog.LevelWarn, nil
	case "error", "fatal", "panic":
		return slog.LevelError, nil
	}
	return slog.LevelInfo, fmt.Errorf("no level: %q", s)
}

func (e entry) Debugf(format string, args ...any) { e.l.Debug(fmt.Sprintf(format, args...)) }
func (e entry) Infof(format string, args ...any)  { e.l.Info(fmt.Sprintf(format, args...)) }
func (e entry) Warnf(format string, args ...any)  { e.l.Warn(fmt.Sprintf(format, args...)) }
func (e entry) Errorf(format string, args ...any) { e.l.Error(fmt.Sprintf(format, args...)) }

func (e entry) WithFields(fields map[string]any) Entry {
	for k, v := range fields {
		e.l = e.l.With(k, v)
	}
	return e
}

// SystemErr logs an error with its fields, as an error or, if it is expected, as info.
func (e entry) SystemErr(err error) {
	var athens errors.Error
	if !stderrors.As(err, &athens) {
		e.Errorf("%v", err)
		return
	}
	with := e.WithFields(map[string]any{"operation": athens.Op, "kind": errors.Kind(err),
		"module": athens.Module, "version": athens.Version, "ops": errors.Ops(athens)})
	if errors.Severity(err) == slog.LevelInfo {
		with.Infof("%v", err)
		return
	}
	with.Errorf("%v", err)
}
