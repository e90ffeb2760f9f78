"""How layers and heads share a budget: the rules of `Drop`, slowly."""

from collections.abc import Sequence

from torch import Tensor

from tests.reference.selection import Drop, select_positions


def hand_out(wanted: Sequence[float], total: int, low: Sequence[int], high: Sequence[int]) -> list[int]:
    """Pages of each: all begin with `low`, then each next page goes to whom most is missing, the first of equals."""
    pages = list(low)
    while sum(pages) < total:
        missing = [w - n if n < most else float("-inf") for w, n, most in zip(wanted, pages, high, strict=True)]
        pages[missing.index(max(missing))] += 1
    return pages


def kept_counts(
    drop: Drop,
    scores: Sequence[Tensor],
    positions: Sequence[Tensor],
    num_tokens: int,
    densities: Sequence[float] = (),
) -> list[list[int]]:
    """Entries that stay of each layer and head, tail included, [L][H].

    Args:
        drop: the budget and its rules.
        scores: of each layer, [H, n or n - window_size].
        positions: of the rows each layer saw, [n].
        num_tokens: tokens of the prompt.
        densities: of each layer, where layers share by them.
    """
    num_layers, num_heads = len(scores), scores[0].shape[0]
    if drop.block_size is None:
        return [[drop.num_kept] * num_heads] * num_layers
    size, tail = drop.block_size, drop.tail(num_tokens)
    mean = (drop.num_kept - tail) // size
    forced = drop.num_forced(num_tokens - tail)
    least = (forced + 1 + size - 1) // size
    most = [(len(seen) - tail) // size for seen in positions]
    if drop.head_budgets in ("importance", "retrieval"):
        return measured_counts(drop, num_tokens, most)
    layer_pages = [mean] * num_layers
    if drop.layer_budgets == "pyramid":
        wanted = [(n - tail) / size for n in pyramid(drop, num_layers, num_tokens)]
        layer_pages = hand_out(wanted, mean * num_layers, [least] * num_layers, most)
    if drop.layer_budgets == "density":
        wanted = by_density(drop, densities, num_tokens, tail)
        layer_pages = hand_out(wanted, mean * num_layers, [least] * num_layers, most)
    if drop.layer_budgets in ("handed-on", "seen"):
        cuts, rows = dict(drop.cuts), [len(seen) for seen in positions]
        if drop.layer_budgets == "handed-on":
            rows = [cuts.get(layer, number) for layer, number in enumerate(rows)]
        layer_pages = [(number - tail) // size for number in rows]
    counts = []
    for layer in range(num_layers):
        pages = [layer_pages[layer]] * num_heads
        if drop.head_budgets == "adaptive":
            shares = best_by_head(drop, scores[layer], positions[layer].tolist(), sum(pages) * size, num_tokens - tail)
            even = layer_pages[layer] * size
            wanted = [((1 - drop.head_floor) * share + drop.head_floor * even) / size for share in shares]
            pages = hand_out(wanted, sum(pages), [least] * num_heads, [most[layer]] * num_heads)
        counts.append([n * size + tail for n in pages])
    return counts


def measured_counts(drop: Drop, num_tokens: int, most: Sequence[int]) -> list[list[int]]:
    """`kept_counts` where heads share by what was measured of them; `most` pages of each layer's heads."""
    size, tail = drop.block_size, num_tokens % drop.block_size
    num_layers, num_heads = len(drop.head_weights), len(drop.head_weights[0])
    by_weights = {"importance": by_importance, "retrieval": by_retrieval}[drop.head_budgets]
    wanted = by_weights(drop, num_tokens, tail)
    total = (drop.num_kept - tail) // size * num_layers * num_heads
    least = (drop.num_forced(num_tokens - tail) + 1 + size - 1) // size
    bounds = [n for n in most for _ in range(num_heads)]
    given = hand_out([n / size for n in wanted], total, [least] * len(wanted), bounds)
    return [[n * size + tail for n in given[i * num_heads :][:num_heads]] for i in range(num_layers)]


def halt(
    drop: Drop,
    counts: Sequence[Sequence[int]],
    scores: Sequence[Tensor],
    positions: Sequence[Tensor],
    attention: Sequence[Tensor],
    num_tokens: int,
) -> list[list[int]]:
    """DBudgetKV's rule, arXiv 2502.16886: entries that stay of each layer and head where it asks for fewer, [L][H].

    Args:
        drop: the rule and the forced entries.
        counts: entries that stay without the rule, tail included, [L][H].
        scores, positions, num_tokens: see `kept_counts`.
        attention: of the last query in each layer, [Hq, n].
    """
    tail = drop.tail(num_tokens)
    forced = drop.num_forced(num_tokens - tail)
    halted = []
    for row, *layer in zip(counts, scores, positions, attention, strict=True):
        losses = losses_by_count(drop, *layer, num_tokens - tail)
        length = len(losses) - 1
        while length > forced + 1 and losses[length - 1] <= drop.halting_loss:
            length -= 1
        pages = (length + drop.block_size - 1) // drop.block_size
        halted.append([min(count, pages * drop.block_size + tail) for count in row])
    return halted


def losses_by_count(drop: Drop, scores: Tensor, positions: Tensor, attention: Tensor, tail_from: int) -> list[float]:
    """What a layer loses of the norm of its last query's attention, by how many entries before the tail stay.

    Entries go one at a time in each head, the lowest score first, of equals the last; the norm is a mean over query
    heads. All float64.
    """
    group_size = attention.shape[0] // scores.shape[0]
    norms = []
    for head, row in enumerate(attention.double().tolist()):
        ranked, squares = [], 0.0
        for i, position in enumerate(positions.tolist()):
            if position >= tail_from:
                squares += row[i] ** 2
            elif drop.is_forced(position):
                ranked.append((float("-inf"), position, row[i]))
            else:
                ranked.append((-float(scores[head // group_size, i]), position, row[i]))
        kept = [squares]
        for _, _, weight in sorted(ranked):
            squares += weight**2
            kept.append(squares)
        norms.append([n**0.5 for n in kept])
    means = [sum(column) / len(norms) for column in zip(*norms, strict=True)]
    return [(means[-1] - mean) / means[-1] for mean in means]


def recalls_by_pages(
    drop: Drop, scores: Sequence[Tensor], positions: Sequence[Tensor], attention: Sequence[Tensor]
) -> list[float]:
    """Share of the attention that kept entries got, from num_planned entries of each head on, a page more each time.

    Up to num_kept entries; the mean over layers and KV heads. All float64.

    Args:
        drop: what stays.
        scores, positions: see `kept_counts`.
        attention: that each entry got from the voters in each layer, [H, n].
    """
    recalls = []
    for count in range(drop.num_planned, drop.num_kept + 1, drop.block_size):
        shares = []
        for *layer, seen in zip(scores, attention, positions, strict=True):
            for rating, votes in zip(*(of.tolist() for of in layer), strict=True):
                given = dict(zip(seen.tolist(), votes, strict=True))
                kept = select_positions(rating, seen.tolist(), count, drop)
                shares.append(sum(given[p] for p in kept) / sum(votes))
        recalls.append(sum(shares) / len(shares))
    return recalls


def guard(drop: Drop, recalls: Sequence[float]) -> int:
    """Entries of each layer and head that stay: the fewest whose recall is enough, or all that may."""
    enough = [number for number, recall in enumerate(recalls) if recall >= drop.min_recall]
    return drop.num_planned + (enough[0] if enough else len(recalls) - 1) * drop.block_size


def pyramid(drop: Drop, num_layers: int, num_tokens: int) -> list[float]:
    """PyramidKV's budgets, entries of each layer with the window: arXiv 2406.02069, section 3.2."""
    even = drop.num_kept - drop.window_size
    least = even / drop.pyramid_beta
    first = min(2 * even - least, num_tokens - drop.window_size)
    last = 2 * even - first
    return [first - layer * (first - last) / (num_layers - 1) + drop.window_size for layer in range(num_layers)]


def by_density(drop: Drop, densities: Sequence[float], num_tokens: int, tail: int) -> list[float]:
    """VL-Cache's budgets, pages of each layer before the tail: arXiv 2410.23317, section 4.2."""
    ratio = drop.num_kept / num_tokens
    shares = [value / sum(densities) * ratio * len(densities) for value in densities]
    return [(min(1.0, max(0.01, share)) * num_tokens - tail) / drop.block_size for share in shares]


def best_by_head(drop: Drop, scores: Tensor, positions: Sequence[int], count: int, tail_from: int) -> list[int]:
    """AdaKV: how many of a layer's `count` best entries before the tail are each head's."""
    entries = []
    for head, row in enumerate(scores.tolist()):
        for i, position in enumerate(positions):
            if position < tail_from:
                score = float("inf") if drop.is_forced(position) else row[i]
                entries.append((-score, head, position))
    best = sorted(entries)[:count]
    return [sum(head == h for _, head, _ in best) for h in range(scores.shape[0])]


def by_importance(drop: Drop, num_tokens: int, tail: int) -> list[float]:
    """HeadKV's budgets, entries of each layer and head before the tail, [L * H]: arXiv 2410.19258, section 3."""
    weights = [weight for layer in drop.head_weights for weight in layer]
    even = drop.num_kept - drop.window_size
    pool = len(weights) * even / drop.head_beta
    floor = even - even / drop.head_beta
    return [weight / sum(weights) * pool + floor + drop.window_size - tail for weight in weights]


def by_retrieval(drop: Drop, num_tokens: int, tail: int) -> list[float]:
    """DuoAttention's two classes, entries of each layer and head before the tail, [L * H]: best heads keep all."""
    weights = [weight for layer in drop.head_weights for weight in layer]
    streaming = min(drop.streaming_tokens, drop.num_kept)
    entries = [streaming] * len(weights)
    for head in sorted(range(len(weights)), key=lambda head: -weights[head]):
        while entries[head] < num_tokens and sum(entries) < drop.num_kept * len(weights):
            entries[head] += 1
    return [n - tail for n in entries]
