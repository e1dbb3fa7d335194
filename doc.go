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
// threshold away (2 minutes, see [WithStaleThreshold]); otherwise it is stale. To
// commit is to remove the marker. A .mod with the marker of an older Athens, the key
// in_progress, names no save: three objects beside it count as one save's.
//
//	state        marker  objects         who moves it, and to which state
//	Absent       -       none            Save creates a marked .mod: InProgress
//	InProgress   fresh   any             its saver commits: Complete
//	                                     its saver fails, or its marker goes stale:
//	                                     Abandoned, or Unfinished if only the commit is missing
//	Abandoned    stale   one is missing, Save takes over: InProgress
//	                     or of another   Repair removes it: Absent
//	                     save
//	Unfinished   stale   all, of one     Save, Exists, List, Catalog, Repair and a flight
//	                     save            commit: Complete
//	Partial      none    one is missing  Save takes over: InProgress; Repair removes it: Absent
//	Complete     none    all             nobody but Delete
//
// Delete moves every state to Absent, through Partial. Three objects of different saves
// without a marker are Complete, since those of a copied bucket look the same.
//
// # The protocol
//
// GCS gives every object a generation, which each write of its data replaces, and a
// metageneration, which each update of its metadata increments. A request can be
// conditional on both, and is refused if they have moved. The .mod of a version is a
// register with compare-and-swap: whoever wrote its live generation holds the
// version. A save reads the zip, or the first MiB of a large one. Then it
//
//  1. creates the .mod, if there is none, with a marker and a random save id in its
//     metadata. It lists the version only if GCS refuses.
//  2. uploads .zip and .info, which carry the save id and the generation of the .mod.
//     Meanwhile it renews the marker.
//  3. clears the marker, if generation and metageneration of the .mod are those it
//     knows. This is the commit.
//
// If the create is refused, the state decides. Complete: the save is done. InProgress:
// it waits. Unfinished: it commits for the other save. Otherwise it takes over: it writes
// the .mod anew, if that is still as listed, and goes on at step 2.
//
// A save that fails sets its marker to 1970, so that nobody waits for it, and draws a
// new save id for the .mod, so that its own late objects do not complete the version.
// It keeps the id if only the commit is missing. A save whose .mod was taken over, or
// deleted, is fenced: it waits for its successor, and never takes over again. It fails
// if the .mod is gone, is given up, or has not changed for the stale threshold.
//
// A flight of [Storage.SingleFlight] creates a claim, <module>/@v/<version>.lock, and
// looks at the version after that. The claim is marked and renewed like a .mod, and goes
// stale after a quarter of the stale threshold. A holder that fails deletes its claim,
// and those who wait fetch at once. If a holder dies, one of them takes the stale claim
// over. No promise rests on a claim.
//
// # Why it is safe
//
// A listing shows each object as it was at some moment, but not all at the same moment.
//
//   - One listing proves Complete if .info and .zip name the generation of the listed
//     .mod, or name no generation: a .mod that was committed stays so until it is
//     deleted. Otherwise the version is listed again, and is complete if nothing has
//     changed.
//   - One listing proves Unfinished. The commit is conditional on the listed .mod.
//     While that is live, nobody replaces .info and .zip of its save.
//   - One listing does not prove that an object is missing. The object may have come
//     while the rest was listed, and the version be complete. So two listings in a
//     row have to show the same before a save takes over, or Repair removes anything.
//     What both show was there at the moment between them, and the takeover is
//     conditional on the .mod.
//
// The commit names the generation of the .mod. So it succeeds only for the holder
// who wrote that generation, and only while nobody has taken over or deleted since.
// The .info and .zip are the holder's own: it uploaded them, or found them with its save
// id where the answer to an upload was lost. Nobody else replaces them:
//
//   - A save uploads over an object only if the object is older than its own .mod: the
//     listings before its takeover showed the object, or the save read the object, and
//     after it the .mod, which was still its own. A successor's object is younger.
//   - A delete removes .info and .zip only after it has removed the .mod beside which
//     they were listed, or read that there is none.
//   - A save does not replace an object with its own save id either. Somebody may have
//     finished the version with it.
//
// So a holder that slept while others took over can neither commit nor replace what
// they have stored, and neither can its late requests. A renewal names the
// metageneration, so one that arrives after the commit cannot put the marker back. An
// unfinished version is never taken over, so it does not matter who finishes it.
//
// A request whose answer was lost is made again, and refused the second time. So a
// refused request is followed by a read: the save knows its own objects by the save
// id and the size, and its own commit by the generation. A create that arrives late,
// after a Delete or a Repair has removed what refused it before, makes a .mod whose
// generation no .info and no .zip names. It never becomes Unfinished. A save that fails
// while its create may still arrive writes a given-up .mod itself, so that the late
// one is refused.
//
// No step of this looks at a clock. Clocks, and the stale threshold, decide only when a
// holder is presumed dead. If that is wrong, its work is wasted, and no harm is done.
//
// The argument relies on GCS for the atomicity of a conditional request, and for
// strong consistency of reads and lists after writes
// (https://cloud.google.com/storage/docs/consistency). It relies on nobody else's
// writing to the bucket below "/@v/". Athens' own backend may do so during a rollout:
// docs/athens.md says what its clients may then read.
package gcs
