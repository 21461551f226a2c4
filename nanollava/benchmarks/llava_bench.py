"""LLaVA-Bench: section 5.1 and table 4 of the paper. A text-only GPT-4 grades LLaVA's replies.

Each question has a reference reply, which GPT-4 wrote from captions and boxes. The judge reads the
same captions and boxes and both replies, without their names. It gives each reply a score from 1 to
10 and its reasons. The result is LLaVA's sum of scores in percent of the reference's, per category.
"""

import re
from collections import defaultdict
from pathlib import Path

from ..infra.io import InputError
from ..infra.json_io import read_jsonl
from ..teacher.jobs import Job
from ..teacher.ledger import Ledger

TASK = """You grade the replies of two assistants to a question about a picture. You cannot see \
the picture, but you are told what is in it; take that as the truth, and do not speak of it as a \
text.

Judge how helpful, relevant, accurate and detailed each reply is. Give each one score from 1 to \
10, a higher one for the better reply. Do not let the order of the replies, or their mere length, \
weigh.

The first line of your answer is the two scores alone, that of assistant 1 and that of assistant \
2, with a space between them. Then give your reasons."""
NUMBER = r"(\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*10)?"  # "8", "8.5", "8/10"
QUESTION = {"question_id": int | str, "image": str, "text": str, "category": str}
REFERENCE = {"question_id": int | str, "text": str}
CONTEXT = {"image?": int | str, "id?": int | str, "caption?": str, "captions?": [str],
           "instances?": [{"category": str, "bbox": [float]}]}
MARKUP = re.compile(r"[*_`$#{}\[\]()]|\\[a-z]+(?={)")  # Markdown and LaTeX
LABEL = r"(?:(?:the|final|overall|my) )*(?:scores?|ratings?|grades?)\b[^\w\n]*(?:are[^\w\n]*)?"
NAMED = r"assistant\s*{}\b[^\n\d]{{0,20}}?[:=]\s*"
TWO_SCORES = re.compile(  # on a line of their own, or each with the name of its assistant
    rf"^[^\w\n]*(?:{LABEL})?{NUMBER}(?:[\s,;|&]+|\s+and\s+){NUMBER}[^\w\n]*$"
    rf"|{NAMED.format(1)}{NUMBER}\D{{0,300}}?{NAMED.format(2)}{NUMBER}",
    re.IGNORECASE | re.MULTILINE)


def image_context(row: dict) -> str:
    """An image as text: its `caption`, or COCO's `captions` and `instances` (name and box)."""
    if row.get("caption") is not None:
        return row["caption"]
    boxes = [f"{box['category']}: {[round(number, 3) for number in box['bbox']]}"
             for box in row.get("instances") or []]
    return "\n".join([*(row.get("captions") or []), *boxes])


def build_items(rows: list[dict], reference: Path, context: Path,
                answers: dict[str, str]) -> list[dict]:
    """Questions with all that the judge reads: id, category, question, context, reference, answer.

    rows: the file of questions. reference: JSONL of question_id and text. context: JSONL by image.
    answers: LLaVA's replies by question id.
    Raises InputError for a question without reference, context or answer.
    """
    contexts = {str(row.get("image", row.get("id"))): image_context(row)
                for row in read_jsonl(context, CONTEXT)}
    references = {str(row["question_id"]): row["text"]
                  for row in read_jsonl(reference, REFERENCE)}
    items = []
    for row in rows:
        question_id, image = str(row["question_id"]), str(row["image"])
        for source, is_present in ((reference, question_id in references),
                                   (context, contexts.get(image)),
                                   ("the answers", question_id in answers)):
            if not is_present:
                raise InputError(f"question {question_id} (image {image}) has no line in {source}")
        items.append({"id": question_id, "category": row["category"], "question": row["text"],
                      "context": contexts[image],
                      "reference": references[question_id], "answer": answers[question_id]})
    return items


def judge_messages(item: dict, ours_first: bool) -> list[dict]:
    """The request for one grade: context, question and the two replies."""
    replies = [item["reference"], item["answer"]]
    if ours_first:
        replies.reverse()
    parts = [f"[In the picture]\n{item['context']}", f"[Question]\n{item['question']}"]
    parts += [f"[Assistant {number}]\n{reply}\n[End of assistant {number}]"
              for number, reply in enumerate(replies, 1)]
    return [{"role": "system", "content": TASK}, {"role": "user", "content": "\n\n".join(parts)}]


def parse_grade(reply: str, ours_first: bool) -> dict:
    """{"ours": score, "reference": score, "reasons": text} of a judge's reply.

    The two scores are in the first line or else, as some models give their reasons first, where
    the reply last names two. Raises ValueError if there are not two scores from 1 to 10.
    """
    reply = reply.strip()
    plain = MARKUP.sub(lambda markup: " " * len(markup[0]), reply)
    matches = list(TWO_SCORES.finditer(plain))
    match = matches[-1 if matches[0].start() else 0] if matches else None
    scores = [float(score) for score in match.groups() if score] if match else []
    if not scores or not all(1 <= score <= 10 for score in scores):
        raise ValueError("the reply does not name two scores from 1 to 10")
    ours, reference = scores if ours_first else reversed(scores)
    reasons = f"{reply[:match.start()].strip()}\n{reply[match.end() :].strip()}"
    return {"ours": ours, "reference": reference, "reasons": reasons.strip()}


def judge_job(items: list[dict], both_orders: bool, ledger: Ledger, model: str) -> Job:
    """The job that grades all items; each of its results is a grade.

    As in the paper the reference comes first. With both orders each item is graded twice, so that
    a judge's preference for the first reply cancels out.
    """
    orders = (False, True) if both_orders else (False,)
    pairs = [(item, ours_first) for item in items for ours_first in orders]
    return Job("judge", model, ledger, pairs, "replies",
               item_id=lambda pair: f"{pair[0]['id']}-{int(pair[1])}",
               messages=lambda pair: judge_messages(*pair),
               parse=lambda pair, reply: parse_grade(reply, pair[1]))


def summarize(job: Job) -> dict:
    """The result of a judge's job, ready for JSON.

    {"scores": {category, or "all": {"relative": percent, "ours" and "reference": mean scores,
    "grades": how many}}, "without_grade": question ids that no mean includes,
    "rejected": {reason: replies}, "grades": every grade with its reasons}.
    """
    grades, rejected, _ = job.result()
    rows, without_grade, categories = [], set(), defaultdict(list)
    for (item, ours_first), grade in zip(job.items, grades):
        if grade is None:
            without_grade.add(item["id"])
            continue
        row = {"question_id": item["id"], "category": item["category"], "ours_first": ours_first}
        rows.append(row | grade)
        categories[item["category"]].append(grade)
    if rows:
        categories["all"] = rows
    return {"scores": {category: mean_scores(members) for category, members in categories.items()},
            "without_grade": sorted(without_grade), "rejected": dict(rejected), "grades": rows}


def mean_scores(grades: list[dict]) -> dict:
    ours, reference = (sum(grade[name] for grade in grades) for name in ("ours", "reference"))
    return {"relative": 100 * ours / reference, "ours": ours / len(grades),
            "reference": reference / len(grades), "grades": len(grades)}
