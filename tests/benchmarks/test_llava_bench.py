import json

import pytest

from nanollava.benchmarks import llava_bench
from nanollava.infra.io import InputError
from nanollava.teacher.ledger import Answer, Ledger

ITEM = {"id": "1", "category": "conv", "question": "What is there?", "context": "A red cat.",
        "reference": "A cat.", "answer": "A red cat sits."}


@pytest.mark.parametrize("reply, ours, reference", [
    ("8 6\nGood.", 6, 8), ("8.5, 9\nGood.", 9, 8.5), ("**7/10 8/10**\nGood.", 8, 7),
    ("\n10 1", 1, 10), ("8 6.", 6, 8), ("[8, 6]", 6, 8), ("(8, 6)", 6, 8), ("8 and 6", 6, 8),
    ("Scores: 8 6\nGood.", 6, 8), ("**Scores:** 8, 6", 6, 8), ("The scores are 8 and 6.", 6, 8),
    ("### Scores\n8 6\n### Reasons\nGood.", 6, 8), ("| 8 | 6 |", 6, 8), ("8\n6\nGood.", 6, 8),
    (r"\boxed{8 6}", 6, 8), (r"$\boxed{\text{8 6}}$", 6, 8), ("8 out of 10, 6 out of 10", 6, 8),
    ("Assistant 1: 8\nAssistant 2: 6\nGood.", 6, 8),
    ("**Assistant 1:** 8/10\nIt names the cat.\n\n**Assistant 2:** 6/10\nIt does not.", 6, 8),
    ("Assistant 1's score: 8, Assistant 2's score: 6", 6, 8),
    ("| Assistant 1 | Assistant 2 |\n|---|---|\n| 8 | 6 |", 6, 8),
    ("Both are good, and the first is better.\n\nFinal scores: 8 6", 6, 8),
    ("8 6\nBoth name the 2 cats.\nHelpfulness and detail:\n9 9", 6, 8),
    ("At first I thought of this:\n5 5\nBut no:\n8 6", 6, 8),
])
def test_grade_assigns_the_two_scores_by_order(reply, ours, reference):
    grade = llava_bench.parse_grade(reply, ours_first=False)
    assert (grade["ours"], grade["reference"]) == (ours, reference)
    assert llava_bench.parse_grade(reply, ours_first=True)["ours"] == reference


@pytest.mark.parametrize("reply", ["", "Assistant 1 is better.", "8\nGood.", "8 11\nGood.", "0 5",
                                   "-1 -1", "7 8 9", "8 of 2 6", "Scores: 8",
                                   "Assistant 1: 8", "They differ by 2 or 3.", "Cats: 2 3 4"])
def test_reply_without_two_scores_is_rejected(reply):
    with pytest.raises(ValueError, match="does not name two scores"):
        llava_bench.parse_grade(reply, ours_first=False)


def test_judge_reads_both_replies_without_their_names():
    ours_second, ours_first = (llava_bench.judge_messages(ITEM, ours_first)[1]["content"]
                               for ours_first in (False, True))
    assert ours_second.index("A cat.") < ours_second.index("A red cat sits.")
    assert ours_first.index("A cat.") > ours_first.index("A red cat sits.")
    assert "What is there?" in ours_second and "reference" not in ours_second.lower()


class FakeJudge:
    """Gives the first reply one point more than the second, and no grade to a question on a dog."""

    def __init__(self):
        self.requests = 0

    def __call__(self, messages):
        self.requests += 1
        reply = "no idea" if "dog" in messages[1]["content"] else "8 7\nThe first."
        return Answer(reply, 10, 2, complete=True)


def test_scores_are_relative_and_leave_out_questions_without_grade(tmp_path):
    items = [ITEM, {**ITEM, "id": "2", "category": "detail"},
             {**ITEM, "id": "3", "question": "A dog?"}]
    judge = FakeJudge()
    for _ in range(2):  # the second pass sends no request
        with Ledger(tmp_path / "ledger") as ledger:
            job = llava_bench.judge_job(items, both_orders=False, ledger=ledger, model="x")
            for item in job.pending():
                job.ask(item, judge, lambda: True)
            result = llava_bench.summarize(job)
    assert judge.requests == 2 + 3
    assert list(result["scores"]) == ["conv", "detail", "all"]
    assert result["scores"]["conv"] == {"relative": 87.5, "ours": 7, "reference": 8, "grades": 1}
    assert result["scores"]["all"]["grades"] == 2 and result["without_grade"] == ["3"]
    assert result["grades"][0]["reasons"] == "The first."


def test_no_grade_at_all_gives_no_scores(tmp_path):
    with Ledger(tmp_path / "ledger") as ledger:
        job = llava_bench.judge_job([ITEM], both_orders=False, ledger=ledger, model="x")
        result = llava_bench.summarize(job)
    assert (result["scores"], result["without_grade"]) == ({}, ["1"])


def test_both_orders_cancel_the_preference_for_the_first_reply(tmp_path):
    with Ledger(tmp_path / "ledger") as ledger:
        job = llava_bench.judge_job([ITEM], both_orders=True, ledger=ledger, model="x")
        for item in job.pending():
            job.ask(item, FakeJudge(), lambda: True)
        scores = llava_bench.summarize(job)["scores"]
    assert scores["all"] == {"relative": 100, "ours": 7.5, "reference": 7.5, "grades": 2}


def test_items_join_question_reference_and_context(tmp_path):
    def lines(name, *rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    questions = [{"question_id": 1, "image": "7.jpg", "text": "What?", "category": "conv"}]
    reference = lines("r", {"question_id": 1, "text": "A cat."})
    boxes = {"image": "7.jpg", "captions": ["A cat."],
             "instances": [{"category": "cat", "bbox": [0.12345, 0, 1, 1]}]}
    answers = {"1": "A dog."}
    (item,) = llava_bench.build_items(questions, reference, lines("c", boxes), answers)
    assert item["context"] == "A cat.\ncat: [0.123, 0, 1, 1]" and item["answer"] == "A dog."
    with pytest.raises(InputError, match="question 1 .* has no line in the answers"):
        llava_bench.build_items(questions, reference, lines("c", boxes), {})
    other = lines("c", {"image": "8.jpg", "caption": ""})
    with pytest.raises(InputError, match="question 1 .* has no line in .*c"):
        llava_bench.build_items(questions, reference, other, answers)
