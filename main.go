// Aoai-proxy lets a client that only knows an api-key use an Azure OpenAI resource that accepts
// nothing but Microsoft Entra ID tokens.
//
// A client talks plain HTTP to it. The proxy checks an optional shared secret, gets a token of the
// host's managed identity, puts it in the place of the client's credentials, forwards the request
// to TARGET_URL and streams the answer back as it arrives:
//
//	TARGET_URL=https://my-aoai.openai.azure.com/openai/ aoai-proxy
//	curl localhost:8081/v1/chat/completions -H 'Content-Type: application/json' -d …
//
// It is set up by environment variables, or by a .env file in the working directory for those
// settings that the environment leaves out; aoai-proxy -h lists them. It writes no file, starts no
// process and speaks to two places only, by way of DNS and HTTPS_PROXY: the identity endpoint and
// TARGET_URL's host.
//
// main.go is configuration, start and stop; imds.go is how a token is had and kept; forward.go is
// how a request goes to the upstream and its answer comes back.
package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

const usage = `usage: aoai-proxy [-check | -version]

-check    try the settings, the identity and the upstream, and say what is wrong
-version  print the version

Settings, from the environment or a .env file in the working directory:

TARGET_URL           required; base URL of the resource, /openai/ included:
                     https://my-aoai.openai.azure.com/openai/
PORT                 port to listen on, 0 for any free one (8081)
HOST                 address to listen on (without EXPECTED_KEY loopback only,
                     with it every interface)
EXPECTED_KEY         shared secret that clients must present (none)
AZURE_OPENAI_SCOPE   token scope (https://cognitiveservices.azure.com/.default,
                     or its .us or .cn form for such a host)
AZURE_CLIENT_ID      client id of a user-assigned identity (system-assigned one)
AZURE_LOG_LEVEL      debug adds a line per token fetch and per probe (none)

From the environment alone, as they say who is trusted with a token:

IDENTITY_ENDPOINT    token endpoint and its secret, set by App Service,
IDENTITY_HEADER      Functions and Container Apps (IMDS)
AZURE_POD_IDENTITY_AUTHORITY_HOST
                     where IMDS is (http://169.254.169.254)
HTTPS_PROXY, NO_PROXY
                     proxy to the upstream, and to Entra ID; its exceptions
SSL_CERT_FILE, SSL_CERT_DIR
                     certificate authorities
GODEBUG              settings of the Go library, TLS among them
and what other platforms set: AZURE_FEDERATED_TOKEN_FILE, AZURE_TENANT_ID,
AZURE_AUTHORITY_HOST, IMDS_ENDPOINT, MSI_ENDPOINT, MSI_SECRET,
DEFAULT_IDENTITY_CLIENT_ID, IDENTITY_SERVER_THUMBPRINT
`

// settings are the variables that a .env file may set.
var settings = strings.Fields(`TARGET_URL PORT HOST EXPECTED_KEY AZURE_OPENAI_SCOPE AZURE_CLIENT_ID
	AZURE_LOG_LEVEL`)

// environmentOnly are the variables that it may not, although the program or the Go library reads
// them: a .env file that came with somebody's repository would get the token with them.
var environmentOnly = strings.Fields(`HTTPS_PROXY NO_PROXY https_proxy no_proxy
	SSL_CERT_FILE SSL_CERT_DIR GODEBUG IDENTITY_ENDPOINT IDENTITY_HEADER IDENTITY_SERVER_THUMBPRINT
	IMDS_ENDPOINT MSI_ENDPOINT MSI_SECRET DEFAULT_IDENTITY_CLIENT_ID AZURE_FEDERATED_TOKEN_FILE
	AZURE_TENANT_ID AZURE_AUTHORITY_HOST AZURE_POD_IDENTITY_AUTHORITY_HOST`)

// tlsDefaults are today's defaults of TLS and certificates. The line "go 1.22" in go.mod lets Go
// 1.22 build the program, but makes a newer toolchain fall back to the defaults of 2024, which
// offer 3DES and SHA-1, accept RSA keys below 1024 bits and leave out post-quantum key exchange.
const tlsDefaults = "tls3des=0,tlssha1=0,tlsmlkem=1,tlssecpmlkem=1,rsa1024min=1," +
	"x509negativeserial=0,x509usepolicies=1,x509rsacrt=1,x509sslcertoverrideplatform=1"

// init runs before TLS is first used. What the operator set in GODEBUG comes last and so wins.
func init() {
	os.Setenv("GODEBUG", strings.TrimSuffix(tlsDefaults+","+os.Getenv("GODEBUG"), ","))
}

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "aoai-proxy:", (&secrets{}).safe(err.Error(), maxLine))
		os.Exit(1)
	}
}

// run is the program but for its exit status.
func run(args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("aoai-proxy", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // one line, by main, instead of the usage text
	checkOnly := flags.Bool("check", false, "")
	showVersion := flags.Bool("version", false, "")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(stdout, usage)
		return nil
	case err != nil:
		return fmt.Errorf("%w; aoai-proxy -h shows the usage", err)
	case flags.NArg() > 0:
		return fmt.Errorf("unexpected argument %q; aoai-proxy -h shows the usage", flags.Arg(0))
	case *showVersion:
		fmt.Fprintln(stdout, version())
		return nil
	}

	// Without this, writing to a stderr that nobody reads any more would end the program.
	signal.Ignore(syscall.SIGPIPE)

	file, err := readDotEnv(".env")
	if err != nil {
		return err
	}
	getenv := func(name string) string {
		if value := os.Getenv(name); strings.TrimSpace(value) != "" || !slices.Contains(settings, name) {
			return value
		}
		return file.values[name]
	}
	if *checkOnly {
		for _, line := range file.report(os.Getenv) {
			fmt.Fprintln(stdout, "ok    .env:", line)
		}
		return check(getenv, stdout)
	}
	cfg, err := loadConfig(getenv)
	if err != nil && len(file.refused) > 0 {
		return fmt.Errorf("%w (%s)", err, file.refusal())
	}
	if err != nil {
		return err
	}
	listeners, err := listen(cfg)
	if err != nil {
		return err
	}
	log.SetOutput(logWriter{cfg.secrets, log.Writer()})
	for _, line := range file.report(os.Getenv) {
		log.Print(line)
	}
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	return newProxy(cfg).serve(listeners, signals)
}

// logWriter is where the log goes. The parts of a line that come from outside are safe already, but
// net/http logs, too: what an upstream sends after its answer, for one, as it came.
type logWriter struct {
	*secrets
	out io.Writer
}

func (w logWriter) Write(line []byte) (int, error) {
	text := w.safe(strings.TrimSuffix(string(line), "\n"), maxLine)
	if _, err := io.WriteString(w.out, text+"\n"); err != nil {
		return 0, err
	}
	return len(line), nil
}

// version is what the Go toolchain stamped into the binary.
func version() string {
	text := "aoai-proxy"
	if info, ok := debug.ReadBuildInfo(); ok {
		// Since Go 1.24 with the commit, and +dirty; empty for go run with a list of files.
		text += " " + cmp.Or(info.Main.Version, "(devel)")
	}
	return text + " " + runtime.Version() + " " + runtime.GOOS + "/" + runtime.GOARCH
}

// dotEnv is what a .env file holds.
type dotEnv struct {
	exists  bool
	values  map[string]string // of settings
	refused []string          // those of environmentOnly that are in it
}

// report says in lines for the log what is taken of the file and what is not. It shows no values.
func (d dotEnv) report(getenv func(string) string) []string {
	if !d.exists {
		return nil
	}
	var taken []string
	for _, name := range settings {
		if strings.TrimSpace(d.values[name]) != "" && strings.TrimSpace(getenv(name)) == "" {
			taken = append(taken, name)
		}
	}
	lines := []string{"read .env in the working directory for what the environment leaves out: " +
		cmp.Or(strings.Join(taken, ", "), "nothing")}
	if len(d.refused) > 0 {
		lines = append(lines, d.refusal())
	}
	return lines
}

// refusal names what is not taken.
func (d dotEnv) refusal() string {
	return "not taken from .env, as it must come from the environment: " + strings.Join(d.refused, ", ")
}

// readDotEnv reads the file, if there is one. A directory of this name is a Python environment, and a
// device has no end.
func readDotEnv(file string) (dotEnv, error) {
	info, err := os.Stat(file)
	if errors.Is(err, fs.ErrNotExist) || err == nil && info.Mode()&(fs.ModeDir|fs.ModeDevice) != 0 {
		return dotEnv{}, nil
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return dotEnv{}, fmt.Errorf("reading %s: %w", file, errors.Unwrap(err))
	}
	d, err := parseDotEnv(string(text))
	if err != nil {
		return dotEnv{}, fmt.Errorf("%s %w", file, err)
	}
	return d, nil
}

// parseDotEnv reads the lines that set one of our settings; other programs may have theirs in the
// same file, in forms of their own. Its errors name the line and never show it: it may hold a secret.
func parseDotEnv(text string) (dotEnv, error) {
	d := dotEnv{exists: true, values: make(map[string]string)}
	// A byte order mark of UTF-16, or NUL bytes, of which UTF-16 without one is full.
	if strings.HasPrefix(text, "\xff\xfe") || strings.HasPrefix(text, "\xfe\xff") ||
		strings.Contains(text, "\x00") {
		return dotEnv{}, errors.New("is not UTF-8 text; save it as UTF-8 " +
			"(in Windows PowerShell with Set-Content -Encoding utf8, not >)")
	}
	for i, line := range strings.Split(strings.TrimPrefix(text, "\ufeff"), "\n") {
		line = strings.TrimSpace(line)
		if words := strings.Fields(line); len(words) > 1 && words[0] == "export" {
			line = strings.TrimSpace(strings.TrimPrefix(line, "export"))
		}
		rest := strings.TrimLeft(line, letters+digits+"_-.")
		name := line[:len(line)-len(rest)]
		if slices.Contains(environmentOnly, name) && !slices.Contains(d.refused, name) {
			d.refused = append(d.refused, name)
		}
		if !slices.Contains(settings, name) {
			continue
		}
		value, ok := parseDotEnvValue(rest)
		if !ok {
			return dotEnv{}, fmt.Errorf(`line %d: want NAME=value or NAME="value"`, i+1)
		}
		d.values[name] = value
	}
	return d, nil
}

// parseDotEnvValue reads =value. The value is in single or double quotes, or bare up to a comment;
// there are no escapes and no expansions.
func parseDotEnvValue(text string) (value string, ok bool) {
	value, ok = strings.CutPrefix(strings.TrimSpace(text), "=")
	if quoted := strings.TrimSpace(value); quoted != "" && (quoted[0] == '"' || quoted[0] == '\'') {
		value, rest, closed := strings.Cut(quoted[1:], quoted[:1])
		rest = strings.TrimSpace(rest)
		return value, ok && closed && (rest == "" || rest[0] == '#')
	}
	value, _, _ = strings.Cut(strings.ReplaceAll(value, "\t#", " #"), " #")
	return strings.TrimSpace(value), ok
}

const (
	letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	digits  = "0123456789"
)

// consistsOf tells whether s has characters of the set only, and at least one.
func consistsOf(s, set string) bool { return s != "" && strings.Trim(s, set) == "" }

// config is the settings, checked.
type config struct {
	target *url.URL // "https://my-aoai.openai.azure.com/openai/"
	host   string   // "127.0.0.1"; empty for the default
	port   string   // "8081"
	key    string   // EXPECTED_KEY; empty for none
	scope  string   // "https://cognitiveservices.azure.com/.default"
	debug  bool     // AZURE_LOG_LEVEL=debug
	source *source

	secrets *secrets // of the settings, the source and its tokens
}

// loadConfig reads the settings; white space around one doesn't count. Its error names the
// variable, what is wrong with it and what a right value looks like.
func loadConfig(getenv func(string) string) (*config, error) {
	get := func(name string) string { return strings.TrimSpace(getenv(name)) }
	target, err := parseTarget(get("TARGET_URL"))
	if err != nil {
		return nil, err
	}
	cfg := &config{
		target: target,
		host:   strings.Trim(get("HOST"), "[]"),
		port:   cmp.Or(get("PORT"), "8081"),
		key:    get("EXPECTED_KEY"),
		scope:  cmp.Or(get("AZURE_OPENAI_SCOPE"), defaultScope(target.Hostname())),
		debug:  isDebug(get),

		secrets: &secrets{},
	}
	cfg.secrets.hide("key", cfg.key)
	if !isPort(cfg.port) {
		return nil, fmt.Errorf("PORT: want a number from 0 to 65535 such as 8081, got %q", cfg.port)
	}
	for _, name := range []string{"EXPECTED_KEY", "AZURE_CLIENT_ID", "IDENTITY_HEADER", "MSI_SECRET"} {
		if !isPrintableASCII(get(name)) {
			return nil, fmt.Errorf("%s: has characters that a header cannot carry; want printable ASCII",
				name)
		}
	}
	if !isPrintableASCII(cfg.scope) || strings.Contains(cfg.scope, " ") {
		return nil, fmt.Errorf("AZURE_OPENAI_SCOPE: want a scope such as "+
			"https://cognitiveservices.azure.com/.default, got %q", cfg.scope)
	}
	if err := checkProxy(getenv); err != nil {
		return nil, err
	}
	cfg.source, err = newSource(get, cfg.scope, cfg.secrets)
	return cfg, err
}

// checkProxy refuses a HTTPS_PROXY that cannot be read. The Go library would ignore it and send the
// token directly. HTTP_PROXY is never used, see proxyTo.
func checkProxy(getenv func(string) string) error {
	for _, name := range []string{"HTTPS_PROXY", "https_proxy"} {
		raw := getenv(name) // as it is: the Go library does not trim it
		if raw != "" && !strings.Contains(raw, "://") {
			raw = "http://" + raw
		}
		u, err := url.Parse(raw)
		schemes := []string{"http", "https", "socks5", "socks5h"}
		if raw != "" && (err != nil || !hasHost(u) || !slices.Contains(schemes, u.Scheme) ||
			strings.Trim(u.Path+u.RawQuery+u.Fragment, "/") != "") { // of a password, mostly
			return fmt.Errorf("%s: not a URL of a proxy; want one such as http://proxy.example:3128 or "+
				"http://USER:PASSWORD@proxy.example:3128, with special characters in the password "+
				"percent-encoded (%%25 for %%)", name)
		}
	}
	return nil
}

// parseTarget checks TARGET_URL and supplies a missing final slash. Its errors show no more of the
// URL than scheme and host, as there may be a key in the rest.
func parseTarget(raw string) (*url.URL, error) {
	const want = "want a base URL such as https://my-aoai.openai.azure.com/openai/"
	u, err := url.Parse(strings.TrimSuffix(raw, "/") + "/")
	switch {
	case raw == "":
		return nil, errors.New("TARGET_URL: not set; " + want)
	case err != nil || u.Scheme == "" || !hasHost(u) || strings.Contains(raw, " "):
		return nil, errors.New("TARGET_URL: not a URL with https:// and a host; " + want)
	case u.Scheme != "https" && u.Scheme != "http":
		return nil, fmt.Errorf("TARGET_URL: is for %s; %s", u.Scheme, want)
	case u.Scheme == "http" && !isLoopback(u.Hostname()):
		return nil, fmt.Errorf("TARGET_URL: http://%s would send the token over a network in the clear; "+
			"want https, or http for localhost only", u.Host)
	case u.User != nil || u.RawQuery != "" || u.Fragment != "":
		return nil, errors.New("TARGET_URL: has a user name, a query or a fragment; " + want)
	case !isPlainPath(u.Path):
		return nil, errors.New("TARGET_URL: has a . or .. in its path, or is escaped twice; " + want)
	}
	u.Host = strings.ToLower(u.Host)
	return u, nil
}

// hasHost tells whether a URL has a host and, if any, a port that exists.
func hasHost(u *url.URL) bool { return u.Hostname() != "" && isPort(cmp.Or(u.Port(), "0")) }

func isPort(s string) bool {
	_, err := strconv.ParseUint(s, 10, 16)
	return err == nil
}

// isLoopback tells whether a host without a port is localhost or a loopback literal, exactly. Names
// count in any case (RFC 3986 §3.2.2), and a final dot is part of none.
func isLoopback(host string) bool {
	return strings.ToLower(strings.TrimSuffix(host, ".")) == "localhost" ||
		net.ParseIP(host).IsLoopback()
}

func isDebug(getenv func(string) string) bool {
	return strings.EqualFold(getenv("AZURE_LOG_LEVEL"), "debug")
}

func isPrintableASCII(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' })
}

// defaultScope is the scope of Azure OpenAI in the cloud that host, in lower case, belongs to.
func defaultScope(host string) string {
	for _, cloud := range []string{"us", "cn"} {
		if strings.HasSuffix(strings.TrimSuffix(host, "."), ".azure."+cloud) {
			return "https://cognitiveservices.azure." + cloud + "/.default"
		}
	}
	return "https://cognitiveservices.azure.com/.default"
}

// listenHosts are where to listen: at HOST if that is set, on every interface if clients need a
// key, else on both loopback addresses, as localhost may mean either.
func (c *config) listenHosts() []string {
	if c.host != "" || c.key != "" {
		return []string{c.host}
	}
	addrs, _ := net.InterfaceAddrs() // without them, IPv4 alone
	if slices.ContainsFunc(addrs, func(a net.Addr) bool { return a.String() == "::1/128" }) {
		return []string{"127.0.0.1", "::1"}
	}
	return []string{"127.0.0.1"}
}

// listen opens the listening sockets. PORT=0 stands for one port on all of the hosts: if what was
// free on the first is taken on the next, another is tried.
func listen(cfg *config) (listeners []net.Listener, err error) {
	for range 10 {
		listeners, err = listenOn(cfg.listenHosts(), cfg.port)
		if err == nil || cfg.port != "0" {
			break
		}
	}
	return listeners, err
}

func listenOn(hosts []string, port string) ([]net.Listener, error) {
	var listeners []net.Listener
	for _, host := range hosts {
		network := "tcp"
		if net.ParseIP(host).To4() != nil {
			network = "tcp4" // or 0.0.0.0 would be every IPv6 address, too
		}
		ln, err := net.Listen(network, net.JoinHostPort(host, port))
		if err != nil {
			for _, opened := range listeners {
				opened.Close()
			}
			return nil, fmt.Errorf("PORT or HOST: %w; want a free port such as 8082 (0 for any) "+
				"and an address of this host", err)
		}
		listeners = append(listeners, ln)
		_, port, _ = net.SplitHostPort(ln.Addr().String())
	}
	return listeners, nil
}

// proxy is the running program.
type proxy struct {
	cfg       *config
	tokens    *tokenSource
	forward   *forwarder
	server    *http.Server
	drainTime time.Duration // for running streams, after SIGTERM
	draining  atomic.Bool   // since then; /readyz says so
}

func newProxy(cfg *config) *proxy {
	tokens := &tokenSource{fetch: cfg.source.fetch, now: time.Now}
	p := &proxy{
		cfg:       cfg,
		tokens:    tokens,
		forward:   newForwarder(cfg, tokens),
		drainTime: 10 * time.Minute,
	}
	p.server = &http.Server{
		Handler:                      p,
		DisableGeneralOptionsHandler: true,             // OPTIONS * is not answered for the upstream
		ReadHeaderTimeout:            15 * time.Second, // bounds clients that dribble or say nothing
		ReadTimeout:                  0,                // an upload may take its time
		WriteTimeout:                 0,                // so may a model
		IdleTimeout:                  2 * time.Minute,  // between two requests of a connection
		MaxHeaderBytes:               64 << 10,         // codex sends kilobytes
		ConnContext: func(ctx context.Context, client net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, client) // for reset
		},
	}
	return p
}

// ServeHTTP has every route: the probes, which are answered here and need no key, and all else,
// which goes to the upstream. What looks like a probe but names a host or has a body is for the
// forwarder to judge.
func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	// The server drops the Transfer-Encoding of an HTTP/1.0 request (golang/go#12785), and would take
	// the body that follows for the next request (RFC 9112 §6.1).
	if !r.ProtoAtLeast(1, 1) {
		w.Header().Set("Connection", "close")
	}
	isProbe := r.URL.Path == "/" || r.URL.Path == "/healthz" || r.URL.Path == "/readyz"
	isRead := r.Method == http.MethodGet || r.Method == http.MethodHead
	if !isProbe || !isRead || r.ContentLength != 0 || r.URL.Host != "" {
		p.forward.ServeHTTP(w, r)
		return
	}
	if p.cfg.debug {
		log.Printf("debug: probe %s from %s", r.URL.Path, r.RemoteAddr)
	}
	if r.URL.Path == "/readyz" {
		if reason := p.notReady(r); reason != "" {
			http.Error(w, reason, http.StatusServiceUnavailable)
			return
		}
	}
	fmt.Fprintln(w, "ok")
}

// notReady says why the proxy is not ready, or nothing.
func (p *proxy) notReady(r *http.Request) string {
	if p.draining.Load() {
		return "shutting down"
	}
	if _, err := p.tokens.token(r.Context()); err != nil {
		return noToken(r, err, false)
	}
	return ""
}

// serve answers requests until a signal arrives. Then it stops accepting and lets the running
// requests and tunnels finish, for drainTime at most or until a second signal.
func (p *proxy) serve(listeners []net.Listener, signals <-chan os.Signal) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	p.server.BaseContext = func(net.Listener) context.Context { return ctx }
	_, port, _ := net.SplitHostPort(listeners[0].Addr().String())
	p.logStart(port)
	go p.tokens.token(ctx) // both so that the first request need not wait
	p.forward.warm()       // before there is another connection that its request could go out on
	failed := make(chan error, len(listeners))
	for _, ln := range listeners {
		go func() { failed <- p.server.Serve(ln) }()
	}
	select {
	case err := <-failed:
		return err
	case <-signals:
	}

	// Drain. What still runs when ctx ends, a tunnel too, is broken off then.
	p.draining.Store(true)
	log.Printf("draining %d streams (up to %v; a second signal ends them now)",
		p.forward.active.Load(), p.drainTime)
	time.AfterFunc(p.drainTime, cancel)
	go func() {
		<-signals
		cancel()
	}()
	p.server.Shutdown(ctx)
	time.AfterFunc(lingerTime, func() { p.server.Close() }) // on clients that don't read what is left
	for p.forward.active.Load() > 0 {                       // tunnels, of which Shutdown knows nothing
		time.Sleep(10 * time.Millisecond)
	}
	log.Print("stopped")
	return nil
}

// logStart says where the proxy listens, who may use it and as whom.
func (p *proxy) logStart(port string) {
	cfg := p.cfg
	if !strings.Contains(cfg.target.Path, "openai") {
		log.Print("warning: " + noOpenAI)
	}
	for _, host := range cfg.listenHosts() {
		log.Printf("proxy listening on %s ➜ %s", net.JoinHostPort(host, port), cfg.target)
	}
	log.Printf("tokens for %s come from %s at %s, %s", cfg.scope, cfg.source.name, cfg.source.url.Host,
		cfg.source.why())
	log.Print(cfg.whoMayUseIt())
}

// noOpenAI warns of a TARGET_URL whose /openai/ may have been forgotten.
const noOpenAI = "the path of TARGET_URL has no openai in it, which is right for Foundry's " +
	"/anthropic/ and /models/ or a gateway's own path only"

// whoMayUseIt says who can speak with the identity through the proxy.
func (c *config) whoMayUseIt() string {
	switch {
	case c.key != "":
		return "EXPECTED_KEY is set: whoever has the key may use this host's identity"
	case c.host == "":
		return "no EXPECTED_KEY: every user of this host, and nobody else, may use its identity; " +
			"set EXPECTED_KEY to ask for a key and listen on every interface, or HOST to choose one"
	case isLoopback(c.host):
		return "no EXPECTED_KEY: every user of this host, and nobody else, may use its identity"
	}
	return "warning: no EXPECTED_KEY: whoever reaches this port may use this host's identity"
}

// check tries what the proxy needs, step by step, and says what is wrong and what to do. It sends a
// token request and one request to the upstream that uses no model, nothing else.
func check(getenv func(string) string, out io.Writer) error {
	hidden := &secrets{} // none until the settings are read
	ok := func(step, format string, args ...any) {
		text := hidden.safe(fmt.Sprintf(format, args...), maxLine)
		fmt.Fprintf(out, "ok    %s: %s\n", step, text)
	}
	fail := func(step, text string, hints ...string) error {
		fmt.Fprintf(out, "FAIL  %s: %s\n", step, hidden.safe(text, maxLine))
		for _, hint := range hints {
			if hint != "" {
				fmt.Fprintf(out, "      hint: %s\n", hidden.safe(hint, maxLine))
			}
		}
		return errors.New(step + " failed the check")
	}
	cfg, err := loadConfig(getenv)
	if err != nil {
		return fail("settings", err.Error())
	}
	hidden = cfg.secrets
	log.SetOutput(logWriter{hidden, log.Writer()})
	ok("settings", "TARGET_URL is %s, the scope %s", cfg.target, cfg.scope)
	var addrs []string
	for _, host := range cfg.listenHosts() {
		addrs = append(addrs, net.JoinHostPort(host, cfg.port))
	}
	ok("settings", "to listen on %s, which is not tried; %s", strings.Join(addrs, " and "),
		cfg.whoMayUseIt())
	ok("identity", "%s at %s, %s", cfg.source.name, cfg.source.url.Host, cfg.source.why())

	ctx, cancel := context.WithTimeout(context.Background(), fetchTime)
	defer cancel()
	t, tokenErr := cfg.source.fetch(ctx)
	if tokenErr != nil {
		return fail("token", tokenErr.text, tokenErr.hint)
	}
	c := t.claims()
	c.Object = hidden.safe(c.Object, maxPiece)
	ok("token", "audience %s, tenant %s, object id %s, client id %s, expires %s",
		c.Audience, c.Tenant, c.Object, c.Client, t.expires.Format(time.RFC3339))

	f := newForwarder(cfg, nil)
	req := f.checkRequest()
	req.Header.Set("Authorization", t.authorization)
	trace := &httptrace.ClientTrace{
		DNSDone: func(info httptrace.DNSDoneInfo) {
			if info.Err == nil {
				ok("DNS", "%v", info.Addrs)
			}
		},
		GotConn: func(info httptrace.GotConnInfo) {
			ok("TCP", "connected to %s", info.Conn.RemoteAddr())
			if conn, isTLS := info.Conn.(*tls.Conn); isTLS {
				state := conn.ConnectionState()
				ok("TLS", "%s, certificate of %s",
					tls.VersionName(state.Version), state.PeerCertificates[0].Subject)
			}
		},
	}
	ctx, cancel = context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	resp, err := f.transport.RoundTrip(req.WithContext(httptrace.WithClientTrace(ctx, trace)))
	if err != nil {
		text, hint := f.failure(err)
		return fail("upstream", text, hint)
	}
	defer resp.Body.Close()
	said, _ := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	asked := req.Method + " " + req.URL.Scheme + "://" + req.URL.Host + req.URL.RequestURI()
	said, canRead := unpacked(said, resp.Header.Get("Content-Encoding")) // though none was asked for
	text, hint := f.explain(resp, said, canRead, t)
	answered := asked + ": " + text
	isJSON := strings.HasPrefix(strings.TrimSpace(string(said)), "{")
	switch status := resp.StatusCode; {
	case req.Method == http.MethodGet && status == http.StatusOK && isJSON:
		ok("upstream", "%s", answered)
		return nil
	case req.Method == http.MethodPost && status == http.StatusBadRequest &&
		reason(said) == "invalid_request_error":
		ok("upstream", "%s: as it should of an empty object", answered)
		return nil
	case cfg.target.Path == "/models/" && status == http.StatusNotFound:
		ok("upstream", "%s: answered %s, as services without a list of models do", asked,
			statusText(status))
		return nil
	}
	pathHint := noOpenAI
	if strings.Contains(cfg.target.Path, "openai") {
		pathHint = ""
	}
	err = fail("upstream", answered, hint, pathHint)
	if text := words(said); text != "" {
		fmt.Fprintf(out, "      it says: %s\n", hidden.safe(text, maxPiece))
	}
	name, _, _ := strings.Cut(req.URL.Host, ".")
	inShell := func(s string) bool { return consistsOf(s, letters+digits+"-") }
	isUUID := len(c.Object) == 36 && inShell(c.Object)
	if isUUID && inShell(name) && strings.Contains(hint, roleName) {
		fmt.Fprintf(out, roleCommand, c.Object, roleName, name)
	}
	return err
}

// checkRequest asks the upstream for something that only a right URL, token and role get: the list of
// models, or of Claude, which has none, the refusal of a message that is an empty JSON object.
func (f *forwarder) checkRequest() *http.Request {
	header := http.Header{"User-Agent": {"aoai-proxy"}}
	if strings.Contains(f.target.Path, "/anthropic/") {
		header.Set("Content-Type", "application/json")
		header.Set("Anthropic-Version", "2023-06-01")
		return &http.Request{Method: http.MethodPost, URL: upstreamURL(f.target, "/v1/messages"),
			Header: header, Body: io.NopCloser(strings.NewReader("{}")), ContentLength: 2}
	}
	u := upstreamURL(f.target, "/models")
	if !strings.HasSuffix(f.target.Path, "/v1/") { // which has no versions
		u.RawQuery = "api-version=2024-10-21"
	}
	return &http.Request{Method: http.MethodGet, URL: u, Header: header}
}

// roleCommand gives the identity its role on the resource whose host begins so.
const roleCommand = `      az role assignment create --assignee-object-id %s \
        --assignee-principal-type ServicePrincipal --role "%s" \
        --scope "$(az cognitiveservices account list \
        --query "[?properties.customSubDomainName=='%s'].id" --output tsv)"
`
