// Package secret holds values that must not be printed by accident.
package secret

import (
	"crypto/subtle"
	"log/slog"
)

const redacted = "[redacted]"

// String is a secret that redacts itself wherever it is formatted, logged or marshalled. Only
// Reveal returns the value, so that every use of it can be found by that name.
//
// The value is behind a pointer, because fmt calls no methods on unexported fields of other types
// and prints a plain string there as it is; of a pointer it prints the address. So compare Strings
// with Equal, not with ==.
type String struct{ value *string }

// New wraps value.
func New(value string) String { return String{&value} }

// Reveal returns the value of the secret.
func (s String) Reveal() string {
	if s.value == nil {
		return ""
	}
	return *s.value
}

// IsZero reports whether the secret is empty.
func (s String) IsZero() bool { return s.Reveal() == "" }

// Equal reports whether two secrets are equal, in a time that does not depend on where they differ.
func (s String) Equal(other String) bool {
	return subtle.ConstantTimeCompare([]byte(s.Reveal()), []byte(other.Reveal())) == 1
}

// String returns a placeholder, or "" if the secret is empty. Whether it is set is not
// confidential, and the first thing that an operator asks.
func (s String) String() string {
	if s.IsZero() {
		return ""
	}
	return redacted
}

// GoString returns the placeholder, for %#v.
func (s String) GoString() string { return s.String() }

// LogValue returns the placeholder, for log/slog.
func (s String) LogValue() slog.Value { return slog.StringValue(s.String()) }

// MarshalJSON returns the placeholder, quoted.
func (s String) MarshalJSON() ([]byte, error) { return []byte(`"` + s.String() + `"`), nil }

// MarshalText returns the placeholder, for encoders that prefer text.
func (s String) MarshalText() ([]byte, error) { return []byte(s.String()), nil }
