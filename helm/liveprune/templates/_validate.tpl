{{/* What values.schema.json cannot say, or cannot say clearly. */}}
{{- define "liveprune.validate" -}}
{{- $_ := required "model is required: a Hugging Face id or a path inside the pod, for example --set model=Qwen/Qwen3-30B-A3B" .Values.model }}
{{- if and .Values.apiKey.value .Values.apiKey.existingSecret }}
{{- fail "apiKey.value and apiKey.existingSecret are both set: expected one of them" }}
{{- end }}
{{- range $path, $persistence := dict "persistence" .Values.persistence "state.persistence" .Values.state.persistence }}
{{- if and $persistence.existingClaim (not $persistence.enabled) }}
{{- fail (printf "%s.existingClaim is %q but %s.enabled is false: expected true" $path $persistence.existingClaim $path) }}
{{- end }}
{{- end }}
{{- if and .Values.strategy.rollingUpdate (ne .Values.strategy.type "RollingUpdate") }}
{{- fail (printf "strategy.rollingUpdate is set but strategy.type is %q: expected \"RollingUpdate\"" .Values.strategy.type) }}
{{- end }}
{{- include "liveprune.validateLive" . }}
{{- $flags := dict
    "--admin-host" "admin.host"
    "--admin-port" "kubectl port-forward: the admin API's own port is 8001"
    "--api-key" "apiKey.existingSecret, which keeps the key out of the Deployment"
    "--live" "live.enabled"
    "--max-variants" "live.maxVariants"
    "--memory-target" "live.memoryTarget"
    "--no-live" "live.enabled"
    "--plan-root" "live.planRoots"
    "--port" "service.port: the server's own port is 8000"
    "--resident" "live.resident"
    "--served-model-name" "servedModelName"
    "--shutdown-timeout" "shutdown.drainSeconds"
    "--spare-rows" "live.spareRows"
    "--replica" "store.replica"
    "--state-dir" "state.persistence: it is /state"
    "--store" "store.existingSecret, which keeps the password out of the Deployment"
    "--store-files" "store.existingClaim: it is /store"
    "--store-quota" "store.quota"
    "--variant" "live.variants" }}
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
    "LIVEPRUNE_ADMIN_KEY" "is a secret: use admin.existingSecret"
    "VLLM_API_KEY" "is a secret: use apiKey.existingSecret"
    "LIVEPRUNE_STORE" "is a secret: use store.existingSecret"
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

{{/* The same, of live variants, their state and the admin API. */}}
{{- define "liveprune.validateLive" -}}
{{- $live := .Values.live }}
{{- if hasKey (default (dict) $live.variants) "full" }}
{{- fail "live.variants: the tag \"full\" is that of the base model, which needs no plan: choose another" }}
{{- end }}
{{- if not $live.enabled }}
{{- range $key, $value := omit $live "enabled" }}
{{- if $value }}
{{- fail (printf "live.%s is set but live.enabled is false: expected true" $key) }}
{{- end }}
{{- end }}
{{- end }}
{{- if and $live.enabled (gt (int .Values.replicas) 1) }}
{{- fail (printf "replicas is %d but live.enabled is true: each pod would have live variants of its own, and a swap would reach one of them: expected replicas 1, or live.enabled false" (int .Values.replicas)) }}
{{- end }}
{{- $store := .Values.store }}
{{- if and $store.existingSecret (not $live.enabled) }}
{{- fail "store.existingSecret is set but live.enabled is false: expected true" }}
{{- end }}
{{- if ne (empty $store.existingSecret) (empty $store.existingClaim) }}
{{- fail (printf "store.existingSecret is %q and store.existingClaim is %q: expected both or neither, as servers that share a database share its files" $store.existingSecret $store.existingClaim) }}
{{- end }}
{{- if and $store.replica (not $store.existingSecret) }}
{{- fail (printf "store.replica is %q without store.existingSecret: expected it empty" $store.replica) }}
{{- end }}
{{- $surge := dig "maxSurge" "25%" (default (dict) .Values.strategy.rollingUpdate) | toString }}
{{- if and $live.enabled .Values.state.persistence.enabled (eq .Values.strategy.type "RollingUpdate") (not (has $surge (list "0" "0%"))) }}
{{- fail (printf "strategy.rollingUpdate.maxSurge is %s: the new pod could not use the state before the old one is gone, which would wait for the new one: expected 0, or strategy.type Recreate" $surge) }}
{{- end }}
{{- /* Otherwise the kubelet makes all files of the claim writable for the group at each start of a
pod, and the server refuses a key that others can read. */}}
{{- $policy := default "Always" .Values.podSecurityContext.fsGroupChangePolicy }}
{{- if and $live.enabled .Values.state.persistence.enabled (not .Values.admin.existingSecret) (ne $policy "OnRootMismatch") }}
{{- fail (printf "podSecurityContext.fsGroupChangePolicy is %q: it would open the generated admin key to a group: expected \"OnRootMismatch\", or admin.existingSecret" $policy) }}
{{- end }}
{{- with .Values.admin.existingSecret }}
{{- if and (eq . $.Values.apiKey.existingSecret) (eq $.Values.admin.key $.Values.apiKey.key) }}
{{- fail (printf "admin.existingSecret and apiKey.existingSecret are both %q with the key %q: expected another key, as clients of /v1 must not open the admin API" . $.Values.admin.key) }}
{{- end }}
{{- end }}
{{- if and (ne .Values.admin.host "127.0.0.1") (not (and $live.enabled .Values.networkPolicy.enabled)) }}
{{- fail (printf "admin.host is %q: expected live.enabled true, and networkPolicy.enabled true so that networkPolicy.adminFrom says who reaches the admin port" .Values.admin.host) }}
{{- end }}
{{- if and .Values.networkPolicy.adminFrom (eq .Values.admin.host "127.0.0.1") }}
{{- fail "networkPolicy.adminFrom is set but admin.host is \"127.0.0.1\": expected \"0.0.0.0\"" }}
{{- end }}
{{- end }}
