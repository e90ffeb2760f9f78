"""What accelerators can do at most, and the share of it that good kernels were measured to reach.

No share here was fitted to the tables the model is compared with.

| field | A100 SXM | H100 SXM, H200 SXM | source |
|---|---|---|---|
| bf16_flops | 312e12 | 989e12 | data sheets, dense |
| fp8_flops | none | 1979e12 | data sheets, dense |
| memory_bytes | 40e9 or 80e9 | 80e9, 141e9 | data sheets; drivers report a few per cent more |
| memory_bytes_per_s | 1.555e12 or 2.039e12 | 3.35e12, 4.8e12 | data sheets |
| link_bytes_per_s | 300e9 | 450e9 | data sheets: NVLink, half of the sum of both directions |
| linear_fraction | 0.87 | 0.80 | [1]: 271 of 312 and 795 of 989 TFLOP/s |
| fp8_fraction | unused | 0.71 | [1]: 1403 of 1979 TFLOP/s |
| attention_fraction | 0.62 | 0.62 | [2]: middle of 50-73 %; [3]: 614 of 989 TFLOP/s, 8192 tokens, d 128 |
| memory_fraction | 0.88 | 0.88 | [4]: 1.80 of 2.04 TB/s; taken over for the others |
| link_fraction | 0.75 | 0.75 | an assumption, nobody's measurement |

[1] best matmul found by stas00/ml-engineering, compute/accelerator; [2] FlashAttention-2, arXiv 2307.08691;
[3] FlashAttention-3 in pytorch/benchmark, pull request 2391; [4] a read kernel, NVIDIA developer forum, thread 339083.
H200 takes over H100's shares.
"""

from dataclasses import dataclass

from benchmarks.roofline.operations import Kind, Operation


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Fields:
        name: as on the command line.
        bf16_flops: peak of dense bf16 matrix products, FLOP/s.
        fp8_flops: the same for fp8, FLOP/s; None: no such units, fp8 weights are multiplied as bf16.
        memory_bytes: size of its memory.
        memory_bytes_per_s: peak of its memory.
        link_bytes_per_s: peak between two devices of a node, one direction.
        linear_fraction, fp8_fraction, attention_fraction: share of the peak reached by bf16 and fp8 matrix products
            and by attention, (0, 1].
        memory_fraction, link_fraction: share of the peak reached by memory and link, (0, 1].
    """

    name: str
    bf16_flops: float
    fp8_flops: float | None
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    linear_fraction: float
    fp8_fraction: float = 1.0
    attention_fraction: float = 0.62
    memory_fraction: float = 0.88
    link_fraction: float = 0.75

    def seconds(self, operation: Operation) -> float:
        """count x max(FLOPs / reached FLOP/s, bytes / reached bytes/s, link bytes / reached link bytes/s)."""
        compute = operation.flops / self._flops_per_s(operation.kind)
        memory = operation.memory_bytes / (self.memory_bytes_per_s * self.memory_fraction)
        link = operation.link_bytes / (self.link_bytes_per_s * self.link_fraction)
        return operation.count * max(compute, memory, link)

    def _flops_per_s(self, kind: Kind) -> float:
        if kind is Kind.ATTENTION:
            return self.bf16_flops * self.attention_fraction
        if kind is Kind.LINEAR_FP8 and self.fp8_flops is not None:
            return self.fp8_flops * self.fp8_fraction
        return self.bf16_flops * self.linear_fraction


_A100 = {"bf16_flops": 312e12, "fp8_flops": None, "link_bytes_per_s": 300e9, "linear_fraction": 0.87}
_H100 = {
    "bf16_flops": 989e12,
    "fp8_flops": 1979e12,
    "link_bytes_per_s": 450e9,
    "linear_fraction": 0.80,
    "fp8_fraction": 0.71,
}
DEVICES = {
    "h100": Device("h100", memory_bytes=80e9, memory_bytes_per_s=3.35e12, **_H100),
    "h200": Device("h200", memory_bytes=141e9, memory_bytes_per_s=4.8e12, **_H100),
    "a100-40": Device("a100-40", memory_bytes=40e9, memory_bytes_per_s=1.555e12, **_A100),
    "a100-80": Device("a100-80", memory_bytes=80e9, memory_bytes_per_s=2.039e12, **_A100),
}
