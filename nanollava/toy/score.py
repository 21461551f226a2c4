"""How well a model sees the toy world.

Held-out questions about pictures that no training met, scored by exact match, type by type, against two controls: the
same questions about the wrong picture (what can be guessed from the words alone) and the model after stage 1 only
(what the projector brings before the language model has learned to use it).
"""

import textwrap
from collections import defaultdict
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from ..benchmarks.report import Exchange, write_report
from ..chat import generate_replies
from ..conversation import IMAGE_TOKEN
from ..image import open_image, preprocess
from ..infra.io import read_json
from ..infra.progress import Progress
from ..infra.run_log import read_log
from ..llava import Llava
from ..tokenizer import Tokenizer


def same(reply: str, truth: str) -> bool:
    """True if a reply is the right sentence, up to capitals, spaces and the final stop."""
    one, other = (text.lower().strip(" .").split() for text in (reply, truth))
    return one == other


def answer_toy(model, tokenizer, rows, images: Path, label="", batch_size=64) -> list[str]:
    """The model's replies to rows of test.json, each about one picture."""
    files = sorted({row["image"] for row in rows})
    seen = {}  # file -> (P, D); test pictures are few and asked about many times
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        pixels = torch.stack([preprocess(open_image(images / file), model.config.image_size) for file in batch])
        with torch.no_grad():
            seen.update(zip(batch, model.see(pixels)))
    said = [""] * len(rows)
    order = sorted(range(len(rows)), key=lambda number: rows[number]["type"])  # replies of a type are about as long
    with Progress(label, len(rows), "questions") as progress:
        for start in range(0, len(rows), batch_size):
            batch = order[start : start + batch_size]
            texts = generate_replies(model, tokenizer, [rows[number]["conversations"][:1] for number in batch],
                            image_features=torch.stack([seen[rows[number]["image"]] for number in batch]))
            for number, text in zip(batch, texts):
                said[number] = text
            progress.update(start + len(batch))
    return said


def accuracy(rows, said: list[str]) -> dict[str, float]:
    """Percent right for each type, and for all questions together."""
    right = defaultdict(list)
    for row, reply in zip(rows, said):
        right[row["type"]].append(same(reply, row["conversations"][1]["value"]))
    right["all"] = [hit for hits in list(right.values()) for hit in hits]
    return {kind: 100 * sum(hits) / len(hits) for kind, hits in right.items()}


def toy_table(run: Path, data: Path, device: str = "cpu", limit: int | None = None):
    """The columns of the toy evaluation for a folder that holds stage2/ and maybe stage1/; the rows of test.json
    and what the model of stage 2 said to them."""
    rows = read_json(data / "test.json")
    files = sorted({row["image"] for row in rows})
    other = dict(zip(files, files[1:] + files[:1]))
    rows = rows[:limit]
    wrong = [{**row, "image": other[row["image"]]} for row in rows]
    said = {}
    for stage, columns in (("stage2", {"after stage 2": rows, "wrong picture": wrong}),
                           ("stage1", {"after stage 1": rows})):
        if stage == "stage2" or (run / stage).is_dir():
            model, tokenizer = Llava.from_pretrained(run / stage, device=device), Tokenizer(run / stage)
            for name, asked in columns.items():
                said[name] = answer_toy(model, tokenizer, asked, data / "images", label=name)
    return {name: accuracy(rows, texts) for name, texts in said.items()}, rows, said["after stage 2"]


def gallery(rows, said: list[str], images: Path, across: int = 4, down: int = 2, questions: int = 3) -> Image.Image:
    """The first pictures of rows of test.json, and under each what the model said: blue if right, red if wrong."""
    side, margin, line = 192, 24, 17
    font, height = ImageFont.load_default(13), side + (3 * questions + 1) * line + margin
    sheet = Image.new("RGB", (across * (side + margin + 40) + margin, down * height + margin), "white")
    write = ImageDraw.Draw(sheet)
    for number, file in enumerate(sorted({row["image"] for row in rows})[: across * down]):
        x, y = margin + number % across * (side + margin + 40), margin + number // across * height
        sheet.paste(open_image(images / file).resize((side, side), Image.Resampling.NEAREST), (x, y))
        asked = [(row["conversations"], reply) for row, reply in zip(rows, said) if row["image"] == file]
        top = y + side + 6
        for turns, reply in asked[number % 2 :: 2][:questions]:  # not the same types everywhere
            color = "#1050c0" if same(reply, turns[1]["value"]) else "#d01010"
            write.text((x, top), turns[0]["value"].replace(IMAGE_TOKEN, "").strip(), "black", font)
            for said_line in textwrap.wrap(reply, 38)[:3]:
                top += line - 2
                write.text((x, top), said_line, color, font)
            top += line + 2
    return sheet


def write_toy_report(run: Path, data: Path, columns: dict, rows, said: list[str], pictures: int = 24) -> None:
    """RUN/report.html: the losses of both stages, the table, and what the model said about some of the pictures."""
    logs = {f"Stage {stage}": read_log(run / f"stage{stage}" / "log.jsonl") for stage in (1, 2)}
    told = {}
    for row, reply in zip(rows, said):
        question, truth = (turn["value"] for turn in row["conversations"])
        told.setdefault(row["image"], []).append(Exchange(question, reply, truth, same(reply, truth)))
    cards = [(data / "images" / file, asked) for file, asked in list(told.items())[:pictures]]
    write_report(run / "report.html", "A toy LLaVA", logs, columns, cards)
