package devplane

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"testing/synctest"
	"time"
)

// connect returns both ends of a connection.
func connect(t *testing.T, l *memoryListener) (client, server net.Conn) {
	t.Helper()
	accepted := make(chan net.Conn)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			t.Error(err)
		}
		accepted <- conn
	}()
	client, err := l.dial(t.Context(), "tcp")
	if err != nil {
		t.Fatal(err)
	}
	return client, <-accepted
}

func TestMemoryConn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newMemoryListener()
		client, server := connect(t, l)
		sent := make([]byte, 100_000)
		_, _ = rand.Read(sent)
		if _, err := client.Write(sent); err != nil {
			t.Fatal(err) // nobody reads yet
		}
		client.Close()
		if got, err := io.ReadAll(server); err != nil || string(got) != string(sent) {
			t.Errorf("read %d bytes, %v, want all data and EOF", len(got), err)
		}
		if _, err := server.Write(sent); !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("write to a closed peer: %v", err)
		}
		if _, err := client.Read(sent); !errors.Is(err, net.ErrClosed) {
			t.Errorf("read after Close: %v", err)
		}
		if _, err := client.Write(sent); !errors.Is(err, net.ErrClosed) {
			t.Errorf("write after Close: %v", err)
		}
	})
}

func TestMemoryDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newMemoryListener()
		client, _ := connect(t, l)
		start := time.Now()
		_ = client.SetDeadline(start.Add(time.Hour))
		_ = client.SetDeadline(start.Add(time.Second))
		if _, err := client.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) != time.Second {
			t.Errorf("read: %v after %v, want a time-out after 1s", err, time.Since(start))
		}
		_ = client.SetDeadline(time.Time{})
		time.AfterFunc(time.Minute, func() { client.Close() })
		if _, err := client.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) || time.Since(start) != 61*time.Second {
			t.Errorf("read without a deadline: %v after %v, want the close", err, time.Since(start))
		}
	})
}

func TestMemoryStall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newMemoryListener()
		client, server := connect(t, l)
		l.stall()
		if _, err := client.Write([]byte("lost")); err != nil {
			t.Errorf("write: %v, want it to vanish", err)
		}
		client.Close()
		_ = server.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := server.Read(make([]byte, 4)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("read: %v, want neither data nor EOF", err)
		}
	})
}

func TestMemoryDial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newMemoryListener()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := l.dial(ctx, "tcp"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("nobody accepts: %v", err)
		}
		l.Close()
		if _, err := l.dial(t.Context(), "tcp"); !errors.Is(err, net.ErrClosed) {
			t.Errorf("closed: %v", err)
		}
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Accept after Close: %v", err)
		}
		conn, err := l.dial(t.Context(), "udp")
		if err != nil || conn.LocalAddr().String() != "192.0.2.2:50000" {
			t.Errorf("udp: %v", err)
		}
	})
}
