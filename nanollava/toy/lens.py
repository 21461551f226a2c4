"""Do patches become words, and does the model look at what it names? Counted in the toy world.

`tour.py` shows the words that are nearest to each patch, and where the model looks while it
answers. In the toy world the truth about each patch is known, so both can be scored. Controls: a
projector that was never trained; the attention maps of another image; a patch chosen at random.
"""

import random
from collections import defaultdict
from itertools import islice
from pathlib import Path
from statistics import mean, stdev

import torch

from ..image import preprocess
from ..infra.cli import format_table
from ..infra.io import InputError
from ..infra.progress import progress
from ..llava import Llava
from ..tokenizer import Tokenizer, open_tokenizer
from ..tour import PROMPT, list_projectors, nearest_words, take_tour, token_text
from .clip import VISION_CONFIG, things_on_patches
from .scene import COLORS, KINDS, Box, Scene, Thing, draw_image, random_boxes, random_scenes

ATTRIBUTES = ("kind", "color", "size", "place")
Example = tuple[Scene, list[Box], object]  # things, their boxes, the image


def draw_examples(count: int, seed: int) -> list[Example]:
    rng = random.Random(f"lens {seed}")
    examples = []
    for things in islice(random_scenes(rng, validation=True), count):
        boxes = random_boxes(things, rng)
        examples.append((things, boxes, draw_image(things, boxes, rng)))
    return examples


def evaluate_lens(run: Path, device: str, count: int,
                  seed: int = 0) -> dict[str, dict[str, dict[str, float]]]:
    """{"words" or "attention": {column: {row: percent}}} of RUN/stage2 and its projectors."""
    folder = run / "stage2"
    model = Llava.from_pretrained(folder, device=device)
    tokenizer = open_tokenizer(folder, model.config)
    examples = draw_examples(count, seed)
    columns = {}
    for name, (owner, projector) in list_projectors(model, folder).items():
        for layer in (-2, -1):
            columns[f"{name}, {layer}"] = score_words(
                model, owner, projector, tokenizer, examples, layer)
    return {"words": columns, "attention": score_attention(model, tokenizer, examples)}


def format_lens(results: list[dict]) -> str:
    """Two tables of the results of several runs: mean, and standard deviation if there are more."""
    tables = []
    for part in ("words", "attention"):
        columns = list(results[0][part])
        rows = [[row, *(format_values([result[part][column][row] for result in results])
                        for column in columns)] for row in results[0][part][columns[0]]]
        tables.append(format_table(["", *columns], rows))
    return "\n\n".join(tables)


def format_values(values: list[float]) -> str:
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}"


# ---------------------------------------------------------------------------------------------
# Patches as words


@torch.no_grad()
def score_words(model: Llava, owner: Llava, projector, tokenizer: Tokenizer,
                examples: list[Example], layer: int) -> dict[str, float]:
    """Percent of the patches on a thing whose five nearest words contain its kind, color, size and
    place; percent of the empty patches whose five nearest words contain a kind."""
    results = defaultdict(list)
    for things, boxes, image in examples:
        pixels = preprocess(image, model.config.image_size)[None].to(model.device)
        features = projector(model.vision_tower(pixels, layer)[:, 1:])[0]  # (P, D)
        touched = touched_patches(boxes)
        for patch, (row, thing) in enumerate(zip(nearest_words(owner, tokenizer, features),
                                                 things_on_patches(things, boxes))):
            words = {word for word, _ in row}
            if thing:
                for attribute in ATTRIBUTES:
                    results[attribute].append(getattr(thing, attribute) in words)
            elif patch not in touched:
                results["a kind, on empty ground"].append(not words.isdisjoint(KINDS))
    return {name: 100 * mean(values) for name, values in results.items()}


def touched_patches(boxes: list[Box]) -> set[int]:
    """The numbers of the patches that a box reaches into."""
    size = VISION_CONFIG.patch_size
    columns = VISION_CONFIG.image_size // size
    return {row * columns + column for left, top, width, height in boxes
            for row in range(top // size, (top + height - 1) // size + 1)
            for column in range(left // size, (left + width - 1) // size + 1)}


# ---------------------------------------------------------------------------------------------
# Attention


def score_attention(model: Llava, tokenizer: Tokenizer,
                    examples: list[Example]) -> dict[str, dict[str, float]]:
    """Of the words of a caption that name a kind or color of one thing alone: percent of those
    whose attention is strongest on that thing. The block is chosen on the first half of the images,
    and scored on the second."""
    found = []  # (half, maps (L, P), patches of the thing, whether it names a kind)
    for number, (things, boxes, image) in enumerate(progress(examples, "attention", "images")):
        tour = take_tour(model, tokenizer, image, PROMPT, max_new_tokens=64)
        answer = tour.tokens[-len(tour.likeliest) :]
        for position, token in enumerate(answer):
            word = token_text(tokenizer, token).strip()
            if thing := named_thing(word, things):
                patches = touched_patches([boxes[things.index(thing)]])
                found.append((number < len(examples) // 2, tour.attention[:, position], patches,
                              word in KINDS))
    columns = {}
    for name, is_kind in (("kind", True), ("color", False)):
        first = [row for row in found if row[0] and row[3] == is_kind]
        second = [row for row in found if not row[0] and row[3] == is_kind]
        if not first or not second:
            raise InputError(f"no caption of the model names a {name} that one thing alone has")
        block = max(range(len(found[0][1])), key=lambda block: peak_share(first, block))
        others = second[len(second) // 2 :] + second[: len(second) // 2]  # of another image
        swapped = [(half, other[1], patches, is_kind)
                   for (half, _, patches, is_kind), other in zip(second, others)]
        columns[f"words for a {name}"] = {
            "look at the thing": peak_share(second, block),
            "with the maps of another image": peak_share(swapped, block),
            "a random patch": 100 * mean(len(row[2]) / row[1].shape[1] for row in second),
            "block": block + 1}
    return columns


def named_thing(word: str, things: Scene) -> Thing | None:
    """The thing whose kind or color is the word, if there is exactly one."""
    if word not in KINDS and word not in COLORS:
        return None
    matches = [thing for thing in things if word in (thing.kind, thing.color)]
    return matches[0] if len(matches) == 1 else None


def peak_share(rows: list[tuple], block: int) -> float:
    """Percent of the maps of a block whose largest value is on the thing."""
    return 100 * mean(int(maps[block].argmax()) in patches for _, maps, patches, _ in rows)
