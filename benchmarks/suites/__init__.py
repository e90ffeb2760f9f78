"""Quality suites by the word that names them on the command line."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.suites.base import Suite, SuiteDataError
from benchmarks.suites.infinitebench import InfiniteBench
from benchmarks.suites.longbench import LongBench, LongBenchV2
from benchmarks.suites.needle import NeedleGrid
from benchmarks.suites.ruler import Ruler
from benchmarks.suites.scbench import SCBench
from benchmarks.suites.tiny import TinySuite

SUITES: dict[str, type[Suite]] = {
    suite.name: suite for suite in (TinySuite, Ruler, NeedleGrid, LongBench, LongBenchV2, SCBench, InfiniteBench)
}
_MAKE: dict[type[Suite], Callable[[Any, tuple[int, ...], Path | None], Suite]] = {
    TinySuite: lambda tokenizer, lengths, data: TinySuite(lengths),
    Ruler: Ruler,
    NeedleGrid: NeedleGrid,
}


def make_suite(name: str, tokenizer: Any, lengths: Sequence[int], data: Path | None) -> Suite:
    """The suite of that name.

    Args:
        tokenizer: of the model, for suites that make prompts of a length.
        lengths: prompt lengths in tokens, for the same.
        data: directory of the suite's files; those that read published data need one.

    Raises:
        SuiteDataError: the suite reads published data and no directory was given.
    """
    suite = SUITES[name]
    if suite in _MAKE:
        return _MAKE[suite](tokenizer, tuple(lengths), data)
    if data is None:
        raise SuiteDataError(
            f"{name} reads published data ({suite.source}); give the directory of its files with --data"
        )
    return suite(data=data)  # type: ignore[call-arg]


__all__ = ["SUITES", "Suite", "SuiteDataError", "make_suite"]
