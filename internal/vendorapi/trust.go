package vendorapi

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"certctl-agent/internal/trustedfile"
)

// maxBundle bounds a file of CA certificates, in bytes. The CA certificates of the whole web fit in
// a quarter of it.
const maxBundle = 1 << 20

// Trust configures how the identity of an API's server is verified.
type Trust struct {
	CAFile      string // PEM file with CA certificates; "" for the system's
	Fingerprint string // SHA-256 of the server's certificate in hex; if set, nothing else is checked
	Insecure    bool   // do not verify the server
}

// Check returns an error if the fingerprint is malformed.
func (t Trust) Check() error {
	if t.Fingerprint == "" {
		return nil
	}
	_, err := t.fingerprint()
	return err
}

func (t Trust) fingerprint() ([]byte, error) {
	sum, err := hex.DecodeString(strings.ReplaceAll(t.Fingerprint, ":", ""))
	if err != nil || len(sum) != sha256.Size {
		return nil, errors.New("expected a SHA-256 fingerprint, 64 hexadecimal digits with or without colons")
	}
	return sum, nil
}

// Config reads CAFile and returns a TLS configuration.
func (t Trust) Config() (*tls.Config, error) {
	config := new(tls.Config) // crypto/tls offers TLS 1.2 and later
	switch {
	case t.Fingerprint != "":
		want, err := t.fingerprint()
		if err != nil {
			return nil, err
		}
		config.InsecureSkipVerify = true // VerifyConnection decides
		config.VerifyConnection = func(state tls.ConnectionState) error {
			got := sha256.Sum256(state.PeerCertificates[0].Raw)
			if [sha256.Size]byte(want) != got {
				return fmt.Errorf("the server's certificate has the SHA-256 fingerprint %x, expected %x (server_fingerprint)", got, want)
			}
			return nil
		}
	case t.CAFile != "":
		data, _, _, err := trustedfile.Read(t.CAFile, maxBundle)
		if err != nil {
			return nil, err
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(data) {
			return nil, fmt.Errorf("%s contains no certificates", t.CAFile)
		}
	}
	config.InsecureSkipVerify = config.InsecureSkipVerify || t.Insecure
	return config, nil
}
