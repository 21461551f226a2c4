"""Bad files for every reader of files: each ends in one short line that names the file.

A new reader is a row of READERS. Its file gets every content of NOT_JSON, and the reader's good
content with each field of the row removed, and replaced by values of every other type.
"""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from nanollava.benchmarks import llava_bench, scienceqa
from nanollava.benchmarks.answers import read_answers
from nanollava.data import Conversations
from nanollava.infra.io import InputError
from nanollava.infra.json_io import read_json_list, read_jsonl
from nanollava.infra.resume import Checkpoints
from nanollava.infra.run_log import read_log
from nanollava.llava import LlavaConfig
from nanollava.teacher.captions import read_pairs
from nanollava.teacher.coco import read_coco
from nanollava.teacher.ledger import Ledger
from nanollava.tokenizer import Tokenizer
from nanollava.toy.score import read_test
from nanollava.weights import hf_config, safetensors_io

NOT_JSON = {
    "half an object": b'{"a": 1', "half a list": b"[1,", "half a string": b'"abc',
    "a word": b"{abc}", "single quotes": b"{'a': 1}", "html": b"<!DOCTYPE html><html>",
    "two values": b"{} {}", "zeros": bytes(4096), "UTF-16": '{"a": 1}'.encode("utf-16"),
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "deep lists": b"[" * 100_000, "deep objects": b'{"a":' * 100_000,
    "deep and closed": b"[" * 100_000 + b"]" * 100_000, "5,000 digits": b"[" + b"1" * 5000 + b"]",
    "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "a comment": b"// a\n[]",
}
NOT_A_FILE = {"empty": b"", "blank": b" \n \n"}  # for JSONL, a file without rows
OTHER_JSON = {"null": b"null", "a number": b"3", "text": b'"abc"', "true": b"true", "NaN": b"NaN",
              "a long text": b'"' + b"x" * 10**6 + b'"',
              "control characters": rb'"\n\u001b[2J\u2028"'}
LONG = "x" * 10**5
WRONG = {  # for a field of this type
    str: (None, 7, 1.5, True, math.nan, ["a"], {"a": "b"}),
    int: (None, "7", 1.5, True, math.nan, -math.inf, [1], {}, LONG),
    float: (None, "1.5", True, math.nan, math.inf, 10**400, [1.5], {}, LONG),
    bool: (None, "false", 2, 0.0, [], {}),
    list: (None, 7, "ab", True, {}, {"0": 1}, LONG),
    dict: (None, 7, "ab", True, [], [{}], LONG),
}


@dataclass
class Reader:
    """A reader of one file: read(path, value), after `good` was written to the path as JSON.

    fields: paths into `good`. "a" is needed, "a?" may be absent or null, "a~" is a number or text.
    """

    file: str
    good: object
    fields: str
    read: Callable


def drain(read: Callable) -> Callable:
    return lambda path: list(read(path))


def read_problems(path: Path):
    other = {"problems.json": {"test": ["p7"]}, "pid_splits.json": {"p7": PROBLEM}}[path.name]
    names = {"problems.json", "pid_splits.json"} - {path.name}
    (path.parent / names.pop()).write_text(json.dumps(other))
    return scienceqa.read_problems(path.parent, "test")


def read_instances(path: Path):
    captions = path.with_name("captions.json")
    captions.write_text(json.dumps(CAPTIONS))
    return read_coco(captions, path)


def read_bench(path: Path):
    files = {"reference.jsonl": ANSWER, "context.jsonl": CONTEXT} | {path.name: None}
    for name, row in files.items():
        if row:
            (path.parent / name).write_text(json.dumps(row))
    reference, context = (path.with_name(name) for name in ("reference.jsonl", "context.jsonl"))
    return llava_bench.build_items([QUESTION], reference, context, {"1": "A cat."})


def read_run_json(path: Path):
    step = path.parent / "resume" / "step-3"
    step.mkdir(parents=True, exist_ok=True)
    (step / "run.json").write_bytes(path.read_bytes())
    return Checkpoints(step.parent, torch.nn.Linear(1, 1), [], {}).check_settings(step)


def read_ledger(path: Path):
    ledger = Ledger(path)
    ledger.load()
    return ledger.answers


def read_index(path: Path):
    path.with_name("part.safetensors").touch()
    return safetensors_io.shard_paths(path.parent)


def read_rows(path: Path):
    Image.new("RGB", (8, 8)).save(path.with_name("a.png"))
    config = SimpleNamespace(template="vicuna_v1", tokens_per_image=4, image_token_id=448)
    return Conversations([(path, path.parent)], TOKENIZER, config)


TOKENIZER = Tokenizer(Path(__file__).parents[1] / "assets" / "toy-llama")
TURNS = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cat."}]
PROBLEM = {"question": "What?", "choices": ["a", "b"], "answer": 1, "hint": "", "image": None,
           "subject": "s", "grade": "grade1", "lecture": "", "solution": ""}
CAPTIONS = {"images": [{"id": 7, "file_name": "7.jpg", "width": 20.0, "height": 10.0}],
            "annotations": [{"image_id": 7, "caption": "A cat."}]}
INSTANCES = {"images": [], "categories": [{"id": 1, "name": "cat"}],
             "annotations": [{"image_id": 7, "category_id": 1, "bbox": [1.5, 1.0, 5.0, 5.0]}]}
QUESTION = {"question_id": 1, "image": "7.jpg", "text": "What?", "category": "conv"}
ANSWER = {"question_id": 1, "text": "A cat."}
CONTEXT = {"image": "7.jpg", "captions": ["A cat."],
           "instances": [{"category": "cat", "bbox": [0.1, 0.2, 0.3, 0.4]}]}
PAID = {"key": "a", "text": "A cat.", "prompt_tokens": 5.0, "completion_tokens": 2.0,
        "complete": True, "kind": "detail", "model": "gpt-4"}
CLIP = {"model_type": "clip_vision_model", "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-5}
LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 90,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 1e4,
         "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "tie_word_embeddings": False}
LLAVA = {"model_type": "llava", "vision_config": CLIP, "text_config": LLAMA,
         "image_token_index": 90, "vision_feature_layer": -2, "projector_hidden_act": "gelu",
         "nanollava": {"template": "v0", "stage": 1, "vocab_size": 90}}


def config_fields(prefix: str, config: dict) -> str:
    return " ".join(f"{prefix}{key}?" for key in config if key != "model_type")


READERS = {
    "COCO captions": Reader("captions.json", CAPTIONS, "images annotations images.0.file_name "
        "images.0.id~ images.0.width? annotations.0.image_id~ annotations.0.caption", read_coco),
    "COCO instances": Reader("instances.json", INSTANCES, "annotations categories.0.name "
        "categories.0.id~ annotations.0.bbox annotations.0.bbox.2 annotations.0.category_id~ "
        "annotations.0.image_id~ images?", read_instances),
    "pairs in JSON": Reader("pairs.json", [{"image": "a.jpg", "caption": "A cat."}],
        "0.image 0.caption 0", drain(read_pairs)),
    "pairs in JSONL": Reader("pairs.jsonl", {"image": "a.jpg", "caption": "A cat."},
        "image caption", drain(read_pairs)),
    "ScienceQA problems": Reader("problems.json", {"p7": PROBLEM}, "p7 p7.question p7.choices "
        "p7.choices.0 p7.answer p7.hint p7.subject p7.grade p7.lecture p7.solution", read_problems),
    "ScienceQA splits": Reader("pid_splits.json", {"test": ["p7"]}, "test test.0~", read_problems),
    "questions": Reader("questions.jsonl", QUESTION, "question_id~ image text category",
        drain(lambda path: read_jsonl(path, llava_bench.QUESTION))),
    "references": Reader("reference.jsonl", ANSWER, "question_id~ text", read_bench),
    "contexts": Reader("context.jsonl", CONTEXT, "captions? captions.0 instances? "
        "instances.0.category instances.0.bbox instances.0.bbox.1", read_bench),
    "answers": Reader("answers.jsonl", ANSWER, "question_id~ text",
        lambda path: read_answers(path, {"1": ("What?", [])})),
    "ledger": Reader("ledger.jsonl", PAID,
        "key text prompt_tokens completion_tokens complete kind? model?", read_ledger),
    "log": Reader("log.jsonl", {"step": 1, "loss": 1.5, "elapsed": 2.5, "val_loss": 1.5},
        "step loss elapsed? val_loss?", read_log),
    "run.json": Reader("run.json", {"step": 3}, "step", read_run_json),
    "test.json": Reader("test.json", [{"image": "a.png", "type": "count", "conversations": TURNS}],
        "0 0.image 0.type 0.conversations 0.conversations.0 0.conversations.1.value",
        lambda path: read_test(path.parent)),
    "CLIP": Reader("config.json", CLIP, config_fields("", CLIP),
        lambda path: hf_config.read_config(path.parent, hf_config.vision_config)),
    "LLaMA": Reader("config.json", LLAMA, config_fields("", LLAMA),
        lambda path: hf_config.read_config(path.parent, hf_config.text_config)),
    "LLaVA": Reader("config.json", LLAVA, " ".join([
        config_fields("", LLAVA), config_fields("vision_config.", CLIP),
        config_fields("text_config.", LLAMA), config_fields("nanollava.", LLAVA["nanollava"])]),
        lambda path: hf_config.read_config(path.parent, LlavaConfig.from_json)),
    "index": Reader("model.safetensors.index.json", {"weight_map": {"a": "part.safetensors"}},
        "weight_map weight_map.a?", read_index),
    "LLaVA JSON": Reader("chat.json", [{"id": 1, "image": "a.png", "conversations": TURNS}],
        "0 0.image 0.conversations 0.conversations.0 0.conversations.0.value 0.conversations.1 "
        "0.conversations.1.value 0.conversations.1.from", read_rows),
}


def bad_contents(reader: Reader):
    """Yield (name, bytes)."""
    is_jsonl = reader.file.endswith("l")
    yield from (NOT_JSON | OTHER_JSON | ({} if is_jsonl else NOT_A_FILE)).items()
    for field in reader.fields.split():
        path = field.rstrip("?~").split(".")
        *parents, key = (int(part) if part.isdigit() else part for part in path)
        good = find(reader.good, [*parents, key])
        values = [value for value in WRONG[type(good)]
                  if not (field.endswith("?") and value is None)
                  and not (field.endswith("~") and type(value) in (int, str))]
        for value in values:
            content = copy.deepcopy(reader.good)
            find(content, parents)[key] = value
            yield f"{field} = {str(value)[:20]}", json.dumps(content).encode()
        if not field.endswith("?") and isinstance(key, str):
            content = copy.deepcopy(reader.good)
            del find(content, parents)[key]
            yield f"{field} is missing", json.dumps(content).encode()


def find(content, keys: list):
    for key in keys:
        content = content[key]
    return content


def check_refused(read: Callable, path: Path, name: str) -> None:
    try:
        read(path)
    except InputError as error:
        message = str(error)
        assert path.name in message and len(message) < 500, (name, message)
        assert message.isprintable(), (name, message)
    except Exception as error:
        raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
    else:
        raise AssertionError(f"{name}: it was accepted")


@pytest.mark.parametrize("name", READERS)
def test_good_file_is_read(name, tmp_path):
    reader = READERS[name]
    (tmp_path / reader.file).write_text(json.dumps(reader.good))
    reader.read(tmp_path / reader.file)


@pytest.mark.parametrize("name", READERS)
def test_bad_file_is_refused_in_one_line(name, tmp_path):
    reader = READERS[name]
    path = tmp_path / reader.file
    for case, content in bad_contents(reader):
        path.write_bytes(content + b"\n")
        check_refused(reader.read, path, case)


def test_bad_list_is_refused_in_one_line(tmp_path):
    more = {f"[1] {text}": f"[1] {text}".encode() for text in ("[2]", "]", ",", "x", "{}", "null")}
    for case, content in (NOT_JSON | NOT_A_FILE | OTHER_JSON | more).items():
        (tmp_path / "a.json").write_bytes(content)
        check_refused(lambda path: list(read_json_list(path)), tmp_path / "a.json", case)


@pytest.mark.parametrize("read", [Tokenizer, lambda path: safetensors_io.read_tensors(path.parent)])
def test_file_that_is_no_tokenizer_or_weights_is_refused(read, tmp_path):
    name = "tokenizer.model" if read is Tokenizer else "model.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode()
    more = {"no data": len(header).to_bytes(8, "little") + header,
            "huge header": b"\xff" * 8 + header, "header of a list": b"\2" + bytes(7) + b"[]"}
    for case, content in (NOT_JSON | NOT_A_FILE | OTHER_JSON | more).items():
        (tmp_path / name).write_bytes(content)
        check_refused(read, tmp_path / name, case)


@pytest.mark.parametrize("line", [
    b"a.jpg", b"\tA cat.", b"a.jpg\t", b"a.jpg\t \x0b", b"a.jpg A cat.", b"a.jpg\t\xff",
    b"a.jpg\tAn <image>.", "a\tb".encode("utf-16")])
def test_bad_line_of_a_table_is_refused(line, tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"a.jpg\tA cat.\n" + line)
    check_refused(lambda path: list(read_pairs(path)), tmp_path / "a.tsv", str(line))


def test_byte_order_mark_windows_lines_and_unknown_fields_are_read(tmp_path):
    more = {"unknown": [None, math.nan]}
    for reader in READERS.values():
        good = reader.good | more if isinstance(reader.good, dict) else reader.good
        text = json.dumps(good, ensure_ascii=False)
        text = text if reader.file.endswith("l") else text.replace(", ", ",\r\n ")
        (tmp_path / reader.file).write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
        reader.read(tmp_path / reader.file)
