package transaction

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"certctl-agent/internal/connector"
)

// TestPreview checks that a preview shows what a deployment would do, and changes nothing.
func TestPreview(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	check(t, os.Symlink("cert.pem", w.path("site/link.pem")))
	at := &elsewhere{values: map[string]string{"/a/one": "new"}}
	tx := w.remoteRenewal(at, "new")
	tx.Files[1].Path = w.path("site/link.pem")
	before := w.tree(t)
	got := NewPreview(context.Background(), tx.Deployment, &tx.proposal, w.policy())
	if after := w.tree(t); !slices.Equal(before, after) || len(at.calls) > 0 {
		t.Errorf("it changed something: %v, then %v; calls %v", before, after, at.calls)
	}
	if len(got.Problems) > 0 {
		t.Errorf("problems %q", got.Problems)
	}
	owner := fmt.Sprintf("%d:%d", os.Geteuid(), os.Getegid())
	keyOwner := owner
	if root() {
		keyOwner = fmt.Sprintf("%d:%d", uidKeep, gidKeep)
	}
	want := []FilePreview{
		{Path: w.path("private/key.pem"), Real: w.path("private/key.pem"), OldMode: "0640", NewMode: "0640", OldOwner: keyOwner, NewOwner: keyOwner, Changes: true, Secret: true},
		{Path: w.path("site/link.pem"), Real: w.path("site/cert.pem"), OldMode: "0640", NewMode: "0640", OldOwner: owner, NewOwner: owner, Changes: true},
		{Path: w.path("site/chain.pem"), Real: w.path("site/chain.pem"), NewMode: "0644", NewOwner: owner, Changes: true},
	}
	for i := range want {
		want[i].Size = len(tx.Files[i].Data)
	}
	if !slices.Equal(got.Files, want) {
		t.Errorf("got %+v\nwant %+v", got.Files, want)
	}
	if want := []ChangePreview{{Name: "/a/one"}, {Name: "two", Changes: true}}; !slices.Equal(got.Changes, want) {
		t.Errorf("got %+v, want %+v", got.Changes, want)
	}
}

// TestPreviewProblems checks that a preview reports all problems at once.
func TestPreviewProblems(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.write(t, "site/motd", []byte("hello\n"), 0o644)
	at := &elsewhere{values: map[string]string{}, fail: map[string]error{"read two": errors.New("no answer")}}
	tx := w.remoteRenewal(at, "new")
	tx.Files = append(tx.Files,
		connector.File{Path: "/etc/shadow"}, connector.File{Path: w.path("site/motd"), Data: []byte("x")}, connector.File{Path: w.path("nowhere/x")},
		connector.File{Path: w.path("site/chain.pem")})
	got := NewPreview(context.Background(), tx.Deployment, &tx.proposal, w.policy())
	all := strings.Join(got.Problems, "\n")
	for _, says := range []string{"/etc/shadow is in none", "holds neither a certificate", "nowhere", "are the same file", "look at two: no answer"} {
		if !strings.Contains(all, says) {
			t.Errorf("got %s, want %q in it", all, says)
		}
	}
	if len(got.Problems) != 5 || got.Files[3].Problem == "" || got.Changes[1].Problem == "" {
		t.Errorf("got %+v", got)
	}
}

// tree lists the world's files with their modification times.
func (w world) tree(t *testing.T) []string {
	t.Helper()
	var all []string
	for _, dir := range []string{"state", "keys", "site", "private"} {
		entries, err := os.ReadDir(w.path(dir))
		check(t, err)
		for _, entry := range entries {
			info, err := entry.Info()
			check(t, err)
			all = append(all, dir+"/"+entry.Name()+" "+info.ModTime().String())
		}
	}
	return all
}
