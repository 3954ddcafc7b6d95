package winrm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"mime"
	"strconv"
	"strings"

	"certctl-agent/internal/ntlm"
)

// The parts of an encrypted message (2.2.9.1.1).
const (
	encryptedProtocol = "application/HTTP-SPNEGO-session-encrypted"
	boundary          = "Encrypted Boundary"
	delimiter         = "--" + boundary
	plainType         = "application/soap+xml"

	encryptedType = `multipart/encrypted;protocol="` + encryptedProtocol + `";boundary="` + boundary + `"`
	dataHead      = "\tContent-Type: application/octet-stream\r\n"
)

// encrypt seals an envelope.
func encrypt(session *ntlm.Session, message []byte) []byte {
	signature, sealed := session.Wrap(message)
	var out bytes.Buffer
	fmt.Fprintf(&out, delimiter+"\r\n\tContent-Type: "+encryptedProtocol+"\r\n"+
		"\tOriginalContent: type="+plainType+";charset=UTF-8;Length=%d\r\n"+
		delimiter+"\r\n"+dataHead, len(message))
	out.Write(binary.LittleEndian.AppendUint32(nil, uint32(len(signature))))
	out.Write(signature)
	out.Write(sealed)
	out.WriteString(delimiter + "--\r\n")
	return out.Bytes()
}

// decrypt opens a message in the format of encrypt. Windows uses exactly this form, although
// multipart messages could vary.
func decrypt(session *ntlm.Session, body []byte) ([]byte, error) {
	signature, sealed, err := splitEncrypted(body)
	if err != nil {
		return nil, err
	}
	return session.Unwrap(signature, sealed)
}

func splitEncrypted(body []byte) (signature, sealed []byte, err error) {
	malformed := errors.New("the host's answer is not a valid multipart/encrypted message")
	body, ok := bytes.CutPrefix(body, []byte(delimiter+"\r\n"))
	if !ok {
		return nil, nil, malformed
	}
	// The first part is text. The second may contain any bytes, so it ends at the end of the
	// message.
	head, data, ok := bytes.Cut(body, []byte(delimiter+"\r\n"))
	if !ok {
		return nil, nil, malformed
	}
	data, ok = bytes.CutPrefix(data, []byte(dataHead))
	if !ok {
		return nil, nil, malformed
	}
	data, ok = bytes.CutSuffix(bytes.TrimSuffix(data, []byte("\r\n")), []byte(delimiter+"--"))
	if !ok || len(data) < 4 {
		return nil, nil, malformed
	}
	size := binary.LittleEndian.Uint32(data)
	if data = data[4:]; size != ntlm.SignatureSize || len(data) < ntlm.SignatureSize {
		return nil, nil, malformed
	}
	signature, sealed = data[:size], data[size:]
	if length, err := originalLength(string(head)); err != nil || length != len(sealed) {
		return nil, nil, errors.New("the host's answer declares a wrong length")
	}
	return signature, sealed, nil
}

// originalLength returns the length of the plain message (2.2.9.1.1.2.1).
func originalLength(head string) (int, error) {
	_, length, _ := strings.Cut(head, "Length=")
	return strconv.Atoi(strings.TrimSpace(length))
}

// isEncrypted reports whether a content type is that of an encrypted message.
func isEncrypted(contentType string) bool {
	kind, parameters, err := mime.ParseMediaType(contentType)
	return err == nil && kind == "multipart/encrypted" && parameters["protocol"] == encryptedProtocol
}
