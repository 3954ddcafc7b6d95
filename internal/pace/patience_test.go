package pace_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"certctl-agent/internal/api"
	"certctl-agent/internal/pace"
)

func TestPatience(t *testing.T) {
	gateway := &api.StatusError{Status: 404}
	repeat := func(n int, err error) (all []error) {
		for range n {
			all = append(all, err)
		}
		return all
	}
	tests := []struct {
		name  string
		every time.Duration
		tries []error
		want  int // the try at which patience is exhausted, from 1; 0: never
	}{
		{"ten minutes", time.Minute, repeat(30, gateway), 11},
		{"few tries", time.Hour, repeat(30, gateway), 4},
		{"many tries in a moment", time.Second, repeat(500, gateway), 0},
		{"large answers", time.Minute, repeat(30, api.ErrTooLarge), 11},
		{"overload", time.Minute, repeat(30, &api.StatusError{Status: 503}), 0},
		{"network", time.Minute, repeat(30, errors.New("no route to host")), 0},
		{"a success between", time.Minute, append(append(repeat(10, gateway), nil), repeat(10, gateway)...), 0},
		{"another failure between", time.Minute, append(append(repeat(10, gateway), &api.StatusError{Status: 502}), repeat(30, gateway)...), 22},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var p pace.Patience
				lost := 0
				for i, err := range test.tries {
					if p.Exhausted(api.Doubtful(err)) && lost == 0 {
						lost = i + 1
					}
					time.Sleep(test.every)
				}
				if lost != test.want {
					t.Errorf("patience was exhausted at try %d, want %d", lost, test.want)
				}
			})
		})
	}
}
