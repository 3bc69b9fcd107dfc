{{/* Parts that all pods share. They take (dict "root" $ "component" "api"). */}}

{{- define "flashsale.pod.metadata" -}}
{{- $values := index .root.Values .component -}}
labels:
  {{- include "flashsale.labels.stable" (merge (dict "labels" $values.podLabels) .) | nindent 2 }}
{{- with $values.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Pod spec. "of" names the component whose values apply, if it is not the pod's own component. */}}
{{- define "flashsale.pod.spec" -}}
{{- $values := index .root.Values (default .component .of) -}}
serviceAccountName: {{ include "flashsale.component.name" . | quote }}
{{- /* The processes would read service links such as FLASHSALE_API_PORT as settings. */}}
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  seccompProfile:
    type: RuntimeDefault
{{- with include "flashsale.authorities" .root | fromYaml }}
volumes:
  {{- range $volume, $of := . }}
  - name: {{ $volume }}
    secret:
      secretName: {{ $of.name | quote }}
      items:
        - {key: {{ $of.key | quote }}, path: ca.crt}
  {{- end }}
{{- end }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "flashsale.pod.spread" -}}
topologySpreadConstraints:
  {{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
  - topologyKey: {{ . }}
    maxSkew: 1
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "flashsale.component.selector" $ | nindent 8 }}
    matchLabelKeys: [pod-template-hash]
  {{- end }}
{{- end }}

{{/* Container without its environment, ports and probes. Takes "of" like flashsale.pod.spec. */}}
{{- define "flashsale.container" -}}
{{- $values := index .root.Values (default .component .of) -}}
name: {{ .component }}
{{- with $values.image }}
{{- if .digest }}
image: {{ printf "%s@%s" .repository .digest | quote }}
{{- else }}
image: {{ printf "%s:%s" .repository (default $.root.Chart.AppVersion .tag) | quote }}
{{- end }}
imagePullPolicy: {{ .pullPolicy }}
{{- end }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
resources:
  {{- toYaml $values.resources | nindent 2 }}
{{- with include "flashsale.authorities" .root | fromYaml }}
volumeMounts:
  {{- range $volume, $of := . }}
  - {name: {{ $volume }}, mountPath: {{ $of.folder }}, readOnly: true}
  {{- end }}
{{- end }}
{{- end }}

{{/* Secrets with CA certificates, by the name of their volume. */}}
{{- define "flashsale.authorities" -}}
{{- with .Values.certificateAuthority.existingSecret }}
{{- if .name }}
certificate-authority: {name: {{ .name | quote }}, key: {{ .key | quote }}, folder: /etc/flashsale}
{{- end }}
{{- end }}
{{- with .Values.kafka.tls }}
{{- if and .enabled .existingSecret.name }}
kafka-certificate-authority: {name: {{ .existingSecret.name | quote }}, key: {{ .existingSecret.key | quote }}, folder: /etc/flashsale-kafka}
{{- end }}
{{- end }}
{{- end }}

{{/* CA certificates for Redis (Python reads SSL_CERT_FILE) and PostgreSQL (PGSSLROOTCERT). */}}
{{- define "flashsale.certificates" -}}
{{- if .Values.certificateAuthority.existingSecret.name }}
{{- range list "SSL_CERT_FILE" "PGSSLROOTCERT" }}
- name: {{ . }}
  value: /etc/flashsale/ca.crt
{{- end }}
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

{{- define "flashsale.address.redis" -}}
{{ include "flashsale.address" (dict "variable" "FLASHSALE_REDIS_URL" "of" .Values.redis "key" "url") }}
{{- end }}

{{/* Kafka's address, TLS settings and the component's user. */}}
{{- define "flashsale.address.kafka" -}}
{{- $kafka := .root.Values.kafka -}}
{{ include "flashsale.address" (dict "variable" "FLASHSALE_KAFKA_BOOTSTRAP" "of" $kafka "key" "bootstrap") }}
{{- if $kafka.tls.enabled }}
- name: FLASHSALE_KAFKA_TLS
  value: "true"
{{- if $kafka.tls.existingSecret.name }}
- name: FLASHSALE_KAFKA_CA_FILE
  value: /etc/flashsale-kafka/ca.crt
{{- end }}
{{- end }}
{{- with index $kafka.users .component }}
- name: FLASHSALE_KAFKA_USER
  value: {{ . | quote }}
- name: FLASHSALE_KAFKA_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ . | quote }}
      key: password
{{- end }}
{{- end }}

{{- define "flashsale.address.database" -}}
{{ include "flashsale.address" (dict "variable" "FLASHSALE_DATABASE_URL" "of" .Values.database "key" "url") }}
{{- end }}

{{/* Logs and traces. The operator sends no traces. */}}
{{- define "flashsale.observability" -}}
- name: FLASHSALE_LOG_LEVEL
  value: {{ .root.Values.logLevel }}
{{- if and .root.Values.tracing.endpoint (ne .component "operator") }}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ .root.Values.tracing.endpoint | quote }}
- name: OTEL_TRACES_SAMPLER_ARG
  value: {{ .root.Values.tracing.ratio | quote }}
{{- end }}
{{- end }}

{{/* The probes take (dict "port" "http"). Their timeouts are long, because a busy pod answers late. */}}
{{- define "flashsale.probes.live" -}}
startupProbe:
  httpGet: {path: /healthz, port: {{ .port }}}
  periodSeconds: 1
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /healthz, port: {{ .port }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end }}

{{- define "flashsale.probes.ready" -}}
readinessProbe:
  httpGet: {path: /readyz, port: {{ .port }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 3
{{- end }}
