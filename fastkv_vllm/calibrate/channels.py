"""SKVQ's groups: which channels of a head are alike, and where the codes of a group begin and end."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkv_vllm.calibrate.errors import CalibrationError
from fastkv_vllm.calibrate.model import CalibrationModel, causal_attention
from fastkv_vllm.calibrate.prompts import Prompt
from fastkv_vllm.codecs import LEVELS, num_groups, quantise_clipped

CLIPS = [share / 50 for share in range(50, 24, -1)]  # tried for each group
MOST_ROUNDS = 30  # of the search for groups


class ChannelRanges:
    """Least and largest number of each channel of the keys and values, one prompt a step.

    Args:
        num_sink: first tokens of each prompt that are not looked at: serving stores them as they are.
    """

    def __init__(self, model: CalibrationModel, prompts: Sequence[Prompt], num_sink: int) -> None:
        short = min(len(prompt.token_ids) for prompt in prompts)
        if short <= num_sink:
            raise CalibrationError(
                f"prompts must have more than the {num_sink} tokens that stay as they are; one has {short}: drop it or "
                "lower --num-sink"
            )
        self._model = model
        self._prompts = prompts
        self._num_sink = num_sink
        self._ranges = torch.empty(0)  # [L, H, 2, D, 2]: keys and values, least and largest

    def step(self, index: int) -> None:
        found: list[Tensor] = []
        read_entries(
            self._model,
            self._prompts[index],
            self._num_sink,
            lambda _, entries: found.append(torch.stack(entries.aminmax(dim=2), dim=-1)),
        )
        ranges = torch.stack(found)
        if len(self._ranges):
            both = torch.stack([self._ranges, ranges])
            ranges = torch.stack([both[..., 0].amin(dim=0), both[..., 1].amax(dim=0)], dim=-1)
        self._ranges = ranges

    def state(self) -> dict[str, Any]:
        return {"ranges": self._ranges.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        self._ranges = torch.tensor(state["ranges"])

    def orders(self) -> Tensor:
        """Channels of each layer and head, group after group, [L, H, 2, D] int64."""
        heads = self._ranges.flatten(0, 2)  # [n, D, 2]
        groups = num_groups(heads.shape[1])
        return torch.stack([alike_channels(of_head, groups) for of_head in heads]).view(self._ranges.shape[:-1])


class ClipSearch:
    """Squared errors of the stored keys and values by the share of their groups' extremes that codes reach.

    One prompt a step.

    Args:
        orders: channels, group after group, [L, H, 2, D].
        num_sink: as in `ChannelRanges`.
    """

    def __init__(self, model: CalibrationModel, prompts: Sequence[Prompt], orders: Tensor, num_sink: int) -> None:
        self._model = model
        self._prompts = prompts
        self._orders = orders
        self._num_sink = num_sink
        groups = num_groups(orders.shape[-1])
        self._errors = torch.zeros(len(CLIPS), *orders.shape[:-1], groups, dtype=torch.float64)
        self._unmeasured = torch.zeros(2, dtype=torch.float64)  # of keys and of values: own order, nothing clipped
        self._sizes = torch.zeros(2, dtype=torch.float64)

    def step(self, index: int) -> None:
        def compare(layer: int, entries: Tensor) -> None:
            for part, levels in enumerate(LEVELS):
                own = entries[:, part]  # [H, N, D]
                self._unmeasured[part] += _squared_error(own, levels, None).sum()
                self._sizes[part] += own.double().square().sum()
                order = self._orders[layer, :, part].unsqueeze(1).expand_as(own)
                ordered = own.gather(2, order)
                for number, clip in enumerate(CLIPS):
                    self._errors[number, layer, :, part] += _squared_error(ordered, levels, clip)

        read_entries(self._model, self._prompts[index], self._num_sink, compare)

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, f"_{name}").tolist() for name in ("errors", "unmeasured", "sizes")}

    def restore(self, state: dict[str, Any]) -> None:
        for name, numbers in state.items():
            setattr(self, f"_{name}", torch.tensor(numbers, dtype=torch.float64))

    def found(self) -> dict[str, Any]:
        """`clips` with the least error, [L, H, 2, groups], and the shares of the squared norm that are lost.

        `lost` with these groups and clips, `lost_unmeasured` without, of keys and of values.
        """
        least, best = self._errors.min(dim=0)
        lost = least.sum(dim=(0, 1, 3))
        return {
            "clips": torch.tensor(CLIPS, dtype=torch.float64)[best].tolist(),
            "lost": (lost / self._sizes).tolist(),
            "lost_unmeasured": (self._unmeasured / self._sizes).tolist(),
        }


def read_entries(model: CalibrationModel, prompt: Prompt, num_sink: int, look: Callable[[int, Tensor], object]) -> None:
    """Show `look` each layer's number and its keys and values after the first tokens, [H, 2, N, D] float32."""

    def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        look(layer, torch.stack([keys, values], dim=1)[:, :, num_sink:].float().cpu())
        return causal_attention(queries, keys, values)

    model.prefill(prompt.token_ids, attend)


def alike_channels(ranges: Tensor, count: int) -> Tensor:
    """Channels of one head in groups of equal width whose members have extremes alike, group after group, [D] int64.

    k-means of the points (least, largest); of the channels that are left the one nearest to a centre with room for it
    is taken first.

    Args:
        ranges: least and largest number of each channel, [D, 2].
        count: groups.
    """
    num_channels = len(ranges)
    width = num_channels // count
    members = (ranges[:, 1] - ranges[:, 0]).sort(stable=True).indices.view(count, width)
    for _ in range(MOST_ROUNDS):
        centres = ranges[members].mean(dim=1)
        chosen: list[list[int]] = [[] for _ in range(count)]
        taken = set[int]()
        for place in torch.cdist(ranges, centres).flatten().sort(stable=True).indices.tolist():
            channel, group = divmod(place, count)
            if channel not in taken and len(chosen[group]) < width:
                chosen[group].append(channel)
                taken.add(channel)
        before, members = members, torch.tensor([sorted(group) for group in chosen])
        if torch.equal(before, members):
            break
    return members.flatten()


def _squared_error(x: Tensor, levels: int, clip: float | None) -> Tensor:
    """Of numbers [H, N, D] stored in groups of channels side by side, [H, groups] float64."""
    groups = x.unflatten(2, (num_groups(x.shape[2]), -1))
    codes, low, step = quantise_clipped(groups, levels, None if clip is None else x.new_tensor(clip))
    read = codes * step.float().unsqueeze(-1) + low.float().unsqueeze(-1)
    return (read - groups).double().square().sum(dim=(1, 3))
