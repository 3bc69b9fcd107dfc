// Command tiltfile FILE SUBCOMMAND runs a Tiltfile as `tilt SUBCOMMAND` does, with Tilt's Starlark
// interpreter and dialect. Tilt is not published as a package, so stand-ins replace its builtins.
// They check the names and types of their arguments and print each call as one line of JSON. Their
// signatures come from Tilt's API reference. Only the builtins that the Tiltfile needs exist here;
// any other name is an error.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"go.starlark.net/starlark"
	"go.starlark.net/starlarkstruct"
	"go.starlark.net/syntax"
)

// builtins has the parameters of each builtin, in order, with their types.
var builtins = map[string]string{
	"ci_settings":     "k8s_grace_period?:string timeout?:string readiness_timeout?:string",
	"docker_build":    "ref:string context:string build_args?:dict dockerfile?:string ignore?:string|list only?:string|list target?:string",
	"helm":            "pathToChartDir:string name?:string namespace?:string values?:string|list set?:string|list kube_version?:string skip_crds?:bool",
	"k8s_resource":    "workload?:string new_name?:string port_forwards?:string|int|list extra_pod_selectors?:dict|list trigger_mode?:string resource_deps?:list objects?:list auto_init?:bool pod_readiness?:string links?:string|list labels?:string|list",
	"k8s_yaml":        "yaml:string|list allow_duplicates?:bool",
	"local_resource":  "name:string cmd?:string|list deps?:string|list trigger_mode?:string resource_deps?:list auto_init?:bool serve_cmd?:string|list env?:dict labels?:string|list dir?:string allow_parallel?:bool",
	"update_settings": "max_parallel_updates?:int k8s_upsert_timeout_secs?:int",
}

type printed struct {
	Call string         `json:"call"`
	With map[string]any `json:"with"`
}

func builtin(name, signature string) *starlark.Builtin {
	return starlark.NewBuiltin(name, func(_ *starlark.Thread, b *starlark.Builtin, args starlark.Tuple, kwargs []starlark.Tuple) (starlark.Value, error) {
		parameters := strings.Fields(signature)
		values := make([]starlark.Value, len(parameters))
		var pairs []any
		for i, parameter := range parameters {
			key, _, _ := strings.Cut(parameter, ":")
			pairs = append(pairs, key, &values[i])
		}
		if err := starlark.UnpackArgs(b.Name(), args, kwargs, pairs...); err != nil {
			return nil, err
		}
		call := printed{name, map[string]any{}}
		for i, parameter := range parameters {
			if values[i] == nil {
				continue
			}
			key, kinds, _ := strings.Cut(parameter, ":")
			if kind := values[i].Type(); !strings.Contains("|"+kinds+"|", "|"+kind+"|") {
				return nil, fmt.Errorf("%s: %s is %s, expected %s", name, strings.TrimSuffix(key, "?"), kind, kinds)
			}
			call.With[strings.TrimSuffix(key, "?")] = plain(values[i])
		}
		if err := json.NewEncoder(os.Stdout).Encode(call); err != nil {
			return nil, err
		}
		if name == "helm" { // returns YAML, which the Tiltfile passes to k8s_yaml
			return starlark.String("<helm>"), nil
		}
		return starlark.None, nil
	})
}

func plain(value starlark.Value) any {
	switch value := value.(type) {
	case starlark.String:
		return string(value)
	case starlark.Int:
		number, _ := value.Int64()
		return number
	case starlark.Bool:
		return bool(value)
	case *starlark.List:
		list := []any{}
		for i := range value.Len() {
			list = append(list, plain(value.Index(i)))
		}
		return list
	case *starlark.Dict:
		dict := map[string]any{}
		for _, item := range value.Items() {
			key, _ := starlark.AsString(item[0])
			dict[key] = plain(item[1])
		}
		return dict
	}
	return value.String()
}

func main() {
	predeclared := starlark.StringDict{
		"TRIGGER_MODE_AUTO":   starlark.String("auto"),
		"TRIGGER_MODE_MANUAL": starlark.String("manual"),
	}
	predeclared["config"] = starlarkstruct.FromStringDict(starlarkstruct.Default, starlark.StringDict{
		"tilt_subcommand": starlark.String(os.Args[2]),
	})
	for name, signature := range builtins {
		predeclared[name] = builtin(name, signature)
	}
	// Tilt's dialect allows statements at the top level and reassigned names.
	dialect := &syntax.FileOptions{Set: true, While: true, TopLevelControl: true, GlobalReassign: true}
	if _, err := starlark.ExecFileOptions(dialect, &starlark.Thread{Name: "Tiltfile"}, os.Args[1], nil, predeclared); err != nil {
		if failed, ok := err.(*starlark.EvalError); ok {
			err = fmt.Errorf("%s", failed.Backtrace())
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
