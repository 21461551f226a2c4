"""model.gguf and mmproj.gguf, computed here as llama.cpp computes them: written from its
src/models/llama.cpp, src/llama-vocab.cpp and tools/mtmd/models/llava.cpp."""

import hashlib
import io
import json
import math
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import sentencepiece
import torch

from nanollava import Llava, Tokenizer
from nanollava.conversation import tokenize_conversation
from nanollava.infra.io import InputError
from nanollava.llava import PROJECTORS, LinearProjector
from nanollava.weights.gguf import write_llava
from tests.conftest import ASSETS
from tests.weights.gguf_reader import read_gguf

GOLDEN = ASSETS.parent / "tests" / "golden"
BYTES = GOLDEN / "bytes.model"  # a vocabulary with bytes
VOCABULARIES = {"toy": ASSETS / "toy-llama", "bytes": BYTES}


@pytest.fixture
def write(tmp_path):
    """write(model, tokenizer) -> ((fields, tensors) of model.gguf, those of mmproj.gguf)."""
    def run(model, tokenizer, dtype="float32", class_token="first"):
        folder = tmp_path / "gguf"
        write_llava(folder, asdict(model.config), model.state_dict(), tokenizer, dtype, class_token,
                    "a name")
        return read_gguf(folder / "model.gguf"), read_gguf(folder / "mmproj.gguf")

    return run


def random_llava(config):
    """A LLaVA whose norms and biases are random too."""
    torch.manual_seed(0)
    model = Llava(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return model


def largest_difference(found, expected):
    """Relative to the largest number that is expected."""
    return abs(found - expected).max() / abs(expected).max()


# ---------------------------------------------------------------------------------------------
# llama.cpp's computation


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def rotate_neighbors(x, theta):
    """(T, heads, d): pairs of neighbors, by their position."""
    T, _, d = x.shape
    angles = np.arange(T)[:, None] * theta ** (-np.arange(0, d, 2) / d)
    turns = np.exp(1j * angles)[:, None] * (x[..., ::2] + 1j * x[..., 1::2])
    return np.stack([turns.real, turns.imag], -1).reshape(x.shape)


def llama_logits(fields, tensors, tokens):
    get, T = (lambda key: fields[f"llama.{key}"]), len(tokens)
    heads, kv_heads = get("attention.head_count"), get("attention.head_count_kv")
    eps, theta = get("attention.layer_norm_rms_epsilon"), get("rope.freq_base")

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * tensors[f"{name}.weight"]

    x = tensors["token_embd.weight"][tokens]
    for block in range(get("block_count")):
        def linear(x, name):
            return x @ tensors[f"blk.{block}.{name}.weight"].T

        h = norm(x, f"blk.{block}.attn_norm")
        q = rotate_neighbors(linear(h, "attn_q").reshape(T, heads, -1), theta)
        k = rotate_neighbors(linear(h, "attn_k").reshape(T, kv_heads, -1), theta)
        v = linear(h, "attn_v").reshape(T, kv_heads, -1)
        k, v = (part.repeat(heads // kv_heads, axis=1) for part in (k, v))
        scores = np.einsum("thd,shd->hts", q, k) / math.sqrt(get("attention.key_length"))
        scores = softmax(np.where(np.tri(T), scores, -np.inf))
        x = x + linear(np.einsum("hts,shd->thd", scores, v).reshape(T, -1), "attn_output")
        h = norm(x, f"blk.{block}.ffn_norm")
        gate = linear(h, "ffn_gate")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, "ffn_up"), "ffn_down")
    return norm(x, "output_norm") @ tensors.get("output.weight", tensors["token_embd.weight"]).T


def gelu(x):
    """ggml's: the approximation by tanh."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def image_features(fields, tensors, pixels, class_token):
    """(P, D) of an image (3, H, W). Of the tokens, the first is always dropped."""
    get = lambda key: fields[f"clip.vision.{key}"]
    size, heads, eps = (get("patch_size"), get("attention.head_count"),
                        get("attention.layer_norm_epsilon"))
    rows = pixels.shape[1] // size

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def linear(x, name):
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    patches = pixels.reshape(3, rows, size, rows, size).transpose(1, 3, 0, 2, 4)
    kernel = tensors["v.patch_embd.weight"]
    patches = patches.reshape(rows * rows, -1) @ kernel.reshape(len(kernel), -1).T
    order = [tensors["v.class_embd"][None], patches]
    x = np.concatenate(order if class_token == "first" else order[::-1])
    x = norm(x + tensors["v.position_embd.weight"], "v.pre_ln")
    T, feature_layer = len(x), get("feature_layer")[0]
    for block in range(feature_layer):
        name = f"v.blk.{block}."
        h = norm(x, name + "ln1")
        q, k, v = (linear(h, f"{name}attn_{part}").reshape(T, heads, -1) for part in "qkv")
        scores = softmax(np.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[-1]))
        x = x + linear(np.einsum("hts,shd->thd", scores, v).reshape(T, -1), name + "attn_out")
        up, down = "ffn_up", "ffn_down"
        if tensors[name + "ffn_down.weight"].shape[1] == x.shape[1]:
            up, down = down, up  # clip.cpp: names of an old converter
        h = linear(norm(x, name + "ln2"), name + up)
        x = x + linear(h / (1 + np.exp(-1.702 * h)), name + down)
    return linear(gelu(linear(x[1:], "mm.0")), "mm.2")


@pytest.mark.parametrize("changes", (
    {}, {"num_key_value_heads": 1}, {"num_key_value_heads": None, "head_dim": 6},
    {"tie_word_embeddings": True, "rope_theta": 500000, "rms_norm_eps": 1e-5}), ids=str)
def test_language_model_computes_the_same(config, tokenizer, write, changes):
    config.text = replace(config.text, **changes)
    model = random_llava(config)
    (fields, tensors), _ = write(model, tokenizer)
    tokens = [1, 7, 50, 447, 3, 3, 99]
    expected = model(torch.tensor([tokens]))[0].detach().numpy()
    logits = llama_logits(fields, tensors, tokens)[:, : len(tokenizer)]
    assert largest_difference(logits, expected) < 1e-4


@pytest.mark.parametrize("projector, error", (("linear", 1e-4), ("mlp2x_gelu", 2e-3)))
@pytest.mark.parametrize("feature_layer", (-1, -2, -3))
@pytest.mark.parametrize("intermediate_size", (16, 32))  # 16: hidden_size, where clip.cpp swaps too
def test_image_features_are_the_same(
        config, tokenizer, write, projector, error, feature_layer, intermediate_size):
    config.projector, config.feature_layer = projector, feature_layer
    config.vision.intermediate_size = intermediate_size
    model = random_llava(config)
    _, (fields, tensors) = write(model, tokenizer)
    pixels = torch.randn(1, 3, 32, 32)
    expected = model.encode_images(pixels)[0].detach().numpy()
    features = image_features(fields, tensors, pixels[0].numpy(), "first")
    assert largest_difference(features, expected) < error
    assert not any(f"blk.{3 + feature_layer}." in name for name in tensors)


def test_last_class_token_leaves_each_patch_its_position(model, tokenizer, write):
    """llama.cpp then drops the first patch, and takes the class token for one."""
    _, (fields, tensors) = write(model, tokenizer, class_token="last")
    pixels = torch.randn(1, 3, 32, 32)
    expected = model.encode_images(pixels)[0].detach().numpy()
    features = image_features(fields, tensors, pixels[0].numpy(), "last")
    assert largest_difference(features[:-1], expected[1:]) < 1e-4


@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "q8_0"))
def test_other_types_compute_nearly_the_same(model, tokenizer, write, dtype):
    (fields, tensors), (vision_fields, vision) = write(model, tokenizer, dtype)
    tokens, pixels = [1, 7, 50, 447], torch.randn(1, 3, 32, 32)
    expected = model(torch.tensor([tokens]))[0].detach().numpy()
    logits = llama_logits(fields, tensors, tokens)[:, : len(tokenizer)]
    assert largest_difference(logits, expected) < 0.02
    expected = model.encode_images(pixels)[0].detach().numpy()
    features = image_features(vision_fields, vision, pixels[0].numpy(), "first")
    assert largest_difference(features, expected) < 0.02
    assert np.isin(vision["mm.2.weight"], (-1, 0, 1)).all()  # the identity is exact
    positions = model.vision_tower.embeddings.position_embedding.weight.detach().numpy()
    assert (vision["v.position_embd.weight"] == positions).all()


def test_rows_follow_the_vocabulary(model, tokenizer, write):
    """The toy vocabulary has no bytes and gets some, with the embedding of <unk>."""
    (fields, tensors), _ = write(model, tokenizer)
    assert fields["llama.vocab_size"] == len(tokenizer) + 256
    for name in ("token_embd.weight", "output.weight"):
        assert len(tensors[name]) == len(tokenizer) + 256
        assert (tensors[name][len(tokenizer):] == tensors[name][0]).all()


def test_rows_past_the_vocabulary_are_dropped(model, write):
    tokenizer = Tokenizer(BYTES)
    (_, tensors), _ = write(model, tokenizer)
    assert len(tensors["token_embd.weight"]) == len(tokenizer) < model.config.text.vocab_size


# ---------------------------------------------------------------------------------------------
# llama.cpp's text


def split_user_defined(fields, text):
    """A text as (text, token) stretches, of which one is None."""
    stretches, words = [(text, None)], fields["tokenizer.ggml.tokens"]
    special = [token for token, kind in enumerate(fields["tokenizer.ggml.token_type"])
               if kind in (2, 3, 4)]  # unknown, control, user-defined
    for token in sorted(special, key=lambda token: -len(words[token].encode())):
        split = []
        for stretch, found in stretches:
            parts = stretch.split(words[token]) if found is None else []
            for number, part in enumerate(parts):
                split += [("", token)] if number else []
                split += [(part, None)] if part else []
            split += [] if found is None else [(stretch, found)]
        stretches = split
    return stretches


def llama_tokenize(fields, text):
    tokens, is_special = [], True
    ids = {word: token for token, word in enumerate(fields["tokenizer.ggml.tokens"])}
    for stretch, token in split_user_defined(fields, text):
        if token is None:
            space = " " if fields["tokenizer.ggml.add_space_prefix"] and is_special else ""
            tokens += merge((space + stretch).replace(" ", "▁"), ids, fields)
        else:
            tokens.append(token)
        is_special = token is not None
    return tokens


def merge(text, ids, fields):
    symbols, scores = list(text), fields["tokenizer.ggml.scores"]
    while True:
        pairs = [ids.get(left + right) for left, right in zip(symbols, symbols[1:])]
        known = [place for place, token in enumerate(pairs) if token is not None]
        if not known:
            break
        place = max(known, key=lambda place: (scores[pairs[place]], -place))
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    return [token for symbol in symbols for token in (
        [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()])]


@pytest.mark.parametrize("template", ("vicuna_v1", "v0"))
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("program", ("llama-server", "llama-mtmd-cli", "llama-cpp-python"))
def test_conversations_have_the_same_tokens(model, write, template, vocabulary, program):
    """The golden texts are Jinja's, from a chat template that must be the same as today's."""
    golden = json.loads((GOLDEN / "chats.json").read_text())
    expected = golden[f"{vocabulary} {template}"]
    tokenizer, model.config.template = Tokenizer(VOCABULARIES[vocabulary]), template
    (fields, _), _ = write(model, tokenizer)
    chat_template = fields["tokenizer.chat_template"]
    assert "\\u" not in chat_template  # llama.cpp's Jinja refuses it
    digest = hashlib.sha256(chat_template.encode()).hexdigest()
    assert digest == expected["template"], "run tests/golden/make.py chats"
    for texts, text in zip(golden["conversations"], expected[program], strict=True):
        turns = [{"from": ("human", "gpt")[number % 2], "value": text}
                 for number, text in enumerate(texts)]
        ours, _ = tokenize_conversation(turns, tokenizer, template, 2, 999)
        tokens = [tokenizer.bos_id]
        for number, stretch in enumerate(re.split("<__media.*?__>", text)):
            tokens += [999, 999] if number else []
            tokens += llama_tokenize(fields, stretch)
        assert tokens == ours, text


@pytest.mark.parametrize("template, stop", (("vicuna_v1", None), ("v0", "###")))
def test_reply_ends_at_the_stop(model, tokenizer, write, template, stop):
    model.config.template = template
    (fields, _), _ = write(model, tokenizer)
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_id
    end = tokenizer.encode(stop)[-1] if stop else None
    assert fields.get("tokenizer.ggml.eot_token_id") == end


# ---------------------------------------------------------------------------------------------
# What cannot be written


def test_other_vocabularies_are_refused(model, write, tmp_path):
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat and a house"] * 9), model_writer=content, vocab_size=30,
        hard_vocab_limit=False, minloglevel=2, model_type="unigram")
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content.getvalue())
    with pytest.raises(InputError, match="tokenizer.model cannot be .* it is not a BPE model$"):
        write(model, Tokenizer(path))


def test_template_without_text_after_the_image_is_refused(model, tokenizer, write):
    model.config.template = "plain"
    with pytest.raises(InputError, match="'plain' cannot be written"):
        write(model, tokenizer)


def test_projector_of_ones_own_is_refused(config, tokenizer, write, monkeypatch):
    monkeypatch.setitem(PROJECTORS, "mine", type("Mine", (LinearProjector,), {}))
    config.projector = "mine"
    with pytest.raises(InputError, match="'mine' cannot be .* only linear and mlp2x_gelu$"):
        write(Llava(config), tokenizer)


def test_files_appear_both_or_not_at_all(model, tokenizer, write, tmp_path):
    torch.nn.init.constant_(model.multi_modal_projector.linear_1.weight, 1e6)
    with pytest.raises(InputError, match="mm.0.weight has weights that are too large for float16"):
        write(model, tokenizer, "float16")
    assert list(tmp_path.iterdir()) == []
    write(model, tokenizer)
    with pytest.raises(InputError, match="gguf exists already; remove it or choose another --out"):
        write(model, tokenizer)
