// Package compliance stands in for Athens' package of the same name.
package compliance

import (
	"io"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/gomods/athens/pkg/errors"
	"github.com/gomods/athens/pkg/storage"
)

// RunTests asks what Athens' own suite asks of a storage.
func RunTests(t *testing.T, b storage.Backend, clearBackend func() error) {
	require.NoError(t, clearBackend())
	ctx := t.Context()
	const mod, ver = "example.com/Mod", "v1.0.0"
	exists := func(mod, ver string) bool {
		ok, err := storage.WithChecker(b).Exists(ctx, mod, ver)
		require.NoError(t, err)
		return ok
	}
	save := func(mod, ver string) {
		// With an MD5 that is none.
		require.NoError(t, b.Save(ctx, mod, ver, []byte("mod"), strings.NewReader("zip"), []byte("nineteen characters"), []byte("info")))
	}
	t.Run("NotFound", func(t *testing.T) {
		const mod, ver = "example.com/nothing", "yyy"
		require.True(t, errors.IsNotFoundErr(b.Delete(ctx, mod, ver)))
		_, err := b.GoMod(ctx, mod, ver)
		require.True(t, errors.IsNotFoundErr(err))
		_, err = b.Info(ctx, mod, ver)
		require.True(t, errors.IsNotFoundErr(err))
		_, err = b.Zip(ctx, mod, ver)
		require.True(t, errors.IsNotFoundErr(err))
		list, err := b.List(ctx, mod)
		require.NoError(t, err)
		require.Empty(t, list)
	})
	t.Run("List", func(t *testing.T) {
		want := map[string][]string{
			"example.com/one/two":        {"v1.1.0", "v1.2.0", "v1.3.0"},
			"example.com/one/two/v2":     {"v2.1.0"},
			"example.com/one/two-suffix": {"v0.9.0"},
			"example.com/one":            {},
		}
		for mod, versions := range want {
			for _, ver := range versions {
				save(mod, ver)
			}
		}
		for mod, versions := range want {
			list, err := b.List(ctx, mod)
			require.NoError(t, err)
			require.Equal(t, versions, list)
		}
	})
	t.Run("Get", func(t *testing.T) {
		save(mod, ver)
		info, err := b.Info(ctx, mod, ver)
		require.NoError(t, err)
		require.Equal(t, "info", string(info))
		gomod, err := b.GoMod(ctx, mod, ver)
		require.NoError(t, err)
		require.Equal(t, "mod", string(gomod))
		zip, err := b.Zip(ctx, mod, ver)
		require.NoError(t, err)
		require.EqualValues(t, 3, zip.Size())
		data, err := io.ReadAll(zip)
		require.NoError(t, err)
		require.NoError(t, zip.Close())
		require.Equal(t, "zip", string(data))
	})
	t.Run("Exists", func(t *testing.T) {
		save("example.com/prefix", "v1.2.3-pre.1")
		require.True(t, exists("example.com/prefix", "v1.2.3-pre.1"))
		require.False(t, exists("example.com/prefix", "v1.2.3-pre"))
	})
	t.Run("Delete", func(t *testing.T) {
		save("example.com/delete", "delete1")
		require.NoError(t, b.Delete(ctx, "example.com/delete", "delete1"))
		require.False(t, exists("example.com/delete", "delete1"))
	})
}
