"""ScienceQA (Lu et al., 2022), section 5.2 of the paper: problems in, a reasoned answer out, and tables 6 and 8.

A problem is a question with context, options and maybe a picture. The model writes the lecture, the solution and
"The answer is B."; the letter is what counts. GPT-4, which sees no picture, can complement it or judge between the two.
"""

import re
from collections import Counter
from pathlib import Path

from ..conversation import IMAGE_TOKEN
from ..infra.io import InputError, read_json
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
    "G1-6": lambda problem: problem["grade"] in {f"grade{number}" for number in range(1, 7)},
    "G7-12": lambda problem: problem["grade"] in {f"grade{number}" for number in range(7, 13)},
    "AVG": lambda problem: True,
}
FIELDS = {"question": str, "choices": list, "answer": int, "hint": str, "subject": str, "grade": str, "lecture": str,
          "solution": str}


def read_problems(folder: str | Path, split: str) -> dict[str, dict]:
    """The problems of a split by their id, in the order of pid_splits.json. Raises InputError, naming a broken one."""
    folder = Path(folder)
    problems, splits = read_json(folder / "problems.json"), read_json(folder / "pid_splits.json")
    if not isinstance(problems, dict) or not isinstance(splits, dict) or not splits.get(split):
        raise InputError(f"{folder}: there is no split {split!r} in pid_splits.json, or no problems in problems.json")
    chosen = {}
    for number in map(str, splits[split]):
        problem = problems.get(number)
        name = f"{folder / 'problems.json'}, problem {number} of {split}"
        if not isinstance(problem, dict):
            raise InputError(f"{name} is missing")
        wrong = [key for key, kind in FIELDS.items() if not isinstance(problem.get(key), kind)]
        if wrong:
            raise InputError(f"{name} lacks {', '.join(wrong)}")
        if not 0 <= problem["answer"] < len(problem["choices"]) <= len(LETTERS):
            raise InputError(f"{name}: its answer, {problem['answer']}, is none of its choices")
        chosen[number] = problem
    return chosen


def question(problem: dict) -> str:
    """What the model is asked, its picture standing before it."""
    lines = [IMAGE_TOKEN] if problem.get("image") else []
    lines += [f"Question: {problem['question']}"]
    lines += [f"Context: {problem['hint']}"] if problem["hint"] else []
    return "\n".join([*lines, options(problem["choices"])])


def options(choices: list[str]) -> str:
    return "Options: " + " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices))


def answer(problem: dict, order: str = "reason-first") -> str:
    """What it learns to say: lecture, solution and the letter, in one of two orders (table 8)."""
    letter = f"The answer is {LETTERS[problem['answer']]}."
    reasons = [problem[part].strip() for part in ("lecture", "solution") if problem[part].strip()]
    return "\n".join([letter, *reasons] if order == "answer-first" else [*reasons, letter])


def rows(folder: str | Path, split: str, order: str = "reason-first") -> list[dict]:
    """A split as LLaVA's JSON; its pictures lie in the same folder, at split/id/image.png."""
    made = []
    for number, problem in read_problems(folder, split).items():
        picture = {"image": f"{split}/{number}/{problem['image']}"} if problem.get("image") else {}
        turns = [{"from": "human", "value": question(problem)}, {"from": "gpt", "value": answer(problem, order)}]
        made.append({"id": number, **picture, "conversations": turns})
    return made


def letter_of(text: str, choices: int) -> int | None:
    """The option that a reply names, from 0; None where it names none, or several, or one that is not there.

    "The answer is B." anywhere in it counts, or a reply that is a letter and little else: "B", "(B)", "B. A comet".
    """
    text = text.strip()
    found = re.findall(r"(?i:answer is):? *\(?([A-J])\b", text) or re.findall(r"^\(?([A-J])(?:[).:]|$)", text)
    named = {LETTERS.index(letter) for letter in found}
    return named.pop() if len(named) == 1 and max(named) < choices else None


def asked(problems: dict[str, dict], images: Path) -> dict[str, tuple[str, list[Path]]]:
    """The question and the picture files of each problem; `images` is where problem 7's is 7/image.png."""
    return {number: (question(problem), [images / number / problem["image"]] if problem.get("image") else [])
            for number, problem in problems.items()}


def score(problems: dict[str, dict], answers: dict[str, str]) -> dict:
    """{"accuracy": {"NAT": percent, ..., "AVG": percent}, "counts": problems in each, "unreadable", "missing"}.

    What cannot be read counts as wrong. A category without problems has no accuracy: None.
    """
    right, counts, unreadable, missing = Counter(), Counter(), 0, 0
    for number, problem in problems.items():
        chosen = letter_of(answers.get(number, ""), len(problem["choices"]))
        missing += number not in answers
        unreadable += number in answers and chosen is None
        for name, belongs in CATEGORIES.items():
            if belongs(problem):
                counts[name] += 1
                right[name] += chosen == problem["answer"]
    accuracy = {name: 100 * right[name] / counts[name] if counts[name] else None for name in CATEGORIES}
    return {"accuracy": accuracy, "counts": {name: counts[name] for name in CATEGORIES}, "unreadable": unreadable,
            "missing": missing}


# ---------------------------------------------------------------------------------------------
# Together with GPT-4


ALONE = """You answer multiple-choice questions from school. First say what one has to know, then how it leads to the \
answer, and end with a line such as "The answer is B." You cannot see pictures. Where what you are told is not enough \
to choose, say so, and name no letter."""

VERDICT = """You answer multiple-choice questions from school. Two others have answered the one that follows, and they \
do not agree; if there is a picture, the first of them saw it, and you cannot. Weigh their reasons, then give your own \
final answer: the reasons, and as the last line one such as "The answer is B.\""""


def told(problem: dict) -> str:
    """The question for one who sees no picture."""
    return question(problem).replace(IMAGE_TOKEN, "(Here is a picture.)")


def alone(problems: dict[str, dict], examples: list[dict], ledger: Ledger, model: str) -> Job:
    """GPT-4's own answers; as in the paper it is shown two solved problems, `examples`. It may say that it cannot."""
    shown = [{"role": role, "content": text} for problem in examples
             for role, text in (("user", told(problem)), ("assistant", answer(problem)))]
    return Job("alone", model, ledger, list(problems), "problems", item_id=str, parse=lambda _, reply: reply,
               messages=lambda number: [{"role": "system", "content": ALONE}, *shown,
                                        {"role": "user", "content": told(problems[number])}])


def judge(problems: dict[str, dict], ours: dict[str, str], theirs: dict[str, str], ledger: Ledger, model: str) -> Job:
    """GPT-4's last word, where its own answer and ours name different letters."""

    def messages(number: str) -> list[dict]:
        replies = [f"[Answer {which}]\n{texts.get(number, '').strip() or 'I do not know.'}"
                   for which, texts in enumerate((ours, theirs), 1)]
        return [{"role": "system", "content": VERDICT},
                {"role": "user", "content": "\n\n".join([told(problems[number]), *replies])}]

    def read(number: str, reply: str) -> str:
        if letter_of(reply, len(problems[number]["choices"])) is None:
            raise ValueError("it names no option")
        return reply

    apart = [number for number, problem in problems.items()
             if len({letter_of(texts.get(number, ""), len(problem["choices"])) for texts in (ours, theirs)}) > 1]
    return Job("verdict", model, ledger, apart, "problems", item_id=str, messages=messages, parse=read)


def complement(problems: dict[str, dict], ours: dict[str, str], theirs: dict[str, str]) -> dict[str, str]:
    """GPT-4's answers, and ours where it has none."""
    return ours | {number: text for number, text in theirs.items()
                   if letter_of(text, len(problems[number]["choices"])) is not None}
