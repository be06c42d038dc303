package main

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
	"net/textproto"
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

// forwardedHeaders are the request headers that the service, or its support, makes use of, with
// forwardedPrefixes. All else stays here: credentials, cookies, Origin and Referer, whatever tells
// of the client's network, and headers that change what a front end routes to.
var forwardedHeaders = fields(`
	Accept Accept-Encoding Accept-Language Content-Type Content-Encoding Range If-Range User-Agent
	Idempotency-Key X-Client-Request-Id X-Request-Id Traceparent Tracestate
	Originator Version Session_id Session-Id Conversation_id Conversation-Id Thread_id Thread-Id
	X-Responsesapi-Include-Timing-Metrics X-Oai-Attestation
	Extra-Parameters Aoai-Evals X-Policy-Id Azureml-Model-Deployment Foundry-Features
	X-Ms-Client-Request-Id X-Ms-Return-Client-Request-Id X-Ms-Useragent X-Ms-Enable-Preview
	X-Ms-Oai-Image-Generation-Deployment`)

// forwardedPrefixes are those of the service's own headers and of its clients'. X-Ms- is not among
// them: App Service and Azure's front ends put the user's tokens and address under it.
var forwardedPrefixes = strings.Fields("Openai- X-Openai- X-Stainless- X-Codex- Anthropic-")

// credentialWords are parts of names, in lower case, that stay here in spite of their prefix.
var credentialWords = strings.Fields("key token auth cookie")

// webSocketHeaders go upstream with an upgrade (RFC 6455 §4.1), and so does Sec-WebSocket-Protocol
// less the key that may be in it.
var webSocketHeaders = fields("Sec-Websocket-Key Sec-Websocket-Version Sec-Websocket-Extensions")

// hopByHop are headers about one connection, which an answer takes no further (RFC 9110 §7.6.1).
var hopByHop = fields(`Connection Proxy-Connection Keep-Alive Te Trailer Transfer-Encoding Upgrade
	Proxy-Authenticate Proxy-Authorization`)

// othersPolicies are headers of an answer that are true of the upstream's host, but not of this
// proxy's.
var othersPolicies = map[string]bool{
	"Strict-Transport-Security": true, // must not be sent over plain HTTP (RFC 6797 §7.2)
	"Alt-Svc":                   true, // would have the client go past the proxy (RFC 7838 §2)
}

// credentialParams are the query parameters that carry a key or token, in lower case: those of
// Azure and its look-alikes, of older openai-node, of RFC 6750 §2.3 and of API Management.
var credentialParams = fields(`api-key x-api-key api_key authorization access_token
	subscription-key ocp-apim-subscription-key`)

func fields(names string) map[string]bool {
	set := make(map[string]bool)
	for _, name := range strings.Fields(names) {
		set[name] = true
	}
	return set
}

// keyProtocol precedes the key among the subprotocols that openai-node offers on a WebSocket.
const keyProtocol = "openai-insecure-api-key."

// maxSaid is how much of a refusal, in bytes, is looked at to explain it in the log.
const maxSaid = 16 << 10

// lingerTime is how long a client that is still sending may go on after the last byte for it.
const lingerTime = time.Second

// smallBody is the longest request body, in bytes, that is read before it is sent: it then goes out
// with the head, in one write up to WriteBufferSize, and can be sent again over a new connection if
// an idle one turns out to be dead. Longer ones, and those of unknown length, are streamed.
const smallBody = 256 << 10

// forwarder sends requests to the upstream with a token in the place of the client's credentials.
type forwarder struct {
	target    *url.URL // "https://my-aoai.openai.azure.com/openai/"
	key       string   // what clients must present; empty for nothing
	tokens    *tokenSource
	secrets   *secrets
	transport *http.Transport
	bodyTime  time.Duration // for a small body to arrive
	endTime   time.Duration // for one direction of a tunnel to end after the other
	active    atomic.Int64  // requests and tunnels under way, "streams" in the log
}

func newForwarder(cfg *config, tokens *tokenSource) *forwarder {
	dialer := &net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}
	return &forwarder{
		target:   cfg.target,
		key:      cfg.key,
		tokens:   tokens,
		secrets:  cfg.secrets,
		bodyTime: time.Minute,
		endTime:  time.Minute,
		transport: &http.Transport{
			Proxy:                  proxyTo(cfg.target),
			OnProxyConnectResponse: refusedByProxy,
			DialContext:            dialer.DialContext,
			TLSHandshakeTimeout:    10 * time.Second,
			TLSClientConfig:        &tls.Config{ClientSessionCache: tls.NewLRUClientSessionCache(0)},
			// HTTP/1.1 only: a stream per connection, none of which can stop the others.
			TLSNextProto:           map[string]func(string, *tls.Conn) http.RoundTripper{},
			MaxIdleConns:           0, // no limit but the next
			MaxIdleConnsPerHost:    1024,
			IdleConnTimeout:        60 * time.Second, // Azure's load balancers forget after 4 minutes
			ResponseHeaderTimeout:  0,                // a model may think for hours
			ExpectContinueTimeout:  0,                // Expect is not forwarded
			DisableCompression:     true,             // or it would ask for gzip and unpack it
			MaxResponseHeaderBytes: 1 << 20,
			WriteBufferSize:        16 << 10, // head and small body in one write
		},
	}
}

// refusedByProxy is the error for what HTTPS_PROXY answers to CONNECT; the transport's own would
// not say that it was the proxy who refused.
func refusedByProxy(_ context.Context, _ *url.URL, _ *http.Request, resp *http.Response) error {
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	return statusError{proxyAnswered, resp.StatusCode}
}

const proxyAnswered = "HTTPS_PROXY answered"

// warm begins to open the first connection to the upstream, so that the first request need not wait
// for it. It gives up its own request as soon as the transport dials: since Go 1.23 the transport
// dials on and keeps the connection for the next request; before that, warm has no effect. Nothing
// is sent but what opens the connection.
func (f *forwarder) warm() {
	ctx, cancel := context.WithCancel(context.Background())
	givenUp := make(chan struct{})
	giveUp := func() {
		cancel()
		<-givenUp // or the connection might come first, and the request be sent on it
	}
	trace := &httptrace.ClientTrace{ // a host that is an address has no DNS lookup
		DNSStart:     func(httptrace.DNSStartInfo) { giveUp() },
		ConnectStart: func(string, string) { giveUp() },
	}
	req := &http.Request{Method: http.MethodHead, URL: f.target, Header: http.Header{}}
	f.transport.RoundTrip(req.WithContext(httptrace.WithClientTrace(ctx, trace)))
	cancel()
	close(givenUp)
}

// ServeHTTP takes one request to the upstream and its answer back.
func (f *forwarder) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.active.Add(1)
	defer f.active.Add(-1)
	start := time.Now()
	log.Printf("%s %s from %s", f.secrets.safe(r.Method, maxPiece), f.redact(r.RequestURI),
		r.RemoteAddr)

	// Check the caller.
	upgrade := isWebSocket(r)
	if refusal := f.check(r, upgrade); refusal != nil {
		log.Printf("answered %d to %s: %s", refusal.status, r.RemoteAddr, refusal.message)
		refusal.write(w, r)
		return
	}

	// Build the upstream request. A small body is read for it, so that no token is fetched for a
	// request that never comes.
	client := http.NewResponseController(w)
	client.SetReadDeadline(start.Add(f.bodyTime)) // for this reading, not for a longer body's
	req, err := f.upstreamRequest(r, upgrade)
	if err != nil {
		e := &apiError{http.StatusRequestTimeout, "incomplete_body", "the request's body is incomplete"}
		log.Printf("answered %d to %s: %s: %s", e.status, r.RemoteAddr, e.message, cause(err))
		e.write(w, r)
		return
	}
	client.SetReadDeadline(time.Time{})

	// Get the token.
	t, err := f.tokens.token(r.Context())
	if err != nil {
		e := errLeft
		var failure *tokenError
		if errors.As(err, &failure) {
			e = &apiError{http.StatusServiceUnavailable, "no_token", noToken(r, err, f.key != "")}
			seconds := max(1, math.Ceil(failure.retryAfter.Seconds()))
			w.Header().Set("Retry-After", strconv.Itoa(int(seconds)))
		}
		f.logProblem(r, req, nil, start, err.Error())
		e.write(w, r)
		return
	}
	req.Header["Authorization"] = []string{t.authorization}

	// Send it. Full duplex lets an answer pass while the upload still runs; without it the server
	// would take the body away from the transport then, and cut the answer (golang/go#40747).
	client.EnableFullDuplex()
	body, streamed := req.Body.(*upload)
	if streamed && r.Header.Get("Expect") != "" && r.ProtoAtLeast(1, 1) {
		// Or the server would do so in mid-flight, or after an early answer take the body away.
		w.WriteHeader(http.StatusContinue)
	}
	ctx, stopTrace := traceAnswer(w, r)
	resp, err := f.transport.RoundTrip(req.WithContext(ctx))
	stopTrace()
	var upstream io.ReadWriteCloser // the connection, if the upstream has switched protocols
	if err == nil && resp.StatusCode < 200 {
		rwc, canWrite := resp.Body.(io.ReadWriteCloser)
		if upgrade && canWrite && strings.EqualFold(resp.Header.Get("Upgrade"), "websocket") {
			upstream = rwc
		} else {
			resp.Body.Close()
			err = statusError{"unexpected status", resp.StatusCode}
		}
	}
	if err != nil {
		text, hint := f.failure(err)
		e := &apiError{http.StatusBadGateway, "upstream_unreachable", withHint(text, hint)}
		var broken uploadError
		switch {
		case r.Context().Err() != nil:
			e = errLeft
		case errors.As(err, &broken):
			e = &apiError{http.StatusBadRequest, "invalid_body",
				"the request's body broke off or is malformed"}
		}
		f.logProblem(r, req, nil, start, e.message)
		e.write(w, r)
		return
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusUnauthorized {
		f.tokens.rejected(t)
	}

	// Copy the answer.
	if upstream != nil {
		f.tunnel(w, r, resp, upstream)
		return
	}
	copyHeader(w.Header(), resp)
	if streamed { // some of it may be yet to come
		w.Header().Set("Connection", "close")
	}
	w.WriteHeader(resp.StatusCode)
	if !r.ProtoAtLeast(1, 1) { // or the end of a drain would pass for the answer's end
		defer context.AfterFunc(r.Context(), func() { reset(r) })()
	}
	said, err := copyBody(w, resp)
	if resp.StatusCode >= 400 {
		plain, canRead := unpacked(said, resp.Header.Get("Content-Encoding"))
		f.logProblem(r, req, resp, start, withHint(f.explain(resp, plain, canRead, t)))
	}
	if err != nil {
		var left clientError // many clients leave after the last event
		if r.Context().Err() == nil && !errors.As(err, &left) {
			f.logProblem(r, req, resp, start, "answer cut: "+cause(err))
		}
		abort(w, r)
	}
	if streamed {
		body.end(client)
	}
}

// noToken says why there is no token, if the caller has a key or is a program on this host, and not a
// web page's: the endpoint's words are nobody else's business.
func noToken(r *http.Request, err error, hasKey bool) string {
	host, _, _ := net.SplitHostPort(r.RemoteAddr)
	if hasKey || isLoopback(host) && !mayBeWebPage(r) {
		return "no token: " + err.Error()
	}
	return "no token"
}

// check decides whether the request may go upstream, and says why not.
func (f *forwarder) check(r *http.Request, upgrade bool) *apiError {
	switch method := strings.ToUpper(r.Method); {
	// The answer to TRACE, or TRACK as IIS has it, would repeat the token.
	case method == http.MethodConnect, method == http.MethodTrace, method == "TRACK":
		return &apiError{http.StatusMethodNotAllowed, "method_not_allowed",
			method + " is not forwarded"}
	case !strings.HasPrefix(r.RequestURI, "/"):
		return &apiError{http.StatusBadRequest, "invalid_path",
			"the request target must be a path: this is no HTTP proxy for other hosts"}
	case f.key == "" && mayBeWebPage(r):
		return &apiError{http.StatusForbidden, "foreign_web_page",
			"Host, Origin or Sec-Fetch-Site is that of a web page: " +
				"call http://localhost or 127.0.0.1 from a program, or set EXPECTED_KEY"}
	case !f.authorized(r, upgrade):
		return &apiError{http.StatusUnauthorized, "invalid_api_key", "wrong or missing key: " +
			"send the proxy's EXPECTED_KEY as api-key, x-api-key or Authorization: Bearer"}
	case !isPlainPath(r.URL.Path):
		return &apiError{http.StatusBadRequest, "invalid_path", "the path must be UTF-8, " +
			"without . or .. segments and without escapes of escapes such as %252e"}
	}
	return nil
}

// mayBeWebPage tells whether a browser may have sent the request for a web page. A page's own
// requests show in Origin or Sec-Fetch-Site; one whose host name was made to point to a loopback
// address (DNS rebinding) has neither on a GET, but that name in Host.
func mayBeWebPage(r *http.Request) bool {
	host := url.URL{Host: r.Host}
	local, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	if ok && local.IP.IsLoopback() && !isLoopback(host.Hostname()) {
		return true
	}
	foreign := func(origin string) bool { // null is, too
		u, err := url.Parse(origin)
		return err != nil || !isLoopback(u.Hostname())
	}
	crossSite := func(site string) bool { return site != "same-origin" && site != "none" }
	return slices.ContainsFunc(r.Header["Origin"], foreign) ||
		slices.ContainsFunc(r.Header["Sec-Fetch-Site"], crossSite)
}

// authorized compares the keys that the request presents with the expected one, by their hashes so
// that neither content nor length shows in the time it takes.
func (f *forwarder) authorized(r *http.Request, upgrade bool) bool {
	if f.key == "" {
		return true
	}
	keys := slices.Concat(r.Header["Api-Key"], r.Header["X-Api-Key"])
	for _, value := range r.Header["Authorization"] {
		if scheme, key, _ := strings.Cut(value, " "); strings.EqualFold(scheme, "Bearer") {
			keys = append(keys, strings.TrimSpace(key))
		}
	}
	if upgrade { // a browser's WebSocket cannot set headers
		keys = append(keys, r.URL.Query()["api-key"]...)
		for _, protocol := range listed(r.Header["Sec-Websocket-Protocol"]) {
			if key, ok := strings.CutPrefix(protocol, keyProtocol); ok {
				keys = append(keys, key)
			}
		}
	}
	expected := sha256.Sum256([]byte(f.key))
	return slices.ContainsFunc(keys, func(key string) bool {
		hash := sha256.Sum256([]byte(key))
		return subtle.ConstantTimeCompare(hash[:], expected[:]) == 1
	})
}

// isPlainPath tells whether a path, decoded once, is the same to every server: it has no . or ..
// segment, with which and our token a client would get at every other API of the resource, nothing
// that a second decoding would change, and no overlong form of a dot or slash, which is no UTF-8.
func isPlainPath(path string) bool {
	segments := strings.FieldsFunc(path, func(r rune) bool {
		// Each of these ends a segment to some servers.
		return strings.ContainsRune(`/\;?#`, r) || unicode.IsSpace(r) || unicode.IsControl(r)
	})
	return utf8.ValidString(path) && !strings.Contains(path, "%") &&
		!slices.Contains(segments, ".") && !slices.Contains(segments, "..")
}

// rawPath is the path as the client sent it; r.URL.Path has lost the escapes.
func rawPath(r *http.Request) string {
	path, _, _ := strings.Cut(r.RequestURI, "?")
	return path
}

// upstreamRequest is r as the upstream gets it, but for the token. Of r's header only what the
// lists above name is copied, and the transport frames the body anew, so that no second request can
// be smuggled in.
func (f *forwarder) upstreamRequest(r *http.Request, upgrade bool) (*http.Request, error) {
	req := &http.Request{
		Method:        r.Method,
		URL:           upstreamURL(f.target, rawPath(r)),
		Header:        upstreamHeader(r.Header, upgrade),
		ContentLength: r.ContentLength,
	}
	req.URL.RawQuery, req.URL.ForceQuery = cutCredentials(r.URL.RawQuery), r.URL.ForceQuery
	switch {
	case r.ContentLength == 0:
	case r.ContentLength > 0 && r.ContentLength <= smallBody:
		body := make([]byte, r.ContentLength)
		if _, err := io.ReadFull(r.Body, body); err != nil {
			return nil, err
		}
		req.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body)), nil }
		req.Body, _ = req.GetBody()
	default:
		req.Body = &upload{Reader: r.Body}
	}
	return req, nil
}

// upload is a request body that is streamed. Closing it does nothing, as the server closes its own.
type upload struct {
	io.Reader
	stopped atomic.Bool // the answer is over: no more goes upstream
}

// uploadError is a failure to read the client's body, to be told from the upstream's failures.
type uploadError struct{ error }

func (u *upload) Read(p []byte) (int, error) {
	if u.stopped.Load() {
		return 0, uploadError{errors.New("answered already")}
	}
	n, err := u.Reader.Read(p)
	if err != nil && err != io.EOF {
		err = uploadError{err}
	}
	return n, err
}

func (u *upload) Close() error { return nil }

// end stops the upload after its answer, and waits for what the client still sends. Left to itself
// the server would wait for as long as that takes, reset the connection under a client that has yet
// to read the answer, or take the rest of a body for the next request (golang/go#68560).
func (u *upload) end(client *http.ResponseController) {
	u.stopped.Store(true)
	client.Flush()
	client.SetReadDeadline(time.Now().Add(lingerTime))
	io.Copy(io.Discard, u.Reader)
}

// upstreamURL is where a request for path goes, path in the form that goes out. TARGET_URL's path is
// put before it, less what they share: many clients add /openai themselves. Clients whose base URL
// ends in a slash add another one, which is dropped, as the service knows no empty segments.
func upstreamURL(target *url.URL, path string) *url.URL {
	base := target.EscapedPath()
	path = "/" + strings.TrimLeft(path, "/")
	for i := range base {
		if shared := base[i:]; shared[0] == '/' && strings.HasPrefix(path+"/", shared) {
			path = path[min(len(shared), len(path)):]
			break
		}
	}
	// With two slashes in front it would be a URL with another host to some.
	path = "/" + strings.TrimLeft(base+strings.TrimLeft(path, "/"), "/")
	return &url.URL{Scheme: target.Scheme, Host: target.Host, Opaque: path}
}

// upstreamHeader is the client's header less what stays here.
func upstreamHeader(in http.Header, upgrade bool) http.Header {
	out := make(http.Header, len(in)+1)
	for name, values := range in {
		if isForwarded(name) || upgrade && webSocketHeaders[name] {
			out[name] = values
		}
	}
	for _, name := range listed(in["Connection"]) {
		out.Del(name)
	}
	if key := out["Idempotency-Key"]; key != nil {
		delete(out, "Idempotency-Key") // so spelt it has the transport send a POST again
		out["idempotency-key"] = key
	}
	if out["User-Agent"] == nil {
		out["User-Agent"] = []string{""} // or the transport would add its own
	}
	if upgrade {
		out["Connection"] = []string{"Upgrade"}
		out["Upgrade"] = []string{"websocket"}
		protocols := slices.DeleteFunc(listed(in["Sec-Websocket-Protocol"]), func(p string) bool {
			return strings.Contains(strings.ToLower(p), keyProtocol)
		})
		if len(protocols) > 0 {
			out["Sec-Websocket-Protocol"] = []string{strings.Join(protocols, ", ")}
		}
	}
	return out
}

func isForwarded(name string) bool {
	hasPrefix := func(prefix string) bool { return strings.HasPrefix(name, prefix) }
	if !slices.ContainsFunc(forwardedPrefixes, hasPrefix) {
		return forwardedHeaders[name]
	}
	lower := strings.ToLower(name)
	hasWord := func(word string) bool { return strings.Contains(lower, word) }
	return !slices.ContainsFunc(credentialWords, hasWord)
}

// isWebSocket tells whether the client asks for a WebSocket (RFC 6455 §4.1). Other upgrades, h2c
// among them, are not forwarded: what follows them could not be checked. Nor is one with a body,
// which the transport and the tunnel would both read.
func isWebSocket(r *http.Request) bool {
	return r.Method == http.MethodGet && r.ProtoAtLeast(1, 1) && r.ContentLength == 0 &&
		strings.EqualFold(r.Header.Get("Upgrade"), "websocket") &&
		slices.ContainsFunc(listed(r.Header["Connection"]), func(t string) bool {
			return strings.EqualFold(t, "upgrade")
		})
}

// listed are the items of a header that holds comma-separated lists.
func listed(values []string) (items []string) {
	for _, value := range values {
		for _, item := range strings.Split(value, ",") {
			items = append(items, strings.TrimSpace(item))
		}
	}
	return items
}

// cutCredentials takes the credentials out of a query, which some servers split at ; too; all else
// stays byte for byte. Names count decoded and in any case, as the upstream may read them so.
func cutCredentials(query string) string {
	isCredential := func(pair string) bool {
		name, _, _ := strings.Cut(pair, "=")
		name, _ = url.QueryUnescape(name)         // with a wrong escape it is none of these names
		name = strings.Trim(name, "? \t\r\n\x00") // as lenient servers do
		return credentialParams[strings.ToLower(name)]
	}
	var kept []string
	for _, pairs := range strings.Split(query, "&") {
		rest := slices.DeleteFunc(strings.Split(pairs, ";"), isCredential)
		if len(rest) > 0 {
			kept = append(kept, strings.Join(rest, ";"))
		}
	}
	return strings.Join(kept, "&")
}

// copyHeader sets the answer's header, less what is about the upstream's connection.
func copyHeader(h http.Header, resp *http.Response) {
	named := listed(resp.Header["Connection"])
	isNamed := func(name string) bool {
		return name != "Content-Length" && // framing is not for the upstream to take away
			slices.ContainsFunc(named, func(n string) bool { return strings.EqualFold(n, name) })
	}
	for name, values := range resp.Header {
		if !hopByHop[name] && !othersPolicies[name] && !isNamed(name) {
			h[name] = values
		}
	}
	if h["Content-Type"] == nil {
		h["Content-Type"] = nil // or the server would guess one
	}
	if strings.HasPrefix(h.Get("Content-Type"), "text/event-stream") && h["X-Accel-Buffering"] == nil {
		h.Set("X-Accel-Buffering", "no") // or an nginx in front would hold events back
	}
}

// buffers are what most answers are copied through: small, as open streams are many.
var buffers = sync.Pool{New: func() any { return new([4 << 10]byte) }}

// clientError is a failure to write to the client, to be told from the upstream's failures.
type clientError struct{ error }

// copyBody passes the answer's body on: each read is written and flushed at once. Of a refusal it
// returns the first bytes as said, for the log to explain it.
func copyBody(w http.ResponseWriter, resp *http.Response) (said []byte, err error) {
	small := buffers.Get().(*[4 << 10]byte)
	defer buffers.Put(small)
	buf := small[:]
	out := http.NewResponseController(w)
	headFlushed := flushSoon(out, resp)
	n, readErr := resp.Body.Read(buf)
	if err := headFlushed(); err != nil {
		return nil, clientError{err}
	}
	for {
		if resp.StatusCode >= 400 {
			said = append(said, buf[:min(n, maxSaid-len(said))]...)
		}
		if _, err := w.Write(buf[:n]); err != nil {
			return said, clientError{err}
		}
		if readErr == io.EOF {
			break
		}
		if readErr != nil {
			return said, readErr
		}
		if err := out.Flush(); err != nil {
			return said, clientError{err}
		}
		if n == len(buf) && n == len(small) { // a bulky answer
			buf = make([]byte, 32<<10)
		}
		n, readErr = resp.Body.Read(buf)
	}
	return said, nil
}

// flushSoon sends the head before the body has begun. A small body of known length mostly comes
// with its head, though; within a millisecond both go out in one write, which saves a tenth of the
// CPU time of a small request. The returned function ends the wait, when the first read is done.
func flushSoon(out *http.ResponseController, resp *http.Response) (done func() error) {
	if resp.ContentLength < 0 || resp.ContentLength > 4<<10 {
		err := out.Flush()
		return func() error { return err }
	}
	flushed := make(chan error, 1)
	timer := time.AfterFunc(time.Millisecond, func() { flushed <- out.Flush() })
	return func() error {
		if timer.Stop() {
			return nil
		}
		return <-flushed
	}
}

// abort breaks the client's connection, so that it doesn't take a part for the whole.
func abort(w http.ResponseWriter, r *http.Request) {
	reset(r)
	// Or the server would first wait for the rest of the request.
	http.NewResponseController(w).SetReadDeadline(time.Now())
	r.Body.Close()
	panic(http.ErrAbortHandler)
}

// connKey is the key of a request's context under which the server puts the client's connection.
type connKey struct{}

// reset ends the connection of an HTTP/1.0 client. Where an answer has no length, all but a reset
// would tell it that it has the whole.
func reset(r *http.Request) {
	if conn, ok := r.Context().Value(connKey{}).(*net.TCPConn); ok && !r.ProtoAtLeast(1, 1) {
		conn.SetLinger(0)
		conn.Close()
	}
}

// tunnel copies bytes both ways between the client and the upstream, after its 101. Each direction is
// copied to its own end, which is then passed on, and the tunnel ends with the second of them: who
// has said its last may still be waiting for the other's. The end of the drain ends both.
func (f *forwarder) tunnel(w http.ResponseWriter, r *http.Request, resp *http.Response,
	upstream io.ReadWriteCloser) {
	client, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		log.Printf("the connection of %s cannot be upgraded", r.RemoteAddr)
		return
	}
	closeBoth := func() {
		client.Close()
		upstream.Close()
	}
	defer closeBoth()
	defer context.AfterFunc(r.Context(), closeBoth)()

	answer := http.Response{ProtoMajor: 1, ProtoMinor: 1, StatusCode: resp.StatusCode}
	answer.Header = http.Header{}
	copyHeader(answer.Header, resp)
	answer.Header.Set("Connection", "Upgrade")
	answer.Header.Set("Upgrade", "websocket")
	answer.Write(buffered)
	if buffered.Flush() != nil {
		return
	}

	// The first bytes of the client may be in the server's buffer already. What follows is read from
	// the connection itself: read through that buffer, its end would cancel r.Context().
	first, _ := buffered.Reader.Peek(buffered.Reader.Buffered())
	ended := make(chan bool, 2)
	go func() {
		copyToEnd(upstream, io.MultiReader(bytes.NewReader(first), client))
		ended <- true
	}()
	go func() {
		copyToEnd(client, upstream)
		ended <- true
	}()
	<-ended
	// The answer to a Close frame takes a moment (RFC 6455 §7.1.1). Who has gone altogether cannot be
	// told from who still waits for it.
	timer := time.AfterFunc(f.endTime, func() {
		upstream.Close()
		client.SetDeadline(time.Now())
	})
	<-ended
	timer.Stop()
	linger(client)
}

// copyToEnd copies from src to dst until src ends, and ends what is sent to dst, which can still be
// read. The upstream's connection offers that from Go 1.24 on.
func copyToEnd(dst io.Writer, src io.Reader) {
	io.Copy(dst, src)
	if half, ok := dst.(interface{ CloseWrite() error }); ok {
		half.CloseWrite()
	}
}

// earlyAnswerTime is how long the failure of an upload waits for an answer that came before it: an
// upstream that answers early may hang up then, and the transport prefers a failure to an answer.
const earlyAnswerTime = 250 * time.Millisecond

// traceAnswer returns a context that passes 1xx answers on to w until stop is called. 100 is a
// matter between two neighbours (RFC 9110 §15.2), and HTTP/1.0 knows none of them. The transport
// calls from goroutines of its own, even after it has given up the request.
func traceAnswer(w http.ResponseWriter, r *http.Request) (ctx context.Context, stop func()) {
	var mu sync.Mutex // protects stopped, and w from two at a time
	stopped := !r.ProtoAtLeast(1, 1)
	trace := &httptrace.ClientTrace{
		Got1xxResponse: func(code int, header textproto.MIMEHeader) error {
			mu.Lock()
			defer mu.Unlock()
			if !stopped && code != http.StatusContinue {
				copyHeader(w.Header(), &http.Response{Header: http.Header(header)})
				w.WriteHeader(code)
				clear(w.Header())
			}
			return nil
		},
		WroteRequest: func(info httptrace.WroteRequestInfo) {
			if info.Err != nil {
				time.Sleep(earlyAnswerTime)
			}
		},
	}
	stop = func() {
		mu.Lock()
		defer mu.Unlock()
		stopped = true
	}
	return httptrace.WithClientTrace(r.Context(), trace), stop
}

// apiError is an answer of the proxy's own.
type apiError struct {
	status  int
	code    string // "invalid_api_key"
	message string
}

// errLeft is for a client that has ended its connection, or its half of it, and so can hardly read
// this. The end of a drain looks the same.
var errLeft = &apiError{http.StatusServiceUnavailable, "cancelled", "client left, or the proxy stopped"}

// write answers with the error in the form of OpenAI's.
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
		w.Header().Set("Connection", "close")
	}
	if e.status == http.StatusUnauthorized {
		w.Header().Set("WWW-Authenticate", "Bearer")
	}
	w.WriteHeader(e.status)
	io.WriteString(w, body)
	if r.ContentLength == 0 {
		return
	}

	// Nobody wants the body; the server would read it, or reset the connection of whoever sends it.
	out := http.NewResponseController(w)
	out.Flush()
	if client, _, err := out.Hijack(); err == nil {
		linger(client)
		client.Close()
	}
}

// linger ends what is for the client, and waits until it has ended, too: to close the connection
// under a client that is still sending would lose what it has yet to read.
func linger(client net.Conn) {
	if tcp, ok := client.(*net.TCPConn); ok && tcp.CloseWrite() == nil {
		tcp.SetReadDeadline(time.Now().Add(lingerTime))
		io.Copy(io.Discard, tcp)
	}
}

// failure says in which step a call to the upstream failed, how, and what to do about it.
func (f *forwarder) failure(err error) (text, hint string) {
	var dns *net.DNSError
	var certificate *tls.CertificateVerificationError
	var status statusError
	var op *net.OpError
	isOp, isStatus := errors.As(err, &op), errors.As(err, &status)
	step := "connection broke: "
	switch {
	case isOp && op.Op == "proxyconnect", isStatus && status.what == proxyAnswered:
		step, hint = "connection failed: ", "HTTPS_PROXY names the proxy that failed"
	case isStatus:
		step = ""
	case errors.As(err, &dns):
		step, hint = "DNS lookup failed: ", "check TARGET_URL's host name, and this host's DNS"
	case errors.As(err, &certificate):
		step, hint = "certificate not trusted: ", "name a file with your own CA in SSL_CERT_FILE, "+
			"unless its dates or names are wrong"
	case isOp && op.Op == "dial":
		step, hint = "connection failed: ", "a firewall? HTTPS_PROXY names a proxy to go through"
	}
	return "no answer from " + f.target.Host + ": " + step + f.secrets.safe(cause(err), maxPiece), hint
}

// roleName is the role that lets an identity use the models of a resource.
const roleName = "Cognitive Services OpenAI User"

// unpacked is the beginning of an answer's body without its compression, which the client asked
// for. It cannot be read if the standard library does not know that.
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
	case "deflate": // is zlib (RFC 9110 §8.4.1.2)
		r, err = zlib.NewReader(bytes.NewReader(body))
		if err != nil { // some servers send it bare, as the same section says
			r, err = flate.NewReader(bytes.NewReader(body)), nil
		}
	default:
		return nil, false
	}
	if err != nil {
		return nil, false
	}
	plain, _ = io.ReadAll(io.LimitReader(r, maxSaid)) // the error is that the beginning ends
	return plain, len(plain) > 0
}

// explain says what an answer means that is not as it should be, and what to do about it. Plain is
// the beginning of its body, if that can be read.
func (f *forwarder) explain(resp *http.Response, plain []byte, canRead bool, t token) (
	text, hint string) {
	text = "answered " + statusText(resp.StatusCode)
	if code := reason(plain); code != "" && code != strconv.Itoa(resp.StatusCode) {
		text += ": " + f.secrets.safe(code, maxPiece)
	}
	if after := resp.Header.Get("Retry-After"); after != "" {
		text += "; Retry-After: " + f.secrets.safe(after, maxPiece)
	}
	hint = remedy(resp.StatusCode, strings.ToLower(string(plain)), t)
	if !canRead && resp.StatusCode != http.StatusTooManyRequests {
		hint = "the body, which says why, is compressed in a way that cannot be read here"
	}
	return text, f.secrets.safe(hint, maxPiece)
}

// reason is the code of a refusal, and the parameter that it is about. The message is left out, as it
// may quote a prompt, and so is what does not look like an identifier.
func reason(body []byte) string {
	var answer struct {
		Error struct{ Code, Type, Param any }
	}
	if json.Unmarshal(body, &answer) != nil {
		return ""
	}
	text := cmp.Or(identifier(answer.Error.Code), identifier(answer.Error.Type)) // Claude has no code
	if param := identifier(answer.Error.Param); param != "" {
		text += " (param " + param + ")"
	}
	return strings.TrimSpace(text)
}

// identifier is a JSON string such as "messages[0].content", or empty.
func identifier(value any) string {
	text, _ := value.(string)
	if len(text) > 64 || !consistsOf(text, letters+digits+"_-.[]") {
		return ""
	}
	return text
}

// remedy is what to do about a usual refusal of the token t. What was said is in lower case.
func remedy(status int, said string, t token) string {
	says := func(word string) bool { return strings.Contains(said, word) }
	unauthorized, forbidden := status == http.StatusUnauthorized, status == http.StatusForbidden
	c := t.claims()
	switch {
	case strings.HasPrefix(said, "<"):
		return "a web page answered, not the service: a proxy or firewall on the way?"
	case (status == http.StatusBadRequest || unauthorized) && says("subdomain"):
		return "a regional endpoint takes no tokens: " +
			"use the resource's own, https://NAME.openai.azure.com/openai/"
	case unauthorized && says("missing subscription key"):
		return "the gateway wants a key of its own, which the proxy does not send: " +
			"let it accept the token"
	case unauthorized && says("audience") && !says(strings.ToLower(c.Audience)):
		return "the token is for " + c.Audience + ", the wrong audience: " +
			"set AZURE_OPENAI_SCOPE for this cloud or service"
	case unauthorized && says("audience"):
		return "the token's audience is right: check this host's clock, " +
			"and that the identity is of the resource's tenant"
	case forbidden && (says("firewall") || says("private") || says("network")):
		return "the resource's network rules refuse this host: " +
			"allow its network or use the private endpoint"
	case unauthorized || forbidden && says("permission"):
		return "the identity with object id " + c.Object + " lacks the role " + roleName +
			" on the resource (a new assignment takes minutes to work)"
	case forbidden:
		return "a policy or network rule of the resource, or of a gateway before it, refuses this"
	case status == http.StatusNotFound && says("deploymentnotfound"):
		return "there is no deployment of this name in the resource"
	case status == http.StatusNotFound:
		return "there is no such path: check TARGET_URL and the client's base URL"
	case status == http.StatusTooManyRequests:
		return "too many requests or tokens for the deployment's quota"
	}
	return ""
}

// logProblem writes the second line of the request r, for what went wrong with the upstream request
// req and its answer resp, if there was one. A client that leaves is the cause of all else.
func (f *forwarder) logProblem(r, req *http.Request, resp *http.Response,
	start time.Time, what string) {
	if r.Context().Err() != nil {
		what = errLeft.message
	}
	if resp != nil && resp.Header.Get("Apim-Request-Id") != "" {
		what += "; apim-request-id " + f.secrets.safe(resp.Header.Get("Apim-Request-Id"), maxPiece)
	}
	took := time.Since(start).Round(time.Millisecond)
	log.Printf("%s %s://%s%s after %v: %s", f.secrets.safe(req.Method, maxPiece), req.URL.Scheme,
		req.URL.Host, f.redact(req.URL.RequestURI()), took, what)
}

// redact is a request target for the log: without credentials, not at all if a secret is in it once
// it is decoded, and quoted if it has bytes that could forge a line or hide in it.
func (f *forwarder) redact(uri string) string {
	if !strings.HasPrefix(uri, "/") {
		return "(no path)" // but a URL, say, that holds a password
	}
	path, query, found := strings.Cut(uri, "?")
	if found {
		path += "?" + cutCredentials(query)
	}
	plain, err := url.PathUnescape(path)
	if err != nil {
		return f.redact(uri[:strings.Index(uri, "?")]) + "?(malformed)"
	}
	form, _ := url.QueryUnescape(path) // in which + is a space
	if f.secrets.redact(plain) != plain || form != plain && f.secrets.redact(form) != form {
		return "REDACTED"
	}
	if !isPrintableASCII(path) {
		path = strconv.QuoteToASCII(path)
	}
	return f.secrets.safe(path, maxPiece)
}
