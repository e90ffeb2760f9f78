"""The operations of a prefill and of a decode step on one rank: FLOPs, bytes of memory, bytes over the link.

A product of [n, k] and [k, m] is 2 n k m FLOPs; causal attention over n rows reads n (n + 1) / 2 pairs. Bytes are the
least an ideal kernel moves: weights once, inputs and outputs of each product once, keys and values once.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from benchmarks.roofline.setting import Setting, Workload
from benchmarks.roofline.shapes import ModelShape

ACTIVATION_BYTES = 2
SCORE_BYTES = 4


class Kind(Enum):
    """What an operation's FLOPs run on; those that only move bytes have none."""

    LINEAR = "linear"
    LINEAR_FP8 = "linear_fp8"
    ATTENTION = "attention"


@dataclass(frozen=True)
class Operation:
    """Something a rank does `count` times, once after the other.

    Fields:
        name: its line in a breakdown.
        kind: which peak its FLOPs are held against.
        count: how often.
        flops: floating-point operations each time.
        memory_bytes: bytes read and written each time.
        link_bytes: bytes sent to other ranks each time.
    """

    name: str
    kind: Kind = Kind.LINEAR
    count: int = 1
    flops: float = 0.0
    memory_bytes: float = 0.0
    link_bytes: float = 0.0


def prefill_operations(shape: ModelShape, setting: Setting, workload: Workload) -> list[Operation]:
    """All operations from the prompt to the first token.

    Layers 0..T see n = N rows, later ones n = max(t N, what stays), the rest of the formulae is the same. Compressing
    adds scoring and moving in every layer, TSP adds the stash and at each cut the sum of the scores over ranks. What is
    read again passes all layers; only the last query looks for it, in one layer.
    """
    plan = setting.plan(workload.context)
    operations = []
    for rows, layers in setting.rows_of_layers(shape, workload.context).items():
        operations += _layer_operations(shape, workload.tensor_parallel, rows=rows * workload.batch, layers=layers)
        operations.append(_causal_attention(shape, setting, workload, rows=rows, layers=layers))
        if plan is not None and setting.scores and not setting.reads_again:
            operations.append(_scoring(shape, setting, workload, rows=rows, layers=layers, window=plan.num_voters))
    if plan is not None and setting.reads_again:  # entries are cached where they stay
        operations.append(_scoring(shape, setting, workload, rows=workload.context, layers=1, window=1))
        operations.append(_sum_of_scores(workload, workload.context))
    elif plan is not None:
        operations.append(_moving(shape, setting, workload, num_moved=plan.num_moved))
        operations += _propagation(shape, workload, [rows for _, rows in setting.cuts(shape, workload.context)])
    return [*operations, _output(shape, workload)]


def decode_operations(shape: ModelShape, setting: Setting, workload: Workload) -> list[Operation]:
    """One step that makes one token for each of b requests.

    Each layer reads its weights once and, of every request, the c entries that this layer holds:
    FLOPs = 4 Hq D c b, bytes = 2 H D kv_bytes c b.
    """
    heads, kv_heads = shape.heads_of_rank(workload.tensor_parallel)
    operations = _layer_operations(shape, workload.tensor_parallel, rows=workload.batch, layers=shape.num_layers)
    for entries, layers in Counter(setting.entries_of_layers(shape, workload)).items():
        numbers = 2 * kv_heads * shape.head_dim * entries * workload.batch
        flops = 4 * heads * shape.head_dim * entries * workload.batch
        operations.append(Operation("attention", Kind.ATTENTION, layers, flops, numbers * setting.kv_bytes))
    return [*operations, _output(shape, workload)]


def _layer_operations(shape: ModelShape, tensor_parallel: int, *, rows: int, layers: int) -> list[Operation]:
    """Matrix products and the two sums over ranks of each layer, for n rows.

    FLOPs = 2 w n for the layer's w weights; bytes = w weight_bytes + 2 n (4 h + 2 Hq D + 2 H D + 3 I), the inputs and
    outputs of the four products (query-key-value, output, gate-up, down).
    """
    heads, kv_heads = shape.heads_of_rank(tensor_parallel)
    weights = shape.layer_weights(tensor_parallel)
    numbers = 4 * shape.hidden_size + 2 * (heads + kv_heads) * shape.head_dim
    numbers += 3 * shape.intermediate_size // tensor_parallel
    moved = weights * shape.weight_bytes + rows * numbers * ACTIVATION_BYTES
    row_bytes = rows * shape.hidden_size * ACTIVATION_BYTES
    return [
        Operation("linear", _linear_kind(shape), layers, 2 * weights * rows, moved),
        _all_reduce("sums over ranks", row_bytes, tensor_parallel, count=2 * layers),
    ]


def _causal_attention(shape: ModelShape, setting: Setting, workload: Workload, *, rows: int, layers: int) -> Operation:
    """FLOPs = 4 Hq D n (n + 1) / 2; bytes = queries and output 2 n Hq D activations, 2 n H D cached numbers."""
    heads, kv_heads = shape.heads_of_rank(workload.tensor_parallel)
    flops = 2 * heads * shape.head_dim * rows * (rows + 1) * workload.batch
    moved = 2 * rows * shape.head_dim * (heads * ACTIVATION_BYTES + kv_heads * setting.kv_bytes) * workload.batch
    return Operation("attention", Kind.ATTENTION, layers, flops, moved)


def _scoring(
    shape: ModelShape, setting: Setting, workload: Workload, *, rows: int, layers: int, window: int
) -> Operation:
    """W G x n products per KV head: FLOPs = 2 W Hq D n; bytes = keys n H D kv_bytes, scores 4 n H written and read."""
    heads, kv_heads = shape.heads_of_rank(workload.tensor_parallel)
    flops = 2 * window * heads * shape.head_dim * rows * workload.batch
    per_row = kv_heads * (shape.head_dim * setting.kv_bytes + 2 * SCORE_BYTES)
    return Operation("scoring", Kind.ATTENTION, layers, flops, rows * per_row * workload.batch)


def _moving(shape: ModelShape, setting: Setting, workload: Workload, *, num_moved: int) -> Operation:
    """Kept keys and values are read and written once: 4 H D kv_bytes per entry and layer."""
    _, kv_heads = shape.heads_of_rank(workload.tensor_parallel)
    moved = 4 * kv_heads * shape.head_dim * setting.kv_bytes * num_moved * workload.batch
    return Operation("moving", count=shape.num_layers, memory_bytes=moved)


def _propagation(shape: ModelShape, workload: Workload, rows_after: Sequence[int]) -> list[Operation]:
    """The stash is written and read, the rows chosen at each cut too: 4 h (N + t N) bytes; at a cut that n rows reach
    4 n bytes of scores are summed.
    """
    if not rows_after:
        return []
    moved = 2 * (workload.context + sum(rows_after)) * shape.hidden_size * ACTIVATION_BYTES * workload.batch
    reached = [workload.context, *rows_after[:-1]]
    return [Operation("stash", memory_bytes=moved), *(_sum_of_scores(workload, rows) for rows in reached)]


def _sum_of_scores(workload: Workload, rows: int) -> Operation:
    return _all_reduce("sum of scores", rows * SCORE_BYTES * workload.batch, workload.tensor_parallel, count=1)


def _all_reduce(name: str, message_bytes: int, tensor_parallel: int, *, count: int) -> Operation:
    """A ring sends 2 (p - 1) / p of the message from each of p ranks; nothing for one rank."""
    sent = 2 * (tensor_parallel - 1) / tensor_parallel * message_bytes
    return Operation(name, count=count, link_bytes=sent)


def _output(shape: ModelShape, workload: Workload) -> Operation:
    """The output matrix for one row per request: FLOPs = 2 h V b, bytes = h V weight_bytes."""
    weights = shape.hidden_size * shape.vocab_size / workload.tensor_parallel
    return Operation("output", _linear_kind(shape), 1, 2 * weights * workload.batch, weights * shape.weight_bytes)


def _linear_kind(shape: ModelShape) -> Kind:
    return Kind.LINEAR_FP8 if shape.weight_bytes == 1 else Kind.LINEAR
