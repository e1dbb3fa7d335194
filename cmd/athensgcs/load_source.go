package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/mod/module"

	"github.com/athensgcs/gcs"
)

// A source yields its versions, those of one module in a row if it can.
type source func(context.Context) iter.Seq2[candidate, error]

// A candidate is a version that a source has, or seems to have.
type candidate struct {
	gcs.ModuleVersion
	file string // its zip in a folder, or what is no version
	size int64  // in bytes, of what is read
	err  error  // why it cannot be loaded: a refusedError, errWithoutZip, or a failure
	open func(context.Context) (*files, error)

	there *listed // in the bucket
}

func (c candidate) String() string {
	if c.Module == "" {
		return c.file
	}
	return c.Module + "@" + c.Version
}

// A refusedError says what is wrong with a version. Other errors say that the source or
// the bucket fails.
type refusedError struct{ error }

var errWithoutZip = errors.New("there is no zip")

// openSource returns the source that an argument names.
func (p *program) openSource(arg string) (source, error) {
	if name, ok := strings.CutPrefix(arg, "gs://"); ok {
		bucket, prefix, _ := strings.Cut(name, "/")
		return p.bucketSource(bucket, p.newStorage(bucket, prefix)), nil
	}
	if cache := filepath.Join(arg, "cache", "download"); isFolder(cache) {
		arg = cache // of a whole module cache
	}
	entries, err := os.ReadDir(arg)
	return func(context.Context) iter.Seq2[candidate, error] {
		return func(yield func(candidate, error) bool) { folder{arg, yield}.walk(".", entries) }
	}, err
}

// bucketSource returns the versions in a bucket.
func (p *program) bucketSource(bucket string, s *gcs.Storage) source {
	return func(ctx context.Context) iter.Seq2[candidate, error] {
		return func(yield func(candidate, error) bool) {
			for v, err := range s.Scan(ctx, "") {
				if gcs.Is(err, gcs.KindNotFound) {
					err = fmt.Errorf("there is no bucket %s", bucket)
				}
				if !yield(p.newBucketCandidate(s, v), err) {
					return
				}
			}
		}
	}
}

func (p *program) newBucketCandidate(s *gcs.Storage, v gcs.VersionStatus) candidate {
	c := candidate{ModuleVersion: v.ModuleVersion, size: v.Size}
	switch {
	case slices.Contains(v.Missing, "zip"):
		c.err, c.size = errWithoutZip, 0
	case checkName(v.ModuleVersion) != nil:
		c.err = refusedError{checkName(v.ModuleVersion)}
	case v.State != gcs.Complete && v.State != gcs.Unfinished:
		c.err = refusedError{fmt.Errorf("the version is %v", v.State)}
	}
	c.open = func(ctx context.Context) (*files, error) { return p.downloadFiles(ctx, s, v.ModuleVersion) }
	return c
}

// A folder is one that a file-system GOPROXY can serve, such as cache/download of a
// module cache, or the root of Athens' disk storage.
type folder struct {
	root  string
	yield func(candidate, error) bool
}

// walk yields the versions in a folder and below it, and reports whether to go on.
func (f folder) walk(dir string, entries []fs.DirEntry) bool {
	versions := map[string]map[string]string{} // names of files, by version and ending
	for _, e := range entries {
		name := path.Join(dir, e.Name())
		file := filepath.Join(f.root, filepath.FromSlash(name))
		version, ext := parseFile(dir, e.Name())
		switch {
		case e.IsDir():
			below, err := os.ReadDir(file)
			if err != nil && !f.yield(candidate{file: file, err: err}, nil) || !f.walk(name, below) {
				return false
			}
		case e.Type()&fs.ModeSymlink != 0 && isFolder(file):
			err := refusedError{errors.New("the link to a folder is not followed")}
			if !f.yield(candidate{file: file, err: err}, nil) {
				return false
			}
		case ext != "":
			if versions[version] == nil {
				versions[version] = map[string]string{}
			}
			versions[version][ext] = file
		}
	}
	for _, version := range slices.Sorted(maps.Keys(versions)) {
		if c, ok := newCandidate(dir, version, versions[version]); ok && !f.yield(c, nil) {
			return false
		}
	}
	return true
}

func isFolder(name string) bool {
	info, err := os.Stat(name)
	return err == nil && info.IsDir()
}

// parseFile returns of which version a file is, as names are written there, and its
// ending. The ending is empty if the file is not of a version.
func parseFile(dir, name string) (version, ext string) {
	version, ext = path.Base(dir), path.Ext(name)
	switch {
	case version == "@v" && slices.Contains([]string{".info", ".mod", ".zip", ".ziphash"}, ext):
		return strings.TrimSuffix(name, ext), ext
	case name == "source.zip", name == "go.mod", name == version+".info":
		return version, ext
	}
	return "", ""
}

// newCandidate returns the version that has these files. It reports false if there is
// no zip, and the name is none of a version.
func newCandidate(dir, version string, names map[string]string) (c candidate, ok bool) {
	c.Module, c.Version, c.file = path.Dir(dir), version, names[".zip"]
	var nameErr error
	if path.Base(dir) == "@v" {
		c.ModuleVersion, nameErr = unescape(c.ModuleVersion)
	}
	if nameErr == nil {
		nameErr = checkName(c.ModuleVersion)
	}
	switch info, err := os.Stat(c.file); {
	case c.file == "":
		c.err = errWithoutZip
		return c, nameErr == nil
	case nameErr != nil:
		c.ModuleVersion, c.err = gcs.ModuleVersion{}, refusedError{nameErr}
	case err != nil:
		c.err = err
	default:
		c.size = info.Size()
		c.open = func(context.Context) (*files, error) { return openFiles(names) }
	}
	return c, true
}

func unescape(v gcs.ModuleVersion) (gcs.ModuleVersion, error) {
	path, err := module.UnescapePath(v.Module)
	version, versionErr := module.UnescapeVersion(v.Version)
	return gcs.ModuleVersion{Module: path, Version: version}, cmp.Or(err, versionErr)
}
