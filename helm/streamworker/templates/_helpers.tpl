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
{{- add .Values.config.worker.drain_timeout_s .Values.terminationMarginSeconds -}}
{{- end -}}

{{- define "streamworker.config" -}}
{{- include "streamworker.toml" (dict "table" .Values.config "path" list) | trim -}}
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
{{- if not (kindIs "map" $value) -}}
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
{{- with $settings.api_key_env -}}
{{- if not (has . $provided) -}}
{{- fail (printf "config.upstreams.%s.api_key_env is %s, but neither secretEnv nor extraEnv provides that variable" $upstream .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if $config.worker.group_instance_id -}}
{{- fail "config.worker.group_instance_id would be the same in every pod, and the pods would fence one another: set staticMembership.enabled instead" -}}
{{- end -}}
{{- if hasPrefix "SASL" (default "" $config.kafka.security_protocol) -}}
{{- if not (or (has "STREAMWORKER_KAFKA__SASL_PASSWORD" $provided) (hasKey $config.kafka "sasl_password_file") (eq "OAUTHBEARER" (default "" $config.kafka.sasl_mechanism))) -}}
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
{{- range splitList "," .Values.config.kafka.bootstrap_servers -}}
{{- $ports = append $ports (regexFind "[0-9]+$" . | int) -}}
{{- end -}}
{{- concat $ports .Values.networkPolicy.kafka.ports | uniq | toJson -}}
{{- end -}}

{{- define "streamworker.upstreamPorts" -}}
{{- $ports := list -}}
{{- range $name, $upstream := .Values.config.upstreams -}}
{{- if $upstream -}}
{{- $url := urlParse $upstream.base_url -}}
{{- $given := regexFind ":[0-9]+$" $url.host | trimPrefix ":" -}}
{{- $ports = append $ports ($given | default (eq $url.scheme "https" | ternary "443" "80") | int) -}}
{{- end -}}
{{- end -}}
{{- concat $ports .Values.networkPolicy.upstreams.ports | uniq | toJson -}}
{{- end -}}
