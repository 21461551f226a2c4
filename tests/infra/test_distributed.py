"""What one process can show; tests/test_resume.py trains over several."""

import torch

from nanollava.infra import distributed


def test_what_learns_is_kept_in_float32_what_is_frozen_in_the_dtype_of_the_arithmetic(model):
    model.requires_grad_(False)
    model.multi_modal_projector.requires_grad_(True)
    seen = []
    model.language_model.model.layers[0].register_forward_hook(lambda block, given, x: seen.append(x.dtype))
    distributed.shard_model(model.set_compute_dtype(torch.bfloat16), model.language_model.model.layers, torch.bfloat16, "cpu")
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert all((dtype == torch.float32) == name.startswith("multi_modal") for name, dtype in dtypes.items())
    model(torch.arange(5)[None], labels=torch.arange(5)[None]).backward()
    assert seen == [torch.bfloat16]
    assert model.multi_modal_projector.linear_1.weight.grad.dtype == torch.float32


def test_one_process_is_the_first_of_one_and_has_everything():
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.init_distributed("cpu") == "cpu" and distributed.all_gather_list([1, 2]) == [1, 2]
    assert distributed.all_reduce_sum(torch.tensor(3.0)) == 3
