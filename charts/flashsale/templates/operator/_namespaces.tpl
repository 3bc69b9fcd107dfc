{{/* The namespaces that the operator serves, as a JSON list. An empty list means all. */}}
{{- define "flashsale.operator.namespaces" -}}
{{- if .Values.operator.allNamespaces -}}
[]
{{- else -}}
{{ default (list .Release.Namespace) .Values.operator.namespaces | toJson }}
{{- end }}
{{- end }}
