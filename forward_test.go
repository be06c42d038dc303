package main

// The tests of main.go and forward.go: first helpers and fakes, then main.go
// (settings, start, routes, stop, -check), then forward.go in the order of
// ServeHTTP's paragraphs, and last the fuzz targets. The fake identity endpoint
// is in imds_test.go.

import (
	"bufio"
	"bytes"
	"compress/flate"
	"compress/gzip"
	"compress/zlib"
	"context"
	"crypto/sha1"
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"go/build"
	goversion "go/version"
	"io"
	"log"
	"math/rand"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// TestMain lets the test binary stand in for the real one: with AOAI_PROXY_TEST_MAIN set it is
// aoai-proxy, for tests that need its exit status or its signals.
func TestMain(m *testing.M) {
	if os.Getenv("AOAI_PROXY_TEST_MAIN") != "" {
		os.Unsetenv("AOAI_PROXY_TEST_MAIN")
		main()
		os.Exit(0)
	}
	for _, name := range []string{"http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"} {
		os.Unsetenv(name) // tests speak to loopback addresses only
	}
	os.Exit(m.Run())
}

// Helpers and fakes.

// safetyNet ends a test that would hang; no test waits for it.
const safetyNet = 20 * time.Second

type vars = map[string]string

// nobody listens there: it is a port below 1024 that no test is given.
const nobody = "http://127.0.0.1:1"

// noIdentity is what IMDS says on a host without one.
const noIdentity = `{"error":"invalid_request","error_description":"Identity not found"}`

// testLog is a log, as a whole and line by line as it is written.
type testLog struct {
	mu    sync.Mutex
	text  strings.Builder
	seen  int           // bytes of text that waitFor has passed
	ended bool          // nothing will be added
	grown chan struct{} // closed and replaced when one of the above changes
}

func newTestLog() *testLog { return &testLog{grown: make(chan struct{})} }

// followLog has the log of the test go to a testLog.
func followLog(t testing.TB) *testLog {
	l := newTestLog()
	log.SetOutput(l)
	t.Cleanup(func() { log.SetOutput(os.Stderr) })
	return l
}

func (l *testLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text.Write(p)
	close(l.grown)
	l.grown = make(chan struct{})
	return len(p), nil
}

func (l *testLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// end says that nothing will be added.
func (l *testLog) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
	close(l.grown)
	l.grown = make(chan struct{})
}

// next returns the next line that was not seen yet. Without one it returns a
// channel that is closed when there may be one, or nil if the log has ended.
func (l *testLog) next() (line string, ok bool, grown chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	line, _, ok = strings.Cut(l.text.String()[l.seen:], "\n")
	if ok {
		l.seen += len(line) + 1
		return line, true, nil
	}
	if l.ended {
		return "", false, nil
	}
	return "", false, l.grown
}

// waitFor returns the first line from here on that contains text, and the
// lines before it.
func (l *testLog) waitFor(t testing.TB, text string) (line string, before []string) {
	t.Helper()
	timeout := time.After(safetyNet)
	for {
		line, ok, grown := l.next()
		switch {
		case ok && strings.Contains(line, text):
			return line, before
		case ok:
			before = append(before, line)
		case grown == nil:
			t.Fatalf("the log ended without %q: %q", text, before)
		default:
			select {
			case <-grown:
			case <-timeout:
				t.Fatalf("no %q in the log: %q", text, before)
			}
		}
	}
}

// rest waits for the end, and returns the lines that were not seen yet.
func (l *testLog) rest() (lines []string) {
	for {
		line, ok, grown := l.next()
		switch {
		case ok:
			lines = append(lines, line)
		case grown == nil:
			return lines
		default:
			<-grown
		}
	}
}

// testProxy is a proxy on a loopback address, started the way the program starts it.
type testProxy struct {
	*service
	addr    string // "127.0.0.1:40001"
	url     string // "http://127.0.0.1:40001"
	signals chan os.Signal
	stopped chan struct{} // closed when serve has returned
}

// startProxy starts a proxy with the settings env in front of upstream; a PORT of 0, and identity
// as IMDS, unless env says otherwise.
func startProxy(t testing.TB, identity *fakeIdentity, upstream *httptest.Server,
	env vars) *testProxy {
	t.Helper()
	p := newTestProxy(t, identity, upstream, env)
	p.start(t)
	return p
}

// newTestProxy is startProxy up to the start.
func newTestProxy(t testing.TB, identity *fakeIdentity, upstream *httptest.Server,
	env vars) *testProxy {
	t.Helper()
	settings := vars{
		"TARGET_URL":                        upstream.URL + "/openai/",
		"PORT":                              "0",
		"HOST":                              "127.0.0.1",
		"AZURE_POD_IDENTITY_AUTHORITY_HOST": identity.URL,
	}
	for name, value := range env {
		settings[name] = value
	}
	cfg, err := loadConfig(func(name string) string { return settings[name] })
	if err != nil {
		t.Fatal(err)
	}
	p := &testProxy{
		service: newService(cfg),
		signals: make(chan os.Signal, 2),
		stopped: make(chan struct{}),
	}
	p.lateTime = time.Hour
	if upstream.TLS != nil {
		client := upstream.Client().Transport.(*http.Transport).TLSClientConfig
		p.forwarder.transport.TLSClientConfig.RootCAs = client.RootCAs
	}
	return p
}

func (p *testProxy) start(t testing.TB) {
	t.Helper()
	listeners, err := listen(p.cfg)
	// With PORT=0 a port that is free on one address may be taken on the next.
	for range 10 {
		if err == nil || len(p.cfg.hosts) == 1 {
			break
		}
		listeners, err = listen(p.cfg)
	}
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(listeners[0].Addr().String())
	p.addr = net.JoinHostPort("127.0.0.1", port)
	p.url = "http://" + p.addr
	go func() {
		defer close(p.stopped)
		if err := p.serve(listeners, p.signals); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() {
		p.signals <- syscall.SIGTERM // drain
		p.signals <- syscall.SIGTERM // at once
		<-p.stopped
		// Its handlers end soon after, and must not log in the next test.
		deadline := time.Now().Add(safetyNet)
		for p.forwarder.streams.Load() > 0 {
			if time.Now().After(deadline) {
				t.Error("a request outlives the program")
				break
			}
			runtime.Gosched()
		}
		p.forwarder.transport.CloseIdleConnections()
	})
}

// dial connects to the proxy and writes text; {host} stands for the proxy's address. It returns the
// connection, bounded in time, and a reader of it.
func (p *testProxy) dial(t *testing.T, text string) (net.Conn, *bufio.Reader) {
	t.Helper()
	conn, err := net.Dial("tcp", p.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(safetyNet))
	if _, err := io.WriteString(conn, strings.ReplaceAll(text, "{host}", p.addr)); err != nil {
		t.Fatal(err)
	}
	return conn, bufio.NewReader(conn)
}

// do writes one request as text and reads its answer.
func (p *testProxy) do(t *testing.T, text string) (*http.Response, string) {
	t.Helper()
	_, r := p.dial(t, text)
	method, _, _ := strings.Cut(text, " ")
	resp, err := http.ReadResponse(r, &http.Request{Method: method})
	for err == nil && resp.StatusCode == http.StatusContinue {
		resp, err = http.ReadResponse(r, &http.Request{Method: method})
	}
	if err != nil {
		t.Fatalf("no answer to %q: %v", text, err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("answer to %q cut: %v", text, err)
	}
	return resp, string(body)
}

// program is aoai-proxy as a process of its own.
type program struct {
	*exec.Cmd
	stdout bytes.Buffer
	stderr *testLog // ends with the process
	pipe   io.Closer
}

// startProgram starts aoai-proxy with no environment but env, in a directory that has no file but,
// if there is text for it, a .env.
func startProgram(t testing.TB, dotEnv string, env vars, args ...string) *program {
	t.Helper()
	return startProgramFor(t, safetyNet, dotEnv, env, args...)
}

// startProgramFor is startProgram with another limit of the program's life.
func startProgramFor(t testing.TB, limit time.Duration, dotEnv string, env vars,
	args ...string) *program {
	t.Helper()
	executable, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	p := &program{Cmd: exec.CommandContext(ctx, executable, args...), stderr: newTestLog()}
	p.Dir = t.TempDir()
	if dotEnv != "" {
		if err := os.WriteFile(filepath.Join(p.Dir, ".env"), []byte(dotEnv), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	p.Env = []string{"AOAI_PROXY_TEST_MAIN=1",
		"GORACE=atexit_sleep_ms=0", // with -race it would take a second more
		"GOCOVERDIR=" + p.Dir}      // with -cover it would write a line
	for name, value := range env {
		p.Env = append(p.Env, name+"="+value)
	}
	p.Stdout = &p.stdout
	stderr, err := p.StderrPipe()
	p.pipe = stderr
	if err == nil {
		err = p.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		io.Copy(p.stderr, stderr)
		p.stderr.end()
	}()
	t.Cleanup(func() {
		cancel()
		p.end()
	})
	return p
}

// end waits until the process ends, and returns its exit status and the rest
// of its stderr.
func (p *program) end() (status int, stderr []string) {
	stderr = p.stderr.rest()
	p.Wait()
	return p.ProcessState.ExitCode(), stderr
}

// listens returns the address that the program says it listens on.
func (p *program) listens(t testing.TB) string {
	t.Helper()
	line, _ := p.stderr.waitFor(t, "proxy listening on ")
	_, line, _ = strings.Cut(line, "listening on ")
	addr, _, _ := strings.Cut(line, " ➜ ")
	return addr
}

// newUpstream is an Azure OpenAI resource on a loopback address.
func newUpstream(t testing.TB, handler http.HandlerFunc) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(handler)
	t.Cleanup(func() {
		s.CloseClientConnections()
		s.Close()
	})
	return s
}

// recorder is an upstream that keeps what it was sent and answers 200.
type recorder struct {
	mu   sync.Mutex
	seen []*http.Request
	body []string
}

func (u *recorder) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	u.mu.Lock()
	defer u.mu.Unlock()
	if err == nil {
		u.seen = append(u.seen, r)
		u.body = append(u.body, string(body))
	}
}

// only returns the one request that the upstream got.
func (u *recorder) only(t *testing.T) (*http.Request, string) {
	t.Helper()
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.seen) != 1 {
		t.Fatalf("upstream got %d requests, want 1", len(u.seen))
	}
	return u.seen[0], u.body[0]
}

// count returns how many requests the upstream got.
func (u *recorder) count() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return len(u.seen)
}

// startRecorded starts a proxy in front of a recorder.
func startRecorded(t *testing.T, env vars) (*testProxy, *recorder) {
	t.Helper()
	followLog(t)
	u := &recorder{}
	return startProxy(t, newFakeIdentity(t), newUpstream(t, u.ServeHTTP), env), u
}

// fakeAzure accepts the tokens of identity and nothing else. It has a stream of
// two events, the second of which release lets go, and a realtime WebSocket
// that echoes. Anything else it reads whole and answers with {}.
func fakeAzure(identity *fakeIdentity, release <-chan struct{}) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if !identity.gave(r.Header.Get("Authorization")) || r.Header.Get("Api-Key") != "" {
			writeJSON(w, 401, `{"error":{"code":"401"}}`)
			return
		}
		switch {
		case strings.HasSuffix(r.URL.Path, "/realtime"):
			realtime(w, r)
		case strings.HasSuffix(r.URL.Path, "/stream"):
			io.WriteString(w, "data: 1\n\n")
			http.NewResponseController(w).Flush()
			select {
			case <-release:
				io.WriteString(w, "data: 2\n\n")
			case <-r.Context().Done():
			}
		default:
			io.Copy(io.Discard, r.Body)
			writeJSON(w, 200, `{}`)
		}
	}
}

// heldUpstream is a fakeAzure whose streams go on when release is closed.
func heldUpstream(t testing.TB, identity *fakeIdentity) (
	upstream *httptest.Server, release chan struct{}) {
	t.Helper()
	release = make(chan struct{})
	return newUpstream(t, fakeAzure(identity, release)), release
}

// openStream asks the proxy for a stream and reads its first event.
func openStream(t testing.TB, proxyURL string) io.Reader {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), safetyNet)
	t.Cleanup(cancel)
	req, _ := http.NewRequestWithContext(ctx, "GET", proxyURL+"/stream", nil)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	first := make([]byte, len("data: 1\n\n"))
	if _, err := io.ReadFull(resp.Body, first); err != nil || string(first) != "data: 1\n\n" {
		t.Fatalf("first event %q, %v", first, err)
	}
	return resp.Body
}

// openTunnel opens a WebSocket through the proxy, reads the greeting and returns an echo.
func openTunnel(t testing.TB, addr string) (conn net.Conn, echo func() error) {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(safetyNet))
	fmt.Fprintf(conn, "GET /realtime HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: "+
		"websocket\r\n"+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", addr)
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != 101 {
		t.Fatalf("upgrade: %v, %v", resp, err)
	}
	if _, _, err := readFrame(r); err != nil {
		t.Fatal(err)
	}
	return conn, func() error {
		if err := writeFrame(conn, 1, []byte("hello")); err != nil {
			return err
		}
		_, payload, err := readFrame(r)
		if err == nil && string(payload) != "hello" {
			err = fmt.Errorf("echo of hello: %q", payload)
		}
		return err
	}
}

// untilClosed uses a tunnel until it is closed. The end of a drain does not wait for that.
func untilClosed(t testing.TB, echo func() error) {
	t.Helper()
	var err error
	for err == nil {
		err = echo()
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the tunnel is still open: %v", err)
	}
}

const webSocketHead = "Host: {host}\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n" +
	"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"

// realtime accepts a WebSocket, greets as the Realtime API does and then echoes each message.
func realtime(w http.ResponseWriter, r *http.Request) {
	conn, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	sum := sha1.Sum([]byte(r.Header.Get("Sec-WebSocket-Key") +
		"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: "+
		"Upgrade\r\n"+
		"Sec-WebSocket-Accept: %s\r\n", base64.StdEncoding.EncodeToString(sum[:]))
	if protocol, _, _ := strings.Cut(r.Header.Get("Sec-WebSocket-Protocol"), ","); protocol != "" {
		fmt.Fprintf(conn, "Sec-WebSocket-Protocol: %s\r\n", protocol)
	}
	io.WriteString(conn, "\r\n")
	writeFrame(conn, 1, []byte(`{"type":"session.created","event_id":"event_1","session":{"id":`+
		`"sess_demo","object":"realtime.session"}}`))
	for {
		opcode, payload, err := readFrame(buf.Reader)
		if err != nil || opcode == 8 {
			writeFrame(conn, 8, nil)
			return
		}
		writeFrame(conn, opcode, payload)
	}
}

// writeFrame writes a WebSocket message of one unmasked frame (RFC 6455 §5.2).
func writeFrame(w io.Writer, opcode byte, payload []byte) error {
	head := []byte{0x80 | opcode, byte(len(payload))}
	if len(payload) > 125 {
		head = binary.BigEndian.AppendUint16([]byte{0x80 | opcode, 126}, uint16(len(payload)))
	}
	_, err := w.Write(append(head, payload...))
	return err
}

// readFrame reads a frame, masked or not, of up to 64 KiB.
func readFrame(r *bufio.Reader) (opcode byte, payload []byte, err error) {
	var head [2]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	length := int(head[1] & 0x7f)
	if length == 126 {
		var long [2]byte
		if _, err := io.ReadFull(r, long[:]); err != nil {
			return 0, nil, err
		}
		length = int(binary.BigEndian.Uint16(long[:]))
	}
	var mask [4]byte
	if head[1]&0x80 != 0 {
		if _, err := io.ReadFull(r, mask[:]); err != nil {
			return 0, nil, err
		}
	}
	payload = make([]byte, length)
	_, err = io.ReadFull(r, payload)
	for i := range payload {
		payload[i] ^= mask[i%4]
	}
	return head[0] & 0x0f, payload, err
}

func writeJSON(w http.ResponseWriter, status int, body string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	io.WriteString(w, body)
}

// zeros has no end.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// main.go: settings, .env and the start.

func TestSettings(t *testing.T) {
	const scope = "https://cognitiveservices.azure"
	tests := []struct{ name, variable, value, want string }{
		{"defaults", "", "", "https://b.example/openai/ host= port=8081 key= scope=" + scope +
			".com/.default debug=false"},
		{"empty is unset", "PORT", "", "port=8081 "},
		{"white space trimmed", "EXPECTED_KEY", "\tk\n", "key=k "},
		{"white space around the target", "TARGET_URL", " https://b.example/openai/ \n",
			"https://b.example/openai/ "},
		{"missing slash supplied", "TARGET_URL", "https://b.example/openai",
			"https://b.example/openai/ "},
		{"escapes kept", "TARGET_URL", "https://b.example/a%2Fb/openai",
			"https://b.example/a%2Fb/openai/ "},
		{"US Government", "TARGET_URL", "https://a.openai.azure.us/openai/", scope +
			".us/.default "},
		{"China, in capitals", "TARGET_URL", "https://A.OPENAI.AZURE.CN:443/openai/", scope +
			".cn/.default "},
		{"azure.us elsewhere in the host", "TARGET_URL", "https://azure.us.example/openai/", scope +
			".com/.default "},
		{"scope set", "AZURE_OPENAI_SCOPE", "https://ai.azure.com/.default",
			"scope=https://ai.azure.com/.default "},
		{"http for localhost", "TARGET_URL", "http://localhost:1/openai",
			"http://localhost:1/openai/ "},
		{"http for ::1", "TARGET_URL", "http://[::1]:1/openai", "http://[::1]:1/openai/ "},
		{"brackets around HOST", "HOST", "[::1]", "host=::1 "},
		{"any port", "PORT", " 0", "port=0 "},
		{"delay of the drain", "DRAIN_DELAY", "1m30s", "delay=1m30s"},
		{"several targets", "TARGET_URL",
			"https://B.example/openai/\t https://b.example/anthropic\n",
			"https://b.example/openai/ https://b.example/anthropic/ host="},
		{"v1 at the end of the first target", "TARGET_URL",
			"https://b.example/openai/v1 https://b.example/anthropic",
			"https://b.example/openai/v1/ https://b.example/anthropic/ host="},
		{"host in capitals", "TARGET_URL", "http://LOCALHOST:1/openai/",
			"http://localhost:1/openai/ "},
		{"final dot", "TARGET_URL", "http://localhost.:1/openai/", "http://localhost.:1/openai/ "},
		{"US Government, final dot", "TARGET_URL", "https://a.azure.us./openai/", scope +
			".us/.default "},
		{"proxy", "HTTPS_PROXY", "http://jane:Ses%25ame@127.0.0.1:3128", "port=8081"},
		{"proxy without scheme", "HTTPS_PROXY", "proxy.example:3128", "port=8081"},
		{"proxy, lower case", "https_proxy", "socks5://127.0.0.1", "port=8081"},
		{"HTTP_PROXY, which is not used", "HTTP_PROXY", "http://jane:Ses%ame@127.0.0.1",
			"port=8081"},
		{"debug in capitals", "AZURE_LOG_LEVEL", "DEBUG", "debug=true"},
	}
	for _, tt := range tests {
		cfg, err := loadConfig(func(name string) string {
			return vars{"TARGET_URL": "https://b.example/openai/", tt.variable: tt.value}[name]
		})
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		got := fmt.Sprintf("%s host=%s port=%s key=%s scope=%s debug=%v delay=%v", cfg.targets,
			cfg.host, cfg.port, cfg.key, cfg.scope, cfg.debug, cfg.delay)
		if !strings.Contains(got, tt.want) {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestBadSettingIsNamedWithARightValue(t *testing.T) {
	const encoded = "percent-encoded"
	const aBase, https, zero = "https://my-aoai.openai.azure.com/openai/", "want https",
		"from 0 to 65535 such as 8081"
	tests := []struct{ name, variable, value, right string }{
		{"target unset", "TARGET_URL", "", aBase},
		{"target without scheme", "TARGET_URL", "b.example/openai/", aBase},
		{"proxy with a scheme that Go 1.22 lacks", "HTTPS_PROXY", "socks5h://127.0.0.1",
			"http://proxy.example:3128"},
		{"target without host", "TARGET_URL", "https://:443/openai/", aBase},
		{"target with a wrong escape", "TARGET_URL", "https://b.example/%zz-s3cret", aBase},
		{"target with a space", "TARGET_URL", "https://b.example/ s3cret", aBase},
		{"target with a line break", "TARGET_URL", "https://b.example/\ns3cret", aBase},
		{"target that is a key", "TARGET_URL", "s3cret", aBase},
		{"target for another protocol", "TARGET_URL", "ftp://b.example/openai/", aBase},
		{"target with a password", "TARGET_URL", "https://user:s3cret@b.example/openai/", aBase},
		{"target with a key", "TARGET_URL", "https://b.example/openai/?api-key=s3cret", aBase},
		{"target with a fragment", "TARGET_URL", "https://b.example/openai/#s3cret", aBase},
		{"target with a dot segment", "TARGET_URL", "https://b.example/openai/%2e%2E/s3cret",
			aBase},
		{"http over a network", "TARGET_URL", "http://10.0.0.4/openai/", https},
		{"http with a password", "TARGET_URL",
			"http://user:s3cret@b.example/openai/?api-key=s3cret", https},
		{"http for a name that begins with localhost", "TARGET_URL",
			"http://localhost.example/openai/", https},
		{"http for localhost with a long s", "TARGET_URL", "http://localho\u017ft:1/openai/",
			https},
		{"http for a name that begins with 127.0.0.1", "TARGET_URL",
			"http://127.0.0.1.example/openai/", https},
		{"target escaped twice", "TARGET_URL", "https://b.example/openai/%252e%252e/s3cret", aBase},
		{"targets of two hosts", "TARGET_URL",
			"https://b.example/openai/ https://c.example/anthropic/",
			"https://b.example/openai/ and https://c.example/anthropic/ differ"},
		{"targets of two ports", "TARGET_URL",
			"https://b.example/openai/ https://b.example:8443/anthropic/",
			"differ in scheme or host"},
		{"targets of two schemes", "TARGET_URL",
			"https://localhost/openai/ http://localhost/anthropic/", "differ in scheme or host"},
		{"targets with one end", "TARGET_URL",
			"https://b.example/openai/ https://b.example/x/openai",
			"https://b.example/openai/ and https://b.example/x/openai/ both end in /openai/"},
		{"one target twice", "TARGET_URL", "https://b.example/openai https://b.example/openai/",
			"both end in /openai/"},
		{"second target without a path", "TARGET_URL", "https://b.example/openai https://b.example",
			"https://b.example/ is not the first"},
		{"second target that ends in v1", "TARGET_URL",
			"https://b.example/openai https://b.example/anthropic/v1", "is not the first"},
		{"second target in plain http", "TARGET_URL",
			"https://b.example/openai/ http://b.example/anthropic/?k=s3cret",
			"base URL 2 of 2: http://b.example would send the token over a network"},
		{"second target with a key", "TARGET_URL",
			"https://b.example/openai/ https://b.example/anthropic/?k=s3cret",
			"base URL 2 of 2: has a user name, a query or a fragment"},
		{"proxy with a bare %", "HTTPS_PROXY", "http://jane:s3cret%ame@127.0.0.1:3128", encoded},
		{"proxy with a bare %, lower case", "https_proxy", "http://jane:s3cret%ame@127.0.0.1",
			encoded},
		{"proxy with a bare #", "HTTPS_PROXY", "http://jane:s3cret#a@127.0.0.1:3128", encoded},
		{"proxy with a bare /", "HTTPS_PROXY", "http://jane:s3cret/a@127.0.0.1:3128", encoded},
		{"proxy with a bare %, no scheme", "HTTPS_PROXY", "jane:s3cret%ame@127.0.0.1:3128",
			encoded},
		{"proxy of white space", "HTTPS_PROXY", "\t", encoded},
		{"proxy in white space", "HTTPS_PROXY", " http://jane:s3cret@127.0.0.1:3128", encoded},
		{"proxy with a bare # after digits", "HTTPS_PROXY", "http://s3cret:12#4@127.0.0.1:3128",
			encoded},
		{"proxy with a bare / after digits", "HTTPS_PROXY", "http://s3cret:1/2@127.0.0.1:3128",
			encoded},
		{"proxy for another protocol", "HTTPS_PROXY", "ftp://jane:s3cret@127.0.0.1", encoded},
		{"port that is a name", "PORT", "http", zero},
		{"port above 65535", "PORT", "65536", zero},
		{"delay without a unit", "DRAIN_DELAY", "10", "such as 10s"},
		{"negative delay", "DRAIN_DELAY", "-1s", "from 0 to 10m0s"},
		{"endless delay", "DRAIN_DELAY", "10h", "from 0 to 10m0s"},
		{"key with a control character", "EXPECTED_KEY", "s3cret\x01", "printable ASCII"},
		{"target with a port that does not exist", "TARGET_URL", "https://b.example:99999/openai/",
			aBase},
		{"client id with a line break", "AZURE_CLIENT_ID", "1\ns3cret", "printable ASCII"},
		{"header with a control character", "IDENTITY_HEADER", "s3cret\x01", "printable ASCII"},
		{"IMDS with a port that does not exist", "AZURE_POD_IDENTITY_AUTHORITY_HOST",
			"http://127.0.0.1:99999", "http://169.254.169.254"},
		{"key beyond ASCII", "EXPECTED_KEY", "s3cret-ä", "printable ASCII"},
		{"scope with a space", "AZURE_OPENAI_SCOPE", "https://a/.default https://b/.default",
			"https://cognitiveservices.azure.com/.default"},
		{"IMDS without scheme", "AZURE_POD_IDENTITY_AUTHORITY_HOST", "169.254.169.254",
			"http://169.254.169.254"},
		{"endpoint without its secret", "IDENTITY_ENDPOINT", "http://127.0.0.1/s3cret",
			"IDENTITY_HEADER"},
		{"secret without its endpoint", "IDENTITY_HEADER", "s3cret", "set that too"},
	}
	for _, tt := range tests {
		_, err := loadConfig(func(name string) string {
			return vars{"TARGET_URL": "https://b.example/openai/", tt.variable: tt.value}[name]
		})
		if err == nil {
			t.Errorf("%s: accepted", tt.name)
			continue
		}
		text := err.Error()
		if !strings.HasPrefix(text, tt.variable) || !strings.Contains(text, tt.right) {
			t.Errorf("%s: got %q, want it to begin with %s and to contain %q", tt.name, text,
				tt.variable, tt.right)
		}
		if strings.Contains(text, "s3cret") || strings.ContainsAny(text, "\n\x01") {
			t.Errorf("%s: the error shows a secret or has control characters: %q", tt.name, text)
		}
	}
}

func TestDotEnv(t *testing.T) {
	tests := []struct{ name, text, want string }{
		{"nothing", "", `map[]`},
		{"plain", "PORT=1\nEXPECTED_KEY=x y", `map["EXPECTED_KEY":"x y" "PORT":"1"]`},
		{"blank lines and comments", "\n# HOST=0\n  # HOST=0\n\nPORT=1\n", `map["PORT":"1"]`},
		{"white space", " PORT = 1 \n\tHOST\t=\t2\t", `map["HOST":"2" "PORT":"1"]`},
		{"export", "export PORT=1\n  export HOST='2'", `map["HOST":"2" "PORT":"1"]`},
		{"export and a tab", "export\tPORT=1\nexport \t HOST=2", `map["HOST":"2" "PORT":"1"]`},
		{"quotes", "PORT=\" 1 \"\nHOST=' \"2\" '", `map["HOST":" \"2\" " "PORT":" 1 "]`},
		{"no escapes, no expansion", "PORT=\"\\n$HOME\"\nHOST=$(x)",
			`map["HOST":"$(x)" "PORT":"\\n$HOME"]`},
		{"empty", "PORT=\nHOST=''", `map["HOST":"" "PORT":""]`},
		{"inline comment", "PORT=1 # one\nHOST='2' # two\nEXPECTED_KEY=\"3\"# three",
			`map["EXPECTED_KEY":"3" "HOST":"2" "PORT":"1"]`},
		{"# in a value", "PORT=1#2\nHOST='1 # 2'\nEXPECTED_KEY=#3",
			`map["EXPECTED_KEY":"#3" "HOST":"1 # 2" "PORT":"1#2"]`},
		{"CRLF", "PORT=1\r\nHOST='2'\r\n\r\n", `map["HOST":"2" "PORT":"1"]`},
		{"BOM", "\ufeffPORT=1\nHOST=2", `map["HOST":"2" "PORT":"1"]`},
		{"last one counts", "PORT=1\nPORT=2", `map["PORT":"2"]`},

		{"others' names", "my-var=1\nPORT-X=1\nPORT.X\nHOSTNAME=h\nexport=3\nport=1", `map[]`},
		{"others' forms", "FOO\nOTHER=a b\nA='1\n=1\nset PORT=1\n\xff\xff", `map[]`},
		{"a PEM over lines", "KEY=\"-----BEGIN KEY-----\nMIIE+/=\n-----END KEY-----\"\nPORT=1",
			`map["PORT":"1"]`},
		{"what says whom to trust", "HTTPS_PROXY=http://p\nexport SSL_CERT_FILE=f\nno_proxy\n" +
			"IDENTITY_ENDPOINT = u\nGODEBUG=x\nHTTPS_PROXY=q\nPORT=1",
			`map["GODEBUG":"" "HTTPS_PROXY":"" "IDENTITY_ENDPOINT":"" "PORT":"1" ` +
				`"SSL_CERT_FILE":"" "no_proxy":""]`},

		{"no =", "EXPECTED_KEY s3cret", "line 1"},
		{"name alone", "EXPECTED_KEY", "line 1"},
		{"colon", "\nEXPECTED_KEY: s3cret", "line 2"},
		{"no = after lines of all kinds", "# x\r\n\r\nA=1\r\nexport PORT s3cret", "line 4"},
		{"open double quotes", "A=1\nEXPECTED_KEY=\"s3cret", "line 2"},
		{"open single quotes", "EXPECTED_KEY='s3cret\"", "line 1"},
		{"text after quotes", "EXPECTED_KEY='s3cret's3cret", "line 1"},
		{"UTF-16", "\xff\xfeP\x00O\x00", "save it as UTF-8"},
		{"UTF-16, big-endian", "\xfe\xff\x00P\x00O", "save it as UTF-8"},
		{"UTF-16 without a mark", "P\x00O\x00", "save it as UTF-8"},
	}
	for _, tt := range tests {
		values, err := parseDotEnv(tt.text)
		got, want := fmt.Sprintf("%q", values), tt.want
		if err != nil {
			got = err.Error()
		}
		if strings.HasPrefix(want, "line") {
			want += `: want NAME=value or NAME="value"`
		}
		if got != want && !(strings.HasPrefix(want, "save") && strings.Contains(got, want)) {
			t.Errorf("%s: got %q, want %q", tt.name, got, want)
		}
	}
}

func TestBadSettingsAreOneLine(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, port, _ := net.SplitHostPort(taken.Addr().String())
	const dotEnvRead = "read .env in the working directory for what the environment leaves out"
	const target = "https://b.example/openai/"
	tests := []struct {
		name, dotEnv string
		env          vars
		arg          string
		want         string
	}{
		{"no settings", "", vars{}, "", "TARGET_URL: not set; want a base URL such as " +
			"https://my-aoai.openai.azure.com/openai/"},
		{"bad port", "", vars{"TARGET_URL": target, "PORT": "http"}, "", "PORT: want a number"},
		{"bad setting in .env", "PORT=0x50", vars{"TARGET_URL": target}, "",
			`PORT: want a number from 0 to 65535 such as 8081, got "0x50" (` + dotEnvRead +
				": PORT)"},
		{"bad setting, beside one in .env that is not taken", "IMDS_ENDPOINT=http://127.0.0.1",
			vars{"TARGET_URL": target, "IDENTITY_ENDPOINT": "http://127.0.0.1"}, "",
			"IDENTITY_HEADER or IMDS_ENDPOINT: set that too, or unset IDENTITY_ENDPOINT (" +
				dotEnvRead +
				": nothing; not taken from .env, as it must come from the environment: " +
				"IMDS_ENDPOINT)"},
		{"malformed .env", "A=1\n\nEXPECTED_KEY s3cret\n", vars{"TARGET_URL": target}, "",
			".env line 3: want NAME=value"},
		{"UTF-16 .env", "\xff\xfeP\x00", vars{"TARGET_URL": target}, "", ".env is not UTF-8 text"},
		{"port in use", "", vars{"TARGET_URL": target, "PORT": port}, "",
			"want a free port such as 8082"},
		{"port in use, with a key", "", vars{"TARGET_URL": target, "PORT": port,
			"HOST": "127.0.0.1", "EXPECTED_KEY": "s3cret"}, "", port},
		{"unknown flag", "", vars{"TARGET_URL": target}, "-port=1", "-port"},
		{"argument", "", vars{"TARGET_URL": target}, "check", `unexpected argument "check"`},
		{"malformed .env checked", "EXPECTED_KEY s3cret\n", vars{"TARGET_URL": target}, "-check",
			"settings failed the check"},
		{"bad port checked", "", vars{"TARGET_URL": target, "PORT": "x"}, "-check",
			"settings failed the check"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tt.env["AZURE_POD_IDENTITY_AUTHORITY_HOST"] = "http://127.0.0.1:1"
			status, stderr := startProgram(t, tt.dotEnv, tt.env, strings.Fields(tt.arg)...).end()
			want := 78 // settings that have to be changed: EX_CONFIG
			if tt.arg != "" || strings.HasPrefix(tt.name, "port in use") {
				want = 1
			}
			if status != want || len(stderr) != 1 {
				t.Fatalf("got exit status %d and %q, want %d and one line", status, stderr, want)
			}
			if !strings.HasPrefix(stderr[0], "aoai-proxy: ") ||
				!strings.Contains(stderr[0], tt.want) {
				t.Errorf("got %q, want %q", stderr[0], tt.want)
			}
			if strings.Contains(stderr[0], "s3cret") {
				t.Errorf("%q shows a secret", stderr[0])
			}
		})
	}
}

func TestProgramSaysWhatItIsAsked(t *testing.T) {
	identity := newFakeIdentity(t)
	upstream := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter,
		r *http.Request) {
		writeJSON(w, 200, `{}`)
	}))
	defer upstream.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: upstream.Certificate().Raw})
	if err := os.WriteFile(ca, block, 0o600); err != nil {
		t.Fatal(err)
	}
	fine := vars{"TARGET_URL": upstream.URL + "/openai/",
		"AZURE_POD_IDENTITY_AUTHORITY_HOST": identity.URL, "SSL_CERT_FILE": ca}
	const settings = "TARGET_URL PORT HOST EXPECTED_KEY AZURE_OPENAI_SCOPE AZURE_CLIENT_ID " +
		"IDENTITY_ENDPOINT IDENTITY_HEADER AZURE_POD_IDENTITY_AUTHORITY_HOST AZURE_LOG_LEVEL " +
		"-check -version"
	tests := []struct {
		name, arg string
		env       vars
		want      []string
	}{
		{"-h", "-h", vars{}, strings.Fields(settings)},
		{"-version", "-version", vars{}, []string{"aoai-proxy ", runtime.Version(), runtime.GOOS +
			"/" + runtime.GOARCH}},
		{"-check with a CA of one's own", "-check", fine,
			[]string{"ok    token", "ok    TLS", "ok    upstream"}},
	}
	for _, tt := range tests {
		if tt.arg == "-check" && runtime.GOOS != "linux" {
			continue // SSL_CERT_FILE is not for macOS and Windows
		}
		p := startProgram(t, "", tt.env, tt.arg)
		if status, stderr := p.end(); status != 0 || stderr != nil {
			t.Errorf("%s: got exit status %d and %q on stderr, want 0 and nothing", tt.name, status,
				stderr)
		}
		for _, want := range tt.want {
			if !strings.Contains(p.stdout.String(), want) {
				t.Errorf("%s: no %q in %s", tt.name, want, p.stdout.String())
			}
		}
	}
}

func isKnown(name string) bool {
	return slices.ContainsFunc(slices.Concat(settings, platformVariables),
		func(v variable) bool { return v.name == name })
}

// TestEveryVariableIsListed: what the source reads is in one of the tables, from
// which -h is made, and what README.md says may be set is in them too.
func TestEveryVariableIsListed(t *testing.T) {
	read := regexp.MustCompile(`(?:[gG]etenv|get|isSet|urlFrom|set)\("([A-Za-z_]{4,})"`)
	seen := make(map[string]bool)
	for _, file := range []string{"main.go", "imds.go", "forward.go"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, match := range read.FindAllStringSubmatch(string(text), -1) {
			if name := match[1]; strings.ToUpper(name) == name ||
				strings.HasPrefix(name, "Program") {
				seen[name] = true
			}
		}
	}
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, match := range regexp.MustCompile("(?m)^\\| `([A-Z_]+)` "+
		"").FindAllStringSubmatch(string(readme), -1) {
		seen[match[1]] = true
	}
	if len(seen) < 18 {
		t.Errorf("found %d variables only: %v", len(seen), seen)
	}
	for name := range seen {
		if !isKnown(name) {
			t.Errorf("%s is in neither table", name)
		}
	}
}

func TestDotEnvFillsInWhatTheEnvironmentLeavesOut(t *testing.T) {
	identity := newFakeIdentity(t)
	env := vars{"PORT": "0", "EXPECTED_KEY": "", "AZURE_POD_IDENTITY_AUTHORITY_HOST": identity.URL}
	const dotEnv = "# mine\nTARGET_URL='http://127.0.0.1:1/openai'\nPORT=1\n" +
		"export EXPECTED_KEY=s3cret\n"
	p := startProgram(t, dotEnv, env)
	p.stderr.waitFor(t, "read .env")
	line, _ := p.stderr.waitFor(t, "proxy listening on :")
	target := " ➜ http://127.0.0.1:1/openai/ "
	if !strings.Contains(line, target) || strings.Contains(line, " :1 ") {
		t.Errorf("got %q, want a port of the proxy's own choice and the target of .env", line)
	}
	p.stderr.waitFor(t, "EXPECTED_KEY is set")

	env["TARGET_URL"] = "http://127.0.0.1:1/openai"
	_, before := startProgram(t, "", env).stderr.waitFor(t, "EXPECTED_KEY")
	if log := strings.Join(before, "\n"); strings.Contains(log, ".env") ||
		!strings.Contains(log, "listening on 127.0.0.1:") {
		t.Errorf("without .env the log says %s", log)
	}
}

// TestDotEnvCannotTakeTheToken has a .env name a proxy and a certificate of somebody else's. The
// environment names a proxy in lower case, which counts less to the Go library.
func TestDotEnvCannotTakeTheToken(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("https_proxy is HTTPS_PROXY there")
	}
	identity := newFakeIdentity(t)
	forged := newUpstream(t, func(w http.ResponseWriter,
		r *http.Request) {
		t.Errorf("%s came here", r.URL)
	})
	right := newUpstream(t, answerRaw("HTTP/1.1 403 No\r\n\r\n"))
	dotEnv := "HTTPS_PROXY=" + forged.URL + "\nSSL_CERT_FILE=evil.pem\nGODEBUG=x509ignoreCN=0\n" +
		"AZURE_POD_IDENTITY_AUTHORITY_HOST=" + forged.URL +
		"\nEXPECTED_KEY=s3cret\nPORT=1\nmy-var=1\n"
	p := startProgram(t, dotEnv, vars{"TARGET_URL": "https://resource.example/openai/", "PORT": "0",
		"HOST": "127.0.0.1", "AZURE_POD_IDENTITY_AUTHORITY_HOST": identity.URL,
		"https_proxy": right.URL})
	line, _ := p.stderr.waitFor(t, "read .env")
	if !strings.HasSuffix(line, "for what the environment leaves out: EXPECTED_KEY") {
		t.Errorf("got %q, want the name of what is taken", line)
	}
	line, _ = p.stderr.waitFor(t, "not taken from .env")
	if !strings.HasSuffix(line, ": AZURE_POD_IDENTITY_AUTHORITY_HOST, HTTPS_PROXY, "+
		"SSL_CERT_FILE, GODEBUG") {
		t.Errorf("got %q, want the names of what is not taken", line)
	}
	req, _ := http.NewRequest("GET", "http://"+p.listens(t)+"/v1/models", nil)
	req.Header.Set("api-key", "s3cret")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, _ := io.ReadAll(resp.Body); !strings.Contains(string(body),
		"HTTPS_PROXY answered 403") {
		t.Errorf("got %s, want the answer of the environment's proxy", body)
	}
}

// TestDirectoryOrDeviceIsNoDotEnv: Python keeps environments in a directory of
// that name, and some devices have no end.
func TestDirectoryOrDeviceIsNoDotEnv(t *testing.T) {
	for _, name := range []string{t.TempDir(), os.DevNull} {
		if _, lines, err := readDotEnv(name, os.Getenv); err != nil || lines != nil {
			t.Errorf("%s: got %q, %v", name, lines, err)
		}
	}
}

// TestLostLogEndsNothing: whoever reads stderr may go away.
func TestLostLogEndsNothing(t *testing.T) {
	identity := newFakeIdentity(t)
	p := startProgram(t, "", vars{"TARGET_URL": nobody + "/openai/", "PORT": "0",
		"HOST":                              "127.0.0.1",
		"AZURE_POD_IDENTITY_AUTHORITY_HOST": identity.URL})
	addr := p.listens(t)
	p.pipe.Close()
	for range 3 {
		resp, err := http.Get("http://" + addr + "/v1/models")
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 502 {
			t.Errorf("got %d, want 502", resp.StatusCode)
		}
	}
}

// TestTLSOffersWhatTodaysGoOffers looks at the ClientHello for what "go 1.22" in go.mod would bring
// back, and at the way to have it back in need.
func TestTLSOffersWhatTodaysGoOffers(t *testing.T) {
	if goversion.Compare(runtime.Version(), "go1.25") < 0 {
		t.Skip(runtime.Version() + " does not know all of the settings")
	}
	identity := newFakeIdentity(t)
	for godebug, old := range map[string]bool{"": false, "http2debug=0": false,
		"tlssha1=1,tlsmlkem=0": true} {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		hellos := make(chan *tls.ClientHelloInfo, 1)
		go func() {
			defer close(hellos)
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			tls.Server(conn,
				&tls.Config{GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config,
					error) {
					hellos <- hello
					return nil, errors.New("seen enough")
				}}).Handshake()
		}()
		p := startProgram(t, "", vars{"TARGET_URL": "https://" + ln.Addr().String(),
			"GODEBUG":                           godebug,
			"AZURE_POD_IDENTITY_AUTHORITY_HOST": identity.URL}, "-check")
		if status, _ := p.end(); status != 1 {
			t.Errorf("exit status %d, want 1", status)
		}
		ln.Close()
		hello := <-hellos
		if hello == nil {
			t.Fatalf("no ClientHello; the check says %s", &p.stdout)
		}
		if slices.ContainsFunc(hello.CipherSuites, func(suite uint16) bool {
			return suite == tls.TLS_RSA_WITH_3DES_EDE_CBC_SHA ||
				suite == tls.TLS_ECDHE_RSA_WITH_3DES_EDE_CBC_SHA
		}) {
			t.Errorf("GODEBUG=%s: offers 3DES", godebug)
		}
		sha1 := slices.Contains(hello.SignatureSchemes, tls.PKCS1WithSHA1) ||
			slices.Contains(hello.SignatureSchemes, tls.ECDSAWithSHA1)
		postQuantum := slices.Contains(hello.SupportedCurves, tls.CurveID(4588)) // X25519MLKEM768
		if sha1 != old || postQuantum == old {
			t.Errorf("GODEBUG=%s: SHA-1 is offered: %v, post-quantum key exchange: %v", godebug,
				sha1, postQuantum)
		}
	}
}

// TestTLSDefaultsAreKnownToGo: Go ignores a name in GODEBUG that it does not know, and so a
// misspelt one too.
func TestTLSDefaultsAreKnownToGo(t *testing.T) {
	since := map[string]int{
		"tls3des": 23, "x509negativeserial": 23, "tlsmlkem": 24, "rsa1024min": 24, "tlssha1": 25,
		"tlssecpmlkem": 26, "x509sslcertoverrideplatform": 27,
	}
	table, err := os.ReadFile(filepath.Join(build.Default.GOROOT,
		"src/internal/godebugs/table.go"))
	if err != nil {
		t.Skip(err)
	}
	var running int // 22 for Go 1.22
	if _, err := fmt.Sscanf(runtime.Version(), "go1.%d", &running); err != nil {
		t.Skip(err)
	}
	if len(tlsDefaults) != len(since) {
		t.Errorf("%d defaults, want %d", len(tlsDefaults), len(since))
	}
	for _, setting := range tlsDefaults {
		name, _, _ := strings.Cut(setting, "=")
		version, listed := since[name]
		known := strings.Contains(string(table), `{Name: "`+name+`",`)
		if !listed || running >= version && !known {
			t.Errorf("%s: not known to %s", name, runtime.Version())
		}
	}
}

func TestListensWhereSettingsSay(t *testing.T) {
	identity := newFakeIdentity(t)
	upstream := newUpstream(t, http.NotFound)
	const local, everywhere = "127.0.0.1 ::1", "127.0.0.1 127.0.0.2 ::1"
	hasIPv6 := len(listenHosts("", "")) == 2
	tests := []struct {
		name  string
		env   vars
		addrs string // in the log
		reach string
		says  string
	}{
		{"neither", vars{"HOST": ""}, "127.0.0.1:PORT [::1]:PORT", local,
			"no EXPECTED_KEY: every user of this host, and nobody else"},
		{"key", vars{"HOST": "", "EXPECTED_KEY": "k"}, ":PORT", everywhere, "EXPECTED_KEY is set"},
		{"host", vars{"HOST": "127.0.0.1"}, "127.0.0.1:PORT", "127.0.0.1",
			"no EXPECTED_KEY: every user of this host"},
		{"host and key", vars{"HOST": "127.0.0.1", "EXPECTED_KEY": "k"}, "127.0.0.1:PORT",
			"127.0.0.1", "EXPECTED_KEY is set"},
		{"IPv6 host", vars{"HOST": "::1"}, "[::1]:PORT", "::1",
			"no EXPECTED_KEY: every user of this host"},
		{"every IPv4 address", vars{"HOST": "0.0.0.0"}, "0.0.0.0:PORT", "127.0.0.1 127.0.0.2",
			"warning: no EXPECTED_KEY"},
		{"IPv6 host in brackets", vars{"HOST": "[::1]", "EXPECTED_KEY": "k"}, "[::1]:PORT", "::1",
			"EXPECTED_KEY is set"},
		{"forgotten path", vars{"TARGET_URL": upstream.URL}, "127.0.0.1:PORT", "127.0.0.1",
			"no EXPECTED_KEY"},
		{"Claude", vars{"TARGET_URL": upstream.URL + "/anthropic/"}, "127.0.0.1:PORT", "127.0.0.1",
			"no EXPECTED_KEY"},
		{"Foundry's models", vars{"TARGET_URL": upstream.URL + "/models"}, "127.0.0.1:PORT",
			"127.0.0.1", "no EXPECTED_KEY"},
		{"GPT and Claude",
			vars{"TARGET_URL": upstream.URL + "/openai " + upstream.URL + "/anthropic"},
			"127.0.0.1:PORT", "127.0.0.1", "no EXPECTED_KEY"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if strings.Contains(tt.env["HOST"], "::1") && !hasIPv6 {
				t.Skip("no IPv6 here")
			}
			lines := followLog(t)
			p := newTestProxy(t, identity, upstream, tt.env)
			// Another program may have this port on another address.
			accepted := make(chan string, 9)
			p.server.ConnState = func(conn net.Conn, state http.ConnState) {
				if state == http.StateNew {
					accepted <- conn.LocalAddr().(*net.TCPAddr).IP.String()
				}
			}
			p.start(t)
			line, before := lines.waitFor(t, "EXPECTED_KEY")
			if !strings.Contains(line, tt.says) {
				t.Errorf("the log says %q, want %q", line, tt.says)
			}
			var got, want []string
			warned := false
			for _, line := range before {
				if _, addr, ok := strings.Cut(line, "proxy listening on "); ok {
					got = append(got, addr)
				}
				warned = warned || strings.Contains(line,
					"warning: TARGET_URL has "+upstream.URL+"/ without /openai/")
			}
			if warned != (tt.name == "forgotten path") {
				t.Errorf("warned of a path without openai: %v", warned)
			}
			everyInterface := ""
			if tt.name == "key" {
				everyInterface = " (every interface, plain HTTP; HOST=127.0.0.1 for this host only)"
			}
			_, port, _ := net.SplitHostPort(p.addr)
			for _, addr := range strings.Fields(strings.ReplaceAll(tt.addrs, "PORT", port)) {
				if !strings.HasPrefix(addr, "[::1]") || hasIPv6 {
					want = append(want, addr+" ➜ "+p.cfg.targets.String()+everyInterface)
				}
			}
			if !slices.Equal(got, want) || port == "0" {
				t.Errorf("the log says it listens on %q, want %q", got, want)
			}
			var reached []string
			client := http.Client{Transport: &http.Transport{DisableKeepAlives: true},
				Timeout: safetyNet}
			hosts := []string{"127.0.0.1", "::1"}
			if runtime.GOOS == "linux" { // elsewhere 127.0.0.2 may not be there
				hosts = []string{"127.0.0.1", "127.0.0.2", "::1"}
			}
			for _, host := range hosts {
				if resp, err := client.Get("http://" + net.JoinHostPort(host, port) +
					"/healthz"); err == nil {
					resp.Body.Close()
				}
			}
			for range len(accepted) {
				reached = append(reached, <-accepted)
			}
			reach := slices.DeleteFunc(strings.Fields(tt.reach), func(host string) bool {
				return host == "127.0.0.2" && runtime.GOOS != "linux" || host == "::1" && !hasIPv6
			})
			if !slices.Equal(reached, reach) {
				t.Errorf("it can be reached at %q, want %q", reached, reach)
			}
		})
	}
}

// TestTokenIsHadBeforeTheFirstRequest: it is fetched at the start.
func TestTokenIsHadBeforeTheFirstRequest(t *testing.T) {
	followLog(t)
	asked := make(chan bool, 1)
	identity := newFakeIdentity(t)
	identity.answerWith(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, tokenAnswer("token-1", time.Hour))
		asked <- true
	})
	startProxy(t, identity, newUpstream(t, nil), nil)
	select {
	case <-asked:
	case <-time.After(safetyNet):
		t.Error("the identity endpoint was not asked")
	}
}

// TestStartTellsOfTheFirstToken, once.
func TestStartTellsOfTheFirstToken(t *testing.T) {
	const object = "11111111-2222-3333-4444-555555555555"
	jwt := "eyJhbGciOiJub25lIn0." + base64.RawURLEncoding.EncodeToString([]byte(
		`{"oid":"`+object+`\nforged"}`)) + ".c2lnbmF0dXJl"
	upstream := newUpstream(t, http.NotFound)
	identity := newFakeIdentity(t)
	host := strings.TrimPrefix(identity.URL, "http://")

	t.Run("it comes", func(t *testing.T) {
		identity.answerWith(func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, tokenAnswer(jwt, time.Hour))
		})
		p := startProgram(t, "", vars{"TARGET_URL": upstream.URL, "PORT": "0",
			"AZURE_POD_IDENTITY_AUTHORITY_HOST": identity.URL})
		line, _ := p.stderr.waitFor(t, "token ready: ")
		want := "object id " + object + " forged, expires "
		if !strings.Contains(line, want) || !strings.HasSuffix(line, ", from IMDS at "+host) {
			t.Errorf("got %q", line)
		}
	})

	t.Run("another comes", func(t *testing.T) {
		logged := followLog(t)
		p := startProxy(t, identity, upstream, nil)
		logged.waitFor(t, "token ready: ")
		held, err := p.tokens.current(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		asked := make(chan bool, 9)
		identity.answerWith(func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, tokenAnswer("another", time.Hour))
			asked <- true
		})
		p.tokens.rejected(held)
		<-asked
		for held.authorization != "Bearer another" {
			if held, err = p.tokens.current(context.Background()); err != nil {
				t.Fatal(err)
			}
		}
		if text := logged.String(); strings.Count(text, "token ready") != 1 {
			t.Errorf("got %s", text)
		}
	})

	t.Run("it is refused", func(t *testing.T) {
		identity.answerWith(refuse(400, "", noIdentity))
		logged := followLog(t)
		p := startProxy(t, identity, upstream, nil)
		logged.waitFor(t, "no token yet: IMDS at "+host+" answered 400: ")
		p.tokens.tellLate(errors.New("another reason"))
		if text := logged.String(); strings.Count(text, "no token yet") != 1 ||
			!strings.Contains(text, "; trying goes on\n") {
			t.Errorf("got %s", text)
		}
	})

	t.Run("it is late", func(t *testing.T) {
		release := make(chan bool)
		identity.answerWith(func(w http.ResponseWriter, _ *http.Request) {
			<-release
			fmt.Fprint(w, tokenAnswer(jwt, time.Hour))
		})
		logged := followLog(t)
		p := newTestProxy(t, identity, upstream, nil)
		p.lateTime = 0
		p.start(t)
		logged.waitFor(t, "no token yet: IMDS at "+host+" has not answered yet; "+
			"hint: only Azure hosts have it; trying goes on")
		close(release)
		logged.waitFor(t, "token ready: ")
	})

	t.Run("it is tried again", func(t *testing.T) {
		identity.answerWith(refuse(500, "", "no"))
		logged := followLog(t)
		p := newTestProxy(t, identity, upstream, nil)
		tried := make(chan bool)
		p.cfg.endpoint.sleep = func(ctx context.Context, _ time.Duration) {
			tried <- true
			<-ctx.Done()
		}
		p.start(t)
		<-tried
		logged.waitFor(t, "no token yet: IMDS at "+host+" answered 500: no; trying goes on")
	})

	t.Run("it is stopped before", func(t *testing.T) {
		ctx, stop := context.WithCancel(context.Background())
		identity.answerWith(func(_ http.ResponseWriter, r *http.Request) {
			stop()
			<-r.Context().Done()
		})
		logged := followLog(t)
		p := newTestProxy(t, identity, upstream, nil)
		if _, err := p.cfg.endpoint.fetch(ctx); err == nil {
			t.Error("got a token")
		}
		if text := logged.String(); text != "" {
			t.Errorf("got %s", text)
		}
	})
}

// TestLogOfTheGoLibraryIsSafeToo has the upstream send the token after its answer, which net/http
// logs.
func TestLogOfTheGoLibraryIsSafeToo(t *testing.T) {
	const token = "eyJ0eXAiOiJKV1Qi.t0k3n.t0k3n"
	identity := newFakeIdentity(t)
	identity.answerWith(func(w http.ResponseWriter,
		_ *http.Request) {
		fmt.Fprint(w, tokenAnswer(token, time.Hour))
	})
	p := startProgram(t, "", vars{"PORT": "0", "HOST": "127.0.0.1",
		"TARGET_URL": newUpstream(t,
			answerRaw("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"+token)).URL,
		"AZURE_POD_IDENTITY_AUTHORITY_HOST": identity.URL})
	resp, err := http.Get("http://" + p.listens(t) + "/x")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	line, _ := p.stderr.waitFor(t, "Unsolicited response")
	if strings.Contains(line, "t0k3n") || !strings.Contains(line, "REDACTED") {
		t.Errorf("got %s", line)
	}
}

// main.go: routes and probes.

func TestProbesAreAnsweredHereAndNeedNoKey(t *testing.T) {
	fine, none := newFakeIdentity(t), newFakeIdentity(t)
	none.answerWith(func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, 400, noIdentity) })
	tests := []struct {
		name, method, path string
		identity           *fakeIdentity
		debug              string
		status             int
		body               string
	}{
		{"root", "GET", "/", fine, "", 200, "ok\n"},
		{"healthz", "GET", "/healthz", fine, "", 200, "ok\n"},
		{"healthz at debug", "GET", "/healthz?x=1", fine, "debug", 200, "ok\n"},
		{"HEAD healthz", "HEAD", "/healthz", fine, "", 200, ""},
		{"readyz", "GET", "/readyz", fine, "", 200, "ok\n"},
		{"readyz without a token", "GET", "/readyz", none, "", 503, "Identity not found"},
		{"POST to the root is no probe", "POST", "/", fine, "", 401, "invalid_api_key"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			upstream := newUpstream(t, func(_ http.ResponseWriter,
				r *http.Request) {
				t.Errorf("%s was forwarded", r.URL)
			})
			logged := followLog(t)
			p := startProxy(t, tt.identity, upstream,
				vars{"EXPECTED_KEY": "s3cret", "AZURE_LOG_LEVEL": tt.debug})
			req, _ := http.NewRequest(tt.method, p.url+tt.path, nil)
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			body, _ := io.ReadAll(resp.Body)
			if resp.StatusCode != tt.status || !strings.Contains(string(body), tt.body) ||
				tt.method == "HEAD" && len(body) > 0 {
				t.Errorf("got %d %q, want %d %q", resp.StatusCode, body, tt.status, tt.body)
			}
			path, _, _ := strings.Cut(tt.path, "?")
			if got, want := strings.Contains(logged.String(), path+" from "), tt.debug != "" ||
				tt.status == 401; got != want {
				t.Errorf("logged: %v, want %v: %s", got, want, logged)
			}
		})
	}
}

// TestReadyzTellsTheCauseToThisHostOnly, as the endpoint's words are nobody else's business.
// TestWithoutATokenAKeyIsToldWhy, wherever its holder is.
func TestWithoutATokenAKeyIsToldWhy(t *testing.T) {
	followLog(t)
	identity := newFakeIdentity(t)
	identity.answerWith(refuse(400, "", noIdentity))
	p := startProxy(t, identity, newUpstream(t, nil), vars{"EXPECTED_KEY": "sesame"})
	for path, told := range map[string]bool{"/readyz": false, "/v1/models": true} {
		r := httptest.NewRequest("GET", path, nil) // from 192.0.2.1
		r.Header.Set("Api-Key", "sesame")
		w := httptest.NewRecorder()
		p.route(w, r)
		if w.Code != 503 || strings.Contains(w.Body.String(), "Identity not found") != told {
			t.Errorf("%s: got %d %s, told: %v", path, w.Code, w.Body, told)
		}
	}
}

func TestReadyzTellsTheCauseToThisHostOnly(t *testing.T) {
	followLog(t)
	identity := newFakeIdentity(t)
	identity.answerWith(refuse(400, "", noIdentity))
	p := startProxy(t, identity, newUpstream(t, nil), nil)
	for _, tt := range []struct {
		caller, host string
		told         bool
	}{
		{"127.0.0.1:5000", "localhost", true},
		{"[::1]:5000", "[::1]:8081", true},
		{"127.0.0.1:5000", "rebound.example", false},
		{"192.0.2.1:5000", "localhost", false},
		{"[2001:db8::1]:5000", "localhost", false},
		{"", "localhost", false},
	} {
		for _, path := range []string{"/readyz", "/v1/models"} {
			local := context.WithValue(context.Background(), http.LocalAddrContextKey,
				&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
			r := httptest.NewRequest("GET", path, nil).WithContext(local)
			r.RemoteAddr, r.Host = tt.caller, tt.host
			w := httptest.NewRecorder()
			p.route(w, r)
			told := strings.Contains(w.Body.String(), "no token: IMDS at ") &&
				strings.Contains(w.Body.String(), "Identity not found")
			refused := path != "/readyz" && tt.host == "rebound.example"
			if w.Code != 503 && !refused || told != tt.told ||
				strings.Contains(w.Body.String(), "IMDS") != told {
				t.Errorf("%s from %q to %s: got %d %q, told: %v", path, tt.caller, tt.host, w.Code,
					w.Body, tt.told)
			}
		}
	}
}

// TestHTTP10ConnectionsEndWithTheirAnswer: the server ignores the framing of a chunked body there,
// and
// would take the body for the next request (golang/go#12785).
func TestHTTP10ConnectionsEndWithTheirAnswer(t *testing.T) {
	logged := followLog(t)
	var forwarded atomic.Int64
	upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		forwarded.Add(1)
		w.Header().Set("Connection", "Connection, X-Hop")
		w.Header().Set("X-Hop", "h")
		w.WriteHeader(201)
	})
	p := startProxy(t, newFakeIdentity(t), upstream, vars{"HOST": "127.0.0.1"})
	const smuggled = "GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
	chunk := fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(smuggled), smuggled)
	for _, tt := range []struct {
		line   string
		status string
	}{
		{"POST /p", "HTTP/1.0 201 "},
		{"GET /p", "HTTP/1.0 201 "},
		{"GET /healthz", "HTTP/1.0 200 "},
		{"HEAD /", "HTTP/1.0 200 "},
		{"GET /readyz", "HTTP/1.0 200 "},
		{"POST /../p", "HTTP/1.0 400 "},
		{"TRACE /p", "HTTP/1.0 405 "},
	} {
		before := forwarded.Load()
		for _, rest := range []string{smuggled, chunk} {
			_, r := p.dial(t, tt.line+" HTTP/1.0\r\nHost: localhost\r\nConnection: keep-alive\r\n"+
				"Transfer-Encoding: chunked\r\n\r\n"+rest)
			got, err := io.ReadAll(r)
			if errors.Is(err, os.ErrDeadlineExceeded) ||
				!strings.HasPrefix(string(got), tt.status) ||
				strings.Count(string(got), "HTTP/1.") != 1 ||
				!strings.Contains(string(got), "\r\nConnection: close\r\n") {
				t.Errorf("%s: got %q, %v; want one answer and the connection's end", tt.line, got,
					err)
			}
		}
		if n := forwarded.Load() - before; n > 2 {
			t.Errorf("%s: %d requests were forwarded", tt.line, n)
		}
	}
	if strings.Contains(logged.String(), "smuggled") {
		t.Errorf("a body became a request: %s", logged)
	}
}

// main.go: the stop.

func TestStreamsAndTunnelsOutliveSignal(t *testing.T) {
	identity := newFakeIdentity(t)
	upstream, release := heldUpstream(t, identity)
	lines := followLog(t)
	p := startProxy(t, identity, upstream, nil)
	stream := openStream(t, p.url)
	conn, echo := openTunnel(t, p.addr)
	p.signals <- syscall.SIGTERM
	lines.waitFor(t, "draining 2 streams (up to 10m0s")

	for deadline := time.Now().Add(safetyNet); ; { // the listener closes just after the log says so
		conn, err := net.Dial("tcp", p.addr)
		if err != nil {
			break
		}
		if conn.Close(); time.Now().After(deadline) {
			t.Fatal("draining: still accepts connections")
		}
	}
	close(release)
	if rest, err := io.ReadAll(stream); err != nil || string(rest) != "data: 2\n\n" {
		t.Errorf("after the signal the stream went on with %q, %v", rest, err)
	}
	for range 1000 { // longer than a server lives that knows nothing of tunnels
		if err := echo(); err != nil {
			t.Fatalf("after the signal the tunnel: %v", err)
		}
	}
	writeFrame(conn, 8, nil)
	conn.Close()
	lines.waitFor(t, "stopped")
	<-p.stopped
}

func TestSignalsEndTheProgramWithStatusZero(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("has no signals between processes")
	}
	for _, patient := range []bool{true, false} {
		t.Run(fmt.Sprintf("patient=%v", patient), func(t *testing.T) {
			identity := newFakeIdentity(t)
			upstream, release := heldUpstream(t, identity)
			p := startProgram(t, "", vars{"TARGET_URL": upstream.URL + "/openai/", "PORT": "0",
				"HOST":                              "127.0.0.1",
				"AZURE_POD_IDENTITY_AUTHORITY_HOST": identity.URL})
			line, _ := p.stderr.waitFor(t, "proxy listening on 127.0.0.1:")
			_, line, _ = strings.Cut(line, "listening on ")
			addr, _, _ := strings.Cut(line, " ➜ ")

			stream := openStream(t, "http://"+addr)
			conn, echo := openTunnel(t, addr)
			p.Process.Signal(syscall.SIGTERM)
			p.stderr.waitFor(t, "draining 2 streams")
			if !patient {
				p.Process.Signal(os.Interrupt)
				if rest, err := io.ReadAll(stream); err == nil {
					t.Errorf("the cut stream ended as if it were whole, with %q", rest)
				}
				untilClosed(t, echo)
			} else {
				close(release)
				if rest, err := io.ReadAll(stream); err != nil || string(rest) != "data: 2\n\n" {
					t.Errorf("after the signal the stream went on with %q, %v", rest, err)
				}
				if err := echo(); err != nil {
					t.Errorf("after the signal the tunnel: %v", err)
				}
				writeFrame(conn, 8, nil)
				conn.Close()
			}
			status, stderr := p.end()
			text := strings.Join(stderr, "\n")
			if status != 0 || !strings.Contains(text, " stopped") {
				t.Errorf("got exit status %d and %q, want 0 and stopped", status, stderr)
			}
			if told := strings.Contains(text, "breaking off 2 streams"); told == patient {
				t.Errorf("the log tells of broken streams: %v\n%s", told, text)
			}
		})
	}
}

// TestDrainEndsWhatRunsTooLong: streams, tunnels, and a client that reads nothing of its answer.
func TestDrainEndsWhatRunsTooLong(t *testing.T) {
	followLog(t)
	identity := newFakeIdentity(t)
	held, _ := heldUpstream(t, identity)
	upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/openai/bulk" {
			io.Copy(w, io.LimitReader(zeros{}, 64<<20))
			return
		}
		held.Config.Handler.ServeHTTP(w, r)
	})
	p := startProxy(t, identity, upstream, nil)
	p.drainTime = 50 * time.Millisecond
	stream := openStream(t, p.url)
	_, echo := openTunnel(t, p.addr)
	_, bulk := p.dial(t, "GET /bulk HTTP/1.1\r\nHost: {host}\r\n\r\n")
	if _, err := http.ReadResponse(bulk, nil); err != nil {
		t.Fatal(err)
	}
	p.signals <- syscall.SIGTERM
	select {
	case <-p.stopped:
	case <-time.After(safetyNet):
		t.Fatal("still draining")
	}
	if rest, err := io.ReadAll(stream); err == nil {
		t.Errorf("the stream ended as if it were whole, with %q", rest)
	}
	untilClosed(t, echo)
}

// TestDrainDelayGoesOnAccepting, and tells balancers and clients that it is ending.
func TestDrainDelayGoesOnAccepting(t *testing.T) {
	logged := followLog(t)
	identity := newFakeIdentity(t)
	upstream := newUpstream(t, fakeAzure(identity, nil))
	p := startProxy(t, identity, upstream, vars{"DRAIN_DELAY": "10m"})
	const request = "GET %s HTTP/1.1\r\nHost: {host}\r\n\r\n"
	kept, r := p.dial(t, fmt.Sprintf(request, "/v1/models"))
	before, err := http.ReadResponse(r, nil)
	if err != nil || before.Close {
		t.Fatalf("before the signal: %v, %v", before, err)
	}
	io.Copy(io.Discard, before.Body)
	p.signals <- syscall.SIGTERM
	logged.waitFor(t, "stopping: accepts for another 10m0s, while /readyz says 503")

	for path, want := range map[string]string{
		"/readyz": "503 shutting down\n", "/healthz": "200 ok\n", "/v1/models": "200 ",
	} {
		_, r := p.dial(t, strings.ReplaceAll(fmt.Sprintf(request, path), "{host}", p.addr))
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatalf("%s on a new connection: %v", path, err)
		}
		body, _ := io.ReadAll(resp.Body)
		got := fmt.Sprintf("%d %s", resp.StatusCode, body)
		if !strings.HasPrefix(got, want) || !resp.Close {
			t.Errorf("%s: got %q, Connection: close %v", path, got, resp.Close)
		}
		if _, err := r.ReadByte(); err != io.EOF {
			t.Errorf("%s: the connection goes on with %v", path, err)
		}
	}
	io.WriteString(kept, strings.ReplaceAll(fmt.Sprintf(request, "/v1/models"), "{host}", p.addr))
	if resp, err := http.ReadResponse(r, nil); err != nil || resp.StatusCode != 200 || !resp.Close {
		t.Errorf("on a kept connection: got %v, %v", resp, err)
	}

	p.signals <- syscall.SIGTERM
	logged.waitFor(t, "stopped")
	<-p.stopped
	if conn, err := net.Dial("tcp", p.addr); err == nil {
		conn.Close()
		t.Error("after a second signal it accepts")
	}
}

// TestSystemdIsToldOfStartAndStop, over a socket that is a file or has an abstract name.
func TestSystemdIsToldOfStartAndStop(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("systemd is a program of Linux")
	}
	short, err := os.MkdirTemp("", "") // a socket's name has 108 bytes at most
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(short)
	abstract := fmt.Sprintf("@aoai-proxy-test-%d", os.Getpid())
	for _, name := range []string{short + "/notify", abstract} {
		systemd, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		defer systemd.Close()
		systemd.SetDeadline(time.Now().Add(safetyNet))
		told := func() string {
			text := make([]byte, 100)
			n, err := systemd.Read(text)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			return string(text[:n])
		}
		p := startProgram(t, "", vars{"PORT": "0", "HOST": "127.0.0.1", "DRAIN_DELAY": "10m",
			"TARGET_URL": nobody, "AZURE_POD_IDENTITY_AUTHORITY_HOST": nobody,
			"NOTIFY_SOCKET": name})
		if got := told(); got != "READY=1" {
			t.Errorf("%s: at the start: %q", name, got)
		}
		resp, err := http.Get("http://" + p.listens(t) + "/healthz") // the port is open
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		p.Process.Signal(syscall.SIGTERM)
		if got := told(); got != "STOPPING=1" {
			t.Errorf("%s: at the stop: %q", name, got)
		}
		p.Process.Signal(syscall.SIGTERM)
		if status, stderr := p.end(); status != 0 ||
			strings.Contains(strings.Join(stderr, "\n"), "NOTIFY_SOCKET") {
			t.Errorf("%s: got exit status %d and %q", name, status, stderr)
		}
	}

	// A socket that is not there ends nothing.
	p := startProgram(t, "", vars{"PORT": "0", "HOST": "127.0.0.1", "TARGET_URL": nobody,
		"AZURE_POD_IDENTITY_AUTHORITY_HOST": nobody, "NOTIFY_SOCKET": short + "/none"})
	p.stderr.waitFor(t, "NOTIFY_SOCKET: dial unixgram "+short+"/none: ")
	p.Process.Signal(syscall.SIGTERM)
	p.stderr.waitFor(t, "stopped")
}

// TestDrainDelayEnds, and running streams go on after it.
func TestDrainDelayEnds(t *testing.T) {
	logged := followLog(t)
	identity := newFakeIdentity(t)
	upstream, release := heldUpstream(t, identity)
	p := startProxy(t, identity, upstream, vars{"DRAIN_DELAY": "1ms"})
	stream := openStream(t, p.url)
	p.signals <- syscall.SIGTERM
	logged.waitFor(t, "draining 1 streams")
	close(release)
	if rest, err := io.ReadAll(stream); err != nil || string(rest) != "data: 2\n\n" {
		t.Errorf("the stream went on with %q, %v", rest, err)
	}
	logged.waitFor(t, "stopped")
	<-p.stopped
}

// TestRestartsOneByOneLoseNothing: three replicas, processes of their own, are restarted under load
// behind a balancer that learns of their state late.
func TestRestartsOneByOneLoseNothing(t *testing.T) {
	if testing.Short() {
		t.Skip("takes half a minute")
	}
	if runtime.GOOS == "windows" {
		t.Skip("has no signals between processes")
	}
	const streams, perSecond, events = 50, 50, 20
	identity := newFakeIdentity(t)
	upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		if r.URL.Path != "/openai/v1/stream" {
			io.WriteString(w, "{}")
			return
		}
		w.Header().Set("Content-Type", "text/event-stream")
		for i := range events {
			fmt.Fprintf(w, "data: %d\n\n", i)
			http.NewResponseController(w).Flush()
			select {
			case <-time.After(100 * time.Millisecond):
			case <-r.Context().Done():
				return
			}
		}
	})
	b := newBalancer(t)
	replicas := make([]*program, 3)
	start := func(i int) {
		replicas[i] = startProgramFor(t, 5*time.Minute, "", vars{"PORT": "0", "HOST": "127.0.0.1",
			"TARGET_URL": upstream.URL + "/openai/", "DRAIN_DELAY": "6s",
			"AZURE_POD_IDENTITY_AUTHORITY_HOST": identity.URL})
		b.add(replicas[i].listens(t))
	}
	for i := range replicas {
		start(i)
	}
	b.waitFor(t, len(replicas))

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var load sync.WaitGroup
	var whole, answered atomic.Int64
	once := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	keeping := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 100}}
	defer keeping.CloseIdleConnections()
	get := func(client *http.Client, path string) (string, error) {
		resp, err := client.Get("http://" + b.addr + path)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err == nil && resp.StatusCode != 200 {
			err = errors.New(resp.Status)
		}
		return string(body), err
	}
	for range streams {
		load.Add(1)
		go func() {
			defer load.Done()
			for ctx.Err() == nil {
				body, err := get(once, "/v1/stream")
				if err != nil || strings.Count(body, "data: ") != events {
					t.Errorf("a stream ended with %v after %q", err, body)
				}
				whole.Add(1)
			}
		}()
	}
	load.Add(1)
	go func() {
		defer load.Done()
		tick := time.NewTicker(time.Second / perSecond)
		defer tick.Stop()
		for i := 0; ctx.Err() == nil; i++ {
			<-tick.C
			client := []*http.Client{once, keeping}[i%2]
			load.Add(1)
			go func() {
				defer load.Done()
				if _, err := get(client, "/v1/models"); err != nil {
					t.Errorf("a request, kept connections %v: %v", client == keeping, err)
				}
				answered.Add(1)
			}()
		}
	}()

	for i := range replicas {
		old := replicas[i]
		old.Process.Signal(syscall.SIGTERM)
		old.stderr.waitFor(t, "stopped")
		start(i)
		b.waitFor(t, len(replicas))
	}
	cancel()
	load.Wait()
	t.Logf("%d streams and %d requests", whole.Load(), answered.Load())
}

// balancer passes TCP connections to the replicas that are ready, in turn. It asks each for
// /readyz every second, and learns of the answer 2 s later.
type balancer struct {
	addr string

	mu      sync.Mutex // protects the fields below
	ready   map[string]bool
	turn    int
	changed chan bool
}

func newBalancer(t *testing.T) *balancer {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &balancer{addr: ln.Addr().String(), ready: map[string]bool{},
		changed: make(chan bool, 100)}
	t.Cleanup(func() { ln.Close() })
	stop := make(chan bool)
	t.Cleanup(func() { close(stop) })
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go b.pass(conn)
		}
	}()
	go func() {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				b.ask()
			case <-stop:
				return
			}
		}
	}()
	return b
}

func (b *balancer) add(addr string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ready[addr] = false
}

func (b *balancer) ask() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for addr := range b.ready {
		go func() {
			client := http.Client{Transport: &http.Transport{DisableKeepAlives: true},
				Timeout: safetyNet}
			resp, err := client.Get("http://" + addr + "/readyz")
			isReady := err == nil && resp.StatusCode == 200
			if err == nil {
				resp.Body.Close()
			}
			time.AfterFunc(2*time.Second, func() {
				b.mu.Lock()
				defer b.mu.Unlock()
				b.ready[addr] = isReady
				select {
				case b.changed <- true:
				default:
				}
			})
		}()
	}
}

// waitFor waits until n replicas are known to be ready.
func (b *balancer) waitFor(t *testing.T, n int) {
	t.Helper()
	late := time.After(time.Minute)
	for len(b.readyOnes()) < n {
		select {
		case <-b.changed:
		case <-late:
			t.Fatalf("%d replicas are ready, want %d", len(b.readyOnes()), n)
		}
	}
}

func (b *balancer) readyOnes() (addrs []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for addr, ready := range b.ready {
		if ready {
			addrs = append(addrs, addr)
		}
	}
	slices.Sort(addrs)
	return addrs
}

// pass connects a client to the next replica. If that refuses, the client's request is lost.
func (b *balancer) pass(client net.Conn) {
	defer client.Close()
	ready := b.readyOnes()
	if len(ready) == 0 {
		return
	}
	b.mu.Lock()
	b.turn++
	addr := ready[b.turn%len(ready)]
	b.mu.Unlock()
	replica, err := net.Dial("tcp", addr)
	if err != nil {
		return
	}
	defer replica.Close()
	ended := make(chan bool, 2)
	for _, pair := range [][2]net.Conn{{client, replica}, {replica, client}} {
		go func() {
			io.Copy(pair[0], pair[1])
			pair[0].(*net.TCPConn).CloseWrite()
			ended <- true
		}()
	}
	<-ended
	<-ended
}

func TestHalfAHeadIsNotWaitedFor(t *testing.T) {
	followLog(t)
	p := newTestProxy(t, newFakeIdentity(t), newUpstream(t, nil), nil)
	// 50 ms each; no limit would stay none.
	p.server.ReadHeaderTimeout, p.server.IdleTimeout = p.server.ReadHeaderTimeout/300,
		p.server.IdleTimeout/2400
	p.start(t)
	for _, sent := range []string{"", "GET /healthz HTT",
		"GET /healthz HTTP/1.1\r\nHost: {host}\r\n",
		"GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n"} {
		_, r := p.dial(t, sent)
		if _, err := io.ReadAll(r); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("after %q the connection stays open", sent)
		}
	}
}

// main.go: -check.

// reply is what a fake answers in a test of the check.
type reply struct {
	status int
	body   string
}

// runCheck is -check with the environment env.
func runCheck(env vars, out io.Writer) error {
	before := log.Writer()
	defer log.SetOutput(before) // check has put a writer of its own in front of it
	cfg, err := loadConfig(func(name string) string { return env[name] })
	return check(cfg, err, nil, out, false)
}

func TestCheckTellsWhatIsWrong(t *testing.T) {
	const object, cognitive = "11111111-2222-3333-4444-555555555555",
		"https://cognitiveservices.azure.com"
	jwt := func(aud, oid string) string {
		payload := fmt.Sprintf(`{"aud":%q,"tid":"tenant-1","oid":%q,"appid":"client-1"}`, aud, oid)
		return "eyJhbGciOiJub25lIn0." + base64.RawURLEncoding.EncodeToString([]byte(payload)) +
			".c2lnbmF0dXJl"
	}
	gives := func(aud, oid string) reply {
		return reply{200,
			tokenAnswer(jwt(aud, oid), time.Hour)}
	}
	said := func(status int, code, message string) reply {
		return reply{status, fmt.Sprintf(`{"error":{"code":%q,"message":%q}}`, code, message)}
	}
	token := gives(cognitive, object)
	claude := reply{400, `{"type":"error","error":{"type":"invalid_request_error","message":"mo` +
		`del: Field required"}}`}
	long := jwt(cognitive, strings.Repeat("0", 3000))
	const role = "az role assignment create --assignee-object-id "

	untrusted := httptest.NewUnstartedServer(http.NotFoundHandler())
	untrusted.Config.ErrorLog = log.New(io.Discard, "", 0)
	untrusted.StartTLS()
	defer untrusted.Close()
	var identityReply, upstreamReply reply
	identity := newFakeIdentity(t)
	identity.answerWith(func(w http.ResponseWriter,
		r *http.Request) {
		writeJSON(w, identityReply.status, identityReply.body)
	})
	upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		asked := r.Method + " " + r.RequestURI + " " + string(body)
		message := strings.HasPrefix(asked, "POST /anthropic/v1/messages") &&
			string(body) == "{}" &&
			r.Header.Get("Anthropic-Version") != "" &&
			r.Header.Get("Content-Type") == "application/json"
		token := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
		if r.Method != "GET" && !message || !strings.Contains(identityReply.body, token) {
			t.Errorf("%s with %v", asked, r.Header)
		}
		writeJSON(w, upstreamReply.status, upstreamReply.body)
	})
	target := upstream.URL + "/openai/"

	tests := []struct {
		name     string
		target   string
		identity reply
		upstream reply
		want     []string // in the output; of a fault, the first is the step that fails
	}{
		{"everything fine", target, token, reply{200, `{}`},
			[]string{"object id " + object, "tenant tenant-1", "client id client-1",
				"/openai/models?api-version=2024-10-21: answered 200"}},
		{"everything fine, v1", target + "v1/", token, reply{200, `{}`},
			[]string{"/openai/v1/models: answered 200", "audience " + cognitive}},
		{"opaque token", target, reply{200, tokenAnswer("opaque", time.Hour)}, reply{200, `{}`},
			[]string{"ok    upstream: "}},
		{"service without a list of models", upstream.URL + "/models/", token,
			reply{404, "\x1b[2J"},
			[]string{"ok    upstream: ", "answered 404 Not Found, as services without a list of " +
				"models do"}},
		{"Claude", upstream.URL + "/anthropic/", token, claude, []string{"ok    upstream: ",
			"POST " + upstream.URL + "/anthropic/v1/messages: answered 400 Bad Request: " +
				"invalid_request_error"}},
		{"path as the proxy has it", upstream.URL + "/a//openai/", token, reply{200, `{}`},
			[]string{"ok    upstream: GET " + upstream.URL +
				"/a//openai/models?api-version=2024-10-21: "}},

		{"pasted URL of Claude", upstream.URL + "/anthropic/v1/messages/", token,
			said(404, "404", "no"),
			[]string{"FAIL  upstream: ", "hint: there is no such path: check TARGET_URL"}},
		{"Claude answers an empty message", upstream.URL + "/anthropic/", token, reply{200, `{}`},
			[]string{"FAIL  upstream: "}},
		{"not Claude's own 400", upstream.URL + "/anthropic/", token,
			said(400, "BadRequest", "API version"),
			[]string{"FAIL  upstream: "}},
		{"Claude at a regional endpoint", upstream.URL + "/anthropic/", token,
			said(400, "BadRequest", "Please provide a custom subdomain for token authentication"),
			[]string{"FAIL  upstream: ", "hint: a regional endpoint takes no tokens"}},
		{"role missing, to an opaque token", target, reply{200, tokenAnswer("opaque", time.Hour)},
			said(401, "PermissionDenied", "no"), []string{"FAIL  upstream: ", "lacks the role"}},

		{"bad setting", "http://10.0.0.4/", token, reply{},
			[]string{"FAIL  settings: TARGET_URL: ", "want https"}},
		{"no identity", target, reply{400, noIdentity}, reply{},
			[]string{"FAIL  token: ", `answered 400: ` +
				`{"error":"invalid_request","error_description":"Identity not found"}`,
				"hint: assign a managed identity to this host"}},
		{"several identities", target, said(400, "invalid_request",
			"Multiple user assigned identities exist, please specify the clientId / resourceId "+
				"of the identity in the token request"), reply{},
			[]string{"FAIL  token: ", "hint: set AZURE_CLIENT_ID"}},
		{"wrong audience", target, gives("https://management.azure.com", object),
			said(401, "401", "Access token is missing, invalid, audience is incorrect "+
				"(https://cognitiveservices.azure.com), or have expired."),
			[]string{"FAIL  upstream: ",
				"hint: the token is for https://management.azure.com, the wrong audience: set " +
					"AZURE_OPENAI_SCOPE"}},
		{"role missing", target, token, said(401, "PermissionDenied",
			"Principal does not have access to API/Operation."),
			[]string{"FAIL  upstream: ", "object id " + object +
				" lacks the role Cognitive Services OpenAI User", "takes minutes", role +
				object + " ", `--role "Cognitive Services OpenAI User"`}},
		{"role for Claude missing", upstream.URL + "/anthropic/", token,
			said(401, "PermissionDenied", "no"), []string{"FAIL  upstream: ",
				" lacks the role Cognitive Services User", role + object, "${resource:?",
				`--role "Cognitive Services User"`}},
		{"role for Foundry's models missing", upstream.URL + "/models/", token,
			said(401, "PermissionDenied", "no"), []string{"FAIL  upstream: ",
				" lacks the role Cognitive Services User", role + object, "${resource:?",
				`--role "Cognitive Services User"`}},
		{"role for a project missing", upstream.URL + "/api/projects/p/openai/v1/", token,
			said(401, "PermissionDenied", "no"), []string{"FAIL  upstream: ",
				" lacks the role Azure AI User", role + object, `--role "Azure AI User"`}},
		{"role missing, in other words", target, token,
			said(401, "PermissionDenied", "The principal `"+object+"` lacks the required data "+
				"action"), []string{"FAIL  upstream: ", role + object}},
		{"role missing, to an id that is none", target, gives(cognitive, "$(touch x)"),
			said(401, "PermissionDenied", "no"), []string{"FAIL  upstream: ", "lacks the role"}},
		{"refused for another reason", target, token,
			said(403, "AuthenticationTypeDisabled",
				"Key based authentication is disabled for this resource."),
			[]string{"FAIL  upstream: ", "a policy or network rule",
				`it says: {"error":{"code":"AuthenticationTypeDisabled","message":"Key ` +
					`based`}},
		{"right audience", target, token, said(401, "401",
			"Access token is missing, invalid, audience is incorrect "+
				"(https://cognitiveservices.azure.com), or have expired."),
			[]string{"FAIL  upstream: ",
				"the token's audience is right: check this host's clock"}},
		{"token echoed", target, reply{200, tokenAnswer(long, time.Hour)},
			said(500, "500", "not this one: "+long),
			[]string{"FAIL  upstream: ", "not this one: REDACTED"}},
		{"half a token echoed", target, reply{200, tokenAnswer(long, time.Hour)},
			said(500, "500", "not this one: "+long[:40]+"…"),
			[]string{"FAIL  upstream: ", "not this one: REDACTED…"}},
		{"forgotten path", upstream.URL, token, said(404, "404", "Resource not found"),
			[]string{"FAIL  upstream: ", "hint: there is no such path",
				"hint: TARGET_URL has " + upstream.URL + "/ without /openai/"}},
		{"a web page", target, token, reply{200, "<html>log in</html>"},
			[]string{"FAIL  upstream: ", "hint: a web page answered, not the service"}},
		{"pasted URL of Foundry's models", upstream.URL + "/models/chat/completions/", token,
			said(404, "404", "no"),
			[]string{"FAIL  upstream: "}},
		{"an empty answer", target, token, reply{200, ""}, []string{"FAIL  upstream: "}},
		{"firewall", target, token, said(403, "AccessDenied",
			"Access denied due to Virtual Network/Firewall rules."),
			[]string{"FAIL  upstream: ", "answered 403 Forbidden",
				"hint: the resource's network rules refuse this host"}},
		{"regional endpoint", target, token, said(400, "BadRequest",
			"Please provide a custom subdomain for token authentication, otherwise API key is "+
				"required."), []string{"FAIL  upstream: ",
			"hint: a regional endpoint takes no tokens",
			"https://NAME.openai.azure.com/openai/"}},
		{"key-only gateway", target, token, reply{401,
			`{"statusCode":401,"message":"Access denied due to missing subscription key. Make ` +
				`sure to include subscription key when making requests to an API."}`},
			[]string{"FAIL  upstream: ", "hint: the gateway wants a key of its own"}},
		{"wrong path", target, token, said(404, "404", "Resource not found"),
			[]string{"FAIL  upstream: ", "answered 404",
				"hint: there is no such path: check TARGET_URL"}},
		{"nobody listens", nobody + "/openai/", token, reply{}, []string{"FAIL  upstream: ",
			"no answer from 127.0.0.1:1: connection failed: dial tcp 127.0.0.1:1: ",
			"hint: a firewall?"}},
		{"untrusted certificate", untrusted.URL + "/openai/", token, reply{},
			[]string{"FAIL  upstream: ", "certificate not trusted",
				"hint: name a file with your own CA in SSL_CERT_FILE"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			identityReply, upstreamReply = tt.identity, tt.upstream
			var buf bytes.Buffer
			err := runCheck(vars{"TARGET_URL": tt.target,
				"AZURE_POD_IDENTITY_AUTHORITY_HOST": identity.URL}, &buf)
			out := buf.String()
			for _, want := range tt.want {
				if !strings.Contains(out, want) {
					t.Errorf("no %q in the output", want)
				}
			}
			failed := strings.HasPrefix(tt.want[0], "FAIL")
			if (err != nil) != failed || strings.Count(out, "FAIL") != strings.Count(tt.want[0],
				"FAIL") {
				t.Errorf("got error %v, want one: %v", err, failed)
			}
			if strings.Contains(out, "to listen on "+
				"127.0.0.1:8081") != (tt.target != "http://10.0.0.4/") ||
				strings.Contains(out, "\x1b") {
				t.Error("does not say where it would listen, or has control characters")
			}
			for _, line := range strings.Split(strings.TrimSpace(out), "\n") {
				if !strings.HasPrefix(line, "ok    ") && !strings.HasPrefix(line, "FAIL  ") &&
					!strings.HasPrefix(line, "      ") {
					t.Errorf("line %q", line)
				}
			}
			for _, never := range []string{"c2lnbmF0dXJl", "eyJ", "opaque", role + "$"} {
				if strings.Contains(out, never) {
					t.Errorf("%q in the output", never)
				}
			}
			if got, want := strings.Contains(out, role), slices.Contains(tt.want, role+object) ||
				slices.Contains(tt.want, role+object+" "); got != want {
				t.Errorf("the command that gives the role: %v, want %v", got, want)
			}
			if t.Failed() {
				t.Log("\n" + out)
			}
		})
	}
}

// TestCheckEndsWithWhatToPutIntoAClient, for each target, if all is well with all of them.
func TestCheckEndsWithWhatToPutIntoAClient(t *testing.T) {
	identity := newFakeIdentity(t)
	const claude = `{"type":"error","error":{"type":"invalid_request_error"}}`
	models, claudeStatus := "", 400
	upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			writeJSON(w, claudeStatus, claude)
			return
		}
		writeJSON(w, 200, models)
	})
	const list = `{"data":[{"id":"gpt-5"},{"id":7},{"id":"a b\u001b[2J"},{"id":"gpt-4o"},` +
		`{"id":"c"},{"id":"d"},{"id":"e"},{"id":"f"}]}`
	tests := []struct {
		name, targets string
		env           vars
		models        string
		claude        int
		want          string
	}{
		{"GPT", "/openai/", nil, list, 400, `
ok    clients: base URL: http://localhost:8081/v1, or http://localhost:8081 where the client ` +
			`asks for an Azure endpoint
      key: any text, as there is no EXPECTED_KEY
      models that the service lists: gpt-5, gpt-4o, c, d, e; a client's model is the name of a ` +
			`deployment
`},
		{"Claude, with a key", "/anthropic/", vars{"EXPECTED_KEY": "s3cret", "PORT": "9000"}, "",
			400, `
ok    clients: base URL for Claude: http://localhost:9000
      key: EXPECTED_KEY, where the client asks for an API key
`},
		{"both, on one address", "/openai/ {URL}/anthropic/", vars{"HOST": "127.0.0.2"}, "{}",
			400, `
ok    clients: base URL: http://127.0.0.2:8081/v1, or http://127.0.0.2:8081 where the client ` +
				`asks for an Azure endpoint
      base URL for Claude: http://127.0.0.2:8081/anthropic
      key: any text, as there is no EXPECTED_KEY
`},
		{"v1 in the target", "/openai/v1/", nil, "{}", 400, `
ok    clients: base URL: http://localhost:8081/v1
      key: any text, as there is no EXPECTED_KEY
`},
		{"Claude first", "/anthropic/ {URL}/openai/", nil, "{}", 400, `
ok    clients: base URL for Claude: http://localhost:8081
      base URL: http://localhost:8081/openai/v1, or http://localhost:8081 where the client asks ` +
			`for an Azure endpoint
      key: any text, as there is no EXPECTED_KEY
`},
		{"every address, any port", "/gateway/", vars{"HOST": "::", "PORT": "0"}, "{}", 400, `
ok    clients: base URL: http://localhost:PORT
      key: any text, as there is no EXPECTED_KEY
`},
		{"the second fails", "/openai/ {URL}/anthropic/", nil, list, 500, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			models, claudeStatus = tt.models, tt.claude
			env := vars{"AZURE_POD_IDENTITY_AUTHORITY_HOST": identity.URL,
				"TARGET_URL": upstream.URL + strings.ReplaceAll(tt.targets, "{URL}", upstream.URL)}
			for name, value := range tt.env {
				env[name] = value
			}
			var out bytes.Buffer
			err := runCheck(env, &out)
			text := out.String()
			if (err == nil) != (tt.want != "") || !strings.HasSuffix(text, tt.want) ||
				strings.Contains(text, "clients") != (tt.want != "") {
				t.Errorf("got error %v and\n%s", err, text)
			}
			if n := strings.Count(text, "  upstream: "); n != len(strings.Fields(tt.targets)) {
				t.Errorf("%d upstreams were tried", n)
			}
		})
	}
}

// TestCheckFailsIfAnAnswerBreaksOff, even one whose beginning looks right.
func TestCheckFailsIfAnAnswerBreaksOff(t *testing.T) {
	upstream := newUpstream(t, answerRaw("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}"))
	var out bytes.Buffer
	err := runCheck(vars{"TARGET_URL": upstream.URL + "/openai/",
		"AZURE_POD_IDENTITY_AUTHORITY_HOST": newFakeIdentity(t).URL}, &out)
	if err == nil || !strings.Contains(out.String(), "FAIL  upstream: no answer from ") {
		t.Errorf("got %v and\n%s", err, &out)
	}
}

func TestCheckIsColouredIfAskedTo(t *testing.T) {
	for coloured, want := range map[bool][2]string{
		false: {"ok    .env: a line\n", "FAIL  settings: "},
		true:  {"\x1b[32mok    \x1b[0m.env: a line\n", "\x1b[31mFAIL  \x1b[0msettings: "},
	} {
		var out bytes.Buffer
		check(nil, errors.New("\x1b[5mwrong"), []string{"a line"}, &out, coloured)
		if text := out.String(); text != want[0]+want[1]+" [5mwrong\n" {
			t.Errorf("got %q", text)
		}
	}
}

// TestCheckTellsItsHintsFromForeignOnes: a peer cannot have -check give advice.
func TestCheckTellsItsHintsFromForeignOnes(t *testing.T) {
	identity := newFakeIdentity(t)
	upstream := newUpstream(t, answerRaw("HTTP/1.1 429 No\r\nRetry-After: 1; hint: lacks the "+
		"role\r\n\r\n"))
	var out bytes.Buffer
	runCheck(vars{"TARGET_URL": upstream.URL + "/openai/",
		"AZURE_POD_IDENTITY_AUTHORITY_HOST": identity.URL}, &out)
	if text := out.String(); strings.Contains(text, "\n      hint: lacks") ||
		strings.Contains(text, "az role") ||
		!strings.Contains(text, "\n      hint: too many requests") {
		t.Errorf("got %s", text)
	}
}

// TestCheckKeepsTheGoLibrarysLogSafe, as it has the same upstream.
func TestCheckKeepsTheGoLibrarysLogSafe(t *testing.T) {
	const token = "eyJ0eXAiOiJKV1Qi.t0k3n.t0k3n"
	identity := newFakeIdentity(t)
	identity.answerWith(func(w http.ResponseWriter,
		_ *http.Request) {
		fmt.Fprint(w, tokenAnswer(token, time.Hour))
	})
	p := startProgram(t, "", vars{"AZURE_POD_IDENTITY_AUTHORITY_HOST": identity.URL,
		"TARGET_URL": newUpstream(t, answerRaw("HTTP/1.1 200 OK\r\nContent-Length: "+
			"2\r\n\r\n{}"+token)).URL + "/openai/"}, "-check")
	if status, stderr := p.end(); status != 0 ||
		strings.Contains(strings.Join(stderr, "\n"), "t0k3n") {
		t.Errorf("got exit status %d and %q", status, stderr)
	}
}

// forward.go: check the caller.

func TestKeyIsCheckedAndStaysHere(t *testing.T) {
	tests := []struct {
		name, head string
		status     int
	}{
		{"api-key", "POST /x HTTP/1.1\r\nHost: {host}\r\napi-key: sesame\r\n", 200},
		{"x-api-key", "POST /x HTTP/1.1\r\nHost: {host}\r\nX-Api-Key: sesame\r\n", 200},
		{"bearer", "POST /x HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer sesame\r\n", 200},
		{"bearer in other case", "POST /x HTTP/1.1\r\nHost: {host}\r\n" +
			"authorization: bEARER sesame\r\n", 200},
		{"second of two", "POST /x HTTP/1.1\r\nHost: {host}\r\napi-key: wrong\r\n" +
			"Authorization: Bearer sesame\r\n", 200},
		{"upgrade, query", "GET /x?a=1&api-key=sesame&b=2 HTTP/1.1\r\n" + webSocketHead, 200},
		{"upgrade, subprotocol", "GET /x HTTP/1.1\r\n" + webSocketHead +
			"Sec-WebSocket-Protocol: realtime, openai-insecure-api-key.sesame\r\n", 200},

		{"none", "POST /x HTTP/1.1\r\nHost: {host}\r\n", 401},
		{"wrong", "POST /x HTTP/1.1\r\nHost: {host}\r\napi-key: sesam\r\n", 401},
		{"empty", "POST /x HTTP/1.1\r\nHost: {host}\r\napi-key:\r\nAuthorization: Bearer \r\n",
			401},
		{"basic", "POST /x HTTP/1.1\r\nHost: {host}\r\nAuthorization: Basic sesame\r\n", 401},
		{"query without upgrade", "POST /x?api-key=sesame HTTP/1.1\r\nHost: {host}\r\n", 401},
	}
	for _, tt := range tests {
		for _, key := range []string{"sesame", ""} {
			t.Run(tt.name+" expecting "+key, func(t *testing.T) {
				p, upstream := startRecorded(t, vars{"EXPECTED_KEY": key})
				status := tt.status
				if key == "" {
					status = 200 // any key will do, and is stripped all the same
				}
				resp, body := p.do(t, tt.head+"\r\n")
				if resp.StatusCode != status {
					t.Fatalf("got %d %s, want %d", resp.StatusCode, body, status)
				}
				if status == 401 {
					var answer struct {
						Error struct{ Message, Type, Code string }
					}
					if json.Unmarshal([]byte(body), &answer) != nil ||
						answer.Error.Code != "invalid_api_key" ||
						!strings.Contains(body, `"param":null`) ||
						resp.ContentLength != int64(len(body)) ||
						resp.Header.Get("WWW-Authenticate") == "" ||
						resp.Header.Get("X-Should-Retry") != "false" {
						t.Errorf("got %v %s, want an error in OpenAI's form", resp.Header, body)
					}
					return
				}
				r, _ := upstream.only(t)
				if got := r.Header["Authorization"]; len(got) != 1 || got[0] != "Bearer token-1" {
					t.Errorf("Authorization: got %q, want the token alone", got)
				}
				if sent := fmt.Sprint(r.RequestURI, r.Header); strings.Contains(sent, "sesame") {
					t.Errorf("the key went upstream: %s", sent)
				}
			})
		}
	}
}

func TestWebPagesCannotDriveIt(t *testing.T) {
	tests := []struct {
		name, head string
		status     int
	}{
		{"localhost", "Host: localhost", 200},
		{"localhost and port", "Host: localhost:8081", 200},
		{"IPv4 literal", "Host: 127.0.0.1:8081", 200},
		{"IPv6 literal", "Host: [::1]:8081", 200},
		{"own origin", "Host: localhost:8081\r\nOrigin: http://localhost:8081\r\n" +
			"Sec-Fetch-Site: same-origin", 200},
		{"capitals", "Host: LOCALHOST:8081", 200},
		{"final dot", "Host: localhost.", 200},
		{"origin in capitals", "Host: localhost\r\nOrigin: http://LOCALHOST:3000", 200},
		{"typed by the user", "Host: localhost:8081\r\nSec-Fetch-Site: none", 200},

		{"rebound name", "Host: attacker.example:8081", 403},
		{"name that begins like localhost", "Host: localhost.attacker.example", 403},
		{"two final dots", "Host: localhost..", 403},
		{"name that ends like localhost", "Host: attacker.localhost", 403},
		{"any address", "Host: 0.0.0.0:8081", 403},
		{"empty host", "Host:", 403},
		{"foreign origin", "Host: localhost\r\nOrigin: https://attacker.example", 403},
		{"origin with localhost as user",
			"Host: localhost\r\nOrigin: https://localhost@attacker.example", 403},
		{"opaque origin", "Host: localhost\r\nOrigin: null", 403},
		{"second origin", "Host: localhost\r\nOrigin: http://localhost\r\n" +
			"Origin: https://attacker.example", 403},
		{"cross-site", "Host: localhost\r\nSec-Fetch-Site: cross-site", 403},
		{"same-site", "Host: localhost\r\nSec-Fetch-Site: same-site", 403},
	}
	keyless, _ := startRecorded(t, nil)
	keyed, _ := startRecorded(t, vars{"EXPECTED_KEY": "sesame", "HOST": "127.0.0.1"})
	upgrade := strings.Replace(webSocketHead, "Host: {host}\r\n", "", 1)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, request := range []string{
				"GET /x HTTP/1.1\r\n" + tt.head + "\r\n\r\n",
				"POST /x HTTP/1.1\r\n" + tt.head + "\r\nContent-Length: 1\r\n\r\nx",
				"GET /x HTTP/1.1\r\n" + tt.head + "\r\n" + upgrade + "\r\n",
			} {
				if resp, body := keyless.do(t, request); resp.StatusCode != tt.status {
					t.Errorf("without a key: got %d %s, want %d", resp.StatusCode, body, tt.status)
				}
				request = strings.Replace(request, "\r\n\r\n", "\r\napi-key: sesame\r\n\r\n", 1)
				if resp, body := keyed.do(t, request); resp.StatusCode != 200 {
					t.Errorf("with a key: got %d %s, want 200", resp.StatusCode, body)
				}
			}
		})
	}
}

func TestRequestsThatLeaveTheTargetAreRefused(t *testing.T) {
	tests := []struct {
		name, line string
		status     int
	}{
		{"dot segments", "GET /../metadata", 400},
		{"dot segment at the end", "GET /a/..", 400},
		{"single dot", "GET /./a", 400},
		{"escaped dots", "GET /%2e%2E/metadata", 400},
		{"escaped slash", "GET /..%2fmetadata", 400},
		{"back-slash", "GET /..\\metadata", 400},
		{"dots before a space", "GET /..%20/metadata", 400},
		{"dots before a NUL", "GET /..%00/metadata", 400},
		{"dots before DEL", "GET /..%7f/metadata", 400},
		{"dots before a C1 control", "GET /..%c2%85/metadata", 400},
		{"dots before white space of Unicode", "GET /..%e3%80%80/metadata", 400},
		{"dots around a tab", "GET /.%09./metadata", 400},
		{"escaped back-slash", "GET /a/..%5C..%5cmetadata", 400},
		{"escaped twice", "GET /%252e%252e/metadata", 400},
		{"escaped digit by digit", "GET /%25%32%65%25%32%65/metadata", 400},
		{"escaped many times", "GET /%2525252525252525252525252e./metadata", 400},
		{"parameter", "GET /..;a=b/metadata", 400},
		{"overlong slash", "GET /..%c0%af..%c0%afsecret", 400},
		{"overlong dots", "GET /%c0%ae%c0%ae/x", 400},
		{"overlong slash of three bytes", "GET /..%e0%80%af..%e0%80%afsecret", 400},
		{"overlong slash, not escaped", "GET /..\xc0\xafsecret", 400},
		{"overlong slash, escaped twice", "GET /..%25c0%25afsecret", 400},
		{"surrogate", "GET /%ed%a0%80", 400},
		{"cut in a rune", "GET /%c3", 400},
		{"percent sign escaped twice", "GET /100%2525", 400},
		{"dots behind slashes", "GET //../metadata", 400},
		{"after openai", "GET /openai/../metadata", 400},
		{"absolute-form", "GET http://169.254.169.254/metadata", 400},
		{"absolute-form of a probe", "GET http://169.254.169.254/", 400},
		{"CONNECT", "CONNECT elsewhere.example:443", 405},
		{"CONNECT with a path", "CONNECT /a", 405},
		{"TRACE", "TRACE /a", 405},
		{"TRACE in lower case", "trace /a", 405},
		{"TRACE of IIS", "TRACK /a", 405},
		{"OPTIONS *", "OPTIONS *", 400},
	}
	p, upstream := startRecorded(t, vars{"EXPECTED_KEY": "sesame"})
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			resp, body := p.do(t, tt.line+" HTTP/1.1\r\nHost: {host}\r\napi-key: sesame\r\n\r\n")
			if resp.StatusCode != tt.status || !strings.HasPrefix(body, `{"error":{"message":`) {
				t.Errorf("got %d %s, want %d", resp.StatusCode, body, tt.status)
			}
			if allow := resp.Header.Get("Allow"); (allow != "") != (tt.status == 405) {
				t.Errorf("got Allow: %q with %d", allow, resp.StatusCode)
			}
		})
	}
	if n := upstream.count(); n > 0 {
		t.Errorf("upstream got %d requests, want none", n)
	}
}

func TestHeadersOver64KiBAreRefused(t *testing.T) {
	p, _ := startRecorded(t, nil)
	ok, _ := p.do(t, "GET /x HTTP/1.1\r\nHost: {host}\r\nX-Codex-Turn-Metadata: "+
		""+strings.Repeat("a", 60_000)+"\r\n\r\n")
	tooLarge, _ := p.do(t, "GET /x HTTP/1.1\r\nHost: {host}\r\nX-Codex-Turn-Metadata: "+
		""+strings.Repeat("a", 70_000)+"\r\n\r\n")
	if ok.StatusCode != 200 || tooLarge.StatusCode != 431 {
		t.Errorf("got %d and %d, want 200 and 431", ok.StatusCode, tooLarge.StatusCode)
	}
}

// TestRefusalReachesAClientThatKeepsSending, although it expects a 100. Left to itself the server
// would
// reset its connection, and this client prefers the failure of its upload to an answer.
func TestRefusalReachesAClientThatKeepsSending(t *testing.T) {
	followLog(t)
	upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).EnableFullDuplex()
		w.Header().Set("Connection", "close") // or the next request could meet its end
		http.Error(w, "too large", http.StatusRequestEntityTooLarge)
	})
	p := startProxy(t, newFakeIdentity(t), upstream, vars{"EXPECTED_KEY": "sesame"})
	for key, status := range map[string]int{"wrong": 401, "sesame": 413} {
		for range 10 {
			req, _ := http.NewRequest("POST", p.url+"/x", bytes.NewReader(make([]byte, 4<<20)))
			req.Header.Set("api-key", key)
			req.Header.Set("Expect", "100-continue")
			resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
			if err != nil {
				t.Fatalf("key %s: %v", key, err)
			}
			if body, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != status {
				t.Errorf("key %s: got %d %s %v, want %d", key, resp.StatusCode, body, err, status)
			}
		}
	}
}

func TestStalledBodiesOfRefusedRequestsAreNotWaitedFor(t *testing.T) {
	followLog(t)
	p := startProxy(t, newFakeIdentity(t), newUpstream(t, nil), vars{"EXPECTED_KEY": "sesame"})
	answers := make(map[string]*bufio.Reader)
	for _, line := range []string{"POST /x", "GET /healthz", "POST /../x"} {
		for _, framing := range []string{"Content-Length: 1000", "Content-Length: 1000000",
			"Transfer-Encoding: chunked"} {
			request := line + " HTTP/1.1\r\nHost: {host}\r\n" + framing + "\r\n\r\n"
			_, answers[request] = p.dial(t, request)
		}
	}
	for request, r := range answers {
		resp, err := http.ReadResponse(r, nil)
		if err != nil || resp.StatusCode != 401 {
			t.Fatalf("%q: got %v, %v", request, resp, err)
		}
		if _, err := io.ReadAll(r); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%q: the connection stays open", request)
		}
	}
}

// forward.go: build the upstream request.

func TestPathAndQueryGoAsTheyCame(t *testing.T) {
	tests := []struct{ name, base, target, upstream string }{
		{"classic", "/openai/", "/deployments/gpt-4o/chat/completions?api-version=2024-10-21",
			"/openai/deployments/gpt-4o/chat/completions?api-version=2024-10-21"},
		{"SDK adds openai", "/openai/", "/openai/v1/responses", "/openai/v1/responses"},
		{"on segment borders only", "/openai/", "/openaix/y", "/openai/openaix/y"},
		{"base of two segments", "/openai/v1/", "/openai/v1/models", "/openai/v1/models"},
		{"last of two segments", "/gateway/openai/", "/openai/models", "/gateway/openai/models"},
		{"no final slash", "/openai", "/models", "/openai/models"},
		{"no path", "", "/models", "/models"},
		{"no path, two slashes", "", "//elsewhere.example/models", "/elsewhere.example/models"},
		{"escaped slash and space", "/openai/", "/files/a%2Fb%20c", "/openai/files/a%2Fb%20c"},
		{"escapes beside odd bytes", "/openai/", "/files/a%2Fb\"<>^`{|}",
			"/openai/files/a%2Fb\"<>^`{|}"},
		{"unicode, escaped and raw", "/openai/", "/files/%C3%BC\xc3\xbc",
			"/openai/files/%C3%BC\xc3\xbc"},
		{"double slash", "/openai/", "/files//a", "/openai/files//a"},
		{"slash added to a base URL", "/openai/", "//openai/deployments/x",
			"/openai/deployments/x"},
		{"slashes before v1", "/openai/", "///v1/models", "/openai/v1/models"},
		{"slashes alone", "/openai/", "//", "/openai/"},
		{"slash after openai", "/openai/", "/openai///deployments/x", "/openai/deployments/x"},
		{"slashes within TARGET_URL", "/a//openai/", "//openai/models", "/a//openai/models"},
		{"slashes before TARGET_URL's path", "//a/openai/", "/models", "/a/openai/models"},
		{"dots in names", "/openai/", "/files/..a/b../...", "/openai/files/..a/b../..."},
		{"semicolon and bad escape in query", "/openai/", "/x?b=1;a=%zz&a=%20+&a",
			"/openai/x?b=1;a=%zz&a=%20+&a"},
		{"empty query", "/openai/", "/x?", "/openai/x?"},
		{"question marks", "/openai/", "/x?a?b=/../c", "/openai/x?a?b=/../c"},

		{"first of two", "/openai/ {URL}/anthropic/", "/v1/responses", "/openai/v1/responses"},
		{"second of two", "/openai/ {URL}/anthropic/", "/anthropic/v1/messages?beta=true",
			"/anthropic/v1/messages?beta=true"},
		{"second, at the end of a path", "/openai/\n{URL}/gateway/claude", "/claude/v1/messages",
			"/gateway/claude/v1/messages"},
		{"second, its whole path", "/openai/ {URL}/gateway/claude/", "/gateway/claude/v1/messages",
			"/gateway/claude/v1/messages"},
		{"first by its name", "/openai/v1/ {URL}/anthropic/", "/openai/v1/models",
			"/openai/v1/models"},
		{"second by its name alone", "/openai/ {URL}/anthropic/", "/anthropic", "/anthropic/"},
		{"slashes before the second", "/openai/ {URL}/anthropic/", "//anthropic//v1/x",
			"/anthropic/v1/x"},
		{"second, not at the beginning", "/openai/ {URL}/anthropic/", "/v1/anthropic/x",
			"/openai/v1/anthropic/x"},
		{"on segment borders of the second", "/openai/ {URL}/anthropic/", "/anthropicx/v1",
			"/openai/anthropicx/v1"},
		{"second, escaped", "/openai/ {URL}/anthropic/", "/%61nthropic/v1",
			"/openai/%61nthropic/v1"},
		{"second, in other case", "/openai/ {URL}/anthropic/", "/Anthropic/v1",
			"/openai/Anthropic/v1"},
		{"first of three", "/openai/ {URL}/anthropic/ {URL}/models/", "/openai/models",
			"/openai/models"},
		{"last of three", "/openai/ {URL}/anthropic/ {URL}/models/", "/models/chat/completions",
			"/models/chat/completions"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			followLog(t)
			u := &recorder{}
			s := newUpstream(t, u.ServeHTTP)
			p := startProxy(t, newFakeIdentity(t), s, vars{
				"TARGET_URL": s.URL + strings.ReplaceAll(tt.base, "{URL}", s.URL)})
			p.do(t, "GET "+tt.target+" HTTP/1.1\r\nHost: {host}\r\n\r\n")
			if r, _ := u.only(t); r.RequestURI != tt.upstream {
				t.Errorf("got %q, want %q", r.RequestURI, tt.upstream)
			}
		})
	}
}

func TestCredentialsAreCutFromTheQuery(t *testing.T) {
	tests := []struct{ name, query, upstream string }{
		{"alone", "api-key=K", ""},
		{"first", "api-key=K&a=1", "a=1"},
		{"middle", "a=1&api-key=K&b=2", "a=1&b=2"},
		{"after a semicolon", "a=1;api-key=K&b=%20", "a=1&b=%20"},
		{"any case", "a=1&API-Key=K", "a=1"},
		{"escaped name", "a=1&api%2Dkey=K", "a=1"},
		{"name that goes on after a NUL", "a=1&%00api-key+%00x=K", "a=1"},
		{"name in white space", "a=1&+api-key%20=K", "a=1"},
		{"second question mark", "?api-key=K&a=1", "a=1"},
		{"of other services", "api_key=K&access_token=K&Ocp-Apim-Subscription-Key=K&a=1", "a=1"},
		{"authorization", "a&Authorization=Bearer%20K", "a"},
		{"twice", "api-key=K&a=;&api-key=K", "a=;"},
		{"without a value", "api-key&a=1", "a=1"},
		{"another name", "my-api-key=K&api-key2=K", "my-api-key=K&api-key2=K"},
		{"odd bytes", "a=1;b=%zz&&=&c", "a=1;b=%zz&&=&c"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p, upstream := startRecorded(t, nil)
			p.do(t, "GET /x?"+tt.query+" HTTP/1.1\r\nHost: {host}\r\n\r\n")
			if r, _ := upstream.only(t); r.URL.RawQuery != tt.upstream {
				t.Errorf("got %q, want %q", r.URL.RawQuery, tt.upstream)
			}
		})
	}
}

func TestOnlyHeadersThatMatterGoUpstream(t *testing.T) {
	const passed = "Accept: a|Accept-Encoding: zstd|Content-Type: c|User-Agent: u|" +
		"OpenAI-Beta: b|x-stainless-lang: l|" +
		"anthropic-version: v|x-ms-client-request-id: i|session_id: s|originator: o|version: 1|" +
		"X-Codex-Turn-State: t|" +
		"x-ms-oai-image-generation-deployment: d|traceparent: p|Range: bytes=0-1|" +
		"extra-parameters: drop|" +
		"x-ms-useragent: a|x-ms-return-client-request-id: true|x-ms-enable-preview: true|" +
		"Foundry-Features: Skills=V1Preview"
	const kept = "Cookie: c|Idempotency-Key: k|Origin: http://localhost|Referer: r|" +
		"X-Forwarded-For: 1.2.3.4|X-Forwarded-Host: h|Forwarded: f|" +
		"X-Real-Ip: i|X-Ms-Client-Ip: i|X-Ms-Adfs-Proxy-Client-Ip: i|X-Ms-Proxy: p|" +
		"X-Ms-Access-Token: t|X-Ms-Auth-Token: t|" +
		"Openai-Key: k|X-Openai-Token: t|Anthropic-Cookie: c|X-Ms-Forwarded-Client-Ip: i|" +
		"X-Ms-Authorization-Auxiliary: a|X-OpenAI-Api-Key: k|OpenAI-Api-Key: k|" +
		"Anthropic-Api-Key: k|X-Ms-Api-Key: k|X-MS-TOKEN-AAD-ACCESS-TOKEN: t|" +
		"X-MS-CLIENT-PRINCIPAL: p|X-MS-CLIENT-PRINCIPAL-NAME: n|" +
		"x-ms-original-url: u|Ocp-Apim-Subscription-Key: k|Proxy-Authorization: p|" +
		"X-Http-Method-Override: DELETE|" +
		"X-Original-Url: /|Expect: 100-continue|TE: trailers|Keep-Alive: 1|Sec-Fetch-Site: none|" +
		"Upgrade: h2c|" +
		"HTTP2-Settings: AAMAAABkAAQAAP__|Sec-WebSocket-Key: k|Max-Forwards: 1|" +
		"OpenAI-Project: named|X-Unknown: x"
	p, upstream := startRecorded(t, nil)
	p.do(t, "GET /x HTTP/1.1\r\nHost: {host}\r\nConnection: keep-alive, openai-project, "+
		"Authorization, Upgrade\r\n"+
		strings.ReplaceAll(passed+"|"+kept, "|", "\r\n")+"\r\n\r\n")
	r, _ := upstream.only(t)
	for _, line := range strings.Split(passed, "|") {
		name, value, _ := strings.Cut(line, ": ")
		if got := r.Header.Get(name); got != value {
			t.Errorf("%s: got %q, want %q", name, got, value)
		}
		r.Header.Del(name)
	}
	r.Header.Del("Authorization")
	if len(r.Header) > 0 {
		t.Errorf("went upstream, too: %v", r.Header)
	}
	if want := strings.TrimPrefix(p.forwarder.targets[0].Host, "http://"); r.Host != want {
		t.Errorf("Host: got %q, want %q", r.Host, want)
	}
}

func TestNothingIsAddedToRequests(t *testing.T) {
	p, upstream := startRecorded(t, nil)
	p.do(t, "GET /x HTTP/1.1\r\nHost: {host}\r\n\r\n")
	r, _ := upstream.only(t)
	r.Header.Del("Authorization")
	if len(r.Header) > 0 {
		t.Errorf("got %v, want nothing but the token", r.Header)
	}
}

func TestRequestBodiesKeepTheirFraming(t *testing.T) {
	large := strings.Repeat("0123456789abcdef", smallBody/16+1)
	tests := []struct {
		name, request, body string
		length              int64
	}{
		{"sized", "POST /x HTTP/1.1\r\nHost: {host}\r\nContent-Length: 5\r\n\r\nhello", "hello", 5},
		{"sized and large", fmt.Sprintf("PUT /x HTTP/1.1\r\nHost: {host}\r\nContent-Length: "+
			"%d\r\n\r\n%s", len(large), large), large, int64(len(large))},
		{"chunked", "POST /x HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n" +
			"hel\r\n2\r\nlo\r\n0\r\n\r\n", "hello", -1},
		{"empty", "POST /x HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n", "", 0},
		{"none", "DELETE /x HTTP/1.1\r\nHost: {host}\r\n\r\n", "", 0},
		{"of a GET", "GET /x HTTP/1.1\r\nHost: {host}\r\nContent-Length: 2\r\n\r\nhi", "hi", 2},
		{"own method", "BREW /x HTTP/1.1\r\nHost: {host}\r\nContent-Length: 2\r\n\r\nhi", "hi", 2},
		{"expected", "POST /x HTTP/1.1\r\nHost: {host}\r\nExpect: 100-continue\r\n" +
			"Content-Length: 2\r\n\r\nhi", "hi", 2},
		{"both framings", "POST /x HTTP/1.1\r\nHost: {host}\r\nContent-Length: 3\r\n" +
			"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", "hello", -1},
		{"compressed", "POST /x HTTP/1.1\r\nHost: {host}\r\nContent-Encoding: zstd\r\n" +
			"Content-Length: 4\r\n\r\n\x28\xb5\x2f\xfd", "\x28\xb5\x2f\xfd", 4},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p, upstream := startRecorded(t, nil)
			p.do(t, tt.request)
			r, body := upstream.only(t)
			if body != tt.body || r.ContentLength != tt.length {
				t.Errorf("got %d bytes, length %d; want %d bytes, length %d", len(body),
					r.ContentLength, len(tt.body), tt.length)
			}
		})
	}
}

func TestSmallBodyThatStallsEndsItsRequest(t *testing.T) {
	p, upstream := startRecorded(t, nil)
	p.forwarder.bodyTime = 50 * time.Millisecond
	_, r := p.dial(t, "POST /x HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1000\r\n\r\nhel")
	got, err := io.ReadAll(r)
	if !strings.HasPrefix(string(got), "HTTP/1.1 408 ") || errors.Is(err, os.ErrDeadlineExceeded) ||
		strings.Contains(string(got), "X-Should-Retry") || upstream.count() > 0 {
		t.Errorf("got %q, %v and %d requests upstream; want 408 and the connection closed", got,
			err, upstream.count())
	}
}

// deadlineRecorder records the read deadlines that are set on a connection.
type deadlineRecorder struct {
	*httptest.ResponseRecorder
	deadlines []time.Time
}

func (d *deadlineRecorder) SetReadDeadline(t time.Time) error {
	d.deadlines = append(d.deadlines, t)
	return nil
}

// TestSmallBodyLeavesNoDeadline: with one the server would end a longer stream.
func TestSmallBodyLeavesNoDeadline(t *testing.T) {
	f := newForwarder(targets{{}}, "", nil, &secrets{})
	w := &deadlineRecorder{ResponseRecorder: httptest.NewRecorder()}
	body, err := f.readBody(w, httptest.NewRequest("POST", "/x", strings.NewReader("hi")))
	if err != nil || string(body) != "hi" {
		t.Fatalf("got %q, %v", body, err)
	}
	if n := len(w.deadlines); n != 2 || w.deadlines[0].IsZero() || !w.deadlines[1].IsZero() {
		t.Errorf("got deadlines %v, want one and then none", w.deadlines)
	}
}

// TestSmallBodiesCanBeSentAgain looks at what the transport is given. That an
// idle connection turns out to be closed before a byte was written, which is
// when it sends again, happens by chance only: with the process stopped while
// the upstream closes the connection, it did in some of twenty rounds.
func TestSmallBodiesCanBeSentAgain(t *testing.T) {
	target := &url.URL{Scheme: "https", Host: "a.example", Path: "/"}
	f := newForwarder(targets{target}, "", nil, &secrets{})
	for _, tt := range []struct {
		size  int64
		again bool
	}{{1, true}, {writeBuffer, true}, {writeBuffer + 1, true}, {smallBody, true},
		{smallBody + 1, false}, {-1, false}} {
		r := httptest.NewRequest("POST", "/x", io.LimitReader(zeros{}, smallBody+1))
		r.ContentLength = tt.size
		req, _, err := f.upstreamRequest(httptest.NewRecorder(), r, false)
		if err != nil || (req.GetBody != nil) != tt.again || req.ContentLength != tt.size {
			t.Errorf("length %d: can be sent again: %v, length %d, %v; want %v",
				tt.size, req.GetBody != nil, req.ContentLength, err, tt.again)
		}
	}
}

// forward.go: get the token.

// TestBodyGoesWholeThoughTheAnswerHasBegun: what is held of it is let go then.
func TestBodyGoesWholeThoughTheAnswerHasBegun(t *testing.T) {
	followLog(t)
	hasBegun := make(chan bool)
	upstream := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter,
		r *http.Request) {
		controller := http.NewResponseController(w)
		controller.EnableFullDuplex()
		controller.Flush() // the head
		<-hasBegun
		n, err := io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, n, err)
	}))
	// With small buffers at both ends most of a body is still to be written by then.
	upstream.Config.ConnContext = func(ctx context.Context, conn net.Conn) context.Context {
		conn.(*net.TCPConn).SetReadBuffer(16 << 10)
		return ctx
	}
	upstream.Start()
	defer upstream.Close()
	p := newTestProxy(t, newFakeIdentity(t), upstream, nil)
	p.forwarder.transport.DialContext = func(_ context.Context, network, addr string) (
		net.Conn, error) {
		conn, err := net.Dial(network, addr)
		if err == nil {
			conn.(*net.TCPConn).SetWriteBuffer(16 << 10)
		}
		return conn, err
	}
	p.start(t)
	for _, size := range []int{writeBuffer, smallBody} {
		_, r := p.dial(t, fmt.Sprintf("POST /x HTTP/1.1\r\nHost: {host}\r\nContent-Length: %d"+
			"\r\nConnection: close\r\n\r\n%s", size, strings.Repeat("b", size)))
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		hasBegun <- true
		answer, err := io.ReadAll(resp.Body)
		if want := fmt.Sprint(size, " <nil>"); string(answer) != want || err != nil {
			t.Errorf("the upstream read %q of %d bytes, %v", answer, size, err)
		}
	}
}

func TestWithoutATokenTheClientIsToldWhy(t *testing.T) {
	followLog(t)
	identity := newFakeIdentity(t)
	identity.answerWith(func(w http.ResponseWriter, r *http.Request) {
		writeJSON(w, 400, `{"error":"invalid_request","error_description":"Identity not found"}`)
	})
	p := startProxy(t, identity, newUpstream(t, nil), nil)
	resp, body := p.do(t, "GET /x HTTP/1.1\r\nHost: {host}\r\n\r\n")
	if resp.StatusCode != 503 || !strings.Contains(body,
		`"error_description\":\"Identity not found\"`) || resp.Header.Get("Retry-After") != "1" {
		t.Errorf("got %d %v %s", resp.StatusCode, resp.Header, body)
	}
}

// TestClientThatEndsItsHalfIsToldSo, and not that the upstream failed: to the server it has gone.
func TestClientThatEndsItsHalfIsToldSo(t *testing.T) {
	for _, waiting := range []string{"for the token", "for the answer"} {
		t.Run(waiting, func(t *testing.T) {
			logged := followLog(t)
			asked := make(chan bool, 9)
			hold := func(w http.ResponseWriter, r *http.Request) {
				asked <- true
				<-r.Context().Done()
			}
			identity := newFakeIdentity(t)
			if waiting == "for the token" {
				identity.answerWith(hold)
			}
			p := startProxy(t, identity, newUpstream(t, hold), vars{"HOST": "127.0.0.1"})
			conn, r := p.dial(t, "GET /x HTTP/1.1\r\nHost: {host}\r\n\r\n")
			<-asked
			conn.(*net.TCPConn).CloseWrite()
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(resp.Body)
			if resp.StatusCode != 503 || !strings.Contains(string(body),
				"client left, or the proxy stopped") {
				t.Errorf("got %d %s", resp.StatusCode, body)
			}
			if text := logged.String(); strings.Contains(text, "no answer from") ||
				strings.Contains(text, "context canceled") ||
				!strings.Contains(text, ": client left") {
				t.Errorf("got %s", text)
			}
		})
	}
}

// forward.go: send.

func TestBrokenUploadNeverCompletes(t *testing.T) {
	for _, request := range []string{
		"POST /x HTTP/1.1\r\nHost: {host}\r\nContent-Length: 5\r\n\r\nhel",
		"POST /x HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1000000\r\n\r\nhel",
		"POST /x HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n",
	} {
		followLog(t)
		upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
			if _, err := io.Copy(io.Discard, r.Body); err == nil {
				t.Errorf("upstream took %q for complete", request)
			}
		})
		p := startProxy(t, newFakeIdentity(t), upstream, nil)
		conn, r := p.dial(t, request)
		conn.(*net.TCPConn).CloseWrite()
		io.Copy(io.Discard, r)               // until the proxy has given up
		for p.forwarder.streams.Load() > 0 { // it ends a little later
			runtime.Gosched()
		}
	}
}

// TestMalformedBodyIsTheClientsFault, of which nothing is told: beside a token that is removed from
// it,
// what a client sends would tell how much of it was right.
func TestMalformedBodyIsTheClientsFault(t *testing.T) {
	p, _ := startRecorded(t, nil)
	resp, trailer := p.do(t, "POST /x HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: "+
		"chunked\r\n\r\n0\r\nguess\r\n\r\n")
	if resp.StatusCode != 400 || strings.Contains(trailer, "guess") {
		t.Errorf("got %d %s, want 400 and nothing of the body", resp.StatusCode, trailer)
	}
	resp, body := p.do(t, "POST /x HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: "+
		"chunked\r\n\r\n3\r\nabc\r\nzz\r\n")
	if resp.StatusCode != 400 || !strings.Contains(body, "invalid_body") ||
		!strings.Contains(body, "broke off or is malformed") {
		t.Errorf("got %d %s, want 400 and the cause", resp.StatusCode, body)
	}
}

// TestWrittenRequestIsNotRepeated has the upstream close a connection after it has read a POST.
func TestWrittenRequestIsNotRepeated(t *testing.T) {
	followLog(t)
	var posts atomic.Int64
	upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		if r.Method == "POST" {
			if r.Header.Get("Idempotency-Key") != "" {
				t.Error("with an Idempotency-Key a transport sends a POST again")
			}
			posts.Add(1)
			panic(http.ErrAbortHandler)
		}
	})
	p := startProxy(t, newFakeIdentity(t), upstream, nil)
	p.do(t, "GET /x HTTP/1.1\r\nHost: {host}\r\n\r\n") // leaves a connection to be used again
	resp, _ := p.do(t, "POST /x HTTP/1.1\r\nHost: {host}\r\nIdempotency-Key: "+
		"k\r\nContent-Length: 2\r\n\r\nhi")
	if resp.StatusCode != 502 || posts.Load() != 1 {
		t.Errorf("got %d after %d POSTs, want 502 after 1", resp.StatusCode, posts.Load())
	}
}

// TestClientThatExpectsItGets100First, before whatever the upstream says. If the server wrote its
// 100
// at the first reading of the body, the two could garble each other, and Go 1.27 take the body
// away.
func TestClientThatExpectsItGets100First(t *testing.T) {
	followLog(t)
	upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).EnableFullDuplex()
		http.Error(w, "too large", http.StatusRequestEntityTooLarge)
		http.NewResponseController(w).Flush()
		io.Copy(io.Discard, r.Body)
	})
	p := startProxy(t, newFakeIdentity(t), upstream, nil)
	client, r := p.dial(t, "POST /x HTTP/1.1\r\nHost: {host}\r\nExpect: "+
		"100-continue\r\nTransfer-Encoding: chunked\r\n\r\n")
	for _, want := range []int{100, 413} {
		resp, err := http.ReadResponse(r, &http.Request{Method: "POST"})
		if err != nil || resp.StatusCode != want {
			t.Fatalf("got %v, %v; want %d", resp, err, want)
		}
		if want == 100 { // Go 1.27 holds an early answer back until there is more of the body
			io.WriteString(client, "2\r\nhi\r\n0\r\n\r\n")
		}
	}
}

func TestEarlyAnswerPassesWhileTheUploadRuns(t *testing.T) {
	followLog(t)
	upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).EnableFullDuplex() // or this server would wait for the body
		http.Error(w, "too large", http.StatusRequestEntityTooLarge)
	})
	p := startProxy(t, newFakeIdentity(t), upstream, nil)
	for _, framing := range []string{"Content-Length: 100000000\r\n\r\nhello",
		"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"} {
		resp, body := p.do(t, "POST /x HTTP/1.1\r\nHost: {host}\r\n"+framing)
		if resp.StatusCode != 413 || body != "too large\n" {
			t.Errorf("got %d %q, want the upstream's 413", resp.StatusCode, body)
		}
	}
}

// TestEarlyAnswerReachesAClientThatSendsFirst and reads later, as Python's HTTP clients do. What it
// sends is more than the buffers of its connection hold.
func TestEarlyAnswerReachesAClientThatSendsFirst(t *testing.T) {
	followLog(t)
	upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).EnableFullDuplex()
		http.Error(w, "too large", http.StatusRequestEntityTooLarge)
	})
	p := startProxy(t, newFakeIdentity(t), upstream, nil)
	const size = 16 << 20
	head := fmt.Sprintf("POST /x HTTP/1.1\r\nHost: {host}\r\nContent-Length: %d\r\n\r\n", size)
	conn, r := p.dial(t, head)
	if _, err := io.CopyN(conn, zeros{}, size); err != nil {
		t.Fatalf("the upload was broken off: %v", err)
	}
	if resp, err := http.ReadResponse(r, nil); err != nil || resp.StatusCode != 413 {
		t.Errorf("got %v, %v; want the upstream's 413", resp, err)
	}
}

// TestEarlyAnswerOfAnUpstreamThatHangsUp has the upstream answer and close its connection, which
// resets it, while the upload still runs.
func TestEarlyAnswerOfAnUpstreamThatHangsUp(t *testing.T) {
	followLog(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go func() { // as there is an idle connection from the start
				conn.Read(make([]byte, 4096)) // and not the rest
				io.WriteString(conn, "HTTP/1.1 413 Too Large\r\nConnection: "+
					"close\r\nContent-Length: 5\r\n\r\nlarge")
				conn.Close()
			}()
		}
	}()
	p := startProxy(t, newFakeIdentity(t), newUpstream(t, nil),
		vars{"TARGET_URL": "http://" + ln.Addr().String() + "/openai/"})
	for range 5 {
		resp, err := http.Post(p.url+"/x", "text/plain", io.LimitReader(zeros{}, 20<<20))
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != 413 || string(body) != "large" {
			t.Errorf("got %d %s, want the upstream's 413", resp.StatusCode, body)
		}
	}
}

// TestImmediateAnswersAreWhole would fail in some of a hundred uploads without full duplex
// (golang/go#40747).
func TestImmediateAnswersAreWhole(t *testing.T) {
	followLog(t)
	answer := strings.Repeat("x", 10_000)
	upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).EnableFullDuplex()
		io.WriteString(w, answer[:5000])
		w.(http.Flusher).Flush()
		io.Copy(io.Discard, r.Body)
		io.WriteString(w, answer[5000:])
	})
	p := startProxy(t, newFakeIdentity(t), upstream, nil)
	body := bytes.Repeat([]byte("y"), smallBody+1)
	var wg sync.WaitGroup
	for range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for range 50 {
				resp, err := http.Post(p.url+"/x", "text/plain", bytes.NewReader(body))
				if err != nil {
					t.Error(err)
					return
				}
				got, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				if err != nil || string(got) != answer {
					t.Errorf("got %d bytes, %v; want %d", len(got), err, len(answer))
				}
			}
		}()
	}
	wg.Wait()
}

func TestUnreachableUpstreamIsNamed(t *testing.T) {
	untrusted := httptest.NewTLSServer(http.NotFoundHandler())
	untrusted.Config.ErrorLog = log.New(io.Discard, "", 0)
	t.Cleanup(untrusted.Close)
	tests := []struct{ name, url, want string }{
		{"refused", nobody, "connection failed"},
		{"certificate", untrusted.URL, "certificate not trusted"},
		{"hang-up", newUpstream(t, answerRaw("")).URL, "connection broke"},
		{"garbage", newUpstream(t, answerRaw("\x1b[31mSSH-2.0\r\n\r\n")).URL, "connection broke"},
		{"101 unasked", newUpstream(t, answerRaw("HTTP/1.1 101 Switching "+
			"Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")).URL,
			"unexpected status 101 Switching Protocols"},
		{"status 000", newUpstream(t, answerRaw("HTTP/1.1 000 Zero\r\n\r\n")).URL,
			"unexpected status 0"},
		{"token outside of HTTP", newUpstream(t, answerRaw("Bearer token-1\r\n\r\n")).URL,
			"the answer is not HTTP"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			logged := followLog(t)
			p := startProxy(t, newFakeIdentity(t), newUpstream(t, nil),
				vars{"TARGET_URL": tt.url + "/openai/"})
			resp, body := p.do(t, "GET /x HTTP/1.1\r\nHost: {host}\r\n\r\n")
			host := strings.SplitN(tt.url, "/", 3)[2]
			if resp.StatusCode != 502 || !strings.Contains(body, "no answer from "+host) ||
				!strings.Contains(body, tt.want) {
				t.Errorf("got %d %s, want 502 with %q", resp.StatusCode, body, tt.want)
			}
			if !strings.Contains(logged.String(), tt.want) ||
				strings.Contains(logged.String(), "\x1b") {
				t.Errorf("log: %s", logged)
			}
			if strings.Contains(body+logged.String(), "token-1") {
				t.Errorf("the token is in the answer or the log: %s %s", body, logged)
			}
		})
	}
	f := newForwarder(targets{{Host: "x.invalid"}}, "", nil, &secrets{})
	text, hint := f.describeFailure(&net.DNSError{Err: "no such host", Name: "x.invalid"})
	if text != "no answer from x.invalid: DNS lookup failed: x.invalid: no such host" ||
		hint == "" {
		t.Errorf("got %q, %q", text, hint)
	}
}

// TestProxyThatRefusesIsNamed has HTTPS_PROXY refuse the connection to the upstream.
func TestProxyThatRefusesIsNamed(t *testing.T) {
	followLog(t)
	p := newTestProxy(t, newFakeIdentity(t), newUpstream(t, nil),
		vars{"TARGET_URL": "https://localhost/openai/"})
	refusing, err := url.Parse(newUpstream(t, answerRaw("HTTP/1.1 407 Proxy Authentication "+
		"Required\r\n\r\n")).URL)
	if err != nil {
		t.Fatal(err)
	}
	p.forwarder.transport.Proxy = http.ProxyURL(refusing)
	p.start(t)
	resp, body := p.do(t, "GET /x HTTP/1.1\r\nHost: {host}\r\n\r\n")
	if resp.StatusCode != 502 || !strings.Contains(body, "no answer from localhost by way of "+
		"HTTPS_PROXY: connection failed: HTTPS_PROXY answered 407 Proxy Authentication Required") ||
		!strings.Contains(body, "hint: HTTPS_PROXY") {
		t.Errorf("got %d %s, want 502 that names the proxy", resp.StatusCode, body)
	}
}

// TestParallelRequestsKeepTheirConnections: HTTP/1.1 ones, as many as there are requests at a time.
// The first requests are answered when all have come, so each has a connection of its own by then.
func TestParallelRequestsKeepTheirConnections(t *testing.T) {
	followLog(t)
	const clients = 32
	var dialed, other, arrived atomic.Int64
	allArrived := make(chan struct{})
	upstream := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter,
		r *http.Request) {
		if r.ProtoMajor != 1 {
			other.Add(1)
		}
		if arrived.Add(1) == clients {
			close(allArrived)
		}
		select {
		case <-allArrived:
		case <-r.Context().Done():
		}
	}))
	upstream.EnableHTTP2 = true
	upstream.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			dialed.Add(1)
		}
	}
	upstream.StartTLS()
	t.Cleanup(upstream.Close)
	p := startProxy(t, newFakeIdentity(t), upstream, nil)
	for range 33 {
		var round sync.WaitGroup
		for range clients {
			round.Add(1)
			go func() {
				defer round.Done()
				if resp, err := http.Get(p.url + "/x"); err != nil || resp.StatusCode != 200 {
					t.Errorf("got %v, %v", resp, err)
				} else {
					resp.Body.Close()
				}
			}()
		}
		round.Wait()
	}
	// the one opened at the start may come too late
	if other.Load() > 0 || dialed.Load() > clients+1 {
		t.Errorf("%d requests not of HTTP/1.1, %d connections for %d clients", other.Load(),
			dialed.Load(), clients)
	}
}

// forward.go: copy the answer.

func TestAnswersPassUntouched(t *testing.T) {
	tests := []struct{ name, method, answer, head, body string }{
		{"sized", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Type: a/b\r\n\r\nhello",
			"Content-Length: 5\r\nContent-Type: a/b", "hello"},
		{"chunked", "GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n" +
			"0\r\n\r\n", "Transfer-Encoding: chunked",
			"5\r\nhello\r\n0\r\n\r\n"},
		{"until close", "GET", "HTTP/1.1 200 OK\r\n\r\nhello", "Transfer-Encoding: chunked",
			"5\r\nhello\r\n0\r\n\r\n"},
		{"trailers", "GET", "HTTP/1.1 200 OK\r\nTrailer: X-T\r\n" +
			"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-T: v\r\nX-U: w\r\n\r\n",
			"Transfer-Encoding: chunked", "5\r\nhello\r\n0\r\n\r\n"},
		{"HEAD", "HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "Content-Length: 5", ""},
		{"204", "GET", "HTTP/1.1 204 No Content\r\nX-A: b\r\n\r\n", "X-A: b", ""},
		{"304", "GET", "HTTP/1.1 304 Not Modified\r\nEtag: e\r\n\r\n", "Etag: e", ""},
		{"429", "GET", "HTTP/1.1 429 Too Many Requests\r\nContent-Length: 2\r\n" +
			"Retry-After: 3\r\nRetry-After-Ms: 2999\r\nX-Ratelimit-Remaining-Tokens: 0\r\n\r\n{}",
			"Content-Length: 2\r\nRetry-After: 3\r\nRetry-After-Ms: 2999\r\n" +
				"X-Ratelimit-Remaining-Tokens: 0", "{}"},
		{"529", "GET", "HTTP/1.1 529 status code 529\r\nContent-Length: 0\r\n\r\n",
			"Content-Length: 0", ""},
		{"redirect", "POST", "HTTP/1.1 302 Found\r\nContent-Length: 0\r\n" +
			"Location: https://elsewhere.example/\r\n\r\n",
			"Content-Length: 0\r\nLocation: https://elsewhere.example/", ""},
		{"gzip", "GET", "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n" +
			"\x1f\x8b\x08\x00", "Content-Encoding: gzip\r\nContent-Length: 4",
			"\x1f\x8b\x08\x00"},
		{"hop-by-hop", "GET", "HTTP/1.1 200 OK\r\nConnection: X-Hop, Content-Length\r\n" +
			"X-Hop: h\r\nKeep-Alive: k\r\nProxy-Authenticate: p\r\nContent-Length: 5\r\n" +
			"X-End: e\r\n\r\nhello", "Content-Length: 5\r\nX-End: e", "hello"},
		{"two of a name", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nVary: a\r\n" +
			"Vary: b\r\n\r\n", "Content-Length: 0\r\nVary: a\r\nVary: b",
			""},
		{"about the upstream's host", "GET",
			"HTTP/1.1 200 OK\r\nStrict-Transport-Security: max-age=1\r\n" +
				"Alt-Svc: h3=\":443\"\r\nContent-Length: 0\r\n\r\n", "Content-Length: 0", ""},
		{"Connection that names the length", "HEAD",
			"HTTP/1.1 200 OK\r\nConnection: content-length\r\nContent-Length: 5\r\n\r\n",
			"Content-Length: 5", ""},
		{"Connection that names itself", "GET",
			"HTTP/1.1 200 OK\r\nConnection: connection, content-type\r\n" +
				"Content-Type: a\r\nContent-Length: 0\r\n\r\n", "Content-Length: 0", ""},
		{"event stream", "GET", "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n" +
			"Content-Length: 0\r\n\r\n",
			"Content-Length: 0\r\nContent-Type: text/event-stream\r\nX-Accel-Buffering: no",
			""},
		{"event stream with a choice", "GET",
			"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 0\r\n" +
				"X-Accel-Buffering: yes\r\n\r\n",
			"Content-Length: 0\r\nContent-Type: text/event-stream\r\nX-Accel-Buffering: yes",
			""},
		{"early hints", "GET", "HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 200 OK\r\n" +
			"Content-Length: 0\r\n\r\n", "Content-Length: 0", ""},
		{"100 unasked", "GET", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n" +
			"Content-Length: 0\r\n\r\n", "Content-Length: 0", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			followLog(t)
			upstream := newUpstream(t, answerRaw(strings.Replace(tt.answer, "\r\n\r\n",
				"\r\nDate: now\r\n\r\n", 1)))
			p := startProxy(t, newFakeIdentity(t), upstream, nil)
			_, r := p.dial(t, tt.method+" /x HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
			got, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			// Interim answers stay here.
			answer := tt.answer[max(0, strings.Index(tt.answer, "HTTP/1.1 200")):]
			status, _, _ := strings.Cut(answer, "\r\n")
			want := status + "\r\n" + tt.head + "\r\n\r\n" + tt.body
			tidy := regexp.MustCompile("(?m)^(Connection: close|Date: .*)\r\n")
			if got := tidy.ReplaceAllString(string(got), ""); sorted(got) != sorted(want) {
				t.Errorf("got\n%q, want\n%q", got, want)
			}
		})
	}
}

// sorted has the header lines of a message in order, as their order is free.
func sorted(message string) string {
	head, body, _ := strings.Cut(message, "\r\n\r\n")
	lines := strings.Split(head, "\r\n")
	slices.Sort(lines[1:])
	return strings.Join(lines, "\r\n") + "\r\n\r\n" + body
}

func TestEachEventArrivesBeforeTheNextIsSent(t *testing.T) {
	const events = 5
	heads := []struct{ name, head string }{
		{"chunked", "Transfer-Encoding: chunked\r\n"},
		{"sized", fmt.Sprintf("Content-Length: %d\r\n", events*2)},
		{"until close", ""},
	}
	for _, h := range heads {
		for _, scheme := range []string{"http", "https"} {
			t.Run(h.name+" "+scheme, func(t *testing.T) {
				followLog(t)
				next := make(chan struct{})
				handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					conn, _, err := http.NewResponseController(w).Hijack()
					if err != nil {
						t.Error(err)
						return
					}
					defer conn.Close()
					fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\n%s\r\n", h.head)
					for range events {
						<-next
						if h.name == "chunked" {
							io.WriteString(conn, "2\r\ne\n\r\n")
						} else {
							io.WriteString(conn, "e\n")
						}
					}
					<-next
					if h.name == "chunked" {
						io.WriteString(conn, "0\r\n\r\n")
					}
				})
				upstream := newUpstream(t, handler)
				if scheme == "https" {
					upstream = httptest.NewTLSServer(handler)
					t.Cleanup(upstream.Close)
				}
				p := startProxy(t, newFakeIdentity(t), upstream, nil)
				_, r := p.dial(t, "GET /x HTTP/1.1\r\nHost: {host}\r\n\r\n")
				if h.name == "sized" {
					next <- struct{}{} // its head comes with the first event
				}
				resp, err := http.ReadResponse(r, nil) // the head, before any other body
				if err != nil {
					t.Fatal(err)
				}
				event := make([]byte, 2)
				for i := range events {
					if h.name != "sized" || i > 0 {
						next <- struct{}{}
					}
					if _, err := io.ReadFull(resp.Body, event); err != nil {
						t.Fatal(err)
					}
				}
				next <- struct{}{}
				if rest, err := io.ReadAll(resp.Body); err != nil || len(rest) > 0 {
					t.Errorf("after the events: %q, %v", rest, err)
				}
			})
		}
	}
}

func TestCutAnswerCutsTheClient(t *testing.T) {
	tests := []struct{ name, version, answer string }{
		{"chunked", "1.1", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"},
		{"in a chunk", "1.1", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nhello"},
		{"sized", "1.1", "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello"},
		{"before the body", "1.1", "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			logged := followLog(t)
			p := startProxy(t, newFakeIdentity(t), newUpstream(t, answerRaw(tt.answer)), nil)
			_, r := p.dial(t, "GET /x HTTP/"+tt.version+"\r\nHost: {host}\r\n\r\n")
			resp, err := http.ReadResponse(r, nil)
			if err == nil {
				_, err = io.ReadAll(resp.Body)
			}
			if err == nil {
				t.Error("the client took a part for the whole")
			}
			if !strings.Contains(logged.String(), "answer cut") {
				t.Errorf("not in the log:\n%s", logged)
			}
		})
	}
}

func TestCutAnswerCutsAClientThatIsStillSending(t *testing.T) {
	followLog(t)
	upstream := newUpstream(t, answerRaw("HTTP/1.1 200 OK\r\nTransfer-Encoding: "+
		"chunked\r\n\r\n4\r\npart\r\n"))
	p := startProxy(t, newFakeIdentity(t), upstream, nil)
	for _, framing := range []string{"Content-Length: 100000000\r\n\r\nhello",
		"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
		fmt.Sprintf("Content-Length: %d\r\n\r\n%s", smallBody+9, strings.Repeat("x", smallBody))} {
		_, r := p.dial(t, "POST /x HTTP/1.1\r\nHost: {host}\r\n"+framing)
		framing = framing[:30]
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(resp.Body); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%q: got %v, want the connection cut", framing, err)
		}
	}
}

func TestClientThatLeavesCancelsTheUpstream(t *testing.T) {
	for _, name := range []string{"waiting for the head", "in the body"} {
		t.Run(name, func(t *testing.T) {
			followLog(t)
			called, cancelled := make(chan struct{}), make(chan struct{})
			upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				if name == "in the body" {
					w.(http.Flusher).Flush()
				}
				close(called)
				<-r.Context().Done()
				close(cancelled)
			})
			p := startProxy(t, newFakeIdentity(t), upstream, nil)
			conn, _ := p.dial(t, "POST /x HTTP/1.1\r\nHost: {host}\r\nContent-Length: 2\r\n\r\nhi")
			<-called
			conn.Close()
			<-cancelled
		})
	}
}

// TestClientMayLeaveAStream: some do after the last event, and nothing went wrong then.
func TestClientMayLeaveAStream(t *testing.T) {
	identity := newFakeIdentity(t)
	upstream, _ := heldUpstream(t, identity)
	logged := followLog(t)
	p := startProxy(t, identity, upstream, vars{"HOST": "127.0.0.1"})
	conn, r := p.dial(t, "GET /stream HTTP/1.1\r\nHost: {host}\r\n\r\n")
	if _, err := http.ReadResponse(r, nil); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	for p.forwarder.streams.Load() > 0 {
		runtime.Gosched()
	}
	if strings.Contains(logged.String(), " after ") {
		t.Errorf("got %s, want no second line", logged)
	}
}

// TestStreamedUploadEndsItsConnection: what follows a malformed chunk could else be taken for a
// request, if the answer comes at the same moment.
func TestStreamedUploadEndsItsConnection(t *testing.T) {
	p, _ := startRecorded(t, nil)
	for request, end := range map[string]bool{
		"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n": true,
		"Content-Length: 2\r\n\r\nhi":                            false,
	} {
		resp, _ := p.do(t, "POST /x HTTP/1.1\r\nHost: {host}\r\n"+request)
		if resp.StatusCode != 200 || resp.Close != end {
			t.Errorf("%q: got %d, Connection: close %v; want 200, %v", request, resp.StatusCode,
				resp.Close, end)
		}
	}
}

// TestAnsweredUploadNeverLooksComplete: what the proxy drops after an early
// answer would be missing from it. At the wire that takes a race to see.
func TestAnsweredUploadNeverLooksComplete(t *testing.T) {
	u := &upload{body: strings.NewReader("the rest")}
	u.end(httptest.NewRecorder())
	if n, err := u.Read(make([]byte, 9)); n != 0 || err == nil || err == io.EOF {
		t.Errorf("got %d bytes and %v, want a failure", n, err)
	}

	// While a Read is under way, end waits for it, so that nothing is dropped before
	// what that Read gets.
	waiting := &upload{}
	waiting.body = readerFunc(func([]byte) (int, error) {
		if waiting.mu.TryLock() {
			t.Error("end could read at the same time")
		}
		return 0, io.EOF
	})
	waiting.Read(make([]byte, 9))
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestRestOfABodyIsNoRequest(t *testing.T) {
	logged := followLog(t)
	upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).EnableFullDuplex()
		http.Error(w, "too large", http.StatusRequestEntityTooLarge)
	})
	p := startProxy(t, newFakeIdentity(t), upstream, nil)
	conn, r := p.dial(t, "POST /x HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: "+
		"chunked\r\n\r\n3\r\nabc\r\n")
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != 413 || !resp.Close {
		t.Fatalf("got %+v, %v; want 413 and the connection's end", resp, err)
	}
	io.WriteString(conn, "GET /smuggled HTTP/1.1\r\nHost: "+p.addr+"\r\n\r\n")
	rest, _ := io.ReadAll(r)
	if strings.Contains(string(rest), "HTTP/1.1") || strings.Contains(logged.String(), "smuggled") {
		t.Errorf("the rest of the body was taken for a request: %q\n%s", rest, logged)
	}
}

// TestNothingOutlivesItsRequest mixes streams, aborts, uploads and upgrades, and counts what is
// left.
func TestNothingOutlivesItsRequest(t *testing.T) {
	followLog(t)
	identity := newFakeIdentity(t)
	upstream, _ := heldUpstream(t, identity)
	p := startProxy(t, identity, upstream, nil)
	// With Go 1.22 an upstream is not told of the end of the client's half.
	p.forwarder.endTime = 50 * time.Millisecond

	p.do(t, "GET /readyz HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n") // all has started

	// Those of earlier tests would hide some of this one's.
	http.DefaultClient.CloseIdleConnections()
	before := runtime.NumGoroutine()
	const stream = `{"stream":true}`
	requests := []string{
		"POST /v1/stream HTTP/1.1\r\nHost: {host}\r\nContent-Length: 15\r\n\r\n" + stream,
		"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9999999\r\n\r\n" +
			stream,
		"POST /v1/responses HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\nf\r\n" +
			stream,
		"GET /v1/realtime HTTP/1.1\r\n" + webSocketHead + "\r\n",
		"GET /../x HTTP/1.1\r\nHost: {host}\r\n\r\n",
		"\x16\x03\x01 garbage\r\n\r\n",
	}
	var wg sync.WaitGroup
	for i := range 120 {
		wg.Add(1)
		conn, r := p.dial(t, requests[i%len(requests)])
		go func() {
			defer wg.Done()
			endless := strings.HasPrefix(requests[i%len(requests)], "POST /v1/chat") ||
				strings.HasPrefix(requests[i%len(requests)], "POST /v1/resp") // and so unanswered
			if i/len(requests)%2 == 0 && !endless {
				r.ReadByte()
			}
			conn.Close()
		}()
	}
	wg.Wait()
	deadline := time.Now().Add(safetyNet)
	for p.forwarder.streams.Load() > 0 || runtime.NumGoroutine() > before {
		if time.Now().After(deadline) {
			stacks := make([]byte, 1<<20)
			t.Fatalf("%d requests and %d goroutines, %d before\n%s", p.forwarder.streams.Load(),
				runtime.NumGoroutine(), before, stacks[:runtime.Stack(stacks, true)])
		}
		p.forwarder.transport.CloseIdleConnections()
		runtime.Gosched()
	}
}

// forward.go: the tunnel.

func TestUpgrades(t *testing.T) {
	const accepted = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n" +
		"Upgrade: websocket\r\nSec-Websocket-Accept: a\r\n\r\nfirst frame"
	tests := []struct {
		name, request, answer string
		status                int
		want                  string
	}{
		{"accepted", "GET /x HTTP/1.1\r\n" + webSocketHead + "\r\n", accepted, 101, "first frame"},
		{"refused", "GET /x HTTP/1.1\r\n" + webSocketHead + "\r\n",
			"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 4\r\n\r\nnope", 426, "nope"},
		{"other protocol switched to", "GET /x HTTP/1.1\r\n" + webSocketHead + "\r\n",
			strings.Replace(accepted, "websocket", "h2c", 1), 502,
			"unexpected status 101 Switching Protocols"},
		{"without Connection: Upgrade", "GET /x HTTP/1.1\r\n" + webSocketHead + "\r\n",
			strings.Replace(accepted, "Connection: Upgrade\r\n", "", 1), 502,
			"no answer from 127.0.0.1:"},
		{"h2c asked for", "GET /x HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\n" +
			"Upgrade: h2c\r\n\r\n", strings.Replace(accepted, "websocket", "h2c", 1), 502,
			"unexpected status 101 Switching Protocols"},
		{"not a GET", "POST /x HTTP/1.1\r\n" + webSocketHead + "\r\n", accepted, 502,
			"unexpected status 101 Switching Protocols"},
		{"with a body", "GET /x HTTP/1.1\r\n" + webSocketHead + "Content-Length: 2\r\n\r\nhi",
			accepted, 502, "unexpected status 101 Switching Protocols"},
		{"not in Connection", "GET /x HTTP/1.1\r\n" +
			strings.Replace(webSocketHead, ", Upgrade", "", 1) + "\r\n", accepted, 502,
			"unexpected status 101 Switching Protocols"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			followLog(t)
			p := startProxy(t, newFakeIdentity(t), newUpstream(t, answerRaw(tt.answer)), nil)
			_, r := p.dial(t, tt.request)
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatal(err)
			}
			var body []byte
			if resp.StatusCode == 101 {
				body, err = io.ReadAll(r) // the tunnel's bytes, until the upstream hangs up
			} else {
				body, err = io.ReadAll(resp.Body)
			}
			if err != nil || resp.StatusCode != tt.status ||
				!strings.Contains(string(body), tt.want) {
				t.Errorf("got %d %q %v, want %d %q", resp.StatusCode, body, err, tt.status, tt.want)
			}
		})
	}
}

func TestRealtimeEchoThroughTheTunnel(t *testing.T) {
	for _, scheme := range []string{"http", "https"} {
		t.Run(scheme, func(t *testing.T) {
			followLog(t)
			identity := newFakeIdentity(t)
			upstream := newUpstream(t, fakeAzure(identity, nil))
			if scheme == "https" {
				upstream = httptest.NewTLSServer(fakeAzure(identity, nil))
				t.Cleanup(upstream.Close)
			}
			p := startProxy(t, identity, upstream, vars{"EXPECTED_KEY": "sesame"})
			// The first frame follows the head at once, as some clients send it.
			conn, r := p.dial(t, "GET /realtime?api-key=sesame HTTP/1.1\r\n"+webSocketHead+
				"Sec-WebSocket-Protocol: realtime, "+
				"openai-insecure-api-key.sesame\r\n\r\n\x81\x05hello")
			resp, err := http.ReadResponse(r, nil)
			if err != nil || resp.StatusCode != 101 ||
				resp.Header.Get("Sec-WebSocket-Protocol") != "realtime" ||
				resp.Header.Get("Sec-WebSocket-Accept") != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" {
				t.Fatalf("got %+v, %v", resp, err)
			}
			if _, greeting, err := readFrame(r); err != nil ||
				!strings.Contains(string(greeting), "session.created") {
				t.Fatalf("got %q, %v", greeting, err)
			}
			if _, echo, err := readFrame(r); err != nil || string(echo) != "hello" {
				t.Fatalf("got %q, %v", echo, err)
			}
			writeFrame(conn, 8, nil)
			if opcode, _, err := readFrame(r); err != nil || opcode != 8 {
				t.Fatalf("got opcode %d, %v; want the close frame", opcode, err)
			}
			if _, err := r.ReadByte(); err != io.EOF {
				t.Errorf("got %v, want the connection closed", err)
			}
		})
	}
}

func TestTunnelDeliversAllThatTheUpstreamSent(t *testing.T) {
	followLog(t)
	const size = 8 << 20
	upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: "+
			"Upgrade\r\nUpgrade: websocket\r\n\r\n"+
			strings.Repeat("x", size))
		conn.(*net.TCPConn).CloseWrite()
		io.Copy(io.Discard, conn)
	})
	p := startProxy(t, newFakeIdentity(t), upstream, nil)
	conn, r := p.dial(t, "GET /x HTTP/1.1\r\n"+webSocketHead+"\r\n")
	go func() { // the client goes on sending
		for {
			if _, err := conn.Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
	}()
	if _, err := http.ReadResponse(r, nil); err != nil {
		t.Fatal(err)
	}
	got, _ := io.Copy(io.Discard, r)
	if got != size {
		t.Errorf("got %d bytes, want %d", got, size)
	}
}

// TestTunnelEndsInEachDirectionByItself has one side send its last bytes and shut its sending side,
// and
// the other one answer only then.
func TestTunnelEndsInEachDirectionByItself(t *testing.T) {
	const last, answer = "last bytes of the one", "last bytes of the other"
	answerTo := func(conn net.Conn, r io.Reader) error { // answers when the other has ended
		got, err := io.ReadAll(r)
		if err == nil && string(got) != last {
			err = fmt.Errorf("got %q, want %q", got, last)
		}
		io.WriteString(conn, answer)
		return errors.Join(err, conn.Close())
	}
	ends := func(conn net.Conn, r io.Reader) error { // ends first
		io.WriteString(conn, last)
		conn.(*net.TCPConn).CloseWrite()
		got, err := io.ReadAll(r)
		if err == nil && string(got) != answer {
			err = fmt.Errorf("got %q, want %q", got, answer)
		}
		return err
	}
	type side func(net.Conn, io.Reader) error
	for name, sides := range map[string]struct{ client, upstream side }{
		"client ends first":   {ends, answerTo},
		"upstream ends first": {answerTo, ends},
	} {
		if name == "client ends first" && goversion.Compare(runtime.Version(), "go1.24") < 0 {
			continue // the upstream's connection can only be closed altogether there
		}
		t.Run(name, func(t *testing.T) {
			followLog(t)
			done := make(chan error, 1)
			upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
				conn, buffered, err := http.NewResponseController(w).Hijack()
				if err == nil {
					io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: "+
						"Upgrade\r\n"+
						"Upgrade: websocket\r\n\r\n")
					err = sides.upstream(conn, buffered)
					conn.Close()
				}
				done <- err
			})
			p := startProxy(t, newFakeIdentity(t), upstream, vars{"HOST": "127.0.0.1"})
			for range 20 {
				conn, r := p.dial(t, "GET /x HTTP/1.1\r\n"+webSocketHead+"\r\n")
				if resp, err := http.ReadResponse(r, nil); err != nil || resp.StatusCode != 101 {
					t.Fatalf("got %v, %v", resp, err)
				}
				if err := errors.Join(sides.client(conn, r), <-done); err != nil {
					t.Fatal(err)
				}
				conn.Close()
			}
		})
	}
}

// TestTunnelDoesNotWaitForEver for the end of a side that takes no notice of the other's.
func TestTunnelDoesNotWaitForEver(t *testing.T) {
	for _, silent := range []string{"upstream", "client"} {
		t.Run(silent, func(t *testing.T) {
			followLog(t)
			release := make(chan bool)
			upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
				conn, _, err := http.NewResponseController(w).Hijack()
				if err != nil {
					t.Error(err)
					return
				}
				io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: "+
					"Upgrade\r\nUpgrade: websocket\r\n\r\n")
				if silent == "upstream" {
					<-release
				}
				conn.Close()
			})
			p := newTestProxy(t, newFakeIdentity(t), upstream, vars{"HOST": "127.0.0.1"})
			p.forwarder.endTime = time.Millisecond
			p.start(t)
			conn, r := p.dial(t, "GET /x HTTP/1.1\r\n"+webSocketHead+"\r\n")
			if _, err := http.ReadResponse(r, nil); err != nil {
				t.Fatal(err)
			}
			if silent == "upstream" {
				conn.Close()
			}
			deadline := time.Now().Add(safetyNet)
			for ; p.forwarder.streams.Load() > 0; runtime.Gosched() {
				if time.Now().After(deadline) {
					t.Fatal("the tunnel is still open")
				}
			}
			close(release)
		})
	}
}

// TestTunnelEndsWhenOneSideBreaks, however long the other would go on.
func TestTunnelEndsWhenOneSideBreaks(t *testing.T) {
	followLog(t)
	ended := make(chan error, 1)
	upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			ended <- err
			return
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(safetyNet))
		io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: "+
			"Upgrade\r\nUpgrade: websocket\r\n\r\n")
		for err == nil { // takes no notice of an end in the other direction
			_, err = io.WriteString(conn, "event\n")
		}
		ended <- err
	})
	p := startProxy(t, newFakeIdentity(t), upstream, vars{"HOST": "127.0.0.1"})
	conn, r := p.dial(t, "GET /x HTTP/1.1\r\n"+webSocketHead+"\r\n")
	if _, err := http.ReadResponse(r, nil); err != nil {
		t.Fatal(err)
	}
	conn.(*net.TCPConn).SetLinger(0)
	conn.Close()
	if err := <-ended; errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the tunnel is still open: %v", err)
	}
}

// forward.go: what is logged, and hints.

func TestLogTellsNoSecretsAndCannotBeForged(t *testing.T) {
	logged := followLog(t)
	upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Apim-Request-Id", "id-1")
		writeJSON(w, 404, `{"error":{"code":"DeploymentNotFound"}}`)
	})
	p := startProxy(t, newFakeIdentity(t), upstream, vars{"EXPECTED_KEY": "open sesame"})
	conn, r := p.dial(t, "GET /v1/open%20sesame/\xe2\x80\xa8\xc2\x9b?api-key=open+sesame&API%2D"+
		"key=other1&x=%6fpen%20sesame;authorization=other2 HTTP/1.1\r\n"+
		"Host: {host}\r\napi-key: open sesame\r\nAuthorization: Bearer other3\r\n\r\n")
	if _, err := http.ReadResponse(r, nil); err != nil {
		t.Fatal(err)
	}
	p.do(t, "POST /deployments/gpt-4o?api-version=1 HTTP/1.1\r\nHost: {host}\r\nConnection: "+
		"close\r\napi-key: open sesame\r\n\r\n")
	text := logged.String()
	for _, secret := range []string{"sesame", "other1", "other2", "other3", "token-1",
		"\xe2\x80\xa8", "\xc2\x9b"} {
		if strings.Contains(text, secret) {
			t.Errorf("%q is in the log:\n%s", secret, text)
		}
	}
	arrival := regexp.MustCompile(`(?m)^[0-9/]+ [0-9:]+ POST ` +
		`/deployments/gpt-4o\?api-version=1 from 127\.0\.0\.1:\d+$`)
	problem := regexp.MustCompile(`(?m)POST ` +
		`http://127\.0\.0\.1:\d+/openai/deployments/gpt-4o\?api-version=1 after \d.*: answered ` +
		`404 Not Found: DeploymentNotFound; ` +
		`hint: there is no deployment "gpt-4o" in the resource.*; apim-request-id id-1$`)
	if !arrival.MatchString(text) || !problem.MatchString(text) {
		t.Errorf("got\n%s", text)
	}
	conn.Close()
}

// TestKeyInATargetIsNotLogged, in whatever form of a URL it is.
func TestKeyInATargetIsNotLogged(t *testing.T) {
	for key, forms := range map[string][]string{
		"a+b c": {"/a+b%20c", "/x?k=a%2Bb+c", "/x?k=a%2bb%20c", "/x?y=%zz&k=a%2Bb+c",
			"/a%2bb%20c?k=%zz"},
		"a%b": {"/x?k=a%25b", "/x?k=%61%25%62"},
	} {
		logged := followLog(t)
		p := startProxy(t, newFakeIdentity(t), newUpstream(t, http.NotFound),
			vars{"EXPECTED_KEY": key, "HOST": "127.0.0.1"})
		for _, form := range forms {
			p.do(t, "GET "+form+" HTTP/1.1\r\nHost: {host}\r\napi-key: "+key+"\r\nConnection: "+
				"close\r\n\r\n")
		}
		for _, line := range strings.Split(logged.String(), "\n") {
			if strings.Contains(line, "a+b") || strings.ContainsAny(line, "%") {
				t.Errorf("key %q: %s", key, line)
			}
		}
		if n := strings.Count(logged.String(), " GET "); n < len(forms) {
			t.Errorf("key %q: %d lines of %d requests", key, n, len(forms))
		}
	}
}

// TestWhatTheUpstreamSaysIsSafeInTheLog has it repeat the Authorization it was sent, whole and in
// part, and the client's key, wherever something of an answer is logged or told.
func TestWhatTheUpstreamSaysIsSafeInTheLog(t *testing.T) {
	const key = "open-sesame"
	token := "eyJ0eXAiOiJKV1Qi." + strings.Repeat("t0k3n", 300)
	body := `{"error":{"code":"TOKEN","param":"KEY","message":"TOKEN a prompt KEY"}}`
	tests := []struct{ name, answer, want string }{
		{"reason phrase", "HTTP/1.1 403 TOKEN KEY\r\nContent-Length: 0\r\n\r\n",
			"answered 403 Forbidden"},
		{"Retry-After", "HTTP/1.1 429 No\r\nRetry-After: TOKEN KEY\r\nContent-Length: 0\r\n\r\n",
			"answered 429 Too Many Requests; Retry-After: REDACTED REDACTED; hint: too many"},
		{"request id", "HTTP/1.1 500 No\r\nApim-Request-Id: x TOKEN KEY\r\n" +
			"Content-Length: 0\r\n\r\n",
			"answered 500 Internal Server Error; apim-request-id x REDACTED REDACTED"},
		{"half of the token", "HTTP/1.1 500 No\r\nApim-Request-Id: HALF\r\n" +
			"Content-Length: 0\r\n\r\n",
			"apim-request-id REDACTED"},
		{"at the cut", "HTTP/1.1 500 No\r\nApim-Request-Id: FILLTOKEN\r\nContent-Length: 0\r\n\r\n",
			"x x REDA…"},
		{"rest of the token", "HTTP/1.1 500 No\r\nApim-Request-Id: REST\r\n" +
			"Content-Length: 0\r\n\r\n",
			"apim-request-id REDACTED\n"},
		{"many words", "HTTP/1.1 500 No\r\nApim-Request-Id: " + strings.Repeat("ab ", 999) +
			"\r\nContent-Length: 0\r\n\r\n", "ab ab…\n"},
		{"unknown status", "HTTP/1.1 529 TOKEN\r\nContent-Length: 0\r\n\r\n", ": answered 529\n"},
		{"body", "HTTP/1.1 400 No\r\n\r\n" + body, "answered 400 Bad Request: (param REDACTED)"},
		{"status line", "TOKEN KEY\r\n\r\n", "the answer is not HTTP"},
		{"header line", "HTTP/1.1 200 OK\r\nTOKEN KEY\r\n\r\n", "the answer is not HTTP"},
		{"trailer", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nTOKEN KEY\r\n\r\n",
			"answer cut: the connection ended, or the answer is not HTTP"},
		{"100", "HTTP/1.1 101 TOKEN KEY\r\n\r\n", "unexpected status 101 Switching Protocols"},
		{"long", "HTTP/1.1 429 No\r\nRetry-After: " + strings.Repeat("9", 900_000) +
			"\r\nApim-Request-Id: id\r\nContent-Length: 0\r\n\r\n",
			"Retry-After: REDACTED; hint: too many requests or tokens for the deployment's " +
				"quota; apim-request-id id\n"},
		{"forged", "HTTP/1.1 500 No\r\nApim-Request-Id: a\xe2\x80\xa8b\xc2\x9bc\r\n" +
			"Content-Length: 0\r\n\r\n",
			"apim-request-id a b c\n"},
	}
	fill := strings.NewReplacer("TOKEN", token, "KEY", key, "HALF", token[:len(token)/2],
		"REST", token[len(token)/2:], "FILL", strings.Repeat("x ", maxPiece/2-2))
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			logged := followLog(t)
			identity := newFakeIdentity(t)
			identity.answerWith(func(w http.ResponseWriter, _ *http.Request) {
				fmt.Fprint(w, tokenAnswer(token, time.Hour))
			})
			upstream := newUpstream(t, answerRaw(fill.Replace(tt.answer)))
			p := startProxy(t, identity, upstream, vars{"EXPECTED_KEY": key, "HOST": "127.0.0.1"})
			_, r := p.dial(t, "GET /x HTTP/1.1\r\nHost: {host}\r\nConnection: "+
				"close\r\napi-key: "+key+"\r\n\r\n")
			answer, _ := io.ReadAll(r)
			text := logged.String()
			if !strings.Contains(text, tt.want) {
				t.Errorf("got %s, want %q", text, tt.want)
			}
			if bytes.HasPrefix(answer, []byte("HTTP/1.1 502 ")) {
				text += string(answer)
			}
			for _, never := range []string{"t0k3n", "sesame", "\xe2\x80\xa8"} {
				if strings.Contains(text, never) {
					t.Errorf("%q is told: %s", never, text)
				}
			}
			for _, line := range strings.Split(text, "\n") {
				if len(line) > 2500 {
					t.Errorf("a line of %d bytes", len(line))
				}
			}

			var out bytes.Buffer
			runCheck(vars{"TARGET_URL": upstream.URL, "EXPECTED_KEY": key,
				"AZURE_POD_IDENTITY_AUTHORITY_HOST": identity.URL}, &out)
			if strings.Contains(out.String(), "t0k3n") || strings.Contains(out.String(), "sesame") {
				t.Errorf("-check tells %s", &out)
			}
		})
	}
}

// TestWhatTheClientSaysIsBoundedInTheLog: a line has some hundred bytes of it.
func TestWhatTheClientSaysIsBoundedInTheLog(t *testing.T) {
	logged := followLog(t)
	p := startProxy(t, newFakeIdentity(t), newUpstream(t, http.NotFound), nil)
	long := strings.Repeat("A", 20_000)
	for _, line := range []string{"GET /" + long, "GET /x?" + long, long + " /x", "GET /x?" + long +
		"%zz",
		"GET /" + strings.Repeat("%e2%80%a8", 2000)} {
		resp, _ := p.do(t, line+" HTTP/1.1\r\nHost: {host}\r\n\r\n")
		if resp.StatusCode != 404 {
			t.Errorf("%.9s: got %d", line, resp.StatusCode)
		}
	}
	for _, line := range strings.Split(logged.String(), "\n") {
		if len(line) > 1500 {
			t.Errorf("a line of %d bytes: %.99s", len(line), line)
		}
	}
}

// TestReasonOfARefusalIsLogged: its code and parameter, never its message.
func TestReasonOfARefusalIsLogged(t *testing.T) {
	tests := []struct{ name, body, want string }{
		{"Azure OpenAI", `{"error":{"message":"LEAK","type":"LEAK","param":"max_tokens","code":` +
			`"unsupported_parameter"}}`,
			"unsupported_parameter (param max_tokens)"},
		{"Claude", `{"type":"error","error":{"type":"not_found_error","message":"LEAK"}}`,
			"not_found_error"},
		{"an index", `{"error":{"code":"a","param":"messages[0].content"}}`,
			"a (param messages[0].content)"},
		{"parameter alone", `{"error":{"param":"n"}}`, "(param n)"},
		{"null", `{"error":{"code":null,"type":null,"param":null}}`, ""},
		{"number", `{"error":{"code":400,"param":1}}`, ""},
		{"words", `{"error":{"code":"LEAK is no code","param":"LEAK\n"}}`, ""},
		{"not ASCII", `{"error":{"code":"LEAK\u202e"}}`, ""},
		{"too long", `{"error":{"code":"` + strings.Repeat("LEAK", 17) + `"}}`, ""},
		{"object", `{"error":{"code":{"LEAK":1},"param":["LEAK"]}}`, ""},
		{"error of text", `{"error":"LEAK"}`, ""},
		{"message alone", `{"statusCode":401,"message":"LEAK"}`, ""},
		{"array", `["LEAK"]`, ""},
		{"not JSON", `LEAK`, ""},
		{"cut", `{"error":{"code":"LEAK"`, ""},
		{"status", `{"error":{"code":"418"}}`, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			logged := followLog(t)
			upstream := newUpstream(t, func(w http.ResponseWriter,
				r *http.Request) {
				writeJSON(w, 418, tt.body)
			})
			p := startProxy(t, newFakeIdentity(t), upstream, nil)
			p.do(t, "GET /x HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
			want := ": answered 418 I'm a teapot\n"
			if tt.want != "" {
				want = ": answered 418 I'm a teapot: " + tt.want + "\n"
			}
			if text := logged.String(); !strings.Contains(text, want) ||
				strings.Contains(text, "LEAK") {
				t.Errorf("got %s, want %q", text, want)
			}
		})
	}
}

func TestUpstreamHints(t *testing.T) {
	f := &forwarder{secrets: &secrets{}}
	const jwt = "e30.eyJhdWQiOiJodHRwczovL2EuZXhhbXBsZSIsIm9pZCI6IjEyMyJ9.sig"
	tests := []struct {
		status       int
		answer, want string
	}{
		{401, `{"error":{"code":"PermissionDenied","message":"The principal lacks the required ` +
			`data action"}}`, "object id 123 lacks the role Cognitive Services OpenAI User"},
		{401, `{"error":{"message":"Access token is missing, invalid, audience is incorrect"}}`,
			"the token is for https://a.example, the wrong audience"},
		{403, `{"error":{"message":"Access denied due to Virtual Network/Firewall rules."}}`,
			"network rules refuse this host"},
		{404, `{"error":{"code":"DeploymentNotFound"}}`,
			"there is no deployment of this name in the resource"},
		{404, `{"error":{"code":"404","message":"Resource not found"}}`, "no such path"},
		{400, `Please provide a custom subdomain for token authentication`,
			"a regional endpoint takes no tokens"},
		{429, ``, "Retry-After: 7"},
	}
	for _, tt := range tests {
		resp := &http.Response{StatusCode: tt.status, Status: strconv.Itoa(tt.status),
			Header: http.Header{}}
		if tt.status == 429 {
			resp.Header.Set("Retry-After", "7")
		}
		req := &http.Request{URL: &url.URL{Opaque: "/openai/v1/models"}}
		text, hint, _ := f.explain(req, resp, []byte(tt.answer), "http://localhost",
			token{authorization: "Bearer " + jwt})
		if got := withHint(text, hint); !strings.Contains(got, tt.want) {
			t.Errorf("%d %s: got %q, want %q in it", tt.status, tt.answer, got, tt.want)
		}
	}
}

// TestMistakesInAPathAreNamed: a client says only that something is not found.
func TestMistakesInAPathAreNamed(t *testing.T) {
	const openAI, claude, both = "/openai/", "/anthropic/", "/openai/ {URL}/anthropic/"
	const lacksV1, addsIt = "the client's base URL lacks /v1: give it http://{host}/v1",
		"the client adds this itself: leave /v1 out of its base URL, as in http://{host}"
	tests := []struct{ name, base, target, want string }{
		{"chat without v1", openAI, "/chat/completions", lacksV1},
		{"Responses without v1", openAI, "/openai/responses", lacksV1},
		{"embeddings without v1", both, "/embeddings", lacksV1},
		{"classic Responses", openAI, "/responses?api-version=2025-04-01-preview",
			"there is no such path"},
		{"deployment without a version", openAI, "/deployments/d/chat/completions",
			"the query lacks api-version"},
		{"deployment with another parameter", openAI,
			"/openai/deployments/d/embeddings?a=api-version", "the query lacks api-version"},
		{"deployment with a version", openAI, "/deployments/d/x?api-version=2024-10-21",
			"there is no such path"},
		{"v1 twice", openAI, "/v1/v1/responses", addsIt},
		{"v1 before openai", openAI, "/v1/openai/deployments/d/x?api-version=2024-10-21", addsIt},
		{"v1 before deployments", openAI, "/v1/deployments/d/x?api-version=2024-10-21", addsIt},
		{"v1 of TARGET_URL before deployments", "/openai/v1/", "/deployments/d/x?api-version=1",
			addsIt + ", and out of TARGET_URL"},
		{"v1 twice, and in TARGET_URL", "/openai/v1/", "/v1/v1/models", addsIt},
		{"Claude at GPT's", openAI, "/v1/messages?beta=true",
			"Claude needs a TARGET_URL that ends in /anthropic/"},
		{"Claude's tokens counted at GPT's", both, "/v1/messages/count_tokens",
			"Claude's base URL is http://{host}/anthropic"},
		{"Claude, v1 twice", claude, "/v1/v1/messages", addsIt},
		{"Claude without v1", claude, "/messages", lacksV1},
		{"Claude without v1, second", both, "/anthropic/messages",
			"lacks /v1: give it http://{host}/anthropic/v1"},
		{"GPT at Claude's", claude, "/v1/chat/completions", "GPT needs a TARGET_URL that ends in"},
		{"GPT at Claude's, with its own path", claude, "/openai/v1/chat/completions",
			"GPT needs a TARGET_URL that ends in /openai/"},
		{"GPT at Claude's, which is first", "/anthropic/ {URL}/openai/", "/v1/chat/completions",
			"GPT's base URL is http://{host}/openai/v1"},
		{"GPT at Claude's, which is second", both, "/anthropic/v1/responses",
			"GPT's base URL is http://{host}/v1"},
		{"deployment at Claude's", claude, "/deployments/d/chat/completions",
			"there is no such path"},
		{"Claude at GPT's, with its own path", openAI, "/anthropic/v1/messages",
			"Claude needs a TARGET_URL that ends in /anthropic/"},
		{"Claude below GPT", both, "/openai/anthropic/v1/messages",
			"Claude's base URL is http://{host}/anthropic"},
		{"Claude's telemetry", both, "/anthropic/api/event_logging/batch", "there is no such path"},
		{"Claude's root", both, "/anthropic", "there is no such path"},
		{"GPT's root", openAI, "/openai", "there is no such path"},
		{"openai twice", openAI, "/openai/openai/v1/responses", "there is no such path"},
		{"another API", openAI, "/v1beta/models/x:generateContent", "there is no such path"},
		{"target without a path before Claude's", "/ {URL}/anthropic/", "/anthropic/v1/v1/messages",
			"leave /v1 out of its base URL, as in http://{host}/anthropic"},
		{"no mistake", openAI, "/v1/files/none", "there is no such path"},
		{"v1 alone", openAI, "/v1", "there is no such path"},
		{"TARGET_URL without a path", "/", "/openai/chat/completions", "there is no such path"},
		{"path of a gateway", "/gateway/", "/chat/completions", "there is no such path"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			logged := followLog(t)
			upstream := newUpstream(t, refuse(404, "", `{"error":{"code":"404"}}`))
			p := startProxy(t, newFakeIdentity(t), upstream, vars{
				"TARGET_URL": upstream.URL + strings.ReplaceAll(tt.base, "{URL}", upstream.URL)})
			p.do(t, "POST "+tt.target+" HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n"+
				"Connection: close\r\n\r\n")
			logged.waitFor(t, strings.ReplaceAll(tt.want, "{host}", p.addr))
		})
	}
}

// TestRefusalIsExplainedToTheEnd, even if the client has left before the log is written.
func TestRefusalIsExplainedToTheEnd(t *testing.T) {
	logged := followLog(t)
	ctx, leave := context.WithCancel(context.Background())
	leave()
	r := httptest.NewRequest("POST", "/x", nil).WithContext(ctx)
	req := &http.Request{Method: "POST", URL: &url.URL{Scheme: "https", Host: "h", Opaque: "/x"}}
	f := &forwarder{secrets: &secrets{}}
	f.logProblem(r, req, &http.Response{StatusCode: 403}, time.Now(), "answered 403")
	f.logProblem(r, req, nil, time.Now(), "no answer")
	text := logged.String()
	if !strings.Contains(text, ": answered 403\n") || strings.Contains(text, "no answer") {
		t.Errorf("got %s", text)
	}
}

// TestMissingDeploymentIsNamed, from the path or the body, of which nothing else is logged.
func TestMissingDeploymentIsNamed(t *testing.T) {
	long := strings.Repeat("m", 65)
	tests := []struct{ name, target, body, want string }{
		{"model", "/v1/responses", `{"input":"LEAK","model":"gpt-5.1","a":{"model":"LEAK"}}`,
			`no deployment "gpt-5.1" in`},
		{"path", "/deployments/my%20gpt/chat/completions?api-version=2024-10-21",
			`{"model":"LEAK"}`, `no deployment "my gpt" in`},
		{"64 characters", "/v1/responses", `{"model":"` + long[1:] + `"}`,
			`no deployment "` + long[1:] + `" in`},
		{"65 characters", "/v1/responses", `{"model":"` + long + `"}`,
			"no deployment of this name in"},
		{"forged", "/v1/responses", `{"model":"LEAK\n2026/01/01"}`,
			"no deployment of this name in"},
		{"not ASCII", "/v1/responses", `{"model":"LEAK\u202e"}`, "no deployment of this name in"},
		{"quotes", "/v1/responses", `{"model":"a\"; hint: b"}`, `no deployment "a\"; hint: b" in`},
		{"the key", "/v1/responses", `{"model":"s3cret-\"of\\the-clients"}`,
			`no deployment "REDACTED" in`},
		{"the key in a path",
			"/deployments/s3cret-%22of%5Cthe-clients/x?api-version=2024-10-21", "",
			`no deployment "REDACTED" in`},
		{"in capitals", "/v1/responses", `{"MODEL":"LEAK"}`, "no deployment of this name in"},
		{"model of another provider", "/v1/responses", `{"model":"openai/gpt-5"}`,
			`no deployment "openai/gpt-5" in`},
		{"number", "/v1/responses", `{"model":5,"b":"LEAK"}`, "no deployment of this name in"},
		{"not JSON", "/v1/responses", `model=LEAK`, "no deployment of this name in"},
		{"cut JSON", "/v1/responses", `{"model":"LEAK"`, "no deployment of this name in"},
		{"JSON and more", "/v1/responses", `{"model":"LEAK"} {}`, "no deployment of this name in"},
		{"no body", "/v1/responses", ``, "no deployment of this name in"},
		{"longer than 256 KiB", "/v1/responses",
			`{"model":"LEAK","input":"` + strings.Repeat("x", 256<<10) + `"}`,
			"no deployment of this name in"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			logged := followLog(t)
			upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				writeJSON(w, 404, `{"error":{"code":"DeploymentNotFound","message":"LEAK"}}`)
			})
			p := startProxy(t, newFakeIdentity(t), upstream,
				vars{"EXPECTED_KEY": `s3cret-"of\the-clients`})
			p.do(t, fmt.Sprintf("POST %s HTTP/1.1\r\nHost: {host}\r\nContent-Length: %d\r\n"+
				"api-key: s3cret-\"of\\the-clients\r\nConnection: close\r\n\r\n%s",
				tt.target, len(tt.body), tt.body))
			logged.waitFor(t, tt.want)
			if text := logged.String(); strings.Contains(text, "LEAK") ||
				strings.Contains(text, "s3cret") {
				t.Errorf("the log has more of the body:\n%s", text)
			}
		})
	}
}

// TestDebugTellsOfEveryAnswer, once, and without a body.
func TestDebugTellsOfEveryAnswer(t *testing.T) {
	const body = `{"LEAK":1}`
	long := strings.Repeat("L", 300<<10)
	tests := []struct{ name, request, want string }{
		{"answer", "POST /v1/x?api-key=LEAK HTTP/1.1\r\nHost: {host}\r\n" +
			"Content-Length: 10\r\n\r\n" + body,
			`debug: POST /v1/x\?: answer 200 OK, first byte after \d.*s, end after \d.*s, ` +
				`10 bytes up, 4 down, apim-request-id id-1$`},
		{"streamed upload", "POST /v1/x HTTP/1.1\r\nHost: {host}\r\n" +
			"Content-Length: 307200\r\n\r\n" + long,
			`: answer 200 OK, .*, 307200 bytes up, 4 down,`},
		{"refusal", "GET /v1/refused HTTP/1.1\r\nHost: {host}\r\n\r\n",
			`debug: GET /v1/refused: answer 418 I'm a teapot, .*, 0 bytes up, 6 down, ` +
				`apim-request-id none$`},
		{"tunnel", "GET /v1/realtime HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\n" +
			"Upgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
			`debug: GET /v1/realtime: tunnel 101 Switching Protocols, .*, 3 bytes up, 5 down, `},
		{"cut answer", "GET /v1/cut HTTP/1.1\r\nHost: {host}\r\n\r\n",
			`debug: GET /v1/cut: part of an answer 200 OK, .*, 0 bytes up, 4 down, `},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			logged := followLog(t)
			upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				switch {
				case strings.HasSuffix(r.URL.Path, "/refused"):
					writeJSON(w, 418, `"LEAK"`)
				case strings.HasSuffix(r.URL.Path, "/cut"):
					w.Header().Set("Content-Length", "5")
					io.WriteString(w, "LEAK")
				case r.Header.Get("Upgrade") != "":
					conn, _, err := http.NewResponseController(w).Hijack()
					if err != nil {
						t.Error(err)
						return
					}
					defer conn.Close()
					io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\n"+
						"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\nLEAK!")
					io.ReadFull(conn, make([]byte, 3))
				default:
					w.Header().Set("Apim-Request-Id", "id-1")
					io.WriteString(w, "LEAK")
				}
			})
			p := startProxy(t, newFakeIdentity(t), upstream, vars{"AZURE_LOG_LEVEL": "debug"})
			conn, r := p.dial(t, tt.request)
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatal(err)
			}
			if tt.name == "tunnel" {
				io.WriteString(conn, "abc")
				conn.(*net.TCPConn).CloseWrite()
				io.ReadAll(r)
			} else {
				io.ReadAll(resp.Body)
			}
			line, _ := logged.waitFor(t, "bytes up")
			if !regexp.MustCompile(tt.want).MatchString(line) {
				t.Errorf("got %q, want %q", line, tt.want)
			}
			if text := logged.String(); strings.Contains(text, "LEAK") ||
				strings.Count(text, "bytes up") != 1 {
				t.Errorf("a body is in the log, or several lines:\n%s", text)
			}
		})
	}
}

// TestRefusalsAreExplainedThoughCompressed, as the client asked for that.
func TestRefusalsAreExplainedThoughCompressed(t *testing.T) {
	const audience = `{"error":{"code":"401","message":"Access token is missing, invalid, ` +
		`audience is incorrect"}}`
	pack := func(newWriter func(io.Writer) io.WriteCloser, text string) string {
		var packed bytes.Buffer
		w := newWriter(&packed)
		io.WriteString(w, text)
		w.Close()
		return packed.String()
	}
	gzipped := func(text string) string {
		return pack(func(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) }, text)
	}
	deflated := pack(func(w io.Writer) io.WriteCloser { return zlib.NewWriter(w) }, audience)
	bomb := gzipped(strings.Repeat(" ", 1<<20))
	if plain, _ := unpacked([]byte(bomb), "gzip"); len(plain) != maxBeginning {
		t.Errorf("%d bytes unpacked, want %d at most", len(plain), maxBeginning)
	}
	const wrong, role = "the wrong audience", "lacks the role"
	tests := []struct {
		name, encoding, body string
		status               int
		want, not            string
	}{
		{"gzip", "gzip", gzipped(audience), 401, wrong, role},
		{"gzip in capitals", "GZIP", gzipped(audience), 401, wrong, role},
		{"x-gzip", "x-gzip", gzipped(audience), 401, wrong, role},
		{"deflate", "deflate", deflated, 401, wrong, role},
		{"deflate, bare", "deflate", pack(func(w io.Writer) io.WriteCloser {
			bare, _ := flate.NewWriter(w, flate.DefaultCompression)
			return bare
		}, audience), 401, wrong, role},
		{"identity", "identity", audience, 401, wrong, role},
		{"gzip, its beginning", "gzip", gzipped(audience + random(99_000)), 401, wrong, role},
		{"code", "gzip", gzipped(`{"error":{"code":"unsupported_parameter","param":"max_tokens"}}`),
			400,
			"answered 400 Bad Request: unsupported_parameter (param max_tokens)\n", "hint"},
		{"brotli", "br", "\x0b\x02\x80", 401, "compressed in a way that cannot be read here", role},
		{"two encodings", "gzip, br", gzipped(audience), 401,
			"compressed in a way that cannot be read here", role},
		{"not gzip", "gzip", audience, 401, "compressed in a way that cannot be read here", role},
		{"empty gzip", "gzip", "", 401, role, "compressed"},
		{"brotli, a 404", "br", "\x0b\x02\x80", 404, "compressed in a way", "no such path"},
		{"brotli, a 429", "br", "\x0b\x02\x80", 429, "too many requests", role},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			logged := followLog(t)
			upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Encoding", tt.encoding)
				w.WriteHeader(tt.status)
				io.WriteString(w, tt.body)
			})
			p := startProxy(t, newFakeIdentity(t), upstream, nil)
			_, body := p.do(t, "GET /x HTTP/1.1\r\nHost: {host}\r\nAccept-Encoding: "+
				""+tt.encoding+"\r\n"+
				"Connection: close\r\n\r\n")
			text := logged.String()
			if body != tt.body || !strings.Contains(text, tt.want) ||
				strings.Contains(text, tt.not) {
				t.Errorf("got %d bytes and %s, want %d bytes and %q", len(body), text, len(tt.body),
					tt.want)
			}
		})
	}
}

// random is text that does not compress well.
func random(size int) string {
	text := make([]byte, size)
	source := rand.New(rand.NewSource(1))
	for i := range text {
		text[i] = letters[source.Intn(len(letters))]
	}
	return string(text)
}

// Fuzz targets.

// FuzzDotEnv: what is read of a setting is in the file, and is read again from what it is written
// as;
// an error depends on nothing but the number of a line.
func FuzzDotEnv(f *testing.F) {
	for _, seed := range []string{"", "PORT=1\nexport HOST='2' # two\r\n", "\ufeffPORT=\"1\"",
		"PORT='",
		"x", "PORT=\x00", "=\n#", "export\tEXPECTED_KEY=k", "HTTPS_PROXY=p\nSSL_CERT_FILE"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		got, err := parseDotEnv(text)
		if err != nil {
			number, rest, _ := strings.Cut(strings.TrimPrefix(err.Error(), "line "), ":")
			n, _ := strconv.Atoi(number)
			inLine := n >= 1 && n <= 1+strings.Count(text, "\n") &&
				rest == ` want NAME=value or NAME="value"`
			if !inLine && !strings.HasPrefix(err.Error(), "is not UTF-8 text; ") {
				t.Fatalf("%q: error %v", text, err)
			}
			return
		}
		for name, value := range got {
			if !isKnown(name) || strings.ContainsAny(value, "\n\x00") ||
				!strings.Contains(text, value) {
				t.Fatalf("%q: got %q=%q", text, name, value)
			}
			quote := `"`
			if strings.Contains(value, quote) {
				quote = "'"
			}
			if strings.Contains(value, quote) {
				continue // cannot be written
			}
			again, err := parseDotEnv("export " + name + " = " + quote + value + quote + " # " +
				value)
			if err != nil || again[name] != value {
				t.Fatalf("%q: %s was %q, then %q, %v", text, name, value, again[name], err)
			}
		}
	})
}

func FuzzPath(f *testing.F) {
	for _, target := range []string{"/openai/v1", "//elsewhere/", "/..%2f", "/%252e%252e/x",
		"/a\\..\\b", "/x?api-key=K&a", "/%2e", "/openai/openai", "/anthropic/v1",
		"/v1/anthropic/x", "//anthropic//"} {
		f.Add(target)
	}
	f.Fuzz(func(t *testing.T, target string) {
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader("GET " + target +
			" HTTP/1.1\r\nHost: localhost\r\n\r\n")))
		if err != nil {
			return
		}
		for _, base := range []string{"https://a.example/openai/", "https://a.example/",
			"https://a.example/openai/ https://a.example/v1/anthropic/"} {
			parsed, err := parseTargets(base)
			if err != nil {
				t.Fatal(err)
			}
			forward := &forwarder{targets: parsed}
			if forward.checkCaller(r, false) != nil {
				continue
			}
			req, _, err := forward.upstreamRequest(httptest.NewRecorder(), r, false)
			if err != nil {
				t.Fatal(err)
			}
			line := req.URL.RequestURI()
			isBelow := func(u *url.URL) bool { return strings.HasPrefix(line, u.Path) }
			if req.URL.Host != "a.example" || !slices.ContainsFunc(parsed, isBelow) ||
				strings.HasPrefix(line, "//") {
				t.Errorf("%q leaves %s: %q", target, base, line)
			}
			path, query, _ := strings.Cut(line, "?")
			for range 5 {
				for _, segment := range strings.FieldsFunc(path,
					func(r rune) bool { return r == '/' || r == '\\' }) {
					if segment == ".." || segment == "." {
						t.Errorf("%q climbs: %q", target, line)
					}
				}
				if decoded, err := url.PathUnescape(path); err == nil {
					path = decoded
				}
			}
			if values, _ := url.ParseQuery(query); values.Has("api-key") {
				t.Errorf("%q keeps its key: %q", target, line)
			}
		}
	})
}

func FuzzRequestHeader(f *testing.F) {
	f.Add("Cookie", "c", "close")
	f.Add("OpenAI-Api-Key", "k", "close")
	f.Add("OpenAI-0Api-Key", "k", "close")
	f.Add("X-MS-TOKEN-AAD-ID-TOKEN", "t", "x-ms-client-request-id")
	f.Add("Sec-WebSocket-Protocol", "a,OpenAI-insecure-api-key.K, b", "upgrade")
	f.Add("Sec-WebSocket-Protocol", "a, \"openai-insecure-api-key.K\"", "upgrade")
	f.Fuzz(func(t *testing.T, name, value, connection string) {
		head := "GET / HTTP/1.1\r\nHost: h\r\n" + name + ": " + value + "\r\nConnection: " +
			connection + "\r\n\r\n"
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(head)))
		if err != nil {
			return
		}
		for _, upgrade := range []bool{false, true} {
			for name, values := range upstreamHeader(r.Header, upgrade) {
				lower := strings.ToLower(name)
				if strings.Contains(lower, "api-key") || strings.Contains(lower, "cookie") ||
					lower == "authorization" ||
					strings.HasPrefix(lower, "x-ms-token-") ||
					strings.HasPrefix(lower, "x-ms-client-principal") ||
					strings.HasPrefix(lower, "x-forwarded-") || lower == "transfer-encoding" ||
					lower == "content-length" ||
					strings.Contains(strings.ToLower(strings.Join(values, ",")),
						"openai-insecure-api-key.") && lower == "sec-websocket-protocol" {
					t.Errorf("%s: %q went upstream", name, values)
				}
			}
		}
	})
}
