"""The page of a run, report.html: loss curves, accuracy by question type, images with replies.

It is one file that opens in any browser and loads nothing else.
"""

import base64
import io
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ..conversation import IMAGE_TOKEN
from ..image import open_image
from ..infra.cli import format_table
from ..infra.io import atomic_write

WIDTH, HEIGHT = 720, 240  # of a loss curve, in pixels
LEFT, RIGHT, TOP, BOTTOM = 48, 20, 8, 28  # its margins
THUMBNAIL = 320  # pixels of a photograph's longer side
STYLE = """
:root { color-scheme: light dark;
--line: #1050c0; --faint: #1050c040; --right: #1050c0; --wrong: #d01010; }
@media (prefers-color-scheme: dark) {
:root { --line: #7ab0ff; --faint: #7ab0ff40; --right: #7ab0ff; --wrong: #ff7a7a; } }
body { font: 16px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
svg { max-width: 100%; height: auto; } svg text { font-size: 12px; fill: currentColor; }
.grid { stroke: #8884; } .loss { fill: none; stroke: var(--faint); }
.mean { fill: none; stroke: var(--line); stroke-width: 2; } .validation { fill: var(--wrong); }
td, th { padding: 2px 14px; text-align: right; } td:first-child { text-align: left; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 28px; }
.cards img { width: 192px; image-rendering: pixelated; }
.photo img { width: 100%; image-rendering: auto; }
.cards p { margin: .4em 0; } .right { color: var(--right); } .wrong { color: var(--wrong); }
.truth { opacity: .65; } p span { display: block; white-space: pre-line; }
"""


@dataclass
class Exchange:
    """A question about an image, the model's reply and the true answer.

    `correct` is None where replies are not marked right or wrong.
    """

    question: str
    reply: str
    answer: str
    correct: bool | None = None


# ---------------------------------------------------------------------------------------------
# Loss curves


def running_mean(values: list[float], width: int) -> list[float]:
    """The mean of each value and up to `width - 1` values before it."""
    means, total = [], 0.0
    for number, value in enumerate(values):
        total += value - (values[number - width] if number >= width else 0.0)
        means.append(total / min(number + 1, width))
    return means


def axis_ticks(low: float, high: float) -> list[float]:
    """The round numbers 1, 2, 5, 10, 20, ... from low to high."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]


@dataclass
class Axes:
    """Steps 0..last from left to right, losses low..high from bottom to top, logarithmic."""

    last: int
    low: float
    high: float

    def x(self, step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / self.last

    def y(self, loss: float) -> float:
        depth = math.log(self.high / max(loss, self.low)) / math.log(self.high / self.low)
        return TOP + (HEIGHT - TOP - BOTTOM) * depth  # y counts from the top

    def grid(self) -> list[str]:
        parts = []
        for loss in axis_ticks(self.low, self.high):
            y = self.y(loss)
            parts += [
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>',
                f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{loss:g}</text>']
        interval = next(tick for tick in axis_ticks(1, 10 * self.last) if self.last / tick <= 6)
        for step in range(0, self.last + 1, int(interval)):
            parts.append(f'<text x="{self.x(step):.1f}" y="{HEIGHT - 8}" text-anchor="middle">'
                         f"{step:g}</text>")
        return parts

    def line(self, name: str, points: list[tuple[int, float]]) -> str:
        thinned = points[:: max(1, len(points) // 2000)]
        corners = " ".join(f"{self.x(step):.1f},{self.y(loss):.1f}" for step, loss in thinned)
        return f'<polyline class="{name}" points="{corners}"/>'


def loss_curve(rows: list[dict]) -> str:
    """SVG of the rows of a log: the loss of each step, its running mean, and val_loss as dots."""
    steps = [row["step"] + 1 for row in rows]
    losses = [max(row["loss"], 1e-6) for row in rows]
    means = running_mean(losses, max(1, len(losses) // 50))
    # the lowest mean sets the scale, so that a few batches far below it do not
    axes = Axes(steps[-1], min(means) / 2, max(losses) * 1.1)
    parts = axes.grid()
    parts.append(axes.line("loss", list(zip(steps, losses))))
    parts.append(axes.line("mean", list(zip(steps, means))))
    for row in rows:
        if "val_loss" in row:
            x, y = axes.x(row["step"] + 1), axes.y(row["val_loss"])
            parts.append(f'<circle class="validation" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    return (f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss by step">'
            f'{"".join(parts)}</svg>')


# ---------------------------------------------------------------------------------------------
# Tables of percentages: {column: {row: percent}}; the first column names the rows


def percent_table(columns: dict[str, dict[str, float]]) -> str:
    """Percentages as text. A cell is empty where its column lacks the row."""
    rows = []
    for name in next(iter(columns.values())):
        cells = (f"{column[name]:.1f}%" if name in column else "" for column in columns.values())
        rows.append([name, *cells])
    return format_table(["", *columns], rows)


def html_table(columns: dict[str, dict[str, float]]) -> str:
    """The same as HTML, with a bar behind each number."""

    def cell(percent: float | None) -> str:
        if percent is None:
            return "<td></td>"
        bar = f"linear-gradient(to right, var(--faint) {percent:.1f}%, transparent 0)"
        return f'<td style="background: {bar}">{percent:.1f}%</td>'

    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    lines = [f"<table><tr><th></th>{head}</tr>"]
    for name in next(iter(columns.values())):
        cells = "".join(cell(column.get(name)) for column in columns.values())
        lines.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    return "".join(lines) + "</table>"


# ---------------------------------------------------------------------------------------------
# Images with replies


def html_image(path: Path) -> tuple[str, bool]:
    """A thumbnail as an <img> that holds its data, and whether it is a photograph.

    Small images, as the toy world's, stay as they are and are shown with sharp pixels.
    """
    image = open_image(path)
    is_photo = max(image.size) > THUMBNAIL // 2
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer, kind = io.BytesIO(), "JPEG" if is_photo else "PNG"
    image.save(buffer, kind)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/{kind.lower()};base64,{data}">', is_photo


def html_card(image: Path | None, exchanges: list[Exchange]) -> str:
    """An image and its exchanges: a correct reply is blue, a wrong one red, its answer below it."""
    thumbnail, is_photo = html_image(image) if image else ("", False)
    lines = []
    for exchange in exchanges:
        question = escape(exchange.question.replace(IMAGE_TOKEN, "").strip())
        name, mark = {True: ("right", "✓ "), False: ("wrong", "✗ "),
                      None: ("", "")}[exchange.correct]
        lines.append(f'<p><span>{question}</span>'
                     f'<span class="{name}">{mark}{escape(exchange.reply)}</span>')
        if not exchange.correct:
            lines.append(f'<span class="truth">{escape(exchange.answer)}</span>')
        lines.append("</p>")
    return f'<div class="{"photo" if is_photo else ""}">{thumbnail}{"".join(lines)}</div>'


# ---------------------------------------------------------------------------------------------
# The page


def write_report(path: Path, title: str, curves: dict[str, list[dict]],
                 columns: dict | None = None,
                 cards: list[tuple[Path | None, list[Exchange]]] = ()) -> None:
    """Write the page.

    curves: {heading: rows of a log}. columns: percentages as `percent_table` takes them.
    cards: images (None: a question without one), each with its exchanges.
    """
    parts = []
    for heading, rows in curves.items():
        if rows:
            legend = "Loss by step; the thick line is a running mean"
            legend += "; the dots are the validation loss" * any("val_loss" in row for row in rows)
            parts.append(f"<h2>{escape(heading)}</h2>{loss_curve(rows)}<p>{legend}.</p>")
    if columns:
        parts.append(f"<h2>Accuracy on test questions</h2>{html_table(columns)}")
    if cards:
        body = "".join(html_card(image, exchanges) for image, exchanges in cards)
        parts.append(f'<h2>Test images and replies</h2><div class="cards">{body}</div>')
    page = ('<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width">'
            f"<title>{escape(title)}</title><style>{STYLE}</style>"
            f"<h1>{escape(title)}</h1>{''.join(parts)}</html>\n")
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
