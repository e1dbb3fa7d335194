package gcs

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"math"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// watcher is what an operator would look at.
type watcher struct {
	t      *testing.T
	traces *tracetest.InMemoryExporter
	reader *metric.ManualReader
}

// watch sets OpenTelemetry's global providers until the test ends. A Storage is
// seen if it is made after that.
func watch(t *testing.T) watcher {
	w := watcher{t, tracetest.NewInMemoryExporter(), metric.NewManualReader()}
	tracers := sdktrace.NewTracerProvider(sdktrace.WithSyncer(w.traces))
	meters := metric.NewMeterProvider(metric.WithReader(w.reader))
	oldTracers, oldMeters := otel.GetTracerProvider(), otel.GetMeterProvider()
	otel.SetTracerProvider(tracers)
	otel.SetMeterProvider(meters)
	t.Cleanup(func() {
		otel.SetTracerProvider(oldTracers)
		otel.SetMeterProvider(oldMeters)
		tracers.Shutdown(context.Background())
		meters.Shutdown(context.Background())
	})
	return w
}

// spans returns those of this package that have ended since it was last called.
func (w watcher) spans() (spans tracetest.SpanStubs) {
	for _, span := range w.traces.GetSpans() {
		if span.InstrumentationScope.Name == scope {
			spans = append(spans, span)
		}
	}
	w.traces.Reset()
	return spans
}

// measure returns a counter's sum for each outcome or reason, "" for none; of a histogram,
// that of the values, and their number as "count".
func (w watcher) measure(name, unit string) map[string]float64 {
	w.t.Helper()
	var all metricdata.ResourceMetrics
	require.NoError(w.t, w.reader.Collect(context.Background(), &all))
	sums := map[string]float64{}
	for _, s := range all.ScopeMetrics {
		for _, m := range s.Metrics {
			if s.Scope.Name != scope || m.Name != name {
				continue
			}
			require.Equal(w.t, unit, m.Unit)
			require.NotEmpty(w.t, m.Description)
			switch data := m.Data.(type) {
			case metricdata.Sum[int64]:
				for _, p := range data.DataPoints {
					require.True(w.t, data.IsMonotonic)
					outcome, _ := p.Attributes.Value("outcome")
					reason, _ := p.Attributes.Value("reason")
					sums[outcome.AsString()+reason.AsString()] += float64(p.Value)
				}
			case metricdata.Histogram[float64]:
				for _, p := range data.DataPoints {
					sums[""] += p.Sum
					sums["count"] += float64(p.Count)
				}
			}
		}
	}
	return sums
}

func (w watcher) saves() map[string]float64 { return w.measure("gcs.saves", "{save}") }

// waits returns for how many seconds was waited, by how many calls.
func (w watcher) waits() (seconds, calls float64) {
	sums := w.measure("gcs.waits", "s")
	return sums[""], sums["count"]
}

func (w watcher) takeovers() float64 { return w.measure("gcs.takeovers", "{takeover}")[""] }

func (w watcher) renewalsFailed() float64 { return w.measure("gcs.renewals.failed", "{renewal}")[""] }

func TestSpans(t *testing.T) {
	broken := errors.New("broken")
	type call = func(ctx context.Context, s *Storage) error
	of := func(v ModuleVersion, op string) call {
		return func(ctx context.Context, s *Storage) error { return callsOn(s, v)[op](ctx) }
	}
	the := func(op string) call { return of(testVersionName, op) }
	saveOf := func(zip io.Reader) call {
		return func(ctx context.Context, s *Storage) error {
			return s.Save(ctx, testModule, testVersion, nil, zip, nil, nil)
		}
	}
	stashOf := func(vers string, answer error) call {
		return func(ctx context.Context, s *Storage) error {
			_, err := s.SingleFlight(answering("", answer)).Stash(ctx, testModule, vers)
			return err
		}
	}
	stored := func(f *fakeGCS) { storeVersion(f, testModule, testVersion) }
	unlisted := func(f *fakeGCS) { f.Deny("storage.objects.list") }
	module, master, nothing := ModuleVersion{testModule, ""}, ModuleVersion{testModule, "master"}, ModuleVersion{"a//b", ""}
	for _, test := range []struct {
		name    string
		prepare func(f *fakeGCS)
		call    call
		span    string
		on      ModuleVersion
		outcome string
		err     error // that must be recorded
	}{
		{"a new version", nil, the("Save"), "gcs.Save", testVersionName, "stored", nil},
		{"one that exists", stored, the("Save"), "gcs.Save", testVersionName, "existed", nil},
		{"over a part", func(f *fakeGCS) { leave(f, nil, extMod) }, the("Save"), "gcs.Save", testVersionName, "healed", nil},
		{"over leftovers without a .mod", func(f *fakeGCS) { leave(f, nil, extInfo) }, the("Save"), "gcs.Save", testVersionName, "healed", nil},
		{"an unfinished one", leaveUnfinished, the("Save"), "gcs.Save", testVersionName, "finished another's", nil},
		{"a zip that breaks off", nil, saveOf(iotest.ErrReader(broken)), "gcs.Save", testVersionName, "failed", broken},
		{"a nil zip", nil, saveOf(nil), "gcs.Save", testVersionName, "failed", errors.New("nil")},
		{"exists", nil, the("Exists"), "gcs.Exists", testVersionName, "ok", nil},
		{"exists without permission", unlisted, the("Exists"), "gcs.Exists", testVersionName, "failed", errors.New("storage.objects.list")},
		{"info", stored, the("Info"), "gcs.Info", testVersionName, "ok", nil},
		{"no info", nil, the("Info"), "gcs.Info", testVersionName, "not found", nil},
		{"go.mod", stored, the("GoMod"), "gcs.GoMod", testVersionName, "ok", nil},
		{"zip", stored, the("Zip"), "gcs.Zip", testVersionName, "ok", nil},
		{"no zip", nil, the("Zip"), "gcs.Zip", testVersionName, "not found", nil},
		{"list", nil, the("List"), "gcs.List", module, "ok", nil},
		{"list nothing", nil, of(nothing, "List"), "gcs.List", nothing, "failed", errors.New("empty element")},
		{"catalog", nil, the("Catalog"), "gcs.Catalog", ModuleVersion{}, "ok", nil},
		{"delete", stored, the("Delete"), "gcs.Delete", testVersionName, "ok", nil},
		{"delete nothing", nil, the("Delete"), "gcs.Delete", testVersionName, "not found", nil},
		{"a context that has ended", nil, func(ctx context.Context, s *Storage) error {
			return the("Exists")(contextEnds(ctx, 0)[0], s)
		}, "gcs.Exists", testVersionName, "failed", context.Canceled},
		{"stash", nil, stashOf(testVersion, nil), "gcs.Stash", testVersionName, "ok", nil},
		{"stash of what another has saved", nil, stashOf("master", &Error{Kind: KindAlreadyExists, Module: testModule}), "gcs.Stash", master, "ok", nil},
		{"stash that fails", nil, stashOf(testVersion, broken), "gcs.Stash", testVersionName, "failed", broken},
		{"stash of what there is not", nil, stashOf(testVersion, &Error{Kind: KindNotFound, Err: broken}), "gcs.Stash", testVersionName, "not found", nil},
		{"stash of what the file system has not", nil, stashOf("master", errGone), "gcs.Stash", master, "not found", nil},
		{"scan", stored, the("Scan"), "gcs.Scan", module, "ok", nil},
		{"repair", stored, the("Repair"), "gcs.Repair", testVersionName, "ok", nil},
		{"check", nil, the("Check"), "gcs.Check", ModuleVersion{}, "ok", nil},
	} {
		run(t, test.name, inCrowd, func(t *testing.T, f *fakeGCS) {
			w := watch(t)
			s := f.storage("a")
			if test.prepare != nil {
				test.prepare(f)
			}
			ctx, parent := otel.Tracer("test").Start(t.Context(), "request")
			start := time.Now()
			err := test.call(ctx, s)
			took := time.Since(start)
			parent.End()

			spans := w.spans()
			require.Len(t, spans, 1)
			span := spans[0]
			require.Equal(t, test.span, span.Name)
			require.Equal(t, trace.SpanKindClient, span.SpanKind)
			require.Equal(t, parent.SpanContext().SpanID(), span.Parent.SpanID())
			require.Equal(t, took, span.EndTime.Sub(span.StartTime))
			require.ElementsMatch(t, []attribute.KeyValue{
				attribute.String("module", test.on.Module),
				attribute.String("version", test.on.Version),
				attribute.String("outcome", test.outcome),
			}, span.Attributes)
			if test.err == nil {
				require.Equal(t, codes.Unset, span.Status.Code)
				require.Empty(t, span.Events)
				return
			}
			require.ErrorContains(t, err, test.err.Error())
			require.Equal(t, sdktrace.Status{Code: codes.Error, Description: err.Error()}, span.Status)
			require.Len(t, span.Events, 1)
			require.Equal(t, "exception", span.Events[0].Name)
			require.Contains(t, span.Events[0].Attributes, attribute.String("exception.message", err.Error()))
		})
	}
}

// Each caller has a span, and what the first of them caused is below its own.
func TestSpansOfSharedStash(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		w := watch(t)
		a := newReplica(f, &origin{takes: time.Second}, "a")
		together(3, func(int) { requireStash(t, a, testVersion, testVersion) })
		spans := w.spans()
		slices.SortFunc(spans, func(a, b tracetest.SpanStub) int { return strings.Compare(a.Name, b.Name) })
		require.Len(t, spans, 4)
		var stashes []trace.SpanID
		for _, span := range spans[1:] {
			require.Equal(t, "gcs.Stash", span.Name)
			stashes = append(stashes, span.SpanContext.SpanID())
		}
		require.Equal(t, "gcs.Save", spans[0].Name)
		require.Contains(t, stashes, spans[0].Parent.SpanID())
	})
}

func TestSavesByOutcome(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		w := watch(t)
		s := f.storage("a")
		require.Empty(t, w.saves())
		a := contentOf("a", 100)
		want := map[string]float64{}
		counted := func(outcome string, n float64) {
			t.Helper()
			want[outcome] += n
			require.Equal(t, want, w.saves())
		}
		for range 3 {
			require.NoError(t, a.save(t.Context(), s))
			counted(outcomeStored, 1)
			requireKind(t, a.save(t.Context(), s), KindAlreadyExists)
			counted(outcomeExisted, 1)
			f.Remove(objectName(extZip))
			require.NoError(t, a.save(t.Context(), s))
			counted(outcomeHealed, 1)
			leaveUnfinished(f)
			requireKind(t, a.save(t.Context(), s), KindAlreadyExists)
			counted(outcomeFinished, 1)
			require.NoError(t, s.Delete(t.Context(), testModule, testVersion))
			requireKind(t, a.saveFrom(t.Context(), s, iotest.ErrReader(io.ErrUnexpectedEOF)), KindUnexpected)
			require.Error(t, s.Save(t.Context(), "", "", nil, nil, nil, nil))
			counted(outcomeFailed, 2)
		}
		require.Equal(t, []string{"stored", "existed", "healed", "finished another's", "failed"},
			[]string{outcomeStored, outcomeExisted, outcomeHealed, outcomeFinished, outcomeFailed})
	})
}

// The time that a save, and a stash, waits for another is measured, and no other.
func TestWaits(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		w := watch(t)
		a := contentOf("a", 100)
		s := f.storage("a")
		wait := alongside(func() { require.NoError(t, a.saveSlowly(t.Context(), s, 20*time.Second)) })
		time.Sleep(time.Second)
		requireKind(t, a.save(t.Context(), f.storage("b")), KindAlreadyExists)
		wait()
		once, calls := w.waits()
		require.InDelta(t, 19, once, 2)
		require.EqualValues(t, 1, calls)

		require.NoError(t, s.Delete(t.Context(), testModule, testVersion))
		errs, _ := stashAll(t, newFleet(f, &origin{takes: 20 * time.Second}, 3), 0) // two of which wait
		requireNoErrors(t, errs)
		all, calls := w.waits()
		require.InDelta(t, 40, all-once, 5)
		require.EqualValues(t, 3, calls)
		require.Zero(t, w.renewalsFailed())
		require.Zero(t, w.takeovers())
	})
}

// Who waits for longer than 5 seconds says so once. Who takes over says so if the
// holder has crashed, and is counted. A holder that gave up is no reason to.
func TestWaitsAndTakeoversAreLogged(t *testing.T) {
	for _, test := range []struct {
		call, what, ext string
		threshold       time.Duration
	}{
		{"Save", "save", extMod, DefaultStaleThreshold},
		{"Stash new", "save", extMod, DefaultStaleThreshold},
		{"Stash new", "fetch", extClaim, claimStale},
	} {
		ages := map[string]time.Duration{"fresh": 0, "nearly stale": test.threshold - 4*time.Second, "stale": time.Hour}
		for _, left := range []string{"fresh", "nearly stale", "stale", "given up"} {
			run(t, test.call+" behind a "+test.what+" "+left, inCrowd, func(t *testing.T, f *fakeGCS) {
				w := watch(t)
				start, renewed := time.Now(), givenUp
				if age, ok := ages[left]; ok {
					renewed = start.Add(-age)
				}
				f.Put(objectName(test.ext), nil, marked(renewed, "dead"))
				time.Sleep(time.Second)
				log := &syncedLog{}
				require.NoError(t, outageCalls(f.storage("a", log.option()))[test.call](t.Context()))
				waiting := slices.DeleteFunc(log.lines(slog.LevelInfo), func(line string) bool { return !strings.Contains(line, "waiting") })
				about := " module=" + testModule + " version=" + testVersion
				if left == "fresh" {
					require.Len(t, waiting, 1)
					require.Contains(t, waiting[0], `msg="waiting for another `+test.what+`"`+about)
					for what, at := range map[string]time.Duration{"since": time.Second, "renewed": 0, "until": test.threshold} {
						require.Contains(t, waiting[0], start.Add(at).UTC().Format(" "+what+"=2006-01-02T15:04:05"))
					}
				} else {
					require.Empty(t, waiting)
				}
				warnings := log.lines(slog.LevelWarn)
				if left == "given up" {
					require.Empty(t, warnings)
					require.Zero(t, w.takeovers())
					return
				}
				require.Len(t, warnings, 1)
				require.Contains(t, warnings[0], `msg="took over from a `+test.what+` that stopped renewing its marker"`+about+" age=")
				require.EqualValues(t, 1, w.takeovers())
			})
		}
	}
}

func TestRenewalsFailed(t *testing.T) {
	type testCase struct {
		fault fakegcs.Fault
		first int // so many requests, of a save that renews after 30, 60 and 90 seconds
		want  float64
	}
	forNamed(t, inCrowd, map[string]testCase{
		"none": {fakegcs.NoFault, 0, 0}, "all": {fakegcs.Unavailable, 1000, 3}, "all hung": {fakegcs.Hung, 1000, 3},
		"one hung":       {fakegcs.Hung, 1, 0}, // it is made again
		"one hung twice": {fakegcs.Hung, 2, 1}, "one, for a moment": {fakegcs.Unavailable, 1, 0},
	}, func(t *testing.T, f *fakeGCS, test testCase) {
		w := watch(t)
		start := time.Now()
		renews := func(r *fakegcs.Request) bool { return r.Op == "patch" && time.Since(start) < 105*time.Second }
		f.fault(test.fault, first(test.first, renews))
		a := contentOf("a", 100)
		require.NoError(t, a.saveSlowly(t.Context(), f.storage("a"), 110*time.Second))
		requireStored(t, f, a)
		require.Equal(t, test.want, w.renewalsFailed())
	})
}

// A renewal that comes too late because the version was taken over has not
// failed: the holder is fenced, and the log says so.
func TestFencedIsLogged(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		w := watch(t)
		a, b := contentOf("a", 100), contentOf("b", 100)
		log := &syncedLog{}
		wait := alongside(func() {
			requireKind(t, a.saveSlowly(t.Context(), f.storage("a", log.option()), time.Minute), KindAlreadyExists)
		})
		time.Sleep(time.Second)
		require.NoError(t, b.save(t.Context(), ahead(f, "b")))
		wait()
		requireStored(t, f, b)
		require.Len(t, log.lines(slog.LevelWarn), 1)
		require.Contains(t, log.String(), "fenced")
		require.Contains(t, log.String(), "module="+testModule+" version="+testVersion)
		require.Zero(t, w.renewalsFailed())
		require.EqualValues(t, 1, w.takeovers())
		require.Equal(t, map[string]float64{"healed": 1, "existed": 1}, w.saves())
	})
}

// A marker that cannot be given up is worth a warning: the next save waits.
func TestStuckMarkerIsLogged(t *testing.T) {
	inCrowd(t, func(t *testing.T, f *fakeGCS) {
		log := &syncedLog{}
		f.Deny("storage.objects.update")
		s := f.storage("a", log.option())
		requireKind(t, contentOf("a", 100).saveHalf(t.Context(), s, iotest.ErrReader(io.ErrUnexpectedEOF)), KindUnexpected)
		require.Len(t, log.lines(slog.LevelWarn), 3, "two of its request")
		require.Contains(t, log.String(), "could not give a marker up")
		require.Contains(t, log.String(), "module="+testModule+" version="+testVersion)
		require.Contains(t, log.String(), "storage.objects.update")
	})
}

func TestHealedIsLogged(t *testing.T) {
	abandoned := func(f *fakeGCS) { leave(f, marked(givenUp, "other"), extMod) }
	for _, test := range []struct {
		name    string
		prepare func(f *fakeGCS)
		op      string
		kind    int // of its error
		message string
	}{
		{"partial", func(f *fakeGCS) { leave(f, nil, extMod, extInfo) }, "Save", 0, `level=INFO msg="healed a version" module=example.com/mod version=v1.0.0 found=partial`},
		{"abandoned", abandoned, "Save", 0, `level=INFO msg="healed a version" module=example.com/mod version=v1.0.0 found=abandoned`},
		{"unfinished", leaveUnfinished, "Save", KindAlreadyExists, `level=INFO msg="finished another's save" module=example.com/mod version=v1.0.0`},
		{"unfinished", leaveUnfinished, "Exists", 0, `level=INFO msg="finished another's save" module=example.com/mod version=v1.0.0`},
		{"unfinished", leaveUnfinished, "Repair", 0, `level=INFO msg="finished another's save" module=example.com/mod version=v1.0.0`},
		{"abandoned", abandoned, "Repair", 0, `level=INFO msg="removed what was left of a version" module=example.com/mod version=v1.0.0 found=abandoned`},
	} {
		run(t, test.name+", by "+test.op, inBubble, func(t *testing.T, f *fakeGCS) {
			test.prepare(f)
			log := &syncedLog{}
			require.Equal(t, test.kind, Kind(everyCall(f.storage("a", log.option()))[test.op](t.Context())))
			require.Contains(t, log.String(), test.message)
			require.Len(t, log.lines(slog.LevelInfo), 1)
			require.Empty(t, log.lines(slog.LevelWarn))
		})
	}
}

// Where nothing is out of order, nothing is logged, at any level.
func TestNothingIsLogged(t *testing.T) {
	inFleet(t, func(t *testing.T, f *fakeGCS) {
		log := &syncedLog{}
		option := WithLogger(slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})))
		a := contentOf("a", 100)
		s := f.storage("a", option)
		wait := alongside(func() { require.NoError(t, a.saveSlowly(t.Context(), f.storage("slow", option), 4*time.Second)) })
		time.Sleep(time.Second)
		requireKind(t, a.save(t.Context(), s), KindAlreadyExists) // after less than tellAfter
		wait()
		for _, kind := range []int{0, KindNotFound} {
			require.NoError(t, everyCall(s)["Exists"](t.Context()))
			require.NoError(t, everyCall(s)["List"](t.Context()))
			require.Equal(t, kind, Kind(everyCall(s)["Info"](t.Context())))
			require.Equal(t, kind, Kind(everyCall(s)["Delete"](t.Context())))
		}
		requireKind(t, a.saveFrom(t.Context(), s, iotest.ErrReader(io.ErrUnexpectedEOF)), KindUnexpected) // the caller knows
		errs, _ := stashAll(t, newFleet(f, &origin{takes: 4 * time.Second}, 3, option), 0)
		requireNoErrors(t, errs)
		require.Empty(t, log.String())
	})
}

// What is told to nobody costs next to nothing.
func TestSilenceIsCheap(t *testing.T) {
	s := NewStorage(newFakeGCS(t).Machine("a").Bucket, WithLogger(nil))
	allocs := math.Inf(1) // other goroutines only add
	for range 5 {
		allocs = min(allocs, testing.AllocsPerRun(1000, func() {
			_, c := s.begin(t.Context(), "Exists", testVersionName)
			c.close(nil)
		}))
	}
	t.Logf("%v allocations a call", allocs)
	require.LessOrEqual(t, allocs, 7.0) // 6 when another test has set the providers
	require.False(t, s.log.Enabled(t.Context(), slog.LevelError))
}
