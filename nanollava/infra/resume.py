"""Checkpoints of a training run, from which `--resume` continues with equal bits.

    runs/stage2/resume/step-500/*.safetensors   trainable weights, optimizer state, random state
                               /run.json        the step, and the settings of the run

torch.distributed.checkpoint writes the tensors: each rank its own slices, which any number of
ranks can read. It builds a file in memory before it writes it, so there are many files, each with a
few tensors. A checkpoint is written under a hidden name and renamed when it is complete; then the
one before it is removed.
"""

import json
import os
import re
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)

from . import distributed
from .io import InputError
from .json_io import read_json, write_json
from .shapes import quote

FILE_BYTES = 2**30  # of the tensors in a file, the slices of all ranks together; or one tensor
NAME = re.compile(r"step-\d+|\.step-\d+\.part")  # of a checkpoint, complete or not
IO_ERRORS = (OSError, SafetensorError, CheckpointException)
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is normal


class Checkpoints:
    """The checkpoints of one run in `folder`.

    module: its trainable weights are saved. settings: JSON values that define the run; a checkpoint
    with other settings is refused.
    """

    def __init__(self, folder: Path, module: torch.nn.Module,
                 optimizers: list[torch.optim.Optimizer], settings: dict):
        self.folder, self.optimizers, self.settings = folder, optimizers, settings
        self.weights = {name: weight for name, weight in module.named_parameters()
                        if weight.requires_grad}

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor of the run by name."""
        tensors = {f"weights.{name}": weight.detach() for name, weight in self.weights.items()}
        for number, optimizer in enumerate(self.optimizers):
            for name, weight in self.weights.items():
                for key, value in optimizer.state.get(weight, {}).items():
                    tensors[f"optimizer.{number}.{key}.{name}"] = value
        return tensors | {"random": torch.get_rng_state()}

    def save(self, step: int) -> None:
        """Write the state after `step` steps. All ranks must call this.

        Raises InputError if it cannot be written; the checkpoint before it then stays.
        """
        path, temp = self.folder / f"step-{step}", self.folder / f".step-{step}.part"
        try:
            distributed.on_rank0(self.begin_save, temp)
            state = self.state()
            writer = HuggingFaceStorageWriter(str(temp), assign_files(state), save_distributed=True)
            dcp.save(state, storage_writer=writer)
            distributed.on_rank0(self.end_save, temp, path, step)
        except IO_ERRORS as error:
            if distributed.rank() == 0:
                self.remove(".step-*.part")  # do not leave a full disk full
            raise InputError(f"cannot write {path}: {error_reason(error)}") from error

    def begin_save(self, temp: Path) -> None:
        self.remove(".step-*.part")
        temp.mkdir(parents=True)

    def end_save(self, temp: Path, path: Path, step: int) -> None:
        write_json(temp / "run.json", {**self.settings, "step": step}, indent=2)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temp, path)
        self.remove("step-*", keep=path)

    def remove(self, pattern: str, keep: Path | None = None) -> None:
        """Remove the checkpoints that match, and nothing else that a user may have put here."""
        for path in self.folder.glob(pattern):
            if NAME.fullmatch(path.name) and path != keep:
                shutil.rmtree(path)

    def load(self) -> int:
        """Load the newest checkpoint and return its step; 0 if there is none.

        Raises InputError if it belongs to another run or is damaged.
        """
        paths = [path for path in self.folder.glob("step-*") if NAME.fullmatch(path.name)]
        if not paths:
            return 0
        path = max(paths, key=lambda path: int(path.name.removeprefix("step-")))
        step = self.check_settings(path)
        try:
            reader = HuggingFaceStorageReader(str(path))
            self.allocate_optimizer_state(reader, path)
            state = self.state()
            dcp.load(state, storage_reader=reader)  # fills the tensors of `state` in place
        except IO_ERRORS as error:
            raise InputError(f"cannot read {path}: {error_reason(error)}; if it is damaged, "
                             "remove it to begin again") from error
        torch.set_rng_state(state["random"])
        return step

    def check_settings(self, path: Path) -> int:
        """The step of a checkpoint. Raises InputError if its settings are not those of this run."""
        check_same_settings(path / "run.json", self.settings)
        saved = read_json(path / "run.json", {"step": int})
        if path.name != f"step-{saved['step']}":
            raise InputError(f"{path / 'run.json'} is damaged, it has step {quote(saved['step'])}: "
                             "choose another --out")
        return saved["step"]

    def allocate_optimizer_state(self, reader: HuggingFaceStorageReader, path: Path) -> None:
        """Give the optimizers, which have no state yet, tensors for what the checkpoint holds.

        Raises InputError if its weights have other names or shapes than ours.
        """
        sizes = {name: entry.size
                 for name, entry in reader.read_metadata().state_dict_metadata.items()}
        expected = {f"weights.{name}": weight.shape for name, weight in self.weights.items()}
        if expected != {name: size for name, size in sizes.items() if name.startswith("weights.")}:
            raise InputError(f"{path} is of another model: choose another --out")
        for full_name, size in sizes.items():
            if not full_name.startswith("optimizer."):
                continue
            _, number, key, name = full_name.split(".", 3)
            weight, optimizer = self.weights[name], self.optimizers[int(number)]
            if size == weight.shape:
                empty = torch.zeros_like(weight)  # sharded as the weight is
            else:  # AdamW's step count, on the CPU unless AdamW is fused
                device = weight.device if optimizer.defaults.get("fused") else "cpu"
                empty = torch.zeros(size, device=device)
            optimizer.state[weight][key] = empty

    def clear(self) -> None:
        """Remove the checkpoints of a finished run, whose model has been written."""
        if distributed.rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)


def assign_files(state: dict[str, torch.Tensor]) -> dict[str, int]:
    """The number, from 1, of the file in which each tensor is saved."""
    files, number, num_bytes = {}, 1, 0
    for name, tensor in state.items():
        if num_bytes and num_bytes + tensor.nbytes > FILE_BYTES:
            number, num_bytes = number + 1, 0
        files[name] = number
        num_bytes += tensor.nbytes
    return files


def check_same_settings(path: Path, settings: dict) -> None:
    """Raise InputError if the run.json at `path` belongs to a run with other settings."""
    saved = read_json(path, dict)
    for key, value in json.loads(json.dumps(settings)).items():
        if saved.get(key) != value:
            raise InputError(
                f"{path.parent} is of another run, with {key.replace('_', ' ')} "
                f"{quote(saved.get(key))}, not {quote(value)}: resume with the settings it had, "
                "or choose another --out")


def error_reason(error: BaseException) -> str:
    """In one line, what went wrong. A CheckpointException contains the error of each rank."""
    while isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return getattr(error, "strerror", None) or str(error)
