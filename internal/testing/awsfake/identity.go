package awsfake

import (
	"bytes"
	"cmp"
	"encoding/xml"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"certctl-agent/internal/secret"
)

// key is a valid access key.
type key struct {
	arn     string // of its owner
	secret  secret.String
	token   string    // "" for a user's permanent key
	expires time.Time // zero for never
}

// role is a role that can be assumed.
type role struct {
	arn        string
	externalID string   // "" if not required
	trusted    []string // ARNs of users and roles that may assume it with AssumeRole
}

// AddUser creates a user with a permanent access key.
func (c *Cloud) AddUser(name string) (id, secretKey string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k := c.newKey("arn:"+c.partition()+":iam::"+Account+":user/"+name, false)
	return k.AccessKeyID, k.SecretAccessKey
}

// UserARN returns the ARN of a user.
func (c *Cloud) UserARN(name string) string {
	return "arn:" + c.partition() + ":iam::" + Account + ":user/" + name
}

// RoleARN returns the ARN of a role.
func (c *Cloud) RoleARN(name string) string {
	return "arn:" + c.partition() + ":iam::" + Account + ":role/" + name
}

// AddRole creates a role that the trusted users and roles may assume, with the external id if that
// is not "".
func (c *Cloud) AddRole(name, externalID string, trusted ...string) (arn string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	arn = c.RoleARN(name)
	c.roles[arn] = &role{arn, externalID, trusted}
	return arn
}

// AllowToken lets the bearer of a web identity token assume a role.
func (c *Cloud) AllowToken(token, roleARN string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.webTokens[token] = roleARN
	c.issued = append(c.issued, token)
}

// Expire makes all temporary credentials expire.
func (c *Cloud) Expire() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, k := range c.keys {
		if k.token != "" {
			k.expires = time.Now()
		}
	}
}

// Secrets returns all secret keys and tokens issued so far.
func (c *Cloud) Secrets() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.issued)
}

// issue is an issued key.
type issue struct {
	AccessKeyID     string `json:"AccessKeyId" xml:"AccessKeyId"`
	SecretAccessKey string
	Token           string `json:",omitempty" xml:"SessionToken"`
	Expiration      string `json:",omitempty"`
}

func (c *Cloud) newKey(arn string, temporary bool) issue {
	made := issue{AccessKeyID: "AKIA" + strings.ToUpper(randomText()[:16]), SecretAccessKey: "sk/" + randomText() + "+"}
	k := &key{arn: arn, secret: secret.New(made.SecretAccessKey)}
	if c.issued = append(c.issued, made.SecretAccessKey); temporary {
		made.AccessKeyID = "ASIA" + made.AccessKeyID[4:]
		made.Token = "IQoJ//" + randomText() + randomText() + "=="
		k.token, k.expires = made.Token, time.Now().Add(c.Lifetime)
		made.Expiration = k.expires.UTC().Format(time.RFC3339)
		c.issued = append(c.issued, made.Token)
	}
	c.keys[made.AccessKeyID] = k
	return made
}

// newSession issues a key for a session of a role.
func (c *Cloud) newSession(roleARN, session string) (issue, string) {
	_, name, _ := strings.Cut(roleARN, ":role/")
	arn := "arn:" + c.partition() + ":sts::" + Account + ":assumed-role/" + name + "/" + session
	return c.newKey(arn, true), arn
}

var (
	roleARNForm     = regexp.MustCompile(`^arn:[\w+=/,.@-]+:iam::[0-9]{12}:role/[\w+=/,.@-]+$`)
	sessionNameForm = regexp.MustCompile(`^[\w+=,.@-]{2,64}$`)
)

// sts implements AssumeRole (https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html) and
// AssumeRoleWithWebIdentity.
func (c *Cloud) sts(r *http.Request, body []byte) (speaks protocol, operation string, call func() ([]byte, *problem)) {
	speaks = protocol{"text/xml", stsProblem}
	form, err := url.ParseQuery(string(body))
	operation = form.Get("Action")
	fail := func(p *problem) func() ([]byte, *problem) { return func() ([]byte, *problem) { return nil, p } }
	switch {
	case err != nil || !strings.HasPrefix(r.Header.Get("Content-Type"), "application/x-www-form-urlencoded"):
		return speaks, cmp.Or(operation, "unreadable"), fail(refuse("MalformedInput", "expected a form"))
	case form.Get("Version") != "2011-06-15":
		return speaks, operation, fail(refuse("InvalidAction", "Could not find operation %s for version %s", operation, form.Get("Version")))
	case operation == "AssumeRole":
		return speaks, operation, func() ([]byte, *problem) {
			k, p := c.caller(r, body, "sts")
			if p != nil {
				// https://docs.aws.amazon.com/STS/latest/APIReference/CommonErrors.html
				p.status, p.code = http.StatusForbidden, map[string]string{
					"UnrecognizedClientException": "InvalidClientTokenId", "InvalidSignatureException": "SignatureDoesNotMatch",
					"ExpiredTokenException": "ExpiredToken", "IncompleteSignatureException": "IncompleteSignature",
				}[p.code]
				return nil, p
			}
			return c.assume(form, "AssumeRole", func(wanted *role) bool {
				trusted := wanted != nil && slices.ContainsFunc(wanted.trusted, func(arn string) bool { return arn == k.arn || isSessionOf(k.arn, arn) })
				return trusted && c.allow(k, "sts:AssumeRole", wanted.arn) == nil && (wanted.externalID == "" || wanted.externalID == form.Get("ExternalId"))
			}, k.arn)
		}
	case operation == "AssumeRoleWithWebIdentity":
		return speaks, operation, func() ([]byte, *problem) {
			if _, known := c.webTokens[form.Get("WebIdentityToken")]; !known {
				return nil, refuse("InvalidIdentityToken", "No OpenIDConnect provider found in your account for this token")
			}
			return c.assume(form, "AssumeRoleWithWebIdentity", func(wanted *role) bool {
				return c.webTokens[form.Get("WebIdentityToken")] == form.Get("RoleArn")
			}, "the bearer")
		}
	}
	return speaks, cmp.Or(operation, "unknown"), fail(refuse("InvalidAction", "Could not find operation %s", operation))
}

// isSessionOf reports whether an ARN is that of a session of a role.
func isSessionOf(session, roleARN string) bool {
	_, name, ok := strings.Cut(roleARN, ":role/")
	return ok && strings.Contains(session, ":assumed-role/"+name+"/")
}

func (c *Cloud) assume(form url.Values, operation string, trusted func(*role) bool, who string) ([]byte, *problem) {
	arn, session := form.Get("RoleArn"), form.Get("RoleSessionName")
	seconds, err := strconv.Atoi(cmp.Or(form.Get("DurationSeconds"), "3600"))
	switch {
	case !roleARNForm.MatchString(arn):
		return nil, refuse("ValidationError", "%s is invalid", arn)
	case !sessionNameForm.MatchString(session):
		return nil, refuse("ValidationError", "1 validation error detected: Value '%s' at 'roleSessionName' failed to satisfy constraint", session)
	case err != nil || seconds < 900 || seconds > 43200:
		return nil, refuse("ValidationError", "DurationSeconds %s is out of range", form.Get("DurationSeconds"))
	case !trusted(c.roles[arn]):
		return nil, &problem{http.StatusForbidden, "AccessDenied", "User: " + who + " is not authorized to perform: sts:" + operation + " on resource: " + arn}
	}
	issued, sessionARN := c.newSession(arn, session)
	answer, err := xml.Marshal(stsAnswer{
		XMLName: xml.Name{Space: "https://sts.amazonaws.com/doc/2011-06-15/", Local: operation + "Response"},
		Result: stsResult{
			XMLName: xml.Name{Local: operation + "Result"}, Credentials: issued,
			User: stsUser{ARN: sessionARN, ID: "AROAEXAMPLE:" + session},
		},
		RequestID: uuid(),
	})
	if err != nil {
		panic(err) // impossible: it contains only strings
	}
	return answer, nil
}

type stsAnswer struct {
	XMLName   xml.Name
	Result    stsResult
	RequestID string `xml:"ResponseMetadata>RequestId"`
}

type stsResult struct {
	XMLName     xml.Name
	Credentials issue
	User        stsUser `xml:"AssumedRoleUser"`
}

type stsUser struct {
	ARN string `xml:"Arn"`
	ID  string `xml:"AssumedRoleId"`
}

func stsProblem(p *problem) []byte {
	var message bytes.Buffer
	_ = xml.EscapeText(&message, []byte(p.message))
	return []byte(`<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type><Code>` + p.code +
		`</Code><Message>` + message.String() + `</Message></Error><RequestId>` + uuid() + `</RequestId></ErrorResponse>`)
}
