// Package athens tests the files and the guide for operators of Athens.
package athens

import (
	"io/fs"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/mod/modfile"
	"golang.org/x/mod/semver"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// An athens is a copy of the stand-ins for Athens' packages.
type athens struct {
	t      *testing.T
	dir    string
	copied string // where the installer works
	env    []string

	goCommand string
}

func newAthens(t *testing.T) athens {
	t.Helper()
	if runtime.GOOS == "windows" {
		t.Skip("the installer is a shell script")
	}
	if testing.Short() {
		t.Skip("it builds and runs programs, into which the race detector does not see")
	}
	work, err := filepath.EvalSymlinks(t.TempDir())
	require.NoError(t, err)
	a := athens{t: t, dir: filepath.Join(work, "some where", "athens"), copied: filepath.Join(work, "a copy", "athens")}
	a.env = append(os.Environ(), "GOWORK=off", "GOFLAGS=", "GOPROXY=off", "GIT_DIR=none",
		"PATH="+filepath.Join(work, "bin")+":"+os.Getenv("PATH"))
	require.NoError(t, os.CopyFS(a.dir, os.DirFS("testdata/athens")))
	require.NoError(t, os.CopyFS(filepath.Join(work, "autoexport"), os.DirFS("testdata/autoexport")))
	a.write("../../autoexport/go.mod", "module go.opentelemetry.io/contrib/exporters/autoexport\n")
	a.write("cmd/proxy/otel.go", text(t, "otel.go.txt"))
	for file := range strings.FieldsSeq("cataloger checker deleter doc gcp gcp_test getter lister saver") {
		a.write("pkg/storage/gcp/"+file+".go", "package gcp\n")
	}
	a.write("pkg/stash/with_gcs.go", "package stash\n")
	// The versions of this module, so that nothing has to be downloaded.
	a.write("go.mod", strings.Replace(text(t, "../../go.mod"), "module github.com/athensgcs/gcs", "module github.com/gomods/athens", 1)+`
require go.opentelemetry.io/contrib/exporters/autoexport v0.0.0

replace go.opentelemetry.io/contrib/exporters/autoexport => `+strconv.Quote(filepath.Join(work, "autoexport"))+"\n")
	a.write("go.sum", text(t, "../../go.sum"))
	a.goCommand, err = exec.LookPath("go")
	require.NoError(t, err)
	// It tidies nothing: for that it would download what the dependencies are tested
	// with. It builds with cgo, as the other tests are built, so that they share what is
	// compiled.
	a.program("go", "[ \"$*\" = 'mod tidy' ] && exec touch '"+filepath.Join(work, "tidied")+"'\nunset CGO_ENABLED\nexec '"+a.goCommand+"' \"$@\"")
	a.program("mktemp", "mkdir '"+filepath.Dir(a.copied)+"' && echo '"+filepath.Dir(a.copied)+"'")
	return a
}

// program makes the installer find a shell script.
func (a athens) program(name, script string) { a.write("../../bin/"+name, "#!/bin/sh\n"+script+"\n") }

func (a athens) write(name, content string) {
	a.t.Helper()
	name = filepath.Join(a.dir, name)
	require.NoError(a.t, os.MkdirAll(filepath.Dir(name), 0o755))
	require.NoError(a.t, os.WriteFile(name, []byte(content), 0o755))
}

// run runs a command in the folder.
func (a athens) run(name string, args ...string) (output string, err error) {
	cmd := exec.CommandContext(a.t.Context(), name, args...)
	cmd.Dir, cmd.Env = a.dir, a.env
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (a athens) install(args ...string) (output string, err error) {
	a.t.Helper()
	script, err := filepath.Abs("install")
	require.NoError(a.t, err)
	return a.run(script, append([]string{a.dir}, args...)...)
}

// files returns the contents of all files.
func (a athens) files() map[string]string {
	a.t.Helper()
	files := map[string]string{}
	require.NoError(a.t, filepath.WalkDir(a.dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			files[strings.TrimPrefix(path, a.dir+"/")] = text(a.t, path)
		}
		return err
	}))
	return files
}

// TestInstall installs the files in a copy of Athens' packages (the shapes of v0.18,
// see testdata) and runs the tests there, on the emulator.
func TestInstall(t *testing.T) {
	a := newAthens(t)
	out, err := a.install()
	require.NoError(t, err, "%s", out)
	require.FileExists(t, filepath.Join(a.dir, "../../tidied"))
	installed := a.files()
	for file, place := range map[string]string{"gcp.go.txt": "pkg/storage/gcp/gcp.go", "gcp_test.go.txt": "pkg/storage/gcp/gcp_test.go", "with_gcs.go.txt": "pkg/stash/with_gcs.go"} {
		require.Equal(t, text(t, file), installed[place])
		require.Contains(t, out, "wrote "+filepath.Join(a.dir, place)+"\n")
	}
	require.NotContains(t, installed, "pkg/storage/gcp/saver.go")
	require.Contains(t, out, "removed "+filepath.Join(a.dir, "pkg/storage/gcp/saver.go")+"\n")
	require.Regexp(t, `github\.com/athensgcs/gcs => "?\.\./\.\./`, installed["go.mod"])
	program := filepath.Join(a.dir, "bin/athens-proxy")
	version, err := a.run(program, "-version")
	require.NoError(t, err)
	require.Regexp(t, `^version unset built \d{4}(-\d\d){2}-\d\d:\d\d:\d\d-UTC\n$`, version)

	require.NoDirExists(t, filepath.Join(a.dir, "vendor"))

	a.runTests()

	// A second time nothing changes but the program, and the dependencies if they are
	// vendored. There is nothing new to compile.
	a.program("go", `case "$1 $2" in build*) exec touch "$3" ;; "mod tidy" | vet*) ;;
"mod vendor") grep -q 'github.com/athensgcs/gcs => .*\.\./\.\./' go.mod && echo new >vendor/modules.txt ;;
*) exec '`+a.goCommand+`' "$@" ;; esac`)
	require.NoError(t, os.RemoveAll(filepath.Dir(program)))
	delete(installed, "bin/athens-proxy")
	a.write("vendor/modules.txt", "old\n")
	installed["vendor/modules.txt"] = "new\n"
	out, err = a.install("../elsewhere/proxy")
	require.NoError(t, err, "%s", out)
	program = filepath.Join(filepath.Dir(a.dir), "elsewhere/proxy")
	require.FileExists(t, program)
	require.Equal(t, installed, a.files())
	require.NotRegexp(t, "wrote|removed", out)
	require.Contains(t, out, "vendored "+filepath.Join(a.dir, "vendor")+"\n")
}

// runTests runs the tests that are installed, and those of testdata, on the emulator.
// The checkout is where the installer had its copy while they are built: what was
// compiled there is not compiled again.
func (a athens) runTests() {
	t := a.t
	t.Helper()
	tests := filepath.Join(t.TempDir(), "gcp.test")
	checkout := a.dir
	require.NoError(t, os.Mkdir(filepath.Dir(a.copied), 0o755))
	require.NoError(t, os.Rename(checkout, a.copied))
	a.dir = a.copied
	const added = "pkg/storage/gcp/athens_test.go"
	a.write(added, text(t, "testdata/athens_test.go"))
	out, err := a.run("go", "test", "-c", "-ldflags=-s -w", "-o", tests, "./pkg/storage/gcp")
	require.NoError(t, err, "%s", out)
	require.NoError(t, os.Remove(filepath.Join(a.dir, added)))
	require.NoError(t, os.Rename(a.copied, checkout))
	require.NoError(t, os.Remove(filepath.Dir(a.copied)))
	a.dir = checkout

	bucket := fakegcs.New()
	defer bucket.Close()
	server := httptest.NewServer(bucket.Handler())
	defer server.Close()
	outside := a.env
	a.env = append(outside, "STORAGE_EMULATOR_HOST="+server.URL, "TEST_BUCKET="+fakegcs.Bucket)
	out, err = a.run(tests, "-test.v", "-test.timeout=1m")
	require.NoError(t, err, "%s", out)
	require.NotContains(t, out, "SKIP")
	require.Contains(t, out, "--- PASS: TestBackend")
	require.Contains(t, out, "--- PASS: TestSingleFlight")
	require.Contains(t, out, "--- PASS: TestSharedFlight")
	if testing.Verbose() {
		t.Log(out)
	}
	var installed []string
	for _, m := range regexp.MustCompile(`(?m)^func (Test\w+)`).FindAllStringSubmatch(text(t, "gcp_test.go.txt"), -1) {
		installed = append(installed, m[1])
	}
	a.env = append(outside, "STORAGE_EMULATOR_HOST=", "ATHENS_STORAGE_GCP_BUCKET=")
	out, err = a.run(tests, "-test.v", "-test.run", "^("+strings.Join(installed, "|")+")$")
	require.NoError(t, err, "%s", out)
	require.NotContains(t, out, "PASS:")
	require.Equal(t, len(installed), strings.Count(out, "--- SKIP: "))
	require.Contains(t, out, "neither ATHENS_STORAGE_GCP_BUCKET names a bucket")
}

// What is no Athens, or not one that the files fit, stays as it is.
func TestInstallRefuses(t *testing.T) {
	for _, test := range []struct{ name, file, content, says string }{
		{"another module", "go.mod", "module github.com/gomods/athens-fork\n", "is no checkout of Athens"},
		{"another file", "pkg/storage/gcp/locker.go", "package gcp\n", "locker.go"},
		{"another shape", "pkg/config/config.go", "package config\n\ntype GCPConfig struct{ Name string }\n", "conf.Bucket undefined"},
	} {
		t.Run(test.name, func(t *testing.T) {
			a := newAthens(t)
			a.write(test.file, test.content)
			before := a.files()
			out, err := a.install()
			require.Error(t, err, "%s", out)
			require.Contains(t, out, test.says)
			require.Contains(t, out, "nothing has changed")
			require.Equal(t, before, a.files())
		})
	}
	a := newAthens(t)
	require.NoError(t, os.Remove(filepath.Join(a.dir, "pkg/stash/with_gcs.go")))
	out, err := a.install()
	require.Error(t, err)
	require.Contains(t, out, "it has no pkg/stash/with_gcs.go")
	a.dir = t.TempDir()
	out, err = a.install()
	require.Error(t, err)
	require.Contains(t, out, "is no checkout of Athens")
	require.Empty(t, a.files())
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
