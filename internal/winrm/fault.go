package winrm

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"certctl-agent/internal/printable"
)

// maxMessage bounds error messages of hosts, in bytes.
const maxMessage = 1 << 10

// Fault codes of WinRM, with their names in wsmerror.h, and of Windows.
const (
	faultTimeout      = 0x80338029 // ERROR_WSMAN_OPERATION_TIMEDOUT
	faultNoShell      = 0x8033805b // ERROR_WSMAN_INVALID_SELECTORS
	faultAccessDenied = 5          // ERROR_ACCESS_DENIED
)

// Fault is an error that the host returns (2.2.4.43).
type Fault struct {
	Code    uint32 // or 0
	Message string // in the host's language; printable and bounded
}

func (f *Fault) Error() string {
	text := f.Message
	if f.Code != 0 {
		text = fmt.Sprintf("fault 0x%08x: %s", f.Code, text)
	}
	switch f.Code {
	case faultAccessDenied:
		return text + " (the user must be a member of the host's Administrators group, or have Read and Execute permission in \"winrm configSDDL default\")"
	case faultNoShell:
		return text + " (the shell is gone: the host has restarted, or someone has ended the shell)"
	}
	return text
}

// isTimeout reports whether the operation timeout of a call has expired on the host.
func isTimeout(err error) bool {
	fault, ok := errors.AsType[*Fault](err)
	return ok && fault.Code == faultTimeout
}

func newFault(body *faultBody) *Fault {
	message := textOf(body.Detail.Message.Inner)
	if strings.TrimSpace(message) == "" {
		message = body.Reason
	}
	if strings.TrimSpace(message) == "" {
		message = "no reason given, " + body.Subcode
	}
	code, err := strconv.ParseUint(body.Detail.Code, 10, 32)
	if err != nil {
		code = 0
	}
	return &Fault{uint32(code), printable.Line(message, maxMessage)}
}

// textOf returns the text of an element, including nested elements such as a provider's own fault.
func textOf(inner []byte) string {
	var text strings.Builder
	decoder := xml.NewDecoder(bytes.NewReader(inner))
	for {
		token, err := decoder.RawToken()
		if err != nil {
			return text.String()
		}
		if data, ok := token.(xml.CharData); ok {
			text.Write(data)
			text.WriteByte(' ')
		}
	}
}
