// Command kind reads a configuration as `kind create cluster --config` does and prints it with all
// defaults. Like kind, it fails on an unknown field.
package main

import (
	"encoding/json"
	"fmt"
	"os"

	"sigs.k8s.io/kind/pkg/internal/apis/config/encoding"
)

func main() {
	cluster, err := encoding.Load(os.Args[1])
	if err == nil {
		err = cluster.Validate()
	}
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(cluster)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
