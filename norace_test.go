//go:build !race

package gcs

const raceDetector = false
