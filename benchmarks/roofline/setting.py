"""What runs, and on what: the inputs of a prediction beside model and device."""

from dataclasses import dataclass, replace

from benchmarks.roofline.shapes import ModelShape
from fastkv_vllm.cache import PromptPlan
from fastkv_vllm.config import CompressionConfig
from fastkv_vllm.methods import method_class


@dataclass(frozen=True)
class Setting:
    """How the cache is kept.

    What stays of a prompt is decided by the plugin's own configuration, so that the model and the code cannot differ.

    Fields:
        name: for tables.
        compression: method, retention_ratio, tsp_ratio and tsp_layer; None: plain vLLM.
        kv_bytes: bytes per cached number: 2 for bf16, 1 for fp8.
        block_size: tokens per block.
    """

    name: str
    compression: CompressionConfig | None = None
    kv_bytes: int = 2
    block_size: int = 16

    def plan(self, context: int) -> PromptPlan | None:
        """What stays of a prompt of `context` tokens; None: all of it."""
        plan = self.compression.plan(context, self.block_size) if self.compression is not None else None
        return plan if isinstance(plan, PromptPlan) else None

    def cuts(self, shape: ModelShape, context: int) -> tuple[tuple[int, int], ...]:
        """Layers of this model after which fewer rows of a prompt go on, and how many."""
        if self.compression is None:
            return ()
        filled = self.compression.for_model(
            num_layers=shape.num_layers, num_kv_heads=shape.num_kv_heads, max_model_len=context
        )
        plan = replace(self, compression=filled).plan(context)
        return () if plan is None else plan.cuts

    @property
    def reads_again(self) -> bool:
        """Whether the rows that go on are read again, as a prompt of their own."""
        return self.compression is not None and method_class(self.compression.method).reads_again

    @property
    def scores(self) -> bool:
        """Whether window queries are held against all keys."""
        return self.compression is not None and "queries" in method_class(self.compression.method).needs

    def rows_of_layers(self, shape: ModelShape, context: int) -> dict[int, int]:
        """Rows a layer sees of a prompt -> number of such layers; a group more for each cut of TSP, at the latest.

        Tokens that are read again pass all layers.
        """
        groups, rows, first = {}, context, 0
        for layer, num_rows in self.cuts(shape, context):
            groups[rows] = layer + 1 - first
            rows, first = num_rows, 0 if self.reads_again else layer + 1
        return {**groups, rows: shape.num_layers - first}

    def entries_of_layers(self, shape: ModelShape, workload: "Workload") -> tuple[int, ...]:
        """Entries each layer holds per KV head and request after `workload.generated` tokens."""
        plan = self.plan(workload.context)
        prompt = workload.context if plan is None else plan.num_kept
        return (prompt + workload.generated,) * shape.num_layers


@dataclass(frozen=True)
class Workload:
    """What is asked for.

    Fields:
        context: tokens of each prompt, N.
        batch: prompts that are computed together, and requests that decode together, b.
        generated: tokens of each request after its prompt: a decode step reads them, the room must hold them.
        tensor_parallel: ranks that share each layer.
    """

    context: int
    batch: int = 1
    generated: int = 0
    tensor_parallel: int = 1


def setting_of(
    name: str,
    *,
    retention_ratio: float,
    tsp_ratio: float,
    tsp_layer: int | None = None,
    block_size: int = 16,
) -> Setting:
    """The setting a name on the command line stands for: "plain", "fp8" (plain vLLM, fp8 cache) or a method.

    Raises:
        ValueError: no such method, or ratios that exclude each other.
    """
    if name in ("plain", "fp8"):
        return Setting(name, kv_bytes=1 if name == "fp8" else 2, block_size=block_size)
    cls = method_class(name)
    tsp = {"tsp_ratio": tsp_ratio, "tsp_layer": tsp_layer} if cls.propagates else {}
    if cls.reads_again:  # as many tokens as stay
        del tsp["tsp_ratio"]
    mapping = {"retention_ratio": retention_ratio, **tsp}
    return Setting(name, CompressionConfig.from_mapping(name, mapping), block_size=block_size)
