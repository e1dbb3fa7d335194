// Goproxy is a small Go module proxy that keeps its modules in a Google Cloud
// Storage bucket.
//
//	goproxy [-bucket NAME | -emulator HOST:PORT] [-addr HOST:PORT]
//	goproxy [-bucket NAME | -emulator HOST:PORT] MODULE@VERSION...
//
// Without -bucket the bucket is an emulated one, in memory. A module that the
// bucket does not have is downloaded with the go command, from wherever GOPROXY
// says, saved and served. -emulator serves the emulated bucket to other programs.
//
// Given modules, it does not stay: it has the go command download them through
// the proxy, shows what the bucket then holds and what each request cost, and
// downloads them once more from the bucket alone. In the emulated bucket it then
// breaks a version as a failed upload does, and shows that the next download
// repairs it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"cloud.google.com/go/storage"
	"golang.org/x/mod/module"
	"google.golang.org/api/option"
	transport "google.golang.org/api/transport/http"

	"github.com/athensgcs/gcs"
	"github.com/athensgcs/gcs/internal/fakegcs"
)

const usage = `usage: goproxy [-bucket NAME | -emulator HOST:PORT] [-addr HOST:PORT]
       goproxy [-bucket NAME | -emulator HOST:PORT] MODULE@VERSION...

Serves Go modules out of a bucket. Given modules, it shows how, and exits.

`

// usageError is an error in the arguments.
type usageError struct{ error }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second interrupt does not wait
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "goproxy:", err)
		if _, ok := errors.AsType[usageError](err); ok {
			os.Exit(2)
		}
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, out io.Writer) error {
	flags := flag.NewFlagSet("goproxy", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // main prints the error
	name := flags.String("bucket", "", "`name` of a GCS bucket (default an emulated one, in memory)")
	addr := flags.String("addr", "127.0.0.1:3000", "`address` to listen on")
	emulator := flags.String("emulator", "", "`address` to serve the emulated bucket on, for the STORAGE_EMULATOR_HOST of other programs")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		fmt.Fprint(out, usage)
		flags.SetOutput(out)
		flags.PrintDefaults()
		return nil
	} else if err != nil {
		return usageError{err}
	}
	if err := checkModules(flags.Args()); err != nil {
		return usageError{err}
	}
	if *name != "" && *emulator != "" {
		return usageError{errors.New("-emulator serves the bucket in memory, not that of -bucket")}
	}

	var fake *fakegcs.Server // nil if the bucket is not emulated
	if *name == "" {
		fake, *name = newEmulator(), fakegcs.Bucket
		defer fake.Close()
	}
	client, err := newClient(ctx, fake)
	if err != nil {
		return err
	}
	defer client.Close()
	if *emulator != "" {
		stop, err := serveEmulator(out, fake, *emulator)
		if err != nil {
			return err
		}
		defer stop()
	}

	log := slog.New(slog.NewTextHandler(out, nil))
	if flags.NArg() > 0 {
		log = slog.New(slog.DiscardHandler)
	}
	bucket := client.Bucket(*name)
	store := gcs.NewStorage(bucket, gcs.WithLogger(log))
	if err := store.Check(ctx); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		d := demo{out: out, store: store}
		if err := d.downloadTwice(ctx, flags.Args()); err != nil || fake == nil {
			return err
		}
		return d.heal(ctx, bucket)
	}

	l, err := net.Listen("tcp", *addr)
	if err != nil {
		return err
	}
	defer l.Close()
	upstreams, err := upstreamProxies(ctx, l)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "bucket %s; use it with GOPROXY=http://%s go get MODULE\n", *name, address(l))
	p := newProxy(store)
	p.upstreams, p.report = upstreams, func(e entry) { e.log(log) }
	return serve(ctx, l, p)
}

// checkModules returns an error if an argument is not MODULE@VERSION.
func checkModules(args []string) error {
	for _, arg := range args {
		path, version, _ := strings.Cut(arg, "@")
		if err := module.CheckPath(path); err != nil {
			return err
		}
		if version == "" {
			return fmt.Errorf("%s: no version; the newest is %[1]s@latest", path)
		}
	}
	return nil
}

// newEmulator returns a bucket in memory that holds nothing but its objects.
func newEmulator() *fakegcs.Server {
	fake := fakegcs.New()
	fake.DiscardLog()
	return fake
}

// serveEmulator serves the emulated bucket to other programs until stop is called.
func serveEmulator(out io.Writer, fake *fakegcs.Server, addr string) (stop func() error, err error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	server := &http.Server{Handler: fake.Handler(), ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = server.Serve(l) }() // until Close
	fmt.Fprintf(out, "bucket %s is at STORAGE_EMULATOR_HOST=%s\n", fakegcs.Bucket, address(l))
	return server.Close, nil
}

// newClient returns a client whose requests are metered. They go to fake, if
// there is one.
func newClient(ctx context.Context, fake *fakegcs.Server) (*storage.Client, error) {
	var next http.RoundTripper
	if fake != nil {
		next = fake.Register("goproxy")
	} else {
		credentials := option.WithScopes(storage.ScopeFullControl)
		if os.Getenv("STORAGE_EMULATOR_HOST") != "" {
			credentials = option.WithoutAuthentication()
		}
		var err error
		if next, err = transport.NewTransport(ctx, http.DefaultTransport, credentials); err != nil {
			return nil, err
		}
	}
	return storage.NewClient(ctx, option.WithHTTPClient(&http.Client{Transport: meter{next}}))
}

// serve serves until ctx ends. Requests on their way then have a few seconds to
// finish; after that they and their downloads are stopped, and a save that was
// under way gives its version up.
func serve(ctx context.Context, l net.Listener, p *proxy) error {
	var stop context.CancelFunc
	p.ctx, stop = context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	server := &http.Server{
		Handler:           p,
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

// upstreamProxies returns the URLs of the proxies that the go command asks. One
// of them being this very proxy is an error: every miss would come back to it as
// another one.
func upstreamProxies(ctx context.Context, l net.Listener) (urls []string, err error) {
	out, err := goCommand(ctx, "", nil, "env", "GOPROXY")
	if err != nil {
		return nil, err
	}
	_, port, _ := net.SplitHostPort(l.Addr().String())
	for _, upstream := range strings.FieldsFunc(string(out), func(r rune) bool { return strings.ContainsRune(",|\n", r) }) {
		if upstream == "direct" || upstream == "off" {
			break // the go command asks nobody after these
		}
		u, err := url.Parse(upstream)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" {
			continue
		}
		ip := net.ParseIP(u.Hostname())
		if u.Port() == port && (u.Hostname() == "localhost" || ip.IsLoopback() || ip.IsUnspecified()) {
			return nil, fmt.Errorf("GOPROXY is this proxy itself (%s); set it to where modules come from", upstream)
		}
		urls = append(urls, strings.TrimSuffix(upstream, "/"))
	}
	return urls, nil
}

func address(l net.Listener) string {
	host, port, _ := net.SplitHostPort(l.Addr().String())
	if net.ParseIP(host).IsUnspecified() {
		host = "localhost"
	}
	return net.JoinHostPort(host, port)
}
