package gcs

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"cloud.google.com/go/auth"
	"cloud.google.com/go/compute/metadata"
	"cloud.google.com/go/storage"
	"github.com/googleapis/gax-go/v2"
	"github.com/stretchr/testify/require"
	"golang.org/x/oauth2"
	"google.golang.org/api/googleapi"
	"google.golang.org/api/option"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// An insistent bucket makes a request again after every failure that may have another
// reason than the object, as long as its context lasts.
func TestInsistent(t *testing.T) {
	v := ModuleVersion{testModule, testVersion}
	for name, test := range map[string]struct {
		code    int // 0 is no answer
		message string
		again   bool
	}{
		"400":          {400, "no", true},
		"401":          {401, "no", true},
		"403":          {403, "no", true},
		"501":          {501, "no", true},
		"no bucket":    {404, "The specified bucket does not exist.", true},
		"unknown":      {0, "unknown", true},
		"no object":    {404, "No such object: modules/m", false},
		"precondition": {412, "conditionNotMet", false},
	} {
		run(t, name, withStorage, func(t *testing.T, f *fakeGCS, _ *Storage) {
			storeVersion(f, testModule, testVersion)
			start := time.Now()
			b := f.on(func(*http.Request) (*http.Response, error) {
				switch {
				case time.Since(start) >= 3*time.Second:
					return nil, nil
				case test.code == 0:
					return nil, errors.New(test.message)
				}
				return answer(test.code, test.message), nil
			}).bucket.insistent()
			attrs, err := b.attrs(within(t, 15*time.Second), v, extMod)
			require.Equal(t, test.again, attrs != nil, "%v", err)
			require.Equal(t, test.again, time.Since(start) >= 3*time.Second)

			start = time.Now()
			if _, err = b.attrs(within(t, time.Second), v, extMod); test.again {
				require.ErrorIs(t, err, context.DeadlineExceeded)
			}
		})
	}
}

// overGRPC returns a Storage whose calls over gRPC meet what fails returns, and whose
// client has these options.
func (f *fakeGCS) overGRPC(t *testing.T, fails func() error, opts ...grpc.DialOption) *Storage {
	m := f.Register("wire")
	listener, server := bufconn.Listen(1<<20), m.GRPCServer()
	go server.Serve(listener)
	t.Cleanup(server.Stop)
	return overConn(t, "passthrough:///fakegcs", append(opts,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }),
		grpc.WithUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			if err := fails(); err != nil {
				return err
			}
			return invoker(ctx, method, req, reply, cc, opts...)
		}),
		grpc.WithStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			if err := fails(); err != nil {
				return nil, err
			}
			return streamer(ctx, desc, cc, method, opts...)
		}))...)
}

// overConn returns a Storage on a connection of gRPC.
func overConn(t *testing.T, target string, opts ...grpc.DialOption) *Storage {
	conn, err := grpc.NewClient(target, opts...)
	require.NoError(t, err)
	return storageOf(t)(storage.NewGRPCClient(t.Context(), option.WithGRPCConn(conn), option.WithoutAuthentication(), storage.WithDisabledClientMetrics()))
}

// storageOf returns a Storage for a client, which it closes when the test ends.
func storageOf(t *testing.T) func(client *storage.Client, err error) *Storage {
	return func(client *storage.Client, err error) *Storage {
		require.NoError(t, err)
		t.Cleanup(func() { client.Close() })
		return NewStorage(client.Bucket(fakegcs.Bucket), WithChunkSize(faultChunk))
	}
}

func dialing(errno syscall.Errno) error {
	return &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", errno)}
}

func fetchingToken(err error) error { return fmt.Errorf("credentials: cannot fetch token: %w", err) }

// An outage is an error, and the reason for which the request is made again.
type outage struct {
	err    error
	reason string
}

// outages are what requests meet, over HTTP, when the network is down, or a token
// cannot be fetched.
var outages = map[string]outage{
	"unknown":            {errors.New("what nobody has met"), "network"},
	"no route":           {dialing(syscall.EHOSTUNREACH), "network"},
	"net unreachable":    {dialing(syscall.ENETUNREACH), "network"},
	"no address":         {dialing(syscall.EADDRNOTAVAIL), "network"},
	"refused":            {dialing(syscall.ECONNREFUSED), "network"},
	"no such host":       {&net.OpError{Op: "dial", Err: &net.DNSError{Err: "no such host", Name: "storage.googleapis.com", IsNotFound: true}}, "network"},
	"idle connection":    {errors.New("http: server closed idle connection"), "network"},
	"HTTP/2":             {errors.New("http2: client connection lost"), "network"},
	"EOF":                {io.EOF, "network"},
	"metadata 404":       {fetchingToken(metadata.NotDefinedError("instance/service-accounts/default/token")), "token"},
	"metadata 429":       {fetchingToken(&metadata.Error{Code: 429}), "token"},
	"metadata 503":       {fetchingToken(&metadata.Error{Code: 503}), "token"},
	"issuer unreachable": {fmt.Errorf("auth: cannot fetch token: %w", dialing(syscall.EHOSTUNREACH)), "token"},
	"issuer 503":         {errors.New("credentials: status code 503: x509: the proxy was answered with status code 403"), "token"},
	"downscoping":        {errors.New("downscope: unable to exchange token, 500: {}"), "token"},
	"issuer 502":         {&auth.Error{Response: &http.Response{StatusCode: 502}}, "token"},
	"issuer 500":         {&oauth2.RetrieveError{Response: &http.Response{StatusCode: 500, Status: "500 oh"}}, "token"},
}

// grpcOutages are the same over gRPC, where only texts are left of the errors.
var grpcOutages = map[string]outage{
	"unknown":     {errors.New("what nobody has met"), "network"},
	"no route":    {status.Error(codes.Unavailable, `connection error: desc = "transport: Error while dialing: dial tcp: connect: no route to host"`), "network"},
	"token":       {status.Error(codes.Unauthenticated, "transport: per-RPC creds failed due to error: "+fetchingToken(&metadata.Error{Code: 503}).Error()), "token"},
	"cancelled":   {status.Error(codes.Canceled, "stream terminated by RST_STREAM with error code: CANCEL"), "network"},
	"security":    {status.Error(codes.PermissionDenied, "stream terminated by RST_STREAM with error code: INADEQUATE_SECURITY"), "network"},
	"unknown 500": {status.Error(codes.Unknown, "oh"), "5xx"},
	"proxy 502":   {status.Error(codes.Unavailable, "unexpected HTTP status code received from server: 502 (Bad Gateway)"), "network"},
}

// outageCalls are those that an outage interrupts, beside everyCall: all succeed.
func outageCalls(s *Storage) map[string]func(context.Context) error {
	calls, large := everyCall(s), contentOf("a", 3*faultChunk-1)
	calls["Save in chunks"] = func(ctx context.Context) error { return large.saveFrom(ctx, s, plain(bytes.NewReader(large.zip))) }
	calls["Save over leftovers"] = calls["Save"]
	calls["Save complete"] = func(ctx context.Context) error {
		if err := calls["Save"](ctx); !Is(err, KindAlreadyExists) {
			return fmt.Errorf("not complete: %w", err)
		}
		return nil
	}
	calls["Stash new"] = func(ctx context.Context) error {
		next := func(ctx context.Context, _, vers string) (string, error) { return vers, calls["Save"](ctx) }
		_, err := s.SingleFlight(stashFunc(next)).Stash(ctx, testModule, testVersion)
		return err
	}
	return calls
}

// prepareOutage puts into the bucket what one of the outageCalls expects there.
func prepareOutage(f *fakeGCS, name string) {
	switch name {
	case "Save", "Save in chunks", "Stash new":
	case "Save over leftovers":
		f.put(testVersionName, marked(givenUp, "old"), map[string]string{keySaveID: "old"}, extMod, extZip)
	case "Repair":
		unfinishedVersion(f, testVersionName)
	default:
		storeVersion(f, testModule, testVersion)
	}
}

// playOutage makes a call, whose n-th request and all others within that time fail with err.
// It reports whether the call makes so many.
func playOutage(t *testing.T, name string, err error, n int64, lasts time.Duration, overGRPC bool) (met bool) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		prepareOutage(f, name)
		if name == "Zip" {
			f.fault(fakegcs.LostBody, first(1, on("", "", ""))) // in the middle of the stream
		}
		var requests, until atomic.Int64
		fails := func() error {
			if requests.Add(1) == n {
				until.Store(time.Now().Add(lasts).UnixNano())
			}
			if time.Now().UnixNano() < until.Load() {
				return err
			}
			return nil
		}
		s := f.on(func(*http.Request) (*http.Response, error) { return nil, fails() }, WithChunkSize(faultChunk))
		if overGRPC {
			s = f.overGRPC(t, fails)
		}
		start := time.Now()
		require.NoError(t, outageCalls(s)[name](t.Context()), "%s, down for %v at request %d: %v", name, lasts, n, err)
		if met = requests.Load() >= n; met {
			// The client waits for up to twice as long before it sends a chunk again.
			require.Less(t, time.Since(start), 2*lasts+30*time.Second, "%s, down for %v at request %d: %v", name, lasts, n, err)
		}
	})
	return met
}

// Whatever fails requests for some seconds, from whichever request of whichever call on,
// the call succeeds. With GCS_OUTAGES, all sorts are tried at all requests.
func TestOutages(t *testing.T) {
	for name := range outageCalls(nil) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, all := os.LookupEnv("GCS_OUTAGES")
			for n, met := int64(1), true; met; n++ {
				met = false
				for _, lasts := range []time.Duration{time.Second, 3 * time.Second, 10 * time.Second} {
					for sort, outage := range outages {
						if all || sort == "unknown" || n == 2 && lasts == 3*time.Second {
							met = playOutage(t, name, outage.err, n, lasts, false) || met
						}
					}
					for sort, outage := range grpcOutages {
						if all || (sort == "token" || n == 2) && lasts == 3*time.Second {
							met = playOutage(t, name, outage.err, n, lasts, true) || met
						}
					}
				}
			}
		})
	}
}

func TestReasons(t *testing.T) {
	for _, text := range []string{
		"downscope: unable to exchange token, 403: {}", "downscope: unable to exchange token; 400. Server responded: {}",
		"oauth2: token expired and refresh token is not set", `oauth2: "restricted_client"`, `oauth2: "consent_required"`,
	} {
		require.Empty(t, retryReason(errors.New(text)), text)
		require.Empty(t, retryReason(status.Error(codes.Unauthenticated, "transport: per-RPC creds failed due to error: "+text)), text)
	}
	for name, outage := range outages {
		require.Equal(t, outage.reason, retryReason(&url.Error{Op: "Get", URL: "https://storage.googleapis.com", Err: outage.err}), name)
	}
	for name, outage := range grpcOutages {
		require.Equal(t, outage.reason, retryReason(fmt.Errorf("wrapped: %w", outage.err)), name)
	}
}

// A stream that breaks, and whose next request hangs, goes on after 5 s. What it read
// in parts is checked as a whole, and Close repeats why a stream ended.
func TestZipStream(t *testing.T) {
	zip := bigZip()
	for name, test := range map[string]struct {
		faults []fakegcs.Fault
		edit   func(n int, resp *http.Response) // see edited
		fails  string
		takes  time.Duration
	}{
		"breaks and hangs": {faults: []fakegcs.Fault{fakegcs.LostBody, fakegcs.Hung}, takes: requestTimeout},
		"hangs at once":    {faults: []fakegcs.Fault{fakegcs.Hung}, takes: requestTimeout},
		"stalls": {takes: requestTimeout, edit: func(n int, resp *http.Response) {
			if ctx := resp.Request.Context(); n == 1 {
				stalled := readFunc(func([]byte) (int, error) { <-ctx.Done(); return 0, ctx.Err() })
				become(resp, io.MultiReader(io.LimitReader(resp.Body, 1000), stalled))
			}
		}},
		"corrupted": {faults: []fakegcs.Fault{fakegcs.LostBody}, fails: "CRC32C", edit: corruptFirst},
		"decompressed": {faults: []fakegcs.Fault{fakegcs.LostBody, fakegcs.Unavailable}, edit: func(n int, resp *http.Response) {
			resp.Header.Set("X-Goog-Stored-Content-Encoding", "gzip")
			resp.Header.Set("X-Goog-Hash", "crc32c=AAAAAQ==")
			resp.ContentLength = -1
			if resp.StatusCode == http.StatusPartialContent { // GCS sends all of it, whatever is asked for
				resp.StatusCode = http.StatusOK
				become(resp, bytes.NewReader(zip))
			}
		}},
	} {
		run(t, name, withStorage, func(t *testing.T, f *fakeGCS, _ *Storage) {
			f.Put(objectName(extZip), zip, nil)
			for i, fault := range test.faults {
				f.fault(fault, nth("edited", i))
			}
			w, start := watch(t), time.Now()
			r, err := f.edited(test.edit).Zip(t.Context(), testModule, testVersion)
			require.NoError(t, err)
			got, err := io.ReadAll(r)
			require.InDelta(t, test.takes.Seconds(), time.Since(start).Seconds(), 2)
			require.Equal(t, test.takes > 0, w.measure("gcs.retries", "{retry}")["timeout"] > 0)
			if test.fails != "" {
				requireError(t, err, KindUnexpected, "gcs.Zip", testModule, testVersion)
				require.ErrorContains(t, err, test.fails)
			} else {
				require.NoError(t, err)
				require.True(t, bytes.Equal(zip, got))
			}
			require.Equal(t, err, r.Close())
			_, readErr := r.Read(make([]byte, 1))
			require.ErrorContains(t, readErr, cmp.Or(err, fs.ErrClosed).Error())
			requireNothingInFlight(t, f)
		})
	}
}

// corruptFirst changes the first byte of the first answer.
func corruptFirst(n int, resp *http.Response) {
	if n == 1 {
		io.ReadFull(resp.Body, make([]byte, 1))
		become(resp, io.MultiReader(strings.NewReader("X"), resp.Body))
	}
}

// A download that was corrupted once is made again.
func TestCorruptedRead(t *testing.T) {
	forReaders(t, func(t *testing.T, f *fakeGCS, _ *Storage, op string) {
		if op == "Zip" {
			t.Skip("its caller has read it by then")
		}
		storeVersion(f, testModule, testVersion)
		returns(t, asStored(op, testVersion))(readers[op](t.Context(), f.edited(corruptFirst), testModule, testVersion))
		require.Len(t, f.Log(), 2)
	})
}

// All tries of a request end 5 minutes after the first began, also one that hangs then.
func TestFiveMinutes(t *testing.T) {
	large := contentOf("a", 1<<20)
	for op, call := range map[string]string{"list": "Exists", "get": "Info", "insert": "Save"} {
		run(t, op, overBoth, func(t *testing.T, f *fakeGCS, s *Storage) {
			start, ext := time.Now(), map[string]string{"insert": extZip}[op]
			f.fault(fakegcs.Hung, on("", op, ext))
			f.fault(fakegcs.Unavailable, func(r *fakegcs.Request) bool {
				at := time.Since(start)
				return r.Op == op && op != "insert" && at > 156*time.Second && at < 299*time.Second
			})
			calls := everyCall(s)
			calls["Save"] = func(ctx context.Context) error { return large.save(ctx, s) }
			require.ErrorContains(t, calls[call](t.Context()), "5m0s")
			require.InDelta(t, retryLimit.Seconds(), time.Since(start).Seconds(), 1)
		})
	}
}

// The caller's own settings of the client's retries change nothing: every request of
// every call is answered 503 once.
func TestCallersRetrySettings(t *testing.T) {
	for name, option := range map[string]storage.RetryOption{
		"never":          storage.WithPolicy(storage.RetryNever),
		"always":         storage.WithPolicy(storage.RetryAlways),
		"attempts":       storage.WithMaxAttempts(1),
		"error function": storage.WithErrorFunc(func(error) bool { return false }),
		"back-off":       storage.WithBackoff(gax.Backoff{Initial: time.Hour}),
		"duration":       storage.WithMaxRetryDuration(time.Nanosecond),
	} {
		run(t, name, machineOverBoth, func(t *testing.T, f *fakeGCS, m *fakegcs.Machine) {
			onHandle := m.Bucket.Retryer(option)
			m.Client.SetRetry(option)
			for _, bucket := range []*storage.BucketHandle{onHandle, m.Client.Bucket(fakegcs.Bucket)} {
				for name, call := range outageCalls(NewStorage(bucket, WithChunkSize(faultChunk))) {
					prepareOutage(f, name)
					failed := map[string]bool{} // once
					var mu sync.Mutex
					f.onRequest(func(r *fakegcs.Request) fakegcs.Fault {
						mu.Lock()
						defer mu.Unlock()
						at := fmt.Sprint(r.Op, r.Object, r.Cond)
						if failed[at] {
							return fakegcs.NoFault
						}
						if failed[at] = true; name == "Zip" && len(failed) == 1 {
							return fakegcs.LostBody
						}
						return fakegcs.Unavailable
					})
					require.NoError(t, call(t.Context()), name)
					require.NotEmpty(t, failed)
					for _, object := range f.Names() {
						f.Remove(object)
					}
				}
			}
		})
	}
}

// A refusal says what is wrong. Only a caller without a permission is told to get one.
func TestRefusals(t *testing.T) {
	const hint, scopes = "the caller needs storage.objects.list on the bucket, which roles/storage.objectUser holds", "OAuth scopes"
	for name, test := range map[string]struct {
		message, reason string
		hint            string
		again           bool
	}{
		"permission":     {"a@b does not have storage.objects.list access to the Google Cloud Storage bucket.", "forbidden", hint, false},
		"scopes":         {"Insufficient Permission", "insufficientPermissions", scopes, false},
		"scopes of gRPC": {"Request had insufficient authentication scopes.", "forbidden", scopes, false},
		"billing":        {"The billing account for the owning project is disabled in state absent", "accountDisabled", "", false},
		"hold":           {"Object 'modules/m' is under active Event-Based hold and cannot be deleted", "objectUnderActiveHold", "", false},
		"retention":      {"Object 'modules/m' is subject to bucket's retention policy", "retentionPolicyNotMet", "", false},
		"perimeter":      {"Request is prohibited by organization's policy. vpcServiceControlsUniqueIdentifier: x", "vpcServiceControls", "", false},
		"key":            {"Permission denied on Cloud KMS key.", "forbidden", "", false},
		"rate":           {"Too many", "rateLimitExceeded", "", true},
		"rate of a user": {"Too many", "userRateLimitExceeded", "", true},
	} {
		run(t, name, withStorage, func(t *testing.T, f *fakeGCS, _ *Storage) {
			tries := 0
			body := fmt.Sprintf(`{"error":{"code":403,"message":%q,"errors":[{"reason":%q}]}}`, test.message, test.reason)
			overHTTP := f.on(func(*http.Request) (*http.Response, error) {
				tries++
				return &http.Response{StatusCode: 403, Body: io.NopCloser(strings.NewReader(body))}, nil
			})
			overGRPC := f.overGRPC(t, func() error {
				tries++
				return status.Error(codes.PermissionDenied, test.message+" "+test.reason)
			})
			for _, s := range []*Storage{overHTTP, overGRPC} {
				tries = 0
				start := time.Now()
				_, err := s.Exists(within(t, time.Hour), testModule, testVersion)
				require.ErrorContains(t, err, test.message)
				require.ErrorContains(t, err, test.hint)
				if test.hint != hint {
					require.NotContains(t, err.Error(), "objectUser")
				}
				if test.hint == "" {
					require.NotContains(t, err.Error(), scopes)
				}
				if test.again {
					require.Equal(t, KindRateLimit, Kind(err))
					require.InDelta(t, retryLimit.Seconds(), time.Since(start).Seconds(), 1)
					require.Less(t, tries, 300, "at most one a second")
				} else {
					require.Equal(t, KindUnexpected, Kind(err))
					require.Equal(t, 1, tries)
				}
			}
		})
	}
}

// The log tells of a request that is made again for long, when it has taken 5, 10, 20,
// 40 s and so on, and when it is answered at last. The counter has every further try.
func TestRetriesAreTold(t *testing.T) {
	for fault, reason := range map[fakegcs.Fault]string{fakegcs.Unavailable: "5xx", fakegcs.TooMany: "429", fakegcs.Hung: "timeout"} {
		for _, lasts := range []time.Duration{time.Second, time.Minute, time.Hour} {
			run(t, fmt.Sprint(fault, lasts), withStorage, func(t *testing.T, f *fakeGCS, _ *Storage) {
				w := watch(t)
				storeVersion(f, testModule, testVersion)
				start := time.Now()
				f.fault(fault, func(r *fakegcs.Request) bool { return time.Since(start) < lasts })
				var log syncedLog
				s := f.storage("m", log.option())
				s.bucket.rand = func(n time.Duration) time.Duration { return n }
				_, err := s.Info(t.Context(), testModule, testVersion)
				require.Equal(t, lasts > retryLimit, err != nil)
				require.Equal(t, map[string]float64{reason: float64(len(f.Log()) - 1)}, w.measure("gcs.retries", "{retry}"))
				at := []float64{}
				for _, line := range log.lines(slog.LevelWarn) {
					when, err := time.Parse("time="+time.RFC3339Nano, strings.Fields(line)[0])
					require.NoError(t, err)
					after := when.Sub(start).Round(time.Second)
					at = append(at, after.Seconds())
					require.Contains(t, line, `request="read of .info" module=example.com/mod version=v1.0.0 for=`+after.String()+" error=")
				}
				told := map[time.Duration]int{time.Minute: 4, time.Hour: 6}[lasts]
				if fault == fakegcs.Hung {
					told = max(told, 1)
				}
				require.Equal(t, []float64{5, 10, 20, 40, 80, 160}[:told], at)
				if answered := log.lines(slog.LevelInfo); lasts == time.Minute {
					require.Len(t, answered, 1)
					require.Contains(t, answered[0], "answered")
				}
			})
		}
	}
}

// A refusal ends what is told of a request, and a listing's call tells of the version.
func TestRefusalIsTold(t *testing.T) {
	withStorage(t, func(t *testing.T, f *fakeGCS, _ *Storage) {
		var log syncedLog
		s := f.storage("m", log.option())
		leaveUnfinished(f)
		f.fault(fakegcs.HungApplied, first(2, on("", "patch", "")))
		requireList(t, s, testModule, testVersion)
		require.Len(t, log.lines(slog.LevelWarn), 2)
		require.Contains(t, log.String(), `request="update of .mod" module=example.com/mod version=v1.0.0`)
		require.Contains(t, log.String(), "a request that was tried again is answered")
	})
}

// The last try of a request is cut when the time is up. Then the try before tells why the
// request failed.
func TestCutTry(t *testing.T) {
	withStorage(t, func(t *testing.T, f *fakeGCS, s *Storage) {
		f.fault(fakegcs.Hung, nth("m", 1))
		f.fault(fakegcs.Unavailable, nth("m", 0))
		_, err := s.Info(within(t, requestTimeout), testModule, testVersion)
		requireKind(t, err, KindGatewayTimeout)
		var answer *googleapi.Error
		require.ErrorAs(t, err, &answer)
	})
	for trip := time.Second; trip < requestTimeout; trip += 500 * time.Millisecond {
		bubble(t, trip, func(t *testing.T, f *fakeGCS) {
			f.fault(fakegcs.TooMany, on("", "get", ""))
			_, err := f.storage("m").Info(t.Context(), testModule, testVersion)
			requireKind(t, err, KindRateLimit)
		})
	}
}

// GCS speaks HTTP/2. If the server resets the stream of a request that it has
// applied, the request is made again, and the outcome is the same. So it is for each
// request of each call.
func TestHTTP2Reset(t *testing.T) {
	for name := range outageCalls(nil) {
		t.Run(name, func(t *testing.T) {
			for at, hit := int64(1), true; hit; at++ {
				f := newFakeGCS(t)
				prepareOutage(f, name)
				var requests atomic.Int64
				s := overHTTP2(t, f, func() bool { return requests.Add(1) == at })
				require.NoError(t, outageCalls(s)[name](t.Context()), "request %d", at)
				hit = requests.Load() >= at
				if name == "Save" {
					requireStored(t, f, contentOf("a", 100))
				}
			}
		})
	}
}

// overHTTP2 returns a Storage that reaches the bucket over HTTP/2. The server resets
// the stream of a request, once it has applied it, if resets says so.
func overHTTP2(t *testing.T, f *fakeGCS, resets func() bool) *Storage {
	bucket := f.Handler()
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor != 2 {
			t.Errorf("a request over %s", r.Proto)
		}
		if resets() {
			bucket.ServeHTTP(httptest.NewRecorder(), r)
			panic(http.ErrAbortHandler)
		}
		bucket.ServeHTTP(w, r)
	}))
	server.EnableHTTP2 = true
	server.Config.ErrorLog = log.New(io.Discard, "", 0) // of connections that the test's end cuts
	server.StartTLS()
	t.Cleanup(server.Close)
	m := f.Register("a")
	m.Connect(m.Over(server.Client().Transport), option.WithEndpoint(server.URL+"/storage/v1/"))
	s := NewStorage(m.Bucket, WithChunkSize(faultChunk))
	s.bucket.rand = func(time.Duration) time.Duration { return 0 } // no pause before a request is made again
	return s
}
