package transaction

import (
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"strconv"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/hostfile"
	"certctl-agent/internal/policy"
)

// Preview is what a deployment would do to its target. Problems has all reasons why it would be
// refused; each is also the Problem of its file or change.
type Preview struct {
	Files    []FilePreview   `json:"files"`
	Changes  []ChangePreview `json:"changes"`
	Warnings []string        `json:"warnings"`
	Problems []string        `json:"problems"`
}

// FilePreview is one file that would be put in place.
type FilePreview struct {
	Path     string `json:"path"`                // as configured
	Real     string `json:"real,omitempty"`      // without symlinks; "": unknown
	OldMode  string `json:"old_mode,omitempty"`  // octal; "": there is no file
	NewMode  string `json:"new_mode,omitempty"`  // octal
	OldOwner string `json:"old_owner,omitempty"` // user and group numbers
	NewOwner string `json:"new_owner,omitempty"`
	Size     int    `json:"size"` // of the new content, in bytes
	Changes  bool   `json:"content_changes"`
	Secret   bool   `json:"holds_key"`
	Problem  string `json:"problem,omitempty"`
}

// ChangePreview is one Change that would be made.
type ChangePreview struct {
	Name    string `json:"name"`
	Changes bool   `json:"changes"`
	Problem string `json:"problem,omitempty"`
}

// NewPreview finds out what the plan of d would do under the given policy. It changes nothing,
// takes no lock, and needs no state directory.
func NewPreview(ctx context.Context, d Deployment, plan *connector.Plan, rules *policy.Policy) *Preview {
	a := &attempt{Engine: &Engine{opts: Options{Log: slog.New(slog.DiscardHandler)}}, Deployment: d, plan: plan}
	defer func() { closeAll(a.files) }()
	p := &Preview{Files: []FilePreview{}, Changes: []ChangePreview{}, Warnings: slices.Concat(plan.Warnings, plan.Caveats)}
	look := rules.Look()
	for i, file := range plan.Files {
		p.Files = append(p.Files, p.file(a, file, i, look))
	}
	if err := checkDistinct(a.files); err != nil {
		p.Problems = append(p.Problems, err.Error())
	}
	if err := a.collectChanges(); err != nil {
		p.Problems = append(p.Problems, err.Error())
	}
	for _, c := range a.changes {
		err := c.inspect(ctx)
		shown := ChangePreview{Name: c.Name, Changes: !c.same}
		if err != nil {
			shown.Problem = err.Error()
			p.Problems = append(p.Problems, "look at "+c.Name+": "+shown.Problem)
		}
		p.Changes = append(p.Changes, shown)
	}
	return p
}

// file previews one file.
func (p *Preview) file(a *attempt, file connector.File, i int, rules *policy.Look) FilePreview {
	shown := FilePreview{Path: file.Path, Size: len(file.Data), Secret: file.Kind.Secret(), Changes: true}
	refuse := func(err error) FilePreview {
		shown.Problem = err.Error()
		p.Problems = append(p.Problems, shown.Problem)
		return shown
	}
	f, err := openFile(file, rules)
	if err != nil {
		return refuse(err)
	}
	a.files = append(a.files, f)
	shown.Real = f.at.join(f.Name)
	warning, err := f.inspect(i)
	if err == nil {
		err = a.guard(f)
	}
	if err == nil && !f.upToDate() {
		err = f.mayPlace()
	}
	if warning != "" {
		p.Warnings = append(p.Warnings, warning)
	}
	shown.Size, shown.NewMode, shown.NewOwner = len(f.data), octal(f.want.Mode), ownerOf(f.want.UID, f.want.GID)
	if f.Old != nil {
		shown.OldMode, shown.OldOwner = octal(f.Old.Mode), ownerOf(f.Old.UID, f.Old.GID)
		shown.Changes = f.Old.Digest != digestOf(f.data)
	}
	if err != nil {
		return refuse(err)
	}
	return shown
}

// mayPlace returns an error if this process may not create the new file in its directory or change
// its owner. A deployment finds that out by trying.
func (f *dest) mayPlace() error {
	if err := hostfile.MayWriteIn(f.at.path); err != nil {
		return fmt.Errorf("%s: the agent's user cannot put files into %s: %w", f.Path, f.at.path, err)
	}
	if os.Geteuid() == 0 {
		return nil
	}
	if f.want.UID != -1 && f.want.UID != os.Geteuid() {
		return fmt.Errorf("%s: the agent's user cannot give the new file to user %d: only root can", f.Path, f.want.UID)
	}
	if groups, err := os.Getgroups(); err == nil && f.want.GID != -1 && f.want.GID != os.Getegid() && !slices.Contains(groups, f.want.GID) {
		return fmt.Errorf("%s: the agent's user cannot give the new file to group %d: it is not in it", f.Path, f.want.GID)
	}
	return nil
}

func octal(mode fs.FileMode) string { return "0" + strconv.FormatUint(uint64(mode.Perm()), 8) }

// ownerOf returns "UID:GID" of a file. -1 stands for the agent's own user or group.
func ownerOf(uid, gid int) string {
	if uid == -1 {
		uid = os.Geteuid()
	}
	if gid == -1 {
		gid = os.Getegid()
	}
	return strconv.Itoa(uid) + ":" + strconv.Itoa(gid)
}
