package gcs

import (
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
)

// scope is the name of the tracer and of the meter.
const scope = "github.com/athensgcs/gcs"

// telemetry is what a Storage tells OpenTelemetry's global providers, which
// discard it until the program sets others.
type telemetry struct {
	tracer         trace.Tracer
	saves          metric.Int64Counter
	takeovers      metric.Int64Counter
	renewalsFailed metric.Int64Counter
	retries        metric.Int64Counter
	waits          metric.Float64Histogram
}

func newTelemetry() telemetry {
	meter := otel.Meter(scope)
	t := telemetry{tracer: otel.Tracer(scope)}
	counter := func(name, unit, description string) metric.Int64Counter {
		c, err := meter.Int64Counter(name, metric.WithUnit(unit), metric.WithDescription(description))
		if err != nil {
			otel.Handle(err)
		}
		return c
	}
	t.saves = counter("gcs.saves", "{save}", "Calls of Save, by outcome.")
	t.takeovers = counter("gcs.takeovers", "{takeover}", "Markers taken over from a holder that stopped renewing them.")
	t.renewalsFailed = counter("gcs.renewals.failed", "{renewal}", "Renewals of a marker that failed.")
	t.retries = counter("gcs.retries", "{retry}", "Requests made again, by reason.")
	var err error
	t.waits, err = meter.Float64Histogram("gcs.waits", metric.WithUnit("s"),
		metric.WithDescription("How long calls of Save and Stash waited for another's save or fetch."),
		metric.WithExplicitBucketBoundaries(0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 900))
	if err != nil {
		otel.Handle(err)
	}
	return t
}
