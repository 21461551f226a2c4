import errno
import json
import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanollava import Llava
from nanollava.infra.io import InputError
from nanollava.weights import safetensors_io


def test_large_model_is_written_in_shards_with_an_index(folder, model, monkeypatch):
    monkeypatch.setattr(safetensors_io, "MAX_SHARD_BYTES", 30_000)
    model.save_pretrained(folder)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    content = {shard: load_file(folder / shard) for shard in shards}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard for shard in shards for name in content[shard]}
    sizes = [sum(tensor.nbytes for tensor in content[shard].values()) for shard in shards]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert all(size <= 30_000 or len(content[shard]) == 1 for shard, size in zip(shards, sizes))
    again = Llava.from_pretrained(folder).state_dict()
    assert all(again[name].equal(tensor) for name, tensor in model.state_dict().items())


def test_stale_shards_are_removed(folder, model, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(safetensors_io, "MAX_SHARD_BYTES", 30_000)
        model.save_pretrained(folder)
    model.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_file_keeps_its_dtype_and_is_cast_when_it_is_loaded(model, tmp_path, dtype):
    model.to(dtype).save_pretrained(tmp_path / "run")
    written = load_file(tmp_path / "run" / "model.safetensors")
    assert written["language_model.lm_head.weight"].dtype == dtype
    for name, tensor in Llava.from_pretrained(tmp_path / "run").state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].float())


@pytest.mark.parametrize("change, message", [
    (lambda tensors: {k: t for k, t in tensors.items() if "lm_head" not in k},
     "lm_head.weight is missing"),
    (lambda tensors: tensors | {"extra": torch.zeros(1)}, "extra is unexpected"),
    (lambda tensors: tensors | {"language_model.model.norm.weight": torch.zeros(5)},
     r"norm.weight has shape \(5,\), not \(32,\)"),
    (lambda tensors: {k: t.to(torch.int32) for k, t in tensors.items()},
     "embed_tokens.weight is int32, not float16, bfloat16 or float32"),
    (lambda tensors: {k: t / 0 if k.endswith("norm.weight") else t for k, t in tensors.items()},
     "layernorm.weight is not finite"),
])
def test_tensor_that_does_not_fit_is_named(folder, change_tensors, change, message):
    change_tensors(change)
    with pytest.raises(InputError, match=f"do not fit its config.json: .*{message}"):
        Llava.from_pretrained(folder)


def test_other_safetensors_in_the_folder_are_ignored(folder, model):
    save_file({"language_model.lm_head.weight": torch.zeros(3)},
              folder / "adapter_model.safetensors")
    weight = Llava.from_pretrained(folder).language_model.lm_head.weight
    assert torch.equal(weight, model.language_model.lm_head.weight)


def test_broken_or_missing_file_is_named(folder, model, monkeypatch):
    monkeypatch.setattr(safetensors_io, "MAX_SHARD_BYTES", 30_000)
    model.save_pretrained(folder)
    last = sorted(folder.glob("*.safetensors"))[-1]
    index, content = folder / "model.safetensors.index.json", last.read_bytes()
    for broken in (content[:-100], content[:5], b"<html>" + content):
        last.write_bytes(broken)
        with pytest.raises(InputError, match=f"{last.name} is not a complete safetensors file"):
            Llava.from_pretrained(folder)
    last.unlink()
    with pytest.raises(InputError, match=f"{last.name} is missing, though .*index.json names it"):
        Llava.from_pretrained(folder)
    for nonsense in ("[]", "{}", '{"weight_map": {"a": 1}}'):
        index.write_text(nonsense)
        with pytest.raises(InputError, match="index.json: .*(must be|has no 'weight_map')"):
            Llava.from_pretrained(folder)
    for outside in ("../model.safetensors", str(folder.parent / "model.safetensors")):
        index.write_text(json.dumps({"weight_map": {"a": outside}}))
        with pytest.raises(InputError, match=f"'{outside}' is outside of {folder}"):
            Llava.from_pretrained(folder)
    index.unlink()
    with pytest.raises(InputError, match="neither model.safetensors nor model.safetensors.index"):
        Llava.from_pretrained(folder)


def test_full_disk_is_an_input_error(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise SafetensorError(f"No space left on device (os error {errno.ENOSPC})")

    monkeypatch.setattr(safetensors_io, "save_file", fail)
    with pytest.raises(InputError, match="cannot write .*model.safetensors: No space left"):
        safetensors_io.write_tensors(tmp_path, {"a": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []


def test_file_has_the_permissions_of_any_new_file(tmp_path):
    """safetensors itself creates files that only their owner can read."""
    (tmp_path / "other").touch()
    safetensors_io.write_tensors(tmp_path, {"a": torch.zeros(1)})
    mode = (tmp_path / "model.safetensors").stat().st_mode
    assert mode == (tmp_path / "other").stat().st_mode


def test_fifo_among_the_weights_is_refused(folder):
    os.mkfifo(folder / "model-2.safetensors")
    with pytest.raises(InputError, match="model-2.safetensors is not a file"):
        safetensors_io.fingerprint(folder)


def test_fingerprint_depends_on_content_alone(folder, model, tmp_path):
    model.save_pretrained(tmp_path / "copy")
    original = safetensors_io.fingerprint(folder)
    assert original == safetensors_io.fingerprint(tmp_path / "copy")
    with torch.no_grad():
        model.language_model.lm_head.weight.add_(1)
    model.save_pretrained(folder)
    assert original != safetensors_io.fingerprint(folder)
