package gcs

import (
	"context"
	"fmt"
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

func TestCheckPermissions(t *testing.T) {
	forEach(t, inCrowd, [][]string{
		{"storage.objects.create"}, {"storage.objects.delete"}, {"storage.objects.get"}, {"storage.objects.list"}, {"storage.objects.update"},
		{"storage.objects.delete", "storage.objects.update"}, // roles/storage.objectCreator and objectViewer hold the rest
		required,
		{"storage.buckets.get"}, // which is not needed
	}, func(t *testing.T, f *fakeGCS, missing []string) {
		f.Deny(missing...)
		err := f.storage("a").Check(t.Context())
		require.Len(t, f.Log(), 1)
		if missing[0] == "storage.buckets.get" {
			require.NoError(t, err)
			return
		}
		requireError(t, err, KindUnexpected, "gcs.Check", "", "")
		for _, p := range required {
			require.Equal(t, slices.Contains(missing, p), strings.Contains(err.Error(), p), "%s: %v", p, err)
		}
		require.ErrorContains(t, err, "roles/storage.objectUser")
		require.ErrorContains(t, err, fakegcs.Bucket)
	})
}

func TestCheckNoBucket(t *testing.T) {
	forEach(t, inCrowd, []int{0, http.StatusNotFound, http.StatusNotImplemented}, func(t *testing.T, f *fakeGCS, status int) {
		f.AnswerPermissions(status)
		err := NewStorage(f.Machine("a").Client.Bucket("other")).Check(t.Context())
		requireError(t, err, KindNotFound, "gcs.Check", "", "")
		require.ErrorIs(t, err, storage.ErrBucketNotExist)
		require.ErrorContains(t, err, "other")
	})
}

// An emulator that does not know the question is not asked again and again.
func TestCheckWithoutPermissionCall(t *testing.T) {
	forEach(t, inCrowd, []int{http.StatusNotFound, http.StatusNotImplemented}, func(t *testing.T, f *fakeGCS, status int) {
		f.AnswerPermissions(status)
		start := time.Now()
		require.NoError(t, f.storage("a").Check(t.Context()))
		require.Len(t, f.Log(), 2)
		require.Less(t, time.Since(start), time.Second)
	})
}

// The bucket that cannot be listed either is not let through, and the error is
// the answer to the question.
func TestCheckNothingPermitted(t *testing.T) {
	// A service perimeter forbids the question, and a caller without credentials is not known.
	forEach(t, inCrowd, []int{http.StatusForbidden, http.StatusUnauthorized}, func(t *testing.T, f *fakeGCS, status int) {
		f.AnswerPermissions(status)
		err := f.storage("a").Check(t.Context())
		requireError(t, err, KindUnexpected, "gcs.Check", "", "")
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
	for _, fault := range []fakegcs.Fault{fakegcs.ConnectionRefused, fakegcs.LostEOF, fakegcs.Unavailable, fakegcs.TooMany, fakegcs.Hung} {
		run(t, fault.String(), overBoth, func(t *testing.T, f *fakeGCS, s *Storage) {
			f.fault(fault, on("", "", ""))
			start := time.Now()
			require.Error(t, s.Check(t.Context()))
			require.Less(t, time.Since(start), retryLimit+time.Minute)
		})
	}
}

func TestCheckContextEnds(t *testing.T) {
	const wait = 10 * time.Second
	forEach(t, inCrowd, []fakegcs.Fault{fakegcs.Hung, fakegcs.Unavailable}, func(t *testing.T, f *fakeGCS, fault fakegcs.Fault) {
		f.fault(fault, on("", "", ""))
		start, s := time.Now(), f.storage("a")
		err := s.Check(within(t, wait))
		requireError(t, err, KindGatewayTimeout, "gcs.Check", "", "")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Equal(t, wait, time.Since(start))
	})
}

// The client finds an emulator by an option or by its environment.
func TestCheckEndpoint(t *testing.T) {
	for _, environment := range []bool{false, true} {
		t.Run(fmt.Sprint("environment ", environment), func(t *testing.T) {
			f := newFakeGCS(t)
			endpoint := f.listen(t)
			opts := []option.ClientOption{option.WithEndpoint(endpoint + "/storage/v1/"), option.WithoutAuthentication()}
			if environment {
				t.Setenv("STORAGE_EMULATOR_HOST", endpoint)
				opts = nil
			}
			client, err := storage.NewClient(t.Context(), opts...)
			require.NoError(t, err)
			defer client.Close()
			s := NewStorage(client.Bucket(fakegcs.Bucket))
			require.NoError(t, s.Check(t.Context()))
			require.Equal(t, []string{"permissions"}, logged(f))

			c := contentOf("a", 2<<20)
			require.NoError(t, c.save(t.Context(), s))
			requireExists(t, s, testVersion, true)
			got, err := readers["Zip"](t.Context(), s, testModule, testVersion)
			require.NoError(t, err)
			require.True(t, got == string(c.zip))
			requireList(t, s, testModule, testVersion)
			require.NoError(t, s.Delete(t.Context(), testModule, testVersion))
		})
	}
}
