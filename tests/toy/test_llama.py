import random
import re
import zlib

import torch

from nanollava.llama import Llama, apply_rotary_emb, rope_cos_sin
from nanollava.teacher import prompts
from nanollava.toy.llama import (
    draw_batches,
    easy_texts,
    embed_patch_words,
    initialize,
    llama_config,
    multiple_choice,
    patch_words,
)
from nanollava.toy.scene import Thing

CAT, FISH = Thing(0, "cat", "red", "big"), Thing(5, "fish", "blue", "small")


def test_patch_words_describe_the_thing_on_a_patch():
    words = patch_words((CAT, FISH), [(0, 0, 28, 20), (66, 34, 20, 20)])
    assert len(words) == 36
    assert words[0] == ["cat", "red", "big", "at the top left"]
    assert words[6 * 2 + 4] == ["fish", "blue", "small", "on the right"]
    assert words[35] == []


def test_patch_word_embedding_is_the_sum_of_its_words(model, tokenizer):
    embeds = embed_patch_words(model, tokenizer, [[["cat", "red"], []]], random.Random(0))
    table = model.language_model.model.embed_tokens.weight
    (cat,), (red,) = tokenizer.encode("cat"), tokenizer.encode("red")
    torch.testing.assert_close(embeds[0, 0], table[cat] + table[red])
    assert not embeds[0, 1].any()


def test_dropout_of_patch_words_leaves_out_words(model, tokenizer):
    image = [["cat"], ["red"]] * 18
    embeds = embed_patch_words(model, tokenizer, [image], random.Random(0), dropout=0.5)
    assert 0 < embeds.any(dim=-1).sum() < 36


def test_easy_texts_have_few_words_beyond_those_of_a_thing():
    answers = {}
    for seed in range(60):
        texts = easy_texts((CAT, FISH), random.Random(seed))
        for question, answer in zip(texts[::2], texts[1::2]):
            answers.setdefault(question, set()).add(answer)
    assert answers["What color is the cat?"] == {"cat is red", "cat red"}
    assert answers["What is at the top left?"] == {"at the top left is cat", "at the top left cat"}
    lists = [text.split(", ") for question in prompts.BRIEF for text in answers.get(question, ())]
    assert len(lists) > 40
    expected = {frozenset(("cat", "red", "big", "top-left")),
                frozenset(("fish", "blue", "small", "right"))}
    for things in lists:
        things = [text.replace("at the top left", "top-left").replace("on the right", "right")
                  for text in things]
        assert {frozenset(text.split()) for text in things} == expected


def test_multiple_choice_answers_name_the_letters_of_the_options():
    num_easy, num_hard = 0, 0
    for seed in range(40):
        easy = seed % 2 == 0
        turns = multiple_choice(random.Random(seed // 2), easy)
        for human, gpt in zip(turns[::2], turns[1::2]):
            lines = human["value"].splitlines()
            if lines[0].startswith("Options: "):
                options = re.findall(r"\((.)\) ([a-z ]+?)(?: (?=\()|$)", lines.pop(0))
                letters = {word: letter for letter, word in options}
            if lines:  # "cat" -> "The answer is B."
                assert gpt["value"] == f"The answer is {letters[lines[0]]}." and not easy
                num_hard += 1
            else:  # "cat (B), star (A)."
                pairs = re.findall(r"([a-z ]+) \((.)\)[,.] ?", gpt["value"])
                assert dict(pairs) == letters and len(pairs) == len(letters)
                num_easy += 1
    assert num_easy > 120 and num_hard > 60


def test_batches_are_those_of_the_shipped_weights(tokenizer):
    """A batch depends on seed and step alone, and on the order of all random draws."""
    checksums = []
    for step in (0, 280):  # the first of the easy and of the mixed conversations
        tokens, labels, words, rng = next(draw_batches(tokenizer, 0, step, step + 1, batch_size=4))
        batch = [tokens.tolist(), labels.tolist(), words, rng.random()]
        checksums.append(zlib.crc32(repr(batch).encode()))
    assert checksums == [3257817142, 2402040833]


def test_resumed_run_sees_the_same_batches(tokenizer):
    full = [batch[:3] for batch in draw_batches(tokenizer, 0, 278, 286, batch_size=2)]
    resumed = [batch[:3] for batch in draw_batches(tokenizer, 0, 281, 286, batch_size=2)]
    for (tokens, labels, words), resumed_batch in zip(full[3:], resumed, strict=True):
        assert torch.equal(tokens, resumed_batch[0]) and torch.equal(labels, resumed_batch[1])
        assert words == resumed_batch[2]


def test_one_head_starts_out_attending_to_the_token_before():
    config = llama_config(vocab_size=100)
    llama = Llama(config)
    initialize(llama)
    block = llama.model.layers[0]
    x = block.input_layernorm(llama.embed(torch.randint(100, (1, 12))))
    rope = rope_cos_sin(torch.arange(12)[None], config)
    q, k = (apply_rotary_emb(proj(x).view(1, 12, -1, config.head_dim).transpose(1, 2), *rope)[0, 0]
            for proj in (block.self_attn.q_proj, block.self_attn.k_proj))
    future = torch.ones(12, 12).triu(1).bool()
    scores = (q @ k.T / config.head_dim**0.5).masked_fill(future, -torch.inf)
    attention = scores.softmax(dim=1)
    assert attention.diagonal(-1).min() > 0.8
