package main

import (
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/athensgcs/gcs"
)

func TestCheckName(t *testing.T) {
	for _, tt := range []struct{ module, version, want string }{
		{"github.com/BurntSushi/toml", "v1.0.0", ""},
		{"example.com/a", "v2.0.0+incompatible", ""},
		{"gopkg.in/yaml.v3", "v3.0.0-20200313102051-9f266ea9e77c", ""},
		{"example.com/a", "notes", `no version of a module: version "notes" invalid: not a semantic version`},
		{"example.com/a", "v1", `no version of a module: the version is not canonical, which is v1.0.0`},
		{"example.com/a", "v1.0.0+meta", `no version of a module: the version is not canonical, which is v1.0.0`},
		{"example.com/a", "v2.0.0", `no version of a module: version "v2.0.0" invalid: should be v0 or v1, not v2`},
		{"nodots", "v1.0.0", `no version of a module: malformed module path "nodots": missing dot in first path element`},
		{"github.com/!burnt!sushi/toml", "v1.0.0", `no server reads it: the name is escaped, and stands for github.com/BurntSushi/toml@v1.0.0`},
		{"example.com/a", "v1.0.0-!r!c1", `no server reads it: the name is escaped, and stands for example.com/a@v1.0.0-RC1`},
		{"example.com/!!a", "v1.0.0", `no version of a module: malformed module path "example.com/!!a": invalid char '!'`},
	} {
		err := checkName(gcs.ModuleVersion{Module: tt.module, Version: tt.version})
		if tt.want == "" {
			assert.NoError(t, err)
		} else {
			assert.EqualError(t, err, tt.want)
		}
	}
}
