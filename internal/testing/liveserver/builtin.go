package liveserver

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"certctl-agent/internal/tlsprobe"
)

// StartBuiltin starts a small TLS server in this process, for machines without nginx. It reloads
// its pair when BuiltinCommand tells it to over a unix socket. self is the command line that calls
// BuiltinCommand.
func StartBuiltin(ctx context.Context, dir string, pair Pair, self string) (*Server, error) {
	certPath, keyPath, err := writePair(dir, pair)
	if err != nil {
		return nil, err
	}
	var current atomic.Pointer[tls.Certificate]
	load := func(keep bool) error {
		loaded, err := tls.LoadX509KeyPair(certPath, keyPath)
		if err == nil && keep {
			current.Store(&loaded)
		}
		return err
	}
	if err := load(true); err != nil {
		return nil, err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	socket := filepath.Join(dir, "control.sock")
	control, err := net.Listen("unix", socket)
	if err != nil {
		listener.Close()
		return nil, err
	}
	web := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") }),
		TLSConfig: &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return current.Load(), nil
		}},
		ReadHeaderTimeout: 5 * time.Second,
	}
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	s := &Server{
		Name: "built-in TLS server",
		Type: "NGINX", // the same files and commands
		Config: map[string]any{
			"cert_path":        certPath,
			"key_path":         keyPath,
			"validate_command": self + " " + socket + " validate",
			"reload_command":   self + " " + socket + " reload",
			"host":             "127.0.0.1",
			"port":             port,
		},
		Endpoint: tlsprobe.Endpoint{Address: listener.Addr().String()},
		CertPath: certPath,
	}
	s.stop = func() error {
		control.Close()
		return web.Close()
	}
	s.ended.Go(func() { _ = web.ServeTLS(listener, "", "") })
	s.ended.Go(func() {
		for {
			conn, err := control.Accept()
			if err != nil {
				return
			}
			answer(conn, load)
		}
	})
	return s, s.ready(ctx)
}

// answer carries out an order.
func answer(conn net.Conn, load func(keep bool) error) {
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	order, _ := bufio.NewReader(conn).ReadString('\n')
	var err error
	switch strings.TrimSpace(order) {
	case "validate":
		err = load(false)
	case "reload":
		err = load(true)
	default:
		err = fmt.Errorf("unknown order %q", order)
	}
	if err != nil {
		fmt.Fprintln(conn, err)
		return
	}
	fmt.Fprintln(conn, "ok")
}

// BuiltinCommand tells a built-in server to validate or reload.
func BuiltinCommand(socket, order string) error {
	conn, err := net.DialTimeout("unix", socket, 5*time.Second)
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	fmt.Fprintln(conn, order)
	reply, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return err
	}
	if reply = strings.TrimSpace(reply); reply != "ok" {
		return fmt.Errorf("%s: %s", order, reply)
	}
	return nil
}
