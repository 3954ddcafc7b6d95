package status

import (
	"maps"
	"slices"
	"time"

	"certctl-agent/internal/printable"
)

// Counters count events since the agent started. The zero value is ready to use. Counters are not
// safe for concurrent use: their owner passes on clones.
type Counters struct {
	// Failures by activity and kind, without 429s.
	Failures map[string]map[string]uint64 `json:"failures,omitempty"`

	// RateLimited counts 429s by activity.
	RateLimited map[string]uint64 `json:"rate_limited,omitempty"`

	// CSRs by result.
	CSRs map[string]uint64 `json:"csrs,omitempty"`

	// Deployments by target type.
	Deployments map[string]Deployments `json:"deployments,omitempty"`
}

// Deployments are the outcomes for one target type.
type Deployments struct {
	Outcomes map[string]uint64 `json:"outcomes"` // by job status
	Seconds  Histogram         `json:"seconds"`
}

type Histogram struct {
	Count   uint64   `json:"count"`
	Sum     float64  `json:"sum"`
	Buckets []Bucket `json:"buckets"`
}

// Bucket counts the durations of at most LE seconds.
type Bucket struct {
	LE    float64 `json:"le"`
	Count uint64  `json:"count"`
}

// bounds range from the time to copy a file to several times the default command timeout.
var bounds = [...]float64{0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300}

// Target types come from the control plane. Beyond maxTypes they are counted together. A type is cut
// to maxType bytes.
const (
	maxTypes  = 64
	maxType   = 64
	otherType = "other"
	noType    = "none" // a deployment that installs nothing
)

// rateLimited is api.Kind of a 429.
const rateLimited = "rate_limited"

func (c *Counters) Failure(activity, kind string) {
	if kind == rateLimited {
		count(&c.RateLimited, activity)
		return
	}
	if c.Failures == nil {
		c.Failures = make(map[string]map[string]uint64)
	}
	kinds := c.Failures[activity]
	count(&kinds, kind)
	c.Failures[activity] = kinds
}

func (c *Counters) CSR(result string) { count(&c.CSRs, result) }

func (c *Counters) Job(targetType, outcome string, took time.Duration) {
	// Made printable here, so that two types that print alike are one metric.
	if targetType = printable.Line(targetType, maxType); targetType == "" {
		targetType = noType
	}
	if _, known := c.Deployments[targetType]; !known && len(c.Deployments) >= maxTypes {
		targetType = otherType
	}
	if c.Deployments == nil {
		c.Deployments = make(map[string]Deployments)
	}
	d := c.Deployments[targetType]
	count(&d.Outcomes, outcome)
	d.Seconds.add(took.Seconds())
	c.Deployments[targetType] = d
}

func (h *Histogram) add(seconds float64) {
	if h.Buckets == nil {
		for _, bound := range bounds {
			h.Buckets = append(h.Buckets, Bucket{LE: bound})
		}
	}
	h.Count++
	h.Sum += seconds
	for i := range h.Buckets {
		if seconds <= h.Buckets[i].LE {
			h.Buckets[i].Count++
		}
	}
}

// Clone returns a deep copy.
func (c *Counters) Clone() Counters {
	clone := Counters{
		RateLimited: maps.Clone(c.RateLimited),
		CSRs:        maps.Clone(c.CSRs),
		Failures:    maps.Clone(c.Failures),
		Deployments: maps.Clone(c.Deployments),
	}
	for activity, kinds := range clone.Failures {
		clone.Failures[activity] = maps.Clone(kinds)
	}
	for targetType, d := range clone.Deployments {
		d.Outcomes = maps.Clone(d.Outcomes)
		d.Seconds.Buckets = slices.Clone(d.Seconds.Buckets)
		clone.Deployments[targetType] = d
	}
	return clone
}

func count(counts *map[string]uint64, name string) {
	if *counts == nil {
		*counts = make(map[string]uint64)
	}
	(*counts)[name]++
}
