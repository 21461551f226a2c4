"""Model folders in the public layouts of CLIP, LLaMA and LLaVA.

Parameters have the names of the public files up to a prefix, so every folder loads strictly.
A folder that nanollava writes opens in other software too. For that it gets two things that
nanollava does without: a second layer in the linear projector, and a row of the vocabulary for the
image token.
"""

import re
import shutil
from pathlib import Path

import torch

from ..infra.io import InputError, atomic_write
from ..infra.json_io import write_json
from ..infra.shapes import quote
from ..tokenizer import Tokenizer
from . import processor
from .hf_config import ORIGINAL_TOWERS, is_original, llava_json, read_config, tower_name
from .safetensors_io import load_strict, read_tensors, write_tensors

# ---------------------------------------------------------------------------------------------
# Names: from a public file to a parameter of ours; None skips the tensor


def llama_name(name: str) -> str | None:
    return None if name.endswith("rotary_emb.inv_freq") else name


def clip_name(name: str) -> str | None:
    """Only the vision tower of a CLIP. Its text tower and its projections are skipped."""
    if name.startswith(("text_model.", "text_projection.", "visual_projection.", "logit_scale")):
        return None
    return None if name.endswith("position_ids") else name.removeprefix("vision_model.")


def llava_name(name: str) -> str | None:
    """Public files have four generations of names. Three differ in prefixes:

        vision_tower.vision_model.X   language_model.model.X   language_model.lm_head.X
        vision_tower.X                language_model.model.X   language_model.lm_head.X
        model.vision_tower.X          model.language_model.X   lm_head.X

    The second one has the names of nanollava. The fourth is that of the original LLaVA code, whose
    LLaMA contains the rest (Y is nothing in a linear projector; 0. and 2. in an MLP):

        model.vision_tower.vision_tower.vision_model.X   model.X   lm_head.X   model.mm_projector.YX
    """
    if name.endswith(("position_ids", "rotary_emb.inv_freq")):
        return None
    ours = ("language_model.model.", "language_model.lm_head.")
    name = name.removeprefix("model.")
    if name.startswith("lm_head."):
        name = f"language_model.{name}"
    elif name.startswith(("embed_tokens.", "layers.", "norm.")):
        name = f"language_model.model.{name}"
    elif name.startswith("language_model.") and not name.startswith(ours):
        name = name.replace("language_model.", "language_model.model.", 1)
    elif name.startswith("mm_projector."):
        layer, _, kind = name.removeprefix("mm_projector.").rpartition(".")
        number = {"": 1, "0": 1, "2": 2}.get(layer, layer)
        name = f"multi_modal_projector.linear_{number}.{kind}"
    return re.sub(r"^(vision_tower\.)+(vision_model\.)?", "vision_tower.", name)


# ---------------------------------------------------------------------------------------------
# The second layer. The public projector is linear_2(activation(linear_1(x))), always two layers.
# A linear one is written with the activation "linear", which is none, and an identity as linear_2.

LINEAR_2 = "multi_modal_projector.linear_2."


def add_identity(tensors: dict[str, torch.Tensor]) -> None:
    """Add the second layer to a linear projector."""
    bias = tensors["multi_modal_projector.linear_1.bias"]
    tensors[LINEAR_2 + "weight"] = torch.eye(len(bias), dtype=bias.dtype)
    tensors[LINEAR_2 + "bias"] = torch.zeros_like(bias)


def drop_identity(tensors: dict[str, torch.Tensor], folder: str | Path) -> None:
    """Remove the second layer. Raises InputError if it is not an identity, so does something."""
    weight, bias = (tensors.pop(LINEAR_2 + name, None) for name in ("weight", "bias"))
    if weight is None:
        return
    identity = torch.eye(len(weight), dtype=weight.dtype)
    if bias is None or bias.any() or not torch.equal(weight, identity):
        raise InputError(f"{folder}: projector_hidden_act 'linear' is supported only where "
                         f"{LINEAR_2}* is an identity")


# ---------------------------------------------------------------------------------------------
# The image token's row. nanollava replaces image tokens by image features before it looks up any
# embedding, so their id may lie past the vocabulary. transformers looks up every token first.

VOCABULARY = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


def add_image_row(tensors: dict[str, torch.Tensor], image_token_id: int) -> None:
    """Extend the vocabulary up to the image token, with copies of row 0, which is <unk>.

    A copy gets the logit of <unk>, so sampling never prefers the image token.
    """
    for name in VOCABULARY:
        if name in tensors and len(tensors[name]) <= image_token_id:
            rows = image_token_id + 1 - len(tensors[name])
            tensors[name] = torch.cat([tensors[name], tensors[name][:1].expand(rows, -1)])


def drop_image_row(tensors: dict[str, torch.Tensor], vocab_size: int, image_token_id: int) -> None:
    """Cut the vocabulary to its true size again."""
    for name in VOCABULARY:
        if name in tensors and len(tensors[name]) == image_token_id + 1:
            tensors[name] = tensors[name][:vocab_size]


# ---------------------------------------------------------------------------------------------
# Model folders


def load_vision_tower(module, folder, dtype, device) -> None:
    """The vision tower of a CLIP folder into a VisionTower."""
    load_strict(module, read_tensors(folder, clip_name), folder, dtype, device)


def load_llama(module, folder, dtype, device) -> None:
    """A LLaMA folder into a Llama."""
    tensors = read_tensors(folder, llama_name)
    drop_tied_head(module, tensors)
    load_strict(module, tensors, folder, dtype, device)


def load_llava(module, folder, dtype, device, vision_tower=None) -> None:
    """A LLaVA folder, ours or a public one, into a Llava. vision_tower: a CLIP folder, for a LLaVA
    of the original code without one inside."""
    tensors, config = read_tensors(folder, llava_name), module.config
    if name := read_config(folder, lambda raw: is_original(raw) and raw["mm_vision_tower"]):
        complete_original(tensors, folder, name, vision_tower)
    if config.projector == "linear":
        drop_identity(tensors, folder)
    drop_image_row(tensors, config.text.vocab_size, config.image_token_id)
    drop_tied_head(module, tensors)
    load_strict(module, tensors, folder, dtype, device)


def complete_original(tensors: dict[str, torch.Tensor], folder, name: str, vision_tower) -> None:
    """Add the vision tower to the tensors of the original code, if they lack it, as most do.

    name: what the folder's config.json calls the tower.
    Raises InputError if vision_tower is missing or has no effect, or if this is no model.
    """
    norm = tensors.get("language_model.model.norm.weight")
    if norm is not None and norm.float().abs().mean() < 0.1:  # 1 untrained, 1.8 in SmolLM2
        raise InputError(f"{folder} is a delta: its weights are differences to those of LLaMA; add "
                         "them up with apply_delta of the original LLaVA code")
    if any(key.startswith("vision_tower.") for key in tensors):
        if vision_tower and tower_name(name) in ORIGINAL_TOWERS:
            raise InputError(f"--vision-tower has no effect on {folder}: its weights include one")
    elif vision_tower is None:
        raise InputError(f"{folder} does not hold its vision tower, {quote(name)}: give the folder "
                         "of this CLIP with --vision-tower (`python prepare_data.py weights` "
                         "downloads it)")
    else:
        tower = read_tensors(vision_tower, clip_name)
        tensors |= {f"vision_tower.{key}": tensor for key, tensor in tower.items()}


def drop_tied_head(module: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Some files repeat tied embeddings as lm_head. Remove it if the module has none."""
    for name in tensors.keys() - dict(module.named_parameters()).keys():
        embeddings = tensors.get(name.replace("lm_head.", "model.embed_tokens."))
        is_head = name.endswith("lm_head.weight") and embeddings is not None
        if is_head and torch.equal(tensors[name], embeddings):
            del tensors[name]


def save_llava(folder: Path, config: dict, tensors: dict[str, torch.Tensor], files=()) -> None:
    """Write a LLaVA. `config` is `asdict(LlavaConfig)`.

    If tokenizer.model is among `files`, the files of processor.py are made from it, unless the
    projector is one that no other software opens.
    """
    tensors = {name.replace("vision_tower.", "vision_tower.vision_model.", 1): tensor
               for name, tensor in tensors.items()}
    if config["projector"] == "linear":
        add_identity(tensors)
    add_image_row(tensors, config["image_token_id"])
    raw, made = llava_json(config), None
    for path in map(Path, files):
        if path.name == "tokenizer.model" and raw["model_type"] == "llava":
            made = processor.llava_files(Tokenizer(path), config)
    save_folder(folder, raw, tensors, files, made)


def save_folder(folder: Path, config: dict, tensors: dict[str, torch.Tensor], files=(),
                made: dict[str, dict | str] | None = None) -> None:
    """Write a model folder: copies of `files`, the tensors, and last config.json.

    made: the files of processor.py, {name: content}.
    A folder with a config.json is therefore complete, even if an earlier run was killed.
    Raises InputError if a file cannot be written.
    """
    folder = Path(folder)
    (folder / "config.json").unlink(missing_ok=True)
    for path in map(Path, files):
        with atomic_write(folder / path.name) as temp:
            shutil.copyfile(path, temp)
    if made is not None:
        processor.write_files(folder, made)
    write_tensors(folder, tensors)
    write_json(folder / "config.json", config, indent=2)
