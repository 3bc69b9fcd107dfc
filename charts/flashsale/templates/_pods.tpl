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
{{- with include "flashsale.certificates" .root | fromYaml }}
volumes:
  {{- range $volume, $of := . }}
  - name: {{ $volume }}
    secret:
      secretName: {{ $of.name | quote }}
      items:
        {{- range $key, $file := $of.items }}
        - {key: {{ $key | quote }}, path: {{ $file }}}
        {{- end }}
  {{- end }}
{{- end }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ kindIs "map" . | ternary . (dict "name" .) | dig "name" "" | quote }}
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
{{- with $values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Spreads the pods of one revision, so that a rollout does not count the former pods. */}}
{{- define "flashsale.pod.spread" -}}
{{- with (index .root.Values .component).topologySpreadConstraints -}}
topologySpreadConstraints:
  {{- range . }}
  - {{ toYaml . | nindent 4 | trim }}
    labelSelector:
      matchLabels:
        {{- include "flashsale.component.selector" $ | nindent 8 }}
    matchLabelKeys: [pod-template-hash]
  {{- end }}
{{- end }}
{{- end }}

{{/* Container without its environment, ports and probes. Takes "of" like flashsale.pod.spec. */}}
{{- define "flashsale.container" -}}
{{- $values := index .root.Values (default .component .of) -}}
name: {{ .component }}
{{- with $values.image }}
{{- $repository := list $.root.Values.image.registry .repository | compact | join "/" }}
{{- if .digest }}
image: {{ printf "%s@%s" $repository .digest | quote }}
{{- else }}
image: {{ printf "%s:%s" $repository (default $.root.Chart.AppVersion .tag) | quote }}
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
{{- with include "flashsale.certificates" .root | fromYaml }}
volumeMounts:
  {{- range $volume, $of := . }}
  - {name: {{ $volume }}, mountPath: {{ $of.folder }}, readOnly: true}
  {{- end }}
{{- end }}
{{- end }}

{{/* Secrets with certificates, by the name of their volume. "items" are the file names by key. */}}
{{- define "flashsale.certificates" -}}
{{- with .Values.certificateAuthority.existingSecret }}
{{- if .name }}
certificate-authority: {name: {{ .name | quote }}, folder: /etc/flashsale, items: { {{ .key | quote }}: ca.crt } }
{{- end }}
{{- end }}
{{- with .Values.kafka.tls }}
{{- if and .enabled .existingSecret.name }}
kafka-certificate-authority: {name: {{ .existingSecret.name | quote }}, folder: /etc/flashsale-kafka, items: { {{ .existingSecret.key | quote }}: ca.crt } }
{{- end }}
{{- if and .enabled .clientCertificate.existingSecret.name }}
kafka-client-certificate: {name: {{ .clientCertificate.existingSecret.name | quote }}, folder: /etc/flashsale-kafka-client, items: {tls.crt: tls.crt, tls.key: tls.key}}
{{- end }}
{{- end }}
{{- end }}

{{/* The probes take (dict "port" "http" "path" "/healthz"), or only the port. Their timeouts are long, because a busy pod answers late. */}}
{{- define "flashsale.probes.live" -}}
startupProbe:
  httpGet: {path: {{ .path }}, port: {{ .port }}}
  periodSeconds: 1
  failureThreshold: 60
livenessProbe:
  httpGet: {path: {{ .path }}, port: {{ .port }}}
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
