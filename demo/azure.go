package main

// This file is the stand-in for Azure: the identity endpoint, the resource with
// its APIs, and what the model says and which tool it calls.

import (
	"bufio"
	"bytes"
	"crypto/sha1"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"
)

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
	asked := request{turn: turn{text: sentence}}
	body, _ := io.ReadAll(r.Body)
	json.Unmarshal(body, &asked)

	api, call := split(r.URL.Path)
	isDated := strings.HasPrefix(r.URL.Query().Get("api-version"), "20")
	if rest, ok := strings.CutPrefix(call, "deployments/"); ok && api == "classic" {
		api = "deployment"
		asked.Model, call, _ = strings.Cut(rest, "/")
	}
	if strings.EqualFold(r.Header.Get("Upgrade"), "websocket") && call != "realtime" {
		// codex and Copilot CLI go on over HTTP then.
		writeError(w, http.StatusUpgradeRequired, "426", "", "no WebSocket here")
		return
	}
	if (api == "classic" || api == "deployment") && !isDated {
		api = "" // without a version there is nothing here
	}

	// The classic API has chat and embeddings below a deployment, and nothing else
	// there.
	kind := "" // of the model that is needed
	var answer func()
	switch r.Method + " " + api + " " + call {
	case "GET v1 models", "GET classic models":
		answer = func() { listModels(w) }
	case "GET v1 realtime", "GET classic realtime":
		answer = func() { realtime(w, r) }
	case "POST v1 embeddings", "POST deployment embeddings":
		kind, answer = "embeddings", func() { embeddings(w, asked.Encoding) }
	case "POST v1 chat/completions", "POST deployment chat/completions":
		kind, answer = "chat", func() { s.chat(w, &asked) }
	case "POST v1 responses", "POST classic responses":
		kind, answer = "responses", func() { s.responses(w, &asked) }
	case "POST claude messages":
		kind, answer = "claude", func() { s.messages(w, &asked) }
	case "POST claude messages/count_tokens":
		answer = func() { writeJSON(w, http.StatusOK, object{"input_tokens": 3}) }
	}
	has, isDeployed := deployments[asked.Model]
	switch {
	case answer == nil:
		writeError(w, http.StatusNotFound, "404", "", "Resource not found")
	case kind == "" || strings.Contains(has, kind):
		answer()
	case kind == "claude" && asked.Model == "": // as -check asks
		writeJSON(w, http.StatusBadRequest, object{"type": "error", "error": object{
			"type": "invalid_request_error", "message": "model: Field required"}})
	case isDeployed:
		writeError(w, http.StatusBadRequest, "OperationNotSupported", "",
			"The operation does not work with the specified model, "+asked.Model+".")
	default:
		writeError(w, http.StatusNotFound, "DeploymentNotFound", "",
			"The API deployment for this resource does not exist. If you created the deployment "+
				"within the last 5 minutes, please wait a moment and try again.")
	}
}

// split separates the path of an API, which it names, from that of a call in it.
func split(path string) (api, call string) {
	for _, api := range []struct{ name, path string }{
		{"v1", "/openai/v1/"},
		{"classic", "/openai/"},
		{"claude", "/anthropic/v1/"},
	} {
		if call, ok := strings.CutPrefix(path, api.path); ok {
			return api.name, call
		}
	}
	return "", ""
}

// deployments have the names of their models. The value is what they are for, in
// words.
var deployments = map[string]string{
	"gpt-4o": "chat responses", "gpt-5.1": "chat responses", "gpt-5-codex": "responses",
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
	if param != "" {
		fields["param"], fields["type"] = param, "invalid_request_error"
	}
	writeJSON(w, status, object{"error": fields})
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
	begun := maps.Clone(item)
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
