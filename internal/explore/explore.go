// Package explore visits the schedules of a concurrent program, for tests.
//
// It is a stateless model checker. It runs the program again and again from its start, and
// wherever more than one thing can happen next, it makes a choice. It visits all sequences
// of choices, depth first, and goes no further where a state is met again. A sequence that
// fails is reported as the list of its choices, and can be replayed.
//
// The schedules of a large program can be bounded by their preemptions: switches to another
// thread while the first can go on. A few are enough for most mistakes (Musuvathi and
// Qadeer, "Iterative Context Bounding for Systematic Testing of Multithreaded Programs").
package explore

import (
	"fmt"
	"hash/maphash"
	"math/big"
	"slices"
	"time"
)

// A Program is one run of what is explored. After the same choices it is in the same state.
type Program interface {
	// Choices waits until nothing happens by itself, and returns what can happen next.
	Choices() []Choice
	// State describes all that decides what can happen from here on.
	State() string
	// End is called when nothing can happen any more.
	End()
	// Err returns what is wrong with the run so far.
	Err() error
}

// A Choice is something that can happen next.
type Choice struct {
	Name   string
	Thread string // whose move it is, "" for nobody's
	Do     func()
}

// maxLength is that of the longest path that is followed.
const maxLength = 300

// A Search visits the schedules of a program.
type Search struct {
	// Err is the failure with the shortest path, and Path is its path.
	Err  error
	Path []string
	// Diverged tells of a path that could not be replayed, if there was one.
	Diverged error

	run         func(follow func(Program))
	preemptions int // the most in a path, 0 for any number
	seed        maphash.Seed
	fewest      map[uint64]int      // the preemptions with which a state was reached
	next        map[uint64][]uint64 // states
	ends        map[uint64]bool
	root        uint64
	todo        []*branch
	runs        int
	length      int // of the longest path that is of interest
	took        time.Duration
}

// A branch is a path that is still to be taken: the way to a state, and a choice there.
type branch struct {
	from   *branch
	state  uint64 // 0 when it is not known
	choice string
}

func (b *branch) path() (path []string) {
	for ; b.from != nil; b = b.from {
		path = append(path, b.choice)
	}
	slices.Reverse(path)
	return path
}

// New returns a search of a program. For each run, run starts the program, passes it to
// follow, and cleans up. With 0, there may be any number of preemptions in a path.
func New(run func(follow func(Program)), preemptions int) *Search {
	return &Search{run: run, preemptions: preemptions, seed: maphash.MakeSeed(), length: maxLength,
		fewest: map[uint64]int{}, next: map[uint64][]uint64{}, ends: map[uint64]bool{}, todo: []*branch{{}}}
}

// Replay follows a path, and then the first choice of each state.
func (s *Search) Replay(path []string) {
	b := s.todo[0]
	for _, choice := range path {
		b = &branch{from: b, choice: choice}
	}
	s.run(func(p Program) { s.follow(p, b) })
}

// Explore visits all states, or as many as it can in so many runs and that time. Each may
// be 0, for any.
func (s *Search) Explore(runs int, limit time.Duration) {
	start := time.Now()
	for len(s.todo) > 0 && (runs == 0 || s.runs < runs) && (limit == 0 || time.Since(start) < limit) {
		b := s.pop()
		s.runs++
		s.run(func(p Program) { s.follow(p, b) })
	}
	s.took = time.Since(start)
}

// Exhausted reports whether all states were visited.
func (s *Search) Exhausted() bool { return len(s.todo) == 0 }

func (s *Search) pop() *branch {
	last := len(s.todo) - 1
	defer func() { s.todo = s.todo[:last] }()
	return s.todo[last]
}

// follow takes a path, and goes on with the first choice of each new state.
func (s *Search) follow(p Program, b *branch) {
	path, before, thread, preemptions := b.path(), uint64(0), "", 0
	for step := 0; ; step++ {
		choices := s.permitted(p.Choices(), thread, preemptions)
		if p.Err() != nil {
			break
		}
		if step >= len(path)-1 { // before, no state is new
			state := s.hash(p.State(), thread)
			if step == len(path)-1 && b.state != 0 && state != b.state {
				s.Diverged = fmt.Errorf("another state before %q", b.choice)
				return
			}
			if step >= len(path) {
				if step > s.length || !s.visit(before, state, preemptions) {
					return
				}
				if len(choices) == 0 {
					s.ends[state] = true
					p.End()
					break
				}
				for _, c := range slices.Backward(choices) {
					s.todo = append(s.todo, &branch{b, state, c.Name})
				}
				b = s.pop()
				path = append(path, b.choice)
			}
			before = state
		}
		i := slices.IndexFunc(choices, func(c Choice) bool { return c.Name == path[step] })
		if i < 0 {
			s.Diverged = fmt.Errorf("there is no choice %q in %q", path[step], names(choices))
			return
		}
		if s.preempts(choices, choices[i], thread) {
			preemptions++
		}
		if choices[i].Thread != "" {
			thread = choices[i].Thread
		}
		choices[i].Do()
	}
	if err := p.Err(); err != nil && len(path) <= s.length {
		s.Err, s.Path, s.length = err, path, len(path)-1
	}
}

// hash tells states apart. Who moved last decides what is a preemption.
func (s *Search) hash(state, thread string) uint64 {
	if s.preemptions > 0 {
		state += thread
	}
	return maphash.String(s.seed, state)
}

// visit notes the way to a state, and reports whether to go on there.
func (s *Search) visit(before, state uint64, preemptions int) bool {
	if before == 0 {
		s.root = state
	} else {
		s.next[before] = append(s.next[before], state)
	}
	if fewest, visited := s.fewest[state]; visited && fewest <= preemptions {
		return false
	}
	s.fewest[state] = preemptions
	return true
}

func names(choices []Choice) (names []string) {
	for _, c := range choices {
		names = append(names, c.Name)
	}
	return names
}

// preempts reports whether a choice is a switch from a thread that can go on.
func (s *Search) preempts(choices []Choice, c Choice, thread string) bool {
	goesOn := func(c Choice) bool { return c.Thread == thread }
	return s.preemptions > 0 && thread != "" && c.Thread != "" && !goesOn(c) && slices.ContainsFunc(choices, goesOn)
}

// permitted returns the choices within the bound. Those of the thread that moved last come
// first.
func (s *Search) permitted(choices []Choice, thread string, preemptions int) (permitted []Choice) {
	others := []Choice{}
	for _, c := range choices {
		switch {
		case thread != "" && c.Thread == thread:
			permitted = append(permitted, c)
		case preemptions < s.preemptions || !s.preempts(choices, c, thread):
			others = append(others, c)
		}
	}
	return append(permitted, others...)
}

// schedules counts the paths that the states stand for, without their loops.
func (s *Search) schedules() *big.Float {
	counts := map[uint64]*big.Int{}
	var count func(state uint64) *big.Int
	count = func(state uint64) *big.Int {
		n, ok := counts[state]
		if !ok {
			n = new(big.Int)
			counts[state] = n
			if s.ends[state] {
				n.SetInt64(1)
			}
			for _, next := range s.next[state] {
				n.Add(n, count(next))
			}
		}
		return n
	}
	return new(big.Float).SetInt(count(s.root))
}

// String tells how much was visited.
func (s *Search) String() string {
	whole := "exhausted"
	if !s.Exhausted() {
		whole = fmt.Sprintf("NOT exhausted, %d branches left", len(s.todo))
	}
	if s.preemptions > 0 {
		whole += fmt.Sprintf(" up to %d preemptions", s.preemptions)
	}
	return fmt.Sprintf("%6d states %9.3g schedules %6d runs %7v %s", len(s.fewest), s.schedules(), s.runs, s.took.Round(10*time.Millisecond), whole)
}
