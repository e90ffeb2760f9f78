"""KVSharer's search: distances by loops, the order of pairs, what is taken and what is not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastkv_vllm.calibrate.errors import CalibrationError
from fastkv_vllm.calibrate.model import CalibrationModel, causal_attention
from fastkv_vllm.calibrate.prompts import Prompt
from fastkv_vllm.calibrate.sharing import LayerDistances, SharingSearch, SharingSettings, pairs_to_try
from tests.reference import make_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CalibrationModel:
    """Four layers; what the attention of layer 2 finds is thrown away by its output projection."""
    directory: Path = make_checkpoint(tmp_path_factory.mktemp("model"), "llama", num_layers=4)
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.2.self_attn.o_proj.weight"][:] = 0.0
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return CalibrationModel(directory)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    rows = torch.randint(3, 500, (3, 43), generator=torch.Generator().manual_seed(3)).tolist()
    return [Prompt(tuple(row[:n]), tuple(row[40:]), None, range(0)) for row, n in zip(rows, (40, 33, 21), strict=True)]


def search(model: CalibrationModel, prompts: list[Prompt], pairs: list[tuple[int, int]], **settings) -> SharingSearch:
    work = SharingSearch(model, prompts, pairs, SharingSettings(**settings))
    for index in range(len(pairs)):
        work.step(index)
    return work


def test_distances_are_those_of_mean_entries(model, prompts):
    """The first 16 tokens of each prompt; a shorter prompt shortens all."""
    entries = []
    for prompt in prompts:
        of_layers = []

        def attend(layer, queries, keys, values, found=of_layers):
            found.append((keys, values))
            return causal_attention(queries, keys, values)

        model.prefill(prompt.token_ids[:16], attend)
        entries.append(of_layers)
    expected = torch.zeros(4, 4)
    for i in range(4):
        for j in range(4):
            means = [
                [sum(prompt[layer][half] for prompt in entries) / 3 for half in range(2)] for layer in (i, j)
            ]  # [layer][keys or values], [H, n, D]
            rows = [
                (means[0][half][head, n] - means[1][half][head, n]).norm()
                for half in range(2)
                for head in range(2)
                for n in range(16)
            ]
            expected[i, j] = sum(rows) / len(rows)
    work = LayerDistances(model, prompts, 16)
    for index in range(3):
        work.step(index)
    torch.testing.assert_close(work.distances(), expected)
    assert LayerDistances(model, prompts, 64)._num_tokens == 21


def test_the_most_dissimilar_pairs_come_first():
    distances = torch.tensor([[0.0, 3.0, 1.0], [3.0, 0.0, 2.0], [1.0, 2.0, 0.0]])
    assert pairs_to_try(distances) == [(1, 0), (2, 1), (2, 0)]


def test_a_layer_that_nothing_hangs_on_may_read_anything(model, prompts):
    """And one that something hangs on may not, if hidden states must be alike."""
    pairs = [(3, 0), (1, 0), (2, 1)]
    work = search(model, prompts, pairs, num_shared=1, threshold=0.99999)
    assert work.found() == [0, 1, 1, 3]
    assert work.similarity == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(CalibrationError, match="2 layers must find an owner; 1 did with a cosine above"):
        search(model, prompts, pairs, num_shared=2, threshold=0.99999).found()


def test_only_the_last_tokens_read_shared_entries(model, prompts):
    """With as many queries as there are tokens the whole prompt does, as in the paper."""
    one, few, whole = (search(model, prompts, [(3, 0)], threshold=-0.999, num_queries=n) for n in (1, 8, 1000))
    assert one.owners == few.owners == whole.owners == {3: 0}
    assert len({round(work.similarity, 6) for work in (one, few, whole)}) == 3
    before, after = (whole._hidden(prompts[0], owners) for owners in ({}, {3: 0}))
    assert before.shape[0] == 43, "the answer's tokens count"
    assert torch.equal(before[0], after[0]) is False, "the first token has another value, too"


def test_an_owner_that_follows_takes_its_followers_along(model, prompts):
    pairs = [(3, 2), (2, 1), (3, 0), (1, 0)]
    work = search(model, prompts, pairs, num_shared=2, threshold=-0.999)
    assert work.found() == [0, 1, 1, 1], "two layers share: the search ends"
    assert search(model, prompts, pairs, num_shared=3, threshold=-0.999).found() == [0, 0, 0, 0]
    assert search(model, prompts, [(1, 0), (2, 1)], num_shared=2, threshold=-0.999).found() == [0, 0, 0, 3]
