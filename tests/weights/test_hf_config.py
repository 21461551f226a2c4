import json
from dataclasses import asdict

import pytest
import torch

from nanollava import Llava
from nanollava.infra.io import InputError
from nanollava.llama import Llama, LlamaConfig
from nanollava.llava import LlavaConfig
from nanollava.vision import VisionConfig, VisionTower
from nanollava.weights import hf_config


@pytest.mark.parametrize("change, message", [
    ({"model_type": "bert"}, "model_type 'bert' is not supported, only 'llava' or 'nanollava'"),
    ({"text_config": {"model_type": "mistral"}},
     "model_type 'mistral' is not supported, only 'llama'"),
    ({"vision_config": {"model_type": "siglip_vision_model"}},
     "model_type 'siglip_vision_model' is not supported"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantized weights are not supported"),
    ({"text_config": {"rope_scaling": {"type": "linear", "factor": 2}}},
     "rope_type 'linear' is not supported"),
    ({"text_config": {"rope_parameters": {"rope_type": "yarn"}}},
     "rope_type 'yarn' is not supported"),
    ({"text_config": {"hidden_act": "gelu"}}, "hidden_act 'gelu' is not supported, only 'silu'"),
    ({"text_config": {"attention_bias": True}}, "attention_bias true is not supported"),
    ({"vision_config": {"hidden_act": "gelu"}},
     "hidden_act 'gelu' is not supported, only 'quick_gelu'"),
    ({"vision_config": {"num_channels": 1}}, "num_channels 1 is not supported, only 3"),
    ({"vision_config": {"image_size": [32, 32]}},
     "vision_config.image_size must be an integer from 1 to 16777215, not a list of 2"),
    ({"vision_config": {"patch_size": 33}}, "patch_size 33 is larger than image_size 32"),
    ({"projector_hidden_act": "relu"},
     "projector_hidden_act 'relu' is not supported, only 'linear' or 'gelu'"),
    ({"multimodal_projector_bias": False},
     "multimodal_projector_bias false is not supported, only true"),
    ({"vision_feature_select_strategy": "full"},
     "vision_feature_select_strategy 'full' is not supported"),
    ({"vision_feature_layer": [-2, -5]},
     "vision_feature_layer must be an integer, not a list of 2"),
    ({"vision_feature_layer": -4},
     "vision_feature_layer -4 is not supported, only one of the 2 lay"),
    ({"nanollava": {"template": "v9"}}, "template 'v9' is not supported"),
    ({"nanollava": {"image_aspect_ratio": "anyres"}},
     "image_aspect_ratio 'anyres' is not supported, only 'square' or 'pad'"),
    ({"model_type": "nanollava"}, "nanollava has no 'projector'"),
    ({"text_config": {"num_attention_heads": 5}},
     "hidden_size 32 is not divisible by num_attention_heads 5"),
    ({"text_config": {"num_key_value_heads": 3}},
     "num_attention_heads 4 is not divisible by num_key_value_heads 3"),
    ({"text_config": {"hidden_size": "32"}},
     "text_config.hidden_size must be an integer from 1 to 16777215, not '32'"),
    ({"text_config": {"head_dim": 5}}, "head_dim 5 is odd"),
    ({"text_config": {"num_hidden_layers": 10**6}},
     "text_config.*num_hidden_layers must be an integer from 1"),
    ({"text_config": {"rms_norm_eps": float("inf")}},
     "text_config.*rms_norm_eps must be a number from 1e-30 to"),
    ({"text_config": {"rope_parameters": {"rope_theta": 0}}},
     "text_config.*rope_theta must be a number from 1"),
    ({"text_config": {"tie_word_embeddings": "false"}},
     "text_config.*must be true or false, not 'false'"),
    ({"text_config": 3}, "text_config must be an object, not 3"),
])
def test_unsupported_field_is_refused_by_name(folder, change_config, change, message):
    change_config(change)
    with pytest.raises(InputError, match=f"config.json: {message}"):
        Llava.from_pretrained(folder)


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="no model folder at .*nowhere"):
        Llava.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is not a model folder: it has no config.json"):
        Llava.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="config.json: it must be an object, not a list of 0"):
        Llava.from_pretrained(tmp_path)


CLIP_336 = dict(
    model_type="clip", projection_dim=768,
    text_config=dict(hidden_size=768, model_type="clip_text_model"),
    vision_config=dict(hidden_size=1024, image_size=336, intermediate_size=4096,
                       num_hidden_layers=24, num_attention_heads=16, patch_size=14,
                       model_type="clip_vision_model"))
CLIP_224 = CLIP_336 | dict(vision_config=CLIP_336["vision_config"] | dict(image_size=224))
LLAMA_13B = dict(
    hidden_size=5120, intermediate_size=13824, max_position_embeddings=4096, model_type="llama",
    num_attention_heads=40, num_hidden_layers=40, num_key_value_heads=40, rms_norm_eps=1e-5)
PUBLIC = {  # the published config.json, as far as it describes the network, and its parameters
    "openai/clip-vit-large-patch14": (CLIP_224, 303_179_776),
    "openai/clip-vit-large-patch14-336": (CLIP_336, 303_507_456),
    "lmsys/vicuna-7b-v1.3": (
        dict(hidden_act="silu", hidden_size=4096, intermediate_size=11008,
             max_position_embeddings=2048, model_type="llama", num_attention_heads=32,
             num_hidden_layers=32, rms_norm_eps=1e-6, tie_word_embeddings=False,
             vocab_size=32000), 6_738_415_616),
    "meta-llama/Llama-2-13b-hf": (
        LLAMA_13B | dict(hidden_act="silu", pretraining_tp=1, rope_scaling=None, vocab_size=32000),
        13_015_864_320),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (
        dict(attention_bias=False, hidden_act="silu", hidden_size=2048, intermediate_size=5632,
             model_type="llama", max_position_embeddings=2048, num_attention_heads=32,
             num_hidden_layers=22, num_key_value_heads=4, rms_norm_eps=1e-5, rope_scaling=None,
             rope_theta=10000.0, vocab_size=32000), 1_100_048_384),
    "llava-hf/llava-1.5-7b-hf": (
        dict(model_type="llava", image_token_index=32000, projector_hidden_act="gelu",
             tie_word_embeddings=False,
             text_config=dict(model_type="llama", max_position_embeddings=4096,
                              rms_norm_eps=1e-5, vocab_size=32064),
             vision_config=CLIP_336["vision_config"] | dict(vocab_size=32000)), 7_063_427_072),
    "llava-hf/llava-1.5-13b-hf": (
        dict(model_type="llava", image_token_index=32000, projector_hidden_act="gelu",
             text_config=LLAMA_13B | dict(vocab_size=32064),
             vision_config=CLIP_336["vision_config"]), 13_351_494_656),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_config_gives_the_published_number_of_parameters(tmp_path, name):
    raw, parameters = PUBLIC[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with torch.device("meta"):  # takes no memory
        if raw["model_type"] == "llava":
            network = Llava(hf_config.read_config(tmp_path, LlavaConfig.from_json))
        elif raw["model_type"] == "clip":
            fields = hf_config.read_config(tmp_path, hf_config.vision_config)
            network = VisionTower(VisionConfig(**fields))
        else:
            fields = hf_config.read_config(tmp_path, hf_config.text_config)
            network = Llama(LlamaConfig(**fields))
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_missing_fields_have_the_defaults_of_transformers():
    fields = hf_config.llava_config({"model_type": "llava"})
    assert fields["vision"] == vars(VisionConfig(image_size=336))
    assert LlamaConfig(**fields["text"]) == LlamaConfig()
    rest = {key: value for key, value in fields.items() if key not in ("vision", "text")}
    assert rest == dict(projector="mlp2x_gelu", feature_layer=-2, image_token_id=32000,
                        template="vicuna_v1", image_aspect_ratio="square", stage=2)
    # alone, a CLIP's default is ViT-B/32
    assert hf_config.vision_config({"model_type": "clip"})["patch_size"] == 32


@pytest.mark.parametrize("config", [
    {"rope_theta": 5e5},
    {"rope_theta": 500000, "rope_scaling": None},
    {"rope_scaling": {"type": "default"}, "rope_theta": 5e5},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 10000.0},
])
def test_rope_theta_is_found_at_every_place(config):
    assert hf_config.text_config(config)["rope_theta"] == 5e5


@pytest.mark.parametrize("in_file, from_end", [(-2, -2), (-1, -1), (2, -1), (1, -2), (0, -3)])
def test_feature_layer_is_counted_from_the_end(in_file, from_end):
    raw = {"model_type": "llava", "vision_config": {"num_hidden_layers": 2}}
    fields = hf_config.llava_config(raw | {"vision_feature_layer": in_file})
    assert fields["feature_layer"] == from_end


@pytest.mark.parametrize("projector, hidden_act", [("linear", "linear"), ("mlp2x_gelu", "gelu")])
def test_public_projectors_are_written_by_their_activation(config, projector, hidden_act):
    config.projector, config.template, config.stage = projector, "v0", 1
    config.image_aspect_ratio = "pad"
    raw = hf_config.llava_json(asdict(config))
    assert raw["architectures"] == ["LlavaForConditionalGeneration"]
    assert raw["model_type"] == "llava" and raw["projector_hidden_act"] == hidden_act
    assert raw["nanollava"] == {"template": "v0", "image_aspect_ratio": "pad", "stage": 1,
                                "vocab_size": config.text.vocab_size}
    assert raw["image_seq_length"] == config.tokens_per_image
    assert raw["text_config"]["vocab_size"] == config.image_token_id + 1
    assert hf_config.llava_config(raw) == asdict(config)


def test_other_projectors_are_written_by_name_and_refused_elsewhere(config):
    fields = asdict(config) | {"projector": "pixel_shuffle"}
    raw = hf_config.llava_json(fields)
    assert raw["model_type"] == "nanollava" and raw["architectures"] == ["NanoLlava"]
    assert not raw.keys() & {"projector_hidden_act", "image_seq_length"}
    assert hf_config.llava_config(raw) == fields
