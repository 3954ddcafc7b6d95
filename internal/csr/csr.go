// Package csr creates PKCS#10 certificate requests and their keys. The names come from the control
// plane. Invalid names are rejected here, with a reason, before a CA or a client of the issued
// certificate rejects them.
package csr

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"unicode"
)

const (
	// maxName bounds a name other than a URI, in bytes. For DNS names it is the limit of RFC 1035,
	// section 2.3.4, without the octets of the first length and of the root. RFC 5280 limits common
	// names to 64, which some CAs enforce.
	maxName = 253

	// maxLabel is the limit of RFC 1035, section 2.3.4.
	maxLabel = 63

	// maxURI bounds a URI in bytes. No standard defines a limit.
	maxURI = 2048

	// maxQuoted bounds the part of an invalid name that an error quotes, in bytes.
	maxQuoted = 100
)

// New returns a certificate request in PEM, signed by signer with the hash that suits its key:
// SHA-256 for RSA and P-256, SHA-384 for P-384, SHA-512 for P-521. The subject contains only the
// common name. The subject alternative names are the entries of sans: IP addresses, URIs, e-mail
// addresses or DNS names, recognized by their form. Surrounding blanks, empty entries and
// duplicates are dropped. RSA keys under 2048 bits are rejected.
func New(signer crypto.Signer, commonName string, sans []string) ([]byte, error) {
	if err := checkKey(signer.Public()); err != nil {
		return nil, err
	}
	request, err := names(commonName, sans)
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, request, signer)
	if err != nil {
		return nil, fmt.Errorf("sign certificate request: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), nil
}

// Check returns the error that New would return for these names.
func Check(commonName string, sans []string) error {
	_, err := names(commonName, sans)
	return err
}

func names(commonName string, sans []string) (*x509.CertificateRequest, error) {
	commonName = strings.TrimSpace(commonName)
	if err := checkCommonName(commonName); err != nil {
		return nil, fmt.Errorf("common name %s: %w", quote(commonName), err)
	}
	request := &x509.CertificateRequest{Subject: pkix.Name{CommonName: commonName}}
	seen := make(map[string]bool)
	for _, name := range sans {
		name = strings.TrimSpace(name)
		if name == "" || seen[identity(name)] {
			continue
		}
		seen[identity(name)] = true
		if err := addSAN(request, name); err != nil {
			return nil, fmt.Errorf("subject alternative name %s: %w", quote(name), err)
		}
	}
	return request, nil
}

// identity returns a key that is equal for all spellings of a name.
func identity(name string) string {
	if ip, err := netip.ParseAddr(name); err == nil {
		return ip.Unmap().String()
	}
	if strings.ContainsAny(name, "@:") {
		return name // mailboxes and paths are case-sensitive
	}
	return strings.ToLower(name)
}

func addSAN(request *x509.CertificateRequest, name string) error {
	if err := checkText(name); err != nil {
		return err
	}
	if ip, err := netip.ParseAddr(name); err == nil {
		if ip.Zone() != "" {
			return errors.New("an IP address in a certificate must not have a zone")
		}
		request.IPAddresses = append(request.IPAddresses, ip.Unmap().AsSlice())
		return nil
	}
	if isURI(name) {
		uri, err := parseURI(name)
		if err == nil {
			request.URIs = append(request.URIs, uri)
		}
		return err
	}
	if len(name) > maxName {
		return fmt.Errorf("it has %d bytes, more than %d", len(name), maxName)
	}
	if at := strings.LastIndexByte(name, '@'); at >= 0 {
		request.EmailAddresses = append(request.EmailAddresses, name)
		return checkMailbox(name[:at], name[at+1:])
	}
	request.DNSNames = append(request.DNSNames, name)
	return checkDNS(name, true)
}

// checkCommonName allows names of people and services as well as hosts, but an asterisk only in a
// valid wildcard.
func checkCommonName(name string) error {
	switch {
	case name == "":
		return errors.New("it must not be empty")
	case len(name) > maxName:
		return fmt.Errorf("it has %d bytes, more than %d", len(name), maxName)
	}
	if err := checkText(name); err != nil {
		return err
	}
	if strings.Contains(name, "*") {
		return checkDNS(name, true)
	}
	return nil
}

// checkText accepts only printable ASCII: other characters do not fit IA5String, the ASN.1 type of
// names, and may be invisible to readers.
func checkText(name string) error {
	for _, r := range name {
		switch {
		case r > unicode.MaxASCII:
			return errors.New("it has characters that are not ASCII: give an internationalised name as A-labels (xn--...)")
		case unicode.IsControl(r):
			return errors.New("it has a control character")
		}
	}
	return nil
}

// checkDNS enforces RFC 1034, section 3.5, but allows underscores, which hosts in private zones
// have. A wildcard must be the whole leftmost label (RFC 9525, section 6.3).
func checkDNS(name string, wildcard bool) error {
	switch {
	case len(name) > maxName:
		return fmt.Errorf("it has %d bytes, more than %d", len(name), maxName)
	case strings.HasSuffix(name, "."):
		return errors.New("a DNS name in a certificate must not end with a dot")
	}
	if rest, ok := strings.CutPrefix(name, "*."); ok && wildcard {
		name = rest
	}
	if strings.Contains(name, "*") {
		return errors.New("a wildcard must be the whole leftmost label, as in *.example.org")
	}
	last := ""
	for label := range strings.SplitSeq(name, ".") {
		if err := checkLabel(label); err != nil {
			return err
		}
		last = label
	}
	// RFC 1123, section 2.1: a name whose last label is a number is meant as an address.
	if strings.Trim(last, "0123456789") == "" {
		return errors.New("it is neither an IP address nor a DNS name")
	}
	return nil
}

func checkLabel(label string) error {
	switch {
	case label == "":
		return errors.New("a DNS name must not have an empty label")
	case len(label) > maxLabel:
		return fmt.Errorf("a label has %d bytes, more than %d", len(label), maxLabel)
	case label[0] == '-' || label[len(label)-1] == '-':
		return errors.New("a label begins or ends with a hyphen")
	}
	for _, c := range []byte(label) {
		if !isAlphanumeric(c) && c != '-' && c != '_' {
			return fmt.Errorf("a DNS name must not contain %q", c)
		}
	}
	return nil
}

func isAlphanumeric(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
}

// checkMailbox enforces RFC 5321, section 4.1.2, without quoted strings and address literals.
func checkMailbox(local, domain string) error {
	if len(local) > 64 { // section 4.5.3.1.1
		return errors.New("the part before the @ has more than 64 bytes")
	}
	for atom := range strings.SplitSeq(local, ".") {
		if atom == "" {
			return errors.New("the part before the @ is empty or has a misplaced dot")
		}
		for _, c := range []byte(atom) {
			if !isAlphanumeric(c) && !strings.ContainsRune("!#$%&'*+-/=?^_`{|}~", rune(c)) {
				return fmt.Errorf("an e-mail address must not contain %q before the @", c)
			}
		}
	}
	return checkDNS(domain, false)
}

// isURI distinguishes URIs from hosts with a port, which also contain a colon.
func isURI(name string) bool {
	return strings.Contains(name, "://") || len(name) > 4 && strings.EqualFold(name[:4], "urn:")
}

// parseURI enforces RFC 5280, section 4.2.1.6: an absolute URI whose host, if any, is a DNS name or
// an IP address.
func parseURI(name string) (*url.URL, error) {
	if len(name) > maxURI {
		return nil, fmt.Errorf("it has %d bytes, more than %d", len(name), maxURI)
	}
	if strings.Contains(name, " ") {
		return nil, errors.New("a URI must not contain blanks")
	}
	uri, err := url.Parse(name)
	switch {
	case err != nil:
		return nil, errors.Unwrap(err) // the caller adds the URI
	case uri.Scheme == "" || uri.Host == "" && uri.Opaque == "":
		return nil, errors.New("a URI needs a scheme and a host")
	case uri.User != nil:
		return nil, errors.New("a URI in a certificate must not hold credentials")
	}
	if host := uri.Hostname(); host != "" {
		if _, err := netip.ParseAddr(host); err != nil {
			return uri, checkDNS(host, false)
		}
	}
	return uri, nil
}

// quote quotes an invalid name for an error.
func quote(name string) string {
	if len(name) > maxQuoted {
		return strconv.QuoteToASCII(name[:maxQuoted]) + "..."
	}
	return strconv.QuoteToASCII(name)
}
