package winrm

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"certctl-agent/internal/printable"
)

const (
	soap           = "http://www.w3.org/2003/05/soap-envelope"
	addressing     = "http://schemas.xmlsoap.org/ws/2004/08/addressing"
	wsman          = "http://schemas.dmtf.org/wbem/wsman/1/wsman.xsd"
	microsoft      = "http://schemas.microsoft.com/wbem/wsman/1/wsman.xsd"
	transfer       = "http://schemas.xmlsoap.org/ws/2004/09/transfer"
	shellNamespace = "http://schemas.microsoft.com/wbem/wsman/1/windows/shell"
	faultNamespace = "http://schemas.microsoft.com/wbem/wsman/1/wsmanfault"
)

const (
	// maxEnvelope bounds an envelope in both directions, in bytes. Every version of Windows
	// supports this size (3.1.4.1.7); newer ones support more.
	maxEnvelope = 153600

	// maxHead bounds the parts of an envelope other than the input of a command, in bytes.
	maxHead = 4 << 10

	// maxInput is how many bytes of input fit into an envelope, in base64.
	maxInput = (maxEnvelope - maxHead) / 4 * 3

	// idleTimeout is how long the host keeps an idle shell that could not be deleted. Windows
	// accepts a minute or more.
	idleTimeout = 3 * time.Minute

	// maxWait is how long the host may delay its answer until there is output.
	maxWait = 20 * time.Second
)

// request is the variable part of an envelope.
type request struct {
	action  string
	options string // XML
	body    string // XML
}

// createRequest requests a shell that uses UTF-8 and loads the user's profile, which contains the
// user's certificates.
func createRequest() request {
	return request{
		action:  transfer + "/Create",
		options: option("WINRS_NOPROFILE", "FALSE") + option("WINRS_CODEPAGE", "65001"),
		body: `<rsp:Shell><rsp:IdleTimeOut>` + duration(idleTimeout) + `</rsp:IdleTimeOut>` +
			`<rsp:InputStreams>stdin</rsp:InputStreams><rsp:OutputStreams>stdout stderr</rsp:OutputStreams></rsp:Shell>`,
	}
}

// commandRequest starts a command. checkCommand has made sure that no word needs quoting.
func commandRequest(words []string) request {
	body := `<rsp:CommandLine><rsp:Command>` + words[0] + `</rsp:Command>`
	if len(words) > 1 {
		body += `<rsp:Arguments>` + strings.Join(words[1:], " ") + `</rsp:Arguments>`
	}
	return request{
		action: shellNamespace + "/Command",
		// Standard input is a pipe.
		options: option("WINRS_CONSOLEMODE_STDIN", "FALSE") + option("WINRS_SKIP_CMD_SHELL", "FALSE"),
		body:    body + `</rsp:CommandLine>`,
	}
}

func sendRequest(command string, data []byte, end bool) request {
	mark := ""
	if end {
		mark = ` End="true"`
	}
	return request{
		action: shellNamespace + "/Send",
		body: `<rsp:Send><rsp:Stream Name="stdin" CommandId="` + escape(command) + `"` + mark + `>` +
			base64.StdEncoding.EncodeToString(data) + `</rsp:Stream></rsp:Send>`,
	}
}

func receiveRequest(command string) request {
	return request{
		action: shellNamespace + "/Receive",
		body:   `<rsp:Receive><rsp:DesiredStream CommandId="` + escape(command) + `">stdout stderr</rsp:DesiredStream></rsp:Receive>`,
	}
}

// signalRequest terminates a command (2.2.4.38). The code is spelled as in Windows' own client.
func signalRequest(command string) request {
	return request{
		action: shellNamespace + "/Signal",
		body:   `<rsp:Signal CommandId="` + escape(command) + `"><rsp:Code>` + shellNamespace + `/signal/terminate</rsp:Code></rsp:Signal>`,
	}
}

func deleteRequest() request { return request{action: transfer + "/Delete"} }

func option(name, value string) string {
	return `<w:Option Name="` + name + `">` + value + `</w:Option>`
}

func duration(d time.Duration) string { return fmt.Sprintf("PT%.3fS", d.Seconds()) }

func escape(text string) string {
	var out strings.Builder
	xml.EscapeText(&out, []byte(text)) // a strings.Builder never fails
	return out.String()
}

// newID returns a random UUID (RFC 9562, section 5.4).
func newID() string {
	var b [16]byte
	rand.Read(b[:])
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%X-%X-%X-%X-%X", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// envelopeOf encodes a request. shellID is "" before there is a shell.
func envelopeOf(r request, to, id, shellID string, wait time.Duration) []byte {
	var e strings.Builder
	e.WriteString(`<s:Envelope xmlns:s="` + soap + `" xmlns:a="` + addressing + `" xmlns:w="` + wsman + `" xmlns:p="` + microsoft + `" xmlns:rsp="` + shellNamespace + `"><s:Header>` +
		`<a:To>` + escape(to) + `</a:To>` +
		`<a:ReplyTo><a:Address s:mustUnderstand="true">` + addressing + `/role/anonymous</a:Address></a:ReplyTo>` +
		`<w:MaxEnvelopeSize s:mustUnderstand="true">` + fmt.Sprint(maxEnvelope) + `</w:MaxEnvelopeSize>` +
		`<a:MessageID>uuid:` + id + `</a:MessageID>` +
		`<w:Locale xml:lang="en-US" s:mustUnderstand="false"/><p:DataLocale xml:lang="en-US" s:mustUnderstand="false"/>` +
		`<w:OperationTimeout>` + duration(wait) + `</w:OperationTimeout>` +
		`<w:ResourceURI s:mustUnderstand="true">` + shellNamespace + `/cmd</w:ResourceURI>` +
		`<a:Action s:mustUnderstand="true">` + r.action + `</a:Action>`)
	if shellID != "" {
		e.WriteString(`<w:SelectorSet><w:Selector Name="ShellId">` + escape(shellID) + `</w:Selector></w:SelectorSet>`)
	}
	if r.options != "" {
		e.WriteString(`<w:OptionSet>` + r.options + `</w:OptionSet>`)
	}
	e.WriteString(`</s:Header><s:Body>` + r.body + `</s:Body></s:Envelope>`)
	return []byte(e.String())
}

// envelope is an answer.
type envelope struct {
	XMLName xml.Name `xml:"http://www.w3.org/2003/05/soap-envelope Envelope"`
	Header  struct {
		RelatesTo string `xml:"http://schemas.xmlsoap.org/ws/2004/08/addressing RelatesTo"`
	} `xml:"http://www.w3.org/2003/05/soap-envelope Header"`
	Body struct {
		Selectors []struct {
			Name  string `xml:"Name,attr"`
			Value string `xml:",chardata"`
		} `xml:"ResourceCreated>ReferenceParameters>SelectorSet>Selector"`
		Command struct {
			ID string `xml:"CommandId"`
		} `xml:"CommandResponse"`
		Receive struct {
			Streams []struct {
				Name    string `xml:"Name,attr"`
				Command string `xml:"CommandId,attr"`
				Data    string `xml:",chardata"`
			} `xml:"Stream"`
			State *struct {
				Command  string `xml:"CommandId,attr"`
				State    string `xml:"State,attr"`
				ExitCode *int64 `xml:"ExitCode"`
			} `xml:"CommandState"`
		} `xml:"ReceiveResponse"`
		Fault *faultBody `xml:"http://www.w3.org/2003/05/soap-envelope Fault"`
	} `xml:"http://www.w3.org/2003/05/soap-envelope Body"`
}

func (e *envelope) shellID() string {
	for _, selector := range e.Body.Selectors {
		if strings.EqualFold(selector.Name, "ShellId") {
			return strings.TrimSpace(selector.Value)
		}
	}
	return ""
}

type faultBody struct {
	Subcode string `xml:"Code>Subcode>Value"`
	Reason  string `xml:"Reason>Text"`
	Detail  struct {
		Code    string `xml:"Code,attr"`
		Message struct {
			Inner []byte `xml:",innerxml"`
		} `xml:"Message"`
	} `xml:"Detail>WSManFault"`
}

// parseEnvelope parses an answer. If that is a fault, it returns a *Fault as the error.
func parseEnvelope(data []byte) (*envelope, error) {
	data, err := toUTF8(data) // 2.2.9.1.1.2.1 allows UTF-16
	if err != nil {
		return nil, err
	}
	decoder := xml.NewDecoder(bytes.NewReader(data))
	decoder.CharsetReader = func(charset string, input io.Reader) (io.Reader, error) {
		if !strings.EqualFold(charset, "utf-16") {
			return nil, fmt.Errorf("unknown charset %s", printable.Quote(charset))
		}
		return input, nil // already converted to UTF-8
	}
	e := new(envelope)
	if err := decoder.Decode(e); err != nil {
		return nil, fmt.Errorf("the host's answer is not a SOAP 1.2 envelope: %s", printable.Line(err.Error(), maxMessage))
	}
	if e.Body.Fault != nil {
		return nil, newFault(e.Body.Fault)
	}
	return e, nil
}

// answers returns an error unless e answers the call with this id.
func (e *envelope) answers(id string) error {
	if !strings.EqualFold(strings.TrimSpace(e.Header.RelatesTo), "uuid:"+id) {
		return errors.New("the host's answer belongs to another call")
	}
	return nil
}
