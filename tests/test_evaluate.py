import pytest

from nanollava.evaluate import accuracy, answer_all, gallery, same, table, toy_table
from nanollava.files import read_json


@pytest.mark.parametrize("reply, right", [
    ("The cat is red.", True), ("the cat is red", True), ("The cat is red", True),
    ("The cat is blue.", False), ("The cat is red. Yes.", False), ("", False),
])
def test_a_reply_is_right_if_it_is_the_sentence(reply, right):
    assert same(reply, "The cat is red.") is right


def test_accuracy_counts_by_type_and_over_all():
    rows = [{"type": kind, "conversations": [{}, {"value": "Yes."}]}
            for kind in ("kind", "kind", "color", "color", "color")]
    assert accuracy(rows, ["Yes.", "No.", "Yes.", "Yes.", "Yes."]) == {"kind": 50.0, "color": 100.0, "all": 80.0}


def test_a_table_leaves_open_what_a_column_does_not_have():
    lines = table({"one": {"kind": 50.0, "all": 80.0}, "other": {"all": 7.25}}).splitlines()
    assert lines[1].split() == ["kind", "50.0%"] and lines[2].split() == ["all", "80.0%", "7.2%"]


def test_the_wrong_picture_is_another_one(model, tokenizer, world, monkeypatch):
    from nanollava import evaluate

    rows, shown, opened = read_json(world / "test.json"), {}, []

    def replies(model, tokenizer, turns, images, **_):
        opened.extend(images)
        return [""] * len(turns)

    monkeypatch.setattr(evaluate, "preprocess", lambda picture, size: picture)
    monkeypatch.setattr(evaluate, "open_image", lambda path: path.name)
    monkeypatch.setattr(evaluate, "replies", replies)
    for wrong in (False, True):
        opened.clear()
        answer_all(model, tokenizer, rows, world / "images", wrong_picture=wrong)
        shown[wrong] = [file for (file,) in opened]
    assert sorted(set(shown[True])) == sorted(set(shown[False]))
    assert all(right != wrong for right, wrong in zip(shown[False], shown[True]))


def test_the_toy_table_has_a_column_for_each_control(model, tokenizer, world, tmp_path):
    for stage in ("stage1", "stage2"):
        model.save_pretrained(tmp_path / stage, [tokenizer.path])
    columns, rows, said = toy_table(tmp_path, world, limit=16)
    assert list(columns) == ["after stage 2", "wrong picture", "after stage 1"]
    assert len(rows) == len(said) == 16
    assert gallery(rows, said, world / "images", across=2, down=1).width > 400
