"""COCO's captions and boxes (Lin et al., 2014), which describe an image to the teacher (section 3).

COCO gives boxes in pixels; the teacher reads them as fractions of the image's width and height.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ..infra.io import InputError, read_json

TYPES = {"id": (int, str), "image_id": (int, str), "category_id": (int, str), "file_name": str,
         "caption": str, "name": str, "bbox": list}


@dataclass
class AnnotatedImage:
    id: str
    file: str
    captions: list[str] = field(default_factory=list)
    # (category, [left, top, right, bottom]), fractions of the width and height from 0 to 1
    boxes: list[tuple[str, list[float]]] = field(default_factory=list)


def read_coco(captions: Path,
              instances: Path | None = None) -> tuple[list[AnnotatedImage], Counter]:
    """The images that have captions, in the order of the file, and what was left out, by reason.

    captions, instances: COCO's captions_*.json and instances_*.json; without the latter the images
    have no boxes. Raises InputError, naming the row, if a file is not in COCO's format.
    """
    images, sizes, left_out = {}, {}, Counter()
    content = read_json(captions)
    for row in check_rows(captions, content, "images", ("id", "file_name")):
        if row["id"] in images:
            left_out["images with a repeated id"] += 1
            continue
        images[row["id"]] = AnnotatedImage(str(row["id"]), row["file_name"])
        sizes[row["id"]] = row.get("width"), row.get("height")
    rows = check_rows(captions, content, "annotations", ("image_id", "caption"))
    for _, row in usable_annotations(rows, images, left_out):
        text = row["caption"].encode("utf-8", "replace").decode()  # an unpaired surrogate: "?"
        if text.strip():
            images[row["image_id"]].captions.append(" ".join(text.split()))
    if instances:
        add_boxes(instances, captions, images, sizes, left_out)
    left_out["images without captions"] = sum(not image.captions for image in images.values())
    return [image for image in images.values() if image.captions], +left_out


def add_boxes(instances: Path, captions: Path, images: dict, sizes: dict,
              left_out: Counter) -> None:
    """Append the boxes of an instances file to the images. Either file may hold the image sizes.

    A crowd annotation is a box around many things; it is left out.
    """
    content = read_json(instances)
    categories = {row["id"]: row["name"]
                  for row in check_rows(instances, content, "categories", ("id", "name"))}
    for row in content.get("images") or []:
        if isinstance(row, dict) and not all(sizes.get(row.get("id"), (1, 1))):
            sizes[row["id"]] = row.get("width"), row.get("height")
    rows = check_rows(instances, content, "annotations", ("image_id", "category_id", "bbox"))
    for number, row in usable_annotations(rows, images, left_out):
        if row.get("iscrowd"):
            left_out["crowd annotations"] += 1
            continue
        where = f"{instances}, annotations row {number}"
        if row["category_id"] not in categories:
            raise InputError(f"{where}: there is no category {row['category_id']}")
        width, height = sizes[row["image_id"]]
        if not width or not height:
            raise InputError(f"{captions}: image {row['image_id']} has boxes, but no width "
                             "and height")
        try:
            box = relative_box(row["bbox"], width, height)
        except (TypeError, ValueError) as error:
            raise InputError(f"{where}: bbox {row['bbox']} is not four numbers, or {width} x "
                             f"{height} is not the size of an image") from error
        images[row["image_id"]].boxes.append((categories[row["category_id"]], box))


def check_rows(path: Path, content, name: str, keys: tuple[str, ...]) -> list[dict]:
    """The list called `name` in a COCO file. Raises InputError unless each row has all `keys`."""
    rows = content.get(name) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise InputError(f"{path} is not a COCO file: it has no list of {name}")
    for number, row in enumerate(rows):
        where = f"{path}, {name} row {number}"
        for key in keys:
            if not isinstance(row, dict) or key not in row:
                raise InputError(f"{where}: it has no '{key}'")
            if not isinstance(row[key], TYPES[key]):
                raise InputError(f"{where}: {key} {row[key]!r} is not valid")
    return rows


def usable_annotations(rows: list[dict], images: dict, left_out: Counter):
    """Yield (row number, annotation) of the listed images; annotations with a repeated id once."""
    seen = set()
    for number, row in enumerate(rows):
        name = row.get("id") if isinstance(row.get("id"), (int, str)) else ("row", number)
        if name in seen:
            left_out["annotations with a repeated id"] += 1
        elif row["image_id"] not in images:
            left_out["annotations of images that are not listed"] += 1
        else:
            yield number, row
        seen.add(name)


def relative_box(bbox, width: int, height: int) -> list[float]:
    """COCO's (left, top, width, height) in pixels to (left, top, right, bottom) from 0 to 1.

    Rounded to three decimals. Raises TypeError or ValueError unless all are finite numbers.
    """
    x, y, w, h = map(float, bbox)
    box = [x / width, y / height, (x + w) / width, (y + h) / height]
    if not all(map(math.isfinite, box)):
        raise ValueError
    return [round(min(max(value, 0.0), 1.0), 3) for value in box]
