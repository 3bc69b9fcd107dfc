{{/* Whether to install policies: by the value, or because it is known where a server runs. */}}
{{- define "flashsale.network.enabled" -}}
{{- with .Values.networkPolicies -}}
{{- if or .enabled .redis.peers .kafka.peers .database.peers -}}true{{- end -}}
{{- end -}}
{{- end }}

{{/* Egress rule to some peers: (dict "ports" (list 6379) "peers" (list)). */}}
{{- define "flashsale.network.egress" -}}
- ports:
    {{- range .ports }}
    - {protocol: TCP, port: {{ . }}}
    {{- end }}
  {{- with .peers }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}

{{/* Egress rule to a server: (dict "root" $ "server" "redis"). */}}
{{- define "flashsale.network.server" -}}
{{- $policy := index .root.Values.networkPolicies .server -}}
{{- $ports := include "flashsale.network.ports" . | fromJsonArray -}}
{{- if not $ports -}}
{{- $ports = list (default (get (include "flashsale.network.defaults" . | fromJson) .server) $policy.port) -}}
{{- end -}}
{{ include "flashsale.network.egress" (dict "ports" $ports "peers" $policy.peers) }}
{{- end }}

{{- define "flashsale.network.defaults" -}}
{"redis": 6379, "kafka": 9092, "database": 5432, "http": 80, "https": 443}
{{- end }}

{{/* The ports in a server's address, as a JSON list. It is empty if the address is in a Secret. */}}
{{- define "flashsale.network.ports" -}}
{{- $address := dict "redis" .root.Values.redis.url "kafka" .root.Values.kafka.bootstrap "database" .root.Values.database.url "collector" .root.Values.tracing.endpoint "issuer" .root.Values.identity.jwksUrl | dig .server "" -}}
{{- $defaults := include "flashsale.network.defaults" . | fromJson -}}
{{- $default := get $defaults (ternary (splitList ":" $address | first) .server (has .server (list "collector" "issuer"))) -}}
{{- $ports := list -}}
{{- if $address -}}
{{- range regexReplaceAll "^([a-z]+://)?([^/?]*@)?([^/?]*).*$" $address "${3}" | splitList "," -}}
{{- $port := regexFind ":[0-9]+$" . | trimPrefix ":" -}}
{{- $ports = append $ports (int (default $default $port)) -}}
{{- end -}}
{{- end -}}
{{ uniq $ports | toJson }}
{{- end }}

{{- define "flashsale.network.dns" -}}
- ports:
    - {protocol: UDP, port: {{ .port }}}
    - {protocol: TCP, port: {{ .port }}}
  {{- with .peers }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}

{{/* Ingress rule from some peers to a named port of the pods: (dict "peers" (list) "port" "http"). */}}
{{- define "flashsale.network.ingress" -}}
- ports:
    - {protocol: TCP, port: {{ .port }}}
  {{- with .peers }}
  from:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
