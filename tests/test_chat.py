import pytest
import torch

from nanollava.chat import replies, stream
from nanollava.files import InputError

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
