// Package gcs keeps the versions of Go modules in a Google Cloud Storage
// bucket. It is a storage backend for the module proxy Athens, made for several
// replicas that share a bucket and nothing else.
//
// A version is three objects, with the names that Athens uses:
//
//	github.com/pkg/errors/@v/v0.9.1.info
//	github.com/pkg/errors/@v/v0.9.1.mod
//	github.com/pkg/errors/@v/v0.9.1.zip
//
// GCS changes one object at a time, and a machine can die, or be taken for
// dead, between any two requests. [Storage.Save] makes a single step of storing
// three objects all the same: whoever is told that a version is stored finds
// all of it, of one save, and a version of which a part is missing is stored
// anew by the next save, without anybody's help.
//
// # The protocol
//
// GCS gives every object a generation, which each write of its data replaces,
// and a metageneration, which each update of its metadata increments. A request
// can be made conditional on both, and is then refused if they have moved. The
// .mod of a version is used as a register with compare-and-swap: whoever wrote
// its live generation holds the version. A save
//
//  1. creates the .mod, with a marker in its metadata (in-progress, a time) and a
//     random save id; beside it, it lists the version,
//  2. uploads .zip and .info, which carry the save id and the generation of the
//     .mod, each only over what the listing showed, and renews the marker
//     meanwhile,
//  3. clears the marker, if generation and metageneration of the .mod are those it
//     knows. This is the commit.
//
// If there is a .mod, the save decides by a listing of the version. Without a
// marker and with all three objects the version is complete. With a marker that
// is being renewed another save is at work, and this one waits. With a stale
// marker its holder is presumed dead: if .info and .zip carry the save id and
// the generation of the .mod, only the commit is missing, and whoever sees that
// does it. In any other case the save takes over: it writes the .mod anew, if
// it is still the one that two listings in a row have shown, lists the version
// again, and goes on at step 2. A save that fails sets its marker to 1970, so
// that nobody waits for it.
//
// [Storage.Delete] deletes the .mod first, then the other two, each only if it
// is the one that its listing showed.
//
// # Why it is safe
//
// A commit names the generation of the .mod. So it succeeds only for the holder
// who wrote that generation, and only while nobody has taken over or deleted
// since. What remains to be shown is that .info and .zip are then the holder's
// own, and stay so.
//
// The holder has uploaded both before it commits, or has found them with its
// save id where the answer to an upload was lost. Who could replace them
// afterwards? Every upload and delete is conditional on a generation from a
// listing, and a listing shows the .mod of the same moment. A save uses one in
// which the .mod is absent or its own; a delete uses one in which the .mod is
// absent or the one that it has deleted since. If such a listing shows the
// holder's .zip, then the holder's .mod has been replaced or deleted, and its
// commit is refused. If it does not, the condition does not fit the holder's
// .zip, and the upload or delete is refused. The same goes for requests that
// were delayed on the way, and for those of a holder that slept while others
// took over: it can neither commit nor touch what they have stored.
//
// A renewal names the metageneration, so that one which arrives after the
// commit is refused and cannot put the marker back. An unfinished version, with
// all three objects of one save, is never taken over, only finished, so it does
// not matter who finishes it, or whether its holder is alive.
//
// A request whose answer was lost is made again, and refused the second time. A
// refusal is therefore never taken at face value: the save reads back what is
// there, and knows its own objects by save id and size, and its own commit by
// the generation. A .mod that such a request creates late, when the version was
// saved and deleted, has another generation than the .info and .zip beside it
// name: it is abandoned, and not unfinished.
//
// No step of this looks at a clock. Clocks, and the stale threshold, decide
// only when a holder is presumed dead; presumed wrongly, its work is wasted,
// but no harm is done. Two machines that each presume the other dead would take
// over from each other for ever, so a save that has lost its version once
// believes the next holder for the length of the threshold, whatever the marker
// says.
//
// The argument relies on GCS for the atomicity of a conditional request, and
// for strong consistency of lists after writes
// (https://cloud.google.com/storage/docs/consistency), with one page of a list
// showing one moment (a listing with several pages is made again until the .mod
// was the same before and after it). And it relies on nobody else's writing to
// the bucket below "/@v/": Athens' own backend, which knows nothing of markers,
// may run beside this package, with the guarantees that it gives by itself.
package gcs
