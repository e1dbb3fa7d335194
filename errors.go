package gcs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"cloud.google.com/go/storage"
	"google.golang.org/api/googleapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// The kinds of errors. They are HTTP status codes, and those that Athens uses.
const (
	KindNotFound       = http.StatusNotFound            // there is no such object, or nothing to delete
	KindBadRequest     = http.StatusBadRequest          // the arguments are at fault
	KindUnexpected     = http.StatusInternalServerError // anything else
	KindAlreadyExists  = http.StatusConflict            // the version is complete
	KindRateLimit      = http.StatusTooManyRequests     // GCS limited the rate, and retries did not help
	KindGatewayTimeout = http.StatusGatewayTimeout      // the context's deadline passed
)

// An Error is what every function and method of this package returns when it fails.
type Error struct {
	Op              string // the call, such as "gcs.Save"
	Kind            int    // one of the constants
	Module, Version string // what it was about; Version is empty when it was a whole module, both when it was the bucket
	Err             error  // the cause
}

func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Op)
	if e.Module != "" {
		b.WriteString(": " + e.Module)
	}
	if e.Version != "" {
		b.WriteString("@" + e.Version)
	}
	return fmt.Sprintf("%s: %v", b.String(), e.Err)
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Kind returns the kind of the first [*Error] in err's tree, KindUnexpected when
// there is none, and 0 when err is nil.
func Kind(err error) int {
	var e *Error
	switch {
	case err == nil:
		return 0
	case errors.As(err, &e) && e.Kind != 0:
		return e.Kind
	default:
		return KindUnexpected
	}
}

// Is reports whether err is an error of that kind.
func Is(err error, kind int) bool { return err != nil && Kind(err) == kind }

// A verdict is a cause that decides the kind by itself.
type verdict struct {
	kind int
	error
}

func (v verdict) Unwrap() error { return v.error }

func badRequest(what string, err error) error {
	return verdict{KindBadRequest, fmt.Errorf("the %s %w", what, err)}
}

var (
	errExists   error = verdict{KindAlreadyExists, errors.New("the version is stored already")}
	errFinished error = verdict{KindAlreadyExists, errors.New("the version was stored, but for the last step")}
)

// fail makes the error of a call out of its cause, and nil out of nil.
func fail(ctx context.Context, op string, v version, err error) error {
	if err == nil {
		return nil
	}
	e := &Error{Op: "gcs." + op, Kind: KindUnexpected, Module: v.module, Version: v.version, Err: err}
	var decided verdict
	var read readError
	if errors.As(err, &decided) && !errors.As(err, &read) {
		e.Kind = decided.kind
		return e
	}
	if ended := ctx.Err(); ended != nil {
		// Over gRPC an ended context arrives as a status that does not wrap it.
		if !errors.Is(err, ended) {
			e.Err = fmt.Errorf("%w: %w", ended, err)
		}
		if errors.Is(ended, context.DeadlineExceeded) {
			e.Kind = KindGatewayTimeout
		}
		return e
	}
	if hasCode(err, http.StatusTooManyRequests, codes.ResourceExhausted) {
		e.Kind = KindRateLimit
	}
	return e
}

// hasCode recognises an answer of GCS over either transport.
func hasCode(err error, httpCode int, grpcCode codes.Code) bool {
	var e *googleapi.Error
	if errors.As(err, &e) {
		return e.Code == httpCode
	}
	// Of an error that is no status, status.FromError says Unknown, and of nil OK.
	s, ok := status.FromError(err)
	return ok && err != nil && s.Code() == grpcCode
}

// isRefused reports whether GCS refused the request's precondition. There are
// other reasons for the same answer, and the request may have been applied by an
// earlier try, so whoever gets it reads back before deciding anything.
func isRefused(err error) bool {
	return hasCode(err, http.StatusPreconditionFailed, codes.FailedPrecondition)
}

// isAbsent reports whether the object is not there, or the bucket is not.
func isAbsent(err error) bool { return errors.Is(err, storage.ErrObjectNotExist) }

func isForbidden(err error) bool {
	return hasCode(err, http.StatusForbidden, codes.PermissionDenied)
}

// isTransient reports whether a request may succeed when it is made again. To
// what the client thinks so of, it adds the ends of a connection without an
// answer or in the middle of one, and the conflict with another change of the
// same object at the same moment (https://cloud.google.com/storage/docs/json_api/v1/status-codes#409_Conflict).
func isTransient(err error) bool {
	if hasCode(err, http.StatusNotImplemented, codes.Unimplemented) {
		return false // and will not be, though the client tries on, as with any 5xx
	}
	var syntax *json.SyntaxError
	return storage.ShouldRetry(err) || errors.Is(err, io.EOF) || errors.As(err, &syntax) ||
		hasCode(err, http.StatusConflict, codes.Aborted)
}

// needs names the permission in an error that says it is missing.
func needs(err error, permission string) error {
	// A retention policy refuses with the same code, to whomever.
	if !isForbidden(err) || strings.Contains(err.Error(), "etention") {
		return err
	}
	return fmt.Errorf("the caller needs %s on the bucket, which roles/storage.objectUser holds: %w", permission, err)
}
