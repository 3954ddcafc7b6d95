package api

import (
	"fmt"
	"strings"
)

// ID is the id of a job, a certificate or a target. It is safe as a file name and a path segment: 1
// to 128 of A-Z a-z 0-9 . _ - and neither "." nor "..". The control plane accepts any string,
// "../../evil" included, so create an ID only with ParseID or by decoding. "" means no id.
type ID string

const (
	idAlphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"
	maxID      = 128
)

// ParseID parses an untrusted string.
func ParseID(s string) (ID, error) {
	if s == "" || len(s) > maxID || s == "." || s == ".." || strings.Trim(s, idAlphabet) != "" {
		return "", fmt.Errorf("id %.200q is not valid: expected 1 to 128 of A-Z a-z 0-9 . _ -", s)
	}
	return ID(s), nil
}

// UnmarshalText decodes an ID. It accepts "": the caller knows whether an id is required.
func (id *ID) UnmarshalText(text []byte) (err error) {
	if *id = ""; len(text) > 0 {
		*id, err = ParseID(string(text))
	}
	return err
}
