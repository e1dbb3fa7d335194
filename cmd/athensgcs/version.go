package main

import (
	"archive/zip"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"golang.org/x/mod/modfile"
	"golang.org/x/mod/module"
	"golang.org/x/mod/sumdb/dirhash"
	modzip "golang.org/x/mod/zip"

	"github.com/athensgcs/gcs"
)

// A result is what a verification found of one version.
type result struct {
	gcs.ModuleVersion
	Zip      string            `json:"zip,omitempty"` // its h1: checksum
	Mod      string            `json:"mod,omitempty"`
	Problems []problem         `json:"problems,omitempty"`
	Unknown  map[string]string `json:"unknown,omitempty"` // by reference, with its reason if it gives one
	Error    string            `json:"error,omitempty"`

	err      error
	bytes    int64
	compared []string // references
	excluded bool     // by GONOSUMDB
}

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

// errGone is the err of a result when the version was deleted while it was read.
var errGone = errors.New("the version is gone")

// verifyOne reads a version and compares it with the references. It returns an error
// when the verification of others makes no sense either.
func verifyOne(ctx context.Context, s *gcs.Storage, v gcs.VersionStatus, references []reference) (*result, error) {
	r := &result{ModuleVersion: v.ModuleVersion}
	r.err = r.read(ctx, s)
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case gcs.Is(r.err, gcs.KindNotFound):
		r.err = errGone
	}
	for _, reference := range references {
		if r.err != nil {
			break
		}
		if err := r.compare(reference); errors.Is(err, errMisbehaves) {
			return nil, err
		} else if err != nil {
			r.err = err
		}
	}
	return r, ctx.Err()
}

func (r *result) wrong(file, what, got, want string) {
	r.Problems = append(r.Problems, problem{file, what, got, want})
}

// read reads the three files and checks all that needs no reference.
func (r *result) read(ctx context.Context, s *gcs.Storage) error {
	info, err := s.Info(ctx, r.Module, r.Version)
	if err != nil {
		return err
	}
	r.checkInfo(info)
	mod, err := s.GoMod(ctx, r.Module, r.Version)
	if err != nil {
		return err
	}
	if r.Mod, err = hashMod(mod); err != nil {
		return err
	}
	file, err := r.download(ctx, s)
	if err != nil {
		return err
	}
	defer os.Remove(file)
	r.bytes += int64(len(info) + len(mod))
	return r.checkZip(file)
}

func (r *result) checkInfo(info []byte) {
	var named struct{ Version string }
	if err := json.Unmarshal(info, &named); err != nil {
		r.wrong("info", fmt.Sprintf("is no JSON of a version: %v", err), "", "")
	} else if named.Version != r.Version {
		r.wrong("info", fmt.Sprintf("names the version %q", named.Version), "", "")
	}
}

// download stores the zip in a temporary file.
func (r *result) download(ctx context.Context, s *gcs.Storage) (name string, err error) {
	body, err := s.Zip(ctx, r.Module, r.Version)
	if err != nil {
		return "", err
	}
	defer body.Close()
	f, err := os.CreateTemp("", "athensgcs-*.zip")
	if err != nil {
		return "", err
	}
	defer func() {
		err = errors.Join(err, f.Close())
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	r.bytes, err = io.Copy(f, body)
	return f.Name(), err
}

// checkZip checks the zip and that the .mod is the go.mod in it.
func (r *result) checkZip(file string) error {
	_, invalid := modzip.CheckZip(module.Version{Path: r.Module, Version: r.Version}, file)
	if invalid != nil {
		first, rest, more := strings.Cut(invalid.Error(), "\n")
		if more { // a line for each file
			first += fmt.Sprintf(" (and %d more)", strings.Count(rest, "\n")+1)
		}
		r.wrong("zip", "is not the module's: "+first, "", "")
	}
	hash, err := dirhash.HashZip(file, dirhash.Hash1)
	if err != nil {
		if invalid == nil {
			r.wrong("zip", fmt.Sprintf("cannot be read: %v", err), "", "")
		}
		return nil
	}
	r.Zip = hash
	inside, err := hashModIn(file, r.Module+"@"+r.Version+"/go.mod")
	if err != nil {
		return err
	}
	found := "the go.mod in the zip"
	if inside == "" {
		found = "what the go command makes for a zip without go.mod"
		inside, err = hashMod([]byte("module " + modfile.AutoQuote(r.Module) + "\n"))
	}
	if err == nil && inside != r.Mod {
		r.wrong("mod", "differs from "+found, r.Mod, inside)
	}
	return err
}

// hashModIn returns the checksum of the go.mod in a zip, or "" if there is none.
func hashModIn(file, name string) (string, error) {
	z, err := zip.OpenReader(file)
	if err != nil {
		return "", err
	}
	defer z.Close()
	i := slices.IndexFunc(z.File, func(f *zip.File) bool { return f.Name == name })
	if i < 0 {
		return "", nil
	}
	return dirhash.Hash1([]string{"go.mod"}, func(string) (io.ReadCloser, error) { return z.File[i].Open() })
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
	if want.zip != "" {
		r.compared = append(r.compared, ref.name())
	} else {
		r.unknownTo(ref, "") // a go.sum may have the checksum of the .mod alone
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
