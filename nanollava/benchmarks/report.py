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
from ..infra.io import atomic_write

WIDTH, HEIGHT = 720, 240  # of a loss curve, in pixels
LEFT, RIGHT, TOP, BOTTOM = 48, 20, 8, 28  # its margins
THUMBNAIL = 320  # pixels of a photograph's longer side
MARKS = {True: ("right", "✓ "), False: ("wrong", "✗ "), None: ("", "")}  # CSS class and text
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
.cards img { width: 100%; }
.cards img[src^="data:image/png"] { width: 192px; image-rendering: pixelated; }
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
    windows = (values[max(0, end - width) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def axis_ticks(low: float, high: float) -> list[float]:
    """The round numbers 1, 2, 5, 10, 20, ... from low to high."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]


def loss_curve(rows: list[dict]) -> str:
    """SVG of the rows of a log: the loss of each step, its running mean, and val_loss as dots.

    Steps run from left to right, losses from bottom to top on a logarithmic scale.
    """
    steps = [row["step"] + 1 for row in rows]
    losses = [max(row["loss"], 1e-6) for row in rows]
    means = running_mean(losses, max(1, len(losses) // 50))
    # the lowest mean sets the scale, so that a few batches far below it do not
    last, low, high = steps[-1], min(means) / 2, max(losses) * 1.1

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(loss: float) -> float:
        depth = math.log(high / max(loss, low)) / math.log(high / low)
        return TOP + (HEIGHT - TOP - BOTTOM) * depth  # y counts from the top

    parts = []
    for loss in axis_ticks(low, high):
        parts.append(f'<path class="grid" d="M{LEFT} {y(loss):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(svg_text(LEFT - 6, y(loss) + 4, "end", loss))
    interval = next(tick for tick in axis_ticks(1, 10 * last) if last / tick <= 6)
    for step in range(0, last + 1, int(interval)):
        parts.append(svg_text(x(step), HEIGHT - 8, "middle", step))
    for name, values in (("loss", losses), ("mean", means)):
        points = list(zip(steps, values))[:: max(1, len(steps) // 2000)]
        corners = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)
        parts.append(f'<polyline class="{name}" points="{corners}"/>')
    for row in rows:
        if "val_loss" in row:
            center = f'cx="{x(row["step"] + 1):.1f}" cy="{y(row["val_loss"]):.1f}"'
            parts.append(f'<circle class="validation" {center} r="3"/>')
    return (f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss by step">'
            f'{"".join(parts)}</svg>')


def svg_text(x: float, y: float, anchor: str, number: float) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{number:g}</text>'


# ---------------------------------------------------------------------------------------------
# Accuracy, images with replies, the page


def html_table(columns: dict[str, dict[str, float]]) -> str:
    """Percentages, as `percent_table` takes them, with a bar behind each number."""
    head = "".join(f"<th>{escape(name)}</th>" for name in ["", *columns])
    parts = [f"<table><tr>{head}</tr>"]
    for name in next(iter(columns.values())):
        parts.append(f"<tr><td>{escape(name)}</td>")
        for column in columns.values():
            text = f"{column[name]:.1f}%" if name in column else ""
            bar = f"linear-gradient(to right, var(--faint) {text or 0}, transparent 0)"
            parts.append(f'<td style="background: {bar}">{text}</td>')
        parts.append("</tr>")
    return "".join(parts) + "</table>"


def html_image(path: Path) -> str:
    """A thumbnail as an <img> that holds its data: a photograph as JPEG.

    A small image, as the toy world's, is a PNG. The page shows it with sharp pixels.
    """
    image, buffer = open_image(path), io.BytesIO()
    kind = "jpeg" if max(image.size) > THUMBNAIL // 2 else "png"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(buffer, kind)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/{kind};base64,{data}">'


def html_card(image: Path | None, exchanges: list[Exchange]) -> str:
    """An image and its exchanges: a correct reply is blue, a wrong one red, its answer below it."""
    lines = [html_image(image)] if image else []
    for exchange in exchanges:
        question = escape(exchange.question.replace(IMAGE_TOKEN, "").strip())
        name, mark = MARKS[exchange.correct]
        lines.append(f'<p><span>{question}</span>'
                     f'<span class="{name}">{mark}{escape(exchange.reply)}</span>')
        if not exchange.correct:
            lines.append(f'<span class="truth">{escape(exchange.answer)}</span>')
        lines.append("</p>")
    return f'<div>{"".join(lines)}</div>'


def write_report(path: Path, title: str, curves: dict[str, list[dict]],
                 columns: dict | None = None,
                 cards: list[tuple[Path | None, list[Exchange]]] = (),
                 links: dict[str, str] | None = None) -> None:
    """Write the page.

    curves: {heading: rows of a log}. columns: percentages as `percent_table` takes them.
    cards: images (None: a question without one), each with its exchanges.
    links: {file in the same folder: text}.
    """
    parts = [f'<p><a href="{escape(file)}">{escape(text)}</a></p>'
             for file, text in (links or {}).items()]
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
