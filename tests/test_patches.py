"""The seam: what a `Patch` does to its target, and every upstream signature the adapter relies on."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest

import fastkv_vllm.adapter
from fastkv_vllm.adapter import patches
from fastkv_vllm.adapter.patches import Patch

# Symbol -> its parameter names in vLLM 0.32.0, of all we override, call or replace. "..." ends what we rely on.
CONTRACT = {
    # Overridden by the schedulers
    "vllm.v1.core.sched.scheduler:Scheduler.__init__": "self vllm_config kv_cache_config ...",
    "vllm.v1.core.sched.scheduler:Scheduler._get_local_prefix_cache_hit": "self request",
    "vllm.v1.core.sched.scheduler:Scheduler._reserve_prefill_lookahead": (
        "self request num_computed_tokens num_new_tokens"
    ),
    "vllm.v1.core.sched.scheduler:Scheduler._update_after_schedule": "self scheduler_output",
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_after_schedule": "self scheduler_output",
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": "self scheduler_output model_runner_output",
    "vllm.v1.core.sched.scheduler:Scheduler.make_stats": (
        "self spec_decoding_stats kv_connector_stats cudagraph_stats perf_stats ec_connector_stats"
    ),
    "vllm.v1.core.sched.scheduler:Scheduler.has_unfinished_requests": "self",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.truncate_computed_blocks": "self blocks num_computed_tokens",
    # Overridden by the block manager
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.get_num_blocks_to_allocate": (
        "self request_id num_tokens new_computed_blocks total_computed_tokens num_local_computed_tokens "
        "num_tokens_main_model apply_admission_cap prefill_end"
    ),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.allocate_new_blocks": (
        "self request_id num_tokens num_tokens_main_model"
    ),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.cache_blocks": (
        "self request num_tokens retention_interval replay_boundaries"
    ),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.pop_blocks_for_free": "self request_id",
    "vllm.v1.core.block_pool:BlockPool.free_blocks": "self ordered_blocks",
    "vllm.v1.core.block_pool:BlockPool.get_new_blocks": "self num_blocks",
    "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue.get_all_free_blocks": "self",
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.register": (
        "kvcache_spec_cls manager_class uniform_type_base_spec"
    ),
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry._ensure_registered": "vllm_config",
    "vllm.v1.kv_cache_interface:replace_as": "spec target_cls ...",
    # Overridden by the runner
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner.execute_model": "self scheduler_output intermediate_tensors",
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner.sample_tokens": "self grammar_output",
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner._build_attention_metadata": (
        "self num_tokens num_reqs max_query_len num_tokens_padded num_reqs_padded ubatch_slices logits_indices "
        "max_num_sampled_tokens use_spec_decode for_cudagraph_capture num_scheduled_tokens slot_mappings"
    ),
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner._model_forward": (
        "self input_ids positions intermediate_tensors inputs_embeds model_kwargs"
    ),
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner.initialize_kv_cache": (
        "self kv_cache_config is_profiling kv_cache_allocation_context"
    ),
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner.get_model": "self",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model": "self scheduler_output intermediate_tensors",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens": "self grammar_output",
    "vllm.v1.worker.utils:AttentionGroup.get_metadata_builder": "self ubatch_id",
    "vllm.config:get_layers_from_vllm_config": "vllm_config layer_type layer_names",
    "vllm.model_executor.models.utils:extract_layer_index": "layer_name num_attn_module",
    "vllm.forward_context:get_forward_context": "",
    "vllm.distributed:tensor_model_parallel_all_reduce": "input_",
    # Overridden by the worker
    "vllm.v1.worker.cpu_worker:CPUWorker.init_device": "self",
    "vllm.v1.worker.cpu_worker:CPUWorker.load_model": "self load_dummy_weights",
    "vllm.v1.worker.cpu_worker:CPUWorker.determine_available_memory": "self",
    "vllm.v1.attention.backends.registry:register_backend": "backend class_path is_mamba",
    "vllm.v1.attention.backends.registry:AttentionBackendEnum.clear_override": "self",
    "vllm.v1.attention.selector:_cached_get_attn_backend": (
        "backend attn_selector_config num_heads _run_kv_cache_dtype"
    ),
    # Overridden by the attention backend
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder.build": (
        "self common_prefix_len common_attn_metadata fast_build"
    ),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward": (
        "self layer query key value kv_cache attn_metadata output output_scale output_block_scale"
    ),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend.get_impl_cls": "",
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend.get_builder_cls": "",
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend.customize_spec": "spec",
    "vllm._custom_ops:cpu_attn_reshape_and_cache": (
        "key value key_cache value_cache slot_mapping isa k_scale v_scale kv_cache_dtype"
    ),
    # Patched
    "vllm.engine.arg_utils:EngineArgs.__init__": "self model ...",
    "vllm.engine.arg_utils:AsyncEngineArgs.__init__": "self model ...",
    "vllm.engine.arg_utils:EngineArgs.add_cli_args": "parser",
    "vllm.engine.arg_utils:EngineArgs.create_engine_config": "self usage_context headless",
    "vllm.platforms.interface:Platform.validate_request": "processed_inputs params",
    # Front end
    "vllm.v1.metrics.loggers:AggregateStatLoggerBase.__init__": "self vllm_config engine_indexes",
    "vllm.v1.metrics.loggers:AggregateStatLoggerBase.log_engine_initialized": "self",
    "vllm.v1.metrics.loggers:AggregateStatLoggerBase.record": (
        "self scheduler_stats iteration_stats mm_cache_stats engine_idx"
    ),
    "vllm.config:ModelConfig.get_total_num_hidden_layers": "self",
    "vllm.config:ModelConfig.get_hidden_size": "self",
    "vllm.config:ModelConfig.get_sliding_window": "self",
}

# Our class -> the methods it overrides upstream. A method upstream renames would else silently never be called.
OVERRIDES = {
    "attention:CompressionMetadataBuilder": {"__init__", "build"},
    "attention:CompressionAttentionImpl": {"forward"},
    "attention:CompressionBackend": {"get_impl_cls", "get_builder_cls", "customize_spec"},
    "attention:CompressionMetadata": {"__init__"},
    "kv_cache:CompressibleSpec": {"__init__"},
    "kv_cache:CompressingManager": {
        "__init__",
        "get_num_blocks_to_allocate",
        "allocate_new_blocks",
        "cache_blocks",
        "pop_blocks_for_free",
    },
    "metrics:FastKVStatLogger": {"__init__", "log_engine_initialized", "record"},
    "runner:CPUCompressionRunner": {
        "initialize_kv_cache",
        "execute_model",
        "sample_tokens",
        "_build_attention_metadata",
        "_model_forward",
    },
    "scheduler:_CompressionMixin": {
        "__init__",
        "_get_local_prefix_cache_hit",
        "_reserve_prefill_lookahead",
        "_update_after_schedule",
        "update_from_output",
        "make_stats",
    },
    "scheduler:AsyncCompressionScheduler": set(),
    "scheduler:CompressionScheduler": set(),
    "worker:CPUCompressionWorker": {"init_device", "load_model", "determine_available_memory"},
}
DATACLASS_METHODS = {"__init__", "__eq__", "__hash__", "__repr__", "__setattr__", "__delattr__", "__replace__"}


# Patch on toy classes


def make_toy() -> type:
    class Base:
        def inherited(self, x):
            return x

    class Toy(Base):
        def method(self, x, y=1):
            """Doc."""
            return ("method", x, y)

        @staticmethod
        def static(x):
            return ("static", x)

        @classmethod
        def cls_method(cls, x):
            return ("class", cls.__name__, x)

    return Toy


def marking(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: ("patched", original(*args, **kwargs))


def make_patch(owner: type, name: str, *parameters: str) -> Patch:
    return Patch(owner, name, parameters, marking, "a test")


TOY_METHODS = [
    ("method", ("self", "x", "y"), ("method", 3, 1)),
    ("static", ("x",), ("static", 3)),
    ("cls_method", ("cls", "x"), ("class", "Toy", 3)),
]


@pytest.mark.parametrize(("name", "parameters", "result"), TOY_METHODS, ids=[name for name, *_ in TOY_METHODS])
def test_patch_wraps_once_and_is_undone(name: str, parameters: tuple[str, ...], result: Any) -> None:
    owner = make_toy()
    original = owner.__dict__[name]
    patch = make_patch(owner, name, *parameters)
    for _ in range(2):
        patch.install()
        assert getattr(owner(), name)(3) == ("patched", result)
    assert type(owner.__dict__[name]) is type(original)
    assert getattr(owner, name).__name__ == name
    for _ in range(2):
        patch.uninstall()
        assert owner.__dict__[name] is original
    patch.install()
    assert getattr(owner(), name)(3) == ("patched", result)


def test_patch_keeps_name_and_docstring_and_other_methods() -> None:
    owner = make_toy()
    make_patch(owner, "method", "self", "x").install()
    assert (owner.method.__doc__, owner.method.__qualname__) == ("Doc.", "make_toy.<locals>.Toy.method")
    assert owner.static(1) == ("static", 1) and owner().inherited(1) == 1


@pytest.mark.parametrize("name", ["absent", "inherited"])
def test_patch_refuses_a_missing_method(name: str) -> None:
    owner = make_toy()
    before = dict(owner.__dict__)
    with pytest.raises(RuntimeError, match=rf"Toy\.{name} does not exist"):
        make_patch(owner, name, "self", "x").install()
    assert dict(owner.__dict__) == before


@pytest.mark.parametrize("parameters", [("self", "y"), ("x", "self"), ("self", "x", "y", "z"), ("x",)], ids=str)
def test_patch_refuses_another_signature(parameters: tuple[str, ...]) -> None:
    owner = make_toy()
    before = dict(owner.__dict__)
    with pytest.raises(RuntimeError, match=r"Toy\.method has parameters") as error:
        make_patch(owner, "method", *parameters).install()
    assert str(("self", "x", "y")) in str(error.value) and str(parameters) in str(error.value), "names both"
    assert dict(owner.__dict__) == before


def test_patches_are_frozen() -> None:
    with pytest.raises(AttributeError):
        make_patch(make_toy(), "method", "self").name = "static"  # type: ignore[misc]


# The adapter's patches


def adapter_patches() -> list[Patch]:
    found = []
    for info in pkgutil.iter_modules(patches.__path__):
        module = importlib.import_module(f"{patches.__name__}.{info.name}")
        named = [getattr(module, "PATCH", None), *getattr(module, "PATCHES", ())]
        found += [patch for patch in named if patch is not None]
        assert info.name == "base" or any(named), f"patches/{info.name}.py holds no patch"
    return found


def patch_id(patch: Patch) -> str:
    return f"{patch.owner.__qualname__}.{patch.name}"


EACH_PATCH = pytest.mark.parametrize("patch", adapter_patches(), ids=patch_id)


def test_no_symbol_is_patched_twice() -> None:
    names = [patch_id(patch) for patch in adapter_patches()]
    assert len(names) == len(set(names)) == 5


@EACH_PATCH
def test_a_patch_gives_its_reason(patch: Patch) -> None:
    assert len(patch.reason.split()) >= 10
    assert "Goes when" in patch.reason, "when to delete it"


@EACH_PATCH
def test_a_patch_is_in_the_contract_and_fits(patch: Patch) -> None:
    symbol = f"{patch.owner.__module__}:{patch_id(patch)}"
    recorded = CONTRACT[symbol].split()
    assert patch.parameters[:1] == ("cls",) or recorded[: len(patch.parameters)] == list(patch.parameters)
    installed = hasattr(getattr(patch.owner, patch.name), "__fastkv_original__")
    patch.install()
    assert getattr(patch.owner, patch.name).__fastkv_original__ is not None
    patch.uninstall()
    assert not hasattr(getattr(patch.owner, patch.name), "__fastkv_original__")
    if installed:
        patch.install()


# Upstream


def upstream(symbol: str) -> Any:
    """The symbol as vLLM wrote it, whatever has been patched."""
    module, _, path = symbol.partition(":")
    target = importlib.import_module(module)
    for name in path.split("."):
        target = getattr(target, name)
    return target


def parameters_of(symbol: str) -> list[str]:
    return list(inspect.signature(upstream(symbol)).parameters)


@pytest.mark.parametrize("symbol", CONTRACT)
def test_upstream_signature_is_the_recorded_one(symbol: str) -> None:
    recorded, found = CONTRACT[symbol].split(), parameters_of(symbol)
    if recorded and recorded[-1] == "...":
        recorded.pop()
        found = found[: len(recorded)]
    assert found == recorded


def adapter_classes() -> dict[str, type]:
    """Our subclasses of vLLM's classes: "module:Class" -> class."""
    found = {}
    for info in pkgutil.iter_modules(fastkv_vllm.adapter.__path__):
        module = importlib.import_module(f"{fastkv_vllm.adapter.__name__}.{info.name}")
        for name, cls in vars(module).items():
            ours = inspect.isclass(cls) and cls.__module__ == module.__name__
            if ours and any(base.__module__.startswith("vllm.") for base in cls.__mro__):
                found[f"{info.name}:{name}"] = cls
    return found


def functions_of(cls: type) -> dict[str, FunctionType]:
    plain = {name: getattr(value, "__func__", value) for name, value in cls.__dict__.items()}
    return {name: value for name, value in plain.items() if isinstance(value, FunctionType)}


def upstream_bases(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if base.__module__.startswith("vllm.")]


def test_all_classes_are_in_the_table() -> None:
    assert set(adapter_classes()) == set(OVERRIDES)


@pytest.mark.parametrize("name", OVERRIDES)
def test_overrides_are_the_recorded_ones(name: str) -> None:
    """No method of ours overrides one of vLLM's by accident, and none has lost what it overrode."""
    cls = adapter_classes()[name]
    generated = DATACLASS_METHODS - {"__init__"} if "__dataclass_params__" in cls.__dict__ else set()
    found = {f for f in functions_of(cls) if any(f in base.__dict__ for base in upstream_bases(cls))}
    assert found - generated == OVERRIDES[name]


PAIRS = [(name, method) for name, methods in OVERRIDES.items() for method in sorted(methods)]


@pytest.mark.parametrize(("name", "method"), PAIRS, ids=[f"{name}.{method}" for name, method in PAIRS])
def test_an_override_takes_upstreams_leading_parameters(name: str, method: str) -> None:
    """And all others through *args and **kwargs, or by name."""
    cls = adapter_classes()[name]
    base = next(base for base in upstream_bases(cls) if method in base.__dict__)
    theirs = list(inspect.signature(getattr(base, method)).parameters.values())
    ours = list(inspect.signature(getattr(cls, method)).parameters.values())
    positional = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional[: len(theirs)] == [p.name for p in theirs][: len(positional)]
    kinds = {p.kind for p in ours}
    taken = {p.name for p in ours}
    for p in theirs:
        passes = inspect.Parameter.VAR_KEYWORD in kinds and (
            p.kind is p.KEYWORD_ONLY or p.default is not p.empty or inspect.Parameter.VAR_POSITIONAL in kinds
        )
        assert p.name in taken or passes, f"{method} does not take {p.name}"
    for p in ours[len(theirs) :]:
        required = p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        assert not required, f"{method} requires {p.name}, which vLLM does not pass"
