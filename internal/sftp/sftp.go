// Package sftp is a client of the SSH File Transfer Protocol, version 3, with the operations that
// replacing files needs (draft-ietf-secsh-filexfer-02, and the extensions in OpenSSH's file
// PROTOCOL). It works over any stream; the caller authenticates the server.
package sftp

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"sync"
	"time"

	"certctl-agent/internal/printable"
)

// version is the only one that OpenSSH's server supports.
const version = 3

// Packet types.
const (
	typeInit     = 1
	typeVersion  = 2
	typeOpen     = 3
	typeClose    = 4
	typeRead     = 5
	typeWrite    = 6
	typeLstat    = 7
	typeFstat    = 8
	typeFsetstat = 10
	typeOpenDir  = 11
	typeReadDir  = 12
	typeRemove   = 13
	typeRealPath = 16
	typeStatus   = 101
	typeHandle   = 102
	typeData     = 103
	typeName     = 104
	typeAttrs    = 105
	typeExtended = 200
)

// The extensions that this package uses.
const (
	PosixRename = "posix-rename@openssh.com"
	hardlink    = "hardlink@openssh.com"
	fsync       = "fsync@openssh.com"
)

const (
	// maxPacket bounds a packet from the server, in bytes. OpenSSH has the same limit.
	maxPacket = 256 << 10

	// maxChunk is how much one request reads or writes, in bytes. Every server supports that much
	// (section 3 of the draft).
	maxChunk = 32 << 10

	// maxNames bounds the entries of a directory.
	maxNames = 100_000

	// grace is how long a request still waits for its answer after the context has ended. To undo a
	// change, the caller must know whether it happened.
	grace = 2 * time.Second
)

// A Client is a session. Its methods may be called concurrently; it sends one request at a time.
// After a request was abandoned or the server sent an invalid answer, all further requests fail.
type Client struct {
	timeout    time.Duration
	extensions map[string]bool

	mu     sync.Mutex // held for a request and its answer
	conn   io.ReadWriteCloser
	lastID uint32
	broken error // why the session has ended, or nil
}

// New starts a session over conn. Closing conn must end blocked Reads and Writes. Each request
// waits up to timeout for its answer. If New fails, it closes conn.
func New(ctx context.Context, conn io.ReadWriteCloser, timeout time.Duration) (*Client, error) {
	c := &Client{conn: conn, timeout: timeout, extensions: make(map[string]bool)}
	var hello packet
	hello.uint32(version)
	kind, body, err := c.exchange(ctx, typeInit, hello.data)
	if err != nil {
		conn.Close() // also if nothing was sent, since ctx has ended
		return nil, err
	}
	answer := reader{data: body}
	if got := answer.uint32(); kind != typeVersion || got != version {
		return nil, c.fail(fmt.Errorf("the server answers with packet type %d, SFTP version %d: expected version %d", kind, got, version))
	}
	for len(answer.data) > 0 {
		name := answer.string()
		answer.string() // its version
		if answer.short {
			return nil, c.fail(errShort)
		}
		c.extensions[name] = true
	}
	return c, nil
}

// Has reports whether the server offers an extension.
func (c *Client) Has(extension string) bool { return c.extensions[extension] }

// Err returns the error that ended the session, or nil.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.broken
}

// Close ends the session.
func (c *Client) Close() error { return c.conn.Close() }

var errShort = errors.New("the server's answer is truncated")

// StatusError is an error that the server returned.
type StatusError struct {
	Code    uint32
	Message string // from the server; printable and bounded
}

// Status codes with a special meaning here.
const (
	statusOK               = 0
	statusEOF              = 1
	statusNoSuchFile       = 2
	statusPermissionDenied = 3
	statusUnsupported      = 8
)

func (e *StatusError) Error() string {
	switch e.Code {
	case statusNoSuchFile:
		return "no such file"
	case statusPermissionDenied:
		return "permission denied"
	case statusUnsupported:
		return "the server does not support this operation"
	}
	if e.Message == "" || e.Message == "Failure" {
		return "the SFTP server gives no reason" // as OpenSSH for a full disk or an existing file
	}
	return e.Message
}

// Is reports whether e corresponds to an error of package fs or errors.ErrUnsupported.
func (e *StatusError) Is(target error) bool {
	return target == fs.ErrNotExist && e.Code == statusNoSuchFile ||
		target == fs.ErrPermission && e.Code == statusPermissionDenied ||
		target == errors.ErrUnsupported && e.Code == statusUnsupported
}

// A LostError means that the session has ended. The last request may or may not have been served.
type LostError struct{ Err error }

func (e *LostError) Error() string { return "the connection was lost: " + e.Err.Error() }
func (e *LostError) Unwrap() error { return e.Err }

// fail ends the session. The caller must hold c.mu or have the only reference to c.
func (c *Client) fail(err error) error {
	if c.broken == nil {
		c.broken = &LostError{err}
		c.conn.Close()
	}
	return c.broken
}

// exchange sends a packet and returns the next packet that it receives.
func (c *Client) exchange(ctx context.Context, kind byte, body []byte) (byte, []byte, error) {
	if c.broken != nil {
		return 0, nil, c.broken
	}
	if ctx.Err() != nil {
		return 0, nil, context.Cause(ctx)
	}
	watch, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), c.timeout, fmt.Errorf("no answer for %v", c.timeout))
	defer cancel()
	hurry := context.AfterFunc(ctx, func() {
		select {
		case <-time.After(grace):
			cancel()
		case <-watch.Done():
		}
	})
	defer hurry()
	defer context.AfterFunc(watch, func() { c.conn.Close() })()

	why := func(err error) error {
		switch {
		case ctx.Err() != nil && watch.Err() != nil:
			err = context.Cause(ctx)
		case watch.Err() != nil:
			err = context.Cause(watch)
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			err = errors.New("the server closed it")
		}
		return c.fail(err)
	}
	message := binary.BigEndian.AppendUint32(nil, uint32(1+len(body)))
	message = append(append(message, kind), body...)
	if _, err := c.conn.Write(message); err != nil {
		return 0, nil, why(err)
	}
	var head [5]byte
	if _, err := io.ReadFull(c.conn, head[:]); err != nil {
		return 0, nil, why(err)
	}
	size := binary.BigEndian.Uint32(head[:])
	if size < 1 || size > maxPacket {
		return 0, nil, c.fail(&NoiseError{string(head[:])})
	}
	answer := make([]byte, size-1)
	if _, err := io.ReadFull(c.conn, answer); err != nil {
		return 0, nil, why(err)
	}
	return head[4], answer, nil
}

// A NoiseError means that the server sent something other than SFTP, such as output of a shell's
// start-up file.
type NoiseError struct{ beginning string }

func (e *NoiseError) Error() string {
	return "expected SFTP, got data that begins with " + printable.Quote(e.beginning)
}

// request sends a request and returns its answer, which must be of type want.
func (c *Client) request(ctx context.Context, kind byte, body packet, want byte) (*reader, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lastID++
	kind, answer, err := c.exchange(ctx, kind, append(binary.BigEndian.AppendUint32(nil, c.lastID), body.data...))
	if err != nil {
		return nil, err
	}
	r := &reader{data: answer}
	if id := r.uint32(); r.short || id != c.lastID {
		return nil, c.fail(errors.New("the server's answer does not match the request"))
	}
	switch {
	case kind == typeStatus:
		code := r.uint32()
		if r.short {
			return nil, c.fail(errShort)
		}
		if code == statusOK && want == typeStatus {
			return r, nil
		}
		return nil, &StatusError{code, printable.Line(r.string(), 200)} // older servers send no message
	case kind != want:
		return nil, c.fail(fmt.Errorf("the server answers with packet type %d: expected %d", kind, want))
	}
	return r, nil
}

// do sends a request whose only answer is a status.
func (c *Client) do(ctx context.Context, kind byte, body packet) error {
	_, err := c.request(ctx, kind, body, typeStatus)
	return err
}

// extended sends a request of an extension.
func (c *Client) extended(ctx context.Context, name string, arguments ...string) error {
	if !c.Has(name) {
		return &StatusError{Code: statusUnsupported}
	}
	p := newPacket(name)
	for _, argument := range arguments {
		p.string(argument)
	}
	return c.do(ctx, typeExtended, p)
}

// Rename renames a file atomically and replaces an existing one (rename(2)).
func (c *Client) Rename(ctx context.Context, from, to string) error {
	return c.extended(ctx, PosixRename, from, to)
}

// Link gives a file a second name (link(2)).
func (c *Client) Link(ctx context.Context, old, new string) error {
	return c.extended(ctx, hardlink, old, new)
}

// Remove removes a file.
func (c *Client) Remove(ctx context.Context, path string) error {
	return c.do(ctx, typeRemove, newPacket(path))
}

// RealPath returns path without symlinks.
func (c *Client) RealPath(ctx context.Context, path string) (string, error) {
	r, err := c.request(ctx, typeRealPath, newPacket(path), typeName)
	if err != nil {
		return "", err
	}
	count, name := r.uint32(), r.string()
	if r.short || count != 1 {
		return "", c.nonsense(errShort)
	}
	return name, nil
}

// nonsense ends the session because of an invalid answer.
func (c *Client) nonsense(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.fail(err)
}

// Lstat describes a file without following a symlink.
func (c *Client) Lstat(ctx context.Context, path string) (Attrs, error) {
	return c.attrs(c.request(ctx, typeLstat, newPacket(path), typeAttrs))
}

func (c *Client) attrs(r *reader, err error) (Attrs, error) {
	if err != nil {
		return Attrs{}, err
	}
	a := r.attrs()
	if r.short || !a.complete {
		return Attrs{}, c.nonsense(errors.New("the server does not send the type, owner and size of a file"))
	}
	return a, nil
}

// Names lists the names in a directory for which keep returns true. Names may have any length and
// contain any bytes.
func (c *Client) Names(ctx context.Context, dir string, keep func(name string) bool) (names []string, err error) {
	f, err := c.open(ctx, typeOpenDir, newPacket(dir))
	if err != nil {
		return nil, err
	}
	defer func() { err = cmp.Or(err, f.Close(ctx)) }()
	for seen := 0; ; {
		r, err := c.request(ctx, typeReadDir, newPacket(f.handle), typeName)
		if isEOF(err) {
			return names, nil
		}
		if err != nil {
			return nil, err
		}
		count := r.uint32()
		if count == 0 {
			return nil, c.nonsense(errors.New("the server sends an empty list of names"))
		}
		for range count {
			name := r.string()
			r.string() // in the format of ls -l
			r.attrs()
			if r.short {
				return nil, c.nonsense(errShort)
			}
			if seen++; seen > maxNames {
				return nil, fmt.Errorf("the directory %s has more than %d entries", dir, maxNames)
			}
			if keep(name) {
				names = append(names, name)
			}
		}
	}
}

func isEOF(err error) bool {
	status, ok := errors.AsType[*StatusError](err)
	return ok && status.Code == statusEOF
}

// A File is an open file.
type File struct {
	client *Client
	handle string
}

// Flags of open.
const (
	flagRead   = 0x01
	flagWrite  = 0x02
	flagCreate = 0x08
	flagExcl   = 0x20
)

// OpenToRead opens a file for reading.
func (c *Client) OpenToRead(ctx context.Context, path string) (*File, error) {
	p := newPacket(path)
	p.uint32(flagRead)
	p.uint32(0)
	return c.open(ctx, typeOpen, p)
}

// Create creates a file for writing. It fails if the file exists. The server's umask may restrict
// perm.
func (c *Client) Create(ctx context.Context, path string, perm fs.FileMode) (*File, error) {
	p := newPacket(path)
	p.uint32(flagWrite | flagCreate | flagExcl)
	p.uint32(hasPermissions)
	p.uint32(uint32(perm.Perm()))
	return c.open(ctx, typeOpen, p)
}

func (c *Client) open(ctx context.Context, kind byte, p packet) (*File, error) {
	r, err := c.request(ctx, kind, p, typeHandle)
	if err != nil {
		return nil, err
	}
	f := &File{client: c, handle: r.string()}
	if r.short {
		return nil, c.nonsense(errShort)
	}
	return f, nil
}

// Close closes the file. The server may report a failed write only now.
func (f *File) Close(ctx context.Context) error {
	return f.client.do(ctx, typeClose, newPacket(f.handle))
}

// Stat describes the file.
func (f *File) Stat(ctx context.Context) (Attrs, error) {
	return f.client.attrs(f.client.request(ctx, typeFstat, newPacket(f.handle), typeAttrs))
}

// Read reads size bytes at offset, or fewer at the end of the file.
func (f *File) Read(ctx context.Context, offset int64, size int) ([]byte, error) {
	var data []byte
	for len(data) < size {
		p := newPacket(f.handle)
		p.uint64(uint64(offset) + uint64(len(data)))
		want := min(size-len(data), maxChunk)
		p.uint32(uint32(want))
		r, err := f.client.request(ctx, typeRead, p, typeData)
		if isEOF(err) {
			break
		}
		if err != nil {
			return nil, err
		}
		chunk := r.string()
		if r.short || len(chunk) == 0 || len(chunk) > want {
			return nil, f.client.nonsense(errors.New("the server returns a wrong number of bytes"))
		}
		data = append(data, chunk...)
	}
	return data, nil
}

// Write writes data at the start of the file.
func (f *File) Write(ctx context.Context, data []byte) error {
	offset := 0
	for chunk := range slices.Chunk(data, maxChunk) {
		p := newPacket(f.handle)
		p.uint64(uint64(offset))
		p.string(string(chunk))
		if err := f.client.do(ctx, typeWrite, p); err != nil {
			return err
		}
		offset += len(chunk)
	}
	return nil
}

// Chown sets the user and group of the file.
func (f *File) Chown(ctx context.Context, uid, gid uint32) error {
	p := newPacket(f.handle)
	p.uint32(hasOwner)
	p.uint32(uid)
	p.uint32(gid)
	return f.client.do(ctx, typeFsetstat, p)
}

// Chmod sets the permissions of the file.
func (f *File) Chmod(ctx context.Context, mode fs.FileMode) error {
	p := newPacket(f.handle)
	p.uint32(hasPermissions)
	p.uint32(uint32(mode.Perm()))
	return f.client.do(ctx, typeFsetstat, p)
}

// SetModified sets the modification and access times of the file, in seconds since 1970.
func (f *File) SetModified(ctx context.Context, seconds uint32) error {
	p := newPacket(f.handle)
	p.uint32(hasTimes)
	p.uint32(seconds)
	p.uint32(seconds)
	return f.client.do(ctx, typeFsetstat, p)
}

// Sync makes the server write the file to its disk. It does nothing if the server lacks the
// extension.
func (f *File) Sync(ctx context.Context) error {
	if !f.client.Has(fsync) {
		return nil
	}
	return f.client.extended(ctx, fsync, f.handle)
}
