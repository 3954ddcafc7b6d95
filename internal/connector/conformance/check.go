package conformance

import (
	"errors"
	"maps"
	"strings"
	"testing"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/transaction"
)

// With returns a copy of config with more keys and values, given alternately.
func With(config map[string]any, more ...any) map[string]any {
	config = maps.Clone(config)
	for i := 0; i < len(more); i += 2 {
		config[more[i].(string)] = more[i+1]
	}
	return config
}

// Try makes a connector with config and, unless key is "", with key set to value. It fails the test
// unless the error contains says or, if says is "", unless there is no error. It returns the error.
func (h *Host) Try(t testing.TB, typ connector.Type, config map[string]any, key string, value any, says string) error {
	t.Helper()
	if key != "" {
		config = With(config, key, value)
	}
	_, err := h.Connector(typ, config)
	if (err == nil) != (says == "") || err != nil && !strings.Contains(err.Error(), says) {
		t.Errorf("%s %v: got %v, want an error with %q", key, value, err, says)
	}
	return err
}

// WantError fails the test unless err contains all of the words.
func WantError(t testing.TB, err error, words ...string) {
	t.Helper()
	for _, word := range words {
		if err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("got %v, want an error with %q", err, word)
		}
	}
}

// Broken reports whether err is a BrokenError: the rollback failed, and the target needs attention.
func Broken(err error) bool {
	_, ok := errors.AsType[*transaction.BrokenError](err)
	return ok
}
