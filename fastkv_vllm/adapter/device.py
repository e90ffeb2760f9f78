"""Where a worker's tensors are made."""

from contextlib import AbstractContextManager, nullcontext

import torch


def made_on(device: torch.device) -> AbstractContextManager:
    """Within it, tensors that are made without a device are made on this one, as those of a CPU engine are anyway.

    It does not reach into custom ops of torch's library, such as attention under vLLM.
    """
    return nullcontext() if device.type == "cpu" else device
