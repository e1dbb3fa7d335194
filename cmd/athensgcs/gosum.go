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

// checksums are the h1: hashes of a version's files. An empty one is not known.
type checksums struct {
	zip, mod string
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
	file   string
	hashes map[string]string // by what is before the hash in a line
}

func readGoSum(file string) (*goSum, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("-sums: %w", err)
	}
	g := &goSum{file, map[string]string{}}
	n := 0
	for line := range strings.Lines(string(text)) {
		n++
		switch fields := strings.Fields(line); len(fields) {
		case 0:
		case 3:
			if isH1(fields[2]) {
				g.hashes[fields[0]+" "+fields[1]] = fields[2]
			}
		default:
			return nil, fmt.Errorf("-sums: line %d of %s is not one of a go.sum file", n, file)
		}
	}
	return g, nil
}

// isH1 reports whether the hash is of the only algorithm that there is. The go
// command ignores others too.
func isH1(hash string) bool { return strings.HasPrefix(hash, "h1:") }

func (g *goSum) name() string { return g.file }

func (g *goSum) lookup(module, version string) (checksums, error) {
	line := module + " " + version
	sums := checksums{g.hashes[line], g.hashes[line+"/go.mod"]}
	if sums == (checksums{}) {
		return sums, unknownError{}
	}
	return sums, nil
}
