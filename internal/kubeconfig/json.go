package kubeconfig

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
)

// parseJSON parses a JSON document, as printed by kubectl config view -o json. It returns only
// errors of type *SyntaxError.
func parseJSON(data []byte) (*node, error) {
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.UseNumber()
	p := &jsonParser{Decoder: decoder, data: data}
	n, err := p.value(0)
	if err == nil {
		if rest := bytes.TrimSpace(data[decoder.InputOffset():]); len(rest) > 0 {
			err = errors.New("there is text after the object")
		}
	}
	if err != nil {
		return nil, &SyntaxError{p.line(), err.Error()}
	}
	return n, nil
}

type jsonParser struct {
	*json.Decoder
	data []byte

	breaks  int // line breaks in data[:counted]
	counted int64
}

// line returns the current line of the decoder.
func (p *jsonParser) line() int {
	at := p.InputOffset()
	p.breaks += bytes.Count(p.data[p.counted:at], []byte("\n"))
	p.counted = at
	return 1 + p.breaks
}

func (p *jsonParser) value(depth int) (*node, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("nested more than %d levels deep", maxDepth)
	}
	token, err := p.Token()
	if err != nil {
		return nil, err
	}
	n := &node{line: p.line()}
	switch token := token.(type) {
	case json.Delim:
		n.kind = mapping
		if token == '[' {
			n.kind = sequence
		}
		seen := make(map[string]bool)
		for p.More() {
			if err := p.member(n, seen, depth); err != nil {
				return nil, err
			}
		}
		_, err := p.Token() // the end
		return n, err
	case string:
		n.text, n.quoted = token, true
	case nil:
	default:
		n.text = fmt.Sprint(token)
	}
	return n, nil
}

// member reads the next item of a list, or the next key and value of an object. A key in seen is an
// error.
func (p *jsonParser) member(n *node, seen map[string]bool, depth int) error {
	var key string
	if n.kind == mapping {
		token, err := p.Token()
		if err != nil {
			return err
		}
		key, _ = token.(string)
	}
	line := p.line()
	value, err := p.value(depth + 1)
	switch {
	case err != nil:
		return err
	case n.kind == sequence:
		n.items = append(n.items, value)
	case seen[key]:
		return fmt.Errorf("repeats the key %q", key)
	default:
		seen[key] = true
		n.fields = append(n.fields, field{key, line, value})
	}
	return nil
}
