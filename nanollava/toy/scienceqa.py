"""A ScienceQA of the toy world: section 5.2 of the paper on a laptop.

Multiple-choice problems with lecture and solution, in the files of the real one, which
benchmarks/scienceqa.py reads: problems about an image, about a scene described as context, and
about words alone. The options are in random order. An answer therefore takes two steps, first what
is true, then which letter says so, which makes the order of reason and answer matter.
"""

import random
import zlib
from collections.abc import Iterator
from pathlib import Path

from ..benchmarks.scienceqa import SPLITS
from ..infra.io import atomic_folder
from ..infra.json_io import write_json
from ..infra.progress import progress
from . import questions, scene

SCENE_PROBLEMS = {  # type of question: subject, grades, lecture
    "kind": ("natural science", (1, 6), "A thing is known by its shape."),
    "color": ("natural science", (1, 6), "The color of a thing is what fills its shape."),
    "same color": (
        "natural science", (7, 12), "Two things have the same color if one word fits both."),
    "count": ("natural science", (7, 12), "To count, go through all things one by one."),
    "place": ("social science", (1, 6), "A place is told by its row and its column."),
    "relation": ("social science", (7, 12), "To compare two things, find the place of each."),
    "farthest": ("social science", (7, 12), "To find the farthest thing, find the place of each."),
}
WORD_PROBLEMS = {
    "group": ("natural science", (1, 6),
              "Animals and plants live. A house, a car and a ball are made by people."),
    "alphabet": ("language science", (1, 6), "A dictionary goes by the alphabet."),
    "word class": ("language science", (7, 12), "A word may name a thing, a color or a size."),
}
GROUPS = {"an animal": ("cat", "fish", "bird"), "a plant": ("tree",),
          "made by people": ("house", "car", "ball")}


def make_problem(problem_type: str, question: str, truth: str, others: list[str], solution: str,
                 rng: random.Random) -> dict:
    """A problem in ScienceQA's format, its options in random order."""
    subject, grades, lecture = (SCENE_PROBLEMS | WORD_PROBLEMS)[problem_type]
    choices = rng.sample([truth, *others], 1 + len(others))
    return {
        "question": question, "choices": choices, "answer": choices.index(truth), "hint": "",
        "image": None, "task": "closed choice", "grade": f"grade{rng.randint(*grades)}",
        "subject": subject, "lecture": lecture, "solution": solution}


def scene_problem(things: scene.Scene, rng: random.Random) -> dict | None:
    """A problem of a random type about a scene, or None if the scene allows none of that type."""
    question_type = rng.choice(tuple(SCENE_PROBLEMS))
    for question, solution in questions.draw_questions(things, rng, 1, (question_type,)):
        options = possible_answers(question_type, question, things)
        truth = [option for option in options if solution.endswith(f" {option}.")]
        if truth:  # "so two cats" has none: only the count of all things ends with a number
            others = [option for option in options if option not in truth]
            others = rng.sample(others, min(len(others), 3))
            return make_problem(question_type, question, truth[0], others, solution, rng)
    return None


def possible_answers(question_type: str, question: str, things: scene.Scene) -> list[str]:
    """Everything that the answer to a question of this type may end with."""
    return {
        "kind": list(scene.KINDS), "color": list(scene.COLORS), "place": list(scene.PLACES),
        "same color": ["yes", "no"], "count": list(questions.NUMBERS[1:]),
        "relation": [word for word in ("left", "right", "above", "below") if word in question],
        "farthest": [questions.unique_name(thing, things) for thing in things],
    }[question_type]


def group_problem(rng: random.Random) -> dict:
    group = rng.choice(tuple(GROUPS))
    truth = rng.choice(GROUPS[group])
    others = rng.sample([kind for kind in scene.KINDS if kind not in GROUPS[group]], 2)
    solution = questions.sentence(f"{questions.with_article(truth)} is {group}")
    return make_problem("group", f"Which of these is {group}?", truth, others, solution, rng)


def alphabet_problem(rng: random.Random) -> dict:
    first, *others = words = sorted(rng.sample([*scene.KINDS, *scene.COLORS], 3))
    question = "Which word comes first in a dictionary?"
    solution = questions.sentence(f"by the alphabet: {', '.join(words)}")
    return make_problem("alphabet", question, first, others, solution, rng)


def word_problem(things: scene.Scene, rng: random.Random) -> dict:
    """About the words for one thing of a scene, which is described as context."""
    thing = rng.choice(things)
    words = {"a thing": thing.kind, "a color": thing.color, "a size": thing.size}
    word_class = rng.choice(tuple(words))
    truth = words.pop(word_class)
    problem = make_problem(
        "word class", f"Which word of the text is {word_class}?", truth, list(words.values()),
        questions.sentence(f"{truth} is {word_class}"), rng)
    return problem | {"hint": questions.sentence(f"{questions.noun_phrase(thing)} {thing.place}")}


def is_validation_problem(problem: dict) -> bool:
    """True for the fifth of the problems without a scene that only val and test use.

    The order of the options does not matter.
    """
    content = problem["question"], sorted(problem["choices"])
    return zlib.crc32(repr(content).encode()) % 5 == 0


def draw_problem(scenes: Iterator[scene.Scene], validation: bool,
                 rng: random.Random) -> tuple[dict, scene.Scene | None]:
    """A random problem, and the scene of its image or None if it has no image."""
    choice, problem = rng.random(), None
    if choice < 0.2:
        make = rng.choice((group_problem, alphabet_problem))
        while not problem or is_validation_problem(problem) != validation:
            problem = make(rng)
        return problem, None
    if choice < 0.3:
        return word_problem(next(scenes), rng), None
    while not problem:
        things = next(scenes)
        problem = scene_problem(things, rng)
    if choice < 0.45:  # the scene as text
        return problem | {"hint": questions.caption(things, 0)}, None
    hint = "Look at the picture." if choice < 0.6 else ""
    return problem | {"image": "image.png", "hint": hint}, things


def write_problems(folder: str | Path, seed: int = 0, train: int = 6400, tests: int = 400) -> None:
    """Write problems.json, pid_splits.json and SPLIT/ID/image.png to a new folder.

    val and test have `tests` problems each. Raises InputError if the folder exists.
    """
    rng, problems, splits = random.Random(seed), {}, {split: [] for split in SPLITS}
    training, validation = scene.random_scenes(rng), scene.random_scenes(rng, validation=True)
    order = [split for split, count in zip(SPLITS, (train, tests, tests)) for _ in range(count)]
    with atomic_folder(folder) as temporary:
        for number, split in enumerate(progress(order, "toy problems", "problems"), 1):
            scenes = training if split == "train" else validation
            problem, things = draw_problem(scenes, split != "train", rng)
            problems[str(number)] = problem | {"split": split}
            splits[split].append(str(number))
            if things:
                image = scene.draw_image(things, scene.random_boxes(things, rng), rng)
                (temporary / split / str(number)).mkdir(parents=True)
                image.save(temporary / split / str(number) / problem["image"])
        write_json(temporary / "problems.json", problems)
        write_json(temporary / "pid_splits.json", splits)
