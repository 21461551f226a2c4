import pytest
import torch
import torch.nn.functional as F

from nanollava import layers
from nanollava.layers import LayerNorm, Linear, PatchEmbedding, RMSNorm, few_rows


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
def test_a_big_weight_is_converted_piece_by_piece(monkeypatch, bias):
    layer, x = Linear(8, 50, bias=bias).bfloat16(), torch.randn(3, 4, 8)
    whole = layer(x)
    monkeypatch.setattr(layers, "PIECE", 64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), whole)
    layer(x).sum().backward()
    assert layer.weight.grad.shape == (50, 8)


@pytest.mark.parametrize("shape, out", [((1, 1, 8), 48), ((1, 8), 50), ((3, 2, 8), 32), ((4, 8), 33)])
def test_few_rows_are_multiplied_in_slices_of_the_weight(monkeypatch, shape, out):
    x, weight = torch.randn(shape), torch.randn(out, 8)
    bias = torch.randn(out)
    torch.testing.assert_close(few_rows(x, weight), F.linear(x, weight))
    torch.testing.assert_close(few_rows(x, weight, bias), F.linear(x, weight, bias))
    monkeypatch.setattr(layers, "MANY", 8 * out)
    monkeypatch.setattr(layers, "few_rows", lambda x, weight, bias: "in slices")
    with torch.no_grad():
        assert layers.linear(x, weight) == "in slices"
        assert torch.is_tensor(layers.linear(x, weight[1:]))  # a small weight
        assert torch.is_tensor(layers.linear(torch.randn(layers.FEW + 1, 8), weight))
    assert torch.is_tensor(layers.linear(x, weight))  # gradients may be wanted
