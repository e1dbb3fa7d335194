// Package config stands in for Athens' package of the same name.
package config

// GCPConfig is the configuration of the storage on GCS.
type GCPConfig struct {
	ProjectID string
	Bucket    string
	JSONKey   string
}
