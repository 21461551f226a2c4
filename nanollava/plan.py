"""What a training stage needs, before you rent the machine: `python train.py --plan 7b`.

The numbers are counted, not measured: parameters from the sizes of the networks, memory from the
tensors that a step stores, operations from its matrix products, communication from the weights that
fully_shard gathers. The tests compare the counts with PyTorch's profiler on a small model;
docs/training.md compares them with steps of a 7B on an H100.
"""

import math

import torch
import torch.nn as nn

from .infra.resume import FILE_BYTES
from .llama import LlamaConfig
from .llava import Llava, LlavaConfig
from .training import freeze
from .vision import VisionConfig

SIZES = {  # the paper's models: CLIP ViT-L/14 at 224 pixels, and Vicuna
    "7b": LlavaConfig(VisionConfig(), LlamaConfig()),
    "13b": LlavaConfig(VisionConfig(), LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)),
}
ROWS = {1: 595_375, 2: 157_712}  # rows of CC-595K and LLaVA-Instruct-158K
TEXT_TOKENS = {1: 70, 2: 350}  # text tokens of an average row, about
TARGETS = {1: 20, 2: 250}  # those of them with a label
A100_FLOPS = 312e12  # an A100's peak rate in bfloat16, operations per second
UTILIZATION = 0.4  # the share of it that training reaches
# Bytes per second that each of 8 GPUs gets from the others: an A100's NVLink reaches two thirds of
# its 300 GB/s (https://github.com/NVIDIA/nccl-tests/issues/149); half of PCIe 4.0 x16 is assumed.
NVLINK, PCIE = 200e9, 16e9
CARDS = (24, 40, 80)  # GiB of GPUs
CUDA_GIB = 1  # of its context, and what the allocator loses


def count_parameters(module: nn.Module, trainable_only: bool = False) -> int:
    return sum(parameter.numel() for parameter in module.parameters()
               if parameter.requires_grad or not trainable_only)


def step_memory(model: Llava, rows: int, tokens: int, targets: int, gpus: int = 1,
                dtype: torch.dtype = torch.bfloat16,
                gradient_checkpointing: bool = False) -> dict[str, float]:
    """Bytes per GPU at the peak of a training step, by part.

    rows: of a micro-batch on one GPU, each with `tokens` tokens, `targets` of them with a label.
    dtype: of frozen weights and activations. Trainable weights are float32.
    """
    size, trainable = dtype.itemsize, count_parameters(model, trainable_only=True)
    frozen = count_parameters(model) - trainable
    return {
        "weights": (4 * trainable + size * frozen) / gpus
        + weight_copies(model, gpus, size, gradient_checkpointing),
        "optimizer": 2 * 4 * trainable / gpus,  # AdamW's two moments, in float32
        "gradients and activations": gradients_and_activations(
            model, rows, tokens, targets, 4 * trainable / gpus, size, gradient_checkpointing),
    }


def weight_copies(model: Llava, gpus: int, size: int, gradient_checkpointing: bool) -> float:
    """Bytes per GPU of the weights' temporary copies in the compute dtype of `size` bytes."""
    llama = model.language_model
    block, num_blocks = llama.model.layers[0], len(llama.model.layers)
    trainable_block = count_parameters(block, trainable_only=True)
    if gpus > 1:
        # full weights gathered from all ranks: two blocks (the current one and the next) and all
        # that is outside the blocks
        gathered = size * (count_parameters(model) - (num_blocks - 2) * count_parameters(block))
        # full gradients of one unit before they are scattered: in the compute dtype and in float32
        outside = count_parameters(model, trainable_only=True) - num_blocks * trainable_block
        return gathered + (size + 4) * max(outside, trainable_block)
    if size == 4:
        return 0  # the weights are used as they are
    # autograd stores the cast of each trainable weight: of all layers, or of the block at work
    cast = trainable_block if gradient_checkpointing else count_parameters(llama, True)
    return size * cast


def gradients_and_activations(model: Llava, rows: int, tokens: int, targets: int, gradients: float,
                              size: int, gradient_checkpointing: bool) -> float:
    """Bytes per GPU when gradients, of `gradients` bytes, and activations together peak.

    Gradients grow during the backward pass while activations are freed, so the peak is either at
    its start (all activations, no gradients) or at its end (the first block's activations).
    """
    text, block = model.config.text, model.language_model.model.layers[0]
    D, H, num_blocks = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    # query and attention output; key and value
    stored = 2 * (text.num_attention_heads + text.num_key_value_heads) * text.head_dim
    stored += 2 * H  # outputs of gate_proj and up_proj; their product is recomputed
    stored += 2 * D  # inputs of the two norms (a CPU's norm stores D more)
    if count_parameters(block, trainable_only=True):
        stored += 2 * D  # outputs of the norms, for the gradients of the projections' weights
    block_bytes = size * rows * tokens * stored
    # the backward pass of one block adds its SwiGLU, recomputed, and gradients: 4 H, and one of x
    work = block_bytes + size * rows * tokens * (4 * H + D)
    # logits in the compute dtype and in float32, their softmax and their gradient
    logits = rows * targets * text.vocab_size * (size + 4 + 4 + 4)

    if gradient_checkpointing:  # the inputs of all blocks, and then one block or the loss
        start = num_blocks * size * rows * tokens * D + max(logits, work)
    else:
        start = num_blocks * block_bytes + logits
    end = gradients + work
    return max(start, end)


def communication(model: Llava, gpus: int, size: int = 2) -> float:
    """Bytes that each GPU gets from the others in a micro-batch.

    fully_shard gathers all weights in the compute dtype of `size` bytes before they are used, those
    of the LLM's blocks once more for the backward pass, and scatters float32 gradients.
    """
    weights = count_parameters(model) + count_parameters(model.language_model.model.layers)
    gradients = count_parameters(model, trainable_only=True)
    return (size * weights + 4 * gradients) * (gpus - 1) / gpus


def step_flops(model: Llava, rows: int, tokens: int, targets: int,
               gradient_checkpointing: bool = False) -> float:
    """Floating-point operations of a training step on `rows` rows with an image each."""
    config, llama = model.config, model.language_model
    text, blocks = config.text, llama.model.layers

    # The ViT, forward only: 2 operations per weight and token, and the two products of attention.
    vision, num_tokens = config.vision, config.vision.num_patches + 1
    vit_block = count_parameters(model.vision_tower.encoder.layers[0])
    vit_attention = 4 * num_tokens**2 * vision.hidden_size
    vit_depth = vision.num_hidden_layers + 1 + config.feature_layer  # later blocks do not run
    vit = vit_depth * (2 * num_tokens * vit_block + vit_attention)

    # The projector: forward, and the gradients of its weights; its input needs none.
    projector = 4 * config.tokens_per_image * count_parameters(model.multi_modal_projector)

    # LLaMA, forward: the last block's MLP and the head run for the targets alone; causal attention
    # is half of two products.
    last_mlp = count_parameters(blocks[-1].mlp)
    linear = 2 * tokens * (count_parameters(blocks) - last_mlp) + 2 * targets * last_mlp
    attention = len(blocks) * 2 * tokens**2 * text.num_attention_heads * text.head_dim
    head = 2 * targets * text.hidden_size * text.vocab_size

    # LLaMA, backward: as much again for the gradients of the inputs (twice for attention, which has
    # two), and for those of the weights that are trainable.
    trainable = count_parameters(blocks, trainable_only=True) / count_parameters(blocks)
    head_weight = (llama.lm_head or llama.model.embed_tokens).weight
    total = vit + projector + (2 + trainable) * linear + 3 * attention
    total += (2 + head_weight.requires_grad) * head

    # Gradient checkpointing: the blocks forward again, except for down_proj, the last layer.
    if gradient_checkpointing:
        down_proj = text.hidden_size * text.intermediate_size
        total += linear - len(blocks) * 2 * tokens * down_proj + attention
    return rows * total


def plan(config: LlavaConfig, stage: int, gpus: int, batch_size: int, epochs: float,
         micro_batch_size: int | None = None, lora_rank: int | None = None, max_length: int = 2048,
         gradient_checkpointing: bool = True) -> str:
    """What a stage with the paper's data needs on `gpus` A100s, as text."""
    with torch.device("meta"):  # shapes without memory
        model = Llava(config)
        num_parameters = count_parameters(model)  # of the result, without LoRA's
        freeze(model, stage, lora_rank)
    share = batch_size // gpus
    rows = min(micro_batch_size or share, share)
    image_tokens, text_tokens, targets = config.tokens_per_image, TEXT_TOKENS[stage], TARGETS[stage]
    average = min(max_length, image_tokens + text_tokens)
    longest = min(max_length, image_tokens + 4 * text_tokens)  # memory must fit long rows too

    def memory(rows: int) -> dict[str, float]:
        return step_memory(model, rows, longest, min(longest - image_tokens, 4 * targets), gpus,
                           gradient_checkpointing=gradient_checkpointing)

    flops = step_flops(model, batch_size, average, targets, gradient_checkpointing)
    seconds = flops / (gpus * A100_FLOPS * UTILIZATION)
    num_bytes = math.ceil(share / rows) * communication(model, gpus)
    # communication and computation overlap: the slower one counts
    num_steps = round(epochs * ROWS[stage] / batch_size)
    hours, pcie_hours = (num_steps * max(seconds, num_bytes / rate) / 3600
                         for rate in (NVLINK, PCIE))
    over_pcie = f" ({pcie_hours:.1f} over PCIe)" if pcie_hours > hours else ""
    parts = memory(rows)
    return "\n".join([
        f"parameters      {count_parameters(model) / 1e9:.2f} billion, "
        f"{count_parameters(model, trainable_only=True) / 1e6:,.1f} million of them trainable",
        f"memory per GPU  {sum(parts.values()) / 2**30:.1f} GiB, and about {CUDA_GIB} for CUDA, "
        f"with {count_rows(rows)} at a time of up to {longest} tokens:",
        *(f"                {part / 2**30:6.1f} GiB  {name}" for name, part in parts.items()),
        f"fits            {'; '.join(what_fits(memory, card, share) for card in CARDS)}",
        f"compute         {flops / 1e12:,.0f} TFLOP per step of {batch_size} rows with {average} "
        f"tokens on average, {image_tokens} of them of the image",
        *describe_communication(num_bytes, seconds),
        *describe_files(count_parameters(model, trainable_only=True), num_parameters),
        f"time            {hours:.1f} hours{over_pcie} for {num_steps:,} steps on {gpus} "
        f"GPU{'s' * (gpus > 1)}, at {UTILIZATION:.0%} of an A100's {A100_FLOPS / 1e12:.0f} TFLOP/s",
    ])


def what_fits(memory, card: int, share: int) -> str:
    """The largest micro-batch, up to `share` rows, on a GPU of `card` GiB. memory: of rows."""
    room = (card - CUDA_GIB) * 2**30
    fitting = [rows for rows in range(1, share + 1) if sum(memory(rows).values()) <= room]
    return f"{card} GB: " + (f"{count_rows(max(fitting))} at a time" if fitting else "nothing")


def count_rows(number: int) -> str:
    return f"{number} row{'s' * (number > 1)}"


def describe_communication(num_bytes: float, seconds: float) -> list[str]:
    """A line about the bytes that a GPU gets in a step of `seconds`; none for one GPU."""
    if not num_bytes:
        return []
    return [f"communication   {num_bytes / 1e9:,.1f} GB to each GPU per step: "
            f"{num_bytes / NVLINK:.2f} seconds over NVLink, {num_bytes / PCIE:.2f} over PCIe, "
            f"during {seconds:.2f} seconds of computation"]


def describe_files(trainable: int, num_parameters: int) -> list[str]:
    """Lines about what is written, and the memory of the host that it takes."""
    checkpoint = 3 * 4 * trainable  # weights and AdamW's two moments, in float32
    # of one file at a time, the tensors are copied from the GPUs, and the file is built from those
    host = 2 * min(checkpoint, FILE_BYTES)
    size = 2 * num_parameters
    return [
        f"checkpoint      {checkpoint / 1e9:,.1f} GB on the disk, twice that while the next one is "
        f"written, which takes {host / 1e9:,.1f} GB of host memory",
        f"result          {size / 1e9:,.1f} GB on the disk, and of host memory when it is written",
    ]
