// Demo runs aoai-proxy without Azure, as a user would run it:
//
//	make demo             # or go run ./demo
//	go run ./demo -once   # checks itself and ends, for CI
//
// It starts a stand-in for Azure on loopback ports, builds the real program,
// starts it in front of the stand-in, has one chat through it, and prints lines
// to paste into another terminal. The proxy's PORT and EXPECTED_KEY may be set:
//
//	PORT=8082 EXPECTED_KEY=x make demo
//
// Ctrl-C ends it, and what it made is gone then. (go run passes no other signal
// on: a kill has to go to the demo itself.)
//
// The stand-in, in azure.go, is an identity endpoint (IMDS), which gives tokens,
// and a Foundry resource, which accepts nothing else. It has models, chat
// completions, responses, embeddings and a realtime WebSocket that echoes under
// /openai/, and Claude's messages under /anthropic/. It is as strict as Azure with
// paths, api-versions, the names of deployments and parameters, so that a client
// that works here is set up right. Each answer is the same sentence; but a client
// that offers tools has one of them called first, once.
package main

import (
	"bufio"
	"context"
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
	"strings"
	"sync"
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

// identityHost is the variable that says where the identity endpoint is.
const identityHost = "AZURE_POD_IDENTITY_AUTHORITY_HOST"

// onceTime bounds -once, the build of the proxy included.
const onceTime = 3 * time.Minute

func run(ctx context.Context, once bool) error {
	settings := map[string]string{
		"PORT":            os.Getenv("PORT"),
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

	identityURL, err := serve(azure.identity)
	if err != nil {
		return err
	}
	resourceURL, err := serve(azure.resource)
	if err != nil {
		return err
	}
	settings[identityHost] = identityURL
	settings["TARGET_URL"] = resourceURL + "/openai/"

	fmt.Println("Building the proxy. It starts in front of a stand-in for Azure. Its log:")
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
	if err := p.showChat(ctx, client); err != nil {
		return err
	}
	openCode, _ := json.Marshal(object{"provider": object{"azure": object{
		"options": object{"baseURL": p.url, "apiKey": client.key},
		"models":  object{"gpt-5.1": object{}}}}})
	var environment []string
	for _, name := range []string{"PORT", "EXPECTED_KEY", "TARGET_URL", identityHost} {
		if settings[name] != "" {
			environment = append(environment, name+"="+quoted(settings[name]))
		}
	}
	fmt.Printf(pasteLines, p.url, quoted(client.key), quoted("api-key: "+client.key),
		quoted(string(openCode)), strings.Join(environment, " "))
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
// with the key, 4 the configuration of opencode, and 5 the environment of the proxy.
const pasteLines = `
The proxy is up until Ctrl-C. Whatever you try, its log, here, is the place to look:
most clients don't show why a request failed. Paste into another terminal:

what -check says of the stand-in (in the checkout):
    %[5]s \
      go run . -check

curl:
    curl -N %[1]s/v1/chat/completions -H %[3]s -H 'Content-Type: application/json' \
      -d '{"model":"gpt-4o","stream":true,"messages":[{"role":"user","content":"Who are you?"}]}'

OpenAI SDK (npm install openai):
    OPENAI_BASE_URL=%[1]s OPENAI_API_KEY=%[2]s node --input-type=module -e '
      import OpenAI from "openai"; const ai = new OpenAI();
      const stream = await ai.chat.completions.create({ model: "gpt-4o", stream: true,
        messages: [{ role: "user", content: "Who are you?" }] });
      for await (const part of stream) process.stdout.write(part.choices[0]?.delta?.content ?? "");'

The agents from here on run one harmless tool on this machine: they echo hello, or
look at the folder that they are in.

codex (npm install -g @openai/codex):
    AZURE_API_KEY=%[2]s codex exec --skip-git-repo-check -m gpt-5-codex -c model_provider=azure \
      -c model_providers.azure.name=Azure -c model_providers.azure.base_url=%[1]s \
      -c model_providers.azure.env_key=AZURE_API_KEY -c model_providers.azure.wire_api=responses \
      'Who are you?'

Claude Code (npm install -g @anthropic-ai/claude-code):
    ANTHROPIC_BASE_URL=%[1]s ANTHROPIC_AUTH_TOKEN=%[2]s \
      ANTHROPIC_MODEL=claude-sonnet-4-5 ANTHROPIC_DEFAULT_HAIKU_MODEL=claude-haiku-4-5 \
      claude -p 'Who are you?'

GitHub Copilot CLI (npm install -g @github/copilot):
    COPILOT_PROVIDER_TYPE=azure COPILOT_PROVIDER_BASE_URL=%[1]s COPILOT_PROVIDER_API_KEY=%[2]s \
      COPILOT_MODEL=gpt-5.1 COPILOT_PROVIDER_WIRE_API=responses copilot -p 'Who are you?'

opencode (npm install -g opencode-ai):
    OPENCODE_CONFIG_CONTENT=%[4]s \
      opencode run -m azure/gpt-5.1 'Who are you?'

qwen-code (npm install -g @qwen-code/qwen-code):
    OPENAI_BASE_URL=%[1]s OPENAI_API_KEY=%[2]s OPENAI_MODEL=gpt-4o qwen -p 'Who are you?'

`

// serve answers on a free loopback port until the demo ends.
func serve(handler http.HandlerFunc) (url string, err error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	go http.Serve(ln, handler)
	return "http://" + ln.Addr().String(), nil
}

// proxy is the real program, as a process of its own.
type proxy struct {
	url   string // "http://localhost:8081"
	dir   string // holds the binary
	cmd   *exec.Cmd
	lines chan string   // of its log, for waitFor
	quiet sync.Mutex    // held while nothing of its log is to be shown
	ended chan struct{} // closed when the process has ended
}

// startProxy builds the program and waits until it listens and has a token. Its
// log goes to this program's standard error. It gets no environment but its
// settings and what a system needs, so that no HTTPS_PROXY or identity of the
// user's comes between.
func startProxy(ctx context.Context, settings map[string]string) (*proxy, error) {
	dir, err := os.MkdirTemp("", "aoai-proxy-demo")
	if err != nil {
		return nil, err
	}
	p := &proxy{dir: dir, lines: make(chan string, 100), ended: make(chan struct{})}
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

	go p.follow(stderr)
	const listening = " proxy listening on 127.0.0.1:"
	line, err := p.waitFor(ctx, listening)
	if err == nil {
		_, rest, _ := strings.Cut(line, listening)
		port, _, _ := strings.Cut(rest, " ")
		p.url = "http://localhost:" + port
		_, err = p.waitFor(ctx, " token ready: ")
	}
	if err != nil {
		p.stop()
		return nil, err
	}
	return p, nil
}

// follow copies the proxy's log to standard error.
func (p *proxy) follow(log io.Reader) {
	for lines := bufio.NewScanner(log); lines.Scan(); {
		p.quiet.Lock()
		fmt.Fprintln(os.Stderr, lines.Text())
		p.quiet.Unlock()
		select {
		case p.lines <- lines.Text():
		default: // it is full: nobody waits for its lines any more
		}
	}
	p.cmd.Wait()
	close(p.ended)
}

// waitFor is the next line of the log that contains text.
func (p *proxy) waitFor(ctx context.Context, text string) (string, error) {
	for {
		select {
		case line := <-p.lines:
			if strings.Contains(line, text) {
				return line, nil
			}
		case <-p.ended:
			return "", errors.New("the proxy has ended; its log says why")
		case <-ctx.Done():
			return "", fmt.Errorf("the proxy's log has no line with %q", text)
		}
	}
}

// showChat prints an answer word by word as it arrives, and what the log says of
// it afterwards.
func (p *proxy) showChat(ctx context.Context, c *client) error {
	fmt.Print("\nAn answer, word by word as it arrives:\n\n    ")
	p.quiet.Lock()
	err := c.chat(ctx, "/v1/chat/completions", func(word string) { fmt.Print(word) })
	fmt.Print("\n\nThe log of it (AZURE_LOG_LEVEL=debug adds the second line):\n\n")
	p.quiet.Unlock()
	if err == nil {
		_, err = p.waitFor(ctx, " after ")
	}
	return err
}

// stop ends the proxy at once, and removes it.
func (p *proxy) stop() {
	p.cmd.Process.Kill()
	<-p.ended
	os.RemoveAll(p.dir)
}

// client speaks to the proxy as an SDK would.
type client struct {
	base string // "http://localhost:8081"
	key  string
}

func (c *client) post(ctx context.Context, path, body string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.base+path,
		strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("api-key", c.key)
	req.Header.Set("Content-Type", "application/json")
	if strings.HasSuffix(path, "/messages") {
		req.Header.Set("Anthropic-Version", "2023-06-01")
	}
	// This transport uses no proxy of the environment.
	return (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
}

// chat streams one chat completion, and calls onText with each piece of it. All of
// them together must be the sentence that the stand-in says.
func (c *client) chat(ctx context.Context, path string, onText func(string)) error {
	resp, err := c.post(ctx, path,
		`{"model":"gpt-4o","stream":true,"messages":[{"role":"user","content":"Who?"}]}`)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		body, _ := io.ReadAll(resp.Body)
		return fmt.Errorf("%s: %s", resp.Status, body)
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
	return expect(lines.Err(), text.String(), sentence)
}

// checks are calls of one answer each, which -once tries.
var checks = []struct {
	name, path, body string
	status           int
	want             string // in the answer
}{
	{"chat in one piece", "/v1/chat/completions", `{"model":"gpt-4o"}`, 200, sentence},
	{"usage of a streamed chat", "/v1/chat/completions", `{"model":"gpt-4o","stream":true,` +
		`"stream_options":{"include_usage":true}}`, 200, `"total_tokens":20`},
	{"streamed response", "/v1/responses", `{"model":"gpt-5.1","stream":true}`,
		200, "response.completed"},
	{"streamed message of Claude", "/v1/messages", `{"model":"claude-sonnet-4-5","stream":true}`,
		200, "message_stop"},
	{"embedding", "/v1/embeddings", `{"model":"text-embedding-3-small"}`, 200, "[0.5,-0.25,0.125]"},

	{"tool call in a chat", "/v1/chat/completions", `{"model":"gpt-4o","tools":[` +
		`{"type":"function","function":{"name":"Bash","parameters":{"type":"object",` +
		`"required":["command"],"properties":{"command":{"type":"string"}}}}}]}`,
		200, `"arguments":"{\"command\":\"echo hello\"}"`},
	{"tool call in a response", "/v1/responses", `{"model":"gpt-5.1","tools":[` +
		`{"type":"function","name":"f","parameters":{}}]}`, 200, `"name":"f"`},
	{"tool result in a response", "/v1/responses", `{"model":"gpt-5.1","tools":[` +
		`{"type":"function","name":"f","parameters":{}}],"input":[` +
		`{"type":"function_call_output","output":"done"}]}`, 200, "done"},
	{"tool call of Claude", "/v1/messages", `{"model":"claude-sonnet-4-5","tools":[` +
		`{"name":"f","input_schema":{}}]}`, 200, `"stop_reason":"tool_use"`},

	// These work though a client's path is odd.
	{"v1 twice", "/v1/v1/responses", `{"model":"gpt-5.1"}`, 200, sentence},
	{"empty path segment before a call", "/v1//responses", `{"model":"gpt-5.1"}`, 200, sentence},
	{"dated version beside v1", "/v1/responses?api-version=2024-10-21", `{"model":"gpt-5.1"}`,
		200, sentence},
	{"version v1 without a path of it", "/responses?api-version=v1", `{"model":"gpt-5.1"}`,
		200, sentence},

	// These are wrong for the service.
	{"empty path segment in a call", "/v1/chat//completions", `{"model":"gpt-4o"}`,
		404, "Resource not found"},
	{"classic path without a version", "/deployments/gpt-4o/chat/completions", `{}`,
		404, "Resource not found"},
	{"classic chat without a deployment", "/chat/completions?api-version=2024-10-21",
		`{"model":"gpt-4o"}`, 404, "Resource not found"},
	{"GPT at Claude's path", "/v1/messages", `{"model":"gpt-4o"}`, 400, "OperationNotSupported"},
	{"chat with a model for responses", "/v1/chat/completions", `{"model":"gpt-5-codex"}`,
		400, "OperationNotSupported"},
	{"message without a model", "/v1/messages", `{}`, 400, "invalid_request_error"},
	{"model that is not deployed", "/v1/responses", `{"model":"gpt-6"}`, 404, "DeploymentNotFound"},
	{"max_tokens with gpt-5", "/v1/chat/completions", `{"model":"gpt-5.1","max_tokens":1}`,
		400, `"param":"max_tokens"`},
}

// check is -once.
func (c *client) check(ctx context.Context) error {
	report := func(name string, err error) error {
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		fmt.Println("ok  ", name)
		return nil
	}
	for _, check := range checks {
		err := c.checkPost(ctx, check.path, check.body, check.status, check.want)
		if err := report(check.name, err); err != nil {
			return err
		}
	}
	stranger := &client{base: c.base, key: "wrong"}
	for _, check := range []struct {
		name string
		err  error
	}{
		{"streamed chat", c.chat(ctx, "/v1/chat/completions", func(string) {})},
		{"every base URL", c.checkBases(ctx)},
		{"wrong key", stranger.checkPost(ctx, "/v1/responses", `{}`, 401, "invalid_api_key")},
		{"WebSocket", c.checkEcho(ctx)},
	} {
		if err := report(check.name, check.err); err != nil {
			return err
		}
	}
	return nil
}

// checkBases tries each base URL that a client may have been given, with what the
// classes OpenAI, AzureOpenAI and Anthropic of the SDKs put behind it.
func (c *client) checkBases(ctx context.Context) error {
	calls := []struct{ path, body string }{
		{"/chat/completions", `{"model":"gpt-4o"}`},
		{"/responses", `{"model":"gpt-5.1"}`},
		{"/openai/deployments/gpt-4o/chat/completions?api-version=2024-10-21", `{}`},
		{"/v1/messages", `{"model":"claude-sonnet-4-5"}`},
	}
	bases := []string{"", "/v1", "/openai", "/openai/v1", "/anthropic", "/anthropic/v1"}
	for _, base := range bases {
		for _, slash := range []string{"", "/"} {
			for _, call := range calls {
				path := base + slash + call.path
				if err := c.checkPost(ctx, path, call.body, 200, sentence); err != nil {
					return fmt.Errorf("%s: %w", path, err)
				}
			}
		}
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
