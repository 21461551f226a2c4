import pytest
import torch
import torch.nn.functional as F

from nanollava import layers
from nanollava.layers import LayerNorm, Linear, PatchEmbedding, RMSNorm, next_tokens, recomputed


@pytest.mark.parametrize("layer, shape", [
    (Linear(8, 6), (2, 8)), (Linear(8, 6, bias=False), (2, 8)), (LayerNorm(8), (2, 8)), (RMSNorm(8, 1e-6), (2, 8)),
    (PatchEmbedding(5, 4), (2, 3, 8, 8)),
])
def test_a_layer_computes_in_the_dtype_of_its_input(layer, shape):
    x = torch.randn(shape)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    layer.bfloat16()
    kept = layer(x)
    assert kept.dtype == torch.float32 and all(p.dtype == torch.bfloat16 for p in layer.parameters())
    assert torch.equal(kept, layer.float()(x))
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 4, 8), (3, 1, 8)])
def test_a_big_weight_is_converted_piece_by_piece(monkeypatch, shape, bias):
    layer, x = Linear(8, 100, bias=bias).bfloat16(), torch.randn(shape)
    whole = layer(x)
    monkeypatch.setattr(layers, "PIECE", 8 * 40)
    monkeypatch.setattr(layers, "MANY", 8 * 100)
    pieces = []
    monkeypatch.setattr(layers, "next_tokens" if shape[1] == 1 else "F", Listening(pieces))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), whole)
    assert pieces == [32, 32, 32, 4]  # whole slices, but for what is left
    monkeypatch.undo()
    layer(x).sum().backward()
    assert layer.weight.grad.shape == (100, 8)


@pytest.mark.parametrize("bias", [True, False])
def test_one_token_is_rounded_to_meet_a_bfloat16_weight(monkeypatch, bias):
    layer, x = Linear(8, 100, bias=bias).bfloat16(), torch.randn(1, 1, 8)
    monkeypatch.setattr(layers, "MANY", 8 * 100)
    with torch.no_grad():
        y = layer(x)
        assert y.dtype == torch.float32
        assert y.equal(F.linear(x.bfloat16(), layer.weight, layer.bias).float())
        two = layer(x.expand(2, -1, -1))  # they are not
        torch.testing.assert_close(two[:1], layer.float()(x))
        torch.testing.assert_close(y, two[:1], atol=0.02, rtol=0.02)


class Listening:
    """Multiplies, and writes down the rows of the weights."""

    def __init__(self, rows):
        self.rows = rows

    def __call__(self, x, weight, bias=None):
        self.rows.append(len(weight))
        return F.linear(x, weight, bias)

    linear = __call__


@pytest.mark.parametrize("batch, out, slices", [(1, 48, 16), (3, 32, 16), (2, 50, 2), (4, 33, 1)])
def test_next_tokens_are_multiplied_by_slices_of_the_weight(monkeypatch, batch, out, slices):
    x, weight, bias = torch.randn(batch, 1, 8), torch.randn(out, 8), torch.randn(out)
    seen, product = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda one, other: seen.append(one.shape) or product(one, other))
    for b in (None, bias):
        torch.testing.assert_close(next_tokens(x, weight, b), F.linear(x, weight, b))
    assert seen == [(slices, out // slices, 8)] * 2


def test_only_next_tokens_without_gradients_and_big_weights_are(monkeypatch):
    weight = torch.randn(8, 4)
    monkeypatch.setattr(layers, "MANY", 32)
    monkeypatch.setattr(layers, "next_tokens", lambda x, weight, bias: "in slices")
    with torch.no_grad():
        assert layers.linear(torch.randn(2, 1, 4), weight) == "in slices"
        for x, other in ((torch.randn(2, 1, 4), weight[1:]), (torch.randn(2, 2, 4), weight), (torch.randn(1, 4), weight),
                         (torch.randn(2, 1, 4).bfloat16(), weight.bfloat16())):
            assert torch.is_tensor(layers.linear(x, other))
    assert torch.is_tensor(layers.linear(torch.randn(2, 1, 4), weight))


def test_what_is_recomputed_keeps_its_inputs_alone_and_has_the_same_gradients():
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    times, kept = [], []

    def work(x):
        times.append(1)
        return (x.exp().sin() @ weight).tanh()

    wanted = torch.autograd.grad(work(x).sum(), (x, weight))
    times.clear()
    for one, other in zip(torch.autograd.grad(recomputed(work, x).sum(), (x, weight)), wanted):
        assert one.equal(other)
    assert len(times) == 2
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda nothing: None):
        recomputed(work, x)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]
    with torch.no_grad():
        assert recomputed(work, x).equal(work(x))
