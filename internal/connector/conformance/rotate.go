package conformance

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/testing/needs"
	"certctl-agent/internal/tlsprobe"
)

// Rotation describes a live server that gets one certificate after another while clients connect to
// it as fast as they can.
type Rotation struct {
	Endpoint tlsprobe.Endpoint
	Others   []tlsprobe.Endpoint // clients connect to Endpoint and these in turn
	Rounds   int                 // certificates after the first; 0: 15, or 50 where everything is tested
	Clients  int                 // 0: 1

	// Material makes the next certificate.
	Material func() *connector.Material

	// Deploy installs and verifies m.
	Deploy func(ctx context.Context, m *connector.Material) error

	// Drain is how long old workers usually answer after Deploy returned. The rotation ends when
	// none has answered for that long.
	Drain time.Duration

	maxDrain time.Duration // 0: the constant
}

// maxDrain is the longest time that an old worker may answer. On a busy machine it can take seconds
// until the server is scheduled and stops the worker.
const maxDrain = 30 * time.Second

// Figures are the results of a Rotation.
type Figures struct {
	Rotations  int
	Handshakes int           // completed
	Failed     int           // not completed and not TurnedAway
	TurnedAway int           // told before TLS to connect again, see closingGreeting
	Mismatched int           // of Failed: the key did not match the certificate
	Stale      int           // got an old certificate and started after maxDrain
	Drained    time.Duration // the longest time after a verification until the last old certificate
	Elapsed    time.Duration
}

func (f Figures) String() string {
	return fmt.Sprintf("%d rotations in %v, %d handshakes: %d failed, %d turned away, %d with a mismatched pair, %d with an old certificate; old workers drained within %v",
		f.Rotations, f.Elapsed.Round(time.Millisecond), f.Handshakes, f.Failed, f.TurnedAway, f.Mismatched, f.Stale, f.Drained.Round(time.Millisecond))
}

// noticed reports whether clients noticed the rotations. Clients are rarely turned away: in 50
// reloads of Dovecot at most one is. One in ten is too many.
func (f Figures) noticed(rounds, clients int) bool {
	return f.Failed > 0 || f.Stale > 0 || f.Rotations != rounds || f.TurnedAway > max(1, rounds*clients/10)
}

// closingGreeting returns the start of the greeting by which a server that is shutting down or
// overloaded closes the session and asks the client to connect again. Since TLS has not started,
// the certificate cannot be the cause. It returns "" for protocols that start with TLS.
func closingGreeting(protocol string) string {
	switch protocol {
	case tlsprobe.SMTP:
		return "421" // RFC 5321, section 3.8
	case tlsprobe.IMAP:
		return "* BYE" // RFC 9051, section 7.1.5
	case tlsprobe.POP3:
		return "-ERR [SYS/TEMP]" // RFC 3206, section 4
	}
	return ""
}

func turnedAway(protocol string, err error) bool {
	greeting := closingGreeting(protocol)
	return greeting != "" && strings.Contains(err.Error(), "the server answered the connection with: "+greeting)
}

// rotation is the shared state of the clients and the deployer.
type rotation struct {
	Rotation

	mu       sync.Mutex
	round    map[string]int // by the certificate's fingerprint; guarded by mu
	verified []time.Time    // by round; guarded by mu
	old      time.Time      // of the last handshake with an old certificate; guarded by mu
	since    int            // handshakes with the newest one since then; guarded by mu
	figures  Figures        // guarded by mu
	errs     []string       // guarded by mu
}

// Rotate runs r and fails the test unless every handshake got a current certificate with its own
// key. A client that is turned away before TLS connects again, as mail clients do.
func Rotate(t testing.TB, r Rotation) Figures {
	t.Helper()
	if r.Rounds == 0 {
		r.Rounds = 15
		if needs.Everything() {
			r.Rounds = 50
		}
	}
	if r.Clients == 0 {
		r.Clients = 1
	}
	if r.maxDrain == 0 {
		r.maxDrain = maxDrain
	}
	run := &rotation{Rotation: r, round: make(map[string]int)}
	if err := run.next(t.Context()); err != nil {
		t.Fatalf("first deployment: %v", err)
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var clients sync.WaitGroup
	for range r.Clients {
		clients.Go(func() {
			endpoints := append([]tlsprobe.Endpoint{r.Endpoint}, r.Others...)
			for i := 0; ctx.Err() == nil; i++ {
				run.connect(ctx, endpoints[i%len(endpoints)])
			}
		})
	}
	start := time.Now()
	for round := range r.Rounds {
		err := run.next(t.Context())
		if err == nil {
			err = run.waitSeen(t.Context())
		}
		if err != nil {
			t.Errorf("rotation %d: %v", round+1, err)
			break
		}
	}
	// Keep the clients connecting long enough to notice an old worker that stays.
	for last := time.Now(); !run.drained() && time.Since(last) < r.maxDrain+time.Second; {
		time.Sleep(20 * time.Millisecond)
	}
	stop()
	clients.Wait()

	run.mu.Lock()
	defer run.mu.Unlock()
	figures := run.figures
	figures.Rotations, figures.Elapsed = len(run.verified)-1, time.Since(start)
	t.Log(figures)
	if figures.noticed(r.Rounds, r.Clients) {
		t.Errorf("clients noticed a rotation: %v\n%s", figures, strings.Join(run.errs, "\n"))
	}
	return figures
}

func (r *rotation) next(ctx context.Context) error {
	m := r.Material()
	r.mu.Lock()
	r.round[pemutil.Fingerprint(m.Leaf)] = len(r.round)
	r.mu.Unlock()
	if err := r.Deploy(ctx, m); err != nil {
		return err
	}
	r.mu.Lock()
	r.verified, r.since = append(r.verified, time.Now()), 0
	r.mu.Unlock()
	return nil
}

// waitSeen waits until a client got the newest certificate. Otherwise a busy machine could finish
// all rotations before any client connects.
func (r *rotation) waitSeen(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, r.maxDrain)
	defer cancel()
	for {
		r.mu.Lock()
		since := r.since
		r.mu.Unlock()
		if since > 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("no client got the new certificate within %v", r.maxDrain)
		case <-time.After(time.Millisecond):
		}
	}
}

// drainedAfter is how many handshakes in a row must get the newest certificate. An old worker would
// have answered one of them.
const drainedAfter = 20

// drained reports whether no old worker has answered for a while.
func (r *rotation) drained() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	last := r.verified[len(r.verified)-1]
	if last.Before(r.old) {
		last = r.old
	}
	return r.since >= drainedAfter && time.Since(last) > r.Drain+100*time.Millisecond
}

func (r *rotation) connect(ctx context.Context, endpoint tlsprobe.Endpoint) {
	start := time.Now()
	attempt, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	result, err := tlsprobe.Probe(attempt, endpoint)
	if ctx.Err() != nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil && turnedAway(endpoint.StartTLS, err) {
		r.figures.TurnedAway++
		r.note(err.Error())
		return
	}
	if err != nil {
		r.figures.Failed++
		if strings.Contains(err.Error(), "signature") {
			r.figures.Mismatched++
		}
		r.note(err.Error())
		return
	}
	r.figures.Handshakes++
	round, known := r.round[result.Fingerprint]
	if !known {
		round = -1 // from before the rotation
	}
	if round+1 >= len(r.verified) {
		r.since++
		return // the newest that was verified, or newer
	}
	r.old, r.since = time.Now(), 0
	late := start.Sub(r.verified[round+1])
	r.figures.Drained = max(r.figures.Drained, late)
	if late > r.maxDrain {
		r.figures.Stale++
		r.note(fmt.Sprintf("the certificate of round %d, %v after that of round %d was verified", round, late, round+1))
	}
}

// note keeps the first few errors for the test's output.
func (r *rotation) note(text string) {
	if len(r.errs) < 10 {
		r.errs = append(r.errs, text)
	}
}
