package winrm

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"certctl-agent/internal/ntlm"
)

const envelopeHead = `<s:Envelope xmlns:s="http://www.w3.org/2003/05/soap-envelope" xmlns:a="http://schemas.xmlsoap.org/ws/2004/08/addressing">` +
	`<s:Header><a:RelatesTo>uuid:1</a:RelatesTo></s:Header><s:Body>`

const envelopeEnd = `</s:Body></s:Envelope>`

// receiveResponse returns an answer with output and the end of command c.
func receiveResponse(data, state string) string {
	return envelopeHead + `<r:ReceiveResponse xmlns:r="` + shellNamespace + `"><r:Stream Name="stdout" CommandId="C">` + data + `</r:Stream>` +
		`<r:Stream Name="stdout" CommandId="other">AAAA</r:Stream>` + state + `</r:ReceiveResponse>` + envelopeEnd
}

func TestParseEnvelope(t *testing.T) {
	done := `<r:CommandState CommandId="c" State="` + shellNamespace + `/CommandState/Done"><r:ExitCode>4294967295</r:ExitCode></r:CommandState>`
	wide := ntlm.UTF16(`<?xml version="1.0" encoding="utf-16"?>` + receiveResponse("aGk=", done))
	for name, test := range map[string]struct {
		data, want string
	}{
		"output":           {receiveResponse("aGk=\n", done), "hi true 4294967295 <nil>"},
		"running":          {receiveResponse("aGk=", ""), "hi false 0 <nil>"},
		"UTF-16":           {string(wide), "hi true 4294967295 <nil>"},
		"not base64":       {receiveResponse("!", done), "not base64"},
		"no exit code":     {receiveResponse("", strings.ReplaceAll(done, "ExitCode", "Other")), "without an exit code"},
		"odd exit code":    {receiveResponse("", strings.ReplaceAll(done, "4294967295", "one")), "not a SOAP 1.2 envelope"},
		"SOAP 1.1":         {strings.ReplaceAll(receiveResponse("", done), "2003/05", "2001/12"), "not a SOAP 1.2 envelope"},
		"entities":         {`<!DOCTYPE s [<!ENTITY x "y">]>` + envelopeHead + `&x;` + envelopeEnd, "not a SOAP 1.2 envelope"},
		"other charset":    {`<?xml version="1.0" encoding="ebcdic"?>` + receiveResponse("", done), "ebcdic"},
		"fault":            {faultEnvelope(`<s:Reason><s:Text>why</s:Text></s:Reason>`), "why"},
		"provider's":       {faultEnvelope(`<s:Detail><f:WSManFault xmlns:f="` + faultNamespace + `" Code="5"><f:Message>outer <f:ProviderFault><f:WSManFault Code="1"><f:Message>inner</f:Message></f:WSManFault></f:ProviderFault></f:Message></f:WSManFault></s:Detail>`), "fault 0x00000005: outer inner ("},
		"fault in silence": {faultEnvelope(`<s:Code><s:Subcode><s:Value>w:TimedOut</s:Value></s:Subcode></s:Code>`), "no reason given, w:TimedOut"},
	} {
		var got string
		e, err := parseEnvelope([]byte(test.data))
		var out output
		if err == nil {
			err = out.add(e, "c")
		}
		if got = fmt.Sprint(string(out.stdout), " ", out.done, " ", out.exitCode, " ", err); !strings.Contains(got, test.want) {
			t.Errorf("%s: %.300s, want %q", name, got, test.want)
		}
	}
	e, err := parseEnvelope([]byte(receiveResponse("aGk=", "")))
	if err != nil {
		t.Fatal(err)
	}
	out := output{stderr: make([]byte, maxOutput-2)}
	if first, second := out.add(e, "c"), out.add(e, "c"); first != nil || second == nil || !strings.Contains(second.Error(), "longer than") {
		t.Errorf("too much output: %v, then %v", first, second)
	}
	if e.answers("1") != nil || e.answers("2") == nil {
		t.Errorf("the call of an answer: %v, %v", e.answers("1"), e.answers("2"))
	}
}

func faultEnvelope(content string) string {
	return envelopeHead + `<s:Fault>` + content + `</s:Fault>` + envelopeEnd
}

func TestToUTF8(t *testing.T) {
	for text, want := range map[string]string{
		"": "", "a": "a", "plain": "plain", "\xef\xbb\xbfmark": "mark",
		"\xff\xfea\x00\xfc\x00": "aü", "\xfe\xff\x00a\x00\xfc": "aü", "\xff\xfe": "",
		"{\x00}\x00": "{}", "\x00{\x00}": "{}", "\xff\xfea": "error", "\xff\xfe\x00\xd8": "\ufffd", "\x00\x00\x00\x00": "\x00\x00\x00\x00",
	} {
		got, err := toUTF8([]byte(text))
		if err != nil {
			got = []byte("error")
		}
		if string(got) != want {
			t.Errorf("toUTF8(%q) = %q, %v, want %q", text, got, err, want)
		}
	}
}

func sessions() (client, server *ntlm.Session) {
	key := [16]byte([]byte("0123456789abcdef"))
	return ntlm.NewSession(key, false), ntlm.NewSession(key, true)
}

func TestDecrypt(t *testing.T) {
	_, server := sessions()
	good := encrypt(server, []byte("message"))
	change := func(old, new string) []byte { return bytes.Replace(good, []byte(old), []byte(new), 1) }
	for name, test := range map[string]struct {
		body []byte
		want string
	}{
		"good":             {good, "message"},
		"space":            {change("\r\n--Encrypted Boundary\r\n", " \r\n--Encrypted Boundary\r\n"), "message"},
		"no last line end": {good[:len(good)-2], "message"},
		"length":           {change("Length=7", "Length=8"), "declares a wrong length"},
		"no length":        {change("Length=7", "Size=7"), "declares a wrong length"},
		"signature size":   {change("\x10\x00\x00\x00", "\x11\x00\x00\x00"), "not a valid multipart"},
		"no end":           {bytes.TrimSuffix(good, []byte("--\r\n")), "not a valid multipart"},
		"no second part":   {change("\r\n--Encrypted Boundary", ""), "not a valid multipart"},
		"other type":       {change("octet-stream", "json"), "not a valid multipart"},
		"changed":          {change("\x01\x00\x00\x00", "\x02\x00\x00\x00"), "signature"},
		"empty":            {nil, "not a valid multipart"},
	} {
		client, _ := sessions()
		got, err := decrypt(client, test.body)
		if err != nil {
			got = []byte(err.Error())
		}
		if !strings.Contains(string(got), test.want) {
			t.Errorf("%s: %q, want %q", name, got, test.want)
		}
	}
	for contentType, want := range map[string]bool{
		encryptedType: true, `multipart/encrypted; protocol="` + encryptedProtocol + `"; boundary="Encrypted Boundary"`: true,
		plainType: false, `multipart/encrypted;protocol="application/HTTP-CredSSP-session-encrypted"`: false, "": false,
	} {
		if got := isEncrypted(contentType); got != want {
			t.Errorf("isEncrypted(%q) = %v", contentType, got)
		}
	}
}

// TestEnvelopeFits builds the largest request, with ids from a malicious host.
func TestEnvelopeFits(t *testing.T) {
	command, shell := strings.Repeat(`"<&>`, 20), strings.Repeat("s", 200)
	data := envelopeOf(sendRequest(command, make([]byte, maxInput), true), "http://"+strings.Repeat("h", 255)+":5985/wsman", newID(), shell, time.Minute)
	if len(data) > maxEnvelope {
		t.Errorf("%d bytes, want %d at most", len(data), maxEnvelope)
	}
	var e struct {
		Stream struct {
			Command string `xml:"CommandId,attr"`
		} `xml:"Body>Send>Stream"`
	}
	if err := xml.Unmarshal(data, &e); err != nil || e.Stream.Command != command {
		t.Errorf("it has the command id %q: %v", e.Stream.Command, err)
	}
}

func FuzzParseEnvelope(f *testing.F) {
	f.Add([]byte(receiveResponse("aGk=", `<r:CommandState CommandId="c" State="x"/>`)))
	f.Add([]byte(faultEnvelope(`<s:Detail><f:WSManFault Code="5"><f:Message>m</f:Message></f:WSManFault></s:Detail>`)))
	f.Add(ntlm.UTF16(envelopeHead + envelopeEnd))
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := parseEnvelope(data)
		if err != nil {
			if text := err.Error(); len(text) > 2*maxMessage || !utf8.ValidString(text) || strings.ContainsAny(text, "\x1b\n") {
				t.Errorf("error = %q", text)
			}
			return
		}
		e.shellID()
		var out output
		if err := out.add(e, "c"); err == nil && out.done {
			out.result()
		}
	})
}

func FuzzSplitEncrypted(f *testing.F) {
	client, _ := sessions()
	f.Add(encrypt(client, []byte("message")))
	f.Add([]byte(delimiter + "\r\n" + delimiter + "\r\n" + dataHead + delimiter + "--"))
	f.Fuzz(func(t *testing.T, body []byte) {
		signature, sealed, err := splitEncrypted(body)
		if err == nil && (len(signature) != ntlm.SignatureSize || len(sealed) > len(body)) {
			t.Errorf("signature %x", signature)
		}
		client, _ := sessions()
		if _, err := decrypt(client, body); err == nil {
			t.Errorf("%q is accepted", body)
		}
	})
}
