"""From engine arguments to a vLLM configuration that compresses."""

import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any

from vllm import envs
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.platforms import current_platform

from fastkv_vllm.adapter import native
from fastkv_vllm.adapter.arguments import configured
from fastkv_vllm.adapter.choice import Choice, entry_shape
from fastkv_vllm.adapter.conflicts import DRAFTER, require_no_conflicts
from fastkv_vllm.adapter.patches import Patch, validate_request
from fastkv_vllm.adapter.version import require_supported_vllm
from fastkv_vllm.calibrate import load
from fastkv_vllm.codecs import CODECS, NO_CODEC, ChannelGroups, Codec, SkvqCodec
from fastkv_vllm.config import UNMEASURED, CompressionConfig
from fastkv_vllm.methods import MODEL_BUDGETS, method_class

logger = logging.getLogger("vllm.fastkv")

CONFIG_KEY = "fastkv"
STATUS_PLUGIN = "fastkv_status"  # to be named in VLLM_PLUGINS
_RUNNER_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"
_RUNNER_V1 = "00"  # to vLLM the same as 0; tells our choice from the user's, so that it can be taken back
_PACKAGE = "fastkv_vllm.adapter"
_installed: list[Patch] = []  # of the engine configured last in this process


def compression_config(vllm_config: VllmConfig) -> CompressionConfig:
    """The configuration that `wire_compression` put into a vLLM configuration."""
    return CompressionConfig(**vllm_config.additional_config[CONFIG_KEY])


def prepare_engine_args(args: Any) -> CompressionConfig | None:
    """Check our arguments and settle what vLLM must know before it builds its configuration.

    Prefix caching is off unless asked for where rows are propagated (a cached block lacks the late layers), tokens are
    drafted by vLLM's speculative decoding where the configuration says so, and Model Runner V1 is chosen unless the
    user has chosen V2, here and for the processes that inherit the environment.

    Raises:
        ValueError, RuntimeError: the arguments do not fit, or this vLLM is not supported.
    """
    config = configured(args)
    if config is None:
        _unpatch_front_end()
        if os.environ.get(_RUNNER_VARIABLE) == _RUNNER_V1:
            del os.environ[_RUNNER_VARIABLE]
        return None
    require_supported_vllm()
    if CONFIG_KEY in (args.additional_config or {}):
        raise ValueError(f"additional_config[{CONFIG_KEY!r}] is ours to write; use --kv-compression-config")
    if not envs.VLLM_USE_V2_MODEL_RUNNER:
        os.environ[_RUNNER_VARIABLE] = _RUNNER_V1
    elif config.draft_tokens:
        raise ValueError(
            f"kv_compression_config: draft_tokens must be 0 on Model Runner V2, for which {_RUNNER_VARIABLE}="
            f"{os.environ[_RUNNER_VARIABLE]} asks; got {config.draft_tokens}; unset {_RUNNER_VARIABLE}"
        )
    if (config.uses_tsp or config.all_queries_vote) and args.enable_prefix_caching is None:
        args.enable_prefix_caching = False
    if config.draft_tokens and args.speculative_config is None:
        args.speculative_config = {
            "method": "custom_class",
            "model": DRAFTER,
            "num_speculative_tokens": config.draft_tokens,
        }
    return config


def read_artefacts(config: CompressionConfig, model: str) -> CompressionConfig:
    """The configuration with numbers in the place of the files that hold them, but for those that workers read.

    Raises:
        CalibrationError: a file is missing, of another kind, or another model's.
    """
    numbers: dict[str, Any] = {}
    if config.channel_groups not in (None, UNMEASURED):
        _channel_groups(config, model)
    if isinstance(config.head_weights, str):
        assert config.head_budgets is not None, "filled in by CompressionConfig"
        budget = MODEL_BUDGETS[config.head_budgets]
        numbers["head_weights"] = load(config.head_weights, budget.artefact, model).data[budget.key]
    if isinstance(config.layer_shares, str):
        kind = method_class(config.method).schedule_artefact
        assert kind is not None, "checked by CompressionConfig"
        numbers["layer_shares"] = load(config.layer_shares, kind, model).data["shares"]
    if config.merge_layers is not None:
        numbers["layer_owners"] = _layers_to_merge(config, model)
    elif isinstance(config.layer_owners, str):
        numbers["layer_owners"] = load(config.layer_owners, "layer-sharing", model).data["owners"]
    return dataclasses.replace(config, **numbers)


def _layers_to_merge(config: CompressionConfig, model: str) -> Any:
    """Pairs that a report says may be merged, or those of the configuration where it asks for no report."""
    assert config.merge_limit is not None, "filled in with merge_layers"
    if not isinstance(config.layer_owners, str):
        if config.merge_limit < 1:
            raise ValueError(
                "kv_compression_config: layer_owners must be the path of a file of `fastkv-vllm calibrate merging`, "
                f"which says what answers of this model lose by {config.method}'s merging of layers; "
                '"merge_limit": 1.0 serves them unmeasured'
            )
        return config.layer_owners
    report = load(config.layer_owners, "layer-merging", model)
    measured = {"codec": NO_CODEC, **report.settings}  # without codecs it had no such setting
    for name in ("merge_layers", "merge_t", "merge_gamma", "codec"):
        if getattr(config, name) != measured[name]:
            raise ValueError(
                f"kv_compression_config: {name} must be as in {config.layer_owners}, {measured[name]!r}; got "
                f"{getattr(config, name)!r}: calibrate merging anew"
            )
    if report.data["lost"] > config.merge_limit:
        raise ValueError(
            f"merging layers loses {report.data['lost']:.3f} of the right answer tokens by {config.layer_owners}, more "
            f"than merge_limit = {config.merge_limit:g}: calibrate other pairs with --first-layer, or raise merge_limit"
        )
    return report.data["owners"]


def measured_codecs(vllm_config: VllmConfig) -> Mapping[str, Codec]:
    """All codecs, with what was measured of the heads that are this rank's; call in a worker."""
    config = compression_config(vllm_config)
    if config.channel_groups in (None, UNMEASURED):
        return CODECS
    data = _channel_groups(config, vllm_config.model_config.model)
    rank, num_ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    return {**CODECS, "skvq": SkvqCodec(ChannelGroups.of_rank(data, rank, num_ranks))}


def _channel_groups(config: CompressionConfig, model: str) -> Mapping[str, Any]:
    assert config.channel_groups is not None and SkvqCodec.artefact is not None, "asked by the caller"
    return load(config.channel_groups, SkvqCodec.artefact, model).data


def wire_compression(vllm_config: VllmConfig, config: CompressionConfig) -> None:
    """Name our scheduler and worker in a finished vLLM configuration and log what is on.

    Raises:
        ValueError: vLLM's configuration and ours exclude each other; names both sides.
    """
    require_no_conflicts(vllm_config, config)
    model = vllm_config.model_config
    config = read_artefacts(config, model.model).for_model(
        num_layers=model.get_total_num_hidden_layers(),
        num_kv_heads=model.get_total_num_kv_heads(),
        max_model_len=model.max_model_len,
    )
    config.page_entries(vllm_config.cache_config.block_size, entry_shape(vllm_config))
    scheduler = "AsyncCompressionScheduler" if vllm_config.scheduler_config.async_scheduling else "CompressionScheduler"
    vllm_config.scheduler_config.scheduler_cls = f"{_PACKAGE}.scheduler.{scheduler}"
    worker = "cpu_worker.CPUCompressionWorker" if current_platform.is_cpu() else "worker.CompressionWorker"
    vllm_config.parallel_config.worker_cls = f"{_PACKAGE}.{worker}"
    vllm_config.additional_config = {**vllm_config.additional_config, CONFIG_KEY: config.to_mapping()}
    _patch_front_end(vllm_config, config)
    if not current_platform.is_cpu():
        logger.warning("FastKV compression has been checked on CPUs only: hold its answers against those without it")
    table = "\n".join(f"  {name:<18} {value}" for name, value in overview(vllm_config).items())
    logger.info("FastKV compression is on for %s:\n%s", model.model, table)


def _patch_front_end(vllm_config: VllmConfig, config: CompressionConfig) -> None:
    """Put the patches that requests to this engine need in the place of those of an engine before it."""
    from fastkv_vllm.adapter.patches import responses, streams  # late: vLLM's server imports what imports us

    _unpatch_front_end()
    if native.names_request_validators():
        setattr(vllm_config, native.VALIDATOR_FIELD, f"{_PACKAGE}.validator.RequestValidator")
    else:
        validate_request.ask(Choice(vllm_config, config))
        _installed.extend((*validate_request.PATCHES, responses.PATCH))
    if not native.streams_have_our_field():
        _installed.extend(streams.PATCHES)
    for patch in _installed:
        patch.install()


def _unpatch_front_end() -> None:
    while _installed:
        _installed.pop().uninstall()


def overview(vllm_config: VllmConfig) -> dict[str, Any]:
    """What is on, for people: settings, and what follows from them."""
    config = compression_config(vllm_config)
    rows = {
        **config.to_mapping(),
        "head_weights": None if config.head_weights is None else "given for each layer and KV head",
        "tsp": _tsp(config),
        "prefix_caching": "on" if vllm_config.cache_config.enable_prefix_caching else "off",
        "scheduler": str(vllm_config.scheduler_config.scheduler_cls).rpartition(".")[2],
    }
    return {name: value for name, value in rows.items() if value is not None}


def _tsp(config: CompressionConfig) -> str:
    """After which layers rows are cut, for the log."""
    if not config.uses_tsp:
        return "off"
    if config.min_tsp_layer is not None:
        return f"on after a layer in {config.min_tsp_layer + 1}..{config.tsp_layers[0]}, found for each prompt"
    return f"on after layer {', '.join(map(str, config.tsp_layers))}"
