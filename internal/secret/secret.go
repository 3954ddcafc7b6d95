// Package secret holds values that must not be printed by accident.
package secret

import (
	"crypto/subtle"
	"log/slog"
)

const redacted = "[redacted]"

// String is a secret that redacts itself wherever it is formatted, logged or
// marshalled. Only Reveal gives the value out, so that a reader can find every
// use of it by that name.
//
// It points to the value, since fmt calls no methods on what is in an
// unexported field, and prints it as it is; of a pointer it prints the address.
// So two are compared with Equal, never with ==.
type String struct{ value *string }

// New wraps value.
func New(value string) String { return String{&value} }

// Reveal returns the secret itself.
func (s String) Reveal() string {
	if s.value == nil {
		return ""
	}
	return *s.value
}

// IsZero reports whether there is no secret.
func (s String) IsZero() bool { return s.Reveal() == "" }

// Equal compares two secrets in time that does not depend on where they differ.
func (s String) Equal(other String) bool {
	return subtle.ConstantTimeCompare([]byte(s.Reveal()), []byte(other.Reveal())) == 1
}

// String returns a placeholder, or "" when there is no secret: whether one is
// set is no secret, and the first thing an operator asks.
func (s String) String() string {
	if s.IsZero() {
		return ""
	}
	return redacted
}

// GoString is String, for %#v.
func (s String) GoString() string { return s.String() }

// LogValue is String, for log/slog.
func (s String) LogValue() slog.Value { return slog.StringValue(s.String()) }

// MarshalJSON is String, quoted.
func (s String) MarshalJSON() ([]byte, error) { return []byte(`"` + s.String() + `"`), nil }

// MarshalText is String, for encoders that prefer text.
func (s String) MarshalText() ([]byte, error) { return []byte(s.String()), nil }
