"""The values for vLLM's production-stack chart: keys that it has, and a server that exists."""

import json
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from fastkv_vllm.config import CompressionConfig
from tests.deploy.conftest import DEPLOY, render

VALUES = sorted((DEPLOY / "production-stack").glob("values-*.yaml"))
KUBERNETES = "1.32"
# What the chart's templates take of what we give, read in its repository. A dict: an object with these keys, a list: of
# such elements, str: goes into a pod as it stands, and has to be what Kubernetes has there.
PROBE = {
    "initialDelaySeconds": int,
    "periodSeconds": int,
    "failureThreshold": int,
    "timeoutSeconds": int,
    "httpGet": {"path": str, "port": int},
}
KEYS = {
    "servingEngineSpec": {
        "enableEngine": bool,
        "runtimeClassName": str,
        "tolerations": "pod.tolerations",
        "vllmApiKey": {"secretName": str, "secretKey": str},
        "securityContext": "pod.securityContext",
        "containerSecurityContext": "container.securityContext",
        "startupProbe": PROBE,
        "readinessProbe": PROBE,
        "livenessProbe": PROBE,
        "modelSpec": [
            {
                "name": str,
                "repository": str,
                "tag": str,
                "modelURL": str,
                "replicaCount": int,
                "requestCPU": int,
                "requestMemory": str,
                "limitMemory": str,
                "requestGPU": int,
                "nodeSelectorTerms": "pod.affinity.nodeAffinity",
                "vllmConfig": {"enablePrefixCaching": bool, "maxModelLen": int, "extraArgs": [str]},
                "env": "container.env",
                "extraVolumes": "pod.volumes",
                "extraVolumeMounts": "container.volumeMounts",
            }
        ],
    }
}


@pytest.fixture(params=VALUES, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def values(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def problems(value: Any, keys: Any, where: str = "") -> list[str]:
    """Where a value is none that the chart takes."""
    if isinstance(keys, str):
        return []
    if isinstance(keys, type):
        return [] if type(value) is keys else [f"{where} is {value!r}, not {keys.__name__}"]
    if type(value) is not type(keys):
        return [f"{where} is {value!r}, not {type(keys).__name__}"]
    if isinstance(keys, list):
        return [line for i, item in enumerate(value) for line in problems(item, keys[0], f"{where}[{i}]")]
    unknown = [f"{where}.{name} is unknown" for name in value if name not in keys]
    known = (problems(value[name], keys[name], f"{where}.{name}") for name in value if name in keys)
    return unknown + [line for lines in known for line in lines]


def pod_of(values: dict[str, Any]) -> dict[str, Any]:
    """The pod that the chart makes, as far as our values decide it."""
    engine = values["servingEngineSpec"]
    (model,) = engine["modelSpec"]
    config = model["vllmConfig"]
    command = ["vllm", "serve", model["modelURL"], "--host", "0.0.0.0", "--port", "8000"]
    command += ["--enable-prefix-caching" if config["enablePrefixCaching"] else "--no-enable-prefix-caching"]
    command += ["--max-model-len", str(config["maxModelLen"]), *config["extraArgs"]]
    gpus = {"nvidia.com/gpu": str(model["requestGPU"])} if model["requestGPU"] else {}
    container = {
        "name": "vllm",
        "image": f"{model['repository']}:{model['tag']}",
        "command": command,
        "env": model["env"],
        "securityContext": engine["containerSecurityContext"],
        "resources": {
            "requests": {"memory": model["requestMemory"], "cpu": str(model["requestCPU"]), **gpus},
            "limits": {"memory": model["limitMemory"], **gpus},
        },
        "volumeMounts": model["extraVolumeMounts"],
        **{name: engine[name] for name in ("startupProbe", "readinessProbe", "livenessProbe")},
    }
    spec = {"securityContext": engine["securityContext"], "containers": [container], "volumes": model["extraVolumes"]}
    spec |= {name: engine[name] for name in ("runtimeClassName", "tolerations") if engine.get(name)}
    if terms := model.get("nodeSelectorTerms"):
        required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
        spec["affinity"] = {"nodeAffinity": required}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "model"}, "spec": spec}


def test_the_chart_knows_the_keys(values: dict[str, Any]) -> None:
    assert not problems(values, KEYS)


def test_a_wrong_key_or_type_is_found(values: dict[str, Any]) -> None:
    (model,) = values["servingEngineSpec"]["modelSpec"]
    model["vllmConfig"] |= {"extraArg": [], "maxModelLen": "32768"}
    assert problems(values, KEYS) == [
        ".servingEngineSpec.modelSpec[0].vllmConfig.extraArg is unknown",
        ".servingEngineSpec.modelSpec[0].vllmConfig.maxModelLen is '32768', not int",
    ]


def test_the_pod_fits_the_schema(values: dict[str, Any]) -> None:
    kubernetes_validate.validate(pod_of(values), KUBERNETES, strict=True)


def test_the_pod_is_that_of_our_own_manifests(path: Path, values: dict[str, Any]) -> None:
    """What the overlay of the same name says of security, probes, hardware, environment and settings."""
    overlay = render(DEPLOY / "kubernetes/overlays" / path.stem.removeprefix("values-"))
    (deployment,) = (item for item in overlay if item["kind"] == "Deployment")
    ours, pod = deployment["spec"]["template"]["spec"], pod_of(values)["spec"]
    (server,), (container,) = ours["containers"], pod["containers"]
    assert pod["securityContext"] == ours["securityContext"]
    assert container["securityContext"].items() >= server["securityContext"].items()
    for name in ("image", "resources"):
        assert container[name] == server[name]
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[name]["httpGet"]["path"] == server[name]["httpGet"]["path"]
        for field in ("periodSeconds", "failureThreshold", "timeoutSeconds"):
            assert container[name][field] == server[name][field], (name, field)
    env = {item["name"]: item.get("value") for item in server["env"]}
    for item in container["env"]:
        assert item["name"] in env and (item["name"] == "HOME" or item["value"] == env[item["name"]]), item
    settings = {f"--kv-compression={env['KV_COMPRESSION']}", f"--kv-compression-config={env['KV_COMPRESSION_CONFIG']}"}
    assert settings < set(container["command"])
    assert pod.get("tolerations") == ours.get("tolerations")
    assert node_labels(pod) == ours.get("nodeSelector", {})


def node_labels(pod: dict[str, Any]) -> dict[str, str]:
    """Labels that a node has to have by the pod's affinity."""
    if "affinity" not in pod:
        return {}
    required = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (term,) = required["nodeSelectorTerms"]
    assert all(line["operator"] == "In" and len(line["values"]) == 1 for line in term["matchExpressions"])
    return {line["key"]: line["values"][0] for line in term["matchExpressions"]}


def test_what_the_server_writes_has_a_place(values: dict[str, Any]) -> None:
    """HF_HOME and PROMETHEUS_MULTIPROC_DIR are /tmp in the chart where there is no claim of its own."""
    (container,) = pod_of(values)["spec"]["containers"]
    written = {item["mountPath"] for item in container["volumeMounts"] if not item.get("readOnly")}
    homes = {item["value"] for item in container["env"] if item["name"] == "HOME"}
    assert {*homes, "/tmp", "/dev/shm"} <= written


def test_vllm_knows_the_arguments(values: dict[str, Any]) -> None:
    (container,) = pod_of(values)["spec"]["containers"]
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(container["command"][2:])
    settings = parsed.kv_compression_config
    config = CompressionConfig.from_mapping(
        parsed.kv_compression, json.loads(settings) if isinstance(settings, str) else settings
    )
    assert not (config.uses_tsp and parsed.enable_prefix_caching), "they exclude each other"
    assert parsed.shutdown_timeout < 30, "the chart leaves Kubernetes' own 30 s"
