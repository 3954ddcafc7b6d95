package reliability_test

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"testing"
)

var (
	seedFlag = flag.Uint64("seed", 0, "run only this seed of the random tests, and log what the agent says; with -runs, start with this seed")
	runsFlag = flag.Int("runs", 0, "how many seeds of each random test to run (default: as many as CI does)")
	turnFlag = flag.Bool("turn", false, "internal: be a turn of TestHunt: after an interrupt, finish the current runs and end")
	soakFlag = flag.Bool("soak", false, "soak for 24 hours of virtual time instead of a short while")
	loadFlag = flag.String("load-pair", "", "internal: be the reload command of a server, of certificate,key,problems")
)

// interrupted is done when a turn of TestHunt should end.
var interrupted = context.Background()

func TestMain(m *testing.M) {
	flag.Parse()
	if *turnFlag || *huntFlag > 0 {
		ctx, stop := signal.NotifyContext(interrupted, os.Interrupt)
		context.AfterFunc(ctx, stop) // a second interrupt kills
		interrupted = ctx
	}
	if parts := strings.Split(*loadFlag, ","); len(parts) == 3 {
		if err := loadPair(parts[0], parts[1], parts[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	code := m.Run()
	removeBuild()
	os.Exit(code)
}

// oneSeed reports whether a single seed is repeated, with its log.
func oneSeed() bool { return *seedFlag != 0 && *runsFlag == 0 }

// seeds lists the seeds to run: the one given by flag, or several.
func seeds(usual int) []uint64 {
	switch {
	case oneSeed():
		usual = 1
	case *runsFlag > 0:
		usual = *runsFlag
	case testing.Short():
		usual = min(usual, 20)
	}
	all := make([]uint64, usual)
	for i := range all {
		all[i] = max(*seedFlag, 1) + uint64(i)
	}
	return all
}

// again returns how to run one seed again.
func again(test string, seed uint64) string {
	return fmt.Sprintf("seed %d; run it again: go test ./internal/reliability -run '^%s$' -seed %d", seed, test, seed)
}
