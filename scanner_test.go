package gcs

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"path"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// files are the metadata of a version's objects, by their endings.
type files map[string]map[string]string

// A stateCase is one way in which a version can be left.
type stateCase struct {
	name  string
	files files
	state State
	looks int // whether Scan lists the version once more

	repaired State
	requests int // of Repair
}

// bubbleStart is when the time of every bubble starts.
var bubbleStart = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

// stateCases covers the table of states in the package comment.
var stateCases = func() []stateCase {
	at := func(ago time.Duration, id string) map[string]string { return marked(bubbleStart.Add(-ago), id) }
	of := func(id string) map[string]string { return map[string]string{keySaveID: id} }
	copied := map[string]string{keySaveID: "a", keyGeneration: "1"}
	failed := marked(givenUp, "a")
	return []stateCase{
		{"claimed", files{extClaim: at(time.Second, "c")}, Absent, 0, Absent, 1},
		{"claimed by a dead one", files{extClaim: at(time.Minute, "c")}, Absent, 0, Absent, 2},
		{"claimed by a clock that is ahead", files{extClaim: at(-time.Hour, "c")}, Absent, 0, Absent, 1},
		{"claimed without a marker", files{extClaim: nil}, Absent, 0, Absent, 2},
		{".info", files{extInfo: nil}, Partial, 1, Absent, 4},
		{".mod", files{extMod: nil}, Partial, 1, Absent, 3},
		{".zip", files{extZip: nil}, Partial, 1, Absent, 4},
		{".info and .mod", files{extInfo: nil, extMod: nil}, Partial, 1, Absent, 4},
		{".info and .zip", files{extInfo: nil, extZip: nil}, Partial, 1, Absent, 5},
		{".mod and .zip", files{extMod: nil, extZip: nil}, Partial, 1, Absent, 4},
		{"begun", files{extMod: at(time.Second, "a")}, InProgress, 0, InProgress, 1},
		{"begun and claimed", files{extMod: at(time.Second, "a"), extClaim: at(time.Minute, "c")}, InProgress, 0, InProgress, 2},
		{"uploaded", files{extInfo: of("a"), extMod: at(time.Second, "a"), extZip: of("a")}, InProgress, 0, InProgress, 1},
		{"abandoned", files{extMod: at(time.Hour, "a")}, Abandoned, 1, Absent, 3},
		{"abandoned without .zip", files{extInfo: of("a"), extMod: at(time.Hour, "a")}, Abandoned, 1, Absent, 4},
		{"abandoned over another's .zip", files{extInfo: of("a"), extMod: at(time.Hour, "a"), extZip: of("b")}, Abandoned, 1, Absent, 5},
		{"abandoned over an own .info", files{extInfo: copied, extMod: at(time.Hour, "a"), extZip: of("a")}, Abandoned, 1, Absent, 5},
		{"given up", files{extInfo: of("a"), extMod: failed}, Abandoned, 1, Absent, 4},
		{"given up and claimed", files{extMod: failed, extClaim: at(time.Minute, "c")}, Abandoned, 1, Absent, 4},
		{"unfinished", files{extInfo: of("a"), extMod: at(time.Hour, "a"), extZip: of("a")}, Unfinished, 0, Complete, 2},
		{"unfinished and given up", files{extInfo: of("a"), extMod: failed, extZip: of("a")}, Unfinished, 0, Complete, 2},
		{"unfinished of an older Athens", files{extInfo: nil, extMod: map[string]string{keyInProgressOld: "true"}, extZip: nil}, Unfinished, 0, Complete, 2},
		{"complete", files{extInfo: nil, extMod: nil, extZip: nil}, Complete, 0, Complete, 1},
		{"complete of one save", files{extInfo: of("a"), extMod: of("a"), extZip: of("a")}, Complete, 0, Complete, 1},
		{"complete, empty marker", files{extInfo: of("a"), extMod: cleared(), extZip: of("a")}, Complete, 0, Complete, 1},
		{"complete and claimed", files{extInfo: nil, extMod: nil, extZip: nil, extClaim: at(time.Minute, "c")}, Complete, 0, Complete, 2},
		{"complete and claimed anew", files{extInfo: nil, extMod: nil, extZip: nil, extClaim: at(time.Second, "c")}, Complete, 0, Complete, 1},
		{"copied", files{extInfo: copied, extMod: of("a"), extZip: copied}, Complete, 1, Complete, 2},
	}
}()

func (c stateCase) String() string { return c.name }

// ages are how long ago a case's objects were created.
var ages = map[string]time.Duration{extInfo: 2 * time.Hour, extMod: 3 * time.Hour, extZip: time.Hour, extClaim: 0}

// put makes the objects of a case.
func (c stateCase) put(f *fakeGCS, v ModuleVersion) {
	for ext, metadata := range c.files {
		f.PutAt(v.object(ext), []byte(ext), metadata, time.Now().Add(-ages[ext]))
	}
}

// status is what Scan says of a case.
func (c stateCase) status(v ModuleVersion) VersionStatus {
	status := VersionStatus{ModuleVersion: v, State: c.state}
	var updated []time.Time
	for _, ext := range allExts {
		if _, ok := c.files[ext]; !ok {
			status.Missing = append(status.Missing, ext)
			continue
		}
		status.Size += int64(len(ext))
		updated = append(updated, time.Now().Add(-ages[ext]).UTC())
	}
	if updated != nil {
		status.Updated = slices.MaxFunc(updated, time.Time.Compare)
	}
	status.Renewed, _ = time.Parse(time.RFC3339Nano, c.files[extMod][keyInProgress])
	if c.files[extMod][keyInProgressOld] != "" {
		status.Renewed = time.Now().Add(-ages[extMod]).UTC()
	}
	if marker, ok := c.files[extClaim]; ok {
		status.Claimed = givenUp
		if renewed, err := time.Parse(time.RFC3339Nano, marker[keyInProgress]); err == nil {
			status.Claimed = slices.MinFunc([]time.Time{renewed, time.Now().UTC()}, time.Time.Compare) // the latter by the clock of GCS
		}
	}
	return status
}

// scanned returns what a scan yields, with all times in UTC.
func scanned(t *testing.T, s *Storage, module string) (all []VersionStatus) {
	t.Helper()
	for status, err := range s.Scan(t.Context(), module) {
		require.NoError(t, err)
		for _, at := range []*time.Time{&status.Renewed, &status.Updated, &status.Claimed} {
			*at = at.UTC()
		}
		all = append(all, status)
	}
	return all
}

// Scan tells of every state, in the order of the names, and changes nothing, also
// if it may change nothing.
func TestScanStates(t *testing.T) {
	for _, test := range []struct {
		name, module string
		short        bool
	}{
		{"of a module", testModule, false}, {"of the bucket", "", false},
		{"of a module in pages of one object", testModule, true}, {"of the bucket in pages of one object", "", true},
	} {
		run(t, test.name, withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
			f.Deny("storage.objects.update", "storage.objects.delete", "storage.objects.create")
			requests := 2
			if test.short {
				f.SetPages(1)
				requests = 0
			}
			var want []VersionStatus
			for i, c := range stateCases {
				v := ModuleVersion{testModule, fmt.Sprintf("v1.%02d.0", i)}
				c.put(f, v)
				want = append(want, c.status(v))
				if test.short {
					requests += len(c.files) * (1 + c.looks)
				}
			}
			before := f.Objects()
			got := scanned(t, s, test.module)
			require.Len(t, got, len(want))
			for i, c := range stateCases {
				require.Equal(t, want[i], got[i], c.name)
			}
			require.Len(t, f.Log(), requests)
			require.Equal(t, before, f.Objects())
		})
	}
}

func TestScan(t *testing.T) {
	// Scan knows nothing of other objects and, for one module, of other modules. Of
	// versions whose names interleave it tells in the order of their zips.
	run(t, "others", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		for _, name := range []string{"README", testModule + "/@v/list", testModule + "/@v/v1.txt", testModule + "/@latest", "a/@v/b/v1.zip"} {
			f.Put(name, nil, nil)
		}
		storeVersion(f, testModule, "v1", "v1.j", "v1.zz")
		storeVersion(f, testModule+"/v2", "v2.0.0")
		storeVersion(f, testModule+"-other", "v1.0.0")
		names := func(module string) (names []string) {
			for _, status := range scanned(t, s, module) {
				names = append(names, status.Module+"@"+status.Version)
			}
			return names
		}
		own := []string{testModule + "@v1.j", testModule + "@v1", testModule + "@v1.zz"}
		require.Equal(t, own, names(testModule))
		require.Empty(t, names("example.com/none"))
		require.Equal(t, slices.Concat([]string{testModule + "-other@v1.0.0"}, own, []string{testModule + "/v2@v2.0.0"}), names(""))
		require.Len(t, f.Log(), 3)
	})

	// Scan makes no request for what its caller does not want any more.
	run(t, "stops", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		storeFiles(f, testModule, "v1.0.0", extInfo)
		storeFiles(f, testModule, "v2.0.0", extInfo)
		s.Scan(t.Context(), "")(func(VersionStatus, error) bool { return false })
		require.Len(t, f.Log(), 2)
		synctest.Wait()
		requireNothingInFlight(t, f)
	})

	// A version that is deleted between its page and the look at it is not yielded.
	run(t, "deleted", withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
		storeFiles(f, testModule, testVersion, extInfo)
		f.after(first(1, on("", "list", "")), func() { f.Remove(objectName(extInfo)) })
		require.Empty(t, scanned(t, s, testModule))
	})
}

// What differs when it is listed once more is listed again, but not for ever.
func TestScanOfChanging(t *testing.T) {
	touch := func(f *fakeGCS) {
		f.SetMetadata(objectName(extMod), map[string]string{keySaveID: fmt.Sprint(len(f.Log()))})
	}
	copied := map[string]string{keyGeneration: "1"}
	for name, c := range map[string]struct {
		found    files
		change   func(f *fakeGCS)
		times    int
		want     []State
		scanned  int // requests of Scan
		complete bool
		listed   int // requests of List
	}{
		"stored":          {files{extMod: nil}, func(f *fakeGCS) { storeVersion(f, testModule, testVersion) }, 1, []State{Complete}, 2, false, 1},
		"taken over":      {files{extMod: nil}, func(f *fakeGCS) { takeOver(f, testVersion) }, 1, []State{InProgress}, 2, false, 1},
		"partial again":   {files{extMod: nil}, touch, 1, []State{Partial}, 3, false, 1},
		"deleted":         {files{extMod: nil}, func(f *fakeGCS) { removeVersion(f, testVersionName) }, 1, nil, 2, false, 1},
		"partial anew":    {files{extMod: nil}, touch, 99, []State{Partial}, 1 + maxLooks, false, 1},
		"copied, touched": {files{extInfo: copied, extMod: nil, extZip: copied}, touch, 1, []State{Complete}, 3, true, 3},
		"copied, again":   {files{extInfo: copied, extMod: nil, extZip: copied}, touch, 99, []State{Partial}, 1 + maxLooks, false, 1 + maxLooks},
		"copied, deleted": {files{extInfo: copied, extMod: nil, extZip: copied}, func(f *fakeGCS) { f.Remove(objectName(extMod)) }, 1, []State{Partial}, 3, false, 2},
	} {
		t.Run(name, func(t *testing.T) {
			for _, call := range []string{"Scan", "List"} {
				withStorage(t, func(t *testing.T, f *fakeGCS, s *Storage) {
					stateCase{files: c.found}.put(f, testVersionName)
					f.before(func(r *fakegcs.Request) bool { return r.N > 0 && r.N <= c.times }, func() { c.change(f) })
					if call == "List" {
						requireList(t, s, testModule, map[bool][]string{true: {testVersion}}[c.complete]...)
						require.Len(t, f.Log(), c.listed)
						return
					}
					var got []State
					for _, status := range scanned(t, s, testModule) {
						got = append(got, status.State)
					}
					require.Equal(t, c.want, got)
					require.Len(t, f.Log(), c.scanned)
				})
			}
		})
	}
}

// An error is yielded once, with nothing, and ends the scan.
func TestScanErrors(t *testing.T) {
	for name, c := range map[string]struct {
		module   string
		kind     int
		requests int // of which the last fails
		told     int // how many versions are told of before
	}{
		"a page":        {testModule, KindUnexpected, 1, 0},
		"a second look": {testModule, KindUnexpected, 2, 0},
		"a later page":  {testModule, KindUnexpected, 3, 499},
		"module":        {"a//b", KindBadRequest, 0, 0},
	} {
		run(t, name, withStorage, func(t *testing.T, f *fakeGCS, s *Storage) {
			for i := range 500 {
				storeFiles(f, testModule, fmt.Sprintf("v1.%03d.0", i), extInfo, extMod)
			}
			f.before(nth("m", c.requests-1), func() { f.Deny("storage.objects.list") })
			var yielded, failed int
			for status, err := range s.Scan(t.Context(), c.module) {
				if yielded++; err != nil {
					failed++
					require.Zero(t, status)
					requireError(t, err, c.kind, "gcs.Scan", c.module, "")
					require.Equal(t, c.kind == KindUnexpected, strings.Contains(err.Error(), "needs storage.objects.list"))
				}
			}
			require.Equal(t, 1, failed)
			require.Equal(t, c.told+1, yielded)
			require.Len(t, f.Log(), c.requests)
		})
	}
}

// A scan in small pages shows what one in a page does, and what the objects mean.
func FuzzScan(f *testing.F) {
	versions := []ModuleVersion{{"a", "v1"}, {"a", "v1.info"}, {"a", "v1.j"}, {"a", "v1.j.k"}, {"a", "v1.mod.x"}, {"a", "v1.zip"}, {"a-b", "v1"}, {"a/b", "v1"}, {"b", "v1.0.0"}}
	f.Add([]byte{}, uint8(0))
	for i := range uint8(16) {
		f.Add(bytes.Repeat([]byte{7 | i<<4, i, 15 | i<<4, 5, 7 + i}, 2), i)
	}
	f.Fuzz(func(t *testing.T, states []byte, size uint8) {
		withStorage(t, func(t *testing.T, f *fakeGCS, s *Storage) {
			want := map[ModuleVersion]State{}
			var complete []ModuleVersion
			for i, bits := range states[:min(len(states), len(versions))] {
				v, marker, names := versions[i], bits>>4&3, bits>>6
				mark := []map[string]string{{keySaveID: "a"}, marked(time.Now(), "a"), marked(givenUp, "a"), cleared()}[marker]
				others := []map[string]string{
					{keySaveID: "a"}, {keySaveID: "a", keyGeneration: ownMod}, {keySaveID: "a", keyGeneration: "1"}, {keySaveID: "b"},
				}[names]
				f.put(v, mark, others, subsetOf(int(bits&15))...)
				state := meaning(bits&7, marker == 1 || marker == 2, marker == 1, names < 2)
				if bits&15 != 0 {
					want[v] = state
				}
				if state.exists() {
					complete = append(complete, v)
				}
			}
			slices.SortFunc(complete, func(a, b ModuleVersion) int { return strings.Compare(a.object(extZip), b.object(extZip)) })
			all := scanned(t, s, "")
			require.LessOrEqual(t, len(f.Log()), 2)
			got := map[ModuleVersion]State{}
			for _, status := range all {
				got[status.ModuleVersion] = status.State
			}
			require.Equal(t, want, got)
			require.Len(t, all, len(want))
			f.SetPages(1+int(size%7), 0)
			require.Equal(t, all, scanned(t, s, ""))
			require.Equal(t, complete, catalogOf(t, s, 1+int(size/7%5)))
			for _, module := range []string{"a", "a/b"} {
				var list []string
				for _, v := range complete {
					if v.Module == module {
						list = append(list, v.Version)
					}
				}
				requireList(t, s, module, list...)
			}
		})
	})
}

// A status is readable as JSON.
func TestVersionStatusJSON(t *testing.T) {
	status := VersionStatus{ModuleVersion: ModuleVersion{"m", "v1.0.0"}, State: InProgress, Missing: []string{extZip}, Size: 7}
	got, err := json.Marshal(status)
	require.NoError(t, err)
	require.JSONEq(t, `{"module": "m", "version": "v1.0.0", "state": "in progress", "missing": ["zip"], "size": 7}`, string(got))
	var back VersionStatus
	require.NoError(t, json.Unmarshal(got, &back))
	require.Equal(t, status, back)
	require.Error(t, json.Unmarshal([]byte(`{"state": "whole"}`), &back))
	require.Equal(t, "State(6)", (Complete + 1).String())
	require.Equal(t, "State(-1)", State(-1).String())
}

// A listing may show each object as it was at some moment of the listing, and not all
// objects at the same moment. Whatever it shows of a version that changes meanwhile, and
// in whatever pages, nothing is taken away, and nobody is told what never was.
func TestSmearedListing(t *testing.T) {
	takeOver := func(f *fakeGCS) {
		f.put(testVersionName, marked(time.Now(), "b"), map[string]string{keySaveID: "b", keyGeneration: ownMod}, allExts...)
	}
	none, one, gaveUp := []string{}, []string{testVersion}, marked(givenUp, "old")
	scenes := map[string]struct {
		mark   map[string]string
		found  []string
		during func(f *fakeGCS)
		told   map[string][]any // what a call may answer
	}{
		"taken over": {gaveUp, []string{extMod, extInfo}, takeOver, map[string][]any{
			"Exists": {false}, "List": {none}, "Scan": {InProgress}, "Repair": {InProgress}, "Save": {KindGatewayTimeout},
		}},
		"taken over and committed": {gaveUp, []string{extMod, extInfo}, func(f *fakeGCS) {
			takeOver(f)
			f.SetMetadata(objectName(extMod), nil)
		}, map[string][]any{
			"Exists": {false, true}, "List": {none, one}, "Scan": {InProgress, Complete}, "Repair": {InProgress, Complete}, "Save": {KindAlreadyExists},
		}},
		"deleted": {nil, allExts, func(f *fakeGCS) { removeVersion(f, testVersionName) }, map[string][]any{
			"Exists": {false, true}, "List": {none, one}, "Scan": {nil, Complete}, "Repair": {Absent, Complete},
		}},
	}
	calls := map[string]func(ctx context.Context, s *Storage) (any, error){
		"Exists": func(ctx context.Context, s *Storage) (any, error) { return s.Exists(ctx, testModule, testVersion) },
		"List":   func(ctx context.Context, s *Storage) (any, error) { return s.List(ctx, testModule) },
		"Repair": func(ctx context.Context, s *Storage) (any, error) { return s.Repair(ctx, testModule, testVersion) },
		"Save":   func(ctx context.Context, s *Storage) (any, error) { return Kind(contentOf("a", 10).save(ctx, s)), nil },
		"Scan": func(ctx context.Context, s *Storage) (state any, err error) {
			for status, e := range s.Scan(ctx, testModule) {
				state, err = status.State, e
			}
			return state, err
		},
	}
	for scene, sc := range scenes {
		for call, told := range sc.told {
			for picks := range 3 * 2 * 2 * 2 {
				pick := map[string]int{"." + extMod: picks % 3, "." + extInfo: picks / 3 % 2, "." + extZip: picks / 6 % 2}
				run(t, fmt.Sprintf("%s/%s/%d", scene, call, picks), inCrowd, func(t *testing.T, f *fakeGCS) {
					if picks >= 12 {
						f.SetPages(2, 0)
					}
					leave(f, sc.mark, sc.found...)
					f.SmearListings(func(_ *fakegcs.Request, name string, states int) int { return min(pick[path.Ext(name)], states-1) })
					var after map[string]*fakegcs.Object
					f.atFirst(on("", "list", ""), func() {
						sc.during(f)
						after = f.Objects()
					})
					got, err := calls[call](within(t, time.Second), f.storage("a"))
					require.NoError(t, err)
					require.Contains(t, told, got)
					require.Equal(t, after, f.Objects())
				})
			}
		}
	}
}
