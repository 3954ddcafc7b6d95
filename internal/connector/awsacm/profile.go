package awsacm

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"certctl-agent/internal/hostfile"
	"certctl-agent/internal/trustedfile"
)

// A profile is a section of the shared configuration files
// (https://docs.aws.amazon.com/sdkref/latest/guide/file-format.html).
type profile struct {
	values map[string]string
	open   map[string]string // warnings for keys from a file that other users can read
}

// sharedFiles returns the paths of both shared files, or "" if HOME is not set.
func (s *source) sharedFiles() (config, credentials string) {
	config, credentials = s.getenv("AWS_CONFIG_FILE"), s.getenv("AWS_SHARED_CREDENTIALS_FILE")
	if home := s.getenv("HOME"); home != "" {
		config = cmp.Or(config, filepath.Join(home, ".aws/config"))
		credentials = cmp.Or(credentials, filepath.Join(home, ".aws/credentials"))
	}
	return config, credentials
}

// files names the shared files, for errors.
func (s *source) files() string {
	config, credentials := s.sharedFiles()
	if config == "" && credentials == "" {
		return "shared files (HOME is not set)"
	}
	return strings.TrimPrefix(config+" and "+credentials, " and ")
}

// readProfiles reads both files. The credentials file overrides the config file.
func (s *source) readProfiles() (map[string]*profile, error) {
	all := make(map[string]*profile)
	config, credentials := s.sharedFiles()
	for _, file := range []string{config, credentials} {
		if file == "" {
			continue
		}
		data, _, warning, err := trustedfile.Read(file, maxFile)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		sections, err := parseSections(string(data))
		if err != nil {
			return nil, fmt.Errorf("%s, %w", file, err)
		}
		for section, values := range sections {
			name, isProfile := strings.CutPrefix(section, "profile ")
			name = strings.TrimSpace(name)
			if file == config && !isProfile && name != "default" {
				continue // an sso-session or services section
			}
			p := all[name]
			if p == nil {
				p = &profile{make(map[string]string), make(map[string]string)}
				all[name] = p
			}
			for key, value := range values {
				if p.values[key] = value; warning != "" {
					p.open[key] = warning
				} else {
					delete(p.open, key)
				}
			}
		}
	}
	return all, nil
}

// parseSections parses an INI file. It skips indented lines: they belong to nested keys, which are
// not needed.
func parseSections(text string) (map[string]map[string]string, error) {
	all := make(map[string]map[string]string)
	var current map[string]string
	n := 0
	for line := range strings.Lines(strings.TrimPrefix(text, hostfile.ByteOrderMark)) {
		n++
		trimmed := strings.TrimSpace(line)
		switch {
		case trimmed == "", trimmed[0] == '#', trimmed[0] == ';', line[0] == ' ', line[0] == '\t':
		case trimmed[0] == '[':
			name, rest, ok := strings.Cut(trimmed[1:], "]")
			if rest = strings.TrimSpace(rest); !ok || rest != "" && rest[0] != '#' && rest[0] != ';' {
				return nil, fmt.Errorf("line %d: expected [profile name]", n)
			}
			name = strings.Join(strings.Fields(name), " ")
			if all[name] == nil {
				all[name] = make(map[string]string)
			}
			current = all[name]
		default:
			key, value, ok := strings.Cut(trimmed, "=")
			if !ok || current == nil {
				return nil, fmt.Errorf("line %d: expected key = value below [profile name]", n)
			}
			current[strings.ToLower(strings.TrimSpace(key))] = strings.TrimSpace(value)
		}
	}
	return all, nil
}

// maxProfiles bounds a chain of source_profile settings.
const maxProfiles = 5

// fromProfile returns the credentials of a profile, or nil if it has none or does not exist. Below
// are the profiles that refer to it.
func (s *source) fromProfile(ctx context.Context, all map[string]*profile, name string, below []string) (*issued, error) {
	p := all[name]
	if p == nil && len(below) == 0 {
		return nil, nil
	}
	from := fmt.Sprintf("the profile %.100q", name)
	fail := func(format string, args ...any) (*issued, error) {
		return nil, fmt.Errorf("%s: "+format, append([]any{from}, args...)...)
	}
	if p == nil {
		return fail("it is not in %s, but the profile %.100q refers to it", s.files(), below[len(below)-1])
	}
	v := p.values
	isSSO := slices.ContainsFunc(slices.Collect(maps.Keys(v)), func(key string) bool { return strings.HasPrefix(key, "sso_") || key == "login_session" })
	loops := slices.Contains(below, name) || len(below) >= maxProfiles
	switch {
	case v["mfa_serial"] != "":
		return fail("it requires a code (mfa_serial), which the agent cannot enter")
	case v["role_arn"] != "" && v["source_profile"] == name && v["aws_access_key_id"] != "":
		return s.fromRole(ctx, v, from, func() (*issued, error) { return p.keys(from) })
	case v["role_arn"] != "" && v["source_profile"] != "" && !loops:
		return s.fromRole(ctx, v, from, func() (*issued, error) {
			base, err := s.fromProfile(ctx, all, v["source_profile"], append(below, name))
			if base == nil && err == nil {
				err = fmt.Errorf("the profile %.100q has no credentials", v["source_profile"])
			}
			return base, err
		})
	case loops && v["source_profile"] != "":
		return fail("its source_profile settings form a loop or a chain that is too long")
	case v["role_arn"] != "" && v["credential_source"] != "":
		return s.fromRole(ctx, v, from, func() (*issued, error) { return s.named(ctx, v["credential_source"]) })
	case v["role_arn"] != "" && v["web_identity_token_file"] != "":
		return s.assumeWithToken(ctx, v["web_identity_token_file"], v["role_arn"], v["role_session_name"])
	case v["aws_access_key_id"] != "" || v["aws_secret_access_key"] != "":
		return p.keys(from)
	case isSSO:
		return fail("it uses SSO, which requires a browser: give the agent a role (of the instance or container), a credential_process or an access key")
	case v["credential_process"] != "":
		return s.fromProcess(ctx, v["credential_process"], from)
	case v["role_arn"] != "":
		return fail("role_arn needs source_profile, credential_source or web_identity_token_file")
	}
	return nil, nil
}

// keys returns the access key in the profile itself.
func (p *profile) keys(from string) (*issued, error) {
	if open := p.open["aws_secret_access_key"]; open != "" {
		return nil, errors.New(open)
	}
	return newIssued(from, p.values["aws_access_key_id"], p.values["aws_secret_access_key"], p.values["aws_session_token"], "")
}

func (s *source) fromRole(ctx context.Context, v map[string]string, from string, base func() (*issued, error)) (*issued, error) {
	if !roleForm().MatchString(v["role_arn"]) {
		return nil, fmt.Errorf("%s: role_arn is not the ARN of a role", from)
	}
	got, err := base()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", from, err)
	}
	return s.assumeRole(ctx, got, v["role_arn"], v["external_id"], v["role_session_name"])
}

// named returns the credentials of a credential_source.
func (s *source) named(ctx context.Context, name string) (got *issued, err error) {
	switch name {
	case "Environment":
		got, err = s.fromEnvironment()
	case "EcsContainer":
		got, err = s.fromContainer(ctx)
	case "Ec2InstanceMetadata":
		got, err = s.fromInstance(ctx)
	default:
		return nil, fmt.Errorf("credential_source is %.100q: expected Environment, EcsContainer or Ec2InstanceMetadata", name)
	}
	if got == nil && err == nil {
		err = fmt.Errorf("credential_source is %s, but it has no credentials", name)
	}
	return got, err
}

// fromProcess runs a profile's command. Errors must not contain its output, which holds credentials
// (https://docs.aws.amazon.com/sdkref/latest/guide/feature-process-credentials.html).
func (s *source) fromProcess(ctx context.Context, line, from string) (*issued, error) {
	from = "credential_process of " + from
	if s.host.Query == nil {
		return nil, fmt.Errorf("%s: commands cannot run here", from)
	}
	command, err := s.host.Policy.Command(line, time.Duration(s.target.Common.CommandTimeout))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", from, err)
	}
	out, err := s.host.Query(ctx, command)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", from, err)
	}
	var got credentialDocument
	if json.Unmarshal(out, &got) != nil || got.Version != 1 {
		return nil, fmt.Errorf("%s: the command did not print credentials, version 1", from)
	}
	return newIssued(from, got.AccessKeyID, got.SecretAccessKey, got.SessionToken, got.Expiration)
}
