"""The experiment of the lens: what counts as named, and what the controls are."""

import random

import pytest
import torch

from nanollava.image import preprocess
from nanollava.infra.io import InputError
from nanollava.toy import lens
from nanollava.toy.clip import things_on_patches
from nanollava.toy.scene import Thing
from nanollava.tour import Tour

CAT, CAR = Thing(0, "cat", "red", "big"), Thing(8, "car", "red", "small")
BOXES = [(2, 2, 30, 30), (70, 70, 20, 20)]  # patches 0, 1, 6, 7, and 28, 29, 34, 35


def test_patches_that_a_box_reaches_into():
    assert lens.touched_patches(BOXES[:1]) == {0, 1, 6, 7}
    assert lens.touched_patches([(16, 0, 16, 16)]) == {1}
    assert lens.touched_patches(BOXES[1:]) == {28, 29, 34, 35}


def test_word_names_a_thing_if_only_one_has_it():
    assert lens.named_thing("cat", (CAT, CAR)) == CAT
    assert lens.named_thing("red", (CAT, CAR)) is None
    assert lens.named_thing("red", (CAR,)) == CAR
    assert lens.named_thing("a", (CAT,)) is None


class Features(torch.nn.Module):
    """Stands for the model, its ViT and its projector."""

    device, config = torch.device("cpu"), type("config", (), {"preprocess": preprocess})

    dtype = torch.float32

    def vision_tower(self, pixels, layer):
        return torch.zeros(1, 37, 4)

    def forward(self, patches):
        return patches


@pytest.mark.parametrize("words, expected", [
    (("cat", "red", "big", "at the top left", "the"), (100, 100, 100, 100, 100)),
    (("car", "blue", "big", "me", "the"), (0, 0, 100, 0, 100)),
    (("red", "me", "at the top left", "so", "the"), (0, 100, 0, 100, 0))])
def test_words_are_scored_on_the_thing_and_on_empty_ground(monkeypatch, words, expected):
    monkeypatch.setattr(lens, "nearest_words", lambda *_: [[(word, 0.5) for word in words]] * 36)
    image = lens.draw_image((CAT,), BOXES[:1], random.Random(0))
    scores = lens.score_words(Features(), None, Features(), None, [((CAT,), BOXES[:1], image)], -2)
    assert tuple(scores.values()) == expected
    assert list(scores) == [*lens.ATTRIBUTES, lens.EMPTY]


def fake_tour(tokenizer, patch_of_block):
    """A tour with the answer " red cat", whose attention peaks on a patch in each block."""
    tokens = [token for word in ("red", "cat") for token in tokenizer.encode(word)]
    assert len(tokens) == 2
    attention = torch.zeros(len(patch_of_block), 2, 36)
    for block, patch in enumerate(patch_of_block):
        attention[block, :, patch] = 1
    likeliest = [[("", 1.0)]] * 2
    return Tour(None, "", "", [], tokens, tokens, 0.2, likeliest, attention, 0, [])


def test_attention_is_scored_in_the_block_that_is_best_on_other_images(tokenizer, monkeypatch):
    # block 1 is right in the first half of the images, block 0 in the second
    examples = [((CAT,), BOXES[:1], number) for number in range(8)]
    monkeypatch.setattr(lens, "take_tour", lambda model, tokenizer, number, *_, **__: fake_tour(
        tokenizer, (35, 7) if number < 4 else (7, 35)))
    scores = lens.score_attention(None, tokenizer, examples)
    assert scores["words for a kind"] == {
        "block 1": 100, "block 2": 0, "the best block": 0, "with another image's attention": 0,
        "a random patch": pytest.approx(100 * 4 / 36)}


def test_maps_of_another_image_are_a_control(tokenizer, monkeypatch):
    scenes = [((CAT,), BOXES[:1], 7), ((Thing(8, "cat", "red", "big"),), BOXES[1:], 35)]
    monkeypatch.setattr(lens, "take_tour", lambda model, tokenizer, patch, *_, **__: fake_tour(
        tokenizer, (patch,)))
    scores = lens.score_attention(None, tokenizer, scenes * 2)["words for a color"]
    assert (scores["the best block"], scores["with another image's attention"]) == (100, 0)


def test_model_that_names_nothing_is_an_input_error(tokenizer, monkeypatch):
    tour = fake_tour(tokenizer, (0,))
    tour.tokens[:] = tokenizer.encode("so")[:1] * 2
    monkeypatch.setattr(lens, "take_tour", lambda *_, **__: tour)
    with pytest.raises(InputError, match="hardly name a kind"):
        lens.score_attention(None, tokenizer, [((CAT,), BOXES[:1], None)] * 4)


def test_examples_are_validation_scenes_with_their_boxes():
    (things, boxes, image), *_ = lens.draw_examples(3, seed=0)
    assert len(things) == len(boxes) and image.size == (96, 96)
    assert {thing for thing in things_on_patches(things, boxes) if thing} == set(things)
    assert lens.draw_examples(1, seed=0)[0][2].tobytes() == image.tobytes()


def test_table_has_means_and_spreads():
    one = {"words": {"fresh": {"kind": 1.0}}, "attention": {"kind": {"block": 2}}}
    two = {"words": {"fresh": {"kind": 3.0}}, "attention": {"kind": {"block": 2}}}
    assert "2.0 ± 1.4" in lens.format_lens([one, two]) and "±" not in lens.format_lens([one])


def test_model_that_joins_patches_is_refused(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "stage2", [tokenizer.path])
    with pytest.raises(InputError, match="does not have the toy CLIP's patches"):
        lens.evaluate_lens(tmp_path, "cpu", 10)
