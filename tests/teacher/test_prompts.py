"""The teacher's prompts, which must not change, and what becomes of its replies."""

import hashlib
import json
import random

import pytest

from nanollava.conversation import INSTRUCTION_KINDS
from nanollava.teacher import prompts
from nanollava.teacher.coco import AnnotatedImage
from nanollava.teacher.ledger import Answer, Ledger, guess_tokens

BOXES = [("cat", [0.0, 0.25, 0.5, 1.0])]
IMAGES = [AnnotatedImage(str(number), f"{number}.jpg", [f"A cat number {number}."])
          for number in range(30)]
GOOD = "Question:\nWhat?\n===\nAnswer:\nA cat."


def parse(reply, kind="conversation", seed=0, captions=()):
    return prompts.parse(kind, reply, random.Random(seed), captions)


def texts_of(turns):
    return [turn["value"].replace("<image>", "").strip() for turn in turns]


# ---------------------------------------------------------------------------------------------
# Requests


def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


@pytest.mark.parametrize("value, expected", [
    (prompts.BRIEF, "89db61a9715753c5"),
    (prompts.DETAILED, "24ed31c4c0de4e33"),
    (prompts.messages("conversation", ["A cat.", "A gray cat sleeps."], BOXES), "591d785bc1fb3867"),
    (prompts.messages("detail", ["A cat.", "A gray cat sleeps."], BOXES), "dcc4eefedee565e8"),
    (prompts.messages("reasoning", ["A cat.", "A gray cat sleeps."], BOXES), "99804cd88c30bda0"),
])
def test_texts_are_unchanged(value, expected):
    """Ledgers on disk are keyed by these texts, and the shipped weights learned some of them."""
    assert digest(value) == expected


def test_ledger_key_of_a_request_is_unchanged():
    image = AnnotatedImage("7", "7.jpg", ["A cat."], BOXES)
    job = prompts.job("reasoning", [image], None, "gpt-4", seed=0)
    assert job.key(image) == "7-reasoning-2f2826bc49b73c1f"


def test_only_conversations_are_made_without_boxes():
    contexts = {kind: prompts.messages(kind, ["A cat."], BOXES)[-1]["content"]
                for kind in INSTRUCTION_KINDS}
    assert contexts["conversation"] == "A cat."
    with_boxes = "A cat.\n\ncat: [0.000, 0.250, 0.500, 1.000]"
    assert contexts["detail"] == contexts["reasoning"] == with_boxes


def test_request_is_task_examples_and_image():
    messages = prompts.messages("detail", ["A cat."], [])
    roles = [message["role"] for message in messages]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]


@pytest.mark.parametrize("kind", INSTRUCTION_KINDS)
def test_example_replies_are_accepted(kind):
    for captions, _, replies in prompts.EXAMPLES:
        assert parse(replies[kind], kind, captions=captions)


@pytest.mark.parametrize("kind", INSTRUCTION_KINDS)
def test_estimate_counts_complete_requests_and_replies_like_the_examples(kind):
    images = [AnnotatedImage("0", "0.jpg", ["A cat."], BOXES), *IMAGES[:2]]
    job = prompts.job(kind, images, None, "toy", seed=0)
    prompt, completion = prompts.estimate(kind, images)
    assert prompt == sum(guess_tokens(message["content"])
                         for image in images for message in job.messages(image))
    examples = [guess_tokens(replies[kind]) for *_, replies in prompts.EXAMPLES]
    assert completion == 3 * sum(examples) // 2


# ---------------------------------------------------------------------------------------------
# Replies


def test_blocks_become_turns():
    turns = parse("Question:\nWhat is there?\n===\nAnswer:\nTwo things:\n\n- a cat\n- a dog\n"
                  "===\nQuestion: Where?\n===\nAnswer: Left.")
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * 2
    assert texts_of(turns) == ["What is there?", "Two things:\n\n- a cat\n- a dog", "Where?",
                               "Left."]


def test_blocks_are_read_back():
    pairs = [("What?", "A cat."), ("Where?", "Left.")]
    texts = prompts.split_blocks(prompts.format_blocks(*pairs))
    assert texts == ["What?", "A cat.", "Where?", "Left."]


def test_bold_labels_are_read():
    turns = parse("**Question:**\nWhat?\n===\n**Answer**: A cat.")
    assert texts_of(turns) == ["What?", "A cat."]


def test_image_stands_before_or_after_the_first_question():
    questions = {parse(GOOD, seed=seed)[0]["value"] for seed in range(20)}
    assert questions == {"<image>\nWhat?", "What?\n<image>"}


def test_description_gets_a_question_from_the_list():
    question, answer = texts_of(parse(" A cat sleeps. ", "detail"))
    assert question in prompts.DETAILED and answer == "A cat sleeps."


def answered(text):
    return f"Question:\nWhat?\n===\nAnswer:\n{text}"


@pytest.mark.parametrize("reply, reason", [
    (answered("A cat.") + "\n===\nQuestion:\nWhere?", "no answer"),
    (answered(""), "empty"),
    ("What?\n===\nA cat.", "does not begin with"),
    (answered("The caption says a cat."), "mentions a caption"),
    (answered("The bounding box is left."), "mentions a bounding box"),
    (answered("Its box is left."), "mentions a box"),
    ("I\u2019m sorry, but I can't help with that.", "the reply is a refusal"),
    ("I apologize, but no.", "the reply is a refusal"),
    ("I'm unable to assist with that request.", "the reply is a refusal"),
    (answered("I'm sorry, but I cannot see it."), "an answer is a refusal"),
    (answered("At (0.280, 0.335)."), "coordinates"),
    (answered("At [0.280, 0.335, 0.742, 0.711]."), "coordinates"),
    ("Question:\nWhat is <image>?\n===\nAnswer:\nA cat.", "contains <image>"),
])
def test_bad_reply_is_rejected_with_a_reason(reply, reason):
    with pytest.raises(ValueError, match=reason):
        parse(reply)


@pytest.mark.parametrize("form, what", [
    ("{}<|im_end|>", "a control token"), ("{}<|eot_id|>", "a control token"),
    ("{}</s>", "a control token"), ("<s>{}", "a control token"), ("{}<eos>", "a control token"),
    ("{}<|endoftext|>", "a control token"), ("{}<end_of_turn>", "a control token"),
    ("[INST] {} [/INST]", "a control token"), ("<<SYS>>{}", "a control token"),
    ("{}<\uff5cend\u2581of\u2581sentence\uff5c>", "a control token"),
    ("{}<|im_end|>\n<|im_start|>user\nThanks!", "a control token"),
    ("{}\n<|start_header_id|>assistant<|end_header_id|>\n", "a control token"),
    ("{}\n\nUser: Thanks!\nAssistant: Bye.", "an invented turn"),
    ("{}\n### Human: Thanks!", "an invented turn"), ("**Assistant:** {}", "an invented turn"),
    ("ASSISTANT: {}", "an invented turn"),
    ("```\n{}\n```", "a code fence"), ("```markdown\n{}\n```", "a code fence"),
    ("Sure! {}", "an introduction"), ("Certainly, {}", "an introduction"),
    ("Sure! Here is a detailed description:\n\n{}", "an introduction"),
    ("Here is the description: {}", "an introduction"),
    ("Here\u2019s a conversation about the picture.\n\n{}", "an introduction"),
    ("Below is a detailed description.\n{}", "an introduction"),
    ("Of course. {}", "an introduction"), ("Okay, {}", "an introduction"),
    ("**Detailed description:**\n\n{}", "an introduction"),
    ("# The picture\n{}", "an introduction"),
    ("{}\n\nLet me know if you need more.", "a remark to the user"),
    ("{}\nI hope this helps!", "a remark to the user"),
])
def test_reply_with_more_than_the_data_is_rejected(form, what):
    with pytest.raises(ValueError, match=what):
        parse(form.format("A cat sleeps."), "detail")
    with pytest.raises(ValueError, match=what):
        parse(form.format(GOOD))


@pytest.mark.parametrize("text", [
    "Here are two cats on a sofa.", "There is a sign: 'Stop'.", "Sure-footed goats climb a rock.",
    "A user of the computer types.", "A cat, i.e. an animal, is < 1 m tall | long.",
    "The sign says:\n\nStop", "Two things:\n\n- a cat\n- a dog",
    "A human stands beside the system of pipes: all of them are old.",
])
def test_description_may_use_the_same_words(text):
    assert texts_of(parse(text, "detail"))[1] == text
    assert texts_of(parse(answered(text)))[1] == text


def test_questions_and_answers_are_not_a_description():
    with pytest.raises(ValueError, match="not a description"):
        parse(GOOD, "detail")


@pytest.mark.parametrize("caption", ["A cat in a cardboard box.", "A cat among boxes."])
def test_box_in_a_caption_may_be_mentioned(caption):
    assert texts_of(parse(answered("In a box."), captions=[caption]))[1] == "In a box."


def test_part_of_a_word_in_a_caption_allows_nothing():
    with pytest.raises(ValueError, match="mentions a box"):
        parse(answered("In a box."), captions=["A boxing match."])


def test_row_depends_on_seed_image_and_kind_alone():
    rows = [prompts.instruct_row("conversation", IMAGES[7], GOOD, seed) for seed in range(20)]
    assert rows[3] == prompts.instruct_row("conversation", IMAGES[7], GOOD, seed=3)
    assert (rows[0]["id"], rows[0]["image"]) == ("7-conversation", "7.jpg")
    questions = {row["conversations"][0]["value"] for row in rows}
    assert questions == {"<image>\nWhat?", "What?\n<image>"}


# ---------------------------------------------------------------------------------------------
# The job


def test_job_results_are_rows_in_the_order_of_the_images(tmp_path):
    with Ledger(tmp_path / "ledger") as ledger:
        job = prompts.job("conversation", IMAGES, ledger, "toy", seed=0)
        for image in reversed(IMAGES):
            job.ask(image, lambda messages: Answer(GOOD, 10, 2, complete=True), lambda: True)
        rows, _, _ = job.result()
    assert [row["image"] for row in rows] == [image.file for image in IMAGES]
    questions = {row["conversations"][0]["value"] for row in rows}
    assert questions == {"<image>\nWhat?", "What?\n<image>"}


def test_other_captions_are_another_request(tmp_path):
    with Ledger(tmp_path / "ledger") as ledger:
        job = prompts.job("conversation", IMAGES[:1], ledger, "toy", seed=0)
        job.ask(IMAGES[0], lambda messages: Answer(GOOD, 10, 2, complete=True), lambda: True)
        assert job.pending() == []
        changed = [AnnotatedImage("0", "0.jpg", ["A dog."])]
        assert prompts.job("conversation", changed, ledger, "toy", seed=0).pending() == changed
