// Goproxy is a small Go module proxy that keeps its modules in a Google Cloud
// Storage bucket.
//
//	goproxy [-bucket NAME] [-addr HOST:PORT]
//	goproxy [-bucket NAME] MODULE@VERSION...
//
// Without -bucket the bucket is an emulated one, in memory. A module that the
// bucket does not have is downloaded with the go command, from wherever GOPROXY
// says, saved and served.
//
// Given modules, it does not stay: it has the go command download them through
// the proxy, shows what the bucket then holds and what each request cost, and
// downloads them once more from the bucket alone.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"cloud.google.com/go/storage"
	"google.golang.org/api/option"
	transport "google.golang.org/api/transport/http"

	"github.com/athensgcs/gcs"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second interrupt does not wait
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "goproxy:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, out io.Writer) error {
	flags := flag.NewFlagSet("goproxy", flag.ContinueOnError)
	name := flags.String("bucket", "", "`name` of a GCS bucket (default an emulated one, in memory)")
	addr := flags.String("addr", "127.0.0.1:3000", "`address` to listen on")
	if err := flags.Parse(args); err != nil {
		return err
	}
	client, err := newClient(ctx, *name)
	if err != nil {
		return err
	}
	defer client.Close()
	if *name == "" {
		*name = emulated
	}
	bucket := client.Bucket(*name)
	if flags.NArg() > 0 {
		return demo(ctx, out, bucket, flags.Args())
	}

	l, err := net.Listen("tcp", *addr)
	if err != nil {
		return err
	}
	defer l.Close()
	if err := checkUpstream(ctx, l); err != nil {
		return err
	}
	fmt.Fprintf(out, "bucket %s; use it with GOPROXY=%s go get MODULE\n", *name, address(l))
	return serve(ctx, l, &proxy{store: gcs.NewStorage(bucket)}, func(e entry) { fmt.Fprintln(out, e) })
}

// emulated is the name of the bucket in memory.
const emulated = "emulated"

// newClient returns a client whose requests are metered. Without a bucket's
// name it is one of an emulator.
func newClient(ctx context.Context, bucket string) (*storage.Client, error) {
	var next http.RoundTripper
	var err error
	if bucket == "" {
		next, err = newEmulator(emulated)
	} else {
		credentials := option.WithScopes(storage.ScopeFullControl)
		if os.Getenv("STORAGE_EMULATOR_HOST") != "" {
			credentials = option.WithoutAuthentication()
		}
		next, err = transport.NewTransport(ctx, http.DefaultTransport, credentials)
	}
	if err != nil {
		return nil, err
	}
	return storage.NewClient(ctx, option.WithHTTPClient(&http.Client{Transport: meter{next}}))
}

// serve serves until ctx ends. Requests on their way then have a few seconds to
// finish; after that they and their downloads are stopped, and a save that was
// under way gives its version up.
func serve(ctx context.Context, l net.Listener, p *proxy, report func(entry)) error {
	var stop context.CancelFunc
	p.ctx, stop = context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	server := &http.Server{
		Handler:           record(p, report),
		BaseContext:       func(net.Listener) context.Context { return p.ctx },
		ReadHeaderTimeout: 10 * time.Second,
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	err := shutdown(server)
	if err != nil {
		stop()
		err = shutdown(server)
	}
	<-served
	return err
}

func shutdown(server *http.Server) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return server.Shutdown(ctx)
}

// checkUpstream refuses to serve when the go command would fetch from this very
// proxy: every miss would come back to it as another one.
func checkUpstream(ctx context.Context, l net.Listener) error {
	out, err := goCommand(ctx, "", nil, "env", "GOPROXY")
	if err != nil {
		return err
	}
	_, port, _ := net.SplitHostPort(l.Addr().String())
	for _, upstream := range strings.FieldsFunc(string(out), func(r rune) bool { return strings.ContainsRune(",|\n", r) }) {
		u, err := url.Parse(upstream)
		if err != nil || u.Port() != port {
			continue
		}
		if ip := net.ParseIP(u.Hostname()); u.Hostname() == "localhost" || ip.IsLoopback() || ip.IsUnspecified() {
			return fmt.Errorf("GOPROXY is this proxy itself (%s); set it to where modules come from", upstream)
		}
	}
	return nil
}

func address(l net.Listener) string {
	host, port, _ := net.SplitHostPort(l.Addr().String())
	if net.ParseIP(host).IsUnspecified() {
		host = "localhost"
	}
	return "http://" + net.JoinHostPort(host, port)
}
