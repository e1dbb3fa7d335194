package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/module"
	"golang.org/x/mod/semver"
	"golang.org/x/sync/singleflight"

	"github.com/athensgcs/gcs"
)

// fetchTimeout bounds one download from the upstream, saving included.
const fetchTimeout = 10 * time.Minute

// proxy speaks the GOPROXY protocol out of a bucket, and fetches what the
// bucket does not have.
type proxy struct {
	store   *gcs.Storage
	offline bool            // never ask the upstream
	ctx     context.Context // ends the fetches

	flight singleflight.Group
}

func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
		return
	}
	if err := p.serve(w, r); err != nil {
		// The go command takes 404 for "go on looking", and anything else for
		// a reason to stop; it shows the text to the user.
		status := http.StatusInternalServerError
		var missing notFound
		if errors.As(err, &missing) || gcs.Is(err, gcs.KindNotFound) || gcs.Is(err, gcs.KindBadRequest) {
			status = http.StatusNotFound
		}
		http.Error(w, err.Error(), status)
	}
}

func (p *proxy) serve(w http.ResponseWriter, r *http.Request) error {
	ctx := r.Context()
	path := strings.TrimPrefix(r.URL.Path, "/")
	escaped, file, ok := strings.Cut(path, "/@v/")
	if !ok {
		if escaped, ok = strings.CutSuffix(path, "/@latest"); !ok {
			return notFound("not found: " + r.URL.Path)
		}
		file = "latest.info"
	}
	mod, err := module.UnescapePath(escaped)
	if err != nil {
		return notFound(err.Error())
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
		if _, err := io.Copy(w, zip); err != nil {
			panic(http.ErrAbortHandler) // too late for a status: cut the connection
		}
		return nil
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

// fetch brings a version into the bucket. Requests that miss the same version
// share one download, which is why it does not end with the request that
// started it.
func (p *proxy) fetch(ctx context.Context, mod, version string) error {
	_, err, _ := p.flight.Do(mod+"@"+version, func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), fetchTimeout)
		defer cancel()
		defer context.AfterFunc(p.ctx, cancel)()
		return nil, fetch(ctx, p.store, mod, version)
	})
	return err
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
