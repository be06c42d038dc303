// Aoai-proxy lets a client that only knows an api-key use an Azure OpenAI
// resource that accepts nothing but Microsoft Entra ID tokens.
//
// A client talks plain HTTP to it. The proxy checks an optional shared secret,
// gets a token of the host's managed identity, puts it in the place of the
// client's credentials, forwards the request to TARGET_URL and streams the
// answer back as it arrives:
//
//	TARGET_URL=https://my-aoai.openai.azure.com/openai/ aoai-proxy
//	curl localhost:8081/v1/chat/completions -H 'Content-Type: application/json' -d …
//
// Its inputs are environment variables, which the tables below list and
// aoai-proxy -h prints; a .env file in the working directory, for settings that
// the environment leaves out; and the token or key file of the platform, where
// that has one. (Go's runtime heeds a few more variables, such as GOGC and TZ.)
// Its outputs are answers to clients and the log on stderr. It writes no file,
// starts no process and, name lookups aside, speaks to two places only: the
// identity endpoint, and TARGET_URL's host. HTTPS_PROXY, if it is set, is on the
// way to the latter and, with workload identity, to Entra ID.
// As a service it tells systemd, on this host, when it is ready and when it stops.
//
// There are three files: main.go has the inputs, the start, the stop and
// -check; imds.go gets tokens and keeps them; forward.go forwards requests.
package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// variable is an environment variable that the program reads.
type variable struct {
	name  string
	help  string             // for -h
	check func(string) error // refuses a value; nil accepts all
}

// settings are the operator's. They may be in a .env file too: whoever starts
// the program in a directory trusts the .env there with where requests go, with
// which identity of this host, and who may send them. The first lines of the log
// name what was taken from the file, and show where requests go.
var settings = []variable{
	{"TARGET_URL", "required; base URL of the resource, /openai/ included:\n" +
		"https://my-aoai.openai.azure.com/openai/\n" +
		"or several of one host, separated by white space; a request\n" +
		"whose path begins with /anthropic, say, is for the one that\n" +
		"ends in /anthropic/, and every other for the first", nil}, // see parseTargets
	{"PORT", "port to listen on, 0 for any free one; 8081 by default", checkPort},
	{"HOST", "address to listen on; loopback only by default, and every\n" +
		"interface with EXPECTED_KEY", nil},
	{"EXPECTED_KEY", "shared secret that clients must present; none by default", checkHeaderValue},
	{"AZURE_OPENAI_SCOPE", "token scope; by default\n" +
		"https://cognitiveservices.azure.com/.default, or its .us or .cn\n" +
		"form if TARGET_URL has such a host", checkScope},
	{"AZURE_CLIENT_ID", "client id of a user-assigned identity; the system-assigned\n" +
		"one by default", checkHeaderValue},
	{"DRAIN_DELAY", "how long to go on accepting after SIGTERM, such as 10s, until a\n" +
		"balancer has seen that /readyz says 503; 0 by default", checkDrainDelay},
	{"AZURE_LOG_LEVEL", "debug adds a line per answer of the upstream, token fetch and\n" +
		"probe", nil},
}

// platformVariables are set by the platform, or by who runs the host. They are
// read from the environment alone: with them a .env file could have tokens come
// from elsewhere, or put another host between the program and the target, and the
// first lines of the log would look as they always do.
var platformVariables = []variable{
	{"IDENTITY_ENDPOINT", "set by App Service, Functions, Container Apps, Automation,\n" +
		"Azure Arc and Service Fabric", nil},
	{"IDENTITY_HEADER", "by the same except Azure Arc, and by Container Instances",
		checkHeaderValue},
	{"IDENTITY_SERVER_THUMBPRINT", "by Service Fabric and Container Instances", nil},
	{"IMDS_ENDPOINT", "by Azure Arc", nil},
	{"MSI_ENDPOINT", "by Azure Machine Learning and Cloud Shell", nil},
	{"MSI_SECRET", "by Azure Machine Learning", checkHeaderValue},
	{"DEFAULT_IDENTITY_CLIENT_ID", "by Azure Machine Learning", checkHeaderValue},
	{"AZURE_FEDERATED_TOKEN_FILE", "by AKS workload identity", nil},
	{"AZURE_TENANT_ID", "by AKS workload identity", nil},
	{"AZURE_AUTHORITY_HOST", "by AKS workload identity", nil},
	{"AZURE_POD_IDENTITY_AUTHORITY_HOST", "by the operator of a relay to IMDS;\n" +
		"http://169.254.169.254 by default", nil},
	{"ProgramFiles", "by Windows; Azure Arc's agent is there", nil},
	{"ProgramData", "by Windows; the agent's keys are there", nil},
	{"HTTPS_PROXY", "by the operator; proxy to the upstream, and to Entra ID", nil},
	{"https_proxy", "the same", nil},
	{"NO_PROXY", "by the operator; hosts that need no proxy", nil},
	{"no_proxy", "the same", nil},
	{"SSL_CERT_FILE", "by the operator; file of certificate authorities", nil},
	{"SSL_CERT_DIR", "by the operator; directories of them", nil},
	{"GODEBUG", "by the operator; settings of the Go library", nil},
	{"GOMEMLIMIT", "by the operator; memory, as in 100MiB, near which Go frees sooner", nil},
	{"NOTIFY_SOCKET", "by systemd, for a service of Type=notify", nil},
	{"NO_COLOR", "by the operator; if set, -check uses no colour on a terminal", nil},
}

// tlsDefaults are the defaults of a program for today's Go. go.mod says "go
// 1.22", so that Go 1.22 can build this one. The price is that a newer Go keeps
// to the defaults of 1.22. So the newer ones that bear on how a client uses TLS
// and verifies certificates are set here, up to Go 1.27, each with the Go version
// that made it the default. An older Go ignores what it does not know.
// They are described in "Go, Backwards Compatibility, and GODEBUG". Tests see in
// handshakes that Go heeds these names although they are set at run time, and that
// of two values of one the last counts.
var tlsDefaults = []string{
	"tls3des=0",                     // 1.23: offer no 3DES
	"x509negativeserial=0",          // 1.23: accept no certificate with a negative serial number
	"tlsmlkem=1",                    // 1.24: offer the post-quantum X25519MLKEM768
	"rsa1024min=1",                  // 1.24: accept no RSA key of less than 1024 bits
	"tlssha1=0",                     // 1.25: accept no SHA-1 signature in a handshake
	"tlssecpmlkem=1",                // 1.26: offer ML-KEM with P-256 and P-384, too
	"x509sslcertoverrideplatform=1", // 1.27: heed SSL_CERT_FILE on Windows and macOS, too
}

// init puts tlsDefaults into GODEBUG. What the operator has put there stands
// last, and so it counts.
func init() {
	all := tlsDefaults
	if own := os.Getenv("GODEBUG"); own != "" {
		all = append(slices.Clone(all), own)
	}
	os.Setenv("GODEBUG", strings.Join(all, ","))
}

// exitConfig is the exit status for settings that have to be changed before the
// program can start: EX_CONFIG of sysexits.h. deploy/aoai-proxy.service has
// systemd not try again then. With -check, a wrong setting is a step that failed,
// as others are, and the status is 1.
const exitConfig = 78

// configError is a wrong setting. Any other error ends the program with status 1.
type configError struct{ error }

func main() {
	err := run(os.Args[1:], os.Stdout)
	if err == nil {
		return
	}
	// run's errors show no value of a setting that may be secret. Beyond that, what
	// looks like a token is redacted.
	fmt.Fprintln(os.Stderr, "aoai-proxy:", (&secrets{}).safe(err.Error(), maxLine))
	var wrong configError
	if errors.As(err, &wrong) {
		os.Exit(exitConfig)
	}
	os.Exit(1)
}

// run is the whole program.
func run(args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("aoai-proxy", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // main prints the error, in one line
	checkOnly := flags.Bool("check", false, "")
	showVersion := flags.Bool("version", false, "")
	err := flags.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		printUsage(stdout)
		return nil
	case err != nil:
		return fmt.Errorf("%w; aoai-proxy -h shows the usage", err)
	case flags.NArg() > 0:
		return fmt.Errorf("unexpected argument %q; aoai-proxy -h shows the usage", flags.Arg(0))
	case *showVersion:
		fmt.Fprintln(stdout, version())
		return nil
	}

	// A signal would end the program if it wrote to a stderr that nobody reads
	// any more.
	signal.Ignore(syscall.SIGPIPE)

	var cfg *config
	getenv, envLines, err := readDotEnv(".env", os.Getenv)
	if err == nil {
		cfg, err = loadConfig(getenv)
	}
	if *checkOnly {
		colour := isTerminal(stdout) && os.Getenv("NO_COLOR") == ""
		return check(cfg, err, envLines, stdout, colour)
	}
	if err != nil && len(envLines) > 0 {
		err = fmt.Errorf("%w (%s)", err, strings.Join(envLines, "; "))
	}
	if err != nil {
		return configError{err}
	}
	listeners, err := listen(cfg)
	if err != nil { // no configError, as the port may become free
		return err
	}
	log.SetOutput(logWriter{cfg.secrets, log.Writer()})
	for _, line := range envLines {
		log.Print(line)
	}
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	return newService(cfg).serve(listeners, signals)
}

func printUsage(out io.Writer) {
	fmt.Fprint(out, "usage: aoai-proxy [-check | -version]\n\n"+
		"-check    try the settings, the identity and the upstream, and say what is wrong\n"+
		"-version  print the version\n\n"+
		"Settings, from the environment or a .env file in the working directory:\n\n")
	printVariables(out, settings)
	fmt.Fprint(out, "\nFrom the environment alone, "+
		"where the platform and the operator set them:\n\n")
	printVariables(out, platformVariables)
}

func printVariables(out io.Writer, variables []variable) {
	const indent = "\n        "
	for _, v := range variables {
		fmt.Fprintln(out, v.name+indent+strings.ReplaceAll(v.help, "\n", indent))
	}
}

// isTerminal tells whether out is a terminal, which understands colours. Older
// ones of Windows do not.
func isTerminal(out io.Writer) bool {
	file, ok := out.(*os.File)
	if !ok || runtime.GOOS == "windows" {
		return false
	}
	info, err := file.Stat()
	return err == nil && info.Mode()&fs.ModeCharDevice != 0
}

// version is what the Go toolchain has stamped into the binary.
func version() string {
	text := "aoai-proxy"
	if info, ok := debug.ReadBuildInfo(); ok {
		// Go 1.24 and newer make a version of the commit. There is none if Go
		// was given a list of files.
		text += " " + cmp.Or(info.Main.Version, "(devel)")
	}
	return text + " " + runtime.Version() + " " + runtime.GOOS + "/" + runtime.GOARCH
}

// logWriter is where the log goes. The program's own lines have their foreign
// parts made safe already. net/http's lines have not, and one of them quotes the
// bytes that an upstream sends after its answer.
type logWriter struct {
	*secrets
	out io.Writer
}

func (w logWriter) Write(line []byte) (int, error) {
	text := w.safe(strings.TrimSuffix(string(line), "\n"), maxLine)
	if _, err := io.WriteString(w.out, text+"\n"); err != nil {
		return 0, err
	}
	return len(line), nil
}

// readDotEnv reads the file, if there is one, for the settings that getenv
// leaves out. It returns getenv with these added, and lines for the log that
// name what was taken from the file and what was not. They show no values.
func readDotEnv(name string, getenv func(string) string) (
	filled func(string) string, lines []string, err error) {
	info, err := os.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return getenv, nil, nil
	}
	// Python keeps environments in a directory of this name, and /dev/null is
	// mounted over a file that a container is not to see.
	if err == nil && (info.IsDir() || info.Mode()&fs.ModeDevice != 0) {
		return getenv, nil, nil
	}
	text, err := os.ReadFile(name) // any other error of Stat comes up again here
	if err != nil {
		return nil, nil, fmt.Errorf("reading %s: %w", name, errors.Unwrap(err)) // its cause alone
	}
	values, err := parseDotEnv(string(text))
	if err != nil {
		return nil, nil, fmt.Errorf("%s %w", name, err)
	}

	// An empty variable counts as left out.
	isEmpty := func(value string) bool { return strings.TrimSpace(value) == "" }
	var taken, refused []string
	for _, v := range settings {
		if isEmpty(getenv(v.name)) && !isEmpty(values[v.name]) {
			taken = append(taken, v.name)
		}
	}
	for _, v := range platformVariables {
		if _, ok := values[v.name]; ok {
			refused = append(refused, v.name)
		}
	}
	lines = []string{"read .env in the working directory for what the environment leaves out: " +
		cmp.Or(strings.Join(taken, ", "), "nothing")}
	if len(refused) > 0 {
		lines = append(lines, "not taken from .env, as it must come from the environment: "+
			strings.Join(refused, ", "))
	}
	filled = func(name string) string {
		if slices.Contains(taken, name) {
			return values[name]
		}
		return getenv(name)
	}
	return filled, lines, nil
}

// parseDotEnv reads the lines that set a variable of ours. Others are skipped,
// since other programs may have theirs in the same file, in forms of their own.
// A platformVariable is noted without its value. Errors name a line and do not
// show it, as it may hold a secret.
func parseDotEnv(text string) (map[string]string, error) {
	// UTF-16 begins with a byte order mark, and without one is full of NULs.
	if strings.HasPrefix(text, "\xff\xfe") || strings.HasPrefix(text, "\xfe\xff") ||
		strings.Contains(text, "\x00") {
		return nil, errors.New("is not UTF-8 text; save it as UTF-8 " +
			"(in Windows PowerShell with Set-Content -Encoding utf8, not >)")
	}
	text = strings.TrimPrefix(text, "\ufeff") // the byte order mark of UTF-8
	values := make(map[string]string)
	for i, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if words := strings.Fields(line); len(words) > 1 && words[0] == "export" {
			line = strings.TrimSpace(strings.TrimPrefix(line, "export"))
		}
		rest := strings.TrimLeft(line, letters+digits+"_-.")
		name := strings.TrimSuffix(line, rest)
		value, ok := parseDotEnvValue(rest)
		isNamed := func(v variable) bool { return v.name == name }
		switch {
		case slices.ContainsFunc(platformVariables, isNamed):
			values[name] = "" // for readDotEnv to refuse
		case !slices.ContainsFunc(settings, isNamed):
			// It is another program's.
		case !ok:
			return nil, fmt.Errorf(`line %d: want NAME=value or NAME="value"`, i+1)
		default:
			values[name] = value
		}
	}
	return values, nil
}

// parseDotEnvValue reads what follows a name: = and a value, in single or
// double quotes or bare, and a comment. There are no escapes and no expansion.
func parseDotEnvValue(text string) (value string, ok bool) {
	text, ok = strings.CutPrefix(strings.TrimSpace(text), "=")
	if !ok {
		return "", false
	}
	// In a bare value a # begins a comment only after a space or a tab, which may
	// be the first character here, as in "NAME= # none". So a bare value is trimmed
	// after its comment is cut.
	quoted := strings.TrimSpace(text)
	if strings.HasPrefix(quoted, `"`) || strings.HasPrefix(quoted, "'") {
		quote := quoted[:1]
		value, rest, closed := strings.Cut(quoted[1:], quote)
		rest = strings.TrimSpace(rest)
		return value, closed && (rest == "" || strings.HasPrefix(rest, "#"))
	}
	text = strings.ReplaceAll(text, "\t#", " #")
	value, _, _ = strings.Cut(text, " #")
	return strings.TrimSpace(value), true
}

// config is the settings, checked.
type config struct {
	targets      targets       // "https://my-aoai.openai.azure.com/openai/"
	host         string        // HOST: "127.0.0.1"; empty if it is not set
	port         string        // PORT: "8081"
	hosts        []string      // where to listen: "127.0.0.1" and "::1"; "" is every interface
	key          string        // EXPECTED_KEY; empty for none
	delay        time.Duration // DRAIN_DELAY
	scope        string        // "https://cognitiveservices.azure.com/.default"
	debug        bool          // AZURE_LOG_LEVEL=debug
	endpoint     *endpoint
	notifySocket string   // NOTIFY_SOCKET: "/run/systemd/notify"
	secrets      *secrets // of the settings, and later the token
}

// loadConfig reads the variables. White space around a value does not count.
// Its error names the variable, and says what a right value looks like.
func loadConfig(getenv func(string) string) (*config, error) {
	values := make(map[string]string)
	for _, v := range slices.Concat(settings, platformVariables) {
		value := strings.TrimSpace(getenv(v.name))
		if v.check != nil {
			if err := v.check(value); err != nil {
				return nil, fmt.Errorf("%s: %w", v.name, err)
			}
		}
		values[v.name] = value
	}
	for _, name := range []string{"HTTPS_PROXY", "https_proxy"} {
		// It is the Go library that uses these, and it does not trim them.
		if err := checkProxy(getenv(name)); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}

	get := func(name string) string { return values[name] }
	targets, err := parseTargets(get("TARGET_URL"))
	if err != nil {
		return nil, fmt.Errorf("TARGET_URL: %w", err)
	}
	cfg := &config{
		targets: targets,
		host:    strings.Trim(get("HOST"), "[]"), // [::1] is how a URL has it
		port:    cmp.Or(get("PORT"), "8081"),
		key:     get("EXPECTED_KEY"),
		scope:   cmp.Or(get("AZURE_OPENAI_SCOPE"), defaultScope(targets[0].Hostname())),
		debug:   isDebug(get),
		secrets: &secrets{},
	}
	cfg.notifySocket = get("NOTIFY_SOCKET")
	cfg.delay, _ = time.ParseDuration(get("DRAIN_DELAY")) // 0 if it is not set
	cfg.hosts = listenHosts(cfg.host, cfg.key)
	cfg.secrets.hide("key", cfg.key)
	cfg.endpoint, err = newEndpoint(get, cfg.scope, arcFilesHere(get), cfg.secrets)
	if err != nil {
		return nil, err
	}
	return cfg, nil
}

const wantTarget = "want a base URL such as https://my-aoai.openai.azure.com/openai/"

// parseTargets parses TARGET_URL. If it has several base URLs, the token of one
// resource is for all of them. A request is for the one that ends in what the
// request's path begins with, as upstreamURL says. That is one segment at least,
// so two with the same last segment could not be told apart.
func parseTargets(value string) (targets, error) {
	fields := strings.Fields(value)
	if len(fields) == 0 {
		return nil, errors.New("not set; " + wantTarget)
	}
	var parsed targets
	for i, field := range fields {
		u, err := parseTarget(field)
		if err != nil && len(fields) > 1 {
			return nil, fmt.Errorf("base URL %d of %d: %w", i+1, len(fields), err)
		}
		if err != nil {
			return nil, err
		}
		parsed = append(parsed, u)
		first, name := parsed[0], lastSegment(u)
		if u.Scheme != first.Scheme || u.Host != first.Host {
			return nil, fmt.Errorf("%s and %s differ in scheme or host; "+
				"want base URLs of one resource", first, u)
		}
		// No request would be for one without a name, and nearly every request would
		// be for one that is named v1.
		if i > 0 && (name == "" || name == "v1") {
			return nil, fmt.Errorf("%s is not the first and has no name to choose it by; "+
				"want one that ends in /anthropic/, for example", u)
		}
		for _, other := range parsed[:i] {
			if lastSegment(other) == name {
				return nil, fmt.Errorf("%s and %s both end in /%s/, by which requests choose; "+
					"want different ends", other, u, name)
			}
		}
	}
	return parsed, nil
}

// parseTarget parses a base URL, and supplies a final slash. A value that is
// refused may hold a key, in a query for one, so the errors show no more of it
// than scheme and host. One that is accepted has no such part, and is logged.
func parseTarget(value string) (*url.URL, error) {
	u, err := url.Parse(strings.TrimSuffix(value, "/") + "/")
	switch {
	case err != nil || u.Scheme == "" || !hasHost(u):
		return nil, errors.New("not a URL with https:// and a host; " + wantTarget)
	case u.Scheme != "https" && u.Scheme != "http":
		return nil, fmt.Errorf("is for %s; %s", u.Scheme, wantTarget)
	case u.Scheme == "http" && !isLoopback(u.Hostname()):
		return nil, fmt.Errorf("http://%s would send the token over a network in the clear; "+
			"want https, or http for localhost only", u.Host)
	case u.User != nil || u.RawQuery != "" || u.Fragment != "":
		return nil, errors.New("has a user name, a query or a fragment; " + wantTarget)
	case !isPlainPath(u.Path):
		return nil, errors.New("has a . or .. in its path, or is escaped twice; " + wantTarget)
	}
	u.Host = strings.ToLower(u.Host)
	return u, nil
}

func checkPort(value string) error {
	if value != "" && !isPort(value) {
		return fmt.Errorf("want a number from 0 to 65535 such as 8081, got %q", value)
	}
	return nil
}

func checkHeaderValue(value string) error {
	if !isPrintableASCII(value) {
		return errors.New("has characters that a header cannot carry; want printable ASCII")
	}
	return nil
}

func checkScope(value string) error {
	if !isPrintableASCII(value) || strings.Contains(value, " ") {
		return fmt.Errorf("want a scope such as "+
			"https://cognitiveservices.azure.com/.default, got %q", value)
	}
	return nil
}

func checkDrainDelay(value string) error {
	delay, err := time.ParseDuration(cmp.Or(value, "0"))
	if err != nil || delay < 0 || delay > maxDrainDelay {
		return fmt.Errorf("want a time from 0 to %v such as 10s, got %q", maxDrainDelay, value)
	}
	return nil
}

// maxDrainDelay is longer than any balancer needs, and refuses a slip such as 10h.
const maxDrainDelay = 10 * time.Minute

// checkProxy refuses a HTTPS_PROXY that cannot be read. The Go library would
// take some of these for another host, or go without a proxy. The usual reason
// is a password with characters that must be escaped in a URL. socks5h is not
// among the schemes, as Go 1.22 does not know it; socks5 means the same to Go.
func checkProxy(value string) error {
	if value == "" {
		return nil
	}
	if !strings.Contains(value, "://") {
		value = "http://" + value // as the Go library does
	}
	u, err := url.Parse(value)
	schemes := []string{"http", "https", "socks5"}
	if err != nil || !hasHost(u) || !slices.Contains(schemes, u.Scheme) ||
		strings.Trim(u.Path+u.RawQuery+u.Fragment, "/") != "" {
		return errors.New("not a URL of a proxy; want one such as http://proxy.example:3128 or " +
			"http://USER:PASSWORD@proxy.example:3128, with special characters in the password " +
			"percent-encoded (%25 for %)")
	}
	return nil
}

// defaultScope is the scope of Azure OpenAI in the cloud that host, in lower
// case, belongs to. The API of a Foundry project, below /api/projects/, wants
// another one, https://ai.azure.com/.default, which AZURE_OPENAI_SCOPE has to set.
func defaultScope(host string) string {
	host = strings.TrimSuffix(host, ".")
	for _, cloud := range []string{"us", "cn"} {
		if strings.HasSuffix(host, ".azure."+cloud) {
			return "https://cognitiveservices.azure." + cloud + "/.default"
		}
	}
	return "https://cognitiveservices.azure.com/.default"
}

// listenHosts are the addresses to listen on: host, if that is set; every
// interface, if clients need a key; and otherwise both loopback addresses, as
// localhost may mean either, or IPv4's alone on a host without IPv6.
func listenHosts(host, key string) []string {
	if host != "" || key != "" {
		return []string{host}
	}
	addrs, _ := net.InterfaceAddrs() // if it fails, IPv4 will do
	for _, addr := range addrs {
		if addr.String() == "::1/128" { // this host has IPv6
			return []string{"127.0.0.1", "::1"}
		}
	}
	return []string{"127.0.0.1"}
}

// listen opens a socket for each of cfg.hosts. With PORT=0 the first one finds
// a free port, and the others take the same.
func listen(cfg *config) ([]net.Listener, error) {
	var listeners []net.Listener
	port := cfg.port
	for _, host := range cfg.hosts {
		network := "tcp"
		if net.ParseIP(host).To4() != nil {
			network = "tcp4" // with tcp, 0.0.0.0 would mean every IPv6 address too
		}
		ln, err := net.Listen(network, net.JoinHostPort(host, port))
		if err != nil {
			for _, opened := range listeners {
				opened.Close()
			}
			return nil, fmt.Errorf("PORT or HOST: %w; want a free port such as 8082 (0 for any) "+
				"and an address of this host", err)
		}
		listeners = append(listeners, ln)
		_, port, _ = net.SplitHostPort(ln.Addr().String())
	}
	return listeners, nil
}

// service is the running program.
type service struct {
	cfg       *config
	tokens    *tokenSource
	forwarder *forwarder
	server    *http.Server
	drainTime time.Duration // for running requests and tunnels to finish
	lateTime  time.Duration // after which the log says that the first token is late
	stopping  atomic.Bool   // set by SIGTERM
}

func newService(cfg *config) *service {
	tokens := newTokenSource(cfg.endpoint.fetch, time.Now)
	cfg.endpoint.onRetry = tokens.tellLate
	s := &service{
		cfg:       cfg,
		tokens:    tokens,
		forwarder: newForwarder(cfg.targets, cfg.key, tokens, cfg.secrets),
		drainTime: 10 * time.Minute,
		lateTime:  1500 * time.Millisecond,
	}
	s.forwarder.debug = cfg.debug
	s.server = &http.Server{
		Handler:                      http.HandlerFunc(s.route),
		DisableGeneralOptionsHandler: true,             // OPTIONS * is refused as other targets are
		ReadHeaderTimeout:            15 * time.Second, // for clients that say nothing or dribble
		ReadTimeout:                  0,                // an upload may take its time
		WriteTimeout:                 0,                // so may a model
		IdleTimeout:                  2 * time.Minute,  // between two requests of a connection
		MaxHeaderBytes:               64 << 10,         // not Go's 1 MiB; codex sends some KiB
	}
	return s
}

// route has every route: two probes and /, which need no key and are answered
// here, and everything else, which is for the upstream.
func (s *service) route(w http.ResponseWriter, r *http.Request) {
	// The server ignores the Transfer-Encoding of an HTTP/1.0 request
	// (golang/go#12785) and would take its body for the next request. RFC 9112
	// §6.1 wants such a connection closed. While the program stops, a client's
	// next request is to come over a new connection, to another replica.
	if !r.ProtoAtLeast(1, 1) || s.stopping.Load() {
		w.Header().Set("Connection", "close")
	}
	isProbe := r.URL.Path == "/" || r.URL.Path == "/healthz" || r.URL.Path == "/readyz"
	isRead := r.Method == http.MethodGet || r.Method == http.MethodHead
	// A probe has no body, and its target is a path and no URL. Anything else is
	// checked by the forwarder, which knows what to do with a body.
	if !isProbe || !isRead || r.ContentLength != 0 || r.URL.Host != "" {
		s.forwarder.ServeHTTP(w, r)
		return
	}
	if s.cfg.debug {
		log.Printf("debug: probe %s from %s", r.URL.Path, r.RemoteAddr)
	}
	if r.URL.Path == "/readyz" && s.stopping.Load() {
		http.Error(w, "shutting down", http.StatusServiceUnavailable)
		return
	}
	if r.URL.Path == "/readyz" {
		if _, err := s.tokens.current(r.Context()); err != nil {
			const hasKey = false // a probe shows none
			http.Error(w, noTokenMessage(r, err, hasKey), http.StatusServiceUnavailable)
			return
		}
	}
	fmt.Fprintln(w, "ok")
}

// serve answers requests until a signal arrives. For DRAIN_DELAY it goes on, as a
// balancer may not know yet that this replica is to be left out. Then it drains. A
// second signal ends the delay and the drain at once. What still runs after that
// is broken off, by the end of its connection or of ctx, which every request's
// context stems from.
func (s *service) serve(listeners []net.Listener, signals <-chan os.Signal) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s.server.BaseContext = func(net.Listener) context.Context { return ctx }
	s.logStart(listeners)
	go s.tokens.run(ctx)
	late := time.AfterFunc(s.lateTime, func() {
		s.tokens.tellLate(s.cfg.endpoint.noAnswer("has not answered yet"))
	})
	defer late.Stop()
	failed := make(chan error, len(listeners))
	for _, ln := range listeners {
		go func() { failed <- s.server.Serve(ln) }()
	}
	s.notify("READY=1")
	select {
	case err := <-failed:
		return err
	case <-signals:
	}

	s.stopping.Store(true)
	s.notify("STOPPING=1")
	if s.cfg.delay > 0 {
		log.Printf("stopping: accepts for another %v, while /readyz says 503", s.cfg.delay)
	}
	select {
	case <-time.After(s.cfg.delay):
		s.drain(signals)
	case <-signals:
	}
	if n := s.forwarder.streams.Load(); n > 0 {
		log.Printf("breaking off %d streams", n)
	}
	s.server.Close()
	log.Print("stopped")
	return nil
}

// drain accepts no more, and lets running requests and tunnels finish, until
// another signal arrives or drainTime has passed.
func (s *service) drain(signals <-chan os.Signal) {
	log.Printf("draining %d streams (up to %v; a second signal breaks them off)",
		s.forwarder.streams.Load(), s.drainTime)
	finished := make(chan struct{})
	go func() {
		s.server.Shutdown(context.Background())
		s.waitForTunnels()
		close(finished)
	}()
	select {
	case <-finished:
	case <-signals:
	case <-time.After(s.drainTime):
	}
}

// waitForTunnels waits for what Shutdown does not know of. It looks now and then,
// as Shutdown does.
func (s *service) waitForTunnels() {
	for s.forwarder.streams.Load() > 0 {
		time.Sleep(10 * time.Millisecond)
	}
}

// notify tells systemd the state of a service of Type=notify (sd_notify(3)). Its
// socket is a file on this host, or an abstract name that begins with an @.
func (s *service) notify(state string) {
	if s.cfg.notifySocket == "" {
		return
	}
	conn, err := net.Dial("unixgram", s.cfg.notifySocket)
	if err == nil {
		_, err = io.WriteString(conn, state)
		conn.Close()
	}
	if err != nil {
		log.Printf("NOTIFY_SOCKET: %v", err)
	}
}

// logStart says where the proxy listens, who may use it and as whom.
func (s *service) logStart(listeners []net.Listener) {
	cfg := s.cfg
	for _, u := range cfg.targets {
		if !isDocumented(u.Path) {
			log.Print("warning: " + undocumented(u))
		}
	}
	reach := ""
	if cfg.host == "" && cfg.key != "" {
		reach = " (every interface, plain HTTP; HOST=127.0.0.1 for this host only)"
	}
	for i, host := range cfg.hosts {
		_, port, _ := net.SplitHostPort(listeners[i].Addr().String())
		log.Printf("proxy listening on %s ➜ %s%s",
			net.JoinHostPort(host, port), cfg.targets, reach)
	}
	log.Printf("tokens for %s come from %s", cfg.scope, cfg.endpoint)
	log.Print(cfg.whoMayUseIt())
}

// isDocumented tells whether a base URL has the path of one of the APIs that take
// such tokens.
func isDocumented(path string) bool {
	apis := []string{"/openai/", "/anthropic/", "/models/", "/api/projects/"}
	return slices.ContainsFunc(apis, func(api string) bool { return strings.Contains(path, api) })
}

// undocumented warns of a TARGET_URL whose /openai/ may have been forgotten.
func undocumented(target *url.URL) string {
	return "TARGET_URL has " + target.String() + " without /openai/, /anthropic/ or /models/, " +
		"which is right for a gateway's own path only"
}

// whoMayUseIt says who can speak with the identity through the proxy.
func (c *config) whoMayUseIt() string {
	const local = "no EXPECTED_KEY: every user of this host, and nobody else, may use its identity"
	switch {
	case c.key != "":
		return "EXPECTED_KEY is set: whoever has the key may use this host's identity"
	case c.host == "":
		return local + "; set EXPECTED_KEY to ask for a key and listen on every interface, " +
			"or HOST to choose one"
	case isLoopback(c.host):
		return local
	}
	return "warning: no EXPECTED_KEY: whoever reaches this port may use this host's identity"
}

// checkTime bounds a request of -check to the upstream.
const checkTime = 20 * time.Second

// finding is what one step of -check has found.
type finding struct {
	step   string // "token"
	text   string
	failed bool
	below  []string // lines below it: hints, and what the service says
}

// check tries what the proxy needs, one step after the other, and says what is
// wrong and what to do. It fetches a token and sends one request per target to the
// upstream, which uses no model. problem is what is wrong with .env or the
// settings; cfg is what loadConfig returned, if there is no problem. envLines are
// what there is to say of .env.
func check(cfg *config, problem error, envLines []string, stdout io.Writer, colour bool) error {
	hidden := &secrets{}
	if problem == nil {
		hidden = cfg.secrets
		log.SetOutput(logWriter{hidden, log.Writer()})
	}
	// report prints what steps have found. Its error is for the first that failed.
	report := func(found ...finding) (err error) {
		for _, f := range found {
			f.print(stdout, hidden, colour)
			if f.failed && err == nil {
				err = errors.New(f.step + " failed the check")
			}
		}
		return err
	}

	for _, line := range envLines {
		report(finding{step: ".env", text: line})
	}
	if problem != nil {
		return report(finding{step: "settings", text: problem.Error(), failed: true})
	}
	report(checkSettings(cfg)...)
	report(finding{step: "identity", text: cfg.endpoint.String()})
	t, tokenFound := checkToken(cfg)
	if err := report(tokenFound); err != nil {
		return err
	}
	found, models := checkUpstream(cfg, t)
	if err := report(found...); err != nil {
		return err
	}
	return report(clientSettings(cfg, models))
}

// print writes the finding. This is the only place where -check prints.
func (f finding) print(out io.Writer, hidden *secrets, colour bool) {
	label, code := "ok    ", "\x1b[32m" // green
	if f.failed {
		label, code = "FAIL  ", "\x1b[31m" // red
	}
	if colour {
		label = code + label + "\x1b[0m"
	}
	fmt.Fprintf(out, "%s%s: %s\n", label, f.step, hidden.safe(f.text, maxLine))
	for _, line := range f.below {
		fmt.Fprintf(out, "      %s\n", hidden.safe(line, maxLine))
	}
}

func checkSettings(cfg *config) []finding {
	var addrs []string
	for _, host := range cfg.hosts {
		addrs = append(addrs, net.JoinHostPort(host, cfg.port))
	}
	return []finding{
		{step: "settings", text: fmt.Sprintf("TARGET_URL is %s, the scope %s",
			cfg.targets, cfg.scope)},
		{step: "settings", text: fmt.Sprintf("to listen on %s, which is not tried; %s",
			strings.Join(addrs, " and "), cfg.whoMayUseIt())},
	}
}

func checkToken(cfg *config) (token, finding) {
	t, err := cfg.endpoint.fetch(context.Background())
	if err != nil {
		found := finding{step: "token", text: err.Error(), failed: true}
		var failed *fetchError
		if errors.As(err, &failed) {
			found.text = failed.text
			found.below = hintLines(failed.hint)
		}
		return token{}, found
	}
	c := t.claims()
	return t, finding{
		step: "token",
		text: fmt.Sprintf("audience %s, tenant %s, object id %s, client id %s, expires %s",
			c.Audience, c.Tenant, c.Object, c.Client, t.expires.Format(time.RFC3339)),
	}
}

func hintLines(hints ...string) (lines []string) {
	for _, hint := range hints {
		if hint != "" {
			lines = append(lines, "hint: "+hint)
		}
	}
	return lines
}

// checkUpstream asks each target for something that uses no model. It returns
// the models that the service lists, too.
func checkUpstream(cfg *config, t token) (found []finding, models []string) {
	f := newForwarder(cfg.targets, cfg.key, nil, cfg.secrets) // with t at hand, no token source
	for i, target := range cfg.targets {
		req := checkRequest(target)
		req.Header.Set("Authorization", t.authorization)
		resp, body, err := f.ask(req)
		if err != nil {
			text, hint := f.describeFailure(err)
			failed := finding{step: "upstream", text: text, failed: true, below: hintLines(hint)}
			return append(found, failed), nil // the others have the same host
		}
		if i == 0 && resp.TLS != nil {
			found = append(found, finding{step: "TLS", text: fmt.Sprintf("%s, certificate of %s",
				tls.VersionName(resp.TLS.Version), resp.TLS.PeerCertificates[0].Subject)})
		}
		text, hint, role := f.explain(req, resp, body, cfg.ownURL(), t)
		plain, _ := unpacked(body, resp.Header.Get("Content-Encoding"))
		asked := req.Method + " " + req.URL.Scheme + "://" + req.URL.Host + req.URL.RequestURI()
		one := finding{step: "upstream", text: asked + ": " + text}
		if remark, ok := isRight(target, req, resp.StatusCode, plain); ok {
			one.text += remark
		} else {
			one.failed = true
			one.below = f.whatToDo(target, plain, hint)
			if role != "" {
				one.below = append(one.below,
					roleCommand(role, t.claims().Object, target.Hostname())...)
			}
		}
		found = append(found, one)
		models = append(models, modelIDs(plain)...)
	}
	return found, models
}

// ask sends a request of -check, and reads the beginning of its answer.
func (f *forwarder) ask(req *http.Request) (*http.Response, []byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), checkTime)
	defer cancel()
	resp, err := f.transport.RoundTrip(req.WithContext(ctx))
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	return resp, body, err
}

// checkRequest asks for something that only a right URL, token and role get:
// the list of models. Claude has no such list, but refuses an empty JSON object
// as a message, with an error of its own. A project's /openai/v1/ has the list.
// Whether another base URL below /api/projects/ has it is not known here, and for
// one without it -check's FAIL is wrong.
func checkRequest(target *url.URL) *http.Request {
	header := http.Header{"User-Agent": {"aoai-proxy"}}
	if strings.Contains(target.Path, "/anthropic/") {
		header.Set("Content-Type", "application/json")
		header.Set("Anthropic-Version", "2023-06-01")
		return &http.Request{
			Method:        http.MethodPost,
			URL:           upstreamURL(targets{target}, "/v1/messages"),
			Header:        header,
			Body:          io.NopCloser(strings.NewReader("{}")),
			ContentLength: 2,
		}
	}
	u := upstreamURL(targets{target}, "/models")
	if !strings.HasSuffix(target.Path, "/v1/") { // v1 has no versions
		u.RawQuery = "api-version=2024-10-21" // the last that is no preview
	}
	return &http.Request{Method: http.MethodGet, URL: u, Header: header}
}

// isRight tells whether the answer to checkRequest's request is the right one, and
// what there is to remark on it. plain is its body.
func isRight(target *url.URL, req *http.Request, status int, plain []byte) (
	remark string, ok bool) {
	isJSON := strings.HasPrefix(strings.TrimSpace(string(plain)), "{")
	switch {
	case req.Method == http.MethodGet && status == http.StatusOK && isJSON:
		return "", true
	case req.Method == http.MethodPost && status == http.StatusBadRequest &&
		errorCode(plain) == "invalid_request_error":
		return ": as it should of an empty object", true
	case target.Path == "/models/" && status == http.StatusNotFound:
		// Foundry's model inference has no request that uses no model. It was
		// asked for /models/, the target itself.
		return ", as services without a list of models do; " +
			"whether the role is there is not shown", true
	}
	return "", false
}

// whatToDo are the lines below a wrong answer: how to mend it, as far as that is
// known, and what the service says.
func (f *forwarder) whatToDo(target *url.URL, plain []byte, hint string) []string {
	lines := hintLines(hint)
	if !isDocumented(target.Path) {
		lines = append(lines, hintLines(undocumented(target))...)
	}
	if len(plain) > 0 {
		lines = append(lines, "it says: "+f.secrets.safe(string(plain), maxPiece))
	}
	return lines
}

// roleCommand gives the identity a role on the resource whose host this is. It is
// for pasting into a shell, so object and host must look like what they should be.
// If the first command finds no resource, ":?" keeps the shell from the second,
// which might otherwise give the role for more than the resource.
func roleCommand(role, object, host string) []string {
	resource, _, _ := strings.Cut(host, ".")
	const plain = letters + digits + "-"
	if len(object) != len("00000000-0000-0000-0000-000000000000") ||
		!consistsOf(object, plain) || !consistsOf(resource, plain) {
		return nil
	}
	return []string{
		`resource="$(az cognitiveservices account list --output tsv \`,
		`  --query "[?properties.customSubDomainName=='` + resource + `'].id")"`,
		`az role assignment create --assignee-object-id ` + object + ` \`,
		`  --assignee-principal-type ServicePrincipal --role "` + role + `" \`,
		`  --scope "${resource:?not found}"`,
	}
}

// modelIDs are the models of a list, the first few of them.
func modelIDs(body []byte) (ids []string) {
	var list struct{ Data []struct{ ID any } }
	json.Unmarshal(body, &list)
	for _, model := range list.Data {
		if id := identifier(model.ID); id != "" && len(ids) < 5 {
			ids = append(ids, id)
		}
	}
	return ids
}

// ownURL is where a client on this host reaches the proxy.
func (c *config) ownURL() string {
	host, port := cmp.Or(c.host, "localhost"), c.port
	if net.ParseIP(host).IsUnspecified() { // 0.0.0.0 and :: are every address
		host = "localhost"
	}
	if port == "0" {
		port = "PORT"
	}
	return "http://" + net.JoinHostPort(host, port)
}

// clientSettings is what to put into a client.
func clientSettings(cfg *config, models []string) finding {
	ownURL := cfg.ownURL()
	var lines []string
	for i, u := range cfg.targets {
		clientURL := cfg.targets.clientURL(i, ownURL)
		switch {
		case strings.Contains(u.Path, "/anthropic/"):
			lines = append(lines, "base URL for Claude: "+clientURL)
		case lastSegment(u) == "openai":
			// A client of an Azure endpoint adds /openai/ itself.
			lines = append(lines, "base URL: "+clientURL+"/v1, or "+ownURL+
				" where the client asks for an Azure endpoint")
		case strings.Contains(u.Path, "openai"):
			lines = append(lines, "base URL: "+clientURL+"/v1")
		default:
			lines = append(lines, "base URL: "+clientURL)
		}
	}
	if cfg.key == "" {
		lines = append(lines, "key: any text, as there is no EXPECTED_KEY")
	} else {
		lines = append(lines, "key: EXPECTED_KEY, where the client asks for an API key")
	}
	if len(models) > 0 {
		lines = append(lines, "models that the service lists: "+strings.Join(models, ", ")+
			"; a client's model is the name of a deployment")
	}
	return finding{step: "clients", text: lines[0], below: lines[1:]}
}
