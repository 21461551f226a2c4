"""Tensors in safetensors files: reading memory-mapped, loading strictly, writing in shards.

A folder holds model.safetensors, or model-00001-of-00003.safetensors and so on with an index.
"""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..infra.io import InputError, atomic_write, check_regular_file, path_inside
from ..infra.json_io import read_json, write_json
from .hf_config import without_weights

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000


def read_tensors(folder: str | Path, rename=lambda name: name) -> dict[str, torch.Tensor]:
    """All tensors of a folder under new names; those that `rename` turns into None are skipped.

    The files are memory-mapped, so a tensor takes no memory before it is used.
    Raises InputError if a file is missing or broken.
    """
    tensors = {}
    for path in shard_paths(Path(folder)):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    if rename(name) is not None:
                        tensors[rename(name)] = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is not a complete safetensors file: {error}") from error
    return tensors


def shard_paths(folder: Path) -> list[Path]:
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        reason = without_weights(folder.glob("*"))
        message = f"{folder} has neither {SINGLE} nor {INDEX}"
        raise InputError(f"{message}: {reason}" if reason else message)
    files = set(read_json(index, {"weight_map": {str: str}})["weight_map"].values())
    paths = sorted(Path(path_inside(folder, file)) for file in files)
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path} is missing, though {INDEX} names it")
    return paths


def load_strict(module: torch.nn.Module, tensors: dict[str, torch.Tensor], folder: str | Path,
                dtype: torch.dtype | None, device: torch.device | str) -> None:
    """Replace the parameters of a module, which may be on the meta device, by tensors.

    Raises InputError if names or shapes differ, or a tensor holds no weights; `folder` is for this
    message. Only vectors are searched for NaN and infinity: the rest stays on disk until its use.
    """
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    problems = [f"{name} is missing" for name in shapes.keys() - tensors.keys()]
    problems += [f"{name} is unexpected" for name in tensors.keys() - shapes.keys()]
    problems += [f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(shapes[name])}"
                 for name in shapes.keys() & tensors.keys() if tensors[name].shape != shapes[name]]
    problems += [f"{name} is {str(tensor.dtype)[6:]}, not float16, bfloat16 or float32"
                 for name, tensor in tensors.items()
                 if not tensor.is_floating_point() or tensor.itemsize < 2]
    problems += [f"{name} is not finite" for name, tensor in tensors.items()
                 if tensor.ndim == 1 and tensor.itemsize >= 2 and not tensor.isfinite().all()]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        problems = "; ".join(sorted(problems)[:5])
        raise InputError(f"the weights in {folder} do not fit its config.json: {problems}{more}")
    state = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    module.load_state_dict(state, assign=True)


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write one file or, above MAX_SHARD_BYTES, several and their index; remove stale ones.

    Raises InputError if a file cannot be written.
    """
    shards = split_into_shards(tensors)
    for file, names in shards.items():
        write_shard(folder / file, {name: tensors[name] for name in names})
    for stale in {*folder.glob("model*.safetensors")} - {folder / file for file in shards}:
        stale.unlink()
    if len(shards) == 1:
        (folder / INDEX).unlink(missing_ok=True)
    else:
        size = sum(tensor.nbytes for tensor in tensors.values())
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(folder / INDEX, index, indent=2)


def split_into_shards(tensors: dict[str, torch.Tensor]) -> dict[str, list[str]]:
    """{file: names of its tensors, at most MAX_SHARD_BYTES together}, in order."""
    shards, size = [[]], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": names
            for number, names in enumerate(shards, 1)}


def write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with atomic_write(path) as temp:
        try:
            save_file(tensors, temp, metadata={"format": "pt"})
        except SafetensorError as error:  # its error for a full disk
            raise OSError(str(error)) from error


def fingerprint(folder: str | Path) -> str:
    """A hash of samples of the weights: cheap, and enough to notice that they were replaced."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        check_regular_file(path)
        size = path.stat().st_size
        with open(path, "rb") as file:
            for block in range(64):  # 4 KiB each, evenly spread, the last bytes included
                file.seek(max(0, size - 4096) * block // 63)
                digest.update(file.read(4096))
    return digest.hexdigest()[:12]
