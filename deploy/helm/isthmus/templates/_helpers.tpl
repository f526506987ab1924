{{- define "isthmus.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "isthmus.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "isthmus.labels" -}}
{{ include "isthmus.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "isthmus.device" -}}
{{- if gt (int .Values.gpus) 0 }}gpu{{ else }}cpu{{ end }}
{{- end }}

{{/* What the values cannot mean together. */}}
{{- define "isthmus.check" -}}
{{- if eq .Values.store.kind "sqlite" }}
{{- if gt (int .Values.replicas) 1 }}{{ fail "store.kind sqlite is a directory of one process: replicas must be 1, or store.kind milvus" }}{{ end }}
{{- if .Values.autoscaling.enabled }}{{ fail "store.kind sqlite is a directory of one process: autoscaling needs store.kind milvus" }}{{ end }}
{{- else if not .Values.store.milvus.uri }}{{ fail "store.kind milvus needs store.milvus.uri" }}{{ end }}
{{- if and .Values.bundle.path (not .Values.bundle.existingClaim) }}{{ fail "bundle.path is in the volume of bundle.existingClaim, which is not named" }}{{ end }}
{{- if and .Values.redis.url .Values.redis.existingSecret }}{{ fail "redis.url and redis.existingSecret: name one of the two" }}{{ end }}
{{- end }}
