"""LLaVA-Bench, section 5.1 and table 4 of the paper: a language-only GPT-4 grades replies against its own.

For each question there is a reference reply, which GPT-4 wrote knowing captions and boxes as text. The judge is told
the same text and sees both replies, not whose they are; it gives each a score from 1 to 10, then its reasons. What
counts is ours as a percentage of the reference's, summed over a category.
"""

import re
from collections import defaultdict
from pathlib import Path

from ..infra.io import InputError, read_jsonl
from ..teacher.jobs import Job
from ..teacher.ledger import Ledger

TASK = """You grade the replies of two assistants to a question about a picture. You cannot see the picture, but you \
are told what is in it; take that as the truth, and do not speak of it as a text.

Judge how helpful, relevant, accurate and detailed each reply is. Give each one score from 1 to 10, a higher one for \
the better reply. Do not let the order of the replies, or their mere length, weigh.

The first line of your answer is the two scores alone, that of assistant 1 and that of assistant 2, with a space \
between them. Then give your reasons."""


def context_of(row: dict) -> str:
    """What is in a picture, as text: a `caption`, or COCO's `captions` and `instances` (name and box)."""
    if "caption" in row:
        return row["caption"]
    boxes = [f"{box['category']}: {[round(number, 3) for number in box['bbox']]}" for box in row.get("instances", [])]
    return "\n".join([*row["captions"], *boxes])


def join(rows: list[dict], reference: Path, context: Path, answers: dict[str, str]) -> list[dict]:
    """The rows of a file of questions with what the judge needs: id, category, question, context, reference, answer.

    Raises InputError where a question lacks its reference, its context or its answer.
    """
    told = {}
    for row in read_jsonl(context):
        told[str(row.get("image", row.get("id")))] = row
    theirs = {str(row["question_id"]): row["text"] for row in read_jsonl(reference, ("question_id", "text"))}
    items = []
    for row in rows:
        number, image = str(row["question_id"]), str(row["image"])
        for where, found in ((reference, number in theirs), (context, image in told),
                             ("the answers", number in answers)):
            if not found:
                raise InputError(f"question {number} (picture {image}) has no line in {where}")
        items.append({"id": number, "category": row["category"], "question": row["text"], "reference": theirs[number],
                      "context": context_of(told[image]), "answer": answers[number]})
    return items


def messages(item: dict, ours_first: bool) -> list[dict]:
    """What the judge is asked."""
    pair = [item["answer"], item["reference"]] if ours_first else [item["reference"], item["answer"]]
    parts = [f"[In the picture]\n{item['context']}", f"[Question]\n{item['question']}",
             *(f"[Assistant {number}]\n{reply}\n[End of assistant {number}]" for number, reply in enumerate(pair, 1))]
    return [{"role": "system", "content": TASK}, {"role": "user", "content": "\n\n".join(parts)}]


def grade(reply: str, ours_first: bool) -> dict:
    """{"ours": score, "reference": score, "reasons": text}. Raises ValueError where there are no two scores."""
    first, _, reasons = reply.strip().partition("\n")
    found = re.fullmatch(r"\W*(\d+(?:\.\d+)?)(?:\s*/\s*10)?[\s,;]+(\d+(?:\.\d+)?)(?:\s*/\s*10)?\W*", first)
    scores = [float(score) for score in found.groups()] if found else []
    if not scores or not all(1 <= score <= 10 for score in scores):
        raise ValueError("the first line is not two scores from 1 to 10")
    ours, reference = scores if ours_first else reversed(scores)
    return {"ours": ours, "reference": reference, "reasons": reasons.strip()}


def job(items: list[dict], both_orders: bool, ledger: Ledger, model: str) -> Job:
    """All that the judge is to be asked; a result is a grade. As in the paper the reference stands first; in both
    orders, what the judge gives for standing first cancels out."""
    asked = [(item, ours_first) for item in items for ours_first in ((False, True) if both_orders else (False,))]
    return Job("judge", model, ledger, asked, "replies", item_id=lambda pair: f"{pair[0]['id']}-{int(pair[1])}",
               messages=lambda pair: messages(*pair), parse=lambda pair, reply: grade(reply, pair[1]))


def summary(judge: Job) -> dict:
    """Per category, and for all: ours relative to the reference in percent, mean scores, how many grades; the grades
    one by one, with the reasons. What got no grade is named, and in no mean."""
    grades, failed, _ = judge.result()
    rows = [{"question_id": item["id"], "category": item["category"], "ours_first": ours_first, **found}
            for (item, ours_first), found in zip(judge.items, grades) if found]
    groups = defaultdict(list)
    for row in rows:
        groups[row["category"]].append(row)
    groups["all"] = rows
    table = {}
    for name, members in groups.items():
        if members:
            ours, reference = (sum(row[whose] for row in members) for whose in ("ours", "reference"))
            table[name] = {"relative": 100 * ours / reference, "ours": ours / len(members),
                           "reference": reference / len(members), "grades": len(members)}
    missing = sorted({item["id"] for (item, _), found in zip(judge.items, grades) if not found})
    return {"scores": table, "without_grade": missing, "rejected": dict(failed), "grades": rows}
