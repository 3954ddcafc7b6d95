package keystore

import (
	"bufio"
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	mathrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/csr"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/testing/needs"
)

func generate() (crypto.Signer, error) { return csr.GenerateKey("ecdsa-p256") }

func open(t *testing.T, dir string) *Store {
	t.Helper()
	return openLogged(t, dir, slog.New(slog.DiscardHandler))
}

func openLogged(t *testing.T, dir string, log *slog.Logger) *Store {
	t.Helper()
	s, err := Open(Owner{}, dir, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func do(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func pending(t *testing.T, s *Store, certID, jobID api.ID) Key {
	t.Helper()
	key, err := s.Pending(certID, jobID, generate)
	do(t, err)
	return key
}

func find(t *testing.T, s *Store, certID api.ID, key Key) Key {
	t.Helper()
	found, err := s.Find(certID, key.Signer.Public())
	do(t, err)
	return found
}

// deploy promotes a key as a transaction does.
func deploy(t *testing.T, s *Store, certID api.ID, key Key) {
	t.Helper()
	found := find(t, s, certID, key)
	changes, err := s.Promotion(certID, found)
	do(t, err)
	for _, change := range changes {
		do(t, os.WriteFile(change.Path, change.Data, 0o600))
	}
	do(t, s.Prune(certID, found))
}

func files(t *testing.T, dir string) []string {
	t.Helper()
	list, err := os.ReadDir(dir)
	do(t, err)
	var names []string
	for _, file := range list {
		if file.Name() != lockFile {
			names = append(names, file.Name())
		}
	}
	return names
}

func same(a, b Key) bool { return pemutil.SamePublicKey(a.Signer.Public(), b.Signer.Public()) }

func TestPending(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "keys")
	s := open(t, dir)
	first := pending(t, s, "cert-1", "job-1")
	if !first.Fresh || first.Role != Pending {
		t.Errorf("a new key: %+v", first)
	}
	again := pending(t, s, "cert-1", "job-1")
	other := pending(t, s, "cert-1", "job-2")
	s.Close()
	s = open(t, dir)
	restarted := pending(t, s, "cert-1", "job-1")
	if !same(first, again) || !same(first, restarted) || again.Fresh || restarted.Fresh {
		t.Error("a job did not get its key again")
	}
	if !bytes.Equal(first.PEM, restarted.PEM) {
		t.Errorf("the encoding of the key changed from\n%s to\n%s", first.PEM, restarted.PEM)
	}
	if same(first, other) {
		t.Error("two jobs share a key")
	}
	for _, name := range append(files(t, dir), ".") {
		info, err := os.Stat(filepath.Join(dir, name))
		do(t, err)
		if info.Mode().Perm()&0o077 != 0 {
			t.Errorf("mode of %s is %v", name, info.Mode())
		}
	}
	if _, err := s.Pending("../x", "job-1", generate); err == nil {
		t.Error("a key was made for an invalid certificate id")
	}
	if _, err := s.Pending("cert-1", "job-3", func() (crypto.Signer, error) { return nil, errors.ErrUnsupported }); err == nil {
		t.Error("a key was kept that was not made")
	}
}

func TestDiscard(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	key := pending(t, s, "cert-1", "job-1")
	do(t, s.Discard("cert-1", "job-1"))
	do(t, s.Discard("cert-1", "job-1"))
	if got := files(t, dir); len(got) > 0 {
		t.Errorf("left: %v", got)
	}
	if _, err := s.Find("cert-1", key.Signer.Public()); !errors.Is(err, ErrNoKey) {
		t.Errorf("got %v, want ErrNoKey", err)
	}
}

// TestFormsOfFleets finds keys in the encodings of existing fleets.
func TestFormsOfFleets(t *testing.T) {
	dir := t.TempDir()
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	do(t, err)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	do(t, err)
	sec1, err := x509.MarshalECPrivateKey(ec)
	do(t, err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(ec)
	do(t, err)
	parameters := "-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"
	tests := []struct {
		id, before, typ string
		der             []byte
		signer          crypto.Signer
	}{
		{"sec1", "", "EC PRIVATE KEY", sec1, ec},
		{"openssl", parameters, "EC PRIVATE KEY", sec1, ec},
		{"pkcs8", "", "PRIVATE KEY", pkcs8, ec},
		{"pkcs1", "", "RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(rsaKey), rsaKey},
	}
	for _, test := range tests {
		t.Run(test.id, func(t *testing.T) {
			data := append([]byte(test.before), pem.EncodeToMemory(&pem.Block{Type: test.typ, Bytes: test.der})...)
			do(t, os.WriteFile(filepath.Join(dir, test.id+".key"), data, 0o600))
			s := open(t, dir)
			key, err := s.Find(api.ID(test.id), test.signer.Public())
			do(t, err)
			if key.Role != Current || !bytes.Equal(key.PEM, data) {
				t.Errorf("got %v\n%s, want the current key as it is\n%s", key.Role, key.PEM, data)
			}
			if changes, err := s.Promotion(api.ID(test.id), key); err != nil || len(changes) > 0 {
				t.Errorf("promotion of the current key: %v, %v, want nothing to do", changes, err)
			}
		})
	}
}

// TestRounds renews a certificate three times.
func TestRounds(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	var keys []Key
	for i := range 3 {
		key := pending(t, s, "cert-1", api.ID(fmt.Sprint("job-", i)))
		keys = append(keys, key)
		deploy(t, s, "cert-1", key)
		deploy(t, s, "cert-1", key) // another target of the same certificate
		if got := find(t, s, "cert-1", key); got.Role != Current {
			t.Errorf("round %d: the deployed key is %v", i, got.Role)
		}
		if i > 0 {
			if got := find(t, s, "cert-1", keys[i-1]); got.Role != Previous {
				t.Errorf("round %d: the replaced key is %v", i, got.Role)
			}
		}
	}
	if _, err := s.Find("cert-1", keys[0].Signer.Public()); !errors.Is(err, ErrNoKey) {
		t.Errorf("the key of two rounds ago: %v, want ErrNoKey", err)
	}
	if got, want := files(t, dir), sorted(pendingName("cert-1", "job-1"), pendingName("cert-1", "job-2"), "cert-1.key", "cert-1.previous"); !slices.Equal(got, want) {
		t.Errorf("files %v, want %v", got, want)
	}
}

func sorted(names ...string) []string { return slices.Sorted(slices.Values(names)) }

// TestPrune checks that keys whose CSRs may have been signed after that of the deployed certificate
// are kept, and the others for one more round, because a CSR can arrive late.
func TestPrune(t *testing.T) {
	tests := []struct {
		name   string
		sent   []string // jobs, in the order of their CSRs
		deploy string
		kept   []string
	}{
		{"older ones go", []string{"a", "b", "c"}, "c", nil},
		{"newer ones stay", []string{"a", "b", "c"}, "b", []string{"c"}},
		{"sent again is newer", []string{"a", "b", "a"}, "b", []string{"a"}},
		{"sent again twice", []string{"a", "b", "a", "b", "b"}, "b", nil},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			keys := make(map[string]Key)
			for _, job := range test.sent {
				s := open(t, dir)
				keys[job] = pending(t, s, "cert-1", api.ID(job))
				s.Close()
			}
			s := open(t, dir)
			bystander := pending(t, s, "cert-1.x", "a")
			deploy(t, s, "cert-1", keys[test.deploy])
			for _, key := range keys {
				find(t, s, "cert-1", key)
			}
			deploy(t, s, "cert-1", pending(t, s, "cert-1", "next"))
			for job, key := range keys {
				found, err := s.Find("cert-1", key.Signer.Public())
				want := job == test.deploy || slices.Contains(test.kept, job)
				if (err == nil) != want {
					t.Errorf("key %s: %v, %v, want kept: %v", job, found.Role, err, want)
				}
			}
			find(t, s, "cert-1.x", bystander)
		})
	}
}

// TestPruneAfterCrash prunes after a crash between promotion and pruning.
func TestPruneAfterCrash(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	old := pending(t, s, "cert-1", "a")
	key := pending(t, s, "cert-1", "b")
	do(t, s.Promote("cert-1", key))
	if got := find(t, s, "cert-1", key); got.Role != Current {
		t.Fatalf("role %v, want current", got.Role)
	}
	deploy(t, s, "cert-1", key)
	next := pending(t, s, "cert-1", "c")
	deploy(t, s, "cert-1", next)
	if got, want := files(t, dir), sorted(pendingName("cert-1", "b"), pendingName("cert-1", "c"), "cert-1.key", "cert-1.previous"); !slices.Equal(got, want) {
		t.Errorf("files %v, want %v", got, want)
	}
	if _, err := s.Find("cert-1", old.Signer.Public()); !errors.Is(err, ErrNoKey) {
		t.Errorf("the older key: %v, want ErrNoKey", err)
	}
}

func TestPromotePrevious(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	first, second := pending(t, s, "cert-1", "a"), pending(t, s, "cert-1", "b")
	deploy(t, s, "cert-1", first)
	deploy(t, s, "cert-1", second)
	waiting := pending(t, s, "cert-1", "c")
	back := find(t, s, "cert-1", first)
	if back.Role != Previous {
		t.Fatalf("role %v, want previous", back.Role)
	}
	do(t, s.Promote("cert-1", back))
	do(t, s.Prune("cert-1", back))
	for _, test := range []struct {
		key  Key
		role Role
	}{{first, Current}, {second, Previous}, {waiting, Pending}} {
		if got := find(t, s, "cert-1", test.key); got.Role != test.role {
			t.Errorf("role %v, want %v", got.Role, test.role)
		}
	}
	deploy(t, s, "cert-1", waiting)
	next := pending(t, s, "cert-1", "d")
	deploy(t, s, "cert-1", next)
	if got, want := files(t, dir), sorted(pendingName("cert-1", "c"), pendingName("cert-1", "d"), "cert-1.key", "cert-1.previous"); !slices.Equal(got, want) {
		t.Errorf("files %v, want %v", got, want)
	}
}

// TestDamagedCurrent checks that a damaged current key does not replace a good previous key.
func TestDamagedCurrent(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	first, second := pending(t, s, "cert-1", "a"), pending(t, s, "cert-1", "b")
	deploy(t, s, "cert-1", first)
	deploy(t, s, "cert-1", second)
	third := pending(t, s, "cert-1", "c")
	do(t, os.WriteFile(s.Path("cert-1"), []byte("torn"), 0o600))
	deploy(t, s, "cert-1", third)
	if got := find(t, s, "cert-1", first); got.Role != Previous {
		t.Errorf("role %v, want previous", got.Role)
	}
}

func TestDamagedPending(t *testing.T) {
	dir := t.TempDir()
	var text bytes.Buffer
	s := openLogged(t, dir, slog.New(slog.NewTextHandler(&text, nil)))
	key := pending(t, s, "cert-1", "a")
	name := filepath.Join(dir, pendingName("cert-1", "a"))
	for _, damage := range []string{"", "torn"} {
		do(t, os.WriteFile(name, []byte(damage), 0o600))
		fresh := pending(t, s, "cert-1", "a")
		if !fresh.Fresh || same(fresh, key) {
			t.Error("no new key was made for a damaged one")
		}
		if got, err := os.ReadFile(name + damagedExt); err != nil || string(got) != damage {
			t.Errorf("set aside: %q, %v, want %q", got, err, damage)
		}
		key = fresh
	}
	if !strings.Contains(text.String(), "level=ERROR") || !strings.Contains(text.String(), filepath.Base(name)) {
		t.Errorf("log: %s", &text)
	}
	later, last := pending(t, s, "cert-1", "b"), pending(t, s, "cert-1", "c")
	deploy(t, s, "cert-1", later)
	deploy(t, s, "cert-1", last)
	if got, want := files(t, dir), sorted(pendingName("cert-1", "b"), pendingName("cert-1", "c"), "cert-1.key", "cert-1.previous"); !slices.Equal(got, want) {
		t.Errorf("files %v, want %v", got, want)
	}
}

func TestFindNothing(t *testing.T) {
	dir, outside := t.TempDir(), t.TempDir()
	s := open(t, dir)
	stranger, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	do(t, err)
	deploy(t, s, "full", pending(t, s, "full", "a"))
	deploy(t, s, "full", pending(t, s, "full", "b"))
	do(t, os.WriteFile(filepath.Join(outside, "key"), pending(t, s, "outside", "a").PEM, 0o600))
	do(t, os.Symlink(filepath.Join(outside, "key"), s.Path("link")))
	do(t, syscall.Mkfifo(s.Path("pipe"), 0o600))
	do(t, os.WriteFile(s.Path("huge"), make([]byte, maxFile+1), 0o600))
	tests := []struct {
		id    api.ID
		noKey bool
		want  string
	}{
		{"absent", true, "holds none"},
		{"full", true, "compared with the current one, the previous one, 2 pending"},
		{"link", false, "escapes"},
		{"pipe", false, "not a regular file"},
		{"huge", false, "longer than"},
		{"../x", false, "escapes"},
	}
	for _, test := range tests {
		_, err := s.Find(test.id, stranger.Public())
		if err == nil || errors.Is(err, ErrNoKey) != test.noKey || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v, want %q (ErrNoKey: %v)", test.id, err, test.want, test.noKey)
		}
	}
}

// TestFindPastUnreadable finds a key although another cannot be read.
func TestFindPastUnreadable(t *testing.T) {
	s := open(t, t.TempDir())
	key := pending(t, s, "cert-1", "a")
	do(t, os.WriteFile(s.Path("cert-1"), []byte("torn"), 0o600))
	if got := find(t, s, "cert-1", key); got.Role != Pending {
		t.Errorf("role %v, want pending", got.Role)
	}
}

func TestPendingAreBounded(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	first, second := pending(t, s, "cert-1", "a"), pending(t, s, "cert-1", "b")
	for i := range maxPending - 1 {
		pending(t, s, "cert-1", api.ID(fmt.Sprint("job-", i)))
	}
	if got := len(files(t, dir)); got != maxPending {
		t.Errorf("%d pending keys, want %d", got, maxPending)
	}
	if _, err := s.Find("cert-1", first.Signer.Public()); !errors.Is(err, ErrNoKey) {
		t.Errorf("the oldest: %v, want ErrNoKey", err)
	}
	find(t, s, "cert-1", second)

	s.totalLimit = 100
	for i := len(files(t, dir)); i < s.totalLimit; i++ {
		do(t, os.WriteFile(filepath.Join(dir, pendingName(api.ID(fmt.Sprint("other-", i)), "x")), nil, 0o600))
	}
	if _, err := s.Pending("cert-2", "a", generate); err == nil || !strings.Contains(err.Error(), "its limit") {
		t.Errorf("a certificate without pending keys: %v, want a refusal", err)
	}
	pending(t, s, "cert-1", "last")
	if got := len(files(t, dir)); got != s.totalLimit {
		t.Errorf("%d pending keys, want %d", got, s.totalLimit)
	}
}

func TestNamesDoNotCollide(t *testing.T) {
	tests := []struct {
		name, owner string
		ok          bool
	}{
		{pendingName("a", "j"), "a", true},
		{pendingName("a.b", "j"), "a.b", true},
		{pendingName(api.ID(pendingName("a", "j")), "j"), pendingName("a", "j"), true},
		{pendingName("a", "j") + damagedExt, "", false},
		{"a.key", "", false},
		{".0123456789abcdef.pending", "", false},
		{"0123456789abcdef.pending", "", false},
		{"a-0123456789abcdef.pending", "", false},
	}
	for _, test := range tests {
		if owner, ok := pendingOwner(test.name); owner != test.owner || ok != test.ok {
			t.Errorf("pendingOwner(%q) = %q, %v, want %q, %v", test.name, owner, ok, test.owner, test.ok)
		}
	}
}

func TestForeignDirectory(t *testing.T) {
	needs.Root(t, "giving files away")
	dir := t.TempDir()
	do(t, os.Chmod(dir, 0o700))
	for uid, warns := range map[int]bool{0: false, 1000: true} {
		do(t, os.Chown(dir, uid, -1))
		var text bytes.Buffer
		openLogged(t, dir, slog.New(slog.NewTextHandler(&text, nil))).Close()
		if got := strings.Contains(text.String(), "another user"); got != warns {
			t.Errorf("owner %d: log %q", uid, &text)
		}
	}
}

func TestOpen(t *testing.T) {
	dir := t.TempDir()
	keys := filepath.Join(dir, "keys")
	do(t, os.Mkdir(keys, 0o755))
	do(t, os.Chmod(keys, 0o755))
	left := filepath.Join(keys, ".cert-1.key.ABCDEFGHIJKLMNOPQRSTUVWXYZ.tmp")
	do(t, os.WriteFile(left, []byte("key"), 0o600))
	var text bytes.Buffer
	openLogged(t, keys, slog.New(slog.NewTextHandler(&text, nil)))
	info, err := os.Stat(keys)
	do(t, err)
	if got := info.Mode().Perm(); got != 0o700 {
		t.Errorf("mode %v, want 0700", got)
	}
	if !strings.Contains(text.String(), "closed") {
		t.Errorf("no warning: %s", &text)
	}
	if _, err := os.Stat(left); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a temporary file is still there: %v", err)
	}
	do(t, os.WriteFile(filepath.Join(dir, "file"), nil, 0o600))
	if _, err := Open(Owner{}, filepath.Join(dir, "file"), slog.New(slog.DiscardHandler)); err == nil {
		t.Error("a file was opened as a key directory")
	}
}

// TestUndone rolls an interrupted deployment back after another target of the same certificate has
// promoted the key.
func TestUndone(t *testing.T) {
	s := open(t, t.TempDir())
	old, key := pending(t, s, "cert-1", "a"), pending(t, s, "cert-1", "b")
	deploy(t, s, "cert-1", old)
	deploy(t, s, "cert-1", key)
	do(t, os.WriteFile(s.Path("cert-1"), old.PEM, 0o600))
	if got := find(t, s, "cert-1", key); got.Role != Pending {
		t.Errorf("role %v, want pending", got.Role)
	}
}

// crashDir makes this binary the child of TestKilled.
var crashDir = flag.String("crash-dir", "", "internal to TestKilled")

// TestKilled kills a process at random moments while it makes keys. Each key that Pending has
// returned must be on disk, and be returned to its job again.
func TestKilled(t *testing.T) {
	if *crashDir != "" {
		s := open(t, *crashDir)
		for i := 0; ; i++ {
			job := api.ID(fmt.Sprintf("job-%d-%d", os.Getpid(), i))
			key := pending(t, s, job, job)
			fmt.Println(job, fmt.Sprintf("%x", sha256.Sum256(key.PEM)))
		}
	}
	dir := t.TempDir()
	for round := range 5 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKilled$", "-crash-dir="+dir)
		out, err := cmd.StdoutPipe()
		do(t, err)
		do(t, cmd.Start())
		said := make(map[string]string)
		rest := 1 + mathrand.IntN(20)
		for lines := bufio.NewScanner(out); lines.Scan(); rest-- {
			if job, sum, ok := strings.Cut(lines.Text(), " "); ok {
				said[job] = sum
			}
			if rest == 0 {
				time.Sleep(mathrand.N(time.Millisecond))
				do(t, cmd.Process.Kill())
			}
		}
		cmd.Wait()
		s := open(t, dir)
		for name, sum := range said {
			job := api.ID(name)
			if key := pending(t, s, job, job); key.Fresh || fmt.Sprintf("%x", sha256.Sum256(key.PEM)) != sum {
				t.Errorf("round %d: %s has another key", round, job)
			}
		}
		for _, name := range files(t, dir) {
			if _, ok := pendingOwner(name); !ok {
				t.Errorf("round %d: left over: %s", round, name)
			}
		}
		s.Close()
	}
}

func TestConcurrent(t *testing.T) {
	s := open(t, t.TempDir())
	var group sync.WaitGroup
	for worker := range 4 {
		group.Go(func() {
			for i := range 4 {
				key, err := s.Pending("cert-1", api.ID(fmt.Sprint(worker, "-", i)), generate)
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := s.Find("cert-1", key.Signer.Public()); err != nil {
					t.Error(err)
				}
				if err := s.Discard("cert-1", api.ID(fmt.Sprint(worker, "-", i))); err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
}
