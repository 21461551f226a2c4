"""Fixtures of all tests: the shipped vocabulary, a tiny LLaVA with random weights, a toy world."""

import signal
import threading
from pathlib import Path

import pytest
import torch

from nanollava import Llava, Tokenizer
from nanollava.llama import LlamaConfig
from nanollava.llava import LlavaConfig
from nanollava.toy.dataset import write_world
from nanollava.vision import VisionConfig
from tests.teacher.chat_server import Server

ASSETS = Path(__file__).parent.parent / "assets"

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
