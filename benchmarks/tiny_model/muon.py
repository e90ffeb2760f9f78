"""Muon: momentum whose matrix updates are orthogonalised.

Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); the quintic
Newton-Schulz coefficients are from there.
"""

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised per matrix; equal shapes go through Newton-Schulz as one batch.

    params: 2-D matrices [rows, columns].
    lr: step length; scaled by sqrt(max(1, rows / columns)).
    momentum: share of the old direction, in [0, 1).
    weight_decay: share of the weight removed per unit of lr.
    """

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        shapes = dict.fromkeys(weight.shape for weight in params)
        groups = [{"params": [weight for weight in params if weight.shape == shape]} for shape in shapes]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Update every matrix from its gradient."""
        for group in self.param_groups:
            weights, momentum = group["params"], group["momentum"]
            gradient = torch.stack([weight.grad for weight in weights])
            state = self.state[weights[0]]
            average = state.setdefault("average", torch.zeros_like(gradient)).lerp_(gradient, 1 - momentum)
            update = orthogonalise(gradient.lerp(average, momentum))
            rows, columns = gradient.shape[1:]
            step_length = group["lr"] * max(1, rows / columns) ** 0.5
            for weight, direction in zip(weights, update, strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=step_length)


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly, [count, rows, columns], by Newton-Schulz iteration."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(NUM_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()
