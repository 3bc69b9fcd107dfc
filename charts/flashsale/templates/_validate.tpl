{{/* What no schema can say, all of it at once. */}}
{{- define "flashsale.validate" -}}
{{- $wrong := list }}
{{- range $section, $key := dict "redis" "url" "kafka" "bootstrap" "database" "url" }}
{{- $of := index $.Values $section }}
{{- $address := index $of $key }}
{{- if and $address $of.existingSecret.name }}
{{- $wrong = append $wrong (printf "%s.%s and %s.existingSecret.name: set one of them, not both" $section $key $section) }}
{{- else if not (or $address $of.existingSecret.name) }}
{{- $wrong = append $wrong (printf "%s.%s or %s.existingSecret.name must be set" $section $key $section) }}
{{- end }}
{{- if regexMatch "^[a-z]+://[^/@]*:[^/@]*@|[?&]password=" (toString $address) }}
{{- $wrong = append $wrong (printf "%s.%s holds a password: put the address into a Secret and name that in %s.existingSecret.name" $section $key $section) }}
{{- end }}
{{- end }}
{{- with .Values.consumer }}
{{- if .autoscaling.by }}
{{- if gt (int .autoscaling.maxReplicas) (int $.Values.kafka.partitions) }}
{{- $wrong = append $wrong (printf "consumer.autoscaling.maxReplicas: %d consumers of %d partitions (kafka.partitions): the others would idle" (int .autoscaling.maxReplicas) (int $.Values.kafka.partitions)) }}
{{- end }}
{{- if gt (int .autoscaling.minReplicas) (int .autoscaling.maxReplicas) }}
{{- $wrong = append $wrong "consumer.autoscaling.minReplicas is more than consumer.autoscaling.maxReplicas" }}
{{- end }}
{{- else if gt (int .replicas) (int $.Values.kafka.partitions) }}
{{- $wrong = append $wrong (printf "consumer.replicas: %d consumers of %d partitions (kafka.partitions): the others would idle" (int .replicas) (int $.Values.kafka.partitions)) }}
{{- end }}
{{- end }}
{{- with .Values.api.autoscaling }}
{{- if and .enabled (gt (int .minReplicas) (int .maxReplicas)) }}
{{- $wrong = append $wrong "api.autoscaling.minReplicas is more than api.autoscaling.maxReplicas" }}
{{- end }}
{{- end }}
{{- with .Values.kafka }}
{{- if not (has (len (without (values .users) "")) (list 0 3)) }}
{{- $wrong = append $wrong "kafka.users: set all three (api, consumer, operator) or none" }}
{{- end }}
{{- if and .tls.existingSecret.name (not .tls.enabled) }}
{{- $wrong = append $wrong "kafka.tls.existingSecret.name is set: kafka.tls.enabled must be true" }}
{{- end }}
{{- end }}
{{- with .Values.kafka.topics }}
{{- if .enabled }}
{{- if not .cluster }}
{{- $wrong = append $wrong "kafka.topics.cluster must be set: the name of the Strimzi Kafka cluster" }}
{{- end }}
{{- if gt (int .minInSyncReplicas) (int .replicas) }}
{{- $wrong = append $wrong "kafka.topics.minInSyncReplicas is more than kafka.topics.replicas: nothing could be written" }}
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.operator }}
{{- if and .allNamespaces .namespaces }}
{{- $wrong = append $wrong "operator.allNamespaces and operator.namespaces: set one of them, not both" }}
{{- end }}
{{- end }}
{{- if and .Values.api.service.nodePort (eq .Values.api.service.type "ClusterIP") }}
{{- $wrong = append $wrong "api.service.nodePort is set: api.service.type must be NodePort or LoadBalancer" }}
{{- end }}
{{- if and .Values.api.ingress.tlsSecretName (not .Values.api.ingress.host) }}
{{- $wrong = append $wrong "api.ingress.host must be set: api.ingress.tlsSecretName has a certificate for it" }}
{{- end }}
{{- if $wrong }}
{{- fail (printf "\n\nThese values will not do:\n  - %s\n" (join "\n  - " $wrong)) }}
{{- end }}
{{- end }}
