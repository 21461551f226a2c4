"""The toy world's data sets, and the teacher that writes them: section 3 of the paper in small.

Captions and boxes of the images are written in COCO's format. Only that text reaches the teacher,
which writes conversations, detailed descriptions and reasoning about it, as the language-only GPT-4
does for the paper.
"""

import random
import re
import zlib
from pathlib import Path

from ..conversation import INSTRUCTION_KINDS
from ..infra.io import atomic_folder
from ..infra.json_io import write_json
from ..infra.progress import progress
from ..teacher import prompts
from ..teacher.captions import pretrain_row
from ..teacher.coco import AnnotatedImage, read_coco
from . import questions, scene

# how many images get instruction data of each kind: the proportions are roughly the paper's (58K,
# 23K and 77K of 158K), but here a conversation is longer than the two others
KIND_RATES = dict(zip(INSTRUCTION_KINDS, (1.0, 0.15, 0.25), strict=True))

# the longest first, or "at the top" would match in "at the top left"
_PLACE = "|".join(sorted(scene.PLACES, key=len, reverse=True))
_THING = re.compile(
    rf"(?:(?P<before>{_PLACE}) )?"
    rf"an? (?P<size>{'|'.join(scene.SIZES)}) (?P<color>{'|'.join(scene.COLORS)}) "
    rf"(?P<kind>{'|'.join(scene.KINDS)})(?: (?P<after>{_PLACE}))?", re.IGNORECASE)


def parse_scene(text: str) -> scene.Scene:
    """The things that captions name together with their places."""
    things = set()
    for match in _THING.finditer(text):
        place = match["before"] or match["after"]
        if place:
            cell = scene.PLACES.index(place.lower())
            things.add(scene.Thing(cell, match["kind"], match["color"], match["size"]))
    return tuple(sorted(things))


def toy_teacher(messages: list[dict]) -> str:
    """The reply to chat messages: a stand-in for GPT-4 that knows only the toy world.

    It reads nothing but the text of the request. Equal requests get equal replies.
    """
    task, request = messages[0]["content"], messages[-1]["content"]
    things, rng = parse_scene(request), random.Random(zlib.crc32(request.encode()))
    if task == prompts.SYSTEM["detail"]:
        return questions.description(things)
    if task == prompts.SYSTEM["reasoning"]:
        pairs = questions.draw_questions(things, rng, 3, tuple(questions.REASONING_TYPES))
    else:
        pairs = questions.draw_questions(things, rng, 8, questions.WEIGHTED_TYPES)
    return "\n===\n".join(
        f"Question:\n{question}\n===\nAnswer:\n{answer}" for question, answer in pairs)


def write_world(folder: str | Path, seed: int = 0, count: int = 8000, tests: int = 300) -> None:
    """Write `count` training images and `tests` validation images with their data to a new folder.

    images/, annotations/captions.json and instances.json as in COCO, and LLaVA JSON: pretrain.json
    (stage 1), instruct.json (stage 2), test.json (one question of every type about each validation
    image, with its `type`). Raises InputError if the folder exists.
    """
    rng = random.Random(seed)
    coco, pretrain, instruction_kinds, test = [], [], [], []
    training, validation = scene.random_scenes(rng), scene.random_scenes(rng, validation=True)
    with atomic_folder(folder) as temporary:
        (temporary / "images").mkdir()
        for number in progress(range(count + tests), "toy world", "images"):
            things = next(training if number < count else validation)
            boxes = scene.random_boxes(things, rng)
            file = f"{'train' if number < count else 'test'}_{number:06d}.png"
            scene.draw_image(things, boxes, rng).save(temporary / "images" / file)
            if number < count:
                captions = questions.captions(things)
                coco.append((file, things, boxes, captions))
                pretrain.append(pretrain_row(number, file, rng.choice(captions), seed))
                instruction_kinds.append(
                    [kind for kind, rate in KIND_RATES.items() if rng.random() < rate])
            else:
                test += [evaluation_row(number, file, *triple)
                         for triple in questions.one_of_each_type(things, rng)]
        write_coco(temporary / "annotations", coco)
        # reading the annotations back, prompting and parsing are the code of real data
        images, _ = read_coco(temporary / "annotations" / "captions.json",
                              temporary / "annotations" / "instances.json")
        instruct = [instruct_row(kind, image, seed)
                    for image, kinds in zip(images, instruction_kinds) for kind in kinds]
        write_json(temporary / "pretrain.json", pretrain)
        write_json(temporary / "instruct.json", instruct)
        write_json(temporary / "test.json", test)


def write_coco(folder: Path, drawn: list[tuple]) -> None:
    """Write captions.json and instances.json; `drawn` has (file, things, boxes, captions)."""
    images, captions, instances = [], [], []
    size, kinds = scene.IMAGE_SIZE, list(scene.KINDS)
    for number, (file, things, boxes, texts) in enumerate(drawn):
        images.append({"id": number, "file_name": file, "width": size, "height": size})
        for text in texts:
            captions.append({"id": len(captions), "image_id": number, "caption": text})
        for thing, box in zip(things, boxes):
            instances.append({
                "id": len(instances), "image_id": number,
                "category_id": 1 + kinds.index(thing.kind),
                "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": number, "name": kind} for number, kind in enumerate(kinds, 1)]
    write_json(folder / "captions.json", {"images": images, "annotations": captions})
    write_json(folder / "instances.json",
               {"images": images, "annotations": instances, "categories": categories})


def instruct_row(kind: str, image: AnnotatedImage, seed: int) -> dict:
    """The toy teacher's instruction data of one kind about an image."""
    reply = toy_teacher(prompts.messages(kind, image.captions, image.boxes))
    return prompts.instruct_row(kind, image, reply, seed)


def random_row(rng: random.Random) -> dict:
    """A row of instruct.json about a new training scene, whose image is not drawn."""
    things = next(scene.random_scenes(rng))
    kind, = rng.choices(list(KIND_RATES), list(KIND_RATES.values()))
    image = AnnotatedImage("scene", "scene.png", questions.captions(things))
    return instruct_row(kind, image, seed=rng.randrange(2**32))


def evaluation_row(number: int, file: str, row_type: str, question: str, answer: str) -> dict:
    """A row of test.json, which has one question."""
    return {"id": f"{number}-{row_type}", "image": file, "type": row_type,
            "conversations": prompts.make_turns([question, answer], image_first=True)}


def write_bench(folder: str | Path, seed: int = 0, count: int = 200) -> None:
    """Write a LLaVA-Bench of the toy world to a new folder, in the format of `write_world`.

    test.json has one question of each of the three instruction kinds about each of `count`
    validation images. The true answers take the place of GPT-4's. Raises InputError if the folder
    exists.
    """
    rng, rows = random.Random(seed), []
    validation = scene.random_scenes(rng, validation=True)
    with atomic_folder(folder) as temporary:
        (temporary / "images").mkdir()
        for number in range(count):
            things, file = next(validation), f"{number:06d}.png"
            image = scene.draw_image(things, scene.random_boxes(things, rng), rng)
            image.save(temporary / "images" / file)
            detail = rng.choice(prompts.DETAILED), questions.description(things)
            simple, = questions.draw_questions(things, rng, 1)
            reasoning, = questions.draw_questions(things, rng, 1, tuple(questions.REASONING_TYPES))
            for kind, pair in zip(INSTRUCTION_KINDS, (simple, detail, reasoning), strict=True):
                rows.append(evaluation_row(number, file, kind, *pair))
        write_json(temporary / "test.json", rows)
