package main

import (
	"bytes"
	"context"
	"crypto/md5"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/athensgcs/gcs"
)

// notFound is the error of a module or version that does not exist, as far as
// the upstream knows.
type notFound string

func (e notFound) Error() string { return string(e) }

// download is what `go mod download -json` says of a module.
type download struct {
	Path, Version    string
	Info, GoMod, Zip string // files
	Sum, GoModSum    string
	Error            string
}

func (d download) String() string { return d.Path + "@" + d.Version }

// query asks the upstream which version of the module a query such as "latest"
// or a branch means, and which versions there are.
func query(ctx context.Context, module, query string) (version string, versions []string, err error) {
	dir, err := os.MkdirTemp("", "goproxy-")
	if err != nil {
		return "", nil, err
	}
	defer os.RemoveAll(dir)
	// With the retracted versions: which ones these are is the business of the
	// go command that asks, and it needs to see the version that retracts them.
	out, err := goCommand(ctx, dir, goEnv(dir), "list", "-m", "-json", "-versions", "-retracted", module+"@"+query)
	if err != nil {
		return "", nil, err
	}
	var found struct {
		Version  string
		Versions []string
	}
	if err := json.Unmarshal(out, &found); err != nil {
		return "", nil, fmt.Errorf("go list: %w", err)
	}
	return found.Version, found.Versions, nil
}

// fetch downloads a version and saves it in the bucket.
func fetch(ctx context.Context, store *gcs.Storage, module, version string) error {
	dir, err := os.MkdirTemp("", "goproxy-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	got, err := modDownload(ctx, dir, goEnv(dir), module+"@"+version)
	if err != nil {
		return err
	}
	return save(ctx, store, got[0])
}

func save(ctx context.Context, store *gcs.Storage, d download) error {
	info, err := os.ReadFile(d.Info)
	if err != nil {
		return err
	}
	mod, err := os.ReadFile(d.GoMod)
	if err != nil {
		return err
	}
	zip, err := os.Open(d.Zip)
	if err != nil {
		return err
	}
	defer zip.Close()
	sum := md5.New()
	if _, err := io.Copy(sum, zip); err != nil {
		return err
	}
	if _, err := zip.Seek(0, io.SeekStart); err != nil {
		return err
	}
	return store.Save(ctx, d.Path, d.Version, mod, zip, sum.Sum(nil), info)
}

// modDownload downloads modules into the module cache of env, and returns what
// the go command says of each.
func modDownload(ctx context.Context, dir string, env []string, modules ...string) ([]download, error) {
	out, err := goCommand(ctx, dir, env, append([]string{"mod", "download", "-json"}, modules...)...)
	var got []download
	for decoder := json.NewDecoder(bytes.NewReader(out)); ; {
		var d download
		if decodeErr := decoder.Decode(&d); decodeErr == io.EOF {
			break
		} else if decodeErr != nil {
			return nil, fmt.Errorf("go mod download: %w", errors.Join(err, decodeErr))
		}
		// The command fails when one module does, and says why here.
		if d.Error != "" {
			return nil, upstreamError(d.Error)
		}
		got = append(got, d)
	}
	if err == nil && len(got) == 0 {
		err = errors.New("go mod download: no module")
	}
	return got, err
}

// goEnv is the environment of a go command with a module cache of its own. It
// leaves GOPROXY, GOPRIVATE, GOSUMDB and the like as the user has them.
func goEnv(dir string) []string {
	return []string{
		"GOMODCACHE=" + filepath.Join(dir, "mod"),
		"GOFLAGS=-modcacherw", // so that it can be removed
		"GOTOOLCHAIN=local",
		"GOWORK=off",
	}
}

// goCommand runs the go command in dir and returns what it prints.
func goCommand(ctx context.Context, dir string, env []string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env...)
	// Its git, when it runs one, may hold the output open a little longer.
	cmd.WaitDelay = 3 * time.Second
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if ctx.Err() != nil {
		return nil, fmt.Errorf("go %s: %w", args[0], context.Cause(ctx))
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) && stderr.Len() > 0 {
		err = upstreamError(strings.TrimSpace(strings.TrimPrefix(stderr.String(), "go: ")))
	}
	return stdout.Bytes(), err
}

// upstreamError tells what does not exist from what could not be had. The go
// command tells it in words only.
func upstreamError(text string) error {
	if strings.Contains(text, "executable file not found") { // such as git, here
		return errors.New(text)
	}
	for _, words := range []string{
		"404 Not Found", "410 Gone", "no such file or directory", // a proxy, over HTTP or in files
		"not found", "unknown revision", "no matching versions", "unrecognized import path",
		"must match major version", "invalid pseudo-version", "malformed module path",
		"module lookup disabled",
	} {
		if strings.Contains(text, words) {
			return notFound(text)
		}
	}
	return errors.New(text)
}
