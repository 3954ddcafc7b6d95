package conformance

import (
	"errors"
	"maps"
	"strings"
	"testing"

	"certctl-agent/internal/transaction"
)

// With is a copy of config with more keys and values, in turns.
func With(config map[string]any, more ...any) map[string]any {
	config = maps.Clone(config)
	for i := 0; i < len(more); i += 2 {
		config[more[i].(string)] = more[i+1]
	}
	return config
}

// Says fails the test unless an error says all of that.
func Says(t testing.TB, err error, words ...string) {
	t.Helper()
	for _, word := range words {
		if err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("got %v, want an error with %q", err, word)
		}
	}
}

// Broken reports whether an error says that the target needs a person.
func Broken(err error) bool {
	_, ok := errors.AsType[*transaction.BrokenError](err)
	return ok
}
