package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha1"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestMain lets the test binary stand in for the real one: with AOAI_PROXY_TEST_MAIN set it is
// aoai-proxy, for tests that need its exit status or its signals.
func TestMain(m *testing.M) {
	if os.Getenv("AOAI_PROXY_TEST_MAIN") != "" {
		os.Unsetenv("AOAI_PROXY_TEST_MAIN")
		main()
		os.Exit(0)
	}
	for _, name := range []string{"http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"} {
		os.Unsetenv(name) // tests speak to loopback addresses only
	}
	os.Exit(m.Run())
}

// testProxy is a proxy on a loopback address, started the way the program starts it.
type testProxy struct {
	*proxy
	addr    string // "127.0.0.1:40001"
	url     string // "http://127.0.0.1:40001"
	signals chan os.Signal
	stopped chan struct{} // closed when serve has returned
}

// startProxy starts a proxy with the settings env in front of upstream; a PORT of 0, and identity
// as IMDS, unless env says otherwise.
func startProxy(t testing.TB, identity *fakeIdentity, upstream *httptest.Server, env map[string]string) *testProxy {
	t.Helper()
	settings := map[string]string{
		"TARGET_URL":                        upstream.URL + "/openai/",
		"PORT":                              "0",
		"AZURE_POD_IDENTITY_AUTHORITY_HOST": identity.URL,
	}
	for name, value := range env {
		settings[name] = value
	}
	cfg, err := loadConfig(func(name string) string { return settings[name] })
	if err != nil {
		t.Fatal(err)
	}
	listeners, err := listen(cfg)
	if err != nil {
		t.Fatal(err)
	}
	p := &testProxy{
		proxy:   newProxy(cfg),
		signals: make(chan os.Signal, 2),
		stopped: make(chan struct{}),
	}
	_, port, _ := net.SplitHostPort(listeners[0].Addr().String())
	p.addr = net.JoinHostPort("127.0.0.1", port)
	p.url = "http://" + p.addr
	if upstream.TLS != nil {
		p.forward.transport.TLSClientConfig.RootCAs = upstream.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs
	}
	go func() {
		defer close(p.stopped)
		if err := p.serve(listeners, p.signals); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() {
		p.signals <- syscall.SIGTERM // drain
		p.signals <- syscall.SIGTERM // at once
		<-p.stopped
		p.forward.transport.CloseIdleConnections()
	})
	return p
}

// newUpstream is an Azure OpenAI resource on a loopback address.
func newUpstream(t testing.TB, handler http.HandlerFunc) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(handler)
	t.Cleanup(func() {
		s.CloseClientConnections()
		s.Close()
	})
	return s
}

// logBuffer collects the log of a test.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func captureLog(t testing.TB) *logBuffer {
	l := &logBuffer{}
	log.SetOutput(l)
	t.Cleanup(func() { log.SetOutput(os.Stderr) })
	return l
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

var demo = flag.Bool("demo", false, "run the demo until Ctrl-C")

// TestDemo is make demo: the proxy in front of a stand-in for Azure. Without -demo it sends its one
// chat and ends.
func TestDemo(t *testing.T) {
	env := map[string]string{"PORT": "0"}
	if *demo {
		env["PORT"] = os.Getenv("PORT")
		env["EXPECTED_KEY"] = os.Getenv("EXPECTED_KEY")
		env["AZURE_LOG_LEVEL"] = "debug"
	}
	identity := newFakeIdentity(t)
	azure := &fakeAzure{identity: identity, pause: 60 * time.Millisecond}
	if !*demo {
		azure.pause = 0
		captureLog(t)
	}
	p := startProxy(t, identity, newUpstream(t, azure.ServeHTTP), env)

	key := env["EXPECTED_KEY"]
	if key == "" {
		key = "anything"
	}
	const body = `{"messages":[{"role":"user","content":"Who are you?"}],"stream":true}`
	req, _ := http.NewRequest("POST", p.url+"/deployments/gpt-4o/chat/completions?api-version=2024-10-21",
		strings.NewReader(body))
	req.Header.Set("api-key", key)
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	fmt.Print("\nThe stand-in's answer, word by word as it arrives:\n\n    ")
	var said strings.Builder
	for event := range sseEvents(resp.Body) {
		var chunk struct {
			Choices []struct{ Delta struct{ Content string } }
		}
		if json.Unmarshal([]byte(event), &chunk) == nil && len(chunk.Choices) > 0 {
			said.WriteString(chunk.Choices[0].Delta.Content)
			fmt.Print(chunk.Choices[0].Delta.Content)
		}
	}
	fmt.Println()
	if got := strings.TrimSpace(said.String()); got != demoAnswer {
		t.Fatalf("the client was told %q, want %q", got, demoAnswer)
	}
	if !*demo {
		return
	}
	fmt.Printf(demoText, p.url, key)
	interrupted, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	<-interrupted.Done()
}

const demoText = `
The proxy is up until Ctrl-C. Paste into another terminal:

curl:
    curl -N %[1]s/v1/chat/completions -H 'api-key: %[2]s' -H 'Content-Type: application/json' \
      -d '{"model":"gpt-4o","stream":true,"messages":[{"role":"user","content":"Who are you?"}]}'

OpenAI SDK (npm install openai):
    OPENAI_BASE_URL=%[1]s/v1 OPENAI_API_KEY=%[2]s node --input-type=module -e '
      import OpenAI from "openai"; const ai = new OpenAI();
      const stream = await ai.chat.completions.create({ model: "gpt-4o", stream: true,
        messages: [{ role: "user", content: "Who are you?" }] });
      for await (const part of stream) process.stdout.write(part.choices[0]?.delta?.content ?? "");'

codex (npm install -g @openai/codex):
    AZURE_API_KEY=%[2]s codex exec --skip-git-repo-check -m gpt-5-codex -c model_provider=azure \
      -c 'model_providers.azure={name="Azure",base_url="%[1]s/v1",env_key="AZURE_API_KEY",wire_api="responses"}' \
      'Who are you?'

`

const demoAnswer = "I am a stand-in for Azure OpenAI, and I saw a managed-identity token instead of your key."

// sseEvents yields the data of each server-sent event.
func sseEvents(body io.Reader) <-chan string {
	events := make(chan string)
	go func() {
		defer close(events)
		var line []byte
		one := make([]byte, 1)
		for {
			if _, err := body.Read(one); err != nil {
				return
			}
			if one[0] != '\n' {
				line = append(line, one[0])
				continue
			}
			if data, ok := strings.CutPrefix(string(line), "data: "); ok {
				events <- data
			}
			line = line[:0]
		}
	}()
	return events
}

// fakeAzure looks like an Azure OpenAI resource to clients. It accepts nothing but the current
// token of identity.
type fakeAzure struct {
	identity *fakeIdentity
	pause    time.Duration // between two words
}

func (a *fakeAzure) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("apim-request-id", fmt.Sprintf("demo-%d", time.Now().UnixNano()))
	if !a.identity.gave(r.Header.Get("Authorization")) || r.Header.Get("Api-Key") != "" {
		writeJSON(w, 401, `{"error":{"code":"401","message":"Access token is missing, invalid, audience is incorrect or have expired."}}`)
		return
	}
	path := strings.TrimPrefix(strings.TrimPrefix(r.URL.Path, "/openai"), "/v1")
	if strings.HasPrefix(path, "/deployments/") {
		path = "/" + strings.Join(strings.Split(path, "/")[3:], "/")
	}
	if strings.EqualFold(r.Header.Get("Upgrade"), "websocket") {
		a.realtime(w, r)
		return
	}
	var request struct {
		Model  string
		Stream bool
	}
	body, _ := io.ReadAll(r.Body)
	json.Unmarshal(body, &request)
	switch path {
	case "/chat/completions":
		a.chat(w, request.Model, request.Stream)
	case "/responses":
		a.responses(w, request.Model, request.Stream)
	case "/embeddings":
		writeJSON(w, 200, `{"object":"list","model":"text-embedding-3-small","data":[{"object":"embedding","index":0,`+
			`"embedding":[0.1,-0.2,0.3]}],"usage":{"prompt_tokens":3,"total_tokens":3}}`)
	case "/models":
		writeJSON(w, 200, `{"object":"list","data":[{"id":"gpt-4o","object":"model","created":1715367049,"owned_by":"azure"},`+
			`{"id":"gpt-5-codex","object":"model","created":1757527818,"owned_by":"azure"}],"models":[]}`)
	default:
		writeJSON(w, 404, `{"error":{"code":"404","message":"Resource not found"}}`)
	}
}

func writeJSON(w http.ResponseWriter, status int, body string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	io.WriteString(w, body)
}

// sendEvent writes one server-sent event and flushes it.
func (a *fakeAzure) sendEvent(w http.ResponseWriter, name string, data any) {
	if name != "" {
		fmt.Fprintf(w, "event: %s\n", name)
	}
	text, _ := json.Marshal(data)
	fmt.Fprintf(w, "data: %s\n\n", text)
	w.(http.Flusher).Flush()
	time.Sleep(a.pause)
}

type object = map[string]any

func (a *fakeAzure) chat(w http.ResponseWriter, model string, stream bool) {
	message := func(key string, content object, finish any) object {
		return object{"id": "chatcmpl-demo", "object": "chat.completion.chunk", "created": 1760000000, "model": model,
			"choices": []object{{"index": 0, key: content, "finish_reason": finish}}}
	}
	if !stream {
		answer := message("message", object{"role": "assistant", "content": demoAnswer}, "stop")
		answer["object"] = "chat.completion"
		text, _ := json.Marshal(answer)
		writeJSON(w, 200, string(text))
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	a.sendEvent(w, "", message("delta", object{"role": "assistant", "content": ""}, nil))
	for _, word := range strings.SplitAfter(demoAnswer, " ") {
		a.sendEvent(w, "", message("delta", object{"content": word}, nil))
	}
	a.sendEvent(w, "", message("delta", object{}, "stop"))
	io.WriteString(w, "data: [DONE]\n\n")
}

func (a *fakeAzure) responses(w http.ResponseWriter, model string, stream bool) {
	content := object{"type": "output_text", "text": demoAnswer, "annotations": []any{}}
	item := object{"id": "msg_demo", "type": "message", "status": "completed", "role": "assistant", "content": []any{content}}
	response := object{"id": "resp_demo", "object": "response", "created_at": 1760000000, "model": model,
		"status": "completed", "output": []any{item}, "usage": object{"input_tokens": 3, "output_tokens": 17, "total_tokens": 20,
			"input_tokens_details": object{"cached_tokens": 0}, "output_tokens_details": object{"reasoning_tokens": 0}}}
	if !stream {
		text, _ := json.Marshal(response)
		writeJSON(w, 200, string(text))
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	n := 0
	send := func(kind string, fields object) {
		fields["type"], fields["sequence_number"] = kind, n
		n++
		a.sendEvent(w, kind, fields)
	}
	started := object{"id": "resp_demo", "object": "response", "created_at": 1760000000, "model": model,
		"status": "in_progress", "output": []any{}}
	send("response.created", object{"response": started})
	send("response.output_item.added", object{"output_index": 0, "item": object{"id": "msg_demo", "type": "message",
		"status": "in_progress", "role": "assistant", "content": []any{}}})
	send("response.content_part.added", object{"item_id": "msg_demo", "output_index": 0, "content_index": 0,
		"part": object{"type": "output_text", "text": "", "annotations": []any{}}})
	for _, word := range strings.SplitAfter(demoAnswer, " ") {
		send("response.output_text.delta", object{"item_id": "msg_demo", "output_index": 0, "content_index": 0, "delta": word})
	}
	send("response.output_text.done", object{"item_id": "msg_demo", "output_index": 0, "content_index": 0, "text": demoAnswer})
	send("response.content_part.done", object{"item_id": "msg_demo", "output_index": 0, "content_index": 0, "part": content})
	send("response.output_item.done", object{"output_index": 0, "item": item})
	send("response.completed", object{"response": response})
}

// realtime accepts a WebSocket, greets as the Realtime API does and then echoes each message.
func (a *fakeAzure) realtime(w http.ResponseWriter, r *http.Request) {
	conn, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	sum := sha1.Sum([]byte(r.Header.Get("Sec-WebSocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"+
		"Sec-WebSocket-Accept: %s\r\n", base64.StdEncoding.EncodeToString(sum[:]))
	if protocol, _, _ := strings.Cut(r.Header.Get("Sec-WebSocket-Protocol"), ","); protocol != "" {
		fmt.Fprintf(conn, "Sec-WebSocket-Protocol: %s\r\n", protocol)
	}
	io.WriteString(conn, "\r\n")
	writeFrame(conn, 1, []byte(`{"type":"session.created","event_id":"event_1","session":{"id":"sess_demo","object":"realtime.session"}}`))
	for {
		opcode, payload, err := readFrame(buf.Reader)
		if err != nil || opcode == 8 {
			writeFrame(conn, 8, nil)
			return
		}
		writeFrame(conn, opcode, payload)
	}
}

// writeFrame writes a WebSocket message of one unmasked frame (RFC 6455 §5.2).
func writeFrame(w io.Writer, opcode byte, payload []byte) error {
	head := []byte{0x80 | opcode, byte(len(payload))}
	if len(payload) > 125 {
		head = binary.BigEndian.AppendUint16([]byte{0x80 | opcode, 126}, uint16(len(payload)))
	}
	_, err := w.Write(append(head, payload...))
	return err
}

// readFrame reads a frame, masked or not, of up to 64 KiB.
func readFrame(r *bufio.Reader) (opcode byte, payload []byte, err error) {
	var head [2]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	length := int(head[1] & 0x7f)
	if length == 126 {
		var long [2]byte
		if _, err := io.ReadFull(r, long[:]); err != nil {
			return 0, nil, err
		}
		length = int(binary.BigEndian.Uint16(long[:]))
	}
	var mask [4]byte
	if head[1]&0x80 != 0 {
		if _, err := io.ReadFull(r, mask[:]); err != nil {
			return 0, nil, err
		}
	}
	payload = make([]byte, length)
	_, err = io.ReadFull(r, payload)
	for i := range payload {
		payload[i] ^= mask[i%4]
	}
	return head[0] & 0x0f, payload, err
}
