"""What a stage of training will need, before anyone rents the machine: `python train.py --preset 7b --plan`.

Counted, not measured: parameters from the sizes of the networks, memory from what each part of a step has to keep,
operations from the matrix products. The tests hold it against a model that fits a laptop.
"""

import torch

from .llama import LlamaConfig
from .llava import Llava, LlavaConfig
from .training import freeze
from .vision import VisionConfig

SIZES = {  # the paper's: CLIP ViT-L/14 at 224 pixels and Vicuna
    "7b": LlavaConfig(VisionConfig(), LlamaConfig()),
    "13b": LlavaConfig(VisionConfig(), LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                                                   num_attention_heads=40)),
}
ROWS = {1: 595_375, 2: 157_712}  # CC-595K and LLaVA-Instruct-158K
TEXT = {1: (70, 20), 2: (350, 250)}  # tokens of text a row, and those of them that are learned: about, on average
A100 = 312e12  # bfloat16 operations a second, at best


def count(module: torch.nn.Module, learning: bool = False) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad or not learning)


def memory(model: Llava, rows: int, tokens: int, learned: int, gpus: int = 1, dtype: torch.dtype = torch.bfloat16,
           states: int = 2) -> dict[str, float]:
    """Bytes per GPU, by part, when a step is at its fullest.

    A process takes `rows` rows of `tokens` tokens at once, `learned` of each with a label. The optimizer keeps
    `states` float32 numbers for every weight that learns: 2 in AdamW.
    """
    llama, text, size = model.language_model, model.config.text, dtype.itemsize
    D, H, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    heads = 2 * (text.num_attention_heads + text.num_key_value_heads) * text.head_dim  # query and output, key and value
    total, learning = count(model), count(model, learning=True)
    block = llama.model.layers[0]
    block_learns = count(block, learning=True) > 0

    copies = 0  # of weights, in the dtype of the pick_compute_dtype
    if gpus > 1:  # gathered: the block at work, the next one, and all that is no block; gradients before they part
        rest = learning - layers * count(block, learning=True)
        copies = size * (total - (layers - 2) * count(block)) + (size + 4) * max(rest, count(block, learning=True))
    elif size < 4:
        copies = size * count(block if llama.checkpointing else llama, learning=True)

    # What a block keeps of a token for its backward pass: what goes into attention, SwiGLU and the norms, and, where
    # their weights learn, what comes out of the norms. (A GPU's norm keeps no more; a processor's keeps D more.)
    kept = size * (heads + 2 * H + 2 * D + (2 * D if block_learns else 0))
    one, logits = rows * tokens * kept, rows * learned * text.vocab_size * (size + 12)
    work = one + rows * tokens * size * (4 * H + D)  # a block, its SwiGLU made again, and the gradients that pass it
    gradients = 4 * learning / gpus
    if llama.checkpointing:
        begin = layers * rows * tokens * D * size + max(logits, work)
    else:
        begin = layers * one + logits
    end = gradients + work
    return {
        "weights": (4 * learning + size * (total - learning)) / gpus + copies,
        "optimizer": 4 * states * learning / gpus,
        "gradients and activations": max(begin, end),  # the first are made while the others go
    }


def operations(model: Llava, rows: int, tokens: int, learned: int) -> float:
    """Floating-point operations of a step on `rows` rows, each with a picture."""
    llama, text, vision = model.language_model, model.config.text, model.config.vision
    blocks, D, V = llama.model.layers, text.hidden_size, text.vocab_size
    projector, P = count(model.multi_modal_projector), vision.num_patches
    vision_block = count(model.vision_tower.encoder.layers[0])
    deep = vision.num_hidden_layers + 1 + model.config.feature_layer
    see = deep * (2 * (P + 1) * vision_block + 4 * (P + 1) ** 2 * vision.hidden_size)
    read = count(blocks[-1].mlp) + count(blocks[-1].self_attn.o_proj)  # in the last block for what is learned alone
    linear = 2 * tokens * (count(blocks) - read) + 2 * learned * read
    attention = len(blocks) * 2 * tokens**2 * text.num_attention_heads * text.head_dim  # each sees those before it
    head = 2 * learned * D * V
    # backward is one more such product for what goes in, and another for the weights where they learn
    learns = sum(p.numel() for p in blocks.parameters() if p.requires_grad) / count(blocks)
    head_learns = next(iter(llama.lm_head.parameters())).requires_grad if llama.lm_head else learns > 0.5
    operations = see + 6 * P * projector + (2 + learns) * linear + 3 * attention + (2 + head_learns) * head
    if llama.checkpointing:  # a block again, but for its last layer, whose output nobody keeps
        operations += linear - len(blocks) * 2 * tokens * D * text.intermediate_size + attention
    return rows * operations


def plan(config: LlavaConfig, stage: int, gpus: int, batch_size: int, epochs: float, micro_batch: int | None = None,
         lora_rank: int | None = None, max_length: int = 2048, checkpointing: bool = True,
         utilisation: float = 0.4) -> str:
    """What a stage needs with the paper's data, as text."""
    with torch.device("meta"):
        model = Llava(config)
        freeze(model, stage, lora_rank)
    model.language_model.checkpointing = checkpointing
    text, learned = TEXT[stage]
    pictures = config.tokens_per_image
    share = batch_size // gpus
    rows = min(micro_batch or share, share)
    longest, average = min(max_length, pictures + 4 * text), min(max_length, pictures + text)
    parts = memory(model, rows, longest, min(longest - pictures, 4 * learned), gpus)
    work, steps = operations(model, batch_size, average, learned), round(epochs * ROWS[stage] / batch_size)
    hours = steps * work / (gpus * A100 * utilisation) / 3600
    lines = [
        f"parameters     {count(model) / 1e9:.2f} billion, of which {count(model, True) / 1e6:,.1f} million learn",
        f"memory a GPU   {sum(parts.values()) / 2**30:.1f} GiB and about one for CUDA, for {rows} rows at once, "
        f"of {longest} tokens at most:",
        *(f"               {bytes / 2**30:6.1f} GiB  {name}" for name, bytes in parts.items()),
        f"compute        {work / 1e12:,.0f} TFLOP a step of {batch_size} rows, of {average} tokens on average, "
        f"{pictures} of them the picture's",
        f"time           {hours:.1f} hours for {steps:,} steps on {gpus} GPU{'s' * (gpus > 1)}, at "
        f"{utilisation:.0%} of an A100's {A100 / 1e12:.0f} TFLOP/s",
    ]
    return "\n".join(lines)
