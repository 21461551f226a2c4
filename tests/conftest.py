"""Fixtures of all tests: the shipped vocabulary, a tiny LLaVA with random weights, a toy world."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nanollava import Llava, Tokenizer
from nanollava.llama import LlamaConfig
from nanollava.llava import LlavaConfig
from nanollava.toy.dataset import write_world
from nanollava.vision import VisionConfig
from nanollava.weights import hf_config, hf_format
from tests.teacher.chat_server import Server

ASSETS = Path(__file__).parent.parent / "assets"

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # commands would choose the GPU; golden values are a CPU's

signal.signal(signal.SIGINT, signal.default_int_handler)  # `nohup pytest &` ignores it


@pytest.fixture(scope="session")
def tokenizer():
    """The shipped toy vocabulary."""
    return Tokenizer(ASSETS / "toy-llama")


@pytest.fixture
def config(tokenizer):
    """16 patches an image; 2 ViT blocks; 2 LLaMA blocks whose 4 heads share 2 key/value heads."""
    vision = VisionConfig(image_size=32, patch_size=8, hidden_size=16, intermediate_size=32,
                          num_hidden_layers=2, num_attention_heads=2)
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48,
                       num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return LlavaConfig(vision, text, image_token_id=len(tokenizer))


@pytest.fixture
def model(config):
    """A LLaVA with random weights, the same in every test."""
    torch.manual_seed(0)
    return Llava(config)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The folder of a small toy world: 60 training images and 10 test images."""
    folder = tmp_path_factory.mktemp("data") / "toy"
    write_world(folder, seed=0, count=60, tests=10)
    return folder


@pytest.fixture
def server(monkeypatch):
    """A chat server on this machine that plays GPT-4's part."""
    server = Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01},
                     daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


# ---------------------------------------------------------------------------------------------
# The layout of the original LLaVA code


def original_name(name: str, projector: str = "mlp2x_gelu") -> str:
    """The name of a parameter of ours in the files of the original code."""
    first = "model.mm_projector.0." if projector == "mlp2x_gelu" else "model.mm_projector."
    for ours, original in (("language_model.", ""),
                           ("multi_modal_projector.linear_1.", first),
                           ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
                           ("vision_tower.", "model.vision_tower.vision_tower.vision_model.")):
        if name.startswith(ours):
            return name.replace(ours, original, 1)


def original_config(config: LlavaConfig, **fields) -> dict:
    """A config.json like that of liuhaotian/llava-v1.5-7b."""
    return {
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama",
        "hidden_act": "silu", "image_aspect_ratio": "pad", "mm_hidden_size": 16,
        "mm_projector_type": config.projector, "mm_resampler_type": None,
        "mm_use_im_patch_token": False, "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch", "mm_vision_select_layer": config.feature_layer,
        "mm_vision_tower": "openai/clip-tiny", "pretraining_tp": 1, "rope_scaling": None,
        "tune_mm_mlp_adapter": False, "use_mm_proj": True} | vars(config.text) | fields


def save_original(folder: Path, model: Llava, tower: bool = False, files=(), **fields) -> Path:
    """Write a model as the original code does; `tower`: with the vision tower, as few are."""
    folder.mkdir()
    config = original_config(model.config, **fields)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {original_name(name, model.config.projector): tensor
               for name, tensor in model.state_dict().items()
               if tower or not name.startswith("vision_tower.")}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors")
    for file in files:
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def clip(model, tmp_path):
    """The folder of the small model's vision tower."""
    hf_format.save_folder(tmp_path / "clip", hf_config.clip_json(vars(model.config.vision)),
                          model.vision_tower.state_dict())
    return tmp_path / "clip"


@pytest.fixture
def original(config, tokenizer, clip, tmp_path):
    """A LLaVA-1.5 like those of liuhaotian, without its tower: that of `clip`."""
    config.projector = "mlp2x_gelu"
    torch.manual_seed(0)  # the vision tower of `model`
    return save_original(tmp_path / "original", Llava(config), files=[tokenizer.path])
