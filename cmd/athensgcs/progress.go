package main

import (
	"io"
	"sync"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/schollz/progressbar/v3"
)

// A progress shows on a terminal how many versions and bytes a command has passed.
type progress struct {
	w        io.Writer
	mu       sync.Mutex
	bar      *progressbar.ProgressBar // nil shows nothing
	total    int64                    // bytes to pass, 0 when not known
	versions int
	bytes    int64
	drawn    bool // the bar is on the terminal
}

// newProgress returns a progress that shows a bar with the time left when it
// is told how many bytes there are in total, and a rate otherwise.
func newProgress(w io.Writer, total int64) *progress {
	p := &progress{w: w, total: total}
	options := []progressbar.Option{
		progressbar.OptionSetWriter(p),
		progressbar.OptionThrottle(100 * time.Millisecond),
		progressbar.OptionUseANSICodes(true),
	}
	if total == 0 {
		options = append(options,
			progressbar.OptionShowIts(),
			progressbar.OptionSetItsString("versions"),
			progressbar.OptionSetPredictTime(false),
			progressbar.OptionSetSpinnerChangeInterval(0), // no goroutine
		)
		p.bar = progressbar.NewOptions64(-1, options...)
		return p
	}
	options = append(options, progressbar.OptionShowBytes(true), progressbar.OptionShowCount(), progressbar.OptionSetWidth(20))
	p.bar = progressbar.NewOptions64(total, options...)
	return p
}

// Write draws the bar, for the bar.
func (p *progress) Write(b []byte) (int, error) {
	p.drawn = true
	return p.w.Write(b)
}

// add counts a version.
func (p *progress) add(bytes int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bar == nil {
		return
	}
	p.versions++
	p.bytes += bytes
	text := plural(p.versions, "version")
	if p.total == 0 {
		text += ", " + humanize.Bytes(uint64(p.bytes))
		bytes = 1 // a step is a version
	}
	p.bar.Describe(text)
	_ = p.bar.Add64(bytes)
}

// aside takes the progress off the terminal while f prints.
func (p *progress) aside(f func() error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clear()
	return f()
}

// done takes the progress off the terminal for good.
func (p *progress) done() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clear()
	p.bar = nil
}

func (p *progress) clear() {
	if p.drawn {
		_ = p.bar.Clear()
		p.drawn = false
	}
}
