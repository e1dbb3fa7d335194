package main

import (
	"io/fs"
	"os"
	"sync"
)

// A tempDir is the directory of a program's temporary files. The first one makes it.
type tempDir struct {
	mu      sync.Mutex
	name    string
	removed bool
}

// create makes a temporary file, which its caller may remove earlier than remove does.
func (d *tempDir) create(pattern string) (_ *os.File, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.removed {
		return nil, fs.ErrClosed
	}
	if d.name == "" {
		if d.name, err = os.MkdirTemp("", "athensgcs-*"); err != nil {
			return nil, err
		}
	}
	return os.CreateTemp(d.name, pattern)
}

// remove removes the files that are left, and lets no more be made: a second interrupt
// calls it while a command still runs.
func (d *tempDir) remove() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.removed = true
	if d.name != "" {
		_ = os.RemoveAll(d.name)
	}
}
