import pytest

from nanollava.image import open_image, preprocess
from nanollava.infra.json_io import read_json
from nanollava.toy import score
from nanollava.toy.score import accuracy, answer_rows, evaluate_run, is_correct


@pytest.mark.parametrize("reply, expected", [
    ("The cat is red.", True), ("the cat is red", True), ("The cat is red", True),
    ("The cat is blue.", False), ("The cat is red. Yes.", False), ("", False),
])
def test_reply_is_correct_if_it_equals_the_answer(reply, expected):
    assert is_correct(reply, "The cat is red.") is expected


def test_accuracy_is_by_type_and_over_all():
    rows = [{"type": name, "conversations": [{}, {"value": "Yes."}]}
            for name in ("kind", "kind", "color", "color", "color")]
    predictions = ["Yes.", "No.", "Yes.", "Yes.", "Yes."]
    assert accuracy(rows, predictions) == {"kind": 50.0, "color": 100.0, "all": 80.0}


def test_replies_are_in_the_order_of_the_rows(model, tokenizer, world, monkeypatch):
    """Although rows are answered in batches sorted by type, each with the features of its image."""
    def generate_replies(model, tokenizer, prompts, batch_size):
        replies = [f"{turns[0]['value']} {features.sum():.4f}" for turns, features in prompts]
        return reversed(list(enumerate(replies)))  # in the order in which they end

    rows = read_json(world / "test.json")
    monkeypatch.setattr(score, "generate_replies", generate_replies)
    replies = answer_rows(model, tokenizer, rows, world / "images", "", batch_size=7)
    for row, reply in zip(rows[::5], replies[::5]):
        pixels = preprocess(open_image(world / "images" / row["image"]), 32)[None]
        features = model.encode_images(pixels)
        assert reply == f"{row['conversations'][0]['value']} {features.sum():.4f}"


@pytest.mark.parametrize("limit", [1, None])
def test_wrong_image_is_never_the_right_one(
        model, tokenizer, world, tmp_path, monkeypatch, limit):
    model.save_pretrained(tmp_path / "stage2", [tokenizer.path])
    images = {}

    def answer_rows(model, tokenizer, rows, folder, label):
        images[label] = [row["image"] for row in rows]
        return [""] * len(rows)

    monkeypatch.setattr(score, "answer_rows", answer_rows)
    evaluate_run(tmp_path, world, limit=limit)
    right, wrong = images["after stage 2"], images["wrong image"]
    assert len(right) == len(wrong)
    assert all(one != other for one, other in zip(right, wrong))
    if limit is None:
        assert set(right) == set(wrong)


def test_run_is_evaluated_with_both_controls_and_reported(model, tokenizer, world, tmp_path):
    for stage in ("stage1", "stage2"):
        model.save_pretrained(tmp_path / stage, [tokenizer.path])
    columns = evaluate_run(tmp_path, world, limit=16)
    assert list(columns) == ["after stage 2", "wrong image", "after stage 1"]
    page = (tmp_path / "report.html").read_text()
    assert "wrong image" in page and "data:image/png" in page
    assert page.count('<span class="truth">') == 16  # below every wrong reply
    assert "tour.html" not in page
    (tmp_path / "tour.html").touch()
    evaluate_run(tmp_path, world, limit=1)
    assert '<a href="tour.html">' in (tmp_path / "report.html").read_text()


def test_run_without_stage1_is_evaluated(model, tokenizer, world, tmp_path):
    model.save_pretrained(tmp_path / "stage2", [tokenizer.path])
    assert list(evaluate_run(tmp_path, world, limit=1)) == ["after stage 2", "wrong image"]
