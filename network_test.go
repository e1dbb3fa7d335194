package gcs

import (
	"context"
	"errors"
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A wire is the way of a machine's requests. What fails returns, if it is an answer or
// an error, is what a request meets.
type wire struct {
	http.RoundTripper
	fails func(*http.Request) (*http.Response, error)
}

func (w wire) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := w.fails(r)
	if resp == nil && err == nil {
		return w.RoundTripper.RoundTrip(r)
	}
	if r.Body != nil {
		r.Body.Close()
	}
	if resp != nil {
		resp.Request = r
	}
	return resp, err
}

// on returns a Storage whose requests go over a wire.
func (f *fakeGCS) on(fails func(*http.Request) (*http.Response, error), opts ...Option) *Storage {
	m := f.Register("wire")
	m.Connect(wire{m, fails})
	return NewStorage(m.Bucket, opts...)
}

// An insistent bucket makes a request again after every failure that may have another
// reason than the object, as long as its context lasts.
func TestInsistent(t *testing.T) {
	v := ModuleVersion{testModule, testVersion}
	fails := func(code int, message string) func() (*http.Response, error) {
		return func() (*http.Response, error) { return answer(code, message), nil }
	}
	for name, test := range map[string]struct {
		fails func() (*http.Response, error)
		again bool
	}{
		"400":          {fails(400, "no"), true},
		"401":          {fails(401, "no"), true},
		"403":          {fails(403, "no"), true},
		"501":          {fails(501, "no"), true},
		"no bucket":    {fails(404, "The specified bucket does not exist."), true},
		"unknown":      {func() (*http.Response, error) { return nil, errors.New("unknown") }, true},
		"no object":    {fails(404, "No such object: modules/m"), false},
		"precondition": {fails(412, "conditionNotMet"), false},
	} {
		run(t, name, withStorage, func(t *testing.T, f *fakeGCS, _ *Storage) {
			storeVersion(f, testModule, testVersion)
			start := time.Now()
			b := f.on(func(*http.Request) (*http.Response, error) {
				if time.Since(start) >= 3*time.Second {
					return nil, nil
				}
				return test.fails()
			}).bucket.insistent()
			attrs, err := b.attrs(within(t, 15*time.Second), v, extMod)
			require.Equal(t, test.again, attrs != nil, "%v", err)
			require.Equal(t, test.again, time.Since(start) >= 3*time.Second)

			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			start = time.Now()
			if _, err = b.attrs(ctx, v, extMod); test.again {
				require.ErrorIs(t, err, context.DeadlineExceeded)
			}
		})
	}
}
