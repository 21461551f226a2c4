"""Training runs that are stopped, killed, resumed and sharded, with a tiny model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from nanollava import Llava
from nanollava.infra import resume, run_log
from nanollava.infra.io import InputError
from nanollava.infra.json_io import write_json
from nanollava.infra.resume import Checkpoints
from nanollava.infra.run_log import Run, read_log
from nanollava.settings import TOY_WIDTH
from nanollava.toy.muon import muon
from nanollava.training import adamw
from nanollava.weights import hf_config, hf_format

STEPS = 60


@pytest.fixture(autouse=True)
def signals():
    """Some shells start background processes with Ctrl-C disabled, and nohup without SIGHUP."""
    before = {signum: signal.signal(signum, signal.default_int_handler)
              for signum in (signal.SIGINT, signal.SIGHUP)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture
def arguments(model, tokenizer, world, tmp_path):
    """Stage 2 on 40 conversations, some without an image, in batches of 8: 60 steps."""
    model.save_pretrained(tmp_path / "start", [tokenizer.path])
    rows = json.loads((world / "instruct.json").read_text())[:36]
    rows += [{"conversations": [{"from": "human", "value": "Hi!"},
                                {"from": "gpt", "value": "A cat."}]}] * 4
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return ["--stage", "2", "--model", tmp_path / "start", "--data", tmp_path / "data.json",
            "--images", world / "images", "--batch-size", "8", "--epochs", f"{STEPS / 5}",
            "--save-every", "10", "--lr", "0.005", "--dtype", "float32", "--device", "cpu"]


def start_train(*arguments, num_processes: int = 0) -> subprocess.Popen:
    """`python train.py` as a process, or `torchrun train.py` as several."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_processes]
    command = [*(torchrun if num_processes else []), train.__file__, *arguments]
    threads = 1 if num_processes else torch.get_num_threads()  # changes the last bits of sums
    return subprocess.Popen([sys.executable, *map(str, command)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": str(threads)})


def run_train(monkeypatch, *arguments) -> None:
    """`python train.py` in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    train.main(train.parse_arguments())


def stop_after(process: subprocess.Popen, folder: Path, steps: int, signum: signal.Signals) -> int:
    """Send a signal to all processes when the log has so many rows; return the exit code."""
    path = folder / "log.jsonl"
    while not path.exists() or path.read_text().count("\n") < steps:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.killpg(process.pid, signum)
    return process.wait()


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_stopped_and_killed_run_ends_in_equal_bits(arguments, tmp_path, monkeypatch):
    full, stopped, sharded = tmp_path / "full", tmp_path / "stopped", tmp_path / "sharded"
    run_train(monkeypatch, *arguments, "--out", full)
    log, weights = read_log(full / "log.jsonl"), weights_in(full)
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]

    process = start_train(*arguments, "--out", stopped, "--workers", 1)
    assert stop_after(process, stopped, 5, signal.SIGTERM) == 128 + signal.SIGTERM
    assert "--resume continues" in process.stderr.read()
    assert not (stopped / "config.json").exists()
    shutil.copytree(stopped, sharded)

    process = start_train(*arguments, "--out", stopped, "--resume")
    while not (stopped / ".lock").exists():
        time.sleep(0.01)
    with pytest.raises(InputError, match="stopped is in use by another run"):
        run_train(monkeypatch, *arguments, "--out", stopped, "--resume")
    assert stop_after(process, stopped, 35, signal.SIGKILL) == -signal.SIGKILL
    run_train(monkeypatch, *arguments, "--out", stopped, "--resume")
    rows = read_log(stopped / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert [row["elapsed"] for row in rows] == sorted(row["elapsed"] for row in rows)
    for name, tensor in weights_in(stopped).items():
        assert torch.equal(tensor, weights[name])
    assert files_in(stopped) == files_in(full)

    # the run of one process continues on two ranks
    process = start_train(*arguments, "--out", sharded, "--resume", "--micro-batch-size", "2",
                          num_processes=2)
    assert process.wait() == 0, process.stderr.read()
    for name, tensor in weights_in(sharded).items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-3)


def test_four_ranks_take_the_same_steps_as_one(arguments, config, tokenizer, tmp_path, monkeypatch):
    """With gradient checkpointing, and with a validation loss that rises."""
    config.text.hidden_size = TOY_WIDTH  # the smallest that is trained with it
    Llava(config).save_pretrained(tmp_path / "start", [tokenizer.path])
    rows = [{"conversations": [{"from": "human", "value": "Hi!"},
                               {"from": "gpt", "value": "JQ ZX @# 97 WV" * number}]}
            for number in range(1, 8)]  # seven rows: the ranks do not have equally many
    (tmp_path / "other.json").write_text(json.dumps(rows))
    arguments += ["--max-steps", "20", "--eval-data", tmp_path / "other.json"]
    process = start_train(*arguments, "--out", tmp_path / "four", num_processes=4)
    run_train(monkeypatch, *arguments, "--out", tmp_path / "one")
    assert process.wait() == 0, process.stderr.read()
    one, four = (read_log(tmp_path / name / "log.jsonl") for name in ("one", "four"))
    assert [row["step"] for row in one] == [row["step"] for row in four] == list(range(20))
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in four] == pytest.approx([row[key] for row in one], rel=1e-3)
    assert four[9]["val_loss"] == pytest.approx(one[9]["val_loss"], abs=1e-3)
    assert one[19]["val_loss"] > one[9]["val_loss"]
    best, last = weights_in(tmp_path / "one" / "best"), weights_in(tmp_path / "one")
    for name, tensor in weights_in(tmp_path / "four" / "best").items():
        torch.testing.assert_close(tensor, best[name], rtol=0, atol=1e-3)
    assert any(not torch.equal(best[name], last[name]) for name in best)


def test_toy_run_on_two_ranks(model, tokenizer, world, tmp_path):
    clip, llama = tmp_path / "clip", tmp_path / "llama"
    hf_format.save_folder(clip, hf_config.clip_json(vars(model.config.vision)),
                          model.vision_tower.state_dict())
    hf_format.save_folder(llama, hf_config.llama_json(vars(model.config.text)),
                          model.language_model.state_dict(), [tokenizer.path])
    process = start_train("--vision-tower", clip, "--llm", llama, "--data", world, "--out",
                          tmp_path / "run", "--device", "cpu", "--epochs", "0.3", num_processes=2)
    out, error = process.communicate()
    assert process.returncode == 0, error
    for stage in (1, 2):
        config = json.loads((tmp_path / "run" / f"stage{stage}" / "config.json").read_text())
        assert config["nanollava"]["stage"] == stage
    assert out.count("after stage 2") == 1  # rank 0 alone prints the table


def test_folder_that_is_not_empty_is_refused(arguments, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty: continue with --resume"):
        run_train(monkeypatch, *arguments, "--out", tmp_path)


def test_run_with_other_data_weights_or_steps_is_not_resumed(arguments, model, tokenizer, tmp_path,
                                                             monkeypatch):
    arguments += ["--out", tmp_path / "out"]
    process = start_train(*arguments)
    stop_after(process, tmp_path / "out", 5, signal.SIGTERM)
    for flag, message in (("--max-steps 50", "max steps null, not 50: resume with"),
                          ("--epochs 10", "epochs 12.0, not 10.0"),
                          ("--lr 0.1", "lr 0.005, not 0.1"),
                          ("--skip-bad", "skip bad false, not true")):
        with pytest.raises(InputError, match=f"another run, with {message}"):
            run_train(monkeypatch, *arguments, "--resume", *flag.split())
    rows = json.loads((tmp_path / "data.json").read_text())
    rows[0]["conversations"][1]["value"] += " Or not."
    (tmp_path / "other.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match="another run, with data .*, not"):
        run_train(monkeypatch, *arguments, "--resume", "--data", tmp_path / "other.json")
    with open(tmp_path / "start" / "tokenizer.model", "ab") as file:
        file.write(b"\xfa\x07\x00")  # a field that SentencePiece does not know: another tokenizer
    with pytest.raises(InputError, match="another run, with tokenizer .*, not"):
        run_train(monkeypatch, *arguments, "--resume")
    torch.nn.init.zeros_(model.multi_modal_projector.linear_1.bias)
    model.save_pretrained(tmp_path / "start", [tokenizer.path])  # as if stage 1 had been repeated
    with pytest.raises(InputError, match="another run, with starting weights"):
        run_train(monkeypatch, *arguments, "--resume")


def test_model_with_the_lowest_validation_loss_is_kept(arguments, world, tmp_path, monkeypatch):
    run_train(monkeypatch, *arguments, "--out", tmp_path / "out", "--lr", "0.03",
              "--eval-data", world / "instruct.json")
    losses = {row["step"]: row["val_loss"] for row in read_log(tmp_path / "out" / "log.jsonl")
              if "val_loss" in row}
    assert list(losses) == [9, 19, 29, 39, 49, 59]
    best, last = weights_in(tmp_path / "out" / "best"), weights_in(tmp_path / "out")
    assert best.keys() == last.keys()
    last_is_best = min(losses.values()) == losses[59]
    assert last_is_best == all(torch.equal(best[name], last[name]) for name in last)


def test_diverged_run_names_the_rows_of_the_step(arguments, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"at step \d+ the loss is .*Its rows: .*data.json, row"):
        run_train(monkeypatch, *arguments, "--out", tmp_path / "out", "--lr", "100")


# ---------------------------------------------------------------------------------------------
# Run


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signal_saves_a_checkpoint_and_ends_the_program(model, tmp_path, name):
    signum = getattr(signal, name)
    checkpoints = Checkpoints(tmp_path, model, adamw(model, 1e-3), {})
    with pytest.raises(SystemExit) as exit:
        with Run("test", 9, checkpoints) as run:
            for step, _ in run.enumerate(range(9)):
                if step == 2:
                    os.kill(os.getpid(), signum)
                run.log(step, 1.0, 1.0, 1.0, 1)
                run.save(step, *run.requests(step))
    assert exit.value.code == 128 + signum
    assert Run("test", 9, checkpoints).start == 3


def test_checkpoints_are_saved_by_time_or_every_few_steps(model, tmp_path, monkeypatch):
    def saved_steps(**options):
        run = Run("test", 9, Checkpoints(tmp_path, model, [], {}), **options)
        run.start, clock = 0, iter(range(0, 10**6, 10))  # every look at it is 10 seconds later
        monkeypatch.setattr(run_log.time, "monotonic", lambda: next(clock))
        with run:
            due = []
            for step in range(9):
                save, stop = run.requests(step)
                run.save(step, save, stop)
                due += [step] if save else []
        return due

    assert saved_steps(save_every=4) == [3, 7, 8]  # the last one, too
    monkeypatch.setattr(run_log, "SAVE_SECONDS", 30)
    assert saved_steps() == [2, 5, 8]
    # by time, rank 0 decides for all
    monkeypatch.setattr(run_log.distributed, "rank", lambda: 1)
    assert saved_steps() == [8]
    assert saved_steps(save_every=4) == [3, 7, 8]


def test_second_signal_interrupts_and_handlers_are_restored(model, tmp_path):
    checkpoints, before = Checkpoints(tmp_path, model, [], {}), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        with Run("test", 9, checkpoints):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_signal_after_the_last_step_is_not_lost(model, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with Run("test", 9, Checkpoints(tmp_path, model, [], {})):
            os.kill(os.getpid(), signal.SIGINT)


def test_log_is_cut_to_the_checkpoint_and_the_best_loss_is_read_from_it(model, tmp_path):
    path, checkpoints = tmp_path / "log.jsonl", Checkpoints(tmp_path, model, [], {})
    checkpoints.save(2)
    rows = [{"step": step, "loss": 1.0, "elapsed": 10.0 + step, "val_loss": 5.0 - step}
            for step in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "los')
    run = Run("test", 9, checkpoints, path)
    assert (run.start, run.best_val_loss) == (2, 4.0)
    with run:
        for step, _ in run.enumerate(range(1)):
            run.log(step, 1.0, 1.0, 1.0, 1, val_loss=4.5)
    assert [row["step"] for row in read_log(path)] == [0, 1, 2]
    assert read_log(path)[-1]["elapsed"] >= 11.0 and run.best_val_loss == 4.0


# ---------------------------------------------------------------------------------------------
# Checkpoints


def take_step(model, optimizers):
    tokens = torch.arange(12)[None]
    model(tokens, labels=tokens).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def test_incomplete_files_of_a_killed_run_are_removed(tmp_path):
    for name in (".model.safetensors.7.part", "best.part/config.json", "log.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    train.remove_leftovers(tmp_path)  # killed inside replace_best
    assert files_in(tmp_path) == ["best", "log.jsonl"]
    (tmp_path / "best.part").mkdir()
    train.remove_leftovers(tmp_path)
    assert files_in(tmp_path) == ["best", "log.jsonl"]
    (tmp_path / "resume").mkdir()
    train.remove_leftovers(tmp_path)
    assert files_in(tmp_path) == ["best", "log.jsonl", "resume"]
    (tmp_path / "config.json").write_text("{}")  # the model is complete
    train.remove_leftovers(tmp_path)
    assert files_in(tmp_path) == ["best", "config.json", "log.jsonl"]


def test_newest_complete_checkpoint_is_loaded(model, tmp_path):
    model.vision_tower.requires_grad_(False)
    optimizers = muon(model.language_model, 1e-3)
    checkpoints = Checkpoints(tmp_path, model, optimizers, {"seed": 0})
    assert checkpoints.load() == 0
    take_step(model, optimizers)
    checkpoints.save(9)
    take_step(model, optimizers)
    checkpoints.save(10)
    saved = {name: tensor.clone() for name, tensor in checkpoints.state().items()}
    assert files_in(tmp_path) == ["step-10"]
    (tmp_path / ".step-11.part").mkdir()  # of a process that was killed while it saved
    (tmp_path / "step-12.backup").mkdir()  # the user's
    take_step(model, optimizers)
    assert checkpoints.load() == 10
    checkpoints.save(10)
    assert files_in(tmp_path) == ["step-10", "step-12.backup"]
    assert all(torch.equal(saved[name], tensor) for name, tensor in checkpoints.state().items())


def test_fresh_optimizers_get_the_state_of_a_checkpoint(model, tmp_path):
    optimizers = adamw(model, 1e-3)
    take_step(model, optimizers)
    Checkpoints(tmp_path, model, optimizers, {}).save(1)
    fresh = adamw(model, 1e-3)
    assert Checkpoints(tmp_path, model, fresh, {}).load() == 1
    for weight, state in optimizers[0].state.items():
        assert all(torch.equal(value, fresh[0].state[weight][key]) for key, value in state.items())


def test_saving_a_checkpoint_takes_a_fraction_of_its_memory(tmp_path, monkeypatch):
    model = torch.nn.ModuleList(torch.nn.Linear(500, 500) for _ in range(10))
    optimizers = adamw(model, 1e-3)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizers[0].step()
    checkpoints = Checkpoints(tmp_path, model, optimizers, {})
    num_bytes = sum(tensor.nbytes for tensor in checkpoints.state().values())
    monkeypatch.setattr(resume, "FILE_BYTES", num_bytes // 15)
    tracemalloc.start()  # sees the files that are built in memory, not the tensors
    checkpoints.save(1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.2 * num_bytes
    saved = {name: tensor.clone() for name, tensor in checkpoints.state().items()}
    optimizers[0].step()
    assert checkpoints.load() == 1
    assert all(torch.equal(saved[name], tensor) for name, tensor in checkpoints.state().items())


def test_checkpoint_in_one_file_of_an_older_version_is_loaded(model, tmp_path, monkeypatch):
    optimizers = adamw(model, 1e-3)
    take_step(model, optimizers)
    checkpoints = Checkpoints(tmp_path, model, optimizers, {})
    monkeypatch.setattr(resume, "FILE_BYTES", 10**12)
    checkpoints.save(1)
    assert len(list((tmp_path / "step-1").glob("*.safetensors"))) == 1
    monkeypatch.setattr(resume, "FILE_BYTES", 1000)
    assert checkpoints.load() == 1


def test_checkpoint_of_another_run_or_model_is_refused(model, tmp_path):
    Checkpoints(tmp_path, model, adamw(model, 1e-3), {"seed": 0, "lr": 1.0}).save(1)
    with pytest.raises(InputError, match="step-1 is of another run, with seed 0, not 1"):
        Checkpoints(tmp_path, model, adamw(model, 1e-3), {"seed": 1}).load()
    with pytest.raises(InputError, match="step-1 is of another model"):
        projector = model.multi_modal_projector
        Checkpoints(tmp_path, projector, adamw(projector, 1e-3), {"seed": 0}).load()


def test_full_disk_keeps_the_last_complete_checkpoint(model, tmp_path, monkeypatch):
    def fail(file):
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(tmp_path, model, adamw(model, 1e-3), {})
    checkpoints.save(1)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match="cannot write .*step-2: No space left on device"):
        checkpoints.save(2)
    assert files_in(tmp_path) == ["step-1"] and checkpoints.load() == 1


def test_damaged_checkpoint_is_named(model, tmp_path):
    checkpoints = Checkpoints(tmp_path, model, adamw(model, 1e-3), {})
    checkpoints.save(1)
    next((tmp_path / "step-1").glob("*.safetensors")).write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot read .*step-1"):
        checkpoints.load()
    for content in ([], {"step": None}, {"step": "1"}, {"step": -1}, {"step": 10**30}):
        write_json(tmp_path / "step-1" / "run.json", content)
        with pytest.raises(InputError, match="run.json(: it must be|: step must be| is damaged)"):
            checkpoints.load()
