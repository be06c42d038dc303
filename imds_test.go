package main

// The tests of imds.go: first fakes and helpers, then the token source, the endpoint, one fetch,
// parsing, and last the fuzz targets. The log, the upstream and the program that they use are in
// forward_test.go.

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Fakes and helpers.

// fakeIdentity is an identity endpoint on a loopback address that gives token-1, token-2 and so on,
// each for an hour, and counts what it is asked.
type fakeIdentity struct {
	*httptest.Server
	fetches atomic.Int64
	answer  atomic.Pointer[http.HandlerFunc] // if not nil, answers in the place of the above
}

func newFakeIdentity(t testing.TB) *fakeIdentity {
	t.Helper()
	f := &fakeIdentity{}
	f.answerWith(nil)
	f.Server = httptest.NewServer(f)
	t.Cleanup(f.Close)
	return f
}

func (f *fakeIdentity) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	n := f.fetches.Add(1)
	if answer := *f.answer.Load(); answer != nil {
		answer(w, r)
		return
	}
	io.WriteString(w, tokenAnswer(fmt.Sprint("token-", n), time.Hour))
}

// answerWith makes f answer by handler from now on; nil is to give tokens.
func (f *fakeIdentity) answerWith(handler http.HandlerFunc) { f.answer.Store(&handler) }

func (f *fakeIdentity) wantFetches(t testing.TB, want int64) {
	t.Helper()
	if got := f.fetches.Load(); got != want {
		t.Fatalf("the endpoint was asked %d times, want %d", got, want)
	}
}

// tokenAnswer gives a token for exactly life. What IMDS has more, an expires_on, might be a second
// off.
func tokenAnswer(token string, life time.Duration) string {
	return fmt.Sprintf(`{"access_token":%q,"expires_in":"%d","token_type":"Bearer",`+
		`"resource":"https://cognitiveservices.azure.com"}`, token, int(life.Seconds()))
}

// giveLater answers with a token when release is closed, and tells what has arrived.
func giveLater(token string) (answer http.HandlerFunc, arrived, release chan struct{}) {
	arrived, release = make(chan struct{}, 9), make(chan struct{})
	return func(w http.ResponseWriter, r *http.Request) {
		arrived <- struct{}{}
		select {
		case <-release:
			io.WriteString(w, tokenAnswer(token, time.Hour))
		case <-r.Context().Done():
		}
	}, arrived, release
}

// answer answers with status and body, and with a header of names and values.
func answer(status int, body string, header ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(status)
		io.WriteString(w, body)
	}
}

// answerRaw answers with the bytes of text and hangs up. Before that it reads a small body, as
// closing a connection with unread bytes would reset it.
func answerRaw(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if 0 < r.ContentLength && r.ContentLength <= 64<<10 {
			io.Copy(io.Discard, r.Body)
		}
		conn, _, _ := http.NewResponseController(w).Hijack()
		io.WriteString(conn, text)
		conn.Close()
	}
}

// arcAgent gives a token to whoever shows it a key, which its challenge says is in file, and notes
// the keys it is shown.
func arcAgent(file string, shown chan<- string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		key := r.Header.Get("Authorization")
		if key == "" {
			w.Header().Set("WWW-Authenticate", "Basic realm="+file)
			w.WriteHeader(401)
			return
		}
		shown <- key
		io.WriteString(w, tokenAnswer("token", time.Hour))
	}
}

func writeFile(t testing.TB, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// noon is what a fakeClock shows first: months off the clock of the fakes.
const noon = 1772366400

// fakeClock moves, and its timers fire, only when the test says so.
type fakeClock struct {
	mu     sync.Mutex
	time   time.Time
	pauses chan fakeTimer // of the token source
	waits  chan fakeTimer // of requests: those of 20 s
	pause  fakeTimer      // the last that wantPause has seen
}

type fakeTimer struct {
	d     time.Duration
	fires chan time.Time
}

func (c *fakeClock) now() time.Time { return c.advance(0) }

func (c *fakeClock) advance(d time.Duration) time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.time = c.time.Add(d)
	return c.time
}

func (c *fakeClock) after(d time.Duration) <-chan time.Time {
	timer := fakeTimer{d, make(chan time.Time)}
	if d == 20*time.Second {
		c.waits <- timer
	} else {
		c.pauses <- timer
	}
	return timer.fires
}

// untilRefresh is how long a token source pauses with a token of a fakeIdentity.
const untilRefresh = 48 * time.Minute

// wantPause waits until the token source, whose try has ended then, begins to pause.
func (c *fakeClock) wantPause(t testing.TB, want time.Duration) {
	t.Helper()
	c.pause = <-c.pauses
	if c.pause.d != want {
		t.Fatalf("got a pause of %v, want %v", c.pause.d, want)
	}
}

// Environments: NAME=value NAME=value, where URL is the fake's.
const (
	imdsEnv       = "AZURE_POD_IDENTITY_AUTHORITY_HOST=URL"
	appServiceEnv = "IDENTITY_ENDPOINT=URL/msi IDENTITY_HEADER=s3cret"
	mlEnv         = "MSI_ENDPOINT=URL/ml MSI_SECRET=s3cret"
	arcEnv        = "IDENTITY_ENDPOINT=URL/arc IMDS_ENDPOINT=URL"
	workloadEnv   = "AZURE_AUTHORITY_HOST=URL/ AZURE_TENANT_ID=tenant AZURE_CLIENT_ID=c1 " +
		"AZURE_FEDERATED_TOKEN_FILE="
)

// chooseEndpoint chooses the endpoint for env as the program does.
func chooseEndpoint(env string, arc arcFiles) (*endpoint, error) {
	return newEndpoint(parseVars(env, " ").get, "https://cognitiveservices.azure.com/.default", arc)
}

// newTestEndpoint returns the endpoint for env, and its clock. Azure Arc's keys are in keys. A test
// that fails asks the fake, too, and not the real IMDS.
func newTestEndpoint(t testing.TB, f *fakeIdentity, env, keys string) (*endpoint, *fakeClock) {
	t.Helper()
	env = strings.ReplaceAll(imdsEnv+" "+env, "URL", f.URL)
	e, err := chooseEndpoint(env, arcFiles{"/nowhere", keys})
	if err != nil {
		t.Fatal(err)
	}
	c := &fakeClock{time: time.Unix(noon, 0).UTC(), pauses: make(chan fakeTimer, 99),
		waits: make(chan fakeTimer, 999)}
	e.now = c.now
	return e, c
}

// testTokens is a running token source, and what it works with.
type testTokens struct {
	*tokenSource
	*fakeClock
	*fakeIdentity
	log  *testLog
	stop func() // ends run, and waits for that
}

// newTestTokens starts a token source whose endpoint answers by handler. Its test must end soon.
func newTestTokens(t testing.TB, handler http.HandlerFunc) *testTokens {
	t.Helper()
	hangs := time.AfterFunc(safetyNet, func() { panic(t.Name() + " hangs") })
	t.Cleanup(func() { hangs.Stop() })
	f := newFakeIdentity(t)
	f.answerWith(handler)
	e, c := newTestEndpoint(t, f, imdsEnv, "")
	s := &testTokens{newTokenSource(e, false), c, f, followLog(t), nil}
	s.tokenSource.now, s.tokenSource.after = c.now, c.after
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		s.run(ctx)
		close(ended)
	}()
	s.stop = func() {
		cancel()
		<-ended
	}
	t.Cleanup(s.stop)
	return s
}

// pass lets the time of the last pause pass, which the token source must be in. The endpoint
// answers by next from then on.
func (s *testTokens) pass(next http.HandlerFunc) {
	s.answerWith(next)
	s.pause.fires <- s.advance(s.pause.d)
}

// ask asks for a token, and returns the header with it, or why there is none.
func (s *testTokens) ask(ctx context.Context) string {
	t, failure := s.await(ctx)
	if failure != nil {
		return failure.Error()
	}
	return t.authorization
}

// want asserts what a request gets that must not wait.
func (s *testTokens) want(t testing.TB, want string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cancel() // it would not wait for long
	got := s.ask(ctx)
	if !strings.Contains(got, want) || len(s.waits) > 0 {
		t.Fatalf("got %q, want %q at once; %d requests wait", got, want, len(s.waits))
	}
}

// waiting begins a request that has to wait, and returns when it does. late fires when it has
// waited for 20 s.
func (s *testTokens) waiting() (request chan string, late chan<- time.Time) {
	request = make(chan string, 1)
	go func() { request <- s.ask(context.Background()) }()
	return request, (<-s.waits).fires
}

// wantAnswer asserts what a request gets that had to wait.
func wantAnswer(t testing.TB, request <-chan string, want string) {
	t.Helper()
	if got := <-request; !strings.Contains(got, want) {
		t.Fatalf("got %q, want %q", got, want)
	}
}

// The token source.

func TestFiveHundredRequestsMakeOneFetch(t *testing.T) {
	for name, before := range map[string]int64{"cold": 0, "at expiry": 1} { // tokens before
		answer, _, release := giveLater("token")
		s := newTestTokens(t, answer)
		if name == "at expiry" {
			close(release)
			s.wantPause(t, untilRefresh)
			answer, _, release = giveLater("token")
			s.answerWith(answer)
			s.advance(time.Hour)
		}
		var requests []chan string
		for range 500 {
			request, _ := s.waiting()
			requests = append(requests, request)
		}
		close(release)
		for _, request := range requests {
			wantAnswer(t, request, "Bearer token")
		}
		s.wantPause(t, untilRefresh)
		s.stop()
		s.wantFetches(t, before+1)
	}
}

func TestTokenServedWhileRefreshHangs(t *testing.T) {
	s := newTestTokens(t, nil)
	s.wantPause(t, untilRefresh)
	answer, arrived, release := giveLater("token-2")
	s.pass(answer)
	<-arrived
	const onTheWay = 12*time.Minute - time.Nanosecond
	s.advance(onTheWay) // to the token's last instant
	for range 100 {
		s.want(t, "token-1")
	}
	close(release)
	s.wantPause(t, untilRefresh-onTheWay) // a life counts from the sending of the request
	s.want(t, "token-2")
	s.wantFetches(t, 2)
}

func TestTokenServedWhileRefreshFails(t *testing.T) {
	s := newTestTokens(t, answer(200, tokenAnswer("token", 100*time.Second)))
	s.wantPause(t, 80*time.Second)
	refusal := answer(400, noIdentity, "Retry-After", "7")
	for _, pause := range []time.Duration{7, 7, 6} { // the last is what is left of the life
		s.pass(refusal)
		s.wantPause(t, pause*time.Second)
		s.advance(pause*time.Second - 1)
		s.want(t, "Bearer token")
		s.advance(-pause*time.Second + 1)
	}

	// An expired token is not sent, and that the endpoint came back is noticed.
	s.pass(refusal)
	s.wantPause(t, 7*time.Second)
	s.want(t, "Identity not found")
	s.pass(nil)
	s.wantPause(t, untilRefresh)
	s.want(t, "token-6")
}

func TestPausesAfterFailuresInARow(t *testing.T) {
	for _, tt := range []struct{ name, retryAfter, want string }{
		{"doubled, and a minute more as nobody asks", "", "0.8s 1.6s 3.2s 6.4s 10s 1m 10s 1m"},
		{"Retry-After", "5", "5s 5s 5s 6.4s 10s 1m 10s 1m"},
		{"Retry-After over a minute", "61", "61s 1m 61s 1m"},
		{"Retry-After too long to believe", "86400", "2m 1m 2m 1m"},
		{"Retry-After as a date", "Sun, 01 Mar 2026 12:00:45 GMT", "0.8s 1.6s"},
		{"negative Retry-After", "-30", "0.8s 1.6s"},
		{"endless Retry-After", "Inf", "0.8s 1.6s"},
	} {
		refusal := answer(500, "", "Retry-After", tt.retryAfter)
		s := newTestTokens(t, refusal)
		for _, text := range strings.Fields(tt.want) {
			pause, _ := time.ParseDuration(text)
			s.wantPause(t, pause)
			s.pass(refusal)
		}
	}
}

// TestFailingStartCostsTimeAndNoError: a request shortens no pause, and gets the token of the try
// that succeeds.
func TestFailingStartCostsTimeAndNoError(t *testing.T) {
	s := newTestTokens(t, answer(500, ""))
	var requests []chan string
	for i, pause := range []time.Duration{800, 1600, 3200, 6400, 10_000, 10_000} {
		s.wantPause(t, pause*time.Millisecond)
		request, _ := s.waiting()
		requests = append(requests, request)
		s.wantFetches(t, int64(i+1))
		if i == 5 {
			s.pass(nil)
			break
		}
		s.pass(answer(500, ""))
		if i == 4 {
			s.wantPause(t, idlePause) // which the requests end at once
		}
	}
	for _, request := range requests {
		wantAnswer(t, request, "token-7")
	}
}

func TestRequestGetsTheLastFailureAfter20Seconds(t *testing.T) {
	s := newTestTokens(t, answer(500, "first"))
	s.wantPause(t, firstPause)
	request, late := s.waiting()
	<-s.asked // by that request
	s.pass(answer(500, "second"))
	<-s.asked // again, so it has seen the second failure
	late <- time.Time{}
	wantAnswer(t, request, "second")
}

func TestLastingRefusalIsAnsweredAtOnceUntilTheNextTry(t *testing.T) {
	s := newTestTokens(t, answer(400, noIdentity))
	s.wantPause(t, firstPause)
	s.want(t, "Identity not found")
	s.advance(firstPause - 1)
	s.want(t, "Identity not found")
	s.advance(-firstPause + 1)
	answer, arrived, release := giveLater("token-2")
	s.pass(answer)
	<-arrived
	request, _ := s.waiting()
	close(release)
	wantAnswer(t, request, "token-2")
}

func TestRequestDoesNotWaitForATryTooFarAway(t *testing.T) {
	for retryAfter, waits := range map[string]bool{"60": false, "20.5": false, "19.5": true} {
		s := newTestTokens(t, answer(429, "", "Retry-After", retryAfter))
		pause, _ := parseSeconds(retryAfter)
		s.wantPause(t, pause)
		if !waits {
			s.want(t, "answered 429")
			continue
		}
		request, _ := s.waiting()
		s.pass(nil)
		wantAnswer(t, request, "token-2")
	}
}

func TestRejectedTokenIsDueAtMostOncePer30Seconds(t *testing.T) {
	s := newTestTokens(t, nil)
	s.wantPause(t, untilRefresh)
	s.stop() // so nobody but this test takes what is asked
	for _, tt := range []struct {
		name           string
		later          time.Duration
		rejected, next string // what replaces the held token, if that gets due
	}{
		{"the first", 0, "token-1", "token-2"},
		{"its successor at once", 0, "token-2", ""},
		{"after 30 s", 30 * time.Second, "token-2", ""},
		{"after more", 1, "token-2", "token-3"},
		{"one that is gone", time.Minute, "token-2", ""},
		{"the one that is held", 0, "token-3", "token-4"},
	} {
		s.advance(tt.later)
		held := s.held
		s.rejected(token{authorization: "Bearer " + tt.rejected})
		if due := len(s.asked) > 0; due != (tt.next != "") {
			t.Errorf("%s: due for refresh: got %v, want %v", tt.name, due, !due)
		}
		s.want(t, held.authorization) // though rejected: a missing role is a 401 too
		if tt.next != "" {
			held.authorization = "Bearer " + tt.next
			s.publish(held)
		}
	}
}

// TestClockThatIsSetLeavesNobodyWithoutAToken: on a host that slept, the clock looks as if it had
// been set forth, while timers stood still.
func TestClockThatIsSetLeavesNobodyWithoutAToken(t *testing.T) {
	for _, by := range []time.Duration{72 * time.Hour, -72 * time.Hour} {
		// While a token is held, which looks expired or young then.
		s := newTestTokens(t, nil)
		s.wantPause(t, untilRefresh)
		s.advance(by)
		if by < 0 {
			s.want(t, "token-1")
			s.pass(nil) // as the timer does not heed the clock
		} else {
			request, _ := s.waiting()
			wantAnswer(t, request, "token-2")
		}
		s.wantPause(t, untilRefresh)
		s.want(t, "token-2")

		// In a pause, which stays as long as it was.
		s.pass(answer(500, ""))
		s.wantPause(t, firstPause)
		s.advance(by)
		s.pass(nil)
		s.wantPause(t, untilRefresh)
		s.want(t, "token-4")

		// During a try, whose token looks expired as it comes, or young.
		s.pass(func(w http.ResponseWriter, _ *http.Request) {
			s.advance(by)
			io.WriteString(w, tokenAnswer("token-5", time.Hour))
		})
		s.wantPause(t, untilRefresh-by)
		if by < 0 {
			s.want(t, "token-5")
			continue
		}
		s.pass(nil)
		s.wantPause(t, untilRefresh)
		s.want(t, "token-6")
	}
}

func TestClientThatLeavesCancelsNothing(t *testing.T) {
	answer, arrived, release := giveLater("token")
	s := newTestTokens(t, answer)
	<-arrived
	ctx, leave := context.WithCancel(context.Background())
	left := make(chan string, 1)
	go func() { left <- s.ask(ctx) }()
	<-s.waits
	leave()
	wantAnswer(t, left, "the identity endpoint has not answered yet")
	stays, _ := s.waiting()
	close(release)
	wantAnswer(t, stays, "Bearer token")
	s.wantFetches(t, 1)
}

func TestTokenSourceEndsWithoutAWord(t *testing.T) {
	answer, arrived, _ := giveLater("")
	s := newTestTokens(t, answer)
	<-arrived
	s.stop()
	if text := s.log.String(); text != "" {
		t.Errorf("logged %q", text)
	}
}

func TestEachFailedTryAndTheFirstTokenAreOneLineEach(t *testing.T) {
	const jwt = "e30.eyJvaWQiOiJvMSJ9.c2ln" // its claims are {"oid":"o1"}
	s := newTestTokens(t, answer(400, noIdentity))
	for _, step := range []struct {
		pause time.Duration
		next  http.HandlerFunc
	}{
		{firstPause, answer(503, "is\nbusy", "Retry-After", "3600")},
		{maxRetryAfter, nil}, // and no try, as nobody asks
		{idlePause, answer(200, tokenAnswer(jwt, time.Hour))},
		{untilRefresh, answer(500, "")},
		{firstPause, nil},
		{untilRefresh, nil},
	} {
		s.wantPause(t, step.pause)
		s.pass(step.next)
	}
	s.wantPause(t, untilRefresh)
	s.stop()
	host := s.Listener.Addr().String()
	for _, want := range []string{
		"no token: IMDS at " + host + " answered 400: " + noIdentity + "; hint: assign a " +
			"managed identity to this host, or correct AZURE_CLIENT_ID; no other try for 800ms",
		"no token: IMDS at " + host + " answered 503: is busy; no other try for 2m0s",
		"token ready: object id o1, expires 2026-03-01T13:03:00Z",
		"no new token: IMDS at " + host + " answered 500: ; no other try for 800ms",
	} {
		line, before := s.log.waitFor(t, want)
		if before != nil || !strings.HasSuffix(line, want) {
			t.Errorf("got %q after %q, want %q", line, before, want)
		}
	}
	if n := strings.Count(s.log.String(), "\n"); n != 4 {
		t.Errorf("got %d lines, want 4", n)
	}
}

// The endpoint.

func TestEndpointIsTheOneTheEnvironmentNames(t *testing.T) {
	himds := filepath.Join(t.TempDir(), "himds")
	writeFile(t, himds, "")
	const (
		agent  = "HIMDS= " // stands for the file of Azure Arc's agent
		aks    = "AZURE_FEDERATED_TOKEN_FILE=/f AZURE_TENANT_ID=t AZURE_CLIENT_ID=c "
		app    = "IDENTITY_ENDPOINT=http://127.0.0.1/app IDENTITY_HEADER=s "
		fabric = app + "IDENTITY_SERVER_THUMBPRINT=p "
		ml     = "MSI_ENDPOINT=https://127.0.0.1/ml MSI_SECRET=s "
		shell  = "MSI_ENDPOINT=http://127.0.0.1/cs/ "
		arc    = "IDENTITY_ENDPOINT=http://127.0.0.1/arc IMDS_ENDPOINT=http://127.0.0.1 "
		relay  = "AZURE_POD_IDENTITY_AUTHORITY_HOST="
		secret = "AZURE_CLIENT_SECRET=s3cret AZURE_TENANT_ID=t AZURE_CLIENT_ID=c "
		clear  = "AZURE_AUTHORITY_HOST=http://b.example"
		noPair = ": set AZURE_TENANT_ID and AZURE_CLIENT_ID too"

		isAKS   = ", as AZURE_FEDERATED_TOKEN_FILE is set: "
		isApp   = "App Service at 127.0.0.1, as IDENTITY_ENDPOINT and IDENTITY_HEADER are set"
		isML    = "Azure ML at 127.0.0.1, as MSI_ENDPOINT and MSI_SECRET are set"
		isShell = "Cloud Shell at 127.0.0.1, as MSI_ENDPOINT is set: http://127.0.0.1/cs"
		isArc   = "Azure Arc at 127.0.0.1, as IMDS_ENDPOINT is set, or /nowhere exists"
		isIMDS  = "IMDS at 169.254.169.254, as no variable names another: " +
			"http://169.254.169.254/metadata/identity/oauth2/token"
	)
	for _, tt := range []struct{ name, env, want string }{
		{"secret before all others", secret + aks + app + agent, "client secret at login." +
			"microsoftonline.com, as AZURE_CLIENT_SECRET is set: https://login.microsoftonline.com/t/"},
		{"AKS", aks + app + agent, "workload identity at login.microsoftonline.com" + isAKS +
			"https://login.microsoftonline.com/t/oauth2/v2.0/token"},
		{"other cloud", aks + "AZURE_AUTHORITY_HOST=https://b.example/",
			"workload identity at b.example" + isAKS + "https://b.example/t/oauth2/"},
		{"on this host", aks + "AZURE_AUTHORITY_HOST=http://LOCALHOST:9 AZURE_TENANT_ID=a/b",
			"workload identity at LOCALHOST:9" + isAKS + "http://LOCALHOST:9/a%2Fb/oauth2/"},
		{"App Service, which sets both", app + ml, isApp + ": http://127.0.0.1/app"},
		{"App Service before Arc", arc + app + agent, isApp},
		{"Azure ML before Arc", ml + arc + agent, isML + ": https://127.0.0.1/ml"},
		{"Cloud Shell before Arc", shell + arc + agent, isShell},
		{"Arc", arc, isArc + ": http://127.0.0.1/arc"},
		{"Arc by its agent", agent, "Azure Arc at 127.0.0.1:40342, as IMDS_ENDPOINT is set, or " +
			himds + " exists: http://127.0.0.1:40342/metadata/identity/oauth2/token"},
		{"Container Instance", "IDENTITY_HEADER=s IDENTITY_SERVER_THUMBPRINT=p", isIMDS},
		{"endpoint alone", "IDENTITY_ENDPOINT=http://127.0.0.1 MSI_SECRET=s", isIMDS},
		{"empty is unset", "IDENTITY_ENDPOINT= IDENTITY_HEADER= MSI_ENDPOINT=", isIMDS},
		{"relay", relay + "http://[::1]:9//", "IMDS at [::1]:9, as no variable names another: " +
			"http://[::1]:9/metadata/"},

		{"Service Fabric", fabric, "IDENTITY_SERVER_THUMBPRINT: Service Fabric is not supported"},
		{"secret, no tenant", secret + "AZURE_TENANT_ID=", "AZURE_CLIENT_SECRET" + noPair},
		{"secret, no client", secret + "AZURE_CLIENT_ID=", "AZURE_CLIENT_SECRET" + noPair},
		{"AKS, no tenant", aks + "AZURE_TENANT_ID=", "AZURE_FEDERATED_TOKEN_FILE" + noPair},
		{"AKS, no client", aks + "AZURE_CLIENT_ID=", "AZURE_FEDERATED_TOKEN_FILE" + noPair},
		{"AKS in the clear", aks + clear, "AZURE_AUTHORITY_HOST: want https"},
		{"secret in the clear", secret + clear, "AZURE_AUTHORITY_HOST: want https"},
		{"no scheme", relay + "169.254.169.254", "AZURE_POD_IDENTITY_AUTHORITY_HOST: want"},
		{"other scheme", "MSI_ENDPOINT=ftp://127.0.0.1", "MSI_ENDPOINT: want a URL such as http:"},
		{"no host", "MSI_ENDPOINT=http://:80/s3cret", "MSI_ENDPOINT: want a URL such as http:"},
		{"no URL", arc + "IDENTITY_ENDPOINT=http://%zz", "IDENTITY_ENDPOINT: want a URL such as"},
	} {
		files := arcFiles{agent: "/nowhere"}
		if strings.Contains(tt.env, agent) {
			files.agent = himds
		}
		e, err := chooseEndpoint(tt.env, files)
		got := fmt.Sprint(err)
		if err == nil {
			got = e.String() + ": " + e.url.String()
		}
		if !strings.HasPrefix(got, tt.want) || strings.Contains(got, "s3cret") {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestEachEndpointIsAskedItsOwnWay(t *testing.T) {
	const (
		resource = "resource=https%3A%2F%2Fcognitiveservices.azure.com"
		end      = resource + " Connection: close Metadata: true"
		id       = " AZURE_CLIENT_ID=c1"
		form     = " Connection: close Content-Type: application/x-www-form-urlencoded" +
			" Metadata: true "
		grant = "grant_type=client_credentials&" +
			"scope=https%3A%2F%2Fcognitiveservices.azure.com%2F.default"
		secret    = "client_id=c1&client_secret=s3~%2B%2F%3Dcret&" + grant
		federated = "client_assertion=jwt%2B%2F%3D&client_assertion_type=" +
			"urn%3Aietf%3Aparams%3Aoauth%3Aclient-assertion-type%3Ajwt-bearer&client_id=c1&" + grant
		imds  = "GET /metadata/identity/oauth2/token?api-version=2018-02-01&"
		app   = "api-version=2019-08-01&" + end + " X-Identity-Header: s3cret"
		ml    = "GET /ml?api-version=2017-09-01&"
		mlEnd = end + " Secret: s3cret"
		ofML  = " DEFAULT_IDENTITY_CLIENT_ID=c2"
		arc   = "GET /arc?api-version=2020-06-01&"
	)
	vary := map[string]bool{"User-Agent": true, "Content-Length": true} // which is not shown
	file := filepath.Join(t.TempDir(), "federated")
	writeFile(t, file, "jwt+/=\n")
	for _, tt := range []struct{ name, env, want string }{
		{"IMDS", imdsEnv, imds + end},
		{"IMDS, user-assigned", imdsEnv + id, imds + "client_id=c1&" + end},
		{"App Service", appServiceEnv, "GET /msi?" + app},
		{"query", "IDENTITY_ENDPOINT=URL/msi?a=b IDENTITY_HEADER=s3cret", "GET /msi?a=b&" + app},
		{"Azure ML", mlEnv, ml + mlEnd},
		{"Azure ML, user-assigned", mlEnv + id + ofML, ml + "clientid=c1&" + mlEnd},
		{"Azure ML, its default", mlEnv + ofML, ml + "clientid=c2&" + mlEnd},
		{"Cloud Shell", "MSI_ENDPOINT=URL/cs", "POST /cs?" + form + resource},
		{"Azure Arc", arcEnv,
			arc + end + " " + arc + strings.Replace(end, " ", " Authorization: Basic the key ", 1)},
		{"client secret", workloadEnv + " AZURE_CLIENT_SECRET=s3~+/=cret",
			"POST /tenant/oauth2/v2.0/token?" + form + secret},
		{"AKS", workloadEnv + file, "POST /tenant/oauth2/v2.0/token?" + form + federated},
	} {
		f := newFakeIdentity(t)
		keys := t.TempDir()
		e, _ := newTestEndpoint(t, f, tt.env, keys)
		key := filepath.Join(keys, "1.key")
		writeFile(t, key, "the key")
		var asked strings.Builder
		f.answerWith(func(w http.ResponseWriter, r *http.Request) {
			r.ParseForm()
			fmt.Fprintln(&asked, r.Method, r.URL.Path+"?"+r.URL.Query().Encode())
			r.Header.WriteSubset(&asked, vary)
			fmt.Fprintln(&asked, r.PostForm.Encode())
			if e.keyDir != "" {
				arcAgent(key, make(chan string, 1))(w, r)
				return
			}
			io.WriteString(w, tokenAnswer("token", time.Hour))
		})
		_, failure := e.fetch(context.Background())
		got := strings.Join(strings.Fields(asked.String()), " ")
		if failure != nil || got != tt.want {
			t.Errorf("%s: got %q, %v; want %q", tt.name, got, failure, tt.want)
		}
	}
}

// TestProxyOfTheEnvironmentIsForTLSOnly: who is asked in the clear is on this host or its link. Go
// itself makes an exception of localhost, but not of its name in upper case.
func TestProxyOfTheEnvironmentIsForTLSOnly(t *testing.T) {
	asked := make(chan string, 9)
	relay := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		asked <- r.Method + " " + r.Host
		w.WriteHeader(407)
	})
	imds := strings.Replace(newFakeIdentity(t).URL, "127.0.0.1", "LOCALHOST", 1)
	env := serving(nobody, imds, vars{"AZURE_LOG_LEVEL": "debug", "HTTP_PROXY": relay.URL,
		"HTTPS_PROXY": relay.URL})
	startProgram(t, safetyNet, env).stderr.waitFor(t, "token ready: ")

	env["AZURE_FEDERATED_TOKEN_FILE"], _ = filepath.Abs("go.mod")
	env["AZURE_TENANT_ID"], env["AZURE_CLIENT_ID"] = "t", "c"
	env["AZURE_AUTHORITY_HOST"] = "https://LOCALHOST:1"
	startProgram(t, safetyNet, env).stderr.waitFor(t, "no token: workload identity")
	if len(asked) == 0 || <-asked != "CONNECT LOCALHOST:1" {
		t.Error("the proxy was not asked for LOCALHOST:1")
	}
}

func TestFederatedTokenIsReadAnewForEachExchange(t *testing.T) {
	f := newFakeIdentity(t)
	file := filepath.Join(t.TempDir(), "federated")
	e, _ := newTestEndpoint(t, f, workloadEnv+file, "")
	f.answerWith(func(w http.ResponseWriter, r *http.Request) { // with the assertion as token
		io.WriteString(w, tokenAnswer(r.FormValue("client_assertion"), time.Hour))
	})
	for _, want := range []string{"first", "second"} {
		writeFile(t, file, want)
		if got, failure := e.fetch(context.Background()); got.authorization != "Bearer "+want {
			t.Errorf("got %v, %v; want %q", got, failure, want)
		}
	}
	os.Remove(file)
	_, failure := e.fetch(context.Background())
	if failure == nil || !failure.lasting ||
		!strings.Contains(failure.text, "was not asked: AZURE_FEDERATED_TOKEN_FILE: open "+file) {
		t.Errorf("without the file: got %v", failure)
	}
	f.wantFetches(t, 2)
}

// TestArcKeyIsShown, if it is where Azure Arc's agent puts it. FuzzChallenge has what is elsewhere.
func TestArcKeyIsShown(t *testing.T) {
	f := newFakeIdentity(t)
	keys := t.TempDir()
	e, _ := newTestEndpoint(t, f, arcEnv, keys)
	locked := filepath.Join(keys, "locked.key")
	writeFile(t, filepath.Join(keys, "a.key"), "the key\r\n")
	writeFile(t, locked, "the key")
	if err := os.Chmod(locked, 0); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"a.key": "", "none.key": "none.key: ", "locked.key": "locked.key: permission denied",
		"a.txt": "it does not name a .key file in ",
	} {
		isLocked := name == "locked.key"
		if isLocked && (os.Geteuid() == 0 || runtime.GOOS == "windows") {
			continue // root reads all, and Windows has other permissions
		}
		shown := make(chan string, 2)
		f.answerWith(arcAgent(filepath.Join(keys, name), shown))
		_, failure := e.fetch(context.Background())
		close(shown)
		key := <-shown
		if want == "" && (failure != nil || key != "Basic the key") {
			t.Errorf("%s: got %v, and showed %q", name, failure, key)
		}
		const cannot = "sent a challenge that cannot be met: "
		if want != "" && (failure == nil || !failure.lasting || key != "" ||
			!strings.Contains(failure.text, cannot) || !strings.Contains(failure.text, want) ||
			strings.Contains(failure.hint, "himds") != isLocked) {
			t.Errorf("%s: got %v, and showed %q; want %q", name, failure, key, want)
		}
	}
}

// TestArcAgentThatFailsAfterItsChallenge is asked again, as any other endpoint.
func TestArcAgentThatFailsAfterItsChallenge(t *testing.T) {
	f, keys := newFakeIdentity(t), t.TempDir()
	e, _ := newTestEndpoint(t, f, arcEnv, keys)
	writeFile(t, keys+"/a.key", "the key")
	for _, second := range []string{"", "HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"} {
		f.answerWith(func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Authorization") != "" {
				answerRaw(second)(w, r)
				return
			}
			arcAgent(filepath.Join(keys, "a.key"), nil)(w, r)
		})
		_, failure := e.fetch(context.Background())
		if failure == nil || failure.lasting || !strings.Contains(failure.text, "no answer: ") {
			t.Errorf("%q: got %v", second, failure)
		}
	}
}

// One fetch.

// fetch asks f as the endpoint for env, on whose host it is noon.
func (f *fakeIdentity) fetch(t testing.TB, env string, by http.HandlerFunc) (token, *fetchError) {
	t.Helper()
	e, _ := newTestEndpoint(t, f, env, "/nowhere")
	f.answerWith(by)
	return e.fetch(context.Background())
}

// endless answers with the bytes of head, and with zeros until the client hangs up.
func endless(head string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		conn, _, _ := http.NewResponseController(w).Hijack()
		io.WriteString(conn, head)
		io.Copy(conn, zeros{})
		conn.Close()
	}
}

func TestFailureIsToldAndLastsOrPasses(t *testing.T) {
	const (
		lasts   = "lasting: answered "
		gone    = "passing: gave no answer: "
		assign  = "; hint: assign a managed identity to this host, or correct AZURE_CLIENT_ID"
		several = "Multiple user assigned identities exist"
		ok      = "HTTP/1.1 200 OK\r\n"
	)
	success := tokenAnswer("LEAK", time.Hour)
	switches := func(w http.ResponseWriter, _ *http.Request) {
		conn := acceptTunnel(t, w)
		t.Cleanup(func() { conn.Close() })
	}
	for _, tt := range []struct {
		name, env string
		answer    http.HandlerFunc
		want      string
	}{
		{"no identity", imdsEnv, answer(400, noIdentity), lasts + "400: " + noIdentity + assign},
		{"wrong client id", imdsEnv + " AZURE_CLIENT_ID=c1", answer(400, noIdentity),
			lasts + "400: " + noIdentity + " (client id c1)" + assign},
		{"several identities", imdsEnv, answer(400, several),
			lasts + "400: " + several + "; hint: set AZURE_CLIENT_ID to the client id of one"},
		{"wrong resource", imdsEnv, answer(400, "AADSTS500011: no"),
			lasts + "400: AADSTS500011: no; hint: correct AZURE_OPENAI_SCOPE"},
		{"wrong issuer", workloadEnv + "go.mod", answer(401, "AADSTS700211: no"),
			lasts + "401: AADSTS700211: no (client id c1); hint: the federated credential"},
		{"secret repeated", workloadEnv + " AZURE_CLIENT_SECRET=LEAK",
			answer(400, "client_id=c1&client_secret=LEAK"), lasts + "400:  (client id c1)"},
		{"wrong secret", workloadEnv + " AZURE_CLIENT_SECRET=LEAK", answer(401, "AADSTS7000215: no"),
			lasts + "401: AADSTS7000215: no (client id c1)"},
		{"Docker Desktop", imdsEnv, answer(403, "an unreachable network."),
			lasts + "403: an unreachable network.; hint: this is not an Azure host"},

		{"404 of IMDS", imdsEnv, answer(404, "updating"), "passing: answered 404: updating"},
		{"410 of IMDS", imdsEnv, answer(410, ""), "passing: answered 410: "},
		{"404 of App Service", appServiceEnv, answer(404, ""), lasts + "404: "},
		{"410 of Azure Arc", arcEnv, answer(410, ""), lasts + "410: "},
		{"429", appServiceEnv, answer(429, ""), "passing: answered 429: "},
		{"500", appServiceEnv, answer(500, ""), "passing: answered 500: "},
		{"redirect", appServiceEnv, answer(307, "", "Location", "/"), lasts + "307: "},

		{"201", imdsEnv, answer(201, success), lasts + "201: "},
		{"299", imdsEnv, answer(299, success), lasts + "299: "},
		{"101, with no end", imdsEnv, switches, gone + "unexpected status 101"},
		{"hang-up", imdsEnv, answerRaw(""), gone},
		{"cut off", imdsEnv, answerRaw(ok + "Content-Length: 9\r\n\r\nLEAK"), gone + "unexpected"},
		{"no HTTP", imdsEnv, answerRaw("LEAK\r\n\r\n"), gone + "the answer is not HTTP; hint: d"},

		{"endless refusal", imdsEnv, endless("HTTP/1.1 400 \r\n\r\n"), lasts + "400: "},
		{"endless header", imdsEnv, endless(ok + "A: "), "server response headers exceeded"},
	} {
		f := newFakeIdentity(t)
		_, failure := f.fetch(t, tt.env, tt.answer)
		what, got, _ := strings.Cut(failure.Error(), " at "+f.Listener.Addr().String()+" ")
		kind := map[bool]string{true: "lasting: ", false: "passing: "}[failure.lasting]
		got = kind + got
		if !strings.Contains(got, tt.want) || len(got) > 600 || strings.Contains(got, "LEAK") {
			t.Errorf("%s: got %q of %s, want %q", tt.name, got, what, tt.want)
		}
		f.wantFetches(t, 1)
	}
}

// TestTryIsBoundedAndItsTokenLivesByTheWallClock. Each of Arc's two requests has its own time.
func TestTryIsBoundedAndItsTokenLivesByTheWallClock(t *testing.T) {
	f, keys := newFakeIdentity(t), t.TempDir()
	e, _ := newTestEndpoint(t, f, arcEnv, keys)
	writeFile(t, keys+"/a.key", "the key")
	f.answerWith(arcAgent(filepath.Join(keys, "a.key"), make(chan string, 1)))
	e.now = time.Now
	var ends []time.Time
	e.transport.Proxy = func(r *http.Request) (*url.URL, error) {
		end, _ := r.Context().Deadline()
		ends = append(ends, end)
		return nil, nil
	}
	got, failure := e.fetch(context.Background())
	if len(ends) != 2 || !ends[0].Before(ends[1]) || time.Until(ends[1]) > 10*time.Second {
		t.Errorf("the requests end at %v", ends)
	}
	wall := token{got.authorization, got.expires.Round(0), got.refresh.Round(0)}
	if failure != nil || got != wall {
		t.Errorf("got %v, %v; want times without a monotonic reading", got, failure)
	}
}

// TestRepeatedTokenIsNotShown: a token opens nothing without its signature, which is its end.
func TestRepeatedTokenIsNotShown(t *testing.T) {
	signature := strings.Repeat("s1gnature", 38) // of 342 characters, as that of RS256
	held := "e30." + strings.Repeat("payload", 164) + "." + signature
	const ok, crlf = "HTTP/1.1 200 OK\r\n", "\r\n\r\n"
	for name, reply := range map[string]http.HandlerFunc{
		"refusal":       answer(400, held),
		"long refusal":  answer(500, strings.Repeat("x ", 100)+held),
		"success":       answer(201, held),
		"unusable":      answer(200, `{"access_token":"`+held+`","expires_on":"`+held+`"}`),
		"Retry-After":   answer(429, "", "Retry-After", held),
		"status":        answerRaw("HTTP/1.1 " + held + crlf),
		"status text":   answerRaw("HTTP/1.1 400 " + held + crlf),
		"header line":   answerRaw(ok + held + crlf),
		"length":        answerRaw(ok + "Content-Length: " + held + crlf),
		"second length": answerRaw(ok + "Content-Length: 1\r\nContent-Length: " + held + crlf),
		"framing":       answerRaw(ok + "Transfer-Encoding: " + held + crlf),
		"chunk":         answerRaw(ok + "Transfer-Encoding: chunked\r\n\r\n" + held + "\r\n"),
		"redirect":      answerRaw("HTTP/1.1 302 Found\r\nLocation: " + held + crlf),
	} {
		s := newTestTokens(t, answer(200, tokenAnswer(held, time.Hour)))
		s.wantPause(t, untilRefresh)
		s.pass(reply)
		s.wantPause(t, firstPause)
		text := s.log.String() + s.failure.Error()
		if strings.Count(text, "no new token: ") != 1 || strings.Contains(text, signature[:30]) {
			t.Errorf("%s: got %s", name, text)
		}
	}
}

// Parsing.

func TestEveryFormOfExpiryIsRead(t *testing.T) {
	const ahead, behind = "Sun, 01 Mar 2026 14:00:00 GMT", "Sun, 01 Mar 2026 10:00:00 GMT"
	for _, tt := range []struct{ name, fields, date string }{ // the date is the endpoint's
		{"IMDS", `"expires_in":"3600","expires_on":"1772370000"`, ""},
		{"Entra ID", `"expires_in":3600`, ""},
		{"expires_in of an earlier issue", `"expires_in":86399,"expires_on":"1772370000"`, ""},
		{"expires_in that ends earlier", `"expires_in":9,"expires_on":"1772370000"`, ""},
		{"expires_in unreadable", `"expires_in":"soon","expires_on":"1772370000"`, ""},
		{"2017 on Linux", `"expires_on":"03/01/2026 13:00:00 +00:00"`, ""},
		{"2017 on Windows", `"expires_on":"3/1/2026 1:00:00 PM +00:00"`, ""},
		{"US", `"expires_on":"03/01/2026 13:00:00"`, ""},
		{"SQL", `"expires_on":"2026-03-01 13:00:00"`, ""},
		{"ISO 8601 of .NET", `"expires_on":"2026-03-01T13:00:00.0000000+00:00"`, ""},
		{"empty beside a number", `"expires_on":"","expires_in":"3600"`, ""},
		{"endpoint's clock ahead", `"expires_on":"1772377200"`, ahead},
		{"endpoint's clock behind", `"expires_on":"1772362800"`, behind},
		{"Date cut to the second", `"expires_on":"1772370000"`, "Sun, 01 Mar 2026 11:59:59 GMT"},
		{"expires_in needs no clock", `"expires_in":3600`, ahead},
		{"refresh_in too late", `"expires_in":3600,"refresh_in":3600`, ""},
		{"refresh_in too soon", `"expires_in":3600,"refresh_in":0`, ""},
		{"refresh_in", `"expires_in":3600,"refresh_in":1800`, ""},
	} {
		got, failure := newFakeIdentity(t).fetch(t, imdsEnv,
			answer(200, `{"access_token":"!~",`+tt.fields+`}`, "Date", tt.date))
		refresh := int64(48 * 60)
		if strings.Contains(tt.fields, "1800") {
			refresh = 1800
		}
		if failure != nil || got.authorization != "Bearer !~" ||
			got.expires.Unix() != noon+3600 || got.refresh.Unix() != noon+refresh {
			t.Errorf("%s: got %v, %v", tt.name, got, failure)
		}
	}
}

func TestUnusableAnswerIsAnErrorThatKeepsItToItself(t *testing.T) {
	const (
		in      = `","expires_in":3600}`
		expiry  = "expires_on or expires_in: not "
		object  = "no JSON object with an access_token that a header can carry"
		expired = "it has expired already"
	)
	for _, tt := range []struct{ name, body, want string }{
		{"no expiry", `{"access_token":"LEAK"}`, expiry},
		{"empty expiry", `{"access_token":"LEAK","expires_on":"","expires_in":null}`, expiry},
		{"expires_on unreadable", `{"access_token":"LEAK","expires_on":"LEAK` + in, expiry},
		{"milliseconds", `{"access_token":"LEAK","expires_on":1772370000000}`, expiry},
		{"object", `{"access_token":"LEAK","expires_on":{"LEAK":1}}`, expiry},
		{"negative", `{"access_token":"LEAK","expires_in":-1}`, expiry},
		{"no number", `{"access_token":"LEAK","expires_in":"NaN"}`, expiry},
		{"expired", `{"access_token":"LEAK","expires_on":"1772366400"}`, expired},
		{"hardly a life", `{"access_token":"LEAK","expires_in":0.9}`, expired},
		{"no token", `{"expires_in":3600,"id":"LEAK"}`, object},
		{"empty token", `{"access_token":"` + in, object},
		{"web page", `<html>LEAK</html>`, object},
		{"too large", `{"access_token":"` + strings.Repeat("LEAK", maxAnswer/4) + in, object},
		{"line break", `{"access_token":"LEAK\r\nX-Forged: 1` + in, object},
		{"space", `{"access_token":"LEAK LEAK` + in, object},
		{"DEL", `{"access_token":"LEAK\u007f` + in, object},
		{"not ASCII", `{"access_token":"LEAKé` + in, object},
	} {
		got, failure := newFakeIdentity(t).fetch(t, imdsEnv, answer(200, tt.body, "Date", ""))
		if failure == nil || got != (token{}) || strings.Contains(failure.Error(), "LEAK") ||
			!strings.Contains(failure.text, "answered 200 without a usable token: "+tt.want) ||
			failure.lasting == (tt.want == expired) {
			t.Errorf("%s: got %+v, want %q", tt.name, failure, tt.want)
		}
	}
}

// Fuzz targets.

func FuzzParseToken(f *testing.F) {
	f.Add(tokenAnswer("token", time.Hour), int64(0))
	for _, seed := range []string{`null`, `{}`, `[]`, `{"access_token":"a b","expires_in":1}`,
		`{"access_token":"a","expires_in":8e9,"refresh_in":1e-9}`,
		`{"access_token":"a","expires_on":"3/1/2026 1:00:00 PM +00:00"}`,
		`{"access_token":"a","expires_on":"9999-12-31T23:59:59Z"}`} {
		f.Add(seed, int64(3600))
	}
	sent := time.Unix(noon, 0)
	f.Fuzz(func(t *testing.T, body string, off int64) {
		got, err := parseToken([]byte(body), sent, sent.Add(time.Duration(off)))
		if err != nil {
			if got != (token{}) {
				t.Errorf("got %v beside %v", got, err)
			}
			return
		}
		secret := strings.TrimPrefix(got.authorization, "Bearer ")
		bad := strings.ContainsFunc(secret, func(r rune) bool { return r < 0x21 || r > 0x7e })
		if secret == "" || bad || !got.refresh.After(sent) || !got.expires.After(got.refresh) {
			t.Errorf("got %+v", got)
		}
	})
}

func FuzzChallenge(f *testing.F) {
	dir := f.TempDir()
	good := filepath.Join(dir, "a.key")
	for _, name := range []string{good, filepath.Join(dir, "other.txt"),
		filepath.Join(f.TempDir(), "outside.key")} {
		writeFile(f, name, filepath.Base(name))
		f.Add("Basic realm=" + name)
	}
	for _, seed := range []string{"", "Basic realm=", "Basic realm=a.key", "Bearer realm=DIR/a.key",
		`Basic realm="DIR/a.key"`, "Basic realm=DIR/../a.key", "Basic realm=DIR//a.key",
		"Basic realm=DIR/./a.key", "Basic realm=DIR/sub/../a.key", "Basic realm=DIR"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, challenge string) {
		challenge = strings.ReplaceAll(challenge, "DIR", dir)
		key, err := readKey(challenge, dir)
		legal := challenge == "Basic realm="+good
		if legal != (err == nil) || legal != (key == "a.key") || !legal && key != "" {
			t.Errorf("%q: got %q, %v", challenge, key, err)
		}
	})
}
