// Package keystore stores the private keys of certificates on disk. It removes a key only when
// nothing can need it any more.
//
// A certificate has a current key, which servers may read directly; a pending key for each job
// whose CSR may have been signed; and a previous key. The files are named
//
//	<certificate>.key                current
//	<certificate>.<job tag>.pending  made for the CSR of one job
//	<certificate>.previous           current until the last promotion
//
// Requesting a certificate never touches the current key. A pending key becomes current only
// together with the certificate that was issued for it, as part of the transaction that installs
// both. Its pending file is removed once the certificates of two later CSRs have been deployed.
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
	// maxFile bounds the size of a key file, in bytes. An RSA-16384 key takes 13 KiB.
	maxFile = 64 << 10

	// maxPending bounds the pending keys of one certificate. A CSR that keeps failing under new job
	// ids leaves one key each time. The key whose CSR was submitted longest ago is removed first.
	maxPending = 32

	// maxPendingTotal bounds the pending keys of all certificates, because certificate ids come
	// from the control plane. At the limit, a new pending key replaces an older one of its
	// certificate.
	maxPendingTotal = 32768

	// FileMode is the mode of every key file, from its creation on.
	FileMode fs.FileMode = 0o600
)

// ErrNoKey means that none of the keys that this agent holds for the certificate belongs to it.
var ErrNoKey = errors.New("none of this agent's private keys belongs to the certificate")

// Role says what a key is to its certificate.
type Role string

// The roles of a key.
const (
	Current  Role = "current"
	Pending  Role = "pending"
	Previous Role = "previous"
)

// Key is a private key in the store.
type Key struct {
	Role   Role
	PEM    []byte // SEC1 for ECDSA, PKCS #8 for others, as in existing fleets
	Signer crypto.Signer
	Fresh  bool // made by this call of Pending: no CSR for it has been sent
}

// Clear overwrites the encoded key.
func (k *Key) Clear() { clear(k.PEM) }

// Change is a file of the store and its new content.
type Change struct {
	Path string // absolute
	Data []byte // the caller clears it after use
}

// Store is a key directory. It is safe for concurrent use. It accesses files through an os.Root, so
// that no name leads out of the directory.
type Store struct {
	dir  string // absolute
	root *os.Root
	lock *filelock.Lock // nil if the file system has no locks
	log  *slog.Logger
	busy chan struct{} // holds one element while pending keys are listed and changed

	totalLimit int // maxPendingTotal
}

// Open creates the key directory if it is missing, opens and locks it, and removes the access of
// other users. It fails if other users seem to need their access (see Inspect), and with a
// *filelock.HeldError if another process has the directory open.
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

// Look opens the key directory for Find alone: it creates nothing, changes nothing and takes no
// lock.
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

// Close releases the lock and the directory.
func (s *Store) Close() error {
	s.lock.Close()
	return s.root.Close()
}

// tighten removes the access of other users to the directory. A volume whose group is set from
// outside, as Kubernetes does, may refuse that.
func (s *Store) tighten() error {
	info, err := s.root.Stat(".")
	if err != nil {
		return fmt.Errorf("look at the key directory: %w", err)
	}
	// Mode 0700 does not help against the owner. A foreign owner is not an error: the agent
	// may have run as that user before.
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
	// Some file systems accept a chmod and ignore it.
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
		return fmt.Errorf("every user has access to the key directory %s (%v), and that cannot be changed: %w; run chmod 0700 on it", s.dir, is, refusal)
	}
	return nil
}

// hold waits for the right to list and change pending keys.
func (s *Store) hold() (release func()) {
	s.busy <- struct{}{}
	return func() { <-s.busy }
}

// Path returns the path of a certificate's current key.
func (s *Store) Path(certID api.ID) string { return CurrentPath(s.dir, certID) }

// CurrentPath returns the path of a certificate's current key in the key directory dir.
func CurrentPath(dir string, certID api.ID) string {
	return filepath.Join(dir, string(certID)+currentExt)
}

// PreviousPath returns the path of a certificate's previous key, given the path of its current key.
func PreviousPath(current string) string {
	return strings.TrimSuffix(current, currentExt) + previousExt
}

// Pending returns the key for the CSR of a job: the one made for the job before, or else a new one
// from generate. When Pending returns, the key is on disk and has the highest sequence of its
// certificate's pending keys.
func (s *Store) Pending(certID, jobID api.ID, generate func() (crypto.Signer, error)) (Key, error) {
	key, err := s.reuse(certID, jobID)
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	// Without the lock, because generating an RSA key may take seconds.
	signer, err := generate()
	if err != nil {
		return Key{}, fmt.Errorf("make a private key: %w", err)
	}
	key, err = s.store(certID, jobID, signer)
	if errors.Is(err, fs.ErrExist) {
		// On a file system without locks, another agent may have been faster. Use its key, because
		// its CSR may have been signed.
		return s.reuse(certID, jobID)
	}
	return key, err
}

// reuse returns the key that the job has already, or fs.ErrNotExist.
func (s *Store) reuse(certID, jobID api.ID) (Key, error) {
	defer s.hold()()
	name := pendingName(certID, jobID)
	p, err := s.readPending(name)
	if errors.Is(err, errDamaged) {
		// The key was complete when its CSR was sent, so the damage is not from a crash of the
		// agent. The key is lost, even if its CSR was signed. The control plane is waiting for a
		// CSR, which needs a new key.
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
		// The process that wrote the key may have been killed before this sync.
		if err := atomicfile.SyncDir(s.root, "."); err != nil {
			return Key{}, fmt.Errorf("store the pending key %s: %w", name, err)
		}
		return p.key()
	}
	if p.sequence, err = nextSequence(all); err != nil {
		return Key{}, err
	}
	// The file holds the same key, so replacing it loses nothing.
	if err := s.writePending(p, atomicfile.WriteFile); err != nil {
		return Key{}, err
	}
	return p.key()
}

// store writes a new pending key, and removes old ones beyond the limits.
func (s *Store) store(certID, jobID api.ID, signer crypto.Signer) (Key, error) {
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
		s.log.Warn("there are too many pending keys: the one of this certificate whose CSR was sent longest ago is removed",
			"certificate", certID, "file", old.name, "limit", maxPending, "limit_in_all", s.totalLimit)
		if err := s.remove(old.name); err != nil {
			return Key{}, fmt.Errorf("remove a pending key: %w", err)
		}
	}
	key, err := p.key()
	key.Fresh = true
	return key, err
}

// Discard removes the pending key of a job. Call it only if the CSR was certainly not signed.
func (s *Store) Discard(certID, jobID api.ID) error {
	defer s.hold()()
	if err := s.remove(pendingName(certID, jobID)); err != nil {
		return fmt.Errorf("discard a pending key: %w", err)
	}
	return nil
}

// Find returns the certificate's key that has the given public key. It returns ErrNoKey if it could
// read every key and none of them does.
func (s *Store) Find(certID api.ID, public crypto.PublicKey) (Key, error) {
	defer s.hold()()
	var compared []string
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
		compared = append(compared, "the "+string(role)+" one")
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
		compared = append(compared, fmt.Sprintf("%d pending", len(pending)))
	}
	if len(unreadable) > 0 {
		return Key{}, fmt.Errorf("find the private key of certificate %s: %w", certID, errors.Join(unreadable...))
	}
	if len(compared) == 0 {
		return Key{}, fmt.Errorf("%w: it holds none for this certificate id", ErrNoKey)
	}
	return Key{}, fmt.Errorf("%w: compared with %s", ErrNoKey, strings.Join(compared, ", "))
}

// Promotion returns the files that make key the current one and the old current key the previous
// one, in the order in which they must be written. It returns nil if key is current already.
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
		// The damaged key must not replace a good previous key.
		s.log.Error("the current key is damaged: it is replaced and not kept as the previous one", "certificate", certID, "error", err)
		return []Change{current}, nil
	case err != nil:
		return nil, err
	}
	previous := Change{Path: PreviousPath(current.Path), Data: old.PEM}
	return []Change{previous, current}, nil
}

// Promote makes key the current one at once, for a certificate without a target. A crash at any
// point loses no key.
func (s *Store) Promote(certID api.ID, key Key) error {
	if key.Role == Previous {
		// The old current key is about to replace it in its file. So make a copy, which counts as
		// the oldest pending key and is removed by the next Prune.
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

// Prune removes the pending keys that are obsolete once a certificate is deployed: those whose CSRs
// were sent before the CSRs of both the deployed and the previous key. It waits for the second
// deployment, because a CSR that was sent earlier may arrive, and be signed, later. It also keeps
// the pending copies of the deployed and the previous key: a later recovery of another target of
// the certificate may roll the current key back.
func (s *Store) Prune(certID api.ID, deployed Key) error {
	defer s.hold()()
	pending, _, err := s.pending(certID)
	if err != nil {
		return err
	}
	previous, err := s.read(certID, Previous)
	if err != nil {
		return nil // without it nobody knows how far back to keep
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

// lastSent returns the highest sequence of the pending keys with the given public key.
func lastSent(pending []pendingKey, public crypto.PublicKey) (sequence uint64, ok bool) {
	for _, p := range slices.Backward(pending) {
		if p.err == nil && pemutil.SamePublicKey(p.signer.Public(), public) {
			return p.sequence, true
		}
	}
	return 0, false
}

// remove removes a pending key and the damaged one that was set aside under its name.
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
