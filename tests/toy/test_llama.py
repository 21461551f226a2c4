import random
import re
import zlib

import torch

from nanollava.llama import Llama, apply_rotary_emb, rope_cos_sin
from nanollava.teacher import prompts
from nanollava.toy.llama import (
    NOISE,
    draw_batches,
    draw_row,
    easy_texts,
    forward_backward,
    initialize,
    llama_config,
    mixed_texts,
    multiple_choice,
    prose,
    put_text,
    telegram,
)
from nanollava.toy.scene import Thing

CAT, FISH = Thing(0, "cat", "red", "big"), Thing(5, "fish", "blue", "small")


def test_telegram_names_each_thing_once():
    telegrams = {telegram((CAT, FISH), random.Random(seed), repeat=False) for seed in range(10)}
    cat, fish = "cat red big at the top left", "fish blue small on the right"
    assert telegrams == {f"{cat}, {fish}.", f"{fish}, {cat}."}


def test_telegram_repeats_things_with_some_words_unclear():
    clear, repeats = "cat red big at the top left", []
    for seed in range(100):
        mentions = telegram((CAT,), random.Random(seed), unclear=0.2).strip(".").split(", ")
        mentions.remove(clear)  # one mention has all words
        repeats.append(mentions)
    assert {len(mentions) for mentions in repeats} == {0, 1, 2, 3}
    words = [word for mentions in repeats for mention in mentions
             for word in mention.replace("at the top left", "top-left").split(" ")]
    assert {*words} == {"cat", "red", "big", "top-left", "thing"}
    assert 0.1 < words.count("thing") / len(words) < 0.3


def test_prose_is_a_caption_or_a_description():
    texts = {prose((CAT, FISH), random.Random(seed)) for seed in range(60)}
    assert len(texts) == 6  # five captions and a description
    assert any(text.startswith("There are two things in the picture. ") for text in texts)


def test_text_takes_the_place_of_the_image():
    turns = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "A cat."}]
    assert put_text("A cat.", turns) == [{"from": "human", "value": "A cat.\nWho?"}, turns[1]]


def test_llama_never_sees_an_image_token(tokenizer):
    rng = random.Random(0)
    for easy in (True, False):
        for _ in range(30):
            tokens, labels = draw_row(tokenizer, rng, easy, unclear=0.2)
            assert max(tokens) < len(tokenizer) and len(tokens) == len(labels)


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


def test_some_conversations_about_a_scene_have_a_multiple_choice_question():
    found = 0
    for seed in range(100):
        texts = mixed_texts((CAT, FISH), random.Random(seed))
        for question, answer in zip(texts[::2], texts[1::2]):
            if "\nOptions: " in question:
                options = dict(re.findall(r"\((.)\) ([a-z ]+?)(?: (?=\()|$)", question))
                reason, letter = answer.rsplit("\nThe answer is ", 1)
                assert reason.endswith(f" {options[letter.strip('.')]}.")
                found += 1
    assert 10 < found < 40


def test_batches_are_those_of_the_shipped_weights(tokenizer):
    """A batch depends on seed and step alone, and on the order of all random draws."""
    checksums = []
    for step in (0, 11_000):  # easy conversations and mixed ones
        tokens, labels, _ = next(draw_batches(tokenizer, 0, step, 12_000, batch_size=4))
        rows = [tokens.tolist(), labels.tolist()]
        checksums.append(zlib.crc32(repr(rows).encode()))
    assert checksums == [3758606804, 1279595933]


def test_resumed_run_sees_the_same_batches(tokenizer):
    full = list(draw_batches(tokenizer, 0, 0, 40, batch_size=2))
    resumed = list(draw_batches(tokenizer, 0, 1, 40, batch_size=2))
    for (tokens, labels, noise), again in zip(full[1:], resumed, strict=True):
        assert torch.equal(tokens, again[0]) and torch.equal(labels, again[1])
        assert noise == again[2]


def test_words_become_less_clear(tokenizer):
    (thing,) = tokenizer.encode("thing")
    shares, noises = [], []
    for step in (0, 600, 11_000):
        tokens, _, noise = next(draw_batches(tokenizer, 0, step, 12_000, batch_size=64))
        shares.append((tokens == thing).float().mean())
        noises.append(noise)
    assert shares[2] > 2 * shares[1]
    assert noises[0] == 0 and 0 < noises[1] < 0.03 and 0.4 < noises[2] < NOISE


def test_noise_is_measured_in_standard_deviations_of_the_embeddings():
    torch.manual_seed(0)
    llama = Llama(llama_config(vocab_size=100))
    initialize(llama)
    tokens, seen = torch.randint(100, (4, 50)), []
    llama.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for noise in (0.0, 0.5):
        forward_backward(llama, (tokens, tokens, noise), "cpu")
    std = llama.model.embed_tokens.weight.std()
    assert torch.equal(seen[0], llama.embed(tokens))
    assert abs((seen[1] - seen[0]).std() / std - 0.5) < 0.01


def test_heads_of_the_first_block_start_out_attending_to_the_tokens_before():
    config = llama_config(vocab_size=100)
    llama = Llama(config)
    initialize(llama)
    block = llama.model.layers[0]
    x = block.input_layernorm(llama.embed(torch.randint(100, (1, 12))))
    rope = rope_cos_sin(torch.arange(12)[None], config)
    q, k = (apply_rotary_emb(proj(x).view(1, 12, -1, config.head_dim).transpose(1, 2), *rope)[0]
            for proj in (block.self_attn.q_proj, block.self_attn.k_proj))  # (heads, 12, head_dim)
    future = torch.ones(12, 12).triu(1).bool()
    scores = (q @ k.mT / config.head_dim**0.5).masked_fill(future, -torch.inf)
    for head, attention in enumerate(scores.softmax(dim=-1)):
        assert attention.diagonal(-1 - head).min() > 0.8


def test_first_block_starts_out_with_a_part_of_each_of_the_four_tokens_before():
    """What the block adds to a token points to the embeddings of the four before it."""
    torch.manual_seed(0)
    llama = Llama(llama_config(vocab_size=100))
    initialize(llama)
    tokens = torch.randperm(100)[:12]
    with torch.no_grad():
        block, x = llama.model.layers[0], llama.embed(tokens[None])
        rope = rope_cos_sin(torch.arange(12)[None], llama.config)
        added = block(x, rope)[0, 9] - x[0, 9]
    table = llama.model.embed_tokens.weight.detach()
    products = (table - table.mean(dim=0)) @ added
    others = products[torch.ones(100).scatter(0, tokens, 0).bool()]  # not in the row at all
    assert products[tokens[5:9]].mean() > others.mean() + 2 * others.std()
