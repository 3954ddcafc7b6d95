package awsacm

import (
	"cmp"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"certctl-agent/internal/sigv4"
	"certctl-agent/internal/vendorapi"
)

// assumeRole exchanges credentials for those of a role
// (https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html).
func (s *source) assumeRole(ctx context.Context, base *issued, role, externalID, session string) (*issued, error) {
	form := url.Values{"Action": {"AssumeRole"}, "RoleArn": {role}, "RoleSessionName": {cmp.Or(session, managedBy)}}
	if externalID != "" {
		form.Set("ExternalId", externalID)
	}
	got, err := s.assume(ctx, form, base)
	if err == nil {
		return got, nil
	}
	hint := hintAbout(err, base.from)
	if codeOf(err) == "AccessDenied" {
		hint = "the role must trust them, they need the permission sts:AssumeRole, and external_id must be the one that the role requires"
	}
	if hint != "" {
		hint = ": " + hint
	}
	return nil, fmt.Errorf("AssumeRole of %s with the credentials of %s: %w%s", role, base.from, err, hint)
}

// assumeWithToken exchanges a token of an identity provider, such as a Kubernetes cluster, for
// credentials of a role
// (https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRoleWithWebIdentity.html).
func (s *source) assumeWithToken(ctx context.Context, file, role, session string) (*issued, error) {
	if !roleForm().MatchString(role) {
		return nil, errors.New("a web identity token needs the ARN of a role (AWS_ROLE_ARN, or role_arn of the profile)")
	}
	token, err := readToken(file)
	if err != nil {
		return nil, fmt.Errorf("web identity token: %w", err)
	}
	form := url.Values{"Action": {"AssumeRoleWithWebIdentity"}, "RoleArn": {role}, "RoleSessionName": {cmp.Or(session, managedBy)}, "WebIdentityToken": {token}}
	got, err := s.assume(ctx, form, nil)
	if err != nil {
		return nil, fmt.Errorf("AssumeRoleWithWebIdentity of %s with the token in %s: %w", role, file, err)
	}
	return got, nil
}

// assume calls STS, signed with base unless base is nil. The call may be repeated, since unused
// credentials expire.
func (s *source) assume(ctx context.Context, form url.Values, base *issued) (*issued, error) {
	form.Set("Version", "2011-06-15")
	body := []byte(form.Encode())
	header := http.Header{"Content-Type": {"application/x-www-form-urlencoded; charset=utf-8"}, "User-Agent": {managedBy}}
	request := &vendorapi.Request{Method: http.MethodPost, URL: s.stsURL, Header: header, Body: body, Reads: true, MaxAnswer: maxMetadata}
	if base != nil {
		signed, err := http.NewRequest(request.Method, request.URL, nil)
		if err != nil {
			return nil, err
		}
		signed.Header = header
		sigv4.Sign(signed, body, base.Credentials, sigv4.Scope{Region: s.region, Service: "sts"}, time.Now())
	}
	answer, err := s.sts.Do(ctx, request)
	if err != nil {
		return nil, err
	}
	type credentials struct {
		AccessKeyID     string `xml:"AccessKeyId"`
		SecretAccessKey string
		SessionToken    string
		Expiration      string
	}
	var read struct {
		Role     credentials `xml:"AssumeRoleResult>Credentials"`
		Identity credentials `xml:"AssumeRoleWithWebIdentityResult>Credentials"`
	}
	if xml.Unmarshal(answer.Body, &read) != nil {
		return nil, errors.New("the answer is not from STS")
	}
	got := cmp.Or(read.Role, read.Identity)
	return newIssued("the role "+form.Get("RoleArn"), got.AccessKeyID, got.SecretAccessKey, got.SessionToken, got.Expiration)
}
