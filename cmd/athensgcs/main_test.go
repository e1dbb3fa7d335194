package main

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

var update = flag.Bool("update", false, "write the golden files")

// golden compares the output with a file in testdata.
func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		require.NoError(t, os.WriteFile(file, []byte(got), 0o666))
	}
	want, err := os.ReadFile(file)
	require.NoError(t, err)
	assert.Equal(t, string(want), got, file)
}

// TestStates runs check and repair on a bucket in which every state occurs.
func TestStates(t *testing.T) {
	for _, tt := range []struct {
		golden  string
		args    string
		status  int
		changes bool
	}{
		{"check.txt", "check", statusFound, false},
		{"check.json", "check -json", statusFound, false},
		{"check-module.txt", "check -module example.com/complete", statusOK, false},
		{"check-stale.txt", "check -stale 5s -module example.com/inprogress", statusFound, false},
		{"dry-run.txt", "repair -dry-run", statusFound, false},
		{"dry-run.json", "repair -dry-run -json", statusFound, false},
		{"repair.txt", "repair", statusFound, true},
		{"repair.json", "repair -json", statusFound, true},
		{"repair-module.txt", "repair -module example.com/partial", statusOK, true},
	} {
		t.Run(tt.golden, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBucket(t)
				b.fillStates()
				before := b.names()
				status, stdout, stderr := b.run(strings.Fields(tt.args)...)
				golden(t, tt.golden, stdout)
				assert.Empty(t, stderr)
				assert.Equal(t, tt.status, status)
				assert.Equal(t, tt.changes, len(before) != len(b.names()))
			})
		})
	}
}

// TestRepairTwice expects the second repair to find only what a server is at.
func TestRepairTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBucket(t)
		b.fillStates()
		b.run("repair")
		status, stdout, stderr := b.run("repair")
		golden(t, "repair-twice.txt", stdout)
		assert.Empty(t, stderr)
		assert.Equal(t, statusFound, status)
	})
}

func TestHelp(t *testing.T) {
	for args, want := range map[string]string{
		"help": "Exit status:", "-h": "Exit status:", "--help": "Exit status:",
		"check -h": "athensgcs check -bucket", "repair -help": "-dry-run", "verify -h": "-sumdb",
	} {
		var stdout, stderr bytes.Buffer
		assert.Equal(t, statusOK, run(t.Context(), strings.Fields(args), &stdout, &stderr), args)
		assert.Contains(t, stdout.String(), want, args)
		assert.Empty(t, stderr.String(), args)
	}
}

func TestWrongUsage(t *testing.T) {
	for args, want := range map[string]string{
		"":                           "run athensgcs help",
		"prune":                      `no command "prune"`,
		"check":                      "add -bucket NAME; run athensgcs check -h",
		"check -bucket":              "needs an argument: -bucket; run athensgcs check -h",
		"check -bucket b -purge":     "not defined: -purge; run athensgcs check -h",
		"check -bucket b -dry-run":   "not defined: -dry-run",
		"check -bucket b c":          `"c" is no flag`,
		"check -bucket b -stale 2":   "-stale",
		"repair -bucket b -stale 0s": "-stale is 0s",
		"verify -bucket b -j 0":      "-j is 0",
	} {
		var stdout, stderr bytes.Buffer
		assert.Equal(t, statusFailed, run(t.Context(), strings.Fields(args), &stdout, &stderr), args)
		assertLine(t, stderr.String(), want)
		assert.Empty(t, stdout.String(), args)
	}
}

// assertLine expects one line that contains want.
func assertLine(t *testing.T, got, want string) {
	t.Helper()
	assert.Contains(t, got, want)
	assert.True(t, strings.HasPrefix(got, "athensgcs"), got)
	assert.Equal(t, 1, strings.Count(got, "\n"), got)
}
