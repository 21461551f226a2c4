"""ScienceQA (Lu et al., 2022): section 5.2 of the paper, tables 6 and 8.

A problem is a multiple-choice question with context, options and sometimes an image. The model
writes the lecture, the solution and "The answer is B."; only the letter is scored. GPT-4, which
does not see the image, can answer too: as a complement to LLaVA, or as a judge between the two.
"""

import re
from pathlib import Path

from ..conversation import IMAGE_TOKEN
from ..infra.io import InputError, path_inside
from ..infra.json_io import read_json
from ..infra.shapes import check_shape, quote
from ..teacher.jobs import Job, remove_thoughts
from ..teacher.ledger import Ledger

LETTERS = "ABCDEFGHIJ"
ORDERS = ("reason-first", "answer-first")
SPLITS = ("train", "val", "test")
CATEGORIES = {  # the columns of the paper's tables
    "NAT": lambda problem: problem["subject"] == "natural science",
    "SOC": lambda problem: problem["subject"] == "social science",
    "LAN": lambda problem: problem["subject"] == "language science",
    "TXT": lambda problem: bool(problem["hint"]),
    "IMG": lambda problem: bool(problem.get("image")),
    "NO": lambda problem: not problem["hint"] and not problem.get("image"),
    "G1-6": lambda problem: problem["grade"] in {f"grade{grade}" for grade in range(1, 7)},
    "G7-12": lambda problem: problem["grade"] in {f"grade{grade}" for grade in range(7, 13)},
    "AVG": lambda problem: True,
}
PROBLEM = {"question": str, "choices": [str], "answer": range(len(LETTERS)), "hint": str,
           "image?": str, "subject": str, "grade": str, "lecture": str, "solution": str}


def read_problems(folder: Path, split: str) -> dict[str, dict]:
    """The problems of a split by id, in the order of pid_splits.json.

    Raises InputError that names the missing file, split or field.
    """
    path = folder / "problems.json"
    all_problems = read_json(path, dict)
    problems = {}
    for problem_id in read_json(folder / "pid_splits.json", {split: [int | str]})[split]:
        where = f"{path}, problem {quote(problem_id)} of {split}"
        problem = all_problems.get(str(problem_id))
        check_shape(problem, PROBLEM, where)
        if not problem["answer"] < len(problem["choices"]) <= len(LETTERS):
            raise InputError(f"{where}: answer {problem['answer']} is not one of its "
                             f"{len(problem['choices'])} choices (at most {len(LETTERS)})")
        problems[str(problem_id)] = problem
    if not problems:
        raise InputError(f"{folder / 'pid_splits.json'}: split {split} is empty")
    return problems


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


# How models name an option. A lower-case letter, and A and I, which are words, must be followed by
# the end of a line, punctuation or a reason.
_END = r"(?=\s*(?:[(),;:!?]|\.(?!\w)|\n|$|[-=\u2013\u2014]\s|because\b|since\b|as\b))"
_LETTER = (rf"\b([B-HJ](?![\w'-]|\.\w\.)|[A-Ja-j]{_END})"
           r"(?!\)?\s*(?:(?:and|or|nor)\s+\(?[A-J]\b|(?:is|are|was|can|cannot|does|has|isn't)\b))")
_FILLER = (r"(?:[\s:=,()-]|\b(?i:is|are|was|would|should|must|be|to|this|the|question|option|"
           r"letter|choice|answer|correct|right|best|final|thus|clearly|most|likely|probably)\b)*")
_IS_CORRECT = (r"[^\w\n]*(?:\([^)\n]*\)\s*)?(?:is|looks|seems)\s"
               r"(?:(?:the|clearly|most|likely|my)\s)*(?:correct|right|best|true|answer)\b")
MENTIONS = [re.compile(pattern, re.MULTILINE) for pattern in (  # the clearest first
    # "the answer is (B)", "Answer: B", "B is correct", "(B) is the best answer"
    rf"\b(?i:answer|ans)\b{_FILLER}{_LETTER}|\b([A-J])\b{_IS_CORRECT}",
    r"^[^\w\n]*([A-Ja-j])[^\w\n]*$",  # a letter on a line of its own
    rf"\A\W*([A-Ja-j]){_END}",  # "B, because ...", "(B) a comet"
    # "I choose option B", "Correct: B", "Therefore (B)."
    r"\b(?i:choice|option|letter|choose|pick|select|go with|would say|think|conclusion|correct|"
    rf"it is|it's|therefore|thus|hence|so)\b{_FILLER}{_LETTER}",
)]
BRACKETS = str.maketrans("[]<>\u3010\u3011", "()()()")
MARKUP = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\b|\\[()]|[*_`$#{}\"\u201c\u201d]"
                    r"|'(?=[A-J]')|(?<='[A-J])'")


def parse_choice(reply: str, problem: dict) -> int | None:
    """The index of the problem's option that a reply names; the last clear mention counts.

    None if the reply names no option by its letter, or one that the problem does not have.
    """
    reply = remove_thoughts(reply).replace(r"\boxed", " answer: ").translate(BRACKETS)
    reply = MARKUP.sub("", reply).strip()
    for pattern in MENTIONS:
        letters = [next(filter(None, match.groups())) for match in pattern.finditer(reply)]
        if letters:
            option = LETTERS.index(letters[-1].upper())
            return option if option < len(problem["choices"]) else None
    return None


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
