"""Our own commands that ask a language model, against our own server: nothing is mocked."""

import json

import pytest

from nanollava.infra.json_io import read_json
from tests.commands.conftest import command  # noqa: F401
from tests.serve.test_server import speak, start  # noqa: F401


@pytest.fixture
def base_url(model, start, monkeypatch):  # noqa: F811
    """The address of a server with room for long prompts; several requests wait or are refused."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-right")
    model.config.text.max_position_embeddings = 20_000
    return f"http://127.0.0.1:{start(key='sk-right', max_waiting=3).server_address[1]}/v1"


def test_data_engine_writes_what_the_model_says(command, base_url, model, tokenizer,  # noqa: F811
                                                tmp_path):
    speak(model, tokenizer, "There is a cat.")
    images = [{"id": number, "file_name": f"{number}.jpg", "width": 100, "height": 50}
              for number in range(6)]
    captions = [{"id": number, "image_id": number, "caption": f"Cat number {number}."}
                for number in range(6)]
    boxes = [{"id": number, "image_id": number, "category_id": 1, "bbox": [0, 0, 50, 50]}
             for number in range(6)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    (tmp_path / "instances.json").write_text(json.dumps(
        {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}))
    code, _, error = command(
        "prepare_data", "instruct", "--captions", "captions.json", "--instances", "instances.json",
        "--kind", "detail", "--base-url", base_url, "--workers", 3, "--out", "out.json")
    assert code == 0 and "6 of 6 images have an answer" in error
    rows = read_json(tmp_path / "out.json")
    assert [row["image"] for row in rows] == [f"{number}.jpg" for number in range(6)]
    assert {row["conversations"][1]["value"] for row in rows} == {"There is a cat."}


def test_judge_grades_with_the_scores_that_the_model_names(command, base_url, model,  # noqa: F811
                                                           tokenizer, tmp_path):
    speak(model, tokenizer, "8,9")
    for name, row in {
        "questions": {"question_id": 1, "image": "7.jpg", "text": "What?", "category": "conv"},
        "reference": {"question_id": 1, "text": "A cat."},
        "context": {"image": "7.jpg", "caption": "A cat."},
        "answers": {"question_id": 1, "text": "A dog."},
    }.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    code, out, _ = command(
        "nanollava.evaluate", "bench", "--questions", "questions", "--reference", "reference",
        "--context", "context", "--answers", "answers", "--out", "out.json", "--both-orders",
        "--base-url", base_url)
    assert code == 0 and "100.0%" in out
    scores = read_json(tmp_path / "out.json")["scores"]["all"]
    assert (scores["ours"], scores["reference"], scores["grades"]) == (8.5, 8.5, 2)


def test_refused_key_ends_the_data_engine(command, base_url, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    (tmp_path / "captions.json").write_text(json.dumps(
        {"images": [{"id": 1, "file_name": "1.jpg", "width": 9, "height": 9}],
         "annotations": [{"id": 1, "image_id": 1, "caption": "A cat."}]}))
    code, _, error = command("prepare_data", "instruct", "--captions", "captions.json",
                             "--base-url", base_url, "--out", "out.json")
    assert code == 2 and "the API key is missing or wrong" in error and "sk-" not in error
