package deploy_test

import (
	"encoding/xml"
	"io"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"certctl-agent/internal/testing/needs"
)

const plist = "launchd/net.certctl.agent.plist"

func TestPlistIsValid(t *testing.T) {
	plistutil := needs.Need(t, "plistutil")
	binary := filepath.Join(t.TempDir(), "plist")
	// Convert there and back: only the output shows what plistutil cannot read.
	output(t, plistutil, "-i", plist, "-f", "bin", "-o", binary)
	back := output(t, plistutil, "-i", binary, "-f", "xml")
	if got, want := parsePlist(t, back), parsePlist(t, readFile(t, plist)); !reflect.DeepEqual(got, want) {
		t.Errorf("plistutil reads %v, want %v", got, want)
	}
}

func TestPlist(t *testing.T) {
	got := parsePlist(t, readFile(t, plist))
	for key, want := range map[string]any{
		"Label":             "net.certctl.agent",
		"ProgramArguments":  []any{"/usr/local/bin/certctl-agent", "-config", "/etc/certctl/agent.env"},
		"RunAtLoad":         true,
		"KeepAlive":         map[string]any{"SuccessfulExit": false},
		"ThrottleInterval":  "15",
		"ExitTimeOut":       "90",
		"Umask":             "63",
		"StandardOutPath":   "/var/log/certctl-agent.log",
		"StandardErrorPath": "/var/log/certctl-agent.log",
	} {
		if !reflect.DeepEqual(got[key], want) {
			t.Errorf("%s is %v, want %v", key, got[key], want)
		}
	}
}

// parsePlist returns the dictionary of a property list, integers as strings.
func parsePlist(t *testing.T, text string) map[string]any {
	t.Helper()
	decoder := xml.NewDecoder(strings.NewReader(text))
	for {
		token, err := decoder.Token()
		if err == io.EOF {
			t.Fatal("no dictionary in the property list")
		}
		if err != nil {
			t.Fatal(err)
		}
		if start, ok := token.(xml.StartElement); ok && start.Name.Local == "dict" {
			value, err := plistValue(decoder, start)
			if err != nil {
				t.Fatal(err)
			}
			return value.(map[string]any)
		}
	}
}

func plistValue(decoder *xml.Decoder, start xml.StartElement) (any, error) {
	switch start.Name.Local {
	case "dict", "array":
	default:
		var text string
		err := decoder.DecodeElement(&text, &start)
		switch start.Name.Local {
		case "true", "false":
			return start.Name.Local == "true", err
		}
		return text, err
	}
	dict, list, key := map[string]any{}, []any{}, ""
	for {
		token, err := decoder.Token()
		if err != nil {
			return nil, err
		}
		switch token := token.(type) {
		case xml.EndElement:
			if start.Name.Local == "dict" {
				return dict, nil
			}
			return list, nil
		case xml.StartElement:
			value, err := plistValue(decoder, token)
			if err != nil {
				return nil, err
			}
			if token.Name.Local == "key" {
				key = value.(string)
			} else if start.Name.Local == "dict" {
				dict[key] = value
			} else {
				list = append(list, value)
			}
		}
	}
}

func TestDarwinBuilds(t *testing.T) {
	needs.Long(t, "it builds for another platform")
	t.Parallel()
	binary := filepath.Join(t.TempDir(), "certctl-agent")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", binary, "../cmd/certctl-agent")
	cmd.Env = append(cmd.Environ(), "GOOS=darwin", "GOARCH=arm64", "CGO_ENABLED=0")
	if out, err := tryOutput(cmd); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}
