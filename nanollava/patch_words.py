"""Patches as words: the vocabulary's words that are nearest to an image feature.

The projector maps what the ViT sees into the space of the LLM's word embeddings (equation 1). So a
projected patch can be compared with the embeddings of words.
"""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from .llava import Llava
from .tokenizer import Tokenizer

NUM_WORDS = 5  # nearest words of a patch
NUM_UNTRAINED = 8  # untrained projectors that say which cosines are chance


def word_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """{word: token} of the vocabulary: pieces that begin a word, in lower case if there is one."""
    words = {}
    for token in range(len(tokenizer)):
        piece = tokenizer.piece(token)
        word = piece.replace("▁", " ").strip()
        if piece.startswith("▁") and len(word) > 1 and any(map(str.isalpha, word)):
            if word.lower() == word or word.lower() not in words:
                words[word.lower()] = token
    return words


def nearest_words(model: Llava, tokenizer: Tokenizer, features: torch.Tensor,
                  count: int = NUM_WORDS) -> list[list[tuple[str, float]]]:
    """For each of P vectors (P, D) of the LLM's space, the words with the nearest embeddings.

    Near is a large cosine, after the mean embedding is subtracted from both: all embeddings share
    a direction that means nothing.
    """
    words = word_tokens(tokenizer)
    table = model.language_model.model.embed_tokens.weight
    mean = table.mean(dim=0, dtype=torch.float32)  # (D,)
    centered = F.normalize(features.to(table.device).float() - mean, dim=-1)
    cosines = []  # of 4096 words at a time: a copy of all embeddings in float32 would be large
    for tokens in torch.tensor(list(words.values()), device=table.device).split(4096):
        embeds = F.normalize(table[tokens].float() - mean, dim=-1)  # (4096, D)
        cosines.append(centered @ embeds.T)
    return top_words(torch.cat(cosines, dim=-1), list(words).__getitem__, count)


def near_cosine(model: Llava, tokenizer: Tokenizer, pixels: torch.Tensor) -> float:
    """The cosine that the nearest word of a patch exceeds in one of 20 cases by chance: with
    projectors that were not trained, on this image."""
    patches = view_patches(model, pixels, model.config.feature_layer)
    best = []
    for seed in range(NUM_UNTRAINED):
        features = untrained_projector(model, seed)(patches)[0]  # (P, D)
        best += [row[0][1] for row in nearest_words(model, tokenizer, features, 1)]
    return float(torch.tensor(best).quantile(0.95))


def view_patches(model: Llava, pixels: torch.Tensor, layer: int) -> torch.Tensor:
    """The ViT's patches (1, P, D_vision) at a layer, without the class token."""
    return model.vision_tower(pixels.to(model.device, model.dtype), layer)[:, 1:]


def untrained_projector(model: Llava, seed: int) -> nn.Module:
    """An untrained projector of the model's type."""
    torch.manual_seed(seed)
    fresh = type(model.multi_modal_projector)(model.config.vision, model.config.text.hidden_size)
    return fresh.to(model.device)


def top_words(scores: torch.Tensor, name: Callable, count: int) -> list[list[tuple[str, float]]]:
    """For scores (N, V), the names of the `count` largest in each of N rows, with the scores."""
    best = scores.topk(min(count, scores.shape[1]), dim=-1)
    return [[(name(index), value) for index, value in zip(*row)]
            for row in zip(best.indices.tolist(), best.values.tolist())]
