package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/module"
	"golang.org/x/mod/semver"

	"github.com/athensgcs/gcs"
)

// relative are the queries that mean nothing without a main module, or nothing at all.
var relative = []string{"none", "patch", "upgrade"}

// fetchTimeout bounds one download from the upstream, saving included.
const fetchTimeout = 10 * time.Minute

var errMethod = errors.New("method not allowed")

// proxy speaks the GOPROXY protocol out of a bucket, and fetches what the
// bucket does not have.
type proxy struct {
	store     *gcs.Storage
	upstreams []string        // URLs of proxies, for the checksum databases
	offline   bool            // never ask the upstream
	report    func(entry)     // called after every request
	ctx       context.Context // ends the fetches

	flight gcs.Stasher // fetches
}

func newProxy(store *gcs.Storage) *proxy {
	p := &proxy{store: store}
	p.flight = store.SingleFlight(p)
	return p
}

func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	e, start := entry{path: strings.TrimPrefix(r.URL.Path, "/"), cost: new(cost)}, time.Now()
	defer func() {
		e.elapsed = time.Since(start)
		p.report(e)
	}()
	e.err = p.serve(w, r.WithContext(context.WithValue(r.Context(), costKey{}, e.cost)))
	if e.status = statusOf(e.err); e.status == http.StatusOK {
		return
	}
	if errors.Is(e.err, http.ErrAbortHandler) {
		panic(http.ErrAbortHandler) // too late for a status: cut the connection
	}
	http.Error(w, e.err.Error(), e.status)
}

// statusOf returns the status of an answer. The go command takes 404 for "go on
// looking", and anything else for a reason to stop; it shows the text to the user.
func statusOf(err error) int {
	var missing notFound
	switch {
	case err == nil:
		return http.StatusOK
	case errors.Is(err, errMethod):
		return http.StatusMethodNotAllowed
	case errors.As(err, &missing), gcs.Is(err, gcs.KindNotFound), gcs.Is(err, gcs.KindBadRequest):
		return http.StatusNotFound
	}
	return http.StatusInternalServerError
}

func (p *proxy) serve(w http.ResponseWriter, r *http.Request) error {
	ctx := r.Context()
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return errMethod
	}
	if strings.HasPrefix(r.URL.Path, "/sumdb/") {
		return p.serveSumDB(w, r)
	}
	name := strings.TrimPrefix(r.URL.Path, "/")
	escaped, file, ok := strings.Cut(name, "/@v/")
	if !ok {
		if escaped, ok = strings.CutSuffix(name, "/@latest"); !ok {
			return notFound("not found: " + r.URL.Path)
		}
		file = "latest.info"
	}
	mod, err := module.UnescapePath(escaped)
	if err != nil {
		return notFound(err.Error())
	}
	if strings.Contains(mod, "...") {
		return notFound("not found: " + mod + " is a pattern")
	}
	if file == "list" {
		return p.serveList(ctx, w, mod)
	}
	dot := strings.LastIndexByte(file, '.')
	if dot < 0 {
		return notFound("not found: " + r.URL.Path)
	}
	version, err := module.UnescapeVersion(file[:dot])
	if err != nil {
		return notFound(err.Error())
	}
	if strings.HasPrefix(version, "-") || slices.Contains(relative, version) {
		return notFound("not found: " + version + " is no version")
	}
	ext := file[dot:]
	if ext == ".info" && module.CanonicalVersion(version) != version {
		if version, err = p.resolve(ctx, mod, version); err != nil {
			return err
		}
	}
	if err := module.Check(mod, version); err != nil {
		return notFound(err.Error())
	}
	return p.serveFile(ctx, w, mod, version, ext)
}

// serveFile serves a file out of the bucket, after a fetch if need be.
func (p *proxy) serveFile(ctx context.Context, w http.ResponseWriter, mod, version, ext string) error {
	err := p.copyFile(ctx, w, mod, version, ext)
	if !gcs.Is(err, gcs.KindNotFound) || p.offline {
		return err
	}
	if err := p.fetch(ctx, mod, version); err != nil {
		return err
	}
	return p.copyFile(ctx, w, mod, version, ext)
}

func (p *proxy) copyFile(ctx context.Context, w http.ResponseWriter, mod, version, ext string) error {
	switch ext {
	case ".info":
		info, err := p.store.Info(ctx, mod, version)
		return answer(w, "application/json", info, err)
	case ".mod":
		gomod, err := p.store.GoMod(ctx, mod, version)
		return answer(w, "text/plain; charset=utf-8", gomod, err)
	case ".zip":
		zip, err := p.store.Zip(ctx, mod, version)
		if err != nil {
			return err
		}
		defer zip.Close()
		w.Header().Set("Content-Type", "application/zip")
		w.Header().Set("Content-Length", strconv.FormatInt(zip.Size(), 10))
		return copyBody(w, zip)
	}
	return notFound("not found: no " + ext + " files here")
}

func answer(w http.ResponseWriter, contentType string, data []byte, err error) error {
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", contentType)
	_, _ = w.Write(data) // a client that left needs no answer
	return nil
}

// copyBody copies a body to the client, after which an error is too late for a
// status.
func copyBody(w http.ResponseWriter, body io.Reader) error {
	if _, err := io.Copy(w, body); err != nil {
		return fmt.Errorf("%w: %w", http.ErrAbortHandler, err)
	}
	return nil
}

// serveSumDB passes a request for a checksum database on to the first upstream
// proxy that has an answer, as the go command does with several proxies.
func (p *proxy) serveSumDB(w http.ResponseWriter, r *http.Request) error {
	if path.Clean(r.URL.Path) != r.URL.Path {
		return notFound("not found: " + r.URL.Path) // no way out of /sumdb/
	}
	for _, upstream := range p.upstreams {
		req, err := http.NewRequestWithContext(r.Context(), http.MethodGet, upstream+r.URL.EscapedPath(), nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		switch resp.StatusCode {
		case http.StatusOK:
			w.Header().Set("Content-Type", resp.Header.Get("Content-Type"))
			return copyBody(w, resp.Body)
		case http.StatusNotFound, http.StatusGone:
		default:
			return fmt.Errorf("%s: %s", resp.Request.URL.Redacted(), resp.Status)
		}
	}
	return notFound("not found: no upstream proxy has " + r.URL.Path)
}

// fetch brings a version into the bucket. Requests that miss the same version share one
// download, on all proxies that share the bucket. So it does not end with the request
// that started it.
func (p *proxy) fetch(ctx context.Context, mod, version string) error {
	_, err := p.flight.Stash(context.WithoutCancel(ctx), mod, version)
	return err
}

// Stash downloads and saves a version. The single flight calls it.
func (p *proxy) Stash(ctx context.Context, mod, version string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	defer context.AfterFunc(p.ctx, cancel)()
	return version, fetch(ctx, p.store, mod, version)
}

// serveList lists what the upstream has and what the bucket has, which may be
// more: upstreams forget versions.
func (p *proxy) serveList(ctx context.Context, w http.ResponseWriter, mod string) error {
	versions, err := p.store.List(ctx, mod)
	if err != nil {
		return err
	}
	var known []string
	if p.offline {
		err = notFound("not found: no version of " + mod + " in the bucket")
	} else {
		_, known, err = query(ctx, mod, "latest")
	}
	if err != nil && len(versions) == 0 {
		return err
	}
	versions = append(versions, known...)
	// A list holds released versions only, as the protocol has it.
	versions = slices.DeleteFunc(versions, module.IsPseudoVersion)
	semver.Sort(versions)
	var list strings.Builder
	for _, v := range slices.Compact(versions) {
		fmt.Fprintln(&list, v)
	}
	return answer(w, "text/plain; charset=utf-8", []byte(list.String()), nil)
}

// resolve says which version a query means. Of the queries, only "latest" can
// be answered out of the bucket when the upstream cannot.
func (p *proxy) resolve(ctx context.Context, mod, q string) (string, error) {
	var err error = notFound("not found: " + mod + "@" + q + " is for the upstream to resolve")
	if !p.offline {
		var version string
		if version, _, err = query(ctx, mod, q); err == nil {
			return version, nil
		}
	}
	if q != "latest" {
		return "", err
	}
	versions, listErr := p.store.List(ctx, mod)
	if listErr != nil || len(versions) == 0 {
		return "", errors.Join(err, listErr)
	}
	return slices.MaxFunc(versions, compareForLatest), nil
}

// compareForLatest orders versions as the go command does for "latest":
// releases before pre-releases, these before pseudo-versions.
func compareForLatest(a, b string) int {
	rank := func(v string) int {
		switch {
		case module.IsPseudoVersion(v):
			return 0
		case semver.Prerelease(v) != "":
			return 1
		}
		return 2
	}
	if d := rank(a) - rank(b); d != 0 {
		return d
	}
	return semver.Compare(a, b)
}
