"""The cache of a conversation: the same replies, for less work."""

import random

import pytest
import torch

from nanollava.chat import ChatCache, stream_reply


@pytest.fixture
def computed(model, monkeypatch):
    """The number of tokens of each pass through the language model."""
    lengths, forward = [], model.language_model.forward

    def count(embeds, *arguments, **options):
        lengths.append(embeds.shape[1])
        return forward(embeds, *arguments, **options)

    monkeypatch.setattr(model.language_model, "forward", count)
    return lengths


def ask(model, tokenizer, turns, images=(), cache=None, **options) -> str:
    return "".join(stream_reply(model, tokenizer, turns, list(images), 6, cache=cache, **options))


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


@pytest.fixture
def images():
    return [torch.randn(3, 32, 32) for _ in range(4)]


@pytest.mark.parametrize("template", ["vicuna_v1", "v0"])
def test_next_turn_computes_only_its_own_tokens(model, tokenizer, images, computed, template):
    model.config.template = template
    cache, turns = ChatCache(model), [human("<image>\nWhat is there?")]
    reply = ask(model, tokenizer, turns, images[:1], cache)
    first = computed[0]
    assert len(cache.chats[-1].tokens) == sum(computed) > first  # the reply's tokens are kept, too
    turns += [gpt(reply), human("And where?")]
    computed.clear()
    ask(model, tokenizer, turns, images[:1], cache)
    assert first > 16 and computed[0] < first  # not the image again
    computed.clear()
    ask(model, tokenizer, turns, images[:1])
    assert computed[0] > first


def random_conversation(rng, tokenizer, images):
    """Turns with images in any of them, up to a question; and the images."""
    turns, count = [], 0
    for number in range(rng.choice((1, 3, 5))):
        text = tokenizer.decode(rng.choices(range(300, 440), k=rng.randint(1, 5))).strip() or "a"
        if number % 2 == 0 and count < len(images) and rng.random() < 0.6:
            text, count = f"<image>{text}", count + 1
        turns.append(human(text) if number % 2 == 0 else gpt(text))
    return turns, rng.sample(images, count)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 2.0, "top_p": 0.7}])
@pytest.mark.parametrize("template", ["vicuna_v1", "v0"])
def test_any_order_of_conversations_gives_the_replies_without_a_cache(
        model, tokenizer, images, template, options):
    model.config.template = template
    rng, cache = random.Random(0), ChatCache(model)
    turns, used = random_conversation(rng, tokenizer, images)
    for number in range(30):
        kind = rng.randrange(4)
        if kind == 0:  # another conversation
            turns, used = random_conversation(rng, tokenizer, images)
        elif kind == 1 and used:  # the same words about other images
            used = [rng.choice(images) for _ in used]
        elif kind == 2 and len(turns) > 1:  # an earlier turn is edited
            image = "<image>" * turns[-1]["value"].count("<image>")
            turns = [*turns[:-1], human(f"{image}Something else?")]
        torch.manual_seed(number)
        expected = ask(model, tokenizer, turns, used, **options)
        torch.manual_seed(number)
        reply = ask(model, tokenizer, turns, used, cache, **options)
        assert reply == expected, (number, kind)
        if kind == 3:  # the next turn
            turns = [*turns, gpt(reply or "a"), human("And?")]


def test_reply_that_is_broken_off_leaves_a_usable_cache(model, tokenizer, images):
    cache, turns = ChatCache(model), [human("<image>\nWhat is there?")]
    expected = ask(model, tokenizer, turns, images[:1])
    stream = stream_reply(model, tokenizer, turns, images[:1], 6, cache=cache)
    next(stream)
    stream.close()
    assert ask(model, tokenizer, turns, images[:1], cache) == expected


def test_error_in_the_middle_leaves_a_usable_cache(model, tokenizer, images, monkeypatch):
    cache, turns = ChatCache(model), [human("<image>\nWhat is there?")]
    expected = ask(model, tokenizer, turns, images[:1])
    with monkeypatch.context() as patch:
        patch.setattr(model.language_model.model.norm, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ask(model, tokenizer, turns, images[:1], cache)
    assert ask(model, tokenizer, turns, images[:1], cache) == expected


def test_chat_of_sample_computes_each_token_once(model, tokenizer, images, computed):
    cache, turns = ChatCache(model), []
    for question in ("What is there?", "Where?", "Why?"):
        turns.append(human(question))
        turns.append(gpt(ask(model, tokenizer, turns, cache=cache)))
    # each reply is tokenized again as text: a few of its tokens may differ and are computed again
    assert sum(computed) <= len(cache.chats[-1].tokens) + 3 * 6


def test_branches_of_a_conversation_go_on_side_by_side(model, tokenizer, images, computed):
    cache, start = ChatCache(model), [human("<image>\nWhat is there?"), gpt("A cat.")]
    one, two = [*start, human("Where?")], [*start, human("What color is it?")]
    for turns in (one, two):
        ask(model, tokenizer, turns, images[:1], cache)
    whole = computed[0]
    computed.clear()
    for turns in (one, two):
        assert ask(model, tokenizer, [*turns, gpt("So."), human("And?")], images[:1], cache) \
            == ask(model, tokenizer, [*turns, gpt("So."), human("And?")], images[:1])
    first_turns = [length for length in computed if length > 1]
    assert first_turns[0] < whole / 3 and first_turns[2] < whole / 3, "neither is computed anew"
    assert len(cache.chats) == 2


def test_conversation_used_least_recently_leaves_a_full_cache(model, tokenizer, images):
    cache = ChatCache(model)

    def order() -> list[int]:
        return [number for chat in cache.chats for number, image in enumerate(images)
                if chat.images[0] is image]

    for number in (0, 1, 0, 2):
        ask(model, tokenizer, [human("<image>\nWhat is there?")], [images[number]], cache)
    assert order() == [1, 0, 2]
    kv = cache.chats[0].kv
    size = kv.num_bytes()
    assert size == sum(tensor.nbytes for tensor in kv.keys + kv.values)
    cache.max_bytes = 3 * size
    ask(model, tokenizer, [human("<image>\nWhat is there?")], [images[3]], cache)
    assert order() == [0, 2, 3]
    cache.max_bytes = 1  # the one that is used now stays
    ask(model, tokenizer, [human("<image>\nWhat is there?")], [images[3]], cache)
    assert order() == [3]


def test_prompt_that_ends_with_an_image(model, tokenizer, images):
    """Its last token is never kept, so no part of the image is."""
    model.config.template = "plain"
    cache, turns = ChatCache(model), [human("<image>")]
    expected = ask(model, tokenizer, turns, images[:1])
    assert {ask(model, tokenizer, turns, images[:1], cache) for _ in range(3)} == {expected}
