package gcs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/url"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"cloud.google.com/go/storage"
	"github.com/googleapis/gax-go/v2/apierror"
	"github.com/stretchr/testify/require"
	"google.golang.org/api/googleapi"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// fail returns the error of a call that failed with that cause; nil stays nil.
func fail(ctx context.Context, op string, v ModuleVersion, cause error) error {
	s := &Storage{wrap: func(e *Error) error { return e }}
	return s.wrapError(ctx, op, v, cause)
}

func TestErrorString(t *testing.T) {
	cause := errors.New("cause")
	for want, e := range map[string]Error{
		"gcs.Save: m@v1.0.0: cause": {Op: "gcs.Save", Kind: KindUnexpected, Module: "m", Version: "v1.0.0", Err: cause},
		"gcs.List: m: cause":        {Op: "gcs.List", Kind: KindUnexpected, Module: "m", Err: cause},
		"gcs.Catalog: cause":        {Op: "gcs.Catalog", Kind: KindUnexpected, Err: cause},
	} {
		require.EqualError(t, &e, want)
		require.ErrorIs(t, &e, cause)
		require.Equal(t, cause, errors.Unwrap(&e))
	}
}

func TestKind(t *testing.T) {
	notFound := &Error{Op: "gcs.Info", Kind: KindNotFound, Err: storage.ErrObjectNotExist}
	for _, tc := range []struct {
		name string
		err  error
		kind int
	}{
		{"nil", nil, 0}, {"another's", io.EOF, KindUnexpected}, {"ours", notFound, KindNotFound},
		{"wrapped", fmt.Errorf("stash: %w", notFound), KindNotFound},
		{"the outer of two", &Error{Kind: KindRateLimit, Err: notFound}, KindRateLimit},
		{"joined", errors.Join(io.EOF, notFound), KindNotFound}, {"without a kind", &Error{Err: io.EOF}, KindUnexpected},
	} {
		t.Run(tc.name, func(t *testing.T) {
			require.Equal(t, tc.kind, Kind(tc.err))
			for _, kind := range []int{KindNotFound, KindBadRequest, KindUnexpected, KindAlreadyExists, KindRateLimit, KindGatewayTimeout} {
				require.Equal(t, kind == tc.kind, Is(tc.err, kind))
			}
			require.False(t, Is(nil, tc.kind), "no error is of no kind")
		})
	}
}

// The kinds are those of Athens.
func TestKindsAreAthens(t *testing.T) {
	require.Equal(t, []int{404, 400, 500, 409, 429, 504},
		[]int{KindNotFound, KindBadRequest, KindUnexpected, KindAlreadyExists, KindRateLimit, KindGatewayTimeout})
}

// asGoogle is an error as the HTTP transport returns it: a *googleapi.Error that
// wraps an *apierror.APIError, and is wrapped in turn.
func asGoogle(code int, message string) error {
	e := &googleapi.Error{Code: code, Message: message}
	if inner, ok := apierror.ParseError(e, false); ok {
		e.Wrap(inner)
	}
	return fmt.Errorf("storage: %w", e)
}

// asStatus is an error as Writer.Close returns it over gRPC.
func asStatus(code codes.Code) error { return grpcstatus.Error(code, "as it says") }

// asAPI is an error as Update and Delete return it over gRPC.
func asAPI(t *testing.T, code codes.Code) error {
	e, ok := apierror.FromError(asStatus(code))
	require.True(t, ok)
	return fmt.Errorf("storage: %w", e)
}

func TestErrorsOfBothTransports(t *testing.T) {
	predicates := map[string]func(error) bool{
		"refused": isPreconditionFailed, "forbidden": isForbidden, "absent": isAbsent, "transient": func(err error) bool { return retryReason(err) != "" },
	}
	for _, tc := range []struct {
		name string
		err  error
		kind int    // that fail makes of it
		is   string // the only predicate that holds, if any
	}{
		{"HTTP 412", asGoogle(412, ""), KindUnexpected, "refused"},
		{"bare FailedPrecondition", asStatus(codes.FailedPrecondition), KindUnexpected, "refused"},
		{"FailedPrecondition", asAPI(t, codes.FailedPrecondition), KindUnexpected, "refused"},
		{"HTTP 429", asGoogle(429, ""), KindRateLimit, "transient"},
		{"bare ResourceExhausted", asStatus(codes.ResourceExhausted), KindRateLimit, "transient"},
		{"ResourceExhausted", asAPI(t, codes.ResourceExhausted), KindRateLimit, "transient"},
		{"HTTP 403", asGoogle(403, ""), KindUnexpected, "forbidden"},
		{"PermissionDenied", asAPI(t, codes.PermissionDenied), KindUnexpected, "forbidden"},
		{"bare PermissionDenied", asStatus(codes.PermissionDenied), KindUnexpected, "forbidden"},
		{"object missing", fmt.Errorf("reading: %w", storage.ErrObjectNotExist), KindNotFound, "absent"},
		{"HTTP 401", asGoogle(401, ""), KindUnexpected, ""}, {"HTTP 400", asGoogle(400, ""), KindUnexpected, ""},
		{"InvalidArgument", asAPI(t, codes.InvalidArgument), KindUnexpected, ""},
		{"HTTP 503", asGoogle(503, ""), KindUnexpected, "transient"}, {"HTTP 501", asGoogle(501, ""), KindUnexpected, ""},
		{"Unimplemented", asAPI(t, codes.Unimplemented), KindUnexpected, ""},
		{"HTTP 500", asGoogle(500, ""), KindUnexpected, "transient"},
		{"HTTP 408", asGoogle(408, ""), KindUnexpected, "transient"},
		{"HTTP 409", asGoogle(409, ""), KindUnexpected, "transient"},
		{"Unavailable", asAPI(t, codes.Unavailable), KindUnexpected, "transient"},
		{"bare Unavailable", asStatus(codes.Unavailable), KindUnexpected, "transient"},
		{"Internal", asAPI(t, codes.Internal), KindUnexpected, "transient"},
		{"Aborted", asAPI(t, codes.Aborted), KindUnexpected, "transient"}, {"EOF", io.EOF, KindUnexpected, "transient"},
		{"EOF of a request", fmt.Errorf("Post: %w", io.EOF), KindUnexpected, "transient"},
		{"unexpected EOF", io.ErrUnexpectedEOF, KindUnexpected, "transient"},
		{"reset", &net.OpError{Op: "read", Err: syscall.ECONNRESET}, KindUnexpected, "transient"},
		{"HTTP/2 stream reset", &url.Error{Op: "Post", URL: "https://storage.googleapis.com", Err: errors.New("stream error: stream ID 3; INTERNAL_ERROR; received from peer")}, KindUnexpected, "transient"},
		{"HTTP/2 GOAWAY", &url.Error{Op: "Get", URL: "https://storage.googleapis.com", Err: errors.New("http2: server sent GOAWAY and closed the connection; LastStreamID=1, ErrCode=NO_ERROR")}, KindUnexpected, "transient"},
		{"HTTP/2 connection", errors.New("connection error: PROTOCOL_ERROR"), KindUnexpected, "transient"},
		{"HTTP 400 of a proxy", asGoogle(400, "http2: no"), KindUnexpected, ""},
		{"half an answer", fmt.Errorf("decoding: %w", json.Unmarshal([]byte("{"), new(any))), KindUnexpected, "transient"},
		{"something else", errors.New("something else"), KindUnexpected, "transient"},
		{"cancelled by another", context.Canceled, KindUnexpected, "transient"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for name, is := range predicates {
				require.Equal(t, name == tc.is, is(tc.err), name)
			}
			// The caller's context decides once it has ended.
			for _, ctx := range append(contextEnds(t.Context(), 0), contextEnd{t.Context(), tc.kind, tc.err}) {
				err := fail(ctx, "Save", ModuleVersion{"m", "v1.0.0"}, tc.err)
				requireError(t, err, ctx.kind, "gcs.Save", "m", "v1.0.0")
				require.ErrorIs(t, err, ctx.cause)
				require.ErrorIs(t, err, tc.err)
			}
		})
	}
	for name, is := range predicates {
		require.False(t, is(nil), name)
	}
	require.NoError(t, fail(t.Context(), "Save", ModuleVersion{}, nil))
}

// A verdict stands, whatever the context: nothing was asked of GCS, or the
// answer was there already.
func TestVerdicts(t *testing.T) {
	ctx := contextEnds(t.Context(), 0)[0]
	for kind, err := range map[int]error{
		KindBadRequest:    badRequest("module", errors.New("is empty")),
		KindAlreadyExists: errExists,
		KindNotFound:      fmt.Errorf("wrapped: %w", errNothing),
	} {
		requireError(t, fail(ctx, "Save", ModuleVersion{"m", "v1"}, err), kind, "gcs.Save", "m", "v1")
	}
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
		err := call(contextEnds(t.Context(), 0)[0])
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
		f.fault(fakegcs.TooMany, on("", "list", ""))
		f.fault(fakegcs.Hung, on("", "get", ""))
		f.fault(fakegcs.LostBody, first(1, on("", "get", "")))
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
