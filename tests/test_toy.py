import random
from itertools import islice

from nanollava import teacher, toy


def test_scenes_of_training_and_of_test_never_meet():
    training = set(islice(toy.scenes(random.Random(0)), 3000))
    testing = set(islice(toy.scenes(random.Random(1), held_out=True), 500))
    assert not training & testing


def test_a_caption_tells_the_whole_scene_in_every_style():
    for things in islice(toy.scenes(random.Random(2)), 200):
        for style in range(toy.STYLES):
            assert toy.read(toy.caption(things, style)) == things


def test_the_toy_teacher_sees_only_text_and_its_replies_parse():
    rng = random.Random(3)
    for things in islice(toy.scenes(rng), 100):
        captions = [toy.caption(things, style) for style in range(toy.STYLES)]
        for kind in teacher.KINDS:
            turns = teacher.parse(kind, toy.toy_teacher(teacher.messages(kind, captions, [])), rng)
            assert turns[0]["value"].count("<image>") == 1 and len(turns) % 2 == 0
