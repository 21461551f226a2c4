"""LLaMA, the language model f of section 4.1: RMSNorm, rotary attention, SwiGLU, and a KV cache.

Touvron et al., 2023 (arXiv 2302.13971), section 2.2. It takes embeddings, not tokens, for LLaVA puts
pictures among them. Parameters carry the names of the public LLaMA and Vicuna checkpoints.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from .layers import Embedding, Linear, RMSNorm, linear, recomputed


@dataclass
class LlamaConfig:
    """The size of a language model; the defaults are LLaMA-7B."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # fewer than heads: grouped-query attention; None: as many
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads


def rope_cos_sin(positions: torch.Tensor, config: LlamaConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (B, T) to cosines and sines (B, T, 1, head_dim), always in float32; the first half of the sines is
    negative, as `rotate` wants them.

    Made anew for every call from the positions alone: no buffer that `.to(bfloat16)` could round.
    """
    steps = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None, None] * config.rope_theta ** (-steps / config.head_dim)  # (B, T, 1, head_dim / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn the pair (x[i], x[i + head_dim / 2]) of each head by its angle: the layout of the public weights."""
    cos, sin = (part.to(x.dtype) for part in angles)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)  # (a cos - b sin, b cos + a sin)


class KVCache:
    """Keys and values of each layer, with room for `length` tokens a row: token t of a row stands in slot t."""

    def __init__(self, config: LlamaConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device):
        shape = (batch, config.num_key_value_heads, length, config.head_dim)
        self.layers = [tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in ("keys", "values"))
                       for _ in range(config.num_hidden_layers)]

    def first(self, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The first `length` slots of keys and values of each layer: what `Llama` reads and writes."""
        return [(keys[:, :, :length], values[:, :, :length]) for keys, values in self.layers]


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        D, Q, KV = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.grouped = KV != Q
        self.q_proj = Linear(D, Q * config.head_dim, bias=False)
        self.k_proj = Linear(D, KV * config.head_dim, bias=False)
        self.v_proj = Linear(D, KV * config.head_dim, bias=False)
        self.o_proj = Linear(Q * config.head_dim, D, bias=False)

    def forward(self, x, positions, angles, mask=None, slots=None, wanted=None) -> torch.Tensor:
        """x (B, T, D) at `positions` (B, T). Its keys and values go into `slots`, if given; with a mask (B, 1, T, S)
        those are what x looks at, else it looks at itself, causally. `wanted` (n,): only these of the B * T tokens."""
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, angles), rotate(k, angles)
        if slots is not None:
            rows = torch.arange(B, device=x.device)[:, None]
            for slot, new in zip(slots, (k, v)):
                slot[rows, :, positions] = new
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, head_dim)
        k, v = (k, v) if mask is None else slots
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped)
        return self.o_proj(pick(y.transpose(1, 2).reshape(B, T, -1), wanted))


def pick(x: torch.Tensor, wanted: torch.Tensor | None) -> torch.Tensor:
    """Of the B * T vectors of x (B, T, D) those that are wanted, (n, D), or all, as they are."""
    return x if wanted is None else x.flatten(0, 1).index_select(0, wanted)


class MLP(nn.Module):
    """SwiGLU: a gate decides how much of each hidden feature passes. For the gradients gate and feature are kept; what
    came of them, as large, is cheap to make again."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, H = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, H, bias=False)
        self.up_proj = Linear(D, H, bias=False)
        self.down_proj = Linear(H, D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return recomputed(self.down, self.gate_proj(x), self.up_proj(x))

    def down(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, positions, angles, mask=None, slots=None, wanted=None) -> torch.Tensor:
        seen = self.self_attn(self.input_layernorm(x), positions, angles, mask, slots, wanted)
        x = pick(x, wanted) + seen
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.dtype = None  # of the arithmetic; None: that of the weights
        self.checkpointing = False  # in training, keep only what goes into a block, and compute it twice
        self.model = LlamaModel(config)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        embeds = self.model.embed_tokens(tokens)  # (B, T) -> (B, T, D)
        return embeds.to(self.dtype or embeds.dtype)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return linear(hidden, head.weight)  # (..., D) -> (..., V)

    def forward(self, embeds: torch.Tensor, positions: torch.Tensor | None = None, slots=None, wanted=None):
        """Embeddings (B, T, D) to final hidden states (B, T, D); `logits` turns those into scores.

        Without `positions` the tokens stand at 0..T-1 and each sees those before it; `slots` of a cache, if given,
        are filled. With `positions` (B, T) they go on from those slots: each sees every one up to its own.
        wanted: (n,) of the B * T tokens in reading order, where anybody reads the result. Then it is (n, D), and the
        last block does for the others only what those see of them.
        """
        B, T, _ = embeds.shape
        mask = None
        if positions is None:
            positions = torch.arange(T, device=embeds.device).expand(B, T)
        else:
            there = torch.arange(slots[0][0].shape[2], device=embeds.device)
            unseen = (there > positions[..., None])[:, None]  # (B, 1, T, slots)
            # what attention would make of booleans, in every layer: added to its scores
            mask = embeds.new_zeros(()).masked_fill(unseen, -torch.inf)
        angles = rope_cos_sin(positions, self.config)
        x = embeds
        for number, block in enumerate(self.model.layers, 1):
            last = number == len(self.model.layers)
            where = (positions, angles, mask, slots[number - 1] if slots else None, wanted if last else None)
            x = recomputed(block, x, *where) if self.checkpointing else block(x, *where)
        return self.model.norm(x)
