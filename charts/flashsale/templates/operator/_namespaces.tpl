{{/* The namespaces that the operator serves, as a JSON list. An empty list means all. */}}
{{- define "flashsale.operator.namespaces" -}}
{{- if .Values.operator.allNamespaces -}}
[]
{{- else -}}
{{ default (list .Release.Namespace) .Values.operator.namespaces | toJson }}
{{- end }}
{{- end }}

{{/* Name of cluster-wide objects. It differs for releases of the same name in two namespaces. */}}
{{- define "flashsale.operator.clusterName" -}}
{{ .Release.Namespace }}-{{ include "flashsale.component.name" (dict "root" . "component" "operator") }}
{{- end }}
