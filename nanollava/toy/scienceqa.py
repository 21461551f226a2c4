"""A ScienceQA of the toy world: section 5.2 of the paper on a laptop.

Multiple choice with lecture and solution, in the very files of the real one (`scienceqa.py` reads both): problems
about a picture, about a scene told as context, about words alone. The letters are drawn by chance, so an answer takes
two steps, first what is true, then which option says so; this is what the order of reason and answer is about.
"""

import random
import zlib
from pathlib import Path

from ..benchmarks.scienceqa import SPLITS
from ..infra.io import atomic_folder, write_json
from ..infra.progress import progress
from . import questions, scene

SCENE_PROBLEMS = {  # type of question: subject, grades, what one has to know
    "kind": ("natural science", (1, 6), "A thing is known by its shape."),
    "color": ("natural science", (1, 6), "The color of a thing is what fills its shape."),
    "same color": ("natural science", (7, 12), "Two things have the same color if one word fits both."),
    "count": ("natural science", (7, 12), "To count, go through all things one by one."),
    "place": ("social science", (1, 6), "A place is told by its row and its column."),
    "relation": ("social science", (7, 12), "To compare two things, find the place of each."),
    "farthest": ("social science", (7, 12), "To find the farthest thing, find the place of each."),
}
GROUPS = {"an animal": ("cat", "fish", "bird"), "a plant": ("tree",), "made by people": ("house", "car", "ball")}


def values(kind: str, things) -> list[str]:
    """All that the answer to a question of a type may end with."""
    return {
        "kind": list(scene.KINDS), "color": list(scene.COLORS), "place": list(scene.PLACES), "same color": ["yes", "no"],
        "count": list(questions.NUMBERS[1:4]), "relation": ["left", "right", "above", "below"],
        "farthest": [questions.name(thing, things) for thing in things],
    }[kind]


def about_scene(things, rng: random.Random) -> dict | None:
    """A problem about a scene, or None where it has no question of the type that was drawn."""
    kind = rng.choice(tuple(SCENE_PROBLEMS))
    subject, grades, lecture = SCENE_PROBLEMS[kind]
    asked = questions.ask(things, rng, 1, (kind,))
    if not asked:
        return None
    (_, question, solution), = asked
    endings = [value for value in values(kind, things) if solution.endswith(f" {value}.")]
    if not endings:  # "so two cats": only the count of all things ends with a number
        return None
    truth = max(endings, key=len)
    others = [value for value in values(kind, things) if value != truth]
    if kind == "relation":
        others = [value for value in others if value in question]
    return problem(question, truth, rng.sample(others, min(len(others), 3)), lecture, solution, subject, grades, rng)


def about_groups(rng: random.Random) -> dict:
    group = rng.choice(tuple(GROUPS))
    truth = rng.choice(GROUPS[group])
    others = rng.sample([kind for kind in scene.KINDS if kind not in GROUPS[group]], 2)
    return problem(f"Which of these is {group}?", truth, others, "Animals and plants live. A house, a car and a ball "
                   "are made by people.", questions.sentence(f"{questions.a(truth)} is {group}"), "natural science", (1, 6), rng)


def about_alphabet(rng: random.Random) -> dict:
    first, *rest = sorted(rng.sample([*scene.KINDS, *scene.COLORS], 3))
    return problem("Which word comes first in a dictionary?", first, rest, "A dictionary goes by the alphabet.",
                   questions.sentence(f"by the alphabet: {first}, {rest[0]}, {rest[1]}"), "language science", (1, 6), rng)


def about_words(things, rng: random.Random) -> dict:
    thing = rng.choice(things)
    words = {"a thing": thing.kind, "a color": thing.color, "a size": thing.size}
    which = rng.choice(tuple(words))
    truth = words.pop(which)
    made = problem(f"Which word of the text is {which}?", truth, list(words.values()),
                   "A word may name a thing, a color or a size.", questions.sentence(f"{truth} is {which}"),
                   "language science", (7, 12), rng)
    return made | {"hint": questions.sentence(f"{questions.described(thing)} {thing.place}")}


def problem(question, truth, others, lecture, solution, subject, grades, rng) -> dict:
    """A problem as ScienceQA writes one, its options in random order."""
    choices = rng.sample([truth, *others], 1 + len(others))
    return {"question": question, "choices": choices, "answer": choices.index(truth), "hint": "", "image": None,
            "task": "closed choice", "grade": f"grade{rng.randint(*grades)}", "subject": subject, "lecture": lecture,
            "solution": solution}


def is_held_out(made: dict) -> bool:
    """True for the fifth of the problems without a scene that only the test has, whatever the order of the options."""
    return zlib.crc32(repr((made["question"], sorted(made["choices"]))).encode()) % 5 == 0


def draw_problem(scenes, held_out: bool, rng: random.Random):
    """A problem, and the scene of its picture or None where it has none."""
    chance, made = rng.random(), None
    if chance < 0.2:
        about = rng.choice((about_groups, about_alphabet))
        while not made or is_held_out(made) != held_out:
            made = about(rng)
        return made, None
    if chance < 0.3:
        return about_words(next(scenes), rng), None
    while not made:
        things = next(scenes)
        made = about_scene(things, rng)
    if chance < 0.45:
        return made | {"hint": questions.caption(things, 0)}, None
    return made | {"image": "image.png", "hint": "Look at the picture." if chance < 0.6 else ""}, things


def write_problems(folder: str | Path, seed: int = 0, train: int = 6400, tests: int = 400) -> None:
    """Write problems.json, pid_splits.json and split/id/image.png into a new folder, which appears whole."""
    rng, problems, splits = random.Random(seed), {}, {split: [] for split in SPLITS}
    training, testing = scene.scenes(rng), scene.scenes(rng, held_out=True)
    wanted = [split for split, count in zip(SPLITS, (train, tests, tests)) for _ in range(count)]
    with atomic_folder(folder) as beside:
        for number, split in enumerate(progress(wanted, "toy problems", "problems"), 1):
            held_out = split != "train"
            made, things = draw_problem(testing if held_out else training, held_out, rng)
            problems[str(number)] = made | {"split": split}
            splits[split].append(str(number))
            if things:
                picture = scene.draw(things, scene.boxes(things, rng), rng)
                (beside / split / str(number)).mkdir(parents=True)
                picture.save(beside / split / str(number) / made["image"])
        write_json(beside / "problems.json", problems)
        write_json(beside / "pid_splits.json", splits)
