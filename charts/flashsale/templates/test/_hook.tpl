{{/* Metadata of an object of `helm test`: (dict "root" $ "component" "test" "weight" 0), optionally with "namespace". */}}
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

{{/* The namespace of the test's FlashSale: one that the operator serves. */}}
{{- define "flashsale.test.namespace" -}}
{{ default .Release.Namespace (include "flashsale.operator.namespaces" . | fromJsonArray | first) }}
{{- end }}
