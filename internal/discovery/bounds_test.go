package discovery

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"flag"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/ber"
	"certctl-agent/internal/testing/needs"
)

// manyNames returns a certificate with n names of one character, in about 3n bytes of DER.
func manyNames(t testing.TB, n int) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	sequence := asn1.RawValue{Tag: asn1.TagSequence, IsCompound: true, Bytes: bytes.Repeat([]byte{0x82, 1, 'a'}, n)}
	names, err := asn1.Marshal(sequence)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().AddDate(1, 0, 0)}
	template.ExtraExtensions = append(template.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: names})
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

var memoryBound = flag.String("memory-bound", "", "scan this directory twice and print the peak of memory; see TestMemoryIsBounded")

// TestMemoryIsBounded scans certificates with hundreds of thousands of names, and many with tens of
// thousands, in a child process.
func TestMemoryIsBounded(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("reads /proc")
	}
	if *memoryBound != "" {
		s := newScanner(t, Options{Dirs: []string{*memoryBound}})
		for range 2 {
			found, largest := 0, 0
			summary, err := s.Scan(t.Context(), func(batch []api.DiscoveredCertificate) error {
				bytes := 0
				for _, cert := range batch {
					bytes += weight(cert)
				}
				found, largest = found+len(batch), max(largest, bytes)
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			fmt.Printf("bound: %d %d %d %.0f\n", found, len(summary.Errors), largest, memory(t, "VmHWM"))
		}
		return
	}
	dir := t.TempDir()
	const each = 64
	huge, large := manyNames(t, 349_000), manyNames(t, 30_000)
	if len(huge) > MaxFileSize {
		t.Fatalf("the certificate has %d bytes", len(huge))
	}
	for i := range each {
		huge[len(huge)-1], large[len(large)-1] = byte(i), byte(i) // make each unique
		write(t, filepath.Join(dir, fmt.Sprintf("a%d.der", i)), huge)
		write(t, filepath.Join(dir, fmt.Sprintf("b%d.der", i)), large)
	}
	text, _ := testCertificate(t)
	write(t, filepath.Join(dir, "z.pem"), text)
	output, err := exec.CommandContext(t.Context(), os.Args[0], "-test.run", "^TestMemoryIsBounded$", "-memory-bound", dir).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, output)
	}
	scans := 0
	for line := range strings.Lines(string(output)) {
		var found, problems, largest int
		var peak float64
		if n, _ := fmt.Sscanf(line, "bound: %d %d %d %f", &found, &problems, &largest, &peak); n != 4 {
			continue
		}
		scans++
		t.Logf("peak %.0f MiB, %d bytes at a time", peak, largest)
		if found != 2*each+1 {
			t.Errorf("found %d certificates, %d errors; want %d", found, problems, 2*each+1)
		}
		if largest > emitBytes+8*MaxFileSize {
			t.Errorf("%d bytes were emitted at once, want about %d at most", largest, emitBytes)
		}
		// The limit is far above normal use, which the race detector doubles, and far below the
		// memory that all these certificates need together.
		if peak > 200 {
			t.Errorf("the scan took %.0f MiB", peak)
		}
	}
	if scans != 2 {
		t.Errorf("%d scans reported their memory:\n%s", scans, output)
	}
}

// TestIndexIsReadInBounds checks that unchanged files, which keep blocks of the index in memory,
// count against the same budget as files that are read.
func TestIndexIsReadInBounds(t *testing.T) {
	dir := t.TempDir()
	large := manyNames(t, 30_000)
	for i := range 60 {
		large[len(large)-1] = byte(i)
		write(t, filepath.Join(dir, fmt.Sprintf("%02d.der", i)), large)
	}
	s := newScanner(t, Options{Dirs: []string{dir}})
	scanAll(t, s)
	r := newRun(t.Context(), s, nil)
	defer r.cancel(nil)
	closeIndex := r.openIndex()
	defer closeIndex()
	go func() {
		defer close(r.segments)
		if err := errors.Join(r.resolveRoots(), r.walk(), r.flush()); err != nil {
			t.Error(err)
		}
	}()
	r.newWorker()
	hits := 0
	for segment := range r.segments {
		held := 0
		for _, e := range segment.entries {
			if !e.hit {
				t.Errorf("%s is not in the index", e.name)
			}
			held += len(e.kept.Outcome)
			hits++
		}
		if held > 2*segmentBytes || segment.units == 0 {
			t.Errorf("a segment holds %d bytes of the index and %d units of the budget", held, segment.units)
		}
		for range segment.units {
			<-r.budget
		}
	}
	if hits != 60 {
		t.Errorf("%d files, want 60", hits)
	}
}

// noPassword is the end of the error for a store that no password opens.
const noPassword = "PKCS#12: no configured password opens the certificates"

// slowStore returns a PKCS#12 file that no password opens, with the given number of iterations.
func slowStore(t testing.TB, iterations int, salt byte) []byte {
	t.Helper()
	data, err := os.ReadFile("../pkcs12/testdata/secret.p12")
	if err != nil {
		t.Fatal(err)
	}
	data = slices.Clone(data)
	// The salt of PBKDF2 is an OCTET STRING before the INTEGER of the iterations.
	const oidPBKDF2 = "\x2a\x86\x48\x86\xf7\x0d\x01\x05\x0c"
	at := bytes.Index(data, []byte(oidPBKDF2))
	if at < 0 {
		t.Fatal("../pkcs12/testdata/secret.p12 has no PBKDF2")
	}
	at += len(oidPBKDF2) + 2
	if data[at] != ber.TagOctetString {
		t.Fatalf("../pkcs12/testdata/secret.p12: no salt at %d", at)
	}
	data[at+2] ^= 0xff
	data[at+3] = salt
	at += 2 + int(data[at+1])
	if data[at] != ber.TagInteger || data[at+1] != 2 {
		t.Fatalf("../pkcs12/testdata/secret.p12: no iterations of two bytes at %d", at)
	}
	data[at+2], data[at+3] = byte(iterations>>8), byte(iterations)
	return data
}

// TestEffortIsBounded checks that expensive files stop neither the scan nor the files of other
// users, and that the next scan continues with them.
func TestEffortIsBounded(t *testing.T) {
	const stores = 5
	for _, test := range []struct {
		name  string
		bound func(*Scanner)
	}{
		{"owner", func(s *Scanner) { s.ownerTime = 1 }},
		{"scan", func(s *Scanner) { s.scanTime = 1 }},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			owner := 0
			for i := range stores {
				path := filepath.Join(dir, fmt.Sprintf("%d.p12", i))
				write(t, path, slowStore(t, 0x7fff, byte(i)))
				owner = giveAway(t, path)
			}
			text, _ := testCertificate(t)
			write(t, filepath.Join(dir, "z.pem"), text)
			s := newScanner(t, Options{Dirs: []string{dir}})
			test.bound(s)
			for i := range stores {
				found, summary := scanAll(t, s)
				if len(found) != 1 {
					t.Errorf("scan %d: found %d certificates, want that of the ordinary file", i, len(found))
				}
				locked, unread := 0, 0
				for _, problem := range summary.Errors {
					switch {
					case strings.HasSuffix(problem, noPassword):
						locked++
					case strings.Contains(problem, fmt.Sprintf("like %d other files of user %d", stores-i-2, owner)):
						unread++
					}
				}
				last := i == stores-1
				if locked != i+1 || unread != 1 && !last || len(summary.Errors) != locked+unread {
					t.Errorf("scan %d: errors %q, want %d locked stores and one error for the others", i, summary.Errors, i+1)
				}
			}
			_, summary := scanAll(t, s)
			mustRemember(t, summary)
		})
	}
}

// giveAway gives a file to a user other than root and returns the user.
func giveAway(t *testing.T, path string) (owner int) {
	t.Helper()
	const nobody = 65534
	if owner = os.Getuid(); owner == 0 {
		if owner = nobody; os.Lchown(path, owner, -1) != nil {
			needs.Missing(t, "cannot give files away, though root")
		}
	}
	return owner
}

// TestRootsFilesAreNotCrowdedOut checks that other users, even one who owns files under a thousand
// ids, use up neither the processor time nor the report space of root's files.
func TestRootsFilesAreNotCrowdedOut(t *testing.T) {
	e := effort{ownerLimit: time.Minute, limit: 10 * time.Minute}
	for owner := range uint32(2 * maxOwners) {
		e.count(owner+1, 0, time.Second)
	}
	if e.allows(2*maxOwners, false) || e.allows(1, true) {
		t.Error("the limit of a user is not enforced")
	}
	for range 2 {
		if !e.allows(rootUser, true) {
			t.Error("root's key stores are not parsed")
		}
		e.count(rootUser, 0, time.Second)
	}

	needs.Root(t, "giving files away")
	dir := t.TempDir()
	text, _ := testCertificate(t)
	hoard := filepath.Join(dir, "a.pem")
	write(t, hoard, bytes.Repeat(text, 100))
	owner := giveAway(t, hoard)
	for i := range 20 {
		if err := os.Link(hoard, filepath.Join(dir, fmt.Sprintf("a%02d.pem", i))); err != nil {
			t.Fatal(err)
		}
	}
	write(t, filepath.Join(dir, "z0.pem"), bytes.Repeat(text, 300))
	write(t, filepath.Join(dir, "z1.pem"), text)
	s := newScanner(t, Options{Dirs: []string{dir}})
	s.ownerBytes = 150 * len(text)
	for range 2 { // the second time from the index
		found, summary := scanAll(t, s)
		if len(found) != 2*100+300+1 {
			t.Errorf("%d certificates, want those of two of the user's files, and root's", len(found))
		}
		want := fmt.Sprintf("%s/a01.pem: its certificates are not reported, like those in 18 other files of user %d", dir, owner)
		if len(summary.Errors) != 1 || !strings.HasPrefix(summary.Errors[0], want) {
			t.Errorf("errors %q, want %q", summary.Errors, want)
		}
	}
}

// TestFailuresAreRemembered checks that a key store that was only touched or copied is not opened
// again, but is retried with another password.
func TestFailuresAreRemembered(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.p12")
	write(t, path, slowStore(t, 0x7fff, 1))
	s := newScanner(t, Options{Dirs: []string{dir}})
	scanAll(t, s)
	s.ownerTime = 0 // nothing may be opened any more
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "b.p12"), data)
	if err := os.Chtimes(path, time.Now(), time.Now()); err != nil {
		t.Fatal(err)
	}
	_, summary := scanAll(t, s)
	if summary.Read != 2 || len(summary.Errors) != 2 || !strings.HasSuffix(summary.Errors[1], noPassword) {
		t.Errorf("read %d files, errors %q; want the remembered outcome of the first", summary.Read, summary.Errors)
	}
	s.tried = []string{"another"}
	if _, summary = scanAll(t, s); len(summary.Errors) != 1 || !strings.Contains(summary.Errors[0], "not parsed, like") {
		t.Errorf("errors %q; want both to be retried", summary.Errors)
	}
}

// TestInterruptedScanIsRemembered checks that a scan after interrupted ones reads only the files
// that they did not reach.
func TestInterruptedScanIsRemembered(t *testing.T) {
	const n = 40
	dir := t.TempDir()
	file := func(i int) string { return filepath.Join(dir, fmt.Sprint(i/10), fmt.Sprintf("%02d.pem", i)) }
	text, _ := testCertificate(t)
	for i := range n {
		write(t, file(i), slices.Concat(fmt.Appendf(nil, "%d\n", i), bytes.Repeat(text, emitAtOnce)))
	}
	s := newScanner(t, Options{Dirs: []string{dir}})
	broken := errors.New("broken off")
	// Stop after that many files, by an error or by the context.
	scan := func(until int, cancelled bool) (int, Summary) {
		ctx, cancel := context.WithCancelCause(t.Context())
		defer cancel(nil)
		files := 0
		summary, err := s.Scan(ctx, func(found []api.DiscoveredCertificate) error {
			if files++; files < until {
				return nil
			}
			if !cancelled {
				return broken
			}
			cancel(broken)
			return nil
		})
		if until <= n && !errors.Is(err, broken) || until > n && err != nil {
			t.Errorf("error %v", err)
		}
		return files, summary
	}
	_, summary := scan(15, false)
	if summary.Reached != file(14) {
		t.Errorf("the scan reached %s, want %s", summary.Reached, file(14))
	}
	if _, summary = scan(n+1, false); summary.Read != n-15 {
		t.Errorf("read %d files, want the %d that the previous scan did not reach", summary.Read, n-15)
	}
	// An interrupted scan keeps the records of a complete index that follow the interruption.
	write(t, file(3), text)
	scan(20, true)
	batches, summary := scan(n+1, false)
	mustRemember(t, summary)
	if batches != n {
		t.Errorf("%d files were emitted, want %d", batches, n)
	}
}

// TestLongPathKeepsItsCause covers paths of up to 4 KiB in errors of at most 1 KiB.
func TestLongPathKeepsItsCause(t *testing.T) {
	dir := t.TempDir()
	deep := dir
	for range 12 {
		deep = filepath.Join(deep, strings.Repeat("d", 200))
	}
	write(t, filepath.Join(deep, "damaged.pem"), []byte("-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"))
	_, summary := scanAll(t, newScanner(t, Options{Dirs: []string{dir}}))
	if len(summary.Errors) != 1 || len(summary.Errors[0]) > maxProblem ||
		!strings.HasPrefix(summary.Errors[0], dir) || !strings.Contains(summary.Errors[0], "/damaged.pem: damaged certificate") {
		t.Errorf("errors %q; want both ends of the path, and the cause", summary.Errors)
	}
	if problem := problemOf("/a", strings.Repeat("é", maxProblem)); len(problem) > maxProblem+len("…") {
		t.Errorf("a problem of %d bytes", len(problem))
	}
}
