package secret_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"certctl-agent/internal/secret"
)

func TestNeverPrinted(t *testing.T) {
	s := secret.New("hunter2-hunter2")
	holder := struct {
		Key     secret.String
		Pointer *secret.String
	}{s, &s}
	hidden := struct{ key secret.String }{s}

	var out bytes.Buffer
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q"} {
		fmt.Fprintf(&out, verb+"\n", s)
		fmt.Fprintf(&out, verb+"\n", &s)
		fmt.Fprintf(&out, verb+"\n", holder)
		fmt.Fprintf(&out, verb+verb+"\n", hidden, &hidden)
		fmt.Fprintf(&out, verb+"\n", []secret.String{s})
	}
	for _, handler := range []slog.Handler{slog.NewJSONHandler(&out, nil), slog.NewTextHandler(&out, nil)} {
		slog.New(handler).Info("test", "key", s, "holder", holder)
	}
	if err := json.NewEncoder(&out).Encode(holder); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(out.String(), "hunter2") {
		t.Errorf("secret was printed:\n%s", out.String())
	}
	if got := strings.Count(out.String(), "[redacted]"); got < 10 {
		t.Errorf("placeholder appears %d times, want at least 10: the test prints nothing", got)
	}
	if got := s.Reveal(); got != "hunter2-hunter2" {
		t.Errorf("Reveal() = %q", got)
	}
}

func TestZeroPrintsEmpty(t *testing.T) {
	if got := fmt.Sprint(secret.String{}); got != "" {
		t.Errorf("zero secret prints %q, want nothing", got)
	}
}

func TestEqual(t *testing.T) {
	a := secret.New("a")
	for _, test := range []struct {
		other secret.String
		want  bool
	}{{secret.New("a"), true}, {secret.New("b"), false}, {secret.New("ab"), false}, {secret.String{}, false}} {
		if got := a.Equal(test.other); got != test.want {
			t.Errorf("Equal(%q) = %v, want %v", test.other.Reveal(), got, test.want)
		}
	}
}
