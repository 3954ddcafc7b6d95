package main

import (
	"context"
	"fmt"
	"runtime"

	"certctl-agent/internal/buildinfo"
)

func runVersion(_ context.Context, p process) error {
	_, err := fmt.Fprintf(p.stdout, "certctl-agent %s\ncommit %s\n%s %s/%s\n",
		buildinfo.Version(), buildinfo.Commit(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
	return err
}
