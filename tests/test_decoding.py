"""What a GPU would see of generation: on a pretended one, because these tests run anywhere."""

import pytest
import torch
import torch.nn.functional as F

from nanollava.chat import ChatCache
from nanollava.llama import KVCache
from nanollava.llava import sample_next_token
from tests.gpu import GpuTensor, PretendedGpu
from tests.test_chat_cache import ask, gpt, human
from tests.test_llava import prompt

PROMPT = (1, "image", *range(5, 48))  # 60 tokens
NEW = 8  # tokens to generate: the cache gets longer than 64


@pytest.fixture
def images():
    return torch.randn(1, 3, 32, 32)


@pytest.fixture
def attention(monkeypatch):
    """(query, key, mask) of each attention."""
    calls, sdpa = [], F.scaled_dot_product_attention

    def record(q, k, v, attn_mask=None, **options):
        calls.append((q, k, attn_mask))
        raw = [x.raw if isinstance(x, GpuTensor) else x for x in (q, k, v, attn_mask)]
        out = sdpa(*raw, **options)
        return GpuTensor(out) if isinstance(q, GpuTensor) else out

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    return calls


def generate(model, images, **options) -> list[list[int]]:
    torch.manual_seed(0)
    tokens = prompt(model, *PROMPT)
    return [token.tolist() for token in model.generate(tokens, images, NEW, **options)]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9}])
def test_gpu_gives_the_tokens_of_the_cpu_and_is_waited_for_once_a_token(
        model, images, attention, options):
    expected = generate(model, images, eos_id=-1, **options)
    with PretendedGpu() as gpu:
        tokens = generate(gpu.move(model, torch.float32), images, eos_id=-1, **options)
    assert tokens == expected
    assert gpu.syncs == ["a copy to the CPU"] * NEW


def test_no_copy_to_the_gpu_loses_its_source(model, images, attention):
    """On Apple's GPUs a non-blocking copy may read its source after that is freed
    (https://github.com/pytorch/pytorch/issues/189690)."""
    with PretendedGpu() as gpu:
        generate(gpu.move(model, torch.float32), images)
    assert gpu.syncs and not gpu.lost


def test_next_tokens_on_a_gpu_have_a_new_shape_once_in_64(model, images, attention):
    with PretendedGpu() as gpu:
        generate(gpu.move(model, torch.float32), images)
    shapes = {(q.shape, k.shape[2], mask.shape, mask.stride())
              for q, k, mask in attention if q.shape[2] == 1}
    assert {length for _, length, _, _ in shapes} == {64, 128} and len(shapes) == 2


def test_prompt_on_a_gpu_attends_to_itself_alone(model, images, attention):
    """Causal attention without a mask and without empty slots has the fastest kernels."""
    with PretendedGpu() as gpu:
        generate(gpu.move(model, torch.float32), images)
    prompts = [(q.shape[2], k.shape[2], mask) for q, k, mask in attention if q.shape[2] > 17]
    assert prompts == [(60, 60, None)] * len(model.language_model.model.layers)


def test_next_token_of_a_single_row_needs_no_mask_on_a_cpu(model, images, attention):
    generate(model, images)
    next_tokens = [(k, mask) for q, k, mask in attention if q.shape[2] == 1]
    assert all(mask is None for _, mask in next_tokens)
    assert {k.shape[2] for k, _ in next_tokens} == set(range(61, 60 + NEW))


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_drawn_tokens_have_the_probabilities_of_multinomial(top_p, monkeypatch):
    """On a CPU, torch.multinomial draws in the same way: the same seed gives the same tokens."""
    torch.manual_seed(0)
    logits = torch.randn(4000, 50)
    expected = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    likelier = expected.values.cumsum(dim=-1) - expected.values
    probabilities = expected.values.masked_fill(likelier >= top_p, 0.0)
    torch.manual_seed(1)
    drawn = expected.indices.gather(1, torch.multinomial(probabilities, 1))[:, 0]
    torch.manual_seed(1)
    assert torch.equal(sample_next_token(logits, temperature=1.0, top_p=top_p), drawn)


def test_memory_that_is_full_while_a_cache_grows_leaves_it_usable(config, monkeypatch):
    cache, pad, left = KVCache(config.text, 1, 4, torch.float32, "cpu"), F.pad, [3]

    def fail(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError
        return pad(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(F, "pad", fail)
        with pytest.raises(torch.OutOfMemoryError):
            cache.grow(8)
    cache.grow(8)
    assert {tensor.shape[2] for tensor in cache.keys + cache.values} == {8}


def test_chat_on_a_gpu_gives_the_replies_of_the_cpu(model, tokenizer, images, attention):
    start = [human("<image>\nWhat is there?"), gpt("A cat.")]
    branches = [[*start, human("Where?")], [*start, human("What color is it?")]]
    expected = [ask(model, tokenizer, turns, images) for turns in branches]
    with PretendedGpu() as gpu:
        cache = ChatCache(gpu.move(model, torch.float32))
        replies = [ask(model, tokenizer, turns, images, cache) for turns in branches]
    assert replies == expected
    assert len(cache.chats) == 2, "the second branch is a copy of what they share"
