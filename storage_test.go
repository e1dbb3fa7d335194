package gcs

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"net/http"
	"path"
	"strings"
	"testing"
	"time"

	"cloud.google.com/go/storage"
	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

func TestChunkSizeIsBounded(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		a := contentOf("a", 2<<20)
		s := f.storage("a", WithChunkSize(math.MaxInt))
		require.Equal(t, maxChunkSize, s.bucket.chunkSize)
		require.NoError(t, a.save(t.Context(), s))
		requireStored(t, f, a)
		require.Equal(t, defaultChunkSize, f.storage("b", WithChunkSize(-1)).bucket.chunkSize)
		require.Equal(t, 1, f.storage("b", WithChunkSize(1)).bucket.chunkSize)
	})
}

func TestNilArguments(t *testing.T) {
	bucket := (&storage.Client{}).Bucket("none")
	require.PanicsWithValue(t, "gcs: NewStorage: the bucket is nil", func() { NewStorage(nil) })
	require.PanicsWithValue(t, "gcs: NewStorage: an option is nil", func() { NewStorage(bucket, nil) })
	require.PanicsWithValue(t, "gcs: WithErrors: wrap is nil", func() { WithErrors(nil) })
	require.PanicsWithValue(t, "gcs: SingleFlight: next is nil", func() { NewStorage(bucket).SingleFlight(nil) })
	require.NotPanics(t, func() { NewStorage(bucket, WithLogger(nil)) })
}

func TestMissingBucket(t *testing.T) {
	inOtherBucket := func(f *fakeGCS) *Storage { return NewStorage(f.Machine("m").Client.Bucket("missing")) }
	forEveryCall(t, inOtherBucket, func(t *testing.T, f *fakeGCS, name string, call func(context.Context) error) {
		start := time.Now()
		err := call(t.Context())
		require.Equal(t, KindNotFound, Kind(err), "%v", err)
		require.ErrorIs(t, err, fs.ErrNotExist)
		require.Less(t, time.Since(start), time.Second)
	})
}

// A prefix that no object name can begin with fails every call, before any request.
func TestBadPrefix(t *testing.T) {
	for _, prefix := range []string{
		"/", "/a", "a//", "a//b", "a/@v/", "@v", ".", "../a", "a/./b", "a\nb", "a\xff", ".well-known/acme-challenge",
		strings.Repeat("a", maxObjectName+1),
	} {
		run(t, fmt.Sprintf("%.30q", prefix), inCrowd, func(t *testing.T, f *fakeGCS) {
			for name, call := range everyCall(NewStorage(f.Machine("m").Bucket, WithPrefix(prefix))) {
				err := call(t.Context())
				require.Equal(t, KindBadRequest, Kind(err), "%s: %v", name, err)
			}
			require.Empty(t, f.Log())
		})
	}
}

// The prefix counts for the length of object names.
func TestPrefixOfLongName(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		long := strings.Repeat("m", maxObjectName-len("/@v/v1.0.0.info"))
		without, below := NewStorage(f.Machine("m").Bucket), NewStorage(f.Machine("m").Bucket, WithPrefix("a"))
		_, err := without.Exists(t.Context(), long, testVersion)
		require.NoError(t, err)
		f.ResetLog()
		_, err = below.Exists(t.Context(), long, testVersion)
		requireError(t, err, KindBadRequest, "gcs.Exists", long, testVersion)
		_, err = below.List(t.Context(), strings.Repeat("m", maxObjectName-1))
		require.Equal(t, KindBadRequest, Kind(err))
		require.Empty(t, f.Log())
	})
}

// Storages do not see each other's versions, also if the name of one prefix begins
// with that of another. A folder is seen from above: it is part of a module path.
func TestPrefixes(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		on := func(prefix string) *Storage { return NewStorage(f.Machine(prefix).Bucket, WithPrefix(prefix)) }
		var names []string
		prefixes := []string{"athens", "athens2", "athens3/", ""}
		for i, prefix := range prefixes {
			// The second lies, where the first has its ending, between its names.
			for _, vers := range []string{fmt.Sprintf("v%d", i), fmt.Sprintf("v%d.j", i)} {
				require.NoError(t, saveVersion(t.Context(), on(prefix), testModule, vers))
				for _, ext := range allExts {
					names = append(names, path.Join(prefix, ModuleVersion{testModule, vers}.object(ext)))
				}
			}
		}
		require.ElementsMatch(t, names, f.Names())
		for i, prefix := range prefixes {
			s, want := on(prefix), []string{fmt.Sprintf("v%d.j", i), fmt.Sprintf("v%d", i)}
			requireList(t, s, testModule, want...)
			if prefix == "" {
				continue
			}
			versions := []ModuleVersion{{testModule, want[0]}, {testModule, want[1]}}
			_, token, err := s.Catalog(t.Context(), "", 1)
			require.NoError(t, err)
			require.NotContains(t, token, "athens")
			require.Equal(t, versions, catalogOf(t, s, 1))
			for i, status := range scanned(t, s, "") {
				require.Equal(t, versions[i], status.ModuleVersion)
			}
		}
		for _, r := range f.Log() { // and list nothing else
			require.True(t, r.Machine == "" || strings.HasPrefix(r.Object, strings.TrimSuffix(r.Machine, "/")+"/"), "%v", r)
		}
		require.ErrorIs(t, on("athens").Delete(t.Context(), testModule, "v1"), fs.ErrNotExist)
		requireList(t, on(""), "athens/"+testModule, "v0.j", "v0")
	})
}

// A server that takes null for "leave it" gets an empty value, and the log says so
// once.
func TestServerThatMergesMetadata(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		var log strings.Builder
		debug := WithLogger(slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))
		s := leavingMetadata(f, "null", debug)
		ctx := within(t, time.Minute)
		for _, vers := range []string{"v1.0.0", "v2.0.0"} {
			require.NoError(t, saveVersion(ctx, s, testModule, vers))
			value, ok := f.Get(ModuleVersion{testModule, vers}.object(extMod)).Metadata[keyInProgress]
			require.True(t, ok)
			require.Empty(t, value)
			require.Equal(t, KindAlreadyExists, Kind(saveVersion(ctx, s, testModule, vers)))
			requireExists(t, s, vers, true)
		}
		requireList(t, s, testModule, "v1.0.0", "v2.0.0")
		unfinishedVersion(f, ModuleVersion{testModule, "v3.0.0"})
		requireExists(t, s, "v3.0.0", true)
		require.NoError(t, ctx.Err())
		require.Equal(t, 1, strings.Count(log.String(), "the server does not clear metadata"))
	})
}

// A server that does not clear metadata at all fails the save, which the next one
// commits elsewhere.
func TestServerThatKeepsMetadata(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		a := contentOf("a", 100)
		err := a.save(t.Context(), leavingMetadata(f, "null, empty"))
		requireKind(t, err, KindUnexpected)
		require.ErrorIs(t, err, errNotCleared)
		require.ErrorContains(t, err, "the server does not clear metadata")
		require.True(t, givesUp(&fakegcs.Request{Metadata: f.Get(objectName(extMod)).Metadata}))
		start := time.Now()
		requireKind(t, a.save(t.Context(), f.storage("b")), KindAlreadyExists)
		require.Less(t, time.Since(start), time.Second)
		requireStored(t, f, a)
	})
}

// leavingMetadata is a Storage whose server leaves an object's metadata as it is
// when it is to be set to what leaves names: null, empty.
func leavingMetadata(f *fakeGCS, leaves string, opts ...Option) *Storage {
	return behind(f, func(r *http.Request) *http.Response {
		if r.Method != http.MethodPatch {
			return nil
		}
		sent, _ := io.ReadAll(r.Body)
		r.Body.Close()
		var object struct{ Metadata map[string]string }
		json.Unmarshal(sent, &object)
		value, ok := object.Metadata[keyInProgress]
		if object.Metadata == nil || strings.Contains(leaves, "empty") && ok && value == "" {
			sent = []byte("{}")
		}
		r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(sent)), int64(len(sent))
		return nil
	}, opts...)
}
