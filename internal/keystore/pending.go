package keystore

import (
	"cmp"
	"crypto"
	"crypto/sha256"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"certctl-agent/internal/api"
	"certctl-agent/internal/hostfile"
	"certctl-agent/internal/pemutil"
)

const (
	currentExt  = ".key"
	previousExt = ".previous"
	pendingExt  = ".pending"
	damagedExt  = ".damaged"

	// tagLength is the length of the job tag in the name of a pending key, in hexadecimal digits.
	tagLength = 16

	// sequenceHeader is the PEM header of a pending key with the order in which CSRs were last
	// sent. Time stamps would be wrong after the clock is set back or the directory is copied.
	sequenceHeader = "Sequence"
)

// errDamaged means that a file exists but is not a private key.
var errDamaged = errors.New("it is not a private key")

// pendingKey is the file of a pending key.
type pendingKey struct {
	name     string
	sequence uint64
	signer   crypto.Signer
	err      error // why it could not be read; then only name is set
}

// key returns the key, encoded as it will be once it is current.
func (p pendingKey) key() (Key, error) {
	data, err := pemutil.EncodeKey(p.signer)
	return Key{Role: Pending, PEM: data, Signer: p.signer}, err
}

// pendingName returns the name of a job's pending key. It depends on the ids alone, so that a
// restarted agent finds the key again.
func pendingName(certID, jobID api.ID) string {
	return string(certID) + "." + fmt.Sprintf("%x", sha256.Sum256([]byte(jobID)))[:tagLength] + pendingExt
}

// pendingOwner returns the certificate of a pending key, given the name of its file. It parses the
// name from the right, because a certificate id may contain dots.
func pendingOwner(name string) (certID string, ok bool) {
	rest, ok := strings.CutSuffix(name, pendingExt)
	cut := len(rest) - tagLength - 1
	if !ok || cut < 1 || rest[cut] != '.' {
		return "", false
	}
	return rest[:cut], true
}

// pending returns the pending keys of a certificate, in the order in which their CSRs were last
// sent and with the unreadable ones first, and the number of pending keys of all certificates.
func (s *Store) pending(certID api.ID) (keys []pendingKey, total int, err error) {
	names, err := s.names()
	if err != nil {
		return nil, 0, fmt.Errorf("list the key directory: %w", err)
	}
	for _, name := range names {
		owner, ok := pendingOwner(name)
		if !ok {
			continue
		}
		total++
		if owner != string(certID) {
			continue
		}
		p, err := s.readPending(name)
		if err != nil {
			p = pendingKey{name: name, err: err}
		}
		keys = append(keys, p)
	}
	slices.SortFunc(keys, func(a, b pendingKey) int { return cmp.Compare(a.sequence, b.sequence) })
	return keys, total, nil
}

// names lists the key directory. Unlike ReadDir through an os.Root, it does not call stat for each
// file: there may be thousands, and every renewal needs the list.
func (s *Store) names() ([]string, error) {
	dir, err := s.root.Open(".")
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return dir.Readdirnames(-1)
}

// nextSequence returns a sequence above those of all given keys. It fails if the disk cannot read
// one of them at present, because that key could have any sequence.
func nextSequence(all []pendingKey) (uint64, error) {
	last := uint64(0)
	for _, p := range all {
		if p.err != nil && !errors.Is(p.err, errDamaged) {
			return 0, p.err
		}
		last = max(last, p.sequence)
	}
	return last + 1, nil
}

func (s *Store) readPending(name string) (pendingKey, error) {
	data, _, err := hostfile.ReadIn(s.root, name, maxFile)
	if err != nil {
		return pendingKey{}, fmt.Errorf("read the pending key %s: %w", name, err)
	}
	defer clear(data)
	signer, err := pemutil.ParseKey(data)
	if err != nil {
		return pendingKey{}, fmt.Errorf("read the pending key %s: %w: %w", name, errDamaged, err)
	}
	block, _ := pem.Decode(data)
	defer clear(block.Bytes)
	// Without a valid number the key counts as older than all others.
	sequence, _ := strconv.ParseUint(block.Headers[sequenceHeader], 10, 64)
	return pendingKey{name: name, sequence: sequence, signer: signer}, nil
}

// writePending writes a pending key with write, which is atomicfile.Create or atomicfile.WriteFile.
func (s *Store) writePending(p pendingKey, write func(*os.Root, string, []byte, fs.FileMode) error) error {
	plain, err := pemutil.EncodeKey(p.signer)
	if err != nil {
		return fmt.Errorf("store the pending key %s: %w", p.name, err)
	}
	defer clear(plain)
	block, _ := pem.Decode(plain)
	defer clear(block.Bytes)
	block.Headers = map[string]string{sequenceHeader: strconv.FormatUint(p.sequence, 10)}
	data := pem.EncodeToMemory(block)
	defer clear(data)
	if err := write(s.root, p.name, data, FileMode); err != nil {
		return fmt.Errorf("store the pending key %s: %w", p.name, err)
	}
	return nil
}
