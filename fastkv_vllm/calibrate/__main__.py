"""fastkv-vllm calibrate: measure once per model what methods need to know about it.

Each subcommand reads prompts (JSONL, see docs/calibration.md) and writes one artefact. The model is loaded with
transformers; no engine runs.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from fastkv_vllm.calibrate.commands import (
    calibrate_channels,
    calibrate_decays,
    calibrate_duo,
    calibrate_heads,
    calibrate_merging,
    calibrate_sharing,
    calibrate_tsp_layer,
)
from fastkv_vllm.calibrate.decays import Votes
from fastkv_vllm.calibrate.duo import DuoSettings
from fastkv_vllm.calibrate.errors import CalibrationError
from fastkv_vllm.calibrate.heads import CRITERIA
from fastkv_vllm.calibrate.merging import MergingSettings
from fastkv_vllm.calibrate.model import DTYPES
from fastkv_vllm.calibrate.sharing import SharingSettings
from fastkv_vllm.calibrate.tsp_layer import Propagation
from fastkv_vllm.codecs import MERGES, NO_CODEC, VECTOR_CODECS
from fastkv_vllm.kernels.window_scores import POOLINGS

T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; what a user can put right ends it with one sentence and status 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(argv)
    try:
        print(args.run(args, shlex.join(["fastkv-vllm", *argv])))
    except CalibrationError as error:
        args.parser.error(str(error))
    print(f"wrote {args.out}")


def build_parser() -> argparse.ArgumentParser:
    """Parser of the whole command; each subcommand sets `run` and `parser`."""
    parser = argparse.ArgumentParser(prog="fastkv-vllm", description="Tools of the vLLM plugin fastkv-vllm.")
    tools = parser.add_subparsers(required=True, metavar="TOOL")
    calibrate = tools.add_parser("calibrate", help="measure on a model what a method needs to know about it")
    kinds = calibrate.add_subparsers(required=True, metavar="WHAT")
    for name, text, run, add_arguments in (
        ("tsp-layer", "layer after which FastKV lets a part of the rows go on", calibrate_tsp_layer, _add_tsp_layer),
        ("heads", "importance of attention heads for retrieval (HeadKV)", calibrate_heads, _add_heads),
        ("duo", "which KV heads need the whole context (DuoAttention)", calibrate_duo, _add_duo),
        ("decays", "share of the rows that each layer hands on (PyramidInfer)", calibrate_decays, _add_decays),
        ("sharing", "layers that can read the entries of another (KVSharer)", calibrate_sharing, _add_sharing),
        (
            "channels",
            "which channels of a head are alike, and where their codes end (SKVQ)",
            calibrate_channels,
            _add_channels,
        ),
        ("merging", "what answers lose when layers are merged (MiniCache)", calibrate_merging, _add_merging),
    ):
        kind = kinds.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        kind.set_defaults(run=run, parser=kind)
        _add_common(kind)
        add_arguments(kind)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="checkpoint's directory, or a name in the local Hugging Face cache")
    add("--prompts", type=Path, required=True, metavar="JSONL", help="prompts, one JSON object a line")
    add("--num-prompts", type=_int_from(1), metavar="N", help="use the first N of them")
    add("--lengths", type=_lengths, metavar="MIN:MAX", help="use only prompts of so many tokens")
    add("--out", type=Path, required=True, metavar="FILE", help="artefact to write")
    add("--resume", action="store_true", help="go on from FILE.partial, which an interrupted run leaves")
    add("--save-every", type=_int_from(1), default=10, metavar="N", help="write FILE.partial every N prompts or steps")
    add("--dtype", choices=DTYPES, default="auto", help="of the computation; auto: as the weights are stored")
    add("--device", default="cpu", help="torch device")


def _add_tsp_layer(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, Propagation()
    add("--min-recall", type=_share, default=0.5, help="attention mass of each later layer to be covered")
    add("--percentile", type=_percentile, default=0.0, help="share of prompts, in percent, that may fall short of it")
    add("--queries", type=_int_from(1), metavar="N", help="last tokens whose attention counts; None: the window's")
    add("--tsp-ratio", type=_share, default=default.tsp_ratio, help="share of the rows that go on")
    add("--window-size", type=_int_from(1), default=default.window_size, help="last tokens that vote")
    add("--kernel-size", type=_odd, default=default.kernel_size, help="width of the pooling over positions")
    add("--pooling", choices=POOLINGS, default=default.pooling, help="pooling over positions")
    add("--tasks", type=Path, metavar="JSONL", help="prompts with answers to confirm the choice on")
    add("--plot", type=Path, metavar="FILE", help="draw the recall table (needs matplotlib)")


def _add_heads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--criterion",
        choices=CRITERIA,
        default="r2",
        help="r: the most attended token is the one written; r2: attention to the needle",
    )


def _add_duo(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, DuoSettings()
    add("--steps", dest="num_steps", type=_int_from(1), default=default.num_steps, help="prompts seen")
    add("--num-sink", type=_int_from(0), default=default.num_sink, help="first tokens a streaming head sees")
    add("--window-size", type=_int_from(1), default=default.window_size, help="recent tokens a streaming head sees")
    add("--penalty", type=_positive, default=default.penalty, help="weight of the mean gate in the loss")
    add("--learning-rate", type=_positive, default=default.learning_rate, help="of AdamW at its highest")
    add("--seed", type=int, default=default.seed, help="of the prompts' order")


def _add_decays(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, Votes()
    add("--min-recall", type=_share, default=0.9, help="attention mass of each later layer to be covered")
    add("--percentile", type=_percentile, default=0.0, help="share of prompts, in percent, that may fall short of it")
    add("--queries", type=_int_from(1), default=default.queries, help="last tokens whose attention counts")
    add("--recent-ratio", type=_share, default=default.recent_ratio, help="share of the prompt, its end, that votes")
    add("--num-sink", type=_int_from(0), default=default.num_sink, help="first tokens that always go on")


def _add_sharing(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, SharingSettings()
    add("--layers", dest="num_shared", type=_int_from(1), metavar="N", help="that read another's; None: a quarter")
    add("--threshold", type=_cosine, default=default.threshold, help="least cosine of the last hidden states")
    add("--tokens", dest="num_tokens", type=_int_from(1), default=default.num_tokens, help="first ones, compared")
    add("--queries", dest="num_queries", type=_int_from(1), default=default.num_queries, help="last ones, reading so")


def _add_merging(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, MergingSettings()
    add("--merge-layers", choices=MERGES, default=default.merge_layers, help="what of two layers is merged")
    add("--merge-t", type=_from_0_to_1, default=default.merge_t, help="weight of the upper layer's direction")
    add("--merge-gamma", type=_from_0_to_1, default=default.merge_gamma, help="share of distances not merged")
    add("--codec", choices=(NO_CODEC, *VECTOR_CODECS), default=default.codec, help="what entries are stored by as well")
    add("--first-layer", type=_int_from(0), metavar="N", help="pairs from this layer on; None: half of the layers")
    add("--queries", dest="num_queries", type=_int_from(1), default=default.num_queries, help="last ones, reading so")


def _add_channels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-sink", type=_int_from(0), default=5, help="first tokens, which are stored as they are")


def _int_from(low: int) -> Callable[[str], int]:
    return _checked(int, lambda value: value >= low, f"an integer, at least {low}")


def _checked(convert: Callable[[str], T], holds: Callable[[T], bool], rule: str) -> Callable[[str], T]:
    """Type of an argument that must be as `rule` says."""

    def checked(text: str) -> T:
        try:
            value = convert(text)
            fits = holds(value)
        except ValueError:
            fits = False
        if not fits:
            raise argparse.ArgumentTypeError(f"must be {rule}; got {text}")
        return value

    return checked


def _pair(text: str) -> tuple[int, int]:
    low, high = text.split(":")
    return int(low), int(high)


_odd = _checked(int, lambda value: value > 0 and value % 2 == 1, "odd and positive")
_share = _checked(float, lambda value: 0 < value <= 1, "in (0, 1]")
_from_0_to_1 = _checked(float, lambda value: 0 <= value <= 1, "in [0, 1]")
_percentile = _checked(float, lambda value: 0 <= value <= 100, "in 0..100")
_cosine = _checked(float, lambda value: -1 < value < 1, "in (-1, 1)")
_positive = _checked(float, lambda value: 0 < value < float("inf"), "positive")
_lengths = _checked(_pair, lambda pair: 0 < pair[0] <= pair[1], "MIN:MAX in tokens, such as 1000:8000")


if __name__ == "__main__":
    main()
