package gcs

import (
	"context"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
)

// scope is the name of the tracer and of the meter.
const scope = "github.com/athensgcs/gcs"

// The outcomes of a call, in the attribute "outcome" of its span, and of a save
// also in that of the counter gcs.saves.
const (
	outcomeOK       = "ok"
	outcomeNotFound = "not found"
	outcomeFailed   = "failed"

	outcomeStored   = "stored"             // a new version
	outcomeExisted  = "existed"            // it was complete, or became so while this save waited
	outcomeTookOver = "took over"          // stored over what another save had left behind
	outcomeFinished = "finished another's" // did the last step of another save
)

// telemetry is what a Storage tells OpenTelemetry's global providers, which
// discard it until the program sets others.
type telemetry struct {
	tracer         trace.Tracer
	saves          metric.Int64Counter
	waited         metric.Float64Counter
	renewalsFailed metric.Int64Counter
}

func newTelemetry() telemetry {
	meter := otel.Meter(scope)
	t := telemetry{tracer: otel.Tracer(scope)}
	var errs [3]error
	t.saves, errs[0] = meter.Int64Counter("gcs.saves", metric.WithUnit("{save}"),
		metric.WithDescription("Calls of Save, by outcome."))
	t.waited, errs[1] = meter.Float64Counter("gcs.saves.waited", metric.WithUnit("s"),
		metric.WithDescription("Time that calls of Save and Stash waited for another's."))
	t.renewalsFailed, errs[2] = meter.Int64Counter("gcs.renewals.failed", metric.WithUnit("{renewal}"),
		metric.WithDescription("Renewals of a marker that failed; the next is tried a quarter of the stale threshold later."))
	for _, err := range errs {
		if err != nil {
			otel.Handle(err)
		}
	}
	return t
}

// An operation is one call of an exported method, and its span.
type operation struct {
	s       *Storage
	ctx     context.Context
	op      string
	v       version
	outcome string // set by the method, or derived from its error
	span    trace.Span
}

// begin starts an operation. The context it returns carries the span.
func (s *Storage) begin(ctx context.Context, op string, v version) (context.Context, *operation) {
	ctx, span := s.telemetry.tracer.Start(ctx, "gcs."+op, trace.WithSpanKind(trace.SpanKindClient))
	return ctx, &operation{s: s, ctx: ctx, op: op, v: v, span: span}
}

// end ends it with the error made of that cause, which it returns.
func (o *operation) end(cause error) error {
	err := fail(o.ctx, o.op, o.v, cause)
	o.close(err)
	return err
}

// close ends it with that error.
func (o *operation) close(err error) {
	switch {
	case o.outcome != "":
	case err == nil:
		o.outcome = outcomeOK
	case Is(err, KindNotFound):
		o.outcome = outcomeNotFound
	default:
		o.outcome = outcomeFailed
	}
	if o.span.IsRecording() {
		o.span.SetAttributes(attribute.String("module", o.v.module), attribute.String("version", o.v.version),
			attribute.String("outcome", o.outcome))
		if o.outcome == outcomeFailed {
			o.span.RecordError(err)
			o.span.SetStatus(codes.Error, err.Error())
		}
	}
	o.span.End()
}
