package awsfake

import (
	"bytes"
	"cmp"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"certctl-agent/internal/pemutil"
)

// certificate is a certificate in ACM.
type certificate struct {
	arn        string
	leaf       *x509.Certificate
	body       string // PEM
	chain      string // PEM, or ""
	key        string // PEM; not returned by any call
	tags       []Tag
	usedBy     []string // ARNs of load balancers and similar resources
	created    time.Time
	importedAt time.Time
	kind       string // "IMPORTED", "AMAZON_ISSUED"
	missing    int    // number of calls in which it does not appear yet
}

// Tag is a tag of a certificate.
type Tag struct {
	Key   string
	Value string `json:",omitempty"`
}

// Certificate is a certificate for tests to examine.
type Certificate struct {
	ARN              string
	Body, Chain, Key string // PEM
	Tags             []Tag
}

// Certificates returns all certificates in the order of their import.
func (c *Cloud) Certificates() (all []Certificate) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, have := range c.certificates {
		all = append(all, Certificate{have.arn, have.body, have.chain, have.key, slices.Clone(have.tags)})
	}
	return all
}

// Use sets which load balancers use a certificate.
func (c *Cloud) Use(arn string, by ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if have := c.find(arn); have != nil {
		have.usedBy = by
	}
}

// SetKind changes the origin of a certificate, such as "AMAZON_ISSUED".
func (c *Cloud) SetKind(arn, kind string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if have := c.find(arn); have != nil {
		have.kind = kind
	}
}

// Put imports a certificate as another client would, regardless of the quota.
func (c *Cloud) Put(body, key, chain []byte, tags ...Tag) (arn string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	imported, p := parseImport(body, key, chain)
	if p != nil {
		return "", fmt.Errorf("%s: %s", p.code, p.message)
	}
	imported.arn, imported.tags, imported.created = c.newARN(), tags, time.Now()
	c.certificates = append(c.certificates, imported)
	return imported.arn, nil
}

func (c *Cloud) newARN() string {
	return "arn:" + c.partition() + ":acm:" + c.Region + ":" + Account + ":certificate/" + uuid()
}

func (c *Cloud) find(arn string) *certificate {
	i := slices.IndexFunc(c.certificates, func(have *certificate) bool { return have.arn == arn })
	if i < 0 {
		return nil
	}
	return c.certificates[i]
}

// acm implements https://docs.aws.amazon.com/acm/latest/APIReference/.
func (c *Cloud) acm(r *http.Request, body []byte) (speaks protocol, operation string, call func() ([]byte, *problem)) {
	const contentType = "application/x-amz-json-1.1"
	speaks = protocol{contentType, acmProblem}
	operation, _ = strings.CutPrefix(r.Header.Get("X-Amz-Target"), "CertificateManager.")
	calls := map[string]func(*key, []byte) (any, *problem){
		"ImportCertificate":      c.importCertificate,
		"DescribeCertificate":    c.describeCertificate,
		"GetCertificate":         c.getCertificate,
		"ListCertificates":       c.listCertificates,
		"ListTagsForCertificate": c.listTags,
		"AddTagsToCertificate":   c.addTags,
		"DeleteCertificate":      c.deleteCertificate,
	}
	do := calls[operation]
	return speaks, operation, func() ([]byte, *problem) {
		if do == nil || r.Header.Get("Content-Type") != contentType {
			return nil, refuse("UnknownOperationException", "%s with %s", operation, r.Header.Get("Content-Type"))
		}
		k, p := c.caller(r, body, "acm")
		if p != nil {
			return nil, p
		}
		result, p := do(k, body)
		if p != nil || result == nil {
			return nil, p
		}
		data, err := json.Marshal(result)
		if err != nil {
			panic(err) // impossible: results are strings and numbers
		}
		return data, nil
	}
}

func acmProblem(p *problem) []byte {
	data, _ := json.Marshal(map[string]string{"__type": p.code, "message": p.message})
	return data
}

// decode is stricter than AWS: it rejects misspelled fields.
func decode(body []byte, request any) *problem {
	d := json.NewDecoder(bytes.NewReader(body))
	if d.DisallowUnknownFields(); d.Decode(request) != nil || d.More() {
		return refuse("SerializationException", "the request does not decode: %.200s", body)
	}
	return nil
}

var arnForm = regexp.MustCompile(`^arn:[\w+=/,.@-]+:acm:[\w+=/,.@-]*:[0-9]+:[\w+=,.@-]+(/[\w+=,.@-]+)*$`)

// named returns the certificate that a request names.
func (c *Cloud) named(k *key, action, arn string) (*certificate, *problem) {
	if !arnForm.MatchString(arn) {
		return nil, refuse("InvalidArnException", "Invalid ARN: %.100s", arn)
	}
	if p := c.allow(k, action, arn); p != nil {
		return nil, p
	}
	have := c.find(arn)
	if have == nil {
		return nil, refuse("ResourceNotFoundException", "Could not find certificate %s.", arn)
	}
	return have, nil
}

// Limits for the parts of an import, in bytes.
const (
	maxCertificate = 32768
	maxKey         = 5120
	maxChain       = 2097152
)

func (c *Cloud) importCertificate(k *key, body []byte) (any, *problem) {
	var request struct {
		CertificateArn                            *string
		Certificate, PrivateKey, CertificateChain []byte
		Tags                                      []Tag
	}
	if p := decode(body, &request); p != nil {
		return nil, p
	}
	if p := checkTags(nil, request.Tags); p != nil {
		return nil, p
	}
	if request.CertificateArn == nil {
		if p := c.allow(k, "acm:ImportCertificate", "*"); p != nil {
			return nil, p
		}
		if len(request.Tags) > 0 {
			if p := c.allow(k, "acm:AddTagsToCertificate", "*"); p != nil {
				return nil, p
			}
		}
		imported, p := parseImport(request.Certificate, request.PrivateKey, request.CertificateChain)
		if p != nil {
			return nil, p
		}
		if c.imports >= c.Quota {
			return nil, refuse("LimitExceededException", "Error: you have reached your limit of %d certificates in the last year.", c.Quota)
		}
		c.imports++
		imported.arn, imported.tags, imported.created, imported.missing = c.newARN(), request.Tags, time.Now(), c.Lag
		c.certificates = append(c.certificates, imported)
		return map[string]string{"CertificateArn": imported.arn}, nil
	}
	have, p := c.named(k, "acm:ImportCertificate", *request.CertificateArn)
	switch {
	case p != nil:
		return nil, p
	case len(request.Tags) > 0:
		return nil, refuse("ValidationException", "Tagging is not permitted on re-import.")
	case have.kind != "IMPORTED":
		return nil, refuse("ValidationException", "Certificate %s is not an imported certificate.", have.arn)
	}
	imported, p := parseImport(request.Certificate, request.PrivateKey, request.CertificateChain)
	if p == nil {
		p = mayReplace(have.leaf, imported.leaf)
	}
	if p != nil {
		return nil, p
	}
	have.leaf, have.body, have.chain, have.key, have.importedAt = imported.leaf, imported.body, imported.chain, imported.key, imported.importedAt
	return map[string]string{"CertificateArn": have.arn}, nil
}

// parseImport enforces the requirements of
// https://docs.aws.amazon.com/acm/latest/userguide/import-certificate-prerequisites.html and of the
// reference of ImportCertificate.
func parseImport(body, key, chain []byte) (*certificate, *problem) {
	invalid := func(format string, args ...any) (*certificate, *problem) {
		return nil, refuse("ValidationException", format, args...)
	}
	switch {
	case len(body) == 0 || len(body) > maxCertificate:
		return invalid("1 validation error detected: Value at 'certificate' failed to satisfy constraint: Member must have length from 1 to %d", maxCertificate)
	case len(key) == 0 || len(key) > maxKey:
		return invalid("1 validation error detected: Value at 'privateKey' failed to satisfy constraint: Member must have length from 1 to %d", maxKey)
	case len(chain) > maxChain:
		return invalid("1 validation error detected: Value at 'certificateChain' failed to satisfy constraint: Member must have length less than or equal to %d", maxChain)
	}
	leaves, err := parsePEM(body)
	if err != nil || len(leaves) != 1 {
		return invalid("The certificate field contains more than one certificate. You can specify only one certificate in this field: %d, %v", len(leaves), err)
	}
	leaf, now := leaves[0], time.Now()
	pair, err := tls.X509KeyPair(body, key)
	switch {
	case err != nil:
		return invalid("The private key is not supported, or does not match the certificate: %v", err)
	case keyAlgorithm(leaf) == "":
		return invalid("The key algorithm %T of the certificate is not supported", pair.PrivateKey)
	case now.Before(leaf.NotBefore) || now.After(leaf.NotAfter):
		return invalid("The certificate that you have provided is not currently valid")
	case len(leaf.DNSNames)+len(leaf.IPAddresses) == 0:
		return invalid("The certificate has neither a domain name nor an IP address")
	case len(leaf.RawIssuer) <= 2:
		return invalid("The Issuer field must not be empty")
	}
	if p := checkChain(leaf, chain); p != nil {
		return nil, p
	}
	return &certificate{leaf: leaf, body: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Raw})), chain: string(chain), key: string(key),
		kind: "IMPORTED", importedAt: now}, nil
}

func checkChain(leaf *x509.Certificate, chain []byte) *problem {
	if len(chain) == 0 {
		if pemutil.IsSelfSigned(leaf) {
			return nil
		}
		return refuse("ValidationException", "Provided certificate is not a valid self signed. Please provide either a valid self-signed certificate or certificate chain.")
	}
	above, err := parsePEM(chain)
	if err != nil {
		return refuse("ValidationException", "The certificate chain is not valid: %v", err)
	}
	child := leaf
	for _, parent := range above {
		if child.CheckSignatureFrom(parent) != nil {
			return refuse("ValidationException", "Could not validate the certificate with the certificate chain.")
		}
		child = parent
	}
	if fmt.Sprintf("%T", leaf.PublicKey) != fmt.Sprintf("%T", above[0].PublicKey) {
		return refuse("ValidationException", "The algorithm of the certificate is not that of the CA that signed it")
	}
	return nil
}

// parsePEM parses PEM that contains only certificates.
func parsePEM(data []byte) (all []*x509.Certificate, err error) {
	for len(bytes.TrimSpace(data)) > 0 {
		block, rest := pem.Decode(data)
		if block == nil || block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("it is not PEM of certificates")
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		all, data = append(all, c), rest
	}
	return all, nil
}

// keyAlgorithm returns ACM's name for a certificate's key algorithm, or "" if it is not supported.
func keyAlgorithm(c *x509.Certificate) string {
	switch public := c.PublicKey.(type) {
	case *rsa.PublicKey:
		name := fmt.Sprintf("RSA_%d", public.N.BitLen())
		if slices.Contains([]string{"RSA_1024", "RSA_2048", "RSA_3072", "RSA_4096"}, name) {
			return name
		}
	case *ecdsa.PublicKey:
		return map[string]string{"P-256": "EC_prime256v1", "P-384": "EC_secp384r1", "P-521": "EC_secp521r1"}[public.Curve.Params().Name]
	}
	return ""
}

// mayReplace enforces the rules of
// https://docs.aws.amazon.com/acm/latest/userguide/import-reimport.html, and the rule of the
// prerequisites that a key usage extension cannot be added.
func mayReplace(old, new *x509.Certificate) *problem {
	lost := old.KeyUsage &^ new.KeyUsage
	if _, isEC := old.PublicKey.(*ecdsa.PublicKey); isEC {
		lost &^= x509.KeyUsageKeyEncipherment // not valid for such keys (RFC 5480, section 3)
	}
	switch {
	case keyAlgorithm(old) != keyAlgorithm(new):
		return refuse("ValidationException", "The certificate you are importing has another key type or size than the existing one: %s, not %s", keyAlgorithm(new), keyAlgorithm(old))
	case lost != 0:
		return refuse("ValidationException", "The certificate you are importing lacks Key Usage values of the existing one")
	case old.KeyUsage == 0 && new.KeyUsage != 0, old.ExtKeyUsage == nil && new.ExtKeyUsage != nil:
		return refuse("ValidationException", "The certificate you are importing has a Key Usage or Extended Key Usage extension, and the existing one has none")
	}
	for _, usage := range old.ExtKeyUsage {
		// CAs are dropping it.
		if usage != x509.ExtKeyUsageClientAuth && !slices.Contains(new.ExtKeyUsage, usage) {
			return refuse("ValidationException", "The certificate you are importing lacks Extended Key Usage values of the existing one")
		}
	}
	return nil
}

func seconds(t time.Time) float64 { return float64(t.UnixMilli()) / 1000 }

func (c *Cloud) describeCertificate(k *key, body []byte) (any, *problem) {
	var request struct{ CertificateArn string }
	if p := decode(body, &request); p != nil {
		return nil, p
	}
	have, p := c.named(k, "acm:DescribeCertificate", request.CertificateArn)
	if p != nil {
		return nil, p
	}
	detail := c.summary(have)
	delete(detail, "SubjectAlternativeNameSummaries")
	detail["SubjectAlternativeNames"] = names(have.leaf)
	detail["Serial"] = serial(have.leaf)
	detail["Subject"], detail["Issuer"] = have.leaf.Subject.String(), have.leaf.Issuer.CommonName
	detail["SignatureAlgorithm"] = have.leaf.SignatureAlgorithm.String()
	detail["InUseBy"] = append([]string{}, have.usedBy...)
	return map[string]any{"Certificate": detail}, nil
}

func names(leaf *x509.Certificate) []string {
	all := slices.Clone(leaf.DNSNames)
	for _, ip := range leaf.IPAddresses {
		all = append(all, ip.String())
	}
	return all
}

// serial formats a serial number as pairs of digits separated by colons.
func serial(leaf *x509.Certificate) string {
	var pairs []string
	for _, b := range leaf.SerialNumber.Bytes() {
		pairs = append(pairs, fmt.Sprintf("%02x", b))
	}
	return strings.Join(pairs, ":")
}

// summary returns a certificate as it appears in lists.
func (c *Cloud) summary(have *certificate) map[string]any {
	status := "ISSUED"
	if time.Now().After(have.leaf.NotAfter) {
		status = "EXPIRED"
	}
	return map[string]any{
		"CertificateArn": have.arn, "DomainName": names(have.leaf)[0], "SubjectAlternativeNameSummaries": names(have.leaf),
		"Status": status, "Type": have.kind, "KeyAlgorithm": keyAlgorithm(have.leaf), "RenewalEligibility": "INELIGIBLE",
		"NotBefore": seconds(have.leaf.NotBefore), "NotAfter": seconds(have.leaf.NotAfter), "CreatedAt": seconds(have.created), "ImportedAt": seconds(have.importedAt),
	}
}

func (c *Cloud) getCertificate(k *key, body []byte) (any, *problem) {
	var request struct{ CertificateArn string }
	if p := decode(body, &request); p != nil {
		return nil, p
	}
	have, p := c.named(k, "acm:GetCertificate", request.CertificateArn)
	if p != nil {
		return nil, p
	}
	if have.missing > 0 {
		have.missing--
		return nil, refuse("ResourceNotFoundException", "Could not find certificate %s.", have.arn)
	}
	got := map[string]string{"Certificate": have.body}
	if have.chain != "" {
		got["CertificateChain"] = have.chain
	}
	return got, nil
}

func (c *Cloud) listCertificates(k *key, body []byte) (any, *problem) {
	var request struct {
		CertificateStatuses []string
		Includes            struct {
			KeyTypes         []string `json:"keyTypes"`
			KeyUsage         []string `json:"keyUsage"`
			ExtendedKeyUsage []string `json:"extendedKeyUsage"`
		}
		NextToken         *string
		MaxItems          *int
		SortBy, SortOrder string
	}
	if p := decode(body, &request); p != nil {
		return nil, p
	}
	if p := c.allow(k, "acm:ListCertificates", "*"); p != nil {
		return nil, p
	}
	size := c.PageSize
	if request.MaxItems != nil {
		if *request.MaxItems < 1 || *request.MaxItems > 1000 {
			return nil, refuse("ValidationException", "MaxItems is from 1 to 1000")
		}
		size = min(size, *request.MaxItems)
	}
	// The reference says: "Default filtering returns only RSA_2048 certificates".
	types := request.Includes.KeyTypes
	if types == nil {
		types = []string{"RSA_2048"}
	}
	known := []string{"RSA_1024", "RSA_2048", "RSA_3072", "RSA_4096", "EC_prime256v1", "EC_secp384r1", "EC_secp521r1"}
	for _, name := range types {
		if !slices.Contains(known, name) {
			return nil, refuse("ValidationException", "%s is not a key type", name)
		}
	}
	filter := strings.Join(slices.Sorted(slices.Values(types)), ",")
	after := ""
	if request.NextToken != nil {
		of, arn, ok := strings.Cut(*request.NextToken, " ")
		if !ok || of != filter {
			return nil, refuse("ValidationException", "The NextToken is not one of this list")
		}
		after = arn
	}
	passed := after == ""
	page := []map[string]any{}
	last := ""
	for _, have := range c.certificates {
		switch {
		case !passed:
			passed = have.arn == after
		case !slices.Contains(types, keyAlgorithm(have.leaf)):
		case have.missing > 0:
			have.missing--
		case len(page) == size:
			return map[string]any{"CertificateSummaryList": page, "NextToken": filter + " " + last}, nil
		default:
			page, last = append(page, c.summary(have)), have.arn
		}
	}
	return map[string]any{"CertificateSummaryList": page}, nil
}

func (c *Cloud) listTags(k *key, body []byte) (any, *problem) {
	var request struct{ CertificateArn string }
	if p := decode(body, &request); p != nil {
		return nil, p
	}
	have, p := c.named(k, "acm:ListTagsForCertificate", request.CertificateArn)
	if p != nil {
		return nil, p
	}
	return map[string]any{"Tags": append([]Tag{}, have.tags...)}, nil
}

func (c *Cloud) addTags(k *key, body []byte) (any, *problem) {
	var request struct {
		CertificateArn string
		Tags           []Tag
	}
	if p := decode(body, &request); p != nil {
		return nil, p
	}
	have, p := c.named(k, "acm:AddTagsToCertificate", request.CertificateArn)
	switch {
	case p != nil:
		return nil, p
	case len(request.Tags) == 0:
		return nil, refuse("ValidationException", "missing tags")
	}
	if p := checkTags(have.tags, request.Tags); p != nil {
		return nil, p
	}
	for _, tag := range request.Tags {
		have.tags = append(slices.DeleteFunc(have.tags, func(t Tag) bool { return t.Key == tag.Key }), tag)
	}
	return nil, nil
}

var tagForm = regexp.MustCompile(`^[\p{L}\p{Z}\p{N}_.:/=+\-@]*$`)

// checkTags checks tags that are added to existing ones.
func checkTags(have, tags []Tag) *problem {
	all := make(map[string]bool)
	for _, tag := range have {
		all[tag.Key] = true
	}
	seen := make(map[string]bool)
	for _, tag := range tags {
		switch {
		case tag.Key == "" || utf8.RuneCountInString(tag.Key) > 128 || utf8.RuneCountInString(tag.Value) > 256,
			!tagForm.MatchString(tag.Key), !tagForm.MatchString(tag.Value):
			return refuse("InvalidTagException", "The tag %q is not valid", cmp.Or(tag.Key, tag.Value))
		case strings.HasPrefix(strings.ToLower(tag.Key), "aws:"):
			return refuse("InvalidTagException", "Tag keys that begin with aws: are reserved")
		case seen[tag.Key]:
			return refuse("InvalidTagException", "The tag key %q is there twice", tag.Key)
		}
		seen[tag.Key], all[tag.Key] = true, true
	}
	if len(all) > 50 {
		return refuse("TooManyTagsException", "A certificate has at most 50 tags, not %d", len(all))
	}
	return nil
}

func (c *Cloud) deleteCertificate(k *key, body []byte) (any, *problem) {
	var request struct{ CertificateArn string }
	if p := decode(body, &request); p != nil {
		return nil, p
	}
	have, p := c.named(k, "acm:DeleteCertificate", request.CertificateArn)
	switch {
	case p != nil:
		return nil, p
	case len(have.usedBy) > 0:
		return nil, refuse("ResourceInUseException", "Certificate %s in account %s is in use.", have.arn, Account)
	}
	c.certificates = slices.DeleteFunc(c.certificates, func(one *certificate) bool { return one == have })
	return nil, nil
}
