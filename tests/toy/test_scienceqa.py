import random
from itertools import islice

import pytest

from nanollava.benchmarks import scienceqa
from nanollava.image import open_image
from nanollava.infra.io import InputError
from nanollava.toy import dataset, scene
from nanollava.toy.scienceqa import SCENE_PROBLEMS, about_scene, write_problems


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "problems"
    write_problems(folder, seed=0, train=200, tests=150)
    return folder


def test_it_is_read_like_the_real_one(folder):
    for split, count in (("train", 200), ("val", 150), ("test", 150)):
        problems = scienceqa.read_problems(folder, split)
        assert len(problems) == count
        for number, (_, pictures) in scienceqa.questions_with_images(problems, folder / split).items():
            assert all(open_image(picture).size == (96, 96) for picture in pictures)
            assert len(pictures) == bool(problems[number]["image"])
    assert all(scienceqa.score(problems, {})["counts"].values())  # every category of the paper's table has some
    assert all(row["conversations"][1]["value"].count("\n") == 2 for row in scienceqa.read_rows(folder, "train"))


def test_the_right_option_is_what_the_solution_ends_with():
    rng, seen = random.Random(0), set()
    for things in islice(scene.scenes(rng), 500):
        made = about_scene(things, rng)
        if made:
            right = made["choices"][made["answer"]]
            assert made["solution"].endswith(f" {right}.") and made["choices"].count(right) == 1
            assert not any(made["solution"].endswith(f" {choice}.") and len(choice) > len(right)
                           for choice in made["choices"])
            seen.add(made["lecture"])
    assert len(seen) == len(SCENE_PROBLEMS)


def test_the_letter_tells_nothing(folder):
    answers = [problem["answer"] for problem in scienceqa.read_problems(folder, "train").values()]
    assert max(map(answers.count, set(answers))) < 0.6 * len(answers)


def test_training_and_test_never_meet(folder):
    """Told scenes are held out as pictures are, and the rest by its words, in whatever order the options stand."""
    def words(split):
        return {(problem["question"], *sorted(problem["choices"]))
                for problem in scienceqa.read_problems(folder, split).values()
                if not problem["hint"] and not problem["image"]}

    assert not words("train") & words("test")
    for split in ("train", "val", "test"):
        told = [problem["hint"] for problem in scienceqa.read_problems(folder, split).values() if problem["hint"]]
        told = [things for hint in told if len(things := dataset.read(hint)) > 1]
        assert told and all(scene.is_held_out(things) == (split != "train") for things in told)


def test_a_folder_that_is_there_stays(folder):
    with pytest.raises(InputError, match="exists already"):
        write_problems(folder)
