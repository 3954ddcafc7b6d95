package controlplane

import (
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"certctl-agent/internal/secret"
)

// FuzzRefusal parses arbitrary error answers: the text must fit in a log line, and the wait within
// its limits.
func FuzzRefusal(f *testing.F) {
	f.Add([]byte(`{"error":"Gone","message":"Agent has been retired","request_id":"38c8"}`), "120")
	f.Add([]byte("rate limit exceeded\n"), "Fri, 31 Dec 1999 23:59:59 GMT")
	f.Add([]byte("\x1b[2J{\"message\":\"\\u001b\"}"), "-1")
	f.Add([]byte(`{"message":{"a":[]},"error":"key"}`), "99999999999999999999")
	f.Fuzz(func(t *testing.T, body []byte, header string) {
		text := clip(message(fields(body), body), secret.New("key"))
		if len(text) > maxErrorText || !utf8.ValidString(text) {
			t.Errorf("%d bytes: %q", len(text), text)
		}
		for _, r := range text {
			if !unicode.IsPrint(r) && r != utf8.RuneError {
				t.Errorf("%q does not print", r)
			}
		}
		if got := retryAfter(header, time.Now()); got < 0 || got > maxRetryAfter {
			t.Errorf("Retry-After %q is %v", header, got)
		}
	})
}
