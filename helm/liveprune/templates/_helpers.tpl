{{- define "liveprune.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* Room is left in 63 characters for the suffixes "-api-key", "-grafana", "-state" and "-test". */}}
{{- define "liveprune.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) }}
{{- default $full .Values.fullnameOverride | trunc 54 | trimSuffix "-" }}
{{- end }}

{{/* The selector is immutable: nothing here may depend on a version. "component" keeps other pods
of the release (the test, later a pruning worker) out of the Service. */}}
{{- define "liveprune.selectorLabels" -}}
app.kubernetes.io/name: {{ include "liveprune.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end }}

{{- define "liveprune.commonLabels" -}}
app.kubernetes.io/name: {{ include "liveprune.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: liveprune
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "liveprune.labels" -}}
{{ include "liveprune.commonLabels" . }}
app.kubernetes.io/component: server
{{- end }}

{{- define "liveprune.image" -}}
{{- with .Values.image }}
{{- if .digest }}
{{- printf "%s@%s" .repository .digest }}
{{- else }}
{{- printf "%s:%s" .repository (default $.Chart.AppVersion .tag) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "liveprune.serviceAccountName" -}}
{{- default (ternary (include "liveprune.fullname" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name }}
{{- end }}

{{- define "liveprune.claimName" -}}
{{- default (include "liveprune.fullname" .) .Values.persistence.existingClaim }}
{{- end }}

{{- define "liveprune.stateClaimName" -}}
{{- default (printf "%s-state" (include "liveprune.fullname" .)) .Values.state.persistence.existingClaim }}
{{- end }}

{{/* Name of the Secret that holds the API key; empty where the API is open. */}}
{{- define "liveprune.apiKeySecret" -}}
{{- if .Values.apiKey.value }}
{{- printf "%s-api-key" (include "liveprune.fullname" .) }}
{{- else }}
{{- .Values.apiKey.existingSecret }}
{{- end }}
{{- end }}

{{- define "liveprune.servedModelName" -}}
{{- default .Values.model .Values.servedModelName }}
{{- end }}

{{- define "liveprune.apiKeyEnv" -}}
{{- with include "liveprune.apiKeySecret" . }}
- name: VLLM_API_KEY
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.apiKey.key | quote }}
{{- end }}
{{- end }}

{{/* The environment that the chart itself sets, as a list. */}}
{{- define "liveprune.env" -}}
# Only volumes can be written.
- name: HOME
  value: /tmp
# The user id has no entry in /etc/passwd; getpass.getuser(), which torch calls, takes this name.
- name: USER
  value: liveprune
- name: HF_HOME
  value: /data/huggingface
- name: VLLM_CACHE_ROOT
  value: /data/vllm
{{- include "liveprune.apiKeyEnv" . }}
{{- if .Values.live.enabled }}
# Of the server, and of `kubectl exec ... -- liveprune variants list`.
- name: LIVEPRUNE_STATE_DIR
  value: /state
{{- with .Values.admin.existingSecret }}
- name: LIVEPRUNE_ADMIN_KEY
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.admin.key | quote }}
{{- end }}
{{- with .Values.store.existingSecret }}
- name: LIVEPRUNE_STORE
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.store.key | quote }}
{{- end }}
{{- end }}
{{- with .Values.huggingFace.existingSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.huggingFace.key | quote }}
{{- end }}
{{- with .Values.cpu.ompNumThreads }}
- name: OMP_NUM_THREADS
  value: {{ . | quote }}
# With its automatic binding vLLM replaces OMP_NUM_THREADS by the number of the node's cores.
- name: VLLM_CPU_OMP_THREADS_BIND
  value: nobind
{{- end }}
{{- with .Values.cpu.kvCacheGiB }}
- name: VLLM_CPU_KVCACHE_SPACE
  value: {{ . | quote }}
{{- end }}
{{- end }}

{{/* The flags of live variants, as a list. */}}
{{- define "liveprune.liveArgs" -}}
{{- if not .Values.live.enabled }}
- --no-live
{{- else }}
- --admin-host={{ .Values.admin.host }}
- --admin-port=8001
{{- range $tag, $plan := .Values.live.variants }}
- {{ printf "--variant=%s=%s" $tag $plan | quote }}
{{- end }}
{{- with .Values.live.resident }}
- {{ printf "--resident=%s" . | quote }}
{{- end }}
{{- with .Values.live.memoryTarget }}
- --memory-target={{ . }}
{{- end }}
{{- /* 0 is a value of its own: no merged experts. */}}
{{- if not (kindIs "string" .Values.live.spareRows) }}
- --spare-rows={{ int64 .Values.live.spareRows }}
{{- end }}
{{- with .Values.live.maxVariants }}
- --max-variants={{ int64 . }}
{{- end }}
{{- range .Values.live.planRoots }}
- {{ printf "--plan-root=%s" . | quote }}
{{- end }}
{{- if .Values.store.existingSecret }}
- --store-files=/store
- {{ printf "--replica=%s" (default .Release.Name .Values.store.replica) | quote }}
{{- end }}
{{- with .Values.store.quota }}
- --store-quota={{ . }}
{{- end }}
{{- end }}
{{- end }}

{{- define "liveprune.resources" -}}
{{- $resources := deepCopy .Values.resources }}
{{- if .Values.gpu.count }}
{{- $gpu := dict .Values.gpu.resource .Values.gpu.count }}
{{- $_ := set $resources "limits" (merge $gpu (default dict $resources.limits)) }}
{{- end }}
{{- toYaml $resources }}
{{- end }}
