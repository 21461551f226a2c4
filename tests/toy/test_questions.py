import random
from itertools import islice

from nanollava.toy import questions, scene
from nanollava.toy.scene import Thing

SCENE = (
    Thing(0, "cat", "red", "big"), Thing(2, "cat", "blue", "small"),
    Thing(7, "fish", "red", "small"),
)


def all_pairs(ask, things=SCENE) -> dict[str, str]:
    """Every question that a type can ask about a scene, with its answer."""
    rng = random.Random(0)
    return dict(pair for pair in (ask(things, rng) for _ in range(2000)) if pair)


def test_kind_color_size_and_place_are_answered_correctly():
    assert all_pairs(questions.ask_kind) == {
        "What is at the top left?": "At the top left is a cat.",
        "What is at the top right?": "At the top right is a cat.",
        "What is at the bottom?": "At the bottom is a fish."}
    assert all_pairs(questions.ask_color) == {
        "What color is the cat at the top left?": "The cat at the top left is red.",
        "What color is the cat at the top right?": "The cat at the top right is blue.",
        "What color is the fish?": "The fish is red."}
    assert all_pairs(questions.ask_size) == {
        "Is the red cat big or small?": "The red cat is big.",
        "Is the blue cat big or small?": "The blue cat is small.",
        "Is the fish big or small?": "The fish is small."}
    assert all_pairs(questions.ask_place) == {
        "Where is the red cat?": "The red cat is at the top left.",
        "Where is the blue cat?": "The blue cat is at the top right.",
        "Where is the fish?": "The fish is at the bottom."}


def test_relations_are_answered_correctly():
    places = {"the red cat": "at the top left", "the blue cat": "at the top right",
              "the fish": "at the bottom"}
    assert all_pairs(questions.ask_relation) == {
        f"Is {first} {relation} {second}?":
            f"{first.capitalize()} is {places[first]} and {second} is {places[second]}, "
            f"so {verdict}."
        for first, relation, second, verdict in [
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


def test_presence_questions_are_answered_correctly_and_half_of_them_with_yes():
    pairs = all_pairs(questions.ask_presence)
    assert pairs["Is there a cat?"] == "Yes, there is a cat."
    assert pairs["Is there a red fish?"] == "Yes, there is a red fish."
    assert pairs["Is there a blue fish?"] == "No, there is no blue fish."
    assert pairs["Is there a bird?"] == "No, there is no bird."
    rng = random.Random(0)
    pairs = [questions.ask_presence(things, rng)
             for things in islice(scene.random_scenes(rng), 1000)]
    yes = [answer.startswith("Yes") for _, answer in filter(None, pairs)]
    assert 0.4 < sum(yes) / len(yes) < 0.6


def test_count_answers_first_list_what_they_count():
    pairs = all_pairs(questions.ask_count)
    assert pairs["How many things are there?"] == (
        "At the top left is a cat, at the top right is a cat and at the bottom is a fish, "
        "so three.")
    assert pairs["How many cats are there?"] == (
        "At the top left is a cat and at the top right is a cat, so two cats.")
    assert pairs["How many fish are there?"] == "At the bottom is a fish, so one fish."
    assert pairs["How many cars are there?"] == "There are no cars."


def test_same_color_answers_state_both_colors_first():
    pairs = all_pairs(questions.ask_same_color)
    assert pairs["Are the fish and the cat at the top left the same color?"] == (
        "The fish is red and the cat at the top left is red, so yes.")
    assert pairs["Are the fish and the cat at the top right the same color?"].endswith("so no.")


def test_reasoning_is_correct():
    pairs = all_pairs(questions.ask_farthest)
    assert pairs["Which thing is the farthest down?"] == (
        "The red cat is at the top left, the blue cat is at the top right and the fish is at the "
        "bottom, so the fish.")
    assert "Which thing is the farthest up?" not in pairs  # the two cats are equally far up
    pairs = all_pairs(questions.ask_left_over)
    assert pairs["If the fish went away, what would be left?"] == (
        "Without the fish there would be a red cat and a blue cat.")
    assert all_pairs(questions.ask_more) == {
        "Are there more cats than fish?": "There are two cats and one fish, so yes.",
        "Are there more fish than cats?": "There is one fish and two cats, so no."}


def test_names_in_questions_are_unambiguous():
    """Two red cats are told apart by their places, so no question can ask for a place."""
    twins = (Thing(0, "cat", "red", "big"), Thing(4, "cat", "red", "big"))
    assert set(all_pairs(questions.ask_size, twins)) == {
        "Is the cat at the top left big or small?", "Is the cat in the middle big or small?"}
    assert all_pairs(questions.ask_place, twins) == {}
    assert all_pairs(questions.ask_relation, twins) == {}


def test_drawn_questions_are_different_and_of_the_requested_types():
    possible = all_pairs(questions.ask_kind) | all_pairs(questions.ask_farthest)
    drawn = questions.draw_questions(SCENE, random.Random(0), 3, ("kind", "farthest"))
    assert len(dict(drawn)) == 3 and set(drawn) <= set(possible.items())
    assert len(questions.draw_questions(SCENE, random.Random(0), 9, ("kind",))) == 3


def test_test_questions_are_one_of_each_type_that_the_scene_allows():
    for things in (SCENE, SCENE[:1]):
        types = {question_type: (question, answer) for question_type, question, answer
                 in questions.one_of_each_type(things, random.Random(0))}
        asked = {name: all_pairs(ask, things) for name, ask in questions.QUESTION_TYPES.items()}
        assert types.keys() == {name for name, pairs in asked.items() if pairs}
        assert all(pair in asked[name].items() for name, pair in types.items())
