package main

// This file is one request's way through the proxy: what of it goes upstream,
// who reads its body when, how the answer comes back, and what is said when
// something goes wrong.

import (
	"bytes"
	"cmp"
	"compress/flate"
	"compress/gzip"
	"compress/zlib"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"math"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"
)

// forwardedHeaders are the request headers that go upstream, beside those with
// one of forwardedPrefixes. All others stay here: credentials, cookies, Origin
// and Referer, what tells of the client's network, and what could make a front
// end route the request elsewhere.
var forwardedHeaders = nameSet(
	// What HTTP itself and every API use.
	"Accept", "Accept-Encoding", "Accept-Language", "Content-Type", "Content-Encoding",
	"Range", "If-Range", "User-Agent",

	// Correlation, which the service's support asks for (W3C Trace Context,
	// "Azure OpenAI monitoring").
	"Traceparent", "Tracestate", "X-Request-Id", "X-Client-Request-Id",
	"X-Ms-Client-Request-Id", "X-Ms-Return-Client-Request-Id", "X-Ms-Useragent",

	// What codex says of itself and of its session, in old and new spelling (its
	// source, codex-rs). Its attestation, which proves to OpenAI that it is a genuine
	// codex, is no credential: the service may want to see it, as it would directly.
	"Originator", "Version", "Session_id", "Session-Id", "Conversation_id", "Conversation-Id",
	"Thread_id", "Thread-Id", "X-Oai-Attestation", "X-Responsesapi-Include-Timing-Metrics",

	// Options of a single request, which the service checks: whether parameters
	// that it does not know are refused, dropped or passed to the model (Foundry
	// Models REST reference), which deployment answers or makes images, which of
	// the resource's own content filters is used, evaluations and previews.
	"Extra-Parameters", "Azureml-Model-Deployment", "X-Ms-Oai-Image-Generation-Deployment",
	"X-Policy-Id", "Aoai-Evals", "Foundry-Features", "X-Ms-Enable-Preview",
)

// forwardedPrefixes begin the headers that the service and its SDKs define.
// X-Ms- is not one of them: App Service and other front ends of Azure put the
// signed-in user's tokens and address under it.
var forwardedPrefixes = []string{"Anthropic-", "Openai-", "X-Codex-", "X-Openai-", "X-Stainless-"}

// credentialWords are parts of a name, in lower case, that keep a header here
// in spite of its prefix.
var credentialWords = []string{"auth", "cookie", "key", "token"}

// webSocketHeaders go upstream with an upgrade (RFC 6455 §4.1). So does
// Sec-WebSocket-Protocol, without the key that may be in it.
var webSocketHeaders = nameSet("Sec-Websocket-Key", "Sec-Websocket-Version",
	"Sec-Websocket-Extensions")

// keyProtocol precedes a key among the subprotocols of a WebSocket. openai-node
// puts it there, as a browser's WebSocket cannot set headers.
const keyProtocol = "openai-insecure-api-key."

// hopByHop are headers of one connection, which a proxy does not pass on (RFC
// 9110 §7.6.1). Proxy-Connection is from before that rule, and still sent.
var hopByHop = nameSet("Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization",
	"Proxy-Connection", "Te", "Trailer", "Transfer-Encoding", "Upgrade")

// othersPolicies are answer headers that are right for the upstream's host and
// wrong for this one. Strict-Transport-Security must not be sent over plain
// HTTP (RFC 6797 §7.2), Alt-Svc would lead the client past the proxy with all
// that it sends (RFC 7838 §2), and a cookie would not get upstream again.
// Location and Operation-Location stay: they name a URL for one request. A
// client that follows it past the proxy shows its EXPECTED_KEY to the service,
// where that opens nothing.
var othersPolicies = nameSet("Alt-Svc", "Set-Cookie", "Strict-Transport-Security")

// credentialParams are query parameters that carry a key or a token, in lower
// case: of Azure and its look-alikes, of older openai-node, of RFC 6750 §2.3
// and of API Management.
var credentialParams = nameSet("api-key", "x-api-key", "api_key", "authorization",
	"access_token", "subscription-key", "ocp-apim-subscription-key")

// nameSet makes a set of names.
func nameSet(names ...string) map[string]bool {
	s := make(map[string]bool)
	for _, name := range names {
		s[name] = true
	}
	return s
}

// Who reads a request's body, and how each exchange ends.
//
// Two parts of net/http read a request's body. The server reads what a handler
// has left of it, because the next request on the connection begins there. The
// transport reads it in a goroutine of its own, and may still do so when the
// upstream has answered. Left to themselves they take it from each other: an
// early answer is cut (golang/go#40747), or the rest of a body passes for the
// next request (golang/go#68560). Therefore a body has one reader at a time:
//
//   - A body of up to smallBody bytes is read whole, by readBody, before the
//     upstream request is sent. After that nothing of it is left to read.
//   - A longer body, or one of unknown length, is streamed: it is an upload,
//     which the transport reads until the answer is over or has failed. Then the
//     upload is taken from the transport, and what still comes is dropped.
//   - The body of a refused request goes nowhere. What comes of it is dropped.
//
// A client that is still sending when its connection is closed gets a reset,
// and with it loses the answer that it has not read yet. So a client that may
// still be sending is told Connection: close, and what it sends within lingerTime
// is read and dropped before the connection is closed. In short:
//
//	exchange               how it ends
//	no body, or a small    With the answer. The connection is kept for the next
//	  one                  request.
//	streamed upload        After the answer, what the client still sends is dropped
//	                       for lingerTime, and the server closes the connection.
//	refusal of a request   The connection is taken from the server. What the client
//	  with a body          still sends is dropped for lingerTime. Then it is closed.
//	upload that the        The upload is taken from the transport. The rest is as
//	  upstream does not    for a refusal.
//	  answer
//	answer that breaks     The client's connection is closed at once, so that the
//	  off                  client does not take a part for the whole.
//	tunnel                 Each direction ends by itself. Then what the client still
//	                       sends is dropped for lingerTime, and both connections
//	                       are closed.
//	any of these at the    The client's connection is closed, or ends with the
//	  end of a drain       program.

// lingerTime is how long a client may go on sending after its answer.
const lingerTime = time.Second

// smallBody is the longest request body, in bytes, that is read before it is
// sent. The transport can send it over another connection, if an idle one turns
// out to be closed before a byte was written. After that a POST is never sent
// again.
const smallBody = 256 << 10

// writeBuffer is the size of an upstream connection's buffer for writing, in
// bytes. A head with a token, about 4 KiB, and a short body leave in one write.
const writeBuffer = 8 << 10

// earlyAnswerTime is how long an upload that failed waits for an answer which
// the upstream sent before. See upload.withEarlyAnswer.
const earlyAnswerTime = 250 * time.Millisecond

// maxBeginning is how much of a refusal, in bytes, is looked at to explain it.
const maxBeginning = 16 << 10

// targets are the base URLs of the upstream, one at least and all of one host.
type targets []*url.URL

func (t targets) String() string {
	var texts []string
	for _, u := range t {
		texts = append(texts, u.String())
	}
	return strings.Join(texts, " ")
}

// lastSegment is what a base URL's path ends in: "openai".
func lastSegment(u *url.URL) string {
	segments := strings.Split(strings.Trim(u.EscapedPath(), "/"), "/")
	return segments[len(segments)-1]
}

// clientURL is the base URL, without /v1, that a client needs for the target i:
// "http://localhost:8081/anthropic". ownURL is where the client reaches the proxy:
// "http://localhost:8081".
func (t targets) clientURL(i int, ownURL string) string {
	if i == 0 {
		return ownURL
	}
	return ownURL + "/" + lastSegment(t[i])
}

// clientURLFor is the clientURL for an API, "openai" or "anthropic". It is empty if
// no target has that in its path.
func (t targets) clientURLFor(api, ownURL string) string {
	for i, u := range t {
		if strings.Contains(u.Path, "/"+api+"/") {
			return t.clientURL(i, ownURL)
		}
	}
	return ""
}

// forwarder sends requests to the upstream, with a token in the place of the
// client's credentials.
type forwarder struct {
	targets   targets // "https://my-aoai.openai.azure.com/openai/"
	key       string  // what clients must present; empty for nothing
	tokens    *tokenSource
	secrets   *secrets
	debug     bool // AZURE_LOG_LEVEL=debug
	transport *http.Transport
	bodyTime  time.Duration // for a small body to arrive
	endTime   time.Duration // for one direction of a tunnel to end after the other
	streams   atomic.Int64  // requests and tunnels under way; the log calls both streams
}

func newForwarder(to targets, key string, tokens *tokenSource, hidden *secrets) *forwarder {
	dialer := &net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}
	return &forwarder{
		targets:  to,
		key:      key,
		tokens:   tokens,
		secrets:  hidden,
		bodyTime: time.Minute,
		endTime:  time.Minute,
		transport: &http.Transport{
			Proxy:                  proxyTo(to[0]),
			OnProxyConnectResponse: checkConnect,
			DialContext:            dialer.DialContext,
			TLSHandshakeTimeout:    10 * time.Second,
			// Go's defaults, which are TLS 1.2 at least. A new connection resumes the
			// session of an older one, which spares both sides a full handshake.
			TLSClientConfig: &tls.Config{
				ClientSessionCache: tls.NewLRUClientSessionCache(0), // of the default size
			},
			// HTTP/1.1 only: each stream has a connection to itself, where a lost
			// packet cannot stop the others. An empty map switches HTTP/2 off.
			TLSNextProto:           map[string]func(string, *tls.Conn) http.RoundTripper{},
			MaxIdleConns:           0, // no limit but the next
			MaxIdleConnsPerHost:    1024,
			IdleConnTimeout:        60 * time.Second, // load balancers of Azure: 4 minutes
			ResponseHeaderTimeout:  0,                // a model may think for hours
			ExpectContinueTimeout:  0,                // Expect is not forwarded
			DisableCompression:     true,             // an answer passes as it is
			MaxResponseHeaderBytes: 1 << 20,
			WriteBufferSize:        writeBuffer,
		},
	}
}

// ServeHTTP takes one request to the upstream, and its answer back.
func (f *forwarder) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.streams.Add(1)
	defer f.streams.Add(-1)
	start := time.Now()
	log.Printf("%s %s from %s",
		f.secrets.safe(r.Method, maxPiece), f.safeTarget(r.RequestURI), r.RemoteAddr)

	// Check the caller.
	upgrade := isWebSocket(r)
	if refusal := f.checkCaller(r, upgrade); refusal != nil {
		log.Printf("answered %d to %s: %s", refusal.status, r.RemoteAddr, refusal.message)
		refusal.write(w, r)
		return
	}

	// Build the upstream request. A small body is read for it, which may take
	// f.bodyTime. The token comes after that, so that it is valid when it is sent.
	req, small, err := f.upstreamRequest(w, r, upgrade)
	if err != nil {
		_, reason := explainFailure(err)
		log.Printf("answered %d to %s: %s: %s",
			errIncomplete.status, r.RemoteAddr, errIncomplete.message, reason)
		errIncomplete.write(w, r)
		return
	}

	// Get the token.
	t, err := f.tokens.current(r.Context())
	if err != nil {
		f.logProblem(r, req, nil, start, err.Error())
		f.withoutToken(w, r, err)
		return
	}
	req.Header.Set("Authorization", t.authorization)

	// Send. If the body is streamed, it is an upload; full duplex lets an answer
	// begin while that still runs.
	body, streamed := req.Body.(*upload)
	if streamed {
		http.NewResponseController(w).EnableFullDuplex()
		sendContinue(w, r)
		req = body.withEarlyAnswer(req)
	}
	resp, err := f.transport.RoundTrip(req)
	waited := time.Since(start)
	if err == nil {
		defer resp.Body.Close()
	}
	if problem := f.checkAnswer(r, body, resp, err, upgrade); problem != nil {
		if streamed {
			body.take(w, time.Now())
		}
		f.logProblem(r, req, nil, start, problem.message)
		problem.write(w, r)
		return
	}
	if resp.StatusCode == http.StatusUnauthorized {
		f.tokens.rejected(t)
	}
	if small != nil && resp.StatusCode < 400 {
		// See heldBody. The body of a refused request stays, as deploymentName looks
		// for the model in it.
		small.text = nil
	}

	// Copy the answer.
	if resp.StatusCode == http.StatusSwitchingProtocols {
		sent, received := f.tunnel(w, r, resp)
		f.logAnswer(r, resp, start, waited, sent, received, nil)
		return
	}
	copyHeader(w.Header(), resp.Header)
	if streamed {
		w.Header().Set("Connection", "close")
	}
	w.WriteHeader(resp.StatusCode)
	received, beginning, err := copyBody(w, resp)
	sent := r.ContentLength
	if streamed {
		sent = body.sent.Load()
	}
	f.logAnswer(r, resp, start, waited, sent, received, err)
	if resp.StatusCode >= 400 {
		ownURL := "http://" + cmp.Or(r.Host, "HOST:PORT") // as this client calls the proxy
		text, hint, _ := f.explain(req, resp, beginning, ownURL, t)
		f.logProblem(r, req, resp, start, withHint(text, hint))
	}
	if err != nil {
		var left clientError // many clients leave after the last event
		if r.Context().Err() == nil && !errors.As(err, &left) {
			_, reason := explainFailure(err)
			f.logProblem(r, req, resp, start, "answer cut: "+reason)
		}
		abort(w, r) // does not return
	}
	if streamed {
		body.end(w)
	}
}

// safeTarget is a request target for the log, without credentials. An escaped
// secret cannot be found in it and redacted, so a target that has one once it is
// decoded is not shown at all, and neither is one that cannot be decoded.
func (f *forwarder) safeTarget(target string) string {
	if !strings.HasPrefix(target, "/") {
		return "(no path)" // it may be a URL with a password
	}
	path, query, hasQuery := strings.Cut(target, "?")
	text := path
	if hasQuery {
		text += "?" + cutCredentials(query)
	}
	// The two differ in what a + is: itself, or a space.
	for _, decode := range []func(string) (string, error){url.PathUnescape, url.QueryUnescape} {
		decoded, err := decode(text)
		if err != nil {
			return "(malformed)"
		}
		if decoded != text && f.secrets.redact(decoded) != decoded {
			return "REDACTED"
		}
	}
	if !isPrintableASCII(text) {
		text = strconv.QuoteToASCII(text)
	}
	return f.secrets.safe(text, maxPiece)
}

// checkCaller tells why a request may not go upstream, or returns nil if it may.
func (f *forwarder) checkCaller(r *http.Request, upgrade bool) *apiError {
	// The answer to TRACE would repeat the request, and the token with it. TRACK
	// is the same in IIS. CONNECT is for a proxy to other hosts.
	switch strings.ToUpper(r.Method) {
	case http.MethodConnect, http.MethodTrace, "TRACK":
		return errMethod
	}

	// A request target that is not a path is a URL, or * for OPTIONS.
	if !strings.HasPrefix(r.RequestURI, "/") {
		return errTarget
	}

	// Without a key every program on this host may use the proxy. A web page is
	// no such program, though its browser runs here.
	if f.key == "" && mayBeWebPage(r) {
		return errWebPage
	}
	if f.key != "" && !f.hasKey(r, upgrade) {
		return errKey
	}
	if !isPlainPath(r.URL.Path) {
		return errPath
	}
	return nil
}

// mayBeWebPage tells whether a browser may have sent the request for a page: Host
// or Origin is not of this host, or Sec-Fetch-Site tells of another site.
func mayBeWebPage(r *http.Request) bool {
	// A page can have its own host name point to a loopback address (DNS
	// rebinding). It is then of the same origin as the proxy, and its GET has
	// neither of the headers below, but that name is in Host. On another address the
	// proxy may have any name. There, without a key, whoever reaches it may use it,
	// as the log warns.
	host := (&url.URL{Host: r.Host}).Hostname() // without its port
	local, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	if ok && local.IP.IsLoopback() && !isLoopback(host) {
		return true
	}

	// A page of another site shows in Origin, which every browser sends with a
	// POST. It may be "null", which has no host and so is not loopback. An Origin
	// on this host passes here. If it is a page's, Sec-Fetch-Site decides below; a
	// program that is no browser does not send that.
	for _, origin := range r.Header["Origin"] {
		u, err := url.Parse(origin)
		if err != nil || !isLoopback(u.Hostname()) {
			return true
		}
	}

	// The GET of a page, an image's for one, has no Origin, but since 2023 every
	// browser sends Sec-Fetch-Site (W3C "Fetch Metadata Request Headers"). It is
	// "none" if the user has entered the address, and "same-site" for a page from
	// another port of this host, which is refused. An older browser does not send
	// the header, and its pages from this host are not noticed.
	for _, site := range r.Header["Sec-Fetch-Site"] {
		if site != "same-origin" && site != "none" {
			return true
		}
	}
	return false
}

// hasKey tells whether the request presents the expected key. Hashes are
// compared, so that the time it takes shows neither content nor length.
func (f *forwarder) hasKey(r *http.Request, upgrade bool) bool {
	keys := slices.Concat(r.Header["Api-Key"], r.Header["X-Api-Key"])
	for _, value := range r.Header["Authorization"] {
		if scheme, key, _ := strings.Cut(value, " "); strings.EqualFold(scheme, "Bearer") {
			keys = append(keys, strings.TrimSpace(key))
		}
	}
	if upgrade { // a browser's WebSocket cannot set headers
		keys = append(keys, r.URL.Query()["api-key"]...)
		for _, protocol := range listItems(r.Header["Sec-Websocket-Protocol"]) {
			if key, ok := strings.CutPrefix(protocol, keyProtocol); ok {
				keys = append(keys, key)
			}
		}
	}
	expected := sha256.Sum256([]byte(f.key))
	return slices.ContainsFunc(keys, func(key string) bool {
		presented := sha256.Sum256([]byte(key))
		return subtle.ConstantTimeCompare(presented[:], expected[:]) == 1
	})
}

// isPlainPath tells whether a path, decoded once, means the same to every
// server. Dot segments would lead out of TARGET_URL's path, to other APIs of
// the resource that take the same token. A percent sign that is left would be
// decoded again by some, and what is no UTF-8 can be a dot or a slash in an
// overlong form.
func isPlainPath(path string) bool {
	// Beside the slash, each of these ends a segment for some server.
	segments := strings.FieldsFunc(path, func(r rune) bool {
		return strings.ContainsRune(`/\;?#`, r) || unicode.IsSpace(r) || unicode.IsControl(r)
	})
	return utf8.ValidString(path) && !strings.Contains(path, "%") &&
		!slices.Contains(segments, ".") && !slices.Contains(segments, "..")
}

// isWebSocket tells whether the client asks for a WebSocket (RFC 6455 §4.1).
// Other upgrades are not forwarded, since what follows them, requests in
// HTTP/2 for example, could not be checked. Nor is one with a body, which the
// transport and the tunnel would both read.
func isWebSocket(r *http.Request) bool {
	isUpgrade := func(item string) bool { return strings.EqualFold(item, "upgrade") }
	return r.Method == http.MethodGet && r.ProtoAtLeast(1, 1) && r.ContentLength == 0 &&
		strings.EqualFold(r.Header.Get("Upgrade"), "websocket") &&
		slices.ContainsFunc(listItems(r.Header["Connection"]), isUpgrade)
}

// listItems are the items of a header whose values are comma-separated lists.
func listItems(values []string) (items []string) {
	for _, value := range values {
		for _, item := range strings.Split(value, ",") {
			items = append(items, strings.TrimSpace(item))
		}
	}
	return items
}

// upstreamRequest is r as it goes upstream, except for the token. Only what the
// lists above name is copied of its header, and the transport frames the body
// anew, so no second request can be hidden in it.
//
// small is the body, if that is a small one.
func (f *forwarder) upstreamRequest(w http.ResponseWriter, r *http.Request, upgrade bool) (
	req *http.Request, small *heldBody, err error) {
	// r.URL.Path has lost the escapes of the path as it was sent.
	path, _, _ := strings.Cut(r.RequestURI, "?")
	req = &http.Request{
		Method:        r.Method,
		URL:           upstreamURL(f.targets, path),
		Header:        upstreamHeader(r.Header, upgrade),
		ContentLength: r.ContentLength,
	}
	req.URL.RawQuery = cutCredentials(r.URL.RawQuery)
	req.URL.ForceQuery = r.URL.ForceQuery
	switch {
	case r.ContentLength == 0:
	case r.ContentLength > 0 && r.ContentLength <= smallBody:
		text, err := f.readBody(w, r)
		if err != nil {
			return nil, nil, err
		}
		small = &heldBody{text}
		req.GetBody = small.reader
		req.Body, _ = small.reader()
	default: // long, or of unknown length, which is -1
		req.Body = &upload{body: r.Body}
	}
	return req.WithContext(r.Context()), small, nil
}

// heldBody is a small body. A prompt may have 200 KiB and its answer go on for
// minutes, so ServeHTTP lets go of it when the answer begins: RoundTrip has
// returned then, which alone may send it again. A reader that is not at its end
// keeps the rest.
type heldBody struct{ text []byte }

// reader makes a reader of the body for the transport, as its GetBody.
func (b *heldBody) reader() (io.ReadCloser, error) {
	if len(b.text) <= writeBuffer {
		// The transport knows this type, and sends the head and the body in one
		// write (isKnownInMemoryReader in net/http's transfer.go).
		return io.NopCloser(bytes.NewReader(b.text)), nil
	}
	return &heldReader{b.text}, nil
}

// heldReader reads a body to its end and then lets go of it. The transport keeps
// the reader until the answer has ended.
type heldReader struct{ rest []byte }

func (r *heldReader) Read(p []byte) (int, error) {
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	if len(r.rest) == 0 {
		r.rest = nil
		return n, io.EOF
	}
	return n, nil
}

// Close is called by the transport.
func (r *heldReader) Close() error { return nil }

// readBody reads a small body, which has f.bodyTime to arrive.
func (f *forwarder) readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	client := http.NewResponseController(w)
	client.SetReadDeadline(time.Now().Add(f.bodyTime))
	body := make([]byte, r.ContentLength)
	_, err := io.ReadFull(r.Body, body)
	if err == nil {
		client.SetReadDeadline(time.Time{})
	}
	return body, err
}

// upstreamURL is where a request for path goes: a target's path, then path. What
// the end of the one and the beginning of the other share counts once, as many
// clients add /openai by themselves. The target is the first that shares something
// with path, or else the first of all. Slashes in front of path, from a client's
// base URL that ends in one, are dropped (the third line below).
//
//	targets                    path                   goes to
//	…/openai/                  /v1/responses          /openai/v1/responses
//	…/openai/                  /openai/v1/responses   /openai/v1/responses
//	…/openai/                  //v1/responses         /openai/v1/responses
//	…/openai/v1/               /v1/responses          /openai/v1/responses
//	…/openai/v1/               /v1                    /openai/v1/
//	…/openai/ …/anthropic/     /anthropic/v1/messages /anthropic/v1/messages
//	…/openai/ …/anthropic/     /v1/messages           /openai/v1/messages
//
// Both paths keep their escapes.
func upstreamURL(to targets, path string) *url.URL {
	segments := strings.Split(strings.TrimLeft(path, "/"), "/")
	target, counted := to[0], 0
	for _, u := range to {
		if n := shared(u, segments); n > 0 {
			target, counted = u, n
			break
		}
	}
	rest := strings.TrimLeft(strings.Join(segments[counted:], "/"), "/")
	// Opaque is sent as it is, without another round of escaping. With two
	// slashes in front it would be taken for a host and a path.
	opaque := "/" + strings.TrimLeft(target.EscapedPath()+rest, "/")
	return &url.URL{Scheme: target.Scheme, Host: target.Host, Opaque: opaque}
}

// shared is how many segments the target's path ends in that a request's path
// begins with.
func shared(target *url.URL, segments []string) int {
	end := strings.Split(strings.Trim(target.EscapedPath(), "/"), "/")
	for n := min(len(end), len(segments)); n > 0; n-- {
		if slices.Equal(end[len(end)-n:], segments[:n]) {
			return n
		}
	}
	return 0
}

// upstreamHeader is the header of a request as it goes upstream.
func upstreamHeader(in http.Header, upgrade bool) http.Header {
	out := make(http.Header, len(in))
	for name, values := range in {
		if isForwarded(name) || upgrade && webSocketHeaders[name] {
			out[name] = values
		}
	}
	for _, name := range listItems(in["Connection"]) {
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
		protocols := slices.DeleteFunc(listItems(in["Sec-Websocket-Protocol"]), holdsKey)
		if len(protocols) > 0 {
			out.Set("Sec-Websocket-Protocol", strings.Join(protocols, ", "))
		}
	}
	return out
}

// isForwarded tells whether a request header goes upstream.
func isForwarded(name string) bool {
	hasPrefix := func(prefix string) bool { return strings.HasPrefix(name, prefix) }
	if !slices.ContainsFunc(forwardedPrefixes, hasPrefix) {
		return forwardedHeaders[name]
	}
	lower := strings.ToLower(name)
	hasWord := func(word string) bool { return strings.Contains(lower, word) }
	return !slices.ContainsFunc(credentialWords, hasWord)
}

// cutCredentials takes the credentials out of a query, and leaves the rest as
// it is, byte for byte. It allows for lenient servers: they separate parameters
// at a semicolon too, decode names, ignore case, drop a second question mark,
// trim white space, or end a name at a NUL.
func cutCredentials(query string) string {
	const ignored = "? \t\r\n\x00" // around a name
	isCredential := func(param string) bool {
		name, _, _ := strings.Cut(param, "=")
		name, _ = url.QueryUnescape(name) // empty for a wrong escape
		name, _, _ = strings.Cut(strings.TrimLeft(name, ignored), "\x00")
		name = strings.TrimRight(name, ignored)
		return credentialParams[strings.ToLower(name)]
	}
	var kept []string
	for _, part := range strings.Split(query, "&") {
		params := slices.DeleteFunc(strings.Split(part, ";"), isCredential)
		if len(params) > 0 {
			kept = append(kept, strings.Join(params, ";"))
		}
	}
	return strings.Join(kept, "&")
}

// upload is a request body that is streamed. The transport reads it until it is
// taken.
type upload struct {
	body   io.Reader
	sent   atomic.Int64 // bytes
	failed atomic.Bool  // the client did not send it whole

	mu    sync.Mutex // held by a Read while it lasts; protects taken
	taken bool
}

func (u *upload) Read(p []byte) (int, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.taken {
		// It is an error and not the end, as the upload must not look complete to
		// the upstream.
		return 0, errTaken
	}
	n, err := u.body.Read(p)
	if err != nil && err != io.EOF {
		u.failed.Store(true)
	}
	u.sent.Add(int64(n))
	return n, err
}

var errTaken = errors.New("the request is over")

// Close is called by the transport. Closing the body is the server's part.
func (u *upload) Close() error { return nil }

// take takes the upload away from the transport. A Read of the transport that is
// under way would last for as long as the client sends nothing; the deadline ends
// it. It stays the connection's deadline, for whoever reads next.
func (u *upload) take(w http.ResponseWriter, deadline time.Time) {
	http.NewResponseController(w).SetReadDeadline(deadline)
	u.mu.Lock()
	defer u.mu.Unlock()
	u.taken = true
}

// withEarlyAnswer returns req with a hook for the case that the upstream answers
// before it has read the whole upload, as with 413 or 401, and then closes the
// connection. The transport's write fails in that case, and RoundTrip returns
// that failure even if the answer has just come. The hook holds the failure back,
// so that the answer can be read first: WroteRequest is called with a failed
// write's error before RoundTrip can see it (a deferred call in Request.write of
// net/http). That is not documented, but a test of early answers would fail if it
// changed. It passes with Go 1.22 to 1.27.
func (u *upload) withEarlyAnswer(req *http.Request) *http.Request {
	ctx := req.Context()
	return req.WithContext(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		WroteRequest: func(info httptrace.WroteRequestInfo) {
			if info.Err == nil || u.failed.Load() {
				return
			}
			select {
			case <-time.After(earlyAnswerTime):
			case <-ctx.Done():
			}
		},
	}))
}

// end ends an upload after its answer: what the client still sends is dropped.
func (u *upload) end(w http.ResponseWriter) {
	// The answer goes out before. Only its last chunk, an empty one, is written by
	// the server after this.
	http.NewResponseController(w).Flush()
	u.take(w, time.Now().Add(lingerTime))
	io.Copy(io.Discard, u.body)
}

// sendContinue tells a client that waits for it to send its body (RFC 9110
// §10.1.1). The server would do so by itself when the transport first reads the
// body, but from the transport's goroutine and perhaps while an early answer is
// being written, which Go 1.22's race detector reports as a data race.
func sendContinue(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Expect") != "" && r.ProtoAtLeast(1, 1) {
		w.WriteHeader(http.StatusContinue)
	}
}

// checkAnswer tells why there is no answer to pass on, or returns nil if there is
// one. body is nil unless the request's body was streamed.
func (f *forwarder) checkAnswer(r *http.Request, body *upload, resp *http.Response,
	err error, upgrade bool) *apiError {
	switch {
	case err != nil && r.Context().Err() != nil:
		return errLeft
	case err != nil && body != nil && body.failed.Load():
		return errBody
	case err != nil:
		return unreachable(withHint(f.describeFailure(err)))
	}
	if resp.StatusCode >= 200 {
		return nil
	}
	// The transport has dealt with every 1xx but 101. After that its body is the
	// connection, and can be written to.
	_, canWrite := resp.Body.(io.Writer)
	if upgrade && canWrite && strings.EqualFold(resp.Header.Get("Upgrade"), "websocket") {
		return nil
	}
	return unreachable("no answer from " + f.targets[0].Host + ": unexpected status " +
		statusText(resp.StatusCode))
}

// copyHeader sets an answer's header, without what is about the upstream's
// connection or host.
func copyHeader(h, upstream http.Header) {
	named := listItems(upstream["Connection"])
	isNamed := func(name string) bool {
		equals := func(item string) bool { return strings.EqualFold(item, name) }
		return slices.ContainsFunc(named, equals)
	}
	for name, values := range upstream {
		// Connection must not take away the length: it frames the answer here.
		if name != "Content-Length" && isNamed(name) {
			continue
		}
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

// clientError is a failure to write to the client, and not the upstream's.
type clientError struct{ error }

// Buffers for copyBody. An event has some hundred bytes, and thousands of streams
// may be open for minutes, so theirs are small. All else is over soon, and a large
// buffer passes it on with fewer writes.
var (
	eventBuffers = sync.Pool{New: func() any { return newBuffer(2 << 10) }}
	bulkBuffers  = sync.Pool{New: func() any { return newBuffer(32 << 10) }}
)

// newBuffer makes a buffer. A pool keeps a pointer to a slice without allocating.
func newBuffer(size int) *[]byte {
	buf := make([]byte, size)
	return &buf
}

// copyBody passes an answer's body on: what is read is written and flushed at
// once. It returns how many bytes came, and the beginning of a refusal, to be
// explained in the log.
func copyBody(w http.ResponseWriter, resp *http.Response) (
	received int64, beginning []byte, err error) {
	buffers := &bulkBuffers
	if isEventStream(resp.Header) {
		buffers = &eventBuffers
	}
	pooled := buffers.Get().(*[]byte)
	defer buffers.Put(pooled)
	buf := *pooled

	// The head of a stream goes out before the first event. One of known length
	// goes out with the beginning of its body.
	client := http.NewResponseController(w)
	if resp.ContentLength < 0 {
		if err := client.Flush(); err != nil {
			return 0, nil, clientError{err}
		}
	}
	for {
		n, readErr := resp.Body.Read(buf)
		received += int64(n)
		if resp.StatusCode >= 400 {
			beginning = append(beginning, buf[:min(n, maxBeginning-len(beginning))]...)
		}
		if _, err := w.Write(buf[:n]); err != nil { // of nothing, it does nothing
			return received, beginning, clientError{err}
		}
		if readErr == io.EOF {
			return received, beginning, nil
		}
		if readErr != nil {
			return received, beginning, readErr
		}
		if err := client.Flush(); err != nil {
			return received, beginning, clientError{err}
		}
	}
}

// abort closes the client's connection without an end to its answer.
func abort(w http.ResponseWriter, r *http.Request) {
	// After the panic the server closes the request's body before it closes the
	// connection, and to close a body it reads up to 256 KiB of what is left, for
	// which it would wait if the client is slow. So the body is closed here, with a
	// deadline in the past, which ends all reading at once; the upload fails too.
	http.NewResponseController(w).SetReadDeadline(time.Now())
	r.Body.Close()
	panic(http.ErrAbortHandler) // net/http's way to say so; it is not logged
}

// tunnel copies bytes between the client and the upstream, after its 101. Each
// direction is copied to its own end, and that end is passed on: a peer that
// has sent all it has may still wait for the rest of what the other sends. It
// returns how many bytes the client and the upstream have sent.
func (f *forwarder) tunnel(w http.ResponseWriter, r *http.Request, resp *http.Response) (
	sent, received int64) {
	upstream := resp.Body.(io.ReadWriteCloser)
	client, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		log.Printf("the connection of %s cannot be upgraded", r.RemoteAddr)
		w.WriteHeader(http.StatusInternalServerError)
		return 0, 0
	}
	closeBoth := func() {
		client.Close()
		upstream.Close()
	}
	defer closeBoth()
	stop := context.AfterFunc(r.Context(), closeBoth) // at the end of a drain
	defer stop()

	answer := http.Response{ProtoMajor: 1, ProtoMinor: 1, StatusCode: resp.StatusCode}
	answer.Header = make(http.Header)
	copyHeader(answer.Header, resp.Header)
	answer.Header.Set("Connection", "Upgrade")
	answer.Header.Set("Upgrade", "websocket")
	answer.Write(buffered) // for a 101 it adds no header of its own
	if buffered.Flush() != nil {
		return 0, 0
	}

	// The server's buffer may hold the first bytes of the client. The rest is read
	// from the connection itself: if it were read through the buffer, the end of
	// the client's half would end r.Context(), as it does for a request (connReader
	// in net/http's server.go), and with it the tunnel's other direction. A test
	// has a client end its half.
	first, _ := buffered.Reader.Peek(buffered.Reader.Buffered())
	ended := make(chan bool, 2)
	go func() {
		sent = copyToEnd(upstream, io.MultiReader(bytes.NewReader(first), client))
		ended <- true
	}()
	go func() {
		received = copyToEnd(client, upstream)
		ended <- true
	}()
	<-ended

	// The other direction has some time to end, as a Close frame is answered (RFC
	// 6455 §7.1.1). But a peer that has vanished looks like one that is waiting,
	// so the time is limited.
	timer := time.AfterFunc(f.endTime, func() {
		upstream.Close()
		client.SetDeadline(time.Now())
	})
	<-ended
	timer.Stop()
	linger(client)
	return sent, received
}

// copyToEnd copies from src to dst until src ends, and then half-closes dst:
// nothing more is sent to it, but it can still be read. The upstream's
// connection offers that from Go 1.24 on. With an older Go the upstream hears of
// the client's end when f.endTime has passed.
func copyToEnd(dst io.Writer, src io.Reader) (copied int64) {
	copied, _ = io.Copy(dst, src)
	if half, ok := dst.(interface{ CloseWrite() error }); ok {
		half.CloseWrite()
	}
	return copied
}

// linger ends what is sent to the client, and reads what it still sends.
func linger(client net.Conn) {
	if tcp, ok := client.(*net.TCPConn); ok && tcp.CloseWrite() == nil {
		tcp.SetReadDeadline(time.Now().Add(lingerTime))
		io.Copy(io.Discard, tcp)
	}
}

// apiError is an answer of the proxy's own, in the form of OpenAI's errors.
type apiError struct {
	status  int
	code    string // "invalid_api_key"
	message string
}

var (
	errMethod = &apiError{
		status:  http.StatusMethodNotAllowed,
		code:    "method_not_allowed",
		message: "CONNECT, TRACE and TRACK are not forwarded",
	}
	errTarget = &apiError{
		status:  http.StatusBadRequest,
		code:    "invalid_path",
		message: "the request target must be a path: this is no HTTP proxy for other hosts",
	}
	errWebPage = &apiError{
		status: http.StatusForbidden,
		code:   "foreign_web_page",
		message: "Host, Origin or Sec-Fetch-Site is that of a web page: " +
			"call http://localhost or 127.0.0.1 from a program, or set EXPECTED_KEY",
	}
	errKey = &apiError{
		status: http.StatusUnauthorized,
		code:   "invalid_api_key",
		message: "wrong or missing key: " +
			"send the proxy's EXPECTED_KEY as api-key, x-api-key or Authorization: Bearer",
	}
	errPath = &apiError{
		status: http.StatusBadRequest,
		code:   "invalid_path",
		message: "the path must be UTF-8, without . or .. segments " +
			"and without escapes of escapes such as %252e",
	}
	// errIncomplete is for a small body that was late or broke off. It may arrive
	// whole the next time.
	errIncomplete = &apiError{
		status:  http.StatusRequestTimeout,
		code:    "incomplete_body",
		message: "the request's body is incomplete",
	}
	// errBody is for an upload that ended with an error, which net/http does not
	// let tell apart: the client is gone and reads no answer, or the chunks are
	// malformed and would be so the next time.
	errBody = &apiError{
		status:  http.StatusBadRequest,
		code:    "invalid_body",
		message: "the request's body broke off or is malformed",
	}
	// errLeft is for a client that has closed its connection, or its half of it,
	// and so hardly reads this. The end of a drain looks the same.
	errLeft = &apiError{
		status:  http.StatusServiceUnavailable,
		code:    "cancelled",
		message: "client left, or the proxy stopped",
	}
)

// unreachable is our answer when the upstream gives none.
func unreachable(message string) *apiError {
	return &apiError{
		status:  http.StatusBadGateway,
		code:    "upstream_unreachable",
		message: message,
	}
}

// withoutToken answers a request for which there is no token.
func (f *forwarder) withoutToken(w http.ResponseWriter, r *http.Request, err error) {
	var failed *noTokenError
	if !errors.As(err, &failed) { // the request's context has ended
		errLeft.write(w, r)
		return
	}
	seconds := max(1, int(math.Ceil(failed.retryAfter.Seconds())))
	w.Header().Set("Retry-After", strconv.Itoa(seconds))
	e := &apiError{
		status:  http.StatusServiceUnavailable,
		code:    "no_token",
		message: noTokenMessage(r, err, f.key != ""),
	}
	e.write(w, r)
}

// noTokenMessage says why there is no token to a caller that has shown a key,
// or is a program on this host. What the identity endpoint says is nobody
// else's business.
func noTokenMessage(r *http.Request, err error, hasKey bool) string {
	host, _, _ := net.SplitHostPort(r.RemoteAddr)
	if hasKey || isLoopback(host) && !mayBeWebPage(r) {
		return "no token: " + err.Error()
	}
	return "no token"
}

// write answers with the error.
func (e *apiError) write(w http.ResponseWriter, r *http.Request) {
	kind := "invalid_request_error"
	if e.status >= 500 {
		kind = "server_error"
	}
	message, _ := json.Marshal(e.message)
	body := fmt.Sprintf(`{"error":{"message":%s,"type":%q,"param":null,"code":%q}}`+"\n",
		message, kind, e.code)
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	if r.ContentLength != 0 {
		// With this the server does not read the body before it writes the head, as it
		// would to keep the connection.
		w.Header().Set("Connection", "close")
	}
	switch e.status { // both headers are a must (RFC 9110 §15.5.2 and §15.5.6)
	case http.StatusUnauthorized:
		w.Header().Set("WWW-Authenticate", "Bearer")
	case http.StatusMethodNotAllowed:
		w.Header().Set("Allow", "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT")
	}
	// The SDKs of OpenAI and Anthropic heed this header (shouldRetry in client.ts).
	// Without it Claude Code repeats a request with a wrong key for minutes, and
	// says nothing meanwhile.
	if e.status < 500 && e != errIncomplete {
		w.Header().Set("X-Should-Retry", "false")
	}
	w.WriteHeader(e.status)
	io.WriteString(w, body)
	if r.ContentLength == 0 {
		return
	}

	// Nobody wants the body. What still comes of it is dropped, as the table of
	// exchanges says. A small one may have been read already. To close the connection
	// all the same costs the client a new one, which is little beside the failure.
	controller := http.NewResponseController(w)
	controller.Flush()
	if client, _, err := controller.Hijack(); err == nil {
		linger(client)
		client.Close()
	}
}

// logProblem writes the line about what went wrong with a request. r is the
// client's request, req is the upstream's, and resp is nil if there is no answer.
// If there is none because the client has left, that is what went wrong.
func (f *forwarder) logProblem(r, req *http.Request, resp *http.Response, start time.Time,
	what string) {
	if resp == nil && r.Context().Err() != nil {
		what = errLeft.message
	}
	if resp != nil && resp.Header.Get("Apim-Request-Id") != "" {
		what += "; apim-request-id " + f.secrets.safe(resp.Header.Get("Apim-Request-Id"), maxPiece)
	}
	took := time.Since(start).Round(time.Millisecond)
	log.Printf("%s %s://%s%s after %v: %s", f.secrets.safe(req.Method, maxPiece),
		req.URL.Scheme, req.URL.Host, f.safeTarget(req.URL.RequestURI()), took, what)
}

// logAnswer writes the line about an upstream's answer that AZURE_LOG_LEVEL=debug
// adds: how long its first byte and its last took, and how many bytes the bodies
// had, or the tunnel. err is why it was not passed on to its end.
func (f *forwarder) logAnswer(r *http.Request, resp *http.Response, start time.Time,
	waited time.Duration, sent, received int64, err error) {
	if !f.debug {
		return
	}
	what := "answer"
	switch {
	case resp.StatusCode == http.StatusSwitchingProtocols:
		what = "tunnel"
	case err != nil:
		what = "part of an answer"
	}
	log.Printf("debug: %s %s: %s %s, first byte after %v, end after %v, "+
		"%d bytes up, %d down, apim-request-id %s",
		f.secrets.safe(r.Method, maxPiece), f.safeTarget(r.RequestURI),
		what, statusText(resp.StatusCode),
		waited.Round(time.Millisecond), time.Since(start).Round(time.Millisecond),
		sent, received,
		cmp.Or(f.secrets.safe(resp.Header.Get("Apim-Request-Id"), maxPiece), "none"))
}

// describeFailure says that there is no answer, in which step it failed and
// why, and what to do about it.
func (f *forwarder) describeFailure(err error) (text, hint string) {
	step, reason := explainFailure(err)
	text = "no answer from " + f.targets[0].Host
	switch {
	case f.isProxied():
		text += " by way of HTTPS_PROXY"
		hint = "HTTPS_PROXY names the proxy: check its address, password and rules"
	case step == stepConnect:
		hint = "a firewall? HTTPS_PROXY names a proxy to go through"
	case step == stepDNS:
		hint = "check TARGET_URL's host name, and this host's DNS"
	}
	if step == stepCertificate { // a proxy may be what shows another one
		hint = "name a file with your own CA in SSL_CERT_FILE, unless the server's certificate " +
			"has expired or is for another name"
	}
	return text + ": " + step + ": " + f.secrets.safe(reason, maxPiece), hint
}

// isProxied tells whether HTTPS_PROXY applies to the upstream.
func (f *forwarder) isProxied() bool {
	if f.transport.Proxy == nil {
		return false
	}
	proxy, err := f.transport.Proxy(&http.Request{URL: f.targets[0]})
	return err == nil && proxy != nil
}

// explain says how req was answered and, of a refusal, what to do about it. role
// is what the identity lacks, if that is it. ownURL is as in clientURL.
func (f *forwarder) explain(req *http.Request, resp *http.Response, beginning []byte,
	ownURL string, t token) (text, hint, role string) {
	plain, canRead := unpacked(beginning, resp.Header.Get("Content-Encoding"))
	text = "answered " + statusText(resp.StatusCode)
	if code := errorCode(plain); code != "" && code != strconv.Itoa(resp.StatusCode) {
		text += ": " + f.secrets.safe(code, maxPiece)
	}
	if after := resp.Header.Get("Retry-After"); after != "" {
		text += "; Retry-After: " + f.secrets.safe(after, maxPiece)
	}
	hint, role = f.remedy(req, resp.StatusCode, string(plain), ownURL, t)
	if !canRead && resp.StatusCode != http.StatusTooManyRequests { // 429 says it all
		hint = "the body, which says why, is compressed in a way that cannot be read here"
	}
	return text, f.secrets.safe(hint, maxPiece), role
}

// unpacked is the beginning of a body without its compression, if that is one
// that the standard library knows.
func unpacked(body []byte, encoding string) (plain []byte, canRead bool) {
	if len(body) == 0 {
		return nil, true
	}
	var r io.Reader
	var err error
	switch strings.ToLower(encoding) {
	case "", "identity":
		return body, true
	case "gzip", "x-gzip":
		r, err = gzip.NewReader(bytes.NewReader(body))
	case "deflate":
		// It is the zlib format, but some servers send bare deflate (RFC 9110
		// §8.4.1.2).
		r, err = zlib.NewReader(bytes.NewReader(body))
		if err != nil {
			r, err = flate.NewReader(bytes.NewReader(body)), nil
		}
	default:
		return nil, false
	}
	if err != nil {
		return nil, false
	}
	plain, _ = io.ReadAll(io.LimitReader(r, maxBeginning)) // only its beginning is there
	return plain, len(plain) > 0
}

// errorCode is the code of a refusal, and the parameter that it is about. The
// message is left out, because it may quote a prompt. So is what does not look
// like an identifier.
func errorCode(body []byte) string {
	var answer struct {
		Error struct{ Code, Type, Param any }
	}
	if json.Unmarshal(body, &answer) != nil {
		return ""
	}
	// Claude's errors have a type and no code.
	code := cmp.Or(identifier(answer.Error.Code), identifier(answer.Error.Type))
	if param := identifier(answer.Error.Param); param != "" {
		code += " (param " + param + ")"
	}
	return strings.TrimSpace(code)
}

// identifier is a JSON string such as "messages[0].content", and empty for
// anything else.
func identifier(value any) string {
	text, _ := value.(string)
	if len(text) > 64 || !consistsOf(text, letters+digits+"_-.[]") {
		return ""
	}
	return text
}

// roleFor is the role that lets an identity use what is under a path of a
// resource ("Role-based access control for Azure OpenAI" and "for Microsoft
// Foundry").
func roleFor(path string) string {
	switch {
	case strings.HasPrefix(path, "/api/projects/"):
		return "Azure AI User"
	case strings.HasPrefix(path, "/anthropic/"), strings.HasPrefix(path, "/models/"):
		return "Cognitive Services User"
	}
	return "Cognitive Services OpenAI User"
}

// remedy says what to do about a usual refusal of req with the token t, and which
// role the identity lacks, if that is it. body is what the service says, and ownURL
// is as in clientURL.
func (f *forwarder) remedy(req *http.Request, status int, body, ownURL string, t token) (
	hint, role string) {
	body = strings.ToLower(body)
	says := func(text string) bool { return strings.Contains(body, text) }
	unauthorized := status == http.StatusUnauthorized
	forbidden := status == http.StatusForbidden
	notFound := status == http.StatusNotFound
	c := t.claims()
	audience := strings.TrimSuffix(strings.ToLower(c.Audience), "/")
	// The first case that fits counts. A 401 that none of the others fits is taken
	// for a role that is missing.
	switch {
	case strings.HasPrefix(body, "<"):
		hint = "a web page answered, not the service: a proxy or firewall on the way?"
	case (status == http.StatusBadRequest || unauthorized) && says("subdomain"):
		hint = "a regional endpoint takes no tokens: " +
			"use the resource's own, https://NAME.openai.azure.com/openai/"
	case unauthorized && says("missing subscription key"):
		hint = "the gateway wants a key of its own, which the proxy does not send: " +
			"let it accept the token"

	// "Access token is missing, invalid, audience is incorrect (AUDIENCE), or
	// have expired" is what Azure OpenAI says, with the audience that it wants.
	case unauthorized && says("audience") && !says(audience):
		hint = "the token is for " + c.Audience + ", the wrong audience: " +
			"set AZURE_OPENAI_SCOPE for this cloud or service"
	case unauthorized && says("audience"):
		hint = "the token's audience is right: check this host's clock, " +
			"and that the identity is of the resource's tenant"

	case forbidden && (says("firewall") || says("private") || says("network")):
		hint = "the resource's network rules refuse this host: " +
			"allow its network or use the private endpoint"
	case unauthorized || forbidden && says("permission"):
		role = roleFor(req.URL.Opaque)
		hint = "the identity with object id " + c.Object + " lacks the role " + role +
			" on the resource (a new assignment takes minutes to work)"
	case forbidden:
		hint = "a policy or network rule of the resource, or of a gateway before it, refuses this"
	case notFound && says("deploymentnotfound"):
		hint = "there is no deployment " + cmp.Or(f.deploymentName(req), "of this name") +
			" in the resource: look up its name there (a new one takes minutes to work)"
	case notFound:
		hint = cmp.Or(f.pathMistake(req.URL, ownURL),
			"there is no such path: check TARGET_URL and the client's base URL")
	case status == http.StatusTooManyRequests:
		hint = "too many requests or tokens for the deployment's quota"
	}
	return hint, role
}

// deploymentName is the name of the deployment that a request asks for, in
// quotes, or empty if it is not known. It is in the path, or else it is the model
// in a small body. Nothing else of a request's body is ever shown.
func (f *forwarder) deploymentName(req *http.Request) string {
	var name string
	if _, rest, ok := strings.Cut(req.URL.Opaque, "/deployments/"); ok {
		name, _, _ = strings.Cut(rest, "/")
		name, _ = url.PathUnescape(name)
	} else if req.GetBody != nil {
		body, _ := req.GetBody()
		text, _ := io.ReadAll(body)
		var fields map[string]json.RawMessage
		json.Unmarshal(text, &fields)
		json.Unmarshal(fields["model"], &name)
	}
	const longest = 64 // Azure's limit for the name of a deployment
	if name == "" || len(name) > longest || !isPrintableASCII(name) {
		return ""
	}
	return strconv.Quote(f.secrets.safe(name, maxPiece))
}

// operations are the segments that follow /openai/v1/ or /anthropic/v1/.
var operations = nameSet("audio", "batches", "chat", "completions", "embeddings", "files",
	"fine_tuning", "images", "messages", "models", "realtime", "responses", "vector_stores")

// pathMistake names the usual mistakes that lead to a path which the service does
// not have. It is empty for any other path, and for one of a gateway's own. ownURL
// is as in clientURL.
func (f *forwarder) pathMistake(u *url.URL, ownURL string) string {
	const openAI, claude = "openai", "anthropic"
	// The path is prefix/api/v1/operation, where v1 may be missing.
	segments := strings.Split(u.Opaque, "/")
	i := slices.IndexFunc(segments, func(s string) bool { return s == openAI || s == claude })
	if i < 0 {
		return ""
	}
	api, rest := segments[i], strings.Join(segments[i+1:], "/")
	clientURL := f.targets.clientURLFor(api, ownURL)
	if clientURL == "" {
		return ""
	}
	hasV1 := strings.HasPrefix(rest, "v1/")
	operation, _, _ := strings.Cut(strings.TrimPrefix(rest, "v1/"), "/")
	hasVersion := u.Query().Has("api-version")

	// other is what to do for a client of the other API.
	other := func(client, otherAPI, version string) string {
		if otherURL := f.targets.clientURLFor(otherAPI, ownURL); otherURL != "" {
			return client + "'s base URL is " + otherURL + version
		}
		return client + " needs a TARGET_URL that ends in /" + otherAPI +
			"/, beside this one or in its place"
	}
	switch {
	case api == openAI && (operation == "messages" || operation == claude):
		// /openai/v1/messages, /openai/anthropic/v1/messages
		return other("Claude", claude, "")
	case api == claude && (operation == "chat" || operation == "responses" || operation == openAI):
		// /anthropic/v1/chat/completions, /anthropic/openai/v1/responses
		return other("GPT", openAI, "/v1")
	case hasV1 && (operation == "v1" || operation == openAI || operation == "deployments"):
		// /openai/v1/v1/responses, /openai/v1/deployments/D/chat/completions
		return "the client adds this itself: leave /v1 out of its base URL, as in " +
			clientURL + ", and out of TARGET_URL"
	case api == openAI && operation == "deployments" && !hasVersion:
		// /openai/deployments/D/chat/completions
		return "the query lacks api-version, for example ?api-version=2024-10-21"
	case !hasV1 && operations[operation] && !hasVersion:
		// /openai/chat/completions, /anthropic/messages
		return "the client's base URL lacks /v1: give it " + clientURL + "/v1"
	}
	return ""
}
