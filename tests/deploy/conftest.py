"""What the files under deploy/ say once they are put together."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPONENTS = DEPLOY / "kubernetes/components"


def render(directory: Path) -> list[dict[str, Any]]:
    """Objects that `kubectl apply -k` would create."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(["kubectl", "kustomize", str(directory)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def queries() -> dict[str, str]:
    """Every PromQL expression of dashboard, alerts and autoscaling, by where it stands."""
    found = {}
    dashboard = json.loads((COMPONENTS / "monitoring/dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            found[f"panel {panel['title']}, {target['refId']}"] = target["expr"]
    rules = yaml.safe_load((COMPONENTS / "monitoring/prometheusrule.yaml").read_text())
    for group in rules["spec"]["groups"]:
        for rule in group["rules"]:
            found[f"alert {rule['alert']}"] = rule["expr"]
    scaled = yaml.safe_load((COMPONENTS / "keda/scaledobject.yaml").read_text())
    for trigger in scaled["spec"]["triggers"]:
        found["autoscaling"] = trigger["metadata"]["query"]
    return found


def metrics_of(query: str) -> set[str]:
    """Names of the metrics a query reads."""
    return set(re.findall(r"vllm:\w+", query))
