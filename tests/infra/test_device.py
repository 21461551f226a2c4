import pytest
import torch

from nanollava.infra import device
from nanollava.infra.device import best_device, best_dtype, pick_compute_dtype, to_device
from nanollava.infra.io import InputError

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def test_missing_device_is_named():
    assert best_device("cpu") == best_device("cpu:0") == "cpu"
    for name in ("cpu:1", "tpu", "", "cpu:", "cpu:x", "cpu:-1", "cpu:\u0660", ":0"):
        with pytest.raises(InputError, match=f"--device {name} does not exist here"):
            best_device(name)


def test_cudnn_does_not_plan_attention_for_each_shape():
    torch.backends.cuda.enable_cudnn_sdp(True)  # torch's default
    best_device("cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(amx=True), machine(capability=(7, 5)): what the CPU and the GPUs can do."""

    def pretend(amx=False, avx512_bf16=False, maker="GenuineIntel", capability=None):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {maker}\n")
        monkeypatch.setattr(device, "CPU_INFO", tmp_path / "cpuinfo")
        monkeypatch.setattr(torch.cuda, "get_device_capability",
                            {"cuda:1": capability, "cuda": capability}.__getitem__)

    return pretend


@pytest.mark.parametrize("capability, generating, training", [
    ((9, 0), BF16, BF16), ((8, 0), BF16, BF16),  # H100, A100
    ((7, 5), FP16, FP32), ((7, 0), FP16, FP32),  # T4, V100: no units for bfloat16
    ((6, 1), FP32, FP32),  # GTX 1080: float16 is slower than float32
])
def test_default_dtype_is_the_fastest_that_the_gpu_has(machine, capability, generating, training):
    machine(capability=capability)
    assert best_dtype("cuda:1", generating=True) == generating
    assert best_dtype("cuda:1") == training
    assert best_dtype("cuda", "bfloat16") == BF16
    assert pick_compute_dtype(generating, "cuda") == generating


@pytest.mark.parametrize("cpu, dtype", [
    (dict(amx=True, avx512_bf16=True), BF16),  # a Xeon since Sapphire Rapids
    (dict(avx512_bf16=True), FP32),  # Cooper Lake
    (dict(avx512_bf16=True, maker="AuthenticAMD"), BF16),  # since Zen 4
    (dict(maker="AuthenticAMD"), FP32),  # Zen 3
    (dict(), FP32)])
def test_cpu_computes_in_bfloat16_only_where_it_is_fast(machine, cpu, dtype):
    machine(**cpu)
    for name in ("cpu", "cpu:0"):
        assert best_dtype(name) == best_dtype(name, generating=True) == dtype
        assert pick_compute_dtype(BF16, name) == dtype
        assert pick_compute_dtype(FP32, name) == pick_compute_dtype(FP16, name) == FP32
    assert best_dtype("cpu", "bfloat16") == BF16


def test_apple_gpus_compute_in_float32_unless_asked():
    assert best_dtype("mps") == best_dtype("mps", generating=True) == FP32
    assert pick_compute_dtype(FP16, "mps") == FP16


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
