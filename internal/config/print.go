package config

import (
	"cmp"
	"fmt"
	"io"
	"log/slog"
	"strings"
)

// Value is one setting as it was resolved.
type Value struct {
	Flag     string `json:"-"` // without the dash; "" if it has none
	Variable string `json:"variable"`
	Text     string `json:"value"`  // secrets are redacted; "" if unset
	Origin   string `json:"origin"` // "flag", "environment", "default", or the file's path
}

// Values returns all settings, in the order of the reference.
func (c *Config) Values() []Value { return c.values }

// Changed returns the variables of the settings that differ from those of another Config. It
// ignores changes inside files that settings name.
func (c *Config) Changed(other *Config) []string {
	var names []string
	for i, v := range c.values {
		if i < len(other.values) && v.Text != other.values[i].Text {
			names = append(names, v.Variable)
		}
	}
	return names
}

// String returns the settings that are not defaults.
func (c Config) String() string {
	var words []string
	for _, v := range c.values {
		if v.Origin != "default" {
			words = append(words, fmt.Sprintf("%s=%q", v.Variable, v.Text))
		}
	}
	return strings.Join(words, " ")
}

// GoString keeps %#v from printing secrets.
func (c Config) GoString() string { return "config.Config{" + c.String() + "}" }

// LogValue returns the settings that are not defaults, for log/slog.
func (c Config) LogValue() slog.Value {
	var attributes []slog.Attr
	for _, v := range c.values {
		if v.Origin != "default" {
			attributes = append(attributes, slog.String(v.Variable, v.Text))
		}
	}
	return slog.GroupValue(attributes...)
}

// Usage writes the help for all flags with their defaults.
func Usage(w io.Writer) {
	var text strings.Builder
	for _, s := range settings(new(Config)) {
		fmt.Fprintf(&text, "  -%s (%s)\n", s.flag, s.variable)
		fmt.Fprintf(&text, "        %s.\n", strings.ReplaceAll(s.doc, "`", ""))
		fmt.Fprintf(&text, "        Default: %s.\n", strings.ReplaceAll(cmp.Or(s.defaults, s.value), "`", ""))
	}
	text.WriteString("HTTPS_PROXY and NO_PROXY are used too, from the environment or the configuration file.\n")
	io.WriteString(w, text.String())
}
