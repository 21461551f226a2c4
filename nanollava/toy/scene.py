"""Scenes of the toy world and their images.

A scene is one to three things on a 3x3 grid of places, for example a big red cat at the top left
and a small blue ball in the middle. Pillow draws it with 96x96 pixels.

A hash of its content assigns every scene to training or to validation (`is_validation_scene`), so
the two never overlap, whatever the seed.
"""

import math
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw

IMAGE_SIZE, CELL_SIZE = 96, 32  # pixels
COLORS = {
    "red": (214, 39, 40), "orange": (255, 140, 0), "yellow": (240, 210, 20),
    "green": (30, 150, 60), "blue": (40, 90, 220), "purple": (130, 50, 180),
    "pink": (255, 130, 190), "brown": (125, 75, 35)}
SIZES = {"small": (20, 22), "big": (28, 31)}  # smallest and largest side of a thing, in pixels
PLACES = (  # the nine cells of the grid, in reading order
    "at the top left", "at the top", "at the top right",
    "on the left", "in the middle", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right")
BACKGROUNDS = (
    (250, 250, 250), (225, 225, 225), (250, 240, 215), (220, 235, 250), (225, 245, 225))


@dataclass(frozen=True, order=True)
class Thing:
    """One object of a scene. `cell` is the index of its place; things are ordered by it."""

    # random scenes are split by a hash of the repr: names and order of the fields are part of it
    cell: int
    kind: str
    color: str
    size: str

    @property
    def place(self) -> str:
        return PLACES[self.cell]

    @property
    def row(self) -> int:
        return self.cell // 3

    @property
    def column(self) -> int:
        return self.cell % 3


Scene = tuple[Thing, ...]  # in reading order
Box = tuple[int, int, int, int]  # left, top, width, height, in pixels


def random_scene(rng: random.Random) -> Scene:
    """One to three things; kinds and colors repeat often enough to make counting worthwhile."""
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


def is_validation_scene(things: Scene) -> bool:
    """True for a fixed tenth of all scenes. No stage trains on them, whatever its seed."""
    return zlib.crc32(repr(things).encode()) % 10 == 0


def random_scenes(rng: random.Random, validation: bool = False) -> Iterator[Scene]:
    """Endless random scenes, for training or for validation."""
    while True:
        things = random_scene(rng)
        if is_validation_scene(things) == validation:
            yield things


def random_boxes(things: Scene, rng: random.Random) -> list[Box]:
    """A box for each thing, at a random position inside its cell."""
    boxes = []
    for thing in things:
        side = rng.randint(*SIZES[thing.size])
        left, top = (CELL_SIZE * number + rng.randint(0, CELL_SIZE - side)
                     for number in (thing.column, thing.row))
        boxes.append((left, top, side, side))
    return boxes


def star(outer: int, inner: int) -> tuple[float, ...]:
    """A star with five points, from the radii of its outer and inner corners."""
    corners = []
    for number in range(10):
        radius, angle = (outer if number % 2 == 0 else inner), math.pi * number / 5
        corners += [50 + radius * math.sin(angle), 54 - radius * math.cos(angle)]
    return tuple(corners)


# How a kind of thing is drawn: shapes in the color of the thing, details on top of them, and the
# color of the details. Coordinates are in percent of the side of the thing's box. Four numbers are
# an oval: left, top, right, bottom. More are a polygon: x and y of each corner.
KINDS = {
    "cat": (  # a face with pointed ears; eyes
        ((5, 22, 95, 98), (8, 55, 10, 0, 45, 28), (92, 55, 90, 0, 55, 28)),
        ((20, 42, 42, 66), (58, 42, 80, 66)), (170, 250, 60)),
    "fish": (  # a body and a tail; an eye and a stripe
        ((0, 20, 76, 80), (60, 50, 100, 16, 100, 84)),
        ((10, 36, 26, 52), (42, 22, 54, 24, 54, 76, 42, 78)), (255, 255, 255)),
    "bird": (  # a body with a raised wing; a beak and two legs
        ((15, 36, 80, 80), (38, 50, 95, 2, 72, 60)),
        ((0, 58, 24, 44, 24, 68), (36, 78, 44, 78, 44, 100, 36, 100),
         (54, 78, 62, 78, 62, 100, 54, 100)), (250, 190, 0)),
    "house": (  # walls and a roof; a door
        ((14, 42, 86, 42, 86, 100, 14, 100), (0, 46, 50, 0, 100, 46)),
        ((36, 58, 64, 58, 64, 100, 36, 100),), (140, 225, 255)),
    "tree": (  # a crown; a trunk
        ((10, 0, 90, 68),), ((40, 64, 60, 64, 60, 100, 40, 100),), (80, 50, 25)),
    "car": (  # a body; two wheels
        ((0, 50, 22, 50, 34, 22, 72, 22, 84, 50, 100, 50, 100, 76, 0, 76),),
        ((10, 60, 40, 90), (60, 60, 90, 90)), (25, 25, 25)),
    "ball": (  # a disk; a stripe
        ((2, 2, 98, 98),), ((3, 40, 97, 40, 97, 60, 3, 60),), (255, 255, 255)),
    "star": ((star(54, 24),), (), (255, 255, 255)),
}


def draw_image(things: Scene, boxes: list[Box], rng: random.Random) -> Image.Image:
    """The image of a scene: RGB, 96x96 pixels, every color varied a little."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), vary(rng.choice(BACKGROUNDS), rng))
    for thing, (left, top, side, _) in zip(things, boxes):
        shapes, details, detail_color = KINDS[thing.kind]
        image.paste(vary(COLORS[thing.color], rng), (left, top), draw_mask(shapes, side))
        image.paste(detail_color, (left, top), draw_mask(details, side))
    return image


def vary(color: tuple[int, int, int], rng: random.Random) -> tuple[int, ...]:
    return tuple(max(0, min(255, value + rng.randint(-10, 10))) for value in color)


@lru_cache
def draw_mask(shapes: tuple, side: int) -> Image.Image:
    """Shapes, white on black, drawn at eight times the size for smooth edges."""
    mask = Image.new("L", (8 * side, 8 * side))
    canvas = ImageDraw.Draw(mask)
    for percents in shapes:
        draw = canvas.ellipse if len(percents) == 4 else canvas.polygon
        draw([8 * side / 100 * percent for percent in percents], fill=255)
    return mask.resize((side, side), Image.Resampling.BOX)
