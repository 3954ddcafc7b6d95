// Package targetconf decodes the configuration of a target: the control plane's configuration with
// the overlays of this host on top.
package targetconf

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"unicode"

	"certctl-agent/internal/api"
	"certctl-agent/internal/hostfile"
	"certctl-agent/internal/printable"
	"certctl-agent/internal/secret"
	"certctl-agent/internal/trustedfile"
)

// Config is a target's configuration: that of the job, overridden by the host's overlays. Decode
// decodes it into a connector's struct.
type Config struct {
	Common Common // the part that all types share

	overlays Overlays
	targetID api.ID
	aliases  map[string]string  // from folded aliases to folded main names
	prefix   string             // of the keys of a nested object, such as "post_deploy_verify."
	values   map[string]*value  // by folded main name
	settings map[string]Setting // decoded settings by name; shared with nested objects
}

type value struct {
	key    string // as written
	alias  bool   // key is an alias
	raw    json.RawMessage
	masked bool   // the control plane withheld it
	from   string // the overlay that supplied it, or "" for the job
	used   bool   // a struct has a field for it
}

// Setting is a key of a configuration with its final value, for display.
type Setting struct {
	Key    string `json:"key"`
	Value  string `json:"value"`  // as JSON; secrets are redacted
	Source string `json:"source"` // "job", "default", or the overlay's file
}

// ConfigError is an error in a target's configuration.
type ConfigError struct {
	Key     string
	Problem string // what is expected, or what to do
}

func (e *ConfigError) Error() string { return "target config: " + e.Key + ": " + e.Problem }

func Invalid(key, format string, args ...any) error {
	return &ConfigError{Key: key, Problem: fmt.Sprintf(format, args...)}
}

// Problems are several errors in a configuration.
type Problems []error

func (p Problems) Error() string {
	var all []string
	for _, err := range p {
		all = append(all, err.Error())
	}
	return strings.Join(all, "; ")
}

func (p Problems) Unwrap() []error { return p }

// Join combines errors like errors.Join, but on one line. It returns nil if all are nil.
func Join(errs ...error) error {
	var problems Problems
	for _, err := range errs {
		if several, ok := err.(Problems); ok {
			problems = append(problems, several...)
		} else if err != nil {
			problems = append(problems, err)
		}
	}
	switch len(problems) {
	case 0:
		return nil
	case 1:
		return problems[0]
	}
	return problems
}

const (
	// pinKey in an overlay restricts the type of the target.
	pinKey = "target_type"

	// replaceKey in an overlay lets the target's files replace any others.
	replaceKey = "replace_any_file"
)

// Merge combines the configuration of a job for a target of type typ with the host's overlays. In
// order of precedence: the target's own overlay, default.json, and the job without its masked
// values. aliases are those of the type. If only the common part is invalid, Merge returns the
// Config along with the error, so that the caller can check the rest, too.
func Merge(job json.RawMessage, typ string, aliases map[string]string, targetID api.ID, overlays Overlays) (*Config, error) {
	c := &Config{targetID: targetID, overlays: overlays, aliases: make(map[string]string), settings: make(map[string]Setting)}
	for alias, key := range aliases {
		c.aliases[fold(alias)] = fold(key)
	}
	var err error
	if c.values, err = c.parseObject(job); err != nil {
		return nil, fmt.Errorf("target config: %w", err)
	}
	for _, v := range c.values {
		v.masked = isMask(v.raw)
	}
	for _, key := range []string{pinKey, replaceKey} {
		delete(c.values, fold(key)) // only overlays may set these
	}
	for _, name := range slices.Compact([]string{defaultOverlay, string(targetID) + overlaySuffix}) {
		layer, err := c.readOverlay(name)
		if err != nil {
			return nil, err
		}
		for key, v := range layer {
			v.from = name
			c.values[key] = v
		}
	}
	if pin := c.values[fold(pinKey)]; pin != nil {
		pin.used = true
		var want string
		if json.Unmarshal(pin.raw, &want) != nil {
			return nil, Invalid(pinKey, "expected a string in the overlay")
		}
		if want != typ {
			return nil, Invalid(pinKey, "the job is for a target of type %s, and this host allows only %s for target %s (%s)",
				printable.Quote(typ), printable.Quote(want), targetID, overlays.path(targetID))
		}
	}
	if typ == "" {
		return c, nil // it will not be decoded
	}
	if err := c.Decode(&c.Common); err != nil {
		return c, err
	}
	return c, c.Common.check()
}

func (c *Config) Target() api.ID { return c.targetID }

// Settings returns the settings decoded so far, sorted by key.
func (c *Config) Settings() []Setting {
	return slices.SortedFunc(maps.Values(c.settings), func(a, b Setting) int { return cmp.Compare(a.Key, b.Key) })
}

// parseObject parses a JSON object. If a key is repeated, in any spelling that encoding/json treats
// as equal, the last value wins. Null values are ignored. A main name takes precedence over its
// alias unless its value is empty.
func (c *Config) parseObject(data []byte) (map[string]*value, error) {
	values := make(map[string]*value)
	if len(bytes.TrimSpace(data)) == 0 {
		return values, nil
	}
	var whole json.RawMessage
	if err := json.Unmarshal(data, &whole); err != nil {
		return nil, err
	}
	decoder := json.NewDecoder(bytes.NewReader(whole))
	if start, err := decoder.Token(); err != nil || start != json.Delim('{') {
		return nil, errors.New("expected a JSON object, got " + kindOf(data))
	}
	for decoder.More() {
		token, err := decoder.Token()
		if err != nil {
			return nil, err
		}
		key, _ := token.(string)
		var raw json.RawMessage
		if err := decoder.Decode(&raw); err != nil {
			return nil, err
		}
		if string(raw) == "null" {
			continue
		}
		name, isAlias := c.mainName(key)
		next := &value{key: key, raw: raw, alias: isAlias}
		if before := values[name]; before != nil && before.alias != isAlias {
			main, alias := next, before
			if isAlias {
				main, alias = before, next
			}
			if next = main; string(main.raw) == `""` {
				next = alias
			}
		}
		values[name] = next
	}
	return values, nil
}

// mainName returns the folded main name of key and whether key is an alias.
func (c *Config) mainName(key string) (name string, isAlias bool) {
	if name, isAlias = c.aliases[fold(key)]; isAlias {
		return name, true
	}
	return fold(key), false
}

// fold maps all spellings that encoding/json treats as one key to one string: upper and lower case,
// and look-alikes that Unicode folds to a letter (U+212A KELVIN SIGN for k, U+017F LONG S for s).
// Otherwise a key in another spelling could bypass an overlay but still be decoded.
func fold(key string) string {
	return strings.Map(func(r rune) rune {
		for {
			next := unicode.SimpleFold(r)
			if next <= r { // the smallest rune of the orbit
				return next
			}
			r = next
		}
	}, key)
}

// minMask is the length from which a string of asterisks counts as a mask. Control planes send
// exactly this many.
const minMask = 8

func isMask(raw json.RawMessage) bool {
	var s string
	return json.Unmarshal(raw, &s) == nil && len(s) >= minMask && strings.Trim(s, "*") == ""
}

// Masked reports whether the control plane withheld key and no overlay
// supplies it.
func (c *Config) Masked(key string) bool {
	name, _ := c.mainName(key)
	v := c.values[name]
	return v != nil && v.masked
}

// Local reports whether an overlay supplied key: then the owner of this host has decided on it.
func (c *Config) Local(key string) bool {
	name, _ := c.mainName(key)
	v := c.values[name]
	return v != nil && v.from != ""
}

// fileSuffix, appended to the key of a secret in an overlay, names a file that holds the secret.
const fileSuffix = "_file"

// maxSecret bounds the file of a secret, in bytes. It may hold a private key.
const maxSecret = 64 << 10

// secretFile reads the secret for key from the file that an overlay names, each time. It returns
// the value that names the file, or nil if there is none.
func (c *Config) secretFile(key string, dst *secret.String) (*value, error) {
	named := c.values[fold(key+fileSuffix)]
	if named == nil {
		return nil, nil
	}
	named.used = true
	var path string
	switch err := json.Unmarshal(named.raw, &path); {
	case named.from == "":
		return nil, Invalid(c.prefix+key+fileSuffix, "a job must not name a file on this host for a secret: put the key into %s", c.overlays.path(c.targetID))
	case err != nil || !filepath.IsAbs(path):
		return nil, Invalid(c.prefix+key+fileSuffix, "expected an absolute path")
	case c.Local(key):
		return nil, Invalid(c.prefix+key+fileSuffix, "overlays also set %s: remove one of the two", c.prefix+key)
	}
	data, err := trustedfile.ReadSecret(path, maxSecret)
	if err != nil {
		return nil, Invalid(c.prefix+key+fileSuffix, "%v", err)
	}
	// Editors add a line feed at the end. Line feeds within a secret stay.
	text := strings.TrimRight(strings.TrimPrefix(string(data), hostfile.ByteOrderMark), "\r\n")
	if text == "" {
		return nil, Invalid(c.prefix+key+fileSuffix, "%s is empty", path)
	}
	*dst = secret.New(text)
	return named, nil
}

// MaskedError returns an error that says that key is masked and how to supply it. why is the error
// of another source that was tried, or nil.
func (c *Config) MaskedError(key string, why error) error {
	tried := ""
	if why != nil {
		tried = "; " + why.Error()
	}
	return Invalid(key, "the control plane sent it masked, so this host must supply it: put {%q: ...} into %s%s",
		key, c.overlays.path(c.targetID), tried)
}

// Unknown returns the keys that nothing has decoded, sorted. They have no effect.
func (c *Config) Unknown() []string {
	var unknown []string
	for _, v := range c.values {
		if !v.used {
			unknown = append(unknown, v.key)
		}
	}
	slices.Sort(unknown)
	return unknown
}

// Decode fills the struct that v points to. Fields are named by their json tag. The tag
// config:"required" rejects an absent or empty value, and the tag default supplies a value. Fields
// may be strings, integers, booleans (both also accepted as JSON strings), pointers to booleans,
// whose default can be true, secret.String, structs, embedded structs, the types of this package,
// and whatever else encoding/json decodes. A field of type FileOptions with the tag
// json:"cert_file_*" reads cert_file_mode, cert_file_owner and cert_file_group; with
// config:"secret" it rejects modes that give others access.
//
// A masked key that has a field is an error unless resolvable contains it. Then the field stays
// unset, and the connector must check Masked.
func (c *Config) Decode(v any, resolvable ...string) error {
	return c.decode(reflect.ValueOf(v).Elem(), resolvable)
}

func (c *Config) decode(v reflect.Value, resolvable []string) error {
	var errs []error
	for i := range v.NumField() {
		field := v.Type().Field(i)
		key, named := field.Tag.Lookup("json")
		if field.Anonymous && !named {
			errs = append(errs, c.decode(v.Field(i), resolvable))
			continue
		}
		if !named {
			continue
		}
		option := field.Tag.Get("config")
		if _, ok := v.Field(i).Interface().(FileOptions); ok {
			errs = append(errs, c.decodeFileOptions(strings.TrimSuffix(key, "*"), option == optionSecret, v.Field(i)))
			continue
		}
		if err := c.decodeKey(key, v.Field(i), resolvable); err != nil {
			errs = append(errs, err)
			continue
		}
		if value := field.Tag.Get("default"); value != "" && v.Field(i).IsZero() && !c.Masked(key) {
			raw, _ := json.Marshal(value) // cannot fail for a string
			if err := c.decodeValue(key, v.Field(i), raw); err != nil {
				return fmt.Errorf("default of %s: %w", key, err)
			}
			c.record(key, raw, "default")
		}
		if option == optionRequired && v.Field(i).IsZero() && !c.Masked(key) {
			errs = append(errs, Invalid(c.prefix+key, "is required"))
		}
	}
	return Join(errs...)
}

// Options of the config tag.
const (
	optionRequired = "required"
	optionSecret   = "secret" // for FileOptions: the file holds a private key
)

func (c *Config) decodeKey(key string, dst reflect.Value, resolvable []string) error {
	name, _ := c.mainName(key)
	val := c.values[name]
	if hidden, ok := dst.Addr().Interface().(*secret.String); ok {
		switch named, err := c.secretFile(key, hidden); {
		case err != nil:
			return err
		case named != nil:
			if val != nil {
				val.used, val.masked = true, false
			}
			c.recordValue(key, named, dst)
			return nil
		}
	}
	if val == nil {
		if dst.Kind() == reflect.Struct && !isLeaf(dst) {
			return c.nested(key, nil).decode(dst, nil) // for its defaults
		}
		return nil
	}
	val.used = true
	if val.masked {
		if slices.Contains(resolvable, key) {
			return nil
		}
		return c.MaskedError(key, nil)
	}
	err := c.decodeValue(key, dst, val.raw)
	if err == nil && !dst.IsZero() {
		c.recordValue(key, val, dst)
	}
	if _, ok := errors.AsType[*ConfigError](err); ok || err == nil {
		return err
	}
	if val.alias {
		key = strings.ToLower(val.key)
	}
	return &ConfigError{Key: c.prefix + key, Problem: err.Error()}
}

// decodeValue decodes raw into dst. Its errors never quote the value unless the type rules out a
// secret.
func (c *Config) decodeValue(key string, dst reflect.Value, raw json.RawMessage) error {
	switch p := dst.Addr().Interface().(type) {
	case json.Unmarshaler:
		return p.UnmarshalJSON(raw)
	case *secret.String:
		var s string
		if json.Unmarshal(raw, &s) != nil {
			return errors.New("expected a string, got " + kindOf(raw))
		}
		*p = secret.New(s)
		return nil
	case **bool:
		if string(raw) == `""` {
			return nil
		}
		b, err := parseBool(raw)
		if err == nil {
			*p = &b
		}
		return err
	}
	switch dst.Kind() {
	case reflect.String:
		if json.Unmarshal(raw, dst.Addr().Interface()) != nil {
			return errors.New("expected a string, got " + kindOf(raw))
		}
	case reflect.Bool:
		b, err := parseBool(raw)
		if err != nil {
			return err
		}
		dst.SetBool(b)
	case reflect.Int:
		n, err := parseInt(raw)
		if err != nil {
			return err
		}
		dst.SetInt(n)
	case reflect.Struct:
		values, err := c.parseObject(raw)
		if err != nil {
			return err
		}
		return c.nested(key, values).decode(dst, nil)
	default:
		if json.Unmarshal(raw, dst.Addr().Interface()) != nil {
			return fmt.Errorf("expected %s, got %s", dst.Type(), kindOf(raw))
		}
	}
	return nil
}

// nested returns the configuration in the object at key.
func (c *Config) nested(key string, values map[string]*value) *Config {
	from := ""
	if v := c.values[fold(key)]; v != nil {
		from = v.from
	}
	for _, v := range values {
		v.from = from
	}
	return &Config{targetID: c.targetID, overlays: c.overlays, settings: c.settings, prefix: c.prefix + key + ".", values: values}
}

// isLeaf reports whether dst is a struct that is decoded as a single value.
func isLeaf(dst reflect.Value) bool {
	switch dst.Addr().Interface().(type) {
	case json.Unmarshaler, *secret.String:
		return true
	}
	return false
}

// recordValue records a value for Settings, redacted if it is a secret. Objects are not recorded,
// because their keys are.
func (c *Config) recordValue(key string, val *value, dst reflect.Value) {
	raw, source := val.raw, "job"
	if val.from != "" {
		source = c.overlays.file(val.from)
	}
	if _, isSecret := dst.Addr().Interface().(*secret.String); isSecret {
		raw = json.RawMessage(`"[redacted]"`)
	}
	if dst.Kind() != reflect.Struct || isLeaf(dst) {
		c.record(key, raw, source)
	}
}

// Default sets a default that depends on other settings, so that a tag cannot hold it.
func Default[T ~string](c *Config, key string, dst *T, value string) {
	if *dst == "" {
		*dst = T(value)
		c.Record(key, value, "default")
	}
}

// Record adds a value to Settings that came from elsewhere, such as a default or the server.
func (c *Config) Record(key, value, source string) {
	raw, _ := json.Marshal(value) // cannot fail for a string
	c.record(key, raw, source)
}

func (c *Config) record(key string, raw json.RawMessage, source string) {
	c.settings[c.prefix+key] = Setting{Key: c.prefix + key, Value: string(raw), Source: source}
}

func (c *Config) decodeFileOptions(prefix string, secret bool, options reflect.Value) error {
	for i := range options.NumField() {
		if err := c.decodeKey(prefix+options.Type().Field(i).Tag.Get("json"), options.Field(i), nil); err != nil {
			return err
		}
	}
	if mode := options.Interface().(FileOptions).Mode; secret && mode&0o007 != 0 {
		return Invalid(prefix+"mode", "%#o would let every user of this host at a private key: a key file may have at most %#o",
			mode, maxKeyMode)
	}
	return nil
}

// kindOf names the type of a JSON value, for errors that must not show the value.
func kindOf(raw []byte) string {
	raw = bytes.TrimSpace(raw)
	if len(raw) == 0 {
		return "nothing"
	}
	switch raw[0] {
	case '{':
		return "an object"
	case '[':
		return "a list"
	case '"':
		return "a string"
	case 't', 'f':
		return "a boolean"
	case 'n':
		return "null"
	}
	return "a number"
}
