"""CLIP's vision transformer (ViT), LLaVA's frozen vision encoder: g(X_v) in section 4.1 of the
paper.

An image is cut into patches. Each patch becomes a vector, a class token goes in front of them, and
pre-norm transformer blocks let all of them attend to each other (Radford et al., 2021, section
2.4). Parameters have the names of the public CLIP files.

Shapes: N images, P patches, D the hidden size. For CLIP ViT-L/14 at 224 pixels, P = 16 * 16 = 256
and D = 1024.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from .layers import Embedding, LayerNorm, Linear, PatchEmbedding, normal_


@dataclass
class VisionConfig:
    """The size of a vision tower; the defaults are CLIP ViT-L/14's at 224 pixels."""

    image_size: int = 224
    patch_size: int = 14
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    layer_norm_eps: float = 1e-5

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


class VisionEmbeddings(nn.Module):
    """Images to vectors: a linear map of each patch, a class token in front, learned positions."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        D = config.hidden_size
        self.class_embedding = nn.Parameter(normal_(torch.empty(D), D**-0.5))
        self.patch_embedding = PatchEmbedding(D, config.patch_size)
        self.position_embedding = Embedding(config.num_patches + 1, D)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)  # (N, P, D)
        class_token = self.class_embedding.to(patches.dtype).expand(len(images), 1, -1)  # (N, 1, D)
        x = torch.cat([class_token, patches], dim=1)
        return x + self.position_embedding.weight.to(x.dtype)  # (N, 1 + P, D)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(D, D) for _ in range(4))

    def forward(self, x: torch.Tensor, is_causal: bool = False) -> torch.Tensor:
        B, T, D = x.shape
        # a query, a key and a value for each token and head
        q, k, v = (proj(x).view(B, T, self.num_heads, -1).transpose(1, 2)  # (B, heads, T, head_dim)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        # every patch attends to every other; only CLIP's text tower (toy/clip.py) is causal
        attn_out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        return self.out_proj(attn_out.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(quick_gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block. CLIP's text tower has the same, with causal attention."""

    def __init__(self, config):
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, is_causal: bool = False) -> torch.Tensor:
        x = x + self.self_attn(self.layer_norm1(x), is_causal)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """Gives the blocks their public names."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        D, eps = config.hidden_size, config.layer_norm_eps
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = LayerNorm(D, eps)  # the misspelling is that of the public files
        self.encoder = Encoder(config)
        self.post_layernorm = LayerNorm(D, eps)  # for CLIP's own loss; LLaVA does not use it

    def forward(self, images: torch.Tensor, feature_layer: int = -2) -> torch.Tensor:
        """Images (N, 3, H, W) to the output of one block, (N, 1 + P, D), the class token first.

        feature_layer counts from the end: -1 is the last block, -2 the one before it. LLaVA reads
        -2. CLIP's loss reads only the class token of the last block, so that block is not trained
        to describe patches; with -1 the paper loses 0.96 points (table 8). With -2 the last block
        and the final norm never run. They are loaded and saved all the same, so that the files
        stay those of a CLIP.
        """
        x = self.pre_layrnorm(self.embeddings(images))
        num_blocks = len(self.encoder.layers) + 1 + feature_layer  # 23 of 24 for -2
        for block in self.encoder.layers[:num_blocks]:
            x = block(x)
        return x
