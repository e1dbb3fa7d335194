package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/athensgcs/gcs"
)

// options are the flags of all commands.
type options struct {
	bucket, prefix, module string
	stale, since           duration
	json, grpc             bool

	jobs        int
	oddNames    bool
	dryRun      bool   // repair
	sums, sumdb string // verify
	strict      bool
}

func (p *program) flags(command *command) *flag.FlagSet {
	f := flag.NewFlagSet(command.name, flag.ContinueOnError)
	f.SetOutput(io.Discard) // errors have one line; see parse
	f.Usage = func() {
		fmt.Fprintf(f.Output(), "Usage: %s\n\n%s\nFlags:\n", command.synopsis(), command.usage)
		f.PrintDefaults()
	}
	f.StringVar(&p.bucket, "bucket", "", "`name` of the bucket; required")
	f.StringVar(&p.prefix, "prefix", "", "`prefix` of the names of all objects, such as athens/")
	p.stale = duration(gcs.DefaultStaleThreshold)
	f.Var(&p.stale, "stale", "`time` after which a save that shows no sign of life is abandoned: use the value of the servers")
	f.BoolVar(&p.json, "json", false, "print JSON, a line for each version")
	f.BoolVar(&p.grpc, "grpc", false, "talk gRPC to the storage")
	if command.flags != nil {
		command.flags(p, f)
	}
	return f
}

func (p *program) parse(command *command, f *flag.FlagSet, args []string) error {
	if err := f.Parse(args); err != nil {
		return err
	}
	p.args = f.Args()
	switch {
	case command.args != "" && f.NArg() == 0:
		return fmt.Errorf("%s is missing", strings.TrimSuffix(command.args, "..."))
	case command.args != "" && f.NArg() > 1 && !strings.HasSuffix(command.args, "..."):
		return fmt.Errorf("%q is one argument too many", f.Arg(1))
	case command.args == "" && f.NArg() > 0:
		return fmt.Errorf("%q is no flag", f.Arg(0))
	case p.bucket == "":
		return errors.New("the bucket is missing: add -bucket NAME")
	case p.stale <= 0:
		return fmt.Errorf("-stale is %v, and must be more than 0", &p.stale)
	case isSet(f, "since") && p.since <= 0:
		return fmt.Errorf("-since is %v, and must be more than 0", &p.since)
	case p.strict && p.sums+p.sumdb == "":
		return errors.New("-strict needs -sums or -sumdb")
	case f.Lookup("j") != nil && p.jobs <= 0:
		return fmt.Errorf("-j is %d, and must be more than 0", p.jobs)
	}
	return nil
}

func isSet(f *flag.FlagSet, name string) (set bool) {
	f.Visit(func(f *flag.Flag) { set = set || f.Name == name })
	return set
}

// A duration is a flag's time.Duration, whose error says what is missing.
type duration time.Duration

func (d *duration) String() string { return time.Duration(*d).String() }

func (d *duration) Set(text string) error {
	parsed, err := time.ParseDuration(text)
	if err != nil {
		return errors.New("it takes a number and a unit, as in 120s or 2m")
	}
	*d = duration(parsed)
	return nil
}
