package gcs

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"mime"
	"mime/multipart"
	"net/http"
	"net/textproto"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/fsouza/fake-gcs-server/fakestorage"
)

// readRequest reads a request's body to its end, or to that of its context, and
// closes it in either case, as a RoundTripper must: the client's own goroutines
// wait for that.
func readRequest(r *http.Request) ([]byte, error) {
	if r.Body == nil {
		return nil, r.Context().Err()
	}
	defer r.Body.Close()
	stop := context.AfterFunc(r.Context(), func() { r.Body.Close() })
	defer stop()
	body, err := io.ReadAll(r.Body)
	if ctxErr := r.Context().Err(); ctxErr != nil {
		return body, ctxErr
	}
	return body, err
}

// arrive logs a request and finds out what it asks for, as far as its URL tells.
func (f *fakeGCS) arrive(m *machine, r *http.Request) *fakeCall {
	c := &fakeCall{
		request: &request{Machine: m.name, Op: "unknown", Start: time.Now()},
		machine: m,
		method:  r.Method,
		query:   r.URL.Query(),
		header:  r.Header.Clone(),
		base:    r.URL.Scheme + "://" + r.URL.Host,
	}
	if r.URL.Host == "" { // as a server sees it
		c.base = "http://" + r.Host
	}
	path := r.URL.Path
	if rest, ok := strings.CutPrefix(path, "/upload/storage/v1/b/"); ok && (r.Method == http.MethodPost || r.Method == http.MethodPut) {
		c.bucket, _ = strings.CutSuffix(rest, "/o")
		c.Object = c.query.Get("name")
		switch {
		case c.query.Get("upload_id") != "":
			c.session = c.query.Get("upload_id")
			c.Op = "chunk"
			if r.Header.Get("Content-Range") == "bytes */*" {
				c.Op = "query"
			}
		case c.query.Get("uploadType") == "resumable":
			c.Op = "start"
		case c.query.Get("uploadType") == "multipart":
			c.Op = "insert"
		}
	} else if rest, ok := strings.CutPrefix(path, "/storage/v1/b/"); ok {
		var found bool
		c.bucket, rest, _ = strings.Cut(rest, "/")
		c.Object, found = strings.CutPrefix(rest, "o/")
		switch {
		case found && r.Method == http.MethodPatch:
			c.Op = "patch"
		case found && r.Method == http.MethodDelete:
			c.Op = "delete"
		case r.Method != http.MethodGet && r.Method != http.MethodHead:
		case found && c.query.Get("alt") == "media":
			c.Op = "get"
		case found:
			c.Op = "attrs"
		case rest == "o":
			c.Op, c.Object = "list", c.query.Get("prefix")
		case rest == "iam/testPermissions":
			c.Op, c.Object = "permissions", ""
		case rest == "":
			c.Op, c.Object = "bucket", ""
		}
	} else if r.Method == http.MethodGet || r.Method == http.MethodHead {
		c.bucket, c.Object, _ = strings.Cut(strings.TrimPrefix(path, "/"), "/")
		c.Op, c.xml = "get", true
	}
	c.Cond = map[string]string{}
	for _, k := range []string{"ifGenerationMatch", "ifGenerationNotMatch", "ifMetagenerationMatch", "ifMetagenerationNotMatch"} {
		if c.query.Has(k) {
			c.Cond[k] = c.query.Get(k)
		}
	}
	if c.xml {
		for k, header := range map[string]string{
			"ifGenerationMatch":     "X-Goog-If-Generation-Match",
			"ifMetagenerationMatch": "X-Goog-If-Metageneration-Match",
		} {
			if v := r.Header.Get(header); v != "" {
				c.Cond[k] = v
			}
		}
	}

	f.mu.Lock()
	defer f.mu.Unlock()
	if s := f.sessions[c.session]; s != nil {
		c.Object, c.Cond = s.name, maps.Clone(s.cond)
	}
	c.N, c.MachineN = len(f.entries), m.requests
	m.requests++
	f.entries = append(f.entries, c.request)
	return c
}

// read takes in the body of a request.
func (c *fakeCall) read(body []byte) {
	switch c.Op {
	case "insert":
		c.readMultipart(body)
	case "chunk":
		c.media = body
	case "start", "patch":
		c.readResource(body)
	}
}

func (c *fakeCall) readResource(body []byte) {
	if err := json.Unmarshal(body, &c.resource); err != nil {
		c.bad = "Parse Error: " + err.Error()
		return
	}
	var all map[string]any
	json.Unmarshal(body, &all)
	c.resource.headers = map[string]string{}
	for _, k := range []string{"cacheControl", "contentDisposition", "contentEncoding", "contentLanguage"} {
		if v, ok := all[k]; ok {
			c.resource.headers[k], _ = v.(string)
		}
	}
	metadata, err := c.resource.metadata()
	if err != nil {
		c.bad = "Parse Error: " + err.Error()
		return
	}
	if metadata != nil {
		c.Metadata = map[string]string{}
		for k, v := range metadata {
			if v != nil {
				c.Metadata[k] = *v
			}
		}
	}
	if c.Object == "" {
		c.Object = c.resource.Name
	}
}

// metadata returns the user metadata sent; nil when none was, or null.
func (r fakeResource) metadata() (metadata map[string]*string, err error) {
	if r.Metadata != nil {
		err = json.Unmarshal(r.Metadata, &metadata)
	}
	return metadata, err
}

func (c *fakeCall) readMultipart(body []byte) {
	_, params, err := mime.ParseMediaType(c.header.Get("Content-Type"))
	if err != nil {
		c.bad = err.Error()
		return
	}
	parts := multipart.NewReader(bytes.NewReader(body), params["boundary"])
	for i := range 2 {
		part, err := parts.NextPart()
		if err != nil {
			c.bad = "Malformed multipart body: " + err.Error()
			return
		}
		content, err := io.ReadAll(part)
		if err != nil {
			c.bad = "Malformed multipart body: " + err.Error()
			return
		}
		if i == 0 {
			c.readResource(content)
			continue
		}
		c.media = content
		if c.resource.ContentType == "" {
			c.resource.ContentType = part.Header.Get("Content-Type")
		}
	}
	if _, err := parts.NextPart(); err != io.EOF {
		c.bad = "Malformed multipart body: no end"
	}
}

// apply checks a request and carries it out, in one step under the lock.
func (f *fakeGCS) apply(c *fakeCall) *fakeAnswer {
	select {
	case <-f.closed:
		return jsonFailure(http.StatusBadRequest, "invalid", errFakeClosed.Error())
	default:
	}
	if c.Op == "unknown" {
		f.violate(c, "not known to the fake: %s %s", c.method, c.query.Encode())
		return jsonFailure(http.StatusBadRequest, "invalid", "not known to the fake")
	}
	if c.bad != "" {
		return jsonFailure(http.StatusBadRequest, "parseError", c.bad)
	}
	if c.bucket != fakeBucket {
		if c.xml {
			return xmlFailure(http.StatusNotFound, "NoSuchBucket", "The specified bucket does not exist.", "")
		}
		return jsonFailure(http.StatusNotFound, "notFound", "The specified bucket does not exist.")
	}
	switch c.Op {
	case "insert":
		return f.write(c, c.query, c.resource, c.media)
	case "start":
		return f.startSession(c)
	case "chunk", "query":
		return f.continueSession(c)
	case "patch":
		return f.patch(c)
	case "delete":
		return f.delete(c)
	case "get", "attrs":
		return f.read(c)
	case "list":
		return f.list(c)
	case "permissions":
		return f.testPermissions(c)
	default:
		if a := f.forbid("storage.buckets.get", "bucket"); a != nil {
			return a
		}
		return f.emulate(http.MethodGet, "/storage/v1/b/"+fakeBucket, nil, nil)
	}
}

func (f *fakeGCS) violate(c *fakeCall, format string, args ...any) {
	f.broken = append(f.broken, fmt.Sprintf("%s: ", c.request)+fmt.Sprintf(format, args...))
}

// write is an upload that has arrived in full.
func (f *fakeGCS) write(c *fakeCall, query url.Values, r fakeResource, data []byte) *fakeAnswer {
	if c.Cond["ifGenerationMatch"] == "" {
		f.violate(c, "a write without ifGenerationMatch")
	}
	if a := f.forbid("storage.objects.create", "object"); a != nil {
		return a
	}
	if len(c.Object) == 0 || len(c.Object) > 1024 || strings.ContainsAny(c.Object, "\r\n") || c.Object == "." || c.Object == ".." {
		return jsonFailure(http.StatusBadRequest, "invalid", "Invalid object name.")
	}
	old := f.objects[c.Object]
	if a := checkConditions(c.Cond, old, false); a != nil {
		return a
	}
	if old != nil {
		if a := f.forbid("storage.objects.delete", "object"); a != nil {
			return a
		}
		if f.retained {
			return f.retentionNotMet(c.Object)
		}
	}
	if a := checkSums(data, r, c.header.Values("X-Goog-Hash")); a != nil {
		return a
	}
	if a := f.rate(c, f.written, "data write"); a != nil {
		return a
	}
	if f.complete(c.Object) {
		f.violate(c, "a write over an object of a complete version")
	}
	metadata := map[string]string{}
	sent, _ := r.metadata()
	for k, v := range sent {
		if v != nil {
			metadata[k] = *v
		}
	}
	o := f.store(c.Object, data, r.ContentType, metadata, r.headers, time.Now())
	return f.describe(c, o, query, "noAcl", true)
}

// rate keeps to one change of a kind and a name a second.
func (f *fakeGCS) rate(c *fakeCall, last map[string]time.Time, kind string) *fakeAnswer {
	before, ok := last[c.Object]
	if since := time.Since(before); ok && since < time.Second {
		if f.rates {
			return tooManyRequests(c.Object)
		}
		f.rateBroken = append(f.rateBroken, fmt.Sprintf("%s: a %s %v after another", c.request, kind, since))
	}
	last[c.Object] = time.Now()
	return nil
}

// complete tells whether name is one of the three objects of a complete version.
func (f *fakeGCS) complete(name string) bool {
	dot := strings.LastIndexByte(name, '.')
	if dot < 0 || !strings.Contains(name, "/@v/") || !slices.Contains([]string{".info", ".mod", ".zip"}, name[dot:]) {
		return false
	}
	version := name[:dot]
	mod := f.objects[version+".mod"]
	if mod == nil || f.objects[version+".info"] == nil || f.objects[version+".zip"] == nil {
		return false
	}
	_, current := mod.Metadata["in-progress"]
	_, old := mod.Metadata["in_progress"]
	return !current && !old
}

// store puts an object into the emulator and gives it its generation. GCS makes
// generations from the clock; this one stands still at times, so they count up
// from it.
func (f *fakeGCS) store(name string, data []byte, contentType string, metadata, headers map[string]string, created time.Time) *fakeStored {
	var body bytes.Buffer
	w := multipart.NewWriter(&body)
	head, _ := w.CreatePart(textproto.MIMEHeader{"Content-Type": {"application/json"}})
	json.NewEncoder(head).Encode(map[string]any{"name": name, "contentType": contentType})
	media, _ := w.CreatePart(textproto.MIMEHeader{"Content-Type": {contentType}})
	media.Write(data)
	w.Close()
	a := f.emulate(http.MethodPost, "/upload/storage/v1/b/"+f.shelf(name)+"/o?uploadType=multipart&name="+url.QueryEscape(name),
		http.Header{"Content-Type": {"multipart/related; boundary=" + w.Boundary()}}, body.Bytes())
	var said struct {
		MD5    string `json:"md5Hash"`
		CRC32C string `json:"crc32c"`
		Size   int64  `json:"size,string"`
	}
	if err := json.Unmarshal(a.body, &said); a.status != http.StatusOK || err != nil {
		panic(fmt.Sprintf("the emulator did not store %s: %d %s", name, a.status, a.body))
	}
	f.generation = max(f.generation+1, time.Now().UnixMicro())
	created = created.UTC().Truncate(time.Millisecond)
	o := &fakeStored{
		fakeObject: fakeObject{
			Name:           name,
			Metadata:       metadata,
			Generation:     f.generation,
			Metageneration: 1,
			Created:        created,
			Updated:        created,
			ContentType:    contentType,
		},
		size:    said.Size,
		md5:     said.MD5,
		crc32c:  said.CRC32C,
		headers: maps.Clone(headers),
	}
	f.objects[name] = o
	return o
}

func (f *fakeGCS) erase(name string) {
	if a := f.emulate(http.MethodDelete, "/storage/v1/b/"+f.shelf(name)+"/o/"+url.PathEscape(name), nil, nil); a.status != http.StatusOK {
		panic(fmt.Sprintf("the emulator did not delete %s: %d %s", name, a.status, a.body))
	}
	delete(f.objects, name)
}

// shelf names the emulator's bucket that an object is in. The emulator looks
// through all objects of a bucket at every request, three times over at a write,
// so a bucket of some thousand needs to be spread.
func (f *fakeGCS) shelf(name string) string {
	shelf := fmt.Sprintf("%s-%d", fakeBucket, crc32.ChecksumIEEE([]byte(name))%512)
	if !f.shelves[shelf] {
		f.shelves[shelf] = true
		f.server.CreateBucketWithOpts(fakestorage.CreateBucketOpts{Name: shelf})
	}
	return shelf
}

// emulate passes a request on to the emulator.
func (f *fakeGCS) emulate(method, path string, header http.Header, body []byte) *fakeAnswer {
	r, err := http.NewRequest(method, "https://storage.googleapis.com"+path, bytes.NewReader(body))
	if err != nil {
		panic(err)
	}
	if header != nil {
		r.Header = header
	}
	resp, err := f.server.HTTPClient().Transport.RoundTrip(r)
	if err != nil {
		panic(err)
	}
	defer resp.Body.Close()
	a := &fakeAnswer{status: resp.StatusCode, header: resp.Header}
	a.body, _ = io.ReadAll(resp.Body)
	return a
}

func (f *fakeGCS) startSession(c *fakeCall) *fakeAnswer {
	if a := f.forbid("storage.objects.create", "object"); a != nil {
		return a
	}
	id := fmt.Sprintf("session-%d", len(f.sessions)+1)
	if c.resource.ContentType == "" {
		c.resource.ContentType = c.header.Get("X-Upload-Content-Type")
	}
	f.sessions[id] = &fakeSession{
		name:     c.Object,
		cond:     maps.Clone(c.Cond),
		query:    c.query,
		resource: c.resource,
	}
	query := url.Values{"uploadType": {"resumable"}, "name": {c.Object}, "upload_id": {id}}
	return &fakeAnswer{status: http.StatusOK, header: http.Header{
		"Location":             {c.base + "/upload/storage/v1/b/" + fakeBucket + "/o?" + query.Encode()},
		"X-Guploader-Uploadid": {id},
	}}
}

// continueSession takes one chunk of a resumable upload. Bytes that came before
// are skipped, so a chunk may be sent again; so may the last one, after the
// upload was finalized.
func (f *fakeGCS) continueSession(c *fakeCall) *fakeAnswer {
	s := f.sessions[c.session]
	if s == nil {
		return jsonFailure(http.StatusNotFound, "notFound", "No such upload session.")
	}
	if s.finished != nil {
		again := *s.finished
		again.applied = false
		return &again
	}
	start, total, err := parseContentRange(c.header.Get("Content-Range"), len(c.media))
	if err != nil {
		return jsonFailure(http.StatusBadRequest, "invalid", err.Error())
	}
	if start >= 0 {
		if start > int64(len(s.data)) {
			return jsonFailure(http.StatusBadRequest, "invalid", "Invalid request. There is a gap before the chunk.")
		}
		if skip := int64(len(s.data)) - start; skip < int64(len(c.media)) {
			s.data = append(s.data, c.media[skip:]...)
		}
	}
	if total != int64(len(s.data)) {
		a := &fakeAnswer{status: http.StatusPermanentRedirect, header: http.Header{}}
		if len(s.data) > 0 {
			a.header.Set("Range", fmt.Sprintf("bytes=0-%d", len(s.data)-1))
		}
		if c.header.Get("X-GUploader-No-308") != "" {
			a.status = http.StatusOK
			a.header.Set("X-Http-Status-Code-Override", "308")
		}
		return a
	}
	a := f.write(c, s.query, s.resource, s.data)
	if a.applied {
		s.finished = a
		s.data = nil
	}
	return a
}

// parseContentRange returns the offset of a chunk, -1 for one without bytes,
// and the size of the whole, -1 if it is not known yet.
func parseContentRange(header string, size int) (start, total int64, err error) {
	malformed := fmt.Errorf("invalid Content-Range %q for a body of %d bytes", header, size)
	span, whole, ok := strings.Cut(strings.TrimPrefix(header, "bytes "), "/")
	if !ok || !strings.HasPrefix(header, "bytes ") {
		return 0, 0, malformed
	}
	total = -1
	if whole != "*" {
		if total, err = strconv.ParseInt(whole, 10, 64); err != nil {
			return 0, 0, malformed
		}
	}
	if span == "*" {
		if size != 0 {
			return 0, 0, malformed
		}
		return -1, total, nil
	}
	first, last, _ := strings.Cut(span, "-")
	start, err = strconv.ParseInt(first, 10, 64)
	if err != nil {
		return 0, 0, malformed
	}
	end, err := strconv.ParseInt(last, 10, 64)
	if err != nil || end-start+1 != int64(size) || total >= 0 && end >= total {
		return 0, 0, malformed
	}
	return start, total, nil
}

func (f *fakeGCS) patch(c *fakeCall) *fakeAnswer {
	if c.Cond["ifGenerationMatch"] == "" && c.Cond["ifMetagenerationMatch"] == "" {
		f.violate(c, "a metadata update without ifGenerationMatch or ifMetagenerationMatch")
	}
	if a := f.forbid("storage.objects.update", "object"); a != nil {
		return a
	}
	o, a := f.find(c, false)
	if a != nil {
		return a
	}
	if a := f.rate(c, f.updated, "metadata update"); a != nil {
		return a
	}
	sent, _ := c.resource.metadata()
	if c.resource.Metadata != nil && sent == nil { // null
		o.Metadata = map[string]string{}
	}
	o.Metadata = maps.Clone(o.Metadata)
	for k, v := range sent {
		if v == nil {
			delete(o.Metadata, k)
			continue
		}
		if o.Metadata == nil {
			o.Metadata = map[string]string{}
		}
		o.Metadata[k] = *v
	}
	if c.resource.ContentType != "" {
		o.ContentType = c.resource.ContentType
	}
	for k, v := range c.resource.headers {
		if o.headers == nil {
			o.headers = map[string]string{}
		}
		o.headers[k] = v
	}
	o.Metageneration++
	o.Updated = time.Now().UTC().Truncate(time.Millisecond)
	return f.describe(c, o, c.query, "full", true)
}

func (f *fakeGCS) delete(c *fakeCall) *fakeAnswer {
	if c.Cond["ifGenerationMatch"] == "" {
		f.violate(c, "a delete without ifGenerationMatch")
	}
	if a := f.forbid("storage.objects.delete", "object"); a != nil {
		return a
	}
	if _, a := f.find(c, false); a != nil {
		return a
	}
	if f.retained {
		return f.retentionNotMet(c.Object)
	}
	f.erase(c.Object)
	return &fakeAnswer{status: http.StatusNoContent, applied: true}
}

// find returns the object that a request is about, or why it cannot be had.
func (f *fakeGCS) find(c *fakeCall, reading bool) (*fakeStored, *fakeAnswer) {
	o := f.objects[c.Object]
	wanted := c.query.Get("generation")
	if o == nil || wanted != "" && wanted != strconv.FormatInt(o.Generation, 10) {
		if c.xml {
			return nil, xmlFailure(http.StatusNotFound, "NoSuchKey", "The specified key does not exist.", "")
		}
		return nil, jsonFailure(http.StatusNotFound, "notFound", "No such object: "+fakeBucket+"/"+c.Object)
	}
	a := checkConditions(c.Cond, o, reading)
	if a != nil && a.status == http.StatusPreconditionFailed && c.xml {
		a = xmlFailure(a.status, "PreconditionFailed", conditionNotMet, "")
	}
	return o, a
}

// read answers with an object's bytes or attributes.
func (f *fakeGCS) read(c *fakeCall) *fakeAnswer {
	if a := f.forbid("storage.objects.get", "object"); a != nil {
		if c.xml {
			a = xmlFailure(a.status, "AccessDenied", "Access denied.", missingPermission("storage.objects.get", "object"))
		}
		return a
	}
	o, a := f.find(c, true)
	if a != nil {
		return a
	}
	if c.Op == "attrs" {
		return f.describe(c, o, c.query, "noAcl", false)
	}
	header := http.Header{}
	if v := c.header.Get("Range"); v != "" {
		header.Set("Range", v)
	}
	a = f.emulate(c.method, "/download/storage/v1/b/"+f.shelf(c.Object)+"/o/"+url.PathEscape(c.Object)+"?alt=media", header, nil)
	if a.status >= 300 {
		return a
	}
	// The layer knows better than the emulator.
	for k := range a.header {
		if strings.HasPrefix(k, "X-Goog-Meta-") {
			a.header.Del(k)
		}
	}
	if c.xml {
		for k, v := range o.Metadata {
			a.header.Set("X-Goog-Meta-"+k, v)
		}
	}
	a.header.Set("X-Goog-Generation", strconv.FormatInt(o.Generation, 10))
	a.header.Set("X-Goog-Metageneration", strconv.FormatInt(o.Metageneration, 10))
	a.header.Set("Last-Modified", o.Updated.Format(http.TimeFormat))
	a.header.Set("Content-Type", o.ContentType)
	for k, header := range map[string]string{
		"cacheControl":       "Cache-Control",
		"contentDisposition": "Content-Disposition",
		"contentEncoding":    "Content-Encoding",
		"contentLanguage":    "Content-Language",
	} {
		if v := o.headers[k]; v != "" {
			a.header.Set(header, v)
		}
	}
	return a
}

// list answers with one page. Its token is the last name of the page, so that
// objects which come and go between pages shift nothing.
func (f *fakeGCS) list(c *fakeCall) *fakeAnswer {
	if a := f.forbid("storage.objects.list", "bucket"); a != nil {
		return a
	}
	for _, k := range []string{"delimiter", "matchGlob", "filter"} {
		if c.query.Get(k) != "" {
			f.violate(c, "the fake does not know how to list with %s", k)
		}
	}
	for _, k := range []string{"versions", "softDeleted"} {
		if c.query.Get(k) == "true" {
			f.violate(c, "the fake does not know how to list with %s", k)
		}
	}
	limit := 1000
	if v := c.query.Get("maxResults"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil || n < 1 {
			return jsonFailure(http.StatusBadRequest, "invalid", "Invalid unsigned integer value: '"+v+"'.")
		}
		limit = min(n, limit)
	}
	after := ""
	if token := c.query.Get("pageToken"); token != "" {
		b, err := base64.URLEncoding.DecodeString(token)
		if err != nil {
			return jsonFailure(http.StatusBadRequest, "invalid", "Invalid Value")
		}
		after = string(b)
	}
	var names []string
	for name := range f.objects {
		if strings.HasPrefix(name, c.query.Get("prefix")) && name > after && name >= c.query.Get("startOffset") &&
			(c.query.Get("endOffset") == "" || name < c.query.Get("endOffset")) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	page := map[string]any{"kind": "storage#objects"}
	if len(names) > limit {
		names = names[:limit]
		page["nextPageToken"] = base64.URLEncoding.EncodeToString([]byte(names[limit-1]))
	}
	var items []any
	for _, name := range names {
		items = append(items, f.objects[name].json(c.base, c.query.Get("projection") == "full"))
	}
	if items != nil {
		page["items"] = items
	}
	return jsonAnswer(page, c.query.Get("fields"))
}

func (f *fakeGCS) testPermissions(c *fakeCall) *fakeAnswer {
	if f.permissionsStatus != 0 {
		return &fakeAnswer{status: f.permissionsStatus, header: http.Header{"Content-Type": {"text/plain; charset=utf-8"}}, body: []byte("not supported\n")}
	}
	said := map[string]any{"kind": "storage#testIamPermissionsResponse"}
	var granted []string
	for _, p := range c.query["permissions"] {
		if !f.denied[p] {
			granted = append(granted, p)
		}
	}
	if granted != nil {
		said["permissions"] = granted
	}
	return jsonAnswer(said, "")
}

func (f *fakeGCS) forbid(permission, kind string) *fakeAnswer {
	if !f.denied[permission] {
		return nil
	}
	return jsonFailure(http.StatusForbidden, "forbidden", missingPermission(permission, kind))
}

func missingPermission(permission, kind string) string {
	return fmt.Sprintf("caller does not have %s access to the Google Cloud Storage %s. Permission '%s' denied on resource (or it may not exist).", permission, kind, permission)
}

func (f *fakeGCS) retentionNotMet(name string) *fakeAnswer {
	return jsonFailure(http.StatusForbidden, "retentionPolicyNotMet",
		fmt.Sprintf("Object '%s/%s' is subject to bucket's retention policy or object retention and cannot be deleted or overwritten until %s",
			fakeBucket, name, time.Now().AddDate(1, 0, 0).UTC().Format(time.RFC3339)))
}
