package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"certctl-agent/internal/api"
	"certctl-agent/internal/app"
	"certctl-agent/internal/command"
	"certctl-agent/internal/hostfile"
	"certctl-agent/internal/keystore"
	"certctl-agent/internal/targetconf"
)

// minSpace is the minimum free space for backups, the ledger and the scan index, in bytes.
const minSpace = 64 << 20

func (c *checker) disk() {
	c.directory("key directory", c.config.KeyDir)
	c.directory("state directory", c.config.StateDir)
	if c.config.StateDir != "" && c.config.Server != nil {
		for _, warning := range app.AbandonedWarnings(c.config) {
			c.warn("earlier state", "", "%s", warning)
		}
	}
}

func (c *checker) directory(check, path string) {
	if path == "" {
		return
	}
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		parent := nearest(path)
		if err := hostfile.MayWriteIn(parent); err != nil {
			c.notWritable(check, err, "create it and make the agent's user its owner", path+" does not exist, and ", parent)
			return
		}
		c.ok(check, "%s does not exist: the agent will create it", path)
		return
	}
	switch {
	case err != nil:
		c.fail(check, "", "%v", err)
		return
	case !info.IsDir():
		c.fail(check, "name a directory", "%s is not a directory", path)
		return
	}
	if err := hostfile.MayWriteIn(path); err != nil {
		c.notWritable(check, err, "run check as the agent's user, or make that user the owner", "", path)
		return
	}
	var stat syscall.Statfs_t
	if err := syscall.Statfs(path, &stat); err == nil {
		free := uint64(stat.Bavail) * uint64(stat.Bsize)
		if free < minSpace {
			c.warn(check, "free some space: a deployment needs room for the new files and for backups", "%s has %d MiB left", path, free>>20)
			return
		}
	}
	if path == c.config.KeyDir {
		if err := keystore.Inspect(path, keystore.Owner{StateDir: c.config.StateDir}); err != nil {
			c.fail(check, "", "%v", err)
			return
		}
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		c.warn(check, "the agent sets it to 0700 when it starts", "%s has mode %#o: other users can read it", path, mode)
		return
	}
	c.ok(check, "%s, mode %#o, writable", path, info.Mode().Perm())
}

// notWritable reports that dir is not writable. advice is for a user without the rights, and context
// begins the message.
func (c *checker) notWritable(check string, err error, advice, context, dir string) {
	if errors.Is(err, syscall.EROFS) {
		c.fail(check, "remount it writable; under systemd, add the directory to the unit's ReadWritePaths=", "%s%s is on a read-only file system", context, dir)
		return
	}
	c.fail(check, advice, "%sthis user cannot write in %s", context, dir)
}

// nearest returns the closest ancestor that exists.
func nearest(path string) string {
	for {
		if _, err := os.Stat(path); err == nil || path == filepath.Dir(path) {
			return path
		}
		path = filepath.Dir(path)
	}
}

// overlays reads every overlay as a deployment would.
func (c *checker) overlays() {
	dir := c.config.TargetsDir
	overlays := app.Overlays(c.config)
	if _, err := targetconf.Merge(nil, "", nil, "default", overlays); err != nil {
		c.fail("overlays", "", "%v", err)
		return
	}
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		c.ok("overlays", "none: %s does not exist", dir)
		return
	}
	if err != nil {
		c.fail("overlays", "", "%v", err)
		return
	}
	bad, good := 0, 0
	for _, entry := range entries {
		name, isOverlay := strings.CutSuffix(entry.Name(), ".json")
		if !isOverlay {
			continue
		}
		id, err := api.ParseID(name)
		if err != nil {
			err = fmt.Errorf("overlay %s: the target %w", entry.Name(), err)
		} else {
			_, err = targetconf.Merge(nil, "", nil, id, overlays)
		}
		if err != nil {
			c.fail("overlays", "", "%v", err)
			bad++
			continue
		}
		good++
	}
	if bad == 0 {
		c.ok("overlays", "%d in %s", good, dir)
	}
}

// programs checks that the programs of the allowed commands exist.
func (c *checker) programs() {
	allowed := c.config.AllowedCommands
	if allowed == nil {
		return // the configuration has a warning about that
	}
	var programs, missing []string
	for _, argv := range allowed {
		programs = append(programs, argv[0])
	}
	slices.Sort(programs)
	programs = slices.Compact(programs)
	for _, name := range programs {
		if _, err := command.Find(name); err != nil {
			missing = append(missing, name)
		}
	}
	if len(missing) > 0 {
		c.warn("programs", "deployments cannot run them: install them, or ignore this if this host has no such servers", "not found: %s", strings.Join(missing, ", "))
		return
	}
	c.ok("programs", "%d in CERTCTL_ALLOWED_COMMANDS, all found", len(programs))
}

func (c *checker) discovery() {
	if len(c.config.DiscoveryDirs) == 0 {
		c.ok("discovery", "off: CERTCTL_DISCOVERY_DIRS is not set")
		return
	}
	for _, dir := range c.config.DiscoveryDirs {
		if _, err := os.ReadDir(dir); err != nil {
			c.warn("discovery", "a scan reports it as an error and continues", "%v", err)
			continue
		}
		c.ok("discovery", "%s is readable", dir)
	}
}
