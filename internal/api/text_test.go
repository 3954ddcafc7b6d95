package api

import "testing"

func TestText(t *testing.T) {
	for in, want := range map[string]string{"plain": "plain", "a\x00b": "a\uFFFDb", "a\xffb": "a\uFFFDb", "": ""} {
		if got := Text(in); got != want {
			t.Errorf("Text(%q) = %q, want %q", in, got, want)
		}
	}
	for in, want := range map[string]string{"/a/é": "/a/é", "/a/\xe9": `/a/\xe9`, "/a/\xff\x01": "/a/\\xff\x01"} {
		if got := TextOfPath(in); got != want {
			t.Errorf("TextOfPath(%q) = %q, want %q", in, got, want)
		}
	}
}
