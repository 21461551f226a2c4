import pytest
import torch
import torch.nn.functional as F

from nanollava.infra import cpu
from nanollava.layers import Linear, linear


@pytest.fixture(autouse=True)
def every_weight_is_big(monkeypatch):
    monkeypatch.setattr(cpu, "MIN_NUMEL", 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 4, 8), (3, 1, 8), (5, 8)])
def test_weight_of_another_dtype_is_cast_chunk_by_chunk(monkeypatch, shape, bias):
    layer, x = Linear(8, 100, bias=bias).half(), torch.randn(shape)
    expected = F.linear(x, layer.weight.float(), layer.bias.float() if bias else None)
    monkeypatch.setattr(cpu, "CHUNK_NUMEL", 8 * 40)
    chunks, places, copy = [], [], torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, chunk: (
        chunks.append(len(chunk)), places.append(to.data_ptr()), copy(to, chunk))[-1])
    with torch.no_grad():
        y = layer(x)
    monkeypatch.undo()
    torch.testing.assert_close(y, expected)
    assert chunks == [32, 32, 32, 4]  # whole slices, and the rest
    assert len(set(places)) == 1  # in one buffer


@pytest.mark.parametrize("batch_size, out, slices",
                         [(1, 48, 16), (3, 32, 16), (2, 50, 2), (4, 33, 1)])
def test_next_tokens_are_multiplied_by_slices_of_the_weight(monkeypatch, batch_size, out, slices):
    x, weight = torch.randn(batch_size, 1, 8), torch.randn(out, 8)
    shapes, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: shapes.append(a.shape) or bmm(a, b))
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    assert shapes == [(slices, out // slices, 8)]


@pytest.mark.parametrize("shape", [(2, 2, 4), (1, 4)])
def test_prompts_are_not_sliced(monkeypatch, shape):
    monkeypatch.setattr(cpu, "decode_linear", None)
    with torch.no_grad():
        linear(torch.randn(shape), torch.randn(8, 4))


def test_small_weights_and_gradients_take_the_plain_path(monkeypatch):
    monkeypatch.setattr(cpu, "decode_linear", None)
    x, weight = torch.randn(2, 1, 4), torch.randn(8, 4, requires_grad=True)
    linear(x, weight).sum().backward()
    assert weight.grad.shape == (8, 4)
    monkeypatch.setattr(cpu, "MIN_NUMEL", 33)
    with torch.no_grad():
        linear(x, weight)


@pytest.mark.parametrize("bias", [True, False])
def test_next_token_is_rounded_to_a_bfloat16_weight_alone_and_in_a_batch(bias):
    layer, x = Linear(64, 100, bias=bias).bfloat16(), torch.randn(5, 1, 64)
    with torch.no_grad():
        batch = layer(x)
        single = torch.cat([layer(row[None]) for row in x])
        exact = linear(x, layer.weight, layer.bias)
    assert batch.dtype == torch.float32
    torch.testing.assert_close(batch, single, atol=1e-2, rtol=1e-2)
    assert (batch == single).float().mean() > 0.99  # sums in another order may round differently
    torch.testing.assert_close(batch, exact, atol=0.05, rtol=0.05)
    assert not torch.equal(batch, exact)


def test_prompts_and_scores_are_not_rounded():
    layer = Linear(8, 100, bias=False).bfloat16()
    prompt, token = torch.randn(1, 3, 8), torch.randn(1, 1, 8)
    with torch.no_grad():
        torch.testing.assert_close(layer(prompt), F.linear(prompt, layer.weight.float()))
        scores = linear(token, layer.weight)
        torch.testing.assert_close(scores, F.linear(token, layer.weight.float()))
