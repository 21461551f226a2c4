"""Do patches become words, and does the model look at what it names? Counted in the toy world.

`tour.py` shows the words that are nearest to each patch, and where the model looks while it
answers. In the toy world the truth about each patch is known, so both can be scored. Controls:
projectors that were never trained; the words and the attention of another image; chance.
"""

import random
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch

from ..infra.cli import format_table
from ..infra.io import InputError
from ..infra.progress import progress
from ..llava import Llava
from ..patch_words import NUM_WORDS, nearest_words, untrained_projector, view_patches, word_tokens
from ..tokenizer import Tokenizer, open_tokenizer
from ..tour import PROMPT, list_projectors, take_tour, token_text
from .clip import VISION_CONFIG, things_on_patches
from .scene import COLORS, KINDS, Box, Scene, Thing, draw_image, random_boxes, random_scenes

ATTRIBUTES = ("kind", "color", "size", "place")
EMPTY = "a kind, on empty ground"
UNTRAINED = 10  # projectors whose mean is a control
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
    """{"words" or "attention": {column: {row: percent}}} of RUN/stage2 and its projectors.

    Raises InputError if the model does not see the toy world patch by patch.
    """
    folder = run / "stage2"
    model = Llava.from_pretrained(folder, device=device)
    if model.config.vision != VISION_CONFIG or \
            model.config.tokens_per_image != VISION_CONFIG.num_patches:
        raise InputError(f"{folder} does not have the toy CLIP's patches, or joins them")
    tokenizer = open_tokenizer(folder, model.config)
    examples = draw_examples(count, seed)
    columns = {"chance": {attribute: 100 * NUM_WORDS / len(word_tokens(tokenizer))
                          for attribute in ATTRIBUTES}}
    columns["untrained"] = mean_columns(
        [score_words(model, model, untrained_projector(model, number), tokenizer, examples, -2)
         for number in range(UNTRAINED)])
    for name, (owner, projector) in list_projectors(model, folder).items():
        if name != "untrained":
            for layer in (-2, -1):
                columns[f"{name}, {layer}"] = score_words(
                    model, owner, projector, tokenizer, examples, layer)
    truths = [example[:2] for example in examples]
    others = [(*truth, image) for truth, (_, _, image) in
              zip(truths[1:] + truths[:1], examples)]  # the truth about the next image
    columns["another image"] = score_words(
        model, model, model.multi_modal_projector, tokenizer, others, -2)
    return {"words": columns, "attention": score_attention(model, tokenizer, examples)}


def mean_columns(columns: list[dict[str, float]]) -> dict[str, float]:
    return {row: mean(column[row] for column in columns) for row in columns[0]}


def format_lens(results: list[dict]) -> str:
    """Two tables of the results of several runs: mean, and standard deviation if there are more."""
    tables = []
    for part in ("words", "attention"):
        columns = [column for column in results[0][part]
                   if all(column in result[part] for result in results)]
        rows = [[row, *(format_values([result[part][column][row] for result in results
                                       if row in result[part][column]]) for column in columns)]
                for row in results[0][part][columns[-1]]]
        tables.append(format_table(["", *columns], rows))
    return "\n\n".join(tables)


def format_values(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}"


# ---------------------------------------------------------------------------------------------
# Patches as words


@torch.no_grad()
def score_words(model: Llava, owner: Llava, projector, tokenizer: Tokenizer,
                examples: list[Example], layer: int) -> dict[str, float]:
    """Percent of the patches on a thing whose five nearest words contain its kind, color, size and
    place; percent of the empty patches whose five nearest words contain a kind."""
    results = {name: [] for name in (*ATTRIBUTES, EMPTY)}
    for things, boxes, image in examples:
        pixels = model.config.preprocess(image)[None]
        found = nearest_words(owner, tokenizer, projector(view_patches(model, pixels, layer))[0])
        touched, truth = touched_patches(boxes), things_on_patches(things, boxes)
        for patch, (row, thing) in enumerate(zip(found, truth, strict=True)):
            words = {word for word, _ in row}
            if thing:
                for attribute in ATTRIBUTES:
                    results[attribute].append(getattr(thing, attribute) in words)
            elif patch not in touched:
                results[EMPTY].append(not words.isdisjoint(KINDS))
    return {name: 100 * mean(values) for name, values in results.items() if values}


def touched_patches(boxes: list[Box]) -> set[int]:
    """The numbers of the patches that a box reaches into."""
    size = VISION_CONFIG.patch_size
    columns = VISION_CONFIG.image_size // size
    return {row * columns + column for left, top, width, height in boxes
            for row in range(top // size, (top + height - 1) // size + 1)
            for column in range(left // size, (left + width - 1) // size + 1)}


# ---------------------------------------------------------------------------------------------
# Attention


class Look(NamedTuple):
    """Where the model looks when it predicts a word for the kind or the color of one thing."""

    attention: torch.Tensor  # (L, P)
    patches: set[int]  # those of the thing
    is_kind: bool
    is_first_half: bool  # of the images


def score_attention(model: Llava, tokenizer: Tokenizer,
                    examples: list[Example]) -> dict[str, dict[str, float]]:
    """Of a caption's words for the kind or color that one thing alone has: percent of those whose
    attention is strongest on that thing, by block. The best block is chosen on the first half of
    the images; everything is scored on the second half."""
    looks = [look for number, example in enumerate(progress(examples, "attention", "images"))
             for look in find_looks(model, tokenizer, example, number < len(examples) // 2)]
    columns = {}
    for name, is_kind in (("kind", True), ("color", False)):
        first, second = ([look for look in looks if look.is_kind == is_kind
                          and look.is_first_half == is_first] for is_first in (True, False))
        if not first or len(second) < 2:
            raise InputError(f"the captions of the model hardly name a {name}")
        blocks = range(len(first[0].attention))
        best = max(blocks, key=lambda block: peak_share(first, block))
        others = second[len(second) // 2 :] + second[: len(second) // 2]  # of another image
        swapped = [look._replace(attention=other.attention)
                   for look, other in zip(second, others)]
        columns[f"words for a {name}"] = {
            **{f"block {block + 1}": peak_share(second, block) for block in blocks},
            "the best block": peak_share(second, best),
            "with another image's attention": peak_share(swapped, best),
            "a random patch": 100 * mean(len(look.patches) / look.attention.shape[1]
                                         for look in second)}
    return columns


def find_looks(model: Llava, tokenizer: Tokenizer, example: Example,
               is_first_half: bool) -> list[Look]:
    """The words of a caption that name a kind or color of one thing alone."""
    things, boxes, image = example
    tour = take_tour(model, tokenizer, image, PROMPT, max_new_tokens=64)
    looks = []
    for number, token in enumerate(tour.tokens[-len(tour.likeliest) :]):
        word = token_text(tokenizer, token).strip()
        if thing := named_thing(word, things):
            patches = touched_patches([boxes[things.index(thing)]])
            looks.append(Look(tour.attention[:, number], patches, word in KINDS, is_first_half))
    return looks


def named_thing(word: str, things: Scene) -> Thing | None:
    """The thing whose kind or color is the word, if there is exactly one."""
    if word not in KINDS and word not in COLORS:
        return None
    matches = [thing for thing in things if word in (thing.kind, thing.color)]
    return matches[0] if len(matches) == 1 else None


def peak_share(looks: list[Look], block: int) -> float:
    """Percent of the looks whose attention in a block is strongest on a patch of the thing."""
    return 100 * mean(int(look.attention[block].argmax()) in look.patches for look in looks)
