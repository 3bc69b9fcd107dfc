{{/* Environment of a component's container: the chart's variables, then extraEnv. */}}
{{- define "flashsale.environment" -}}
{{- $own := include "flashsale.environment.own" . | fromYamlArray -}}
{{ concat $own (index .root.Values .component).extraEnv | toYaml }}
{{- end }}

{{- define "flashsale.environment.own" -}}
{{- $values := .root.Values -}}
- name: FLASHSALE_ENGINE
  value: {{ include "flashsale.engine" .root | quote }}
{{- include "flashsale.environment.authority" .root }}
{{- if ne .component "consumer" }}
{{- $redis := deepCopy $values.redis }}
{{- if and (eq .component "api") $redis.existingSecret.apiKey }}
{{- $_ := set $redis.existingSecret "key" $redis.existingSecret.apiKey }}
{{- end }}
{{ include "flashsale.address" (dict "variable" "FLASHSALE_REDIS_URL" "of" $redis "key" "url") }}
{{- end }}
{{ include "flashsale.environment.kafka" . }}
{{- if eq .component "consumer" }}
- name: FLASHSALE_KAFKA_PARTITIONS
  value: {{ $values.kafka.partitions | int | quote }}
{{- end }}
{{- if ne .component "api" }}
{{ include "flashsale.address" (dict "variable" "FLASHSALE_DATABASE_URL" "of" $values.database "key" "url") }}
{{- end }}
{{- if and (eq .component "api") $values.orders.existingSecret.name }}
- name: FLASHSALE_ORDER_TOKENS
  valueFrom:
    secretKeyRef:
      name: {{ $values.orders.existingSecret.name | quote }}
      key: {{ $values.orders.existingSecret.key | quote }}
{{- end }}
{{- if eq .component "operator" }}
- name: FLASHSALE_NAMESPACES
  value: {{ include "flashsale.operator.namespaces" .root | fromJsonArray | join "," | quote }}
{{- with $values.operator.items }}
{{- $items := list }}
{{- range $namespace, $prefix := . }}
{{- $items = append $items (printf "%s=%s" $namespace $prefix) }}
{{- end }}
- name: FLASHSALE_ITEMS
  value: {{ join "," $items | quote }}
{{- end }}
- name: FLASHSALE_KEEP_CLOSED_SECONDS
  value: {{ $values.operator.keepClosedSeconds | int | quote }}
{{- end }}
{{- if eq .component "api" }}
{{- range $name, $value := dict "USER_HEADER" $values.identity.userHeader "JWKS_URL" $values.identity.jwksUrl "JWT_ISSUER" $values.identity.issuer "JWT_AUDIENCE" $values.identity.audience }}
{{- if $value }}
- name: FLASHSALE_{{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}
{{- end }}
- name: FLASHSALE_LOG_LEVEL
  value: {{ $values.logLevel | quote }}
{{- /* The operator sends no traces. */}}
{{- if and $values.tracing.endpoint (ne .component "operator") }}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ $values.tracing.endpoint | quote }}
- name: OTEL_TRACES_SAMPLER_ARG
  value: {{ $values.tracing.ratio | quote }}
{{- if eq .component "api" }}
- name: FLASHSALE_TRUST_TRACEPARENT
  value: {{ $values.tracing.trustTraceparent | quote }}
{{- end }}
{{- end }}
{{- end }}

{{/* CA certificates for Redis (Python reads SSL_CERT_FILE) and PostgreSQL (PGSSLROOTCERT). */}}
{{- define "flashsale.environment.authority" -}}
{{- if .Values.certificateAuthority.existingSecret.name }}
{{- range list "SSL_CERT_FILE" "PGSSLROOTCERT" }}
- name: {{ . }}
  value: /etc/flashsale/ca.crt
{{- end }}
{{- end }}
{{- end }}

{{/* Kafka's address, TLS settings and the component's user. */}}
{{- define "flashsale.environment.kafka" -}}
{{- $kafka := .root.Values.kafka -}}
{{ include "flashsale.address" (dict "variable" "FLASHSALE_KAFKA_BOOTSTRAP" "of" $kafka "key" "bootstrap") }}
{{- with $kafka.tls }}
{{- if .enabled }}
- name: FLASHSALE_KAFKA_TLS
  value: "true"
{{- if .existingSecret.name }}
- name: FLASHSALE_KAFKA_CA_FILE
  value: /etc/flashsale-kafka/ca.crt
{{- end }}
{{- if .clientCertificate.existingSecret.name }}
- name: FLASHSALE_KAFKA_CERT_FILE
  value: /etc/flashsale-kafka-client/tls.crt
- name: FLASHSALE_KAFKA_KEY_FILE
  value: /etc/flashsale-kafka-client/tls.key
{{- end }}
{{- end }}
{{- end }}
{{- $user := index $kafka.users .component }}
{{- with default $user $kafka.sasl.existingSecret.name }}
- name: FLASHSALE_KAFKA_SASL_MECHANISM
  value: {{ $kafka.sasl.mechanism | quote }}
- name: FLASHSALE_KAFKA_USER
  {{- if $user }}
  value: {{ $user | quote }}
  {{- else }}
  valueFrom:
    secretKeyRef:
      name: {{ . | quote }}
      key: username
  {{- end }}
- name: FLASHSALE_KAFKA_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ . | quote }}
      key: password
{{- end }}
{{- end }}

{{/* An address, from a value or a Secret: (dict "variable" "FLASHSALE_REDIS_URL" "of" .Values.redis "key" "url"). */}}
{{- define "flashsale.address" -}}
- name: {{ .variable }}
  {{- with .of.existingSecret }}
  {{- if .name }}
  valueFrom:
    secretKeyRef:
      name: {{ .name | quote }}
      key: {{ .key | quote }}
  {{- else }}
  value: {{ index $.of $.key | quote }}
  {{- end }}
  {{- end }}
{{- end }}
