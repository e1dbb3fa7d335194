package gcs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"net/http"
	"time"

	"cloud.google.com/go/storage"
	"google.golang.org/grpc/codes"
)

var contentTypes = map[string]string{
	extInfo: "application/json",
	extMod:  "text/plain; charset=utf-8",
	extZip:  "application/zip",
	extLock: "text/plain; charset=utf-8",
}

// slowLine is how many bytes a second an upload is expected to make at least,
// before it counts as hung.
const slowLine = 256 << 10

func uploadTimeout(size int64) time.Duration {
	return 2*requestTimeout + time.Duration(size/slowLine)*time.Second
}

// onlyOver is the condition that what is live under a name is still old, or
// still nothing if old is nil.
func onlyOver(old *storage.ObjectAttrs) storage.Conditions {
	if old == nil {
		return storage.Conditions{DoesNotExist: true}
	}
	return storage.Conditions{GenerationMatch: old.Generation}
}

// send stores what a loaded source holds, if cond holds.
func (s *Storage) send(ctx context.Context, v version, ext string, cond storage.Conditions, metadata map[string]string, z *source) error {
	if !z.whole {
		return s.stream(ctx, v, cond, metadata, z)
	}
	_, err := s.put(ctx, v, ext, cond, func() map[string]string { return metadata }, z.head)
	return err
}

// put stores an object that is in memory, in one request, if cond holds, and
// again until it is answered, with metadata made for each try. An error that isRefused can mean that an earlier
// try was applied.
//
// The client's own retries need a buffer for each upload, of 256 KiB for a
// go.mod of 100 bytes. Here the bytes are at hand.
func (s *Storage) put(ctx context.Context, v version, ext string, cond storage.Conditions, metadata func() map[string]string, body [][]byte) (attrs *storage.ObjectAttrs, err error) {
	sum, size := uint32(0), int64(0)
	for _, b := range body {
		sum = crc32.Update(sum, crc32c, b)
		size += int64(len(b))
	}
	// Over gRPC the client would retry without the bytes that are gone.
	once := s.object(v, ext).Retryer(storage.WithPolicy(storage.RetryNever))
	try := func(ctx context.Context) error {
		w := writer(ctx, once, ext, cond, metadata())
		w.ChunkSize = 0
		w.CRC32C, w.SendCRC32C = sum, true // sent ahead, so that GCS refuses what arrives cut short
		var writeErr error
		for _, b := range body {
			if _, writeErr = w.Write(b); writeErr != nil {
				break // the request has failed; Close tells why
			}
		}
		if err := w.Close(); err != nil {
			return err
		}
		attrs = w.Attrs()
		return writeErr
	}
	start := time.Now()
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, 10*time.Second) {
		err := attempt(ctx, uploadTimeout(size), try)
		if err == nil || !isTransient(err) || ctx.Err() != nil || time.Since(start) > retryLimit {
			return attrs, writeNeeds(err, cond)
		}
		if sleepErr := sleep(ctx, s.rand(pause)); sleepErr != nil {
			return nil, fmt.Errorf("%w: %w", sleepErr, err)
		}
	}
}

var crc32c = crc32.MakeTable(crc32.Castagnoli)

func writer(ctx context.Context, o *storage.ObjectHandle, ext string, cond storage.Conditions, metadata map[string]string) *storage.Writer {
	w := o.If(cond).NewWriter(ctx)
	w.ContentType = contentTypes[ext]
	w.Metadata = metadata
	return w
}

func writeNeeds(err error, cond storage.Conditions) error {
	if cond.DoesNotExist {
		return needs(err, "storage.objects.create")
	}
	return needs(err, "storage.objects.create and storage.objects.delete")
}

// stream stores a zip that is not in memory, in chunks, if cond holds. When
// reading it fails, the upload is abandoned and nothing is stored.
//
// Its MD5 is left to GCS to check, which computes it anyway. Here it would be
// computed while nothing is sent, which took as long as sending does over loopback.
func (s *Storage) stream(ctx context.Context, v version, cond storage.Conditions, metadata map[string]string, z *source) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	w := writer(ctx, s.object(v, extZip), extZip, cond, metadata)
	w.ChunkSize = s.chunkSize
	w.MD5 = z.md5
	w.ChunkTransferTimeout = uploadTimeout(int64(s.chunkSize))
	patience := 2 * (w.ChunkTransferTimeout + requestTimeout)
	w.ChunkRetryDeadline = patience

	// The client sends a chunk again that hangs, but waits without end for the
	// start of the upload. The zip's own reader may take its time.
	hung := time.AfterFunc(patience, func() { cancel(errHung) })
	defer hung.Stop()
	err := z.copyTo(func(p []byte) error {
		hung.Reset(patience)
		_, err := w.Write(p)
		hung.Stop()
		return err
	})
	if err != nil {
		cancel(err) // closing alone would publish what was sent so far
	}
	hung.Reset(patience)
	if closeErr := w.Close(); err == nil {
		err = closeErr
	}
	switch {
	case z.err != nil:
		return z.err
	case errors.Is(context.Cause(ctx), errHung):
		return errHung
	case z.md5 != nil && hasCode(err, http.StatusBadRequest, codes.InvalidArgument):
		z.err = badRequest("zip", fmt.Errorf("was refused, with the MD5 %x that it was to have: %w", z.md5, err))
		return z.err
	case err == nil && z.md5 != nil && len(w.Attrs().MD5) > 0 && !bytes.Equal(w.Attrs().MD5, z.md5):
		// An emulator that stores first. This save fails, so that nobody will
		// take the object for part of a version.
		z.err = z.mismatch(w.Attrs().MD5)
		return errors.Join(z.err, s.remove(ctx, v, extZip, w.Attrs()))
	}
	return writeNeeds(err, cond)
}

var errHung = errors.New("the upload made no progress")
