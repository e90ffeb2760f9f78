"""Which implementation of an op runs: the one for the tensors' device, or the one asked for."""

from collections.abc import Sequence

import torch

IMPLEMENTATIONS = ("reference", "triton")
WITH_CUDA = (*IMPLEMENTATIONS, "cuda")  # of an op that is in csrc/ too


def choose(impl: str | None, device: torch.device, *, among: Sequence[str] = IMPLEMENTATIONS) -> str:
    """Name of the implementation that runs; what is asked for is never replaced by another.

    Args:
        impl: one of `among`, or None for that of the device: "triton" on a GPU, else "reference".
        device: where the op's tensors are.
        among: implementations that the op has.

    Raises:
        ValueError: there is no such implementation, or it does not run there.
    """
    if impl is None:
        return "triton" if device.type == "cuda" else "reference"
    if impl not in among:
        raise ValueError(f"impl must be one of {', '.join(among)}; got {impl!r}")
    if not _runs(impl, device):
        raise ValueError(
            f"impl={impl!r} needs tensors on a GPU; these are on {device}: move them or use impl='reference' "
            "(Triton's interpreter, TRITON_INTERPRET=1, runs its kernels on the CPU)"
        )
    return impl


def _runs(impl: str, device: torch.device) -> bool:
    return impl == "reference" or device.type == "cuda" or (impl == "triton" and _is_interpreting())


def _is_interpreting() -> bool:
    """Whether kernels run on the CPU; Triton is imported only where it was asked for."""
    import triton

    return bool(triton.knobs.runtime.interpret)
