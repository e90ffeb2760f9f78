"""VL-Cache: what is asked after the image decides, and layers share by how much they look at."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fastkv_vllm.kernels.column_sums import column_sums
from fastkv_vllm.methods.base import Method
from fastkv_vllm.methods.density import DENSITY
from fastkv_vllm.methods.registry import register


@register("vl_cache")
@dataclass(frozen=True)
class VLCache(Method):
    """The tokens after the last image vote, their attention summed; layers get budgets by density, see `density`.

    Entries of images and of text compete. In a prompt without an image the last `window_size` tokens vote.

    Source: arXiv 2410.23317, section 4. Differences: at most 50 tokens vote, as in the paper's speed tests (the queries
    of voters wait for the last chunk); entries are chosen per KV head (whether the paper chooses per head or once for a
    layer cannot be told from it), the sums of a group added; the recent tokens are a tenth of the mean budget in each
    layer, not of the layer's own; budgets are whole pages that add up to the even budget exactly, and no layer has less
    than a page. Generated tokens stay, unless `evict_while_decoding` says otherwise.
    """

    source: ClassVar[str] = "arXiv 2410.23317, section 4"
    needs: ClassVar[tuple[str, ...]] = ("queries", "keys")
    most_voters_after_image: ClassVar[int] = 50
    default_recent_share: ClassVar[float] = 0.1
    layer_budgets: ClassVar[str] = DENSITY

    def score(self, *, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        num_voters = queries.shape[0]
        weights = torch.ones(num_voters, device=queries.device)
        return column_sums(queries, keys, start=keys.shape[1] - num_voters, weights=weights)
