// Demo runs aoai-proxy without Azure, as a user would run it:
//
//	make demo             # or go run ./demo
//	go run ./demo -once   # checks itself and ends, for CI
//
// It starts a stand-in for Azure on loopback ports, builds the real program,
// starts it in front of the stand-in, has one chat through it, and prints lines
// to paste into another terminal. The proxy's PORT and EXPECTED_KEY may be set.
// Ctrl-C ends it, and what it made is gone then. (go run passes no other signal
// on: a kill has to go to the demo itself.)
//
// The stand-in is an identity endpoint (IMDS), which gives tokens, and a Foundry
// resource, which accepts nothing else. It has models, chat completions,
// responses, embeddings and a realtime WebSocket that echoes under /openai/, and
// Claude's messages under /anthropic/. It is as strict as Azure with paths,
// api-versions, the names of deployments and parameters, so that a client that
// works here is set up right. Each answer is the same sentence; but a client that
// offers tools has one of them called first, once.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha1"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

func main() {
	once := flag.Bool("once", false, "check the answers and end")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, *once)
	if ctx.Err() != nil {
		return // Ctrl-C, and what failed by it
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// onceTime bounds -once, the build of the proxy included.
const onceTime = 3 * time.Minute

func run(ctx context.Context, once bool) error {
	settings := map[string]string{
		"PORT":            os.Getenv("PORT"),
		"HOST":            "127.0.0.1",
		"EXPECTED_KEY":    os.Getenv("EXPECTED_KEY"),
		"AZURE_LOG_LEVEL": "debug",
	}
	azure := &standIn{pause: 60 * time.Millisecond}
	if once {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, onceTime)
		defer cancel()
		settings["PORT"], settings["EXPECTED_KEY"] = "0", "the-key"
		azure.pause = 0
	}

	identityURL, err := serve(http.HandlerFunc(azure.identity))
	if err != nil {
		return err
	}
	resourceURL, err := serve(http.HandlerFunc(azure.resource))
	if err != nil {
		return err
	}
	settings["AZURE_POD_IDENTITY_AUTHORITY_HOST"] = identityURL
	settings["TARGET_URL"] = resourceURL + "/openai/ " + resourceURL + "/anthropic/"

	p, err := startProxy(ctx, settings)
	if err != nil {
		return err
	}
	defer p.stop()
	client := &client{base: p.url, key: settings["EXPECTED_KEY"]}
	if client.key == "" {
		client.key = "anything"
	}
	if once {
		return client.check(ctx)
	}
	if err := client.showChat(ctx); err != nil {
		return err
	}
	openCode, _ := json.Marshal(object{"provider": object{"azure": object{
		"options": object{"baseURL": p.url + "/v1", "apiKey": client.key},
		"models":  object{"gpt-5.1": object{}}}}})
	fmt.Printf(pasteLines, p.url, quoted(client.key), quoted("api-key: "+client.key),
		quoted(string(openCode)))
	select {
	case <-ctx.Done():
		return nil
	case <-p.ended:
		return errors.New("the proxy has ended")
	}
}

// quoted is text as one word of a shell.
func quoted(text string) string {
	return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'"
}

// pasteLines are for other clients; 1 is the proxy's URL, 2 its key, 3 the header
// with the key, and 4 the configuration of opencode.
const pasteLines = `
The proxy is up until Ctrl-C. Paste into another terminal:

curl:
    curl -N %[1]s/v1/chat/completions -H %[3]s -H 'Content-Type: application/json' \
      -d '{"model":"gpt-4o","stream":true,"messages":[{"role":"user","content":"Who are you?"}]}'

OpenAI SDK (npm install openai):
    OPENAI_BASE_URL=%[1]s/v1 OPENAI_API_KEY=%[2]s node --input-type=module -e '
      import OpenAI from "openai"; const ai = new OpenAI();
      const stream = await ai.chat.completions.create({ model: "gpt-4o", stream: true,
        messages: [{ role: "user", content: "Who are you?" }] });
      for await (const part of stream) process.stdout.write(part.choices[0]?.delta?.content ?? "");'

codex (npm install -g @openai/codex):
    AZURE_API_KEY=%[2]s codex exec --skip-git-repo-check -m gpt-5-codex -c model_provider=azure \
      -c model_providers.azure.name=Azure -c model_providers.azure.base_url=%[1]s/v1 \
      -c model_providers.azure.env_key=AZURE_API_KEY -c model_providers.azure.wire_api=responses \
      'Who are you?'

Claude Code (npm install -g @anthropic-ai/claude-code):
    ANTHROPIC_BASE_URL=%[1]s/anthropic ANTHROPIC_AUTH_TOKEN=%[2]s \
      ANTHROPIC_MODEL=claude-sonnet-4-5 ANTHROPIC_DEFAULT_HAIKU_MODEL=claude-haiku-4-5 \
      claude -p 'Who are you?'

GitHub Copilot CLI (npm install -g @github/copilot):
    COPILOT_PROVIDER_TYPE=azure COPILOT_PROVIDER_BASE_URL=%[1]s COPILOT_PROVIDER_API_KEY=%[2]s \
      COPILOT_MODEL=gpt-5.1 COPILOT_PROVIDER_WIRE_API=responses copilot -p 'Who are you?'

opencode (npm install -g opencode-ai):
    OPENCODE_CONFIG_CONTENT=%[4]s \
      opencode run -m azure/gpt-5.1 'Who are you?'

qwen-code (npm install -g @qwen-code/qwen-code):
    OPENAI_BASE_URL=%[1]s/v1 OPENAI_API_KEY=%[2]s OPENAI_MODEL=gpt-4o qwen -p 'Who are you?'

`

// serve answers on a free loopback port until the demo ends.
func serve(handler http.Handler) (url string, err error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	go http.Serve(ln, handler)
	return "http://" + ln.Addr().String(), nil
}

// proxy is the real program, as a process of its own.
type proxy struct {
	url   string // "http://127.0.0.1:8081"
	dir   string // holds the binary, and is its working directory
	cmd   *exec.Cmd
	ended chan struct{} // closed when the process has ended
}

// startProxy builds the program and waits until it listens. Its log goes to
// this program's standard error. It gets no environment but its settings and
// what a system needs, so that neither a .env file nor a proxy of the user's
// comes between.
func startProxy(ctx context.Context, settings map[string]string) (*proxy, error) {
	dir, err := os.MkdirTemp("", "aoai-proxy-demo")
	if err != nil {
		return nil, err
	}
	p := &proxy{dir: dir, ended: make(chan struct{})}
	binary := filepath.Join(dir, "aoai-proxy")
	if runtime.GOOS == "windows" {
		binary += ".exe"
	}
	build := exec.CommandContext(ctx, "go", "build", "-o", binary, "aoai-proxy")
	if out, err := build.CombinedOutput(); err != nil {
		os.RemoveAll(dir)
		return nil, fmt.Errorf("building the proxy (run it in a checkout): %w\n%s", err, out)
	}

	p.cmd = exec.Command(binary)
	p.cmd.Dir = dir
	for _, name := range []string{"PATH", "HOME", "SystemRoot", "TEMP", "TMP"} {
		p.cmd.Env = append(p.cmd.Env, name+"="+os.Getenv(name))
	}
	for name, value := range settings {
		p.cmd.Env = append(p.cmd.Env, name+"="+value)
	}
	stderr, err := p.cmd.StderrPipe()
	if err == nil {
		err = p.cmd.Start()
	}
	if err != nil {
		os.RemoveAll(dir)
		return nil, fmt.Errorf("starting the proxy: %w", err)
	}

	addr := make(chan string, 1)
	go p.follow(stderr, addr)
	select {
	case found := <-addr:
		p.url = "http://" + found
		return p, nil
	case <-p.ended:
		p.stop()
		return nil, errors.New("the proxy did not start; its log says why")
	case <-ctx.Done():
		p.stop()
		return nil, errors.New("the proxy does not listen")
	}
}

// follow copies the proxy's log to standard error, and finds in it the address
// on which the proxy listens.
func (p *proxy) follow(log io.Reader, addr chan<- string) {
	for lines := bufio.NewScanner(log); lines.Scan(); {
		fmt.Fprintln(os.Stderr, lines.Text())
		_, rest, ok := strings.Cut(lines.Text(), "proxy listening on ")
		if !ok {
			continue
		}
		found, _, _ := strings.Cut(rest, " ")
		if strings.HasPrefix(found, ":") {
			found = "127.0.0.1" + found // it listens on every interface
		}
		select {
		case addr <- found:
		default: // the first of several addresses will do
		}
	}
	p.cmd.Wait()
	close(p.ended)
}

// stop ends the proxy at once: two signals cut its drain short. Windows has no
// signal that one process can send to another.
func (p *proxy) stop() {
	for range 2 {
		if runtime.GOOS == "windows" || p.cmd.Process.Signal(syscall.SIGTERM) != nil {
			p.cmd.Process.Kill()
		}
		select {
		case <-p.ended:
		case <-time.After(time.Second):
		}
	}
	<-p.ended
	os.RemoveAll(p.dir)
}

// client speaks to the proxy as an SDK would.
type client struct {
	base string // "http://127.0.0.1:8081"
	key  string
}

const chatBody = `{"model":"gpt-4o","stream":true,"messages":[{"role":"user","content":"Who?"}]}`

func (c *client) post(ctx context.Context, path, body string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.base+path,
		strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("api-key", c.key)
	req.Header.Set("Content-Type", "application/json")
	// This transport uses no proxy of the environment.
	return (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
}

// showChat prints an answer word by word as it arrives.
func (c *client) showChat(ctx context.Context) error {
	fmt.Print("\nThe stand-in's answer, word by word as it arrives:\n\n    ")
	text, err := c.chat(ctx, "/deployments/gpt-4o/chat/completions?api-version=2024-10-21",
		func(word string) { fmt.Print(word) })
	fmt.Println()
	if err == nil && text != sentence {
		err = fmt.Errorf("the client was told %q, not %q", text, sentence)
	}
	return err
}

// chat streams one chat completion, and calls onText with each piece of it.
func (c *client) chat(ctx context.Context, path string, onText func(string)) (string, error) {
	resp, err := c.post(ctx, path, chatBody)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		body, _ := io.ReadAll(resp.Body)
		return "", fmt.Errorf("%s: %s", resp.Status, body)
	}
	var text strings.Builder
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		data, _ := strings.CutPrefix(lines.Text(), "data: ")
		var chunk struct {
			Choices []struct{ Delta struct{ Content string } }
		}
		if json.Unmarshal([]byte(data), &chunk) == nil && len(chunk.Choices) > 0 {
			onText(chunk.Choices[0].Delta.Content)
			text.WriteString(chunk.Choices[0].Delta.Content)
		}
	}
	return text.String(), lines.Err()
}

// check is -once: it tries each kind of answer, and a wrong key.
func (c *client) check(ctx context.Context) error {
	checks := []struct {
		name string
		try  func() error
	}{
		{"streamed chat", func() error {
			text, err := c.chat(ctx, "/v1/chat/completions", func(string) {})
			return expect(err, text, sentence)
		}},
		{"chat in one piece", func() error {
			return c.checkPost(ctx, "/v1/chat/completions", `{"model":"gpt-4o"}`, 200, sentence)
		}},
		{"usage of a streamed chat", func() error {
			return c.checkPost(ctx, "/v1/chat/completions", `{"model":"gpt-4o","stream":true,`+
				`"stream_options":{"include_usage":true}}`, 200, `"total_tokens":20`)
		}},
		{"streamed response", func() error {
			return c.checkPost(ctx, "/v1/responses", `{"model":"gpt-5.1","stream":true}`, 200,
				"response.completed")
		}},
		{"streamed message of Claude", func() error {
			return c.checkPost(ctx, "/anthropic/v1/messages",
				`{"model":"claude-sonnet-4-5","stream":true}`, 200, "message_stop")
		}},
		{"tool call in chat", func() error {
			return c.checkPost(ctx, "/v1/chat/completions", `{"model":"gpt-4o","tools":[`+
				`{"type":"function","function":{"name":"Bash","parameters":{"type":"object",`+
				`"required":["command"],"properties":{"command":{"type":"string"}}}}}]}`, 200,
				`"arguments":"{\"command\":\"echo hello\"}"`)
		}},
		{"tool call in a response", func() error {
			return c.checkPost(ctx, "/v1/responses", `{"model":"gpt-5.1","tools":[`+
				`{"type":"function","name":"f","parameters":{}}]}`, 200, `"name":"f"`)
		}},
		{"tool result in a response", func() error {
			return c.checkPost(ctx, "/v1/responses", `{"model":"gpt-5.1","tools":[`+
				`{"type":"function","name":"f","parameters":{}}],"input":[`+
				`{"type":"function_call_output","output":"done"}]}`, 200, "done")
		}},
		{"tool call of Claude", func() error {
			return c.checkPost(ctx, "/anthropic/v1/messages", `{"model":"claude-sonnet-4-5",`+
				`"tools":[{"name":"f","input_schema":{}}]}`, 200, `"stop_reason":"tool_use"`)
		}},
		{"path without v1", func() error {
			return c.checkPost(ctx, "/chat/completions", `{"model":"gpt-4o"}`, 404,
				"Resource not found")
		}},
		{"classic path without a version", func() error {
			return c.checkPost(ctx, "/deployments/gpt-4o/chat/completions", `{}`, 404,
				"Resource not found")
		}},
		{"classic chat without a deployment", func() error {
			return c.checkPost(ctx, "/chat/completions?api-version=2024-10-21",
				`{"model":"gpt-4o"}`, 404, "Resource not found")
		}},
		{"GPT at Claude's path", func() error {
			return c.checkPost(ctx, "/anthropic/v1/messages", `{"model":"gpt-4o"}`, 400,
				"OperationNotSupported")
		}},
		{"empty path segment", func() error {
			return c.checkPost(ctx, "/v1//responses", `{"model":"gpt-4o"}`, 404,
				"Resource not found")
		}},
		{"version on v1", func() error {
			return c.checkPost(ctx, "/v1/responses?api-version=2024-10-21", `{"model":"gpt-4o"}`,
				400, `"param":"api-version"`)
		}},
		{"model that is not deployed", func() error {
			return c.checkPost(ctx, "/v1/responses", `{"model":"gpt-6"}`, 404,
				"DeploymentNotFound")
		}},
		{"max_tokens with gpt-5", func() error {
			return c.checkPost(ctx, "/v1/chat/completions", `{"model":"gpt-5.1","max_tokens":1}`,
				400, `"param":"max_tokens"`)
		}},
		{"wrong key", func() error {
			stranger := &client{base: c.base, key: "wrong"}
			return stranger.checkPost(ctx, "/v1/responses", `{}`, 401, "invalid_api_key")
		}},
		{"WebSocket", func() error { return c.checkEcho(ctx) }},
	}
	for _, check := range checks {
		if err := check.try(); err != nil {
			return fmt.Errorf("%s: %w", check.name, err)
		}
		fmt.Println("ok  ", check.name)
	}
	return nil
}

// expect is an error unless err is nil and text contains want.
func expect(err error, text, want string) error {
	if err == nil && !strings.Contains(text, want) {
		err = fmt.Errorf("got %q, without %q", text, want)
	}
	return err
}

func (c *client) checkPost(ctx context.Context, path, body string, status int, want string) error {
	resp, err := c.post(ctx, path, body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != status {
		err = fmt.Errorf("got %s, not %d", resp.Status, status)
	}
	return expect(err, string(text), want)
}

// checkEcho opens a WebSocket and has a message echoed.
func (c *client) checkEcho(ctx context.Context) error {
	conn, err := net.Dial("tcp", strings.TrimPrefix(c.base, "http://"))
	if err != nil {
		return err
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		conn.SetDeadline(deadline)
	}
	fmt.Fprintf(conn, "GET /v1/realtime?model=gpt-realtime HTTP/1.1\r\nHost: 127.0.0.1\r\n"+
		"Api-Key: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"+
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", c.key)
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		return fmt.Errorf("got %s", resp.Status)
	}
	_, greeting, err := readFrame(r)
	if err := expect(err, string(greeting), "session.created"); err != nil {
		return err
	}
	writeFrame(conn, 1, []byte("hello"))
	_, echo, err := readFrame(r)
	return expect(err, string(echo), "hello")
}

// sentence is all that the stand-in says.
const sentence = "I am a stand-in for Azure OpenAI, " +
	"and I saw a managed-identity token instead of your key."

// accessToken is the one that the stand-in gives and takes. It looks like a JWT
// that says whose it is, but nobody has signed it.
var accessToken = "eyJhbGciOiJub25lIn0." + base64.RawURLEncoding.EncodeToString([]byte(
	`{"aud":"https://cognitiveservices.azure.com","tid":"tenant-of-the-demo",`+
		`"oid":"11111111-2222-3333-4444-555555555555","appid":"app-of-the-demo"}`)) +
	".c2lnbmF0dXJl"

// standIn looks like Azure to clients.
type standIn struct {
	pause time.Duration // between two words
}

// object is a JSON object.
type object = map[string]any

// identity is IMDS, whose numbers are strings.
func (s *standIn) identity(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Metadata") != "true" {
		writeJSON(w, http.StatusBadRequest, object{"error": "invalid_request",
			"error_description": "Required metadata header not specified"})
		return
	}
	const life = 24 * time.Hour
	writeJSON(w, http.StatusOK, object{
		"access_token": accessToken,
		"client_id":    "app-of-the-demo",
		"expires_in":   fmt.Sprint(int(life.Seconds())),
		"expires_on":   fmt.Sprint(time.Now().Add(life).Unix()),
		"resource":     "https://cognitiveservices.azure.com",
		"token_type":   "Bearer",
	})
}

// resource is Azure OpenAI and Claude on Foundry. It accepts its token and no
// key, and as strictly as the real one, only paths, models and parameters that
// it knows.
func (s *standIn) resource(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("apim-request-id", fmt.Sprintf("demo-%d", time.Now().UnixNano()))
	if r.Header.Get("Authorization") != "Bearer "+accessToken ||
		r.Header.Get("Api-Key") != "" || r.Header.Get("X-Api-Key") != "" {
		writeError(w, http.StatusUnauthorized, "401", "",
			"Access token is missing, invalid, audience is incorrect or have expired.")
		return
	}
	var asked request
	body, _ := io.ReadAll(r.Body)
	json.Unmarshal(body, &asked)
	asked.turn = turn{text: sentence}

	api, operation := split(r.URL.Path)
	version := r.URL.Query().Get("api-version")
	isDated := strings.HasPrefix(version, "20")
	inDeployment := false
	switch {
	case api == "/openai/" && !isDated:
		operation = "" // without a version there is nothing here
	case api == "/openai/" && strings.HasPrefix(operation, "deployments/"):
		parts := strings.SplitN(operation, "/", 3)
		asked.Model, operation, inDeployment = parts[1], parts[len(parts)-1], true
	}
	if strings.EqualFold(r.Header.Get("Upgrade"), "websocket") && operation != "realtime" {
		// codex and Copilot CLI go on over HTTP then.
		writeError(w, http.StatusUpgradeRequired, "426", "", "no WebSocket here")
		return
	}

	// The classic API has chat and embeddings below a deployment, and nothing else
	// there.
	isClaude, isV1 := api == "/anthropic/v1/", api == "/openai/v1/"
	kind := "" // of the model that is needed
	var answer func()
	switch r.Method + " " + operation {
	case "GET models":
		if !isClaude && !inDeployment {
			answer = func() { listModels(w) }
		}
	case "GET realtime":
		if !isClaude && !inDeployment {
			answer = func() { realtime(w, r) }
		}
	case "POST embeddings":
		if isV1 || inDeployment {
			kind, answer = "embeddings", func() { embeddings(w, asked.Encoding) }
		}
	case "POST chat/completions":
		if isV1 || inDeployment {
			kind, answer = "chat", func() { s.chat(w, &asked) }
		}
	case "POST responses":
		if !isClaude && !inDeployment {
			kind, answer = "chat", func() { s.responses(w, &asked) }
		}
	case "POST messages":
		if isClaude && asked.Model == "" {
			writeError(w, http.StatusBadRequest, "invalid_request_error", "",
				"model: Field required")
			return
		}
		if isClaude {
			kind, answer = "claude", func() { s.messages(w, &asked) }
		}
	case "POST messages/count_tokens":
		if isClaude {
			answer = func() { writeJSON(w, http.StatusOK, object{"input_tokens": 3}) }
		}
	}
	if answer == nil {
		writeError(w, http.StatusNotFound, "404", "", "Resource not found")
		return
	}
	if isV1 && isDated {
		writeError(w, http.StatusBadRequest, "BadRequest", "api-version",
			"api-version query parameter is not allowed when using /v1 path")
		return
	}
	has, isDeployed := deployments[asked.Model]
	if kind != "" && isDeployed && has != kind {
		writeError(w, http.StatusBadRequest, "OperationNotSupported", "",
			"The operation does not work with the specified model, "+asked.Model+".")
		return
	}
	if kind != "" && !isDeployed {
		writeError(w, http.StatusNotFound, "DeploymentNotFound", "",
			"The API deployment for this resource does not exist. If you created the deployment "+
				"within the last 5 minutes, please wait a moment and try again.")
		return
	}
	answer()
}

// split separates the path of an API from that of an operation in it.
func split(path string) (api, operation string) {
	for _, api := range []string{"/openai/v1/", "/openai/", "/anthropic/v1/"} {
		if operation, ok := strings.CutPrefix(path, api); ok {
			return api, operation
		}
	}
	return "", ""
}

// deployments have the names of their models. The value is what they are for.
var deployments = map[string]string{
	"gpt-4o": "chat", "gpt-5.1": "chat", "gpt-5-codex": "chat",
	"text-embedding-3-small": "embeddings",
	"claude-sonnet-4-5":      "claude", "claude-haiku-4-5": "claude",
}

func listModels(w http.ResponseWriter) {
	var names []string
	for name := range deployments {
		names = append(names, name)
	}
	slices.Sort(names)
	var models []object
	for _, name := range names {
		models = append(models, object{"id": name, "object": "model"})
	}
	// codex looks for a list called models.
	writeJSON(w, http.StatusOK, object{"object": "list", "data": models, "models": []any{}})
}

func writeJSON(w http.ResponseWriter, status int, body object) {
	text, _ := json.Marshal(body)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(text)
}

// writeError answers as Azure does. param may be empty.
func writeError(w http.ResponseWriter, status int, code, param, message string) {
	fields := object{"code": code, "message": message}
	if code == "invalid_request_error" { // this is how Claude's look
		fields = object{"type": code, "message": message}
	}
	if param != "" {
		fields["param"], fields["type"] = param, "invalid_request_error"
	}
	writeJSON(w, status, object{"type": "error", "error": fields})
}

// request has the fields that the stand-in looks at, of all three APIs.
type request struct {
	Model         string
	Stream        bool
	Encoding      string `json:"encoding_format"`
	MaxTokens     any    `json:"max_tokens"`
	StreamOptions struct {
		IncludeUsage bool `json:"include_usage"`
	} `json:"stream_options"`
	Messages   []object // of chat and of Claude
	Input      any      // of responses: a text, or a list of objects
	Tools      []object
	ToolChoice any `json:"tool_choice"`

	turn turn
}

// turn is what the model does: it calls a tool, or says something.
type turn struct {
	tool      string // empty for none
	arguments object
	text      string
}

// toolsTried are tools of coding agents, in the order in which they are tried.
// With the arguments that they get here they do no harm, and the agents run them
// without asking.
var toolsTried = []string{
	"exec_command", "shell", // codex
	"Bash", // Claude Code
	"read", // opencode
	"glob", // GitHub Copilot CLI and qwen-code
}

// decide calls one of the tools that the client offers, or the first of them if
// it knows none. If results has the text of earlier ones, the last is put into
// the answer. Each tool has a name, and a JSON schema of its arguments under key.
func (q *request) decide(tools []object, key string, results []string) {
	if q.ToolChoice == "none" {
		return
	}
	if len(results) > 0 {
		last := results[len(results)-1]
		q.turn.text += fmt.Sprintf(" The tool's answer began with %.60q.", last)
		return
	}
	tried := append(slices.Clone(toolsTried), "") // the last is for the first of all
	for _, name := range tried {
		for _, tool := range tools {
			offered, _ := tool["name"].(string)
			if name != "" && name != offered {
				continue
			}
			schema, _ := tool[key].(object)
			arguments, ok := example(schema, "").(object)
			if !ok {
				arguments = object{}
			}
			q.turn = turn{tool: offered, arguments: arguments}
			return
		}
	}
}

// example is a value that a JSON schema allows; name is the parameter's.
func example(schema object, name string) any {
	if values, ok := schema["enum"].([]any); ok && len(values) > 0 {
		return values[0]
	}
	kind, _ := schema["type"].(string)
	if kinds, ok := schema["type"].([]any); ok && len(kinds) > 0 {
		if slices.Contains(kinds, any("null")) {
			return nil
		}
		kind, _ = kinds[0].(string)
	}
	name = strings.ToLower(name)
	has := func(part string) bool { return strings.Contains(name, part) }
	switch {
	case kind == "object" || name == "":
		properties, _ := schema["properties"].(object)
		required, _ := schema["required"].([]any)
		value := object{}
		for _, name := range required {
			property, _ := properties[fmt.Sprint(name)].(object)
			value[fmt.Sprint(name)] = example(property, fmt.Sprint(name))
		}
		return value
	case kind == "array" && has("command"):
		return []string{"echo", "hello"}
	case kind == "array":
		items, _ := schema["items"].(object)
		return []any{example(items, "item")}
	case kind == "number" || kind == "integer":
		return 1
	case kind == "boolean":
		return false
	case has("command") || name == "cmd" || has("script"):
		return "echo hello"
	case has("pattern"):
		return "*"
	case has("path") || has("dir") || has("file"):
		return "."
	}
	return "hello"
}

// textOf is the text in a content, which may have parts.
func textOf(content any) string {
	switch content := content.(type) {
	case string:
		return content
	case []any:
		var texts []string
		for _, part := range content {
			texts = append(texts, textOf(part))
		}
		return strings.Join(texts, " ")
	case object:
		for _, key := range []string{"text", "content", "output"} {
			if text := textOf(content[key]); text != "" {
				return text
			}
		}
	}
	return ""
}

// usage is what a turn is said to cost.
const inputTokens, outputTokens = 3, 17

// chat answers a chat completion.
func (s *standIn) chat(w http.ResponseWriter, q *request) {
	if q.MaxTokens != nil && strings.HasPrefix(q.Model, "gpt-5") {
		writeError(w, http.StatusBadRequest, "unsupported_parameter", "max_tokens",
			"Unsupported parameter: 'max_tokens' is not supported with this model. "+
				"Use 'max_completion_tokens' instead.")
		return
	}
	var tools []object
	for _, tool := range q.Tools {
		if function, ok := tool["function"].(object); ok {
			tools = append(tools, function)
		}
	}
	var results []string
	for _, message := range q.Messages {
		if message["role"] == "tool" {
			results = append(results, textOf(message["content"]))
		}
	}
	q.decide(tools, "parameters", results)

	finish := "stop"
	message := object{"role": "assistant", "content": q.turn.text}
	if q.turn.tool != "" {
		finish = "tool_calls"
		arguments, _ := json.Marshal(q.turn.arguments)
		message["content"] = nil
		message["tool_calls"] = []object{{"index": 0, "id": "call_demo", "type": "function",
			"function": object{"name": q.turn.tool, "arguments": string(arguments)}}}
	}
	usage := object{"prompt_tokens": inputTokens, "completion_tokens": outputTokens,
		"total_tokens": inputTokens + outputTokens}
	completion := func(kind string, choices ...object) object {
		return object{"id": "chatcmpl-demo", "object": kind, "created": 1760000000,
			"model": q.Model, "choices": choices}
	}
	if !q.Stream {
		answer := completion("chat.completion",
			object{"index": 0, "message": message, "finish_reason": finish})
		answer["usage"] = usage
		writeJSON(w, http.StatusOK, answer)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	send := func(delta object, finish any) {
		s.sendEvent(w, "", completion("chat.completion.chunk",
			object{"index": 0, "delta": delta, "finish_reason": finish}))
	}
	if q.turn.tool != "" {
		send(message, nil)
	} else {
		send(object{"role": "assistant", "content": ""}, nil)
		for _, word := range strings.SplitAfter(q.turn.text, " ") {
			send(object{"content": word}, nil)
		}
	}
	send(object{}, finish)
	if q.StreamOptions.IncludeUsage {
		last := completion("chat.completion.chunk")
		last["choices"], last["usage"] = []object{}, usage
		s.sendEvent(w, "", last)
	}
	io.WriteString(w, "data: [DONE]\n\n")
}

// sendEvent writes one server-sent event and flushes it.
func (s *standIn) sendEvent(w http.ResponseWriter, name string, data object) {
	if name != "" {
		fmt.Fprintf(w, "event: %s\n", name)
	}
	text, _ := json.Marshal(data)
	fmt.Fprintf(w, "data: %s\n\n", text)
	http.NewResponseController(w).Flush()
	time.Sleep(s.pause)
}

// responses answers on the Responses API, whose stream has an event for the
// beginning and the end of every part.
func (s *standIn) responses(w http.ResponseWriter, q *request) {
	isOther := func(tool object) bool { return tool["type"] != "function" }
	var results []string
	items, _ := q.Input.([]any)
	for _, item := range items {
		if item, ok := item.(object); ok && item["type"] == "function_call_output" {
			results = append(results, textOf(item["output"]))
		}
	}
	q.decide(slices.DeleteFunc(q.Tools, isOther), "parameters", results)

	part := object{"type": "output_text", "text": q.turn.text, "annotations": []any{}}
	item := object{"id": "msg_demo", "type": "message", "status": "completed",
		"role": "assistant", "content": []any{part}}
	arguments, _ := json.Marshal(q.turn.arguments)
	if q.turn.tool != "" {
		item = object{"id": "fc_demo", "type": "function_call", "status": "completed",
			"call_id": "call_demo", "name": q.turn.tool, "arguments": string(arguments)}
	}
	response := func(status string, output ...any) object {
		return object{"id": "resp_demo", "object": "response", "created_at": 1760000000,
			"model": q.Model, "status": status, "output": output}
	}
	completed := response("completed", item)
	completed["usage"] = object{"input_tokens": inputTokens, "output_tokens": outputTokens,
		"total_tokens":          inputTokens + outputTokens,
		"input_tokens_details":  object{"cached_tokens": 0},
		"output_tokens_details": object{"reasoning_tokens": 0}}
	if !q.Stream {
		writeJSON(w, http.StatusOK, completed)
		return
	}

	w.Header().Set("Content-Type", "text/event-stream")
	number := 0
	send := func(kind string, fields object) {
		fields["type"], fields["sequence_number"] = kind, number
		number++
		s.sendEvent(w, kind, fields)
	}
	ofItem := func(fields object) object {
		fields["item_id"], fields["output_index"] = item["id"], 0
		return fields
	}
	begun := object{}
	for name, value := range item {
		begun[name] = value
	}
	begun["status"] = "in_progress"
	send("response.created", object{"response": response("in_progress", []any{}...)})
	if q.turn.tool != "" {
		begun["arguments"] = ""
		send("response.output_item.added", object{"output_index": 0, "item": begun})
		send("response.function_call_arguments.delta", ofItem(object{"delta": string(arguments)}))
		send("response.function_call_arguments.done",
			ofItem(object{"arguments": string(arguments), "name": q.turn.tool}))
	} else {
		begun["content"] = []any{}
		send("response.output_item.added", object{"output_index": 0, "item": begun})
		send("response.content_part.added", ofItem(object{"content_index": 0,
			"part": object{"type": "output_text", "text": "", "annotations": []any{}}}))
		for _, word := range strings.SplitAfter(q.turn.text, " ") {
			send("response.output_text.delta", ofItem(object{"content_index": 0, "delta": word}))
		}
		send("response.output_text.done", ofItem(object{"content_index": 0, "text": q.turn.text}))
		send("response.content_part.done", ofItem(object{"content_index": 0, "part": part}))
	}
	send("response.output_item.done", object{"output_index": 0, "item": item})
	send("response.completed", object{"response": completed})
}

// messages answers as Claude does.
func (s *standIn) messages(w http.ResponseWriter, q *request) {
	isOther := func(tool object) bool { return tool["input_schema"] == nil }
	var results []string
	for _, message := range q.Messages {
		blocks, _ := message["content"].([]any)
		for _, block := range blocks {
			if block, ok := block.(object); ok && block["type"] == "tool_result" {
				results = append(results, textOf(block["content"]))
			}
		}
	}
	q.decide(slices.DeleteFunc(q.Tools, isOther), "input_schema", results)

	finish := "end_turn"
	block := object{"type": "text", "text": q.turn.text}
	if q.turn.tool != "" {
		finish = "tool_use"
		block = object{"type": "tool_use", "id": "toolu_demo", "name": q.turn.tool,
			"input": q.turn.arguments}
	}
	usage := object{"input_tokens": inputTokens, "output_tokens": outputTokens}
	message := func(finish any, content ...any) object {
		return object{"id": "msg_demo", "type": "message", "role": "assistant",
			"model": q.Model, "content": content, "stop_reason": finish, "stop_sequence": nil,
			"usage": usage}
	}
	if !q.Stream {
		writeJSON(w, http.StatusOK, message(finish, block))
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	send := func(kind string, fields object) {
		fields["type"] = kind
		s.sendEvent(w, kind, fields)
	}
	delta := func(kind, key, text string) {
		send("content_block_delta", object{"index": 0, "delta": object{"type": kind, key: text}})
	}
	send("message_start", object{"message": message(nil, []any{}...)})
	if q.turn.tool != "" {
		send("content_block_start", object{"index": 0, "content_block": object{
			"type": "tool_use", "id": "toolu_demo", "name": q.turn.tool, "input": object{}}})
		arguments, _ := json.Marshal(q.turn.arguments)
		delta("input_json_delta", "partial_json", string(arguments))
	} else {
		send("content_block_start", object{"index": 0, "content_block": object{
			"type": "text", "text": ""}})
		for _, word := range strings.SplitAfter(q.turn.text, " ") {
			delta("text_delta", "text", word)
		}
	}
	send("content_block_stop", object{"index": 0})
	send("message_delta", object{"delta": object{"stop_reason": finish, "stop_sequence": nil},
		"usage": usage})
	send("message_stop", object{})
}

// embeddings answers with three numbers, or with them as the SDKs ask for
// them: 32-bit floats, little-endian, in base64.
func embeddings(w http.ResponseWriter, encoding string) {
	var vector any = []float32{0.5, -0.25, 0.125}
	if encoding == "base64" {
		var buf bytes.Buffer
		binary.Write(&buf, binary.LittleEndian, vector)
		vector = base64.StdEncoding.EncodeToString(buf.Bytes())
	}
	data := []object{{"object": "embedding", "index": 0, "embedding": vector}}
	writeJSON(w, http.StatusOK, object{"object": "list", "model": "text-embedding-3-small",
		"data": data, "usage": object{"prompt_tokens": 3, "total_tokens": 3}})
}

// realtime accepts a WebSocket (RFC 6455 §4.2.2), greets as the Realtime API
// does, and then echoes each message.
func realtime(w http.ResponseWriter, r *http.Request) {
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	const guid = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
	sum := sha1.Sum([]byte(r.Header.Get("Sec-WebSocket-Key") + guid))
	fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"+
		"Connection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n",
		base64.StdEncoding.EncodeToString(sum[:]))
	protocol, _, _ := strings.Cut(r.Header.Get("Sec-WebSocket-Protocol"), ",")
	if protocol != "" {
		fmt.Fprintf(conn, "Sec-WebSocket-Protocol: %s\r\n", protocol)
	}
	io.WriteString(conn, "\r\n")
	writeFrame(conn, 1, []byte(`{"type":"session.created","event_id":"event_1",`+
		`"session":{"id":"sess_demo","object":"realtime.session"}}`))
	for {
		opcode, payload, err := readFrame(buffered.Reader)
		switch {
		case err != nil || opcode == 8: // a Close frame
			writeFrame(conn, 8, nil)
			return
		case opcode == 9: // a Ping, which a Pong answers
			writeFrame(conn, 10, payload)
		case opcode != 10:
			writeFrame(conn, opcode, payload)
		}
	}
}

// writeFrame writes a WebSocket message of one unmasked frame (RFC 6455 §5.2).
func writeFrame(w io.Writer, opcode byte, payload []byte) {
	head := []byte{0x80 | opcode, byte(len(payload))}
	if len(payload) > 125 {
		head = binary.BigEndian.AppendUint16([]byte{0x80 | opcode, 126}, uint16(len(payload)))
	}
	w.Write(append(head, payload...))
}

// readFrame reads a frame, masked or not, of up to 64 KiB, which is a message.
func readFrame(r *bufio.Reader) (opcode byte, payload []byte, err error) {
	var head [2]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	length := int(head[1] & 0x7f)
	if head[0]&0x80 == 0 || length == 127 {
		return 0, nil, errors.New("a part of a message, or a longer one")
	}
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
