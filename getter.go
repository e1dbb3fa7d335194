package gcs

import (
	"context"
	"io"
	"time"

	"cloud.google.com/go/storage"
)

// A SizeReadCloser is a stream of known length.
type SizeReadCloser interface {
	io.ReadCloser
	Size() int64
}

// Info returns the version's .info file. It makes one request.
//
// An object that is not there is KindNotFound. Like [Storage.GoMod] and
// [Storage.Zip], Info reads an object whether its version is complete or not, as
// Athens' own backends do; Athens fetches whatever it finds missing, and so heals
// an incomplete version. [Storage.Exists] tells whether a version is complete.
func (s *Storage) Info(ctx context.Context, module, vers string) ([]byte, error) {
	return s.read(ctx, "Info", module, vers, extInfo)
}

// GoMod returns the version's go.mod file, as [Storage.Info] does its .info
// file. While the version is being saved it is there before the other two, and
// another save that takes over may replace it with its own.
func (s *Storage) GoMod(ctx context.Context, module, vers string) ([]byte, error) {
	return s.read(ctx, "GoMod", module, vers, extMod)
}

func (s *Storage) read(ctx context.Context, op, module, vers, ext string) ([]byte, error) {
	v, err := newVersion(module, vers)
	ctx, o := s.begin(ctx, op, v)
	if err != nil {
		return nil, o.end(err)
	}
	var data []byte
	err = attempt(ctx, requestTimeout, func(ctx context.Context) error {
		r, err := s.open(ctx, v, ext)
		if err != nil {
			return err
		}
		defer r.Close()
		data, err = io.ReadAll(r)
		return readable(err) // it can be deleted in the middle of this
	})
	if err != nil {
		data = nil
	}
	return data, o.end(err)
}

// Zip returns a stream of the version's zip, which the caller must close, and
// whose Size is that of the stored object. It makes one request, and holds none
// of the zip in memory. When the connection breaks in the middle of it, reading
// goes on where it was, of the same object. The stream ends with the context.
//
// A zip that is not there is KindNotFound.
func (s *Storage) Zip(ctx context.Context, module, vers string) (SizeReadCloser, error) {
	v, err := newVersion(module, vers)
	ctx, o := s.begin(ctx, "Zip", v)
	if err != nil {
		return nil, o.end(err)
	}
	z := &zipReader{ctx: ctx, v: v}
	if err = z.open(s); err != nil {
		return nil, o.end(err)
	}
	return z, o.end(nil)
}

func (s *Storage) open(ctx context.Context, v version, ext string) (*storage.Reader, error) {
	r, err := s.object(v, ext).NewReader(ctx)
	return r, readable(err)
}

// readable gives the error of a read the kind that says what is missing.
func readable(err error) error {
	if isAbsent(err) {
		return verdict{KindNotFound, err}
	}
	return needs(err, "storage.objects.get")
}

// A zipReader is a stream whose errors are those of this package.
type zipReader struct {
	r      *storage.Reader
	ctx    context.Context // the caller's
	cancel context.CancelFunc
	v      version
}

// open opens the stream, and again when there is no answer: attempt would end its
// context.
func (z *zipReader) open(s *Storage) (err error) {
	for timeout := requestTimeout; ; timeout *= 2 {
		var ctx context.Context
		ctx, z.cancel = context.WithCancel(z.ctx)
		timer := time.AfterFunc(timeout, z.cancel)
		z.r, err = s.open(ctx, z.v, extZip)
		hung := !timer.Stop() && z.ctx.Err() == nil
		if err == nil && !hung {
			return nil
		}
		if err == nil {
			z.r.Close()
		}
		z.cancel()
		if !hung || timeout > retryLimit {
			return err
		}
	}
}

func (z *zipReader) Size() int64 { return z.r.Attrs.Size }

func (z *zipReader) Read(p []byte) (int, error) {
	n, err := z.r.Read(p)
	if err != io.EOF {
		err = fail(z.ctx, "Zip", z.v, readable(err))
	}
	return n, err
}

func (z *zipReader) Close() error {
	defer z.cancel()
	return fail(z.ctx, "Zip", z.v, z.r.Close())
}
