"""The toy world's CLIP: a ViT and a text transformer trained together (Radford et al., 2021).

Two contrastive losses train it. The first is CLIP's own: an image belongs to its caption. The
second does the same for patches, as GLIP does for regions (Li et al., 2022): the features of a
patch, at the layer that LLaVA reads, belong to the caption of the one thing on it. A public CLIP
learns what is on its patches from 400 million images. Here the second loss makes up for the small
number of images: with so few, the first alone teaches much about an image as a whole and little
about its parts.

Shapes: N images of P patches, D the hidden size of a tower, E the size of the shared space.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from ..image import preprocess
from ..infra.resume import Checkpoints
from ..infra.run_log import Run
from ..tokenizer import Tokenizer
from ..training import train
from ..vision import Encoder, VisionConfig, VisionTower
from ..weights import hf_config, hf_format, processor, safetensors_io
from . import scene
from .muon import muon
from .questions import CAPTION_STYLES, caption
from .scene import Box, Scene, Thing

VISION_CONFIG = VisionConfig(
    image_size=scene.IMAGE_SIZE, patch_size=16, hidden_size=128, intermediate_size=512,
    num_hidden_layers=5, num_attention_heads=4)
TEXT_CONFIG = VisionConfig(  # a CLIP's text tower has the same blocks as its vision tower
    hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=3)
MAX_CAPTION_LENGTH = 96  # tokens
EMBED_SIZE = 128  # E
SAVE_EVERY = 100  # steps between two checkpoints of stage 0


# ---------------------------------------------------------------------------------------------
# The model


class TextTower(nn.Module):
    """CLIP's text transformer. Its blocks are causal; the last token stands for the caption."""

    def __init__(self, config: VisionConfig, vocab_size: int, max_length: int):
        super().__init__()
        self.embeddings = nn.ModuleDict({
            "token_embedding": nn.Embedding(vocab_size, config.hidden_size),
            "position_embedding": nn.Embedding(max_length, config.hidden_size)})
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Captions (N, T), padded on the right, and their lengths (N,), to vectors (N, D)."""
        positions = self.embeddings["position_embedding"].weight[: tokens.shape[1]]  # (T, D)
        x = self.embeddings["token_embedding"](tokens) + positions  # (N, T, D)
        for block in self.encoder.layers:
            x = block(x, is_causal=True)
        last = x[torch.arange(len(x), device=x.device), lengths - 1]  # (N, D), end of text
        return self.final_layer_norm(last)


class Clip(nn.Module):
    """A vision and a text tower that map an image and its caption to nearby vectors.

    Parameters have the names of the public CLIP.
    """

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.end_of_text = len(tokenizer)  # a token of its own, the first id past the vocabulary
        self.vision_model = VisionTower(VISION_CONFIG)
        self.text_model = TextTower(TEXT_CONFIG, len(tokenizer) + 1, MAX_CAPTION_LENGTH)
        self.visual_projection = nn.Linear(VISION_CONFIG.hidden_size, EMBED_SIZE, bias=False)
        self.text_projection = nn.Linear(TEXT_CONFIG.hidden_size, EMBED_SIZE, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        for embedding in self.text_model.embeddings.values():
            nn.init.normal_(embedding.weight, std=0.1)
        self.vision_model.embeddings.position_embedding.weight.data = sincos_pos_embed()

    def encode_image(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (N, 3, H, W) to unit vectors: the images' (N, E), and their patches' (N, P, E)."""
        x = self.vision_model(images, feature_layer=-2)  # (N, 1 + P, D); LLaVA reads the patches
        class_token = self.vision_model.encoder.layers[-1](x)[:, 0]  # (N, D)
        return self.project(class_token), self.project(x[:, 1:])

    def project(self, x: torch.Tensor) -> torch.Tensor:
        x = self.visual_projection(self.vision_model.post_layernorm(x))  # (..., D) -> (..., E)
        return F.normalize(x, dim=-1)

    def encode_text(self, captions: list[str]) -> torch.Tensor:
        """N captions to unit vectors (N, E)."""
        rows = [self.tokenizer.encode(text) + [self.end_of_text] for text in captions]
        tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)  # (N, T)
        lengths, device = torch.tensor([len(row) for row in rows]), self.logit_scale.device
        x = self.text_projection(self.text_model(tokens.to(device), lengths.to(device)))
        return F.normalize(x, dim=-1)


def sincos_pos_embed() -> torch.Tensor:
    """Initial positions (1 + P, D): sines and cosines of row and column, 0 for the class token.

    Neighbors start with similar vectors, so that the model learns places in half the steps that
    random vectors take.
    """
    grid, count = math.isqrt(VISION_CONFIG.num_patches), VISION_CONFIG.hidden_size // 4
    frequencies = math.pi / 2 * (1 / 8) ** (torch.arange(count) / (count - 1))
    angles = torch.arange(grid)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, D / 2)
    patches = torch.cat([axis.repeat_interleave(grid, dim=0), axis.repeat(grid, 1)], dim=1)
    return 0.5 * F.pad(patches, (0, 0, 1, 0))  # (P, D) -> (1 + P, D)


def contrastive_loss(
    clip: Clip, embeds: torch.Tensor, scenes: Sequence[Scene], style: int) -> torch.Tensor:
    """CLIP's symmetric loss for the embeddings (N, E) of images or patches of N scenes.

    Each embedding must find its caption among all captions of the batch, and each caption its
    embedding. Equal scenes share one caption, whose target is spread over their embeddings.
    """
    numbers = {things: number for number, things in enumerate(dict.fromkeys(scenes))}
    captions = clip.encode_text([caption(things, style) for things in numbers])  # (M, E)
    logits = clip.logit_scale.exp() * embeds @ captions.T  # (N, M)
    classes = torch.tensor([numbers[things] for things in scenes], device=embeds.device)
    matches = F.one_hot(classes, len(numbers)).float()  # (N, M)
    image_loss = F.cross_entropy(logits, matches)
    text_loss = F.cross_entropy(logits.T, matches.T / matches.sum(dim=0)[:, None])
    return (image_loss + text_loss) / 2


# ---------------------------------------------------------------------------------------------
# The data


def draw_batch(seed: int, step: int, batch_size: int) -> tuple:
    """Images (N, 3, H, W), their scenes, some of their patches, and the style of all captions.

    A patch is (row of the image, number of the patch, scene on the patch).
    A batch depends on seed and step alone, so that a resumed run sees the same batches.
    """
    rng = random.Random(f"{seed} {step}")
    scenes, style = draw_scenes(rng, batch_size), rng.randrange(CAPTION_STYLES)
    boxes = [scene.random_boxes(things, rng) for things in scenes]
    images = [scene.draw_image(*pair, rng) for pair in zip(scenes, boxes)]
    pixels = torch.stack([preprocess(image, scene.IMAGE_SIZE) for image in images])
    patches = [(row, *patch) for row, pair in enumerate(zip(scenes, boxes))
               for patch in sample_patches(*pair, rng)]
    return pixels, scenes, patches, style


def draw_scenes(rng: random.Random, count: int) -> list[Scene]:
    """Training scenes, half of them in groups of about four that are hard to tell apart."""
    scenes, stream = [], scene.random_scenes(rng)
    while len(scenes) < count // 2:
        things = next(stream)
        similar = [change_one_attribute(things, rng) for _ in range(3)]
        scenes += [things, *(other for other in similar if not scene.is_validation_scene(other))]
    return scenes + list(islice(stream, count - len(scenes)))


def change_one_attribute(things: Scene, rng: random.Random) -> Scene:
    """The same scene, except for the kind, color, size or place of one thing."""
    index = rng.randrange(len(things))
    attribute = rng.choice(("kind", "kind", "color", "cell", "size"))
    values = {"kind": scene.KINDS, "color": scene.COLORS, "size": scene.SIZES, "cell": range(9)}
    # a thing may get a color that another thing has, but not its place
    compared = things if attribute == "cell" else things[index : index + 1]
    taken = [getattr(thing, attribute) for thing in compared]
    value = rng.choice([value for value in values[attribute] if value not in taken])
    changed = replace(things[index], **{attribute: value})
    return tuple(sorted((*things[:index], changed, *things[index + 1 :])))


def things_on_patches(things: Scene, boxes: list[Box]) -> list[Thing | None]:
    """For each patch, in reading order, the thing whose box covers a third of it, or None."""
    found, side = [], VISION_CONFIG.patch_size
    for patch_top in range(0, VISION_CONFIG.image_size, side):
        for patch_left in range(0, VISION_CONFIG.image_size, side):
            found.append(None)
            for thing, (left, top, width, height) in zip(things, boxes):
                overlap_x = min(left + width, patch_left + side) - max(left, patch_left)
                overlap_y = min(top + height, patch_top + side) - max(top, patch_top)
                if min(overlap_x, overlap_y) > 0 and overlap_x * overlap_y > side * side / 3:
                    found[-1] = thing
    return found


def sample_patches(
    things: Scene, boxes: list[Box], rng: random.Random) -> list[tuple[int, Scene]]:
    """One patch for each thing, and one for the background: its number, and what is on it."""
    on_patches, sampled = things_on_patches(things, boxes), []
    for thing in (*things, None):
        numbers = [number for number, other in enumerate(on_patches) if other is thing]
        sampled.append((rng.choice(numbers), (thing,) if thing else ()))
    return sampled


# ---------------------------------------------------------------------------------------------
# Training


def forward_backward(clip: Clip, batch: tuple, device) -> tuple[torch.Tensor, int]:
    """Add to the gradients; return the loss and the number of image tokens."""
    images, scenes, patches, style = batch
    with torch.no_grad():
        clip.logit_scale.clamp_(max=math.log(100))  # as CLIP does, for stability
    image_embeds, patch_embeds = clip.encode_image(images.to(device))  # (N, E), (N, P, E)
    rows, numbers, patch_scenes = zip(*patches)
    loss = (contrastive_loss(clip, image_embeds, scenes, style)
            + contrastive_loss(clip, patch_embeds[rows, numbers], patch_scenes, style))
    loss.backward()
    return loss.detach(), len(images) * VISION_CONFIG.num_patches


def train_clip(folder: Path, tokenizer: Tokenizer, seed: int, device: str,
               steps: int = 2500, batch_size: int = 128) -> None:
    """Train the toy CLIP, with new scenes in every step, and save it in bfloat16."""
    torch.manual_seed(seed)
    clip = Clip(tokenizer).to(device)
    optimizers = muon(clip, lr=3e-3)
    settings = dict(seed=seed, steps=steps, batch_size=batch_size)
    checkpoints = Checkpoints(folder / "resume", clip, optimizers, settings)
    run = Run("toy CLIP", steps, checkpoints, save_every=SAVE_EVERY)
    batches = (draw_batch(seed, step, batch_size) for step in range(run.start, steps))
    train(run, clip, batches, optimizers, forward_backward)
    save_clip(clip, folder)
    checkpoints.clear()


def save_clip(clip: Clip, folder: Path) -> None:
    """Write config.json and bfloat16 safetensors in the public layout, and the tokenizer."""
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "layer_norm_eps")
    config = {
        "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": EMBED_SIZE,
        "vision_config": hf_config.clip_json(vars(VISION_CONFIG)),
        "text_config": {
            "model_type": "clip_text_model", "hidden_act": "quick_gelu",
            **{key: getattr(TEXT_CONFIG, key) for key in sizes},
            "vocab_size": clip.end_of_text + 1, "max_position_embeddings": MAX_CAPTION_LENGTH,
            "bos_token_id": None, "eos_token_id": clip.end_of_text},
    }
    tensors = {name: tensor.bfloat16() for name, tensor in clip.state_dict().items()}
    made = processor.clip_files(clip.tokenizer, VISION_CONFIG.image_size, MAX_CAPTION_LENGTH)
    hf_format.save_folder(folder, config, tensors, [clip.tokenizer.path], made)


def load_clip(folder: Path) -> Clip:
    """A CLIP that `save_clip` wrote, in float32."""
    clip = Clip(Tokenizer(folder))
    tensors = safetensors_io.read_tensors(folder)
    safetensors_io.load_strict(clip, tensors, folder, torch.float32, "cpu")
    return clip


@torch.no_grad()
def clip_accuracy(clip: Clip, rng: random.Random, count: int) -> float:
    """Percent of validation images whose own caption is the nearest of 32.

    Eight of the other captions differ in one attribute; the rest are of random scenes.
    """
    correct, device = 0, clip.logit_scale.device
    validation, training = scene.random_scenes(rng, validation=True), scene.random_scenes(rng)
    for things in islice(validation, count):
        scenes = [things, *(change_one_attribute(things, rng) for _ in range(8))]
        scenes += islice(training, 32 - len(scenes))
        image = scene.draw_image(things, scene.random_boxes(things, rng), rng)
        image_embeds, _ = clip.encode_image(preprocess(image, scene.IMAGE_SIZE)[None].to(device))
        captions = clip.encode_text([caption(other, 0) for other in scenes])  # (32, E)
        best = int((captions @ image_embeds[0]).argmax())
        correct += scenes[best] == things
    return 100 * correct / count
