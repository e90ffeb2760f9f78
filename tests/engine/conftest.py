"""Checkpoints made once per session, and engines that are always shut down."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engine.harness import Engine
from tests.reference import make_checkpoint
from tests.reference.images import IMAGE_FAMILY, make_image_checkpoint


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engine)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a random checkpoint of a family."""
    root = tmp_path_factory.mktemp("checkpoints")

    def directory(family: str) -> Path:
        path = root / family
        if path.exists():
            return path
        return make_image_checkpoint(path) if family == IMAGE_FAMILY else make_checkpoint(path, family)

    return directory


@pytest.fixture(scope="session")
def checkpoint(checkpoints: Callable[[str], Path]) -> Path:
    """The checkpoint most tests use."""
    return checkpoints("llama")


@pytest.fixture(scope="module")
def start(checkpoint: Path) -> Iterator[Callable[..., Engine]]:
    """Start an engine in place of the one started before it in the module: one lives at a time.

    The same arguments give the same engine again.
    """
    running: list[tuple[object, Engine]] = []

    def engine(method: str | None = None, config: dict | None = None, checkpoint: Path = checkpoint, **arguments):
        key = (method, config, checkpoint, arguments)
        if running and running[0][0] == key:
            return running[0][1]
        if running:
            running.pop()[1].close()
        running.append((key, Engine(checkpoint, method, config, **arguments)))
        return running[0][1]

    yield engine
    if running:
        running.pop()[1].close()
