"""ScienceQA (Lu et al., 2022): section 5.2 of the paper, tables 6 and 8.

A problem is a multiple-choice question with context, options and sometimes an image. The model
writes the lecture, the solution and "The answer is B."; only the letter is scored. GPT-4, which
does not see the image, can answer too: as a complement to LLaVA, or as a judge between the two.
"""

import re
from pathlib import Path

from ..conversation import IMAGE_TOKEN
from ..infra.io import InputError, path_inside, read_json
from ..teacher.jobs import Job
from ..teacher.ledger import Ledger

LETTERS = "ABCDEFGHIJ"
ORDERS = ("reason-first", "answer-first")
SPLITS = ("train", "val", "test")
CATEGORIES = {  # the columns of the paper's tables
    "NAT": lambda problem: problem["subject"] == "natural science",
    "SOC": lambda problem: problem["subject"] == "social science",
    "LAN": lambda problem: problem["subject"] == "language science",
    "TXT": lambda problem: bool(problem["hint"]),
    "IMG": lambda problem: bool(problem["image"]),
    "NO": lambda problem: not problem["hint"] and not problem["image"],
    "G1-6": lambda problem: problem["grade"] in {f"grade{grade}" for grade in range(1, 7)},
    "G7-12": lambda problem: problem["grade"] in {f"grade{grade}" for grade in range(7, 13)},
    "AVG": lambda problem: True,
}
FIELDS = {"question": str, "choices": list, "answer": int, "hint": str, "subject": str,
          "grade": str, "lecture": str, "solution": str}


def read_problems(folder: Path, split: str) -> dict[str, dict]:
    """The problems of a split by id, in the order of pid_splits.json.

    Raises InputError that names the missing file, split or field.
    """
    all_problems = read_json(folder / "problems.json")
    splits = read_json(folder / "pid_splits.json")
    if not isinstance(all_problems, dict):
        raise InputError(f"{folder / 'problems.json'} is not a JSON object of problems by id")
    if not isinstance(splits, dict) or not splits.get(split):
        raise InputError(f"{folder / 'pid_splits.json'} has no split {split!r}")
    problems = {}
    for problem_id in map(str, splits[split]):
        name = f"{folder / 'problems.json'}, problem {problem_id} of {split}"
        problems[problem_id] = check_problem(all_problems.get(problem_id), name)
    return problems


def check_problem(problem, name: str) -> dict:
    """The problem itself. Raises InputError, which begins with `name`, if it is not usable."""
    if not isinstance(problem, dict):
        raise InputError(f"{name} is missing")
    bad = [key for key, kind in FIELDS.items() if not isinstance(problem.get(key), kind)]
    if bad:
        raise InputError(f"{name} lacks {', '.join(bad)}")
    if not 0 <= problem["answer"] < len(problem["choices"]) <= len(LETTERS):
        raise InputError(f"{name}: answer {problem['answer']} is not one of its "
                         f"{len(problem['choices'])} choices (at most {len(LETTERS)})")
    return problem


def format_question(problem: dict) -> str:
    """The prompt of a problem: the image, if there is one, then question, context and options."""
    lines = [IMAGE_TOKEN] if problem.get("image") else []
    lines += [f"Question: {problem['question']}"]
    lines += [f"Context: {problem['hint']}"] if problem["hint"] else []
    return "\n".join([*lines, format_options(problem["choices"])])


def format_options(choices: list[str]) -> str:
    options = (f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices))
    return "Options: " + " ".join(options)


def format_answer(problem: dict, order: str = "reason-first") -> str:
    """The training target: lecture, solution and the letter, in one of two orders (table 8)."""
    letter = f"The answer is {LETTERS[problem['answer']]}."
    reasons = [problem[key].strip() for key in ("lecture", "solution") if problem[key].strip()]
    return "\n".join([letter, *reasons] if order == "answer-first" else [*reasons, letter])


def read_rows(folder: Path, split: str, order: str = "reason-first") -> list[dict]:
    """A split as rows of LLaVA JSON. Image paths are relative to `folder`: split/id/image.png."""
    rows = []
    for problem_id, problem in read_problems(folder, split).items():
        row = {"id": problem_id}
        if problem.get("image"):
            row["image"] = f"{split}/{problem_id}/{problem['image']}"
        row["conversations"] = [{"from": "human", "value": format_question(problem)},
                                {"from": "gpt", "value": format_answer(problem, order)}]
        rows.append(row)
    return rows


def questions_with_images(problems: dict[str, dict],
                          folder: Path) -> dict[str, tuple[str, list[Path]]]:
    """Each problem's question and image files. The image of problem 7 is folder/7/image.png."""
    questions = {}
    for problem_id, problem in problems.items():
        image = f"{problem_id}/{problem.get('image')}"
        images = [Path(path_inside(folder, image))] if problem.get("image") else []
        questions[problem_id] = (format_question(problem), images)
    return questions


def parse_choice(reply: str, problem: dict) -> int | None:
    """The index of the problem's option that a reply names.

    "The answer is B." counts anywhere in the reply; so does a reply that begins with a letter
    alone: "B", "(B)", "B. A comet". None if the reply names no option, several, or one that the
    problem does not have.
    """
    reply = reply.strip()
    letters = (re.findall(r"(?i:answer is):? *\(?([A-J])\b", reply)
               or re.findall(r"^\(?([A-J])(?:[).:]|$)", reply))
    options = {LETTERS.index(letter) for letter in letters}
    return options.pop() if len(options) == 1 and max(options) < len(problem["choices"]) else None


def score(problems: dict[str, dict], answers: dict[str, str]) -> dict:
    """{"accuracy": {"NAT": percent, ..., "AVG": percent}, "counts": problems of each category,
    "unreadable": replies that name no option, "missing": problems without a reply}.

    An unreadable or missing reply counts as wrong. A category without problems has accuracy None.
    """
    counts, correct = dict.fromkeys(CATEGORIES, 0), dict.fromkeys(CATEGORIES, 0)
    unreadable = 0
    for problem_id, problem in problems.items():
        choice = parse_choice(answers.get(problem_id, ""), problem)
        unreadable += problem_id in answers and choice is None
        for category, includes in CATEGORIES.items():
            if includes(problem):
                counts[category] += 1
                correct[category] += choice == problem["answer"]
    accuracy = {category: 100 * correct[category] / count if count else None
                for category, count in counts.items()}
    return {"accuracy": accuracy, "counts": counts, "unreadable": unreadable,
            "missing": len(problems.keys() - answers.keys())}


# ---------------------------------------------------------------------------------------------
# Together with GPT-4


ALONE = """You answer multiple-choice questions from school. First say what one has to know, \
then how it leads to the answer, and end with a line such as "The answer is B." You cannot see \
pictures. Where what you are told is not enough to choose, say so, and name no letter."""

VERDICT = """You answer multiple-choice questions from school. Two others have answered the one \
that follows, and they do not agree; if there is a picture, the first of them saw it, and you \
cannot. Weigh their reasons, then give your own final answer: the reasons, and as the last line \
one such as "The answer is B.\""""


def text_only_question(problem: dict) -> str:
    """The question for GPT-4, which does not see the image."""
    return format_question(problem).replace(IMAGE_TOKEN, "(Here is a picture.)")


def gpt_job(problems: dict[str, dict], examples: list[dict], ledger: Ledger, model: str) -> Job:
    """The job that asks GPT-4 to answer alone, after the solved `examples` (two in the paper).

    GPT-4 may reply that it cannot answer.
    """
    prefix = [{"role": "system", "content": ALONE}]
    for example in examples:
        prefix += [{"role": "user", "content": text_only_question(example)},
                   {"role": "assistant", "content": format_answer(example)}]

    def messages(problem_id: str) -> list[dict]:
        return [*prefix, {"role": "user", "content": text_only_question(problems[problem_id])}]

    return Job("alone", model, ledger, list(problems), "problems", item_id=str,
               messages=messages, parse=lambda _, reply: reply)


def verdict_job(problems: dict[str, dict], llava: dict[str, str], gpt: dict[str, str],
                ledger: Ledger, model: str) -> Job:
    """The job that asks GPT-4 for a final answer where the answers of LLaVA and GPT-4 differ."""

    def messages(problem_id: str) -> list[dict]:
        parts = [text_only_question(problems[problem_id])]
        for number, replies in enumerate((llava, gpt), 1):
            reply = replies.get(problem_id, "").strip() or "I do not know."
            parts.append(f"[Answer {number}]\n{reply}")
        return [{"role": "system", "content": VERDICT},
                {"role": "user", "content": "\n\n".join(parts)}]

    def parse(problem_id: str, reply: str) -> str:
        if parse_choice(reply, problems[problem_id]) is None:
            raise ValueError("the reply names no option")
        return reply

    disputed = [problem_id for problem_id, problem in problems.items()
                if parse_choice(llava.get(problem_id, ""), problem)
                != parse_choice(gpt.get(problem_id, ""), problem)]
    return Job("verdict", model, ledger, disputed, "problems", item_id=str,
               messages=messages, parse=parse)


def complement(problems: dict[str, dict], llava: dict[str, str],
               gpt: dict[str, str]) -> dict[str, str]:
    """GPT-4's answers, and LLaVA's for the problems where GPT-4 names no option."""
    readable = {problem_id: reply for problem_id, reply in gpt.items()
                if parse_choice(reply, problems[problem_id]) is not None}
    return llava | readable
