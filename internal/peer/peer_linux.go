package peer

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"certctl-agent/internal/hostfile"
)

// owners returns the users at the other end of conn: the listener of a unix socket, or the
// process that accepted a TCP connection. There is only one, unless a hostile user binds the same address.
func owners(ctx context.Context, conn net.Conn) ([]int, error) {
	switch c := conn.(type) {
	case *net.UnixConn:
		return listener(c)
	case *net.TCPConn:
		return accepters(ctx, c)
	}
	return nil, errors.ErrUnsupported
}

// listener returns the user who called listen(2); see SO_PEERCRED in unix(7).
func listener(conn *net.UnixConn) ([]int, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *syscall.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	})
	if err = errors.Join(err, credErr); err != nil {
		return nil, err
	}
	return []int{int(cred.Uid)}, nil
}

// accepters finds the server's end of conn and waits until it is accepted: before that, kernels
// report root as its owner. The end must be a socket of this network namespace, so a connection
// that a packet filter redirects elsewhere fails.
func accepters(ctx context.Context, conn *net.TCPConn) ([]int, error) {
	client, server := addrPort(conn.LocalAddr()), addrPort(conn.RemoteAddr())
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		uids, waiting, err := lookUp(server, client)
		if err != nil {
			return nil, err
		}
		if len(uids) > 0 && !waiting {
			return uids, nil
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, fmt.Errorf("no program on this host has accepted the connection: %w", context.Cause(ctx))
		}
	}
}

func addrPort(address net.Addr) netip.AddrPort {
	at := address.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
}

// lookUp returns the users of the established sockets from local to remote, and whether one of the
// sockets still waits to be accepted (https://docs.kernel.org/networking/proc_net_tcp.html). An
// IPv4 connection to a server that listens at [::] is in the IPv6 table.
func lookUp(local, remote netip.AddrPort) (uids []int, waiting bool, err error) {
	mapped := func(at netip.AddrPort) []byte { all := at.Addr().As16(); return all[:] }
	row := tableRow(mapped(local), local.Port(), mapped(remote), remote.Port())
	uids, waiting, err = scan("/proc/self/net/tcp6", row)
	if errors.Is(err, fs.ErrNotExist) { // a kernel without IPv6
		err = nil
	}
	if err != nil || !local.Addr().Is4() {
		return uids, waiting, err
	}
	row = tableRow(local.Addr().AsSlice(), local.Port(), remote.Addr().AsSlice(), remote.Port())
	more, wait, err := scan("/proc/self/net/tcp", row)
	return append(uids, more...), waiting || wait, err
}

// tableRow returns the part of a row that identifies an established socket.
func tableRow(local []byte, localPort uint16, remote []byte, remotePort uint16) string {
	const established = 1
	return fmt.Sprintf(" %s:%04X %s:%04X %02X ", hexWords(local), localPort, hexWords(remote), remotePort, established)
}

// hexWords formats an address as the kernel does: in 32-bit words of native byte order.
func hexWords(address []byte) string {
	var text strings.Builder
	for word := range slices.Chunk(address, 4) {
		fmt.Fprintf(&text, "%08X", binary.NativeEndian.Uint32(word))
	}
	return text.String()
}

func scan(table, row string) (uids []int, waiting bool, err error) {
	file, err := os.Open(table)
	if err != nil {
		return nil, false, err
	}
	defer file.Close()
	for in := bufio.NewReader(file); ; {
		line, err := in.ReadString('\n')
		if _, figures, ok := strings.Cut(line, row); ok {
			// tx_queue:rx_queue tr:tm->when retrnsmt uid timeout inode ...
			fields := strings.Fields(figures)
			if len(fields) < 6 {
				return nil, false, fmt.Errorf("%s has a row in an unknown format", table)
			}
			uid, err := strconv.ParseUint(fields[3], 10, 32)
			if err != nil {
				return nil, false, fmt.Errorf("%s has a row whose uid is not a number", table)
			}
			uids = append(uids, int(uid))
			waiting = waiting || fields[5] == "0" // no inode
		}
		if err == io.EOF {
			return uids, waiting, nil
		}
		if err != nil {
			return nil, false, err
		}
	}
}

// checkPath refuses a socket if an untrusted user could replace it, or a directory or symlink on
// the way to it.
func checkPath(path string, trusted []int) error {
	real, err := hostfile.Follow(path, func(at string, info fs.FileInfo) error {
		if uid, _ := hostfile.Owner(info); !slices.Contains(trusted, uid) {
			return fmt.Errorf("%s, on the way to the socket, belongs to another user: %w", at, ErrUntrusted)
		}
		if mode := info.Mode(); mode.IsDir() && mode&0o002 != 0 && mode&fs.ModeSticky == 0 {
			return fmt.Errorf("%s, on the way to the socket, can be written by every user: %w", at, ErrUntrusted)
		}
		return nil
	})
	if err == nil {
		_, err = os.Lstat(real)
	}
	return err
}
