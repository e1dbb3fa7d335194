// Package athens tests the files and the guide for operators of Athens.
package athens

import (
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/mod/modfile"
	"golang.org/x/mod/semver"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// files are the files of the guide, and where they go in Athens.
var files = map[string]string{
	"gcp.go.txt":      "pkg/storage/gcp/gcp.go",
	"with_gcs.go.txt": "pkg/stash/with_gcs.go",
	"otel.go.txt":     "cmd/proxy/otel.go",
}

// TestFilesInAthens builds the files in a copy of Athens' packages (the shapes of
// v0.18, see testdata) and runs the tests there, on the emulator.
func TestFilesInAthens(t *testing.T) {
	library, err := filepath.Abs("../..")
	require.NoError(t, err)
	work := t.TempDir()
	require.NoError(t, os.CopyFS(work, os.DirFS("testdata")))
	write := func(name, content string) {
		t.Helper()
		name = filepath.Join(work, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(name), 0o755))
		require.NoError(t, os.WriteFile(name, []byte(content), 0o644))
	}
	for file, place := range files {
		write("athens/"+place, text(t, file))
	}
	write("autoexport/go.mod", "module go.opentelemetry.io/contrib/exporters/autoexport\n")
	// The versions of this module, so that nothing has to be downloaded.
	write("athens/go.mod", strings.Replace(text(t, "../../go.mod"), "module github.com/athensgcs/gcs", "module github.com/gomods/athens", 1)+`
require (
	github.com/athensgcs/gcs v0.0.0
	go.opentelemetry.io/contrib/exporters/autoexport v0.0.0
)

replace (
	github.com/athensgcs/gcs => `+strconv.Quote(library)+`
	go.opentelemetry.io/contrib/exporters/autoexport => ../autoexport
)
`)
	write("athens/go.sum", text(t, "../../go.sum"))

	bucket := fakegcs.New()
	defer bucket.Close()
	server := httptest.NewServer(bucket.Handler())
	defer server.Close()
	cmd := exec.CommandContext(t.Context(), "go", "test", "-timeout=1m", "./...")
	if testing.Verbose() {
		cmd.Args = append(cmd.Args, "-v")
	}
	cmd.Dir = filepath.Join(work, "athens")
	cmd.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=", "GOPROXY=off",
		"STORAGE_EMULATOR_HOST="+server.URL, "TEST_BUCKET="+fakegcs.Bucket)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	t.Logf("%s", out)
}

// The guide shows the files as they are.
func TestGuideShowsFiles(t *testing.T) {
	guide := text(t, "../athens.md")
	for file := range files {
		require.Contains(t, guide, "\n```go\n"+text(t, file)+"```\n", file)
	}
	require.Equal(t, len(files), strings.Count(guide, "\n```go\n"))
}

func text(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	require.NoError(t, err)
	return string(b)
}

// A program that imports the library keeps its versions: go.mod asks for nothing newer
// than Athens v0.18.0 selects.
func TestLowestVersions(t *testing.T) {
	selected := map[string]string{}
	for line := range strings.Lines(text(t, "testdata/athens-v0.18.0-versions.txt")) {
		path, version, _ := strings.Cut(strings.TrimSpace(line), " ")
		selected[path] = version
	}
	mod, err := modfile.Parse("go.mod", []byte(text(t, "../../go.mod")), nil)
	require.NoError(t, err)
	require.Equal(t, "1.26.0", mod.Go.Version)
	require.Nil(t, mod.Toolchain)
	shared := 0
	for _, r := range mod.Require {
		if version, ok := selected[r.Mod.Path]; ok {
			shared++
			assert.LessOrEqual(t, semver.Compare(r.Mod.Version, version), 0, "%v, and Athens has %s", r.Mod, version)
		}
	}
	require.Greater(t, shared, 40)
}
