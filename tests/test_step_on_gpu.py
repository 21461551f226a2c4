"""What a GPU would see of a training step: on a pretended one, because these tests run anywhere."""

import copy

import pytest
import torch
from torch.nn import Parameter

from nanollava.data import Conversations, collate, load_batches
from nanollava.image import constants
from nanollava.training import forward_backward, freeze, mean_loss
from tests.gpu import GpuTensor, PretendedGpu

GPU = torch.device("meta")
CPU = torch.device("cpu")


class Gpu(PretendedGpu):
    """Also notes the shape of each tensor that is copied to the GPU."""

    def __init__(self):
        super().__init__()
        self.uploads = []

    def copy(self, func, args, kwargs):
        out = super().copy(func, args, kwargs)
        source = args[0] if out is not args[0] else args[1]
        if isinstance(out, GpuTensor) and not isinstance(source, GpuTensor):
            self.uploads.append(source.shape)
        return out


@pytest.fixture
def batches(model, tokenizer, world):
    """Two micro-batches; the second is without images."""
    dataset = Conversations([(world / "instruct.json", world / "images")], tokenizer, model.config)
    text = [([1, 5, 6, 7], [-100, -100, 6, 7], [])]
    return [collate(rows, model.config.image_token_id)
            for rows in ([dataset[number] for number in range(4)], text)]


@pytest.fixture
def gpu():
    with Gpu() as gpu, torch.autograd.set_multithreading_enabled(False):
        constants(GPU)  # are copied once in a run
        gpu.uploads.clear()
        yield gpu


def move(model) -> None:
    """`model.to(the GPU)`, trainable weights too."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = Parameter(GpuTensor(weight.detach()),
                                                     weight.requires_grad)


def test_step_on_a_gpu_waits_for_nothing_and_has_the_gradients_of_the_cpu(model, batches, gpu):
    freeze(model, 2)
    twin = copy.deepcopy(model)
    expected, _ = forward_backward(twin, batches, CPU)
    move(model)
    loss, _ = forward_backward(model, batches, GPU)
    assert gpu.syncs == []
    torch.testing.assert_close(loss.raw, expected)
    for weight, other in zip(model.parameters(), twin.parameters()):
        if other.grad is not None:
            torch.testing.assert_close(weight.grad.raw, other.grad)


def test_only_batches_are_copied_to_the_gpu_and_fully_shard_has_nothing_to_copy(
        model, batches, gpu):
    """A DataLoader pins these tensors. Any other would be copied while the CPU waits."""
    def like_fully_shard(module, args, kwargs):
        inputs = [*args, *kwargs.values()]
        assert all(x.device == GPU for x in inputs if isinstance(x, torch.Tensor))

    freeze(model, 2)
    move(model)
    model.register_forward_pre_hook(like_fully_shard, with_kwargs=True)
    forward_backward(model, batches, GPU)
    assert gpu.uploads == [tensor.shape for batch in batches for tensor in batch
                           if tensor is not None]


def test_validation_waits_for_the_gpu_once(model, batches, gpu, monkeypatch):
    monkeypatch.setattr(GpuTensor, "tolist", lambda tensor: tensor.cpu().tolist())
    expected = mean_loss(copy.deepcopy(model), [batches], CPU)
    move(model)
    assert mean_loss(model, [batches, batches], GPU) == pytest.approx(expected)
    assert len(gpu.syncs) == 1


@pytest.mark.parametrize("device, pinned", [("cuda:1", True), ("mps", False), ("cpu", False)])
def test_batches_are_pinned_only_for_cuda(monkeypatch, device, pinned):
    """Where there is a CUDA GPU that is not used, pinning would take up its memory."""
    options = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("nanollava.data.DataLoader",
                        lambda *_, **given: options.update(given) or iter("a"))

    class Dataset:
        class config:
            image_token_id = 9

    assert list(load_batches(Dataset, [[0]], device=device)) == [["a"]]
    assert options["pin_memory"] is pinned


def test_pretended_gpu_is_waited_for_to_count_what_a_mask_selects():
    with PretendedGpu() as gpu:
        x = torch.arange(4, device="meta")
        assert len(x[x > 1]) == 2 and len(x[x]) == 4
    assert len(gpu.syncs) == 1
