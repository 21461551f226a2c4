import json
import pickle
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from nanollava.conversation import IGNORE_INDEX
from nanollava.data import (
    PAD_ROW,
    Conversations,
    collate,
    eval_batches,
    hash_sources,
    length_grouped_batches,
    load_batches,
)
from nanollava.image import open_image, preprocess
from nanollava.infra.io import InputError

QUESTION = {"from": "human", "value": "<image>\nWhat is there?"}
ROW = {"id": "7", "image": "train_000000.png",
       "conversations": [QUESTION, {"from": "gpt", "value": "A cat."}]}
TEXT_ROW = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}


@pytest.fixture
def load(world, tokenizer, config, tmp_path):
    """load(rows, ...) -> Conversations of a file of these rows."""

    def load(rows, **options):
        (tmp_path / "chat.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1))
        sources = [(tmp_path / "chat.json", world / "images")]
        return Conversations(sources, tokenizer, config, **options)

    return load


def learned_text(labels, tokenizer):
    return tokenizer.decode([label for label in labels if label != IGNORE_INDEX])


# ---------------------------------------------------------------------------------------------
# The dataset


def test_row_is_tokens_labels_and_pixels(load, tokenizer, config):
    tokens, labels, images = load([ROW])[0]
    assert tokens.count(config.image_token_id) == 16 and len(tokens) == len(labels)
    assert learned_text(labels, tokenizer) == "A cat."
    assert [image.shape for image in images] == [(3, 32, 32)]


def test_rows_after_text_that_is_not_ascii_are_found_in_the_file(load, tokenizer):
    answers = ["Café ☃ \U0001f600.", "A cat.", "\x85\xa0é", "A dog."]
    rows = [{"conversations": [TEXT_ROW["conversations"][0], {"from": "gpt", "value": answer}]}
            for answer in answers]
    dataset = load(rows)
    for (_, labels, _), answer in zip(dataset, answers):
        expected = tokenizer.encode(answer.strip()) + [tokenizer.eos_id]
        assert [label for label in labels if label != IGNORE_INDEX] == expected


def test_bad_rows_are_an_error_before_training_or_left_out(load):
    bad = {**ROW, "image": "none.png"}
    with pytest.raises(InputError, match=r"chat.json, row 1 \(id 7\): no image at .*none.png"):
        load([ROW, bad])
    dataset = load([bad, ROW, {"id": "8"}], skip_bad=True)
    assert (len(dataset), dataset.skipped) == (1, 2)
    assert dataset.name(0).endswith("chat.json, row 1 (id 7)")
    with pytest.raises(InputError, match="2 of 2 rows cannot be used"):
        load([bad, bad], skip_bad=True)


def test_rows_cut_at_max_length_are_counted(load, tokenizer):
    length = len(load([ROW])[0][0])
    long_row = {**ROW, "conversations": [QUESTION, {"from": "gpt", "value": "A cat and a dog."}]}
    assert load([ROW, long_row], max_length=length + 100).truncated == 0
    assert load([ROW, long_row], max_length=length).truncated == 1
    dataset = load([ROW, long_row], max_length=length - 2)
    assert dataset.truncated == 2 and dataset.lengths.tolist() == [length - 2] * 2
    tokens, labels, _ = dataset[0]
    assert len(tokens) == len(labels) == length - 2
    assert "A cat.".startswith(learned_text(labels, tokenizer))


def test_rows_without_an_image_are_written_in_several_ways(load):
    rows = [TEXT_ROW, *({**TEXT_ROW, "image": image} for image in (None, "", []))]
    assert [images for _, _, images in load(rows)] == [[]] * 4


def test_each_file_has_its_own_image_folder(world, tokenizer, config, tmp_path):
    (tmp_path / "one.json").write_text(json.dumps([ROW] * 3))
    (tmp_path / "two.json").write_text(json.dumps([{**ROW, "image": "cat.png"}]))
    shutil.copy(world / "images" / "train_000001.png", tmp_path / "cat.png")
    sources = [(tmp_path / "one.json", world / "images"), (tmp_path / "two.json", tmp_path)]
    dataset = Conversations(sources, tokenizer, config)
    assert len(dataset) == 4 and dataset.name(3) == f"{tmp_path / 'two.json'}, row 0 (id 7)"
    assert not torch.equal(dataset[0][2][0], dataset[3][2][0])


def test_lengths_sort_rows_almost_as_exact_lengths_do(world, tokenizer, config):
    dataset = Conversations([(world / "instruct.json", world / "images")], tokenizer, config)
    exact = torch.tensor([float(len(tokens)) for tokens, _, _ in dataset])
    estimated = torch.tensor(dataset.lengths, dtype=torch.float)
    assert torch.corrcoef(torch.stack([exact, estimated]))[0, 1] > 0.95


def test_dataset_holds_places_of_rows_not_rows(load):
    few, many = (len(pickle.dumps(load([ROW] * count))) for count in (10, 1010))
    assert (many - few) / 1000 < 50 < len(json.dumps(ROW))


def test_spawned_workers_give_the_same_batches(load, monkeypatch):
    """As on macOS and with Python 3.14: workers get the dataset pickled."""
    dataset = load([ROW, TEXT_ROW])
    (expected,), = load_batches(dataset, [[0, 1]])
    spawn = partial(DataLoader, multiprocessing_context="spawn")
    monkeypatch.setattr("nanollava.data.DataLoader", spawn)
    (batch,), = load_batches(dataset, [[0, 1]], workers=1)
    assert all(torch.equal(*tensors) for tensors in zip(batch, expected))


def test_hash_of_sources_changes_with_rows_and_image_folder_but_not_with_their_place(tmp_path):
    paths = [tmp_path / name for name in ("a.json", "b.json", "c.json")]
    for path, rows in zip(paths, ([TEXT_ROW], [TEXT_ROW], [TEXT_ROW] * 2)):
        path.write_text(json.dumps(rows))
    a, b, c = ((path, tmp_path / "images") for path in paths)
    moved, other_images = (paths[0], Path("moved", "images")), (paths[0], tmp_path)
    assert hash_sources([a]) == hash_sources([b]) == hash_sources([moved])
    assert len({hash_sources(pairs) for pairs in ([a], [c], [other_images], [a, b], [])}) == 5


@pytest.mark.parametrize("change", [
    lambda path: path.write_text(" " * 10 + path.read_text()),
    lambda path: path.write_text(path.read_text().replace("A cat.", "A dog.")),
    lambda path: path.write_text(path.read_text().replace('"conversations"', '"conversation5"')),
    lambda path: path.unlink(),
])
@pytest.mark.parametrize("workers", [0, 1])
def test_file_that_changes_during_training_is_an_error(load, tmp_path, change, workers):
    dataset = load([ROW, ROW])
    change(tmp_path / "chat.json")
    with pytest.raises(InputError, match="chat.json(:| has changed)"):
        list(load_batches(dataset, [[0, 1]], workers=workers))


def test_workers_that_are_still_there_do_not_delay_the_end():
    script = """if True:
        from nanollava.data import load_batches
        class Rows(list):
            class config:
                image_token_id = 9
        batches = load_batches(Rows([([1], [1], [])] * 9), [[0], [1], [2], [3]], workers=1)
        next(batches)
        kept = [batches]
        kept.append(kept)  # until exit
        print("end")"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


# ---------------------------------------------------------------------------------------------
# Batches


def test_collate_pads_on_the_right_without_labels(load, config):
    tokens, labels, images, *_ = collate(list(load([TEXT_ROW, ROW])), config.image_token_id)
    assert tokens.shape == labels.shape and images.shape == (1, 3, 32, 32)
    padding = (tokens[0] == 0).nonzero()[:, 0]
    assert len(padding) and padding[-1] == tokens.shape[1] - 1
    assert (labels[0, padding] == IGNORE_INDEX).all()


def test_images_travel_as_bytes_and_become_the_pixels_of_preprocess(load, world, config):
    batch = collate(list(load([ROW, TEXT_ROW])), config.image_token_id)
    assert batch.images.dtype == torch.uint8
    image = open_image(world / "images" / ROW["image"])
    assert torch.equal(batch.to("cpu").images, preprocess(image, 32)[None])


def test_batch_has_the_positions_of_image_tokens_and_targets(load, config):
    batch = collate(list(load([TEXT_ROW, ROW])), config.image_token_id)
    tokens, labels = batch.tokens.flatten(), batch.labels.flatten()
    assert (tokens[batch.image_positions] == config.image_token_id).all()
    assert len(batch.image_positions) == config.tokens_per_image
    assert (labels[batch.target_positions] != IGNORE_INDEX).all()
    assert len(batch.target_positions) == (labels != IGNORE_INDEX).sum()


def test_collate_without_images_gives_none(load, config):
    assert collate(list(load([TEXT_ROW])), config.image_token_id).images is None


def test_epoch_has_each_row_once_in_batches_of_similar_length():
    lengths = [10, 200] * 40
    batches = length_grouped_batches(lengths, batch_size=8, steps=25, seed=0)
    for epoch in (batches[:10], batches[10:20]):
        assert sorted(row for batch in epoch for row in batch) == list(range(80))
    assert batches[:10] != batches[10:20] and len(batches) == 25
    assert all(len({lengths[row] for row in batch}) == 1 for batch in batches)


def test_lengths_of_successive_batches_are_in_random_order():
    batches = length_grouped_batches(list(range(400)), batch_size=4, steps=100, seed=0)
    shortest = [min(batch) for batch in batches[:50]]  # of one group
    assert shortest != sorted(shortest)


def test_same_seed_gives_the_same_batches():
    one, same, other = (length_grouped_batches([1, 2, 3, 4] * 10, 8, 25, seed=seed)
                        for seed in (0, 0, 1))
    assert one == same != other


def test_every_row_is_used_although_last_batches_are_dropped():
    batches = length_grouped_batches(list(range(40)), batch_size=16, steps=100, seed=0)
    assert {row for batch in batches for row in batch} == set(range(40))
    assert {len(batch) for batch in batches} == {16}


def test_data_set_smaller_than_a_batch_fills_it_by_repetition():
    batches = length_grouped_batches([5, 6, 7], batch_size=8, steps=2, seed=0)
    assert [len(rows) for rows in batches] == [8, 8] and {*batches[0]} == {0, 1, 2}


def test_eval_batches_have_each_row_once_and_pad_the_last_batch_for_all_ranks(monkeypatch):
    assert eval_batches([5, 3, 9, 1, 4], 2) == [[3, 1], [4, 0], [2]]
    monkeypatch.setattr("nanollava.infra.distributed.world_size", lambda: 4)
    padded = [2, PAD_ROW, PAD_ROW, PAD_ROW]
    assert eval_batches([5, 3, 9, 1, 4], 4) == [[3, 1, 4, 0], padded]


def test_pad_row_has_no_targets(load, tokenizer):
    assert load([ROW])[PAD_ROW] == ([tokenizer.bos_id], [IGNORE_INDEX], [])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_split_into_micro_batches(load, workers):
    batches = list(load_batches(load([ROW] * 5), [[0, 1, 2], [3, 4, 0]], micro_batch_size=2,
                                workers=workers))
    assert [[len(part.tokens) for part in batch] for batch in batches] == [[2, 1], [2, 1]]
    assert batches[0][0].images.shape == (2, 3, 32, 32)


def test_ranks_share_a_batch(load, config, monkeypatch):
    answers = ["A.", "B.", "C.", "D."]
    rows = [{"conversations": [TEXT_ROW["conversations"][0], {"from": "gpt", "value": answer}]}
            for answer in answers]
    dataset = load(rows)
    monkeypatch.setattr("nanollava.infra.distributed.world_size", lambda: 2)
    monkeypatch.setattr("nanollava.infra.distributed.rank", lambda: 1)
    (batch,), = load_batches(dataset, [[0, 1, 2, 3]])
    expected = collate([dataset[1], dataset[3]], config.image_token_id)
    assert torch.equal(batch.tokens, expected.tokens)
