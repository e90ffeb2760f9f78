"""Upstream symbols the adapter overrides or uses."""

import ast
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import fastkv_vllm.adapter
from tests.contract.source import Source

ADAPTER = Path(fastkv_vllm.adapter.__path__[0])

# Members of objects whose class the code does not name. Class -> members.
MEMBERS = {
    "vllm.v1.core.kv_cache_manager:KVCacheManager": "coordinator truncate_computed_blocks",
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator": "single_type_managers",
    "vllm.v1.core.block_pool:BlockPool": (
        "blocks free_block_queue free_blocks get_new_blocks get_num_free_blocks null_block num_gpu_blocks"
    ),
    "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue": "get_all_free_blocks",
    "vllm.v1.core.kv_cache_utils:KVCacheBlock": "block_hash block_id is_null ref_cnt",
    "vllm.v1.kv_cache_interface:FullAttentionSpec": "block_size page_size_padded",
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec": "kv_cache_spec layer_names",
    "vllm.v1.attention.backend:CommonAttentionMetadata": (
        "block_table_tensor max_query_len max_seq_len num_actual_tokens num_reqs query_start_loc query_start_loc_cpu "
        "seq_lens seq_lens_cpu_upper_bound slot_mapping"
    ),
    # Overridden by classes that stand before them in another file.
    **{
        f"vllm.v1.attention.backends.{module}:{name}": members
        for module, backend in (("cpu_attn", "CPU"), ("flash_attn", "Flash"), ("triton_attn", "Triton"))
        for name, members in (
            (f"{backend}AttentionMetadata", "block_table seq_lens"),
            (f"{backend}AttentionMetadataBuilder", "build"),
            (
                f"{backend}AttentionBackendImpl" if backend == "CPU" else f"{backend}AttentionImpl",
                "alibi_slopes do_kv_cache_update forward head_size logits_soft_cap num_heads num_kv_heads "
                "num_queries_per_kv scale sinks",
            ),
        )
    },
    "vllm.v1.attention.backends.triton_attn:TritonAttentionMetadata": (
        "block_table seq_lens softmax_segm_expsum softmax_segm_max softmax_segm_output"
    ),
    "vllm.v1.attention.backends.flashinfer:FlashInferMetadataBuilder": "build get_cudagraph_support max_num_reqs",
    "vllm.v1.attention.backends.flashinfer:FlashInferImpl": (
        "alibi_slopes do_kv_cache_update forward head_size logits_soft_cap num_heads num_kv_heads num_queries_per_kv "
        "scale sinks"
    ),
    "vllm.v1.attention.backend:AttentionLayer": "_k_scale_float",
    "vllm.v1.attention.backends.registry:AttentionBackendEnum": "clear_override",
    "vllm.v1.worker.utils:AttentionGroup": "get_metadata_builder",
    "vllm.v1.worker.gpu_input_batch:InputBatch": (
        "block_table greedy_reqs num_computed_tokens_cpu num_reqs req_id_to_index req_ids token_ids_cpu"
    ),
    "vllm.model_executor.models.interfaces_base:VllmModel": "embed_input_ids",
    "vllm.model_executor.models.interfaces_base:VllmModelForTextGeneration": "compute_logits",
    "vllm.v1.worker.gpu_input_batch:CachedRequestState": "block_ids output_token_ids sampling_params",
    # Taken by what stands before both generations, in a file of its own.
    **{
        f"vllm.v1.worker.{module}:GPUModelRunner": "attn_groups device get_model vllm_config"
        for module in ("gpu_model_runner", "gpu.model_runner")
    },
    "vllm.v1.worker.gpu.model_runner:ExecuteModelState": "input_batch",
    "vllm.v1.worker.gpu.async_utils:AsyncOutput": "model_runner_output",
    "vllm.v1.worker.gpu.block_table:BlockTables": "block_tables",
    "vllm.v1.worker.gpu.buffer_utils:StagedWriteTensor": "gpu",
    "vllm.v1.worker.gpu.states:RequestState": "all_token_ids req_id_to_index",
    "vllm.v1.core.sched.output:NewRequestData": "block_ids req_id",
    "vllm.v1.core.sched.output:CachedRequestData": "new_block_ids req_ids",
    "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase": "kv_cache",
    "vllm.config.speculative:SpeculativeConfig": "method model num_speculative_tokens",
    "vllm.v1.worker.block_table:BlockTable": "block_table",
    "vllm.v1.outputs:ModelRunnerOutput": "req_ids",
    "vllm.forward_context:ForwardContext": "attn_metadata skip_compiled slot_mapping",
    "vllm.engine.protocol:EngineClient": "collective_rpc vllm_config",
    "vllm.sampling_params:SamplingParams": "extra_args max_tokens prompt_logprob_token_ids prompt_logprobs",
    "vllm.engine.arg_utils:EngineArgs": "additional_config enable_prefix_caching model speculative_config",
    "vllm.config:VllmConfig": (
        "cache_config kv_events_config kv_transfer_config lora_config model_config parallel_config scheduler_config "
        "speculative_config use_v2_model_runner"
    ),
    "vllm.config:ModelConfig": (
        "architecture dtype enable_prompt_embeds get_head_size get_hidden_size get_sliding_window "
        "get_total_num_hidden_layers get_total_num_kv_heads is_hybrid is_multimodal_model max_model_len model "
        "runner_type served_model_name use_mla"
    ),
    "vllm.config:CacheConfig": (
        "cache_dtype enable_prefix_caching kv_cache_dtype_skip_layers kv_cache_memory_bytes kv_sharing_fast_prefill"
    ),
    "vllm.config:SchedulerConfig": "async_scheduling scheduler_cls",
    "vllm.config:ParallelConfig": (
        "data_parallel_size decode_context_parallel_size enable_dbo pipeline_parallel_size "
        "prefill_context_parallel_size tensor_parallel_size worker_cls"
    ),
}


@dataclass
class Touched:
    """Fields: symbols ("module:name" or "module:Class.member") that are overridden or patched, and all others used."""

    overridden: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)


@functools.cache
def touched(source: Source) -> Touched:
    """What the adapter touches of a vLLM, by the names in its code and by `MEMBERS`.

    Of an imported name: itself, its attributes, its members given as keywords; of a subclass: methods it overrides and
    what it takes from `self`; of an annotated parameter: its attributes. Names that vLLM does not define are ours.
    """
    found = Touched()
    for path in sorted(ADAPTER.rglob("*.py")):
        _File(ast.parse(path.read_text()), source, found).read()
    found.used |= {f"{owner}.{name}" for owner, names in MEMBERS.items() for name in names.split()}
    found.used -= found.overridden
    return found


class _File:
    """One file of the adapter."""

    def __init__(self, tree: ast.Module, source: Source, found: Touched) -> None:
        self._tree, self._source, self._found = tree, source, found
        self._imports = {
            alias.asname or alias.name: (node.module or "", alias.name)
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
            for alias in node.names
        }
        self._classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}

    def read(self) -> None:
        for module, name in self._imports.values():
            self._found.used.add(f"{module}:{name}")
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                self._use(node.value.id, [node.attr])
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                self._call(node.func.id, {k.arg: k.value for k in node.keywords if k.arg})
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self._annotated(node)
        for owner in self._classes.values():
            for base in self._upstream_bases(owner):
                self._subclass(owner, base)

    def _use(self, name: str, members: list[str], *, overrides: bool = False) -> None:
        """Members of an imported name that vLLM defines."""
        if name not in self._imports:
            return
        module, original = self._imports[name]
        for member in members:
            symbol = f"{module}:{original}.{member}"
            if self._source.tree(f"{module}.{original}") is not None:
                symbol = f"{module}.{original}:{member}"
            if self._source.signature(symbol) is not None:
                (self._found.overridden if overrides else self._found.used).add(symbol)

    def _call(self, name: str, keywords: Mapping[str, ast.expr]) -> None:
        """Keywords of a dataclass are its fields; a `Patch` says what it replaces."""
        if name == "Patch" and isinstance(keywords["owner"], ast.Name):
            self._use(keywords["owner"].id, [ast.literal_eval(keywords["name"])], overrides=True)
        self._use(name, [*keywords])

    def _annotated(self, function: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        kinds = {arg.arg: ast.unparse(arg.annotation) for arg in function.args.args if arg.annotation}
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in kinds:
                self._use(kinds[node.value.id], [node.attr])

    def _subclass(self, owner: ast.ClassDef, base: str) -> None:
        for part in self._own_bases(owner):
            for node in part.body:
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    self._use(base, [node.name], overrides=True)
            self._use(base, sorted(set(_taken_from_self(part))))

    def _own_bases(self, owner: ast.ClassDef) -> Iterator[ast.ClassDef]:
        """A class and its bases in this file."""
        yield owner
        for base in owner.bases:
            if isinstance(base, ast.Name) and base.id in self._classes:
                yield from self._own_bases(self._classes[base.id])

    def _upstream_bases(self, owner: ast.ClassDef) -> list[str]:
        return [base.id for base in owner.bases if isinstance(base, ast.Name) and base.id in self._imports]


def _taken_from_self(owner: ast.ClassDef) -> Iterator[str]:
    """X of each self.X, cls.X and super().X."""
    for node in ast.walk(owner):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls", "super()"):
            yield node.attr
