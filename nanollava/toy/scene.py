"""The toy world: pictures that a laptop can learn to see, and all that is said about them.

A scene is one to three things (a big red cat at the top left, a small blue ball in the middle) on a
3x3 grid of places. Pillow draws it in 96x96 pixels. Captions name every thing in it; questions of many
types have one right answer each.

Every scene belongs either to training or to testing by a hash of its content (`is_held_out`), so the
two never meet, whatever the seed.
"""

import math
import random
import zlib
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw

PICTURE_SIZE = 96  # pixels
KINDS = {  # and the color of their details: eyes, stripe, beak, door, trunk, wheels, belt
    "cat": (170, 250, 60), "fish": (255, 255, 255), "bird": (250, 190, 0), "house": (140, 225, 255),
    "tree": (80, 50, 25), "car": (25, 25, 25), "ball": (255, 255, 255), "star": (255, 255, 255),
}
COLORS = {
    "red": (214, 39, 40), "orange": (255, 140, 0), "yellow": (240, 210, 20), "green": (30, 150, 60),
    "blue": (40, 90, 220), "purple": (130, 50, 180), "pink": (255, 130, 190), "brown": (125, 75, 35),
}
SIZES = {"small": (20, 22), "big": (28, 31)}  # smallest and largest side of a sprite, in pixels
PLACES = (
    "at the top left", "at the top", "at the top right",
    "on the left", "in the middle", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)
GROUNDS = ((250, 250, 250), (225, 225, 225), (250, 240, 215), (220, 235, 250), (225, 245, 225))


@dataclass(frozen=True)
class Thing:
    """One object of a scene; `cell` counts the nine places in reading order."""

    cell: int
    kind: str
    color: str
    size: str

    @property
    def place(self) -> str:
        return PLACES[self.cell]


# ---------------------------------------------------------------------------------------------
# Scenes


def random_things(rng: random.Random) -> tuple[Thing, ...]:
    """One to three things in reading order; kinds and colors repeat often enough to be worth counting."""
    count = rng.choice((1, 2, 2, 3, 3, 3))
    things = []
    for cell in sorted(rng.sample(range(9), count)):
        kind, color = rng.choice(tuple(KINDS)), rng.choice(tuple(COLORS))
        if things and rng.random() < 0.25:
            kind = rng.choice(things).kind
        if things and rng.random() < 0.25:
            color = rng.choice(things).color
        things.append(Thing(cell, kind, color, rng.choice(tuple(SIZES))))
    return tuple(things)


def is_held_out(things: tuple[Thing, ...]) -> bool:
    """True for the tenth of all scenes that no training, of any stage or seed, may use."""
    return zlib.crc32(repr(things).encode()) % 10 == 0


def scenes(rng: random.Random, held_out: bool = False):
    """Endless scenes for training, or for testing."""
    while True:
        things = random_things(rng)
        if is_held_out(things) == held_out:
            yield things


def boxes(things: tuple[Thing, ...], rng: random.Random) -> list[tuple[int, int, int, int]]:
    """A place in pixels for each thing, anywhere inside its cell: (left, top, width, height)."""
    placed = []
    for thing in things:
        side = rng.randint(*SIZES[thing.size])
        row, column = divmod(thing.cell, 3)
        left, right = column * PICTURE_SIZE // 3, (column + 1) * PICTURE_SIZE // 3
        top, bottom = row * PICTURE_SIZE // 3, (row + 1) * PICTURE_SIZE // 3
        placed.append((rng.randint(left, right - side), rng.randint(top, bottom - side), side, side))
    return placed


def draw(things: tuple[Thing, ...], placed: list[tuple[int, int, int, int]], rng: random.Random) -> Image.Image:
    """The picture of a scene: RGB, 96x96, with a little freedom in every color."""
    picture = Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), shade(rng.choice(GROUNDS), rng))
    for thing, (left, top, side, _) in zip(things, placed):
        shape, details = sprite(thing.kind, side)
        picture.paste(shade(COLORS[thing.color], rng), (left, top), shape)
        picture.paste(KINDS[thing.kind], (left, top), details)
    return picture


def shade(color: tuple[int, int, int], rng: random.Random) -> tuple[int, ...]:
    return tuple(max(0, min(255, value + rng.randint(-10, 10))) for value in color)


@lru_cache(maxsize=None)
def sprite(kind: str, side: int) -> tuple[Image.Image, Image.Image]:
    """Two masks of side x side pixels: the colored shape of a kind, and its details."""
    scale = 8 * side / 100  # drawn eight times too large in percent of the side, then reduced: smooth edges
    masks = Image.new("L", (8 * side, 8 * side)), Image.new("L", (8 * side, 8 * side))
    shape, details = map(ImageDraw.Draw, masks)

    def oval(on, *box):
        on.ellipse([scale * value for value in box], fill=255)

    def polygon(on, *points):
        on.polygon([scale * value for value in points], fill=255)

    if kind == "cat":  # a face with pointed ears and green eyes
        oval(shape, 5, 22, 95, 98)
        polygon(shape, 8, 55, 10, 0, 45, 28)
        polygon(shape, 92, 55, 90, 0, 55, 28)
        oval(details, 20, 42, 42, 66)
        oval(details, 58, 42, 80, 66)
    elif kind == "fish":  # with a white eye and a white stripe
        oval(shape, 0, 20, 76, 80)
        polygon(shape, 60, 50, 100, 16, 100, 84)
        oval(details, 10, 36, 26, 52)
        polygon(details, 42, 22, 54, 24, 54, 76, 42, 78)
    elif kind == "bird":  # a body with a raised wing, a yellow beak and legs
        oval(shape, 15, 36, 80, 80)
        polygon(shape, 38, 50, 95, 2, 72, 60)
        polygon(details, 0, 58, 24, 44, 24, 68)
        polygon(details, 36, 78, 44, 78, 44, 100, 36, 100)
        polygon(details, 54, 78, 62, 78, 62, 100, 54, 100)
    elif kind == "house":  # with a bright door
        polygon(shape, 14, 42, 86, 42, 86, 100, 14, 100)
        polygon(shape, 0, 46, 50, 0, 100, 46)
        polygon(details, 36, 58, 64, 58, 64, 100, 36, 100)
    elif kind == "tree":  # a crown on a trunk
        oval(shape, 10, 0, 90, 68)
        polygon(details, 40, 64, 60, 64, 60, 100, 40, 100)
    elif kind == "car":
        polygon(shape, 0, 50, 22, 50, 34, 22, 72, 22, 84, 50, 100, 50, 100, 76, 0, 76)
        oval(details, 10, 60, 40, 90)
        oval(details, 60, 60, 90, 90)
    elif kind == "ball":  # with a white belt
        oval(shape, 2, 2, 98, 98)
        polygon(details, 3, 40, 97, 40, 97, 60, 3, 60)
    elif kind == "star":
        points = []
        for corner in range(10):
            radius, angle = (54 if corner % 2 == 0 else 24), math.pi * corner / 5
            points += [50 + radius * math.sin(angle), 54 - radius * math.cos(angle)]
        polygon(shape, *points)
    else:
        raise ValueError(f"no such kind of thing: {kind}")
    return tuple(mask.resize((side, side), Image.Resampling.BOX) for mask in masks)
