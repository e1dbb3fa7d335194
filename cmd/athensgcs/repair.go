package main

import (
	"context"
	"flag"
	"fmt"
	"strings"
	"time"

	"github.com/athensgcs/gcs"
)

var repairCommand = &command{
	name:  "repair",
	brief: "make them right, or remove what is left of them",
	usage: `Repair finishes a version of which only the last step is missing. It removes what
is left of any other version that is not complete, and the next request fetches
that anew. It leaves complete versions alone, and running saves if -stale is the
threshold of the servers. Servers may go on meanwhile. roles/storage.objectUser
permits it.

Examples:
    athensgcs repair -bucket my-modules -dry-run
    athensgcs repair -bucket my-modules
`,
	flags: func(p *program, f *flag.FlagSet) {
		p.moduleFlag(f)
		f.BoolVar(&p.dryRun, "dry-run", false, "change nothing, and say what would be done")
	},
	run: (*program).repair,
}

// A repaired is what became of a version.
type repaired struct {
	gcs.VersionStatus        // before
	Action            action `json:"action"`
	Error             string `json:"error,omitempty"`
}

type action string

const (
	finished  action = "finished"
	removed   action = "removed"
	leftAlone action = "left alone"
	failed    action = "failed"
)

// A repairs is the summary of a repair.
type repairs struct {
	tally
	DryRun  bool           `json:"dryRun,omitempty"`
	Actions map[action]int `json:"actions"`
}

func (r *repairs) String() string {
	text := r.tally.String()
	var actions []string
	for _, a := range []action{finished, removed, leftAlone, failed} {
		if n := r.Actions[a]; n > 0 {
			actions = append(actions, fmt.Sprintf("%d %s", n, r.tense(a)))
		}
	}
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
	sum := repairs{tally: tally{States: map[gcs.State]int{}}, DryRun: p.dryRun, Actions: map[action]int{}}
	err := p.scan(ctx, func(v gcs.VersionStatus) error {
		sum.add(v)
		p.progress.add(v.Size)
		if v.State == gcs.Complete {
			return nil
		}
		r := repaired{VersionStatus: v}
		var err error
		r.Action, err = p.repairOne(ctx, v)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		text := describe(v, time.Now()) + ": " + sum.tense(r.Action)
		if err != nil {
			r.Error = oneLine(err)
			text += ": " + r.Error
		}
		sum.Actions[r.Action]++
		return p.print(r, text)
	})
	if err := p.summarize(err, &sum); err != nil {
		return 0, err
	}
	switch n := sum.Actions[failed]; {
	case n > 0:
		return 0, fmt.Errorf("%s could not be repaired; see above", plural(n, "version"))
	case p.dryRun && sum.incomplete() > 0 || sum.Actions[leftAlone] > 0:
		return statusFound, nil
	}
	return statusOK, nil
}

func (p *program) repairOne(ctx context.Context, v gcs.VersionStatus) (action, error) {
	if v.State == gcs.Absent && p.isClaimed(v) {
		return leftAlone, nil
	}
	left, err := p.foresee(v.State), error(nil)
	if !p.dryRun {
		left, err = p.storage.Repair(ctx, v.Module, v.Version)
	}
	switch {
	case err != nil:
		return failed, err
	case left == gcs.Complete:
		return finished, nil
	case left == gcs.Absent:
		return removed, nil
	default:
		return leftAlone, nil
	}
}

// foresee returns the state that a repair will leave.
func (p *program) foresee(s gcs.State) gcs.State {
	switch s {
	case gcs.Unfinished:
		return gcs.Complete
	case gcs.InProgress:
		return gcs.InProgress
	default:
		return gcs.Absent
	}
}
