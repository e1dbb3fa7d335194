package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"cloud.google.com/go/storage"
	"github.com/dustin/go-humanize"
	"google.golang.org/api/iterator"

	"github.com/athensgcs/gcs"
)

var showCommand = &command{
	name:  "show",
	args:  "MODULE@VERSION...",
	brief: "show all that is known of versions",
	usage: `Show shows the state of each version, what will become of it, and its objects: size,
generation, last change, and metadata, with the marker of a save under way. It
changes nothing. roles/storage.objectViewer permits it.

Exit status: 0 if all are complete, 1 if one is not, 2 if nothing of one is there.

With -json, every version of which something is there has a line, and there is no
summary.

Examples:
    athensgcs show -bucket my-modules github.com/my/module@v1.2.3
    athensgcs show -bucket my-modules -json github.com/my/module@v1.2.3 | jq .objects
`,
	run: (*program).showVersions,
}

// A shown is all that is known of a version.
type shown struct {
	gcs.VersionStatus
	Fate    string   `json:"fate"`
	Objects []object `json:"objects"`
}

// An object is one of a version. Its metadata has the marker, and the id of its save.
type object struct {
	Name       string            `json:"name"` // without prefix, module and version
	Size       int64             `json:"size"`
	Generation int64             `json:"generation"`
	Updated    time.Time         `json:"updated"`
	Metadata   map[string]string `json:"metadata,omitempty"`
}

func (o object) String() string {
	text := fmt.Sprintf("    %-5s %7s, generation %d, changed %s", o.Name, humanize.Bytes(uint64(o.Size)), o.Generation, o.Updated.UTC().Format(time.RFC3339))
	for _, key := range slices.Sorted(maps.Keys(o.Metadata)) {
		text += ", " + key + "=" + o.Metadata[key]
	}
	return text
}

// showVersions shows all that is known of the versions.
func (p *program) showVersions(ctx context.Context) (int, error) {
	return p.each(ctx, "show", func(v gcs.VersionStatus) (int, error) {
		objects, err := p.objects(ctx, v.ModuleVersion)
		if err != nil {
			return 0, err
		}
		s := shown{v, p.fate(p.newVersion(v)), objects}
		lines := []string{describe(v, time.Now()) + "; " + s.Fate}
		for _, o := range objects {
			lines = append(lines, o.String())
		}
		if v.State == gcs.Complete {
			return statusOK, p.print(s, lines...)
		}
		return statusFound, p.print(s, lines...)
	})
}

// objects lists the objects of a version, its claim too.
func (p *program) objects(ctx context.Context, v gcs.ModuleVersion) (objects []object, err error) {
	prefix := p.prefix
	if prefix != "" {
		prefix = strings.TrimSuffix(prefix, "/") + "/"
	}
	query := &storage.Query{Prefix: prefix + v.Module + "/@v/" + v.Version, Projection: storage.ProjectionNoACL}
	for list := p.client.Bucket(p.bucket).Objects(ctx, query); ; {
		attrs, err := list.Next()
		if errors.Is(err, iterator.Done) {
			return objects, nil
		}
		if err != nil {
			return nil, err
		}
		name := strings.TrimPrefix(attrs.Name, query.Prefix)
		if slices.Contains([]string{".info", ".mod", ".zip", ".lock"}, name) {
			objects = append(objects, object{name, attrs.Size, attrs.Generation, attrs.Updated, attrs.Metadata})
		}
	}
}

var errNothing = errors.New("none of its files is in the bucket")

// each calls do with each version that the arguments name, and returns the worst of
// the statuses. An error is one of that version only.
func (p *program) each(ctx context.Context, command string, do func(gcs.VersionStatus) (int, error)) (worst int, err error) {
	for _, arg := range p.args {
		var status int
		v, err := p.find(ctx, arg)
		if err == nil {
			status, err = do(v)
		}
		switch {
		case ctx.Err() != nil:
			return 0, ctx.Err()
		case gcs.Is(err, gcs.KindNotFound): // the bucket
			return 0, err
		case err != nil:
			status = p.fail("athensgcs "+command, fmt.Errorf("%s: %w", arg, err))
		}
		worst = max(worst, status)
	}
	return worst, nil
}

// find returns what is in the bucket of the version MODULE@VERSION.
func (p *program) find(ctx context.Context, arg string) (gcs.VersionStatus, error) {
	at := strings.LastIndexByte(arg, '@')
	if at <= 0 || at == len(arg)-1 {
		return gcs.VersionStatus{}, errors.New("is no MODULE@VERSION")
	}
	for v, err := range p.storage.Scan(ctx, arg[:at]) {
		if err != nil || v.Version == arg[at+1:] {
			return v, err
		}
	}
	return gcs.VersionStatus{}, errNothing
}
