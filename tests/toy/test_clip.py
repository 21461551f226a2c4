import random
import zlib
from itertools import islice

import torch
import torch.nn.functional as F

from nanollava.toy.clip import (
    Clip,
    change_one_attribute,
    contrastive_loss,
    draw_batch,
    draw_scenes,
    load_clip,
    sample_patches,
    save_clip,
    sincos_pos_embed,
    things_on_patches,
)
from nanollava.toy.questions import caption
from nanollava.toy.scene import Thing, is_validation_scene, random_boxes, random_scenes

CAT, FISH = Thing(0, "cat", "red", "big"), Thing(5, "fish", "blue", "small")
BOXES = [(0, 0, 28, 20), (66, 34, 20, 20)]


def test_changed_scene_differs_in_one_attribute_of_one_thing():
    rng = random.Random(0)
    for things in islice(random_scenes(random.Random(1)), 200):
        changed = change_one_attribute(things, rng)
        (old,), (new,) = set(things) - set(changed), set(changed) - set(things)
        assert sum(vars(old)[key] != vars(new)[key] for key in vars(old)) == 1
        assert len({thing.cell for thing in changed}) == len(things)


def test_training_draws_no_validation_scene():
    scenes = draw_scenes(random.Random(0), 64)
    assert len(scenes) == 64
    assert not any(map(is_validation_scene, scenes))


def test_batches_are_those_of_the_shipped_weights():
    """A batch depends on seed and step alone, and on the order of all random draws."""
    batches = [draw_batch(0, step, batch_size=4) for step in (0, 280)]
    checksums = [zlib.crc32(repr([scenes, patches, style]).encode())
                 for _, scenes, patches, style in batches]
    assert checksums == [2572081606, 231200749]


def test_thing_is_on_patches_of_which_it_covers_a_third():
    on_patches = things_on_patches((CAT, FISH), BOXES)
    assert len(on_patches) == 36
    assert on_patches[0] == on_patches[1] == CAT  # it covers 12 of the second patch's 16 columns
    assert on_patches[6] is None  # it covers 4 rows of the patch below
    assert on_patches[6 * 2 + 4] == FISH
    assert on_patches[35] is None


def test_each_thing_and_the_background_have_a_sampled_patch():
    rng = random.Random(0)
    for things in islice(random_scenes(random.Random(1)), 200):
        boxes = random_boxes(things, rng)
        on_patches, sampled = things_on_patches(things, boxes), sample_patches(things, boxes, rng)
        assert [on_patch for _, on_patch in sampled] == [*((thing,) for thing in things), ()]
        assert [on_patches[number] for number, _ in sampled] == [*things, None]


def test_initial_positions_are_most_similar_to_those_of_neighbors():
    positions = sincos_pos_embed()
    class_token, patches = positions[0], positions[1:]
    nearest = torch.cdist(patches, patches)[7].argsort()[:5]  # of the patch in row 1 and column 1
    assert set(nearest.tolist()) == {7, 6, 8, 1, 13} and not class_token.any()


def test_contrastive_loss_is_least_for_the_embeddings_of_the_captions(tokenizer):
    clip = Clip(tokenizer)
    scenes = [(CAT,), (FISH,), (CAT,), ()]  # the first and the third are equal and interchangeable
    with torch.no_grad():
        clip.logit_scale.fill_(5.0)
        embeds = clip.encode_text([caption(things, 1) for things in scenes])
        loss = contrastive_loss(clip, embeds, scenes, style=1)
        assert loss < contrastive_loss(clip, embeds[[0, 1, 3, 2]], scenes, style=1)
        swapped = contrastive_loss(clip, embeds[[2, 1, 0, 3]], scenes, style=1)
        torch.testing.assert_close(loss, swapped)


def test_contrastive_loss_is_cross_entropy_in_both_directions(tokenizer):
    clip = Clip(tokenizer)
    scenes, embeds = [(CAT,), (FISH,), (CAT, FISH)], F.normalize(torch.randn(3, 128), dim=-1)
    captions = clip.encode_text([caption(things, 0) for things in scenes])
    logits = clip.logit_scale.exp() * embeds @ captions.T
    by_image, by_text = (-logits.log_softmax(dim=dim).diagonal().mean() for dim in (1, 0))
    loss = contrastive_loss(clip, embeds, scenes, style=0)
    torch.testing.assert_close(loss, (by_image + by_text) / 2)


def test_target_of_a_caption_is_spread_over_equal_scenes(tokenizer):
    """One caption leaves no choice; the caption's target is half of each embedding, so ln 2."""
    loss = contrastive_loss(Clip(tokenizer), torch.ones(2, 128), [(CAT,), (CAT,)], style=0)
    torch.testing.assert_close(loss.detach(), torch.tensor(2.0).log() / 2)


def test_patch_embeddings_come_from_the_layer_that_llava_reads(tokenizer):
    clip = Clip(tokenizer)
    images = torch.randn(2, 3, 96, 96)
    image_embeds, patch_embeds = clip.encode_image(images)
    patches = clip.vision_model(images, feature_layer=-2)[:, 1:]
    class_token = clip.vision_model(images, feature_layer=-1)[:, 0]
    torch.testing.assert_close(patch_embeds, clip.project(patches))
    torch.testing.assert_close(image_embeds, clip.project(class_token))


def test_saved_clip_loads_with_equal_outputs(tmp_path, tokenizer):
    clip = Clip(tokenizer)
    clip.to(torch.bfloat16).float()  # save_clip rounds to bfloat16
    save_clip(clip, tmp_path / "clip")
    loaded = load_clip(tmp_path / "clip")
    images = torch.randn(2, 3, 96, 96)
    captions = ["A cat.", "A big red fish in the middle."]
    assert torch.equal(loaded.encode_image(images)[0], clip.encode_image(images)[0])
    assert torch.equal(loaded.encode_text(captions), clip.encode_text(captions))


def test_padding_does_not_change_the_embedding_of_a_caption(tokenizer):
    clip = Clip(tokenizer)
    short, long = "A cat.", "A big red fish in the middle."
    torch.testing.assert_close(clip.encode_text([short]), clip.encode_text([short, long])[:1])
