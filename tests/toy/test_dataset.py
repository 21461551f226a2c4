import random
from itertools import islice

import pytest

from nanollava.conversation import INSTRUCTION_KINDS
from nanollava.image import open_image
from nanollava.infra.io import InputError, read_json
from nanollava.teacher import prompts
from nanollava.teacher.coco import read_coco
from nanollava.teacher.ledger import Answer, Ledger
from nanollava.toy import dataset, questions, scene


def test_a_caption_tells_the_whole_scene_in_every_style():
    for things in islice(scene.scenes(random.Random(2)), 200):
        for style in range(questions.STYLES):
            assert dataset.read(questions.caption(things, style)) == things


def test_the_toy_teacher_sees_only_text_and_its_replies_parse():
    rng = random.Random(3)
    for things in islice(scene.scenes(rng), 100):
        captions = [questions.caption(things, style) for style in range(questions.STYLES)]
        for kind in INSTRUCTION_KINDS:
            turns = prompts.parse(kind, dataset.toy_teacher(prompts.messages(kind, captions, [])), rng)
            assert turns[0]["value"].count("<image>") == 1 and len(turns) % 2 == 0


def test_a_world_is_coco_and_llava_json_and_the_same_from_the_same_seed(world, tmp_path):
    for name, seed in (("again", 0), ("other", 1)):
        dataset.write_world(tmp_path / name, seed, count=60, tests=10)
    files = ("pretrain.json", "instruct.json", "test.json", "annotations/captions.json", "annotations/instances.json")
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (world / file).read_bytes()
        assert (tmp_path / "other" / file).read_bytes() != (world / file).read_bytes()
    captions, instances = (read_json(world / "annotations" / f"{name}.json") for name in ("captions", "instances"))
    assert len(captions["images"]) == 60 and len(captions["annotations"]) == 60 * questions.STYLES
    for image in captions["images"]:
        assert open_image(world / "images" / image["file_name"]).size == (image["width"], image["height"])
        told = [row["caption"] for row in captions["annotations"] if row["image_id"] == image["id"]]
        boxes = [row for row in instances["annotations"] if row["image_id"] == image["id"]]
        assert len(boxes) == len(dataset.read(told[0]))
    test = read_json(world / "test.json")
    assert {row["type"] for row in test} == set(questions.QUESTIONS)
    assert all(len(row["conversations"]) == 2 for row in test)


def test_the_instructions_are_those_that_a_job_would_buy_from_the_toy_teacher(world, tmp_path):
    """One path: the toy's captions and boxes, asked about with `prepare_data.py instruct`, are the toy's own data."""
    pictures, _ = read_coco(world / "annotations" / "captions.json", world / "annotations" / "instances.json")
    bought = {}
    for kind in INSTRUCTION_KINDS:
        with Ledger(tmp_path / kind) as ledger:
            job = prompts.job(kind, pictures, ledger, "toy", seed=0)
            for picture in pictures:
                job.ask(picture, lambda messages: Answer(dataset.toy_teacher(messages), 0, 0, True), lambda: True)
            bought |= {row["id"]: row for row in job.result()[0] if row}
    written = read_json(world / "instruct.json")
    assert {row["id"].partition("-")[2] for row in written} == set(INSTRUCTION_KINDS)
    assert written == [bought[row["id"]] for row in written]


def test_a_world_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dataset, "write_json", full_disk)
    with pytest.raises(InputError, match="cannot write .*world: No space left"):
        dataset.write_world(tmp_path / "world", count=3, tests=1)
    assert list(tmp_path.iterdir()) == []


def test_the_bench_asks_one_question_of_each_kind_about_pictures_that_no_training_met(tmp_path):
    dataset.write_bench(tmp_path / "bench", count=20)
    test = read_json(tmp_path / "bench" / "test.json")
    assert [row["type"] for row in test] == [*INSTRUCTION_KINDS] * 20
    for row in test[1::3]:  # the detailed description tells the scene
        assert scene.is_held_out(dataset.read(row["conversations"][1]["value"].replace(" there is", "")))
        assert open_image(tmp_path / "bench" / "images" / row["image"]).size == (96, 96)
