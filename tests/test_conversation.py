import pytest

from nanollava.conversation import (
    IGNORE_INDEX,
    check_turns,
    tokenize_conversation,
    visualize_tokens,
)

IMAGE_ID = 1000
TURNS = [
    {"from": "human", "value": "<image>\nWhat is at the top?"},
    {"from": "gpt", "value": "It is a cat."},
    {"from": "human", "value": "What color is the cat?"},
    {"from": "gpt", "value": "The cat is red."},
]


def tokenize(turns, tokenizer, template):
    return tokenize_conversation(turns, tokenizer, template, tokens_per_image=2,
                                 image_token_id=IMAGE_ID)


def text_of(tokens, tokenizer):
    pieces = ["<image>" if token == IMAGE_ID else tokenizer.piece(token) for token in tokens]
    return "".join(pieces).replace("▁", " ")


@pytest.mark.parametrize("template, row, learned", [
    ("vicuna_v1",
     "<s> A chat between a curious user and an artificial intelligence assistant. "
     "The assistant gives helpful, detailed, and polite answers to the user's questions."
     " USER: <image><image> \nWhat is at the top? ASSISTANT: It is a cat.</s>"
     " USER: What color is the cat? ASSISTANT: The cat is red.</s>",
     " It is a cat.</s> The cat is red.</s>"),
    ("v0",
     "<s> A chat between a curious human and an artificial intelligence assistant. "
     "The assistant gives helpful, detailed, and polite answers to the human's questions.###"
     "Human: <image><image> \nWhat is at the top?###Assistant: It is a cat. ###"
     " Human: What color is the cat?###Assistant: The cat is red. ###",
     " It is a cat. ### The cat is red. ###"),
    ("plain",
     "<s><image><image> It is a cat. \n The cat is red. \n",
     " It is a cat. \n The cat is red. \n"),
])
def test_only_answers_and_their_stops_have_labels(tokenizer, template, row, learned):
    tokens, labels = tokenize(TURNS, tokenizer, template)
    assert text_of(tokens, tokenizer) == row
    assert text_of([label for label in labels if label != IGNORE_INDEX], tokenizer) == learned
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(tokens, labels))


def test_stop_of_v0_is_encoded_with_a_space_only_where_it_is_learned(tokenizer):
    """The example in conversation.py."""
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    pieces = {template: " ".join(map(tokenizer.piece, tokenize(turns * 2, tokenizer, template)[0]))
              for template in ("v0", "vicuna_v1")}
    assert "▁What ? # # # A s s is t ant : ▁A ▁cat . ▁ # # # ▁H um an :" in pieces["v0"]
    assert "▁What ? ▁ASSISTANT : ▁A ▁cat . </s> ▁USER :" in pieces["vicuna_v1"]


@pytest.mark.parametrize("template", ["vicuna_v1", "v0"])
def test_prompt_is_a_prefix_of_the_training_row(tokenizer, template):
    tokens, labels = tokenize(TURNS, tokenizer, template)
    for num_turns in (1, 3):
        prompt, prompt_labels = tokenize(TURNS[:num_turns], tokenizer, template)
        assert tokens[: len(prompt)] == prompt
        assert labels[len(prompt)] != IGNORE_INDEX
        assert prompt_labels[-1] == IGNORE_INDEX


def test_image_can_follow_the_question(tokenizer):
    turns = [{"from": "human", "value": "What is this?\n<image>"}]
    tokens, _ = tokenize(turns, tokenizer, "vicuna_v1")
    assert "What is this?\n<image><image>  ASSISTANT:" in text_of(tokens, tokenizer)


def test_default_image_token_is_the_first_id_past_the_vocabulary(tokenizer):
    tokens, _ = tokenize_conversation(TURNS, tokenizer, tokens_per_image=3)
    assert tokens.count(len(tokenizer)) == 3


@pytest.mark.parametrize("turns, message", [
    ([], "no turns"),
    ([{"from": "gpt", "value": "Hello"}], "turn 1 must be"),
    ([{"from": "human", "value": "Hi"}, {"from": "human", "value": "Hi"}], "turn 2 must be"),
    ([{"from": "human", "value": " "}], r"turn 1 \(human\) is empty"),
    ([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "<image>"}],
     r"turn 2 \(gpt\) contains <image>"),
    ([{"from": "human"}], "turn 1 must be"),
    (["Hi"], "turn 1 must be"),
])
def test_invalid_turns_are_refused(turns, message):
    with pytest.raises(ValueError, match=message):
        check_turns(turns)


def test_visualize_tokens_shows_learned_tokens_green_and_image_tokens_once(tokenizer):
    tokens, labels = tokenize(TURNS[:2], tokenizer, "vicuna_v1")
    text = visualize_tokens(tokens, labels, tokenizer, IMAGE_ID)
    answer = [*tokenizer.encode("It is a cat."), tokenizer.eos_id]
    assert f"\033[32m{'|'.join(map(tokenizer.piece, answer))}\033[0m" in text
    assert text.count("[image]") == 1
