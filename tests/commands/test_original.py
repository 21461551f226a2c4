"""The commands on a LLaVA of the original code, whose vision tower lies in another folder."""

import json
from pathlib import Path

import pytest
from PIL import Image

from nanollava import Llava
from nanollava.infra.run_log import read_log


@pytest.fixture
def photo(tmp_path):
    """It is wide: a padded model sees more of it than its center."""
    Image.linear_gradient("L").resize((90, 30)).convert("RGB").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_sample_answers_as_from_a_folder_of_ours(command, original, clip, photo, tokenizer,
                                                 tmp_path):
    model = Llava.from_pretrained(original, vision_tower=clip)
    model.save_pretrained(tmp_path / "padded", [tokenizer.path])
    model.config.image_aspect_ratio = "square"
    model.save_pretrained(tmp_path / "cropped", [tokenizer.path])
    words = "--image", photo, "--prompt", "What?", "--max-new-tokens", 40
    code, reply, error = command("sample", "--model", original, "--vision-tower", clip, *words)
    assert (code, error) == (0, "") and reply.strip()
    assert command("sample", "--model", "padded", *words)[1] == reply
    assert command("sample", "--model", "cropped", *words)[1] != reply


def test_training_continues_and_writes_a_folder_that_needs_no_flag(command, original, clip, world,
                                                                   photo):
    code, _, error = command("train", "--stage", 2, "--model", original, "--vision-tower", clip,
                             "--data", world, "--max-steps", 2, "--out", "run")
    assert code == 0, error
    assert len(read_log(Path("run/log.jsonl"))) == 2
    config = json.loads(Path("run/config.json").read_text())
    assert config["model_type"] == "llava"
    assert config["nanollava"]["image_aspect_ratio"] == "pad"
    assert command("sample", "--model", "run", "--image", photo, "--prompt", "What?")[0] == 0


def test_other_commands_open_it(command, original, clip, world, photo):
    flags = "--model", original, "--vision-tower", clip
    code, out, error = command("nanollava.evaluate", "toy", *flags, "--data", world, "--limit", 2)
    assert code == 0 and "all" in out, error
    code, _, error = command("nanollava.evaluate", "report", *flags, "--data",
                             world / "instruct.json", "--images", world / "images", "--limit", 1)
    assert code == 0, error
    code, out, error = command("nanollava.tour", *flags, "--image", photo, "--max-new-tokens", 2)
    assert code == 0 and "padded" in out, error


@pytest.mark.parametrize("words", [
    "train --stage 2 --data WORLD --model", "sample --prompt x --model", "nanollava.tour --model",
    "nanollava.evaluate toy --data WORLD --model"])
def test_flag_that_is_missing_or_has_no_effect_is_named(error_of, original, clip, run_folder,
                                                        world, words):
    name, *words = words.replace("WORLD", str(world)).split()
    assert "give the folder of this CLIP with --vision-tower" in error_of(name, *words, original)
    error = error_of(name, *words, run_folder, "--vision-tower", clip)
    assert "--vision-tower has no effect on this LLaVA" in error


def test_vision_tower_needs_a_model_that_answers(error_of, clip):
    error = error_of("nanollava.evaluate", "scienceqa", "--data", "d", "--answers", "a",
                     "--vision-tower", clip)
    assert "--vision-tower has no effect without --model" in error
