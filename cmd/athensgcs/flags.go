package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"runtime"
	"time"

	"github.com/athensgcs/gcs"
)

// options are the flags of all commands.
type options struct {
	bucket, prefix, module string
	stale                  time.Duration
	json, grpc             bool

	dryRun bool // repair

	sums, sumdb string // verify
	jobs        int
}

var usages = map[string]string{
	"check": `Usage: athensgcs check -bucket NAME [flags]

Check asks whether the caller has the permissions that saving needs, and shows
every version that is not complete: its state, what is missing, and what will
become of it. It changes nothing. roles/storage.objectUser permits it.

States:
    partial      files are missing, and nobody is saving them
    in progress  a save is under way
    abandoned    a save was cut off; files are missing, or are of two saves
    unfinished   a save was cut off before its last step; the files are all there
    absent       there is no file, but the claim of a server that fetches it, or did
    complete     all files are there

Examples:
    athensgcs check -bucket my-modules
    athensgcs check -bucket my-modules -module github.com/my/module
    athensgcs check -bucket my-modules -json | jq 'select(.state == "partial")'

Flags:
`,
	"repair": `Usage: athensgcs repair -bucket NAME [flags]

Repair finishes a version of which only the last step is missing. It removes what
is left of any other version that is not complete, and the next request fetches
that anew. It leaves complete versions alone, and running saves if -stale is the
threshold of the servers. Servers may go on meanwhile. roles/storage.objectUser
permits it.

Examples:
    athensgcs repair -bucket my-modules -dry-run
    athensgcs repair -bucket my-modules

Flags:
`,
	"verify": `Usage: athensgcs verify -bucket NAME [flags]

Verify reads every complete version and checks that its zip is one that the go
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

Flags:
`,
}

func (p *program) flags(name string) *flag.FlagSet {
	f := flag.NewFlagSet(name, flag.ContinueOnError)
	f.SetOutput(io.Discard) // errors have one line; see parse
	f.Usage = func() {
		fmt.Fprint(f.Output(), usages[name])
		f.PrintDefaults()
	}
	f.StringVar(&p.bucket, "bucket", "", "`name` of the bucket; required")
	f.StringVar(&p.prefix, "prefix", "", "`prefix` of the names of all objects, such as athens/")
	f.StringVar(&p.module, "module", "", "only the versions of the module of this `path`")
	f.DurationVar(&p.stale, "stale", gcs.DefaultStaleThreshold, "`time` after which a save that shows no sign of life is abandoned: use the value of the servers")
	f.BoolVar(&p.json, "json", false, "a line of JSON for each version, and the summary last")
	f.BoolVar(&p.grpc, "grpc", false, "talk gRPC to the storage")
	switch name {
	case "repair":
		f.BoolVar(&p.dryRun, "dry-run", false, "change nothing, and say what would be done")
	case "verify":
		f.StringVar(&p.sums, "sums", "", "compare with the checksums in this go.sum `file`")
		f.StringVar(&p.sumdb, "sumdb", "", "compare with this checksum `database`: sum.golang.org, or NAME+KEY or \"NAME+KEY URL\", as in GOSUMDB")
		f.IntVar(&p.jobs, "j", runtime.NumCPU(), "how many `versions` to read at the same time")
	}
	return f
}

func (p *program) parse(f *flag.FlagSet, args []string) error {
	if err := f.Parse(args); err != nil {
		return err
	}
	switch {
	case f.NArg() > 0:
		return fmt.Errorf("%q is no flag", f.Arg(0))
	case p.bucket == "":
		return errors.New("the bucket is missing: add -bucket NAME")
	case p.stale <= 0:
		return fmt.Errorf("-stale is %v, and must be more than 0", p.stale)
	case f.Name() == "verify" && p.jobs <= 0:
		return fmt.Errorf("-j is %d, and must be more than 0", p.jobs)
	}
	return nil
}
