package main

// This file is about tokens, from the top down: a token; the token source,
// which holds one and replaces it in time; the identity endpoint, which the
// environment chooses; one request to it; and how its answer is read.

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	// connectTime bounds the connection to an identity endpoint. IMDS, on the
	// host's own link, accepts within milliseconds. Where there is none, as on
	// a host outside of Azure, the packets are often dropped.
	connectTime = 4 * time.Second

	// askTime bounds one request to the identity endpoint, its answer included.
	// Endpoints on busy hosts have taken six seconds
	// (Azure/azure-sdk-for-net#20609).
	askTime = 10 * time.Second

	// firstPause follows the first failure. Each further failure in a row
	// doubles it, up to maxPause, as Microsoft asks for ("How to use managed
	// identities for Azure resources on an Azure VM to acquire an access
	// token", Retry guidance). If no request wants a token then, idlePause
	// follows maxPause.
	firstPause = 800 * time.Millisecond
	maxPause   = 10 * time.Second
	idlePause  = time.Minute

	// maxRetryAfter is the longest Retry-After of an endpoint that is heeded.
	maxRetryAfter = 2 * time.Minute

	// maxWait is how long a request waits for a token.
	maxWait = 20 * time.Second

	// rejectedPause lies between two refreshes that a 401 from the upstream
	// causes: the identity endpoint is not asked for a token per request.
	rejectedPause = 30 * time.Second

	// maxAnswer bounds what is read of an endpoint's answer, in bytes. Real
	// ones have about 2,000.
	maxAnswer = 256 << 10
)

// token is an access token and its life. The times are the wall clock's alone:
// the monotonic clock stands still while a host sleeps.
type token struct {
	authorization string    // "Bearer eyJ0eXAi…", the header's value
	expires       time.Time // it is not sent from then on
	refresh       time.Time // it is due to be replaced from then on
}

// claims are what a token says of itself (Microsoft's "Access token claims
// reference"). They are only shown: verifying them is the upstream's part.
type claims struct {
	Audience string `json:"aud"`
	Tenant   string `json:"tid"`
	Object   string `json:"oid"`
	Client   string `json:"appid"`
}

// claims decodes the token's second part, as it is a JWT (RFC 7519). What is
// not found there is "unknown".
func (t token) claims() claims {
	c := claims{"unknown", "unknown", "unknown", "unknown"}
	if parts := strings.Split(t.authorization, "."); len(parts) == 3 {
		payload, _ := base64.RawURLEncoding.DecodeString(parts[1])
		json.Unmarshal(payload, &c)
	}
	return c
}

// tokenSource holds one token and replaces it before it expires.
//
// Its goroutine, run, is the only one that fetches. So there is never more than
// one fetch at a time, and no client that leaves can cancel it. While the held
// token is valid, no request waits. Without one, requests wait for run's tries.
type tokenSource struct {
	endpoint *endpoint
	debug    bool // AZURE_LOG_LEVEL=debug
	now      func() time.Time
	after    func(time.Duration) <-chan time.Time
	asked    chan struct{} // wakes run; has room for one, so that nobody waits to ask

	mu         sync.Mutex    // protects the fields below
	held       token         // the zero token before the first success
	failure    *fetchError   // of the last try that brought no token
	tried      chan struct{} // closed and replaced after each try
	rejectedAt time.Time     // when a 401 last made held due for refresh
}

func newTokenSource(e *endpoint, debug bool) *tokenSource {
	return &tokenSource{
		endpoint: e,
		debug:    debug,
		now:      time.Now,
		after:    time.After,
		asked:    make(chan struct{}, 1),
		tried:    make(chan struct{}),
		failure:  &fetchError{text: "the identity endpoint has not answered yet"},
	}
}

// fetchError is why a try brought no token.
type fetchError struct {
	text       string        // "IMDS at 169.254.169.254 answered 400: …"
	hint       string        // what to do about it; empty if that is not known
	lasting    bool          // another try would hardly heal it
	retryAfter time.Duration // the endpoint's Retry-After; 0 if there is none
	next       time.Time     // of the next try; set by the token source
}

func (e *fetchError) Error() string { return withHint(e.text, e.hint) }

// withHint is a text and its hint, if there is one, in one line.
func withHint(text, hint string) string {
	if hint == "" {
		return text
	}
	return text + "; hint: " + hint
}

// await returns a valid token: the held one, or else the one that a try of run
// brings within maxWait.
func (s *tokenSource) await(ctx context.Context) (token, *fetchError) {
	var late <-chan time.Time
	for {
		// tried is read before the token. A try that ends in between closes it,
		// and so is not missed.
		s.mu.Lock()
		failure, tried := s.failure, s.tried
		s.mu.Unlock()
		if t, ok := s.current(); ok {
			return t, nil
		}
		// It is of no use to wait for the end of a pause that follows a
		// refusal, or that is too long. When it has ended, a try is about to
		// begin.
		pause := failure.next.Sub(s.now())
		if pause > maxWait || pause > 0 && failure.lasting {
			return token{}, failure
		}
		if late == nil {
			late = s.after(maxWait)
		}
		select {
		case <-tried:
		case <-late:
			return token{}, failure
		case <-ctx.Done():
			return token{}, failure
		}
	}
}

// current returns the held token, and whether that is valid. If it is due to be
// replaced, run is asked for another.
func (s *tokenSource) current() (t token, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	if !now.Before(s.held.refresh) {
		s.ask()
	}
	return s.held, now.Before(s.held.expires)
}

// ask wakes run, unless it has been asked already.
func (s *tokenSource) ask() {
	select {
	case s.asked <- struct{}{}:
	default:
	}
}

// rejected makes t due to be replaced, as the upstream answered 401 to it. It
// stays in use meanwhile, because a missing role is answered with 401 too.
func (s *tokenSource) rejected(t token) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	if t.authorization == s.held.authorization && now.Sub(s.rejectedAt) > rejectedPause {
		s.rejectedAt, s.held.refresh = now, time.Time{} // long ago
		s.ask()
	}
}

// run tries to get a token at once, and again whenever one is due, until ctx
// ends. It needs no request for that: a client that comes back after hours
// finds a valid token.
func (s *tokenSource) run(ctx context.Context) {
	failures := 0 // in a row
	for {
		t, failure := s.endpoint.fetch(ctx)
		if ctx.Err() != nil {
			return
		}
		if failure == nil {
			failures = 0
			s.publish(t)
			s.wait(ctx, t.refresh.Sub(s.now()), s.asked)
			continue
		}
		pause := s.publishFailure(failure, failures)
		failures++
		s.wait(ctx, pause, nil) // no request shortens it
		if pause >= maxPause {
			s.wait(ctx, idlePause, s.asked) // a request that waits has asked
		}
	}
}

// wait waits for d, or until a request asks for a token. None asks on a nil
// channel.
func (s *tokenSource) wait(ctx context.Context, d time.Duration, asked <-chan struct{}) {
	select {
	case <-s.after(d):
	case <-asked:
	case <-ctx.Done():
	}
}

// publish keeps a new token, and wakes the requests that wait for one.
func (s *tokenSource) publish(t token) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held.authorization == "" || s.debug {
		logger.Printf("token ready: object id %s, expires %s",
			t.claims().Object, t.expires.Format(time.RFC3339))
	}
	s.held = t
	select {
	case <-s.asked: // for this token
	default:
	}
	s.wakeWaiting()
}

// publishFailure logs and keeps why a try failed, and returns how long to
// pause. The held token stays in use for as long as it is valid. When it
// expires, the pause ends too, whatever the endpoint asks for.
func (s *tokenSource) publishFailure(failure *fetchError, failuresBefore int) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	pause := min(firstPause<<min(failuresBefore, 4), maxPause)
	pause = max(pause, min(failure.retryAfter, maxRetryAfter))
	what := "no token"
	if left := s.held.expires.Sub(s.now()); left > 0 {
		what, pause = "no new token", min(pause, left)
	}
	logger.Printf("%s: %v; no other try for %v", what, failure, pause.Round(time.Millisecond))
	failure.next = s.now().Add(pause)
	s.failure = failure
	s.wakeWaiting()
	return pause
}

// wakeWaiting has the requests that wait look again. The caller holds s.mu.
func (s *tokenSource) wakeWaiting() {
	close(s.tried)
	s.tried = make(chan struct{})
}

// endpoint is an identity endpoint, and the identity that it is asked for.
//
// The platforms' endpoints are on the host itself or on its own link, and speak
// plain HTTP. Entra ID, which is asked with a secret or an assertion, is spoken
// to over TLS, unless it is on a loopback address.
type endpoint struct {
	name     string      // "IMDS at 169.254.169.254"
	why      string      // it was chosen: "MSI_ENDPOINT is set"
	clientID string      // of a user-assigned identity; empty for the system-assigned one
	url      *url.URL    // "http://169.254.169.254/metadata/…/token?resource=…"
	header   http.Header // it holds the caller's proof, where one is asked for
	form     url.Values  // of a POST; nil for a GET

	assertionFile string // workload identity: what is in there goes into form
	keyDir        string // Azure Arc: where the keys for its challenges are
	isIMDS        bool   // 404 and 410 tell of an update, which passes

	transport *http.Transport
	now       func() time.Time
}

// String says which endpoint it is, and why it was chosen.
func (e *endpoint) String() string { return e.name + ", as " + e.why }

// arcFiles are where Azure Arc's agent keeps its files. Nobody can write there
// but the agent, whose user is himds, and root or an administrator.
type arcFiles struct {
	agent string // the file that exists where the agent is installed
	keys  string // the directory of the keys for its challenges
}

// arcFilesHere are the paths that Microsoft documents for this system.
func arcFilesHere() arcFiles {
	if runtime.GOOS == "windows" {
		return arcFiles{
			agent: `C:\Program Files\AzureConnectedMachineAgent\himds.exe`,
			keys:  `C:\ProgramData\AzureConnectedMachineAgent\Tokens`,
		}
	}
	return arcFiles{agent: "/opt/azcmagent/bin/himds", keys: "/var/opt/azcmagent/tokens"}
}

// newEndpoint chooses the endpoint as the Azure SDKs do, by which variables are
// there. The first that fits counts, since App Service, for one, sets Azure
// ML's variables too. Its error names the variable that is wrong.
func newEndpoint(env func(string) string, scope string, arc arcFiles) (*endpoint, error) {
	e := &endpoint{
		clientID: env("AZURE_CLIENT_ID"),
		// Metadata tells an endpoint that no web page and no redirect made the
		// request, as neither can set it.
		header: http.Header{"Metadata": {"true"}},
		now:    time.Now,
		transport: &http.Transport{
			Proxy:                  proxy,
			DialContext:            (&net.Dialer{Timeout: connectTime}).DialContext,
			TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12},
			DisableKeepAlives:      true, // there are hours between two requests
			DisableCompression:     true, // ask for no gzip
			MaxResponseHeaderBytes: maxAnswer,
			// Its other limits are zero, as the context of each try bounds it.
		},
	}
	resource := strings.TrimSuffix(scope, "/.default") // a scope may be without it
	isSet := func(name string) bool { return env(name) != "" }
	_, err := os.Stat(arc.agent)
	hasArcAgent := err == nil
	// The endpoint's URL is in a variable, or else it is the fallback. A path
	// may follow it, and a GET has a query.
	var variable, fallback, path, apiVersion string
	idParam := "client_id"
	switch {
	case isSet("AZURE_CLIENT_SECRET"), isSet("AZURE_FEDERATED_TOKEN_FILE"):
		// Entra ID itself is asked ("Microsoft identity platform and the OAuth
		// 2.0 client credentials flow", first and third case): with the secret
		// of an app registration, as the SDKs' EnvironmentCredential does, or
		// with an assertion of AKS workload identity ("Use Microsoft Entra
		// Workload ID with Azure Kubernetes Service") or another OIDC issuer.
		variable, fallback = "AZURE_AUTHORITY_HOST", "https://login.microsoftonline.com"
		path = "/" + url.PathEscape(env("AZURE_TENANT_ID")) + "/oauth2/v2.0/token"
		e.form = url.Values{
			"client_id":  {e.clientID},
			"scope":      {resource + "/.default"}, // no bare resource here
			"grant_type": {"client_credentials"},
		}
		credential := "AZURE_CLIENT_SECRET"
		if isSet(credential) {
			e.name = "client secret"
			e.form.Set("client_secret", env(credential))
		} else {
			credential = "AZURE_FEDERATED_TOKEN_FILE"
			e.name, e.assertionFile = "workload identity", env(credential)
			e.form.Set("client_assertion_type",
				"urn:ietf:params:oauth:client-assertion-type:jwt-bearer")
		}
		e.why = credential + " is set"
		if !isSet("AZURE_TENANT_ID") || e.clientID == "" {
			return nil, errors.New(credential +
				": set AZURE_TENANT_ID and AZURE_CLIENT_ID too, or unset it")
		}

	case isSet("IDENTITY_ENDPOINT") && isSet("IDENTITY_HEADER") &&
		isSet("IDENTITY_SERVER_THUMBPRINT"):
		return nil, errors.New("IDENTITY_SERVER_THUMBPRINT: Service Fabric is not supported, " +
			"as its endpoint is known by a certificate's SHA-1 only; " +
			"run the proxy on a host with IMDS")

	case isSet("IDENTITY_ENDPOINT") && isSet("IDENTITY_HEADER"):
		// App Service, Functions, Container Apps and Automation ("How to use
		// managed identities for App Service and Azure Functions", REST
		// endpoint reference). The header proves that the caller is the app.
		e.name, e.why = "App Service", "IDENTITY_ENDPOINT and IDENTITY_HEADER are set"
		variable = "IDENTITY_ENDPOINT"
		apiVersion = "2019-08-01"
		e.header.Set("X-Identity-Header", env("IDENTITY_HEADER"))

	case isSet("MSI_ENDPOINT") && isSet("MSI_SECRET"):
		// Azure Machine Learning, which has kept App Service's protocol of
		// 2017. A compute names its own identity in a variable of its own.
		e.name, e.why = "Azure ML", "MSI_ENDPOINT and MSI_SECRET are set"
		variable = "MSI_ENDPOINT"
		apiVersion, idParam = "2017-09-01", "clientid"
		e.header.Set("Secret", env("MSI_SECRET"))
		e.clientID = cmp.Or(e.clientID, env("DEFAULT_IDENTITY_CLIENT_ID"))

	case isSet("MSI_ENDPOINT"):
		// Cloud Shell. It has one identity, that of the user at the terminal, and
		// takes no client id.
		e.name, e.why = "Cloud Shell", "MSI_ENDPOINT is set"
		variable = "MSI_ENDPOINT"
		e.form = url.Values{"resource": {resource}}

	case isSet("IDENTITY_ENDPOINT") && isSet("IMDS_ENDPOINT"), hasArcAgent:
		// Azure Arc ("Authenticate against Azure resources with Azure
		// Arc-enabled servers"). A service that was started before the agent
		// was installed lacks its variables, so the agent's file counts too. An
		// older agent ignores a client id: the log shows whose token has come.
		e.name, e.why = "Azure Arc", "IMDS_ENDPOINT is set, or "+arc.agent+" exists"
		variable = "IDENTITY_ENDPOINT"
		fallback = "http://127.0.0.1:40342/metadata/identity/oauth2/token"
		apiVersion = "2020-06-01"
		e.keyDir = arc.keys

	default:
		// The Instance Metadata Service of virtual machines, scale sets, AKS
		// nodes and Container Instances. While it is being updated, for up to
		// 70 seconds, it answers 404 or 410 ("How to use managed identities for
		// Azure resources on an Azure VM to acquire an access token", Error
		// handling).
		e.name, e.why = "IMDS", "no variable names another"
		variable = "AZURE_POD_IDENTITY_AUTHORITY_HOST"
		fallback, path = "http://169.254.169.254", "/metadata/identity/oauth2/token"
		apiVersion = "2018-02-01"
		e.isIMDS = true
	}

	// The errors do not show the URL, which may hold a secret.
	e.url, err = url.Parse(strings.TrimRight(cmp.Or(env(variable), fallback), "/") + path)
	if err != nil || e.url.Hostname() == "" || e.url.Scheme != "http" && e.url.Scheme != "https" {
		return nil, fmt.Errorf("%s: want a URL such as %s", variable,
			cmp.Or(fallback, "http://127.0.0.1:41964/msi/token"))
	}
	if variable == "AZURE_AUTHORITY_HOST" && e.url.Scheme == "http" &&
		!isLoopback(e.url.Hostname()) {
		return nil, errors.New(variable + ": want https")
	}
	e.name += " at " + e.url.Host
	if e.form == nil {
		query := e.url.Query() // its own is kept
		query.Set("api-version", apiVersion)
		query.Set("resource", resource)
		if e.clientID != "" {
			query.Set(idParam, e.clientID)
		}
		e.url.RawQuery = query.Encode()
	}
	return e, nil
}

// proxy is the Proxy function of both transports. HTTPS_PROXY and NO_PROXY
// count. HTTP_PROXY does not: what is asked in plain HTTP, as the platforms'
// endpoints are, is on this host or on its own link, and a proxy would see the
// token.
func proxy(req *http.Request) (*url.URL, error) {
	if req.URL.Scheme != "https" {
		return nil, nil
	}
	return http.ProxyFromEnvironment(req)
}

// byWay tells of the proxy on the way to u, if there is one.
func byWay(u *url.URL) string {
	if proxyURL, _ := proxy(&http.Request{URL: u}); proxyURL != nil {
		return " by way of HTTPS_PROXY"
	}
	return ""
}

// fetch asks the endpoint for a token, once. A token's life counts from the
// sending of the request, as the answer may be long on its way.
func (e *endpoint) fetch(ctx context.Context) (token, *fetchError) {
	if e.assertionFile != "" { // read anew: Kubernetes replaces it within the hour
		assertion, err := os.ReadFile(e.assertionFile)
		if err != nil {
			return token{}, e.failure(true, "was not asked: AZURE_FEDERATED_TOKEN_FILE: %v", err)
		}
		e.form.Set("client_assertion", strings.TrimSpace(string(assertion)))
	}
	sent := e.now().Round(0) // the wall clock's time alone
	resp, body, err := e.ask(ctx, "")
	if err == nil && e.keyDir != "" && resp.StatusCode == http.StatusUnauthorized {
		// Azure Arc's agent answers a first request with 401 and names a file
		// that only root and the group himds can read. A second one must show
		// what is in that file, which proves that this program may have the
		// token.
		key, keyErr := readKey(resp.Header.Get("WWW-Authenticate"), e.keyDir)
		if keyErr != nil {
			return token{}, e.failure(true, "sent a challenge that cannot be met: %v", keyErr)
		}
		resp, body, err = e.ask(ctx, "Basic "+key)
	}
	if err != nil {
		return token{}, e.failure(false, "gave no answer%s: %s", byWay(e.url), reason(err))
	}
	if resp.StatusCode != http.StatusOK {
		return token{}, e.refused(resp, body)
	}

	// expires_on comes from a clock that is right. If this host's is wrong, the
	// endpoint's Date may be right, and a token's life is the one minus the other.
	// Date is cut to the second, so a small difference is none.
	endpointTime := sent
	if date, err := http.ParseTime(resp.Header.Get("Date")); err == nil &&
		date.Sub(sent).Abs() > 5*time.Second {
		endpointTime = date
	}
	t, err := parseToken(body, sent, endpointTime)
	if err != nil {
		isLasting := err != errExpired // its cache may be about to get a new one
		return token{}, e.failure(isLasting, "answered 200 without a usable token: %v", err)
	}
	return t, nil
}

// ask sends a request for a token, and reads the answer. It follows no
// redirect, as that would show the request's secret to another host.
func (e *endpoint) ask(ctx context.Context, authorization string) (*http.Response, []byte, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	header := e.header.Clone()
	if authorization != "" {
		header.Set("Authorization", authorization)
	}
	method := http.MethodGet
	if e.form != nil {
		method = http.MethodPost
		header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	form := strings.NewReader(e.form.Encode()) // if empty, it is no body
	req, err := http.NewRequestWithContext(ctx, method, e.url.String(), form)
	if err != nil {
		return nil, nil, err
	}
	req.Header = header
	return readAnswer(e.transport, req)
}

// readAnswer sends a request, and reads the answer whole, up to maxAnswer.
func readAnswer(transport *http.Transport, req *http.Request) (*http.Response, []byte, error) {
	resp, err := roundTrip(transport, req)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	return resp, body, err
}

// readKey reads the file that a challenge names. It must be a .key file right
// in dir, where only root and the agent can put one, as the SDKs ask too:
// whoever has taken the agent's port must not get other files shown.
func readKey(challenge, dir string) (string, error) {
	file, ok := strings.CutPrefix(challenge, "Basic realm=")
	if !ok || file != filepath.Join(dir, filepath.Base(file)) || filepath.Ext(file) != ".key" {
		return "", fmt.Errorf("it does not name a .key file in %s", dir)
	}
	key, err := os.ReadFile(file)
	return strings.TrimSpace(string(key)), err
}

// failure says who was asked, for which identity, and what came of it.
func (e *endpoint) failure(isLasting bool, format string, args ...any) *fetchError {
	text := cut(fmt.Sprintf(format, args...), maxShown)
	hint := hintFor(endpointCauses, 0, text)
	if e.clientID != "" {
		text += " (client id " + e.clientID + ")"
	}
	return &fetchError{text: e.name + " " + text, hint: hint, lasting: isLasting}
}

// endpointCauses are of any endpoint, of IMDS, of what Docker Desktop has in
// its place, and of Entra ID, which numbers its errors ("Microsoft Entra
// authentication and authorization error codes"). The status does not matter.
var endpointCauses = []cause{
	{0, "gave no answer", "does this host have it? IMDS is on Azure hosts only " +
		"(README.md: a laptop is none); the way to Entra ID may need HTTPS_PROXY or SSL_CERT_FILE"},
	{0, "identity not found", "assign a managed identity to this host, " +
		"or correct AZURE_CLIENT_ID"},
	{0, "multiple user assigned", "set AZURE_CLIENT_ID to the client id of one of them"},
	{0, "unreachable network", "this is not an Azure host"},
	{0, ".key: permission denied", "run the proxy as root, or as a user of the group himds"},
	// AADSTS70021 in older answers, and 700211 to 700213 for one of the three.
	{0, "aadsts70021", "the federated credential's issuer, subject or audience is not that " +
		"of the token in AZURE_FEDERATED_TOKEN_FILE"},
	{0, "aadsts500011", "correct AZURE_OPENAI_SCOPE"},
}

// refused is the failure for an answer other than 200. The answer's body says
// what is wrong, and is shown, unless a token may be in there, or a client
// secret, which is short: Entra ID does not repeat the request, but a gateway in
// its place might.
func (e *endpoint) refused(resp *http.Response, body []byte) *fetchError {
	status := resp.StatusCode
	if status < 300 || strings.Contains(string(body), "client_secret") {
		body = nil
	}
	isPassing := status >= 500 || status == http.StatusTooManyRequests ||
		e.isIMDS && (status == http.StatusNotFound || status == http.StatusGone)
	failure := e.failure(!isPassing, "answered %d: %s", status, body)
	failure.retryAfter, _ = parseSeconds(resp.Header.Get("Retry-After"))
	return failure
}

var errExpired = errors.New("it has expired already, by the endpoint's clock or, " +
	"if that sends no Date, by this host's")

// parseToken reads the answer to a request for a token. sent is when that left
// by this host's clock, and endpointTime the same moment by the endpoint's. The
// errors do not quote the answer.
func parseToken(body []byte, sent, endpointTime time.Time) (token, error) {
	// The times come as numbers or as strings, depending on the endpoint.
	var answer struct {
		AccessToken string `json:"access_token"`
		ExpiresOn   any    `json:"expires_on"`
		ExpiresIn   any    `json:"expires_in"`
		RefreshIn   any    `json:"refresh_in"`
	}
	if json.Unmarshal(body, &answer) != nil || !tokenShape.MatchString(answer.AccessToken) {
		return token{}, errors.New("no JSON object with an access_token that a header can carry")
	}

	// Where both are there, as in IMDS, expires_in is counted from the issue of
	// a token that may be handed out for hours (Azure/azure-sdk-for-js#6643).
	life, err := parseSeconds(answer.ExpiresIn)
	if answer.ExpiresOn != nil && answer.ExpiresOn != "" {
		var end time.Time
		end, err = parseTime(answer.ExpiresOn)
		life = end.Sub(endpointTime)
	}
	if err != nil {
		return token{}, fmt.Errorf("expires_on or expires_in: %w", err)
	}
	if life < time.Second {
		return token{}, errExpired
	}

	// It is due to be replaced after refresh_in, or after 80 % of its life.
	refresh := life / 5 * 4
	if in, err := parseSeconds(answer.RefreshIn); err == nil && in >= time.Second {
		refresh = min(refresh, in)
	}
	return token{
		authorization: "Bearer " + answer.AccessToken,
		expires:       sent.Add(life),
		refresh:       sent.Add(refresh),
	}, nil
}

// tokenShape is printable ASCII without a space.
var tokenShape = regexp.MustCompile("^[!-~]+$")

// parseTime reads seconds since the epoch, or a date in one of dateLayouts.
func parseTime(value any) (time.Time, error) {
	if sinceEpoch, err := parseSeconds(value); err == nil {
		return time.Unix(0, 0).Add(sinceEpoch), nil
	}
	for _, layout := range dateLayouts {
		if t, err := time.Parse(layout, fmt.Sprint(value)); err == nil {
			return t, nil
		}
	}
	return time.Time{}, errors.New("not in a form known here")
}

// dateLayouts are the dates that have been seen as expires_on: from App Service
// since 2024 (Azure/azure-sdk-for-net#46714), and from the protocol of 2017 on
// Linux and on Windows. One without a zone is in UTC.
var dateLayouts = []string{
	time.RFC3339,
	"2006-01-02 15:04:05",
	"1/2/2006 15:04:05",
	"1/2/2006 15:04:05 -07:00",
	"1/2/2006 3:04:05 PM -07:00",
}

// parseSeconds reads a number of seconds: a JSON string, or a number, which is
// printed in a form such as 1.77237e+09 that ParseFloat reads. A Duration ends
// after 292 years, or 9.2e9 seconds.
func parseSeconds(value any) (time.Duration, error) {
	seconds, err := strconv.ParseFloat(fmt.Sprint(value), 64)
	if err != nil || !(0 <= seconds && seconds < 9e9) { // this is so for NaN, too
		return 0, errors.New("not a number of seconds")
	}
	return time.Duration(seconds * float64(time.Second)), nil
}
