package main

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync/atomic"
	"time"
)

// The kinds of request to a bucket.
const (
	list = iota
	get
	put
	patch // of metadata
	remove
	kinds
)

var kindNames = [kinds]string{"list", "get", "put", "patch", "delete"}

// cost counts the requests to the bucket that were made on behalf of one
// request to the proxy.
type cost struct {
	requests       [kinds]atomic.Int64
	sent, received atomic.Int64 // bytes
}

func (c *cost) add(other *cost) {
	for kind := range kinds {
		c.requests[kind].Add(other.requests[kind].Load())
	}
	c.sent.Add(other.sent.Load())
	c.received.Add(other.received.Load())
}

type costKey struct{}

// meter counts requests into the cost that their context carries.
type meter struct{ next http.RoundTripper }

func (m meter) RoundTrip(req *http.Request) (*http.Response, error) {
	c, ok := req.Context().Value(costKey{}).(*cost)
	if !ok {
		return m.next.RoundTrip(req)
	}
	c.requests[kindOf(req)].Add(1)
	if req.Body != nil {
		req = req.Clone(req.Context())
		req.Body = counted{req.Body, &c.sent}
	}
	resp, err := m.next.RoundTrip(req)
	if err == nil {
		resp.Body = counted{resp.Body, &c.received}
	}
	return resp, err
}

func kindOf(req *http.Request) int {
	switch req.Method {
	case http.MethodGet, http.MethodHead:
		if strings.HasSuffix(req.URL.Path, "/o") {
			return list
		}
		return get
	case http.MethodPatch:
		return patch
	case http.MethodDelete:
		return remove
	}
	return put
}

type counted struct {
	io.ReadCloser
	n *atomic.Int64
}

func (c counted) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	c.n.Add(int64(n))
	return n, err
}

// entry is one request to the proxy.
type entry struct {
	path    string
	status  int
	err     error // why it failed
	elapsed time.Duration
	cost    *cost
}

// log writes the entry as one line, whatever its path holds.
func (e entry) log(l *slog.Logger) {
	args := []any{"status", e.status, "path", e.path, "took", duration(e.elapsed)}
	for kind, name := range kindNames {
		if n := e.cost.requests[kind].Load(); n > 0 {
			args = append(args, name, n)
		}
	}
	if e.err != nil {
		args = append(args, "error", e.err)
	}
	level := slog.LevelInfo
	if e.status >= http.StatusInternalServerError {
		level = slog.LevelError
	}
	l.Log(context.Background(), level, "request", args...)
}
