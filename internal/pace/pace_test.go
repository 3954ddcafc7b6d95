package pace_test

import (
	"errors"
	"testing"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/pace"
)

const interval = time.Minute

// low and high are Rands that always return the ends of the range.
func low(int64) int64    { return 0 }
func high(n int64) int64 { return n - 1 }

func TestNextStaysInItsRange(t *testing.T) {
	repeat := func(o pace.Outcome, n int) []pace.Outcome {
		all := make([]pace.Outcome, n)
		for i := range all {
			all[i] = o
		}
		return all
	}
	failed := pace.Outcome{Failed: true}
	limited := pace.Outcome{RateLimited: true, RetryAfter: time.Second}

	tests := []struct {
		name      string
		yields    bool
		outcomes  []pace.Outcome
		min, max  time.Duration
		wantFails int
	}{
		{"healthy", false, repeat(pace.Outcome{}, 1), 54 * time.Second, 66 * time.Second, 0},
		{"one failure", false, repeat(failed, 1), 54 * time.Second, 126 * time.Second, 1},
		{"three failures", false, repeat(failed, 3), 54 * time.Second, 246 * time.Second, 3},
		{"many failures are capped and spread", false, repeat(failed, 500), 54 * time.Second, 366 * time.Second, 500},
		{"one success resets", false, append(repeat(failed, 9), pace.Outcome{}), 54 * time.Second, 66 * time.Second, 0},
		{"floor above the draw", false, []pace.Outcome{{Failed: true, RetryAfter: 10 * time.Minute}}, 10 * time.Minute, 11 * time.Minute, 1},
		{"429 for a heartbeat", false, repeat(limited, 1), time.Second, 61 * time.Second, 0},
		{"a second 429 for a heartbeat", false, repeat(limited, 2), time.Second, 31 * time.Second, 0},
		{"429 for a poll", true, repeat(limited, 1), 54 * time.Second, 126 * time.Second, 0},
		{"429s never count as failures", true, repeat(limited, 50), 54 * time.Second, 126 * time.Second, 0},
		{"a poll stays slow after a 429", true, []pace.Outcome{limited, {}}, 54 * time.Second, 126 * time.Second, 0},
		{"and recovers", true, append([]pace.Outcome{limited}, repeat(pace.Outcome{}, 17)...), 54 * time.Second, 66 * time.Second, 0},
		{"a heartbeat does not yield", false, []pace.Outcome{limited, {}}, 54 * time.Second, 66 * time.Second, 0},
		{"429 keeps the failures before it", false, []pace.Outcome{failed, limited}, time.Second, 61 * time.Second, 1},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			draws := []pace.Rand{low, high}
			for range 200 { // one in 30 is below the floor of a second
				draws = append(draws, pace.Global)
			}
			for i, draw := range draws {
				p := pace.New(interval, draw)
				if test.yields {
					p = pace.NewYielding(interval, draw)
				}
				var got time.Duration
				for _, o := range test.outcomes {
					got = p.Next(o)
				}
				if got < test.min || got >= test.max {
					t.Errorf("draw %d: next try after %v, want [%v, %v)", i, got, test.min, test.max)
				}
				if got := p.Failures(); got != test.wantFails {
					t.Errorf("draw %d: Failures() = %d, want %d", i, got, test.wantFails)
				}
			}
		})
	}
}

func TestAfter(t *testing.T) {
	tests := []struct {
		name string
		err  error
		want pace.Outcome
	}{
		{"success", nil, pace.Outcome{}},
		{"network", errors.New("no route to host"), pace.Outcome{Failed: true}},
		{"overload", &api.StatusError{Status: 503, RetryAfter: time.Minute}, pace.Outcome{Failed: true, RetryAfter: time.Minute}},
		{"rate limit", &api.StatusError{Status: 429, RetryAfter: time.Second}, pace.Outcome{RateLimited: true, RetryAfter: time.Second}},
	}
	for _, test := range tests {
		if got := pace.After(test.err); got != test.want {
			t.Errorf("%s: %+v, want %+v", test.name, got, test.want)
		}
	}
}

func TestFirstCoversTheInterval(t *testing.T) {
	if got := pace.New(interval, low).First(); got != 0 {
		t.Errorf("lowest first delay = %v, want 0", got)
	}
	if got := pace.New(interval, high).First(); got < interval-time.Second || got >= interval {
		t.Errorf("highest first delay = %v, want just under %v", got, interval)
	}
}

func TestTinyIntervalDoesNotPanic(t *testing.T) {
	p := pace.NewYielding(1, pace.Global)
	for range 100 {
		p.First()
		p.Next(pace.Outcome{Failed: true})
		p.Next(pace.Outcome{RateLimited: true})
	}
}
