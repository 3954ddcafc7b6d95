package targetconf

import (
	"strings"
	"testing"
	"time"
)

func TestMode(t *testing.T) {
	tests := []struct {
		json string
		want Mode
		says string // part of the error
	}{
		{`416`, 0o640, ""}, {`"0640"`, 0o640, ""}, {`"640"`, 0o640, ""}, {`"0o640"`, 0o640, ""}, {`384`, 0o600, ""},
		{`420`, 0o644, ""}, {`493`, 0o755, ""}, {`256`, 0o400, ""}, {`0`, 0, ""}, {`"0"`, 0, ""}, {`""`, 0, ""}, {`"0000"`, 0, ""},
		{`640`, 0, `"0640" was probably meant (416 as a number)`},
		{`600`, 0, `"0600"`}, {`644`, 0, `"0644"`}, {`400`, 0, `"0400"`}, {`440`, 0, `"0440"`}, {`444`, 0, `"0444"`}, {`755`, 0, `"0755"`},
		{`2541`, 0, "plausible"}, // 04755
		{`"4755"`, 0, "plausible"},
		{`"1777"`, 0, "plausible"},
		{`"416"`, 0, `"0640" (or the number 416)`}, {`"420"`, 0, `"0644"`}, {`"384"`, 0, `"0600"`},
		{`"rw"`, 0, "octal"}, {`6.4`, 0, "octal"}, {`-1`, 0, "octal"}, {`true`, 0, "octal"}, {`{}`, 0, "an object"}, {`[]`, 0, "a list"},
	}
	for _, test := range tests {
		var got Mode
		err := got.UnmarshalJSON([]byte(test.json))
		if test.says == "" && (err != nil || got != test.want) {
			t.Errorf("%s: got %#o, %v, want %#o", test.json, got, err, test.want)
		}
		if test.says != "" && (err == nil || !strings.Contains(err.Error(), test.says)) {
			t.Errorf("%s: got %#o, %v, want an error with %q", test.json, got, err, test.says)
		}
	}
}

func TestDuration(t *testing.T) {
	tests := []struct {
		json string
		want time.Duration
		says string
	}{
		{`10000000000`, 10 * time.Second, ""}, {`"10s"`, 10 * time.Second, ""}, {`"1m30s"`, 90 * time.Second, ""}, {`"1000000"`, time.Millisecond, ""},
		{`0`, 0, ""}, {`""`, 0, ""}, {`"0s"`, 0, ""},
		{`10`, 0, `"10s" was probably meant`}, {`"30"`, 0, `"30s"`}, {`999999`, 0, "next to nothing"},
		{`-5000000000`, 0, "0 to 1h"}, {`"2h"`, 0, "0 to 1h"}, {`"soon"`, 0, "expected a duration"}, {`true`, 0, "expected a duration"}, {`{}`, 0, "an object"},
	}
	for _, test := range tests {
		var got Duration
		err := got.UnmarshalJSON([]byte(test.json))
		if test.says == "" && (err != nil || time.Duration(got) != test.want) {
			t.Errorf("%s: got %v, %v, want %v", test.json, time.Duration(got), err, test.want)
		}
		if test.says != "" && (err == nil || !strings.Contains(err.Error(), test.says)) {
			t.Errorf("%s: got %v, %v, want an error with %q", test.json, time.Duration(got), err, test.says)
		}
	}
}

func TestSeconds(t *testing.T) {
	tests := []struct {
		json string
		want time.Duration
		says string
	}{
		{`45`, 45 * time.Second, ""}, {`"45"`, 45 * time.Second, ""}, {`"2m"`, 2 * time.Minute, ""}, {`"1500ms"`, 1500 * time.Millisecond, ""}, {`3600`, time.Hour, ""},
		{`0`, 0, ""}, {`""`, 0, ""},
		{`3601`, 0, "at most 1h"}, {`"2h"`, 0, "at most 1h"}, {`30000000000`, 0, "at most 1h"}, {`99999999999999999999`, 0, "whole number"},
		{`-1`, 0, "whole number"}, {`1.5`, 0, "whole number"}, {`"soon"`, 0, "whole number"}, {`true`, 0, "whole number"}, {`{}`, 0, "an object"}, {`[30]`, 0, "a list"},
	}
	for _, test := range tests {
		var got Seconds
		err := got.UnmarshalJSON([]byte(test.json))
		if test.says == "" && (err != nil || time.Duration(got) != test.want) {
			t.Errorf("%s: got %v, %v, want %v", test.json, time.Duration(got), err, test.want)
		}
		if test.says != "" && (err == nil || !strings.Contains(err.Error(), test.says)) {
			t.Errorf("%s: got %v, %v, want an error with %q", test.json, time.Duration(got), err, test.says)
		}
	}
}

func TestParseStrings(t *testing.T) {
	for text, want := range map[string]int{`{"a":"b","c":""}`: 2, `"{\"a\": \"b\"}"`: 1, `{}`: 0, `""`: 0, `" "`: 0, `null`: 0} {
		if got, err := ParseStrings([]byte(text)); err != nil || len(got) != want {
			t.Errorf("%s: got %v, %v", text, got, err)
		}
	}
	for _, text := range []string{`{"a":1}`, `"a=b"`, `["a"]`, `1`, `"\"a\""`} {
		if got, err := ParseStrings([]byte(text)); err == nil {
			t.Errorf("%s: got %v and no error", text, got)
		}
	}
}

func TestBool(t *testing.T) {
	for text, want := range map[string]bool{`true`: true, `"on"`: true, `1`: true, `"YES"`: true, `"T"`: true, `false`: false, `""`: false, `0`: false, `"off"`: false, `"No"`: false} {
		if got, err := parseBool([]byte(text)); err != nil || got != want {
			t.Errorf("%s: got %v, %v", text, got, err)
		}
	}
	for _, text := range []string{`2`, `"x"`, `{}`, `[true]`} {
		if got, err := parseBool([]byte(text)); err == nil {
			t.Errorf("%s: got %v and no error", text, got)
		}
	}
}

func TestFileName(t *testing.T) {
	for _, name := range []string{`"cert.pem"`, `""`, `"a b"`} {
		if err := new(FileName).UnmarshalJSON([]byte(name)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{`".hidden"`, `".."`, `"a/b"`, `"a\\b"`, `"a\u0000"`, `5`, `"` + strings.Repeat("x", 300) + `"`} {
		if err := new(FileName).UnmarshalJSON([]byte(name)); err == nil {
			t.Errorf("%s: got no error", name)
		}
	}
}
