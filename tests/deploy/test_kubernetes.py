"""The manifests: they render, fit the schemas, are locked down, and start a server that exists."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import kubernetes_validate
import promql_parser
import pytest
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from fastkv_vllm.config import CompressionConfig
from tests.deploy.conftest import COMPONENTS, DEPLOY, queries, render

OVERLAYS = sorted(path.parent.name for path in (DEPLOY / "kubernetes/overlays").glob("*/kustomization.yaml"))
CUSTOM = ("ServiceMonitor", "PrometheusRule", "ScaledObject")  # kinds whose schemas belong to their operators
KUBERNETES = "1.32"
GPU = "nvidia.com/gpu"
# What Grafana puts in the place of its variables before a query reaches Prometheus.
VARIABLES = {"$__rate_interval": "1m", "$model_name": ".*"}


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def objects(overlay: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """An overlay with all components, as a user would put them together."""
    directory = tmp_path_factory.mktemp("mine")
    parts = {"resources": [DEPLOY / "kubernetes/overlays" / overlay], "components": sorted(COMPONENTS.iterdir())}
    lines = ["apiVersion: kustomize.config.k8s.io/v1beta1", "kind: Kustomization"]
    for name, paths in parts.items():
        lines += [f"{name}:", *(f"  - {relative(path, directory)}" for path in paths)]
    (directory / "kustomization.yaml").write_text("\n".join(lines))
    return render(directory)


def relative(path: Path, start: Path) -> str:
    return str(Path(*[".."] * (len(start.resolve().parts) - 1), *path.resolve().parts[1:]))


def one(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [item for item in objects if item["kind"] == kind]
    return found


def server(objects: list[dict[str, Any]]) -> dict[str, Any]:
    (container,) = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    return container


def parsed(container: dict[str, Any]) -> Namespace:
    """The arguments as vLLM's own parser takes them, with the plugin's in it."""
    values = {item["name"]: item["value"] for item in container["env"] if "value" in item}
    args = container["args"]
    for name, value in values.items():
        args = [arg.replace(f"$({name})", value) for arg in args]
    return make_arg_parser(FlexibleArgumentParser()).parse_args(args)


def test_objects_fit_the_schemas(objects: list[dict[str, Any]]) -> None:
    for item in objects:
        if item["kind"] not in CUSTOM:
            kubernetes_validate.validate(item, KUBERNETES, strict=True)
    assert {item["kind"] for item in objects} >= {*CUSTOM, "Deployment", "Service", "NetworkPolicy", "ConfigMap"}


def test_a_wrong_field_does_not_fit(objects: list[dict[str, Any]]) -> None:
    wrong = json.loads(json.dumps(one(objects, "Deployment")))
    wrong["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_selectors_find_the_pods(objects: list[dict[str, Any]]) -> None:
    deployment = one(objects, "Deployment")["spec"]
    labels = deployment["template"]["metadata"]["labels"].items()
    selectors = {
        "Deployment": deployment["selector"]["matchLabels"],
        "Service": one(objects, "Service")["spec"]["selector"],
        "PodDisruptionBudget": one(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        "NetworkPolicy": one(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    }
    for kind, selector in selectors.items():
        assert selector and selector.items() <= labels, kind
    service = one(objects, "Service")["metadata"]["labels"].items()
    assert one(objects, "ServiceMonitor")["spec"]["selector"]["matchLabels"].items() <= service
    target = one(objects, "ScaledObject")["spec"]["scaleTargetRef"]["name"]
    assert target == one(objects, "Deployment")["metadata"]["name"]


def test_the_pod_is_locked_down(objects: list[dict[str, Any]]) -> None:
    pod, container = one(objects, "Deployment")["spec"]["template"]["spec"], server(objects)
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    assert not pod["automountServiceAccountToken"]
    context = container["securityContext"]
    assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert one(objects, "NetworkPolicy")["spec"]["egress"] == []
    secret = next(item for item in container["env"] if item["name"] == "VLLM_API_KEY")
    assert "value" not in secret and secret["valueFrom"]["secretKeyRef"]["name"]
    written = {item["mountPath"] for item in container["volumeMounts"] if not item.get("readOnly")}
    homes = {item["value"] for item in container["env"] if item["name"] in ("HOME", "TMPDIR")}
    assert homes <= written, "what the server writes has a place"


def test_cores_and_memory_are_asked_for_and_hold_the_cache(objects: list[dict[str, Any]]) -> None:
    resources = server(objects)["resources"]
    assert int(resources["requests"]["cpu"]) > 0
    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    env = {item["name"]: item.get("value") for item in server(objects)["env"]}
    assert ("VLLM_CPU_KVCACHE_SPACE" in env) != (GPU in resources["requests"])
    if space := env.get("VLLM_CPU_KVCACHE_SPACE"):
        assert int(space) < int(resources["limits"]["memory"].removesuffix("Gi"))


def test_a_rank_has_its_gpu_and_a_pod_its_kind(overlay: str, objects: list[dict[str, Any]]) -> None:
    """The image and the node are those of what the overlay is named after, and there is one rank for each GPU."""
    pod, container = one(objects, "Deployment")["spec"]["template"]["spec"], server(objects)
    hardware, _, ranks = overlay.partition("-tp")
    requests, limits = (container["resources"][name] for name in ("requests", "limits"))
    assert container["image"].endswith("-cpu" if hardware == "cpu" else "-cuda")
    assert parsed(container).tensor_parallel_size == int(ranks or 1)
    if hardware == "cpu":
        assert GPU not in {*requests, *limits} and "nodeSelector" not in pod
        return
    assert requests[GPU] == limits[GPU] == (ranks or "1")
    assert hardware.upper() in pod["nodeSelector"]["nvidia.com/gpu.product"]
    assert {"key": GPU, "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]


def test_a_server_that_goes_has_time_to_answer(objects: list[dict[str, Any]]) -> None:
    pod, container = one(objects, "Deployment")["spec"]["template"]["spec"], server(objects)
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    (drain,) = [int(arg.partition("=")[2]) for arg in container["args"] if arg.startswith("--shutdown-timeout=")]
    assert pod["terminationGracePeriodSeconds"] > pause + drain
    probes = ("startupProbe", "readinessProbe", "livenessProbe")
    assert {container[name]["httpGet"]["path"] for name in probes} == {"/health"}


def test_one_replica_leaves_at_a_time_and_more_come_while_requests_wait(objects: list[dict[str, Any]]) -> None:
    assert one(objects, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    scaling = one(objects, "ScaledObject")["spec"]
    assert 0 < scaling["minReplicaCount"] < scaling["maxReplicaCount"]
    (trigger,) = scaling["triggers"]
    assert "vllm:num_requests_waiting" in trigger["metadata"]["query"]


def test_monitoring_scrapes_and_policy_admits_the_port_of_the_api(objects: list[dict[str, Any]]) -> None:
    (port,) = server(objects)["ports"]
    (endpoint,) = one(objects, "ServiceMonitor")["spec"]["endpoints"]
    (service,) = one(objects, "Service")["spec"]["ports"]
    (ingress,) = one(objects, "NetworkPolicy")["spec"]["ingress"]
    assert endpoint["path"] == "/metrics" and endpoint["port"] == service["name"]
    assert service["targetPort"] == port["name"] and ingress["ports"] == [{"port": port["name"]}]


def test_vllm_knows_the_arguments(objects: list[dict[str, Any]]) -> None:
    """The settings are ours to check."""
    args = parsed(server(objects))
    settings = args.kv_compression_config
    CompressionConfig.from_mapping(args.kv_compression, json.loads(settings) if isinstance(settings, str) else settings)
    (port,) = server(objects)["ports"]
    assert port["containerPort"] == args.port and args.host == "0.0.0.0"


@pytest.mark.parametrize("place", queries())
def test_queries_are_promql(place: str) -> None:
    query = queries()[place]
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    promql_parser.parse(query)
