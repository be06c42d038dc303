package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

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
		http.Error(w, `{"error":"invalid_request","error_description":"Required metadata header not specified"}`, 400)
		return
	}
	fmt.Fprint(w, tokenAnswer("token-"+strconv.FormatInt(n, 10), f.life))
}

// answerWith makes f answer by handler from now on.
func (f *fakeIdentity) answerWith(handler http.HandlerFunc) { f.answer.Store(&handler) }

// token is the newest token that f has given.
func (f *fakeIdentity) token() string { return "token-" + strconv.FormatInt(f.fetches.Load(), 10) }

// gave tells whether f gave the token in an Authorization header.
func (f *fakeIdentity) gave(authorization string) bool {
	number, ok := strings.CutPrefix(authorization, "Bearer token-")
	n, err := strconv.ParseInt(number, 10, 64)
	return ok && err == nil && n <= f.fetches.Load()
}

// tokenAnswer is what IMDS says, whose numbers are strings.
func tokenAnswer(token string, life time.Duration) string {
	return fmt.Sprintf(`{"access_token":%q,"client_id":"00000000-0000-0000-0000-000000000001","expires_in":"%d",`+
		`"expires_on":"%d","resource":"https://cognitiveservices.azure.com","token_type":"Bearer"}`,
		token, int(life.Seconds()), time.Now().Add(life).Unix())
}
