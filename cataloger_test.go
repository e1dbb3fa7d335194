package gcs

import (
	"encoding/base64"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// pagesOf returns all pages of a catalog, and calls between before each but the
// first.
func pagesOf(t *testing.T, s *Storage, pageSize int, between func()) [][]ModuleVersion {
	t.Helper()
	var pages [][]ModuleVersion
	for token := ""; ; {
		page, next, err := s.Catalog(t.Context(), token, pageSize)
		require.NoError(t, err)
		require.NotNil(t, page)
		pages = append(pages, page)
		require.Less(t, len(pages), 10_000, "the pages have no end")
		if next == "" {
			return pages
		}
		require.NotEqual(t, token, next)
		token = next
		between()
	}
}

func catalogOf(t *testing.T, s *Storage, pageSize int) []ModuleVersion {
	t.Helper()
	return slices.Concat(pagesOf(t, s, pageSize, func() {})...)
}

// mixedBucket fills a bucket with a bit of everything, and returns the complete
// versions in the order of their .zip objects.
func mixedBucket(f *fakeGCS) []ModuleVersion {
	complete := []ModuleVersion{
		{"a", "v1.0.0"}, {"example.com/m", "v1.0.0"}, {"example.com/m", "v1.0.0-rc.1"}, {"example.com/m", "v1.10.0"},
		{"example.com/m", "v1"}, {"example.com/m", "v1.j"}, {"example.com/m", "v1.jj"}, {"example.com/m", "v1.z"},
		{"example.com/m", "v1.zip"}, {"example.com/m", "v1.mod"}, {"example.com/m", "v1.info"},
		{"example.com/m-other", "v1.0.0"}, {"example.com/m/v2", "v2.0.0"}, {"example.com", "v0.1.0"},
		{"例え.jp/m", "v1.0.0"}, {"z", "v1.0.0"},
	}
	for _, v := range complete {
		storeVersion(f, v.Module, v.Version)
	}
	for i := 1; i < 7; i++ {
		for _, v := range []ModuleVersion{
			{"example.com/m", fmt.Sprintf("v1.%d.0-partial", i)}, {"example.com/m", fmt.Sprintf("v1.k%d", i)},
			{fmt.Sprintf("partial%d", i), "v1.0.0"}, {fmt.Sprintf("zz%d", i), "v1.0.0"},
		} {
			storeFiles(f, v.Module, v.Version, subsetOf(i)...)
		}
	}
	for _, v := range []ModuleVersion{{"example.com/m", "v1.in.progress"}, {"y", "v1.0.0"}} {
		storeVersion(f, v.Module, v.Version)
		f.Put(v.object(extMod), nil, marked(time.Now(), "a"))
	}
	for _, name := range []string{
		"index.html", "example.com/m/@v/list", "example.com/m/@v/v1.0.0.lock", "example.com/m/@v/v1.0.0.zip.tmp", "/@v/v1.0.0.zip",
		"example.com/m/@latest", "zzz", "@v/v1.0.0.info", "@v/v1.0.0.mod", "@v/v1.0.0.zip", "a//@v/v1.0.0.zip",
	} {
		f.Put(name, nil, nil)
	}
	slices.SortFunc(complete, func(a, b ModuleVersion) int { return strings.Compare(a.object(extZip), b.object(extZip)) })
	return complete
}

func TestCatalog(t *testing.T) {
	run(t, "pages", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		want := mixedBucket(f)
		for pageSize := 1; pageSize <= len(want)+1; pageSize++ {
			pages := pagesOf(t, s, pageSize, func() {})
			require.Equal(t, want, slices.Concat(pages...))
			// All pages are full but the last, which is not empty.
			require.Len(t, pages, (len(want)+pageSize-1)/pageSize)
			for _, page := range pages[:len(pages)-1] {
				require.Len(t, page, pageSize)
			}
		}
	})

	run(t, "empty", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		require.Equal(t, [][]ModuleVersion{{}}, pagesOf(t, s, 10, nil))
		storeFiles(f, "m", "v1.0.0", extInfo, extZip)
		require.Equal(t, [][]ModuleVersion{{}}, pagesOf(t, s, 10, nil))
	})

	run(t, "default page size", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		for i := range 1001 {
			storeVersion(f, "m", fmt.Sprintf("v1.%04d.0", i))
		}
		for _, pageSize := range []int{0, -1} {
			pages := pagesOf(t, s, pageSize, func() {})
			require.Equal(t, []int{1000, 1}, []int{len(pages[0]), len(slices.Concat(pages[1:]...))})
			require.Len(t, pages, 2)
		}
		require.Len(t, pagesOf(t, s, 5000, func() {}), 1)
	})

	// The last version of a page can be deleted, and those that follow it.
	run(t, "after a delete", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		storeVersion(f, "m", "v1.0.0", "v1.1.0", "v1.2.0", "v1.3.0")
		pages := pagesOf(t, s, 2, func() {
			for _, vers := range []string{"v1.1.0", "v1.2.0"} {
				require.NoError(t, s.Delete(t.Context(), "m", vers))
			}
			require.NoError(t, saveVersion(t.Context(), s, "m", "v1.0.0-rc.1"))
		})
		require.Equal(t, [][]ModuleVersion{{{"m", "v1.0.0"}, {"m", "v1.1.0"}}, {{"m", "v1.3.0"}}}, pages)
	})

	// A token is good for another page size, and for another instance.
	run(t, "token elsewhere", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		want := mixedBucket(f)
		var got []ModuleVersion
		for pageSize, token := 1, ""; pageSize == 1 || token != ""; pageSize++ {
			page, next, err := f.storage("other").Catalog(t.Context(), token, pageSize)
			require.NoError(t, err)
			got, token = append(got, page...), next
		}
		require.Equal(t, want, got)
	})

	run(t, "bad tokens", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		mixedBucket(f)
		_, good, err := s.Catalog(t.Context(), "", 3)
		require.NoError(t, err)
		require.NotEmpty(t, good)

		bad := []string{
			"x", " ", "1000", "null", good + " ", good + "\n", "\r\n" + good, good + "=", good + good, "/@v/v1.0.0.zip", "m/@v/.zip",
			"m/@v/v1.0.0.info", "m/@v/v1.0.0.mod", "m/@v/v1.0.0.lock", "m//n/@v/v1.0.0.zip", "m/@v/v1.0.0/v2.0.0.zip", "m/v1.0.0.zip",
			strings.Repeat("m", 1024) + "/@v/v1.0.0.zip",
			// A page token of GCS: the last name, as a protocol buffer.
			base64.StdEncoding.EncodeToString([]byte("\x0a\x0fm/@v/v1.0.0.zip")),
		}
		for i := 1; i < len(good); i++ {
			bad = append(bad, good[:i])
		}
		rnd := rand.NewChaCha8([32]byte{})
		for size := range 200 {
			b := make([]byte, size+1)
			rnd.Read(b)
			bad = append(bad, base64.RawURLEncoding.EncodeToString(b))
		}
		f.ResetLog()
		for _, token := range bad {
			page, next, err := s.Catalog(t.Context(), token, 3)
			requireError(t, err, KindBadRequest, "gcs.Catalog", "", "")
			require.Nil(t, page)
			require.Empty(t, next)
		}
		require.Empty(t, f.Log())
	})

	// Versions come and go between two pages. Those that were there all the time are
	// listed once, and so is any other at the most.
	run(t, "while changing", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		want := mixedBucket(f)
		suffixes := []string{"", ".a", ".j0", ".k0", ".mod.x", ".zi", ".zip.zip", "-rc", "0"}
		for seed := range uint64(40) {
			rnd := rand.New(rand.NewPCG(seed, 0))
			var passing []ModuleVersion
			between := func() {
				for range rnd.IntN(6) {
					beside := want[rnd.IntN(len(want))]
					v := ModuleVersion{beside.Module, beside.Version + suffixes[rnd.IntN(len(suffixes))]}
					if slices.Contains(want, v) {
						continue
					}
					passing = append(passing, v)
					storeFiles(f, v.Module, v.Version, subsetOf(rnd.IntN(8)|rnd.IntN(8)|rnd.IntN(8))...)
				}
				for _, v := range passing {
					if rnd.IntN(2) == 0 {
						removeVersion(f, v)
					}
				}
			}
			got, times := slices.Concat(pagesOf(t, s, 1+rnd.IntN(5), between)...), map[ModuleVersion]int{}
			for _, v := range got {
				times[v]++
			}
			for _, v := range want {
				require.Equal(t, 1, times[v], "seed %d: %v", seed, v)
			}
			require.Len(t, times, len(got), "seed %d: %v", seed, times)
			for _, v := range passing {
				removeVersion(f, v)
			}
		}
	})
}

func removeVersion(f *fakeGCS, v ModuleVersion) {
	for _, ext := range allExts {
		f.Remove(v.object(ext))
	}
}
