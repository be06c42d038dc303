package main

// This file is about tokens, from the top down: a token; the token source,
// which holds one and renews it in time; the identity endpoint, which the
// environment chooses; one fetch from it, with its retries; how its answer is
// read; and last what the other files use too: why a connection failed, what
// makes text from outside safe to show, and small questions about hosts, ports
// and characters.

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
	"time"
)

const (
	// tryTime bounds one request to the identity endpoint, its answer
	// included. Endpoints on busy hosts have taken six seconds
	// (Azure/azure-sdk-for-net#20609).
	tryTime = 10 * time.Second

	// fetchTime bounds one fetch with all its tries and pauses, and so the
	// time that a client waits for a token. A choice of ours.
	fetchTime = 22 * time.Second

	// firstPause comes before the first retry. Each further pause is twice as
	// long, as Microsoft asks for ("How to use managed identities for Azure
	// resources on an Azure VM to acquire an access token", Retry guidance),
	// but begins lower, as clients are waiting.
	firstPause = 800 * time.Millisecond

	// pauseWithoutToken follows a failed fetch when there is no valid token.
	// Until it ends, requests are answered with that failure at once.
	pauseWithoutToken = time.Second

	// pauseWithToken follows a failed fetch while the old token is valid.
	pauseWithToken = 10 * time.Second

	// maxRetryAfter is the longest Retry-After of an endpoint that is heeded.
	maxRetryAfter = 2 * time.Minute

	// unaskedPause is how long the token source stays idle without a valid
	// token when no request asks for one.
	unaskedPause = time.Minute

	// rejectedPause lies between two refreshes that a 401 from the upstream
	// causes: the identity endpoint is not asked for a token per request.
	rejectedPause = 30 * time.Second

	// maxAnswer bounds what is read of an endpoint's answer, in bytes. Real
	// ones have about 2,000. It bounds the upstream's answer to -check, too.
	maxAnswer = 256 << 10
)

// token is an access token and its life.
type token struct {
	authorization string    // "Bearer eyJ0eXAi…", the header's value
	clientID      string    // whose it is, if the endpoint says so
	from          string    // "IMDS at 169.254.169.254"
	expires       time.Time // it is not sent from then on
	refresh       time.Time // it is due to be replaced from then on
}

// validAt tells whether the token can be sent.
func (t token) validAt(now time.Time) bool { return until(t.expires, now) > 0 }

// until is how long it takes from now to t. A time.Time holds two clocks. The
// monotonic one stands still while a machine sleeps, and the wall clock, which is
// what Round leaves, may be set back. So the one that says less counts.
func until(t, now time.Time) time.Duration {
	return min(t.Sub(now), t.Round(0).Sub(now.Round(0)))
}

// claims are what a token says of itself (Microsoft's "Access token claims
// reference"). They are only shown: verifying them is the upstream's part.
type claims struct {
	Audience string `json:"aud"`
	Tenant   string `json:"tid"`
	Object   string `json:"oid"`
	Client   string `json:"appid"`
}

// claims decodes the token's second part, as it is a JWT (RFC 7519). Of any
// other kind of token every claim is "unknown".
func (t token) claims() claims {
	c := claims{Audience: "unknown", Tenant: "unknown", Object: "unknown", Client: "unknown"}
	if parts := strings.Split(t.authorization, "."); len(parts) == 3 {
		payload, _ := base64.RawURLEncoding.DecodeString(parts[1])
		json.Unmarshal(payload, &c)
	}
	return c
}

// tokenSource holds one token and replaces it before it expires.
//
// Its goroutine, run, is the only one that fetches, so there is never more
// than one fetch at a time. While the held token is valid, no request waits.
// Without a valid token, all requests wait for the same fetch.
type tokenSource struct {
	fetch func(context.Context) (token, error)
	now   func() time.Time
	asked chan struct{} // wakes run; has room for one, so that nobody waits to ask

	mu          sync.Mutex    // protects the fields below
	held        token         // the zero token before the first success
	failure     error         // of the last fetch; nil after a success
	pausedUntil time.Time     // no fetch begins before; zero after a success
	rejectedAt  time.Time     // when a 401 last made held due for refresh
	turn        chan struct{} // closed and replaced after each turn of run
	toldLate    bool          // the log has said that there is no token yet
}

func newTokenSource(fetch func(context.Context) (token, error),
	now func() time.Time) *tokenSource {
	return &tokenSource{
		fetch: fetch,
		now:   now,
		asked: make(chan struct{}, 1),
		turn:  make(chan struct{}),
	}
}

// noTokenError is why there is no token, and when it pays to ask again.
type noTokenError struct {
	cause      error
	retryAfter time.Duration
}

func (e *noTokenError) Error() string { return e.cause.Error() }

// current returns a valid token: the held one, or else that of the fetch under
// way, for which it waits until ctx ends. Soon after a failure it does not
// wait, but returns that failure. Its error is a *noTokenError, or that of ctx.
func (s *tokenSource) current(ctx context.Context) (token, error) {
	for {
		// turn is read together with due. While due is true, run has yet to publish the
		// outcome of a fetch, and it closes turn after that. So whoever waits for this
		// turn to be closed cannot miss the outcome.
		s.mu.Lock()
		now := s.now()
		held, failure, turn, due := s.held, s.failure, s.turn, s.isDue(now)
		pause := until(s.pausedUntil, now)
		s.mu.Unlock()

		if due {
			s.ask()
		}
		if held.validAt(now) {
			return held, nil
		}
		if !due { // it is the pause after a failure
			return token{}, &noTokenError{failure, pause}
		}
		select {
		case <-turn:
		case <-ctx.Done():
			return token{}, ctx.Err()
		}
	}
}

// isDue tells whether a fetch should begin. It stays true until publish has its
// outcome, so it is true of a fetch under way as well. Without a valid token it
// is false only in the pause that publish sets with a failure. The caller holds
// s.mu.
func (s *tokenSource) isDue(now time.Time) bool {
	if until(s.pausedUntil, now) > 0 {
		return false
	}
	return !s.held.validAt(now) || until(s.held.refresh, now) <= 0
}

// ask wakes run, which looks for itself whether a fetch is due.
func (s *tokenSource) ask() {
	select {
	case s.asked <- struct{}{}:
	default: // it has been asked already
	}
}

// run fetches a token at once, and then another whenever one is due, until
// ctx ends. It needs no requests for that: a client that comes back after
// hours finds a valid token.
func (s *tokenSource) run(ctx context.Context) {
	for {
		s.mu.Lock()
		due := s.isDue(s.now())
		s.mu.Unlock()
		if due {
			t, err := s.fetch(ctx)
			if err == nil && !t.validAt(s.now()) {
				err = errors.New("the token expired as soon as it came")
			}
			if ctx.Err() == nil {
				s.publish(t, err)
			}
		}
		s.wakeWaiters()
		select {
		case <-time.After(s.untilDue()):
		case <-s.asked:
		case <-ctx.Done():
			return
		}
	}
}

// untilDue is how long run may wait before it looks again.
func (s *tokenSource) untilDue() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	if !s.held.validAt(now) {
		return unaskedPause // a request or /readyz asks sooner
	}
	return max(until(s.held.refresh, now), until(s.pausedUntil, now), time.Second)
}

// publish logs and keeps the outcome of a fetch. A failure leaves the old token
// in use for as long as that is valid.
func (s *tokenSource) publish(t token, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tell(t, err)
	s.failure = err
	if err == nil {
		s.held = t
		s.pausedUntil = time.Time{}
	} else {
		s.pausedUntil = s.now().Add(s.pauseAfter(err))
	}
}

// tell logs the first token, and each failure. The caller holds s.mu.
func (s *tokenSource) tell(t token, err error) {
	hadToken := s.held.authorization != ""
	switch {
	case err == nil && hadToken:
		// It replaces another, and nobody needs to know.
	case err == nil:
		log.Printf("token ready: object id %s, expires %s, from %s",
			t.claims().Object, t.expires.Format(time.RFC3339), t.from)
	case hadToken:
		log.Printf("no new token: %v", err)
	case s.toldLate:
		log.Printf("still no token: %v", err)
	default:
		s.toldLate = true
		log.Printf("no token yet: %v; trying goes on", err)
	}
}

// tellLate logs why the fetch under way has no token so far, unless there is one,
// or that has been logged. A fetch with its retries may take fetchTime, for which
// nobody who looks at the log of a new installation should have to wait.
func (s *tokenSource) tellLate(why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held.authorization == "" && !s.toldLate {
		s.tell(token{}, why)
	}
}

// wakeWaiters has those who wait for a token look again.
func (s *tokenSource) wakeWaiters() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.turn)
	s.turn = make(chan struct{})
}

// pauseAfter is how long no fetch begins after one that failed with err. The
// pause with a token ends with that token at the latest, and an endpoint that
// is overloaded may ask for more. The caller holds s.mu.
func (s *tokenSource) pauseAfter(err error) time.Duration {
	pause := pauseWithoutToken
	if left := until(s.held.expires, s.now()); left > pause {
		pause = min(left, pauseWithToken)
	}
	var failed *fetchError
	if errors.As(err, &failed) {
		pause = max(pause, min(failed.retryAfter, maxRetryAfter))
	}
	return pause
}

// rejected makes t due for refresh, as the upstream answered 401 to it. It
// stays in use meanwhile, because a missing role is answered with 401 too.
func (s *tokenSource) rejected(t token) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	if t.authorization != s.held.authorization || now.Sub(s.rejectedAt) < rejectedPause {
		return
	}
	s.rejectedAt = now
	s.held.refresh = now
	s.ask()
}

// endpoint is an identity endpoint, and the identity that it is asked for.
//
// The platforms' endpoints are on the host itself or on its own link: a
// loopback address, IMDS at the link-local 169.254.169.254, or another that the
// platform's variable names. They speak plain HTTP. Entra ID, which workload
// identity asks, is spoken to over TLS, unless it is on a loopback address.
type endpoint struct {
	name         string   // "IMDS"
	why          string   // it was chosen: "marked by MSI_ENDPOINT"
	url          *url.URL // "http://169.254.169.254/metadata/identity/oauth2/token"
	resource     string   // "https://cognitiveservices.azure.com"
	clientID     string   // of a user-assigned identity; empty for the system-assigned one
	clientIDFrom string   // the variable that holds it: "AZURE_CLIENT_ID"

	// request makes the request for a token, anew for each try. For Azure Arc it
	// sends another one before, in answerChallenge.
	request func(context.Context) (*http.Request, error)

	alsoRetried  []int  // statuses that are temporary here, beside those of shouldRetry
	noAnswerHint string // what it may mean that it does not answer
	mustEchoID   bool   // an answer without clientID in it is another identity's

	onRetry   func(error) // is told why a try failed, if another follows; may be nil
	debug     bool
	secrets   *secrets
	transport *http.Transport
	now       func() time.Time
	sleep     func(context.Context, time.Duration)
}

// String says which endpoint it is, and why it was chosen.
func (e *endpoint) String() string { return e.address() + ", " + e.why }

func (e *endpoint) address() string { return e.name + " at " + e.url.Host }

// arcFiles are where Azure Arc's agent keeps its files. Nobody can write there but
// the agent, whose user is himds, and root or an administrator.
type arcFiles struct {
	agent string // the file that exists where the agent is installed
	keys  string // the directory of the keys for its challenges
}

// arcFilesHere are the paths that Microsoft documents for this system.
func arcFilesHere(getenv func(string) string) arcFiles {
	if runtime.GOOS == "windows" {
		const folder = "AzureConnectedMachineAgent"
		return arcFiles{
			agent: filepath.Join(cmp.Or(getenv("ProgramFiles"), `C:\Program Files`),
				folder, "himds.exe"),
			keys: filepath.Join(cmp.Or(getenv("ProgramData"), `C:\ProgramData`),
				folder, "Tokens"),
		}
	}
	return arcFiles{agent: "/opt/azcmagent/bin/himds", keys: "/var/opt/azcmagent/tokens"}
}

// requirements are variables that mean nothing unless one of some others is
// set too. The Azure SDKs fall back to IMDS then, which fails later with less to
// go by. newEndpoint refuses them before its switch chooses.
var requirements = []struct {
	name  string
	oneOf []string
}{
	{"AZURE_FEDERATED_TOKEN_FILE", []string{"AZURE_TENANT_ID"}},
	{"AZURE_FEDERATED_TOKEN_FILE", []string{"AZURE_CLIENT_ID"}},
	{"IDENTITY_ENDPOINT", []string{"IDENTITY_HEADER", "IMDS_ENDPOINT"}},
	// Container Instances have IMDS, and yet set the header and the thumbprint,
	// without an endpoint (MicrosoftDocs/azure-docs#122273).
	{"IDENTITY_HEADER", []string{"IDENTITY_ENDPOINT", "IDENTITY_SERVER_THUMBPRINT"}},
	{"IMDS_ENDPOINT", []string{"IDENTITY_ENDPOINT"}},
	{"MSI_SECRET", []string{"MSI_ENDPOINT"}},
}

// newEndpoint chooses the endpoint as the Azure SDKs do. The first of these that
// is there counts, since App Service, for one, sets Azure ML's variables too:
//
//	workload identity  AZURE_FEDERATED_TOKEN_FILE
//	Service Fabric     IDENTITY_ENDPOINT, IDENTITY_HEADER, IDENTITY_SERVER_THUMBPRINT
//	App Service        IDENTITY_ENDPOINT, IDENTITY_HEADER
//	Azure ML           MSI_ENDPOINT, MSI_SECRET
//	Cloud Shell        MSI_ENDPOINT
//	Azure Arc          IDENTITY_ENDPOINT, IMDS_ENDPOINT, or its agent's file
//	IMDS               none of these
//
// Its error names the variable that is wrong.
func newEndpoint(getenv func(string) string, scope string, arc arcFiles,
	hidden *secrets) (*endpoint, error) {
	isSet := func(name string) bool { return getenv(name) != "" }
	for _, r := range requirements {
		if isSet(r.name) && !slices.ContainsFunc(r.oneOf, isSet) {
			return nil, fmt.Errorf("%s is set without %s: set that too, or unset %s",
				r.name, strings.Join(r.oneOf, " or "), r.name)
		}
	}
	e := &endpoint{
		resource:     strings.TrimSuffix(scope, "/.default"), // a scope may be without it
		clientID:     getenv("AZURE_CLIENT_ID"),
		clientIDFrom: "AZURE_CLIENT_ID",
		debug:        isDebug(getenv),
		secrets:      hidden,
		now:          time.Now,
		sleep:        sleep,
	}
	// No redirect is followed, as a RoundTripper never does. It would show the
	// request's secret to another host.
	e.transport = &http.Transport{
		Proxy:                  nil,          // none on the way to the host's own link
		OnProxyConnectResponse: checkConnect, // for workload identity, which sets Proxy
		DisableKeepAlives:      true,         // there are hours between two requests
		DisableCompression:     true,         // ask for no gzip
		MaxResponseHeaderBytes: maxAnswer,
		// Its timeouts are zero, as the context of each try bounds it.
	}

	urlFrom := func(name, fallback, path string) (*url.URL, error) {
		return parseEndpoint(name, getenv(name), fallback, path)
	}
	var err error
	switch {
	case isSet("AZURE_FEDERATED_TOKEN_FILE"):
		// AKS workload identity: its webhook sets AZURE_TENANT_ID and
		// AZURE_CLIENT_ID too ("Use Microsoft Entra Workload ID with Azure
		// Kubernetes Service"). Entra ID itself is asked, by way of HTTPS_PROXY
		// if that is set.
		e.name, e.why = "workload identity", "marked by AZURE_FEDERATED_TOKEN_FILE"
		e.url, err = urlFrom("AZURE_AUTHORITY_HOST", "https://login.microsoftonline.com",
			"/"+url.PathEscape(getenv("AZURE_TENANT_ID"))+"/oauth2/v2.0/token")
		if err != nil {
			return nil, err
		}
		if e.url.Scheme == "http" && !isLoopback(e.url.Hostname()) {
			return nil, errors.New("AZURE_AUTHORITY_HOST: want https, as in " +
				"https://login.microsoftonline.com")
		}
		e.transport.Proxy = proxyTo(e.url)
		e.request = func(context.Context) (*http.Request, error) {
			return e.tokenExchange(getenv("AZURE_FEDERATED_TOKEN_FILE"))
		}

	case isSet("IDENTITY_ENDPOINT") && isSet("IDENTITY_HEADER") &&
		isSet("IDENTITY_SERVER_THUMBPRINT"):
		return nil, errors.New("IDENTITY_SERVER_THUMBPRINT is set: Service Fabric is not " +
			"supported, as its endpoint is known by a certificate's SHA-1 only; " +
			"run the proxy on a host with IMDS")

	case isSet("IDENTITY_ENDPOINT") && isSet("IDENTITY_HEADER"):
		// App Service, Functions, Container Apps and Automation ("How to use
		// managed identities for App Service and Azure Functions", REST endpoint
		// reference). The header proves that the caller is the app.
		e.name, e.why = "App Service", "marked by IDENTITY_ENDPOINT and IDENTITY_HEADER"
		e.url, err = urlFrom("IDENTITY_ENDPOINT", "", "")
		hidden.hide("endpoint's secret", getenv("IDENTITY_HEADER"))
		e.request = func(context.Context) (*http.Request, error) {
			req := e.get("2019-08-01", "client_id")
			req.Header.Set("X-Identity-Header", getenv("IDENTITY_HEADER"))
			return req, nil
		}

	case isSet("MSI_ENDPOINT") && isSet("MSI_SECRET"):
		// Azure Machine Learning, which has kept App Service's protocol of 2017.
		// A compute names its own identity in a variable of its own.
		e.name, e.why = "Azure ML", "marked by MSI_ENDPOINT and MSI_SECRET"
		e.url, err = urlFrom("MSI_ENDPOINT", "", "")
		if e.clientID == "" {
			e.clientIDFrom = "DEFAULT_IDENTITY_CLIENT_ID"
			e.clientID = getenv("DEFAULT_IDENTITY_CLIENT_ID")
		}
		hidden.hide("endpoint's secret", getenv("MSI_SECRET"))
		e.request = func(context.Context) (*http.Request, error) {
			req := e.get("2017-09-01", "clientid")
			req.Header.Set("Secret", getenv("MSI_SECRET"))
			return req, nil
		}

	case isSet("MSI_ENDPOINT"):
		// Cloud Shell. It has one identity, that of the user at the terminal.
		if e.clientID != "" {
			return nil, errors.New("AZURE_CLIENT_ID is set, but Cloud Shell (MSI_ENDPOINT) has " +
				"no user-assigned identities: unset it")
		}
		e.name, e.why = "Cloud Shell", "marked by MSI_ENDPOINT"
		e.url, err = urlFrom("MSI_ENDPOINT", "", "")
		e.request = func(context.Context) (*http.Request, error) {
			req := e.post(url.Values{"resource": {e.resource}})
			req.Header.Set("Metadata", "true")
			return req, nil
		}

	case isSet("IDENTITY_ENDPOINT") && isSet("IMDS_ENDPOINT"), exists(arc.agent):
		// Azure Arc ("Authenticate against Azure resources with Azure
		// Arc-enabled servers"). A service that was started before the agent was
		// installed lacks its variables, so the agent's file counts too. Older
		// agents ignore client_id and give the token of the host's own identity.
		// An answer that does not repeat the client id is taken for theirs, as
		// azidentity 1.15 of the Azure SDK for Go does.
		e.name, e.why = "Azure Arc", "marked by IDENTITY_ENDPOINT and IMDS_ENDPOINT"
		if !isSet("IDENTITY_ENDPOINT") {
			e.why = "marked by " + arc.agent
		}
		e.url, err = urlFrom("IDENTITY_ENDPOINT",
			"http://127.0.0.1:40342/metadata/identity/oauth2/token", "")
		e.mustEchoID = e.clientID != ""
		e.request = func(ctx context.Context) (*http.Request, error) {
			return e.answerChallenge(ctx, arc.keys)
		}

	default:
		// The Instance Metadata Service of virtual machines, scale sets, AKS
		// nodes and Container Instances. While it is being updated, for up to 70
		// seconds, it answers 404 or 410 ("How to use managed identities for Azure
		// resources on an Azure VM to acquire an access token", Error handling).
		e.name, e.why = "IMDS", "no variable marks another endpoint"
		e.url, err = urlFrom("AZURE_POD_IDENTITY_AUTHORITY_HOST", "http://169.254.169.254",
			"/metadata/identity/oauth2/token")
		e.alsoRetried = []int{http.StatusNotFound, http.StatusGone}
		e.noAnswerHint = "only Azure hosts have it"
		e.request = func(context.Context) (*http.Request, error) {
			return e.get("2018-02-01", "client_id"), nil
		}
	}
	if err != nil {
		return nil, err
	}
	return e, nil
}

// parseEndpoint parses the value of the variable name, or fallback if that is
// not set, with path after it. Its error shows an example and not the URL,
// which may hold a secret.
func parseEndpoint(name, value, fallback, path string) (*url.URL, error) {
	raw := cmp.Or(value, fallback)
	if path != "" {
		raw = strings.TrimRight(raw, "/") + path
	}
	u, err := url.Parse(raw)
	if err != nil || !hasHost(u) || u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("%s: not a URL with a host; want one such as %s",
			name, cmp.Or(fallback, "http://127.0.0.1:41964/msi/token"))
	}
	return u, nil
}

// exists tells whether there is such a file.
func exists(file string) bool {
	_, err := os.Stat(file)
	return err == nil
}

// proxyTo is the Proxy function of a transport to u, which is the upstream or
// Entra ID. HTTPS_PROXY and NO_PROXY count. HTTP_PROXY does not: in plain HTTP
// both are on a loopback address only, and a proxy would see the token.
func proxyTo(u *url.URL) func(*http.Request) (*url.URL, error) {
	if u.Scheme != "https" {
		return nil
	}
	return http.ProxyFromEnvironment
}

// sleep waits for d, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// get makes the GET request of most endpoints. They differ in api-version and
// in the name of the parameter for a client id.
func (e *endpoint) get(apiVersion, idParam string) *http.Request {
	u := *e.url
	query := u.Query() // an endpoint's own query is kept
	query.Set("api-version", apiVersion)
	query.Set("resource", e.resource)
	if e.clientID != "" {
		query.Set(idParam, e.clientID)
	}
	u.RawQuery = query.Encode()
	// This header tells the endpoint that no web page and no redirect made the
	// request, as neither can set it.
	header := http.Header{"Metadata": {"true"}}
	return &http.Request{Method: http.MethodGet, URL: &u, Header: header}
}

// post makes a POST request, whose parameters are in its body.
func (e *endpoint) post(form url.Values) *http.Request {
	// NewRequest can fail only on its method and URL, which are valid.
	req, _ := http.NewRequest(http.MethodPost, e.url.String(), strings.NewReader(form.Encode()))
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	return req
}

// tokenExchange makes the request that exchanges the token in file, which
// Kubernetes puts there and replaces within the hour, for one of Entra ID
// ("Microsoft identity platform and the OAuth 2.0 client credentials flow",
// third case).
func (e *endpoint) tokenExchange(file string) (*http.Request, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, e.errorf("was not asked: AZURE_FEDERATED_TOKEN_FILE: %v", err)
	}
	assertion := strings.TrimSpace(string(text))
	e.secrets.hide("assertion", assertion)
	return e.post(url.Values{
		"client_id":             {e.clientID},
		"scope":                 {e.resource + "/.default"}, // a bare resource is refused here
		"grant_type":            {"client_credentials"},
		"client_assertion_type": {"urn:ietf:params:oauth:client-assertion-type:jwt-bearer"},
		"client_assertion":      {assertion},
	}), nil
}

// answerChallenge makes the request for Azure Arc's agent. The agent answers a
// first request with 401 and names a file that only root and the group himds
// can read. The second one must show what is in that file, which proves that
// this program may have the token.
func (e *endpoint) answerChallenge(ctx context.Context, keys string) (*http.Request, error) {
	req := e.get("2020-06-01", "client_id")
	resp, body, err := e.do(ctx, req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusUnauthorized {
		return nil, e.refusal(resp, body)
	}
	key, err := readKey(resp.Header.Get("WWW-Authenticate"), keys)
	if err != nil {
		return nil, e.errorf("sent a challenge that cannot be met: %v", err)
	}
	e.secrets.hide("key of the challenge", key)
	req.Header.Set("Authorization", "Basic "+key)
	return req, nil
}

// readKey reads the file that a challenge names. It must be a regular .key
// file right in dir, of 4096 bytes at most, as the SDKs ask too: whoever has
// taken the agent's port must not get other files shown.
func readKey(challenge, dir string) (string, error) {
	file, ok := strings.CutPrefix(challenge, "Basic realm=")
	if !ok || file != filepath.Join(dir, filepath.Base(file)) || filepath.Ext(file) != ".key" {
		return "", fmt.Errorf("it does not name a .key file in %s", dir)
	}
	// Nobody but the agent and root can exchange the file in between. An error of
	// Lstat comes up again with ReadFile.
	info, err := os.Lstat(file)
	if err == nil && (!info.Mode().IsRegular() || info.Size() > 4096) {
		return "", fmt.Errorf("%s is not a regular file of 4096 bytes at most", file)
	}
	key, err := os.ReadFile(file)
	if errors.Is(err, os.ErrPermission) {
		return "", fmt.Errorf("%w; hint: run as root, or join the group himds", err)
	}
	if err != nil {
		return "", err
	}
	text := strings.TrimRight(string(key), "\r\n") // a line break is no part of the key
	if !isPrintableASCII(text) {
		return "", fmt.Errorf("%s has bytes that a header cannot carry", file)
	}
	return text, nil
}

// fetchError is why a fetch failed.
type fetchError struct {
	text       string        // "IMDS at 169.254.169.254 answered 400: …"
	hint       string        // what to do about it; empty if that is not known
	retry      bool          // the same request may succeed in a moment
	retryAfter time.Duration // the endpoint's Retry-After; 0 if there is none
}

func (e *fetchError) Error() string { return withHint(e.text, e.hint) }

// withHint is a text and its hint, if there is one, in one line.
func withHint(text, hint string) string {
	if hint == "" {
		return text
	}
	return text + "; hint: " + hint
}

// errorf makes a fetchError that says who was asked, and for which identity.
func (e *endpoint) errorf(format string, args ...any) *fetchError {
	text := e.secrets.safe(fmt.Sprintf(format, args...), maxPiece)
	text = e.address() + " " + strings.TrimSpace(text)
	if e.clientID != "" {
		text += " (client_id " + e.clientID + ", from " + e.clientIDFrom + ")"
	}
	return &fetchError{text: text}
}

// fetch gets a token, with retries while they may help and there is time. Its
// error is a *fetchError.
func (e *endpoint) fetch(ctx context.Context) (token, error) {
	// The context bounds requests, which take real time. Whether a pause fits in is
	// counted by e.now, which a test may replace together with e.sleep.
	ctx, cancel := context.WithTimeout(ctx, fetchTime)
	defer cancel()
	deadline := e.now().Add(fetchTime)
	for pause := firstPause; ; pause *= 2 {
		t, err := e.try(ctx)
		var failed *fetchError
		if !errors.As(err, &failed) || !failed.retry {
			return t, err // a success, or a failure that will last
		}
		// Jitter of ±20 % keeps many hosts from asking in step.
		jittered := time.Duration(float64(pause) * (0.8 + 0.4*rand.Float64()))
		wait := max(failed.retryAfter, jittered)
		if ctx.Err() != nil || e.now().Add(wait).After(deadline) {
			return token{}, err
		}
		if e.onRetry != nil {
			e.onRetry(err)
		}
		e.sleep(ctx, wait)
		if ctx.Err() != nil {
			return token{}, err
		}
	}
}

// try asks the endpoint once. Its error is a *fetchError. A token's life counts
// from the sending of the request, the earliest time at which a new token can
// have been issued.
func (e *endpoint) try(ctx context.Context) (token, error) {
	ctx, cancel := context.WithTimeout(ctx, tryTime)
	defer cancel()
	req, err := e.request(ctx)
	if err != nil {
		return token{}, err
	}
	sent := e.now()
	resp, body, err := e.do(ctx, req)
	if err != nil {
		return token{}, err
	}
	if resp.StatusCode != http.StatusOK {
		return token{}, e.refusal(resp, body)
	}

	// expires_on is told by the endpoint's clock, which its Date header shows. A
	// host whose clock is wrong keeps a token for the right time all the same.
	endpointTime, err := http.ParseTime(resp.Header.Get("Date"))
	if err != nil {
		endpointTime = sent
	}
	t, err := parseToken(body, sent, endpointTime)
	if err != nil {
		failed := e.errorf("answered with %s, not a usable token: %v",
			cmp.Or(resp.Header.Get("Content-Type"), "no Content-Type"), err)
		failed.retry = errors.Is(err, errExpired) // its cache may be about to get a new one
		return token{}, failed
	}
	t.from = e.address()
	e.secrets.hide("token", strings.TrimPrefix(t.authorization, "Bearer "))
	if e.mustEchoID && !strings.EqualFold(t.clientID, e.clientID) {
		return token{}, e.errorf("gave the token of another identity, as older agents do; " +
			"unset AZURE_CLIENT_ID")
	}
	if e.debug {
		log.Printf("debug: token from %s, expires %s, next refresh %s", t.from,
			t.expires.Format(time.RFC3339), t.refresh.Format(time.RFC3339))
	}
	return t, nil
}

// do sends one request and reads its answer.
func (e *endpoint) do(ctx context.Context, req *http.Request) (*http.Response, []byte, error) {
	resp, err := e.transport.RoundTrip(req.WithContext(ctx))
	var body []byte
	if err == nil {
		defer resp.Body.Close()
		body, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	}
	if err != nil {
		_, reason := explainFailure(err)
		return nil, nil, e.noAnswer("gave no answer: " + reason)
	}
	return resp, body, nil
}

// noAnswer is the error for an endpoint that does not answer.
func (e *endpoint) noAnswer(what string) *fetchError {
	failed := e.errorf("%s", what)
	failed.hint, failed.retry = e.noAnswerHint, true
	return failed
}

// refusal is the error for an answer other than 200. It shows the answer's
// body, as that is where an endpoint says what is wrong.
func (e *endpoint) refusal(resp *http.Response, body []byte) *fetchError {
	if resp.StatusCode < 300 {
		body = nil // it may hold a token
	}
	failed := e.errorf("answered %d: %s", resp.StatusCode, body)
	failed.retry = e.shouldRetry(resp.StatusCode)
	failed.retryAfter = retryAfter(resp.Header, e.now())
	for _, h := range refusalHints {
		if strings.Contains(failed.text, h.text) {
			failed.hint = h.hint
		}
	}
	return failed
}

// shouldRetry tells whether a status may be another one in a moment.
func (e *endpoint) shouldRetry(status int) bool {
	switch {
	case status == http.StatusRequestTimeout, status == http.StatusTooManyRequests:
		return true
	case status >= 500:
		return true
	}
	return slices.Contains(e.alsoRetried, status)
}

// refusalHints are what to do about the usual refusals: of IMDS, of what
// Docker Desktop has in its place, and of Entra ID, which numbers its errors
// ("Microsoft Entra authentication and authorization error codes").
var refusalHints = []struct{ text, hint string }{
	{"Identity not found", "assign a managed identity to this host, or correct AZURE_CLIENT_ID"},
	{"Multiple user assigned", "set AZURE_CLIENT_ID to the client id of one of them"},
	{"unreachable network", "this is not an Azure host"},
	// AADSTS70021 in older answers, and 700211 to 700213 for one of the three.
	{"AADSTS70021", "the federated credential's issuer, subject or audience is not this pod's"},
	{"AADSTS500011", "correct AZURE_OPENAI_SCOPE"},
}

// retryAfter reads a Retry-After header, which holds seconds or a date (RFC
// 9110 §10.2.3).
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

var errExpired = errors.New("it has expired already, by the endpoint's clock or, " +
	"if that sends no Date, by this host's")

// parseToken reads the answer to a request for a token. When that was sent, our
// clock showed sent, and the endpoint's clock endpointTime. The errors do not
// quote the answer.
func parseToken(body []byte, sent, endpointTime time.Time) (token, error) {
	// The times come as numbers or as strings, depending on the endpoint.
	var answer struct {
		AccessToken string `json:"access_token"`
		ExpiresOn   any    `json:"expires_on"`
		ExpiresIn   any    `json:"expires_in"`
		RefreshIn   any    `json:"refresh_in"`
		ClientID    string `json:"client_id"`
	}
	if json.Unmarshal(body, &answer) != nil {
		return token{}, errors.New("not the JSON object expected")
	}
	if answer.AccessToken == "" {
		return token{}, errors.New("access_token is missing")
	}
	if !isPrintableASCII(answer.AccessToken) || strings.Contains(answer.AccessToken, " ") {
		return token{}, errors.New("access_token has bytes that a header cannot carry")
	}

	// The token lives until expires_on, or for expires_in, whichever ends
	// earlier. IMDS counts expires_in from the issue of a token that it may
	// hand out for hours (Azure/azure-sdk-for-js#6643).
	on, in := scalar(answer.ExpiresOn), scalar(answer.ExpiresIn)
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
		life = min(life, end.Sub(endpointTime))
	}
	if life < time.Second {
		return token{}, errExpired
	}

	// It is due for refresh after refresh_in, or after 80 % of its life.
	refresh := life / 5 * 4
	if seconds, err := parseSeconds(scalar(answer.RefreshIn)); err == nil && seconds > 0 {
		refresh = min(refresh, seconds)
	}
	return token{
		authorization: "Bearer " + answer.AccessToken,
		clientID:      answer.ClientID,
		expires:       sent.Add(life),
		refresh:       sent.Add(max(refresh, time.Second)),
	}, nil
}

// scalar is a JSON string or number as text, and empty for null or a missing
// field. A large number comes out in a form such as 1.75e+09, which ParseFloat
// reads.
func scalar(value any) string {
	if value == nil {
		return ""
	}
	return strings.TrimSpace(fmt.Sprint(value))
}

// parseTime reads seconds since the epoch, or a date in one of dateLayouts.
func parseTime(text string) (time.Time, error) {
	if sinceEpoch, err := parseSeconds(text); err == nil {
		return time.Unix(0, 0).Add(sinceEpoch), nil
	}
	for _, layout := range dateLayouts {
		if t, err := time.Parse(layout, text); err == nil {
			return t, nil
		}
	}
	return time.Time{}, errors.New("not in a form known here")
}

// dateLayouts are the dates that have been seen as expires_on: from App
// Service since 2024 (Azure/azure-sdk-for-net#46714), and from the protocol
// of 2017 on Linux and on Windows. One without a zone is in UTC.
var dateLayouts = []string{
	time.RFC3339,
	"2006-01-02 15:04:05",
	"1/2/2006 15:04:05",
	"1/2/2006 15:04:05 -07:00",
	"1/2/2006 3:04:05 PM -07:00",
}

// parseSeconds reads a number of seconds. A Duration ends after 292 years, or
// 9.2e9 seconds.
func parseSeconds(text string) (time.Duration, error) {
	seconds, err := strconv.ParseFloat(text, 64)
	if err != nil || math.IsNaN(seconds) || seconds < 0 || seconds > 9e9 {
		return 0, errors.New("not a number of seconds")
	}
	return time.Duration(seconds * float64(time.Second)), nil
}

// The steps of a round trip in which it may fail.
const (
	stepDNS         = "DNS lookup failed"
	stepConnect     = "connection failed"
	stepCertificate = "certificate not trusted"
	stepExchange    = "connection broke"
)

// explainFailure says in which step a round trip failed, and why. It knows the
// types of error that tell of names, addresses, system calls and certificates.
// No other error's text is shown, since net/http quotes an answer that is not
// HTTP in some of its errors, and a token may be in there. One error may wrap
// another; the case that says more comes first. An OpError has "proxyconnect" as
// its Op if HTTPS_PROXY could not be reached.
func explainFailure(err error) (step, reason string) {
	var (
		dns         *net.DNSError
		refused     proxyRefusal
		certificate *tls.CertificateVerificationError
		noTLS       tls.RecordHeaderError
		operation   *net.OpError
		timeout     net.Error
	)
	switch {
	case errors.As(err, &dns):
		return stepDNS, dns.Name + ": " + dns.Err
	case errors.As(err, &refused):
		return stepConnect, refused.Error()
	case errors.As(err, &certificate):
		return stepCertificate, certificate.Err.Error()
	case errors.As(err, &noTLS):
		return stepExchange, "the answer is not TLS"
	case errors.As(err, &operation) && (operation.Op == "dial" || operation.Op == "proxyconnect"):
		return stepConnect, operation.Error()
	case errors.As(err, &operation): // a read or write, or an alert of TLS
		return stepExchange, operation.Error()
	case errors.As(err, &timeout) && timeout.Timeout():
		return stepExchange, "timed out"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return stepExchange, "the connection ended"
	case errors.Is(err, context.Canceled):
		return stepExchange, "cancelled"
	}
	return stepExchange, "the connection ended, or the answer is not HTTP"
}

// proxyRefusal is the status other than 200 with which HTTPS_PROXY answered
// to CONNECT.
type proxyRefusal int

func (status proxyRefusal) Error() string {
	return "HTTPS_PROXY answered " + statusText(int(status))
}

// checkConnect is for a transport's OnProxyConnectResponse. The transport's own
// error would not say that it was the proxy that refused.
func checkConnect(_ context.Context, _ *url.URL, _ *http.Request, resp *http.Response) error {
	if resp.StatusCode != http.StatusOK {
		return proxyRefusal(resp.StatusCode)
	}
	return nil
}

// statusText is a status for the log, in Go's words and not in the peer's.
func statusText(code int) string {
	return strings.TrimSpace(strconv.Itoa(code) + " " + http.StatusText(code))
}

// How much is shown of what comes from outside, in bytes.
const (
	maxPiece = 500  // of one text
	maxLine  = 4000 // of a line, which may hold several
)

// secrets are what the program must not show: the key of its clients, what it
// proves its identity with, and the token.
type secrets struct {
	mu     sync.RWMutex // protects values
	values []secret     // one of each kind, the longest first
}

type secret struct{ kind, value string }

// hide makes value the secret of its kind, in the place of an earlier one, so
// that old tokens do not pile up. The longest is first: if another is a part of
// it, it is redacted whole all the same.
func (s *secrets) hide(kind, value string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.values = slices.DeleteFunc(s.values, func(v secret) bool { return v.kind == kind })
	if value != "" {
		s.values = append(s.values, secret{kind, value})
	}
	slices.SortFunc(s.values, func(a, b secret) int { return len(b.value) - len(a.value) })
}

// safe makes a text fit to be shown. Whatever comes from the upstream, the
// identity endpoint or a client passes here before it gets into the log, the
// output of -check or an answer of the proxy's own. It is cut last, because redact
// could not find the half of a secret that a cut leaves.
func (s *secrets) safe(text string, limit int) string {
	text = printable(s.redact(text))
	if len(text) <= limit {
		return text
	}
	return strings.ToValidUTF8(text[:limit], "") + "…"
}

// A token may be repeated to us in part, or after it was replaced. So a word
// of its characters is taken for a part of one if it contains the first 16
// bytes of a secret, or is longer than 100 bytes. Other words of that length are
// redacted too, which does no harm.
const (
	secretStart = 16
	longestWord = 100
)

// redact takes secrets, and words that may be a part of one, out of a text.
func (s *secrets) redact(text string) string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, secret := range s.values {
		text = strings.ReplaceAll(text, secret.value, "REDACTED")
	}
	words := strings.FieldsFunc(text, func(r rune) bool {
		return !strings.ContainsRune(tokenCharacters, r)
	})
	words = slices.DeleteFunc(words, func(word string) bool { return !s.mayBePart(word) })
	// The longest is first, as a shorter one may be a part of it.
	slices.SortFunc(words, func(a, b string) int { return len(b) - len(a) })
	for _, word := range words {
		text = strings.ReplaceAll(text, word, "REDACTED")
	}
	return text
}

// tokenCharacters are those of base64url, of which a JWT is made, and of RFC
// 6750's b64token. The slash is left out, as it separates words in a path.
const tokenCharacters = letters + digits + "._~+=-"

// mayBePart tells whether a word may be a part of a token. The caller holds
// s.mu.
func (s *secrets) mayBePart(word string) bool {
	containsStart := func(secret secret) bool {
		start := secret.value[:min(secretStart, len(secret.value))]
		return len(start) == secretStart && strings.Contains(word, start)
	}
	return len(word) > longestWord || slices.ContainsFunc(s.values, containsStart)
}

// printable is s with a space in the place of whatever could forge a line of
// the log, or hide in one.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if strconv.IsPrint(r) {
			return r
		}
		return ' '
	}, s)
}

// isPrintableASCII tells whether a header can carry s.
func isPrintableASCII(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' })
}

// hasHost tells whether a URL has a host and, if any, a port that exists.
func hasHost(u *url.URL) bool {
	return u.Hostname() != "" && (u.Port() == "" || isPort(u.Port()))
}

// isPort tells whether s is a number from 0 to 65535.
func isPort(s string) bool {
	_, err := strconv.ParseUint(s, 10, 16)
	return err == nil
}

// isLoopback tells whether a host, without a port, is localhost or a loopback
// address. The name may be in upper case (RFC 3986 §3.2.2) and have the final
// dot of an absolute one (RFC 1034 §3.1); an address may not.
func isLoopback(host string) bool {
	name := strings.ToLower(strings.TrimSuffix(host, "."))
	return name == "localhost" || net.ParseIP(host).IsLoopback()
}

// isDebug tells whether the log is to have lines for debugging.
func isDebug(getenv func(string) string) bool {
	return strings.EqualFold(getenv("AZURE_LOG_LEVEL"), "debug")
}

// Characters for consistsOf.
const (
	letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	digits  = "0123456789"
)

// consistsOf tells whether s has only these characters, and at least one. Trim
// takes them off both ends until it meets another.
func consistsOf(s, characters string) bool {
	return s != "" && strings.Trim(s, characters) == ""
}
