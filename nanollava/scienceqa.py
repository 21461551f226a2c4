"""ScienceQA (Lu et al., 2022), section 5.2 of the paper: problems in, a reasoned answer out, and tables 6 and 8.

A problem is a question with context, options and maybe a picture. The model writes the lecture, the solution and
"The answer is B."; the letter is what counts.
"""

import json
import re
from collections import Counter
from pathlib import Path

import torch

from .chat import replies
from .conversation import IMAGE
from .files import InputError, read_json, read_text
from .image import open_image, preprocess
from .progress import Progress

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
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem["choices"]))
    lines = [IMAGE] if problem.get("image") else []
    lines += [f"Question: {problem['question']}"]
    lines += [f"Context: {problem['hint']}"] if problem["hint"] else []
    return "\n".join([*lines, f"Options: {options}"])


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


def answer_problems(model, tokenizer, problems: dict[str, dict], images: Path, path: Path, batch_size: int = 16,
                    max_new_tokens: int = 512) -> dict[str, str]:
    """The model's replies, also written to a JSONL file as they are made; what is in it already is not asked again.

    images: the folder in which problem 7's picture is 7/image.png. Raises InputError where a picture is not there.
    """
    done = read_answers(path) if path.exists() else {}
    asked = {number: [{"from": "human", "value": question(problem)}]
             for number, problem in problems.items() if number not in done}
    order = sorted(asked, key=lambda number: len(asked[number][0]["value"]))  # a batch is as long as its longest
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file, Progress("ScienceQA", len(problems), "problems", len(done)) as progress:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            files = [images / number / problems[number]["image"] for number in batch if problems[number].get("image")]
            pixels = [preprocess(open_image(file), model.config.image_size) for file in files]
            texts = replies(model, tokenizer, [asked[number] for number in batch],
                            torch.stack(pixels) if pixels else None, max_new_tokens=max_new_tokens)
            done.update(zip(batch, texts))
            file.write("".join(json.dumps({"question_id": number, "text": text}) + "\n"
                               for number, text in zip(batch, texts)))
            file.flush()
            progress.update(len(done))
    return done


def read_answers(path: str | Path) -> dict[str, str]:
    """Replies by problem from a JSONL of {question_id, text}; a problem that comes twice counts with its last."""
    answers = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            row = json.loads(line)
            answers[str(row["question_id"])] = row["text"] + ""
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}, line {number} is no answer: it needs question_id and text") from error
    return answers


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
