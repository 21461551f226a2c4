import random
import zlib
from itertools import islice

import pytest

from nanollava.conversation import INSTRUCTION_KINDS
from nanollava.image import open_image
from nanollava.infra.io import InputError
from nanollava.infra.json_io import read_json
from nanollava.teacher import prompts
from nanollava.teacher.coco import read_coco
from nanollava.teacher.ledger import Answer, Ledger
from nanollava.toy import dataset, questions, scene

CHECKSUMS = {  # of a world with 60 training and 10 validation images, seed 0
    "pretrain.json": 195516982, "instruct.json": 1288941706, "test.json": 3306373732,
    "annotations/captions.json": 3772144563, "annotations/instances.json": 3089421743,
}


def test_parsing_a_caption_of_any_style_gives_the_scene_back():
    for things in islice(scene.random_scenes(random.Random(2)), 200):
        for style in range(questions.CAPTION_STYLES):
            assert dataset.parse_scene(questions.caption(things, style)) == things


def test_replies_of_the_toy_teacher_parse():
    rng = random.Random(3)
    for things in islice(scene.random_scenes(rng), 100):
        captions = [questions.caption(things, style) for style in range(questions.CAPTION_STYLES)]
        for kind in INSTRUCTION_KINDS:
            reply = dataset.toy_teacher(prompts.messages(kind, captions, []))
            turns = prompts.parse(kind, reply, rng)
            assert turns[0]["value"].count("<image>") == 1 and len(turns) % 2 == 0


def test_same_seed_gives_the_same_files(world, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        dataset.write_world(tmp_path / name, seed, count=60, tests=10)
    for file in CHECKSUMS:
        assert (tmp_path / "same" / file).read_bytes() == (world / file).read_bytes()
        assert (tmp_path / "other" / file).read_bytes() != (world / file).read_bytes()


def test_world_is_the_one_of_the_published_results(world):
    """Other sentences or another order of random draws would make results incomparable."""
    checksums = {file: zlib.crc32((world / file).read_bytes()) for file in CHECKSUMS}
    assert checksums == CHECKSUMS


def test_annotations_describe_the_images(world):
    captions = read_json(world / "annotations" / "captions.json")
    instances = read_json(world / "annotations" / "instances.json")
    assert len(captions["images"]) == 60
    assert len(captions["annotations"]) == 60 * questions.CAPTION_STYLES
    for image in captions["images"]:
        size = open_image(world / "images" / image["file_name"]).size
        assert size == (image["width"], image["height"])
        rows, boxes = ([row for row in file["annotations"] if row["image_id"] == image["id"]]
                       for file in (captions, instances))
        assert len(boxes) == len(dataset.parse_scene(rows[0]["caption"]))


def test_test_rows_have_one_question_of_each_type(world):
    rows = read_json(world / "test.json")
    assert {row["type"] for row in rows} == set(questions.QUESTION_TYPES)
    assert len({(row["image"], row["type"]) for row in rows}) == len(rows)
    assert all(len(row["conversations"]) == 2 for row in rows)


def test_instruct_rows_equal_those_of_a_data_engine_job(world, tmp_path):
    """`prepare_data.py instruct` with the toy teacher in place of GPT-4 makes the same rows."""
    annotations = world / "annotations"
    images, _ = read_coco(annotations / "captions.json", annotations / "instances.json")
    from_job = {}
    for kind in INSTRUCTION_KINDS:
        with Ledger(tmp_path / kind) as ledger:
            job = prompts.job(kind, images, ledger, "toy", seed=0)
            for image in images:
                job.ask(image, lambda messages: Answer(dataset.toy_teacher(messages), 0, 0, True),
                        lambda: True)
            from_job |= {row["id"]: row for row in job.result()[0] if row}
    rows = read_json(world / "instruct.json")
    assert {row["id"].partition("-")[2] for row in rows} == set(INSTRUCTION_KINDS)
    assert rows == [from_job[row["id"]] for row in rows]


def test_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dataset, "write_json", full_disk)
    with pytest.raises(InputError, match="cannot write .*world: No space left"):
        dataset.write_world(tmp_path / "world", count=3, tests=1)
    assert list(tmp_path.iterdir()) == []


def test_bench_asks_a_question_of_each_kind_about_validation_scenes(tmp_path):
    dataset.write_bench(tmp_path / "bench", count=20)
    rows = read_json(tmp_path / "bench" / "test.json")
    assert [row["type"] for row in rows] == [*INSTRUCTION_KINDS] * 20
    for row in rows[1::3]:  # the detailed description names all things
        description = row["conversations"][1]["value"].replace(" there is", "")
        assert scene.is_validation_scene(dataset.parse_scene(description))
        assert open_image(tmp_path / "bench" / "images" / row["image"]).size == (96, 96)
