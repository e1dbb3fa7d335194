package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"iter"
	"strings"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/athensgcs/gcs"
)

// A version is what a scan finds.
type version struct {
	gcs.VersionStatus
	// Odd says why the name is none that a server saves; see checkName. With
	// -odd-names it is empty, and the version is like any other.
	Odd string `json:"odd,omitempty"`

	older bool // than -since
}

// moduleFlags are those of the commands that scan the bucket.
func (p *program) moduleFlags(f *flag.FlagSet) {
	f.StringVar(&p.module, "module", "", "only the versions of the module of this `path`")
	f.BoolVar(&p.oddNames, "odd-names", false, "also what has a name that is none of a version of a module, such as notes.zip below /@v/")
}

func (p *program) sinceFlag(f *flag.FlagSet) {
	f.Var(&p.since, "since", "only the versions of which an object changed in the last `time`, such as 24h")
}

// scan yields the versions that the flags name. It is an error if there is nothing at
// all below a module or a prefix: its name is wrong.
func (p *program) scan(ctx context.Context) iter.Seq2[version, error] {
	return func(yield func(version, error) bool) {
		since := time.Now().Add(-time.Duration(p.since))
		empty := true
		for v, err := range p.storage.Scan(ctx, p.module) {
			found := p.newVersion(v)
			found.older = p.since > 0 && v.Updated.Before(since) && v.Claimed.Before(since)
			if empty = false; !yield(found, err) || err != nil {
				return
			}
		}
		if empty && p.module+p.prefix != "" {
			yield(version{}, p.errNothing())
		}
	}
}

func (p *program) newVersion(v gcs.VersionStatus) version {
	found := version{VersionStatus: v}
	if err := checkName(v.ModuleVersion); err != nil && !p.oddNames {
		found.Odd = err.Error()
	}
	return found
}

func (p *program) errNothing() error {
	text := "there is nothing"
	if p.module != "" {
		text += " of the module " + p.module
	}
	if p.prefix != "" {
		text += " below the prefix " + p.prefix
	}
	return errors.New(text + " in the bucket " + p.bucket)
}

// isClaimed reports whether the version's claim is fresh. A claim goes stale after a
// quarter of the stale threshold.
func (p *program) isClaimed(v version) bool {
	return !v.Claimed.IsZero() && time.Since(v.Claimed).Abs() < p.claimThreshold()
}

func (p *program) claimThreshold() time.Duration { return time.Duration(p.stale) / 4 }

// hasStaleClaim reports whether the claim of a fetch that died is beside the version.
func (p *program) hasStaleClaim(v version) bool { return !v.Claimed.IsZero() && !p.isClaimed(v) }

// isWhole reports whether there is nothing to be done about the version.
func (p *program) isWhole(v version) bool { return v.State == gcs.Complete && !p.hasStaleClaim(v) }

// describe says how a version is.
func describe(v gcs.VersionStatus, now time.Time) string {
	text := fmt.Sprintf("%s@%s: %s", v.Module, v.Version, v.State)
	if len(v.Missing) > 0 && v.State != gcs.Absent {
		text += ", no ." + strings.Join(v.Missing, " and .")
	}
	switch {
	case isGivenUp(v.Renewed):
		text += ", given up " + ago(v.Updated, now)
	case !v.Renewed.IsZero():
		text += ", marker renewed " + ago(v.Renewed, now)
	case !v.Updated.IsZero():
		text += ", written " + ago(v.Updated, now)
	}
	switch {
	case isGivenUp(v.Claimed):
		text += ", claim given up"
	case !v.Claimed.IsZero():
		text += ", claimed " + ago(v.Claimed, now)
	}
	return text
}

// isGivenUp reports whether the time of a marker is how a holder says that it failed.
func isGivenUp(renewed time.Time) bool { return !renewed.IsZero() && renewed.Unix() <= 0 }

func ago(t, now time.Time) string { return humanize.RelTime(t, now, "ago", "from now") }

// A tally is what a scan found.
type tally struct {
	Versions    int               `json:"versions"`
	Bytes       int64             `json:"bytes"`
	States      map[gcs.State]int `json:"states"`
	StaleClaims int               `json:"staleClaims,omitempty"` // beside complete versions
	OddNames    int               `json:"oddNames,omitempty"`    // left alone
	Older       int               `json:"older,omitempty"`       // than -since

	broken int // versions about which something is to be done
}

// add counts a version, and reports whether there is more to do with it.
func (t *tally) add(p *program, v version) bool {
	switch {
	case v.older:
		t.Older++
		return false
	case v.Odd != "":
		t.OddNames++
		return true
	}
	t.Versions++
	t.Bytes += v.Size
	t.States[v.State]++
	if v.State == gcs.Complete && p.hasStaleClaim(v) {
		t.StaleClaims++
	}
	if !p.isWhole(v) {
		t.broken++
	}
	return true
}

func (t *tally) empty() bool { return t.Versions+t.OddNames+t.Older == 0 }

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
	return text + counts(count{t.StaleClaims, "beside a stale claim"}, count{t.OddNames, "with an odd name, left alone"}, count{t.Older, "older"})
}

// A count is how many versions something is so of.
type count struct {
	n    int
	what string
}

// counts says each count that is not 0.
func counts(all ...count) string {
	var text string
	for _, c := range all {
		if c.n > 0 {
			text += "; " + humanize.Comma(int64(c.n)) + " " + c.what
		}
	}
	return text
}

func plural(n int, noun string) string {
	if n != 1 {
		noun += "s"
	}
	return humanize.Comma(int64(n)) + " " + noun
}
