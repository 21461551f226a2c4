"""nanollava computes what transformers computes, from the same files. See tests/golden/make.py."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nanollava import Llava
from nanollava.image import open_image, preprocess
from nanollava.llama import Llama, LlamaConfig
from nanollava.weights import hf_config, hf_format, safetensors_io
from tests.conftest import save_original

GOLDEN = Path(__file__).parent / "golden"
VALUES = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN / "values.npz").items()}
PIXELS = dict(np.load(GOLDEN / "pixels.npz"))


def load_images(*names):
    """Images of tests/golden/images as pixels (N, 3, 28, 28)."""
    paths = [GOLDEN / "images" / name for name in names]
    return torch.stack([preprocess(open_image(path), 28) for path in paths])


def assert_same(ours, theirs):
    """Equal up to rounding, which depends on the order in which a machine adds float32 numbers."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))


# ---------------------------------------------------------------------------------------------
# Models


@pytest.fixture(scope="module")
def llava():
    return Llava.from_pretrained(GOLDEN / "llava")


@pytest.mark.parametrize("case, names", [
    ("one", ["upright.png"]), ("two", ["flat.png", "upright.png"])])
def test_logits_and_generated_tokens_equal_transformers(llava, case, names):
    tokens, images = VALUES[f"llava {case} tokens"][None], load_images(*names)
    assert_same(llava(tokens, images)[0], VALUES[f"llava {case} logits"])
    generated = torch.cat(list(llava.generate(tokens, images, max_new_tokens=12)))
    assert generated.tolist() == VALUES[f"llava {case} generated"].tolist()


def test_loss_of_a_batch_with_three_images_equals_transformers(llava):
    tokens, labels = VALUES["llava batch tokens"], VALUES["llava batch labels"]
    loss = llava(tokens, load_images("upright.png", "flat.png", "upright.png"), labels)
    assert_same(loss, VALUES["llava loss"])


@pytest.mark.parametrize("layer", [-1, -2])
def test_vision_features_of_a_layer_equal_transformers(llava, layer):
    features = llava.vision_tower(load_images("flat.png", "upright.png"), layer)
    assert_same(features, VALUES[f"llava layer {layer}"])


def test_feature_layer_may_be_counted_from_the_front(llava, tmp_path):
    """Of three blocks, the output of the second is layer 2 and layer -2."""
    shutil.copytree(GOLDEN / "llava", tmp_path / "llava")
    path = tmp_path / "llava" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vision_feature_layer": 2}))
    assert Llava.from_pretrained(tmp_path / "llava").config == llava.config


SAVED = [("linear", torch.float16, 5_000_000_000), ("mlp", torch.bfloat16, 20_000)]


@pytest.mark.parametrize("folder", [folder for folder, _, _ in SAVED])
def test_transformers_computes_the_same_from_files_of_ours(folder):
    """nanollava saved these folders; transformers opened them and computed the logits."""
    model = Llava.from_pretrained(GOLDEN / folder)
    tokens, images = VALUES[f"{folder} tokens"][None], load_images("flat.png")
    # the file of the linear model has a row for the image token, which lies past its vocabulary
    logits = VALUES[f"{folder} logits"][:, : model.config.text.vocab_size]
    assert_same(model(tokens, images)[0], logits)
    generated = torch.cat(list(model.generate(tokens, images, max_new_tokens=12)))
    assert generated.tolist() == VALUES[f"{folder} generated"].tolist()


@pytest.mark.parametrize("folder, dtype, shard_bytes", SAVED)
def test_saved_files_are_still_the_same(tmp_path, monkeypatch, folder, dtype, shard_bytes):
    monkeypatch.setattr(safetensors_io, "MAX_SHARD_BYTES", shard_bytes)
    Llava.from_pretrained(GOLDEN / folder).to(dtype).save_pretrained(tmp_path)
    names = {path.name for path in (GOLDEN / folder).iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == names
    for path in (GOLDEN / folder).glob("*.safetensors"):
        again, golden = load_file(tmp_path / path.name), load_file(path)
        assert again.keys() == golden.keys()
        assert all(torch.equal(again[name], golden[name]) for name in golden)
    for path in (GOLDEN / folder).glob("*.json"):
        assert (tmp_path / path.name).read_text() == path.read_text()


def test_layout_of_the_original_code_computes_the_same(llava, tmp_path):
    """The same weights under the names of the original code, with the vision tower elsewhere."""
    folder = save_original(tmp_path / "original", llava)
    model = Llava.from_pretrained(folder, vision_tower=GOLDEN / "clip-vision")
    tokens = VALUES["llava two tokens"][None]
    is_image = tokens == llava.config.image_token_id
    tokens = tokens.masked_fill(is_image, model.config.image_token_id)  # past the vocabulary
    logits = model(tokens, load_images("flat.png", "upright.png"))[0]
    assert_same(logits, VALUES["llava two logits"])


@pytest.mark.parametrize("clip", ["clip", "clip-vision"])
def test_clip_and_llama_compute_the_same_as_parts(clip):
    """The CLIPs hold the ViT of golden/llava. The LLaMA ties its embeddings and has two shards."""
    model = Llava.from_parts(GOLDEN / clip, GOLDEN / "llama")
    features = model.vision_tower(load_images("flat.png", "upright.png"), -1)
    assert_same(features, VALUES["llava layer -1"])
    tokens = VALUES["llama tokens"][None]
    assert_same(model(tokens)[0], VALUES["llama logits"])
    generated = torch.cat(list(model.generate(tokens, max_new_tokens=12)))
    assert generated.tolist() == VALUES["llama generated"].tolist()


def test_wrong_rope_theta_changes_the_logits():
    """The weights are large enough that a wrong detail shows, and is not taken for rounding."""
    config = hf_config.read_config(GOLDEN / "llama", hf_config.text_config)
    llama = Llama(LlamaConfig(**config | {"rope_theta": 10000.0}))
    hf_format.load_llama(llama, GOLDEN / "llama", torch.float32, "cpu")
    logits = llama.logits(llama(llama.embed(VALUES["llama tokens"][None])))[0]
    assert (logits - VALUES["llama logits"]).abs().max() > 0.1


# ---------------------------------------------------------------------------------------------
# Pixels: equal bit by bit


@pytest.mark.parametrize("name", [name for name in PIXELS if " " not in name])
def test_pixels_equal_the_clip_processor(name):
    assert np.array_equal(load_images(name)[0].numpy(), PIXELS[name])


@pytest.mark.parametrize("name", [name for name in PIXELS if name.endswith("padded")])
def test_padded_pixels_equal_the_llava_processor(name):
    image = open_image(GOLDEN / "images" / name.removesuffix(" padded"))
    assert np.array_equal(preprocess(image, 28, pad=True).numpy(), PIXELS[name])


def test_pixels_at_224_have_the_same_checksum():
    pixels = preprocess(open_image(GOLDEN / "images" / "flat.png"), 224).numpy()
    assert np.array_equal(pixels[:, ::37, ::37], PIXELS["flat.png at 224, every 37th"])
    digest = hashlib.sha256(pixels.astype("<f4").tobytes()).digest()
    assert digest == PIXELS["flat.png at 224, sha256"].tobytes()
