package gcs

import (
	"crypto/rand"
	"time"

	"cloud.google.com/go/storage"
)

const (
	// keyInProgress is the marker. It stands on an object whose writer is not
	// done: the .mod of a save, or the claim of a fetch. Its value is the time, in
	// RFC 3339 and UTC, at which the writer last renewed it. An empty value is no
	// marker: that is how it is cleared on a server that cannot remove a key.
	keyInProgress = "in-progress"
	// keyInProgressOld is the marker of older Athens versions, with the value "true".
	keyInProgressOld = "in_progress"
	// keySaveID holds the random id of the save that wrote an object.
	keySaveID = "save-id"
	// keyGeneration holds, on .info and .zip, the generation of the .mod that
	// their save held.
	keyGeneration = "mod-generation"
)

// givenUp is the time in the marker of a save that failed and said so. Such a
// marker is never fresh, whatever the clocks and the threshold are.
var givenUp = time.Unix(0, 0).UTC()

// newSaveID returns an id that no other save has.
func newSaveID() string { return rand.Text() }

// marked returns the metadata of an object whose writer, the save of that id, is
// not done and was alive at the time t.
func marked(t time.Time, id string) map[string]string {
	return map[string]string{keyInProgress: t.UTC().Format(time.RFC3339Nano), keySaveID: id}
}

// cleared returns the metadata that clears a marker on a server that merges metadata.
func cleared() map[string]string { return map[string]string{keyInProgress: ""} }

// A marker says that an object's writer was not done, and when that was so.
type marker struct {
	renewed time.Time
	updated time.Time // by the clock of GCS
}

// readMarker returns the marker on an object, and false if there is none.
func readMarker(attrs *storage.ObjectAttrs) (marker, bool) {
	if attrs == nil {
		return marker{}, false
	}
	switch value, ok := attrs.Metadata[keyInProgress]; {
	case value != "":
		t, err := time.Parse(time.RFC3339Nano, value)
		if err != nil {
			t = attrs.Updated
		}
		return marker{t, attrs.Updated}, true
	case !ok && attrs.Metadata[keyInProgressOld] != "":
		return marker{attrs.Created, attrs.Created}, true
	}
	return marker{}, false
}

// isFresh reports whether the marker's time is less than the threshold away from now.
func (m marker) isFresh(now time.Time, threshold time.Duration) bool {
	t := m.time(now, threshold)
	return !m.isGivenUp() && t.Sub(now).Abs() < threshold
}

// time returns when the marker was renewed: by the clock of GCS, if its own time is
// further in the future than the threshold.
func (m marker) time(now time.Time, threshold time.Duration) time.Time {
	t := m.renewed
	if t.Sub(now) > threshold {
		t = m.updated
	}
	return t
}

// isGivenUp reports whether the object's writer said that it failed.
func (m marker) isGivenUp() bool { return !m.renewed.After(givenUp) }

// isFresh reports whether the object carries a fresh marker.
func isFresh(attrs *storage.ObjectAttrs, now time.Time, threshold time.Duration) bool {
	m, ok := readMarker(attrs)
	return ok && m.isFresh(now, threshold)
}
