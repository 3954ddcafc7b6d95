package ledger

import (
	"bytes"
	"encoding/json"
	"reflect"
	"testing"
	"time"

	"certctl-agent/internal/api"
)

func TestRecordsSurviveTheirForm(t *testing.T) {
	now := time.Now().UTC().Round(0)
	r := &record{Seq: 7, State: finished, Claimed: now, Job: api.Job{ID: "job-1", TargetID: "a.b_c-D", TargetType: "<&>\u2028é"}, Reports: entries(outcome("<&>\u2028"), now)}
	do(t, r.encode())
	got, err := decode(r.data)
	do(t, err)
	r.data = nil
	if !reflect.DeepEqual(got, r) {
		t.Errorf("got %+v, want %+v", got, r)
	}
}

func FuzzDecode(f *testing.F) {
	r := &record{Seq: 1, State: finished, Claimed: time.Unix(0, 0).UTC(), Job: deployment("job-1"), Reports: entries(outcome("x"), time.Unix(1, 0))}
	if err := r.encode(); err != nil {
		f.Fatal(err)
	}
	f.Add(r.data)
	f.Add(r.data[:len(r.data)/2])
	f.Add(bytes.ToUpper(r.data))
	f.Add([]byte(`{"version":1,"sha256":"","record":null}`))
	f.Add([]byte(`{"version":2}`))
	f.Add([]byte(`{"state":"claimed"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if id := salvageID(fileName("job-1"), data); id != "" && id != "job-1" {
			t.Errorf("salvaged %q", id)
		}
		decodeTwice(t, data)

		// Try the same bytes with a correct checksum, too, to get past that check.
		if wrapped, err := json.Marshal(envelope{Version: version, SHA256: digest(data), Record: data}); err == nil {
			decodeTwice(t, wrapped)
		}
	})
}

// decodeTwice checks that a decoded record can be used and encoded again.
func decodeTwice(t *testing.T, data []byte) {
	r, err := decode(data)
	if err != nil {
		return
	}
	if _, err := api.ParseID(string(r.Job.ID)); err != nil {
		t.Fatalf("a record without a job: %q", data)
	}
	if r.encode() != nil {
		return // escaping can make it larger than allowed
	}
	again, err := decode(r.data)
	if err != nil {
		t.Fatalf("decoded, but not again: %v\n%s", err, r.data)
	}
	if again.Job.ID != r.Job.ID || again.State != r.State || len(again.Reports) != len(r.Reports) {
		t.Errorf("got %+v, want %+v", again, r)
	}
}
