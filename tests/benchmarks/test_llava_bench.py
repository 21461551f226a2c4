import json

import pytest

from nanollava.benchmarks import llava_bench
from nanollava.infra.io import InputError
from nanollava.teacher.ledger import Answer, Ledger

ITEM = {"id": "1", "category": "conv", "question": "What is there?", "context": "A red cat.", "reference": "A cat.",
        "answer": "A red cat sits."}


@pytest.mark.parametrize("reply, ours, reference", [
    ("8 6\nGood.", 6, 8), ("8.5, 9\nGood.", 9, 8.5), ("**7/10 8/10**\nGood.", 8, 7), ("\n10 1", 1, 10),
])
def test_a_grade_is_two_scores_and_reasons(reply, ours, reference):
    found = llava_bench.grade(reply, ours_first=False)
    assert (found["ours"], found["reference"]) == (ours, reference)
    assert llava_bench.grade(reply, ours_first=True)["ours"] == reference


@pytest.mark.parametrize("reply", ["", "Assistant 1 is better.", "8\nGood.", "8 11\nGood.", "0 5", "-1 -1", "7 8 9"])
def test_a_reply_without_two_scores_is_no_grade(reply):
    with pytest.raises(ValueError, match="not two scores"):
        llava_bench.grade(reply, ours_first=False)


def test_the_judge_sees_both_replies_and_the_picture_as_text_but_not_whose_they_are():
    (_, first), (_, second) = (llava_bench.messages(ITEM, ours_first) for ours_first in (False, True))
    assert first["content"].index("A cat.") < first["content"].index("A red cat sits.")
    assert second["content"].index("A cat.") > second["content"].index("A red cat sits.")
    assert "What is there?" in first["content"] and "reference" not in first["content"].lower()


class Judge:
    """Gives the first assistant one point more; has nothing to say about a dog."""

    def __init__(self):
        self.asked = 0

    def __call__(self, messages):
        self.asked += 1
        return Answer("no idea" if "dog" in messages[1]["content"] else "8 7\nThe first.", 10, 2, complete=True)


def test_scores_are_relative_to_the_reference_and_failures_are_in_no_mean(tmp_path):
    items = [ITEM, {**ITEM, "id": "2", "category": "detail"}, {**ITEM, "id": "3", "question": "A dog?"}]
    judge = Judge()
    for _ in range(2):  # the second time nothing is asked again
        with Ledger(tmp_path / "ledger") as ledger:
            job = llava_bench.job(items, both_orders=False, ledger=ledger, model="x")
            for item in job.pending():
                job.ask(item, judge, lambda: True)
            result = llava_bench.summary(job)
    assert judge.asked == 2 + 3
    assert result["scores"]["conv"] == {"relative": 87.5, "ours": 7, "reference": 8, "grades": 1}
    assert result["scores"]["all"]["grades"] == 2 and result["without_grade"] == ["3"]
    assert result["grades"][0]["reasons"] == "The first."


def test_in_both_orders_the_gain_of_standing_first_cancels_out(tmp_path):
    with Ledger(tmp_path / "ledger") as ledger:
        job = llava_bench.job([ITEM], both_orders=True, ledger=ledger, model="x")
        for item in job.pending():
            job.ask(item, Judge(), lambda: True)
        assert llava_bench.summary(job)["scores"]["all"] == {"relative": 100, "ours": 7.5, "reference": 7.5, "grades": 2}


def test_questions_find_their_reference_and_context(tmp_path):
    def lines(name, *rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    questions = [{"question_id": 1, "image": "7.jpg", "text": "What?", "category": "conv"}]
    reference = lines("r", {"question_id": 1, "text": "A cat."})
    boxes = {"image": "7.jpg", "captions": ["A cat."], "instances": [{"category": "cat", "bbox": [0.12345, 0, 1, 1]}]}
    (item,) = llava_bench.join(questions, reference, lines("c", boxes), {"1": "A dog."})
    assert item["context"] == "A cat.\ncat: [0.123, 0, 1, 1]" and item["answer"] == "A dog."
    with pytest.raises(InputError, match="question 1 .* has no line in .*c"):
        llava_bench.join(questions, reference, lines("c", {"image": "8.jpg", "caption": ""}), {"1": "A dog."})
    with pytest.raises(InputError, match="has no line in the answers"):
        llava_bench.join(questions, reference, lines("c", boxes), {})
