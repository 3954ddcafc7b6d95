// Package lazyregexp compiles regular expressions when they are first used. Compiling those of all
// target types would cost each start 2 MB and some milliseconds.
package lazyregexp

import (
	"regexp"
	"sync"
)

// New returns a function that compiles the expression at its first call, and panics if it is
// invalid.
func New(expression string) func() *regexp.Regexp {
	return sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(expression) })
}
