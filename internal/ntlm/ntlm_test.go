package ntlm

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/secret"
	"certctl-agent/internal/testing/testca"
)

// TestMD4 runs the test suite of RFC 1320, A.5.
func TestMD4(t *testing.T) {
	for message, want := range map[string]string{
		"":                           "31d6cfe0d16ae931b73c59d7e0c089c0",
		"a":                          "bde52cb31de33e46245e05fbdbd6fb24",
		"abc":                        "a448017aaf21d8525fc10ae87aa6729d",
		"message digest":             "d9130a8164549fe818874806e1c7014b",
		"abcdefghijklmnopqrstuvwxyz": "d79e1c308aa5bbcdeea8ed63df412da9",
		"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789":                   "043f8582f241db351ce627e153e7f0e4",
		"12345678901234567890123456789012345678901234567890123456789012345678901234567890": "e33b4ddc9c38f2199c3e7b164fcc0536",
	} {
		if sum := md4([]byte(message)); hex.EncodeToString(sum[:]) != want {
			t.Errorf("md4(%q) = %x, want %s", message, sum, want)
		}
	}
}

// The input of the examples in 4.2.1 and 4.2.4.
var (
	exampleKey    = [16]byte(bytes.Repeat([]byte{0x55}, 16)) // RandomSessionKey
	exampleClient = [8]byte(bytes.Repeat([]byte{0xaa}, 8))
	exampleServer = [8]byte{0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef}
	exampleInfo   = AppendPairs(nil, []AvPair{{AvDomainName, UTF16("Domain")}, {AvComputerName, UTF16("Server")}})
)

// TestExamples checks the example values of MS-NLMP for NTLMv2.
func TestExamples(t *testing.T) {
	hash := md4(UTF16("Password"))
	key := ResponseKey("User", "Domain", "Password")
	nt, base := Response(key, exampleServer, exampleClient, 0, exampleInfo)
	session := NewSession(exampleKey, false)
	seal := session.out
	signature, sealed := session.Wrap(UTF16("Plaintext"))
	for _, test := range []struct {
		clause, name string
		got          []byte
		want         string
	}{
		{"4.2.2.1.2", "NTOWFv1", hash[:], "a4f49c406510bdcab6824ee7c30fd852"},
		{"4.2.4.1.1", "NTOWFv2", key[:], "0c868a403bfd7a93a3001ef22ef02e3f"},
		{"4.2.4.1.2", "SessionBaseKey", base[:], "8de40ccadbc14a82f15cb0ad0de95ca3"},
		{"4.2.4.1.3", "temp", nt[16:], "01010000000000000000000000000000aaaaaaaaaaaaaaaa00000000" +
			"02000c0044006f006d00610069006e0001000c005300650072007600650072000000000000000000"},
		{"4.2.4.2.1", "LMv2 response", lmResponse(key, exampleServer, exampleClient), "86c35097ac9cec102554764a57cccc19aaaaaaaaaaaaaaaa"},
		{"4.2.4.2.2", "NTLMv2 response", nt[:16], "68cd0ab851e51c96aabc927bebef6a1c"},
		{"4.2.4.2.3", "encrypted session key", RC4(base, exampleKey[:]), "c5dad2544fc9799094ce1ce90bc9d03e"},
		{"4.2.4.4", "SIGNKEY", seal.key[:], "4788dc861b4782f35d43fd98fe1a2d39"},
		{"4.2.4.4", "data", sealed, "54e50165bf1936dc996020c1811b0f06fb5f"},
		{"4.2.4.4", "signature", signature, "010000007fb38ec5c55d497600000000"},
	} {
		if got := hex.EncodeToString(test.got); got != test.want {
			t.Errorf("%s: %s = %s, want %s", test.clause, test.name, got, test.want)
		}
	}
}

// exampleChallenge is the challenge of 4.2.4.3.
func exampleChallenge(t *testing.T) []byte {
	t.Helper()
	m, err := hex.DecodeString("4e544c4d53535000020000000c000c003800000033828ae20123456789abcdef0000000000000000240024004400000006007017" +
		"0000000f530065007200760065007200" + "02000c0044006f006d00610069006e0001000c0053006500720076006500720000000000")
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// TestAuthenticate answers the challenge of 4.2.4.3. The AUTHENTICATE_MESSAGE there is from a
// client that sends neither MIC nor bindings, so the fields are checked against the clauses.
func TestAuthenticate(t *testing.T) {
	challenge, err := ParseChallenge(exampleChallenge(t))
	if err != nil {
		t.Fatal(err)
	}
	if challenge.Server != exampleServer || challenge.Flags != 0xe28a8233 || !challenge.Time().IsZero() {
		t.Errorf("challenge = %+v", challenge)
	}
	bindings := [16]byte{1, 2, 3}
	client := New(`Domain\User`, secret.New("Password"), "HTTP/host", bindings)
	client.random = func(b []byte) {
		fill := byte(0xaa)
		if len(b) == 16 {
			fill = 0x55
		}
		copy(b, bytes.Repeat([]byte{fill}, len(b)))
	}
	negotiate := client.Negotiate()
	m, session := client.Authenticate(challenge)
	fields := make(map[string][]byte)
	for i, name := range []string{"lm", "nt", "domain", "user", "workstation", "key"} {
		if fields[name], err = Field(m, 12+8*i); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]string{
		"lm":     "86c35097ac9cec102554764a57cccc19aaaaaaaaaaaaaaaa",
		"domain": "44006f006d00610069006e00", "user": "5500730065007200", "workstation": "",
	} {
		if got := hex.EncodeToString(fields[name]); got != want {
			t.Errorf("%s = %s, want %s", name, got, want)
		}
	}
	if flags := binary.LittleEndian.Uint32(m[60:]); flags != 0xe2888231 { // all flags of the challenge that the client offers
		t.Errorf("flags = %08x", flags)
	}
	pairs, err := ParsePairs(fields["nt"][16+28:])
	if err != nil {
		t.Fatal(err)
	}
	for id, want := range map[uint16]string{AvDomainName: "44006f006d00610069006e00", AvComputerName: "530065007200760065007200", AvFlags: "02000000",
		AvChannelBindings: hex.EncodeToString(bindings[:]), AvTargetName: hex.EncodeToString(UTF16("HTTP/host"))} {
		if got := hex.EncodeToString(Pair(pairs, id)); got != want {
			t.Errorf("AV_PAIR %d = %s, want %s", id, got, want)
		}
	}
	if sent := ParseFiletime(binary.LittleEndian.Uint64(fields["nt"][24:])); time.Since(sent).Abs() > time.Hour {
		t.Errorf("time = %v, want this host's, since the server has not sent its own", sent)
	}
	mic := [16]byte(m[micOffset:])
	copy(m[micOffset:], make([]byte, 16))
	if want := HMAC(exampleKey[:], negotiate, exampleChallenge(t), m); mic != want {
		t.Errorf("MIC = %x, want %x", mic, want)
	}
	_, base := Response(ResponseKey("User", "Domain", "Password"), exampleServer, exampleClient, binary.LittleEndian.Uint64(fields["nt"][24:]), fields["nt"][44:len(fields["nt"])-4])
	if got := RC4(base, fields["key"]); !bytes.Equal(got, exampleKey[:]) {
		t.Errorf("session key = %x, want %x", got, exampleKey)
	}
	signature, sealed := session.Wrap([]byte("x"))
	if got, err := NewSession(exampleKey, true).Unwrap(signature, sealed); err != nil || string(got) != "x" {
		t.Errorf("the server reads %q, %v", got, err)
	}
}

// TestServersTime checks that the server's time is sent back unchanged, so that clocks need not
// agree, and that there is no LMv2 response then (3.1.5.1.2).
func TestServersTime(t *testing.T) {
	stamp := time.Date(2001, 2, 3, 4, 5, 6, 700, time.UTC)
	challenge, err := ParseChallenge(withPairs(t, AvPair{AvTimestamp, binary.LittleEndian.AppendUint64(nil, Filetime(stamp))}))
	if err != nil {
		t.Fatal(err)
	}
	if !challenge.Time().Equal(stamp) {
		t.Errorf("Time() = %v, want %v", challenge.Time(), stamp)
	}
	client := New("user@example.org", secret.New("Password"), "HTTP/host", [16]byte{})
	client.Negotiate()
	m, _ := client.Authenticate(challenge)
	lm, _ := Field(m, 12)
	nt, _ := Field(m, 20)
	domain, _ := Field(m, 28)
	user, _ := Field(m, 36)
	if !bytes.Equal(lm, make([]byte, 24)) || binary.LittleEndian.Uint64(nt[24:]) != Filetime(stamp) {
		t.Errorf("LM response %x, time %x", lm, nt[24:32])
	}
	if len(domain) != 0 || !bytes.Equal(user, UTF16("user@example.org")) {
		t.Errorf("domain %q, user %q", domain, user)
	}
}

// withPairs returns a challenge with these pairs after the names.
func withPairs(t testing.TB, pairs ...AvPair) []byte {
	t.Helper()
	info := AppendPairs(nil, append([]AvPair{{AvDomainName, UTF16("D")}, {AvComputerName, UTF16("S")}}, pairs...))
	m := append([]byte(signature), challengeMessage, 0, 0, 0)
	m = append(m, make([]byte, 8)...)
	m = binary.LittleEndian.AppendUint32(m, Required)
	m = append(m, make([]byte, 16)...)
	m = binary.LittleEndian.AppendUint16(m, uint16(len(info)))
	m = binary.LittleEndian.AppendUint16(m, uint16(len(info)))
	m = binary.LittleEndian.AppendUint32(m, 48)
	return append(m, info...)
}

// TestServersPairs checks that pairs that the client sets replace the server's.
func TestServersPairs(t *testing.T) {
	challenge, err := ParseChallenge(withPairs(t, AvPair{AvFlags, []byte{1, 0, 0, 0}}, AvPair{AvChannelBindings, make([]byte, 16)}, AvPair{AvTargetName, UTF16("theirs")}))
	if err != nil {
		t.Fatal(err)
	}
	client := New("u", secret.New("p"), "ours", [16]byte{1})
	client.Negotiate()
	m, _ := client.Authenticate(challenge)
	nt, _ := Field(m, 20)
	pairs, err := ParsePairs(nt[44:])
	if err != nil {
		t.Fatal(err)
	}
	if got, want := AppendPairs(nil, pairs[2:]), AppendPairs(nil, []AvPair{{AvFlags, []byte{3, 0, 0, 0}}, {AvChannelBindings, append([]byte{1}, make([]byte, 15)...)},
		{AvTargetName, UTF16("ours")}}); !bytes.Equal(got, want) {
		t.Errorf("target information %x, want %x", got, want)
	}
}

func TestBadChallenge(t *testing.T) {
	good := withPairs(t)
	change := func(at int, b byte) []byte {
		m := bytes.Clone(good)
		m[at] = b
		return m
	}
	for name, test := range map[string]struct {
		message []byte
		want    string
	}{
		"empty":          {nil, "not a challenge"},
		"other kind":     {change(8, 1), "not a challenge"},
		"long":           {append(bytes.Clone(good), make([]byte, maxChallenge)...), "not a challenge"},
		"no sealing":     {change(20, Unicode|Sign), "00000020 are missing"},
		"40 bits":        {change(23, 0x40), "20000000 are missing"},
		"info outside":   {change(44, 0xff), "outside"},
		"pair cut off":   {change(40, 3), "truncated"},
		"no server name": {change(48, 4), "does not name"},
	} {
		if _, err := ParseChallenge(test.message); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", name, err, test.want)
		}
	}
	if _, err := ParseChallenge(good); err != nil {
		t.Error(err)
	}
}

// TestSession covers both sides and both directions, and checks that modified, repeated and
// reordered messages are rejected.
func TestSession(t *testing.T) {
	client, server := NewSession(exampleKey, false), NewSession(exampleKey, true)
	for i := range 3 {
		for _, pair := range [][2]*Session{{client, server}, {server, client}} {
			signature, sealed := pair[0].Wrap([]byte("message"))
			if bytes.Contains(sealed, []byte("message")) {
				t.Error("a sealed message can be read")
			}
			if got, err := pair[1].Unwrap(signature, sealed); err != nil || string(got) != "message" {
				t.Errorf("%d: %q, %v", i, got, err)
			}
		}
	}
	signature, sealed := client.Wrap([]byte("message"))
	sealed[0] ^= 1
	if _, err := server.Unwrap(signature, sealed); err == nil {
		t.Error("a modified message is accepted")
	}
	if _, err := NewSession(exampleKey, true).Unwrap(client.Wrap(nil)); err == nil {
		t.Error("the fourth message is accepted as the first")
	}
	if _, err := server.Unwrap(nil, nil); err == nil {
		t.Error("a message without a signature is accepted")
	}
}

// TestBindings has the example of Microsoft's "NTLM and Channel Binding Hash",
// https://learn.microsoft.com/en-us/archive/blogs/openspecification/ntlm-and-channel-binding-hash-aka-extended-protection-for-authentication.
func TestBindings(t *testing.T) {
	hash, _ := hex.DecodeString("ea05fefecc6b0bd571dbbc5baa3ed45386d0446835f7b74c85621b9983475f95")
	if got := bindingsOf(hash); hex.EncodeToString(got[:]) != "6586e99d81c2fc984e47172fd4dd0310" {
		t.Errorf("bindings of the example = %x", got)
	}
	issued, err := testca.Must(t).Issue(testca.Template{})
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(issued.Leaf.Raw)
	if got := Bindings(issued.Leaf); got != bindingsOf(sum[:]) {
		t.Errorf("bindings = %x", got)
	}
	odd := *issued.Leaf
	odd.SignatureAlgorithm = x509.PureEd25519
	if got := Bindings(&odd); got != ([16]byte{}) {
		t.Errorf("bindings of a signature without a hash: %x", got)
	}
	for algorithm, size := range map[x509.SignatureAlgorithm]int{x509.MD5WithRSA: 32, x509.SHA1WithRSA: 32, x509.ECDSAWithSHA1: 32,
		x509.ECDSAWithSHA384: 48, x509.SHA512WithRSAPSS: 64} {
		if got := endPointHash(algorithm).Size(); got != size {
			t.Errorf("%v: hash of %d bytes, want %d", algorithm, got, size)
		}
	}
}

func FuzzParseChallenge(f *testing.F) {
	f.Add(withPairs(f, AvPair{AvTimestamp, make([]byte, 8)}))
	f.Add(withPairs(f, AvPair{AvFlags, make([]byte, 4)}, AvPair{AvChannelBindings, make([]byte, 16)}))
	f.Fuzz(func(t *testing.T, m []byte) {
		challenge, err := ParseChallenge(m)
		if err != nil {
			return
		}
		challenge.Time()
		client := New(`D\u`, secret.New("p"), "HTTP/h", [16]byte{})
		client.Negotiate()
		answer, _ := client.Authenticate(challenge)
		nt, err := Field(answer, 20)
		if err != nil {
			t.Fatal(err)
		}
		if pairs, err := ParsePairs(nt[44:]); err != nil || len(Pair(pairs, AvChannelBindings)) != 16 {
			t.Errorf("the answer has the target information %x: %v", nt[44:], err)
		}
	})
}
