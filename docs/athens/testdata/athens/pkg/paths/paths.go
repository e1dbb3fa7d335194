// Package paths stands in for Athens' package of the same name.
package paths

// AllPathParams are the parameters of a request.
type AllPathParams struct {
	Module  string `json:"module"`
	Version string `json:"version"`
}
