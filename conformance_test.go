package gcs

import (
	"bytes"
	"context"
	"crypto/md5"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"cloud.google.com/go/storage"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
	"google.golang.org/api/googleapi"
	"google.golang.org/api/iterator"
)

// The conformance suite holds the package to its contract on every server that it
// works on. Each server is a column of a table, each call in each state a row.
//
// Two columns ask a server that the environment names. A bucket must hold little
// else, and needs the permissions of roles/storage.objectUser. Without a bucket, the
// suite makes one on the emulator.
//
//	GCS_TEST_BUCKET=my-bucket go test -run TestConformance/named
//	STORAGE_EMULATOR_HOST=localhost:9000 STORAGE_EMULATOR_HOST_GRPC=localhost:8888 go test -run TestConformance/named
//
// All objects of a run are below a random prefix. Each row removes its own.
func TestConformance(t *testing.T) {
	t.Parallel()
	for _, c := range columns {
		t.Run(c.name, func(t *testing.T) {
			if c.lacks != nil {
				t.Parallel()
			} // Columns that share the bucket named take turns.
			c.run(t)
		})
	}
}

// A row is a call in some states. One that runs alone looks at the whole bucket.
type row struct {
	name  string
	alone bool
	run   func(sub *subject, t *testing.T)
}

var rows = []row{
	{"catalog", true, (*subject).catalog}, {"leftovers/catalog", true, (*subject).leftoversInCatalog}, {"requests", true, (*subject).requests},
	{"metadata", false, (*subject).metadata}, {"lifecycle", false, (*subject).lifecycle}, {"zips", false, (*subject).zips},
	{"zip of two default chunks", false, (*subject).hugeZip}, {"failing readers", false, (*subject).failure},
	{"contexts", false, (*subject).contexts}, {"leftovers/seen", false, (*subject).leftoversSeen},
	{"leftovers/save", false, (*subject).leftoversSave}, {"leftovers/list", false, (*subject).leftoversList},
	{"leftovers/repair", false, (*subject).leftoversRepair}, {"leftovers/delete", false, (*subject).leftoversDelete},
	{"fresh", false, (*subject).fresh}, {"renewal", false, (*subject).renewal}, {"contention", false, (*subject).contention},
	{"single flight", false, (*subject).singleFlight}, {"claims", false, (*subject).claims}, {"check", false, (*subject).check},
}

func (c column) run(t *testing.T) {
	start, shared := c.start, false
	if !c.virtual {
		s := c.start(t)
		shared = s.bucket != ""
		start = func(t *testing.T) server {
			s := s
			if !shared {
				s.bucket = makeBucket(t, s.client)
			}
			return s
		}
	}
	below := func(t *testing.T, root string, prefixed bool, test func(sub *subject, t *testing.T)) {
		run := func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute+10*c.threshold)
			defer cancel()
			// The names of all objects are the same with a prefix and without.
			sub := &subject{c, start(t), ctx, root, root + "example.com/m", nil}
			if prefixed {
				sub.module, sub.opts = "example.com/m", []Option{WithPrefix(root)}
			}
			if shared {
				defer sub.clean(t)
			}
			test(sub, t)
		}
		if c.virtual {
			synctest.Test(t, run)
		} else {
			run(t)
		}
	}
	root := "gcs-test-" + rand.Text() + "/"
	t.Run("abilities", func(t *testing.T) {
		below(t, root+"abilities/", false, func(sub *subject, t *testing.T) { c.lacks = sub.abilities(t) })
	})
	for _, half := range some("prefix", "plain") {
		t.Run(half, func(t *testing.T) {
			// More rows run at once than t.Parallel allows, for they mostly wait.
			var group errgroup.Group
			group.SetLimit(8)
			for _, r := range rows {
				run := func() error {
					t.Run(r.name, func(t *testing.T) { below(t, root+half+"/"+r.name+"/", half == "prefix", r.run) })
					return nil
				}
				if r.alone {
					run()
				} else {
					group.Go(run)
				}
			}
			group.Wait()
		})
	}
}

// A subject is what a row puts to the test: a server's bucket, below a name.
type subject struct {
	column
	server
	ctx    context.Context // ends when a call waits that must not
	root   string          // of the names of all its objects
	module string
	opts   []Option
}

func (sub *subject) able(a ability) bool {
	_, lacks := sub.lacks[a]
	return !lacks
}

func (sub *subject) prefixed() bool { return sub.opts != nil }

func (sub *subject) handle() *storage.BucketHandle { return sub.client.Bucket(sub.bucket) }

func (sub *subject) storage(opts ...Option) *Storage {
	return NewStorage(sub.handle(), append(opts, sub.opts...)...)
}

// patience is a stale threshold that no test outlasts. What such a storage does, it
// does at once.
const patience = 10 * time.Minute

func (sub *subject) patient() *Storage { return sub.storage(WithStaleThreshold(patience)) }

// impatient is a storage whose stale threshold a test can wait for.
func (sub *subject) impatient() *Storage { return sub.storage(WithStaleThreshold(sub.threshold)) }

func (sub *subject) version(vers string) ModuleVersion { return ModuleVersion{sub.module, vers} }

// object is an object of a version, whatever the prefix.
func (sub *subject) object(vers, ext string) *storage.ObjectHandle {
	return sub.handle().Object(sub.root + ModuleVersion{"example.com/m", vers}.object(ext))
}

// list returns all objects of the row.
func (sub *subject) list(t *testing.T) (objects []*storage.ObjectAttrs) {
	t.Helper()
	it := sub.handle().Objects(context.Background(), &storage.Query{Prefix: sub.root})
	for {
		attrs, err := it.Next()
		if err == iterator.Done {
			return objects
		}
		require.NoError(t, err)
		objects = append(objects, attrs)
	}
}

// clean removes all objects of the row.
func (sub *subject) clean(t *testing.T) {
	t.Helper()
	var g errgroup.Group
	g.SetLimit(16)
	for _, attrs := range sub.list(t) {
		g.Go(func() error { return sub.handle().Object(attrs.Name).Delete(context.Background()) })
	}
	require.NoError(t, g.Wait())
	require.Empty(t, sub.list(t))
}

// put stores an object without asking what is there.
func (sub *subject) put(o *storage.ObjectHandle, content []byte, metadata map[string]string) (*storage.ObjectAttrs, error) {
	w := o.NewWriter(sub.ctx)
	w.ChunkSize, w.Metadata = 0, metadata
	_, err := w.Write(content)
	if err = errors.Join(err, w.Close()); err != nil {
		return nil, err
	}
	return w.Attrs(), nil
}

func (sub *subject) mustPut(t *testing.T, o *storage.ObjectHandle, metadata map[string]string) *storage.ObjectAttrs {
	t.Helper()
	_, err := sub.put(o, []byte("leftover"), metadata)
	require.NoError(t, err)
	attrs, err := o.Attrs(sub.ctx)
	require.NoError(t, err)
	return attrs
}

// update changes the metadata of an object that is as it was.
func (sub *subject) update(t *testing.T, o *storage.ObjectHandle, last *storage.ObjectAttrs, metadata map[string]string) *storage.ObjectAttrs {
	t.Helper()
	attrs, err := o.If(storage.Conditions{GenerationMatch: last.Generation, MetagenerationMatch: last.Metageneration}).
		Update(sub.ctx, storage.ObjectAttrsToUpdate{Metadata: metadata})
	require.NoError(t, err)
	return attrs
}

// save saves a version whose files tell who saved it.
func (sub *subject) save(ctx context.Context, s *Storage, vers, who string) error {
	return contentOf(who, 100).saveAs(ctx, s, sub.version(vers))
}

// requireSaved checks that the version exists, and all three files are readable, and of that
// save or leftover.
func (sub *subject) requireSaved(t *testing.T, vers, who string) {
	t.Helper()
	sub.requireExists(t, vers, true)
	for op, ext := range extOf {
		content, err := readers[op](sub.ctx, sub.patient(), sub.module, vers)
		require.NoError(t, err, vers)
		require.Equal(t, string(contentOf(who, 100).file(ext)), content, vers)
	}
	attrs, err := sub.object(vers, extMod).Attrs(sub.ctx)
	require.NoError(t, err)
	require.Empty(t, attrs.Metadata["in-progress"])
	if who != "leftover" && sub.able(clearsMetadata) {
		require.Empty(t, attrs.Metadata)
	}
}

func (sub *subject) requireExists(t *testing.T, vers string, want bool) {
	t.Helper()
	ok, err := sub.patient().Exists(sub.ctx, sub.module, vers)
	require.NoError(t, err, vers)
	require.Equal(t, want, ok, vers)
}

// pause keeps to one change of an object a second, where that counts.
func (sub *subject) pause() {
	if sub.count == nil {
		time.Sleep(1100 * time.Millisecond)
	}
}

// abilities returns what the server does not do, which is what the table says.
func (sub *subject) abilities(t *testing.T) (lacks map[ability]string) {
	lacks = sub.probe(t)
	if sub.lacks == nil {
		if os.Getenv("STORAGE_EMULATOR_HOST") == "" {
			require.Empty(t, lacks, "Cloud Storage does all of it")
		}
		sub.lacks = lacks
	}
	for a, why := range lacks {
		t.Logf("not on this server: %s: %s", a, why)
		require.Contains(t, sub.lacks, a)
	}
	require.Len(t, lacks, len(sub.lacks), "the server does what the table says it does not: %v", sub.lacks)
	return lacks
}

// probe finds out what the server does not do. What it does refuse, it must refuse
// as GCS does, and not apply.
func (sub *subject) probe(t *testing.T) (lacks map[ability]string) {
	type cond = storage.Conditions
	type attrs = *storage.ObjectAttrs
	ctx := sub.ctx
	lacks = map[ability]string{}
	write := func(o *storage.ObjectHandle) error { _, err := sub.put(o, []byte("refused"), nil); return err }
	update := func(o *storage.ObjectHandle) error {
		_, err := o.Update(ctx, storage.ObjectAttrsToUpdate{Metadata: map[string]string{"refused": "yes"}})
		return err
	}
	remove := func(o *storage.ObjectHandle) error { return o.Delete(ctx) }
	another := func(old, now attrs) cond { return cond{GenerationMatch: old.Generation} }
	changed := func(old, now attrs) cond {
		return cond{GenerationMatch: now.Generation, MetagenerationMatch: now.Metageneration + 1}
	}
	for i, probe := range []struct {
		name  string
		needs ability // "" for what the package cannot do without
		do    func(o *storage.ObjectHandle) error
		cond  func(old, now attrs) cond
	}{
		{"a create", "", write, func(old, now attrs) cond { return cond{DoesNotExist: true} }},
		{"a write over another", "", write, another},
		{"a write over a changed one", refusesWrites, write, changed},
		{"an update of another", refusesUpdates, update, func(old, now attrs) cond {
			return cond{GenerationMatch: old.Generation, MetagenerationMatch: now.Metageneration}
		}},
		{"an update of a changed one", refusesUpdates, update, changed},
		{"a delete of another", refusesDeletes, remove, another},
		{"a delete of a changed one", refusesDeletes, remove, func(old, now attrs) cond {
			return cond{MetagenerationMatch: now.Metageneration + 1}
		}},
	} {
		o := sub.object(fmt.Sprintf("v1.0.%d", i), "mod")
		old := sub.mustPut(t, o, map[string]string{"a": "b"})
		sub.pause()
		now := sub.mustPut(t, o, map[string]string{"a": "b"})
		require.NotEqual(t, old.Generation, now.Generation)

		err := probe.do(o.If(probe.cond(old, now)))
		if err == nil && probe.needs != "" {
			lacks[probe.needs] = probe.name + " is not refused"
			continue
		}
		require.Error(t, err, probe.name)
		require.True(t, isPreconditionFailed(err), "%s: %v", probe.name, err)
		var e *googleapi.Error
		if errors.As(err, &e) {
			require.Equal(t, 412, e.Code)
		}
		after, err := o.Attrs(ctx)
		require.NoError(t, err)
		require.Equal(t, [2]int64{now.Generation, now.Metageneration}, [2]int64{after.Generation, after.Metageneration},
			"%s: a refused request changes nothing", probe.name)
	}

	o := sub.object("v2.0.0", "mod")
	created := sub.mustPut(t, o, map[string]string{"a": "b"})
	updated := sub.update(t, o, created, map[string]string{"a": "c"})
	if updated.Metageneration <= created.Metageneration {
		lacks[countsUpdates] = fmt.Sprintf("it was %d before, and %d after", created.Metageneration, updated.Metageneration)
	}
	if updated.Generation != created.Generation {
		lacks[keepsGenerations] = fmt.Sprintf("it was %d before, and %d after", created.Generation, updated.Generation)
	}
	sub.pause()
	cleared := sub.update(t, o, updated, map[string]string{})
	if len(cleared.Metadata) > 0 {
		lacks[clearsMetadata] = fmt.Sprint("it leaves ", cleared.Metadata)
	}
	if _, err := sub.handle().IAM().TestPermissions(ctx, []string{"storage.objects.get"}); err != nil {
		lacks[testsPermissions] = err.Error()
	}
	return lacks
}

// metadata pins how markers are written, renewed, cleared and seen in a list.
func (sub *subject) metadata(t *testing.T) {
	type metadata = map[string]string
	o := sub.object("v1.0.0", extMod)
	var last *storage.ObjectAttrs
	for i, step := range []struct{ write, want metadata }{
		{metadata{"in-progress": "a", "save-id": "a"}, metadata{"in-progress": "a", "save-id": "a"}},
		{metadata{"in-progress": "b", "save-id": "a"}, metadata{"in-progress": "b", "save-id": "a"}},
		{metadata{"in-progress": ""}, metadata{"in-progress": "", "save-id": "a"}},
		{metadata{}, nil},
	} {
		var now *storage.ObjectAttrs
		if i == 0 {
			now = sub.mustPut(t, o, step.write)
		} else {
			now = sub.update(t, o, last, step.write)
			if sub.able(keepsGenerations) {
				require.Equal(t, last.Generation, now.Generation)
			}
			if sub.able(countsUpdates) {
				require.Greater(t, now.Metageneration, last.Metageneration)
			}
			sub.pause()
		}
		if step.want != nil {
			require.Equal(t, step.want, now.Metadata)
		} else if sub.able(clearsMetadata) {
			require.Empty(t, now.Metadata)
		}
		objects := sub.list(t)
		require.Len(t, objects, 1)
		require.Equal(t, now.Metadata, objects[0].Metadata)
		require.Equal(t, now.Generation, objects[0].Generation)
		if sub.able(countsUpdates) {
			require.Equal(t, now.Metageneration, objects[0].Metageneration)
		}
		last = now
	}
}

func (sub *subject) lifecycle(t *testing.T) {
	s := sub.patient()
	for _, op := range perVersion[2:] {
		require.True(t, Is(callsOn(s, sub.version("v1.0.0"))[op](sub.ctx), KindNotFound), op)
	}
	sub.requireExists(t, "v1.0.0", false)
	requireList(t, s, sub.module)

	require.NoError(t, sub.save(sub.ctx, s, "v1.0.0", "first"))
	sub.requireSaved(t, "v1.0.0", "first")
	requireError(t, sub.save(sub.ctx, s, "v1.0.0", "second"), KindAlreadyExists, "gcs.Save", sub.module, "v1.0.0")
	sub.requireSaved(t, "v1.0.0", "first")
	requireList(t, s, sub.module, "v1.0.0")

	require.NoError(t, s.Delete(sub.ctx, sub.module, "v1.0.0"))
	requireList(t, s, sub.module)
	require.Empty(t, sub.list(t))
	requireError(t, s.Delete(sub.ctx, sub.module, "v1.0.0"), KindNotFound, "gcs.Delete", sub.module, "v1.0.0")
	sub.pause()
	require.NoError(t, sub.save(sub.ctx, s, "v1.0.0", "third"))
	sub.requireSaved(t, "v1.0.0", "third")
}

// zips: each size, from a reader that can be read twice and from one that cannot,
// in small chunks, with each kind of MD5.
func (sub *subject) zips(t *testing.T) {
	if sub.prefixed() && !testing.Short() {
		return // the names of objects make no difference to a zip
	}
	for i, size := range []int{0, 100 << 10, maxBuffered, maxBuffered + 1, 5 << 18} {
		for j, seekable := range []bool{true, false} {
			sub.zip(t, fmt.Sprintf("v%d.%d", i, j), size, seekable, WithChunkSize(256<<10))
		}
	}
}

// hugeZip is of two default chunks. One emulator takes it, and what the environment names.
func (sub *subject) hugeZip(t *testing.T) {
	if sub.prefixed() && !testing.Short() && (sub.count == nil || !sub.virtual && len(sub.lacks) == 0) {
		sub.zip(t, "v1.0", defaultChunkSize+1, true)
	}
}

func (sub *subject) zip(t *testing.T, vers string, size int, seekable bool, opts ...Option) {
	s := sub.storage(append(opts, WithStaleThreshold(patience))...)
	zip := contentOf(vers, size).zip
	save := func(vers string, sum []byte) error {
		var r io.Reader = bytes.NewReader(zip)
		if !seekable {
			r = plain(r)
		}
		return s.Save(sub.ctx, sub.module, vers, []byte("mod"), r, sum, []byte("info"))
	}
	right, wrong := md5.Sum(zip), md5.Sum([]byte("another zip"))
	requireError(t, save(vers+".0", wrong[:]), KindBadRequest, "gcs.Save", sub.module, vers+".0")
	sub.requireExists(t, vers+".0", false)
	sub.pause()
	require.NoError(t, save(vers+".0", right[:]))
	saved := []string{vers + ".0"}
	if size == 100<<10 {
		require.NoError(t, save(vers+".1", nil))
		require.NoError(t, save(vers+".2", []byte("not of 16 bytes")))
		saved = append(saved, vers+".1", vers+".2")
	}
	for _, vers := range saved {
		r, err := s.Zip(sub.ctx, sub.module, vers)
		require.NoError(t, err)
		require.EqualValues(t, size, r.Size())
		got := md5.New()
		n, err := io.Copy(got, r)
		require.NoError(t, errors.Join(err, r.Close()))
		require.EqualValues(t, size, n)
		require.Equal(t, right[:], got.Sum(nil))
		sub.requireExists(t, vers, true)
	}
}

// failure: a save whose reader fails leaves no version, and the next need not wait.
func (sub *subject) failure(t *testing.T) {
	broken := errors.New("broken")
	for i, size := range []int64{0, 10, maxBuffered, 3 << 19} {
		zip := io.MultiReader(newPattern(size), iotest.ErrReader(broken))
		sub.failedSave(t, sub.ctx, fmt.Sprintf("v1.%d.0", i), zip, broken)
	}
}

func (sub *subject) failedSave(t *testing.T, ctx context.Context, vers string, zip io.Reader, cause error) {
	t.Helper()
	s := sub.storage(WithStaleThreshold(patience), WithChunkSize(256<<10))
	err := s.Save(ctx, sub.module, vers, []byte("mod"), zip, nil, []byte("info"))
	requireError(t, err, KindUnexpected, "gcs.Save", sub.module, vers)
	require.ErrorIs(t, err, cause)
	sub.requireExists(t, vers, false)
	sub.pause()
	require.NoError(t, sub.save(sub.ctx, sub.patient(), vers, "next"))
	sub.requireSaved(t, vers, "next")
}

// contexts: a call whose context has ended says so, and changes nothing. A save
// whose context ends while it reads the zip leaves no version.
func (sub *subject) contexts(t *testing.T) {
	s := sub.patient()
	require.NoError(t, sub.save(sub.ctx, s, "v1.0.0", "first"))
	for op, call := range callsOn(s, sub.version("v1.0.0")) {
		for _, ctx := range contextEnds(sub.ctx, 0) {
			err := call(ctx)
			require.True(t, Is(err, ctx.kind), "%s: %v", op, err)
			require.ErrorIs(t, err, ctx.cause, op)
		}
	}
	sub.requireSaved(t, "v1.0.0", "first")

	for i, size := range []int64{0, 100 << 10, 3 << 19} {
		ctx, cancel := context.WithCancel(sub.ctx)
		zip := io.MultiReader(newPattern(size), waiting(cancel), newPattern(1<<20))
		sub.failedSave(t, ctx, fmt.Sprintf("v3.%d.0", i), zip, context.Canceled)
	}
}

// A leftover is what an older version, or a save that ended early, left of a version.
type leftover struct {
	vers    string
	name    string   // of its marker, and which saves its objects are of
	exts    []string // of its objects
	state   State    // while a fresh marker is fresh
	isStale State    // afterwards
}

// leave puts every subset of the three objects there. Where there is a .mod it has each kind of
// marker. Where there are all three and a marker, they are of one save, of two, or the .mod does
// not tell.
func (sub *subject) leave(t *testing.T) (left []leftover) {
	t.Helper()
	var g errgroup.Group
	g.SetLimit(16)
	for i, m := range markerCases(time.Now(), patience) {
		if !slices.Contains([]string{"none", "empty, updated now", "now", "stale, updated now", "an hour ahead, updated now",
			"tomorrow, updated now", "older Athens, now", "given up"}, m.name) {
			continue // what else it may say is no server's business
		}
		for bits := range 8 {
			for j, ids := range [][2]string{{"a", "a"}, {"a", "another"}, {"", "another"}} {
				switch hasMod := bits&2 != 0; {
				case !hasMod && i+j > 0, j > 0 && (bits < 7 || !m.marked), j > 1 && m.fresh:
					continue // as another
				case sub.prefixed() && bits > 0 && bits < 5:
					continue // some will do to see that the prefix is heeded
				}
				mark, others := maps.Clone(m.metadata), map[string]string{keySaveID: ids[1]}
				delete(mark, keySaveID)
				if _, ok := mark[keyInProgress]; ok && ids[0] != "" {
					mark[keySaveID] = ids[0]
				}
				one := mark[keySaveID] == "" || mark[keySaveID] == ids[1]
				l := leftover{fmt.Sprintf("v1.%d.%d", i, 10*bits+j), fmt.Sprint(m.name, ids), subsetOf(bits),
					meaning(byte(bits), m.marked, m.fresh, one), meaning(byte(bits), m.marked, false, one)}
				left = append(left, l)
				g.Go(func() error { return sub.leaveOne(l, mark, others, j == 0) })
			}
		}
	}
	require.NoError(t, g.Wait())
	slices.SortFunc(left, func(a, b leftover) int { return strings.Compare(a.vers+".", b.vers+".") }) // as objects are listed
	return left
}

// leaveOne puts the objects of a leftover there, its .mod first, which the others may name.
func (sub *subject) leaveOne(l leftover, mark, others map[string]string, naming bool) error {
	for _, ext := range []string{extMod, extInfo, extZip} {
		if !slices.Contains(l.exts, ext) {
			continue
		}
		metadata := map[bool]map[string]string{true: mark, false: others}[ext == extMod]
		attrs, err := sub.put(sub.object(l.vers, ext), contentOf("leftover", 100).file(ext), metadata)
		if err != nil {
			return err
		}
		if ext == extMod && naming {
			others[keyGeneration] = formatGeneration(attrs.Generation)
		}
	}
	return nil
}

// each does something with all leftovers at once.
func each(t *testing.T, left []leftover, do func(l leftover) error) {
	t.Helper()
	var g errgroup.Group
	g.SetLimit(16)
	for _, l := range left {
		g.Go(func() error {
			if err := do(l); err != nil {
				return fmt.Errorf("%s (%s, %v, %v): %w", l.vers, l.name, l.exts, l.state, err)
			}
			return nil
		})
	}
	require.NoError(t, g.Wait())
}

// exists tells whether the version exists when its marker is stale, if it is one.
func (s State) exists() bool { return s == Complete || s == Unfinished }

// leftoversSave: no leftover makes a save fail. It waits for a fresh marker, and
// for no other.
func (sub *subject) leftoversSave(t *testing.T) {
	left := sub.leave(t)
	each(t, left, func(l leftover) error {
		s := sub.patient()
		if l.state == InProgress {
			s = sub.impatient()
		}
		err := sub.save(sub.ctx, s, l.vers, "healer")
		if exists := Is(err, KindAlreadyExists); exists && l.isStale.exists() {
			return nil
		} else if err == nil && l.isStale.exists() {
			return errors.New("Save saved it")
		}
		return err
	})
	for _, l := range left {
		sub.requireSaved(t, l.vers, map[bool]string{true: "leftover", false: "healer"}[l.isStale.exists()])
	}
}

// existing returns the versions that exist, as a patient storage sees them.
func existing(left []leftover) (versions []string) {
	for _, l := range left {
		if l.state.exists() {
			versions = append(versions, l.vers)
		}
	}
	return versions
}

func (sub *subject) leftoversList(t *testing.T) {
	left := sub.leave(t)
	requireList(t, sub.patient(), sub.module, existing(left)...)
}

func (sub *subject) leftoversInCatalog(t *testing.T) {
	left := sub.leave(t)
	for _, pageSize := range []int{1, 3, 0} {
		require.Equal(t, existing(left), sub.catalogOf(t, sub.patient(), pageSize))
	}
}

// catalogOf returns what a catalog says of the row's module.
func (sub *subject) catalogOf(t *testing.T, s *Storage, pageSize int) (versions []string) {
	t.Helper()
	for _, page := range pagesOf(t, s, pageSize, func() {}) {
		if pageSize > 0 {
			require.LessOrEqual(t, len(page), pageSize)
		}
		for _, v := range page {
			if sub.isOwn(t, v) {
				versions = append(versions, v.Version)
			}
		}
	}
	return versions
}

// isOwn reports whether a version is of the row's module. Below a prefix all are.
func (sub *subject) isOwn(t *testing.T, v ModuleVersion) bool {
	t.Helper()
	require.True(t, v.Module == sub.module || !sub.prefixed(), "%v is not below the prefix", v)
	return v.Module == sub.module
}

// leftoversSeen: Scan tells of all that is there. A file is served if it is there, whatever the
// others are. Exists tells whether all three are, of one save that is at an end.
func (sub *subject) leftoversSeen(t *testing.T) {
	left, s := sub.leave(t), sub.patient()
	var got, want []VersionStatus
	for status, err := range s.Scan(sub.ctx, sub.module) {
		require.NoError(t, err)
		require.WithinDuration(t, time.Now(), status.Updated, time.Hour)
		require.Zero(t, status.Claimed)
		require.Equal(t, status.State != Partial && status.State != Complete, !status.Renewed.IsZero(), "%v", status)
		status.Updated, status.Renewed = time.Time{}, time.Time{}
		got = append(got, status)
	}
	for _, l := range left {
		status := VersionStatus{ModuleVersion: sub.version(l.vers), State: l.state}
		for op, ext := range extOf {
			content, err := readers[op](sub.ctx, s, sub.module, l.vers)
			if slices.Contains(l.exts, ext) {
				require.NoError(t, err, "%v", l)
				require.Equal(t, string(contentOf("leftover", 100).file(ext)), content, "%v", l)
				status.Size += int64(len(content))
			} else {
				require.True(t, Is(err, KindNotFound), "%v: %v", l, err)
				require.ErrorIs(t, err, storage.ErrObjectNotExist, "%v", l)
				status.Missing = append(status.Missing, ext)
			}
		}
		if slices.Sort(status.Missing); l.state != Absent {
			want = append(want, status)
		}
	}
	require.Equal(t, want, got)
	for _, l := range left {
		if l.state.exists() {
			sub.requireSaved(t, l.vers, "leftover")
		} else {
			sub.requireExists(t, l.vers, false)
		}
	}
}

// leftoversRepair: what is not complete and not in progress can be fetched anew.
func (sub *subject) leftoversRepair(t *testing.T) {
	left, s := sub.leave(t), sub.patient()
	each(t, left, func(l leftover) error {
		want := map[State]State{Complete: Complete, Unfinished: Complete, InProgress: InProgress}[l.state] // or Absent
		state, err := s.Repair(sub.ctx, sub.module, l.vers)
		if err == nil && state != want {
			err = fmt.Errorf("Repair returned %v", state)
		}
		return err
	})
	objects := map[string]int{}
	for _, attrs := range sub.list(t) {
		v, _, _ := parseObject(strings.TrimPrefix(attrs.Name, sub.root))
		objects[v.Version]++
	}
	for _, l := range left {
		switch {
		case l.state.exists():
			sub.requireSaved(t, l.vers, "leftover")
		case l.state == InProgress:
			require.Equal(t, len(l.exts), objects[l.vers], l.vers)
		default:
			require.Zero(t, objects[l.vers], l.vers)
			require.NoError(t, sub.save(sub.ctx, s, l.vers, "next"))
		}
	}
}

func (sub *subject) leftoversDelete(t *testing.T) {
	left, s := sub.leave(t), sub.patient()
	each(t, left, func(l leftover) error {
		err := s.Delete(sub.ctx, sub.module, l.vers)
		if Is(err, KindNotFound) != (l.state == Absent) || err != nil && l.state != Absent {
			return fmt.Errorf("Delete returned %w", err)
		}
		if ok, err := s.Exists(sub.ctx, sub.module, l.vers); ok || err != nil {
			return fmt.Errorf("Exists returned %v, %w", ok, err)
		}
		return nil
	})
	require.Empty(t, sub.list(t))
}

// fresh: a marker is waited for until it is stale, or the context ends.
func (sub *subject) fresh(t *testing.T) {
	s := sub.impatient()
	start := time.Now()
	sub.mustPut(t, sub.object("v1.0.0", extMod), marked(start, "a"))
	sub.requireExists(t, "v1.0.0", false)
	require.NoError(t, sub.save(sub.ctx, s, "v1.0.0", "next"))
	require.GreaterOrEqual(t, time.Since(start), sub.threshold)
	sub.requireSaved(t, "v1.0.0", "next")

	ctx, cancel := context.WithTimeout(sub.ctx, sub.threshold/4)
	defer cancel()
	sub.mustPut(t, sub.object("v2.0.0", extMod), marked(time.Now(), "a"))
	err := sub.save(ctx, sub.patient(), "v2.0.0", "impatient")
	requireError(t, err, KindGatewayTimeout, "gcs.Save", sub.module, "v2.0.0")
	require.ErrorIs(t, err, context.DeadlineExceeded)
}

// renewal: a save renews its marker while its zip is on the way, and completes.
func (sub *subject) renewal(t *testing.T) {
	s, c, renewed := sub.storage(WithChunkSize(1), WithStaleThreshold(4*time.Second)), contentOf("next", 100), false
	marker := func() string {
		attrs, err := sub.object("v1.0.0", extMod).Attrs(sub.ctx)
		require.NoError(t, err)
		return attrs.Metadata["in-progress"]
	}
	zip := io.MultiReader(bytes.NewReader(c.zip[:7]), waiting(func() {
		first := marker()
		for !renewed && sub.ctx.Err() == nil {
			time.Sleep(20 * time.Millisecond)
			renewed = marker() != first
		}
	}), bytes.NewReader(c.zip[7:]))
	require.NoError(t, s.Save(sub.ctx, sub.module, "v1.0.0", c.mod, zip, nil, c.info))
	require.True(t, renewed)
	sub.requireSaved(t, "v1.0.0", "next")
}

// waiting is an empty reader that calls a function.
type waiting func()

func (w waiting) Read([]byte) (int, error) {
	w()
	return 0, io.EOF
}

// contention: of many who save at once, one stores the version, and the others
// find it complete.
func (sub *subject) contention(t *testing.T) {
	if why, lacks := sub.lacks[refusesUpdates]; lacks {
		t.Skip("what a race costs is not promised: ", why)
	}
	for _, leftover := range []bool{false, true} {
		vers := fmt.Sprintf("v1.0.0-%v", leftover)
		if leftover {
			sub.mustPut(t, sub.object(vers, extMod), marked(givenUp, "a"))
			sub.mustPut(t, sub.object(vers, extZip), nil)
			sub.pause()
		}
		errs := make([]error, 4)
		together(len(errs), func(i int) { errs[i] = sub.save(sub.ctx, sub.patient(), vers, fmt.Sprint(i)) })
		winner := slices.Index(errs, nil)
		require.GreaterOrEqual(t, winner, 0, "%v", errs)
		for i, err := range errs {
			if i != winner {
				requireError(t, err, KindAlreadyExists, "gcs.Save", sub.module, vers)
			}
		}
		sub.requireSaved(t, vers, fmt.Sprint(winner))
	}
}

// catalog: the versions of this test are once each on the pages of the bucket,
// whatever else there is.
func (sub *subject) catalog(t *testing.T) {
	s, want := sub.patient(), []string{"v1.0.0", "v1.j", "v1"}
	for _, vers := range want {
		require.NoError(t, sub.save(sub.ctx, s, vers, "cataloger"))
	}
	sub.mustPut(t, sub.object("v1.k", extMod), nil)
	sub.mustPut(t, sub.object("v1.k", extZip), nil)
	sub.mustPut(t, sub.handle().Object(sub.root+"no module's"), nil)
	requireList(t, s, sub.module, want...)
	for _, pageSize := range []int{2, 1000} {
		require.Equal(t, want, sub.catalogOf(t, s, pageSize))
	}
	_, _, err := s.Catalog(sub.ctx, "no token", 2)
	require.True(t, Is(err, KindBadRequest), "%v", err)

	states := map[string]State{}
	for status, err := range s.Scan(sub.ctx, "") {
		require.NoError(t, err)
		if sub.isOwn(t, status.ModuleVersion) {
			states[status.Version] = status.State
		}
	}
	require.Equal(t, map[string]State{"v1.0.0": Complete, "v1.j": Complete, "v1": Complete, "v1.k": Partial}, states)
}

// singleFlight: two machines with three callers each make one call, and leave no claim.
func (sub *subject) singleFlight(t *testing.T) {
	var fetches atomic.Int64
	flights := []Stasher{sub.flight(&fetches, sub.patient()), sub.flight(&fetches, sub.patient())}
	together(6, func(i int) { returns(t, "v1.0.0")(flights[i%2].Stash(sub.ctx, sub.module, "v1.0.0")) })
	require.EqualValues(t, 1, fetches.Load())
	sub.requireSaved(t, "v1.0.0", "fetcher")

	none := &Error{Op: "fetch", Kind: KindNotFound, Err: errors.New("no such version")}
	_, err := sub.patient().SingleFlight(answering("", none)).Stash(sub.ctx, sub.module, "v2.0.0")
	require.ErrorIs(t, err, none)
	exists := &Error{Op: "save", Kind: KindAlreadyExists, Module: sub.module, Version: "v3.0.0", Err: errors.New("it is there")}
	returns(t, "v3.0.0")(sub.patient().SingleFlight(answering("", exists)).Stash(sub.ctx, sub.module, "latest"))
	require.Len(t, sub.list(t), 3, "a claim is left")
}

// flight is one whose fetches are counted.
func (sub *subject) flight(fetches *atomic.Int64, s *Storage) Stasher {
	return s.SingleFlight(stashFunc(func(ctx context.Context, _, vers string) (string, error) {
		fetches.Add(1)
		return vers, sub.save(ctx, s, vers, "fetcher")
	}))
}

// claims: a claim that is left is seen, taken over when it is stale, and removed.
func (sub *subject) claims(t *testing.T) {
	old, now := time.Now().Add(ago).UTC(), time.Now().UTC()
	want := map[string]time.Time{"v1.0.0": old, "v2.0.0": old, "v3.0.0": now}
	for vers, at := range want {
		sub.mustPut(t, sub.object(vers, extClaim), marked(at, "a"))
	}
	claimed := map[string]time.Time{}
	for status, err := range sub.patient().Scan(sub.ctx, sub.module) {
		require.NoError(t, err)
		require.Equal(t, Absent, status.State)
		claimed[status.Version] = status.Claimed
	}
	require.Equal(t, want, claimed)

	_, err := sub.patient().Repair(sub.ctx, sub.module, "v1.0.0")
	require.NoError(t, err)
	for vers, s := range map[string]*Storage{"v2.0.0": sub.storage(WithStaleThreshold(time.Minute)), "v3.0.0": sub.impatient()} {
		returns(t, vers)(sub.flight(new(atomic.Int64), s).Stash(sub.ctx, sub.module, vers))
		sub.requireSaved(t, vers, "fetcher")
	}
	require.Len(t, sub.list(t), 6)
}

// check: a server that does not tell permissions is asked for a list.
func (sub *subject) check(t *testing.T) {
	require.NoError(t, sub.storage().Check(sub.ctx))
	err := NewStorage(sub.client.Bucket("gcs-test-"+strings.ToLower(rand.Text())), sub.opts...).Check(sub.ctx)
	requireError(t, err, KindNotFound, "gcs.Check", "", "")
}

// requests: each call keeps to its budget. A commit takes one request more where it
// has to empty the marker. A version is listed twice where its .mod got another
// generation since, as if it was copied from another bucket.
func (sub *subject) requests(t *testing.T) {
	if sub.count == nil {
		t.Skip("nobody counts the requests to a server that the environment names")
	}
	commit, look := 1, 1
	if !sub.able(clearsMetadata) {
		commit = 2
	}
	if !sub.able(keepsGenerations) {
		look = 2
	}
	costs := func(call, vers string, budget, kind int) {
		t.Helper()
		before := sub.count()
		err := callsOn(sub.patient(), sub.version(vers))[call](sub.ctx)
		require.Equal(t, kind, Kind(err), "%s: %v", call, err)
		took := sub.count() - before
		t.Logf("%s of %s: %d requests", call, vers, took)
		require.LessOrEqual(t, took, budget, call)
	}
	costs("Save", "v1.0.0", 4+commit, 0)
	costs("Save", "v1.0.0", 3, KindAlreadyExists)
	for op, budget := range map[string]int{"Exists": look, "Info": 1, "GoMod": 1, "Zip": 1, "List": look, "Scan": look} {
		costs(op, "v1.0.0", budget, 0)
	}
	costs("Delete", "v1.0.0", 4, 0)

	left := sub.leave(t)
	unfinished := left[slices.IndexFunc(left, func(l leftover) bool { return l.state == Unfinished })].vers
	costs("Exists", unfinished, 1+commit, 0)
	costs("Repair", unfinished, look, 0) // it is complete
}
