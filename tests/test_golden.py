"""nanollava against transformers: the same files, the same numbers. tests/golden/make.py made both and says how."""

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

GOLDEN = Path(__file__).parent / "golden"
VALUES = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN / "values.npz").items()}
PIXELS = dict(np.load(GOLDEN / "pixels.npz"))


def see(*names):
    """Pictures of tests/golden/pictures as a model sees them, (N, 3, 28, 28)."""
    return torch.stack([preprocess(open_image(GOLDEN / "pictures" / name), 28) for name in names])


def assert_same(ours, theirs):
    """Equal up to the rounding of float32, which depends on the order in which a machine adds."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))


# ---------------------------------------------------------------------------------------------
# Models


@pytest.fixture(scope="module")
def llava():
    return Llava.from_pretrained(GOLDEN / "llava")


@pytest.mark.parametrize("case, pictures", [("one", ["upright.png"]), ("two", ["flat.png", "upright.png"])])
def test_a_llava_says_what_it_says_in_transformers(llava, case, pictures):
    tokens, images = VALUES[f"llava {case} tokens"][None], see(*pictures)
    assert_same(llava(tokens, images)[0], VALUES[f"llava {case} logits"])
    said = torch.cat(list(llava.generate(tokens, images, max_new_tokens=12)))
    assert said.tolist() == VALUES[f"llava {case} said"].tolist()


def test_the_loss_of_a_batch_with_three_pictures(llava):
    tokens, labels = VALUES["llava batch tokens"], VALUES["llava batch labels"]
    loss = llava(tokens, see("upright.png", "flat.png", "upright.png"), labels)
    assert_same(loss, VALUES["llava loss"])


@pytest.mark.parametrize("layer", [-1, -2])
def test_vision_features_are_those_of_the_layer(llava, layer):
    assert_same(llava.vision_tower(see("flat.png", "upright.png"), layer), VALUES[f"llava layer {layer}"])


def test_a_layer_may_be_counted_from_the_front(llava, tmp_path):
    """Of three blocks, the output of the second is layer 2 and layer -2."""
    shutil.copytree(GOLDEN / "llava", tmp_path / "llava")
    config = json.loads((GOLDEN / "llava" / "config.json").read_text())
    (tmp_path / "llava" / "config.json").write_text(json.dumps(config | {"vision_feature_layer": 2}))
    assert Llava.from_pretrained(tmp_path / "llava").config == llava.config


@pytest.mark.parametrize("folder, dtype, shard", [("linear", torch.float16, safetensors_io.MAX_SHARD_BYTES),
                                                  ("mlp", torch.bfloat16, 20_000)])
def test_transformers_reads_what_we_write(tmp_path, monkeypatch, folder, dtype, shard):
    """These were saved by nanollava, with a linear projector and with LLaVA-1.5's; transformers computed the logits."""
    model = Llava.from_pretrained(GOLDEN / folder)
    tokens, images = VALUES[f"{folder} tokens"][None], see("flat.png")
    # the linear one's picture token is past the vocabulary; the file has a row for it all the same
    assert_same(model(tokens, images)[0], VALUES[f"{folder} logits"][:, : model.config.text.vocab_size])
    said = torch.cat(list(model.generate(tokens, images, max_new_tokens=12)))
    assert said.tolist() == VALUES[f"{folder} said"].tolist()

    monkeypatch.setattr(safetensors_io, "MAX_SHARD_BYTES", shard)
    model.to(dtype).save_pretrained(tmp_path)  # and it is what we write today
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (GOLDEN / folder).iterdir()}
    for path in (GOLDEN / folder).glob("*.safetensors"):
        again, golden = load_file(tmp_path / path.name), load_file(path)
        assert again.keys() == golden.keys() and all(torch.equal(again[name], golden[name]) for name in golden)
    for path in (GOLDEN / folder).glob("*.json"):
        assert json.loads((tmp_path / path.name).read_text()) == json.loads(path.read_text())


@pytest.mark.parametrize("clip", ["clip", "clip-vision"])
def test_a_clip_and_a_llama_become_the_parts_of_a_llava(clip):
    """The CLIPs hold the ViT of golden/llava; the LLaMA has tied embeddings, rope_theta 500000 and several files."""
    model = Llava.from_parts(GOLDEN / clip, GOLDEN / "llama")
    assert_same(model.vision_tower(see("flat.png", "upright.png"), -1), VALUES["llava layer -1"])
    tokens = VALUES["llama tokens"][None]
    assert_same(model(tokens)[0], VALUES["llama logits"])
    assert torch.cat(list(model.generate(tokens, max_new_tokens=12))).tolist() == VALUES["llama said"].tolist()


def test_the_golden_values_would_notice():
    """The models are lively enough to tell a wrong detail from rounding: here the base of the rotary angles."""
    config = hf_config.read_config(GOLDEN / "llama", hf_config.text_config)
    llama = Llama(LlamaConfig(**config | {"rope_theta": 10000.0}))
    hf_format.load_llama(llama, GOLDEN / "llama", torch.float32, "cpu")
    logits = llama.logits(llama(llama.embed(VALUES["llama tokens"][None])))[0]
    assert (logits - VALUES["llama logits"]).abs().max() > 0.1


# ---------------------------------------------------------------------------------------------
# Pixels: not close but equal, bit by bit


@pytest.mark.parametrize("name", [name for name in PIXELS if " " not in name])
def test_pixels_equal_those_of_clips_processor(name):
    assert np.array_equal(see(name)[0].numpy(), PIXELS[name])


@pytest.mark.parametrize("name", [name for name in PIXELS if name.endswith("padded")])
def test_padded_pixels_equal_those_of_llavas_processor(name):
    picture = open_image(GOLDEN / "pictures" / name.removesuffix(" padded"))
    assert np.array_equal(preprocess(picture, 28, pad=True).numpy(), PIXELS[name])


def test_pixels_at_224_have_the_same_checksum():
    pixels = preprocess(open_image(GOLDEN / "pictures" / "flat.png"), 224).numpy()
    assert np.array_equal(pixels[:, ::37, ::37], PIXELS["flat.png at 224, every 37th"])
    assert hashlib.sha256(pixels.astype("<f4").tobytes()).digest() == PIXELS["flat.png at 224, sha256"].tobytes()
