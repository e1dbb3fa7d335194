package gcs

import (
	"context"
	"errors"
	"io/fs"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
)

// The outcomes of a call, in the attribute "outcome" of its span, and of a save
// also in that of the counter gcs.saves.
const (
	outcomeOK       = "ok"
	outcomeNotFound = "not found"
	outcomeFailed   = "failed"

	outcomeStored   = "stored"             // a new version
	outcomeExisted  = "existed"            // it was complete, or became so while this save waited
	outcomeHealed   = "healed"             // stored over what another save, or a delete, had left behind
	outcomeFinished = "finished another's" // did the last step of another save
)

// A call is one call of an exported method, and its span.
type call struct {
	s       *Storage
	ctx     context.Context
	op      string
	v       ModuleVersion
	outcome string // set by the method, or derived from its error
	span    trace.Span
}

// versionKey is the key of a context's ModuleVersion: what its requests are about.
type versionKey struct{}

// begin starts a call. The context that it returns carries the span, and the version
// for the log lines of its requests.
func (s *Storage) begin(ctx context.Context, op string, v ModuleVersion) (context.Context, *call) {
	ctx, span := s.telemetry.tracer.Start(ctx, "gcs."+op, trace.WithSpanKind(trace.SpanKindClient))
	ctx = context.WithValue(ctx, versionKey{}, v)
	return ctx, &call{s: s, ctx: ctx, op: op, v: v, span: span}
}

// wrapError returns the error of a call that failed with that cause; nil stays nil.
func (s *Storage) wrapError(ctx context.Context, op string, v ModuleVersion, cause error) error {
	if cause == nil {
		return nil
	}
	return s.wrap(newError(ctx, op, v.Module, v.Version, cause))
}

// end ends the call with the error of that cause, which it returns.
func (c *call) end(cause error) error {
	err := c.s.wrapError(c.ctx, c.op, c.v, cause)
	c.close(err)
	return err
}

// close ends the call with that error.
func (c *call) close(err error) {
	switch {
	case c.outcome != "":
	case err == nil:
		c.outcome = outcomeOK
	case errors.Is(err, fs.ErrNotExist):
		c.outcome = outcomeNotFound
	default:
		c.outcome = outcomeFailed
	}
	if c.span.IsRecording() {
		c.span.SetAttributes(attribute.String("module", c.v.Module), attribute.String("version", c.v.Version),
			attribute.String("outcome", c.outcome))
		if c.outcome == outcomeFailed {
			c.span.RecordError(err)
			c.span.SetStatus(codes.Error, err.Error())
		}
	}
	c.span.End()
}
