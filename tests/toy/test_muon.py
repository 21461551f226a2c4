import torch

from nanollava.toy.muon import Muon, muon, orthogonal


def test_orthogonal_keeps_the_directions_and_evens_out_the_strengths():
    u, _, v = torch.linalg.svd(torch.randn(6, 4), full_matrices=False)
    matrix = u @ torch.diag(torch.tensor([10.0, 5.0, 1.0, 0.5])) @ v
    strengths = torch.diagonal(u.T @ orthogonal(matrix[None])[0] @ v.T)
    assert ((strengths > 0.6) & (strengths < 1.3)).all()


def test_muon_takes_the_steps_of_torchs_own():
    torch.manual_seed(0)
    starts = [torch.randn(shape) for shape in ((8, 8), (8, 8), (24, 6), (6, 24))]
    ours, theirs = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    optimizers = Muon(ours, 0.1), torch.optim.Muon(theirs, 0.1, weight_decay=0.0)
    for _ in range(3):
        for one, other in zip(ours, theirs):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for start, one, other in zip(starts, ours, theirs):
        assert (one - other).norm() < 0.02 * (one - start).norm()  # torch multiplies in bfloat16


def test_a_convolution_is_a_matrix_to_muon():
    flat = torch.nn.Parameter(torch.ones(4, 12))
    kernel = torch.nn.Parameter(torch.ones(4, 3, 2, 2))
    flat.grad = torch.randn(4, 12)
    kernel.grad = flat.grad.view(4, 3, 2, 2)
    Muon([flat], 0.1).step()
    Muon([kernel], 0.1).step()
    assert torch.equal(kernel.flatten(1), flat)


def test_muon_takes_the_matrices_of_blocks_and_leaves_the_rest_to_adamw(model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_muon, by_adamw = ({names[id(p)] for p in optimizer.param_groups[0]["params"]} for optimizer in muon(model, 3e-3))
    assert "language_model.model.layers.0.mlp.up_proj.weight" in by_muon
    assert "vision_tower.embeddings.patch_embedding.weight" in by_muon
    assert {"language_model.model.embed_tokens.weight", "language_model.model.layers.0.input_layernorm.weight",
            "language_model.lm_head.weight", "multi_modal_projector.linear_1.weight"} <= by_adamw
    assert by_muon | by_adamw == set(names.values())
