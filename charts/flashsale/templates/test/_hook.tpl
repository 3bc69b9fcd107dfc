{{/* Metadata of what `helm test` makes: (dict "root" $ "component" "test" "weight" 0), and "namespace" */}}
{{- define "flashsale.test.metadata" -}}
name: {{ include "flashsale.component.name" . }}
namespace: {{ default .root.Release.Namespace .namespace }}
labels:
  {{- include "flashsale.component.labels" . | nindent 2 }}
annotations:
  helm.sh/hook: test
  helm.sh/hook-weight: {{ .weight | quote }}
  helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}

{{/* A namespace that the operator serves. */}}
{{- define "flashsale.test.namespace" -}}
{{ default .Release.Namespace (include "flashsale.operator.namespaces" . | fromJsonArray | first) }}
{{- end }}
