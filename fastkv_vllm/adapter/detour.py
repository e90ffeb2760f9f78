"""Layers that run on other rows than the step's, for as long as a step lasts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from vllm.forward_context import get_forward_context

from fastkv_vllm.adapter import native

Layer = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@contextmanager
def detour(layers: Sequence[nn.Module], first: int, replace: Callable[[int, Layer], Layer]) -> Iterator[None]:
    """Within it, layers from `first` on run what `replace` makes of their index and their `forward`.

    Only the instances' `forward` is replaced, and only meanwhile, unless the forward context takes detours
    (patches/0004): compiled code never sees either, which is why this step must run uncompiled. Detours nest: the later
    one replaces what the earlier one made of a layer.

    Args:
        layers: all decoder layers, in order.
        first: index of the first one that is replaced.
        replace: (index, forward) -> what runs instead.
    """
    context = get_forward_context()
    context.skip_compiled = True
    if native.detours_layers():
        earlier = getattr(context, native.DETOUR_FIELD) or _straight_on

        def run(index: int, layer: Layer) -> Layer:
            before = earlier(index, layer)
            return before if index < first else replace(index, before)

        setattr(context, native.DETOUR_FIELD, run)
        yield
        return
    before = [vars(layer).get("forward") for layer in layers[first:]]
    for index, layer in enumerate(layers[first:], start=first):
        layer.forward = replace(index, layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers[first:], before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _straight_on(index: int, layer: Layer) -> Layer:
    return layer
