package reliability_test

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
)

var (
	seedFlag = flag.Uint64("seed", 0, "run only this seed of the random tests, and log what the agent says")
	runsFlag = flag.Int("runs", 0, "how many seeds of each random test to run (default: as many as CI does)")
	soakFlag = flag.Bool("soak", false, "soak for 24 hours of virtual time instead of a short while")
	loadFlag = flag.String("load-pair", "", "internal: be the reload command of a server, of certificate,key,problems")
)

func TestMain(m *testing.M) {
	flag.Parse()
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

// seeds lists the seeds to run: the one given by flag, or the first few.
func seeds(usual int) []uint64 {
	if *seedFlag != 0 {
		return []uint64{*seedFlag}
	}
	if *runsFlag > 0 {
		usual = *runsFlag
	}
	if testing.Short() {
		usual = min(usual, 20)
	}
	all := make([]uint64, usual)
	for i := range all {
		all[i] = uint64(i) + 1
	}
	return all
}

// again returns how to run one seed again.
func again(test string, seed uint64) string {
	return fmt.Sprintf("seed %d; run it again: go test ./internal/reliability -run '^%s$' -seed %d", seed, test, seed)
}
