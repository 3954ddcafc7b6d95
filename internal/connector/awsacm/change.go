package awsacm

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/hostfile"
	"certctl-agent/internal/keystore"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/secret"
	"certctl-agent/internal/vendorapi"
)

const (
	// listFor is how long a certificate whose import may have happened is looked for before it counts
	// as missing: lists are not up to date at once, and an import too many cannot be had back. A rollback
	// has a minute for everything.
	listFor = 30 * time.Second

	// callFor bounds how long a first import is tried again while AWS throttles it.
	callFor = time.Minute

	firstPause = 500 * time.Millisecond // doubles from there to maxPause
	maxPause   = 5 * time.Second

	// maxTries bounds how often a change is sent that may be repeated and whose answer is lost.
	maxTries = 2
)

// change puts a key and its certificates under one ARN.
type change struct {
	*acm
	material *connector.Material

	note    note
	arn     string            // where the certificate is; "": nowhere yet
	current installed         // what is there
	tags    map[string]string // its tags
	looked  bool              // Read has been called
	was     []byte            // what it returned
	found   *x509.Certificate // what it found, perhaps written by an interrupted deployment; nil: nothing
	sent    bool              // a request of this process may have changed something
	oldKeys []secret.String   // keys that the deployment may push out of the key store
}

// installed is what ACM tells of a certificate: all but its key.
type installed struct {
	leaf  *x509.Certificate
	chain []*x509.Certificate
}

func (i installed) equal(leaf *x509.Certificate, chain []*x509.Certificate) bool {
	return i.leaf != nil && i.leaf.Equal(leaf) && slices.EqualFunc(i.chain, chain, (*x509.Certificate).Equal)
}

// undo is what a change replaces. The key is not in it: ACM does not tell it, and the key store
// keeps the one before the current one.
type undo struct {
	ARN         string `json:"arn"`
	Certificate string `json:"certificate"` // PEM
	Chain       string `json:"chain"`       // PEM
}

// ID implements connector.Change. Targets of the same certificate in the same place share it.
func (c *change) ID() string {
	id := c.config.CertificateARN
	if id == "" {
		id = strings.TrimSpace("ACM certificate "+string(c.material.CertificateID)) + " in " + c.config.Region
	}
	if c.config.Endpoint != "" {
		id += " at " + strings.TrimSuffix(c.client.url, "/")
	}
	if c.config.RoleARN != "" {
		id += " as " + c.config.RoleARN
	}
	return id
}

// Read implements connector.Change.
func (c *change) Read(ctx context.Context) (was []byte, same bool, err error) {
	if err := c.find(ctx, true); err != nil {
		return nil, false, err
	}
	if c.arn == "" {
		if c.target.Common.VerifiedAt() != nil && c.material.CertificateID != "" {
			return nil, false, errors.New("ACM does not have this certificate yet, so nothing can serve it and post_deploy_verify would fail: " +
				"deploy it once without, give its ARN to what is to serve it, and turn the verification on then")
		}
		c.looked = true
		return nil, false, nil
	}
	c.found = c.current.leaf
	if c.tags, err = c.client.tags(ctx, c.arn); err != nil {
		return nil, false, err
	}
	if same = c.holds(); !same {
		if err := c.mayReplace(ctx); err != nil {
			return nil, false, err
		}
	}
	c.keepKeys()
	was, err = json.Marshal(undo{c.arn, string(leafPEM(c.current.leaf)), string(chainPEM(c.current.chain))})
	c.looked, c.was = err == nil, was
	return was, same && len(c.missingTags()) == 0, err
}

func (c *change) holds() bool { return c.current.equal(c.material.Leaf, c.material.Chain) }

// find looks for the certificate: where the configuration says, where this agent has noted it, and
// by its tags. Renamed says that it may have other names than the new one.
func (c *change) find(ctx context.Context, renamed bool) error {
	if c.arn = c.config.CertificateARN; c.arn != "" {
		err := c.load(ctx)
		if err == nil && c.arn == "" {
			err = fmt.Errorf("%s does not exist in this account: ACM chooses the ARN of a new certificate by itself, so leave certificate_arn out to have one imported", c.config.CertificateARN)
		}
		return err
	}
	c.note = note{Certificate: string(c.material.CertificateID), Region: c.config.Region, Endpoint: c.client.url, Role: c.config.RoleARN}
	if err := c.note.read(c.host.StateDir); err != nil {
		return err
	}
	if c.arn = c.note.ARN; c.client.isOurs(c.arn) {
		err := c.load(ctx)
		if code := codeOf(err); code == "AccessDeniedException" || code == "AccessDenied" {
			err = fmt.Errorf("%w; the ARN is noted in %s, which may go if the certificate is in another account now", err, filepath.Join(c.host.StateDir, c.note.path()))
		}
		if err != nil || c.arn != "" {
			return err
		}
	}
	c.arn = ""
	var wait time.Duration
	if c.note.Importing != "" || c.note.ARN != "" { // it may not show yet
		wait = c.list
	}
	found, err := c.findTagged(ctx, wait, renamed)
	if err != nil || len(found) == 0 {
		return err
	}
	if len(found) > 1 {
		return fmt.Errorf("ACM has several certificates with the tag %s=%s (%s): set certificate_arn to the one that is served, and delete the others or take that tag from them",
			certificateTag, c.material.CertificateID, strings.Join(found[:min(len(found), 5)], ", "))
	}
	c.arn = found[0]
	return c.load(ctx)
}

// findTagged looks for the certificate by its tags, for as long as wait until there is one.
func (c *change) findTagged(ctx context.Context, wait time.Duration, renamed bool) ([]string, error) {
	for begun, pause := time.Now(), firstPause; ; pause = min(2*pause, maxPause) {
		found, err := c.client.tagged(ctx, string(c.material.CertificateID), c.names(), renamed)
		if err != nil || len(found) > 0 || time.Since(begun)+pause > wait {
			return found, err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func (c *change) names() []string {
	var all []string
	for _, name := range c.material.Leaf.DNSNames {
		all = append(all, strings.ToLower(name))
	}
	for _, ip := range c.material.Leaf.IPAddresses {
		all = append(all, ip.String())
	}
	return all
}

// load reads what is under the ARN, which it clears if there is nothing.
func (c *change) load(ctx context.Context) error {
	leaf, chain, err := c.client.get(ctx, c.arn)
	if err != nil {
		return err
	}
	c.current = installed{}
	if leaf == "" {
		c.arn = ""
		return nil
	}
	parsed, err := pemutil.ParseCertificates([]byte(leaf))
	if err == nil && strings.TrimSpace(chain) != "" {
		c.current.chain, err = pemutil.ParseCertificates([]byte(chain))
	}
	if err != nil {
		return fmt.Errorf("GetCertificate: what %s holds cannot be read: %w", c.arn, err)
	}
	c.current.leaf = parsed[0]
	return nil
}

// mayReplace reports why ACM would not take the new certificate in the place of the one that is
// there (https://docs.aws.amazon.com/acm/latest/userguide/import-reimport.html).
func (c *change) mayReplace(ctx context.Context) error {
	kind, err := c.client.kind(ctx, c.arn)
	switch {
	case err != nil:
		return err
	case kind != "IMPORTED":
		return fmt.Errorf("%s was not imported but issued by Amazon (%.20q), which renews it by itself: set certificate_arn to an imported one, or leave it out", c.arn, kind)
	case keyAlgorithm(c.current.leaf) != keyAlgorithm(c.material.Leaf):
		return fmt.Errorf("%s holds %s and the new certificate has %s, and ACM keeps type and size of a key: issue the certificate with the former kind of key, or set certificate_arn to another certificate",
			c.arn, describeKey(c.current.leaf), describeKey(c.material.Leaf))
	}
	return nil
}

// wantTags are the configured ones and our own.
func (c *change) wantTags() (want []tag) {
	all := tags{managedByTag: managedBy, certificateTag: string(c.material.CertificateID)}
	maps.Copy(all, c.config.Tags)
	for _, key := range slices.Sorted(maps.Keys(all)) {
		want = append(want, tag{key, all[key]})
	}
	return want
}

func (c *change) missingTags() []tag {
	return slices.DeleteFunc(c.wantTags(), func(t tag) bool {
		have, ok := c.tags[t.Key]
		return ok && (have == t.Value || t.Key == managedByTag)
	})
}

// Write implements connector.Change. Tags come with a first import, and with Finish otherwise: ACM
// takes none in a re-import, and a certificate is not rolled back for want of a tag.
func (c *change) Write(ctx context.Context) error {
	switch {
	case c.arn == "":
		return c.first(ctx)
	case c.holds():
		return nil // an earlier try, or only tags are missing
	}
	return c.again(ctx, c.arn, installed{c.material.Leaf, c.material.Chain}, c.material.Key())
}

// first imports the certificate under a new ARN. Each such import counts against a yearly quota, so
// that it is noted before, and not sent a second time unless the first has certainly not happened.
func (c *change) first(ctx context.Context) error {
	c.note.ARN, c.note.Importing = "", pemutil.Fingerprint(c.material.Leaf)
	if err := c.note.write(c.host.StateDir); err != nil {
		return err
	}
	arn, err := c.importOnce(ctx)
	if isUncertain(err) {
		found, findErr := c.findTagged(ctx, c.list, false)
		switch {
		case findErr != nil:
			return fmt.Errorf("%w; and whether it did cannot be found out: %w", err, findErr)
		case len(found) == 0:
			return fmt.Errorf("%w; within %v, no certificate with the tag %s=%s appeared. The next deployment looks again before it imports", err, c.list, certificateTag, c.material.CertificateID)
		}
		c.arn = found[0]
		if loadErr := c.load(ctx); loadErr != nil {
			return fmt.Errorf("%w; and whether it did cannot be found out: %w", err, loadErr)
		}
		if !c.holds() {
			err = fmt.Errorf("%w; somebody else imported another certificate for it just now (%s), which the next deployment replaces", err, found[0])
			return errors.Join(err, c.forget())
		}
		arn, err = found[0], nil
	}
	if err != nil {
		return errors.Join(err, c.forget()) // nothing has been done
	}
	c.arn, c.current = arn, installed{c.material.Leaf, c.material.Chain}
	c.tags = make(map[string]string)
	for _, t := range c.wantTags() {
		c.tags[t.Key] = t.Value
	}
	c.host.Log.Info("imported a certificate into ACM: give its ARN to what is to serve it", "arn", arn, "certificate", c.material.CertificateID)
	if err := c.remember(); err != nil {
		c.host.Log.Warn("the next deployment has to find the certificate by its tags", "arn", arn, "error", err)
	}
	return nil
}

// isUncertain reports whether a change may have been made although it failed.
func isUncertain(err error) bool {
	_, isLost := errors.AsType[*vendorapi.LostError](err)
	_, isStrange := errors.AsType[*strangeError](err)
	return isLost || isStrange || vendorapi.StatusOf(err) >= 500
}

// importOnce sends the first import, and sends it again only after answers that say that nothing has
// been done.
func (c *change) importOnce(ctx context.Context) (arn string, err error) {
	for begun, pause := time.Now(), firstPause; ; pause = min(2*pause, maxPause) {
		c.sent = true
		arn, err = c.client.importCertificate(ctx, c.client.once, "", leafPEM(c.material.Leaf), c.material.Key(), chainPEM(c.material.Chain), c.wantTags())
		status, _ := errors.AsType[*vendorapi.StatusError](err)
		again := status != nil && isThrottled(status) || errors.Is(err, syscall.ECONNREFUSED)
		if !again {
			return arn, err
		}
		wait := pause + rand.N(pause/2) // so that agents that were refused together do not come back together
		if tried := time.Since(begun); tried+wait > callFor {
			return "", fmt.Errorf("%w (given up after %v)", err, tried.Round(time.Second))
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return "", fmt.Errorf("%w; %w", err, context.Cause(ctx))
		}
	}
}

// again imports a certificate under an ARN that there is. That may be repeated: it does not count
// against the quota.
func (c *change) again(ctx context.Context, arn string, what installed, key []byte) (err error) {
	for range maxTries {
		c.sent = true
		_, err = c.client.importCertificate(ctx, c.client.changes, arn, leafPEM(what.leaf), key, chainPEM(what.chain), nil)
		if !isUncertain(err) || ctx.Err() != nil {
			break
		}
	}
	if err == nil {
		c.current = what
	}
	return err
}

func (c *change) remember() error {
	if c.config.CertificateARN != "" || c.arn == "" || c.note.ARN == c.arn && c.note.Importing == "" {
		return nil
	}
	c.note.ARN, c.note.Importing = c.arn, ""
	return c.note.write(c.host.StateDir)
}

// Restore implements connector.Change. It takes back what this target wrote, and nothing that came
// after.
func (c *change) Restore(ctx context.Context, saved []byte) error {
	if c.looked && !c.sent && bytes.Equal(saved, c.was) {
		return nil // nothing was sent, by this process or the one before it
	}
	if saved == nil {
		return c.removeFirst(ctx)
	}
	var was undo
	if err := json.Unmarshal(saved, &was); err != nil {
		return fmt.Errorf("what would undo it cannot be read: %w", err)
	}
	old, err := parseUndo(was)
	if err != nil {
		return fmt.Errorf("what would undo it cannot be read: %w", err)
	}
	c.arn = was.ARN
	if err := c.load(ctx); err != nil {
		return err
	}
	switch {
	case c.arn == "":
		return errors.New("somebody else has deleted it since")
	case c.current.equal(old.leaf, old.chain):
		return nil
	case !c.isMine():
		return errTheirs
	case time.Now().After(old.leaf.NotAfter):
		return fmt.Errorf("%w: the former certificate has expired (%s), and ACM takes none that has; the new one stays: deploy another",
			connector.ErrIrrevocable, old.leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	key, err := c.keyOf(old.leaf)
	if err != nil {
		return fmt.Errorf("%w: the private key of the former certificate (serial number %x, until %s) is not in this agent's key store (%w), and ACM does not give it back; the new one stays. "+
			"To go back, import the former one there by hand (aws acm import-certificate --region %s --certificate-arn %s …), or deploy another",
			connector.ErrIrrevocable, old.leaf.SerialNumber, old.leaf.NotAfter.UTC().Format(time.RFC3339), err, c.config.Region, was.ARN)
	}
	if err := c.again(ctx, was.ARN, old, key); codeOf(err) == "ValidationException" {
		return fmt.Errorf("%w: ACM does not take the former certificate any more (%w), perhaps since the new one has usages that it lacks; the new one stays: deploy another",
			connector.ErrIrrevocable, err)
	} else if err != nil {
		return err
	}
	return nil
}

// isMine reports whether what is in ACM is there to be undone.
func (c *change) isMine() bool {
	return c.current.leaf.Equal(c.material.Leaf) || c.current.leaf.Equal(c.found)
}

var errTheirs = errors.New("somebody else has changed it since, and that was left alone")

func parseUndo(was undo) (old installed, err error) {
	leaves, err := pemutil.ParseCertificates([]byte(was.Certificate))
	if err != nil {
		return old, err
	}
	if old.leaf = leaves[0]; was.Chain != "" {
		old.chain, err = pemutil.ParseCertificates([]byte(was.Chain))
	}
	return old, err
}

// removeFirst deletes the certificate that this target imported, which was not there before. What
// this agent has no note of, it did not import.
func (c *change) removeFirst(ctx context.Context) error {
	if c.arn == "" || c.note.Certificate == "" {
		if err := c.find(ctx, false); err != nil {
			return err
		}
	}
	if c.note.ARN == "" && c.note.Importing == "" || c.arn == "" {
		return nil // an import that shows only later stays noted, and the next deployment finds it
	}
	if !c.isMine() {
		return errTheirs
	}
	if err := c.remove(ctx); err != nil {
		return fmt.Errorf("%w; %s was imported by this deployment and stays: delete it, or leave it for the next one, which uses it", err, c.arn)
	}
	return c.forget()
}

// remove deletes the certificate. That may be repeated.
func (c *change) remove(ctx context.Context) (err error) {
	for range maxTries {
		if err = c.client.remove(ctx, c.arn); !isUncertain(err) || ctx.Err() != nil {
			break
		}
	}
	return err
}

func (c *change) forget() error {
	c.arn = ""
	if c.note.ARN == "" && c.note.Importing == "" {
		return nil
	}
	c.note.ARN, c.note.Importing = "", ""
	return c.note.write(c.host.StateDir)
}

// keepKeys remembers, in memory, the key of the certificate in ACM and the current one of the key store,
// where there are such. After a crash the certificate in ACM may be the new one already, and the current key
// that of the former.
func (c *change) keepKeys() {
	c.oldKeys = nil
	if key, err := c.storedKey(c.current.leaf); err == nil {
		c.oldKeys = append(c.oldKeys, key)
	}
	if data, _, err := hostfile.Read(c.material.KeyPath, maxFile); err == nil {
		c.oldKeys = append(c.oldKeys, secret.New(string(data)))
		clear(data)
	}
}

// keyOf is the key of a certificate that was there before.
func (c *change) keyOf(leaf *x509.Certificate) ([]byte, error) {
	for _, kept := range c.oldKeys {
		key, err := pemutil.ParseKey([]byte(kept.Reveal()))
		if err == nil && pemutil.SamePublicKey(key.Public(), leaf.PublicKey) {
			return []byte(kept.Reveal()), nil
		}
	}
	key, err := c.storedKey(leaf)
	return []byte(key.Reveal()), err
}

// storedKey looks in the key store for the key of a certificate. In a rollback it is the previous
// one; after a crash it is the current one again.
func (c *change) storedKey(leaf *x509.Certificate) (secret.String, error) {
	if c.material.KeyPath == "" {
		return secret.String{}, keystore.ErrNoKey
	}
	store, err := keystore.Look(filepath.Dir(c.material.KeyPath))
	if err != nil {
		return secret.String{}, err
	}
	defer store.Close()
	key, err := store.Find(c.material.CertificateID, leaf.PublicKey)
	if err != nil {
		return secret.String{}, err
	}
	defer key.Clear()
	return secret.New(string(key.PEM)), nil
}

// Finish implements connector.Change.
func (c *change) Finish(ctx context.Context) error {
	err := c.remember()
	if missing := c.missingTags(); c.arn != "" && len(missing) > 0 {
		tagErr := c.client.addTags(ctx, c.arn, missing)
		if tagErr != nil {
			tagErr = fmt.Errorf("the certificate is in place, and its tags are not: %w", tagErr)
		}
		err = errors.Join(err, tagErr)
	}
	return err
}

// leafPEM and chainPEM are what ACM takes, apart.
func leafPEM(leaf *x509.Certificate) []byte { return pemutil.EncodeCertificates(leaf) }

func chainPEM(chain []*x509.Certificate) []byte {
	if len(chain) == 0 {
		return nil
	}
	return pemutil.EncodeCertificates(chain...)
}
