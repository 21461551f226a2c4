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
NUMBERS = ("zero", "one", "two", "three", "four")


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


# ---------------------------------------------------------------------------------------------
# Words


def a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def plural(noun: str) -> str:
    return noun if noun == "fish" else f"{noun}s"


def listed(words: list[str]) -> str:
    """["x", "y", "z"] -> "x, y and z"."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def described(thing: Thing) -> str:
    return a(f"{thing.size} {thing.color} {thing.kind}")


def caption(things: tuple[Thing, ...], style: int) -> str:
    """One sentence that names every thing, its size, color and place, in one of five styles."""
    if not things:
        return "Nothing."
    if style == 4:
        return sentence(listed([f"{t.place} {described(t)}" for t in things]))
    start = ("", "a picture of ", "we see ", f"there {'is' if len(things) == 1 else 'are'} ")[style]
    return sentence(start + listed([f"{described(t)} {t.place}" for t in things]))


STYLES = 5


def description(things: tuple[Thing, ...]) -> str:
    """Everything there is to say about a scene."""
    count = "There is one thing" if len(things) == 1 else f"There are {NUMBERS[len(things)]} things"
    said = [f"{count} in the picture."]
    said += [sentence(f"{t.place} there is {described(t)}") for t in things]
    for one, other in zip(things, things[1:]):
        if one.cell // 3 != other.cell // 3:
            said.append(sentence(f"the {one.color} {one.kind} is above the {other.color} {other.kind}"))
        else:
            said.append(sentence(f"the {one.color} {one.kind} is left of the {other.color} {other.kind}"))
    return " ".join(said)


def name(thing: Thing, things: tuple[Thing, ...], hide: str = "") -> str | None:
    """The shortest name that only this thing has ("the cat", "the red cat", "the cat on the left"), or None.

    `hide` is the attribute that is asked for and must not be given away.
    """
    same_kind = [t for t in things if t.kind == thing.kind]
    if len(same_kind) == 1:
        return f"the {thing.kind}"
    if hide != "color" and sum(t.color == thing.color for t in same_kind) == 1:
        return f"the {thing.color} {thing.kind}"
    return None if hide == "cell" else f"the {thing.kind} {thing.place}"


# Each of these writes one question and its only right answer about a scene, or None where the scene has none.
# Answers that need more than one look (count, relation, same color) look first and conclude last: a chain of
# thought as small as it gets, without which counting is learned only half.


def ask_kind(things, rng):
    thing = rng.choice(things)
    return f"What is {thing.place}?", sentence(f"{thing.place} is {a(thing.kind)}")


def ask_color(things, rng):
    thing = rng.choice(things)
    subject = name(thing, things, hide="color")
    return f"What color is {subject}?", sentence(f"{subject} is {thing.color}")


def ask_size(things, rng):
    thing = rng.choice(things)
    subject = name(thing, things)
    return f"Is {subject} big or small?", sentence(f"{subject} is {thing.size}")


def ask_place(things, rng):
    thing = rng.choice(things)
    subject = name(thing, things, hide="cell")
    return subject and (f"Where is {subject}?", sentence(f"{subject} is {thing.place}"))


def ask_presence(things, rng):
    if rng.random() < 0.5:  # yes
        thing = rng.choice(things)
        noun = thing.kind if rng.random() < 0.5 else f"{thing.color} {thing.kind}"
        return f"Is there {a(noun)}?", f"Yes, there is {a(noun)}."
    kind, color = rng.choice(tuple(KINDS)), rng.choice(tuple(COLORS))
    if rng.random() < 0.5:  # no, but nearly: a thing of that kind in another color
        kind = rng.choice(things).kind
    noun = f"{color} {kind}" if any(t.kind == kind for t in things) or rng.random() < 0.5 else kind
    if any((t.color, t.kind) == (color, kind) for t in things):
        return None
    return f"Is there {a(noun)}?", f"No, there is no {noun}."


def ask_count(things, rng):
    """The answer goes through all things before it counts: a thought at a time, for a network that has few."""
    seen = listed([f"{t.place} is {a(t.kind)}" for t in things])
    if rng.random() < 0.3:
        return "How many things are there?", sentence(f"{seen}, so {NUMBERS[len(things)]}")
    kind = rng.choice(things).kind if rng.random() < 0.8 else rng.choice(tuple(KINDS))
    found = sum(t.kind == kind for t in things)
    counted = f"{NUMBERS[found] if found else 'no'} {kind if found == 1 else plural(kind)}"
    return f"How many {plural(kind)} are there?", sentence(f"{seen}, so {counted}")


def ask_relation(things, rng):
    if len(things) < 2:
        return None
    one, other = rng.sample(things, 2)
    across, words = rng.choice((((one.cell % 3) - (other.cell % 3), ("left", "right")),
                                ((one.cell // 3) - (other.cell // 3), ("above", "below"))))
    subject, reference = name(one, things, hide="cell"), name(other, things, hide="cell")
    if across == 0 or not subject or not reference:
        return None
    of = " of" if words[0] == "left" else ""
    return (f"Is {subject} {words[0]} or {words[1]}{of} {reference}?",
            sentence(f"{subject} is {one.place} and {reference} is {other.place}, so {words[across > 0]}"))


def ask_same_color(things, rng):
    if len(things) < 2:
        return None
    one, other = rng.sample(things, 2)
    subject, reference = name(one, things, hide="color"), name(other, things, hide="color")
    verdict = "yes" if one.color == other.color else "no"
    return (f"Are {subject} and {reference} the same color?",
            sentence(f"{subject} is {one.color} and {reference} is {other.color}, so {verdict}"))


QUESTIONS = {
    "kind": ask_kind, "color": ask_color, "size": ask_size, "place": ask_place, "presence": ask_presence,
    "count": ask_count, "relation": ask_relation, "same color": ask_same_color,
}
LESSONS = (*QUESTIONS, "count", "count", "same color")  # what is learned last is asked more often


def ask_farthest(things, rng):
    side, rank = rng.choice((("to the left", lambda t: t.cell % 3), ("to the right", lambda t: -(t.cell % 3)),
                             ("up", lambda t: t.cell // 3), ("down", lambda t: -(t.cell // 3))))
    first, *rest = sorted(things, key=rank)
    if not rest or rank(first) == rank(rest[0]):
        return None
    places = listed([f"{name(t, things)} is {t.place}" for t in things])
    return f"Which thing is the farthest {side}?", sentence(f"{places}, so {name(first, things)}")


def ask_left_over(things, rng):
    gone = rng.choice(things)
    rest = [a(f"{t.color} {t.kind}") for t in things if t is not gone]
    return (f"If {name(gone, things)} went away, what would be left?",
            sentence(f"without {name(gone, things)} there would be {listed(rest) if rest else 'nothing'}"))


def ask_more(things, rng):
    kinds = list(dict.fromkeys(t.kind for t in things))
    if len(kinds) < 2:
        return None
    one, other = rng.sample(kinds, 2)
    many, few = (sum(t.kind == kind for t in things) for kind in (one, other))
    counted = [f"{NUMBERS[number]} {kind if number == 1 else plural(kind)}"
               for number, kind in ((many, one), (few, other))]
    return (f"Are there more {plural(one)} than {plural(other)}?",
            sentence(f"there {'is' if many == 1 else 'are'} {listed(counted)}, so {'yes' if many > few else 'no'}"))


REASONING = {"farthest": ask_farthest, "left over": ask_left_over, "more": ask_more}


def ask(things, rng: random.Random, count: int, types=tuple(QUESTIONS)) -> list[tuple[str, str, str]]:
    """Up to `count` different questions about a scene, their types drawn from `types`: (type, question, answer)."""
    asked = {}
    for _ in range(20 * count):
        kind = rng.choice(types)
        pair = (QUESTIONS | REASONING)[kind](things, rng)
        if pair and pair[0] not in asked:
            asked[pair[0]] = (kind, *pair)
        if len(asked) == count:
            break
    return list(asked.values())
