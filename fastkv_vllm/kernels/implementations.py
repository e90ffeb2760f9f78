"""Which implementation of an op runs: the one for the tensors' device, or the one asked for."""

import torch

IMPLEMENTATIONS = ("reference", "triton")


def choose(impl: str | None, device: torch.device) -> str:
    """Name of the implementation that runs; what is asked for is never replaced by another.

    Args:
        impl: one of `IMPLEMENTATIONS`, or None for that of the device: "triton" on a GPU, else "reference".
        device: where the op's tensors are.

    Raises:
        ValueError: there is no such implementation, or it does not run there.
    """
    if impl is None:
        return "triton" if device.type == "cuda" else "reference"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}; got {impl!r}")
    if impl == "triton" and device.type != "cuda" and not _is_interpreting():
        raise ValueError(
            f"impl='triton' needs tensors on a GPU; these are on {device}: move them or use impl='reference' "
            "(Triton's interpreter, TRITON_INTERPRET=1, runs kernels on the CPU)"
        )
    return impl


def _is_interpreting() -> bool:
    """Whether kernels run on the CPU; Triton is imported only where it was asked for."""
    import triton

    return bool(triton.knobs.runtime.interpret)
