package gcs

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io"
	"iter"

	"cloud.google.com/go/storage"
	"google.golang.org/api/iterator"
)

// A backend is what the benchmarks compare.
type backend interface {
	Save(ctx context.Context, module, version string, mod []byte, zip io.Reader, zipMD5, info []byte) error
	Exists(ctx context.Context, module, version string) (bool, error)
	Info(ctx context.Context, module, version string) ([]byte, error)
	GoMod(ctx context.Context, module, version string) ([]byte, error)
	Zip(ctx context.Context, module, version string) (SizeReadCloser, error)
	List(ctx context.Context, module string) ([]string, error)
	Delete(ctx context.Context, module, version string) error
}

// baseline is a straightforward backend on the same client, with the client's
// defaults: Save lists the version and uploads three objects, one after another;
// listings select no attributes. It knows neither conditions nor markers, and two
// of its saves at once mix their objects.
type baseline struct{ bucket *storage.BucketHandle }

func (b baseline) Save(ctx context.Context, module, vers string, mod []byte, zip io.Reader, _, info []byte) error {
	v := ModuleVersion{module, vers}
	if ok, err := b.Exists(ctx, module, vers); err != nil || ok {
		return cmp.Or(err, errExists)
	}
	for _, o := range []struct {
		ext  string
		data io.Reader
	}{{extMod, bytes.NewReader(mod)}, {extZip, zip}, {extInfo, bytes.NewReader(info)}} {
		if err := upload(ctx, b.bucket.Object(v.object(o.ext)), o.data); err != nil {
			return err
		}
	}
	return nil
}

// upload is a bare upload.
func upload(ctx context.Context, o *storage.ObjectHandle, data io.Reader) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w := o.NewWriter(ctx)
	if _, err := io.Copy(w, data); err != nil {
		cancel()
		w.Close()
		return err
	}
	return w.Close()
}

func (b baseline) Exists(ctx context.Context, module, vers string) (bool, error) {
	v, n := ModuleVersion{module, vers}, 0
	for name, err := range b.names(ctx, v.object("")) {
		if err != nil {
			return false, err
		}
		if name == v.object(extInfo) || name == v.object(extMod) || name == v.object(extZip) {
			n++
		}
	}
	return n == 3, nil
}

// names lists the objects below a prefix.
func (b baseline) names(ctx context.Context, prefix string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		objects := b.bucket.Objects(ctx, &storage.Query{Prefix: prefix})
		for attrs, err := objects.Next(); err != iterator.Done; attrs, err = objects.Next() {
			if err != nil {
				attrs = new(storage.ObjectAttrs)
			}
			if !yield(attrs.Name, err) || err != nil {
				return
			}
		}
	}
}

func (b baseline) Info(ctx context.Context, module, vers string) ([]byte, error) {
	return b.read(ctx, ModuleVersion{module, vers}.object(extInfo))
}

func (b baseline) GoMod(ctx context.Context, module, vers string) ([]byte, error) {
	return b.read(ctx, ModuleVersion{module, vers}.object(extMod))
}

func (b baseline) read(ctx context.Context, name string) ([]byte, error) {
	r, err := b.bucket.Object(name).NewReader(ctx)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(r)
}

func (b baseline) Zip(ctx context.Context, module, vers string) (SizeReadCloser, error) {
	return b.bucket.Object(ModuleVersion{module, vers}.object(extZip)).NewReader(ctx)
}

func (b baseline) List(ctx context.Context, module string) ([]string, error) {
	list := []string{}
	for name, err := range b.names(ctx, module+"/@v/") {
		if err != nil {
			return nil, err
		}
		if v, ext, ok := parseObject(name); ok && ext == extInfo {
			list = append(list, v.Version)
		}
	}
	return list, nil
}

func (b baseline) Delete(ctx context.Context, module, vers string) error {
	v := ModuleVersion{module, vers}
	if ok, err := b.Exists(ctx, module, vers); err != nil || !ok {
		return cmp.Or(err, errNothing)
	}
	var errs []error
	for _, ext := range []string{extInfo, extMod, extZip} {
		errs = append(errs, b.bucket.Object(v.object(ext)).Delete(ctx))
	}
	return errors.Join(errs...)
}
