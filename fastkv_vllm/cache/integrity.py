"""The conservation law of the block pool."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence


def check_integrity(
    *,
    num_blocks: int,
    null_block: int,
    free: Sequence[int],
    ref_counts: Mapping[int, int],
    tables: Mapping[str, Sequence[int]],
    hashed: Iterable[int],
    private: Mapping[str, Sequence[int]],
) -> None:
    """Check that no block is lost, held twice or shared against the rules.

    free + held = total without the null block (cached blocks without an owner are free); the reference count of a
    block is the number of tables that hold it; a block stands once in a table; a compressed block is never hashed
    and never shared.

    Args:
        num_blocks: blocks of the pool, null block included.
        null_block: id of the null block; it may stand anywhere, any number of times.
        free: ids in the free queue.
        ref_counts: id -> references, of all blocks but the null block.
        tables: request -> block ids.
        hashed: ids with a prefix hash.
        private: request -> ids that hold its compressed pages.

    Raises:
        RuntimeError: with both sides of the law that is broken.
    """
    held: Counter[int] = Counter()
    for request_id, table in tables.items():
        blocks = [b for b in table if b != null_block]
        _require(len(blocks) == len(set(blocks)), f"table of {request_id} holds a block twice: {blocks}")
        held.update(blocks)
    _require(len(free) == len(set(free)), "the free queue holds a block twice")
    _require(null_block not in free, "the null block is in the free queue")
    both = sorted(set(free) & set(held))
    _require(not both, f"blocks both free and held: {both}")
    everyone = set(range(num_blocks)) - {null_block}
    known = set(free) | set(held)
    _require(
        known == everyone,
        f"free {len(free)} + held {len(held)} != total {len(everyone)}: lost {sorted(everyone - known)}, "
        f"unknown {sorted(known - everyone)}",
    )
    wrong = {b: (count, held[b]) for b, count in ref_counts.items() if count != held[b]}
    _require(not wrong, f"reference counts differ from owners, block: (count, owners) = {wrong}")
    hashed_blocks = set(hashed)
    for request_id, own in private.items():
        bad = [b for b in own if b in hashed_blocks or held[b] != 1 or b not in tables[request_id]]
        _require(not bad, f"compressed blocks of {request_id} are hashed or shared: {bad}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"block pool integrity: {message}")
