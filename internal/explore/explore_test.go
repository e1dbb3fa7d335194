package explore

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// counters are threads that each add one to a number as often as it says, without a lock:
// they read it, and write it.
type counters struct {
	left   map[string]int // moves
	number int
	read   map[string]int
	moves  []string
	lost   bool // whether a lost update is wrong
	err    error
}

func (c *counters) Choices() (choices []Choice) {
	for _, thread := range []string{"a", "b"} {
		if c.left[thread] == 0 {
			continue
		}
		name := fmt.Sprint(thread, c.left[thread])
		choices = append(choices, Choice{name, thread, func() {
			c.moves = append(c.moves, name)
			if c.left[thread]--; c.left[thread]%2 == 1 {
				c.read[thread] = c.number
			} else {
				c.number = c.read[thread] + 1
			}
		}})
	}
	return choices
}

func (c *counters) State() string { return fmt.Sprint(c.left, c.number, c.read) }

func (c *counters) End() {
	if c.lost && c.number != 2 {
		c.err = errors.New("an update is lost")
	}
}

func (c *counters) Err() error { return c.err }

// search returns a search of two threads, and the moves of its last run.
func search(preemptions int, lost bool) (s *Search, last func() string) {
	var c *counters
	s = New(func(follow func(Program)) {
		c = &counters{left: map[string]int{"a": 2, "b": 2}, read: map[string]int{}, lost: lost}
		follow(c)
	}, preemptions)
	return s, func() string { return strings.Join(c.moves, " ") }
}

// Two threads of two moves each have six schedules. Two of them have no preemption, and
// two have one.
func TestExplore(t *testing.T) {
	s, _ := search(0, false)
	s.Explore(0, 0)
	require.True(t, s.Exhausted())
	require.NoError(t, s.Err)
	require.NoError(t, s.Diverged)
	require.Contains(t, s.String(), " 6 schedules")
	require.Contains(t, s.String(), " exhausted")

	s, _ = search(1, false)
	s.Explore(0, 0)
	require.Contains(t, s.String(), " 4 schedules")
	require.Contains(t, s.String(), "exhausted up to 1 preemptions")

	s, _ = search(0, false)
	s.Explore(2, 0)
	require.False(t, s.Exhausted())
	require.Contains(t, s.String(), " 2 runs")
	require.Contains(t, s.String(), "NOT exhausted")
}

func TestFailure(t *testing.T) {
	for _, preemptions := range []int{0, 1} {
		s, _ := search(preemptions, true)
		s.Explore(0, 0)
		require.EqualError(t, s.Err, "an update is lost")
		require.Len(t, s.Path, 4)

		replayed, last := search(0, true)
		replayed.Replay(s.Path)
		require.Equal(t, s.Err, replayed.Err)
		require.Equal(t, strings.Join(s.Path, " "), last())
	}
}

// A replay ends with the first choices, and says when a choice is not there.
func TestReplay(t *testing.T) {
	s, last := search(0, true)
	s.Replay([]string{"b2", "b1"})
	require.NoError(t, s.Err)
	require.Equal(t, "b2 b1 a2 a1", last())

	s, _ = search(0, true)
	s.Replay([]string{"b1"})
	require.EqualError(t, s.Diverged, `there is no choice "b1" in ["a2" "b2"]`)
}

// A program that is not the same after the same choices is found out.
func TestDiverges(t *testing.T) {
	runs := 0
	s := New(func(follow func(Program)) {
		runs++
		follow(&counters{left: map[string]int{"a": 2, "b": 2}, read: map[string]int{}, number: runs})
	}, 0)
	s.Explore(0, 0)
	require.ErrorContains(t, s.Diverged, "another state before")
	require.NoError(t, s.Err)
}
