import random
from itertools import islice

import torch

from nanollava.toy import questions, scene
from nanollava.toy.clip import (
    Clip,
    clip_scenes,
    contrast,
    load_clip,
    nearly,
    on_patches,
    some_patches,
)
from nanollava.toy.scene import Thing

CAT, FISH = Thing(0, "cat", "red", "big"), Thing(5, "fish", "blue", "small")
PLACED = [(0, 0, 28, 20), (66, 34, 20, 20)]


def test_nearly_the_same_scene_differs_in_one_word():
    rng = random.Random(0)
    for things in islice(scene.scenes(random.Random(1)), 200):
        other = nearly(things, rng)
        assert len(set(things) ^ set(other)) == 2
        (old,), (new,) = set(things) - set(other), set(other) - set(things)
        assert sum(vars(old)[key] != vars(new)[key] for key in vars(old)) == 1


def test_hard_batches_hold_no_scene_that_testing_may_use():
    scenes = clip_scenes(random.Random(0), 64)
    assert len(scenes) == 64 and not any(map(scene.is_held_out, scenes))


def test_a_thing_is_on_the_patches_of_which_it_covers_a_third():
    shown = on_patches((CAT, FISH), PLACED)
    assert len(shown) == 36
    assert shown[0] == shown[1] == CAT  # it covers 12 of the second patch's 16 columns
    assert shown[6] is None  # and only 4 rows of the patch below
    assert shown[6 * 2 + 4] == FISH
    assert shown[35] is None


def test_every_thing_and_the_ground_have_a_patch_that_speaks_for_them():
    rng = random.Random(0)
    for things in islice(scene.scenes(random.Random(1)), 200):
        placed = scene.boxes(things, rng)
        shown, chosen = on_patches(things, placed), some_patches(things, placed, rng)
        assert [scene for _, scene in chosen] == [*((thing,) for thing in things), ()]
        assert [shown[patch] for patch, _ in chosen] == [*things, None]


def test_the_contrast_is_least_where_each_vector_is_nearest_to_its_own_words(tokenizer):
    clip = Clip(tokenizer)
    scenes = [(CAT,), (FISH,), (CAT,), ()]  # the first and the third show the same: either may be taken for the other
    with torch.no_grad():
        clip.logit_scale.fill_(5.0)
        right = clip.read([questions.caption(scene, 1) for scene in scenes])
        best = contrast(clip, right, scenes, style=1)
        assert best < contrast(clip, right[[0, 1, 3, 2]], scenes, style=1)
        torch.testing.assert_close(best, contrast(clip, right[[2, 1, 0, 3]], scenes, style=1))


def test_one_contrast_is_cross_entropy_both_ways(tokenizer):
    clip = Clip(tokenizer)
    scenes, seen = [(CAT,), (FISH,), (CAT, FISH)], torch.nn.functional.normalize(torch.randn(3, 128), dim=-1)
    logits = clip.logit_scale.exp() * seen @ clip.read([questions.caption(scene, 0) for scene in scenes]).T
    one, other = (-logits.log_softmax(dim=dim).diagonal().mean() for dim in (0, 1))
    torch.testing.assert_close(contrast(clip, seen, scenes, style=0), (one + other) / 2)


def test_patches_are_compared_where_llava_reads_them(tokenizer):
    clip = Clip(tokenizer)
    images = torch.randn(2, 3, 96, 96)
    whole, patches = clip.see(images)
    torch.testing.assert_close(patches, clip.project(clip.vision_model(images, layer=-2)[:, 1:]))
    torch.testing.assert_close(whole, clip.project(clip.vision_model(images, layer=-1)[:, 0]))


def test_a_clip_comes_back_as_it_was_saved_and_its_eye_opens_alone(tmp_path, tokenizer):
    clip = Clip(tokenizer)
    clip.to(torch.bfloat16).float()  # what bfloat16 cannot hold is not saved
    clip.save(tmp_path / "clip")
    again = load_clip(tmp_path / "clip")
    images = torch.randn(2, 3, 96, 96)
    assert torch.equal(again.see(images)[0], clip.see(images)[0])
    captions = ["A cat.", "A big red fish in the middle."]
    assert torch.equal(again.read(captions), clip.read(captions))
    torch.testing.assert_close(again.read(captions[:1]), again.read(captions)[:1])  # padding changes nothing
