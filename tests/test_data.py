import json

import pytest
import torch

from nanollava.conversation import IGNORE
from nanollava.data import Conversations, batch_order, collate, loader
from nanollava.files import InputError

GOOD = {"id": "7", "image": "train_000000.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat is there?"}, {"from": "gpt", "value": "A cat."}]}


def load(rows, world, tokenizer, config, tmp_path, **options):
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    return Conversations(tmp_path / "chat.json", world / "images", tokenizer, config, **options)


def test_a_row_is_its_tokens_its_labels_and_its_pixels(world, tokenizer, config, tmp_path):
    tokens, labels, images = load([GOOD], world, tokenizer, config, tmp_path)[0]
    assert tokens.count(config.image_token_id) == 16 and len(tokens) == len(labels)
    assert tokenizer.decode([label for label in labels if label != IGNORE]) == "A cat."
    assert [image.shape for image in images] == [(3, 32, 32)]


@pytest.mark.parametrize("change, complaint", [
    ({"conversations": GOOD["conversations"][:1]}, "it has no answer to learn from"),
    ({"conversations": []}, "it has no turns"),
    ({"conversations": [GOOD["conversations"][0], {"from": "gpt", "value": " "}]}, r"turn 2 \(gpt\) is empty"),
    ({"image": "none.png"}, "no picture at .*none.png"),
    ({"image": []}, "0 pictures, but 1 times <image>"),
    ({"conversations": GOOD["conversations"] + GOOD["conversations"]}, "1 pictures, but 2 times <image>"),
    ({"image": 7}, "'image' must be a file name or a list of them"),
])
def test_a_bad_row_is_named(world, tokenizer, config, tmp_path, change, complaint):
    with pytest.raises(InputError, match=rf"chat.json, row 1 \(id 7\): {complaint}"):
        load([GOOD, {**GOOD, **change}], world, tokenizer, config, tmp_path)


def test_a_length_limit_that_leaves_no_answer_is_told(world, tokenizer, config, tmp_path):
    whole = len(load([GOOD], world, tokenizer, config, tmp_path)[0][0])
    assert len(load([GOOD], world, tokenizer, config, tmp_path, max_length=whole - 2)[0][0]) == whole - 2
    with pytest.raises(InputError, match="row 0 .*no answer within 10 tokens; raise --max-length"):
        load([GOOD], world, tokenizer, config, tmp_path, max_length=10)


def test_rows_without_pictures_may_stand_among_the_others(world, tokenizer, config, tmp_path):
    words = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    tokens, labels, images = collate(list(load([words, GOOD], world, tokenizer, config, tmp_path)))
    assert tokens.shape == labels.shape and images.shape == (1, 3, 32, 32)
    padding = (tokens[0] == 0).nonzero()
    assert len(padding) and (labels[0, padding] == IGNORE).all()


def test_an_epoch_is_every_row_once_in_batches_of_like_lengths():
    lengths = [10, 200] * 40
    batches = batch_order(lengths, batch_size=8, seed=0)
    assert sorted(row for batch in batches for row in batch) == list(range(80))
    assert all(len({lengths[row] for row in batch}) == 1 for batch in batches)
    assert batch_order(lengths, 8, seed=0) == batches != batch_order(lengths, 8, seed=1)


def test_the_loader_goes_on_with_another_epoch(world, tokenizer, config, tmp_path):
    dataset = load([GOOD] * 5, world, tokenizer, config, tmp_path)
    batches = list(loader(dataset, batch_size=2, steps=7, seed=0))
    assert [len(tokens) for tokens, _, _ in batches] == [2] * 7
    assert torch.is_tensor(batches[0][2])


@pytest.mark.parametrize("content, complaint", [
    ("[", "is not JSON"), ("{}", "is not a list"), ("[]", "is not a list"), ("[3]", "row 0: it has no 'conv"),
])
def test_a_file_that_is_no_list_of_conversations_is_refused(world, tokenizer, config, tmp_path, content, complaint):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(InputError, match=complaint):
        Conversations(tmp_path / "bad.json", world / "images", tokenizer, config)
