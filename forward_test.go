package main

// The tests of main.go and forward.go: first helpers and fakes, then main.go (settings, start,
// routes, stop, -check), then forward.go in the order of its code, and last the fuzz targets. The
// fake identity endpoint is in imds_test.go.

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	goversion "go/version"
	"io"
	"log"
	"maps"
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

// nobody listens there: it is a port below 1024 that no test is given.
const nobody = "http://127.0.0.1:1"

// noIdentity is what IMDS says on a host without one.
const noIdentity = `{"error":"invalid_request","error_description":"Identity not found"}`

// eventually waits until something holds that no channel tells of.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(safetyNet); !holds(); runtime.Gosched() {
		if time.Now().After(end) {
			stacks := make([]byte, 1<<20)
			t.Fatalf("still not so: %s\n%s", what, stacks[:runtime.Stack(stacks, true)])
		}
	}
}

// vars is an environment.
type vars map[string]string

func (v vars) get(name string) string { return v[name] }

// parseVars reads NAME=value and NAME=value, with a separator between the two.
func parseVars(text, separator string) vars {
	env := make(vars)
	for _, field := range strings.Split(text, separator) {
		name, value, _ := strings.Cut(field, "=")
		env[name] = value
	}
	return env
}

// serving is an environment for a proxy on any free port, with more beside that.
func serving(target, identityURL string, more vars) vars {
	env := vars{"TARGET_URL": target, "PORT": "0", "HOST": "127.0.0.1",
		"AZURE_POD_IDENTITY_AUTHORITY_HOST": identityURL}
	maps.Copy(env, more)
	return env
}

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
	before := logger.Writer()
	logger.SetOutput(lineWriter{l})
	t.Cleanup(func() { logger.SetOutput(before) })
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
	identity  *fakeIdentity
	log       *testLog
	listeners []net.Listener
	addr      string // "127.0.0.1:40001"
	signals   chan os.Signal
	stopped   chan struct{} // closed when serve has returned
}

// newProxy makes a proxy with the settings env, in which URL is the upstream's. Without a
// TARGET_URL it is in front of that, and without an identity endpoint it has a fakeIdentity.
func newProxy(t testing.TB, upstream *httptest.Server, env vars) *testProxy {
	t.Helper()
	p := &testProxy{
		identity: newFakeIdentity(t),
		log:      followLog(t),
		signals:  make(chan os.Signal, 9),
		stopped:  make(chan struct{}),
	}
	settings := serving("URL/openai/", p.identity.URL, env)
	settings["TARGET_URL"] = strings.Replace(settings["TARGET_URL"], "URL", upstream.URL, 1)
	cfg, err := loadConfig(settings.get)
	if err != nil {
		t.Fatal(err)
	}
	p.service = newService(cfg)
	if upstream.TLS != nil {
		client := upstream.Client().Transport.(*http.Transport).TLSClientConfig
		p.forwarder.transport.TLSClientConfig.RootCAs = client.RootCAs
	}
	return p
}

// start starts the proxy, and stops it at the end of the test.
func (p *testProxy) start(t testing.TB) *testProxy {
	t.Helper()
	var err error
	for range 10 { // with PORT=0 a port that is free on one address may be taken on the next
		if p.listeners, err = listen(p.cfg); err == nil {
			break
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(p.listeners[0].Addr().String())
	p.addr = net.JoinHostPort("127.0.0.1", port)
	go func() {
		defer close(p.stopped)
		if err := p.serve(p.listeners, p.signals); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() {
		p.signals <- syscall.SIGTERM // drain
		p.signals <- syscall.SIGTERM // at once
		p.waitStopped(t)
		p.waitIdle(t) // its handlers end soon after, and must not log in the next test
		p.forwarder.transport.CloseIdleConnections()
	})
	return p
}

// startProxy starts a proxy in front of an upstream that answers by handler.
func startProxy(t testing.TB, handler http.HandlerFunc, env vars) *testProxy {
	t.Helper()
	return newProxy(t, newUpstream(t, handler), env).start(t)
}

// startRecorded starts a proxy in front of an upstream that answers 200, and keeps what it got.
func startRecorded(t testing.TB, env vars) (*testProxy, chan *http.Request) {
	t.Helper()
	got := make(chan *http.Request, 999)
	return startProxy(t, func(_ http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err == nil {
			got <- r
		}
	}, env), got
}

// only returns the one request that the upstream has got by now.
func only(t testing.TB, got chan *http.Request) *http.Request {
	t.Helper()
	if len(got) != 1 {
		t.Fatalf("upstream got %d requests, want 1", len(got))
	}
	return <-got
}

func (p *testProxy) waitStopped(t testing.TB) {
	t.Helper()
	select {
	case <-p.stopped:
	case <-time.After(safetyNet):
		t.Fatal("the proxy does not stop")
	}
}

// waitIdle waits until no request and no tunnel is under way.
func (p *testProxy) waitIdle(t testing.TB) {
	t.Helper()
	eventually(t, "no request is under way", func() bool { return p.forwarder.streams.Load() == 0 })
}

// dial connects to the proxy and writes text, in which {host} stands for its address.
func (p *testProxy) dial(t testing.TB, text string) *testConn {
	t.Helper()
	return dial(t, p.addr, text)
}

// testConn is an end of a connection with a proxy, bounded in time.
type testConn struct {
	net.Conn
	r    *bufio.Reader
	sent string // last
}

func dial(t testing.TB, addr, text string) *testConn {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(safetyNet))
	c := &testConn{Conn: conn, r: bufio.NewReader(conn)}
	c.send(text)
	return c
}

// send writes text. If that fails, reading will, too.
func (c *testConn) send(text string) {
	c.sent = strings.ReplaceAll(text, "{host}", c.RemoteAddr().String())
	io.WriteString(c, c.sent)
}

func (c *testConn) Read(p []byte) (int, error) { return c.r.Read(p) }

// CloseWrite ends this side's half of the connection.
func (c *testConn) CloseWrite() { c.Conn.(interface{ CloseWrite() error }).CloseWrite() }

// head reads the head of the next answer that is no 100 Continue.
func (c *testConn) head(t testing.TB) *http.Response {
	t.Helper()
	for {
		method, _, _ := strings.Cut(c.sent, " ")
		resp, err := http.ReadResponse(c.r, &http.Request{Method: method})
		if err != nil {
			t.Fatalf("no answer to %.200q: %v", c.sent, err)
		}
		if resp.StatusCode != http.StatusContinue {
			return resp
		}
	}
}

// answer reads the next answer whole.
func (c *testConn) answer(t testing.TB) (*http.Response, string) {
	t.Helper()
	resp := c.head(t)
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("answer to %.200q cut: %v", c.sent, err)
	}
	return resp, string(body)
}

// want reads the next answer whole, and wants a status and a text in its body.
func (c *testConn) want(t testing.TB, status int, text string) *http.Response {
	t.Helper()
	resp, body := c.answer(t)
	if resp.StatusCode != status || !strings.Contains(body, text) {
		t.Errorf("%.200q: got %d %v %s, want %d %q", c.sent, resp.StatusCode, resp.Header, body,
			status, text)
	}
	return resp
}

// untilClosed uses an echoing tunnel until it is closed. The end of a drain does not wait for that.
func (c *testConn) untilClosed(t testing.TB) {
	t.Helper()
	var err error
	for err == nil {
		io.WriteString(c, "x")
		_, err = c.r.ReadByte()
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the tunnel is still open: %v", err)
	}
}

// wantNext reads as many bytes as want has.
func wantNext(t testing.TB, r io.Reader, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(r, got); err != nil || string(got) != want {
		t.Fatalf("got %q, %v; want %q", got[:n], err, want)
	}
}

// request is the head of a request, with its fields after Host.
func request(line string, fields ...string) string {
	return line + " HTTP/1.1\r\nHost: {host}\r\n" + strings.Join(append(fields, "\r\n"), "\r\n")
}

const (
	webSocket = "Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n" +
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
	switching = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n" +
		"Upgrade: websocket\r\n"
)

// openStream asks for the stream of a heldUpstream and reads its first event.
func openStream(t testing.TB, addr string) io.Reader {
	t.Helper()
	body := dial(t, addr, request("GET /stream")).head(t).Body
	wantNext(t, body, "data: 1\n\n")
	return body
}

// openTunnel opens a tunnel through the proxy.
func openTunnel(t testing.TB, addr string) *testConn {
	t.Helper()
	conn := dial(t, addr, request("GET /v1/realtime", webSocket))
	if resp := conn.head(t); resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("upgrade: got %d", resp.StatusCode)
	}
	return conn
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

// newTLSUpstream is one that speaks TLS, and HTTP/2 to whom wants that.
func newTLSUpstream(t testing.TB, handler http.HandlerFunc) *httptest.Server {
	t.Helper()
	s := httptest.NewUnstartedServer(handler)
	s.EnableHTTP2 = true
	s.Config.ErrorLog = log.New(io.Discard, "", 0) // of clients that do not trust it
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

// schemes are the kinds of an upstream.
var schemes = map[string]func(testing.TB, http.HandlerFunc) *httptest.Server{
	"http": newUpstream, "https": newTLSUpstream}

// heldUpstream wants a token of a fakeIdentity and nothing else. It has a stream of two events, the
// second of which release lets go, and tunnels that echo up to a dot, even unasked. Else: {}.
func heldUpstream(t testing.TB) (handler http.HandlerFunc, release chan struct{}) {
	release = make(chan struct{})
	return func(w http.ResponseWriter, r *http.Request) {
		isToken := strings.HasPrefix(r.Header.Get("Authorization"), "Bearer token-")
		switch {
		case !isToken || r.Header.Get("Api-Key") != "":
			answer(401, "")(w, r)
		case r.Header.Get("Upgrade") != "", strings.HasSuffix(r.URL.Path, "/unasked"):
			conn := acceptTunnel(t, w)
			defer conn.Close()
			for b := make([]byte, 1); b[0] != '.'; conn.Write(b) {
				if _, err := conn.Read(b); err != nil {
					return
				}
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
			io.WriteString(w, "{}")
		}
	}, release
}

// acceptTunnel is what an upstream does to become one end of a tunnel. Its 101 has fields in it.
func acceptTunnel(t testing.TB, w http.ResponseWriter, fields ...string) *testConn {
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		t.Error(err)
		panic(http.ErrAbortHandler)
	}
	io.WriteString(conn, switching+strings.Join(append(fields, "\r\n"), "\r\n"))
	return &testConn{Conn: conn, r: buffered.Reader}
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
		"GOCOVERDIR=" + p.Dir,      // with -cover it would write a line
		"AZURE_POD_IDENTITY_AUTHORITY_HOST=" + nobody}
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

// zeros has no end.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// main.go: the settings and the start.

// loadSettings loads TARGET_URL and the settings of text: NAME=value|NAME=value.
func loadSettings(text string) (*config, error) {
	return loadConfig(parseVars("TARGET_URL=https://b.example/openai/|"+text, "|").get)
}

func TestSettings(t *testing.T) {
	const azure = "https://cognitiveservices.azure"
	tests := []struct{ name, setting, want string }{
		{"defaults", "", "https://b.example/openai/ root=/ host= port=8081 key= scope="},
		{"defaults", "", azure + ".com/.default debug=false delay=0s"},
		{"empty is unset", "PORT=", "port=8081 "},
		{"white space trimmed", "EXPECTED_KEY=\tk\n", "key=k "},
		{"brackets around HOST", "HOST=[::1]", "host=::1 "},
		{"missing slash supplied", "TARGET_URL=https://b.example/openai", "/openai/ root=/ "},
		{"v1 in the target", "TARGET_URL=https://b.example/openai/v1", "/openai/v1/ root=/ "},
		{"Claude", "TARGET_URL=https://b.example/anthropic/", "/anthropic/ root=/ "},
		{"no path", "TARGET_URL=https://b.example", "https://b.example/openai/ root=/ "},
		{"path of a gateway", "TARGET_URL=https://b.example/gw/openai/", "root=/gw/ "},
		{"gateway without an API", "TARGET_URL=https://b.example/v1/", "/v1/ root= "},
		{"name that ends like an API", "TARGET_URL=https://b.example/xopenai/", "root= "},
		{"escapes kept", "TARGET_URL=https://b.example/a%2Fb/openai", "root=/a%2Fb/ "},
		{"US Government", "TARGET_URL=https://a.openai.azure.us/", azure + ".us/.default "},
		{"China, in capitals", "TARGET_URL=https://A.AZURE.CN:443/", azure + ".cn/.default "},
		{"US Government, final dot", "TARGET_URL=https://a.azure.us./", azure + ".us/.default "},
		{"azure.us in the midst", "TARGET_URL=https://azure.us.example/", azure + ".com/.default "},
		{"project", "TARGET_URL=https://b.example/api/projects/p", "https://ai.azure.com/.default"},
		{"project's API", "TARGET_URL=https://b.example/api/projects/p", "/p/ root=/api/projects/p/ "},
		{"API of a project", "TARGET_URL=https://b.example/api/projects/p/openai", "root=/api/proj"},
		{"below a project", "TARGET_URL=https://b.example/api/projects/p/agents", "/agents/ root= "},
		{"scope set", "AZURE_OPENAI_SCOPE=api://x/.default", "scope=api://x/.default "},
		{"http for localhost", "TARGET_URL=http://LOCALHOST.:1/openai", ":1/openai/ "},
		{"http for ::1", "TARGET_URL=http://[::1]:1/openai", "http://[::1]:1/openai/ "},
		{"delay of the drain", "DRAIN_DELAY=1m30s", "delay=1m30s"},
		{"proxy", "HTTPS_PROXY=http://jane:Ses%25ame@127.0.0.1:3128", "port=8081"},
		{"proxy without scheme", "HTTPS_PROXY=proxy.example:3128", "port=8081"},
		{"debug in capitals", "AZURE_LOG_LEVEL=DEBUG", "debug=true"},
		{"Arc with a key", "IDENTITY_ENDPOINT=http://a|IMDS_ENDPOINT=b|EXPECTED_KEY=k", "key=k "},
	}
	for _, tt := range tests {
		cfg, err := loadSettings(tt.setting)
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
	const base, encoded = "https://my-aoai.openai.azure.com/openai/", "percent-encoded"
	tests := []struct{ name, setting, right string }{
		{"target unset", "TARGET_URL=", "no .env file is read (make run does that"},
		{"target without scheme", "TARGET_URL=b.example/openai/", base},
		{"target without host", "TARGET_URL=https://:443/openai/", base},
		{"target with a wrong escape", "TARGET_URL=https://b.example/%zz-s3cret", base},
		{"target that is a key", "TARGET_URL=s3cret", base},
		{"target for another protocol", "TARGET_URL=ftp://b.example/openai/", base},
		{"target with a password", "TARGET_URL=https://user:s3cret@b.example/openai/", base},
		{"target with a key", "TARGET_URL=https://b.example/openai/?api-key=s3cret", base},
		{"target with a fragment", "TARGET_URL=https://b.example/openai/#s3cret", base},
		{"target with a dot segment", "TARGET_URL=https://b.example/%2e%2E/s3cret", base},
		{"target escaped twice", "TARGET_URL=https://b.example/%252e%252e/s3cret", base},
		{"several targets", "TARGET_URL=https://b.example/ https://c.example/", "one is enough"},
		{"http over a network", "TARGET_URL=http://10.0.0.4/openai/", "want https"},
		{"http for a name like localhost", "TARGET_URL=http://localhost.example/", "want https"},
		{"http with a long s", "TARGET_URL=http://localho\u017ft:1/openai/", "want https"},
		{"proxy with a bare %", "HTTPS_PROXY=http://jane:s3cret%ame@127.0.0.1:3128", encoded},
		{"proxy with a bare %, lower case", "https_proxy=http://j:s3cret%a@127.0.0.1", encoded},
		{"proxy with a bare %, no scheme", "HTTPS_PROXY=j:s3cret%ame@127.0.0.1:3128", encoded},
		{"proxy of white space", "HTTPS_PROXY=\t", encoded},
		{"port that is a name", "PORT=http", "from 0 to 65535 such as 8081"},
		{"port above 65535", "PORT=65536", "from 0 to 65535 such as 8081"},
		{"delay without a unit", "DRAIN_DELAY=10", "such as 10s"},
		{"negative delay", "DRAIN_DELAY=-1s", "such as 10s"},
		{"IMDS without scheme", "AZURE_POD_IDENTITY_AUTHORITY_HOST=169.254.169.254", "want a URL"},
		{"Arc, whose tokens are for root alone", "EXPECTED_KEY=|IDENTITY_ENDPOINT=http://a|" +
			"IMDS_ENDPOINT=b", "not set, but Azure Arc"},
	}
	for _, tt := range tests {
		_, err := loadSettings(tt.setting)
		text := fmt.Sprint(err)
		name, _, _ := strings.Cut(tt.setting, "=")
		if !strings.HasPrefix(text, name+": ") || !strings.Contains(text, tt.right) {
			t.Errorf("%s: got %q, want %s and %q", tt.name, text, name, tt.right)
		}
		if strings.Contains(text, "s3cret") || strings.Contains(text, "\n") {
			t.Errorf("%s: the error shows a secret or has a line break: %q", tt.name, text)
		}
	}
}

// TestProgramSaysWhatItIsAskedOrWhatIsWrong: what it is asked on stdout, what is wrong in one line
// on stderr and by its exit status.
func TestProgramSaysWhatItIsAskedOrWhatIsWrong(t *testing.T) {
	upstream := newTLSUpstream(t, answer(200, `{}`))
	ca := filepath.Join(t.TempDir(), "ca.pem")
	writeFile(t, ca, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE",
		Bytes: upstream.Certificate().Raw})))
	fine := serving(upstream.URL, newFakeIdentity(t).URL, vars{"SSL_CERT_FILE": ca})
	taken := strings.TrimPrefix(newUpstream(t, nil).URL, "http://127.0.0.1:")
	with := func(port string) vars { return serving(nobody, nobody, vars{"PORT": port}) }
	tests := []struct {
		name, arg      string
		env            vars
		status         int
		stdout, stderr string
	}{
		{"help", "-h", nil, 0, usage, ""},
		{"help with two dashes", "--help", nil, 0, usage, ""},
		{"version", "-version", nil, 0, runtime.Version(), ""},
		{"a CA of one's own", "-check", fine, 0, "ok    upstream: ", "token ready"},

		{"failed check", "-check", with("x"), 1, "FAIL  settings: ", "settings failed the check"},
		{"a .env alone", "", nil, 78, "", "TARGET_URL: not set, and no .env file is read"},
		{"bad port", "", with("http"), 78, "", "PORT: want a number"},
		{"port in use", "", with(taken), 1, "", "a free port such as 8082"},
		{"unknown flag", "-port=1", fine, 1, "", `unexpected argument "-port=1"`},
	}
	for _, tt := range tests {
		if tt.env["SSL_CERT_FILE"] != "" && runtime.GOOS != "linux" {
			continue // SSL_CERT_FILE is not for macOS and Windows
		}
		p := startProgram(t, safetyNet, tt.env, strings.Fields(tt.arg)...)
		status, stderr := p.end()
		says := func(out, want string) bool {
			return strings.Contains(out, want) && (out == "") == (want == "")
		}
		if out := p.stdout.String(); status != tt.status || !says(out, tt.stdout) ||
			!says(stderr, tt.stderr) || strings.Count(stderr, "\n") > 1 ||
			strings.HasPrefix(stderr, "aoai-proxy: ") != (status != 0) {
			t.Errorf("%s: got exit status %d, %q and %q", tt.name, status, out, stderr)
		}
	}
}

// TestEveryVariableIsInTheUsageText: what the source reads, and what README.md says may be set.
func TestEveryVariableIsInTheUsageText(t *testing.T) {
	const inCode = `(?:env|isSet)\("([A-Za-z_]{4,})"\)|variable = "([A-Z_]+)"|` +
		`(HTTPS_PROXY|NO_PROXY|SSL_CERT_FILE|SSL_CERT_DIR)`
	const inREADME = "(?m)^\\| `([A-Z_]+)` "
	listed := regexp.MustCompile(`[A-Za-z_]+`).FindAllString(usage, -1)
	seen := make(map[string]bool)
	for file, pattern := range map[string]string{"main.go": inCode, "imds.go": inCode,
		"forward.go": inCode, "README.md": inREADME} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, match := range regexp.MustCompile(pattern).FindAllStringSubmatch(string(text), -1) {
			name := strings.Join(match[1:], "")
			seen[name] = true
			if !slices.Contains(listed, name) {
				t.Errorf("%s of %s is not in the usage text", name, file)
			}
		}
	}
	if len(seen) < 23 {
		t.Errorf("found %d variables only: %v", len(seen), seen)
	}
}

// TestLostLogEndsNothing: whoever reads stderr may go away.
func TestLostLogEndsNothing(t *testing.T) {
	p := startProgram(t, safetyNet, serving(nobody, newFakeIdentity(t).URL, nil))
	addr := p.listens(t)
	p.pipe.Close()
	for range 3 {
		dial(t, addr, request("GET /v1/models")).want(t, 502, "")
	}
}

// TestListensWhereHostSays, and on loopback without it, whatever the key.
func TestListensWhereHostSays(t *testing.T) {
	const local = "no EXPECTED_KEY: every user of this host, and nobody else"
	ln, err := net.Listen("tcp", "[::1]:0")
	if err == nil { // this host has IPv6
		ln.Close()
	}
	isMissing := func(host string) bool { return err != nil && strings.Contains(host, ":") }
	tests := []struct{ name, host, key, hosts, says string }{
		{"neither", "", "", "127.0.0.1 ::1", local},
		{"key", "", "k", "127.0.0.1 ::1", "only if HOST lets them in (HOST=0.0.0.0)"},
		{"host", "127.0.0.1", "", "127.0.0.1", local},
		{"host and key", "127.0.0.1", "k", "127.0.0.1", "EXPECTED_KEY is set: whoever has the key"},
		{"IPv6 host", "[::1]", "", "::1", local},
		{"every IPv4 address", "0.0.0.0", "", "0.0.0.0", "warning: no EXPECTED_KEY: whoever"},
		{"every address", "::", "k", "::", "EXPECTED_KEY is set: whoever has the key"},
	}
	for _, tt := range tests {
		if isMissing(tt.host) {
			continue
		}
		p := startProxy(t, nil, vars{"HOST": tt.host, "EXPECTED_KEY": tt.key})
		_, port, _ := net.SplitHostPort(p.addr)
		hosts := slices.DeleteFunc(strings.Fields(tt.hosts), isMissing)
		if len(p.listeners) != len(hosts) {
			t.Fatalf("%s: %d listeners, want %q", tt.name, len(p.listeners), hosts)
		}
		for i, host := range hosts {
			addr := net.JoinHostPort(host, port)
			if got := p.listeners[i].Addr().String(); got != addr {
				t.Errorf("%s: it listens on %s, want %s", tt.name, got, addr)
			}
			p.log.waitFor(t, "proxy listening on "+addr+" ➜ "+p.cfg.target.base.String())
			dial(t, addr, request("GET /healthz")).want(t, 200, "ok")
		}
		p.log.waitFor(t, tt.says)
	}
}

// TestClientThatSpeaksTLSIsTold, once for a connection. Its user sees nothing of that.
func TestClientThatSpeaksTLSIsTold(t *testing.T) {
	p := startProxy(t, nil, nil)
	p.dial(t, request("GET /healthz")).answer(t)
	if _, err := http.Get("https://" + p.addr + "/v1/models"); err == nil {
		t.Error("the proxy speaks TLS")
	}
	p.log.waitFor(t, "speaks TLS")
	conn := p.dial(t, "\x16") // begins a TLS record
	line, _ := p.log.waitFor(t, "speaks TLS")
	want := "client " + conn.LocalAddr().String() + " speaks TLS: give it http:// in its base URL"
	conn.send("\x16\r\n\r\n")
	io.ReadAll(conn)
	if !strings.HasSuffix(line, want) || strings.Count(p.log.String(), want) != 1 {
		t.Errorf("got %s, want %q once", p.log, want)
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
		{"at the limit", token[:maxLine] + "\n", token[:maxLine] + "\n"},
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
	forwarded := func(http.ResponseWriter, *http.Request) { t.Error("a probe was forwarded") }
	none := newProxy(t, newUpstream(t, forwarded), nil)
	none.identity.answerWith(answer(400, noIdentity))
	none.start(t).log.waitFor(t, "no token")
	fine := startProxy(t, forwarded, vars{"EXPECTED_KEY": "s3cret"})
	fine.log.waitFor(t, "token ready")
	tests := []struct {
		name, line string
		p          *testProxy
		status     int
		body       string
	}{
		{"root", "GET /", fine, 200, "ok\n"},
		{"healthz", "GET /healthz?x=1", fine, 200, "ok\n"},
		{"HEAD healthz", "HEAD /healthz", fine, 200, ""},
		{"base URL", "GET /v1", fine, 200, "ok\n"},
		{"base URL of Claude Code", "HEAD /anthropic", fine, 200, ""},
		{"base URL, doubled", "GET //openai/v1//v1/", fine, 200, "ok\n"},
		{"readyz", "GET /readyz", fine, 200, "ok\n"},
		{"readyz without a token", "GET /readyz", none, 503, "no token\n"},
		{"POST to the root is no probe", "POST /", fine, 401, "invalid_api_key"},
		{"POST to a base URL is no probe", "POST /v1", fine, 401, "invalid_api_key"},
		{"healthz below a base URL is no probe", "GET /v1/healthz", fine, 401, "invalid_api_key"},
	}
	for _, tt := range tests {
		tt.p.dial(t, request(tt.line, "Content-Length: 0")).want(t, tt.status, tt.body)
	}
	if n := strings.Count(fine.log.String(), " from 127.0.0.1:"); n != 3 {
		t.Errorf("%d requests are logged, want the 3 that are no probes: %s", n, fine.log)
	}
}

// TestHTTP10ConnectionsEndWithTheirAnswer: the server ignores the framing of a chunked body there,
// and would take the body for the next request (golang/go#12785).
func TestHTTP10ConnectionsEndWithTheirAnswer(t *testing.T) {
	p := startProxy(t, answer(201, "", "Connection", "Connection, X-Hop", "X-Hop", "h"), nil)
	p.log.waitFor(t, "token ready")
	const smuggled = "GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
	chunk := fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(smuggled), smuggled)
	for line, status := range map[string]string{
		"POST /p": "201", "GET /p": "201", "GET /healthz": "200", "HEAD /": "200",
		"GET /readyz": "200", "POST /../p": "400", "TRACE /p": "405",
	} {
		for _, rest := range []string{smuggled, chunk} {
			conn := p.dial(t, line+" HTTP/1.0\r\nHost: localhost\r\nConnection: keep-alive\r\n"+
				"Transfer-Encoding: chunked\r\n\r\n"+rest)
			got, err := io.ReadAll(conn)
			if errors.Is(err, os.ErrDeadlineExceeded) ||
				!strings.HasPrefix(string(got), "HTTP/1.0 "+status+" ") ||
				strings.Count(string(got), "HTTP/1.") != 1 ||
				!strings.Contains(string(got), "\r\nConnection: close\r\n") {
				t.Errorf("%s: got %q, %v; want one answer and the connection's end", line, got, err)
			}
		}
	}
	if strings.Contains(p.log.String(), "smuggled") {
		t.Errorf("a body became a request: %s", p.log)
	}
}

// main.go: the stop.

// TestSignalsEndTheProgramWithStatusZero: what runs may end by itself, or is broken off by a second
// signal.
func TestSignalsEndTheProgramWithStatusZero(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("has no signals between processes")
	}
	for _, patient := range []bool{true, false} {
		held, release := heldUpstream(t)
		p := startProgram(t, safetyNet, serving(newUpstream(t, held).URL, newFakeIdentity(t).URL,
			vars{"DRAIN_DELAY": "1ms"}))
		addr := p.listens(t)
		stream, tunnel := openStream(t, addr), openTunnel(t, addr)
		p.Process.Signal(syscall.SIGTERM)
		p.stderr.waitFor(t, "draining 2 streams")
		eventually(t, "it accepts no more", func() bool {
			conn, err := net.Dial("tcp", addr)
			if err == nil {
				conn.Close()
			}
			return err != nil
		})
		if patient {
			close(release)
			wantNext(t, stream, "data: 2\n\n")
			if _, err := io.ReadAll(stream); err != nil {
				t.Errorf("after the signal the stream ended with %v", err)
			}
			for range 500 { // the program does not end while there is a tunnel
				io.WriteString(tunnel, "x")
				wantNext(t, tunnel, "x")
			}
			io.WriteString(tunnel, ".") // with Go before 1.24 Close would not get to the upstream
			tunnel.untilClosed(t)
			tunnel.Close()
		} else {
			p.Process.Signal(os.Interrupt)
			if rest, err := io.ReadAll(stream); err == nil {
				t.Errorf("the cut stream ended as if it were whole, with %q", rest)
			}
			tunnel.untilClosed(t)
		}
		status, text := p.end()
		if status != 0 || !strings.Contains(text, " stopped") ||
			strings.Contains(text, "breaking off 2 streams") == patient {
			t.Errorf("patient: %v: got exit status %d and %s", patient, status, text)
		}
	}
}

// TestDrainEndsWhatRunsTooLong: streams, tunnels, and a client that reads nothing of its answer.
func TestDrainEndsWhatRunsTooLong(t *testing.T) {
	held, _ := heldUpstream(t)
	p := newProxy(t, newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/openai/bulk" {
			io.Copy(w, io.LimitReader(zeros{}, 64<<20))
			return
		}
		held(w, r)
	}), nil)
	p.drainTime = 50 * time.Millisecond
	p.start(t)
	stream, tunnel := openStream(t, p.addr), openTunnel(t, p.addr)
	p.dial(t, request("GET /bulk")).head(t)
	p.signals <- syscall.SIGTERM
	p.waitStopped(t)
	if rest, err := io.ReadAll(stream); err == nil {
		t.Errorf("the stream ended as if it were whole, with %q", rest)
	}
	tunnel.untilClosed(t)
}

// TestDrainDelayGoesOnAccepting, and tells balancers and clients that it is ending.
func TestDrainDelayGoesOnAccepting(t *testing.T) {
	p := startProxy(t, answer(200, "{}"), vars{"DRAIN_DELAY": "10m"})
	kept := p.dial(t, request("GET /v1/models"))
	if kept.want(t, 200, "{}").Close {
		t.Fatal("before the signal a connection is closed")
	}
	p.signals <- syscall.SIGTERM
	p.log.waitFor(t, "stopping: accepts for another 10m0s, while /readyz says 503")

	for path, status := range map[string]int{"/readyz": 503, "/healthz": 200, "/v1/models": 200} {
		kept.send(request("GET " + path))
		if resp := kept.want(t, status, ""); !resp.Close {
			t.Errorf("%s: a connection is kept", path)
		}
		if _, err := kept.r.ReadByte(); err != io.EOF {
			t.Errorf("%s: the connection goes on with %v", path, err)
		}
		kept = p.dial(t, "")
	}

	p.signals <- syscall.SIGTERM
	p.waitStopped(t)
	if conn, err := net.Dial("tcp", p.addr); err == nil {
		conn.Close()
		t.Error("after a second signal it accepts")
	}
}

// TestSystemdIsToldOfStartAndStop, over a socket that is a file or has an abstract name. One that
// is not there ends nothing.
func TestSystemdIsToldOfStartAndStop(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("systemd is a program of Linux")
	}
	short, err := os.MkdirTemp("", "") // a socket's name has 108 bytes at most
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(short)
	abstract, missing := fmt.Sprint("@aoai-proxy-", os.Getpid()), short+"/none"
	for _, name := range []string{short + "/notify", abstract, missing} {
		told := func(string) {}
		if name != missing {
			systemd, err := net.ListenPacket("unixgram", name)
			if err != nil {
				t.Fatal(err)
			}
			defer systemd.Close()
			systemd.SetDeadline(time.Now().Add(safetyNet))
			told = func(want string) {
				text := make([]byte, 100)
				if n, _, err := systemd.ReadFrom(text); string(text[:n]) != want {
					t.Errorf("%s: got %q, %v; want %q", name, text[:n], err, want)
				}
			}
		}
		p := startProgram(t, safetyNet, serving(nobody, nobody, vars{"NOTIFY_SOCKET": name,
			"DRAIN_DELAY": "10m"}))
		told("READY=1")
		dial(t, p.listens(t), request("GET /healthz")).want(t, 200, "ok")
		p.Process.Signal(syscall.SIGTERM)
		told("STOPPING=1")
		p.stderr.waitFor(t, "stopping")
		p.Process.Signal(syscall.SIGTERM)
		status, stderr := p.end()
		isLost := strings.Contains(stderr, "NOTIFY_SOCKET: dial unixgram "+missing+": ")
		if status != 0 || isLost != (name == missing) {
			t.Errorf("%s: got exit status %d and %q", name, status, stderr)
		}
	}
}

// TestRestartsOneByOneLoseNothing: three replicas, processes of their own, are restarted under load
// behind a balancer that learns of their state late. It takes half a minute, and so .ci/run asks
// for it by name.
func TestRestartsOneByOneLoseNothing(t *testing.T) {
	if os.Getenv("AOAI_PROXY_ROLLING_RESTART") != "1" {
		t.Skip("AOAI_PROXY_ROLLING_RESTART is not 1")
	}
	identity := newFakeIdentity(t)
	upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/openai/stream" {
			io.WriteString(w, "{}")
			return
		}
		for range 20 {
			io.WriteString(w, "data: 1\n\n")
			http.NewResponseController(w).Flush()
			time.Sleep(100 * time.Millisecond)
		}
	})
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	b := &balancer{}
	replicas := make([]*program, 3)
	start := func(i int) {
		replicas[i] = startProgram(t, 5*time.Minute, serving(upstream.URL, identity.URL,
			vars{"DRAIN_DELAY": "6s"}))
		go b.watch(ctx, replicas[i].listens(t))
	}
	for i := range replicas {
		start(i)
	}
	b.waitFor(t, len(replicas))

	var load sync.WaitGroup
	repeat := func(clients int, pause time.Duration, transport *http.Transport, path, want string) {
		transport.DialContext = b.dial
		client := http.Client{Transport: transport}
		get := func() (string, error) {
			resp, err := client.Get("http://localhost" + path)
			if err != nil {
				return "", err
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			return string(body), err
		}
		for range clients {
			load.Add(1)
			go func() {
				defer load.Done()
				for ; ctx.Err() == nil; time.Sleep(pause) {
					if got, err := get(); err != nil || got != want {
						t.Errorf("%s: got %q, %v", path, got, err)
					}
				}
			}()
		}
	}
	once := &http.Transport{DisableKeepAlives: true}
	keeping := &http.Transport{MaxIdleConnsPerHost: 50}
	repeat(50, 0, once, "/stream", strings.Repeat("data: 1\n\n", 20))
	repeat(20, time.Second, once, "/v1/models", "{}")
	repeat(20, time.Second, keeping, "/v1/models", "{}")

	for i, old := range replicas {
		old.Process.Signal(syscall.SIGTERM)
		old.stderr.waitFor(t, "stopped")
		start(i)
		b.waitFor(t, len(replicas))
	}
	cancel()
	load.Wait()
	keeping.CloseIdleConnections()
}

// balancer connects clients to the replicas that are ready, in turn. It asks each for /readyz every
// second, and learns of the answer 2 s later.
type balancer struct {
	mu    sync.Mutex
	ready []string // addresses
	turn  int
}

// watch asks the replica at addr whether it is ready.
func (b *balancer) watch(ctx context.Context, addr string) {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for ; ctx.Err() == nil; time.Sleep(time.Second) {
		resp, err := client.Get("http://" + addr + "/readyz")
		isReady := err == nil && resp.StatusCode == 200
		if err == nil {
			resp.Body.Close()
		}
		time.AfterFunc(2*time.Second, func() {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.ready = slices.DeleteFunc(b.ready, func(ready string) bool { return ready == addr })
			if isReady {
				b.ready = append(b.ready, addr)
			}
		})
	}
}

// waitFor waits until n replicas are known to be ready.
func (b *balancer) waitFor(t *testing.T, n int) {
	t.Helper()
	eventually(t, fmt.Sprint(n, " replicas are ready"), func() bool {
		time.Sleep(100 * time.Millisecond) // it takes seconds
		b.mu.Lock()
		defer b.mu.Unlock()
		return len(b.ready) == n
	})
}

// dial connects to the next replica, wherever the client wants to go.
func (b *balancer) dial(_ context.Context, network, _ string) (net.Conn, error) {
	b.mu.Lock()
	b.turn++
	addr := b.ready[b.turn%len(b.ready)]
	b.mu.Unlock()
	return net.Dial(network, addr)
}

// TestIdleConnectionsOutliveABalancers, which would otherwise send requests into closing ones.
func TestIdleConnectionsOutliveABalancers(t *testing.T) {
	cfg, _ := loadSettings("")
	if got := newService(cfg).server.IdleTimeout; got <= time.Hour {
		t.Errorf("idle connections are closed after %v, want more than Envoy's hour", got)
	}
}

// TestHalfAHeadIsNotWaitedFor, nor the next request of a kept connection.
func TestHalfAHeadIsNotWaitedFor(t *testing.T) {
	p := newProxy(t, newUpstream(t, nil), nil)
	// Some milliseconds; no limit would stay none.
	p.server.ReadHeaderTimeout /= 300
	p.server.IdleTimeout /= 72_000
	p.start(t)
	for _, sent := range []string{"", "GET /healthz HTT", "GET /healthz HTTP/1.1\r\nHost: x\r\n",
		request("GET /healthz")} {
		if _, err := io.ReadAll(p.dial(t, sent)); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("after %q the connection stays open", sent)
		}
	}
}

// main.go: -check.

func TestCheckTellsWhatIsWrong(t *testing.T) {
	const upstream, noAnswer = "FAIL  upstream: ", "FAIL  upstream: no answer from "
	const get = "GET URL/openai/models?api-version=2024-10-21: answered "
	const fine, refused = "ok    upstream: " + get + "200 OK",
		"FAIL  upstream: " + get + "401 Unauthorized: PermissionDenied"
	const fineClaude = "ok    upstream: POST URL/anthropic/v1/messages: answered 400 Bad " +
		"Request: invalid_request_error"
	const noList = "answered 404 Not Found, as Foundry's model inference has no list; "
	const fineV1 = "ok    upstream: GET URL/openai/v1/models: answered 200 OK"
	const fineProject = "ok    upstream: GET URL/api/projects/p/openai/v1/models: answered 200 OK"
	const lacks = "object id o-1 lacks the role Cognitive Services "
	const cutOff = "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}"
	claims := []byte(`{"aud":"https://b.example","tid":"t-1","oid":"o-1","appid":"c-1"}`)
	jwt := "e30." + base64.RawURLEncoding.EncodeToString(claims) + ".c2lnbmF0dXJl"
	token, none := answer(200, tokenAnswer(jwt, time.Hour)), answer(400, noIdentity)
	opaque := answer(200, tokenAnswer("opaque", time.Hour))
	list, denies := answer(200, `{}`), answer(401, `{"error":{"code":"PermissionDenied"}}`)
	claude := answer(400, "{\n"+`"error":{"type":"invalid_request_error","message":"no"}}`)
	untrusted := newTLSUpstream(t, nil).URL

	tests := []struct {
		name, target    string // URL is the upstream's
		identity, reply http.HandlerFunc
		want            string // the last line but one of what is fine, or the step that fails
		below           string // what is below that
	}{
		{"fine", "URL", token, list, fine, ""},
		{"fine, v1", "URL/openai/v1/", token, list, fineV1, ""},
		{"fine, project", "URL/api/projects/p", token, list, fineProject, ""},
		{"fine, OpenAI's API of a project", "URL/api/projects/p/openai/", token, list, fineProject, ""},
		{"fine, opaque token", "URL", opaque, list, fine, ""},
		{"fine, Claude", "URL/anthropic/", token, claude, fineClaude, ""},
		{"no list of models", "URL/models/", token, answer(404, "\x1b[2J"), noList, ""},

		{"bad setting", "http://10.0.0.4/", token, list, "FAIL  settings: TARGET_URL: ", ""},
		{"no identity", "URL", none, list, "FAIL  token: IMDS at ", "hint: assign a managed ident"},
		{"no such path", "URL/opneai/", token, answer(404, `"Resource not found"`), upstream,
			"hint: there is no such path: check TARGET_URL"},
		{"Claude answers nothing", "URL/anthropic/", token, list, upstream, ""},
		{"not Claude's 400", "URL/anthropic/", token, answer(400, "{}"), upstream, "it says: {}"},
		{"audience", "URL", token, answer(401, "audience"), upstream, "hint: the token is for"},
		{"no role", "URL", token, denies, refused, lacks + "OpenAI User"},
		{"no role for Claude", "URL/anthropic/", token, denies, upstream, lacks + "User"},
		{"no role for a project", "URL/api/projects/p/", token, denies, upstream, "e Foundry User on"},
		{"a web page", "URL", token, answer(200, "<html>log in"), upstream, "hint: a web page"},
		{"an empty answer", "URL", token, answer(200, ""), upstream, ""},
		{"advice from outside", "URL", token, answer(500, "a\n  hint: b"), upstream, "a   hint: b"},
		{"an answer that breaks off", "URL", token, answerRaw(cutOff), noAnswer, ""},
		{"an upgrade", "URL", token, answerRaw(switching + "\r\n"), noAnswer, ""},
		{"nobody listens", nobody, token, list, noAnswer + "127.0.0.1:1: dial ", "hint: a fire"},
		{"untrusted", untrusted, token, list, noAnswer, "hint: name a file with your own CA"},
	}
	lineForm := regexp.MustCompile("^(ok    |FAIL  |      (hint|it says): )[^\x1b]+$")
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			followLog(t)
			identity := newFakeIdentity(t)
			identity.answerWith(tt.identity)
			upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
				body, _ := io.ReadAll(r.Body)
				isMessage := string(body) == "{}" && r.Header.Get("Anthropic-Version") != "" &&
					r.Header.Get("Content-Type") == "application/json"
				token := r.Header.Get("Authorization")
				hasToken := token == "Bearer opaque" || strings.HasSuffix(token, ".c2lnbmF0dXJl")
				if r.Method != "GET" && !isMessage || !hasToken {
					t.Errorf("%s with %v and %q", r.Method, r.Header, body)
				}
				tt.reply(w, r)
			})
			env := serving(strings.Replace(tt.target, "URL", upstream.URL, 1), identity.URL,
				vars{"PORT": "8081"})
			cfg, problem := loadConfig(env.get)
			var buf strings.Builder
			err := check(cfg, problem, lineWriter{&buf})
			out := strings.ReplaceAll(buf.String(), upstream.URL, "URL")
			_, after, found := strings.Cut(out, tt.want)
			fails := strings.HasPrefix(tt.want, "FAIL")
			isUsable := strings.Contains(out, "\nok    clients: base URL http://localhost:8081, ")
			if !found || (err != nil) != fails || isUsable == fails ||
				!strings.Contains(after, tt.below) {
				t.Errorf("got error %v and\n%s", err, out)
			}
			for _, line := range strings.Split(strings.TrimSpace(out), "\n") {
				if !lineForm.MatchString(line) {
					t.Errorf("line %q", line)
				}
			}
			if strings.Contains(out, "c2lnbmF0dXJl") || strings.Contains(out, "opaque") {
				t.Errorf("the token is shown:\n%s", out)
			}
		})
	}
}

// forward.go: check the caller.

func TestKeyIsCheckedAndStaysHere(t *testing.T) {
	const inOpenAIsForm = `","type":"invalid_request_error","param":null,"code":"invalid_api_key"}}`
	tests := []struct {
		name, request string
		isRight       bool
	}{
		{"api-key", request("POST /x", "api-key: Sesame"), true},
		{"x-api-key", request("POST /x", "X-Api-Key: Sesame"), true},
		{"API Management's", request("POST /x", "Ocp-Apim-Subscription-Key: Sesame"), true},
		{"bearer", request("POST /x", "Authorization: Bearer Sesame"), true},
		{"bearer in other case", request("POST /x", "authorization: bEARER Sesame"), true},
		{"second", request("POST /x", "api-key: wrong", "Authorization: Bearer Sesame"), true},
		{"upgrade, query", request("GET /x?a=1&api-key=Sesame&b=2", webSocket), true},
		{"upgrade, subprotocol", request("GET /x", webSocket,
			"Sec-WebSocket-Protocol: realtime, openai-insecure-api-key.Sesame"), true},

		{"none", request("POST /x"), false},
		{"wrong", request("POST /x", "api-key: sesam"), false},
		{"empty", request("POST /x", "api-key:", "Authorization: Bearer "), false},
		{"basic", request("POST /x", "Authorization: Basic Sesame"), false},
		{"query without upgrade", request("POST /x?api-key=Sesame"), false},
	}
	for _, key := range []string{"Sesame", ""} {
		p, got := startRecorded(t, vars{"EXPECTED_KEY": key})
		for _, tt := range tests {
			conn := p.dial(t, tt.request)
			if key != "" && !tt.isRight {
				resp := conn.want(t, 401, inOpenAIsForm)
				if resp.Header.Get("WWW-Authenticate") == "" || len(got) > 0 ||
					resp.Header.Get("X-Should-Retry") != "false" || resp.ContentLength < 0 {
					t.Errorf("%s: got %v; upstream got %d requests", tt.name, resp.Header, len(got))
				}
				continue
			}
			// Without an expected key any will do, and stays here all the same.
			conn.want(t, 200, "")
			r := only(t, got)
			sent := fmt.Sprint(r.RequestURI, r.Header)
			if !strings.Contains(sent, "Authorization:[Bearer token-1]") ||
				strings.Contains(sent, "Sesame") {
				t.Errorf("%s with %q: sent %s", tt.name, key, sent)
			}
		}
	}
}

func TestWebPagesCannotDriveIt(t *testing.T) {
	tests := []struct {
		name, head string
		status     int
	}{
		{"localhost", "Host: localhost:8081", 200},
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
		{"localhost as user", "Host: localhost\r\nOrigin: https://localhost@attacker.example", 403},
		{"opaque origin", "Host: localhost\r\nOrigin: null", 403},
		{"second origin", "Host: localhost\r\nOrigin: http://localhost\r\n" +
			"Origin: https://attacker.example", 403},
		{"cross-site", "Host: localhost\r\nSec-Fetch-Site: cross-site", 403},
		{"same-site", "Host: localhost\r\nSec-Fetch-Site: same-site", 403},
	}
	keyless, _ := startRecorded(t, nil)
	keyed, _ := startRecorded(t, vars{"EXPECTED_KEY": "Sesame"})
	for _, tt := range tests {
		for _, text := range []string{
			request("GET /x", "api-key: Sesame"),
			request("POST /x", "api-key: Sesame", "Content-Length: 1") + "x",
			request("GET /x", "api-key: Sesame", webSocket),
		} {
			text = strings.Replace(text, "Host: {host}", tt.head, 1)
			keyless.dial(t, text).want(t, tt.status, "")
			keyed.dial(t, text).want(t, 200, "")
		}
	}
}

func TestRequestsThatLeaveTheTargetAreRefused(t *testing.T) {
	refused := map[int][]string{
		400: {
			// Dot segments, in the path and at its end.
			"GET /../metadata", "GET /a/..", "GET /./a", "GET //../metadata", "GET /v1/..",
			"GET /openai/v1/../../metadata", "GET /../openai/v1/models",
			// Escaped ones, and between what ends a segment for some server.
			"GET /%2e%2E/metadata", "GET /..%2fmetadata", `GET /..\metadata`, "GET /a/..%5C..%5cb",
			"GET /..%20/metadata", "GET /..%00/metadata", "GET /..%7f/metadata", "GET /..;a=b/x",
			"GET /..%c2%85/metadata", "GET /..%e3%80%80/metadata", "GET /.%09./metadata",
			// Escapes of escapes.
			"GET /%252e%252e/metadata", "GET /%25%32%65%25%32%65/metadata", "GET /100%2525",
			// What is no UTF-8: overlong slashes and dots, a surrogate, a part of a rune.
			"GET /..%c0%af..%c0%afsecret", "GET /%c0%ae%c0%ae/x", "GET /..\xc0\xafsecret",
			"GET /%ed%a0%80", "GET /%c3",
			// No path at all.
			"GET http://jane:s3cret@b.example/x", "GET http://169.254.169.254/", "OPTIONS *",
		},
		405: {"CONNECT elsewhere.example:443", "CONNECT /a", "TRACE /a", "trace /a", "TRACK /a"},
	}
	p, got := startRecorded(t, vars{"EXPECTED_KEY": "Sesame"})
	for status, lines := range refused {
		for _, line := range lines {
			resp := p.dial(t, request(line, "api-key: Sesame")).want(t, status, `{"error":{"mess`)
			if allow := resp.Header.Get("Allow"); (allow != "") != (status == 405) || len(got) > 0 {
				t.Errorf("%q: got Allow: %q; upstream got %d requests", line, allow, len(got))
			}
			p.log.waitFor(t, fmt.Sprintf("answered %d to 127.0.0.1:", status))
		}
	}
	if strings.Contains(p.log.String(), "s3cret") {
		t.Errorf("a password is in the log: %s", p.log)
	}
}

func TestHeadersOver64KiBAreRefused(t *testing.T) {
	p, _ := startRecorded(t, nil)
	for size, status := range map[int]int{60_000: 200, 70_000: 431} {
		p.dial(t, request("GET /x", "X-Codex-A: "+strings.Repeat("a", size))).want(t, status, "")
	}
}

// forward.go: where a request goes.

// TestAnyBaseURLWorks: each call with whatever a client may have been given as its base URL, in
// front of each TARGET_URL of one resource.
func TestAnyBaseURLWorks(t *testing.T) {
	const claude, dated = "\r\nAnthropic-Version: 2023-06-01", "api-version=2025-04-01-preview"
	calls := []struct{ name, field, call, upstream string }{
		{"chat", "", "/chat/completions", "/openai/v1/chat/completions"},
		{"Responses", "", "/responses/r_1/items?limit=2", "/openai/v1/responses/r_1/items?limit=2"},
		{"no date", "", "/responses?api-version=v1", "/openai/v1/responses?api-version=v1"},
		{"v1 of the client's own", "", "/openai/v1/embeddings", "/openai/v1/embeddings"},
		{"classic", "", "/openai/deployments/D/c?" + dated, "/openai/deployments/D/c?" + dated},
		{"deployment as base", "", "/deployments/D/x?" + dated, "/openai/deployments/D/x?" + dated},
		{"deployment, no version", "", "/deployments/D/speech", "/openai/deployments/D/speech"},
		{"classic Responses", "", "/responses?" + dated, "/openai/responses?" + dated},
		{"classic Realtime", "", "/realtime?a=b&" + dated, "/openai/realtime?a=b&" + dated},
		{"message", claude, "/v1/messages?beta=true", "/anthropic/v1/messages?beta=true"},
		{"message without a version", "", "/messages/count", "/anthropic/v1/messages/count"},
	}
	bases := []string{"", "/", "/v1", "/openai", "/openai/v1", "/anthropic", "/anthropic/v1",
		"/v1/", "/openai/v1/", "/anthropic/v1//", "//v1//v1", "/openai/openai", "/v1/openai"}
	for _, target := range []string{"URL/openai/", "URL/openai/v1/", "URL/anthropic", "URL",
		"URL/gw/openai", "URL/gw/anthropic/v1"} {
		p, got := startRecorded(t, vars{"TARGET_URL": target})
		root := strings.TrimSuffix(p.cfg.target.root, "/")
		conn := p.dial(t, "")
		for _, c := range calls {
			for _, base := range bases {
				conn.send(request("POST "+base+c.call, "Content-Length: 0"+c.field))
				conn.answer(t)
				if to := only(t, got).RequestURI; to != root+c.upstream {
					t.Errorf("%s at %s with %q: got %s, want %s", c.name, target, base, to,
						root+c.upstream)
				}
			}
		}
	}
}

// TestUpstreamPaths has what does not hold for every base URL.
func TestUpstreamPaths(t *testing.T) {
	const claude, dated = "\r\nAnthropic-Version: 2023-06-01", "?api-version=2024-05-01-preview"
	const proj, native = "/api/projects/p", "?api-version=v1"
	tests := []struct{ name, base, field, target, upstream string }{
		{"files of OpenAI", "/openai/", "", "/v1/files/f-1", "/openai/v1/files/f-1"},
		{"files of Claude, by path", "/openai/", "", "/anthropic/v1/files", "/anthropic/v1/files"},
		{"models, by header", "/openai/", claude, "/v1/models", "/anthropic/v1/models"},
		{"path before the header", "/openai/", claude, "/openai/models", "/openai/v1/models"},
		{"last counts", "/openai/", "", "/openai/anthropic/v1/models", "/anthropic/v1/models"},
		{"dated and no operation", "/openai/", "", "/threads" + dated, "/openai/threads" + dated},
		{"dated v1, no operation", "/openai/", "", "/v1/video" + dated, "/openai/v1/video" + dated},
		{"v1 and no operation", "/openai/", "", "/v1/x", "/openai/v1/x"},
		{"openai and no operation", "/openai/v1/", "", "/openai/x", "/openai/x"},
		{"unknown call", "/openai/v1/", "", "/x/y", "/openai/v1/x/y"},
		{"unknown call of Claude's", "/anthropic/", "", "/x", "/anthropic/x"},
		{"on segment borders only", "/openai/", "", "/openaix/y", "/openai/openaix/y"},
		{"in other case", "/openai/", "", "/OpenAI/v1/models", "/openai/OpenAI/v1/models"},
		{"escaped base", "/openai/", "", "/%6fpenai/v1/models", "/openai/%6fpenai/v1/models"},
		{"base in a call", "/openai/", "", "/v1/files/v1/openai", "/openai/v1/files/v1/openai"},
		{"POST to a base URL", "/openai/", "", "/openai/v1", "/openai/v1/"},
		{"a host in a path", "/openai/", "", "//b.example/x", "/openai/b.example/x"},

		{"escaped slash, space", "/openai/", "", "/files/a%2Fb%20c", "/openai/v1/files/a%2Fb%20c"},
		{"escapes, odd bytes", "/openai/", "", "/x/a%2Fb\"<>^`{|}#", "/openai/x/a%2Fb\"<>^`{|}#"},
		{"dots in names", "/openai/", "", "/files/..a/b../...", "/openai/v1/files/..a/b../..."},
		{"odd query", "/openai/", "", "/x?b;a=%zz&%20+#?/../c", "/openai/x?b;a=%zz&%20+#?/../c"},
		{"empty query", "/openai/", "", "/x?", "/openai/x?"},

		{"gateway", "/v1/", "", "/v1/responses", "/v1/v1/responses"},
		{"gateway, slashes in front", "/gw/", "", "//openai/v1/models", "/gw/openai/v1/models"},
		{"Foundry's models", "/models/", "", "/chat/x" + dated, "/models/chat/x" + dated},

		{"project", proj, "", "/responses", proj + "/openai/v1/responses"},
		{"project, v1", proj, "", "/v1/files/f-1", proj + "/openai/v1/files/f-1"},
		{"project, openai", proj, "", "/openai/v1/models", proj + "/openai/v1/models"},
		{"project, dated v1", proj, "", "/v1/responses" + dated, proj + "/openai/v1/responses" + dated},
		{"project, by header", proj, claude, "/v1/models", proj + "/openai/v1/models"},
		{"project's own files", proj, "", "/files" + native, proj + "/files" + native},
		{"project, dated", proj, "", "/openai/responses" + dated, proj + "/openai/responses" + dated},
		{"agents", proj, "", "/agents/a%2Fb" + native, proj + "/agents/a%2Fb" + native},
		{"threads", proj, "", "/threads/t/messages" + dated, proj + "/threads/t/messages" + dated},
		{"toolbox", proj, claude, "/toolboxes/t/mcp" + native, proj + "/toolboxes/t/mcp" + native},
		{"path of a project's own", proj, claude, "/v1/messages", proj + "/v1/messages"},
		{"project's deployments", proj, "", "/deployments" + dated, proj + "/deployments" + dated},
		{"project by its API", proj + "/openai", "", "/responses", proj + "/openai/v1/responses"},

		{"one deployment", "/openai/deployments/D", "", "/chat", "/openai/deployments/D/chat"},
	}
	for _, tt := range tests {
		p, got := startRecorded(t, vars{"TARGET_URL": "URL" + tt.base})
		p.dial(t, request("POST "+tt.target, "Content-Length: 0"+tt.field)).answer(t)
		if to := only(t, got).RequestURI; to != tt.upstream {
			t.Errorf("%s: got %q, want %q", tt.name, to, tt.upstream)
		}
	}
}

func TestCredentialsAreCutFromTheQuery(t *testing.T) {
	p, got := startRecorded(t, nil)
	for _, tt := range []struct{ name, query, upstream string }{
		{"alone", "api-key=K", ""},
		{"in the midst", "a=1&api-key=K&b=2", "a=1&b=2"},
		{"any case", "a=1&API-Key=K", "a=1"},
		{"escaped name", "a=1&api%2Dkey=K", "a=1"},
		{"others", "api_key=K&access_token=K&Ocp-Apim-Subscription-Key=K&a=1&key=K&apikey=", "a=1"},
		{"authorization", "a&Authorization=Bearer%20K", "a"},
		{"twice", "api-key=K&a=;&api-key=K", "a=;"},
		{"without a value", "api-key&a=1", "a=1"},
		{"another name", "my-api-key=K&api-key2=K", "my-api-key=K&api-key2=K"},
		{"odd bytes", "a=1;b=%zz&&=&c", "a=1;b=%zz&&=&c"},
	} {
		p.dial(t, request("GET /x?"+tt.query)).answer(t)
		if _, query, _ := strings.Cut(only(t, got).RequestURI, "?"); query != tt.upstream {
			t.Errorf("%s: got %q, want %q", tt.name, query, tt.upstream)
		}
	}
}

// forward.go: what goes upstream.

func TestOnlyHeadersThatMatterGoUpstream(t *testing.T) {
	const passed = "Accept: a|Accept-Encoding: zstd|Content-Type: c|User-Agent: u|Range: r|" +
		"OpenAI-Beta: b|x-stainless-lang: l|anthropic-version: v|X-Codex-Turn-State: t|" +
		"X-OpenAI-Subagent: s|session_id: s|originator: o|version: 1|traceparent: p|" +
		"x-ms-client-request-id: i|x-ms-return-client-request-id: true|x-ms-useragent: a|" +
		"x-ms-enable-preview: true|x-ms-oai-image-generation-deployment: d|" +
		"extra-parameters: drop|Foundry-Features: Skills=V1Preview|X-Ms-User-Identity: jane|" +
		"Mcp-Session-Id: s|Mcp-Protocol-Version: 2025-06-18|Mcp-Method: tools/call|Mcp-Name: n|" +
		"Last-Event-Id: 7"
	const kept = "Cookie: c|Idempotency-Key: k|Origin: http://localhost|Referer: r|" +
		"Expect: 100-continue|X-Forwarded-For: 1.2.3.4|X-Forwarded-Host: h|Forwarded: f|" +
		"X-Real-Ip: i|X-Original-Url: /|X-Ms-Client-Ip: i|X-Ms-Forwarded-Client-Ip: i|" +
		"X-Ms-Proxy: p|x-ms-original-url: u|X-Ms-Access-Token: t|X-MS-TOKEN-AAD-ACCESS-TOKEN: t|" +
		"X-MS-CLIENT-PRINCIPAL: p|X-Ms-Authorization-Auxiliary: a|X-Ms-Api-Key: k|Openai-Key: k|" +
		"X-Openai-Token: t|X-OpenAI-Api-Key: k|Anthropic-Api-Key: k|Anthropic-Cookie: c|" +
		"Mcp-Api-Key: k|Mcp-Param-Token: t|Mcp-Auth: a|Mcp-Cookie: c|" +
		"X-Stainless-Auth: a|Ocp-Apim-Subscription-Key: k|Proxy-Authorization: p|" +
		"X-Http-Method-Override: DELETE|TE: trailers|Keep-Alive: 1|Sec-Fetch-Site: none|" +
		"Upgrade: h2c|HTTP2-Settings: AAMAAABkAAQAAP__|Sec-WebSocket-Key: k|Max-Forwards: 1|" +
		"OpenAI-Project: named|X-Unknown: x|" +
		"Connection: keep-alive, openai-project, Authorization, Upgrade"
	p, got := startRecorded(t, nil)
	for _, few := range []string{passed, "Accept: a"} { // nothing is added to one, either
		p.dial(t, request("GET /x", strings.Split(few+"|"+kept, "|")...)).answer(t)
		r := only(t, got)
		for _, field := range strings.Split(few+"|Authorization: Bearer token-1", "|") {
			name, value, _ := strings.Cut(field, ": ")
			if got := r.Header.Get(name); got != value {
				t.Errorf("%s: got %q, want %q", name, got, value)
			}
			r.Header.Del(name)
		}
		if len(r.Header) > 0 {
			t.Errorf("went upstream, too: %v", r.Header)
		}
		if want := p.cfg.target.base.Host; r.Host != want {
			t.Errorf("Host: got %q, want %q", r.Host, want)
		}
	}
}

// TestBodiesKeepTheirFraming, and a connection whose bodies were read whole is kept, whatever is
// answered.
func TestBodiesKeepTheirFraming(t *testing.T) {
	p := startProxy(t, func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		if strings.HasSuffix(r.URL.Path, "/refused") {
			w.WriteHeader(400)
		}
		fmt.Fprintf(w, "%s %d %v %d", r.Method, n, err, r.ContentLength)
	}, nil)
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
		{"refused", "POST /refused", sized(5), "POST 5 <nil> 5"},
		{"refused, large", "POST /refused", sized(3 << 20), "POST 3145728 <nil> 3145728"},
		{"refused, chunked", "POST /refused", chunked(300_000), "POST 300000 <nil> -1"},
	}
	conn := p.dial(t, "")
	for range 3 {
		for _, tt := range tests {
			go io.WriteString(conn, tt.line+" HTTP/1.1\r\nHost: localhost\r\n"+tt.rest)
			if resp, body := conn.answer(t); body != tt.want || resp.Close {
				t.Errorf("%s: got %q, Connection: close %v; want %q", tt.name, body, resp.Close,
					tt.want)
			}
		}
	}
}

// TestDeadIdleConnectionsLoseNoPOST has the upstream reset its idle connections behind the back of
// the transport, which writes to them all the same.
func TestDeadIdleConnectionsLoseNoPOST(t *testing.T) {
	p := newProxy(t, newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, n)
	}), nil)
	dialed := make(chan *deafConn, 9)
	transport := p.forwarder.transport
	transport.DialContext = func(_ context.Context, network, addr string) (net.Conn, error) {
		conn, err := net.Dial(network, addr)
		deaf := &deafConn{Conn: conn}
		dialed <- deaf
		return deaf, err
	}
	p.start(t)
	for _, size := range []int{0, 2_000, 2_000_000} {
		transport.CloseIdleConnections()
		p.dial(t, request("GET /x")).answer(t) // leaves an idle connection
		(<-dialed).isDead.Store(true)
		p.dial(t, request("POST /x", fmt.Sprint("Content-Length: ", size))+
			strings.Repeat("x", size)).want(t, 200, strconv.Itoa(size))
		<-dialed // the connection that took its place
	}
}

// deafConn can be dead: it cannot be written to any more, which nobody is told.
type deafConn struct {
	net.Conn
	isDead atomic.Bool
}

func (c *deafConn) Write(p []byte) (int, error) {
	if c.isDead.Load() {
		return 0, syscall.EPIPE
	}
	return c.Conn.Write(p)
}

// TestWrittenRequestIsNotRepeated has the upstream close a connection after it has read a POST,
// over which it has answered before. With an Idempotency-Key a transport sends a POST again.
func TestWrittenRequestIsNotRepeated(t *testing.T) {
	var posts atomic.Int64
	p := startProxy(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		if r.Method == "POST" {
			posts.Add(1)
			panic(http.ErrAbortHandler)
		}
	}, nil)
	p.dial(t, request("GET /x")).answer(t)
	p.dial(t, request("POST /x", "Idempotency-Key: k", "Content-Length: 2")+"hi").want(t, 502, "")
	if n := posts.Load(); n != 1 {
		t.Errorf("upstream got %d POSTs, want 1", n)
	}
}

// TestBrokenBodyIsTheClientsFault, of which nothing is told, and never looks complete to the
// upstream. A client that has ended its half is told that it has left.
func TestBrokenBodyIsTheClientsFault(t *testing.T) {
	p := startProxy(t, func(_ http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err == nil {
			t.Error("the upstream took a body for complete")
		}
	}, nil)
	const chunked = "Transfer-Encoding: chunked"
	for _, text := range []string{
		request("POST /x", "Content-Length: 5") + "hel",
		request("POST /x", "Content-Length: 1000000") + "hel",
		request("POST /x", chunked) + "3\r\nhel\r\n",
	} {
		conn := p.dial(t, text)
		conn.CloseWrite()
		conn.want(t, 503, "client left")
	}
	for _, end := range []string{"3\r\nhel\r\nguess\r\n", "0\r\nguess\r\n\r\n"} {
		p.dial(t, request("POST /x", chunked)+end).want(t, 400,
			`{"error":{"message":"the request's body broke off or is malformed","type":`)
	}
}

// forward.go: get the token, and send.

// TestWithoutATokenTheClientIsToldWhy, and whether to try again: Claude Code is silent meanwhile.
func TestWithoutATokenTheClientIsToldWhy(t *testing.T) {
	for _, tt := range []struct {
		name                    string
		reply                   http.HandlerFunc
		want, retry, retryAfter string
	}{
		{"refused", answer(400, noIdentity), `\"Identity not found\"}; hint: assign a`, "false", "1"},
		{"no usable token", answer(200, "{}"), "answered 200 without a usable", "false", "1"},
		{"busy", answer(429, "", "Retry-After", "30"), "answered 429", "", "30"},
		{"failing", answer(500, "", "Retry-After", "30"), "answered 500", "", "30"},
	} {
		p := newProxy(t, newUpstream(t, nil), nil)
		p.identity.answerWith(tt.reply)
		h := p.start(t).dial(t, request("GET /x")).want(t, 503, tt.want).Header
		if h.Get("X-Should-Retry") != tt.retry || h.Get("Retry-After") != tt.retryAfter {
			t.Errorf("%s: got %v, want X-Should-Retry: %q and Retry-After: %q", tt.name, h, tt.retry,
				tt.retryAfter)
		}
	}
}

// TestClientThatEndsItsHalfIsToldSo, and not that the upstream failed: to the server it has gone.
func TestClientThatEndsItsHalfIsToldSo(t *testing.T) {
	for _, awaited := range []string{"token", "answer"} {
		asked := make(chan bool, 9)
		hold := func(w http.ResponseWriter, r *http.Request) {
			asked <- true
			<-r.Context().Done()
		}
		p := newProxy(t, newUpstream(t, hold), nil)
		if awaited == "token" {
			p.identity.answerWith(hold)
		}
		conn := p.start(t).dial(t, request("GET /x"))
		<-asked
		conn.CloseWrite()
		conn.want(t, 503, "client left, or the proxy stopped")
		p.log.waitFor(t, ": client left")
	}
}

func TestUnreachableUpstreamIsNamed(t *testing.T) {
	raw := func(text string) string { return newUpstream(t, answerRaw(text)).URL }
	tests := []struct{ name, target, want string }{
		{"refused", nobody, "dial tcp 127.0.0.1:1: "},
		{"certificate", newTLSUpstream(t, nil).URL, "tls: failed to verify certificate: x509: "},
		{"hang-up", raw(""), "EOF"},
		{"garbage", raw("\x1b[31mSSH-2.0\r\n\r\n"), "the answer is not HTTP"},
		{"101 unasked", raw(switching + "X-Up: u\r\n\r\n"), "unexpected status 101"},
		{"status 000", raw("HTTP/1.1 000 Zero\r\n\r\n"), "unexpected status 0"},
	}
	for _, tt := range tests {
		p := startProxy(t, nil, vars{"TARGET_URL": tt.target})
		told := "no answer from " + p.cfg.target.base.Host + ": " + tt.want
		resp := p.dial(t, request("GET /x")).want(t, 502, told)
		if resp.Header.Get("X-Up") != "" { // the header of an answer that is refused
			t.Errorf("%s: got %v", tt.name, resp.Header)
		}
		p.log.waitFor(t, told)
	}
	f := &forwarder{target: &target{base: &url.URL{Host: "x.invalid"}}}
	e := f.noAnswer(&net.OpError{Op: "dial", Err: &net.DNSError{Err: "none", Name: "x.invalid"}})
	const want = "no answer from x.invalid: dial: lookup x.invalid: none; hint: check TARGET_URL's"
	if !strings.HasPrefix(e.Error(), want) {
		t.Errorf("got %q, want %q", e, want)
	}
}

// TestProxyThatRefusesIsNamed has HTTPS_PROXY refuse the connection to the upstream.
func TestProxyThatRefusesIsNamed(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("https_proxy is HTTPS_PROXY there")
	}
	refusing := newUpstream(t, answerRaw("HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"))
	p := startProgram(t, safetyNet, serving("https://resource.example/", newFakeIdentity(t).URL,
		vars{"HTTPS_PROXY": refusing.URL}))
	dial(t, p.listens(t), request("GET /v1/models")).want(t, 502, "no answer from resource.example"+
		" by way of HTTPS_PROXY: Proxy Authentication Required; hint: check HTTPS_PROXY's address")
}

// TestParallelRequestsKeepTheirConnections: HTTP/1.1 ones, as many as there are requests at a time.
// The first requests are answered when all have come, so each has a connection of its own by then.
func TestParallelRequestsKeepTheirConnections(t *testing.T) {
	const clients = 32
	var mu sync.Mutex
	seen := make(map[string]bool) // protocol and address of each connection
	arrived, allArrived := 0, make(chan bool)
	p := newProxy(t, newTLSUpstream(t, func(_ http.ResponseWriter, r *http.Request) {
		mu.Lock()
		seen[r.Proto+" "+r.RemoteAddr] = true
		if arrived++; arrived == clients {
			close(allArrived)
		}
		mu.Unlock()
		select {
		case <-allArrived:
		case <-r.Context().Done():
		}
	}), nil).start(t)
	for range 5 {
		var conns []*testConn
		for range clients {
			conns = append(conns, p.dial(t, request("GET /x")))
		}
		for _, conn := range conns {
			conn.want(t, 200, "")
		}
	}
	// The one opened at the start may come too late.
	mu.Lock()
	defer mu.Unlock()
	if all := fmt.Sprint(seen); len(seen) > clients+1 || strings.Contains(all, "HTTP/2") {
		t.Errorf("%d clients used %d connections: %s", clients, len(seen), all)
	}
}

// forward.go: how an exchange with a body ends.

// earlyUpstream answers 413 at once, and does not read the body.
func earlyUpstream(w http.ResponseWriter, _ *http.Request) {
	http.NewResponseController(w).EnableFullDuplex() // or it would wait for the body
	w.Header().Set("Connection", "close")            // or the next request could meet its end
	http.Error(w, strings.Repeat("too large ", 999), http.StatusRequestEntityTooLarge)
}

// wantEarly reads the answer of earlyUpstream, or a refusal of the proxy's own.
func (c *testConn) wantEarly(t *testing.T) {
	t.Helper()
	if strings.Contains(c.sent, "api-key: wrong") {
		c.want(t, 401, "wrong or missing key")
	} else {
		c.want(t, 413, strings.Repeat("too large ", 999))
	}
}

// TestAnswersReachAClientThatIsStillSending: a refusal, and an early answer of the upstream,
// whether the client reads at the same time or sends all first, as Python's HTTP clients do.
func TestAnswersReachAClientThatIsStillSending(t *testing.T) {
	p := startProxy(t, earlyUpstream, vars{"EXPECTED_KEY": "sesame"})
	for _, size := range []int{10, 300_000, 20 << 20} {
		for _, frame := range []string{"Content-Length: %d\r\n\r\n",
			"Transfer-Encoding: chunked\r\n\r\n%x\r\n"} {
			for _, field := range []string{"A: b", "Connection: close", "Expect: 100-continue"} {
				for _, key := range []string{"wrong", "sesame"} {
					head := strings.TrimSuffix(request("POST /x", "api-key: "+key, field), "\r\n") +
						fmt.Sprintf(frame, size)
					t.Run(fmt.Sprint(size, frame[:3], field, key), func(t *testing.T) {
						t.Parallel()
						send := func(conn *testConn) {
							io.CopyN(conn, zeros{}, int64(size))
							if strings.Contains(frame, "chunked") {
								io.WriteString(conn, "\r\n0\r\n\r\n")
							}
						}
						conn := p.dial(t, head)
						go send(conn)
						conn.wantEarly(t)
						conn = p.dial(t, head)
						send(conn)
						conn.wantEarly(t)
					})
				}
			}
		}
	}
}

// TestStalledClientsAreLetGo after their answers, and what they send in the place of a body's rest
// is no request. (With Go 1.27 an early answer to a client that sent Expect is held back until
// there is more of its body: the server waits for the transport's read.)
func TestStalledClientsAreLetGo(t *testing.T) {
	p := startProxy(t, earlyUpstream, vars{"EXPECTED_KEY": "sesame"})
	var conns []*testConn
	for _, fields := range []string{"api-key: wrong", "api-key: wrong\r\nExpect: 100-continue",
		"api-key: sesame"} {
		for _, text := range []string{
			request("POST /x", fields, "Content-Length: 5000000") + "abc",
			request("GET /healthz", fields, "Content-Length: 1000") + "abc",
			request("POST /x", fields, "Transfer-Encoding: chunked") + "3\r\nabc\r\n",
		} {
			conns = append(conns, p.dial(t, text), p.dial(t, text))
		}
	}
	for i, conn := range conns {
		conn.r.Peek(1) // its answer has begun
		if i%2 == 0 {
			rest := "GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
			if strings.Contains(conn.sent, "chunked") { // a malformed chunk would cut the answer
				rest = fmt.Sprintf("%x\r\n%s\r\n", len(rest), rest)
			}
			io.WriteString(conn, rest)
		}
	}
	for _, conn := range conns {
		conn.wantEarly(t)
		if rest, err := io.ReadAll(conn); len(rest) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%q: the connection goes on with %q, %v", conn.sent, rest, err)
		}
	}
	if strings.Contains(p.log.String(), "smuggled") {
		t.Errorf("the rest of a body was taken for a request: %s", p.log)
	}
}

// TestBodyIsSentWholeAndOnce: the transport sends one again over another connection, if an idle one
// turns out to be dead before anything of the body was read. A body that is dropped never looks
// complete to the upstream, though somebody else has read the rest of it.
func TestBodyIsSentWholeAndOnce(t *testing.T) {
	body := newRequestBody(httptest.NewRecorder(), httptest.NewRequest("POST", "/x",
		strings.NewReader("the rest")))
	if again, err := body.again(); again != body || err != nil {
		t.Errorf("before a read: got %v, %v", again, err)
	}
	body.Read(nil)
	if again, err := body.again(); err == nil {
		t.Errorf("after a read: got %v", again)
	}
	body.end(0)
	if n, err := body.Read(make([]byte, 9)); n != 0 || err == nil || err == io.EOF {
		t.Errorf("after the end: got %d bytes and %v, want a failure", n, err)
	}
}

// TestImmediateAnswersAreWhole, and so are the uploads that run beside them. Without full duplex
// some of a hundred would not be (golang/go#40747).
func TestImmediateAnswersAreWhole(t *testing.T) {
	begin := strings.Repeat("x", 5000)
	p := startProxy(t, func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).EnableFullDuplex()
		io.WriteString(w, begin)
		http.NewResponseController(w).Flush()
		n, err := io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, n, err)
	}, nil)
	upload := strings.Repeat("y", 300_000)
	for client := range 8 {
		t.Run(fmt.Sprint(client), func(t *testing.T) {
			t.Parallel()
			for range 50 {
				conn := p.dial(t, "")
				go io.WriteString(conn, "POST /x HTTP/1.1\r\nHost: localhost\r\n"+
					"Content-Length: 300000\r\n\r\n"+upload)
				if _, got := conn.answer(t); got != begin+"300000 <nil>" {
					t.Fatalf("got %d bytes: …%s", len(got), strings.Trim(got, "x"))
				}
				conn.Close()
			}
		})
	}
}

// forward.go: copy the answer.

func TestAnswersPassUntouched(t *testing.T) {
	const inChunks, chunked = "5\r\nhello\r\n0\r\n\r\n", "Transfer-Encoding: chunked"
	const ok = "200 OK|Content-Length: 0"
	const events = ok + "|Content-Type: text/event-stream"
	const interim = "\r\n\r\nHTTP/1.1 " + ok
	tests := []struct {
		name, method, sent, body string
		head, passed             string // what the client gets, where that is not the same
	}{
		{"sized", "GET", "200 OK|Content-Length: 5|Content-Type: a/b", "hello", "", ""},
		{"chunked", "GET", "200 OK|" + chunked, inChunks, "", ""},
		{"until close", "GET", "200 OK", "hello", "200 OK|" + chunked, inChunks},
		{"trailers", "GET", "200 OK|Trailer: X-T|" + chunked,
			"5\r\nhello\r\n0\r\nX-T: v\r\nX-U: w\r\n\r\n", "200 OK|" + chunked, inChunks},
		{"HEAD", "HEAD", "200 OK|Content-Length: 5", "", "", ""},
		{"204", "GET", "204 No Content|X-A: b", "", "", ""},
		{"429", "GET", "429 Too Many Requests|Content-Length: 2|Retry-After: 3", "{}", "", ""},
		{"529", "GET", "529 status code 529|Content-Length: 0", "", "", ""},
		{"redirect", "POST", "302 Found|Content-Length: 0|Location: https://b.example", "", "", ""},
		{"gzip", "GET", "200 OK|Content-Encoding: gzip|Content-Length: 2", "\x1f\x8b", "", ""},
		{"two of a name", "GET", ok + "|Vary: a|Vary: b", "", "", ""},
		{"hop-by-hop", "GET", ok + "|Connection: X-Hop, X-Hip|X-Hop: h|Keep-Alive: k|" +
			"Proxy-Authenticate: p|X-End: e", "", ok + "|X-End: e", ""},
		{"Connection that names itself", "HEAD", ok + "|Connection: connection, " +
			"content-type|Content-Type: a", "", ok, ""},
		{"about the upstream's host", "GET",
			ok + "|Strict-Transport-Security: a|Alt-Svc: h3|Set-Cookie: a=b", "", ok, ""},
		{"events", "GET", events, "", events + "|X-Accel-Buffering: no", ""},
		{"events with a choice", "GET", events + "|X-Accel-Buffering: yes", "", "", ""},
		{"early hints", "GET", "103 Early" + interim, "", ok, ""},
		{"100 unasked", "GET", "100 Continue" + interim, "", ok, ""},
	}
	sorted := func(message string) string { // the order of header lines is free
		head, body, _ := strings.Cut(message, "\r\n\r\n")
		lines := strings.Split(head, "\r\n")
		slices.Sort(lines[1:])
		return strings.Join(lines, "\r\n") + "\r\n\r\n" + body
	}
	ours := regexp.MustCompile("(?m)^(Connection: close|Date: .*)\r\n")
	for _, tt := range tests {
		message := func(head, body string) string {
			return "HTTP/1.1 " + strings.ReplaceAll(head, "|", "\r\n") + "\r\n\r\n" + body
		}
		p := startProxy(t, answerRaw(message(tt.sent, tt.body)), nil)
		got, err := io.ReadAll(p.dial(t, request(tt.method+" /x", "Connection: close")))
		want := message(cmp.Or(tt.head, tt.sent), cmp.Or(tt.passed, tt.body))
		text := ours.ReplaceAllString(string(got), "")
		if err != nil || sorted(text) != sorted(want) {
			t.Errorf("%s: got %v and\n%q, want\n%q", tt.name, err, text, want)
		}
	}
}

func TestEachEventArrivesBeforeTheNextIsSent(t *testing.T) {
	for _, framing := range []struct{ head, event, end string }{
		{"Transfer-Encoding: chunked\r\n\r\n", "2\r\ne\n\r\n", "0\r\n\r\n"},
		{"Content-Length: 8\r\n\r\n", "e\n", ""},
		{"\r\n", "e\n", ""}, // until the connection ends
	} {
		for scheme, newServer := range schemes {
			next := make(chan string)
			handler := func(w http.ResponseWriter, r *http.Request) {
				conn, _, err := http.NewResponseController(w).Hijack()
				if err != nil {
					t.Error(err)
					return
				}
				defer conn.Close()
				io.WriteString(conn, "HTTP/1.1 200 OK\r\n"+framing.head)
				for text := range next {
					io.WriteString(conn, text)
				}
			}
			p := newProxy(t, newServer(t, handler), nil).start(t)
			conn := p.dial(t, request("GET /x"))
			var body io.Reader
			if !strings.Contains(framing.head, "Length") {
				body = conn.head(t).Body // before any event
			}
			for range 4 {
				next <- framing.event
				if body == nil {
					body = conn.head(t).Body
				}
				wantNext(t, body, "e\n")
			}
			next <- framing.end
			close(next)
			if rest, err := io.ReadAll(body); err != nil || len(rest) > 0 {
				t.Errorf("%q, %s: after the events: %q, %v", framing.head, scheme, rest, err)
			}
		}
	}
}

// TestCutAnswerCutsTheClient, whether it has sent all or is still sending.
func TestCutAnswerCutsTheClient(t *testing.T) {
	const chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
	const sized = "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"
	get, long := request("GET /x"), strings.Repeat("x", 300_000)
	for _, tt := range []struct{ name, request, answer string }{
		{"chunked", get, chunked + "5\r\nhello\r\n"},
		{"in a chunk", get, chunked + "ff\r\nhello"},
		{"sized", get, sized + "hello"},
		{"before the body", get, sized},
		{"sending", request("POST /x", "Content-Length: 9999999") + "hi", chunked + "1\r\na\r\n"},
		{"sending chunks", request("POST /x", "Transfer-Encoding: chunked") + "2\r\nhi\r\n",
			chunked + "1\r\na\r\n"},
		{"nearly sent", request("POST /x", "Content-Length: 300009") + long, chunked + "1\r\na"},
	} {
		p := startProxy(t, answerRaw(tt.answer), nil)
		conn := p.dial(t, tt.request)
		resp, err := http.ReadResponse(conn.r, nil)
		if err == nil {
			_, err = io.ReadAll(resp.Body)
		}
		if tt.request != get && resp != nil && resp.StatusCode == 502 {
			continue // the upstream's reset was noticed before its answer
		}
		if resp == nil || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: got %v and %v, want a head and then the connection cut", tt.name, resp, err)
		}
		p.log.waitFor(t, "answer cut: ")
	}
}

// TestClientThatLeavesCancelsTheUpstream. Some leave after a stream's last event, and nothing went
// wrong then.
func TestClientThatLeavesCancelsTheUpstream(t *testing.T) {
	for _, inBody := range []bool{false, true} {
		called, cancelled := make(chan bool), make(chan bool)
		p := startProxy(t, func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			if inBody {
				http.NewResponseController(w).Flush()
			}
			close(called)
			<-r.Context().Done()
			close(cancelled)
		}, nil)
		conn := p.dial(t, request("POST /x", "Content-Length: 2")+"hi")
		<-called
		if inBody {
			conn.head(t)
		}
		conn.Close()
		<-cancelled
		p.waitIdle(t)
		if strings.Contains(p.log.String(), " after ") == inBody {
			t.Errorf("in the body %v: got %s", inBody, p.log)
		}
	}
}

// TestRefusalPassesAsItComes: it is explained after it has been copied.
func TestRefusalPassesAsItComes(t *testing.T) {
	rest := make(chan string)
	p := startProxy(t, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(404)
		io.WriteString(w, `{"error":{"code":`)
		http.NewResponseController(w).Flush()
		io.WriteString(w, <-rest)
	}, nil)
	wantNext(t, p.dial(t, request("GET /x")).head(t).Body, `{"error":{"code":`)
	rest <- `"DeploymentNotFound"}}`
	p.log.waitFor(t, "answered 404 Not Found: DeploymentNotFound; hint: the resource has no")
}

// TestRejectedTokenIsReplaced: a 401 of the upstream is passed on, and another token fetched.
func TestRejectedTokenIsReplaced(t *testing.T) {
	p := startProxy(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") == "Bearer token-1" {
			w.WriteHeader(401)
		}
	}, nil)
	p.dial(t, request("GET /x")).want(t, 401, "")
	eventually(t, "the next token is used", func() bool {
		resp, _ := p.dial(t, request("GET /x")).answer(t)
		return resp.StatusCode == 200
	})
}

// TestNothingOutlivesItsRequest mixes streams, aborts, uploads and upgrades, and counts what is
// left.
func TestNothingOutlivesItsRequest(t *testing.T) {
	held, _ := heldUpstream(t)
	p := startProxy(t, held, nil)
	// With Go 1.22 an upstream is not told of the end of the client's half.
	p.forwarder.endTime = 50 * time.Millisecond
	p.dial(t, request("GET /readyz", "Connection: close")).answer(t) // all has started

	// Those of earlier tests would hide some of this one's.
	http.DefaultClient.CloseIdleConnections()
	before := runtime.NumGoroutine()
	requests := []struct {
		text       string
		isAnswered bool
	}{
		{request("POST /v1/stream", "Content-Length: 2") + "{}", true},
		{request("POST /v1/chat/completions", "Content-Length: 9999999") + "{}", false},
		{request("POST /v1/responses", "Transfer-Encoding: chunked") + "2\r\n{}\r\n", false},
		{request("GET /v1/realtime", webSocket), true},
		{request("GET /v1/unasked"), true},
		{request("GET /../x"), true},
		{"\x16\x03\x01 garbage\r\n\r\n", true},
	}
	for i := range 140 {
		r := requests[i%len(requests)]
		conn := p.dial(t, r.text)
		go func() {
			if r.isAnswered && i/len(requests)%2 == 0 {
				conn.r.ReadByte()
			}
			conn.Close()
		}()
	}
	eventually(t, "nothing is left", func() bool {
		p.forwarder.transport.CloseIdleConnections()
		return p.forwarder.streams.Load() == 0 && runtime.NumGoroutine() <= before
	})
}

// forward.go: the tunnel.

func TestUpgrades(t *testing.T) {
	const accepted = switching + "Sec-Websocket-Accept: a\r\n\r\nfirst frame"
	const refused = "HTTP/1.1 426 Upgrade Required\r\nContent-Length: 4\r\n\r\nnope"
	const none = "no answer from 127.0.0.1:"
	asked := request("GET /x", webSocket)
	withBody := request("GET /x", webSocket, "Content-Length: 2") + "hi"
	toH2C := strings.Replace(accepted, "websocket", "h2c", 1)
	bare := strings.Replace(accepted, "Connection: Upgrade\r\n", "", 1)
	for _, tt := range []struct {
		name, request, answer string
		status                int
		want                  string
	}{
		{"accepted", asked, accepted, 101, "first frame"},
		{"refused", asked, refused, 426, "nope"},
		{"other protocol switched to", asked, toH2C, 502, none},
		{"answer without Connection: Upgrade", asked, bare, 502, none},
		{"h2c", request("GET /x", "Connection: Upgrade", "Upgrade: h2c"), toH2C, 502, none},
		{"POST", request("POST /x", webSocket), accepted, 502, none},
		{"HTTP/1.0", strings.Replace(asked, "1.1", "1.0", 1), accepted, 502, none},
		{"with a body", withBody, accepted, 502, none},
		{"not in Connection", strings.Replace(asked, ", Upgrade", "", 1), accepted, 502, none},
	} {
		conn := startProxy(t, answerRaw(tt.answer), nil).dial(t, tt.request)
		if tt.status != 101 {
			conn.want(t, tt.status, tt.want)
			continue
		}
		conn.want(t, 101, "")
		if got, err := io.ReadAll(conn); err != nil || string(got) != tt.want {
			t.Errorf("%s: got %q, %v through the tunnel, want %q", tt.name, got, err, tt.want)
		}
	}
}

// TestTunnelPassesWhatFollowsTheUpgrade: the first bytes of either side, which follow the head at
// once, and all bytes after that.
func TestTunnelPassesWhatFollowsTheUpgrade(t *testing.T) {
	for scheme, newServer := range schemes {
		handler := func(w http.ResponseWriter, r *http.Request) {
			sent := fmt.Sprint(r.RequestURI, r.Header)
			if strings.Contains(sent, "sesame") || r.Header.Get("Sec-WebSocket-Version") != "13" {
				t.Errorf("went upstream: %s", sent)
			}
			const protocol = "Sec-WebSocket-Protocol"
			conn := acceptTunnel(t, w, protocol+": "+r.Header.Get(protocol))
			defer conn.Close()
			io.WriteString(conn, "greeting,")
			io.Copy(conn, conn)
		}
		p := newProxy(t, newServer(t, handler), vars{"EXPECTED_KEY": "sesame"}).start(t)
		conn := p.dial(t, request("GET /v1/realtime?api-key=sesame", webSocket,
			"Sec-WebSocket-Protocol: Realtime, openai-insecure-api-key.sesame")+"hello")
		resp := conn.head(t)
		if resp.StatusCode != 101 || resp.Header.Get("Sec-WebSocket-Protocol") != "Realtime" {
			t.Fatalf("%s: got %d %v", scheme, resp.StatusCode, resp.Header)
		}
		wantNext(t, conn, "greeting,hello")
		io.WriteString(conn, "more")
		wantNext(t, conn, "more")
	}
}

// TestTunnelDeliversAllThatTheUpstreamSent to a client that goes on sending.
func TestTunnelDeliversAllThatTheUpstreamSent(t *testing.T) {
	const size = 8 << 20
	p := startProxy(t, func(w http.ResponseWriter, r *http.Request) {
		conn := acceptTunnel(t, w)
		defer conn.Close()
		io.CopyN(conn, zeros{}, size)
		conn.CloseWrite()
		io.Copy(io.Discard, conn)
	}, nil)
	conn := openTunnel(t, p.addr)
	go io.Copy(conn, zeros{})
	if got, _ := io.Copy(io.Discard, conn); got != size {
		t.Errorf("got %d bytes, want %d", got, size)
	}
}

// TestTunnelEndsInEachDirectionByItself has one side send its last bytes and shut its sending side,
// and the other one answer only then.
func TestTunnelEndsInEachDirectionByItself(t *testing.T) {
	const last, reply = "last bytes of the one", "last bytes of the other"
	wantRest := func(conn *testConn, want string) {
		if got, err := io.ReadAll(conn); err != nil || string(got) != want {
			t.Errorf("got %q, %v; want %q", got, err, want)
		}
	}
	replies := func(conn *testConn) { // when the other has ended
		wantRest(conn, last)
		io.WriteString(conn, reply)
		conn.Close()
	}
	ends := func(conn *testConn) {
		io.WriteString(conn, last)
		conn.CloseWrite()
		wantRest(conn, reply)
		conn.Close()
	}
	sides := [][2]func(*testConn){{replies, ends}, {ends, replies}} // the client and the upstream
	if goversion.Compare(runtime.Version(), "go1.24") < 0 {
		sides = sides[:1] // the upstream's connection can only be closed altogether there
	}
	for _, side := range sides {
		done := make(chan bool)
		p := startProxy(t, func(w http.ResponseWriter, r *http.Request) {
			side[1](acceptTunnel(t, w))
			done <- true
		}, nil)
		for range 20 {
			side[0](openTunnel(t, p.addr))
			<-done
		}
	}
}

// TestTunnelDoesNotWaitForEver for the end of a side that takes no notice of the other's.
func TestTunnelDoesNotWaitForEver(t *testing.T) {
	for _, isClient := range []bool{false, true} {
		release := make(chan bool)
		p := newProxy(t, newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
			conn := acceptTunnel(t, w)
			if !isClient {
				<-release
			}
			conn.Close()
		}), nil)
		p.forwarder.endTime = time.Millisecond
		conn := openTunnel(t, p.start(t).addr)
		if !isClient {
			conn.Close()
		}
		p.waitIdle(t)
		close(release)
	}
}

// forward.go: what is logged.

// TestLogTellsWhoWhatAndWhy, no credential, and nothing that could be taken for another line.
func TestLogTellsWhoWhatAndWhy(t *testing.T) {
	p := startProxy(t, answer(404, `{"error":{"code":"DeploymentNotFound"}}`,
		"Apim-Request-Id", "id-1", "Retry-After", "7"), vars{"EXPECTED_KEY": "sesame"})
	const key = "api-key: sesame"
	conn := p.dial(t, request("POST /deployments/d?API%2Dkey=secret&api-version=1&key=secret", key,
		"Authorization: Bearer secret"))
	p.log.waitFor(t, " after ")
	p.dial(t, request("GET /\u2028\u009b", key))
	p.log.waitFor(t, " after ")
	text := p.log.String()
	for _, want := range []string{
		"POST /deployments/d?api-version=1 from " + conn.LocalAddr().String() + "\n",
		"POST http://" + p.cfg.target.base.Host + "/openai/deployments/d?api-version=1 after ",
		"s: answered 404 Not Found: DeploymentNotFound; Retry-After 7; apim-request-id id-1; " +
			"hint: the resource has no deployment of this name",
		`"GET /\u2028\u009b" from `,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("got %s, want %q", text, want)
		}
	}
	for _, never := range []string{"sesame", "secret", "token-1", "\u2028", "\u009b"} {
		if strings.Contains(text, never) {
			t.Errorf("%q is in the log:\n%s", never, text)
		}
	}
}

// TestKeyInATargetIsNotLogged, in whatever form of a URL it is.
func TestKeyInATargetIsNotLogged(t *testing.T) {
	for key, targets := range map[string][]string{
		"a+b c": {"/a+b%20c", "/x?k=a%2Bb+c", "/x?k=a%2bb%20c", "/?%zz&a%2Bb+c", "/a%2bb%20c?%zz"},
		"a%b":   {"/x?k=a%25b", "/x?k=%61%25%62"},
		"a%41b": {"/x?k=a%41b", "/x?k=a%2541b"},
	} {
		p := startProxy(t, answer(404, ""), vars{"EXPECTED_KEY": key})
		for _, target := range targets {
			p.dial(t, request("GET "+target, "api-key: "+key)).answer(t)
		}
		text := p.log.String()
		if strings.Contains(text, "a+b") || strings.Contains(text, "%") ||
			strings.Count(text, "(not shown, as EXPECTED_KEY is in it)") < len(targets) {
			t.Errorf("key %q: %s", key, text)
		}
		p.dial(t, request("DELETE /v1/files/f-1?%", "api-key: "+key)).answer(t)
		p.log.waitFor(t, "DELETE /v1/files/f-1?% from ") // a wrong escape hides nothing
	}
}

// TestTokenNeverGetsIntoTheLog: the upstream repeats it wherever it can, and the client's key, and
// the identity endpoint does so in a refusal to the next request.
func TestTokenNeverGetsIntoTheLog(t *testing.T) {
	const key, chunked = "open-sesame", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
	const hi, notHTTP = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "the answer is not HTTP"
	const body = `{"error":{"code":"TOKEN","type":"TOKEN","param":"TOKEN","message":"TOKEN KEY"}}`
	const end, serverError = "\r\nContent-Length: 0\r\n\r\n", "500 Internal Server Error\n"
	signature := strings.Repeat("s1gnature", 38)
	token := "eyJ0eXAiOiJKV1Qi." + strings.Repeat("payload", 140) + "." + signature
	tests := []struct{ name, answer, want string }{
		{"reason phrase", "HTTP/1.1 403 TOKEN KEY" + end, ": answered 403 Forbidden; hint: "},
		{"no known status", "HTTP/1.1 529 TOKEN" + end, ": answered 529"},
		{"Retry-After", "HTTP/1.1 429 No\r\nRetry-After: TOKEN" + end, "429 Too Many Requests; h"},
		{"request id", "HTTP/1.1 500 No\r\nApim-Request-Id: TOKEN" + end, serverError},
		{"forged id", "HTTP/1.1 500 No\r\nApim-Request-Id: \u2028" + end, serverError},
		{"body", "HTTP/1.1 400 No\r\n\r\n" + body, "answered 400 Bad Request\n"},
		{"status line", "TOKEN KEY\r\n\r\n", notHTTP},
		{"status", "HTTP/1.1 TOKEN KEY\r\n\r\n", notHTTP},
		{"header line", "HTTP/1.1 200 OK\r\nTOKEN KEY\r\n\r\n", notHTTP},
		{"length", "HTTP/1.1 200 OK\r\nContent-Length: SIGNATURE\r\n\r\n", "no answer from "},
		{"framing", "HTTP/1.1 200 OK\r\nTransfer-Encoding: SIGNATURE\r\n\r\n", "no answer from "},
		{"chunk", chunked + "TOKEN\r\n", "answer cut: "},
		{"trailer", chunked + "0\r\nTOKEN KEY\r\n\r\n", "answer cut: "},
	}
	fill := strings.NewReplacer("TOKEN", token, "KEY", key, "SIGNATURE", signature)
	for _, tt := range tests {
		upstream := newUpstream(t, answerRaw(fill.Replace(tt.answer)))
		p := newProxy(t, upstream, vars{"EXPECTED_KEY": key})
		p.identity.answerWith(answer(200, tokenAnswer(token, time.Hour)))
		conn := p.start(t).dial(t, request("GET /x", "api-key: "+key, "Connection: close"))
		got, _ := io.ReadAll(conn)
		p.log.waitFor(t, strings.TrimSuffix(tt.want, "\n"))
		p.identity.answerWith(answer(400, fill.Replace("TOKEN TOKEN")))
		held, _ := p.tokens.await(context.Background())
		p.tokens.rejected(held)
		p.log.waitFor(t, "no new token: IMDS at ")
		text := p.log.String()
		if !strings.Contains(text, tt.want) {
			t.Errorf("%s: got %s, want %q", tt.name, text, tt.want)
		}
		if bytes.HasPrefix(got, []byte("HTTP/1.1 502 ")) {
			text += string(got)
		}
		for _, never := range []string{signature[:30], signature[312:], key, "\u2028"} {
			if strings.Contains(text, never) {
				t.Errorf("%s: %q is told: %s", tt.name, never, text)
			}
		}
	}
}

// TestWhatTheClientSaysIsBoundedInTheLog: a line has some hundred bytes of it.
func TestWhatTheClientSaysIsBoundedInTheLog(t *testing.T) {
	p := startProxy(t, answer(404, ""), nil)
	p.log.waitFor(t, "token ready")
	started := len(p.log.String())
	long := strings.Repeat("A", 20_000)
	for _, line := range []string{"GET /" + long, "GET /x?" + long, long + " /x",
		"GET /" + strings.Repeat("%e2%80%a8", 2000)} {
		p.dial(t, request(line)).answer(t)
	}
	for _, line := range strings.Split(strings.TrimSpace(p.log.String()[started:]), "\n") {
		isWhole := strings.Contains(line, " from 127.0.0.1:") || strings.Contains(line, " after ")
		if len(line) > 500 || !isWhole {
			t.Errorf("a line of %d bytes: %s", len(line), line)
		}
	}
}

// TestReasonOfARefusalIsLogged: its code and parameter, never its message, and what to do about it.
func TestReasonOfARefusalIsLogged(t *testing.T) {
	const lacks = "; hint: the identity with object id 123 lacks the role Cognitive Services "
	const x, claude = "POST /v1/x", "POST /v1/messages"
	const noPath = `{"error":{"code":"404","message":"Resource not found"}}`
	const gone = `{"error":{"message":"Response with id 'r' not found.","type":"invalid_request"}}`
	tests := []struct {
		name, line string
		status     int
		body, want string
	}{
		{"OpenAI", x, 418, `{"error":{"message":"LEAK","type":"LEAK","param":"n","code":"a"}}`,
			": a, param n"},
		{"Claude", claude, 418, `{"error":{"type":"not_found","message":"LEAK"}}`, ": not_found"},
		{"an index", x, 418, `{"error":{"code":"a","param":"b[0].c"}}`, ": a, param b[0].c"},
		{"number beside a parameter", x, 418, `{"error":{"code":400,"param":"n"}}`, ", param n"},
		{"words", x, 418, `{"error":{"code":"LEAK! no code","param":"LEAK\n"}}`, ""},
		{"too long", x, 418, `{"error":{"code":"` + strings.Repeat("LEAK", 17) + `"}}`, ""},
		{"object", x, 418, `{"error":{"code":{"LEAK":1},"param":["LEAK"]}}`, ""},
		{"error of text", x, 418, `{"error":"LEAK"}`, ""},
		{"not JSON", x, 418, `LEAK`, ""},

		{"role", x, 401, `{"error":{"code":"Denied"}}`, ": Denied" + lacks + "OpenAI User on"},
		{"role, without a reason", x, 401, ``, lacks + "OpenAI User on"},
		{"role for Claude", claude, 403, `{"error":{"message":"no Permission"}}`, lacks + "User"},
		{"role for fine-tuning", "GET /v1/fine_tuning/jobs", 401, ``, lacks + "OpenAI Contributor"},
		{"role for files", "POST /v1/files", 401, ``, lacks + "OpenAI Contributor on"},
		{"role for classic files", "POST /files?api-version=2024-10-21", 401, ``, lacks + "OpenAI C"},
		{"role for uploads", "POST /uploads/u/parts", 401, ``, lacks + "OpenAI Contributor on"},
		{"role to read files", "GET /v1/files", 401, ``, lacks + "OpenAI User on"},
		{"role of a project", "POST /api/projects/p/openai/v1/files", 401, ``,
			strings.Replace(lacks, "Cognitive Services ", "Foundry User on", 1)},
		{"role for Claude's files", "POST /anthropic/v1/files", 401, ``, lacks + "User"},
		{"role for a store's files", "POST /vector_stores/v/files", 401, ``, lacks + "OpenAI User on"},
		{"audience", x, 401, `audience is wrong`, "; hint: the token is for https://a.example: "},
		{"network", x, 403, `denied due to Firewall rules.`, "; hint: a network rule or policy"},
		{"path", x, 404, noPath, ": 404; hint: there is no such path: check TARGET_URL"},
		{"path, HEAD", "HEAD /v1/x", 404, noPath, ""},
		{"response", "GET /v1/responses/r", 404, gone, ": invalid_request"},
		{"agent", x, 404, `{"error":{"code":"a","message":"Resource not found: 7"}}`, ": a"},
		{"model", x, 404, `{"error":{"code":"model_not_found"}}`, ": model_not_found"},
		{"regional endpoint", x, 400, `provide a custom subdomain`, "; hint: a regional endpoint"},
		{"gateway's key", x, 401, `missing subscription key.`, "; hint: the gateway wants a key"},
		{"web page", x, 503, `<!DOCTYPE html><HTML>`, "; hint: a web page answered"},
		{"quota", x, 429, ``, "; hint: too many requests or tokens"},
		{"web page, 404", x, 404, `<html>`, "; hint: a web page answered, not the service: check TARGET"},
	}
	const jwt = "e30.eyJhdWQiOiJodHRwczovL2EuZXhhbXBsZSIsIm9pZCI6IjEyMyJ9.sig"
	for _, tt := range tests {
		var packed strings.Builder
		w := gzip.NewWriter(&packed)
		io.WriteString(w, tt.body)
		w.Close()
		for _, reply := range []http.HandlerFunc{answer(tt.status, tt.body),
			answer(tt.status, packed.String(), "Content-Encoding", "gzip")} {
			p := newProxy(t, newUpstream(t, reply), nil)
			p.identity.answerWith(answer(200, tokenAnswer(jwt, time.Hour)))
			p.start(t).dial(t, request(tt.line, "Content-Length: 0")).answer(t)
			line, _ := p.log.waitFor(t, " after ")
			_, got, _ := strings.Cut(line, ": answered ")
			want := strconv.Itoa(tt.status) + " " + http.StatusText(tt.status) + tt.want
			if !strings.HasPrefix(got, want) || got != want && !strings.Contains(want, "hint") ||
				strings.Contains(p.log.String(), "LEAK") {
				t.Errorf("%s: got %s, want %q", tt.name, line, want)
			}
		}
	}
}

// TestUnsolicitedAnswerIsNotLogged: net/http's transport would quote what comes after an answer,
// which can be the end of a token alone.
func TestUnsolicitedAnswerIsNotLogged(t *testing.T) {
	closed := make(chan bool)
	upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		conn, buffered, _ := http.NewResponseController(w).Hijack()
		defer conn.Close()
		io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhiHTTP/1.1 400 s1gnature")
		io.Copy(io.Discard, buffered) // until the proxy has noticed
		closed <- true
	})
	p := startProgram(t, safetyNet, serving(upstream.URL, newFakeIdentity(t).URL, nil))
	dial(t, p.listens(t), request("GET /x")).answer(t)
	<-closed
	p.Process.Kill()
	if _, text := p.end(); strings.Contains(text, "s1gnature") {
		t.Error(text)
	}
}

// TestDebugTellsOfEveryTokenAndAnswer, once.
func TestDebugTellsOfEveryTokenAndAnswer(t *testing.T) {
	p := startProxy(t, answer(200, "LEAK", "Apim-Request-Id", "id-1"),
		vars{"AZURE_LOG_LEVEL": "debug"})
	p.log.waitFor(t, "token ready: ")
	held, _ := p.tokens.current()
	p.tokens.rejected(held)
	p.log.waitFor(t, "token ready: ")
	p.dial(t, request("GET /x")).answer(t)
	line, _ := p.log.waitFor(t, " after ")
	if !strings.HasSuffix(line, ": answered 200 OK; apim-request-id id-1") ||
		strings.Contains(p.log.String(), "LEAK") {
		t.Errorf("got %s", p.log)
	}
}

// Fuzz targets.

func readRequest(line string, fields ...string) (*http.Request, error) {
	return http.ReadRequest(bufio.NewReader(strings.NewReader(request(line, fields...))))
}

func FuzzPath(f *testing.F) {
	for _, target := range []string{"/openai/v1", "//elsewhere/", "/..%2f", "/%252e%252e/x",
		"/a\\..\\b", "/x?api-key=K&a", "/%2e", "/openai/openai", "/anthropic/v1/messages",
		"/v1/anthropic/x", "//anthropic//", "/v1/x?api-version=2024", "/deployments/D/x"} {
		f.Add(target)
	}
	isSlash := func(r rune) bool { return r == '/' || r == '\\' }
	f.Fuzz(func(t *testing.T, requestTarget string) {
		r, err := readRequest("GET " + requestTarget)
		if err != nil {
			return
		}
		for base, roots := range map[string][]string{
			"https://a.example/openai/":        {"/openai/", "/anthropic/v1/"},
			"https://a.example/gw/anthropic/":  {"/gw/openai/", "/gw/anthropic/"},
			"https://a.example":                {"/openai/", "/anthropic/v1/"},
			"https://a.example/models":         {"/models/"},
			"https://a.example/api/projects/p": {"/api/projects/p/"},
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
				for _, segment := range strings.FieldsFunc(path, isSlash) {
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
	never := regexp.MustCompile("(?i)^[^:]*(api-key|cookie)|^(authorization|transfer-encoding|" +
		"content-length|x-ms-token-.*|x-ms-client-principal.*|x-forwarded-.*):|" +
		"^sec-websocket-protocol:.*openai-insecure-api-key[.]")
	f.Fuzz(func(t *testing.T, name, value, connection string) {
		r, err := readRequest("GET /", name+": "+value, "Connection: "+connection)
		if err != nil {
			return
		}
		for _, upgrade := range []string{"", "websocket"} {
			r.Header.Set("Upgrade", upgrade)
			for name, values := range upstreamHeader(r) {
				if line := name + ":" + strings.Join(values, ","); never.MatchString(line) {
					t.Errorf("%q went upstream", line)
				}
			}
		}
	})
}
