package main

import (
	"strings"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/assert"
)

// TestShowAndDelete runs show and delete on versions in every state.
func TestShowAndDelete(t *testing.T) {
	var all, odd []string
	for _, name := range []string{"complete", "partial", "abandoned", "failed", "mixed", "unfinished", "inprogress", "claimed", "staleclaim"} {
		all = append(all, "example.com/"+name+"@v1.0.0")
	}
	odd = []string{"example.com/complete", "@v1.0.0", "example.com/complete@", "example.com/complete@v1.0", "example.com/a b@v1.0.0", "example.com/complete@v1.0.0"}
	for _, tt := range []struct {
		golden, args string
		versions     []string
		status       int
		left         int // objects
	}{
		{"show.txt", "show", all, statusFound, 32},
		{"show.json", "show -json", all, statusFound, 32},
		{"show-complete.txt", "show", all[:1], statusOK, 32},
		{"show-odd.txt", "show", odd, statusFailed, 32},
		{"delete.txt", "delete", all, statusFailed, 18},
		{"delete.json", "delete -json", all[:7], statusOK, 18},
		{"delete-dry-run.txt", "delete -dry-run", all, statusFailed, 32},
		{"delete-odd.txt", "delete", odd, statusFailed, 29},
	} {
		t.Run(tt.golden, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBucket(t)
				b.fillStates()
				status, stdout, stderr := b.run(append(strings.Fields(tt.args), tt.versions...)...)
				golden(t, tt.golden, stdout+stderr)
				assert.Equal(t, tt.status, status)
				assert.Len(t, b.Names(), tt.left)
			})
		})
	}
}

// TestShowPrefix expects the objects below the prefix, and the claim.
func TestShowPrefix(t *testing.T) {
	b := newBucket(t)
	r := newRelease("example.com/fine", "v1.0.0")
	for _, name := range []string{"athens/" + r.object("mod"), "athens/" + r.object("lock"), r.object("zip"), "athens/" + r.object("sig")} {
		b.Put(name, nil, nil)
	}
	status, stdout, _ := b.run("show", "-prefix", "athens", "example.com/fine@v1.0.0")
	assert.Equal(t, statusFound, status)
	assert.Regexp(t, `^.*\n    \.lock .*\n    \.mod .*\n$`, stdout)
}
