from pathlib import Path

from nanollava import Llava
from nanollava.toy import questions, scene, stage0


def test_the_vocabulary_spells_everything_and_keeps_common_words_whole(tmp_path):
    tokenizer = stage0.train_tokenizer(tmp_path / "tokenizer.model", seed=0, scenes=500)
    for text in ("What color is the cat?", 'Quiz: "3 + 4 = 7", {really}!'):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for word in (*scene.KINDS, *scene.COLORS, *scene.SIZES, *scene.PLACES, *(f"({letter})" for letter in "ABCD")):
        assert len(tokenizer.encode(word)) == 1


def test_stage_0_makes_both_parts_and_leaves_alone_what_is_there(tmp_path, monkeypatch):
    made = []

    def short(train):
        def run(folder, tokenizer, seed, device, **more):
            made.append(folder.name)
            train(folder, tokenizer, seed, device, **more, steps=2, batch_size=4)

        return run

    for name in ("train_clip", "train_llama"):
        monkeypatch.setattr(stage0, name, short(getattr(stage0, name)))
    stage0.train_parts(tmp_path, 0, "cpu")
    stage0.train_parts(tmp_path, 0, "cpu")
    assert made == ["toy-clip", "toy-llama"]
    model = Llava.from_parts(tmp_path / "toy-clip", tmp_path / "toy-llama")
    assert model.config.tokens_per_image == 36 and model.config.image_token_id == model.config.text.vocab_size
    columns = stage0.parts_table(tmp_path, "cpu", scenes=2)
    assert set(columns["LLaMA told in bags"]) == set(questions.QUESTIONS) | {"all"}
    assert 0 <= columns["CLIP, of 32"]["all"] <= 100


def test_the_shipped_halves_know_their_world():
    columns = stage0.parts_table(Path(__file__).parents[2] / "assets", "cpu", scenes=40)
    assert columns["CLIP, of 32"]["all"] >= 90
    assert columns["LLaMA told in bags"]["all"] >= 90 and columns["LLaMA told in prose"]["all"] >= 90
