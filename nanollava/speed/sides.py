"""The model of the benchmark, and how nanollava and transformers train it and generate with it.

Each side opens a folder and returns a function to measure.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..conversation import IGNORE_INDEX
from ..data import Batch, collate
from ..infra import distributed
from ..infra.device import compile_blocks, pick_compute_dtype
from ..llama import LlamaConfig
from ..llava import Llava, LlavaConfig
from ..training import adamw, forward_backward, freeze, recompute_swiglu
from ..vision import VisionConfig

CONFIG = LlavaConfig(
    VisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                 num_attention_heads=12),
    LlamaConfig(hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
                num_attention_heads=12))
ROWS, TOKENS, TARGETS = 4, CONFIG.tokens_per_image + 68, 34  # of a training step; targets of a row
NEW_TOKENS = 64  # to generate


@dataclass
class Side:
    training_step: Callable  # (folder, dtype, device, stage) -> step() -> loss
    generator: Callable  # (folder, dtype, device) -> generate(number of new tokens)


def make_batch() -> Batch:
    """The rows of one step, always the same."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, CONFIG.text.vocab_size, (ROWS, TOKENS), generator=random)
    tokens[:, 1 : 1 + CONFIG.tokens_per_image] = CONFIG.image_token_id
    labels = tokens.clone()
    labels[:, :-TARGETS] = IGNORE_INDEX
    images = torch.randint(256, (ROWS, 3, CONFIG.image_size, CONFIG.image_size),
                           dtype=torch.uint8, generator=random)
    rows = zip(tokens.tolist(), labels.tolist(), images[:, None])  # one image a row
    return collate(list(rows), CONFIG.image_token_id)


def training_step(folder: Path, dtype: torch.dtype, device: str, stage: int,
                  compiled: bool = False) -> Callable:
    """Our training step, as train.py takes it."""
    batch = [make_batch()]  # one micro-batch
    model = Llava.from_pretrained(folder, torch.float32)
    freeze(model, stage)
    model.compute_dtype = pick_compute_dtype(dtype, device)
    recompute_swiglu(model.language_model)
    if compiled:
        compile_blocks(model)
    distributed.shard_model(model, model.language_model.model.layers, model.compute_dtype, device)
    (optimizer,) = adamw(model, 1e-4)

    def step() -> torch.Tensor:
        loss, _ = forward_backward(model, batch, device)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def transformers_training_step(folder: Path, dtype: torch.dtype, device: str,
                               stage: int) -> Callable:
    """The same step in transformers."""
    from transformers import LlavaForConditionalGeneration

    tokens, labels, images, *_ = make_batch().to(device)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model = model.to(device).train()
    model.requires_grad_(False)
    # linear_2 is the identity that the public layout adds to our linear projector
    model.model.multi_modal_projector.linear_1.requires_grad_(True)
    model.model.language_model.requires_grad_(stage == 2)
    model.lm_head.requires_grad_(stage == 2)
    for weight in model.parameters():
        weight.data = weight.data if weight.requires_grad else weight.data.to(dtype)
    (optimizer,) = adamw(model, 1e-4)

    def step() -> torch.Tensor:
        with torch.autocast(device.partition(":")[0], dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=tokens, pixel_values=images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def generator(folder: Path, dtype: torch.dtype, device: str, compiled: bool = False) -> Callable:
    """Our generation of new tokens for one row."""
    tokens, _, images, *_ = make_batch().to(device)
    model = Llava.from_pretrained(folder, dtype, device)
    model.compute_dtype = pick_compute_dtype(dtype, device)
    if compiled:
        compile_blocks(model)
    return lambda new: list(model.generate(tokens[:1], images[:1], max_new_tokens=new))


def transformers_generator(folder: Path, dtype: torch.dtype, device: str) -> Callable:
    """The same generation in transformers."""
    from transformers import LlavaForConditionalGeneration

    tokens, _, images, *_ = make_batch().to(device)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()
    model.generation_config.eos_token_id = None  # on neither side does a stop token end a row
    inputs = dict(input_ids=tokens[:1], pixel_values=images[:1].to(dtype),
                  attention_mask=torch.ones_like(tokens[:1]))
    return lambda new: model.generate(**inputs, max_new_tokens=new, do_sample=False)
