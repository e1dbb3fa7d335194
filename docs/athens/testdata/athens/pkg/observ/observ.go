// Package observ stands in for Athens' package of the same name, as it is since
// Athens uses OpenTelemetry.
package observ

import (
	"context"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/trace"
)

// StartSpan starts a span below the context's.
func StartSpan(ctx context.Context, op string) (context.Context, trace.Span) {
	return otel.Tracer("athens").Start(ctx, op)
}
