"""Codecs: what comes back is the reference's, bit for bit, in the bytes promised."""

import pytest
import torch

from fastkv_vllm.codecs import CODECS, ChannelGroups, EntryShape, SkvqCodec, best_channels, best_value_channels
from fastkv_vllm.kernels.quantise import dequantise, group_bytes, quantise
from tests.reference.codecs import channel_parts, stored, value_channel_parts

ENTRY = EntryShape(64, torch.bfloat16)
each_codec = pytest.mark.parametrize("name", CODECS)


def entries(num: int, head_dim: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys with a few large channels, as models have them, and values; some rows are all alike."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, num, head_dim, generator=generator)
    keys[:, ::7] = keys[:, ::7] * 9 + 20
    values[3] = 0.25
    return keys.to(dtype), values.to(dtype)


@each_codec
@pytest.mark.parametrize(
    ("head_dim", "channel_ratio", "value_channel_ratio"),
    [(32, 1.0, 1.0), (64, 1.0, 1.0), (128, 1.0, 1.0), (64, 0.6, 1.0), (128, 0.6, 0.75), (64, 1.0, 0.5)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_the_references(
    name: str, head_dim: int, channel_ratio: float, value_channel_ratio: float, dtype: torch.dtype
) -> None:
    codec, entry = CODECS[name], EntryShape(head_dim, dtype, channel_ratio, value_channel_ratio)
    keys, values = entries(96, head_dim, dtype, seed=head_dim)
    keys, values = keys[:, : entry.key_dim], values[:, : entry.value_dim]
    data = codec.encode(keys, values)
    assert data.dtype == torch.uint8
    assert list(data.shape) == [96 // codec.group_size, codec.num_bytes(entry)]
    for got, want in zip(codec.decode(data, entry), stored(name, keys.float(), values.float()), strict=True):
        assert torch.equal(got, want)


@each_codec
def test_groups_stand_for_themselves(name: str) -> None:
    """Any group can be read without the others, so pages can be moved and shared."""
    codec, entry = CODECS[name], EntryShape(64, torch.float32)
    keys, values = entries(128, 64, torch.float32, seed=1)
    data = codec.encode(keys, values)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(2))
    for whole, part in zip(codec.decode(data, entry), codec.decode(data[order], entry), strict=True):
        groups = whole.unflatten(0, (len(data), -1))
        assert torch.equal(part.unflatten(0, (len(data), -1)), groups[order])


@pytest.mark.parametrize("channel_ratio", [1.0, 0.6])
def test_a_draft_reads_the_upper_four_bits(channel_ratio: float) -> None:
    """Of the same bytes, the first ones; what it gives is a valid quantisation in four bits, and far from the whole."""
    entry, codec = EntryShape(64, torch.bfloat16, channel_ratio), CODECS["int4x2"]
    keys, values = entries(96, 64, torch.bfloat16, seed=5)
    keys = keys[:, : entry.key_dim]
    data, draft = codec.encode(keys, values), codec.draft_view()
    assert draft.num_bytes(entry) == codec.num_bytes(entry) == codec.read_bytes(entry)
    # A minimum and a step, and half a byte a number, of 16 tokens: groups of 16 in keys, of 32 in values.
    assert draft.read_bytes(entry) == entry.key_dim * (4 + 8) + 16 * 2 * (4 + 16)
    whole, upper = codec.decode(data, entry), draft.decode(data[:, : draft.read_bytes(entry)], entry)
    expected = stored("int4x2-draft", keys.float(), values.float())
    for got, want, exact, was in zip(upper, expected, whole, (keys, values), strict=True):
        assert torch.equal(got, want)
        assert (exact - was).square().mean() * 100 < (got - was).square().mean(), "16 times as fine"
    assert CODECS["kivi4"].draft_view() is None


@pytest.mark.parametrize(
    ("head_dim", "channel_ratio", "key_dim"),
    [(64, 0.6, 40), (128, 0.6, 80), (32, 0.6, 24), (64, 0.5, 32), (64, 0.01, 8), (64, 0.99, 64), (80, 1.0, 80)],
)
def test_stored_channels_are_a_multiple_of_8(head_dim: int, channel_ratio: float, key_dim: int) -> None:
    assert EntryShape(head_dim, torch.bfloat16, channel_ratio).key_dim == key_dim
    assert EntryShape(head_dim, torch.bfloat16, value_channel_ratio=channel_ratio).value_dim == key_dim


def test_best_channels_are_those_of_the_largest_logits() -> None:
    generator = torch.Generator().manual_seed(4)
    queries, keys = torch.randn(8, 3, 64, generator=generator), torch.randn(50, 64, generator=generator)
    parts = channel_parts(queries.flatten(0, 1), keys)
    best = sorted(range(64), key=lambda i: -parts[i])[:40]
    assert best_channels(queries, keys, 40).tolist() == sorted(best)
    keys[:, 5] = queries[:, :, 9] = 0
    assert {5, 9}.isdisjoint(best_channels(queries, keys, 62).tolist())
    assert best_channels(queries * 0, keys, 3).tolist() == [0, 1, 2], "ties go to the lower channel"


def test_best_channels_of_values_are_those_of_the_largest_outputs() -> None:
    generator = torch.Generator().manual_seed(4)
    queries, entries = torch.randn(8, 3, 64, generator=generator), torch.randn(2, 50, 64, generator=generator)
    keys, values = entries
    parts = value_channel_parts(queries.flatten(0, 1), keys, values)
    best = sorted(range(64), key=lambda i: -parts[i])[:40]
    assert best_value_channels(queries, keys, values, 40).tolist() == sorted(best)
    largest = values.norm(dim=0).topk(40).indices.tolist()
    assert sorted(best) != sorted(largest), "they are not those of the largest values"
    looked_at = keys[7] / 8  # one entry has the attention of all: its own largest channels are best
    own = values[7].abs().topk(24).indices.sort().values
    assert torch.equal(best_value_channels(looked_at.expand(8, 3, 64) * 64, keys, values, 24), own)
    assert best_value_channels(queries, keys, values * 0, 3).tolist() == [0, 1, 2], "ties go to the lower channel"


@pytest.mark.parametrize(
    ("name", "num_entries"),
    [
        ("fp8", 64),
        ("int8", 60),
        ("int4", 113),
        ("int2", 204),
        ("kivi4", 96),
        ("kivi2", 160),
        ("int4x2", 48),
        ("skvq", 221),
    ],
)
def test_entries_of_a_page(name: str, num_entries: int) -> None:
    """By hand: a bf16 page of 32 entries, head size 64, has 8192 bytes; int4 takes 2 * (4 + 32) of them an entry."""
    assert CODECS[name].page_entries(32, ENTRY) == num_entries


def test_pages_that_cannot_hold_a_codec_are_refused() -> None:
    with pytest.raises(ValueError, match="block-size must be a multiple of 32; got 16"):
        CODECS["kivi2"].page_entries(16, ENTRY)
    with pytest.raises(ValueError, match="groups of equally many, 64 or fewer; got 75"):
        CODECS["int4"].page_entries(32, EntryShape(75, torch.bfloat16))
    with pytest.raises(ValueError, match="multiple of 32 channels; got 80"):
        CODECS["kivi4"].page_entries(32, EntryShape(80, torch.bfloat16))
    with pytest.raises(ValueError, match="must have room for more; 32 of head size 64 fit"):
        CODECS["fp8"].page_entries(32, EntryShape(64, torch.uint8))


@pytest.mark.parametrize(("head_dim", "groups"), [(32, 2), (64, 2), (128, 2), (256, 4)])
def test_measured_groups_are_those_of_each_entrys_head(head_dim: int, groups: int) -> None:
    """Three layers of four heads on two ranks: entries of any of them, in any order."""
    generator = torch.Generator().manual_seed(head_dim)
    orders = torch.rand(3, 4, 2, head_dim, generator=generator).argsort()
    clips = 0.5 + torch.rand(3, 4, 2, groups, generator=generator) / 2
    keys, values = entries(96, head_dim, torch.bfloat16, seed=9)
    entry = EntryShape(head_dim, torch.bfloat16)
    heads = torch.randint(6, (96,), generator=generator)
    for rank in (0, 1):
        measured = ChannelGroups.of_rank({"orders": orders.tolist(), "clips": clips.tolist()}, rank, 2)
        codec = SkvqCodec(measured).of_heads(heads)
        data = codec.encode(keys, values)
        assert list(data.shape) == [96, codec.num_bytes(entry)]
        for number, (got_key, got_value) in enumerate(zip(*codec.decode(data, entry), strict=True)):
            layer, head = divmod(int(heads[number]), 2)
            of_head = tuple(of[layer, 2 * rank + head].tolist() for of in (orders, clips))
            alone = keys[number : number + 1].float(), values[number : number + 1].float()
            want_key, want_value = stored("skvq", *alone, of_head)
            assert torch.equal(got_key, want_key[0]) and torch.equal(got_value, want_value[0])
    data = {"orders": orders.tolist(), "clips": clips.tolist()}
    for rank in range(8):  # two ranks hold the same head
        assert torch.equal(ChannelGroups.of_rank(data, rank, 8).orders, orders[:, rank // 2])


def test_five_numbers_of_three_levels_fill_a_byte() -> None:
    """By hand: extremes 0 and 3, 0 and 2 in both groups give steps of 1, so that codes are the numbers themselves."""
    key = torch.tensor([0, 3, 1, 2, 3, 3, 0, 0] * 2).float().unsqueeze(0)
    value = torch.tensor([0, 2, 1, 1, 0, 2, 2, 0] * 2).float().unsqueeze(0)
    data, entry = SkvqCodec().encode(key, value), EntryShape(16, torch.float32)
    metadata = torch.tensor([0.0, 0.0, 1.0, 1.0]).to(torch.float8_e4m3fn).view(torch.uint8).tolist()
    of_key = [0 + 3 * 4 + 1 * 16 + 2 * 64, 3 + 3 * 4] * 2
    digits = [int(n) for n in value[0]] + [0] * 4
    of_value = [sum(n * 3**i for i, n in enumerate(digits[at : at + 5])) for at in (0, 5, 10, 15)]
    assert data[0].tolist() == [*metadata, *of_key, *metadata, *of_value]
    assert SkvqCodec().num_bytes(entry) == 8 + 8
    for got, want in zip(SkvqCodec().decode(data, entry), (key, value), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("num_sink", "places"), [(0, 0), (1, 6), (5, 30), (31, 184)])
def test_places_that_exact_sinks_take(num_sink: int, places: int) -> None:
    """By hand: a sink of 256 bytes takes seven places of 37 bytes, one of them its own; bytes are not lost between."""
    assert CODECS["skvq"].sink_places(num_sink, ENTRY) == places
    assert CODECS["int4"].sink_places(num_sink, ENTRY) == 0


@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_codes_are_packed_from_the_lowest_bits(num_bits: int) -> None:
    """Whole numbers from 0 to the largest code have minimum 0 and step 1: their codes are themselves."""
    top = 2**num_bits - 1
    numbers = torch.tensor([0.0, top, 1, 2 % (top + 1), 3 % (top + 1), 0, top, 1])
    data = quantise(numbers, num_bits)
    assert len(data) == group_bytes(8, num_bits) == 4 + num_bits
    assert data[:4].view(torch.float16).tolist() == [0.0, 1.0]
    expected = sum(int(n) << (i * num_bits) for i, n in enumerate(numbers.tolist()))
    assert int.from_bytes(bytes(data[4:].tolist()), "little") == expected
    assert torch.equal(dequantise(data, num_bits), numbers)


@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_error_is_half_a_step(num_bits: int) -> None:
    numbers = torch.randn(500, 64, generator=torch.Generator().manual_seed(3)) * 30
    step = (numbers.amax(1) - numbers.amin(1)) / (2**num_bits - 1)
    error = (dequantise(quantise(numbers, num_bits), num_bits) - numbers).abs().amax(1)
    # Minimum and step are float16: 2^-11 of themselves, the step's error as often as the code is high.
    slack = (numbers.abs().amax(1) + step * 2**num_bits) * 2**-11
    assert bool((error <= step / 2 + slack).all())
    assert bool((error > step / 4).any()), "the bound would hold for codes twice as fine"


def test_four_more_bits_by_hand() -> None:
    """Extremes 0 and 240 make steps of 16, sixteenths of 1: whole numbers come back, but for a half step."""
    numbers = [0, 240, 5, 7, 8, 9, 24, 25, 0, 0, 0, 0, 0, 0, 0, 0]
    key, value = torch.tensor(numbers).float().view(16, 1).repeat(1, 8), torch.full((16, 32), 3.0)
    codec, entry = CODECS["int4x2"], EntryShape(32, torch.float32, channel_ratio=0.25)
    (data,) = codec.encode(key, value)
    assert data[:32].view(torch.float16).tolist() == [0.0] * 8 + [16.0] * 8, "of each channel of the key"
    assert data[32:96].view(torch.float16).tolist() == [3.0] * 16 + [0.0] * 16, "of each token's value"
    upper, lower = data[96:160:8].tolist(), data[416:480:8].tolist()
    assert [byte & 15 for byte in upper] + [byte >> 4 for byte in upper] == [0, 15, 0, 0, 0, 1, 2, 2] + [0] * 8
    assert [byte & 15 for byte in lower] + [byte >> 4 for byte in lower] == [8, 8, 13, 15, 15, 1, 0, 1] + [8] * 8
    got, of_value = codec.decode(data.unsqueeze(0), entry)
    assert got[:, 0].tolist() == [0, 240, 5, 7, 7, 9, 24, 25] + [0] * 8, "8 is half a step: seven sixteenths at most"
    assert torch.equal(of_value, value)


def test_bad_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="2, 4, 8 bits; got 3"):
        quantise(torch.zeros(8), 3)
    with pytest.raises(ValueError, match="fill whole bytes; got 3 codes of 4 bits"):
        quantise(torch.zeros(3), 4)
    with pytest.raises(ValueError, match="uint8"):
        dequantise(torch.zeros(8), 4)
    with pytest.raises(ValueError, match="impl='triton' needs tensors on a GPU"):
        quantise(torch.zeros(8), 4, impl="triton")
