package lazyregexp

import "testing"

// Nothing is compiled before it is used, and then once.
func TestNew(t *testing.T) {
	broken := New("(")
	vowels := New("[aeiou]+")
	if first := vowels(); first != vowels() || first.FindString("queue") != "ueue" {
		t.Errorf("got %v, %q", first, first.FindString("queue"))
	}
	defer func() {
		if recover() == nil {
			t.Error("an expression that is not valid was compiled")
		}
	}()
	broken()
}
