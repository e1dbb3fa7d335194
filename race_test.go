//go:build race

package gcs

// raceDetector is on in this build, so that the longest tests can be shorter.
const raceDetector = true
