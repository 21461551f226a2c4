"""The toy world as data sets, and the teacher that writes them: section 3 of the paper, small.

Captions and boxes of the pictures are written down in COCO's format, and *only that text* reaches the teacher, who
writes the conversations, the detailed descriptions and the reasoning that the model is trained on, as the
language-only GPT-4 does for the real thing.
"""

import random
import re
import zlib
from pathlib import Path

from . import teacher, toy
from .captions import pretrain_row
from .coco import read_coco
from .conversation import INSTRUCTION_KINDS
from .files import new_folder, write_json
from .progress import progress

_PLACE = "|".join(sorted(toy.PLACES, key=len, reverse=True))  # "at the top left" before "at the top"
_THING = re.compile(
    rf"(?:(?P<before>{_PLACE}) )?an? (?P<size>{'|'.join(toy.SIZES)}) (?P<color>{'|'.join(toy.COLORS)}) "
    rf"(?P<kind>{'|'.join(toy.KINDS)})(?: (?P<after>{_PLACE}))?", re.IGNORECASE)


def read(text: str) -> tuple[toy.Thing, ...]:
    """The things that captions speak of, in reading order."""
    things = {toy.Thing(toy.PLACES.index((m["before"] or m["after"]).lower()), m["kind"], m["color"], m["size"])
              for m in _THING.finditer(text) if m["before"] or m["after"]}
    return tuple(sorted(things, key=lambda thing: thing.cell))


def toy_teacher(messages: list[dict]) -> str:
    """A stand-in for the language-only GPT-4 that knows the toy world: chat messages to a reply.

    It sees the text of the request and nothing else, and gives the same reply to the same request.
    """
    request = messages[-1]["content"]
    things, rng = read(request), random.Random(zlib.crc32(request.encode()))
    if messages[0]["content"] == teacher.SYSTEM["detail"]:
        return toy.description(things)
    if messages[0]["content"] == teacher.SYSTEM["reasoning"]:
        asked = toy.ask(things, rng, 3, tuple(toy.REASONING))
    else:
        asked = toy.ask(things, rng, 8, toy.LESSONS)
    return "\n===\n".join(f"Question:\n{question}\n===\nAnswer:\n{answer}" for _, question, answer in asked)


def write_world(folder: str | Path, seed: int = 0, count: int = 8000, tests: int = 300) -> None:
    """Draw a world of `count` training and `tests` test pictures into a new folder, which appears whole.

    images/, annotations/captions.json and instances.json as COCO has them, and LLaVA JSON: pretrain.json (stage 1),
    instruct.json (stage 2) and test.json (one question a row, of every type, with its `type`).
    """
    rng = random.Random(seed)
    images, captions, instances, pretrain, wanted, test = [], [], [], [], [], []
    training, testing = toy.scenes(rng), toy.scenes(rng, held_out=True)
    with new_folder(folder) as beside:
        (beside / "images").mkdir()
        for number in progress(range(count + tests), "toy world", "pictures"):
            things = next(training if number < count else testing)
            placed, file = toy.boxes(things, rng), f"{'train' if number < count else 'test'}_{number:06d}.png"
            toy.draw(things, placed, rng).save(beside / "images" / file)
            if number >= count:
                test += held_out_rows(number, file, things, rng)
                continue
            sentences = [toy.caption(things, style) for style in range(toy.STYLES)]
            images.append({"id": number, "file_name": file, "width": toy.PICTURE_SIZE, "height": toy.PICTURE_SIZE})
            for text in sentences:
                captions.append({"id": len(captions), "image_id": number, "caption": text})
            for thing, box in zip(things, placed):
                category = 1 + list(toy.KINDS).index(thing.kind)
                instances.append({"id": len(instances), "image_id": number, "category_id": category,
                                  "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0})
            pretrain.append(pretrain_row(number, file, rng.choice(sentences), seed))
            # the paper's three kinds, about as often as there: 58K, 23K and 77K of 158K, but that here
            # conversations are long and the two others short
            wanted.append([kind for kind, often in zip(INSTRUCTION_KINDS, (1.0, 0.15, 0.25)) if rng.random() < often])
        categories = [{"id": 1 + number, "name": kind} for number, kind in enumerate(toy.KINDS)]
        told = beside / "annotations" / "captions.json", beside / "annotations" / "instances.json"
        write_json(told[0], {"images": images, "annotations": captions})
        write_json(told[1], {"images": images, "annotations": instances, "categories": categories})
        # the teacher is told what GPT-4 would be told: COCO's files, read, asked about and parsed as anybody's
        instruct = []
        for picture, kinds in zip(read_coco(*told)[0], wanted):
            for kind in kinds:
                reply = toy_teacher(teacher.messages(kind, picture.captions, picture.boxes))
                instruct.append(teacher.row(kind, picture, reply, seed))
        write_json(beside / "pretrain.json", pretrain)
        write_json(beside / "instruct.json", instruct)
        write_json(beside / "test.json", test)


def held_out_rows(number: int, file: str, things, rng: random.Random) -> list[dict]:
    """A question of every type about a picture, each with its `type`."""
    asked = [pair for kind in toy.QUESTIONS for pair in toy.ask(things, rng, 1, (kind,))]
    return [{"id": f"{number}-{kind}", "image": file, "type": kind,
             "conversations": teacher.conversation([question, answer], picture_first=True)}
            for kind, question, answer in asked]


def write_bench(folder: str | Path, seed: int = 0, count: int = 200) -> None:
    """A LLaVA-Bench of the toy world in a new folder: about each of `count` held-out pictures one question of each of
    the three kinds, in test.json as `write_world`'s; a truth takes GPT-4's place."""
    rng, test = random.Random(seed), []
    with new_folder(folder) as beside:
        (beside / "images").mkdir()
        for number, things in zip(range(count), toy.scenes(rng, held_out=True)):
            file = f"{number:06d}.png"
            toy.draw(things, toy.boxes(things, rng), rng).save(beside / "images" / file)
            detail = (rng.choice(teacher.DETAILED), toy.description(things))
            asked = (toy.ask(things, rng, 1)[0][1:], detail, toy.ask(things, rng, 1, tuple(toy.REASONING))[0][1:])
            test += [{"id": f"{number}-{kind}", "image": file, "type": kind,
                      "conversations": teacher.conversation(list(pair), picture_first=True)}
                     for kind, pair in zip(INSTRUCTION_KINDS, asked)]
        write_json(beside / "test.json", test)
