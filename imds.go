package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"math"
	"math/rand"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// How long a fetch may take and its failure is remembered. The pauses between tries are 0.8, 1.6,
// 3.2 s and so on, each ±20 %: Microsoft's advice ("How to use managed identities for Azure
// resources on an Azure VM to acquire an access token"), cut to what a waiting client bears.
const (
	tryTime       = 10 * time.Second // one request to the identity endpoint, its answer read
	fetchTime     = 22 * time.Second // one fetch, with all its tries and pauses
	firstPause    = 800 * time.Millisecond
	coldMemory    = time.Second      // after a failure without a valid token
	warmMemory    = 10 * time.Second // while one is valid, and no longer than it is
	maxRetryAfter = 2 * time.Minute  // longest Retry-After that is believed
	rejectPause   = 30 * time.Second // between two refreshes that an upstream 401 asks for
	maxAnswer     = 256 << 10        // bytes; real answers have about 2,000
)

// token is an access token and its life.
type token struct {
	authorization string    // "Bearer eyJ0eXAi…", as the header wants it
	clientID      string    // whose it is, if the endpoint says so
	expires       time.Time // from then on it is not sent
	refresh       time.Time // from then on it is due to be replaced
}

// validAt asks both clocks in a time.Time: the monotonic one stops while a machine sleeps, the
// wall clock can be set back.
func (t token) validAt(now time.Time) bool {
	return now.Before(t.expires) && now.Round(0).Before(t.expires.Round(0))
}

// claims are what a token says of itself ("Access token claims reference"). They are shown, never
// relied on: it is the upstream that verifies them.
type claims struct {
	Audience string `json:"aud"`
	Tenant   string `json:"tid"`
	Object   string `json:"oid"`
	Client   string `json:"appid"`
}

// claims decodes the token, which is a JWT (RFC 7519) or else says nothing.
func (t token) claims() claims {
	c := claims{Audience: "unknown", Tenant: "unknown", Object: "unknown", Client: "unknown"}
	if parts := strings.Split(t.authorization, "."); len(parts) == 3 {
		payload, _ := base64.RawURLEncoding.DecodeString(parts[1])
		json.Unmarshal(payload, &c)
	}
	return c
}

// tokenError is why there is no token.
type tokenError struct {
	text       string
	hint       string        // what to do about it, if that is known
	transient  bool          // the same request may fare better in a moment
	retryAfter time.Duration // when to ask again; 0 if that is not known
}

func (e *tokenError) Error() string { return withHint(e.text, e.hint) }

// withHint is a text and its hint, if any, in one line.
func withHint(text, hint string) string {
	if hint == "" {
		return text
	}
	return text + "; hint: " + hint
}

// tokenSource holds one token and replaces it before it expires.
//
// While the token is valid nobody waits: the fetch that replaces it runs beside the requests, on
// a context of its own. Without a valid token everybody waits for the one fetch under way.
type tokenSource struct {
	fetch func(context.Context) (token, *tokenError)
	now   func() time.Time

	mu         sync.Mutex // protects the fields below
	held       token
	flight     chan struct{} // closed when the fetch under way ends; nil if there is none
	failure    *tokenError   // of the last fetch; nil after a success
	quietUntil time.Time     // after a failure: no fetch starts before then
	rejectedAt time.Time     // when an upstream 401 last asked for a refresh
}

// token returns a valid token, at once if one is held. Its error is a *tokenError, or ctx's.
func (s *tokenSource) token(ctx context.Context) (token, error) {
	s.mu.Lock()
	now := s.now()
	if held := s.held; held.validAt(now) {
		s.refreshIfDue(now)
		s.mu.Unlock()
		return held, nil
	}
	flight := s.startFetch(now)
	s.mu.Unlock()

	if flight != nil {
		select {
		case <-flight:
		case <-ctx.Done():
			return token{}, ctx.Err()
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now = s.now()
	if s.held.validAt(now) {
		return s.held, nil
	}
	e := tokenError{text: "the token expired as soon as it came"}
	if s.failure != nil {
		e = *s.failure
	}
	e.retryAfter = s.quietUntil.Sub(now)
	return token{}, &e
}

// startFetch returns the fetch under way, having started it if need be, or nil if a recent
// failure forbids one. The caller holds s.mu.
func (s *tokenSource) startFetch(now time.Time) chan struct{} {
	if s.flight == nil && !now.Before(s.quietUntil) {
		s.flight = make(chan struct{})
		go s.renew(s.flight)
	}
	return s.flight
}

// refreshIfDue replaces the held token if its time has come. The caller holds s.mu.
func (s *tokenSource) refreshIfDue(now time.Time) {
	if s.held.validAt(now) && !now.Before(s.held.refresh) {
		s.startFetch(now)
	}
}

// renew does one fetch and keeps its outcome. As long as a token is valid it sees to the next
// fetch too, so that a client that comes back after hours need not wait.
func (s *tokenSource) renew(flight chan struct{}) {
	ctx, cancel := context.WithTimeout(context.Background(), fetchTime)
	defer cancel()
	t, failure := s.fetch(ctx)
	if failure != nil {
		log.Printf("no new token: %v", failure)
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	defer close(flight)
	s.flight, s.failure = nil, failure
	now := s.now()
	if failure == nil {
		s.held, s.quietUntil = t, time.Time{}
	} else {
		memory := min(warmMemory, max(coldMemory, s.held.expires.Sub(now)))
		s.quietUntil = now.Add(max(memory, min(failure.retryAfter, maxRetryAfter)))
	}
	if s.held.validAt(now) {
		due := max(s.held.refresh.Sub(now), s.quietUntil.Sub(now), time.Second)
		time.AfterFunc(due, func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.refreshIfDue(s.now())
		})
	}
}

// rejected says that the upstream answered 401 to t. The token stays in use, as a missing role is
// a 401 too, but a new one is fetched.
func (s *tokenSource) rejected(t token) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	if t.authorization == s.held.authorization && now.Sub(s.rejectedAt) >= rejectPause {
		s.rejectedAt, s.held.refresh = now, now
		s.refreshIfDue(now)
	}
}

// source is an identity endpoint, with one identity: where a tokenSource fetches from.
type source struct {
	name     string // "IMDS"; the fields from here to request are a row of sources
	marks    string // variables that are all set where it is: "MSI_ENDPOINT and MSI_SECRET"
	file     string // or a file that exists there
	endpoint string // variable that holds its URL, or the start of it
	fallback string // what that is where the variable is empty
	path     string // what follows it
	secret   string // variable that proves to it who asks
	header   string // where the secret goes
	version  string // api-version of a GET
	idParam  string // parameter for the client id of a user-assigned identity
	request  func(*source, context.Context) (*http.Request, *tokenError)

	getenv       func(string) string
	url          *url.URL // "http://169.254.169.254/metadata/identity/oauth2/token"
	clientID     string   // empty for the system-assigned identity
	clientIDFrom string   // "AZURE_CLIENT_ID"
	resource     string   // "https://cognitiveservices.azure.com": the scope less its /.default
	keyDir       string   // where Azure Arc's agent puts the keys of its challenges
	secrets      *secrets // of this program, for what is said about the endpoint
	transport    http.RoundTripper
	now          func() time.Time
	sleep        func(context.Context, time.Duration)
}

// sources are the places that tokens come from, in the order in which the Azure SDKs look for them;
// the first that is there is taken.
var sources = []source{
	{name: "workload identity", // of AKS
		marks:    "AZURE_FEDERATED_TOKEN_FILE and AZURE_TENANT_ID and AZURE_CLIENT_ID",
		endpoint: "AZURE_AUTHORITY_HOST", fallback: "https://login.microsoftonline.com",
		request: (*source).workloadIdentity},
	{name: "Service Fabric", // refused by newSource
		marks: "IDENTITY_ENDPOINT and IDENTITY_HEADER and IDENTITY_SERVER_THUMBPRINT"},
	{name: "App Service", // and Functions, Container Apps, Automation
		marks:    "IDENTITY_ENDPOINT and IDENTITY_HEADER",
		endpoint: "IDENTITY_ENDPOINT", secret: "IDENTITY_HEADER", header: "X-IDENTITY-HEADER",
		version: "2019-08-01", idParam: "client_id", request: (*source).newGet},
	{name: "Azure ML", // which has App Service's protocol of 2017
		marks:    "MSI_ENDPOINT and MSI_SECRET",
		endpoint: "MSI_ENDPOINT", secret: "MSI_SECRET", header: "Secret",
		version: "2017-09-01", idParam: "clientid", request: (*source).newGet},
	{name: "Cloud Shell",
		marks: "MSI_ENDPOINT", endpoint: "MSI_ENDPOINT", request: (*source).cloudShell},
	{name: "Azure Arc", // a service may lack the variables, if it started before the agent
		marks:    "IDENTITY_ENDPOINT and IMDS_ENDPOINT",
		file:     arcFile("/opt/azcmagent/bin/himds", "ProgramFiles", "himds.exe"),
		endpoint: "IDENTITY_ENDPOINT",
		fallback: "http://127.0.0.1:40342/metadata/identity/oauth2/token",
		version:  "2020-06-01", idParam: "client_id", request: (*source).arc},
	{name: "IMDS", // of virtual machines, AKS nodes and Container Instances
		endpoint: "AZURE_POD_IDENTITY_AUTHORITY_HOST", fallback: "http://169.254.169.254",
		path:    "/metadata/identity/oauth2/token",
		version: "2018-02-01", idParam: "client_id", request: (*source).newGet},
}

// halves are variables that mean nothing unless another, or one of two others, is set too.
var halves = [][2]string{
	{"AZURE_FEDERATED_TOKEN_FILE", "AZURE_TENANT_ID"},
	{"AZURE_FEDERATED_TOKEN_FILE", "AZURE_CLIENT_ID"},
	{"IDENTITY_ENDPOINT", "IDENTITY_HEADER or IMDS_ENDPOINT"},
	// In a Container Instance, which has IMDS, the header comes with the thumbprint alone.
	{"IDENTITY_HEADER", "IDENTITY_ENDPOINT or IDENTITY_SERVER_THUMBPRINT"},
	{"IMDS_ENDPOINT", "IDENTITY_ENDPOINT"},
	{"MSI_SECRET", "MSI_ENDPOINT"},
}

// newSource picks the source for the environment. Its error names the variables that are wrong.
func newSource(getenv func(string) string, scope string, hidden *secrets) (*source, error) {
	isSet := func(name string) bool { return getenv(name) != "" }
	isUnset := func(name string) bool { return getenv(name) == "" }
	for _, h := range halves {
		if isSet(h[0]) && !slices.ContainsFunc(strings.Split(h[1], " or "), isSet) {
			return nil, fmt.Errorf("%s is set without %s: set both, or neither", h[0], h[1])
		}
	}
	s := sources[slices.IndexFunc(sources, func(s source) bool {
		return exists(s.file) || s.marks == "" ||
			!slices.ContainsFunc(strings.Split(s.marks, " and "), isUnset)
	})]

	// It is spoken to straight, whatever proxy the environment names. A transport does not follow
	// redirects, which would show the request's secret to others.
	transport := &http.Transport{
		Proxy:                  nil,
		DisableKeepAlives:      true, // a request in hours
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxAnswer, // time is bounded by the context of each try
	}
	s.getenv, s.now, s.sleep, s.transport, s.secrets = getenv, time.Now, sleep, transport, hidden
	s.secrets.hide("endpoint's secret", getenv(s.secret))
	s.resource = strings.TrimSuffix(scope, "/.default")
	s.keyDir = arcFile("/var/opt/azcmagent/tokens", "ProgramData", "Tokens")
	s.clientID, s.clientIDFrom = getenv("AZURE_CLIENT_ID"), "AZURE_CLIENT_ID"
	switch s.name {
	case "Service Fabric":
		return nil, errors.New("IDENTITY_SERVER_THUMBPRINT is set: Service Fabric is not supported, " +
			"as its endpoint is known by a certificate's SHA-1 only; run the proxy on a host with IMDS")
	case "Cloud Shell":
		if s.clientID != "" {
			return nil, errors.New("AZURE_CLIENT_ID is set, but Cloud Shell (MSI_ENDPOINT) has no " +
				"user-assigned identities: unset it")
		}
	case "Azure ML":
		if s.clientID == "" {
			s.clientIDFrom = "DEFAULT_IDENTITY_CLIENT_ID"
			s.clientID = getenv(s.clientIDFrom)
		}
	case "workload identity":
		s.path = "/" + url.PathEscape(getenv("AZURE_TENANT_ID")) + "/oauth2/v2.0/token"
	}

	raw := cmp.Or(getenv(s.endpoint), s.fallback)
	if s.path != "" {
		raw = strings.TrimRight(raw, "/") + s.path
	}
	var err error
	s.url, err = url.Parse(raw)
	if err != nil || !hasHost(s.url) || s.url.Scheme != "http" && s.url.Scheme != "https" {
		return nil, fmt.Errorf("%s: not a URL with a host; want one such as %s",
			s.endpoint, cmp.Or(s.fallback, "http://127.0.0.1:41964/msi/token"))
	}
	if s.name == "workload identity" {
		if s.url.Scheme == "http" && !isLoopback(s.url.Hostname()) {
			return nil, fmt.Errorf("%s: want https, as in %s", s.endpoint, s.fallback)
		}
		transport.Proxy = proxyTo(s.url) // Entra ID is outside
	}
	return &s, nil
}

// proxyTo is how a transport finds the proxy to a host that is not on this one. In the clear none is
// used: what is asked without TLS is on a loopback address, whatever the host is called.
func proxyTo(u *url.URL) func(*http.Request) (*url.URL, error) {
	if u.Scheme != "https" {
		return nil
	}
	return http.ProxyFromEnvironment
}

// why says what shows that the source is there.
func (s *source) why() string {
	switch {
	case exists(s.file):
		return "marked by " + s.file
	case s.marks != "":
		return "marked by " + s.marks
	}
	return "no variable marks another source"
}

func exists(file string) bool {
	_, err := os.Stat(file)
	return err == nil
}

// arcFile is where Azure Arc's agent keeps a file.
func arcFile(unix, windowsFolder, windowsName string) string {
	if runtime.GOOS == "windows" {
		return filepath.Join(os.Getenv(windowsFolder), "AzureConnectedMachineAgent", windowsName)
	}
	return unix
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// newGet makes the GET that most endpoints want; a query in the endpoint's own URL is kept. The
// Metadata header shows that no redirect or web page made this request.
func (s *source) newGet(context.Context) (*http.Request, *tokenError) {
	u := *s.url
	q := u.Query()
	q.Set("api-version", s.version)
	q.Set("resource", s.resource)
	if s.clientID != "" {
		q.Set(s.idParam, s.clientID)
	}
	u.RawQuery = q.Encode()
	req := &http.Request{Method: http.MethodGet, URL: &u, Header: http.Header{"Metadata": {"true"}}}
	if s.header != "" {
		req.Header.Set(s.header, s.getenv(s.secret))
	}
	return req, nil
}

func (s *source) newPost(form url.Values) *http.Request {
	// The error would be about the URL, which has been parsed before.
	req, _ := http.NewRequest(http.MethodPost, s.url.String(), strings.NewReader(form.Encode()))
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	return req
}

func (s *source) cloudShell(context.Context) (*http.Request, *tokenError) {
	req := s.newPost(url.Values{"resource": {s.resource}})
	req.Header.Set("Metadata", "true")
	return req, nil
}

// workloadIdentity exchanges the token that Kubernetes puts into the pod, and renews there within
// the hour ("OAuth 2.0 client credentials flow on the Microsoft identity platform").
func (s *source) workloadIdentity(context.Context) (*http.Request, *tokenError) {
	assertion, err := os.ReadFile(s.getenv("AZURE_FEDERATED_TOKEN_FILE"))
	if err != nil {
		return nil, s.errorf("was not asked: AZURE_FEDERATED_TOKEN_FILE: %v", err)
	}
	proof := strings.TrimSpace(string(assertion))
	s.secrets.hide("proof", proof)
	return s.newPost(url.Values{
		"client_id":             {s.clientID},
		"scope":                 {s.resource + "/.default"}, // Entra ID refuses a bare resource here
		"grant_type":            {"client_credentials"},
		"client_assertion_type": {"urn:ietf:params:oauth:client-assertion-type:jwt-bearer"},
		"client_assertion":      {proof},
	}), nil
}

// arc answers the challenge of Azure Arc's agent: to show the content of a file that only root and
// the group himds can read ("Authenticate against Azure resources with Azure Arc-enabled servers").
func (s *source) arc(ctx context.Context) (*http.Request, *tokenError) {
	req, _ := s.newGet(ctx)
	resp, body, failure := s.do(ctx, req)
	if failure != nil {
		return nil, failure
	}
	if resp.StatusCode != http.StatusUnauthorized {
		return nil, s.refusal(resp, body)
	}
	key, err := readKey(resp.Header.Get("WWW-Authenticate"), s.keyDir)
	if err != nil {
		return nil, s.errorf("sent a challenge that cannot be met: %v", err)
	}
	s.secrets.hide("proof", key)
	req.Header.Set("Authorization", "Basic "+key)
	return req, nil
}

// readKey reads the file that an Arc challenge names, which must be a regular .key file of at most
// 4096 bytes right in dir, where only root can write: the endpoint must not get at any other file.
func readKey(challenge, dir string) (string, error) {
	path, ok := strings.CutPrefix(challenge, "Basic realm=")
	if !ok || path != filepath.Join(dir, filepath.Base(path)) || filepath.Ext(path) != ".key" {
		return "", fmt.Errorf("it does not name a .key file in %s", dir)
	}
	info, err := os.Lstat(path)
	if err == nil && (!info.Mode().IsRegular() || info.Size() > 4096) {
		return "", fmt.Errorf("%s is not a regular file of 4096 bytes at most", path)
	}
	var key []byte
	if err == nil {
		key, err = os.ReadFile(path)
	}
	if errors.Is(err, os.ErrPermission) {
		err = fmt.Errorf("%w; hint: run as root, or join the group himds", err)
	}
	text := strings.TrimRight(string(key), "\r\n") // an editor or echo may have added a line's end
	if !isPrintableASCII(text) {
		err = fmt.Errorf("%s has bytes that a header cannot carry", path)
	}
	return text, err
}

// fetch gets a token, trying again while the endpoint's answers are such that it may help.
func (s *source) fetch(ctx context.Context) (token, *tokenError) {
	left := fetchTime // for pauses: one that does not fit, a long Retry-After, is not begun
	for pause := firstPause; ; pause *= 2 {
		t, failure := s.try(ctx)
		if failure == nil || !failure.transient {
			return t, failure
		}
		jittered := time.Duration(float64(pause) * (0.8 + 0.4*rand.Float64()))
		wait := max(failure.retryAfter, jittered)
		if left -= wait; left < 0 {
			return t, failure
		}
		if s.sleep(ctx, wait); ctx.Err() != nil {
			return t, failure
		}
	}
}

// try asks the endpoint once.
func (s *source) try(ctx context.Context) (token, *tokenError) {
	ctx, cancel := context.WithTimeout(ctx, tryTime)
	defer cancel()
	req, failure := s.request(s, ctx)
	if failure != nil {
		return token{}, failure
	}
	sent := s.now()
	resp, body, failure := s.do(ctx, req)
	if failure != nil {
		return token{}, failure
	}
	if resp.StatusCode != http.StatusOK {
		return token{}, s.refusal(resp, body)
	}
	t, err := parseToken(body, sent, serverTime(resp.Header, sent))
	if err != nil {
		failure := s.errorf("answered with %s, not a usable token: %v",
			cmp.Or(resp.Header.Get("Content-Type"), "no Content-Type"), err)
		failure.transient = err == errExpired
		return token{}, failure
	}
	s.secrets.hide("token", strings.TrimPrefix(t.authorization, "Bearer "))
	if s.name == "Azure Arc" && s.clientID != "" && !strings.EqualFold(t.clientID, s.clientID) {
		return token{}, s.errorf("gave the token of another identity, as older agents do; " +
			"unset AZURE_CLIENT_ID")
	}
	if isDebug(s.getenv) {
		log.Printf("debug: token from %s at %s, expires %s, next refresh %s", s.name, s.url.Host,
			t.expires.Format(time.RFC3339), t.refresh.Format(time.RFC3339))
	}
	return t, nil
}

// do sends one request and reads its answer.
func (s *source) do(ctx context.Context, req *http.Request) (*http.Response, []byte, *tokenError) {
	var body []byte
	resp, err := s.transport.RoundTrip(req.WithContext(ctx))
	if err == nil {
		defer resp.Body.Close()
		body, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	}
	if err == nil {
		return resp, body, nil
	}
	failure := s.errorf("gave no answer: %s", cause(err))
	failure.transient = true
	if s.name == "IMDS" {
		failure.hint = "only Azure hosts have it"
	}
	return nil, nil, failure
}

// cause says why a round trip failed. It tells of err only what is of a known type, and nothing else
// of its text: net/http quotes the bytes of what is no HTTP answer, and a token may be among them.
func cause(err error) string {
	var (
		dns         *net.DNSError
		certificate *tls.CertificateVerificationError
		noTLS       tls.RecordHeaderError
		status      statusError
		op          *net.OpError
		timeout     net.Error
	)
	switch {
	case errors.As(err, &dns):
		return dns.Name + ": " + dns.Err
	case errors.As(err, &certificate):
		return certificate.Err.Error()
	case errors.As(err, &noTLS):
		return "the answer is not TLS"
	case errors.As(err, &status):
		return status.Error()
	case errors.As(err, &op):
		return systemError(op)
	case errors.As(err, &timeout) && timeout.Timeout():
		return "timed out"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), err.Error() == closedIdle:
		return "the connection ended"
	case errors.Is(err, context.Canceled):
		return "cancelled"
	}
	return "the answer is not HTTP"
}

// closedIdle is the whole text of an error of net/http that has no exported type or value.
const closedIdle = "http: server closed idle connection"

// systemError is the address and the reason of a failed network operation.
func systemError(op *net.OpError) string {
	var inner *net.OpError
	if errors.As(op.Err, &inner) { // of a dial to HTTPS_PROXY, within an operation "proxyconnect"
		return op.Op + ": " + systemError(inner)
	}
	text := op.Op + " " + op.Net
	if op.Addr != nil {
		text += " " + op.Addr.String()
	}
	var errno syscall.Errno
	switch {
	case errors.As(op.Err, &errno):
		return text + ": " + errno.Error()
	case op.Timeout():
		return text + ": timed out"
	case op.Op == "remote error", op.Op == "local error": // a TLS alert, whose texts are crypto/tls's
		return op.Op + ": " + op.Err.Error()
	}
	return text + ": failed"
}

// statusError is an HTTP status that ends a round trip.
type statusError struct {
	what string // "HTTPS_PROXY answered"
	code int
}

func (e statusError) Error() string { return e.what + " " + statusText(e.code) }

// statusText is a status for the log: its code with Go's own text for it, never the peer's.
func statusText(code int) string {
	return strings.TrimSpace(strconv.Itoa(code) + " " + http.StatusText(code))
}

// refusal is the error for an answer other than 200, in the endpoint's own words.
func (s *source) refusal(resp *http.Response, body []byte) *tokenError {
	status := resp.StatusCode
	if status < 300 {
		body = nil // it may hold a token
	}
	e := s.errorf("answered %d: %s", status, words(body))
	e.retryAfter = retryAfter(resp.Header, s.now())
	// IMDS answers 404 or 410 for up to 70 s while it is being updated.
	updating := s.name == "IMDS" && (status == http.StatusNotFound || status == http.StatusGone)
	e.transient = updating || status == http.StatusRequestTimeout ||
		status == http.StatusTooManyRequests || status >= 500
	for _, h := range hints {
		if strings.Contains(e.text, h.text) {
			e.hint = h.hint
		}
	}
	return e
}

// hints are what to do about the usual refusals.
var hints = []struct{ text, hint string }{
	{"Identity not found", "assign a managed identity to this host, or correct AZURE_CLIENT_ID"},
	{"Multiple user assigned", "set AZURE_CLIENT_ID to the client id of one of them"},
	{"unreachable network", "this is not an Azure host"}, // Docker Desktop's 403
	{"AADSTS70021", "the federated credential's issuer or subject is not this pod's"},
	{"AADSTS500011", "correct AZURE_OPENAI_SCOPE"},
}

// errorf makes an error that names who was asked for which identity, in one line.
func (s *source) errorf(format string, args ...any) *tokenError {
	text := s.secrets.safe(fmt.Sprintf(format, args...), maxPiece)
	text = s.name + " at " + s.url.Host + " " + strings.TrimSpace(text)
	if s.clientID != "" {
		text += " (client_id " + s.clientID + ", from " + s.clientIDFrom + ")"
	}
	return &tokenError{text: text}
}

// words is what an endpoint says about its refusal: its JSON's error and error_description, message
// or error.message, or else all of it.
func words(body []byte) string {
	var a struct {
		Error       any
		Description string `json:"error_description"`
		Message     any
	}
	if json.Unmarshal(body, &a) != nil {
		return string(body)
	}
	if e, ok := a.Error.(map[string]any); ok {
		a.Error, a.Message = e["code"], e["message"]
	}
	var said []string
	for _, part := range []any{a.Error, a.Description, a.Message} {
		if text := fmt.Sprint(part); part != nil && text != "" {
			said = append(said, text)
		}
	}
	return strings.Join(said, ": ")
}

// How much is shown, in bytes.
const (
	maxPiece = 500  // of one text from outside
	maxLine  = 4000 // of a line, which may hold several
)

// secrets are what this program must not tell: the key of its clients, what proves it to the identity
// endpoint, and the token.
type secrets struct {
	mu     sync.RWMutex // protects values
	values []secret     // one of a kind, longest first, as one may be part of another
}

type secret struct{ kind, value string }

// hide makes value the secret of its kind.
func (s *secrets) hide(kind, value string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.values = slices.DeleteFunc(s.values, func(other secret) bool { return other.kind == kind })
	if value != "" {
		s.values = append(s.values, secret{kind, value})
	}
	slices.SortFunc(s.values, func(a, b secret) int { return len(b.value) - len(a.value) })
}

// safe makes a text fit to be shown. Whatever comes from outside (from the upstream, the identity
// endpoint or a client) passes here before it gets into the log, the output of -check or an answer.
// The order matters: the text is cut last, as half of a secret would not be found.
func (s *secrets) safe(text string, limit int) string {
	text = printable(s.redact(text))
	if len(text) <= limit {
		return text
	}
	return strings.ToValidUTF8(text[:limit], "") + "…"
}

// How a secret is known that is not whole or not held, in bytes. Whoever repeats a token may have cut
// it, and may repeat one that was replaced since; nothing else is a word so long.
const (
	secretStart = 16
	longestWord = 100
)

// redact takes the secrets out of a text, and the words that may be part of one.
func (s *secrets) redact(text string) string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, secret := range s.values {
		text = strings.ReplaceAll(text, secret.value, "REDACTED")
	}
	mayBePart := func(word string) bool {
		return len(word) > longestWord || slices.ContainsFunc(s.values, func(secret secret) bool {
			return len(secret.value) > secretStart && strings.Contains(word, secret.value[:secretStart])
		})
	}
	var out strings.Builder
	done := 0 // bytes of text that are in out, or redacted
	for start := 0; start < len(text); start++ {
		end := start
		for end < len(text) && isTokenByte[text[end]] {
			end++
		}
		if mayBePart(text[start:end]) {
			out.WriteString(text[done:start] + "REDACTED")
			done = end
		}
		start = end
	}
	if done == 0 {
		return text
	}
	return out.String() + text[done:]
}

// isTokenByte has the bytes of a token: those of base64url and of RFC 6750's b64token, less the slash.
var isTokenByte = func() (set [256]bool) {
	for _, c := range letters + digits + "-._~+=" {
		set[c] = true
	}
	return set
}()

// printable is s with a space for whatever could forge a log line or hide in it.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if strconv.IsPrint(r) {
			return r
		}
		return ' '
	}, s)
}

// retryAfter reads a Retry-After header, which holds seconds or a date (RFC 9110 §10.2.3).
func retryAfter(h http.Header, now time.Time) time.Duration {
	value := h.Get("Retry-After")
	if wait, err := parseSeconds(value); err == nil {
		return wait
	}
	if date, err := http.ParseTime(value); err == nil {
		return max(date.Sub(now), 0)
	}
	return 0
}

// serverTime is the endpoint's own time where it differs from ours by more than the seconds that
// rounding and the network explain: expires_on is told by the endpoint's clock.
func serverTime(h http.Header, sent time.Time) time.Time {
	if date, err := http.ParseTime(h.Get("Date")); err == nil && date.Sub(sent).Abs() > 5*time.Second {
		return date
	}
	return sent
}

var errExpired = errors.New("it has expired already; is this host's clock right?")

// parseToken reads a token answer that was asked for at sent, by our clock, which is base by the
// endpoint's. It lives until expires_on or for expires_in, whichever ends earlier: IMDS counts
// expires_in from the issue of a token that it hands out for hours. It is due for refresh after
// refresh_in, else after 80 % of its life.
func parseToken(body []byte, sent, base time.Time) (token, error) {
	var a struct {
		AccessToken string `json:"access_token"`
		ExpiresOn   any    `json:"expires_on"`
		ExpiresIn   any    `json:"expires_in"`
		RefreshIn   any    `json:"refresh_in"`
		ClientID    string `json:"client_id"`
	}
	if json.Unmarshal(body, &a) != nil { // its error may quote the body
		return token{}, errors.New("not the JSON object expected")
	}
	if a.AccessToken == "" {
		return token{}, errors.New("access_token is missing")
	}
	if !isPrintableASCII(a.AccessToken) || strings.Contains(a.AccessToken, " ") {
		return token{}, errors.New("access_token has bytes that a header cannot carry")
	}
	on, in := scalar(a.ExpiresOn), scalar(a.ExpiresIn)
	if on == "" && in == "" {
		return token{}, errors.New("expires_on and expires_in are missing")
	}
	life := time.Duration(math.MaxInt64)
	if in != "" {
		seconds, err := parseSeconds(in)
		if err != nil {
			return token{}, fmt.Errorf("expires_in: %w", err)
		}
		life = seconds
	}
	if on != "" {
		end, err := parseTime(on)
		if err != nil {
			return token{}, fmt.Errorf("expires_on: %w", err)
		}
		life = min(life, end.Sub(base))
	}
	if life < time.Second { // which would be asked for again and again
		return token{}, errExpired
	}
	refresh := life / 5 * 4
	if seconds, err := parseSeconds(scalar(a.RefreshIn)); err == nil && seconds > 0 {
		refresh = min(refresh, seconds)
	}
	return token{
		authorization: "Bearer " + a.AccessToken,
		clientID:      a.ClientID,
		expires:       sent.Add(life),
		refresh:       sent.Add(max(refresh, time.Second)),
	}, nil
}

// scalar is the text of a JSON string or number; of null or a missing field it is empty.
func scalar(value any) string {
	if value == nil {
		return ""
	}
	return strings.TrimSpace(fmt.Sprint(value))
}

// dateLayouts are the forms of expires_on beside epoch seconds, as seen from App Service.
var dateLayouts = []string{
	time.RFC3339,
	"2006-01-02 15:04:05",
	"1/2/2006 15:04:05",
	"1/2/2006 15:04:05 -07:00",
	"1/2/2006 3:04:05 PM -07:00",
}

// parseTime reads epoch seconds or one of dateLayouts.
func parseTime(text string) (time.Time, error) {
	if sinceEpoch, err := parseSeconds(text); err == nil {
		return time.Unix(0, int64(sinceEpoch)), nil
	}
	for _, layout := range dateLayouts {
		if t, err := time.Parse(layout, text); err == nil {
			return t, nil
		}
	}
	return time.Time{}, errors.New("not in a form known here")
}

// parseSeconds reads a number of seconds.
func parseSeconds(text string) (time.Duration, error) {
	seconds, err := strconv.ParseFloat(text, 64)
	if err != nil || !(seconds >= 0 && seconds < 9e9) { // NaN, or too long for a Duration
		return 0, errors.New("not a number of seconds")
	}
	return time.Duration(seconds * float64(time.Second)), nil
}
