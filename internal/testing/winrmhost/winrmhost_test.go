package winrmhost_test

import (
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"certctl-agent/internal/testing/testca"
	"certctl-agent/internal/testing/winrmhost"
)

const (
	transfer = "http://schemas.xmlsoap.org/ws/2004/09/transfer/"
	shell    = "http://schemas.microsoft.com/wbem/wsman/1/windows/shell"
	create   = `<rsp:Shell><rsp:InputStreams>stdin</rsp:InputStreams><rsp:OutputStreams>stdout stderr</rsp:OutputStreams></rsp:Shell>`
)

// envelope returns a valid request.
func envelope(action, shellID, body string) string {
	selector := ""
	if shellID != "" {
		selector = `<w:SelectorSet><w:Selector Name="ShellId">` + shellID + `</w:Selector></w:SelectorSet>`
	}
	return `<s:Envelope xmlns:s="http://www.w3.org/2003/05/soap-envelope" xmlns:a="http://schemas.xmlsoap.org/ws/2004/08/addressing"` +
		` xmlns:w="http://schemas.dmtf.org/wbem/wsman/1/wsman.xsd" xmlns:rsp="` + shell + `"><s:Header><a:To>http://host/wsman</a:To>` +
		`<a:ReplyTo><a:Address>http://schemas.xmlsoap.org/ws/2004/08/addressing/role/anonymous</a:Address></a:ReplyTo>` +
		`<a:MessageID>uuid:01234567-89AB-CDEF-0123-456789ABCDEF</a:MessageID><a:Action s:mustUnderstand="true">` + action + `</a:Action>` +
		`<w:ResourceURI>` + shell + `/cmd</w:ResourceURI><w:MaxEnvelopeSize>153600</w:MaxEnvelopeSize><w:OperationTimeout>PT1S</w:OperationTimeout>` +
		selector + `</s:Header><s:Body>` + body + `</s:Body></s:Envelope>`
}

// TestStrict sends requests that Windows rejects.
func TestStrict(t *testing.T) {
	certificate, err := testca.Must(t).TLSCertificate("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	host, err := winrmhost.Start(winrmhost.Options{User: "u", Password: "p", Basic: true, Certificate: &certificate,
		Handler: func(_ []string, stdin []byte) ([]byte, []byte, int) { return stdin, nil, 0 }})
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	defer client.CloseIdleConnections()
	post := func(body, password, contentType string) (int, string) {
		t.Helper()
		request, err := http.NewRequest(http.MethodPost, fmt.Sprintf("https://127.0.0.1:%d/wsman", host.Port), strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("Content-Type", contentType)
		request.SetBasicAuth("u", password)
		answer, err := client.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		text, err := io.ReadAll(answer.Body)
		if err != nil {
			t.Fatal(err)
		}
		return answer.StatusCode, string(text)
	}
	const soap = "application/soap+xml;charset=UTF-8"
	// say sends an envelope and returns the text between two marks in the answer.
	say := func(body, after, before string) string {
		t.Helper()
		status, text := post(body, "p", soap)
		_, text, ok := strings.Cut(text, after)
		text, _, ok2 := strings.Cut(text, before)
		if status != http.StatusOK || !ok || !ok2 {
			t.Fatalf("status %d, no %s in %s", status, after, text)
		}
		return text
	}
	if status, _ := post(envelope(transfer+"Create", "", create), "wrong", soap); status != http.StatusUnauthorized {
		t.Errorf("wrong password: %d", status)
	}
	if status, _ := post(envelope(transfer+"Create", "", create), "p", "text/xml"); status != http.StatusUnsupportedMediaType {
		t.Errorf("text/xml: %d", status)
	}
	id := say(envelope(transfer+"Create", "", create), `Name="ShellId">`, "<")
	command := func(words string) string {
		return `<rsp:CommandLine><rsp:Command>` + words + `</rsp:Command></rsp:CommandLine>`
	}
	pipe := strings.NewReplacer("</s:Header>", `<w:OptionSet><w:Option Name="WINRS_CONSOLEMODE_STDIN">FALSE</w:Option></w:OptionSet></s:Header>`)
	commandID := say(pipe.Replace(envelope(shell+"/Command", id, command("cat"))), "<rsp:CommandId>", "<")
	send := func(id, stream, data, end string) string {
		return `<rsp:Send><rsp:Stream Name="` + stream + `" CommandId="` + id + `" End="` + end + `">` + data + `</rsp:Stream></rsp:Send>`
	}
	receive := `<rsp:Receive><rsp:DesiredStream CommandId="` + commandID + `">stdout stderr</rsp:DesiredStream></rsp:Receive>`
	good := envelope(transfer+"Create", "", create)
	for name, test := range map[string]struct{ body, want string }{
		"no MessageID":    {strings.ReplaceAll(good, "MessageID", "Other"), "MessageID"},
		"odd MessageID":   {strings.ReplaceAll(good, "uuid:0", "uuid:x"), "MessageID"},
		"no Action":       {strings.ReplaceAll(good, "a:Action", "a:To2"), "unknown header"},
		"other action":    {envelope(transfer+"Put", "", create), "ActionNotSupported"},
		"other resource":  {strings.ReplaceAll(good, "shell/cmd", "shell/other"), "DestinationUnreachable"},
		"other reply":     {strings.ReplaceAll(good, "anonymous", "me"), "InvalidParameter"},
		"unknown header":  {strings.ReplaceAll(good, "</s:Header>", `<a:X s:mustUnderstand="true"/></s:Header>`), "MustUnderstand"},
		"twice":           {strings.ReplaceAll(good, "</s:Header>", `<a:To>x</a:To></s:Header>`), "twice"},
		"small envelopes": {strings.ReplaceAll(good, "153600", "8191"), "EncodingLimit"},
		"odd timeout":     {strings.ReplaceAll(good, "PT1S", "1"), "not a duration"},
		"too long":        {good + strings.Repeat(" ", 153600), "EncodingLimit"},
		"not XML":         {"{}", "not an envelope"},
		"more after it":   {good + "<a/>", "text after"},
		"SOAP 1.1":        {strings.ReplaceAll(good, "2003/05/soap-envelope", "2001/12/soap-envelope"), "not an envelope"},
		"streams":         {strings.ReplaceAll(good, "stdout stderr", "stdout"), "streams"},
		"short idle":      {strings.ReplaceAll(good, "<rsp:InputStreams>", "<rsp:IdleTimeOut>PT30S</rsp:IdleTimeOut><rsp:InputStreams>"), "IdleTimeOut"},
		"unknown shell":   {envelope(transfer+"Delete", "other", ""), "2150858843"},
		"second command":  {envelope(shell+"/Command", id, command("cat")), "terminate it first"},
		"long command":    {envelope(shell+"/Command", id, command(strings.Repeat("x", 8192))), "too long"},
		"other command":   {envelope(shell+"/Send", id, send("other", "stdin", "", "")), "unknown command"},
		"other stream":    {envelope(shell+"/Send", id, send(commandID, "stdout", "", "")), "cannot be sent"},
		"not base64":      {envelope(shell+"/Send", id, send(commandID, "stdin", "!", "")), "cannot be sent"},
		"no output yet":   {envelope(shell+"/Receive", id, receive), "2150858793"},
		"other desires":   {envelope(shell+"/Receive", id, strings.ReplaceAll(receive, "stdout stderr", "all")), "streams"},
		"signal":          {envelope(shell+"/Signal", id, `<rsp:Signal CommandId="`+commandID+`"><rsp:Code>kill</rsp:Code></rsp:Signal>`), "unknown signal"},
	} {
		if status, text := post(test.body, "p", soap); status != http.StatusInternalServerError || !strings.Contains(text, test.want) {
			t.Errorf("%s: %d %s, want %q", name, status, text, test.want)
		}
	}
	say(envelope(shell+"/Send", id, send(commandID, "stdin", "aGk=", "true")), "SendResponse", ">")
	if status, text := post(envelope(shell+"/Send", id, send(commandID, "stdin", "", "true")), "p", soap); status != http.StatusInternalServerError {
		t.Errorf("input after its end: %s", text)
	}
	if text := say(envelope(shell+"/Receive", id, receive), "ReceiveResponse>", "</rsp:Receive"); !strings.Contains(text, ">aGk=<") || !strings.Contains(text, "CommandState/Done") {
		t.Errorf("output = %s", text)
	}
	say(envelope(transfer+"Delete", id, ""), "DeleteResponse", ">")
	if status, _ := post(envelope(shell+"/Receive", id, receive), "p", soap); status != http.StatusInternalServerError || host.Shells() != 0 {
		t.Errorf("a deleted shell answers: %d, %d shells", status, host.Shells())
	}
	for range 30 {
		say(good, "ShellId", ">")
	}
	if _, text := post(good, "p", soap); !strings.Contains(text, "QuotaLimit") {
		t.Errorf("the 31st shell: %s", text)
	}
}
