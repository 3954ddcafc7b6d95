package targetconf

import (
	"encoding/json"
	"strings"
	"testing"
)

type embedded struct {
	Inner string `json:"inner" config:"required"`
}

// TestEmbeddedFields: connectors of one family share a struct of settings.
func TestEmbeddedFields(t *testing.T) {
	for config, wantError := range map[string]bool{`{"inner":"x","port":""}`: false, `{}`: true} {
		c, err := Merge(json.RawMessage(config), "NGINX", nil, "t-1", Overlays{})
		if err != nil {
			t.Fatal(err)
		}
		got := struct {
			embedded
			Port int `json:"port"`
		}{Port: 7}
		err = c.Decode(&got)
		if wantError {
			if err == nil || !strings.Contains(err.Error(), "inner") {
				t.Errorf("%s: got %v, want that inner is required", config, err)
			}
			continue
		}
		if err != nil || got.Inner != "x" || got.Port != 0 {
			t.Errorf("%s: got %+v, %v", config, got, err)
		}
		if unknown := c.Unknown(); len(unknown) > 0 {
			t.Errorf("%s: unknown keys %q", config, unknown)
		}
	}
}

func TestAccount(t *testing.T) {
	for raw, want := range map[string]string{
		`"www-data"`: "www-data", `33`: "33", `"33"`: "33", `""`: "", `2147483647`: "2147483647",
		`"` + strings.Repeat("x", 256) + `"`: strings.Repeat("x", 256),
	} {
		var got Account
		if err := json.Unmarshal([]byte(raw), &got); err != nil || string(got) != want {
			t.Errorf("%.20s: got %.20q, %v", raw, got, err)
		}
	}
	for _, raw := range []string{`-1`, `2147483648`, `1.5`, `true`, `[]`, `"a:b"`, `"a/b"`, `"a b"`, `"a\u001b"`, `"` + strings.Repeat("x", 257) + `"`} {
		var got Account
		if err := json.Unmarshal([]byte(raw), &got); err == nil || got != "" {
			t.Errorf("%.20s: got %.20q and no error", raw, got)
		}
	}
}
