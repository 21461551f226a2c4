import pytest

from nanollava.image import open_image, preprocess
from nanollava.infra.io import read_json
from nanollava.toy import score
from nanollava.toy.score import accuracy, answer_toy, gallery, same, toy_table


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


def test_the_wrong_picture_is_another_one(model, tokenizer, world, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "stage2", [tokenizer.path])
    shown = {}

    def answer_toy(model, tokenizer, rows, images, label):
        shown[label] = [row["image"] for row in rows]
        return [""] * len(rows)

    monkeypatch.setattr(score, "answer_toy", answer_toy)
    for limit in (1, None):
        toy_table(tmp_path, world, limit=limit)
        right, wrong = shown["after stage 2"], shown["wrong picture"]
        assert len(right) == len(wrong) and all(one != other for one, other in zip(right, wrong))
    assert set(right) == set(wrong)


def test_every_question_gets_the_answer_to_its_own_picture(model, tokenizer, world, monkeypatch):
    """In batches, sorted by type, every picture looked at once: and yet each reply stands in its row's place."""
    def replies(model, tokenizer, conversations, pictures):
        return [f"{turns[0]['value']} {picture.sum():.4f}" for turns, picture in zip(conversations, pictures)]

    rows = read_json(world / "test.json")
    monkeypatch.setattr(score, "replies", replies)
    said = answer_toy(model, tokenizer, rows, world / "images", batch_size=7)
    for row, text in zip(rows[::5], said[::5]):
        picture = preprocess(open_image(world / "images" / row["image"]), 32)[None]
        assert text == f"{row['conversations'][0]['value']} {model.see(picture).sum():.4f}"


def test_the_toy_table_has_a_column_for_each_control(model, tokenizer, world, tmp_path):
    for stage in ("stage1", "stage2"):
        model.save_pretrained(tmp_path / stage, [tokenizer.path])
    columns, rows, said = toy_table(tmp_path, world, limit=16)
    assert list(columns) == ["after stage 2", "wrong picture", "after stage 1"]
    assert len(rows) == len(said) == 16
    assert gallery(rows, said, world / "images", across=2, down=1).width > 400
