package gcs

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// A breakage takes one rule out of the protocol. A test has to fail then.
type breakage struct {
	rule, file, old, new, test string
}

// breakages reads testdata/breakages.txt. A breakage there is the rule, the file, the
// lines that are there and those that replace them, and the test, as -run takes it.
func breakages(t *testing.T) (all []breakage) {
	table, err := os.ReadFile("testdata/breakages.txt")
	require.NoError(t, err)
	for block := range strings.SplitSeq(strings.TrimSpace(string(table)), "\n\n") {
		var b breakage
		for line := range strings.Lines(block + "\n") {
			switch text := line[1:]; line[0] {
			case '#':
				b.rule = strings.TrimSpace(text)
			case '-':
				b.old += text
			case '+':
				b.new += text
			case '=':
				b.test = strings.TrimSpace(text)
			default:
				b.file = strings.TrimSpace(line)
			}
		}
		b.old, b.new = strings.TrimSuffix(b.old, "\n"), strings.TrimSuffix(b.new, "\n")
		all = append(all, b)
	}
	return all
}

// TestBreakages checks the table: each breakage changes one place of the code, and
// names a test. With GCS_BREAKAGES, a pattern of rules, it breaks the code so, and
// fails if the test does not.
func TestBreakages(t *testing.T) {
	pattern, apply := os.LookupEnv("GCS_BREAKAGES")
	var tests []byte
	files, err := filepath.Glob("*_test.go")
	require.NoError(t, err)
	for _, file := range files {
		code, err := os.ReadFile(file)
		require.NoError(t, err)
		tests = append(tests, code...)
	}
	for _, b := range breakages(t) {
		t.Run(b.rule, func(t *testing.T) {
			code, err := os.ReadFile(b.file)
			require.NoError(t, err)
			require.Equal(t, 1, bytes.Count(code, []byte(b.old)), "places in %s that read %q", b.file, b.old)
			name, _, _ := strings.Cut(b.test, "/")
			require.True(t, bytes.Contains(tests, []byte("func "+name+"(t *testing.T)")), "there is no test %s", name)
			if !apply {
				return
			}
			if !regexp.MustCompile(pattern).MatchString(b.rule) {
				t.Skip("not chosen")
			}
			dir := t.TempDir()
			broken, overlay := filepath.Join(dir, b.file), filepath.Join(dir, "overlay.json")
			require.NoError(t, os.WriteFile(broken, bytes.Replace(code, []byte(b.old), []byte(b.new), 1), 0o600))
			original, err := filepath.Abs(b.file)
			require.NoError(t, err)
			replace, err := json.Marshal(map[string]any{"Replace": map[string]string{original: broken}})
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(overlay, replace, 0o600))
			run := exec.Command("go", "test", "-vet=off", "-timeout=2m", "-overlay", overlay, "-run", "^"+name+strings.TrimPrefix(b.test, name)+"$", ".")
			run.Env = append(os.Environ(), "GCS_SCHEDULES=all", "GCS_SCHEDULES_LIMIT=20s")
			out, err := run.CombinedOutput()
			require.NotContains(t, string(out), "[build failed]")
			require.Error(t, err, "%s does not see it:\n%s", b.test, out)
			t.Logf("%s\n%s", b.test, out)
		})
	}
}
