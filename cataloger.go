package gcs

import (
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"strings"
)

// A ModuleVersion is one entry of a catalog.
type ModuleVersion struct {
	Module  string `json:"module"`
	Version string `json:"version"`
}

// Catalog returns up to pageSize complete versions of the whole bucket, or 1,000
// when pageSize is not positive, and the token to ask for the next page with.
// The token is empty on the last page, and to ask for the first. A token that
// Catalog did not make is KindBadRequest.
//
// A version that is complete all the while is on one page, and on no other,
// whatever is saved and deleted between two calls. The order is that of the
// names of the .zip objects.
//
// It makes one request for every 1,000 objects that it passes, which are more than
// three a version where partial versions are, and one or two more: the first one
// asks for no more than pageSize versions should need. Each unfinished version
// costs one more (see [Storage.Exists]).
func (s *Storage) Catalog(ctx context.Context, token string, pageSize int) ([]ModuleVersion, string, error) {
	ctx, o := s.begin(ctx, "Catalog", version{})
	page, next, err := s.catalog(ctx, token, pageSize)
	return page, next, o.end(err)
}

func (s *Storage) catalog(ctx context.Context, token string, pageSize int) ([]ModuleVersion, string, error) {
	start, last, err := parseToken(token)
	if err != nil {
		return nil, "", err
	}
	if pageSize <= 0 {
		pageSize = 1000
	}
	// A page of a few versions needs few objects, and one more version to know
	// that it is not the last page.
	objects := min(3*min(pageSize, maxPage)+3, maxPage)
	page := []ModuleVersion{}
	var rest, end string
	for found, err := range s.scan(ctx, "", start, objects) {
		if err == nil {
			name := found.object(extZip)
			if name <= last {
				continue
			}
			var ok bool
			if ok, err = s.settle(ctx, found.version, found.snapshot); ok {
				if len(page) == pageSize {
					return page, makeToken(rest, end), nil
				}
				page = append(page, ModuleVersion{found.module, found.version.version})
				rest, end = found.rest, name
			}
		}
		if err != nil {
			return nil, "", err
		}
	}
	return page, "", nil
}

// A token holds where the next page's scan starts and the .zip of the last
// version that was on a page: objects of versions that come later may start
// before it. The sum tells a token from a string that merely looks like one.
func makeToken(start, last string) string {
	b := []byte(start + "\x00" + last)
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(b, crc32c))
	return base64.RawURLEncoding.EncodeToString(b)
}

func parseToken(token string) (start, last string, err error) {
	if token == "" {
		return "", "", nil
	}
	bad := badRequest("token", errors.New("is not one that Catalog made"))
	b, err := base64.RawURLEncoding.Strict().DecodeString(token)
	if err != nil || len(b) < 4 {
		return "", "", bad
	}
	b, sum := b[:len(b)-4], binary.BigEndian.Uint32(b[len(b)-4:])
	start, last, ok := strings.Cut(string(b), "\x00")
	if !ok || sum != crc32.Checksum(b, crc32c) || makeToken(start, last) != token {
		return "", "", bad // the last because decoding skips line ends
	}
	return start, last, nil
}
