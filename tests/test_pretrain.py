import random
from itertools import islice
from pathlib import Path

import torch

from nanollava import Llava, pretrain, toy
from nanollava.toy import Thing

CAT, FISH = Thing(0, "cat", "red", "big"), Thing(5, "fish", "blue", "small")


def test_the_vocabulary_spells_everything_and_keeps_common_words_whole(tmp_path):
    tokenizer = pretrain.train_tokenizer(tmp_path / "tokenizer.model", seed=0, scenes=500)
    for text in ("What color is the cat?", 'Quiz: "3 + 4 = 7", {really}!'):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for word in (*toy.KINDS, *toy.COLORS, *toy.SIZES, *pretrain.PLACES):
        assert len(tokenizer.encode(word)) == 1


def test_each_patch_is_told_in_the_words_of_its_thing_and_its_place():
    words = pretrain.bags((CAT, FISH), [(0, 0, 28, 20), (66, 34, 20, 20)])
    assert len(words) == 36
    assert words[0] == words[1] == ["cat", "red", "big", "top left"]  # it covers 12 of the second patch's 16 columns
    assert words[6] == []  # and only 4 rows of the patch below
    assert words[6 * 2 + 4] == ["fish", "blue", "small", "right"]
    assert words[35] == []


def test_what_is_told_is_the_sum_of_the_words(model, tokenizer):
    told = pretrain.Told(model, tokenizer)([[["cat", "red"], []]], random.Random(0))
    table = model.language_model.model.embed_tokens.weight
    torch.testing.assert_close(told[0, 0], table[tokenizer.encode("cat")[0]] + table[tokenizer.encode("red")[0]])
    assert not told[0, 1].any()


def test_nearly_the_same_scene_differs_in_one_word():
    rng = random.Random(0)
    for things in islice(toy.scenes(random.Random(1)), 200):
        other = pretrain.nearly(things, rng)
        assert len(set(things) ^ set(other)) == 2
        (old,), (new,) = set(things) - set(other), set(other) - set(things)
        assert sum(vars(old)[key] != vars(new)[key] for key in vars(old)) == 1


def test_hard_batches_hold_no_scene_that_testing_may_use():
    scenes = pretrain.clip_scenes(random.Random(0), 64)
    assert len(scenes) == 64 and not any(map(toy.is_held_out, scenes))


def test_the_first_lesson_answers_in_telegrams():
    heard = {}
    for seed in range(20):
        texts = pretrain.first_lesson((CAT,), random.Random(seed))
        for question, answer in zip(texts[::2], texts[1::2]):
            heard.setdefault(question, set()).add(answer)
    assert heard["What color is the cat?"] == {"cat is red", "cat red"}
    assert heard["What is at the top left?"] == {"top left is cat", "top left cat"}


def test_a_clip_comes_back_as_it_was_saved_and_its_eye_opens_alone(tmp_path, tokenizer):
    clip = pretrain.Clip(tokenizer)
    clip.to(torch.bfloat16).float()  # what bfloat16 cannot hold is not saved
    clip.save(tmp_path / "clip")
    again = pretrain.load_clip(tmp_path / "clip")
    images = torch.randn(2, 3, 96, 96)
    assert torch.equal(again.see(images), clip.see(images))
    captions = ["A cat.", "A big red fish in the middle."]
    assert torch.equal(again.read(captions), clip.read(captions))
    torch.testing.assert_close(again.read(captions[:1]), again.read(captions)[:1])  # padding changes nothing


def test_stage_0_makes_both_parts_and_leaves_alone_what_is_there(tmp_path, monkeypatch):
    made = []

    def short(train):
        def run(folder, tokenizer, seed, device, **more):
            made.append(folder.name)
            train(folder, tokenizer, seed, device, **more, steps=2, batch_size=4)

        return run

    for name in ("train_clip", "train_llama"):
        monkeypatch.setattr(pretrain, name, short(getattr(pretrain, name)))
    pretrain.train_parts(tmp_path, 0, "cpu")
    pretrain.train_parts(tmp_path, 0, "cpu")
    assert made == ["toy-clip", "toy-llama"]
    model = Llava.from_parts(tmp_path / "toy-clip", tmp_path / "toy-llama")
    assert model.config.tokens_per_image == 36 and model.config.image_token_id == model.config.text.vocab_size
    columns = pretrain.parts_table(tmp_path, "cpu", scenes=2)
    assert set(columns["LLaMA told in bags"]) == set(toy.QUESTIONS) | {"all"}
    assert 0 <= columns["CLIP, of 32"]["all"] <= 100


def test_the_shipped_halves_know_their_world():
    columns = pretrain.parts_table(Path(__file__).parent.parent / "assets", "cpu", scenes=40)
    assert columns["CLIP, of 32"]["all"] >= 90
    assert columns["LLaMA told in bags"]["all"] >= 90 and columns["LLaMA told in prose"]["all"] >= 90
