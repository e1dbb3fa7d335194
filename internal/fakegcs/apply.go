package fakegcs

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// apply checks a request and carries it out, in one step under the lock.
func (f *Server) apply(c *call) *answer {
	select {
	case <-f.closed:
		return jsonFailure(http.StatusBadRequest, "invalid", errClosed.Error())
	default:
	}
	if c.Op == "unknown" {
		f.violate(c, "not known to the fake: %s %s", c.method, c.query.Encode())
		return jsonFailure(http.StatusBadRequest, "invalid", "not known to the fake")
	}
	if c.bad != "" {
		return jsonFailure(http.StatusBadRequest, "parseError", c.bad)
	}
	if c.bucket != Bucket {
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
		return jsonAnswer(map[string]any{"kind": "storage#bucket", "id": Bucket, "name": Bucket, "location": "US", "storageClass": "STANDARD"}, c.query.Get("fields"))
	}
}

func (f *Server) violate(c *call, format string, args ...any) {
	f.broken = append(f.broken, fmt.Sprintf("%s: ", c.Request)+fmt.Sprintf(format, args...))
}

// write is an upload that has arrived in full.
func (f *Server) write(c *call, query url.Values, r resource, data []byte) *answer {
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
	if a := f.rate(c, "data write"); a != nil {
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

// rate keeps to one change of a kind and a name a second, or to one of a name.
func (f *Server) rate(c *call, kind string) *answer {
	key := kind + " " + c.Object
	if f.ratesShared {
		key = c.Object
	}
	before, ok := f.changed[key]
	if since := time.Since(before); ok && since < time.Second {
		if f.rates {
			return tooManyRequests(c.Object)
		}
		f.rateBroken = append(f.rateBroken, fmt.Sprintf("%s: a %s %v after another", c.Request, kind, since))
	}
	f.changed[key] = time.Now()
	return nil
}

// complete tells whether name is one of the three objects of a complete version.
func (f *Server) complete(name string) bool {
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

// store makes an object and gives it its generation. GCS makes generations from
// the clock. The clock of a test stands still at times, so they count up from it.
func (f *Server) store(name string, data []byte, contentType string, metadata, headers map[string]string, created time.Time) *Object {
	f.generation = max(f.generation+1, time.Now().UnixMicro())
	created = created.UTC().Truncate(time.Millisecond)
	o := &Object{
		Name:           name,
		Data:           data,
		Metadata:       metadata,
		Generation:     f.generation,
		Metageneration: 1,
		Created:        created,
		Updated:        created,
		ContentType:    contentType,
		headers:        headers,
	}
	o.MD5, o.CRC32C = sums(data)
	if i, found := slices.BinarySearch(f.sorted, name); !found {
		f.sorted = slices.Insert(f.sorted, i, name)
	}
	f.remember(name)
	f.objects[name] = o
	return o
}

// remember notes what an object is before it changes.
func (f *Server) remember(name string) {
	if f.pickState != nil {
		f.changes = append(f.changes, change{name, f.objects[name]})
	}
}

func (f *Server) erase(name string) {
	if i, found := slices.BinarySearch(f.sorted, name); found {
		f.remember(name)
		f.sorted = slices.Delete(f.sorted, i, i+1)
		delete(f.objects, name)
	}
}

func (f *Server) startSession(c *call) *answer {
	if a := f.forbid("storage.objects.create", "object"); a != nil {
		return a
	}
	id := fmt.Sprintf("session-%d", len(f.sessions)+1)
	if c.resource.ContentType == "" {
		c.resource.ContentType = c.header.Get("X-Upload-Content-Type")
	}
	f.sessions[id] = &session{
		name:     c.Object,
		cond:     maps.Clone(c.Cond),
		query:    c.query,
		resource: c.resource,
	}
	query := url.Values{"uploadType": {"resumable"}, "name": {c.Object}, "upload_id": {id}}
	return &answer{status: http.StatusOK, header: http.Header{
		"Location":             {c.base + "/upload/storage/v1/b/" + Bucket + "/o?" + query.Encode()},
		"X-Guploader-Uploadid": {id},
	}}
}

// continueSession takes one chunk of a resumable upload. Bytes that came before
// are skipped, so a chunk may be sent again; so may the last one, after the
// upload was finalized.
func (f *Server) continueSession(c *call) *answer {
	s := f.sessions[c.session]
	if s == nil {
		return jsonFailure(http.StatusNotFound, "notFound", "No such upload session.")
	}
	switch c.Fault {
	case SessionGone:
		s.ended = jsonFailure(http.StatusGone, "uploadSessionGone", "The upload session has ended.")
	case SessionNotFound:
		s.ended = jsonFailure(http.StatusNotFound, "notFound", "No such upload session.")
	}
	if s.ended != nil {
		return s.ended
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
			return gap(start, len(s.data))
		}
		if c.Fault == HalfChunk {
			c.media = c.media[:len(c.media)/2]
		}
		if skip := int64(len(s.data)) - start; skip < int64(len(c.media)) {
			s.data = append(s.data, c.media[skip:]...)
		}
	}
	if total != int64(len(s.data)) {
		a := &answer{status: http.StatusPermanentRedirect, header: http.Header{}}
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

func (f *Server) patch(c *call) *answer {
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
	if a := f.rate(c, "metadata update"); a != nil {
		return a
	}
	o = new(*o)
	o.Metadata, o.headers = maps.Clone(o.Metadata), maps.Clone(o.headers)
	sent, _ := c.resource.metadata()
	if o.Metadata == nil || c.resource.Metadata != nil && sent == nil { // null
		o.Metadata = map[string]string{}
	}
	for k, v := range sent {
		if v == nil {
			delete(o.Metadata, k)
			continue
		}
		o.Metadata[k] = *v
	}
	o.ContentType = cmp.Or(c.resource.ContentType, o.ContentType)
	if o.headers == nil {
		o.headers = map[string]string{}
	}
	maps.Copy(o.headers, c.resource.headers)
	f.change(o)
	return f.describe(c, o, c.query, "full", true)
}

// change replaces an object by one with other metadata.
func (f *Server) change(o *Object) {
	o.Metageneration++
	o.Updated = time.Now().UTC().Truncate(time.Millisecond)
	f.remember(o.Name)
	f.objects[o.Name] = o
}

func (f *Server) delete(c *call) *answer {
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
	if f.ratesShared {
		if a := f.rate(c, "delete"); a != nil {
			return a
		}
	}
	f.erase(c.Object)
	return &answer{status: http.StatusNoContent, applied: true}
}

// find returns the object that a request is about, or why it cannot be had.
func (f *Server) find(c *call, reading bool) (*Object, *answer) {
	o := f.objects[c.Object]
	wanted := c.query.Get("generation")
	if o == nil || wanted != "" && wanted != strconv.FormatInt(o.Generation, 10) {
		if c.xml {
			return nil, xmlFailure(http.StatusNotFound, "NoSuchKey", "The specified key does not exist.", "")
		}
		return nil, jsonFailure(http.StatusNotFound, "notFound", "No such object: "+Bucket+"/"+c.Object)
	}
	a := checkConditions(c.Cond, o, reading)
	if a != nil && a.status == http.StatusPreconditionFailed && c.xml {
		a = xmlFailure(a.status, "PreconditionFailed", conditionNotMet, "")
	}
	return o, a
}

// read answers with an object's bytes or attributes.
func (f *Server) read(c *call) *answer {
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
	a = &answer{header: http.Header{
		"Content-Type":          {o.ContentType},
		"X-Goog-Generation":     {strconv.FormatInt(o.Generation, 10)},
		"X-Goog-Metageneration": {strconv.FormatInt(o.Metageneration, 10)},
		"X-Goog-Hash":           {"crc32c=" + o.CRC32C, "md5=" + o.MD5},
	}}
	if c.xml {
		for k, v := range o.Metadata {
			a.header.Set("X-Goog-Meta-"+k, v)
		}
	}
	http.ServeContent(a, &http.Request{Method: c.method, Header: c.header}, "", o.Updated, bytes.NewReader(o.Data))
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
func (f *Server) list(c *call) *answer {
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
	after, number := "", 0 // of the page
	if token := c.query.Get("pageToken"); token != "" {
		b, err := base64.URLEncoding.DecodeString(token)
		if err != nil {
			return jsonFailure(http.StatusBadRequest, "invalid", "Invalid Value")
		}
		after, number = splitToken(b)
	}
	if len(f.pageSizes) > 0 {
		limit = min(limit, f.pageSizes[number%len(f.pageSizes)])
	}
	objects, names := f.listed(c)
	prefix, end := c.query.Get("prefix"), c.query.Get("endOffset")
	first, found := slices.BinarySearch(names, max(prefix, c.query.Get("startOffset"), after))
	if found && names[first] == after {
		first++
	}
	page := map[string]any{"kind": "storage#objects"}
	var items []any
	for _, name := range names[first:] {
		if !strings.HasPrefix(name, prefix) || end != "" && name >= end {
			break
		}
		if len(items) == limit {
			if f.pageSizes != nil {
				after += fmt.Sprintf("\x00%d", number+1)
			}
			page["nextPageToken"] = base64.URLEncoding.EncodeToString([]byte(after))
			break
		}
		items = append(items, objects[name].json(c.base, c.query.Get("projection") == "full"))
		after = name
	}
	if items != nil {
		page["items"] = items
	}
	return jsonAnswer(page, c.query.Get("fields"))
}

// splitToken returns the name after which a page begins, and its number among the
// pages of its listing, if they are limited.
func splitToken(token []byte) (after string, number int) {
	after, n, _ := strings.Cut(string(token), "\x00")
	number, _ = strconv.Atoi(n)
	return after, number
}

// listed returns the objects that a page may show, and their names in order.
func (f *Server) listed(c *call) (map[string]*Object, []string) {
	states := map[string][]*Object{} // since the request arrived
	if f.pickState != nil {
		for _, ch := range f.changes[min(c.changes, len(f.changes)):] {
			states[ch.name] = append(states[ch.name], ch.before)
		}
	}
	if len(states) == 0 {
		return f.objects, f.sorted
	}
	objects := maps.Clone(f.objects)
	for name, before := range states {
		all := append(before, f.objects[name])
		if o := all[f.pickState(c.Request, name, len(all))]; o != nil {
			objects[name] = o
		} else {
			delete(objects, name)
		}
	}
	return objects, slices.Sorted(maps.Keys(objects))
}

func (f *Server) testPermissions(c *call) *answer {
	if f.permissionsStatus != 0 {
		return &answer{status: f.permissionsStatus, header: http.Header{"Content-Type": {"text/plain; charset=utf-8"}}, body: []byte("not supported\n")}
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

func (f *Server) forbid(permission, kind string) *answer {
	if !f.denied[permission] {
		return nil
	}
	return jsonFailure(http.StatusForbidden, "forbidden", missingPermission(permission, kind))
}

func missingPermission(permission, kind string) string {
	return fmt.Sprintf("caller does not have %s access to the Google Cloud Storage %s. Permission '%s' denied on resource (or it may not exist).", permission, kind, permission)
}

func (f *Server) retentionNotMet(name string) *answer {
	return jsonFailure(http.StatusForbidden, "retentionPolicyNotMet",
		fmt.Sprintf("Object '%s/%s' is subject to bucket's retention policy or object retention and cannot be deleted or overwritten until %s",
			Bucket, name, time.Now().AddDate(1, 0, 0).UTC().Format(time.RFC3339)))
}
