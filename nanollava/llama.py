"""LLaMA, the language model f of section 4.1: RMSNorm, rotary attention, SwiGLU, a KV cache.

Touvron et al., 2023 (arXiv 2302.13971), section 2.2. The input is embeddings, not tokens, because
LLaVA puts image features among them. Parameters have the names of the public LLaMA and Vicuna
files.

Shapes: B rows, T tokens, D the hidden size, S the slots of the cache that are read, V the
vocabulary. For Vicuna-7B, D = 4096 = 32 heads of 128, and V = 32000.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from .infra.device import slot_multiple
from .layers import Embedding, Linear, RMSNorm, linear


@dataclass
class LlamaConfig:
    """The size of a language model; the defaults are LLaMA-7B's."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: one for each query head
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads


class KVCache:
    """Keys and values of all layers: each token is computed once. Token t of a row is in slot t.

    Rows may have different lengths: they are padded on the right, and the next token of a row
    overwrites its first padding slot. Two prompts, then one token each:

        slot       0    1    2    3    4
        row 0     BOS  the  cat  is   new      lengths 4, then 5
        row 1     BOS  hi   new  pad   -       lengths 2, then 3; slot 3 is masked until it is used
    """

    def __init__(self, config: LlamaConfig, batch_size: int, max_length: int, dtype: torch.dtype,
                 device: torch.device | str):
        self.multiple = slot_multiple(device)
        num_slots = self.round_up(max_length)
        shape = (batch_size, config.num_key_value_heads, num_slots, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)  # tokens of a row
        self.num_slots = 0  # the longest row; a plain number, so that reading it needs no GPU sync
        self.num_read = 0  # slots that attention reads: the mask hides those that are empty

    def reserve(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Reserve slots for num_tokens (T) more in each row: positions (B, T) and attention mask.

        The mask (B, 1, T, S) is added to the attention scores. It is None if nothing is to hide:
        for an empty cache, where causal attention among the T tokens is all there is, and for the
        next token of a single row, which attends to all slots.
        """
        was_empty = self.num_slots == 0
        steps = torch.arange(num_tokens, device=self.lengths.device)
        positions = self.lengths[:, None] + steps  # (B, T)
        self.lengths = self.lengths + num_tokens
        self.num_slots += num_tokens
        self.num_read = self.num_slots
        if was_empty:
            return positions, None
        self.num_read = self.round_up(self.num_slots)
        if positions.numel() == 1 and self.multiple == 1:
            return positions, None
        key_positions = torch.arange(self.num_read, device=positions.device)  # (S,)
        future = (key_positions > positions[..., None])[:, None]  # (B, 1, T, S)
        zero = torch.zeros((), dtype=self.keys[0].dtype, device=positions.device)
        return positions, zero.masked_fill(future, -torch.inf)

    @property
    def max_length(self) -> int:
        return self.keys[0].shape[2]

    def num_bytes(self, max_length: int | None = None) -> int:
        """Bytes of keys and values, now or with room for rows of max_length tokens."""
        rows, heads, slots, head_dim = self.keys[0].shape
        slots = slots if max_length is None else max_length
        return 2 * len(self.keys) * rows * heads * slots * head_dim * self.keys[0].itemsize

    def grow(self, max_length: int) -> None:
        """Make room for rows of max_length tokens; what is in the cache stays."""
        num_slots = self.round_up(max_length)
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):  # one at a time, to save memory
                # if memory is full in the middle, the next call finds each as it is
                missing = max(0, num_slots - tensor.shape[2])
                tensors[layer] = F.pad(tensor, (0, 0, 0, missing)) if missing else tensor

    def round_up(self, length: int) -> int:
        return -(-length // self.multiple) * self.multiple

    def truncate(self, lengths: torch.Tensor) -> None:
        """Keep the first `lengths` (B,) tokens of each row; the other slots are free again."""
        self.num_slots = int(lengths.max())
        self.lengths = lengths.to(self.lengths.device)

    def replace_rows(self, keep: list[int], other: "KVCache") -> None:
        """Keep the rows `keep`, in this order, and put the rows of another cache below them."""
        self.lengths = torch.cat([self.lengths[keep], other.lengths])
        self.num_slots = max(self.lengths.tolist(), default=0)
        width = self.round_up(self.num_slots)
        for cache in (self, other):
            cache.grow(width)
        for ours, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for layer, (old, new) in enumerate(zip(ours, theirs)):  # one at a time, to save memory
                ours[layer] = torch.cat([old[:, :, :width][keep], new[:, :, :width]])

    def layer(self, number: int, positions: torch.Tensor) -> "LayerCache":
        """The keys and values of one layer, for the tokens at `positions`."""
        keys, values = self.keys[number], self.values[number]
        return LayerCache(keys[:, :, : self.num_read], values[:, :, : self.num_read], positions)


class LayerCache(NamedTuple):
    """One layer's part of a KVCache: the slots that are read. `update` writes into the KVCache."""

    keys: torch.Tensor  # (B, heads, S, head_dim)
    values: torch.Tensor
    positions: torch.Tensor  # (B, T), the slots of the next T tokens

    def update(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k and v (B, heads, T, head_dim); return the keys and values in use."""
        rows = torch.arange(len(k), device=k.device)[:, None]  # (B, 1), goes with positions (B, T)
        # the indexed dimensions come first: (B, T, heads, head_dim)
        self.keys[rows, :, self.positions] = k.transpose(1, 2)
        self.values[rows, :, self.positions] = v.transpose(1, 2)
        return self.keys, self.values


def rope_cos_sin(positions: torch.Tensor, config: LlamaConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (B, 1, T, head_dim) of the rotary angles at positions (B, T), in float32.

    They are computed from the positions at every call: a buffer could be cast to bfloat16 by
    accident.
    """
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = config.rope_theta ** (-pairs / config.head_dim)  # (head_dim / 2,)
    angles = positions[:, None, :, None] * frequencies  # (B, 1, T, head_dim / 2)
    angles = torch.cat([angles, angles], dim=-1)  # both halves of a head turn by the same angles
    return angles.cos(), angles.sin()


def apply_rotary_emb(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x (B, heads, T, head_dim): the pair (x[i], x[i + head_dim / 2]) turns by angle i.

    The public weights pair the two halves of a head, not neighbors as in the rotary paper.
    """
    first, second = x.chunk(2, dim=-1)
    rotated_by_90 = torch.cat([-second, first], dim=-1)
    return x * cos + rotated_by_90 * sin


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        D, H, KV = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.grouped = KV != H  # grouped-query attention: several query heads share a key head
        self.q_proj = Linear(D, H * config.head_dim, bias=False)
        self.k_proj = Linear(D, KV * config.head_dim, bias=False)
        self.v_proj = Linear(D, KV * config.head_dim, bias=False)
        self.o_proj = Linear(H * config.head_dim, D, bias=False)

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor],
                mask: torch.Tensor | None = None, cache: LayerCache | None = None) -> torch.Tensor:
        """x (B, T, D) to (B, T, D). Without a mask, attention is causal among the T tokens, and a
        single token attends to the whole cache."""
        B, T, _ = x.shape
        # a query, a key and a value for each token and head
        q, k, v = (proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, heads, T, head_dim)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        # rotate queries and keys by their positions: a score then depends on the distance alone
        q, k = apply_rotary_emb(q, *rope), apply_rotary_emb(k, *rope)
        # with a cache, the keys and values of earlier tokens come before the new ones
        if cache is not None:
            k, v = cache.update(k, v)  # (B, heads, S, head_dim)
        # softmax(q k^T / sqrt(head_dim) + mask) v
        # a single token has nothing after it; torch.compile needs a plain bool here, not `T > 1`
        is_causal = mask is None if T > 1 else False
        attn_out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=self.grouped)
        # join the heads and mix them
        return self.o_proj(attn_out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2020): a gate scales each hidden feature."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, H = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, H, bias=False)
        self.up_proj = Linear(D, H, bias=False)
        self.down_proj = Linear(H, D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor],
                mask: torch.Tensor | None = None, cache: LayerCache | None = None,
                keep: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, T, D) to (B, T, D), or to (n, D) if only n of the B * T tokens are kept."""
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        # attention needs every token; the MLP treats each token separately, so the rest can go
        if keep is not None:
            x = x.flatten(0, 1)[keep]
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """Gives the parameters their public names."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(tokens)  # (B, T) -> (B, T, D)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return linear(hidden, head.weight)  # (..., D) -> (..., V)

    def forward(self, embeds: torch.Tensor, cache: KVCache | None = None,
                keep: torch.Tensor | None = None) -> torch.Tensor:
        """Embeddings (B, T, D) to final hidden states (B, T, D); `logits` turns those into scores.

        With a cache, the T tokens of a row follow those that the cache holds, and are added to it.
        keep: (n,) indices into the B * T tokens, in reading order. Training needs the output only
        at the positions before an answer token, generation only at the last one. The result is
        then (n, D), and the last block computes its MLP for them alone.
        """
        B, T, _ = embeds.shape
        if cache is None:
            positions, mask = torch.arange(T, device=embeds.device).expand(B, T), None
        else:
            positions, mask = cache.reserve(T)
        # the angles are exact; their cosines and sines are cast once, for all layers
        cos, sin = rope_cos_sin(positions, self.config)
        rope = cos.to(embeds.dtype), sin.to(embeds.dtype)
        x, last = embeds, len(self.model.layers) - 1
        for number, block in enumerate(self.model.layers):
            layer_cache = None if cache is None else cache.layer(number, positions)
            x = block(x, rope, mask, layer_cache, keep if number == last else None)
        return self.model.norm(x)
