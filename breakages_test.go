package gcs

import (
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
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
	rule, in, old, new, test string
}

// breakages reads testdata/breakages.txt. A breakage there is the rule, the declaration
// that keeps it, what it reads there, what replaces that, and the test, as -run takes it.
func breakages(t *testing.T) (all []breakage) {
	table, err := os.ReadFile("testdata/breakages.txt")
	require.NoError(t, err)
	for block := range strings.SplitSeq(strings.TrimSpace(string(table)), "\n\n") {
		var b breakage
		field := map[byte]*string{'#': &b.rule, '-': &b.old, '+': &b.new, '=': &b.test}
		for line := range strings.Lines(block) {
			if text := field[line[0]]; text != nil {
				*text = strings.TrimSpace(*text + "\n" + strings.TrimSpace(line[1:]))
			} else {
				b.in = strings.TrimSpace(line)
			}
		}
		all = append(all, b)
	}
	return all
}

// A place is a declaration in a file.
type place struct {
	file       string
	start, end int
}

// declarations returns where the package's functions, constants, variables and types
// are. A method is named Type.method.
func declarations(t *testing.T, files []string) map[string]place {
	places := map[string]place{}
	for _, file := range files {
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, file, nil, parser.SkipObjectResolution)
		require.NoError(t, err)
		add := func(name string, node ast.Node) {
			places[name] = place{file, fset.Position(node.Pos()).Offset, fset.Position(node.End()).Offset}
		}
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				name := n.Name.Name
				if n.Recv != nil {
					receiver, _, _ := strings.Cut(types.ExprString(n.Recv.List[0].Type), "[")
					name = strings.TrimPrefix(receiver, "*") + "." + name
				}
				add(name, n)
				return false
			case *ast.TypeSpec:
				add(n.Name.Name, n)
			case *ast.ValueSpec:
				add(n.Names[0].Name, n)
			}
			return true
		})
	}
	return places
}

// apply returns the file that a breakage changes, before and after. White space is no
// part of what it looks for.
func (b breakage) apply(t *testing.T, places map[string]place) (file, broken string) {
	at, ok := places[b.in]
	require.True(t, ok, "there is no declaration %s", b.in)
	code, err := os.ReadFile(at.file)
	require.NoError(t, err)
	words := strings.Fields(regexp.QuoteMeta(b.old))
	found := regexp.MustCompile(strings.Join(words, `\s+`)).FindAllIndex(code[at.start:at.end], -1)
	require.Len(t, found, 1, "places in %s that read %q", b.in, b.old)
	return at.file, string(code[:at.start+found[0][0]]) + b.new + string(code[at.start+found[0][1]:])
}

// TestBreakages checks the table: each breakage changes one place of the code, and
// names a test. With GCS_BREAKAGES, a pattern of rules, it breaks the code so, and
// fails if the test does not.
func TestBreakages(t *testing.T) {
	pattern, run := os.LookupEnv("GCS_BREAKAGES")
	var code []string
	tests := map[string]bool{}
	files, err := filepath.Glob("*.go")
	require.NoError(t, err)
	for _, file := range files {
		if !strings.HasSuffix(file, "_test.go") {
			code = append(code, file)
			continue
		}
		text, err := os.ReadFile(file)
		require.NoError(t, err)
		for _, match := range regexp.MustCompile(`(?m)^func (Test\w+)\(`).FindAllSubmatch(text, -1) {
			tests[string(match[1])] = true
		}
	}
	places := declarations(t, code)
	for _, b := range breakages(t) {
		t.Run(b.rule, func(t *testing.T) {
			file, broken := b.apply(t, places)
			name, sub, _ := strings.Cut(b.test, "/")
			require.True(t, tests[name], "there is no test %s", name)
			if !run {
				return
			}
			if !regexp.MustCompile(pattern).MatchString(b.rule) {
				t.Skip("not chosen")
			}
			dir := t.TempDir()
			replacement, overlay := filepath.Join(dir, file), filepath.Join(dir, "overlay.json")
			require.NoError(t, os.WriteFile(replacement, []byte(broken), 0o600))
			original, err := filepath.Abs(file)
			require.NoError(t, err)
			replace, err := json.Marshal(map[string]any{"Replace": map[string]string{original: replacement}})
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(overlay, replace, 0o600))
			run := exec.Command("go", "test", "-vet=off", "-timeout=2m", "-overlay", overlay, "-run", "^"+name+"$/"+sub+"$", ".")
			run.Env = append(os.Environ(), "GCS_SCHEDULES=all", "GCS_SCHEDULES_LIMIT=20s")
			out, err := run.CombinedOutput()
			require.NotContains(t, string(out), "[build failed]")
			require.Error(t, err, "%s does not see it:\n%s", b.test, out)
			t.Logf("%s\n%s", b.test, out)
		})
	}
}
