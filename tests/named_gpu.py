"""A GPU in name only: its tensors are computed on the CPU, strict about what a GPU would not mix.

Which tensors a program makes where is all that this shows; the kernels are the CPU's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

GPU = torch.device("meta")  # the only other device that this torch knows how to guard
COPIES = {"aten._to_copy", "aten.copy_"}  # go from one device to another
WAITING = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten.repeat_interleave"}
INDEXING = {"aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"}  # take indices from the host


class OnGPU(Tensor):
    """A tensor on the named GPU; its data are `inner`'s.

    Fields:
        waits: ops so far for which the host would have waited for the GPU.
    """

    inner: Tensor
    waits: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnGPU":
        wrapped = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=GPU,
        )
        wrapped.inner = inner
        return wrapped

    def tolist(self) -> Any:
        self.waits.append("tolist")
        return self.inner.tolist()

    def __repr__(self) -> str:
        return f"OnGPU({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), str(func.overloadpacket)
        owners: dict[int, OnGPU] = {}
        strangers = []

        def unwrap(value: Any) -> Any:
            if isinstance(value, OnGPU):
                owners[id(value.inner)] = value
                return value.inner
            if isinstance(value, Tensor) and value.dim():
                strangers.append(value)
            return value

        device = torch.device(kwargs.pop("device")) if kwargs.get("device") is not None else GPU
        arguments, options = tree_map(unwrap, (args, kwargs))
        if strangers and owners and name not in COPIES | INDEXING:
            raise RuntimeError(f"{name} mixes the GPU's tensors with the host's, {[t.shape for t in strangers]}")
        if name in INDEXING and not isinstance(args[0], OnGPU):
            raise RuntimeError(f"{name} reads a tensor of the host through indices on the GPU")
        if name in WAITING or device.type == "cpu" or (name in INDEXING and _has_mask(arguments[1])):
            cls.waits.append(name)
        result = func(*arguments, **options)
        if name == "aten.copy_":
            return args[0]
        if device.type == "cpu":
            return result.clone() if name == "aten._to_copy" else result

        def wrap(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return owners[id(value)] if id(value) in owners else cls(value)

        return tree_map(wrap, result)


class _Factories(TorchFunctionMode):
    """What is asked of the GPU without a tensor of it is made on the CPU and said to be there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if func is scaled_dot_product_attention and _has_gpu(args):  # inside it are tensors that torch makes itself
            assert all(isinstance(each, OnGPU) for each in (*args, kwargs["attn_mask"]))
            kwargs["attn_mask"] = kwargs["attn_mask"].inner
            return OnGPU(func(*(each.inner for each in args), **kwargs))
        if func in (Tensor.__setitem__, torch.where, Tensor.where) and _has_gpu(args):
            # Torch itself makes a number among the arguments a tensor of that device.
            first = 2 if func is Tensor.__setitem__ else 1
            args = (*args[:first], *map(_as_tensor, args[first:]))
        if func is Tensor.to and args[1:] and isinstance(args[1], torch.device | str):
            return self._move(args[0], torch.device(args[1]), args[2:], kwargs)
        if device is not None and torch.device(device).type == GPU.type and not _has_gpu(args):
            kwargs["device"] = "cpu"
            return OnGPU(func(*args, **kwargs))
        return func(*args, **kwargs)

    def _move(self, tensor: Tensor, device: torch.device, others: Any, kwargs: Any) -> Tensor:
        inner = tensor.inner if isinstance(tensor, OnGPU) else tensor
        if isinstance(tensor, OnGPU) and device.type == "cpu":
            tensor.waits.append("to")
        moved = inner.to(*others, **kwargs) if others or kwargs else inner
        if device.type == GPU.type:
            return tensor if moved is inner and isinstance(tensor, OnGPU) else OnGPU(moved.clone())
        return moved.clone() if isinstance(tensor, OnGPU) else moved


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


def _as_tensor(value: Any) -> Any:
    return OnGPU(torch.tensor(value, device="cpu")) if isinstance(value, int | float) else value


def _has_gpu(args: Any) -> bool:
    found = []
    tree_map(lambda value: found.append(value) if isinstance(value, OnGPU) else None, args)
    return bool(found)


@contextmanager
def named_gpu() -> Iterator[torch.device]:
    """Within it, tensors can be made on the GPU that this yields."""
    with _Factories():
        yield GPU
