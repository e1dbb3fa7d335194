package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"iter"

	"github.com/dustin/go-humanize"

	"github.com/athensgcs/gcs"
)

var loadCommand = &command{
	name:  "load",
	args:  "SOURCE",
	brief: "store the modules of a folder or of another bucket",
	usage: `Load stores the versions that a source has and the bucket does not. Each is verified,
and is there whole or not at all. What is there already stays. SOURCE is
    a module cache, or its cache/download, or any folder that a file-system GOPROXY serves
    the root of the disk storage of Athens
    gs://BUCKET or gs://BUCKET/PREFIX, another bucket of this layout

A version needs its zip. Its .mod and .info are made as the go command makes them
if they are missing. A zip that is not the module's, or whose .mod, .info or .ziphash
contradict it, is refused. After an interrupt, the same command goes on.
roles/storage.objectUser permits it.

Exit status: 0 if every zip of the source is in the bucket now, 1 if one was refused,
2 if the source or the bucket could not be read or written.

With -json, every version has a line, also one without a zip. The summary is the last
line.

Examples:
    athensgcs load -bucket my-modules "$(go env GOMODCACHE)/cache/download"
    athensgcs load -bucket my-modules -dry-run /var/lib/athens
    athensgcs load -bucket my-modules -prefix athens gs://old-modules/athens
`,
	flags: func(p *program, f *flag.FlagSet) {
		f.BoolVar(&p.dryRun, "dry-run", false, "store nothing, and name what would be stored")
		f.IntVar(&p.jobs, "j", 8, "how many `versions` to load at the same time")
	},
	run: (*program).load,
}

// A loaded is what became of a version of a source.
type loaded struct {
	gcs.ModuleVersion
	File    string  `json:"file,omitempty"` // its zip in a folder, or what is no version
	Outcome outcome `json:"outcome"`
	Reason  string  `json:"reason,omitempty"`
}

const (
	saved        outcome = "stored"
	alreadyThere outcome = "already there"
	withoutZip   outcome = "without a zip"
	refused      outcome = "refused"
)

// A loading is the summary of a load.
type loading struct {
	Versions int             `json:"versions"` // that have a zip
	Bytes    int64           `json:"bytes"`
	Outcomes map[outcome]int `json:"outcomes"`
	DryRun   bool            `json:"dryRun,omitempty"`
}

func (s *loading) empty() bool { return len(s.Outcomes) == 0 }

func (s *loading) String() string {
	text := fmt.Sprintf("%s, %s: %s %s", plural(s.Versions, "version"), humanize.Bytes(uint64(s.Bytes)), humanize.Comma(int64(s.Outcomes[saved])), s.tense(saved))
	for _, o := range []outcome{alreadyThere, refused, notRead, withoutZip} {
		text += counts(count{s.Outcomes[o], string(o)})
	}
	return text
}

func (s *loading) tense(o outcome) string {
	if s.DryRun && o == saved {
		return "would be stored"
	}
	return string(o)
}

// load saves the versions of a source.
func (p *program) load(ctx context.Context) (int, error) {
	if !p.dryRun {
		if err := p.storage.Check(ctx); err != nil {
			return 0, err
		}
	}
	source, err := p.openSource(p.args[0])
	if err != nil {
		return 0, err
	}
	if err := p.measureSource(ctx, source); err != nil {
		return 0, err
	}
	sum := &loading{Outcomes: map[outcome]int{}, DryRun: p.dryRun}
	err = inOrder(ctx, p.jobs, p.withListed(source), p.loadOne, func(c candidate) error { return p.recordLoad(sum, c) })
	if err == nil && sum.empty() {
		return 0, fmt.Errorf("%s has no modules, neither as a module cache or a file-system GOPROXY has them, nor as Athens' disk storage", p.args[0])
	}
	if err := p.summarize(err, sum); err != nil {
		return 0, err
	}
	switch n := sum.Outcomes[notRead]; {
	case n > 0:
		return 0, fmt.Errorf("%s could not be loaded; see above, and run it again", plural(n, "version"))
	case sum.Outcomes[refused] > 0:
		return statusFound, nil
	}
	return statusOK, nil
}

// measureSource learns how many bytes are to be read, if there is somebody to show
// it to.
func (p *program) measureSource(ctx context.Context, source source) error {
	if !p.terminal {
		return nil
	}
	var total int64
	for c, err := range source(ctx) {
		if err = cmp.Or(err, ctx.Err()); err != nil {
			return err
		}
		total += c.size
	}
	p.startProgress(total)
	return nil
}

// A listed is the states of a module's versions in the bucket, once it is done.
type listed struct {
	done   chan struct{}
	states map[string]gcs.State
	err    error
}

// withListed adds to each candidate what is in the bucket of its module. One list for
// all its versions costs no more than Exists for one, unless the bucket has hundreds.
func (p *program) withListed(source source) source {
	return func(ctx context.Context) iter.Seq2[candidate, error] {
		return func(yield func(candidate, error) bool) {
			var module string
			var there *listed
			for c, err := range source(ctx) {
				if c.err == nil && (there == nil || c.Module != module) {
					module, there = c.Module, p.list(ctx, c.Module)
				}
				c.there = there
				if !yield(c, err) {
					return
				}
			}
		}
	}
}

func (p *program) list(ctx context.Context, module string) *listed {
	l := &listed{done: make(chan struct{}), states: map[string]gcs.State{}}
	go func() {
		defer close(l.done)
		for v, err := range p.storage.Scan(ctx, module) {
			l.states[v.Version], l.err = v.State, err
		}
	}()
	return l
}

var errThere = errors.New("it is there")

// loadOne saves a version that the bucket does not have, and otherwise says why not. An
// error is a reason to load no others either.
func (p *program) loadOne(ctx context.Context, c candidate) (candidate, error) {
	if c.err == errWithoutZip {
		return c, nil
	}
	defer p.progress.add(c.size)
	if c.err != nil {
		return c, nil
	}
	<-c.there.done
	switch state := c.there.states[c.Version]; {
	case gcs.Is(c.there.err, gcs.KindBadRequest): // no object can have such a name
		c.err = c.there.err
	case c.there.err != nil:
		return c, c.there.err
	case state == gcs.Complete, p.dryRun && state == gcs.Unfinished:
		c.err = errThere
	default:
		c.err = p.transfer(ctx, c)
	}
	if c.err != nil && ctx.Err() != nil {
		return c, ctx.Err()
	}
	return c, nil
}

func (p *program) transfer(ctx context.Context, c candidate) error {
	files, err := c.open(ctx)
	if err != nil {
		return err
	}
	defer files.close()
	if err := files.check(ctx, c.ModuleVersion); err != nil || p.dryRun {
		return err
	}
	return p.storage.Save(ctx, c.Module, c.Version, files.mod, files.zip, files.md5, files.info)
}

// recordLoad counts what became of a version, and prints it unless that is what is
// wanted.
func (p *program) recordLoad(sum *loading, c candidate) error {
	l := loaded{ModuleVersion: c.ModuleVersion, File: c.file, Outcome: outcomeOf(c.err)}
	sum.Outcomes[l.Outcome]++
	if l.Outcome != withoutZip {
		sum.Versions++
		sum.Bytes += c.size
	}
	text := c.String() + ": " + sum.tense(l.Outcome)
	if l.Outcome == refused || l.Outcome == notRead {
		l.Reason = oneLine(c.err)
		text += ": " + l.Reason
	}
	if p.json || l.Reason != "" || p.dryRun && l.Outcome == saved {
		return p.print(l, text)
	}
	return nil
}

func outcomeOf(reason error) outcome { // of a candidate that has been tried
	_, isRefusal := errors.AsType[refusedError](reason)
	switch {
	case reason == nil:
		return saved
	case reason == errWithoutZip:
		return withoutZip
	case reason == errThere, gcs.Is(reason, gcs.KindAlreadyExists):
		return alreadyThere
	case isRefusal, gcs.Is(reason, gcs.KindBadRequest):
		return refused
	default:
		return notRead
	}
}
