import os

import pytest
import torch

from nanollava.chat import (
    ChatCache,
    TooLongError,
    Usage,
    open_llava,
    stream_reply,
    tokenize_prompts,
)

QUESTION = [{"from": "human", "value": "<image>\nWhat is there?"}]
PIXELS = torch.zeros(3, 32, 32)


class FixedReply:
    """Takes the place of `model.generate`: yields the given rows of tokens, whatever the prompt."""

    def __init__(self, *rows):
        self.rows = rows

    def __call__(self, tokens, *_, eos_id=None, **__):
        for step in range(max(map(len, self.rows))):
            yield torch.tensor([row[step] if step < len(row) else eos_id or 0 for row in self.rows])


def test_reply_under_v0_ends_at_its_stop_text(model, tokenizer):
    model.config.template = "v0"
    model.generate = FixedReply(tokenizer.encode("A cat. ###Human: And now?"))
    assert "".join(stream_reply(model, tokenizer, QUESTION, [PIXELS])) == "A cat."


def test_text_that_resembles_a_stop_is_part_of_the_reply(model, tokenizer):
    model.config.template = "v0"
    model.generate = FixedReply(tokenizer.encode("Room ##12."))
    assert "".join(stream_reply(model, tokenizer, QUESTION, [PIXELS])) == "Room ##12."


def test_stream_never_yields_half_a_character(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "decode", lambda tokens: bytes(tokens).decode(errors="replace"))
    model.generate = FixedReply(list("A ☃ cat.".encode()) + [tokenizer.eos_id])
    pieces = list(stream_reply(model, tokenizer, QUESTION, [PIXELS]))
    assert pieces == ["A", " ", "", "", "☃", " ", "c", "a", "t", ".", ""]  # one a token


def test_stream_yields_the_reply_in_pieces(model, tokenizer):
    model.generate = FixedReply(tokenizer.encode("A red cat.") + [tokenizer.eos_id])
    pieces = list(stream_reply(model, tokenizer, QUESTION, [PIXELS]))
    assert len(pieces) > 3 and "".join(pieces) == "A red cat."


def read(stream) -> tuple[str, Usage]:
    """The text of a reply, and what its generator returns."""
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return "".join(pieces), end.value


@pytest.mark.parametrize("template", ["vicuna_v1", "v0"])
@pytest.mark.parametrize("stops, expected", [
    ((), "One, two, three."), (["two"], "One,"), (["zebra", ", th", "e."], "One, two"),
    (["One"], ""), (["three."], "One, two,"), (["three.x"], "One, two, three.")])
def test_reply_ends_at_the_first_stop(model, tokenizer, template, stops, expected):
    model.config.template = template
    end = [tokenizer.eos_id] if template == "vicuna_v1" else tokenizer.encode("###Human: So?")
    model.generate = FixedReply(tokenizer.encode("One, two, three.") + end)
    text, usage = read(stream_reply(model, tokenizer, QUESTION, [PIXELS], stops=stops))
    assert (text, usage.finish_reason) == (expected, "stop")


def test_usage_counts_the_tokens_of_prompt_and_reply(model, tokenizer):
    words = tokenizer.encode("A red cat.")
    prompt, _, _ = tokenize_prompts(model, tokenizer, [QUESTION])
    model.generate = FixedReply(words + [tokenizer.eos_id])
    cache = ChatCache(model)
    _, usage = read(stream_reply(model, tokenizer, QUESTION, [PIXELS], cache=cache))
    assert usage == Usage(prompt.shape[1], 0, len(words), "stop")
    model.generate = FixedReply(words[:2])
    _, usage = read(stream_reply(model, tokenizer, QUESTION, [PIXELS], 2, cache=cache))
    assert usage == Usage(prompt.shape[1], prompt.shape[1] - 1, 2, "length")


def test_reply_ends_where_the_context_is_full(model, tokenizer):
    model.config.text.max_position_embeddings = 60
    calls = []
    model.generate = lambda tokens, pixels, max_new_tokens, *_, **__: \
        calls.append((tokens.shape[1], max_new_tokens)) or []
    list(stream_reply(model, tokenizer, QUESTION, [PIXELS]))
    (length, max_new_tokens), = calls
    assert length + max_new_tokens == 60
    model.config.text.max_position_embeddings = length
    with pytest.raises(TooLongError, match=f"{length} tokens, but .* reads at most {length}"):
        list(stream_reply(model, tokenizer, QUESTION, [PIXELS]))


def test_model_larger_than_half_the_memory_stays_on_disk_with_equal_replies(
        model, tokenizer, tmp_path, monkeypatch, capsys):
    model.save_pretrained(tmp_path, [tokenizer.path], torch.bfloat16)
    image, replies = torch.randn(3, 32, 32), []
    for memory, dtype in ((10**9, torch.float32), (0, torch.bfloat16)):
        monkeypatch.setattr(os, "sysconf", lambda name: memory)
        opened, _ = open_llava(tmp_path, "float32", "cpu")
        assert {parameter.dtype for parameter in opened.parameters()} == {dtype}
        replies.append("".join(stream_reply(opened, tokenizer, QUESTION, [image], 12)))
    assert replies[0] == replies[1]
    assert "its weights stay on disk" in capsys.readouterr().err
