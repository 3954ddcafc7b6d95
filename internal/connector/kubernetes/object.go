package kubernetes

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"

	"certctl-agent/internal/printable"
)

// object is a secret as the API server has it. Values stay as they were sent, so
// that what we do not know of comes back unchanged.
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
		return errors.New("a part of it is not an object")
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

// marshal is json.Marshal without its escapes of HTML.
func marshal(v any) ([]byte, error) {
	var out bytes.Buffer
	encoder := json.NewEncoder(&out)
	encoder.SetEscapeHTML(false)
	err := encoder.Encode(v)
	return bytes.TrimSpace(out.Bytes()), err
}

// holds reports whether our parts of the secret are those of was.
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

// put puts the parts of was back.
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

// mayChange says why the pair cannot be put into this secret, if it cannot.
func (o *object) mayChange() error {
	switch typ := o.text("type"); {
	case typ != secretType:
		return fmt.Errorf("it is of type %s, not %s, and Kubernetes lets nobody change a secret's type: delete it once nothing uses it, or give the target another secret_name",
			printable.Quote(typ), secretType)
	case string(o.fields["immutable"]) == "true":
		return errors.New("it is immutable: delete it, so that it is created anew, or give the target another secret_name")
	case len(o.metadata["deletionTimestamp"]) > 0:
		return errors.New("it is being deleted, and a finalizer holds that up")
	}
	return nil
}

func (o *object) text(key string) string { return text(o.fields[key]) }

// text decodes a JSON string; "" if raw is something else.
func text(raw json.RawMessage) string {
	var s string
	_ = json.Unmarshal(raw, &s)
	return s
}

// decoded decodes a value of data; nil if it is not base64.
func decoded(raw json.RawMessage) []byte {
	data, err := base64.StdEncoding.DecodeString(text(raw))
	if err != nil {
		return nil
	}
	return data
}

func encoded(data []byte) json.RawMessage { return quoted(base64.StdEncoding.EncodeToString(data)) }

func quoted(s string) json.RawMessage {
	raw, _ := json.Marshal(s) // it cannot fail on a string
	return raw
}

func isNull(raw json.RawMessage) bool { return len(raw) == 0 || string(raw) == "null" }

// sameRaw compares values. A missing one is null.
func sameRaw(a, b json.RawMessage) bool { return isNull(a) && isNull(b) || bytes.Equal(a, b) }
