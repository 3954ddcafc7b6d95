package api

import (
	"fmt"
	"strings"
)

// ID names a job, a certificate or a target. It can name a file and a path
// segment without surprises: 1 to 128 of A-Z a-z 0-9 . _ - and neither "." nor
// "..". The control plane accepts any string, "../../evil" included, so an ID
// is made only by ParseID and by decoding. "" is no id.
type ID string

const (
	idAlphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"
	maxID      = 128
)

// ParseID makes an ID of a string from outside.
func ParseID(s string) (ID, error) {
	if s == "" || len(s) > maxID || s == "." || s == ".." || strings.Trim(s, idAlphabet) != "" {
		return "", fmt.Errorf("id %.200q is not valid: expected 1 to 128 of A-Z a-z 0-9 . _ -", s)
	}
	return ID(s), nil
}

// UnmarshalText decodes an ID. Whether there has to be one depends on what it
// belongs to, so "" is none.
func (id *ID) UnmarshalText(text []byte) (err error) {
	if *id = ""; len(text) > 0 {
		*id, err = ParseID(string(text))
	}
	return err
}
