package main

import (
	"context"
	"fmt"
	"io"
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
	elapsed time.Duration
	cost    *cost
}

func (e entry) String() string {
	var requests []string
	for kind, name := range kindNames {
		if n := e.cost.requests[kind].Load(); n > 0 {
			requests = append(requests, fmt.Sprintf("%d %s", n, name))
		}
	}
	return fmt.Sprintf("%d %s %s (%s)", e.status, e.path, duration(e.elapsed), strings.Join(requests, ", "))
}

// record reports every request that h has served, and its cost.
func record(h http.Handler, report func(entry)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, start := new(cost), time.Now()
		sw := &statusWriter{w, http.StatusOK}
		defer func() { report(entry{strings.TrimPrefix(r.URL.Path, "/"), sw.status, time.Since(start), c}) }()
		h.ServeHTTP(sw, r.WithContext(context.WithValue(r.Context(), costKey{}, c)))
	})
}

type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}
