import random
import re

import torch

from nanollava.llama import Llama, rope_cos_sin, rotate
from nanollava.teacher import prompts
from nanollava.toy.llama import BagEmbeddings, bags, exam, first_lesson, initialize, llama_config
from nanollava.toy.scene import Thing

CAT, FISH = Thing(0, "cat", "red", "big"), Thing(5, "fish", "blue", "small")


def test_each_patch_is_told_in_the_words_of_its_thing_and_its_place():
    words = bags((CAT, FISH), [(0, 0, 28, 20), (66, 34, 20, 20)])
    assert len(words) == 36
    assert words[0] == ["cat", "red", "big", "at the top left"]
    assert words[6 * 2 + 4] == ["fish", "blue", "small", "on the right"]
    assert words[35] == []


def test_what_is_told_is_the_sum_of_the_words(model, tokenizer):
    told = BagEmbeddings(model, tokenizer)([[["cat", "red"], []]], random.Random(0))
    table = model.language_model.model.embed_tokens.weight
    torch.testing.assert_close(told[0, 0], table[tokenizer.encode("cat")[0]] + table[tokenizer.encode("red")[0]])
    assert not told[0, 1].any()


def test_the_first_lesson_is_in_telegrams():
    heard = {}
    for seed in range(60):
        texts = first_lesson((CAT, FISH), random.Random(seed))
        for question, answer in zip(texts[::2], texts[1::2]):
            heard.setdefault(question, set()).add(answer)
    assert heard["What color is the cat?"] == {"cat is red", "cat red"}
    assert heard["What is at the top left?"] == {"at the top left is cat", "at the top left cat"}
    lists = [said.split(", ") for question in prompts.BRIEF for said in heard.get(question, ())]
    assert len(lists) > 40
    for said in lists:  # each word stands with the thing that it belongs to
        assert {frozenset(part.replace("at the top left", "there").replace("on the right", "here").split())
                for part in said} == {frozenset(("cat", "red", "big", "there")),
                                      frozenset(("fish", "blue", "small", "here"))}


def test_the_exam_asks_for_the_letter_before_a_word():
    short, long = 0, 0
    for seed in range(20):
        for first in (True, False):
            turns = exam(random.Random(seed), first)
            for human, gpt in zip(turns[::2], turns[1::2]):
                said = human["value"].splitlines()
                if said[0].startswith("Options: "):
                    letters = dict(re.findall(r"\((.)\) ([a-z ]+?)(?: (?=\()|$)", said.pop(0)))
                    letters = {word: letter for letter, word in letters.items()}
                if said:  # "cat" -> "The answer is B."
                    assert gpt["value"] == f"The answer is {letters[said[0]]}." and not first
                    long += 1
                else:  # "cat (B), star (A)."
                    pairs = re.findall(r"([a-z ]+) \((.)\)[,.] ?", gpt["value"])
                    assert dict(pairs) == letters and len(pairs) == len(letters)
                    short += 1
    assert short > 120 and long > 60


def test_one_head_begins_by_looking_at_the_token_before():
    config = llama_config(vocab_size=100)
    llama = Llama(config)
    initialize(llama)
    embeds = llama.embed(torch.randint(100, (1, 12)))
    attention, x = llama.model.layers[0].self_attn, llama.model.layers[0].input_layernorm(embeds)
    angles = rope_cos_sin(torch.arange(12)[None], config)
    q, k = (rotate(proj(x).view(1, 12, -1, config.head_dim), angles)[0, :, 0]
            for proj in (attention.q_proj, attention.k_proj))
    scores = (q @ k.T / config.head_dim**0.5).masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf)
    looks = scores.softmax(dim=1)[range(1, 12), range(11)]  # at the token before, from the second on
    assert looks.min() > 0.8
