"""What one process can test; tests/infra/test_resume.py trains on several ranks."""

from datetime import timedelta

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
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                 "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(InputError, match="--device cuda:1: torchrun gives each process a GPU"):
        distributed.init_distributed("cuda:1")


@pytest.fixture
def torchrun(monkeypatch):
    """torchrun(local_ranks, gpus) -> what init_distributed gives to torch, on local rank 1."""

    def run(local_ranks: int, gpus: int, device: str) -> tuple:
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, str(local_ranks))
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, "1")
        calls = []
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", calls.append)
        monkeypatch.setattr(distributed.dist, "init_process_group",
                            lambda *args, **options: calls.append((*args, options)))
        monkeypatch.setattr(distributed.atexit, "register", lambda function: None)
        return distributed.init_distributed(device), calls

    return run


def test_objects_go_through_gloo_so_that_no_gpu_waits_for_rank_0(torchrun):
    device, (chosen, (backend, options)) = torchrun(2, gpus=2, device="cuda")
    assert device == chosen == "cuda:1" and options["device_id"] == torch.device("cuda:1")
    # torch takes the CPU's backend for objects, if there is one (_get_object_coll_device)
    assert set(backend.split(",")) == {"cpu:gloo", "cuda:nccl"}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_ranks_wait_for_rank_0_longer_than_it_writes_a_model_or_checks_images(torchrun, device):
    _, calls = torchrun(2, gpus=2, device=device)
    assert calls[-1][-1]["timeout"] > timedelta(hours=1)


def test_more_processes_than_gpus_are_one_message(torchrun):
    with pytest.raises(InputError, match="starts 8 processes .* 2: give --nproc-per-node 2"):
        torchrun(8, gpus=2, device="cuda")


def test_one_process_uses_the_named_gpu_alone(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert distributed.init_distributed("cuda:1") == "cuda:1" and chosen == ["cuda:1"]


def test_on_rank0_reports_errors_of_files_as_input_errors():
    def fail():
        raise OSError("disk full")

    with pytest.raises(InputError, match="disk full"):
        distributed.on_rank0(fail)
