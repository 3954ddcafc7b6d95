package lazyregexp

import "testing"

// TestNew: an expression is compiled at its first use, and only once.
func TestNew(t *testing.T) {
	broken := New("(")
	vowels := New("[aeiou]+")
	if first := vowels(); first != vowels() || first.FindString("queue") != "ueue" {
		t.Errorf("got %v, %q", first, first.FindString("queue"))
	}
	defer func() {
		if recover() == nil {
			t.Error("an invalid expression was compiled")
		}
	}()
	broken()
}
