"""How well a model sees: `python -m nanollava.evaluate toy`.

Held-out questions about pictures that no training met, scored by exact match, type by type, against two
controls: the same questions about the wrong picture (what can be guessed from the words alone) and the
model after stage 1 only (what the projector brings before the language model has learned to use it).
"""

import argparse
from collections import defaultdict
from pathlib import Path

import torch

from .chat import replies
from .files import one_line_errors, read_json, write_json
from .image import open_image, preprocess
from .llava import Llava
from .progress import Progress
from .tokenizer import Tokenizer


def same(reply: str, truth: str) -> bool:
    """True if a reply is the right sentence, up to capitals, spaces and the final stop."""
    return reply.lower().split() == truth.lower().split() or reply.lower().strip(" .") == truth.lower().strip(" .")


def answer_all(model, tokenizer, rows, images: Path, wrong_picture: bool = False, batch_size: int = 64, label: str = "") -> list[str]:
    """The model's replies to rows of test.json. wrong_picture: each question gets the picture of another row."""
    pixels = {}  # file -> tensor; test pictures are few and asked about many times
    files = [row["image"] for row in rows]
    if wrong_picture:
        others = sorted(set(files))
        files = [others[(others.index(file) + 1) % len(others)] for file in files]
    for file in files:
        if file not in pixels:
            pixels[file] = preprocess(open_image(images / file), model.config.image_size)
    said = []
    with Progress(label, len(rows), "questions") as progress:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            said += replies(model, tokenizer, [row["conversations"][:1] for row in batch],
                            [[pixels[file]] for file in files[start : start + batch_size]])
            progress.update(len(said))
    return said


def accuracy(rows, said: list[str]) -> dict[str, float]:
    """Percent right for each type, and for all questions together."""
    right = defaultdict(list)
    for row, reply in zip(rows, said):
        right[row["type"]].append(same(reply, row["conversations"][1]["value"]))
    right["all"] = [hit for hits in list(right.values()) for hit in hits]
    return {kind: 100 * sum(hits) / len(hits) for kind, hits in right.items()}


def table(columns: dict[str, dict[str, float]]) -> str:
    """Columns of percentages by row name, as text."""
    rows = list(next(iter(columns.values())))
    width = max(map(len, rows)) + 2
    lines = [" " * width + "".join(f"{name:>22}" for name in columns)]
    for row in rows:
        lines.append(f"{row:<{width}}" + "".join(f"{column[row]:>21.1f}%" if row in column else " " * 22 for column in columns.values()))
    return "\n".join(lines)


def toy_table(run: Path, data: Path, device: str = "cpu", limit: int | None = None) -> dict[str, dict[str, float]]:
    """The columns of the toy evaluation for a folder that holds stage1/ and stage2/."""
    rows = read_json(data / "test.json")[:limit]
    columns = {}
    for stage, wrong in (("stage2", False), ("stage2", True), ("stage1", False)):
        folder = run / stage
        if stage == "stage1" and not folder.is_dir():
            continue
        name = "wrong picture" if wrong else "after stage 1" if stage == "stage1" else "after stage 2"
        model, tokenizer = Llava.from_pretrained(folder, device=device).eval(), Tokenizer(folder)
        said = answer_all(model, tokenizer, rows, data / "images", wrong, label=f"{name:<13}")
        columns[name] = accuracy(rows, said)
    return columns


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nanollava.evaluate", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    toy = commands.add_parser("toy", help="held-out questions about the toy world, by type")
    toy.add_argument("--run", type=Path, default=Path("runs/toy"), help="folder with stage1/ and stage2/ (default: %(default)s)")
    toy.add_argument("--data", type=Path, default=Path("data/toy"), help="folder of `prepare_data.py toy` (default: %(default)s)")
    toy.add_argument("--limit", type=int, help="ask only the first N questions")
    toy.add_argument("--out", type=Path, help="write the table as JSON to this file, too")
    arguments = parser.parse_args()
    columns = toy_table(arguments.run, arguments.data, "cuda" if torch.cuda.is_available() else "cpu", arguments.limit)
    print(table(columns))
    if arguments.out:
        write_json(arguments.out, columns, indent=2)


if __name__ == "__main__":
    with one_line_errors():
        main()
