package gcs

import (
	"bytes"
	"context"
	"crypto/md5"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
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
	run   func(b *bench, t *testing.T)
}

var rows = []row{
	{"catalog", true, (*bench).catalog}, {"leftovers/catalog", true, (*bench).leftoversInCatalog},
	{"requests", true, (*bench).requests}, {"metadata", false, (*bench).metadata}, {"lifecycle", false, (*bench).lifecycle},
	{"zips", false, (*bench).zips}, {"zip of two default chunks", false, (*bench).hugeZip},
	{"failing readers", false, (*bench).failure}, {"contexts", false, (*bench).contexts},
	{"leftovers/save", false, (*bench).leftoversSave}, {"leftovers/exists", false, (*bench).leftoversExists},
	{"leftovers/read", false, (*bench).leftoversRead}, {"leftovers/list", false, (*bench).leftoversList},
	{"leftovers/scan", false, (*bench).leftoversScan}, {"leftovers/repair", false, (*bench).leftoversRepair},
	{"leftovers/delete", false, (*bench).leftoversDelete}, {"fresh", false, (*bench).fresh}, {"renewal", false, (*bench).renewal},
	{"contention", false, (*bench).contention}, {"single flight", false, (*bench).singleFlight},
	{"claims", false, (*bench).claims}, {"check", false, (*bench).check},
}

func (c column) run(t *testing.T) {
	on := func(t *testing.T, test func(t *testing.T, s server)) {
		synctest.Test(t, func(t *testing.T) { test(t, c.start(t)) })
	}
	if !c.virtual {
		s := c.start(t)
		on = func(t *testing.T, test func(t *testing.T, s server)) {
			s := s
			if s.bucket == "" {
				s.bucket = makeBucket(t, s.client)
			}
			test(t, s)
		}
	}
	root := "gcs-test-" + rand.Text() + "/"
	t.Run("abilities", func(t *testing.T) {
		on(t, func(t *testing.T, s server) {
			b := &bench{column: c, server: s, ctx: t.Context(), root: root + "abilities/"}
			defer b.clean(t)
			lacks := b.probe(t)
			if c.lacks == nil {
				c.lacks = lacks
				if os.Getenv("STORAGE_EMULATOR_HOST") == "" {
					require.Empty(t, lacks, "Cloud Storage does all of it")
				}
			}
			for a, why := range lacks {
				t.Logf("not on this server: %s: %s", a, why)
				require.Contains(t, c.lacks, a)
			}
			require.Len(t, lacks, len(c.lacks), "the server does what the table says it does not: %v", c.lacks)
		})
	})
	for _, name := range []string{"plain", "prefix"} {
		t.Run(name, func(t *testing.T) {
			// More rows run at once than t.Parallel allows, for they mostly wait.
			var group errgroup.Group
			group.SetLimit(8)
			for _, r := range rows {
				run := func() error {
					t.Run(r.name, func(t *testing.T) {
						on(t, func(t *testing.T, s server) { c.runRow(t, s, r, root+name+"/"+r.name+"/", name == "prefix") })
					})
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

// runRow runs a row below that root. The names of all objects are the same with a
// prefix and without.
func (c column) runRow(t *testing.T, s server, r row, root string, prefixed bool) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute+10*c.threshold)
	defer cancel()
	b := &bench{column: c, server: s, ctx: ctx, root: root, module: "example.com/m"}
	if prefixed {
		b.opts = []Option{WithPrefix(b.root)}
	} else {
		b.module = b.root + b.module
	}
	defer b.clean(t)
	r.run(b, t)
}

// A bench is what a row works with.
type bench struct {
	column
	server
	ctx    context.Context // ends when a call waits that must not
	root   string          // of the names of all its objects
	module string
	opts   []Option
}

func (b *bench) able(a ability) bool {
	_, lacks := b.lacks[a]
	return !lacks
}

func (b *bench) prefixed() bool { return b.opts != nil }

func (b *bench) handle() *storage.BucketHandle { return b.client.Bucket(b.bucket) }

func (b *bench) storage(opts ...Option) *Storage {
	return NewStorage(b.handle(), append(opts, b.opts...)...)
}

// patience is a stale threshold that no test outlasts. What such a storage does, it
// does at once.
const patience = 10 * time.Minute

func (b *bench) patient() *Storage { return b.storage(WithStaleThreshold(patience)) }

// impatient is a storage whose stale threshold a test can wait for.
func (b *bench) impatient() *Storage { return b.storage(WithStaleThreshold(b.threshold)) }

func (b *bench) object(vers, ext string) *storage.ObjectHandle {
	return b.handle().Object(b.root + "example.com/m/@v/" + vers + "." + ext)
}

// list returns all objects of the row.
func (b *bench) list(t *testing.T) (objects []*storage.ObjectAttrs) {
	t.Helper()
	it := b.handle().Objects(context.Background(), &storage.Query{Prefix: b.root})
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
func (b *bench) clean(t *testing.T) {
	t.Helper()
	var g errgroup.Group
	g.SetLimit(16)
	for _, attrs := range b.list(t) {
		g.Go(func() error { return b.handle().Object(attrs.Name).Delete(context.Background()) })
	}
	require.NoError(t, g.Wait())
	require.Empty(t, b.list(t))
}

// put stores an object without asking what is there.
func (b *bench) put(ctx context.Context, o *storage.ObjectHandle, content string, metadata map[string]string) (*storage.ObjectAttrs, error) {
	w := o.NewWriter(ctx)
	w.ChunkSize, w.Metadata = 0, metadata
	_, err := io.WriteString(w, content)
	if err = errors.Join(err, w.Close()); err != nil {
		return nil, err
	}
	return w.Attrs(), nil
}

func (b *bench) mustPut(t *testing.T, o *storage.ObjectHandle, metadata map[string]string) *storage.ObjectAttrs {
	t.Helper()
	_, err := b.put(b.ctx, o, "leftover", metadata)
	require.NoError(t, err)
	attrs, err := o.Attrs(b.ctx)
	require.NoError(t, err)
	return attrs
}

// update changes the metadata of an object that is as it was.
func (b *bench) update(t *testing.T, o *storage.ObjectHandle, last *storage.ObjectAttrs, metadata map[string]string) *storage.ObjectAttrs {
	t.Helper()
	attrs, err := o.If(storage.Conditions{GenerationMatch: last.Generation, MetagenerationMatch: last.Metageneration}).
		Update(b.ctx, storage.ObjectAttrsToUpdate{Metadata: metadata})
	require.NoError(t, err)
	return attrs
}

// save saves a version whose files tell who saved it.
func (b *bench) save(ctx context.Context, s *Storage, vers, who string) error {
	zip := []byte(who + "'s zip")
	sum := md5.Sum(zip)
	return s.Save(ctx, b.module, vers, []byte(who+"'s mod"), bytes.NewReader(zip), sum[:], []byte(who+"'s info"))
}

// requireSaved checks that all three files are readable, and of that save.
func (b *bench) requireSaved(t *testing.T, vers, who string) {
	t.Helper()
	b.requireFiles(t, vers, who+"'s info", who+"'s mod", who+"'s zip")
	attrs, err := b.object(vers, "mod").Attrs(b.ctx)
	require.NoError(t, err)
	if b.able(clearsMetadata) {
		require.Empty(t, attrs.Metadata)
	} else {
		require.Empty(t, attrs.Metadata["in-progress"])
	}
}

func (b *bench) requireExists(t *testing.T, vers string, want bool) {
	t.Helper()
	ok, err := b.patient().Exists(b.ctx, b.module, vers)
	require.NoError(t, err, vers)
	require.Equal(t, want, ok, vers)
}

// requireFiles checks that the version exists, with that content.
func (b *bench) requireFiles(t *testing.T, vers, info, mod, zip string) {
	t.Helper()
	b.requireExists(t, vers, true)
	for op, want := range map[string]string{"Info": info, "GoMod": mod, "Zip": zip} {
		content, err := readers[op](b.ctx, b.patient(), b.module, vers)
		require.NoError(t, err, vers)
		require.Equal(t, want, content, vers)
	}
}

// pause keeps to one change of an object a second, where that counts.
func (b *bench) pause() {
	if b.count == nil {
		time.Sleep(1100 * time.Millisecond)
	}
}

// probe finds out what the server does not do. What it does refuse, it must refuse
// as GCS does, and not apply.
func (b *bench) probe(t *testing.T) (lacks map[ability]string) {
	type cond = storage.Conditions
	type attrs = *storage.ObjectAttrs
	ctx := b.ctx
	lacks = map[ability]string{}
	write := func(o *storage.ObjectHandle) error { _, err := b.put(ctx, o, "refused", nil); return err }
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
		o := b.object(fmt.Sprintf("v1.0.%d", i), "mod")
		old := b.mustPut(t, o, map[string]string{"a": "b"})
		b.pause()
		now := b.mustPut(t, o, map[string]string{"a": "b"})
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

	o := b.object("v2.0.0", "mod")
	created := b.mustPut(t, o, map[string]string{"a": "b"})
	updated := b.update(t, o, created, map[string]string{"a": "c"})
	if updated.Metageneration <= created.Metageneration {
		lacks[countsUpdates] = fmt.Sprintf("it was %d before, and %d after", created.Metageneration, updated.Metageneration)
	}
	if updated.Generation != created.Generation {
		lacks[keepsGenerations] = fmt.Sprintf("it was %d before, and %d after", created.Generation, updated.Generation)
	}
	b.pause()
	cleared := b.update(t, o, updated, map[string]string{})
	if len(cleared.Metadata) > 0 {
		lacks[clearsMetadata] = fmt.Sprint("it leaves ", cleared.Metadata)
	}
	if _, err := b.handle().IAM().TestPermissions(ctx, []string{"storage.objects.get"}); err != nil {
		lacks[testsPermissions] = err.Error()
	}
	return lacks
}

// metadata pins how markers are written, renewed, cleared and seen in a list.
func (b *bench) metadata(t *testing.T) {
	o := b.object("v1.0.0", "mod")
	created := b.mustPut(t, o, map[string]string{"in-progress": "a", "save-id": "a"})
	update := func(last *storage.ObjectAttrs, metadata map[string]string) *storage.ObjectAttrs {
		attrs := b.update(t, o, last, metadata)
		if b.able(keepsGenerations) {
			require.Equal(t, last.Generation, attrs.Generation)
		}
		if b.able(countsUpdates) {
			require.Greater(t, attrs.Metageneration, last.Metageneration)
		}
		return attrs
	}
	requireListed := func(want *storage.ObjectAttrs) {
		t.Helper()
		objects := b.list(t)
		require.Len(t, objects, 1)
		require.Equal(t, want.Metadata, objects[0].Metadata)
		require.Equal(t, want.Generation, objects[0].Generation)
		if b.able(countsUpdates) {
			require.Equal(t, want.Metageneration, objects[0].Metageneration)
		}
	}
	require.Equal(t, map[string]string{"in-progress": "a", "save-id": "a"}, created.Metadata)
	requireListed(created)

	renewed := update(created, map[string]string{"in-progress": "b", "save-id": "a"})
	require.Equal(t, map[string]string{"in-progress": "b", "save-id": "a"}, renewed.Metadata)
	requireListed(renewed)
	b.pause()
	emptied := update(renewed, map[string]string{"in-progress": ""})
	require.Equal(t, map[string]string{"in-progress": "", "save-id": "a"}, emptied.Metadata)
	requireListed(emptied)
	b.pause()
	cleared := update(emptied, map[string]string{})
	if b.able(clearsMetadata) {
		require.Empty(t, cleared.Metadata)
	}
	requireListed(cleared)
}

func (b *bench) lifecycle(t *testing.T) {
	s := b.patient()
	for _, op := range perVersion[2:] {
		require.True(t, Is(callsOn(s, ModuleVersion{b.module, "v1.0.0"})[op](b.ctx), KindNotFound), op)
	}
	b.requireExists(t, "v1.0.0", false)
	requireList(t, s, b.module)

	require.NoError(t, b.save(b.ctx, s, "v1.0.0", "first"))
	b.requireSaved(t, "v1.0.0", "first")
	requireError(t, b.save(b.ctx, s, "v1.0.0", "second"), KindAlreadyExists, "gcs.Save", b.module, "v1.0.0")
	b.requireSaved(t, "v1.0.0", "first")
	requireList(t, s, b.module, "v1.0.0")

	require.NoError(t, s.Delete(b.ctx, b.module, "v1.0.0"))
	requireList(t, s, b.module)
	require.Empty(t, b.list(t))
	requireError(t, s.Delete(b.ctx, b.module, "v1.0.0"), KindNotFound, "gcs.Delete", b.module, "v1.0.0")
	b.pause()
	require.NoError(t, b.save(b.ctx, s, "v1.0.0", "third"))
	b.requireSaved(t, "v1.0.0", "third")
}

// zips: each size, from a reader that can be read twice and from one that cannot,
// in small chunks, with each kind of MD5.
func (b *bench) zips(t *testing.T) {
	if b.prefixed() {
		return // the names of objects make no difference to a zip
	}
	for i, size := range []int{0, 100 << 10, 1 << 20, 1<<20 + 1, 3 << 20} {
		for j, seekable := range []bool{true, false} {
			b.zip(t, fmt.Sprintf("v%d.%d", i, j), size, seekable, WithChunkSize(256<<10))
		}
	}
}

func (b *bench) hugeZip(t *testing.T) {
	if !b.prefixed() {
		b.zip(t, "v1.0", defaultChunkSize+1, true)
	}
}

func (b *bench) zip(t *testing.T, vers string, size int, seekable bool, opts ...Option) {
	s := b.storage(append(opts, WithStaleThreshold(patience))...)
	zip := bytes.Repeat([]byte("0123456789abcde\n"), size/16+1)[:size]
	save := func(vers string, sum []byte) error {
		var r io.Reader = bytes.NewReader(zip)
		if !seekable {
			r = plain(r)
		}
		return s.Save(b.ctx, b.module, vers, []byte("mod"), r, sum, []byte("info"))
	}
	right, wrong := md5.Sum(zip), md5.Sum([]byte("another zip"))
	requireError(t, save(vers+".0", wrong[:]), KindBadRequest, "gcs.Save", b.module, vers+".0")
	b.requireExists(t, vers+".0", false)
	b.pause()
	require.NoError(t, save(vers+".0", right[:]))
	saved := []string{vers + ".0"}
	if size == 100<<10 {
		require.NoError(t, save(vers+".1", nil))
		require.NoError(t, save(vers+".2", []byte("not of 16 bytes")))
		saved = append(saved, vers+".1", vers+".2")
	}
	for _, vers := range saved {
		r, err := s.Zip(b.ctx, b.module, vers)
		require.NoError(t, err)
		require.EqualValues(t, size, r.Size())
		got, err := io.ReadAll(r)
		require.NoError(t, errors.Join(err, r.Close()))
		require.True(t, bytes.Equal(zip, got))
		b.requireExists(t, vers, true)
	}
}

// failure: a save whose reader fails leaves no version, and the next need not wait.
func (b *bench) failure(t *testing.T) {
	broken := errors.New("broken")
	for i, size := range []int64{0, 10, 1 << 20, 3 << 19} {
		b.failedSave(t, b.ctx, fmt.Sprintf("v1.%d.0", i), brokenAfter(size, broken), broken)
	}
}

func (b *bench) failedSave(t *testing.T, ctx context.Context, vers string, zip io.Reader, cause error) {
	t.Helper()
	s := b.storage(WithStaleThreshold(patience), WithChunkSize(256<<10))
	err := s.Save(ctx, b.module, vers, []byte("mod"), zip, nil, []byte("info"))
	requireError(t, err, KindUnexpected, "gcs.Save", b.module, vers)
	require.ErrorIs(t, err, cause)
	b.requireExists(t, vers, false)
	b.pause()
	require.NoError(t, b.save(b.ctx, b.patient(), vers, "next"))
	b.requireSaved(t, vers, "next")
}

// brokenAfter is a reader that fails after so many bytes.
func brokenAfter(size int64, err error) io.Reader {
	return io.MultiReader(io.LimitReader(zeros{}, size), iotest.ErrReader(err))
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// contexts: a call whose context has ended says so, and changes nothing. A save
// whose context ends while it reads the zip leaves no version.
func (b *bench) contexts(t *testing.T) {
	s := b.patient()
	require.NoError(t, b.save(b.ctx, s, "v1.0.0", "first"))
	for op, call := range callsOn(s, ModuleVersion{b.module, "v1.0.0"}) {
		for _, ctx := range contextEnds(b.ctx, 0) {
			err := call(ctx)
			require.True(t, Is(err, ctx.kind), "%s: %v", op, err)
			require.ErrorIs(t, err, ctx.cause, op)
		}
	}
	b.requireSaved(t, "v1.0.0", "first")

	for i, size := range []int64{0, 100 << 10, 2 << 20} {
		ctx, cancel := context.WithCancel(b.ctx)
		zip := io.MultiReader(io.LimitReader(zeros{}, size), waiting(cancel), io.LimitReader(zeros{}, 1<<20))
		b.failedSave(t, ctx, fmt.Sprintf("v3.%d.0", i), zip, context.Canceled)
	}
}

// A leftover is what an older version, or a save that ended early, left of a version.
type leftover struct {
	vers    string
	kind    string   // of its marker
	exts    []string // of its objects
	state   State    // while a fresh marker is fresh
	isStale State    // afterwards
}

// A markerKind is a kind of marker on the .mod of a leftover.
type markerKind struct {
	kind string
	mark func(now time.Time) map[string]string
	// oneSave says that the three objects are of one save. They count as that too
	// if the .mod names no save.
	oneSave bool
	state   State // of a version of three objects
}

var markers = []markerKind{
	{"none", func(now time.Time) map[string]string { return nil }, true, Complete},
	{"emptied", func(now time.Time) map[string]string { return map[string]string{"in-progress": "", "save-id": "a"} }, true, Complete},
	{"stale", func(now time.Time) map[string]string { return markedAt(now.Add(ago), "a") }, false, Abandoned},
	{"stale, of one save", func(now time.Time) map[string]string { return markedAt(now.Add(ago), "a") }, true, Unfinished},
	{"stale, of no save", func(now time.Time) map[string]string { return markedAt(now.Add(ago), "") }, true, Unfinished},
	{"given up", func(now time.Time) map[string]string { return markedAt(time.Unix(0, 0), "a") }, false, Abandoned},
	{"fresh", func(now time.Time) map[string]string { return markedAt(now, "a") }, false, InProgress},
	{"fresh, of one save", func(now time.Time) map[string]string { return markedAt(now, "a") }, true, InProgress},
	{"an hour ahead", func(now time.Time) map[string]string { return markedAt(now.Add(time.Hour), "a") }, false, InProgress},
	{"no time", func(now time.Time) map[string]string { return map[string]string{"in-progress": "soon", "save-id": "a"} }, false, InProgress},
	{"older Athens", func(now time.Time) map[string]string { return map[string]string{"in_progress": "true"} }, true, InProgress},
}

// markedAt is the metadata of a .mod whose save was alive at that time.
func markedAt(at time.Time, id string) map[string]string {
	m := map[string]string{"in-progress": at.UTC().Format(time.RFC3339Nano)}
	if id != "" {
		m["save-id"] = id
	}
	return m
}

// leave puts every subset of the three objects there, with every kind of marker.
func (b *bench) leave(t *testing.T) (left []leftover) {
	t.Helper()
	subsets := [][]string{{"mod"}, {"info"}, {"zip"}, {"mod", "info"}, {"mod", "zip"}, {"info", "zip"}, {"mod", "info", "zip"}}
	if b.prefixed() { // some will do to see that the prefix is heeded
		subsets = subsets[4:]
	}
	var g errgroup.Group
	g.SetLimit(16)
	for i, m := range markers {
		for j, exts := range subsets {
			l := leftover{vers: fmt.Sprintf("v1.%d.%d", i, j), kind: m.kind, exts: exts}
			subset := byte(0)
			for _, ext := range exts {
				subset |= map[string]byte{"info": 1, "mod": 2, "zip": 4}[ext]
			}
			l.state = meaning(subset, m.state != Complete, m.state == InProgress, m.oneSave)
			l.isStale = meaning(subset, m.state != Complete, false, m.oneSave)
			left = append(left, l)
			g.Go(func() error { return b.leaveOne(b.ctx, l, m) })
		}
	}
	require.NoError(t, g.Wait())
	return append(left, leftover{vers: "v2.0.0", kind: "none"})
}

func (b *bench) leaveOne(ctx context.Context, l leftover, m markerKind) error {
	others := map[string]string{"save-id": "another"}
	for _, ext := range l.exts {
		metadata := others
		if ext == "mod" {
			metadata = m.mark(time.Now())
		}
		attrs, err := b.put(ctx, b.object(l.vers, ext), "leftover "+ext, metadata)
		if err != nil {
			return err
		}
		if ext == "mod" && m.oneSave {
			others = map[string]string{"save-id": metadata["save-id"], "mod-generation": fmt.Sprint(attrs.Generation)}
		}
	}
	return nil
}

// each does something with all leftovers at once.
func each(left []leftover, do func(l leftover) error) error {
	var g errgroup.Group
	g.SetLimit(16)
	for _, l := range left {
		g.Go(func() error {
			if err := do(l); err != nil {
				return fmt.Errorf("%s (%s, %v, %v): %w", l.vers, l.kind, l.exts, l.state, err)
			}
			return nil
		})
	}
	return g.Wait()
}

// exists tells whether the version exists when its marker is stale, if it is one.
func (s State) exists() bool { return s == Complete || s == Unfinished }

func (b *bench) requireLeft(t *testing.T, vers string) {
	t.Helper()
	b.requireFiles(t, vers, "leftover info", "leftover mod", "leftover zip")
}

// leftoversSave: no leftover makes a save fail. It waits for a fresh marker, and
// for no other.
func (b *bench) leftoversSave(t *testing.T) {
	left := b.leave(t)
	require.NoError(t, each(left, func(l leftover) error {
		s := b.patient()
		if l.state == InProgress {
			s = b.impatient()
		}
		err := b.save(b.ctx, s, l.vers, "healer")
		if l.isStale.exists() {
			if !Is(err, KindAlreadyExists) {
				return fmt.Errorf("Save returned %w", err)
			}
			return nil
		}
		return err
	}))
	for _, l := range left {
		if l.isStale.exists() {
			b.requireLeft(t, l.vers)
		} else {
			b.requireSaved(t, l.vers, "healer")
		}
	}
}

func (b *bench) leftoversExists(t *testing.T) {
	left, s := b.leave(t), b.patient()
	require.NoError(t, each(left, func(l leftover) error {
		ok, err := s.Exists(b.ctx, b.module, l.vers)
		if err == nil && ok != l.state.exists() {
			err = fmt.Errorf("Exists returned %v", ok)
		}
		return err
	}))
	for _, l := range left {
		if l.state.exists() {
			b.requireLeft(t, l.vers)
		}
	}
}

// leftoversRead: a file is served if it is there, whatever the others are.
func (b *bench) leftoversRead(t *testing.T) {
	s := b.patient()
	require.NoError(t, each(b.leave(t), func(l leftover) error {
		for op, ext := range map[string]string{"Info": "info", "GoMod": "mod", "Zip": "zip"} {
			content, err := readers[op](b.ctx, s, b.module, l.vers)
			if slices.Contains(l.exts, ext) {
				if err != nil || content != "leftover "+ext {
					return fmt.Errorf("%s returned %q, %w", op, content, err)
				}
			} else if !Is(err, KindNotFound) || !errors.Is(err, storage.ErrObjectNotExist) {
				return fmt.Errorf("%s returned %w", op, err)
			}
		}
		return nil
	}))
}

// inOrder returns those versions, in the order of their objects' names.
func inOrder(left []leftover, is func(l leftover) bool) (versions []string) {
	for _, l := range left {
		if is(l) {
			versions = append(versions, l.vers)
		}
	}
	slices.SortFunc(versions, func(a, b string) int { return strings.Compare(a+".", b+".") })
	return versions
}

func (b *bench) leftoversList(t *testing.T) {
	left := b.leave(t)
	requireList(t, b.patient(), b.module, inOrder(left, func(l leftover) bool { return l.state.exists() })...)
}

func (b *bench) leftoversInCatalog(t *testing.T) {
	left, s := b.leave(t), b.patient()
	want := inOrder(left, func(l leftover) bool { return l.state.exists() })
	for _, pageSize := range []int{1, 3, 0} {
		require.Equal(t, want, b.catalogOf(t, s, pageSize))
	}
}

// catalogOf returns what a catalog says of the row's module.
func (b *bench) catalogOf(t *testing.T, s *Storage, pageSize int) (versions []string) {
	t.Helper()
	for token := ""; ; {
		page, next, err := s.Catalog(b.ctx, token, pageSize)
		require.NoError(t, err)
		if pageSize > 0 {
			require.LessOrEqual(t, len(page), pageSize)
		}
		for _, v := range page {
			if v.Module == b.module {
				versions = append(versions, v.Version)
			} else {
				require.False(t, b.prefixed(), "%v is not below the prefix", v)
			}
		}
		if token = next; token == "" {
			return versions
		}
	}
}

func (b *bench) leftoversScan(t *testing.T) {
	left := b.leave(t)
	var got, want []VersionStatus
	for status, err := range b.patient().Scan(b.ctx, b.module) {
		require.NoError(t, err)
		require.WithinDuration(t, time.Now(), status.Updated, time.Hour)
		require.Zero(t, status.Claimed)
		require.Equal(t, status.State != Partial && status.State != Complete, !status.Renewed.IsZero(), "%v", status)
		status.Updated, status.Renewed = time.Time{}, time.Time{}
		got = append(got, status)
	}
	for _, vers := range inOrder(left, func(l leftover) bool { return l.state != Absent }) {
		l := left[slices.IndexFunc(left, func(l leftover) bool { return l.vers == vers })]
		status := VersionStatus{ModuleVersion: ModuleVersion{b.module, vers}, State: l.state}
		for _, ext := range []string{"info", "mod", "zip"} {
			if slices.Contains(l.exts, ext) {
				status.Size += int64(len("leftover " + ext))
			} else {
				status.Missing = append(status.Missing, ext)
			}
		}
		want = append(want, status)
	}
	require.Equal(t, want, got)
}

// leftoversRepair: what is not complete and not in progress can be fetched anew.
func (b *bench) leftoversRepair(t *testing.T) {
	left, s := b.leave(t), b.patient()
	require.NoError(t, each(left, func(l leftover) error {
		want := Absent
		switch l.state {
		case Complete, Unfinished:
			want = Complete
		case InProgress:
			want = InProgress
		}
		state, err := s.Repair(b.ctx, b.module, l.vers)
		if err == nil && state != want {
			err = fmt.Errorf("Repair returned %v", state)
		}
		return err
	}))
	objects := map[string]int{}
	for _, attrs := range b.list(t) {
		name := path.Base(attrs.Name)
		objects[strings.TrimSuffix(name, path.Ext(name))]++
	}
	for _, l := range left {
		switch l.state {
		case Complete, Unfinished:
			b.requireLeft(t, l.vers)
		case InProgress:
			require.Equal(t, len(l.exts), objects[l.vers], l.vers)
		default:
			require.Zero(t, objects[l.vers], l.vers)
			require.NoError(t, b.save(b.ctx, s, l.vers, "next"))
		}
	}
}

func (b *bench) leftoversDelete(t *testing.T) {
	left, s := b.leave(t), b.patient()
	require.NoError(t, each(left, func(l leftover) error {
		if err := s.Delete(b.ctx, b.module, l.vers); l.state == Absent {
			if !Is(err, KindNotFound) {
				return fmt.Errorf("Delete returned %w", err)
			}
		} else if err != nil {
			return err
		}
		if ok, err := s.Exists(b.ctx, b.module, l.vers); ok || err != nil {
			return fmt.Errorf("Exists returned %v, %w", ok, err)
		}
		return nil
	}))
	require.Empty(t, b.list(t))
}

// fresh: a marker is waited for until it is stale, or the context ends.
func (b *bench) fresh(t *testing.T) {
	s := b.impatient()
	start := time.Now()
	b.mustPut(t, b.object("v1.0.0", "mod"), markedAt(start, "a"))
	b.requireExists(t, "v1.0.0", false)
	require.NoError(t, b.save(b.ctx, s, "v1.0.0", "next"))
	require.GreaterOrEqual(t, time.Since(start), b.threshold)
	b.requireSaved(t, "v1.0.0", "next")

	ctx, cancel := context.WithTimeout(b.ctx, b.threshold/4)
	defer cancel()
	b.mustPut(t, b.object("v2.0.0", "mod"), markedAt(time.Now(), "a"))
	err := b.save(ctx, b.patient(), "v2.0.0", "impatient")
	requireError(t, err, KindGatewayTimeout, "gcs.Save", b.module, "v2.0.0")
	require.ErrorIs(t, err, context.DeadlineExceeded)
}

// renewal: a save renews its marker while its zip is on the way, and completes.
func (b *bench) renewal(t *testing.T) {
	s := b.storage(WithChunkSize(1), WithStaleThreshold(4*time.Second))
	marker := func() string {
		attrs, err := b.object("v1.0.0", "mod").Attrs(b.ctx)
		require.NoError(t, err)
		return attrs.Metadata["in-progress"]
	}
	var renewed bool
	zip := io.MultiReader(strings.NewReader("next's "), waiting(func() {
		first := marker()
		for !renewed && b.ctx.Err() == nil {
			time.Sleep(20 * time.Millisecond)
			renewed = marker() != first
		}
	}), strings.NewReader("zip"))
	require.NoError(t, s.Save(b.ctx, b.module, "v1.0.0", []byte("next's mod"), zip, nil, []byte("next's info")))
	require.True(t, renewed)
	b.requireSaved(t, "v1.0.0", "next")
}

// waiting is an empty reader that calls a function.
type waiting func()

func (w waiting) Read([]byte) (int, error) {
	w()
	return 0, io.EOF
}

// contention: of many who save at once, one stores the version, and the others
// find it complete.
func (b *bench) contention(t *testing.T) {
	if why, lacks := b.lacks[refusesUpdates]; lacks {
		t.Skip("what a race costs is not promised: ", why)
	}
	for _, leftover := range []bool{false, true} {
		vers := fmt.Sprintf("v1.0.0-%v", leftover)
		if leftover {
			b.mustPut(t, b.object(vers, "mod"), markedAt(time.Unix(0, 0), "a"))
			b.mustPut(t, b.object(vers, "zip"), nil)
			b.pause()
		}
		errs := make([]error, 4)
		together(len(errs), func(i int) { errs[i] = b.save(b.ctx, b.patient(), vers, fmt.Sprint(i)) })
		winner := slices.Index(errs, nil)
		require.GreaterOrEqual(t, winner, 0, "%v", errs)
		for i, err := range errs {
			if i != winner {
				requireError(t, err, KindAlreadyExists, "gcs.Save", b.module, vers)
			}
		}
		b.requireSaved(t, vers, fmt.Sprint(winner))
	}
}

// catalog: the versions of this test are once each on the pages of the bucket,
// whatever else there is.
func (b *bench) catalog(t *testing.T) {
	s := b.patient()
	var want []string
	for _, vers := range []string{"v1.0.0", "v1.j", "v1"} {
		require.NoError(t, b.save(b.ctx, s, vers, "cataloger"))
		want = append(want, vers)
	}
	b.mustPut(t, b.object("v1.k", "mod"), nil)
	b.mustPut(t, b.object("v1.k", "zip"), nil)
	b.mustPut(t, b.handle().Object(b.root+"no module's"), nil)
	requireList(t, s, b.module, want...)
	for _, pageSize := range []int{2, 1000} {
		require.Equal(t, want, b.catalogOf(t, s, pageSize))
	}
	_, _, err := s.Catalog(b.ctx, "no token", 2)
	require.True(t, Is(err, KindBadRequest), "%v", err)

	states := map[string]State{}
	for status, err := range s.Scan(b.ctx, "") {
		require.NoError(t, err)
		if status.Module == b.module {
			states[status.Version] = status.State
		} else {
			require.False(t, b.prefixed(), "%v is not below the prefix", status)
		}
	}
	require.Equal(t, map[string]State{"v1.0.0": Complete, "v1.j": Complete, "v1": Complete, "v1.k": Partial}, states)
}

// singleFlight: two machines with three callers each make one call, and leave no claim.
func (b *bench) singleFlight(t *testing.T) {
	var fetches atomic.Int64
	flights := make([]Stasher, 2)
	for i := range flights {
		s := b.patient()
		flights[i] = s.SingleFlight(stashFunc(func(ctx context.Context, module, vers string) (string, error) {
			fetches.Add(1)
			return vers, b.save(ctx, s, vers, fmt.Sprint(i))
		}))
	}
	together(6, func(i int) { returns(t, "v1.0.0")(flights[i%2].Stash(b.ctx, b.module, "v1.0.0")) })
	require.EqualValues(t, 1, fetches.Load())
	b.requireExists(t, "v1.0.0", true)

	none := &Error{Op: "fetch", Kind: KindNotFound, Err: errors.New("no such version")}
	_, err := b.patient().SingleFlight(answering("", none)).Stash(b.ctx, b.module, "v2.0.0")
	require.ErrorIs(t, err, none)
	exists := &Error{Op: "save", Kind: KindAlreadyExists, Module: b.module, Version: "v3.0.0", Err: errors.New("it is there")}
	returns(t, "v3.0.0")(b.patient().SingleFlight(answering("", exists)).Stash(b.ctx, b.module, "latest"))
	require.Len(t, b.list(t), 3, "a claim is left")
}

// claims: a claim that is left is seen, taken over when it is stale, and removed.
func (b *bench) claims(t *testing.T) {
	old, now := time.Now().Add(ago).UTC(), time.Now().UTC()
	b.mustPut(t, b.object("v1.0.0", extClaim), markedAt(old, "a"))
	b.mustPut(t, b.object("v2.0.0", extClaim), markedAt(old, "a"))
	b.mustPut(t, b.object("v3.0.0", extClaim), markedAt(now, "a"))
	claimed := map[string]time.Time{}
	for status, err := range b.patient().Scan(b.ctx, b.module) {
		require.NoError(t, err)
		require.Equal(t, Absent, status.State)
		claimed[status.Version] = status.Claimed
	}
	require.Equal(t, map[string]time.Time{"v1.0.0": old, "v2.0.0": old, "v3.0.0": now}, claimed)

	_, err := b.patient().Repair(b.ctx, b.module, "v1.0.0")
	require.NoError(t, err)
	for vers, s := range map[string]*Storage{"v2.0.0": b.storage(WithStaleThreshold(time.Minute)), "v3.0.0": b.impatient()} {
		returns(t, vers)(s.SingleFlight(stashFunc(func(ctx context.Context, module, vers string) (string, error) {
			return vers, b.save(ctx, s, vers, "next")
		})).Stash(b.ctx, b.module, vers))
		b.requireSaved(t, vers, "next")
	}
	require.Len(t, b.list(t), 6)
}

// check: a server that does not tell permissions is asked for a list.
func (b *bench) check(t *testing.T) {
	require.NoError(t, b.storage().Check(b.ctx))
	err := NewStorage(b.client.Bucket("gcs-test-"+strings.ToLower(rand.Text())), b.opts...).Check(b.ctx)
	requireError(t, err, KindNotFound, "gcs.Check", "", "")
}

// requests: each call keeps to its budget. A commit takes one request more where it
// has to empty the marker. A version is listed twice where its .mod got another
// generation since, as if it was copied from another bucket.
func (b *bench) requests(t *testing.T) {
	if b.count == nil {
		t.Skip("nobody counts the requests to a server that the environment names")
	}
	s, commit, look := b.patient(), 1, 1
	if !b.able(clearsMetadata) {
		commit = 2
	}
	if !b.able(keepsGenerations) {
		look = 2
	}
	costs := func(name string, budget int, call func(context.Context) error) {
		t.Helper()
		before := b.count()
		require.NoError(t, call(b.ctx), name)
		took := b.count() - before
		t.Logf("%s: %d requests", name, took)
		require.LessOrEqual(t, took, budget, name)
	}
	costs("Save, new version", 4+commit, func(ctx context.Context) error { return b.save(ctx, s, "v1.0.0", "first") })
	costs("Save, complete version", 3, func(ctx context.Context) error {
		if err := b.save(ctx, s, "v1.0.0", "second"); !Is(err, KindAlreadyExists) {
			return fmt.Errorf("Save returned %w", err)
		}
		return nil
	})
	for op, budget := range map[string]int{"Exists": look, "Info": 1, "GoMod": 1, "Zip": 1, "List": look, "Scan": look} {
		costs(op, budget, callsOn(s, ModuleVersion{b.module, "v1.0.0"})[op])
	}
	costs("Delete", 4, callsOn(s, ModuleVersion{b.module, "v1.0.0"})["Delete"])

	left := b.leave(t)
	unfinished := left[slices.IndexFunc(left, func(l leftover) bool { return l.state == Unfinished })]
	costs("Exists, unfinished version", 1+commit, callsOn(s, ModuleVersion{b.module, unfinished.vers})["Exists"])
	costs("Repair, complete version", look, callsOn(s, ModuleVersion{b.module, unfinished.vers})["Repair"])
}
