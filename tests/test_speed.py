"""The benchmark, on a LLaVA so small that it takes a second."""

import time

import pytest
import torch

from nanollava import speed
from nanollava.infra.io import InputError
from nanollava.llama import LlamaConfig
from nanollava.llava import Llava, LlavaConfig
from nanollava.vision import VisionConfig

TINY = LlavaConfig(
    VisionConfig(image_size=32, patch_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                 num_attention_heads=2),
    LlamaConfig(vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2),
    image_token_id=99)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, value in dict(CONFIG=TINY, TOKENS=30, LEARNED=10, NEW=4).items():
        monkeypatch.setattr(speed, name, value)
    Llava(TINY).save_pretrained(tmp_path)
    return tmp_path


def test_it_measures_steps_and_tokens_and_memory(folder, monkeypatch):
    monkeypatch.setattr(speed, "ProcessPoolExecutor", Here)
    found = speed.compare({"nanollava": speed.ours}, folder, torch.float32, "cpu", 2)
    assert list(found) == ["stage 1 step", "stage 2 step", "first token", "next token", "stage 2 memory"]
    assert all(list(taken) == ["nanollava"] and taken["nanollava"] > 0 for taken in found.values())


class Here:
    """Stands in for a pool of processes, each of which would first take seconds to open torch."""

    def __init__(self, *arguments):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *arguments):
        self.result = lambda: function(*arguments)
        return self


def test_a_step_learns_what_its_stage_learns(folder, monkeypatch):
    monkeypatch.setattr(speed, "adamw", lambda model, lr: learning.append(model) or [torch.optim.SGD([torch.ones(1)])])
    learning = []
    for stage in (1, 2):
        speed.ours(folder, torch.float32, "cpu", stage)()
    names = [{name.partition(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
             for model in learning]
    assert names == [{"multi_modal_projector"}, {"multi_modal_projector", "language_model"}]


def test_a_late_token_is_compared_with_an_early_one(folder, monkeypatch):
    cost = {1: 10.0, 5: 14.0, 17: 38.0}  # a token takes 1, and 2 after the fourth
    monkeypatch.setattr(speed, "seconds", lambda run, device, repeat: cost[run()])
    assert speed.growth(lambda new: new, "cpu", 3) == 2


def test_our_side_is_compiled_on_request(folder, monkeypatch):
    compiled = []
    monkeypatch.setattr(Llava, "compile_blocks", lambda model: compiled.append(model))
    for stage in (2, None):
        speed.ours(folder, torch.float32, "cpu", stage)
        assert not compiled
        speed.ours(folder, torch.float32, "cpu", stage, compiled=True)
        assert compiled.pop()


def test_sides_that_compute_something_else_are_not_compared(folder, monkeypatch):
    def other(*arguments):
        step = speed.ours(*arguments)
        return lambda: 1.1 * step()

    with pytest.raises(InputError, match="no fair race: the losses of the first step of stage 1 differ"):
        speed.compare({"nanollava": speed.ours, "other": other}, folder, torch.float32, "cpu", 1)


def test_the_quickest_turn_counts():
    waits = iter([0.05, 0.01, 0.03])
    assert 0.01 <= speed.seconds(lambda: time.sleep(next(waits)), "cpu", 3) < 0.03


def test_the_table_compares_with_transformers_and_with_the_machine():
    found = {"stage 2 step": {"nanollava": 0.5, "transformers": 1.25},
             "stage 2 memory": {"nanollava": 2, "transformers": 3}}
    assert speed.show(found, {"stage 2 step": 0.3}) == (
        "                      nanollava   transformers  times less  of the machine\n"
        "stage 2 step           500.0 ms     1,250.0 ms        2.50            60%\n"
        "stage 2 memory           2.0 GB         3.0 GB        1.50")
    alone = {name: {"nanollava": taken["nanollava"]} for name, taken in found.items()}
    assert "times less" not in speed.show(alone, {})
