package gcs

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"sync"
	"time"

	"cloud.google.com/go/auth"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"google.golang.org/api/googleapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// requestTimeout is how long a request may go without an answer before it is
	// sent again. Every change is conditional, so the second of two that both
	// arrive is refused.
	requestTimeout = 5 * time.Second
	// retryLimit bounds all tries of a request, the last included, and the wait for
	// the next byte of a stream.
	retryLimit = 5 * time.Minute
	// rateInterval is the least pause after an answer that limits the rate: GCS
	// takes one change of an object a second.
	rateInterval = time.Second
	// warnAfter is how long a request is tried again before the log says so.
	warnAfter = 5 * time.Second
)

var (
	// issuerAnswer finds the status with which a credential's issuer answered.
	issuerAnswer = regexp.MustCompile(`(?:cannot fetch token:|status code:?|compute: Received|exchange token[,;]) (\d{3})`)
	// neverPassing finds in the text of a request without an answer what no further try
	// changes: a certificate, a URL, a credential that its issuer refuses, a key file
	// that cannot be read, a client that is closed. Over gRPC the text is all that is left.
	neverPassing = regexp.MustCompile(`x509: |tls: failed to verify certificate|protocol scheme|too many colons in address|` +
		`(?:auth|oauth2): "(?:invalid|unauthorized|unsupported|access|account|deleted|disabled|admin|org|restricted|consent|interaction)_|` +
		`refresh token is not set|` +
		`parse private key|private key should be|open [^:]+: (?:no such file|permission denied)|client connection is closing`)
	// tokenFailed finds that a token could not be fetched.
	tokenFailed = regexp.MustCompile(`per-RPC creds failed|\b(?:auth|credentials|oauth2|google|impersonate|compute|downscope): `)
	// noAnswer finds the statuses that grpc-go makes itself: a server sends others.
	noAnswer = regexp.MustCompile(`desc = (?:transport|connection|last connection|the connection|closing transport|keepalive|` +
		`error reading|name resolver|stream terminated|server closed|unexpected|malformed|EOF)`)
)

// retryReason returns why a request that failed so is made again, as the counter
// gcs.retries has it, or "" if the failure is final. An answer of GCS decides by its
// code. Without an answer, only what never passes is final: every change is
// conditional, so another try can do no harm.
func retryReason(err error) string {
	if err == nil {
		return ""
	}
	var answer *googleapi.Error
	var issuer *auth.Error
	text, isAnswer := err.Error(), errors.As(err, &answer)
	s, isStatus := status.FromError(err)
	isStatus = isStatus && !noAnswer.MatchString(text)
	switch {
	case isRateLimited(err):
		return "429"
	case hasCode(err, http.StatusConflict, codes.Aborted):
		return "conflict"
	case hasCode(err, http.StatusRequestTimeout, codes.DeadlineExceeded):
		return "timeout"
	case isAbsent(err),
		isAnswer && (answer.Code < 500 || answer.Code == http.StatusNotImplemented),
		isStatus && slices.Contains(finalCodes, s.Code()),
		!isAnswer && neverPasses(text),
		errors.As(err, &issuer) && issuer.Response != nil && slices.Contains([]int{400, 401, 403}, issuer.Response.StatusCode):
		return ""
	case isAnswer, isStatus:
		return "5xx"
	case tokenFailed.MatchString(text):
		return "token"
	}
	return "network"
}

// neverPasses judges the text of a request without an answer. What the text quotes after
// the issuer's status does not count.
func neverPasses(text string) bool {
	if issuer := issuerAnswer.FindStringSubmatch(text); issuer != nil {
		return slices.Contains([]string{"400", "401", "403"}, issuer[1])
	}
	return neverPassing.MatchString(text)
}

// finalCodes are the answers over gRPC after which a request is not made again.
var finalCodes = []codes.Code{codes.InvalidArgument, codes.PermissionDenied, codes.FailedPrecondition,
	codes.OutOfRange, codes.Unimplemented, codes.Unauthenticated}

// do makes a request, and makes it again when it is not answered in time, or fails
// for a reason that may pass, until the context ends or retryLimit has passed. what
// names the request in the log.
func (b *bucket) do(ctx context.Context, what string, timeout time.Duration, request func(context.Context) error) error {
	limited, cancel := context.WithTimeout(ctx, retryLimit)
	defer cancel()
	t := b.newTries(ctx, what)
	defer t.done(false)
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, 10*time.Second) {
		// A server in the same process need not look at the context.
		if err := ctx.Err(); err != nil {
			return err
		}
		tryCtx, cancel := context.WithTimeout(limited, timeout)
		err := request(tryCtx)
		hung := tryCtx.Err() != nil
		cancel()
		if err == nil {
			t.done(true)
			return nil
		}
		reason := retryReason(err)
		switch {
		case ctx.Err() != nil:
			return t.because(err)
		case hung || hasCode(err, 0, codes.DeadlineExceeded):
			// Over gRPC the server knows the deadline too, and can be the first to
			// say that it passed.
			reason, timeout = "timeout", 2*timeout
		case reason == "" && b.insists && !isPreconditionFailed(err) && !isAbsentObject(err):
			reason = "refused"
		case reason == "":
			t.done(isPreconditionFailed(err) || isAbsent(err))
			return withHint(err)
		}
		err = t.failed(err, limited.Err() != nil)
		wait := b.rand(pause)
		if isRateLimited(err) {
			wait += rateInterval
		}
		if sleepErr := sleep(limited, wait); ctx.Err() != nil {
			return t.because(sleepErr)
		} else if sleepErr != nil {
			return fmt.Errorf("no answer, or none but to try again, in %v: %w", retryLimit, err)
		}
		t.again(reason)
	}
}

// tries are those of one request, or of one part of a stream after another. They count
// and tell what is tried again.
type tries struct {
	b    *bucket
	ctx  context.Context
	what string

	mu    sync.Mutex
	start time.Time   // of the first try
	warn  *time.Timer // nil until a try has failed
	told  bool        // a warning
	last  error       // of the last try
}

func (b *bucket) newTries(ctx context.Context, what string) *tries {
	return &tries{b: b, ctx: ctx, what: what, start: time.Now()}
}

// again counts a further try.
func (t *tries) again(reason string) {
	t.b.telemetry.retries.Add(t.ctx, 1, metric.WithAttributes(attribute.String("reason", reason)))
}

// failed notes that a try has failed, and that the request is to be tried again. Of a
// try that was cut because the time is up, it returns what the try before failed with.
func (t *tries) failed(err error, cut bool) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !cut || t.last == nil {
		t.last = err
	}
	if t.warn == nil {
		t.warn = time.AfterFunc(time.Until(t.start.Add(warnAfter)), t.tell)
	}
	return t.last
}

// because adds to the end of a context what the last try failed with, if one has.
func (t *tries) because(ended error) error {
	if t.last == nil {
		return ended
	}
	return fmt.Errorf("%w: %w", ended, t.last)
}

// tell warns of a request that is tried again, and will warn again when it has taken
// twice as long.
func (t *tries) tell() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.warn == nil {
		return // it has just ended
	}
	t.told = true
	t.warn.Reset(time.Since(t.start))
	t.b.log.WarnContext(t.ctx, "a request is tried again", append(t.args(), "error", t.last)...)
}

// done ends the warnings, of a request or of one part of a stream.
func (t *tries) done(answered bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.warn != nil {
		t.warn.Stop()
	}
	if t.told && answered {
		t.b.log.InfoContext(t.ctx, "a request that was tried again is answered", t.args()...)
	}
	t.start, t.warn, t.told = time.Now(), nil, false
}

// args are those of a log line.
func (t *tries) args() []any {
	v, _ := t.ctx.Value(versionKey{}).(ModuleVersion)
	took := time.Since(t.start).Round(time.Millisecond)
	return []any{"request", t.what, "module", v.Module, "version", v.Version, "for", took.String()}
}

// sleep waits for d or until the context ends.
func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
