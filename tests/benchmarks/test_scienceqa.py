import json

import pytest

from nanollava.benchmarks.scienceqa import (
    complement,
    format_answer,
    format_question,
    gpt_job,
    parse_choice,
    read_problems,
    read_rows,
    score,
    verdict_job,
)
from nanollava.infra.io import InputError
from nanollava.teacher.ledger import Answer, Ledger

COMET = {"question": "What is this?", "choices": ["a star", "a comet"], "answer": 1,
         "hint": "It has a tail.", "image": "image.png", "grade": "grade4",
         "subject": "natural science", "lecture": "Comets have tails.",
         "solution": "This has one."}
NOUN = {"question": "Which is a noun?", "choices": ["run", "dog", "red"], "answer": 1, "hint": "",
        "image": None, "grade": "grade9", "subject": "language science", "lecture": "",
        "solution": "Dogs are things."}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "problems.json").write_text(json.dumps({"7": COMET, "8": NOUN}))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["7"], "test": ["8", "7"]}))
    return tmp_path


def test_problem_becomes_a_row_with_or_without_image(folder):
    noun, comet = read_rows(folder, "test")
    assert comet == {"id": "7", "image": "test/7/image.png", "conversations": [
        {"from": "human", "value": "<image>\nQuestion: What is this?\nContext: It has a tail.\n"
                                   "Options: (A) a star (B) a comet"},
        {"from": "gpt", "value": "Comets have tails.\nThis has one.\nThe answer is B."}]}
    assert "image" not in noun
    assert noun["conversations"][0]["value"].startswith("Question: Which is a noun?\nOptions:")


def test_answer_first_moves_the_letter_before_the_reasons():
    answer = format_answer(COMET, "answer-first")
    assert answer == "The answer is B.\nComets have tails.\nThis has one."


def test_question_does_not_depend_on_the_answer():
    assert format_question(COMET) == format_question({**COMET, "answer": 0})


@pytest.mark.parametrize("reply, choice", [
    ("LECTURE: Comets.\nThe answer is B.", 1), ("The answer is B.\nBecause A is wrong.", 1),
    ("The answer is (A)", 0), ("the answer is: A", 0), ("B", 1), (" (B) a comet", 1),
    ("B. a comet", 1), ("The answer is a comet.", None), ("The answer is C.", None),
    ("A comet", None), ("", None), ("The answer is A. No, the answer is B.", 1),
    ("The answer is B. Yes, the answer is B.", 1),
])
def test_parse_choice_returns_the_option_named_last(reply, choice):
    assert parse_choice(reply, COMET) == choice


# one form of an answer a line; {} is the letter
CLEAR_FORMS = r"""
{}
({})
{}.
{})
[{}]
<{}>
**{}**
`{}`
"{}"
- {}
# {}
\boxed{{{}}}
$\boxed{{\text{{{}}}}}$
The final answer is $\boxed{{{}}}$.
Answer: {}
ANSWER:{}
Answer: ({}) the thing
**Answer:** {}
**Answer: {}**
### Answer\n{}
Answer:\n\n{}
Answer = {}
Ans: {}
Final answer: {}
Final Answer:\n**{}**
My answer is {}
Correct answer: {}
The correct answer is {}
The correct option is ({}) the thing.
The correct answer is: **({}) the thing**
The answer is option {}
The answer is **{}**
The answer is '{}'.
The answer is {}) the thing
The answer is {}: the thing
The answer is {} - the thing
The answer is {}, the thing
The answer is {} because it has a tail
The answer is the letter {}.
The answer to the question is {}.
The answer should be {}.
the answer is {}
The answer is\n{}
Option {}
option {}.
Choice {}
I choose {}
I would choose option {}
I'd go with {}
I think it's {}
It is {}.
{} is correct
({}) is the right answer
Option {} (the thing) is the correct answer
{}, because it has a tail
{} because it has a tail
{}\n\nBecause the others are wrong.
{}. the thing
{}: the thing
{} - the thing
({}) the thing\n\nIt has a tail.
It has a tail.\n\n{}
It has a tail. Therefore, {}.
So, ({}).
{{"answer": "{}"}}
<answer>{}</answer>
```\n{}\n```
Option C is wrong, since it has no tail. The answer is {}.
C is incorrect. {} is correct.
The answer is not C. The answer is {}.
The answer is {}.\nBecause C is wrong.
The answer is {}. It is more formal than option C.
<think>Is the answer C?</think>{}
{}</s>
The answer is {}.<|im_end|>
""".strip().split("\n")
LOWER_CASE = ("{}", "({})", "{}.", "Answer: {}", "the answer is {}.", "option {}", "{}) the thing")


@pytest.mark.parametrize("form", CLEAR_FORMS)
def test_letter_is_read_in_every_form(form):
    problem = {"choices": ["a star", "a comet", "a sun"]}
    for choice, letter in enumerate("AB"):
        letters = [letter, letter.lower()] if form in LOWER_CASE else [letter]
        for name in letters:
            assert parse_choice(form.replace("\\n", "\n").format(name), problem) == choice


@pytest.mark.parametrize("reply", [
    "The answer is A comet", "The answer is a comet, a thing of ice.", "A comet has a tail.",
    "I see a comet.", "I, too, see it.", "It is a comet", "It is A comet.", "The answer is A or B",
    "Both are fine.", "There is no way to tell.", "It is, e.g., ice.", "The answer is E. coli.",
])
def test_word_is_not_taken_for_a_letter(reply):
    assert parse_choice(reply, COMET) is None


def test_score_counts_unreadable_replies_as_wrong(folder):
    problems = read_problems(folder, "test")
    result = score(problems, {"7": "The answer is B.", "8": "I do not know."})
    assert result["accuracy"] == {"NAT": 100, "SOC": None, "LAN": 0, "TXT": 100, "IMG": 100,
                                  "NO": 0, "G1-6": 100, "G7-12": 0, "AVG": 50}
    assert (result["unreadable"], result["missing"], result["counts"]["AVG"]) == (1, 0, 2)
    assert score(problems, {"8": "The answer is B."})["missing"] == 1


@pytest.mark.parametrize("problems, splits, message", [
    ([COMET], {"test": ["7"]}, "problems.json: it must be an object, not a list"),
    ({"7": COMET}, {"train": ["7"]}, "pid_splits.json: it has no 'test'"),
    ({"7": COMET}, {"test": ["9"]}, "problem '9' of test: it must be an object, not null"),
    ({"7": {**COMET, "choices": None}}, {"test": ["7"]},
     "problem '7' of test: choices must be a list, not null"),
    ({"7": {**COMET, "answer": 2}}, {"test": ["7"]}, "problem '7' of test: answer 2 is not one of"),
])
def test_error_names_the_broken_problem(tmp_path, problems, splits, message):
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps(splits))
    with pytest.raises(InputError, match=message):
        read_problems(tmp_path, "test")


class FakeGpt:
    """Gives the same reply to every request, and records the requests."""

    def __init__(self, reply):
        self.reply, self.requests = reply, []

    def __call__(self, messages):
        self.requests.append([message["content"] for message in messages])
        return Answer(self.reply, 10, 2, complete=True)


def run(job, reply) -> tuple[dict, list]:
    gpt = FakeGpt(reply)
    for item in job.pending():
        job.ask(item, gpt, lambda: True)
    return dict(zip(job.items, job.result()[0])), gpt.requests


def test_gpt_reads_solved_examples_and_no_image(folder, tmp_path):
    problems = read_problems(folder, "test")
    with Ledger(tmp_path / "alone") as ledger:
        job = gpt_job(problems, [NOUN], ledger, "x")
        answers, requests = run(job, "There is no way to tell.")
    assert answers == dict.fromkeys(problems, "There is no way to tell.") and len(requests) == 2
    _, example, solved, question = requests[1]
    assert example.startswith("Question: Which is a noun?") and solved.endswith("The answer is B.")
    assert question.startswith("(Here is a picture.)\nQuestion: What is this?")


def test_complement_uses_llava_where_gpt_names_no_option():
    problems = {"7": COMET, "8": NOUN}
    llava = {"7": "The answer is B.", "8": "The answer is A."}
    gpt = {"7": "I see no picture.", "8": "The answer is B."}
    assert complement(problems, llava, gpt) == {"7": "The answer is B.", "8": "The answer is B."}
    assert complement(problems, llava, {}) == llava


def test_judge_is_asked_only_where_the_letters_differ(folder, tmp_path):
    problems = read_problems(folder, "test")
    llava = {"7": "Comets. The answer is B.", "8": "The answer is A."}
    gpt = {"7": "The answer is B.", "8": "Dogs are things. The answer is B."}
    with Ledger(tmp_path / "verdicts") as ledger:
        job = verdict_job(problems, llava, gpt, ledger, "x")
        verdicts, requests = run(job, "The second is right. The answer is B.")
    assert verdicts == {"8": "The second is right. The answer is B."} and len(requests) == 1
    assert "[Answer 1]\nThe answer is A." in requests[0][1]
    assert "[Answer 2]\nDogs are things." in requests[0][1]


def test_verdict_without_a_letter_is_rejected_three_times(folder, tmp_path):
    problems = read_problems(folder, "test")
    with Ledger(tmp_path / "verdicts") as ledger:
        job = verdict_job(problems, {"7": "B"}, {"7": "B", "8": "B"}, ledger, "x")
        verdicts, requests = run(job, "Both are fine.")
    assert verdicts == {"8": None} and len(requests) == 3
