package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"cloud.google.com/go/storage"

	"github.com/athensgcs/gcs"
)

// demo shows what the proxy does.
type demo struct {
	out        io.Writer
	store      *gcs.Storage
	downloaded []download // by the first pass
}

// downloadTwice downloads modules through the proxy twice: from wherever they
// come, and then from the bucket alone.
func (d *demo) downloadTwice(ctx context.Context, modules []string) (err error) {
	fmt.Fprintf(d.out, "1. go mod download %s\n\n", strings.Join(modules, " "))
	if d.downloaded, err = d.pass(ctx, newProxy(d.store), modules); err != nil {
		return err
	}
	fmt.Fprintf(d.out, "\n2. The bucket now holds\n\n")
	if err := d.printStates(ctx, d.downloaded, gcs.Complete); err != nil {
		return err
	}
	fmt.Fprintf(d.out, "\n3. The same download, from the bucket alone\n\n")
	offline := newProxy(d.store)
	offline.offline = true
	if err := d.passAgain(ctx, offline, d.downloaded); err != nil {
		return err
	}
	fmt.Fprintln(d.out, "\nBoth downloads have the same checksums.")
	return nil
}

// heal breaks a version, and downloads it once more.
func (d *demo) heal(ctx context.Context, bucket *storage.BucketHandle) error {
	broken := d.downloaded[:1]
	fmt.Fprintf(d.out, "\n4. What an upload that fails halfway leaves: .info and .zip deleted\n\n")
	for _, ext := range []string{".info", ".zip"} {
		if err := bucket.Object(broken[0].Path + "/@v/" + broken[0].Version + ext).Delete(ctx); err != nil {
			return err
		}
	}
	if err := d.printStates(ctx, broken, gcs.Partial); err != nil {
		return err
	}
	fmt.Fprintf(d.out, "\n5. The same download, with nothing done by hand\n\n")
	if err := d.passAgain(ctx, newProxy(d.store), broken); err != nil {
		return err
	}
	fmt.Fprintln(d.out)
	if err := d.printStates(ctx, broken, gcs.Complete); err != nil {
		return err
	}
	fmt.Fprintln(d.out, "\nIt has the same checksums as before.")
	return nil
}

// passAgain is pass for versions that an earlier pass found: what "latest" or a
// branch means is for the upstream to say.
func (d *demo) passAgain(ctx context.Context, p *proxy, versions []download) error {
	var modules []string
	sums := map[string]string{}
	for _, v := range versions {
		modules = append(modules, v.String())
		sums[v.String()] = v.Sum + v.GoModSum
	}
	got, err := d.pass(ctx, p, modules)
	if err != nil {
		return err
	}
	for _, v := range got {
		if sums[v.String()] != v.Sum+v.GoModSum {
			return fmt.Errorf("%s: other checksums than before", v)
		}
	}
	return nil
}

// pass has the go command download modules through p into an empty module
// cache, and prints what that cost.
func (d *demo) pass(ctx context.Context, p *proxy, modules []string) ([]download, error) {
	dir, err := os.MkdirTemp("", "goproxy-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer l.Close()

	var mu sync.Mutex
	var entries []entry
	p.report = func(e entry) {
		mu.Lock()
		defer mu.Unlock()
		entries = append(entries, e)
	}
	serving, stop := context.WithCancel(ctx)
	defer stop()
	served := make(chan error, 1)
	go func() { served <- serve(serving, l, p) }()

	got, err := modDownload(ctx, dir, append(goEnv(dir),
		"GOPROXY=http://"+address(l),
		"GONOPROXY=none", // private modules too
		// The download for the proxy was checked against the checksum database,
		// if the user's environment asks for it.
		"GOSUMDB=off",
	), modules...)
	stop()
	// Once the server has stopped, every request has its entry.
	if err := errors.Join(err, <-served); err != nil {
		return nil, err
	}
	d.printCosts(entries)
	return got, nil
}

// table returns a writer of rows whose cells end with tabs, the last one apart.
func (d *demo) table() *tabwriter.Writer {
	return tabwriter.NewWriter(d.out, 0, 0, 2, ' ', tabwriter.AlignRight)
}

// printStates prints what the bucket has of versions, which has to be in the
// state want.
func (d *demo) printStates(ctx context.Context, versions []download, want gcs.State) error {
	w := d.table()
	fmt.Fprintln(w, "state\tsize\tmissing\t  version")
	for _, v := range versions {
		var found gcs.VersionStatus
		for status, err := range d.store.Scan(ctx, v.Path) {
			if err != nil {
				return err
			}
			if status.Version == v.Version {
				found = status
			}
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t  %s\n", found.State, size(found.Size), strings.Join(found.Missing, ", "), v)
		if found.State != want {
			return errors.Join(w.Flush(), fmt.Errorf("%s is %s, not %s", v, found.State, want))
		}
	}
	return w.Flush()
}

// printCosts prints a row for each request to the proxy, with a column for each
// kind of request that was made to the bucket.
func (d *demo) printCosts(entries []entry) {
	total := entry{path: "total", cost: new(cost)}
	for _, e := range entries {
		total.elapsed += e.elapsed
		total.cost.add(e.cost)
	}
	w := d.table()
	for kind, name := range kindNames {
		if total.cost.requests[kind].Load() > 0 {
			fmt.Fprintf(w, "%s\t", name)
		}
	}
	fmt.Fprintln(w, "sent\treceived\ttime\t  request")
	for _, e := range append(entries, total) {
		for kind := range kinds {
			if total.cost.requests[kind].Load() > 0 {
				fmt.Fprintf(w, "%d\t", e.cost.requests[kind].Load())
			}
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t  %s\n",
			size(e.cost.sent.Load()), size(e.cost.received.Load()), duration(e.elapsed), e.path)
	}
	w.Flush()
}

func size(n int64) string {
	switch {
	case n < 1000:
		return fmt.Sprintf("%d B", n)
	case n < 1000_000:
		return fmt.Sprintf("%.1f kB", float64(n)/1000)
	}
	return fmt.Sprintf("%.1f MB", float64(n)/1000_000)
}

func duration(d time.Duration) string {
	if d < time.Second {
		return fmt.Sprintf("%.1f ms", d.Seconds()*1000)
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}
