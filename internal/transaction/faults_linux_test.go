package transaction

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"certctl-agent/internal/hostfile"
	"certctl-agent/internal/policy"
	"certctl-agent/internal/testing/needs"
)

// inNamespace runs the calling test again in a child with its own mount namespace. It returns false
// in the parent, where the test is then done.
func inNamespace(t *testing.T) bool {
	t.Helper()
	needs.Root(t, "mounting")
	if os.Getenv("FILESET_MOUNTS") != "" {
		// Otherwise the mounts would appear in the parent's namespace too.
		check(t, syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""))
		return true
	}
	child := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	child.Env = append(os.Environ(), "FILESET_MOUNTS=1")
	child.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	out, err := child.CombinedOutput()
	if errors.Is(err, syscall.EPERM) {
		needs.Missing(t, "cannot create a mount namespace: "+err.Error())
	}
	if err != nil || !bytes.Contains(out, []byte("--- PASS")) {
		t.Errorf("in the child: %v\n%s", err, out)
	}
	return false
}

// TestMountedFile mounts a file onto a destination, as containers do.
func TestMountedFile(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	for _, fails := range []bool{false, true} {
		w := newWorld(t, t.TempDir())
		w.old(t)
		before, after := pairs()
		w.write(t, "keys/mounted", before.key, 0o640)
		check(t, os.Chown(w.path("keys/mounted"), uidKeep, gidKeep))
		check(t, syscall.Mount(w.path("keys/mounted"), w.path("private/key.pem"), "", syscall.MS_BIND, ""))
		tx := w.renewal()
		want := after.key
		if fails {
			tx.Reload.Command = &policy.Command{Argv: []string{"fail"}}
			want = before.key
		}
		if _, err := w.deploy(t, tx); (err != nil) != fails {
			t.Errorf("got error %v", err)
		}
		if got, err := os.ReadFile(w.path("keys/mounted")); err != nil || !bytes.Equal(got, want) {
			t.Errorf("the mounted file holds %d bytes, %v; want %d", len(got), err, len(want))
		}
		check(t, os.Remove(w.path("keys/mounted")))
		if got := w.condition(false); got != map[bool]string{false: "new", true: "old"}[fails] {
			t.Errorf("in place: %s", got)
		}

		// In another user's directory the deployment is refused, because the file could be a link
		// to any other file.
		check(t, os.Chown(w.path("private"), uidKeep, gidKeep))
		tx.Files[0].Data = append(bytes.Clone(want), '\n')
		_, err := w.deploy(t, tx)
		_, broken := errors.AsType[*BrokenError](err)
		if broken || !errors.Is(err, syscall.EBUSY) || !strings.Contains(err.Error(), "other users can write") {
			t.Errorf("in another user's directory: %v", err)
		}
		check(t, syscall.Unmount(w.path("private/key.pem"), 0))
	}
}

// TestDiskFull fills the disk at different moments.
func TestDiskFull(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	fill := func(t *testing.T, dir string) {
		f, err := os.Create(filepath.Join(dir, "fill"))
		check(t, err)
		defer f.Close()
		for chunk := make([]byte, 4096); err == nil; {
			_, err = f.Write(chunk)
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
	}
	small := func(t *testing.T, w world, name string, kib int) {
		check(t, syscall.Mount("none", w.path(name), "tmpfs", 0, fmt.Sprintf("size=%dk,mode=755", kib)))
		t.Cleanup(func() { _ = syscall.Unmount(w.path(name), syscall.MNT_DETACH) })
	}
	t.Run("second file", func(t *testing.T) {
		w := newWorld(t, t.TempDir())
		small(t, w, "site", 8)
		w.old(t)
		tx := w.renewal()
		tx.Files[1].Data = bytes.Repeat([]byte{'x'}, 8<<10)
		_, err := w.deploy(t, tx)
		if !errors.Is(err, syscall.ENOSPC) || !strings.HasSuffix(err.Error(), "site/cert.pem: no space left on device; nothing was changed") {
			t.Errorf("got error %v", err)
		}
		w.want(t, false, "old")
	})
	t.Run("backup", func(t *testing.T) {
		w := newWorld(t, t.TempDir())
		small(t, w, "state", 24)
		w.old(t)
		s := w.mustEngine(t, nil)
		fill(t, w.path("state"))
		_, err := s.deploy(t.Context(), w.renewal())
		if !errors.Is(err, syscall.ENOSPC) || !strings.HasSuffix(err.Error(), "nothing was changed") {
			t.Errorf("got error %v", err)
		}
		w.want(t, false, "old")
	})
	t.Run("rollback", func(t *testing.T) {
		// If the disk is full everywhere during the rollback, the new files are overwritten in
		// place.
		w := newWorld(t, t.TempDir())
		small(t, w, "site", 64)
		small(t, w, "state", 256)
		w.old(t)
		tx := w.renewal()
		tx.Verify = func(context.Context) error {
			fill(t, w.path("site"))
			fill(t, w.path("state"))
			return errors.New("is broken")
		}
		_, err := w.deploy(t, tx)
		if err == nil || err.Error() != "verification failed: is broken; the previous certificate is back in place" {
			t.Errorf("got error %v", err)
		}
		check(t, os.Remove(w.path("site/fill")))
		check(t, os.Remove(w.path("state/fill")))
		if err := (scenario{}).recovered(w, true); err != nil {
			t.Error(err)
		}
	})
}

// TestReadOnly deploys to a file system that is read-only from the start, and to one that becomes
// read-only before the rollback.
func TestReadOnly(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	w := newWorld(t, t.TempDir())
	remount := func(flags uintptr) {
		check(t, syscall.Mount(w.path("site"), w.path("site"), "", syscall.MS_BIND|syscall.MS_REMOUNT|flags, ""))
	}
	check(t, syscall.Mount(w.path("site"), w.path("site"), "", syscall.MS_BIND, ""))
	w.old(t)
	remount(syscall.MS_RDONLY)
	tx := w.renewal()
	if look := NewPreview(t.Context(), tx.Deployment, &tx.proposal, w.policy()); len(look.Problems) != 2 || !strings.Contains(look.Problems[0], "read-only file system") {
		t.Errorf("the preview has the problems %q", look.Problems)
	}
	_, err := w.deploy(t, w.renewal())
	if !errors.Is(err, syscall.EROFS) || !strings.HasSuffix(err.Error(), "read-only file system; nothing was changed") {
		t.Errorf("got error %v", err)
	}
	w.want(t, false, "old")

	remount(0)
	tx = w.renewal()
	tx.Verify = func(context.Context) error { remount(syscall.MS_RDONLY); return errors.New("is broken") }
	s := w.mustEngine(t, nil)
	_, err = s.deploy(t.Context(), tx)
	broken, ok := errors.AsType[*BrokenError](err)
	if !ok || !errors.Is(err, syscall.EROFS) || !strings.Contains(err.Error(), "needs attention") || !strings.Contains(err.Error(), w.path("site/cert.pem")) {
		t.Fatalf("got error %v", err)
	}
	before, _ := pairs()
	if got, err := os.ReadFile(broken.Backups + "/3-cert.pem"); err != nil || !bytes.Equal(got, before.cert) {
		t.Errorf("the backup holds %d bytes, %v", len(got), err)
	}
	remount(0)
	if err := (scenario{}).recovered(w, true); err != nil {
		t.Error(err)
	}
	check(t, syscall.Unmount(w.path("site"), syscall.MNT_DETACH))
}

// asUser returns a command that runs a part of the test as an ordinary user.
func asUser(t *testing.T, part string, env ...string) *exec.Cmd {
	t.Helper()
	needs.Root(t, "acting as two users")
	// Through this path even a user without access to the directory of the test binary can run it.
	child := exec.Command("/proc/self/exe")
	child.Env = append(env, "TRANSACTION_CHILD="+part, "OLD="+pemOf(0), "NEW="+pemOf(1))
	child.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}, Pdeathsig: syscall.SIGKILL}
	return child
}

// publicDir returns a temporary directory that every user can enter.
func publicDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	check(t, os.Chmod(filepath.Dir(dir), 0o755))
	return dir
}

// TestOrdinaryUser checks that an unprivileged agent works in its own directories, and reports
// which permissions it lacks in others.
func TestOrdinaryUser(t *testing.T) {
	own := func(t *testing.T, w world) {
		check(t, filepath.WalkDir(w.base, func(path string, _ fs.DirEntry, err error) error {
			return errors.Join(err, os.Lchown(path, 65534, 65534))
		}))
	}
	tests := []struct {
		name    string
		prepare func(t *testing.T, w world)
		want    string // in the error; "": no error
	}{
		{"own", func(t *testing.T, w world) {}, ""},
		{"read-only directory", func(t *testing.T, w world) { check(t, os.Chown(w.path("site"), 0, 0)) }, "site/cert.pem: permission denied; nothing was changed"},
		{"unreadable file", func(t *testing.T, w world) {
			check(t, os.Chown(w.path("private/key.pem"), 0, 0))
		}, "private/key.pem: the agent's user cannot read the existing file"},
		{"another owner", func(t *testing.T, w world) {
			check(t, os.Chown(w.path("site/cert.pem"), 0, 0))
			check(t, os.Chmod(w.path("site/cert.pem"), 0o644))
		}, "change its owner to user 0, group 0: operation not permitted"},
		{"hidden directory", func(t *testing.T, w world) {
			check(t, os.Chown(w.path("site"), 0, 0))
			check(t, os.Chmod(w.path("site"), 0o711))
		}, "site: permission denied (the agent's user must be able to list it)"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t, publicDir(t))
			before, _ := pairs()
			w.write(t, "site/cert.pem", before.cert, 0o640)
			w.write(t, "private/key.pem", before.key, 0o640)
			w.write(t, "keys/c1.key", before.key, 0o600)
			child := asUser(t, "deploy", "BASE="+w.base)
			own(t, w)
			test.prepare(t, w)
			out, err := child.Output()
			if err != nil {
				t.Fatalf("child: %v", err)
			}
			if got := string(out); !strings.Contains(got, test.want) || test.want == "" && got != "" || strings.Contains(got, "preview") {
				t.Errorf("error %q, want %q", got, test.want)
			}
			if left := w.leftovers(); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
			_, after := pairs()
			want := before.cert
			if test.want == "" {
				want = after.cert
			}
			if got, err := os.ReadFile(w.path("site/cert.pem")); err != nil || !bytes.Equal(got, want) {
				t.Errorf("certificate in place: %d bytes, %v", len(got), err)
			}
		})
	}
}

func childDeploy() int {
	w := world{os.Getenv("BASE")}
	s, err := w.engine(nil)
	if err == nil {
		tx := w.renewal()
		look := NewPreview(context.Background(), tx.Deployment, &tx.proposal, w.policy())
		if _, err = s.deploy(context.Background(), tx); (err != nil) != (len(look.Problems) > 0) {
			fmt.Printf("the preview had the problems %q. ", look.Problems)
		}
	}
	if err != nil {
		fmt.Print(err)
	}
	return 0
}

// TestHostileOwner deploys as root, again and again, into directories whose owner keeps replacing
// them and their files by links to the outside. Nothing outside may ever be written.
func TestHostileOwner(t *testing.T) {
	w := newWorld(t, publicDir(t))
	victim := map[string][]byte{"victim/cert.pem": []byte("precious"), "victim/key.pem": []byte("precious too")}
	check(t, os.Mkdir(w.path("victim"), 0o755))
	for name, data := range victim {
		w.write(t, name, data, 0o644)
	}
	// The hostile user owns the parent directory too, and so can rename the directories.
	check(t, os.MkdirAll(w.path("theirs/site"), 0o755))
	s := w.mustEngine(t, nil)
	s.opts.Policy.Paths = []string{w.path("theirs")}
	child := asUser(t, "hostile", "BASE="+w.base)
	out, err := child.StdoutPipe()
	check(t, err)
	check(t, filepath.WalkDir(w.path("theirs"), func(path string, _ fs.DirEntry, err error) error {
		return errors.Join(err, os.Lchown(path, 65534, 65534))
	}))
	check(t, child.Start())
	defer child.Wait()
	defer child.Process.Kill()
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "started\n" {
		t.Fatalf("child said %q, %v", line, err)
	}

	succeeded, refused := 0, make(map[string]int)
	for end := time.Now().Add(1500 * time.Millisecond); time.Now().Before(end); {
		tx := w.renewal()
		tx.Promotion = nil
		tx.Files[0].Path, tx.Files[1].Path = w.path("theirs/site/key.pem"), w.path("theirs/site/cert.pem")
		tx.Files = tx.Files[:2]
		tx.Files[1].Data = fmt.Appendf(nil, "certificate %d", succeeded)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		_, err := s.deploy(ctx, tx)
		cancel()
		if err == nil {
			succeeded++
			continue
		}
		text := err.Error()
		refused[text[strings.LastIndex(text, ":")+1:]]++
	}
	check(t, child.Process.Kill())
	_ = child.Wait()
	t.Logf("%d deployments succeeded; others ended with %v", succeeded, refused)

	entries, err := os.ReadDir(w.path("victim"))
	check(t, err)
	if len(entries) != len(victim) {
		t.Errorf("the outside directory holds %v", entries)
	}
	for name, want := range victim {
		got, err := os.ReadFile(w.path(name))
		info, statErr := os.Stat(w.path(name))
		if err != nil || statErr != nil || !bytes.Equal(got, want) || info.Mode() != 0o644 {
			t.Errorf("%s: %q, %v, %v", name, got, info.Mode(), err)
		}
		if uid, _ := hostfile.Owner(info); uid != 0 {
			t.Errorf("%s was given to user %d", name, uid)
		}
	}
	if len(refused) < 2 {
		t.Errorf("the attack never had an effect: %v", refused)
	}
}

// childHostile replaces files and directories as fast as it can. Each round makes one attack, and
// undoes it half of the time.
func childHostile() int {
	base := os.Getenv("BASE")
	site, aside := base+"/theirs/site", base+"/theirs/aside"
	attacks := []func(){
		func() { _ = os.Rename(site, aside); _ = os.Symlink("../victim", site) },
		func() { _ = os.Rename(site, aside); _ = os.Symlink(base+"/victim", site) },
		func() { _ = os.Rename(site, aside); _ = syscall.Mkfifo(site, 0o666) },
		func() { _ = os.Remove(site + "/cert.pem"); _ = os.Symlink("../../victim/cert.pem", site+"/cert.pem") },
		func() { _ = os.Remove(site + "/cert.pem"); _ = os.Link(base+"/victim/cert.pem", site+"/cert.pem") },
		func() { _ = os.Remove(site + "/key.pem"); _ = syscall.Mkfifo(site+"/key.pem", 0o666) },
		func() { // every temporary becomes a link to the outside
			names, _ := filepath.Glob(site + "/.certctl-*")
			for _, name := range names {
				_ = os.Remove(name)
				_ = os.Symlink(base+"/victim/key.pem", name)
			}
		},
	}
	fmt.Println("started")
	for i := 0; ; i++ {
		attacks[i%len(attacks)]()
		if i%3 != 0 {
			continue
		}
		if info, err := os.Lstat(site); err == nil && !info.IsDir() {
			_ = os.Remove(site)
			_ = os.Rename(aside, site)
		}
		if i%5 == 0 {
			_ = os.Remove(site + "/cert.pem")
			_ = os.Remove(site + "/key.pem")
			time.Sleep(time.Duration(i%7) * time.Millisecond)
		}
	}
}
