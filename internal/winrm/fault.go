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

// maxMessage bounds what is kept of what a host says about an error, in bytes.
const maxMessage = 1 << 10

// Codes of faults: those of WinRM, as wsmerror.h names them, and those of Windows.
const (
	faultTimeout      = 0x80338029 // ERROR_WSMAN_OPERATION_TIMEDOUT
	faultNoShell      = 0x8033805b // ERROR_WSMAN_INVALID_SELECTORS
	faultAccessDenied = 5          // ERROR_ACCESS_DENIED
)

// Fault is a refusal of the host, 2.2.4.43.
type Fault struct {
	Code    uint32 // 0: it has none
	Message string // the host's own, in its language, bounded, fit to print
}

func (f *Fault) Error() string {
	text := f.Message
	if f.Code != 0 {
		text = fmt.Sprintf("fault 0x%08x: %s", f.Code, text)
	}
	switch f.Code {
	case faultAccessDenied:
		return text + " (the user needs to be one of the host's Administrators, or to have Read and Execute in \"winrm configSDDL default\" there)"
	case faultNoShell:
		return text + " (the shell is gone: the host has restarted, or somebody has ended it)"
	}
	return text
}

// isTimeout reports whether the time is over that the host may hold a call back.
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

// textOf is the text of an element: a provider's own fault is nested in it.
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
