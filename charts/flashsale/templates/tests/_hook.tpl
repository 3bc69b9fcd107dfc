{{/* Metadata of an object of `helm test`: (dict "root" $ "weight" 0), optionally with "namespace". */}}
{{- define "flashsale.test.metadata" -}}
{{- $annotations := dict "helm.sh/hook" "test" "helm.sh/hook-weight" (toString .weight) "helm.sh/hook-delete-policy" "before-hook-creation,hook-succeeded" -}}
{{ include "flashsale.metadata" (merge (dict "component" "test" "annotations" $annotations) .) }}
{{- end }}

{{/* The namespace of the test's FlashSale: one that the operator serves. */}}
{{- define "flashsale.test.namespace" -}}
{{ default .Release.Namespace (include "flashsale.operator.namespaces" . | fromJsonArray | first) }}
{{- end }}
