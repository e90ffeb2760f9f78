"""The halting rule: a layer keeps no more pages than the last query's attention needs."""

import torch


def last_attention(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Attention of the prompt's last query to all entries of a layer, softmax in float32.

    Args:
        query: roped and scaled, [Hq, D], any float dtype.
        keys: roped, [H, N, D], Hq a multiple of H.

    Returns:
        [H, Hq // H, N] float32.
    """
    logits = keys.float() @ query.float().view(keys.shape[0], -1, keys.shape[2]).transpose(1, 2)
    return logits.transpose(1, 2).softmax(dim=-1)


def kept_norms(scores: torch.Tensor, attention: torch.Tensor, block_size: int) -> torch.Tensor:
    """How much of the attention stays with so many pages: ||a restricted to kept||_2, added over query heads.

    Args:
        scores: of the entries before the tail, [H or 1, n] float32, forced ones at +inf; the best stay.
        attention: `last_attention`, [H, G, N]; its last N - n columns are the tail's, which always stays.
        block_size: entries of a page.

    Returns:
        [n // block_size + 1] float32: of 1, 2, .. pages for each head, and of all N entries. Of some heads of a layer
        only; those of the others add to it.
    """
    num_rated = scores.shape[1]
    order = scores.sort(descending=True, stable=True).indices.unsqueeze(1)
    squares = attention.double().square()
    kept = squares[..., :num_rated].gather(2, order.expand(*squares.shape[:2], -1)).cumsum(dim=2)
    kept = kept[..., block_size - 1 :: block_size] + squares[..., num_rated:].sum(dim=2, keepdim=True)
    norms = torch.cat([kept, squares.sum(dim=2, keepdim=True)], dim=2).sqrt()
    return norms.sum(dim=(0, 1)).float()


def halting_pages(norms: torch.Tensor, loss: float, least: int) -> int:
    """Fewest pages, `least` or more, with (full - kept) / full <= loss; all of them where even those lose more.

    Dropping entries one by one as long as the loss allows and rounding up to whole pages gives the same.

    Args:
        norms: `kept_norms` of all heads.
        loss: share of the norm that may go.
        least: pages any layer keeps.
    """
    kept, full = norms[:-1], norms[-1]
    too_few = int((full - kept > loss * full).sum())
    return max(min(too_few + 1, len(kept)), least)
