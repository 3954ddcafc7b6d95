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
	// loadPEM is where Caddy's configuration holds pairs as PEM
	// (https://caddyserver.com/docs/json/apps/tls/certificates/load_pem/).
	loadPEM = "/config/apps/tls/certificates/load_pem"

	// tagPrefix, with the target's id behind it, is the tag by which a renewal
	// finds the pair that it replaces.
	tagPrefix = "certctl:"

	// maxTries is how often a change is tried that meets the change of
	// somebody else.
	maxTries = 10
)

// loadedPair is an element of load_pem.
type loadedPair struct {
	Certificate string   `json:"certificate"`
	Key         string   `json:"key"`
	Tags        []string `json:"tags"`
}

// pairChange puts one pair into the running configuration, in place of the one
// with the same tag.
type pairChange struct {
	admin *admin
	tag   string
	pair  loadedPair
}

// ID implements connector.Change. It says where the pair is: what undoes the
// change holds a key of that Caddy, and is for no other.
func (c *pairChange) ID() string { return "load_pem " + c.tag + " of " + c.admin.address }

// Read implements connector.Change. What an undo needs is the element of
// load_pem as it is.
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
			next.Tags = was.Tags // an operator may have added one, to select the pair by
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

// set replaces this target's element by what next makes of it; nil stands for
// no element. The entity tag of the list guards the index against changes that
// others make (https://caddyserver.com/docs/api#concurrent-config-changes).
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

// pemList is load_pem as it was read.
type pemList struct {
	missing  bool // it, or what it is in, does not exist
	elements []json.RawMessage
	etag     string
}

// list reads load_pem.
func (a *admin) list(ctx context.Context) (*pemList, error) {
	reply, err := a.call(ctx, http.MethodGet, loadPEM, nil)
	if status(err) == http.StatusBadRequest || status(err) == http.StatusNotFound {
		return &pemList{missing: true}, nil // how Caddy says that a path leads nowhere
	}
	if err != nil {
		return nil, err
	}
	list := &pemList{etag: reply.etag}
	if json.Unmarshal(reply.body, &list.elements) != nil {
		return nil, fmt.Errorf("%s holds no list", loadPEM)
	}
	if list.etag == "" {
		return nil, errors.New("admin API of Caddy: it gives no ETag, which keeps changes apart: Caddy 2.6 or newer is needed")
	}
	return list, nil
}

// find returns the element with tag; without one the index of the next.
func (l *pemList) find(tag string) (index int, pair *loadedPair, err error) {
	for i, element := range l.elements {
		var p loadedPair
		if json.Unmarshal(element, &p) != nil {
			return 0, nil, fmt.Errorf("element %d of %s is no pair", i, loadPEM)
		}
		if slices.Contains(p.Tags, tag) {
			return i, &p, nil
		}
	}
	return len(l.elements), nil, nil
}

// replace makes element the one at index, appends it, or, when it is nil,
// removes the one that is there.
func (a *admin) replace(ctx context.Context, list *pemList, index int, element json.RawMessage) error {
	exists := index < len(list.elements)
	if !exists && element == nil || exists && bytes.Equal(element, list.elements[index]) {
		return nil
	}
	at := loadPEM + "/" + strconv.Itoa(index)
	// A change that was sent is waited for: to undo it, one must know whether
	// it happened. call has a deadline.
	ctx = context.WithoutCancel(ctx)
	var err error
	switch {
	case list.missing: // PUT makes the objects on the way to it too, and never replaces anything
		_, err = a.call(ctx, http.MethodPut, loadPEM, fmt.Appendf(nil, "[%s]", element))
	case element == nil:
		_, err = a.call(ctx, http.MethodDelete, at, nil, "If-Match", list.etag)
	case exists:
		_, err = a.call(ctx, http.MethodPatch, at, element, "If-Match", list.etag)
	case list.elements == nil: // null: POST sets what it cannot append to
		_, err = a.call(ctx, http.MethodPost, loadPEM, fmt.Appendf(nil, "[%s]", element), "If-Match", list.etag)
	default:
		_, err = a.call(ctx, http.MethodPost, loadPEM, element, "If-Match", list.etag)
	}
	return err
}
