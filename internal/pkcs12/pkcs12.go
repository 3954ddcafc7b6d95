// Package pkcs12 reads and writes PKCS#12 key stores (RFC 7292), with the extensions .p12 and .pfx.
// They are Java's default format since version 9 and the export format of Windows and browsers.
package pkcs12

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"

	"certctl-agent/internal/ber"
)

// Object identifiers of PKCS#7, #9 and #12, as content octets.
const (
	oidPKCS7         = "\x2a\x86\x48\x86\xf7\x0d\x01\x07"
	oidData          = oidPKCS7 + "\x01"
	oidEnvelopedData = oidPKCS7 + "\x03"
	oidEncryptedData = oidPKCS7 + "\x06"

	oidBag             = "\x2a\x86\x48\x86\xf7\x0d\x01\x0c\x0a\x01"
	oidKeyBag          = oidBag + "\x01"
	oidShroudedKeyBag  = oidBag + "\x02"
	oidCertBag         = oidBag + "\x03"
	oidSafeContentsBag = oidBag + "\x06"

	oidPKCS9           = "\x2a\x86\x48\x86\xf7\x0d\x01\x09"
	oidFriendlyName    = oidPKCS9 + "\x14"
	oidLocalKeyID      = oidPKCS9 + "\x15"
	oidX509Certificate = oidPKCS9 + "\x16\x01"

	// oidTrustedKeyUsage is an attribute by which Java recognizes trusted certificates.
	oidTrustedKeyUsage = "\x60\x86\x48\x01\x86\xf9\x66\xad\xca\x7b\x01\x01"

	// maxEncrypted bounds the encrypted parts of a store, because the passwords are tried on each
	// part. Tools write one.
	maxEncrypted = 4

	// maxBagDepth bounds the nesting of bags. No tool nests them at all.
	maxBagDepth = 8

	// maxAlias bounds the name of an entry, in bytes.
	maxAlias = 1 << 10
)

// Is reports whether data begins like a store (RFC 7292, section 4): a SEQUENCE with version 3 and
// a ContentInfo of PKCS#7. A head of a few bytes is enough.
func Is(data []byte) bool {
	info, ok := bytes.CutPrefix(ber.Open(data), []byte("\x02\x01\x03"))
	kind := ber.Open(info)
	const want = "\x06\x09" + oidPKCS7
	return ok && kind != nil && strings.HasPrefix(want, string(kind[:min(len(kind), len(want))]))
}

// Kind is the type of an entry.
type Kind int

const (
	Certificate  Kind = iota // X.509
	EncryptedKey             // EncryptedPrivateKeyInfo of PKCS#8, still encrypted
	Key                      // PrivateKeyInfo of PKCS#8
	Other                    // any other bag, such as a revocation list or a secret
)

// Entry is an entry of a store. Its slices may alias the store's bytes.
type Entry struct {
	Kind  Kind
	Alias string // friendlyName, or ""
	ID    []byte // localKeyId, equal for a key and its certificate
	DER   []byte

	opened      *openedKey        // nil if the key has not been decrypted
	certificate *x509.Certificate // nil if the entry is not a certificate or was not parsed
	trusted     bool              // it has the attribute trustedKeyUsage
	bag         []byte            // encoding of the whole bag, with its attributes
}

// Reader reads stores with a list of passwords.
type Reader struct {
	Passwords []string // tried in this order

	// Work is the remaining budget for trying passwords, for all stores together, in bytes hashed;
	// 256 MiB take one to two seconds. A store can demand any number of iterations, so there is no
	// reading without a budget.
	Work int64
}

var (
	// ErrPassword means that none of the passwords decrypts a part of a store.
	ErrPassword = errors.New("PKCS#12: wrong password")

	// ErrWork means that trying another password would exceed the budget for work.
	ErrWork = errors.New("PKCS#12: deriving keys from passwords takes too long: the file demands too many iterations")

	errParts  = fmt.Errorf("PKCS#12: the store has more than %d encrypted parts: the rest of it is not read", maxEncrypted)
	errSigned = errors.New("PKCS#12: signed or public-key encrypted contents are not supported")
)

// Read calls entry for each entry of a store, in order, and problem for each part that it cannot
// read. It does not decrypt keys. It does not check the MAC: a wrong password shows in the padding
// and the decrypted structure.
func (r *Reader) Read(data []byte, entry func(Entry), problem func(error)) {
	report := func(err error) {
		if err != nil {
			problem(damaged(err))
		}
	}
	content, _, err := openPFX(data)
	if err != nil {
		problem(err)
		return
	}
	safes := ber.Sequence(content)
	encrypted := 0
	for safes.Err == nil && len(safes.Rest) > 0 {
		safe := safes.Inside(ber.TagSequence)
		kind := safe.OID()
		content := safe.Inside(ber.TagExplicit0)
		switch {
		case content.Err != nil:
			report(content.Err)
		case kind == oidData:
			report(readBags(content.Octets(ber.TagOctetString), 0, entry))
		case kind == oidEncryptedData:
			if encrypted++; encrypted > maxEncrypted {
				problem(errParts)
				return
			}
			if err := r.readEncrypted(content, entry); err != nil {
				problem(err)
			}
		case kind == oidEnvelopedData:
			problem(errSigned)
		}
	}
	report(safes.Err)
}

// openPFX returns the AuthenticatedSafe of a store (RFC 7292, section 4) and the fields after it:
// an optional MacData.
func openPFX(data []byte) (content []byte, rest *ber.Fields, err error) {
	rest = ber.Sequence(data)
	rest.Integer()
	info := rest.Inside(ber.TagSequence)
	if kind := info.OID(); info.Err == nil && kind != oidData {
		return nil, nil, errSigned
	}
	explicit := info.Inside(ber.TagExplicit0)
	if content = explicit.Octets(ber.TagOctetString); explicit.Err != nil {
		return nil, nil, damaged(explicit.Err)
	}
	return content, rest, nil
}

func damaged(err error) error { return fmt.Errorf("damaged PKCS#12: %w", err) }

// readBags calls entry for each entry of a SafeContents.
func readBags(b []byte, depth int, entry func(Entry)) error {
	if depth > maxBagDepth {
		return ber.ErrInvalid
	}
	contents := ber.Sequence(b)
	for contents.Err == nil && len(contents.Rest) > 0 {
		e, nested, err := readBag(contents.Next(ber.TagSequence))
		if err != nil {
			return cmp.Or(contents.Err, err)
		}
		if nested == nil {
			entry(e)
		} else if err := readBags(nested, depth+1, entry); err != nil {
			return err
		}
	}
	return contents.Err
}

// readBag reads a SafeBag. If that holds a SafeContents instead of an entry, readBag returns it as
// nested.
func readBag(whole ber.Value) (e Entry, nested []byte, err error) {
	bag := &ber.Fields{Rest: whole.Body}
	kind := bag.OID()
	v := bag.Inside(ber.TagExplicit0)
	if v.Err != nil {
		return e, nil, v.Err
	}
	e = Entry{Kind: Other, DER: v.Rest, bag: whole.Full}
	switch kind {
	case oidSafeContentsBag:
		return e, v.Rest, nil
	case oidKeyBag:
		e.Kind = Key
	case oidShroudedKeyBag:
		e.Kind = EncryptedKey
	case oidCertBag:
		cert := v.Inside(ber.TagSequence)
		if cert.OID() != oidX509Certificate {
			break // SDSI
		}
		inner := cert.Inside(ber.TagExplicit0)
		if e.Kind, e.DER = Certificate, inner.Octets(ber.TagOctetString); inner.Err != nil {
			return e, nil, inner.Err
		}
	}
	e.readAttributes(bag)
	return e, nil, nil
}

// readAttributes reads the fields after the value of a bag. It ignores damage: the entry is usable
// without a name.
func (e *Entry) readAttributes(bag *ber.Fields) {
	for attribute, err := range bag.Next(ber.TagSet).Children() {
		if err != nil {
			return
		}
		f := ber.Fields{Rest: attribute.Body}
		kind := f.OID()
		v, _, err := ber.Element(f.Inside(ber.TagSet).Rest)
		if err != nil {
			continue
		}
		switch kind {
		case oidFriendlyName:
			e.Alias, _ = v.Text(maxAlias)
		case oidLocalKeyID:
			e.ID, _ = v.Octets()
		case oidTrustedKeyUsage:
			e.trusted = true
		}
	}
}

func (r *Reader) readEncrypted(data *ber.Fields, entry func(Entry)) error {
	scheme, ciphertext, err := readEncryptedData(data)
	if err != nil {
		return err
	}
	return scheme.try(r.Passwords, &r.Work, ciphertext, func(plain []byte) error {
		var opened []Entry
		err := readBags(plain, 0, func(e Entry) { opened = append(opened, e) })
		if err == nil {
			for _, e := range opened {
				entry(e)
			}
		}
		return err
	})
}

// readEncryptedData reads the EncryptedData of PKCS#7 (RFC 2315, section 13).
func readEncryptedData(data *ber.Fields) (s scheme, ciphertext []byte, err error) {
	encrypted := data.Inside(ber.TagSequence)
	encrypted.Integer()
	info := encrypted.Inside(ber.TagSequence)
	info.OID()
	algorithm := info.Inside(ber.TagSequence)
	if ciphertext = info.Octets(ber.TagContext0); info.Err != nil {
		return s, nil, damaged(info.Err)
	}
	if s, err = encryptionScheme(algorithm); err != nil {
		err = fmt.Errorf("PKCS#12: %w", err)
	}
	return s, ciphertext, err
}
