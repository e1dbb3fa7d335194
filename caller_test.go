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
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"cloud.google.com/go/storage"
	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// What a careless caller does, and what it gets.

// readFunc is a reader.
type readFunc func([]byte) (int, error)

func (read readFunc) Read(p []byte) (int, error) { return read(p) }

// heads are what a reader gives before it misbehaves: nothing, or what makes it a
// large zip.
var heads = map[string]int{"at the start": 0, "in a large zip": 3 << 20}

// behindHead is a reader that gives a head before it calls read.
func behindHead(size int, read readFunc) io.Reader {
	return io.MultiReader(bytes.NewReader(make([]byte, size)), read)
}

// requireNothingRunning checks that no goroutine is in the package's own code.
func requireNothingRunning(t *testing.T) {
	t.Helper()
	synctest.Wait()
	all := make([]byte, 1<<20)
	all = all[:runtime.Stack(all, true)]
	for goroutine := range strings.SplitSeq(string(all), "\n\n") {
		for _, file := range []string{"/bucket.go:", "/upload.go:", "/source.go:", "/lease.go:", "/saver.go:"} {
			require.NotContains(t, goroutine, file)
		}
	}
}

func TestSaveLooksAtItsContextBetweenReads(t *testing.T) {
	forNamed(t, inCrowd, heads, func(t *testing.T, f *fakeGCS, size int) {
		start := time.Now()
		zip := behindHead(size, func(p []byte) (int, error) {
			time.Sleep(100 * time.Millisecond)
			return copy(p, "x"), nil
		})
		err := contentOf("a", 0).saveFrom(within(t, 5*time.Second), f.storage("a", WithChunkSize(faultChunk)), zip)
		requireKind(t, err, KindGatewayTimeout)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Less(t, time.Since(start), 5500*time.Millisecond)
		requireNothingRunning(t)
		requireSavableAtOnce(t, f)
	})
}

func TestSaveOfReaderWithoutProgress(t *testing.T) {
	forNamed(t, inCrowd, heads, func(t *testing.T, f *fakeGCS, size int) {
		zip := behindHead(size, func([]byte) (int, error) { return 0, nil })
		err := contentOf("a", 0).saveFrom(t.Context(), f.storage("a"), zip)
		requireKind(t, err, KindUnexpected)
		require.ErrorIs(t, err, io.ErrNoProgress)
		requireSavableAtOnce(t, f)
	})
}

// A reader that returns nothing now and then makes progress.
func TestSaveOfHesitantReader(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		a := contentOf("a", 1000)
		zip, reads := bytes.NewReader(a.zip), 0
		hesitant := readFunc(func(p []byte) (int, error) {
			if reads++; reads%maxEmptyReads != 0 {
				return 0, nil
			}
			return zip.Read(p[:min(len(p), 100)])
		})
		require.NoError(t, a.saveFrom(t.Context(), f.storage("a"), hesitant))
		requireStored(t, f, a)
	})
}

// A reader that panics, or ends its goroutine, does so in the caller's. The save
// leaves nothing behind, and does not wait for the .info, which hangs.
func TestSaveOfPanickingReader(t *testing.T) {
	var none *bytes.Buffer
	for how, stop := range map[string]func(){
		"panic":  func() { none.Len() },
		"Goexit": runtime.Goexit,
	} {
		for name, size := range heads {
			run(t, how+" "+name, inCrowd, func(t *testing.T, f *fakeGCS) {
				f.fault(fakegcs.Hung, on("", "insert", extInfo))
				zip := behindHead(size, func([]byte) (int, error) {
					time.Sleep(100 * time.Millisecond) // the .info is on its way
					stop()
					return 0, io.EOF
				})
				start, returned := time.Now(), false
				var recovered any
				var group sync.WaitGroup
				group.Go(func() {
					defer func() { recovered = recover() }()
					// The context does not end, and stops nothing that is left.
					s := f.storage("a", WithChunkSize(faultChunk))
					_ = s.Save(context.Background(), testModule, testVersion, nil, zip, nil, nil)
					returned = true
				})
				group.Wait()
				require.False(t, returned)
				require.Equal(t, how == "panic", recovered != nil)
				require.Less(t, time.Since(start), 2*time.Second)
				requireNothingRunning(t)
				requireNothingInFlight(t, f)
				require.Nil(t, f.Get(objectName(extZip)))
				requireSavableAtOnce(t, f)
			})
		}
	}
}

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

// everyCall calls everything that can fail, of which each wants the version to
// exist or not.
func everyCall(s *Storage) map[string]func(ctx context.Context) error {
	return callsOn(s, testVersionName)
}

// callsOn is everyCall for that version.
func callsOn(s *Storage, v ModuleVersion) map[string]func(ctx context.Context) error {
	read := func(op string) func(ctx context.Context) error {
		return func(ctx context.Context) error { _, err := readers[op](ctx, s, v.Module, v.Version); return err }
	}
	scan := func(module string) func(ctx context.Context) error {
		return func(ctx context.Context) (err error) {
			for _, err = range s.Scan(ctx, module) {
			}
			return err
		}
	}
	return map[string]func(ctx context.Context) error{
		"Save": func(ctx context.Context) error { return contentOf("a", 100).saveAs(ctx, s, v) },
		"Exists": func(ctx context.Context) error {
			ok, err := s.Exists(ctx, v.Module, v.Version)
			if ok && err != nil {
				panic("a version exists in spite of an error")
			}
			return err
		},
		"Info":     read("Info"),
		"GoMod":    read("GoMod"),
		"Zip":      read("Zip"),
		"List":     func(ctx context.Context) error { _, err := s.List(ctx, v.Module); return err },
		"Delete":   func(ctx context.Context) error { return s.Delete(ctx, v.Module, v.Version) },
		"Catalog":  func(ctx context.Context) error { _, _, err := s.Catalog(ctx, "", 0); return err },
		"Scan":     scan(v.Module),
		"Scan all": scan(""),
		"Repair":   func(ctx context.Context) error { _, err := s.Repair(ctx, v.Module, v.Version); return err },
		"Check":    s.Check,
		"Stash": func(ctx context.Context) error {
			_, err := s.SingleFlight(answering(v.Version, nil)).Stash(ctx, v.Module, v.Version)
			return err
		},
	}
}

// forEveryCall runs a test for each call, of a Storage on a bucket of its own.
func forEveryCall(t *testing.T, make func(f *fakeGCS) *Storage, test func(t *testing.T, f *fakeGCS, name string, call func(context.Context) error)) {
	for name := range everyCall(nil) {
		run(t, name, inCrowd, func(t *testing.T, f *fakeGCS) {
			test(t, f, name, everyCall(make(f))[name])
		})
	}
}

func TestMissingBucket(t *testing.T) {
	inOtherBucket := func(f *fakeGCS) *Storage { return newStorage(f.Machine("m").Client.Bucket("missing")) }
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

func TestPrefix(t *testing.T) {
	forEach(t, inCrowd, []string{"athens", "athens/"}, func(t *testing.T, f *fakeGCS, prefix string) {
		s := NewStorage(f.Machine("m").Bucket, WithPrefix(prefix))
		next := stashFunc(func(ctx context.Context, _, vers string) (string, error) {
			require.NotNil(t, f.Get("athens/"+objectName(extClaim)))
			return vers, contentOf("a", 100).save(ctx, s)
		})
		requireStash(t, s.SingleFlight(next), testVersion, testVersion)
		require.Equal(t, []string{
			"athens/" + objectName(extInfo), "athens/" + objectName(extMod), "athens/" + objectName(extZip),
		}, f.Names())
		const beside = testVersion + ".j" // whose names lie between those of testVersion
		require.NoError(t, saveVersion(t.Context(), s, testModule, beside))
		require.NoError(t, s.Check(t.Context()))
		requireList(t, s, testModule, beside, testVersion)
		_, token, err := s.Catalog(t.Context(), "", 1)
		require.NoError(t, err)
		require.NotContains(t, token, "athens")
		require.Equal(t, []ModuleVersion{{testModule, beside}, {testModule, testVersion}}, catalogOf(t, s, 1))
		info, err := s.Info(t.Context(), testModule, testVersion)
		require.NoError(t, err)
		require.Equal(t, contentOf("a", 100).info, info)
		require.NoError(t, s.Delete(t.Context(), testModule, testVersion))
		require.NoError(t, s.Delete(t.Context(), testModule, beside))
		require.Empty(t, f.Names())
	})
}

// Storages do not see each other's versions, also if the name of one prefix begins
// with that of the other. A folder is seen from above: it is part of a module path.
func TestPrefixesApart(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		on := func(prefix string) *Storage { return NewStorage(f.Machine(prefix).Bucket, WithPrefix(prefix)) }
		a, ab, none := on("a"), on("ab"), on("")
		require.NoError(t, saveVersion(t.Context(), a, testModule, "v1.0.0"))
		require.NoError(t, saveVersion(t.Context(), ab, testModule, "v2.0.0"))
		require.NoError(t, saveVersion(t.Context(), none, testModule, "v3.0.0"))
		for s, vers := range map[*Storage]string{a: "v1.0.0", ab: "v2.0.0", none: "v3.0.0"} {
			requireList(t, s, testModule, vers)
		}
		for s, vers := range map[*Storage]string{a: "v1.0.0", ab: "v2.0.0"} {
			require.Equal(t, []ModuleVersion{{testModule, vers}}, catalogOf(t, s, 0))
			for _, status := range scanned(t, s, "") {
				require.Equal(t, ModuleVersion{testModule, vers}, status.ModuleVersion)
			}
		}
		for _, r := range f.Log() { // and list nothing else
			require.True(t, r.Machine == "" || strings.HasPrefix(r.Object, r.Machine+"/"), "%v", r)
		}
		require.ErrorIs(t, a.Delete(t.Context(), testModule, "v2.0.0"), fs.ErrNotExist)
		requireList(t, none, "a/"+testModule, "v1.0.0")
	})
}

func TestErrorIs(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		s, a := f.storage("a"), contentOf("a", 100)
		_, err := s.Info(t.Context(), testModule, testVersion)
		require.ErrorIs(t, err, fs.ErrNotExist)
		require.NotErrorIs(t, err, fs.ErrExist)
		require.ErrorIs(t, err, storage.ErrObjectNotExist)
		require.ErrorIs(t, s.Delete(t.Context(), testModule, testVersion), fs.ErrNotExist)
		require.NoError(t, a.save(t.Context(), s))
		err = a.save(t.Context(), s)
		require.ErrorIs(t, err, fs.ErrExist)
		require.NotErrorIs(t, err, fs.ErrNotExist)
		_, err = s.Info(t.Context(), "", testVersion)
		require.NotErrorIs(t, err, fs.ErrNotExist)
		require.NotErrorIs(t, err, fs.ErrExist)
	})
}

// A foreignError is an error of another package that wraps one of this.
type foreignError struct{ error }

func (e foreignError) Unwrap() error { return e.error }

// Every error passes through WithErrors, once. Nil does not.
func TestWithErrors(t *testing.T) {
	wrapped := 0
	make := func(f *fakeGCS) *Storage {
		wrapped = 0
		return f.storage("m", WithErrors(func(e *Error) error {
			wrapped++
			require.NotNil(t, e)
			require.Error(t, e.Err)
			return foreignError{e}
		}))
	}
	forEveryCall(t, make, func(t *testing.T, f *fakeGCS, name string, call func(context.Context) error) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		err := call(ctx)
		require.IsType(t, foreignError{}, err)
		require.ErrorIs(t, err, context.Canceled)
		require.Equal(t, KindUnexpected, Kind(err))
		require.Equal(t, 1, wrapped)
		synctest.Wait() // of a flight that goes on

		if name != "Save" {
			storeVersion(f, testModule, testVersion)
		}
		require.NoError(t, call(t.Context()))
		require.Equal(t, 1, wrapped)
	})
}

// So does an error in the middle of a stream, or of a scan.
func TestWithErrorsOfStreams(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		s := f.storage("m", WithErrors(func(e *Error) error { return foreignError{e} }))
		storeVersion(f, testModule, testVersion)
		gets := 0
		f.onRequest(func(r *fakegcs.Request) fakegcs.Fault {
			if r.Op != "get" {
				return fakegcs.TooMany
			}
			if gets++; gets == 1 {
				return fakegcs.LostBody
			}
			return fakegcs.Hung
		})
		zip, err := s.Zip(within(t, time.Minute), testModule, testVersion)
		require.NoError(t, err)
		_, err = io.ReadAll(zip)
		require.IsType(t, foreignError{}, err)
		requireKind(t, err, KindGatewayTimeout)
		require.IsType(t, foreignError{}, zip.Close())

		yielded := 0
		for status, err := range s.Scan(t.Context(), "") {
			yielded++
			require.Zero(t, status)
			require.IsType(t, foreignError{}, err)
			require.Equal(t, KindRateLimit, Kind(err))
		}
		require.Equal(t, 1, yielded)
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
	m := f.Register("leaving")
	m.Connect(editTransport{m, func(r *http.Request) *http.Response {
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
	}})
	return newStorage(m.Bucket, opts...)
}

// A client with retry settings of its own changes neither what this package retries
// nor what it leaves to the client.
func TestCallersRetrySettings(t *testing.T) {
	bubble(t, 0, func(t *testing.T, f *fakeGCS) {
		m := f.Machine("m")
		s := newStorage(m.Bucket.Retryer(storage.WithPolicy(storage.RetryNever)), WithChunkSize(256<<10))
		failed := map[string]bool{} // once
		f.onRequest(func(r *fakegcs.Request) fakegcs.Fault {
			if failed[r.Op] {
				return fakegcs.NoFault
			}
			failed[r.Op] = true
			return map[bool]fakegcs.Fault{true: fakegcs.LostBody, false: fakegcs.Unavailable}[r.Op == "get"]
		})
		c := contentOf("a", 1<<20)
		require.NoError(t, c.saveFrom(t.Context(), s, plain(bytes.NewReader(c.zip))))
		zip, err := s.Zip(t.Context(), testModule, testVersion)
		require.NoError(t, err)
		got, err := io.ReadAll(zip)
		require.NoError(t, err)
		require.Equal(t, c.zip, got)
		require.NoError(t, zip.Close())
		require.Equal(t, map[string]bool{"insert": true, "list": true, "start": true, "chunk": true, "patch": true, "get": true}, failed)
	})
}
