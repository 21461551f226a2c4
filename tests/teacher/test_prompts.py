import random
import threading

import pytest

from nanollava.conversation import INSTRUCTION_KINDS
from nanollava.infra.io import InputError
from nanollava.teacher import prompts
from nanollava.teacher.coco import Picture
from nanollava.teacher.jobs import TRIES
from nanollava.teacher.ledger import Answer, Ledger, RequestError, guess_tokens


def test_conversations_are_made_from_captions_alone_the_others_from_boxes_too():
    boxes = [("cat", [0.0, 0.25, 0.5, 1.0])]
    said = {kind: prompts.messages(kind, ["A cat."], boxes)[-1]["content"] for kind in INSTRUCTION_KINDS}
    assert said["conversation"] == "A cat."
    assert said["detail"] == said["reasoning"] == "A cat.\n\ncat: [0.000, 0.250, 0.500, 1.000]"


def test_blocks_become_turns_and_answers_may_hold_blank_lines_and_lists():
    reply = ("Question:\nWhat is there?\n===\nAnswer:\nTwo things:\n\n- a cat\n- a dog\n"
             "===\nQuestion: Where?\n===\nAnswer: Left.")
    turns = prompts.parse("conversation", reply, random.Random(0))
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * 2
    assert turns[1]["value"] == "Two things:\n\n- a cat\n- a dog"
    assert turns[2]["value"] == "Where?" and turns[3]["value"] == "Left."


def test_the_picture_stands_before_or_after_the_first_question_by_chance():
    reply = "Question:\nWhat?\n===\nAnswer:\nA cat."
    first = {prompts.parse("conversation", reply, random.Random(seed))[0]["value"] for seed in range(20)}
    assert first == {"<image>\nWhat?", "What?\n<image>"}


def test_a_description_gets_a_question_of_the_list():
    turns = prompts.parse("detail", " A cat sleeps. ", random.Random(0))
    assert turns[0]["value"].replace("<image>", "").strip() in prompts.DETAILED
    assert turns[1]["value"] == "A cat sleeps."


@pytest.mark.parametrize("reply, why", [
    ("Question:\nWhat?\n===\nAnswer:\nA cat.\n===\nQuestion:\nWhere?", "no answer"),
    ("Question:\nWhat?\n===\nAnswer:\n", "empty"),
    ("What?\n===\nA cat.", "does not begin with"),
    ("Question:\nWhat?\n===\nAnswer:\nThe caption says a cat.", "speaks of a caption"),
    ("Question:\nWhat?\n===\nAnswer:\nThe bounding box is left.", "speaks of a bounding box"),
    ("Question:\nWhat?\n===\nAnswer:\nIts box is left.", "speaks of a box"),
    ("I\u2019m sorry, but I can't help with that.", "it refuses"),
    ("I apologize, but no.", "it refuses"),
    ("I'm unable to assist with that request.", "it refuses"),
    ("Question:\nWhat?\n===\nAnswer:\nI'm sorry, but I cannot see it.", "an answer refuses"),
    ("Question:\nWhere?\n===\nAnswer:\nAt (0.280, 0.335).", "numbers of a box"),
    ("Question:\nWhere?\n===\nAnswer:\nAt [0.280, 0.335, 0.742, 0.711].", "numbers of a box"),
    ("Question:\nWhat is <image>?\n===\nAnswer:\nA cat.", "contains <image>"),
])
def test_a_reply_that_must_be_asked_for_again(reply, why):
    with pytest.raises(ValueError, match=why):
        prompts.parse("conversation", reply, random.Random(0))


def test_a_description_is_no_conversation():
    with pytest.raises(ValueError, match="no description"):
        prompts.parse("detail", "Question:\nWhat?\n===\nAnswer:\nA cat.", random.Random(0))


def test_a_box_that_people_saw_may_be_spoken_of():
    reply = "Question:\nWhere is the cat?\n===\nAnswer:\nIn a box."
    for caption in ("A cat in a cardboard box.", "A cat among boxes."):
        assert prompts.parse("conversation", reply, random.Random(0), [caption])[1]["value"] == "In a box."
    with pytest.raises(ValueError, match="speaks of a box"):
        prompts.parse("conversation", reply, random.Random(0), ["A boxing match."])


def test_labels_in_bold_are_labels():
    turns = prompts.parse("conversation", "**Question:**\nWhat?\n===\n**Answer**: A cat.", random.Random(0))
    assert [turn["value"].replace("<image>", "").strip() for turn in turns] == ["What?", "A cat."]


def test_the_examples_are_what_is_asked_for():
    assert len(prompts.EXAMPLES) >= 2 and len(prompts.BRIEF) >= 11 and len(prompts.DETAILED) >= 16
    for captions, _, replies in prompts.EXAMPLES:
        for kind in INSTRUCTION_KINDS:
            prompts.parse(kind, replies[kind], random.Random(0), captions)
    roles = [message["role"] for message in prompts.messages("detail", ["A cat."], [])]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]


# ---------------------------------------------------------------------------------------------
# The job


PICTURES = [Picture(str(n), f"{n}.jpg", [f"A cat number {n}."], []) for n in range(30)]
GOOD = "Question:\nWhat?\n===\nAnswer:\nA cat."


class Scripted:
    """In the place of a client: says to each picture what `says` makes of its captions, and counts."""

    def __init__(self, says=lambda text: GOOD):
        self.says, self.asked, self.stop, self.complete = says, [], threading.Event(), True

    def __call__(self, messages):
        self.asked.append(messages[-1]["content"])
        return Answer(self.says(messages[-1]["content"]), 10, 2, complete=self.complete)


def job(ledger, pictures=PICTURES, **changes):
    return prompts.job(**{"kind": "conversation", "pictures": pictures, "ledger": ledger, "model": "toy", "seed": 0,
                          **changes})


def rows_of(job):
    return [row for row in job.result()[0] if row]


def test_each_picture_is_asked_about_once_whatever_happens(tmp_path):
    """The first run ends in the middle, the second goes on, the third has nothing to do; all see the same rows."""
    def stops_in_the_middle(text):
        if text == "A cat number 13.":
            raise InputError("no credit")
        return GOOD

    first, second, third = Scripted(stops_in_the_middle), Scripted(), Scripted()
    with Ledger(tmp_path / "ledger") as ledger, pytest.raises(InputError, match="no credit"):
        job(ledger).run(first, workers=4)
    with Ledger(tmp_path / "ledger") as ledger:
        assert not job(ledger).run(second, workers=4)
        rows = rows_of(job(ledger))
    with Ledger(tmp_path / "ledger") as ledger:
        assert not job(ledger).run(third) and not third.asked
        assert rows_of(job(ledger)) == rows
    paid = [text for text in first.asked if text != "A cat number 13."] + second.asked
    assert sorted(paid) == sorted(picture.captions[0] for picture in PICTURES)
    assert [row["image"] for row in rows] == [picture.file for picture in PICTURES]
    assert {row["conversations"][0]["value"] for row in rows} == {"<image>\nWhat?", "What?\n<image>"}


def test_a_bad_reply_is_kept_with_its_reason_and_asked_again(tmp_path):
    replies = iter(["What?", GOOD])
    with Ledger(tmp_path / "ledger") as ledger:
        one = job(ledger, PICTURES[:1])
        assert not one.run(Scripted(lambda _: next(replies)))
        bad, good = ledger[one.key(PICTURES[0])]
        assert bad["text"] == "What?" and "does not begin with" in bad["rejected"] and good["rejected"] is None
        assert rows_of(one)[0]["conversations"][1]["value"] == "A cat."


def test_after_three_bad_replies_a_picture_is_given_up_for_good(tmp_path):
    with Ledger(tmp_path / "ledger") as ledger:
        chat = Scripted(lambda _: "What?")
        assert job(ledger, PICTURES[:1]).run(chat) == {"a block does not begin with 'Question:'": 1}
        assert len(chat.asked) == TRIES
        assert not job(ledger, PICTURES[:1]).run(chat) and len(chat.asked) == TRIES


def test_a_failed_request_costs_no_try(tmp_path):
    def fails(_):
        raise RequestError("too long")

    with Ledger(tmp_path / "ledger") as ledger:
        assert job(ledger, PICTURES[:2]).run(Scripted(fails)) == {"too long": 2}
        one = job(ledger, PICTURES[:2])
        assert not one.run(Scripted()) and len(rows_of(one)) == 2


def test_an_answer_that_was_cut_off_is_asked_again(tmp_path):
    chat = Scripted()
    chat.complete = False
    with Ledger(tmp_path / "ledger") as ledger:
        assert job(ledger, PICTURES[:1]).run(chat) == {"it was cut off": 1} and len(chat.asked) == TRIES


def test_what_was_paid_for_when_the_job_ended_is_kept(tmp_path):
    """The eleventh failure ends the job while another worker waits for its answer."""
    ended = threading.Event()

    def says(text):
        if text == "A cat number 0.":
            ended.wait(10)
            return GOOD
        raise RequestError("no")

    with Ledger(tmp_path / "ledger") as ledger:
        one, chat = job(ledger), Scripted(says)
        chat.stop.set, stop = lambda: (stop(), ended.set()), chat.stop.set
        with pytest.raises(InputError, match="in a row") as caught:
            one.run(chat, workers=2)
        assert ended.is_set() and caught  # at once, not when the exception is forgotten
        assert [row["image"] for row in rows_of(one)] == ["0.jpg"]


def test_the_seed_draws_the_order(tmp_path):
    with Ledger(tmp_path / "ledger") as ledger:
        job(ledger).run(Scripted())
        first, second = (rows_of(job(ledger, seed=seed)) for seed in (0, 1))
        assert first != second


def test_a_teacher_that_talks_nonsense_is_stopped(tmp_path):
    chat = Scripted(lambda _: "What?")
    with Ledger(tmp_path / "ledger") as ledger, pytest.raises(InputError, match="in a row failed.*does not begin with"):
        job(ledger).run(chat, workers=2)
    assert len(chat.asked) < TRIES * 20


def test_a_budget_is_kept_over_all_runs(tmp_path):
    for _ in range(3):
        with Ledger(tmp_path / "ledger") as ledger:
            job(ledger).run(Scripted(lambda _: "What?"), workers=1, max_tokens=60)  # 12 tokens each
            assert ledger.prompt_tokens + ledger.completion_tokens == 60


def test_other_captions_are_another_request(tmp_path):
    with Ledger(tmp_path / "ledger") as ledger:
        job(ledger).run(Scripted())
        assert job(ledger, PICTURES[:1]).pending() == []
        other = Picture("0", "0.jpg", ["A dog."], [])
        assert job(ledger, [other]).pending() == [other]


@pytest.mark.parametrize("change", [{"kind": "reasoning"}, {"model": "other"}])
def test_a_ledger_is_of_one_kind_and_one_model(tmp_path, change):
    with Ledger(tmp_path / "ledger") as ledger:
        job(ledger).run(Scripted())
        with pytest.raises(InputError, match="another kind or model"):
            job(ledger, **change).pending()


def test_the_result_counts_the_replies_that_were_no_good_and_the_pictures_given_up(tmp_path):
    replies = {"A cat number 0.": iter(["What?", GOOD]), "A cat number 1.": iter(["Sorry, no.", "What?", "What?"])}
    with Ledger(tmp_path / "ledger") as ledger:
        job(ledger, PICTURES[:2]).run(Scripted(lambda text: next(replies[text])))
        rows, rejected, given_up = job(ledger, PICTURES[:3]).result()
        assert [row and row["image"] for row in rows] == ["0.jpg", None, None] and given_up == 1
        assert rejected == {"a block does not begin with 'Question:'": 3, "it refuses": 1}


@pytest.mark.parametrize("kind", INSTRUCTION_KINDS)
def test_an_estimate_is_of_whole_requests_and_of_answers_like_the_examples(kind):
    pictures = [Picture("0", "0.jpg", ["A cat."], [("cat", [0.1, 0.2, 0.3, 0.4])]), *PICTURES[:2]]
    one = job(None, pictures, kind=kind)
    read, written = prompts.estimate(kind, pictures)
    assert read == sum(guess_tokens(message["content"]) for picture in pictures for message in one.messages(picture))
    assert written == 3 * sum(guess_tokens(replies[kind]) for *_, replies in prompts.EXAMPLES) // 2
