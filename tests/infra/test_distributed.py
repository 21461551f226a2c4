"""What one process can test; tests/infra/test_resume.py trains on several ranks."""

import pytest
import torch

from nanollava.infra import distributed
from nanollava.infra.io import InputError


def test_trainable_weights_are_float32_and_frozen_ones_in_the_compute_dtype(model):
    model.requires_grad_(False)
    model.multi_modal_projector.requires_grad_(True)
    model.compute_dtype = torch.bfloat16
    blocks = model.language_model.model.layers
    outputs = []
    blocks[0].register_forward_hook(lambda block, inputs, output: outputs.append(output.dtype))
    distributed.shard_model(model, blocks, torch.bfloat16, "cpu")
    for name, weight in model.named_parameters():
        projector = name.startswith("multi_modal_projector")
        assert weight.dtype == (torch.float32 if projector else torch.bfloat16)
    tokens = torch.arange(5)[None]
    model(tokens, labels=tokens).backward()
    assert outputs == [torch.bfloat16]
    assert model.multi_modal_projector.linear_1.weight.grad.dtype == torch.float32


def test_one_process_is_rank_0_of_1_and_reduces_nothing():
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.init_distributed("cpu") == "cpu"
    assert distributed.all_gather_list([1, 2]) == [1, 2]
    assert distributed.all_reduce_sum(torch.tensor(3.0)) == 3
    assert distributed.full_tensor(torch.ones(2)).tolist() == [1, 1]


def test_world_size_without_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match="RANK.*start several processes with torchrun"):
        distributed.init_distributed("cpu")


def test_torchrun_chooses_the_gpu_of_each_process(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(InputError, match="--device cuda:1: torchrun gives each process a GPU"):
        distributed.init_distributed("cuda:1")


def test_on_rank0_reports_errors_of_files_as_input_errors():
    def fail():
        raise OSError("disk full")

    with pytest.raises(InputError, match="disk full"):
        distributed.on_rank0(fail)
