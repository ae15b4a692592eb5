"""The manifests that the chart renders."""
# ruff: noqa: S108 (the paths are those of a container)

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import yaml
from kubernetes_validate import validate
from kubernetes_validate.utils import all_versions

from tests.helm.manifests import (
    API_KEY,
    CHART,
    VALUES,
    Helm,
    Render,
    claims,
    env,
    one,
    pod,
    server,
    volumes,
)

OLDEST, NEWEST = (all_versions()[i] for i in (0, -1))
SELECTOR = {
    "app.kubernetes.io/name": "liveprune",
    "app.kubernetes.io/instance": "trial",
    "app.kubernetes.io/component": "server",
}


@pytest.mark.parametrize("values", VALUES)
def test_lint(helm: Helm, values_files: dict[str, Path], values: str) -> None:
    result = helm("lint", "--strict", str(CHART), "--values", str(values_files[values]))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("kubernetes", [OLDEST, NEWEST])
@pytest.mark.parametrize("values", VALUES)
def test_manifests_are_valid_kubernetes(render: Render, values: str, kubernetes: str) -> None:
    for manifest in render(values):
        # Custom resources: tested by hand.
        if manifest["kind"] not in ("ServiceMonitor", "PrometheusRule"):
            validate(manifest, kubernetes, strict=True)


def test_oldest_kubernetes_of_the_chart_is_validated() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["kubeVersion"] == f">={OLDEST}-0"


def test_kinds(render: Render) -> None:
    usual = ["Deployment", "PersistentVolumeClaim", "Pod", "Service", "ServiceAccount"]
    usual.insert(1, "PersistentVolumeClaim")
    optional = ["ConfigMap", "NetworkPolicy", "PodDisruptionBudget", "PrometheusRule", "Secret"]
    optional.append("ServiceMonitor")
    assert sorted(manifest["kind"] for manifest in render("cpu")) == usual
    assert sorted(m["kind"] for m in render("everything")) == sorted(usual + optional)


def test_common_metadata(render: Render) -> None:
    for manifest in render("everything"):
        labels = manifest["metadata"]["labels"]
        component = "test" if manifest["kind"] == "Pod" else "server"
        assert manifest["metadata"]["namespace"] == "llm"
        assert (
            labels.items()
            >= {
                "app.kubernetes.io/name": "liveprune",
                "app.kubernetes.io/instance": "trial",
                "app.kubernetes.io/version": "0.1.0",
                "app.kubernetes.io/component": component,
                "app.kubernetes.io/part-of": "liveprune",
                "app.kubernetes.io/managed-by": "Helm",
                "helm.sh/chart": "liveprune-0.1.0",
            }.items()
        )


def test_all_selectors_are_the_minimal_one(render: Render) -> None:
    manifests = render("everything")
    assert one(manifests, "Deployment")["spec"]["selector"] == {"matchLabels": SELECTOR}
    assert one(manifests, "Service")["spec"]["selector"] == SELECTOR
    assert one(manifests, "PodDisruptionBudget")["spec"]["selector"] == {"matchLabels": SELECTOR}
    assert one(manifests, "NetworkPolicy")["spec"]["podSelector"] == {"matchLabels": SELECTOR}
    (spread,) = pod(manifests)["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"] == {"matchLabels": SELECTOR}


def test_selector_meets_the_server_only(render: Render) -> None:
    manifests = render("everything")  # Its podLabels try to replace a label of the selector.
    assert pod(manifests)["metadata"]["labels"] == SELECTOR | {"team": "serving"}
    assert not SELECTOR.items() <= one(manifests, "Pod")["metadata"]["labels"].items()


def test_service_monitor_scrapes_the_service(render: Render) -> None:
    manifests = render("everything")
    monitor, service = one(manifests, "ServiceMonitor"), one(manifests, "Service")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert monitor["metadata"]["labels"]["prometheus"] == "main"
    assert (
        monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    )
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint == {
        "port": service["spec"]["ports"][0]["name"],
        "path": "/metrics",
        "interval": "30s",
        "scrapeTimeout": "10s",
    }


@pytest.mark.parametrize("values", VALUES)
def test_pods_are_confined(render: Render, values: str) -> None:
    manifests = render(values)
    for spec in (pod(manifests)["spec"], one(manifests, "Pod")["spec"]):
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = spec["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    assert one(manifests, "ServiceAccount")["automountServiceAccountToken"] is False


def test_user_ids_can_be_left_to_the_cluster(render: Render) -> None:
    names = ("runAsUser", "runAsGroup", "fsGroup")
    manifests = render("cpu", *(f"podSecurityContext.{name}=null" for name in names))
    context = pod(manifests)["spec"]["securityContext"]
    assert context["runAsNonRoot"] is True
    assert not context.keys() & set(names)


def test_command(render: Render) -> None:
    container = server(render("everything"))
    assert container["command"] + container["args"] == [
        "liveprune",
        "serve",
        "/data/models/mixtral",
        "--host=0.0.0.0",
        "--port=8000",
        "--shutdown-timeout=600",
        "--served-model-name=mixtral",
        "--admin-host=0.0.0.0",
        "--admin-port=8001",
        "--variant=4.x=/data/plans/4 x",
        "--variant=e4k1=/plans/e4k1.json",
        "--resident=e4k1",
        "--memory-target=40.5GiB",
        "--spare-rows=0",
        "--max-variants=4",
        "--plan-root=/plans",
        "--plan-root=/data/plans",
        "--store-files=/store",
        "--replica=first",
        "--store-quota=5GiB",
        "--max-model-len=4096",
        "--enforce-eager",
    ]


def test_probes(render: Render) -> None:
    container = server(render("cpu"))
    health = {"httpGet": {"path": "/health", "port": "http"}}
    assert container["startupProbe"] == health | {
        "periodSeconds": 10,
        "failureThreshold": 60,
        "timeoutSeconds": 5,
    }
    assert container["readinessProbe"].items() >= health.items()
    assert container["livenessProbe"].items() >= health.items()
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert "initialDelaySeconds" not in container[name]


@pytest.mark.parametrize("values", VALUES)
def test_a_loading_model_is_no_failed_rollout(render: Render, values: str) -> None:
    probe = server(render(values))["startupProbe"]
    loading = probe["periodSeconds"] * probe["failureThreshold"]
    assert one(render(values), "Deployment")["spec"]["progressDeadlineSeconds"] > loading


@pytest.mark.parametrize(("values", "waits", "drains"), [("cpu", 5, 60), ("everything", 15, 600)])
def test_grace_period_outlasts_the_shutdown(
    render: Render, values: str, waits: int, drains: int
) -> None:
    container = server(render(values))
    assert container["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", str(waits)]
    assert f"--shutdown-timeout={drains}" in container["args"]
    assert pod(render(values))["spec"]["terminationGracePeriodSeconds"] == waits + drains + 30


def test_strategy(render: Render) -> None:
    assert one(render("gpu"), "Deployment")["spec"]["strategy"] == {"type": "Recreate"}
    assert one(render("everything"), "Deployment")["spec"]["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1},
    }


def test_writable_volumes(render: Render) -> None:
    assert volumes(render("cpu")) == {
        "/data": {"persistentVolumeClaim": {"claimName": "trial-liveprune"}},
        "/state": {"persistentVolumeClaim": {"claimName": "trial-liveprune-state"}},
        "/dev/shm": {"emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
        "/tmp": {"emptyDir": {}},
    }
    every = volumes(render("everything"))
    assert every["/tmp"] == {"emptyDir": {"sizeLimit": "20Gi"}}
    assert every["/plans"] == {"configMap": {"name": "plans"}}
    assert every["/models"] == {"hostPath": {"path": "/srv/models", "type": "Directory"}}


@pytest.mark.parametrize("values", VALUES)
def test_caches_are_on_the_claim(render: Render, values: str) -> None:
    variables = env(render(values))
    assert variables["HF_HOME"].startswith("/data/")
    assert variables["VLLM_CACHE_ROOT"].startswith("/data/")
    assert variables["HOME"] == "/tmp"


def test_claim(render: Render) -> None:
    claim = claims(render("everything"))["trial-liveprune"]
    assert claim["spec"] == {
        "accessModes": ["ReadWriteMany"],
        "storageClassName": "fast",
        "resources": {"requests": {"storage": "1Ti"}},
    }
    assert claim["metadata"]["annotations"] == {
        "team": "serving",
        "helm.sh/resource-policy": "keep",
    }
    deleted = claims(render("cpu", "persistence.retain=false"))["trial-liveprune"]
    assert "annotations" not in deleted["metadata"]


def test_existing_claim(render: Render) -> None:
    manifests = render("cpu", "persistence.existingClaim=models")
    assert volumes(manifests)["/data"] == {"persistentVolumeClaim": {"claimName": "models"}}
    assert claims(manifests).keys() == {"trial-liveprune-state"}


def test_no_persistence(render: Render) -> None:
    manifests = render("cpu", "persistence.enabled=false")
    assert volumes(manifests)["/data"] == {"emptyDir": {}}
    assert claims(manifests).keys() == {"trial-liveprune-state"}


def test_service_account_of_the_cluster(render: Render) -> None:
    manifests = render("cpu", "serviceAccount.create=false")
    assert pod(manifests)["spec"]["serviceAccountName"] == "default"
    assert "ServiceAccount" not in {manifest["kind"] for manifest in manifests}


def test_api_key_is_in_the_secret_only(render: Render) -> None:
    manifests = render("everything")
    secret = one(manifests, "Secret")
    assert base64.b64decode(secret["data"]["the.key"]).decode() == API_KEY
    others = json.dumps([manifest for manifest in manifests if manifest is not secret])
    assert API_KEY not in others
    assert base64.b64encode(API_KEY.encode()).decode() not in others


def test_api_key_of_an_existing_secret(render: Render) -> None:
    manifests = render("cpu", "apiKey.existingSecret=mine", "huggingFace.existingSecret=hub")
    sources = {item["name"]: item.get("valueFrom") for item in server(manifests)["env"]}
    api_key = {"secretKeyRef": {"name": "mine", "key": "api-key"}}
    assert sources["VLLM_API_KEY"] == api_key
    assert sources["HF_TOKEN"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
    # The test pod gets the API key and nothing else.
    (test,) = one(manifests, "Pod")["spec"]["containers"]
    assert test["env"] == [{"name": "VLLM_API_KEY", "valueFrom": api_key}]
    assert "Secret" not in {manifest["kind"] for manifest in manifests}
    assert "VLLM_API_KEY" not in env(render("cpu"))


def test_a_new_api_key_restarts_the_pods(render: Render) -> None:
    first = pod(render("everything"))
    second = pod(render("everything", "apiKey.value=wrong-horse-battery"))
    assert first["spec"] == second["spec"]
    assert first["metadata"]["annotations"] != second["metadata"]["annotations"]


def test_accelerators(render: Render) -> None:
    assert server(render("everything"))["resources"] == {
        "requests": {"cpu": 4, "memory": "64Gi"},
        "limits": {"memory": "64Gi", "nvidia.com/gpu": 2},
    }
    amd = server(render("gpu", r"gpu.resource=amd\.com/gpu"))["resources"]["limits"]
    assert amd == {"memory": "96Gi", "amd.com/gpu": 1}
    assert "nvidia.com/gpu" not in json.dumps(server(render("cpu"))["resources"])


def test_cpu_environment(render: Render) -> None:
    variables = env(render("cpu"))
    assert variables["OMP_NUM_THREADS"] == "7"
    assert variables["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert variables["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert not {"OMP_NUM_THREADS", "VLLM_CPU_KVCACHE_SPACE"} & env(render("gpu")).keys()


def test_image(render: Render) -> None:
    assert server(render("cpu"))["image"] == "liveprune:0.1.0"
    assert server(render("cpu", "image.tag=main"))["image"] == "liveprune:main"
    digest = "sha256:" + "0123456789abcdef" * 4
    for image in (
        server(render("everything")),
        one(render("everything"), "Pod")["spec"]["containers"][0],
    ):
        assert image["image"] == f"registry.example/liveprune@{digest}"


def test_network_policy(render: Render) -> None:
    policy = one(render("everything"), "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    rule, _ = policy["ingress"]
    assert rule["ports"] == [{"port": "http", "protocol": "TCP"}]
    named, test = rule["from"]
    assert named == {"namespaceSelector": {"matchLabels": {"team": "serving"}}}
    labels = one(render("everything"), "Pod")["metadata"]["labels"]
    assert test["podSelector"]["matchLabels"].items() <= labels.items()


def test_network_policy_by_default_admits_the_namespace(render: Render) -> None:
    policy = one(render("cpu", "networkPolicy.enabled=true"), "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    (rule,) = policy["ingress"]
    assert rule == {"ports": [{"port": "http", "protocol": "TCP"}], "from": [{"podSelector": {}}]}


def test_helm_test_hook(render: Render) -> None:
    manifests = render("everything")
    test = one(manifests, "Pod")
    assert test["metadata"]["annotations"]["helm.sh/hook"] == "test"
    (container,) = test["spec"]["containers"]
    script, *arguments = container["args"]
    assert container["command"] == ["python3", "-c"]
    assert script.strip() == (CHART / "files" / "check_server.py").read_text().strip()
    assert arguments == [one(manifests, "Service")["metadata"]["name"], "80", "mixtral"]


def test_names_stay_within_63_characters(render: Render) -> None:
    for manifest in render("everything", f"fullnameOverride={'n' * 100}"):
        assert len(manifest["metadata"]["name"]) <= 63
