"""A LLaVA as the two files that llama.cpp reads, and with it Ollama, LM Studio and others.

    model.gguf    the language model, its vocabulary and its chat template
    mmproj.gguf   the vision tower and the projector

The names of fields and tensors are those in llama.cpp's src/llama-arch.cpp and
tools/mtmd/clip-impl.h.
"""

from pathlib import Path
from string import Template

import torch

from ..conversation import TEMPLATES
from ..image import MEAN, STD
from ..infra.io import InputError, atomic_folder
from ..tokenizer import Tokenizer
from .gguf_io import TYPES, Tensor, entry, write_gguf
from .processor import chat_template, unk_id
from .sentencepiece_model import BYTE, USER_DEFINED, read_vocabulary

PROJECTORS = ("linear", "mlp2x_gelu")


def write_llava(folder: Path, config: dict, tensors: dict[str, torch.Tensor], tokenizer: Tokenizer,
                dtype: str, class_token: str, name: str) -> None:
    """Write model.gguf and mmproj.gguf into a new folder, both or none.

    config, tensors: `asdict(LlavaConfig)` and the state_dict of a Llava.
    dtype: of the matrices, one of TYPES. The rest is in float32.
    class_token: as for `place_positions`. name: what programs call the model.
    Raises InputError if the folder exists or cannot be written, if GGUF cannot express the
    projector, the template or the vocabulary, or if a weight is too large for the dtype.
    """
    if config["projector"] not in PROJECTORS:
        raise InputError(f"projector {config['projector']!r} cannot be written as GGUF, only "
                         f"{' and '.join(PROJECTORS)}")
    if config["template"] == "plain":
        raise InputError("a model with the template 'plain' cannot be written as GGUF: llama.cpp "
                         "generates nothing directly behind an image")
    words = vocabulary(tokenizer, config["template"])
    parts = {prefix: {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items()
                      if name.startswith(f"{prefix}.")}
             for prefix in ("language_model", "vision_tower", "multi_modal_projector")}
    general = {"general.name": name, "general.file_type": TYPES[dtype][3],
               "general.quantization_version": 2}
    with atomic_folder(folder) as temp:
        rows = len(words["tokenizer.ggml.tokens"])
        write_gguf(temp / "model.gguf", general | llama_fields(config["text"], rows) | words,
                   llama_tensors(parts["language_model"], config["text"], rows, unk_id(tokenizer),
                                 dtype))
        blocks = config["vision"]["num_hidden_layers"] + 1 + config["feature_layer"]
        write_gguf(temp / "mmproj.gguf", general | vision_fields(config, blocks),
                   vision_tensors(parts["vision_tower"], blocks, class_token, dtype)
                   + projector_tensors(parts["multi_modal_projector"], dtype))


def rename(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


# ---------------------------------------------------------------------------------------------
# The language model

LLAMA_NAMES = {
    "model.layers.": "blk.", "model.embed_tokens.": "token_embd.", "model.norm.": "output_norm.",
    "lm_head.": "output.", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm"}


def llama_fields(text: dict, rows: int) -> dict:
    heads = text["num_attention_heads"]
    head_dim = text["head_dim"] or text["hidden_size"] // heads
    return {
        "general.architecture": "llama", "general.type": "model",
        "llama.context_length": text["max_position_embeddings"],
        "llama.embedding_length": text["hidden_size"],
        "llama.block_count": text["num_hidden_layers"],
        "llama.feed_forward_length": text["intermediate_size"],
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": text["num_key_value_heads"] or heads,
        "llama.attention.key_length": head_dim, "llama.attention.value_length": head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(text["rms_norm_eps"]),
        "llama.rope.dimension_count": head_dim, "llama.rope.freq_base": float(text["rope_theta"]),
        "llama.vocab_size": rows}


def llama_tensors(tensors: dict[str, torch.Tensor], text: dict, rows: int, unk: int,
                  dtype: str) -> list[Tensor]:
    """The language model's tensors, with embeddings for `rows` tokens."""
    heads = {"q_proj": text["num_attention_heads"],
             "k_proj": text["num_key_value_heads"] or text["num_attention_heads"]}
    found = []
    for name, data in tensors.items():
        shape, module = data.shape, name.split(".")[-2]
        if module in heads:
            data = interleave(data, heads[module])
        elif module in ("embed_tokens", "lm_head"):
            data = resize(data, rows, unk)
            shape = data.shape
        found.append(entry(rename(name, LLAMA_NAMES), data, dtype, shape))
    return found


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """A view of the rows of q or k in the order 0, d/2, 1, d/2 + 1, ... of each head.

    Rotary embeddings rotate pairs of rows. In the public layout, the partner of row i is
    row i + d/2; in llama.cpp, pairs are neighbors.
    """
    return weight.view(heads, 2, len(weight) // heads // 2, -1).transpose(1, 2)


def resize(embeddings: torch.Tensor, rows: int, unk: int) -> torch.Tensor:
    """Drop rows past the vocabulary, the image token's for example, or add copies of <unk>'s."""
    missing = rows - len(embeddings)
    if missing <= 0:
        return embeddings[:rows]
    return torch.cat([embeddings, embeddings[unk].expand(missing, -1)])


# ---------------------------------------------------------------------------------------------
# The vocabulary and the chat template

# llama.cpp puts a marker into the text in place of each image: <__media__>, or one with random
# letters behind "media". No line end separates it from the text around it; the template adds them.
IMAGE_LINES = Template(r"""{%- macro image_lines(content) -%}
{%- for piece in content.split("<__media") -%}
{%- set text = piece if loop.first else (piece.split("__>")[1:] | join("__>")) -%}
{%- if not loop.first -%}
{{- "<__media" ~ piece.split("__>")[0] ~ "__>$space" -}}
{{- "" if not text or text.startswith("\n") else "\n" -}}
{%- endif -%}
{{- text -}}
{{- "" if loop.last or text.endswith("\n") or (loop.first and not text) else "\n" -}}
{%- endfor -%}
{%- endmacro -%}
""")


def vocabulary(tokenizer: Tokenizer, template: str) -> dict:
    """The fields of tokenizer and chat template.

    llama.cpp crashes at a character that is neither in the vocabulary nor made of its bytes. So a
    vocabulary without bytes gets them, as additional tokens.
    Raises InputError for a vocabulary that is not like LLaMA's.
    """
    pieces, reason = read_vocabulary(tokenizer)
    if reason:
        raise InputError(f"{tokenizer.path} cannot be written as GGUF: {reason}")
    kinds = {kind for _, _, kind in pieces}  # GGUF has the same numbers
    if BYTE not in kinds:
        pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    # llama.cpp finds user-defined pieces in the text before spaces become ▁. It can put a ▁ in
    # front of each stretch, but takes such a piece for the end of one, and puts a ▁ behind it too.
    # Where there are any, it puts none, and the template writes them.
    space = "▁" if USER_DEFINED in kinds else ""
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [text.replace("▁", " ") if kind == USER_DEFINED else text
                                  for text, _, kind in pieces],
        "tokenizer.ggml.scores": [score for _, score, _ in pieces],
        "tokenizer.ggml.token_type": [kind for _, _, kind in pieces],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.unknown_token_id": unk_id(tokenizer),
        "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": not space,
        "tokenizer.chat_template": gguf_template(
            template, tokenizer.piece(tokenizer.eos_id), space)}
    if stop := TEMPLATES[template].stop:  # text: its last token ends a reply
        fields["tokenizer.ggml.eot_token_id"] = tokenizer.encode(stop)[-1]
    return fields


def gguf_template(name: str, eos: str, space: str) -> str:
    """The chat template. Messages are texts, as llama-server and llama-mtmd-cli give them, or lists
    of texts, from llama-cpp-python.

    space: what begins a stretch of text behind BOS, EOS or an image.
    """
    part = 'image_lines(part["text"])'
    return IMAGE_LINES.substitute(space=space) + chat_template(
        name, eos, space, string="image_lines(content)", text=part, image=part)


# ---------------------------------------------------------------------------------------------
# The vision tower and the projector

VISION_NAMES = {
    "embeddings.class_embedding": "v.class_embd", "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.position_embedding": "v.position_embd", "pre_layrnorm": "v.pre_ln",
    "encoder.layers.": "v.blk.", "layer_norm1": "ln1", "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_down", "mlp.fc2": "ffn_up"}  # a LLaVA's names are swapped, says clip.cpp


def vision_fields(config: dict, blocks: int) -> dict:
    vision = config["vision"]
    return {
        "general.architecture": "clip", "general.type": "mmproj",
        "clip.has_vision_encoder": True, "clip.has_llava_projector": True,
        "clip.projector_type": "mlp", "clip.use_gelu": False,  # so it is QuickGELU
        "clip.vision.image_size": vision["image_size"],
        "clip.vision.patch_size": vision["patch_size"],
        "clip.vision.embedding_length": vision["hidden_size"],
        "clip.vision.feed_forward_length": vision["intermediate_size"],
        "clip.vision.projection_dim": config["text"]["hidden_size"],
        "clip.vision.block_count": blocks, "clip.vision.feature_layer": [blocks],
        "clip.vision.attention.head_count": vision["num_attention_heads"],
        "clip.vision.attention.layer_norm_epsilon": float(vision["layer_norm_eps"]),
        "clip.vision.image_mean": list(MEAN), "clip.vision.image_std": list(STD)}


def vision_tensors(tensors: dict[str, torch.Tensor], blocks: int, class_token: str,
                   dtype: str) -> list[Tensor]:
    """The ViT's tensors, of the `blocks` blocks that run."""
    found = []
    for name, data in tensors.items():
        is_block = name.startswith("encoder.layers.")
        if name.startswith("post_layernorm.") or is_block and int(name.split(".")[2]) >= blocks:
            continue
        is_position = name == "embeddings.position_embedding.weight"
        if is_position:
            data = place_positions(data, class_token)
        found.append(entry(rename(name, VISION_NAMES), data, "float32" if is_position else dtype))
    return found


def place_positions(positions: torch.Tensor, class_token: str) -> torch.Tensor:
    """Position embeddings in the order of llama.cpp's tokens, the class token "first" or "last".

    In CLIP it is the first. In llama.cpp it is the last since May 2025 (pull request 13321), but
    the first token is still dropped in its place: the language model gets the class token instead
    of the top left patch (issue 25814, mended by pull request 25844). With "last", at least each
    patch has its own position.
    """
    return positions if class_token == "first" else positions.roll(-1, dims=0)


def projector_tensors(tensors: dict[str, torch.Tensor], dtype: str) -> list[Tensor]:
    """The projector: two layers, between which llama.cpp always applies GELU.

    A linear one is exact all the same: x = GELU(x) - GELU(-x), with the layers [W; -W] and [I, -I].
    """
    weight, bias = tensors["linear_1.weight"], tensors["linear_1.bias"]
    if "linear_2.weight" in tensors:
        second = entry("mm.2.weight", tensors["linear_2.weight"], dtype)
        second_bias = tensors["linear_2.bias"]
    else:
        identity, second_bias = torch.eye(len(bias), dtype=bias.dtype), torch.zeros_like(bias)
        second = entry("mm.2.weight", torch.cat([identity, -identity], dim=1),
                       "float16" if dtype == "q8_0" else dtype)  # 8 bits have no exact 1
        weight, bias = torch.cat([weight, -weight]), torch.cat([bias, -bias])
    return [entry("mm.0.weight", weight, dtype), entry("mm.0.bias", bias, dtype),
            second, entry("mm.2.bias", second_bias, dtype)]
