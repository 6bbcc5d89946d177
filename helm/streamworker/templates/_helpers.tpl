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

{{/* Selectors cannot change after the first install, so they hold only what never does. */}}
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
A table of the configuration as TOML. Not toToml: Helm reads every number of a values file as a float, and toToml then
writes 120 as 120.0. A JSON string, number, boolean or list of them is TOML as it stands, and JSON has no 120.0.
Names need no quotes: the schema admits only those that TOML takes bare.
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

{{/* A key that the configuration asks for and no variable brings would otherwise be found out by a crash loop. */}}
{{- define "streamworker.checkKeys" -}}
{{- $provided := list -}}
{{- range concat .Values.secretEnv .Values.extraEnv -}}
{{- $provided = append $provided .name -}}
{{- end -}}
{{- range $upstream, $settings := .Values.config.upstreams -}}
{{- with $settings.api_key_env -}}
{{- if not (has . $provided) -}}
{{- fail (printf "config.upstreams.%s.api_key_env is %s, but neither secretEnv nor extraEnv provides that variable" $upstream .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
