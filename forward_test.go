package main

// The tests of main.go and forward.go: first helpers and fakes, then main.go
// (settings, start, routes, stop, -check), then forward.go in the order of
// ServeHTTP's paragraphs, and last the fuzz targets. The fake identity endpoint
// is in imds_test.go.

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	goversion "go/version"
	"io"
	"log"
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
	grown chan struct{} // closed and replaced with each line
}

// followLog has the log of the test go to a testLog, through the program's writer.
func followLog(t testing.TB) *testLog {
	l := &testLog{grown: make(chan struct{})}
	logger.SetOutput(lineWriter{l})
	t.Cleanup(func() { logger.SetOutput(lineWriter{os.Stderr}) })
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

// waitFor returns the first line from here on that contains text, and the lines before it.
func (l *testLog) waitFor(t testing.TB, text string) (line string, before []string) {
	t.Helper()
	timeout := time.After(safetyNet)
	for {
		l.mu.Lock()
		line, _, ok := strings.Cut(l.text.String()[l.seen:], "\n")
		if ok {
			l.seen += len(line) + 1
		}
		grown := l.grown
		l.mu.Unlock()
		switch {
		case ok && strings.Contains(line, text):
			return line, before
		case ok:
			before = append(before, line)
		default:
			select {
			case <-grown:
			case <-timeout:
				t.Fatalf("no %q in the log: %q", text, before)
			}
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
		if err == nil || len(listenHosts(p.cfg.host)) == 1 {
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
	stderr *testLog
	pipe   io.Closer
	ended  chan struct{} // closed when stderr has ended
}

// startProgram starts aoai-proxy with no environment but env, for no longer than limit. In its
// directory is a .env, of which nothing is to be read.
func startProgram(t testing.TB, limit time.Duration, env vars, args ...string) *program {
	t.Helper()
	executable, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	p := &program{Cmd: exec.CommandContext(ctx, executable, args...),
		stderr: &testLog{grown: make(chan struct{})}, ended: make(chan struct{})}
	p.Dir = t.TempDir()
	writeFile(t, filepath.Join(p.Dir, ".env"), "TARGET_URL=https://b.example/\nEXPECTED_KEY=k\n"+
		"PORT=1\nHTTPS_PROXY="+nobody+"\n")
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
		close(p.ended)
	}()
	t.Cleanup(func() {
		cancel()
		p.end()
	})
	return p
}

// end waits until the process ends, and returns its exit status and its stderr.
func (p *program) end() (status int, stderr string) {
	<-p.ended
	p.Wait()
	return p.ProcessState.ExitCode(), p.stderr.String()
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

// last returns the request target of the last request that the upstream got.
func (u *recorder) last() string {
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.seen) == 0 {
		return "nothing"
	}
	return u.seen[len(u.seen)-1].RequestURI
}

// count returns how many requests the upstream got.
func (u *recorder) count() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return len(u.seen)
}

// startRecorded starts a proxy in front of a recorder, whose address is URL in a TARGET_URL.
func startRecorded(t *testing.T, env vars) (*testProxy, *recorder) {
	t.Helper()
	followLog(t)
	u := &recorder{}
	s := newUpstream(t, u.ServeHTTP)
	if target, ok := env["TARGET_URL"]; ok {
		env["TARGET_URL"] = strings.ReplaceAll(target, "URL", s.URL)
	}
	return startProxy(t, newFakeIdentity(t), s, env), u
}

// heldUpstream accepts the tokens of identity and nothing else. It has a stream of two events, the
// second of which release lets go, and tunnels that echo up to a dot. Anything else it answers with {}.
func heldUpstream(t testing.TB, identity *fakeIdentity) (
	upstream *httptest.Server, release chan struct{}) {
	t.Helper()
	release = make(chan struct{})
	return newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		switch {
		case !identity.gave(r.Header.Get("Authorization")) || r.Header.Get("Api-Key") != "":
			writeJSON(w, 401, `{"error":{"code":"401"}}`)
		case r.Header.Get("Upgrade") != "":
			conn, buffered := acceptTunnel(t, w)
			defer conn.Close()
			for b, err := buffered.ReadByte(); err == nil && b != '.'; b, err = buffered.ReadByte() {
				conn.Write([]byte{b})
			}
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
	}), release
}

// acceptTunnel is what an upstream does to become one end of a tunnel.
func acceptTunnel(t testing.TB, w http.ResponseWriter) (net.Conn, *bufio.Reader) {
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(conn, switching+"\r\n")
	return conn, buffered.Reader
}

const switching = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"

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

// openTunnel opens a tunnel through the proxy and returns an echo.
func openTunnel(t testing.TB, addr string) (conn net.Conn, echo func() error) {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(safetyNet))
	io.WriteString(conn, strings.ReplaceAll(upgrade, "{host}", addr)+"\r\n")
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != 101 {
		t.Fatalf("upgrade: %v, %v", resp, err)
	}
	return conn, func() error {
		io.WriteString(conn, "hello")
		got := make([]byte, 5)
		_, err := io.ReadFull(r, got)
		if err == nil && string(got) != "hello" {
			err = fmt.Errorf("echo of hello: %q", got)
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

const (
	webSocketHead = "Host: {host}\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n" +
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
	upgrade = "GET /v1/realtime HTTP/1.1\r\n" + webSocketHead
)

func writeJSON(w http.ResponseWriter, status int, body string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	io.WriteString(w, body)
}

// zeros has no end.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// main.go: the settings and the start.

func TestSettings(t *testing.T) {
	const azure = "https://cognitiveservices.azure"
	tests := []struct{ name, variable, value, want string }{
		{"defaults", "", "", "https://b.example/openai/ root=/ host= port=8081 key= scope=" +
			azure + ".com/.default debug=false delay=0s"},
		{"empty is unset", "PORT", "", "port=8081 "},
		{"white space trimmed", "EXPECTED_KEY", "\tk\n", "key=k "},
		{"white space around the target", "TARGET_URL", " https://b.example/openai/ \n",
			"https://b.example/openai/ "},
		{"missing slash supplied", "TARGET_URL", "https://b.example/openai", "/openai/ root=/ "},
		{"v1 in the target", "TARGET_URL", "https://b.example/openai/v1", "/openai/v1/ root=/ "},
		{"Claude", "TARGET_URL", "https://b.example/anthropic/", "/anthropic/ root=/ "},
		{"no path", "TARGET_URL", "https://b.example", "https://b.example/openai/ root=/ "},
		{"path of a gateway", "TARGET_URL", "https://b.example/gw/openai/", "root=/gw/ "},
		{"gateway without an API", "TARGET_URL", "https://b.example/v1/", "/v1/ root= "},
		{"name that ends like an API", "TARGET_URL", "https://b.example/xopenai/", "root= "},
		{"Foundry's models", "TARGET_URL", "https://b.example/models/", "/models/ root= "},
		{"escapes kept", "TARGET_URL", "https://b.example/a%2Fb/openai", "root=/a%2Fb/ "},
		{"slashes before the path", "TARGET_URL", "https://b.example//a/openai", "root=/a/ "},
		{"US Government", "TARGET_URL", "https://a.openai.azure.us/openai/", azure + ".us/.default "},
		{"China, in capitals", "TARGET_URL", "https://A.OPENAI.AZURE.CN:443/openai/",
			azure + ".cn/.default "},
		{"US Government, final dot", "TARGET_URL", "https://a.azure.us./openai/",
			azure + ".us/.default "},
		{"azure.us elsewhere in the host", "TARGET_URL", "https://azure.us.example/openai/",
			azure + ".com/.default "},
		{"project", "TARGET_URL", "https://b.example/api/projects/p/openai/v1",
			"scope=https://ai.azure.com/.default "},
		{"scope set", "AZURE_OPENAI_SCOPE", "api://x/.default", "scope=api://x/.default "},
		{"http for localhost", "TARGET_URL", "http://LOCALHOST.:1/openai", ":1/openai/ "},
		{"http for ::1", "TARGET_URL", "http://[::1]:1/openai", "http://[::1]:1/openai/ "},
		{"brackets around HOST", "HOST", "[::1]", "host=::1 "},
		{"any port", "PORT", " 0", "port=0 "},
		{"delay of the drain", "DRAIN_DELAY", "1m30s", "delay=1m30s"},
		{"proxy", "HTTPS_PROXY", "http://jane:Ses%25ame@127.0.0.1:3128", "port=8081"},
		{"proxy without scheme", "HTTPS_PROXY", "proxy.example:3128", "port=8081"},
		{"proxy, lower case", "https_proxy", "socks5h://127.0.0.1", "port=8081"},
		{"HTTP_PROXY, which is not used", "HTTP_PROXY", "http://jane:Ses%ame@h", "port=8081"},
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
		got := fmt.Sprintf("%s root=%s host=%s port=%s key=%s scope=%s debug=%v delay=%v",
			cfg.target.base, cfg.target.root, cfg.host, cfg.port, cfg.key, cfg.scope, cfg.debug,
			cfg.drainDelay)
		if !strings.Contains(got, tt.want) {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestBadSettingIsNamedWithARightValue(t *testing.T) {
	const aBase, encoded = "https://my-aoai.openai.azure.com/openai/", "percent-encoded"
	tests := []struct{ name, variable, value, right string }{
		{"target unset", "TARGET_URL", "", "no .env file is read (make run does that"},
		{"target without scheme", "TARGET_URL", "b.example/openai/", aBase},
		{"target without host", "TARGET_URL", "https://:443/openai/", aBase},
		{"target with a wrong escape", "TARGET_URL", "https://b.example/%zz-s3cret", aBase},
		{"target with a line break", "TARGET_URL", "https://b.example/\ns3cret", aBase},
		{"target that is a key", "TARGET_URL", "s3cret", aBase},
		{"target for another protocol", "TARGET_URL", "ftp://b.example/openai/", aBase},
		{"target with a password", "TARGET_URL", "https://user:s3cret@b.example/openai/", aBase},
		{"target with a key", "TARGET_URL", "https://b.example/openai/?api-key=s3cret", aBase},
		{"target with a fragment", "TARGET_URL", "https://b.example/openai/#s3cret", aBase},
		{"target with a dot segment", "TARGET_URL", "https://b.example/%2e%2E/s3cret", aBase},
		{"target escaped twice", "TARGET_URL", "https://b.example/%252e%252e/s3cret", aBase},
		{"several targets", "TARGET_URL", "https://b.example/openai/ https://b.example/anthropic/",
			"one is enough now"},
		{"http over a network", "TARGET_URL", "http://10.0.0.4/openai/", "want https"},
		{"http for a name like localhost", "TARGET_URL", "http://localhost.example/", "want https"},
		{"http with a long s", "TARGET_URL", "http://localho\u017ft:1/openai/", "want https"},
		{"http for a name like 127.0.0.1", "TARGET_URL", "http://127.0.0.1.example/", "want https"},
		{"proxy with a bare %", "HTTPS_PROXY", "http://jane:s3cret%ame@127.0.0.1:3128", encoded},
		{"proxy with a bare %, lower case", "https_proxy", "http://j:s3cret%a@127.0.0.1", encoded},
		{"proxy with a bare #", "HTTPS_PROXY", "http://jane:s3cret#a@127.0.0.1:3128", encoded},
		{"proxy with a bare /", "HTTPS_PROXY", "http://jane:s3cret/a@127.0.0.1:3128", encoded},
		{"proxy with a bare %, no scheme", "HTTPS_PROXY", "j:s3cret%ame@127.0.0.1:3128", encoded},
		{"proxy of white space", "HTTPS_PROXY", "\t", encoded},
		{"port that is a name", "PORT", "http", "from 0 to 65535 such as 8081"},
		{"port above 65535", "PORT", "65536", "from 0 to 65535 such as 8081"},
		{"delay without a unit", "DRAIN_DELAY", "10", "such as 10s"},
		{"negative delay", "DRAIN_DELAY", "-1s", "such as 10s"},
		{"IMDS without scheme", "AZURE_POD_IDENTITY_AUTHORITY_HOST", "169.254.169.254",
			"http://169.254.169.254"},
	}
	for _, tt := range tests {
		_, err := loadConfig(func(name string) string {
			return vars{"TARGET_URL": "https://b.example/openai/", tt.variable: tt.value}[name]
		})
		text := fmt.Sprint(err)
		if !strings.HasPrefix(text, tt.variable+": ") || !strings.Contains(text, tt.right) {
			t.Errorf("%s: got %q, want %s and %q", tt.name, text, tt.variable, tt.right)
		}
		if strings.Contains(text, "s3cret") || strings.Contains(text, "\n") {
			t.Errorf("%s: the error shows a secret or has a line break: %q", tt.name, text)
		}
	}
}

// TestArcWantsAKey, as its agent gives tokens to root and one group alone.
func TestArcWantsAKey(t *testing.T) {
	for key, want := range map[string]string{"": "EXPECTED_KEY: not set", "k": ""} {
		_, err := loadConfig(func(name string) string {
			return vars{"TARGET_URL": "https://b.example/openai/", "EXPECTED_KEY": key,
				"IDENTITY_ENDPOINT": "http://127.0.0.1/a", "IMDS_ENDPOINT": "http://127.0.0.1"}[name]
		})
		if (err == nil) != (want == "") || err != nil && !strings.HasPrefix(err.Error(), want) {
			t.Errorf("key %q: got %v, want %q", key, err, want)
		}
	}
}

func TestBadStartIsOneLine(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, port, _ := net.SplitHostPort(taken.Addr().String())
	const target = "https://b.example/openai/"
	tests := []struct {
		name   string
		env    vars
		arg    string
		want   string
		status int
	}{
		{"a .env alone", vars{}, "", "TARGET_URL: not set, and no .env file is read", 78},
		{"bad port", vars{"TARGET_URL": target, "PORT": "http"}, "", "PORT: want a number", 78},
		{"port in use", vars{"TARGET_URL": target, "PORT": port}, "", "a free port such as 8082", 1},
		{"unknown flag", vars{"TARGET_URL": target}, "-port=1", `unexpected argument "-port=1"`, 1},
		{"bad port checked", vars{"PORT": "x"}, "-check", "settings failed the check", 1},
	}
	for _, tt := range tests {
		tt.env["AZURE_POD_IDENTITY_AUTHORITY_HOST"] = nobody
		status, stderr := startProgram(t, safetyNet, tt.env, strings.Fields(tt.arg)...).end()
		if status != tt.status || strings.Count(stderr, "\n") != 1 ||
			!strings.HasPrefix(stderr, "aoai-proxy: ") || !strings.Contains(stderr, tt.want) {
			t.Errorf("%s: got exit status %d and %q, want %d and one line with %q", tt.name, status,
				stderr, tt.status, tt.want)
		}
	}
}

func TestProgramSaysWhatItIsAsked(t *testing.T) {
	identity := newFakeIdentity(t)
	upstream := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, 200, `{}`)
	}))
	defer upstream.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	writeFile(t, ca, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE",
		Bytes: upstream.Certificate().Raw})))
	fine := vars{"TARGET_URL": upstream.URL + "/openai/",
		"AZURE_POD_IDENTITY_AUTHORITY_HOST": identity.URL, "SSL_CERT_FILE": ca}
	tests := []struct {
		arg  string
		env  vars
		want string
	}{
		{"-h", vars{}, usage},
		{"--help", vars{}, usage},
		{"-version", vars{}, runtime.Version()},
		{"-check", fine, "ok    TLS: TLS 1.3, certificate of "}, // with a CA of one's own
	}
	for _, tt := range tests {
		if tt.arg == "-check" && runtime.GOOS != "linux" {
			continue // SSL_CERT_FILE is not for macOS and Windows
		}
		p := startProgram(t, safetyNet, tt.env, tt.arg)
		status, stderr := p.end()
		if out := p.stdout.String(); status != 0 || !strings.Contains(out, tt.want) ||
			tt.arg != "-check" && stderr != "" {
			t.Errorf("%s: got exit status %d, %q and %q", tt.arg, status, out, stderr)
		}
	}
}

// TestEveryVariableIsInTheUsageText: what the source reads, and what README.md says may be set.
func TestEveryVariableIsInTheUsageText(t *testing.T) {
	read := regexp.MustCompile(`(?:env|isSet)\("([A-Za-z_]{4,})"\)|variable = "([A-Z_]+)"|` +
		`(HTTPS_PROXY|NO_PROXY|SSL_CERT_FILE|SSL_CERT_DIR)`)
	seen := make(map[string]bool)
	for _, file := range []string{"main.go", "imds.go", "forward.go", "README.md"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if file == "README.md" {
			read = regexp.MustCompile("(?m)^\\| `([A-Z_]+)` ")
		}
		for _, match := range read.FindAllStringSubmatch(string(text), -1) {
			seen[strings.Join(match[1:], "")] = true
		}
	}
	listed := make(map[string]bool)
	for _, name := range regexp.MustCompile(`[A-Za-z_]+`).FindAllString(usage, -1) {
		listed[name] = true
	}
	for name := range seen {
		if !listed[name] {
			t.Errorf("%s is not in the usage text", name)
		}
	}
	if len(seen) < 23 {
		t.Errorf("found %d variables only: %v", len(seen), seen)
	}
}

// TestLostLogEndsNothing: whoever reads stderr may go away.
func TestLostLogEndsNothing(t *testing.T) {
	identity := newFakeIdentity(t)
	p := startProgram(t, safetyNet, vars{"TARGET_URL": nobody + "/openai/", "PORT": "0",
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

// TestListensWhereHostSays, and on loopback without it, whatever the key.
func TestListensWhereHostSays(t *testing.T) {
	identity := newFakeIdentity(t)
	upstream := newUpstream(t, http.NotFound)
	const local = "no EXPECTED_KEY: every user of this host, and nobody else"
	hasIPv6 := len(listenHosts("")) == 2
	tests := []struct{ name, host, key, addrs, reach, says string }{
		{"neither", "", "", "127.0.0.1:PORT [::1]:PORT", "127.0.0.1 ::1", local},
		{"key", "", "k", "127.0.0.1:PORT [::1]:PORT", "127.0.0.1 ::1", "HOST=0.0.0.0 lets others in"},
		{"host", "127.0.0.1", "", "127.0.0.1:PORT", "127.0.0.1", local},
		{"host and key", "127.0.0.1", "k", "127.0.0.1:PORT", "127.0.0.1", "EXPECTED_KEY is set"},
		{"IPv6 host", "[::1]", "", "[::1]:PORT", "::1", local},
		{"every IPv4 address", "0.0.0.0", "", "0.0.0.0:PORT", "127.0.0.1 127.0.0.2",
			"warning: no EXPECTED_KEY: whoever reaches this port"},
		{"every address", "::", "k", "[::]:PORT", "127.0.0.1 127.0.0.2 ::1",
			"EXPECTED_KEY is set: whoever has the key"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if strings.Contains(tt.host, ":") && !hasIPv6 {
				t.Skip("no IPv6 here")
			}
			lines := followLog(t)
			p := newTestProxy(t, identity, upstream, vars{"HOST": tt.host, "EXPECTED_KEY": tt.key})
			accepted := make(chan string, 9) // another program may have this port elsewhere
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
			skip := func(addr string) bool {
				return strings.Contains(addr, "::1") && !hasIPv6 ||
					addr == "127.0.0.2" && runtime.GOOS != "linux" // it may not be there
			}
			_, port, _ := net.SplitHostPort(p.addr)
			var got, want []string
			for _, line := range before {
				if _, addr, ok := strings.Cut(line, "proxy listening on "); ok {
					got = append(got, addr)
				}
			}
			for _, addr := range strings.Fields(strings.ReplaceAll(tt.addrs, "PORT", port)) {
				want = append(want, addr+" ➜ "+upstream.URL+"/openai/")
			}
			if want = slices.DeleteFunc(want, skip); !slices.Equal(got, want) {
				t.Errorf("the log says it listens on %q, want %q", got, want)
			}
			client := http.Client{Transport: &http.Transport{DisableKeepAlives: true},
				Timeout: safetyNet}
			for _, host := range []string{"127.0.0.1", "127.0.0.2", "::1"} {
				if skip(host) {
					continue
				}
				resp, err := client.Get("http://" + net.JoinHostPort(host, port) + "/healthz")
				if err == nil {
					resp.Body.Close()
				}
			}
			var reached []string
			for range len(accepted) {
				reached = append(reached, <-accepted)
			}
			want = slices.DeleteFunc(strings.Fields(tt.reach), skip)
			if !slices.Equal(reached, want) {
				t.Errorf("it can be reached at %q, want %q", reached, want)
			}
		})
	}
}

// TestClientThatSpeaksTLSIsTold, once for a connection. Its user sees nothing of that.
func TestClientThatSpeaksTLSIsTold(t *testing.T) {
	logged := followLog(t)
	p := startProxy(t, newFakeIdentity(t), newUpstream(t, http.NotFound), nil)
	p.do(t, "GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n")
	conn, r := p.dial(t, "")
	tlsClient := tls.Client(conn, &tls.Config{ServerName: "localhost"})
	if err := tlsClient.Handshake(); err == nil {
		t.Error("the proxy speaks TLS")
	}
	io.ReadAll(r)
	line, _ := logged.waitFor(t, "speaks TLS")
	want := "client " + conn.LocalAddr().String() + " speaks TLS: give it http:// in its base URL"
	if !strings.HasSuffix(line, want) || strings.Count(logged.String(), "speaks TLS") != 1 {
		t.Errorf("got %s, want %q once", logged, want)
	}
}

// TestLogLineIsOneAndBounded, whatever is written.
func TestLogLineIsOneAndBounded(t *testing.T) {
	token := strings.Repeat("t", 1200)
	tests := []struct{ name, line, want string }{
		{"plain", "a ➜ b\n", "a ➜ b\n"},
		{"forged", "a\n2026/03/01 forged\r\u202e\u2028\u0085\x1b[2J\x00b\n",
			"a 2026/03/01 forged     [2J b\n"},
		{"no UTF-8", "a\xffb\n", "a\ufffdb\n"},
		{"at the limit", strings.Repeat("x", maxLine) + "\n", strings.Repeat("x", maxLine) + "\n"},
		{"too long", "a " + token + "\n", "a " + token[:maxLine-2] + "…\n"},
		{"too long, cut within a rune", token[:maxLine-1] + "ü\n", token[:maxLine-1] + "…\n"},
	}
	for _, tt := range tests {
		var out strings.Builder
		n, err := lineWriter{&out}.Write([]byte(tt.line))
		if out.String() != tt.want || n != len(tt.line) || err != nil {
			t.Errorf("%s: got %q, %d, %v; want %q", tt.name, &out, n, err, tt.want)
		}
	}
}

// main.go: the routes.

func TestProbesAreAnsweredHereAndNeedNoKey(t *testing.T) {
	fine, none := newFakeIdentity(t), newFakeIdentity(t)
	none.answerWith(refuse(400, "", noIdentity))
	tests := []struct {
		name, method, path string
		identity           *fakeIdentity
		status             int
		body               string
	}{
		{"root", "GET", "/", fine, 200, "ok\n"},
		{"healthz", "GET", "/healthz?x=1", fine, 200, "ok\n"},
		{"HEAD healthz", "HEAD", "/healthz", fine, 200, ""},
		{"base URL", "GET", "/v1", fine, 200, "ok\n"},
		{"base URL of Claude Code", "HEAD", "/anthropic", fine, 200, ""},
		{"base URL, doubled", "GET", "//openai/v1//v1/", fine, 200, "ok\n"},
		{"readyz", "GET", "/readyz", fine, 200, "ok\n"},
		{"readyz without a token", "GET", "/readyz", none, 503, "no token\n"},
		{"POST to the root is no probe", "POST", "/", fine, 401, "invalid_api_key"},
		{"POST to a base URL is no probe", "POST", "/v1", fine, 401, "invalid_api_key"},
		{"healthz below a base URL is no probe", "GET", "/v1/healthz", fine, 401, "invalid_api_key"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			upstream := newUpstream(t, func(_ http.ResponseWriter, r *http.Request) {
				t.Errorf("%s was forwarded", r.URL)
			})
			logged := followLog(t)
			p := startProxy(t, tt.identity, upstream, vars{"EXPECTED_KEY": "s3cret"})
			logged.waitFor(t, "token") // the first try has ended
			logged.waitFor(t, "token")
			resp, body := p.do(t, tt.method+" "+tt.path+" HTTP/1.1\r\nHost: {host}\r\n"+
				"Content-Length: 0\r\n\r\n")
			if resp.StatusCode != tt.status || !strings.Contains(body, tt.body) {
				t.Errorf("got %d %q, want %d %q", resp.StatusCode, body, tt.status, tt.body)
			}
			if got := strings.Contains(logged.String(), " from 127"); got != (tt.status == 401) {
				t.Errorf("logged: %v: %s", got, logged)
			}
		})
	}
}

// TestHTTP10ConnectionsEndWithTheirAnswer: the server ignores the framing of a chunked body there,
// and would take the body for the next request (golang/go#12785).
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

func TestSignalsEndTheProgramWithStatusZero(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("has no signals between processes")
	}
	for _, patient := range []bool{true, false} {
		t.Run(fmt.Sprintf("patient=%v", patient), func(t *testing.T) {
			identity := newFakeIdentity(t)
			upstream, release := heldUpstream(t, identity)
			p := startProgram(t, safetyNet, vars{"TARGET_URL": upstream.URL + "/openai/", "PORT": "0",
				"HOST":                              "127.0.0.1",
				"AZURE_POD_IDENTITY_AUTHORITY_HOST": identity.URL})
			addr := p.listens(t)
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
				// With Go before 1.24 the upstream would not hear of the client's end.
				io.WriteString(conn, ".")
				untilClosed(t, echo)
				conn.Close()
			}
			status, text := p.end()
			if status != 0 || !strings.Contains(text, " stopped") {
				t.Errorf("got exit status %d and %q, want 0 and stopped", status, text)
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
	upstream, _ := heldUpstream(t, identity)
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
		p := startProgram(t, safetyNet, vars{"PORT": "0", "HOST": "127.0.0.1", "DRAIN_DELAY": "10m",
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
			strings.Contains(stderr, "NOTIFY_SOCKET") {
			t.Errorf("%s: got exit status %d and %q", name, status, stderr)
		}
	}

	// A socket that is not there ends nothing.
	p := startProgram(t, safetyNet, vars{"PORT": "0", "HOST": "127.0.0.1", "TARGET_URL": nobody,
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
// behind a balancer that learns of their state late. It takes half a minute, and so .ci/run asks for
// it by name.
func TestRestartsOneByOneLoseNothing(t *testing.T) {
	if os.Getenv("AOAI_PROXY_ROLLING_RESTART") != "1" {
		t.Skip("AOAI_PROXY_ROLLING_RESTART is not 1")
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
		replicas[i] = startProgram(t, 5*time.Minute, vars{"PORT": "0", "HOST": "127.0.0.1",
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
	// Some milliseconds; no limit would stay none.
	p.server.ReadHeaderTimeout /= 300
	p.server.IdleTimeout /= 2400
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

// runCheck is -check with the environment env.
func runCheck(env vars, out io.Writer) error {
	cfg, err := loadConfig(func(name string) string { return env[name] })
	return check(cfg, err, lineWriter{out})
}

func TestCheckTellsWhatIsWrong(t *testing.T) {
	followLog(t)
	const object, cognitive = "11111111-2222-3333-4444-555555555555",
		"https://cognitiveservices.azure.com"
	type reply struct {
		status int
		body   string
	}
	gives := func(aud string) reply {
		payload := fmt.Sprintf(`{"aud":%q,"tid":"tenant-1","oid":%q,"appid":"client-1"}`, aud, object)
		jwt := "e30." + base64.RawURLEncoding.EncodeToString([]byte(payload)) + ".c2lnbmF0dXJl"
		return reply{200, tokenAnswer(jwt, time.Hour)}
	}
	said := func(status int, code, message string) reply {
		return reply{status, fmt.Sprintf(`{"error":{"code":%q,"message":%q}}`, code, message)}
	}
	token, list := gives(cognitive), reply{200, `{}`}
	claude := reply{400, `{"type":"error","error":{"type":"invalid_request_error","message":"no"}}`}
	untrusted := httptest.NewUnstartedServer(http.NotFoundHandler())
	untrusted.Config.ErrorLog = log.New(io.Discard, "", 0)
	untrusted.StartTLS()
	defer untrusted.Close()

	tests := []struct {
		name, target       string // URL is the upstream's
		identity, upstream reply
		want               string // the last line but one of what is fine, or the step that fails
		below              string // what is below that
	}{
		{"fine", "URL/openai/", token, list,
			"ok    upstream: GET URL/openai/models?api-version=2024-10-21: answered 200 OK", ""},
		{"fine, v1", "URL/openai/v1/", token, list,
			"ok    upstream: GET URL/openai/v1/models: answered 200 OK", ""},
		{"fine, opaque token", "URL/", reply{200, tokenAnswer("opaque", time.Hour)}, list,
			"ok    upstream: GET URL/openai/models?api-version=2024-10-21: answered 200 OK", ""},
		{"fine, Claude", "URL/anthropic/", token, claude,
			"ok    upstream: POST URL/anthropic/v1/messages: answered 400 Bad Request: invalid_req", ""},
		{"no list of models", "URL/models/", token, reply{404, "\x1b[2J"},
			"answered 404 Not Found, as Foundry's model inference has no list; the role is not", ""},
		{"a wrong path", "URL/opneai/", token, said(404, "404", "Resource not found"),
			"FAIL  upstream: ", "hint: there is no such path: check TARGET_URL"},

		{"bad setting", "http://10.0.0.4/", token, list, "FAIL  settings: TARGET_URL: ", ""},
		{"no identity", "URL/openai/", reply{400, noIdentity}, list,
			"FAIL  token: IMDS at ", "hint: assign a managed identity to this host"},
		{"Claude answers an empty message", "URL/anthropic/", token, list, "FAIL  upstream: ", ""},
		{"not Claude's own 400", "URL/anthropic/", token, said(400, "BadRequest", "API version"),
			"FAIL  upstream: ", `it says: {"error":{"code":"BadRequest","message":"API version"}}`},
		{"wrong audience", "URL/openai/", gives("https://management.azure.com"),
			said(401, "401", "audience is incorrect (https://cognitiveservices.azure.com)"),
			"FAIL  upstream: ", "hint: the token is for https://management.azure.com: if the service"},
		{"role missing", "URL/openai/", token, said(401, "PermissionDenied", "no"),
			"FAIL  upstream: GET URL/openai/models?api-version=2024-10-21: answered 401 Unauthorized: " +
				"PermissionDenied", "object id " + object + " lacks the role Cognitive Services OpenAI"},
		{"role for Claude missing", "URL/anthropic/", token, said(401, "PermissionDenied", "no"),
			"FAIL  upstream: ", " lacks the role Cognitive Services User"},
		{"a web page", "URL/openai/", token, reply{200, "<html>log in</html>"},
			"FAIL  upstream: ", "hint: a web page answered, not the service"},
		{"an empty answer", "URL/openai/", token, reply{200, ""}, "FAIL  upstream: ", ""},
		{"advice from outside", "URL/openai/", token, reply{500, "no\n      hint: run this"},
			"FAIL  upstream: ", "it says: no       hint: run this"},
		{"nobody listens", nobody + "/openai/", token, list,
			"FAIL  upstream: no answer from 127.0.0.1:1: dial tcp 127.0.0.1:1: ", "hint: a firewall?"},
		{"untrusted certificate", untrusted.URL + "/openai/", token, list, "FAIL  upstream: ",
			"hint: name a file with your own CA in SSL_CERT_FILE"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			identity := newFakeIdentity(t)
			identity.answerWith(refuse(tt.identity.status, "", tt.identity.body))
			upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
				body, _ := io.ReadAll(r.Body)
				isMessage := string(body) == "{}" && r.Header.Get("Anthropic-Version") != "" &&
					r.Header.Get("Content-Type") == "application/json"
				token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
				if r.Method != "GET" && !isMessage || !strings.Contains(tt.identity.body, token) {
					t.Errorf("%s with %v and %q", r.Method, r.Header, body)
				}
				writeJSON(w, tt.upstream.status, tt.upstream.body)
			})
			var buf strings.Builder
			err := runCheck(vars{"TARGET_URL": strings.ReplaceAll(tt.target, "URL", upstream.URL),
				"AZURE_POD_IDENTITY_AUTHORITY_HOST": identity.URL}, &buf)
			out := strings.ReplaceAll(buf.String(), upstream.URL, "URL")
			_, after, found := strings.Cut(out, tt.want)
			fails := strings.HasPrefix(tt.want, "FAIL")
			if !found || (err != nil) != fails || !strings.Contains(after, tt.below) ||
				strings.Contains(out, "\nok    clients: base URL http://localhost:8081, ") == fails {
				t.Errorf("got error %v and\n%s", err, out)
			}
			for _, line := range strings.Split(strings.TrimSpace(out), "\n") {
				if !regexp.MustCompile("^(ok    |FAIL  |      (hint|it says): )[^\x1b]").MatchString(line) {
					t.Errorf("line %q", line)
				}
			}
			if strings.Contains(out, "c2lnbmF0dXJl") || strings.Contains(out, "opaque") {
				t.Errorf("the token is shown:\n%s", out)
			}
		})
	}
}

// TestCheckFailsIfAnAnswerBreaksOff, even one whose beginning looks right.
func TestCheckFailsIfAnAnswerBreaksOff(t *testing.T) {
	followLog(t)
	upstream := newUpstream(t, answerRaw("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}"))
	var out strings.Builder
	err := runCheck(vars{"TARGET_URL": upstream.URL + "/openai/",
		"AZURE_POD_IDENTITY_AUTHORITY_HOST": newFakeIdentity(t).URL}, &out)
	if err == nil || !strings.Contains(out.String(), "FAIL  upstream: no answer from ") {
		t.Errorf("got %v and\n%s", err, &out)
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
		{"after a base segment", "GET /openai/v1/../../metadata", 400},
		{"base segment behind dots", "GET /../openai/v1/models", 400},
		{"of a base URL alone", "GET /v1/..", 400},
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
		strings.Repeat("a", 60_000)+"\r\n\r\n")
	tooLarge, _ := p.do(t, "GET /x HTTP/1.1\r\nHost: {host}\r\nX-Codex-Turn-Metadata: "+
		strings.Repeat("a", 70_000)+"\r\n\r\n")
	if ok.StatusCode != 200 || tooLarge.StatusCode != 431 {
		t.Errorf("got %d and %d, want 200 and 431", ok.StatusCode, tooLarge.StatusCode)
	}
}

// forward.go: where a request goes.

// TestAnyBaseURLWorks: each call with whatever a client may have been given as its base URL, in front
// of each TARGET_URL of one resource.
func TestAnyBaseURLWorks(t *testing.T) {
	const claude = "Anthropic-Version: 2023-06-01\r\n"
	const dated = "?api-version=2025-04-01-preview"
	calls := []struct{ name, head, call, upstream string }{
		{"chat", "", "/chat/completions", "/openai/v1/chat/completions"},
		{"Responses", "", "/responses/resp_1/input_items?limit=2",
			"/openai/v1/responses/resp_1/input_items?limit=2"},
		{"v1 without a date", "", "/responses?api-version=preview",
			"/openai/v1/responses?api-version=preview"},
		{"v1 of the client's own", "", "/openai/v1/embeddings", "/openai/v1/embeddings"},
		{"classic chat", "", "/openai/deployments/D/chat/completions?api-version=2024-10-21",
			"/openai/deployments/D/chat/completions?api-version=2024-10-21"},
		{"classic, given as a base URL", "", "/deployments/D/embeddings?a=b&api-version=2024-02-15",
			"/openai/deployments/D/embeddings?a=b&api-version=2024-02-15"},
		{"deployment without a version", "", "/deployments/D/audio/speech",
			"/openai/deployments/D/audio/speech"},
		{"classic Responses", "", "/responses" + dated, "/openai/responses" + dated},
		{"classic Realtime", "", "/realtime" + dated + "&deployment=D",
			"/openai/realtime" + dated + "&deployment=D"},
		{"message", claude, "/v1/messages?beta=true", "/anthropic/v1/messages?beta=true"},
		{"message without a version", "", "/messages/count_tokens",
			"/anthropic/v1/messages/count_tokens"},
	}
	bases := []string{"", "/", "/v1", "/openai", "/openai/v1", "/anthropic", "/anthropic/v1", "/v1/",
		"/openai/", "/openai/v1/", "/anthropic/v1//", "//v1//v1", "/openai/openai", "/v1/openai"}
	for _, base := range []string{"/openai/", "/openai/v1/", "/anthropic", "", "/gw/openai", "/gw/anthropic/v1"} {
		p, upstream := startRecorded(t, vars{"TARGET_URL": "URL" + base})
		root := strings.TrimSuffix(p.forwarder.target.root, "/")
		for _, c := range calls {
			for _, given := range bases {
				resp, _ := p.do(t, "POST "+given+c.call+" HTTP/1.1\r\nHost: {host}\r\n"+c.head+
					"Content-Length: 0\r\nConnection: close\r\n\r\n")
				if got := upstream.last(); got != root+c.upstream || resp.StatusCode != 200 {
					t.Errorf("%s at TARGET_URL %q with %q: got %d %s, want %s", c.name, base, given,
						resp.StatusCode, got, root+c.upstream)
				}
			}
		}
	}
}

// TestUpstreamPaths has what does not hold for every base URL.
func TestUpstreamPaths(t *testing.T) {
	const claude = "Anthropic-Version: 2023-06-01\r\n"
	tests := []struct{ name, base, head, target, upstream string }{
		{"files of OpenAI", "/openai/", "", "/v1/files/f-1", "/openai/v1/files/f-1"},
		{"files of Claude, by the path", "/openai/", "", "/anthropic/v1/files", "/anthropic/v1/files"},
		{"models of Claude, by the header", "/openai/", claude, "/v1/models", "/anthropic/v1/models"},
		{"path before the header", "/openai/", claude, "/openai/models", "/openai/v1/models"},
		{"last segment counts", "/openai/", "", "/openai/anthropic/v1/models", "/anthropic/v1/models"},
		{"another API of Claude", "/openai/", "", "/anthropic/api/x", "/anthropic/v1/api/x"},
		{"dated and no operation", "/openai/", "", "/threads/t/messages?api-version=2024-05-01-preview",
			"/openai/threads/t/messages?api-version=2024-05-01-preview"},
		{"dated v1 and no operation", "/openai/", "",
			"/openai/v1/video/generations/jobs?api-version=2025-04-01-preview",
			"/openai/v1/video/generations/jobs?api-version=2025-04-01-preview"},
		{"v1 and no operation", "/openai/", "", "/v1/x", "/openai/v1/x"},
		{"openai and no operation", "/openai/v1/", "", "/openai/x", "/openai/x"},
		{"unknown call", "/openai/v1/", "", "/x/y", "/openai/v1/x/y"},
		{"unknown call of Claude's", "/anthropic/", "", "/x", "/anthropic/x"},
		{"on segment borders only", "/openai/", "", "/openaix/y", "/openai/openaix/y"},
		{"in other case", "/openai/", "", "/OpenAI/v1/models", "/openai/OpenAI/v1/models"},
		{"escaped base segment", "/openai/", "", "/%6fpenai/v1/models", "/openai/%6fpenai/v1/models"},
		{"base segment in a call", "/openai/", "", "/v1/files/v1/openai", "/openai/v1/files/v1/openai"},
		{"POST to a base URL", "/openai/", "", "/openai/v1", "/openai/v1/"},
		{"absolute path in a path", "/openai/", "", "//elsewhere.example/x", "/openai/elsewhere.example/x"},

		{"escaped slash and space", "/openai/", "", "/v1/files/a%2Fb%20c", "/openai/v1/files/a%2Fb%20c"},
		{"escapes beside odd bytes", "/openai/", "", "/v1/files/a%2Fb\"<>^`{|}#",
			"/openai/v1/files/a%2Fb\"<>^`{|}#"},
		{"unicode, escaped and raw", "/openai/", "", "/v1/files/%C3%BC\xc3\xbc",
			"/openai/v1/files/%C3%BC\xc3\xbc"},
		{"slashes in a call", "/openai/", "", "/v1/files//a/", "/openai/v1/files//a/"},
		{"dots in names", "/openai/", "", "/v1/files/..a/b../...", "/openai/v1/files/..a/b../..."},
		{"odd query", "/openai/", "", "/x?b=1;a=%zz&a=%20+&a#?/../c", "/openai/x?b=1;a=%zz&a=%20+&a#?/../c"},
		{"empty query", "/openai/", "", "/x?", "/openai/x?"},

		{"gateway", "/v1/", "", "/v1/responses", "/v1/v1/responses"},
		{"gateway, slashes in front", "/gw/", "", "//openai/v1/models", "/gw/openai/v1/models"},
		{"gateway, Claude", "/gw/", claude, "/v1/messages", "/gw/v1/messages"},
		{"Foundry's models", "/models/", "", "/chat/completions?api-version=2024-05-01-preview",
			"/models/chat/completions?api-version=2024-05-01-preview"},
		{"one deployment", "/openai/deployments/D", "", "/chat/completions?api-version=2024-10-21",
			"/openai/deployments/D/chat/completions?api-version=2024-10-21"},
	}
	for _, tt := range tests {
		p, upstream := startRecorded(t, vars{"TARGET_URL": "URL" + tt.base})
		p.do(t, "POST "+tt.target+" HTTP/1.1\r\nHost: {host}\r\n"+tt.head+"Content-Length: 0\r\n\r\n")
		if got := upstream.last(); got != tt.upstream {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.upstream)
		}
	}
}

func TestCredentialsAreCutFromTheQuery(t *testing.T) {
	p, upstream := startRecorded(t, nil)
	for _, tt := range []struct{ name, query, upstream string }{
		{"alone", "api-key=K", ""},
		{"first", "api-key=K&a=1", "a=1"},
		{"middle", "a=1&api-key=K&b=2", "a=1&b=2"},
		{"any case", "a=1&API-Key=K", "a=1"},
		{"escaped name", "a=1&api%2Dkey=K", "a=1"},
		{"of other services", "api_key=K&access_token=K&Ocp-Apim-Subscription-Key=K&a=1", "a=1"},
		{"of Google", "key=K&apikey=K&a=1", "a=1"},
		{"authorization", "a&Authorization=Bearer%20K", "a"},
		{"twice", "api-key=K&a=;&api-key=K", "a=;"},
		{"without a value", "api-key&a=1", "a=1"},
		{"another name", "my-api-key=K&api-key2=K", "my-api-key=K&api-key2=K"},
		{"odd bytes", "a=1;b=%zz&&=&c", "a=1;b=%zz&&=&c"},
	} {
		p.do(t, "GET /x?"+tt.query+" HTTP/1.1\r\nHost: {host}\r\n\r\n")
		if _, got, _ := strings.Cut(upstream.last(), "?"); got != tt.upstream {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.upstream)
		}
	}
}

// forward.go: what goes upstream.

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
	if want := p.forwarder.target.base.Host; r.Host != want {
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

// TestBodiesKeepTheirFraming, and a connection whose bodies were read whole is kept, whatever is
// answered.
func TestBodiesKeepTheirFraming(t *testing.T) {
	followLog(t)
	upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		if strings.HasSuffix(r.URL.Path, "/refused") {
			w.WriteHeader(400)
		}
		fmt.Fprintf(w, "%s %d %v %d", r.Method, n, err, r.ContentLength)
	})
	p := startProxy(t, newFakeIdentity(t), upstream, nil)
	client, r := p.dial(t, "")
	chunked := func(size int) string {
		return fmt.Sprintf("Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", size,
			strings.Repeat("x", size))
	}
	sized := func(size int) string {
		return fmt.Sprintf("Content-Length: %d\r\n\r\n%s", size, strings.Repeat("x", size))
	}
	tests := []struct{ name, line, rest, want string }{
		{"sized", "POST /x", sized(5), "POST 5 <nil> 5"},
		{"sized and large", "PUT /x", sized(3 << 20), "PUT 3145728 <nil> 3145728"},
		{"chunked", "POST /x", chunked(5), "POST 5 <nil> -1"},
		{"chunked and large", "POST /x", chunked(3 << 20), "POST 3145728 <nil> -1"},
		{"empty", "POST /x", sized(0), "POST 0 <nil> 0"},
		{"none", "DELETE /x", "\r\n", "DELETE 0 <nil> 0"},
		{"of a GET", "GET /x", sized(2), "GET 2 <nil> 2"},
		{"own method", "BREW /x", sized(2), "BREW 2 <nil> 2"},
		{"both framings", "POST /x", "Content-Length: 3\r\n" + chunked(5), "POST 5 <nil> -1"},
		{"compressed", "POST /x", "Content-Encoding: zstd\r\n" + sized(4), "POST 4 <nil> 4"},
		{"refused", "POST /refused", sized(5), "POST 5 <nil> 5"},
		{"refused, large", "POST /refused", sized(3 << 20), "POST 3145728 <nil> 3145728"},
		{"refused, chunked", "POST /refused", chunked(300_000), "POST 300000 <nil> -1"},
	}
	for range 3 {
		for _, tt := range tests {
			go io.WriteString(client, tt.line+" HTTP/1.1\r\nHost: localhost\r\n"+tt.rest)
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatalf("%s: %v", tt.name, err)
			}
			body, err := io.ReadAll(resp.Body)
			if string(body) != tt.want || err != nil || resp.Close {
				t.Errorf("%s: got %q, %v, Connection: close %v; want %q", tt.name, body, err,
					resp.Close, tt.want)
			}
		}
	}
}

// TestBodyThatWasTouchedIsNotSentAgain: the transport sends one again over another connection, if an
// idle one turns out to be dead before anything of the body was read.
func TestBodyThatWasTouchedIsNotSentAgain(t *testing.T) {
	for _, read := range []bool{false, true} {
		body := &requestBody{from: io.NopCloser(strings.NewReader("hi"))}
		if read {
			body.Read(nil)
		}
		if again, err := body.again(); (err != nil) != read || !read && again != body {
			t.Errorf("read %v: got %v, %v", read, again, err)
		}
	}
}

// TestDeadIdleConnectionsLoseNoPOST has the upstream reset its idle connections behind the back of the
// transport, which writes to them all the same.
func TestDeadIdleConnectionsLoseNoPOST(t *testing.T) {
	followLog(t)
	upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, n)
	})
	p := newTestProxy(t, newFakeIdentity(t), upstream, nil)
	dialed := make(chan *deafConn, 9)
	p.forwarder.transport.DialContext = func(_ context.Context, network, addr string) (net.Conn, error) {
		conn, err := net.Dial(network, addr)
		deaf := &deafConn{Conn: conn, dead: make(chan bool)}
		dialed <- deaf
		return deaf, err
	}
	p.start(t)
	for _, size := range []int{0, 2_000, 2_000_000} {
		request := fmt.Sprintf("POST /x HTTP/1.1\r\nHost: {host}\r\nContent-Length: %d\r\n\r\n%s", size,
			strings.Repeat("x", size))
		for len(dialed) > 0 {
			<-dialed
		}
		p.forwarder.transport.CloseIdleConnections()
		p.do(t, "GET /x HTTP/1.1\r\nHost: {host}\r\n\r\n") // leaves an idle connection
		close((<-dialed).dead)
		if resp, body := p.do(t, request); resp.StatusCode != 200 || body != strconv.Itoa(size) {
			t.Errorf("%d bytes: got %d %q", size, resp.StatusCode, body)
		}
	}
}

// deafConn is dead when dead is closed: it cannot be written to any more, which nobody is told.
type deafConn struct {
	net.Conn
	dead chan bool
}

func (c *deafConn) Write(p []byte) (int, error) {
	select {
	case <-c.dead:
		return 0, syscall.EPIPE
	default:
		return c.Conn.Write(p)
	}
}

// forward.go: get the token, and send.

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

// TestMalformedBodyIsTheClientsFault, of which nothing is told.
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

func TestUnreachableUpstreamIsNamed(t *testing.T) {
	untrusted := httptest.NewTLSServer(http.NotFoundHandler())
	untrusted.Config.ErrorLog = log.New(io.Discard, "", 0)
	t.Cleanup(untrusted.Close)
	tests := []struct{ name, url, want string }{
		{"refused", nobody, "dial tcp 127.0.0.1:1: "},
		{"certificate", untrusted.URL, "certificate signed by unknown authority; hint: name a file"},
		{"hang-up", newUpstream(t, answerRaw("")).URL, "EOF"},
		{"garbage", newUpstream(t, answerRaw("\x1b[31mSSH-2.0\r\n\r\n")).URL, "the answer is not HTTP"},
		{"101 unasked", newUpstream(t, answerRaw("HTTP/1.1 101 Switching Protocols\r\n"+
			"Connection: Upgrade\r\nUpgrade: websocket\r\nX-Up: u\r\n\r\n")).URL,
			"unexpected status 101"},
		{"status 000", newUpstream(t, answerRaw("HTTP/1.1 000 Zero\r\n\r\n")).URL,
			"unexpected status 0"},
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
			if resp.Header.Get("X-Up") != "" {
				t.Errorf("the refused answer's header is in ours: %v", resp.Header)
			}
		})
	}
	f := &forwarder{target: &target{base: &url.URL{Host: "x.invalid"}}}
	e := f.noAnswer(&net.OpError{Op: "dial", Err: &net.DNSError{Err: "no such host", Name: "x.invalid"}})
	if want := "no answer from x.invalid: dial: lookup x.invalid: no such host; hint: check " +
		"TARGET_URL's host name, and this host's DNS"; e.Error() != want {
		t.Errorf("got %q, want %q", e, want)
	}
}

// TestProxyThatRefusesIsNamed has HTTPS_PROXY refuse the connection to the upstream.
func TestProxyThatRefusesIsNamed(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("https_proxy is HTTPS_PROXY there")
	}
	identity := newFakeIdentity(t)
	refusing := newUpstream(t, answerRaw("HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"))
	p := startProgram(t, safetyNet, vars{"TARGET_URL": "https://resource.example/openai/",
		"PORT": "0", "HTTPS_PROXY": refusing.URL, "AZURE_POD_IDENTITY_AUTHORITY_HOST": identity.URL})
	resp, err := http.Get("http://" + p.listens(t) + "/v1/models")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	const want = "no answer from resource.example by way of HTTPS_PROXY: " +
		"Proxy Authentication Required; hint: check HTTPS_PROXY's address"
	if resp.StatusCode != 502 || !strings.Contains(string(body), want) {
		t.Errorf("got %d %s, want 502 and %q", resp.StatusCode, body, want)
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
	for range 5 {
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

// forward.go: how an exchange with a body ends.

// earlyUpstream answers 413 at once, and does not read the body.
func earlyUpstream(t *testing.T) *httptest.Server {
	return newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).EnableFullDuplex() // or it would wait for the body
		w.Header().Set("Connection", "close")            // or the next request could meet its end
		http.Error(w, strings.Repeat("too large ", 999), http.StatusRequestEntityTooLarge)
	})
}

// TestAnswersReachAClientThatIsStillSending: a refusal, and an early answer of the upstream, whether
// the client reads at the same time or sends all first, as Python's HTTP clients do.
func TestAnswersReachAClientThatIsStillSending(t *testing.T) {
	followLog(t)
	p := startProxy(t, newFakeIdentity(t), earlyUpstream(t), vars{"EXPECTED_KEY": "sesame"})
	var all sync.WaitGroup
	for _, key := range []string{"wrong", "sesame"} {
		for _, size := range []int{10, 300_000, 20 << 20} {
			for _, framing := range []string{"sized", "chunked"} {
				for _, extra := range []string{"", "Connection: close\r\n", "Expect: 100-continue\r\n"} {
					for _, first := range []bool{false, true} {
						all.Add(1)
						go func() {
							defer all.Done()
							what := fmt.Sprint(key, size, framing, extra, first)
							conn, r := p.dial(t, "POST /x HTTP/1.1\r\nHost: {host}\r\napi-key: "+key+
								"\r\n"+extra)
							send := func() {
								if framing == "sized" {
									fmt.Fprintf(conn, "Content-Length: %d\r\n\r\n", size)
									io.CopyN(conn, zeros{}, int64(size))
									return
								}
								fmt.Fprintf(conn, "Transfer-Encoding: chunked\r\n\r\n%x\r\n", size)
								io.CopyN(conn, zeros{}, int64(size))
								io.WriteString(conn, "\r\n0\r\n\r\n")
							}
							if first {
								send()
							} else {
								go send()
							}
							wantEarly(t, what, r, key == "sesame")
						}()
					}
				}
			}
		}
	}
	all.Wait()
}

// wantEarly reads the answer of earlyUpstream, or a refusal of the proxy's own.
func wantEarly(t *testing.T, what string, r *bufio.Reader, isUpstreams bool) {
	t.Helper()
	resp, err := http.ReadResponse(r, &http.Request{Method: "POST"})
	for err == nil && resp.StatusCode == 100 {
		resp, err = http.ReadResponse(r, &http.Request{Method: "POST"})
	}
	if err != nil {
		t.Errorf("%s: no answer: %v", what, err)
		return
	}
	body, err := io.ReadAll(resp.Body)
	if isUpstreams && (resp.StatusCode != 413 || len(body) != 9991 || err != nil) ||
		!isUpstreams && (resp.StatusCode != 401 || !strings.Contains(string(body), "wrong or missing key")) {
		t.Errorf("%s: got %d, %d bytes, %v", what, resp.StatusCode, len(body), err)
	}
}

// TestStalledClientsAreLetGo after their answers. (With Go 1.27 an early answer to a client that sent
// Expect is held back until there is more of its body: the server waits for the transport's read.)
func TestStalledClientsAreLetGo(t *testing.T) {
	followLog(t)
	p := startProxy(t, newFakeIdentity(t), earlyUpstream(t), vars{"EXPECTED_KEY": "sesame"})
	const sized, chunked = "Content-Length: 5000000\r\n\r\nabc",
		"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
	answers := make(map[string]*bufio.Reader)
	for _, head := range []string{"POST /x HTTP/1.1\r\napi-key: wrong\r\n",
		"GET /healthz HTTP/1.1\r\n", "POST /../x HTTP/1.1\r\napi-key: wrong\r\n",
		"POST /x HTTP/1.1\r\napi-key: wrong\r\nExpect: 100-continue\r\n",
		"POST /x HTTP/1.1\r\napi-key: sesame\r\n"} {
		for _, rest := range []string{sized, chunked, "Content-Length: 1000\r\n\r\nabc"} {
			_, answers[head+rest] = p.dial(t, head+"Host: {host}\r\n"+rest)
		}
	}
	for request, r := range answers {
		wantEarly(t, request, r, strings.Contains(request, "sesame"))
		if _, err := r.ReadByte(); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%q: the connection stays open", request)
		}
	}
}

func TestRestOfABodyIsNoRequest(t *testing.T) {
	logged := followLog(t)
	p := startProxy(t, newFakeIdentity(t), earlyUpstream(t), nil)
	conn, r := p.dial(t, "POST /x HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n"+
		"3\r\nabc\r\n")
	wantEarly(t, "chunked", r, true)
	io.WriteString(conn, "GET /smuggled HTTP/1.1\r\nHost: "+p.addr+"\r\n\r\n")
	rest, _ := io.ReadAll(r)
	if len(rest) > 0 || strings.Contains(logged.String(), "smuggled") {
		t.Errorf("the rest of the body was taken for a request: %q\n%s", rest, logged)
	}
}

// TestDroppedBodyNeverLooksComplete to the upstream, though somebody else has read the rest of it.
func TestDroppedBodyNeverLooksComplete(t *testing.T) {
	body := newRequestBody(httptest.NewRecorder(), httptest.NewRequest("POST", "/x",
		strings.NewReader("the rest")))
	body.end(0)
	if n, err := body.Read(make([]byte, 9)); n != 0 || err == nil || err == io.EOF {
		t.Errorf("got %d bytes and %v, want a failure", n, err)
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
	body := bytes.Repeat([]byte("y"), 300_000)
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
		fmt.Sprintf("Content-Length: %d\r\n\r\n%s", 300_009, strings.Repeat("x", 300_000))} {
		_, r := p.dial(t, "POST /x HTTP/1.1\r\nHost: {host}\r\n"+framing)
		framing = framing[:30]
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.ReadAll(resp.Body)
		// It is a 502 if the upstream's reset is noticed before its answer.
		if err == nil && resp.StatusCode != 502 || errors.Is(err, os.ErrDeadlineExceeded) {
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

// TestRefusalPassesAsItComes: it is explained after it has been copied.
func TestRefusalPassesAsItComes(t *testing.T) {
	logged := followLog(t)
	rest := make(chan string)
	upstream := newUpstream(t, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(404)
		io.WriteString(w, `{"error":{"code":`)
		http.NewResponseController(w).Flush()
		io.WriteString(w, <-rest)
	})
	p := startProxy(t, newFakeIdentity(t), upstream, nil)
	_, r := p.dial(t, "GET /x HTTP/1.1\r\nHost: {host}\r\n\r\n")
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(resp.Body, make([]byte, 17)); err != nil {
		t.Fatal(err)
	}
	rest <- `"DeploymentNotFound"}}`
	logged.waitFor(t, "answered 404 Not Found: DeploymentNotFound; hint: the resource has no deployment")
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
			"unexpected status 101"},
		{"without Connection: Upgrade", "GET /x HTTP/1.1\r\n" + webSocketHead + "\r\n",
			strings.Replace(accepted, "Connection: Upgrade\r\n", "", 1), 502,
			"no answer from 127.0.0.1:"},
		{"h2c asked for", "GET /x HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\n" +
			"Upgrade: h2c\r\n\r\n", strings.Replace(accepted, "websocket", "h2c", 1), 502,
			"unexpected status 101"},
		{"not a GET", "POST /x HTTP/1.1\r\n" + webSocketHead + "\r\n", accepted, 502,
			"unexpected status 101"},
		{"with a body", "GET /x HTTP/1.1\r\n" + webSocketHead + "Content-Length: 2\r\n\r\nhi",
			accepted, 502, "unexpected status 101"},
		{"not in Connection", "GET /x HTTP/1.1\r\n" +
			strings.Replace(webSocketHead, ", Upgrade", "", 1) + "\r\n", accepted, 502,
			"unexpected status 101"},
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

func TestTunnelPassesWhatFollowsTheUpgrade(t *testing.T) {
	for _, scheme := range []string{"http", "https"} {
		followLog(t)
		asked := make(chan string, 1)
		handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			asked <- fmt.Sprint(r.RequestURI, r.Header)
			conn, buffered, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			io.WriteString(conn, switching+"Sec-WebSocket-Protocol: realtime\r\n\r\ngreeting,")
			io.Copy(conn, buffered)
		})
		upstream := newUpstream(t, handler)
		if scheme == "https" {
			upstream = httptest.NewTLSServer(handler)
			t.Cleanup(upstream.Close)
		}
		p := startProxy(t, newFakeIdentity(t), upstream, vars{"EXPECTED_KEY": "sesame"})
		// The first frame follows the head at once, as some clients send it.
		_, r := p.dial(t, "GET /v1/realtime?api-key=sesame HTTP/1.1\r\n"+webSocketHead+
			"Sec-WebSocket-Protocol: realtime, openai-insecure-api-key.sesame\r\n\r\nhello")
		resp, err := http.ReadResponse(r, nil)
		if err != nil || resp.StatusCode != 101 || resp.Header.Get("Sec-WebSocket-Protocol") != "realtime" {
			t.Fatalf("%s: got %+v, %v", scheme, resp, err)
		}
		if sent := <-asked; strings.Contains(sent, "sesame") {
			t.Errorf("%s: the key went upstream: %s", scheme, sent)
		}
		got := make([]byte, len("greeting,hello"))
		if _, err := io.ReadFull(r, got); err != nil || string(got) != "greeting,hello" {
			t.Errorf("%s: got %q, %v", scheme, got, err)
		}
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
// and the other one answer only then.
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

// forward.go: what is logged.

func TestLogTellsNoSecretsAndCannotBeForged(t *testing.T) {
	logged := followLog(t)
	upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Apim-Request-Id", "id-1")
		writeJSON(w, 404, `{"error":{"code":"DeploymentNotFound"}}`)
	})
	p := startProxy(t, newFakeIdentity(t), upstream, vars{"EXPECTED_KEY": "open sesame"})
	conn, r := p.dial(t, "GET /v1/open%20sesame/\xe2\x80\xa8\xc2\x9b?api-key=open+sesame&API%2D"+
		"key=other1&x=%6fpen%20sesame&authorization=other2 HTTP/1.1\r\n"+
		"Host: {host}\r\napi-key: open sesame\r\nAuthorization: Bearer other3\r\n\r\n")
	if _, err := http.ReadResponse(r, nil); err != nil {
		t.Fatal(err)
	}
	p.do(t, "POST /deployments/gpt-4o?api-version=1 HTTP/1.1\r\nHost: {host}\r\nConnection: "+
		"close\r\napi-key: open sesame\r\n\r\n")
	logged.waitFor(t, "api-version=1 after ")
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
		`404 Not Found: DeploymentNotFound; apim-request-id id-1; hint: the resource has no `)
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
		if n := strings.Count(logged.String(), "not shown"); n < len(forms) {
			t.Errorf("key %q: %d lines of %d requests", key, n, len(forms))
		}
	}
}

// TestTokenNeverGetsIntoTheLog: the upstream repeats it wherever it can, and the client's key, and
// the identity endpoint does so in a refusal to the next request.
func TestTokenNeverGetsIntoTheLog(t *testing.T) {
	const key = "open-sesame"
	signature := strings.Repeat("s1gnature", 38)
	token := "eyJ0eXAiOiJKV1Qi." + strings.Repeat("payload", 140) + "." + signature
	tests := []struct{ name, answer, want string }{
		{"reason phrase", "HTTP/1.1 403 TOKEN KEY\r\nContent-Length: 0\r\n\r\n",
			": answered 403 Forbidden; hint: "},
		{"reason phrase of no status", "HTTP/1.1 529 TOKEN\r\nContent-Length: 0\r\n\r\n", ": answered 529"},
		{"Retry-After", "HTTP/1.1 429 No\r\nRetry-After: TOKEN\r\nContent-Length: 0\r\n\r\n",
			"answered 429 Too Many Requests; hint: too many"},
		{"request id", "HTTP/1.1 500 No\r\nApim-Request-Id: TOKEN\r\nContent-Length: 0\r\n\r\n",
			"answered 500 Internal Server Error\n"},
		{"request id, forged", "HTTP/1.1 500 No\r\nApim-Request-Id: a\xe2\x80\xa8b\r\n" +
			"Content-Length: 0\r\n\r\n", "answered 500 Internal Server Error\n"},
		{"body", "HTTP/1.1 400 No\r\n\r\n" +
			`{"error":{"code":"TOKEN","type":"TOKEN","param":"TOKEN","message":"TOKEN a prompt KEY"}}`,
			"answered 400 Bad Request\n"},
		{"status line", "TOKEN KEY\r\n\r\n", "the answer is not HTTP"},
		{"status", "HTTP/1.1 TOKEN KEY\r\n\r\n", "the answer is not HTTP"},
		{"header line", "HTTP/1.1 200 OK\r\nTOKEN KEY\r\n\r\n", "the answer is not HTTP"},
		{"length", "HTTP/1.1 200 OK\r\nContent-Length: TOKEN\r\n\r\n", "no answer from "},
		{"framing", "HTTP/1.1 200 OK\r\nTransfer-Encoding: TOKEN\r\n\r\n", "no answer from "},
		{"chunk", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nTOKEN\r\n", "answer cut: "},
		{"trailer", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nTOKEN KEY\r\n\r\n",
			"answer cut: "},
	}
	fill := strings.NewReplacer("TOKEN", token, "KEY", key, "SIGNATURE", signature)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			logged := followLog(t)
			identity := newFakeIdentity(t)
			identity.answerWith(refuse(200, "", tokenAnswer(token, time.Hour)))
			p := startProxy(t, identity, newUpstream(t, answerRaw(fill.Replace(tt.answer))),
				vars{"EXPECTED_KEY": key})
			_, r := p.dial(t, "GET /x HTTP/1.1\r\nHost: {host}\r\napi-key: "+key+"\r\nConnection: close\r\n\r\n")
			answer, _ := io.ReadAll(r)
			logged.waitFor(t, strings.TrimSuffix(tt.want, "\n"))
			identity.answerWith(refuse(400, "", fill.Replace("TOKEN TOKEN")))
			held, _ := p.tokens.await(context.Background())
			p.tokens.rejected(held)
			logged.waitFor(t, "no new token: IMDS at ")
			text := logged.String()
			if !strings.Contains(text, tt.want) {
				t.Errorf("got %s, want %q", text, tt.want)
			}
			if bytes.HasPrefix(answer, []byte("HTTP/1.1 502 ")) {
				text += string(answer)
			}
			for _, never := range []string{signature[:30], signature[312:], key, "\xe2\x80\xa8"} {
				if strings.Contains(text, never) {
					t.Errorf("%q is told: %s", never, text)
				}
			}
		})
	}
}

// TestUnsolicitedAnswerIsNotLogged: net/http's transport would quote what comes after an answer, and
// that can be the end of a token alone.
func TestUnsolicitedAnswerIsNotLogged(t *testing.T) {
	identity := newFakeIdentity(t)
	closed := make(chan bool)
	upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		conn, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhiHTTP/1.1 400 s1gnature")
		io.Copy(io.Discard, buffered) // until the proxy has noticed
		closed <- true
	})
	p := startProgram(t, safetyNet, vars{"TARGET_URL": upstream.URL, "PORT": "0",
		"HOST": "127.0.0.1", "AZURE_POD_IDENTITY_AUTHORITY_HOST": identity.URL})
	resp, err := http.Get("http://" + p.listens(t) + "/x")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	<-closed
	p.Process.Kill()
	if _, text := p.end(); strings.Contains(text, "s1gnature") {
		t.Error(text)
	}
}

// TestWhatTheClientSaysIsBoundedInTheLog: a line has some hundred bytes of it.
func TestWhatTheClientSaysIsBoundedInTheLog(t *testing.T) {
	logged := followLog(t)
	p := startProxy(t, newFakeIdentity(t), newUpstream(t, http.NotFound), nil)
	logged.waitFor(t, "token ready")
	started := len(logged.String())
	long := strings.Repeat("A", 20_000)
	for _, line := range []string{"GET /" + long, "GET /x?" + long, long + " /x", "GET /x?" + long +
		"%zz",
		"GET /" + strings.Repeat("%e2%80%a8", 2000)} {
		resp, _ := p.do(t, line+" HTTP/1.1\r\nHost: {host}\r\n\r\n")
		if resp.StatusCode != 404 {
			t.Errorf("%.9s: got %d", line, resp.StatusCode)
		}
	}
	for _, line := range strings.Split(logged.String()[started:], "\n") {
		isComplete := strings.Contains(line, " from 127.0.0.1:") || strings.Contains(line, " after ")
		if len(line) > 500 || line != "" && !isComplete {
			t.Errorf("a line of %d bytes: %s", len(line), line)
		}
	}
}

// TestReasonOfARefusalIsLogged: its code and parameter, never its message, and what to do about it.
func TestReasonOfARefusalIsLogged(t *testing.T) {
	const lacks = "; hint: the identity with object id 123 lacks the role "
	const openAI, claude = "/v1/x", "/v1/messages"
	tests := []struct {
		name, target string
		status       int
		body, want   string
	}{
		{"Azure OpenAI", openAI, 418, `{"error":{"message":"LEAK","type":"LEAK","param":"max_tokens",` +
			`"code":"unsupported_parameter"}}`, ": unsupported_parameter, param max_tokens"},
		{"Claude", claude, 418, `{"type":"error","error":{"type":"not_found_error","message":"LEAK"}}`,
			": not_found_error"},
		{"an index", openAI, 418, `{"error":{"code":"a","param":"messages[0].content"}}`,
			": a, param messages[0].content"},
		{"parameter alone", openAI, 418, `{"error":{"param":"n"}}`, ", param n"},
		{"null", openAI, 418, `{"error":{"code":null,"type":null,"param":null}}`, ""},
		{"number beside a parameter", openAI, 418, `{"error":{"code":400,"param":"n"}}`, ", param n"},
		{"words", openAI, 418, `{"error":{"code":"LEAK! no code","param":"LEAK\n"}}`, ""},
		{"too long", openAI, 418, `{"error":{"code":"` + strings.Repeat("LEAK", 17) + `"}}`, ""},
		{"object", openAI, 418, `{"error":{"code":{"LEAK":1},"param":["LEAK"]}}`, ""},
		{"error of text", openAI, 418, `{"error":"LEAK"}`, ""},
		{"not JSON", openAI, 418, `LEAK`, ""},

		{"role", openAI, 401, `{"error":{"code":"PermissionDenied"}}`,
			": PermissionDenied" + lacks + "Cognitive Services OpenAI User on"},
		{"role, without a reason", openAI, 401, ``, lacks + "Cognitive Services OpenAI User on"},
		{"role for Claude", claude, 403, `{"error":{"message":"no permission"}}`,
			lacks + "Cognitive Services User on"},
		{"audience", openAI, 401, `{"error":{"message":"token is missing, audience is incorrect"}}`,
			"; hint: the token is for https://a.example: if the service wants another audience"},
		{"network", openAI, 403, `{"error":{"message":"Access denied due to Firewall rules."}}`,
			"; hint: a network rule or policy"},
		{"deployment", openAI, 404, `{"error":{"code":"DeploymentNotFound"}}`,
			": DeploymentNotFound; hint: the resource has no deployment of this name"},
		{"path", openAI, 404, `{"error":{"code":"404","message":"Resource not found"}}`,
			": 404; hint: there is no such path"},
		{"regional endpoint", openAI, 400, `Please provide a custom subdomain for token authentication`,
			"; hint: a regional endpoint takes no tokens"},
		{"gateway's key", openAI, 401, `Access denied due to missing subscription key.`,
			"; hint: the gateway wants a key of its own"},
		{"web page", openAI, 503, `<!DOCTYPE html><HTML>`, "; hint: a web page answered"},
		{"quota", openAI, 429, ``, "; hint: too many requests or tokens"},
	}
	const jwt = "e30.eyJhdWQiOiJodHRwczovL2EuZXhhbXBsZSIsIm9pZCI6IjEyMyJ9.sig"
	identity := newFakeIdentity(t)
	identity.answerWith(refuse(200, "", tokenAnswer(jwt, time.Hour)))
	packed := func(text string) string {
		var buf strings.Builder
		w := gzip.NewWriter(&buf)
		io.WriteString(w, text)
		w.Close()
		return buf.String()
	}
	for _, tt := range tests {
		for _, encoding := range []string{"", "gzip"} {
			logged := followLog(t)
			upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
				body := tt.body
				if encoding != "" {
					w.Header().Set("Content-Encoding", encoding)
					body = packed(body)
				}
				w.WriteHeader(tt.status)
				io.WriteString(w, body)
			})
			p := startProxy(t, identity, upstream, nil)
			p.do(t, "POST "+tt.target+" HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n")
			line, _ := logged.waitFor(t, " after ")
			_, got, _ := strings.Cut(line, ": answered ")
			want := strconv.Itoa(tt.status) + " " + http.StatusText(tt.status) + tt.want
			if !strings.HasPrefix(got, want) || tt.status == 418 && got != want ||
				strings.Contains(logged.String(), "LEAK") {
				t.Errorf("%s, encoding %q: got %s, want %q", tt.name, encoding, line, want)
			}
		}
	}
}

// TestDebugTellsOfEveryTokenAndAnswer, once.
func TestDebugTellsOfEveryTokenAndAnswer(t *testing.T) {
	logged := followLog(t)
	upstream := newUpstream(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Apim-Request-Id", "id-1")
		io.WriteString(w, "LEAK")
	})
	p := startProxy(t, newFakeIdentity(t), upstream, vars{"AZURE_LOG_LEVEL": "debug"})
	logged.waitFor(t, "token ready: ")
	held, _ := p.tokens.current()
	p.tokens.rejected(held)
	logged.waitFor(t, "token ready: ")
	p.do(t, "GET /x HTTP/1.1\r\nHost: {host}\r\n\r\n")
	line, _ := logged.waitFor(t, " after ")
	if !strings.HasSuffix(line, ": answered 200 OK; apim-request-id id-1") ||
		strings.Contains(logged.String(), "LEAK") {
		t.Errorf("got %s", logged)
	}
}

// Fuzz targets.

func FuzzPath(f *testing.F) {
	for _, target := range []string{"/openai/v1", "//elsewhere/", "/..%2f", "/%252e%252e/x",
		"/a\\..\\b", "/x?api-key=K&a", "/%2e", "/openai/openai", "/anthropic/v1/messages",
		"/v1/anthropic/x", "//anthropic//", "/v1/x?api-version=2024", "/deployments/D/x"} {
		f.Add(target)
	}
	f.Fuzz(func(t *testing.T, requestTarget string) {
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader("GET " + requestTarget +
			" HTTP/1.1\r\nHost: localhost\r\n\r\n")))
		if err != nil {
			return
		}
		for base, roots := range map[string][]string{
			"https://a.example/openai/":       {"/openai/", "/anthropic/v1/"},
			"https://a.example/gw/anthropic/": {"/gw/openai/", "/gw/anthropic/"},
			"https://a.example":               {"/openai/", "/anthropic/v1/"},
			"https://a.example/models":        {"/models/"},
		} {
			to, err := parseTarget(base)
			if err != nil {
				t.Fatal(err)
			}
			forward := &forwarder{target: to}
			if forward.checkCaller(r) != nil {
				continue
			}
			req := forward.upstreamRequest(r, nil)
			line := req.URL.RequestURI()
			isBelow := func(root string) bool { return strings.HasPrefix(line, root) }
			if req.URL.Host != "a.example" || !slices.ContainsFunc(roots, isBelow) {
				t.Errorf("%q leaves %s: %q", requestTarget, base, line)
			}
			path, query, _ := strings.Cut(line, "?")
			for range 5 {
				for _, segment := range strings.FieldsFunc(path,
					func(r rune) bool { return r == '/' || r == '\\' }) {
					if segment == ".." || segment == "." {
						t.Errorf("%q climbs: %q", requestTarget, line)
					}
				}
				if decoded, err := url.PathUnescape(path); err == nil {
					path = decoded
				}
			}
			if values, _ := url.ParseQuery(query); values.Has("api-key") {
				t.Errorf("%q keeps its key: %q", requestTarget, line)
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
		for _, upgrade := range []string{"", "websocket"} {
			r.Header.Set("Upgrade", upgrade)
			for name, values := range upstreamHeader(r) {
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
