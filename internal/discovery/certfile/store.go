package certfile

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"certctl-agent/internal/ber"
	"certctl-agent/internal/jks"
	"certctl-agent/internal/pkcs12"
)

// maxWork bounds the key derivation for one file, over all its parts and all passwords, in bytes
// hashed. That takes one to two seconds. Firefox uses a million iterations of 128 bytes.
const maxWork = 256 << 20

var (
	errLocked = errors.New("PKCS#12: no configured password opens the certificates")
	errCostly = errors.New("PKCS#12: trying every password takes too long: put the right one first in the list, or export the file again with fewer iterations (openssl pkcs12 -export -iter 10000)")
)

// pkcs12 adds the certificates of a PKCS#12 store. It does not verify the MAC: a report does not
// need proof of origin.
func (c *content) pkcs12(data []byte) {
	if c.stores == nil {
		c.stores = &pkcs12.Reader{Passwords: slices.Concat([]string{""}, c.passwords), Work: maxWork}
	}
	c.stores.Read(data, func(e pkcs12.Entry) {
		if e.Kind != pkcs12.Certificate {
			return
		}
		der, _, err := firstCertificate(e.DER)
		if err != nil {
			c.fail(fmt.Errorf("damaged PKCS#12: %w", err))
			return
		}
		c.add(der, formatPKCS12)
	}, func(err error) {
		switch {
		case errors.Is(err, pkcs12.ErrPassword):
			c.locked, err = true, errLocked
		case errors.Is(err, pkcs12.ErrWork):
			c.locked, err = true, errCostly
		}
		c.fail(err)
	})
}

func (c *content) jks(data []byte) {
	c.fail(jks.Read(data, func(e jks.Entry) {
		for _, cert := range e.Chain {
			if cert.Type != jks.X509 {
				continue
			}
			der, _, err := firstCertificate(cert.Encoded)
			if err != nil {
				c.fail(err)
				continue
			}
			c.add(der, formatJKS)
		}
	}))
}

var errBouncyCastle = errors.New("BouncyCastle key stores (BKS, UBER, BCFKS) are not supported: " +
	"convert it with keytool -importkeystore -deststoretype PKCS12")

// isBouncyCastle reports whether b begins like a BKS or UBER store, with a version and the length
// of the salt, or like a BCFKS store: DER of an encrypted store, with the encryption algorithm.
func isBouncyCastle(b []byte) bool {
	if len(b) >= 8 && binary.BigEndian.Uint32(b) <= 2 && binary.BigEndian.Uint32(b[4:]) == 20 {
		return true
	}
	algorithm := ber.Open(ber.Open(ber.Open(b)))
	return len(algorithm) > 0 && algorithm[0] == ber.TagOID
}
