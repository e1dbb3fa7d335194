package main

import (
	"context"
	"flag"
	"fmt"
	"strings"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/athensgcs/gcs"
)

var repairCommand = &command{
	name:  "repair",
	brief: "make them right, or remove what is left of them",
	usage: `Repair finishes a version of which only the last step is missing. It removes what
is left of any other version that is not complete, and the next request fetches
that anew. It removes the claim of a fetch that died, too. It leaves complete
versions alone, what no server has saved (-odd-names includes it), and running saves
if -stale is the threshold of the servers. Servers may go on meanwhile.
roles/storage.objectUser permits it.

Exit status:
    0  check finds nothing any more
    1  it still finds something, such as a save under way; with -dry-run: it does now
    2  not everything could be repaired, or there is nothing of the module or below
       the prefix

With -json, every version gets a line, also one that needs no repair. The summary is
the last line.

Examples:
    athensgcs repair -bucket my-modules -dry-run
    athensgcs repair -bucket my-modules
    athensgcs repair -bucket my-modules -json | jq 'select(.action == "failed")'
`,
	flags: func(p *program, f *flag.FlagSet) {
		p.moduleFlags(f)
		f.BoolVar(&p.dryRun, "dry-run", false, "change nothing, and say what would be done")
		f.IntVar(&p.jobs, "j", 8, "how many `versions` to repair at the same time")
	},
	run: (*program).repair,
}

// A repaired is what became of a version.
type repaired struct {
	version        // before
	Action  action `json:"action"`
	Error   string `json:"error,omitempty"`

	remains bool // check shows it still
}

type action string

const (
	unneeded  action = "not needed"
	finished  action = "finished"
	removed   action = "removed"
	unclaimed action = "freed of its claim"
	leftAlone action = "left alone"
	failed    action = "failed"
)

// A repairs is the summary of a repair.
type repairs struct {
	tally
	DryRun  bool           `json:"dryRun,omitempty"`
	Actions map[action]int `json:"actions"`

	remain int
}

func (r *repairs) String() string {
	var actions []string
	for _, a := range []action{finished, removed, unclaimed, leftAlone, failed} {
		if n := r.Actions[a]; n > 0 {
			actions = append(actions, humanize.Comma(int64(n))+" "+r.tense(a))
		}
	}
	text := r.tally.String()
	if len(actions) > 0 {
		text += "; " + strings.Join(actions, ", ")
	}
	return text
}

func (r *repairs) tense(a action) string {
	if r.DryRun {
		return "would be " + string(a)
	}
	return string(a)
}

// repair makes the versions right that are not complete.
func (p *program) repair(ctx context.Context) (int, error) {
	if !p.dryRun {
		if err := p.storage.Check(ctx); err != nil {
			return 0, err
		}
	}
	sum := &repairs{tally: tally{States: map[gcs.State]int{}}, DryRun: p.dryRun, Actions: map[action]int{}}
	err := inOrder(ctx, p.jobs, p.scan, p.repairOne, func(r *repaired) error { return p.recordRepair(sum, r) })
	if err := p.summarize(err, sum); err != nil {
		return 0, err
	}
	switch n := sum.Actions[failed]; {
	case n > 0:
		return 0, fmt.Errorf("%s could not be repaired; see above", plural(n, "version"))
	case p.dryRun && sum.broken > 0 || sum.remain > 0:
		return statusFound, nil
	}
	return statusOK, nil
}

// repairOne returns an error only when it is interrupted.
func (p *program) repairOne(ctx context.Context, v version) (*repaired, error) {
	r := &repaired{version: v, Action: unneeded}
	switch {
	case v.Odd != "":
		r.Action = leftAlone
		return r, nil
	case v.State == gcs.Absent && p.isClaimed(v):
		r.Action, r.remains = leftAlone, true
		return r, nil
	case p.isWhole(v):
		return r, nil
	}
	left, err := foresee(v.State), error(nil)
	if !p.dryRun {
		left, err = p.storage.Repair(ctx, v.Module, v.Version)
	}
	switch {
	case err != nil && ctx.Err() != nil:
		return nil, ctx.Err()
	case err != nil:
		r.Action, r.Error, r.remains = failed, oneLine(err), true
	case left == gcs.Absent:
		r.Action, r.remains = removed, p.isClaimed(v)
	case left != gcs.Complete:
		r.Action, r.remains = leftAlone, true
	case v.State == gcs.Unfinished:
		r.Action = finished
	case v.State == gcs.Complete:
		r.Action = unclaimed
	} // or a server has healed it meanwhile
	return r, nil
}

// foresee returns the state that a repair will leave.
func foresee(s gcs.State) gcs.State {
	switch s {
	case gcs.Unfinished, gcs.Complete:
		return gcs.Complete
	case gcs.InProgress:
		return gcs.InProgress
	default:
		return gcs.Absent
	}
}

// recordRepair counts what became of a version, and prints it unless it needs nothing.
func (p *program) recordRepair(sum *repairs, r *repaired) error {
	p.progress.add(r.Size)
	sum.add(p, r.version)
	text := describe(r.VersionStatus, time.Now()) + ": " + sum.tense(r.Action)
	switch {
	case r.Odd != "":
		text += ": " + r.Odd
	case r.Action != unneeded:
		sum.Actions[r.Action]++
	case !p.json:
		return nil
	}
	if r.remains {
		sum.remain++
	}
	if r.remains && r.Action == removed {
		text += ", but for its claim"
	}
	if r.Error != "" {
		text += ": " + r.Error
	}
	return p.print(r, text)
}
