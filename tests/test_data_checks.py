import json
import random

import pytest
from PIL import Image

from nanollava.conversation import tokenize_conversation
from nanollava.data import Conversations, length_grouped_batches
from nanollava.data_checks import check_row, row_length, stats
from nanollava.infra.io import InputError

QUESTION = {"from": "human", "value": "<image>\nWhat is there?"}
ANSWER = {"from": "gpt", "value": "A cat."}
ROW = {"id": "7", "image": "train_000000.png", "conversations": [QUESTION, ANSWER]}


@pytest.fixture
def load(world, tokenizer, config, tmp_path):
    def load(content, images=world / "images", **options):
        content = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "chat.json").write_text(content)
        sources = [(tmp_path / "chat.json", images)]
        return Conversations(sources, tokenizer, config, **options)

    return load


@pytest.mark.parametrize("change, message", [
    ({"conversations": [QUESTION]}, "it has no answer to learn from"),
    ({"conversations": []}, "it has no turns"),
    ({"conversations": [QUESTION, {"from": "gpt", "value": " "}]}, r"turn 2 \(gpt\) is empty"),
    ({"image": []}, "it has 0 images, but 1 <image>"),
    ({"conversations": [QUESTION, ANSWER] * 2}, "it has 1 images, but 2 <image>"),
    ({"video": "a.mp4"}, "it has 'video', which is not read, only 'image'"),
    ({"images": ["a.png"]}, "it has 'images', which is not read"),
    ({"image": 7}, "'image' must be a file name or a list of file names"),
])
def test_row_that_cannot_be_trained_on_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        check_row({**ROW, **change})


@pytest.mark.parametrize("content, message", [
    ("[", "is not JSON"), ("[1", "is not JSON"), ("{}", "is not a JSON list"), ("[]", "is empty"),
    ("[3]", "row 0: it has no 'conversations'"),
])
def test_file_that_is_not_a_list_of_conversations_is_refused(load, content, message):
    with pytest.raises(InputError, match=message):
        load(content)


def test_all_bad_rows_are_counted_and_ten_are_named(load, world, tmp_path):
    image = (world / "images" / "train_000000.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(image[:-40])
    (tmp_path / "page.png").write_text("<html>not found</html>")
    bad = [{**ROW, "image": f"gone{number}.png"} for number in range(10)]
    bad += [{**ROW, "image": name} for name in ("broken.png", "page.png")]
    bad += [{"id": "8"}]
    message = r"^13 of 14 rows .*--skip-bad.*row 0 .*gone0.png; .*row 9 .*; and 3 more$"
    (tmp_path / "train_000000.png").symlink_to(world / "images" / "train_000000.png")
    with pytest.raises(InputError, match=message):
        load([*bad, ROW], tmp_path)
    for row, name in ((bad[-3], "broken.png"), (bad[-2], "page.png")):
        with pytest.raises(InputError, match=f"{name} is not an image"):
            load([ROW, row], tmp_path)


@pytest.mark.parametrize("image", ["../secret.png", "/etc/secret.png", "a/../../secret.png", ".."])
def test_image_outside_of_the_image_folder_is_refused_before_it_is_opened(load, tmp_path, image):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    for name in (image, image.replace("/etc", str(tmp_path))):
        with pytest.raises(InputError, match=r"row 0 \(id 7\): '.*' is outside of .*images: name "):
            load([{**ROW, "image": name}, ROW])


def test_max_length_that_cuts_off_all_answers_is_an_error(load):
    with pytest.raises(InputError, match="row 0 .*no answer begins within 10 tokens; raise --max"):
        load([ROW], max_length=10)


def test_max_length_that_cuts_off_an_image_is_an_error(load):
    length = len(load([ROW])[0][0])
    row = {**ROW, "image": [ROW["image"]] * 2, "conversations": [QUESTION, ANSWER] * 2}
    assert load([row]).truncated == 0
    with pytest.raises(InputError, match=f"row 0 .*an image lies beyond {length} tokens"):
        load([row], max_length=length)


class ByteTokenizer:
    """The worst case of SentencePiece: a ▁, then a token for each byte."""

    bos_id, eos_id = 256, 257

    def __len__(self):
        return 259

    def encode(self, text):
        return [258, *text.encode()]


@pytest.mark.parametrize("template", ["v0", "vicuna_v1", "plain"])
@pytest.mark.parametrize("num_turns", [2, 3, 4, 10])
@pytest.mark.parametrize("image", ["", "<image>", "<image>é<image>"])
def test_row_that_is_cut_is_always_counted(config, template, num_turns, image):
    config.template = template
    turns = [{"from": ("human", "gpt")[number % 2], "value": "é"} for number in range(num_turns)]
    turns[0]["value"] += image

    def tokenize(turns):
        return tokenize_conversation(turns, ByteTokenizer(), template, config.tokens_per_image)

    exact = len(tokenize(turns)[0])
    assert row_length(turns, tokenize, config, max_length=exact - 1) == exact


def test_row_that_cannot_exceed_max_length_is_not_tokenized(config):
    assert row_length([QUESTION, ANSWER], None, config, max_length=300) < 300


def test_padding_is_below_4_percent_of_the_tokens_of_each_rank():
    """Batches of 32 on 8 ranks; lengths as in LLaVA-Instruct, estimated with an error of 4 %."""
    rng = random.Random(0)
    text = [rng.lognormvariate(5.5, 0.5) for _ in range(20_000)]
    exact = [round(256 + tokens) for tokens in text]
    estimated = [round(256 + tokens * rng.gauss(1, 0.04)) for tokens in text]
    batches = length_grouped_batches(estimated, batch_size=32, steps=600, seed=0)
    shares = [[exact[row] for row in batch[rank::8]] for batch in batches for rank in range(8)]
    computed = sum(max(share) * len(share) for share in shares)
    assert sum(map(sum, shares)) > 0.96 * computed


def test_stats_count_usable_rows_and_name_the_others(tmp_path):
    row = {**ROW, "id": "1-detail"}
    text = {"id": "2", "conversations": [{"from": "human", "value": "Hi"}, ANSWER] * 2}
    (tmp_path / "data.json").write_text(json.dumps([row, text, {**row, "image": []}, 3]))
    numbers, errors = stats(tmp_path / "data.json")
    assert numbers == {
        "rows": 4, "images": 1, "rows without image": 1, "questions": 3, "answers": 3,
        "words in answers": 6, "unusable rows": 2, "kind: detail, percent": 50,
        "kind: unknown, percent": 50}
    assert errors == ["row 2: it has 0 images, but 1 <image> in its text",
                      "row 3: it has no 'conversations'"]
