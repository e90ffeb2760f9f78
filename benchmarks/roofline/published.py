"""Predictions beside FastKV's published latencies."""

from benchmarks.roofline.compare import Comparison
from benchmarks.roofline.devices import DEVICES
from benchmarks.roofline.predict import Prediction, predict
from benchmarks.roofline.setting import Setting, Workload
from benchmarks.roofline.shapes import MODELS
from fastkv_vllm.config import CompressionConfig

# FastKV v1 (arXiv 2502.01068v1): Llama-3.1-8B, A100, fp16, batch 1, the authors' own Hugging Face implementation.
CONTEXTS = (8192, 16384, 32768, 65536, 131072)
TTFT_S = {
    "full KV": (0.64, 1.41, 3.40, 9.05, 27.94),
    "SnapKV": (0.67, 1.45, 3.49, 9.22, 28.27),
    "FastKV": (0.41, 0.80, 1.81, 4.66, 14.15),  # 2048 rows go on after layer 15
}
FULL_TOKENS_PER_S = (51.55, 43.07, 32.29, 21.24, 12.60)
BUDGETS = (512, 1024, 2048)
TOKENS_PER_S = {"SnapKV": (48.71, 48.62, 48.29), "FastKV": (63.84, 62.97, 60.74)}  # by budget, at 131072 tokens


def compare_published() -> list[Comparison]:
    """TTFT, decode tokens per second and their ratios to full KV, against the A100 with 80 GB.

    The paper does not print the GPU's memory size; 128K tokens beside the weights ask for 80 GB.
    """
    return _compare_ttft() + _compare_decode()


def _compare_ttft() -> list[Comparison]:
    predicted = {name: [_predict(name, context).ttft_s for context in CONTEXTS] for name in TTFT_S}
    rows = [
        Comparison(f"TTFT s, {name}, {context}", ours, theirs)
        for name, actual in TTFT_S.items()
        for context, ours, theirs in zip(CONTEXTS, predicted[name], actual, strict=True)
    ]
    for i, context in enumerate(CONTEXTS):
        ours = predicted["full KV"][i] / predicted["FastKV"][i]
        rows.append(Comparison(f"TTFT full / FastKV, {context}", ours, TTFT_S["full KV"][i] / TTFT_S["FastKV"][i]))
    return rows


def _compare_decode() -> list[Comparison]:
    full = [1 / _predict("full KV", context).tpot_s for context in CONTEXTS]
    rows = [
        Comparison(f"decode tokens/s, full KV, {context}", ours, theirs)
        for context, ours, theirs in zip(CONTEXTS, full, FULL_TOKENS_PER_S, strict=True)
    ]
    longest = CONTEXTS[-1]
    for name, actual in TOKENS_PER_S.items():
        for budget, theirs in zip(BUDGETS, actual, strict=True):
            ours = 1 / _predict(name, longest, budget).tpot_s
            rows.append(Comparison(f"decode tokens/s, {name} {budget}, {longest}", ours, theirs))
            gain = theirs / FULL_TOKENS_PER_S[-1]
            rows.append(Comparison(f"decode {name} {budget} / full, {longest}", ours / full[-1], gain))
    return rows


def _predict(name: str, context: int, budget: int = 512) -> Prediction:
    compression = {
        "full KV": None,
        "SnapKV": CompressionConfig("snapkv", budget=budget),
        "FastKV": CompressionConfig("fastkv", budget=budget, tsp_tokens=2048, tsp_layer=15),
    }[name]
    return predict(MODELS["llama-3.1-8b"], DEVICES["a100-80"], Setting(name, compression), Workload(context))
