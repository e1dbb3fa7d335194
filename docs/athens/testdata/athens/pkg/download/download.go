// Package download stands in for Athens' package of the same name.
package download

import (
	"context"
	"io"

	"github.com/gomods/athens/pkg/errors"
	"github.com/gomods/athens/pkg/log"
	"github.com/gomods/athens/pkg/stash"
	"github.com/gomods/athens/pkg/storage"
)

// Opts are what a Protocol is made of.
type Opts struct {
	Storage storage.Backend
	Stasher stash.Stasher
	Logger  *log.Logger
	Async   bool // the download mode "async"
}

// Get answers the request for the .info, .mod or .zip of a version with its
// status and its body.
func (o *Opts) Get(ctx context.Context, mod, ver, ext string) (status int, body []byte) {
	const op errors.Op = "download.Handler"
	body, err := o.read(ctx, mod, ver, ext)
	if errors.IsNotFoundErr(err) {
		body, err = o.fetch(ctx, mod, ver, ext)
	}
	if err != nil {
		o.Logger.SystemErr(errors.E(op, err, errors.M(mod), errors.V(ver), errors.Expect(err, errors.KindNotFound)))
		return errors.Kind(err), nil
	}
	return 200, body
}

func (o *Opts) fetch(ctx context.Context, mod, ver, ext string) ([]byte, error) {
	const op errors.Op = "protocol.processDownload"
	// The context ends as soon as there is an answer, in every mode.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	if o.Async {
		go o.Stasher.Stash(ctx, mod, ver)
		return nil, errors.E(op, "async: module not found", errors.KindNotFound)
	}
	saved, err := o.Stasher.Stash(ctx, mod, ver)
	if err != nil {
		return nil, errors.E(op, err)
	}
	return o.read(ctx, mod, saved, ext)
}

func (o *Opts) read(ctx context.Context, mod, ver, ext string) ([]byte, error) {
	switch ext {
	case "info":
		return o.Storage.Info(ctx, mod, ver)
	case "mod":
		return o.Storage.GoMod(ctx, mod, ver)
	}
	zip, err := o.Storage.Zip(ctx, mod, ver)
	if err != nil {
		return nil, err
	}
	defer zip.Close()
	return io.ReadAll(zip)
}
