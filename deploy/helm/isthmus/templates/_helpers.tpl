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

{{/* Workers are no part of what the service, its autoscaler and its policies are about: they have a name of their own. */}}
{{- define "isthmus.workerSelector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}-worker
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "isthmus.workerLabels" -}}
{{ include "isthmus.workerSelector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* What pods of the service and workers have in common. */}}
{{- define "isthmus.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{- define "isthmus.scheduling" -}}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "isthmus.egress" -}}
- to:
    - namespaceSelector: {}
      podSelector:
        matchLabels:
          k8s-app: kube-dns
  ports:
    - port: 53
      protocol: UDP
    - port: 53
      protocol: TCP
- to:
    - podSelector: {}
{{- with .Values.networkPolicy.egress }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "isthmus.security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Of a list: the root, and cpu or gpu. */}}
{{- define "isthmus.image" -}}
{{- $root := index . 0 }}
{{- printf "%s:%s" $root.Values.image.repository ($root.Values.image.tag | default (printf "%s-%s" $root.Chart.AppVersion (index . 1))) | quote }}
{{- end }}

{{- define "isthmus.sharedEnv" -}}
{{- if .Values.bundle.existingClaim }}
- name: ISTHMUS_BUNDLE
  value: {{ printf "/bundle/%s" .Values.bundle.path | trimSuffix "/" }}
{{- end }}
{{- if or .Values.redis.url .Values.redis.existingSecret }}
- name: ISTHMUS_REDIS_URL
  valueFrom:
    secretKeyRef:
      name: {{ .Values.redis.existingSecret | default (include "isthmus.name" .) }}
      key: {{ ternary .Values.redis.secretKey "redis-url" (ne .Values.redis.existingSecret "") }}
{{- end }}
{{- range $name, $value := .Values.settings }}
- name: ISTHMUS_{{ upper $name }}
  value: {{ $value | toString | quote }}
{{- end }}
{{- end }}

{{/* What the values cannot mean together. */}}
{{- define "isthmus.check" -}}
{{- if eq .Values.store.kind "sqlite" }}
{{- if gt (int .Values.replicas) 1 }}{{ fail "store.kind sqlite is a directory of one process: replicas must be 1, or store.kind milvus" }}{{ end }}
{{- if .Values.autoscaling.enabled }}{{ fail "store.kind sqlite is a directory of one process: autoscaling needs store.kind milvus" }}{{ end }}
{{- else if not .Values.store.milvus.uri }}{{ fail "store.kind milvus needs store.milvus.uri" }}{{ end }}
{{- if and .Values.bundle.path (not .Values.bundle.existingClaim) }}{{ fail "bundle.path is in the volume of bundle.existingClaim, which is not named" }}{{ end }}
{{- if and .Values.redis.url .Values.redis.existingSecret }}{{ fail "redis.url and redis.existingSecret: name one of the two" }}{{ end }}
{{- if gt (int .Values.workers.replicas) 0 }}
{{- if not (or .Values.redis.url .Values.redis.existingSecret) }}{{ fail "workers.replicas: workers get their work from Redis: name redis.url or redis.existingSecret" }}{{ end }}
{{- if and (eq .Values.store.kind "milvus") (not .Values.settings.jobs) }}{{ fail "workers.replicas: with store.kind milvus no jobs are taken, unless settings.jobs names a folder" }}{{ end }}
{{- end }}
{{- end }}
