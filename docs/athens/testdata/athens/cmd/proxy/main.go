// The proxy's program stands in for Athens'.
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/gomods/athens/pkg/build"
	"github.com/gomods/athens/pkg/config"
	"github.com/gomods/athens/pkg/stash"
	"github.com/gomods/athens/pkg/storage"
	"github.com/gomods/athens/pkg/storage/gcp"
)

func main() {
	fmt.Println(build.String())
	if len(os.Args) > 1 {
		return // -version
	}
	var b storage.Backend
	b, err := gcp.New(context.Background(), &config.GCPConfig{}, time.Minute)
	if err == nil {
		_, err = stash.WithGCSLock(120, b)
	}
	fmt.Println(err)
}
