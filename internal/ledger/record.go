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

	// maxRecord bounds one record, in bytes. A job has a few hundred bytes. Its largest part,
	// target_config, is typed by an operator.
	maxRecord = 256 << 10
)

type state string

const (
	claimed  state = "claimed"
	running  state = "running"
	finished state = "finished"
)

// record is what the ledger knows of one job. The fields with tags are on disk.
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
	N        uint64    `json:"n"` // its number among the job's reports
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

// reported returns the record of a finished job with a single report.
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
	// Encoding the envelope does not change the bytes of body, which is compact and escaped
	// already.
	r.data, err = json.Marshal(envelope{Version: version, SHA256: digest(body), Record: body})
	if err != nil {
		return fmt.Errorf("encode the record: %w", err)
	}
	if len(r.data) > maxRecord {
		return fmt.Errorf("the record would take %d bytes; the limit is %d", len(r.data), maxRecord)
	}
	return nil
}

// decode decodes a record file and checks everything that the rest of the package relies on.
func decode(data []byte) (*record, error) {
	if len(data) > maxRecord {
		return nil, fmt.Errorf("it is larger than %d bytes", maxRecord)
	}
	var e envelope
	if err := json.Unmarshal(data, &e); err != nil {
		return nil, err
	}
	if e.Version != version {
		return nil, fmt.Errorf("its format version is %d, not %d", e.Version, version)
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
			return errors.New("a report does not have exactly one of status and verification")
		}
	}
	return nil
}

func digest(data []byte) string { return fmt.Sprintf("%x", sha256.Sum256(data)) }

// fileName returns the name of a job's record. It is a hash, so that ids that differ only in case
// get different files on every file system.
func fileName(id api.ID) string { return digest([]byte(id))[:32] + ".json" }

func isFileName(name string) bool {
	hash, isRecord := strings.CutSuffix(name, ".json")
	return isRecord && len(hash) == 32 && strings.Trim(hash, "0123456789abcdef") == ""
}

// sameJob reports whether two jobs have the same form on disk.
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
	// One byte above the limit lets decode see that the file is too large.
	return io.ReadAll(io.LimitReader(file, maxRecord+1))
}
