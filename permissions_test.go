package gcs

import (
	"errors"
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

// A server that does not know the question is asked once to list instead. An answer that
// refuses the question, as that of a service perimeter, is the error.
func TestCheckAnswers(t *testing.T) {
	type answered struct {
		bucket                 string
		status, kind, requests int
	}
	forEach(t, inCrowd, []answered{
		{fakegcs.Bucket, http.StatusNotFound, 0, 2}, {fakegcs.Bucket, http.StatusNotImplemented, 0, 2},
		{fakegcs.Bucket, http.StatusForbidden, KindUnexpected, 1}, {fakegcs.Bucket, http.StatusUnauthorized, KindUnexpected, 1},
		{"other", 0, KindNotFound, 2}, {"other", http.StatusNotFound, KindNotFound, 2}, {"other", http.StatusNotImplemented, KindNotFound, 2},
	}, func(t *testing.T, f *fakeGCS, c answered) {
		f.AnswerPermissions(c.status)
		start := time.Now()
		err := NewStorage(f.Machine("a").Client.Bucket(c.bucket)).Check(t.Context())
		require.Less(t, time.Since(start), time.Second)
		require.Len(t, f.Log(), c.requests)
		if c.kind == 0 {
			require.NoError(t, err)
			return
		}
		requireError(t, err, c.kind, "gcs.Check", "", "")
		require.ErrorContains(t, err, c.bucket)
		require.Equal(t, c.kind == KindNotFound, errors.Is(err, storage.ErrBucketNotExist))
		require.Equal(t, c.kind == KindUnexpected, hasCode(err, c.status, 0) && c.bucket == fakegcs.Bucket)
	})
}

func TestCheckFaults(t *testing.T) {
	faults := []fakegcs.Fault{fakegcs.ConnectionRefused, fakegcs.LostReset, fakegcs.LostEOF, fakegcs.LostBody, fakegcs.Unavailable, fakegcs.TooMany, fakegcs.Hung}
	forEach(t, inCrowd, faults, func(t *testing.T, f *fakeGCS, fault fakegcs.Fault) {
		f.fault(fault, func(r *fakegcs.Request) bool { return r.N == 0 })
		require.NoError(t, f.storage("a").Check(within(t, requestTimeout+2*time.Second)))
		require.Len(t, f.Log(), 2)
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
