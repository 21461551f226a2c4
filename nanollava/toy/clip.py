"""The toy world's CLIP: a ViT and a reader of captions, trained to agree (Radford et al., 2021).

Two contrasts teach it. CLIP's own: a picture belongs to its caption. And a small one besides, as GLIP does it for
regions (Li et al., 2022): a patch, where LLaVA reads it, belongs to the caption of the one thing on it. A public CLIP
has seen 400 million pictures, and its patches came to know what is on them; here the second contrast takes the place
of the many pictures, for in a few minutes the first alone teaches the whole and little of the parts.
"""

import math
import random
from itertools import islice
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..data import collate
from ..image import preprocess
from ..infra.resume import Checkpoints
from ..tokenizer import Tokenizer
from ..training import fit
from ..vision import Encoder, VisionConfig, VisionTower
from ..weights import hf_format
from . import questions, scene
from .muon import muon

VISION = VisionConfig(image_size=scene.PICTURE_SIZE, patch_size=16, hidden_size=128, intermediate_size=512,
                      num_hidden_layers=5, num_attention_heads=4)
SIZE = 128  # of the space where pictures and captions meet
GRID = VISION.image_size // VISION.patch_size  # patches a side
SAVE_EVERY = 100  # steps; stage 0 goes on where it was stopped


class TextEmbeddings(nn.Module):
    def __init__(self, vocab_size: int, length: int, size: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, size)
        self.position_embedding = nn.Embedding(length, size)


class TextTower(nn.Module):
    """CLIP's reader of captions: causal blocks, and what the end-of-text token has seen at the last of them."""

    def __init__(self, config: VisionConfig, vocab_size: int, length: int):
        super().__init__()
        self.config, self.vocab_size, self.length = config, vocab_size, length
        self.embeddings = TextEmbeddings(vocab_size, length, config.hidden_size)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Captions (N, T), each ending at its length (N,) with the end-of-text token, to vectors (N, D)."""
        x = self.embeddings.token_embedding(tokens) + self.embeddings.position_embedding.weight[: tokens.shape[1]]
        for block in self.encoder.layers:
            x = block(x, is_causal=True)
        return self.final_layer_norm(x[torch.arange(len(x), device=x.device), lengths - 1])


class Clip(nn.Module):
    """Two towers that agree on which caption belongs to which picture. Names as in the public CLIP."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.end_of_text = len(tokenizer)  # one past the vocabulary
        self.tokenizer = tokenizer
        text = VisionConfig(hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=3)
        self.vision_model = VisionTower(VISION)
        self.text_model = TextTower(text, len(tokenizer) + 1, length=96)
        self.visual_projection = nn.Linear(VISION.hidden_size, SIZE, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, SIZE, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.text_model.embeddings.token_embedding.weight, std=0.1)
        nn.init.normal_(self.text_model.embeddings.position_embedding.weight, std=0.1)
        with torch.no_grad():
            self.vision_model.embeddings.position_embedding.weight.copy_(waves(GRID, VISION.hidden_size))

    def see(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures (N, 3, H, W) to unit vectors: what the whole shows, (N, size), and each patch, (N, P, size)."""
        x = self.vision_model(images, layer=-2)  # (N, 1 + P, D), what LLaVA reads
        whole = self.vision_model.encoder.layers[-1](x)[:, 0]
        return self.project(whole), self.project(x[:, 1:])

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.visual_projection(self.vision_model.post_layernorm(x)), dim=-1)

    def read(self, captions: list[str]) -> torch.Tensor:
        """Captions to unit vectors (N, size)."""
        rows = [self.tokenizer.encode(text) + [self.end_of_text] for text in captions]
        tokens, _, _ = collate([(row, row, []) for row in rows])  # (N, T)
        lengths, device = torch.tensor([len(row) for row in rows]), self.logit_scale.device
        return F.normalize(self.text_projection(self.text_model(tokens.to(device), lengths.to(device))), dim=-1)

    def save(self, folder: Path) -> None:
        text = {key: getattr(self.text_model.config, key) for key in
                ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps")}
        config = {
            "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": self.visual_projection.out_features,
            "vision_config": hf_format.clip_json(vars(VISION)),
            "text_config": {"model_type": "clip_text_model", "hidden_act": "quick_gelu", **text,
                            "vocab_size": self.text_model.vocab_size, "max_position_embeddings": self.text_model.length,
                            "eos_token_id": self.end_of_text},
        }
        hf_format.write(folder, config, {name: tensor.bfloat16() for name, tensor in self.state_dict().items()},
                         [self.tokenizer.path])


def load_clip(folder: Path) -> Clip:
    """What `Clip.save` wrote, in float32."""
    clip = Clip(Tokenizer(folder))
    hf_format.load(clip, hf_format.read_tensors(folder), folder, torch.float32, "cpu")
    return clip


def waves(grid: int, size: int) -> torch.Tensor:
    """Positions (1 + grid * grid, size) to begin with: sines and cosines of row and column, zero for the class token.

    Neighbours start alike, and place is learned in half the time that random positions take.
    """
    count = size // 4
    frequencies = math.pi / 2 * (1 / 8) ** (torch.arange(count) / (count - 1))
    angles = torch.arange(grid)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, size / 2)
    plane = torch.cat([line[:, None].expand(grid, grid, -1), line[None].expand(grid, grid, -1)], dim=-1)
    return 0.5 * torch.cat([torch.zeros(1, size), plane.flatten(0, 1)])


def nearly(things, rng: random.Random):
    """The same scene but for one kind, color, size or place."""
    number, attribute = rng.randrange(len(things)), rng.choice(("kind", "kind", "color", "cell", "size"))
    values = {"kind": scene.KINDS, "color": scene.COLORS, "size": scene.SIZES, "cell": range(9)}[attribute]
    taken = [getattr(thing, attribute) for thing in (things if attribute == "cell" else things[number : number + 1])]
    changed = dict(vars(things[number]), **{attribute: rng.choice([value for value in values if value not in taken])})
    changed_scene = (*things[:number], scene.Thing(**changed), *things[number + 1 :])
    return tuple(sorted(changed_scene, key=lambda thing: thing.cell))


def clip_scenes(rng: random.Random, count: int) -> list[tuple[scene.Thing, ...]]:
    """Scenes to train on, half of them in groups of about four that are nearly the same: hard to tell apart."""
    scenes, drawn = [], scene.scenes(rng)
    while len(scenes) < count // 2:
        one = next(drawn)
        scenes += [one, *(other for other in (nearly(one, rng) for _ in range(3)) if not scene.is_held_out(other))]
    return scenes + [next(drawn) for _ in range(count - len(scenes))]


def picture(things, placed, rng: random.Random) -> torch.Tensor:
    return preprocess(scene.draw(things, placed, rng), VISION.image_size)


def on_patches(things, placed) -> list[scene.Thing | None]:
    """For each patch in reading order the thing that covers a third of it, if one does."""
    shown, side = [], VISION.patch_size
    for top in range(0, VISION.image_size, side):
        for left in range(0, VISION.image_size, side):
            shown.append(None)
            for thing, (x, y, width, height) in zip(things, placed):
                across = min(x + width, left + side) - max(x, left)
                down = min(y + height, top + side) - max(y, top)
                if across > 0 and down > 0 and across * down > side * side / 3:
                    shown[-1] = thing
    return shown


def some_patches(things, placed, rng: random.Random) -> list[tuple[int, tuple[scene.Thing, ...]]]:
    """One patch for each thing and one without any: its number, and what is on it as a scene of its own."""
    shown = on_patches(things, placed)
    return [(rng.choice([patch for patch, other in enumerate(shown) if other is thing]), (thing,) if thing else ())
            for thing in (*things, None)]


def contrast(clip: Clip, seen: torch.Tensor, scenes: list[tuple[scene.Thing, ...]], style: int) -> torch.Tensor:
    """CLIP's symmetric loss for unit vectors (N, size) and the scenes that they show.

    A scene that is there several times is told once, and its vectors share what is right.
    """
    number = {scene: n for n, scene in enumerate(dict.fromkeys(scenes))}
    said = clip.read([questions.caption(scene, style) for scene in number])  # (M, size)
    logits = clip.logit_scale.exp() * seen @ said.T  # (N, M)
    right = F.one_hot(torch.tensor([number[scene] for scene in scenes], device=seen.device), len(number)).float()
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right.T / right.sum(dim=0)[:, None])) / 2


def train_clip(folder: Path, tokenizer: Tokenizer, seed: int, device: str, steps=400, batch_size=128) -> None:
    """Train the toy CLIP by the two contrasts on fresh scenes, and save it in bfloat16."""
    torch.manual_seed(seed)
    clip = Clip(tokenizer).to(device)

    def batches(start):
        for step in range(start, steps):
            rng = random.Random(f"{seed} {step}")  # what a step sees depends on its number alone: a run can go on
            scenes, style = clip_scenes(rng, batch_size), rng.randrange(questions.STYLES)
            placed = [scene.boxes(things, rng) for things in scenes]
            images = torch.stack([picture(*pair, rng) for pair in zip(scenes, placed)])
            patches = [(row, patch, shown) for row, pair in enumerate(zip(scenes, placed))
                       for patch, shown in some_patches(*pair, rng)]
            yield images.to(device), scenes, patches, style

    def learn(batch):
        images, scenes, patches, style = batch
        with torch.no_grad():
            clip.logit_scale.clamp_(max=math.log(100))
        whole, parts = clip.see(images)
        rows, numbers, shown = zip(*patches)
        loss = contrast(clip, whole, scenes, style) + contrast(clip, parts[rows, numbers], shown, style)
        loss.backward()
        return loss.detach()

    optimizers = muon(clip, 3e-3)
    checkpoints = Checkpoints(folder / "resume", clip, optimizers, dict(seed=seed, steps=steps, batch_size=batch_size))
    start = checkpoints.load()
    fit("toy CLIP ", learn, batches(start), steps, optimizers, checkpoints=checkpoints, start=start, every=SAVE_EVERY)
    clip.save(folder)
    checkpoints.clear()


@torch.no_grad()
def clip_accuracy(clip: Clip, rng: random.Random, count: int) -> float:
    """Percent of held-out pictures whose own caption is the nearest of 32: a quarter of the others differ in one word,
    the rest belong to any other scenes."""
    right, device, drawn, others = 0, clip.logit_scale.device, scene.scenes(rng, held_out=True), scene.scenes(rng)
    for things in islice(drawn, count):
        scenes = [things, *(nearly(things, rng) for _ in range(8))]
        scenes += islice(others, 32 - len(scenes))
        image = picture(things, scene.boxes(things, rng), rng)[None].to(device)
        scores = clip.read([questions.caption(scene, 0) for scene in scenes]) @ clip.see(image)[0][0]  # (32,)
        right += scenes[int(scores.argmax())] == things
    return 100 * right / count
