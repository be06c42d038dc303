// Bench compares aoai-proxy with httputil.ReverseProxy, the proxy that Go's
// standard library has:
//
//	make bench              # or go run ./bench; some three minutes
//	go run ./bench -quick   # half a minute, and noisier
//
// Each proxy is a process of its own, so its CPU time and memory can be told
// from those of the clients and of the stand-in for Azure, which are in this
// process. Requests and answers have the headers that an OpenAI SDK and Azure
// send, a token has 1,500 bytes, and the upstream speaks TLS. The proxies are:
//
//	aoai-proxy   the real program, as make build builds it
//	httputil     httputil.ReverseProxy that flushes at once, built in the same
//	             way, with the same transport settings and a fixed token; it
//	             checks and logs nothing, and has full duplex, without which an
//	             answer that comes at once is lost now and then (golang/go#40747)
//	bufferpool   the same with a BufferPool
//	direct       no proxy, the base of the delay
//
// A figure is the median of some rounds, in which the proxies take turns.
// Smaller is better. CPU is that of the proxy's process. "allocated" is how much
// its resident memory grows per request while the garbage collector is off, and
// "resident" is by how much it is larger per open stream, after a request with a
// body of 2 KB or 200 KB. It needs Linux, for /proc.
//
// On two cores of a shared machine, where figures vary by a fifth from run to
// run, it printed in November 2026:
//
//	| measure | aoai-proxy | httputil | bufferpool | direct | aoai-proxy ÷ bufferpool |
//	|---|---|---|---|---|---|
//	| small JSON, 1 client: CPU, µs | 179 | 220 | 195 | | 0.92 |
//	| small JSON, 32 clients: CPU, µs | 77.3 | 114 | 85.2 | | 0.91 |
//	| small JSON: allocated, KiB | 19.8 | 25 | 20.8 | | 0.95 |
//	| fast event stream: CPU per event, µs | 2.77 | 2.8 | 2.9 | | 0.95 |
//	| paced event stream: median delay, µs | 100 | 105 | 98.8 | 16.4 | 1.02 |
//	| open stream, 2 KB prompt: resident, KiB | 71.6 | 82.4 | 84.1 | | 0.85 |
//	| open stream, 200 KB prompt: resident, KiB | 77.4 | 98.9 | 93.6 | | 0.83 |
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// peerVariable makes this program one of the httputil peers.
const peerVariable = "AOAI_BENCH_PEER"

func main() {
	if name := os.Getenv(peerVariable); name != "" {
		log.Fatal(servePeer(name == "bufferpool"))
	}
	quick := flag.Bool("quick", false, "fewer and smaller rounds")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *quick); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// sizes are how much a round does.
type sizes struct {
	rounds   int
	requests int // of small JSON, for each number of clients
	paced    int // events with a pause between them
	fast     int // events without one
	held     int // streams open at a time
}

func run(ctx context.Context, quick bool) error {
	if runtime.GOOS != "linux" {
		return errors.New("it reads CPU time and memory from /proc, which only Linux has")
	}
	size := sizes{rounds: 5, requests: 6400, paced: 150, fast: 40_000, held: 300}
	if quick {
		size = sizes{rounds: 3, requests: 1600, paced: 50, fast: 20_000, held: 100}
	}
	dir, err := os.MkdirTemp("", "aoai-proxy-bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	b, err := newBench(ctx, size, dir)
	if err != nil {
		return err
	}
	fmt.Printf("%d CPUs, %s, %s\n", runtime.NumCPU(), runtime.Version(), b.version)

	for round := range size.rounds {
		for i := range peers {
			name := peers[(i+round)%len(peers)] // who is first changes
			err := b.measure(ctx, name)
			if ctx.Err() != nil {
				return errors.New("interrupted")
			}
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
	}
	b.print()
	return nil
}

var peers = []string{"aoai-proxy", "httputil", "bufferpool", "direct"}

// bench is a run of the comparison.
type bench struct {
	size     sizes
	dir      string // holds the binaries and the upstream's certificate
	version  string // of the binary
	upstream *httptest.Server
	identity *httptest.Server
	client   *tls.Config
	release  chan struct{} // lets held streams end
	figures  map[string]map[string][]float64
}

func newBench(ctx context.Context, size sizes, dir string) (*bench, error) {
	b := &bench{size: size, dir: dir, figures: make(map[string]map[string][]float64)}
	// The peers are this program, built as the proxy is.
	for binary, name := range map[string]string{
		b.binary():     "aoai-proxy",
		b.peerBinary(): "aoai-proxy/bench",
	} {
		build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", binary, name)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("building %s (run it in a checkout): %w\n%s", name, err, out)
		}
	}
	out, _ := exec.CommandContext(ctx, b.binary(), "-version").Output()
	b.version = strings.TrimSpace(string(out))

	b.upstream = httptest.NewTLSServer(http.HandlerFunc(b.answer))
	b.client = b.upstream.Client().Transport.(*http.Transport).TLSClientConfig
	block := &pem.Block{Type: "CERTIFICATE", Bytes: b.upstream.Certificate().Raw}
	b.identity = httptest.NewServer(http.HandlerFunc(giveToken))
	return b, os.WriteFile(b.caFile(), pem.EncodeToMemory(block), 0o600)
}

func (b *bench) binary() string     { return filepath.Join(b.dir, "aoai-proxy") }
func (b *bench) peerBinary() string { return filepath.Join(b.dir, "peer") }
func (b *bench) caFile() string     { return filepath.Join(b.dir, "ca.pem") }

// The measures, in the order of the table.
const (
	jsonAlone     = "small JSON, 1 client: CPU, µs"
	jsonMany      = "small JSON, 32 clients: CPU, µs"
	jsonAllocated = "small JSON: allocated, KiB"
	fastCPU       = "fast event stream: CPU per event, µs"
	pacedDelay    = "paced event stream: median delay, µs"
	heldSmall     = "open stream, 2 KB prompt: resident, KiB"
	heldLarge     = "open stream, 200 KB prompt: resident, KiB"
)

var measures = []string{jsonAlone, jsonMany, jsonAllocated, fastCPU, pacedDelay, heldSmall,
	heldLarge}

func (b *bench) add(measure, peer string, value float64) {
	if b.figures[measure] == nil {
		b.figures[measure] = make(map[string][]float64)
	}
	b.figures[measure][peer] = append(b.figures[measure][peer], value)
}

// measure is one peer's part of a round. What depends on the state of the heap
// gets a process of its own.
func (b *bench) measure(ctx context.Context, name string) error {
	p, err := b.start(ctx, name)
	if err != nil {
		return err
	}
	defer p.stop()
	delays, err := b.pacedDelays(ctx, p)
	if err != nil {
		return err
	}
	b.add(pacedDelay, name, microseconds(delays[len(delays)/2]))
	if name == "direct" {
		return nil // it has no process to look at
	}

	if err := b.postMany(ctx, p, 32, 200); err != nil { // to warm up
		return err
	}
	for _, load := range []struct {
		measure string
		clients int
	}{{jsonAlone, 1}, {jsonMany, 32}} {
		cpu, err := p.cpuOf(func() error {
			return b.postMany(ctx, p, load.clients, b.size.requests)
		})
		if err != nil {
			return err
		}
		if cpu <= 0 {
			return errors.New("/proc tells no CPU time of it")
		}
		b.add(load.measure, name, microseconds(cpu)/float64(b.size.requests))
	}
	cpu, err := p.cpuOf(func() error { return b.readFast(ctx, p) })
	if err != nil {
		return err
	}
	b.add(fastCPU, name, microseconds(cpu)/float64(b.size.fast))

	if err := b.allocated(ctx, name); err != nil {
		return err
	}
	if err := b.held(ctx, heldSmall, name, 2<<10); err != nil {
		return err
	}
	return b.held(ctx, heldLarge, name, 200<<10)
}

func microseconds(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 }

// postMany sends n requests for small JSON, by so many clients at a time.
func (b *bench) postMany(ctx context.Context, p *peer, clients, n int) error {
	errs := make(chan error, clients)
	for range clients {
		go func() {
			for range n / clients {
				text, err := p.post(ctx, "json", prompt(2<<10), io.ReadAll)
				if err == nil && len(text) != len(jsonAnswer) {
					err = fmt.Errorf("an answer of %d bytes, not %d", len(text), len(jsonAnswer))
				}
				if err != nil {
					errs <- err
					return
				}
			}
			errs <- nil
		}()
	}
	var err error
	for range clients {
		err = errors.Join(err, <-errs)
	}
	return err
}

// readFast reads a stream whose events come without a pause.
func (b *bench) readFast(ctx context.Context, p *peer) error {
	text, err := p.post(ctx, "fast", prompt(2<<10), io.ReadAll)
	if want := len(event("0000000000000000000")) * b.size.fast; err == nil && len(text) != want {
		err = fmt.Errorf("a stream of %d bytes, not %d", len(text), want)
	}
	return err
}

// pacedDelays reads a stream of events that hold the time at which they were
// sent, and returns how long each took, in order of length.
func (b *bench) pacedDelays(ctx context.Context, p *peer) ([]time.Duration, error) {
	var delays []time.Duration
	read := func(body io.Reader) ([]byte, error) {
		lines := bufio.NewScanner(body)
		for lines.Scan() {
			text, isEvent := strings.CutPrefix(lines.Text(), "data: ")
			if !isEvent {
				continue
			}
			sent, err := strconv.ParseInt(text[:min(19, len(text))], 10, 64)
			if err != nil {
				return nil, err
			}
			delays = append(delays, time.Duration(time.Now().UnixNano()-sent))
		}
		return nil, lines.Err()
	}
	if _, err := p.post(ctx, "paced", prompt(2<<10), read); err != nil {
		return nil, err
	}
	if len(delays) != b.size.paced {
		return nil, fmt.Errorf("%d events of %d", len(delays), b.size.paced)
	}
	slices.Sort(delays)
	return delays, nil
}

// allocated measures how much memory a request makes a peer allocate and use.
func (b *bench) allocated(ctx context.Context, name string) error {
	p, err := b.start(ctx, name, "GOGC=off")
	if err != nil {
		return err
	}
	defer p.stop()
	if err := b.postMany(ctx, p, 8, 400); err != nil { // connections and buffers are not counted
		return err
	}
	before := p.resident()
	if err := b.postMany(ctx, p, 8, b.size.requests); err != nil {
		return err
	}
	b.add(jsonAllocated, name, float64(p.resident()-before)/1024/float64(b.size.requests))
	return nil
}

// held measures how much memory an open stream holds, after a request with a
// prompt of so many bytes.
func (b *bench) held(ctx context.Context, measure, name string, bytes int) error {
	p, err := b.start(ctx, name)
	if err != nil {
		return err
	}
	defer p.stop()
	if err := b.postMany(ctx, p, 8, 400); err != nil {
		return err
	}
	before := p.resident()

	// They are opened one after the other: what a burst holds until its answers
	// begin is another question.
	b.release = make(chan struct{})
	opened := make(chan error)
	var all sync.WaitGroup
	for range b.size.held {
		all.Add(1)
		go func() {
			defer all.Done()
			reported := false
			_, err := p.post(ctx, "held", prompt(bytes), func(body io.Reader) ([]byte, error) {
				_, err := io.ReadFull(body, make([]byte, len(event("held"))))
				opened <- err
				reported = true
				return io.ReadAll(body)
			})
			if !reported {
				opened <- err
			}
		}()
		err = errors.Join(err, <-opened)
	}
	time.Sleep(300 * time.Millisecond) // for what is freed to be given back
	after := p.resident()
	close(b.release)
	all.Wait()
	if err == nil {
		b.add(measure, name, float64(after-before)/1024/float64(b.size.held))
	}
	return err
}

// print writes the table.
func (b *bench) print() {
	fmt.Printf("\n| measure | %s | aoai-proxy ÷ bufferpool |\n", strings.Join(peers, " | "))
	fmt.Println("|---" + strings.Repeat("|---", len(peers)+1) + "|")
	for _, measure := range measures {
		fmt.Printf("| %s |", measure)
		for _, peer := range peers {
			if len(b.figures[measure][peer]) == 0 {
				fmt.Print(" |")
				continue
			}
			fmt.Printf(" %.3g |", median(b.figures[measure][peer]))
		}
		ours, theirs := b.figures[measure]["aoai-proxy"], b.figures[measure]["bufferpool"]
		fmt.Printf(" %.2f |\n", median(ours)/median(theirs))
	}
}

func median(values []float64) float64 {
	values = slices.Clone(values)
	slices.Sort(values)
	return values[len(values)/2]
}

// peer is what a load goes through.
type peer struct {
	url    string
	cmd    *exec.Cmd // nil for direct
	client *http.Transport
}

// start starts a peer, with more variables in its environment.
func (b *bench) start(ctx context.Context, name string, env ...string) (*peer, error) {
	p := &peer{client: &http.Transport{TLSClientConfig: b.client, MaxIdleConnsPerHost: 1024}}
	if name == "direct" {
		p.url = b.upstream.URL + "/openai"
		return p, nil
	}
	program := b.binary()
	if name != "aoai-proxy" {
		program = b.peerBinary()
		env = append(env, peerVariable+"="+name)
	}
	p.cmd = exec.CommandContext(ctx, program)
	p.cmd.Env = append(env, "TARGET_URL="+b.upstream.URL+"/openai/", "PORT=0", "HOST=127.0.0.1",
		"AZURE_POD_IDENTITY_AUTHORITY_HOST="+b.identity.URL, "SSL_CERT_FILE="+b.caFile())
	stderr, err := p.cmd.StderrPipe()
	if err == nil {
		err = p.cmd.Start()
	}
	if err != nil {
		return nil, err
	}
	var said []string
	lines := bufio.NewScanner(stderr)
	for lines.Scan() {
		said = append(said, lines.Text())
		if _, rest, ok := strings.Cut(lines.Text(), "listening on "); ok {
			addr, _, _ := strings.Cut(rest, " ")
			p.url = "http://" + addr
			go io.Copy(io.Discard, stderr)
			return p, nil
		}
	}
	p.stop()
	return nil, fmt.Errorf("it did not start: %q", said)
}

func (p *peer) stop() {
	p.client.CloseIdleConnections()
	if p.cmd != nil {
		p.cmd.Process.Kill()
		p.cmd.Wait()
	}
}

// post sends a prompt, and returns what read makes of the answer.
func (p *peer) post(ctx context.Context, behaviour string, body []byte,
	read func(io.Reader) ([]byte, error)) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost,
		p.url+"/v1/chat/completions?behaviour="+behaviour, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	for _, header := range clientHeaders {
		req.Header.Set(header[0], header[1])
	}
	if p.cmd == nil {
		req.Header.Set("Authorization", "Bearer "+accessToken)
	}
	resp, err := p.client.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", behaviour, resp.Status)
	}
	answer, err := read(resp.Body)
	if err != nil {
		err = fmt.Errorf("%s: after %d bytes: %w", behaviour, len(answer), err)
	}
	return answer, err
}

// cpuOf is the CPU time that the peer's process spends on a load.
func (p *peer) cpuOf(load func() error) (time.Duration, error) {
	before := p.cpuTime()
	err := load()
	return p.cpuTime() - before, err
}

// cpuTime is the first field of schedstat, in nanoseconds, of all threads.
func (p *peer) cpuTime() (sum time.Duration) {
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", p.cmd.Process.Pid))
	for _, file := range files {
		text, _ := os.ReadFile(file)
		nanoseconds, _, _ := strings.Cut(string(text), " ")
		n, _ := strconv.ParseInt(nanoseconds, 10, 64)
		sum += time.Duration(n)
	}
	return sum
}

// resident is the process's resident memory in bytes.
func (p *peer) resident() int64 {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	_, rest, _ := strings.Cut(string(text), "VmRSS:")
	kilobytes, _ := strconv.ParseInt(strings.Fields(rest + " 0")[0], 10, 64)
	return kilobytes << 10
}

// servePeer is the process of an httputil peer.
func servePeer(pooled bool) error {
	target, err := url.Parse(os.Getenv("TARGET_URL"))
	if err != nil {
		return err
	}
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(target)
			r.Out.Header.Del("Api-Key")
			r.Out.Header.Set("Authorization", "Bearer "+accessToken)
		},
		Transport: &http.Transport{
			MaxIdleConnsPerHost: 1024,
			IdleConnTimeout:     time.Minute,
			DisableCompression:  true,
			TLSClientConfig:     &tls.Config{ClientSessionCache: tls.NewLRUClientSessionCache(0)},
			WriteBufferSize:     8 << 10,
		},
		FlushInterval: -1,
	}
	if pooled {
		proxy.BufferPool = &bufferPool{}
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	log.Printf("listening on %s", ln.Addr())
	return http.Serve(ln, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).EnableFullDuplex()
		proxy.ServeHTTP(w, r)
	}))
}

// bufferPool holds buffers of the size that ReverseProxy makes for itself.
type bufferPool struct{ pool sync.Pool }

func (p *bufferPool) Get() []byte {
	if buf, ok := p.pool.Get().(*[32 << 10]byte); ok {
		return buf[:]
	}
	return make([]byte, 32<<10)
}

func (p *bufferPool) Put(buf []byte) { p.pool.Put((*[32 << 10]byte)(buf)) }

// accessToken has the length of a real one.
var accessToken = "eyJ" + strings.Repeat("x", 1497)

// giveToken is the identity endpoint.
func giveToken(w http.ResponseWriter, _ *http.Request) {
	fmt.Fprintf(w, `{"access_token":%q,"expires_in":"86400"}`, accessToken)
}

// answer is the upstream. It reads the prompt and answers as the query asks.
func (b *bench) answer(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Authorization") != "Bearer "+accessToken {
		http.Error(w, "no token", http.StatusUnauthorized)
		return
	}
	io.Copy(io.Discard, r.Body)
	for _, header := range azureHeaders {
		w.Header().Set(header[0], header[1])
	}
	behaviour := r.URL.Query().Get("behaviour")
	if behaviour == "json" {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Content-Length", strconv.Itoa(len(jsonAnswer)))
		io.WriteString(w, jsonAnswer)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream; charset=utf-8")
	send := func(text string) {
		io.WriteString(w, event(text))
		http.NewResponseController(w).Flush()
	}
	switch behaviour {
	case "paced":
		for range b.size.paced {
			time.Sleep(5 * time.Millisecond)
			send(strconv.FormatInt(time.Now().UnixNano(), 10))
		}
	case "fast":
		for range b.size.fast {
			send("0000000000000000000")
		}
	case "held":
		send("held")
		<-b.release
	}
}

// event is a server-sent event of some 200 bytes, as a word of a chat is.
func event(text string) string {
	const filler = `{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1760000000,` +
		`"model":"gpt-4o","choices":[{"index":0,"delta":{"content":" word"},"finish_reason":null}]}`
	return "data: " + text + " " + filler + "\n\n"
}

// prompt is a request body of so many bytes.
func prompt(bytes int) []byte {
	const begin, end = `{"model":"gpt-4o","messages":[{"role":"user","content":"`, `"}]}`
	return []byte(begin + strings.Repeat("x", bytes-len(begin)-len(end)) + end)
}

var jsonAnswer = `{"choices":[{"message":{"content":"` + strings.Repeat("x", 985) + `"}}]}`

// clientHeaders are those of openai-python.
var clientHeaders = [][2]string{
	{"Accept", "application/json"},
	{"Accept-Encoding", "gzip, deflate"},
	{"Api-Key", "bench-client-key"},
	{"Content-Type", "application/json"},
	{"User-Agent", "AzureOpenAI/Python 1.109.1"},
	{"X-Stainless-Arch", "x64"},
	{"X-Stainless-Async", "false"},
	{"X-Stainless-Lang", "python"},
	{"X-Stainless-Os", "Linux"},
	{"X-Stainless-Package-Version", "1.109.1"},
	{"X-Stainless-Read-Timeout", "600"},
	{"X-Stainless-Retry-Count", "0"},
	{"X-Stainless-Runtime", "CPython"},
	{"X-Stainless-Runtime-Version", "3.12.4"},
}

// azureHeaders are those of an answer of Azure OpenAI.
var azureHeaders = [][2]string{
	{"Apim-Request-Id", "2f6f1b3e-6a0d-4b8e-9d54-0a3f5f0f8c11"},
	{"Azureml-Model-Session", "d140-20260901120000"},
	{"Cache-Control", "no-cache, must-revalidate"},
	{"Skip-Error-Remapping", "true"},
	{"Strict-Transport-Security", "max-age=31536000; includeSubDomains; preload"},
	{"X-Accel-Buffering", "no"},
	{"X-Content-Type-Options", "nosniff"},
	{"X-Envoy-Upstream-Service-Time", "16"},
	{"X-Ms-Client-Request-Id", "4b1f2a55-3b0d-4f51-8d7e-0f8a5f3c9a11"},
	{"X-Ms-Deployment-Name", "gpt-4o"},
	{"X-Ms-Rai-Invoked", "true"},
	{"X-Ms-Region", "East US 2"},
	{"X-Ratelimit-Limit-Requests", "10000"},
	{"X-Ratelimit-Limit-Tokens", "1000000"},
	{"X-Ratelimit-Remaining-Requests", "9999"},
	{"X-Ratelimit-Remaining-Tokens", "999999"},
	{"X-Request-Id", "f1d8a4b6-7c1e-4e0e-9a53-2f3c1d0e9b77"},
}
