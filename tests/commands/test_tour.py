"""`python -m nanollava.tour` as a user runs it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from nanollava.llava import Llava, LlavaConfig
from tests.test_tour import data_of


def test_command_compares_projectors_before_and_after_training(command, model, tokenizer, tmp_path):
    for stage in (1, 2):
        model.config.stage = stage
        model.save_pretrained(tmp_path / f"stage{stage}", [tokenizer.path])
        torch.nn.init.normal_(model.multi_modal_projector.linear_1.weight)
    Image.new("RGB", (9, 9), "red").save(tmp_path / "red.png")
    code, out, error = command("nanollava.tour", "--model", "stage2", "--image", "red.png",
                               "--out", "page.html", "--max-new-tokens", 3)
    assert code == 0, error
    assert "llava.py Llava.merge_image_features" in out and "Answer: " in out
    views = data_of(tmp_path / "page.html")["views"]
    assert list(views) == ["untrained", "after stage 1", "after stage 2",
                           "after stage 2, layer -1 read by the projector for -2"]
    assert len({json.dumps(words) for words in views.values()}) == 4


def test_stage_1_of_another_model_is_not_compared(command, model, tokenizer, tmp_path):
    model.config.stage = 2
    model.save_pretrained(tmp_path / "stage2", [tokenizer.path])
    other = LlavaConfig(model.config.vision, replace(model.config.text, intermediate_size=8),
                        image_token_id=model.config.image_token_id, stage=1)
    Llava(other).save_pretrained(tmp_path / "stage1", [tokenizer.path])
    code, _, error = command("nanollava.tour", "--model", "stage2", "--out", "page.html",
                             "--max-new-tokens", 1)
    assert code == 0, error
    assert "after stage 1" not in data_of(tmp_path / "page.html")["views"]


@pytest.mark.parametrize("words, message", [
    ("--prompt <image>", "--prompt must not contain <image>"), ("--prompt  ", "--prompt is empty"),
    ("--image none.png", "no image at none.png"), ("--model nowhere", "no model folder at nowhere"),
    ("--out .", "cannot write ."), ("--out run/config.json/x", "cannot write"),
    ("--max-new-tokens 0", "--max-new-tokens"), ("--dtype int8", "--dtype"),
    (f"--prompt {'x' * 9000}", "the model reads at most"),
])
def test_mistake_is_one_line_and_leaves_no_page(error_of, run_folder, words, message):
    flag, value = words.split(" ", 1)
    arguments = {"--model": run_folder, "--out": "page.html"} | {flag: value}
    assert message in error_of("nanollava.tour", *(x for pair in arguments.items() for x in pair))
    assert not list(Path().glob("*.html"))
