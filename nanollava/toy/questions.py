"""The language of the toy world: captions, descriptions, and questions with one right answer each.

Every function takes the things of a scene and writes English about them. Nothing here is drawn.
"""

import random

from .scene import COLORS, KINDS, Scene, Thing

NUMBERS = ("no", "one", "two", "three")
CAPTION_STYLES = 5  # the styles of `caption` are 0 to 4


# ---------------------------------------------------------------------------------------------
# Words


def with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def plural(noun: str) -> str:
    return noun if noun == "fish" else f"{noun}s"


def count_phrase(count: int, kind: str) -> str:
    """For example "no fish", "one cat" or "two cats"."""
    return f"{NUMBERS[count]} {kind if count == 1 else plural(kind)}"


def join_words(words: list[str]) -> str:
    """["x", "y", "z"] -> "x, y and z"."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def sentence(text: str) -> str:
    """With a capital letter and a full stop."""
    return text[0].upper() + text[1:] + "."


def noun_phrase(thing: Thing) -> str:
    """For example "a big red cat"."""
    return with_article(f"{thing.size} {thing.color} {thing.kind}")


def unique_name(thing: Thing, things: Scene, hide: str = "") -> str | None:
    """The shortest of "the cat", "the red cat" and "the cat on the left" that fits only this thing.

    The attribute `hide` ("color" or "cell") is what a question asks for, so the name must not
    contain it. None if no name is left.
    """
    same_kind = [t for t in things if t.kind == thing.kind]
    if len(same_kind) == 1:
        return f"the {thing.kind}"
    if hide != "color" and sum(t.color == thing.color for t in same_kind) == 1:
        return f"the {thing.color} {thing.kind}"
    return None if hide == "cell" else f"the {thing.kind} {thing.place}"


# ---------------------------------------------------------------------------------------------
# Captions


def caption(things: Scene, style: int) -> str:
    """One sentence that names every thing with its size, color and place, in one of five styles."""
    if not things:
        return "Nothing."
    if style == 4:
        return sentence(join_words([f"{t.place} {noun_phrase(t)}" for t in things]))
    verb = "is" if len(things) == 1 else "are"
    start = ("", "a picture of ", "we see ", f"there {verb} ")[style]
    return sentence(start + join_words([f"{noun_phrase(t)} {t.place}" for t in things]))


def captions(things: Scene) -> list[str]:
    """One caption in every style."""
    return [caption(things, style) for style in range(CAPTION_STYLES)]


def description(things: Scene) -> str:
    """A detailed description: the number of things, each thing, and how neighbors are arranged."""
    count = len(things)
    start = "There is one thing" if count == 1 else f"There are {NUMBERS[count]} things"
    sentences = [f"{start} in the picture."]
    sentences += [sentence(f"{t.place} there is {noun_phrase(t)}") for t in things]
    for first, second in zip(things, things[1:]):
        relation = "above" if first.row != second.row else "left of"
        sentences.append(sentence(
            f"the {first.color} {first.kind} is {relation} the {second.color} {second.kind}"))
    return " ".join(sentences)


# ---------------------------------------------------------------------------------------------
# Questions about what the image shows
#
# Each function returns a random question of its type and the answer, or None if it finds no such
# question about the scene. The answers to count, relation and same color first state what is seen
# and then conclude. This is a minimal chain of thought; without it, counting is only half learned.


def ask_kind(things, rng):
    thing = rng.choice(things)
    return f"What is {thing.place}?", sentence(f"{thing.place} is {with_article(thing.kind)}")


def ask_color(things, rng):
    thing = rng.choice(things)
    name = unique_name(thing, things, hide="color")
    return f"What color is {name}?", sentence(f"{name} is {thing.color}")


def ask_size(things, rng):
    thing = rng.choice(things)
    name = unique_name(thing, things)
    return f"Is {name} big or small?", sentence(f"{name} is {thing.size}")


def ask_place(things, rng):
    thing = rng.choice(things)
    name = unique_name(thing, things, hide="cell")
    return name and (f"Where is {name}?", sentence(f"{name} is {thing.place}"))


def ask_presence(things, rng):
    if rng.random() < 0.5:  # yes
        thing = rng.choice(things)
        noun = thing.kind if rng.random() < 0.5 else f"{thing.color} {thing.kind}"
        return f"Is there {with_article(noun)}?", f"Yes, there is {with_article(noun)}."
    kind, color = rng.choice(tuple(KINDS)), rng.choice(tuple(COLORS))
    if rng.random() < 0.5:  # a hard "no": a kind that is present, in another color
        kind = rng.choice(things).kind
    noun = f"{color} {kind}" if any(t.kind == kind for t in things) or rng.random() < 0.5 else kind
    if any((t.color, t.kind) == (color, kind) for t in things):
        return None
    return f"Is there {with_article(noun)}?", f"No, there is no {noun}."


def ask_count(things, rng):
    """The answer names the things that it counts, and no others: the count is then the length of
    its list. Counts of one kind in a list of all things are often wrong (docs/log.md).
    """
    if rng.random() < 0.3:
        answer = sentence(f"{list_kinds(things)}, so {NUMBERS[len(things)]}")
        return "How many things are there?", answer
    kind = rng.choice(things).kind if rng.random() < 0.8 else rng.choice(tuple(KINDS))
    counted = [thing for thing in things if thing.kind == kind]
    count = count_phrase(len(counted), kind)
    answer = f"{list_kinds(counted)}, so {count}" if counted else f"there are {count}"
    return f"How many {plural(kind)} are there?", sentence(answer)


def list_kinds(things):
    return join_words([f"{thing.place} is {with_article(thing.kind)}" for thing in things])


def ask_relation(things, rng):
    if len(things) < 2:
        return None
    first, second = rng.sample(things, 2)
    offset, choice, relations = rng.choice((
        (first.column - second.column, "left or right of", ("left", "right")),
        (first.row - second.row, "above or below", ("above", "below"))))
    first_name = unique_name(first, things, hide="cell")
    second_name = unique_name(second, things, hide="cell")
    if offset == 0 or not first_name or not second_name:
        return None
    places = f"{first_name} is {first.place} and {second_name} is {second.place}"
    answer = sentence(f"{places}, so {relations[offset > 0]}")
    return f"Is {first_name} {choice} {second_name}?", answer


def ask_same_color(things, rng):
    if len(things) < 2:
        return None
    first, second = rng.sample(things, 2)
    first_name = unique_name(first, things, hide="color")
    second_name = unique_name(second, things, hide="color")
    colors = f"{first_name} is {first.color} and {second_name} is {second.color}"
    answer = sentence(f"{colors}, so {'yes' if first.color == second.color else 'no'}")
    return f"Are {first_name} and {second_name} the same color?", answer


QUESTION_TYPES = {
    "kind": ask_kind, "color": ask_color, "size": ask_size, "place": ask_place,
    "presence": ask_presence, "count": ask_count, "relation": ask_relation,
    "same color": ask_same_color,
}
# the types to draw from in training: those that are learned last are drawn more often
WEIGHTED_TYPES = (*QUESTION_TYPES, "count", "count", "same color")


# ---------------------------------------------------------------------------------------------
# Questions that need reasoning


def ask_farthest(things, rng):
    direction, rank = rng.choice((
        ("to the left", lambda t: t.column), ("to the right", lambda t: -t.column),
        ("up", lambda t: t.row), ("down", lambda t: -t.row)))
    first, *others = sorted(things, key=rank)
    if not others or rank(first) == rank(others[0]):
        return None
    places = join_words([f"{unique_name(t, things)} is {t.place}" for t in things])
    answer = sentence(f"{places}, so {unique_name(first, things)}")
    return f"Which thing is the farthest {direction}?", answer


def ask_left_over(things, rng):
    removed = rng.choice(things)
    name = unique_name(removed, things)
    others = [with_article(f"{t.color} {t.kind}") for t in things if t is not removed]
    answer = sentence(f"without {name} there would be {join_words(others or ['nothing'])}")
    return f"If {name} went away, what would be left?", answer


def ask_more(things, rng):
    kinds = list(dict.fromkeys(t.kind for t in things))
    if len(kinds) < 2:
        return None
    kinds = rng.sample(kinds, 2)
    first, second = counts = [sum(t.kind == kind for t in things) for kind in kinds]
    verb = "is" if first == 1 else "are"
    phrases = join_words([count_phrase(*pair) for pair in zip(counts, kinds)])
    answer = sentence(f"there {verb} {phrases}, so {'yes' if first > second else 'no'}")
    return f"Are there more {plural(kinds[0])} than {plural(kinds[1])}?", answer


REASONING_TYPES = {"farthest": ask_farthest, "left over": ask_left_over, "more": ask_more}


def draw_questions(things: Scene, rng: random.Random, count: int,
                   types: tuple[str, ...] = tuple(QUESTION_TYPES)) -> list[tuple[str, str]]:
    """Up to `count` different questions about a scene, each with its answer.

    Their types are drawn from `types`. A scene may have fewer questions than `count`.
    """
    found = {}
    for _ in range(20 * count):
        pair = (QUESTION_TYPES | REASONING_TYPES)[rng.choice(types)](things, rng)
        if pair:
            found.setdefault(*pair)
        if len(found) == count:
            break
    return list(found.items())


def one_of_each_type(things: Scene, rng: random.Random) -> list[tuple[str, str, str]]:
    """(type, question, answer) for every type of which the scene has a question."""
    return [(question_type, *pair) for question_type in QUESTION_TYPES
            for pair in draw_questions(things, rng, 1, (question_type,))]
