"""Words that are near image features: found, and told from chance."""

import pytest
import torch

from nanollava.patch_words import (
    NUM_UNTRAINED,
    near_cosine,
    nearest_words,
    untrained_projector,
    word_tokens,
)


def test_nearest_words_are_found_whatever_all_embeddings_have_in_common(model, tokenizer):
    table = model.language_model.model.embed_tokens.weight
    table.data += 3  # a direction that means nothing
    words = word_tokens(tokenizer)
    mean = table.mean(dim=0)
    features = torch.stack([mean + 0.1 * (table[words[word]] - mean) for word in ("cat", "red")])
    found = nearest_words(model, tokenizer, features)
    assert [row[0][0] for row in found] == ["cat", "red"]
    assert all(row[0][1] == pytest.approx(1, abs=1e-4) and len(row) == 5 for row in found)


def test_words_begin_a_word_and_stand_for_all_their_spellings(tokenizer):
    words = word_tokens(tokenizer)
    assert {"cat", "red", "at the top left"} <= words.keys()
    assert not [word for word in words if "▁" in word or word != word.lower() or len(word) < 2]


def test_near_is_what_untrained_projectors_reach_in_one_of_twenty_cases(model, tokenizer):
    pixels = torch.randn(1, 3, 32, 32)
    near = near_cosine(model, tokenizer, pixels)
    best = torch.tensor([row[0][1] for seed in range(NUM_UNTRAINED) for row in nearest_words(
        model, tokenizer, untrained_projector(model, seed)(
            model.vision_tower(pixels)[:, 1:])[0])])
    assert (best > near).float().mean() == pytest.approx(1 / 20, abs=0.01)


def test_words_of_both_spellings_have_the_lower_one():
    class Vocabulary(list):
        def piece(self, token):
            return self[token]

    words = word_tokens(Vocabulary(["▁God", "▁god", "▁The", "god", "<0x0A>", "▁"]))
    assert words == {"god": 1, "the": 2}
