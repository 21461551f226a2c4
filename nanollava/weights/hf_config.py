"""Reads and writes config.json of CLIP, LLaMA and LLaVA, as Hugging Face's transformers does.

transformers leaves out what equals its default, so the defaults here are those of transformers.
What nanollava does not implement (another activation, scaled rotary angles, biases) is refused.
A LLaVA of the original code (https://github.com/haotian-liu/LLaVA), the layout of most fine-tunes,
has another config.json: a LLaMA's with fields mm_* in it, and only the name of its vision tower.

`*_config` turn a config.json into the fields of a config dataclass; `*_json` are the way back.
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from ..conversation import TEMPLATES
from ..infra.io import InputError
from ..infra.json_io import read_json
from ..infra.shapes import quote, shape_error

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
SIZE, EPS, THETA = range(1, 2**24), (1e-30, 1.0), (1.0, 1e12)  # what is possible at all
CLIP_SHAPE = {f"{key}?": SIZE for key in CLIP_DEFAULTS} | {
    "num_hidden_layers?": range(1, 1000), "layer_norm_eps?": EPS}
ROPE_SHAPE = {"rope_theta?": THETA, "rope_type?": str, "type?": str}
LLAMA_SHAPE = {f"{key}?": SIZE for key in LLAMA_DEFAULTS} | {
    "num_hidden_layers?": range(1, 1000), "rms_norm_eps?": EPS, "rope_theta?": THETA,
    "tie_word_embeddings?": bool, "rope_scaling?": ROPE_SHAPE, "rope_parameters?": ROPE_SHAPE}
NANOLLAVA_SHAPE = {"vocab_size?": SIZE, "template?": str, "projector?": str, "stage?": range(3),
                   "image_aspect_ratio?": str}
LLAVA_SHAPE = {
    "vision_config?": CLIP_SHAPE, "text_config?": LLAMA_SHAPE, "nanollava?": NANOLLAVA_SHAPE,
    "image_token_id?": SIZE, "image_token_index?": SIZE, "tie_word_embeddings?": bool,
    "projector_hidden_act?": str, "vision_feature_layer?": int}
PROJECTOR_OF_ACT = {"linear": "linear", "gelu": "mlp2x_gelu"}  # keys: projector_hidden_act
ACT_OF_PROJECTOR = {projector: act for act, projector in PROJECTOR_OF_ACT.items()}
ASPECT_RATIOS = ("square", "pad")  # crop an image to a square, or pad it; LLaVA-1.6 has "anyres"
ORIGINAL_SHAPE = LLAMA_SHAPE | {
    "mm_vision_tower": str, "mm_vision_select_layer": int, "mm_projector_type?": str}
ORIGINAL_SUPPORTED = {  # the first value is what a missing field means
    "model_type": ("llava", "llava_llama"), "mm_vision_select_feature": ("patch",),
    "image_aspect_ratio": ASPECT_RATIOS, "mm_patch_merge_type": ("flat",), "s2": (False,),
    "mm_resampler_type": (None,), "mm_use_im_start_end": (False,)}
ORIGINAL_TOWERS = {  # keys: mm_vision_tower, without the owner or the folder of another disk
    "clip-vit-large-patch14": LLAVA_VISION | {"image_size": 224},
    "clip-vit-large-patch14-336": LLAVA_VISION}


def read_config(folder: str | Path, parse):
    """parse(content) of a folder's config.json; `vision_config`, for example, can be `parse`.

    Raises InputError if the file is missing, or with its name the InputError of `parse`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no model folder at {folder}")
    path = folder / "config.json"
    if not path.is_file():
        reason = without_weights(folder.iterdir()) or "it has no config.json"
        raise InputError(f"{folder} is not a model folder: {reason}")
    raw = read_json(path, dict)
    try:
        if raw.get("quantization_config"):
            raise InputError("quantized weights are not supported")
        return parse(raw)
    except InputError as error:
        has_weights = any(folder.glob("*.safetensors"))  # else this may be the first to say
        reason = None if has_weights else without_weights(folder.iterdir())
        raise InputError(f"{path}: {error}" if reason is None else
                         f"{folder} is not a model folder: {reason}") from error


def without_weights(files: Iterable[Path | str]) -> str | None:
    """Why files that look like a model are none, and what to do; None if the reason is unknown."""
    names = {Path(file).name for file in files}
    if "adapter_config.json" in names:
        return ("it is a LoRA adapter; merge it into its base model with the software that made it "
                "(scripts/merge_lora_weights.py of the original LLaVA code, merge_and_unload of "
                "PEFT) and save that as safetensors")
    if any(name.startswith("pytorch_model") for name in names):
        return ("pytorch_model*.bin are pickles, which can run code and are not opened; `python "
                "prepare_data.py weights` downloads and converts them, or save them as safetensors")
    if "mm_projector.bin" in names:
        return ("mm_projector.bin is the projector alone, after stage 1 of the original LLaVA "
                "code; train stage 1 here (train.py --stage 1), or take a model after stage 2")


# ---------------------------------------------------------------------------------------------
# Checks: a model that would compute something else must not open


def check_fields(raw: dict, shape: dict) -> None:
    if error := shape_error(raw, shape):
        raise InputError(error)


def with_defaults(raw: dict, defaults: dict) -> dict:
    """The fields of a config; a field that is absent or null has its default."""
    return {key: default if raw.get(key) is None else raw[key]
            for key, default in defaults.items()}


def check_supported(raw: dict, key: str, supported, default=None) -> None:
    value = raw.get(key, default)
    if value not in supported:
        names = " or ".join(map(quote, supported))
        raise InputError(f"{key} {quote(value)} is not supported, only {names}")


def check_divisible(fields: dict, size: str, parts: str) -> None:
    if fields[parts] and fields[size] % fields[parts]:
        raise InputError(f"{size} {fields[size]} is not divisible by {parts} {fields[parts]}")


# ---------------------------------------------------------------------------------------------
# Reading


def vision_config(raw: dict) -> dict:
    """The fields of VisionConfig, from the config of a CLIP or of its vision tower alone."""
    if raw.get("model_type") == "clip":  # old files have vision_config_dict too, which wins
        check_fields(raw, {"vision_config?": dict, "vision_config_dict?": dict})
        raw = (raw.get("vision_config") or {}) | (raw.get("vision_config_dict") or {})
    check_fields(raw, CLIP_SHAPE)
    check_supported(raw, "model_type", ("clip_vision_model",), "clip_vision_model")
    check_supported(raw, "hidden_act", ("quick_gelu",), "quick_gelu")
    check_supported(raw, "num_channels", (3,), 3)
    fields = with_defaults(raw, CLIP_DEFAULTS)
    check_divisible(fields, "hidden_size", "num_attention_heads")
    if fields["patch_size"] > fields["image_size"]:
        raise InputError(f"patch_size {fields['patch_size']} is larger than image_size "
                         f"{fields['image_size']}")
    return fields


def text_config(raw: dict) -> dict:
    """The fields of LlamaConfig, from the config of a LLaMA."""
    check_fields(raw, LLAMA_SHAPE)
    check_supported(raw, "model_type", ("llama",), "llama")
    check_supported(raw, "hidden_act", ("silu",), "silu")
    for key in ("attention_bias", "mlp_bias"):
        check_supported(raw, key, (False,), False)
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    check_supported(rope, "rope_type", ("default",), rope.get("type", "default"))
    # transformers 4 keeps rope_theta at the top, transformers 5 in rope_parameters
    fields = with_defaults(raw | rope, LLAMA_DEFAULTS)
    check_divisible(fields, "hidden_size", "num_attention_heads")
    check_divisible(fields, "num_attention_heads", "num_key_value_heads")
    head_dim = fields["head_dim"] or fields["hidden_size"] // fields["num_attention_heads"]
    if head_dim % 2:
        raise InputError(f"head_dim {head_dim} is odd: rotary embeddings turn pairs of numbers")
    return fields | {"tie_word_embeddings": bool(raw.get("tie_word_embeddings"))}


def read_llava_config(folder: str | Path, parse, vision_tower: str | Path | None = None):
    """parse(content, tower) of a LLaVA's config.json; `tower` has the fields of the CLIP folder
    vision_tower."""
    tower = None if vision_tower is None else read_config(vision_tower, vision_config)
    return read_config(folder, partial(parse, tower=tower))


def llava_config(raw: dict, tower: dict | None = None) -> dict:
    """The fields of LlavaConfig, with `vision` and `text` as dicts.

    `projector` is a name; whether this version has such a projector is not checked here.
    tower: the fields of --vision-tower, for the layout of the original code.
    """
    if is_original(raw):
        return original_config(raw, tower)
    if tower is not None:
        raise InputError("--vision-tower has no effect on this LLaVA, which has its own")
    check_fields(raw, LLAVA_SHAPE)
    check_supported(raw, "model_type", ("llava", "nanollava"))
    check_supported(raw, "multimodal_projector_bias", (True,), True)
    check_supported(raw, "vision_feature_select_strategy", ("default",), "default")
    own = raw.get("nanollava") or {}
    check_supported(own, "template", TEMPLATES, "vicuna_v1")
    check_supported(own, "image_aspect_ratio", ASPECT_RATIOS, "square")
    vision = vision_config(raw.get("vision_config") or LLAVA_VISION)
    text = text_config(raw.get("text_config") or {})
    text["vocab_size"] = own.get("vocab_size") or text["vocab_size"]
    text["tie_word_embeddings"] |= bool(raw.get("tie_word_embeddings"))
    image_token_id = raw.get("image_token_id") or raw.get("image_token_index") or 32000
    return dict(
        vision=vision, text=text, projector=projector_name(raw),
        feature_layer=feature_layer(raw, "vision_feature_layer", vision["num_hidden_layers"]),
        image_token_id=image_token_id, template=own.get("template", "vicuna_v1"),
        image_aspect_ratio=own.get("image_aspect_ratio", "square"), stage=own.get("stage", 2))


def is_original(raw: dict) -> bool:
    """Whether a config.json is of the original code. Its mm_* fields may be left in another's."""
    return "mm_vision_tower" in raw and "text_config" not in raw


def original_config(raw: dict, tower: dict | None) -> dict:
    """`llava_config` of the original code's layout. Its image token is no part of the vocabulary,
    and its template is not in the file: LLaVA-1.5 and later were trained with vicuna_v1."""
    raw = {key: value for key, value in raw.items() if value is not None}
    check_fields(raw, ORIGINAL_SHAPE)
    for key, supported in ORIGINAL_SUPPORTED.items():
        check_supported(raw, key, supported, supported[0])
    text = text_config(raw | {"model_type": "llama"})
    vision = original_tower(raw["mm_vision_tower"], tower)
    return dict(
        vision=vision, text=text, projector=raw.get("mm_projector_type", "linear"),
        feature_layer=feature_layer(raw, "mm_vision_select_layer", vision["num_hidden_layers"]),
        image_token_id=text["vocab_size"], template="vicuna_v1",
        image_aspect_ratio=raw.get("image_aspect_ratio", "square"), stage=2)


def original_tower(name: str, tower: dict | None) -> dict:
    """The fields of VisionConfig, by the tower's name or from --vision-tower, which must agree."""
    known = ORIGINAL_TOWERS.get(tower_name(name))
    known = known and vision_config(known)
    if tower and known and tower != known:
        field = next(key for key in known if tower[key] != known[key])
        raise InputError(f"its vision tower is {quote(name)}, not --vision-tower, whose {field} is "
                         f"{tower[field]} in place of {known[field]}")
    if not tower and not known:
        raise InputError(f"it has only the name of its vision tower, {quote(name)}; give the "
                         "folder of this CLIP with --vision-tower")
    return tower or known


def tower_name(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def projector_name(raw: dict) -> str:
    if raw["model_type"] == "nanollava":
        check_fields(raw, {"nanollava": {"projector": str}})
        return raw["nanollava"]["projector"]
    check_supported(raw, "projector_hidden_act", PROJECTOR_OF_ACT, "gelu")
    return PROJECTOR_OF_ACT[raw.get("projector_hidden_act", "gelu")]


def feature_layer(raw: dict, key: str, layers: int) -> int:
    """raw[key] counted from the end. In the file, 0 is the input of the first block."""
    layer = -2 if raw.get(key) is None else raw[key]
    if layer not in range(-layers - 1, layers + 1):
        raise InputError(f"{key} {layer!r} is not supported, only one of the {layers} layers")
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
        "nanollava": {  # what the public layout has no place for
            "template": config["template"], "image_aspect_ratio": config["image_aspect_ratio"],
            "stage": config["stage"], "vocab_size": text["vocab_size"]},
    }
    if config["projector"] not in ACT_OF_PROJECTOR:
        raw |= {"architectures": ["NanoLlava"], "model_type": "nanollava"}
        raw["nanollava"]["projector"] = config["projector"]
        del raw["projector_hidden_act"], raw["image_seq_length"]
    return raw
