package gcs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

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
		for _, file := range []string{"/bucket.go:", "/send.go:", "/upload.go:", "/source.go:", "/lease.go:", "/saver.go:"} {
			require.NotContains(t, goroutine, file)
		}
	}
}

// trickle is an endless reader, which pauses before each byte.
func trickle(pause time.Duration) readFunc {
	return func([]byte) (int, error) {
		time.Sleep(pause)
		return 1, nil
	}
}

// A save looks at its context between reads, and ends when a reader makes no progress.
func TestSaveOfEndlessReader(t *testing.T) {
	for name, test := range map[string]struct {
		read  readFunc
		kind  int
		cause error
	}{
		"slow":             {trickle(100 * time.Millisecond), KindGatewayTimeout, context.DeadlineExceeded},
		"without progress": {func([]byte) (int, error) { return 0, nil }, KindUnexpected, io.ErrNoProgress},
	} {
		for head, size := range heads {
			run(t, name+" "+head, inCrowd, func(t *testing.T, f *fakeGCS) {
				start := time.Now()
				s := f.storage("a", WithChunkSize(faultChunk))
				err := contentOf("a", 0).saveFrom(within(t, 5*time.Second), s, behindHead(size, test.read))
				requireKind(t, err, test.kind)
				require.ErrorIs(t, err, test.cause)
				require.Less(t, time.Since(start), 5500*time.Millisecond)
				requireNothingRunning(t)
				requireSavableAtOnce(t, f)
			})
		}
	}
}

func TestSaveOfReader(t *testing.T) {
	// A reader that returns nothing now and then makes progress.
	run(t, "hesitant", inCrowd, func(t *testing.T, f *fakeGCS) {
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

	// A reader that is slow when a zip is sent for the second time is no hang.
	run(t, "slow in its second pass", inCrowd, func(t *testing.T, f *fakeGCS) {
		a := contentOf("a", 3*faultChunk-1)
		f.fault(fakegcs.Hung, first(1, on("", "start", "")))
		slow := &slowZip{bytes.NewReader(a.zip), 0}
		zip := &rewound{slow, func() error { slow.takes = 2 * time.Minute; return nil }}
		require.NoError(t, a.saveFrom(t.Context(), f.storage("a", WithChunkSize(faultChunk)), zip))
		require.Equal(t, 2, f.count(on("", "start", "")))
		requireStored(t, f, a)
	})
}

// A reader that panics, or ends its goroutine, does so in the caller's. The save
// leaves nothing behind, and does not wait for the .info, which hangs.
func TestSaveOfPanickingReader(t *testing.T) {
	for how, stop := range map[string]func(){"panic": func() { panic("broken") }, "Goexit": runtime.Goexit} {
		for name, size := range heads {
			run(t, how+" "+name, inCrowd, func(t *testing.T, f *fakeGCS) {
				f.fault(fakegcs.Hung, on("", "insert", extInfo))
				w := watch(t)
				zip := behindHead(size, func([]byte) (int, error) {
					time.Sleep(100 * time.Millisecond) // the .info is on its way
					stop()
					return 0, io.EOF
				})
				start, returned := time.Now(), false
				var recovered any
				alongside(func() {
					defer func() { recovered = recover() }()
					// The context does not end, and stops nothing that is left.
					s := f.storage("a", WithChunkSize(faultChunk))
					_ = s.Save(context.Background(), testModule, testVersion, nil, zip, nil, nil)
					returned = true
				})()
				require.False(t, returned)
				require.Equal(t, map[string]float64{outcomeFailed: 1}, w.saves())
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

// A rewound zip calls again before it is read again.
type rewound struct {
	io.ReadSeeker
	again func() error
}

func (z *rewound) Seek(offset int64, whence int) (int64, error) {
	if whence == io.SeekStart {
		if err := z.again(); err != nil {
			return 0, err
		}
	}
	return z.ReadSeeker.Seek(offset, whence)
}

// A large zip that is refused, and cannot be read again, tells why.
func TestCannotSeek(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		f.Put(objectName(extZip), nil, nil)
		cause := errors.New("stale file handle")
		a := contentOf("a", 2<<20)
		err := a.saveFrom(t.Context(), f.storage("a", WithChunkSize(256<<10)), &rewound{bytes.NewReader(a.zip), func() error { return cause }})
		requireKind(t, err, KindUnexpected)
		require.ErrorIs(t, err, errCannotReread)
		require.ErrorIs(t, err, cause)
	})
}

// The first pass over a zip arrives while the second is under way. It is whole, so
// the save is done with it, and does not write over it: somebody may have finished
// the version.
func TestOwnZipIsNotReplaced(t *testing.T) {
	type testCase struct{ refused, finished bool }
	forEach(t, inCrowd, []testCase{{true, true}, {false, true}, {true, false}, {false, false}}, func(t *testing.T, f *fakeGCS, c testCase) {
		a, other := contentOf("a", 3*faultChunk-1), contentOf("x", 3*faultChunk-1)
		var generation int64
		arrive := func() {
			f.Land()
			generation = f.Get(objectName(extZip)).Generation
			if c.finished {
				requireExists(t, ahead(f, "e"), testVersion, true)
			}
		}
		passes := onPasses(f, func(pass, chunk int) fakegcs.Fault {
			switch at := [2]int{pass, chunk}; {
			case at == [2]int{1, 3}:
				return fakegcs.Stray
			case at == [2]int{2, 0} && c.refused:
				arrive()
				return fakegcs.PreconditionFailed
			case at == [2]int{2, 2}:
				arrive()
				return fakegcs.Hung
			case chunk > 2:
				return fakegcs.Hung
			}
			return fakegcs.NoFault
		})
		zip := &rewound{ReadSeeker: bytes.NewReader(a.zip)}
		zip.again = func() error { zip.ReadSeeker = bytes.NewReader(other.zip); return nil }
		s := f.storage("a", WithChunkSize(faultChunk))
		require.NoError(t, s.Save(t.Context(), testModule, testVersion, a.mod, zip, nil, a.info))
		require.Equal(t, 2, *passes)
		requireStored(t, f, a)
		require.Equal(t, generation, f.Get(objectName(extZip)).Generation)
	})
}

// onPasses gives a fault to each request of machine a that sends a zip in chunks, by how
// many passes over the zip have begun, and how many requests this one has made, 0 at its start.
func onPasses(f *fakeGCS, fault func(pass, chunk int) fakegcs.Fault) (passes *int) {
	pass, chunk := 0, 0
	f.onRequest(func(r *fakegcs.Request) fakegcs.Fault {
		switch {
		case r.Machine == "a" && r.Op == "start":
			pass, chunk = pass+1, 0
		case r.Machine == "a" && (r.Op == "chunk" || r.Op == "query"):
			chunk++
		default:
			return fakegcs.NoFault
		}
		return fault(pass, chunk)
	})
	return &pass
}

// An object of this save that is not whole is left as it is, whatever the reason,
// and the version is given up.
func TestOwnObjectCutShort(t *testing.T) {
	forEach(t, inCrowd, []string{extInfo, extZip}, func(t *testing.T, f *fakeGCS, ext string) {
		f.fault(fakegcs.PreconditionFailed, func(r *fakegcs.Request) bool {
			uploads := on("", "insert", ext)(r)
			if uploads {
				f.Put(objectName(ext), []byte("half"), r.Metadata)
			}
			return uploads
		})
		err := contentOf("a", 100).save(t.Context(), f.storage("a"))
		requireKind(t, err, KindUnexpected)
		require.ErrorIs(t, err, errTruncated)
		require.Equal(t, "half", string(f.Get(objectName(ext)).Data))
		requireSavableAtOnce(t, f)
	})
}

// The session of an upload in chunks can be lost. The upload is made again.
func TestUploadSessionGone(t *testing.T) {
	lost := []fakegcs.Fault{fakegcs.SessionNotFound, fakegcs.SessionGone}
	forEach(t, inCrowd, lost, func(t *testing.T, f *fakeGCS, fault fakegcs.Fault) {
		a, s := contentOf("a", 3<<20), f.storage("a", WithChunkSize(faultChunk))
		f.fault(fault, first(1, on("", "chunk", "")))
		requireKind(t, a.saveFrom(t.Context(), s, plain(bytes.NewReader(a.zip))), KindUnexpected)
		leave(f, nil, extZip) // and is over the same leftover
		time.Sleep(time.Second)
		f.fault(fault, first(1, on("", "chunk", "")))
		require.NoError(t, a.save(t.Context(), s))
		requireStored(t, f, a)
	})
}

// An upload in chunks.
func TestUpload(t *testing.T) {
	// A 400 that does not speak of the MD5 is not the fault of the zip.
	run(t, "bad request of another reason", inCrowd, func(t *testing.T, f *fakeGCS) {
		s := behind(f, func(r *http.Request) *http.Response {
			if r.URL.Query().Get("uploadType") != "resumable" {
				return nil
			}
			return answer(http.StatusBadRequest, "Bucket is a requester pays bucket but no user project provided.")
		}, WithChunkSize(faultChunk))
		requireKind(t, contentOf("a", 3<<20).save(t.Context(), s), KindUnexpected)
	})

	// The second pass over a zip is whole by its own size, also when the first broke off.
	run(t, "is whole by its second pass", inCrowd, func(t *testing.T, f *fakeGCS) {
		passes := onPasses(f, func(pass, chunk int) fakegcs.Fault {
			switch {
			case pass == 3 && chunk == 0:
				f.Land()
				return fakegcs.PreconditionFailed
			case pass == 2 && chunk == 3:
				return fakegcs.Stray
			case pass == 1 && chunk > 1, chunk > 3:
				return fakegcs.Hung
			}
			return fakegcs.NoFault
		})
		a := contentOf("a", 3*faultChunk-1)
		require.NoError(t, a.save(t.Context(), f.storage("a", WithChunkSize(faultChunk))))
		require.Equal(t, 3, *passes)
		requireStored(t, f, a)
	})
}

// What GCS refuses again and again, or never answers, ends a save that has no deadline after
// some minutes, and the kind says why.
func TestSaveRetriesEnd(t *testing.T) {
	t.Parallel()
	for _, at := range []string{"list", "insert", "patch", "start", "chunk", "start once", "chunk once"} {
		for fault, kind := range map[fakegcs.Fault]int{fakegcs.TooMany: KindRateLimit, fakegcs.Unavailable: KindUnexpected, fakegcs.Hung: KindUnexpected} {
			op, once, _ := strings.Cut(at, " ")
			large := op == "start" || op == "chunk"
			if large && (fault == fakegcs.Unavailable || testing.Short()) {
				continue // as TooMany
			}
			run(t, fmt.Sprint(at, " ", fault), inBubble, func(t *testing.T, f *fakeGCS) {
				storeFiles(f, testModule, testVersion, extMod)
				time.Sleep(time.Second)
				f.fault(fault, on("", op, ""))
				size, chunk, limit := 100, defaultChunkSize, 3*retryLimit
				if large {
					size, limit = 17<<20, 2*retryLimit
				}
				zip := io.Reader(bytes.NewReader(make([]byte, size)))
				if once != "" {
					zip, chunk = plain(zip), faultChunk
				}
				s, start := f.storage("a", WithChunkSize(chunk)), time.Now()
				requireKind(t, s.Save(t.Context(), testModule, testVersion, nil, zip, nil, nil), kind)
				require.Less(t, time.Since(start), limit)
			})
		}
	}
}

// A line that carries 222 KiB a second is fast enough for chunks of 16 MiB, and one of
// 24 KiB a second for the smallest.
func TestSlowLine(t *testing.T) {
	for chunk, enough := range map[int]int{defaultChunkSize: 222, 256 << 10: 24} {
		forEach(t, inCrowd, []int{enough, enough - 1}, func(t *testing.T, f *fakeGCS, rate int) {
			thinLine := func(r *http.Request) (*http.Response, error) {
				return nil, sleep(r.Context(), time.Duration(max(r.ContentLength, 0))*time.Second/time.Duration(rate<<10))
			}
			a := contentOf("a", chunk+100)
			err := a.saveFrom(t.Context(), f.on(thinLine, WithChunkSize(chunk)), plain(bytes.NewReader(a.zip)))
			if rate == enough {
				require.NoError(t, err)
			} else {
				require.ErrorIs(t, err, errBrokenOff)
			}
		})
	}
}
