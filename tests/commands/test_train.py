"""train.py as a user runs it: the two stages, which flags act, and what is refused."""

import json
import sys
from dataclasses import asdict, fields
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from nanollava import Llava, settings
from nanollava.infra.cli import one_line_errors
from nanollava.infra.io import LOCK
from nanollava.infra.json_io import read_json, write_json
from nanollava.infra.run_log import read_log
from nanollava.llama import Block, Llama
from nanollava.plan import SIZES
from nanollava.settings import CONFLICTS, NEEDS, Settings, resolve_settings
from nanollava.weights import hf_config


def test_stage_1_trains_the_projector_and_stage_2_also_the_language_model(command, parts, world):
    code, out, _ = command("train", "--stage", 1, *parts, "--data", world, "--out", "one")
    assert (code, out) == (0, "")
    assert command("train", "--stage", 2, "--model", "one", "--data", world, "--out", "two")[0] == 0
    one, two = Llava.from_pretrained("one"), Llava.from_pretrained("two")
    start = Llava.from_parts("clip", "llama")
    assert changed_modules(start, one) == {"multi_modal_projector"}
    assert changed_modules(one, two) == {"multi_modal_projector", "language_model"}
    assert (one.config.stage, two.config.stage) == (1, 2)


def changed_modules(before: Llava, after: Llava) -> set[str]:
    before, after = before.state_dict(), after.state_dict()
    return {name.split(".")[0] for name in before if not before[name].equal(after[name])}


def test_lora_trains_the_language_model_and_leaves_an_ordinary_folder(command, parts, world):
    code, *_ = command("train", "--stage", 2, *parts, "--data", world, "--lora-rank", 4,
                       "--max-steps", 2, "--out", "run")
    assert code == 0
    start, end = Llava.from_parts("clip", "llama"), Llava.from_pretrained("run")
    assert changed_modules(start, end) == {"multi_modal_projector", "language_model"}


def test_same_seed_trains_the_same_weights(command, parts, world):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        command("train", "--stage", 1, *parts, "--data", world, "--out", folder, "--seed", seed,
                "--max-steps", 2)
    models = map(Llava.from_pretrained, "abc")
    a, b, c = (model.multi_modal_projector.linear_1.weight for model in models)
    assert a.equal(b) and not a.equal(c)


@pytest.mark.parametrize("fast, flags, computed, saved", [
    (True, ["--dtype", "bfloat16"], torch.bfloat16, torch.bfloat16),
    (False, ["--dtype", "bfloat16"], torch.float32, torch.bfloat16),
    (True, [], torch.float32, torch.float32)])  # a toy model
def test_bfloat16_is_saved_if_asked_and_computed_in_where_it_is_fast(
        command, parts, world, monkeypatch, fast, flags, computed, saved):
    for feature in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, feature, lambda: fast)
    dtypes, logits = set(), Llama.logits
    monkeypatch.setattr(Llama, "logits",
                        lambda llama, hidden: dtypes.add(hidden.dtype) or logits(llama, hidden))
    code, *_ = command("train", "--stage", 2, *parts, "--data", world, "--out", "run",
                       "--device", "cpu", "--max-steps", 2, *flags)
    assert code == 0
    assert dtypes == {computed}
    assert {tensor.dtype for tensor in load_file("run/model.safetensors").values()} == {saved}


@pytest.mark.parametrize("toy_width, flags, passes", [
    (0, [], 2), (0, ["--no-gradient-checkpointing"], 1), (512, [], 1)])
def test_blocks_are_computed_twice_unless_toy_or_refused(
        command, parts, world, monkeypatch, toy_width, flags, passes):
    monkeypatch.setattr(settings, "TOY_WIDTH", toy_width)
    calls, forward = [], Block.forward
    monkeypatch.setattr(Block, "forward",
                        lambda block, *inputs: calls.append(block) or forward(block, *inputs))
    command("train", "--stage", 1, *parts, "--data", world, "--out", "run", "--max-steps", 1,
            *flags)
    assert len(calls) == 2 * passes  # two blocks


def test_projector_feature_layer_and_template_are_kept_and_plain_is_for_captions(
        command, parts, world):
    command("train", "--stage", 1, *parts, "--data", world, "--out", "one", "--template", "plain",
            "--projector", "mlp2x_gelu", "--feature-layer", -1, "--max-steps", 1)
    command("train", "--stage", 2, "--model", "one", "--data", world, "--out", "two",
            "--max-steps", 1)
    one, two = Llava.from_pretrained("one").config, Llava.from_pretrained("two").config
    assert (one.template, one.projector, one.feature_layer) == ("plain", "mlp2x_gelu", -1)
    assert (two.template, two.projector, two.feature_layer) == ("vicuna_v1", "mlp2x_gelu", -1)


def test_run_folder_has_a_page_with_the_loss_curve_and_no_checkpoints(command, parts, world):
    code, *_ = command("train", "--stage", 1, *parts, "--data", world, "--out", "run",
                       "--max-steps", 3, "--save-every", 1)
    page = Path("run/report.html").read_text()
    assert code == 0 and "<polyline" in page and "<img" not in page
    assert not Path("run/resume").exists()


# ---------------------------------------------------------------------------------------------
# How many steps


@pytest.mark.parametrize("flags, steps, epochs, lr", [
    (["--epochs", 1.5, "--batch-size", 10, "--lr", 0.5], 9, 1.5, 0.5),
    (["--epochs", 9, "--batch-size", 10, "--max-steps", 3], 3, 0.5, 4e-3),
    (["--epochs", 1, "--batch-size", 20, "--max-steps", 4], 3, 1, 4e-3),
    ([], 3, 0.4, 4e-3),  # of the toy world, in batches of 8
])
def test_number_of_steps(command, parts, world, flags, steps, epochs, lr):
    code, _, error = command("train", "--stage", 1, *parts, "--data", world, "--out", "run", *flags)
    log = read_log(Path("run/log.jsonl"))
    assert code == 0 and len(log) == steps and max(row["lr"] for row in log) == lr
    assert f"60 rows, {epochs:g} epochs, {steps} steps" in error


@pytest.mark.parametrize("device, cores, ranks, workers", [
    ("cuda:0", 64, 1, 8), ("cuda:0", 64, 8, 8), ("cuda:3", 24, 8, 3), ("cuda", 4, 8, 1),
    ("mps", 6, 1, 6), ("cpu", 64, 1, 0)])
def test_workers_share_the_cores_of_a_machine(monkeypatch, device, cores, ranks, workers):
    monkeypatch.setattr(settings.os, "sched_getaffinity", lambda pid: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert settings.default_workers(device) == workers


@pytest.mark.parametrize("width, stage, epochs, batch_size, lr", [
    (192, 1, 1, 8, 4e-3), (192, 2, 3, 8, 4e-4), (2048, 1, 1, 128, 2e-3), (2048, 2, 3, 32, 2e-5)])
def test_defaults_for_own_data_are_whole_epochs_and_depend_on_the_width(
        parse, monkeypatch, tmp_path, world, width, stage, epochs, batch_size, lr):
    monkeypatch.chdir(tmp_path)
    config = {"model_type": "llama", "hidden_size": width}
    write_json(tmp_path / "llm" / "config.json", config)
    arguments = parse("--stage", stage, "--llm", tmp_path / "llm",
                      "--vision-tower", settings.ASSETS / "toy-clip",
                      "--data", world / "instruct.json", "--images", world / "images")
    chosen = resolve_settings(arguments, stage)
    assert (chosen.epochs, chosen.batch_size, chosen.lr) == (epochs, batch_size, lr)
    assert chosen.gradient_checkpointing == (width == 2048)


# ---------------------------------------------------------------------------------------------
# Mistakes end in one line, before anything is written


@pytest.mark.parametrize("arguments, words", [
    (["--stage", 2], ["runs/toy/stage1", "--stage 1"]),
    (["--stage", 1, "--data", "none.json"], ["no data at none.json"]),
    (["--dtype", "float16"], ["--dtype float16 is for generation", "bfloat16 or float32"]),
    (["--stage", 1, "--data", "."], ["no data at pretrain.json"]),
    (["--stage", 1, "--data", "world/pretrain.json"], ["needs --images"]),
    (["--stage", 1, "--data", "world/pretrain.json", "--images", "world", "world"],
     ["--data has 1 files", "--images has 2 folders"]),
    (["--stage", 1, "--data", "world", "--images", "world"], ["--images has no effect"]),
    (["--data", "world/pretrain.json"], ["needs --stage 1 or --stage 2"]),
    (["--stage", 1, "--data", "world/pretrain.json", "--images", "nowhere"],
     ["--images nowhere: there is no such folder"]),
    (["--stage", 1, "--eval-data", "none.json"], ["no data at none.json"]),
    (["--stage", 1, "--eval-data", "world/pretrain.json", "--eval-images", "nowhere"],
     ["--eval-images nowhere: there is no such folder"]),
    (["--stage", 1, "--max-length", 10**6], ["--max-length 1000000", "reads at most 2048"]),
    (["--plan", "7b", "--max-length", 10**6], ["--max-length 1000000", "reads at most 2048"]),
    (["--stage", 1, "--vision-tower", "nowhere", "--data", "world"], ["nowhere"]),
    (["--stage", 2, "--model", "a", "--data", "x.json"], ["no data at x.json"]),
    (["--stage", 2, "--model", "a", "--data", "world"], ["no model at a"]),
    (["--stage", 1, "--projector", "conv"], ["projector 'conv'", "linear"]),
    (["--stage", 1, "--no-gradient-checkpointing"], ["--no-gradient-checkpointing", "toy model"]),
    (["--stage", 1, "--out", "world"], ["world is not empty", "--resume"]),
    (["--stage", 1, "--out", "world/pretrain.json/run"], ["cannot write"]),
    (["--stage", 0, "--out", "world/pretrain.json/run"], ["cannot write"]),
    (["--out", "world/pretrain.json"], ["cannot write"]),
    (["--stage", 3], ["--stage"]),
    (["--lr", "0"], ["--lr"]),
    (["--plan", "7b", "--gpus", 3], ["--batch-size 128", "by 3, the number of ranks"]),
    (["--plan"], ["--plan of which model?", "7b or 13b", "--model"]),
    (["--plan", "--stage", 2], ["--plan of which model?"]),
    (["--plan", "--llm", "a"], ["--plan of which model?", "both --vision-tower and --llm"]),
    (["--plan", "--model", "nowhere"], ["nowhere"]),
    (["--plan", "70b"], ["--plan", "70b"]),
    (["--plan", "7b", "--model", "a"], ["--model has no effect with --plan 7b"]),
])
def test_mistake_is_one_line(error_of, world, arguments, words):
    Path("world").symlink_to(world)
    Path("data").mkdir()
    Path("data/toy").symlink_to(world)  # or one would be drawn
    error = error_of("train", *arguments)
    assert all(word in error for word in words), error
    assert not [path for path in Path().glob("runs/**/*.*") if path.name != LOCK]


def test_length_limit_without_answers_is_reported_before_training(command, parts, world):
    code, _, error = command("train", "--stage", 1, *parts, "--data", world, "--out", "run",
                             "--max-length", 20)
    assert code == 2 and "row 0" in error and "raise --max-length" in error
    assert not Path("run").exists()


def test_wide_model_is_not_trained_on_the_toy_world(error_of, parts, run_folder, monkeypatch):
    monkeypatch.setattr(settings, "TOY_WIDTH", 0)
    for stage in (1, 2):
        error = error_of("train", "--stage", stage, "--model", run_folder)
        assert "--data is missing" in error
    assert "--data is missing" in error_of("train", *parts)
    error = error_of("train", "--stage", 1, *parts[2:], "--data", run_folder / "config.json",
                     "--images", ".")
    assert "--vision-tower is missing" in error


def test_rows_that_are_cut_are_counted(command, parts, world):
    rows = read_json(world / "pretrain.json")[:8]
    rows[3]["conversations"][1]["value"] = "A cat and a dog. " * 100
    Path("chat.json").write_text(json.dumps(rows))
    code, _, error = command("train", "--stage", 1, *parts, "--data", "chat.json", "--images",
                             world / "images", "--out", "run", "--max-length", 200)
    assert code == 0 and "1 of 8 training rows are longer than 200 tokens" in error


def test_image_that_does_not_open_ends_training_or_is_skipped(command, parts, world):
    rows = read_json(world / "pretrain.json")
    rows[5]["image"] = "cat.png"
    Path("chat.json").write_text(json.dumps(rows))
    arguments = ["train", "--stage", 1, *parts, "--data", "chat.json", "--images", world / "images",
                 "--out", "run", "--max-steps", 1]
    code, _, error = command(*arguments)
    assert code == 2 and "row 5" in error and "cat.png" in error
    assert not Path("run").exists()
    code, _, error = command(*arguments, "--skip-bad")
    assert code == 0 and "1 of 60 training rows are left out" in error


def test_model_that_does_not_fit_the_gpu_is_one_line(command, parts, world, monkeypatch):
    def fill_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 1.00 GiB.")

    monkeypatch.setattr("nanollava.infra.distributed.convert_weights", fill_memory)
    code, _, error = command("train", "--stage", 1, *parts, "--data", world, "--out", "run")
    assert code == 2 and "Traceback" not in error
    assert "\nerror: the GPU's memory is full, 1.00 GiB" in error


def test_trained_model_is_not_overwritten(error_of, run_folder, world):
    before = (run_folder / "model.safetensors").read_bytes()
    error = error_of("train", "--stage", 1, "--data", world, "--out", run_folder)
    assert str(run_folder) in error and "--out" in error
    assert (run_folder / "model.safetensors").read_bytes() == before


def test_finished_run_is_kept_and_other_settings_are_refused(command, parts, world):
    arguments = ["train", "--stage", 1, *parts, "--data", world, "--out", "run", "--max-steps", 1,
                 "--resume"]
    assert command(*arguments)[0] == 0
    before = Path("run/model.safetensors").read_bytes()
    code, _, error = command(*arguments, "--workers", 1)  # the result does not depend on this one
    assert code == 0 and "run is finished" in error
    for flags, difference in [(["--lr", 1], "with lr 0.004, not 1.0"),
                              (["--seed", 1], "with seed 0, not 1"),
                              (["--projector", "mlp2x_gelu"], "with projector 'linear', not"),
                              (["--eval-data", world / "pretrain.json"], "with validation data")]:
        code, _, error = command(*arguments, *flags)
        assert code == 2 and f"run is of another run, {difference}" in error, error
    Path("run/run.json").unlink()  # as older versions left it
    assert command(*arguments)[0] == 0
    assert Path("run/model.safetensors").read_bytes() == before


def test_help_shows_examples(command):
    code, out, _ = command("train", "--help")
    assert code == 0 and "    python train.py" in out


# ---------------------------------------------------------------------------------------------
# Every flag acts or is refused


@pytest.fixture
def parse(monkeypatch):
    def parse(*words):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
        with one_line_errors():
            return train.parse_arguments()

    return parse


MODES = {
    "toy run": [], "stage 0": ["--stage", "0"], "stage 1": ["--stage", "1"],
    "stage 2": ["--stage", "2"], "plan": ["--plan", "7b"],
    "plan of stage 2": ["--plan", "13b", "--stage", "2"],
}


@pytest.fixture
def values(parts, run_folder, model, tokenizer, world, tmp_path, monkeypatch):
    """{flag: its values} for all flags; what they name exists, and runs/toy/stage1 does too."""
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("runs/toy/stage1", [tokenizer.path])
    return {
        "--small-llm": [], "--vision-tower": [parts[1]], "--llm": [parts[3]],
        "--model": [run_folder], "--projector": ["mlp2x_gelu"], "--feature-layer": ["-1"],
        "--template": ["v0"], "--lora-rank": ["4"], "--data": [world / "instruct.json"],
        "--images": [world / "images"], "--eval-data": [world / "pretrain.json"],
        "--eval-images": [tmp_path], "--max-length": ["300"], "--skip-bad": [], "--workers": ["1"],
        "--epochs": ["2"], "--max-steps": ["3"], "--batch-size": ["64"],
        "--micro-batch-size": ["2"], "--lr": ["0.1"], "--seed": ["1"], "--dtype": ["bfloat16"],
        "--device": ["cpu"], "--no-gradient-checkpointing": [], "--compile": [],
        "--out": [tmp_path / "out"], "--save-every": ["7"], "--resume": [], "--gpus": ["4"],
    }


def command_line(mode: str, flags, values: dict) -> list[str]:
    words = list(map(str, MODES[mode]))
    for flag in flags:
        words += [flag, *map(str, values[flag])]
    if "--data" in flags and mode == "toy run":
        words[words.index("--data") + 1] = str(values["--data"][0].parent)
    return words


def refused_by_table(words: list[str]) -> set[str]:
    """The flags on the command line that the table of settings.py refuses."""
    typed = {word for word in words if word.startswith("--")}
    pairs = {f"{word} {value}" for word, value in zip(words, words[1:])}
    present = typed | pairs | (set() if "--stage" in typed else {"--stage None"})
    if "--stage 2" in pairs and not typed & {"--model", "--vision-tower", "--llm"}:
        present.add("--model runs/toy/stage1")
    lacking = {flag for flag, others in NEEDS.items() if not present & set(others)}
    return typed & (lacking | {flag for flag, other in CONFLICTS if other in present})


def test_values_cover_all_flags_of_the_parser(parse, values):
    flags = {setting.split()[0] for setting in parse().settings}
    assert flags - {"-h", "--help", "--stage", "--plan"} == values.keys()
    table = {*NEEDS, *(flag for flag, _ in CONFLICTS)}
    assert table <= flags


@pytest.mark.parametrize("mode", MODES)
def test_each_pair_of_flags_is_refused_exactly_when_the_table_says_so(mode, parse, values, capsys):
    for pair in combinations(values, 2):
        words = command_line(mode, pair, values)
        refused = refused_by_table(words)
        try:
            parse(*words)
            code = 0
        except SystemExit as exit:
            code = exit.code
        out, error = capsys.readouterr()
        if not refused:
            assert code == 0, (words, error)
            continue
        assert (code, out) == (2, "") and error.count("\n") == 1, words
        assert any(f"{flag} has no effect" in error for flag in refused), (words, error)


@pytest.mark.parametrize("mode", ["toy run", "stage 1", "stage 2"])
def test_each_flag_that_is_accepted_changes_the_settings(mode, parse, values, monkeypatch):
    stage = 1 if mode == "stage 1" else 2
    if stage == 1:
        Path("runs").rename("other")  # its --out must be empty
    companions = {
        "--images": ["--data"], "--data": ["--images"], "--skip-bad": ["--data", "--images"],
        "--eval-images": ["--eval-data"], "--projector": ["--llm"], "--feature-layer": ["--llm"]}
    no_settings = {"--device", "--no-gradient-checkpointing"}  # the latter: not for toy models
    no_settings |= {"--resume"} if mode == "toy run" else set()
    # the device is resolved before the settings; the toy run resumes anyway
    for flag in values.keys() - no_settings:
        others = [] if mode == "toy run" else companions.get(flag, [])
        words = command_line(mode, [flag, *others], values)
        if refused_by_table(words):
            continue
        with_flag = resolve_settings(parse(*words), stage)
        if flag in ("--data", "--images"):
            others = []
        without = resolve_settings(parse(*command_line(mode, others, values)), stage)
        assert with_flag != without, words


@pytest.mark.parametrize("mode, accepted", [
    ("stage 0", "--small-llm --seed --device --out --resume"),
    ("toy run", "--vision-tower --llm --projector --template --feature-layer --data --max-length "
     "--skip-bad --workers --epochs --max-steps --batch-size --micro-batch-size --lr --seed "
     "--dtype --device --compile --out --save-every --resume"),
    ("plan of stage 2", "--lora-rank --max-length --epochs --batch-size --micro-batch-size "
     "--no-gradient-checkpointing --gpus"),
])
def test_flags_that_act_in_a_mode(mode, accepted, values):
    found = {flag for flag in values if not refused_by_table(command_line(mode, [flag], values))}
    assert found == set(accepted.split())


def test_each_setting_is_used():
    source = Path(train.__file__).read_text()
    assert not [field.name for field in fields(Settings) if f"settings.{field.name}" not in source]


@pytest.mark.parametrize("mode", ["plan", "plan of stage 2"])
def test_each_flag_that_is_accepted_changes_the_plan(mode, command, values):
    _, plan, _ = command("train", *MODES[mode])
    for flag in values:
        words = command_line(mode, [flag], values)
        if not refused_by_table(words):
            code, other, _ = command("train", *words)
            assert code == 0 and other != plan, words


def test_plan_reads_the_sizes_of_a_model_from_its_folders(command, error_of, parts, run_folder):
    size = SIZES["7b"]
    clip, llama = hf_config.clip_json(vars(size.vision)), hf_config.llama_json(vars(size.text))
    llava = hf_config.llava_json(asdict(size))
    for folder, config in (("clip-7b", clip), ("llama-7b", llama), ("llava-7b", llava)):
        Path(folder).mkdir()
        write_json(f"{folder}/config.json", config)
    _, expected, _ = command("train", "--plan", "7b")
    _, found, _ = command("train", "--plan", "--vision-tower", "clip-7b", "--llm", "llama-7b")
    assert found == expected.replace(", 7b", ", clip-7b and llama-7b")
    _, found, _ = command("train", "--plan", "--vision-tower", "clip-7b", "--llm", "llama-7b",
                          "--projector", "mlp2x_gelu", "--feature-layer", -1)
    assert "21.0 million of them trainable" in found
    _, found, _ = command("train", "--plan", "--model", "llava-7b")
    assert found == expected.replace(", 7b", ", llava-7b")
    assert "a toy model trains in minutes" in error_of("train", "--plan", "--model", run_folder)


@pytest.mark.parametrize("words, message", [
    (["--stage", "0", "--lr", "1"], "--lr has no effect with --stage 0: the toy CLIP and LLaMA"),
    (["--stage", "2", "--projector", "linear"],
     "--projector has no effect with --model runs/toy/stage1: stage 2 continues"),
    (["--stage", "1", "--model", "a", "--llm", "b"], "--llm has no effect with --model: a LLaVA"),
    (["--stage", "1", "--lora-rank", "4"], "--lora-rank has no effect without --stage 2"),
    (["--model", "a"], "--model has no effect without --stage: the toy run"),
    (["--eval-data", "a"], "--eval-data has no effect without --stage: the toy run"),
    (["--small-llm"], "--small-llm has no effect without --stage 0"),
    (["--plan", "7b", "--stage", "0"], "--plan has no effect with --stage 0"),
    (["--plan", "7b", "--out", "a"], "--out has no effect with --plan"),
    (["--gpus", "8", "--stage", "1"], "--gpus has no effect without --plan"),
    (["--stage", "1", "--images", "a"], "--images has no effect without --data"),
])
def test_flag_without_effect_is_refused_with_the_reason(error_of, words, message):
    assert error_of("train", *words).startswith(f"error: {message}")
