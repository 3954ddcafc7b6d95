package ntlm

import (
	"crypto"
	"crypto/md5"
	_ "crypto/sha512" // also SHA-384
	"crypto/x509"
	"encoding/binary"
)

// Bindings returns the channel bindings of a TLS connection to a server with this certificate:
// tls-server-end-point (RFC 5929, section 4.1). They keep a logon from being relayed to another
// server. They are zero, which means none, if the certificate's signature algorithm has no hash
// function: none are defined then.
func Bindings(certificate *x509.Certificate) [16]byte {
	hash := endPointHash(certificate.SignatureAlgorithm)
	if hash == 0 {
		return [16]byte{}
	}
	digest := hash.New()
	digest.Write(certificate.Raw)
	return bindingsOf(digest.Sum(nil))
}

// bindingsOf returns the MD5 of a gss_channel_bindings_struct (2.2.2.1; RFC 4121, section 4.1.1.2)
// without addresses and with application data.
func bindingsOf(hash []byte) [16]byte {
	data := append([]byte("tls-server-end-point:"), hash...)
	unhashed := binary.LittleEndian.AppendUint32(make([]byte, 16), uint32(len(data)))
	return md5.Sum(append(unhashed, data...))
}

// endPointHash returns the hash function of the signature, or SHA-256 instead of MD5 and SHA-1.
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
