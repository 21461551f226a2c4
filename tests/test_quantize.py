"""int8 weights: what they cost in accuracy, and what they leave alone."""

import os

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from nanollava.chat import open_llava, stream_reply
from nanollava.infra import cpu
from nanollava.layers import Linear
from nanollava.quantize import Int8Linear, quantize_int8


def test_largest_number_of_a_row_becomes_127_and_errors_are_half_a_step():
    weight = torch.randn(200, 64) * torch.logspace(-6, 2, 200)[:, None]  # rows of all sizes
    weight[7] = 0
    linear = nn.Linear(64, 200, bias=False)
    linear.weight = nn.Parameter(weight)
    layer = Int8Linear(linear)
    assert layer.weight.dtype == torch.int8 and layer.scale.shape == (200,)
    assert layer.scale.dtype == layer.double().scale.dtype == torch.bfloat16
    largest = layer.weight.int().abs().amax(dim=1)
    assert largest[7] == 0 and largest.sort().values[1] >= 126  # a scale may be rounded up
    steps = (layer.weight - weight / layer.scale.float()[:, None]).abs()
    assert steps.max() < 0.75  # a scale may be rounded down, and the largest number cut off
    assert (steps < 0.501).float().mean() > 0.98


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 64), (5, 1, 64), (2, 3, 64), (7, 64)])
def test_product_equals_that_of_the_rounded_weight(shape, dtype):
    layer, x = Int8Linear(Linear(64, 100, bias=False)), torch.randn(shape).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (*shape[:-1], 100)
    expected = F.linear(x.float(), layer.weight * layer.scale.float()[:, None])
    is_rounded = dtype == torch.bfloat16 or shape[1] == 1
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=0.02 if is_rounded else 1e-5)


def test_prompts_in_float32_are_not_rounded_and_cast_chunk_by_chunk(monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK_NUMEL", 64 * 32)
    layer, x = Int8Linear(Linear(64, 100, bias=False)), torch.randn(2, 3, 64)
    chunks, copy = [], torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_",
                        lambda to, chunk: chunks.append(len(chunk)) or copy(to, chunk))
    layer(x)
    assert chunks == [32, 32, 32, 4]


def test_next_token_does_not_depend_on_its_batch():
    layer, x = Int8Linear(Linear(64, 100, bias=False)), torch.randn(5, 1, 64)
    assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x]))


def test_kernel_takes_the_scales_themselves(monkeypatch):
    """torch.compile (2.13) fails if they are cast on the way to the kernel."""
    layer = Int8Linear(Linear(64, 100, bias=False)).float()
    scales, kernel = [], torch._weight_int8pack_mm
    monkeypatch.setattr(torch, "_weight_int8pack_mm",
                        lambda x, w, scale: scales.append(scale) or kernel(x, w, scale))
    layer(torch.randn(1, 1, 64))
    assert scales[0] is layer.scale


def test_row_length_that_the_kernel_cannot_read(monkeypatch):
    """torch's kernel reads 16 numbers at a time, beyond the end of a row of 24."""
    monkeypatch.setattr(torch, "_weight_int8pack_mm", None)
    layer, x = Int8Linear(Linear(24, 100, bias=False)), torch.randn(1, 1, 24)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight * layer.scale.float()[:, None]))


def test_other_devices_multiply_by_the_weight_in_the_dtype_of_x():
    layer = Int8Linear(Linear(64, 100, bias=False)).to("meta", torch.float16)
    y = layer(torch.empty(2, 3, 64, dtype=torch.float16, device="meta"))
    assert y.shape == (2, 3, 100) and y.dtype == torch.float16
    assert layer.weight.dtype == torch.int8


def test_blocks_of_the_language_model_are_quantized_and_nothing_else(model):
    exact = {name: weight.clone() for name, weight in model.state_dict().items()}
    quantize_int8(model.language_model)
    for name, weight in model.state_dict().items():
        in_blocks = name.startswith("language_model.model.layers") and "proj" in name
        assert (weight.dtype == torch.int8) == (in_blocks and name.endswith("weight"))
        assert in_blocks or torch.equal(weight, exact[name])


def test_logits_stay_close(model):
    tokens = torch.randint(0, 100, (2, 9))
    with torch.no_grad():
        exact = model(tokens)
        quantize_int8(model.language_model)
        error = model(tokens) - exact
    assert 0 < error.std() < 0.02 * exact.std()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantized_model_replies(model, tokenizer, tmp_path, dtype):
    model.save_pretrained(tmp_path, [tokenizer.path])
    opened, _ = open_llava(tmp_path, dtype, "cpu", quantize="int8")
    dtypes = {str(weight.dtype)[6:] for weight in opened.state_dict().values()}
    assert dtypes == {dtype, "int8", "bfloat16"}  # the scales are bfloat16
    turns = [{"from": "human", "value": "<image>\nWhat is there?"}]
    assert "".join(stream_reply(opened, tokenizer, turns, [torch.randn(3, 32, 32)], 12))


def test_other_weights_stay_on_disk_where_memory_is_short(model, tokenizer, tmp_path, monkeypatch,
                                                          capsys):
    model.save_pretrained(tmp_path, [tokenizer.path], torch.bfloat16)
    blocks = sum(weight.numel() for name, weight in model.named_parameters()
                 if name.startswith("language_model.model.layers") and "proj" in name)
    others = sum(weight.numel() for weight in model.parameters()) - blocks
    enough = blocks + 4 * (others + 1000)  # bytes; 1000 scales at most
    for memory, dtype in ((2 * enough, torch.float32), (blocks + 4 * others, torch.bfloat16)):
        monkeypatch.setattr(os, "sysconf", lambda name: memory ** 0.5)
        opened, _ = open_llava(tmp_path, "float32", "cpu", quantize="int8")
        assert opened.language_model.lm_head.weight.dtype == dtype
        assert opened.language_model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    assert "its other weights stay on disk" in capsys.readouterr().err
