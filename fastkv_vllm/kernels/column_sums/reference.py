"""Torch definition of `column_sums`: specification, CPU path and oracle."""

import torch

# Probabilities per tile, 8 MiB (twice during the softmax). On one CPU core, 8K to 128K keys: 64 MiB takes about twice
# as long, and 4 MiB 2.5 times as long at 128K (few columns per product).
_TILE_SIZE = 2**21


def column_sums_reference(
    queries: torch.Tensor,
    keys: torch.Tensor,
    start: int,
    weights: torch.Tensor,
    first: int,
    lse: torch.Tensor | None,
) -> torch.Tensor:
    """See `column_sums`; arguments are taken as checked, `first` is the first row that counts."""
    num_queries, num_query_heads, head_dim = queries.shape
    num_kv_heads, num_keys, _ = keys.shape
    group = num_query_heads // num_kv_heads
    counts_all_alike = bool((weights == 1).all())
    weights = weights.repeat_interleave(group)  # [n * G]
    tile = max(1, _TILE_SIZE // max(1, group * num_keys))
    sums = torch.zeros(num_kv_heads, num_keys, dtype=torch.float32, device=keys.device)
    for head in range(num_kv_heads):
        k = keys[head].float()
        q = queries[:, head * group : (head + 1) * group].float().reshape(num_queries * group, head_dim)
        row_lse = None if lse is None else lse[:, head * group : (head + 1) * group].flatten()  # [n * G]
        for low in range(first, num_queries, tile):
            high = min(low + tile, num_queries)
            rows = slice(low * group, high * group)
            p = _probabilities(q[rows], k[: start + high], group, None if row_lse is None else row_lse[rows])
            if not counts_all_alike:
                p.mul_(weights[rows])
            sums[head, : start + high] += p.sum(dim=1)
    return sums


def _probabilities(q: torch.Tensor, k: torch.Tensor, group: int, lse: torch.Tensor | None) -> torch.Tensor:
    """Probabilities [N, R * G] of N keys for the last R of their rows, q [R * G, D], k [N, D], lse [R * G]."""
    # One line per key, and keys from the left: equal keys then get equal bits, so that ties stay ties. Sums over the
    # first dimension round the columns of a vector register's remainder differently, as a product with one column does.
    num_columns, num_keys = q.shape[0], k.shape[0]
    logits = torch.mm(k, q.expand(max(2, num_columns), -1).t())[:, :num_columns]
    num_rows = num_columns // group
    corner = torch.ones(num_rows, num_rows, dtype=torch.bool, device=k.device).tril(-1)  # [key, row]: key is later
    logits.unflatten(1, (num_rows, group))[num_keys - num_rows :].masked_fill_(corner.unsqueeze(2), float("-inf"))
    return logits.softmax(dim=0) if lse is None else (logits - lse).exp()
