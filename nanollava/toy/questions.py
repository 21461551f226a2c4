"""What is said about the toy world: captions, descriptions, questions with their answers."""

import random

from .scene import COLORS, KINDS, Thing

NUMBERS = ("zero", "one", "two", "three", "four")


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
