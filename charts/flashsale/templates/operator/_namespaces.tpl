{{/* The namespaces that the operator serves, as JSON; none means all. */}}
{{- define "flashsale.operator.namespaces" -}}
{{- if .Values.operator.allNamespaces -}}
[]
{{- else -}}
{{ default (list .Release.Namespace) .Values.operator.namespaces | toJson }}
{{- end }}
{{- end }}

{{/* Of what has no namespace, so that releases of one name in two namespaces do not collide. */}}
{{- define "flashsale.operator.clusterName" -}}
{{ .Release.Namespace }}-{{ include "flashsale.component.name" (dict "root" . "component" "operator") }}
{{- end }}
