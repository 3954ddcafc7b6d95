// Kube-apiserver is the API server of Kubernetes, for the tests of the target type
// KubernetesSecrets. Debian does not package it, so CI builds it from its module.
package main

import (
	"os"

	"k8s.io/component-base/cli"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
)

func main() { os.Exit(cli.Run(app.NewAPIServerCommand())) }
