package certfile

import (
	"bytes"
	"encoding/base64"
	"errors"
	"strings"
)

const (
	pemBegin = "-----BEGIN "
	pemEnd   = "-----END "
	pemDash  = "-----"

	labelPKCS12 = "PKCS12"

	// maxLabel bounds the search for the end of a label, in bytes.
	maxLabel = 64
)

// pemLabels are the labels of blocks that hold certificates. All other blocks are skipped, above
// all private keys.
var pemLabels = map[string]bool{
	"CERTIFICATE":         true,
	"X509 CERTIFICATE":    true, // older OpenSSL
	"TRUSTED CERTIFICATE": true, // OpenSSL: the certificate, then trust settings
	"PKCS7":               true,
	"PKCS #7 SIGNED DATA": true,
	"CMS":                 true,
	labelPKCS12:           true, // GnuTLS
}

var errPEM = errors.New("the PEM block is damaged")

// pemBlock is a block with one of pemLabels.
type pemBlock struct {
	der []byte
	err error

	// embedded means that the block does not start at the beginning of a line, as in indented YAML,
	// JSON strings and source code. It may be an example in a text, so damage to it is not an
	// error.
	embedded bool

	// store means that the label is that of a key store, so passwords may be tried.
	store bool
}

// hasMarker reports whether data contains PEM, plain or wrapped in base64.
func hasMarker(data []byte) bool { return indexMarker(data, pemBegin, wrappedBegin) >= 0 }

// indexMarker returns the index of the first of the markers, or -1. It searches for the B that both
// contain, many bytes at a time, because B is rare in configuration files. bytes.Index would search
// for the common dash and examine almost every byte.
func indexMarker(data []byte, markers ...string) int {
	for at := 0; ; at++ {
		next := bytes.IndexByte(data[at:], 'B')
		if next < 0 {
			return -1
		}
		at += next
		for _, marker := range markers {
			start := at - strings.IndexByte(marker, 'B')
			if end := start + len(marker); start >= 0 && end <= len(data) && string(data[start:end]) == marker {
				return start
			}
		}
	}
}

// pemBlocks finds the blocks in data. Unlike encoding/pem it accepts text before and after the
// markers on their lines, blocks without a line feed between them, indentation, and line feeds
// written as \n.
func pemBlocks(data []byte, found func(pemBlock)) {
	for {
		start := indexMarker(data, pemBegin)
		if start < 0 {
			return
		}
		embedded := start > 0 && data[start-1] != '\n' && data[start-1] != '\r' && data[start-1] != '-'
		data = data[start+len(pemBegin):]
		end := bytes.Index(data[:min(len(data), maxLabel)], []byte(pemDash))
		if end < 0 || !pemLabels[string(data[:end])] {
			continue
		}
		label := string(data[:end])
		closing := pemEnd + label + pemDash
		body := data[end+len(pemDash):]
		if next := bytes.Index(body, []byte(pemBegin)); next >= 0 {
			body = body[:next]
		}
		data = data[end+len(pemDash)+len(body):]
		body, _, closed := bytes.Cut(body, []byte(closing))
		if !closed {
			found(pemBlock{err: errPEM, embedded: embedded})
			continue
		}
		der, err := decodePEM(body)
		found(pemBlock{der: der, err: err, embedded: embedded, store: label == labelPKCS12})
	}
}

// wrappedBegin is "-----BEGIN CERTIFICATE-----" in base64.
const wrappedBegin = "LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0t"

// wrappedPEM finds PEM that is a base64 value, as in kubeconfigs, Kubernetes secrets and Traefik's
// acme.json. Values that begin with a key are not decoded.
func wrappedPEM(data []byte, found func(text []byte)) {
	for {
		start := indexMarker(data, wrappedBegin)
		if start < 0 {
			return
		}
		data = data[start:]
		end := bytes.IndexFunc(data, func(r rune) bool {
			return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("+/ \t\r\n", r))
		})
		if end < 0 {
			end = len(data)
		}
		text := unfold(data[:end])
		data = data[end:]
		text = text[:len(text)/4*4] // the bytes after the last full group are not needed
		n, err := base64.StdEncoding.Decode(text, text)
		if err == nil {
			found(text[:n])
		}
	}
}

// decodePEM decodes the text between two markers.
func decodePEM(body []byte) ([]byte, error) {
	text := unfold(body)
	n, err := base64.StdEncoding.Decode(text, text)
	if err != nil || n == 0 {
		clear(text)
		return nil, errPEM
	}
	return text[:n], nil
}

// unfold removes line ends and blanks from base64. It skips headers (RFC 1421, section 4.4),
// recognized by their colon.
func unfold(body []byte) []byte {
	text := make([]byte, 0, len(body))
	for line := range bytes.Lines(body) {
		if bytes.IndexByte(line, ':') >= 0 {
			continue
		}
		for i := 0; i < len(line); i++ {
			switch c := line[i]; {
			case c == ' ', c == '\t', c == '\r', c == '\n':
			case c == '\\' && i+1 < len(line) && (line[i+1] == 'n' || line[i+1] == 'r' || line[i+1] == 't'):
				i++
			default:
				text = append(text, c)
			}
		}
	}
	return text
}
