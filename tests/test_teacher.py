import random

import pytest

from nanollava import teacher


def test_conversations_are_made_from_captions_alone_the_others_from_boxes_too():
    boxes = [("cat", [0.0, 0.25, 0.5, 1.0])]
    said = {kind: teacher.messages(kind, ["A cat."], boxes)[-1]["content"] for kind in teacher.KINDS}
    assert said["conversation"] == "A cat."
    assert said["detail"] == said["reasoning"] == "A cat.\n\ncat: [0.000, 0.250, 0.500, 1.000]"


def test_blocks_become_turns_and_answers_may_hold_blank_lines_and_lists():
    reply = ("Question:\nWhat is there?\n===\nAnswer:\nTwo things:\n\n- a cat\n- a dog\n"
             "===\nQuestion: Where?\n===\nAnswer: Left.")
    turns = teacher.parse("conversation", reply, random.Random(0))
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * 2
    assert turns[1]["value"] == "Two things:\n\n- a cat\n- a dog"
    assert turns[2]["value"] == "Where?" and turns[3]["value"] == "Left."


def test_the_picture_stands_before_or_after_the_first_question_by_chance():
    reply = "Question:\nWhat?\n===\nAnswer:\nA cat."
    first = {teacher.parse("conversation", reply, random.Random(seed))[0]["value"] for seed in range(20)}
    assert first == {"<image>\nWhat?", "What?\n<image>"}


def test_a_description_gets_a_question_of_the_list():
    turns = teacher.parse("detail", " A cat sleeps. ", random.Random(0))
    assert turns[0]["value"].replace("<image>", "").strip() in teacher.DETAILED
    assert turns[1]["value"] == "A cat sleeps."


@pytest.mark.parametrize("reply, why", [
    ("Question:\nWhat?\n===\nAnswer:\nA cat.\n===\nQuestion:\nWhere?", "no answer"),
    ("Question:\nWhat?\n===\nAnswer:\n", "empty"),
    ("What?\n===\nA cat.", "does not begin with"),
    ("Question:\nWhat?\n===\nAnswer:\nThe caption says a cat.", "speaks of caption"),
    ("Question:\nWhat?\n===\nAnswer:\nThe bounding box is left.", "speaks of bounding box"),
])
def test_a_reply_that_must_be_asked_for_again(reply, why):
    with pytest.raises(ValueError, match=why):
        teacher.parse("conversation", reply, random.Random(0))
