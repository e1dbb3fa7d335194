package gcs

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"net/http"
	"strings"
	"time"

	"cloud.google.com/go/storage"
	"github.com/googleapis/gax-go/v2"
	"google.golang.org/grpc/codes"
)

var contentTypes = map[string]string{
	extInfo:  "application/json",
	extMod:   "text/plain; charset=utf-8",
	extZip:   "application/zip",
	extClaim: "text/plain; charset=utf-8",
}

// slowLine is how many bytes a second an upload makes at least, before it counts
// as hung.
const slowLine = 256 << 10

func uploadTimeout(size int64) time.Duration {
	return 2*requestTimeout + time.Duration(size/slowLine)*time.Second
}

var crc32c = crc32.MakeTable(crc32.Castagnoli)

func newWriter(ctx context.Context, object *storage.ObjectHandle, ext string, cond storage.Conditions, metadata map[string]string) *storage.Writer {
	w := object.If(cond).NewWriter(ctx)
	w.ContentType = contentTypes[ext]
	w.Metadata = metadata
	return w
}

// chunkWriter returns a writer that sends a zip in chunks. The client sends a chunk again
// that hangs, once at least, and what t takes for worth another try.
func (b *bucket) chunkWriter(ctx context.Context, v ModuleVersion, cond storage.Conditions, metadata map[string]string, md5 []byte, t *tries) *storage.Writer {
	retry := func(err error) bool {
		reason := retryReason(err)
		if reason == "" || ctx.Err() != nil {
			return false
		}
		t.failed(err, false)
		t.again(reason)
		return true
	}
	// The caller's own settings are to change nothing. The client's own back-off grows
	// to 30 s, and would outlast ChunkRetryDeadline.
	object := b.object(v, extZip).Retryer(storage.WithPolicy(storage.RetryIdempotent), storage.WithErrorFunc(retry),
		storage.WithMaxAttempts(math.MaxInt), storage.WithMaxRetryDuration(retryLimit),
		storage.WithBackoff(gax.Backoff{Initial: 100 * time.Millisecond, Max: requestTimeout}))
	w := newWriter(ctx, object, extZip, cond, metadata)
	w.MD5 = md5
	w.ChunkSize = b.chunkSize
	w.ChunkTransferTimeout = uploadTimeout(int64(b.chunkSize))
	w.ChunkRetryDeadline = 2 * (w.ChunkTransferTimeout + requestTimeout)
	return w
}

// put stores an object that is in memory, in one request, with metadata made for
// each try. An error that isPreconditionFailed can mean that an earlier try was applied.
//
// The client's own retries need a buffer for each upload, of 256 KiB for a go.mod
// of 100 bytes. Here the bytes are at hand.
func (b *bucket) put(ctx context.Context, v ModuleVersion, ext string, cond storage.Conditions, metadata func() map[string]string, body []byte) (attrs *storage.ObjectAttrs, err error) {
	sendSum := true
	err = b.do(ctx, "upload of ."+ext, uploadTimeout(int64(len(body))), func(ctx context.Context) error {
		w := newWriter(ctx, b.object(v, ext), ext, cond, metadata())
		w.ChunkSize = 0
		// Sent ahead, so that GCS refuses what arrives cut short.
		w.CRC32C, w.SendCRC32C = crc32.Checksum(body, crc32c), sendSum
		_, writeErr := w.Write(body)
		err := w.Close() // after a failed Write, it tells why
		if err == nil {
			err = writeErr
		}
		if sendSum && hasCode(err, 0, codes.InvalidArgument) {
			// storage-testbench takes no checksum ahead over gRPC, where an upload
			// that is cut short is never finalized.
			sendSum = false
			return errors.New("the server takes no checksum ahead")
		}
		attrs = w.Attrs()
		return err
	})
	return attrs, err
}

// errBrokenOff means that an upload in chunks failed for a reason that may pass, for
// longer than the client retried.
var errBrokenOff = errors.New("the upload broke off")

// stream stores a zip that is not in memory, in chunks. When reading it fails or
// panics, the upload is abandoned and nothing is stored.
//
// GCS checks the MD5, which it computes anyway. To compute it here took as long as
// sending does over loopback, since nothing is sent meanwhile.
func (b *bucket) stream(ctx context.Context, v ModuleVersion, cond storage.Conditions, metadata map[string]string, z *source) error {
	sendCtx, cancel := context.WithCancelCause(ctx)
	t := b.newTries(ctx, "upload of .zip")
	defer t.done(false)
	w := b.chunkWriter(sendCtx, v, cond, metadata, z.md5, t)
	// The client sends a chunk again that hangs, but waits without end for the
	// start of the upload. The zip's own reader may take its time.
	hung := time.AfterFunc(w.ChunkRetryDeadline, func() { cancel(errBrokenOff) })
	hung.Stop()
	opened := false
	end := func() {
		hung.Stop()
		cancel(nil)
		if opened { // otherwise Close would begin an upload
			abort(w)
		}
	}
	defer end() // the reader may panic

	err := z.copyTo(sendCtx, func(p []byte) error {
		opened = true
		hung.Reset(w.ChunkRetryDeadline)
		defer hung.Stop()
		_, err := w.Write(p)
		if err == nil {
			t.done(true)
		}
		return err
	})
	if err == nil {
		hung.Reset(w.ChunkRetryDeadline)
		err = w.Close()
	}
	end()
	switch {
	case z.err != nil:
		return z.err
	case err == nil:
		t.done(true)
		return b.checkMD5(ctx, v, w.Attrs(), z)
	case errors.Is(context.Cause(sendCtx), errBrokenOff):
		return fmt.Errorf("%w: %w", errBrokenOff, cmp.Or(t.last, errors.New("no answer")))
	}
	return withHint(streamError(err, z))
}

// abort ends an upload that is not to be stored, and waits for its goroutine. The
// context has to be cancelled before. That is not enough: over gRPC, Close can still
// publish what was sent so far. After a Close it does nothing.
func abort(w *storage.Writer) {
	//lint:ignore SA1019 to cancel the context, as it advises, is not enough
	w.CloseWithError(context.Canceled)
	w.Close()
}

// streamError tells what the error of an upload in chunks means.
func streamError(err error, z *source) error {
	switch {
	case z.md5 != nil && hasCode(err, http.StatusBadRequest, codes.InvalidArgument) && strings.Contains(strings.ToLower(err.Error()), "md5"):
		z.err = badRequest("zip", fmt.Errorf("was refused, with the MD5 %x that it was to have: %w", z.md5, err))
		return z.err
	case isAbsent(err) || hasCode(err, http.StatusGone, codes.NotFound): // not the object: the session of the upload
		return fmt.Errorf("%w: %w", errBrokenOff, kindError{KindUnexpected, err})
	case retryReason(err) != "":
		return fmt.Errorf("%w: %w", errBrokenOff, err)
	}
	return err
}

// checkMD5 compares what the server says that it has stored with what it was to
// store. An emulator may store before it checks. The save fails, so the object is no
// part of a version; but reads would find it.
func (b *bucket) checkMD5(ctx context.Context, v ModuleVersion, stored *storage.ObjectAttrs, z *source) error {
	if z.md5 == nil || len(stored.MD5) == 0 || bytes.Equal(stored.MD5, z.md5) {
		return nil
	}
	z.err = z.mismatch(stored.MD5)
	return errors.Join(z.err, b.remove(ctx, v, extZip, ifNotReplaced(stored)))
}
