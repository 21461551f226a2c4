"""The training loop, the loss of a step, and what is recomputed in the backward pass."""

import json
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from nanollava.data import PAD_ROW, Conversations, collate, eval_batches, load_batches
from nanollava.image import normalize
from nanollava.infra.device import compile_blocks
from nanollava.infra.io import InputError
from nanollava.infra.run_log import Run
from nanollava.llava import find_targets
from nanollava.training import (
    DivergedError,
    apply_gradient_checkpointing,
    forward_backward,
    freeze,
    learning_rate,
    mean_loss,
    recompute_swiglu,
    train,
)


def test_learning_rate_rises_for_three_percent_of_the_steps_and_falls_to_zero():
    rates = [learning_rate(step, 1000, 2.0) for step in range(1000)]
    assert rates[0] == pytest.approx(2.0 / 30) and rates[29] == 2.0 and rates[30] == 2.0
    assert rates[515] == pytest.approx(1.0, abs=0.01)
    assert 0 < rates[999] < 1e-4
    assert rates[29:] == sorted(rates[29:], reverse=True)


# ---------------------------------------------------------------------------------------------
# The loop, on a few numbers in place of a model


def fit(loss_of, weights, batches, log_path=None, optimizers=None, num_steps=None):
    """Train with SGD; loss_of(batch) is the loss. Returns the rows of the log."""

    def forward_backward(model, batch, device):
        loss = loss_of(batch)
        loss.backward()
        return loss.detach(), 5

    run = Run("test", num_steps or len(batches), log_path=log_path)
    optimizers = optimizers or [torch.optim.SGD(weights, lr=1.0)]
    train(run, None, batches, optimizers, forward_backward)
    return [json.loads(line) for line in log_path.read_text().splitlines()] if log_path else []


def test_loss_falls_and_each_step_is_logged(tmp_path):
    weight = torch.nn.Parameter(torch.randn(3, 3))
    rows = fit(lambda _: (weight - torch.eye(3)).square().mean(), [weight], range(100),
               tmp_path / "log.jsonl", optimizers=[torch.optim.AdamW([weight], 0.1)])
    assert [row["step"] for row in rows] == list(range(100))
    assert rows[-1]["loss"] < 0.1 * rows[0]["loss"]
    assert set(rows[0]) == {"step", "loss", "lr", "grad_norm", "tokens_per_second", "elapsed",
                            "data_time"}


def test_data_time_is_the_wait_for_a_batch(tmp_path):
    def batches():
        for pause in (0.0, 0.1, 0.0):
            time.sleep(pause)
            yield pause

    weight = torch.nn.Parameter(torch.ones(1))
    rows = fit(lambda pause: time.sleep(0.05) or weight.sum(), [weight], batches(),
               tmp_path / "log.jsonl", num_steps=3)  # the sleep of a step itself does not count
    first, second, third = (row["data_time"] for row in rows)
    assert first < 0.05 and second >= 0.1 and third < 0.05
    assert rows[-1]["elapsed"] >= 0.25


def test_each_optimizer_follows_the_schedule(tmp_path):
    one, two = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizers = [torch.optim.SGD([two], lr=1.0), torch.optim.SGD([one], lr=2.0)]
    # the gradient is (0.6, 0.8) in each step: its norm is 1
    rows = fit(lambda _: 0.6 * one.sum() + 0.8 * two.sum(), None, range(50),
               tmp_path / "log.jsonl", optimizers=optimizers)
    rates = [row["lr"] for row in rows]
    assert rates == [learning_rate(step, 50, 2.0) for step in range(50)]  # of the last optimizer
    torch.testing.assert_close(one.item(), -0.6 * sum(rates), rtol=1e-4, atol=0)
    torch.testing.assert_close(two.item(), -0.8 * sum(rates) / 2, rtol=1e-4, atol=0)


def test_gradient_is_clipped_to_norm_one_and_its_own_norm_is_logged(tmp_path):
    weight = torch.nn.Parameter(torch.zeros(2))
    rows = fit(lambda _: (weight * torch.tensor([300.0, 400.0])).sum(), [weight], range(1),
               tmp_path / "log.jsonl")
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, -0.8]))
    assert rows[0]["grad_norm"] == pytest.approx(500)


def test_loss_that_is_not_finite_stops_the_run_before_the_weights_change():
    weight = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(DivergedError, match="at step 2 the loss is nan") as error:
        fit(lambda batch: weight.sum() * (float("nan") if batch == 2 else 1), [weight], range(5))
    assert error.value.step == 2 and isinstance(error.value, InputError)
    assert weight.isfinite()


def test_gradient_that_is_not_finite_stops_the_run_before_the_weights_change():
    weight = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(DivergedError, match="at step 0 the loss is 0.0 and the gradient norm nan"):
        fit(lambda batch: (weight * weight).sqrt().sum(), [weight], range(5))  # 0 / 0 at 0
    assert weight == 0


def test_validation_runs_every_few_steps_and_knows_the_best_loss(tmp_path):
    weight, best, losses = torch.nn.Parameter(torch.zeros(1)), [], iter([3.0, 1.0, 2.0])

    def validate(best_loss):
        best.append(best_loss)
        return next(losses)

    def forward_backward(model, batch, device):
        weight.sum().backward()
        return weight.detach().sum(), 1

    run = Run("test", 5, log_path=tmp_path / "log.jsonl", validate_every=2)
    train(run, None, range(5), [torch.optim.SGD([weight], lr=1.0)], forward_backward, validate)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    measured = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    assert measured == {1: 3.0, 3: 1.0, 4: 2.0}  # every second step and the last
    assert best == [float("inf"), 3.0, 1.0]


# ---------------------------------------------------------------------------------------------
# The loss of a step


@pytest.fixture
def rows(model, tokenizer, world):
    """Rows of training data; the answers have different lengths."""
    dataset = Conversations([(world / "instruct.json", world / "images")], tokenizer, model.config)
    return [dataset[number] for number in range(6)]


def loss_of(model, batch):
    """The mean loss of a batch as a reader would compute it: the model finds all positions."""
    return model(batch.tokens, normalize(batch.images), labels=batch.labels)


def gradients(model, batch):
    model.zero_grad(set_to_none=True)
    loss, num_tokens = forward_backward(model, batch, "cpu")
    return loss, {name: weight.grad for name, weight in model.named_parameters()
                  if weight.grad is not None}


@pytest.mark.parametrize("sizes", [[1] * 6, [4, 2], [1, 5]])
def test_micro_batches_have_the_loss_and_gradients_of_the_batch(model, rows, sizes):
    batch = collate(rows, model.config.image_token_id)
    expected = loss_of(model, batch)  # the mean over all targets
    together = gradients(model, [batch])
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    micro_batches = [collate(rows[start : start + size], model.config.image_token_id)
                     for start, size in zip(starts, sizes)]
    torch.testing.assert_close(together[0], expected)
    assert_equal_gradients(gradients(model, micro_batches), together)


def test_number_of_tokens_counts_padding_and_of_targets_not_the_first_label(model, rows):
    batch = collate(rows, model.config.image_token_id)
    _, num_tokens = forward_backward(model, [batch], "cpu")
    assert num_tokens == batch.tokens.numel()
    assert find_targets(torch.tensor([[5, -100, 7], [-100, 8, 9]])).tolist() == [2, 4, 5]


def test_validation_loss_does_not_depend_on_batches(model, tokenizer, world):
    dataset = Conversations([(world / "instruct.json", world / "images")], tokenizer, model.config)
    dataset.places, dataset.lengths = dataset.places[:7], dataset.lengths[:7]
    (batch,) = load_batches(dataset, eval_batches(dataset.lengths, 7))
    with torch.no_grad():
        expected = loss_of(model, *batch).item()
    for size, padding in ((2, []), (3, []), (7, [PAD_ROW] * 2)):  # rows without targets
        batches = eval_batches(dataset.lengths, size)
        batches[-1] = batches[-1] + padding
        for micro_batch_size in (1, None):
            loss = mean_loss(model, load_batches(dataset, batches, micro_batch_size), "cpu")
            assert loss == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------------------------------
# Recomputation


def stored_bytes(model, batch) -> int:
    """Bytes that autograd stores for the backward pass, besides the weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    stored = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            stored[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, batch)
    del loss
    return sum(stored.values())


@pytest.mark.parametrize("stage, lora_rank", [(1, None), (2, None), (2, 2)])
def test_recomputation_changes_memory_but_not_gradients(model, rows, stage, lora_rank):
    freeze(model, stage, lora_rank)
    batch = collate(rows, model.config.image_token_id)
    before, expected = stored_bytes(model, batch), gradients(model, [batch])
    apply_gradient_checkpointing(model.language_model)
    recompute_swiglu(model.language_model)
    assert_equal_gradients(gradients(model, [batch]), expected)
    assert stored_bytes(model, batch) < 0.6 * before


def test_recomputation_works_in_compiled_blocks(model, rows, monkeypatch):
    # inductor takes minutes; this backend traces and partitions the graphs as inductor would
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    batch = collate(rows, model.config.image_token_id)
    expected = gradients(model, [batch])
    apply_gradient_checkpointing(model.language_model)
    recompute_swiglu(model.language_model)
    compile_blocks(SimpleNamespace(blocks=model.language_model.model.layers[:1]))
    assert_equal_gradients(gradients(model, [batch]), expected)


def assert_equal_gradients(found, expected) -> None:
    (loss, found), (expected_loss, expected) = found, expected
    torch.testing.assert_close(loss, expected_loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_swiglu_stores_gate_and_up_but_not_their_product(model, rows):
    freeze(model, 2)
    batch = collate(rows, model.config.image_token_id)
    before = stored_bytes(model, batch)
    recompute_swiglu(model.language_model)
    config = model.config.text
    product = 4 * batch.tokens.numel() * config.intermediate_size  # bytes of one block, in float32
    saved = before - stored_bytes(model, batch)
    # silu(gate) and silu(gate) * up of the first block; of the second only the targets' rows
    targets = len(batch.target_positions)
    assert saved == 2 * (product + 4 * targets * config.intermediate_size)


def test_without_gradients_nothing_is_recomputed(model, rows, monkeypatch):
    apply_gradient_checkpointing(model.language_model)
    recompute_swiglu(model.language_model)
    monkeypatch.setattr("nanollava.training.checkpoint", None)
    with torch.no_grad():
        loss_of(model, collate(rows, model.config.image_token_id))
