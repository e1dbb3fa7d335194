package gcs

import (
	"context"
	"fmt"
	"io"
	"time"

	"cloud.google.com/go/storage"
)

// A SizeReadCloser is a stream of known length.
type SizeReadCloser interface {
	io.ReadCloser
	Size() int64 // in bytes
}

// Info returns the version's .info file. It makes one request, and is safe for
// concurrent use.
//
// An object that is not there is KindNotFound, and so is a missing bucket: GCS gives
// a read the same answer ([Storage.Check] tells them apart). Like [Storage.GoMod] and
// [Storage.Zip], Info reads an object whether its version is complete or not, as
// Athens' own backends do. [Storage.Exists] tells whether a version is complete.
func (s *Storage) Info(ctx context.Context, module, version string) ([]byte, error) {
	return s.read(ctx, "Info", module, version, extInfo)
}

// GoMod returns the version's go.mod file, as [Storage.Info] does its .info file: with
// one request, and safe for concurrent use.
// While the version is being saved it is there before the other two, and another
// save that takes over may replace it with its own.
func (s *Storage) GoMod(ctx context.Context, module, version string) ([]byte, error) {
	return s.read(ctx, "GoMod", module, version, extMod)
}

func (s *Storage) read(ctx context.Context, op, module, version, ext string) ([]byte, error) {
	v := ModuleVersion{module, version}
	ctx, c := s.begin(ctx, op, v)
	err := s.bucket.check(v)
	var data []byte
	if err == nil {
		data, err = s.bucket.read(ctx, v, ext)
	}
	if err != nil {
		return nil, c.end(err)
	}
	return data, c.end(nil)
}

// Zip returns a stream of the version's zip, which the caller must close, and whose
// Size is that of the stored object. It makes one request, and holds none of the
// zip in memory. When the connection breaks, reading goes on where it was, of the
// same object. A Read that gets nothing for 5 minutes fails. The stream ends with the
// context. A stream is used by one goroutine at a time; Zip itself is safe for
// concurrent use.
//
// A zip that is not there is KindNotFound.
func (s *Storage) Zip(ctx context.Context, module, version string) (SizeReadCloser, error) {
	v := ModuleVersion{module, version}
	ctx, c := s.begin(ctx, "Zip", v)
	err := s.bucket.check(v)
	z := &zipReader{s: s, ctx: ctx, v: v}
	if err == nil {
		z.r, z.cancel, err = s.bucket.open(ctx, v, extZip)
	}
	if err != nil {
		return nil, c.end(err)
	}
	return z, c.end(nil)
}

// A zipReader is a stream whose errors are those of this package.
type zipReader struct {
	s      *Storage
	r      *storage.Reader
	ctx    context.Context // the caller's
	cancel context.CancelFunc
	v      ModuleVersion
	err    error // of the Read that failed, if any
}

func (z *zipReader) Size() int64 { return z.r.Attrs.Size }

func (z *zipReader) Read(p []byte) (int, error) {
	// The client asks for the rest of a broken stream without a limit.
	stuck := time.AfterFunc(retryLimit, z.cancel)
	n, err := z.r.Read(p)
	if !stuck.Stop() && err != nil && err != io.EOF && z.ctx.Err() == nil {
		err = fmt.Errorf("nothing came in %v: %w", retryLimit, err)
	}
	if err != io.EOF {
		z.err = z.s.wrapError(z.ctx, "Zip", z.v, err)
		err = z.err
	}
	return n, err
}

// Close returns the error of the Read that failed, if any: a caller that copies the
// stream may look at no other.
func (z *zipReader) Close() error {
	defer z.cancel()
	err := z.s.wrapError(z.ctx, "Zip", z.v, z.r.Close())
	if z.err != nil {
		return z.err
	}
	return err
}
