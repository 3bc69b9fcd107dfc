{{- define "flashsale.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{/* Prefix of every name. 50 characters leave room for suffixes such as "-consumer". */}}
{{- define "flashsale.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains (include "flashsale.name" .) .Release.Name }}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "flashsale.name" .) | trunc 50 | trimSuffix "-" }}
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

{{- define "flashsale.component.selector" -}}
app.kubernetes.io/name: {{ include "flashsale.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "flashsale.component.labels" -}}
{{ include "flashsale.component.selector" . }}
{{ include "flashsale.labels.rest" .root }}
{{- end }}

{{/* Labels of an object that belongs to no component. */}}
{{- define "flashsale.labels" -}}
app.kubernetes.io/name: {{ include "flashsale.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{ include "flashsale.labels.rest" . }}
{{- end }}

{{- define "flashsale.labels.rest" -}}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: flashsale
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Name, namespace and labels of a component's object. */}}
{{- define "flashsale.component.metadata" -}}
name: {{ include "flashsale.component.name" . }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "flashsale.component.labels" . | nindent 2 }}
{{- end }}
