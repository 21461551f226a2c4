import json
import random
import shutil

import pytest
import torch

from nanollava.conversation import IGNORE_INDEX
from nanollava.data import PAD_ROW, Conversations, length_grouped_batches, collate, eval_batches, load_batches
from nanollava.infra.io import InputError

GOOD = {"id": "7", "image": "train_000000.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat is there?"}, {"from": "gpt", "value": "A cat."}]}


def load(rows, world, tokenizer, config, tmp_path, **options):
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    return Conversations([(tmp_path / "chat.json", world / "images")], tokenizer, config, **options)


def test_a_row_is_its_tokens_its_labels_and_its_pixels(world, tokenizer, config, tmp_path):
    tokens, labels, images = load([GOOD], world, tokenizer, config, tmp_path)[0]
    assert tokens.count(config.image_token_id) == 16 and len(tokens) == len(labels)
    assert tokenizer.decode([label for label in labels if label != IGNORE_INDEX]) == "A cat."
    assert [image.shape for image in images] == [(3, 32, 32)]


@pytest.mark.parametrize("change, image_error", [
    ({"conversations": GOOD["conversations"][:1]}, "it has no answer to learn from"),
    ({"conversations": []}, "it has no turns"),
    ({"conversations": [GOOD["conversations"][0], {"from": "gpt", "value": " "}]}, r"turn 2 \(gpt\) is empty"),
    ({"image": "none.png"}, "no picture at .*none.png"),
    ({"image": []}, "0 pictures, but 1 times <image>"),
    ({"conversations": GOOD["conversations"] + GOOD["conversations"]}, "1 pictures, but 2 times <image>"),
    ({"image": 7}, "'image' must be a file name or a list of them"),
])
def test_a_bad_row_is_named(world, tokenizer, config, tmp_path, change, image_error):
    with pytest.raises(InputError, match=rf"chat.json, row 1 \(id 7\): {image_error}"):
        load([GOOD, {**GOOD, **change}], world, tokenizer, config, tmp_path)


def test_a_length_limit_that_leaves_no_answer_is_told(world, tokenizer, config, tmp_path):
    whole = len(load([GOOD], world, tokenizer, config, tmp_path)[0][0])
    assert len(load([GOOD], world, tokenizer, config, tmp_path, max_length=whole - 2)[0][0]) == whole - 2
    with pytest.raises(InputError, match="row 0 .*no answer within 10 tokens; raise --max-length"):
        load([GOOD], world, tokenizer, config, tmp_path, max_length=10)


def test_no_picture_may_be_said_in_several_ways(world, tokenizer, config, tmp_path):
    words = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    rows = [words, {**words, "image": None}, {**words, "image": ""}, {**words, "image": []}]
    assert [images for _, _, images in load(rows, world, tokenizer, config, tmp_path)] == [[]] * 4


def test_rows_without_pictures_may_stand_among_the_others(world, tokenizer, config, tmp_path):
    words = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    tokens, labels, images = collate(list(load([words, GOOD], world, tokenizer, config, tmp_path)))
    assert tokens.shape == labels.shape and images.shape == (1, 3, 32, 32)
    padding = (tokens[0] == 0).nonzero()
    assert len(padding) and (labels[0, padding] == IGNORE_INDEX).all()


def test_all_bad_rows_are_counted_and_ten_named_before_the_first_step(world, tokenizer, config, tmp_path):
    (tmp_path / "broken.png").write_bytes((world / "images" / "train_000000.png").read_bytes()[:-40])
    (tmp_path / "page.png").write_text("<html>not found</html>")
    bad = [{**GOOD, "image": f"gone{number}.png"} for number in range(10)]
    bad += [{**GOOD, "image": str(tmp_path / name)} for name in ("broken.png", "page.png")] + [{"id": "8"}]
    with pytest.raises(InputError, match=r"^13 of 14 rows .*--skip-bad.*row 0 .*gone0.png; .*row 9 .*; and 3 more$"):
        load([*bad, GOOD], world, tokenizer, config, tmp_path)
    for row, image_error in ((bad[-3], "broken.png is not a picture"), (bad[-2], "page.png is not a picture")):
        with pytest.raises(InputError, match=image_error):
            load([GOOD, row], world, tokenizer, config, tmp_path)
    dataset = load([*bad, GOOD, bad[0]], world, tokenizer, config, tmp_path, skip_bad=True)
    assert (len(dataset), dataset.skipped) == (1, 14) and dataset.name(0).endswith("chat.json, row 13 (id 7)")
    with pytest.raises(InputError, match="13 of 13 rows"):
        load(bad, world, tokenizer, config, tmp_path, skip_bad=True)


def test_several_files_with_a_folder_each(world, tokenizer, config, tmp_path):
    (tmp_path / "one.json").write_text(json.dumps([GOOD] * 3))
    (tmp_path / "two.json").write_text(json.dumps([{**GOOD, "image": "cat.png"}]))
    shutil.copy(world / "images" / "train_000001.png", tmp_path / "cat.png")
    sources = [(tmp_path / "one.json", world / "images"), (tmp_path / "two.json", tmp_path)]
    dataset = Conversations(sources, tokenizer, config)
    assert len(dataset) == 4 and dataset.name(3) == f"{tmp_path / 'two.json'}, row 0 (id 7)"
    assert not torch.equal(dataset[0][2][0], dataset[3][2][0])


def test_lengths_are_known_well_enough_to_sort_by(world, tokenizer, config):
    dataset = Conversations([(world / "instruct.json", world / "images")], tokenizer, config)
    exact = torch.tensor([float(len(tokens)) for tokens, _, _ in dataset])
    assert torch.corrcoef(torch.stack([exact, torch.tensor(dataset.lengths, dtype=torch.float)]))[0, 1] > 0.95


def test_an_epoch_is_every_row_once_in_batches_of_like_lengths():
    lengths = [10, 200] * 40
    order = length_grouped_batches(lengths, batch_size=8, steps=25, seed=0)
    assert sorted(row for batch in order[:10] for row in batch) == list(range(80))
    assert sorted(row for batch in order[10:20] for row in batch) == list(range(80))
    assert order[:10] != order[10:20] and len(order) == 25
    assert all(len({lengths[row] for row in batch}) == 1 for batch in order)
    assert length_grouped_batches(lengths, 8, 25, seed=0) == order != length_grouped_batches(lengths, 8, 25, seed=1)


def test_in_many_epochs_every_row_is_seen_though_no_batch_is_cut_short():
    order = length_grouped_batches(list(range(40)), batch_size=16, steps=100, seed=0)
    assert {row for batch in order for row in batch} == set(range(40))
    assert {len(batch) for batch in order} == {16}


def test_little_of_a_batch_is_padding():
    lengths = [round(256 + random.Random(row).lognormvariate(5, 0.5)) for row in range(5000)]  # a picture, and text
    order = length_grouped_batches(lengths, batch_size=32, steps=150, seed=0)
    longest = sum(32 * max(lengths[row] for row in batch) for batch in order)
    assert sum(lengths[row] for batch in order for row in batch) > 0.95 * longest


def test_a_small_data_set_fills_a_batch_by_coming_again():
    order = length_grouped_batches([5, 6, 7], batch_size=8, steps=2, seed=0)
    assert [len(rows) for rows in order] == [8, 8] and {*order[0]} == {0, 1, 2}


def test_batches_come_in_micro_batches(world, tokenizer, config, tmp_path):
    dataset = load([GOOD] * 5, world, tokenizer, config, tmp_path)
    batches = list(load_batches(dataset, [[0, 1, 2], [3, 4, 0]], micro_batch=2))
    assert [[len(tokens) for tokens, _, _ in batch] for batch in batches] == [[2, 1], [2, 1]]
    assert batches[0][0][2].shape == (2, 3, 32, 32)


@pytest.mark.parametrize("content, image_error", [
    ("[", "is not JSON"), ("[1", "is not JSON"), ("{}", "is not a JSON list"), ("[]", "is empty"),
    ("[3]", "row 0: it has no 'conv"),
])
def test_a_file_that_is_no_list_of_conversations_is_refused(world, tokenizer, config, tmp_path, content, image_error):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(InputError, match=image_error):
        Conversations([(tmp_path / "bad.json", world / "images")], tokenizer, config)


def test_one_look_at_all_rows_sees_each_once_and_is_filled_up_for_every_process(monkeypatch):
    assert eval_batches([5, 3, 9, 1, 4], 2) == [[3, 1], [4, 0], [2]]
    monkeypatch.setattr("nanollava.infra.distributed.world_size", lambda: 4)
    assert eval_batches([5, 3, 9, 1, 4], 4) == [[3, 1, 4, 0], [2, PAD_ROW, PAD_ROW, PAD_ROW]]
