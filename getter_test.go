package gcs

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"cloud.google.com/go/storage"
	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

func TestReads(t *testing.T) {
	run(t, "all", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		require.NoError(t, s.Save(t.Context(), "m", "v1.0.0", []byte("the mod"), strings.NewReader("the zip"), nil, []byte("the info")))

		f.ResetLog()
		returns(t, []byte("the info"))(s.Info(t.Context(), "m", "v1.0.0"))
		returns(t, []byte("the mod"))(s.GoMod(t.Context(), "m", "v1.0.0"))
		zip, err := s.Zip(t.Context(), "m", "v1.0.0")
		require.NoError(t, err)
		require.EqualValues(t, len("the zip"), zip.Size())
		require.NoError(t, iotest.TestReader(zip, []byte("the zip")))
		require.EqualValues(t, len("the zip"), zip.Size(), "of the object, not of what is left of it")
		require.NoError(t, zip.Close())

		var objects []string
		for _, r := range f.Log() {
			objects = append(objects, r.Op+" "+r.Object)
		}
		require.Equal(t, []string{"get m/@v/v1.0.0.info", "get m/@v/v1.0.0.mod", "get m/@v/v1.0.0.zip"}, objects)
		requireNothingInFlight(t, f)
	})

	run(t, "empty files", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		require.NoError(t, s.Save(t.Context(), "m", "v1.0.0", nil, strings.NewReader(""), nil, nil))
		for _, read := range readers {
			returns(t, "")(read(t.Context(), s, "m", "v1.0.0"))
		}
		zip, err := s.Zip(t.Context(), "m", "v1.0.0")
		require.NoError(t, err)
		require.Zero(t, zip.Size())
		require.NoError(t, zip.Close())
	})

	// A missing bucket holds no object.
	run(t, "missing bucket", withStorage, func(t *testing.T, f *fakeGCS, _ *Storage) {
		s := NewStorage(f.Machine("lost").Client.Bucket("other"))
		_, err := s.Info(t.Context(), "m", "v1.0.0")
		requireError(t, err, KindNotFound, "gcs.Info", "m", "v1.0.0")
	})
}

// readers are the methods that read an object, as far as to its last byte.
var readers = map[string]func(ctx context.Context, s *Storage, module, vers string) (string, error){
	"Info":  reading((*Storage).Info),
	"GoMod": reading((*Storage).GoMod),
	"Zip": func(ctx context.Context, s *Storage, module, vers string) (string, error) {
		r, err := s.Zip(ctx, module, vers)
		if err != nil {
			if r != nil {
				panic("an interface that holds nothing must be nil")
			}
			return "", err
		}
		b, err := io.ReadAll(r)
		return string(b), errors.Join(err, r.Close())
	},
}

func reading(method func(*Storage, context.Context, string, string) ([]byte, error)) func(context.Context, *Storage, string, string) (string, error) {
	return func(ctx context.Context, s *Storage, module, vers string) (string, error) {
		b, err := method(s, ctx, module, vers)
		return string(b), err
	}
}

// forReaders runs a test for each of the readers.
func forReaders(t *testing.T, test func(t *testing.T, f *fakeGCS, s *Storage, op string)) {
	for op := range readers {
		run(t, op, withStorage, func(t *testing.T, f *fakeGCS, s *Storage) { test(t, f, s, op) })
	}
}

var extOf = map[string]string{"Info": extInfo, "GoMod": extMod, "Zip": extZip}

// One object can be missing while the other two are there.
func TestReadMissing(t *testing.T) {
	forReaders(t, func(t *testing.T, f *fakeGCS, s *Storage, op string) {
		storeVersion(f, "m", "v1.0.0", "v1.0.0-rc.1")
		storeVersion(f, "m/v2", "v1.0.0")
		f.Remove("m/@v/v1.0.0." + extOf[op])
		for other := range readers {
			if content, err := readers[other](t.Context(), s, "m", "v1.0.0"); other == op {
				requireError(t, err, KindNotFound, "gcs."+op, "m", "v1.0.0")
				require.ErrorIs(t, err, storage.ErrObjectNotExist)
			} else {
				returns(t, string(contentOf("v1.0.0", 100).file(extOf[other])))(content, err)
			}
		}
		require.Len(t, f.Log(), 3)
	})
}

// What goes wrong once is not the caller's concern.
func TestReadFaults(t *testing.T) {
	for _, fault := range []fakegcs.Fault{fakegcs.ConnectionRefused, fakegcs.LostReset, fakegcs.LostEOF, fakegcs.LostBody, fakegcs.Unavailable, fakegcs.TooMany, fakegcs.Hung} {
		t.Run(fault.String(), func(t *testing.T) {
			forReaders(t, func(t *testing.T, f *fakeGCS, s *Storage, op string) {
				if fault == fakegcs.Hung && op == "Zip" {
					t.Skip("only Info and GoMod ask again when there is no answer")
				}
				storeVersion(f, "m", "v1.0.0")
				f.fault(fault, func(r *fakegcs.Request) bool { return r.N == 0 })
				returns(t, string(contentOf("v1.0.0", 100).file(extOf[op])))(readers[op](within(t, time.Minute), s, "m", "v1.0.0"))
				require.Len(t, f.Log(), 2)
			})
		})
	}
}

func bigZip() []byte {
	b := make([]byte, 1<<20)
	for i := range b {
		b[i] = byte(i ^ i>>8 ^ i>>16)
	}
	return b
}

// breakFirst breaks the first answer off in the middle, and does something before
// the next request.
func breakFirst(f *fakeGCS, before func()) {
	f.fault(fakegcs.LostBody, nth("m", 0))
	f.before(nth("m", 1), before)
}

func TestZip(t *testing.T) {
	// A stream that breaks goes on where it was.
	run(t, "breaks", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		want := bigZip()
		f.Put("m/@v/v1.0.0.zip", want, nil)
		breakFirst(f, func() {})
		r, err := s.Zip(t.Context(), "m", "v1.0.0")
		require.NoError(t, err)
		require.EqualValues(t, len(want), r.Size())
		got, err := io.ReadAll(r)
		require.NoError(t, err)
		require.True(t, bytes.Equal(want, got))
		require.NoError(t, r.Close())
		log := f.Log()
		require.Len(t, log, 2)
		require.Less(t, log[1].Received, int64(len(want)), "the rest is enough")
		requireNothingInFlight(t, f)
	})

	// A caller may stop in the middle of a zip.
	run(t, "closed early", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		f.Put("m/@v/v1.0.0.zip", bigZip(), nil)
		r, err := s.Zip(t.Context(), "m", "v1.0.0")
		require.NoError(t, err)
		_, err = io.ReadFull(r, make([]byte, 10))
		require.NoError(t, err)
		require.NoError(t, r.Close())
		requireNothingInFlight(t, f)
	})
}

// A stream that cannot go on ends with an error, and not with the bytes of
// another object.
func TestZipBreaksForGood(t *testing.T) {
	const name = "m/@v/v1.0.0.zip"
	for _, tc := range []struct {
		name   string
		before func(f *fakeGCS, cancel func())
		is     error
	}{
		{"replaced", func(f *fakeGCS, _ func()) { f.Put(name, make([]byte, 1<<20), nil) }, storage.ErrObjectNotExist},
		{"deleted", func(f *fakeGCS, _ func()) { f.Remove(name) }, storage.ErrObjectNotExist},
		{"not permitted", func(f *fakeGCS, _ func()) { f.Deny("storage.objects.get") }, nil},
		{"cancelled", func(_ *fakeGCS, cancel func()) { cancel() }, context.Canceled},
	} {
		run(t, tc.name, withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
			want := bigZip()
			f.Put(name, want, nil)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			f.fault(fakegcs.Unavailable, nth("m", 1)) // when the client asks for the rest itself
			breakFirst(f, func() { tc.before(f, cancel) })
			r, err := s.Zip(ctx, "m", "v1.0.0")
			require.NoError(t, err)
			got, err := io.ReadAll(r)
			requireError(t, err, Kind(err), "gcs.Zip", "m", "v1.0.0")
			if tc.is != nil {
				require.ErrorIs(t, err, tc.is)
			}
			require.True(t, bytes.HasPrefix(want, got))
			if err := r.Close(); err != nil {
				requireError(t, err, Kind(err), "gcs.Zip", "m", "v1.0.0")
			}
		})
	}
}

// A zip stream that breaks is asked for again for some minutes, and not for ever.
func TestZipBreaksWithoutEnd(t *testing.T) {
	forEach(t, inCrowd, []fakegcs.Fault{fakegcs.Unavailable, fakegcs.Hung}, func(t *testing.T, f *fakeGCS, then fakegcs.Fault) {
		f.Put(objectName(extZip), make([]byte, 1<<20), nil)
		f.fault(then, on("a", "", ""))
		f.fault(fakegcs.LostBody, nth("a", 0))
		r, err := f.storage("a").Zip(within(t, 24*time.Hour), testModule, testVersion)
		require.NoError(t, err)
		time.Sleep(time.Hour) // who reads may take his time
		start := time.Now()
		_, err = io.ReadAll(r)
		requireError(t, err, KindUnexpected, "gcs.Zip", testModule, testVersion)
		r.Close()
		require.Less(t, time.Since(start), 2*retryLimit)
	})
}
