{{/* What values.schema.json cannot say, or cannot say clearly. */}}
{{- define "liveprune.validate" -}}
{{- $_ := required "model is required: a Hugging Face id or a path inside the pod, for example --set model=Qwen/Qwen3-30B-A3B" .Values.model }}
{{- if and .Values.apiKey.value .Values.apiKey.existingSecret }}
{{- fail "apiKey.value and apiKey.existingSecret are both set: expected one of them" }}
{{- end }}
{{- if and .Values.persistence.existingClaim (not .Values.persistence.enabled) }}
{{- fail (printf "persistence.existingClaim is %q but persistence.enabled is false: expected true" .Values.persistence.existingClaim) }}
{{- end }}
{{- if and .Values.strategy.rollingUpdate (ne .Values.strategy.type "RollingUpdate") }}
{{- fail (printf "strategy.rollingUpdate is set but strategy.type is %q: expected \"RollingUpdate\"" .Values.strategy.type) }}
{{- end }}
{{- $flags := dict
    "--api-key" "apiKey.existingSecret, which keeps the key out of the Deployment"
    "--port" "service.port: the server's own port is 8000"
    "--served-model-name" "servedModelName"
    "--shutdown-timeout" "shutdown.drainSeconds" }}
{{- range .Values.extraArgs }}
{{- if regexMatch "^--[^= ]+ " . }}
{{- fail (printf "extraArgs: %q holds two words: expected two items, or --flag=value" .) }}
{{- end }}
{{- $flag := . | splitList "=" | first | replace "_" "-" }}
{{- if hasKey $flags $flag }}
{{- fail (printf "extraArgs: %s is set by the chart: use %s" $flag (get $flags $flag)) }}
{{- end }}
{{- end }}
{{- $taken := dict
    "VLLM_API_KEY" "is a secret: use apiKey.existingSecret"
    "HF_TOKEN" "is a secret: use huggingFace.existingSecret" }}
{{- range include "liveprune.env" . | fromYamlArray }}
{{- $_ := set $taken .name (get $taken .name | default "is set by the chart") }}
{{- end }}
{{- range .Values.extraEnv }}
{{- if hasKey $taken .name }}
{{- fail (printf "extraEnv: %s %s" .name (get $taken .name)) }}
{{- end }}
{{- $_ := set $taken .name "is named twice" }}
{{- end }}
{{- end }}
