"""Where kernels run: Triton's interpreter, csrc/ built for the CPU, and a GPU."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkv_vllm.kernels import csrc
from tests.kernels.csrc_builds import build_for_cpu, on_cpu
from tests.kernels.interpreter import Interpreter

Run = Callable[..., Any]


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


@pytest.fixture(scope="session")
def csrc_on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_for_cpu(tmp_path_factory.mktemp("csrc"))


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Run:
    """`run(function, *args, **kwargs)` is `function(*args, impl="triton", **kwargs)`; see this package."""
    return runner(request, "triton", request.param)


@pytest.fixture(params=["reference", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def form(request: pytest.FixtureRequest) -> Run:
    """`run`, and once with impl="reference" in this process."""
    if request.param == "reference":
        return lambda function, *args, **kwargs: function(*args, impl="reference", **kwargs)
    return runner(request, "triton", request.param)


PLACES = [
    ("triton", "interpreter"),
    ("cuda", "cpu"),
    pytest.param(("triton", "cuda"), marks=pytest.mark.gpu),
    pytest.param(("cuda", "cuda"), marks=pytest.mark.gpu),
]


@pytest.fixture(params=PLACES, ids="-on-".join)
def run_each(request: pytest.FixtureRequest) -> Run:
    """`run` for ops that are in csrc/ too: impl="triton" as there, impl="cuda" built for the CPU and on a GPU."""
    return runner(request, *request.param)


def runner(request: pytest.FixtureRequest, impl: str, place: str) -> Run:
    if place == "interpreter":
        return partial(call, request.getfixturevalue("interpreter"), impl)
    if place == "cpu":
        return partial(on_cpu, request.getfixturevalue("csrc_on_cpu"))
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if impl == "cuda" and not csrc.LIBRARY.exists():
        pytest.skip("csrc/ is not built (make csrc)")
    torch.use_deterministic_algorithms(True)  # fills the memory of torch.empty
    request.addfinalizer(partial(torch.use_deterministic_algorithms, False))
    return partial(on_gpu, impl)


def call(interpreter: Interpreter, impl: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return interpreter(function, *args, impl=impl, **kwargs)


def on_gpu(impl: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call with copies on the GPU, strides kept, and copy back what was changed."""
    moved = [to_gpu(value) for value in args], {name: to_gpu(value) for name, value in kwargs.items()}
    result = function(*moved[0], impl=impl, **moved[1])
    for before, after in zip([*args, *kwargs.values()], [*moved[0], *moved[1].values()], strict=True):
        if isinstance(before, Tensor):
            before.copy_(after)
    return result.cpu() if isinstance(result, Tensor) else result


def to_gpu(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    storage = torch.empty(0, dtype=value.dtype, device="cuda").set_(value.untyped_storage().cuda())
    return storage.as_strided(value.shape, value.stride(), value.storage_offset())
