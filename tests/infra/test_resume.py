"""Training that is cut into processes, stopped in every way, and goes on, on a model of a few thousand weights."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from nanollava.infra.io import InputError
from nanollava.infra.resume import Checkpoints
from nanollava.toy.muon import muon
from nanollava.training import adamw
from nanollava.weights import hf_format

STEPS = 60


@pytest.fixture
def arguments(model, tokenizer, world, tmp_path):
    """Stage 2 on 40 conversations, some without a picture, in batches of 8."""
    model.save_pretrained(tmp_path / "start", [tokenizer.path])
    rows = json.loads((world / "instruct.json").read_text())[:36]
    rows += [{"conversations": [{"from": "human", "value": "Hi!"}, {"from": "gpt", "value": "A cat."}]}] * 4
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return ["--stage", "2", "--model", tmp_path / "start", "--data", tmp_path / "data.json",
            "--images", world / "images", "--batch-size", "8", "--epochs", f"{STEPS / 5}", "--save-every", "10",
            "--lr", "0.005", "--dtype", "float32", "--device", "cpu"]


def start(*arguments, processes: int = 0):
    """`python train.py` as a process of its own, or under torchrun as several."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    threads = 1 if processes else torch.get_num_threads()  # sums of more threads differ in the last bit
    return subprocess.Popen([sys.executable, *torchrun, train.__file__, *map(str, arguments)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": str(threads)})


def run(monkeypatch, *arguments):
    """`python train.py` in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    train.main()


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def stop_after(process, folder: Path, steps: int, how: signal.Signals) -> int:
    """Send a signal, to all of its processes, once the log has that many steps; returns the exit code."""
    path = folder / "log.jsonl"
    while not path.exists() or path.read_text().count("\n") < steps:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.killpg(process.pid, how)
    return process.wait()


def test_however_often_it_is_stopped_a_run_ends_in_the_same_bits(arguments, tmp_path, monkeypatch):
    whole, broken, shared = tmp_path / "whole", tmp_path / "broken", tmp_path / "shared"
    run(monkeypatch, *arguments, "--out", whole)
    assert log(whole)[-1]["loss"] < 0.7 * log(whole)[0]["loss"]

    process = start(*arguments, "--out", broken, "--workers", 1)
    assert stop_after(process, broken, 5, signal.SIGTERM) == 128 + signal.SIGTERM
    assert "--resume goes on" in process.stderr.read() and not (broken / "config.json").exists()
    shutil.copytree(broken, shared)

    process = start(*arguments, "--out", broken, "--resume")
    assert stop_after(process, broken, 35, signal.SIGKILL) == -signal.SIGKILL
    run(monkeypatch, *arguments, "--out", broken, "--resume")
    assert [row["step"] for row in log(broken)] == list(range(STEPS))
    weights = load_file(whole / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_file(broken / "model.safetensors").items())
    assert sorted(path.name for path in broken.iterdir()) == sorted(path.name for path in whole.iterdir())

    process = start(*arguments, "--out", shared, "--resume", "--micro-batch", "2", processes=2)  # now they are two
    assert process.wait() == 0, process.stderr.read()
    for name, tensor in load_file(shared / "model.safetensors").items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-3)


def test_four_processes_take_the_same_steps_as_one(arguments, tmp_path, monkeypatch):
    """With blocks computed twice as for a big model, and a held-out loss that gets worse."""
    rows = [{"conversations": [{"from": "human", "value": "Hi!"}, {"from": "gpt", "value": "JQ ZX @# 97 WV" * number}]}
            for number in range(1, 8)]  # seven rows are no whole number for each of four processes
    (tmp_path / "other.json").write_text(json.dumps(rows))
    arguments += ["--preset", "7b", "--epochs", "4", "--eval-data", tmp_path / "other.json"]
    process = start(*arguments, "--out", tmp_path / "four", processes=4)
    run(monkeypatch, *arguments, "--out", tmp_path / "one")
    assert process.wait() == 0, process.stderr.read()
    one, four = log(tmp_path / "one"), log(tmp_path / "four")
    assert [row["step"] for row in one] == [row["step"] for row in four] == list(range(20))
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one, four)) < 1e-3
    assert one[9]["held_out_loss"] == pytest.approx(four[9]["held_out_loss"], abs=1e-3)
    assert one[19]["held_out_loss"] > one[9]["held_out_loss"]
    best, last = ([load_file(tmp_path / name / part / "model.safetensors") for name in ("one", "four")]
                  for part in ("best", "."))
    torch.testing.assert_close(*best, rtol=0, atol=1e-3)
    assert any(not torch.equal(best[0][name], last[0][name]) for name in best[0])


def test_all_of_it_in_two_processes(arguments, model, tokenizer, world, tmp_path):
    clip, llama = tmp_path / "clip", tmp_path / "llama"
    hf_format.write(clip, hf_format.clip_json(vars(model.config.vision)), model.vision_tower.state_dict())
    hf_format.write(llama, hf_format.llama_json(vars(model.config.text)), model.language_model.state_dict(),
                     [tokenizer.path])
    process = start("--vision", clip, "--llm", llama, "--data", world, "--out", tmp_path / "run", "--device", "cpu",
                    "--epochs", "0.3", processes=2)
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert [json.loads((tmp_path / "run" / stage / "config.json").read_text())["nanollava"]["stage"]
            for stage in ("stage1", "stage2")] == [1, 2]
    assert out.count("after stage 2") == 1  # the table, once


def test_a_folder_with_something_in_it_is_not_overwritten(arguments, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty: --resume goes on"):
        run(monkeypatch, *arguments, "--out", tmp_path)


def test_a_run_does_not_go_on_with_other_data_or_from_other_weights(arguments, model, tokenizer, tmp_path, monkeypatch):
    out = tmp_path / "out"
    process = start(*arguments, "--out", out)
    stop_after(process, out, 5, signal.SIGTERM)
    data = Path(arguments[arguments.index("--data") + 1])
    rows, start_folder = json.loads(data.read_text()), Path(arguments[arguments.index("--model") + 1])
    rows[0]["conversations"][1]["value"] += " Or not."
    (tmp_path / "other.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match="of another run, with data .*, not .*: go on with what it had"):
        run(monkeypatch, *arguments, "--out", out, "--resume", "--data", tmp_path / "other.json")
    torch.nn.init.zeros_(model.multi_modal_projector.linear_1.bias)
    model.save_pretrained(start_folder, [tokenizer.path])  # stage 1 was trained anew, into the same folder
    with pytest.raises(InputError, match="of another run, with starting weights"):
        run(monkeypatch, *arguments, "--out", out, "--resume")


def test_the_best_model_on_held_out_data_is_kept(arguments, world, tmp_path, monkeypatch):
    run(monkeypatch, *arguments, "--out", tmp_path / "out", "--eval-data", world / "instruct.json", "--lr", "0.03")
    losses = {row["step"]: row["held_out_loss"] for row in log(tmp_path / "out") if "held_out_loss" in row}
    assert list(losses) == [9, 19, 29, 39, 49, 59]
    best, last = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out" / "best", tmp_path / "out"))
    assert best.keys() == last.keys()
    assert (min(losses.values()) == losses[59]) == all(torch.equal(best[name], last[name]) for name in last)


# ---------------------------------------------------------------------------------------------
# Checkpoints by themselves


def one_step(model, optimizers):
    model(torch.arange(12)[None], labels=torch.arange(12)[None]).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def test_what_a_killed_run_left_half_written_goes_and_what_is_whole_stays(tmp_path):
    for name in (".model.safetensors.7.part", "best.part/config.json", "log.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    train.make_room(tmp_path)  # killed after the old best was removed, before the new one had its name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "log.jsonl"]
    (tmp_path / "best.part").mkdir()
    train.make_room(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "log.jsonl"]


def test_the_newest_whole_checkpoint_is_taken(model, tmp_path):
    model.vision_tower.requires_grad_(False)
    optimizers = muon(model.language_model, 1e-3)
    checkpoints = Checkpoints(tmp_path, model, optimizers, {"seed": 0})
    assert checkpoints.load() == 0
    one_step(model, optimizers)
    checkpoints.save(9)
    one_step(model, optimizers)
    checkpoints.save(10)
    saved = {name: tensor.clone() for name, tensor in checkpoints.state().items()}
    assert [path.name for path in tmp_path.iterdir()] == ["step-10"]
    (tmp_path / ".step-11.part").mkdir()  # what is left of a process that was killed while it saved
    (tmp_path / "step-12.backup").mkdir()  # and what somebody put there
    one_step(model, optimizers)
    assert checkpoints.load() == 10
    checkpoints.save(10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-12.backup"]
    assert all(torch.equal(saved[name], tensor) for name, tensor in checkpoints.state().items())


def test_a_checkpoint_of_another_run_or_model_is_refused(model, tmp_path):
    Checkpoints(tmp_path, model, adamw(model, 1e-3), {"seed": 0, "lr": 1.0}).save(1)
    with pytest.raises(InputError, match="step-1 is of another run, with seed 0, not 1"):
        Checkpoints(tmp_path, model, adamw(model, 1e-3), {"seed": 1}).load()
    with pytest.raises(InputError, match="step-1 is of another model"):
        projector = model.multi_modal_projector
        Checkpoints(tmp_path, projector, adamw(projector, 1e-3), {"seed": 0}).load()


def test_where_there_is_no_room_the_last_good_checkpoint_stays(model, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, model, adamw(model, 1e-3), {})
    checkpoints.save(1)
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match="cannot write .*step-2: No space left on device"):
        checkpoints.save(2)
    assert checkpoints.load() == 1


def test_a_broken_checkpoint_is_named(model, tmp_path):
    checkpoints = Checkpoints(tmp_path, model, adamw(model, 1e-3), {})
    checkpoints.save(1)
    next((tmp_path / "step-1").glob("*.safetensors")).write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot read .*step-1"):
        checkpoints.load()
