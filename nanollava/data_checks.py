"""Checks of LLaVA JSON files before the first step of training, and statistics about them.

A row that cannot be trained on is reported with its file and row number.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from .conversation import IGNORE_INDEX, IMAGE_TOKEN, INSTRUCTION_KINDS, TEMPLATES, check_turns
from .image import image_error
from .infra import distributed
from .infra.io import InputError, path_inside
from .infra.json_io import read_json_item, read_json_list, scan_json_list
from .infra.progress import progress

UNREAD = ("images", "video", "videos", "audio")  # what a row must not have: it would be ignored


def check_row(row) -> tuple[list[dict], list[str]]:
    """The turns and the image files of a row. Raises ValueError if it cannot be trained on."""
    if not isinstance(row, dict) or "conversations" not in row:
        raise ValueError("it has no 'conversations'")
    turns, files = row["conversations"], row.get("image") or []
    if unread := [key for key in UNREAD if row.get(key)]:
        raise ValueError(f"it has '{unread[0]}', which is not read, only 'image'")
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise ValueError("'image' must be a file name or a list of file names")
    check_turns(turns)
    for number, turn in enumerate(turns, 1):
        if not turn["value"].strip():
            raise ValueError(f"turn {number} ({turn['from']}) is empty")
    if len(turns) < 2:
        raise ValueError("it has no answer to learn from")
    marks = sum(turn["value"].count(IMAGE_TOKEN) for turn in turns)
    if marks != len(files):
        raise ValueError(f"it has {len(files)} images, but {marks} {IMAGE_TOKEN} in its text")
    return turns, files


def row_length(turns: list[dict], tokenize: Callable, config, max_length: int) -> int:
    """The number of tokens of a row: exact if it may exceed max_length, else estimated from bytes.

    Most rows are so short that they fit without a look at their tokens, and an estimate is good
    enough to sort by. Tokenizing all of 150,000 rows would take a minute.
    Raises ValueError if max_length cuts off all answers, or an image.
    """
    template = TEMPLATES[config.template]
    text = template.system + (template.user + template.assistant) * len(turns[::2])
    text += "".join(turn["value"] for turn in turns)
    num_bytes = len(text.encode(errors="replace"))
    num_image_tokens = text.count(IMAGE_TOKEN) * config.tokens_per_image
    # Upper bound: a token has at least one byte; BOS, stops and the ▁ of SentencePiece are extra.
    if num_bytes + num_image_tokens + 4 * len(turns) <= max_length:
        # English has about 4 bytes a token; encoding each turn separately adds about 2 tokens
        return num_bytes // 4 + num_image_tokens + 2 * len(turns)
    tokens, labels = tokenize(turns)
    remedy = "raise --max-length or shorten the row"
    if all(label == IGNORE_INDEX for label in labels[:max_length]):
        raise ValueError(f"no answer begins within {max_length} tokens; {remedy}")
    if config.image_token_id in tokens[max_length:]:
        raise ValueError(f"an image lies beyond {max_length} tokens; {remedy}")
    return len(tokens)


def check_sources(sources, tokenize: Callable, config, max_length: int):
    """Check all rows of all files; sources are pairs of a JSON file and the folder of its images.

    Returns two lists with an entry for each row, places (source, row number, first byte, end) and
    lengths in tokens, and {row: message} for the rows that cannot be trained on.
    Raises InputError if a file cannot be read or has no rows.
    """
    places, lengths, errors = [], [], {}
    rows_of_image = defaultdict(list)
    for source, (path, images) in enumerate(sources):
        num_before = len(places)
        for number, (row, start, end) in enumerate(scan_json_list(path)):
            place, paths, length = (source, number, start, end), [], 0
            try:
                turns, files = check_row(row)
                paths = [path_inside(images, file) for file in files]
                length = row_length(turns, tokenize, config, max_length)
            except ValueError as error:
                errors[len(places)] = f"{row_name(sources, place)}: {error}"
            for image in paths:
                rows_of_image[image].append(len(places))
            places.append(place)
            lengths.append(length)
        if len(places) == num_before:
            raise InputError(f"{path} is empty: it has no conversations")
    for file, error in image_errors(list(rows_of_image)).items():
        for row in rows_of_image[file]:
            errors.setdefault(row, f"{row_name(sources, places[row])}: {error}")
    return places, lengths, errors


def row_name(sources, place) -> str:
    """What a message calls the row at a place (source, row number, first byte, end)."""
    source, number, start, end = place
    path, _ = sources[source]
    row = read_json_item(path, start, end)
    id = f" (id {row['id']})" if isinstance(row, dict) and "id" in row else ""
    return f"{path}, row {number}{id}"


def image_errors(files: list[str]) -> dict[str, str]:
    """{file: what is wrong with it} for images that cannot be opened. Each rank opens its share."""
    files = files[distributed.rank() :: distributed.world_size()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # pool.map submits all its items before the first result: 1000 at a time bound the memory
        chunks = (files[start : start + 1000] for start in range(0, len(files), 1000))
        results = chain.from_iterable(pool.map(image_error, chunk) for chunk in chunks)
        results = zip(progress(results, "checking", "images", len(files)), files)
        errors = [(file, error) for error, file in results if error]
    return dict(distributed.all_gather_list(errors))


def format_errors(errors: dict[int, str], num_rows: int) -> str:
    """{row: message} as one line, which quotes the first ten messages."""
    quoted = "; ".join(errors[row] for row in sorted(errors)[:10])
    if len(errors) == 1:
        return quoted + (" (--skip-bad leaves it out)" if num_rows > 1 else "")
    more = f"; and {len(errors) - 10} more" if len(errors) > 10 else ""
    hint = " (--skip-bad leaves them out)" if len(errors) < num_rows else ""
    return f"{len(errors)} of {num_rows} rows cannot be used{hint}: {quoted}{more}"


def stats(path: Path) -> tuple[dict[str, float], list[str]]:
    """Statistics of a LLaVA JSON file by name, and a message for each row that cannot be used."""
    counts, kinds, errors, num_rows = Counter(), Counter(), [], 0
    for number, row in enumerate(read_json_list(path)):
        num_rows += 1
        try:
            turns, files = check_row(row)
        except ValueError as error:
            errors.append(f"row {number}: {error}")
            continue
        answers = [turn["value"] for turn in turns[1::2]]
        counts["images"] += len(files)
        counts["rows without image"] += not files
        counts["questions"] += len(turns) - len(answers)
        counts["answers"] += len(answers)
        counts["words in answers"] += sum(len(answer.split()) for answer in answers)
        kind = str(row.get("id")).rpartition("-")[2]  # only rows of our own data engine have it
        kinds[kind if kind in INSTRUCTION_KINDS else "unknown"] += 1
    shares = {f"kind: {kind}, percent": 100 * count / kinds.total()
              for kind, count in kinds.most_common()}
    return {"rows": num_rows, **counts, "unusable rows": len(errors), **shares}, errors
