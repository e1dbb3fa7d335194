package main

import (
	"context"
	"flag"
	"time"

	"github.com/athensgcs/gcs"
)

var deleteCommand = &command{
	name:  "delete",
	args:  "MODULE@VERSION...",
	brief: "delete versions, complete or not",
	usage: `Delete removes each version whole, the .mod first, so that no server takes what is
left for complete. The next request fetches it anew. roles/storage.objectUser
permits it.

Exit status: 0 if all are deleted, 2 if nothing of one is there, or it could not be
deleted. The others are deleted all the same.

With -json, every version that is deleted has a line, and there is no summary.

Examples:
    athensgcs delete -bucket my-modules -dry-run github.com/my/module@v1.2.3
    athensgcs delete -bucket my-modules github.com/my/module@v1.2.3 github.com/my/module@v1.2.4
`,
	flags: func(p *program, f *flag.FlagSet) {
		f.BoolVar(&p.dryRun, "dry-run", false, "delete nothing, and say what would be deleted")
	},
	run: (*program).deleteVersions,
}

// deleteVersions deletes the versions, whatever is there of them.
func (p *program) deleteVersions(ctx context.Context) (int, error) {
	return p.each(ctx, "delete", func(v gcs.VersionStatus) (int, error) {
		err := error(nil)
		if !p.dryRun {
			err = p.storage.Delete(ctx, v.Module, v.Version)
		}
		if v.State == gcs.Absent || gcs.Is(err, gcs.KindNotFound) {
			return 0, errNothing // or a claim alone, which belongs to a server
		}
		if err != nil {
			return 0, err
		}
		r := repaired{version: p.newVersion(v), Action: removed}
		sum := repairs{DryRun: p.dryRun}
		return statusOK, p.print(r, describe(v, time.Now())+": "+sum.tense(r.Action))
	})
}
