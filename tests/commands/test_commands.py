"""train.py, sample.py and prepare_data.py as a user meets them: what they print, where, and how they end."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nanollava import Llava
from nanollava.infra.cli import one_line_errors
from nanollava.infra.io import read_json
from nanollava.llama import Block, Llama
from nanollava.weights import hf_config, hf_format


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """command("train", "--stage", 1) runs it in an empty folder and gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        code = 0
        try:
            with one_line_errors():
                importlib.import_module(name).main()
        except SystemExit as exit:
            code = exit.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def parts(model, tokenizer, tmp_path):
    """The folders of a random CLIP and a random LLaMA, tiny."""
    clip, llama = tmp_path / "clip", tmp_path / "llama"
    hf_format.save_folder(clip, hf_config.clip_json(vars(model.config.vision)), model.vision_tower.state_dict())
    hf_format.save_folder(llama, hf_config.llama_json(vars(model.config.text)), model.language_model.state_dict(),
                     [tokenizer.path])
    return "--vision", clip, "--llm", llama


@pytest.fixture
def run_folder(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "run", [tokenizer.path])
    return tmp_path / "run"


def is_one_line(error, *words):
    assert error.startswith("error: ") and error.count("\n") == 1, error
    for word in words:
        assert str(word) in error
    return True


# ---------------------------------------------------------------------------------------------
# train.py


def test_stage_1_trains_the_projector_alone_stage_2_the_language_model_too(command, parts, world, tmp_path):
    code, out, _ = command("train", "--stage", 1, *parts, "--data", world, "--out", tmp_path / "one")
    assert (code, out) == (0, "")
    code, *_ = command("train", "--stage", 2, "--model", tmp_path / "one", "--data", world, "--out", tmp_path / "two")
    assert code == 0
    begin = Llava.from_parts(tmp_path / "clip", tmp_path / "llama").state_dict()
    one, two = (Llava.from_pretrained(tmp_path / folder) for folder in ("one", "two"))
    changed_by = {1: set(), 2: set()}
    for stage, (before, after) in enumerate(((begin, one.state_dict()), (one.state_dict(), two.state_dict())), 1):
        changed_by[stage] = {name.split(".")[0] for name in before if not before[name].equal(after[name])}
    assert changed_by == {1: {"multi_modal_projector"}, 2: {"multi_modal_projector", "language_model"}}
    assert (one.config.stage, two.config.stage) == (1, 2)
    log = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    preset = importlib.import_module("train").PRESETS["toy"][2]
    assert len(log) == round(preset["epochs"] * len(read_json(world / "instruct.json")) / preset["batch_size"])


def test_the_same_seed_trains_the_same_weights(command, parts, world, tmp_path):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        command("train", "--stage", 1, *parts, "--data", world, "--out", tmp_path / folder, "--seed", seed)
    a, b, c = (Llava.from_pretrained(tmp_path / folder).multi_modal_projector.linear_1.weight for folder in "abc")
    assert a.equal(b) and not a.equal(c)


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_is_the_dtype_of_the_result_and_of_the_arithmetic_where_it_is_fast(command, parts, world, tmp_path,
                                                                                    monkeypatch, fast):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: fast)
    seen, logits = set(), Llama.logits
    monkeypatch.setattr(Llama, "logits", lambda llama, hidden: seen.add(hidden.dtype) or logits(llama, hidden))
    code, *_ = command("train", "--stage", 2, *parts, "--data", world, "--out", tmp_path / "run",
                       "--dtype", "bfloat16", "--device", "cpu", "--epochs", 0.3)
    assert code == 0
    assert seen == {torch.bfloat16 if fast else torch.float32}
    assert {tensor.dtype for tensor in load_file(tmp_path / "run" / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("preset, flags, twice", [("7b", [], True), ("7b", ["--keep-activations"], False),
                                                  ("toy", [], False)])
def test_blocks_are_computed_twice_but_for_the_toy_or_on_request(command, parts, world, tmp_path, monkeypatch, preset,
                                                                 flags, twice):
    runs, forward = [], Block.forward
    monkeypatch.setattr(Block, "forward", lambda block, *inputs: runs.append(1) or forward(block, *inputs))
    command("train", "--preset", preset, "--stage", 1, *parts, "--data", world, "--out", tmp_path / "run",
            "--batch-size", len(read_json(world / "pretrain.json")), "--epochs", 1, *flags)
    assert len(runs) == (4 if twice else 2)  # one step of two blocks


def test_projector_layer_and_template_are_kept_and_plain_is_for_captions_alone(command, parts, world, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    command("train", "--stage", 1, *parts, "--data", world, "--out", one, "--template", "plain",
            "--projector", "mlp2x_gelu", "--feature-layer", -1)
    command("train", "--stage", 2, "--model", one, "--data", world, "--out", two)
    one, two = (Llava.from_pretrained(folder).config for folder in (one, two))
    assert (one.template, one.projector, one.feature_layer) == ("plain", "mlp2x_gelu", -1)
    assert (two.template, two.projector, two.feature_layer) == ("vicuna_v1", "mlp2x_gelu", -1)


def test_epochs_and_batch_size_make_the_steps(command, parts, world, tmp_path):
    rows = len(read_json(world / "pretrain.json"))
    command("train", "--stage", 1, *parts, "--data", world, "--out", tmp_path / "run",
            "--epochs", 1.5, "--batch-size", 10, "--lr", 0.5)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(log) == rows * 1.5 / 10 and max(row["lr"] for row in log) == 0.5


def test_a_picture_that_will_not_open_ends_training_in_one_line(command, parts, world, tmp_path):
    rows = read_json(world / "pretrain.json")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "cat.png").write_text("hello")
    (tmp_path / "chat.json").write_text(json.dumps([{**row, "image": "cat.png"} for row in rows]))
    code, _, error = command("train", "--stage", 1, *parts, "--data", tmp_path / "chat.json",
                             "--images", tmp_path / "images", "--out", tmp_path / "run")
    assert code == 2 and "error: " in error and "cat.png is not a picture" in error
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("arguments, words", [
    (["--stage", 2], ["runs/toy/stage1", "--stage 1"]),
    (["--stage", 1, "--data", "none.json"], ["no data at none.json"]),
    (["--stage", 1, "--vision", "nowhere", "--data", "world"], ["nowhere"]),
    (["--stage", 1, "--model", "a", "--vision", "b"], ["--model", "--vision"]),
    (["--preset", "7b"], ["--preset 7b needs --data"]),
    (["--small-llm"], ["--small-llm is for --stage 0"]),
    (["--model", "a"], ["--stage"]),
    (["--stage", 3], ["--stage"]),
    (["--lr", "0"], ["--lr"]),
    (["--stage", 1, "--lora-rank", 4], ["--lora-rank", "--stage 2"]),
    (["--plan"], ["--plan", "--preset 7b"]),
    (["--stage", 2, "--model", "a", "--data", "x.json"], ["no model at a"]),
])
def test_a_mistake_in_training_is_one_line(command, world, tmp_path, arguments, words):
    (tmp_path / "world").symlink_to(world)
    code, out, error = command("train", *arguments)
    assert (code, out) == (2, "") and is_one_line(error, *words)
    assert not (tmp_path / "runs").exists()


def test_a_length_limit_that_leaves_no_answer_is_told_before_training(command, parts, world, tmp_path):
    code, _, error = command("train", "--stage", 1, *parts, "--data", world, "--out", tmp_path / "run",
                             "--max-length", 20)
    assert code == 2 and is_one_line(error, "row 0", "raise --max-length")
    assert not (tmp_path / "run").exists()


def test_a_trained_model_is_never_overwritten(command, run_folder, world):
    before = (run_folder / "model.safetensors").read_bytes()
    code, _, error = command("train", "--stage", 1, "--data", world, "--out", run_folder)
    assert code == 2 and is_one_line(error, run_folder, "--out")
    assert (run_folder / "model.safetensors").read_bytes() == before


# ---------------------------------------------------------------------------------------------
# sample.py


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "cat.webp")
    return tmp_path / "cat.webp"


def test_the_reply_alone_goes_to_standard_output(command, run_folder, picture):
    code, out, error = command("sample", "--model", run_folder, "--image", picture, "--prompt", "What?",
                               "--max-new-tokens", 5)
    assert code == 0 and out.endswith("\n") and error == ""


def test_several_prompts_are_one_conversation(command, run_folder, picture, monkeypatch):
    import sample

    heard = []

    def stream(model, tokenizer, turns, *_):
        heard.append([turn["value"] for turn in turns])
        return iter(["Yes", "."])

    monkeypatch.setattr(sample, "stream", stream)
    code, out, _ = command("sample", "--model", run_folder, "--image", picture,
                           "--prompt", "A cat?", "--prompt", "Red?")
    assert (code, out) == (0, "Yes.\nYes.\n")
    assert heard == [["<image>\nA cat?"], ["<image>\nA cat?", "Yes.", "Red?"]]


def test_without_a_prompt_every_line_of_standard_input_is_one(command, run_folder, picture, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("A cat?\n\nRed?\n"))
    code, out, _ = command("sample", "--model", run_folder, "--image", picture, "--max-new-tokens", 3)
    assert code == 0 and out.count("\n") >= 2


def test_a_question_with_a_picture_mark_does_not_end_a_chat(command, run_folder, picture, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("<image> A cat?\nRed?\n"))
    code, out, error = command("sample", "--model", run_folder, "--image", picture, "--max-new-tokens", 1)
    assert code == 0 and out.count("\n") == 1 and "--image says" in error


def test_the_same_seed_draws_the_same_reply(command, run_folder, picture):
    ask = ("sample", "--model", run_folder, "--image", picture, "--prompt", "What?", "--temperature", 1,
           "--max-new-tokens", 20, "--seed")
    assert command(*ask, 1) == command(*ask, 1) != command(*ask, 2)


@pytest.mark.parametrize("arguments, words", [
    (["--image", "none.jpg"], ["no picture at none.jpg"]),
    (["--image", "text.jpg"], ["text.jpg is not a picture"]),
    (["--prompt", " "], ["--prompt is empty"]),
    (["--prompt", "<image>?"], ["<image>"]),
    (["--model", "nowhere"], ["no model folder at nowhere"]),
    (["--max-new-tokens", "0"], ["--max-new-tokens"]),
    (["--temperature", "nan"], ["--temperature"]),
    (["--device", "cuda:99"], ["--device cuda:99", "cpu"]),
    (["--top-p", "2"], ["--top-p"]),
    (["--device", "tpu"], ["--device tpu"]),
])
def test_a_mistake_in_sampling_is_one_line(command, run_folder, tmp_path, arguments, words):
    (tmp_path / "text.jpg").write_text("hello")
    code, out, error = command("sample", "--model", run_folder, "--prompt", "What?", *arguments)
    assert (code, out) == (2, "") and is_one_line(error, *words)


def test_without_a_toy_run_it_says_how_to_make_one(command):
    code, out, error = command("sample", "--prompt", "What?")
    assert (code, out) == (2, "") and is_one_line(error, "python train.py")


def test_a_stage_1_model_is_announced(command, run_folder, model, tokenizer):
    model.config.stage = 1
    model.save_pretrained(run_folder, [tokenizer.path])
    _, _, error = command("sample", "--model", run_folder, "--prompt", "What?", "--max-new-tokens", 2)
    assert "stage 1 only" in error


# ---------------------------------------------------------------------------------------------
# train.py and sample.py


@pytest.mark.parametrize("name", ["train", "sample"])
def test_help_shows_examples(command, name):
    code, out, _ = command(name, "--help")
    assert code == 0 and f"    python {name}.py" in out


def test_sampling_waits_for_nothing_of_torch_that_it_does_not_use():
    """Its compiler takes a second to import, its writer of checkpoints half of one."""
    code = """if True:
        import sys, sample, torch
        from nanollava.llava import Llava
        Llava.from_parts("assets/toy-clip", "assets/toy-llama")
        sys.exit(" ".join({"torch._dynamo", "torch.distributed.checkpoint"} & sys.modules.keys()) or 0)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_training_writes_a_page_without_replies(command, parts, world):
    code, *_ = command("train", "--stage", 1, *parts, "--data", world, "--out", "run")
    page = Path("run/report.html").read_text()
    assert code == 0 and "<polyline" in page and "<img" not in page
