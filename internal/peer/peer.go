// Package peer connects to local servers that will receive secrets.
//
// A loopback address does not show who listens there: any user can bind an unprivileged port, or
// another address of the loopback network. So each connection is checked before the first byte is
// sent: the program that accepted it must run as a trusted user.
package peer

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// acceptTimeout is how long a server may take to accept a connection. Its user is unknown before.
const acceptTimeout = 10 * time.Second

// ErrUntrusted means that a server must not receive a secret: it is not on this host, or it runs as
// an untrusted user.
var ErrUntrusted = errors.New("not trusted with a secret")

// Dialer connects to servers that run on this host as root, as the agent's user or as one of Users.
// The zero Dialer is ready to use.
type Dialer struct {
	Users []string // names; unknown ones are ignored

	// Unchecked turns all checks off. Set it only if the owner of this host named the address.
	Unchecked bool
}

// DialContext connects to a "tcp" or "unix" address. It takes localhost for 127.0.0.1 only: a
// server told to listen at localhost may leave ::1 to other users.
func (d *Dialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if host, port, err := net.SplitHostPort(address); err == nil && network != "unix" &&
		strings.EqualFold(strings.TrimSuffix(host, "."), "localhost") {
		address = net.JoinHostPort("127.0.0.1", port)
	}
	if d.Unchecked {
		return new(net.Dialer).DialContext(ctx, network, address)
	}
	trusted := trustedUsers(d.Users)
	dialer := &net.Dialer{Control: onlyLoopback}
	if network == "unix" {
		if err := checkPath(address, trusted); err != nil {
			return nil, err
		}
		dialer.Control = nil
	}
	conn, err := dialer.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	if err := d.check(ctx, conn, trusted); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

func (d *Dialer) check(ctx context.Context, conn net.Conn, trusted []int) error {
	ctx, cancel := context.WithTimeout(ctx, acceptTimeout)
	defer cancel()
	owners, err := owners(ctx, conn)
	if err != nil {
		return fmt.Errorf("%s: cannot tell which user runs the server: %w: %w", conn.RemoteAddr(), err, ErrUntrusted)
	}
	for _, uid := range owners {
		if !slices.Contains(trusted, uid) {
			return fmt.Errorf("%s: the server runs as user %d, not as %s: %w", conn.RemoteAddr(), uid,
				strings.Join(append([]string{"root", "the agent's user"}, d.Users...), " or "), ErrUntrusted)
		}
	}
	return nil
}

// overflowUser is the kernel's uid for every user outside this process's user namespace.
const overflowUser = 65534

func trustedUsers(names []string) []int {
	trusted := []int{0, os.Geteuid()}
	for _, name := range names {
		if u, err := user.Lookup(name); err == nil {
			if uid, err := strconv.Atoi(u.Uid); err == nil {
				trusted = append(trusted, uid)
			}
		}
	}
	return slices.DeleteFunc(trusted, func(uid int) bool { return uid == overflowUser })
}

// onlyLoopback is a net.Dialer.Control: it sees the address after the name is resolved.
func onlyLoopback(_, address string, _ syscall.RawConn) error {
	if at, err := netip.ParseAddrPort(address); err != nil || !at.Addr().Unmap().IsLoopback() {
		return fmt.Errorf("%s is not a loopback address: %w", address, ErrUntrusted)
	}
	return nil
}
