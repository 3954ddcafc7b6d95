package caddy

import (
	"encoding/json"
	"fmt"
	"hash/fnv"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// fake is the admin API as https://caddyserver.com/docs/api describes it.
type fake struct {
	*httptest.Server
	t *testing.T

	// before, if set, is called for each request. It returns true if it
	// answered.
	before func(w http.ResponseWriter, r *http.Request) bool
	after  func(r *http.Request) // after a request took effect, before its answer

	mu      sync.Mutex
	config  any      // guarded by mu
	changes []string // methods and paths of all but GET; guarded by mu
}

// newFake serves a configuration, on a new listener unless server has
// one.
func newFake(t *testing.T, config string) *fake {
	f := &fake{t: t}
	f.set(config)
	f.Server = httptest.NewServer(f)
	t.Cleanup(f.Close)
	return f
}

func (f *fake) set(config string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := json.Unmarshal([]byte(config), &f.config); err != nil {
		f.t.Fatal(err)
	}
}

// get returns the value at path below /config/, as JSON.
func (f *fake) get(path string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	value, _ := lookup(f.config, parts(path))
	data, _ := json.Marshal(value)
	return string(data)
}

// made returns the changes so far.
func (f *fake) made() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.changes)
}

func parts(path string) []string {
	if path = strings.Trim(path, "/"); path == "" {
		return nil
	}
	return strings.Split(path, "/")
}

func lookup(at any, path []string) (any, error) {
	for _, name := range path {
		switch v := at.(type) {
		case map[string]any:
			at = v[name]
		case []any:
			index, err := strconv.Atoi(name)
			if err != nil || index >= len(v) {
				return nil, fmt.Errorf("array index out of bounds: %s", name)
			}
			at = v[index]
		default:
			return nil, fmt.Errorf("invalid traversal path at: %s", name)
		}
	}
	return at, nil
}

func etag(path string, value any) string {
	sum := fnv.New32a()
	_ = json.NewEncoder(sum).Encode(value)
	return fmt.Sprintf(`"%s %x"`, path, sum.Sum(nil))
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if f.before != nil && f.before(w, r) {
		return
	}
	status, err := f.serve(w, r)
	if f.after != nil {
		f.after(r)
	}
	if err != nil {
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(map[string]string{"error": err.Error()})
	}
}

func (f *fake) serve(w http.ResponseWriter, r *http.Request) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.URL.Path == "/load" {
		f.changes = append(f.changes, "POST /load "+r.Header.Get("Cache-Control"))
		return 400, json.NewDecoder(r.Body).Decode(&f.config)
	}
	path, ok := strings.CutPrefix(r.URL.Path, "/config/")
	if !ok {
		return 404, fmt.Errorf("no such path")
	}
	if r.Method == http.MethodGet {
		value, err := lookup(f.config, parts(path))
		if err != nil {
			return 400, err
		}
		w.Header().Set("Trailer", "ETag")
		_ = json.NewEncoder(w).Encode(value)
		w.Header().Set("ETag", etag(r.URL.Path, value))
		return 0, nil
	}
	if guard := r.Header.Get("If-Match"); guard != "" {
		guarded, _, _ := strings.Cut(strings.Trim(guard, `"`), " ")
		value, err := lookup(f.config, parts(strings.TrimPrefix(guarded, "/config/")))
		if err != nil || etag(guarded, value) != guard {
			return 412, fmt.Errorf("If-Match header did not match current config hash")
		}
	}
	var value any
	body, err := io.ReadAll(r.Body)
	if err == nil && r.Method != http.MethodDelete {
		err = json.Unmarshal(body, &value)
	}
	if err == nil {
		err = f.change(r.Method, parts(path), value)
	}
	if err == nil {
		f.changes = append(f.changes, r.Method+" "+path)
	}
	return 500, err
}

func (f *fake) change(method string, path []string, value any) error {
	if method == http.MethodPut { // creates missing parents
		if f.config == nil {
			f.config = map[string]any{}
		}
		for at, i := f.config, 0; i < len(path)-1; i++ {
			parent, ok := at.(map[string]any)
			if !ok {
				return fmt.Errorf("invalid traversal path at: %s", path[i])
			}
			if parent[path[i]] == nil {
				parent[path[i]] = map[string]any{}
			}
			at = parent[path[i]]
		}
	}
	last := path[len(path)-1]
	container, err := lookup(f.config, path[:len(path)-1])
	if err != nil {
		return err
	}
	switch c := container.(type) {
	case map[string]any:
		list, isList := c[last].([]any)
		switch {
		case method == http.MethodPut && c[last] != nil:
			return fmt.Errorf("key already exists: %s", last)
		case method == http.MethodPost && isList:
			c[last] = append(list, value)
		case method == http.MethodPost, method == http.MethodPut:
			c[last] = value
		default:
			return fmt.Errorf("method %s is not expected here", method)
		}
		return nil
	case []any:
		index, err := strconv.Atoi(last)
		if err != nil || index >= len(c) {
			return fmt.Errorf("array index out of bounds: %s", last)
		}
		switch method {
		case http.MethodPatch:
			c[index] = value
			return nil
		case http.MethodDelete:
			return f.replaceList(path[:len(path)-1], slices.Delete(c, index, index+1))
		}
	}
	return fmt.Errorf("method %s is not expected here", method)
}

func (f *fake) replaceList(path []string, list []any) error {
	parent, err := lookup(f.config, path[:len(path)-1])
	if err == nil {
		parent.(map[string]any)[path[len(path)-1]] = list
	}
	return err
}
