// Package build stands in for Athens' package of the same name.
package build

var version, buildDate string

// String returns what the linker was told.
func String() string { return "version " + version + " built " + buildDate }
