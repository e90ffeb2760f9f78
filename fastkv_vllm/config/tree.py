"""The configuration tree: built once from one mapping, checked, frozen."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastkv_vllm.cache import LeftAlone, PromptPlan, plan_prompt
from fastkv_vllm.codecs import (
    CODECS,
    NO_CODEC,
    VALUES,
    VECTOR_CODECS,
    Codec,
    EntryShape,
    ExactCodec,
    PairCodec,
    neighbours,
)
from fastkv_vllm.config.rules import UNMEASURED, as_json, complete, each
from fastkv_vllm.methods import CUT_BUDGETS, MODEL_BUDGETS, OBSERVED, Allocator, BudgetOptions, Method, method_class


@dataclass(frozen=True)
class CompressionConfig:
    """What `--kv-compression NAME --kv-compression-config JSON` says.

    Fields (defaults are those of FastKV v3, arXiv 2502.01068):
        method: registered name.
        retention_ratio: share of a prompt's entries kept per layer and KV head, (0, 1]; 1.0 = off.
        budget: entries kept per layer and KV head, instead of retention_ratio.
        tsp_layer: last layer that sees the whole prompt, 0-based; None: num_layers // 2 - 1, which is the value
            published for Llama-3.1-8B (15), Ministral-8B (17) and Mistral-Nemo-12B (19). Several, rising: rows are
            cut after each. With rank_variance: latest layer of the cut; None: the last but one.
        tsp_ratio: share of a prompt's rows that go on after it, (0, 1]; 1.0 = no TSP; None: 0.2 where the method
            propagates, retention_ratio if that is more. One for each layer where tsp_layer has several.
        tsp_tokens: rows that go on, instead of tsp_ratio.
        rank_variance: rows are cut where no more than this share, (0, 1), of the variance of the best rows' ranks is
            left, see `methods.settling`; None: the method's own, which may be a cut after tsp_layer in any case.
        min_tsp_layer: layer with the variance that it is a share of, the cut comes later; None: 10/32 of the layers.
        layer_shares: instead of retention_ratio, where the method takes a measured schedule: share of a prompt's rows
            that goes on after each layer but the last, never rising. Path of the file that `fastkv-vllm calibrate
            decays` wrote, or the numbers; retention_ratio is then the mean of what layers keep.
        window_size: last prompt tokens whose queries vote and that always stay.
        num_sink: first tokens that always stay; None: the method's own default.
        recent_share: share of the kept entries that are the prompt's last tokens, [0, 1); None: the method's own.
        value_norms: whether the L1 norm of an entry's value multiplies its score; None: the method's own.
        decay: weight of a query's votes relative to the next one's, (0, 1], where all queries vote; None: the method's.
        kernel_size: width of the pooling over positions, odd.
        pooling: "max" (FastKV v3) or "avg" (v1, v2).
        layer_budgets: how layers share the budget, "uniform", "pyramid" or (where the last queries vote) "density";
            None: the method's own.
        head_budgets: how the KV heads of a layer share its budget, "uniform" or "adaptive", or how those of all layers
            share all of it, "importance" or "retrieval"; None: the method's own.
        head_weights: what was measured of the model's heads, for "importance" and "retrieval": path of the file that
            `fastkv-vllm calibrate` wrote, or the numbers, [layers][KV heads].
        head_beta: a beta-th of the budget is shared by importance, at least 1.
        streaming_tokens: entries of a head that is no retrieval head, sinks among them; where heads stream, also the
            tokens read between two times that they let go of others.
        pyramid_beta: steepness of the pyramid: the last layer has a beta-th of the even budget.
        head_floor: share of the even budget each head has of its own under "adaptive", [0, 1].
        halting_loss: share of the norm of the last query's attention that a layer may lose, (0, 1): it keeps no more
            pages than that takes, and the budget is a ceiling; None: the method's own, which may be no such rule.
        min_attention_recall: least share of the last queries' attention, (0, 1), that what stays must have got, see
            `methods.guard`; where the budget gives less, more pages stay. None: no guard.
        max_retention_ratio: most that the guard lets stay, a share of the prompt like retention_ratio; None with a
            guard: tsp_ratio where rows are cut, else 1.0.
        evict_while_decoding: whether a full block of entries after the prompt is chosen from together with what the
            prompt kept, and as many entries stay as before; None: the method's own. Without it they all stay.
        codec: how kept entries are stored, a name in `codecs.CODECS`; "none": in the model's dtype; None: the method's
            own, mostly none.
        channel_ratio: share of the channels of its keys that a KV head stores with a codec, those with the largest part
            in the logits of the last `window_size` queries, (0, 1]; rounded up to a multiple of 8; None: the method's
            own, mostly all.
        value_channel_ratio: the same of its values, those with the largest part in what the attention of these queries
            gives, (0, 1]; None: all.
        channel_groups: what was measured of the channels of each head, for codecs that need it: path of the file that
            `fastkv-vllm calibrate channels` wrote, or "none": channels in their own order, nothing clipped.
        residual_window: last tokens that a codec leaves in the model's dtype; None: the method's own, the window at
            least.
        encode_generated: whether what is generated is encoded, too, a block at a time once it has left the residual
            window; None: the method's own. Without it all that follows the prompt stays in the model's dtype.
        draft_tokens: most tokens drafted at a time by what a codec's coarser view says, and verified together by the
            whole of it, in requests that are decoded greedily: the tokens are those without drafts. 0: none; None: the
            method's own, mostly none.
        layer_owners: layer whose entries each layer reads once the prompt has ended: path of the file that `fastkv-vllm
            calibrate sharing` (with merge_layers: `merging`) wrote, or the numbers, [layers]; a layer reads its own or
            those of an earlier one that reads its own. None: all read their own, or with merge_layers pairs of
            neighbours from the middle on.
        merge_layers: "values" or "keys_and_values": a layer with an owner does not read the owner's entries, both are
            stored as one, a direction and each layer's magnitude; None: the method's own, mostly nothing.
        merge_t: weight of the upper layer's direction in a merged pair, [0, 1]; None: 0.6.
        merge_gamma: entries in the band of this share of the range below the largest distance of a pair are not merged,
            [0, 1]; of so large a share of the entries at most, the farthest; None: 0.05.
        merge_limit: largest share of right answer tokens, [0, 1], that merging may lose by the report in layer_owners:
            the server does not start above it, or, below 1, without a report; None: 0.05.
        min_tokens: prompts below this are left alone.
        allow_request_override: whether a request may choose its method and settings, or none.
        min_retention_ratio: least share of its entries that a request may ask to keep, [0, 1].
        max_tsp_tokens: most residual rows held, over all requests: of prompts that wait for their last chunk, and
            for each cut of those whose rows may come back while they decode. Prompts wait for their turn beyond it;
            None: the rows of one prompt of the model's maximum length.
    """

    method: str
    retention_ratio: float | None = None
    budget: int | None = None
    tsp_layer: int | tuple[int, ...] | None = None
    tsp_ratio: float | tuple[float, ...] | None = None
    tsp_tokens: int | tuple[int, ...] | None = None
    rank_variance: float | None = None
    min_tsp_layer: int | None = None
    layer_shares: str | tuple[float, ...] | None = None
    window_size: int = 8
    num_sink: int | None = None
    recent_share: float | None = None
    value_norms: bool | None = None
    decay: float | None = None
    kernel_size: int = 7
    pooling: str = "max"
    layer_budgets: str | None = None
    head_budgets: str | None = None
    head_weights: str | tuple[tuple[float, ...], ...] | None = None
    head_beta: float = 1.5
    streaming_tokens: int = 320
    pyramid_beta: int = 20
    head_floor: float = 0.2
    halting_loss: float | None = None
    min_attention_recall: float | None = None
    max_retention_ratio: float | None = None
    evict_while_decoding: bool | None = None
    codec: str | None = None
    channel_ratio: float | None = None
    value_channel_ratio: float | None = None
    channel_groups: str | None = None
    residual_window: int | None = None
    encode_generated: bool | None = None
    draft_tokens: int | None = None
    layer_owners: str | tuple[int, ...] | None = None
    merge_layers: str | None = None
    merge_t: float | None = None
    merge_gamma: float | None = None
    merge_limit: float | None = None
    min_tokens: int = 512
    allow_request_override: bool = True
    min_retention_ratio: float = 0.0
    max_tsp_tokens: int | None = None

    def __post_init__(self) -> None:
        complete(self)

    @classmethod
    def from_mapping(cls, method: str, mapping: Mapping[str, Any]) -> "CompressionConfig":
        """Configuration of `method` from the JSON object of the command line.

        Raises:
            ValueError: an unknown key or a value out of range; the message says what is allowed.
        """
        if not isinstance(mapping, Mapping):
            raise ValueError(f"kv_compression_config must be a JSON object; got {mapping!r}")
        known = [field.name for field in dataclasses.fields(cls) if field.name != "method"]
        unknown = [name.encode("unicode_escape").decode() for name in sorted(set(mapping) - set(known))]
        if unknown:
            raise ValueError(f"kv_compression_config: unknown key {', '.join(unknown)}; known keys: {', '.join(known)}")
        return cls(method=method, **mapping)

    def to_mapping(self) -> dict[str, Any]:
        """All fields as plain JSON types; `CompressionConfig(**mapping)` gives the same configuration back."""
        return {name: as_json(value) for name, value in dataclasses.asdict(self).items()}

    def for_model(self, *, num_layers: int, num_kv_heads: int, max_model_len: int) -> "CompressionConfig":
        """The same configuration with the defaults that depend on the model filled in, and checked against it.

        Args:
            num_layers: decoder layers.
            num_kv_heads: KV heads of a layer, of all ranks.
            max_model_len: longest sequence the engine accepts, tokens.

        Raises:
            ValueError: weights of heads or shares of layers are those of another model, a TSP layer is not followed by
                another layer, or the stash is smaller than a prompt.
        """
        weights = self.head_weights
        if weights is None and self.head_budgets in MODEL_BUDGETS:
            raise ValueError(
                f"kv_compression_config: head_weights must be given for head_budgets {self.head_budgets!r}: the path "
                "of a file of `fastkv-vllm calibrate`, or numbers"
            )
        if weights is not None:
            assert isinstance(weights, tuple), "the file was read before"
            widths = {len(layer) for layer in weights}
            if len(weights) != num_layers or widths != {num_kv_heads}:
                raise ValueError(
                    f"kv_compression_config: head_weights must be of {num_layers} layers with {num_kv_heads} KV heads "
                    f"each, as the model has; got {len(weights)} with {', '.join(map(str, sorted(widths)))}"
                )
        if self.codec != NO_CODEC and self._codec.artefact is not None and self.channel_groups is None:
            raise ValueError(
                f"kv_compression_config: channel_groups must be given for codec {self.codec!r}: the path of a file of "
                f'`fastkv-vllm calibrate channels`, or "{UNMEASURED}" to store channels in their own order'
            )
        self = self._with_pairs(num_layers)._with_schedule(num_layers)
        self._require_owners_of(num_layers)
        if not self.uses_tsp:
            return self
        default = num_layers // 2 - 1 if self.rank_variance is None else num_layers - 2
        layer = default if self.tsp_layer is None else self.tsp_layer
        if not 0 <= each(layer)[-1] < num_layers - 1:
            raise ValueError(
                f"kv_compression_config: tsp_layer must be in 0..{num_layers - 2}, the model has {num_layers} layers; "
                f"got {as_json(layer)}"
            )
        least = max_model_len * (len(each(layer)) if method_class(self.method).revives else 1)
        limit = least if self.max_tsp_tokens is None and self.has_stash else self.max_tsp_tokens
        if limit is not None and limit < least:
            rows = "" if least == max_model_len else f", {least // max_model_len} times for {self.method}: {least}"
            raise ValueError(
                f"kv_compression_config: max_tsp_tokens must be at least the model's maximum length {max_model_len}"
                f"{rows}; got {limit}; raise it or lower --max-model-len"
            )
        self._require_owners_within_cuts(each(layer))
        return dataclasses.replace(
            self, tsp_layer=layer, min_tsp_layer=self._min_tsp_layer(num_layers, layer), max_tsp_tokens=limit
        )

    def _with_pairs(self, num_layers: int) -> "CompressionConfig":
        """The same with the pairs that are merged, where they are not given."""
        if self.layer_owners is not None or self.merge_layers is None:
            return self
        return dataclasses.replace(self, layer_owners=neighbours(num_layers))

    def pair_codec(self) -> PairCodec:
        """How layers are merged."""
        assert self.merge_t is not None and self.merge_gamma is not None, "filled in with merge_layers"
        assert self.codec is not None, "filled in by __post_init__"
        vectors = ExactCodec() if self.codec == NO_CODEC else VECTOR_CODECS[self.codec]
        return PairCodec(self.merge_t, self.merge_gamma, self.merge_layers == VALUES, vectors)

    def _require_owners_of(self, num_layers: int) -> None:
        owners = self.layer_owners
        if owners is None and method_class(self.method).shares_layers:
            raise ValueError(
                f"kv_compression_config: layer_owners must be given for {self.method}: the path of a file of "
                "`fastkv-vllm calibrate sharing`, or numbers"
            )
        if owners is not None and len(owners) != num_layers:
            raise ValueError(
                f"kv_compression_config: layer_owners must be {num_layers}, one for each of the model's layers; got "
                f"{len(owners)}"
            )

    def _require_owners_within_cuts(self, layers: Sequence[int]) -> None:
        """A layer can read another's entries only where both have seen the same rows."""
        for layer, owner in enumerate(self.layer_owners or ()):
            assert isinstance(owner, int), "the file was read before"
            for cut in layers:
                if owner <= cut < layer:
                    raise ValueError(
                        f"kv_compression_config: layer_owners must name layers that see the same rows; layer {layer} "
                        f"reads the entries of layer {owner} and rows are cut after layer {cut}: set "
                        '"tsp_ratio": 1.0 or calibrate sharing anew'
                    )

    def _min_tsp_layer(self, num_layers: int, tsp_layer: int | tuple[int, ...]) -> int | None:
        if self.rank_variance is None:
            return None
        assert isinstance(tsp_layer, int), "several are refused with rank_variance"
        least = OBSERVED - 1
        layer = max(num_layers * 10 // 32, least) if self.min_tsp_layer is None else self.min_tsp_layer
        if not least <= layer < tsp_layer:
            raise ValueError(
                f"kv_compression_config: min_tsp_layer must be in {least}..{tsp_layer - 1}, from the first layer with "
                f"{OBSERVED} to compare to the one before tsp_layer; got {layer}; the model has {num_layers} layers"
            )
        return layer

    def _with_schedule(self, num_layers: int) -> "CompressionConfig":
        """The same with the cuts of a method that has its own, for a model of so many layers."""
        cls = method_class(self.method)
        if cls.layer_budgets not in CUT_BUDGETS:
            return self
        assert self.retention_ratio is not None and self.recent_share is not None, "filled in by __post_init__"
        own: dict[str, Any] = {"tsp_layer": None, "tsp_ratio": None}
        if self.retention_ratio < 1:
            own["tsp_layer"], own["tsp_ratio"] = zip(*self._schedule(num_layers), strict=True)
        for name, value in own.items():
            if getattr(self, name) not in (None, value):
                raise ValueError(
                    f"kv_compression_config: {name} must be left out: where {self.method} cuts rows follows from "
                    f"retention_ratio; got {as_json(getattr(self, name))}"
                )
        return dataclasses.replace(self, **own)

    def _schedule(self, num_layers: int) -> Sequence[tuple[int, float]]:
        """Layers with a cut and the shares that go on: as measured, or as the method's own follow from the ratio."""
        assert self.retention_ratio is not None and self.recent_share is not None, "filled in by __post_init__"
        shares = self.layer_shares
        if shares is None:
            try:
                return method_class(self.method).schedule(num_layers, self.retention_ratio, self.recent_share)
            except ValueError as error:
                raise ValueError(f"kv_compression_config: retention_ratio of {self.method}: {error}") from error
        if len(shares) != num_layers - 1:
            raise ValueError(
                f"kv_compression_config: layer_shares must be {num_layers - 1}, one for each of the model's "
                f"{num_layers} layers but the last; got {len(shares)}"
            )
        assert not isinstance(shares, str), "the file was read before"
        return list(enumerate(shares))

    @property
    def uses_tsp(self) -> bool:
        """Whether late layers may see fewer rows than early ones."""
        if not method_class(self.method).propagates or self.retention_ratio == 1:
            return False
        return self.tsp_ratio is None or each(self.tsp_ratio)[-1] < 1

    @property
    def has_stash(self) -> bool:
        """Whether rows of a prompt's chunks may wait for the last one, in memory that the server sets aside."""
        return self.uses_tsp and not method_class(self.method).reads_again

    @property
    def tsp_layers(self) -> tuple[int, ...]:
        """Layers after which rows are cut, ascending; empty before `for_model` where they are not given."""
        return tuple(each(self.tsp_layer))

    @property
    def all_queries_vote(self) -> bool:
        """Whether every query of a prompt must be computed: none may be skipped by a prefix-cache hit."""
        return "column_sums" in method_class(self.method).needs

    @property
    def streams(self) -> bool:
        """Whether heads let go of entries while a prompt is read."""
        return method_class(self.method).streams and self.head_budgets in MODEL_BUDGETS

    def make_method(self) -> Method:
        """The configured method object."""
        return method_class(self.method)(
            window_size=self.window_size, kernel_size=self.kernel_size, pooling=self.pooling
        )

    def make_allocator(self) -> Allocator:
        """How layers and KV heads share the budget."""
        assert self.layer_budgets is not None and self.head_budgets is not None, "filled in by __post_init__"
        options = BudgetOptions(
            pyramid_beta=self.pyramid_beta,
            head_floor=self.head_floor,
            head_beta=self.head_beta,
            streaming_tokens=self.streaming_tokens,
            head_weights=self.head_weights if isinstance(self.head_weights, tuple) else (),
        )
        return Allocator(self.layer_budgets, self.head_budgets, options)

    @property
    def drops_channels(self) -> bool:
        """Whether less than all of a key or a value may be stored."""
        return min(self.channel_ratio or 1.0, self.value_channel_ratio or 1.0) < 1

    def stored_entry(self, entry: EntryShape) -> EntryShape:
        """An entry of the engine's cache, and what of it is stored with a codec."""
        of_keys, of_values = self.channel_ratio or 1.0, self.value_channel_ratio or 1.0
        return dataclasses.replace(entry, channel_ratio=of_keys, value_channel_ratio=of_values)

    def page_entries(self, block_size: int, entry: EntryShape) -> int | None:
        """Encoded entries that a page has room for; None: entries are stored as they are.

        Raises:
            ValueError: the codec cannot store entries of this shape, or not in pages of this size.
        """
        if self.codec == NO_CODEC:
            return None
        try:
            num_entries = self._codec.page_entries(block_size, self.stored_entry(entry))
        except ValueError as error:
            raise ValueError(f"kv_compression_config: codec {self.codec!r}: {error}") from error
        if self.num_sink and self._codec.exact_sinks and self.num_sink + self._sink_places(entry) > num_entries:
            raise ValueError(
                f"kv_compression_config: num_sink must leave room in a page of {block_size} entries, the sinks are "
                f"stored as they are; got {self.num_sink}"
            )
        return num_entries

    @property
    def _codec(self) -> Codec:
        assert self.codec is not None, "filled in by __post_init__"
        return CODECS[self.codec]

    def _sink_places(self, entry: EntryShape) -> int:
        """Places for codes that the sinks of a head take beyond their own."""
        assert self.num_sink is not None, "filled in by __post_init__"
        return 0 if self.codec == NO_CODEC else self._codec.sink_places(self.num_sink, self.stored_entry(entry))

    def plan(
        self, num_tokens: int, block_size: int, num_after_image: int = 0, entry: EntryShape | None = None
    ) -> PromptPlan | LeftAlone:
        """What stays of a prompt.

        Its cuts are known once `for_model` has set their layers, how heads stream once weights are numbers.

        Args:
            num_tokens: tokens of the prompt.
            block_size: tokens per block.
            num_after_image: of them, those after its last image; 0: none or no image.
            entry: of the engine's cache; needed where there is a codec.
        """
        assert self.num_sink is not None and self.recent_share is not None, "filled in by __post_init__"
        assert self.evict_while_decoding is not None, "filled in by __post_init__"
        assert entry is not None or self.codec == NO_CODEC, "a codec stores entries of some shape"
        num_kept = int(num_tokens * self.retention_ratio) if self.retention_ratio is not None else self.budget
        assert num_kept is not None, "one of retention_ratio and budget is set"
        cls = method_class(self.method)
        num_recent = max(int(num_kept * self.recent_share), self.window_size)
        cuts = self._wished_cuts(num_tokens)
        owners = self.layer_owners if isinstance(self.layer_owners, tuple) else ()
        late = self.halting_loss is not None or self.min_attention_recall is not None  # known when all layers have run
        draft = PromptPlan(
            num_tokens,
            block_size,
            num_pages=0,
            cuts=cuts,
            window_size=self.window_size,
            num_voters=self._num_voters(num_recent, num_after_image),
            num_sink=self.num_sink,
            num_recent=num_recent,
            is_ragged=late or self.make_allocator().is_ragged or bool(owners),
            evicts=self.evict_while_decoding,
            cut_from=None if self.min_tsp_layer is None else self.min_tsp_layer + 1,
            reads_again=cls.reads_again and bool(cuts),
            residual=self.residual_window or 0,
            page_entries=None if entry is None else self.page_entries(block_size, entry),
            sink_places=0 if entry is None else self._sink_places(entry),
            encodes=bool(self.encode_generated),
            layer_owners=owners,
            pair_entries=self._pair_entries(block_size, entry) if owners else None,
            pair_retained=self.merge_gamma or 0.0,
            revives=cls.revives,
        )
        plan = plan_prompt(
            draft,
            num_kept=num_kept,
            min_tokens=self.min_tokens,
            layers_keep_rows=cls.layer_budgets in CUT_BUDGETS,
            most_kept=None if self.max_retention_ratio is None else int(num_tokens * self.max_retention_ratio),
        )
        if self.streams and isinstance(self.head_weights, tuple) and isinstance(plan, PromptPlan):
            return dataclasses.replace(plan, streaming=self.make_allocator().streaming(plan))
        return plan

    def _num_voters(self, num_recent: int, num_after_image: int) -> int:
        """Last tokens whose queries vote, of a prompt with so many recent ones and so many after its last image."""
        cls = method_class(self.method)
        if num_after_image and cls.most_voters_after_image:
            return min(num_after_image, cls.most_voters_after_image)
        return num_recent if cls.recent_ones_vote else self.window_size

    def _wished_cuts(self, num_tokens: int) -> tuple[tuple[int, int], ...]:
        """Layers after which rows of a prompt are cut, and how many are to go on."""
        if not (self.uses_tsp and self.tsp_layers):
            return ()
        rows = each(self.tsp_tokens) or [int(num_tokens * share) for share in each(self.tsp_ratio)]
        if method_class(self.method).reads_again:
            rows = [0]  # raised to what stays
        return tuple(zip(self.tsp_layers, rows, strict=True))

    def _pair_entries(self, block_size: int, entry: EntryShape | None) -> int | None:
        """Records of merged entries that a page has room for; None: layers are not merged."""
        if self.merge_layers is None:
            return None
        assert entry is not None, "records are of entries of some shape"
        return self.pair_codec().page_entries(block_size, entry)
