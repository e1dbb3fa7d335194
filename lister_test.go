package gcs

import (
	"fmt"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

func TestList(t *testing.T) {
	run(t, "neighbours", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		modules := []string{
			"example.com", "example.com/m", "example.com/m-other", "example.com/m/v2", "example.com/m/v2/sub",
			"example.com/mm", "example.com/M", "example.com/m@v", "other.com/example.com/m",
		}
		for i, module := range modules {
			storeVersion(f, module, fmt.Sprintf("v1.%d.0", i))
		}
		storeFiles(f, "example.com/m", "v9.0.0", extInfo, extMod)
		storeFiles(f, "example.com/m/v2", "v9.0.0", extZip)
		for _, name := range []string{"@v/list", "@v/v1.1.0.lock", "@v/v1.1.0.info.bak", "@latest", "@v/a/v1.0.0.zip"} {
			f.Put("example.com/m/"+name, nil, nil)
		}
		for i, module := range modules {
			requireList(t, s, module, fmt.Sprintf("v1.%d.0", i))
		}
		for _, module := range []string{"example.com/nothing", "example.co", "example.com/m/v", "com/m", "other.com"} {
			requireList(t, s, module)
		}
	})

	// Where one version's name goes on as another's has its ending, the objects of
	// the two interleave. The order is that of the .zip objects.
	run(t, "interleaved", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		storeVersion(f, testModule, "v1", "v1.j", "v1.z", "v1.zip", "v1.info", "v1.mod", "v1.mod.j", "v1.0.0", "v1.0.0-rc.1")
		storeFiles(f, testModule, "v1.k", extInfo, extZip)
		all := []string{"v1.0.0-rc.1", "v1.0.0", "v1.info", "v1.j", "v1.mod.j", "v1.mod", "v1.z", "v1", "v1.zip"}
		requireList(t, s, testModule, all...)
		for _, vers := range []string{"v1", "v1.j", "v1.z", "v1.info", "v1.mod", "v1.zip"} {
			f.ResetLog()
			requireExists(t, s, vers, true)
			require.Len(t, f.Log(), 1)
		}
		for _, vers := range []string{"v1", "v1.j"} { // copied
			f.SetMetadata(ModuleVersion{testModule, vers}.object(extInfo), map[string]string{keyGeneration: "1"})
		}
		f.ResetLog()
		requireList(t, s, testModule, all...)
		require.Len(t, f.Log(), 2)
	})

	// Access lists are most of what a list sends, unless they are not asked for.
	run(t, "is narrow", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		for i := range 300 {
			storeVersion(f, "m", fmt.Sprintf("v1.%03d.0", i))
		}
		require.NoError(t, callsOn(s, ModuleVersion{"m", ""})["List"](t.Context()))
		require.Less(t, f.Log()[0].Received/900, int64(300), "bytes for each object")
	})
}

// One request for every 1,000 objects.
func TestListRequests(t *testing.T) {
	for _, objects := range []int{0, 1, 999, 1000, 1001, 2000, 2500} {
		run(t, fmt.Sprint(objects), withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
			var want []string
			for i := range objects {
				v := ModuleVersion{"m", fmt.Sprintf("v1.%06d.0", i/3)}
				f.Put(v.object(allExts[i%3]), nil, nil)
				if i%3 == 2 {
					want = append(want, v.Version)
				}
			}
			storeVersion(f, "m-other", "v1.0.0")
			storeVersion(f, "a", "v1.0.0")
			requireList(t, s, "m", want...)
			require.Equal(t, slices.Repeat([]string{"list"}, max((objects+998)/999, 1)), logged(f))
		})
	}
}

// A list of several pages is no snapshot: what is seen of a version on one page
// may be gone when the next is read.
func TestListAcrossPages(t *testing.T) {
	for _, call := range []string{"List", "Catalog"} {
		run(t, call, withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
			for i := range maxPage - 2 {
				storeFiles(f, testModule, fmt.Sprintf("a%03d", i), extInfo)
			}
			// The first page ends with the .mod. The version is partial
			// until another save takes it over, and never complete.
			storeFiles(f, testModule, testVersion, extInfo, extMod)
			storeFiles(f, testModule, "z", extInfo)
			f.atFirst(nth("m", 1), func() {
				time.Sleep(time.Millisecond) // GCS tells times to the millisecond
				f.put(testVersionName, marked(time.Now(), "b"), map[string]string{keySaveID: "b", keyGeneration: ownMod}, extMod, extZip)
			})
			requireTold[call](t, s, false)
			require.NotNil(t, f.Get(objectName(extZip)))
		})
	}
}

// pageBy makes the server answer lists with pages of that size at most, as it
// may, and ignore offsets, as some do.
func pageBy(size string) func(*http.Request) *http.Response {
	return func(r *http.Request) *http.Response {
		q := r.URL.Query()
		if q.Has("maxResults") || q.Has("prefix") {
			q.Del("startOffset")
			q.Del("endOffset")
			if size != "" {
				q.Set("maxResults", size)
			}
			r.URL.RawQuery = q.Encode()
		}
		return nil
	}
}

// A server that pages as it likes and ignores offsets makes nothing wrong.
func TestOtherServers(t *testing.T) {
	for _, size := range []string{"", "1", "2", "7"} {
		run(t, "pages of "+size, withStorage, func(t *testing.T, f *fakeGCS, _ *Storage) {
			s := behind(f, pageBy(size))
			storeVersion(f, testModule, "v1", "v1.j", "v1.z", "v1.0.0")
			storeFiles(f, testModule, "v1.k", extInfo, extMod)
			storeVersion(f, "a", "v1")
			requireList(t, s, testModule, "v1.0.0", "v1.j", "v1.z", "v1")
			for pageSize := range 7 {
				require.Equal(t, []ModuleVersion{
					{"a", "v1"}, {testModule, "v1.0.0"}, {testModule, "v1.j"}, {testModule, "v1.z"}, {testModule, "v1"},
				}, catalogOf(t, s, pageSize))
			}
			for vers, want := range map[string]bool{"v1": true, "v1.j": true, "v1.k": false, "v1.0": false} {
				requireExists(t, s, vers, want)
			}
			require.NoError(t, s.Delete(t.Context(), testModule, "v1"))
			requireList(t, s, testModule, "v1.0.0", "v1.j", "v1.z")
		})
	}
}

// What goes wrong on one page adds no version twice.
func TestListFaults(t *testing.T) {
	for fault := fakegcs.ConnectionRefused; fault <= fakegcs.HungApplied; fault++ {
		run(t, fault.String(), withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
			var want []string
			for i := range 700 {
				want = append(want, fmt.Sprintf("v1.%03d.0", i))
			}
			storeVersion(f, "m", want...)
			f.fault(fault, func(r *fakegcs.Request) bool { return r.N%2 == 0 })
			requireList(t, s, "m", want...)
		})
	}
}
