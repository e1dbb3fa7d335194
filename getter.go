package gcs

import (
	"context"
	"errors"
	"hash/crc32"
	"io"
	"io/fs"
	"time"

	"cloud.google.com/go/storage"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
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
	z := &zipReader{s: s, ctx: ctx, v: v, end: -1}
	z.attrs.Generation = -1 // the latest
	if err == nil {
		_, err = z.read(nil)
	}
	if err != nil {
		return nil, c.end(err)
	}
	return z, c.end(nil)
}

// A zipReader is the stream of a zip. Where it breaks, it opens the same object again.
// The client would do so too, but wait without a limit for an answer.
type zipReader struct {
	s   *Storage
	ctx context.Context // the caller's
	v   ModuleVersion

	attrs       storage.ReaderObjectAttrs // of the object
	offset, end int64                     // bytes read, and to read: -1 when not known
	sum         uint32                    // CRC32C of those read
	err         error                     // that ended the stream

	r      *storage.Reader // nil when it has to be opened
	cancel context.CancelFunc
	stall  *time.Timer // cancels a read that gets nothing
}

func (z *zipReader) Size() int64 { return z.attrs.Size }

func (z *zipReader) Read(p []byte) (n int, err error) {
	switch {
	case z.err != nil:
	case z.offset != z.end:
		n, z.err = z.read(p)
	case z.sum != z.attrs.CRC32C && z.attrs.CRC32C != 0 && !z.attrs.Decompressed:
		// The client checks only what it reads in one stream.
		z.err = errors.New("the zip was corrupted on its way: its CRC32C is another")
	default:
		z.err = io.EOF
	}
	if z.err == io.EOF {
		return n, io.EOF
	}
	return n, z.s.wrapError(z.ctx, "Zip", z.v, z.err)
}

// errStalled is the error of a read that got nothing.
var errStalled = status.Error(codes.DeadlineExceeded, "the stream stalled")

// read reads once, for as long as it takes to get an answer. As a rule the stream is open
// and goes on, which costs a timer and nothing else.
func (z *zipReader) read(p []byte) (n int, err error) {
	var broken error
	if z.r != nil {
		z.stall.Reset(requestTimeout)
		n, broken = z.next(p)
		if stalled := !z.stall.Stop(); broken == nil {
			return n, nil
		} else if stalled {
			broken = errStalled
		}
	}
	err = z.s.bucket.do(z.ctx, "read of .zip", requestTimeout, func(ctx context.Context) error {
		if err := broken; err != nil {
			broken = nil
			return err
		}
		n, err = z.try(ctx, p)
		return err
	})
	return n, err
}

// try opens the stream where it was, and reads once. ctx bounds the wait, and not the
// stream.
func (z *zipReader) try(ctx context.Context, p []byte) (n int, err error) {
	streamCtx, cancel := context.WithCancel(z.ctx)
	z.cancel, z.stall = cancel, time.AfterFunc(retryLimit, cancel)
	z.stall.Stop()
	defer context.AfterFunc(ctx, cancel)()
	if err = z.open(streamCtx); err != nil {
		z.drop()
		return 0, err
	}
	return z.next(p)
}

// next reads once from the open stream. What comes with an error is read again.
func (z *zipReader) next(p []byte) (n int, err error) {
	n, err = z.r.Read(p)
	if err == io.EOF && z.end < 0 {
		z.end = z.offset + int64(n)
	}
	if err != nil && z.offset+int64(n) != z.end {
		z.drop()
		return 0, err
	}
	z.offset += int64(n)
	z.sum = crc32.Update(z.sum, crc32c, p[:n])
	return n, nil
}

func (z *zipReader) open(ctx context.Context) (err error) {
	z.r, err = z.s.bucket.object(z.v, extZip).Generation(z.attrs.Generation).NewRangeReader(ctx, z.offset, -1)
	if err == nil && z.offset == 0 {
		z.attrs, z.end = z.r.Attrs, z.r.Attrs.Size
	}
	if err == nil && z.r.Attrs.Decompressed { // GCS sends all of it
		_, err = io.CopyN(io.Discard, z.r, z.offset)
	}
	return err
}

// drop closes what is open.
func (z *zipReader) drop() (err error) {
	defer z.cancel()
	if z.r != nil {
		err = z.r.Close()
	}
	z.r = nil
	return err
}

// Close returns the error that ended the stream, if one has.
func (z *zipReader) Close() error {
	err := z.drop()
	if z.err == nil || z.err == io.EOF {
		z.err = fs.ErrClosed
	} else {
		err = z.err
	}
	return z.s.wrapError(z.ctx, "Zip", z.v, err)
}
