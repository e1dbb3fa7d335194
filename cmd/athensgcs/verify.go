package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"runtime"
	"strings"
	"sync"

	"github.com/dustin/go-humanize"
	"golang.org/x/sync/errgroup"

	"github.com/athensgcs/gcs"
)

var verifyCommand = &command{
	name:  "verify",
	brief: "check the files of the complete versions",
	usage: `Verify reads every complete version and checks that its zip is one that the go
command takes, that the .mod is the go.mod in it (or what the go command makes if
there is none), and that the .info names the version. If it is given a go.sum file
or a checksum database, it compares the checksums of .zip and .mod with them. It
asks the database through the proxies in GOPROXY that serve it, and not for modules
that match GONOSUMDB (or GOPRIVATE, where that is not set), which go env -w can set
too. It changes nothing. roles/storage.objectViewer permits it.

Examples:
    athensgcs verify -bucket my-modules
    athensgcs verify -bucket my-modules -sumdb sum.golang.org
    athensgcs verify -bucket my-modules -sums go.sum -module github.com/my/module
`,
	flags: func(p *program, f *flag.FlagSet) {
		p.moduleFlag(f)
		f.StringVar(&p.sums, "sums", "", "compare with the checksums in this go.sum `file`")
		f.StringVar(&p.sumdb, "sumdb", "", "compare with this checksum `database`: sum.golang.org, or NAME+KEY or \"NAME+KEY URL\", as in GOSUMDB")
		f.IntVar(&p.jobs, "j", runtime.NumCPU(), "how many `versions` to read at the same time")
	},
	run: (*program).verify,
}

// A verification is the summary of a verify.
type verification struct {
	Versions int            `json:"versions"` // verified, right or wrong
	Bytes    int64          `json:"bytes"`
	Wrong    int            `json:"wrong"`
	Skipped  int            `json:"notComplete"`
	Gone     int            `json:"gone"` // deleted while they were read
	Failed   int            `json:"failed"`
	Compared map[string]int `json:"compared,omitempty"` // zips, by reference
	Unknown  map[string]int `json:"unknown,omitempty"`
	Excluded int            `json:"excluded,omitempty"` // by GONOSUMDB

	references []reference
}

func (s *verification) empty() bool { return s.Versions+s.Skipped+s.Gone+s.Failed == 0 }

func (s *verification) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s, %s: %s wrong", plural(s.Versions, "version"), humanize.Bytes(uint64(s.Bytes)), humanize.Comma(int64(s.Wrong)))
	for _, r := range s.references {
		fmt.Fprintf(&b, "; %d compared with %s, %d unknown to it", s.Compared[r.name()], r.name(), s.Unknown[r.name()])
	}
	for _, c := range []struct {
		n    int
		text string
	}{{s.Excluded, "excluded by GONOSUMDB"}, {s.Skipped, "not complete, skipped"}, {s.Gone, "gone meanwhile"}, {s.Failed, "failed"}} {
		if c.n > 0 {
			fmt.Fprintf(&b, "; %d %s", c.n, c.text)
		}
	}
	return b.String()
}

func (s *verification) add(r *result) {
	s.Versions++
	s.Bytes += r.bytes
	for _, name := range r.compared {
		s.Compared[name]++
	}
	for name := range r.Unknown {
		s.Unknown[name]++
	}
	if r.excluded {
		s.Excluded++
	}
	if len(r.Problems) > 0 {
		s.Wrong++
	}
}

// verify checks the files of the complete versions.
func (p *program) verify(ctx context.Context) (int, error) {
	references, err := p.references(ctx)
	if err != nil {
		return 0, err
	}
	if err := p.measure(ctx); err != nil {
		return 0, err
	}
	sum := &verification{Compared: map[string]int{}, Unknown: map[string]int{}, references: references}
	var mu sync.Mutex
	workers, workersCtx := errgroup.WithContext(ctx)
	workers.SetLimit(p.jobs)
	err = p.scan(workersCtx, func(v gcs.VersionStatus) error {
		if v.State != gcs.Complete {
			mu.Lock()
			defer mu.Unlock()
			sum.Skipped++
			return nil
		}
		workers.Go(func() error {
			r, err := verifyOne(workersCtx, p.storage, v, references)
			if err != nil {
				return err
			}
			p.progress.add(v.Size)
			mu.Lock()
			defer mu.Unlock()
			return p.record(sum, r)
		})
		return nil
	})
	// The error of a worker ends the scan too, and is the cause.
	if failed := workers.Wait(); failed != nil {
		err = failed
	}
	if err := p.summarize(err, sum); err != nil {
		return 0, err
	}
	switch {
	case sum.Failed > 0:
		return 0, fmt.Errorf("%s could not be verified; see above, and run it again", plural(sum.Failed, "version"))
	case sum.Wrong > 0:
		return statusFound, nil
	}
	return statusOK, nil
}

// measure scans the versions to learn how many bytes are to be read, if there is
// somebody to show it to.
func (p *program) measure(ctx context.Context) error {
	if !p.terminal {
		return nil
	}
	var total int64
	err := p.scan(ctx, func(v gcs.VersionStatus) error {
		if v.State == gcs.Complete {
			total += v.Size
			p.progress.add(v.Size)
		}
		return nil
	})
	p.startProgress(total)
	return err
}

// record counts a result and prints it, unless it is a good one.
func (p *program) record(sum *verification, r *result) error {
	name := r.Module + "@" + r.Version + ": "
	var lines []string
	switch {
	case errors.Is(r.err, errGone):
		sum.Gone++
		return nil
	case r.err != nil:
		sum.Failed++
		r.Error = oneLine(r.err)
		lines = append(lines, name+"could not be verified: "+r.Error)
	default:
		sum.add(r)
	}
	for _, problem := range r.Problems {
		lines = append(lines, name+problem.String())
	}
	for reference, reason := range r.Unknown {
		if reason != "" {
			lines = append(lines, fmt.Sprintf("%snot known to %s: %s", name, reference, reason))
		}
	}
	if p.json || len(lines) > 0 {
		return p.print(r, lines...)
	}
	return nil
}
