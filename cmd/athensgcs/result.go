package main

import (
	"archive/zip"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"

	"golang.org/x/mod/modfile"
	"golang.org/x/mod/module"
	"golang.org/x/mod/sumdb/dirhash"
	modzip "golang.org/x/mod/zip"

	"github.com/athensgcs/gcs"
)

// A result is what a verification found of one version.
type result struct {
	gcs.ModuleVersion
	Outcome  outcome           `json:"outcome"`
	Odd      string            `json:"odd,omitempty"`
	Zip      string            `json:"zip,omitempty"` // its h1: checksum
	Mod      string            `json:"mod,omitempty"`
	Problems []problem         `json:"problems,omitempty"`
	Unknown  map[string]string `json:"unknown,omitempty"` // by reference, with its reason if it gives one
	Error    string            `json:"error,omitempty"`

	bytes    int64
	compared []string // references
	excluded bool     // by GONOSUMDB
}

type outcome string

const (
	right      outcome = "right"
	wrong      outcome = "wrong"
	incomplete outcome = "not complete"
	oddName    outcome = "odd name"
	older      outcome = "older"
	gone       outcome = "gone" // deleted while it was read
	notRead    outcome = "failed"
)

// A problem is what is wrong with a file.
type problem struct {
	File string `json:"file"` // info, mod or zip
	What string `json:"problem"`
	// Got and Want are checksums.
	Got  string `json:"got,omitempty"`
	Want string `json:"want,omitempty"`
}

func (p problem) String() string {
	text := "." + p.File + " " + p.What
	if p.Got != "" {
		text += fmt.Sprintf(": %s here, %s there", p.Got, p.Want)
	}
	return text
}

// verifyOne reads a version, if it is one to read, and compares it with the
// references. It returns an error when the verification of others makes no sense either.
func (p *program) verifyOne(ctx context.Context, v version, references []reference) (*result, error) {
	r := &result{ModuleVersion: v.ModuleVersion, Odd: v.Odd}
	switch {
	case v.older:
		r.Outcome = older
	case v.Odd != "":
		r.Outcome = oddName
	case v.State != gcs.Complete:
		r.Outcome = incomplete
	}
	if r.Outcome != "" {
		return r, nil
	}
	err := r.read(ctx, p)
	for _, reference := range references {
		if err == nil {
			err = r.compare(reference)
		}
	}
	p.progress.add(v.Size)
	switch {
	case errors.Is(err, errMisbehaves):
		return nil, err
	case err != nil && ctx.Err() != nil:
		return nil, ctx.Err()
	case errors.Is(err, errGone):
		r.Outcome = gone
	case err != nil:
		r.Outcome, r.Error = notRead, oneLine(err)
	case len(r.Problems) > 0:
		r.Outcome = wrong
	default:
		r.Outcome = right
	}
	return r, nil
}

// errGone means that the version was deleted while it was read.
var errGone = errors.New("the version is gone")

// explain returns what the error of a read of the version means.
func (p *program) explain(ctx context.Context, v gcs.ModuleVersion, err error) error {
	if !gcs.Is(err, gcs.KindNotFound) {
		return err
	}
	switch complete, lookErr := p.storage.Exists(ctx, v.Module, v.Version); {
	case lookErr != nil:
		return lookErr
	case !complete:
		return errGone
	}
	hint := ""
	if host := os.Getenv("STORAGE_EMULATOR_HOST"); host != "" {
		_, address, found := strings.Cut(host, "://")
		if !found {
			address = host
		}
		hint = "; fake-gcs-server does so unless it is started with -public-host " + address
	}
	return fmt.Errorf("the bucket lists its files, and answers that they are not there when they are read%s: %w", hint, err)
}

func (r *result) wrong(file, what, got, want string) {
	r.Problems = append(r.Problems, problem{file, what, got, want})
}

// read reads the three files and checks all that needs no reference.
func (r *result) read(ctx context.Context, p *program) error {
	info, err := p.storage.Info(ctx, r.Module, r.Version)
	if err != nil {
		return p.explain(ctx, r.ModuleVersion, err)
	}
	r.checkInfo(info)
	mod, err := p.storage.GoMod(ctx, r.Module, r.Version)
	if err != nil {
		return p.explain(ctx, r.ModuleVersion, err)
	}
	if r.Mod, err = hashMod(mod); err != nil {
		return err
	}
	file, size, err := p.download(ctx, p.storage, r.ModuleVersion)
	if err != nil {
		return p.explain(ctx, r.ModuleVersion, err)
	}
	defer os.Remove(file)
	r.bytes = size + int64(len(info)+len(mod))
	return r.checkZip(ctx, file)
}

// checkZip checks the zip and that the .mod is the go.mod in it. To read the directory
// of a zip of a million files takes seconds, and does not look at the context.
func (r *result) checkZip(ctx context.Context, file string) error {
	checked := make(chan error, 1)
	go func() { checked <- r.checkZipFile(ctx, file) }()
	select {
	case err := <-checked:
		return err
	case <-ctx.Done():
	}
	select {
	case <-checked: // so that nobody reads the file any more
	case <-time.After(time.Second / 2):
	}
	return ctx.Err()
}

func (r *result) checkInfo(info []byte) {
	var named struct {
		Version string
		Time    json.RawMessage
	}
	if err := json.Unmarshal(info, &named); err != nil {
		r.wrong("info", fmt.Sprintf("is no JSON of a version: %v", err), "", "")
		return
	}
	if named.Version != r.Version {
		r.wrong("info", fmt.Sprintf("names the version %q", named.Version), "", "")
	}
	var at *time.Time
	if named.Time != nil && (json.Unmarshal(named.Time, &at) != nil || at == nil) {
		r.wrong("info", fmt.Sprintf("names the time %s, which is none", named.Time), "", "")
	}
}

// download stores the zip in a temporary file, or as much of it as shows that it is
// too large for the go command.
func (p *program) download(ctx context.Context, s *gcs.Storage, v gcs.ModuleVersion) (name string, size int64, err error) {
	body, err := s.Zip(ctx, v.Module, v.Version)
	if err != nil {
		return "", 0, err
	}
	defer body.Close()
	f, err := p.temp.create("*.zip")
	if err != nil {
		return "", 0, err
	}
	defer func() {
		err = errors.Join(err, f.Close())
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	size, err = io.Copy(f, io.LimitReader(body, modzip.MaxZipFile+1))
	return f.Name(), size, err
}

// checkZipFile checks the zip. One that the go command refuses is not read: it can
// unpack to any size.
func (r *result) checkZipFile(ctx context.Context, file string) error {
	_, err := modzip.CheckZip(module.Version{Path: r.Module, Version: r.Version}, file)
	var broken *fs.PathError
	switch {
	case errors.As(err, &broken):
		return err // of the temporary file
	case err != nil:
		r.wrong("zip", "is not the module's: "+refusal(err), "", "")
		return nil
	}
	z, err := zip.OpenReader(file)
	if err != nil {
		return err
	}
	defer z.Close()
	var names []string
	files := map[string]*zip.File{}
	for _, f := range z.File {
		names = append(names, f.Name)
		files[f.Name] = f
	}
	open := func(name string) (io.ReadCloser, error) {
		body, err := files[name].Open()
		return contextReader{ctx, body}, err
	}
	if r.Zip, err = dirhash.Hash1(names, open); err != nil {
		if ctx.Err() == nil {
			r.wrong("zip", fmt.Sprintf("cannot be read: %v", err), "", "")
		}
		return ctx.Err()
	}
	return r.checkMod(files[r.Module+"@"+r.Version+"/go.mod"])
}

// refusal returns the first reason for which the go command refuses a zip.
func refusal(err error) string {
	var files modzip.FileErrorList
	if errors.As(err, &files) && len(files) > 1 {
		return fmt.Sprintf("%v (and %d more)", files[0], len(files)-1)
	}
	return err.Error()
}

// A contextReader is a reader that ends with a context.
type contextReader struct {
	ctx context.Context
	io.ReadCloser
}

func (r contextReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.ReadCloser.Read(p)
}

// checkMod compares the .mod with the go.mod in the zip, which is nil if there is none.
func (r *result) checkMod(inside *zip.File) (err error) {
	var want, from string
	if inside != nil {
		from = "the go.mod in the zip"
		want, err = dirhash.Hash1([]string{"go.mod"}, func(string) (io.ReadCloser, error) { return inside.Open() })
	} else {
		from = "what the go command makes for a zip without go.mod"
		want, err = hashMod([]byte("module " + modfile.AutoQuote(r.Module) + "\n"))
	}
	if err == nil && want != r.Mod {
		r.wrong("mod", "differs from "+from, r.Mod, want)
	}
	return err
}

// hashMod returns the checksum of a .mod that go.sum files hold.
func hashMod(mod []byte) (string, error) {
	return dirhash.Hash1([]string{"go.mod"}, func(string) (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(mod)), nil
	})
}

// compare compares the checksums with those of the reference.
func (r *result) compare(ref reference) error {
	want, err := ref.lookup(r.Module, r.Version)
	var unknown unknownError
	switch {
	case errors.Is(err, errExcluded):
		r.excluded = true
		return nil
	case errors.As(err, &unknown):
		r.unknownTo(ref, unknown.reason)
		return nil
	case err != nil:
		return err
	}
	switch {
	case want.zip == "":
		r.unknownTo(ref, "") // a go.sum may have the checksum of the .mod alone
	case r.Zip != "":
		r.compared = append(r.compared, ref.name())
	}
	for _, file := range []struct{ ext, got, want string }{{"mod", r.Mod, want.mod}, {"zip", r.Zip, want.zip}} {
		if file.got != "" && file.want != "" && file.got != file.want {
			r.wrong(file.ext, "differs from that of "+ref.name(), file.got, file.want)
		}
	}
	return nil
}

func (r *result) unknownTo(ref reference, reason string) {
	if r.Unknown == nil {
		r.Unknown = map[string]string{}
	}
	r.Unknown[ref.name()] = reason
}
