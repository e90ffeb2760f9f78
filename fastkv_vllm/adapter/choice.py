"""Which compression a request gets: the server's, another method or other settings, or none."""

import dataclasses
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError

from fastkv_vllm.adapter.conflicts import conflicts_of_method
from fastkv_vllm.adapter.request import context_tokens
from fastkv_vllm.codecs import EntryShape
from fastkv_vllm.config import CompressionConfig
from fastkv_vllm.methods import CUT_BUDGETS, method_class

METHOD, SETTINGS = "kv_compression", "kv_compression_config"
NONE = "none"
# Settings a request may give beside METHOD, one by one, and those that are true or false: vLLM passes numbers only.
FLAT = {field.name: "bool" in str(field.type) for field in dataclasses.fields(CompressionConfig)}
del FLAT["method"]
_SERVERS = ("max_tsp_tokens", "merge_limit", "channel_groups", "allow_request_override", "min_retention_ratio")
# A setting of the request -> the one of the server's that it stands in for.
_INSTEAD = {
    "retention_ratio": "budget",
    "budget": "retention_ratio",
    "tsp_ratio": "tsp_tokens",
    "tsp_tokens": "tsp_ratio",
}
_FILES = ("head_weights", "layer_shares", "layer_owners")  # settings that may be files
_OF_PROMPTS = ("prompt_logprobs", "prompt_logprob_token_ids")  # what a request may ask of its prompt's tokens
_REMEMBERED = 128
# Queries that may vote at a request's wish, where the server's own setting is not more: their scores take memory.
WIDEST_WINDOW = 256


class Choice:
    """Configurations of requests, by `kv_compression`, settings and `kv_compression_config` in `vllm_xargs`.

    A setting stands there under its own name, or in the JSON object of `kv_compression_config`. Settings change the
    server's own where the method is the server's, and the method's defaults where it is another.
    Front end and scheduler read a request alike; the front end refuses what cannot be had.

    Args:
        vllm_config: finished, with compression wired in.
        default: the server's configuration, filled in for the model.

    Fields:
        entry: of the engine's cache.
    """

    def __init__(self, vllm_config: VllmConfig, default: CompressionConfig) -> None:
        self.default = default
        self.entry = entry_shape(vllm_config)
        self._vllm_config = vllm_config
        self._make = lru_cache(_REMEMBERED)(self._make_uncached)  # an engine lives as long as its process

    def of(self, params: Any) -> CompressionConfig | None:
        """Configuration of a request; None: it is not to be compressed.

        Args:
            params: SamplingParams, or None for a request that does not sample.

        Raises:
            VLLMValidationError: no such method, a wrong setting, or one that this server cannot serve.
        """
        extra = getattr(params, "extra_args", None) or {}
        given = [name for name in (METHOD, SETTINGS, *FLAT) if name in extra]
        if not given:
            return self.default
        if not self.default.allow_request_override:
            raise VLLMValidationError(
                f"this server compresses all requests alike (allow_request_override is false); leave out "
                f"{', '.join(given)}"
            )
        method, settings = extra.get(METHOD, self.default.method), extra.get(SETTINGS, "{}")
        if isinstance(settings, Mapping):
            settings = json.dumps(settings)
        for name, value in ((METHOD, method), (SETTINGS, settings)):
            if not isinstance(value, str):
                raise VLLMValidationError(f"{name} of a request must be a string; got {value!r}")
        flat = {name: _as_flag(extra[name]) if FLAT[name] else extra[name] for name in FLAT if name in extra}
        try:
            return self._make(method, settings, json.dumps(flat))
        except ValueError as error:
            reason = str(error).encode(errors="backslashreplace").decode()  # a key may hold half a surrogate pair
            raise VLLMValidationError(f"this request cannot be compressed as it asks: {reason}") from error

    def require_servable(self, processed_inputs: Any, params: Any) -> None:
        """Refuse a request before anything of it is scheduled.

        Args:
            processed_inputs: vLLM's form of the prompt.
            params: SamplingParams or PoolingParams.

        Raises:
            VLLMValidationError: it asks for what this server cannot do.
        """
        context_tokens(params, len(processed_inputs.get("prompt_token_ids") or ()))
        config = self.of(params)
        asked = [name for name in _OF_PROMPTS if getattr(params, name, None) is not None]
        if config is not None and config.uses_tsp and asked:
            raise VLLMValidationError(
                f"{asked[0]} cannot be had with token-selective propagation ({config.method}): late layers do not "
                f"see all prompt tokens; leave {asked[0]} out of the request, or let it ask for kv_compression "
                '"none" or (fastkv, asl) set "tsp_ratio": 1.0'
            )

    def _make_uncached(self, method: str, text: str, flat: str) -> CompressionConfig | None:
        try:
            settings = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{SETTINGS} must be a JSON object; got {_shown(text)}") from error
        if not isinstance(settings, dict):
            raise ValueError(f"{SETTINGS} must be a JSON object; got {_shown(text)}")
        alone: dict[str, Any] = json.loads(flat)
        twice = sorted(settings.keys() & alone)
        if twice:
            raise ValueError(f"{', '.join(twice)} must be given once, by name or in {SETTINGS}")
        settings |= alone
        if method == NONE:
            if settings:
                raise ValueError(f"settings must be left out where {METHOD} is {NONE!r}; got {', '.join(settings)}")
            return None
        files = [name for name in _FILES if isinstance(settings.get(name), str)]
        servers = [*files, *(name for name in _SERVERS if name in settings)]
        if servers:
            raise ValueError(f"files, memory and limits are the server's matter; leave out {', '.join(servers)}")
        config = self._for_model(CompressionConfig.from_mapping(method, {**self._given(method, settings), **settings}))
        if config.has_stash and not self.default.has_stash:
            raise ValueError(
                f"{method} lets rows wait between chunks, and the server, started with {self.default.method}, has set "
                "no memory aside for them; start it with --kv-compression fastkv"
            )
        widest = max(self.default.window_size, WIDEST_WINDOW)
        if config.window_size > widest:
            raise ValueError(f"window_size of a request must be at most {widest}; got {config.window_size}")
        needed, room = config.max_tsp_tokens or 0, self.default.max_tsp_tokens or 0
        if needed > room:
            raise ValueError(
                f"{method} may hold {needed} rows of a prompt, and the server has set memory aside for {room}; start "
                f"it with max_tsp_tokens {needed}"
            )
        wished, most = config.draft_tokens or 0, self.default.draft_tokens or 0
        if wished > most:
            if "draft_tokens" in settings:
                raise ValueError(f"draft_tokens of a request must be at most the server's, {most}; got {wished}")
            config = dataclasses.replace(config, draft_tokens=most)
        lines = conflicts_of_method(self._vllm_config, config)
        if lines:
            raise ValueError("; ".join(lines))
        return config

    def _given(self, method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What the request need not say because the server's configuration does."""
        default = self.default
        if method == default.method:
            replaced = {_INSTEAD[name] for name in settings if name in _INSTEAD}
            left_out = {"method", "head_weights", *replaced}
            if "codec" in settings or "encode_generated" in settings:
                left_out.add("draft_tokens")  # whether there can be drafts follows from them
            if settings.get("min_attention_recall", 1) is None:
                left_out.add("max_retention_ratio")  # without a guard there is no ceiling
            if method_class(method).layer_budgets in CUT_BUDGETS:
                left_out |= {"tsp_layer", "tsp_ratio"}  # they follow from the ratio, which may be another
                if "retention_ratio" in settings or "layer_shares" in settings:
                    left_out |= {"retention_ratio", "layer_shares"}  # one follows from the other
            return {name: value for name, value in default.to_mapping().items() if name not in left_out}
        kept = ("min_tokens", "min_retention_ratio", "channel_groups")
        return {name: getattr(default, name) for name in kept}

    def _for_model(self, config: CompressionConfig) -> CompressionConfig:
        model = self._vllm_config.model_config
        if config.head_weights is None and config.head_budgets == self.default.head_budgets:
            config = dataclasses.replace(config, head_weights=self.default.head_weights)
        if config.layer_owners is None and method_class(config.method).shares_layers:
            config = dataclasses.replace(config, layer_owners=self.default.layer_owners)
        config = config.for_model(
            num_layers=model.get_total_num_hidden_layers(),
            num_kv_heads=model.get_total_num_kv_heads(),
            max_model_len=model.max_model_len,
        )
        config.page_entries(self._vllm_config.cache_config.block_size, self.entry)
        return config


def entry_shape(vllm_config: VllmConfig) -> EntryShape:
    """An entry of the cache that an engine of this configuration has."""
    model = vllm_config.model_config
    return EntryShape(model.get_head_size(), model.dtype)


def _shown(text: str) -> str:
    """The start of what a client sent, for an error's sentence."""
    return repr(text if len(text) <= 100 else text[:100] + "...")


def _as_flag(value: Any) -> Any:
    """True and false as they come through an API that has numbers only; anything else is left to the rules."""
    return {0: False, 1: True}.get(value, value) if isinstance(value, int) else value
