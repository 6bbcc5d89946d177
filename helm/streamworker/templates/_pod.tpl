{{/* The worker's pod, the same in a Deployment and in a StatefulSet. */}}
{{- define "streamworker.pod" -}}
metadata:
  # Without the chart's version: an upgrade that changes nothing in the pods must not drain them.
  labels:
    {{- merge (include "streamworker.selectorLabels" . | fromYaml) .Values.podLabels | toYaml | nindent 4 }}
  annotations:
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    # The worker reads its configuration only at its start.
    checksum/config: {{ include "streamworker.config" . | sha256sum }}
spec:
  serviceAccountName: {{ include "streamworker.serviceAccountName" . }}
  {{- include "streamworker.podBasics" . | nindent 2 }}
  terminationGracePeriodSeconds: {{ include "streamworker.terminationGracePeriodSeconds" . }}
  {{- with .Values.initContainers }}
  initContainers:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: worker
      args: [run, --config, /etc/streamworker/config.toml]
      {{- include "streamworker.containerBasics" . | nindent 6 }}
      ports:
        - name: telemetry
          containerPort: {{ include "streamworker.setting" (list . "telemetry" "http_port" 9464) }}
      startupProbe:
        httpGet: {path: /livez, port: telemetry}
        {{- toYaml .Values.probes.startup | nindent 8 }}
      livenessProbe:
        httpGet: {path: /livez, port: telemetry}
        {{- toYaml .Values.probes.liveness | nindent 8 }}
      readinessProbe:
        httpGet: {path: /readyz, port: telemetry}
        {{- toYaml .Values.probes.readiness | nindent 8 }}
      resources:
        {{- include "streamworker.resources" . | nindent 8 }}
      {{- include "streamworker.containerExtras" .Values | nindent 6 }}
    {{- with .Values.extraContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- include "streamworker.volumes" (dict "root" . "config" (include "streamworker.fullname" .)) | nindent 2 }}
  {{- with .Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.topologySpreadConstraints }}
  {{- $own := dict "matchLabels" (include "streamworker.selectorLabels" $ | fromYaml) }}
  topologySpreadConstraints:
    {{- range . }}
    - {{ hasKey . "labelSelector" | ternary . (merge (dict "labelSelector" $own) .) | toYaml | nindent 6 | trim }}
    {{- end }}
  {{- end }}
  {{- with .Values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
{{- end -}}

{{/* The part that every pod of the chart has, including those of the Job and of `helm test`. */}}
{{- define "streamworker.podBasics" -}}
automountServiceAccountToken: false
# Service links would set environment variables, and those of a Service whose name begins with streamworker look like
# settings of the worker.
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "streamworker.containerBasics" -}}
image: {{ include "streamworker.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- with include "streamworker.env" . | trim }}
env:
  {{- . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml .Values.securityContext | nindent 2 }}
volumeMounts:
  - name: config
    mountPath: /etc/streamworker
    readOnly: true
  - name: tmp
    mountPath: /tmp
  {{- with .Values.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "streamworker.env" -}}
{{- range .Values.secretEnv }}
- name: {{ .name }}
  valueFrom:
    secretKeyRef:
      name: {{ .secretName }}
      key: {{ .key }}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- if .Values.staticMembership.enabled }}
- name: STREAMWORKER_POD_NAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
# It includes the namespace, because releases of two namespaces may share a group.
- name: STREAMWORKER_WORKER__GROUP_INSTANCE_ID
  value: {{ .Release.Namespace }}.$(STREAMWORKER_POD_NAME)
{{- end }}
{{- end -}}

{{/* {root, config: the ConfigMap's name} */}}
{{- define "streamworker.volumes" -}}
volumes:
  - name: config
    configMap:
      name: {{ .config }}
  # The root file system is read-only; Python and debugging tools expect one writable directory.
  - name: tmp
    emptyDir:
      sizeLimit: 64Mi
  {{- with .root.Values.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}
