package ledger

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"certctl-agent/internal/api"
)

const (
	version = 1

	// maxRecord bounds one record. A job is a few hundred bytes; the largest
	// part, target_config, is written by an operator in a form field.
	maxRecord = 256 << 10
)

type state string

const (
	claimed  state = "claimed"
	running  state = "running"
	finished state = "finished"
)

// record is what is known of one job. The tagged fields are its form on disk.
type record struct {
	Seq     uint64    `json:"seq"` // order of claim
	State   state     `json:"state"`
	Claimed time.Time `json:"claimed"`
	Job     api.Job   `json:"job"`
	Reports []entry   `json:"reports,omitempty"`

	begun bool   // by this process
	data  []byte // encoded, on its way to the disk
	size  int    // of data
}

// entry is an undelivered report.
type entry struct {
	N        uint64    `json:"n"` // its number among those of the job
	Recorded time.Time `json:"recorded"`
	Report
}

// envelope is a record file: the record, and the SHA-256 of its bytes.
type envelope struct {
	Version int             `json:"version"`
	SHA256  string          `json:"sha256"`
	Record  json.RawMessage `json:"record"`
}

func entries(reports []Report, now time.Time) []entry {
	var all []entry
	for i, report := range reports {
		all = append(all, entry{N: uint64(i), Recorded: now, Report: report})
	}
	return all
}

// reported is the record of a job of which nothing is left to do but one report.
func (l *Ledger) reported(id api.ID, status *api.JobStatus) *record {
	now := time.Now()
	return &record{Seq: l.nextSeq(), State: finished, Claimed: now, Job: api.Job{ID: id},
		Reports: entries([]Report{{Status: status}}, now)}
}

func (r *record) deliveries() []Delivery {
	var all []Delivery
	for _, e := range r.Reports {
		all = append(all, Delivery{Job: r.Job.ID, Report: e.Report, Recorded: e.Recorded, seq: r.Seq, n: e.N})
	}
	return all
}

func (r *record) encode() error {
	body, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode the record: %w", err)
	}
	// Encoding the body again as a part of the envelope leaves it as it is: it
	// is compact and escaped already.
	r.data, err = json.Marshal(envelope{Version: version, SHA256: digest(body), Record: body})
	if err != nil {
		return fmt.Errorf("encode the record: %w", err)
	}
	if len(r.data) > maxRecord {
		return fmt.Errorf("the record would take %d bytes; the limit is %d", len(r.data), maxRecord)
	}
	return nil
}

// decode reads a record file and checks all that the rest relies on.
func decode(data []byte) (*record, error) {
	if len(data) > maxRecord {
		return nil, fmt.Errorf("it is larger than %d bytes", maxRecord)
	}
	var e envelope
	if err := json.Unmarshal(data, &e); err != nil {
		return nil, err
	}
	if e.Version != version {
		return nil, fmt.Errorf("format version %d is not %d", e.Version, version)
	}
	if digest(e.Record) != e.SHA256 {
		return nil, errors.New("its checksum does not match")
	}
	r := new(record)
	if err := json.Unmarshal(e.Record, r); err != nil {
		return nil, err
	}
	return r, r.check()
}

func (r *record) check() error {
	switch {
	case r.Job.ID == "":
		return errors.New("it has no job")
	case r.State != claimed && r.State != running && r.State != finished:
		return fmt.Errorf("its state %q is unknown", r.State)
	case (r.State == finished) != (len(r.Reports) > 0):
		return errors.New("only a finished job has reports, and at least one")
	}
	for _, e := range r.Reports {
		if (e.Status == nil) == (e.Verification == nil) {
			return errors.New("a report is neither of a status nor of a verification")
		}
	}
	return nil
}

func digest(data []byte) string { return fmt.Sprintf("%x", sha256.Sum256(data)) }

// fileName is the name of a job's record. A hash, so that ids which differ only
// in case stay apart on every file system.
func fileName(id api.ID) string { return digest([]byte(id))[:32] + ".json" }

func isFileName(name string) bool {
	hash, isRecord := strings.CutSuffix(name, ".json")
	return isRecord && len(hash) == 32 && strings.Trim(hash, "0123456789abcdef") == ""
}

// sameJob reports whether two jobs are the same on disk.
func sameJob(a, b api.Job) bool {
	first, err := json.Marshal(a)
	second, err2 := json.Marshal(b)
	return err == nil && err2 == nil && bytes.Equal(first, second)
}

func readBounded(root *os.Root, name string) ([]byte, error) {
	file, err := root.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	// One byte more than allowed shows decode that it is too large.
	return io.ReadAll(io.LimitReader(file, maxRecord+1))
}
