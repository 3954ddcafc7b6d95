package certfile

import (
	"math/bits"

	"certctl-agent/internal/ber"
)

// keyAlgorithm is the name of a public key algorithm in a report and a function for the key size.
type keyAlgorithm struct {
	name string
	bits func(parameters, key []byte) int
}

// keyAlgorithms are the key algorithms in use, by object identifier. RSA, ECDSA, DSA and Ed25519
// have the names that crypto/x509 uses.
var keyAlgorithms = map[string]keyAlgorithm{
	"1.2.840.113549.1.1.1":  {"RSA", modulusBits},
	"2.5.8.1.1":             {"RSA", modulusBits}, // X.509 before PKCS #1
	"1.2.840.113549.1.1.10": {"RSASSA-PSS", modulusBits},
	"1.2.840.113549.1.1.7":  {"RSAES-OAEP", modulusBits},
	oidEC:                   {"ECDSA", curveBits},
	"1.3.132.1.12":          {"ECDH", curveBits},
	"1.3.132.1.13":          {"ECMQV", curveBits},
	"1.2.840.10040.4.1":     {"DSA", primeBits},
	"1.3.14.3.2.12":         {"DSA", primeBits}, // OIW
	"1.2.840.113549.1.3.1":  {"DH", primeBits},
	"1.2.840.10046.2.1":     {"DH", primeBits},
	"1.3.101.110":           {"X25519", keyBits},
	"1.3.101.111":           {"X448", keyBits},
	"1.3.101.112":           {"Ed25519", keyBits},
	"1.3.101.113":           {"Ed448", keyBits},
	"1.2.643.2.2.19":        {"GOST R 34.10-2001", fixedBits(256)},
	"1.2.643.7.1.1.1.1":     {"GOST R 34.10-2012", fixedBits(256)},
	"1.2.643.7.1.1.1.2":     {"GOST R 34.10-2012", fixedBits(512)},

	// FIPS 203 to 205. The name includes the parameter set; the size is that of the encoded key.
	"2.16.840.1.101.3.4.4.1":  {"ML-KEM-512", keyBits},
	"2.16.840.1.101.3.4.4.2":  {"ML-KEM-768", keyBits},
	"2.16.840.1.101.3.4.4.3":  {"ML-KEM-1024", keyBits},
	"2.16.840.1.101.3.4.3.17": {"ML-DSA-44", keyBits},
	"2.16.840.1.101.3.4.3.18": {"ML-DSA-65", keyBits},
	"2.16.840.1.101.3.4.3.19": {"ML-DSA-87", keyBits},
	"2.16.840.1.101.3.4.3.20": {"SLH-DSA-SHA2-128s", keyBits}, "2.16.840.1.101.3.4.3.21": {"SLH-DSA-SHA2-128f", keyBits},
	"2.16.840.1.101.3.4.3.22": {"SLH-DSA-SHA2-192s", keyBits}, "2.16.840.1.101.3.4.3.23": {"SLH-DSA-SHA2-192f", keyBits},
	"2.16.840.1.101.3.4.3.24": {"SLH-DSA-SHA2-256s", keyBits}, "2.16.840.1.101.3.4.3.25": {"SLH-DSA-SHA2-256f", keyBits},
	"2.16.840.1.101.3.4.3.26": {"SLH-DSA-SHAKE-128s", keyBits}, "2.16.840.1.101.3.4.3.27": {"SLH-DSA-SHAKE-128f", keyBits},
	"2.16.840.1.101.3.4.3.28": {"SLH-DSA-SHAKE-192s", keyBits}, "2.16.840.1.101.3.4.3.29": {"SLH-DSA-SHAKE-192f", keyBits},
	"2.16.840.1.101.3.4.3.30": {"SLH-DSA-SHAKE-256s", keyBits}, "2.16.840.1.101.3.4.3.31": {"SLH-DSA-SHAKE-256f", keyBits},

	// RFC 9708 and RFC 9802.
	"1.2.840.113549.1.9.16.3.17": {"HSS/LMS", keyBits},
	"1.3.6.1.5.5.7.6.34":         {"XMSS", keyBits},
	"1.3.6.1.5.5.7.6.35":         {"XMSS-MT", keyBits},
}

const (
	oidEC  = "1.2.840.10045.2.1"
	oidSM2 = "1.2.156.10197.1.301"
)

// curves are the named curves of X9.62, SEC 2, RFC 5639 and GB/T 32918, with the size of their
// order in bits, which is what OpenSSL calls the size of a key.
var curves = map[string]int{
	"1.2.840.10045.3.1.1": 192, "1.2.840.10045.3.1.2": 192, "1.2.840.10045.3.1.3": 192, // prime192v1, prime192v2, prime192v3
	"1.2.840.10045.3.1.4": 239, "1.2.840.10045.3.1.5": 239, "1.2.840.10045.3.1.6": 239, // prime239v1, prime239v2, prime239v3
	"1.2.840.10045.3.1.7":  256,                              // prime256v1
	"1.3.36.3.3.2.8.1.1.1": 160, "1.3.36.3.3.2.8.1.1.2": 160, // brainpoolP160r1, brainpoolP160t1
	"1.3.36.3.3.2.8.1.1.3": 192, "1.3.36.3.3.2.8.1.1.4": 192, // brainpoolP192r1, brainpoolP192t1
	"1.3.36.3.3.2.8.1.1.5": 224, "1.3.36.3.3.2.8.1.1.6": 224, // brainpoolP224r1, brainpoolP224t1
	"1.3.36.3.3.2.8.1.1.7": 256, "1.3.36.3.3.2.8.1.1.8": 256, // brainpoolP256r1, brainpoolP256t1
	"1.3.36.3.3.2.8.1.1.9": 320, "1.3.36.3.3.2.8.1.1.10": 320, // brainpoolP320r1, brainpoolP320t1
	"1.3.36.3.3.2.8.1.1.11": 384, "1.3.36.3.3.2.8.1.1.12": 384, // brainpoolP384r1, brainpoolP384t1
	"1.3.36.3.3.2.8.1.1.13": 512, "1.3.36.3.3.2.8.1.1.14": 512, // brainpoolP512r1, brainpoolP512t1
	"1.3.132.0.1": 163, "1.3.132.0.2": 162, "1.3.132.0.3": 238, // sect163k1, sect163r1, sect239k1
	"1.3.132.0.4": 113, "1.3.132.0.5": 113, "1.3.132.0.6": 112, // sect113r1, sect113r2, secp112r1
	"1.3.132.0.7": 110, "1.3.132.0.8": 161, "1.3.132.0.9": 161, // secp112r2, secp160r1, secp160k1
	"1.3.132.0.10": 256, "1.3.132.0.15": 163, "1.3.132.0.16": 281, // secp256k1, sect163r2, sect283k1
	"1.3.132.0.17": 282, "1.3.132.0.22": 131, "1.3.132.0.23": 131, // sect283r1, sect131r1, sect131r2
	"1.3.132.0.24": 193, "1.3.132.0.25": 193, "1.3.132.0.26": 232, // sect193r1, sect193r2, sect233k1
	"1.3.132.0.27": 233, "1.3.132.0.28": 128, "1.3.132.0.29": 126, // sect233r1, secp128r1, secp128r2
	"1.3.132.0.30": 161, "1.3.132.0.31": 192, "1.3.132.0.32": 225, // secp160r2, secp192k1, secp224k1
	"1.3.132.0.33": 224, "1.3.132.0.34": 384, "1.3.132.0.35": 521, // secp224r1, secp384r1, secp521r1
	"1.3.132.0.36": 407, "1.3.132.0.37": 409, "1.3.132.0.38": 570, // sect409k1, sect409r1, sect571k1
	"1.3.132.0.39": 570, // sect571r1
	oidSM2:         256,
}

// publicKey returns the name of the algorithm of a SubjectPublicKeyInfo, or its object identifier
// if it is unknown, and the size of the key in bits, or 0 if it is unknown.
func publicKey(info ber.Value) (algorithm string, size int) {
	f := ber.Fields{Rest: info.Body}
	identifier := f.Inside(ber.TagSequence)
	oid := ber.OIDText(identifier.Next(ber.TagOID).Body)
	known, ok := keyAlgorithms[oid]
	if !ok {
		return oid, 0
	}
	if oid == oidEC && curveOf(identifier.Rest) == oidSM2 {
		known.name = "SM2"
	}
	key := f.Next(ber.TagBitString).Body
	if len(key) == 0 {
		return known.name, 0
	}
	return known.name, known.bits(identifier.Rest, key[1:]) // after the number of unused bits
}

func fixedBits(n int) func([]byte, []byte) int { return func(_, _ []byte) int { return n } }

func keyBits(_, key []byte) int { return 8 * len(key) }

// modulusBits reads an RSAPublicKey (RFC 8017, A.1.1).
func modulusBits(_, key []byte) int { return bitLength(ber.Sequence(key).Next(ber.TagInteger).Body) }

// primeBits reads the parameters of DSA and both kinds of DH, which begin with the prime (RFC
// 3279).
func primeBits(parameters, _ []byte) int {
	return bitLength(ber.Sequence(parameters).Next(ber.TagInteger).Body)
}

// curveBits reads the parameters of an EC key: a named curve or an explicit one (X9.62; RFC 3279,
// section 2.3.5).
func curveBits(parameters, _ []byte) int {
	if oid := curveOf(parameters); oid != "" {
		return curves[oid]
	}
	explicit := ber.Sequence(parameters)
	explicit.Next(ber.TagInteger)     // version
	explicit.Next(ber.TagSequence)    // field
	explicit.Next(ber.TagSequence)    // coefficients
	explicit.Next(ber.TagOctetString) // base point
	return bitLength(explicit.Next(ber.TagInteger).Body)
}

func curveOf(parameters []byte) string {
	f := ber.Fields{Rest: parameters}
	if !f.At(ber.TagOID) {
		return ""
	}
	return ber.OIDText(f.Next(ber.TagOID).Body)
}

// bitLength returns the length of a nonnegative INTEGER in bits.
func bitLength(octets []byte) int {
	for len(octets) > 0 && octets[0] == 0 {
		octets = octets[1:]
	}
	if len(octets) == 0 {
		return 0
	}
	return 8*(len(octets)-1) + bits.Len8(octets[0])
}
