"""What the tests share: the shipped vocabulary, a random LLaVA of a few thousand weights, a little toy world."""

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


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer(ASSETS / "toy-llama")


@pytest.fixture
def config(tokenizer):
    """16 patches a picture, 2 ViT blocks, 2 LLaMA blocks with 4 heads that share 2 heads of keys and values."""
    vision = VisionConfig(image_size=32, patch_size=8, hidden_size=16, intermediate_size=32,
                          num_hidden_layers=2, num_attention_heads=2)
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2)
    return LlavaConfig(vision, text, image_token_id=len(tokenizer))


@pytest.fixture
def model(config):
    torch.manual_seed(0)
    return Llava(config)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toy"
    write_world(folder, seed=0, count=60, tests=10)
    return folder


@pytest.fixture
def server(monkeypatch):
    server = Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()
