package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"runtime"

	"github.com/dustin/go-humanize"

	"github.com/athensgcs/gcs"
)

var verifyCommand = &command{
	name:  "verify",
	brief: "check the files of the complete versions",
	usage: `Verify reads every complete version and checks that its zip is one that the go
command takes, that the .mod is the go.mod in it (or what the go command makes if
there is none), and that the .info names the version and no time that is none. If it
is given a go.sum file or a checksum database, it compares the checksums of .zip and
.mod with them. It asks the database through the proxies in GOPROXY that serve it,
and not for modules that match GONOSUMDB (or GOPRIVATE, where that is not set), which
go env -w can set too. It changes nothing. roles/storage.objectViewer permits it.

Exit status:
    0  no file is wrong
    1  some are; with -strict: or a checksum is not known
    2  not everything could be verified, or not one version was: none is complete,
       or there is nothing of the module or below the prefix

With -json, every version that was looked at gets a line, also one that is not
complete. An outcome is right, wrong, not complete, odd name, gone or failed. The
summary is the last line.

Examples:
    athensgcs verify -bucket my-modules
    athensgcs verify -bucket my-modules -sumdb sum.golang.org -since 24h
    athensgcs verify -bucket my-modules -sums go.sum -module github.com/my/module
    athensgcs verify -bucket my-modules -json | jq 'select(.outcome == "wrong")'
`,
	flags: func(p *program, f *flag.FlagSet) {
		p.moduleFlags(f)
		p.sinceFlag(f)
		f.StringVar(&p.sums, "sums", "", "compare with the checksums in this go.sum `file`")
		f.StringVar(&p.sumdb, "sumdb", "", "compare with this checksum `database`: sum.golang.org, or NAME+KEY or \"NAME+KEY URL\", as in GOSUMDB")
		f.BoolVar(&p.strict, "strict", false, "with -sums or -sumdb: a version whose checksum is not known makes the exit status 1")
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
	OddNames int            `json:"oddNames,omitempty"`
	Older    int            `json:"older,omitempty"`
	Compared map[string]int `json:"compared,omitempty"` // zips, by reference
	Unknown  map[string]int `json:"unknown,omitempty"`
	Excluded int            `json:"excluded,omitempty"` // by GONOSUMDB

	references []reference
}

func (s *verification) empty() bool { return s.Versions+s.notVerified()+s.Failed+s.Older == 0 }

// notVerified is how many versions were not verified although nothing failed.
func (s *verification) notVerified() int { return s.Skipped + s.Gone + s.OddNames }

func (s *verification) String() string {
	text := fmt.Sprintf("%s, %s: %s wrong", plural(s.Versions, "version"), humanize.Bytes(uint64(s.Bytes)), humanize.Comma(int64(s.Wrong)))
	for _, r := range s.references {
		text += fmt.Sprintf("; %d compared with %s, %d unknown to it", s.Compared[r.name()], r.name(), s.Unknown[r.name()])
	}
	return text + counts(count{s.Excluded, "excluded by GONOSUMDB"}, count{s.Skipped, "not complete, skipped"},
		count{s.OddNames, "with an odd name, skipped"}, count{s.Gone, "gone meanwhile"}, count{s.Failed, "failed"}, count{s.Older, "older"})
}

func (s *verification) add(r *result) {
	switch r.Outcome {
	case older:
		s.Older++
	case incomplete:
		s.Skipped++
	case oddName:
		s.OddNames++
	case gone:
		s.Gone++
	case notRead:
		s.Failed++
	case wrong:
		s.Wrong++
		fallthrough
	case right:
		s.Versions++
		s.Bytes += r.bytes
	}
	for _, name := range r.compared {
		s.Compared[name]++
	}
	for name := range r.Unknown {
		s.Unknown[name]++
	}
	if r.excluded {
		s.Excluded++
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
	work := func(ctx context.Context, v version) (*result, error) { return p.verifyOne(ctx, v, references) }
	err = inOrder(ctx, p.jobs, p.scan, work, func(r *result) error { return p.record(sum, r) })
	if err := p.summarize(err, sum); err != nil {
		return 0, err
	}
	switch {
	case sum.Failed > 0:
		return 0, fmt.Errorf("%s could not be verified; see above, and run it again", plural(sum.Failed, "version"))
	case sum.Versions == 0 && sum.notVerified() > 0:
		return 0, errors.New("not one version was verified: none is complete")
	case sum.Wrong > 0 || p.strict && len(sum.Unknown) > 0:
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
	for v, err := range p.scan(ctx) {
		if err != nil {
			return err
		}
		if v.isToVerify() {
			total += v.Size
			p.progress.add(v.Size)
		}
	}
	p.startProgress(total)
	return nil
}

func (v version) isToVerify() bool { return v.State == gcs.Complete && v.Odd == "" && !v.older }

// record counts a result and prints it, unless it is a good one.
func (p *program) record(sum *verification, r *result) error {
	sum.add(r)
	name := r.Module + "@" + r.Version + ": "
	var lines []string
	switch {
	case r.Outcome == older:
		return nil
	case r.Outcome == oddName:
		lines = append(lines, name+"not verified: "+r.Odd)
	case r.Error != "":
		lines = append(lines, name+"could not be verified: "+r.Error)
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
