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
	for err, want := range map[error]int{
		nil:                               0,
		io.EOF:                            KindUnexpected, // another's
		notFound:                          KindNotFound,
		fmt.Errorf("stash: %w", notFound): KindNotFound,
		&Error{Kind: KindRateLimit, Err: notFound}: KindRateLimit, // of the outer of two
		errors.Join(io.EOF, notFound):              KindNotFound,
		&Error{Err: io.EOF}:                        KindUnexpected, // without a kind
	} {
		require.Equal(t, want, Kind(err), "%v", err)
		for _, kind := range []int{KindNotFound, KindBadRequest, KindUnexpected, KindAlreadyExists, KindRateLimit, KindGatewayTimeout} {
			require.Equal(t, kind == want, Is(err, kind), "%v", err)
		}
		require.False(t, Is(nil, want), "no error is of no kind")
	}
}

// The kinds are those of Athens.
func TestKindsAreAthens(t *testing.T) {
	require.Equal(t, []int{404, 400, 500, 409, 429, 504},
		[]int{KindNotFound, KindBadRequest, KindUnexpected, KindAlreadyExists, KindRateLimit, KindGatewayTimeout})
}

// asGoogle is an error as the HTTP transport returns it: a *googleapi.Error that
// wraps an *apierror.APIError, and is wrapped in turn.
func asGoogle(code int) error {
	e := &googleapi.Error{Code: code}
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
	failsWith := func(text string) error {
		return &url.Error{Op: "Post", URL: "https://storage.googleapis.com", Err: errors.New(text)}
	}
	for _, tc := range []struct {
		is   string // the only predicate that holds, if any
		kind int    // that fail makes of it
		errs []error
	}{
		{"refused", KindUnexpected, []error{asGoogle(412), asStatus(codes.FailedPrecondition), asAPI(t, codes.FailedPrecondition)}},
		{"forbidden", KindUnexpected, []error{asGoogle(403), asStatus(codes.PermissionDenied), asAPI(t, codes.PermissionDenied)}},
		{"absent", KindNotFound, []error{fmt.Errorf("reading: %w", storage.ErrObjectNotExist)}},
		{"transient", KindRateLimit, []error{asGoogle(429), asStatus(codes.ResourceExhausted), asAPI(t, codes.ResourceExhausted)}},
		{"transient", KindUnexpected, []error{
			asGoogle(408), asGoogle(409), asGoogle(500), asGoogle(503), asStatus(codes.Unavailable), asAPI(t, codes.Unavailable),
			asAPI(t, codes.Internal), asAPI(t, codes.Aborted), io.EOF, fmt.Errorf("Post: %w", io.EOF), io.ErrUnexpectedEOF,
			&net.OpError{Op: "read", Err: syscall.ECONNRESET}, errors.New("connection error: PROTOCOL_ERROR"),
			failsWith("stream error: stream ID 3; INTERNAL_ERROR; received from peer"),
			failsWith("http2: server sent GOAWAY and closed the connection; LastStreamID=1, ErrCode=NO_ERROR"),
			fmt.Errorf("half an answer: %w", json.Unmarshal([]byte("{"), new(any))),
			errors.New("something else"), context.Canceled, // by another
		}},
		{"", KindUnexpected, []error{
			asGoogle(400), asGoogle(401), asGoogle(501), asAPI(t, codes.InvalidArgument), asAPI(t, codes.Unimplemented),
			fmt.Errorf("http2: %w", asGoogle(400)), // of a proxy
		}},
	} {
		for _, cause := range tc.errs {
			t.Run(cause.Error(), func(t *testing.T) {
				for name, is := range predicates {
					require.Equal(t, name == tc.is, is(cause), name)
				}
				// The caller's context decides once it has ended.
				for _, ctx := range append(contextEnds(t.Context(), 0), contextEnd{t.Context(), tc.kind, cause}) {
					err := fail(ctx, "Save", ModuleVersion{"m", "v1.0.0"}, cause)
					requireError(t, err, ctx.kind, "gcs.Save", "m", "v1.0.0")
					require.ErrorIs(t, err, ctx.cause)
					require.ErrorIs(t, err, cause)
				}
			})
		}
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
	for kind := range 1000 {
		err := fmt.Errorf("wrapped: %w", &Error{Kind: kind, Err: storage.ErrObjectNotExist})
		require.Equal(t, kind == KindNotFound, errors.Is(err, fs.ErrNotExist))
		require.Equal(t, kind == KindAlreadyExists, errors.Is(err, fs.ErrExist))
		require.ErrorIs(t, err, storage.ErrObjectNotExist)
	}
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
