package fakegcs

import (
	"bytes"
	"context"
	"crypto/md5"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"cloud.google.com/go/storage"
	"github.com/stretchr/testify/require"
	"google.golang.org/api/iterator"
	"google.golang.org/api/option"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// step is one thing that a client did, and what came of it.
type step struct {
	did    string
	code   int // as of HTTP
	attrs  *storage.ObjectAttrs
	read   string
	reader storage.ReaderObjectAttrs
}

var httpCodes = map[codes.Code]int{
	codes.InvalidArgument:    http.StatusBadRequest,
	codes.PermissionDenied:   http.StatusForbidden,
	codes.NotFound:           http.StatusNotFound,
	codes.Aborted:            http.StatusConflict,
	codes.FailedPrecondition: http.StatusPreconditionFailed,
	codes.OutOfRange:         http.StatusRequestedRangeNotSatisfiable,
	codes.ResourceExhausted:  http.StatusTooManyRequests,
	codes.Unimplemented:      http.StatusNotImplemented,
	codes.Unavailable:        http.StatusServiceUnavailable,
}

// script runs steps against a bucket and notes what came of them.
type script struct {
	*testing.T
	*Server
	bucket *storage.BucketHandle
	steps  []step
}

func (s *script) note(did string, err error) *step {
	code := httpStatus(err)
	if e, ok := status.FromError(err); ok && err != nil && code == 0 {
		code = httpCodes[e.Code()]
	}
	if err != nil {
		require.NotZero(s, code, "%s: %v", did, err)
	}
	s.steps = append(s.steps, step{did: did, code: code})
	return &s.steps[len(s.steps)-1]
}

// keep notes the attributes, without those that only the JSON API has.
func (n *step) keep(attrs *storage.ObjectAttrs) {
	if attrs == nil {
		return
	}
	kept := *attrs
	kept.ACL, kept.Owner, kept.Etag, kept.MediaLink = nil, "", "", ""
	if len(kept.MD5) == 0 {
		kept.MD5 = nil
	}
	n.attrs = &kept
}

func (s *script) upload(name string, cond storage.Conditions, size, chunk int, sum []byte, metadata map[string]string) *storage.ObjectAttrs {
	o := s.bucket.Object(name)
	if cond != (storage.Conditions{}) {
		o = o.If(cond)
	}
	w := o.NewWriter(s.Context())
	w.ChunkSize, w.MD5, w.Metadata, w.ContentType = chunk, sum, metadata, "application/zip"
	_, err := io.Copy(w, strings.NewReader(strings.Repeat("x", size)))
	if err == nil {
		err = w.Close()
	} else {
		w.Close()
	}
	n := s.note("upload "+name, err)
	if err == nil {
		n.keep(w.Attrs())
	}
	return n.attrs
}

func (s *script) update(name string, cond storage.Conditions, metadata map[string]string) *storage.ObjectAttrs {
	attrs, err := s.bucket.Object(name).If(cond).Update(s.Context(), storage.ObjectAttrsToUpdate{Metadata: metadata})
	n := s.note("update "+name, err)
	n.keep(attrs)
	return n.attrs
}

func (s *script) delete(o *storage.ObjectHandle) {
	s.note("delete "+o.ObjectName(), o.Delete(s.Context()))
}

func (s *script) attrs(o *storage.ObjectHandle) {
	attrs, err := o.Attrs(s.Context())
	s.note("attrs "+o.ObjectName(), err).keep(attrs)
}

func (s *script) read(o *storage.ObjectHandle, offset, length int64) {
	r, err := o.NewRangeReader(s.Context(), offset, length)
	n := s.note("read "+o.ObjectName(), err)
	if err != nil {
		return
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	require.NoError(s, err)
	n.read, n.reader = string(b), r.Attrs
	n.reader.Decompressed = false
}

func (s *script) list(q *storage.Query, pageSize int) {
	it := s.bucket.Objects(s.Context(), q)
	it.PageInfo().MaxSize = pageSize
	for {
		attrs, err := it.Next()
		if err == iterator.Done {
			return
		}
		s.note("list", err).keep(attrs)
		if err != nil {
			return
		}
	}
}

// Over gRPC the bucket does what it does over HTTP, to the last attribute.
func TestGRPCAgrees(t *testing.T) {
	for name, run := range map[string]func(s *script){
		"conditions": func(s *script) {
			type cond = storage.Conditions
			s.upload("a", cond{DoesNotExist: true}, 10, 256<<10, nil, nil)
			s.upload("a", cond{DoesNotExist: true}, 10, 256<<10, nil, nil)
			a := s.upload("a", cond{GenerationMatch: s.Get("a").Generation}, 11, 256<<10, nil, map[string]string{"in-progress": "x", "k": "v"})
			s.upload("a", cond{GenerationMatch: 1}, 10, 256<<10, nil, nil)
			s.upload("a", cond{GenerationMatch: a.Generation, MetagenerationMatch: 2}, 10, 256<<10, nil, nil)
			s.update("a", cond{GenerationMatch: 1}, map[string]string{})
			s.update("a", cond{GenerationMatch: a.Generation, MetagenerationMatch: 2}, map[string]string{})
			s.update("a", cond{GenerationMatch: a.Generation, MetagenerationMatch: 1}, map[string]string{"in-progress": "y"})
			s.update("a", cond{GenerationMatch: a.Generation, MetagenerationMatch: 2}, map[string]string{"k": ""})
			s.update("a", cond{GenerationMatch: a.Generation, MetagenerationMatch: 3}, map[string]string{})
			s.update("a", cond{GenerationMatch: a.Generation, MetagenerationMatch: 4}, map[string]string{})
			s.update("b", cond{GenerationMatch: 1}, map[string]string{})
			s.attrs(s.bucket.Object("a"))
			s.attrs(s.bucket.Object("a").Generation(a.Generation))
			s.attrs(s.bucket.Object("a").Generation(1))
			s.attrs(s.bucket.Object("b"))
			s.read(s.bucket.Object("a").If(cond{GenerationMatch: 1}), 0, -1)
			s.read(s.bucket.Object("a").If(cond{MetagenerationMatch: 5}), 0, -1)
			s.delete(s.bucket.Object("a").If(cond{GenerationMatch: 1}))
			s.delete(s.bucket.Object("a").If(cond{GenerationMatch: a.Generation, MetagenerationMatch: 1}))
			s.delete(s.bucket.Object("a").If(cond{GenerationMatch: a.Generation}))
			s.delete(s.bucket.Object("a").If(cond{GenerationMatch: a.Generation}))
		},
		"uploads": func(s *script) {
			create := storage.Conditions{DoesNotExist: true}
			wrong := md5.Sum([]byte("something else"))
			for _, size := range []int{0, 1, 256<<10 - 1, 256 << 10, 256<<10 + 1, 3 << 20} {
				for _, chunk := range []int{0, 256 << 10, 1 << 20} {
					right := md5.Sum(bytes.Repeat([]byte("x"), size))
					s.upload("a", create, size, chunk, wrong[:], nil)
					s.upload("a", create, size, chunk, right[:], map[string]string{"k": "v"})
					s.upload("a", create, size, chunk, nil, nil)
					s.Remove("a")
				}
			}
		},
		"reads": func(s *script) {
			s.Put("empty", nil, nil)
			s.Put("a", []byte("0123456789"), map[string]string{"k": "v"})
			s.Put("large", bytes.Repeat([]byte("0123456789"), 500_000), nil)
			s.read(s.bucket.Object("large"), 0, -1)
			s.read(s.bucket.Object("large"), 1_000_000, 3_000_000)
			s.read(s.bucket.Object("empty"), 0, -1)
			s.read(s.bucket.Object("none"), 0, -1)
			for _, span := range [][2]int64{{0, -1}, {0, 3}, {3, 4}, {3, -1}, {-3, -1}, {0, 100}} {
				s.read(s.bucket.Object("a"), span[0], span[1])
			}
		},
		"lists": func(s *script) {
			for _, name := range []string{"a/1", "a/2", "a/3", "b"} {
				s.Put(name, []byte(name), map[string]string{"name": name})
			}
			s.list(nil, 0)
			s.list(nil, 3)
			s.list(&storage.Query{Prefix: "a/", StartOffset: "a/2", EndOffset: "a/3"}, 1)
			q := &storage.Query{Prefix: "a/", Projection: storage.ProjectionNoACL}
			s.list(q, 2)
			require.NoError(s, q.SetAttrSelection([]string{"Name", "Generation", "Metadata"}))
			s.list(q, 2)
		},
		"permissions": func(s *script) {
			s.Put("a", nil, nil)
			for _, p := range []string{"storage.objects.create", "storage.objects.delete", "storage.objects.get", "storage.objects.list", "storage.objects.update"} {
				s.Deny(p)
				granted, err := s.bucket.IAM().TestPermissions(s.Context(), []string{p, "storage.buckets.get"})
				s.note("granted "+strings.Join(granted, " "), err)
				s.upload("b", storage.Conditions{DoesNotExist: true}, 1, 256<<10, nil, nil)
				s.update("a", storage.Conditions{GenerationMatch: 1}, map[string]string{})
				s.read(s.bucket.Object("a"), 0, -1)
				s.attrs(s.bucket.Object("a"))
				s.list(nil, 0)
				s.delete(s.bucket.Object("b").If(storage.Conditions{GenerationMatch: 1}))
				s.Allow(p)
			}
			s.AnswerPermissions(http.StatusNotImplemented)
			_, err := s.bucket.Retryer(storage.WithPolicy(storage.RetryNever)).IAM().TestPermissions(s.Context(), []string{"storage.buckets.get"})
			require.Error(s, err)
		},
		"no bucket": func(s *script) {
			s.bucket = s.Server.machines["m"].Client.Bucket("another")
			s.attrs(s.bucket.Object("a"))
			s.read(s.bucket.Object("a"), 0, -1)
			s.upload("a", storage.Conditions{DoesNotExist: true}, 1, 256<<10, nil, nil)
		},
		"answers": func(s *script) {
			s.Put("a", nil, nil)
			s.bucket = s.bucket.Retryer(storage.WithPolicy(storage.RetryNever))
			for _, fault := range []Fault{Unavailable, TooMany, PreconditionFailed} {
				s.OnRequest(func(context.Context, *Request) Fault { return fault })
				s.upload("b", storage.Conditions{DoesNotExist: true}, 1, 256<<10, nil, nil)
				s.upload("b", storage.Conditions{DoesNotExist: true}, 1, 0, nil, nil)
				s.update("a", storage.Conditions{GenerationMatch: 1}, map[string]string{})
				s.attrs(s.bucket.Object("a"))
				s.read(s.bucket.Object("a"), 0, -1)
				s.list(nil, 0)
				s.delete(s.bucket.Object("a").If(storage.Conditions{GenerationMatch: 1}))
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			over := func(connect func(m *Machine)) (steps []step, objects map[string]*Object) {
				synctest.Test(t, func(t *testing.T) {
					f := New()
					defer f.Close()
					m := f.Register("m")
					connect(m)
					s := &script{t, f, m.Bucket, nil}
					run(s)
					steps, objects = s.steps, f.Objects()
				})
				return steps, objects
			}
			wantSteps, wantObjects := over(func(m *Machine) { m.Connect(m) })
			steps, objects := over(func(m *Machine) { m.ConnectGRPC() })
			require.Len(t, steps, len(wantSteps))
			for i := range steps {
				require.Equal(t, wantSteps[i], steps[i])
			}
			require.Equal(t, wantObjects, objects)
		})
	}
}

// overGRPC runs a test with a machine that uses gRPC.
func overGRPC(t *testing.T, test func(t *testing.T, f *Server, m *Machine)) {
	synctest.Test(t, func(t *testing.T) {
		f := New()
		defer f.Close()
		m := f.Register("m")
		m.ConnectGRPC()
		test(t, f, m)
	})
}

// A fault of a request is one of a call.
func TestGRPCFaults(t *testing.T) {
	for fault, applied := range map[Fault]bool{
		ConnectionRefused: false, LostReset: true, LostEOF: true, LostBody: true, Unavailable: false, StrayReset: false,
	} {
		t.Run(fault.String(), func(t *testing.T) {
			overGRPC(t, func(t *testing.T, f *Server, m *Machine) {
				g := f.Put("a", nil, nil)
				f.OnRequest(func(context.Context, *Request) Fault { return fault })
				_, err := m.Bucket.Object("a").If(storage.Conditions{GenerationMatch: g}).Retryer(storage.WithPolicy(storage.RetryNever)).
					Update(t.Context(), storage.ObjectAttrsToUpdate{Metadata: map[string]string{"k": "v"}})
				require.Equal(t, codes.Unavailable, status.Code(errors.Unwrap(err)), "%v", err)
				require.Equal(t, applied, f.Get("a").Metadata["k"] == "v")
			})
		})
	}
	for _, fault := range []Fault{Hung, HungApplied, Stray, CrashBefore, CrashAfter} {
		t.Run(fault.String(), func(t *testing.T) {
			overGRPC(t, func(t *testing.T, f *Server, m *Machine) {
				f.OnRequest(func(context.Context, *Request) Fault { return fault })
				start := time.Now()
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				_, err := m.Bucket.Object("a").Attrs(ctx)
				require.ErrorContains(t, err, "DeadlineExceeded")
				require.Equal(t, time.Minute, time.Since(start))
			})
		})
	}
}

// A resumable upload goes on from what has arrived when an answer was lost, at its
// beginning, in its middle and at its end.
func TestGRPCResumes(t *testing.T) {
	content := bytes.Repeat([]byte("0123456789abcdef"), 1<<20/16)
	for _, fault := range []Fault{Unavailable, LostReset, HalfChunk} {
		for n := range 5 { // the start, three chunks, the end
			overGRPC(t, func(t *testing.T, f *Server, m *Machine) {
				f.OnRequest(func(_ context.Context, r *Request) Fault {
					if r.N == n {
						return fault
					}
					return NoFault
				})
				w := m.Bucket.Object("a").If(storage.Conditions{DoesNotExist: true}).NewWriter(t.Context())
				w.ChunkSize = 256 << 10
				_, err := w.Write(content)
				require.NoError(t, err)
				require.NoError(t, w.Close(), "%v of request %d: %v", fault, n, f.Log())
				require.True(t, bytes.Equal(content, f.Get("a").Data))
				require.Greater(t, len(f.Log()), 5)
			})
		}
	}
}

// Of an upload that its sender breaks off nothing is stored.
func TestGRPCBreaksOff(t *testing.T) {
	for _, chunk := range []int{0, 256 << 10} {
		overGRPC(t, func(t *testing.T, f *Server, m *Machine) {
			ctx, cancel := context.WithCancel(t.Context())
			w := m.Bucket.Object("a").If(storage.Conditions{DoesNotExist: true}).NewWriter(ctx)
			w.ChunkSize = chunk
			_, err := w.Write(make([]byte, 1<<20))
			require.NoError(t, err)
			cancel()
			//lint:ignore SA1019 after cancel alone, Close can still publish what was sent
			w.CloseWithError(context.Canceled)
			require.Error(t, w.Close())
			synctest.Wait()
			require.Empty(t, f.Names())
		})
	}
}

func TestGRPCUnknown(t *testing.T) {
	overGRPC(t, func(t *testing.T, f *Server, m *Machine) {
		_, err := m.Bucket.Object("b").CopierFrom(m.Bucket.Object("a")).Run(t.Context())
		require.ErrorContains(t, err, "not known to the fake: RewriteObject")
		_, err = m.Bucket.Object("a").Update(t.Context(), storage.ObjectAttrsToUpdate{ContentType: "text/plain"})
		require.ErrorContains(t, err, "not known to the fake: an update of content_type")
	})
}

// The bucket can be had over sockets too, as STORAGE_EMULATOR_HOST_GRPC wants it.
func TestGRPCListens(t *testing.T) {
	f := New()
	defer f.Close()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	server := f.Register("m").GRPCServer()
	go server.Serve(listener)
	defer server.Stop()
	conn, err := grpc.NewClient(listener.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	client, err := storage.NewGRPCClient(t.Context(), option.WithGRPCConn(conn), option.WithoutAuthentication(), storage.WithDisabledClientMetrics())
	require.NoError(t, err)
	defer client.Close()
	f.Put("a", []byte("content"), nil)
	got, err := downloadObject(t.Context(), client.Bucket(Bucket).Object("a"))
	require.NoError(t, err)
	require.Equal(t, "content", got)
}
