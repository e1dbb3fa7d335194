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
	mu       sync.Mutex
	bar      *progressbar.ProgressBar // nil shows nothing
	total    int64                    // bytes to pass, 0 when not known
	versions int64
	bytes    int64
}

// newProgress returns a progress that shows a bar with the time left when it
// is told how many bytes there are in total, and a rate otherwise.
func newProgress(w io.Writer, total int64) *progress {
	options := []progressbar.Option{
		progressbar.OptionSetWriter(w),
		progressbar.OptionThrottle(100 * time.Millisecond),
		progressbar.OptionUseANSICodes(true),
		progressbar.OptionClearOnFinish(),
	}
	if total == 0 {
		options = append(options,
			progressbar.OptionShowIts(),
			progressbar.OptionSetItsString("versions"),
			progressbar.OptionSetPredictTime(false),
			progressbar.OptionSetSpinnerChangeInterval(0), // no goroutine
		)
		return &progress{bar: progressbar.NewOptions64(-1, options...)}
	}
	options = append(options, progressbar.OptionShowBytes(true), progressbar.OptionShowCount(), progressbar.OptionSetWidth(20))
	return &progress{bar: progressbar.NewOptions64(total, options...), total: total}
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
	text := humanize.Comma(p.versions) + " versions"
	step := min(bytes, p.total-p.bytes+bytes) // a version may have come after the total
	if p.total == 0 {
		text += ", " + humanize.Bytes(uint64(p.bytes))
		step = 1
	}
	p.bar.Describe(text)
	_ = p.bar.Add64(max(step, 0))
}

// aside takes the progress off the terminal while f prints.
func (p *progress) aside(f func() error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bar != nil {
		_ = p.bar.Clear()
	}
	return f()
}

// done takes the progress off the terminal for good.
func (p *progress) done() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bar != nil {
		_ = p.bar.Finish()
		p.bar = nil
	}
}
