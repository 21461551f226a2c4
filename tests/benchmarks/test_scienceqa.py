import json

import pytest

from nanollava.benchmarks.scienceqa import (
    alone,
    answer,
    complement,
    judge,
    letter_of,
    question,
    read_problems,
    rows,
    score,
)
from nanollava.infra.io import InputError
from nanollava.teacher.ledger import Answer, Ledger

COMET = {"question": "What is this?", "choices": ["a star", "a comet"], "answer": 1, "hint": "It has a tail.",
         "image": "image.png", "grade": "grade4", "subject": "natural science", "lecture": "Comets have tails.",
         "solution": "This has one."}
NOUN = {"question": "Which is a noun?", "choices": ["run", "dog", "red"], "answer": 1, "hint": "", "image": None,
        "grade": "grade9", "subject": "language science", "lecture": "", "solution": "Dogs are things."}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "problems.json").write_text(json.dumps({"7": COMET, "8": NOUN}))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["7"], "test": ["8", "7"]}))
    return tmp_path


def test_a_problem_is_a_conversation_with_or_without_a_picture(folder):
    noun, comet = rows(folder, "test")
    assert comet == {"id": "7", "image": "test/7/image.png", "conversations": [
        {"from": "human", "value": "<image>\nQuestion: What is this?\nContext: It has a tail.\n"
                                   "Options: (A) a star (B) a comet"},
        {"from": "gpt", "value": "Comets have tails.\nThis has one.\nThe answer is B."}]}
    assert "image" not in noun and noun["conversations"][0]["value"].startswith("Question: Which is a noun?\nOptions:")


def test_the_answer_may_come_first():
    assert answer(COMET, "answer-first") == "The answer is B.\nComets have tails.\nThis has one."
    assert question(COMET) == question({**COMET, "answer": 0})  # nothing of the answer is in the question


@pytest.mark.parametrize("text, letter", [
    ("LECTURE: Comets.\nThe answer is B.", 1), ("The answer is B.\nBecause A is wrong.", 1), ("The answer is (A)", 0),
    ("the answer is: A", 0), ("B", 1), (" (B) a comet", 1), ("B. a comet", 1),
    ("The answer is a comet.", None), ("The answer is C.", None), ("A comet", None), ("", None),
    ("The answer is A. No, the answer is B.", None), ("The answer is B. Yes, the answer is B.", 1),
])
def test_the_letter_that_a_reply_names(text, letter):
    assert letter_of(text, choices=2) == letter


def test_scores_by_category_what_cannot_be_read_is_wrong_and_counted(folder):
    problems = read_problems(folder, "test")
    result = score(problems, {"7": "The answer is B.", "8": "I do not know."})
    assert result["accuracy"] == {"NAT": 100, "SOC": None, "LAN": 0, "TXT": 100, "IMG": 100, "NO": 0, "G1-6": 100,
                                  "G7-12": 0, "AVG": 50}
    assert (result["unreadable"], result["missing"], result["counts"]["AVG"]) == (1, 0, 2)
    assert score(problems, {"8": "The answer is B."})["missing"] == 1


@pytest.mark.parametrize("problems, splits, image_error", [
    ({"7": COMET}, {"train": ["7"]}, "there is no split 'test'"),
    ({"7": COMET}, {"test": ["9"]}, "problem 9 of test is missing"),
    ({"7": {**COMET, "choices": None}}, {"test": ["7"]}, "problem 7 of test lacks choices"),
    ({"7": {**COMET, "answer": 2}}, {"test": ["7"]}, "problem 7 of test"),
])
def test_a_broken_problem_is_named(tmp_path, problems, splits, image_error):
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps(splits))
    with pytest.raises(InputError, match=image_error):
        read_problems(tmp_path, "test")


class Gpt:
    """Says the same to everybody, and remembers what it was asked."""

    def __init__(self, reply):
        self.reply, self.heard = reply, []

    def __call__(self, messages):
        self.heard.append([message["content"] for message in messages])
        return Answer(self.reply, 10, 2, complete=True)


def run(job, reply) -> tuple[dict, list]:
    gpt = Gpt(reply)
    for item in job.pending():
        job.ask(item, gpt, lambda: True)
    return dict(zip(job.items, job.result()[0])), gpt.heard


def test_gpt_answers_alone_from_words_and_two_examples_and_may_say_that_it_cannot(folder, tmp_path):
    problems = read_problems(folder, "test")
    with Ledger(tmp_path / "alone") as ledger:
        answers, heard = run(alone(problems, [NOUN], ledger, "x"), "There is no way to tell.")
    assert answers == {"8": "There is no way to tell.", "7": "There is no way to tell."} and len(heard) == 2
    _, example, solved, asked = heard[1]
    assert example.startswith("Question: Which is a noun?") and solved.endswith("The answer is B.")
    assert asked.startswith("(Here is a picture.)\nQuestion: What is this?")


def test_as_complement_we_answer_what_gpt_cannot():
    ours = {"7": "The answer is B.", "8": "The answer is A."}
    assert complement({"7": COMET, "8": NOUN}, ours, {"7": "I see no picture.", "8": "The answer is B."}) == {
        "7": "The answer is B.", "8": "The answer is B."}
    assert complement({"7": COMET, "8": NOUN}, ours, {}) == ours


def test_the_judge_decides_where_the_letters_differ_and_only_there(folder, tmp_path):
    problems = read_problems(folder, "test")
    ours = {"7": "Comets. The answer is B.", "8": "The answer is A."}
    theirs = {"7": "The answer is B.", "8": "Dogs are things. The answer is B."}
    with Ledger(tmp_path / "verdicts") as ledger:
        verdicts, heard = run(judge(problems, ours, theirs, ledger, "x"), "The second is right. The answer is B.")
        assert verdicts == {"8": "The second is right. The answer is B."} and len(heard) == 1
        assert "[Answer 1]\nThe answer is A." in heard[0][1] and "[Answer 2]\nDogs are things." in heard[0][1]
    with Ledger(tmp_path / "undecided") as ledger:
        verdicts, heard = run(judge(problems, ours, theirs, ledger, "x"), "Both are fine.")
        assert verdicts == {"8": None} and len(heard) == 3  # asked again, then given up
