{{- define "streamworker.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* `helm install streamworker` gives "streamworker", not "streamworker-streamworker". */}}
{{- define "streamworker.fullname" -}}
{{- $name := include "streamworker.name" . -}}
{{- $full := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) -}}
{{- default $full .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "streamworker.serviceAccountName" -}}
{{- $unnamed := .Values.serviceAccount.create | ternary (include "streamworker.fullname" .) "default" -}}
{{- default $unnamed .Values.serviceAccount.name -}}
{{- end -}}

{{- define "streamworker.image" -}}
{{- if not .Values.image.repository -}}
{{- fail (printf "image.repository is not set, and no image of streamworker is published. Build one in the source tree and push it to a registry that the cluster reaches: docker build -t REGISTRY/streamworker:%s . && docker push REGISTRY/streamworker:%s; then set image.repository=REGISTRY/streamworker" .Chart.AppVersion .Chart.AppVersion) -}}
{{- end -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}
{{- end -}}

{{/* Selectors cannot change after the first install, so they contain only labels that never change. */}}
{{- define "streamworker.selectorLabels" -}}
app.kubernetes.io/name: {{ include "streamworker.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: worker
{{- end -}}

{{- define "streamworker.labels" -}}
{{ include "streamworker.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: streamworker
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "streamworker.terminationGracePeriodSeconds" -}}
{{- add (include "streamworker.setting" (list . "worker" "drain_timeout_s" 120)) .Values.terminationMarginSeconds -}}
{{- end -}}

{{/*
A setting from which the chart derives others, or the worker's default, which `null` stands for: list root section name default.
A test compares the defaults with the worker's.
*/}}
{{- define "streamworker.setting" -}}
{{- $section := index (index . 0).Values.config (index . 1) | default dict -}}
{{- $value := index $section (index . 2) -}}
{{- if kindIs "invalid" $value -}}{{- $value = index . 3 -}}{{- end -}}
{{- if kindIs "float64" $value -}}{{ int64 $value }}{{- else -}}{{ $value }}{{- end -}}
{{- end -}}

{{- define "streamworker.jobTopics" -}}
{{- $topics := .Values.config.topics | default dict -}}
{{- $topics.jobs | default (list "streamworker.jobs") | toJson -}}
{{- end -}}

{{/* The workers' configuration. That of the gateway is left out, so that a change of it does not replace them. */}}
{{- define "streamworker.config" -}}
{{- include "streamworker.toml" (dict "table" (omit .Values.config "gateway") "path" list) | trim -}}
{{- end -}}

{{/*
Memory in MiB, as a JSON object. The interpreter and its packages take 128 MiB, and an open stream takes 28 to 48 KiB
(benchmarks/README.md), counted as 64. The limit has room for all job records in hand and all unacknowledged events.
*/}}
{{- define "streamworker.memory" -}}
{{- $streams := include "streamworker.setting" (list . "worker" "max_in_flight" 256) | int64 -}}
{{- $held := include "streamworker.setting" (list . "worker" "max_held_bytes" 268435456) | int64 -}}
{{- $unacknowledged := include "streamworker.setting" (list . "kafka" "max_unacknowledged_bytes" 33554432) | int64 -}}
{{- $base := add 128 (div (mul $streams 64) 1024) -}}
{{- $request := add $base (div $held 4194304) -}}
{{- $limit := add $base (div (add $held $unacknowledged) 1048576) 96 -}}
{{- dict "request" (printf "%dMi" $request) "limit" (printf "%dMi" $limit) | toJson -}}
{{- end -}}

{{/* The worker's resources, with derived memory where none is set. */}}
{{- define "streamworker.resources" -}}
{{- $memory := include "streamworker.memory" . | fromJson -}}
{{- $given := .Values.resources | default dict -}}
{{- $requests := merge (dict) ($given.requests | default dict) (dict "memory" $memory.request) -}}
{{- $limits := merge (dict) ($given.limits | default dict) (dict "memory" $memory.limit) -}}
{{- merge (dict "requests" $requests "limits" $limits) $given | toYaml -}}
{{- end -}}

{{/* Fields of a container that the user gives: envFrom and lifecycle. */}}
{{- define "streamworker.containerExtras" -}}
{{- with .envFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .lifecycle }}
lifecycle:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/*
A table of the configuration as TOML. It does not use toToml: Helm reads every number of a values file as a float, and toToml
writes 120 as 120.0. A JSON string, number, boolean, or list of them is also valid TOML, and JSON writes 120.
Names need no quotes: the schema accepts only bare keys of TOML.
*/}}
{{- define "streamworker.toml" -}}
{{- $path := .path -}}
{{- $lines := list -}}
{{- range $name, $value := .table -}}
{{- if not (or (kindIs "map" $value) (kindIs "invalid" $value)) -}}
{{- $lines = append $lines (printf "%s = %s" $name (toRawJson $value)) -}}
{{- end -}}
{{- end -}}
{{- if $lines }}

{{ with $path }}[{{ join "." . }}]{{ end }}
{{ join "\n" $lines }}
{{- end -}}
{{- range $name, $value := .table -}}
{{- if kindIs "map" $value -}}
{{- include "streamworker.toml" (dict "table" $value "path" (append $path $name)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Checks that the schema cannot express, or not with a readable message. They fail the install instead of the pods. */}}
{{- define "streamworker.checks" -}}
{{- $config := .Values.config -}}
{{- $provided := list -}}
{{- range concat .Values.secretEnv .Values.extraEnv -}}
{{- $provided = append $provided .name -}}
{{- end -}}
{{- range $upstream, $settings := $config.upstreams -}}
{{- with ($settings | default dict).api_key_env -}}
{{- if not (or (has . $provided) $.Values.envFrom) -}}
{{- fail (printf "config.upstreams.%s.api_key_env is %s, but neither secretEnv nor extraEnv provides that variable" $upstream .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if ($config.worker | default dict).group_instance_id -}}
{{- fail "config.worker.group_instance_id would be the same in every pod, and the pods would fence one another: set staticMembership.enabled instead" -}}
{{- end -}}
{{- $kafka := $config.kafka | default dict -}}
{{- if hasPrefix "SASL" (default "" $kafka.security_protocol) -}}
{{- if not (or (has "STREAMWORKER_KAFKA__SASL_PASSWORD" $provided) .Values.envFrom $kafka.sasl_password_file (eq "OAUTHBEARER" (default "" $kafka.sasl_mechanism))) -}}
{{- fail "config.kafka.security_protocol asks for SASL: provide STREAMWORKER_KAFKA__SASL_PASSWORD in secretEnv, or config.kafka.sasl_password_file" -}}
{{- end -}}
{{- end -}}
{{- with .Values.autoscaling -}}
{{- if .enabled -}}
{{- if not .partitions -}}
{{- fail "autoscaling.enabled: set autoscaling.partitions to the number of partitions of the job topics; more workers would be idle" -}}
{{- end -}}
{{- if lt (int .partitions) (int .minReplicas) -}}
{{- fail (printf "autoscaling.minReplicas is %d, but the job topics have only %d partitions (autoscaling.partitions)" (int .minReplicas) (int .partitions)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "streamworker.kind" -}}
{{- .Values.staticMembership.enabled | ternary "StatefulSet" "Deployment" -}}
{{- end -}}

{{/* Labels of objects that are not the worker, with a component of their own: {root, component}. */}}
{{- define "streamworker.labelsOf" -}}
{{- $own := dict "app.kubernetes.io/component" .component -}}
{{- merge $own (include "streamworker.labels" .root | fromYaml) | toYaml -}}
{{- end -}}

{{/* The label `job` of the workers' metrics; by default that of a PodMonitor's targets, `namespace/name`. */}}
{{- define "streamworker.job" -}}
{{- default (printf "%s/%s" .Release.Namespace (include "streamworker.fullname" .)) .Values.prometheusRule.job -}}
{{- end -}}

{{/* Ports of a comma-separated list of host:port, as a JSON list. */}}
{{- define "streamworker.brokerPorts" -}}
{{- $ports := list -}}
{{- range splitList "," (include "streamworker.setting" (list . "kafka" "bootstrap_servers" "localhost:9092")) -}}
{{- $ports = append $ports (regexFind "[0-9]+$" . | int) -}}
{{- end -}}
{{- concat $ports .Values.networkPolicy.kafka.ports | uniq | toJson -}}
{{- end -}}

{{- define "streamworker.upstreamPorts" -}}
{{- $ports := list -}}
{{- range $name, $upstream := .Values.config.upstreams -}}
{{- if $upstream -}}
{{- $url := urlParse ($upstream.base_url | default "http://localhost:8000/v1") -}}
{{- $given := regexFind ":[0-9]+$" $url.host | trimPrefix ":" -}}
{{- $ports = append $ports ($given | default (eq $url.scheme "https" | ternary "443" "80") | int) -}}
{{- end -}}
{{- end -}}
{{- concat $ports .Values.networkPolicy.upstreams.ports | uniq | toJson -}}
{{- end -}}

{{- define "streamworker.gatewayName" -}}
{{ include "streamworker.fullname" . | trunc 55 | trimSuffix "-" }}-gateway
{{- end -}}

{{- define "streamworker.gatewaySelectorLabels" -}}
{{- merge (dict "app.kubernetes.io/component" "gateway") (include "streamworker.selectorLabels" . | fromYaml) | toYaml -}}
{{- end -}}

{{- define "streamworker.gatewayConfig" -}}
{{- include "streamworker.toml" (dict "table" .Values.config "path" list) | trim -}}
{{- end -}}

{{- define "streamworker.gatewayGracePeriodSeconds" -}}
{{- add (include "streamworker.setting" (list . "gateway" "drain_s" 60)) .Values.gateway.terminationMarginSeconds -}}
{{- end -}}

{{/* The gateway gets the secrets of Kafka and no key of an upstream: it calls none. */}}
{{- define "streamworker.gatewayEnv" -}}
- name: STREAMWORKER_GATEWAY__HOST
  value: "0.0.0.0"
- name: STREAMWORKER_GATEWAY__KEYS_FILE
  value: /etc/streamworker-keys/gateway-keys.toml
{{- if .Values.gateway.tokenSecret.name }}
- name: STREAMWORKER_GATEWAY__TOKEN_SECRETS_FILE
  value: /etc/streamworker-tokens/token-secrets
{{- end }}
{{- range concat .Values.secretEnv .Values.gateway.secretEnv }}
{{- if or (hasPrefix "STREAMWORKER_KAFKA__" .name) (has . $.Values.gateway.secretEnv) }}
- name: {{ .name }}
  valueFrom:
    secretKeyRef:
      name: {{ .secretName }}
      key: {{ .key }}
{{- end }}
{{- end }}
{{- with .Values.gateway.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}
