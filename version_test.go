package gcs

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"cloud.google.com/go/storage"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
)

// longModule makes object names of size bytes with the version v1.0.0.
func longModule(size int) string { return strings.Repeat("m", size-len("/@v/v1.0.0.info")) }

// perVersion are the calls that are about one version, and nothing else.
var perVersion = []string{"Save", "Exists", "Info", "GoMod", "Zip", "Delete"}

// Names that no version can have are refused before any request.
func TestBadNames(t *testing.T) {
	refuses := func(v ModuleVersion, others ...string) {
		run(t, fmt.Sprintf("%.40q@%.40q", v.Module, v.Version), withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
			for _, op := range slices.Concat(perVersion, []string{"Repair"}, others) {
				about := v
				if op == "List" {
					about.Version = ""
				}
				requireError(t, callsOn(s, v)[op](t.Context()), KindBadRequest, "gcs."+op, about.Module, about.Version)
			}
			require.Empty(t, f.Log())
		})
	}
	refuses(ModuleVersion{})
	refuses(ModuleVersion{longModule(1025), "v1.0.0"})
	for _, vers := range []string{
		"", "a/b", "../v1.0.0", "v1\x00", "v1\n", "v\xff", ".", "..", strings.Repeat("v", 1025),
	} {
		refuses(ModuleVersion{"m", vers})
	}
	for _, module := range []string{
		"", "a\x00b", "a\nb", "a\rb", "a\x7fb", "a\u0085b", "a\xffb", "a\xe2\x82", ".", "..", "a/./b", "a/../b", "../a", "a/..",
		"/", "/a", "a/", "a//b", "a/@v/b", "a/@v", strings.Repeat("m", 1025),
		".well-known/acme-challenge/a", ".well-known/acme-challenge", // which GCS keeps for itself
	} {
		refuses(ModuleVersion{module, "v1.0.0"}, "List")
	}
}

func TestNilZip(t *testing.T) {
	withStorage(t, func(t *testing.T, f *fakeGCS, s *Storage) {
		err := s.Save(t.Context(), "m", "v1.0.0", []byte("mod"), nil, nil, []byte("info"))
		requireError(t, err, KindBadRequest, "gcs.Save", "m", "v1.0.0")
		require.ErrorContains(t, err, "zip")
		require.Empty(t, f.Log())
	})
}

// Names that the go command would not accept, Athens and its tests do.
func TestGoodNames(t *testing.T) {
	modules := []string{
		"m", "benchListModule", "github.com/Azure/azure-sdk-for-go", "github.com/Azure/azure-sdk-for-go/v68",
		"gopkg.in/yaml.v3", "example.com/v", "example.com/a.zip", "例え.jp/モジュール",
		"a b/c%2F+?#&=~!*'(),;:@[]{}|\\^`\"<>$", "...", ".well-known/acme", ".well-known/acme-challenges/a",
	}
	versions := []string{
		"v1.0.0", "1.0.1", "yyy", "delete123", "v1", "v1.0.0+incompatible", "v0.0.0-20200102030405-abcdefabcdef",
		"v1.0.0-rc.1", "list", "latest", "v1.info", "v1.mod.zip", "版", "a b%2F?#@", "...", "@v",
	}
	rows := []ModuleVersion{{longModule(1024), "v1.0.0"}}
	for _, module := range modules {
		rows = append(rows, ModuleVersion{module, "v1.0.0"})
	}
	for _, vers := range versions {
		rows = append(rows, ModuleVersion{"example.com/m", vers})
	}
	for _, row := range rows {
		run(t, fmt.Sprintf("%.40s@%s", row.Module, row.Version), withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
			require.NoError(t, saveVersion(t.Context(), s, row.Module, row.Version))
			prefix := row.Module + "/@v/" + row.Version
			require.Equal(t, []string{prefix + ".info", prefix + ".mod", prefix + ".zip"}, f.Names())

			requireList(t, s, row.Module, row.Version)
			require.Equal(t, []ModuleVersion{row}, catalogOf(t, s, 1))
			returns(t, true)(s.Exists(t.Context(), row.Module, row.Version))
			for _, op := range perVersion[1:] {
				require.NoError(t, callsOn(s, row)[op](t.Context()), op)
			}
			require.Empty(t, f.Names())
		})
	}
}

// Objects that are of no version are nobody's.
func TestParseObjectForeign(t *testing.T) {
	for _, name := range []string{
		"", "index.html", "m/@v/", "m/@v/list", "m/@v/v1.0.0", "m/@v/.info", "m/@v/..info", "m/@v/v1.0.0.lck",
		"m/@v/v1.0.0.INFO", "m/@v/v1.0.0.ziphash", "m/@v/v1.0.0.zip.tmp", "m/@v/a/v1.0.0.zip", "m/@latest",
		"/@v/v1.0.0.info", "m//@v/v1.0.0.info", "m@v/v1.0.0.info", "../@v/v1.0.0.info", "m/@v/v1\xff.info",
		"m/@v/x/@v/v1.0.0.info",
	} {
		if v, ext, ok := parseObject(name); ok {
			t.Errorf("parseObject(%q) is %q, %q", name, v, ext)
		}
	}
}

// Every version has object names that GCS takes, and that are those of no other
// version.
func FuzzObjectName(f *testing.F) {
	for _, seed := range []struct{ module, version string }{
		{"github.com/Azure/azure-sdk-for-go", "v1.0.0+incompatible"}, {"例え.jp/モジュール", "版"}, {"m", "v1.info"},
		{"m", "v1.zip.mod"}, {"m/v2", "..."}, {"a/@v/b", "v1"}, {"@v", "@v"}, {"m/@v/v1.info", "v1"},
		{"m/@v/v1.0.0.zip", ""}, {"/@v/.info", ".."}, {".well-known/acme-challenge", "v1"}, {"a\xff", "v1\n"},
		{longModule(1024), "v1.0.0"}, {longModule(1025), "v1.0.0"},
	} {
		f.Add(seed.module, seed.version)
	}
	exts := []string{extInfo, extMod, extZip}
	f.Fuzz(func(t *testing.T, module, vers string) {
		b := &bucket{handle: new(storage.Client).Bucket("b")}
		if v := (ModuleVersion{module, vers}); b.check(v) == nil {
			for _, ext := range exts {
				name := v.object(ext)
				if len(name) > 1024 || !utf8.ValidString(name) || strings.ContainsAny(name, "\r\n") ||
					strings.HasPrefix(name, ".well-known/acme-challenge/") {
					t.Errorf("GCS does not take %q", name)
				}
				if got, gotExt, ok := parseObject(name); !ok || got != v || gotExt != ext {
					t.Errorf("parseObject(%q) is %q, %q, %v", name, got, gotExt, ok)
				}
			}
		}
		// The first argument is as good an object name as any.
		if v, ext, ok := parseObject(module); ok && v.object(ext) != module {
			t.Errorf("parseObject(%q) is %q, %q", module, v, ext)
		}
	})
}

// An .info or a .zip that names another .mod belongs to that one.
func TestNamed(t *testing.T) {
	for _, ext := range []string{extInfo, extZip} {
		for marker, state := range map[string]State{"": Partial, marked(givenUp, "a")[keyInProgress]: Abandoned} {
			s := snapshotOf(7, time.Now(), [3]string{"a", "a", "a"})
			s.mod.Metadata[keyInProgress] = marker
			(*s.slot(ext)).Metadata[keyGeneration] = "2"
			require.Equal(t, state, s.classify(time.Now(), DefaultStaleThreshold), ext)
		}
	}
}
