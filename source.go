package gcs

import (
	"bytes"
	"context"
	"crypto/md5"
	"fmt"
	"io"
)

const (
	// maxBuffered is the largest zip that is held in memory as a whole, which spares
	// it the chunk and allows it to be sent twice.
	maxBuffered = 1 << 20
	// minBuffer is how much of a zip is read first.
	minBuffer = 32 << 10
	// maxEmptyReads is how many reads in a row may return nothing.
	maxEmptyReads = 100
)

// A source is a file to upload. Its head is read ahead: a small zip is then in
// memory as a whole, and can be sent any number of times. A larger one is sent as
// it is read, and can be sent again only if its reader can seek.
type source struct {
	r     io.Reader
	md5   []byte // what the zip must hash to, nil for anything
	limit int    // how large a small zip may be
	start int64  // where the zip starts in a reader that can seek, -1 in another

	head     []byte // bytes that are read ahead and not sent; all of the file if buffered
	buffered bool   // head is the whole file
	read     int64  // bytes read since the start of the zip
	size     int64  // of the zip when it was last read to its end, -1 before
	err      error  // what the reader or the check failed with
}

// newSource returns the source of a zip. It reads nothing.
func newSource(r io.Reader, sum []byte, limit int) *source {
	z := &source{r: r, limit: limit, start: -1, size: -1}
	if len(sum) == md5.Size {
		z.md5 = sum
	}
	if seeker, ok := r.(io.Seeker); ok {
		if at, err := seeker.Seek(0, io.SeekCurrent); err == nil {
			z.start = at
		}
	}
	return z
}

// bytesSource returns the source of a file that is in memory.
func bytesSource(b []byte) *source {
	return &source{head: b, buffered: true, size: int64(len(b))}
}

// load reads the head, and checks a small zip. It is called once, before anything is
// written.
func (z *source) load(ctx context.Context) error {
	for len(z.head) <= z.limit {
		if len(z.head) == cap(z.head) {
			size := min(max(minBuffer, 8*cap(z.head)), z.limit+1)
			z.head = append(make([]byte, 0, size), z.head...)
		}
		n, err := z.fill(ctx, z.head[len(z.head):cap(z.head)])
		z.head = z.head[:len(z.head)+n]
		if err == io.EOF {
			z.buffered = true
			return z.check()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// check compares the hash of a zip in memory with what it must be.
func (z *source) check() error {
	if sum := md5.Sum(z.head); z.md5 != nil && !bytes.Equal(sum[:], z.md5) {
		z.err = z.mismatch(sum[:])
	}
	return z.err
}

func (z *source) mismatch(sum []byte) error {
	return badRequest("zip", fmt.Errorf("has the MD5 %x, and not %x", sum, z.md5))
}

// fill reads until p is full. Between reads the context decides whether to go on.
// An io.EOF is the end of the zip, and any other error is kept.
func (z *source) fill(ctx context.Context, p []byte) (n int, err error) {
	for empty := 0; n < len(p); {
		if err = ctx.Err(); err != nil {
			return n, err
		}
		var m int
		m, err = z.r.Read(p[n:])
		n, z.read = n+m, z.read+int64(m)
		if empty++; m > 0 {
			empty = 0
		}
		if err == nil && empty == maxEmptyReads {
			err = io.ErrNoProgress
		}
		if err == io.EOF {
			z.size = z.read
			return n, err
		}
		if err != nil {
			z.err = readError{err}
			return n, z.err
		}
	}
	return n, nil
}

// copyTo passes the whole zip to write. The buffer of the head serves for the rest.
func (z *source) copyTo(ctx context.Context, write func([]byte) error) (err error) {
	block := z.head
	z.head = block[:0]
	for {
		if len(block) > 0 {
			if err := write(block); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		var n int
		n, err = z.fill(ctx, block[:cap(block)])
		block = block[:n]
	}
}

// canRewind reports whether the zip can be sent more than once.
func (z *source) canRewind() bool { return z.buffered || z.start >= 0 }

// rewind makes the source ready to be sent again, or says why it cannot.
func (z *source) rewind() error {
	if z.buffered {
		return nil
	}
	if z.start < 0 {
		return errCannotReread
	}
	if _, err := z.r.(io.Seeker).Seek(z.start, io.SeekStart); err != nil {
		return fmt.Errorf("%w: %w", errCannotReread, err)
	}
	z.read = 0
	return nil
}
