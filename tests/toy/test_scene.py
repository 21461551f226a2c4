import random
from itertools import islice

import numpy as np

from nanollava.toy import questions, scene
from nanollava.toy.scene import Thing

SCENE = (Thing(0, "cat", "red", "big"), Thing(2, "cat", "blue", "small"), Thing(7, "fish", "red", "small"))


def pairs(question, things=SCENE) -> dict[str, str]:
    """All that a type of question can ask about a scene, and the answers."""
    rng = random.Random(0)
    return dict(pair for pair in (question(things, rng) for _ in range(2000)) if pair)


def test_scenes_of_training_and_of_test_never_meet():
    training = set(islice(scene.scenes(random.Random(0)), 3000))
    testing = set(islice(scene.scenes(random.Random(1), held_out=True), 500))
    assert not training & testing


def test_the_answers_are_true():
    assert pairs(questions.ask_kind) == {
        "What is at the top left?": "At the top left is a cat.",
        "What is at the top right?": "At the top right is a cat.",
        "What is at the bottom?": "At the bottom is a fish."}
    assert pairs(questions.ask_color) == {
        "What color is the cat at the top left?": "The cat at the top left is red.",
        "What color is the cat at the top right?": "The cat at the top right is blue.",
        "What color is the fish?": "The fish is red."}
    assert pairs(questions.ask_size) == {
        "Is the red cat big or small?": "The red cat is big.",
        "Is the blue cat big or small?": "The blue cat is small.",
        "Is the fish big or small?": "The fish is small."}
    assert pairs(questions.ask_place) == {
        "Where is the red cat?": "The red cat is at the top left.",
        "Where is the blue cat?": "The blue cat is at the top right.",
        "Where is the fish?": "The fish is at the bottom."}
    places = {"the red cat": "at the top left", "the blue cat": "at the top right", "the fish": "at the bottom"}
    assert pairs(questions.ask_relation) == {
        f"Is {one} {side} {other}?":
            f"{one.capitalize()} is {places[one]} and {other} is {places[other]}, so {verdict}."
        for one, side, other, verdict in [
            ("the red cat", "left or right of", "the blue cat", "left"),
            ("the blue cat", "left or right of", "the red cat", "right"),
            ("the red cat", "left or right of", "the fish", "left"),
            ("the fish", "left or right of", "the red cat", "right"),
            ("the blue cat", "left or right of", "the fish", "right"),
            ("the fish", "left or right of", "the blue cat", "left"),
            ("the red cat", "above or below", "the fish", "above"),
            ("the fish", "above or below", "the red cat", "below"),
            ("the blue cat", "above or below", "the fish", "above"),
            ("the fish", "above or below", "the blue cat", "below")]}


def test_what_is_there_and_what_is_not():
    said = pairs(questions.ask_presence)
    assert said["Is there a cat?"] == "Yes, there is a cat."
    assert said["Is there a red fish?"] == "Yes, there is a red fish."
    assert said["Is there a blue fish?"] == "No, there is no blue fish."
    assert said["Is there a bird?"] == "No, there is no bird."
    rng = random.Random(0)
    verdicts = [questions.ask_presence(things, rng) for things in islice(scene.scenes(rng), 1000)]
    yes = sum(pair[1].startswith("Yes") for pair in verdicts if pair) / sum(map(bool, verdicts))
    assert 0.4 < yes < 0.6  # the question alone gives nothing away


def test_counting_goes_through_all_things_first():
    said = pairs(questions.ask_count)
    seen = "At the top left is a cat, at the top right is a cat and at the bottom is a fish, so"
    assert said["How many things are there?"] == f"{seen} three."
    assert said["How many cats are there?"] == f"{seen} two cats."
    assert said["How many fish are there?"] == f"{seen} one fish."
    assert said["How many cars are there?"] == f"{seen} no cars."


def test_same_color_looks_at_both():
    said = pairs(questions.ask_same_color)
    assert said["Are the fish and the cat at the top left the same color?"] == (
        "The fish is red and the cat at the top left is red, so yes.")
    assert said["Are the fish and the cat at the top right the same color?"].endswith("so no.")


def test_reasoning_is_right():
    assert pairs(questions.ask_farthest)["Which thing is the farthest down?"] == (
        "The red cat is at the top left, the blue cat is at the top right and the fish is at the bottom, so the fish.")
    assert "Which thing is the farthest up?" not in pairs(questions.ask_farthest)  # two are
    assert pairs(questions.ask_left_over)["If the fish went away, what would be left?"] == (
        "Without the fish there would be a red cat and a blue cat.")
    assert pairs(questions.ask_more) == {
        "Are there more cats than fish?": "There are two cats and one fish, so yes.",
        "Are there more fish than cats?": "There is one fish and two cats, so no."}


def test_no_question_names_two_things_at_once():
    """Two cats of one color: each is called by its place, and where the place is asked for, nothing is."""
    twins = (Thing(0, "cat", "red", "big"), Thing(4, "cat", "red", "big"))
    assert set(pairs(questions.ask_size, twins)) == {
        "Is the cat at the top left big or small?", "Is the cat in the middle big or small?"}
    assert pairs(questions.ask_place, twins) == pairs(questions.ask_relation, twins) == {}


def test_things_lie_in_their_cells_and_have_their_colors():
    rng = random.Random(0)
    for things in islice(scene.scenes(rng), 50):
        placed = scene.boxes(things, rng)
        pixels = np.asarray(scene.draw(things, placed, rng)).astype(int)
        for thing, (left, top, width, height) in zip(things, placed):
            row, column = divmod(thing.cell, 3)
            assert 32 * column <= left and left + width <= 32 * column + 32
            assert 32 * row <= top and top + height <= 32 * row + 32
            inside = pixels[top : top + height, left : left + width]
            near = (abs(inside - scene.COLORS[thing.color]) <= 10).all(axis=-1)
            assert near.mean() > 0.15, thing
