import os

import pytest
import torch

from nanollava.chat import answer_all, open_llava, prompts, read_answers, replies, stream
from nanollava.infra.io import InputError

QUESTION = [{"from": "human", "value": "<image>\nWhat is there?"}]


class Parrot:
    """In the place of a model's `generate`: says the given tokens, whatever it is asked."""

    def __init__(self, *rows):
        self.rows = rows

    def __call__(self, tokens, *_, eos_id=None, **__):
        for step in range(max(map(len, self.rows))):
            yield torch.tensor([row[step] if step < len(row) else eos_id or 0 for row in self.rows])


def test_a_reply_ends_at_eos(model, tokenizer):
    model.generate = Parrot(tokenizer.encode("A red cat.") + [2], tokenizer.encode("No.") + [2])
    assert replies(model, tokenizer, [QUESTION] * 2, pictures=torch.zeros(2, 16, 32)) == ["A red cat.", "No."]


def test_a_reply_of_template_v0_ends_at_its_text(model, tokenizer):
    model.config.template = "v0"
    model.generate = Parrot(tokenizer.encode("A cat. ###Human: And now?"))
    assert replies(model, tokenizer, [QUESTION], pictures=torch.zeros(1, 16, 32)) == ["A cat."]
    assert "".join(stream(model, tokenizer, QUESTION, [torch.zeros(3, 32, 32)])) == "A cat."


def test_a_stream_is_the_reply_in_pieces(model, tokenizer):
    model.generate = Parrot(tokenizer.encode("A red cat.") + [2])
    pieces = list(stream(model, tokenizer, QUESTION, [torch.zeros(3, 32, 32)]))
    assert len(pieces) > 3 and "".join(pieces) == "A red cat."


def test_a_reply_ends_where_the_model_can_read_no_further(model, tokenizer):
    model.config.text.max_position_embeddings = 60
    heard = []
    model.generate = lambda tokens, pixels, max_new_tokens, *_: heard.append((tokens.shape[1], max_new_tokens)) or []
    list(stream(model, tokenizer, QUESTION, [torch.zeros(3, 32, 32)]))
    (length, room), = heard
    assert length + room == 60
    model.config.text.max_position_embeddings = length
    with pytest.raises(InputError, match=f"{length} tokens, the model reads {length} at most: begin a new one"):
        list(stream(model, tokenizer, QUESTION, [torch.zeros(3, 32, 32)]))


def test_what_does_not_fit_the_memory_stays_as_it_is_and_says_the_same(model, tokenizer, tmp_path, monkeypatch, capsys):
    model.save_pretrained(tmp_path, [tokenizer.path], torch.bfloat16)
    images, said = torch.randn(1, 3, 32, 32), []
    for memory in (10**9, 0):
        monkeypatch.setattr(os, "sysconf", lambda name: memory)
        opened, _ = open_llava(tmp_path, torch.float32, "cpu")
        said.append(replies(opened, tokenizer, [QUESTION], images, max_new_tokens=12))
        assert {p.dtype for p in opened.parameters()} == {torch.float32 if memory else torch.bfloat16}
    assert said[0] == said[1] and "stays as it is on the disk" in capsys.readouterr().err


def test_a_batch_of_ragged_prompts_says_what_each_says_alone(model, tokenizer):
    questions = ["<image>\nWhat is there?", "Hello, who are you and what can you see?", "<image>\n<image>\nSame?"]
    turns = [[{"from": "human", "value": question}] for question in questions]
    images = torch.randn(3, 3, 32, 32)
    together = replies(model, tokenizer, turns, images, max_new_tokens=12)
    alone = [replies(model, tokenizer, turns[:1], images[:1], max_new_tokens=12),
             replies(model, tokenizer, turns[1:2], max_new_tokens=12),
             replies(model, tokenizer, turns[2:], images[1:], max_new_tokens=12)]
    assert together == [text for texts in alone for text in texts]
    assert len({len(prompts(model, tokenizer, [turn])[0][0]) for turn in turns}) == 3


def test_answers_are_written_as_they_are_made_and_none_is_made_twice(model, tokenizer, world, tmp_path):
    picture, path = world / "images" / "train_000000.png", tmp_path / "out" / "answers.jsonl"
    questions = {str(number): (f"<image>\nNumber {number}?", [picture]) for number in range(3)} | {"x": ("Hi", [])}
    model.generate = Parrot(*[tokenizer.encode("A cat.") + [2]] * 2)
    assert answer_all(model, tokenizer, questions, path, batch_size=2) == dict.fromkeys(questions, "A cat.")
    assert read_answers(path) == dict.fromkeys(questions, "A cat.")
    model.generate = None
    assert answer_all(model, tokenizer, questions, path) == dict.fromkeys(questions, "A cat.")


def test_answers_made_elsewhere(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"question_id": 7, "text": "B", "model": "x"}\n{"question_id": "8", "text": "C"}\n')
    assert read_answers(path) == {"7": "B", "8": "C"}
    path.write_text('{"question_id": 7, "text": "B"}\n{"question_id": 7}\n')
    with pytest.raises(InputError, match="line 2 lacks text"):
        read_answers(path)
