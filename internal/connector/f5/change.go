package f5

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"

	"certctl-agent/internal/vendorapi"
)

// change makes the profile use new files.
type change struct {
	*target
	keyType string // the device's name of it
	leaf    string // common prefix of the paths of the new files

	cert, key, chain *file // chain: nil if there is none

	seen *profile // by Read; nil if it was not called
}

// ID implements connector.Change.
func (c *change) ID() string {
	return c.ProfileType + " " + c.profile + " of " + c.device.address
}

// undo is the state that Restore needs. It holds no key: the old files stay on the device.
type undo struct {
	Profile *profile `json:"profile"`
	Had     []string `json:"had"` // this target's files
}

// Read implements connector.Change.
func (c *change) Read(ctx context.Context) (was []byte, same bool, err error) {
	p, err := c.read(ctx)
	if err != nil {
		return nil, false, err
	}
	in, _, err := c.find(ctx, p)
	if err != nil {
		return nil, false, err
	}
	if _, must := c.saves(); must && c.noted() != nothing {
		in = false // the profile may not be saved
	}
	all, err := c.ours(ctx)
	if err != nil {
		return nil, false, err
	}
	c.seen = p
	u := undo{Profile: p}
	for _, s := range all {
		u.Had = append(u.Had, s.Path)
	}
	if c.ProfileType == serverSSL && p.equal(new(profile)) && len(u.Had) == 0 {
		return nil, in, nil
	}
	was, err = json.Marshal(u)
	return was, in, err
}

// find returns the index of the entry with the new certificate's key type, or -1 if there is none,
// and whether it already uses the new files.
func (c *change) find(ctx context.Context, p *profile) (in bool, index int, err error) {
	for i, e := range c.pairs(p) {
		if !e.serves() || e.text("key") == "" {
			continue
		}
		key, err := c.device.get(ctx, sslKey, e.text("key"))
		if err != nil {
			return false, 0, err
		}
		if key == nil || key.KeyType != c.keyType && c.ProfileType == clientSSL {
			continue
		}
		in := key.Checksum == c.key.checksum()
		if in {
			in, err = c.holds(ctx, e.text("cert"), c.cert)
		}
		if in && err == nil {
			in, err = c.holds(ctx, e.text("chain"), c.chain)
		}
		return in, i, err
	}
	return false, -1, nil
}

// holds reports whether the file at path has the content of want. An empty path means no file.
func (c *change) holds(ctx context.Context, path string, want *file) (bool, error) {
	if path == "" || want == nil {
		return path == "" && want == nil, nil
	}
	s, err := c.device.get(ctx, sslCert, path)
	return s != nil && s.Checksum == want.checksum(), err
}

// Write implements connector.Change. A failed save or sync is only a warning, since Finish tries
// again, unless save_config is explicitly set.
func (c *change) Write(ctx context.Context) error {
	if c.noted() == nothing {
		if err := c.note(begun); err != nil {
			return err
		}
	}
	if err := c.install(ctx); err != nil {
		return err
	}
	err := c.finish(ctx)
	if _, must := c.saves(); must || errors.Is(err, errGone) {
		return err
	}
	return nil
}

// install uploads the files, makes the profile use them, and reads it back.
func (c *change) install(ctx context.Context) error {
	p, err := c.read(ctx)
	if err != nil {
		return err
	}
	in, index, err := c.find(ctx, p)
	if err != nil || in {
		return err
	}
	commands, err := c.send(ctx)
	if err != nil {
		return err
	}
	now, err := c.read(ctx) // sending takes seconds
	if err != nil {
		return err
	}
	if !now.equal(p) || c.seen != nil && !now.equal(c.seen) {
		return errors.New("someone else changed the profile meanwhile: check what it uses, and deploy again")
	}
	next := c.with(p, index)
	commands = append(commands, command{http.MethodPatch, c.profileURL(), c.set(next)})
	err = c.device.transact(ctx, commands)
	if err != nil && !isLost(err) {
		return fmt.Errorf("change the profile: %w", err)
	}
	in, readErr := c.inUse(context.WithoutCancel(ctx))
	switch {
	case in:
		return nil
	case err != nil:
		return fmt.Errorf("change the profile: %w", err)
	case readErr != nil:
		return readErr
	}
	return errors.New("the device accepted the change but the profile has another certificate: it may have just restarted, or someone else changed it")
}

// send uploads the files that the device does not have, and returns the commands that install them.
func (c *change) send(ctx context.Context) (commands []command, err error) {
	for _, f := range []*file{c.cert, c.key, c.chain} {
		if f == nil {
			continue
		}
		s, err := c.device.get(ctx, f.kind, f.path)
		if err != nil {
			return nil, err
		}
		if s != nil && s.Checksum == f.checksum() {
			continue
		}
		if err := c.device.upload(ctx, f.upload, f.data); err != nil {
			return nil, fmt.Errorf("upload %s: %w", f.upload, err)
		}
		source := "file:" + downloads + f.upload
		if s != nil {
			commands = append(commands, command{http.MethodPatch, f.url(), map[string]string{"sourcePath": source}})
			continue
		}
		commands = append(commands, command{http.MethodPost, collectionOf(f.kind),
			map[string]string{"name": filepath.Base(f.path), "partition": c.Partition, "sourcePath": source}})
	}
	return commands, nil
}

// with returns p with the new files in place of the entry at index, or in a new entry if index is
// -1.
func (c *change) with(p *profile, index int) *profile {
	chain := ""
	if c.chain != nil {
		chain = c.chain.path
	}
	if c.ProfileType == serverSSL {
		next := &profile{Cert: c.cert.path, Key: c.key.path, Chain: chain}
		if p.Passphrase != "" {
			next.Passphrase = none // it is for the old key
		}
		return next
	}
	next := p.clone()
	next.Inherit = "false"
	made := entry{"name": filepath.Base(c.inPartition(c.mark() + c.keyType)), "cert": c.cert.path, "key": c.key.path, "chain": orNone(chain)}
	if index < 0 {
		next.Entries = append(next.Entries, made)
		return next
	}
	made["name"] = p.Entries[index]["name"]
	if usage := p.Entries[index].text("usage"); usage != "" {
		made["usage"] = usage
	}
	next.Entries[index] = made
	return next
}

// discard removes the uploads.
func (c *change) discard(ctx context.Context) error {
	var errs []error
	for _, what := range []string{"key", "cert", "chain"} {
		errs = append(errs, c.device.discard(ctx, c.upload(what)))
	}
	return errors.Join(errs...)
}

// errGone means that the profile lost the change. The device may have restarted before it saved its
// configuration.
var errGone = errors.New("the profile lost the new certificate: the device may have just restarted, or someone else changed the profile: deploy again")

// finish completes the change of the profile: it removes the uploads, saves and syncs. It checks
// the profile last, since a unit that takes over at this moment has the old certificate and syncs
// it.
func (c *change) finish(ctx context.Context) error {
	unclean, unsaved := c.discard(ctx), c.save(ctx)
	var unsynced error
	if _, must := c.saves(); unsaved == nil || !must {
		unsynced = c.sync(ctx)
	}
	in, err := c.inUse(ctx)
	if err == nil && !in {
		err = errGone
	}
	if err = errors.Join(unclean, unsaved, unsynced, err); err != nil {
		return err
	}
	return c.note(nothing)
}

// save saves the configuration if configured. An undo must save again, unless the device refused to
// save.
func (c *change) save(ctx context.Context) error {
	if saves, _ := c.saves(); !saves {
		return nil
	}
	before := c.noted()
	if err := c.note(spread); err != nil {
		return err
	}
	err := c.device.save(ctx)
	if vendorapi.StatusOf(err) != 0 {
		return errors.Join(err, c.note(before))
	}
	return err
}

// sync syncs the configuration to the device group, if there is one.
func (c *change) sync(ctx context.Context) error {
	if c.DeviceGroup == "" {
		return nil
	}
	if err := c.note(spread); err != nil {
		return err
	}
	return c.device.sync(ctx, c.DeviceGroup)
}

// inUse reports whether the profile uses the new files.
func (c *change) inUse(ctx context.Context) (bool, error) {
	p, err := c.read(ctx)
	if err != nil {
		return false, err
	}
	in, _, err := c.find(ctx, p)
	return in, err
}

// Restore implements connector.Change.
func (c *change) Restore(ctx context.Context, was []byte) error {
	u := undo{Profile: new(profile)}
	if was != nil {
		if err := json.Unmarshal(was, &u); err != nil || u.Profile == nil {
			return errors.New("its backup cannot be read")
		}
	}
	if err := errors.Join(c.putBack(ctx, &u), c.discard(ctx)); err != nil {
		return err
	}
	return c.note(nothing)
}

func (c *change) putBack(ctx context.Context, u *undo) error {
	p, err := c.read(ctx)
	if err != nil {
		return err
	}
	next, err := c.without(ctx, p, u.Profile)
	if err != nil {
		return err
	}
	changed := !next.equal(p)
	if changed {
		err := repeat(ctx, func() error {
			return c.device.do(ctx, request{method: http.MethodPatch, path: c.profileURL(), sent: c.set(next)}, nil)
		})
		if err != nil {
			return fmt.Errorf("restore the old certificate in the profile: %w", err)
		}
	}
	if err := c.removeNew(ctx, u.Had); err != nil {
		return err
	}
	if c.noted() != begun {
		return errors.Join(c.save(ctx), c.sync(ctx))
	}
	if changed { // someone else may have saved or synced the change meanwhile
		_, _ = c.save(ctx), c.sync(ctx)
	}
	return nil
}

// without returns p with the old entries in place of this target's. Changes by others stay.
func (c *change) without(ctx context.Context, p, was *profile) (*profile, error) {
	if c.ProfileType == serverSSL {
		if _, ours := c.isOurs(p.Cert); !ours && !p.equal(was) {
			return nil, errors.New("someone else has changed the profile since, so it was left alone: check what it uses")
		}
		next := was.clone()
		if p.Passphrase != "" && was.Passphrase == "" {
			next.Passphrase = none
		}
		return next, nil
	}
	contains := func(list []entry, e entry) bool { return slices.ContainsFunc(list, e.same) }
	next := p.clone()
	next.Entries = slices.DeleteFunc(next.Entries, func(e entry) bool {
		_, ours := c.isOurs(e.text("cert"))
		return ours && !contains(was.Entries, e)
	})
	if len(next.Entries) == len(p.Entries) {
		return p, nil // it has no entry of this target
	}
	// An entry that someone else has added meanwhile replaces an old one with the same type of key.
	taken := make(map[string]bool)
	for _, e := range next.Entries {
		kind, err := c.keyTypeOf(ctx, e)
		if err != nil {
			return nil, err
		}
		taken[kind] = true
	}
	for i, e := range was.Entries {
		kind, err := c.keyTypeOf(ctx, e)
		if err != nil {
			return nil, err
		}
		if !contains(next.Entries, e) && !taken[kind] {
			next.Entries = slices.Insert(next.Entries, min(i, len(next.Entries)), e)
		}
	}
	if next.Inherit = "false"; slices.EqualFunc(next.Entries, was.Entries, entry.same) {
		next.Inherit = was.Inherit
	}
	return next, nil
}

// keyTypeOf returns the usage and key type of an entry.
func (c *change) keyTypeOf(ctx context.Context, e entry) (string, error) {
	if e.text("key") == "" {
		return "", nil
	}
	key, err := c.device.get(ctx, sslKey, e.text("key"))
	if err != nil || key == nil {
		return e.text("usage") + " " + e.text("key"), err
	}
	return e.text("usage") + " " + key.KeyType, nil
}

// removeNew removes this target's files except those in had.
func (c *change) removeNew(ctx context.Context, had []string) error {
	all, err := c.ours(ctx)
	if err != nil {
		return err
	}
	for _, s := range all {
		if slices.Contains(had, s.Path) {
			continue
		}
		if _, err := c.remove(ctx, s); err != nil {
			return err
		}
	}
	return nil
}

// Finish implements connector.Change.
func (c *change) Finish(ctx context.Context) error {
	err := c.sweep(ctx)
	if c.noted() != nothing {
		err = errors.Join(err, c.finish(ctx))
	}
	return err
}

// sweep removes this target's files of older certificates, except the newest ones and those in use.
// It continues after an error.
func (c *change) sweep(ctx context.Context) error {
	all, err := c.ours(ctx)
	if err != nil {
		return err
	}
	sets := make(map[string][]*stored)
	newest := make(map[string]string) // RFC 3339 in UTC sorts as text
	for _, s := range all {
		leaf, _ := c.isOurs(s.Path)
		if leaf == c.leaf && (s.Path == c.cert.path || s.Path == c.key.path || c.chain != nil && s.Path == c.chain.path) {
			continue
		}
		sets[leaf] = append(sets[leaf], s)
		newest[leaf] = max(newest[leaf], s.Created)
	}
	var order []string
	for leaf := range sets {
		if leaf != c.leaf { // old chains of this certificate are always removed
			order = append(order, leaf)
		}
	}
	slices.SortFunc(order, func(a, b string) int { return cmp.Or(cmp.Compare(newest[b], newest[a]), cmp.Compare(a, b)) })
	var old []*stored
	for _, leaf := range append(order[min(c.keep, len(order)):], c.leaf) {
		old = append(old, sets[leaf]...)
	}
	var first error
	for _, s := range old[:min(len(old), maxSwept)] {
		removed, err := c.remove(ctx, s)
		if removed {
			err = c.note(spread)
		}
		first = cmp.Or(first, err)
	}
	return first
}
