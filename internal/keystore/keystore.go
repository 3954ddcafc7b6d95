// Package keystore keeps the private keys of certificates on disk, each one
// until it is certain that nothing needs it any more.
//
// A certificate has one current key, which servers may read themselves; a
// pending key for each job whose CSR may have been signed; and the previous
// key. Files are named
//
//	<certificate>.key                current
//	<certificate>.<job tag>.pending  made for the CSR of one job
//	<certificate>.previous           current until the last promotion
//
// An attempt to renew never touches the current key. A pending key becomes
// current only with the certificate that was issued for it, as part of the
// transaction that installs it. Its pending file goes when the certificates of
// two later CSRs have been deployed.
package keystore

import (
	"bytes"
	"crypto"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"certctl-agent/internal/api"
	"certctl-agent/internal/atomicfile"
	"certctl-agent/internal/filelock"
	"certctl-agent/internal/hostfile"
	"certctl-agent/internal/pemutil"
)

const (
	// maxFile bounds what is read as a key. An RSA-16384 key takes 13 KiB.
	maxFile = 64 << 10

	// maxPending bounds the pending keys of one certificate. A CSR that fails
	// again and again under new job ids leaves one each time; the one that was
	// submitted the longest ago goes.
	maxPending = 32

	// maxPendingTotal bounds those of all certificates: certificate ids come
	// from the control plane. At the bound a certificate gets a new one only in
	// exchange for an older one of its own.
	maxPendingTotal = 32768

	// FileMode is that of every file with a key, from its creation.
	FileMode fs.FileMode = 0o600
)

// ErrNoKey means that the certificate's key is none of those that this agent
// holds for it.
var ErrNoKey = errors.New("none of this agent's private keys belongs to the certificate")

// Role says what a key is to its certificate.
type Role string

// The roles of a key.
const (
	Current  Role = "current"
	Pending  Role = "pending"
	Previous Role = "previous"
)

// Key is a private key as the store holds it.
type Key struct {
	Role   Role
	PEM    []byte // in the form that fleets have: SEC1 for ECDSA, PKCS #8 for others
	Signer crypto.Signer
	Fresh  bool // made by this very call: no CSR for it has been sent
}

// Clear overwrites the encoded copy.
func (k *Key) Clear() { clear(k.PEM) }

// Change is a file of the store and what it is to hold.
type Change struct {
	Path string // absolute
	Data []byte // the caller clears it after use
}

// Store is a key directory. It is safe for concurrent use. Names from outside
// resolve below the directory or not at all.
type Store struct {
	dir  string // absolute
	root *os.Root
	lock *filelock.Lock // nil where the file system has no locks
	log  *slog.Logger
	busy chan struct{} // of one: held while pending keys are listed and changed

	totalLimit int // maxPendingTotal
}

// Open opens the key directory, made if missing, locks it, and closes it to
// others, unless it looks as if these used it (see Inspect). The error is a
// *filelock.HeldError when another process has it open.
func Open(owner Owner, dir string, log *slog.Logger) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open the key directory: %w", err)
	}
	if err := Inspect(dir, owner); err != nil {
		return nil, err
	}
	if err := atomicfile.MkdirAll(dir); err != nil {
		return nil, fmt.Errorf("make the key directory: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("open the key directory: %w", err)
	}
	s := &Store{dir: dir, root: root, log: log, busy: make(chan struct{}, 1), totalLimit: maxPendingTotal}
	if err := s.begin(owner); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// Look opens the key directory as it is, for Find alone: it makes nothing,
// changes nothing and takes no lock.
func Look(dir string) (*Store, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("open the key directory: %w", err)
	}
	return &Store{dir: dir, root: root, busy: make(chan struct{}, 1)}, nil
}

func (s *Store) begin(owner Owner) error {
	if err := s.acquire(owner.Agent); err != nil {
		return err
	}
	if err := s.tighten(); err != nil {
		return err
	}
	if err := atomicfile.Sweep(s.root); err != nil {
		return fmt.Errorf("remove temporary files from the key directory: %w", err)
	}
	return nil
}

// Close gives up the lock and releases the directory.
func (s *Store) Close() error {
	s.lock.Close()
	return s.root.Close()
}

// tighten takes access to the directory from everybody else. A volume whose
// group is set from outside, as Kubernetes does, may refuse that.
func (s *Store) tighten() error {
	info, err := s.root.Stat(".")
	if err != nil {
		return fmt.Errorf("look at the key directory: %w", err)
	}
	// Mode 0700 closes it to everybody but its owner. That may be the user of
	// the agent before this one, so it is not refused.
	if owner, _ := hostfile.Owner(info); !hostfile.Ours(info) {
		s.log.Warn("the key directory belongs to another user, who can read every key: chown it to the agent's user", "dir", s.dir, "owner", owner)
	}
	was := info.Mode().Perm()
	if was&0o077 == 0 {
		return nil
	}
	refusal := s.root.Chmod(".", 0o700)
	if info, err = s.root.Stat("."); err != nil {
		return fmt.Errorf("look at the key directory: %w", err)
	}
	// Some file systems accept the change and ignore it.
	is := info.Mode().Perm()
	if refusal == nil {
		refusal = errors.New("the file system ignores it")
	}
	switch {
	case is&0o077 == 0:
		s.log.Warn("the key directory was open to others and has been closed", "dir", s.dir, "was", was.String(), "is", is.String())
	case is&0o007 == 0:
		s.log.Warn("the group has access to the key directory, and that cannot be changed", "dir", s.dir, "mode", is.String(), "error", refusal)
	default:
		return fmt.Errorf("everybody has access to the key directory %s (%v), and that cannot be changed: %w; run chmod 0700 on it", s.dir, is, refusal)
	}
	return nil
}

// hold waits for its turn to list and change pending keys.
func (s *Store) hold() (release func()) {
	s.busy <- struct{}{}
	return func() { <-s.busy }
}

// Path is where the current key of a certificate is.
func (s *Store) Path(certID api.ID) string { return CurrentPath(s.dir, certID) }

// CurrentPath is where the current key of a certificate is in the key directory
// at dir.
func CurrentPath(dir string, certID api.ID) string {
	return filepath.Join(dir, string(certID)+currentExt)
}

// PreviousPath is where the previous key of a certificate is, given where its
// current one is.
func PreviousPath(current string) string {
	return strings.TrimSuffix(current, currentExt) + previousExt
}

// Pending returns the key for the CSR of one job: the one made for it before,
// or else the one that generate makes. It is on disk, and the one of its
// certificate that was submitted last, when Pending returns.
func (s *Store) Pending(certID, jobID api.ID, generate func() (crypto.Signer, error)) (Key, error) {
	key, err := s.reuse(certID, jobID)
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	// Not under the lock: an RSA key can take seconds to make.
	signer, err := generate()
	if err != nil {
		return Key{}, fmt.Errorf("make a private key: %w", err)
	}
	key, err = s.keep(certID, jobID, signer)
	if errors.Is(err, fs.ErrExist) {
		// Where there are no locks, another agent may have been faster. Its CSR
		// may have been signed, so its key is the job's.
		return s.reuse(certID, jobID)
	}
	return key, err
}

// reuse returns the key that a job has already. fs.ErrNotExist: none.
func (s *Store) reuse(certID, jobID api.ID) (Key, error) {
	defer s.hold()()
	name := pendingName(certID, jobID)
	p, err := s.readPending(name)
	if errors.Is(err, errDamaged) {
		// It was whole when its CSR was sent, so no crash of ours did this. The
		// key is lost whether or not it was signed; the job is here again, so
		// the control plane waits for a CSR, and only a new key can make one.
		s.log.Error("a pending key is damaged: it is set aside and a new one is made; a certificate issued for it cannot be deployed",
			"file", name, "error", err)
		if err := s.root.Rename(name, name+damagedExt); err != nil {
			return Key{}, fmt.Errorf("set aside the damaged key %s: %w", name, err)
		}
		return Key{}, fs.ErrNotExist
	}
	if err != nil {
		return Key{}, err
	}
	all, _, err := s.pending(certID)
	if err != nil {
		return Key{}, err
	}
	if all[len(all)-1].name == name {
		// The process that wrote it may have been killed before this step.
		if err := atomicfile.SyncDir(s.root, "."); err != nil {
			return Key{}, fmt.Errorf("keep the pending key %s: %w", name, err)
		}
		return p.key()
	}
	if p.sequence, err = nextSequence(all); err != nil {
		return Key{}, err
	}
	// It replaces the same key, so nothing is lost.
	if err := s.writePending(p, atomicfile.WriteFile); err != nil {
		return Key{}, err
	}
	return p.key()
}

// keep writes a new pending key.
func (s *Store) keep(certID, jobID api.ID, signer crypto.Signer) (Key, error) {
	defer s.hold()()
	others, total, err := s.pending(certID)
	if err != nil {
		return Key{}, err
	}
	if total >= s.totalLimit && len(others) == 0 {
		return Key{}, fmt.Errorf("the key directory %s holds %d pending keys, its limit: find out why so many CSRs are not signed, then remove *%s files", s.dir, total, pendingExt)
	}
	p := pendingKey{name: pendingName(certID, jobID), signer: signer}
	if p.sequence, err = nextSequence(others); err != nil {
		return Key{}, err
	}
	if err := s.writePending(p, atomicfile.Create); err != nil {
		return Key{}, err
	}
	surplus := len(others) + 1 - maxPending
	if total >= s.totalLimit {
		surplus = max(surplus, 1)
	}
	for _, old := range others[:max(surplus, 0)] {
		s.log.Warn("there are too many pending keys: of this certificate, the one whose CSR was sent the longest ago is removed",
			"certificate", certID, "file", old.name, "limit", maxPending, "limit_in_all", s.totalLimit)
		if err := s.remove(old.name); err != nil {
			return Key{}, fmt.Errorf("remove a pending key: %w", err)
		}
	}
	key, err := p.key()
	key.Fresh = true
	return key, err
}

// Discard removes the pending key of a job. Only for a key whose CSR was
// certainly not signed.
func (s *Store) Discard(certID, jobID api.ID) error {
	defer s.hold()()
	if err := s.remove(pendingName(certID, jobID)); err != nil {
		return fmt.Errorf("discard a pending key: %w", err)
	}
	return nil
}

// Find returns the key of a certificate that has the given public key. The
// error is ErrNoKey when every key could be read and none has.
func (s *Store) Find(certID api.ID, public crypto.PublicKey) (Key, error) {
	defer s.hold()()
	var looked []string
	var unreadable []error
	for _, role := range []Role{Current, Previous} {
		key, err := s.read(certID, role)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err != nil:
			unreadable = append(unreadable, err)
			continue
		case pemutil.SamePublicKey(key.Signer.Public(), public):
			return key, nil
		}
		key.Clear()
		looked = append(looked, "the "+string(role)+" one")
	}
	pending, _, err := s.pending(certID)
	if err != nil {
		return Key{}, err
	}
	for _, p := range pending {
		if p.err != nil {
			unreadable = append(unreadable, p.err)
		} else if pemutil.SamePublicKey(p.signer.Public(), public) {
			return p.key()
		}
	}
	if len(pending) > 0 {
		looked = append(looked, fmt.Sprintf("%d pending", len(pending)))
	}
	if len(unreadable) > 0 {
		return Key{}, fmt.Errorf("look for the private key of certificate %s: %w", certID, errors.Join(unreadable...))
	}
	if len(looked) == 0 {
		return Key{}, fmt.Errorf("%w: it holds none for this certificate id", ErrNoKey)
	}
	return Key{}, fmt.Errorf("%w: compared with %s", ErrNoKey, strings.Join(looked, ", "))
}

// Promotion lists the files that make key the current one, the old current key
// becoming the previous one, in the order in which they are to be written.
// Nothing for a key that is current.
func (s *Store) Promotion(certID api.ID, key Key) ([]Change, error) {
	if key.Role == Current {
		return nil, nil
	}
	current := Change{Path: s.Path(certID), Data: bytes.Clone(key.PEM)}
	old, err := s.read(certID, Current)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return []Change{current}, nil
	case errors.Is(err, errDamaged):
		// It must not push out a previous key that is whole.
		s.log.Error("the current key is damaged: it is replaced and not kept as the previous one", "certificate", certID, "error", err)
		return []Change{current}, nil
	case err != nil:
		return nil, err
	}
	previous := Change{Path: PreviousPath(current.Path), Data: old.PEM}
	return []Change{previous, current}, nil
}

// Promote makes key the current one at once, for a certificate that this agent
// installs nowhere. A crash at any point loses no key.
func (s *Store) Promote(certID api.ID, key Key) error {
	if key.Role == Previous {
		// Its file is about to hold the current key. The copy counts as the
		// oldest pending key, which the next round removes.
		copied := pendingKey{name: pendingName(certID, ""), signer: key.Signer}
		if err := s.writePending(copied, atomicfile.WriteFile); err != nil {
			return err
		}
	}
	changes, err := s.Promotion(certID, key)
	if err != nil {
		return err
	}
	for _, change := range changes {
		err := atomicfile.WriteFile(s.root, filepath.Base(change.Path), change.Data, FileMode)
		clear(change.Data)
		if err != nil {
			return fmt.Errorf("make the %s key of certificate %s the current one: %w", key.Role, certID, err)
		}
	}
	return nil
}

// Prune removes what a deployed certificate makes superfluous: every pending key
// whose CSR was sent before those of the deployed and of the previous one. That
// is one round later than its own certificate was overtaken: a CSR that was
// sent earlier can still arrive later, and is signed then. It also leaves the
// pending copies of these two: should an interrupted transaction of another
// target of this certificate be undone later, that takes the old current key back.
func (s *Store) Prune(certID api.ID, deployed Key) error {
	defer s.hold()()
	pending, _, err := s.pending(certID)
	if err != nil {
		return err
	}
	previous, err := s.read(certID, Previous)
	if err != nil {
		return nil // there is none yet, or none that tells how far back to keep
	}
	defer previous.Clear()
	first, ok := lastSent(pending, deployed.Signer.Public())
	second, known := lastSent(pending, previous.Signer.Public())
	if !ok || !known {
		return nil
	}
	for _, p := range pending {
		if p.sequence < min(first, second) && (p.err == nil || errors.Is(p.err, errDamaged)) {
			err = errors.Join(err, s.remove(p.name))
		}
	}
	if err != nil {
		return fmt.Errorf("remove pending keys of certificate %s: %w", certID, err)
	}
	return nil
}

// lastSent returns the sequence of the pending key with the given public key.
func lastSent(pending []pendingKey, public crypto.PublicKey) (sequence uint64, ok bool) {
	for _, p := range slices.Backward(pending) {
		if p.err == nil && pemutil.SamePublicKey(p.signer.Public(), public) {
			return p.sequence, true
		}
	}
	return 0, false
}

// remove removes a pending key and what was set aside under its name.
func (s *Store) remove(name string) error {
	for _, name := range []string{name + damagedExt, name} {
		if err := atomicfile.Remove(s.root, name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func (s *Store) read(certID api.ID, role Role) (Key, error) {
	name := string(certID) + currentExt
	if role == Previous {
		name = string(certID) + previousExt
	}
	data, _, err := hostfile.ReadIn(s.root, name, maxFile)
	if err != nil {
		return Key{}, fmt.Errorf("read the %s key: %w", role, err)
	}
	signer, err := pemutil.ParseKey(data)
	if err != nil {
		clear(data)
		return Key{}, fmt.Errorf("read the %s key %s: %w: %w", role, filepath.Join(s.dir, name), errDamaged, err)
	}
	return Key{Role: role, PEM: data, Signer: signer}, nil
}
