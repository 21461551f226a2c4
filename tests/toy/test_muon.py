import torch

from nanollava.toy.muon import Muon, muon, orthogonalize


def test_orthogonalize_keeps_singular_vectors_and_brings_values_near_1():
    u, _, v = torch.linalg.svd(torch.randn(6, 4), full_matrices=False)
    matrix = u @ torch.diag(torch.tensor([10.0, 5.0, 1.0, 0.5])) @ v
    values = u.T @ orthogonalize(matrix[None])[0] @ v.T
    assert ((values.diagonal() > 0.6) & (values.diagonal() < 1.3)).all()
    torch.testing.assert_close(values, torch.diag(values.diagonal()), atol=1e-4, rtol=0)


def test_steps_are_those_of_torchs_muon():
    torch.manual_seed(0)
    starts = [torch.randn(shape) for shape in ((8, 8), (8, 8), (24, 6), (6, 24))]
    ours, theirs = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    optimizers = Muon(ours, 0.1), torch.optim.Muon(theirs, 0.1, weight_decay=0.0)
    for _ in range(3):
        for our, their in zip(ours, theirs):
            our.grad = torch.randn(our.shape)
            their.grad = our.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for start, our, their in zip(starts, ours, theirs):
        assert (our - their).norm() < 0.02 * (our - start).norm()  # torch computes in bfloat16


def test_convolution_is_updated_as_the_matrix_of_its_kernels():
    matrix = torch.nn.Parameter(torch.ones(4, 12))
    kernel = torch.nn.Parameter(torch.ones(4, 3, 2, 2))
    matrix.grad = torch.randn(4, 12)
    kernel.grad = matrix.grad.view(4, 3, 2, 2)
    Muon([matrix], 0.1).step()
    Muon([kernel], 0.1).step()
    assert torch.equal(kernel.flatten(1), matrix)


def test_muon_gets_block_matrices_and_adamw_the_other_weights(model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_muon, by_adamw = ({names[id(weight)] for weight in optimizer.param_groups[0]["params"]}
                         for optimizer in muon(model, 3e-3))
    assert "language_model.model.layers.0.mlp.up_proj.weight" in by_muon
    assert "vision_tower.embeddings.patch_embedding.weight" in by_muon
    assert by_adamw >= {
        "language_model.model.embed_tokens.weight", "language_model.lm_head.weight",
        "language_model.model.layers.0.input_layernorm.weight",
        "multi_modal_projector.linear_1.weight"}
    assert by_muon | by_adamw == set(names.values())
