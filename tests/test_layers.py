import pytest
import torch

from nanollava.layers import LayerNorm, Linear, PatchEmbedding, RMSNorm


@pytest.mark.parametrize("layer, shape", [
    (Linear(8, 6), (2, 8)), (Linear(8, 6, bias=False), (2, 8)), (LayerNorm(8), (2, 8)),
    (RMSNorm(8, 1e-6), (2, 8)), (PatchEmbedding(5, 4), (2, 3, 8, 8)),
])
def test_layer_computes_in_the_dtype_of_its_input(layer, shape):
    x = torch.randn(shape)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    layer.bfloat16()
    y = layer(x)
    assert y.dtype == torch.float32
    assert all(parameter.dtype == torch.bfloat16 for parameter in layer.parameters())
    assert torch.equal(y, layer.float()(x))
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_rms_norm_divides_by_the_root_mean_square():
    norm = RMSNorm(4, eps=0.0)
    x = torch.tensor([2.0, -2.0, 2.0, -2.0])
    torch.testing.assert_close(norm(x), x / 2)
