package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/athensgcs/gcs"
)

var checkCommand = &command{
	name:  "check",
	brief: "show the versions that are not complete",
	usage: `Check asks whether the caller has the permissions that saving needs, and shows
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
`,
	flags: (*program).moduleFlag,
	run:   (*program).check,
}

// A tally is what a scan found.
type tally struct {
	Versions int               `json:"versions"`
	Bytes    int64             `json:"bytes"`
	States   map[gcs.State]int `json:"states"`
}

func (t *tally) add(v gcs.VersionStatus) {
	t.Versions++
	t.Bytes += v.Size
	t.States[v.State]++
}

func (t *tally) incomplete() int { return t.Versions - t.States[gcs.Complete] }

func (t *tally) empty() bool { return t.Versions == 0 }

func (t *tally) String() string {
	var states []string
	for s := gcs.Complete; s >= gcs.Absent; s-- {
		if n := t.States[s]; n > 0 {
			states = append(states, humanize.Comma(int64(n))+" "+s.String())
		}
	}
	text := fmt.Sprintf("%s, %s", plural(t.Versions, "version"), humanize.Bytes(uint64(t.Bytes)))
	if len(states) > 0 {
		text += ": " + strings.Join(states, ", ")
	}
	return text
}

func plural(n int, noun string) string {
	if n != 1 {
		noun += "s"
	}
	return humanize.Comma(int64(n)) + " " + noun
}

// check shows the versions that are not complete.
func (p *program) check(ctx context.Context) (int, error) {
	if err := p.storage.Check(ctx); err != nil {
		return 0, err
	}
	found := tally{States: map[gcs.State]int{}}
	err := p.scan(ctx, func(v gcs.VersionStatus) error {
		found.add(v)
		p.progress.add(v.Size)
		if v.State == gcs.Complete && !p.json {
			return nil
		}
		return p.print(v, describe(v, time.Now())+"; "+p.fate(v))
	})
	if err := p.summarize(err, &found); err != nil {
		return 0, err
	}
	if found.incomplete() > 0 {
		return statusFound, nil
	}
	return statusOK, nil
}

// scan calls visit with each version, until one of the two fails.
func (p *program) scan(ctx context.Context, visit func(gcs.VersionStatus) error) error {
	for v, err := range p.storage.Scan(ctx, p.module) {
		if err == nil {
			err = visit(v)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// describe says how a version is.
func describe(v gcs.VersionStatus, now time.Time) string {
	text := fmt.Sprintf("%s@%s: %s", v.Module, v.Version, v.State)
	if len(v.Missing) > 0 && v.State != gcs.Absent {
		text += ", no ." + strings.Join(v.Missing, " and .")
	}
	switch {
	case !v.Renewed.IsZero() && v.Renewed.Unix() <= 0: // how a save says that it has failed
		text += ", given up " + ago(v.Updated, now)
	case !v.Renewed.IsZero():
		text += ", marker renewed " + ago(v.Renewed, now)
	case !v.Updated.IsZero():
		text += ", written " + ago(v.Updated, now)
	}
	if !v.Claimed.IsZero() {
		text += ", claimed " + ago(v.Claimed, now)
	}
	return text
}

func ago(t, now time.Time) string { return humanize.RelTime(t, now, "ago", "from now") }

// fate says what becomes of a version if nobody repairs it.
func (p *program) fate(v gcs.VersionStatus) string {
	switch v.State {
	case gcs.Complete:
		return "it is served"
	case gcs.Unfinished:
		return "its files are served, and the next list of its module finishes it"
	case gcs.InProgress:
		return "its saver is alive"
	case gcs.Absent:
		if p.isClaimed(v) {
			return "a server is fetching it"
		}
		return "the next request takes the claim over"
	}
	if len(v.Missing) == 0 {
		return "its files are of different saves, and no request heals it: repair does"
	}
	return "the next request for what is missing heals it"
}

// isClaimed reports whether the version's claim is fresh. A claim goes stale
// after a quarter of the stale threshold.
func (p *program) isClaimed(v gcs.VersionStatus) bool {
	return !v.Claimed.IsZero() && time.Since(v.Claimed).Abs() < p.stale/4
}
