package history

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// A history that breaks an invariant is told from one that merely looks odd.
func TestHistory(t *testing.T) {
	save := func(start, end, n int, out Outcome) *Observation {
		return &Observation{Call: "Save", Save: fmt.Sprint(n), Start: start, End: end, Outcome: out}
	}
	call := func(start, end int, name string, out Outcome) *Observation {
		return &Observation{Call: name, Start: start, End: end, Outcome: out}
	}
	read := func(start, end, whose int) *Observation {
		return &Observation{Call: "Zip", Save: fmt.Sprint(whose), Start: start, End: end, Outcome: Got}
	}
	for _, test := range []struct {
		name   string
		h      History
		broken string
	}{
		{"a save and a loser", History{save(1, 4, 1, Stored), save(2, 5, 2, Existed), read(6, 7, 1)}, ""},
		{"two winners", History{save(1, 3, 1, Stored), save(2, 4, 2, Stored)}, "two saves of one life"},
		{"two winners in turn", History{save(1, 2, 1, Stored), save(3, 4, 2, Stored)}, "stored again"},
		{"a delete in between", History{save(1, 2, 1, Stored), call(3, 4, "Delete", Deleted), save(5, 6, 2, Stored), read(7, 8, 2)}, ""},
		{"a delete that overlaps", History{save(1, 4, 1, Stored), call(2, 6, "Delete", Deleted), save(5, 8, 2, Stored), read(9, 10, 2)}, ""},
		{"a delete that is too late", History{save(1, 4, 1, Stored), save(5, 8, 2, Stored), call(9, 10, "Delete", Deleted)}, "stored again"},
		{"a delete that had nothing to delete", History{save(1, 2, 1, Stored), call(3, 4, "Delete", NotFound)}, "not found"},
		{"a delete that crashed", History{save(1, 2, 1, Stored), call(3, EndOfTime, "Delete", Crashed), call(5, 6, "Exists", No)}, ""},
		{"told too early", History{save(1, 8, 1, Stored), save(2, 3, 2, Existed), call(4, 5, "Zip", NotFound)}, "not found"},
		{"there, and gone", History{call(1, 2, "Exists", Yes), call(3, 4, "Exists", No)}, "said not to exist"},
		{"there, and gone, at once", History{call(1, 3, "Exists", Yes), call(2, 4, "Exists", No)}, ""},
		{"not there yet", History{call(1, 2, "Exists", No), call(3, 4, "Exists", Yes)}, ""},
		{"of another save", History{save(1, 2, 1, Stored), read(3, 4, 2)}, "of two saves"},
		{"of two others", History{save(1, 2, 1, Existed), read(3, 4, 2), read(5, 6, 3)}, "of two saves"},
		{"of two lives", History{save(1, 2, 1, Existed), read(3, 4, 2), call(5, 6, "Delete", Deleted), read(7, 8, 3)}, ""},
		{"bytes of two, of no version", History{read(3, 4, 2), read(5, 6, 3)}, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			broken := strings.Join(test.h.Check(), "\n")
			require.Contains(t, broken, test.broken)
			require.Equal(t, test.broken == "", broken == "")
		})
	}
}
