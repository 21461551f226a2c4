import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanollava import Llava
from nanollava.infra.io import InputError
from nanollava.llama import Llama, LlamaConfig
from nanollava.llava import LlavaConfig
from nanollava.vision import VisionConfig, VisionTower
from nanollava.weights import hf_format


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def rewrite(folder, change):
    """Change the tensors of a folder in place: `change` takes and gives a dict."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def test_a_run_has_the_public_layout(folder, model):
    names = set(load_file(folder / "model.safetensors"))
    assert {"vision_tower.vision_model.embeddings.class_embedding", "vision_tower.vision_model.pre_layrnorm.weight",
            "multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_2.bias",
            "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"} <= names
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["projector_hidden_act"] == "linear" and config["image_token_index"] == model.config.image_token_id


def test_a_big_model_is_written_in_shards_with_an_index(folder, model, monkeypatch):
    monkeypatch.setattr(hf_format, "SHARD", 30_000)
    model.save_pretrained(folder)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    written = {name: shard for shard in shards for name in load_file(folder / shard)}
    assert index["weight_map"] == written
    assert index["metadata"]["total_size"] == sum(t.nbytes for s in shards for t in load_file(folder / s).values())
    again = Llava.from_pretrained(folder).state_dict()
    assert all(again[name].equal(tensor) for name, tensor in model.state_dict().items())
    monkeypatch.undo()
    model.save_pretrained(folder)  # small again: nothing of the shards stays behind
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("generation", [
    lambda name: name,
    lambda name: name.replace("vision_tower.vision_model.", "vision_tower."),
    lambda name: "lm_head.weight" if name == "language_model.lm_head.weight" else
                 "model." + name.replace("vision_model.", "").replace("language_model.model.", "language_model."),
])
def test_three_generations_of_names_are_read(folder, model, generation):
    old = {"vision_tower.vision_model.embeddings.position_ids": torch.arange(17),  # these two are passed over
           "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    rewrite(folder, lambda tensors: {generation(name): tensor for name, tensor in (tensors | old).items()})
    for name, tensor in Llava.from_pretrained(folder).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("change, image_error", [
    (lambda tensors: {k: t for k, t in tensors.items() if "lm_head" not in k}, "lm_head.weight is missing"),
    (lambda tensors: tensors | {"extra": torch.zeros(1)}, "extra is left over"),
    (lambda tensors: tensors | {"language_model.model.norm.weight": torch.zeros(5)},
     r"norm.weight has shape \(5,\), not \(32,\)"),
    (lambda tensors: tensors | {"multi_modal_projector.linear_2.bias": torch.ones(32)},
     "only where .*linear_2.* is an identity"),
])
def test_tensors_that_do_not_fit_are_named(folder, change, image_error):
    rewrite(folder, change)
    with pytest.raises(InputError, match=image_error):
        Llava.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_of_any_precision_is_read(model, tmp_path, dtype):
    model.to(dtype).save_pretrained(tmp_path / "run")
    assert load_file(tmp_path / "run" / "model.safetensors")["language_model.lm_head.weight"].dtype == dtype
    for name, tensor in Llava.from_pretrained(tmp_path / "run").state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, model.state_dict()[name].float())


def change_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) and key in config else value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("change, image_error", [
    ({"model_type": "bert"}, "model_type 'bert' is not supported, only 'llava'"),
    ({"text_config": {"model_type": "mistral"}}, "model_type 'mistral' is not supported, only 'llama'"),
    ({"vision_config": {"model_type": "siglip_vision_model"}}, "model_type 'siglip_vision_model' is not supported"),
    ({"mm_vision_tower": "openai/clip-vit-large-patch14"}, "the layout of the original LLaVA code is not supported"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantized weights are not supported"),
    ({"text_config": {"rope_scaling": {"type": "linear", "factor": 2}}}, "rope_type 'linear' is not supported"),
    ({"text_config": {"rope_parameters": {"rope_type": "yarn"}}}, "rope_type 'yarn' is not supported"),
    ({"text_config": {"hidden_act": "gelu"}}, "hidden_act 'gelu' is not supported, only 'silu'"),
    ({"text_config": {"attention_bias": True}}, "attention_bias True is not supported"),
    ({"vision_config": {"hidden_act": "gelu"}}, "hidden_act 'gelu' is not supported, only 'quick_gelu'"),
    ({"vision_config": {"image_size": [32, 32]}}, r"image_size \[32, 32\] is not supported"),
    ({"projector_hidden_act": "relu"}, "projector_hidden_act 'relu' is not supported, only 'gelu' or 'linear'"),
    ({"multimodal_projector_bias": False}, "multimodal_projector_bias False is not supported"),
    ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy 'full' is not supported"),
    ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer \[-2, -5\] is not supported, only one of the 2 layers"),
    ({"nanollava": {"template": "v9"}}, "template 'v9' is not supported"),
    ({"text_config": {"num_attention_heads": 5}}, "hidden_size 32 cannot be divided by num_attention_heads 5"),
    ({"text_config": {"num_key_value_heads": 3}}, "num_attention_heads 4 cannot be divided by num_key_value_heads 3"),
    ({"text_config": {"hidden_size": "32"}}, "hidden_size '32' is not supported, only a number above zero"),
    ({"text_config": 3}, "text_config 3 is not a JSON object"),
])
def test_what_is_not_supported_is_refused_by_name(folder, change, image_error):
    change_config(folder, change)
    with pytest.raises(InputError, match=f"config.json: {image_error}"):
        Llava.from_pretrained(folder)


CLIP_336 = dict(model_type="clip", projection_dim=768, text_config=dict(hidden_size=768, model_type="clip_text_model"),
                vision_config=dict(hidden_size=1024, image_size=336, intermediate_size=4096, num_hidden_layers=24,
                                   num_attention_heads=16, patch_size=14, model_type="clip_vision_model"))
LLAMA_13B = dict(hidden_size=5120, intermediate_size=13824, max_position_embeddings=4096, model_type="llama",
                 num_attention_heads=40, num_hidden_layers=40, num_key_value_heads=40, rms_norm_eps=1e-5)
PUBLIC = {  # what the published config.json says of the network (much is left out), and how many weights it has
    "openai/clip-vit-large-patch14": (CLIP_336 | dict(vision_config=CLIP_336["vision_config"] | dict(image_size=224)),
                                      303_179_776),
    "openai/clip-vit-large-patch14-336": (CLIP_336, 303_507_456),
    "lmsys/vicuna-7b-v1.3": (
        dict(hidden_act="silu", hidden_size=4096, intermediate_size=11008, max_position_embeddings=2048,
             model_type="llama", num_attention_heads=32, num_hidden_layers=32, rms_norm_eps=1e-6,
             tie_word_embeddings=False, vocab_size=32000), 6_738_415_616),
    "meta-llama/Llama-2-13b-hf": (
        LLAMA_13B | dict(hidden_act="silu", pretraining_tp=1, rope_scaling=None, vocab_size=32000), 13_015_864_320),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (
        dict(attention_bias=False, hidden_act="silu", hidden_size=2048, intermediate_size=5632, model_type="llama",
             max_position_embeddings=2048, num_attention_heads=32, num_hidden_layers=22, num_key_value_heads=4,
             rms_norm_eps=1e-5, rope_scaling=None, rope_theta=10000.0, vocab_size=32000), 1_100_048_384),
    "llava-hf/llava-1.5-7b-hf": (
        dict(model_type="llava", image_token_index=32000, projector_hidden_act="gelu", tie_word_embeddings=False,
             text_config=dict(model_type="llama", max_position_embeddings=4096, rms_norm_eps=1e-5, vocab_size=32064),
             vision_config=CLIP_336["vision_config"] | dict(vocab_size=32000)), 7_063_427_072),
    "llava-hf/llava-1.5-13b-hf": (
        dict(model_type="llava", image_token_index=32000, projector_hidden_act="gelu",
             text_config=LLAMA_13B | dict(vocab_size=32064), vision_config=CLIP_336["vision_config"]), 13_351_494_656),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_config_makes_a_network_of_the_published_size(tmp_path, name):
    raw, weights = PUBLIC[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with torch.device("meta"):  # no memory is taken
        if raw["model_type"] == "llava":
            fields = hf_format.read_config(tmp_path, hf_format.llava_config)
            parts = {"vision": VisionConfig(**fields["vision"]), "text": LlamaConfig(**fields["text"])}
            network = Llava(LlavaConfig(**fields | parts))
        elif raw["model_type"] == "clip":
            network = VisionTower(VisionConfig(**hf_format.read_config(tmp_path, hf_format.vision_config)))
        else:
            network = Llama(LlamaConfig(**hf_format.read_config(tmp_path, hf_format.text_config)))
    assert sum(parameter.numel() for parameter in network.parameters()) == weights


def test_what_a_config_leaves_out_is_transformers_default():
    fields = hf_format.llava_config({"model_type": "llava"})
    assert fields["vision"] == vars(VisionConfig(image_size=336)) and LlamaConfig(**fields["text"]) == LlamaConfig()
    rest = {key: value for key, value in fields.items() if key not in ("vision", "text")}
    assert rest == dict(projector="mlp2x_gelu", feature_layer=-2, image_token_id=32000, template="vicuna_v1", stage=2)
    assert hf_format.vision_config({"model_type": "clip"})["patch_size"] == 32  # a CLIP's own default is ViT-B/32


@pytest.mark.parametrize("config", [
    {"rope_theta": 5e5}, {"rope_theta": 500000, "rope_scaling": None},
    {"rope_scaling": {"type": "default"}, "rope_theta": 5e5},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 10000.0},
])
def test_the_base_of_the_rotary_angles_stands_where_it_likes(config):
    assert hf_format.text_config(config)["rope_theta"] == 5e5


@pytest.mark.parametrize("where", [{"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}])
def test_tied_embeddings_may_be_told_in_two_places_and_stand_in_the_file_twice(folder, where):
    change_config(folder, where)
    head, embeddings = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    with pytest.raises(InputError, match="lm_head.weight is left over"):  # it is another
        Llava.from_pretrained(folder)
    rewrite(folder, lambda tensors: tensors | {head: tensors[embeddings].clone()})
    assert Llava.from_pretrained(folder).language_model.lm_head is None
    rewrite(folder, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != head})
    assert Llava.from_pretrained(folder).language_model.lm_head is None


def test_a_stray_file_is_not_read(folder, model):
    save_file({"language_model.lm_head.weight": torch.zeros(3)}, folder / "adapter_model.safetensors")
    assert torch.equal(Llava.from_pretrained(folder).language_model.lm_head.weight, model.language_model.lm_head.weight)


def test_shards_that_are_not_whole_are_told(folder, model, monkeypatch):
    monkeypatch.setattr(hf_format, "SHARD", 30_000)
    model.save_pretrained(folder)
    last = sorted(folder.glob("*.safetensors"))[-1]
    index, whole = folder / "model.safetensors.index.json", last.read_bytes()
    for broken in (whole[:-100], whole[:5], b"<html>" + whole):
        last.write_bytes(broken)
        with pytest.raises(InputError, match=f"{last.name} is not a whole safetensors file"):
            Llava.from_pretrained(folder)
    last.unlink()
    with pytest.raises(InputError, match=f"{last.name} is missing, though model.safetensors.index.json names it"):
        Llava.from_pretrained(folder)
    for nonsense in ("[]", "{}", '{"weight_map": {"a": 1}}'):
        index.write_text(nonsense)
        with pytest.raises(InputError, match="index.json is no index"):
            Llava.from_pretrained(folder)
    index.unlink()
    with pytest.raises(InputError, match="holds neither model.safetensors nor model.safetensors.index.json"):
        Llava.from_pretrained(folder)


def test_folders_that_hold_no_model_are_told(tmp_path, folder):
    with pytest.raises(InputError, match="no model folder at .*nowhere"):
        Llava.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no model: it has no config.json"):
        Llava.from_pretrained(tmp_path)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(InputError, match="model.safetensors is not a whole safetensors file"):
        Llava.from_pretrained(folder)


def test_parts_get_a_fresh_projector_between_them(model, tmp_path, tokenizer):
    clip, llama = tmp_path / "clip", tmp_path / "llama"
    vision = {f"vision_model.{name}": tensor for name, tensor in model.vision_tower.state_dict().items()}
    beside = {name: torch.ones(1) for name in ("logit_scale", "text_model.final_layer_norm.bias",
                                               "visual_projection.weight", "vision_model.embeddings.position_ids")}
    hf_format.write(clip, hf_format.clip_json(vars(model.config.vision)), vision | beside)
    text = model.language_model.state_dict() | {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    hf_format.write(llama, hf_format.llama_json(vars(model.config.text)), text, [tokenizer.path])
    whole = Llava.from_parts(clip, llama)
    assert whole.config == model.config
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(whole.vision_tower(images), model.vision_tower(images))
    assert torch.equal(whole.language_model.lm_head.weight, model.language_model.lm_head.weight)
    assert not torch.equal(whole.multi_modal_projector.linear_1.weight, model.multi_modal_projector.linear_1.weight)
    with pytest.raises(InputError, match="clip/config.json: model_type 'clip_vision_model' is not supported"):
        Llava.from_parts(clip, clip)
