import random
from itertools import islice

import numpy as np

from nanollava.toy import scene


def test_training_and_validation_scenes_do_not_overlap():
    training = set(islice(scene.random_scenes(random.Random(0)), 3000))
    validation = set(islice(scene.random_scenes(random.Random(1), validation=True), 500))
    assert not training & validation


def test_things_lie_inside_their_cells_and_show_their_colors():
    rng = random.Random(0)
    for things in islice(scene.random_scenes(rng), 50):
        boxes = scene.random_boxes(things, rng)
        pixels = np.asarray(scene.draw_image(things, boxes, rng)).astype(int)
        for thing, (left, top, width, height) in zip(things, boxes):
            assert 32 * thing.column <= left and left + width <= 32 * thing.column + 32
            assert 32 * thing.row <= top and top + height <= 32 * thing.row + 32
            inside = pixels[top : top + height, left : left + width]
            near = (abs(inside - scene.COLORS[thing.color]) <= 10).all(axis=-1)
            assert near.mean() > 0.15, thing
