import pytest

from nanollava.conversation import IGNORE_INDEX, check_turns, show, tokenize_conversation

IMAGE_ID = 1000
TURNS = [
    {"from": "human", "value": "<image>\nWhat is at the top?"}, {"from": "gpt", "value": "It is a cat."},
    {"from": "human", "value": "What color is the cat?"}, {"from": "gpt", "value": "The cat is red."},
]


def read(turns, tokenizer, template):
    return tokenize_conversation(turns, tokenizer, template, tokens_per_image=2, image_token_id=IMAGE_ID)


def text(tokens, tokenizer):
    return "".join("<image>" if token == IMAGE_ID else tokenizer.piece(token) for token in tokens).replace("▁", " ")


@pytest.mark.parametrize("template, whole, learned", [
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
def test_what_the_model_reads_and_what_it_learns(tokenizer, template, whole, learned):
    tokens, labels = read(TURNS, tokenizer, template)
    assert text(tokens, tokenizer) == whole
    assert text([label for label in labels if label != IGNORE_INDEX], tokenizer) == learned
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(tokens, labels))


@pytest.mark.parametrize("template", ["vicuna_v1", "v0"])
def test_a_prompt_is_a_prefix_of_what_training_saw(tokenizer, template):
    tokens, labels = read(TURNS, tokenizer, template)
    for turns in (1, 3):
        prompt, nothing = read(TURNS[:turns], tokenizer, template)
        assert tokens[: len(prompt)] == prompt
        assert labels[len(prompt)] != IGNORE_INDEX
        assert nothing[-1] == IGNORE_INDEX


def test_the_picture_may_come_after_the_question(tokenizer):
    tokens, _ = read([{"from": "human", "value": "What is this?\n<image>"}], tokenizer, "vicuna_v1")
    assert "What is this?\n<image><image>  ASSISTANT:" in text(tokens, tokenizer)


def test_a_picture_token_without_a_name_is_the_first_past_the_vocabulary(tokenizer):
    tokens, _ = tokenize_conversation(TURNS, tokenizer, tokens_per_image=3)
    assert tokens.count(len(tokenizer)) == 3


@pytest.mark.parametrize("turns, what", [
    ([], "no turns"),
    ([{"from": "gpt", "value": "Hello"}], "turn 1 must be"),
    ([{"from": "human", "value": "Hi"}, {"from": "human", "value": "Hi"}], "turn 2 must be"),
    ([{"from": "human", "value": " "}], r"turn 1 \(human\) is empty"),
    ([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "<image>"}], r"turn 2 \(gpt\) has <image> in it"),
    ([{"from": "human"}], "turn 1 must be"),
])
def test_what_is_no_conversation_is_refused(turns, what):
    with pytest.raises(ValueError, match=what):
        check_turns(turns)


def test_show_colors_what_is_learned(tokenizer):
    tokens, labels = read(TURNS[:2], tokenizer, "vicuna_v1")
    shown = show(tokens, labels, tokenizer, IMAGE_ID)
    learned = "|".join(map(tokenizer.piece, [*tokenizer.encode("It is a cat."), tokenizer.eos_id]))
    assert f"\033[32m{learned}\033[0m" in shown
    assert "[picture]" in shown
