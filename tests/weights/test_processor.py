"""The files for other software: against transformers' tokens (tests/golden/make.py), and against
SentencePiece, by a small reader of tokenizer.json."""

import hashlib
import io
import json
import random
import re

import pytest
import sentencepiece

from nanollava import Llava, Tokenizer
from nanollava.conversation import TEMPLATES, tokenize_conversation
from nanollava.image import open_image, preprocess
from nanollava.llava import PROJECTORS, LinearProjector
from nanollava.weights import processor
from tests.conftest import ASSETS

GOLDEN = ASSETS.parent / "tests" / "golden"
VOCABULARIES = {"toy-llama": ASSETS / "toy-llama", "golden": GOLDEN / "bytes.model"}


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "processor.json").read_text())


def files_of(tokenizer, template="vicuna_v1"):
    config = {"template": template, "image_token_id": len(tokenizer) + 1,
              "image_aspect_ratio": "square",
              "vision": {"image_size": 28, "patch_size": 7},
              "text": {"max_position_embeddings": 2048}}
    return processor.llava_files(tokenizer, config)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_transformers_sees_the_same_tokens(golden, vocabulary, template):
    """The golden tokens are transformers', from files that must be the same as today's."""
    tokenizer = Tokenizer(VOCABULARIES[vocabulary])
    expected = golden[f"{vocabulary} {template}"]
    content = json.dumps(files_of(tokenizer, template)).encode()
    assert hashlib.sha256(content).hexdigest() == expected["files"], "run tests/golden/make.py"
    for texts, tokens in zip(golden["conversations"], expected["tokens"]):
        turns = [{"from": ("human", "gpt")[number % 2], "value": text}
                 for number, text in enumerate(texts)]
        ours, _ = tokenize_conversation(turns, tokenizer, template, 16, len(tokenizer) + 1)
        assert ours == tokens


def test_transformers_sees_the_same_pixels(golden):
    pixels = preprocess(open_image(GOLDEN / "images" / "flat.png"), 28).numpy()
    assert hashlib.sha256(pixels.astype("<f4").tobytes()).hexdigest() == golden["flat.png"]


def encode(content: dict, text: str) -> list[int]:
    """What a tokenizer.json says about a stretch of text without special tokens."""
    model, tokens = content["model"], []
    text = "▁" + text.replace(" ", "▁")
    split = content["pre_tokenizer"]
    words = re.split(f"({split['pattern']['Regex']})", text) if split else [text]
    ranks = {merge: rank for rank, merge in enumerate(model["merges"])}
    for word in filter(None, words):
        symbols = [word] if model["ignore_merges"] and word in model["vocab"] else list(word)
        while True:
            pairs = [" ".join(pair) for pair in zip(symbols, symbols[1:])]
            best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)), default=None)
            if best not in ranks:
                break
            place = pairs.index(best)
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
        for number, symbol in enumerate(symbols):
            if symbol in model["vocab"]:
                tokens.append(model["vocab"][symbol])
            elif model["byte_fallback"]:
                tokens += [model["vocab"][f"<0x{byte:02X}>"] for byte in symbol.encode()]
            elif number == 0 or symbols[number - 1] in model["vocab"]:  # fuse_unk
                tokens.append(model["vocab"][model["unk_token"]])
    return tokens


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_tokenizer_json_encodes_like_sentencepiece(vocabulary):
    tokenizer, rng = Tokenizer(VOCABULARIES[vocabulary]), random.Random(0)
    content = files_of(tokenizer)["tokenizer.json"]
    parts = [" ", "  ", "\n", "the", " at the top", " left", "(A)", "猫", "😀é", "-", "==", "▁", "'"]
    parts += [tokenizer.piece(token).replace("▁", " ") for token in range(3, len(tokenizer))]
    for _ in range(300):
        text = "".join(rng.choices(parts, k=rng.randint(1, 12)))
        assert encode(content, text) == tokenizer.encode(text), repr(text)


def test_saved_llava_has_all_files(model, tokenizer, tmp_path):
    model.config.template = "v0"
    model.save_pretrained(tmp_path, [tokenizer.path])
    assert processor.FILES <= {path.name for path in tmp_path.iterdir()}
    assert "###" in (tmp_path / "chat_template.jinja").read_text()
    added = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    assert added[-1]["content"] == "<image>" and added[-1]["id"] == model.config.image_token_id
    sizes = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert sizes["crop_size"] == {"height": 32, "width": 32}


def test_a_projector_of_ones_own_gets_no_files(config, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(PROJECTORS, "mine", type("Mine", (LinearProjector,), {}))
    config.projector = "mine"
    Llava(config).save_pretrained(tmp_path, [tokenizer.path])
    assert not processor.FILES & {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("template, end", (
    ("vicuna_v1", lambda tokenizer: tokenizer.eos_id),
    ("v0", lambda tokenizer: tokenizer.encode("###")[-1]),
    ("plain", lambda tokenizer: tokenizer.encode("\n")[-1:])))
def test_generation_ends_at_the_stop(tokenizer, template, end):
    assert processor.generation_config(tokenizer, template)["eos_token_id"] == end(tokenizer)


@pytest.mark.parametrize("options, reason", (
    ({"model_type": "unigram"}, "not a BPE model"),
    ({"normalization_rule_name": "nmt_nfkc"}, "normalizes text: nmt_nfkc"),
    ({"remove_extra_whitespaces": True}, "spaces in another way"),
    ({"add_dummy_prefix": False}, "spaces in another way"),
    ({"treat_whitespace_as_suffix": True}, "spaces as suffixes")))
def test_other_vocabularies_have_no_tokenizer_json(tmp_path, capsys, options, reason):
    content, texts = io.BytesIO(), ["a cat and a house", "the dog is red"] * 20
    defaults = {"model_type": "bpe", "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=content, vocab_size=30,
        hard_vocab_limit=False, minloglevel=2, **defaults | options)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content.getvalue())
    assert files_of(Tokenizer(path)).keys() == {"preprocessor_config.json", "processor_config.json"}
    assert reason in capsys.readouterr().err


def test_files_of_an_earlier_model_are_removed(tmp_path):
    processor.write_files(tmp_path, {"tokenizer.json": {}, "chat_template.jinja": "text"})
    processor.write_files(tmp_path, {"tokenizer.json": {}})
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_shipped_folders_hold_the_files_of_today(tokenizer):
    for name, content in processor.llama_files(tokenizer, 2048).items():
        text = (ASSETS / "toy-llama" / name).read_text()
        assert content == (text if isinstance(content, str) else json.loads(text))
