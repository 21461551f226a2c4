"""Files of answers: a reply counts for what was asked, and a killed run asks nothing twice."""

import json
import shutil

import pytest

from nanollava.benchmarks import answers
from nanollava.benchmarks.answers import answer_all, read_answers
from nanollava.infra.io import InputError


@pytest.fixture
def questions(world, tmp_path):
    image = tmp_path / "image.png"
    shutil.copy(world / "images" / "train_000000.png", image)
    questions = {str(number): (f"<image>\nNumber {number}?", [image]) for number in range(3)}
    return questions | {"x": ("Hi", [])}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out" / "answers.jsonl"


@pytest.fixture
def answer(model, tokenizer, questions, path, monkeypatch):
    """answer("A cat.") -> the replies of a model that says so, and which questions it is asked."""

    def run(reply: str, questions=questions, weights="w") -> tuple[dict, int]:
        before = path.read_text().count("\n") if path.exists() else 0
        monkeypatch.setattr(answers, "generate_replies", lambda model, tokenizer, prompts, *_:
                            ((number, reply) for number, _ in enumerate(prompts)))
        replies = answer_all(model, tokenizer, questions, path, batch_size=2, weights=weights)
        return replies, path.read_text().count("\n") - before

    return run


def test_answers_are_saved_and_not_made_twice(answer, questions, path, capsys):
    expected = dict.fromkeys(questions, "A cat.")
    assert answer("A cat.") == (expected, 4)
    assert answer("A dog.") == (expected, 0)
    assert read_answers(path, questions) == expected
    assert str(path) not in capsys.readouterr().err


@pytest.mark.parametrize("change", ["question", "image", "weights"])
def test_reply_to_something_else_with_the_same_id_is_not_used(answer, questions, path, change,
                                                              capsys, world):
    cats, _ = answer("A cat.")
    other, weights = dict(questions), "w"
    if change == "question":
        other["1"] = ("<image>\nAnother?", questions["1"][1])
        assert read_answers(path, other) == dict.fromkeys(("0", "2", "x"), "A cat.")
    elif change == "image":
        shutil.copy(world / "images" / "train_000001.png", questions["1"][1][0])
    else:
        weights = "v"
    count = {"question": 1, "image": 3, "weights": 4}[change]
    capsys.readouterr()
    replies, asked = answer("A dog.", other, weights)
    assert asked == count == list(replies.values()).count("A dog.")
    assert f"{path}: {count} replies are not used" in capsys.readouterr().err
    if change != "image":  # both models' replies stay in the file
        assert answer("A bird.") == (cats, 0)


def test_answers_made_by_another_program_are_read_by_id(answer, questions, path, capsys):
    path.parent.mkdir()
    path.write_text('{"question_id": 1, "text": "B", "model": "x", "prompt": "?"}\n'
                    '{"question_id": "2", "text": "C"}\n{"question_id": 1, "text": "D"}\n'
                    '{"question_id": "other", "text": "E"}\n')
    assert read_answers(path, questions) == {"1": "D", "2": "C"}
    assert f"{path}: 2 replies are taken by question id" in capsys.readouterr().err
    assert answer("A cat.") == ({"0": "A cat.", "1": "D", "2": "C", "x": "A cat."}, 2)


@pytest.mark.parametrize("end, asked", [("", 1), ('{"question_id": "1", "te', 1), ("   ", 1),
                                        ('{"question_id": "1", "text": "B\u2028\u0085"}', 0)])
def test_file_of_a_killed_run_is_continued(answer, questions, path, end, asked):
    path.parent.mkdir()
    rows = [json.dumps({"question_id": key, "text": "A"}) + "\n" for key in ("0", "2", "x")]
    path.write_text("".join(rows) + end, encoding="utf-8")
    replies, count = answer("A cat.")
    assert len(replies) == 4 and count == asked + (asked == 0)  # or the newline that was missing
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["question_id"] for line in lines[:-1]] == ["0", "2", "x", "1"]


def test_question_that_fills_the_context_stays_unanswered(answer, model, questions, path, capsys):
    model.config.text.max_position_embeddings = 200
    long = questions | {"1": ("word " * 300, [])}
    replies, asked = answer("A cat.", long)
    assert replies.keys() == {"0", "2", "x"} and asked == 3
    assert "question 1 stays unanswered: the conversation has" in capsys.readouterr().err


@pytest.mark.parametrize("row, message", [
    ({"question_id": 7}, "line 2: it has no 'text'"),
    ({"question_id": 7, "text": None}, "line 2: text must be a string, not null"),
    ({"question_id": [], "text": "B"}, "line 2: question_id must be")])
def test_row_that_is_not_an_answer_is_named(questions, tmp_path, row, message):
    (tmp_path / "a").write_text('{"question_id": 7, "text": "B"}\n' + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=message):
        read_answers(tmp_path / "a", questions)
    with pytest.raises(InputError, match="cannot read .*none"):
        read_answers(tmp_path / "none", questions)
