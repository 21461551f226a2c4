"""Model folders: config.json beside safetensors, in the layouts that are public for CLIP, LLaMA and LLaVA.

A parameter here is called what the public files call it, up to a prefix; `*_name` below are those prefixes.
What transformers leaves out of a config.json equals its default, so the defaults here are transformers'.
Whatever nanollava does not do (another activation, scaled rotary angles, biases) is refused by name.
"""

import hashlib
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..conversation import TEMPLATES
from ..infra.io import InputError, atomic_write, read_json, write_json

# ---------------------------------------------------------------------------------------------
# config.json


def read_config(folder: str | Path, fields) -> dict:
    """What one of the three functions below makes of the config.json of a model folder.

    Raises InputError, naming the folder, where there is none or where it asks for what is not supported.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no model folder at {folder}")
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} holds no model: it has no config.json")
    raw = read_json(path)
    try:
        if not isinstance(raw, dict):
            raise InputError("this is not a JSON object")
        if raw.get("quantization_config"):
            raise InputError("quantized weights are not supported")
        return fields(raw)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def section(raw: dict, key: str) -> dict:
    """An object inside a config; absent or null, it is empty."""
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise InputError(f"{key} {value!r} is not a JSON object")
    return value


def number(raw: dict, key: str, default):
    """A number of a config; absent or null, the default."""
    value = default if raw.get(key) is None else raw[key]
    if value is not None and (type(value) not in (int, type(default)) or not value > 0):
        raise InputError(f"{key} {value!r} is not supported, only a number above zero")
    return value


def refuse_unless(raw: dict, key: str, supported, default=None) -> None:
    value = raw.get(key, default)
    if value not in supported:
        raise InputError(f"{key} {value!r} is not supported, only {' or '.join(map(repr, supported))}")


def refuse_split(fields: dict, whole: str, parts: str) -> None:
    if fields[parts] and fields[whole] % fields[parts]:
        raise InputError(f"{whole} {fields[whole]} cannot be divided by {parts} {fields[parts]}")


def vision_config(raw: dict) -> dict:
    """The fields of VisionConfig from the config of a CLIP, or of its vision tower alone."""
    if raw.get("model_type") == "clip":  # where there are both, the second counts
        raw = section(raw, "vision_config") | section(raw, "vision_config_dict")
    refuse_unless(raw, "model_type", ("clip_vision_model",), "clip_vision_model")
    refuse_unless(raw, "hidden_act", ("quick_gelu",), "quick_gelu")
    defaults = dict(image_size=224, patch_size=32, hidden_size=768, intermediate_size=3072,
                    num_hidden_layers=12, num_attention_heads=12, layer_norm_eps=1e-5)  # ViT-B/32
    fields = {key: number(raw, key, default) for key, default in defaults.items()}
    refuse_split(fields, "hidden_size", "num_attention_heads")
    return fields


def text_config(raw: dict) -> dict:
    """The fields of LlamaConfig from the config of a LLaMA."""
    refuse_unless(raw, "model_type", ("llama",), "llama")
    refuse_unless(raw, "hidden_act", ("silu",), "silu")
    for key in ("attention_bias", "mlp_bias"):
        refuse_unless(raw, key, (False,), False)
    rope = section(raw, "rope_scaling") or section(raw, "rope_parameters")
    refuse_unless(rope, "rope_type", ("default",), rope.get("type", "default"))
    defaults = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                    num_attention_heads=32, num_key_value_heads=None, head_dim=None, rms_norm_eps=1e-6,
                    rope_theta=10000.0, max_position_embeddings=2048)
    fields = {key: number(raw | rope, key, default) for key, default in defaults.items()}  # rope_theta is in either
    refuse_split(fields, "hidden_size", "num_attention_heads")
    refuse_split(fields, "num_attention_heads", "num_key_value_heads")
    return fields | {"tie_word_embeddings": bool(raw.get("tie_word_embeddings"))}


VIT_L_336 = dict(image_size=336, patch_size=14, hidden_size=1024, intermediate_size=4096,
                 num_hidden_layers=24, num_attention_heads=16)  # of a LLaVA that says nothing of its vision tower


def llava_config(raw: dict) -> dict:
    """The fields of LlavaConfig, its two halves as dicts, from the config of a LLaVA."""
    if "mm_vision_tower" in raw:
        raise InputError("the layout of the original LLaVA code is not supported, only that of the llava-hf files")
    refuse_unless(raw, "model_type", ("llava",))
    refuse_unless(raw, "projector_hidden_act", ("gelu", "linear"), "gelu")
    refuse_unless(raw, "multimodal_projector_bias", (True,), True)
    refuse_unless(raw, "vision_feature_select_strategy", ("default",), "default")
    ours = section(raw, "nanollava")  # what the public layout has no place for
    refuse_unless(ours, "template", TEMPLATES, "vicuna_v1")
    vision, text = vision_config(section(raw, "vision_config") or VIT_L_336), text_config(section(raw, "text_config"))
    text["vocab_size"] = number(ours, "vocab_size", text["vocab_size"])
    text["tie_word_embeddings"] |= bool(raw.get("tie_word_embeddings"))
    layer, layers = raw.get("vision_feature_layer", -2), vision["num_hidden_layers"]
    if layer not in range(-layers - 1, layers + 1):
        raise InputError(f"vision_feature_layer {layer!r} is not supported, only one of the {layers} layers")
    return dict(
        vision=vision, text=text,
        projector="linear" if raw.get("projector_hidden_act") == "linear" else "mlp2x_gelu",
        feature_layer=layer if layer < 0 else layer - layers - 1,  # counted from the end; 0 is before the first block
        image_token_id=number(raw, "image_token_id", number(raw, "image_token_index", 32000)),
        template=ours.get("template", "vicuna_v1"), stage=ours.get("stage", 2),
    )


def llama_json(text: dict) -> dict:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "bos_token_id": 1, "eos_token_id": 2, **text}


def clip_json(vision: dict) -> dict:
    return {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_act": "quick_gelu",
            **vision}


def llava_json(config: dict) -> dict:
    """The config.json of `asdict(LlavaConfig)`: what LlavaForConditionalGeneration of transformers reads."""
    vision, text = config["vision"], config["text"]
    rows = max(text["vocab_size"], config["image_token_id"] + 1)  # see llava_tensors
    return {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "image_token_index": config["image_token_id"],
        "image_seq_length": (vision["image_size"] // vision["patch_size"]) ** 2,
        "projector_hidden_act": "linear" if config["projector"] == "linear" else "gelu",
        "vision_feature_layer": config["feature_layer"], "vision_feature_select_strategy": "default",
        "vision_config": clip_json(vision), "text_config": llama_json({**text, "vocab_size": rows}),
        "nanollava": {"template": config["template"], "stage": config["stage"], "vocab_size": text["vocab_size"]},
    }


# ---------------------------------------------------------------------------------------------
# Names: from a public file to a parameter of ours; None skips the tensor


def llama_name(name: str) -> str | None:
    return None if name.endswith("rotary_emb.inv_freq") else name


def clip_name(name: str) -> str | None:
    beside = name.startswith(("text_model.", "text_projection.", "visual_projection.", "logit_scale"))
    return None if beside or name.endswith("position_ids") else name.removeprefix("vision_model.")


def llava_name(name: str) -> str | None:
    """Three generations of public names to ours."""
    ours = ("language_model.model.", "language_model.lm_head.")
    name = name.removeprefix("model.")
    if name.startswith("lm_head."):
        name = f"language_model.{name}"
    elif name.startswith("language_model.") and not name.startswith(ours):
        name = name.replace("language_model.", "language_model.model.", 1)
    name = name.replace("vision_tower.vision_model.", "vision_tower.", 1)
    return None if name.endswith(("position_ids", "rotary_emb.inv_freq")) else name


# ---------------------------------------------------------------------------------------------
# What the public layout has and we have not: the second layer of a linear projector, the picture token's row


SECOND = "multi_modal_projector.linear_2."
VOCABULARY = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


def llava_tensors(ours: dict[str, torch.Tensor], image_token_id: int) -> dict[str, torch.Tensor]:
    """All tensors of a LLaVA by their public names.

    The public projector has two layers, so a linear one is linear_1, no activation, an identity. And transformers
    looks up every token, the picture's too: where that one lies past the vocabulary, it gets the row of token 0,
    <unk>, so that it is never the likeliest.
    """
    tensors = {name.replace("vision_tower.", "vision_tower.vision_model.", 1): tensor for name, tensor in ours.items()}
    if SECOND + "weight" not in tensors:
        bias = tensors["multi_modal_projector.linear_1.bias"]
        tensors[SECOND + "weight"] = torch.eye(len(bias), dtype=bias.dtype)
        tensors[SECOND + "bias"] = torch.zeros_like(bias)
    for name in VOCABULARY:
        if name in tensors and len(tensors[name]) <= image_token_id:
            more = image_token_id + 1 - len(tensors[name])
            tensors[name] = torch.cat([tensors[name], tensors[name][:1].expand(more, -1)])
    return tensors


def drop_identity(tensors: dict[str, torch.Tensor], folder) -> None:
    """Take the identity out again. Raises InputError if it is none: then the projector is no linear one of ours."""
    weight, bias = tensors.pop(SECOND + "weight", None), tensors.pop(SECOND + "bias", None)
    if weight is None:
        return
    if bias is None or bias.any() or not torch.equal(weight, torch.eye(len(weight), dtype=weight.dtype)):
        raise InputError(f"{folder}: projector_hidden_act 'linear' is supported only where {SECOND}* is an identity")


def drop_image_token(tensors: dict[str, torch.Tensor], vocab_size: int, image_token_id: int) -> None:
    """Take the picture token's row out again, where it lies past the vocabulary."""
    for name in VOCABULARY:
        if name in tensors and len(tensors[name]) == image_token_id + 1:
            tensors[name] = tensors[name][:vocab_size]


# ---------------------------------------------------------------------------------------------
# Tensors


def read_tensors(folder: str | Path, rename=llama_name) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors by our names, memory-mapped: nothing is read before it is used."""
    folder = Path(folder)
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        paths = [whole]
    elif index.is_file():
        try:
            paths = sorted({folder / file for file in read_json(index)["weight_map"].values()})
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index} is no index: it does not say which file holds which tensor") from error
    else:
        raise InputError(f"{folder} holds neither {whole.name} nor {index.name} (*.bin are pickles, which are never "
                         "opened here; `python prepare_data.py weights` downloads and rewrites them)")
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path} is missing, though {index.name} names it")
    tensors = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    if rename(name) is not None:
                        tensors[rename(name)] = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is not a whole safetensors file: {error}") from error
    return tensors


def drop_tied(tensors: dict[str, torch.Tensor], wanted) -> None:
    """Take out an lm_head that is tied to the embeddings and stands in the file all the same."""
    for name in tensors.keys() - wanted:
        embeddings = tensors.get(name.replace("lm_head.", "model.embed_tokens."))
        if name.endswith("lm_head.weight") and embeddings is not None and torch.equal(tensors[name], embeddings):
            del tensors[name]


def load(module: torch.nn.Module, tensors: dict[str, torch.Tensor], folder, dtype: torch.dtype, device) -> None:
    """Put tensors in the place of a module's parameters (which may be on the meta device), strictly."""
    wanted = {name: parameter.shape for name, parameter in module.named_parameters()}
    drop_tied(tensors, wanted)
    problems = [f"{name} is missing" for name in wanted.keys() - tensors.keys()]
    problems += [f"{name} is left over" for name in tensors.keys() - wanted.keys()]
    problems += [f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(wanted[name])}"
                 for name in wanted.keys() & tensors.keys() if tensors[name].shape != wanted[name]]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError(f"{folder} does not fit its config.json: {'; '.join(sorted(problems)[:5])}{more}")
    module.load_state_dict({name: tensor.to(device, dtype) for name, tensor in tensors.items()}, assign=True)


def write(folder: str | Path, config: dict, tensors: dict[str, torch.Tensor], files=()) -> None:
    """A model folder: config.json comes last, so that a folder with one is whole."""
    folder = Path(folder)
    (folder / "config.json").unlink(missing_ok=True)
    for path in map(Path, files):
        with atomic_write(folder / path.name) as beside:
            shutil.copyfile(path, beside)
    write_tensors(folder, tensors)
    write_json(folder / "config.json", config, indent=2)


def fingerprint(folder: Path) -> str:
    """Names the weights of a model folder by what is in them, here and there: enough to see that they are others."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        size = path.stat().st_size
        with open(path, "rb") as file:
            for part in range(64):  # evenly over the file, its last bytes too
                file.seek(max(0, size - 4096) * part // 63)
                digest.update(file.read(4096))
    return digest.hexdigest()[:12]


SHARD = 5_000_000_000  # bytes of the largest file


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """model.safetensors, or, above 5 GB, model-00001-of-00003.safetensors and so on with their index."""
    shards, size = [[]], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD:
            shards, size = [*shards, []], 0
        shards[-1].append(name)
        size += tensor.nbytes
    one = len(shards) == 1
    file_of = {name: "model.safetensors" if one else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
               for number, names in enumerate(shards, 1) for name in names}
    for names in shards:
        with atomic_write(folder / file_of[names[0]]) as beside:
            shard = {name: tensors[name].detach().contiguous().cpu() for name in names}
            try:
                save_file(shard, beside, metadata={"format": "pt"})
            except SafetensorError as error:  # what it makes of a full disk
                raise OSError(str(error)) from error
    for stale in {*folder.glob("model*.safetensors")} - {folder / file for file in file_of.values()}:
        stale.unlink()
    index = folder / "model.safetensors.index.json"
    if one:
        index.unlink(missing_ok=True)
    else:
        write_json(index, {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
                           "weight_map": file_of}, indent=2)
