"""COCO's captions and boxes (Lin et al., 2014), which describe an image to the teacher (section 3).

COCO gives boxes in pixels; the teacher reads them as fractions of the image's width and height.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ..infra.io import InputError
from ..infra.json_io import read_json
from ..infra.shapes import quote

ID = int | str
SIZES = {"id": ID, "width?": float, "height?": float}
CAPTIONS = {"images": [{"file_name": str, **SIZES}],
            "annotations": [{"image_id": ID, "caption": str}]}
INSTANCES = {"images?": [SIZES], "categories": [{"id": ID, "name": str}],
             "annotations": [{"image_id": ID, "category_id": ID, "bbox": [float] * 4}]}


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
    content = read_json(captions, CAPTIONS)
    for row in content["images"]:
        if row["id"] in images:
            left_out["images with a repeated id"] += 1
            continue
        images[row["id"]] = AnnotatedImage(str(row["id"]), row["file_name"])
        sizes[row["id"]] = row.get("width"), row.get("height")
    for _, row in listed_annotations(content, images, left_out):
        text = row["caption"].encode("utf-8", "replace").decode()  # an unpaired surrogate: "?"
        if text.strip():
            images[row["image_id"]].captions.append(" ".join(text.split()))
        else:
            left_out["empty captions"] += 1
    if instances:
        add_boxes(instances, captions, images, sizes, left_out)
    left_out["images without captions"] = sum(not image.captions for image in images.values())
    return [image for image in images.values() if image.captions], +left_out


def add_boxes(instances: Path, captions: Path, images: dict, sizes: dict,
              left_out: Counter) -> None:
    """Append the boxes of an instances file to the images. Either file may hold the image sizes.

    A crowd annotation is a box around many things; it is left out.
    """
    content = read_json(instances, INSTANCES)
    categories = {row["id"]: row["name"] for row in content["categories"]}
    for row in content.get("images") or []:
        if not all(sizes.get(row["id"], (1, 1))):
            sizes[row["id"]] = row.get("width"), row.get("height")
    for number, row in listed_annotations(content, images, left_out):
        if row.get("iscrowd"):
            left_out["crowd annotations"] += 1
            continue
        if row["category_id"] not in categories:
            raise InputError(f"{instances}: annotations[{number}] has the category "
                             f"{quote(row['category_id'])}, which is not listed")
        width, height = sizes[row["image_id"]]
        if not (width and height and min(width, height) >= 1):
            raise InputError(f"{captions}: image {quote(row['image_id'])} has boxes, but no width "
                             "and height")
        box = relative_box(row["bbox"], width, height)
        images[row["image_id"]].boxes.append((categories[row["category_id"]], box))


def listed_annotations(content: dict, images: dict, left_out: Counter):
    """Yield (row number, annotation) for the images that are listed.

    Ids of annotations do not matter: some exporters restart them for each image.
    """
    for number, row in enumerate(content["annotations"]):
        if row["image_id"] in images:
            yield number, row
        else:
            left_out["annotations of images that are not listed"] += 1


def relative_box(bbox, width: int, height: int) -> list[float]:
    """COCO's (left, top, width, height) in pixels to (left, top, right, bottom) from 0 to 1.

    Rounded to three decimals.
    """
    x, y, w, h = map(float, bbox)
    box = [x / width, y / height, (x + w) / width, (y + h) / height]
    return [round(min(max(value, 0.0), 1.0), 3) for value in box]
