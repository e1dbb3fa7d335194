package gcs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
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
	mod := objectName(extMod)
	for name, hooks := range map[string]func(f *fakeGCS){
		"finished by another": func(f *fakeGCS) { f.before(on("", "patch", ""), func() { f.SetMetadata(mod, nil) }) },
		"saved anew by another": func(f *fakeGCS) {
			f.before(on("", "patch", ""), func() { f.Remove(mod) })
			f.after(on("", "patch", ""), func() { f.Put(mod, nil, nil) })
		},
	} {
		run(t, name, overBoth, func(t *testing.T, f *fakeGCS, s *Storage) {
			unfinishedVersion(f, testVersionName)
			hooks(f)
			requireExists(t, s, testVersion, true)
		})
	}
	run(t, "deleted by another", overBoth, func(t *testing.T, f *fakeGCS, s *Storage) {
		storeVersion(f, testModule, testVersion)
		for _, ext := range allExts {
			f.before(on("", "delete", ext), func() { f.Remove(objectName(ext)) })
		}
		require.NoError(t, s.Delete(t.Context(), testModule, testVersion))
		require.Empty(t, f.Names())
	})
}

// The error of a call that the caller may not make says which call of what version it was,
// and names the permission, with the role that holds it. So does Check. The permissions that
// Athens' own documentation suggests do not suffice to commit.
func TestForbiddenOverBoth(t *testing.T) {
	whole, unfinished := testVersionName, ModuleVersion{testModule, "v2.0.0"}
	overBoth(t, func(t *testing.T, f *fakeGCS, s *Storage) {
		storeVersion(f, testModule, testVersion)
		unfinishedVersion(f, unfinished)
		for _, test := range []struct {
			permission, op string
			of             ModuleVersion
		}{
			{"storage.objects.create", "Save", ModuleVersion{testModule, "v3.0.0"}},
			{"storage.objects.update", "Save", ModuleVersion{testModule, "v4.0.0"}},
			{"storage.objects.list", "Save", unfinished},
			{"storage.objects.delete", "Delete", whole},
			{"storage.objects.get", "Info", whole},
			{"storage.objects.get", "GoMod", whole},
			{"storage.objects.get", "Zip", whole},
			{"storage.objects.update", "Repair", unfinished},
			{"storage.objects.list", "Exists", whole},
			{"storage.objects.list", "List", ModuleVersion{testModule, ""}},
			{"storage.objects.list", "Catalog", ModuleVersion{}},
		} {
			f.Deny(test.permission)
			of := test.of
			if of.Version == "" {
				of = whole
			}
			err := callsOn(s, of)[test.op](t.Context())
			requireError(t, err, KindUnexpected, "gcs."+test.op, test.of.Module, test.of.Version)
			require.ErrorContains(t, err, test.permission)
			require.ErrorContains(t, err, "roles/storage.objectUser")

			err = s.Check(t.Context())
			requireError(t, err, KindUnexpected, "gcs.Check", "", "")
			require.ErrorContains(t, err, test.permission)
			f.Allow(test.permission)
		}
		require.NoError(t, s.Check(t.Context()))

		f.Deny("storage.objects.update")
		requireExists(t, s, "v2.0.0", false) // yet, to a caller who may not finish it
		f.Deny("storage.objects.list")
		versions, err := s.List(t.Context(), testModule)
		require.Error(t, err)
		require.Nil(t, versions)
	})
}

// The end of a context is told from a failure of the server. A rate limit that outlasts the
// retries is one; other answers that outlast them are unexpected. The error says which call
// of what version it was.
func TestErrorsOverBoth(t *testing.T) {
	t.Parallel()
	about := map[string]ModuleVersion{"List": {testModule, ""}, "Scan": {testModule, ""}, "Catalog": {}, "Scan all": {}, "Check": {}}
	for op := range everyCall(nil) {
		of, ok := about[op]
		if !ok {
			of = testVersionName
		}
		run(t, op, overBoth, func(t *testing.T, f *fakeGCS, s *Storage) {
			storeVersion(f, testModule, testVersion)
			var longer time.Duration
			if op == "Save" || op == "Stash" { // it gives up what it holds
				longer = releaseTimeout
			}
			fails := func(ctx context.Context, fault fakegcs.Fault, takes time.Duration, kind int, cause error) {
				f.onRequest(nil)
				f.fault(fault, on("", "", ""))
				start := time.Now()
				err := everyCall(s)[op](ctx)
				require.LessOrEqual(t, time.Since(start), takes+longer, fault)
				requireError(t, err, kind, "gcs."+strings.TrimSuffix(op, " all"), of.Module, of.Version)
				require.True(t, cause == nil || errors.Is(err, cause), "%v", err)
			}
			ended := contextEnds(t.Context(), 0)[0]
			fails(ended, fakegcs.NoFault, 0, ended.kind, ended.cause)
			for _, fault := range []fakegcs.Fault{fakegcs.Hung, fakegcs.Unavailable} {
				for i := range 2 {
					ctx := contextEnds(t.Context(), time.Minute)[i]
					fails(ctx, fault, time.Minute, ctx.kind, ctx.cause)
				}
			}
			fails(t.Context(), fakegcs.TooMany, retryLimit, KindRateLimit, nil)
			for _, fault := range some(fakegcs.Unavailable, fakegcs.ConnectionRefused, fakegcs.LostEOF, fakegcs.Hung) {
				fails(t.Context(), fault, retryLimit, KindUnexpected, nil)
			}
			synctest.Wait()
			requireNothingInFlight(t, f)
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
				require.NoError(t, saveVersion(t.Context(), s, testModule, vers), "request %d: %v", n, f.Log())
				requireExists(t, s, vers, true)
			}
		})
	}
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
