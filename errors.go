package gcs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"regexp"
	"strings"

	"cloud.google.com/go/storage"
	"google.golang.org/api/googleapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// The kinds of errors. They are HTTP status codes, and those that Athens uses.
const (
	KindNotFound       = http.StatusNotFound            // the object, the version or the bucket does not exist
	KindBadRequest     = http.StatusBadRequest          // the arguments are at fault
	KindUnexpected     = http.StatusInternalServerError // anything else
	KindAlreadyExists  = http.StatusConflict            // the version is complete
	KindRateLimit      = http.StatusTooManyRequests     // GCS limited the rate, and retries did not help
	KindGatewayTimeout = http.StatusGatewayTimeout      // the context's deadline passed
)

// An Error is the error of a call that failed, or is wrapped in it (see [WithErrors]).
// A Stasher passes other errors on as they are (see [Storage.SingleFlight]).
type Error struct {
	Op              string // the call, such as "gcs.Save"
	Kind            int    // one of the constants
	Module, Version string // Version is empty for a whole module, both are empty for the bucket
	Err             error  // the cause
}

func (e *Error) Error() string {
	what := e.Op
	if e.Module != "" {
		what += ": " + e.Module
	}
	if e.Version != "" {
		what += "@" + e.Version
	}
	return fmt.Sprintf("%s: %v", what, e.Err)
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is makes errors.Is report true for [fs.ErrNotExist] if the kind is
// KindNotFound, and for [fs.ErrExist] if it is KindAlreadyExists.
func (e *Error) Is(target error) bool {
	return e.Kind == KindNotFound && target == fs.ErrNotExist || e.Kind == KindAlreadyExists && target == fs.ErrExist
}

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

// A kindError is a cause that decides the kind by itself.
type kindError struct {
	kind int
	error
}

func (e kindError) Unwrap() error { return e.error }

func badRequest(what string, err error) error {
	return kindError{KindBadRequest, fmt.Errorf("the %s %w", what, err)}
}

// A readError is an error of the caller's reader. It hides the cause from the protocol:
// that may be the error of another save, or an answer to another's request.
type readError struct{ cause error }

func (e readError) Error() string { return "reading the zip: " + e.cause.Error() }

// The ends of a save.
var (
	errExists       error = kindError{KindAlreadyExists, errors.New("the version is stored already")}
	errFinished     error = kindError{KindAlreadyExists, errors.New("the version was stored, but for the last step")}
	errCannotReread       = errors.New("the zip has to be sent again, and cannot be read again")
	// errPanicked stands for the error of a step of a save that has not returned.
	errPanicked = errors.New("the zip's reader panicked")
)

// newError returns the *Error of a call that failed with that cause.
func newError(ctx context.Context, op, module, version string, err error) *Error {
	e := &Error{Op: "gcs." + op, Kind: KindUnexpected, Module: module, Version: version, Err: err}
	var decided kindError
	var read readError
	if errors.As(err, &read) {
		e.Err = fmt.Errorf("reading the zip: %w", read.cause)
	}
	ended := ctx.Err()
	switch {
	case errors.As(err, &decided):
		e.Kind = decided.kind
	case ended != nil:
		// Over gRPC an ended context arrives as a status that does not wrap it.
		if !errors.Is(e.Err, ended) {
			e.Err = fmt.Errorf("%w: %w", ended, e.Err)
		}
		if errors.Is(ended, context.DeadlineExceeded) {
			e.Kind = KindGatewayTimeout
		}
	case isAbsent(err):
		e.Kind = KindNotFound
	case isRateLimited(err):
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

// errChanged is the answer of a second look that differs from the first.
var errChanged = errors.New("the version changes all the while")

// isPreconditionFailed reports whether GCS refused the request's precondition. The same
// answer has other reasons too, and an earlier try may have been applied. So the
// caller reads back before it decides.
func isPreconditionFailed(err error) bool {
	return errors.Is(err, errChanged) || hasCode(err, http.StatusPreconditionFailed, codes.FailedPrecondition)
}

// isAbsent reports whether the object or the bucket does not exist.
func isAbsent(err error) bool {
	return errors.Is(err, storage.ErrObjectNotExist) || errors.Is(err, storage.ErrBucketNotExist) ||
		hasCode(err, http.StatusNotFound, codes.NotFound)
}

// isAbsentObject reports whether the object does not exist, and the bucket does.
func isAbsentObject(err error) bool {
	return isAbsent(err) && !errors.Is(err, storage.ErrBucketNotExist) && !strings.Contains(err.Error(), "bucket does not exist")
}

// isForbidden reports whether GCS refused access, for a reason that does not pass.
func isForbidden(err error) bool {
	return hasCode(err, http.StatusForbidden, codes.PermissionDenied) && !isRateLimited(err)
}

// rateLimited finds the reasons with which GCS limits a caller's rate, beside 429.
var rateLimited = regexp.MustCompile(`(?i)rate_?limit_?exceeded`)

func isRateLimited(err error) bool {
	return hasCode(err, http.StatusTooManyRequests, codes.ResourceExhausted) ||
		hasCode(err, http.StatusForbidden, codes.PermissionDenied) && rateLimited.MatchString(err.Error())
}

var (
	lacksPermission = regexp.MustCompile(`does not have (storage\.objects\.\w+) access`)
	lacksScope      = regexp.MustCompile(`insufficientPermissions|insufficient authentication scopes|ACCESS_TOKEN_SCOPE_INSUFFICIENT`)
)

// withHint adds to an error that refuses access what the caller has to do about it. GCS
// refuses with the same code for many reasons, most of which say so themselves.
func withHint(err error) error {
	if !isForbidden(err) {
		return err
	}
	if lacks := lacksPermission.FindStringSubmatch(err.Error()); lacks != nil {
		return fmt.Errorf("the caller needs %s on the bucket, which roles/storage.objectUser holds: %w", lacks[1], err)
	}
	if lacksScope.MatchString(err.Error()) {
		return fmt.Errorf("the OAuth scopes of the caller's credentials do not permit this, whatever its roles: %w", err)
	}
	return err
}
