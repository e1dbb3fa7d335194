package gcs

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/md5"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"runtime"
	"runtime/metrics"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"cloud.google.com/go/storage"
	"google.golang.org/api/iterator"
	"google.golang.org/api/option"

	"github.com/athensgcs/gcs/internal/fakegcs"
)

// The benchmarks compare this package, as gcs, with a straightforward backend,
// as baseline. Each has two parts. Requests, round trips one after another, bytes
// of bodies, and the time they take at 20 ms a round trip are counted on the fake
// bucket, in virtual time. Time and memory are measured over a loopback socket,
// with the server in a process of its own, so that B/op is the client's alone.
var backends = []struct {
	name string
	on   func(*storage.BucketHandle) backend
}{
	{"gcs", func(b *storage.BucketHandle) backend { return NewStorage(b) }},
	{"baseline", func(b *storage.BucketHandle) backend { return baseline{b} }},
}

const (
	smallZip = 100 << 10
	largeZip = 50_000_000
)

// BenchmarkCall is every call but those that wait, with a zip of 100 KiB, and
// 1,000 versions to list.
func BenchmarkCall(b *testing.B) {
	type operation = func(s backend, vers string) error
	type call struct {
		name       string
		stored     int  // versions in the bucket
		fresh      bool // each call gets a version of its own
		before, do operation
	}
	ctx := context.Background()
	small := contentOf("a", smallZip)
	sum := md5.Sum(small.zip)
	save := func(s backend, vers string) error {
		return s.Save(ctx, testModule, vers, small.mod, plain(bytes.NewReader(small.zip)), sum[:], small.info)
	}
	for _, c := range []call{
		{"SaveNew", 0, true, nil, save},
		{"SaveComplete", 1, false, nil, func(s backend, vers string) error {
			err := save(s, vers)
			return unless(Kind(err) == KindAlreadyExists || errors.Is(err, errExists), err)
		}},
		{"Exists", 1, false, nil, func(s backend, vers string) error { ok, err := s.Exists(ctx, testModule, vers); return unless(ok, err) }},
		{"Info", 1, false, nil, func(s backend, vers string) error { _, err := s.Info(ctx, testModule, vers); return err }},
		{"GoMod", 1, false, nil, func(s backend, vers string) error { _, err := s.GoMod(ctx, testModule, vers); return err }},
		{"Zip", 1, false, nil, func(s backend, vers string) error { n, err := readZip(ctx, s, vers); return unless(n == smallZip, err) }},
		{"List1000", 1000, false, nil, func(s backend, _ string) error {
			list, err := s.List(ctx, testModule)
			return unless(len(list) == 1000, err)
		}},
		{"Delete", 0, true, save, func(s backend, vers string) error { return s.Delete(ctx, testModule, vers) }},
	} {
		for _, of := range backends {
			b.Run(c.name+"/"+of.name, func(b *testing.B) {
				counted := inVirtualTime(b, func(t *testing.T, f *fakeGCS) traffic {
					storeVersions(f, c.stored)
					s := of.on(f.Machine("a").Bucket)
					if c.before != nil {
						fatal(t, c.before(s, "v1.0.0"))
					}
					return measure(f, func() { fatal(t, c.do(s, "v1.0.0")) })
				})

				s := of.on(startServer(b, "fake", c.stored))
				vers := "v1.0.0"
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					if c.fresh {
						vers = fmt.Sprintf("v1.0.%d", i)
					}
					if c.before != nil {
						b.StopTimer()
						fatal(b, c.before(s, vers))
						b.StartTimer()
					}
					fatal(b, c.do(s, vers))
				}
				counted.report(b)
			})
		}
	}
}

// BenchmarkSaveHundred is a hundred saves of small versions at once.
func BenchmarkSaveHundred(b *testing.B) {
	small := contentOf("a", smallZip)
	for _, of := range backends {
		b.Run(of.name, func(b *testing.B) {
			s := of.on(startServer(b, "lean", 0))
			peak := 0.0
			b.ReportAllocs()
			for b.Loop() {
				peak = max(peak, peakHeap(func() {
					together(100, func(i int) {
						zip := plain(bytes.NewReader(small.zip))
						if err := s.Save(b.Context(), testModule, fmt.Sprintf("v1.0.%d", i), small.mod, zip, nil, small.info); err != nil {
							b.Error(err)
						}
					})
				}))
			}
			b.ReportMetric(peak, "peak-MiB")
		})
	}
}

// BenchmarkListing is List, Catalog and Scan of 1,000 versions in each of the states
// of storeIn, beside a listing by the client alone.
func BenchmarkListing(b *testing.B) {
	const n = 1000
	for _, call := range []string{"List", "Catalog", "Scan"} {
		for _, state := range []string{"whole", "copied", "partial", "abandoned", "tenth partial"} {
			b.Run(call+"/"+state, func(b *testing.B) {
				beside(b, state, n, 0, func(f *fakeGCS) { storeIn(f, state, n) }, func(ctx context.Context, bucket *storage.BucketHandle) error {
					return everyCall(NewStorage(bucket))[call](ctx)
				}, func(ctx context.Context, bucket *storage.BucketHandle) error {
					q := &storage.Query{Projection: storage.ProjectionNoACL}
					q.SetAttrSelection([]string{"Name", "Size", "Generation", "Metageneration", "Metadata", "Created", "Updated"})
					_, err := iterator.NewPager(bucket.Objects(ctx, q), 4*n, "").NextPage(new([]*storage.ObjectAttrs))
					return err
				})
			})
		}
	}
}

// storeIn puts n versions into the bucket, all in one state, or every tenth partial.
func storeIn(f *fakeGCS, state string, n int) {
	for i := range n {
		v := ModuleVersion{testModule, fmt.Sprintf("v1.%d.0", i)}
		mod, others, exts := map[string]string{keySaveID: "a"}, map[string]string{keySaveID: "a"}, []string{extInfo, extMod, extZip}
		switch {
		case state == "copied":
			others[keyGeneration] = "1"
		case state == "abandoned":
			mod = marked(givenUp, "b")
		case state == "partial", state == "tenth partial" && i%10 == 0:
			exts = exts[:2]
		}
		f.putAs(content{}, v, time.Now(), mod, others, exts...)
	}
}

// BenchmarkScanLarge scans buckets of 10,000 and of 1,000,000 objects. peak-MiB is the
// most that is in use, garbage aside, when a version is yielded.
func BenchmarkScanLarge(b *testing.B) {
	for kind, files := range map[string]int{"lean": 3, "lean, partial": 2} {
		for _, objects := range []int{10_000, 1_000_000} {
			b.Run(fmt.Sprintf("%s/%d", kind, objects), func(b *testing.B) {
				s, peak, n := NewStorage(startServer(b, kind, objects/files)), uint64(0), 0
				b.ReportAllocs()
				for b.Loop() {
					for _, err := range s.Scan(b.Context(), "") {
						fatal(b, err)
						if n++; n%997 == 0 {
							var m runtime.MemStats
							runtime.GC()
							runtime.ReadMemStats(&m)
							peak = max(peak, m.HeapAlloc)
						}
					}
				}
				b.ReportMetric(float64(peak)/(1<<20), "peak-MiB")
			})
		}
	}
}

// BenchmarkLarge is a save of a 50 MB zip beside a bare upload of the same bytes, and the
// stream of one beside that of the baseline. The line is far faster than any to GCS, so that
// the client's own share of the time shows.
func BenchmarkLarge(b *testing.B) {
	read := func(ctx context.Context, s backend) error {
		n, err := readZip(ctx, s, testVersion)
		return unless(n == largeZip, err)
	}
	for _, of := range backends {
		b.Run("Zip/"+of.name, func(b *testing.B) {
			beside(b, "lean", 0, largeZip, func(f *fakeGCS) {
				f.putAs(contentOf("a", largeZip), testVersionName, time.Now(), nil, nil, allExts...)
			}, func(ctx context.Context, bucket *storage.BucketHandle) error {
				return read(ctx, of.on(bucket))
			}, func(ctx context.Context, bucket *storage.BucketHandle) error {
				return read(ctx, baseline{bucket})
			})
		})
		for name, sum := range map[string][]byte{"Save/": nil, "Save with MD5/": largeMD5()} {
			b.Run(name+of.name, func(b *testing.B) {
				beside(b, "lean", 0, largeZip, func(*fakeGCS) {}, func(ctx context.Context, bucket *storage.BucketHandle) error {
					return of.on(bucket).Save(ctx, testModule, testVersion, []byte("module a"), newPattern(largeZip), sum, []byte("{}"))
				}, func(ctx context.Context, bucket *storage.BucketHandle) error {
					return upload(ctx, bucket.Object("bare"), newPattern(largeZip))
				})
			})
		}
	}
}

// beside benchmarks do, of that many bytes, on a server of that kind. x-bare is its time over
// that of bare, as the median of pairs that ran in turn, and peak-MiB is by how much the heap
// in use grows meanwhile. Its traffic is counted on a bucket that fill has filled.
func beside(b *testing.B, kind string, versions int, size int64, fill func(*fakeGCS), do, bare func(context.Context, *storage.BucketHandle) error) {
	bucket := startServer(b, kind, versions)
	run := func() { fatal(b, do(b.Context(), bucket)) }
	runBare := func() { fatal(b, bare(b.Context(), bucket)) }
	run() // connects
	runBare()
	peak := peakHeap(run)
	ratio := pairs(b, size, run, runBare)
	inVirtualTime(b, func(t *testing.T, f *fakeGCS) traffic {
		fill(f)
		bucket := f.Machine("a").Bucket
		return measure(f, func() { fatal(t, do(t.Context(), bucket)) })
	}).report(b)
	b.ReportMetric(ratio, "x-bare")
	b.ReportMetric(peak, "peak-MiB")
}

// traffic is what a call costs on the network.
type traffic struct {
	requests, trips, sent, received float64
	took                            time.Duration
}

// measure counts what do costs.
func measure(f *fakeGCS, do func()) traffic {
	f.ResetLog()
	start := time.Now()
	do()
	log := f.Log()
	c := traffic{requests: float64(len(log)), trips: float64(fakegcs.SerialTrips(log)), took: time.Since(start)}
	for _, r := range log {
		c.sent += float64(r.Sent)
		c.received += float64(r.Received)
	}
	return c
}

func (c traffic) report(b *testing.B) {
	b.ReportMetric(c.requests, "requests/op")
	b.ReportMetric(c.trips, "serial-trips/op")
	b.ReportMetric(c.sent, "sent-B/op")
	b.ReportMetric(c.received, "received-B/op")
	b.ReportMetric(float64(c.took)/float64(time.Millisecond), "virtual-ms/op")
}

// storeVersions puts n versions into the bucket, the first with a zip of 100 KiB.
func storeVersions(f *fakeGCS, n int) {
	for i := range n {
		v := ModuleVersion{testModule, fmt.Sprintf("v1.0.%d", i)}
		f.putAs(contentOf("a", smallZip/(i+1)), v, time.Now(), nil, map[string]string{keySaveID: newSaveID()}, allExts...)
	}
}

func fatal(t testing.TB, err error) {
	if err != nil {
		t.Helper()
		t.Fatal(err)
	}
}

// unless is err, or another error unless ok.
func unless(ok bool, err error) error {
	if ok {
		return nil
	}
	return cmp.Or(err, errors.New("not the answer that was expected"))
}

func readZip(ctx context.Context, s backend, vers string) (int64, error) {
	zip, err := s.Zip(ctx, testModule, vers)
	if err != nil {
		return 0, err
	}
	defer zip.Close()
	return io.Copy(io.Discard, zip)
}

// pairs runs do and bare in turn, and returns the median of their times' ratios.
// The benchmark's figures are do's.
func pairs(b *testing.B, bytes int64, do, bare func()) float64 {
	timed := func(f func()) time.Duration {
		start := time.Now()
		f()
		return time.Since(start)
	}
	var ratios []float64
	pair := func(do func()) {
		var took [2]time.Duration
		for i := range 2 {
			which := (len(ratios) + i) % 2
			runtime.GC() // or the one pays for the garbage of the other
			took[which] = timed([]func(){do, bare}[which])
		}
		ratios = append(ratios, float64(took[0])/float64(took[1]))
	}
	b.ReportAllocs()
	b.SetBytes(bytes)
	for b.Loop() {
		b.StopTimer()
		pair(func() {
			b.StartTimer()
			do()
			b.StopTimer()
		})
		b.StartTimer()
	}
	for len(ratios) < 15 { // a median of few means little
		pair(do)
	}
	slices.Sort(ratios)
	return ratios[len(ratios)/2]
}

// peakHeap is by how many MiB the heap in use grows, at most, while f runs.
func peakHeap(f func()) float64 {
	runtime.GC()
	runtime.GC() // sync.Pools give up what they hold in two steps
	sample := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/unused:bytes"}}
	inUse := func() float64 {
		metrics.Read(sample)
		return float64(sample[0].Value.Uint64()+sample[1].Value.Uint64()) / (1 << 20)
	}
	before := inUse()
	peak := before
	done, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				peak = max(peak, inUse())
			case <-done:
				peak = max(peak, inUse())
				return
			}
		}
	}()
	f()
	close(done)
	<-stopped
	return peak - before
}

// A pattern is a zip that is made as it is read, so that it takes no memory.
type pattern struct{ at, size int64 }

var patternBlock = func() []byte {
	block := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{}).Read(block)
	return block
}()

func newPattern(size int64) io.Reader { return &pattern{size: size} }

func (r *pattern) Read(p []byte) (int, error) {
	if r.at == r.size {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), r.size-r.at)]
	n := copy(p, patternBlock[r.at%int64(len(patternBlock)):])
	r.at += int64(n)
	return n, nil
}

var largeMD5 = sync.OnceValue(func() []byte {
	h := md5.New()
	io.Copy(h, newPattern(largeZip))
	return h.Sum(nil)
})

// The server of a benchmark is this test program once more.
const (
	serverKind     = "GCS_BENCH_SERVER"   // fake, lean, or a state of storeIn
	serverVersions = "GCS_BENCH_VERSIONS" // how many it holds
)

// startServer returns the bucket of a server that runs until the benchmark ends.
// It is the fake bucket, or a lean one, which forgets what it is sent, and whose
// time and memory do not depend on what that was.
func startServer(b *testing.B, kind string, versions int) *storage.BucketHandle {
	b.Helper()
	child := exec.Command(os.Args[0], "-test.run=^TestBenchServer$", "-test.v", "-test.timeout=0")
	child.Env = append(os.Environ(), serverKind+"="+kind, serverVersions+"="+strconv.Itoa(versions))
	child.Stderr = os.Stderr
	stdin, err := child.StdinPipe() // whose end tells the child to end
	fatal(b, err)
	stdout, err := child.StdoutPipe()
	fatal(b, err)
	fatal(b, child.Start())
	b.Cleanup(func() {
		stdin.Close()
		io.Copy(io.Discard, stdout)
		child.Wait()
	})
	endpoint, lines := "", bufio.NewScanner(stdout)
	for started := false; !started; endpoint, started = strings.CutPrefix(lines.Text(), serverKind+"=") {
		fatal(b, unless(lines.Scan(), errors.New("the server did not start")))
	}
	wire := &http.Transport{MaxIdleConnsPerHost: 1000}
	b.Cleanup(wire.CloseIdleConnections)
	client, err := storage.NewClient(context.Background(), option.WithEndpoint(endpoint+"/storage/v1/"),
		option.WithHTTPClient(&http.Client{Transport: wire}), option.WithoutAuthentication())
	fatal(b, err)
	b.Cleanup(func() { client.Close() })
	return client.Bucket(fakegcs.Bucket)
}

// TestBenchServer is the process that startServer starts.
func TestBenchServer(t *testing.T) {
	versions, _ := strconv.Atoi(os.Getenv(serverVersions))
	var endpoint string
	switch os.Getenv(serverKind) {
	case "":
		t.Skip("only for benchmarks")
	case "lean":
		endpoint = httptest.NewServer(newLeanServer(versions, extInfo, extMod, extZip)).URL
	case "lean, partial":
		endpoint = httptest.NewServer(newLeanServer(versions, extInfo, extMod)).URL
	case "fake":
		f := newFakeGCS(t)
		f.tolerate() // the baseline
		storeVersions(f, versions)
		endpoint = f.listen(t)
	default:
		f := newFakeGCS(t)
		storeIn(f, os.Getenv(serverKind), versions)
		endpoint = f.listen(t)
	}
	fmt.Printf("\n%s=%s\n", serverKind, endpoint)
	io.Copy(io.Discard, os.Stdin)
}

// A leanServer answers as a bucket of so many versions, with zips of 50 MB. It
// accepts all that is sent and keeps none of it.
type leanServer struct {
	versions int
	exts     []string
	item     *fakegcs.Server // with one object
	crc32c   string
}

func newLeanServer(versions int, exts ...string) *leanServer {
	h := crc32.New(crc32.MakeTable(crc32.Castagnoli))
	io.Copy(h, newPattern(largeZip))
	sum := base64.StdEncoding.EncodeToString(binary.BigEndian.AppendUint32(nil, h.Sum32()))
	item := fakegcs.New()
	item.Put(placeholder, nil, map[string]string{keySaveID: "ABCDEFGHIJKLMNOPQRSTUVWXYZ"})
	return &leanServer{versions, exts, item, sum}
}

func (s *leanServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body)
	query := r.URL.Query()
	switch {
	case query.Get("uploadType") == "resumable" && r.Method == http.MethodPost:
		w.Header().Set("Location", "http://"+r.Host+r.URL.Path+"?upload_id=1")
	case strings.HasSuffix(r.Header.Get("Content-Range"), "/*"):
		w.Header().Set("X-Http-Status-Code-Override", "308")
	case r.Method == http.MethodGet && r.URL.Path == "/storage/v1/b/"+fakegcs.Bucket+"/o":
		s.list(w, query)
	case r.Method == http.MethodGet && strings.HasPrefix(r.URL.Path, "/storage/"): // a look before a save
		w.WriteHeader(http.StatusNotFound)
	case r.Method == http.MethodGet:
		w.Header().Set("Content-Length", strconv.Itoa(largeZip))
		w.Header().Set("Content-Type", "application/zip")
		w.Header().Set("X-Goog-Generation", "1")
		w.Header().Set("X-Goog-Hash", "crc32c="+s.crc32c)
		io.Copy(w, newPattern(largeZip))
	default:
		w.Header().Set("Content-Type", "application/json; charset=UTF-8")
		io.WriteString(w, `{"generation":"1","metageneration":"1"}`)
	}
}

// object is the name of the i-th of the bucket's objects, which come in order.
func (s *leanServer) object(i int) string {
	n := len(s.exts)
	return fmt.Sprintf("example.com/module%04d/@v/v1.0.%02d.%s", i/n/100, i/n%100, s.exts[i%n])
}

// list answers with a part of a listing.
func (s *leanServer) list(w http.ResponseWriter, query url.Values) {
	from := func(name string) int {
		return sort.Search(len(s.exts)*s.versions, func(i int) bool { return s.object(i) >= name })
	}
	prefix, last := query.Get("prefix"), query.Get("endOffset")
	first, err := strconv.Atoi(query.Get("pageToken"))
	if err != nil {
		first = from(max(prefix, query.Get("startOffset")))
	}
	end := from(prefix + "\xff")
	if last != "" {
		end = min(end, from(last))
	}
	size, err := strconv.Atoi(query.Get("maxResults"))
	if err != nil {
		size = maxPage
	}
	var page bytes.Buffer
	page.WriteString("{")
	if first+size < end {
		end = first + size
		fmt.Fprintf(&page, `"nextPageToken":"%d",`, end)
	}
	page.WriteString(`"items":[`)
	item := itemOf(s.item, url.Values{"fields": query["fields"], "projection": query["projection"]})
	for i := first; i < end; i++ {
		if i > first {
			page.WriteString(",")
		}
		page.Write(bytes.ReplaceAll(item, []byte(placeholder), []byte(s.object(i))))
	}
	page.WriteString("]}")
	w.Header().Set("Content-Type", "application/json; charset=UTF-8")
	w.Write(page.Bytes())
}

const placeholder = "NAME"

// itemOf is an object in a listing, but for its name. All the others are alike, and
// to encode each of them would be most of what takes time.
func itemOf(f *fakegcs.Server, query url.Values) []byte {
	answer := httptest.NewRecorder()
	f.Handler().ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "/storage/v1/b/"+fakegcs.Bucket+"/o?"+query.Encode(), nil))
	var page struct{ Items []json.RawMessage }
	if err := json.Unmarshal(answer.Body.Bytes(), &page); err != nil {
		panic(err)
	}
	return page.Items[0]
}
