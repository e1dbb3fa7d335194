package fakegcs

import (
	"bytes"
	"context"
	"crypto/md5"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"cloud.google.com/go/storage"
	"github.com/stretchr/testify/require"
	"google.golang.org/api/googleapi"
	"google.golang.org/api/iterator"
	"google.golang.org/api/option"
)

// The tests of this file hold the Server to what GCS documents, so that other tests
// can trust it.

// bubble runs a test against a bucket of its own, in virtual time. The test fails
// when it ends with violations.
func bubble(t *testing.T, test func(t *testing.T, f *Server, m *Machine)) {
	t.Helper()
	tolerant(t, func(t *testing.T, f *Server, m *Machine) {
		test(t, f, m)
		require.Empty(t, f.Violations())
	})
}

// tolerant is bubble without a look at the violations.
func tolerant(t *testing.T, test func(t *testing.T, f *Server, m *Machine)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		f := New()
		defer f.Close()
		test(t, f, f.Machine("m"))
	})
}

// uploadObject writes an object in one request, or in chunks of 256 KiB when the
// content is larger than that.
func uploadObject(ctx context.Context, o *storage.ObjectHandle, content []byte, metadata map[string]string) (*storage.ObjectAttrs, error) {
	w := o.NewWriter(ctx)
	w.ChunkSize = 256 << 10
	w.Metadata = metadata
	if _, err := w.Write(content); err != nil {
		w.Close()
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return w.Attrs(), nil
}

func mustUpload(t *testing.T, o *storage.ObjectHandle, content string, metadata map[string]string) *storage.ObjectAttrs {
	t.Helper()
	attrs, err := uploadObject(t.Context(), o, []byte(content), metadata)
	require.NoError(t, err)
	return attrs
}

func downloadObject(ctx context.Context, o *storage.ObjectHandle) (string, error) {
	r, err := o.NewReader(ctx)
	if err != nil {
		return "", err
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	return string(b), err
}

// httpStatus returns the HTTP status of an error, 200 for none.
func httpStatus(err error) int {
	if err == nil {
		return http.StatusOK
	}
	if errors.Is(err, storage.ErrObjectNotExist) {
		return http.StatusNotFound
	}
	var e *googleapi.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return 0
}

// sendRaw makes a request past the client library.
func sendRaw(t *testing.T, m *Machine, method, target string, header http.Header, body string) (int, http.Header, map[string]any) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, "https://storage.googleapis.com"+target, strings.NewReader(body))
	require.NoError(t, err)
	if header != nil {
		r.Header = header
	}
	resp, err := m.RoundTrip(r)
	require.NoError(t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	var said map[string]any
	json.Unmarshal(b, &said)
	return resp.StatusCode, resp.Header, said
}

func objectPath(name string) string {
	return "/storage/v1/b/" + Bucket + "/o/" + url.PathEscape(name)
}

func ops(log []Request) (ops []string) {
	for _, r := range log {
		ops = append(ops, r.Op)
	}
	return ops
}

func TestConditions(t *testing.T) {
	type cond = storage.Conditions
	// The object, where there is one, has generation g and metageneration 2.
	tests := []struct {
		name   string
		exists bool
		cond   func(g int64) cond
		// what becomes of an upload, a metadata update, a delete, a read
		upload, update, delete, attrs, read int
	}{
		{"does not exist, absent", false, func(g int64) cond { return cond{DoesNotExist: true} }, 200, 0, 0, 404, 404},
		{"does not exist, present", true, func(g int64) cond { return cond{DoesNotExist: true} }, 412, 0, 0, 412, 412},
		{"generation, same", true, func(g int64) cond { return cond{GenerationMatch: g} }, 200, 200, 200, 200, 200},
		{"generation, other", true, func(g int64) cond { return cond{GenerationMatch: g - 1} }, 412, 412, 412, 412, 412},
		{"generation, absent", false, func(g int64) cond { return cond{GenerationMatch: 7} }, 412, 404, 404, 404, 404},
		{"not generation, same", true, func(g int64) cond { return cond{GenerationNotMatch: g} }, 412, 412, 412, 304, 200},
		{"not generation, other", true, func(g int64) cond { return cond{GenerationNotMatch: g - 1} }, 200, 200, 200, 200, 200},
		{"metageneration, same", true, func(g int64) cond { return cond{MetagenerationMatch: 2} }, 200, 200, 200, 200, 200},
		{"metageneration, other", true, func(g int64) cond { return cond{MetagenerationMatch: 1} }, 412, 412, 412, 412, 412},
		{"metageneration, absent", false, func(g int64) cond { return cond{MetagenerationMatch: 1} }, 412, 404, 404, 404, 404},
		{"not metageneration, same", true, func(g int64) cond { return cond{MetagenerationNotMatch: 2} }, 412, 412, 412, 304, 200},
		{"not metageneration, other", true, func(g int64) cond { return cond{MetagenerationNotMatch: 1} }, 200, 200, 200, 200, 200},
		{"both, same", true, func(g int64) cond { return cond{GenerationMatch: g, MetagenerationMatch: 2} }, 200, 200, 200, 200, 200},
		{"both, one moved", true, func(g int64) cond { return cond{GenerationMatch: g, MetagenerationMatch: 1} }, 412, 412, 412, 412, 412},
	}
	for _, tt := range tests {
		changes := []struct {
			name   string
			want   int
			change func(ctx context.Context, o *storage.ObjectHandle) error
		}{
			{"upload", tt.upload, func(ctx context.Context, o *storage.ObjectHandle) error {
				_, err := uploadObject(ctx, o, []byte("new"), nil)
				return err
			}},
			{"resumable upload", tt.upload, func(ctx context.Context, o *storage.ObjectHandle) error {
				_, err := uploadObject(ctx, o, bytes.Repeat([]byte("n"), 300<<10), nil)
				return err
			}},
			{"update", tt.update, func(ctx context.Context, o *storage.ObjectHandle) error {
				_, err := o.Update(ctx, storage.ObjectAttrsToUpdate{Metadata: map[string]string{"k": "new"}})
				return err
			}},
			{"delete", tt.delete, func(ctx context.Context, o *storage.ObjectHandle) error { return o.Delete(ctx) }},
			{"attrs", tt.attrs, func(ctx context.Context, o *storage.ObjectHandle) error {
				_, err := o.Attrs(ctx)
				return err
			}},
			{"read", tt.read, func(ctx context.Context, o *storage.ObjectHandle) error {
				_, err := downloadObject(ctx, o)
				return err
			}},
		}
		for _, c := range changes {
			if c.want == 0 {
				continue // the client sends no such request
			}
			t.Run(tt.name+"/"+c.name, func(t *testing.T) {
				tolerant(t, func(t *testing.T, f *Server, m *Machine) {
					var g int64
					if tt.exists {
						g = f.Put("o", []byte("old"), nil)
						_, err := m.Bucket.Object("o").Update(t.Context(), storage.ObjectAttrsToUpdate{Metadata: map[string]string{"k": "old"}})
						require.NoError(t, err)
					}
					before := f.Get("o")
					err := c.change(t.Context(), m.Bucket.Object("o").If(tt.cond(g)))
					require.Equal(t, c.want, httpStatus(err), "%v", err)
					log := f.Log()
					last := log[len(log)-1]
					if c.want != http.StatusOK {
						require.Equal(t, before, f.Get("o"))
						require.False(t, last.Applied)
						return
					}
					changed := c.name != "attrs" && c.name != "read"
					require.Equal(t, changed, last.Applied)
					if changed {
						require.NotEqual(t, before, f.Get("o"))
					}
				})
			})
		}
	}
}

func TestRefusalBody(t *testing.T) {
	bubble(t, func(t *testing.T, f *Server, m *Machine) {
		f.Put("o", nil, nil)
		_, err := uploadObject(t.Context(), m.Bucket.Object("o").If(storage.Conditions{DoesNotExist: true}), nil, nil)
		var e *googleapi.Error
		require.ErrorAs(t, err, &e)
		require.Equal(t, http.StatusPreconditionFailed, e.Code)
		require.Equal(t, conditionNotMet, e.Message)
		require.Equal(t, "conditionNotMet", e.Errors[0].Reason)
		require.Contains(t, e.Body, `"locationType":"header"`)
	})
}

// A session is not refused when it starts, only when it is finalized.
func TestResumableUpload(t *testing.T) {
	content := bytes.Repeat([]byte("0123456789abcdef"), 40<<10) // 640 KiB
	create := storage.Conditions{DoesNotExist: true}
	t.Run("stored", func(t *testing.T) {
		bubble(t, func(t *testing.T, f *Server, m *Machine) {
			attrs, err := uploadObject(t.Context(), m.Bucket.Object("a/b c").If(create), content, map[string]string{"k": "v"})
			require.NoError(t, err)
			o := f.Get("a/b c")
			require.Equal(t, content, o.Data)
			require.Equal(t, map[string]string{"k": "v"}, o.Metadata)
			require.Equal(t, o.Generation, attrs.Generation)
			require.Equal(t, int64(1), attrs.Metageneration)
			log := f.Log()
			require.Equal(t, []string{"start", "chunk", "chunk", "chunk"}, ops(log))
			require.Equal(t, map[string]string{"k": "v"}, log[0].Metadata)
			require.Equal(t, int64(256<<10), log[1].Sent)
			require.Equal(t, "a/b c", log[3].Object)
			require.Equal(t, "0", log[3].Cond["ifGenerationMatch"])
			require.False(t, log[2].Applied)
			require.True(t, log[3].Applied)
		})
	})
	t.Run("a multiple of the chunk size", func(t *testing.T) {
		bubble(t, func(t *testing.T, f *Server, m *Machine) {
			_, err := uploadObject(t.Context(), m.Bucket.Object("o").If(create), content[:512<<10], nil)
			require.NoError(t, err)
			require.Equal(t, content[:512<<10], f.Get("o").Data)
			require.Equal(t, []string{"start", "chunk", "chunk", "chunk"}, ops(f.Log()))
		})
	})
	t.Run("refused at the end", func(t *testing.T) {
		bubble(t, func(t *testing.T, f *Server, m *Machine) {
			f.Put("o", []byte("old"), nil)
			_, err := uploadObject(t.Context(), m.Bucket.Object("o").If(create), content, nil)
			require.Equal(t, http.StatusPreconditionFailed, httpStatus(err))
			require.Equal(t, []string{"start", "chunk", "chunk", "chunk"}, ops(f.Log()))
			require.Equal(t, "old", string(f.Get("o").Data))
		})
	})
	t.Run("created meanwhile", func(t *testing.T) {
		bubble(t, func(t *testing.T, f *Server, m *Machine) {
			f.OnRequest(func(_ context.Context, r *Request) Fault {
				if r.Op == "chunk" && r.N == 2 {
					f.Put("o", []byte("other"), nil)
				}
				return NoFault
			})
			_, err := uploadObject(t.Context(), m.Bucket.Object("o").If(create), content, nil)
			require.Equal(t, http.StatusPreconditionFailed, httpStatus(err))
			require.Equal(t, "other", string(f.Get("o").Data))
		})
	})
	for _, fault := range []Fault{ConnectionRefused, LostReset, LostBody, Unavailable, TooMany} {
		for n := range 4 {
			t.Run(fmt.Sprintf("%v of request %d", fault, n), func(t *testing.T) {
				bubble(t, func(t *testing.T, f *Server, m *Machine) {
					f.OnRequest(func(_ context.Context, r *Request) Fault {
						if r.N == n {
							return fault
						}
						return NoFault
					})
					_, err := uploadObject(t.Context(), m.Bucket.Object("o").If(create), content, nil)
					o := f.Get("o")
					if fault == LostBody && n == 3 {
						// The client repeats no request whose answer it has begun to read.
						require.Error(t, err)
					} else {
						require.NoError(t, err)
					}
					require.Equal(t, content, o.Data)
					require.Equal(t, int64(1), o.Metageneration)
				})
			})
		}
	}
	// The client goes on behind a part that was not persisted, and is refused.
	t.Run("half a chunk", func(t *testing.T) {
		bubble(t, func(t *testing.T, f *Server, m *Machine) {
			f.OnRequest(func(_ context.Context, r *Request) Fault {
				if r.N == 1 {
					return HalfChunk
				}
				return NoFault
			})
			_, err := uploadObject(t.Context(), m.Bucket.Object("o").If(create), content, nil)
			require.ErrorContains(t, err, "the upload offset is 262144 byte(s), which exceeds already uploaded size of 131072 byte(s)")
			require.Equal(t, http.StatusServiceUnavailable, httpStatus(err))
			require.Nil(t, f.Get("o"))
		})
	})
	for fault, status := range map[Fault]int{SessionGone: http.StatusGone, SessionNotFound: http.StatusNotFound} {
		t.Run(fault.String(), func(t *testing.T) {
			bubble(t, func(t *testing.T, f *Server, m *Machine) {
				f.OnRequest(func(_ context.Context, r *Request) Fault {
					if r.N == 2 {
						return fault
					}
					return NoFault
				})
				_, err := uploadObject(t.Context(), m.Bucket.Object("o").If(create), content, nil)
				require.Equal(t, status, httpStatus(err))
				code, _, _ := sendRaw(t, m, "PUT", "/upload/storage/v1/b/modules/o?uploadType=resumable&upload_id=session-1", http.Header{"Content-Range": {"bytes */*"}}, "")
				require.Equal(t, status, code)
				_, err = uploadObject(t.Context(), m.Bucket.Object("o").If(create), content, nil)
				require.NoError(t, err)
			})
		})
	}
	t.Run("query", func(t *testing.T) {
		bubble(t, func(t *testing.T, f *Server, m *Machine) {
			code, header, _ := sendRaw(t, m, "POST", "/upload/storage/v1/b/modules/o?uploadType=resumable&name=o&ifGenerationMatch=0", nil, "{}")
			require.Equal(t, http.StatusOK, code)
			session := strings.TrimPrefix(header.Get("Location"), "https://storage.googleapis.com")
			chunk := func(span, body string) (int, string) {
				code, header, _ := sendRaw(t, m, "PUT", session, http.Header{"Content-Range": {span}}, body)
				return code, header.Get("Range")
			}
			code, span := chunk("bytes */*", "")
			require.Equal(t, 308, code)
			require.Empty(t, span)
			code, span = chunk("bytes 0-2/*", "abc")
			require.Equal(t, 308, code)
			require.Equal(t, "bytes=0-2", span)
			code, _ = chunk("bytes 4-5/*", "ef")
			require.Equal(t, http.StatusServiceUnavailable, code)
			code, span = chunk("bytes */*", "")
			require.Equal(t, 308, code)
			require.Equal(t, "bytes=0-2", span)
			require.Nil(t, f.Get("o"))
			code, _ = chunk("bytes 1-4/5", "bcde")
			require.Equal(t, http.StatusOK, code)
			require.Equal(t, "abcde", string(f.Get("o").Data))
			code, _ = chunk("bytes */5", "")
			require.Equal(t, http.StatusOK, code)
			require.Equal(t, []string{"start", "query", "chunk", "chunk", "query", "chunk", "chunk"}, ops(f.Log()))
			code, _, _ = sendRaw(t, m, "PUT", "/upload/storage/v1/b/modules/o?uploadType=resumable&upload_id=none", http.Header{"Content-Range": {"bytes */*"}}, "")
			require.Equal(t, http.StatusNotFound, code)
		})
	})
}

func TestMetadata(t *testing.T) {
	bubble(t, func(t *testing.T, f *Server, m *Machine) {
		o := m.Bucket.Object("o")
		created := mustUpload(t, o.If(storage.Conditions{DoesNotExist: true}), "x", map[string]string{"a": "1", "b": "2"})
		require.Equal(t, int64(1), created.Metageneration)
		require.Equal(t, created.Created, created.Updated)

		steps := []struct {
			name string
			body string
			want map[string]string
		}{
			{"merge", `{"metadata":{"b":"3","c":"4"}}`, map[string]string{"a": "1", "b": "3", "c": "4"}},
			{"a key set to null", `{"metadata":{"a":null}}`, map[string]string{"b": "3", "c": "4"}},
			{"nothing said of it", `{"contentType":"text/x-test"}`, map[string]string{"b": "3", "c": "4"}},
			{"an empty map", `{"metadata":{}}`, map[string]string{"b": "3", "c": "4"}},
			{"null", `{"metadata":null}`, nil},
			{"anew", `{"metadata":{"d":"5"}}`, map[string]string{"d": "5"}},
		}
		for i, s := range steps {
			time.Sleep(time.Second)
			code, _, said := sendRaw(t, m, "PATCH", fmt.Sprintf("%s?ifMetagenerationMatch=%d", objectPath("o"), i+1), nil, s.body)
			require.Equal(t, http.StatusOK, code, s.name)
			require.Equal(t, fmt.Sprint(i+2), said["metageneration"], s.name)
			attrs, err := o.Attrs(t.Context())
			require.NoError(t, err)
			require.Equal(t, s.want, attrs.Metadata, s.name)
			require.Equal(t, int64(i+2), attrs.Metageneration, s.name)
			require.Equal(t, created.Generation, attrs.Generation, s.name)
			require.True(t, created.Created.Equal(attrs.Created), s.name)
			require.Equal(t, time.Now().UTC(), attrs.Updated, s.name)
		}
		require.Equal(t, "text/x-test", f.Get("o").ContentType)

		// The client sends null for an empty map.
		attrs, err := o.If(storage.Conditions{MetagenerationMatch: 7}).Update(t.Context(), storage.ObjectAttrsToUpdate{Metadata: map[string]string{}})
		require.NoError(t, err)
		require.Empty(t, attrs.Metadata)
		log := f.Log()
		require.Nil(t, log[len(log)-1].Metadata)

		// A new generation starts over.
		time.Sleep(time.Second)
		again := mustUpload(t, o.If(storage.Conditions{GenerationMatch: created.Generation}), "y", nil)
		require.Greater(t, again.Generation, created.Generation)
		require.Equal(t, int64(1), again.Metageneration)
		require.True(t, again.Created.After(created.Created))
	})
}

// Generations come from the clock, which stands still in a bubble.
func TestGenerations(t *testing.T) {
	bubble(t, func(t *testing.T, f *Server, m *Machine) {
		now := time.Now()
		o := m.Bucket.Object("o")
		last := f.Put("o", nil, nil)
		for range 3 {
			attrs := mustUpload(t, o.If(storage.Conditions{GenerationMatch: last}), "x", nil)
			require.Greater(t, attrs.Generation, last)
			last = attrs.Generation
		}
		require.NoError(t, o.If(storage.Conditions{GenerationMatch: last}).Delete(t.Context()))
		attrs := mustUpload(t, o.If(storage.Conditions{DoesNotExist: true}), "x", nil)
		require.Greater(t, attrs.Generation, last)
		require.Equal(t, now, time.Now())

		// A request for a generation that is gone finds nothing.
		require.Equal(t, http.StatusNotFound, httpStatus(o.Generation(last).If(storage.Conditions{GenerationMatch: last}).Delete(t.Context())))
		_, err := o.Generation(last).Attrs(t.Context())
		require.Equal(t, http.StatusNotFound, httpStatus(err))
		_, err = downloadObject(t.Context(), o.Generation(last))
		require.Equal(t, http.StatusNotFound, httpStatus(err))
		_, err = downloadObject(t.Context(), o.Generation(attrs.Generation))
		require.NoError(t, err)
	})
}

func TestReads(t *testing.T) {
	const name = "example.com/!m/@v/v1.0.0+x.mod"
	bubble(t, func(t *testing.T, f *Server, _ *Machine) {
		f.Put(name, []byte("older"), nil)
		g := f.Put(name, []byte("0123456789"), map[string]string{"in_progress": "true"})
		f.Put("empty", nil, nil)
		for _, m := range []*Machine{f.Machine("xml"), f.Machine("json", storage.WithJSONReads())} {
			r, err := m.Bucket.Object(name).NewReader(t.Context())
			require.NoError(t, err)
			b, err := io.ReadAll(r)
			require.NoError(t, err)
			require.NoError(t, r.Close())
			require.Equal(t, "0123456789", string(b))
			require.Equal(t, int64(10), r.Attrs.Size)
			require.Equal(t, g, r.Attrs.Generation)
			require.Equal(t, int64(1), r.Attrs.Metageneration)
			if m.Name == "xml" {
				require.Equal(t, map[string]string{"In_progress": "true"}, r.Metadata())
			} else {
				require.Empty(t, r.Metadata())
			}

			r, err = m.Bucket.Object(name).NewRangeReader(t.Context(), 2, 3)
			require.NoError(t, err)
			b, err = io.ReadAll(r)
			require.NoError(t, err)
			require.NoError(t, r.Close())
			require.Equal(t, "234", string(b))
			require.Equal(t, int64(10), r.Attrs.Size)

			r, err = m.Bucket.Object(name).NewRangeReader(t.Context(), 0, 0)
			require.NoError(t, err)
			require.NoError(t, r.Close())
			require.Equal(t, int64(10), r.Attrs.Size)

			_, err = m.Bucket.Object(name).NewRangeReader(t.Context(), 11, 3)
			require.Equal(t, http.StatusRequestedRangeNotSatisfiable, httpStatus(err))

			s, err := downloadObject(t.Context(), m.Bucket.Object("empty"))
			require.NoError(t, err)
			require.Empty(t, s)

			_, err = downloadObject(t.Context(), m.Bucket.Object("absent"))
			require.ErrorIs(t, err, storage.ErrObjectNotExist)
			_, err = downloadObject(t.Context(), m.Client.Bucket("absent").Object("o"))
			require.ErrorIs(t, err, storage.ErrObjectNotExist)
		}
		m := f.Machine("m")
		_, err := m.Bucket.Object("absent").Attrs(t.Context())
		require.ErrorIs(t, err, storage.ErrObjectNotExist)
		_, err = m.Client.Bucket("absent").Objects(t.Context(), nil).Next()
		require.ErrorIs(t, err, storage.ErrBucketNotExist)
		attrs, err := m.Bucket.Attrs(t.Context())
		require.NoError(t, err)
		require.Equal(t, Bucket, attrs.Name)
		requests, bodies := f.InFlight()
		require.Zero(t, requests)
		require.Zero(t, bodies)
	})
}

func listObjects(t *testing.T, m *Machine, q *storage.Query, pageSize int) (names []string, attrs []*storage.ObjectAttrs) {
	t.Helper()
	it := m.Bucket.Objects(t.Context(), q)
	it.PageInfo().MaxSize = pageSize
	for {
		o, err := it.Next()
		if err == iterator.Done {
			return names, attrs
		}
		require.NoError(t, err)
		names, attrs = append(names, o.Name), append(attrs, o)
	}
}

func TestList(t *testing.T) {
	objects := []string{"a", "a/b", "b", "m/@v/v1.info", "m/@v/v1.mod", "m/@v/v1.zip", "m/v2/@v/v2.mod", "z"}
	tests := []struct {
		name     string
		query    *storage.Query
		pageSize int
		want     []string
		requests int
	}{
		{"all", nil, 0, objects, 1},
		{"prefix", &storage.Query{Prefix: "m/@v/v1."}, 0, objects[3:6], 1},
		{"none", &storage.Query{Prefix: "n"}, 0, nil, 1},
		{"start is included", &storage.Query{StartOffset: "b"}, 0, objects[2:], 1},
		{"end is not", &storage.Query{EndOffset: "b"}, 0, objects[:2], 1},
		{"all of them", &storage.Query{Prefix: "m/", StartOffset: "m/@v/v1.j", EndOffset: "m/v"}, 0, objects[4:6], 1},
		{"pages", nil, 3, objects, 3},
		{"an even number of pages", nil, 4, objects, 2},
		{"more than GCS allows", nil, 5000, objects, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *Server, m *Machine) {
				for _, name := range slices.Backward(objects) {
					f.Put(name, nil, nil)
				}
				names, _ := listObjects(t, m, tt.query, tt.pageSize)
				require.Equal(t, tt.want, names)
				require.Len(t, f.Log(), tt.requests)
			})
		})
	}
	t.Run("at most 1000 a page", func(t *testing.T) {
		bubble(t, func(t *testing.T, f *Server, m *Machine) {
			for i := range 1001 {
				f.Put(fmt.Sprintf("%05d", i), nil, nil)
			}
			names, _ := listObjects(t, m, nil, 0)
			require.Len(t, names, 1001)
			require.True(t, slices.IsSorted(names))
			names, _ = listObjects(t, m, nil, 3000)
			require.Len(t, names, 1001)
			require.Len(t, f.Log(), 4)
		})
	})
	// The first page is empty, the second has two objects, and so on.
	t.Run("empty and short pages", func(t *testing.T) {
		bubble(t, func(t *testing.T, f *Server, m *Machine) {
			for _, name := range objects {
				f.Put(name, nil, nil)
			}
			f.SetPages(0, 2, 1)
			names, _ := listObjects(t, m, nil, 0)
			require.Equal(t, objects, names)
			var afters []string
			for _, r := range f.Log() {
				afters = append(afters, r.After)
			}
			require.Equal(t, []string{"", "", "a/b", "b", "b", "m/@v/v1.mod", "m/@v/v1.zip", "m/@v/v1.zip"}, afters)
			_, _, said := sendRaw(t, m, "GET", "/storage/v1/b/modules/o", nil, "")
			require.Nil(t, said["items"])
			require.NotEmpty(t, said["nextPageToken"])
			f.SetPages()
			names, _ = listObjects(t, m, nil, 0)
			require.Equal(t, objects, names)
			require.Len(t, f.Log(), 10)
		})
	})
	// Each object is shown as it was at some moment of the listing.
	t.Run("smeared", func(t *testing.T) {
		bubble(t, func(t *testing.T, f *Server, m *Machine) {
			f.Put("a", nil, nil)
			f.Put("b", nil, nil)
			pick := map[string]int{}
			f.SmearListings(func(_ *Request, name string, states int) int {
				require.Equal(t, map[string]int{"a": 2, "b": 3, "c": 2}[name], states)
				return pick[name]
			})
			f.Put("d", nil, nil) // before the listings
			f.OnRequest(func(_ context.Context, r *Request) Fault {
				f.Remove("a")
				f.SetMetadata("b", map[string]string{"k": "v"})
				f.Put("b", nil, nil)
				f.Put("c", nil, nil)
				return NoFault
			})
			for _, tt := range []struct {
				pick map[string]int
				want []string
				same bool // the generation of b
				meta int64
			}{
				{map[string]int{}, []string{"a", "b", "d"}, true, 1},
				{map[string]int{"a": 1, "b": 1, "c": 1}, []string{"b", "c", "d"}, true, 2},
				{map[string]int{"b": 2, "c": 1}, []string{"a", "b", "c", "d"}, false, 1},
			} {
				pick = tt.pick
				before := f.Get("b").Generation
				names, attrs := listObjects(t, m, nil, 0)
				require.Equal(t, tt.want, names)
				b := attrs[slices.Index(names, "b")]
				require.Equal(t, tt.same, b.Generation == before)
				require.Equal(t, tt.meta, b.Metageneration)
				f.Remove("c")
				f.Put("a", nil, nil)
			}
			f.SmearListings(nil)
			names, _ := listObjects(t, m, nil, 0)
			require.Equal(t, []string{"b", "c", "d"}, names)
		})
	})
	t.Run("objects come and go between pages", func(t *testing.T) {
		bubble(t, func(t *testing.T, f *Server, m *Machine) {
			for _, name := range []string{"a", "b", "c", "d", "e"} {
				f.Put(name, nil, nil)
			}
			f.OnAnswer(func(_ context.Context, r *Request) {
				if r.N == 0 {
					f.Remove("a")
					f.Remove("b")
					f.Remove("d")
					f.Put("a2", nil, nil)
					f.Put("c2", nil, nil)
				}
			})
			names, _ := listObjects(t, m, nil, 2)
			require.Equal(t, []string{"a", "b", "c", "c2", "e"}, names)
		})
	})
	t.Run("bad requests", func(t *testing.T) {
		bubble(t, func(t *testing.T, f *Server, m *Machine) {
			for _, query := range []string{"pageToken=!", "maxResults=0", "maxResults=x", "fields=items(name"} {
				code, _, _ := sendRaw(t, m, "GET", "/storage/v1/b/modules/o?"+query, nil, "")
				require.Equal(t, http.StatusBadRequest, code, query)
			}
		})
	})
}

func TestSelection(t *testing.T) {
	bubble(t, func(t *testing.T, f *Server, m *Machine) {
		f.Put("o", []byte("x"), map[string]string{"k": "v", "l": "w"})
		f.Put("p", []byte("x"), nil)

		tests := []struct {
			query string
			want  string
		}{
			{"fields=items(name)", `{"items":[{"name":"o"},{"name":"p"}]}`},
			{"fields=items/name", `{"items":[{"name":"o"},{"name":"p"}]}`},
			{"fields=kind,items(metadata/k,size)", `{"items":[{"metadata":{"k":"v"},"size":"1"},{"size":"1"}],"kind":"storage#objects"}`},
			{"fields=nextPageToken,prefixes,items(metadata,bucket)&maxResults=1", `{"items":[{"bucket":"modules","metadata":{"k":"v","l":"w"}}],"nextPageToken":"bw=="}`},
			{"fields=items/metadata(k),kind", `{"items":[{"metadata":{"k":"v"}},{}],"kind":"storage#objects"}`},
		}
		for _, tt := range tests {
			_, _, said := sendRaw(t, m, "GET", "/storage/v1/b/modules/o?projection=full&"+tt.query, nil, "")
			b, err := json.Marshal(said)
			require.NoError(t, err)
			require.JSONEq(t, tt.want, string(b), tt.query)
		}
		_, _, said := sendRaw(t, m, "GET", objectPath("o")+"?fields=name,generation", nil, "")
		require.Len(t, said, 2)

		for target, want := range map[string]bool{
			objectPath("o"):                                   false,
			objectPath("o") + "?projection=full":              true,
			objectPath("o") + "?projection=noAcl":             false,
			objectPath("o") + "?projection=full&fields=name":  false,
			objectPath("o") + "?projection=full&fields=acl":   true,
			objectPath("o") + "?projection=noAcl&fields=acl":  false,
			objectPath("o") + "?projection=full&fields=*":     true,
			objectPath("o") + "?projection=full&fields=owner": false,
		} {
			_, _, said := sendRaw(t, m, "GET", target, nil, "")
			require.Equal(t, want, said["acl"] != nil, target)
		}

		// What the client library makes of it.
		f.ResetLog()
		full, attrs := listObjects(t, m, nil, 0)
		require.Equal(t, []string{"o", "p"}, full)
		require.Len(t, attrs[0].ACL, 4)
		require.Equal(t, "owners", attrs[0].ACL[0].ProjectTeam.Team)
		_, attrs = listObjects(t, m, &storage.Query{Projection: storage.ProjectionNoACL}, 0)
		require.Empty(t, attrs[0].ACL)
		q := &storage.Query{Projection: storage.ProjectionNoACL}
		require.NoError(t, q.SetAttrSelection([]string{"Name", "Generation", "Metageneration", "Metadata", "Updated"}))
		_, attrs = listObjects(t, m, q, 0)
		require.Equal(t, f.Get("o").Generation, attrs[0].Generation)
		require.Equal(t, int64(1), attrs[0].Metageneration)
		require.Equal(t, map[string]string{"k": "v", "l": "w"}, attrs[0].Metadata)
		require.False(t, attrs[0].Updated.IsZero())
		require.Zero(t, attrs[0].Size)
		log := f.Log()
		require.Greater(t, log[0].Received, 2*log[1].Received)
		require.Greater(t, log[1].Received, 2*log[2].Received)
	})
}

func TestChecksums(t *testing.T) {
	small, large := []byte("content"), bytes.Repeat([]byte("content"), 80<<10)
	tests := []struct {
		name string
		data []byte
		set  func(w *storage.Writer)
		want int
	}{
		{"right MD5", small, func(w *storage.Writer) { d := md5.Sum(small); w.MD5 = d[:] }, 200},
		{"wrong MD5", small, func(w *storage.Writer) { w.MD5 = make([]byte, 16) }, 400},
		{"wrong CRC", small, func(w *storage.Writer) { w.CRC32C, w.SendCRC32C = 1, true }, 400},
		{"resumable, right MD5", large, func(w *storage.Writer) { d := md5.Sum(large); w.MD5 = d[:] }, 200},
		{"resumable, wrong MD5", large, func(w *storage.Writer) { w.MD5 = make([]byte, 16) }, 400},
		{"resumable, wrong CRC", large, func(w *storage.Writer) { w.CRC32C, w.SendCRC32C = 1, true }, 400},
		{"unchunked, wrong MD5", large, func(w *storage.Writer) { w.ChunkSize, w.MD5 = 0, make([]byte, 16) }, 400},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *Server, m *Machine) {
				w := m.Bucket.Object("o").If(storage.Conditions{DoesNotExist: true}).NewWriter(t.Context())
				w.ChunkSize = 256 << 10
				tt.set(w)
				_, err := w.Write(tt.data)
				require.NoError(t, err)
				err = w.Close()
				require.Equal(t, tt.want, httpStatus(err), "%v", err)
				require.Equal(t, tt.want == 200, f.Get("o") != nil)
			})
		})
	}
	t.Run("header of the last chunk", func(t *testing.T) {
		bubble(t, func(t *testing.T, f *Server, m *Machine) {
			for i, header := range []string{"crc32c=AAAAAA==", "md5=AAAAAAAAAAAAAAAAAAAAAA==", "crc32c=rth90Q==,md5=AAAAAAAAAAAAAAAAAAAAAA=="} {
				_, h, _ := sendRaw(t, m, "POST", "/upload/storage/v1/b/modules/o?uploadType=resumable&name=o&ifGenerationMatch=0", nil, "{}")
				code, _, _ := sendRaw(t, m, "PUT", strings.TrimPrefix(h.Get("Location"), "https://storage.googleapis.com"),
					http.Header{"Content-Range": {"bytes 0-2/3"}, "X-Goog-Hash": {header}}, "abc")
				require.Equal(t, http.StatusBadRequest, code, i)
				require.Nil(t, f.Get("o"))
			}
		})
	})
}

// A body that breaks off, or a context that ends, stores nothing.
func TestTruncatedUploads(t *testing.T) {
	boom := errors.New("boom")
	for _, chunk := range []int{0, 256 << 10} {
		for _, size := range []int{0, 1, 300 << 10} {
			t.Run(fmt.Sprintf("chunks of %d, %d bytes", chunk, size), func(t *testing.T) {
				bubble(t, func(t *testing.T, f *Server, m *Machine) {
					ctx, cancel := context.WithCancelCause(t.Context())
					defer cancel(nil)
					w := m.Bucket.Object("o").If(storage.Conditions{DoesNotExist: true}).NewWriter(ctx)
					w.ChunkSize = chunk
					_, err := w.Write(make([]byte, size))
					require.NoError(t, err)
					synctest.Wait()
					cancel(boom)
					synctest.Wait()
					require.ErrorIs(t, w.Close(), context.Canceled)
					synctest.Wait()
					require.Nil(t, f.Get("o"))
					requests, bodies := f.InFlight()
					require.Zero(t, requests)
					require.Zero(t, bodies)
				})
			})
		}
	}
	t.Run("a context that ends within the body", func(t *testing.T) {
		bubble(t, func(t *testing.T, f *Server, m *Machine) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			body, _ := io.Pipe()
			r, err := http.NewRequestWithContext(ctx, "POST", "https://storage.googleapis.com/upload/storage/v1/b/modules/o?uploadType=multipart&name=o&ifGenerationMatch=0", body)
			require.NoError(t, err)
			_, err = m.RoundTrip(r)
			require.ErrorIs(t, err, context.DeadlineExceeded)
			_, err = body.Read(nil)
			require.ErrorIs(t, err, io.ErrClosedPipe)
		})
	})
	t.Run("a context that ends before the request is applied", func(t *testing.T) {
		bubble(t, func(t *testing.T, f *Server, m *Machine) {
			f.OnRequest(func(context.Context, *Request) Fault {
				time.Sleep(time.Minute)
				return NoFault
			})
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			_, err := uploadObject(ctx, m.Bucket.Object("o").If(storage.Conditions{DoesNotExist: true}), nil, nil)
			require.ErrorIs(t, err, context.DeadlineExceeded)
			require.Nil(t, f.Get("o"))
		})
	})
	t.Run("a body that fails", func(t *testing.T) {
		bubble(t, func(t *testing.T, f *Server, m *Machine) {
			body := io.MultiReader(strings.NewReader("--b\r\n\r\n{}\r\n--b\r\n\r\nabc"), brokenReader{})
			r, err := http.NewRequest("POST", "https://storage.googleapis.com/upload/storage/v1/b/modules/o?uploadType=multipart&name=o&ifGenerationMatch=0", body)
			require.NoError(t, err)
			r.Header.Set("Content-Type", "multipart/related; boundary=b")
			_, err = m.RoundTrip(r)
			require.ErrorIs(t, err, io.ErrUnexpectedEOF)
			require.Nil(t, f.Get("o"))
			code, _, _ := sendRaw(t, m, "POST", "/upload/storage/v1/b/modules/o?uploadType=multipart&name=o&ifGenerationMatch=0", r.Header, "--b\r\n\r\n{}\r\n--b\r\n\r\nabc")
			require.Equal(t, http.StatusBadRequest, code)
			require.Nil(t, f.Get("o"))
		})
	})
}

func TestFaults(t *testing.T) {
	once := storage.WithPolicy(storage.RetryNever)
	// What a single attempt of a create comes to.
	tests := []struct {
		fault   Fault
		applied bool
		want    error // or
		status  int
		retried bool // by the client, when it retries
	}{
		{fault: NoFault, applied: true, status: 200},
		{fault: ConnectionRefused, want: syscall.ECONNREFUSED, retried: true},
		{fault: LostReset, applied: true, want: syscall.ECONNRESET, retried: true},
		{fault: LostEOF, applied: true, want: io.EOF},
		{fault: LostBody, applied: true, want: io.ErrUnexpectedEOF},
		{fault: Unavailable, status: 503, retried: true},
		{fault: TooMany, status: 429, retried: true},
		{fault: Hung, want: context.DeadlineExceeded},
		{fault: HungApplied, applied: true, want: context.DeadlineExceeded},
		{fault: CrashBefore, want: context.DeadlineExceeded},
		{fault: CrashAfter, applied: true, want: context.DeadlineExceeded},
	}
	for _, tt := range tests {
		t.Run(tt.fault.String(), func(t *testing.T) {
			bubble(t, func(t *testing.T, f *Server, m *Machine) {
				var seen, answered []Request
				f.OnRequest(func(_ context.Context, r *Request) Fault {
					seen = append(seen, *r)
					if r.N == 0 {
						return tt.fault
					}
					return NoFault
				})
				f.OnAnswer(func(_ context.Context, r *Request) { answered = append(answered, *r) })
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				start := time.Now()
				o := m.Bucket.Object("o").If(storage.Conditions{DoesNotExist: true})
				_, err := uploadObject(ctx, o.Retryer(once), []byte("x"), map[string]string{"k": "v"})
				if tt.want != nil {
					require.ErrorIs(t, err, tt.want)
				} else {
					require.Equal(t, tt.status, httpStatus(err), "%v", err)
				}
				require.Equal(t, tt.applied, f.Get("o") != nil)
				if tt.want == context.DeadlineExceeded {
					require.Equal(t, time.Minute, time.Since(start))
				}
				require.Len(t, seen, 1)
				require.Equal(t, "insert", seen[0].Op)
				require.Equal(t, map[string]string{"k": "v"}, seen[0].Metadata)
				r := f.Log()[0]
				require.Equal(t, tt.fault, r.Fault)
				require.Equal(t, tt.applied, r.Applied)
				require.Equal(t, time.Now(), r.End)
				require.Equal(t, tt.applied || tt.status != 0, len(answered) == 1)
				wantStatus := tt.status
				if tt.fault == LostBody {
					wantStatus = 200
				}
				require.Equal(t, wantStatus, r.Status)

				// A second machine is untouched.
				_, err = f.Machine("other").Bucket.Object("o").Attrs(t.Context())
				require.Equal(t, tt.applied, err == nil)
			})
		})
		t.Run(tt.fault.String()+", with retries", func(t *testing.T) {
			bubble(t, func(t *testing.T, f *Server, m *Machine) {
				f.OnRequest(func(_ context.Context, r *Request) Fault {
					if r.N == 0 {
						return tt.fault
					}
					return NoFault
				})
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				_, err := uploadObject(ctx, m.Bucket.Object("o").If(storage.Conditions{DoesNotExist: true}), []byte("x"), nil)
				require.Equal(t, tt.retried, len(f.Log()) == 2)
				if tt.retried && tt.applied {
					require.Equal(t, http.StatusPreconditionFailed, httpStatus(err)) // its own object
				} else if tt.retried {
					require.NoError(t, err)
				}
			})
		})
	}
	t.Run("a read that breaks off is resumed", func(t *testing.T) {
		bubble(t, func(t *testing.T, f *Server, m *Machine) {
			f.Put("o", []byte("0123456789"), nil)
			f.OnRequest(func(_ context.Context, r *Request) Fault {
				if r.N == 0 {
					return LostBody
				}
				return NoFault
			})
			s, err := downloadObject(t.Context(), m.Bucket.Object("o"))
			require.NoError(t, err)
			require.Equal(t, "0123456789", s)
			log := f.Log()
			require.Len(t, log, 2)
			require.Equal(t, int64(5), log[0].Received)
			require.Equal(t, int64(5), log[1].Received)
		})
	})
}

func TestDiscardLog(t *testing.T) {
	bubble(t, func(t *testing.T, f *Server, m *Machine) {
		o := m.Bucket.Object("a").If(storage.Conditions{DoesNotExist: true})
		f.DiscardLog()
		mustUpload(t, o, "text", nil)
		require.Equal(t, []string{"a"}, f.Names())
		require.Empty(t, f.Log())
		requests, bodies := f.InFlight()
		require.Zero(t, requests+bodies)
	})
}

func TestCrash(t *testing.T) {
	bubble(t, func(t *testing.T, f *Server, m *Machine) {
		f.SetLatency(2 * time.Second)
		create := func(ctx context.Context, name string) error {
			_, err := uploadObject(ctx, m.Bucket.Object(name).If(storage.Conditions{DoesNotExist: true}), []byte("x"), nil)
			return err
		}
		ctx, cancel := context.WithCancel(t.Context())
		errs := make(chan error, 3)
		go func() { errs <- create(ctx, "applied") }()
		time.Sleep(900 * time.Millisecond)
		go func() { errs <- create(ctx, "on its way") }()
		time.Sleep(900 * time.Millisecond)
		m.Crash() // at 1.8s: the first was applied at 1s, the second would be at 1.9s
		go func() { errs <- create(ctx, "after") }()
		time.Sleep(time.Hour)
		require.Empty(t, errs)
		cancel()
		for range 3 {
			require.ErrorIs(t, <-errs, context.Canceled)
		}
		require.Equal(t, []string{"applied"}, f.Names())
		other := f.Machine("other")
		_, err := other.Bucket.Object("applied").Attrs(t.Context())
		require.NoError(t, err)
	})
}

// A request that is on its way lands after its sender gave up, or crashed.
func TestStray(t *testing.T) {
	bubble(t, func(t *testing.T, f *Server, m *Machine) {
		f.OnRequest(func(context.Context, *Request) Fault { return Stray })
		for _, name := range []string{"o", "p", "o"} {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			_, err := uploadObject(ctx, m.Bucket.Object(name).If(storage.Conditions{DoesNotExist: true}), []byte("x"), nil)
			cancel()
			require.ErrorIs(t, err, context.DeadlineExceeded)
			require.Empty(t, f.Names())
		}
		m.Crash()
		f.Land()
		require.Equal(t, []string{"o", "p"}, f.Names())
		log := f.Log()
		require.True(t, log[0].Applied && log[1].Applied)
		require.False(t, log[2].Applied) // refused: it exists
		f.Remove("o")
		f.Land()
		require.Nil(t, f.Get("o"))
	})
}

// A reset need not mean that nothing comes of the request. Strays land one at a
// time, in any order.
func TestStrayReset(t *testing.T) {
	bubble(t, func(t *testing.T, f *Server, m *Machine) {
		f.OnRequest(func(context.Context, *Request) Fault { return StrayReset })
		once := storage.WithPolicy(storage.RetryNever)
		for _, name := range []string{"o", "p", "q"} {
			_, err := uploadObject(t.Context(), m.Bucket.Object(name).Retryer(once).If(storage.Conditions{DoesNotExist: true}), []byte("x"), nil)
			require.ErrorIs(t, err, syscall.ECONNRESET)
			require.Empty(t, f.Names())
		}
		f.LandOne(1)
		require.Equal(t, []string{"p"}, f.Names())
		require.Equal(t, []bool{false, true, false}, []bool{f.Log()[0].Applied, f.Log()[1].Applied, f.Log()[2].Applied})
		var left []string
		for _, r := range f.Strays() {
			left = append(left, r.Object)
		}
		require.Equal(t, []string{"o", "q"}, left)
		f.Land()
		require.Equal(t, []string{"o", "p", "q"}, f.Names())
		require.Empty(t, f.Strays())
	})
}

// A hook may block until the context of its request ends. The request is not
// applied then, unless the hook sends it astray.
func TestHooksBlock(t *testing.T) {
	bubble(t, func(t *testing.T, f *Server, m *Machine) {
		create := func(name string) error {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			_, err := uploadObject(ctx, m.Bucket.Object(name).If(storage.Conditions{DoesNotExist: true}), []byte("x"), nil)
			return err
		}
		for _, fault := range []Fault{NoFault, LostReset, Stray} {
			f.OnRequest(func(ctx context.Context, r *Request) Fault {
				<-ctx.Done()
				return fault
			})
			require.ErrorIs(t, create(fault.String()), context.DeadlineExceeded)
			require.Empty(t, f.Names())
		}
		f.Land()
		require.Equal(t, []string{"Stray"}, f.Names())

		f.OnRequest(nil)
		f.OnAnswer(func(ctx context.Context, r *Request) { <-ctx.Done() })
		require.ErrorIs(t, create("answer"), context.DeadlineExceeded)
		require.NotNil(t, f.Get("answer"))
	})
}

// Whoever sees the answer sees what it says. The log does not keep it.
func TestAnswers(t *testing.T) {
	bubble(t, func(t *testing.T, f *Server, m *Machine) {
		f.Put("o", []byte("content"), nil)
		var answers []Request
		f.OnAnswer(func(_ context.Context, r *Request) { answers = append(answers, *r) })
		_, err := downloadObject(t.Context(), m.Bucket.Object("o"))
		require.NoError(t, err)
		_, err = downloadObject(t.Context(), m.Bucket.Object("absent"))
		require.Error(t, err)
		listObjects(t, m, nil, 0)
		require.Equal(t, "content", string(answers[0].Body))
		require.Equal(t, http.StatusNotFound, answers[1].Status)
		require.Contains(t, string(answers[2].Body), `"name":"o"`)
		for _, r := range f.Log() {
			require.Nil(t, r.Body)
		}
	})
}

// What was handed out stays as it was.
func TestObjects(t *testing.T) {
	bubble(t, func(t *testing.T, f *Server, m *Machine) {
		data, metadata := []byte("x"), map[string]string{"k": "v"}
		g := f.Put("o", data, metadata)
		data[0], metadata["k"] = 'y', "w"
		before, all := f.Get("o"), f.Objects()
		time.Sleep(time.Second)
		attrs, err := m.Bucket.Object("o").If(storage.Conditions{GenerationMatch: g}).
			Update(t.Context(), storage.ObjectAttrsToUpdate{Metadata: map[string]string{"l": "1"}})
		require.NoError(t, err)
		f.SetMetadata("o", map[string]string{"m": "2"})
		f.Put("p", nil, nil)
		require.Len(t, all, 1)
		require.Same(t, before, all["o"])
		require.Equal(t, "x", string(before.Data))
		require.Equal(t, map[string]string{"k": "v"}, before.Metadata)
		require.Equal(t, map[string]string{"k": "v", "l": "1"}, attrs.Metadata)

		now := f.Get("o")
		require.Equal(t, map[string]string{"m": "2"}, now.Metadata)
		require.Equal(t, int64(3), now.Metageneration)
		require.Equal(t, g, now.Generation)
		require.True(t, now.Updated.After(before.Updated))
		sum := md5.Sum([]byte("x"))
		require.Equal(t, base64.StdEncoding.EncodeToString(sum[:]), now.MD5)
		require.Equal(t, sum[:], attrs.MD5)

		f.PutAt("q", nil, nil, time.Unix(7, 0))
		require.Equal(t, time.Unix(7, 0).UTC(), f.Get("q").Created)
		require.Equal(t, []string{"o", "p", "q"}, f.Names())
		f.Remove("absent")
		f.Remove("p")
		require.Equal(t, []string{"o", "q"}, f.Names())
		require.Nil(t, f.Get("p"))
	})
}

func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := New()
		m := f.Machine("m")
		for _, hold := range []func(){
			func() { f.OnRequest(func(context.Context, *Request) Fault { return Hung }) },
			func() { f.OnRequest(nil); m.Pause() },
			func() { f.SetLatency(time.Hour) },
		} {
			hold()
			go func() {
				_, err := m.Bucket.Object("o").Attrs(t.Context())
				require.ErrorIs(t, err, errClosed)
			}()
			synctest.Wait()
		}
		requests, _ := f.InFlight()
		require.Equal(t, 3, requests)
		f.Close()
		synctest.Wait()
		requests, _ = f.InFlight()
		require.Zero(t, requests)
		m.Resume()
		f.SetLatency(0)
		_, err := uploadObject(t.Context(), m.Bucket.Object("o").If(storage.Conditions{DoesNotExist: true}), nil, nil)
		require.Error(t, err)
		require.Empty(t, f.Names())
	})
}

func TestPause(t *testing.T) {
	bubble(t, func(t *testing.T, f *Server, m *Machine) {
		start := time.Now()
		m.Pause()
		m.Pause()
		go func() {
			time.Sleep(time.Minute)
			require.Nil(t, f.Get("o"))
			m.Resume()
		}()
		mustUpload(t, m.Bucket.Object("o").If(storage.Conditions{DoesNotExist: true}), "x", nil)
		require.Equal(t, time.Minute, time.Since(start))

		// A hook may pause the request that it is called for.
		f.OnRequest(func(_ context.Context, r *Request) Fault {
			if r.Op == "insert" {
				m.Pause()
			}
			return NoFault
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, err := uploadObject(ctx, m.Bucket.Object("p").If(storage.Conditions{DoesNotExist: true}), nil, nil)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Nil(t, f.Get("p"))
		m.Resume()
		m.Resume()

		// An answer waits too.
		f.OnRequest(nil)
		f.OnAnswer(func(_ context.Context, r *Request) { m.Pause() })
		go func() {
			time.Sleep(time.Minute)
			require.NotNil(t, f.Get("q"))
			m.Resume()
		}()
		start = time.Now()
		mustUpload(t, m.Bucket.Object("q").If(storage.Conditions{DoesNotExist: true}), "x", nil)
		require.Equal(t, time.Minute, time.Since(start))
	})
}

func TestLatency(t *testing.T) {
	bubble(t, func(t *testing.T, f *Server, m *Machine) {
		f.SetLatency(100 * time.Millisecond)
		var wg sync.WaitGroup
		start := time.Now()
		for i := range 3 {
			wg.Go(func() {
				o := m.Bucket.Object(strconv.Itoa(i))
				_, err := uploadObject(t.Context(), o.If(storage.Conditions{DoesNotExist: true}), nil, nil)
				require.NoError(t, err)
			})
		}
		wg.Wait()
		require.Equal(t, 100*time.Millisecond, time.Since(start))
		require.Equal(t, 1, SerialTrips(f.Log()))
		_, err := m.Bucket.Object("0").Attrs(t.Context())
		require.NoError(t, err)
		wg.Go(func() {
			_, err := m.Bucket.Object("1").Attrs(t.Context())
			require.NoError(t, err)
		})
		time.Sleep(50 * time.Millisecond)
		_, err = m.Bucket.Object("2").Attrs(t.Context())
		require.NoError(t, err)
		wg.Wait()
		require.Equal(t, 3, SerialTrips(f.Log()))
		require.Len(t, f.Log(), 6)
		require.Equal(t, 5, f.Log()[5].MachineN)

		// The context ends on the way there, and on the way back.
		for _, tt := range []struct {
			after   time.Duration
			applied bool
		}{{20 * time.Millisecond, false}, {80 * time.Millisecond, true}} {
			ctx, cancel := context.WithTimeout(t.Context(), tt.after)
			_, err := uploadObject(ctx, m.Bucket.Object("n").If(storage.Conditions{DoesNotExist: true}), nil, nil)
			cancel()
			require.ErrorIs(t, err, context.DeadlineExceeded)
			require.Equal(t, tt.applied, f.Get("n") != nil)
		}
	})
}

func TestRates(t *testing.T) {
	once := storage.WithPolicy(storage.RetryNever)
	for _, enforced := range []bool{false, true} {
		t.Run(fmt.Sprintf("enforced %v", enforced), func(t *testing.T) {
			bubble(t, func(t *testing.T, f *Server, m *Machine) {
				f.EnforceRates(enforced)
				tooSoon, violations := http.StatusOK, 1
				if enforced {
					tooSoon, violations = http.StatusTooManyRequests, 0
				}
				o := m.Bucket.Object("o").Retryer(once)
				write := func() int {
					var g int64
					if have := f.Get("o"); have != nil {
						g = have.Generation
					}
					_, err := uploadObject(t.Context(), o.If(storage.Conditions{GenerationMatch: g, DoesNotExist: g == 0}), nil, nil)
					return httpStatus(err)
				}
				update := func() int {
					_, err := o.If(storage.Conditions{MetagenerationMatch: f.Get("o").Metageneration}).
						Update(t.Context(), storage.ObjectAttrsToUpdate{Metadata: map[string]string{"k": "v"}})
					return httpStatus(err)
				}
				require.Equal(t, 200, write())
				require.Equal(t, 200, update()) // a create and an update at once are ordinary
				require.Empty(t, f.RateViolations())

				time.Sleep(999 * time.Millisecond)
				require.Equal(t, tooSoon, write())
				require.Len(t, f.RateViolations(), violations)
				time.Sleep(time.Second)
				require.Equal(t, 200, write())
				require.Equal(t, 200, update())
				time.Sleep(999 * time.Millisecond)
				require.Equal(t, tooSoon, update())
				require.Len(t, f.RateViolations(), 2*violations)
				time.Sleep(time.Second)
				require.Equal(t, 200, update())
				require.Len(t, f.RateViolations(), 2*violations)

				// What is refused does not count.
				time.Sleep(time.Second)
				for range 2 {
					_, err := uploadObject(t.Context(), o.If(storage.Conditions{DoesNotExist: true}), nil, nil)
					require.Equal(t, http.StatusPreconditionFailed, httpStatus(err))
				}
				require.Equal(t, 200, write())
				require.Len(t, f.RateViolations(), 2*violations)

				// All kinds of changes count together.
				f.ShareRates(true)
				time.Sleep(time.Second)
				require.Equal(t, 200, update())
				for i, change := range []func() int{write, update, func() int {
					return httpStatus(o.If(storage.Conditions{GenerationMatch: f.Get("o").Generation}).Delete(t.Context()))
				}, write} {
					time.Sleep(time.Second - 1)
					require.Equal(t, tooSoon, change())
					require.Len(t, f.RateViolations(), (3+i)*violations)
					if enforced {
						time.Sleep(time.Nanosecond)
						require.Equal(t, 200, change())
					}
				}
			})
		})
	}
}

func TestPermissions(t *testing.T) {
	tests := []struct {
		permission string
		denied     []string // operations
	}{
		{"storage.objects.create", []string{"create", "overwrite"}},
		{"storage.objects.delete", []string{"overwrite", "delete"}},
		{"storage.objects.update", []string{"update"}},
		{"storage.objects.get", []string{"attrs", "read"}},
		{"storage.objects.list", []string{"list"}},
		{"storage.buckets.get", []string{"bucket"}},
	}
	for _, tt := range tests {
		t.Run(tt.permission, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *Server, m *Machine) {
				g := f.Put("o", []byte("x"), nil)
				at := storage.Conditions{GenerationMatch: g}
				all := map[string]func() error{
					"create": func() error {
						_, err := uploadObject(t.Context(), m.Bucket.Object("n").If(storage.Conditions{DoesNotExist: true}), nil, nil)
						return err
					},
					"update": func() error {
						_, err := m.Bucket.Object("o").If(at).Update(t.Context(), storage.ObjectAttrsToUpdate{Metadata: map[string]string{"k": "v"}})
						return err
					},
					"attrs": func() error { _, err := m.Bucket.Object("o").Attrs(t.Context()); return err },
					"read":  func() error { _, err := downloadObject(t.Context(), m.Bucket.Object("o")); return err },
					"list":  func() error { _, err := m.Bucket.Objects(t.Context(), nil).Next(); return err },
					"bucket": func() error {
						_, err := m.Bucket.Attrs(t.Context())
						return err
					},
					"overwrite": func() error {
						_, err := uploadObject(t.Context(), m.Bucket.Object("p").If(storage.Conditions{GenerationMatch: f.Put("p", nil, nil)}), nil, nil)
						return err
					},
					"delete": func() error {
						return m.Bucket.Object("q").If(storage.Conditions{GenerationMatch: f.Put("q", nil, nil)}).Delete(t.Context())
					},
				}
				asked := []string{tt.permission, "storage.objects.restore"}
				granted, err := m.Bucket.IAM().TestPermissions(t.Context(), asked)
				require.NoError(t, err)
				require.Equal(t, asked, granted)

				f.Deny(tt.permission)
				for name, op := range all {
					err := op()
					if !slices.Contains(tt.denied, name) {
						require.NoError(t, err, name)
						continue
					}
					require.Equal(t, http.StatusForbidden, httpStatus(err), name)
					require.ErrorContains(t, err, tt.permission, name)
				}
				granted, err = m.Bucket.IAM().TestPermissions(t.Context(), asked)
				require.NoError(t, err)
				require.Equal(t, asked[1:], granted)

				f.Remove("n")
				f.Allow(tt.permission)
				for name, op := range all {
					if name == "update" && !slices.Contains(tt.denied, name) {
						time.Sleep(time.Second)
					}
					require.NoError(t, op(), name)
				}
			})
		})
	}
	t.Run("none", func(t *testing.T) {
		bubble(t, func(t *testing.T, f *Server, m *Machine) {
			f.Deny("storage.objects.update")
			granted, err := m.Bucket.IAM().TestPermissions(t.Context(), []string{"storage.objects.update"})
			require.NoError(t, err)
			require.Empty(t, granted)
		})
	})
	t.Run("not answered", func(t *testing.T) {
		bubble(t, func(t *testing.T, f *Server, m *Machine) {
			for _, code := range []int{404, 501} {
				f.AnswerPermissions(code)
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				_, err := m.Bucket.IAM().TestPermissions(ctx, []string{"storage.objects.update"})
				cancel()
				require.Equal(t, code, httpStatus(err), "%v", err)
			}
			// The client takes 501 for a passing trouble.
			require.Greater(t, len(f.Log()), 3)
		})
	})
	t.Run("retention policy", func(t *testing.T) {
		bubble(t, func(t *testing.T, f *Server, m *Machine) {
			f.Retain(true)
			o := m.Bucket.Object("o")
			attrs := mustUpload(t, o.If(storage.Conditions{DoesNotExist: true}), "x", nil)
			at := o.If(storage.Conditions{GenerationMatch: attrs.Generation})
			_, err := at.Update(t.Context(), storage.ObjectAttrsToUpdate{Metadata: map[string]string{"k": "v"}})
			require.NoError(t, err)
			_, err = uploadObject(t.Context(), at, nil, nil)
			require.Equal(t, http.StatusForbidden, httpStatus(err))
			err = at.Delete(t.Context())
			require.Equal(t, http.StatusForbidden, httpStatus(err))
			var e *googleapi.Error
			require.ErrorAs(t, err, &e)
			require.Equal(t, "retentionPolicyNotMet", e.Errors[0].Reason)
		})
	})
}

func TestViolations(t *testing.T) {
	complete := func(f *Server, marker string) (generation int64) {
		metadata := map[string]string{}
		if marker != "" {
			metadata[marker] = "x"
		}
		f.Put("m/@v/v1.info", nil, nil)
		f.Put("m/@v/v1.mod", nil, metadata)
		return f.Put("m/@v/v1.zip", nil, nil)
	}
	tests := []struct {
		name string
		want int
		do   func(t *testing.T, f *Server, m *Machine) error
	}{
		{"upload", 1, func(t *testing.T, f *Server, m *Machine) error {
			_, err := uploadObject(t.Context(), m.Bucket.Object("o"), nil, nil)
			return err
		}},
		{"resumable upload", 1, func(t *testing.T, f *Server, m *Machine) error {
			_, err := uploadObject(t.Context(), m.Bucket.Object("o"), make([]byte, 300<<10), nil)
			return err
		}},
		{"update", 1, func(t *testing.T, f *Server, m *Machine) error {
			f.Put("o", nil, nil)
			_, err := m.Bucket.Object("o").Update(t.Context(), storage.ObjectAttrsToUpdate{Metadata: map[string]string{}})
			return err
		}},
		{"delete", 1, func(t *testing.T, f *Server, m *Machine) error {
			f.Put("o", nil, nil)
			return m.Bucket.Object("o").Delete(t.Context())
		}},
		{"delete under a metageneration only", 1, func(t *testing.T, f *Server, m *Machine) error {
			f.Put("o", nil, nil)
			return m.Bucket.Object("o").If(storage.Conditions{MetagenerationMatch: 1}).Delete(t.Context())
		}},
		{"update under a metageneration", 0, func(t *testing.T, f *Server, m *Machine) error {
			f.Put("o", nil, nil)
			_, err := m.Bucket.Object("o").If(storage.Conditions{MetagenerationMatch: 1}).Update(t.Context(), storage.ObjectAttrsToUpdate{Metadata: map[string]string{}})
			return err
		}},
		{"write over a complete version", 1, func(t *testing.T, f *Server, m *Machine) error {
			g := complete(f, "")
			_, err := uploadObject(t.Context(), m.Bucket.Object("m/@v/v1.zip").If(storage.Conditions{GenerationMatch: g}), nil, nil)
			return err
		}},
		{"write to one in progress", 0, func(t *testing.T, f *Server, m *Machine) error {
			g := complete(f, "in-progress")
			_, err := uploadObject(t.Context(), m.Bucket.Object("m/@v/v1.zip").If(storage.Conditions{GenerationMatch: g}), nil, nil)
			return err
		}},
		{"write to one long in progress", 0, func(t *testing.T, f *Server, m *Machine) error {
			g := complete(f, "in_progress")
			_, err := uploadObject(t.Context(), m.Bucket.Object("m/@v/v1.zip").If(storage.Conditions{GenerationMatch: g}), nil, nil)
			return err
		}},
		{"write to a partial one", 0, func(t *testing.T, f *Server, m *Machine) error {
			g := complete(f, "")
			f.Remove("m/@v/v1.info")
			_, err := uploadObject(t.Context(), m.Bucket.Object("m/@v/v1.zip").If(storage.Conditions{GenerationMatch: g}), nil, nil)
			return err
		}},
		{"update and delete of a complete version", 0, func(t *testing.T, f *Server, m *Machine) error {
			o := m.Bucket.Object("m/@v/v1.zip").If(storage.Conditions{GenerationMatch: complete(f, "")})
			if _, err := o.Update(t.Context(), storage.ObjectAttrsToUpdate{Metadata: map[string]string{}}); err != nil {
				return err
			}
			return o.Delete(t.Context())
		}},
		{"a list that the fake does not know", 1, func(t *testing.T, f *Server, m *Machine) error {
			_, err := m.Bucket.Objects(t.Context(), &storage.Query{Delimiter: "/"}).Next()
			if err == iterator.Done {
				err = nil
			}
			return err
		}},
		{"a request that the fake does not know", 1, func(t *testing.T, f *Server, m *Machine) error {
			f.Put("o", nil, nil)
			_, err := m.Bucket.Object("p").CopierFrom(m.Bucket.Object("o")).Run(t.Context())
			require.Equal(t, http.StatusBadRequest, httpStatus(err))
			return nil
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tolerant(t, func(t *testing.T, f *Server, m *Machine) {
				require.NoError(t, tt.do(t, f, m))
				require.Len(t, f.Violations(), tt.want)
			})
		})
	}
}

// The same over a socket, in real time.
func TestListens(t *testing.T) {
	f := New()
	server := httptest.NewServer(f.Handler())
	defer server.Close()
	defer server.CloseClientConnections()
	defer f.Close()
	wire := &http.Transport{}
	defer wire.CloseIdleConnections()
	over := func(name string, opts ...option.ClientOption) *Machine {
		m := f.Register(name)
		m.Connect(m.Over(wire), append(opts, option.WithEndpoint(server.URL+"/storage/v1/"))...)
		return m
	}
	m := over("m")
	create := storage.Conditions{DoesNotExist: true}
	once := storage.WithPolicy(storage.RetryNever)

	large := bytes.Repeat([]byte("0123456789"), 60<<10)
	_, err := uploadObject(t.Context(), m.Bucket.Object("a/b").If(create), large, nil)
	require.NoError(t, err)
	for _, m := range []*Machine{m, over("json", storage.WithJSONReads())} {
		s, err := downloadObject(t.Context(), m.Bucket.Object("a/b"))
		require.NoError(t, err)
		require.Equal(t, string(large), s)
	}
	names, _ := listObjects(t, m, nil, 0)
	require.Equal(t, []string{"a/b"}, names)
	require.Equal(t, []string{"start", "chunk", "chunk", "chunk", "get", "get", "list"}, ops(f.Log()))
	require.Equal(t, "m", f.Log()[0].Machine)
	require.Equal(t, "json", f.Log()[5].Machine)

	for i, tt := range []struct {
		fault   Fault
		applied bool
		want    error
	}{
		{ConnectionRefused, false, syscall.ECONNRESET},
		{LostReset, true, syscall.ECONNRESET},
		{LostEOF, true, io.EOF},
		{LostBody, true, io.ErrUnexpectedEOF},
		{Hung, false, context.DeadlineExceeded},
		{HungApplied, true, context.DeadlineExceeded},
		{CrashBefore, false, context.DeadlineExceeded},
	} {
		f.OnRequest(func(context.Context, *Request) Fault { return tt.fault })
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		if tt.want == context.DeadlineExceeded {
			cancel()
			ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
		}
		name := strconv.Itoa(i)
		_, err := uploadObject(ctx, m.Bucket.Object(name).Retryer(once).If(create), []byte("x"), nil)
		cancel()
		require.ErrorIs(t, err, tt.want, tt.fault)
		require.Equal(t, tt.applied, f.Get(name) != nil, tt.fault)
	}
	f.OnRequest(nil)

	// The environment variable of the client library leads there as well.
	t.Setenv("STORAGE_EMULATOR_HOST", strings.TrimPrefix(server.URL, "http://"))
	client, err := storage.NewClient(t.Context())
	require.NoError(t, err)
	defer client.Close()
	o := client.Bucket(Bucket).Object("env")
	_, err = uploadObject(t.Context(), o.If(create), large, nil)
	require.NoError(t, err)
	s, err := downloadObject(t.Context(), o)
	require.NoError(t, err)
	require.Equal(t, string(large), s)
}
