import torch

from nanollava.muon import Muon, muon, orthogonal


def test_orthogonal_keeps_the_directions_and_evens_out_the_strengths():
    u, _, v = torch.linalg.svd(torch.randn(6, 4), full_matrices=False)
    matrix = u @ torch.diag(torch.tensor([10.0, 5.0, 1.0, 0.5])) @ v
    strengths = torch.diagonal(u.T @ orthogonal(matrix) @ v.T)
    assert ((strengths > 0.6) & (strengths < 1.3)).all()


def test_muon_goes_downhill():
    weight, target = torch.nn.Parameter(torch.randn(3, 3)), torch.eye(3)
    optimizer = Muon([weight], 0.1)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
        optimizer.zero_grad()
        loss = (weight - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.01


def test_muon_takes_the_matrices_of_blocks_and_leaves_the_rest_to_adamw(model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_muon, by_adamw = ({names[id(p)] for p in optimizer.param_groups[0]["params"]} for optimizer in muon(model, 3e-3))
    assert "language_model.model.layers.0.mlp.up_proj.weight" in by_muon
    assert "vision_tower.embeddings.patch_embedding.weight" in by_muon
    assert {"language_model.model.embed_tokens.weight", "language_model.model.layers.0.input_layernorm.weight",
            "language_model.lm_head.weight", "multi_modal_projector.linear_1.weight"} <= by_adamw
    assert by_muon | by_adamw == set(names.values())
