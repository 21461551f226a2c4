"""Stage-1 data: reading pairs, the paper's filter, one brief conversation per pair."""

import json

import pytest

from nanollava.infra.io import InputError
from nanollava.infra.json_io import read_json
from nanollava.teacher import prompts
from nanollava.teacher.captions import (
    balance_captions,
    noun_phrases,
    pretrain_row,
    read_pairs,
    write_pretrain,
)

# ---------------------------------------------------------------------------------------------
# The filter


def test_noun_phrases_lie_between_function_words():
    assert noun_phrases("A donut shop is full of different flavors of donuts.") == {
        "donut shop", "different flavors", "donuts"}
    assert noun_phrases("Two men are riding a brown horse, on the beach!") == {
        "two men", "brown horse", "beach"}


def test_filter_keeps_rare_phrases_and_samples_frequent_ones():
    captions = ["rare, common"] * 3 + ["single, common"] * 2 + ["common"] * 500
    kept = balance_captions(captions, seed=0)
    assert set(kept) >= {0, 1, 2}  # all captions with a phrase that occurs three times
    assert 100 <= len(kept) <= 103  # and 100, perhaps the same, with one that occurs 505 times
    assert kept == sorted(kept) == balance_captions(captions, seed=0)
    assert kept != balance_captions(captions, seed=1)


@pytest.mark.parametrize("count, kept", [(0, 0), (2, 0), (3, 3), (100, 100), (101, 100)])
def test_filter_has_the_limits_of_the_paper(count, kept):
    assert len(balance_captions(["cat"] * count, seed=0)) == kept


def test_phrase_counts_once_per_caption():
    assert balance_captions(["cat, cat, cat"], seed=0) == []


def test_filter_reads_captions_from_a_generator():
    captions = (f"cat, thing {number}" for number in range(50))
    assert balance_captions(captions, seed=0) == list(range(50))


# ---------------------------------------------------------------------------------------------
# Pairs

PAIRS = [("a.jpg", "A cat."), ("b.jpg", "A dog, ä.")]
ROWS = [{"image": image, "caption": caption, "url": "x"} for image, caption in PAIRS]
TSV = "".join(f"{image}\t{caption}\n" for image, caption in PAIRS)


@pytest.mark.parametrize("name, text", [
    ("pairs.json", json.dumps(ROWS)),
    ("pairs.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS)),
    ("pairs.tsv", TSV),
    ("windows.tsv", "\ufeff" + TSV.replace("\n", "\r\n")),
    ("coco.json", json.dumps({
        "images": [{"id": number, "file_name": image} for number, (image, _) in enumerate(PAIRS)],
        "annotations": [{"image_id": number, "caption": caption}
                        for number, (_, caption) in enumerate(PAIRS)]})),
])
def test_every_documented_format_is_read(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    assert list(read_pairs(tmp_path / name)) == PAIRS


@pytest.mark.parametrize("name, text, message", [
    ("a.json", b'[{"image": "a.jpg"}]', r": \[0\] has no 'caption'"),
    ("a.json", b"3", ": it must be an object, not 3"),
    ("a.jsonl", b"{", "line 1 is not JSON"),
    ("a.jsonl", b"3", "line 1: it must be an object, not 3"),
    ("a.tsv", b"a.jpg\tA cat.\n\nb.jpg\n", "line 3: it has no 'caption'"),
    ("a.tsv", b"a.jpg\tA cat.\nb.jpg\t\xff\n", "line 2 is not UTF-8"),
    ("a.tsv", b"a.jpg\tAn <image>.\n", "line 1: caption must be text without <image>"),
    ("a.tsv", b"\tA cat.\n", "line 1: image must be text without <image>, not ''"),
])
def test_broken_pair_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(InputError, match=f"{name}.* ?{message}"):
        list(read_pairs(tmp_path / name))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot read .*none.tsv"):
        list(read_pairs(tmp_path / "none.tsv"))


# ---------------------------------------------------------------------------------------------
# Rows


def test_seed_and_number_alone_draw_a_row():
    assert pretrain_row(1, "a.jpg", "A cat.", seed=3) == {
        "id": "1", "image": "a.jpg", "conversations": [
            {"from": "human", "value": "What does the picture show? Keep it short.\n<image>"},
            {"from": "gpt", "value": "A cat."}]}


def test_pair_becomes_a_brief_question_and_its_caption(tmp_path):
    captions = [f"A cat on a w{number} mat." for number in range(40)]
    (tmp_path / "pairs.tsv").write_text(
        "".join(f"{number}.jpg\t{caption}\n" for number, caption in enumerate(captions)))
    numbers = write_pretrain(tmp_path / "pairs.tsv", tmp_path / "out.json", 0, balance=False)
    rows = read_json(tmp_path / "out.json")
    assert numbers == (40, 40, {})
    assert [row["image"] for row in rows] == [f"{number}.jpg" for number in range(40)]
    assert [row["conversations"][1]["value"] for row in rows] == captions
    questions = [row["conversations"][0]["value"] for row in rows]
    assert {question.replace("<image>", "").strip() for question in questions} <= set(prompts.BRIEF)
    assert len({question.startswith("<image>") for question in questions}) == 2


def test_balance_writes_what_the_filter_keeps(tmp_path):
    captions = ["A cat."] * 150 + ["A unicorn."]
    (tmp_path / "pairs.tsv").write_text(
        "".join(f"{number}.jpg\t{caption}\n" for number, caption in enumerate(captions)))
    numbers = write_pretrain(tmp_path / "pairs.tsv", tmp_path / "out.json", 0, balance=True)
    assert numbers == (151, 100, {})
    kept = [int(row["id"]) for row in read_json(tmp_path / "out.json")]
    assert kept == balance_captions(captions, seed=0)


def test_captions_file_is_not_overwritten(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(ROWS))
    with pytest.raises(InputError, match="choose another"):
        write_pretrain(path, path, seed=0, balance=False)
    assert read_json(path) == ROWS


@pytest.mark.parametrize("text, message", [
    ("a.jpg\tA cat.\n", "the filter keeps no caption"), ("", "holds no captions")])
def test_no_file_is_written_without_captions(tmp_path, text, message):
    (tmp_path / "pairs.tsv").write_text(text)
    with pytest.raises(InputError, match=message):
        write_pretrain(tmp_path / "pairs.tsv", tmp_path / "out.json", seed=0, balance=True)
    assert not (tmp_path / "out.json").exists()
