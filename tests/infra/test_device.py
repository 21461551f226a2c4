import pytest
import torch

from nanollava.infra.device import pick_compute_dtype, best_device, best_dtype
from nanollava.infra.io import InputError


def test_a_device_that_is_not_there_is_told():
    assert best_device("cpu") == "cpu"
    with pytest.raises(InputError, match="--device cpu:1 is not there"):
        best_device("cpu:1")
    with pytest.raises(InputError, match="--device tpu is not there"):
        best_device("tpu")


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_is_for_where_it_is_fast_and_on_a_processor_computed_only_there(monkeypatch, fast):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: fast)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast)
    half, whole = torch.bfloat16, torch.float32
    assert best_dtype("cpu") == best_dtype("cuda:1") == (half if fast else whole)
    assert best_dtype("mps") == whole and best_dtype("cpu", "bfloat16") == best_dtype("cuda", "bfloat16") == half
    assert pick_compute_dtype(half, "cpu") == pick_compute_dtype(half, "cpu:0") == (half if fast else whole)
    assert pick_compute_dtype(half, "cuda") == pick_compute_dtype(half, "mps") == half and pick_compute_dtype(whole, "cpu") == whole
