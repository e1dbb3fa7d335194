package gcs

import (
	"context"
	"errors"
	"fmt"
	"path"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// A listing may show each object as it was at some moment of the listing, and not all
// objects at the same moment. Whatever it shows of a version that changes meanwhile, and
// in whatever pages, nothing is taken away, and nobody is told what never was.
func TestSmearedListing(t *testing.T) {
	takeOver := func(f *fakeGCS) {
		mod := f.Put(objectName(extMod), nil, marked(time.Now(), "b"))
		f.put(testVersionName, nil, map[string]string{keySaveID: "b", keyGeneration: formatGeneration(mod)}, extInfo, extZip)
	}
	scenes := map[string]struct {
		found  []string
		during func(f *fakeGCS)
		told   map[string][]any // what a call may answer
	}{
		"taken over": {[]string{extMod, extInfo}, takeOver, map[string][]any{
			"Exists": {false}, "List": {0}, "Scan": {InProgress}, "Repair": {InProgress}, "Save": {KindGatewayTimeout},
		}},
		"taken over and committed": {[]string{extMod, extInfo}, func(f *fakeGCS) {
			takeOver(f)
			f.SetMetadata(objectName(extMod), nil)
		}, map[string][]any{
			"Exists": {false, true}, "List": {0, 1}, "Scan": {InProgress, Complete}, "Repair": {InProgress, Complete}, "Save": {KindAlreadyExists},
		}},
		"deleted": {[]string{extMod, extInfo, extZip}, func(f *fakeGCS) {
			removeVersion(f, testVersionName)
		}, map[string][]any{
			"Exists": {false, true}, "List": {0, 1}, "Scan": {nil, Complete}, "Repair": {Absent, Complete},
		}},
	}
	calls := map[string]func(ctx context.Context, s *Storage) (any, error){
		"Exists": func(ctx context.Context, s *Storage) (any, error) { return s.Exists(ctx, testModule, testVersion) },
		"List": func(ctx context.Context, s *Storage) (any, error) {
			list, err := s.List(ctx, testModule)
			return len(list), err
		},
		"Scan": func(ctx context.Context, s *Storage) (state any, err error) {
			for status, e := range s.Scan(ctx, testModule) {
				state, err = status.State, e
			}
			return state, err
		},
		"Repair": func(ctx context.Context, s *Storage) (any, error) { return s.Repair(ctx, testModule, testVersion) },
		"Save": func(ctx context.Context, s *Storage) (any, error) {
			var e *Error
			if err := contentOf("a", 10).save(ctx, s); !errors.As(err, &e) {
				return nil, err
			}
			return e.Kind, nil
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
					mark := map[string]string{}
					if len(sc.found) < 3 {
						mark = marked(givenUp, "old")
					}
					leave(f, mark, sc.found...)
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
