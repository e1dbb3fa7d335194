package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
)

// A reference knows the checksums of versions.
type reference interface {
	name() string
	// lookup returns an unknownError if the reference has none of the version,
	// errExcluded if it is not to be asked, and errMisbehaves if it cannot be
	// trusted.
	lookup(module, version string) (checksums, error)
}

// checksums are the h1: hashes of a version that are right. Without any there is
// nothing to compare with.
type checksums struct {
	zip, mod []string
}

// An unknownError says that a reference does not know a version, and why if that
// is worth a line.
type unknownError struct{ reason string }

func (e unknownError) Error() string { return "unknown: " + e.reason }

var (
	errExcluded   = errors.New("the module matches GONOSUMDB")
	errMisbehaves = errors.New("the checksum database misbehaves")
)

// A goSum is a go.sum file.
type goSum struct {
	file string
	sums map[string]checksums // by MODULE@VERSION
}

func readGoSum(file string) (*goSum, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("-sums: %w", err)
	}
	g := &goSum{file, map[string]checksums{}}
	line := 0
	for text := range strings.Lines(string(text)) {
		line++
		fields := strings.Fields(text)
		if len(fields) == 0 {
			continue
		}
		if len(fields) != 3 {
			return nil, fmt.Errorf("-sums: line %d of %s is not one of a go.sum file", line, file)
		}
		g.add(fields[0], fields[1], fields[2])
	}
	return g, nil
}

func (g *goSum) add(module, version, hash string) {
	if !strings.HasPrefix(hash, "h1:") {
		return // an algorithm that is not known yet; the go command ignores it too
	}
	version, isMod := strings.CutSuffix(version, "/go.mod")
	sums := g.sums[module+"@"+version]
	if isMod {
		sums.mod = append(sums.mod, hash)
	} else {
		sums.zip = append(sums.zip, hash)
	}
	g.sums[module+"@"+version] = sums
}

func (g *goSum) name() string { return g.file }

func (g *goSum) lookup(module, version string) (checksums, error) {
	sums, ok := g.sums[module+"@"+version]
	if !ok {
		return checksums{}, unknownError{}
	}
	return sums, nil
}
