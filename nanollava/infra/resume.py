"""What a training run leaves on the disk every so often, so that nothing is lost when it is stopped.

    runs/stage2/resume/step-500/*.safetensors   the weights that learn, the optimizers' state, the random state
                               /run.json        what run it was: one with other data or another rate is not mixed up

torch.distributed.checkpoint does the work: every process writes its own slices, and any number of processes reads
them again. A checkpoint gets its name once it is whole; then the one before it goes.
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
from .io import InputError, read_json, write_json


class Checkpoints:
    """The checkpoints of one run in `folder`. `module` holds the weights that learn; `run` says what run it is."""

    def __init__(self, folder: Path, module: torch.nn.Module, optimizers: list[torch.optim.Optimizer], run: dict):
        self.folder, self.optimizers, self.run = folder, optimizers, run
        self.parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor of the run by name."""
        tensors = {f"weights.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        for number, optimizer in enumerate(self.optimizers):
            for name, parameter in self.parameters.items():
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"optimizer.{number}.{key}.{name}"] = value
        return tensors | {"random": torch.get_rng_state()}

    def save(self, step: int) -> None:
        """Write the state after `step` steps; all processes must call this. Raises InputError if it cannot."""
        part, path = self.folder / f".step-{step}.part", self.folder / f"step-{step}"

        def begin() -> None:
            self.remove(".step-*.part")
            part.mkdir(parents=True)

        def end() -> None:
            write_json(part / "run.json", {**self.run, "step": step}, indent=2)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(part, path)
            self.remove("step-*", but=path)

        try:
            distributed.on_rank0(begin)
            with quiet():
                dcp.save(self.state(), storage_writer=HuggingFaceStorageWriter(str(part), save_distributed=True))
            distributed.on_rank0(end)
        except IO_ERRORS as error:
            if distributed.rank() == 0:
                self.remove(".step-*.part")  # a full disk is not left full
            raise InputError(f"cannot write {path}: {reason(error)}") from error

    def remove(self, pattern: str, but: Path | None = None) -> None:
        for path in self.folder.glob(pattern):
            if STEP.fullmatch(path.name) and path != but:
                shutil.rmtree(path)

    def load(self) -> int:
        """Put the newest state in its place and return its step, or 0 where there is none.

        Raises InputError if it is another run's, or broken.
        """
        paths = [path for path in self.folder.glob("step-*") if STEP.fullmatch(path.name)]
        path = max(paths, key=lambda path: int(path.name.removeprefix("step-")), default=None)
        if path is None:
            return 0
        run = read_json(path / "run.json")
        if not isinstance(run, dict):
            raise InputError(f"{path / 'run.json'} does not say what run it is of")
        for key, value in json.loads(json.dumps(self.run)).items():
            if run.get(key) != value:
                raise InputError(f"{path} is of another run, with {key.replace('_', ' ')} {run.get(key)}, not {value}: "
                                 "go on with what it had, or choose another --out")
        try:
            reader = HuggingFaceStorageReader(str(path))
            sizes = {name: entry.size for name, entry in reader.read_metadata().state_dict_metadata.items()}
            weights = {f"weights.{name}": parameter.shape for name, parameter in self.parameters.items()}
            if weights != {name: size for name, size in sizes.items() if name.startswith("weights.")}:
                raise InputError(f"{path} is of another model: choose another --out")
            for name, size in sizes.items():
                if name.startswith("optimizer."):
                    _, number, key, name = name.split(".", 3)
                    parameter, optimizer = self.parameters[name], self.optimizers[int(number)]
                    device = parameter.device if optimizer.defaults.get("fused") else "cpu"  # of AdamW's count of steps
                    empty = torch.zeros_like(parameter) if size == parameter.shape else torch.zeros(size, device=device)
                    optimizer.state[parameter][key] = empty.detach()
            state = self.state()
            with quiet():
                dcp.load(state, storage_reader=reader)
        except IO_ERRORS as error:
            raise InputError(f"cannot read {path}: {reason(error)}") from error
        torch.set_rng_state(state["random"])
        return run["step"]

    def clear(self) -> None:
        """The run is over and its model written: nothing is left to go on from."""
        if distributed.rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)


STEP = re.compile(r"step-\d+|\.step-\d+\.part")
IO_ERRORS = (OSError, SafetensorError, CheckpointException)


def reason(error: BaseException) -> str:
    """In one line what went wrong; a CheckpointException holds a process's own exception with its traceback."""
    while isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return getattr(error, "strerror", None) or str(error)


class quiet(warnings.catch_warnings):
    """Without torch's remark that there is but one process."""

    def __enter__(self):
        super().__enter__()
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
