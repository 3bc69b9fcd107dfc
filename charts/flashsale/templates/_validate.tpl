{{/* Checks that a JSON schema cannot express. They report all mistakes together. */}}
{{- define "flashsale.validate" -}}
{{- $wrong := list }}
{{- $secret := "^[a-z]+://[^/@]*:[^/@]*@|[?&](ssl)?password=" }}
{{- range $section, $key := dict "redis" "url" "kafka" "bootstrap" "database" "url" }}
{{- $of := index $.Values $section }}
{{- $address := index $of $key }}
{{- if and $address $of.existingSecret.name }}
{{- $wrong = append $wrong (printf "%s.%s and %s.existingSecret.name are both set: set only one of them" $section $key $section) }}
{{- else if not (or $address $of.existingSecret.name) }}
{{- $wrong = append $wrong (printf "%s.%s or %s.existingSecret.name is required" $section $key $section) }}
{{- end }}
{{- if regexMatch $secret (toString $address) }}
{{- $wrong = append $wrong (printf "%s.%s contains a password: put the address into a Secret and set %s.existingSecret.name" $section $key $section) }}
{{- end }}
{{- end }}
{{- $malformed := dict }}
{{- range $path, $address := .Files.Get "files/addresses.yaml" | fromYaml }}
{{- $keys := splitList "." $path }}
{{- if not (regexMatch $address.pattern (index $.Values (first $keys) (last $keys))) }}
{{- $_ := set $malformed (first $keys) true }}
{{- $wrong = append $wrong (printf "%s must have the form %s (it is not shown, because it may contain a password)" $path $address.form) }}
{{- end }}
{{- end }}
{{- range $option, $front := dict "host" "//" "port" "//" "user" "//[^/?@]+@" "dbname" "//[^/?]*/" "database" "//[^/?]*/" }}
{{- if regexMatch (printf "%s[^?]*[?](.*&)?%s=" $front $option) (toString $.Values.database.url) }}
{{- $wrong = append $wrong (printf "database.url: asyncpg ignores the option %s here: write it in front of the question mark" $option) }}
{{- end }}
{{- end }}
{{- $labels := dict "commonLabels" .Values.commonLabels "podMonitors.labels" .Values.podMonitors.labels "prometheusRules.labels" .Values.prometheusRules.labels "dashboard.labels" .Values.dashboard.labels }}
{{- range list "api" "consumer" "operator" }}
{{- $_ := set $labels (printf "%s.podLabels" .) (index $.Values .).podLabels }}
{{- end }}
{{- range $path, $given := $labels }}
{{- range $key, $_ := $given }}
{{- if regexMatch "^(app[.]kubernetes[.]io/(name|instance|component|version|part-of|managed-by)|helm[.]sh/chart)$" $key }}
{{- $wrong = append $wrong (printf "%s: the chart sets the label %s" $path $key) }}
{{- end }}
{{- end }}
{{- end }}
{{- range $key, $_ := .Values.commonAnnotations }}
{{- if hasPrefix "helm.sh/" $key }}
{{- $wrong = append $wrong (printf "commonAnnotations: the chart sets the annotation %s" $key) }}
{{- end }}
{{- end }}
{{- if .Chart.IsRoot }}
{{- range $key, $_ := .Values.global }}
{{- $wrong = append $wrong (printf "'/global': additional properties '%s' not allowed, except of a parent chart" $key) }}
{{- end }}
{{- end }}
{{- if not (regexMatch "^[a-z][a-z0-9-]*$" (include "flashsale.fullname" .)) }}
{{- $wrong = append $wrong (printf "fullnameOverride is required: the release's full name %s cannot name a Service, which takes a-z, 0-9 and -, with a letter first" (include "flashsale.fullname" .)) }}
{{- end }}
{{- with .Values.consumer }}
{{- if .autoscaling.by }}
{{- if gt (int .autoscaling.maxReplicas) (int $.Values.kafka.partitions) }}
{{- $wrong = append $wrong (printf "consumer.autoscaling.maxReplicas is %d, but kafka.partitions is %d: the remaining consumers would be idle" (int .autoscaling.maxReplicas) (int $.Values.kafka.partitions)) }}
{{- end }}
{{- if gt (int .autoscaling.minReplicas) (int .autoscaling.maxReplicas) }}
{{- $wrong = append $wrong "consumer.autoscaling.minReplicas is greater than consumer.autoscaling.maxReplicas" }}
{{- end }}
{{- else if gt (int .replicas) (int $.Values.kafka.partitions) }}
{{- $wrong = append $wrong (printf "consumer.replicas is %d, but kafka.partitions is %d: the remaining consumers would be idle" (int .replicas) (int $.Values.kafka.partitions)) }}
{{- end }}
{{- end }}
{{- with .Values.identity }}
{{- if not (has (len (without (list .jwksUrl .issuer .audience) "")) (list 0 3)) }}
{{- $wrong = append $wrong "identity: set all of jwksUrl, issuer and audience, or none" }}
{{- end }}
{{- $others := splitList " " "accept accept-encoding accept-language authorization cache-control connection content-encoding content-length content-type cookie date expect forwarded host http2-settings idempotency-key if-modified-since if-none-match keep-alive origin proxy-authorization range referer te traceparent tracestate trailer transfer-encoding upgrade user-agent via x-forwarded-for x-forwarded-host x-forwarded-port x-forwarded-proto x-real-ip x-request-id" }}
{{- if has (lower .userHeader) $others }}
{{- $wrong = append $wrong (printf "identity.userHeader is %s, which clients or proxies send for another purpose: name a header that only the gateway sets, such as x-user-id" .userHeader) }}
{{- end }}
{{- if and .userHeader .jwksUrl }}
{{- $wrong = append $wrong "identity.userHeader and identity.jwksUrl are both set: only one can name the user" }}
{{- end }}
{{- end }}
{{- with .Values.api.autoscaling }}
{{- if and .enabled (gt (int .minReplicas) (int .maxReplicas)) }}
{{- $wrong = append $wrong "api.autoscaling.minReplicas is greater than api.autoscaling.maxReplicas" }}
{{- end }}
{{- end }}
{{- with .Values.kafka }}
{{- if not (has (len (without (values .users) "")) (list 0 3)) }}
{{- $wrong = append $wrong "kafka.users: set all of api, consumer and operator, or none" }}
{{- end }}
{{- if and .tls.existingSecret.name (not .tls.enabled) }}
{{- $wrong = append $wrong "kafka.tls.existingSecret.name requires kafka.tls.enabled" }}
{{- end }}
{{- end }}
{{- with .Values.kafka }}
{{- if and .tls.clientCertificate.existingSecret.name (not .tls.enabled) }}
{{- $wrong = append $wrong "kafka.tls.clientCertificate.existingSecret.name requires kafka.tls.enabled" }}
{{- end }}
{{- if and .sasl.existingSecret.name (without (values .users) "") }}
{{- $wrong = append $wrong "kafka.users and kafka.sasl.existingSecret.name are both set: set only one of them" }}
{{- end }}
{{- if and (ne .sasl.mechanism "SCRAM-SHA-512") (not .sasl.existingSecret.name) (not (without (values .users) "")) }}
{{- $wrong = append $wrong "kafka.sasl.mechanism requires kafka.users or kafka.sasl.existingSecret.name" }}
{{- end }}
{{- end }}
{{- range $component := list "api" "consumer" "operator" }}
{{- $names := list }}
{{- range include "flashsale.environment" (dict "root" $ "component" $component) | fromYamlArray }}
{{- if has .name $names }}
{{- $wrong = append $wrong (printf "%s.extraEnv: the variable %s is set already" $component .name) }}
{{- end }}
{{- $names = append $names .name }}
{{- end }}
{{- range (index $.Values $component).extraEnv }}
{{- if and .value (not (contains "$(" .value)) (or (regexMatch "(PASSWORD|HEADERS|TOKENS?|SECRET)$" .name) (regexMatch $secret .value)) }}
{{- $wrong = append $wrong (printf "%s.extraEnv: the value of %s is a secret: put it into a Secret and set valueFrom" $component .name) }}
{{- end }}
{{- end }}
{{- end }}
{{- range $component := list "api" "consumer" "operator" }}
{{- $repository := (index $.Values $component).image.repository }}
{{- if and $.Values.image.registry (contains ":" $repository) }}
{{- $wrong = append $wrong (printf "%s.image.repository names the registry %s, and image.registry is set too: set only one of them" $component (splitList "/" $repository | first)) }}
{{- end }}
{{- with (index $.Values $component).strategy.rollingUpdate }}
{{- if and (has (toString .maxSurge) (list "0" "0%")) (has (toString .maxUnavailable) (list "0" "0%")) }}
{{- $wrong = append $wrong (printf "%s.strategy.rollingUpdate: maxSurge and maxUnavailable are both 0, so no pod could be replaced" $component) }}
{{- end }}
{{- end }}
{{- end }}
{{- range $component := list "api" "consumer" }}
{{- $keys := list }}
{{- range (index $.Values $component).topologySpreadConstraints }}
{{- if has .topologyKey $keys }}
{{- $wrong = append $wrong (printf "%s.topologySpreadConstraints: the topologyKey %s is repeated, and an upgrade would lose one of the two" $component .topologyKey) }}
{{- end }}
{{- $keys = append $keys .topologyKey }}
{{- end }}
{{- end }}
{{- range $server := list "redis" "kafka" "database" }}
{{- $port := int (index $.Values.networkPolicies $server).port }}
{{- $ports := include "flashsale.network.ports" (dict "root" $ "server" $server) | fromJsonArray }}
{{- if and $port $ports (not (hasKey $malformed $server)) (ne (join "," $ports) (toString $port)) }}
{{- $wrong = append $wrong (printf "networkPolicies.%s.port is %d, but the address has port %s: remove the value" $server $port (join "," $ports)) }}
{{- end }}
{{- end }}
{{- with .Values.kafka.topics }}
{{- if .enabled }}
{{- if not .cluster }}
{{- $wrong = append $wrong "kafka.topics.enabled requires kafka.topics.cluster, the name of the Strimzi Kafka cluster" }}
{{- end }}
{{- if gt (int .minInSyncReplicas) (int .replicas) }}
{{- $wrong = append $wrong "kafka.topics.minInSyncReplicas is greater than kafka.topics.replicas: Kafka would refuse every record" }}
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.operator }}
{{- if and .allNamespaces .namespaces }}
{{- $wrong = append $wrong "operator.allNamespaces and operator.namespaces are both set: set only one of them" }}
{{- end }}
{{- end }}
{{- range $switch, $scales := dict "api.autoscaling.enabled" .Values.api.autoscaling.enabled "consumer.autoscaling.by=cpu" (eq .Values.consumer.autoscaling.by "cpu") }}
{{- $component := splitList "." $switch | first }}
{{- $resources := (index $.Values $component).resources }}
{{- if and $scales (not (or (dig "requests" "cpu" "" $resources) (dig "limits" "cpu" "" $resources))) }}
{{- $wrong = append $wrong (printf "%s requires %s.resources.requests.cpu, because the target is a percentage of it" $switch $component) }}
{{- end }}
{{- end }}
{{- if and .Values.redis.existingSecret.apiKey (not .Values.redis.existingSecret.name) }}
{{- $wrong = append $wrong "redis.existingSecret.apiKey requires redis.existingSecret.name" }}
{{- end }}
{{- if and .Values.api.service.nodePort (eq .Values.api.service.type "ClusterIP") }}
{{- $wrong = append $wrong "api.service.nodePort requires api.service.type NodePort or LoadBalancer" }}
{{- end }}
{{- with .Values.api.service }}
{{- if ne .type "LoadBalancer" }}
{{- range $key := list "loadBalancerClass" "loadBalancerSourceRanges" }}
{{- if index $.Values.api.service $key }}
{{- $wrong = append $wrong (printf "api.service.%s requires api.service.type LoadBalancer" $key) }}
{{- end }}
{{- end }}
{{- end }}
{{- if and .externalTrafficPolicy (eq .type "ClusterIP") }}
{{- $wrong = append $wrong "api.service.externalTrafficPolicy requires api.service.type NodePort or LoadBalancer" }}
{{- end }}
{{- end }}
{{- if and .Values.api.httpRoute.enabled (not .Values.api.httpRoute.parentRefs) }}
{{- $wrong = append $wrong "api.httpRoute.enabled requires api.httpRoute.parentRefs, the Gateways that the route joins" }}
{{- end }}
{{- if and .Values.api.ingress.tlsSecretName (not .Values.api.ingress.host) }}
{{- $wrong = append $wrong "api.ingress.tlsSecretName requires api.ingress.host, the name in its certificate" }}
{{- end }}
{{- if $wrong }}
{{- fail (printf "\n\nInvalid values:\n  - %s\n" (join "\n  - " $wrong)) }}
{{- end }}
{{- end }}
