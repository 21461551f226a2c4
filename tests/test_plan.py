"""The plan compared with a real step of a small model: bytes as PyTorch's profiler counts them,
operations as its FlopCounterMode does."""

from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from nanollava import Llava
from nanollava.infra import distributed
from nanollava.llama import LlamaConfig
from nanollava.llava import LlavaConfig
from nanollava.plan import SIZES, count_parameters, plan, step_flops, step_memory
from nanollava.training import adamw, apply_gradient_checkpointing, freeze, recompute_swiglu
from nanollava.vision import VisionConfig

# FlopCounterMode does not count attention on a CPU: with rows this short it is 3 % of the work
ROWS, TOKENS, TARGETS = 6, 128, 50


def small_llava() -> Llava:
    """25 million random weights."""
    torch.manual_seed(0)
    vision = VisionConfig(image_size=112, hidden_size=64, intermediate_size=256,
                          num_hidden_layers=4, num_attention_heads=4)
    text = LlamaConfig(vocab_size=4000, hidden_size=384, intermediate_size=1024,
                       num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=3)
    return Llava(LlavaConfig(vision, text, image_token_id=4000))


def training_step(model: Llava, optimizers: list[torch.optim.Optimizer]):
    """A function that takes a training step on random rows, always the same."""
    tokens = torch.randint(0, 4000, (ROWS, TOKENS))
    tokens[:, 1:65] = model.config.image_token_id
    labels = tokens.where(torch.arange(TOKENS) >= TOKENS - TARGETS, -100)
    images = torch.randn(ROWS, 3, 112, 112)

    def step():
        model(tokens, images, labels).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def peak_bytes(step) -> int:
    """The most that a step allocates beyond what existed before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = sorted((event.start_ns(), event.nbytes())
                    for event in profiler.profiler.kineto_results.events()
                    if event.name() == "[memory]")
    return max(accumulate(change for _, change in events))


def num_bytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("stage, checkpointing, lora_rank", [
    (1, False, None), (1, True, None), (2, False, None), (2, True, None), (2, False, 8),
    (2, True, 8)])
def test_plan_is_within_15_percent_of_bytes_and_5_percent_of_flops(stage, checkpointing, lora_rank):
    model = small_llava()
    freeze(model, stage, lora_rank)
    recompute_swiglu(model.language_model)
    if checkpointing:
        apply_gradient_checkpointing(model.language_model)
    distributed.shard_model(model, model.language_model.model.layers, torch.float32, "cpu")
    optimizers = adamw(model, 1e-3)
    step = training_step(model, optimizers)
    step()  # the first step allocates the optimizer's states
    measured = peak_bytes(step)
    with FlopCounterMode(display=False) as counter:
        step()
    states = [value for optimizer in optimizers for state in optimizer.state.values()
              for value in state.values()]

    counted = step_memory(model, ROWS, TOKENS, TARGETS, dtype=torch.float32,
                          gradient_checkpointing=checkpointing)
    assert counted["weights"] == num_bytes(model.parameters())
    assert counted["optimizer"] == pytest.approx(num_bytes(states), rel=0.15)
    assert counted["gradients and activations"] == pytest.approx(measured, rel=0.15)
    flops = step_flops(model, ROWS, TOKENS, TARGETS, checkpointing)
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_sizes_are_the_papers():
    with torch.device("meta"):
        small, large = Llava(SIZES["7b"]), Llava(SIZES["13b"])
    assert count_parameters(small.language_model) == 6_738_415_616  # LLaMA-7B as published
    assert count_parameters(large.language_model) == 13_015_864_320
    freeze(small, 1)
    assert count_parameters(small, trainable_only=True) == 1024 * 4096 + 4096


def test_plan_prints_memory_and_time():
    text = plan(SIZES["7b"], 1, gpus=8, batch_size=128, epochs=1)
    for part in ("4.2 million of them trainable", "GiB  optimizer", "for 4,651 steps on 8 GPUs"):
        assert part in text
    assert plan(SIZES["7b"], 1, 8, 128, 1, micro_batch_size=4) != text
