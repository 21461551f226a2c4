import random
import zlib
from itertools import islice

import pytest

from nanollava.benchmarks import scienceqa
from nanollava.image import open_image
from nanollava.infra.io import InputError
from nanollava.toy import dataset, scene
from nanollava.toy.scienceqa import SCENE_PROBLEMS, scene_problem, write_problems


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "problems"
    write_problems(folder, seed=0, train=200, tests=150)
    return folder


def test_problems_are_read_as_the_real_ones_are(folder):
    for split, count in (("train", 200), ("val", 150), ("test", 150)):
        problems = scienceqa.read_problems(folder, split)
        assert len(problems) == count
        questions = scienceqa.questions_with_images(problems, folder / split)
        for number, (_, images) in questions.items():
            assert len(images) == bool(problems[number]["image"])
            assert all(open_image(image).size == (96, 96) for image in images)
        counts = scienceqa.score(problems, {})["counts"]
        assert all(counts.values())  # every category of the paper's table is present
    for row in scienceqa.read_rows(folder, "train"):
        lecture, solution, letter = row["conversations"][1]["value"].split("\n")
        assert letter.startswith("The answer is ")


def test_problems_are_those_of_the_published_results(folder):
    assert zlib.crc32((folder / "problems.json").read_bytes()) == 476176148


def test_solution_ends_with_exactly_one_option_the_right_one():
    rng, lectures = random.Random(0), set()
    for things in islice(scene.random_scenes(rng), 500):
        problem = scene_problem(things, rng)
        if problem:
            fitting = [number for number, choice in enumerate(problem["choices"])
                       if problem["solution"].endswith(f" {choice}.")]
            assert fitting == [problem["answer"]]
            lectures.add(problem["lecture"])
    assert len(lectures) == len(SCENE_PROBLEMS)


def test_letters_cannot_be_guessed(folder):
    problems = scienceqa.read_problems(folder, "train").values()
    answers = [problem["answer"] for problem in problems]
    assert max(map(answers.count, set(answers))) < 0.6 * len(answers)


def test_problems_about_words_differ_between_training_and_test(folder):
    def contents(split):
        problems = scienceqa.read_problems(folder, split).values()
        return {(problem["question"], *sorted(problem["choices"])) for problem in problems
                if not problem["hint"] and not problem["image"]}

    assert contents("train") and contents("test")
    assert not contents("train") & contents("test")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_scenes_given_as_text_are_split_as_images_are(folder, split):
    problems = scienceqa.read_problems(folder, split).values()
    scenes = [dataset.parse_scene(problem["hint"]) for problem in problems]
    scenes = [things for things in scenes if len(things) > 1]  # one thing is a problem about words
    assert scenes
    assert all(scene.is_validation_scene(things) == (split != "train") for things in scenes)


def test_existing_folder_is_not_overwritten(folder):
    with pytest.raises(InputError, match="exists already"):
        write_problems(folder)
