import pytest

from nanollava.benchmarks.answers import answer_all, read_answers
from nanollava.infra.io import InputError
from tests.test_chat import FixedReply


def test_answers_are_saved_and_not_made_twice(model, tokenizer, world, tmp_path):
    image, path = world / "images" / "train_000000.png", tmp_path / "out" / "answers.jsonl"
    questions = {str(number): (f"<image>\nNumber {number}?", [image]) for number in range(3)}
    questions["x"] = ("Hi", [])
    expected = dict.fromkeys(questions, "A cat.")
    model.generate = FixedReply(*[tokenizer.encode("A cat.") + [tokenizer.eos_id]] * 2)
    assert answer_all(model, tokenizer, questions, path, batch_size=2) == expected
    assert read_answers(path) == expected
    model.generate = None  # would fail if it were called
    assert answer_all(model, tokenizer, questions, path, batch_size=2) == expected


def test_answers_made_by_another_program_are_read(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"question_id": 7, "text": "B", "model": "x"}\n'
                    '{"question_id": "8", "text": "C"}\n{"question_id": 7, "text": "D"}\n')
    assert read_answers(path) == {"7": "D", "8": "C"}


def test_answer_without_text_is_an_error(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"question_id": 7, "text": "B"}\n{"question_id": 7}\n')
    with pytest.raises(InputError, match="line 2 lacks text"):
        read_answers(path)
