import json
import time

import pytest
import torch

from nanollava.data import PAD_ROW, Conversations, eval_batches, load_batches
from nanollava.infra.io import InputError
from nanollava.training import fit, learning_rate, mean_loss


def downhill(loss_of):
    """What `fit` wants: a function that makes gradients and returns the loss."""

    def learn(batch):
        loss = loss_of(batch)
        loss.backward()
        return loss.detach()

    return learn


def test_the_rate_rises_for_three_percent_and_falls_to_nothing():
    rates = [learning_rate(step, 1000, 2.0) for step in range(1000)]
    assert rates[0] == pytest.approx(2.0 / 30) and rates[29] == 2.0 and rates[30] == 2.0
    assert rates[515] == pytest.approx(1.0, abs=0.01)
    assert 0 < rates[999] < 1e-4
    assert rates[29:] == sorted(rates[29:], reverse=True)


def test_fit_goes_downhill_and_logs_every_step(tmp_path):
    weight = torch.nn.Parameter(torch.randn(3, 3))
    target = torch.eye(3)
    fit("test", downhill(lambda _: (weight - target).square().mean()), range(100), 100,
        [torch.optim.AdamW([weight], 0.1)], tmp_path / "log.jsonl", lambda _: 5)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(100))
    assert rows[-1]["loss"] < 0.1 * rows[0]["loss"]
    assert set(rows[0]) == {"step", "loss", "lr", "tokens_per_second", "seconds", "waited"}


def test_the_log_says_how_long_each_step_waited_for_its_batch(tmp_path):
    def batches():
        for pause in (0.0, 0.1, 0.0):
            time.sleep(pause)
            yield pause

    weight = torch.nn.Parameter(torch.ones(1))
    slow = downhill(lambda pause: time.sleep(0.05) or weight.sum())  # that is work, not waiting
    fit("test", slow, batches(), 3, [torch.optim.SGD([weight], lr=1.0)], tmp_path / "log.jsonl")
    waited = [json.loads(line)["waited"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert waited[0] < 0.05 and waited[1] >= 0.1 and waited[2] < 0.05


def test_fit_follows_the_schedule_with_each_of_its_optimizers(tmp_path):
    one, other = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizers = [torch.optim.SGD([other], lr=1.0), torch.optim.SGD([one], lr=2.0)]  # the last is told in the log
    fit("test", downhill(lambda _: 0.6 * one.sum() + 0.8 * other.sum()), range(50), 50, optimizers,
        tmp_path / "log.jsonl")
    rates = [json.loads(line)["lr"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rates == [learning_rate(step, 50, 2.0) for step in range(50)]
    torch.testing.assert_close(one.item(), -0.6 * sum(rates), rtol=1e-4, atol=0)  # the gradient is 0.6, 0.8 throughout
    torch.testing.assert_close(other.item(), -0.8 * sum(rates) / 2, rtol=1e-4, atol=0)


def test_a_gradient_is_clipped_to_norm_one():
    weight = torch.nn.Parameter(torch.zeros(2))
    learn = downhill(lambda _: (weight * torch.tensor([300.0, 400.0])).sum())
    fit("test", learn, [0], 1, [torch.optim.SGD([weight], lr=1.0)])
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, -0.8]))


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_rows():
    weight = torch.nn.Parameter(torch.ones(1))
    learn = downhill(lambda batch: weight.sum() * (float("nan") if batch == 2 else 1))
    with pytest.raises(InputError, match="at step 2 the loss is nan.* another --out, with a lower --lr: row 7"):
        fit("test", learn, range(5), 5, [torch.optim.SGD([weight], lr=1.0)], rows_of=lambda step: f": row {step + 5}")


def test_the_held_out_loss_is_that_of_every_row_in_whatever_batches(model, tokenizer, world):
    held_out = Conversations([(world / "instruct.json", world / "images")], tokenizer, model.config)
    held_out.spans, held_out.lengths = held_out.spans[:7], held_out.lengths[:7]
    rows = eval_batches(held_out.lengths, 7)
    (whole,) = load_batches(held_out, rows)
    with torch.no_grad():
        expected = model(*(whole[0][part] for part in (0, 2, 1))).item()
    for size, more in ((2, []), (3, []), (7, [PAD_ROW] * 2)):  # a row that is only there to fill counts for nothing
        batches = [*eval_batches(held_out.lengths, size)[:-1], eval_batches(held_out.lengths, size)[-1] + more]
        for micro_batch in (1, None):
            loss = mean_loss(model, load_batches(held_out, batches, micro_batch), "cpu")
            assert loss == pytest.approx(expected, rel=1e-5)
