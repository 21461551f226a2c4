"""LLaVA JSON files to batches: rows of {"image": file, "conversations": turns}.

All rows are checked before the first step (data_checks.py). A row is read and tokenized, and its
images are opened, when a batch needs it. Whatever needs no GPU happens here, ahead of the step: an
image stays at 8 bits a value until it is on the GPU, and the positions in a batch are found.
"""

import atexit
import hashlib
import math
import multiprocessing
import os
import random
import signal
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from .conversation import IGNORE_INDEX, tokenize_conversation
from .data_checks import check_row, check_sources, format_errors, row_name
from .image import normalize, open_image
from .infra import distributed
from .infra.device import to_device
from .infra.io import InputError, file_version, hash_file, path_inside
from .infra.json_io import read_json_item
from .llava import find_image_tokens, find_targets

PAD_ROW = -1  # the index of a row without targets, which fills up a batch


class Conversations(torch.utils.data.Dataset):
    """The rows of LLaVA JSON files.

    Only the place of each row in its file stays in memory, about 15 MB for 150,000 rows.

    sources: pairs of a JSON file and the folder of its images.
    max_length: tokens of a row, at most what the model reads; the rest is cut off.
    skip_bad: leave out rows that cannot be trained on.
    Raises InputError, naming file and row, if there are such rows: without an answer, without one
    that begins within max_length, with an image beyond it, with a wrong number of `<image>`, or
    with an image that does not open.
    """

    def __init__(self, sources, tokenizer, config, max_length: int = 2048, skip_bad: bool = False):
        self.sources, self.tokenizer, self.config = sources, tokenizer, config
        self.max_length = max_length
        self.versions = [file_version(path) for path, _ in sources]  # a file must not change
        places, lengths, errors = check_sources(sources, self.tokenize, config, max_length)
        if len(errors) == len(places) or (errors and not skip_bad):
            raise InputError(format_errors(errors, len(places)))
        good = [row for row in range(len(places)) if row not in errors]
        self.places = np.array(places)[good]  # (rows, 4): source, row number, first byte, end
        lengths = np.array(lengths)[good]
        self.lengths = np.minimum(lengths, max_length)  # (rows,), estimated, see row_length
        self.skipped = len(errors)  # rows that are left out
        self.truncated = int((lengths > max_length).sum())  # rows that are cut off at the end

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int):
        """(tokens, labels, images): two lists of T <= max_length, a list of uint8 (3, H, W)."""
        if index == PAD_ROW:
            return [self.tokenizer.bos_id], [IGNORE_INDEX], []
        # 1. read the row from its file
        source, _, start, end = self.places[index]
        path, folder = self.sources[source]
        turns, files = check_row(read_json_item(path, start, end, self.versions[source]))
        # 2. each `<image>` becomes tokens_per_image image tokens
        tokens, labels = self.tokenize(turns)
        # 3. pixels, one image for each `<image>`
        images = [self.config.resize_and_crop(open_image(path_inside(folder, file)))
                  for file in files]
        return tokens[: self.max_length], labels[: self.max_length], images

    def tokenize(self, turns: list[dict]) -> tuple[list[int], list[int]]:
        config = self.config
        return tokenize_conversation(turns, self.tokenizer, config.template,
                                     config.tokens_per_image, config.image_token_id)

    def name(self, index: int) -> str:
        """What a message calls a row: file, row number and id."""
        return row_name(self.sources, self.places[index])


def hash_sources(sources) -> str:
    """A hash of JSON files and the names of their image folders: a run resumes on the same data."""
    digest = hashlib.sha256()
    for path, images in sources:
        digest.update(os.fsencode(Path(images).name))
        hash_file(digest, path)
    return digest.hexdigest()[:12]


class Batch(NamedTuple):
    """B rows of T tokens with N images of P tokens each: the arguments of `Llava.forward`."""

    tokens: torch.Tensor  # (B, T) int64
    labels: torch.Tensor  # (B, T) int64
    images: torch.Tensor | None  # (N, 3, H, W), uint8 on the CPU; None without images
    # Positions among the B * T tokens. The CPU finds them: their number is the shape of what
    # follows, and to read it from a GPU the CPU would have to wait.
    image_positions: torch.Tensor  # (N * P,), of the image tokens
    target_positions: torch.Tensor  # (n,), of the tokens to predict

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on the device of the model, with normalized pixels.

        Without this, fully_shard would copy each tensor itself, and wait for the GPU each time.
        """
        device = torch.device(device)
        batch = Batch(*(None if tensor is None else to_device(tensor, device) for tensor in self))
        images = None if batch.images is None else normalize(batch.images)
        return batch._replace(images=images)


def collate(samples, image_token_id: int) -> Batch:
    """Rows of a Conversations to a batch."""
    tokens, labels = pad_right([(tokens, labels) for tokens, labels, _ in samples])
    images = [image for _, _, row_images in samples for image in row_images]  # in reading order
    return Batch(tokens, labels, torch.stack(images) if images else None,
                 find_image_tokens(tokens, image_token_id), find_targets(labels))


def pad_right(rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of (tokens, labels), lists of different lengths, to tokens (B, T) and labels (B, T).

    The padding needs no mask: attention is causal, so no token sees what comes after it, and the
    label of padding is IGNORE_INDEX.
    """
    length = max(len(tokens) for tokens, _ in rows)  # T
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORE_INDEX)
    for row, (row_tokens, row_labels) in enumerate(rows):
        tokens[row, : len(row_tokens)] = torch.tensor(row_tokens)
        labels[row, : len(row_labels)] = torch.tensor(row_labels)
    return tokens, labels


def length_grouped_batches(lengths, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """The rows of each of `steps` batches. Rows of a batch have similar lengths: little padding.

    An epoch has each row once, in random order. Rows that do not fill the last batch are left out,
    different ones in each epoch. A data set smaller than a batch fills it by repetition.
    """
    batches, epoch = [], 0
    while len(batches) < steps:
        rng = random.Random(f"{seed} {epoch}")
        rows = list(range(len(lengths))) * math.ceil(batch_size / len(lengths))
        rng.shuffle(rows)
        rows = rows[: len(rows) // batch_size * batch_size]
        # sort by length, but only within groups of 50 batches: batches differ in each epoch
        group_size = 50 * batch_size
        groups = [rows[start : start + group_size] for start in range(0, len(rows), group_size)]
        rows = [row for group in groups for row in sorted(group, key=lengths.__getitem__)]
        epoch_batches = [rows[start : start + batch_size]
                         for start in range(0, len(rows), batch_size)]
        rng.shuffle(epoch_batches)  # or each group would go from short to long
        batches += epoch_batches
        epoch += 1
    return batches[:steps]


def eval_batches(lengths, batch_size: int) -> list[list[int]]:
    """The rows of each batch for one pass over all rows, from the shortest to the longest.

    PAD_ROWs make the number of rows divisible by the number of ranks, so that all ranks have
    equally many: 5 rows in batches of 4 on 4 ranks are
    [[3, 1, 4, 0], [2, PAD_ROW, PAD_ROW, PAD_ROW]].
    """
    rows = sorted(range(len(lengths)), key=lengths.__getitem__)
    rows += [PAD_ROW] * (-len(rows) % distributed.world_size())
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def load_batches(dataset: Conversations, batches: list[list[int]],
                 micro_batch_size: int | None = None, workers: int = 0, device: str = "cpu"):
    """Yield this rank's share of each batch as a list of micro-batches (`Batch`).

    micro_batch_size: rows of a micro-batch; None means the share in one.
    workers: processes that read rows ahead of training; 0 means this one, without reading ahead.
    device: where the model is. For CUDA, batches are in pinned memory: they are copied while the
        GPU computes.
    """
    # A batch is sorted by length. Rank r takes rows r, r + world_size, ...: all ranks get similar
    # lengths, and none waits long for another.
    shares = [rows[distributed.rank() :: distributed.world_size()] for rows in batches]
    size = micro_batch_size or max(map(len, shares), default=1)
    micro_batches = [[rows[start : start + size] for start in range(0, len(rows), size)]
                     for rows in shares]
    loader = iter(DataLoader(
        dataset, batch_sampler=[rows for batch in micro_batches for rows in batch],
        collate_fn=partial(collate, image_token_id=dataset.config.image_token_id),
        num_workers=workers, worker_init_fn=ignore_interrupts,
        pin_memory=device.startswith("cuda")))
    try:
        for batch in micro_batches:
            yield [next(loader) for _ in batch]
    finally:
        if workers:  # an error's traceback would keep them alive
            loader._shutdown_workers()


def ignore_interrupts(worker: int) -> None:
    """Ctrl-C and SIGTERM reach workers too, but the training process needs them until it has saved
    a checkpoint; they end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def kill_workers() -> None:
    """A loop that was left can keep workers until exit, where Python sends SIGTERM and waits."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler raises RuntimeError
    for worker in workers:
        worker.kill()
