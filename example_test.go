package gcs_test

import (
	"bytes"
	"context"
	"crypto/md5"
	"fmt"
	"io"
	"log"
	"log/slog"
	"os"

	"cloud.google.com/go/storage"
	"github.com/athensgcs/gcs"
)

// bucket stands for one of yours: client.Bucket("my-modules").
func bucket() *storage.BucketHandle { return gcs.NewExampleBucket() }

func Example() {
	ctx := context.Background()
	s := gcs.NewStorage(bucket(), gcs.WithLogger(slog.Default()))

	zip := []byte("the zip")
	sum := md5.Sum(zip)
	err := s.Save(ctx, "example.com/mod", "v1.0.0", []byte("module example.com/mod\n"),
		bytes.NewReader(zip), sum[:], []byte(`{"Version":"v1.0.0"}`))
	switch {
	case err == nil:
		fmt.Println("stored")
	case gcs.Is(err, gcs.KindAlreadyExists):
		fmt.Println("somebody else has stored it")
	default:
		log.Fatal(err)
	}

	mod, err := s.GoMod(ctx, "example.com/mod", "v1.0.0")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s", mod)
	// Output:
	// stored
	// module example.com/mod
}

func ExampleStorage_Zip() {
	ctx := context.Background()
	s := gcs.NewStorage(bucket())
	save(s, "example.com/mod", "v1.0.0")

	zip, err := s.Zip(ctx, "example.com/mod", "v1.0.0")
	if gcs.Is(err, gcs.KindNotFound) {
		log.Fatal("fetch it first")
	} else if err != nil {
		log.Fatal(err)
	}
	defer zip.Close()
	fmt.Println(zip.Size(), "bytes")
	if _, err := io.Copy(os.Stdout, zip); err != nil {
		log.Fatal(err)
	}
	// Output:
	// 7 bytes
	// the zip
}

func ExampleStorage_Catalog() {
	ctx := context.Background()
	s := gcs.NewStorage(bucket())
	save(s, "example.com/mod", "v1.0.0")
	save(s, "example.com/mod", "v1.1.0")
	save(s, "example.com/other", "v0.1.0")

	for token := ""; ; {
		page, next, err := s.Catalog(ctx, token, 2)
		if err != nil {
			log.Fatal(err)
		}
		for _, mv := range page {
			fmt.Println(mv.Module, mv.Version)
		}
		if token = next; token == "" {
			break
		}
	}
	// Output:
	// example.com/mod v1.0.0
	// example.com/mod v1.1.0
	// example.com/other v0.1.0
}

// A fetcher gets versions from where they come from, and saves them.
type fetcher struct{ s *gcs.Storage }

func (f fetcher) Stash(ctx context.Context, module, version string) (string, error) {
	fmt.Println("fetching", module, version)
	save(f.s, module, version)
	return version, nil
}

func ExampleStorage_SingleFlight() {
	ctx := context.Background()
	s := gcs.NewStorage(bucket())
	stasher := s.SingleFlight(fetcher{s})
	for range 2 {
		version, err := stasher.Stash(ctx, "example.com/mod", "v1.0.0")
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println("stored", version)
	}
	// Output:
	// fetching example.com/mod v1.0.0
	// stored v1.0.0
	// stored v1.0.0
}

func ExampleStorage_Check() {
	ctx := context.Background()
	s := gcs.NewStorage(bucket(), gcs.WithPrefix("athens/"))
	if err := s.Check(ctx); err != nil {
		log.Fatal(err) // names the permissions that are missing, if any are
	}
	fmt.Println("the bucket is ready")
	// Output:
	// the bucket is ready
}

func ExampleStorage_Scan() {
	ctx := context.Background()
	s := gcs.NewStorage(bucket())
	save(s, "example.com/mod", "v1.0.0")
	for found, err := range s.Scan(ctx, "") {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(found.Module, found.Version, found.State)
	}
	// Output:
	// example.com/mod v1.0.0 complete
}

func save(s *gcs.Storage, module, version string) {
	err := s.Save(context.Background(), module, version, []byte("module "+module+"\n"),
		bytes.NewReader([]byte("the zip")), nil, []byte(`{"Version":"`+version+`"}`))
	if err != nil {
		log.Fatal(err)
	}
}
