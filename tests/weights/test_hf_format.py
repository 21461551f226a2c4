import json

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file

from nanollava import Llava, llava
from nanollava.infra.io import InputError
from nanollava.weights import hf_config, hf_format

HEAD = "language_model.lm_head.weight"
EMBEDDINGS = "language_model.model.embed_tokens.weight"


def test_saved_folder_has_the_public_layout(folder, model):
    tensors = load_file(folder / "model.safetensors")
    assert {"vision_tower.vision_model.embeddings.class_embedding",
            "vision_tower.vision_model.pre_layrnorm.weight",
            "multi_modal_projector.linear_1.weight", HEAD, EMBEDDINGS} <= tensors.keys()
    assert torch.equal(tensors["multi_modal_projector.linear_2.weight"], torch.eye(32))
    assert torch.equal(tensors["multi_modal_projector.linear_2.bias"], torch.zeros(32))
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["projector_hidden_act"] == "linear"
    assert config["image_token_index"] == model.config.image_token_id


def test_image_token_has_the_row_of_the_unknown_token(folder, model):
    tensors = load_file(folder / "model.safetensors")
    for name in (HEAD, EMBEDDINGS):
        assert len(tensors[name]) == model.config.image_token_id + 1
        assert torch.equal(tensors[name][-1], tensors[name][0])
        assert len(Llava.from_pretrained(folder).state_dict()[name]) == model.config.text.vocab_size


@pytest.mark.parametrize("rename", [
    lambda name: name,
    lambda name: name.replace("vision_tower.vision_model.", "vision_tower."),
    lambda name: "lm_head.weight" if name == HEAD else
                 "model." + name.replace("vision_model.", "")
                                .replace("language_model.model.", "language_model."),
])
def test_three_generations_of_names_are_read(folder, change_tensors, model, rename):
    skipped = {"vision_tower.vision_model.embeddings.position_ids": torch.arange(17),
               "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    change_tensors(lambda tensors: {
        rename(name): tensor for name, tensor in (tensors | skipped).items()})
    for name, tensor in Llava.from_pretrained(folder).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_second_layer_of_a_linear_projector_must_be_an_identity(folder, change_tensors):
    name = "multi_modal_projector.linear_2.bias"
    change_tensors(lambda tensors: tensors | {name: torch.ones(32)})
    with pytest.raises(InputError, match="only where .*linear_2.* is an identity"):
        Llava.from_pretrained(folder)


@pytest.mark.parametrize("where", [
    {"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}])
def test_tied_head_may_be_repeated_in_the_file(folder, change_config, change_tensors, where):
    change_config(where)
    with pytest.raises(InputError, match="lm_head.weight is unexpected"):  # it is not the same
        Llava.from_pretrained(folder)
    change_tensors(lambda tensors: tensors | {HEAD: tensors[EMBEDDINGS].clone()})
    assert Llava.from_pretrained(folder).language_model.lm_head is None
    change_tensors(lambda tensors: {k: tensor for k, tensor in tensors.items() if k != HEAD})
    assert Llava.from_pretrained(folder).language_model.lm_head is None


def test_killed_save_leaves_no_config(folder, model, monkeypatch):
    """Without config.json the folder does not open, so old and new files are never mixed."""
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hf_format, "write_tensors", stop)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(folder)
    with pytest.raises(InputError, match="it has no config.json"):
        Llava.from_pretrained(folder)


class DeepProjector(llava.MLPProjector):
    """A type without a public name."""

    def __init__(self, vision, hidden_size):
        super().__init__(vision, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, features):
        return self.norm(super().forward(features))


def test_new_projector_type_is_saved_and_opened(tmp_path, monkeypatch, config):
    monkeypatch.setitem(llava.PROJECTORS, "deep", DeepProjector)
    config.projector = "deep"
    model = Llava(config)
    model.save_pretrained(tmp_path / "run")
    again = Llava.from_pretrained(tmp_path / "run")
    assert again.config == config
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(again.encode_images(images), model.encode_images(images))
    monkeypatch.delitem(llava.PROJECTORS, "deep")
    with pytest.raises(InputError, match="config.json: projector 'deep' .*linear, mlp2x_gelu"):
        Llava.from_pretrained(tmp_path / "run")


def test_identity_is_added_only_to_the_public_linear_type(tmp_path, monkeypatch, config):
    monkeypatch.setitem(llava.PROJECTORS, "other", llava.LinearProjector)
    config.projector = "other"
    Llava(config).save_pretrained(tmp_path)
    assert not any("linear_2" in name for name in load_file(tmp_path / "model.safetensors"))
    assert Llava.from_pretrained(tmp_path).config == config


def test_parts_are_joined_by_a_fresh_projector(model, tmp_path, tokenizer):
    clip, llama = tmp_path / "clip", tmp_path / "llama"
    vision = {f"vision_model.{k}": tensor for k, tensor in model.vision_tower.state_dict().items()}
    skipped = {name: torch.ones(1) for name in (
        "logit_scale", "text_model.final_layer_norm.bias", "visual_projection.weight",
        "vision_model.embeddings.position_ids")}
    hf_format.save_folder(clip, hf_config.clip_json(vars(model.config.vision)), vision | skipped)
    text = model.language_model.state_dict()
    text |= {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    config = hf_config.llama_json(vars(model.config.text))
    hf_format.save_folder(llama, config, text, [tokenizer.path])
    joined = Llava.from_parts(clip, llama)
    assert joined.config == model.config
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(joined.vision_tower(images), model.vision_tower(images))
    head = model.language_model.lm_head.weight
    assert torch.equal(joined.language_model.lm_head.weight, head)
    projector = model.multi_modal_projector.linear_1.weight
    assert not torch.equal(joined.multi_modal_projector.linear_1.weight, projector)
    with pytest.raises(InputError, match="clip/config.json: model_type 'clip_vision_model' is not"):
        Llava.from_parts(clip, clip)
