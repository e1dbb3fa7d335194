package main

import (
	"archive/zip"
	"context"
	"crypto/md5"
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
	modzip "golang.org/x/mod/zip"

	"github.com/athensgcs/gcs"
)

// files are those of a version in a source. What the source does not have is nil.
type files struct {
	info, mod []byte
	hash      string // of the zip, says the source
	zip       *os.File
	md5       []byte // of the zip, when it was opened
	temporary bool
}

func (f *files) close() {
	f.zip.Close()
	if f.temporary {
		os.Remove(f.zip.Name())
	}
}

// openFiles reads all files but the zip.
func openFiles(names map[string]string) (*files, error) {
	content := map[string][]byte{}
	for ext, name := range names {
		info, err := os.Stat(name)
		switch {
		case err != nil:
			return nil, err
		case !info.Mode().IsRegular(): // another may block
			return nil, refusedError{fmt.Errorf("%s is no regular file", name)}
		case ext == ".zip":
			continue
		case info.Size() > modzip.MaxGoMod:
			return nil, refusedError{fmt.Errorf("%s is larger than a go.mod may be", name)}
		}
		if content[ext], err = os.ReadFile(name); err != nil {
			return nil, err
		}
	}
	zip, err := os.Open(names[".zip"])
	if err != nil {
		return nil, err
	}
	hash := strings.TrimSpace(string(content[".ziphash"]))
	return &files{info: content[".info"], mod: content[".mod"], hash: hash, zip: zip}, nil
}

// downloadFiles reads the files of a version in another bucket.
func (p *program) downloadFiles(ctx context.Context, s *gcs.Storage, v gcs.ModuleVersion) (*files, error) {
	info, err := s.Info(ctx, v.Module, v.Version)
	if err != nil {
		return nil, err
	}
	mod, err := s.GoMod(ctx, v.Module, v.Version)
	if err != nil {
		return nil, err
	}
	name, _, err := p.download(ctx, s, v)
	if err != nil {
		return nil, err
	}
	zip, err := os.Open(name)
	return &files{info: info, mod: mod, zip: zip, temporary: true}, err
}

// check makes the files that are missing, and verifies all. The MD5 is for a zip that
// changes after that.
func (f *files) check(ctx context.Context, v gcs.ModuleVersion) error {
	sum := md5.New()
	_, err := io.Copy(sum, io.LimitReader(contextReader{ctx, f.zip}, modzip.MaxZipFile)) // a larger one is refused
	if err == nil {
		_, err = f.zip.Seek(0, io.SeekStart)
	}
	if err != nil {
		return err
	}
	f.md5 = sum.Sum(nil)
	file := f.zip.Name()
	if f.mod == nil {
		if f.mod, err = goModIn(file, v); err != nil {
			return refusedError{fmt.Errorf(".zip cannot be read: %w", err)}
		}
	}
	if f.info == nil {
		f.info = newInfo(v.Version)
	}
	r := &result{ModuleVersion: v}
	r.checkInfo(f.info)
	if r.Mod, err = hashMod(f.mod); err != nil {
		return err
	}
	if err := r.checkZip(ctx, file); err != nil {
		return err
	}
	if isH1(f.hash) && r.Zip != "" && r.Zip != f.hash { // the go command makes another anew
		r.wrong("zip", "differs from the .ziphash beside it", r.Zip, f.hash)
	}
	var problems []string
	for _, problem := range r.Problems {
		problems = append(problems, problem.String())
	}
	if problems != nil {
		return refusedError{errors.New(strings.Join(problems, "; "))}
	}
	return nil
}

// goModIn returns the go.mod in a zip, or what the go command makes if there is none.
func goModIn(file string, v gcs.ModuleVersion) ([]byte, error) {
	z, err := zip.OpenReader(file)
	if err != nil {
		return nil, err
	}
	defer z.Close()
	f, err := z.Open(v.Module + "@" + v.Version + "/go.mod")
	if errors.Is(err, fs.ErrNotExist) {
		return []byte("module " + modfile.AutoQuote(v.Module) + "\n"), nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, modzip.MaxGoMod+1)) // a longer one is refused
}

// newInfo returns an .info as the go command makes it.
func newInfo(version string) []byte {
	info := struct {
		Version string
		Time    time.Time `json:",omitzero"`
	}{Version: version}
	if module.IsPseudoVersion(version) {
		info.Time, _ = module.PseudoVersionTime(version)
	}
	data, _ := json.Marshal(info)
	return data
}
