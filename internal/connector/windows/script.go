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

// scripts are what runs on a Windows host: the parts of one text in the order of
// their names, and what starts it. Nothing is ever put into them.
//
//go:embed scripts
var scripts embed.FS

// contract is the version of the documents that the script is given and answers.
const contract = 1

// request is what the script is told. Its members, and those of the answer, are
// explained in scripts/1-contract.ps1.
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

// What can be asked for.
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

// state is what the host has of the certificate, and of the binding.
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

// script is the text that runs.
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

// commandLine starts PowerShell with a text that reads the script from standard
// input: the script is longer than the 8,191 characters that cmd.exe takes.
// -EncodedCommand is base64 of UTF-16, see
// https://learn.microsoft.com/en-us/powershell/module/microsoft.powershell.core/about/about_powershell_exe.
// Since that text does not name $input, PowerShell itself reads nothing there.
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

// input is what the script reads: itself and the request, a line each, in ASCII
// alone, so that no code page changes it.
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

// runner runs a command on a Windows host. It is a winrm.Client but in tests.
type runner interface {
	Run(ctx context.Context, commandLine []string, stdin []byte) (*winrm.Result, error)
	Close() error
}

// maxMessage bounds what is kept of what Windows says, in bytes.
const maxMessage = 1 << 10

// call has the script carry out a request. A request that changes something,
// once begun, runs to its own deadline: an undo has to know what came of it.
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

// parseAnswer reads the last line that is not empty. What is before it others
// have written: a module that is loaded, for one.
func parseAnswer(result *winrm.Result) (*answer, error) {
	lines := strings.Split(strings.TrimSpace(string(result.Stdout)), "\n")
	a := new(answer)
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), a); err == nil && a.Contract == contract {
		return a, nil
	}
	said := spoken(result.Stderr)
	switch {
	// The identifiers of errors are in no language.
	case strings.Contains(said, "InConstrainedLanguage"):
		return nil, fmt.Errorf("PowerShell there is in constrained language mode (AppLocker or App Control): allow the account full language: %s", printable.Line(said, maxMessage))
	case said == "":
		said = string(result.Stdout)
	}
	return nil, fmt.Errorf("PowerShell ended with exit code %d and without an answer: %s", result.ExitCode, printable.Line(said, maxMessage))
}

// spoken is the text in what PowerShell writes to standard error: CLIXML, with
// control characters written as _x000D_.
// (https://learn.microsoft.com/en-us/openspecs/windows_protocols/ms-psrp/)
func spoken(stderr []byte) string {
	text, isXML := strings.CutPrefix(strings.TrimSpace(string(stderr)), "#< CLIXML")
	if !isXML {
		return text
	}
	var said strings.Builder
	for _, part := range strings.Split(text, `<S S="Error">`)[1:] {
		part, _, _ = strings.Cut(part, "</S>")
		said.WriteString(strings.NewReplacer("_x000D_", "", "_x000A_", "\n", "&lt;", "<", "&gt;", ">", "&quot;", `"`, "&apos;", "'", "&amp;", "&").Replace(part))
	}
	return said.String()
}

// Results of Windows (https://learn.microsoft.com/en-us/openspecs/windows_protocols/ms-erref/).
const (
	badPassword = -0x7ff8ffaa // 0x80070056: what a PFX with a cipher that is not known gives
	noSession   = -0x7ff8fae0 // 0x80070520: what http.sys says of a key that it cannot use
)

// explain says what an answer that is not success means, and what to do.
func (q *request) explain(a *answer) error {
	detail := printable.Line(a.Detail, maxMessage)
	said := fmt.Sprintf("%s (0x%08X, line %d of the script)", printable.Line(a.Message, maxMessage), uint32(a.HResult), a.Line)
	switch a.Code {
	case "store-missing":
		return fmt.Errorf("the certificate store %s\\%s does not exist there", q.Location, detail)
	case "access-denied":
		return fmt.Errorf("access is denied there: the account has to be one of the host's Administrators, with its full rights over the network: %s", said)
	case "account-missing":
		return fmt.Errorf("key_readers: the host knows no account \"%s\": write DOMAIN\\name, or its SID", detail)
	case "account-broad":
		return fmt.Errorf("key_readers: \"%s\" is a group that Windows fills by itself, and no configuration gives such a group a key", detail)
	case "key-file":
		return fmt.Errorf("the file of the private key of %s was not found, so nobody can be given access to it: a key in hardware has none", detail)
	case "key-missing":
		return fmt.Errorf("the certificate %s was imported and has no private key there", detail)
	case "iis-missing":
		return fmt.Errorf("IIS is not installed there: %s does not exist (Install-WindowsFeature Web-Server -IncludeManagementTools)", detail)
	case "site-missing":
		return fmt.Errorf("the site %s does not exist there; there are: %s", printable.Quote(q.Site), detail)
	case "central-store":
		return errCentral
	case "sharing":
		return sharedError(q.Binding, detail)
	case "changed":
		return fmt.Errorf("someone else has changed the binding since, and that was left alone: it has the certificate %s", orNone(detail))
	case "former-missing":
		return fmt.Errorf("the certificate %s, which the binding had, is not in its store any more", detail)
	case "busy":
		return fmt.Errorf("another run on that host has not ended for 30 s, or another program holds the mutex %s there: the next deployment tries again", detail)
	case "request":
		return errors.New("the script did not understand what it was told: something between the agent and the host changed it")
	}
	switch a.HResult {
	case badPassword:
		return fmt.Errorf("the host cannot read the PKCS#12: Windows before Server 2019 takes legacy_ciphers: %s", said)
	case noSession:
		return fmt.Errorf("http.sys cannot use the certificate's key (certutil -store %s %s there says what of it): %s", q.Store, q.Thumbprint, said)
	}
	return errors.New(said)
}

var errCentral = errors.New("the binding takes its certificate from the Central Certificate Store of IIS, where this agent cannot put it: take that off the binding")

func sharedError(binding, others string) error {
	return fmt.Errorf("http.sys has one certificate for an address and port or, with SNI, for a host name and port, and %s shares it with others: %s: "+
		"give those \"Require Server Name Indication\" or another host name first", strconv.Quote(binding), printable.Line(others, maxMessage))
}

func orNone(thumbprint string) string {
	if thumbprint == "" {
		return "none"
	}
	return thumbprint
}
