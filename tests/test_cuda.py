"""What only a real CUDA GPU can show. These tests are skipped where there is none."""

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch

from nanollava.data import collate
from nanollava.image import normalize
from nanollava.infra.device import compile_blocks
from nanollava.llava import Llava
from nanollava.quantize import quantize_int8
from nanollava.training import forward_backward, freeze
from tests.conftest import ASSETS
from tests.test_decoding import NEW, generate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def images():
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@contextmanager
def counted_waits():
    """A list, in the end one entry for each time that the CPU waited for the GPU."""
    waits = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits += [warning for warning in caught if "synchronizing CUDA" in str(warning.message)]


@pytest.fixture
def batches(config):
    """Two micro-batches in pinned memory; the second is without images."""
    image = [config.image_token_id] * config.tokens_per_image
    pixels = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    rows = [([1, *image, 5, 6, 7], [-100] * (len(image) + 2) + [6, 7], pixels)] * 3
    text = [([1, 5, 6, 7], [-100, -100, 6, 7], [])]
    batches = [collate(micro_batch, config.image_token_id) for micro_batch in (rows, text)]
    return [type(batch)(*(tensor if tensor is None else tensor.pin_memory() for tensor in batch))
            for batch in batches]


def test_normalized_pixels_have_the_bits_of_the_cpu():
    pixels = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    assert torch.equal(normalize(pixels.cuda()).cpu(), normalize(pixels))


def test_step_has_the_gradients_of_the_cpu_and_waits_for_nothing(model, batches):
    freeze(model, 2)
    twin = copy.deepcopy(model)
    expected, _ = forward_backward(twin, batches, torch.device("cpu"))
    model.cuda()
    forward_backward(model, batches, torch.device("cuda"))  # constants are copied once
    model.zero_grad()
    with counted_waits() as waits:
        loss, _ = forward_backward(model, batches, torch.device("cuda"))
    assert waits == []
    torch.testing.assert_close(loss.cpu(), expected)
    for weight, other in zip(model.parameters(), twin.parameters()):
        if other.grad is not None:
            torch.testing.assert_close(weight.grad.cpu(), other.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9}])
def test_generation_waits_once_a_token(model, images, options):
    expected = generate(model, images, eos_id=-1)
    model.cuda()
    generate(model, images, eos_id=-1, **options)
    images = images.pin_memory()
    with counted_waits() as waits:
        tokens = generate(model, images, eos_id=-1, **options)
    assert options or tokens == expected
    # the prompt, its positions and each token come from memory that is not pinned
    copies = [wait for wait in waits if wait.filename.endswith("device.py")]
    assert len(waits) - len(copies) == NEW


def test_compiled_blocks_give_the_tokens_of_plain_ones(model, images):
    model.cuda()
    expected = generate(model, images)
    compile_blocks(model)
    assert generate(model, images) == expected


def test_toy_llama_in_int8_has_the_logits_of_the_cpu():
    model = Llava.from_parts(ASSETS / "toy-clip", ASSETS / "toy-llama")
    llama = model.language_model
    quantize_int8(llama)
    embeds = llama.embed(torch.arange(3, 43)[None])
    with torch.no_grad():
        expected = llama.logits(llama(embeds))
        logits = llama.cuda().logits(llama(embeds.cuda())).cpu()
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-3)
