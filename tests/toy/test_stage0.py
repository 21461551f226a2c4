from pathlib import Path

from nanollava import Llava
from nanollava.toy import questions, scene, stage0

ASSETS = Path(__file__).parents[2] / "assets"


def test_tokenizer_spells_any_text_and_has_a_token_for_each_common_word(tmp_path):
    tokenizer = stage0.train_tokenizer(tmp_path / "tokenizer.model", seed=0, scenes=500)
    for text in ("What color is the cat?", 'Quiz: "3 + 4 = 7", {really}!'):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    letters = [f"({letter})" for letter in "ABCD"]
    for word in (*scene.KINDS, *scene.COLORS, *scene.SIZES, *scene.PLACES, *letters):
        assert len(tokenizer.encode(word)) == 1


def test_both_parts_are_trained_and_existing_ones_are_kept(tmp_path, monkeypatch):
    trained = []

    def shorten(train):
        def train_shortly(folder, tokenizer, seed, device, **options):
            trained.append(folder.name)
            train(folder, tokenizer, seed, device, **options, steps=2, batch_size=4)

        return train_shortly

    for name in ("train_clip", "train_llama"):
        monkeypatch.setattr(stage0, name, shorten(getattr(stage0, name)))
    stage0.train_parts(tmp_path, 0, "cpu")
    stage0.train_parts(tmp_path, 0, "cpu")
    assert trained == ["toy-clip", "toy-llama"]
    model = Llava.from_parts(tmp_path / "toy-clip", tmp_path / "toy-llama")
    assert model.config.tokens_per_image == 36
    assert model.config.image_token_id == model.config.text.vocab_size
    columns = stage0.evaluate_parts(tmp_path, "cpu", scenes=2)
    assert set(columns["LLaMA, telegrams"]) == {*questions.QUESTION_TYPES, "all"}
    assert 0 <= columns["CLIP, 1 of 32"]["all"] <= 100


def test_shipped_parts_answer_at_least_90_percent():
    columns = stage0.evaluate_parts(ASSETS, "cpu", scenes=40)
    for name in ("CLIP, 1 of 32", "LLaMA, telegrams", "LLaMA, prose"):
        assert columns[name]["all"] >= 90
