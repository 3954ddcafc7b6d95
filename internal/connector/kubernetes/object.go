package kubernetes

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"

	"certctl-agent/internal/printable"
)

// object is a secret as the API server sent it. Values are raw JSON, so unknown fields stay
// unchanged.
type object struct {
	fields, metadata          map[string]json.RawMessage
	data, labels, annotations map[string]json.RawMessage
}

func newObject(namespace, name string) *object {
	return &object{
		fields:   map[string]json.RawMessage{"apiVersion": quoted("v1"), "kind": quoted("Secret"), "type": quoted(secretType)},
		metadata: map[string]json.RawMessage{"namespace": quoted(namespace), "name": quoted(name)},
		data:     make(map[string]json.RawMessage), labels: make(map[string]json.RawMessage), annotations: make(map[string]json.RawMessage),
	}
}

func parseObject(data []byte) (*object, error) {
	o := new(object)
	if json.Unmarshal(data, &o.fields) != nil || o.text("kind") != "Secret" {
		return nil, errors.New("it is not a secret")
	}
	for _, part := range []struct {
		raw json.RawMessage
		to  *map[string]json.RawMessage
	}{{o.fields["metadata"], &o.metadata}, {o.fields["data"], &o.data}} {
		if err := unmarshal(part.raw, part.to); err != nil {
			return nil, err
		}
	}
	return o, errors.Join(unmarshal(o.metadata["labels"], &o.labels), unmarshal(o.metadata["annotations"], &o.annotations))
}

// unmarshal decodes an object; a missing one is empty.
func unmarshal(raw json.RawMessage, to *map[string]json.RawMessage) error {
	if len(raw) > 0 && json.Unmarshal(raw, to) != nil {
		return errors.New("part of it is not a JSON object")
	}
	if *to == nil {
		*to = make(map[string]json.RawMessage)
	}
	return nil
}

func (o *object) encode() ([]byte, error) {
	for _, part := range []struct {
		in     map[string]json.RawMessage
		key    string
		values map[string]json.RawMessage
	}{{o.metadata, "labels", o.labels}, {o.metadata, "annotations", o.annotations}, {o.fields, "data", o.data}, {o.fields, "metadata", o.metadata}} {
		if len(part.values) == 0 && part.in[part.key] == nil {
			continue
		}
		raw, err := marshal(part.values)
		if err != nil {
			return nil, err
		}
		part.in[part.key] = raw
	}
	return marshal(o.fields)
}

// marshal is json.Marshal without HTML escapes.
func marshal(v any) ([]byte, error) {
	var out bytes.Buffer
	encoder := json.NewEncoder(&out)
	encoder.SetEscapeHTML(false)
	err := encoder.Encode(v)
	return bytes.TrimSpace(out.Bytes()), err
}

// holds reports whether the agent's parts of the secret equal was.
func (o *object) holds(was *undo) bool {
	return holds(o.data, was.Data) && holds(o.labels, was.Labels) && holds(o.annotations, was.Annotations)
}

func holds(now, was map[string]json.RawMessage) bool {
	for key, value := range was {
		if !sameRaw(now[key], value) {
			return false
		}
	}
	return true
}

// put sets the agent's parts of the secret to was.
func (o *object) put(was *undo) {
	put(o.data, was.Data)
	put(o.labels, was.Labels)
	put(o.annotations, was.Annotations)
}

func put(now, was map[string]json.RawMessage) {
	for key, value := range was {
		if now[key] = value; isNull(value) {
			delete(now, key)
		}
	}
}

// mayChange returns an error if the pair cannot be written to this secret.
func (o *object) mayChange() error {
	switch typ := o.text("type"); {
	case typ != secretType:
		return fmt.Errorf("its type is %s, not %s, and Kubernetes does not allow changing it: delete the secret when it is unused, or give the target another secret_name",
			printable.Quote(typ), secretType)
	case string(o.fields["immutable"]) == "true":
		return errors.New("it is immutable: delete it, so the agent creates a new one, or give the target another secret_name")
	case len(o.metadata["deletionTimestamp"]) > 0:
		return errors.New("it is being deleted, which a finalizer delays")
	}
	return nil
}

func (o *object) text(key string) string { return text(o.fields[key]) }

// text decodes a JSON string. It returns "" if raw is not one.
func text(raw json.RawMessage) string {
	var s string
	_ = json.Unmarshal(raw, &s)
	return s
}

// decoded decodes a value of data. It returns nil if it is not base64.
func decoded(raw json.RawMessage) []byte {
	data, err := base64.StdEncoding.DecodeString(text(raw))
	if err != nil {
		return nil
	}
	return data
}

func encoded(data []byte) json.RawMessage { return quoted(base64.StdEncoding.EncodeToString(data)) }

func quoted(s string) json.RawMessage {
	raw, _ := json.Marshal(s) // cannot fail for a string
	return raw
}

func isNull(raw json.RawMessage) bool { return len(raw) == 0 || string(raw) == "null" }

// sameRaw compares values. A missing value equals null.
func sameRaw(a, b json.RawMessage) bool { return isNull(a) && isNull(b) || bytes.Equal(a, b) }
