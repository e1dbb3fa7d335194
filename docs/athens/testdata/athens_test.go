// Tests of the files of the guide as Athens would use them. They are run in the folder
// of the storage, beside the tests that are installed there, in one program.
package gcp_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	cloud "cloud.google.com/go/storage"
	"github.com/athensgcs/gcs"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"github.com/gomods/athens/pkg/config"
	"github.com/gomods/athens/pkg/download"
	athenserrors "github.com/gomods/athens/pkg/errors"
	"github.com/gomods/athens/pkg/log"
	"github.com/gomods/athens/pkg/observ"
	"github.com/gomods/athens/pkg/paths"
	"github.com/gomods/athens/pkg/requestid"
	"github.com/gomods/athens/pkg/stash"
	"github.com/gomods/athens/pkg/storage"
	"github.com/gomods/athens/pkg/storage/gcp"
)

const upper = "example.com/Mod"

var bucket = os.Getenv("TEST_BUCKET")

// open returns a storage whose objects no other test sees, unless prefix says so.
func open(t *testing.T, prefix string) *gcp.Storage {
	t.Helper()
	if prefix == "" {
		prefix = t.Name() + "/"
	}
	t.Setenv("ATHENS_GCS_PREFIX", prefix)
	s, err := gcp.New(context.Background(), &config.GCPConfig{Bucket: bucket}, time.Minute)
	require.NoError(t, err)
	return s
}

// put stores an object below the test's prefix, as another program would.
func put(t *testing.T, name, data string) {
	t.Helper()
	client, err := cloud.NewClient(t.Context())
	require.NoError(t, err)
	defer client.Close()
	w := client.Bucket(bucket).Object(t.Name() + "/" + name).NewWriter(t.Context())
	_, err = io.WriteString(w, data)
	require.NoError(t, err)
	require.NoError(t, w.Close())
}

func saveIn(t *testing.T, s storage.Saver, mod, ver string) {
	t.Helper()
	require.NoError(t, s.Save(t.Context(), mod, ver, []byte("mod"), strings.NewReader("zip"), nil, []byte("info")))
}

// A version exists when all three objects do.
func TestExists(t *testing.T) {
	s := open(t, "")
	for i, exts := range [][]string{{"mod"}, {"zip"}, {"info"}, {"mod", "zip"}, {"mod", "info"}, {"zip", "info"}} {
		mod := fmt.Sprintf("example.com/part%d", i)
		for _, ext := range exts {
			put(t, mod+"/@v/v1.0.0."+ext, ext)
		}
		ok, err := storage.WithChecker(s).Exists(t.Context(), mod, "v1.0.0")
		require.NoError(t, err)
		require.False(t, ok, "%v", exts)
	}
}

func TestCatalog(t *testing.T) {
	s := open(t, "")
	want := []paths.AllPathParams{}
	for _, ver := range []string{"v1.0.0", "v1.1.0", "v1.2.0"} {
		saveIn(t, s, upper, ver)
		want = append(want, paths.AllPathParams{Module: upper, Version: ver})
	}
	var c storage.Cataloger = s
	first, token, err := c.Catalog(t.Context(), "", 2)
	require.NoError(t, err)
	rest, token, err := c.Catalog(t.Context(), token, 2)
	require.NoError(t, err)
	require.Empty(t, token)
	require.Equal(t, want, append(first, rest...))
}

// Below a prefix there is a bucket of its own, and the prefix is in the objects' names.
func TestPrefix(t *testing.T) {
	saveIn(t, open(t, "TestPrefix/a/"), upper, ver)
	ok, err := open(t, "TestPrefix/b/").Exists(t.Context(), upper, ver)
	require.NoError(t, err)
	require.False(t, ok)
	for _, ext := range []string{"mod", "zip", "info"} {
		put(t, "c/"+upper+"/@v/"+ver+"."+ext, ext)
	}
	ok, err = open(t, "TestPrefix/c/").Exists(t.Context(), upper, ver)
	require.NoError(t, err)
	require.True(t, ok)
}

func TestErrors(t *testing.T) {
	s := open(t, "")
	saveIn(t, s, upper, ver)
	_, missing := s.Info(t.Context(), upper, "v1.1.0")
	again := s.Save(t.Context(), upper, ver, nil, strings.NewReader(""), nil, nil)
	_, _, token := s.Catalog(t.Context(), "nowhere", 1)
	for _, test := range []struct {
		err      error
		kind     int
		op       athenserrors.Op
		mod, ver string
	}{
		{missing, athenserrors.KindNotFound, "gcs.Info", upper, "v1.1.0"},
		{again, athenserrors.KindAlreadyExists, "gcs.Save", upper, ver},
		{token, athenserrors.KindBadRequest, "gcs.Catalog", "", ""},
		{s.Save(t.Context(), upper, ver, nil, nil, nil, nil), athenserrors.KindBadRequest, "gcs.Save", upper, ver},
	} {
		require.IsType(t, athenserrors.Error{}, test.err)
		e := test.err.(athenserrors.Error)
		require.Equal(t, test.op, e.Op)
		require.Equal(t, test.mod, string(e.Module))
		require.Equal(t, test.ver, string(e.Version))
		if test.mod != "" {
			require.Equal(t, 1, strings.Count(e.Error(), test.mod), "%v", e)
			require.Equal(t, 1, strings.Count(e.Error(), test.ver), "%v", e)
		}
		wrapped := athenserrors.E("stash.Pool", athenserrors.E("stasher.Stash", test.err))
		require.True(t, athenserrors.Is(wrapped, test.kind), "%v", wrapped)
		require.Equal(t, test.kind == 404, athenserrors.IsNotFoundErr(wrapped))
		require.Equal(t, test.kind, gcs.Kind(wrapped))
		var own *gcs.Error
		require.ErrorAs(t, wrapped, &own)
	}
	require.ErrorIs(t, missing, cloud.ErrObjectNotExist)

	_, err := gcp.New(t.Context(), &config.GCPConfig{Bucket: "no-such-bucket"}, time.Minute)
	require.True(t, athenserrors.IsNotFoundErr(err), "%v", err)
}

// capture makes standard output a file until the test ends, and returns what is in
// it as lines of JSON.
func capture(t *testing.T) func() []map[string]any {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "")
	require.NoError(t, err)
	stdout := os.Stdout
	os.Stdout = f
	t.Cleanup(func() {
		os.Stdout = stdout
		f.Close()
	})
	return func() (lines []map[string]any) {
		data, err := os.ReadFile(f.Name())
		require.NoError(t, err)
		for line := range bytes.Lines(data) {
			var fields map[string]any
			require.NoError(t, json.Unmarshal(line, &fields), "%s", line)
			lines = append(lines, fields)
		}
		return lines
	}
}

// heal makes the library log an info line.
func heal(t *testing.T, ctx context.Context, ver string) {
	put(t, upper+"/@v/"+ver+".mod", "half a save")
	require.NoError(t, open(t, "").Save(ctx, upper, ver, []byte("mod"), strings.NewReader("zip"), nil, []byte("info")))
}

// The library's lines are in Athens' format, at its level, with the request's id.
func TestLogs(t *testing.T) {
	t.Setenv("ATHENS_LOG_FORMAT", "json")
	lines := capture(t)
	heal(t, requestid.SetInContext(t.Context(), "one"), "v1.0.0")
	require.Len(t, lines(), 1)
	line := lines()[0]
	require.Equal(t, "INFO", line["level"])
	require.Equal(t, "healed a version", line["msg"])
	require.Equal(t, upper, line["module"])
	require.Equal(t, "v1.0.0", line["version"])
	require.Equal(t, "one", line["request-id"])

	for _, level := range []string{"warn", "warning", "ERROR", "fatal", "panic"} {
		t.Setenv("ATHENS_LOG_LEVEL", level)
		heal(t, t.Context(), "v1.0.1-"+level)
		require.Len(t, lines(), 1, level)
	}
	for i, level := range []string{"info", "debug", "trace"} {
		t.Setenv("ATHENS_LOG_LEVEL", level)
		heal(t, t.Context(), "v1.0.2-"+level)
		require.Len(t, lines(), 2+i, level)
	}
	require.NotContains(t, lines()[3], "request-id")

	t.Setenv("ATHENS_CLOUD_RUNTIME", "GCP")
	heal(t, t.Context(), "v1.0.3")
	require.Equal(t, "INFO", lines()[4]["severity"])
}

func TestLogsAsText(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "")
	require.NoError(t, err)
	defer f.Close()
	stdout := os.Stdout
	os.Stdout = f
	heal(t, t.Context(), "v1.0.0")
	os.Stdout = stdout
	data, err := os.ReadFile(f.Name())
	require.NoError(t, err)
	require.Contains(t, string(data), "level=INFO")
	require.Contains(t, string(data), "module="+upper)
}

// Athens' timeout bounds the check of the bucket.
func TestTimeout(t *testing.T) {
	silent := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	defer silent.Close()
	t.Setenv("STORAGE_EMULATOR_HOST", silent.URL)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err := gcp.New(ctx, &config.GCPConfig{Bucket: bucket}, 100*time.Millisecond)
	require.True(t, athenserrors.Is(err, athenserrors.KindGatewayTimeout), "%v", err)
	require.NoError(t, ctx.Err())
}

// replica is one Athens on a bucket that others share.
func replica(t *testing.T, f *fetcher, logs io.Writer, singleFlight stash.Wrapper, s storage.Backend) *download.Opts {
	t.Helper()
	return &download.Opts{
		Storage: s,
		Stasher: stash.New(f, s, time.Minute, singleFlight),
		Logger:  log.NewWithOutput(logs, "", slog.LevelInfo, "json"),
	}
}

func gcsLock(t *testing.T, s storage.Backend) stash.Wrapper {
	t.Helper()
	w, err := stash.WithGCSLock(120, s)
	require.NoError(t, err)
	return w
}

// memory is what Athens' single flight "memory" amounts to for one request at a time.
func memory(s stash.Stasher) stash.Stasher { return s }

type fetcher struct {
	n      atomic.Int64
	before func() // each fetch
	err    error
}

func (f *fetcher) Fetch(_ context.Context, _, ver string) (*storage.Version, error) {
	f.n.Add(1)
	if f.before != nil {
		f.before()
	}
	if f.err != nil {
		return nil, f.err
	}
	if ver == "main" {
		ver = "v1.0.0"
	}
	return &storage.Version{Mod: []byte("mod"), Zip: io.NopCloser(strings.NewReader("zip")), Info: []byte("info"), Semver: ver}, nil
}

// A version that is not found is no error in the log, whoever says so.
func TestNotFoundIsInfo(t *testing.T) {
	var logs bytes.Buffer
	s := open(t, "")
	gone := &fetcher{err: athenserrors.E("vcs.Fetch", "unknown revision", athenserrors.KindNotFound)}
	status, _ := replica(t, gone, &logs, gcsLock(t, s), s).Get(t.Context(), upper, ver, "info")
	require.Equal(t, 404, status)
	require.Equal(t, 1, strings.Count(logs.String(), "\n"))
	require.Contains(t, logs.String(), `"level":"INFO"`)

	logs.Reset()
	broken := &fetcher{err: athenserrors.E("vcs.Fetch", "no route to host", athenserrors.KindUnexpected)}
	status, _ = replica(t, broken, &logs, gcsLock(t, s), s).Get(t.Context(), upper, ver, "info")
	require.Equal(t, 500, status)
	require.Contains(t, logs.String(), `"level":"ERROR"`)
}

// Athens logs what a save failed of once, with module and version.
func TestFailureIsLogged(t *testing.T) {
	var logs bytes.Buffer
	s := open(t, "")
	f := &fetcher{before: func() { saveIn(t, s, upper, ver) }} // another replica is faster
	status, _ := replica(t, f, &logs, memory, s).Get(t.Context(), upper, ver, "info")
	require.Equal(t, 409, status)
	var line struct {
		Level, Msg, Module, Version string
		Ops                         []string
	}
	require.NoError(t, json.Unmarshal(logs.Bytes(), &line))
	require.Equal(t, "ERROR", line.Level)
	require.Equal(t, upper, line.Module)
	require.Equal(t, ver, line.Version)
	require.Contains(t, line.Ops, "gcs.Save")
	require.Equal(t, 1, strings.Count(line.Msg, upper), line.Msg)
	require.Equal(t, 1, strings.Count(line.Msg, ver), line.Msg)
}

func TestSpans(t *testing.T) {
	recorder := tracetest.NewSpanRecorder()
	before := otel.GetTracerProvider()
	otel.SetTracerProvider(trace.NewTracerProvider(trace.WithSpanProcessor(recorder)))
	t.Cleanup(func() { otel.SetTracerProvider(before) })
	s := open(t, "")
	ctx, span := observ.StartSpan(t.Context(), "protocol.Info")
	status, _ := replica(t, &fetcher{}, io.Discard, gcsLock(t, s), s).Get(ctx, upper, ver, "info")
	require.Equal(t, 200, status)
	span.End()

	spans := map[string]trace.ReadOnlySpan{}
	for _, span := range recorder.Ended() {
		spans[span.Name()] = span
	}
	child := func(name, parent string) {
		t.Helper()
		require.Contains(t, spans, name)
		require.Contains(t, spans, parent)
		require.Equal(t, spans[parent].SpanContext().SpanID(), spans[name].Parent().SpanID(), "%s below %s", name, parent)
	}
	child("gcs.Info", "protocol.Info")
	child("gcs.Stash", "protocol.Info")
	child("stasher.Stash", "gcs.Stash")
	child("gcs.Save", "stasher.Stash")
}

func TestSharedFlight(t *testing.T) {
	a, b := open(t, ""), open(t, "")
	f := &fetcher{}
	one, two := replica(t, f, io.Discard, gcsLock(t, a), a), replica(t, f, io.Discard, gcsLock(t, b), b)
	for _, r := range []*download.Opts{one, two} {
		saved, err := r.Stasher.Stash(t.Context(), upper, ver)
		require.NoError(t, err)
		require.Equal(t, ver, saved)
	}
	require.EqualValues(t, 1, f.n.Load())

	// KindAlreadyExists is success, with the version that was saved.
	branch := &fetcher{before: func() { saveIn(t, a, "example.com/branch", "v1.0.0") }}
	raced := stash.New(branch, noChecker{a}, time.Minute, gcsLock(t, a))
	saved, err := raced.Stash(t.Context(), "example.com/branch", "main")
	require.NoError(t, err)
	require.Equal(t, "v1.0.0", saved)

	_, err = stash.WithGCSLock(0, a)
	require.ErrorContains(t, err, "positive")
	_, err = stash.WithGCSLock(120, noChecker{a})
	require.ErrorContains(t, err, "noChecker")
}

// noChecker hides that a storage can tell whether a version exists.
type noChecker struct{ storage.Backend }

func (noChecker) Exists(context.Context, string, string) (bool, error) { return false, nil }

// In the mode "async" the context of Stash ends at once, and the version is stored.
func TestAsync(t *testing.T) {
	s := open(t, "")
	ended := make(chan struct{})
	saved := make(chan error, 1)
	f := &fetcher{before: func() { <-ended }}
	r := replica(t, f, io.Discard, func(next stash.Stasher) stash.Stasher {
		return gcsLock(t, s)(stashFunc(func(ctx context.Context, mod, ver string) (string, error) {
			v, err := next.Stash(ctx, mod, ver)
			saved <- err
			return v, err
		}))
	}, s)
	r.Async = true
	status, _ := r.Get(t.Context(), mod, ver, "info")
	require.Equal(t, 404, status)
	close(ended)
	require.NoError(t, <-saved)
	status, _ = r.Get(t.Context(), mod, ver, "info")
	require.Equal(t, 200, status)
}

type stashFunc func(ctx context.Context, mod, ver string) (string, error)

func (f stashFunc) Stash(ctx context.Context, mod, ver string) (string, error) {
	return f(ctx, mod, ver)
}

// Of a version of which only the .mod is there, a request for the .mod heals
// nothing, and a request for the .info or the .zip does.
func TestWhatHeals(t *testing.T) {
	s := open(t, "")
	for _, ext := range []string{"info", "zip"} {
		mod := "example.com/" + ext
		put(t, mod+"/@v/v1.0.0.mod", "half a save")
		f := &fetcher{}
		r := replica(t, f, io.Discard, gcsLock(t, s), s)
		status, body := r.Get(t.Context(), mod, ver, "mod")
		require.Equal(t, 200, status)
		require.Equal(t, "half a save", string(body))
		require.Zero(t, f.n.Load())
		status, body = r.Get(t.Context(), mod, ver, ext)
		require.Equal(t, 200, status)
		require.Equal(t, ext, string(body))
		status, body = r.Get(t.Context(), mod, ver, "mod")
		require.Equal(t, 200, status)
		require.Equal(t, "mod", string(body))
	}
}

// TestCredentials parses keys of all types that the client knows. None of them is
// used: the context has ended when the permissions are asked for.
func TestCredentials(t *testing.T) {
	t.Setenv("STORAGE_EMULATOR_HOST", "")
	t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", "")
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	require.NoError(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(rsaKey)
	require.NoError(t, err)
	private, err := json.Marshal(string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})))
	require.NoError(t, err)
	const user = `{"type":"authorized_user","client_id":"c","client_secret":"s","refresh_token":"r"}`
	keys := []struct{ name, key, malformed, says string }{
		{"service account",
			`{"type":"service_account","client_email":"a@b","private_key_id":"1","private_key":` + string(private) + `,"token_uri":"https://oauth2.googleapis.com/token"}`,
			`{"type":"service_account","client_email":"a@b","private_key":7}`, "private_key"},
		{"authorized user", user, `{"type":"authorized_user","client_id":"c"}`, "client secret"},
		{"external account",
			`{"type":"external_account","audience":"//iam.googleapis.com/p","subject_token_type":"urn:ietf:params:oauth:token-type:jwt","token_url":"https://sts.googleapis.com/v1/token","credential_source":{"file":"/var/run/token"}}`,
			`{"type":"external_account","audience":"//iam.googleapis.com/p"}`, "Subject token type"},
		{"external account of a user",
			`{"type":"external_account_authorized_user","audience":"//iam.googleapis.com/p","client_id":"c","client_secret":"s","refresh_token":"r","token_url":"https://sts.googleapis.com/v1/oauthtoken"}`,
			`{"type":"external_account_authorized_user","audience":7}`, "audience"},
		{"impersonated service account",
			`{"type":"impersonated_service_account","service_account_impersonation_url":"https://iamcredentials.googleapis.com/v1/projects/-/serviceAccounts/a@b:generateAccessToken","source_credentials":` + user + `}`,
			`{"type":"impersonated_service_account"}`, "source_credentials"},
		{"none", "", `{"client_email":"a@b"}`, `the JSON key has no "type"`},
		{"none of this world", "", `{"type":"of_another_world"}`, "of_another_world"},
		{"no JSON", "", `{`, "not a JSON key"},
	}
	try := func(key string) error {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := gcp.New(ctx, &config.GCPConfig{Bucket: bucket, JSONKey: key}, time.Minute)
		require.Error(t, err)
		return err
	}
	for _, k := range keys {
		t.Run(k.name, func(t *testing.T) {
			err := try(base64.StdEncoding.EncodeToString([]byte(k.malformed)))
			require.False(t, errors.Is(err, context.Canceled), "%v", err)
			require.ErrorContains(t, err, k.says)
			if k.key != "" {
				key := base64.StdEncoding.EncodeToString([]byte(k.key))
				require.ErrorIs(t, try(key), context.Canceled)
				// The client's older way checks that the option has the key's type.
				t.Setenv("GOOGLE_API_GO_EXPERIMENTAL_DISABLE_NEW_AUTH_LIB", "true")
				require.ErrorIs(t, try(key), context.Canceled)
			}
		})
	}
	err = try("{}")
	require.ErrorContains(t, err, "ATHENS_STORAGE_GCP_JSON_KEY: not base64")
}
