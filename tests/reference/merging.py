"""Two neighbouring layers' entries merged into one, in float64."""

import math

import torch
from torch import Tensor

from tests.reference.codecs import stored


def merge_pair(
    lower: tuple[Tensor, Tensor],
    upper: tuple[Tensor, Tensor],
    *,
    t: float,
    gamma: float,
    most: int,
    values_only: bool,
    codec: str | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Keys and values [N, D] of one head of both layers as they come back from the merged form.

    Directions and what is not merged are stored by the codec.

    Source: MiniCache, arXiv 2405.14366: x = |x| * e / |e| with e the spherical interpolation of both layers' unit
    vectors; entries far apart stay as they are.
    """
    halves = (1,) if values_only else (0, 1)
    stay = retained({half: distances(lower[half], upper[half]) for half in halves}, gamma, most)
    merged = [i for i in range(len(lower[0])) if i not in stay]
    parts = [[x.clone() for x in pair] if codec is None else list(stored(codec, *pair)) for pair in (lower, upper)]
    for half in halves:
        e = slerp(lower[half].double(), upper[half].double(), t)
        if codec is not None:
            e, _ = stored(codec, e.float(), e.float())
            e = e.double() / e.double().norm(dim=1, keepdim=True)
        for layer, own in zip(parts, (lower[half], upper[half]), strict=True):
            layer[half][merged] = (e * own.double().norm(dim=1, keepdim=True)).float()[merged]
    return tuple(parts[0]), tuple(parts[1])


def distances(a: Tensor, b: Tensor) -> list[float]:
    """Angle between each two vectors [N, D] in shares of a half turn."""
    cosines = torch.cosine_similarity(a.double(), b.double(), dim=1)
    return (torch.acos(cosines.clamp(-1, 1)) / math.pi).tolist()


def retained(distances: dict[int, list[float]], gamma: float, most: int) -> set[int]:
    """Entries in the upper band of keys' or values' distances, the `most` farthest of them, ties by position."""
    found = set()
    for of_half in distances.values():
        limit = max(of_half) + (min(of_half) - max(of_half)) * gamma
        found |= {i for i, d in enumerate(of_half) if d > limit}
    farthest = sorted(found, key=lambda i: (-max(of_half[i] for of_half in distances.values()), i))
    return set(farthest[:most])


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Unit vectors between the directions of each two vectors [N, D], t of the way to the second."""
    a, b = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
    angle = torch.acos((a * b).sum(dim=1, keepdim=True).clamp(-1, 1))
    e = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    return e / e.norm(dim=1, keepdim=True)
