import pytest
import torch

from nanollava.infra.device import best_device, best_dtype, pick_compute_dtype, to_device
from nanollava.infra.io import InputError

BF16, FP32 = torch.bfloat16, torch.float32


def test_missing_device_is_named():
    assert best_device("cpu") == best_device("cpu:0") == "cpu"
    for name in ("cpu:1", "tpu", "", "cpu:", "cpu:x", "cpu:-1", "cpu:\u0660", ":0"):
        with pytest.raises(InputError, match=f"--device {name} does not exist here"):
            best_device(name)


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_is_the_default_only_where_it_is_fast(monkeypatch, fast):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: fast)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast)
    assert best_dtype("cpu") == best_dtype("cuda:1") == (BF16 if fast else FP32)
    assert best_dtype("mps") == FP32
    assert best_dtype("cpu", "bfloat16") == best_dtype("cuda", "bfloat16") == BF16


@pytest.mark.parametrize("fast", [True, False])
def test_cpu_computes_in_bfloat16_only_where_it_is_fast(monkeypatch, fast):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: fast)
    for device in ("cpu", "cpu:0"):
        assert pick_compute_dtype(BF16, device) == (BF16 if fast else FP32)
        assert pick_compute_dtype(FP32, device) == FP32
    for device in ("cuda", "mps"):
        assert pick_compute_dtype(BF16, device) == BF16


class FakeTensor:
    """Records how it is copied."""

    def __init__(self, pinned):
        self.pinned = pinned

    def is_pinned(self):
        return self.pinned

    def to(self, device, non_blocking):
        return non_blocking


@pytest.mark.parametrize("device, pinned, non_blocking", [
    ("cuda", True, True), ("cuda", False, False), ("mps", True, False), ("cpu", True, False)])
def test_copies_overlap_only_from_pinned_memory_to_cuda(device, pinned, non_blocking):
    assert to_device(FakeTensor(pinned), torch.device(device)) is non_blocking
