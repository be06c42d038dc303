package main

// This file is one request's way through the proxy: who may send it, where it
// goes, what of it goes upstream, how the answer comes back, and what is said
// when something goes wrong.

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"
)

// forwardedHeaders are the request headers that go upstream, beside those with
// one of forwardedPrefixes. All others stay here: credentials, cookies, Origin
// and Referer, what tells of the client's network, and what could make a front
// end route the request elsewhere.
var forwardedHeaders = names(
	// What HTTP itself and every API use.
	"Accept Accept-Encoding Accept-Language Content-Type Content-Encoding",
	"Range If-Range User-Agent",

	// Correlation, which the service's support asks for (W3C Trace Context,
	// "Azure OpenAI monitoring").
	"Traceparent Tracestate X-Request-Id X-Client-Request-Id X-Ms-Useragent",
	"X-Ms-Client-Request-Id X-Ms-Return-Client-Request-Id",

	// What codex says of itself and of its session, in old and new spelling
	// (its source, codex-rs). Its attestation, which proves to OpenAI that it
	// is a genuine codex, is no credential: the service may want to see it, as
	// it would directly.
	"Originator Version Session_id Session-Id Conversation_id Conversation-Id",
	"Thread_id Thread-Id X-Oai-Attestation X-Responsesapi-Include-Timing-Metrics",

	// Options of a single request, which the service checks: whether parameters
	// that it does not know are refused, dropped or passed to the model
	// (Foundry Models REST reference), which deployment answers or makes
	// images, which of the content filters that the resource's owner has made
	// is used, evaluations and previews.
	"Extra-Parameters Azureml-Model-Deployment X-Ms-Oai-Image-Generation-Deployment",
	"X-Policy-Id Aoai-Evals Foundry-Features X-Ms-Enable-Preview",

	// For which end user a middle tier calls a hosted agent. Without it the
	// service would take all of them for one. It demands a permission of its own.
	"X-Ms-User-Identity",

	// After which event a broken stream goes on (MCP, "Streamable HTTP").
	"Last-Event-Id",
)

// forwardedPrefixes begin the headers that the service and its SDKs define, and
// MCP, which Foundry's toolboxes speak. X-Ms- is not one of them: App Service
// and other front ends of Azure put the signed-in user's tokens and address
// under it.
var forwardedPrefixes = []string{"Anthropic-", "Mcp-", "Openai-", "X-Codex-", "X-Openai-",
	"X-Stainless-"}

// credentialWords are parts of a name, in lower case, that keep a header here
// in spite of its prefix.
var credentialWords = []string{"auth", "cookie", "key", "token"}

// webSocketHeaders go upstream with an upgrade (RFC 6455 §4.1). So does
// Sec-WebSocket-Protocol, without the key that may be in it.
var webSocketHeaders = names("Sec-Websocket-Key Sec-Websocket-Version Sec-Websocket-Extensions")

// keyProtocol precedes a key among the subprotocols of a WebSocket. openai-node
// puts it there, as a browser's WebSocket cannot set headers.
const keyProtocol = "openai-insecure-api-key."

// hopByHop are headers of one connection, which a proxy does not pass on (RFC
// 9110 §7.6.1). Proxy-Connection is from before that rule, and still sent.
var hopByHop = names("Connection Keep-Alive Proxy-Authenticate Proxy-Authorization",
	"Proxy-Connection Te Trailer Transfer-Encoding Upgrade")

// othersPolicies are answer headers that are right for the upstream's host and
// wrong for this one. Strict-Transport-Security must not be sent over plain
// HTTP (RFC 6797 §7.2), Alt-Svc would lead the client past the proxy with all
// that it sends (RFC 7838 §2), and a cookie would not get upstream again.
// Location and Operation-Location stay, as some clients need them. One that
// follows them goes past the proxy, and so without a token. The service refuses
// it, and may see its EXPECTED_KEY, which opens nothing there.
var othersPolicies = names("Alt-Svc Set-Cookie Strict-Transport-Security")

// credentialParams are query parameters that carry a key or a token, in lower
// case: of Azure and its look-alikes, of older openai-node, of RFC 6750 §2.3,
// of API Management and of Google's clients.
var credentialParams = names("api-key x-api-key api_key apikey key authorization access_token",
	"subscription-key ocp-apim-subscription-key")

// names makes a set of the names in some lines.
func names(lines ...string) map[string]bool {
	set := make(map[string]bool)
	for _, name := range strings.Fields(strings.Join(lines, " ")) {
		set[name] = true
	}
	return set
}

// forwarder sends requests to the upstream, with a token in the place of the
// client's credentials.
type forwarder struct {
	target    *target
	key       string // what clients must present; empty for nothing
	tokens    *tokenSource
	debug     bool // AZURE_LOG_LEVEL=debug
	transport *http.Transport
	endTime   time.Duration // for one direction of a tunnel to end after the other
	streams   atomic.Int64  // requests and tunnels under way; the log calls both streams
}

func newForwarder(cfg *config, tokens *tokenSource) *forwarder {
	return &forwarder{
		target:  cfg.target,
		key:     cfg.key,
		tokens:  tokens,
		debug:   cfg.debug,
		endTime: time.Minute,
		transport: &http.Transport{
			Proxy:               proxy,
			DialContext:         (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
			TLSHandshakeTimeout: 10 * time.Second,
			TLSClientConfig: &tls.Config{
				MinVersion: tls.VersionTLS12,
				// A new connection resumes the session of an older one, which
				// spares both sides a full handshake.
				ClientSessionCache: tls.NewLRUClientSessionCache(0), // of the default size
			},
			// HTTP/1.1 only: each stream has a connection to itself, where a
			// lost packet cannot stop the others. An empty map switches HTTP/2
			// off.
			TLSNextProto:           map[string]func(string, *tls.Conn) http.RoundTripper{},
			MaxIdleConnsPerHost:    1024,             // there is one host
			IdleConnTimeout:        60 * time.Second, // load balancers of Azure: 4 minutes
			ResponseHeaderTimeout:  0,                // a model may think for hours
			ExpectContinueTimeout:  0,                // Expect is not forwarded
			DisableCompression:     true,             // an answer passes as it is
			MaxResponseHeaderBytes: 1 << 20,
			WriteBufferSize:        8 << 10, // a head with a token leaves in one write
		},
	}
}

// ServeHTTP takes one request to the upstream, and its answer back.
func (f *forwarder) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.streams.Add(1)
	defer f.streams.Add(-1)
	start := time.Now()
	logger.Printf("%s from %s", f.shown(r.Method+" ", r.RequestURI), r.RemoteAddr)
	body := newRequestBody(w, r)

	// Check the caller.
	if refusal := f.checkCaller(r); refusal != nil {
		logger.Printf("answered %d to %s: %s", refusal.status, r.RemoteAddr, refusal.message)
		refusal.write(w, body)
		return
	}

	// Build the upstream request, get a token for it, and send it.
	req := f.upstreamRequest(r, body)
	fail := func(e *apiError) {
		if r.Context().Err() != nil {
			e = errLeft
		}
		f.logUpstream(req, start, e.Error())
		e.write(w, body)
	}
	t, failure := f.tokens.await(r.Context())
	if failure != nil {
		fail(f.noToken(failure))
		return
	}
	req.Header.Set("Authorization", t.authorization)
	resp, err := roundTrip(f.transport, req)
	if err != nil {
		e := f.noAnswer(err)
		if body.broken.Load() {
			e = errBody
		}
		fail(e)
		return
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusSwitchingProtocols {
		f.tunnel(w, r, resp)
		return
	}

	// Copy the answer.
	copyHeader(w.Header(), resp.Header)
	body.announceEnd(w.Header())
	w.WriteHeader(resp.StatusCode)
	answer := &answerWriter{client: w, isRefusal: resp.StatusCode >= 400}
	err = answer.copyFrom(resp)

	// Tell what went wrong, and end.
	if resp.StatusCode == http.StatusUnauthorized {
		f.tokens.rejected(t)
	}
	if answer.isRefusal || f.debug {
		f.logUpstream(req, start, withHint(f.explain(req, resp, answer.beginning, t)))
	}
	if err == nil {
		body.end(lingerTime)
		return
	}
	if answer.err == nil && r.Context().Err() == nil { // it was not the client who left
		f.logUpstream(req, start, "answer cut: "+reason(err))
	}
	// The client's connection is closed without an end to its answer, so that
	// it does not take a part for the whole. To panic so is net/http's way to
	// do that; it is not logged. Before it closes the connection, the server
	// reads what is left of the body, and would wait for a slow client.
	body.end(0)
	panic(http.ErrAbortHandler)
}

// shown is a request target for the log, with a prefix, without credentials and
// cut to maxShown bytes. A client may put the key where it is not looked for,
// so a target that has it, escaped or not, is not shown. What has other than
// plain characters is quoted.
func (f *forwarder) shown(prefix, target string) string {
	path, query, hasQuery := strings.Cut(target, "?")
	if !strings.HasPrefix(path, "/") {
		path = "(no path)" // it may be a URL with a password
	}
	text := prefix + path
	if hasQuery {
		text += "?" + cutCredentials(query)
	}
	if f.key != "" && strings.Contains(text+"\n"+unescape(text)+"\n"+
		unescape(strings.ReplaceAll(text, "+", " ")), f.key) {
		return "(not shown, as EXPECTED_KEY is in it)"
	}
	if quoted := strconv.QuoteToASCII(text); quoted != `"`+text+`"` {
		text = quoted
	}
	return cut(text, maxShown)
}

// unescape decodes the percent-escapes of a text, and leaves wrong ones as they
// are.
func unescape(text string) string {
	return escape.ReplaceAllStringFunc(text, func(e string) string {
		decoded, _ := url.PathUnescape(e)
		return decoded
	})
}

var escape = regexp.MustCompile("%[0-9A-Fa-f]{2}")

// checkCaller tells why a request may not go upstream, or returns nil if it
// may.
func (f *forwarder) checkCaller(r *http.Request) *apiError {
	// The answer to TRACE would repeat the request, and the token with it.
	// TRACK is the same in IIS. CONNECT is for a proxy to other hosts.
	switch strings.ToUpper(r.Method) {
	case http.MethodConnect, http.MethodTrace, "TRACK":
		return errMethod
	}

	// Without a key every program on this host may use the proxy. A web page is
	// no such program, though its browser runs here.
	if f.key == "" && mayBeWebPage(r) {
		return errWebPage
	}
	if f.key != "" && !f.hasKey(r) {
		return errKey
	}
	// A request target that is no path is a URL, or * for OPTIONS.
	if !strings.HasPrefix(r.RequestURI, "/") || !isPlainPath(r.URL.Path) {
		return errPath
	}
	return nil
}

// mayBeWebPage tells whether a browser may have sent the request for a page:
// Host or Origin is not of this host, or Sec-Fetch-Site tells of another site.
func mayBeWebPage(r *http.Request) bool {
	// A page can have its own host name point to a loopback address (DNS
	// rebinding). It is then of the same origin as the proxy, and its GET has
	// neither of the headers below, but that name is in Host. This is asked on
	// loopback alone: elsewhere Host may be any name of this host, and without
	// a key whoever reaches the port may use it, as the log warns.
	host := (&url.URL{Host: r.Host}).Hostname() // without its port
	local, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	if ok && local.IP.IsLoopback() && !isLoopback(host) {
		return true
	}

	// A page of another site shows in Origin, which every browser sends with a
	// POST. It may be "null", which has no host and so is not loopback. An
	// Origin on this host passes here. If it is a page's, Sec-Fetch-Site
	// decides below; a program that is no browser does not send that.
	for _, origin := range r.Header["Origin"] {
		u, err := url.Parse(origin)
		if err != nil || !isLoopback(u.Hostname()) {
			return true
		}
	}

	// The GET of a page, an image's for one, has no Origin, but since 2023
	// every browser sends Sec-Fetch-Site to a loopback host, and to others over
	// TLS alone (W3C "Fetch Metadata Request Headers"). It is "none" if the user
	// has entered the address, and "same-site" for a page from another port of
	// this host, which is refused. An older browser does not send the header,
	// and its pages from this host are not noticed.
	site := r.Header.Get("Sec-Fetch-Site")
	return site != "" && site != "same-origin" && site != "none"
}

// isLoopback tells whether a host, without a port, is localhost or a loopback
// address. The name may be in upper case (RFC 3986 §3.2.2) and have the final
// dot of an absolute one (RFC 1034 §3.1); an address may not.
func isLoopback(host string) bool {
	name := strings.ToLower(strings.TrimSuffix(host, "."))
	return name == "localhost" || net.ParseIP(host).IsLoopback()
}

// hasKey tells whether the request presents the expected key. Hashes are
// compared, so that the time it takes shows neither content nor length.
func (f *forwarder) hasKey(r *http.Request) bool {
	keys := slices.Concat(r.Header["Api-Key"], r.Header["X-Api-Key"],
		r.Header["Ocp-Apim-Subscription-Key"]) // of API Management
	for _, value := range r.Header["Authorization"] {
		if scheme, key, _ := strings.Cut(value, " "); strings.EqualFold(scheme, "Bearer") {
			keys = append(keys, strings.TrimSpace(key))
		}
	}
	if isWebSocket(r) { // a browser's WebSocket cannot set headers
		keys = append(keys, r.URL.Query()["api-key"]...)
		for _, protocol := range listItems(r.Header["Sec-Websocket-Protocol"]) {
			if key, ok := strings.CutPrefix(protocol, keyProtocol); ok {
				keys = append(keys, key)
			}
		}
	}
	expected := sha256.Sum256([]byte(f.key))
	for _, key := range keys {
		presented := sha256.Sum256([]byte(key))
		if subtle.ConstantTimeCompare(presented[:], expected[:]) == 1 {
			return true
		}
	}
	return false
}

// isPlainPath tells whether a path, decoded once, means the same to every
// server. Dot segments would lead out of the API, to others of the resource
// that take the same token. A percent sign that is left would be decoded again
// by some, and what is no UTF-8 can be a dot or a slash in an overlong form.
func isPlainPath(path string) bool {
	return utf8.ValidString(path) && !strings.Contains(path, "%") && !dotSegment.MatchString(path)
}

// dotSegment is a . or .. as a segment of its own. Some server or other ends a
// segment at each of these: a slash, a back-slash, a semicolon, ? and #, white
// space (\s, and \pZ for Unicode's) and control characters (\p{Cc}).
var dotSegment = regexp.MustCompile(`(^|` + segmentEnd + `)\.\.?(` + segmentEnd + `|$)`)

const segmentEnd = `[/\\;?#\s\pZ\p{Cc}]`

// isWebSocket tells whether the client asks for a WebSocket (RFC 6455 §4.1).
// Other upgrades are not forwarded, since what follows them, requests in HTTP/2
// for example, could not be checked. Nor is one with a body, which the
// transport and the tunnel would both read.
func isWebSocket(r *http.Request) bool {
	isUpgrade := func(item string) bool { return strings.EqualFold(item, "upgrade") }
	return r.Method == http.MethodGet && r.ProtoAtLeast(1, 1) && r.ContentLength == 0 &&
		strings.EqualFold(r.Header.Get("Upgrade"), "websocket") &&
		slices.ContainsFunc(listItems(r.Header["Connection"]), isUpgrade)
}

// listItems are the items of a header whose values are comma-separated lists of
// tokens (RFC 9110 §5.6.2), in which there is no white space.
func listItems(values []string) []string {
	return strings.Fields(strings.ReplaceAll(strings.Join(values, ","), ",", " "))
}

// target is the resource that TARGET_URL names.
type target struct {
	base *url.URL // as it is used: "https://my-aoai.openai.azure.com/openai/"
	root string   // what its APIs are below: "/"; empty if that is not known
}

// rootPath finds the root in a path: the whole path of a Foundry project, or what
// precedes an API.
var rootPath = regexp.MustCompile("^(.*/api/projects/[^/]+/)$|^(/|/.*/)(openai|anthropic)/(v1/)?$")

const wantTarget = "want a base URL such as https://my-aoai.openai.azure.com/openai/ " +
	"(one is enough for both of its APIs)"

// parseTarget parses TARGET_URL. A value that is refused may hold a key, in a
// query for one, so the errors show no more of it than scheme and host. One
// that is accepted has no such part, and is logged.
func parseTarget(value string) (*target, error) {
	u, err := url.Parse(value)
	switch {
	case value == "":
		return nil, errors.New("not set, and no .env file is read (make run does that, " +
			"or set -a; . ./.env; set +a in a shell); " + wantTarget)
	case err != nil || u.Hostname() == "" || u.Scheme != "http" && u.Scheme != "https",
		u.User != nil || u.RawQuery != "" || u.Fragment != "",
		strings.Contains(value, " ") || !isPlainPath(u.Path):
		return nil, errors.New(wantTarget + ", without user name, query, fragment, spaces, " +
			"dot segments and escapes of escapes")
	case u.Scheme == "http" && !isLoopback(u.Hostname()):
		return nil, fmt.Errorf("http://%s would send the token over a network in the clear; "+
			"want https, or http for localhost only", u.Host)
	}
	// Without a path of its own, all that is on the host could be reached.
	path := "/" + cmp.Or(strings.Trim(u.EscapedPath(), "/"), "openai") + "/"
	t := &target{}
	t.base, err = url.Parse(u.Scheme + "://" + u.Host + path)
	if parts := rootPath.FindStringSubmatch(path); parts != nil {
		t.root = parts[1] + parts[2] // one of them is empty
	}
	return t, err
}

// defaultScope is the scope of the tokens that the resource wants, in the cloud
// of its host: my-aoai.openai.azure.us is in that of the US government.
func (t *target) defaultScope() string {
	if strings.Contains(t.base.Path, "/api/projects/") {
		return "https://ai.azure.com/.default"
	}
	host := strings.ToLower(strings.TrimSuffix(t.base.Hostname(), "."))
	_, cloud, _ := strings.Cut(host, ".azure.")
	if cloud != "us" && cloud != "cn" {
		cloud = "com"
	}
	return "https://cognitiveservices.azure." + cloud + "/.default"
}

// baseSegments are what clients put before a call, in their base URLs and by
// themselves. The empty one is between two slashes.
var baseSegments = map[string]bool{"": true, "openai": true, "anthropic": true, "v1": true}

// splitPath takes the base segments off a request's path. The rest is the call:
// "/openai/v1/files/f-1" is "openai" and "v1", and the call "files/f-1".
func splitPath(path string) (base []string, call string) {
	segments := strings.Split(path, "/")
	n := 0
	for n < len(segments) && baseSegments[segments[n]] {
		n++
	}
	return segments[:n], strings.Join(segments[n:], "/")
}

// operations begin the calls of OpenAI's v1 API. Claude's API has files and
// models, too.
var operations = names("audio batches chat completions containers conversations embeddings",
	"evals files fine_tuning images models realtime responses uploads vector_stores videos")

// dated is a query with an api-version that is a date, and not preview or v1.
var dated = regexp.MustCompile("(^|&)api-version=[0-9]")

// upstreamURL is where a request goes. That depends on its call, and hardly on
// the base URL that the client was given, so that any of those is right. BASE
// is TARGET_URL's path, and ROOT what precedes the API in it, or a project's
// whole path. The first row that fits counts:
//
//	API       condition                                goes to
//	Claude's                                           ROOT anthropic/v1/ CALL
//	OpenAI's  the call is deployments                  ROOT openai/ CALL
//	OpenAI's  dated, and no base segment is v1         ROOT openai/ CALL
//	OpenAI's  dated, and the call is an operation      ROOT openai/ CALL
//	OpenAI's  a base segment is v1                     ROOT openai/v1/ CALL
//	OpenAI's  the call is an operation                 ROOT openai/v1/ CALL
//	OpenAI's  a base segment is openai                 ROOT openai/ CALL
//	OpenAI's  none of these                            BASE CALL
//
// The v1 API has no dates. So a v1 in the base URL of a client that sends one
// is dropped, but only before what is known as an operation: the service has
// /openai/v1/video/generations/jobs?api-version=2025-04-01-preview.
//
// Where TARGET_URL has no root, the request's path follows it as it is. Below a
// Foundry project only the v1 API's operations do not, and go to openai/v1/.
// Agents and toolboxes, for example, are of the project's own API. Both have
// files, but the project's own API demands an api-version, and the v1 API has
// none (Foundry REST reference, API versioning): without a base segment v1, a
// call with one is taken for the project's own.
func (t *target) upstreamURL(requestURI string, h http.Header) *url.URL {
	path, query, hasQuery := strings.Cut(requestURI, "?")
	segments, call := splitPath(path)
	first, _, _ := strings.Cut(call, "/")
	isDated, hasV1 := dated.MatchString(query), slices.Contains(segments, "v1")
	before := t.base.EscapedPath()
	isProject := before == t.root
	switch {
	case t.root == "", isProject && !operations[first],
		isProject && !hasV1 && strings.Contains(query, "api-version="):
		call = strings.TrimLeft(path, "/")
	case isProject:
		before += "openai/v1/"
	case isClaudes(segments, first, h):
		before = t.root + "anthropic/v1/"
	case first == "deployments", isDated && !hasV1, isDated && operations[first]:
		before = t.root + "openai/"
	case hasV1, operations[first]:
		before = t.root + "openai/v1/"
	case slices.Contains(segments, "openai"):
		before = t.root + "openai/"
	}
	return &url.URL{
		Scheme:     t.base.Scheme,
		Host:       t.base.Host,
		Opaque:     before + call, // sent as it is, as it begins with one slash
		RawQuery:   cutCredentials(query),
		ForceQuery: hasQuery && query == "",
	}
}

// isClaudes tells whether a request is for Claude's API: by the first segment
// of its call, else by the last API that a base segment names, else by the
// header Anthropic-Version, which Claude's API demands.
func isClaudes(segments []string, first string, h http.Header) bool {
	switch {
	case first == "messages":
		return true
	case first == "deployments", operations[first] && first != "files" && first != "models":
		return false
	}
	is := h["Anthropic-Version"] != nil
	for _, segment := range segments {
		if segment == "openai" || segment == "anthropic" {
			is = segment == "anthropic"
		}
	}
	return is
}

// cutCredentials takes the credentials out of a query, and leaves the rest as
// it is, byte for byte.
func cutCredentials(query string) string {
	isCredential := func(param string) bool {
		name, _, _ := strings.Cut(param, "=")
		return credentialParams[strings.ToLower(unescape(name))]
	}
	return strings.Join(slices.DeleteFunc(strings.Split(query, "&"), isCredential), "&")
}

// upstreamRequest is r as it goes upstream, except for the token. Only what the
// lists above name is copied of its header, and the transport frames the body
// anew, so no second request can be hidden in it.
func (f *forwarder) upstreamRequest(r *http.Request, body *requestBody) *http.Request {
	req := &http.Request{
		Method:        r.Method,
		URL:           f.target.upstreamURL(r.RequestURI, r.Header),
		Header:        upstreamHeader(r),
		ContentLength: r.ContentLength,
	}
	if r.ContentLength != 0 {
		req.Body, req.GetBody = body, body.again
	}
	return req.WithContext(r.Context())
}

// upstreamHeader is the header of a request as it goes upstream.
func upstreamHeader(r *http.Request) http.Header {
	upgrade := isWebSocket(r)
	out := make(http.Header, len(r.Header))
	for name, values := range r.Header {
		if isForwarded(name) || upgrade && webSocketHeaders[name] {
			out[name] = values
		}
	}
	for _, name := range listItems(r.Header["Connection"]) {
		out.Del(name) // the client has declared it hop-by-hop
	}
	if out["User-Agent"] == nil {
		out.Set("User-Agent", "") // this keeps the transport from sending its own
	}
	if upgrade {
		out.Set("Connection", "Upgrade")
		out.Set("Upgrade", "websocket")
		// What resembles a key in any way is left out, and not only what hasKey
		// takes for one.
		holdsKey := func(item string) bool {
			return strings.Contains(strings.ToLower(item), keyProtocol)
		}
		protocols := slices.DeleteFunc(listItems(r.Header["Sec-Websocket-Protocol"]), holdsKey)
		if len(protocols) > 0 {
			out.Set("Sec-Websocket-Protocol", strings.Join(protocols, ", "))
		}
	}
	return out
}

// isForwarded tells whether a request header goes upstream.
func isForwarded(name string) bool {
	if forwardedHeaders[name] {
		return true
	}
	hasPrefix := func(prefix string) bool { return strings.HasPrefix(name, prefix) }
	lower := strings.ToLower(name)
	hasWord := func(word string) bool { return strings.Contains(lower, word) }
	return slices.ContainsFunc(forwardedPrefixes, hasPrefix) &&
		!slices.ContainsFunc(credentialWords, hasWord)
}

// requestBody is a request's body on its way upstream. It is streamed: the
// transport reads it, in a goroutine of its own, and may go on with that while
// ServeHTTP copies the answer. So what both look at is atomic.
type requestBody struct {
	from    io.ReadCloser // the server's body
	client  *http.ResponseController
	begun   atomic.Bool // Read has been called
	ended   atomic.Bool // it was read to its end, so another request may follow
	broken  atomic.Bool // the client did not send it whole
	dropped atomic.Bool // end has been called: what is left goes nowhere
}

// newRequestBody makes a request's body ready to be streamed. The server of
// net/http expects a handler to read first and then to write. Before the first
// byte of an answer it would itself read what is left of the body, and wait for
// it, unless full duplex is enabled (golang/go#15527, #40747).
func newRequestBody(w http.ResponseWriter, r *http.Request) *requestBody {
	b := &requestBody{from: r.Body, client: http.NewResponseController(w)}
	if r.ContentLength == 0 {
		b.ended.Store(true)
	} else {
		b.client.EnableFullDuplex()
	}
	return b
}

// Read is called by the transport.
func (b *requestBody) Read(p []byte) (int, error) {
	b.begun.Store(true)
	n, err := b.from.Read(p)
	if b.dropped.Load() {
		// Now end reads it, too, and has some of it. (The server's body has a
		// lock for that.) An error keeps the request from looking complete to
		// the upstream.
		return 0, errors.New("the answer is over")
	}
	if err == io.EOF {
		b.ended.Store(true)
	} else if err != nil {
		b.broken.Store(true)
	}
	return n, err
}

// Close is called by the transport when it needs no more of the body. It leaves
// the server's body open, as closing that would read what is left of it. So end
// decides what is done with the rest.
func (b *requestBody) Close() error { return nil }

// again is the request's GetBody. The transport asks for the body again, to
// send the request over another connection, if an idle one turns out to be
// dead. If that is found out while the head is written, nothing of the body has
// been read (the head is flushed first: FlushHeaders in net/http's
// transfer.go), and the body is still whole.
func (b *requestBody) again() (io.ReadCloser, error) {
	if b.begun.Load() {
		return nil, errors.New("the connection broke off, with a part of the body sent")
	}
	return b, nil
}

// announceEnd tells the client that its connection ends with this answer, if
// the body has not been read to its end. The next request would begin there.
func (b *requestBody) announceEnd(h http.Header) {
	if !b.ended.Load() {
		h.Set("Connection", "close")
	}
}

// lingerTime is how long a client may go on sending after its answer.
const lingerTime = time.Second

// end is called after the last byte of an answer. A client that is still
// sending its request when its connection is closed gets a reset, and with it
// may lose the answer. So the rest of the request is read and dropped, up to
// its end or for the given time.
//
// The server does this too, after the handler, but not in two cases. If the
// client sent Expect or Connection: close, it drops nothing. And if the
// transport is reading just then, it ends that read by abortPendingRead
// (net/http's server.go), which takes any deadline away: a client that sends
// nothing more would keep its connection for good. With the body closed here,
// nothing is left for it to do, except to send the end of a chunked answer.
//
// The deadline comes after the answer, as an upload may run beside that. The
// transport may go on reading, which does no harm: the upstream has answered,
// and its connection, which has not got the whole request, is not used again.
func (b *requestBody) end(within time.Duration) {
	b.client.Flush()
	if b.ended.Load() {
		return
	}
	b.dropped.Store(true)
	b.client.SetReadDeadline(time.Now().Add(within))
	io.Copy(io.Discard, b.from)
	b.from.Close()
}

// roundTrip sends a request to the upstream or to an identity endpoint. A 1xx is
// no answer; the transport deals with all of them but 101. After the 101 that a
// WebSocket asked for, the body is the connection, and can be written to. Any
// other is an error: reading its body would not end with the request's context.
func roundTrip(transport *http.Transport, req *http.Request) (*http.Response, error) {
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	_, canWrite := resp.Body.(io.Writer)
	isWanted := canWrite && req.Header.Get("Upgrade") != "" &&
		strings.EqualFold(resp.Header.Get("Upgrade"), "websocket")
	if resp.StatusCode < 200 && !isWanted {
		resp.Body.Close()
		return nil, fmt.Errorf("unexpected status %d", resp.StatusCode)
	}
	return resp, nil
}

// copyHeader sets an answer's header, without what is about the upstream's
// connection or host.
func copyHeader(h, upstream http.Header) {
	for _, name := range listItems(upstream["Connection"]) {
		upstream.Del(name)
	}
	for name, values := range upstream {
		if !hopByHop[name] && !othersPolicies[name] {
			h[name] = values
		}
	}
	if h["Content-Type"] == nil {
		h["Content-Type"] = nil // this keeps the server from guessing one
	}
	if isEventStream(h) && h["X-Accel-Buffering"] == nil {
		h.Set("X-Accel-Buffering", "no") // an nginx in front holds events back by default
	}
}

// isEventStream tells whether an answer has server-sent events.
func isEventStream(h http.Header) bool {
	return strings.HasPrefix(h.Get("Content-Type"), "text/event-stream")
}

// answerWriter passes an answer's body on to the client, and flushes each
// write.
type answerWriter struct {
	client    http.ResponseWriter
	err       error  // of the client
	isRefusal bool   // its beginning is kept
	beginning []byte // to be explained
}

func (a *answerWriter) Write(p []byte) (n int, err error) {
	if a.isRefusal && len(a.beginning) < maxBeginning {
		a.beginning = append(a.beginning, p...)
	}
	n, a.err = a.client.Write(p)
	if a.err == nil {
		a.err = http.NewResponseController(a.client).Flush()
	}
	return n, a.err
}

// copyFrom copies the whole of an answer's body.
func (a *answerWriter) copyFrom(resp *http.Response) error {
	size := int64(32 << 10)
	switch {
	case isEventStream(resp.Header):
		// An event has some hundred bytes, and thousands of streams may be open
		// for minutes. All else is over soon.
		size = 4 << 10
	case resp.ContentLength > 0:
		size = min(size, resp.ContentLength)
	}
	if resp.ContentLength < 0 {
		a.Write(nil) // the head goes out before the first event
	}
	_, err := io.CopyBuffer(a, resp.Body, make([]byte, size))
	return err
}

// tunnel copies bytes between the client and the upstream, after its 101. Each
// direction is copied to its own end, and that end is passed on: a peer that
// has sent all it has may still wait for the rest of what the other sends.
// roundTrip has seen that resp.Body is a connection.
func (f *forwarder) tunnel(w http.ResponseWriter, r *http.Request, resp *http.Response) {
	copyHeader(w.Header(), resp.Header)
	w.Header().Set("Connection", "Upgrade")
	w.Header().Set("Upgrade", "websocket")
	w.WriteHeader(http.StatusSwitchingProtocols)
	client, buffered, err := http.NewResponseController(w).Hijack() // this sends the 101
	if err != nil {
		return
	}
	upstream := resp.Body.(io.ReadWriteCloser)
	closeBoth := func() {
		client.Close()
		upstream.Close()
	}
	defer closeBoth()
	stop := context.AfterFunc(r.Context(), closeBoth) // at the end of a drain
	defer stop()

	// The server's buffer may hold the first bytes of the client. The rest is
	// read from the connection itself: if it were read through the buffer, the
	// end of the client's half would end r.Context(), as it does for a request
	// (connReader in net/http's server.go), and with it the tunnel's other
	// direction.
	first := io.LimitReader(buffered, int64(buffered.Reader.Buffered()))
	ended := make(chan bool, 2)
	pass := func(dst io.Writer, src io.Reader) {
		io.Copy(dst, src)
		// Nothing more is sent to dst, but it can still be read. The upstream's
		// connection offers that if the program was built with Go 1.24 or
		// newer. If not, the upstream hears of the client's end after
		// f.endTime.
		if half, ok := dst.(interface{ CloseWrite() error }); ok {
			half.CloseWrite()
		}
		ended <- true
	}
	go pass(upstream, io.MultiReader(first, client))
	go pass(client, upstream)
	<-ended

	// The other direction has some time to end, as a Close frame is answered
	// (RFC 6455 §7.1.1). But a peer that has vanished looks like one that is
	// waiting, so the time is limited.
	timer := time.AfterFunc(f.endTime, closeBoth)
	defer timer.Stop()
	<-ended
	// If it was the upstream that broke off, the client may still be sending,
	// as in requestBody.end.
	client.SetReadDeadline(time.Now().Add(lingerTime))
	io.Copy(io.Discard, client)
}

// apiError is an answer of the proxy's own, in the form of OpenAI's errors.
type apiError struct {
	status  int
	code    string // "invalid_api_key"
	message string
	hint    string    // what to do about it; empty if the message says so
	header  [2]string // that goes with it: "Retry-After", "10"
	lasting bool      // another try would hardly heal it; so for every 4xx
}

func (e *apiError) Error() string { return withHint(e.message, e.hint) }

var (
	errMethod = &apiError{status: 405, code: "method_not_allowed",
		message: "CONNECT, TRACE and TRACK are not forwarded",
		// A must, as that of a 401 (RFC 9110 §15.5.6 and §15.5.2).
		header: [2]string{"Allow", "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"}}
	errWebPage = &apiError{status: 403, code: "foreign_web_page",
		message: "Host, Origin or Sec-Fetch-Site is that of a web page: " +
			"call http://localhost or 127.0.0.1 from a program, or set EXPECTED_KEY"}
	errKey = &apiError{status: 401, code: "invalid_api_key",
		message: "wrong or missing key: " +
			"send the proxy's EXPECTED_KEY as api-key, x-api-key or Authorization: Bearer",
		header: [2]string{"WWW-Authenticate", "Bearer"}}
	errPath = &apiError{status: 400, code: "invalid_path",
		message: "the request target must be a path in UTF-8, without . or .. segments " +
			"and without escapes of escapes such as %252e"}
	// errBody is for a body whose end did not come. Either the client is gone
	// and reads no answer, or its chunks are malformed: net/http has no error
	// of its own for each.
	errBody = &apiError{status: 400, code: "invalid_body",
		message: "the request's body broke off or is malformed"}
	// errLeft is for a client that has closed its connection, or its half of
	// it, and hardly reads this. The end of a drain cancels a request likewise.
	errLeft = &apiError{status: 503, code: "cancelled",
		message: "client left, or the proxy stopped"}
)

// noToken is the answer to a request for which there is no token. It says why,
// as the client has shown the key, or may use the proxy without one.
func (f *forwarder) noToken(failure *fetchError) *apiError {
	pause := max(1, math.Ceil(failure.next.Sub(f.tokens.now()).Seconds()))
	return &apiError{status: 503, code: "no_token",
		message: "no token: " + failure.text, hint: failure.hint, lasting: failure.lasting,
		header: [2]string{"Retry-After", fmt.Sprint(pause)}}
}

// noAnswer is the answer when the upstream gives none.
func (f *forwarder) noAnswer(err error) *apiError {
	to := f.target.base
	message := "no answer from " + to.Host + byWay(to) + ": " + reason(err)
	return &apiError{status: 502, code: "upstream_unreachable",
		message: message, hint: hintFor(noAnswerCauses, 0, message)}
}

// reason says why a round trip failed, in Go's words, without what they quote
// of the peer's.
func reason(err error) string {
	text, _, _ := strings.Cut(err.Error(), `"`)
	if strings.Contains(text, "malformed") {
		return "the answer is not HTTP"
	}
	return cut(text, maxShown)
}

// write answers with the error. The body of the request is dropped.
func (e *apiError) write(w http.ResponseWriter, body *requestBody) {
	kind := "invalid_request_error"
	if e.status >= 500 {
		kind = "server_error"
	}
	message, _ := json.Marshal(e.Error())
	text := fmt.Sprintf(`{"error":{"message":%s,"type":%q,"param":null,"code":%q}}`+"\n",
		message, kind, e.code)
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(text)))
	body.announceEnd(h)
	if e.header[0] != "" {
		h.Set(e.header[0], e.header[1])
	}
	// The SDKs of OpenAI and Anthropic heed this header (shouldRetry in
	// client.ts). Without it Claude Code repeats a request that has a wrong key,
	// or for which there is no identity, for minutes, and says nothing
	// meanwhile.
	if e.status < 500 || e.lasting {
		h.Set("X-Should-Retry", "false")
	}
	w.WriteHeader(e.status)
	io.WriteString(w, text)
	body.end(lingerTime)
}

// logUpstream writes a line about an upstream request: how it went wrong, in
// most cases.
func (f *forwarder) logUpstream(req *http.Request, start time.Time, what string) {
	logger.Printf("%s after %v: %s", f.shownUpstream(req),
		time.Since(start).Round(time.Millisecond), what)
}

// shownUpstream is an upstream request for the log.
func (f *forwarder) shownUpstream(req *http.Request) string {
	return f.shown(req.Method+" "+req.URL.Scheme+"://"+req.URL.Host, req.URL.RequestURI())
}

// maxBeginning is how much of a refusal, in bytes, is looked at to explain it.
const maxBeginning = 16 << 10

// explain says how req was answered with the token t and, of a refusal, what to
// do about it. Of what the upstream says, only what looks like an identifier is
// shown: a message may quote a prompt, and anything may quote a token.
func (f *forwarder) explain(req *http.Request, resp *http.Response, beginning []byte, t token) (
	text, hint string) {
	if resp.Header.Get("Content-Encoding") == "gzip" {
		if r, err := gzip.NewReader(bytes.NewReader(beginning)); err == nil {
			beginning, _ = io.ReadAll(io.LimitReader(r, maxBeginning)) // its end may be missing
		}
	}
	var answer struct {
		Error struct{ Code, Type, Param string }
	}
	json.Unmarshal(beginning, &answer) // what is no string is left out
	text = fmt.Sprintf("answered %d %s", resp.StatusCode, http.StatusText(resp.StatusCode))
	addIfIdentifier := func(label, value string) {
		if identifier.MatchString(value) {
			text += label + value
		}
	}
	addIfIdentifier(": ", cmp.Or(answer.Error.Code, answer.Error.Type)) // Claude has no code
	addIfIdentifier(", param ", answer.Error.Param)
	addIfIdentifier("; Retry-After ", resp.Header.Get("Retry-After"))
	addIfIdentifier("; apim-request-id ", resp.Header.Get("Apim-Request-Id"))

	c := t.claims()
	fill := strings.NewReplacer("{role}", roleFor(req.Method+" "+req.URL.Opaque),
		"{object}", c.Object, "{audience}", c.Audience)
	return text, fill.Replace(hintFor(refusalCauses, resp.StatusCode, string(beginning)))
}

// identifier is what is shown of an upstream's answer: "messages[0].content",
// an id, a number of seconds or a date.
var identifier = regexp.MustCompile(`^[A-Za-z0-9_.,:\[\] -]{1,64}$`)

// cause is a usual reason why there is no good answer.
type cause struct {
	status int    // of the answer; 0 for any
	says   string // in the answer or the error, in lower case
	hint   string // what to do about it
}

// hintFor is the hint of the first cause that fits. It is empty if none does.
func hintFor(causes []cause, status int, text string) string {
	text = strings.ToLower(text)
	for _, c := range causes {
		if (c.status == 0 || c.status == status) && strings.Contains(text, c.says) {
			return c.hint
		}
	}
	return ""
}

// noAnswerCauses go by Go's words.
var noAnswerCauses = []cause{
	{0, "x509", "name a file with your own CA in SSL_CERT_FILE, unless the server's " +
		"certificate has expired or is for another name"},
	{0, "https_proxy", "check HTTPS_PROXY's address, password and rules"},
	{0, "lookup", "check TARGET_URL's host name, and this host's DNS"},
	{0, "dial", "a firewall? HTTPS_PROXY names a proxy to go through"},
}

// refusalCauses go by the status and the words of the answer, and so a 401 that
// does not say why is taken for a role that is missing. In braces are the
// token's claims, and the role for the path.
var refusalCauses = []cause{
	{0, "<html", "a web page answered, not the service: check TARGET_URL; " +
		"is a proxy or firewall on the way?"},
	{0, "subdomain", "a regional endpoint takes no tokens: " +
		"use the resource's own, https://NAME.openai.azure.com/openai/"},
	{401, "missing subscription key", "the gateway wants a key of its own, " +
		"which the proxy does not send: let it accept the token"},
	{401, "audience", "the token is for {audience}: if the service wants another audience, " +
		"set AZURE_OPENAI_SCOPE; if not, check this host's clock, " +
		"and that the identity is of the resource's tenant"},
	{401, "", missingRole},
	{403, "permission", missingRole},
	{403, "", "a network rule or policy of the resource, or a gateway before it, refuses this"},
	{404, "deploymentnotfound", "the resource has no deployment of this name: " +
		"look it up there (a new one takes minutes to work)"},
	// This is the whole message for a wrong path. Others have these words, too.
	{404, `"resource not found"`, "there is no such path: " +
		"check TARGET_URL, and the call and its api-version"},
	{429, "", "too many requests or tokens for the deployment's quota"},
}

const missingRole = "the identity with object id {object} lacks the role {role} on the resource " +
	"(a new assignment takes minutes to work)"

// roleFor is the role that lets an identity make a call, such as "POST
// /openai/v1/files" ("Role-based access control for Azure OpenAI" and "for
// Microsoft Foundry").
func roleFor(call string) string {
	switch {
	case strings.Contains(call, "/api/projects/"):
		return "Foundry User" // "Azure AI User" until 2026
	case fineTuning.MatchString(call):
		return "Cognitive Services OpenAI Contributor"
	case strings.Contains(call, "/anthropic/"), strings.Contains(call, " /models/"):
		return "Cognitive Services User"
	}
	return "Cognitive Services OpenAI User"
}

// fineTuning is a call for that, or one that uploads files for it.
var fineTuning = regexp.MustCompile("/fine_tuning/|^POST .*/openai/(v1/)?(files|uploads)(/|$)")
