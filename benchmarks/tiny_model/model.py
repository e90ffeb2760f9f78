"""A plain torch Llama for training on one CPU thread; parameter names are those of Hugging Face checkpoints.

Matrix products run in bfloat16; the residual stream, norms and master weights are float32. Sequences of a
batch are flattened to rows wherever tokens do not meet, so those parts compile once for all lengths.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_LAYERS, HIDDEN_SIZE, FFN_SIZE = 8, 128, 256
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 64
ROPE_THETA, RMS_EPS = 1e5, 1e-5
QUERY_BLOCK = 256


class Llama(nn.Module):
    """The whole model; `forward` returns final hidden states, `lm_head` is applied by the caller to some."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(vocab_size, HIDDEN_SIZE)
        self.model.layers = nn.ModuleList(Layer() for _ in range(NUM_LAYERS))
        self.model.norm = nn.RMSNorm(HIDDEN_SIZE, RMS_EPS)
        self.lm_head = nn.Linear(HIDDEN_SIZE, vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Embedding N(0, 1), matrices N(0, 1 / fan_in); those that write the residual stream are smaller."""
        nn.init.normal_(self.model.embed_tokens.weight)
        for name, weight in self.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.data /= (2 * NUM_LAYERS) ** 0.5

    def forward(self, ids: Tensor) -> Tensor:
        """Hidden states [B * N, HIDDEN_SIZE], float32, of ids [B, N]."""
        num_sequences, length = ids.shape
        cos, sin = (table.repeat(num_sequences, 1)[:, None] for table in rope_tables(length))
        hidden = self.model.embed_tokens(ids.flatten())
        for layer in self.model.layers:
            hidden = layer(hidden, cos, sin, num_sequences)
        return self.model.norm(hidden)


class Layer(nn.Module):
    """One decoder layer with Hugging Face's names for its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(HIDDEN_SIZE, RMS_EPS)
        self.self_attn = nn.Module()
        self.self_attn.q_proj = nn.Linear(HIDDEN_SIZE, NUM_HEADS * HEAD_DIM, bias=False)
        self.self_attn.k_proj = nn.Linear(HIDDEN_SIZE, NUM_KV_HEADS * HEAD_DIM, bias=False)
        self.self_attn.v_proj = nn.Linear(HIDDEN_SIZE, NUM_KV_HEADS * HEAD_DIM, bias=False)
        self.self_attn.o_proj = nn.Linear(NUM_HEADS * HEAD_DIM, HIDDEN_SIZE, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(HIDDEN_SIZE, RMS_EPS)
        self.mlp = nn.Module()
        self.mlp.gate_proj = nn.Linear(HIDDEN_SIZE, FFN_SIZE, bias=False)
        self.mlp.up_proj = nn.Linear(HIDDEN_SIZE, FFN_SIZE, bias=False)
        self.mlp.down_proj = nn.Linear(FFN_SIZE, HIDDEN_SIZE, bias=False)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, num_sequences: int) -> Tensor:
        """hidden [T, HIDDEN_SIZE]; cos and sin [T, 1, HEAD_DIM / 2]; T = num_sequences * length."""
        attn, mlp = self.self_attn, self.mlp
        projections = (attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight)
        query, key, value = _project(hidden, self.input_layernorm.weight, projections, cos, sin)
        attended = causal_attention(*(x.unflatten(0, (num_sequences, -1)) for x in (query, key, value)))
        feed_forward = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
        norm = self.post_attention_layernorm.weight
        return _finish(hidden, attended.flatten(0, 1), attn.o_proj.weight, norm, feed_forward)


def rope_tables(length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, HEAD_DIM / 2], float32, of the rotary angles."""
    inverse_frequency = ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = torch.arange(length)[:, None] * inverse_frequency
    return angle.cos(), angle.sin()


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention whose probabilities are kept for the backward pass: fast at these short lengths.

    Args:
        query: [B, N, Hq, D], bfloat16.
        key, value: [B, N, H, D], bfloat16.

    Returns:
        [B, N, Hq * D], bfloat16.
    """
    num_sequences, length = query.shape[:2]
    group_size = NUM_HEADS // NUM_KV_HEADS
    query = query.unflatten(2, (NUM_KV_HEADS, group_size)).permute(0, 2, 3, 1, 4)  # [B, H, G, N, D]
    key, value = (x.transpose(1, 2).flatten(0, 1) for x in (key, value))  # [B * H, N, D]
    rows = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        block = query[:, :, :, start:stop].reshape(-1, group_size * (stop - start), HEAD_DIM)
        mask = torch.full((stop - start, stop), float("-inf"), dtype=torch.bfloat16).triu(start + 1)
        scores = torch.baddbmm(mask.repeat(group_size, 1), block, key[:, :stop].transpose(1, 2), alpha=HEAD_DIM**-0.5)
        rows.append(torch.bmm(scores.softmax(-1), value[:, :stop]).unflatten(1, (group_size, -1)))
    out = torch.cat(rows, dim=2).unflatten(0, (num_sequences, -1))  # [B, H, G, N, D]
    return out.permute(0, 3, 1, 2, 4).flatten(2)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.bfloat16(), weight.bfloat16())


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).bfloat16()


@torch.compile(dynamic=False)
def _project(
    hidden: Tensor, norm: Tensor, projections: tuple[Tensor, ...], cos: Tensor, sin: Tensor
) -> tuple[Tensor, ...]:
    """Rotated queries [T, Hq, D], rotated keys and values [T, H, D], bfloat16."""
    x = F.rms_norm(hidden, (HIDDEN_SIZE,), norm, RMS_EPS)
    query, key, value = (_linear(x, weight).unflatten(-1, (-1, HEAD_DIM)) for weight in projections)
    return _rotate(query, cos, sin), _rotate(key, cos, sin), value


@torch.compile(dynamic=False)
def _finish(hidden: Tensor, attended: Tensor, output: Tensor, norm: Tensor, feed_forward: tuple[Tensor, ...]) -> Tensor:
    """The residual stream after the output projection and the feed-forward block, [T, HIDDEN_SIZE]."""
    gate, up, down = feed_forward
    hidden = hidden + _linear(attended, output)
    x = F.rms_norm(hidden, (HIDDEN_SIZE,), norm, RMS_EPS)
    return hidden + _linear(F.silu(_linear(x, gate)) * _linear(x, up), down)
