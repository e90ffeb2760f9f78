"""What compression would do to latency and room on hardware you do not have: a roofline, so predictions only.

python -m benchmarks.model [--model llama-3.1-8b] [--device h100] [--context 8192,32768,131072,1048576]
    [--methods plain,snapkv,fastkv,fp8] [--retention 0.1] [--tsp-ratio 0.2] [--tsp-layer N] [--tp 1] [--batch 1]
    [--block-size 16] [--json FILE] [--compare]

Every operation takes max(FLOPs / reached FLOP/s, bytes / reached bytes/s); a prefill or a decode step is their sum.
The formulae stand in the docstrings of `benchmarks.roofline`. The last line is JSON.

Left out: kernel launches, scheduling, sampling and other host work; the latency of collectives; embedding, norms,
rotary embedding and activation functions; kernels that reach less than the shares of peak assumed (small batches and
short rows do); weights and keys read again by each chunk of a long prompt; the top-k of the scores; steps that run
uncompiled (those of TSP do). Decode at batch 1, scoring and moving are therefore predicted much too fast; a prefill is
as good as the assumed shares of peak. `--compare` prints how far off it is where figures exist.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.roofline import (
    DEVICES,
    MODELS,
    Comparison,
    Device,
    ModelShape,
    Prediction,
    Setting,
    Workload,
    block_bytes,
    compare_measured,
    compare_published,
    predict,
    setting_of,
)
from benchmarks.table import format_table

RESULTS = Path(__file__).parent / "results"
FAR_OFF = 0.25
LEFT_OUT = (
    "Predictions of a roofline, not measurements: launches, scheduling, latency of collectives, small operations and "
    "kernels below the assumed share of peak are left out."
)


def load_shape(name: str) -> ModelShape:
    """A model of `MODELS`, or the one a config.json describes.

    Raises:
        ValueError: neither.
    """
    if name in MODELS:
        return MODELS[name]
    if not Path(name).is_file():
        raise ValueError(f"--model must be one of {', '.join(MODELS)} or a config.json; got {name}")
    return ModelShape.from_config(json.loads(Path(name).read_text()))


def predict_all(
    shape: ModelShape, device: Device, settings: Sequence[Setting], workloads: Sequence[Workload]
) -> dict[int, dict[str, Prediction]]:
    """Predictions by context and setting."""
    return {w.context: {s.name: predict(shape, device, s, w) for s in settings} for w in workloads}


def prediction_table(predictions: dict[int, dict[str, Prediction]], block_bytes_of: dict[str, int]) -> str:
    """One row per context and setting; ratios are those of the first setting to this one: above 1 is faster."""
    header = [
        "context",
        "",
        "TTFT s",
        "ratio",
        "TPOT ms",
        "ratio",
        "cache GB a rank",
        "longest prompt",
        "fit, prompts done",
        "fit, one in prefill",
    ]
    rows = []
    for context, by_name in predictions.items():
        first = next(iter(by_name.values()))
        for name, p in by_name.items():
            ttft, tpot = f"{p.ttft_s:#.3g}" if p.ttft_s < 100 else f"{p.ttft_s:.0f}", f"{p.tpot_s * 1e3:.2f}"
            ratios = f"{first.ttft_s / p.ttft_s:.2f}", f"{first.tpot_s / p.tpot_s:.2f}"
            cache = f"{p.room.blocks_steady * block_bytes_of[name] / 1e9:.2f}"
            fit = [str(p.room.longest_prompt), str(p.room.requests_steady), str(p.room.requests_peak)]
            rows.append([str(context), name, ttft, ratios[0], tpot, ratios[1], cache, *fit])
    return format_table(header, rows)


def comparison_table(rows: Sequence[Comparison], actual: str) -> str:
    """Prediction, figure and error; "far" marks errors over 25 %, "fitted" what constants were taken from."""
    cells = []
    for row in rows:
        remark = "fitted" if row.calibrated else "far" if abs(row.error) > FAR_OFF else ""
        cells.append([row.what, f"{row.predicted:.4g}", f"{row.actual:.4g}", f"{row.error:+.0%}", remark])
    return format_table(["", "predicted", actual, "error", f"over {FAR_OFF:.0%}"], cells)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b", help=f"{', '.join(MODELS)} or a config.json")
    parser.add_argument("--device", default="h100", choices=DEVICES)
    parser.add_argument("--context", default="8192,32768,131072,1048576", help="prompt tokens, comma-separated")
    parser.add_argument("--methods", default="plain,snapkv,fastkv,fp8", help="the first one is what ratios refer to")
    parser.add_argument("--retention", type=float, default=0.1, help="retention_ratio")
    parser.add_argument("--tsp-ratio", type=float, default=0.2)
    parser.add_argument("--tsp-layer", type=int, help="default: num_layers // 2 - 1")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks, of one node")
    parser.add_argument("--batch", type=int, default=1, help="prompts prefilled together, requests decoded together")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--json", type=Path, help="file for the JSON line, too")
    parser.add_argument("--compare", action="store_true", help="only predictions beside figures that exist")
    args = parser.parse_args()
    report = _compare() if args.compare else _predict(args)
    print(f"\n{LEFT_OUT}")
    line = json.dumps(report)
    print(f"\n{line}")
    if args.json is not None:
        args.json.write_text(f"{line}\n")


def _predict(args: argparse.Namespace) -> dict[str, Any]:
    shape, device = load_shape(args.model), DEVICES[args.device]
    settings = [
        setting_of(
            name,
            retention_ratio=args.retention,
            tsp_ratio=args.tsp_ratio,
            tsp_layer=args.tsp_layer,
            block_size=args.block_size,
        )
        for name in args.methods.split(",")
    ]
    contexts = [int(context) for context in args.context.split(",")]
    workloads = [Workload(context, args.batch, tensor_parallel=args.tp) for context in contexts]
    predictions = predict_all(shape, device, settings, workloads)
    heading = f"{args.model} ({shape.num_parameters / 1e9:.2f}e9 parameters), {device.name}, TP {args.tp}"
    print(f"\n{heading}, batch {args.batch}, r {args.retention}, t {args.tsp_ratio}, blocks of {args.block_size}\n")
    print(prediction_table(predictions, {s.name: block_bytes(shape, s, args.tp) for s in settings}))
    return {
        "benchmark": "model",
        "model": args.model,
        "shape": asdict(shape),
        "device": asdict(device),
        "tensor_parallel": args.tp,
        "batch": args.batch,
        "settings": [asdict(setting) for setting in settings],
        "predictions": {c: {n: asdict(p) for n, p in by_name.items()} for c, by_name in predictions.items()},
    }


def _compare() -> dict[str, Any]:
    published = compare_published()
    print("\nPublished: FastKV v1 (arXiv 2502.01068v1), Llama-3.1-8B, A100, batch 1, against a100-80\n")
    print(comparison_table(published, "published"))
    measured, notes = compare_measured(RESULTS)
    print("\nMeasured: benchmarks/results/, one CPU thread, process CPU seconds\n")
    print("\n".join(f"- {note}" for note in notes))
    if measured:
        print(f"\n{comparison_table(measured, 'measured')}")
    print()
    for name, rows in (("published", published), ("measured", measured)):
        predicted = [row for row in rows if not row.calibrated]
        far = sum(abs(row.error) > FAR_OFF for row in predicted)
        print(f"{name}: {far} of {len(predicted)} predictions are more than {FAR_OFF:.0%} off.")
    return {
        "benchmark": "model",
        "published": [asdict(row) for row in published],
        "measured": [asdict(row) for row in measured],
        "notes": notes,
    }


if __name__ == "__main__":
    main()
