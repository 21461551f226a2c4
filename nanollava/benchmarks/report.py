"""A run's own page, report.html: one file that any browser shows, without a server or a network.

Loss curves of its stages, accuracy by type of question, and held-out pictures with question, reply and truth, for
people would rather look than read.
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

WIDTH, HEIGHT, LEFT, BOTTOM = 720, 240, 48, 28  # of a curve, and of its margins, in pixels
THUMBNAIL = 320  # pixels of the longer side of a photograph
STYLE = """
:root { color-scheme: light dark; --line: #1050c0; --faint: #1050c040; --right: #1050c0; --wrong: #d01010; }
@media (prefers-color-scheme: dark) {
:root { --line: #7ab0ff; --faint: #7ab0ff40; --right: #7ab0ff; --wrong: #ff7a7a; } }
body { font: 16px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
svg { max-width: 100%; height: auto; } svg text { font-size: 12px; fill: currentColor; }
.grid { stroke: #8884; } .loss { fill: none; stroke: var(--faint); } .mean { fill: none; stroke: var(--line);
stroke-width: 2; } .held-out { fill: var(--wrong); }
td, th { padding: 2px 14px; text-align: right; } td:first-child { text-align: left; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 28px; }
.cards img { width: 192px; image-rendering: pixelated; } .photo img { width: 100%; image-rendering: auto; }
.cards p { margin: .4em 0; } .right { color: var(--right); } .wrong { color: var(--wrong); }
.truth { opacity: .65; } p span { display: block; white-space: pre-line; }
"""


@dataclass
class Told:
    """What was said about a picture; `right` is None where nobody can tell."""

    question: str
    reply: str
    truth: str
    right: bool | None = None


def smooth(values: list[float], width: int) -> list[float]:
    """The mean of each value and the up to `width - 1` before it."""
    means, total = [], 0.0
    for number, value in enumerate(values):
        total += value - (values[number - width] if number >= width else 0.0)
        means.append(total / min(number + 1, width))
    return means


def round_numbers(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, 20, ... from low to high."""
    found = [digit * 10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
             for digit in (1, 2, 5)]
    return [value for value in found if low <= value <= high]


def curve(rows: list[dict]) -> str:
    """The losses of a log, rows of step and loss and maybe held_out_loss, as SVG; the loss on a logarithmic scale."""
    points = [(row["step"] + 1, max(row["loss"], 1e-6)) for row in rows]
    held_out = [(row["step"] + 1, max(row["held_out_loss"], 1e-6)) for row in rows if "held_out_loss" in row]
    losses, last = [loss for _, loss in points], points[-1][0]
    means = list(zip((step for step, _ in points), smooth(losses, max(1, len(losses) // 50))))
    low, high = min(loss for _, loss in means) / 2, max(losses) * 1.1  # a few batches far below do not set the scale
    every = next(step for step in round_numbers(1, 10 * last) if last / step <= 6)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - 20) * step / last

    def y(loss: float) -> float:
        return 8 + (HEIGHT - BOTTOM - 8) * math.log(high / max(loss, low)) / math.log(high / low)

    def path(line, name: str) -> str:
        corners = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in line[:: max(1, len(line) // 2000)])
        return f'<polyline class="{name}" points="{corners}"/>'

    parts = [f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 20}" y1="{y(loss):.1f}" y2="{y(loss):.1f}"/>'
             f'<text x="{LEFT - 6}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:g}</text>'
             for loss in round_numbers(low, high)]
    parts += [f'<text x="{x(step):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{step:g}</text>'
              for step in range(0, last + 1, int(every))]
    parts += [path(points, "loss"), path(means, "mean")]
    parts += [f'<circle class="held-out" cx="{x(step):.1f}" cy="{y(loss):.1f}" r="3"/>'
              for step, loss in held_out]
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss by step">{"".join(parts)}</svg>'


def table(columns: dict[str, dict[str, float]]) -> str:
    """Columns of percentages by row name, as text."""
    rows = list(next(iter(columns.values())))
    width = max(map(len, rows)) + 2
    lines = [" " * width + "".join(f"{name:>22}" for name in columns)]
    for row in rows:
        cells = (f"{column[row]:>21.1f}%" if row in column else " " * 22 for column in columns.values())
        lines.append(f"{row:<{width}}" + "".join(cells))
    return "\n".join(lines)


def percentages(columns: dict[str, dict[str, float]]) -> str:
    """Columns of percentages by row name as an HTML table with bars."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    lines = []
    for row in next(iter(columns.values())):
        cells = "".join(
            f'<td style="background: linear-gradient(to right, var(--faint) {column[row]:.1f}%, transparent 0)">'
            f"{column[row]:.1f}%</td>" if row in column else "<td></td>" for column in columns.values())
        lines.append(f"<tr><td>{escape(row)}</td>{cells}</tr>")
    return f"<table><tr><th></th>{head}</tr>{''.join(lines)}</table>"


def card(picture: Path | None, told: list[Told]) -> str:
    """A picture, and under it each question with its reply, blue if right and red if wrong."""
    shown, photo = "", False
    if picture:
        image = open_image(picture)
        photo = max(image.size) > THUMBNAIL // 2
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        data, form = io.BytesIO(), "JPEG" if photo else "PNG"  # toy pictures stay sharp
        image.save(data, form)
        shown = f'<img alt="" src="data:image/{form.lower()};base64,{base64.b64encode(data.getvalue()).decode()}">'
    lines = []
    for one in told:
        name, mark = {True: ("right", "✓ "), False: ("wrong", "✗ "), None: ("", "")}[one.right]
        truth = "" if one.right else f'<span class="truth">{escape(one.truth)}</span>'
        lines.append(f"<p><span>{escape(one.question.replace(IMAGE_TOKEN, '').strip())}</span>"
                     f'<span class="{name}">{mark}{escape(one.reply)}</span>{truth}</p>')
    return f'<div class="{"photo" if photo else ""}">{shown}{"".join(lines)}</div>'


def write_report(path: Path, title: str, curves: dict[str, list[dict]], columns=None, cards=()) -> None:
    """Write the page: curves are the rows of a log by their names, columns percentages as for `table`, cards
    pairs of a picture's file, or None, and a list of what was Told about it."""
    parts = [f"<h2>{escape(name)}</h2>{curve(rows)}<p>Loss by step; the thick line is a running mean"
             + (", the dots are held-out data" if any("held_out_loss" in row for row in rows) else "") + ".</p>"
             for name, rows in curves.items() if rows]
    if columns:
        parts.append(f"<h2>Held-out questions</h2>{percentages(columns)}")
    if cards:
        parts.append(f'<h2>Held-out pictures</h2><div class="cards">{"".join(card(*one) for one in cards)}</div>')
    page = (f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width"><title>{escape(title)}</title><style>{STYLE}</style>'
            f"<h1>{escape(title)}</h1>{''.join(parts)}</html>\n")
    with atomic_write(path) as beside:
        beside.write_text(page, encoding="utf-8", errors="replace")
