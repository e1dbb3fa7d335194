package fakegcs

import (
	"bytes"
	"crypto/md5"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"net/http"
	"net/url"
	"strconv"
	"strings"
)

// What the fake answers, in the words and fields of GCS.

const conditionNotMet = "At least one of the pre-conditions you specified did not hold."

// checkConditions compares a request's conditions with an object, nil for none.
func checkConditions(cond map[string]string, o *Object, reading bool) *answer {
	var generation, metageneration int64
	if o != nil {
		generation, metageneration = o.Generation, o.Metageneration
	}
	for _, k := range []string{"ifGenerationMatch", "ifMetagenerationMatch", "ifGenerationNotMatch", "ifMetagenerationNotMatch"} {
		v, ok := cond[k]
		if !ok {
			continue
		}
		want, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			return jsonFailure(http.StatusBadRequest, "invalid", fmt.Sprintf("Invalid value %q for %s.", v, k))
		}
		have := generation
		if strings.HasPrefix(k, "ifMeta") {
			have = metageneration
		}
		not := strings.HasSuffix(k, "NotMatch")
		switch {
		case (have == want) != not:
		case not && reading:
			return &answer{status: http.StatusNotModified}
		default:
			return jsonFailure(http.StatusPreconditionFailed, "conditionNotMet", conditionNotMet)
		}
	}
	return nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sums returns the checksums of data as GCS writes them.
func sums(data []byte) (md5Sum, crc32c string) {
	digest := md5.Sum(data)
	return base64.StdEncoding.EncodeToString(digest[:]),
		base64.StdEncoding.EncodeToString(binary.BigEndian.AppendUint32(nil, crc32.Checksum(data, castagnoli)))
}

// checkSums compares data with the checksums that came with it.
func checkSums(data []byte, r resource, headers []string) *answer {
	haveMD5, haveCRC := sums(data)
	wantMD5, wantCRC := []string{r.MD5}, []string{r.CRC32C}
	for _, h := range strings.Split(strings.Join(headers, ","), ",") {
		kind, v, _ := strings.Cut(strings.TrimSpace(h), "=")
		switch kind {
		case "md5":
			wantMD5 = append(wantMD5, v)
		case "crc32c":
			wantCRC = append(wantCRC, v)
		}
	}
	for _, want := range wantMD5 {
		if want != "" && want != haveMD5 {
			return jsonFailure(http.StatusBadRequest, "invalid", fmt.Sprintf("Provided MD5 hash %q doesn't match calculated MD5 hash %q.", want, haveMD5))
		}
	}
	for _, want := range wantCRC {
		if want != "" && want != haveCRC {
			return jsonFailure(http.StatusBadRequest, "invalid", fmt.Sprintf("Provided CRC32C %q doesn't match calculated CRC32C %q.", want, haveCRC))
		}
	}
	return nil
}

// describe answers with an object's attributes.
func (f *Server) describe(c *call, o *Object, query url.Values, projection string, applied bool) *answer {
	if p := query.Get("projection"); p != "" {
		projection = p
	}
	a := jsonAnswer(o.json(c.base, projection == "full"), query.Get("fields"))
	a.applied = applied
	return a
}

// json is an object as the JSON API describes it.
func (o *Object) json(base string, full bool) map[string]any {
	const milliseconds = "2006-01-02T15:04:05.000Z"
	generation := strconv.FormatInt(o.Generation, 10)
	metageneration := strconv.FormatInt(o.Metageneration, 10)
	etag := base64.StdEncoding.EncodeToString([]byte(generation + "/" + metageneration))
	path := "/storage/v1/b/" + Bucket + "/o/" + url.PathEscape(o.Name)
	m := map[string]any{
		"kind":                    "storage#object",
		"id":                      Bucket + "/" + o.Name + "/" + generation,
		"selfLink":                base + path,
		"mediaLink":               base + "/download" + path + "?generation=" + generation + "&alt=media",
		"name":                    o.Name,
		"bucket":                  Bucket,
		"generation":              generation,
		"metageneration":          metageneration,
		"contentType":             o.ContentType,
		"storageClass":            "STANDARD",
		"size":                    strconv.Itoa(len(o.Data)),
		"md5Hash":                 o.MD5,
		"crc32c":                  o.CRC32C,
		"etag":                    etag,
		"timeCreated":             o.Created.Format(milliseconds),
		"updated":                 o.Updated.Format(milliseconds),
		"timeStorageClassUpdated": o.Created.Format(milliseconds),
		"timeFinalized":           o.Created.Format(milliseconds),
	}
	for k, v := range o.headers {
		if v != "" {
			m[k] = v
		}
	}
	if len(o.Metadata) > 0 {
		m["metadata"] = maps.Clone(o.Metadata)
	}
	if !full {
		return m
	}
	rule := func(entity, role string) map[string]any {
		return map[string]any{
			"kind":       "storage#objectAccessControl",
			"object":     o.Name,
			"generation": generation,
			"id":         Bucket + "/" + o.Name + "/" + generation + "/" + entity,
			"selfLink":   base + path + "/acl/" + entity,
			"bucket":     Bucket,
			"entity":     entity,
			"role":       role,
			"etag":       etag,
		}
	}
	acl := []any{}
	for _, team := range []string{"owners", "editors", "viewers"} {
		role := "OWNER"
		if team == "viewers" {
			role = "READER"
		}
		r := rule("project-"+team+"-123456789012", role)
		r["projectTeam"] = map[string]any{"projectNumber": "123456789012", "team": team}
		acl = append(acl, r)
	}
	const owner = "user-athens@example-project.iam.gserviceaccount.com"
	r := rule(owner, "OWNER")
	r["email"] = strings.TrimPrefix(owner, "user-")
	m["acl"] = append(acl, r)
	m["owner"] = map[string]any{"entity": owner}
	return m
}

// jsonAnswer answers with those fields of v that a partial response selects.
func jsonAnswer(v map[string]any, fields string) *answer {
	var selected any = v
	if fields != "" {
		selector, rest := parseFields(fields)
		if rest != "" {
			return jsonFailure(http.StatusBadRequest, "invalidParameter", "Invalid field selection "+fields)
		}
		selected = selector.of(v)
	}
	body, err := json.Marshal(selected)
	if err != nil {
		panic(err)
	}
	return &answer{status: http.StatusOK, header: http.Header{"Content-Type": {"application/json; charset=UTF-8"}}, body: body}
}

// fieldSelector is a parsed fields parameter, such as
// nextPageToken,items(name,metadata/key). An empty one selects everything.
type fieldSelector map[string]fieldSelector

func parseFields(s string) (sel fieldSelector, rest string) {
	sel = fieldSelector{}
	for {
		last := sel
		for more := true; more; {
			end := strings.IndexAny(s, ",()/")
			if end < 0 {
				end = len(s)
			}
			inner := fieldSelector{}
			last[s[:end]] = inner
			last = inner
			s, more = strings.CutPrefix(s[end:], "/")
		}
		if after, ok := strings.CutPrefix(s, "("); ok {
			inner, after := parseFields(after)
			if s, ok = strings.CutPrefix(after, ")"); !ok {
				return sel, "unbalanced"
			}
			maps.Copy(last, inner)
		}
		if !strings.HasPrefix(s, ",") {
			return sel, s
		}
		s = s[1:]
	}
}

func (sel fieldSelector) of(v any) any {
	if len(sel) == 0 {
		return v
	}
	switch v := v.(type) {
	case []any:
		picked := make([]any, len(v))
		for i := range v {
			picked[i] = sel.of(v[i])
		}
		return picked
	case map[string]any:
		picked := map[string]any{}
		for k, inner := range v {
			if s, ok := sel[k]; ok {
				picked[k] = s.of(inner)
			} else if s, ok := sel["*"]; ok {
				picked[k] = s.of(inner)
			}
		}
		return picked
	case map[string]string:
		picked := map[string]string{}
		for k, s := range v {
			if _, ok := sel[k]; ok {
				picked[k] = s
			}
		}
		return picked
	}
	return v
}

func tooManyRequests(name string) *answer {
	return jsonFailure(http.StatusTooManyRequests, "rateLimitExceeded",
		"The object "+Bucket+"/"+name+" exceeded the rate limit for object mutation operations (create, update, and delete). Please reduce your request rate. See https://cloud.google.com/storage/docs/gcs429.")
}

// gap answers a chunk that begins behind what is persisted, word for word.
func gap(start int64, persisted int) *answer {
	return &answer{
		status: http.StatusServiceUnavailable,
		header: http.Header{"Content-Type": {"text/plain; charset=utf-8"}},
		body: fmt.Appendf(nil, "Invalid request.  According to the Content-Range header, the upload offset is %d byte(s), which exceeds already uploaded size of %d byte(s).",
			start, persisted),
	}
}

// jsonFailure is an error of the JSON API.
func jsonFailure(status int, reason, message string) *answer {
	detail := map[string]any{"domain": "global", "reason": reason, "message": message}
	switch status {
	case http.StatusPreconditionFailed:
		detail["locationType"], detail["location"] = "header", "If-Match"
	case http.StatusTooManyRequests:
		detail["domain"] = "usageLimits"
	}
	a := jsonAnswer(map[string]any{"error": map[string]any{"code": status, "message": message, "errors": []any{detail}}}, "")
	a.status = status
	return a
}

// xmlFailure is an error of the XML API, by which the client reads objects.
func xmlFailure(status int, code, message, details string) *answer {
	body := fmt.Sprintf("<?xml version='1.0' encoding='UTF-8'?><Error><Code>%s</Code><Message>%s</Message>", code, message)
	if details != "" {
		body += "<Details>" + details + "</Details>"
	}
	return &answer{
		status: status,
		header: http.Header{"Content-Type": {"application/xml; charset=UTF-8"}},
		body:   []byte(body + "</Error>"),
	}
}

// answer is the http.ResponseWriter of a read.
func (a *answer) Header() http.Header  { return a.header }
func (a *answer) WriteHeader(code int) { a.status = code }
func (a *answer) Write(b []byte) (int, error) {
	a.body = append(a.body, b...)
	return len(b), nil
}

func (a *answer) response(r *http.Request, breakOff bool) *http.Response {
	resp := &http.Response{
		Status:        fmt.Sprintf("%d %s", a.status, http.StatusText(a.status)),
		StatusCode:    a.status,
		Proto:         "HTTP/1.1",
		ProtoMajor:    1,
		ProtoMinor:    1,
		Header:        a.header.Clone(),
		ContentLength: int64(len(a.body)),
		Body:          io.NopCloser(bytes.NewReader(a.body)),
	}
	if resp.Header == nil {
		resp.Header = http.Header{}
	}
	if r.Method == http.MethodHead {
		resp.ContentLength, _ = strconv.ParseInt(a.header.Get("Content-Length"), 10, 64)
		resp.Body = http.NoBody
		return resp
	}
	resp.Header.Set("Content-Length", strconv.Itoa(len(a.body)))
	if breakOff && len(a.body) > 0 {
		resp.Body = io.NopCloser(io.MultiReader(bytes.NewReader(a.body[:len(a.body)/2]), brokenReader{}))
	}
	return resp
}

type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }
