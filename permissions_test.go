package gcs

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"cloud.google.com/go/storage"
	"github.com/stretchr/testify/require"
	"google.golang.org/api/option"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

func requireCheckError(t *testing.T, err error, kind int) {
	t.Helper()
	var e *Error
	require.ErrorAs(t, err, &e)
	require.Equal(t, Error{Op: "gcs.Check", Kind: kind, Err: e.Err}, *e)
}

// useStorage does some of everything.
func useStorage(t *testing.T, s *Storage, zipSize int) {
	t.Helper()
	c := contentOf("a", zipSize)
	require.NoError(t, c.save(t.Context(), s))
	requireExists(t, s, testVersion, true)
	returns(t, string(c.zip))(readers["Zip"](t.Context(), s, testModule, testVersion))
	requireList(t, s, testModule, testVersion)
	require.NoError(t, s.Delete(t.Context(), testModule, testVersion))
}

func TestCheckPermissions(t *testing.T) {
	for _, missing := range [][]string{
		{"storage.objects.create"},
		{"storage.objects.delete"},
		{"storage.objects.get"},
		{"storage.objects.list"},
		{"storage.objects.update"},
		{"storage.objects.delete", "storage.objects.update"}, // roles/storage.objectCreator and objectViewer hold the rest
		required,
		{"storage.buckets.get"}, // which is not needed
	} {
		t.Run(strings.Join(missing, " "), func(t *testing.T) {
			bubble(t, 0, func(t *testing.T, f *fakeGCS) {
				f.Deny(missing...)
				err := f.storage("a").Check(t.Context())
				require.Len(t, f.Log(), 1)
				if missing[0] == "storage.buckets.get" {
					require.NoError(t, err)
					return
				}
				requireCheckError(t, err, KindUnexpected)
				for _, p := range required {
					if slices.Contains(missing, p) {
						require.ErrorContains(t, err, p)
					} else {
						require.NotContains(t, err.Error(), p)
					}
				}
				require.ErrorContains(t, err, "roles/storage.objectUser")
				require.ErrorContains(t, err, fakegcs.Bucket)
			})
		})
	}
}

func TestCheckNoBucket(t *testing.T) {
	for _, status := range []int{0, http.StatusNotFound, http.StatusNotImplemented} {
		bubble(t, 0, func(t *testing.T, f *fakeGCS) {
			f.AnswerPermissions(status)
			err := NewStorage(f.Machine("a").Client.Bucket("other")).Check(t.Context())
			requireCheckError(t, err, KindNotFound)
			require.ErrorIs(t, err, storage.ErrBucketNotExist)
			require.ErrorContains(t, err, "other")
		})
	}
}

// An emulator that does not know the question is not asked again and again.
func TestCheckWithoutPermissionCall(t *testing.T) {
	for _, status := range []int{http.StatusNotFound, http.StatusNotImplemented} {
		run(t, http.StatusText(status), inCrowd, func(t *testing.T, f *fakeGCS) {
			f.AnswerPermissions(status)
			start := time.Now()
			s := f.storage("a")
			require.NoError(t, s.Check(t.Context()))
			require.Len(t, f.Log(), 2)
			require.Less(t, time.Since(start), time.Second)
			useStorage(t, s, 100)
		})
	}
}

// The bucket that cannot be listed either is not let through, and the error is
// the answer to the question.
func TestCheckNothingPermitted(t *testing.T) {
	// A service perimeter forbids the question, and a caller without credentials is not known.
	forEach(t, inCrowd, []int{http.StatusForbidden, http.StatusUnauthorized}, func(t *testing.T, f *fakeGCS, status int) {
		f.AnswerPermissions(status)
		err := f.storage("a").Check(t.Context())
		requireCheckError(t, err, KindUnexpected)
		require.True(t, hasCode(err, status, 0))
		require.Len(t, f.Log(), 1, "a list would say nothing of the permissions")
	})
}

func TestCheckFaults(t *testing.T) {
	faults := []fakegcs.Fault{fakegcs.ConnectionRefused, fakegcs.LostReset, fakegcs.LostEOF, fakegcs.LostBody, fakegcs.Unavailable, fakegcs.TooMany, fakegcs.Hung}
	forEach(t, inCrowd, faults, func(t *testing.T, f *fakeGCS, fault fakegcs.Fault) {
		f.fault(fault, func(r *fakegcs.Request) bool { return r.N == 0 })
		start := time.Now()
		require.NoError(t, f.storage("a").Check(t.Context()))
		require.Len(t, f.Log(), 2)
		require.Less(t, time.Since(start), requestTimeout+2*time.Second)
	})
}

// A bucket that cannot be reached is asked one question, for as long as any other.
func TestCheckUnreachable(t *testing.T) {
	faults := []fakegcs.Fault{fakegcs.ConnectionRefused, fakegcs.LostEOF, fakegcs.Unavailable, fakegcs.TooMany, fakegcs.Hung}
	for _, fault := range faults {
		run(t, fault.String(), overBoth, func(t *testing.T, f *fakeGCS, s *Storage) {
			f.onRequest(func(*fakegcs.Request) fakegcs.Fault { return fault })
			start := time.Now()
			require.Error(t, s.Check(t.Context()))
			require.Less(t, time.Since(start), retryLimit+time.Minute)
		})
	}
}

func TestCheckContextEnds(t *testing.T) {
	type testCase struct {
		timeout time.Duration
		fault   fakegcs.Fault
		kind    int
		cause   error
	}
	forNamed(t, inCrowd, map[string]testCase{
		"cancelled":   {0, fakegcs.NoFault, KindUnexpected, context.Canceled},
		"hung":        {10 * time.Second, fakegcs.Hung, KindGatewayTimeout, context.DeadlineExceeded},
		"unavailable": {10 * time.Second, fakegcs.Unavailable, KindGatewayTimeout, context.DeadlineExceeded},
	}, func(t *testing.T, f *fakeGCS, test testCase) {
		f.onRequest(func(*fakegcs.Request) fakegcs.Fault { return test.fault })
		ctx, cancel := context.WithTimeout(t.Context(), test.timeout)
		if test.timeout == 0 {
			ctx, cancel = context.WithCancel(t.Context())
			cancel()
		}
		defer cancel()
		start := time.Now()
		err := f.storage("a").Check(ctx)
		requireCheckError(t, err, test.kind)
		require.ErrorIs(t, err, test.cause)
		require.Equal(t, test.timeout, time.Since(start))
	})
}

// The client finds an emulator by an option or by its environment.
func TestCheckEndpoint(t *testing.T) {
	for _, test := range []struct {
		name string
		opts func(t *testing.T, endpoint string) []option.ClientOption
	}{
		{"option", func(t *testing.T, endpoint string) []option.ClientOption {
			return []option.ClientOption{option.WithEndpoint(endpoint + "/storage/v1/"), option.WithoutAuthentication()}
		}},
		{"environment", func(t *testing.T, endpoint string) []option.ClientOption {
			t.Setenv("STORAGE_EMULATOR_HOST", endpoint)
			return nil
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := newFakeGCS(t)
			client, err := storage.NewClient(t.Context(), test.opts(t, f.listen(t))...)
			require.NoError(t, err)
			defer client.Close()
			s := NewStorage(client.Bucket(fakegcs.Bucket))
			require.NoError(t, s.Check(t.Context()))
			log := f.Log()
			require.Len(t, log, 1)
			require.Equal(t, "permissions", log[0].Op)
			useStorage(t, s, 2<<20)
		})
	}
}
