package winrmhost

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"encoding/xml"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode/utf16"
)

// request is an envelope from a client.
type request struct {
	id, action, shellID string
	wait                time.Duration
	maxEnvelope         int
	options             map[string]string
	body                bodyXML
}

type bodyXML struct {
	Shell *struct {
		Input  string `xml:"InputStreams"`
		Output string `xml:"OutputStreams"`
		Idle   string `xml:"IdleTimeOut"`
	} `xml:"http://schemas.microsoft.com/wbem/wsman/1/windows/shell Shell"`
	CommandLine *struct {
		Command   string
		Arguments []string
	} `xml:"http://schemas.microsoft.com/wbem/wsman/1/windows/shell CommandLine"`
	Send *struct {
		Streams []struct {
			Name      string `xml:"Name,attr"`
			CommandID string `xml:"CommandId,attr"`
			End       string `xml:"End,attr"`
			Data      string `xml:",chardata"`
		} `xml:"Stream"`
	} `xml:"http://schemas.microsoft.com/wbem/wsman/1/windows/shell Send"`
	Receive *struct {
		Stream struct {
			CommandID string `xml:"CommandId,attr"`
			Names     string `xml:",chardata"`
		} `xml:"DesiredStream"`
	} `xml:"http://schemas.microsoft.com/wbem/wsman/1/windows/shell Receive"`
	Signal *struct {
		CommandID string `xml:"CommandId,attr"`
		Code      string
	} `xml:"http://schemas.microsoft.com/wbem/wsman/1/windows/shell Signal"`
}

type headerXML struct {
	XMLName        xml.Name
	MustUnderstand string `xml:"mustUnderstand,attr"`
	Text           string `xml:",chardata"`
	Address        string `xml:"http://schemas.xmlsoap.org/ws/2004/08/addressing Address"`
	Items          []struct {
		Name  string `xml:"Name,attr"`
		Value string `xml:",chardata"`
	} `xml:",any"`
}

type envelopeXML struct {
	XMLName xml.Name `xml:"http://www.w3.org/2003/05/soap-envelope Envelope"`
	Header  struct {
		Items []headerXML `xml:",any"`
	} `xml:"http://www.w3.org/2003/05/soap-envelope Header"`
	Body *bodyXML `xml:"http://www.w3.org/2003/05/soap-envelope Body"`
}

const (
	addressing = "http://schemas.xmlsoap.org/ws/2004/08/addressing "
	wsman      = "http://schemas.dmtf.org/wbem/wsman/1/wsman.xsd "
	microsoft  = "http://schemas.microsoft.com/wbem/wsman/1/wsman.xsd "
)

// parse parses an envelope with the headers of [DSP0226] 5 and 6 and [MS-WSMV] 3.1.4.1. It returns
// a request even if it also returns a fault.
func parse(data []byte) (*request, error) {
	r := &request{wait: time.Minute, maxEnvelope: maxEnvelope, options: make(map[string]string)}
	if len(data) > maxEnvelope {
		return r, &fault{"w:EncodingLimit", 0, "The request is larger than MaxEnvelopeSizekb allows."}
	}
	var e envelopeXML
	decoder := xml.NewDecoder(bytes.NewReader(data))
	if err := decoder.Decode(&e); err != nil || e.Body == nil {
		return r, invalid(fmt.Sprint("not an envelope: ", err))
	}
	if _, err := decoder.Token(); err != io.EOF {
		return r, invalid("there is text after the envelope")
	}
	r.body = *e.Body
	seen := make(map[string]string)
	for _, header := range e.Header.Items {
		name, text := header.XMLName.Space+" "+header.XMLName.Local, strings.TrimSpace(header.Text)
		if _, twice := seen[name]; twice {
			return r, invalid("the header " + name + " is there twice")
		}
		seen[name] = text
		var err error
		switch name {
		case addressing + "MessageID":
			r.id = text
		case addressing + "ReplyTo":
			if strings.TrimSpace(header.Address) != "http://schemas.xmlsoap.org/ws/2004/08/addressing/role/anonymous" {
				err = invalid("answers go to the one who asks")
			}
		case wsman + "MaxEnvelopeSize": // [DSP0226] 6.2
			if r.maxEnvelope, err = strconv.Atoi(text); err != nil || r.maxEnvelope < 8192 {
				err = &fault{"w:EncodingLimit", 0, "MaxEnvelopeSize is at least 8192"}
			}
		case wsman + "OperationTimeout":
			r.wait, err = parseDuration(text)
		case wsman + "SelectorSet":
			for _, selector := range header.Items {
				if !strings.EqualFold(selector.Name, "ShellId") {
					err = invalid("unknown selector " + selector.Name)
				}
				r.shellID = selector.Value
			}
		case wsman + "OptionSet":
			for _, option := range header.Items {
				r.options[option.Name] = option.Value
			}
		case addressing + "To", addressing + "Action", wsman + "ResourceURI", wsman + "Locale", microsoft + "DataLocale":
		default:
			if header.MustUnderstand == "true" || header.MustUnderstand == "1" {
				err = &fault{"s:MustUnderstand", 0, "unknown header " + name}
			}
		}
		if err != nil {
			return r, err
		}
	}
	if !regexp.MustCompile(`^uuid:[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}$`).MatchString(r.id) {
		return r, invalid("MessageID " + r.id)
	}
	for _, name := range []string{addressing + "To", addressing + "ReplyTo", addressing + "Action", wsman + "ResourceURI"} {
		if _, ok := seen[name]; !ok {
			return r, invalid("missing header " + name)
		}
	}
	if seen[wsman+"ResourceURI"] != "http://schemas.microsoft.com/wbem/wsman/1/windows/shell/cmd" {
		return r, &fault{"w:DestinationUnreachable", 0, "unknown resource"}
	}
	actions := map[string]string{
		"http://schemas.xmlsoap.org/ws/2004/09/transfer/Create":           "Create",
		"http://schemas.xmlsoap.org/ws/2004/09/transfer/Delete":           "Delete",
		"http://schemas.microsoft.com/wbem/wsman/1/windows/shell/Command": "Command",
		"http://schemas.microsoft.com/wbem/wsman/1/windows/shell/Send":    "Send",
		"http://schemas.microsoft.com/wbem/wsman/1/windows/shell/Receive": "Receive",
		"http://schemas.microsoft.com/wbem/wsman/1/windows/shell/Signal":  "Signal",
	}
	if r.action = actions[seen[addressing+"Action"]]; r.action == "" {
		return r, &fault{"a:ActionNotSupported", 0, "unknown action"}
	}
	return r, nil
}

// parseDuration parses an xs:duration of hours, minutes and seconds.
func parseDuration(text string) (time.Duration, error) {
	rest, ok := strings.CutPrefix(text, "PT")
	d, err := time.ParseDuration(strings.ToLower(rest))
	if !ok || err != nil || d <= 0 {
		return 0, invalid("not a duration: " + text)
	}
	return d, nil
}

const head = `<s:Envelope xmlns:s="http://www.w3.org/2003/05/soap-envelope" xmlns:a="http://schemas.xmlsoap.org/ws/2004/08/addressing"` +
	` xmlns:w="http://schemas.dmtf.org/wbem/wsman/1/wsman.xsd" xmlns:rsp="http://schemas.microsoft.com/wbem/wsman/1/windows/shell" xml:lang="en-US"><s:Header>` +
	`<a:To>http://schemas.xmlsoap.org/ws/2004/08/addressing/role/anonymous</a:To>`

func (r *request) answer(content string) []byte {
	return fmt.Appendf(nil, head+`<a:Action>%sResponse</a:Action><a:MessageID>uuid:%s</a:MessageID><a:RelatesTo>%s</a:RelatesTo></s:Header><s:Body>%s</s:Body></s:Envelope>`,
		r.action, newID(), r.id, content)
}

// fault is a WS-Management fault ([MS-WSMV] 2.2.4.43).
type fault struct {
	subcode string
	code    uint32
	reason  string
}

func (f *fault) Error() string { return f.reason }

func invalid(reason string) error { return &fault{"w:InvalidParameter", 87, reason} }

func (f *fault) envelope(r *request) []byte {
	var reason strings.Builder
	xml.EscapeText(&reason, []byte(f.reason))
	detail := ""
	if f.code != 0 {
		detail = fmt.Sprintf(`<s:Detail><f:WSManFault xmlns:f="http://schemas.microsoft.com/wbem/wsman/1/wsmanfault" Code="%d" Machine="127.0.0.1"><f:Message>%s</f:Message></f:WSManFault></s:Detail>`,
			f.code, reason.String())
	}
	return fmt.Appendf(nil, head+`<a:Action>http://schemas.dmtf.org/wbem/wsman/1/wsman/fault</a:Action><a:MessageID>uuid:%s</a:MessageID><a:RelatesTo>%s</a:RelatesTo></s:Header>`+
		`<s:Body><s:Fault><s:Code><s:Value>s:Sender</s:Value><s:Subcode><s:Value>%s</s:Value></s:Subcode></s:Code>`+
		`<s:Reason><s:Text xml:lang="en-US">%s</s:Text></s:Reason>%s</s:Fault></s:Body></s:Envelope>`, newID(), r.id, f.subcode, reason.String(), detail)
}

func newID() string {
	var b [16]byte
	rand.Read(b[:])
	return fmt.Sprintf("%X-%X-%X-%X-%X", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

func toUTF16(text []byte) []byte {
	out := []byte{0xff, 0xfe}
	for _, unit := range utf16.Encode([]rune(string(text))) {
		out = binary.LittleEndian.AppendUint16(out, unit)
	}
	return out
}
