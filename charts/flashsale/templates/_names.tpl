{{/* Prefix of every name. 50 characters leave room for suffixes such as "-consumer". */}}
{{- define "flashsale.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 50 | trimAll "-" }}
{{- else if contains .Chart.Name .Release.Name }}
{{- .Release.Name | trunc 50 | trimAll "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimAll "-" }}
{{- end }}
{{- end }}

{{/* Name of the engine, the prefix of its topics, consumer group and Redis keys. */}}
{{- define "flashsale.engine" -}}
{{ default (include "flashsale.fullname" .) .Values.engine }}
{{- end }}

{{/* The flashsale.component.* templates take (dict "root" $ "component" "api"). */}}
{{- define "flashsale.component.name" -}}
{{ include "flashsale.fullname" .root }}-{{ .component }}
{{- end }}

{{/*
Name of an RBAC object: (dict "root" $ "component" "operator" "namespace" "there"). A cluster-wide object
has no "namespace". Outside the release's namespace, the name begins with that namespace, because
releases of the same name can meet there. Neither a namespace nor a name has a colon.
*/}}
{{- define "flashsale.rbac.name" -}}
{{- if ne .root.Release.Namespace (default "" .namespace) }}{{ .root.Release.Namespace }}:{{ end }}
{{- include "flashsale.component.name" . }}
{{- end }}

{{- define "flashsale.component.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name | quote }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/*
Metadata of an object: (dict "root" $ "component" "api"). An object of the whole release has "name"
instead of "component". Optional are "namespace", "labels" and "annotations", and "clusterScoped" true
for an object without a namespace.
*/}}
{{- define "flashsale.metadata" -}}
{{- if .name -}}
name: {{ .name | quote }}
{{- else -}}
name: {{ include "flashsale.component.name" . | quote }}
{{- end }}
{{- if not .clusterScoped }}
namespace: {{ default .root.Release.Namespace .namespace | quote }}
{{- end }}
labels:
  {{- include "flashsale.labels" . | nindent 2 }}
{{- with merge (dict) (default dict .annotations) .root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Labels of an object. Takes "root", "component" and "labels" like flashsale.metadata. */}}
{{- define "flashsale.labels" -}}
{{- $chart := printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 -}}
{{- $version := dict "helm.sh/chart" $chart "app.kubernetes.io/version" .root.Chart.AppVersion -}}
{{ merge $version (include "flashsale.labels.stable" . | fromYaml) | toYaml }}
{{- end }}

{{/* The labels that an upgrade of the chart leaves unchanged. Pods have no others, so that an upgrade restarts only changed pods. */}}
{{- define "flashsale.labels.stable" -}}
{{- $own := dict "app.kubernetes.io/name" .root.Chart.Name "app.kubernetes.io/instance" .root.Release.Name -}}
{{- with .component }}{{ $_ := set $own "app.kubernetes.io/component" . }}{{ end -}}
{{- $_ := set $own "app.kubernetes.io/part-of" "flashsale" -}}
{{- $_ := set $own "app.kubernetes.io/managed-by" .root.Release.Service -}}
{{ merge $own (default dict .labels) .root.Values.commonLabels | toYaml }}
{{- end }}
