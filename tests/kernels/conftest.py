"""Where kernels run: Triton's interpreter, and a GPU."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import Interpreter

Run = Callable[..., Any]


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """`run(function, *args, **kwargs)` is `function(*args, impl="triton", **kwargs)`; see this package."""
    if request.param == "interpreter":
        interpreter = request.getfixturevalue("interpreter")
        yield lambda function, *args, **kwargs: interpreter(function, *args, impl="triton", **kwargs)
        return
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    torch.use_deterministic_algorithms(True)  # fills the memory of torch.empty
    yield on_gpu
    torch.use_deterministic_algorithms(False)


def on_gpu(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call with copies on the GPU, strides kept, and copy back what was changed."""
    moved = [to_gpu(value) for value in args], {name: to_gpu(value) for name, value in kwargs.items()}
    result = function(*moved[0], impl="triton", **moved[1])
    for before, after in zip([*args, *kwargs.values()], [*moved[0], *moved[1].values()], strict=True):
        if isinstance(before, Tensor):
            before.copy_(after)
    return result.cpu() if isinstance(result, Tensor) else result


def to_gpu(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    storage = torch.empty(0, dtype=value.dtype, device="cuda").set_(value.untyped_storage().cuda())
    return storage.as_strided(value.shape, value.stride(), value.storage_offset())
