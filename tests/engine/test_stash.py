"""`max_tsp_tokens` bounds the rows that wait for their prompt's last chunk."""

import pytest

from tests.engine.oracle import make_prompts
from tests.engine.settings import TSP

ROW_BYTES = 128 * 4  # hidden size, float32
PROMPTS = make_prompts([700, 650, 90, 600, 500, 690, 120, 400])


@pytest.mark.parametrize("max_tsp_tokens", [768, 1300])
def test_the_stash_stays_within_its_bound(start, max_tsp_tokens):
    engine = start("fastkv", TSP | {"max_tsp_tokens": max_tsp_tokens}, max_model_len=768, max_num_seqs=8)
    engine.scheduler.scheduler_config.long_prefill_token_threshold = 40  # so that many prompts are amid prefill
    held, reported, waited = [], [], []

    def look(output):
        held.append(sum(rows.nbytes for rows in engine.compressor.cuts.stash.values()))
        reported.append(engine.totals.worker.stash_bytes)
        waited.append(len(engine.scheduler.running) < min(8, engine.scheduler.get_num_unfinished_requests()))

    with engine.step_tokens(320), engine.watch(after=look):
        engine.check(PROMPTS)
    assert 600 * ROW_BYTES < max(held) <= max_tsp_tokens * ROW_BYTES
    assert reported[1:] == held[1:], "the figure in the statistics is not what the worker holds"
    assert any(waited), "no prompt had to wait: the bound was not reached"
    assert engine.totals.worker.stash_bytes == 0


def test_without_a_tight_bound_more_is_stashed(start):
    """The load above does reach beyond its bounds."""
    engine = start("fastkv", TSP | {"max_tsp_tokens": 100_000}, max_model_len=768, max_num_seqs=8)
    engine.scheduler.scheduler_config.long_prefill_token_threshold = 40
    held = []
    with (
        engine.step_tokens(320),
        engine.watch(after=lambda _: held.append(sum(rows.nbytes for rows in engine.compressor.cuts.stash.values()))),
    ):
        engine.check(PROMPTS)
    assert max(held) > 2000 * ROW_BYTES
