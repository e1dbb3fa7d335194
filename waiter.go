package gcs

import (
	"context"
	"time"

	"cloud.google.com/go/storage"
)

// tellAfter is how long a call waits before the log says so.
const tellAfter = 5 * time.Second

// A waiter makes the pauses of one call that waits for another's save or fetch.
type waiter struct {
	s *Storage
	v ModuleVersion

	start time.Time // of the first pause
	told  bool
}

// pause waits until it is worth looking again at the object, whose marker another
// renews. what says in the log what is waited for.
func (w *waiter) pause(ctx context.Context, what string, object *storage.ObjectAttrs, threshold time.Duration) error {
	if w.start.IsZero() {
		w.start = time.Now()
	}
	waited := time.Since(w.start)
	if waited >= tellAfter && !w.told {
		w.told = true
		m, _ := readMarker(object)
		w.s.log.InfoContext(ctx, "waiting for another "+what, "module", w.v.Module, "version", w.v.Version,
			"since", w.start, "renewed", m.renewed, "until", m.renewed.Add(threshold))
	}
	return sleep(ctx, w.s.pollPause(waited))
}

// end records how long the call has waited, if it has.
func (w *waiter) end(ctx context.Context) {
	if !w.start.IsZero() {
		w.s.telemetry.waits.Record(ctx, time.Since(w.start).Seconds())
	}
}

// pollPause returns the pause before the next poll: as long as the wait so far, at
// least 0.1 s. From 1.5 s on it is a tenth of the wait, between 1.6 s and 2 s. It is
// up to a twentieth shorter, at random.
func (s *Storage) pollPause(waited time.Duration) time.Duration {
	pause := max(waited, 100*time.Millisecond)
	if waited > 1500*time.Millisecond {
		pause = min(max(waited/10, 1600*time.Millisecond), 2*time.Second)
	}
	return pause - s.bucket.rand(pause/20)
}

// tellTakeover tells of a marker that was taken over because its holder stopped
// renewing it. A holder that gave its marker up is no reason to tell.
func (s *Storage) tellTakeover(ctx context.Context, v ModuleVersion, what string, from *storage.ObjectAttrs) {
	m, _ := readMarker(from)
	if m.isGivenUp() {
		return
	}
	s.telemetry.takeovers.Add(ctx, 1)
	s.log.WarnContext(ctx, "took over from a "+what+" that stopped renewing its marker",
		"module", v.Module, "version", v.Version, "age", s.now().Sub(m.renewed).Round(time.Millisecond).String())
}
