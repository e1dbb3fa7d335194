// Package requestid stands in for Athens' package of the same name.
package requestid

import "context"

type key struct{}

// SetInContext returns a context with a request's id.
func SetInContext(ctx context.Context, id string) context.Context {
	return context.WithValue(ctx, key{}, id)
}

// FromContext returns the id, and "" if there is none.
func FromContext(ctx context.Context) string {
	id, _ := ctx.Value(key{}).(string)
	return id
}
