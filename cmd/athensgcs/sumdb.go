package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/googleapis/gax-go/v2"
	"golang.org/x/mod/module"
	"golang.org/x/mod/sumdb"
	"golang.org/x/mod/sumdb/note"
)

// sumGolangOrg is the key of sum.golang.org, which the go command has built in.
const sumGolangOrg = "sum.golang.org+033de0ae+Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8"

const (
	// lookupTimeout bounds a request to a checksum database.
	lookupTimeout = 30 * time.Second
	// lookupTries is how often a request that fails is made.
	lookupTries = 3
	// clientLookups is how many versions one client looks up. A client keeps
	// all that it has read, some 10 KB a version.
	clientLookups = 1000
)

// A database is a checksum database, and the operations of its clients.
type database struct {
	ctx       context.Context // of the requests; the operations have no parameter for it
	http      http.Client
	key       string
	server    string // its name
	base      string // its URL, or a proxy's for it
	gonosumdb string

	mu      sync.Mutex
	client  *sumdb.Client
	left    int               // lookups before the next client
	latest  []byte            // signed tree
	unknown map[string]string // what a lookup was told that found nothing, by path
	forged  string            // what shows that the database is; "" while nothing does
}

// references returns what the flags say to compare with.
func (p *program) references(ctx context.Context) ([]reference, error) {
	var references []reference
	if p.sums != "" {
		g, err := readGoSum(p.sums)
		if err != nil {
			return nil, err
		}
		references = append(references, g)
	}
	if p.sumdb != "" {
		d, err := newDatabase(ctx, p.sumdb, p.transport)
		if err != nil {
			return nil, fmt.Errorf("-sumdb: %w", err)
		}
		references = append(references, d)
	}
	return references, nil
}

// newDatabase returns the database that a value of GOSUMDB describes.
func newDatabase(ctx context.Context, gosumdb string, transport http.RoundTripper) (*database, error) {
	key, url, _ := strings.Cut(gosumdb, " ")
	if key == "sum.golang.org" {
		key = sumGolangOrg
	}
	verifier, err := note.NewVerifier(key)
	if err != nil {
		return nil, fmt.Errorf("%q is neither sum.golang.org nor NAME+KEY: %w", key, err)
	}
	d := &database{
		ctx:       ctx,
		http:      http.Client{Transport: transport},
		key:       key,
		server:    verifier.Name(),
		base:      strings.TrimSuffix(url, "/"),
		gonosumdb: cmp.Or(goEnv("GONOSUMDB"), goEnv("GOPRIVATE")),
		unknown:   map[string]string{},
	}
	if d.base == "" {
		d.base = d.route(cmp.Or(goEnv("GOPROXY"), "direct"))
	}
	if _, err := d.ReadRemote("/latest"); err != nil {
		return nil, fmt.Errorf("%s does not answer: %w", d.server, err)
	}
	return d, nil
}

// goEnv returns what a variable of the go command was set to, in the environment or
// with go env -w.
func goEnv(name string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	file := os.Getenv("GOENV")
	switch file {
	case "off":
		return ""
	case "":
		dir, err := os.UserConfigDir()
		if err != nil {
			return ""
		}
		file = filepath.Join(dir, "go", "env")
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), name+"="); ok {
			return value
		}
	}
	return ""
}

// route returns the URL at the first proxy that serves the database, or its own.
func (d *database) route(goproxy string) string {
	for proxy := range strings.FieldsFuncSeq(goproxy, func(r rune) bool { return r == ',' || r == '|' }) {
		if !strings.HasPrefix(proxy, "http://") && !strings.HasPrefix(proxy, "https://") {
			continue // direct, off, or a directory
		}
		base := strings.TrimSuffix(proxy, "/") + "/sumdb/" + d.server
		if _, err := d.get(base + "/supported"); err == nil {
			return base
		}
	}
	return "https://" + d.server
}

func (d *database) name() string { return d.server }

func (d *database) lookup(path, version string) (checksums, error) {
	if module.MatchPrefixPatterns(d.gonosumdb, path) {
		return checksums{}, errExcluded
	}
	record, err := recordPath(path, version)
	if err != nil {
		return checksums{}, unknownError{err.Error()} // no name that it could know
	}
	client := d.reserve()
	zip, err := client.Lookup(path, version)
	if err != nil {
		return checksums{}, d.explain(record, err)
	}
	mod, err := client.Lookup(path, version+"/go.mod") // in the same record
	return checksums{hashIn(zip), hashIn(mod)}, err
}

// hashIn returns the h1: hash in lines of a go.sum file.
func hashIn(lines []string) string {
	for _, line := range lines {
		if hash := line[strings.LastIndexByte(line, ' ')+1:]; isH1(hash) {
			return hash
		}
	}
	return ""
}

// reserve returns a client for one lookup.
func (d *database) reserve() *sumdb.Client {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.left == 0 {
		d.client, d.left = sumdb.NewClient(d), clientLookups
	}
	d.left--
	return d.client
}

// explain returns what the error of a lookup means. The client does not wrap
// the errors of its operations.
func (d *database) explain(record string, err error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.forged != "" {
		return fmt.Errorf("%w: %s", errMisbehaves, d.forged)
	}
	if reason, ok := d.unknown[record]; ok {
		delete(d.unknown, record)
		return unknownError{reason}
	}
	d.left = 0 // a client keeps its errors too
	return err
}

// recordPath returns where the database has the record of a version.
func recordPath(path, version string) (string, error) {
	escapedPath, err := module.EscapePath(path)
	if err != nil {
		return "", err
	}
	escapedVersion, err := module.EscapeVersion(version)
	return "/lookup/" + escapedPath + "@" + escapedVersion, err
}

// A statusError is an answer other than 200.
type statusError struct {
	code int
	text string
}

func (e *statusError) Error() string { return fmt.Sprintf("%d %s", e.code, e.text) }

// ReadRemote implements [sumdb.ClientOps].
func (d *database) ReadRemote(path string) ([]byte, error) {
	backoff := gax.Backoff{Initial: time.Second, Multiplier: 2}
	for try := 1; ; try++ {
		data, err := d.get(d.base + path)
		var status *statusError
		answered := errors.As(err, &status) && status.code < 500 && status.code != http.StatusTooManyRequests
		if answered && slices.Contains([]int{http.StatusBadRequest, http.StatusNotFound, http.StatusGone}, status.code) {
			d.mu.Lock()
			d.unknown[path] = status.Error()
			d.mu.Unlock()
		}
		if err == nil || answered || try == lookupTries {
			return data, err
		}
		if err := gax.Sleep(d.ctx, backoff.Pause()); err != nil {
			return nil, err
		}
	}
}

func (d *database) get(url string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(d.ctx, lookupTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := d.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		text, _, _ := strings.Cut(string(data), "\n")
		err = &statusError{resp.StatusCode, cmp.Or(text, http.StatusText(resp.StatusCode))}
	}
	return data, err
}

// ReadConfig implements [sumdb.ClientOps].
func (d *database) ReadConfig(file string) ([]byte, error) {
	if file == "key" {
		return []byte(d.key), nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.latest), nil
}

// WriteConfig implements [sumdb.ClientOps].
func (d *database) WriteConfig(_ string, old, new []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !bytes.Equal(d.latest, old) {
		return sumdb.ErrWriteConflict
	}
	d.latest = slices.Clone(new)
	return nil
}

// ReadCache implements [sumdb.ClientOps]. A client remembers what it has read, and
// nothing outlives the program.
func (d *database) ReadCache(string) ([]byte, error) { return nil, os.ErrNotExist }

// WriteCache implements [sumdb.ClientOps].
func (d *database) WriteCache(string, []byte) {}

// Log implements [sumdb.ClientOps].
func (d *database) Log(string) {}

// SecurityError implements [sumdb.ClientOps].
func (d *database) SecurityError(msg string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.forged = msg
}
