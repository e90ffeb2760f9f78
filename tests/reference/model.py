"""A slow, readable float32 decoder that reads a checkpoint and drops exactly the entries a method drops."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import tests.reference.budgets
import tests.reference.codecs
import tests.reference.eviction
import tests.reference.merging
import tests.reference.streaming
from tests.reference.codecs import Groups
from tests.reference.images import image_rows
from tests.reference.revival import Waiting, choose, exchange, put_back
from tests.reference.scores import (
    all_query_scores,
    last_query_attention,
    last_query_products,
    last_query_scores,
    recent_query_scores,
    value_norms,
    voters_density,
    voters_scores,
)
from tests.reference.selection import Drop, rows_after, select_positions, window_scores


@dataclass(frozen=True)
class Generation:
    """What greedy decoding gave, and which entries it had.

    tokens, logprobs: chosen tokens and their log-probabilities.
    margins: top-1 minus top-2 logit of each step; a small one tells a tie from an error.
    kept: per layer and head the kept positions, [num_kept] int64, ascending; empty without a drop.
    tsp_indices: after each cut the positions that went on, [rows] int64, ascending; empty without cuts.
    cut_layers: the layers of these cuts.
    num_revived: prompt rows that came back while decoding, counted once for each cut.
    recalls: attention recall by pages, see `budgets.recalls_by_pages`; empty without a least recall.
    """

    tokens: list[int]
    logprobs: list[float]
    margins: list[float]
    kept: list[list[Tensor]]
    tsp_indices: list[Tensor]
    cut_layers: list[int]
    num_revived: int = 0
    recalls: Sequence[float] = ()


@dataclass
class _Layer:
    """Weights of one layer by short name, and its cache of roped keys and values, of each head [N, D].

    queries: of the last tokens, those that may vote, [Hq, at most window_size, D].
    votes: of all queries for each entry, of each head [N]; empty where they do not vote.
    num_stored: of each head, the first entries, which its codec has stored.
    channels: of each head, of its keys and of its values those that are stored.
    groups: of each head, what was measured of its channels.
    """

    weights: dict[str, Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    queries: Tensor
    votes: list[Tensor]
    num_stored: list[int] = field(default_factory=list)
    channels: list[tuple[list[int], list[int]]] = field(default_factory=list)
    groups: Sequence[Groups | None] = ()


class ReferenceModel:
    """Llama, Mistral, Qwen2, Qwen3, Phi-3 and Gemma 1 checkpoints, one sequence at a time, batch of one.

    The families differ in what their checkpoint holds (biases, q/k norms, fused projections) and in Gemma's
    three constants; everything else is one decoder. Of an Idefics3 checkpoint it is the decoder; rows of pictures come
    from transformers, see `images`.
    """

    def __init__(self, directory: Path, kv_cache: tuple[str, float, float] = ("auto", 1.0, 1.0)) -> None:
        """kv_cache: what the cache cuts all entries down to before anyone reads them, "auto": nothing; its scales."""
        kind, *self.scales = kv_cache
        self.float8 = {"auto": None, "fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[kind]
        config = json.loads((Path(directory) / "config.json").read_text())
        has_images = "vision_config" in config
        config = config["text_config"] if has_images else config
        _refuse_unsupported(config)
        is_gemma = config["model_type"] == "gemma"
        self.hidden_size = config["hidden_size"]
        self.num_heads = config["num_attention_heads"]
        self.num_kv_heads = config["num_key_value_heads"]
        self.head_dim = config.get("head_dim") or self.hidden_size // self.num_heads
        self.eps = config["rms_norm_eps"]
        self.rope_theta = config["rope_parameters"]["rope_theta"]
        self.norm_offset = 1.0 if is_gemma else 0.0
        embedding_scale = self.hidden_size**0.5 if is_gemma else 1.0
        self.gelu = is_gemma

        weights: dict[str, Tensor] = {}
        for file in sorted(Path(directory).glob("*.safetensors")):
            weights |= {
                name.removeprefix("model.").removeprefix("text_model."): tensor.float()
                for name, tensor in load_file(file).items()
            }
        embedding = weights["embed_tokens.weight"]
        self.lm_head = embedding if config["tie_word_embeddings"] else weights["lm_head.weight"]
        self.inputs = embedding * embedding_scale
        if has_images:  # token -1 is their first row
            self.inputs = torch.cat([self.inputs, image_rows(directory).flip(0)])
        self.final_norm = weights["norm.weight"]
        self.layer_weights = [self._layer_weights(weights, i) for i in range(config["num_hidden_layers"])]

    @torch.inference_mode()
    def logits(self, prompt: Sequence[int]) -> Tensor:
        """Logits of every prompt row with nothing dropped, [P, vocabulary]."""
        hidden, *_ = self._prefill(prompt, drop=None)
        return self._head(hidden)

    @torch.inference_mode()
    def generate(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        drop: Drop | None = None,
        num_context: int | None = None,
        least_margin: float = -1.0,
    ) -> Generation:
        """Decode greedily for max_tokens tokens, whatever they are: only one with a margin below the least stops it.

        Prefill attention runs over all entries the layer sees, but where heads stream; drop applies once, after it, but
        for a method that chooses anew with each token. What is generated stays, unless the drop has a period. With
        num_context the drop comes after so many prompt tokens, and the rest of the prompt is read token by token, as if
        it had been generated.

        Raises: ValueError if drop does not fit the prompt.
        """
        num_context = len(prompt) if num_context is None else num_context
        waiting = Waiting(drop, [], []) if drop is not None and drop.revives else None
        hidden, layers, kept, cuts, recalls = self._prefill(prompt[:num_context], drop, waiting)
        shift = 0
        if drop is not None and drop.method == "gemfilter":
            (chosen,) = cuts.values()
            hidden, layers, *_ = self._prefill([prompt[p] for p in chosen], drop=None)
            kept = [[chosen] * self.num_kv_heads] * len(layers)
            shift = num_context - len(chosen)

        def read(token: int, position: int) -> Tensor:
            if waiting is not None:
                return self._decode_choosing(layers, token, position, waiting)
            return self._decode(layers, token, position - shift, drop)

        for position in range(num_context, len(prompt)):
            hidden = read(prompt[position], position)
        tokens, logprobs, margins = [], [], []
        while True:
            logits = self._head(hidden[-1])
            best = logits.topk(2).values
            tokens.append(int(logits.argmax()))
            logprobs.append(float(logits.log_softmax(dim=-1)[tokens[-1]]))
            margins.append(float(best[0] - best[1]))
            if len(tokens) == max_tokens or margins[-1] < least_margin:
                num_revived = 0 if waiting is None else waiting.num_revived
                indices = list(cuts.values())
                return Generation(tokens, logprobs, margins, kept, indices, list(cuts), num_revived, recalls)
            hidden = read(tokens[-1], len(prompt) + len(tokens) - 1)

    def _prefill(
        self, prompt: Sequence[int], drop: Drop | None, waiting: Waiting | None = None
    ) -> tuple[Tensor, list[_Layer], list[list[Tensor]], dict[int, Tensor], list[float]]:
        """Run the prompt; what may come back is left in `waiting`.

        Returns: the last layer's hidden rows, the layers after dropping, kept, cuts: layer -> tsp_indices, recalls.
        """
        if drop is not None:
            drop.check_fits(len(prompt), len(self.layer_weights))
        layers, seen, rated, voters, attention, densities, cuts = [], [], [], [], [], [], {}
        guarded, recalls = [], []
        visible, held = _stream(drop, len(prompt))
        positions = torch.arange(len(prompt))
        hidden = self._embed(prompt)
        for index, weights in enumerate(self.layer_weights):
            queries, keys, values = self._project(weights, hidden, positions)
            hidden = self._finish(weights, hidden, _attend(queries, keys, values, visible.get(index)))
            layers.append(_Layer(weights, list(keys), list(values), queries, []))
            seen.append(positions)
            if drop is not None:
                if drop.period is not None:
                    layers[-1].queries = queries[:, -drop.num_later_voters :]
                voters.append(queries[:, -drop.num_voters :])
                votes = _votes(queries, keys, positions, drop)
                if drop.decay is not None:
                    layers[-1].votes = list(votes)
                votes = votes * value_norms(values)[:, : votes.shape[1]] if drop.value_norms else votes
                rated.append(votes.sum(dim=0).expand(len(votes), -1) if drop.one_choice else votes)
                attention.append(last_query_attention(queries, keys))
                if drop.min_recall is not None:
                    guarded.append(voters_scores(queries.double(), keys.double(), drop.num_voters))
                if drop.layer_budgets == "density":
                    of_heads = voters_density(queries, keys, drop.num_voters)
                    densities.append(sum(of_heads) / len(of_heads))
                num_rows = rows_after(drop, [sum(scores).tolist() for scores in rated], len(prompt))
                if num_rows is not None:
                    if waiting is not None:
                        waiting.streams.append(dict(zip(positions.tolist(), hidden, strict=True)))
                    chosen = _select(sum(rated[-1]), positions, num_rows, drop)
                    hidden = hidden[torch.searchsorted(positions, chosen)]
                    positions = cuts[index] = chosen
        kept = []
        if drop is not None:
            counts = tests.reference.budgets.kept_counts(drop, rated, seen, len(prompt), densities)
            if drop.halting_loss is not None:
                counts = tests.reference.budgets.halt(drop, counts, rated, seen, attention, len(prompt))
            if drop.min_recall is not None:
                recalls = tests.reference.budgets.recalls_by_pages(drop, rated, seen, guarded)
                counts = [[tests.reference.budgets.guard(drop, recalls)] * len(row) for row in counts]
            for index, (layer, scores, rows, numbers) in enumerate(zip(layers, rated, seen, counts, strict=True)):
                own = held.get(index, [rows] * len(numbers))
                ratings = [head[entries] for head, entries in zip(scores, own, strict=True)] if held else scores
                stay = [_select(*head, drop) for head in zip(ratings, own, numbers, strict=True)]
                layer.keys, layer.values = _take(layer.keys, rows, stay), _take(layer.values, rows, stay)
                if drop.codec is not None and drop.merge is None:
                    layer.num_stored = [drop.num_exact] * len(stay)
                    counts = [int((positions < drop.encoded_to).sum()) - drop.num_exact for positions in stay]
                    layer.groups = [None] * len(stay)
                    if drop.channel_groups is not None:
                        layer.groups = tests.reference.codecs.groups_of_heads(drop.channel_groups, index)
                    layer.channels = _channels(layer, voters[index], counts, drop)
                    _store(layer, counts, drop)
                if layer.votes:
                    layer.votes = _take(layer.votes, rows, stay)
                kept.append(stay)
            kept = [kept[owner] for owner in drop.layer_owners] or kept
            if drop.merge is not None:
                _merge(layers, kept, drop, len(prompt))
        if waiting is not None:
            waiting.held = [heads[0].tolist() for heads in kept]
        return hidden, layers, kept, cuts, recalls

    def _decode(self, layers: list[_Layer], token: int, position: int, drop: Drop | None) -> Tensor:
        """Run one token, append its entries to every cache, return its hidden row, [1, hidden_size].

        With a period the caches may then lose as many entries as it says; a codec may store more of them.
        """
        hidden = self._embed([token])
        for index, layer in enumerate(layers):
            queries, keys, values = self._project(layer.weights, hidden, torch.tensor([position]))
            layer.keys = [torch.cat(pair) for pair in zip(layer.keys, keys, strict=True)]
            layer.values = [torch.cat(pair) for pair in zip(layer.values, values, strict=True)]
            shares = drop is not None and drop.layer_owners and drop.merge is None
            read = layers[drop.layer_owners[index]] if shares else layer
            hidden = self._finish(layer.weights, hidden, _attend(queries, read.keys, read.values))
            if drop is not None and drop.period is not None:
                layer.queries = torch.cat([layer.queries, queries], dim=1)[:, -drop.num_later_voters :]
                if layer.votes:
                    layer.votes = tests.reference.eviction.add_votes(layer.votes, queries, layer.keys, drop)
                if (position + 1) % drop.period == 0:
                    _evict(layer, drop)
            if drop is not None and drop.encode_after and (position + 1 - drop.residual) % drop.encode_after == 0:
                _store(layer, [drop.encode_after] * len(layer.keys), drop)
        return hidden

    def _decode_choosing(self, layers: list[_Layer], token: int, position: int, waiting: Waiting) -> Tensor:
        """The same where the token chooses at each cut what the layers after it hold.

        Rows that come back run before it in each of these layers.
        """
        hidden = self._embed([token])
        back: list[int] = []
        rows = hidden[:0]
        for index, layer in enumerate(layers):
            if back:
                rows = self._come_back(layer, waiting.held[index], back, rows)
            queries, keys, values = self._project(layer.weights, hidden, torch.tensor([position]))
            layer.keys = [torch.cat(pair) for pair in zip(layer.keys, keys, strict=True)]
            layer.values = [torch.cat(pair) for pair in zip(layer.values, values, strict=True)]
            hidden = self._finish(layer.weights, hidden, _attend(queries, layer.keys, layer.values))
            for number, (cut, _) in enumerate(waiting.drop.cuts):
                if cut == index:
                    waiting.streams[number] |= dict(zip(back, rows, strict=True))
                    chosen = choose(waiting, index, queries, layer.keys, layer.values)
                    back = exchange(waiting, index, chosen, [(other.keys, other.values) for other in layers])
                    rows = torch.stack([waiting.streams[number][p] for p in back]) if back else hidden[:0]
        return hidden

    def _come_back(self, layer: _Layer, held: list[int], back: list[int], rows: Tensor) -> Tensor:
        """Run rows of prompt positions `back` through a layer that holds `held`, [k, hidden_size]; it then holds them.

        Each sees the entries up to its own position.
        """
        queries, keys, values = self._project(layer.weights, rows, torch.tensor(back))
        put_back(held, back, layer.keys, keys)
        put_back(held, back, layer.values, values)
        held[:] = sorted([*held, *back])
        attended = []
        for i, position in enumerate(back):
            end = held.index(position) + 1
            before = [[head[:end] for head in cache] for cache in (layer.keys, layer.values)]
            attended.append(_attend(queries[:, i : i + 1], *before))
        return self._finish(layer.weights, rows, torch.cat(attended))

    def _layer_weights(self, weights: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        """Weights of one layer by short name, such as "q_proj.weight"; fused projections are split."""
        prefix = f"layers.{index}."
        layer = {
            name.removeprefix(prefix).removeprefix("self_attn.").removeprefix("mlp."): tensor
            for name, tensor in weights.items()
            if name.startswith(prefix)
        }
        if "qkv_proj.weight" in layer:
            q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
            q, k, v = layer.pop("qkv_proj.weight").split([q_size, kv_size, kv_size])
            gate, up = layer.pop("gate_up_proj.weight").chunk(2)
            names = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
            layer |= {f"{name}.weight": tensor for name, tensor in zip(names, (q, k, v, gate, up), strict=True)}
        return layer

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        return self.inputs[list(tokens)]

    def _head(self, hidden: Tensor) -> Tensor:
        return self._norm(hidden, self.final_norm) @ self.lm_head.T

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt() * (weight + self.norm_offset)

    def _project(self, weights: dict[str, Tensor], hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Roped queries [Hq, n, D], roped keys [H, n, D] and values [H, n, D] of the rows in hidden."""
        x = self._norm(hidden, weights["input_layernorm.weight"])
        queries = _linear(x, weights, "q_proj").unflatten(-1, (self.num_heads, self.head_dim))
        keys = _linear(x, weights, "k_proj").unflatten(-1, (self.num_kv_heads, self.head_dim))
        values = _linear(x, weights, "v_proj").unflatten(-1, (self.num_kv_heads, self.head_dim))
        if "q_norm.weight" in weights:
            queries = self._norm(queries, weights["q_norm.weight"])
            keys = self._norm(keys, weights["k_norm.weight"])
        queries, keys, values = queries.transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1)
        queries, keys = self._rope(torch.cat([queries, keys]), positions).split([self.num_heads, self.num_kv_heads])
        keys, values = (self._cached(*part) for part in zip((keys, values), self.scales, strict=True))
        return queries, keys, values

    def _cached(self, x: Tensor, scale: float) -> Tensor:
        return x if self.float8 is None else tests.reference.codecs.cut(x / scale, self.float8).float() * scale

    def _rope(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate the pairs (i, i + D/2) of each row by its position; x is [heads, n, D]."""
        # float32 in this order of operations, as in transformers and vLLM: one rounding is 1e-4 rad at 2000.
        frequencies = 1.0 / self.rope_theta ** (torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        angles = positions[:, None].float() * frequencies  # [n, D/2]
        first, second = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def _finish(self, weights: dict[str, Tensor], hidden: Tensor, attended: Tensor) -> Tensor:
        """The layer after its attention: output projection and MLP, each added to the residual stream."""
        hidden = hidden + _linear(attended, weights, "o_proj")
        x = self._norm(hidden, weights["post_attention_layernorm.weight"])
        gate = _linear(x, weights, "gate_proj")
        gate = F.gelu(gate, approximate="tanh") if self.gelu else F.silu(gate)
        return hidden + _linear(gate * _linear(x, weights, "up_proj"), weights, "down_proj")


def _attend(
    queries: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], visible: Sequence[Tensor] | None = None
) -> Tensor:
    """Causal attention of the last n of N rows, [Hq, n, D] over [N, D] of each KV head -> [n, Hq * D].

    With `visible`, [n, N] of each KV head, over those entries.
    """
    attended, n = [], queries.shape[1]
    for head, (group, k, v) in enumerate(zip(queries.chunk(len(keys)), keys, values, strict=True)):
        sees = visible[head] if visible is not None else torch.ones(n, len(k), dtype=torch.bool).tril(len(k) - n)
        causal = visible is None and n == len(k)  # a case that torch need not be told entry by entry
        batch = group.unsqueeze(0), k.expand(1, len(group), -1, -1), v.expand(1, len(group), -1, -1)
        mask = None if causal else sees
        attended.append(F.scaled_dot_product_attention(*batch, attn_mask=mask, is_causal=causal).squeeze(0))
    return torch.cat(attended).transpose(0, 1).flatten(1)


def _linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def _stream(drop: Drop | None, num_tokens: int) -> tuple[dict[int, list[Tensor]], dict[int, list[Tensor]]]:
    """Layer -> what each head's queries see, and what each head has at the prompt's end; empty where none stream."""
    visible, held = {}, {}
    if drop is None or drop.stream_period is None:
        return visible, held
    most = [num_tokens // drop.block_size] * len(drop.head_weights)
    counts = tests.reference.budgets.measured_counts(drop, num_tokens, most)
    by_count = {n: tests.reference.streaming.seen(drop, n, num_tokens) for row in counts for n in row}
    for layer, row in enumerate(counts):
        visible[layer] = [by_count[n][0] for n in row]
        held[layer] = [torch.tensor(by_count[n][1]) for n in row]
    return visible, held


def _votes(queries: Tensor, keys: Tensor, positions: Tensor, drop: Drop) -> Tensor:
    """Importance of the rows but for their values, [H, n or n - window_size]; without scores, how late a row is."""
    if not drop.has_scores:
        return positions.float().expand(keys.shape[0], -1)  # exact below 2^24
    if drop.method == "pyramidinfer":
        return recent_query_scores(queries, keys, drop.num_voters)
    if drop.method == "vl_cache":
        return voters_scores(queries, keys, drop.num_voters)
    if drop.method in ("tova", "lazyllm"):
        return last_query_scores(queries, keys)
    if drop.method == "gemfilter":
        return last_query_products(queries, keys).expand(keys.shape[0], -1)
    if drop.decay is not None:
        return all_query_scores(queries, keys, drop.decay)
    return window_scores(queries, keys, drop)


def _evict(layer: _Layer, drop: Drop) -> None:
    """Take `period` entries from each head, by scores anew."""
    scores = tests.reference.eviction.rate(layer.queries, layer.keys, layer.values, layer.votes, drop)
    for head, rating in enumerate(scores):
        order = torch.arange(len(layer.keys[head]))
        rules = tests.reference.eviction.by_order(drop, len(order))
        stay = _select(rating, order, len(order) - drop.period, rules)
        for cache in (layer.keys, layer.values, layer.votes):
            if cache:
                cache[head] = cache[head][stay]


def _select(scores: Tensor, positions: Tensor, count: int, drop: Drop) -> Tensor:
    return torch.tensor(select_positions(scores.tolist(), positions.tolist(), count, drop))


def _take(cache: Sequence[Tensor], positions: Tensor, stay: Sequence[Tensor]) -> list[Tensor]:
    """Entries that stay of each head: caches [n, D] of rows at positions [n], stay [K] -> [K, D]."""
    return [head[torch.searchsorted(positions, chosen)] for head, chosen in zip(cache, stay, strict=True)]


def _channels(layer: _Layer, voters: Tensor, counts: Sequence[int], drop: Drop) -> list[tuple[list[int], list[int]]]:
    """Channels of its keys and of its values that each head stores, chosen by its first so many entries."""
    chosen = []
    for head, (group, count) in enumerate(zip(voters.chunk(len(counts)), counts, strict=True)):
        queries, keys, values = group.flatten(0, 1), layer.keys[head][:count], layer.values[head][:count]
        of_keys = of_values = list(range(voters.shape[-1]))
        if drop.num_channels is not None:
            of_keys = _largest(tests.reference.codecs.channel_parts(queries, keys), drop.num_channels)
        if drop.num_value_channels is not None:
            parts = tests.reference.codecs.value_channel_parts(queries, keys, values)
            of_values = _largest(parts, drop.num_value_channels)
        chosen.append((of_keys, of_values))
    return chosen


def _largest(parts: Sequence[float], count: int) -> list[int]:
    """Places of so many of the largest, ascending."""
    return sorted(sorted(range(len(parts)), key=lambda i: -parts[i])[:count])


def _store(layer: _Layer, counts: Sequence[int], drop: Drop) -> None:
    """Put into each head's cache what its codec gives back of so many more entries."""
    for head, count in enumerate(counts):
        more = slice(layer.num_stored[head], layer.num_stored[head] + count)
        own = layer.channels[head]
        entries = layer.keys[head][more][:, own[0]], layer.values[head][more][:, own[1]]
        parts = tests.reference.codecs.stored(drop.codec, *entries, layer.groups[head])
        for cache, channels, part in zip((layer.keys, layer.values), own, parts, strict=True):
            cache[head][more] = 0
            cache[head][more, channels] = part
        layer.num_stored[head] = more.stop


def _merge(layers: Sequence[_Layer], kept: Sequence[Sequence[Tensor]], drop: Drop, num_tokens: int) -> None:
    """Put into the caches of all layers what their merged form gives back, but for the tail.

    Layers without a partner come back from the codec, if there is one.
    """
    t, gamma, values_only = drop.merge
    for layer, owner in enumerate(drop.layer_owners):
        if layer == owner and drop.layer_owners.count(owner) > 1:
            continue
        pair = layers[owner], layers[layer]
        for head, positions in enumerate(kept[layer]):
            n = int((positions < num_tokens - drop.tail(num_tokens)).sum())
            own = [(of.keys[head][:n], of.values[head][:n]) for of in pair]
            if layer != owner:
                most = math.ceil(n // drop.block_size * gamma) * drop.block_size
                settings = {"t": t, "gamma": gamma, "most": most, "values_only": values_only}
                own = tests.reference.merging.merge_pair(*own, **settings, codec=drop.codec)
            elif drop.codec is not None:
                own = [tests.reference.codecs.stored(drop.codec, *own[0])] * 2
            for of, (keys, values) in zip(pair, own, strict=True):
                of.keys[head][:n], of.values[head][:n] = keys, values


def _refuse_unsupported(config: dict) -> None:
    supported = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma")
    rope = config["rope_parameters"]
    if config["model_type"] not in supported:
        raise NotImplementedError(f"model_type must be one of {', '.join(supported)}; got {config['model_type']!r}")
    if rope["rope_type"] != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise NotImplementedError(f"only plain RoPE over the whole head is supported; got {rope}")
    if config.get("sliding_window") is not None:
        raise NotImplementedError(f"sliding_window must be null; got {config['sliding_window']}")
