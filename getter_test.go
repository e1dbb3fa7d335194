package gcs

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"testing/iotest"
	"time"

	"cloud.google.com/go/storage"
	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

func TestReads(t *testing.T) {
	run(t, "all", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		a := contentOf("a", 100)
		require.NoError(t, a.save(t.Context(), s))
		f.ResetLog()
		returns(t, a.info)(s.Info(t.Context(), testModule, testVersion))
		returns(t, a.mod)(s.GoMod(t.Context(), testModule, testVersion))
		zip, err := s.Zip(t.Context(), testModule, testVersion)
		require.NoError(t, err)
		require.EqualValues(t, 100, zip.Size())
		require.NoError(t, iotest.TestReader(zip, a.zip))
		require.EqualValues(t, 100, zip.Size(), "of the object, not of what is left of it")
		require.NoError(t, zip.Close())
		require.Equal(t, []string{"get", "get", "get"}, logged(f))
		requireNothingInFlight(t, f)
	})

	run(t, "empty files", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		require.NoError(t, content{}.save(t.Context(), s))
		for _, read := range readers {
			returns(t, "")(read(t.Context(), s, testModule, testVersion))
		}
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

// asStored is what is read of a version that storeVersion stored.
func asStored(op, vers string) string { return string(contentOf(vers, 100).file(extOf[op])) }

// One object can be missing while the other two are there.
func TestReadMissing(t *testing.T) {
	forReaders(t, func(t *testing.T, f *fakeGCS, s *Storage, op string) {
		storeVersion(f, testModule, testVersion, testVersion+"-rc.1")
		storeVersion(f, testModule+"/v2", testVersion)
		f.Remove(objectName(extOf[op]))
		for other := range readers {
			if content, err := readers[other](t.Context(), s, testModule, testVersion); other == op {
				requireError(t, err, KindNotFound, "gcs."+op, testModule, testVersion)
				require.ErrorIs(t, err, storage.ErrObjectNotExist)
			} else {
				returns(t, asStored(other, testVersion))(content, err)
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
				storeVersion(f, testModule, testVersion)
				f.fault(fault, nth("m", 0))
				returns(t, asStored(op, testVersion))(readers[op](within(t, time.Minute), s, testModule, testVersion))
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

func TestZip(t *testing.T) {
	// A stream that breaks goes on where it was.
	run(t, "breaks", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		want := bigZip()
		f.Put(objectName(extZip), want, nil)
		f.fault(fakegcs.LostBody, nth("m", 0))
		got, err := readers["Zip"](t.Context(), s, testModule, testVersion)
		require.NoError(t, err)
		require.True(t, got == string(want))
		require.Len(t, f.Log(), 2)
		require.Less(t, f.Log()[1].Received, int64(len(want)), "the rest is enough")
		requireNothingInFlight(t, f)
	})

	// A caller may stop in the middle of a zip.
	run(t, "closed early", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		f.Put(objectName(extZip), bigZip(), nil)
		r, err := s.Zip(t.Context(), testModule, testVersion)
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
	name := objectName(extZip)
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
			f.fault(fakegcs.LostBody, nth("m", 0))
			f.fault(fakegcs.Unavailable, nth("m", 1)) // when the client asks for the rest itself
			f.before(nth("m", 1), func() { tc.before(f, cancel) })
			r, err := s.Zip(ctx, testModule, testVersion)
			require.NoError(t, err)
			got, err := io.ReadAll(r)
			requireError(t, err, Kind(err), "gcs.Zip", testModule, testVersion)
			if tc.is != nil {
				require.ErrorIs(t, err, tc.is)
			}
			require.True(t, bytes.HasPrefix(want, got))
			require.Equal(t, err, r.Close())
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
