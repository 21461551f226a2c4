"""The tour: its steps are the model's, its words and attention are right, its page is whole."""

import base64
import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from nanollava import tour
from nanollava.chat import stream_reply
from nanollava.conversation import IGNORE_INDEX
from nanollava.image import preprocess
from nanollava.infra.io import InputError
from nanollava.llama import Attention, LlamaConfig, rope_cos_sin
from nanollava.tour import (
    attention_weights,
    format_patches,
    place_words,
    take_tour,
    write_page,
)

PROMPT = "What is there?"


@pytest.fixture
def image():
    return Image.effect_noise((48, 40), 80).convert("RGB")


@pytest.fixture
def taken(model, tokenizer, image):
    return take_tour(model, tokenizer, image, PROMPT, max_new_tokens=6)


def test_steps_have_the_shapes_of_the_model_and_name_code_that_exists(taken, model):
    T, A = len(taken.tokens), len(taken.likeliest)
    assert [step.shape for step in taken.steps] == [
        (1, 3, 32, 32), (1, 16, 4, 4), (1, 17, 16), (1, 17, 16), (1, 16, 16),
        (1, 16, 32), (1, T), (1, T, 32), (1, T, 32), (A, 32), (A, model.config.text.vocab_size)]
    assert taken.steps[4].meaning.startswith("after block 1 of 2")
    for step in taken.steps:
        file, name = step.code.split()
        code = importlib.import_module(f"nanollava.{file.removesuffix('.py')}")
        for part in name.split("."):
            code = getattr(code, part)


def test_answer_is_that_of_the_chat_and_its_tokens_are_learned(taken, model, tokenizer, image):
    turns = [{"from": "human", "value": f"<image>\n{PROMPT}"}]
    pixels = preprocess(image, model.config.image_size)
    assert taken.answer == "".join(stream_reply(model, tokenizer, turns, [pixels], 6))
    learned = [label for label in taken.labels if label != IGNORE_INDEX]
    assert tokenizer.decode(learned) == taken.answer.strip()
    assert len(taken.likeliest) == len(learned) == taken.attention.shape[1]


def test_likeliest_words_are_those_that_a_step_of_generation_chooses_from(taken, model, tokenizer):
    tokens = torch.tensor([taken.tokens])
    logits = model(tokens, taken.pixels)[0]  # (T, V)
    first = next(t for t, label in enumerate(taken.labels) if label != IGNORE_INDEX)
    values, indices = logits[first - 1].softmax(dim=-1).topk(5)
    words = [tour.token_text(tokenizer, int(index)) for index in indices]
    assert [word for word, _ in taken.likeliest[0]] == words
    torch.testing.assert_close(torch.tensor([p for _, p in taken.likeliest[0]]), values)


@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention_weights_are_those_of_the_forward_pass(key_heads):
    """With the values and the output projection they give what Attention.forward gives."""
    torch.manual_seed(0)
    attention = Attention(LlamaConfig(hidden_size=32, num_attention_heads=4,
                                      num_key_value_heads=key_heads))
    torch.nn.init.zeros_(attention.q_proj.weight[:8])  # all heads but the second attend evenly
    torch.nn.init.zeros_(attention.q_proj.weight[16:])
    x, rope = torch.randn(1, 7, 32), rope_cos_sin(torch.arange(7)[None], LlamaConfig(
        hidden_size=32, num_attention_heads=4))
    queries = torch.tensor([2, 6])
    even = torch.tensor([[float(key <= query) / (query + 1) for key in range(7)]
                         for query in queries.tolist()])
    second_head = 4 * attention_weights(attention, x, rope, queries) - 3 * even  # from the mean
    # only the second head reaches the output
    torch.nn.init.zeros_(attention.o_proj.weight)
    torch.nn.init.eye_(attention.o_proj.weight[:8, 8:16])
    key_head = 8 * (key_heads // 4)  # two heads share the first key head, if there are two
    values = attention.v_proj(x)[0, :, key_head : key_head + 8]
    expected = attention(x, rope)[0, queries, :8]
    torch.testing.assert_close(second_head @ values, expected)


def test_words_are_placed_by_the_block_that_looks_at_the_image_most():
    attention = torch.full((2, 4, 4), 0.1)  # 2 blocks, 3 words and the stop, 4 patches
    attention[0, :, 3] = 0.15
    for word, patch in enumerate((2, 0, 2, 1)):
        attention[1, word, patch] = 0.6
    block, places = place_words([" a", " red", " cat", "</s>"], attention)
    assert block == 1 and places == [[" red"], [], [" a", " cat"], []]


def test_grid_of_words_fits_the_terminal():
    words = [[] for _ in range(144)]  # 12 x 12 patches: a cell holds 2 x 2
    words[0], words[13], words[143] = [" a"], [" yel", "low"], [" house"]
    rows = format_patches(words).split("\n\n")
    assert len(rows) == 6
    assert rows[0].split() == ["a", "yellow", *"·····"]
    assert rows[5].split() == [*"·····", "house"]
    long = format_patches([[" word"] * 10, [], [], []]).splitlines()
    assert max(map(len, long)) <= 39 and " ".join(long).count("word") == 10


def data_of(page: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>") and text.endswith("</html>\n")
    assert not re.search(r"https?:|src=|@import", text)  # it loads nothing
    assert text.count("</script>") == 2
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_page_holds_the_tour_and_loads_nothing_else(taken, tokenizer, tmp_path):
    taken.prompt = taken.answer = "</script><b>&amp;{{data}}"
    words = [[("cat", 0.5)] * 5] * 16
    write_page(tmp_path / "tour.html", "a & b", taken, tokenizer, {"one": words})
    data = data_of(tmp_path / "tour.html")
    assert data["prompt"] == taken.prompt and data["side"] == 4
    assert len(data["views"]["one"]) == 16 and len(data["views"]["one"][0]) == 5
    kinds = [kind for _, kind in data["row"]]
    A = kinds.count("learned")
    assert kinds.count("image") == 16 and A == len(data["likeliest"])
    shades = base64.b64decode(data["attention"]["shades"])
    assert len(shades) == data["attention"]["blocks"] * A * 16 and max(shades) == 255
    assert data["attention"]["block"] == taken.block


@pytest.mark.parametrize("layer, steps", [(-1, 12), (-2, 11), (-3, 10)])
def test_each_feature_layer_has_its_steps(model, tokenizer, image, layer, steps):
    model.config.feature_layer = layer
    found = take_tour(model, tokenizer, image, PROMPT, 2).steps
    assert len(found) == steps
    assert sum(step.what.startswith("ViT block") for step in found) == steps - 10


def test_grid_that_is_not_square_is_refused(model, tokenizer, image, monkeypatch):
    monkeypatch.setattr(type(model.multi_modal_projector), "tokens_per_image", lambda vision: 10)
    with pytest.raises(InputError, match="10 tokens in this model: the tour shows only square"):
        take_tour(model, tokenizer, image, PROMPT)


@pytest.mark.parametrize("template", ["v0", "plain"])
def test_other_templates_and_an_empty_answer(model, tokenizer, image, template, monkeypatch):
    model.config.template = template
    assert take_tour(model, tokenizer, image, PROMPT, 3).likeliest
    monkeypatch.setattr(tour, "stream_reply", lambda *_: iter(()))
    taken = take_tour(model, tokenizer, image, PROMPT, 3)  # only the stop is left
    assert taken.answer == "" and len(taken.likeliest) == taken.attention.shape[1] > 0
