// Package sftp is a client of the SSH File Transfer Protocol, version 3, as far
// as replacing files takes it (draft-ietf-secsh-filexfer-02, with the extensions
// of OpenSSH that its file PROTOCOL describes). It speaks over any stream; who
// is at the other end is for others to see to.
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

// version is the only one that OpenSSH's server speaks.
const version = 3

// Types of packets.
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
	Hardlink    = "hardlink@openssh.com"
	Fsync       = "fsync@openssh.com"
)

const (
	// maxPacket bounds what a server sends in one packet, in bytes. OpenSSH's
	// own bound is the same.
	maxPacket = 256 << 10

	// maxChunk is how much one request reads or writes: what every server takes
	// (section 3 of the draft).
	maxChunk = 32 << 10

	// maxNames bounds the names of a directory that are looked at.
	maxNames = 100_000

	// grace is how long the answer to a request is still waited for once the
	// context has ended: to undo a change, one must know whether it happened.
	grace = 2 * time.Second
)

// A Client is one session. Its methods may be called from several goroutines,
// one after the other is served. One that was given up in the middle of a
// request, or that the server answered with nonsense, fails from then on.
type Client struct {
	timeout    time.Duration
	extensions map[string]bool

	mu     sync.Mutex // held for a request and its answer
	conn   io.ReadWriteCloser
	lastID uint32
	broken error // why there is no session any more
}

// New begins a session over conn, whose Close must end a Read and a Write that
// wait. Each request gets timeout for its answer. An error has closed conn.
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
		return nil, c.fail(fmt.Errorf("the server answers with packet type %d, version %d of SFTP, and version %d is needed", kind, got, version))
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

// Err is why the session has ended, nil while it has not.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.broken
}

// Close ends the session.
func (c *Client) Close() error { return c.conn.Close() }

var errShort = errors.New("the server's answer ends in the middle of a field")

// StatusError is the answer of a server that something did not work.
type StatusError struct {
	Code    uint32
	Message string // the server's, printable and bounded
}

// The codes that callers tell apart.
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
		return "the server does not support that"
	}
	if e.Message == "" || e.Message == "Failure" {
		return "the server's SFTP gives no reason" // OpenSSH has none for a full disk or a file that is there
	}
	return e.Message
}

// Is makes a StatusError one of package fs, where there is one.
func (e *StatusError) Is(target error) bool {
	return target == fs.ErrNotExist && e.Code == statusNoSuchFile ||
		target == fs.ErrPermission && e.Code == statusPermissionDenied ||
		target == errors.ErrUnsupported && e.Code == statusUnsupported
}

// A LostError means that the session has ended: nobody knows whether the last
// request was served.
type LostError struct{ Err error }

func (e *LostError) Error() string { return "the connection was lost: " + e.Err.Error() }
func (e *LostError) Unwrap() error { return e.Err }

// fail ends the session. The caller holds c.mu, or is the only one to know c.
func (c *Client) fail(err error) error {
	if c.broken == nil {
		c.broken = &LostError{err}
		c.conn.Close()
	}
	return c.broken
}

// exchange sends one packet and returns the next that comes.
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
			err = errors.New("the other side has ended it")
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

// A NoiseError means that something that is not SFTP came, such as the greeting
// of a shell's start-up file.
type NoiseError struct{ beginning string }

func (e *NoiseError) Error() string {
	return "not SFTP, but something that begins with " + printable.Quote(e.beginning)
}

// request sends one request and returns the answer to it, which is of type want.
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
		return nil, c.fail(errors.New("the server answers what nobody asked"))
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
		return nil, c.fail(fmt.Errorf("the server answers with packet type %d, and %d was expected", kind, want))
	}
	return r, nil
}

// do is a request whose only answer is a status.
func (c *Client) do(ctx context.Context, kind byte, body packet) error {
	_, err := c.request(ctx, kind, body, typeStatus)
	return err
}

// extended is do for an extension.
func (c *Client) extended(ctx context.Context, name string, arguments ...string) error {
	if !c.Has(name) {
		return &StatusError{Code: statusUnsupported}
	}
	p := about(name)
	for _, argument := range arguments {
		p.string(argument)
	}
	return c.do(ctx, typeExtended, p)
}

// Rename renames a file in one step, over one that is there (rename(2)).
func (c *Client) Rename(ctx context.Context, from, to string) error {
	return c.extended(ctx, PosixRename, from, to)
}

// Link gives a file a second name (link(2)).
func (c *Client) Link(ctx context.Context, old, new string) error {
	return c.extended(ctx, Hardlink, old, new)
}

// Remove removes a file.
func (c *Client) Remove(ctx context.Context, path string) error {
	return c.do(ctx, typeRemove, about(path))
}

// RealPath is path without symlinks.
func (c *Client) RealPath(ctx context.Context, path string) (string, error) {
	r, err := c.request(ctx, typeRealPath, about(path), typeName)
	if err != nil {
		return "", err
	}
	count, name := r.uint32(), r.string()
	if r.short || count != 1 {
		return "", c.nonsense(errShort)
	}
	return name, nil
}

// nonsense ends the session for an answer that cannot be understood.
func (c *Client) nonsense(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.fail(err)
}

// Lstat describes a file, and a symlink as itself.
func (c *Client) Lstat(ctx context.Context, path string) (Attrs, error) {
	return c.attrs(c.request(ctx, typeLstat, about(path), typeAttrs))
}

func (c *Client) attrs(r *reader, err error) (Attrs, error) {
	if err != nil {
		return Attrs{}, err
	}
	a := r.attrs()
	if r.short || !a.complete {
		return Attrs{}, c.nonsense(errors.New("the server does not say what a file is, whose and how large"))
	}
	return a, nil
}

// Names lists the names in a directory for which keep says true. A name may have
// any length and anything in it.
func (c *Client) Names(ctx context.Context, dir string, keep func(name string) bool) (names []string, err error) {
	f, err := c.open(ctx, typeOpenDir, about(dir))
	if err != nil {
		return nil, err
	}
	defer func() { err = cmp.Or(err, f.Close(ctx)) }()
	for seen := 0; ; {
		r, err := c.request(ctx, typeReadDir, about(f.handle), typeName)
		if isEOF(err) {
			return names, nil
		}
		if err != nil {
			return nil, err
		}
		count := r.uint32()
		if count == 0 {
			return nil, c.nonsense(errors.New("the server sends a list without an entry, which has no end"))
		}
		for range count {
			name := r.string()
			r.string() // as ls -l has it
			r.attrs()
			if r.short {
				return nil, c.nonsense(errShort)
			}
			if seen++; seen > maxNames {
				return nil, fmt.Errorf("there are more than %d names in %s", maxNames, dir)
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

// A File is open.
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

// OpenToRead opens a file to read it.
func (c *Client) OpenToRead(ctx context.Context, path string) (*File, error) {
	p := about(path)
	p.uint32(flagRead)
	p.uint32(0)
	return c.open(ctx, typeOpen, p)
}

// Create makes a file, to write it, which must not be there. Its mode is perm
// at most.
func (c *Client) Create(ctx context.Context, path string, perm fs.FileMode) (*File, error) {
	p := about(path)
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

// Close closes the file. The server may hold a failed write back until then.
func (f *File) Close(ctx context.Context) error {
	return f.client.do(ctx, typeClose, about(f.handle))
}

// Stat describes the file.
func (f *File) Stat(ctx context.Context) (Attrs, error) {
	return f.client.attrs(f.client.request(ctx, typeFstat, about(f.handle), typeAttrs))
}

// Read reads up to size bytes at offset: fewer only at the end of the file.
func (f *File) Read(ctx context.Context, offset int64, size int) ([]byte, error) {
	var data []byte
	for len(data) < size {
		p := about(f.handle)
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
			return nil, f.client.nonsense(errors.New("the server returns more or less than was asked for"))
		}
		data = append(data, chunk...)
	}
	return data, nil
}

// Write writes data from the beginning of the file on.
func (f *File) Write(ctx context.Context, data []byte) error {
	offset := 0
	for chunk := range slices.Chunk(data, maxChunk) {
		p := about(f.handle)
		p.uint64(uint64(offset))
		p.string(string(chunk))
		if err := f.client.do(ctx, typeWrite, p); err != nil {
			return err
		}
		offset += len(chunk)
	}
	return nil
}

// Chown gives the file to a user and a group.
func (f *File) Chown(ctx context.Context, uid, gid uint32) error {
	p := about(f.handle)
	p.uint32(hasOwner)
	p.uint32(uid)
	p.uint32(gid)
	return f.client.do(ctx, typeFsetstat, p)
}

// Chmod sets the permissions of the file.
func (f *File) Chmod(ctx context.Context, mode fs.FileMode) error {
	p := about(f.handle)
	p.uint32(hasPermissions)
	p.uint32(uint32(mode.Perm()))
	return f.client.do(ctx, typeFsetstat, p)
}

// SetModified sets when the file was modified, and read, in seconds since 1970.
func (f *File) SetModified(ctx context.Context, seconds uint32) error {
	p := about(f.handle)
	p.uint32(hasTimes)
	p.uint32(seconds)
	p.uint32(seconds)
	return f.client.do(ctx, typeFsetstat, p)
}

// Sync has the server write the file to its disk. A server that has no such
// extension is not asked.
func (f *File) Sync(ctx context.Context) error {
	if !f.client.Has(Fsync) {
		return nil
	}
	return f.client.extended(ctx, Fsync, f.handle)
}
