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
	// listFor is how long to look for a certificate that may have been imported. ACM's lists lag
	// behind, and an extra import still counts against the quota after it is deleted. A rollback
	// has one minute in total.
	listFor = 30 * time.Second

	// callFor bounds how long a first import is retried while AWS throttles it.
	callFor = time.Minute

	firstPause = 500 * time.Millisecond // doubles up to maxPause
	maxPause   = 5 * time.Second

	// maxTries bounds how often an idempotent change is sent if its answer is lost.
	maxTries = 2
)

// change imports a key and its certificates under one ARN.
type change struct {
	*acm
	material *connector.Material

	note    note
	arn     string            // of the certificate; "": it is not in ACM yet
	current installed         // the certificate in ACM
	tags    map[string]string // of the certificate in ACM
	hasRead bool              // Read has been called
	was     []byte            // returned by Read
	found   *x509.Certificate // found by Read, possibly from an interrupted deployment; nil: none
	sent    bool              // a request of this process may have changed something
	oldKeys []secret.String   // keys that the key store may drop during the deployment
}

// installed is a certificate in ACM without its key, which ACM never returns.
type installed struct {
	leaf  *x509.Certificate
	chain []*x509.Certificate
}

func (i installed) equal(leaf *x509.Certificate, chain []*x509.Certificate) bool {
	return i.leaf != nil && i.leaf.Equal(leaf) && slices.EqualFunc(i.chain, chain, (*x509.Certificate).Equal)
}

// undo is the state that Restore needs. The key is not in it: ACM does not return it, and the key
// store keeps the previous one.
type undo struct {
	ARN         string `json:"arn"`
	Certificate string `json:"certificate"` // PEM
	Chain       string `json:"chain"`       // PEM
}

// ID implements connector.Change. Targets with the same certificate in the same place share it.
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
				"deploy it once without post_deploy_verify, configure its ARN in the load balancer, and then turn verification on")
		}
		c.hasRead = true
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
	c.hasRead, c.was = err == nil, was
	return was, same && len(c.missingTags()) == 0, err
}

func (c *change) holds() bool { return c.current.equal(c.material.Leaf, c.material.Chain) }

// find finds the certificate by the configured ARN, by this agent's note or by its tags. Renamed
// says that its names may differ from those of the new certificate.
func (c *change) find(ctx context.Context, renamed bool) error {
	if c.arn = c.config.CertificateARN; c.arn != "" {
		err := c.load(ctx)
		if err == nil && c.arn == "" {
			err = fmt.Errorf("%s does not exist in this account: ACM chooses the ARN of a new certificate, so remove certificate_arn to import one", c.config.CertificateARN)
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
			err = fmt.Errorf("%w; the ARN is noted in %s: delete that file if the certificate is in another account now", err, filepath.Join(c.host.StateDir, c.note.path()))
		}
		if err != nil || c.arn != "" {
			return err
		}
	}
	c.arn = ""
	var wait time.Duration
	if c.note.Importing != "" || c.note.ARN != "" { // lists may not have it yet
		wait = c.list
	}
	found, err := c.findTagged(ctx, wait, renamed)
	if err != nil || len(found) == 0 {
		return err
	}
	if len(found) > 1 {
		return fmt.Errorf("ACM has several certificates with the tag %s=%s (%s): set certificate_arn to the one in use, and delete the others or remove their tag",
			certificateTag, c.material.CertificateID, strings.Join(found[:min(len(found), 5)], ", "))
	}
	c.arn = found[0]
	return c.load(ctx)
}

// findTagged finds the certificate by its tags. It tries again for as long as wait if there is
// none.
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

// load reads the certificate with c.arn into c.current. It clears c.arn if it does not exist.
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
		return fmt.Errorf("GetCertificate: cannot parse the certificate of %s: %w", c.arn, err)
	}
	c.current.leaf = parsed[0]
	return nil
}

// mayReplace returns an error if ACM would not accept the new certificate under the existing ARN
// (https://docs.aws.amazon.com/acm/latest/userguide/import-reimport.html).
func (c *change) mayReplace(ctx context.Context) error {
	kind, err := c.client.kind(ctx, c.arn)
	switch {
	case err != nil:
		return err
	case kind != "IMPORTED":
		return fmt.Errorf("%s was not imported but issued by Amazon (%.20q), which renews it: set certificate_arn to an imported certificate, or remove it", c.arn, kind)
	case keyAlgorithm(c.current.leaf) != keyAlgorithm(c.material.Leaf):
		return fmt.Errorf("%s has %s but the new certificate has %s, and ACM does not allow changing the type or size of a key: issue the certificate with the same kind of key, or set certificate_arn to another certificate",
			c.arn, describeKey(c.current.leaf), describeKey(c.material.Leaf))
	}
	return nil
}

// wantTags returns the configured tags and the agent's own.
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

// Write implements connector.Change. It sets the tags of a first import. Otherwise Finish does: ACM
// accepts no tags in a re-import, and a missing tag does not justify a rollback.
func (c *change) Write(ctx context.Context) error {
	switch {
	case c.arn == "":
		return c.first(ctx)
	case c.holds():
		return nil // done by an earlier try, or only tags are missing
	}
	return c.reimport(ctx, c.arn, installed{c.material.Leaf, c.material.Chain}, c.material.Key())
}

// first imports the certificate under a new ARN. Each such import counts against a yearly quota, so
// it is noted first, and sent again only if the earlier request certainly had no effect.
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
			return fmt.Errorf("%w; cannot find out whether it was imported: %w", err, findErr)
		case len(found) == 0:
			return fmt.Errorf("%w; no certificate with the tag %s=%s appeared within %v: the next deployment looks again before it imports", err, certificateTag, c.material.CertificateID, c.list)
		}
		c.arn = found[0]
		if loadErr := c.load(ctx); loadErr != nil {
			return fmt.Errorf("%w; cannot find out whether it was imported: %w", err, loadErr)
		}
		if !c.holds() {
			err = fmt.Errorf("%w; meanwhile someone else imported another certificate for it (%s), which the next deployment replaces", err, found[0])
			return errors.Join(err, c.forget())
		}
		arn, err = found[0], nil
	}
	if err != nil {
		return errors.Join(err, c.forget()) // nothing was imported
	}
	c.arn, c.current = arn, installed{c.material.Leaf, c.material.Chain}
	c.tags = make(map[string]string)
	for _, t := range c.wantTags() {
		c.tags[t.Key] = t.Value
	}
	c.host.Log.Info("imported a new certificate into ACM: configure its ARN where it is to be served", "arn", arn, "certificate", c.material.CertificateID)
	if err := c.remember(); err != nil {
		c.host.Log.Warn("cannot note the ARN: the next deployment must find the certificate by its tags", "arn", arn, "error", err)
	}
	return nil
}

// isUncertain reports whether a failed request may have taken effect.
func isUncertain(err error) bool {
	_, isLost := errors.AsType[*vendorapi.LostError](err)
	_, isInvalid := errors.AsType[*answerFormatError](err)
	return isLost || isInvalid || vendorapi.StatusOf(err) >= 500
}

// importOnce sends the first import. It sends it again only if AWS answered that it did nothing.
func (c *change) importOnce(ctx context.Context) (arn string, err error) {
	for start, pause := time.Now(), firstPause; ; pause = min(2*pause, maxPause) {
		c.sent = true
		arn, err = c.client.importCertificate(ctx, c.client.once, "", leafPEM(c.material.Leaf), c.material.Key(), chainPEM(c.material.Chain), c.wantTags())
		status, _ := errors.AsType[*vendorapi.StatusError](err)
		retry := status != nil && isThrottled(status) || errors.Is(err, syscall.ECONNREFUSED)
		if !retry {
			return arn, err
		}
		wait := pause + rand.N(pause/2) // agents that were throttled together must not retry together
		if tried := time.Since(start); tried+wait > callFor {
			return "", fmt.Errorf("%w (given up after %v)", err, tried.Round(time.Second))
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return "", fmt.Errorf("%w; %w", err, context.Cause(ctx))
		}
	}
}

// reimport imports a certificate under an existing ARN. It is idempotent and does not count against
// the quota.
func (c *change) reimport(ctx context.Context, arn string, what installed, key []byte) (err error) {
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

// Restore implements connector.Change. It undoes only this target's changes, not later ones.
func (c *change) Restore(ctx context.Context, saved []byte) error {
	if c.hasRead && !c.sent && bytes.Equal(saved, c.was) {
		return nil // neither this process nor an earlier one sent anything
	}
	if saved == nil {
		return c.removeFirst(ctx)
	}
	var was undo
	if err := json.Unmarshal(saved, &was); err != nil {
		return fmt.Errorf("its backup cannot be read: %w", err)
	}
	old, err := parseUndo(was)
	if err != nil {
		return fmt.Errorf("its backup cannot be read: %w", err)
	}
	c.arn = was.ARN
	if err := c.load(ctx); err != nil {
		return err
	}
	switch {
	case c.arn == "":
		return errors.New("someone else has deleted it since")
	case c.current.equal(old.leaf, old.chain):
		return nil
	case !c.isMine():
		return errTheirs
	case time.Now().After(old.leaf.NotAfter):
		return fmt.Errorf("%w: the old certificate expired (%s), and ACM does not accept expired certificates; the new one stays: deploy another",
			connector.ErrIrrevocable, old.leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	key, err := c.keyOf(old.leaf)
	if err != nil {
		return fmt.Errorf("%w: the private key of the old certificate (serial number %x, valid until %s) is not in this agent's key store (%w), and ACM does not return it; the new one stays. "+
			"To go back, import the old one by hand (aws acm import-certificate --region %s --certificate-arn %s …), or deploy another",
			connector.ErrIrrevocable, old.leaf.SerialNumber, old.leaf.NotAfter.UTC().Format(time.RFC3339), err, c.config.Region, was.ARN)
	}
	if err := c.reimport(ctx, was.ARN, old, key); codeOf(err) == "ValidationException" {
		return fmt.Errorf("%w: ACM does not accept the old certificate any more (%w), perhaps because the new one has key usages that it lacks; the new one stays: deploy another",
			connector.ErrIrrevocable, err)
	} else if err != nil {
		return err
	}
	return nil
}

// isMine reports whether this target wrote the certificate in ACM, so Restore may replace it.
func (c *change) isMine() bool {
	return c.current.leaf.Equal(c.material.Leaf) || c.current.leaf.Equal(c.found)
}

var errTheirs = errors.New("someone else has changed it since, so it was left alone")

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

// removeFirst undoes a first import: it deletes the certificate. Without a note, this agent did not
// import it.
func (c *change) removeFirst(ctx context.Context) error {
	if c.arn == "" || c.note.Certificate == "" {
		if err := c.find(ctx, false); err != nil {
			return err
		}
	}
	if c.note.ARN == "" && c.note.Importing == "" || c.arn == "" {
		return nil // the note stays, so the next deployment finds an import that appears later
	}
	if !c.isMine() {
		return errTheirs
	}
	if err := c.remove(ctx); err != nil {
		return fmt.Errorf("%w; this deployment imported %s, which stays: delete it, or leave it for the next deployment to use", err, c.arn)
	}
	return c.forget()
}

// remove deletes the certificate. It is idempotent.
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

// keepKeys keeps the key of the certificate in ACM and the key store's current key in memory, if
// they exist. After a crash ACM may already have the new certificate while the current key is the
// old one.
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

// keyOf returns the key of an old certificate.
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

// storedKey returns the key of a certificate from the key store. In a rollback the old
// certificate's key is the previous one; after a crash it is the current one again.
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
			tagErr = fmt.Errorf("the certificate is in place, but setting its tags failed: %w", tagErr)
		}
		err = errors.Join(err, tagErr)
	}
	return err
}

// leafPEM and chainPEM encode a certificate in the two parts that ACM expects.
func leafPEM(leaf *x509.Certificate) []byte { return pemutil.EncodeCertificates(leaf) }

func chainPEM(chain []*x509.Certificate) []byte {
	if len(chain) == 0 {
		return nil
	}
	return pemutil.EncodeCertificates(chain...)
}
