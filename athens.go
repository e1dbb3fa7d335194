package gcs

import (
	"context"
	"errors"
	"io"
	"reflect"
)

// A Backend is a [Storage] with the named types of an Athens build, made by
// [Adapt]. It is a storage.Backend, a storage.Checker and a storage.Cataloger
// there; Z is Athens' storage.SizeReadCloser, and P its paths.AllPathParams.
type Backend[Z SizeReadCloser, P ~struct {
	Module  string `json:"module"`
	Version string `json:"version"`
}] struct {
	*Storage
	wrap func(error) error
}

// Adapt makes a Storage the backend of an Athens build:
//
//	gcs.Adapt[storage.SizeReadCloser, paths.AllPathParams](s, errors.E)
//
// with Athens' packages storage, paths and errors. The arguments of newError are
// an operation, such as "gcs.Save", and in any order a kind, an error, and, if
// the error that it returns is a struct with string fields Module and Version, a
// module and a version of these fields' types. The errors of the backend are made
// by it; [Kind], and errors.As to an [*Error], work on them too, if the errors
// that it makes have an Unwrap method.
//
// Z must be an interface type. Adapt makes no request, and shares s.
func Adapt[Z SizeReadCloser, P ~struct {
	Module  string `json:"module"`
	Version string `json:"version"`
}, O ~string](s *Storage, newError func(op O, args ...any) error) *Backend[Z, P] {
	// Athens names the module and the version by types of its own, which this
	// package can only learn from what newError makes of an error.
	sample := structOf(newError("gcs.Adapt", errors.New("sample")))
	named := func(field, value string) []any {
		if value == "" || !sample.IsValid() {
			return nil
		}
		f := fieldOf(sample, field)
		if !f.IsValid() || f.Kind() != reflect.String {
			return nil
		}
		return []any{reflect.ValueOf(value).Convert(f.Type()).Interface()}
	}
	return &Backend[Z, P]{s, func(err error) error {
		var e *Error
		if !errors.As(err, &e) {
			return err // nil, or not of this package
		}
		args := append(named("Module", e.Module), named("Version", e.Version)...)
		return newError(O(e.Op), append(args, e.Kind, err)...)
	}}
}

// Save is [Storage.Save].
func (b *Backend[Z, P]) Save(ctx context.Context, module, version string, mod []byte, zip io.Reader, zipMD5, info []byte) error {
	return b.wrap(b.Storage.Save(ctx, module, version, mod, zip, zipMD5, info))
}

// Exists is [Storage.Exists].
func (b *Backend[Z, P]) Exists(ctx context.Context, module, version string) (bool, error) {
	ok, err := b.Storage.Exists(ctx, module, version)
	return ok, b.wrap(err)
}

// Info is [Storage.Info].
func (b *Backend[Z, P]) Info(ctx context.Context, module, version string) ([]byte, error) {
	data, err := b.Storage.Info(ctx, module, version)
	return data, b.wrap(err)
}

// GoMod is [Storage.GoMod].
func (b *Backend[Z, P]) GoMod(ctx context.Context, module, version string) ([]byte, error) {
	data, err := b.Storage.GoMod(ctx, module, version)
	return data, b.wrap(err)
}

// Zip is [Storage.Zip].
func (b *Backend[Z, P]) Zip(ctx context.Context, module, version string) (zip Z, err error) {
	r, err := b.Storage.Zip(ctx, module, version)
	if err != nil {
		return zip, b.wrap(err)
	}
	return r.(Z), nil
}

// List is [Storage.List].
func (b *Backend[Z, P]) List(ctx context.Context, module string) ([]string, error) {
	list, err := b.Storage.List(ctx, module)
	return list, b.wrap(err)
}

// Delete is [Storage.Delete].
func (b *Backend[Z, P]) Delete(ctx context.Context, module, version string) error {
	return b.wrap(b.Storage.Delete(ctx, module, version))
}

// Catalog is [Storage.Catalog].
func (b *Backend[Z, P]) Catalog(ctx context.Context, token string, pageSize int) ([]P, string, error) {
	page, next, err := b.Storage.Catalog(ctx, token, pageSize)
	if err != nil {
		return nil, "", b.wrap(err)
	}
	params := make([]P, len(page))
	for i, mv := range page {
		params[i] = P(mv)
	}
	return params, next, nil
}

// SingleFlight is [Storage.SingleFlight].
func (b *Backend[Z, P]) SingleFlight(next Stasher) Stasher {
	return adaptedStasher{b.Storage.SingleFlight(next), b.wrap}
}

// adaptedStasher makes the errors of a single flight those of a Backend, and
// leaves those of its next alone.
type adaptedStasher struct {
	Stasher
	wrap func(error) error
}

func (a adaptedStasher) Stash(ctx context.Context, module, vers string) (string, error) {
	saved, err := a.Stasher.Stash(ctx, module, vers)
	if e, ok := err.(*Error); ok && e.Op == "gcs.Stash" {
		err = a.wrap(err)
	}
	return saved, err
}

// structOf is the struct that an error is or points to, or else not valid.
func structOf(err error) reflect.Value {
	v := reflect.Indirect(reflect.ValueOf(err))
	if v.Kind() != reflect.Struct {
		return reflect.Value{}
	}
	return v
}

// fieldOf is a struct's field of that name, or else not valid.
func fieldOf(v reflect.Value, name string) reflect.Value {
	f, ok := v.Type().FieldByName(name)
	if !ok {
		return reflect.Value{}
	}
	// Of an embedded pointer that is nil, FieldByName would panic.
	field, err := v.FieldByIndexErr(f.Index)
	if err != nil {
		return reflect.Value{}
	}
	return field
}

// alreadyExists reports whether KindAlreadyExists is anywhere in an error's tree,
// as an error of this package or in the manner of Athens, and of which version of
// the module, if that is said: the innermost one was the first to know.
func alreadyExists(err error, module string) (version string, ok bool) {
	if err == nil {
		return "", false
	}
	if e, own := err.(*Error); own {
		return e.Version, e.Kind == KindAlreadyExists && (e.Module == "" || e.Module == module)
	}
	var within []error
	switch e := err.(type) {
	case interface{ Unwrap() error }:
		within = []error{e.Unwrap()}
	case interface{ Unwrap() []error }:
		within = e.Unwrap()
	}
	if e := structOf(err); e.IsValid() {
		if f := fieldOf(e, "Kind"); f.IsValid() && f.CanInt() {
			ok = f.Int() == KindAlreadyExists
		}
		if f := fieldOf(e, "Module"); f.IsValid() && f.Kind() == reflect.String && f.Len() > 0 && f.String() != module {
			return "", false // of another module
		}
		if f := fieldOf(e, "Version"); f.IsValid() && f.Kind() == reflect.String {
			version = f.String()
		}
		if f := fieldOf(e, "Err"); within == nil && f.IsValid() && f.CanInterface() {
			inner, _ := f.Interface().(error)
			within = []error{inner}
		}
	}
	for _, err := range within {
		if v, found := alreadyExists(err, module); found {
			ok = true
			if v != "" {
				version = v
			}
		}
	}
	return version, ok
}
