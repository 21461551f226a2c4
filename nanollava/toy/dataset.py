"""The toy world as data sets, and the teacher that writes them: section 3 of the paper, small.

Captions and boxes of the pictures are written down in COCO's format, and *only that text* reaches the teacher, who
writes the conversations, the detailed descriptions and the reasoning that the model is trained on, as the
language-only GPT-4 does for the real thing.
"""

import random
import re
import zlib
from pathlib import Path

from ..conversation import INSTRUCTION_KINDS
from ..infra.io import atomic_folder, write_json
from ..infra.progress import progress
from ..teacher import prompts
from ..teacher.captions import pretrain_row
from ..teacher.coco import read_coco
from . import questions, scene

_PLACE = "|".join(sorted(scene.PLACES, key=len, reverse=True))  # "at the top left" before "at the top"
_THING = re.compile(
    rf"(?:(?P<before>{_PLACE}) )?an? (?P<size>{'|'.join(scene.SIZES)}) (?P<color>{'|'.join(scene.COLORS)}) "
    rf"(?P<kind>{'|'.join(scene.KINDS)})(?: (?P<after>{_PLACE}))?", re.IGNORECASE)


def read(text: str) -> tuple[scene.Thing, ...]:
    """The things that captions speak of, in reading order."""
    things = {scene.Thing(scene.PLACES.index((m["before"] or m["after"]).lower()), m["kind"], m["color"], m["size"])
              for m in _THING.finditer(text) if m["before"] or m["after"]}
    return tuple(sorted(things, key=lambda thing: thing.cell))


def toy_teacher(messages: list[dict]) -> str:
    """A stand-in for the language-only GPT-4 that knows the toy world: chat messages to a reply.

    It sees the text of the request and nothing else, and gives the same reply to the same request.
    """
    request = messages[-1]["content"]
    things, rng = read(request), random.Random(zlib.crc32(request.encode()))
    if messages[0]["content"] == prompts.SYSTEM["detail"]:
        return questions.description(things)
    if messages[0]["content"] == prompts.SYSTEM["reasoning"]:
        asked = questions.ask(things, rng, 3, tuple(questions.REASONING))
    else:
        asked = questions.ask(things, rng, 8, questions.LESSONS)
    return "\n===\n".join(f"Question:\n{question}\n===\nAnswer:\n{answer}" for _, question, answer in asked)


def write_world(folder: str | Path, seed: int = 0, count: int = 8000, tests: int = 300) -> None:
    """Draw a world of `count` training and `tests` test pictures into a new folder, which appears whole.

    images/, annotations/captions.json and instances.json as COCO has them, and LLaVA JSON: pretrain.json (stage 1),
    instruct.json (stage 2) and test.json (one question a row, of every type, with its `type`).
    """
    rng = random.Random(seed)
    images, captions, instances, pretrain, wanted, test = [], [], [], [], [], []
    training, testing = scene.scenes(rng), scene.scenes(rng, held_out=True)
    with atomic_folder(folder) as beside:
        (beside / "images").mkdir()
        for number in progress(range(count + tests), "toy world", "pictures"):
            things = next(training if number < count else testing)
            placed, file = scene.boxes(things, rng), f"{'train' if number < count else 'test'}_{number:06d}.png"
            scene.draw(things, placed, rng).save(beside / "images" / file)
            if number >= count:
                test += held_out_rows(number, file, things, rng)
                continue
            sentences = [questions.caption(things, style) for style in range(questions.STYLES)]
            images.append({"id": number, "file_name": file, "width": scene.PICTURE_SIZE, "height": scene.PICTURE_SIZE})
            for text in sentences:
                captions.append({"id": len(captions), "image_id": number, "caption": text})
            for thing, box in zip(things, placed):
                category = 1 + list(scene.KINDS).index(thing.kind)
                instances.append({"id": len(instances), "image_id": number, "category_id": category,
                                  "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0})
            pretrain.append(pretrain_row(number, file, rng.choice(sentences), seed))
            # the paper's three kinds, about as often as there: 58K, 23K and 77K of 158K, but that here
            # conversations are long and the two others short
            wanted.append([kind for kind, often in zip(INSTRUCTION_KINDS, (1.0, 0.15, 0.25)) if rng.random() < often])
        categories = [{"id": 1 + number, "name": kind} for number, kind in enumerate(scene.KINDS)]
        told = beside / "annotations" / "captions.json", beside / "annotations" / "instances.json"
        write_json(told[0], {"images": images, "annotations": captions})
        write_json(told[1], {"images": images, "annotations": instances, "categories": categories})
        # the teacher is told what GPT-4 would be told: COCO's files, read, asked about and parsed as anybody's
        instruct = []
        for picture, kinds in zip(read_coco(*told)[0], wanted):
            for kind in kinds:
                reply = toy_teacher(prompts.messages(kind, picture.captions, picture.boxes))
                instruct.append(prompts.instruct_row(kind, picture, reply, seed))
        write_json(beside / "pretrain.json", pretrain)
        write_json(beside / "instruct.json", instruct)
        write_json(beside / "test.json", test)


def held_out_rows(number: int, file: str, things, rng: random.Random) -> list[dict]:
    """A question of every type about a picture, each with its `type`."""
    asked = [pair for kind in questions.QUESTIONS for pair in questions.ask(things, rng, 1, (kind,))]
    return [{"id": f"{number}-{kind}", "image": file, "type": kind,
             "conversations": prompts.make_turns([question, answer], image_first=True)}
            for kind, question, answer in asked]


def write_bench(folder: str | Path, seed: int = 0, count: int = 200) -> None:
    """A LLaVA-Bench of the toy world in a new folder: about each of `count` held-out pictures one question of each of
    the three kinds, in test.json as `write_world`'s; a truth takes GPT-4's place."""
    rng, test = random.Random(seed), []
    with atomic_folder(folder) as beside:
        (beside / "images").mkdir()
        for number, things in zip(range(count), scene.scenes(rng, held_out=True)):
            file = f"{number:06d}.png"
            scene.draw(things, scene.boxes(things, rng), rng).save(beside / "images" / file)
            detail = (rng.choice(prompts.DETAILED), questions.description(things))
            asked = (questions.ask(things, rng, 1)[0][1:], detail, questions.ask(things, rng, 1, tuple(questions.REASONING))[0][1:])
            test += [{"id": f"{number}-{kind}", "image": file, "type": kind,
                      "conversations": prompts.make_turns(list(pair), image_first=True)}
                     for kind, pair in zip(INSTRUCTION_KINDS, asked)]
        write_json(beside / "test.json", test)
