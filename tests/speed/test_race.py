"""The benchmark's training steps, tokens and memory, and the command."""

import time

import pytest
import torch

from nanollava.infra.io import InputError
from nanollava.speed import __main__ as command
from nanollava.speed import limits, race, sides

OURS = sides.Side(sides.training_step, sides.generator)


class InThisProcess:
    """Replaces ProcessPoolExecutor, whose new process would import torch for seconds."""

    def __init__(self, *arguments):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *arguments):
        self.result = lambda: function(*arguments)
        return self


def test_race_measures_steps_tokens_and_memory(folder, monkeypatch):
    monkeypatch.setattr(race, "ProcessPoolExecutor", InThisProcess)
    results = race.race({"nanollava": OURS}, folder, torch.float32, "cpu", 2)
    assert list(results) == ["stage 1 step", "stage 2 step", "first token", "next token",
                             "stage 2 memory"]
    del results["next token"]  # a difference of two times, which may be negative for a tiny model
    assert all(list(values) == ["nanollava"] and values["nanollava"] > 0
               for values in results.values())


@pytest.mark.parametrize("stage, parts", [(1, {"multi_modal_projector"}),
                                          (2, {"multi_modal_projector", "language_model"})])
def test_step_trains_the_parts_of_its_stage(folder, monkeypatch, stage, parts):
    models = []

    def no_optimizer(model, lr):
        models.append(model)
        return [torch.optim.SGD([torch.ones(1)])]  # keeps the gradients of the model

    monkeypatch.setattr(sides, "adamw", no_optimizer)
    sides.training_step(folder, torch.float32, "cpu", stage)()
    assert {name.partition(".")[0] for name, weight in models[0].named_parameters()
            if weight.grad is not None} == parts


@pytest.mark.parametrize("make", [
    lambda *arguments, **options: sides.training_step(*arguments, 2, **options), sides.generator])
def test_blocks_are_compiled_on_request(folder, monkeypatch, make):
    compiled = []
    monkeypatch.setattr(sides, "compile_blocks", compiled.append)
    make(folder, torch.float32, "cpu")
    assert not compiled
    make(folder, torch.float32, "cpu", compiled=True)
    assert len(compiled) == 1


def test_sides_with_different_losses_are_not_compared(folder):
    def other_step(*arguments):
        step = sides.training_step(*arguments)
        return lambda: 1.1 * step()

    both = {"nanollava": OURS, "other": sides.Side(other_step, sides.generator)}
    with pytest.raises(InputError, match="the first losses of stage 1 are"):
        race.race(both, folder, torch.float32, "cpu", 1)


def test_the_fastest_call_counts():
    waits = iter([0.05, 0.01, 0.03])
    assert 0.01 <= limits.best_time(lambda: time.sleep(next(waits)), "cpu", 3) < 0.03


def test_limits_cover_steps_and_tokens(folder, monkeypatch):
    monkeypatch.setattr(limits, "matmul_flops", lambda dtype, device: 1e9)
    monkeypatch.setattr(limits, "memory_bandwidth", lambda device: 1e9)
    found = limits.machine_limits(torch.float32, "cpu")
    assert list(found) == ["stage 1 step", "stage 2 step", "next token"]
    assert 0 < found["stage 1 step"] < found["stage 2 step"]
    # Weights read for a token: two blocks, the last norm and the head (99 x 16). A block has 4 x
    # 256 in attention, 3 x 512 in SwiGLU and two norms of 16. Then 2 x 2 x 32 x 16 keys and values.
    assert found["next token"] == 4 * (2 * (1024 + 1536 + 32) + 16 + 1584 + 2048) / 1e9


def test_command_prints_the_table(folder, monkeypatch, capsys):
    monkeypatch.setattr(race, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(limits, "matmul_flops", lambda dtype, device: 1e9)
    monkeypatch.setattr(limits, "memory_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["speed", "--device", "cpu", "--repeat", "1"])
    command.main(command.parse_arguments())
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["nanollava", "of", "the", "limit"]
    assert [line.split("   ")[0] for line in out[1:]] == [
        "stage 1 step", "stage 2 step", "first token", "next token", "stage 2 memory"]


def test_table_shows_ratio_and_share_of_the_limit():
    results = {"stage 2 step": {"nanollava": 0.5, "transformers": 1.25},
               "stage 2 memory": {"nanollava": 2, "transformers": 3}}
    assert command.results_table(results, {"stage 2 step": 0.3}) == (
        "                 nanollava   transformers   ratio   of the limit\n"
        "stage 2 step      500.0 ms     1,250.0 ms    2.50            60%\n"
        "stage 2 memory      2.0 GB         3.0 GB    1.50")
    ours = {name: {"nanollava": values["nanollava"]} for name, values in results.items()}
    assert "ratio" not in command.results_table(ours, {})
