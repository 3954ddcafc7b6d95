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
	"certctl-agent/internal/tlsprobe"
)

// Rotation is a live server that gets one certificate after another while
// clients connect to it as fast as they can.
type Rotation struct {
	Endpoint tlsprobe.Endpoint
	Others   []tlsprobe.Endpoint // that clients connect to as well, in turn
	Rounds   int                 // certificates after the first; 0: 50
	Clients  int                 // 0: 1

	// Material makes the next certificate.
	Material func() *connector.Material

	// Deploy installs it. It returns once a verification has met it.
	Deploy func(ctx context.Context, m *connector.Material) error

	// Drain is how long the server's old workers usually go on answering after
	// that. The rotation has ended when none has for so long.
	Drain time.Duration

	maxDrain time.Duration // 0: the constant
}

// maxDrain is how long an old worker may answer at all. It goes when the
// scheduler lets the server tell it to, which on a busy machine takes seconds.
const maxDrain = 30 * time.Second

// Figures is what a Rotation came to.
type Figures struct {
	Rotations  int
	Handshakes int           // completed by the clients
	Failed     int           // not completed, for any other reason than being turned away
	TurnedAway int           // told before TLS to connect again, see farewell
	Mismatched int           // of these: the key did not belong to the certificate
	Stale      int           // answered with an old certificate, begun after maxDrain
	Drained    time.Duration // the longest after a verification that an old one was met
	Elapsed    time.Duration
}

func (f Figures) String() string {
	return fmt.Sprintf("%d rotations in %v, %d handshakes: %d failed, %d turned away, %d with a mismatched pair, %d with an old certificate; old workers drained within %v",
		f.Rotations, f.Elapsed.Round(time.Millisecond), f.Handshakes, f.Failed, f.TurnedAway, f.Mismatched, f.Stale, f.Drained.Round(time.Millisecond))
}

// noticed reports whether clients noticed the rotations. To be turned away is rare: in
// 50 reloads of Dovecot it happens to one client or to none. One in ten is too many.
func (f Figures) noticed(rounds, clients int) bool {
	return f.Failed > 0 || f.Stale > 0 || f.Rotations != rounds || f.TurnedAway > max(1, rounds*clients/10)
}

// farewell is how a greeting begins with which a server that is shutting down or
// overloaded ends the session: the client is to connect again. No bytes of TLS have been
// exchanged, so no certificate can have to do with it. Protocols that begin with TLS have
// no such word.
func farewell(protocol string) string {
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
	word := farewell(protocol)
	return word != "" && strings.Contains(err.Error(), "the server answered the connection with: "+word)
}

// rotation is the state that clients and the deployer share.
type rotation struct {
	Rotation

	mu       sync.Mutex
	round    map[string]int // of each certificate's fingerprint; guarded by mu
	verified []time.Time    // when the certificate of each round was; guarded by mu
	old      time.Time      // when an old certificate was met last; guarded by mu
	since    int            // handshakes with the newest since then; guarded by mu
	figures  Figures        // guarded by mu
	errs     []string       // guarded by mu
}

// Rotate runs r and fails the test unless every handshake got a certificate of
// its time, with the key that belongs to it. A client that is turned away before TLS
// connects again, as mail clients do.
func Rotate(t testing.TB, r Rotation) Figures {
	t.Helper()
	if r.Rounds == 0 {
		r.Rounds = 50
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
			err = run.seen(t.Context())
		}
		if err != nil {
			t.Errorf("rotation %d: %v", round+1, err)
			break
		}
	}
	// An old worker that stays gets the chance to be caught.
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
		t.Errorf("a rotation was noticed: %v\n%s", figures, strings.Join(run.errs, "\n"))
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

// seen waits until a client has met the newest certificate. Without that, a
// busy machine could rotate past clients that see nothing of it.
func (r *rotation) seen(ctx context.Context) error {
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
			return fmt.Errorf("no client met the new certificate within %v", r.maxDrain)
		case <-time.After(time.Millisecond):
		}
	}
}

// enough handshakes in a row with the newest certificate: an old worker would
// have had one of them.
const enough = 20

// drained reports whether no old worker has answered for a while.
func (r *rotation) drained() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	last := r.verified[len(r.verified)-1]
	if last.Before(r.old) {
		last = r.old
	}
	return r.since >= enough && time.Since(last) > r.Drain+100*time.Millisecond
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
		round = -1 // the server had it before
	}
	if round+1 >= len(r.verified) {
		r.since++
		return // no newer one has been verified
	}
	r.old, r.since = time.Now(), 0
	late := start.Sub(r.verified[round+1])
	r.figures.Drained = max(r.figures.Drained, late)
	if late > r.maxDrain {
		r.figures.Stale++
		r.note(fmt.Sprintf("the certificate of round %d, %v after that of round %d was verified", round, late, round+1))
	}
}

// note keeps the first few mistakes for the test's output.
func (r *rotation) note(mistake string) {
	if len(r.errs) < 10 {
		r.errs = append(r.errs, mistake)
	}
}
