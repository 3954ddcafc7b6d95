package windows

import (
	"context"
	"embed"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"syscall"
	"unicode/utf16"

	"certctl-agent/internal/printable"
	"certctl-agent/internal/winrm"
)

// scripts are the parts of the script that runs on a Windows host, in the order of their names, and
// the script that starts it. Nothing is ever inserted into them.
//
//go:embed scripts
var scripts embed.FS

// contract is the version of the script's input and output.
const contract = 1

// request is the input of the script. scripts/1-contract.ps1 documents its members and those of the
// answer.
type request struct {
	Contract      int             `json:"contract"`
	Operation     string          `json:"operation"`
	Target        string          `json:"target"`
	Location      string          `json:"location"`
	Store         string          `json:"store"`
	Thumbprint    string          `json:"thumbprint"`
	Chain         [][]byte        `json:"chain"`
	FriendlyName  string          `json:"friendly_name"`
	KeyReaders    []string        `json:"key_readers"`
	Site          string          `json:"site"`
	Binding       string          `json:"binding"`
	Flags         int             `json:"ssl_flags"`
	Expected      string          `json:"expected"`
	PFX           []byte          `json:"pfx"`
	Password      string          `json:"password"`
	Exportable    bool            `json:"exportable"`
	Was           json.RawMessage `json:"was"`
	Keep          int             `json:"keep"`
	RemoveExpired bool            `json:"remove_expired"`
}

// The operations of the script.
const (
	opRead     = "read"
	opWrite    = "write"
	opRestore  = "restore"
	opFinish   = "finish"
	opSelfTest = "selftest"
)

type answer struct {
	Contract int        `json:"contract"`
	Code     string     `json:"code"`
	Detail   string     `json:"detail"`
	Message  string     `json:"message"`
	HResult  int32      `json:"hresult"`
	Line     int        `json:"line"`
	State    *state     `json:"state"`
	Host     *hostState `json:"host"`
}

// state is the state of the certificate and the binding on the host.
type state struct {
	Thumbprint   string   `json:"thumbprint"`
	Present      bool     `json:"present"`
	HasKey       bool     `json:"has_key"`
	SHA256       string   `json:"sha256"`
	FriendlyName string   `json:"friendly_name"`
	Unread       []string `json:"unread"`
	ChainMissing []string `json:"chain_missing"`
	Ours         []string `json:"ours"`
	Binding      string   `json:"binding"`
	Bound        string   `json:"bound"`
	BoundStore   string   `json:"bound_store"`
	BoundFlags   int      `json:"bound_flags"`
	Sharing      []string `json:"sharing"`
}

type hostState struct {
	PowerShell    string   `json:"powershell"`
	LanguageMode  string   `json:"language_mode"`
	DotNet        int      `json:"dotnet"`
	Windows       string   `json:"windows"`
	User          string   `json:"user"`
	Administrator bool     `json:"administrator"`
	Store         string   `json:"store"`
	IIS           string   `json:"iis"`
	Sites         []string `json:"sites"`
}

// script returns the complete script.
func script() ([]byte, error) {
	names, err := fs.Glob(scripts, "scripts/[0-9]-*.ps1")
	if err != nil {
		return nil, err
	}
	var text []byte
	for _, name := range names { // sorted
		part, err := scripts.ReadFile(name)
		if err != nil {
			return nil, err
		}
		text = append(text, part...)
	}
	return text, nil
}

// commandLine returns a command that starts PowerShell with a short script, which reads the real
// one from standard input: cmd.exe accepts only 8,191 characters. -EncodedCommand is base64 of
// UTF-16, see
// https://learn.microsoft.com/en-us/powershell/module/microsoft.powershell.core/about/about_powershell_exe.
// PowerShell itself does not read standard input, since the short script does not use $input.
func commandLine() ([]string, error) {
	text, err := scripts.ReadFile("scripts/bootstrap.ps1")
	if err != nil {
		return nil, err
	}
	var wide []byte
	for _, unit := range utf16.Encode([]rune(string(text))) {
		wide = binary.LittleEndian.AppendUint16(wide, unit)
	}
	return []string{"powershell.exe", "-NoLogo", "-NoProfile", "-NonInteractive", "-EncodedCommand", base64.StdEncoding.EncodeToString(wide)}, nil
}

// input returns the standard input: the script and the request, one line each. It is pure ASCII, so
// no code page changes it.
func input(r *request) ([]byte, error) {
	text, err := script()
	if err != nil {
		return nil, err
	}
	document, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	defer clear(document)
	in := base64.StdEncoding.AppendEncode(nil, text)
	in = append(in, '\n')
	for _, char := range string(document) {
		if char < 0x80 {
			in = append(in, byte(char))
			continue
		}
		for _, unit := range utf16.Encode([]rune{char}) {
			in = fmt.Appendf(in, `\u%04x`, unit)
		}
	}
	return append(in, '\n'), nil
}

// runner runs commands on a Windows host. Outside tests it is a winrm.Client.
type runner interface {
	Run(ctx context.Context, commandLine []string, stdin []byte) (*winrm.Result, error)
	Close() error
}

// maxMessage bounds the messages of Windows that are kept, in bytes.
const maxMessage = 1 << 10

// call makes the script carry out a request. Cancelling ctx does not stop a request that changes
// something, since an undo must know its outcome; it ends at its own deadline.
func (r *remote) call(ctx context.Context, q *request) (*answer, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if q.Operation != opRead && q.Operation != opSelfTest {
		ctx = context.WithoutCancel(ctx)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, r.deadline, fmt.Errorf("no answer within %v (exec_deadline)", r.deadline))
	defer cancel()
	q.Contract = contract
	words, err := commandLine()
	if err != nil {
		return nil, err
	}
	in, err := input(q)
	if err != nil {
		return nil, err
	}
	defer clear(in)
	result, err := r.runner.Run(ctx, words, in)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil && errors.Is(err, ctx.Err()) {
			return nil, cause
		}
		if errors.Is(err, syscall.ECONNREFUSED) {
			err = fmt.Errorf("%w: the host is down or restarting, or its WinRM service does not listen on that port", err)
		}
		return nil, err
	}
	a, err := parseAnswer(result)
	if err == nil && a.Code != "" {
		err = q.explain(a)
	}
	return a, err
}

// parseAnswer parses the last line that is not empty. Loaded modules may have written lines before
// it.
func parseAnswer(result *winrm.Result) (*answer, error) {
	lines := strings.Split(strings.TrimSpace(string(result.Stdout)), "\n")
	a := new(answer)
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), a); err == nil && a.Contract == contract {
		return a, nil
	}
	output := errorText(result.Stderr)
	switch {
	// Error identifiers are not translated.
	case strings.Contains(output, "InConstrainedLanguage"):
		return nil, fmt.Errorf("PowerShell on the host is in constrained language mode (AppLocker or App Control): allow the account full language mode: %s", printable.Line(output, maxMessage))
	case output == "":
		output = string(result.Stdout)
	}
	return nil, fmt.Errorf("PowerShell exited with code %d and without an answer: %s", result.ExitCode, printable.Line(output, maxMessage))
}

// errorText returns the text in PowerShell's standard error: CLIXML, with control characters
// encoded like _x000D_ (https://learn.microsoft.com/en-us/openspecs/windows_protocols/ms-psrp/).
func errorText(stderr []byte) string {
	text, isXML := strings.CutPrefix(strings.TrimSpace(string(stderr)), "#< CLIXML")
	if !isXML {
		return text
	}
	var plain strings.Builder
	for _, part := range strings.Split(text, `<S S="Error">`)[1:] {
		part, _, _ = strings.Cut(part, "</S>")
		plain.WriteString(strings.NewReplacer("_x000D_", "", "_x000A_", "\n", "&lt;", "<", "&gt;", ">", "&quot;", `"`, "&apos;", "'", "&amp;", "&").Replace(part))
	}
	return plain.String()
}

// Result codes of Windows (https://learn.microsoft.com/en-us/openspecs/windows_protocols/ms-erref/).
const (
	badPassword = -0x7ff8ffaa // 0x80070056: a PFX with an unknown cipher
	noSession   = -0x7ff8fae0 // 0x80070520: http.sys cannot use a key
)

// explain turns a failure into an error that says what to do.
func (q *request) explain(a *answer) error {
	detail := printable.Line(a.Detail, maxMessage)
	message := fmt.Sprintf("%s (0x%08X, line %d of the script)", printable.Line(a.Message, maxMessage), uint32(a.HResult), a.Line)
	switch a.Code {
	case "store-missing":
		return fmt.Errorf("the certificate store %s\\%s does not exist on the host", q.Location, detail)
	case "access-denied":
		return fmt.Errorf("access denied: the account must be one of the host's Administrators, with full rights over the network: %s", message)
	case "account-missing":
		return fmt.Errorf("key_readers: the host does not know the account \"%s\": write DOMAIN\\name, or its SID", detail)
	case "account-broad":
		return fmt.Errorf("key_readers: Windows manages the members of the group \"%s\", and such groups cannot get access to a key", detail)
	case "key-file":
		return fmt.Errorf("cannot grant access to the private key of %s, since its file was not found: a key in hardware has no file", detail)
	case "key-missing":
		return fmt.Errorf("the certificate %s was imported but has no private key on the host", detail)
	case "iis-missing":
		return fmt.Errorf("IIS is not installed on the host: %s does not exist (Install-WindowsFeature Web-Server -IncludeManagementTools)", detail)
	case "site-missing":
		return fmt.Errorf("the site %s does not exist on the host; its sites are: %s", printable.Quote(q.Site), detail)
	case "central-store":
		return errCentral
	case "sharing":
		return sharedError(q.Binding, detail)
	case "changed":
		return fmt.Errorf("someone else has changed the binding since; it was left alone and has the certificate %s", orNone(detail))
	case "former-missing":
		return fmt.Errorf("the old certificate %s of the binding is not in its store any more", detail)
	case "busy":
		return fmt.Errorf("another run on the host has not finished within 30 s, or another program holds the mutex %s there: the next deployment tries again", detail)
	case "request":
		return errors.New("the script cannot read its input: something between the agent and the host changed it")
	}
	switch a.HResult {
	case badPassword:
		return fmt.Errorf("the host cannot read the PKCS#12: set legacy_ciphers for Windows before Server 2019: %s", message)
	case noSession:
		return fmt.Errorf("http.sys cannot use the certificate's key (run certutil -store %s %s on the host to see why): %s", q.Store, q.Thumbprint, message)
	}
	return errors.New(message)
}

var errCentral = errors.New("the binding uses the Central Certificate Store of IIS, which this agent does not support: turn that off in the binding")

func sharedError(binding, others string) error {
	return fmt.Errorf("http.sys has only one certificate per address and port or, with SNI, per host name and port, and %s shares it with other bindings: %s: "+
		"set \"Require Server Name Indication\" or another host name for those first", strconv.Quote(binding), printable.Line(others, maxMessage))
}

func orNone(thumbprint string) string {
	if thumbprint == "" {
		return "none"
	}
	return thumbprint
}
