package main

import (
	"errors"
	"fmt"

	"golang.org/x/mod/module"

	"github.com/athensgcs/gcs"
)

// checkName returns why no server has saved a version of that name, or nil: a path or
// a version that the go command does not ask for. The objects of such a version are
// somebody else's.
func checkName(v gcs.ModuleVersion) error {
	err := module.Check(v.Module, v.Version)
	if canonical := module.CanonicalVersion(v.Version); err == nil && canonical != v.Version {
		err = fmt.Errorf("the version is not canonical, which is %s", canonical)
	}
	if err == nil {
		return nil
	}
	path, pathErr := module.UnescapePath(v.Module)
	version, versionErr := module.UnescapeVersion(v.Version)
	escaped := path != v.Module || version != v.Version
	if escaped && pathErr == nil && versionErr == nil && module.Check(path, version) == nil {
		return fmt.Errorf("no server reads it: the name is escaped, and stands for %s@%s", path, version)
	}
	var of *module.ModuleError
	if errors.As(err, &of) {
		err = of.Err // without the name
	}
	return fmt.Errorf("no version of a module: %w", err)
}
