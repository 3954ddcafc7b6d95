// Package sdnotify tells systemd how the agent is: the protocol of
// sd_notify(3), for units of Type=notify.
package sdnotify

import (
	"net"
	"os"
	"strconv"
	"strings"
	"time"
)

const (
	// sendTimeout bounds a notice: the select loop sends some, and a service
	// manager that does not read must not hold it up.
	sendTimeout = 200 * time.Millisecond

	// maxWatchdog is a limit that means none, well within a time.Duration.
	maxWatchdog = 365 * 24 * time.Hour
)

// Notifier sends notices. One that cannot be sent is dropped, since the service
// manager is the one who acts on its absence. A nil Notifier sends none.
type Notifier struct{ socket string }

// New returns a Notifier for the socket that NOTIFY_SOCKET names: a path, or
// with a leading @ an abstract name. It is nil where there is none.
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

// Status sets the line that systemctl status shows. It reports whether it could
// be sent: unlike the others, which are repeated or acted on when they are
// missing, a line that is lost stays wrong.
func (n *Notifier) Status(text string) bool {
	// A line break would begin another assignment.
	return n.send("STATUS=" + strings.Join(strings.FieldsFunc(text, isLineBreak), " "))
}

func isLineBreak(r rune) bool { return r == '\n' || r == '\r' || r == 0 }

func (n *Notifier) send(state string) bool {
	if n == nil {
		return true
	}
	// Package net takes a leading @ for the abstract namespace itself.
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

// WatchdogInterval is how often to call Watchdog: half of the limit that the
// service manager sets, as sd_watchdog_enabled(3) recommends. Usec and pid are
// the values of WATCHDOG_USEC and WATCHDOG_PID. 0: no watchdog, or one that
// waits for another process.
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
