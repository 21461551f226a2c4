"""LLaVA JSON to batches: rows of {"image": file, "conversations": turns}, read, checked, padded.

What is wrong with a data set is found before the first step and told with the row's number, but for a picture that
is there and will not open: that is found when its turn comes, and told by its name.
"""

import random
from collections import Counter
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from .conversation import IGNORE, IMAGE, INSTRUCTION_KINDS, check_turns, tokenize_conversation
from .files import InputError, read_json
from .image import open_image, preprocess


def check_row(row) -> tuple[list[dict], list[str]]:
    """The turns and the picture files of a row. Raises ValueError, saying what is wrong, if nothing can be learned."""
    if not isinstance(row, dict) or "conversations" not in row:
        raise ValueError("it has no 'conversations'")
    turns, files = row["conversations"], row.get("image", [])
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise ValueError("'image' must be a file name or a list of them")
    check_turns(turns)
    for number, turn in enumerate(turns):
        if not turn["value"].strip():
            raise ValueError(f"turn {number + 1} ({turn['from']}) is empty")
    if len(turns) < 2:
        raise ValueError("it has no answer to learn from")
    marks = sum(turn["value"].count(IMAGE) for turn in turns)
    if marks != len(files):
        raise ValueError(f"{len(files)} pictures, but {marks} times {IMAGE} in its text")
    return turns, files


def stats(path: Path) -> tuple[dict[str, float], list[str]]:
    """What is in a LLaVA JSON: numbers by name, and what is wrong with its broken rows, one line each."""
    rows = read_json(path)
    if not isinstance(rows, list):
        raise InputError(f"{path} is not a list of conversations")
    counts, kinds, broken = Counter(), Counter(), []
    for number, row in enumerate(rows):
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
    return {"rows": len(rows), **counts, "broken rows": len(broken), **shares}, broken


class Conversations(torch.utils.data.Dataset):
    """The rows of one JSON file, tokenized; a picture is opened when its row is asked for.

    Raises InputError, naming file and row, for a row without an answer, one whose answers all lie beyond
    max_length tokens, one whose pictures and `<image>` marks do not agree, or whose picture is not there.
    """

    def __init__(self, path, images, tokenizer, config, max_length: int = 2048):
        self.images, self.image_size = Path(images), config.image_size
        self.rows = []  # (tokens, labels, picture files)
        rows = read_json(path)
        if not isinstance(rows, list) or not rows:
            raise InputError(f"{path} is not a list of conversations")
        for number, row in enumerate(rows):
            try:
                self.rows.append(self.prepare(row, tokenizer, config, max_length))
            except ValueError as error:
                name = f" (id {row['id']})" if isinstance(row, dict) and "id" in row else ""
                raise InputError(f"{path}, row {number}{name}: {error}") from error

    def prepare(self, row, tokenizer, config, max_length):
        turns, files = check_row(row)
        tokens, labels = tokenize_conversation(turns, tokenizer, config.template,
                                               config.tokens_per_image, config.image_token_id)
        for file in files:
            if not (self.images / file).is_file():
                raise ValueError(f"no picture at {self.images / file}")
        if all(label == IGNORE for label in labels[:max_length]):
            raise ValueError(f"no answer within {max_length} tokens; raise --max-length or shorten the row")
        if tokens[max_length:].count(config.image_token_id):
            raise ValueError(f"a picture lies beyond {max_length} tokens; raise --max-length or shorten the row")
        return tokens[:max_length], labels[:max_length], files

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        tokens, labels, files = self.rows[index]
        return tokens, labels, [preprocess(open_image(self.images / file), self.image_size) for file in files]


def collate(samples):
    """Samples to (tokens (B, T), labels (B, T), images (N, 3, H, W) or None), padded on the right."""
    length = max(len(tokens) for tokens, _, _ in samples)
    tokens = torch.zeros(len(samples), length, dtype=torch.long)
    labels = torch.full((len(samples), length), IGNORE)
    for row, (ids, targets, _) in enumerate(samples):
        tokens[row, : len(ids)] = torch.tensor(ids)
        labels[row, : len(ids)] = torch.tensor(targets)
    images = [image for _, _, images in samples for image in images]
    return tokens, labels, torch.stack(images) if images else None


def batch_order(lengths: list[int], batch_size: int, seed: int) -> list[list[int]]:
    """One epoch: every row once, in random order, rows of a batch of about one length, so little is padding.

    Rows are shuffled, sorted by length within stretches of 50 batches, cut into batches, and these shuffled.
    What is left after the last whole batch is not seen this epoch, unless there is no whole batch.
    """
    rng = random.Random(seed)
    rows = list(range(len(lengths)))
    rng.shuffle(rows)
    stretch = 50 * batch_size
    rows = [row for start in range(0, len(rows), stretch)
            for row in sorted(rows[start : start + stretch], key=lengths.__getitem__)]
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    batches = [batch for batch in batches if len(batch) == batch_size] or batches
    rng.shuffle(batches)
    return batches


def loader(dataset: Conversations, batch_size: int, steps: int, seed: int, workers: int = 0) -> DataLoader:
    """`steps` batches of a data set, epoch after epoch, each in its own order."""
    lengths, order, epoch = [len(tokens) for tokens, _, _ in dataset.rows], [], 0
    while len(order) < steps:
        order += batch_order(lengths, batch_size, seed + epoch)
        epoch += 1
    return DataLoader(dataset, batch_sampler=order[:steps], collate_fn=collate, num_workers=workers)
