"""The conservation law of the block pool: lawful pools pass, each planted violation is named."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkv_vllm.cache import check_integrity

Pool = dict[str, Any]


@st.composite
def lawful_pools(draw: st.DrawFn) -> Pool:
    """Requests with random tables that share blocks, null blocks anywhere, hashes on what is not private."""
    num_blocks = draw(st.integers(1, 30))
    null = draw(st.integers(0, num_blocks - 1))
    ids = [block for block in range(num_blocks) if block != null]
    tables = {}
    for request in range(draw(st.integers(0, 4))):
        table = draw(st.lists(st.sampled_from(ids), unique=True)) if ids else []
        for _ in range(draw(st.integers(0, 3))):
            table.insert(draw(st.integers(0, len(table))), null)
        tables[f"r{request}"] = table
    owners = Counter(block for table in tables.values() for block in table if block != null)
    alone = {name: [b for b in table if owners[b] == 1] for name, table in tables.items()}
    private = {name: blocks for name, blocks in alone.items() if blocks and draw(st.booleans())}
    taken = {block for blocks in private.values() for block in blocks}
    return {
        "num_blocks": num_blocks,
        "null_block": null,
        "free": draw(st.permutations([block for block in ids if block not in owners])),
        "ref_counts": {block: owners[block] for block in ids},
        "tables": tables,
        "hashed": [block for block in ids if block not in taken and draw(st.booleans())],
        "private": private,
    }


def small_pool() -> Pool:
    """Eight blocks: a holds 1 2 3 (2 shared with b), b holds 2 4, 5 6 7 are free, 5 is cached, 3 is compressed."""
    return {
        "num_blocks": 8,
        "null_block": 0,
        "free": [6, 5, 7],
        "ref_counts": {1: 1, 2: 2, 3: 1, 4: 1, 5: 0, 6: 0, 7: 0},
        "tables": {"a": [0, 1, 2, 0, 3], "b": [2, 4]},
        "hashed": [1, 2, 5],
        "private": {"a": [3]},
    }


def lose_a_free_block(pool: Pool) -> None:
    pool["free"].remove(5)


def lose_a_held_block(pool: Pool) -> None:
    pool["tables"]["b"].remove(4)
    pool["ref_counts"][4] = 0


def hold_a_block_twice(pool: Pool) -> None:
    pool["tables"]["a"].append(1)
    pool["ref_counts"][1] = 2


def hold_a_free_block(pool: Pool) -> None:
    pool["tables"]["b"].append(6)
    pool["ref_counts"][6] = 1


def free_a_held_block(pool: Pool) -> None:
    pool["free"].append(4)


def free_a_block_twice(pool: Pool) -> None:
    pool["free"].append(7)


def free_the_null_block(pool: Pool) -> None:
    pool["free"].append(0)


def count_too_many(pool: Pool) -> None:
    pool["ref_counts"][4] = 2


def count_too_few(pool: Pool) -> None:
    pool["ref_counts"][2] = 1


def count_a_free_block(pool: Pool) -> None:
    pool["ref_counts"][6] = 1


def hash_a_private_block(pool: Pool) -> None:
    pool["hashed"].append(3)


def share_a_private_block(pool: Pool) -> None:
    pool["tables"]["b"].append(3)
    pool["ref_counts"][3] = 2


def free_a_private_block(pool: Pool) -> None:
    pool["private"]["a"].append(6)


def hold_a_block_outside_the_pool(pool: Pool) -> None:
    pool["tables"]["b"] = [2, 8]  # 8 stands in for 4, which is lost
    pool["ref_counts"][4] = 0


VIOLATIONS = [
    (lose_a_free_block, r"free 2 \+ held 4 != total 7: lost \[5\]"),
    (lose_a_held_block, r"free 3 \+ held 3 != total 7: lost \[4\]"),
    (hold_a_block_twice, r"table of a holds a block twice: \[1, 2, 3, 1\]"),
    (hold_a_free_block, r"blocks both free and held: \[6\]"),
    (free_a_held_block, r"blocks both free and held: \[4\]"),
    (free_a_block_twice, "free queue holds a block twice"),
    (free_the_null_block, "null block is in the free queue"),
    (count_too_many, r"reference counts .*\{4: \(2, 1\)\}"),
    (count_too_few, r"reference counts .*\{2: \(1, 2\)\}"),
    (count_a_free_block, r"reference counts .*\{6: \(1, 0\)\}"),
    (hash_a_private_block, r"compressed blocks of a are hashed or shared: \[3\]"),
    (share_a_private_block, r"compressed blocks of a are hashed or shared: \[3\]"),
    (free_a_private_block, r"compressed blocks of a are hashed or shared: \[6\]"),
    (hold_a_block_outside_the_pool, r"\b(4|8)\b"),
]


@given(lawful_pools())
@settings(max_examples=400, derandomize=True, deadline=None)
def test_lawful_pools_pass(pool: Pool) -> None:
    check_integrity(**pool)


def test_the_pool_the_violations_start_from_is_lawful() -> None:
    check_integrity(**small_pool())


@pytest.mark.parametrize(("plant", "words"), VIOLATIONS, ids=[plant.__name__ for plant, _ in VIOLATIONS])
def test_a_violation_is_named(plant: Callable[[Pool], None], words: str) -> None:
    pool = small_pool()
    plant(pool)
    with pytest.raises(RuntimeError, match=f"^block pool integrity: .*{words}"):
        check_integrity(**pool)


@given(lawful_pools(), st.data())
@settings(max_examples=300, derandomize=True, deadline=None)
def test_any_lost_block_is_found(pool: Pool, data: st.DataObject) -> None:
    """Whichever free block vanishes, the message names it."""
    if not pool["free"]:
        return
    lost = data.draw(st.sampled_from(pool["free"]))
    pool["free"] = [block for block in pool["free"] if block != lost]
    with pytest.raises(RuntimeError, match=rf"lost \[{lost}\]"):
        check_integrity(**pool)
