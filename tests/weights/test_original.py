"""LLaVAs of the original code, https://github.com/haotian-liu/LLaVA: liuhaotian/llava-v1.5-7b.

tests/test_golden.py compares the logits of one with those of transformers.
"""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from nanollava import Llava, chat
from nanollava.image import preprocess
from nanollava.infra.io import InputError
from nanollava.llava import LlavaConfig
from nanollava.weights import hf_config, hf_format
from tests.conftest import original_config, original_name, save_original

# KEYS_TO_MODIFY_MAPPING of transformers' convert_llava_weights_to_hf.py: to the llava-hf layout
CONVERTER = {
    "model.vision_tower.": "", ".vision_resampler": "",
    "model.mm_projector": "multi_modal_projector", "model": "model.model",
    "vision_model.model": "vision_model", "lm_head": "language_model.lm_head",
    "model.model": "language_model.model",
    "multi_modal_projector.0": "multi_modal_projector.linear_1",
    "multi_modal_projector.2": "multi_modal_projector.linear_2"}


def convert(name: str) -> str:
    for old, new in CONVERTER.items():
        name = name.replace(old, new)
    return name


def test_names_are_those_that_transformers_converts_to(config):
    config.projector = "mlp2x_gelu"
    with torch.device("meta"):
        ours = Llava(config).state_dict()
    for name in ours:
        original = original_name(name)
        assert hf_format.llava_name(original) == hf_format.llava_name(convert(original)) == name
    # a linear projector, which the converter does not know
    assert hf_format.llava_name("model.mm_projector.bias") == "multi_modal_projector.linear_1.bias"


def test_fields_of_llava_15():
    """The public config.json, as far as it describes the network."""
    raw = {
        "hidden_act": "silu", "hidden_size": 4096, "image_aspect_ratio": "pad",
        "intermediate_size": 11008, "max_length": 4096, "max_position_embeddings": 4096,
        "mm_hidden_size": 1024, "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None,
        "mm_use_im_patch_token": False, "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336", "model_type": "llava",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "tie_word_embeddings": False, "tune_mm_mlp_adapter": False, "vocab_size": 32000}
    public = {"model_type": "llava", "text_config": {
        "model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "num_key_value_heads": 32}}
    expected = hf_config.llava_config(public) | {"image_aspect_ratio": "pad"}
    assert hf_config.llava_config(raw) == expected
    paper = raw | {"mm_vision_tower": "/home/me/clip-vit-large-patch14/", "mm_projector_type": None,
                   "image_aspect_ratio": None}
    fields = hf_config.llava_config(paper)
    assert (fields["vision"]["image_size"], fields["projector"]) == (224, "linear")
    assert fields["image_aspect_ratio"] == "square"


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
def test_opened_model_is_saved_in_our_layout(config, clip, tmp_path, projector):
    config.projector = projector
    torch.manual_seed(0)
    model = Llava(config)
    folder = save_original(tmp_path / "original", model)
    opened = Llava.from_pretrained(folder, vision_tower=clip)
    assert opened.config.image_aspect_ratio == "pad"
    opened.save_pretrained(tmp_path / "run")
    for again in (opened, Llava.from_pretrained(tmp_path / "run")):
        assert again.config == opened.config
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name


def test_vision_tower_inside_the_weights(model, clip, tmp_path, monkeypatch):
    folder = save_original(tmp_path / "original", model, tower=True)
    with pytest.raises(InputError, match="only the name of its vision tower, 'openai/clip-tiny'; "
                                         "give the folder .* --vision-tower"):
        Llava.from_pretrained(folder)
    tensors = load_file(clip / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, clip / "model.safetensors")
    by_flag = Llava.from_pretrained(folder, vision_tower=clip)  # which tells the sizes alone
    monkeypatch.setitem(hf_config.ORIGINAL_TOWERS, "clip-tiny", vars(model.config.vision))
    for opened in (by_flag, Llava.from_pretrained(folder)):
        for name, tensor in model.vision_tower.state_dict().items():
            assert torch.equal(opened.vision_tower.state_dict()[name], tensor), name
    with pytest.raises(InputError, match="--vision-tower has no effect on .*its weights include"):
        Llava.from_pretrained(folder, vision_tower=clip)


def test_vision_tower_is_missing_or_another(original, clip, model, monkeypatch):
    vision = vars(model.config.vision)
    monkeypatch.setitem(hf_config.ORIGINAL_TOWERS, "clip-tiny", vision)
    with pytest.raises(InputError, match="does not hold its vision tower, 'openai/clip-tiny': give "
                                         "the folder of this CLIP with --vision-tower"):
        Llava.from_pretrained(original)
    monkeypatch.setitem(hf_config.ORIGINAL_TOWERS, "clip-tiny", vision | {"image_size": 64})
    with pytest.raises(InputError, match="its vision tower is 'openai/clip-tiny', not "
                                         "--vision-tower, whose image_size is 32 in place of 64"):
        Llava.from_pretrained(original, vision_tower=clip)
    with pytest.raises(InputError, match="no model folder at .*nowhere"):
        Llava.from_pretrained(original, vision_tower=clip / "nowhere")


def test_public_layout_needs_no_vision_tower(folder, clip):
    with pytest.raises(InputError, match="config.json: --vision-tower has no effect on this LLaVA"):
        Llava.from_pretrained(folder, vision_tower=clip)


def test_fields_of_the_original_code_may_be_left_in_the_public_layout(folder, change_config, model):
    change_config({"mm_vision_tower": "openai/clip", "image_aspect_ratio": "anyres"})
    assert Llava.from_pretrained(folder).config == model.config


@pytest.mark.parametrize("change, message", [
    ({"model_type": "llava_mistral"},
     "model_type 'llava_mistral' is not supported, only 'llava' or 'llava_llama'"),
    ({"image_aspect_ratio": "anyres"},
     "image_aspect_ratio 'anyres' is not supported, only 'square' or 'pad'"),
    ({"mm_patch_merge_type": "spatial_unpad"},
     "mm_patch_merge_type 'spatial_unpad' is not supported, only 'flat'"),
    ({"mm_use_im_start_end": True}, "mm_use_im_start_end true is not supported, only false"),
    ({"mm_vision_select_feature": "cls_patch"},
     "mm_vision_select_feature 'cls_patch' is not supported, only 'patch'"),
    ({"mm_resampler_type": "perceiver"}, "mm_resampler_type 'perceiver' is not supported"),
    ({"s2": True}, "s2 true is not supported"),
    ({"mm_projector_type": "mlp3x_gelu"}, "projector 'mlp3x_gelu' is unknown"),
    ({"mm_vision_select_layer": -5}, "mm_vision_select_layer -5 is not supported, only one of"),
    ({"mm_vision_select_layer": None}, "it has no 'mm_vision_select_layer'"),
    ({"mm_vision_tower": ["a"]}, "mm_vision_tower must be a string, not a list of 1"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type 'linear' is not supported"),
    ({"quantization_config": {"bits": 4}}, "quantized weights are not supported"),
])
def test_unsupported_field_is_refused_by_name(original, clip, config, change, message):
    (original / "config.json").write_text(json.dumps(original_config(config, **change)))
    with pytest.raises(InputError, match=f"config.json: {message}"):
        Llava.from_pretrained(original, vision_tower=clip)


@pytest.mark.parametrize("files, message", [
    (["pytorch_model-00001-of-00002.bin", "mm_projector.bin"], "pickles, which can run code and are"
     " not opened; `python prepare_data.py weights` downloads and converts"),
    (["mm_projector.bin"], "mm_projector.bin is the projector alone, after stage 1 of the original "
     "LLaVA code; train stage 1 here"),
    (["adapter_config.json", "adapter_model.bin", "non_lora_trainables.bin"],
     "it is a LoRA adapter; merge it into its base model"),
])
def test_folder_that_is_no_model_is_refused_with_what_to_do(original, clip, files, message):
    (original / "model.safetensors").unlink()
    for name in files:
        (original / name).write_bytes(b"never read")
    for vision_tower in (clip, None):  # a tower would not help
        with pytest.raises(InputError, match=message):
            Llava.from_pretrained(original, vision_tower=vision_tower)
    (original / "config.json").unlink()
    with pytest.raises(InputError, match=message):
        Llava.from_pretrained(original, vision_tower=clip)


def test_delta_is_refused(original, clip):
    path = original / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] -= 1  # the untrained LLaMA's
    save_file(tensors, path)
    with pytest.raises(InputError, match="is a delta: its weights are differences to"):
        Llava.from_pretrained(original, vision_tower=clip)


# ---------------------------------------------------------------------------------------------
# Images are padded


def test_pad_decides_about_the_pixels(config):
    image = Image.linear_gradient("L").resize((90, 40))
    assert torch.equal(config.preprocess(image), preprocess(image, 32))
    config.image_aspect_ratio = "pad"
    assert torch.equal(config.preprocess(image), preprocess(image, 32, pad=True))
    assert not torch.equal(preprocess(image, 32), preprocess(image, 32, pad=True))


def test_pad_is_kept_in_the_files(config, tokenizer, tmp_path):
    config.image_aspect_ratio = "pad"
    Llava(config).save_pretrained(tmp_path, [tokenizer.path])
    assert hf_config.read_config(tmp_path, LlavaConfig.from_json) == config
    sizes = json.loads((tmp_path / "preprocessor_config.json").read_text())
    # transformers' LlavaImageProcessor pads, and is CLIP's otherwise (tests/golden/pixels.npz)
    assert sizes["image_processor_type"] == "LlavaImageProcessor" and sizes["do_pad"] is True


def test_unknown_pad_is_refused(config):
    raw = hf_config.llava_json(asdict(config) | {"image_aspect_ratio": "anyres"})
    with pytest.raises(InputError, match="image_aspect_ratio 'anyres' is not supported"):
        hf_config.llava_config(raw)


def test_pixels_of_a_model_are_made_in_one_place():
    """A caller of image.py's functions could forget to pad. The toy CLIP is no LLaVA."""
    package = Path(chat.__file__).parent
    call = re.compile(r"(?<!def )(?<!config\.)\b(preprocess|resize_and_crop)\(")
    callers = {path.name for path in (*package.glob("**/*.py"), *package.parent.glob("*.py"))
               if call.search(path.read_text())}
    assert callers == {"image.py", "llava.py", "clip.py"}
