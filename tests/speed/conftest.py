"""A LLaVA so small that the benchmark takes a second."""

import pytest

from nanollava.llama import LlamaConfig
from nanollava.llava import Llava, LlavaConfig
from nanollava.speed import __main__ as command
from nanollava.speed import limits, llama_cpp, race, sides
from nanollava.vision import VisionConfig

TINY = LlavaConfig(
    VisionConfig(image_size=32, patch_size=8, hidden_size=16, intermediate_size=32,
                 num_hidden_layers=2, num_attention_heads=2),
    LlamaConfig(vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                num_attention_heads=2),
    image_token_id=99)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, value in dict(CONFIG=TINY, TOKENS=30, TARGETS=10, NEW_TOKENS=4).items():
        for module in (command, limits, llama_cpp, race, sides):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    Llava(TINY).save_pretrained(tmp_path)
    return tmp_path
