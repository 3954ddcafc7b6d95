package peer

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"certctl-agent/internal/testing/needs"
)

// stranger is the uid of an untrusted user.
const stranger = 4201

// as runs f in a separate thread with the effective uid.
func as(t *testing.T, uid int, f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		keep := ^uintptr(0)
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, keep, uintptr(uid), keep); errno != 0 {
			t.Error(errno)
			return
		}
		f()
	}()
	<-done
}

// canBe skips a test that cannot become another user.
func canBe(t *testing.T, uid int) {
	t.Helper()
	if uid != os.Geteuid() {
		needs.Root(t, "becoming another user")
	}
}

// server listens and accepts as one user.
type server struct {
	net.Listener
	got chan int // bytes received over each connection
}

func listen(t *testing.T, uid int, network, address string) *server {
	t.Helper()
	canBe(t, uid)
	s := &server{got: make(chan int, 10)}
	as(t, uid, func() {
		var err error
		if s.Listener, err = net.Listen(network, address); err != nil {
			t.Error(err)
		}
	})
	if s.Listener == nil {
		t.FailNow()
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// serve accepts connections until the listener is closed.
func (s *server) serve(t *testing.T, uid int) {
	go as(t, uid, func() {
		for {
			conn, err := s.Accept()
			if err != nil {
				return
			}
			go func() {
				n, _ := io.Copy(io.Discard, conn)
				conn.Close()
				s.got <- int(n)
			}()
		}
	})
}

// send dials and sends a secret.
func send(t *testing.T, d *Dialer, network, address string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	conn, err := d.DialContext(ctx, network, address)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.Write([]byte("secret"))
	return err
}

// want compares the outcome of send with what may have arrived.
func (s *server) want(t *testing.T, err error, trusted bool) {
	t.Helper()
	if trusted != (err == nil) || err != nil && !errors.Is(err, ErrUntrusted) {
		t.Errorf("got %v, want trusted: %v", err, trusted)
	}
	want := 0
	if trusted {
		want = len("secret")
	}
	select {
	case got := <-s.got:
		if got != want {
			t.Errorf("the server received %d bytes, want %d", got, want)
		}
	case <-time.After(time.Minute):
		t.Errorf("nobody connected: %v", err)
	}
}

// daemon is a user that every Linux system has.
func daemon(t *testing.T) int {
	t.Helper()
	u, err := user.Lookup("daemon")
	if err != nil {
		t.Fatal(err)
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		t.Fatal(err)
	}
	return uid
}

func TestTCP(t *testing.T) {
	listeners := []struct{ listen, dial string }{
		{"127.0.0.1:0", "127.0.0.1"},
		{"127.0.0.1:0", "localhost"},
		{"127.0.0.1:0", "LocalHost."},
		{"127.0.0.1:0", "::ffff:127.0.0.1"},
		{"0.0.0.0:0", "127.0.0.1"},
		{"[::]:0", "127.0.0.1"}, // in the kernel's IPv6 table
		{"[::]:0", "::1"},
		{"[::1]:0", "::1"},
		{"127.9.8.7:0", "127.9.8.7"},
	}
	users := []struct {
		name    string
		uid     int
		users   []string
		trusted bool
	}{
		{"the agent's user", os.Geteuid(), nil, true},
		{"a stranger", stranger, []string{"daemon", "no-such-user"}, false},
		{"the server's user", daemon(t), []string{"no-such-user", "daemon"}, true},
		{"another server's user", daemon(t), nil, false},
		{"a user whom this namespace does not know", overflowUser, []string{"nobody"}, false},
	}
	for _, l := range listeners {
		for _, u := range users {
			t.Run(l.listen+" "+l.dial+" "+u.name, func(t *testing.T) {
				s := listen(t, u.uid, "tcp", l.listen)
				s.serve(t, u.uid)
				_, port, _ := net.SplitHostPort(s.Addr().String())
				s.want(t, send(t, &Dialer{Users: u.users}, "tcp", net.JoinHostPort(l.dial, port)), u.trusted)
			})
		}
	}
}

// TestAccepter: the user who accepted the connection counts. A listener may have been passed on to
// another process, and some kernels report root for a connection that nobody has accepted.
func TestAccepter(t *testing.T) {
	t.Run("a stranger accepts at root's listener", func(t *testing.T) {
		canBe(t, stranger)
		s := listen(t, os.Geteuid(), "tcp", "127.0.0.1:0")
		s.serve(t, stranger)
		s.want(t, send(t, new(Dialer), "tcp", s.Addr().String()), false)
	})
	t.Run("accepted late", func(t *testing.T) {
		s := listen(t, os.Geteuid(), "tcp", "127.0.0.1:0")
		sent := make(chan error)
		go func() { sent <- send(t, new(Dialer), "tcp", s.Addr().String()) }()
		select {
		case err := <-sent:
			t.Errorf("it did not wait: %v", err)
		case <-time.After(200 * time.Millisecond): // long enough for a bug to show
		}
		s.serve(t, os.Geteuid())
		s.want(t, <-sent, true)
	})
	t.Run("never accepted", func(t *testing.T) {
		s := listen(t, os.Geteuid(), "tcp", "127.0.0.1:0")
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		conn, err := new(Dialer).DialContext(ctx, "tcp", s.Addr().String())
		if err == nil {
			conn.Close()
		}
		if !errors.Is(err, ErrUntrusted) || !strings.Contains(err.Error(), "accepted") {
			t.Errorf("got %v, want an error that nobody accepted it", err)
		}
	})
}

// TestLocalhost: a stranger has the address that localhost means elsewhere.
func TestLocalhost(t *testing.T) {
	ours := listen(t, os.Geteuid(), "tcp4", "127.0.0.1:0")
	ours.serve(t, os.Geteuid())
	_, port, _ := net.SplitHostPort(ours.Addr().String())
	theirs := listen(t, stranger, "tcp6", net.JoinHostPort("::1", port))
	theirs.serve(t, stranger)
	for _, d := range []*Dialer{{}, {Unchecked: true}} {
		ours.want(t, send(t, d, "tcp", net.JoinHostPort("localhost", port)), true)
	}
	select {
	case <-theirs.got:
		t.Error("connected to the stranger's server")
	default:
	}
	theirs.want(t, send(t, new(Dialer), "tcp", net.JoinHostPort("::1", port)), false)
}

func TestOnlyLoopback(t *testing.T) {
	for address, allowed := range map[string]bool{
		"127.0.0.1:2019": true, "127.8.8.8:1": true, "[::1]:2019": true, "[::ffff:127.0.0.1]:1": true,
		"192.0.2.1:2019": false, "0.0.0.0:2019": false, "[::]:2019": false, "[fe80::1%lo]:2019": false, "nonsense": false,
	} {
		if err := onlyLoopback("tcp", address, nil); (err == nil) != allowed || err != nil && !errors.Is(err, ErrUntrusted) {
			t.Errorf("%s: got %v, want allowed: %v", address, err, allowed)
		}
	}
	// Linux connects 0.0.0.0 to this host, but it is not a loopback address.
	if err := send(t, new(Dialer), "tcp", "192.0.2.1:9"); !errors.Is(err, ErrUntrusted) {
		t.Errorf("got %v, want a refusal", err)
	}
}

func TestUnix(t *testing.T) {
	dir := t.TempDir()
	tests := []struct {
		name    string
		uid     int
		users   []string
		trusted bool
	}{
		{"the agent's user", os.Geteuid(), nil, true},
		{"a stranger", stranger, []string{"daemon"}, false},
		{"the server's user", daemon(t), []string{"daemon"}, true},
		{"another server's user", daemon(t), nil, false},
	}
	for i, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			at := filepath.Join(dir, strconv.Itoa(i))
			if err := os.Mkdir(at, 0o700); err != nil {
				t.Fatal(err)
			}
			if os.Geteuid() == 0 {
				allow(t, dir)
				if err := os.Chown(at, test.uid, -1); err != nil {
					t.Fatal(err)
				}
			}
			s := listen(t, test.uid, "unix", filepath.Join(at, "s"))
			s.serve(t, test.uid)
			err := send(t, &Dialer{Users: test.users}, "unix", filepath.Join(at, "s"))
			if test.trusted {
				s.want(t, err, true)
				return
			}
			if !errors.Is(err, ErrUntrusted) {
				t.Errorf("got %v, want a refusal", err)
			}
		})
	}
}

// allow lets other users pass through dir, up to the directory of temporary
// files.
func allow(t *testing.T, dir string) {
	t.Helper()
	for ; dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

// TestUnixListener: that root owns a socket file does not show who listens there.
func TestUnixListener(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	if os.Geteuid() == 0 {
		allow(t, dir)
		if err := os.Chmod(dir, 0o777|os.ModeSticky); err != nil {
			t.Fatal(err)
		}
	}
	s := listen(t, stranger, "unix", path)
	s.serve(t, stranger)
	if err := os.Chown(path, 0, 0); err != nil {
		t.Fatal(err)
	}
	s.want(t, send(t, new(Dialer), "unix", path), false)
}

// TestUnixPath: where others can replace the socket, it is not asked who listens.
func TestUnixPath(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	if err := send(t, new(Dialer), "unix", path); err == nil || !strings.Contains(err.Error(), "can be written by every user") {
		t.Errorf("got %v, want a refusal", err)
	}
}

func TestCheckPath(t *testing.T) {
	needs.Root(t, "giving files away")
	dir := t.TempDir()
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	file := func(name string) string {
		do(os.WriteFile(in(name), nil, 0o600))
		return in(name)
	}
	mkdir := func(name string, mode os.FileMode, uid int) {
		do(os.Mkdir(in(name), 0o755))
		do(os.Chmod(in(name), mode))
		do(os.Chown(in(name), uid, -1))
	}
	link := func(to, name string, uid int) string {
		do(os.Symlink(to, in(name)))
		do(os.Lchown(in(name), uid, -1))
		return in(name)
	}
	mkdir("ours", 0o755, 0)
	mkdir("group", 0o775, 0)
	mkdir("theirs", 0o755, stranger)
	mkdir("open", 0o777, 0)
	mkdir("sticky", 0o777|os.ModeSticky, 0)
	real := file("ours/s")
	link("/", "ours/root", 0)
	link(filepath.Join("..", "theirs", "link"), "ours/through", 0)
	link(real, "theirs/link", stranger)
	link("loop", "loop", 0)
	tests := []struct {
		path string
		says string // "": no error
	}{
		{real, ""},
		{file("group/s"), ""},
		{file("sticky/s"), ""},
		{in("ours/root") + real, ""},
		{link("../ours/s", "sticky/ours", 0), ""},
		{link("ours/../ours", "dots", 0) + "/s", ""},
		{file("theirs/s"), "theirs, on the way to the socket, belongs to another user"},
		{file("open/s"), "open, on the way to the socket, can be written by every user"},
		{link("../ours/s", "sticky/theirs", stranger), "belongs to another user"},
		{in("ours/through"), "belongs to another user"},
		{in("loop"), "too many levels"},
		{in("ours/none"), "no such file"},
	}
	for _, test := range tests {
		err := checkPath(test.path, []int{0})
		if (err == nil) != (test.says == "") || err != nil && !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: got %v, want an error with %q", test.path, err, test.says)
		}
	}
}

// TestTableRow checks the format against an example from the kernel's documentation.
func TestTableRow(t *testing.T) {
	if hexWords([]byte{1, 0, 0, 0}) != "00000001" {
		t.Skip("the example is of a little-endian machine")
	}
	local, remote := netip.MustParseAddrPort("127.0.0.1:25"), netip.MustParseAddrPort("127.0.0.1:51138")
	got := tableRow(local.Addr().AsSlice(), local.Port(), remote.Addr().AsSlice(), remote.Port())
	if want := " 0100007F:0019 0100007F:C7C2 01 "; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	table := filepath.Join(t.TempDir(), "tcp")
	text := "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n" +
		"   0: 0100007F:C7C2 0100007F:0019 01 00000000:00000000 00:00000000 00000000     7        0 1 1\n" +
		"   1: 0100007F:0019 0100007F:C7C2 01 00000000:00000000 00:00000000 00000000  4201        0 99 2 0\n" +
		"   2: 0100007F:0019 0100007F:C7C2 06 00000000:00000000 03:00000000 00000000     0        0 0 3 0\n" +
		"   3: 0100007F:0019 0100007F:C7C2 01 00000000:00000000 00:00000000 00000000     0        0 0 1 0\n"
	if err := os.WriteFile(table, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	uids, waiting, err := scan(table, got)
	if err != nil || len(uids) != 2 || uids[0] != stranger || uids[1] != 0 || !waiting {
		t.Errorf("got %v, waiting: %v, %v, want both rows of established connections", uids, waiting, err)
	}
}
