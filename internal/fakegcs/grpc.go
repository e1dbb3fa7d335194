package fakegcs

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"mime/multipart"
	"net"
	"net/http"
	"net/textproto"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"cloud.google.com/go/storage"
	"google.golang.org/api/option"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
)

// The gRPC front. Each call becomes requests of the JSON or XML API, made by the
// machine's own RoundTrip: conditions, faults, hooks, permissions and the log are
// those of HTTP. The client does not export the Go types of its messages, so the
// front finds them by name and reads them as JSON.

// GRPCServer returns a server of google.storage.v2.Storage whose calls are the
// machine's. The address of its listener is what STORAGE_EMULATOR_HOST_GRPC may be
// set to. It starts goroutines.
func (m *Machine) GRPCServer() *grpc.Server {
	return grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		return m.serveGRPC(stream)
	}))
}

// ConnectGRPC gives the machine a client that uses gRPC, over a connection in
// memory. Close ends it.
func (m *Machine) ConnectGRPC(opts ...option.ClientOption) {
	listener, server := bufconn.Listen(1<<20), m.GRPCServer()
	go server.Serve(listener)
	go func() {
		<-m.fake.closed
		server.Stop()
	}()
	conn, err := grpc.NewClient("passthrough:///fakegcs",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	if err != nil {
		panic(err) // the options contradict each other
	}
	client, err := storage.NewGRPCClient(context.Background(), append([]option.ClientOption{
		option.WithGRPCConn(conn),
		option.WithoutAuthentication(),
		storage.WithDisabledClientMetrics(),
	}, opts...)...)
	if err != nil {
		panic(err)
	}
	m.Client, m.Bucket = client, client.Bucket(Bucket)
}

// rpc is one call.
type rpc struct {
	grpc.ServerStream
	machine       *Machine
	input, output protoreflect.MessageType
}

func (m *Machine) serveGRPC(stream grpc.ServerStream) error {
	name, _ := grpc.MethodFromServerStream(stream)
	name = name[strings.LastIndexByte(name, '/')+1:]
	serve := map[string]func(*rpc) error{
		"BidiWriteObject":     (*rpc).bidiWriteObject,
		"StartResumableWrite": (*rpc).startResumableWrite,
		"QueryWriteStatus":    (*rpc).queryWriteStatus,
		"ReadObject":          (*rpc).readObject,
		"GetObject":           (*rpc).getObject,
		"UpdateObject":        (*rpc).updateObject,
		"DeleteObject":        (*rpc).deleteObject,
		"ListObjects":         (*rpc).listObjects,
		"TestIamPermissions":  (*rpc).testIamPermissions,
	}[name]
	if serve == nil {
		return status.Error(codes.Unimplemented, "not known to the fake: "+name)
	}
	service, err := protoregistry.GlobalFiles.FindDescriptorByName("google.storage.v2.Storage")
	if err != nil {
		return err
	}
	method := service.(protoreflect.ServiceDescriptor).Methods().ByName(protoreflect.Name(name))
	input, err := protoregistry.GlobalTypes.FindMessageByName(method.Input().FullName())
	if err != nil {
		return err
	}
	output, err := protoregistry.GlobalTypes.FindMessageByName(method.Output().FullName())
	if err != nil {
		return err
	}
	return serve(&rpc{stream, m, input, output})
}

// grpcRequest is one message of a client.
type grpcRequest struct {
	fields map[string]any // as JSON, without the following
	data   []byte
	mask   []string
}

func (r *rpc) receive() (*grpcRequest, error) {
	m := r.input.New()
	if err := r.RecvMsg(m.Interface()); err != nil {
		return nil, err
	}
	received := &grpcRequest{}
	// JSON would encode the bytes, and knows no mask of keys like in-progress.
	if f := m.Descriptor().Fields().ByName("checksummed_data"); f != nil && m.Has(f) {
		data := m.Get(f).Message()
		received.data = data.Get(data.Descriptor().Fields().ByName("content")).Bytes()
		m.Clear(f)
	}
	for _, name := range []protoreflect.Name{"read_mask", "update_mask"} {
		if f := m.Descriptor().Fields().ByName(name); f != nil && m.Has(f) {
			received.mask = m.Get(f).Message().Interface().(*fieldmaskpb.FieldMask).Paths
			m.Clear(f)
		}
	}
	b, err := protojson.Marshal(m.Interface())
	if err != nil {
		return nil, err
	}
	return received, json.Unmarshal(b, &received.fields)
}

// text returns a string or a number of a message, "" if it is not there.
func text(fields map[string]any, path ...string) string {
	for _, key := range path[:len(path)-1] {
		fields, _ = fields[key].(map[string]any)
	}
	s, _ := fields[path[len(path)-1]].(string)
	return s
}

// send answers with fields.
func (r *rpc) send(fields map[string]any) error {
	m, err := r.message(fields)
	if err != nil {
		return err
	}
	return r.SendMsg(m)
}

func (r *rpc) message(fields map[string]any) (proto.Message, error) {
	b, err := json.Marshal(fields)
	if err != nil {
		return nil, err
	}
	m := r.output.New().Interface()
	return m, protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(b, m)
}

// reply is the answer to an HTTP request.
type reply struct {
	status int
	header http.Header
	body   []byte
}

// do makes an HTTP request. The error is a status.
func (r *rpc) do(method, path string, query url.Values, header http.Header, body []byte) (*reply, error) {
	u := &url.URL{Scheme: "http", Host: "fakegcs", Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(r.Context(), method, u.String(), bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header = header
	resp, err := r.machine.RoundTrip(req)
	if err != nil {
		return nil, lost(err)
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, lost(err)
	}
	switch resp.StatusCode {
	case http.StatusOK, http.StatusPartialContent, http.StatusNoContent, http.StatusPermanentRedirect:
		return &reply{resp.StatusCode, resp.Header, content}, nil
	}
	code, ok := map[int]codes.Code{
		http.StatusBadRequest:                   codes.InvalidArgument,
		http.StatusForbidden:                    codes.PermissionDenied,
		http.StatusNotFound:                     codes.NotFound,
		http.StatusGone:                         codes.NotFound,
		http.StatusConflict:                     codes.Aborted,
		http.StatusPreconditionFailed:           codes.FailedPrecondition,
		http.StatusRequestedRangeNotSatisfiable: codes.OutOfRange,
		http.StatusTooManyRequests:              codes.ResourceExhausted,
		http.StatusNotImplemented:               codes.Unimplemented,
		http.StatusServiceUnavailable:           codes.Unavailable,
	}[resp.StatusCode]
	if !ok {
		code = codes.Internal
	}
	var said struct{ Error struct{ Message string } }
	json.Unmarshal(content, &said)
	return nil, status.Error(code, cmp.Or(said.Error.Message, string(content)))
}

// lost is the status of a call without an answer.
func lost(err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return status.FromContextError(err).Err()
	}
	return status.Error(codes.Unavailable, "error reading from server: "+err.Error())
}

// conditions returns the conditions of a message as those of a URL.
func conditions(fields map[string]any) url.Values {
	query := url.Values{}
	for _, k := range []string{"ifGenerationMatch", "ifGenerationNotMatch", "ifMetagenerationMatch", "ifMetagenerationNotMatch"} {
		if v := text(fields, k); v != "" {
			query.Set(k, v)
		}
	}
	return query
}

// target returns the path and the query of a request for the object of a message,
// which has the conditions of another.
func target(object, conditioned map[string]any, name string) (path string, query url.Values) {
	query = conditions(conditioned)
	if g := text(object, "generation"); g != "" {
		query.Set("generation", g)
	}
	return bucketOf(text(object, "bucket")) + "/o/" + name, query
}

// bucketOf is the path of a bucket named projects/_/buckets/modules.
func bucketOf(resource string) string {
	return "/storage/v1/b/" + resource[strings.LastIndexByte(resource, '/')+1:]
}

// fromAPI turns an object of the JSON API into one of gRPC.
func fromAPI(o map[string]any) map[string]any {
	o["bucket"] = "projects/_/buckets/" + text(o, "bucket")
	o["createTime"], o["updateTime"], o["finalizeTime"] = o["timeCreated"], o["updated"], o["timeFinalized"]
	o["checksums"] = map[string]any{"md5Hash": o["md5Hash"], "crc32c": number(text(o, "crc32c"))}
	return o
}

// number decodes the CRC32C of an object of the JSON API.
func number(crc string) uint32 {
	b, _ := base64.StdEncoding.DecodeString(crc)
	return binary.BigEndian.Uint32(b)
}

func (a *reply) object() (o map[string]any, err error) {
	err = json.Unmarshal(a.body, &o)
	return fromAPI(o), err
}

// persisted returns how much of a resumable upload has arrived.
func (a *reply) persisted() int64 {
	_, last, ok := strings.Cut(a.header.Get("Range"), "-")
	if !ok {
		return 0
	}
	n, _ := strconv.ParseInt(last, 10, 64)
	return n + 1
}

// doObject makes a request, and sends the object of its answer.
func (r *rpc) doObject(method, path string, query url.Values, body []byte) error {
	a, err := r.do(method, path, query, nil, body)
	if err != nil {
		return err
	}
	o, err := a.object()
	if err != nil {
		return err
	}
	return r.send(o)
}

func (r *rpc) getObject() error {
	req, err := r.receive()
	if err != nil {
		return err
	}
	path, query := target(req.fields, req.fields, text(req.fields, "object"))
	return r.doObject(http.MethodGet, path, query, nil)
}

func (r *rpc) deleteObject() error {
	req, err := r.receive()
	if err != nil {
		return err
	}
	path, query := target(req.fields, req.fields, text(req.fields, "object"))
	if _, err := r.do(http.MethodDelete, path, query, nil, nil); err != nil {
		return err
	}
	return r.send(map[string]any{})
}

// updateObject knows the updates of metadata: all of it, or single keys.
func (r *rpc) updateObject() error {
	req, err := r.receive()
	if err != nil {
		return err
	}
	object, _ := req.fields["object"].(map[string]any)
	given, _ := object["metadata"].(map[string]any)
	var patch any
	changed := map[string]any{}
	for _, path := range req.mask {
		key, ok := strings.CutPrefix(path, "metadata.")
		switch {
		case ok:
			changed[key] = given[key] // nil if it is not there: the key goes
			patch = changed
		case path != "metadata" || given != nil:
			return status.Error(codes.Unimplemented, "not known to the fake: an update of "+path)
		}
	}
	body, err := json.Marshal(map[string]any{"metadata": patch})
	if err != nil {
		return err
	}
	path, query := target(object, req.fields, text(object, "name"))
	return r.doObject(http.MethodPatch, path, query, body)
}

func (r *rpc) listObjects() error {
	req, err := r.receive()
	if err != nil {
		return err
	}
	query := url.Values{"projection": {"full"}}
	for k, param := range map[string]string{
		"pageToken": "pageToken", "prefix": "prefix", "lexicographicStart": "startOffset", "lexicographicEnd": "endOffset",
		"delimiter": "delimiter", "matchGlob": "matchGlob", "filter": "filter",
	} {
		query.Set(param, text(req.fields, k))
	}
	for k, param := range map[string]string{"pageSize": "maxResults", "versions": "versions", "softDeleted": "softDeleted"} {
		if v, ok := req.fields[k]; ok {
			query.Set(param, fmt.Sprint(v))
		}
	}
	a, err := r.do(http.MethodGet, bucketOf(text(req.fields, "parent"))+"/o", query, nil, nil)
	if err != nil {
		return err
	}
	var page struct {
		Items         []map[string]any
		NextPageToken string
	}
	if err := json.Unmarshal(a.body, &page); err != nil {
		return err
	}
	for i := range page.Items {
		fromAPI(page.Items[i])
	}
	m, err := r.message(map[string]any{"objects": page.Items, "nextPageToken": page.NextPageToken})
	if err != nil {
		return err
	}
	if !slices.Contains(req.mask, "*") {
		objects := m.ProtoReflect().Get(r.output.Descriptor().Fields().ByName("objects")).List()
		for i := range objects.Len() {
			o := objects.Get(i).Message()
			o.Range(func(f protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
				selects := func(path string) bool {
					field, _, _ := strings.Cut(path, ".")
					return field == string(f.Name())
				}
				if !slices.ContainsFunc(req.mask, selects) {
					o.Clear(f)
				}
				return true
			})
		}
	}
	return r.SendMsg(m)
}

func (r *rpc) testIamPermissions() error {
	req, err := r.receive()
	if err != nil {
		return err
	}
	query := url.Values{}
	permissions, _ := req.fields["permissions"].([]any)
	for _, p := range permissions {
		query.Add("permissions", p.(string))
	}
	a, err := r.do(http.MethodGet, bucketOf(text(req.fields, "resource"))+"/iam/testPermissions", query, nil, nil)
	if err != nil {
		return err
	}
	var granted map[string]any
	if err := json.Unmarshal(a.body, &granted); err != nil {
		return err
	}
	return r.send(granted)
}

// maxMessage is the most bytes of an object that GCS sends in a message.
const maxMessage = 2 << 20

func (r *rpc) readObject() error {
	req, err := r.receive()
	if err != nil {
		return err
	}
	header := http.Header{}
	first, _ := strconv.ParseInt(text(req.fields, "readOffset"), 10, 64)
	limit, _ := strconv.ParseInt(text(req.fields, "readLimit"), 10, 64)
	switch {
	case limit > 0:
		header.Set("Range", fmt.Sprintf("bytes=%d-%d", first, first+limit-1))
	case first > 0:
		header.Set("Range", fmt.Sprintf("bytes=%d-", first))
	case first < 0:
		header.Set("Range", fmt.Sprintf("bytes=%d", first))
	}
	path, query := target(req.fields, req.fields, text(req.fields, "object"))
	query.Set("alt", "media")
	a, err := r.do(http.MethodGet, path, query, header, nil)
	if err != nil {
		return err
	}
	size, whole := len(a.body), a.header.Get("Content-Range")
	if _, total, ok := strings.Cut(whole, "/"); ok {
		size, _ = strconv.Atoi(total)
	}
	checksums := map[string]any{}
	for _, sum := range strings.Split(a.header.Get("X-Goog-Hash"), ",") {
		switch kind, v, _ := strings.Cut(sum, "="); kind {
		case "crc32c":
			checksums["crc32c"] = number(v)
		case "md5":
			checksums["md5Hash"] = v
		}
	}
	updated, _ := http.ParseTime(a.header.Get("Last-Modified"))
	answer := map[string]any{
		"objectChecksums": checksums,
		"metadata": map[string]any{
			"size":           size,
			"generation":     a.header.Get("X-Goog-Generation"),
			"metageneration": a.header.Get("X-Goog-Metageneration"),
			"contentType":    a.header.Get("Content-Type"),
			"updateTime":     updated.Format(time.RFC3339),
			"checksums":      checksums,
		},
	}
	if span, ok := strings.CutPrefix(whole, "bytes "); ok {
		start, _, _ := strings.Cut(span, "-")
		begin, _ := strconv.Atoi(start)
		answer["contentRange"] = map[string]any{"start": begin, "end": begin + len(a.body), "completeLength": size}
	}
	for data := a.body; ; answer = map[string]any{} {
		m, err := r.message(answer)
		if err != nil {
			return err
		}
		part := data[:min(len(data), maxMessage)]
		data = data[len(part):]
		sent := m.ProtoReflect().Mutable(r.output.Descriptor().Fields().ByName("checksummed_data")).Message()
		sent.Set(sent.Descriptor().Fields().ByName("content"), protoreflect.ValueOfBytes(part))
		// The client (1.70) fails on content at the very end of a message.
		sent.Set(sent.Descriptor().Fields().ByName("crc32c"), protoreflect.ValueOfUint32(crc32.Checksum(part, castagnoli)))
		if err := r.SendMsg(m); err != nil || len(data) == 0 {
			return err
		}
	}
}

// upload returns the URL of an upload, and the object of its spec, as the JSON API
// knows both.
func upload(fields map[string]any, kind string) (path string, query url.Values, resource map[string]any) {
	spec, _ := fields["writeObjectSpec"].(map[string]any)
	resource, _ = spec["resource"].(map[string]any)
	query = conditions(spec)
	query.Set("uploadType", kind)
	query.Set("name", text(resource, "name"))
	path = "/upload" + bucketOf(text(resource, "bucket")) + "/o"
	delete(resource, "bucket")
	setSums(resource, fields)
	return path, query, resource
}

// setSums copies the checksums of a message into the object that it is about.
func setSums(resource, fields map[string]any) {
	sums, _ := fields["objectChecksums"].(map[string]any)
	if v, ok := sums["md5Hash"]; ok {
		resource["md5Hash"] = v
	}
	if v, ok := sums["crc32c"].(float64); ok {
		resource["crc32c"] = base64.StdEncoding.EncodeToString(binary.BigEndian.AppendUint32(nil, uint32(v)))
	}
}

func (r *rpc) startResumableWrite() error {
	req, err := r.receive()
	if err != nil {
		return err
	}
	path, query, resource := upload(req.fields, "resumable")
	body, err := json.Marshal(resource)
	if err != nil {
		return err
	}
	a, err := r.do(http.MethodPost, path, query, http.Header{}, body)
	if err != nil {
		return err
	}
	session, err := url.Parse(a.header.Get("Location"))
	if err != nil {
		return err
	}
	return r.send(map[string]any{"uploadId": session.Query().Get("upload_id")})
}

// chunk sends what came of a resumable upload. The total is -1 before its end.
func (r *rpc) chunk(session string, sums map[string]any, data []byte, offset, total int64) (*reply, error) {
	span, whole := "*", "*"
	if len(data) > 0 {
		span = fmt.Sprintf("%d-%d", offset, offset+int64(len(data))-1)
	}
	if total >= 0 {
		whole = fmt.Sprint(total)
	}
	header := http.Header{"Content-Range": {"bytes " + span + "/" + whole}}
	for kind, field := range map[string]string{"md5": "md5Hash", "crc32c": "crc32c"} {
		if v, ok := sums[field]; ok {
			header.Add("X-Goog-Hash", fmt.Sprintf("%s=%s", kind, v))
		}
	}
	query := url.Values{"uploadType": {"resumable"}, "upload_id": {session}}
	return r.do(http.MethodPut, "/upload/storage/v1/b/"+Bucket+"/o", query, header, data)
}

// progress answers with the state of a resumable upload.
func (r *rpc) progress(a *reply) error {
	if a.status == http.StatusPermanentRedirect {
		return r.send(map[string]any{"persistedSize": a.persisted()})
	}
	o, err := a.object()
	if err != nil {
		return err
	}
	return r.send(map[string]any{"resource": o})
}

func (r *rpc) queryWriteStatus() error {
	req, err := r.receive()
	if err != nil {
		return err
	}
	a, err := r.chunk(text(req.fields, "uploadId"), nil, nil, 0, -1)
	if err != nil {
		return err
	}
	return r.progress(a)
}

// bidiWriteObject takes a whole upload, or messages of a resumable one.
func (r *rpc) bidiWriteObject() error {
	var opening map[string]any
	var data []byte
	var offset int64 // of data
	for {
		req, err := r.receive()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err // nothing is stored of an upload that has no end
		}
		if opening == nil {
			opening = req.fields
			offset, _ = strconv.ParseInt(text(req.fields, "writeOffset"), 10, 64)
		}
		data = append(data, req.data...)
		session := text(opening, "uploadId")
		finish, flush := req.fields["finishWrite"] == true, req.fields["flush"] == true
		switch {
		case session == "" && finish:
			a, err := r.insert(opening, req.fields, data)
			if err != nil {
				return err
			}
			if err := r.progress(a); err != nil {
				return err
			}
		case session != "" && (finish || flush):
			sums, total := map[string]any{}, int64(-1)
			if finish {
				total = offset + int64(len(data))
				setSums(sums, req.fields)
			}
			a, err := r.chunk(session, sums, data, offset, total)
			if err != nil {
				return err
			}
			if finish && a.status == http.StatusPermanentRedirect {
				return status.Error(codes.Unavailable, "a part of the end is not persisted")
			}
			if err := r.progress(a); err != nil {
				return err
			}
			offset, data = offset+int64(len(data)), data[:0]
		}
	}
}

// insert makes one request of an upload that came in one stream. Its checksums are
// in the first message or the last.
func (r *rpc) insert(opening, last map[string]any, data []byte) (*reply, error) {
	path, query, resource := upload(opening, "multipart")
	setSums(resource, last)
	described, err := json.Marshal(resource)
	if err != nil {
		return nil, err
	}
	var body bytes.Buffer
	parts := multipart.NewWriter(&body)
	for _, content := range [][]byte{described, data} {
		part, err := parts.CreatePart(textproto.MIMEHeader{})
		if err != nil {
			return nil, err
		}
		part.Write(content)
	}
	parts.Close()
	header := http.Header{"Content-Type": {"multipart/related; boundary=" + parts.Boundary()}}
	return r.do(http.MethodPost, path, query, header, body.Bytes())
}
