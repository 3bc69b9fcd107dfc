{{/* Egress rule to a port of some peers: (dict "peers" (list) "port" 6379). */}}
{{- define "flashsale.network.egress" -}}
- ports:
    - {protocol: TCP, port: {{ .port }}}
  {{- with .peers }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}

{{- define "flashsale.network.dns" -}}
- ports:
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
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
