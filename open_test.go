package gcs

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"cloud.google.com/go/storage"
	"github.com/fsouza/fake-gcs-server/fakestorage"
	"github.com/stretchr/testify/require"
	"google.golang.org/api/option"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// closable counts how often the client that it was given to was closed.
type closable struct {
	http.RoundTripper
	closed int
}

func (c *closable) CloseIdleConnections() { c.closed++ }

// opening is what Open is given to open a fake with.
func opening(f *fakeGCS) (*closable, []option.ClientOption) {
	c := &closable{RoundTripper: f.Register("opener")}
	return c, []option.ClientOption{option.WithHTTPClient(&http.Client{Transport: c}), option.WithoutAuthentication()}
}

func requireOpenError(t *testing.T, err error, kind int) {
	t.Helper()
	var e *Error
	require.ErrorAs(t, err, &e)
	require.Equal(t, Error{Op: "gcs.Open", Kind: kind, Err: e.Err}, *e)
}

// useStorage does some of everything.
func useStorage(t *testing.T, s *Storage, zipSize int) {
	t.Helper()
	c := contentOf("a", zipSize)
	require.NoError(t, c.save(t.Context(), s))
	ok, err := s.Exists(t.Context(), testModule, testVersion)
	require.NoError(t, err)
	require.True(t, ok)
	zip, err := s.Zip(t.Context(), testModule, testVersion)
	require.NoError(t, err)
	got, err := io.ReadAll(zip)
	require.NoError(t, err)
	require.NoError(t, zip.Close())
	require.True(t, bytes.Equal(c.zip, got))
	list, err := s.List(t.Context(), testModule)
	require.NoError(t, err)
	require.Equal(t, []string{testVersion}, list)
	require.NoError(t, s.Delete(t.Context(), testModule, testVersion))
}

// Over a socket, by an option and by the environment.
func TestOpenEndpoint(t *testing.T) {
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
			s, err := Open(t.Context(), fakegcs.Bucket, test.opts(t, f.listen(t))...)
			require.NoError(t, err)
			log := f.Log()
			require.Len(t, log, 1)
			require.Equal(t, "permissions", log[0].Op)
			useStorage(t, s, 2<<20)
			require.NoError(t, s.Close())
		})
	}
}

// The emulator that the fake is made of.
func TestOpenEmulator(t *testing.T) {
	server, err := fakestorage.NewServerWithOptions(fakestorage.Options{NoListener: true})
	require.NoError(t, err)
	server.CreateBucketWithOpts(fakestorage.CreateBucketOpts{Name: fakegcs.Bucket})
	opts := []option.ClientOption{option.WithHTTPClient(server.HTTPClient()), option.WithoutAuthentication()}
	start := time.Now()
	s, err := Open(t.Context(), fakegcs.Bucket, opts...)
	require.NoError(t, err)
	require.NoError(t, s.Close())
	require.Less(t, time.Since(start), 2*time.Second)
}

func TestOpenPermissions(t *testing.T) {
	for _, missing := range [][]string{
		{"storage.objects.create"},
		{"storage.objects.delete"},
		{"storage.objects.get"},
		{"storage.objects.list"},
		{"storage.objects.update"},
		{"storage.objects.delete", "storage.objects.update"}, // roles/storage.objectCreator and objectViewer hold the rest
		permissions,
		{"storage.buckets.get"}, // which is not needed
	} {
		t.Run(strings.Join(missing, " "), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeGCS(t)
				f.Deny(missing...)
				c, opts := opening(f)
				s, err := Open(t.Context(), fakegcs.Bucket, opts...)
				require.Len(t, f.Log(), 1)
				if missing[0] == "storage.buckets.get" {
					require.NoError(t, err)
					return
				}
				require.Nil(t, s)
				requireOpenError(t, err, KindUnexpected)
				for _, p := range permissions {
					if slices.Contains(missing, p) {
						require.ErrorContains(t, err, p)
					} else {
						require.NotContains(t, err.Error(), p)
					}
				}
				require.ErrorContains(t, err, "roles/storage.objectUser")
				require.ErrorContains(t, err, fakegcs.Bucket)
				require.Equal(t, 1, c.closed)
			})
		})
	}
}

func TestOpenNoBucket(t *testing.T) {
	for _, status := range []int{0, http.StatusNotFound, http.StatusNotImplemented} {
		synctest.Test(t, func(t *testing.T) {
			f := newFakeGCS(t)
			f.AnswerPermissions(status)
			c, opts := opening(f)
			s, err := Open(t.Context(), "other", opts...)
			require.Nil(t, s)
			requireOpenError(t, err, KindNotFound)
			require.ErrorIs(t, err, storage.ErrBucketNotExist)
			require.ErrorContains(t, err, "other")
			require.Equal(t, 1, c.closed)
		})
	}
}

// An emulator that does not know the question is not asked again and again.
func TestOpenWithoutPermissionCall(t *testing.T) {
	for _, status := range []int{http.StatusNotFound, http.StatusNotImplemented, http.StatusBadRequest, http.StatusMethodNotAllowed} {
		t.Run(http.StatusText(status), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeGCS(t)
				f.SetLatency(20 * time.Millisecond)
				f.AnswerPermissions(status)
				_, opts := opening(f)
				start := time.Now()
				s, err := Open(t.Context(), fakegcs.Bucket, opts...)
				require.NoError(t, err)
				require.Len(t, f.Log(), 2)
				require.Less(t, time.Since(start), time.Second)
				useStorage(t, s, 100)
			})
		})
	}
}

// The bucket that cannot be listed either is not let through, and the error is
// the answer to the question.
func TestOpenNothingPermitted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeGCS(t)
		f.AnswerPermissions(http.StatusForbidden)
		f.Deny("storage.objects.list")
		c, opts := opening(f)
		_, err := Open(t.Context(), fakegcs.Bucket, opts...)
		requireOpenError(t, err, KindUnexpected)
		require.True(t, isForbidden(err))
		require.Equal(t, 1, c.closed)
	})
}

func TestOpenFaults(t *testing.T) {
	for _, fault := range []fakegcs.Fault{fakegcs.Refused, fakegcs.LostReset, fakegcs.LostEOF, fakegcs.LostBody, fakegcs.Unavailable, fakegcs.TooMany, fakegcs.Hung} {
		t.Run(fault.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeGCS(t)
				f.fault(fault, func(r *fakegcs.Request) bool { return r.N == 0 })
				_, opts := opening(f)
				start := time.Now()
				_, err := Open(t.Context(), fakegcs.Bucket, opts...)
				require.NoError(t, err)
				require.Len(t, f.Log(), 2)
				require.Less(t, time.Since(start), requestTimeout+2*time.Second)
			})
		})
	}
}

func TestOpenContextEnds(t *testing.T) {
	for _, test := range []struct {
		name    string
		timeout time.Duration
		fault   fakegcs.Fault
		kind    int
		cause   error
	}{
		{"cancelled", 0, fakegcs.NoFault, KindUnexpected, context.Canceled},
		{"hung", 10 * time.Second, fakegcs.Hung, KindGatewayTimeout, context.DeadlineExceeded},
		{"unavailable", 10 * time.Second, fakegcs.Unavailable, KindGatewayTimeout, context.DeadlineExceeded},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeGCS(t)
				f.onRequest(func(*fakegcs.Request) fakegcs.Fault { return test.fault })
				c, opts := opening(f)
				ctx, cancel := context.WithTimeout(t.Context(), test.timeout)
				if test.timeout == 0 {
					ctx, cancel = context.WithCancel(t.Context())
					cancel()
				}
				defer cancel()
				start := time.Now()
				s, err := Open(ctx, fakegcs.Bucket, opts...)
				require.Nil(t, s)
				requireOpenError(t, err, test.kind)
				require.ErrorIs(t, err, test.cause)
				require.Equal(t, test.timeout, time.Since(start))
				require.Equal(t, 1, c.closed)
			})
		})
	}
}

// Options that no client can be made of.
func TestOpenNoClient(t *testing.T) {
	s, err := Open(t.Context(), fakegcs.Bucket, option.WithAuthCredentialsFile(option.ServiceAccount, t.TempDir()+"/missing.json"))
	require.Nil(t, s)
	requireOpenError(t, err, KindUnexpected)
}

// Close closes the client that Open made, and no other.
func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeGCS(t)
		c, opts := opening(f)
		s, err := Open(t.Context(), fakegcs.Bucket, opts...)
		require.NoError(t, err)
		require.Zero(t, c.closed)
		require.NoError(t, s.Close())
		require.Equal(t, 1, c.closed)

		client, err := storage.NewClient(t.Context(), opts...)
		require.NoError(t, err)
		defer client.Close()
		s = newStorage(client.Bucket(fakegcs.Bucket))
		require.NoError(t, s.Close())
		require.Equal(t, 1, c.closed)
		useStorage(t, s, 100)
	})
}
