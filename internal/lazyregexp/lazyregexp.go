// Package lazyregexp holds regular expressions that are compiled when they are
// first used. Those of all target types together would take 2 MB and some
// milliseconds of each start.
package lazyregexp

import (
	"regexp"
	"sync"
)

// New returns the expression. It panics at its first use if it is not valid.
func New(expression string) func() *regexp.Regexp {
	return sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(expression) })
}
