import json

import pytest

from nanollava.data import stats
from nanollava.infra.io import InputError, read_json
from nanollava.teacher import prompts
from nanollava.teacher.captions import balanced, noun_phrases, read_pairs, write_pretrain


def test_noun_phrases_are_what_stands_between_small_words():
    assert noun_phrases("A donut shop is full of different flavors of donuts.") == {
        "donut shop", "different flavors", "donuts"}
    assert noun_phrases("Two men are riding a brown horse, on the beach!") == {"two men", "brown horse", "beach"}


def words(caption):
    return caption.split()


def test_the_filter_drops_the_rarest_keeps_the_rare_and_thins_the_common():
    captions = ["rare common"] * 3 + ["single common"] * 2 + ["common"] * 500
    kept = balanced(captions, seed=0, phrases_of=words)
    assert set(kept) >= {0, 1, 2}  # all that have a phrase seen three times
    assert 100 <= len(kept) <= 103  # and a hundred, perhaps the same, that have one seen 505 times
    assert kept == sorted(kept) == balanced(captions, seed=0, phrases_of=words)
    assert kept != balanced(captions, seed=1, phrases_of=words)


@pytest.mark.parametrize("count, kept", [(2, 0), (3, 3), (100, 100), (101, 100)])
def test_the_limits_are_the_papers(count, kept):
    assert len(balanced(["cat"] * count, seed=0, phrases_of=words)) == kept


def test_a_phrase_counts_once_in_a_caption():
    assert balanced(["cat cat cat"], seed=0, phrases_of=str.split) == []


def test_captions_are_read_one_by_one():
    assert len(balanced((f"cat w{n}" for n in range(50)), seed=0, phrases_of=words)) == 50


PAIRS = [("a.jpg", "A cat."), ("b.jpg", "A dog, ä.")]


@pytest.mark.parametrize("name, text", [
    ("pairs.json", json.dumps([{"image": image, "caption": caption, "url": "x"} for image, caption in PAIRS])),
    ("pairs.jsonl", "".join(json.dumps({"image": image, "caption": caption}) + "\n" for image, caption in PAIRS)),
    ("pairs.tsv", "".join(f"{image}\t{caption}\n" for image, caption in PAIRS)),
    ("coco.json", json.dumps({
        "images": [{"id": n, "file_name": image} for n, (image, _) in enumerate(PAIRS)],
        "annotations": [{"image_id": n, "caption": caption} for n, (_, caption) in enumerate(PAIRS)]})),
])
def test_pairs_are_read_in_every_common_form(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert list(read_pairs(tmp_path / name)) == PAIRS


@pytest.mark.parametrize("name, text, image_error", [
    ("a.json", '[{"image": "a.jpg"}]', "row 0: it must have"), ("a.jsonl", "{", "line 1: "),
    ("a.tsv", "a.jpg\tA cat.\n\nb.jpg\n", "line 3: it must have"), ("a.json", "3", "neither COCO's nor a list"),
    ("a.tsv", "a.jpg\tAn <image>.\n", "line 1: its caption contains <image>"),
])
def test_a_broken_pair_is_named(tmp_path, name, text, image_error):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=image_error):
        list(read_pairs(tmp_path / name))


def test_each_pair_becomes_a_brief_question_and_its_caption(tmp_path):
    (tmp_path / "pairs.tsv").write_text("".join(f"{n}.jpg\tA cat on a w{n} mat.\n" for n in range(40)))
    assert write_pretrain(tmp_path / "pairs.tsv", tmp_path / "out.json", seed=0, balance=False) == (40, 40)
    rows = read_json(tmp_path / "out.json")
    assert [row["image"] for row in rows] == [f"{n}.jpg" for n in range(40)]
    for number, row in enumerate(rows):
        question, answer = row["conversations"]
        assert question["value"].replace("<image>", "").strip() in prompts.BRIEF
        assert answer["value"] == f"A cat on a w{number} mat."
    assert len({row["conversations"][0]["value"].startswith("<image>") for row in rows}) == 2
    assert write_pretrain(tmp_path / "pairs.tsv", tmp_path / "out.json", seed=0, balance=True) == (40, 40)  # "cat"


def test_the_captions_are_not_written_over(tmp_path):
    (tmp_path / "pairs.json").write_text('[{"image": "a.jpg", "caption": "A cat."}]')
    with pytest.raises(InputError, match="holds the captions"):
        write_pretrain(tmp_path / "pairs.json", tmp_path / "pairs.json", seed=0, balance=False)


def test_nothing_is_written_where_nothing_is_left(tmp_path):
    (tmp_path / "pairs.tsv").write_text("a.jpg\tA cat.\n")
    with pytest.raises(InputError, match="no pair is left"):
        write_pretrain(tmp_path / "pairs.tsv", tmp_path / "out.json", seed=0, balance=True)
    assert not (tmp_path / "out.json").exists()


def test_stats_count_what_can_be_learned_and_name_what_cannot(tmp_path):
    good = {"id": "1-detail", "image": "a.jpg", "conversations": prompts.make_turns(["What?", "A gray cat."], True)}
    words = {"id": "2", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}] * 2}
    (tmp_path / "data.json").write_text(json.dumps([good, words, {**good, "image": []}, 3]))
    numbers, broken = stats(tmp_path / "data.json")
    assert numbers["rows"] == 4 and numbers["answers"] == 3 and numbers["words_of_answers"] == 5
    assert numbers["rows_without_picture"] == 1 and numbers["kind: detail, percent"] == 50
    assert broken == ["row 2: 0 pictures, but 1 times <image> in its text", "row 3: it has no 'conversations'"]
