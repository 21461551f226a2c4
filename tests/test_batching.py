"""A batch whose rows are refilled gives the replies that each prompt gets alone."""

import pytest
import torch

from nanollava import batching
from nanollava.batching import generate_replies
from nanollava.chat import TooLongError, tokenize_prompts

QUESTIONS = ["<image>\nWhat is there?", "Hello, who are you and what can you see?", "Hi",
             "<image>\n<image>\nSame?", "<image>\nIs the cat to the left of the dog?", "Who?",
             "What is there to the left of the red house, and what is above it?"]


@pytest.fixture
def prompts(model):
    """Conversations of different lengths, with no, one or two images."""
    features = torch.randn(2, model.config.tokens_per_image, 32)
    return [([{"from": "human", "value": question}], features[: question.count("<image>")])
            for question in QUESTIONS]


def replies_alone(model, tokenizer, prompts, **how) -> list[str]:
    return [text for prompt in prompts
            for _, text in generate_replies(model, tokenizer, [prompt], **how)]


@pytest.fixture
def rows_computed(model):
    """How many rows each step of the language model had, prompts left out."""
    rows, forward = [], model.language_model.forward

    def count(embeds, *rest, **options):
        rows.extend([len(embeds)] * (embeds.shape[1] == 1))
        return forward(embeds, *rest, **options)

    model.language_model.forward = count
    return rows


@pytest.mark.parametrize("batch_size", [2, 3, 7, 64])
@pytest.mark.parametrize("max_steps", [1, 5, 16])
def test_refilled_batch_matches_single_prompts(model, tokenizer, prompts, monkeypatch, batch_size,
                                               max_steps):
    conversations = [conversation for conversation, _ in prompts]
    lengths = tokenize_prompts(model, tokenizer, conversations)[1].tolist()
    # the context ends replies of 3 to 40 tokens: the shorter the prompt, the longer its reply
    model.config.text.max_position_embeddings = max(lengths) + 3
    assert len(set(lengths)) > 4
    alone = replies_alone(model, tokenizer, prompts)
    assert len(set(alone)) > 4
    monkeypatch.setattr(batching, "MAX_STEPS", max_steps)
    replies = dict(generate_replies(model, tokenizer, iter(prompts), batch_size))
    assert [replies[number] for number in range(len(prompts))] == alone


@pytest.mark.parametrize("batch_size", [1, 3])
def test_replies_end_at_eos_or_at_the_stop_text(model, tokenizer, prompts, monkeypatch, batch_size):
    monkeypatch.setattr(tokenizer, "decode", lambda tokens: "".join(f"<{id}>" for id in tokens))
    endless = replies_alone(model, tokenizer, prompts, max_new_tokens=30)
    text = "<" + endless[0].split("<")[4]
    for stop, ending in ((int(text[1:-1]), None), text), ((None, text), ""):
        monkeypatch.setattr(batching, "stop_condition", lambda *_: stop)
        replies = dict(generate_replies(model, tokenizer, prompts, batch_size, 30))
        assert replies[0].count("<") == 3 + bool(ending)
        for number, reply in enumerate(endless):
            before, found, _ = reply.partition(text)
            assert replies[number] == before + (ending if found else "")


def test_ended_replies_leave_the_batch(model, tokenizer, prompts, rows_computed, monkeypatch):
    room = iter([2, 2, 40, 40, 2, 2, 2])  # tokens that the replies to the prompts may have

    def limited(model, tokenizer, conversations):
        tokens, lengths, _ = tokenize_prompts(model, tokenizer, conversations)
        return tokens, lengths, torch.tensor([next(room) for _ in conversations])

    monkeypatch.setattr(batching, "tokenize_prompts", limited)
    monkeypatch.setattr(tokenizer, "decode", lambda tokens: str(len(tokens)))
    order = [number for number, _ in generate_replies(model, tokenizer, prompts, batch_size=4)]
    assert order == [0, 1, 4, 5, 6, 2, 3]
    # the first tokens come with the prompts; 4 rows, then 2 and 1 more, then the long ones alone
    assert rows_computed == [4, 4, 3] + [2] * 36


def test_prompts_are_read_when_a_row_is_free(model, tokenizer, prompts):
    read = []
    replies = generate_replies(model, tokenizer, (read.append(p) or p for p in prompts), 2, 4)
    next(replies)
    assert len(read) == 2
    assert len(list(replies)) == len(prompts) - 1


def test_prompt_that_fills_the_context_is_an_error(model, tokenizer, prompts):
    model.config.text.max_position_embeddings = 30
    with pytest.raises(TooLongError, match="the model reads at most 30"):
        list(generate_replies(model, tokenizer, prompts))


def test_no_prompts_give_no_replies(model, tokenizer):
    assert not list(generate_replies(model, tokenizer, []))
