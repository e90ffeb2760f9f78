"""A2SF: H2O whose old votes fade."""

from dataclasses import dataclass
from typing import ClassVar

from fastkv_vllm.methods.h2o import H2O
from fastkv_vllm.methods.registry import register


@register("a2sf")
@dataclass(frozen=True)
class A2SF(H2O):
    """Accumulated attention with a forgetting factor: a vote counts decay^age.

    Takes away the advantage of early entries, which more queries could see. `decay` 1 is H2O, towards 0 only the last
    query counts.

    Source: arXiv 2407.20485, section 3. Differences: as h2o's; the decay, 0.95, is that of the authors' later code
    (which value the paper's tables used we do not know).
    """

    source: ClassVar[str] = "arXiv 2407.20485, section 3"
    default_decay: ClassVar[float | None] = 0.95
