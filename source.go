package gcs

import (
	"bytes"
	"crypto/md5"
	"fmt"
	"io"
)

// blockSize is what a zip in memory is read by: no block is ever copied to a
// larger one.
const blockSize = 64 << 10

// A source is the zip that a save was given. Its head is read ahead: a small zip
// is then in memory as a whole, and can be sent any number of times. A larger
// one is sent as it is read, and can be sent again only if its reader can seek.
type source struct {
	r     io.Reader
	md5   []byte // what the zip must hash to, nil for anything
	limit int    // how large a small zip may be
	start int64  // where the zip starts in a reader that can seek, -1 in another

	loaded bool
	head   [][]byte // the first blocks, until they are sent if that is not all
	whole  bool     // head is the whole zip
	spent  bool     // bytes that are not in head were read
	size   int64    // bytes read since the start of the zip
	err    error    // what the reader or the check failed with
}

func newSource(r io.Reader, sum []byte, limit int) *source {
	z := &source{r: r, limit: limit, start: -1}
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

// bytesSource is a source that is loaded.
func bytesSource(b []byte) *source {
	return &source{head: [][]byte{b}, size: int64(len(b)), loaded: true, whole: true}
}

// load reads ahead, once, and checks a small zip.
func (z *source) load() error {
	if z.loaded {
		return z.err
	}
	z.loaded = true
	for z.size <= int64(z.limit) {
		block := make([]byte, blockSize)
		n, err := z.fill(block)
		z.head = append(z.head, block[:n])
		if err == io.EOF {
			z.whole = true
			return z.check()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// A readError is one of the caller's reader, whatever kind it would be elsewhere.
type readError struct{ err error }

func (e readError) Error() string { return "reading the zip: " + e.err.Error() }
func (e readError) Unwrap() error { return e.err }

// check compares the hash of a zip in memory with what it must be.
func (z *source) check() error {
	if z.md5 == nil {
		return nil
	}
	h := md5.New()
	for _, block := range z.head {
		h.Write(block)
	}
	if sum := h.Sum(nil); !bytes.Equal(sum, z.md5) {
		z.err = z.mismatch(sum)
	}
	return z.err
}

func (z *source) mismatch(sum []byte) error {
	return badRequest("zip", fmt.Errorf("has the MD5 %x, and not %x", sum, z.md5))
}

// fill is io.ReadFull, except that an io.ErrUnexpectedEOF of the reader itself
// remains a failure.
func (z *source) fill(block []byte) (n int, err error) {
	for n < len(block) && err == nil {
		var m int
		m, err = z.Read(block[n:])
		n += m
	}
	return n, err
}

// Read reads what is not in head.
func (z *source) Read(p []byte) (int, error) {
	n, err := z.r.Read(p)
	z.size += int64(n)
	if err != nil && err != io.EOF {
		z.err = readError{err}
		err = z.err
	}
	return n, err
}

// copyTo passes the whole zip to write.
func (z *source) copyTo(write func([]byte) error) error {
	head := z.head
	z.head, z.spent = nil, true
	for i, block := range head {
		if err := write(block); err != nil {
			return err
		}
		head[i] = nil
	}
	block := make([]byte, blockSize)
	for {
		n, err := z.fill(block)
		if n > 0 {
			if err := write(block[:n]); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// ready reports whether the whole zip can be sent, having made it so if its
// reader can seek.
func (z *source) ready() bool {
	if !z.spent {
		return true
	}
	if z.start < 0 || z.err != nil {
		return false
	}
	if _, err := z.r.(io.Seeker).Seek(z.start, io.SeekStart); err != nil {
		return false
	}
	z.spent, z.size = false, 0
	return true
}
