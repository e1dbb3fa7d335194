package gcs

import (
	"bytes"
	"context"
	"crypto/md5"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"cloud.google.com/go/storage"
	"github.com/stretchr/testify/require"
	"google.golang.org/api/googleapi"
	"google.golang.org/api/iterator"
)

// The other tests trust the fake; this one asks a bucket. It wants a bucket that
// holds little else, and the permissions of roles/storage.objectUser on it:
//
//	GCS_TEST_BUCKET=my-bucket go test -run TestRealBucket
//
// With STORAGE_EMULATOR_HOST set it asks that server instead. What it stores is
// below a random prefix, and removed in the end.
func TestRealBucket(t *testing.T) {
	name := os.Getenv("GCS_TEST_BUCKET")
	if name == "" {
		t.Skip("GCS_TEST_BUCKET is not set: no bucket for a second opinion")
	}
	client, err := storage.NewClient(context.Background())
	require.NoError(t, err)
	t.Cleanup(func() { client.Close() })
	testContract(t, client.Bucket(name), 4*time.Second)
}

// The same over real sockets and in real time, so that it is seen to work.
func TestContract(t *testing.T) {
	f := newFakeGCS(t)
	f.tolerate() // it makes unconditional requests of its own
	testContract(t, f.over(t, f.listen(t), "contract", &http.Transport{}).Bucket, 400*time.Millisecond)
	require.Empty(t, f.Names())
}

// bucketTest is a test of the contract against a bucket of whatever kind, below
// a prefix of its own.
type bucketTest struct {
	bucket    *storage.BucketHandle
	module    string
	threshold time.Duration
}

func testContract(t *testing.T, bucket *storage.BucketHandle, threshold time.Duration) {
	prefix := "gcs-test-" + rand.Text()
	defer func() {
		objects := bucket.Objects(context.Background(), &storage.Query{Prefix: prefix + "/"})
		for {
			attrs, err := objects.Next()
			if err == iterator.Done {
				return
			}
			if err != nil {
				t.Errorf("removing what the test stored: %v", err)
				return
			}
			if err := bucket.Object(attrs.Name).Delete(context.Background()); err != nil {
				t.Errorf("removing what the test stored: %v", err)
			}
		}
	}()
	// A group, so that the parallel tests of it have ended when it has.
	t.Run("bucket", func(t *testing.T) {
		for name, test := range map[string]func(bucketTest, *testing.T){
			"conditions": bucketTest.conditions,
			"metadata":   bucketTest.metadata,
			"lifecycle":  bucketTest.lifecycle,
			"large zip":  bucketTest.largeZip,
			"leftovers":  bucketTest.leftovers,
			"stale":      bucketTest.stale,
			"fresh":      bucketTest.fresh,
			"contention": bucketTest.contention,
			"failure":    bucketTest.failure,
			"catalog":    bucketTest.catalog,
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				test(bucketTest{bucket, prefix + "/" + name, threshold}, t)
			})
		}
	})
}

func (b bucketTest) storage() *Storage {
	return NewStorage(b.bucket, WithStaleThreshold(b.threshold), WithChunkSize(256<<10))
}

func (b bucketTest) object(vers, ext string) *storage.ObjectHandle {
	return b.bucket.Object(version{b.module, vers}.object(ext))
}

// put stores an object without asking what is there.
func (b bucketTest) put(t *testing.T, vers, ext string, metadata map[string]string) *storage.ObjectAttrs {
	t.Helper()
	w := b.object(vers, ext).NewWriter(t.Context())
	w.Metadata = metadata
	_, err := io.WriteString(w, "leftover "+ext)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	return w.Attrs()
}

// save saves a version whose files tell who saved it.
func (b bucketTest) save(ctx context.Context, vers, who string) error {
	zip := []byte(who + "'s zip")
	sum := md5.Sum(zip)
	return b.storage().Save(ctx, b.module, vers, []byte(who+"'s mod"), bytes.NewReader(zip), sum[:], []byte(who+"'s info"))
}

// requireSaved checks that all three files are readable, and of that save.
func (b bucketTest) requireSaved(t *testing.T, vers, who string) {
	t.Helper()
	s := b.storage()
	ok, err := s.Exists(t.Context(), b.module, vers)
	require.NoError(t, err)
	require.True(t, ok)
	for op, ext := range map[string]string{"Info": "info", "GoMod": "mod", "Zip": "zip"} {
		content, err := readers[op](t.Context(), s, b.module, vers)
		require.NoError(t, err)
		require.Equal(t, who+"'s "+ext, content)
	}
	attrs, err := b.object(vers, extMod).Attrs(t.Context())
	require.NoError(t, err)
	require.Empty(t, attrs.Metadata)
}

// conditions pins what all else rests on: a changed object refuses.
func (b bucketTest) conditions(t *testing.T) {
	ctx := t.Context()
	old := b.put(t, "v1.0.0", extMod, map[string]string{"a": "b"})
	o := b.object("v1.0.0", extMod)
	write := func(cond storage.Conditions) error {
		w := o.If(cond).NewWriter(ctx)
		if _, err := io.WriteString(w, "refused"); err != nil {
			return err
		}
		return w.Close()
	}
	update := func(cond storage.Conditions) error {
		_, err := o.If(cond).Update(ctx, storage.ObjectAttrsToUpdate{Metadata: map[string]string{"refused": "yes"}})
		return err
	}
	pause(t, b) // a second write of the name within a second may be limited
	now := b.put(t, "v1.0.0", extMod, map[string]string{"a": "b"})
	require.NotEqual(t, old.Generation, now.Generation)

	for name, err := range map[string]error{
		"a create":                     write(storage.Conditions{DoesNotExist: true}),
		"a write over another":         write(storage.Conditions{GenerationMatch: old.Generation}),
		"a write over a changed one":   write(storage.Conditions{GenerationMatch: now.Generation, MetagenerationMatch: now.Metageneration + 1}),
		"an update of another":         update(storage.Conditions{GenerationMatch: old.Generation, MetagenerationMatch: now.Metageneration}),
		"an update of a changed one":   update(storage.Conditions{GenerationMatch: now.Generation, MetagenerationMatch: now.Metageneration + 1}),
		"a delete of another":          o.If(storage.Conditions{GenerationMatch: old.Generation}).Delete(ctx),
		"a delete of one that changed": o.If(storage.Conditions{MetagenerationMatch: now.Metageneration + 1}).Delete(ctx),
	} {
		require.Error(t, err, name)
		require.True(t, isRefused(err), "%s: %v", name, err)
		var e *googleapi.Error
		if errors.As(err, &e) {
			require.Equal(t, 412, e.Code)
		}
	}
	after, err := o.Attrs(ctx)
	require.NoError(t, err)
	require.True(t, sameObject(now, after), "a refused request must change nothing")
}

// metadata pins how markers are written, renewed, cleared and seen in a list.
func (b bucketTest) metadata(t *testing.T) {
	ctx := t.Context()
	created := b.put(t, "v1.0.0", extMod, marked(time.Now(), "a"))
	o := b.object("v1.0.0", extMod)
	update := func(last *storage.ObjectAttrs, metadata map[string]string) *storage.ObjectAttrs {
		attrs, err := o.If(storage.Conditions{GenerationMatch: last.Generation, MetagenerationMatch: last.Metageneration}).
			Update(ctx, storage.ObjectAttrsToUpdate{Metadata: metadata})
		require.NoError(t, err)
		require.Equal(t, last.Generation, attrs.Generation)
		require.Greater(t, attrs.Metageneration, last.Metageneration)
		return attrs
	}
	seen, err := b.storage().look(ctx, version{b.module, "v1.0.0"})
	require.NoError(t, err)
	require.Equal(t, created.Metadata, seen.mod.Metadata)
	require.True(t, sameObject(created, seen.mod))

	renewed := update(created, marked(time.Now(), "b"))
	require.Equal(t, "b", renewed.Metadata[keySaveID])
	pause(t, b)
	cleared := update(renewed, map[string]string{})
	require.Empty(t, cleared.Metadata)
	seen, err = b.storage().look(ctx, version{b.module, "v1.0.0"})
	require.NoError(t, err)
	require.Empty(t, seen.mod.Metadata)
	require.True(t, sameObject(cleared, seen.mod))
}

// pause keeps to one change of an object a second, where that counts.
func pause(t *testing.T, b bucketTest) {
	t.Helper()
	require.NoError(t, sleep(t.Context(), min(b.threshold/4, 1100*time.Millisecond)))
}

func (b bucketTest) lifecycle(t *testing.T) {
	s := b.storage()
	for op, call := range calls {
		if op != "Save" && op != "Exists" {
			require.True(t, Is(call(t, s, b.module, "v1.0.0"), KindNotFound), op)
		}
	}
	ok, err := s.Exists(t.Context(), b.module, "v1.0.0")
	require.NoError(t, err)
	require.False(t, ok)
	requireList(t, s, b.module)

	require.NoError(t, b.save(t.Context(), "v1.0.0", "first"))
	b.requireSaved(t, "v1.0.0", "first")
	requireError(t, b.save(t.Context(), "v1.0.0", "second"), KindAlreadyExists, "gcs.Save", b.module, "v1.0.0")
	b.requireSaved(t, "v1.0.0", "first")
	requireList(t, s, b.module, "v1.0.0")

	require.NoError(t, s.Delete(t.Context(), b.module, "v1.0.0"))
	requireList(t, s, b.module)
	requireError(t, s.Delete(t.Context(), b.module, "v1.0.0"), KindNotFound, "gcs.Delete", b.module, "v1.0.0")
	pause(t, b)
	require.NoError(t, b.save(t.Context(), "v1.0.0", "third"))
	b.requireSaved(t, "v1.0.0", "third")
}

// largeZip is more than one chunk, from a reader that can be read once.
func (b bucketTest) largeZip(t *testing.T) {
	zip := bytes.Repeat([]byte("0123456789abcdef"), 5<<18/16)
	zip = append(zip, "end"...)
	s := b.storage()
	require.NoError(t, s.Save(t.Context(), b.module, "v1.0.0", []byte("mod"), struct{ io.Reader }{bytes.NewReader(zip)}, nil, []byte("info")))
	r, err := s.Zip(t.Context(), b.module, "v1.0.0")
	require.NoError(t, err)
	defer r.Close()
	require.EqualValues(t, len(zip), r.Size())
	got, err := io.ReadAll(r)
	require.NoError(t, err)
	require.True(t, bytes.Equal(zip, got))
}

// leftovers: every subset, with every kind of marker that nobody waits for.
func (b bucketTest) leftovers(t *testing.T) {
	var wg sync.WaitGroup
	for i, metadata := range []map[string]string{
		nil,
		marked(time.Now().Add(ago), "a"),
		marked(givenUp, "a"),
	} {
		for subset := range 8 {
			vers := fmt.Sprintf("v1.%d.%d", i, subset)
			for bit, ext := range []string{extInfo, extMod, extZip} {
				if subset&(1<<bit) == 0 {
					continue
				}
				m := map[string]string{keySaveID: fmt.Sprint(bit)}
				if ext == extMod {
					m = metadata
				}
				b.put(t, vers, ext, m)
			}
			wg.Go(func() {
				err := b.save(t.Context(), vers, "healer")
				if subset == 7 && metadata == nil {
					if !Is(err, KindAlreadyExists) {
						t.Errorf("%s was complete, and Save returned %v", vers, err)
					}
				} else if err != nil {
					t.Errorf("%s: %v", vers, err)
				}
			})
		}
	}
	wg.Wait()
	for i := range 3 {
		for subset := range 8 {
			if i > 0 || subset < 7 {
				b.requireSaved(t, fmt.Sprintf("v1.%d.%d", i, subset), "healer")
			}
		}
	}
}

// stale: what a crashed save left is finished when only its last step is
// missing, and else taken over.
func (b bucketTest) stale(t *testing.T) {
	old := marked(time.Now().Add(ago), "a")
	b.put(t, "v1.0.0", extMod, old)
	require.NoError(t, b.save(t.Context(), "v1.0.0", "next"))
	b.requireSaved(t, "v1.0.0", "next")

	b.put(t, "v2.0.0", extMod, old)
	for _, ext := range []string{extInfo, extZip} {
		b.put(t, "v2.0.0", ext, map[string]string{keySaveID: "a"})
	}
	requireError(t, b.save(t.Context(), "v2.0.0", "next"), KindAlreadyExists, "gcs.Save", b.module, "v2.0.0")
	ok, err := b.storage().Exists(t.Context(), b.module, "v2.0.0")
	require.NoError(t, err)
	require.True(t, ok)
	mod, err := b.storage().GoMod(t.Context(), b.module, "v2.0.0")
	require.NoError(t, err)
	require.Equal(t, "leftover mod", string(mod))
}

// fresh: a marker is waited for until it is stale, or its save is done.
func (b bucketTest) fresh(t *testing.T) {
	start := time.Now()
	b.put(t, "v1.0.0", extMod, marked(time.Now(), "a"))
	ok, err := b.storage().Exists(t.Context(), b.module, "v1.0.0")
	require.NoError(t, err)
	require.False(t, ok)
	require.NoError(t, b.save(t.Context(), "v1.0.0", "next"))
	require.GreaterOrEqual(t, time.Since(start), b.threshold)
	b.requireSaved(t, "v1.0.0", "next")

	ctx, cancel := context.WithTimeout(t.Context(), b.threshold/4)
	defer cancel()
	b.put(t, "v2.0.0", extMod, marked(time.Now(), "a"))
	err = b.save(ctx, "v2.0.0", "impatient")
	requireError(t, err, KindGatewayTimeout, "gcs.Save", b.module, "v2.0.0")
	require.ErrorIs(t, err, context.DeadlineExceeded)
}

// contention: of many who save at once, one stores the version, and the others
// find it complete.
func (b bucketTest) contention(t *testing.T) {
	for _, leftover := range []bool{false, true} {
		vers := fmt.Sprintf("v1.0.0-%v", leftover)
		if leftover {
			b.put(t, vers, extMod, marked(givenUp, "a"))
			b.put(t, vers, extZip, nil)
			pause(t, b)
		}
		errs := make([]error, 4)
		var wg sync.WaitGroup
		for i := range errs {
			wg.Go(func() { errs[i] = b.save(t.Context(), vers, fmt.Sprint(i)) })
		}
		wg.Wait()
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

// failure: a save that fails leaves no version, and the next need not wait.
func (b bucketTest) failure(t *testing.T) {
	s := b.storage()
	broken := errors.New("broken")
	for i, zip := range []io.Reader{
		brokenAfter(0, broken), brokenAfter(10, broken), brokenAfter(3<<19, broken),
	} {
		vers := fmt.Sprintf("v1.%d.0", i)
		err := s.Save(t.Context(), b.module, vers, []byte("mod"), zip, nil, []byte("info"))
		requireError(t, err, KindUnexpected, "gcs.Save", b.module, vers)
		require.ErrorIs(t, err, broken)
		ok, err := s.Exists(t.Context(), b.module, vers)
		require.NoError(t, err)
		require.False(t, ok)
		pause(t, b)
		patient := NewStorage(b.bucket, WithStaleThreshold(time.Hour))
		require.NoError(t, patient.Save(t.Context(), b.module, vers, []byte("next's mod"), bytes.NewReader([]byte("next's zip")), nil, []byte("next's info")))
		b.requireSaved(t, vers, "next")
	}
	sum := md5.Sum([]byte("another zip"))
	err := s.Save(t.Context(), b.module, "v2.0.0", []byte("mod"), bytes.NewReader([]byte("zip")), sum[:], []byte("info"))
	requireError(t, err, KindBadRequest, "gcs.Save", b.module, "v2.0.0")
}

// brokenAfter is a reader that fails after so many bytes.
func brokenAfter(size int64, err error) io.Reader {
	return io.MultiReader(io.LimitReader(zeros{}, size), failing{err})
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// catalog: the versions of this test are once each on the pages of the bucket,
// whatever else there is.
func (b bucketTest) catalog(t *testing.T) {
	s := b.storage()
	var want []string
	for _, vers := range []string{"v1.0.0", "v1.j", "v1"} {
		require.NoError(t, b.save(t.Context(), vers, "cataloger"))
		want = append(want, vers)
	}
	b.put(t, "v1.k", extMod, nil)
	b.put(t, "v1.k", extZip, nil)
	requireList(t, s, b.module, want...)
	for _, pageSize := range []int{2, 1000} {
		var got []string
		for token := ""; ; {
			page, next, err := s.Catalog(t.Context(), token, pageSize)
			require.NoError(t, err)
			require.LessOrEqual(t, len(page), pageSize)
			for _, v := range page {
				if v.Module == b.module {
					got = append(got, v.Version)
				}
			}
			if token = next; token == "" {
				break
			}
		}
		require.Equal(t, want, got)
	}
}
