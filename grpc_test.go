package gcs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// overBoth runs a test on an empty bucket over HTTP, and on another over gRPC.
func overBoth(t *testing.T, test func(t *testing.T, f *fakeGCS, s *Storage)) {
	t.Helper()
	machineOverBoth(t, func(t *testing.T, f *fakeGCS, m *fakegcs.Machine) { test(t, f, NewStorage(m.Bucket)) })
}

// machineOverBoth is overBoth for a test that wants the client.
func machineOverBoth(t *testing.T, test func(t *testing.T, f *fakeGCS, m *fakegcs.Machine)) {
	t.Helper()
	for name, connect := range map[string]func(m *fakegcs.Machine){
		"HTTP": func(m *fakegcs.Machine) { m.Connect(m) },
		"gRPC": func(m *fakegcs.Machine) { m.ConnectGRPC() },
	} {
		run(t, name, withStorage, func(t *testing.T, f *fakeGCS, _ *Storage) {
			m := f.Register("m")
			connect(m)
			test(t, f, m)
		})
	}
}

// A version that somebody else finishes, or deletes and saves again, at the very
// moment is complete all the same.
func TestRefusedOverBoth(t *testing.T) {
	v := ModuleVersion{"m", "v1.0.0"}
	mod := v.object(extMod)
	for name, hooks := range map[string]func(f *fakeGCS){
		"finished by another": func(f *fakeGCS) { f.before(on("", "patch", ""), func() { f.SetMetadata(mod, nil) }) },
		"saved anew by another": func(f *fakeGCS) {
			f.before(on("", "patch", ""), func() { f.Remove(mod) })
			f.after(on("", "patch", ""), func() { f.Put(mod, nil, nil) })
		},
	} {
		run(t, name, overBoth, func(t *testing.T, f *fakeGCS, s *Storage) {
			unfinishedVersion(f, v)
			hooks(f)
			returns(t, true)(s.Exists(t.Context(), "m", "v1.0.0"))
		})
	}
	run(t, "deleted by another", overBoth, func(t *testing.T, f *fakeGCS, s *Storage) {
		storeVersion(f, "m", "v1.0.0")
		f.onRequest(func(r *fakegcs.Request) fakegcs.Fault {
			if r.Op == "delete" {
				f.Remove(r.Object)
			}
			return fakegcs.NoFault
		})
		require.NoError(t, s.Delete(t.Context(), "m", "v1.0.0"))
		require.Empty(t, f.Names())
	})
}

// A refused permission is named, with the role that holds it.
func TestForbiddenOverBoth(t *testing.T) {
	overBoth(t, func(t *testing.T, f *fakeGCS, s *Storage) {
		storeVersion(f, "m", "v1.0.0")
		unfinishedVersion(f, ModuleVersion{"m", "v2.0.0"})
		for permission, call := range map[string]func() error{
			"storage.objects.create": func() error { return saveVersion(t.Context(), s, "m", "v3.0.0") },
			"storage.objects.delete": func() error { return s.Delete(t.Context(), "m", "v1.0.0") },
			"storage.objects.get":    func() error { _, err := s.Info(t.Context(), "m", "v1.0.0"); return err },
			"storage.objects.update": func() error { _, err := s.Repair(t.Context(), "m", "v2.0.0"); return err },
			"storage.objects.list": func() error {
				ok, err := s.Exists(t.Context(), "m", "v1.0.0")
				require.False(t, ok)
				versions, listErr := s.List(t.Context(), "m")
				require.Nil(t, versions)
				return errors.Join(err, listErr)
			},
		} {
			f.Deny(permission)
			err := call()
			require.True(t, Is(err, KindUnexpected), "%s: %v", permission, err)
			require.ErrorContains(t, err, permission)
			require.ErrorContains(t, err, "roles/storage.objectUser")

			err = s.Check(t.Context())
			requireError(t, err, KindUnexpected, "gcs.Check", "", "")
			require.ErrorContains(t, err, permission)
			f.Allow(permission)
		}
		require.NoError(t, s.Check(t.Context()))

		f.Deny("storage.objects.update")
		ok, err := s.Exists(t.Context(), "m", "v2.0.0")
		require.NoError(t, err)
		require.False(t, ok, "to a caller who may not finish it, it does not exist yet")
	})
}

// The error of a call that reads says which call of what version it was, and what
// went wrong.
func TestReadErrors(t *testing.T) {
	for op, test := range map[string]struct {
		on         ModuleVersion
		permission string
	}{
		"Exists":  {ModuleVersion{"m", "v1.0.0"}, "storage.objects.list"},
		"Info":    {ModuleVersion{"m", "v1.0.0"}, "storage.objects.get"},
		"GoMod":   {ModuleVersion{"m", "v1.0.0"}, "storage.objects.get"},
		"Zip":     {ModuleVersion{"m", "v1.0.0"}, "storage.objects.get"},
		"List":    {ModuleVersion{"m", ""}, "storage.objects.list"},
		"Catalog": {ModuleVersion{}, "storage.objects.list"},
	} {
		run(t, op, overBoth, func(t *testing.T, f *fakeGCS, s *Storage) {
			storeVersion(f, "m", "v1.0.0")
			call := callsOn(s, ModuleVersion{"m", "v1.0.0"})[op]
			fails := func(ctx context.Context, kind int) error {
				err := call(ctx)
				requireError(t, err, kind, "gcs."+op, test.on.Module, test.on.Version)
				return err
			}
			require.ErrorIs(t, fails(contextEnds(t.Context(), 0)[0], KindUnexpected), context.Canceled)
			for _, fault := range []fakegcs.Fault{fakegcs.Hung, fakegcs.Unavailable} {
				f.fault(fault, on("", "", ""))
				require.ErrorIs(t, fails(within(t, time.Minute), KindGatewayTimeout), context.DeadlineExceeded)
			}
			f.onRequest(nil)
			f.Deny(test.permission)
			err := fails(t.Context(), KindUnexpected)
			require.ErrorContains(t, err, test.permission)
			require.ErrorContains(t, err, "roles/storage.objectUser")
			requireNothingInFlight(t, f)
		})
	}
}

// A rate limit that outlasts the retries is one; other answers that outlast them
// are unexpected.
func TestAnswersOverBoth(t *testing.T) {
	for fault, kind := range map[fakegcs.Fault]int{fakegcs.TooMany: KindRateLimit, fakegcs.Unavailable: KindUnexpected} {
		run(t, fault.String(), overBoth, func(t *testing.T, f *fakeGCS, s *Storage) {
			storeVersion(f, "m", "v1.0.0")
			f.fault(fault, on("", "", ""))
			for op, call := range callsOn(s, ModuleVersion{"m", "v1.0.0"}) {
				err := call(t.Context())
				require.Error(t, err, op)
				require.Equal(t, kind, Kind(err), "%s: %v", op, err)
			}
		})
	}
}

// A fault that passes is not noticed.
func TestPassingFaultsOverBoth(t *testing.T) {
	for _, fault := range []fakegcs.Fault{
		fakegcs.TooMany, fakegcs.Unavailable, fakegcs.ConnectionRefused, fakegcs.LostReset, fakegcs.LostEOF, fakegcs.LostBody, fakegcs.Hung, fakegcs.HungApplied,
	} {
		run(t, fault.String(), overBoth, func(t *testing.T, f *fakeGCS, s *Storage) {
			for n := 0; n <= len(f.Log()); n++ { // with no fault at last
				f.ResetLog()
				f.onRequest(nil)
				f.fault(fault, func(r *fakegcs.Request) bool { return r.N == n })
				vers := fmt.Sprintf("v1.%d.0", n)
				require.NoError(t, saveVersion(t.Context(), s, "m", vers), "request %d: %v", n, f.Log())
				returns(t, true)(s.Exists(t.Context(), "m", vers))
			}
		})
	}
}

// The end of a context is told from a failure of the server.
func TestContextEndsOverBoth(t *testing.T) {
	overBoth(t, func(t *testing.T, f *fakeGCS, s *Storage) {
		storeVersion(f, "m", "v1.0.0")
		f.fault(fakegcs.Hung, on("", "", ""))
		for op, call := range callsOn(s, ModuleVersion{"m", "v1.0.0"}) {
			for i := range 2 {
				ctx := contextEnds(t.Context(), time.Minute)[i]
				err := call(ctx)
				require.Equal(t, ctx.kind, Kind(err), "%s: %v", op, err)
				require.ErrorIs(t, err, ctx.cause, op)
			}
		}
	})
}

// Nothing is stored of a zip that cannot be read to its end, and no empty object
// either when its second pass cannot begin.
func TestBrokenZipOverBoth(t *testing.T) {
	overBoth(t, func(t *testing.T, f *fakeGCS, s *Storage) {
		s.bucket.chunkSize = 256 << 10
		for range 30 {
			zip := io.MultiReader(bytes.NewReader(make([]byte, 1<<20+600<<10)), iotest.ErrReader(io.ErrUnexpectedEOF))
			err := s.Save(t.Context(), testModule, testVersion, nil, zip, nil, nil)
			require.ErrorIs(t, err, io.ErrUnexpectedEOF)
			synctest.Wait()
			require.True(t, f.Get(objectName(extZip)) == nil, "a part is there")
		}
	})
}

// A gRPC server that answers DEADLINE_EXCEEDED at once is asked again after a pause.
func TestDeadlineExceededAtOnce(t *testing.T) {
	withStorage(t, func(t *testing.T, _ *fakeGCS, s *Storage) {
		calls := 0
		start := time.Now()
		_ = s.bucket.do(t.Context(), "", requestTimeout, func(ctx context.Context) error {
			if calls++; calls == 200 {
				return nil
			}
			return status.Error(codes.DeadlineExceeded, "the backend took too long")
		})
		require.Less(t, calls, 200, "%d requests in %v", calls, time.Since(start))
	})
}

// An answer that comes together with the deadline is no reason to hide it.
func TestAnswerAtTheDeadline(t *testing.T) {
	for range 30 {
		inCrowd(t, func(t *testing.T, f *fakeGCS) {
			f.fault(fakegcs.Unavailable, on("", "", ""))
			_, err := f.storage("m").Exists(within(t, 20*time.Millisecond), testModule, testVersion)
			requireKind(t, err, KindGatewayTimeout)
		})
	}
}
