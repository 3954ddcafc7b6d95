package caddy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
)

const (
	// loadPEM is the list of PEM pairs in Caddy's configuration
	// (https://caddyserver.com/docs/json/apps/tls/certificates/load_pem/).
	loadPEM = "/config/apps/tls/certificates/load_pem"

	// tagPrefix followed by the target's id is the tag of its pair, by which a renewal finds it.
	tagPrefix = "certctl:"

	// maxTries bounds how often a change is tried if other clients change the list meanwhile.
	maxTries = 10
)

// loadedPair is an element of load_pem.
type loadedPair struct {
	Certificate string   `json:"certificate"`
	Key         string   `json:"key"`
	Tags        []string `json:"tags"`
}

// pairChange sets the pair with a tag in the running configuration.
type pairChange struct {
	admin *admin
	tag   string
	pair  loadedPair
}

// ID implements connector.Change. It has the address, since the saved state holds a private key
// that must not be sent to another Caddy.
func (c *pairChange) ID() string { return "load_pem " + c.tag + " of " + c.admin.address }

// Read implements connector.Change. The state is the element of load_pem.
func (c *pairChange) Read(ctx context.Context) (was []byte, same bool, err error) {
	list, err := c.admin.list(ctx)
	if err != nil {
		return nil, false, err
	}
	index, pair, err := list.find(c.tag)
	if err != nil || pair == nil {
		return nil, false, err
	}
	return list.elements[index], pair.Certificate == c.pair.Certificate && pair.Key == c.pair.Key, nil
}

// Write implements connector.Change.
func (c *pairChange) Write(ctx context.Context) error {
	return c.set(ctx, func(was *loadedPair) (json.RawMessage, error) {
		next := c.pair
		next.Tags = []string{c.tag}
		if was != nil {
			next.Tags = was.Tags // an operator may have added tags to select the pair
		}
		return json.Marshal(next)
	})
}

// Restore implements connector.Change.
func (c *pairChange) Restore(ctx context.Context, was []byte) error {
	return c.set(ctx, func(*loadedPair) (json.RawMessage, error) { return was, nil })
}

// Finish implements connector.Change.
func (c *pairChange) Finish(context.Context) error { return nil }

// set replaces this target's element by the result of next, where nil means no element. The list's
// entity tag protects the index from concurrent changes
// (https://caddyserver.com/docs/api#concurrent-config-changes).
func (c *pairChange) set(ctx context.Context, next func(*loadedPair) (json.RawMessage, error)) error {
	for try := 1; ; try++ {
		list, err := c.admin.list(ctx)
		if err != nil {
			return err
		}
		index, was, err := list.find(c.tag)
		if err != nil {
			return err
		}
		element, err := next(was)
		if err != nil {
			return err
		}
		err = c.admin.replace(ctx, list, index, element)
		if !conflict(err) || try == maxTries {
			return err
		}
	}
}

// pemList is a copy of load_pem.
type pemList struct {
	missing  bool // load_pem or one of its parents does not exist
	elements []json.RawMessage
	etag     string
}

// list returns load_pem.
func (a *admin) list(ctx context.Context) (*pemList, error) {
	reply, err := a.call(ctx, http.MethodGet, loadPEM, nil)
	if status(err) == http.StatusBadRequest || status(err) == http.StatusNotFound {
		return &pemList{missing: true}, nil // Caddy's answers to an unknown path
	}
	if err != nil {
		return nil, err
	}
	list := &pemList{etag: reply.etag}
	if json.Unmarshal(reply.body, &list.elements) != nil {
		return nil, fmt.Errorf("admin API of Caddy: %s is not a list", loadPEM)
	}
	if list.etag == "" {
		return nil, errors.New("admin API of Caddy: the answer has no ETag, which protects concurrent changes: update Caddy to 2.6 or newer")
	}
	return list, nil
}

// find returns the element with tag. If there is none, pair is nil and index the end of the list.
func (l *pemList) find(tag string) (index int, pair *loadedPair, err error) {
	for i, element := range l.elements {
		var p loadedPair
		if json.Unmarshal(element, &p) != nil {
			return 0, nil, fmt.Errorf("admin API of Caddy: element %d of %s is not a certificate pair", i, loadPEM)
		}
		if slices.Contains(p.Tags, tag) {
			return i, &p, nil
		}
	}
	return len(l.elements), nil, nil
}

// replace sets the element at index or appends it. If element is nil, it removes the one at index.
func (a *admin) replace(ctx context.Context, list *pemList, index int, element json.RawMessage) error {
	exists := index < len(list.elements)
	if !exists && element == nil || exists && bytes.Equal(element, list.elements[index]) {
		return nil
	}
	at := loadPEM + "/" + strconv.Itoa(index)
	// Wait for the answer even if ctx is cancelled: Restore needs to know whether the change
	// happened. call has its own deadline.
	ctx = context.WithoutCancel(ctx)
	var err error
	switch {
	case list.missing: // PUT creates the parents too, and never replaces anything
		_, err = a.call(ctx, http.MethodPut, loadPEM, fmt.Appendf(nil, "[%s]", element))
	case element == nil:
		_, err = a.call(ctx, http.MethodDelete, at, nil, "If-Match", list.etag)
	case exists:
		_, err = a.call(ctx, http.MethodPatch, at, element, "If-Match", list.etag)
	case list.elements == nil: // null: POST cannot append, so it sets the list
		_, err = a.call(ctx, http.MethodPost, loadPEM, fmt.Appendf(nil, "[%s]", element), "If-Match", list.etag)
	default:
		_, err = a.call(ctx, http.MethodPost, loadPEM, element, "If-Match", list.etag)
	}
	return err
}
