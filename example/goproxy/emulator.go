package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/fsouza/fake-gcs-server/fakestorage"
)

// emulatorHost is where the fake expects its requests to go.
const emulatorHost = "storage.googleapis.com"

// emulator is a bucket in memory, reached through the http.RoundTripper that it
// is. The fake behind it knows neither metagenerations nor conditions on
// anything but uploads, and it cannot clear metadata; saving rests on all
// three, so the emulator adds them. One request is carried out at a time.
type emulator struct {
	bucket string
	server *fakestorage.Server

	mu sync.Mutex
	// By object and generation; an object whose metadata never changed has no
	// entry, and metageneration 1.
	metagenerations map[string]int64
}

func newEmulator(bucket string) (*emulator, error) {
	server, err := fakestorage.NewServerWithOptions(fakestorage.Options{NoListener: true})
	if err != nil {
		return nil, err
	}
	server.CreateBucketWithOpts(fakestorage.CreateBucketOpts{Name: bucket})
	return &emulator{bucket: bucket, server: server, metagenerations: map[string]int64{}}, nil
}

func (e *emulator) RoundTrip(req *http.Request) (*http.Response, error) {
	// The body comes first, outside the lock: a slow sender holds up nobody,
	// and one that gives up halfway stores nothing.
	var body []byte
	if req.Body != nil {
		defer req.Body.Close()
		var err error
		if body, err = io.ReadAll(req.Body); err != nil {
			return nil, err
		}
	}
	if err := req.Context().Err(); err != nil {
		return nil, err
	}
	req = req.Clone(req.Context())
	req.URL.Host, req.Host = emulatorHost, emulatorHost

	e.mu.Lock()
	defer e.mu.Unlock()
	object := strings.TrimPrefix(req.URL.Path, "/storage/v1/b/"+e.bucket+"/o/")
	switch {
	case strings.HasPrefix(req.URL.Path, "/upload/"):
		return e.upload(req, body)
	case req.Method == http.MethodPatch:
		return e.patch(req, object, body)
	case req.Method == http.MethodDelete && e.exists(object) && e.refused(req, object):
		return reply(req, http.StatusPreconditionFailed), nil
	}
	return e.forward(req, body)
}

func (e *emulator) upload(req *http.Request, body []byte) (*http.Response, error) {
	query := req.URL.Query()
	if e.refused(req, query.Get("name")) {
		return reply(req, http.StatusPreconditionFailed), nil
	}
	// A generation is the time in microseconds; no two writes may share one.
	time.Sleep(time.Microsecond)
	resp, err := e.forward(req, body)
	if err != nil {
		return nil, err
	}
	// The URL of an upload in several requests takes the name and the
	// conditions along, so that they are checked again with each of them.
	if session, err := resp.Location(); err == nil {
		query.Set("upload_id", session.Query().Get("upload_id"))
		session.RawQuery = query.Encode()
		resp.Header.Set("Location", session.String())
	}
	return resp, nil
}

// patch changes user metadata, which is all that is ever patched here.
func (e *emulator) patch(req *http.Request, object string, body []byte) (*http.Response, error) {
	var change map[string]json.RawMessage
	if err := json.Unmarshal(body, &change); err != nil {
		return reply(req, http.StatusBadRequest), nil
	}
	obj, err := e.server.GetObjectStreaming(e.bucket, object)
	if err != nil || !matches(req.URL.Query(), "generation", obj.Generation) {
		return reply(req, http.StatusNotFound), nil
	}
	defer obj.Close()
	if e.refused(req, object) {
		return reply(req, http.StatusPreconditionFailed), nil
	}
	if metadata, ok := change["metadata"]; ok {
		var values map[string]*string
		if err := json.Unmarshal(metadata, &values); err != nil {
			return reply(req, http.StatusBadRequest), nil
		}
		obj.Metadata = merge(obj.Metadata, values)
	}
	obj.Updated = time.Now()
	// Stored under the generation it has, an object replaces itself.
	if err := e.server.CreateObjectStreaming(obj); err != nil {
		return nil, err
	}
	e.metagenerations[key(object, obj.Generation)] = e.metageneration(object, obj.Generation) + 1

	// The answer is the object as a read shows it.
	req.Method, req.URL.RawQuery = http.MethodGet, ""
	return e.forward(req, nil)
}

// merge applies a JSON merge patch: null removes a key, and instead of the
// whole map it removes all of them.
func merge(metadata map[string]string, values map[string]*string) map[string]string {
	if values == nil {
		return nil
	}
	merged := map[string]string{}
	maps.Copy(merged, metadata)
	for k, v := range values {
		if v == nil {
			delete(merged, k)
		} else {
			merged[k] = *v
		}
	}
	return merged
}

func (e *emulator) exists(object string) bool {
	obj, err := e.server.GetObjectStreaming(e.bucket, object)
	if err == nil {
		obj.Close()
	}
	return err == nil
}

// refused reports whether a condition of the request does not hold. An object
// that does not exist counts as generation 0.
func (e *emulator) refused(req *http.Request, object string) bool {
	var generation, metageneration int64
	if obj, err := e.server.GetObjectStreaming(e.bucket, object); err == nil {
		obj.Close()
		generation, metageneration = obj.Generation, e.metageneration(object, obj.Generation)
	}
	query := req.URL.Query()
	return !matches(query, "ifGenerationMatch", generation) ||
		!matches(query, "ifMetagenerationMatch", metageneration)
}

func matches(query url.Values, param string, value int64) bool {
	return !query.Has(param) || query.Get(param) == strconv.FormatInt(value, 10)
}

func key(object string, generation int64) string {
	return fmt.Sprintf("%s#%d", object, generation)
}

func (e *emulator) metageneration(object string, generation int64) int64 {
	return max(1, e.metagenerations[key(object, generation)])
}

// forward lets the fake answer, and puts metagenerations into the answer.
func (e *emulator) forward(req *http.Request, body []byte) (*http.Response, error) {
	req.Body, req.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	resp, err := e.server.HTTPClient().Transport.RoundTrip(req)
	if err != nil || resp.StatusCode != http.StatusOK ||
		!strings.Contains(req.URL.Path, "/storage/v1/b/") || req.URL.Query().Get("alt") == "media" {
		return resp, err
	}
	var answer map[string]any
	decoder := json.NewDecoder(resp.Body)
	decoder.UseNumber()
	if decoder.Decode(&answer) != nil {
		answer = nil // a delete answers null
	}
	resources, _ := answer["items"].([]any)
	for _, resource := range append(resources, answer) {
		e.describe(resource)
	}
	data, err := json.Marshal(answer)
	if err != nil {
		return nil, err
	}
	resp.Body, resp.ContentLength = io.NopCloser(bytes.NewReader(data)), int64(len(data))
	return resp, nil
}

func (e *emulator) describe(resource any) {
	attrs, _ := resource.(map[string]any)
	name, _ := attrs["name"].(string)
	generation, _ := attrs["generation"].(string)
	if g, err := strconv.ParseInt(generation, 10, 64); err == nil {
		attrs["metageneration"] = strconv.FormatInt(e.metageneration(name, g), 10)
	}
}

// reply answers as the JSON API does when it refuses.
func reply(req *http.Request, status int) *http.Response {
	text := fmt.Sprintf(`{"error": {"code": %d, "message": %q}}`, status, http.StatusText(status))
	return &http.Response{
		Status:        http.StatusText(status),
		StatusCode:    status,
		Proto:         "HTTP/1.1",
		ProtoMajor:    1,
		ProtoMinor:    1,
		Header:        http.Header{"Content-Type": {"application/json"}},
		Body:          io.NopCloser(strings.NewReader(text)),
		ContentLength: int64(len(text)),
		Request:       req,
	}
}
