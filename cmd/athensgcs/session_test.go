package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// large returns a release whose zip is a little larger than size.
func large(module, version string, size int) release {
	r := newRelease(module, version)
	filler := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{}).Read(filler)
	r.zip = newZip(module, version, map[string]string{"go.mod": r.mod, "data": string(filler)})
	return r
}

// TestSession expects docs/operations.md to show what the program prints, the
// checksums apart.
func TestSession(t *testing.T) {
	clearGoEnv(t)
	text, err := os.ReadFile("../../docs/operations.md")
	require.NoError(t, err)
	checksum := regexp.MustCompile(`h1:\S+`)
	doc := checksum.ReplaceAllString(strings.ReplaceAll(string(text), "\r\n", "\n"), "h1:")
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(time.Until(time.Date(2026, 11, 2, 9, 0, 0, 0, time.UTC)))
		b, disk := newBucket(t), t.TempDir()
		shows := func(command, flags string) {
			t.Helper()
			args := command + flags
			if sum, ok := b.checksums.(*sumServer); ok {
				args = strings.ReplaceAll(args, "sum.golang.org", sum.key)
			}
			args = strings.ReplaceAll(args, "/var/lib/athens", disk)
			status, stdout, stderr := b.run(strings.Fields(args)...)
			assert.Empty(t, stderr)
			want := "    $ athensgcs " + command + " -bucket my-modules" + flags + "; echo $?\n"
			for line := range strings.Lines(stdout + fmt.Sprintln(status)) {
				want += "    " + line
			}
			want = checksum.ReplaceAllString(strings.ReplaceAll(want, "sum.example.com", "sum.golang.org"), "h1:")
			assert.Contains(t, doc, want+"\n")
		}

		uuid, mod := large("github.com/google/uuid", "v1.6.0", 98_500), large("golang.org/x/mod", "v0.17.0", 98_500)
		sync, pkgErrors := large("golang.org/x/sync", "v0.7.0", 30_000), large("github.com/pkg/errors", "v0.9.1", 30_000)
		quote, sampler := large("rsc.io/quote", "v1.5.2", 23_000), large("rsc.io/sampler", "v1.3.0", 23_000)
		sums := map[string]string{}
		for _, r := range []release{uuid, mod, sync, pkgErrors, quote, sampler} {
			sums[r.module+"@"+r.version] = r.sums(t)
		}
		poisoned := pkgErrors
		poisoned.zip = large(pkgErrors.module, pkgErrors.version, 30_001).zip
		b.put(poisoned, nil, "info", "mod", "zip")
		b.put(quote, nil, "info", "mod", "zip")
		b.put(sampler, nil, "info", "mod", "zip")
		b.put(release{module: uuid.module, version: uuid.version, info: uuid.info, mod: uuid.mod + strings.Repeat("\n", 1000)}, nil, "info", "mod")
		time.Sleep(24 * time.Hour)
		b.put(mod, marked("mod", 0), "mod")
		b.put(sync, marked("sync", 0), "info", "mod", "zip")
		time.Sleep(3 * time.Hour)
		b.put(newRelease("golang.org/x/tools", "v0.21.0"), marked("tools", 0), "mod")

		time.Sleep(12 * time.Second)
		shows("check", "")
		shows("show", " golang.org/x/mod@v0.17.0")
		_, stdout, _ := b.run("check", "-json")
		assert.Equal(t, 1, strings.Count(stdout, `"state":"partial"`))
		time.Sleep(time.Second)
		_, stdout, _ = b.run("repair", "-dry-run")
		for _, line := range []string{"@v1.6.0: partial, no .zip, written 1 day ago: would be removed\n", "; 1 would be finished, 2 would be removed, 1 would be left alone\n"} {
			assert.Contains(t, stdout, line)
		}
		shows("repair", "")
		b.checksums = newSumServer(t, sums)
		shows("verify", " -sumdb sum.golang.org")
		shows("delete", " github.com/pkg/errors@v0.9.1")
		for _, r := range []release{pkgErrors, uuid, mod} {
			b.put(r, nil, "info", "mod", "zip")
		}
		shows("verify", " -sumdb sum.golang.org")

		for _, r := range []release{quote, large("rsc.io/quote", "v1.5.1", 23_000), large("rsc.io/quote/v3", "v3.1.0", 23_000)} {
			write(t, r.zip, disk, r.module, r.version, "source.zip")
		}
		write(t, quote.zip, disk, "rsc.io", "fortune", "v1.0.0", "source.zip")
		_, stdout, _ = b.run("load", "-dry-run", disk)
		assert.Contains(t, stdout, "rsc.io/quote/v3@v3.1.0: would be stored\n4 versions, 93 kB: 2 would be stored; 1 already there; 1 refused\n")
		shows("load", " /var/lib/athens")
	})
}
