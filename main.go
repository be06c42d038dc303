// Aoai-proxy lets a client that only knows an api-key use an Azure OpenAI
// resource that accepts nothing but Microsoft Entra ID tokens.
//
// A client talks plain HTTP to it. The proxy checks an optional shared secret,
// gets a token of the host's managed identity, puts it in the place of the
// client's credentials, forwards the request to TARGET_URL and streams the
// answer back as it arrives:
//
//	TARGET_URL=https://my-aoai.openai.azure.com/openai/ aoai-proxy
//	curl localhost:8081/v1/chat/completions -H 'Content-Type: application/json' -d …
//
// Its inputs are environment variables, which the usage text below lists, and
// the token or key file of the platform, where that has one. (Go's library and
// runtime heed a few more variables, such as GODEBUG, GOGC and TZ.) Its outputs
// are answers to clients and the log on stderr. It writes no file, starts no
// process and, name lookups aside, speaks to two places only: the identity
// endpoint, and TARGET_URL's host. HTTPS_PROXY, if it is set, is on the way to
// the latter, and to Entra ID where tokens come from there. As a service it
// tells systemd, on this host, when it is ready and when it stops.
//
// There are three files: main.go has the inputs, the start, the stop and
// -check; imds.go gets tokens and keeps them; forward.go forwards requests.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"regexp"
	"runtime/debug"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// usage lists every input. A test holds it against what is read.
const usage = `usage: aoai-proxy [-check | -version | -h]

  -check    try the settings, the identity and the upstream, and say what is wrong
  -version  print the version
  -h        print this

Settings are environment variables. An empty one counts as not set.

  TARGET_URL          required; base URL of the resource, such as
                      https://my-aoai.openai.azure.com/openai/
  PORT                port to listen on, 0 for any free one; 8081 by default
  HOST                address to listen on, 0.0.0.0 for every interface; loopback
                      only by default
  EXPECTED_KEY        shared secret that clients must present; none by default
  AZURE_OPENAI_SCOPE  token scope; by default that of TARGET_URL's cloud, such as
                      https://cognitiveservices.azure.com/.default
  AZURE_CLIENT_ID     client id of a user-assigned identity; the system-assigned
                      one by default
  AZURE_CLIENT_SECRET secret of an app registration, for a host without a managed
                      identity; with AZURE_TENANT_ID and AZURE_CLIENT_ID
  DRAIN_DELAY         how long to go on accepting after SIGTERM, such as 10s, until
                      a balancer has seen that /readyz says 503; 0 by default
  AZURE_LOG_LEVEL     debug adds a line per answer and per renewed token

Set by the platform, or by who runs the host:

  IDENTITY_ENDPOINT           App Service, Functions, Container Apps, Automation,
                              Azure Arc
  IDENTITY_HEADER             the same except Azure Arc
  IDENTITY_SERVER_THUMBPRINT  Service Fabric, which is refused
  IMDS_ENDPOINT               Azure Arc
  MSI_ENDPOINT                Azure Machine Learning, Cloud Shell
  MSI_SECRET                  Azure Machine Learning
  DEFAULT_IDENTITY_CLIENT_ID  Azure Machine Learning
  AZURE_FEDERATED_TOKEN_FILE  AKS workload identity, and wherever else a workload has
                              a token of an OIDC issuer
  AZURE_TENANT_ID             the same, and AZURE_CLIENT_SECRET
  AZURE_AUTHORITY_HOST        these two; https://login.microsoftonline.com by default
  AZURE_POD_IDENTITY_AUTHORITY_HOST
                              a relay to IMDS; http://169.254.169.254 by default
  NOTIFY_SOCKET               systemd, for a service of Type=notify
  HTTPS_PROXY, NO_PROXY       proxy to the upstream and to Entra ID, and hosts that
                              need none; also in lower case
  SSL_CERT_FILE, SSL_CERT_DIR certificate authorities
`

// exitConfig is the exit status for settings that have to be changed before the
// program can start: EX_CONFIG of sysexits.h. deploy/aoai-proxy.service has
// systemd not try again then.
const exitConfig = 78

// configError is a wrong setting. Any other error ends the program with status
// 1.
type configError struct{ error }

// logger writes the log. The standard one is silent: net/http's transport
// writes to that what comes on an idle connection, which may be the end of a
// token.
var logger = log.New(lineWriter{os.Stderr}, "", log.LstdFlags)

func main() {
	log.SetOutput(io.Discard)
	err := run(os.Args[1:], os.Stdout)
	if err == nil {
		return
	}
	fmt.Fprintln(lineWriter{os.Stderr}, "aoai-proxy:", err)
	if errors.As(err, new(configError)) {
		os.Exit(exitConfig)
	}
	os.Exit(1)
}

// run is the whole program.
func run(args []string, stdout io.Writer) error {
	isCheck := false
	switch word := strings.Join(args, " "); word {
	case "":
	case "-check", "--check":
		isCheck = true
	case "-h", "-help", "--help":
		fmt.Fprint(stdout, usage)
		return nil
	case "-version", "--version":
		if info, ok := debug.ReadBuildInfo(); ok { // from Go 1.24 on it has the commit
			fmt.Fprintln(stdout, "aoai-proxy", info.Main.Version, info.GoVersion)
		}
		return nil
	default:
		return fmt.Errorf("unexpected argument %q; aoai-proxy -h shows the usage", word)
	}

	cfg, err := loadConfig(os.Getenv)
	if isCheck {
		return check(cfg, err, lineWriter{stdout})
	}
	if err != nil {
		return configError{err}
	}
	listeners, err := listen(cfg)
	if err != nil { // no configError, as the port may become free
		return err
	}
	signal.Ignore(syscall.SIGPIPE) // it would end the program when stderr is closed
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	return newService(cfg).serve(listeners, signals)
}

// config is the settings, checked.
type config struct {
	target       *target
	host         string        // HOST: "127.0.0.1"; empty if it is not set
	port         string        // PORT: "8081"
	key          string        // EXPECTED_KEY; empty for none
	scope        string        // "https://cognitiveservices.azure.com/.default"
	drainDelay   time.Duration // DRAIN_DELAY
	debug        bool          // AZURE_LOG_LEVEL=debug
	endpoint     *endpoint
	notifySocket string // NOTIFY_SOCKET: "/run/systemd/notify"
}

// loadConfig reads the variables. White space around a value does not count.
// Its error names the variable, and says what a right value looks like.
func loadConfig(getenv func(string) string) (*config, error) {
	env := func(name string) string { return strings.TrimSpace(getenv(name)) }
	cfg := &config{
		host:         strings.Trim(env("HOST"), "[]"), // [::1] is how a URL has it
		port:         cmp.Or(env("PORT"), "8081"),
		key:          env("EXPECTED_KEY"),
		debug:        strings.EqualFold(env("AZURE_LOG_LEVEL"), "debug"),
		notifySocket: env("NOTIFY_SOCKET"),
	}
	var err error
	if cfg.target, err = parseTarget(env("TARGET_URL")); err != nil {
		return nil, fmt.Errorf("TARGET_URL: %w", err)
	}
	if _, err := strconv.ParseUint(cfg.port, 10, 16); err != nil {
		return nil, fmt.Errorf("PORT: want a number from 0 to 65535 such as 8081, got %q", cfg.port)
	}
	cfg.drainDelay, err = time.ParseDuration(cmp.Or(env("DRAIN_DELAY"), "0"))
	if err != nil || cfg.drainDelay < 0 {
		return nil, fmt.Errorf("DRAIN_DELAY: want a time such as 10s, got %q", env("DRAIN_DELAY"))
	}
	for _, name := range []string{"HTTPS_PROXY", "https_proxy"} {
		// Go does not trim it, and goes without a proxy if it cannot parse its
		// URL, as is done here (parseProxy in golang.org/x/net/http/httpproxy).
		// The usual reason is a password with characters that must be escaped
		// there.
		value := getenv(name)
		if !strings.Contains(value, "://") {
			value = "http://" + value
		}
		if _, err := url.Parse(value); err != nil {
			return nil, fmt.Errorf("%s: not a URL; want one such as http://proxy.example:3128, "+
				"with special characters in a password percent-encoded (%%25 for %%)", name)
		}
	}
	cfg.scope = cmp.Or(env("AZURE_OPENAI_SCOPE"), cfg.target.defaultScope())
	cfg.endpoint, err = newEndpoint(env, cfg.scope, arcFilesHere())
	if err != nil {
		return nil, err
	}
	// Elsewhere every user of the host can as a rule ask the endpoint as well.
	// If its operator bars some from it, or from a client secret or token file,
	// the port must have a key too: the log says who may use it.
	if cfg.endpoint.keyDir != "" && cfg.key == "" {
		return nil, errors.New("EXPECTED_KEY: not set, but Azure Arc gives tokens to root and " +
			"the group himds alone; without a key every user of this host could use them")
	}
	return cfg, nil
}

// listenHosts are the addresses to listen on: HOST, or else both loopback
// addresses, as localhost may mean either, or IPv4's alone on a host without
// IPv6.
func listenHosts(host string) []string {
	if host != "" {
		return []string{host}
	}
	addrs, _ := net.InterfaceAddrs() // if it fails, IPv4 will do
	for _, addr := range addrs {
		if addr.String() == "::1/128" { // this host has IPv6
			return []string{"127.0.0.1", "::1"}
		}
	}
	return []string{"127.0.0.1"}
}

// listen opens a socket for each of listenHosts. With PORT=0 the first one
// finds a free port, and the other takes the same.
func listen(cfg *config) ([]net.Listener, error) {
	var listeners []net.Listener
	port := cfg.port
	for _, host := range listenHosts(cfg.host) {
		network := "tcp"
		if net.ParseIP(host).To4() != nil {
			network = "tcp4" // with tcp, 0.0.0.0 would mean every IPv6 address too
		}
		ln, err := net.Listen(network, net.JoinHostPort(host, port))
		if err != nil {
			return nil, fmt.Errorf("PORT or HOST: %w; want a free port such as 8082 (0 for any) "+
				"and an address of this host", err)
		}
		listeners = append(listeners, listener{ln})
		_, port, _ = net.SplitHostPort(ln.Addr().String())
	}
	return listeners, nil
}

// listener accepts connections that notice when a client speaks TLS, as it does
// if its base URL begins with https://. The client's user is told nothing of
// that, or sees a time-out after minutes.
type listener struct{ net.Listener }

func (l listener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err == nil {
		conn = &clientConn{TCPConn: conn.(*net.TCPConn)}
	}
	return conn, err
}

// clientConn looks at the first byte of a connection. All else is the
// TCPConn's; a tunnel, for one, needs its CloseWrite.
type clientConn struct {
	*net.TCPConn
	hasRead bool
}

func (c *clientConn) Read(p []byte) (int, error) {
	n, err := c.TCPConn.Read(p)
	const handshake = 0x16 // of a TLS record (RFC 8446 §5.1); no method begins with it
	if n > 0 && !c.hasRead && p[0] == handshake {
		logger.Printf("client %s speaks TLS: give it http:// in its base URL", c.RemoteAddr())
	}
	c.hasRead = true
	return n, err
}

// service is the running program.
type service struct {
	cfg       *config
	tokens    *tokenSource
	forwarder *forwarder
	server    *http.Server
	drainTime time.Duration // for running requests and tunnels to finish
	stopping  atomic.Bool   // set by SIGTERM
}

func newService(cfg *config) *service {
	tokens := newTokenSource(cfg.endpoint, cfg.debug)
	s := &service{
		cfg:       cfg,
		tokens:    tokens,
		forwarder: newForwarder(cfg, tokens),
		drainTime: 10 * time.Minute,
	}
	s.server = &http.Server{
		Handler:                      http.HandlerFunc(s.route),
		ErrorLog:                     logger,
		DisableGeneralOptionsHandler: true,             // OPTIONS * is refused as other targets are
		ReadHeaderTimeout:            15 * time.Second, // for clients that say nothing or dribble
		ReadTimeout:                  0,                // an upload may take its time
		WriteTimeout:                 0,                // so may a model
		IdleTimeout:                  65 * time.Minute, // Envoy uses an idle connection for 60
		MaxHeaderBytes:               64 << 10,         // not Go's 1 MiB; codex sends some KiB
	}
	return s
}

// route has every route: two probes and a client's bare base URL, / among them,
// which need no key and are answered here, and everything else, which is for
// the upstream.
func (s *service) route(w http.ResponseWriter, r *http.Request) {
	// The server ignores the Transfer-Encoding of an HTTP/1.0 request
	// (golang/go#12785) and would take its body for the next request. RFC 9112
	// §6.1 wants such a connection closed. While the program stops, a client's
	// next request is to come over a new connection, to another replica.
	if !r.ProtoAtLeast(1, 1) || s.stopping.Load() {
		w.Header().Set("Connection", "close")
	}
	path := r.URL.Path
	_, call := splitPath(path) // call is empty if this is no more than a base URL
	// A request with a body, or whose target is a URL, is no probe: the
	// forwarder checks what to do with it.
	isProbe := (call == "" || path == "/healthz" || path == "/readyz") &&
		(r.Method == http.MethodGet || r.Method == http.MethodHead) &&
		r.ContentLength == 0 && r.URL.Host == ""
	if !isProbe {
		s.forwarder.ServeHTTP(w, r)
		return
	}
	_, hasToken := s.tokens.current()
	switch {
	case path == "/readyz" && s.stopping.Load():
		http.Error(w, "shutting down", http.StatusServiceUnavailable)
	case path == "/readyz" && !hasToken:
		http.Error(w, "no token", http.StatusServiceUnavailable)
	default:
		fmt.Fprintln(w, "ok")
	}
}

// serve answers requests until a signal arrives. For DRAIN_DELAY it goes on, as
// a balancer may not know yet that this replica is to be left out. Then it
// drains. A second signal ends the delay and the drain at once. What still runs
// after that is broken off.
func (s *service) serve(listeners []net.Listener, signals <-chan os.Signal) error {
	// Every request's context stems from ctx. Its end ends the tunnels, which
	// are the server's connections no more.
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s.server.BaseContext = func(net.Listener) context.Context { return ctx }
	s.logStart(listeners)
	go s.tokens.run(ctx)
	failed := make(chan error, len(listeners))
	for _, ln := range listeners {
		go func() { failed <- s.server.Serve(ln) }()
	}
	s.notify("READY=1")
	select {
	case err := <-failed:
		return err
	case <-signals:
	}

	s.stopping.Store(true)
	s.notify("STOPPING=1")
	if s.cfg.drainDelay > 0 {
		logger.Printf("stopping: accepts for another %v, while /readyz says 503", s.cfg.drainDelay)
	}
	select {
	case <-time.After(s.cfg.drainDelay):
		s.drain(signals)
	case <-signals:
	}
	if n := s.forwarder.streams.Load(); n > 0 {
		logger.Printf("breaking off %d streams", n)
	}
	s.server.Close()
	logger.Print("stopped")
	return nil
}

// drain accepts no more, and lets running requests and tunnels finish, until
// another signal arrives or drainTime has passed.
func (s *service) drain(signals <-chan os.Signal) {
	logger.Printf("draining %d streams (up to %v; a second signal breaks them off)",
		s.forwarder.streams.Load(), s.drainTime)
	finished := make(chan struct{})
	go func() {
		s.server.Shutdown(context.Background())
		for s.forwarder.streams.Load() > 0 { // Shutdown does not know of tunnels
			time.Sleep(10 * time.Millisecond)
		}
		close(finished)
	}()
	select {
	case <-finished:
	case <-signals:
	case <-time.After(s.drainTime):
	}
}

// notify tells systemd the state of a service of Type=notify (sd_notify(3)).
// Its socket is a file on this host, or an abstract name that begins with an @.
func (s *service) notify(state string) {
	if s.cfg.notifySocket == "" {
		return
	}
	conn, err := net.Dial("unixgram", s.cfg.notifySocket)
	if err == nil {
		_, err = io.WriteString(conn, state)
		conn.Close()
	}
	if err != nil {
		logger.Printf("NOTIFY_SOCKET: %v", err)
	}
}

// logStart says where the proxy listens, who may use it and as whom.
func (s *service) logStart(listeners []net.Listener) {
	cfg := s.cfg
	for _, ln := range listeners {
		logger.Printf("proxy listening on %s ➜ %s", ln.Addr(), cfg.target.base)
	}
	logger.Printf("tokens for %s come from %s", cfg.scope, cfg.endpoint)
	logger.Print(cfg.whoMayUseIt())
}

// whoMayUseIt says who can speak with the identity through the proxy.
func (c *config) whoMayUseIt() string {
	switch {
	case c.key != "":
		return "EXPECTED_KEY is set: whoever has the key may use the identity, " +
			"and from other hosts only if HOST lets them in (HOST=0.0.0.0)"
	case c.host == "" || isLoopback(c.host):
		return "no EXPECTED_KEY: every user of this host, and nobody else, may use the identity"
	}
	// It is no error: a gateway in front, or a network policy, may decide who
	// may.
	return "warning: no EXPECTED_KEY: whoever reaches this port may use the identity"
}

// check tries what the proxy needs, one step after the other, and says what is
// wrong and what to do. It gets a token and sends the upstream one request,
// which uses no model. problem is what is wrong with the settings; without one,
// cfg has them.
func check(cfg *config, problem error, out io.Writer) error {
	ok := func(step, format string, args ...any) {
		fmt.Fprintf(out, "ok    "+step+": "+format+"\n", args...)
	}
	fail := func(step, text, hint, says string) error {
		fmt.Fprintf(out, "FAIL  %s: %s\n", step, text)
		if hint != "" {
			fmt.Fprintf(out, "      hint: %s\n", hint)
		}
		if says != "" {
			fmt.Fprintf(out, "      it says: %s\n", cut(says, maxShown))
		}
		return errors.New(step + " failed the check")
	}
	if problem != nil {
		return fail("settings", problem.Error(), "", "")
	}
	ok("settings", "TARGET_URL is %s; %s; whether the port is free is not tried",
		cfg.target.base, cfg.whoMayUseIt())
	ok("identity", "tokens for %s come from %s", cfg.scope, cfg.endpoint)

	// Get a token, as the running program does.
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	s := newService(cfg)
	f := s.forwarder
	go s.tokens.run(ctx)
	t, failure := s.tokens.await(ctx)
	if failure != nil {
		return fail("token", failure.text, failure.hint, "")
	}
	c := t.claims()
	ok("token", "audience %s, tenant %s, object id %s, client id %s, expires %s",
		c.Audience, c.Tenant, c.Object, c.Client, t.expires.Format(time.RFC3339))

	// Ask for something that only a right URL, token and role get: the list of
	// models, by the v1 API if TARGET_URL names that or a project, or else by
	// the last dated version that is no preview. Claude has no such list, but
	// refuses an empty JSON object as a message, with an error of its own. What
	// is made here is a client's request, as far as upstreamRequest looks at it.
	r := &http.Request{Method: "GET", RequestURI: "/models?api-version=2024-10-21"}
	fine := `^200 \{`
	path := cfg.target.base.Path
	switch {
	case strings.Contains(path, "/anthropic/"):
		fine = `(?s)^400 .*invalid_request_error`
		r = &http.Request{Method: "POST", RequestURI: "/messages", ContentLength: 2,
			Header: http.Header{"Content-Type": {"application/json"},
				"Anthropic-Version": {"2023-06-01"}}}
	case strings.HasSuffix(path, "/v1/"), strings.Contains(path, "/api/projects/"):
		r.RequestURI = "/models"
	}
	req := f.upstreamRequest(r, &requestBody{from: io.NopCloser(strings.NewReader("{}"))})
	req.Header.Set("Authorization", t.authorization)
	resp, body, err := readAnswer(f.transport, req.WithContext(ctx))
	if err != nil {
		e := f.noAnswer(err)
		return fail("upstream", e.message, e.hint, "")
	}
	text, hint := f.explain(req, resp, body, t)
	text = f.shownUpstream(req) + ": " + text
	isFine, _ := regexp.MatchString(fine, fmt.Sprintf("%d %s", resp.StatusCode, body))
	switch {
	case isFine:
		ok("upstream", "%s", text)
	case path == "/models/" && resp.StatusCode == http.StatusNotFound:
		ok("upstream", "%s, as Foundry's model inference has no list; the role is not shown", text)
	default:
		return fail("upstream", text, hint, string(body))
	}
	ok("clients", "base URL http://localhost:%s, with or without /v1, /openai or /anthropic; "+
		"key: EXPECTED_KEY, or any text without one; model: the name of a deployment", cfg.port)
	return nil
}

// maxShown bounds, in bytes, a text of somebody else's that is shown, and
// maxLine a line, which may have several. A token has more than 1,200
// characters, and the last 342 of them are its signature, without which it
// opens nothing. So the beginning of a text that repeats a token may be shown.
const (
	maxShown = 300
	maxLine  = 1000
)

// lineWriter is where the log and the output of -check go. Each Write is one
// line.
type lineWriter struct{ out io.Writer }

func (w lineWriter) Write(line []byte) (int, error) {
	_, err := io.WriteString(w.out, cut(strings.TrimSuffix(string(line), "\n"), maxLine)+"\n")
	return len(line), err
}

// cut is the beginning of a text, with a space in the place of whatever could
// forge a line of the log, or hide in one.
func cut(text string, limit int) string {
	text = strings.Map(func(r rune) rune {
		if strconv.IsPrint(r) {
			return r
		}
		return ' '
	}, text)
	if len(text) <= limit {
		return text
	}
	return strings.ToValidUTF8(text[:limit], "") + "…"
}
