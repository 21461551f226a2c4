"""COCO's captions.json and instances.json (Lin et al., 2014), as the teacher needs them: words and shares of a side."""

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ..infra.io import InputError, read_json


@dataclass
class Picture:
    id: str
    file: str
    captions: list[str] = field(default_factory=list)
    boxes: list[tuple[str, list[float]]] = field(default_factory=list)  # (kind, [left, top, right, bottom], 0 to 1)


TYPES = {"id": (int, str), "image_id": (int, str), "category_id": (int, str), "file_name": str, "caption": str,
         "name": str, "bbox": list}


def table(path: Path, content, name: str, keys: tuple[str, ...]) -> list[dict]:
    """The rows under a name of a COCO file, each with all `keys`. Raises InputError, naming the row, where not."""
    rows = content.get(name) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise InputError(f"{path} is no COCO file: it has no list of {name}")
    for number, row in enumerate(rows):
        lacking = [key for key in keys if not isinstance(row, dict) or key not in row]
        if lacking:
            raise InputError(f"{path}, {name} row {number}: it has no '{lacking[0]}'")
        for key in keys:
            if not isinstance(row[key], TYPES[key]):
                raise InputError(f"{path}, {name} row {number}: {key} {row[key]!r} cannot be right")
    return rows


def shares(bbox, width: int, height: int) -> list[float]:
    """COCO's box in pixels (left, top, width, height) to (left, top, right, bottom) from 0 to 1, three decimals."""
    x, y, w, h = map(float, bbox)
    box = [x / width, y / height, (x + w) / width, (y + h) / height]
    if not all(map(math.isfinite, box)):
        raise ValueError
    return [round(min(max(share, 0.0), 1.0), 3) for share in box]


def read_coco(captions: Path, instances: Path | None = None) -> tuple[list[Picture], Counter]:
    """The pictures that have captions, in the order of the file, and a count of what was left out and why.

    Crowds have no box of one thing and are left out; an annotation whose id came before is the same one again.
    """
    content = read_json(captions)
    pictures, sizes, left_out = {}, {}, Counter()
    for row in table(captions, content, "images", ("id", "file_name")):
        if row["id"] in pictures:
            left_out["pictures with an id that came before"] += 1
            continue
        pictures[row["id"]] = Picture(str(row["id"]), row["file_name"])
        sizes[row["id"]] = row.get("width"), row.get("height")

    def annotations(path, content, keys):
        seen = set()
        for number, row in enumerate(table(path, content, "annotations", ("image_id", *keys))):
            name = row.get("id") if isinstance(row.get("id"), (int, str)) else ("row", number)
            if name in seen:
                left_out["annotations with an id that came before"] += 1
            elif row["image_id"] not in pictures:
                left_out["annotations of pictures that are not listed"] += 1
            else:
                yield number, row
            seen.add(name)

    for _, row in annotations(captions, content, ("caption",)):
        text = " ".join(row["caption"].encode("utf-8", "replace").decode().split())  # half a character is "?"
        if text:
            pictures[row["image_id"]].captions.append(text)

    if instances:
        content = read_json(instances)
        names = {row["id"]: row["name"] for row in table(instances, content, "categories", ("id", "name"))}
        for row in content.get("images") or []:
            if isinstance(row, dict) and not all(sizes.get(row.get("id"), (1, 1))):
                sizes[row["id"]] = row.get("width"), row.get("height")
        for number, row in annotations(instances, content, ("category_id", "bbox")):
            if row.get("iscrowd"):
                left_out["crowds"] += 1
                continue
            if row["category_id"] not in names:
                raise InputError(f"{instances}, annotations row {number}: no category {row['category_id']}")
            width, height = sizes[row["image_id"]]
            if not width or not height:
                raise InputError(f"{captions}: image {row['image_id']} has boxes, but no width and height")
            try:
                box = shares(row["bbox"], width, height)
            except (TypeError, ValueError) as error:
                raise InputError(f"{instances}, annotations row {number}: bbox {row['bbox']} is not four numbers, or "
                                 f"{width} by {height} is no size of a picture") from error
            pictures[row["image_id"]].boxes.append((names[row["category_id"]], box))

    left_out["pictures without captions"] = sum(not picture.captions for picture in pictures.values())
    return [picture for picture in pictures.values() if picture.captions], +left_out
