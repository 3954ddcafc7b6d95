package transaction

import (
	"bytes"
	"encoding/json"
	"os"
	"reflect"
	"strings"
	"testing"

	"certctl-agent/internal/policy"
)

func someRecord() *record {
	return &record{
		Target: "t1", Phase: swapping, Set: "00000001-20260101T000000Z", Keep: 3,
		Reload: &policy.Command{Argv: []string{"nginx", "-s", "reload"}}, Owed: &owed{},
		Files: []fileRecord{
			{Path: "/link/key.pem", Dir: "/etc/nginx", Name: "key.pem", Stage: temporaryName(), Restore: temporaryName(), New: digestOf([]byte("new")),
				Old: &oldFile{Backup: "0-key.pem", Digest: digestOf([]byte("old")), attributes: attributes{Mode: 0o640, UID: 1, GID: 2,
					Xattrs: map[string][]byte{"user.x": {0, 1, 0xff}}}}},
			{Path: "/new", Dir: "/", Name: "new", Stage: temporaryName(), Restore: temporaryName(), New: digestOf(nil), InPlace: true, Private: true},
		},
	}
}

func TestRecordRoundTrip(t *testing.T) {
	want := someRecord()
	data, err := encode(want)
	check(t, err)
	got, err := decode(data)
	check(t, err)
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

// TestDamagedRecord flips each bit of a record, and checks that no altered record is accepted.
func TestDamagedRecord(t *testing.T) {
	want := someRecord()
	data, err := encode(want)
	check(t, err)
	for i := range data {
		for bit := range 8 {
			broken := bytes.Clone(data)
			broken[i] ^= 1 << bit
			got, err := decode(broken)
			// The envelope may still mean the same, in another spelling.
			if err == nil && !reflect.DeepEqual(got, want) {
				t.Fatalf("bit %d of byte %d: decoded to %+v", bit, i, got)
			}
		}
	}
	for n := range data {
		if _, err := decode(data[:n]); err == nil {
			t.Errorf("decoded the first %d bytes", n)
		}
	}
}

func TestBadNamesInRecord(t *testing.T) {
	for name, change := range map[string]func(*record){
		"target": func(r *record) { r.Target = "../t1" },
		"set":    func(r *record) { r.Set = "../../etc" },
		"phase":  func(r *record) { r.Phase = "done" },
		"dir":    func(r *record) { r.Files[0].Dir = "etc" },
		"name":   func(r *record) { r.Files[0].Name = "../passwd" },
		"stage":  func(r *record) { r.Files[0].Stage = "passwd" },
		"undo":   func(r *record) { r.Files[0].Restore = ".certctl-../../x" },
		"backup": func(r *record) { r.Files[0].Old.Backup = "../x" },
	} {
		r := someRecord()
		change(r)
		data, err := encode(r)
		check(t, err)
		if _, err := decode(data); err == nil {
			t.Errorf("a bad %s was accepted", name)
		}
	}
	data, err := json.Marshal(envelope{Version: changesVersion + 1})
	check(t, err)
	if _, err := decode(data); err == nil || !strings.Contains(err.Error(), "version 3") {
		t.Errorf("a later version: %v", err)
	}
}

// TestJournalHoldsNoKey checks everything that is written to the journal.
func TestJournalHoldsNoKey(t *testing.T) {
	w := newWorld(t, t.TempDir())
	w.old(t)
	records := 0
	s := w.mustEngine(t, func(s Step) error {
		if s.Op == "write" && strings.HasPrefix(s.Path, w.path("state/journal")) {
			if records++; bytes.Contains(s.data, []byte("PRIVATE")) {
				t.Errorf("a key in the journal: %s", s.data)
			}
		}
		return nil
	})
	_, err := s.deploy(t.Context(), w.renewal())
	check(t, err)
	if records != 3 {
		t.Errorf("%d records were written, want staging, swapping, committed", records)
	}
	if _, err := os.Stat(w.path("state/journal")); err != nil {
		t.Error(err)
	}
}

func FuzzDecode(f *testing.F) {
	data, err := encode(someRecord())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(`{"version":1,"sha256":"74234e98afe7498fb5daf1f36ac2d78acc339464f950703b8c019892f982b90b","record":null}`))
	f.Add([]byte(`{"version":2}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := decode(data)
		if err != nil {
			return
		}
		again, err := encode(r)
		if err != nil {
			t.Fatal(err)
		}
		if r2, err := decode(again); err != nil || !reflect.DeepEqual(r, r2) {
			t.Errorf("%+v became %+v, %v", r, r2, err)
		}
	})
}
