"""How well a model sees the toy world: questions about validation images, by question type.

A reply is correct if it equals the right answer. Two controls show what the accuracy means: the
same questions about a wrong image (what can be guessed from the words alone), and the model after
stage 1 (what the projector alone brings, before the language model has learned to use it).
"""

from collections import defaultdict
from pathlib import Path

import torch

from ..batching import generate_replies
from ..benchmarks.report import Exchange, write_report
from ..chat import open_llava
from ..image import open_image
from ..infra.io import InputError, path_inside
from ..infra.json_io import read_json
from ..infra.progress import Progress
from ..infra.run_log import read_log
from ..llava import Llava
from ..tokenizer import Tokenizer

CARDS = 24  # images in a report
TURN = {"value": str}
TEST = [{"image": str, "type": str, "conversations": [TURN, TURN]}]


def read_test(data: Path) -> list[dict]:
    """The rows of test.json in a folder of the toy world. Raises InputError if it is not one."""
    rows = read_json(data / "test.json", TEST)
    if not rows:
        raise InputError(f"{data / 'test.json'} has no rows")
    return rows


def is_correct(reply: str, answer: str) -> bool:
    """True if a reply equals the answer, up to capitals, spaces and the full stop."""
    return reply.lower().strip(" .").split() == answer.lower().strip(" .").split()


def accuracy(rows: list[dict], predictions: list[str]) -> dict[str, float]:
    """Percent correct by question type, and of "all". `rows` are in the format of test.json."""
    correct = defaultdict(list)
    for row, prediction in zip(rows, predictions):
        answer = row["conversations"][1]["value"]
        correct[row["type"]].append(is_correct(prediction, answer))
    correct["all"] = [result for results in correct.values() for result in results]
    return {name: 100 * sum(results) / len(results) for name, results in correct.items()}


def answer_rows(model: Llava, tokenizer: Tokenizer, rows: list[dict], images: Path, label: str,
                batch_size: int = 64) -> list[str]:
    """The model's replies to rows of test.json, each with one image of the folder `images`."""
    features = encode_files(model, sorted({row["image"] for row in rows}), images, batch_size)
    # questions of one type are about equally long, so that little of a batch is padding
    order = sorted(range(len(rows)), key=lambda number: rows[number]["type"])
    prompts = [(rows[number]["conversations"][:1], features[rows[number]["image"]][None])
               for number in order]
    replies = {}
    with Progress(label, len(rows), "questions") as progress:
        for place, reply in generate_replies(model, tokenizer, prompts, batch_size):
            replies[order[place]] = reply
            progress.update(len(replies))
    return [replies[number] for number in range(len(rows))]


@torch.no_grad()
def encode_files(model: Llava, files: list[str], images: Path,
                 batch_size: int) -> dict[str, torch.Tensor]:
    """Image features (P, D) by file: an image is encoded once for all questions about it."""
    features = {}
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        pixels = [model.config.preprocess(open_image(path_inside(images, file))) for file in batch]
        features.update(zip(batch, model.encode_images(torch.stack(pixels))))
    return features


def evaluate_run(run: Path, data: Path, device: str | None = "cpu", limit: int | None = None,
                 quantize: str | None = None) -> dict[str, dict[str, float]]:
    """Evaluate stage2/ of a run, and stage1/ if it exists, on test.json of `data`.

    Returns the accuracy in percent, {column: {question type: percent}}, and writes RUN/report.html.
    limit: ask only the first so many questions.
    quantize: as in `open_llava`.
    """
    rows = read_test(data)
    files = sorted({row["image"] for row in rows})
    next_file = dict(zip(files, files[1:] + files[:1]))
    rows = rows[:limit]
    wrong_rows = [{**row, "image": next_file[row["image"]]} for row in rows]
    tests = {"stage2": {"after stage 2": rows, "wrong image": wrong_rows}}
    if (run / "stage1").is_dir():
        tests["stage1"] = {"after stage 1": rows}
    replies = {}
    for stage, rows_by_column in tests.items():
        model, tokenizer = open_llava(run / stage, "float32", device, quantize=quantize)
        for name, column_rows in rows_by_column.items():
            replies[name] = answer_rows(model, tokenizer, column_rows, data / "images", label=name)
    columns = {name: accuracy(rows, replies[name]) for name in replies}
    title = "A toy LLaVA" + (f" with {quantize} weights" if quantize else "")
    write_run_report(run, data, title, columns, rows, replies["after stage 2"])
    return columns


def write_run_report(run: Path, data: Path, title: str, columns: dict, rows: list[dict],
                     predictions: list[str]) -> None:
    """Write RUN/report.html: losses of both stages, accuracy, and images with replies."""
    curves = {f"Stage {stage}": read_log(run / f"stage{stage}" / "log.jsonl") for stage in (1, 2)}
    exchanges = defaultdict(list)
    for row, reply in zip(rows, predictions):
        question, answer = (turn["value"] for turn in row["conversations"])
        exchange = Exchange(question, reply, answer, is_correct(reply, answer))
        exchanges[data / "images" / row["image"]].append(exchange)
    cards = list(exchanges.items())[:CARDS]
    has_tour = (run / "tour.html").exists()
    links = {"tour.html": "See how a picture turns into words"} if has_tour else {}
    write_report(run / "report.html", title, curves, columns, cards, links)
