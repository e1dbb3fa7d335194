package gcs

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"cloud.google.com/go/auth"
	"cloud.google.com/go/auth/credentials"
	"cloud.google.com/go/storage"
	"github.com/stretchr/testify/require"
	"google.golang.org/api/option"
	"google.golang.org/grpc"
	grpccredentials "google.golang.org/grpc/credentials"
)

// metadataServer is the server that gives the tokens of a virtual machine, or of a pod.
type metadataServer struct {
	status atomic.Int64 // of its answers: 0 closes the connection
	asked  atomic.Int64
}

func (m *metadataServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Metadata-Flavor", "Google")
	if !strings.HasSuffix(r.URL.Path, "/token") {
		return
	}
	m.asked.Add(1)
	switch status := m.status.Load(); status {
	case 0:
		panic(http.ErrAbortHandler)
	case http.StatusOK:
		io.WriteString(w, `{"access_token":"x","expires_in":60,"token_type":"Bearer"}`)
	default:
		w.WriteHeader(int(status))
	}
}

// detect returns the default credentials of a machine with that metadata server. Each
// request fetches a token, which expires soon.
func detect(t *testing.T, address string) *auth.Credentials {
	t.Setenv("GCE_METADATA_HOST", address)
	t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", "")
	t.Setenv("HOME", t.TempDir())
	creds, err := credentials.DetectDefault(&credentials.DetectOptions{
		Scopes: []string{storage.ScopeFullControl}, DisableAsyncRefresh: true})
	require.NoError(t, err)
	return creds
}

func authorized(t *testing.T, f *fakeGCS, creds *auth.Credentials) *Storage {
	return storageOf(t)(storage.NewClient(t.Context(), option.WithAuthCredentials(creds), option.WithEndpoint(f.listen(t)+"/storage/v1/")))
}

// tokenOf is how a client over gRPC, without TLS, asks for a token.
type tokenOf struct{ *auth.Credentials }

func (c tokenOf) GetRequestMetadata(ctx context.Context, _ ...string) (map[string]string, error) {
	_, err := c.Token(ctx)
	return nil, err
}

func (tokenOf) RequireTransportSecurity() bool { return false }

// Tokens that cannot be had for a while delay a call, and fail none.
func TestTokens(t *testing.T) {
	for name, status := range map[string]int64{"closes": 0, "404": 404, "429": 429, "500": 500, "503": 503, "refuses": -1} {
		t.Run(name, func(t *testing.T) {
			m := new(metadataServer)
			m.status.Store(http.StatusOK)
			up := func(address string) (*http.Server, string) {
				listener, err := net.Listen("tcp", address)
				require.NoError(t, err)
				server := &http.Server{Handler: m, ErrorLog: log.New(io.Discard, "", 0)}
				go server.Serve(listener)
				return server, listener.Addr().String()
			}
			server, address := up("127.0.0.1:0")
			f := newFakeGCS(t)
			storeVersion(f, testModule, testVersion)
			creds := detect(t, address)
			overHTTP := authorized(t, f, creds)
			overGRPC := f.overGRPC(t, func() error { return nil }, grpc.WithPerRPCCredentials(tokenOf{creds}))
			for _, call := range []func(context.Context) error{
				overHTTP.Check, // the first token
				everyCall(overGRPC)["Zip"],
				callsOn(overHTTP, ModuleVersion{testModule, "v2.0.0"})["Save"],
			} {
				asked := m.asked.Load()
				if m.status.Store(status); status < 0 {
					server.Close()
				}
				start, back := time.Now(), make(chan struct{})
				time.AfterFunc(100*time.Millisecond, func() {
					defer close(back)
					if m.status.Store(http.StatusOK); status < 0 {
						server, _ = up(address)
					}
				})
				require.NoError(t, call(t.Context()))
				require.Greater(t, time.Since(start), 100*time.Millisecond)
				<-back
				require.Greater(t, m.asked.Load(), asked)
			}
			server.Close()
		})
	}
}

// serviceAccount returns the credentials of a key whose tokens that server issues.
func serviceAccount(t *testing.T, key, tokenURL string) *auth.Credentials {
	b, _ := json.Marshal(map[string]string{"type": "service_account", "client_email": "a@b", "private_key": key, "token_uri": tokenURL})
	creds, err := credentials.NewCredentialsFromJSON(credentials.ServiceAccount, b, &credentials.DetectOptions{Scopes: []string{storage.ScopeFullControl}})
	require.NoError(t, err)
	return creds
}

// What never passes ends a call at once, over HTTP and gRPC.
func TestNeverPasses(t *testing.T) {
	f := newFakeGCS(t)
	private, err := rsa.GenerateKey(rand.Reader, 1024)
	require.NoError(t, err)
	key := string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(private)}))
	issuer := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(map[string]int{"/400": 400, "/401": 401, "/403": 403, "/unknown": 401}[r.URL.Path])
		io.WriteString(w, map[string]string{
			"/400":     `{"error":"invalid_grant","error_description":"Invalid JWT Signature."}`,
			"/unknown": `{"error":"a code that nobody has met"}`,
		}[r.URL.Path])
	}))
	defer issuer.Close()
	secure := httptest.NewUnstartedServer(f.Handler())
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	secure.EnableHTTP2 = true
	secure.StartTLS()
	defer secure.Close()
	address := strings.TrimPrefix(secure.URL, "https://")

	overHTTP := func(endpoint string) *Storage {
		client := &http.Client{Transport: new(http.Transport)}
		return storageOf(t)(storage.NewClient(t.Context(), option.WithHTTPClient(client), option.WithEndpoint(endpoint+"/storage/v1/")))
	}
	tls := grpc.WithTransportCredentials(grpccredentials.NewTLS(nil))
	nothing := func() error { return nil }
	nameless := f.Register("nameless")
	nameless.ConnectGRPC()
	user, err := auth.New3LOTokenProvider(&auth.Options3LO{ClientID: "a", ClientSecret: "b", RefreshToken: "c",
		AuthURL: issuer.URL, TokenURL: issuer.URL + "/unknown", AuthStyle: auth.StyleInParams})
	require.NoError(t, err)
	both := func(key, path string) []*Storage {
		creds := serviceAccount(t, key, issuer.URL+path)
		return []*Storage{authorized(t, f, creds), f.overGRPC(t, nothing, grpc.WithPerRPCCredentials(tokenOf{creds}))}
	}
	for name, storages := range map[string][]*Storage{
		"certificate":   {overHTTP(secure.URL), overConn(t, address, tls)},
		"scheme":        {overHTTP("htp://" + address), overConn(t, "htp://"+address, tls)},
		"invalid_grant": both(key, "/400"),
		"issuer's 401":  both(key, "/401"),
		"issuer's 403":  both(key, "/403"),
		"unknown code":  {authorized(t, f, auth.NewCredentials(&auth.CredentialsOptions{TokenProvider: user}))}, // over gRPC the 401 is lost
		"key":           both("no key", ""),
		"bucket":        {NewStorage(f.Machine("a").Client.Bucket("")), NewStorage(nameless.Client.Bucket(""))},
	} {
		t.Run(name, func(t *testing.T) {
			for _, s := range storages {
				for op, call := range everyCall(s) {
					start := time.Now()
					require.Error(t, call(within(t, 5*time.Second)), op)
					require.Less(t, time.Since(start), time.Second, op)
				}
			}
		})
	}
}
