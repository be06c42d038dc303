package main

// The tests of imds.go: first fakes and helpers, then the token source, the
// endpoint, one fetch, parsing, text that is safe to show, and last the fuzz
// targets. The log and the upstream that they use are in forward_test.go.

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"
)

// Fakes and helpers.

// fakeIdentity is an identity endpoint on a loopback address that gives token-1, token-2 and so
// on, each for life, and counts what it is asked.
type fakeIdentity struct {
	*httptest.Server
	fetches atomic.Int64
	life    time.Duration
	answer  atomic.Pointer[http.HandlerFunc] // if set, answers in the place of the above
}

func newFakeIdentity(t testing.TB) *fakeIdentity {
	t.Helper()
	f := &fakeIdentity{life: 24 * time.Hour}
	f.Server = httptest.NewServer(f)
	t.Cleanup(f.Close)
	return f
}

func (f *fakeIdentity) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	n := f.fetches.Add(1)
	if answer := f.answer.Load(); answer != nil {
		(*answer)(w, r)
		return
	}
	if r.Header.Get("Metadata") != "true" || r.Header.Get("X-Forwarded-For") != "" {
		http.Error(w, `{"error":"invalid_request","error_description":"Required metadata `+
			`header not specified"}`, 400)
		return
	}
	fmt.Fprint(w, tokenAnswer("token-"+strconv.FormatInt(n, 10), f.life))
}

// answerWith makes f answer by handler from now on.
func (f *fakeIdentity) answerWith(handler http.HandlerFunc) { f.answer.Store(&handler) }

// gave tells whether f gave the token in an Authorization header.
func (f *fakeIdentity) gave(authorization string) bool {
	number, ok := strings.CutPrefix(authorization, "Bearer token-")
	n, err := strconv.ParseInt(number, 10, 64)
	return ok && err == nil && n <= f.fetches.Load()
}

func (f *fakeIdentity) wantFetches(t testing.TB, want int64) {
	t.Helper()
	if got := f.fetches.Load(); got != want {
		t.Fatalf("the endpoint was asked %d times, want %d", got, want)
	}
}

// tokenAnswer is what IMDS says, whose numbers are strings.
func tokenAnswer(token string, life time.Duration) string {
	return fmt.Sprintf(`{"access_token":%q,"client_id":"00000000-0000-0000-0000-000000000001","`+
		`expires_in":"%d",`+
		`"expires_on":"%d","resource":"https://cognitiveservices.azure.com","token_type":"Bearer"}`,
		token, int(life.Seconds()), time.Now().Add(life).Unix())
}

// refuse answers with status and body, and a Retry-After unless that is empty.
func refuse(status int, retryAfter, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		if retryAfter != "" {
			w.Header().Set("Retry-After", retryAfter)
		}
		w.WriteHeader(status)
		io.WriteString(w, body)
	}
}

// answerRaw answers with the bytes of text and hangs up. Before that it reads a
// small body, as closing a connection with unread bytes would reset it.
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

// arcAgent gives a token to whoever answers its challenge, and notes the keys it is shown.
func arcAgent(challenge string, shown chan<- string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		key := r.Header.Get("Authorization")
		if key == "" {
			w.Header().Set("WWW-Authenticate", challenge)
			w.WriteHeader(401)
			return
		}
		shown <- key
		fmt.Fprint(w, tokenAnswer("token", time.Hour))
	}
}

func writeFile(t testing.TB, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// fakeClock moves only when it is told to. It starts months off the clock of the fakes.
type fakeClock struct {
	mu     sync.Mutex
	time   time.Time
	pauses []time.Duration // between tries, which it has moved by
}

func (c *fakeClock) now() time.Time { return c.advance(0) }

func (c *fakeClock) advance(d time.Duration) time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.time = c.time.Add(d)
	return c.time
}

func (c *fakeClock) sleep(_ context.Context, d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pauses = append(c.pauses, d)
	c.time = c.time.Add(d)
}

// Environments: NAME=value NAME=value, where URL is the fake's.
const (
	imdsEnv       = "AZURE_POD_IDENTITY_AUTHORITY_HOST=URL"
	appServiceEnv = "IDENTITY_ENDPOINT=URL/msi IDENTITY_HEADER=s3cret"
	arcEnv        = "IDENTITY_ENDPOINT=URL/arc IMDS_ENDPOINT=URL"
	workloadEnv   = "AZURE_AUTHORITY_HOST=URL/ AZURE_TENANT_ID=tenant AZURE_CLIENT_ID=c1 " +
		"AZURE_FEDERATED_TOKEN_FILE="
)

// chooseEndpoint chooses the endpoint for env as the program does.
func chooseEndpoint(t testing.TB, env string, arc arcFiles) (*endpoint, error) {
	t.Helper()
	vars := make(map[string]string)
	for _, field := range strings.Fields(env) {
		name, value, _ := strings.Cut(field, "=")
		vars[name] = value
	}
	return newEndpoint(func(name string) string { return vars[name] },
		"https://cognitiveservices.azure.com/.default", arc, &secrets{})
}

// newTestEndpoint returns the endpoint for env, and its clock. Azure Arc's keys
// are in keys.
func newTestEndpoint(t testing.TB, f *fakeIdentity, env, keys string) (*endpoint, *fakeClock) {
	t.Helper()
	e, err := chooseEndpoint(t, strings.ReplaceAll(env, "URL", f.URL), arcFiles{"/nowhere", keys})
	if err != nil {
		t.Fatal(err)
	}
	c := &fakeClock{time: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)}
	e.now, e.sleep = c.now, c.sleep
	return e, c
}

// newTestTokens returns a running token source for env, and its clock.
func newTestTokens(t testing.TB, f *fakeIdentity, env string) (*tokenSource, *fakeClock) {
	t.Helper()
	e, c := newTestEndpoint(t, f, env, "")
	return runTokens(t, e.fetch, c.now), c
}

// runTokens runs a token source until the test ends.
func runTokens(t testing.TB, fetch func(context.Context) (token, error),
	now func() time.Time) *tokenSource {
	tokens := newTokenSource(fetch, now)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan bool)
	go func() {
		tokens.run(ctx)
		close(ended)
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	return tokens
}

// wantToken asserts which token a request gets; an empty one is none. It returns the error.
func wantToken(t testing.TB, s *tokenSource, token string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), safetyNet) // instead of a deadlock
	defer cancel()
	got, err := s.current(ctx)
	if strings.TrimPrefix(got.authorization, "Bearer ") != token || (err == nil) != (token != "") {
		t.Fatalf("got %q, %v; want %q", got.authorization, err, token)
	}
	return err
}

// settle waits for the end of a fetch that is due.
func settle(s *tokenSource) {
	s.mu.Lock()
	due, turn := s.isDue(s.now()), s.turn
	s.mu.Unlock()
	for due { // the first turn may be one that was about to end
		s.ask()
		<-turn
		s.mu.Lock()
		due, turn = s.isDue(s.now()), s.turn
		s.mu.Unlock()
	}
}

// willRetry tells whether err is a failure that the endpoint is asked again after.
func willRetry(err error) bool {
	var failed *fetchError
	return errors.As(err, &failed) && failed.retry
}

func about(got, want time.Duration) bool { return got >= want*8/10 && got <= want*12/10 }

// The token source.

func TestTwoHundredRequestsMakeOneFetch(t *testing.T) {
	for _, name := range []string{"cold", "at expiry"} {
		f := newFakeIdentity(t)
		f.life = time.Hour
		e, c := newTestEndpoint(t, f, imdsEnv, "")
		// A request looks at the clock before it waits. So does the token source
		// itself, once or twice.
		entered := make(chan bool, 1000)
		now := func() time.Time {
			entered <- true
			return c.now()
		}
		held := func(want string) http.HandlerFunc {
			return func(w http.ResponseWriter, _ *http.Request) {
				for range 200 {
					<-entered
				}
				fmt.Fprint(w, tokenAnswer(want, time.Hour))
			}
		}
		var tokens *tokenSource
		want := "token-1"
		if name == "cold" {
			f.answerWith(held(want))
			tokens = runTokens(t, e.fetch, now)
		} else {
			tokens = runTokens(t, e.fetch, now)
			wantToken(t, tokens, want)
			want = "token-2"
			f.answerWith(held(want))
			c.advance(time.Hour)
		}
		var all sync.WaitGroup
		for range 200 {
			all.Add(1)
			go func() {
				defer all.Done()
				got, err := tokens.current(context.Background())
				if err != nil || got.authorization != "Bearer "+want {
					t.Errorf("%s: got %q, %v", name, got.authorization, err)
				}
			}()
		}
		all.Wait()
		if name == "cold" {
			f.wantFetches(t, 1)
		} else {
			f.wantFetches(t, 2)
		}
	}
}

func TestTokenServedWhileRefreshHangs(t *testing.T) {
	f := newFakeIdentity(t)
	f.life = time.Hour
	tokens, c := newTestTokens(t, f, imdsEnv)
	wantToken(t, tokens, "token-1")
	c.advance(47 * time.Minute)
	wantToken(t, tokens, "token-1")
	f.wantFetches(t, 1) // not due before 80 % of its life

	arrived, release := make(chan bool, 9), make(chan bool)
	f.answerWith(func(w http.ResponseWriter, _ *http.Request) {
		arrived <- true
		<-release
		fmt.Fprint(w, tokenAnswer("token-2", time.Hour))
	})
	c.advance(2 * time.Minute)
	for range 100 {
		wantToken(t, tokens, "token-1")
	}
	<-arrived
	c.advance(10 * time.Minute)
	wantToken(t, tokens, "token-1")
	close(release)
	settle(tokens)
	wantToken(t, tokens, "token-2")
	f.wantFetches(t, 2)
}

func TestTokenServedWhileRefreshFails(t *testing.T) {
	followLog(t)
	f := newFakeIdentity(t)
	tokens, c := newTestTokens(t, f, imdsEnv)
	wantToken(t, tokens, "token-1")
	f.answerWith(refuse(400, "", `{"error":"invalid_request","error_description":"Identity not `+
		`found"}`))
	c.advance(20 * time.Hour)
	for fetches := range int64(3) {
		wantToken(t, tokens, "token-1")
		settle(tokens)
		f.wantFetches(t, fetches+2)
		c.advance(time.Hour)
	}

	// An expired token is not sent, and that the endpoint came back is noticed.
	c.advance(time.Hour)
	if err := wantToken(t, tokens, ""); !strings.Contains(err.Error(), "Identity not found") {
		t.Errorf("got %v", err)
	}
	f.answer.Store(nil)
	c.advance(pauseWithoutToken)
	wantToken(t, tokens, "token-6")
}

func TestRefreshNeedsNoRequest(t *testing.T) {
	f := newFakeIdentity(t)
	e, _ := newTestEndpoint(t, f, imdsEnv, "")
	e.now = time.Now
	asked := make(chan bool, 9)
	f.answerWith(func(w http.ResponseWriter, _ *http.Request) {
		n := f.fetches.Load()
		fmt.Fprintf(w, `{"access_token":"token-%d","expires_in":3600,"refresh_in":%d}`, n, n*n*n)
		asked <- true
	})
	tokens := runTokens(t, e.fetch, time.Now)
	wantToken(t, tokens, "token-1")
	<-asked
	select {
	case <-asked: // a second later
	case <-time.After(safetyNet):
		t.Fatal("no refresh")
	}
	settle(tokens)
	wantToken(t, tokens, "token-2")
}

func TestFailureIsRememberedForAWhile(t *testing.T) {
	followLog(t)
	for _, tt := range []struct {
		name       string
		warm       bool
		status     int
		retryAfter string
		want       time.Duration
	}{
		{"without a token", false, 400, "", time.Second},
		{"with a token", true, 400, "", 10 * time.Second},
		{"Retry-After without a token", false, 429, "30", 30 * time.Second},
		{"Retry-After with a token", true, 429, "30", 30 * time.Second},
		{"Retry-After too long to believe", false, 503, "86400", 2 * time.Minute},
		{"date too late to believe", true, 503, "Sun, 01 Mar 2026 20:00:00 GMT", 2 * time.Minute},
		{"date", false, 503, "Sun, 01 Mar 2026 12:00:45 GMT", 45 * time.Second},
		{"nonsense", false, 400, "-1", time.Second},
	} {
		f := newFakeIdentity(t)
		f.life = 50 * time.Minute
		e, c := newTestEndpoint(t, f, imdsEnv, "")
		var tokens *tokenSource
		held := ""
		refusal := refuse(tt.status, tt.retryAfter, "no")
		if tt.warm {
			held = "token-1"
			c.advance(-41 * time.Minute)
			tokens = runTokens(t, e.fetch, c.now)
			wantToken(t, tokens, held)
			f.answerWith(refusal)
			c.advance(41 * time.Minute)
		} else {
			f.answerWith(refusal)
			tokens = runTokens(t, e.fetch, c.now)
		}
		wantToken(t, tokens, held)
		settle(tokens)
		asked := f.fetches.Load()

		c.advance(tt.want - time.Millisecond)
		err := wantToken(t, tokens, held)
		settle(tokens)
		if got := f.fetches.Load(); got != asked {
			t.Errorf("%s: asked again before %v", tt.name, tt.want)
		}
		var failure *noTokenError
		if !tt.warm && (!errors.As(err, &failure) || failure.retryAfter != time.Millisecond ||
			!strings.Contains(failure.Error(), "no")) {
			t.Errorf("%s: got %v, want the failure and when to come back", tt.name, err)
		}
		c.advance(time.Millisecond)
		wantToken(t, tokens, held)
		settle(tokens)
		if got := f.fetches.Load(); got == asked {
			t.Errorf("%s: not asked again after %v", tt.name, tt.want)
		}
	}
}

// TestFailureNearExpiryIsForgottenWithTheToken: the longer memory is for as long as a token is
// valid.
func TestFailureNearExpiryIsForgottenWithTheToken(t *testing.T) {
	followLog(t)
	f := newFakeIdentity(t)
	f.life = 50 * time.Minute
	tokens, c := newTestTokens(t, f, imdsEnv)
	wantToken(t, tokens, "token-1")
	f.answerWith(refuse(400, "", "no"))
	c.advance(f.life - 2*time.Second)
	wantToken(t, tokens, "token-1")
	settle(tokens)
	f.answer.Store(nil)
	c.advance(2 * time.Second)
	wantToken(t, tokens, "token-3")
}

func TestTokenThatExpiresOnTheWayIsAFailure(t *testing.T) {
	followLog(t)
	c := &fakeClock{time: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)}
	tokens := runTokens(t, func(context.Context) (token, error) {
		return token{authorization: "Bearer token", expires: c.now()}, nil
	}, c.now)
	err := wantToken(t, tokens, "")
	if !strings.Contains(err.Error(), "the token expired as soon as it came") {
		t.Errorf("got %v", err)
	}
}

// TestClockSetBackLeavesNobodyWaiting: a request sees the token expired, and
// the token source does not any more.
func TestClockSetBackLeavesNobodyWaiting(t *testing.T) {
	c := &fakeClock{time: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)}
	tokens := newTokenSource(nil, c.now) // nothing is to be fetched
	end := c.now().Add(time.Hour)
	tokens.held = token{authorization: "Bearer token-1", expires: end, refresh: end}
	c.advance(2 * time.Hour)
	got := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), safetyNet)
		defer cancel()
		_, err := tokens.current(ctx)
		got <- err
	}()
	for len(tokens.asked) == 0 {
		runtime.Gosched()
	}
	c.advance(-2 * time.Hour)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go tokens.run(ctx)
	if err := <-got; err != nil {
		t.Errorf("got %v, want the token", err)
	}
}

func TestClientThatLeavesCancelsNothing(t *testing.T) {
	f := newFakeIdentity(t)
	arrived, release := make(chan bool, 9), make(chan bool)
	f.answerWith(func(w http.ResponseWriter, r *http.Request) {
		arrived <- true
		select {
		case <-release:
		case <-r.Context().Done():
			t.Error("the fetch was cancelled")
		}
		fmt.Fprint(w, tokenAnswer("token-1", time.Hour))
	})
	tokens, _ := newTestTokens(t, f, imdsEnv)
	ctx, leave := context.WithCancel(context.Background())
	left := make(chan error)
	go func() {
		_, err := tokens.current(ctx)
		left <- err
	}()
	<-arrived
	leave()
	if err := <-left; err != context.Canceled {
		t.Errorf("the one that left got %v", err)
	}
	close(release)
	wantToken(t, tokens, "token-1")
	f.wantFetches(t, 1)
}

// TestTokenSourceEndsWithoutAWord: a fetch that the program's end breaks off is
// no failure.
func TestTokenSourceEndsWithoutAWord(t *testing.T) {
	logged := followLog(t)
	f := newFakeIdentity(t)
	arrived := make(chan bool, 1)
	f.answerWith(func(_ http.ResponseWriter, r *http.Request) {
		arrived <- true
		<-r.Context().Done()
	})
	e, c := newTestEndpoint(t, f, imdsEnv, "")
	tokens := newTokenSource(e.fetch, c.now)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan bool)
	go func() {
		tokens.run(ctx)
		close(ended)
	}()
	<-arrived
	cancel()
	<-ended
	if text := logged.String(); text != "" {
		t.Errorf("the log has %q", text)
	}
}

func TestUpstream401MakesTokenDueForRefresh(t *testing.T) {
	followLog(t)
	f := newFakeIdentity(t)
	tokens, c := newTestTokens(t, f, imdsEnv)
	got := make(chan string, 1)
	upstream := newUpstream(t, func(w http.ResponseWriter, r *http.Request) {
		got <- r.Header.Get("Authorization")
		w.WriteHeader(401)
	})
	cfg, err := loadConfig(func(name string) string {
		return map[string]string{"TARGET_URL": upstream.URL,
			"AZURE_POD_IDENTITY_AUTHORITY_HOST": f.URL}[name]
	})
	if err != nil {
		t.Fatal(err)
	}
	proxy := httptest.NewServer(newForwarder(cfg.targets, cfg.key, tokens, cfg.secrets))
	defer proxy.Close()
	for _, tt := range []struct {
		name    string
		later   time.Duration
		sent    string
		fetches int64
	}{
		{"first", 0, "token-1", 2},
		{"again", 0, "token-2", 2},
		{"after 29 s", 29 * time.Second, "token-2", 2},
		{"after 30 s", time.Second, "token-2", 3},
		{"next", 0, "token-3", 3},
	} {
		c.advance(tt.later)
		resp, err := http.Get(proxy.URL)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if got := <-got; got != "Bearer "+tt.sent || resp.StatusCode != 401 {
			t.Errorf("%s: upstream saw %q and the client %d, want %q", tt.name, got,
				resp.StatusCode, tt.sent)
		}
		settle(tokens)
		f.wantFetches(t, tt.fetches)
	}
	c.advance(time.Minute)
	tokens.rejected(token{authorization: "Bearer token-2"}) // a late answer to a token that is gone
	settle(tokens)
	f.wantFetches(t, 3)
	f.answerWith(refuse(400, "", ""))
	tokens.rejected(token{authorization: "Bearer token-3"})
	settle(tokens)
	f.wantFetches(t, 4)
	wantToken(t, tokens, "token-3") // though rejected: a missing role is a 401 too
}

// heldToken is a source that holds a token.
func heldToken() *tokenSource {
	later := time.Now().Add(time.Hour)
	s := newTokenSource(nil, time.Now)
	s.held = token{authorization: "Bearer token", expires: later, refresh: later}
	return s
}

func TestHeldTokenAllocatesNothing(t *testing.T) {
	tokens, ctx := heldToken(), context.Background()
	if got := testing.AllocsPerRun(100, func() { tokens.current(ctx) }); got != 0 {
		t.Errorf("got %v allocations, want 0", got)
	}
}

// The endpoint.

func TestEndpointIsTheOneTheEnvironmentMarks(t *testing.T) {
	himds := filepath.Join(t.TempDir(), "himds")
	writeFile(t, himds, "")
	const (
		none     = "/nowhere"
		workload = "AZURE_FEDERATED_TOKEN_FILE=/f AZURE_TENANT_ID=t AZURE_CLIENT_ID=c "
		fabric   = "IDENTITY_ENDPOINT=https://127.0.0.1/sf IDENTITY_HEADER=s " +
			"IDENTITY_SERVER_THUMBPRINT=p "
		app   = "IDENTITY_ENDPOINT=http://127.0.0.1/app?a=b IDENTITY_HEADER=s "
		ml    = "MSI_ENDPOINT=http://127.0.0.1/ml MSI_SECRET=s "
		shell = "MSI_ENDPOINT=http://127.0.0.1/cs "
		arc   = "IDENTITY_ENDPOINT=http://127.0.0.1/arc IMDS_ENDPOINT=http://127.0.0.1 "
		imds  = "http://169.254.169.254/metadata/identity/oauth2/token"
	)
	for _, tt := range []struct{ name, env, himds, want string }{
		{"workload identity", workload, none,
			"workload identity https://login.microsoftonline.com/t/oauth2/v2.0/token marked by " +
				"AZURE_FEDERATED_TOKEN_FILE"},
		{"workload identity of a sovereign cloud", workload +
			"AZURE_AUTHORITY_HOST=https://login.microsoftonline.us/", none,
			"workload identity https://login.microsoftonline.us/t/oauth2/v2.0/token"},
		{"workload identity before Service Fabric", workload + fabric, none,
			"workload identity https"},
		{"App Service", app, none, "App Service http://127.0.0.1/app?a=b marked by " +
			"IDENTITY_ENDPOINT and IDENTITY_HEADER"},
		{"App Service before Azure ML, as it sets both", app + ml, none, "App Service http"},
		{"App Service before Azure Arc", arc + "IDENTITY_HEADER=s", none, "App Service http"},
		{"Azure ML", ml, none, "Azure ML http://127.0.0.1/ml marked by MSI_ENDPOINT and " +
			"MSI_SECRET"},
		{"Azure ML before Azure Arc", ml + arc, himds, "Azure ML http"},
		{"Cloud Shell", shell, none, "Cloud Shell http://127.0.0.1/cs marked by MSI_ENDPOINT"},
		{"Cloud Shell before Azure Arc", shell + arc, himds, "Cloud Shell http"},
		{"Azure Arc", arc, none, "Azure Arc http://127.0.0.1/arc marked by IDENTITY_ENDPOINT " +
			"and IMDS_ENDPOINT"},
		{"Azure Arc by its agent", "", himds,
			"Azure Arc http://127.0.0.1:40342/metadata/identity/oauth2/token marked by " + himds},
		{"Container Instance", "IDENTITY_HEADER=s IDENTITY_SERVER_THUMBPRINT=p", none, "IMDS " +
			imds + " no variable marks another endpoint"},
		{"IMDS", "", none, "IMDS " + imds + " no variable marks another endpoint"},
		{"IMDS with a user-assigned identity", "AZURE_CLIENT_ID=c", none, "IMDS " + imds},
		{"IMDS elsewhere", "AZURE_POD_IDENTITY_AUTHORITY_HOST=http://127.0.0.1:9//", none,
			"IMDS http://127.0.0.1:9/metadata/identity/oauth2/token"},
		{"empty is unset", "IDENTITY_ENDPOINT= IDENTITY_HEADER= MSI_ENDPOINT= AZURE_CLIENT_ID= " +
			"AZURE_TENANT_ID=t", none, "IMDS " + imds},

		{"Service Fabric", fabric, none, "error: IDENTITY_SERVER_THUMBPRINT is set: Service " +
			"Fabric is not supported"},
		{"Cloud Shell with a user-assigned identity", shell + "AZURE_CLIENT_ID=c", none,
			"error: AZURE_CLIENT_ID is set, but Cloud Shell (MSI_ENDPOINT) has no user-assigned " +
				"identities"},
		{"workload identity by half", "AZURE_FEDERATED_TOKEN_FILE=/f AZURE_TENANT_ID=t", none,
			"error: AZURE_FEDERATED_TOKEN_FILE is set without AZURE_CLIENT_ID"},
		{"endpoint without header", "IDENTITY_ENDPOINT=http://127.0.0.1", none,
			"error: IDENTITY_ENDPOINT is set without IDENTITY_HEADER or IMDS_ENDPOINT"},
		{"header without endpoint", "IDENTITY_HEADER=s", none,
			"error: IDENTITY_HEADER is set without IDENTITY_ENDPOINT"},
		{"Azure Arc by half", "IMDS_ENDPOINT=http://127.0.0.1", none,
			"error: IMDS_ENDPOINT is set without IDENTITY_ENDPOINT"},
		{"Azure ML by half", "MSI_SECRET=s", none, "error: MSI_SECRET is set without MSI_ENDPOINT"},
		{"authority in the clear, on this host", workload +
			"AZURE_AUTHORITY_HOST=http://LOCALHOST.:9", none,
			"workload identity http://LOCALHOST.:9/t/oauth2/v2.0/token"},
		{"one source whole, another by half", workload + "MSI_SECRET=s", none,
			"error: MSI_SECRET is set without MSI_ENDPOINT"},
		{"not a URL", "AZURE_POD_IDENTITY_AUTHORITY_HOST=169.254.169.254", none,
			"error: AZURE_POD_IDENTITY_AUTHORITY_HOST: not a URL with a host"},
		{"another scheme", "MSI_ENDPOINT=ftp://127.0.0.1", none, "error: MSI_ENDPOINT: not a URL"},
		{"authority in the clear", workload + "AZURE_AUTHORITY_HOST=http://login.example", none,
			"error: AZURE_AUTHORITY_HOST: want https"},
	} {
		s, err := chooseEndpoint(t, tt.env, arcFiles{agent: tt.himds})
		got := fmt.Sprint("error: ", err)
		if err == nil {
			got = s.name + " " + s.url.String() + " " + s.why
		}
		if !strings.HasPrefix(got, tt.want) {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestStartUpLogNamesTheEndpoint(t *testing.T) {
	log := followLog(t)
	cfg, err := loadConfig(func(name string) string {
		return map[string]string{"TARGET_URL": "http://127.0.0.1/openai/",
			"MSI_ENDPOINT": "http://127.0.0.1:9/ml", "MSI_SECRET": "s3cret", "PORT": "0",
			"HOST": "127.0.0.1"}[name]
	})
	if err != nil {
		t.Fatal(err)
	}
	listeners, err := listen(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer listeners[0].Close()
	newService(cfg).logStart(listeners)
	const want = "tokens for https://cognitiveservices.azure.com/.default come from Azure ML at " +
		"127.0.0.1:9, marked by MSI_ENDPOINT and MSI_SECRET\n"
	if got := log.String(); strings.Count(got, want) != 1 || strings.Contains(got, "s3cret") {
		t.Errorf("got %q, want %q in it", got, want)
	}
}

func TestEachEndpointIsAskedItsOwnWay(t *testing.T) {
	const r = "resource=https%3A%2F%2Fcognitiveservices.azure.com"
	const federated = "client_assertion=jwt%2B%2F%3D&" +
		"client_assertion_type=urn%3Aietf%3Aparams%3Aoauth%3Aclient-assertion-type%3Ajwt-bearer&" +
		"client_id=c1&grant_type=client_credentials&" +
		"scope=https%3A%2F%2Fcognitiveservices.azure.com%2F.default"
	file := filepath.Join(t.TempDir(), "federated")
	writeFile(t, file, "jwt+/=")
	for _, tt := range []struct{ name, env, want string }{
		{"IMDS", imdsEnv, "GET /metadata/identity/oauth2/token?api-version=2018-02-01&" + r +
			" Metadata:true"},
		{"IMDS, user-assigned", imdsEnv + " AZURE_CLIENT_ID=c1",
			"GET /metadata/identity/oauth2/token?api-version=2018-02-01&client_id=c1&" + r +
				" Metadata:true"},
		{"App Service", "IDENTITY_ENDPOINT=URL/msi?a=b IDENTITY_HEADER=s3cret",
			"GET /msi?a=b&api-version=2019-08-01&" + r + " Metadata:true X-Identity-Header:s3cret"},
		{"App Service, user-assigned", appServiceEnv + " AZURE_CLIENT_ID=c1",
			"GET /msi?api-version=2019-08-01&client_id=c1&" + r +
				" Metadata:true X-Identity-Header:s3cret"},
		{"Azure ML", "MSI_ENDPOINT=URL/ml MSI_SECRET=s3cret", "GET /ml?api-version=2017-09-01&" +
			r + " Metadata:true Secret:s3cret"},
		{"Azure ML, user-assigned", "MSI_ENDPOINT=URL/ml MSI_SECRET=s3cret AZURE_CLIENT_ID=c1 " +
			"DEFAULT_IDENTITY_CLIENT_ID=c2", "GET /ml?api-version=2017-09-01&clientid=c1&" + r +
			" Metadata:true Secret:s3cret"},
		{"Azure ML, its default", "MSI_ENDPOINT=URL/ml MSI_SECRET=s3cret " +
			"DEFAULT_IDENTITY_CLIENT_ID=c2", "GET /ml?api-version=2017-09-01&clientid=c2&" + r +
			" Metadata:true Secret:s3cret"},
		{"Cloud Shell", "MSI_ENDPOINT=URL/cs",
			"POST /cs? Content-Type:application/x-www-form-urlencoded Metadata:true " + r},
		{"Azure Arc", arcEnv, "GET /arc?api-version=2020-06-01&" + r +
			" Metadata:true; GET /arc?api-version=2020-06-01&" + r +
			" Authorization:Basic the key Metadata:true"},
		{"Azure Arc, user-assigned", arcEnv +
			" AZURE_CLIENT_ID=00000000-0000-0000-0000-000000000001",
			"GET /arc?api-version=2020-06-01&client_id=00000000-0000-0000-0000-000000000001&" +
				r + " Metadata:true; GET /arc?api-version=2020-06-01&" +
				"client_id=00000000-0000-0000-0000-000000000001&" + r +
				" Authorization:Basic the key Metadata:true"},
		{"workload identity", workloadEnv + file,
			"POST /tenant/oauth2/v2.0/token? Content-Type:application/x-www-form-urlencoded " +
				federated},
	} {
		f := newFakeIdentity(t)
		keys := t.TempDir()
		s, _ := newTestEndpoint(t, f, tt.env, keys)
		key := filepath.Join(keys, "1.key")
		writeFile(t, key, "the key")
		asked := make(chan string, 2)
		f.answerWith(func(w http.ResponseWriter, r *http.Request) {
			line := r.Method + " " + r.URL.Path + "?" + r.URL.Query().Encode()
			var header []string
			for name, values := range r.Header {
				if name != "User-Agent" && name != "Connection" && name != "Content-Length" {
					header = append(header, " "+name+":"+strings.Join(values, ","))
				}
			}
			slices.Sort(header)
			r.ParseForm()
			asked <- strings.TrimSpace(line + strings.Join(header, "") + " " + r.PostForm.Encode())
			if r.URL.Path == "/arc" {
				arcAgent("Basic realm="+key, make(chan string, 1))(w, r)
				return
			}
			fmt.Fprint(w, tokenAnswer("token", time.Hour))
		})
		if got, failure := s.fetch(context.Background()); failure != nil ||
			got.authorization != "Bearer token" {
			t.Errorf("%s: got %q, %v", tt.name, got.authorization, failure)
		}
		got := <-asked
		for len(asked) > 0 {
			got += "; " + <-asked
		}
		if got != tt.want {
			t.Errorf("%s:\n got %q\nwant %q", tt.name, got, tt.want)
		}
		if s.transport.Proxy != nil {
			t.Errorf("%s: goes through the proxy of the environment", tt.name)
		}
	}
}

// TestOnlyEntraIDIsAskedThroughAProxy, and only over TLS: HTTP_PROXY would see the federated token.
func TestOnlyEntraIDIsAskedThroughAProxy(t *testing.T) {
	for env, want := range map[string]bool{
		"AZURE_AUTHORITY_HOST=https://login.example": true,
		"AZURE_AUTHORITY_HOST=http://LOCALHOST:9":    false,
		"AZURE_AUTHORITY_HOST=http://localhost.:9":   false,
	} {
		s, err := chooseEndpoint(t, env+" AZURE_FEDERATED_TOKEN_FILE=f AZURE_TENANT_ID=t "+
			"AZURE_CLIENT_ID=c", arcFiles{agent: "/nowhere"})
		if err != nil {
			t.Fatal(err)
		}
		if got := s.transport.Proxy != nil; got != want {
			t.Errorf("%s: goes through the proxy of the environment: %v, want %v", env, got, want)
		}
	}
}

func TestFederatedTokenIsReadAnewForEachExchange(t *testing.T) {
	f := newFakeIdentity(t)
	file := filepath.Join(t.TempDir(), "federated")
	s, _ := newTestEndpoint(t, f, workloadEnv+file, "")
	assertions := make(chan string, 1)
	f.answerWith(func(w http.ResponseWriter, r *http.Request) {
		assertions <- r.FormValue("client_assertion")
		fmt.Fprint(w, tokenAnswer("token", time.Hour))
	})
	for _, want := range []string{"first", "second"} {
		writeFile(t, file, want)
		if _, failure := s.fetch(context.Background()); failure != nil {
			t.Fatal(failure)
		}
		if got := <-assertions; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	os.Remove(file)
	_, failure := s.fetch(context.Background())
	if failure == nil || willRetry(failure) ||
		!strings.Contains(failure.Error(), "AZURE_FEDERATED_TOKEN_FILE: open "+file) {
		t.Errorf("without the file: got %+v", failure)
	}
	f.wantFetches(t, 2)
}

func TestArcKeyIsReadFromItsDirectoryOnly(t *testing.T) {
	f := newFakeIdentity(t)
	keys := t.TempDir()
	s, _ := newTestEndpoint(t, f, arcEnv, keys)
	outside := filepath.Join(t.TempDir(), "outside.key")
	writeFile(t, outside, "k")
	for name, size := range map[string]int{"a.key": 9, "full.key": 4096, "long.key": 4097,
		"a.txt": 9, "a.key.bak": 9, "locked.key": 9} {
		writeFile(t, filepath.Join(keys, name), strings.Repeat("k", size))
	}
	if err := errors.Join(os.Symlink(outside, filepath.Join(keys, "link.key")),
		os.Mkdir(filepath.Join(keys, "sub.key"), 0o700),
		os.Chmod(filepath.Join(keys, "locked.key"), 0)); err != nil {
		t.Skip(err)
	}
	const want = "it does not name a .key file in "
	for _, tt := range []struct{ name, challenge, want string }{
		{"right", "Basic realm=DIR/a.key", ""},
		{"of the greatest size", "Basic realm=DIR/full.key", ""},
		{"too long", "Basic realm=DIR/long.key", "is not a regular file of 4096 bytes at most"},
		{"symbolic link", "Basic realm=DIR/link.key", "is not a regular file"},
		{"directory", "Basic realm=DIR/sub.key", "is not a regular file"},
		{"missing", "Basic realm=DIR/none.key", "none.key: "},
		{"other extension", "Basic realm=DIR/a.txt", want},
		{"further extension", "Basic realm=DIR/a.key.bak", want},
		{"elsewhere", "Basic realm=" + outside, want},
		{"dots", "Basic realm=DIR/../" + filepath.Base(filepath.Dir(outside)) + "/outside.key",
			want},
		{"dots that end inside", "Basic realm=DIR/sub.key/../a.key", want},
		{"below", "Basic realm=DIR/sub.key/a.key", want},
		{"quoted", `Basic realm="DIR/a.key"`, want},
		{"other scheme", "Bearer realm=DIR/a.key", want},
		{"none", "", want},
		{"not readable", "Basic realm=DIR/locked.key",
			"permission denied; hint: run as root, or join the group himds"},
	} {
		if tt.name == "not readable" && (os.Geteuid() == 0 || runtime.GOOS == "windows") {
			continue // root reads all, and Windows has other permissions
		}
		shown := make(chan string, 2)
		challenge := strings.ReplaceAll(filepath.FromSlash(tt.challenge), "DIR", keys)
		f.answerWith(arcAgent(challenge, shown))
		_, failure := s.fetch(context.Background())
		if (failure == nil) != (tt.want == "") || failure != nil &&
			(willRetry(failure) || !strings.Contains(failure.Error(), tt.want)) {
			t.Errorf("%s: got %v, want %q", tt.name, failure, tt.want)
		}
		if (len(shown) == 1) != (tt.want == "") {
			t.Errorf("%s: a key was shown %d times", tt.name, len(shown))
		}
	}
}

// TestArcKeyIsReadWithoutItsLineBreak: what writes such a file may end it like a text.
func TestArcKeyIsReadWithoutItsLineBreak(t *testing.T) {
	f := newFakeIdentity(t)
	keys := t.TempDir()
	s, _ := newTestEndpoint(t, f, arcEnv, keys)
	key := filepath.Join(keys, "1.key")
	for _, end := range []string{"", "\n", "\r\n"} {
		writeFile(t, key, "the key"+end)
		shown := make(chan string, 1)
		f.answerWith(arcAgent("Basic realm="+key, shown))
		if _, failure := s.fetch(context.Background()); failure != nil {
			t.Errorf("ending in %q: %v", end, failure)
			continue
		}
		if got := <-shown; got != "Basic the key" {
			t.Errorf("ending in %q: the agent was shown %q", end, got)
		}
	}
}

func TestKeyThatNoHeaderCarriesIsRefusedAtOnce(t *testing.T) {
	f := newFakeIdentity(t)
	keys := t.TempDir()
	s, c := newTestEndpoint(t, f, arcEnv, keys)
	key := filepath.Join(keys, "a.key")
	writeFile(t, key, "K3Y\nK3Y")
	f.answerWith(arcAgent("Basic realm="+key, make(chan string, 9)))
	_, failure := s.fetch(context.Background())
	if failure == nil || willRetry(failure) || len(c.pauses) > 0 ||
		!strings.Contains(failure.Error(), "a header cannot carry") {
		t.Errorf("got %v after pauses %v", failure, c.pauses)
	}
}

func TestArcTokenOfAnotherIdentityIsRefused(t *testing.T) {
	f := newFakeIdentity(t)
	keys := t.TempDir()
	s, _ := newTestEndpoint(t, f, arcEnv+" AZURE_CLIENT_ID=c1", keys)
	writeFile(t, filepath.Join(keys, "1.key"), "k")
	f.answerWith(arcAgent("Basic realm="+filepath.Join(keys, "1.key"), make(chan string, 1)))
	if _, failure := s.fetch(context.Background()); failure == nil ||
		!strings.Contains(failure.Error(), "unset AZURE_CLIENT_ID") {
		t.Errorf("got %v", failure)
	}
}

// One fetch.

func TestRetriesWhatMayPassAndNothingElse(t *testing.T) {
	const cut = "HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n" + `{"access_token":"LEAK`
	for _, tt := range []struct {
		name, env string
		answer    http.HandlerFunc
		want      string // pauses before the token that the third try gets
	}{
		{"408", imdsEnv, refuse(408, "", ""), "0.8 s, 1.6 s"},
		{"429", imdsEnv, refuse(429, "", ""), "0.8 s, 1.6 s"},
		{"500", imdsEnv, refuse(500, "", ""), "0.8 s, 1.6 s"},
		{"404 of IMDS", imdsEnv, refuse(404, "", ""), "0.8 s, 1.6 s"},
		{"410 of IMDS", imdsEnv, refuse(410, "", ""), "0.8 s, 1.6 s"},
		{"404 of App Service", appServiceEnv, refuse(404, "", ""), "none"},
		{"410 of App Service", appServiceEnv, refuse(410, "", ""), "none"},
		{"404 of Azure Arc", arcEnv, refuse(404, "", ""), "none"},
		{"429 of App Service", appServiceEnv, refuse(429, "", ""), "0.8 s, 1.6 s"},
		{"400", imdsEnv, refuse(400, "", ""), "none"},
		{"403", imdsEnv, refuse(403, "", ""), "none"},
		{"201", imdsEnv, refuse(201, "", tokenAnswer("LEAK", time.Hour)), "none"},
		{"hung up", imdsEnv, answerRaw(""), "0.8 s, 1.6 s"},
		{"cut off", imdsEnv, answerRaw(cut), "0.8 s, 1.6 s"},
		{"cut off in a chunk", imdsEnv, answerRaw("HTTP/1.1 200 OK\r\n" +
			"Transfer-Encoding: chunked\r\n\r\n9\r\n{"), "0.8 s, 1.6 s"},
		{"not HTTP", appServiceEnv, answerRaw("SSH-2.0-OpenSSH_9.9\r\n"), "0.8 s, 1.6 s"},
		{"endless header", imdsEnv, answerRaw("HTTP/1.1 200 OK\r\nA: " +
			strings.Repeat("a", maxAnswer)), "0.8 s, 1.6 s"},
		{"expired", imdsEnv, refuse(200, "", `{"access_token":"LEAK","expires_on":"1"}`),
			"0.8 s, 1.6 s"},
		{"Retry-After", appServiceEnv, refuse(429, "3", ""), "3s 3s"},
		{"Retry-After of no time", appServiceEnv, refuse(503, "0.0001", ""), "0.8 s, 1.6 s"},
		{"Retry-After a date", appServiceEnv, refuse(503, "Sun, 01 Mar 2026 12:00:04 GMT", ""),
			"4s, 1.6 s"},
		{"more than is left", imdsEnv, refuse(503, "12", ""), "12s, then none"},
		{"more than a fetch", imdsEnv, refuse(503, "23", ""), "none"},
	} {
		f := newFakeIdentity(t)
		s, c := newTestEndpoint(t, f, tt.env, "")
		f.answerWith(func(w http.ResponseWriter, r *http.Request) {
			if f.fetches.Load() < 3 {
				tt.answer(w, r)
				return
			}
			fmt.Fprint(w, tokenAnswer("token", time.Hour))
		})
		token, failure := s.fetch(context.Background())
		got := strings.Trim(fmt.Sprint(c.pauses), "[]")
		switch {
		case len(c.pauses) == 0:
			got = "none"
		case len(c.pauses) == 1:
			got += ", then none"
		case about(c.pauses[0], firstPause) && about(c.pauses[1], 2*firstPause):
			got = "0.8 s, 1.6 s"
		case c.pauses[0] == 4*time.Second && about(c.pauses[1], 2*firstPause):
			got = "4s, 1.6 s"
		}
		if got != tt.want || (len(c.pauses) == 2) != (token.authorization == "Bearer token") {
			t.Errorf("%s: got %q after pauses %s, want %s: %v", tt.name, token.authorization, got,
				tt.want, failure)
		}
	}
}

func TestFetchIsBounded(t *testing.T) {
	f := newFakeIdentity(t)
	f.answerWith(refuse(500, "", ""))
	s, c := newTestEndpoint(t, f, imdsEnv, "")
	within := func(ctx context.Context, d time.Duration) bool {
		end, ok := ctx.Deadline()
		return ok && time.Until(end) <= d
	}
	request := s.request
	s.request = func(ctx context.Context) (*http.Request, error) {
		if !within(ctx, tryTime) {
			t.Error("a try has no deadline")
		}
		return request(ctx)
	}
	pause := s.sleep
	s.sleep = func(ctx context.Context, d time.Duration) {
		if !within(ctx, fetchTime) {
			t.Error("a fetch has no deadline")
		}
		pause(ctx, d)
	}
	followLog(t)
	tokens := runTokens(t, s.fetch, c.now)
	wantToken(t, tokens, "")
	var total time.Duration
	for _, pause := range c.pauses {
		total += pause
	}
	if n := f.fetches.Load(); n < 5 || n > 6 || total > fetchTime {
		t.Errorf("asked %d times with pauses %v", n, c.pauses)
	}

	// The reading of a body ends with the try.
	ctx, cancel := context.WithCancel(context.Background())
	f.answerWith(func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).Flush()
		cancel()
		select {
		case <-r.Context().Done():
		case <-time.After(tryTime / 2):
			t.Error("the answer is read for longer than the fetch lasts")
		}
	})
	if _, failure := s.fetch(ctx); failure == nil || !willRetry(failure) {
		t.Errorf("got %v", failure)
	}
}

func TestFetchEndsWithItsContext(t *testing.T) {
	f := newFakeIdentity(t)
	f.answerWith(refuse(500, "", ""))
	e, _ := newTestEndpoint(t, f, imdsEnv, "")
	ctx, cancel := context.WithCancel(context.Background())
	pauses := 0
	e.sleep = func(context.Context, time.Duration) {
		pauses++
		cancel()
	}
	if _, err := e.fetch(ctx); err == nil || pauses != 1 {
		t.Errorf("got %v after %d pauses, want an error after one", err, pauses)
	}
	f.wantFetches(t, 1)
}

// TestProxyBeforeEntraIsNamed, if it refuses.
func TestProxyBeforeEntraIsNamed(t *testing.T) {
	e, _ := newTestEndpoint(t, newFakeIdentity(t), "AZURE_AUTHORITY_HOST=https://localhost "+
		"AZURE_TENANT_ID=t AZURE_CLIENT_ID=c AZURE_FEDERATED_TOKEN_FILE=go.mod", "")
	refusing, err := url.Parse(newUpstream(t, answerRaw("HTTP/1.1 407 Proxy Authentication "+
		"Required\r\n\r\n")).URL)
	if err != nil {
		t.Fatal(err)
	}
	e.transport.Proxy = http.ProxyURL(refusing)
	_, failure := e.fetch(context.Background())
	if failure == nil || !strings.Contains(failure.Error(), "workload identity at localhost gave "+
		"no answer: HTTPS_PROXY answered 407 Proxy Authentication Required") {
		t.Errorf("got %v", failure)
	}
}

func TestRefusalIsToldInTheEndpointsWords(t *testing.T) {
	const id = " AZURE_CLIENT_ID=c1"
	const assign = "hint: assign a managed identity to this host, or correct AZURE_CLIENT_ID"
	for _, tt := range []struct {
		name, env string
		status    int
		body      string
		want      string
	}{
		{"no identity", imdsEnv, 400, noIdentity, "IMDS at HOST answered 400: BODY; " + assign},
		{"wrong client id", imdsEnv + id, 400, noIdentity,
			"IMDS at HOST answered 400: BODY (client_id c1, from AZURE_CLIENT_ID); " + assign},
		{"several identities", imdsEnv, 400,
			`{"error_description":"Multiple user assigned identities exist, please specify"}`,
			"IMDS at HOST answered 400: BODY; hint: set AZURE_CLIENT_ID to the client id of one " +
				"of them"},
		{"wrong resource", imdsEnv, 400, `{"error_description":"AADSTS500011: no such principal"}`,
			"IMDS at HOST answered 400: BODY; hint: correct AZURE_OPENAI_SCOPE"},
		{"App Service", appServiceEnv + id, 400, `{"message":"No Managed Identity found"}`,
			"App Service at HOST answered 400: BODY (client_id c1, from AZURE_CLIENT_ID)"},
		{"Azure ML", "MSI_ENDPOINT=URL MSI_SECRET=s3cret DEFAULT_IDENTITY_CLIENT_ID=c2", 400, "no",
			"Azure ML at HOST answered 400: BODY (client_id c2, from DEFAULT_IDENTITY_CLIENT_ID)"},
		{"Cloud Shell", "MSI_ENDPOINT=URL", 400, `{"error":{"code":"AudienceNotSupported"}}`,
			"Cloud Shell at HOST answered 400: BODY"},
		{"workload identity", workloadEnv + "go.mod", 401,
			`{"error_description":"AADSTS700211: no matching credential"}`,
			"workload identity at HOST answered 401: BODY (client_id c1, from AZURE_CLIENT_ID); " +
				"hint: the federated credential's issuer, subject or audience is not this pod's"},
		{"Docker Desktop", imdsEnv, 403,
			"dial tcp: A socket operation was attempted to an unreachable network.",
			"IMDS at HOST answered 403: BODY; hint: this is not an Azure host"},
		{"Azure Arc", arcEnv, 500, "agent is starting", "Azure Arc at HOST answered 500: BODY"},
		{"a web proxy", imdsEnv, 400, "<?xml version=\"1.0\"?>\r\n<Error>x</Error>",
			`IMDS at HOST answered 400: <?xml version="1.0"?>  <Error>x</Error>`},
	} {
		f := newFakeIdentity(t)
		s, _ := newTestEndpoint(t, f, tt.env, "")
		f.answerWith(refuse(tt.status, "", tt.body))
		_, failure := s.fetch(context.Background())
		if got := strings.ReplaceAll(fmt.Sprint(failure), s.url.Host,
			"HOST"); got != strings.Replace(tt.want, "BODY", tt.body, 1) {
			t.Errorf("%s:\n got %q\nwant %q", tt.name, got, tt.want)
		}
	}
	s, _ := newTestEndpoint(t, newFakeIdentity(t), "AZURE_POD_IDENTITY_AUTHORITY_HOST="+nobody, "")
	_, failure := s.fetch(context.Background())
	if failure == nil || !willRetry(failure) ||
		!strings.Contains(failure.Error(), "; hint: only Azure hosts have it") ||
		!strings.Contains(failure.Error(), "gave no answer: dial tcp 127.0.0.1:1: ") {
		t.Errorf("nobody there: got %v", failure)
	}
}

func TestRedirectsAreNotFollowed(t *testing.T) {
	elsewhere := newFakeIdentity(t)
	for _, env := range []string{imdsEnv, appServiceEnv, "MSI_ENDPOINT=URL/cs"} {
		for status, location := range map[int]string{
			301: elsewhere.URL, 302: elsewhere.URL, 303: elsewhere.URL, 307: elsewhere.URL,
			308: elsewhere.URL, 300: "http://%zz/", // which is no URL
		} {
			f := newFakeIdentity(t)
			s, _ := newTestEndpoint(t, f, env, "")
			f.answerWith(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Location", location)
				w.WriteHeader(status)
			})
			_, failure := s.fetch(context.Background())
			if failure == nil || willRetry(failure) ||
				!strings.Contains(failure.Error(), fmt.Sprintf("answered %d", status)) {
				t.Errorf("%d: got %v", status, failure)
			}
			f.wantFetches(t, 1)
		}
	}
	elsewhere.wantFetches(t, 0)
}

func TestEndlessAnswerIsCut(t *testing.T) {
	f := newFakeIdentity(t)
	s, _ := newTestEndpoint(t, f, imdsEnv, "")
	for _, status := range []int{200, 400} {
		f.answerWith(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			for {
				if _, err := io.WriteString(w, strings.Repeat("x", 64<<10)); err != nil {
					return
				}
			}
		})
		if _, failure := s.fetch(context.Background()); failure == nil ||
			len(failure.Error()) > 600 {
			t.Errorf("%d: got %v", status, failure)
		}
	}
}

// Parsing.

func TestEveryFormOfExpiryIsRead(t *testing.T) {
	const noon = 1772366400 // what the clock shows
	for _, tt := range []struct {
		name, fields  string
		off           time.Duration // of the endpoint's clock
		want, refresh time.Duration
	}{
		{"IMDS", `"expires_in":"3600","expires_on":"1772370000"`, 0, 3600, 2880},
		{"numbers", `"expires_in":3600,"expires_on":1772370000`, 0, 3600, 2880},
		{"floats", `"expires_in":"3600.0","expires_on":1772370000.0`, 0, 3600, 2880},
		{"exponent", `"expires_on":1.77237e9`, 0, 3600, 2880},
		{"App Service", `"expires_on":"1772370000"`, 0, 3600, 2880},
		{"Entra ID", `"expires_in":3600`, 0, 3600, 2880},
		{"expires_in counted from an earlier issue",
			`"expires_in":"86399","expires_on":"1772370000"`, 0, 3600, 2880},
		{"expires_in ends earlier", `"expires_in":3600,"expires_on":"1772449200"`, 0, 3600, 2880},
		{"2017 on Linux", `"expires_on":"03/01/2026 13:00:00 +00:00"`, 0, 3600, 2880},
		{"2017 on Windows", `"expires_on":"3/1/2026 1:00:00 PM +00:00"`, 0, 3600, 2880},
		{"another zone", `"expires_on":"3/1/2026 11:00:00 AM -02:00"`, 0, 3600, 2880},
		{"US", `"expires_on":"03/01/2026 13:00:00"`, 0, 3600, 2880},
		{"SQL", `"expires_on":"2026-03-01 13:00:00"`, 0, 3600, 2880},
		{"ISO 8601 of .NET", `"expires_on":"2026-03-01T13:00:00.0000000+00:00"`, 0, 3600, 2880},
		{"RFC 3339", `"expires_on":"2026-03-01T15:00:00+02:00"`, 0, 3600, 2880},
		{"null beside a number", `"expires_on":null,"expires_in":3600`, 0, 3600, 2880},
		{"empty beside a number", `"expires_on":"","expires_in":"3600"`, 0, 3600, 2880},
		{"refresh_in", `"expires_in":3600,"refresh_in":1800`, 0, 3600, 1800},
		{"refresh_in as a string", `"expires_in":3600,"refresh_in":"1800"`, 0, 3600, 1800},
		{"refresh_in too late", `"expires_in":3600,"refresh_in":3600`, 0, 3600, 2880},
		{"refresh_in unreadable", `"expires_in":3600,"refresh_in":"soon"`, 0, 3600, 2880},
		{"endpoint's clock ahead", `"expires_on":"1772377200"`, 2 * time.Hour, 3600, 2880},
		{"endpoint's clock behind", `"expires_on":"1772362800"`, -2 * time.Hour, 3600, 2880},
		{"endpoint's clock a little ahead", `"expires_on":"1772370000"`, 5 * time.Second, 3595,
			2876},
		{"expires_in needs no clock", `"expires_in":3600`, 2 * time.Hour, 3600, 2880},
	} {
		f := newFakeIdentity(t)
		s, c := newTestEndpoint(t, f, imdsEnv, "")
		f.answerWith(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Date", time.Unix(noon, 0).Add(tt.off).UTC().Format(http.TimeFormat))
			fmt.Fprintf(w, `{"access_token":"!~",%s}`, tt.fields)
		})
		got, failure := s.fetch(context.Background())
		if failure != nil {
			t.Errorf("%s: %v", tt.name, failure)
			continue
		}
		if life, refresh := got.expires.Sub(c.now()),
			got.refresh.Sub(c.now()); life != tt.want*time.Second ||
			refresh != tt.refresh*time.Second {
			t.Errorf("%s: got %v, %v; want %d s, %d s", tt.name, life, refresh, tt.want, tt.refresh)
		}
	}
}

func TestUnusableAnswerIsAnErrorThatKeepsItToItself(t *testing.T) {
	const in = `","expires_in":3600}`
	for _, tt := range []struct{ name, body, want string }{
		{"no expiry", `{"access_token":"LEAK"}`, "expires_on and expires_in are missing"},
		{"empty expiry", `{"access_token":"LEAK","expires_on":"","expires_in":null}`,
			"expires_on and expires_in are missing"},
		{"words", `{"access_token":"LEAK","expires_on":"LEAK"}`,
			"expires_on: not in a form known here"},
		{"milliseconds", `{"access_token":"LEAK","expires_on":1772370000000}`, "expires_on: not"},
		{"boolean", `{"access_token":"LEAK","expires_on":true}`, "expires_on: not"},
		{"object", `{"access_token":"LEAK","expires_on":{"LEAK":1}}`, "expires_on: not"},
		{"negative", `{"access_token":"LEAK","expires_in":-1}`,
			"expires_in: not a number of seconds"},
		{"too far", `{"access_token":"LEAK","expires_in":1e300}`, "expires_in: not"},
		{"one of two unreadable", `{"access_token":"LEAK","expires_on":"1772370000","expires_in` +
			`":"LEAK"}`, "expires_in: not"},
		{"expired", `{"access_token":"LEAK","expires_on":"1772366400"}`, errExpired.Error()},
		{"no life", `{"access_token":"LEAK","expires_in":0}`, errExpired.Error()},
		{"hardly a life", `{"access_token":"LEAK","expires_in":0.02}`, errExpired.Error()},
		{"no token", `{"expires_in":3600,"id":"LEAK"}`, "access_token is missing"},
		{"empty token", `{"access_token":"` + in, "access_token is missing"},
		{"null", `null`, "access_token is missing"},
		{"token of a number", `{"access_token":1,"expires_in":3600}`,
			"not the JSON object expected"},
		{"array", `["LEAK"]`, "not the JSON object expected"},
		{"empty", ``, "not the JSON object expected"},
		{"a web page", `<html>LEAK</html>`,
			"answered with text/html; charset=utf-8, not a usable token: not the JSON object " +
				"expected"},
		{"too large", `{"access_token":"` + strings.Repeat("LEAK", maxAnswer/4) + in,
			"not the JSON object expected"},
		{"line break", `{"access_token":"LEAK\r\nX-Forged: 1` + in,
			"access_token has bytes that a header cannot carry"},
		{"space", `{"access_token":"LEAK LEAK` + in, "access_token has bytes"},
		{"NUL", `{"access_token":"LEAK\u0000` + in, "access_token has bytes"},
		{"DEL", `{"access_token":"LEAK\u007f` + in, "access_token has bytes"},
		{"not ASCII", `{"access_token":"LEAKé` + in, "access_token has bytes"},
	} {
		f := newFakeIdentity(t)
		s, _ := newTestEndpoint(t, f, imdsEnv, "")
		f.answerWith(func(w http.ResponseWriter, _ *http.Request) {
			w.Header()["Date"] = nil
			io.WriteString(w, tt.body)
		})
		got, failure := s.fetch(context.Background())
		if failure == nil || got != (token{}) || !strings.Contains(failure.Error(), tt.want) ||
			strings.Contains(failure.Error(), "LEAK") {
			t.Errorf("%s: got %v, want %q", tt.name, failure, tt.want)
		}
		if asked := f.fetches.Load(); (asked > 1) != (tt.want == errExpired.Error()) {
			t.Errorf("%s: asked %d times", tt.name, asked)
		}
	}
}

// Text that is safe to show.

// TestFailureIsExplainedByKnownErrorsOnly makes real round trips fail. What
// net/http says of the rest quotes
// the
// peer's bytes.
func TestFailureIsExplainedByKnownErrorsOnly(t *testing.T) {
	plain := func(text string) string { return newUpstream(t, answerRaw(text)).URL }
	secure := httptest.NewTLSServer(http.NotFoundHandler())
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	t.Cleanup(secure.Close)
	silent := newUpstream(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	for _, tt := range []struct{ name, url, want string }{
		{"refused", nobody, "dial tcp 127.0.0.1:1: "},
		{"hang-up", plain(""), "the connection ended"},
		{"certificate", secure.URL, "x509: certificate signed by unknown authority"},
		{"no TLS", "https" + strings.TrimPrefix(plain("HTTP/1.1 400 LEAK\r\n\r\n"), "http"),
			"the answer is not TLS"},
		{"silence", silent.URL, "timed out"},
		{"cut head", plain("HTTP/1.1 200 OK\r\nA: LEAK"), "the connection ended"},
		{"no status line", plain("Bearer LEAK\r\n\r\n"), "the answer is not HTTP"},
		{"status", plain("HTTP/1.1 LEAK\r\n\r\n"), "the answer is not HTTP"},
		{"version", plain("HTTP/LEAK 200 OK\r\n\r\n"), "the answer is not HTTP"},
		{"header line", plain("HTTP/1.1 200 OK\r\nBearer LEAK\r\n\r\n"), "the answer is not HTTP"},
		{"header name", plain("HTTP/1.1 200 OK\r\n LEAK: a\r\n\r\n"), "the answer is not HTTP"},
		{"length", plain("HTTP/1.1 200 OK\r\nContent-Length: LEAK\r\n\r\n"),
			"the answer is not HTTP"},
		{"lengths", plain("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: LEAK\r\n\r\n"),
			"the answer is not HTTP"},
		{"framing", plain("HTTP/1.1 200 OK\r\nTransfer-Encoding: LEAK\r\n\r\n"),
			"the answer is not HTTP"},
		{"trailer", plain("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nLEAK\r\n\r\n"),
			"the answer is not HTTP"},
		{"chunk", plain("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nLEAK\r\n"),
			"the answer is not HTTP"},
		{"cut body", plain("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nLEAK"),
			"the connection ended"},
	} {
		wait := safetyNet
		if tt.name == "silence" {
			wait = time.Second / 4
		}
		ctx, cancel := context.WithTimeout(context.Background(), wait)
		req, _ := http.NewRequestWithContext(ctx, "GET", tt.url, nil)
		resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
		if err == nil {
			_, err = io.ReadAll(resp.Body)
			resp.Body.Close()
		}
		cancel()
		if err == nil {
			t.Errorf("%s: no error", tt.name)
			continue
		}
		if _, got := explainFailure(err); !strings.Contains(got, tt.want) ||
			strings.Contains(got, "LEAK") {
			t.Errorf("%s: got %q of %q, want %q", tt.name, got, err, tt.want)
		}
	}
	for _, tt := range []struct {
		err  error
		want string
	}{
		{&net.DNSError{Err: "no such host", Name: "a.example"}, "a.example: no such host"},
		{fmt.Errorf("LEAK: %w", context.Canceled), "cancelled"},
		{errors.New("LEAK"), "the connection ended, or the answer is not HTTP"},
		{&net.OpError{Op: "remote error", Err: tls.AlertError(40)},
			"remote error: tls: handshake failure"},
		{&net.OpError{Op: "proxyconnect", Net: "tcp", Err: &net.OpError{Op: "dial", Net: "tcp",
			Addr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9}, Err: errors.New("no")}},
			"proxyconnect tcp: dial tcp 127.0.0.1:9: no"},
		{proxyRefusal(407), "HTTPS_PROXY answered 407 Proxy Authentication Required"},
	} {
		if _, got := explainFailure(tt.err); got != tt.want {
			t.Errorf("%v: got %q, want %q", tt.err, got, tt.want)
		}
	}
}

func TestNothingTheEndpointSaysLeaksOrForges(t *testing.T) {
	const forged = "\n2026/03/01 12:00:00 forged\r\u202e\u2028\u2029\u0085\x1b[2J\x00"
	log := followLog(t)
	jsonForged := `s3cret\n2026/03/01 12:00:00 forged\r\u202e\u2028\u2029\u0085\u001b[2J\u0000`
	for _, tt := range []struct {
		name   string
		answer http.HandlerFunc
	}{
		{"text", refuse(400, "", "s3cret"+forged)},
		{"message", refuse(400, "", `{"message":"`+jsonForged+`"}`)},
		{"error_description", refuse(403, "", `{"error":"`+jsonForged+`","error_description":"`+
			``+jsonForged+`"}`)},
		{"error.message", refuse(500, "", `{"error":{"code":"`+jsonForged+`","message":"`+
			``+jsonForged+`"}}`)},
		{"body of a 200", refuse(200, "", "s3cret"+forged)},
		{"token of a 200", refuse(200, "", `{"access_token":"s3cret`+jsonForged+`","expires_in"`+
			`:3600}`)},
		{"Content-Type", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "s3cret\u202e\u2028")
		}},
		{"header without a colon", answerRaw("HTTP/1.1 200 OK\r\ns3cret\u202e\u2028\r\n\r\n")},
		{"status line", answerRaw("s3cret\u202e\u2028\r\n\r\n")},
		{"status", answerRaw("HTTP/1.1 400 s3cret\u202e\u2028\r\nContent-Length: 0\r\n\r\n")},
		{"Location", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1/?s3cret", http.StatusFound)
		}},
		{"a token", func(w http.ResponseWriter,
			_ *http.Request) {
			fmt.Fprint(w, tokenAnswer("s3cret", time.Hour))
		}},
	} {
		f := newFakeIdentity(t)
		before := len(log.String())
		f.answerWith(tt.answer)
		tokens, _ := newTestTokens(t, f, "IDENTITY_ENDPOINT=URL/msi?code=hidden "+
			"IDENTITY_HEADER=s3cret")
		_, err := tokens.current(context.Background())
		line := log.String()[before:]
		if strings.Count(line, "\n") != 1 || !strings.Contains(line,
			strings.TrimPrefix(f.URL, "http://")) {
			t.Errorf("%s: logged %q, want one line", tt.name, line)
		}
		for _, bad := range []string{"s3cret", "hidden", "\n2026", "\r", "\x00", "\x1b", "\u0085",
			"\u202e", "\u2028", "\u2029"} {
			if text := fmt.Sprint(err); strings.Contains(line, bad) || strings.Contains(text, bad) {
				t.Errorf("%s: %q is in the log or the error: %q, %q", tt.name, bad, line, text)
			}
		}
	}
}

func TestArcAnswerWithoutChallengeIsNotEchoed(t *testing.T) {
	f := newFakeIdentity(t)
	s, _ := newTestEndpoint(t, f, arcEnv, "")
	f.answerWith(refuse(200, "", `{"access_token":"LEAK`))
	if _, failure := s.fetch(context.Background()); failure == nil ||
		strings.Contains(failure.Error(), "LEAK") {
		t.Errorf("got %v", failure)
	}
}

// TestHeldTokenAndKeyStayOutOfAFailure: the endpoint may repeat what it gave before, or half of it.
func TestHeldTokenAndKeyStayOutOfAFailure(t *testing.T) {
	log := followLog(t)
	f := newFakeIdentity(t)
	held := "eyJ0eXAi.held." + strings.Repeat("t0k3n", 15) // short enough to be no secret otherwise
	f.answerWith(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, tokenAnswer(held, time.Hour))
	})
	tokens, c := newTestTokens(t, f, imdsEnv)
	wantToken(t, tokens, held)
	for _, words := range []string{"x " + held, strings.Repeat("x ", 245) + held, "x " + held[:40],
		`{"error_description":"` + held + `"}`} {
		f.answerWith(refuse(400, "", words))
		c.advance(50 * time.Minute)
		wantToken(t, tokens, held)
		settle(tokens)
		c.advance(-50*time.Minute + safetyNet)
	}
	if text := log.String(); strings.Count(text, "answered 400: ") != 4 ||
		strings.Contains(text, "held") ||
		strings.Contains(text, "t0k3n") {
		t.Errorf("got %s", text)
	}
}

func TestSecretIsRedactedBeforeWordsAreCut(t *testing.T) {
	f := newFakeIdentity(t)
	s, _ := newTestEndpoint(t, f, appServiceEnv, "")
	// The secret lies across the limit, which "answered 400: " comes before.
	f.answerWith(refuse(400, "", strings.Repeat("x ", (maxPiece-18)/2)+"s3cret"))
	_, failure := s.fetch(context.Background())
	if text := failure.Error(); strings.Contains(text, "s3c") || !strings.Contains(text, "x RED") {
		t.Errorf("got %v", failure)
	}
}

func TestArcKeyAndAssertionAreRedacted(t *testing.T) {
	f := newFakeIdentity(t)
	keys := t.TempDir()
	s, _ := newTestEndpoint(t, f, arcEnv, keys)
	key := filepath.Join(keys, "a.key")
	writeFile(t, key, "K3Y")
	f.answerWith(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("WWW-Authenticate", "Basic realm="+key)
		if r.Header.Get("Authorization") == "" {
			w.WriteHeader(401)
			return
		}
		http.Error(w, "bad key "+r.Header.Get("Authorization"), 400)
	})
	_, failure := s.fetch(context.Background())
	if text := failure.Error(); strings.Contains(text, "K3Y") ||
		!strings.Contains(text, "bad key Basic REDACTED") {
		t.Errorf("arc: got %v", failure)
	}
	file := filepath.Join(t.TempDir(), "federated")
	writeFile(t, file, "eyJ4.eyJ5.s1g")
	s, _ = newTestEndpoint(t, f, workloadEnv+file, "")
	f.answerWith(func(w http.ResponseWriter, r *http.Request) {
		http.Error(w, "bad assertion "+r.FormValue("client_assertion"), 400)
	})
	_, failure = s.fetch(context.Background())
	if text := failure.Error(); strings.Contains(text, "s1g") ||
		!strings.Contains(text, "bad assertion REDACTED") {
		t.Errorf("workload: got %v", failure)
	}
}

func TestErrorIsBounded(t *testing.T) {
	f := newFakeIdentity(t)
	s, _ := newTestEndpoint(t, f, imdsEnv, "")
	words := strings.Repeat("x ", 50_000)
	for name, answer := range map[string]http.HandlerFunc{
		"content type": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", words)
		},
		"body": refuse(400, "", words),
	} {
		f.answerWith(answer)
		_, failure := s.fetch(context.Background())
		if n := len(failure.Error()); n < maxPiece || n > maxPiece+200 {
			t.Errorf("%s: %d bytes", name, len(failure.Error()))
		}
	}
}

// TestSafeText: secrets go first, then what could forge a line, then what is too long.
func TestSafeText(t *testing.T) {
	const header = "eyJ0eXAiOiJKV1QiLCJhbGciOiJSUzI1NiJ9."
	const held, proof = header + "eyJpYXQiOjJ9.held", header + "eyJpYXQiOjF9.proof" // begin alike
	s := &secrets{}
	s.hide("endpoint's secret", "sesame")
	s.hide("key", "open sesame")
	s.hide("proof", proof)
	s.hide("other", "")
	for i := range 1000 { // pushes out none of another kind
		s.hide("token", strconv.Itoa(i))
	}
	s.hide("token", held)
	x := func(n int) string { return strings.Repeat("x", n) }
	for _, tt := range []struct {
		name, text string
		limit      int
		want       string
	}{
		{"nothing to do", "a b", 9, "a b"},
		{"empty", "", 9, ""},
		{"key", "a open sesame b", 99, "a REDACTED b"},
		{"one secret in another", "sesame, open sesame", 99, "REDACTED, REDACTED"},
		{"token", "a " + held + " b", 99, "a REDACTED b"},
		{"proof, which begins alike", "a " + proof + " b", 99, "a REDACTED b"},
		{"tokens in a row", held + held + "\n", 99, "REDACTEDREDACTED "},
		{"beginning of a token", "a " + held[:20] + "… b", 99, "a REDACTED… b"},
		{"beginning of a token, and more", "a:" + held[:20] + "guess b", 99, "a:REDACTED b"},
		{"beginning within a word", "a:x" + held[:16] + "/b", 99, "a:REDACTED/b"},
		{"less than counts", "a " + held[:15] + " b", 99, "a " + held[:15] + " b"},
		{"a word that may be a token", "a/" + x(101) + "?b", 99, "a/REDACTED?b"},
		{"one such word in another", x(101) + " " + x(102), 99, "REDACTED REDACTED"},
		{"words that are none", x(100) + "/" + x(100), 201, x(100) + "/" + x(100)},
		{"token at the limit", x(16) + " " + held, 20, x(16) + " RED…"},
		{"control characters", "a\nb\r\x1b\u2028\u202e\x00c", 20, "a b     c"},
		{"at the limit", x(20), 20, x(20)},
		{"too long", x(21), 20, x(20) + "…"},
		{"too long, cut within a rune", x(19) + "üü", 20, x(19) + "…"},
	} {
		if got := s.safe(tt.text, tt.limit); got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
	if n := len(s.values); n != 4 {
		t.Errorf("%d secrets are kept", n)
	}
}

// Fuzz targets.

func FuzzSafeText(f *testing.F) {
	f.Add("a open sesame b", "open sesame", 10)
	f.Add("\x1b\n\u202e\xff", "\n", 3)
	f.Add("xxxxxxxxxxxxxxxxxxxxxxxx", "xxxxxxxxxxxxxxxxxxx", 5)
	f.Fuzz(func(t *testing.T, text, value string, limit int) {
		const mark = "\x00" // for what is redacted
		if limit < 1 || limit > 1e6 || strings.Contains("REDACTED", value) ||
			strings.Contains(value, mark) {
			return
		}
		s := &secrets{}
		s.hide("key", value)
		s.hide("token", value+"2")
		got := s.safe(text, limit)
		if len(got) > limit+len("…") || printable(got) != got || !utf8.ValidString(got) {
			t.Errorf("%q without %q: got %q", text, value, got)
		}
		if strings.Contains(strings.ReplaceAll(s.redact(text), "REDACTED", mark), value) {
			t.Errorf("%q keeps %q", text, value)
		}
	})
}

func FuzzParseToken(f *testing.F) {
	f.Add(tokenAnswer("token", time.Hour), int64(0))
	for _, seed := range []string{`null`, `{}`, `[]`, `{"access_token":"a b","expires_in":1}`,
		`{"access_token":"a","expires_in":8e9,"refresh_in":1e-9}`,
		`{"access_token":"a","expires_on":"2026-03-01T13:00:00.0000000+00:00"}`,
		`{"access_token":"a","expires_on":"3/1/2026 1:00:00 PM +00:00"}`,
		`{"access_token":"a","expires_on":"9999-12-31T23:59:59Z"}`,
		`{"access_token":"a","expires_in":1e-9}`} {
		f.Add(seed, int64(3600))
	}
	sent := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
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
		if secret == "" || bad || !got.expires.After(sent) || !got.refresh.After(sent) {
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
	for _, seed := range []string{"", "Basic realm=", `Basic realm="DIR/a.key"`,
		"Basic realm=DIR/../a.key", "Basic realm=DIR//a.key", "Basic realm=DIR/other.txt"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, challenge string) {
		challenge = strings.ReplaceAll(challenge, "DIR", dir)
		key, err := readKey(challenge, dir)
		if legal := challenge == "Basic realm="+good; legal != (err == nil) || legal &&
			key != "a.key" || !legal && key != "" {
			t.Errorf("%q: got %q, %v", challenge, key, err)
		}
	})
}
