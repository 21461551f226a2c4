"""The example of docs/training.md: a projector type is added in one place."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from nanollava import Llava, llava
from nanollava.infra.io import InputError
from nanollava.layers import Linear
from nanollava.llava import PROJECTORS

DOCS = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.fixture
def pixel_shuffle(monkeypatch):
    """Run the code block of the docs with a copy of the table, which is put back afterwards."""
    table = dict(PROJECTORS)
    monkeypatch.setattr(llava, "PROJECTORS", table)
    pattern = r"```python\n(class PixelShuffleProjector.*?)```"
    code, = re.findall(pattern, DOCS.read_text(), re.DOTALL)
    assert code.count("\n") < 25
    exec(code, {"nn": nn, "math": math, "Linear": Linear, "PROJECTORS": table})


def test_squares_of_patches_become_tokens(pixel_shuffle, config):
    projector = llava.PROJECTORS["pixel_shuffle"](config.vision, 16 * 4)
    nn.init.eye_(projector.linear_1.weight)
    nn.init.zeros_(projector.linear_1.bias)
    patches = torch.arange(16.0)[None, :, None].expand(1, 16, 16)  # patch i holds the number i
    tokens = projector(patches)
    assert tokens.shape == (1, 4, 64)
    squares = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert tokens[0, :, ::16].tolist() == squares


def test_new_projector_trains_saves_and_opens(pixel_shuffle, command, world, tmp_path):
    code, _, error = command("train", "--stage", 1, "--projector", "pixel_shuffle", "--data", world,
                             "--max-steps", 3, "--out", tmp_path / "stage1")
    assert code == 0, error
    code, _, error = command("train", "--stage", 2, "--model", tmp_path / "stage1", "--data", world,
                             "--max-steps", 3, "--out", tmp_path / "stage2")
    assert code == 0, error
    model = Llava.from_pretrained(tmp_path / "stage2")
    assert model.config.projector == "pixel_shuffle" and model.config.tokens_per_image == 9
    assert model.multi_modal_projector.linear_1.in_features == 4 * 128
    config = json.loads((tmp_path / "stage2" / "config.json").read_text())
    assert config["model_type"] == "nanollava"  # other software must refuse it
    image = Path(__file__).parents[2] / "cat.jpg"
    code, reply, error = command("sample", "--model", tmp_path / "stage2", "--image", image,
                                 "--prompt", "What is it?", "--max-new-tokens", 3)
    assert code == 0, error


def test_folder_with_an_unknown_projector_is_refused_by_name(
        pixel_shuffle, model, tmp_path, monkeypatch):
    model.config.projector = "pixel_shuffle"
    Llava(model.config).save_pretrained(tmp_path / "run")
    assert Llava.from_pretrained(tmp_path / "run").config == model.config
    monkeypatch.undo()
    with pytest.raises(InputError, match="run.*'pixel_shuffle' is unknown, only linear"):
        Llava.from_pretrained(tmp_path / "run")
