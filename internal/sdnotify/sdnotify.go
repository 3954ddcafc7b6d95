// Package sdnotify reports the agent's state to systemd by the protocol of sd_notify(3), for units
// of Type=notify.
package sdnotify

import (
	"net"
	"os"
	"strconv"
	"strings"
	"time"
)

const (
	// sendTimeout bounds a send: the select loop sends, and a service manager that does not read
	// must not block it.
	sendTimeout = 200 * time.Millisecond

	// maxWatchdog is the longest limit that counts as one. It fits in a time.Duration.
	maxWatchdog = 365 * 24 * time.Hour
)

// Notifier sends notifications. It drops those that it cannot send: the service manager acts when
// they are missing. A nil Notifier sends nothing.
type Notifier struct{ socket string }

// New returns a Notifier for the socket that NOTIFY_SOCKET names: a path, or an abstract name with
// a leading @. It returns nil if socket is empty.
func New(socket string) *Notifier {
	if socket == "" {
		return nil
	}
	return &Notifier{socket}
}

// Ready says that the agent has started, or reloaded its configuration.
func (n *Notifier) Ready() { n.send("READY=1") }

// Reloading says that the configuration is being reloaded, until Ready.
func (n *Notifier) Reloading() { n.send("RELOADING=1") }

// Stopping says that the agent is about to end.
func (n *Notifier) Stopping() { n.send("STOPPING=1") }

// Watchdog says that the agent is alive.
func (n *Notifier) Watchdog() { n.send("WATCHDOG=1") }

// Status sets the line that systemctl status shows. It reports whether the line was sent, so that
// the caller can repeat a lost one: nothing else would correct it.
func (n *Notifier) Status(text string) bool {
	// A line break would start another assignment.
	return n.send("STATUS=" + strings.Join(strings.FieldsFunc(text, isLineBreak), " "))
}

func isLineBreak(r rune) bool { return r == '\n' || r == '\r' || r == 0 }

func (n *Notifier) send(state string) bool {
	if n == nil {
		return true
	}
	// Package net translates a leading @ to the abstract namespace.
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: n.socket, Net: "unixgram"})
	if err != nil {
		return false
	}
	defer conn.Close()
	if conn.SetWriteDeadline(time.Now().Add(sendTimeout)) != nil {
		return false
	}
	_, err = conn.Write([]byte(state))
	return err == nil
}

// WatchdogInterval returns how often to call Watchdog: half of the service manager's limit, as
// sd_watchdog_enabled(3) recommends. Usec and pid are the values of WATCHDOG_USEC and WATCHDOG_PID.
// It returns 0 if there is no watchdog, or it watches another process.
func WatchdogInterval(usec, pid string) time.Duration {
	if pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return 0
	}
	limit, err := strconv.ParseUint(usec, 10, 63)
	if err != nil || limit > uint64(maxWatchdog/time.Microsecond) {
		return 0
	}
	return time.Duration(limit) * time.Microsecond / 2
}
