package gcs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"cloud.google.com/go/storage"
	"github.com/googleapis/gax-go/v2/apierror"
	"github.com/stretchr/testify/require"
	"google.golang.org/api/googleapi"
	"google.golang.org/api/option"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// fail returns the error of a call that failed with that cause; nil stays nil.
func fail(ctx context.Context, op string, v version, cause error) error {
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
		{"nil", nil, 0},
		{"another's", io.EOF, KindUnexpected},
		{"ours", notFound, KindNotFound},
		{"wrapped", fmt.Errorf("stash: %w", notFound), KindNotFound},
		{"the outer of two", &Error{Kind: KindRateLimit, Err: notFound}, KindRateLimit},
		{"joined", errors.Join(io.EOF, notFound), KindNotFound},
		{"without a kind", &Error{Err: io.EOF}, KindUnexpected},
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
	type predicate struct {
		name string
		is   func(error) bool
	}
	refused := predicate{"refused", isRefused}
	forbidden := predicate{"forbidden", isForbidden}
	absent := predicate{"absent", isAbsent}
	transient := predicate{"transient", isTransient}
	for _, tc := range []struct {
		name string
		err  error
		kind int // that fail makes of it
		is   []predicate
	}{
		{"HTTP 412", asGoogle(412, ""), KindUnexpected, []predicate{refused}},
		{"bare FailedPrecondition", asStatus(codes.FailedPrecondition), KindUnexpected, []predicate{refused}},
		{"FailedPrecondition", asAPI(t, codes.FailedPrecondition), KindUnexpected, []predicate{refused}},
		{"HTTP 429", asGoogle(429, ""), KindRateLimit, []predicate{transient}},
		{"bare ResourceExhausted", asStatus(codes.ResourceExhausted), KindRateLimit, []predicate{transient}},
		{"ResourceExhausted", asAPI(t, codes.ResourceExhausted), KindRateLimit, []predicate{transient}},
		{"HTTP 403", asGoogle(403, ""), KindUnexpected, []predicate{forbidden}},
		{"PermissionDenied", asAPI(t, codes.PermissionDenied), KindUnexpected, []predicate{forbidden}},
		{"bare PermissionDenied", asStatus(codes.PermissionDenied), KindUnexpected, []predicate{forbidden}},
		{"object missing", fmt.Errorf("reading: %w", storage.ErrObjectNotExist), KindNotFound, []predicate{absent}},
		{"HTTP 401", asGoogle(401, ""), KindUnexpected, nil},
		{"HTTP 400", asGoogle(400, ""), KindUnexpected, nil},
		{"InvalidArgument", asAPI(t, codes.InvalidArgument), KindUnexpected, nil},
		{"HTTP 503", asGoogle(503, ""), KindUnexpected, []predicate{transient}},
		{"HTTP 501", asGoogle(501, ""), KindUnexpected, nil},
		{"Unimplemented", asAPI(t, codes.Unimplemented), KindUnexpected, nil},
		{"HTTP 500", asGoogle(500, ""), KindUnexpected, []predicate{transient}},
		{"HTTP 408", asGoogle(408, ""), KindUnexpected, []predicate{transient}},
		{"HTTP 409", asGoogle(409, ""), KindUnexpected, []predicate{transient}},
		{"Unavailable", asAPI(t, codes.Unavailable), KindUnexpected, []predicate{transient}},
		{"bare Unavailable", asStatus(codes.Unavailable), KindUnexpected, []predicate{transient}},
		{"Internal", asAPI(t, codes.Internal), KindUnexpected, []predicate{transient}},
		{"Aborted", asAPI(t, codes.Aborted), KindUnexpected, []predicate{transient}},
		{"EOF", io.EOF, KindUnexpected, []predicate{transient}},
		{"EOF of a request", fmt.Errorf("Post: %w", io.EOF), KindUnexpected, []predicate{transient}},
		{"unexpected EOF", io.ErrUnexpectedEOF, KindUnexpected, []predicate{transient}},
		{"reset", &net.OpError{Op: "read", Err: syscall.ECONNRESET}, KindUnexpected, []predicate{transient}},
		{"half an answer", fmt.Errorf("decoding: %w", json.Unmarshal([]byte("{"), new(any))), KindUnexpected, []predicate{transient}},
		{"something else", errors.New("something else"), KindUnexpected, nil},
		{"cancelled", context.Canceled, KindUnexpected, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, p := range []predicate{refused, forbidden, absent, transient} {
				want := slices.ContainsFunc(tc.is, func(q predicate) bool { return q.name == p.name })
				require.Equal(t, want, p.is(tc.err), p.name)
			}
			err := fail(t.Context(), "Save", version{"m", "v1.0.0"}, tc.err)
			requireError(t, err, tc.kind, "gcs.Save", "m", "v1.0.0")
			require.ErrorIs(t, err, tc.err)

			// The caller's context decides once it has ended.
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			err = fail(ctx, "Save", version{"m", "v1.0.0"}, tc.err)
			requireError(t, err, KindUnexpected, "gcs.Save", "m", "v1.0.0")
			require.ErrorIs(t, err, context.Canceled)
			require.ErrorIs(t, err, tc.err)

			ctx, cancel = context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
			defer cancel()
			err = fail(ctx, "Save", version{"m", "v1.0.0"}, tc.err)
			requireError(t, err, KindGatewayTimeout, "gcs.Save", "m", "v1.0.0")
			require.ErrorIs(t, err, context.DeadlineExceeded)
			require.ErrorIs(t, err, tc.err)
		})
	}
	for _, p := range []predicate{refused, forbidden, absent, transient} {
		require.False(t, p.is(nil), p.name)
	}
	require.NoError(t, fail(t.Context(), "Save", version{}, nil))
}

// A verdict stands, whatever the context: nothing was asked of GCS, or the
// answer was there already.
func TestVerdicts(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for kind, err := range map[int]error{
		KindBadRequest:    badRequest("module", errors.New("is empty")),
		KindAlreadyExists: errExists,
		KindNotFound:      fmt.Errorf("wrapped: %w", errNothing),
	} {
		requireError(t, fail(ctx, "Save", version{"m", "v1"}, err), kind, "gcs.Save", "m", "v1")
	}
}

func TestNeeds(t *testing.T) {
	for _, err := range []error{asGoogle(403, "denied"), asStatus(codes.PermissionDenied), asAPI(t, codes.PermissionDenied)} {
		got := withPermission(err, "storage.objects.update")
		require.ErrorContains(t, got, "storage.objects.update")
		require.ErrorContains(t, got, "roles/storage.objectUser")
		require.ErrorIs(t, got, err)
		require.True(t, isForbidden(got))
	}
	for _, err := range []error{
		asGoogle(403, "Object 'm' is subject to bucket's retention policy and cannot be deleted or overwritten"),
		asGoogle(412, "denied"), asStatus(codes.NotFound), io.EOF, nil,
	} {
		require.Equal(t, err, withPermission(err, "storage.objects.update"))
	}
}

// grpcBucket is a bucket behind a gRPC server in process, which knows what to
// answer a method, or nothing of it. The messages are those of the client, which
// keeps their Go types to itself.
type grpcBucket struct {
	mu      sync.Mutex
	answers map[string]func(context.Context) (proto.Message, error)
	asked   []string
}

func newGRPCBucket(t *testing.T) (*grpcBucket, *storage.BucketHandle) {
	b := &grpcBucket{answers: map[string]func(context.Context) (proto.Message, error){}}
	listener := bufconn.Listen(1 << 20)
	server := grpc.NewServer(grpc.UnknownServiceHandler(b.serve))
	go server.Serve(listener)
	t.Cleanup(server.Stop)
	conn, err := grpc.NewClient("passthrough:///bufconn",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	require.NoError(t, err)
	client, err := storage.NewGRPCClient(context.Background(), option.WithGRPCConn(conn), option.WithoutAuthentication(), storage.WithDisabledClientMetrics())
	require.NoError(t, err)
	t.Cleanup(func() { client.Close() })
	return b, client.Bucket(fakegcs.Bucket)
}

func (b *grpcBucket) serve(_ any, stream grpc.ServerStream) error {
	method, _ := grpc.MethodFromServerStream(stream)
	method = method[strings.LastIndexByte(method, '/')+1:]
	b.mu.Lock()
	b.asked = append(b.asked, method)
	answer := b.answers[method]
	b.mu.Unlock()
	if err := stream.RecvMsg(new(emptypb.Empty)); err != nil {
		return err
	}
	if answer == nil {
		return grpcstatus.Error(codes.Unimplemented, method)
	}
	m, err := answer(stream.Context())
	if err != nil {
		return err
	}
	return stream.SendMsg(m)
}

// on sets the answer to some methods.
func (b *grpcBucket) on(answer func(context.Context) (proto.Message, error), methods ...string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, method := range methods {
		b.answers[method] = answer
	}
}

func answerCode(code codes.Code) func(context.Context) (proto.Message, error) {
	return func(context.Context) (proto.Message, error) { return nil, grpcstatus.Error(code, "as it says") }
}

func answerNever(ctx context.Context) (proto.Message, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// answerList answers with objects that were all updated long ago.
func answerList(objects map[string]map[string]string, metageneration int) func(context.Context) (proto.Message, error) {
	return func(context.Context) (proto.Message, error) {
		var list []map[string]any
		for name, metadata := range objects {
			list = append(list, map[string]any{
				"name": name, "generation": 1, "metageneration": metageneration, "metadata": metadata,
				"createTime": "2001-01-01T00:00:00Z", "updateTime": "2001-01-01T00:00:00Z",
			})
		}
		text, err := json.Marshal(map[string]any{"objects": list})
		if err != nil {
			return nil, err
		}
		kind, err := protoregistry.GlobalTypes.FindMessageByName(protoreflect.FullName("google.storage.v2.ListObjectsResponse"))
		if err != nil {
			return nil, err
		}
		m := kind.New().Interface()
		return m, protojson.Unmarshal(text, m)
	}
}

// What the client makes of the answers of a gRPC server is understood.
func TestGRPC(t *testing.T) {
	completeVersion := map[string]map[string]string{"m/@v/v1.0.0.info": nil, "m/@v/v1.0.0.mod": nil, "m/@v/v1.0.0.zip": nil}
	unfinishedVersion := map[string]map[string]string{
		"m/@v/v1.0.0.info": {keySaveID: "a"},
		"m/@v/v1.0.0.mod":  marked(givenUp, "a"),
		"m/@v/v1.0.0.zip":  {keySaveID: "a"},
	}
	reads, writes := []string{"ReadObject", "BidiReadObject"}, []string{"WriteObject", "BidiWriteObject", "StartResumableWrite"}
	run := func(name string, test func(t *testing.T, b *grpcBucket, s *Storage)) {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b, bucket := newGRPCBucket(t)
				test(t, b, newStorage(bucket))
			})
		})
	}

	run("create refused", func(t *testing.T, b *grpcBucket, s *Storage) {
		b.on(answerCode(codes.FailedPrecondition), writes...)
		b.on(answerList(completeVersion, 1), "ListObjects")
		requireError(t, saveVersion(t.Context(), s, "m", "v1.0.0"), KindAlreadyExists, "gcs.Save", "m", "v1.0.0")
		require.NotEmpty(t, slices.DeleteFunc(b.asked, func(method string) bool { return !slices.Contains(writes, method) }))
	})
	run("create not permitted", func(t *testing.T, b *grpcBucket, s *Storage) {
		b.on(answerCode(codes.PermissionDenied), writes...)
		b.on(answerList(nil, 1), "ListObjects")
		b.on(answerCode(codes.NotFound), "GetObject")
		err := saveVersion(t.Context(), s, "m", "v1.0.0")
		requireError(t, err, KindUnexpected, "gcs.Save", "m", "v1.0.0")
		require.ErrorContains(t, err, "storage.objects.create")
		require.ErrorContains(t, err, "roles/storage.objectUser")
	})
	run("missing", func(t *testing.T, b *grpcBucket, s *Storage) {
		b.on(answerCode(codes.NotFound), reads...)
		for op, read := range readers {
			_, err := read(t.Context(), s, "m", "v1.0.0")
			requireError(t, err, KindNotFound, "gcs."+op, "m", "v1.0.0")
			require.ErrorIs(t, err, storage.ErrObjectNotExist)
		}
	})
	for name, code := range map[string]codes.Code{"refused": codes.FailedPrecondition, "missing": codes.NotFound} {
		run("finished by another: "+name, func(t *testing.T, b *grpcBucket, s *Storage) {
			b.on(answerList(unfinishedVersion, 1), "ListObjects")
			b.on(func(context.Context) (proto.Message, error) {
				b.on(answerList(completeVersion, 2), "ListObjects")
				return nil, grpcstatus.Error(code, "as it says")
			}, "UpdateObject")
			ok, err := s.Exists(t.Context(), "m", "v1.0.0")
			require.NoError(t, err)
			require.True(t, ok)
		})
	}
	run("update not permitted", func(t *testing.T, b *grpcBucket, s *Storage) {
		b.on(answerList(unfinishedVersion, 1), "ListObjects")
		b.on(answerCode(codes.PermissionDenied), "UpdateObject")
		ok, err := s.Exists(t.Context(), "m", "v1.0.0")
		require.NoError(t, err)
		require.False(t, ok)
	})
	run("deleted by another", func(t *testing.T, b *grpcBucket, s *Storage) {
		b.on(answerList(completeVersion, 1), "ListObjects")
		b.on(answerCode(codes.NotFound), "DeleteObject")
		require.NoError(t, s.Delete(t.Context(), "m", "v1.0.0"))
	})
	run("list not permitted", func(t *testing.T, b *grpcBucket, s *Storage) {
		b.on(answerCode(codes.PermissionDenied), "ListObjects")
		_, err := s.List(t.Context(), "m")
		requireError(t, err, KindUnexpected, "gcs.List", "m", "")
		require.ErrorContains(t, err, "storage.objects.list")
	})
	run("rate limit", func(t *testing.T, b *grpcBucket, s *Storage) {
		b.on(answerCode(codes.ResourceExhausted), append(reads, "ListObjects")...)
		_, err := s.Exists(t.Context(), "m", "v1.0.0")
		requireError(t, err, KindRateLimit, "gcs.Exists", "m", "v1.0.0")
		_, err = s.Info(t.Context(), "m", "v1.0.0")
		requireError(t, err, KindRateLimit, "gcs.Info", "m", "v1.0.0")
	})
	run("context ends", func(t *testing.T, b *grpcBucket, s *Storage) {
		b.on(answerNever, append(append(reads, writes...), "ListObjects", "GetObject")...)
		for op, call := range map[string]func(ctx context.Context) error{
			"Exists": func(ctx context.Context) error {
				_, err := s.Exists(ctx, "m", "v1.0.0")
				return err
			},
			"Zip": func(ctx context.Context) error {
				_, err := readers["Zip"](ctx, s, "m", "v1.0.0")
				return err
			},
			"Delete": func(ctx context.Context) error { return s.Delete(ctx, "m", "v1.0.0") },
		} {
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(time.Minute, cancel)
			err := call(ctx)
			requireError(t, err, KindUnexpected, "gcs."+op, "m", "v1.0.0")
			require.ErrorIs(t, err, context.Canceled)

			ctx, cancel = context.WithTimeout(t.Context(), time.Minute)
			err = call(ctx)
			cancel()
			requireError(t, err, KindGatewayTimeout, "gcs."+op, "m", "v1.0.0")
			require.ErrorIs(t, err, context.DeadlineExceeded)
		}
	})
}
