package main

import (
	"context"
	"flag"
	"time"

	"github.com/athensgcs/gcs"
)

var checkCommand = &command{
	name:  "check",
	brief: "show the versions that are not complete",
	usage: `Check asks whether the caller has the permissions that saving needs, and shows
every version that is not complete: its state, what is missing, and what will
become of it. It shows the claim of a fetch that died, too, and what no server has
saved, such as notes.zip below /@v/. It changes nothing. roles/storage.objectUser
permits it.

States:
    partial      files are missing, and nobody is saving them
    in progress  a save is under way
    abandoned    a save was cut off; files are missing, or are of two saves
    unfinished   a save was cut off before its last step; the files are all there
    absent       there is no file, but the claim of a server that fetches it, or did
    complete     all files are there

Exit status:
    0  all versions are complete
    1  some are not, or have a stale claim beside them: repair helps
    2  not everything could be looked at, or there is nothing of the module or
       below the prefix

With -json, every version gets a line. The summary is the last line.

Examples:
    athensgcs check -bucket my-modules
    athensgcs check -bucket my-modules -module github.com/my/module
    athensgcs check -bucket my-modules -json | jq 'select(.state == "partial")'
    athensgcs check -bucket my-modules -since 24h || mail -s "modules" ops@example.com
`,
	flags: func(p *program, f *flag.FlagSet) {
		p.moduleFlags(f)
		p.sinceFlag(f)
	},
	run: (*program).check,
}

// check shows the versions that are not complete.
func (p *program) check(ctx context.Context) (int, error) {
	if err := p.storage.Check(ctx); err != nil {
		return 0, err
	}
	found := tally{States: map[gcs.State]int{}}
	show := func(v version) error {
		p.progress.add(v.Size)
		if !found.add(p, v) || v.Odd == "" && p.isWhole(v) && !p.json {
			return nil
		}
		return p.print(v, describe(v.VersionStatus, time.Now())+"; "+p.fate(v))
	}
	var err error
	for v, failed := range p.scan(ctx) {
		if err = failed; err == nil {
			err = show(v)
		}
		if err != nil {
			break
		}
	}
	if err := p.summarize(err, &found); err != nil {
		return 0, err
	}
	if found.broken > 0 {
		return statusFound, nil
	}
	return statusOK, nil
}

// fate says what becomes of a version if nobody repairs it.
func (p *program) fate(v version) string {
	switch {
	case v.Odd != "":
		return v.Odd
	case v.State == gcs.Complete && p.hasStaleClaim(v):
		return "it is served, and nobody needs the claim"
	case v.State == gcs.Complete:
		return "it is served"
	case v.State == gcs.Unfinished:
		return "its files are served, and the next list of its module finishes it"
	case v.State == gcs.InProgress:
		return "another save waits until it is " + inWords(time.Duration(p.stale)) + " old"
	case v.State == gcs.Absent && p.isClaimed(v):
		return "another fetch waits until the claim is " + inWords(p.claimThreshold()) + " old"
	case v.State == gcs.Absent:
		return "the next request takes the claim over"
	case len(v.Missing) == 0:
		return "its files are of different saves, and no request heals it: repair does"
	}
	return "the next request for what is missing heals it"
}

// inWords returns the duration as people say it, if they do.
func inWords(d time.Duration) string {
	switch {
	case d%time.Minute == 0:
		return plural(int(d/time.Minute), "minute")
	case d%time.Second == 0:
		return plural(int(d/time.Second), "second")
	}
	return d.String()
}
