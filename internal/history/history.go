// Package history checks what concurrent callers saw of a version, which is saved once, and
// may be deleted and saved again.
package history

import (
	"fmt"
	"slices"
	"time"
)

// An Observation is one call of one version, as its caller saw it.
type Observation struct {
	Who     string
	Call    string // Save, Exists, List, Delete, or the method that read an object
	Version string
	Save    string // which Save it was, or whose object was read
	How     string
	Outcome Outcome
	Err     error
	// The order of all beginnings and ends. A call whose end nobody saw, or
	// whose requests may be applied after it, ends at the end of time.
	Start, End int
	From, Till time.Duration
}

// An Outcome is how a call ended.
type Outcome int

const (
	Running  Outcome = iota
	Stored           // Save returned nil
	Existed          // Save returned KindAlreadyExists
	Yes              // Exists and List
	No               //
	Deleted          // Delete returned nil
	NotFound         // Delete, or a read
	Got              // a read
	Failed           // anything: the context ended, the reader failed
	Crashed          // its machine did
)

var outcomeNames = [...]string{"still running", "nil", "KindAlreadyExists", "true", "false", "nil", "KindNotFound", "the object", "error", "crashed"}

// EndOfTime is when a call ends whose end nobody saw.
const EndOfTime = 1 << 30

func (o *Observation) String() string {
	s := fmt.Sprintf("%10v %10v  %-4s %s %s", o.From.Round(time.Millisecond), o.Till.Round(time.Millisecond), o.Who, o.Call, o.Version)
	switch {
	case o.Outcome == Got:
		s += fmt.Sprintf(" → of %s", o.Save)
	case o.Call == "Save":
		s += fmt.Sprintf(" %s (%s) → %v", o.Save, o.How, outcomeNames[o.Outcome])
	default:
		s += fmt.Sprintf(" → %v", outcomeNames[o.Outcome])
	}
	if o.Err != nil {
		s += fmt.Sprintf(" (%v)", o.Err)
	}
	return s
}

// Says reports whether the version was complete at some moment of the call.
func (o *Observation) Says() bool {
	return o.Outcome == Stored || o.Outcome == Existed || o.Outcome == Yes
}

// deletes reports whether the call may have ended a version's life.
func (o *Observation) deletes() bool {
	return o.Call == "Delete" && o.Outcome != NotFound
}

// A History is what callers saw of one version.
type History []*Observation

// deletedBetween reports whether a delete may have been carried out between two
// moments: one that overlaps them, for it can be ordered before or after either.
func (h History) deletedBetween(a, b int) bool {
	return slices.ContainsFunc(h, func(o *Observation) bool { return o.deletes() && o.Start < b && o.End > a })
}

// Check holds the history against the invariants, and returns what breaks them.
func (h History) Check() (broken []string) {
	report := func(what string, os ...*Observation) {
		for _, o := range os {
			what += "\n\t" + o.String()
		}
		broken = append(broken, what)
	}
	for _, claim := range h {
		if !claim.Says() {
			continue
		}
		var whose *Observation // by a read, or by the claim itself
		if claim.Outcome == Stored {
			whose = claim
		}
		for _, later := range h {
			if later.Start < claim.End || h.deletedBetween(claim.Start, later.End) {
				continue
			}
			switch later.Outcome {
			case No:
				report("a complete version is said not to exist:", claim, later)
			case NotFound:
				report("an object of a complete version is not found:", claim, later)
			case Stored:
				report("a complete version is stored again:", claim, later)
			case Got:
				if whose != nil && whose.Save != later.Save {
					report("a version is of two saves:", claim, whose, later)
				}
				whose = later
			}
		}
	}
	for i, a := range h {
		for _, b := range h[i+1:] {
			if a.Outcome == Stored && b.Outcome == Stored && !h.deletedBetween(min(a.Start, b.Start), max(a.End, b.End)) {
				report("two saves of one life returned nil:", a, b)
			}
		}
	}
	return broken
}
