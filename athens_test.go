package gcs_test

import (
	"bytes"
	"context"
	"crypto/md5"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"cloud.google.com/go/storage"
	"github.com/athensgcs/gcs"
	"github.com/stretchr/testify/require"
	"google.golang.org/api/googleapi"
)

// The contract of Athens, as its packages storage, paths, errors and stash
// declare it.
type (
	athensLister interface {
		List(ctx context.Context, module string) ([]string, error)
	}
	athensGetter interface {
		Info(ctx context.Context, module, vsn string) ([]byte, error)
		GoMod(ctx context.Context, module, vsn string) ([]byte, error)
		Zip(ctx context.Context, module, vsn string) (athensSizeReadCloser, error)
	}
	athensChecker interface {
		Exists(ctx context.Context, module, version string) (bool, error)
	}
	athensSaver interface {
		Save(ctx context.Context, module, version string, mod []byte, zip io.Reader, zipMD5, info []byte) error
	}
	athensDeleter interface {
		Delete(ctx context.Context, module, vsn string) error
	}
	athensBackend interface {
		athensLister
		athensGetter
		athensChecker
		athensSaver
		athensDeleter
	}
	athensCataloger interface {
		Catalog(ctx context.Context, token string, pageSize int) ([]athensAllPathParams, string, error)
	}
	athensSizeReadCloser interface {
		io.ReadCloser
		Size() int64
	}
	athensAllPathParams struct {
		Module  string `json:"module"`
		Version string `json:"version"`
	}

	athensStasher interface {
		Stash(ctx context.Context, mod string, ver string) (string, error)
	}
	athensWrapper func(athensStasher) athensStasher

	athensOp string
	athensM  string
	athensV  string

	athensError struct {
		Kind     int
		Op       athensOp
		Module   athensM
		Version  athensV
		Err      error
		Severity int
	}
)

func (e athensError) Error() string { return e.Err.Error() }
func (e athensError) Unwrap() error { return e.Err }

func athensE(op athensOp, args ...any) error {
	e := athensError{Op: op}
	for _, a := range args {
		switch a := a.(type) {
		case error:
			e.Err = a
		case string:
			e.Err = errors.New(a)
		case int:
			e.Kind = a
		case athensM:
			e.Module = a
		case athensV:
			e.Version = a
		default:
			panic(fmt.Sprintf("errors.E of a %T", a))
		}
	}
	return e
}

func athensKind(err error) int {
	e, ok := err.(athensError)
	switch {
	case !ok:
		return 500
	case e.Kind != 0:
		return e.Kind
	default:
		return athensKind(e.Err)
	}
}

func athensIs(err error, kind int) bool { return err != nil && athensKind(err) == kind }

func athensIsNotFoundErr(err error) bool { return athensKind(err) == 404 }

// athensGCS is the alias that takes the place of Athens' own gcs.Storage.
type athensGCS = gcs.Backend[athensSizeReadCloser, athensAllPathParams]

func adapt(s *gcs.Storage) *athensGCS {
	return gcs.Adapt[athensSizeReadCloser, athensAllPathParams](s, athensE)
}

var (
	_ athensBackend   = (*athensGCS)(nil)
	_ athensChecker   = (*athensGCS)(nil)
	_ athensCataloger = (*athensGCS)(nil)
	_ athensBackend   = adapt(nil)

	_ athensStasher = gcs.Stasher(nil)
	_ gcs.Stasher   = athensStasher(nil)
	_ athensWrapper = func(next athensStasher) athensStasher { return adapt(nil).SingleFlight(next) }

	_ gcs.SizeReadCloser = athensSizeReadCloser(nil)
)

// inAthens runs a test on a backend with a bucket of its own, in virtual time.
func inAthens(t *testing.T, test func(t *testing.T, fake gcs.Fake, b *athensGCS)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		fake := gcs.NewFake(t)
		test(t, fake, adapt(gcs.NewStorage(fake.Bucket("athens"))))
	})
}

func athensSave(t *testing.T, b athensSaver, module, version string) {
	t.Helper()
	zip := module + version
	sum := md5.Sum([]byte(zip))
	require.NoError(t, b.Save(t.Context(), module, version, []byte("module "+module), strings.NewReader(zip), sum[:], []byte("{}")))
}

// Whatever fails, the error is Athens' own, says what it was about, and still
// leads to its cause, also when Athens has wrapped it twice.
func TestAdaptErrors(t *testing.T) {
	const module, version = "example.com/mod", "v1.0.0"
	saveAgain := func(ctx context.Context, b *athensGCS) error {
		return b.Save(ctx, module, version, nil, strings.NewReader(""), nil, nil)
	}
	for _, test := range []struct {
		name            string
		prepare         func(t *testing.T, fake gcs.Fake, b *athensGCS)
		call            func(ctx context.Context, b *athensGCS) error
		timeout         time.Duration // below zero: cancelled
		op              athensOp
		kind            int
		module, version string
		cause           error
		says            string
	}{
		{
			name:    "save what exists",
			prepare: func(t *testing.T, _ gcs.Fake, b *athensGCS) { athensSave(t, b, module, version) },
			call:    saveAgain,
			op:      "gcs.Save", kind: 409, module: module, version: version,
		}, {
			name: "save no zip",
			call: func(ctx context.Context, b *athensGCS) error {
				return b.Save(ctx, module, version, nil, nil, nil, nil)
			},
			op: "gcs.Save", kind: 400, module: module, version: version,
		}, {
			name: "save no module",
			call: func(ctx context.Context, b *athensGCS) error {
				return b.Save(ctx, "", version, nil, strings.NewReader(""), nil, nil)
			},
			op: "gcs.Save", kind: 400, version: version,
		}, {
			name: "save a zip that breaks off",
			call: func(ctx context.Context, b *athensGCS) error {
				return b.Save(ctx, module, version, nil, brokenZip{}, nil, nil)
			},
			op: "gcs.Save", kind: 500, module: module, version: version, cause: io.ErrUnexpectedEOF,
		}, {
			name:    "save when cancelled",
			call:    saveAgain,
			timeout: -1,
			op:      "gcs.Save", kind: 500, module: module, version: version, cause: context.Canceled,
		}, {
			name:    "save too late",
			call:    saveAgain,
			timeout: time.Millisecond,
			op:      "gcs.Save", kind: 504, module: module, version: version, cause: context.DeadlineExceeded,
		}, {
			name:    "save without permission",
			prepare: func(t *testing.T, fake gcs.Fake, _ *athensGCS) { fake.Deny("storage.objects.create") },
			call:    saveAgain,
			op:      "gcs.Save", kind: 500, module: module, version: version, says: "storage.objects.create",
		}, {
			name: "no info",
			call: func(ctx context.Context, b *athensGCS) error { _, err := b.Info(ctx, module, version); return err },
			op:   "gcs.Info", kind: 404, module: module, version: version, cause: storage.ErrObjectNotExist,
		}, {
			name: "no go.mod",
			call: func(ctx context.Context, b *athensGCS) error { _, err := b.GoMod(ctx, module, version); return err },
			op:   "gcs.GoMod", kind: 404, module: module, version: version, cause: storage.ErrObjectNotExist,
		}, {
			name: "no zip",
			call: func(ctx context.Context, b *athensGCS) error {
				zip, err := b.Zip(ctx, module, version)
				if zip != nil {
					return errors.New("a zip beside the error")
				}
				return err
			},
			op: "gcs.Zip", kind: 404, module: module, version: version, cause: storage.ErrObjectNotExist,
		}, {
			name: "nothing to delete",
			call: func(ctx context.Context, b *athensGCS) error { return b.Delete(ctx, module, version) },
			op:   "gcs.Delete", kind: 404, module: module, version: version,
		}, {
			name:    "exists without permission",
			prepare: func(t *testing.T, fake gcs.Fake, _ *athensGCS) { fake.Deny("storage.objects.list") },
			call:    func(ctx context.Context, b *athensGCS) error { _, err := b.Exists(ctx, module, version); return err },
			op:      "gcs.Exists", kind: 500, module: module, version: version, says: "storage.objects.list",
		}, {
			name:    "exists above the rate limit",
			prepare: func(t *testing.T, fake gcs.Fake, _ *athensGCS) { fake.Limit() },
			call:    func(ctx context.Context, b *athensGCS) error { _, err := b.Exists(ctx, module, version); return err },
			op:      "gcs.Exists", kind: 429, module: module, version: version,
		}, {
			name: "list no module",
			call: func(ctx context.Context, b *athensGCS) error { _, err := b.List(ctx, "a//b"); return err },
			op:   "gcs.List", kind: 400, module: "a//b",
		}, {
			name: "catalog from nowhere",
			call: func(ctx context.Context, b *athensGCS) error { _, _, err := b.Catalog(ctx, "nowhere", 1); return err },
			op:   "gcs.Catalog", kind: 400,
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fake := gcs.NewFake(t)
				bucket := fake.Bucket("athens").Retryer(storage.WithMaxAttempts(2))
				b := adapt(gcs.NewStorage(bucket))
				if test.prepare != nil {
					test.prepare(t, fake, b)
				}
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if test.timeout < 0 {
					cancel()
				} else if test.timeout > 0 {
					ctx, cancel = context.WithTimeout(ctx, test.timeout)
					defer cancel()
				}
				err := test.call(ctx, b)
				require.IsType(t, athensError{}, err)
				e := err.(athensError)
				require.Equal(t, test.op, e.Op)
				require.Equal(t, test.module, string(e.Module))
				require.Equal(t, test.version, string(e.Version))
				require.Equal(t, test.kind, e.Kind, "%v", err)
				require.ErrorContains(t, err, test.says)

				err = athensE("storage.With", athensE("stash.Pool", err))
				require.True(t, athensIs(err, test.kind), "%v", err)
				require.Equal(t, test.kind == 404, athensIsNotFoundErr(err))
				require.Equal(t, test.kind, gcs.Kind(err))
				var own *gcs.Error
				require.ErrorAs(t, err, &own)
				require.Equal(t, test.module, own.Module)
				require.Equal(t, test.version, own.Version)
				if test.cause != nil {
					require.ErrorIs(t, err, test.cause)
				}
				if test.says != "" || test.kind == 429 {
					var answer *googleapi.Error
					require.ErrorAs(t, err, &answer)
				}
			})
		})
	}
}

type brokenZip struct{}

func (brokenZip) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

// Errors that say less than those of Athens, or say it otherwise, will do.
func TestAdaptOtherErrors(t *testing.T) {
	type said struct {
		op   string
		args []any
	}
	var last said
	for _, test := range []struct {
		name     string
		newError func(op string, args ...any) error
		names    []any // how the arguments name the module and the version
		causes   bool  // whether the error leads to its cause
	}{
		{"one for all", func(string, ...any) error { return errors.New("failed") }, nil, false},
		{"one that wraps", func(op string, args ...any) error {
			for _, a := range args {
				if err, ok := a.(error); ok {
					return fmt.Errorf("%s: %w", op, err)
				}
			}
			return errors.New(op)
		}, nil, true},
		{"a pointer to a struct", func(op string, args ...any) error {
			e := &pointerError{}
			for _, a := range args {
				if err, ok := a.(error); ok {
					e.error = err
				}
			}
			return e
		}, []any{athensM("example.com/mod"), athensV("v1.0.0")}, true},
		{"a nil pointer", func(string, ...any) error { return (*pointerError)(nil) }, nil, false},
		{"other fields", func(string, ...any) error { return otherError{} }, []any{athensV("v1.0.0")}, false},
		{"no struct", func(string, ...any) error { return wordError("failed") }, nil, false},
		{"nothing", func(string, ...any) error { return nil }, nil, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := gcs.NewStorage(gcs.NewFake(t).Bucket("a"))
				b := gcs.Adapt[athensSizeReadCloser, athensAllPathParams](s, func(op string, args ...any) error {
					last = said{op, args}
					return test.newError(op, args...)
				})
				ok, err := b.Exists(t.Context(), "example.com/mod", "v1.0.0")
				require.NoError(t, err)
				require.False(t, ok)

				_, err = b.Info(t.Context(), "example.com/mod", "v1.0.0")
				require.IsType(t, test.newError("op", errors.New("sample")), err)
				require.Equal(t, "gcs.Info", last.op)
				var names []any
				for _, a := range last.args {
					switch a := a.(type) {
					case int:
						require.Equal(t, gcs.KindNotFound, a)
					case error:
						require.ErrorIs(t, a, storage.ErrObjectNotExist)
					default:
						names = append(names, a)
					}
				}
				require.Equal(t, test.names, names)
				require.Len(t, last.args, len(names)+2)
				if test.causes {
					require.Equal(t, gcs.KindNotFound, gcs.Kind(err))
				}
			})
		})
	}
}

type pointerError struct {
	error
	Module  athensM
	Version athensV
}

func (e *pointerError) Unwrap() error { return e.error }

type otherError struct {
	Module  int
	Version athensV
}

func (otherError) Error() string { return "failed" }

type wordError string

func (w wordError) Error() string { return string(w) }

// No error is a nil interface, and nothing that is made of a nil error.
func TestAdaptNoErrors(t *testing.T) {
	inAthens(t, func(t *testing.T, fake gcs.Fake, _ *athensGCS) {
		b := gcs.Adapt[athensSizeReadCloser, athensAllPathParams](gcs.NewStorage(fake.Bucket("b")),
			func(op athensOp, args ...any) error {
				require.Equal(t, athensOp("gcs.Adapt"), op, "an error of %v", args)
				return athensE(op, args...)
			})
		const module, version = "example.com/mod", "v1.0.0"
		ctx := t.Context()
		athensSave(t, b, module, version)
		_, err := b.Exists(ctx, module, version)
		require.True(t, err == nil)
		_, err = b.Info(ctx, module, version)
		require.True(t, err == nil)
		_, err = b.GoMod(ctx, module, version)
		require.True(t, err == nil)
		zip, err := b.Zip(ctx, module, version)
		require.True(t, err == nil)
		require.NoError(t, zip.Close())
		_, err = b.List(ctx, module)
		require.True(t, err == nil)
		_, _, err = b.Catalog(ctx, "", 0)
		require.True(t, err == nil)
		require.True(t, b.Delete(ctx, module, version) == nil)
		require.True(t, b.Close() == nil)
	})
}

// Athens' GCS single flight asserts the type of the backend that it was given,
// and sets its threshold.
func TestAdaptStaleThreshold(t *testing.T) {
	inAthens(t, func(t *testing.T, fake gcs.Fake, b *athensGCS) {
		var backend athensBackend = b
		type Storage = gcs.Backend[athensSizeReadCloser, athensAllPathParams]
		s, ok := backend.(*Storage)
		require.True(t, ok)
		s.SetStaleThreshold(10 * time.Second)

		w := fake.Bucket("dead").Object("example.com/mod/@v/v1.0.0.mod").
			If(storage.Conditions{DoesNotExist: true}).NewWriter(t.Context())
		w.Metadata = map[string]string{"in-progress": time.Now().UTC().Format(time.RFC3339Nano)}
		require.NoError(t, w.Close())
		start := time.Now()
		athensSave(t, backend, "example.com/mod", "v1.0.0")
		require.InDelta(t, 11, time.Since(start).Seconds(), 1.5)
	})
}

// An adapted backend gives the Storage's single flight to Athens.
func TestAdaptSingleFlight(t *testing.T) {
	inAthens(t, func(t *testing.T, fake gcs.Fake, b *athensGCS) {
		const module, pseudo = "example.com/mod", "v0.0.0-20260102150405-0123456789ab"
		var wrap athensWrapper = func(next athensStasher) athensStasher { return b.SingleFlight(next) }
		stasher := wrap(stashFunc(func(ctx context.Context, module, query string) (string, error) {
			zip := strings.NewReader("")
			if err := b.Save(ctx, module, pseudo, nil, zip, nil, nil); err != nil {
				return "", athensE("stasher.Stash", athensE("storage.Save", err))
			}
			return pseudo, nil
		}))
		for range 2 { // the second finds the version stored
			saved, err := stasher.Stash(t.Context(), module, "master")
			require.NoError(t, err)
			require.Equal(t, pseudo, saved)
		}
	})
}

// What the single flight itself has to say is Athens' too, and what its next
// says is left alone.
func TestAdaptSingleFlightErrors(t *testing.T) {
	inAthens(t, func(t *testing.T, fake gcs.Fake, b *athensGCS) {
		said := athensE("stasher.Stash", athensE("vcs.Get", "no such repository", 404))
		stasher := b.SingleFlight(stashFunc(func(ctx context.Context, module, _ string) (string, error) {
			if module == "gone" {
				return "", said
			}
			<-ctx.Done()
			return "", ctx.Err()
		}))
		_, err := stasher.Stash(t.Context(), "gone", "v1.0.0")
		require.True(t, err == said)

		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, err = stasher.Stash(ctx, "slow", "v1.0.0")
		require.True(t, athensIs(err, 504), "%v", err)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		time.Sleep(time.Second) // until the claim is deleted

		_, err = stasher.Stash(t.Context(), "a//b", "v1.0.0")
		require.True(t, athensIs(err, 400), "%v", err)
		e := err.(athensError)
		require.Equal(t, athensM("a//b"), e.Module)
		require.Equal(t, athensV("v1.0.0"), e.Version)
	})
}

type stashFunc func(ctx context.Context, module, version string) (string, error)

func (f stashFunc) Stash(ctx context.Context, module, version string) (string, error) {
	return f(ctx, module, version)
}

// TestAthensCompliance asks of the backend what Athens asks of all of its own.
func TestAthensCompliance(t *testing.T) {
	info, mod, zip := []byte(`{"Version":"v1.0.0"}`), []byte("module a\n"), []byte("not much of a zip")
	// Athens' suite passes this as an MD5, which it is not.
	sum := []byte("123456789abcdefghij")[:19]
	store := func(t *testing.T, b athensBackend, module, version string) {
		t.Helper()
		require.NoError(t, b.Save(t.Context(), module, version, mod, bytes.NewReader(zip), sum, info))
	}
	exists := func(t *testing.T, b athensBackend, module, version string) bool {
		t.Helper()
		ok, err := b.Exists(t.Context(), module, version)
		require.NoError(t, err)
		return ok
	}
	for _, test := range []struct {
		name string
		run  func(t *testing.T, b *athensGCS)
	}{
		{"not found", func(t *testing.T, b *athensGCS) {
			const module, version = "github.com/gomods/athens", "yyy"
			for range 2 {
				require.False(t, exists(t, b, module, version))
				_, err := b.Info(t.Context(), module, version)
				require.True(t, athensIsNotFoundErr(err), "%v", err)
				_, err = b.GoMod(t.Context(), module, version)
				require.True(t, athensIsNotFoundErr(err), "%v", err)
				_, err = b.Zip(t.Context(), module, version)
				require.True(t, athensIsNotFoundErr(err), "%v", err)
				require.True(t, athensIsNotFoundErr(b.Delete(t.Context(), module, version)))
				list, err := b.List(t.Context(), module)
				require.NoError(t, err)
				require.Empty(t, list)
				store(t, b, module, "xxx") // another version changes nothing
				require.NoError(t, b.Delete(t.Context(), module, "xxx"))
			}
		}},
		{"list", func(t *testing.T, b *athensGCS) {
			const module = "github.com/gomods/athens/benchListModule"
			versions := []string{"1.0.1", "v1.0.2", "v1.1.0-pre", "v1.1.0", "yyy"}
			for _, version := range versions {
				store(t, b, module, version)
				store(t, b, module+"2", version+"0")
				store(t, b, module+"/v2", "v2.0.0")
				require.NoError(t, b.Delete(t.Context(), module+"/v2", "v2.0.0"))
			}
			store(t, b, "github.com/gomods/athens", "v3.0.0")
			list, err := b.List(t.Context(), module)
			require.NoError(t, err)
			require.ElementsMatch(t, versions, list)
			require.NoError(t, b.Delete(t.Context(), module, "yyy"))
			list, err = b.List(t.Context(), module)
			require.NoError(t, err)
			require.ElementsMatch(t, versions[:4], list)
		}},
		{"get", func(t *testing.T, b *athensGCS) {
			for _, version := range []string{"v1.2.3", "1.0.1", "yyy", "v2.0.0+incompatible"} {
				const module = "github.com/Gomods/getTestModule"
				store(t, b, module, version)
				got, err := b.Info(t.Context(), module, version)
				require.NoError(t, err)
				require.Equal(t, info, got)
				got, err = b.GoMod(t.Context(), module, version)
				require.NoError(t, err)
				require.Equal(t, mod, got)
				r, err := b.Zip(t.Context(), module, version)
				require.NoError(t, err)
				require.EqualValues(t, len(zip), r.Size())
				got, err = io.ReadAll(r)
				require.NoError(t, err)
				require.NoError(t, r.Close())
				require.Equal(t, zip, got)
			}
		}},
		{"exists", func(t *testing.T, b *athensGCS) {
			const module = "github.com/gomods/shouldExist"
			store(t, b, module, "v1.0.0")
			require.True(t, exists(t, b, module, "v1.0.0"))
			require.False(t, exists(t, b, module, "v1.0.1"))
			require.False(t, exists(t, b, module, "v1.0"))
			require.False(t, exists(t, b, module+"s", "v1.0.0"))
			require.False(t, exists(t, b, "github.com/gomods", "v1.0.0"))
		}},
		{"save again", func(t *testing.T, b *athensGCS) {
			store(t, b, "exists", "v1.0.0")
			err := b.Save(t.Context(), "exists", "v1.0.0", []byte("other"), strings.NewReader("other"), sum, []byte("other"))
			require.True(t, athensIs(err, 409), "%v", err)
			got, err := b.GoMod(t.Context(), "exists", "v1.0.0")
			require.NoError(t, err)
			require.Equal(t, mod, got)
		}},
		{"delete", func(t *testing.T, b *athensGCS) {
			const module, version = "deleteModule", "delete123"
			require.True(t, athensIsNotFoundErr(b.Delete(t.Context(), module, version)))
			store(t, b, module, version)
			store(t, b, module, version+"4")
			require.NoError(t, b.Delete(t.Context(), module, version))
			require.False(t, exists(t, b, module, version))
			_, err := b.Zip(t.Context(), module, version)
			require.True(t, athensIsNotFoundErr(err), "%v", err)
			require.True(t, athensIsNotFoundErr(b.Delete(t.Context(), module, version)))
			require.True(t, exists(t, b, module, version+"4"))
			store(t, b, module, version)
			require.True(t, exists(t, b, module, version))
		}},
		{"catalog", func(t *testing.T, b *athensGCS) {
			all, next, err := b.Catalog(t.Context(), "", 2)
			require.NoError(t, err)
			require.Empty(t, all)
			require.Empty(t, next)
			var want []athensAllPathParams
			for i := range 7 {
				p := athensAllPathParams{Module: fmt.Sprintf("github.com/gomods/catalog%d", i/3), Version: fmt.Sprintf("v1.2.%d", i)}
				store(t, b, p.Module, p.Version)
				want = append(want, p)
			}
			for pageSize := range 9 {
				var got []athensAllPathParams
				pages := 0
				for token := ""; ; pages++ {
					page, next, err := b.Catalog(t.Context(), token, pageSize)
					require.NoError(t, err)
					if pageSize > 0 {
						require.LessOrEqual(t, len(page), pageSize)
					}
					got = append(got, page...)
					if token = next; token == "" {
						break
					}
				}
				require.ElementsMatch(t, want, got)
				if pageSize > 0 {
					require.Equal(t, (len(want)-1)/pageSize, pages)
				}
			}
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			inAthens(t, func(t *testing.T, _ gcs.Fake, b *athensGCS) { test.run(t, b) })
		})
	}
}
