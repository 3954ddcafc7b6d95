package ntlm

import (
	"crypto"
	"crypto/md5"
	_ "crypto/sha512" // and SHA-384, of certificates
	"crypto/x509"
	"encoding/binary"
)

// Bindings ties a logon to the TLS connection with a server that showed this
// certificate, so that nobody can relay it to another: RFC 5929, 4.1,
// tls-server-end-point. They are zero, which stands for none, for a certificate
// whose signature has no hash function, for which none is defined.
func Bindings(certificate *x509.Certificate) [16]byte {
	hash := endPointHash(certificate.SignatureAlgorithm)
	if hash == 0 {
		return [16]byte{}
	}
	digest := hash.New()
	digest.Write(certificate.Raw)
	return bindingsOf(digest.Sum(nil))
}

// bindingsOf is the MD5 of a gss_channel_bindings_struct, 2.2.2.1, as RFC 4121,
// 4.1.1.2 has it: no addresses, and application data.
func bindingsOf(hash []byte) [16]byte {
	data := append([]byte("tls-server-end-point:"), hash...)
	unhashed := binary.LittleEndian.AppendUint32(make([]byte, 16), uint32(len(data)))
	return md5.Sum(append(unhashed, data...))
}

// endPointHash is that of the signature, and SHA-256 for MD5 and SHA-1.
func endPointHash(algorithm x509.SignatureAlgorithm) crypto.Hash {
	switch algorithm {
	case x509.MD5WithRSA, x509.SHA1WithRSA, x509.ECDSAWithSHA1, x509.DSAWithSHA1,
		x509.SHA256WithRSA, x509.SHA256WithRSAPSS, x509.ECDSAWithSHA256, x509.DSAWithSHA256:
		return crypto.SHA256
	case x509.SHA384WithRSA, x509.SHA384WithRSAPSS, x509.ECDSAWithSHA384:
		return crypto.SHA384
	case x509.SHA512WithRSA, x509.SHA512WithRSAPSS, x509.ECDSAWithSHA512:
		return crypto.SHA512
	}
	return 0
}
