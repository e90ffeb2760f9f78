"""SKVQ's groups: alike channels side by side, and clips that lose least, by the reference's own rounding."""

from pathlib import Path

import pytest
import torch

from fastkv_vllm.calibrate.channels import CLIPS, ChannelRanges, ClipSearch, alike_channels, read_entries
from fastkv_vllm.calibrate.errors import CalibrationError
from fastkv_vllm.calibrate.model import CalibrationModel, causal_attention
from fastkv_vllm.calibrate.prompts import Prompt
from tests.reference import make_checkpoint
from tests.reference.codecs import clipped

NUM_SINK = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CalibrationModel:
    return CalibrationModel(make_checkpoint(Path(tmp_path_factory.mktemp("model")), "llama", num_layers=2))


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    rows = torch.randint(3, 500, (3, 50), generator=torch.Generator().manual_seed(4)).tolist()
    return [Prompt(tuple(row), (), None, range(0)) for row in rows]


@pytest.fixture(scope="module")
def entries(model: CalibrationModel, prompts: list[Prompt]) -> torch.Tensor:
    """Keys and values after the sinks of all prompts, [L, 2, H, N, D]."""
    found: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def attend(layer, queries, keys, values):
        found[layer].append(torch.stack([keys, values])[:, :, NUM_SINK:])
        return causal_attention(queries, keys, values)

    for prompt in prompts:
        model.prefill(prompt.token_ids, attend)
    return torch.stack([torch.cat(parts, dim=2) for parts in found.values()])


def run(work: ChannelRanges | ClipSearch, prompts: list[Prompt]) -> None:
    for index in range(len(prompts)):
        work.step(index)


def test_channels_of_a_group_are_alike() -> None:
    """Two kinds of channels, shuffled; and a third kind of which neither group has room for all."""
    shuffled = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    ranges = torch.tensor([[-1.0, 1.0]] * 16 + [[2.0, 9.0]] * 16)[shuffled]
    ranges += torch.rand(32, 2, generator=torch.Generator().manual_seed(2)) / 10
    order = alike_channels(ranges, 2)
    assert sorted(order.tolist()) == list(range(32))
    assert [set((shuffled[group] < 16).tolist()) for group in order.view(2, 16)] == [{True}, {False}]
    four = alike_channels(torch.tensor([[0.0, 1.0]] * 3 + [[0.0, 5.0]] * 5), 4).view(4, 2)
    assert sorted(four.flatten().tolist()) == list(range(8))
    assert sum(len({int(channel) < 3 for channel in group}) for group in four) == 5, "one group of both kinds"


def test_ranges_are_those_of_all_prompts_after_the_sinks(
    model: CalibrationModel, prompts: list[Prompt], entries: torch.Tensor
) -> None:
    work = ChannelRanges(model, prompts, NUM_SINK)
    run(work, prompts)
    ranges = torch.tensor(work.state()["ranges"])  # [L, H, 2, D, 2]
    for side, extreme in enumerate((entries.amin(dim=3), entries.amax(dim=3))):
        assert torch.equal(ranges[..., side], extreme.transpose(1, 2))
    orders = work.orders()
    assert list(orders.shape) == [2, 2, 2, 32]
    assert torch.equal(orders[1, 0, 1], alike_channels(ranges[1, 0, 1], 2))
    seen: list[int] = []
    read_entries(model, prompts[0], NUM_SINK, lambda layer, of_layer: seen.append(of_layer.shape[2]))
    assert seen == [50 - NUM_SINK] * 2


def test_clips_lose_least(model: CalibrationModel, prompts: list[Prompt], entries: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(6)
    orders = torch.rand(2, 2, 2, 32, generator=generator).argsort()
    work = ClipSearch(model, prompts, orders, NUM_SINK)
    run(work, prompts)
    found = work.found()
    lost = torch.zeros(2)
    for layer, head, part in torch.cartesian_prod(*[torch.arange(2)] * 3).tolist():
        own, order = entries[layer, part, head], orders[layer, head, part].tolist()
        for group in range(2):
            channels = order[16 * group : 16 * group + 16]
            errors = []
            for clip in CLIPS:
                read = clipped(own, (4, 3)[part], order, [clip, clip])
                errors.append(float((read - own)[:, channels].double().square().sum()))
            assert found["clips"][layer][head][part][group] == CLIPS[errors.index(min(errors))]
            lost[part] += min(errors)
    sizes = entries.double().square().sum(dim=(0, 2, 3, 4))
    assert found["lost"] == pytest.approx((lost / sizes).tolist(), rel=1e-5)
    plain = torch.stack([clipped(entries[:, part].flatten(0, 2), (4, 3)[part], range(32), [1, 1]) for part in (0, 1)])
    unmeasured = (plain - entries.transpose(0, 1).flatten(1, 3)).double().square().sum(dim=(1, 2)) / sizes
    assert found["lost_unmeasured"] == pytest.approx(unmeasured.tolist(), rel=1e-5)
    assert all(a < b for a, b in zip(found["lost"], found["lost_unmeasured"], strict=True))


def test_a_prompt_of_sinks_alone_is_told(model: CalibrationModel, prompts: list[Prompt]) -> None:
    with pytest.raises(CalibrationError, match="must have more than the 50 tokens that stay as they are; one has 50"):
        ChannelRanges(model, prompts, 50)
