"""The CUDA library built from csrc/: its functions, called with tensors."""

import ctypes
from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("libfastkv_kernels.so")


def launch(name: str, *arguments: torch.Tensor | int | float) -> None:
    """Call a function that launches kernels, on its tensors' device and that device's current stream.

    Args:
        name: of the function; it returns 0 or an error code, and takes a stream behind the arguments.
        arguments: tensors go as pointers to their first element, integers as int64_t, floats as float; the first tensor
            names the device.

    Raises:
        RuntimeError: the library is not built, or a launch failed.
    """
    device = next(value.device for value in arguments if isinstance(value, torch.Tensor))
    with torch.cuda.device(device):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        code = getattr(_library(LIBRARY), name)(*map(_as_c, arguments), stream)
    if code:
        text = _library(LIBRARY).fastkv_error
        text.restype = ctypes.c_char_p
        raise RuntimeError(f"{name} failed on {device}: {text(code).decode()} (CUDA error {code})")


def count(name: str, *arguments: int) -> int:
    """What a function that computes a size returns."""
    function = getattr(_library(LIBRARY), name)
    function.restype = ctypes.c_int64
    return function(*map(_as_c, arguments))


def _as_c(value: torch.Tensor | int | float) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_float(value)


@cache
def _library(path: Path) -> ctypes.CDLL:
    if not path.exists():
        raise RuntimeError(
            f"impl='cuda' needs {path.name}, which is not built: run `make csrc` or install with FASTKV_BUILD_CSRC=1 "
            "(either needs nvcc and CMake), or use impl='triton'"
        )
    return ctypes.CDLL(str(path))
