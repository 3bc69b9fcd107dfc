// Checks that use the Go packages of other projects. kind's parser is internal to
// sigs.k8s.io/kind/pkg, and Go lets only modules below that path import it. Hence this module's name.
module sigs.k8s.io/kind/pkg/flashsale

go 1.24

require (
	go.starlark.net v0.0.0-20250225190231-0d3f41d403af
	sigs.k8s.io/kind v0.33.0
)

require (
	github.com/pkg/errors v0.9.1 // indirect
	go.yaml.in/yaml/v3 v3.0.4 // indirect
	golang.org/x/sys v0.30.0 // indirect
)
