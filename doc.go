// Package gcs keeps the versions of Go modules in a Google Cloud Storage bucket. It
// is a storage backend for the module proxy Athens, made for several replicas that
// share a bucket and nothing else.
//
// A version is three objects, with the names that Athens uses:
//
//	github.com/pkg/errors/@v/v0.9.1.info
//	github.com/pkg/errors/@v/v0.9.1.mod
//	github.com/pkg/errors/@v/v0.9.1.zip
//
// GCS changes one object at a time, and a machine can die between any two requests.
// [Storage.Save] makes a single step of storing three objects all the same: whoever
// is told that a version is stored finds all of it, of one save. If a part of a
// version is missing, the next save stores it anew.
//
// # States
//
// The state of a version follows from one listing of its objects. The marker is the
// key in-progress in the metadata of the .mod. Its value is the time at which the
// saver last renewed it. A marker is fresh while that time is less than the stale
// threshold away (2 minutes, see [WithStaleThreshold]), and else it is stale. To
// commit is to remove the marker.
//
//	state        marker  objects         who moves it, and to which state
//	Absent       -       none            Save creates a marked .mod: InProgress
//	InProgress   fresh   any             its saver commits: Complete
//	                                     its saver fails, or its marker goes stale:
//	                                     Abandoned, or Unfinished if only the commit is missing
//	Abandoned    stale   one is missing, Save takes over: InProgress
//	                     or of another   Repair removes it: Absent
//	                     save
//	Unfinished   stale   all, of one     Save, Exists, List, Catalog, Repair commit: Complete
//	                     save
//	Partial      none    one is missing  Save takes over: InProgress; Repair removes it: Absent
//	Complete     none    all             nobody but Delete
//
// Delete moves every state to Absent, through Partial.
//
// # The protocol
//
// GCS gives every object a generation, which each write of its data replaces, and a
// metageneration, which each update of its metadata increments. A request can be
// conditional on both, and is refused if they have moved. The .mod of a version is a
// register with compare-and-swap: whoever wrote its live generation holds the
// version. A save
//
//  1. creates the .mod, with a marker and a random save id in its metadata. At the
//     same time it lists the version.
//  2. uploads .zip and .info, which carry the save id and the generation of the .mod,
//     each over what was listed or if absent. Meanwhile it renews the marker.
//  3. clears the marker, if generation and metageneration of the .mod are those it
//     knows. This is the commit.
//
// If there is a .mod already, the state decides. Complete: the save is done. InProgress:
// it waits. Unfinished: it commits for the other save. Abandoned or Partial: it takes
// over, which means that it writes the .mod anew if it is still the one listed, and
// goes on at step 2. A save that fails sets its marker to 1970, so that nobody waits
// for it.
//
// # Why it is safe
//
// What a listing shows. The argument assumes that a listing shows each object as it
// was at some moment of the listing, and not all objects at the same moment. So it
// does not matter whether GCS answers in one page or in several.
//
//   - One listing proves Complete if .info and .zip name the .mod listed, or none. A
//     .mod that was committed stays so until it is deleted. If one of them names
//     another .mod, the version is listed again. It is complete if nothing has
//     changed: then its objects were copied from another bucket.
//   - One listing proves Unfinished. The commit is conditional on the .mod listed.
//     While that is live, nobody replaces .info and .zip of its save.
//   - One listing does not prove that an object is missing. The object may have come
//     while the rest was listed, and the version be complete. So two listings in a
//     row have to show the same before a save takes over, or Repair removes anything.
//     What both show was there at the moment between them, and the takeover is
//     conditional on the .mod.
//
// The commit names the generation of the .mod. So it succeeds only for the holder
// who wrote that generation, and only while nobody has taken over or deleted since.
// Its .info and .zip are its own: it uploaded them, or found them with its save id
// where the answer to an upload was lost. Nobody else replaces them:
//
//   - A save uploads over an object only if the object is older than its own .mod:
//     listed before it wrote the .mod, or read before it read that the .mod is still
//     its own. A successor's object is younger.
//   - A delete removes .info and .zip only after it has removed the .mod beside which
//     they were listed, or read that there is none.
//   - An object with the saver's own save id is not replaced either. Somebody may
//     have finished the version with it.
//
// A holder that slept while others took over can neither commit nor replace what
// they have stored, and the same goes for its requests that arrive late. A renewal
// names the metageneration, so one that arrives after the commit is refused and
// cannot put the marker back. An unfinished version is never taken over, only
// finished, so it does not matter who finishes it.
//
// A request whose answer was lost is made again, and refused the second time. So a
// refused request is followed by a read: the save knows its own objects by the save
// id and the size, and its own commit by the generation. A create that arrives late,
// after a Delete or a Repair has removed what refused it before, makes a .mod whose
// generation no .info and no .zip names. It never becomes Unfinished. It is Abandoned
// when its marker is stale, and until then the next save waits. A save that fails
// while its create may still arrive writes a given-up .mod itself, so that the late
// one is refused.
//
// No step of this looks at a clock. Clocks, and the stale threshold, decide only when
// a holder is presumed dead. If that is wrong, its work is wasted, and no harm is
// done. Two machines that each presume the other dead would take over from each other
// for ever. So a save that was fenced, whose .mod was taken over, takes over an
// abandoned version only when its .mod has not changed for the threshold, or is given
// up. New calls do not know of such a loss: while calls with clocks that are off by
// more than the threshold keep coming, a version may be taken over again and again.
//
// The argument relies on GCS for the atomicity of a conditional request, and for
// strong consistency of reads and lists after writes
// (https://cloud.google.com/storage/docs/consistency). It relies on nobody else's
// writing to the bucket below "/@v/". Athens' own backend may do so during a rollout.
// Its clients may then read files of two saves: for a moment if both saves live, and
// until the version is repaired or deleted if one of them died.
package gcs
