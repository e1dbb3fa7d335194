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
	"time"

	"cloud.google.com/go/storage"
	"google.golang.org/api/iterator"

	"github.com/athensgcs/gcs"
)

// demo downloads modules through the proxy twice: from wherever they come, and
// then from the bucket alone.
func demo(ctx context.Context, out io.Writer, bucket *storage.BucketHandle, modules []string) error {
	store := gcs.NewStorage(bucket)

	fmt.Fprintf(out, "1. go mod download %s\n\n", strings.Join(modules, " "))
	first, err := pass(ctx, out, &proxy{store: store}, modules)
	if err != nil {
		return err
	}

	fmt.Fprintf(out, "\n2. The bucket now holds\n\n")
	for _, d := range first {
		if err := printObjects(ctx, out, bucket, d.Path+"/@v/"+d.Version+"."); err != nil {
			return err
		}
	}

	// The versions that the first pass found: what "latest" or a branch means
	// is for the upstream to say.
	var found []string
	sums := map[string]string{}
	for _, d := range first {
		id := d.Path + "@" + d.Version
		found = append(found, id)
		sums[id] = d.Sum + d.GoModSum
	}
	fmt.Fprintf(out, "\n3. The same download, from the bucket alone\n\n")
	second, err := pass(ctx, out, &proxy{store: store, offline: true}, found)
	if err != nil {
		return err
	}
	for _, d := range second {
		if id := d.Path + "@" + d.Version; sums[id] != d.Sum+d.GoModSum {
			return fmt.Errorf("%s: other checksums from the bucket than before", id)
		}
	}
	fmt.Fprintln(out, "\nBoth downloads have the same checksums.")
	return nil
}

// pass has the go command download modules through p into an empty module
// cache, and prints what that cost.
func pass(ctx context.Context, out io.Writer, p *proxy, modules []string) ([]download, error) {
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
	serving, stop := context.WithCancel(ctx)
	defer stop()
	served := make(chan error, 1)
	go func() {
		served <- serve(serving, l, p, func(e entry) {
			mu.Lock()
			defer mu.Unlock()
			entries = append(entries, e)
		})
	}()

	got, err := modDownload(ctx, dir, append(goEnv(dir),
		"GOPROXY="+address(l),
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
	printCosts(out, entries)
	return got, nil
}

// printCosts prints a line for each request to the proxy, with a column for
// each kind of request that was made to the bucket.
func printCosts(out io.Writer, entries []entry) {
	total, width := entry{path: "total", cost: new(cost)}, 0
	for _, e := range entries {
		width = max(width, len(e.path))
		total.elapsed += e.elapsed
		total.cost.sent.Add(e.cost.sent.Load())
		total.cost.received.Add(e.cost.received.Load())
		for kind := range kinds {
			total.cost.requests[kind].Add(e.cost.requests[kind].Load())
		}
	}
	fmt.Fprintf(out, "   %-*s", width, "request")
	for kind, name := range kindNames {
		if total.cost.requests[kind].Load() > 0 {
			fmt.Fprintf(out, " %s", name)
		}
	}
	fmt.Fprintf(out, " %8s %8s %8s\n", "sent", "received", "time")
	for _, e := range append(entries, total) {
		fmt.Fprintf(out, "   %-*s", width, e.path)
		for kind, name := range kindNames {
			if total.cost.requests[kind].Load() > 0 {
				fmt.Fprintf(out, " %*d", len(name), e.cost.requests[kind].Load())
			}
		}
		fmt.Fprintf(out, " %8s %8s %8s\n",
			size(e.cost.sent.Load()), size(e.cost.received.Load()), duration(e.elapsed))
	}
}

func printObjects(ctx context.Context, out io.Writer, bucket *storage.BucketHandle, prefix string) error {
	objects := bucket.Objects(ctx, &storage.Query{Prefix: prefix})
	for {
		attrs, err := objects.Next()
		if err == iterator.Done {
			return nil
		}
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "%12s  %s\n", size(attrs.Size), attrs.Name)
	}
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
