"""LLaVA JSON to batches: rows of {"image": file, "conversations": turns}, read, checked, padded.

What is wrong with a data set is found before the first step, and told with the row's number.
"""

import hashlib
import json
import math
import os
import random
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from .conversation import (
    IGNORE_INDEX,
    IMAGE_TOKEN,
    INSTRUCTION_KINDS,
    TEMPLATES,
    check_turns,
    tokenize_conversation,
)
from .image import image_error, open_image, preprocess
from .infra import distributed
from .infra.io import InputError, read_json_list
from .infra.progress import progress


def check_row(row) -> tuple[list[dict], list[str]]:
    """The turns and the picture files of a row. Raises ValueError, saying what is wrong, if nothing can be learned."""
    if not isinstance(row, dict) or "conversations" not in row:
        raise ValueError("it has no 'conversations'")
    turns, files = row["conversations"], row.get("image") or []
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise ValueError("'image' must be a file name or a list of them")
    check_turns(turns)
    for number, turn in enumerate(turns):
        if not turn["value"].strip():
            raise ValueError(f"turn {number + 1} ({turn['from']}) is empty")
    if len(turns) < 2:
        raise ValueError("it has no answer to learn from")
    marks = sum(turn["value"].count(IMAGE_TOKEN) for turn in turns)
    if marks != len(files):
        raise ValueError(f"{len(files)} pictures, but {marks} times {IMAGE_TOKEN} in its text")
    return turns, files


def stats(path: Path) -> tuple[dict[str, float], list[str]]:
    """What is in a LLaVA JSON: numbers by name, and what is wrong with its broken rows, one line each."""
    counts, kinds, broken, number = Counter(), Counter(), [], -1
    for number, row in enumerate(read_json_list(path)):
        try:
            turns, files = check_row(row)
        except ValueError as error:
            broken.append(f"row {number}: {error}")
            continue
        answers = [turn["value"] for turn in turns[1::2]]
        counts.update(pictures=len(files), questions=len(turns) - len(answers), answers=len(answers),
                      rows_without_picture=not files, words_of_answers=sum(len(text.split()) for text in answers))
        kind = str(row.get("id")).rpartition("-")[2]  # our own rows say it; the public ones do not
        kinds[kind if kind in INSTRUCTION_KINDS else "not said"] += 1
    shares = {f"kind: {kind}, percent": 100 * count / kinds.total() for kind, count in kinds.most_common()}
    return {"rows": number + 1, **counts, "broken rows": len(broken), **shares}, broken


PAD_ROW = -1  # the number of a row that is only there to fill a batch


class Conversations(torch.utils.data.Dataset):
    """The rows of LLaVA JSON files; one is tokenized, and its pictures are opened, when it is asked for.

    sources: pairs of a file and the folder of its pictures. Raises InputError for rows that have no answer, whose
    answers or pictures lie beyond max_length tokens, whose pictures and `<image>` marks do not agree, or whose
    pictures will not open; it names the first ten, with file and row. With skip_bad such rows are left out.
    """

    def __init__(self, sources, tokenizer, config, max_length: int = 2048, skip_bad: bool = False):
        self.tokenizer, self.config, self.max_length = tokenizer, config, max_length
        # all rows stand in one stretch of bytes: a fifth of what they take as Python's objects, and processes that
        # open pictures share it with the one that trains
        self.packed, ends, sizes, rows_of, bad = bytearray(), [0], [], {}, {}
        digest = hashlib.sha256()
        for path, images in sources:
            before = len(sizes)
            digest.update(str(Path(images).resolve()).encode())
            for number, row in enumerate(read_json_list(path)):
                name = f"{path}, row {number}" + (f" (id {row['id']})" if isinstance(row, dict) and "id" in row else "")
                try:
                    turns, files = check_row(row)
                    self.check_length(turns)
                except ValueError as error:
                    turns, files, bad[len(sizes)] = [], [], f"{name}: {error}"
                digest.update(json.dumps([turns, files]).encode())
                files = [str(Path(images) / file) for file in files]
                for file in files:
                    rows_of.setdefault(file, []).append(len(sizes))
                self.packed += json.dumps([name, turns, files]).encode()
                ends.append(len(self.packed))
                sizes.append((sum(len(turn["value"].encode()) for turn in turns), len(turns), len(files)))
            if len(sizes) == before:
                raise InputError(f"{path} is empty: it has no conversations")
        self.digest = digest.hexdigest()[:12]  # names what is in it, for a run that goes on
        self.spans = np.stack([ends[:-1], ends[1:]], axis=1)  # (rows, 2), where each row begins and ends
        for file, problem in bad_pictures(list(rows_of)).items():
            for row in rows_of[file]:
                bad.setdefault(row, f"{self.name(row)}: {problem}")
        if len(bad) == len(sizes) or bad and not skip_bad:
            raise InputError(format_errors(bad, len(sizes)))
        self.skipped = len(bad)
        good = np.setdiff1d(np.arange(len(sizes)), list(bad))
        self.spans = self.spans[good]
        self.lengths = self.estimate(np.array(sizes)[good])  # (rows,)

    def check_length(self, turns) -> None:
        """Raise ValueError where the length limit cuts off all answers, or a picture."""
        form, marks = TEMPLATES[self.config.template], [n for n, turn in enumerate(turns) if IMAGE_TOKEN in turn["value"]]
        head = "".join(turn["value"] + form.user + form.assistant for turn in turns[: max(marks, default=0) + 1])
        pictures = head.count(IMAGE_TOKEN) * self.config.tokens_per_image
        if len((form.system + head).encode()) + pictures + 8 * len(turns) < self.max_length:
            return  # no token is shorter than a byte, so there is no need to look closer
        tokens, labels = self.tokenize(turns)
        if all(label == IGNORE_INDEX for label in labels[: self.max_length]):
            raise ValueError(f"no answer within {self.max_length} tokens; raise --max-length or shorten the row")
        if self.config.image_token_id in tokens[self.max_length :]:
            raise ValueError(f"a picture lies beyond {self.max_length} tokens; raise --max-length or shorten the row")

    def estimate(self, sizes: np.ndarray) -> np.ndarray:
        """About how many tokens each row has, from its bytes, turns and pictures (rows, 3): to sort by, no more.

        A line through a thousand rows; to tokenize all would take minutes where this takes a second.
        """
        pictures = sizes[:, 2] * self.config.tokens_per_image
        known = np.linspace(0, len(sizes) - 1, min(len(sizes), 1000)).astype(int)
        exact = np.array([len(self.tokenize(self.unpack(row)[1])[0]) for row in known])
        features = np.concatenate([sizes[:, :2], np.ones((len(sizes), 1))], axis=1)
        line, *_ = np.linalg.lstsq(features[known], exact - pictures[known], rcond=None)
        return np.clip(features @ line + pictures, 1, self.max_length).astype(int)

    def tokenize(self, turns) -> tuple[list[int], list[int]]:
        config = self.config
        return tokenize_conversation(turns, self.tokenizer, config.template, config.tokens_per_image,
                                     config.image_token_id)

    def unpack(self, index: int) -> tuple[str, list[dict], list[str]]:
        """The name of a row, for error messages, its turns and its picture files."""
        return json.loads(self.packed[slice(*self.spans[index])])

    def name(self, index: int) -> str:
        return self.unpack(index)[0]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int):
        """(tokens, labels, pictures): two lists of at most max_length, and a list of (3, H, W)."""
        if index == PAD_ROW:
            return [self.tokenizer.bos_id], [IGNORE_INDEX], []
        _, turns, files = self.unpack(index)
        tokens, labels = self.tokenize(turns)
        images = [preprocess(open_image(file), self.config.image_size) for file in files]
        return tokens[: self.max_length], labels[: self.max_length], images


def bad_pictures(files: list[str]) -> dict[str, str]:
    """What is wrong with those that will not open. Over several processes, each looks at its share."""
    mine = files[distributed.rank() :: distributed.world_size()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = (pool.map(image_error, mine[start : start + 1000]) for start in range(0, len(mine), 1000))
        problems = zip(progress(chain.from_iterable(parts), "checking ", "pictures", len(mine)), mine)
        return dict(distributed.all_gather_list([(file, problem) for problem, file in problems if problem]))


def format_errors(bad: dict[int, str], rows: int) -> str:
    """The message about bad rows, by number: all of it in one line, ten of them by name."""
    first = "; ".join(bad[row] for row in sorted(bad)[:10])
    if len(bad) == 1:
        return first + (" (--skip-bad leaves it out)" if rows > 1 else "")
    more = f"; and {len(bad) - 10} more" if len(bad) > 10 else ""
    return f"{len(bad)} of {rows} rows cannot be used (--skip-bad leaves them out): {first}{more}"


def collate(samples):
    """Samples to (tokens (B, T), labels (B, T), images (N, 3, H, W) or None), padded on the right."""
    length = max(len(tokens) for tokens, _, _ in samples)
    tokens = torch.zeros(len(samples), length, dtype=torch.long)
    labels = torch.full((len(samples), length), IGNORE_INDEX)
    for row, (ids, targets, _) in enumerate(samples):
        tokens[row, : len(ids)] = torch.tensor(ids)
        labels[row, : len(ids)] = torch.tensor(targets)
    images = [image for _, _, images in samples for image in images]
    return tokens, labels, torch.stack(images) if images else None


def length_grouped_batches(lengths, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """The rows of each of `steps` batches, epoch after epoch, those of a batch of like lengths, to have little padding.

    In every epoch each row comes once, in random order: rows are shuffled, sorted by length within stretches of 50
    batches, cut into batches, and these shuffled. What does not fill a last batch, other rows in each epoch, is left
    out; a data set smaller than a batch fills it by coming several times.
    """
    order, epoch = [], 0
    while len(order) < steps:
        rng = random.Random(seed + epoch)
        rows = list(range(len(lengths))) * math.ceil(batch_size / len(lengths))
        rng.shuffle(rows)
        rows = rows[: len(rows) // batch_size * batch_size]
        stretch = 50 * batch_size
        rows = [row for start in range(0, len(rows), stretch)
                for row in sorted(rows[start : start + stretch], key=lengths.__getitem__)]
        batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        rng.shuffle(batches)
        order += batches
        epoch += 1
    return order[:steps]


def eval_batches(lengths, batch_size: int) -> list[list[int]]:
    """The rows of each batch for one look at all of them, from the shortest to the longest; the last batch is filled
    up with rows that teach nothing, so that every process has as many."""
    rows = sorted(range(len(lengths)), key=lengths.__getitem__)
    rows += [PAD_ROW] * (-len(rows) % distributed.world_size())
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def load_batches(dataset: Conversations, order: list[list[int]], micro_batch: int | None = None, workers: int = 0):
    """Yield each batch of `order` as a list of micro-batches, what `collate` makes of the rows of this process.

    A process takes every world-th row of a batch, `micro_batch` rows at a time, all at once where it is None.
    workers: processes that tokenize and open pictures while this one trains.
    """
    mine = [rows[distributed.rank() :: distributed.world_size()] for rows in order]
    size = micro_batch or max(map(len, mine), default=1)
    micro = [[rows[start : start + size] for start in range(0, len(rows), size)] for rows in mine]
    loader = iter(DataLoader(
        dataset, batch_sampler=[rows for batch in micro for rows in batch], collate_fn=collate, num_workers=workers,
        worker_init_fn=ignore_interrupts, pin_memory=torch.cuda.is_available()))
    for batch in micro:
        yield [next(loader) for _ in batch]


def ignore_interrupts(worker: int) -> None:
    """Ctrl-C and SIGTERM may reach every process; the one that trains saves first, and these end when it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
