"""Reads and writes config.json of CLIP, LLaMA and LLaVA, as Hugging Face's transformers does.

transformers leaves out what equals its default, so the defaults here are those of transformers.
What nanollava does not implement (another activation, scaled rotary angles, biases) is refused.

`*_config` turn a config.json into the fields of a config dataclass; `*_json` are the way back.
"""

from pathlib import Path

from ..conversation import TEMPLATES
from ..infra.io import InputError, read_json

CLIP_DEFAULTS = dict(  # ViT-B/32
    image_size=224, patch_size=32, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
    num_attention_heads=12, layer_norm_eps=1e-5)
LLAMA_DEFAULTS = dict(  # LLaMA-7B
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=None, head_dim=None, rms_norm_eps=1e-6,
    rope_theta=10000.0, max_position_embeddings=2048)
LLAVA_VISION = dict(  # ViT-L/14-336, for a LLaVA whose config.json has no vision_config
    image_size=336, patch_size=14, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
    num_attention_heads=16)
PROJECTOR_OF_ACT = {"linear": "linear", "gelu": "mlp2x_gelu"}  # keys: projector_hidden_act
ACT_OF_PROJECTOR = {projector: act for act, projector in PROJECTOR_OF_ACT.items()}


def read_config(folder: str | Path, parse):
    """parse(content) of a folder's config.json; `vision_config`, for example, can be `parse`.

    Raises InputError if the file is missing, or with its name the InputError of `parse`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no model folder at {folder}")
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} is not a model folder: it has no config.json")
    raw = read_json(path)
    try:
        if not isinstance(raw, dict):
            raise InputError("not a JSON object")
        if raw.get("quantization_config"):
            raise InputError("quantized weights are not supported")
        return parse(raw)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


# ---------------------------------------------------------------------------------------------
# Checks: a model that would compute something else must not open


def section(raw: dict, key: str) -> dict:
    """An object inside a config; {} if it is absent or null."""
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise InputError(f"{key} {value!r} is not a JSON object")
    return value


def number(raw: dict, key: str, default):
    """A positive number in a config; `default` if it is absent or null."""
    value = default if raw.get(key) is None else raw[key]
    if value is not None and (type(value) not in (int, type(default)) or not value > 0):
        raise InputError(f"{key} {value!r} is not supported, only a number above zero")
    return value


def check_supported(raw: dict, key: str, supported, default=None) -> None:
    value = raw.get(key, default)
    if value not in supported:
        names = " or ".join(map(repr, supported))
        raise InputError(f"{key} {value!r} is not supported, only {names}")


def check_divisible(fields: dict, size: str, parts: str) -> None:
    if fields[parts] and fields[size] % fields[parts]:
        raise InputError(f"{size} {fields[size]} is not divisible by {parts} {fields[parts]}")


# ---------------------------------------------------------------------------------------------
# Reading


def vision_config(raw: dict) -> dict:
    """The fields of VisionConfig, from the config of a CLIP or of its vision tower alone."""
    if raw.get("model_type") == "clip":  # old files have vision_config_dict too, which wins
        raw = section(raw, "vision_config") | section(raw, "vision_config_dict")
    check_supported(raw, "model_type", ("clip_vision_model",), "clip_vision_model")
    check_supported(raw, "hidden_act", ("quick_gelu",), "quick_gelu")
    fields = {key: number(raw, key, default) for key, default in CLIP_DEFAULTS.items()}
    check_divisible(fields, "hidden_size", "num_attention_heads")
    return fields


def text_config(raw: dict) -> dict:
    """The fields of LlamaConfig, from the config of a LLaMA."""
    check_supported(raw, "model_type", ("llama",), "llama")
    check_supported(raw, "hidden_act", ("silu",), "silu")
    for key in ("attention_bias", "mlp_bias"):
        check_supported(raw, key, (False,), False)
    rope = section(raw, "rope_scaling") or section(raw, "rope_parameters")
    check_supported(rope, "rope_type", ("default",), rope.get("type", "default"))
    # transformers 4 keeps rope_theta at the top, transformers 5 in rope_parameters
    fields = {key: number(raw | rope, key, default) for key, default in LLAMA_DEFAULTS.items()}
    check_divisible(fields, "hidden_size", "num_attention_heads")
    check_divisible(fields, "num_attention_heads", "num_key_value_heads")
    return fields | {"tie_word_embeddings": bool(raw.get("tie_word_embeddings"))}


def llava_config(raw: dict) -> dict:
    """The fields of LlavaConfig, with `vision` and `text` as dicts.

    `projector` is a name; whether this version has such a projector is not checked here.
    """
    if "mm_vision_tower" in raw:
        raise InputError("the layout of the original LLaVA code is not supported, only that of the "
                         "llava-hf files")
    check_supported(raw, "model_type", ("llava", "nanollava"))
    check_supported(raw, "multimodal_projector_bias", (True,), True)
    check_supported(raw, "vision_feature_select_strategy", ("default",), "default")
    own = section(raw, "nanollava")
    check_supported(own, "template", TEMPLATES, "vicuna_v1")
    vision = vision_config(section(raw, "vision_config") or LLAVA_VISION)
    text = text_config(section(raw, "text_config"))
    text["vocab_size"] = number(own, "vocab_size", text["vocab_size"])
    text["tie_word_embeddings"] |= bool(raw.get("tie_word_embeddings"))
    image_token_id = number(raw, "image_token_id", number(raw, "image_token_index", 32000))
    return dict(
        vision=vision, text=text, projector=projector_name(raw),
        feature_layer=feature_layer(raw, vision["num_hidden_layers"]),
        image_token_id=image_token_id, template=own.get("template", "vicuna_v1"),
        stage=own.get("stage", 2))


def projector_name(raw: dict) -> str:
    if raw["model_type"] == "nanollava":
        name = section(raw, "nanollava").get("projector")
        if not isinstance(name, str):
            raise InputError(f"projector {name!r} in the section nanollava is not a name")
        return name
    check_supported(raw, "projector_hidden_act", PROJECTOR_OF_ACT, "gelu")
    return PROJECTOR_OF_ACT[raw.get("projector_hidden_act", "gelu")]


def feature_layer(raw: dict, layers: int) -> int:
    """vision_feature_layer counted from the end. In the file, 0 is the input of the first block."""
    layer = raw.get("vision_feature_layer", -2)
    if layer not in range(-layers - 1, layers + 1):
        raise InputError(f"vision_feature_layer {layer!r} is not supported, only one of the "
                         f"{layers} layers")
    return layer if layer < 0 else layer - layers - 1


# ---------------------------------------------------------------------------------------------
# Writing


def llama_json(text: dict) -> dict:
    """The config.json of `asdict(LlamaConfig)`."""
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "bos_token_id": 1, "eos_token_id": 2, **text}


def clip_json(vision: dict) -> dict:
    """The config.json of `asdict(VisionConfig)`."""
    return {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model",
            "hidden_act": "quick_gelu", **vision}


def llava_json(config: dict) -> dict:
    """The config.json of `asdict(LlavaConfig)`, as LlavaForConditionalGeneration reads it.

    The public layout names a projector by its activation, and knows two. For another one the
    model_type is "nanollava", so that other software refuses the folder instead of computing
    something else, and the section nanollava has the projector's name.
    """
    vision, text = config["vision"], config["text"]
    rows = max(text["vocab_size"], config["image_token_id"] + 1)  # see hf_format.add_image_row
    raw = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "image_token_index": config["image_token_id"],
        "image_seq_length": (vision["image_size"] // vision["patch_size"]) ** 2,
        "projector_hidden_act": ACT_OF_PROJECTOR.get(config["projector"]),
        "vision_feature_layer": config["feature_layer"],
        "vision_feature_select_strategy": "default",
        "vision_config": clip_json(vision),
        "text_config": llama_json({**text, "vocab_size": rows}),
        "nanollava": {"template": config["template"], "stage": config["stage"],
                      "vocab_size": text["vocab_size"]},  # what the public layout has no place for
    }
    if config["projector"] not in ACT_OF_PROJECTOR:
        raw |= {"architectures": ["NanoLlava"], "model_type": "nanollava"}
        raw["nanollava"]["projector"] = config["projector"]
        del raw["projector_hidden_act"], raw["image_seq_length"]
    return raw
